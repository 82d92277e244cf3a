"""experiments/phenomenology.py: when does on-policy distillation work (paper 3)? Four toy pairs, several seeds.

    pair      student <- teacher                                        paper   holds if, in the mean over seeds
    success   small  <- big, same family, post-trained                  3.2     gap recovery >= 0.8
    bigger    small  <- that big one before its post-training           3.2     |gain| <= 2 standard errors
    other     small  <- big and post-trained, of the other family       3.1     gap recovery < 0.2
    reverse   small, post-trained  <- itself before its post-training   3.3     ends within 2 standard errors
                                                                                of that teacher

    python experiments/phenomenology.py              three seeds, the same settings for every pair;
                                                     results/phenomenology.{json,txt,svg}
    python experiments/phenomenology.py --quick      one seed, few steps: does it run?
"""
import math

import plot
from lab import analysis, distil, main, toy, write_text

PAIRS = {"success": ("student", "teacher"), "bigger": ("student", "bigger"),
         "other": ("student", "other"), "reverse": ("student-rl", "student")}


def seed_runs(seed, world, scratch, quick):
    if not (world / "other").exists():
        toy.make_all(world, seed, everything=True)
    steps = 5 if quick else 100
    return [{"pair": pair, "seed": seed, **distil(world / student, world / teacher, world, scratch / f"{pair}-{seed}",
                                                  steps=steps, eval_every=max(1, steps // 5), seed=seed)}
            for pair, (student, teacher) in PAIRS.items()]


def judge(runs):
    """The criteria above, on the mean over seeds: {pair: {"criterion", "value", "holds"}};
    a value that could not be had is None.
    """
    def each(pair, *keys):
        return [[r[key] for key in keys] for r in runs if r["pair"] == pair]

    def recovered(pair):
        values = [analysis.gap_recovery(*three)
                  for three in each(pair, "accuracy_before", "accuracy_after", "accuracy_teacher")]
        return None if None in values else sum(values) / len(values)

    def difference(pair, a, b):     # a - b, each a mean over the seeds, and two standard errors of it
        two = each(pair, a, b)
        return (sum(x["mean"] - y["mean"] for x, y in two) / len(two),
                2 * math.sqrt(sum(x["standard_error"] ** 2 + y["standard_error"] ** 2 for x, y in two)) / len(two))
    success, other = recovered("success"), recovered("other")
    gain, noise = difference("bigger", "accuracy_after", "accuracy_before")
    off, near = difference("reverse", "accuracy_after", "accuracy_teacher")
    return {"success": {"criterion": "gap recovery >= 0.8", "value": success,
                        "holds": success is not None and success >= 0.8},
            "bigger": {"criterion": f"|gain| <= {noise:.3f}", "value": gain, "holds": abs(gain) <= noise},
            "other": {"criterion": "gap recovery < 0.2", "value": other, "holds": other is not None and other < 0.2},
            "reverse": {"criterion": f"|after - teacher| <= {near:.3f}", "value": off, "holds": abs(off) <= near}}


def table(runs, verdicts):
    """Every seed, then the verdicts."""
    lines = [f"{'pair':8} {'seed':>4} {'teacher':>8} {'before':>7} {'after':>7} "
             f"{'overlap':>14} {'reverse KL':>17} {'masses at the end':>18} {'s':>5}"]
    for r in runs:
        a, b = r["held_out_before"], r["held_out_after"]
        lines.append(f"{r['pair']:8} {r['seed']:4d} {r['accuracy_teacher']['mean']:8.3f} "
                     f"{r['accuracy_before']['mean']:7.3f} {r['accuracy_after']['mean']:7.3f} "
                     f"{a['overlap_ratio']:6.3f} -> {b['overlap_ratio']:.3f} "
                     f"{a['reverse_kl']:7.4f} -> {b['reverse_kl']:.4f} "
                     f"{b['overlap_mass_student']:9.4f} {b['overlap_mass_teacher']:.4f} {r['seconds']:5.0f}")
    for pair, verdict in verdicts.items():
        value = "none" if verdict["value"] is None else f"{verdict['value']:.3f}"
        lines.append(f"{pair:8} {verdict['criterion']:28} {value:>7}  "
                     f"{'holds' if verdict['holds'] else 'DOES NOT HOLD'}")
    return "\n".join(lines)


def report(made, out):
    write_text(table(made["runs"], judge(made["runs"])), made, out)
    plot.draw(out.with_suffix(".json"), out.with_suffix(".svg"))


if __name__ == "__main__":
    main("phenomenology", __doc__.splitlines()[0], seed_runs, report)
