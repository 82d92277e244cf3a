"""experiments/recipe.py: how to recover a run that fails (paper 5). Toy models.

5.1, off-policy cold start. Student and other are the pair that fails. The teacher answers up to
4,095 prompts once each, at T .7 with top-p .95 as in the paper, or at T 1.
    opd              300 steps of OPD
    sft              100 updates of fine-tuning on answers of T .7
    sft, opd         the same, then 200 steps of OPD on other prompts
    sft only         300 updates of fine-tuning: as many as sft, opd
    sft T 1; sft T 1, opd; sft T 1 only     the same three with answers of T 1
Criteria, fixed before the runs ("surely": by more than noise, and .05; lab.py).
    fails            opd makes up less than .2 of its teacher's lead at T .7, in every seed
    rescues          sft, opd makes up .8 or more of it at T .7, in every seed, and ends surely
                     above opd
    start            sft raises overlap ratio and masses and lowers the entropy gap on held-out
                     prompts, in every seed; the same, T 1 (asked after the runs)
    beats            sft, opd ends surely above sft only, at T .7 and greedily; the same, T 1. Not
                     askable if both are right .99 of the time (added after the runs)

5.2, teacher-aligned prompts. Student and bigger were pre-trained on two templates. The teacher,
bigger after RL, was post-trained under one of them and on lists of low digits only (0 to 4). The
student is distilled on low ("aligned") or high digits (5 to 9) or a mixture, under the teacher's
template or the other. Accuracy is measured on digits 0 to 9, for all arms under the teacher's
template and under the other. (The world was changed twice. In a first run bigger was not trained
until it was as good as the student. On seeds 1 and 2 neither it nor the teacher had learnt to add;
the teacher was right .11 of the time: commit b390abd. In a second run some 50 of the 2,048 held-out
prompts were among the low ones, some 50 among the high ones: commit fa9a9b5.)
    aligned          teacher's template, aligned content
    other template   the other template, aligned content
    share 0 to .75   teacher's template, that share of aligned content
Criteria:
    template         aligned ends above other template at T .7 by more than noise, measured under
                     the teacher's template; and measured under the other. (It was .05, too, until
                     after the runs. The paper's own effect is .03.)
    content          aligned ends surely above share 0 at T .7; and its student's entropy is lower,
                     in every seed
    mixing           the share of .5 ends equal to aligned at T .7 or above (the paper advises a
                     mixture and runs none)

    python experiments/recipe.py              results/recipe.{txt,svg}
    python experiments/recipe.py --quick      a few steps: does it run?
"""

import lab
import plot
import toy
from lab import (
    Arm,
    above,
    arm,
    difference,
    each,
    ends_above,
    every_seed,
    finding,
    gain,
    held_out,
    more_than,
    reaches,
    recovery,
)

FEW = dict(cold_start=1024, cold_start_steps=100)
MANY = dict(cold_start=4095, cold_start_steps=300, steps=0)
AT_1 = dict(cold_start_temperature=1.0, cold_start_top_p=1.0)
COLD = {
    "opd": arm("student", "other", steps=300),
    "sft": arm("student", "other", **FEW, steps=0),
    "sft, opd": arm("student", "other", **FEW, steps=200),
    "sft only": arm("student", "other", **MANY),
    "sft T 1": arm("student", "other", **FEW, **AT_1, steps=0),
    "sft T 1, opd": arm("student", "other", **FEW, **AT_1, steps=200),
    "sft T 1 only": arm("student", "other", **MANY, **AT_1),
}

MASSES = ("overlap_mass_student", "overlap_mass_teacher")

LOW = (0, 4)
HIGH = (5, 9)
BOTH = dict(templates=(toy.PLAIN, toy.POLITE))
MODELS = {
    "student-b": dict(**BOTH),
    "bigger-b": dict(size="large", as_good_as="student-b", **BOTH),
    "teacher-b": dict(
        start="bigger-b",
        house_style=True,
        rounds=8,
        post_template=toy.POLITE,
        post_digits=LOW,
        rehearse=True,
        **BOTH,
    ),
}


def aligned(share, template=toy.POLITE):
    """An arm of 5.2: that share of its prompts is like the teacher's own."""
    return Arm(
        "student-b",
        "teacher-b",
        dict(
            template=template,
            prompts="high-prompts.jsonl",
            aligned_prompts="low-prompts.jsonl",
            aligned_fraction=share,
            eval_template=toy.POLITE,
        ),
        exams={"accuracy": toy.POLITE, "accuracy, other template": toy.PLAIN},
    )


PROMPTS = {
    "share 0": aligned(0.0),
    "share .25": aligned(0.25),
    "share .5": aligned(0.5),
    "share .75": aligned(0.75),
    "aligned": aligned(1.0),
    "other template": aligned(1.0, toy.PLAIN),
}
ARMS = {**COLD, **PROMPTS}


def judge(runs):
    """Judge by the criteria above: list of Finding."""
    return [*cold_starts(runs), *prompts(runs)]


def cold_starts(runs):
    """5.1: does a cold start rescue the pair, and beat fine-tuning alone?"""
    made_up = [recovery(run, "T .7") for run in runs["opd"]]
    yield finding(
        "5.1",
        "OPD from another way of thinking fails",
        "it learns, to a lower ceiling (AMC23, about .12 to .26)",
        f"recovery {each(made_up)}; gain {gain(runs['opd'], 'T .7')} at T .7, "
        f"{gain(runs['opd'], 'greedy')} greedily",
        reaches((-x for x in made_up), -0.2),
    )
    made_up = [recovery(run, "T .7") for run in runs["sft, opd"]]
    off = difference(runs["sft, opd"], runs["opd"], "T .7")
    yield finding(
        "5.1",
        "a cold start rescues it",
        "it raises the ceiling (AMC23, about .36 to .40)",
        f"recovery {each(made_up)}, {off} above OPD alone of as many updates at T .7; after the "
        f"cold start alone {each(map(after, runs['sft']))}",
        reaches(made_up, 0.8),
        above(off),
    )
    for T, said in (("", "T .7"), (" T 1", "T 1")):
        changes = {}
        for name in ("overlap_ratio", *MASSES, "entropy_gap", "reverse_kl"):
            changes[name] = [
                (held_out(run, "before", name), held_out(run, "cold_start", name))
                for run in runs[f"sft{T}, opd"]
            ]
        rises = [every_seed(b > a for a, b in changes[name]) for name in ("overlap_ratio", *MASSES)]
        yield finding(
            "5.1",
            f"after a cold start on answers of {said}, OPD begins at a higher overlap and a "
            "smaller entropy gap",
            "high and smooth overlap, masses near 1, a small entropy gap",
            f"overlap {arrows(changes['overlap_ratio'])}; student's mass "
            f"{arrows(changes['overlap_mass_student'])}; entropy gap "
            f"{arrows(changes['entropy_gap'])}; reverse KL {arrows(changes['reverse_kl'])}",
            *rises,
            every_seed(b < a for a, b in changes["entropy_gap"]),
        )
    for T, said in (("", "T .7"), (" T 1", "T 1")):
        arms = (runs[f"sft{T}, opd"], runs[f"sft{T} only"])
        offs = [difference(*arms, way) for way in ("T .7", "greedy", "T 1")]
        yield finding(
            "ours",
            f"after a cold start on answers of {said}, OPD beats further fine-tuning",
            "not controlled",
            f"{offs[0]} at T .7, {offs[1]} greedily, {offs[2]} at T 1",
            *(ends_above(*arms, way) for way in ("T .7", "greedy")),
        )


def prompts(runs):
    """5.2: do the teacher's template, its prompts, and a mixture help?"""
    aligned = runs["aligned"]
    other = "accuracy, other template"
    offs = [
        difference(aligned, runs["other template"], "T .7", exam=exam)
        for exam in ("accuracy", other)
    ]
    yield finding(
        "5.2",
        "training under the teacher's template helps",
        "mean about .54 against .51, recovery about 85 against 80 %",
        f"{offs[0]} at T .7, measured under it; {offs[1]} under the other; "
        f"{difference(aligned, runs['other template'], 'greedy')} greedily, under it",
        *(more_than(off, 0) for off in offs),
    )
    high = runs["share 0"]
    off = difference(aligned, high, "T .7")
    greedy = difference(aligned, high, "greedy")
    entropies = [
        [held_out(run, "after", "entropy_student") for run in of_arm] for of_arm in (aligned, high)
    ]
    yield finding(
        "5.2",
        "the teacher's own prompts help and lower the entropy",
        "better, at lower overlap; entropy about 1.5 against 3 to 6 nats",
        f"{off} at T .7, {greedy} greedily, of high digits; low digits gain "
        f"{gain(aligned, 'T .7')} at T .7, {gain(aligned, 'greedy')} greedily, high "
        f"{gain(high, 'T .7')} and {gain(high, 'greedy')}; "
        f"entropy {each(entropies[0])} against {each(entropies[1])}",
        above(off),
        every_seed(a < b for a, b in zip(*entropies)),
    )
    off = difference(runs["share .5"], aligned, "T .7")
    yield finding(
        "5.2",
        "a mixture does as well as the teacher's own prompts alone, or better",
        "advised, not run",
        f"{off} at T .7, {difference(runs['share .5'], aligned, 'greedy')} greedily, half of them "
        "aligned",
        more_than(off, -lab.MARGIN),
    )


def after(run):
    return run["accuracy"]["after"]["T .7"]["mean"]


def arrows(pairs):
    """Before and after, a pair a seed: "0.60 -> 0.74, ..."."""
    return ", ".join(f"{a:.2f} -> {b:.2f}" for a, b in pairs)


def more(runs):
    """Lines on 5.2: accuracy under both templates, and the entropies."""
    lines = ["", "5.2, T .7 after: under the teacher's template, under the other; entropy, nats"]
    for name in PROMPTS:
        for run in runs[name]:
            both = [
                run[exam]["after"]["T .7"]["mean"]
                for exam in ("accuracy", "accuracy, other template")
            ]
            entropy = held_out(run, "after", "entropy_student")
            lines.append(f"{name:16} {run['seed']:4d} {both[0]:8.3f} {both[1]:8.3f} {entropy:8.3f}")
    return lines


def prepare(lab):
    """Write the questions of 5.2, on low and on high digits, without those of the exam."""
    toy.make_missing(lab.world, lab.seed, names=(), scale=lab.scale)  # no model: the exam alone
    exam = (lab.world / "eval.jsonl").read_text().splitlines()
    for name, digits in (("low", LOW), ("high", HIGH)):
        path = lab.world / f"{name}-prompts.jsonl"
        if not path.exists():
            folder = lab.world / name
            toy.write_questions(folder, lab.seed, digits=digits, held_out=16, without=exam)
            (folder / "prompts.jsonl").rename(path)


if __name__ == "__main__":
    lab.main(
        __doc__,
        ARMS,
        judge,
        models=MODELS,
        prepare=prepare,
        more=more,
        draw=plot.recipe,
    )
