"""experiments/real_lab.py: what the scripts of the real model share (real.py, again.py, longer.py):
their flags, one run, and how results are written down. bench.py and gpu.py write theirs alike."""

import argparse
import dataclasses
import json
import math
import tempfile
import time
import warnings
from pathlib import Path
from statistics import mean, stdev

import transformers
from lab import ROOT, first_sentence, short

import analysis
import opd
from plumbing import figures, files, models, prompts, slots
from plumbing.flags import Config
from rollout import seed_of

CURVES = (
    "step",
    "loss",
    "overlap_ratio",
    "overlap_mass_student",
    "overlap_mass_teacher",
    "overlap_token_advantage",
    "entropy_gap",
    "largest_gap",
    "entropy_student",
    "reverse_kl",
    "reward",
    "response_length",
    "grad_norm",
    "time_update",
    "truncated_fraction",
    "accuracy",
)

MADE_BY = ("commit", "dirty")  # the code, of the provenance
MARGIN = 0.05  # of accuracy: fixed before real.py ran
EARLIER = []  # seconds of the runs, or parts of runs, that were found on the disk


def run(**settings):
    """A run of opd.py, or of one that was killed in the same directory what is left: -> its
    result, its curves. What had been run before this call is counted in EARLIER, in seconds.

    Raises SystemExit where the directory holds a run of other settings or of another commit.
    """
    out = Path(settings["out"])
    cfg = Config(**settings)
    had = read_if_there(out / "config.json")
    result = read_if_there(out / "result.json")
    asked = {
        **dataclasses.asdict(cfg),
        **{name: x for name, x in files.provenance().items() if name in MADE_BY},
    }
    for name in ("steps", "resume", "micro_batch_tokens"):
        del asked[name]
    asked = json.loads(json.dumps(asked))  # as they stand in config.json
    is_another = had is not None and any(had.get(name) != x for name, x in asked.items())
    is_longer = result is not None and result["steps"] > cfg.steps
    if is_another or is_longer:
        raise SystemExit(
            f"{out} holds a run of other settings or of another commit; take another --runs"
        )
    started = time.perf_counter()
    if result is None or result["steps"] < cfg.steps:
        opd.distil(dataclasses.replace(cfg, resume=(out / "checkpoint" / "state.pt").exists()))
    rows = figures.read_rows(out)
    result = files.read_json(out / "result.json")
    EARLIER.append(max(0, result["seconds"] - (time.perf_counter() - started)))
    return {**result, "curves": {name: [short(row.get(name)) for row in rows] for name in CURVES}}


def read_if_there(path):
    return files.read_json(path) if path.exists() else None


def load(student, teacher, **settings):
    """Two directories of models -> teacher.Pair, on the CPU if nothing else is said."""
    return models.load_pair(str(student), str(teacher), **{"device": "cpu", **settings})


def encoded(pair, path, count=None, max_prompt_tokens=64, new_tokens=96):
    """The first `count` prompts of a file with their token ids: list of rows."""
    rows = prompts.load_prompts(path)[:count]
    return prompts.encode_rows(
        pair, rows, max_prompt_tokens=max_prompt_tokens, new_tokens=new_tokens
    )


def write(pair, prompt_ids, *, seed, **how):
    """What the student of a pair writes to prompts (token ids): -> Rollout, see rollout.rollout."""
    seeds = [seed_of(seed, "experiment", i) for i in range(len(prompt_ids))]
    with pair.autocast():
        return slots.rollout(
            pair.student,
            prompt_ids,
            seeds=seeds,
            in_flight=pair.in_flight,
            **pair.sampling,
            **how,
        )


def main(name, about, seed_runs, report, own=None, curves=CURVES):
    """The command line of one experiment; writes results/<name>.json and calls report(results,
    path without suffix).

    seed_runs(seed, world, scratch, quick) -> list of dicts, one a run; world: a directory whose
    models are kept and used again where --worlds names one. report prints the table, and writes
    <name>.txt and <name>.svg. own: {flag: help} of what this experiment cannot run without;
    seed_runs is handed it by name. curves: the ones that the results file keeps.
    """
    parser = argparse.ArgumentParser(description=first_sentence(about))
    for flag, text in (own or {}).items():
        parser.add_argument(f"--{flag}", help=text)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--worlds",
        help="directory for the models, kept and used again (default: --runs, or else a "
        "temporary one)",
    )
    parser.add_argument(
        "--runs",
        help="directory for the runs, kept; one that was killed goes on from its checkpoint "
        "(default: a temporary one)",
    )
    parser.add_argument("--out", default=str(ROOT / "experiments" / "results"))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed, runs of a few steps: does it run? Keeps no results",
    )
    parser.add_argument(
        "--report",
        nargs="*",
        help="run nothing: table, verdicts and figure from the results file, or "
        "from several (of seeds that ran side by side), which are joined into one",
    )
    flags = parser.parse_args()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out = Path(flags.out) / name
    out.parent.mkdir(parents=True, exist_ok=True)
    if flags.report is not None:
        made = join(
            [
                json.loads(Path(path).read_text())
                for path in flags.report or [out.with_suffix(".json")]
            ]
        )
        return save(made, out, curves, report)
    given = {flag: getattr(flags, flag) for flag in own or {}}
    missing = [f"--{flag}" for flag, value in given.items() if not value]
    if missing:
        parser.error(f"{', '.join(missing)}: needed; see --help")
    if flags.quick:
        flags.seeds = [0]
    started = time.perf_counter()
    origin = files.provenance()
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in flags.seeds:
            world = Path(flags.worlds or flags.runs or scratch) / f"world-{seed}"
            runs += seed_runs(seed, world, Path(flags.runs or scratch), flags.quick, **given)
    made = {**origin, "seconds": round(time.perf_counter() - started + sum(EARLIER)), "runs": runs}
    if flags.quick:
        out = Path(tempfile.mkdtemp()) / name  # its numbers mean nothing
    save(made, out, curves, report)


def save(made, out, curves, report):
    for run in made["runs"]:
        if "curves" in run:
            run["curves"] = {name: x for name, x in run["curves"].items() if name in curves}
    files.write_json(out.with_suffix(".json"), made)
    report(made, out)


def join(parts, key="runs"):
    """Results of several commands as one: the runs one after the other, the commands and their
    seconds listed."""
    commands = [part["command"] for part in parts]
    if len(set(commands)) < len(parts):
        raise SystemExit("the same results twice")
    if len({(part["commit"], part["threads"]) for part in parts}) > 1:
        raise SystemExit("these results come from different commits, or numbers of threads")
    return {
        **parts[0],
        "command": " ; ".join(commands),
        "seconds": sum(part["seconds"] for part in parts),
        key: [run for part in parts for run in part[key]],
    }


def difference(ours, theirs, of=("accuracy_after",), than=None):
    """Mean over seeds of an accuracy of ours - one of theirs, and its noise: two standard errors,
    by the prompts of the evaluation, in pairs (analysis.ahead), or by the spread between the
    seeds, whichever is larger.

    of: its keys in each of ours; than: those in theirs, where they are others. Of several the
    mean in a run is taken, of their standard errors too: they are of the same prompts.
    """
    each = []
    variances = []
    for a, b in zip(ours, theirs, strict=True):
        leads = [lead(a[mine], b[other]) for mine in of for other in (than or [mine])]
        each.append(mean(x["mean"] for x in leads))
        variances.append(mean(x["standard_error"] for x in leads) ** 2)
    spread = stdev(each) ** 2 if len(each) > 1 else 0
    return mean(each), 2 * math.sqrt(max(mean(variances), spread) / len(each))


def lead(a, b):
    """How far accuracy a is ahead of b: {"mean", "standard_error"}.

    Prompt by prompt (analysis.ahead) where both know their prompts. Older results do not: the two
    errors are added up.
    """
    if "each" in a and "each" in b:
        return analysis.ahead(a, b)
    errors = [math.inf if x["standard_error"] is None else x["standard_error"] for x in (a, b)]
    return {"mean": a["mean"] - b["mean"], "standard_error": math.hypot(*errors)}


def equal(off, noise):
    """Whether a difference of accuracy means "as good": it is within its noise, and with its
    noise within MARGIN. This is TOST, two one-sided tests of 2.5 % each, and asks besides for
    what "within noise" asked alone. So noise cannot make a finding hold.
    """
    return abs(off) <= noise and abs(off) + noise < MARGIN


def told(x, noise):
    return f"{x:+.3f} (noise {noise:.3f})"


def verdicts(judged):
    """What a judge found, [(name, criterion, what was found, does it hold)], as lines with
    columns."""
    name, criterion = (max(len(line[i]) for line in judged) for i in (0, 1))
    lines = []
    for line in judged:
        holds = "holds" if line[3] else "DOES NOT HOLD"
        lines.append(f"{line[0]:{name}}  {line[1]:{criterion}}  {line[2]}  {holds}")
    return lines


def write_text(text, made, out):
    """Print a table with what made it, and keep it beside the results."""
    text += (
        f"\n{made['command']}, commit {made['commit']}, "
        f"{made['seconds']} s on {made['threads']} thread(s)"
    )
    print(text)
    out.with_suffix(".txt").write_text(text + "\n")
