"""experiments/followups.py: what later papers say of on-policy distillation, asked of the toy
world, three seeds.

One pair (small <- big, post-trained; "all" below), one setting changed at a time:

    16 prompts, 1 prompt     the first so many instead of 4,096, as many responses a step (arXiv
                             2609.04172)
    first 30 %               responses of 10 tokens where a solution takes 33; measured at 96
                             (2605.27028, .31490)
    sharp                    the teacher's softmax at temperature .7: a control that changes q
                             alone
    long, long sampled       400 steps, with Eq. 5 and with the sampled token
    fails                    small <- the other family, post-trained (2606.09471)

Criteria, fixed before the first run. Gains are those of accuracy, means over seeds; noise is
lab.difference's:
    one prompt   gains half of what all prompts do, or more (they report 62 to 89 %), and 16 gain
                 .8 of it
    first 30 %   gains .8 of what whole responses do, or more
    sharp        ends within .05 of "all", noise included: equivalent, and not only no different
                 (TOST)
    low KL       where it fails, the reverse KL falls below half of what it was, and accuracy
                 falls, in every seed: a small KL says that the student agrees with its teacher
                 where it goes, not that either is right
    no end       the sampled token's responses are cut off at their limit .05 more often than Eq.
                 5's, at the end of 400 steps, mean over seeds

    python experiments/followups.py              three seeds; results/followups.{json,txt,svg}
    python experiments/followups.py --quick      one seed, few steps: does it run?
"""

import math
from statistics import mean

import plot
from lab import MARGIN, difference, distil, main, make_models, told, verdicts, write_text

ARMS = {
    "all": {},
    "16 prompts": {},
    "1 prompt": {},
    "first 30 %": dict(max_new_tokens=10),
    "sharp": dict(teacher_temperature=0.7),
    "long": dict(steps=400),
    "long sampled": dict(steps=400, objective="sampled"),
    "fails": {},
}
ENDS = 10  # steps at either end that are averaged


def seed_runs(seed, world, scratch, quick):
    make_models(world, seed)
    runs, lines = [], (world / "prompts.jsonl").read_text().splitlines(keepends=True)
    for arm, how in ARMS.items():
        how = {"steps": 100, "max_new_tokens": 32 if quick else 96, **how}
        if quick:
            how["steps"] = 5
        if "prompt" in arm:
            how["prompts"] = str(world / f"{arm.replace(' ', '-')}.jsonl")
            with open(how["prompts"], "w") as file:
                file.writelines(lines[: int(arm.split()[0])])
        runs.append(
            {
                "arm": arm,
                "seed": seed,
                **distil(
                    world / "student",
                    world / ("other" if arm == "fails" else "teacher"),
                    world,
                    scratch / f"{arm.replace(' ', '-')}-{seed}",
                    seed=seed,
                    eval_every=how["steps"] // 5,
                    eval_n=1 if quick else 4,
                    eval_max_new_tokens=96,
                    **how,
                ),
            }
        )
    return runs


def judge(runs):
    """The criteria above: [(name, criterion, what was found, does it hold)]."""
    arms = {arm: [r for r in runs if r["arm"] == arm] for arm in ARMS}
    gains = {
        arm: mean(r["accuracy_after"]["mean"] - r["accuracy_before"]["mean"] for r in mine)
        for arm, mine in arms.items()
    }
    share = {
        arm: gains[arm] / (gains["all"] or math.nan)
        for arm in ("16 prompts", "1 prompt", "first 30 %")
    }
    off, noise = difference(arms["sharp"], arms["all"])
    kl = [
        [mean(r["curves"]["reverse_kl"][part]) for part in (slice(ENDS), slice(-ENDS, None))]
        for r in arms["fails"]
    ]
    lost = [r["accuracy_after"]["mean"] - r["accuracy_before"]["mean"] for r in arms["fails"]]
    cut = {
        arm: [mean(r["curves"]["truncated_fraction"][-ENDS:]) for r in arms[arm]]
        for arm in ("long", "long sampled")
    }

    def each(values):
        return ", ".join(f"{x:.3f}" for x in values)

    return [
        (
            "later one prompt",
            "half of the gain of all; 16: .8",
            f"{share['1 prompt']:.2f}; {share['16 prompts']:.2f}",
            share["1 prompt"] >= 0.5 and share["16 prompts"] >= 0.8,
        ),
        (
            "later first 30 %",
            ".8 of the gain of whole responses",
            f"{share['first 30 %']:.2f}",
            share["first 30 %"] >= 0.8,
        ),
        (
            "later sharp",
            f"|it - all| + noise < {MARGIN}",
            told(off, noise),
            abs(off) + noise < MARGIN,
        ),
        (
            "later low KL",
            "where it fails KL halves, accuracy falls, each seed",
            "; ".join(f"{a:.2f} -> {b:.2f}, {c:+.3f}" for (a, b), c in zip(kl, lost)),
            all(b < a / 2 for a, b in kl) and max(lost) < 0,
        ),
        (
            "later no end",
            "sampled cut off .05 more often than Eq. 5",
            f"{each(cut['long sampled'])} against {each(cut['long'])}",
            mean(cut["long sampled"]) - mean(cut["long"]) >= 0.05,
        ),
    ]


def report(made, out):
    lines = [
        f"{'arm':13} {'seed':>4} {'before':>7} {'after':>7} {'teacher':>8} {'reverse KL':>17} "
        f"{'overlap':>14} {'length':>6} {'cut off':>7}"
    ]
    for r in made["runs"]:
        a, b = r["held_out_before"], r["held_out_after"]
        lines.append(
            f"{r['arm']:13} {r['seed']:4d} {r['accuracy_before']['mean']:7.3f} "
            f"{r['accuracy_after']['mean']:7.3f} {r['accuracy_teacher']['mean']:8.3f} "
            f"{a['reverse_kl']:7.4f} -> {b['reverse_kl']:.4f} "
            f"{a['overlap_ratio']:6.3f} -> {b['overlap_ratio']:.3f} {b['response_length']:6.1f} "
            f"{b['truncated_fraction']:7.3f}"
        )
    write_text("\n".join(lines + verdicts(judge(made["runs"]))), made, out)
    plot.followups(out.with_suffix(".json"), out.with_suffix(".svg"))


if __name__ == "__main__":
    main(
        "followups",
        __doc__,
        seed_runs,
        report,
        curves=(
            "step",
            "reverse_kl",
            "response_length",
            "truncated_fraction",
            "accuracy",
            "grad_norm",
        ),
    )
