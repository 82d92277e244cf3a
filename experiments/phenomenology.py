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
import analysis  # noqa: E402
from analysis import gap_recovery  # noqa: E402
from plot import draw  # noqa: E402

PAIRS = {"success": ("student", "teacher"), "bigger": ("student", "bigger"),
         "other": ("student", "other"), "reverse": ("student-rl", "student")}
CURVES = ("step", "loss", "overlap_ratio", "overlap_mass_student", "overlap_mass_teacher", "overlap_token_advantage",
          "entropy_gap", "entropy_student", "reverse_kl", "reward", "response_length", "grad_norm", "accuracy")


def run(pair, seed, world, out, steps):
    """One pair distilled -> its result, the curves, and the seconds that it took."""
    student, teacher = PAIRS[pair]
    cfg = opd.Config(**{**opd.PRESETS["toy"], **dict(
        student=str(world / student), teacher=str(world / teacher), prompts=str(world / "prompts.jsonl"),
        eval=str(world / "eval.jsonl"), out=str(out), steps=steps, eval_every=max(1, steps // 5), seed=seed)})
    started = time.perf_counter()
    result = opd.Run(cfg).go()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"pair": pair, "seed": seed, "seconds": round(time.perf_counter() - started, 1), **result,
            "curves": {name: [row.get(name) for row in rows] for name in CURVES}}


def judge(runs):
    """The criteria above, on the mean over seeds: {pair: {"criterion", "value", "holds"}};
    a value that could not be had is None.
    """
    def each(pair, *keys):
        return [[r[key] for key in keys] for r in runs if r["pair"] == pair]

    def recovered(pair):
        values = [gap_recovery(*three) for three in each(pair, "accuracy_before", "accuracy_after", "accuracy_teacher")]
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


def report(out):
    """Table, verdicts and figure from the results file: prints the first two,
    writes out.txt and out.svg beside out.json.
    """
    made = json.loads(out.with_suffix(".json").read_text())
    text = table(made["runs"], judge(made["runs"]))
    text += f"\n{made['command']}, commit {made['commit']}, {made['seconds']} s on {made['threads']} thread(s)"
    print(text)
    out.with_suffix(".txt").write_text(text + "\n")
    draw(out.with_suffix(".json"), out.with_suffix(".svg"))


def main():
    parser = argparse.ArgumentParser(description="Section 3 of the paper on the toy world.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--worlds", help="directory for the models, kept and used again (default: a temporary one)")
    parser.add_argument("--out", default=str(ROOT / "experiments" / "results"))
    parser.add_argument("--quick", action="store_true", help="one seed, models and runs of a few steps: does it run?")
    parser.add_argument("--report", action="store_true",
                        help="run nothing: table, verdicts and figure from the results file")
    flags = parser.parse_args()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if flags.quick:
        flags.seeds, toy.STEPS, toy.HOUSE_STEPS, toy.ROUNDS = 1, {"small": 20, "large": 20}, 5, 0
    started, runs, out = time.perf_counter(), [], Path(flags.out) / "phenomenology"
    out.parent.mkdir(parents=True, exist_ok=True)
    if flags.report:
        return report(out)
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(flags.seeds):
            world = Path(flags.worlds or scratch) / f"world-{seed}"
            if not (world / "other").exists():
                toy.make_all(world, seed, everything=True)
            runs += [run(pair, seed, world, Path(scratch) / f"{pair}-{seed}", 5 if flags.quick else 100)
                     for pair in PAIRS]
    made = {**analysis.provenance(), "seconds": round(time.perf_counter() - started), "runs": runs}
    if flags.quick:
        print(table(runs, judge(runs)))
    else:
        analysis.write_json(out.with_suffix(".json"), made)
        report(out)


if __name__ == "__main__":
    main()
