"""experiments/again.py: what did not hold on the toy, and what later papers say, asked of the real model of real.py.

The base, its teachers, questions and settings are those of real.py; what was run there is not run again where --runs is
the same.

    success        base <- expert, Eq. 5                                                                (real.py)
    sampled, full  the same by Eq. 3 and Eq. 4                                                          (2.2)
    reverse        expert <- base: the student's own earlier self teaches                               (3.3)
    unaligned      the same questions in other words, under another system prompt: not as the teacher was post-trained,
                   and not as all are measured (the paper measures under the teacher's template, too)   (5.2)
    long           responses of up to 144 tokens, of which a solution takes 27                          (6.1)
    first 30 %     responses of 8 tokens; measured at 48                            (arXiv 2605.27028, 2605.31490)
    one prompt     the same question 16 times a step                                               (2609.04172)
    other way      base <- backwards, the pair that fails                              (real.py; for 2606.09471)

Criteria, fixed before the first run, those of the toy where it has one; three seeds, paired prompt by prompt:
    2.2 estimators  sampled and success both end equal to full (lab.equal: within noise, and .05 noise included)
    3.3 reverse     ends equal to its teacher
    3.3 lost        loses .8 or more of what the expert had gained over the base, mean over seeds
    5.2 template    success ends above unaligned by more than noise
    6.1 long        success ends above long by more than noise
    one prompt      gains half of what success does, or more
    first 30 %      gains .8 of it, or more
    low KL          other way: held-out reverse KL ends below half of what it was, and accuracy falls, in every seed

    python experiments/again.py --base DIR_OR_HUB         results/again.{json,txt,svg}; an hour a seed on 2 cores
"""
import math
from statistics import mean

import plot
from lab import difference, equal, main, told, verdicts, write_text
from real import NEEDED, distilled, gain, of, teachers, write_questions

RUNS = {    # name -> (student, teacher, settings)
    "success": ("base", "expert", {}), "sampled": ("base", "expert", dict(objective="sampled")),
    "full": ("base", "expert", dict(objective="full")), "reverse": ("expert", "base", {}),
    "unaligned": ("base", "expert", dict(prompts="wordy.jsonl")),
    "long": ("base", "expert", dict(max_new_tokens=144)), "first 30 %": ("base", "expert", dict(max_new_tokens=8)),
    "one prompt": ("base", "expert", dict(prompts="one.jsonl")), "other way": ("base", "backwards", {})}


def seed_runs(seed, world, scratch, quick, base):
    world.mkdir(parents=True, exist_ok=True)
    write_questions(world, seed)
    teachers(base, world, seed, quick)
    made = []
    for name, (student, teacher, how) in RUNS.items():
        student, teacher = (base if who == "base" else world / who for who in (student, teacher))
        if "prompts" in how:
            how = {**how, "prompts": str(world / how["prompts"])}
        made.append(distilled(name, student, teacher, world, scratch, seed, quick, **how))
    return made


def judge(runs):
    """The criteria above: [(name, criterion, what was found, does it hold)]."""
    arms = {name: of(runs, name) for name in RUNS}
    against = {name: difference(arms[name], arms["full"]) for name in ("sampled", "success")}
    reverse = arms["reverse"]
    off, noise = difference(reverse, reverse, than=("accuracy_teacher",))
    given = difference(reverse, reverse, ("accuracy_before",), ("accuracy_teacher",))[0]
    lost = difference(reverse, reverse, ("accuracy_before",), ("accuracy_after",))[0] / (given or math.nan)
    ahead = {name: difference(arms["success"], arms[name]) for name in ("unaligned", "long")}
    share = {name: mean(gain(arms[name])) / (mean(gain(arms["success"])) or math.nan)
             for name in ("one prompt", "first 30 %")}
    kl = [[r[f"held_out_{when}"]["reverse_kl"] for when in ("before", "after")] for r in arms["other way"]]
    lines = [("again 2.2 estimators", "same end as Eq. 4", ", ".join(
        f"{name} {told(*x)}" for name, x in against.items()), all(equal(*x) for x in against.values())),
        ("again 3.3 reverse", "ends equal to its teacher", told(off, noise), equal(off, noise)),
        ("again 3.3 lost", ">= .8 of what it had gained", f"{lost:.2f}", lost >= 0.8)]
    for name, title in (("unaligned", "5.2 template"), ("long", "6.1 long")):
        lines.append((f"again {title}", f"success above {name}", told(*ahead[name]), ahead[name][0] > ahead[name][1]))
    for name, least in (("one prompt", 0.5), ("first 30 %", 0.8)):
        lines.append((f"again {name}", f"{least} of the gain of success", f"{share[name]:.2f}", share[name] >= least))
    return [*lines, ("again low KL", "where it fails KL halves, accuracy falls, each seed", "; ".join(
        f"{a:.2f} -> {b:.2f}, {x:+.3f}" for (a, b), x in zip(kl, gain(arms["other way"]))),
        all(b < a / 2 for a, b in kl) and max(gain(arms["other way"])) < 0)]


def report(made, out):
    lines = [f"{'run':11} {'seed':>4} {'before':>7} {'after':>7} {'teacher':>8} {'overlap':>14} {'reverse KL':>15} "
             f"{'cut off':>7} {'s':>5}"]
    for r in made["runs"]:
        a, b = r["held_out_before"], r["held_out_after"]
        lines.append(f"{r['run']:11} {r['seed']:4d} {r['accuracy_before']['mean']:7.3f} "
                     f"{r['accuracy_after']['mean']:7.3f} {r['accuracy_teacher']['mean']:8.3f} "
                     f"{a['overlap_ratio']:6.3f} -> {b['overlap_ratio']:.3f} "
                     f"{a['reverse_kl']:6.3f} -> {b['reverse_kl']:.3f} {b['truncated_fraction']:7.3f} "
                     f"{r['seconds']:5.0f}")
    write_text("\n".join(lines + verdicts(judge(made["runs"]))), made, out)
    plot.again(out.with_suffix(".json"), out.with_suffix(".svg"))


if __name__ == "__main__":
    main("again", __doc__.splitlines()[0], seed_runs, report, NEEDED, curves=("step", "reverse_kl", "loss"))
