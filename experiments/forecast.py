"""experiments/forecast.py: is the verdict before training worth having? Sixteen toy pairs a seed
(paper 3, ours).

Each pair is diagnosed as `analysis.py --student S --teacher T` does it, then distilled with the
same settings as every other pair. The pairs, the rules of analysis.verdict and these criteria
were fixed before the first run:

    rank     Spearman correlation of the predicted gain (mean continuation gain) with the realised
             one >= 0.8, all runs
    promise  no pair that "should work" ends below a gain of zero (mean over seeds)

    python experiments/forecast.py              three seeds; results/forecast.{json,txt,svg}
    python experiments/forecast.py --quick      one seed, few steps: does it run?
"""

import plot
from lab import analysis, distil, encoded, load, main, slots, toy, verdicts, write_text

from plumbing.answers import answered

MODELS = {  # in the order in which they are made; start: post-trained from that one
    "small": dict(),
    "small-2": dict(),
    "noisy": dict(noise=0.12),
    "right-small": dict(family="right"),
    "large": dict(size="large"),
    "large-clean": dict(size="large", noise=0.02),
    "large-noisy": dict(size="large", noise=0.15),
    "right": dict(size="large", family="right"),
    "large-style": dict(start="large", house_style=True),
    "large-rl2": dict(start="large", house_style=True, rounds=2),
    "large-rl8": dict(start="large", house_style=True, rounds=8),
    "small-rl8": dict(start="small", house_style=True, rounds=8),
    "right-rl8": dict(start="right", family="right", house_style=True, rounds=8),
}
PAIRS = [
    ("small", teacher)
    for teacher in (
        "small-2",
        "large",
        "large-style",
        "large-rl2",
        "large-rl8",
        "small-rl8",
        "large-clean",
        "large-noisy",
        "right",
        "right-rl8",
    )
] + [
    ("small-rl8", "small"),
    ("small-rl8", "large"),
    ("small-rl8", "large-rl8"),
    ("noisy", "small"),
    ("noisy", "large-rl8"),
    ("right-small", "large-rl8"),
]


def seed_runs(seed, world, scratch, quick):
    models = world / "forecast"
    models.mkdir(parents=True, exist_ok=True)
    toy.write_questions(world, seed=10 * seed)
    for i, (name, how) in enumerate(MODELS.items()):
        if not (models / name / "config.json").exists():
            how = {
                **how,
                **({"start": models / how["start"]} if "start" in how else {}),
                **({"rounds": min(how["rounds"], toy.ROUNDS)} if "rounds" in how else {}),
            }
            toy.make(models / name, seed=1000 * seed + i, **how)
    runs = []
    for student, teacher in PAIRS:
        pair = load(models / student, models / teacher)
        rows = encoded(pair, world / "prompts.jsonl", 8 if quick else 128)
        report = analysis.diagnose_pair(
            pair,
            rows,
            answered=answered,
            rollout=slots.rollout,
            n=2,
            max_new_tokens=96,
            eval_temperature=1.0,
            eval_top_p=1.0,
            seed=seed,
        )
        result = distil(
            models / student,
            models / teacher,
            world,
            scratch / f"{student}-{teacher}-{seed}",
            steps=3 if quick else 100,
            eval_n=1 if quick else 4,
            seed=seed,
        )
        del result["curves"]
        runs.append(
            {
                "seed": seed,
                "student": student,
                "teacher": teacher,
                "verdict": report["verdict"],
                "predicted_gain": report["predicted_gain"],
                "first_gain": report["continuation"][0]["gain"],
                "overlap_ratio": report["metrics"]["overlap_ratio"]["mean"],
                "mass": min(
                    report["metrics"][f"overlap_mass_{side}"]["mean"]
                    for side in ("student", "teacher")
                ),
                "reverse_kl": report["metrics"]["reverse_kl"]["mean"],
                "auroc": report["auroc"],
                "gain": result["accuracy_after"]["mean"] - result["accuracy_before"]["mean"],
                **result,
            }
        )
    return runs


def ranks(x):
    """1 for the smallest; ties share the mean of their ranks: list -> list."""
    return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]


def spearman(x, y):
    """The correlation of the ranks: float, or None where one of them does not vary."""
    x, y = ([r - (len(x) + 1) / 2 for r in ranks(values)] for values in (x, y))
    scale = (sum(a * a for a in x) * sum(b * b for b in y)) ** 0.5
    return sum(a * b for a, b in zip(x, y)) / scale if scale else None


def report(made, out):
    runs = made["runs"]
    lines = [
        f"{'student':12} {'teacher':12} {'seed':>4} {'before':>7} {'teacher':>7} {'overlap':>7} "
        f"{'mass':>6} {'rev.KL':>7} {'predicted gain':>16} {'realised':>8} {'recovery':>8}  "
        "verdict"
    ]
    for r in sorted(runs, key=lambda r: PAIRS.index((r["student"], r["teacher"]))):
        recovered = "-" if r["gap_recovery"] is None else f"{r['gap_recovery']:.2f}"
        predicted = r["predicted_gain"]
        lines.append(
            f"{r['student']:12} {r['teacher']:12} {r['seed']:4d} "
            f"{r['accuracy_before']['mean']:7.3f} {r['accuracy_teacher']['mean']:7.3f} "
            f"{r['overlap_ratio']:7.3f} {r['mass']:6.3f} "
            f"{r['reverse_kl']:7.3f} {predicted['mean']:+8.3f} +- "
            f"{predicted['standard_error']:.3f} {r['gain']:+8.3f} {recovered:>8}  {r['verdict']}"
        )
    realised = [r["gain"] for r in runs]
    predictors = {
        "predicted gain": [r["predicted_gain"]["mean"] for r in runs],
        "teacher's lead in score": [r["first_gain"]["mean"] for r in runs],
        "overlap ratio": [r["overlap_ratio"] for r in runs],
        "minus reverse KL": [-r["reverse_kl"] for r in runs],
    }
    lines.append("")
    for name, values in predictors.items():
        each = []
        for seed in sorted({r["seed"] for r in runs}):
            mine = [i for i, r in enumerate(runs) if r["seed"] == seed]
            rank = spearman([values[i] for i in mine], [realised[i] for i in mine])
            each.append(f"{rank or 0:.2f}")
        lines.append(
            f"Spearman with the realised gain: {name:24} {spearman(values, realised) or 0:5.2f}   "
            f"each seed {', '.join(each)}"
        )
    known = [r for r in runs if r["gap_recovery"] is not None]
    rank = spearman(
        [r["predicted_gain"]["mean"] for r in known], [r["gap_recovery"] for r in known]
    )
    lines.append(
        f"Spearman of the predicted gain with the gap recovery, {len(known)} runs that have one: "
        f"{rank or 0:.2f}"
    )
    lines.append("")
    for name in analysis.VERDICTS:
        gains = [r["gain"] for r in runs if r["verdict"] == name]
        if gains:
            lines.append(
                f"{name:44} {len(gains):3d} runs, gain {min(gains):+.3f} .. {max(gains):+.3f}, "
                f"mean {sum(gains) / len(gains):+.3f}"
            )
    judged = judge(runs)
    write_text("\n".join(lines + verdicts(judged)), made, out)
    plot.forecast(
        out.with_suffix(".json"),
        out.with_suffix(".svg"),
        f"Spearman {judged[0][2]}, {len(runs)} runs",
    )


def judge(runs):
    """The criteria above: [(name, criterion, what was found, does it hold)]."""
    rank, promised = (
        spearman([r["predicted_gain"]["mean"] for r in runs], [r["gain"] for r in runs]) or 0,
        {},
    )
    for r in runs:
        if r["verdict"] == analysis.SHOULD_WORK:
            promised.setdefault((r["student"], r["teacher"]), []).append(r["gain"])
    broken = [f"{s} <- {t}" for (s, t), gains in promised.items() if sum(gains) < 0]
    return [
        ("forecast rank", "Spearman >= 0.8", f"{rank:.2f}", rank >= 0.8),
        (
            "forecast promise",
            'no "should work" below zero',
            ", ".join(broken) or "none",
            not broken,
        ),
    ]


if __name__ == "__main__":
    main("forecast", __doc__, seed_runs, report)
