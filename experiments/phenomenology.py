"""experiments/phenomenology.py: when does on-policy distillation work (paper 3)? Four toy pairs, several seeds.

    pair      student <- teacher                                        paper   holds if, in the mean over seeds
    success   small  <- big, same family, post-trained                  3.2     gap recovery >= 0.8
    bigger    small  <- that big one before its post-training           3.2     |gain| <= 2 standard errors
    other     small  <- big and post-trained, of the other family       3.1     gap recovery < 0.2
    reverse   small, post-trained  <- itself before its post-training   3.3     ends within 2 standard errors of that teacher

    python experiments/phenomenology.py              three seeds, the same settings for every pair; results/phenomenology.json and .svg
    python experiments/phenomenology.py --quick      one seed, few steps: does it run?
"""
import argparse
import json
import math
import sys
import tempfile
import time
import warnings
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import opd  # noqa: E402
import toy  # noqa: E402
from plot import draw  # noqa: E402

PAIRS = {"success": ("student", "teacher"), "bigger": ("student", "bigger"), "other": ("student", "other"), "reverse": ("student-rl", "student")}
CURVES = ("step", "loss", "overlap_ratio", "overlap_mass_student", "overlap_mass_teacher", "overlap_token_advantage", "entropy_gap",
          "entropy_student", "reverse_kl", "reward", "response_length", "grad_norm", "accuracy")


def run(pair, seed, world, out, steps):
    """One pair distilled -> its result, the curves, and the seconds that it took."""
    student, teacher = PAIRS[pair]
    cfg = opd.Config(**{**opd.PRESETS["toy"], **dict(
        student=str(world / student), teacher=str(world / teacher), prompts=str(world / "prompts.jsonl"), eval=str(world / "eval.jsonl"),
        out=str(out), steps=steps, eval_every=max(1, steps // 5), seed=seed)})
    started = time.perf_counter()
    result = opd.Run(cfg).go()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"pair": pair, "seed": seed, "seconds": round(time.perf_counter() - started, 1), **result,
            "curves": {name: [row.get(name) for row in rows] for name in CURVES}}


def mean_and_error(values):
    """-> mean and standard error over seeds, None where a seed has no value or there is but one seed."""
    if not values or None in values:
        return None, None
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values)) if len(values) > 1 else None


def judge(runs):
    """The criteria above, on the mean over seeds: {pair: {"value", "holds", "criterion"}}."""
    def mean(pair, value):
        return mean_and_error([value(r) for r in runs if r["pair"] == pair])[0]

    def noise(pair, a, b):          # two standard errors of a difference of two accuracies, each a mean over the seeds
        errors = [r[key]["standard_error"] for r in runs if r["pair"] == pair for key in (a, b)]
        return 2 * math.sqrt(sum(e * e for e in errors)) / len([r for r in runs if r["pair"] == pair])
    recovery = {pair: mean(pair, lambda r: (r["accuracy_after"]["mean"] - r["accuracy_before"]["mean"])
                           / (r["accuracy_teacher"]["mean"] - r["accuracy_before"]["mean"])) for pair in ("success", "other")}
    gain = mean("bigger", lambda r: r["accuracy_after"]["mean"] - r["accuracy_before"]["mean"])
    off = mean("reverse", lambda r: r["accuracy_after"]["mean"] - r["accuracy_teacher"]["mean"])
    near = {"bigger": noise("bigger", "accuracy_after", "accuracy_before"), "reverse": noise("reverse", "accuracy_after", "accuracy_teacher")}
    return {"success": {"criterion": "gap recovery >= 0.8", "value": recovery["success"], "holds": recovery["success"] >= 0.8},
            "bigger": {"criterion": f"|gain| <= {near['bigger']:.3f}", "value": gain, "holds": abs(gain) <= near["bigger"]},
            "other": {"criterion": "gap recovery < 0.2", "value": recovery["other"], "holds": recovery["other"] < 0.2},
            "reverse": {"criterion": f"|after - teacher| <= {near['reverse']:.3f}", "value": off, "holds": abs(off) <= near["reverse"]}}


def table(runs, verdicts):
    """Every seed, then the verdicts."""
    lines = [f"{'pair':8} {'seed':>4} {'teacher':>8} {'before':>7} {'after':>7} {'overlap':>14} {'reverse KL':>17} {'masses at the end':>18} {'s':>5}"]
    for r in runs:
        a, b = r["held_out_before"], r["held_out_after"]
        lines.append(f"{r['pair']:8} {r['seed']:4d} {r['accuracy_teacher']['mean']:8.3f} {r['accuracy_before']['mean']:7.3f} {r['accuracy_after']['mean']:7.3f} "
                     f"{a['overlap_ratio']:6.3f} -> {b['overlap_ratio']:.3f} {a['reverse_kl']:7.4f} -> {b['reverse_kl']:.4f} "
                     f"{b['overlap_mass_student']:9.4f} {b['overlap_mass_teacher']:.4f} {r['seconds']:5.0f}")
    return "\n".join(lines + [f"{pair:8} {v['criterion']:28} {v['value']:7.3f}  {'holds' if v['holds'] else 'DOES NOT HOLD'}" for pair, v in verdicts.items()])


def main():
    parser = argparse.ArgumentParser(description="Section 3 of the paper on the toy world.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--worlds", help="directory for the models, kept and used again (default: a temporary one)")
    parser.add_argument("--out", default=str(ROOT / "experiments" / "results"))
    parser.add_argument("--quick", action="store_true", help="one seed, models and runs of a few steps: does it run?")
    flags = parser.parse_args()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if flags.quick:
        flags.seeds, toy.STEPS, toy.HOUSE_STEPS, toy.ROUNDS = 1, {"small": 20, "large": 20}, 5, 0
    started, runs = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(flags.seeds):
            world = Path(flags.worlds or scratch) / f"world-{seed}"
            if not (world / "other").exists():
                toy.make_all(world, seed, everything=True)
            runs += [run(pair, seed, world, Path(scratch) / f"{pair}-{seed}", 5 if flags.quick else 100) for pair in PAIRS]
    verdicts = judge(runs)
    print(table(runs, verdicts))
    if not flags.quick:
        out = Path(flags.out) / "phenomenology"
        opd.write_json(out.with_suffix(".json"), {**opd.provenance(), "seconds": round(time.perf_counter() - started), "verdicts": verdicts, "runs": runs})
        draw(out.with_suffix(".json"), out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
