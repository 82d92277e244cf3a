"""experiments/lab.py: what the experiments share: their flags, one distillation, and how results are written down."""
import argparse
import json
import math
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import mean

import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import analysis  # noqa: E402
import opd  # noqa: E402
import toy  # noqa: E402

CURVES = ("step", "loss", "overlap_ratio", "overlap_mass_student", "overlap_mass_teacher", "overlap_token_advantage",
          "entropy_gap", "largest_gap", "entropy_student", "reverse_kl", "reward", "response_length", "grad_norm",
          "time_update", "accuracy")


def distil(student, teacher, world, out, **settings):
    """A run of opd.py on toy models with the toy preset, other settings by name: -> its result, curves, seconds."""
    started = time.perf_counter()
    cfg = opd.Config(**{**opd.PRESETS["toy"], **dict(
        student=str(student), teacher=str(teacher), prompts=str(world / "prompts.jsonl"),
        eval=str(world / "eval.jsonl"), out=str(out)), **settings})
    result = opd.Run(cfg).go()
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return {**result, "seconds": round(time.perf_counter() - started, 1),
            "curves": {name: [row.get(name) for row in rows] for name in CURVES}}


def main(name, description, seed_runs, report):
    """The command line of one experiment; writes results/<name>.json and calls report(results, path without suffix).

    seed_runs(seed, world, scratch, quick) -> list of dicts, one a run; world: a directory whose models are kept and
    used again where --worlds names one. report prints the table, and writes <name>.txt and <name>.svg.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--worlds", help="directory for the models, kept and used again (default: a temporary one)")
    parser.add_argument("--out", default=str(ROOT / "experiments" / "results"))
    parser.add_argument("--quick", action="store_true", help="one seed, models and runs of a few steps: does it run?")
    parser.add_argument("--report", nargs="*", help="run nothing: table, verdicts and figure from the results file, or "
                        "from several (of seeds that ran side by side), which are joined into one")
    flags = parser.parse_args()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out = Path(flags.out) / name
    out.parent.mkdir(parents=True, exist_ok=True)
    if flags.report is not None:
        made = join([json.loads(Path(path).read_text()) for path in flags.report or [out.with_suffix(".json")]])
        analysis.write_json(out.with_suffix(".json"), made)
        return report(made, out)
    if flags.quick:
        flags.seeds, toy.STEPS, toy.HOUSE_STEPS, toy.ROUNDS = [0], {"small": 20, "large": 20}, 5, 0
    started, runs = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in flags.seeds:
            world = Path(flags.worlds or scratch) / f"world-{seed}"
            runs += seed_runs(seed, world, Path(scratch), flags.quick)
    made = {**analysis.provenance(), "seconds": round(time.perf_counter() - started), "runs": runs}
    if flags.quick:
        out = Path(tempfile.mkdtemp()) / name                   # its numbers mean nothing
    analysis.write_json(out.with_suffix(".json"), made)
    report(made, out)


def join(parts, key="runs"):
    """Results of several commands as one: the runs one after the other, the commands and their seconds listed."""
    for part in parts:
        part["command"] = " ".join(map(analysis.portable, part["command"].split()))
    if len(parts) == 1:
        return parts[0]
    if len({part["commit"] for part in parts}) > 1:
        raise SystemExit("these results come from different commits")
    return {**parts[0], "command": " ; ".join(part["command"] for part in parts),
            "seconds": sum(part["seconds"] for part in parts), key: [run for part in parts for run in part[key]]}


def difference(ours, theirs, keys=("accuracy_after", "accuracy_after")):
    """Mean over seeds of an accuracy of ours - one of theirs, and two standard errors of it."""
    pairs = [(a[keys[0]], b[keys[1]]) for a, b in zip(ours, theirs, strict=True)]
    return (mean(a["mean"] - b["mean"] for a, b in pairs),
            2 * math.sqrt(sum(a["standard_error"] ** 2 + b["standard_error"] ** 2 for a, b in pairs)) / len(pairs))


def write_text(text, made, out):
    """Print a table with what made it, and keep it beside the results."""
    text += f"\n{made['command']}, commit {made['commit']}, {made['seconds']} s on {made['threads']} thread(s)"
    print(text)
    out.with_suffix(".txt").write_text(text + "\n")
