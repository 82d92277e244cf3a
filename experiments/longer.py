"""experiments/longer.py: a longer cold start, where a short one did not rescue the real model
(paper 5.1).

The teacher writes sums in words. In again.py 10 updates on 160 of its answers taught the words
and not the sums. Here it has 60 updates on 480 answers; base, teacher, questions and 12 steps of
OPD are those of again.py, from whose results the runs without a cold start and with the short one
are read:

    long cold    base <- words, after a cold start of 480 answers, twice through, 60 updates

Asked after again.py's first seed was seen, with that script's criterion; three seeds, paired
prompt by prompt:
    long cold    ends above words by more than noise

    python experiments/longer.py --base DIR_OR_HUB --again experiments/results/again.json
    writes results/longer.{json,txt,svg}

Some 37 minutes a seed, of one thread, where --worlds has the teachers of again.py. More answers
and more updates are not told apart, and neither are they from fine-tuning alone: the accuracy
right after it is printed.
"""

import plot
from again import COLD, runs_of, teach_words
from real import distilled, of, write_questions
from real_lab import difference, main, told, verdicts, write_text

NEEDED = {
    "base": "the chat model of real.py",
    "again": "results file of again.py, of the same seeds and more",
}
SHARED = ("words", "words, cold")  # runs of again.py
MEASURED = ("held_out_before", "held_out_cold_start", "held_out_after")
RUNS = {"long cold": {**COLD, "cold_start": 480, "cold_start_steps": 60}}


def seed_runs(seed, world, scratch, quick, base, again):
    shared = runs_of(again, seed, SHARED, "again.py")
    world.mkdir(parents=True, exist_ok=True)
    write_questions(world, seed)
    teach_words(base, world, seed, quick)
    return shared + [
        distilled(name, base, world / "words", world, scratch, seed, quick, **how)
        for name, how in RUNS.items()
    ]


def judge(runs):
    """The criterion above: [(name, criterion, what was found, does it hold)]."""
    better, noise = difference(of(runs, "long cold"), of(runs, "words"))
    return [
        ("longer cold start", "above words by more than noise", told(better, noise), better > noise)
    ]


def report(made, out):
    lines = [
        f"{'run':11} {'seed':>4} {'before':>7} {'cold start':>10} {'after':>7} {'teacher':>8} "
        f"{'recovery':>8} {'reverse KL':>24}"
    ]
    for r in made["runs"]:
        started = r.get("accuracy_cold_start")
        distances = [f"{r[when]['reverse_kl']:.3f}" for when in MEASURED if when in r]
        lines.append(
            f"{r['run']:11} {r['seed']:4d} {r['accuracy_before']['mean']:7.3f} "
            f"{started['mean'] if started else '':{'10.3f' if started else '>10'}} "
            f"{r['accuracy_after']['mean']:7.3f} {r['accuracy_teacher']['mean']:8.3f} "
            f"{'-' if r['gap_recovery'] is None else format(r['gap_recovery'], '.2f'):>8} "
            f"{' -> '.join(distances):>24}"
        )
    write_text("\n".join(lines + verdicts(judge(made["runs"]))), made, out)
    plot.longer(out.with_suffix(".json"), out.with_suffix(".svg"))


if __name__ == "__main__":
    main(
        "longer",
        __doc__,
        seed_runs,
        report,
        NEEDED,
        curves=(
            "step",
            "reverse_kl",
            "loss",
            "overlap_ratio",
            "overlap_mass_student",
            "overlap_mass_teacher",
        ),
    )
