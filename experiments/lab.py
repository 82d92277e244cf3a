"""experiments/lab.py: what the experiments share: worlds, arms, measuring, and four words.

An arm is one training run: who learns from whom, and with which settings. A probe measures models
without training. Either is run once for each seed. Its result is a file of its own,
results/toy/NAME-SEED.json (results/real/ for SmolLM2), with the settings, the commit and the CPU
seconds that made it. So an arm can be added, or removed and run again, by itself. Scripts that ask
for the same arm share its result.

Lab is one seed of the toy world (toy.py). sums.RealLab is one seed of the world of SmolLM2.

Worlds and runs are kept in --worlds. What is missing there is made again from its seed. A run that
was killed goes on from its checkpoint.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import toy  # noqa: E402

import opd  # noqa: E402
from analysis import estimate  # noqa: E402
from plumbing import figures, files, models, prompts, slots  # noqa: E402
from plumbing.answers import answered  # noqa: E402
from plumbing.exits import one_line  # noqa: E402
from plumbing.flags import PRESETS, Config  # noqa: E402
from recipes import in_template  # noqa: E402
from rollout import seed_of  # noqa: E402

RESULTS = ROOT / "experiments" / "results"
CURVES = (
    "step",
    "loss",
    "reverse_kl",
    "overlap_ratio",
    "overlap_mass_student",
    "overlap_mass_teacher",
    "overlap_token_advantage",
    "entropy_gap",
    "largest_gap",
    "entropy_student",
    "response_length",
    "truncated_fraction",
    "grad_norm",
    "accuracy",
)
POINTS = 100  # that are kept of a curve


# --- arms -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One training run.

    student, teacher: names of models of the world. settings: flags of opd.py that differ from those
    of the lab; files are named within the world's folder. train: a function of (lab, arm, folder)
    that trains in place of opd.py. It saves folder/student and returns what else to keep. exams:
    {name: exam}, how accuracy is measured; by default the lab's exam alone. An exam of the toy is a
    template.
    """

    student: str
    teacher: str
    settings: dict = field(default_factory=dict)
    train: Callable = None
    exams: dict = field(default_factory=dict)


def arm(student, teacher, **settings):
    return Arm(student, teacher, settings)


class Lab:
    """One seed of the toy: its world of models, its runs, its results."""

    kind = "toy"  # the folder of the results
    new_tokens = 96  # at most, of a response; a solution takes some 32
    max_prompt_tokens = 64
    in_flight = 0  # responses written at a time; 0: all
    dtype = "float32"  # in which models are measured
    exam = toy.PLAIN
    defaults = {"steps": 100, **PRESETS["toy"]}  # flags of an arm
    quick_sizes = {"batch_size": 8, "steps": 4, "cold_start": 16, "cold_start_steps": 2}

    def __init__(self, seed, worlds, results, quick=False, models=None):
        self.seed = seed
        self.quick = quick
        self.world = Path(worlds).resolve() / f"world-{seed}"
        self.results = Path(results)
        self.scale = toy.QUICK if quick else toy.FULL
        self.held_out = self.scale.held_out
        self.models = {**toy.MODELS, **(models or {})}

    def model(self, name):
        """The folder of a model of this world, made if it is not there."""
        if not toy.is_made(self.world / name):
            toy.make_missing(self.world, self.seed, (name,), self.scale, self.models)
        return self.world / name

    def load(self, student, teacher):
        """A student and a teacher, by name or folder -> teacher.Pair on the CPU."""
        paths = [x if isinstance(x, Path) else self.model(x) for x in (student, teacher)]
        return models.load_pair(
            *map(str, paths), device="cpu", dtype=self.dtype, in_flight=self.in_flight
        )

    def rows(self, pair, count, name="prompts", template=toy.PLAIN):
        """The first prompts of a file of this world, with their token ids: list of dicts."""
        found = in_template(prompts.load_prompts(self.world / f"{name}.jsonl")[:count], template)
        return prompts.encode_rows(
            pair, found, max_prompt_tokens=self.max_prompt_tokens, new_tokens=self.new_tokens
        )

    def exam_rows(self, pair, exam):
        """The held-out prompts of an exam with their token ids: list of dicts."""
        return self.rows(pair, self.held_out, "eval", exam)

    def write(self, pair, rows, what, **how):
        """Let the student of a pair answer rows: -> Rollout. `what` names the random numbers."""
        seeds = [seed_of(self.seed, what, i) for i in range(len(rows))]
        with pair.autocast():
            return slots.rollout(
                pair.student,
                [row["ids"] for row in rows],
                seeds=seeds,
                max_new_tokens=self.new_tokens,
                in_flight=pair.in_flight,
                **pair.sampling,
                **how,
            )

    def first_slip(self, pair, row, response):
        """Where a response (token ids) first goes wrong: its index, None if it never does."""
        digits = [int(word[1]) for word in row["prompt"].split()[1:-1]]  # "Add a3 b7 :" -> 3, 7
        return toy.first_slip(response, digits, len(digits))

    def once(self, name, asked, make):
        """The result of that name, read if it is there, else made and kept.

        asked: the settings that decide it, plain values. SystemExit if the file was made with
        others; it may have been made in another dtype.
        """
        path = self.results / self.kind / file_name(name, self.seed)
        names = {"name": name, "seed": self.seed, "measured in": self.dtype}
        return once(path, names, asked, make)

    def run(self, name, arm):
        """Run an arm that has no result yet: -> its result."""
        return self.once(name, self.asked(arm), lambda: self.train(name, arm))

    def asked(self, arm):
        """The settings that decide the result of an arm: dict."""
        asked = {"student": arm.student, "teacher": arm.teacher, **self.defaults, **arm.settings}
        if arm.train is not None:
            asked["train"] = arm.train.__name__
        if self.quick:
            for name, size in self.quick_sizes.items():
                if name in asked:
                    asked[name] = min(asked[name], size)
        return asked

    def followed(self, steps):
        """The flags with which a run follows its accuracy as it trains: {"eval", "eval_every"}.

        They ask for 256 held-out prompts. The result is measured on all of them, after the run.
        """
        some = self.world / "eval-256.jsonl"
        lines = (self.world / "eval.jsonl").read_text().splitlines(keepends=True)
        some.write_text("".join(lines[:256]))
        return {"eval": (str(some),), "eval_every": max(1, steps // 5)}

    def train(self, name, arm):
        """Train and measure an arm: -> what its result holds."""
        self.model(arm.student)
        self.model(arm.teacher)
        folder = self.folder(name)
        if arm.train is None:
            made = run_opd(self, arm, folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)  # with the accuracies of an earlier student
            made = arm.train(self, arm, folder)
        for name, exam in (arm.exams or {"accuracy": self.exam}).items():
            made[name] = {
                "before": self.accuracies(self.model(arm.student), exam),
                "after": self.accuracies(folder / "student", exam),
                "teacher": self.accuracies(self.model(arm.teacher), exam),
            }
        return made

    def folder(self, name):
        """The folder of an arm's run."""
        return self.world / "runs" / slug(name)

    def trained(self, name, arm):
        """The folder of an arm's student, trained again if it is not there."""
        folder = self.folder(name)
        if not (folder / "student" / "config.json").exists():
            self.train(name, arm)
        return folder / "student"

    def notes(self, folder):
        """The folder that keeps what was measured of a model: the model's own."""
        return Path(folder)

    def answering(self, model, rows):
        """A block in which the model answers the held-out prompts."""
        return contextlib.nullcontext()

    def accuracies(self, folder, exam):
        """The accuracies of a saved model on the held-out prompts, sampled in each of toy.WAYS.

        It answers each prompt once, and every model gets the same random numbers. The result is
        kept in a file beside the model.
        -> {way: {"mean", "standard_error", "prompts", "right": a bit a prompt, in hexadecimal
        digits}}
        """
        path = self.notes(folder) / f"accuracy-{self.dtype}-{files.digest(exam)[:8]}.json"
        if path.exists():
            return files.read_json(path)
        pair = self.load(folder, folder)
        rows = self.exam_rows(pair, exam)
        found = {}
        for way, how in toy.WAYS.items():
            with self.answering(pair.student, rows):
                right, _ = answered(
                    pair, rows, n=1, max_new_tokens=self.new_tokens, seed=self.seed, **how
                )
            found[way] = {
                **estimate(right.double().mean(1)),
                "prompts": len(rows),
                "right": hexadecimal(right),
            }
        files.write_json(path, found)
        return found


def once(path, names, asked, make):
    """A result file, read if it is there, else made and written.

    names: {"name", "seed"}, and what else is to be kept. asked: the settings that decide it, plain
    values. make: a function -> what the result holds. SystemExit if the file was made with other
    settings; it may have been made in another dtype.
    """
    asked = json.loads(json.dumps(asked))
    if path.exists():
        found = files.read_json(path)
        if {**found["asked"], "dtype": None} != {**asked, "dtype": None}:
            raise SystemExit(
                f"{path} was made with other settings; remove it, and {names['name']} is run again"
            )
        return found
    origin = files.provenance()
    started = time.process_time()
    origin["command"] = without_folders(origin["command"])
    made = {**names, "asked": asked, **make(), **origin}
    made["seconds"] = round(time.process_time() - started, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_result(path, made)
    return made


def without_folders(command):
    """A command without --out and --worlds: they say nothing of the result."""
    return re.sub(r" --(out|worlds) ('[^']*'|\S+)", "", command)


def slug(name):
    """A name as it stands in file names: "sft, opd" -> "sft-opd"."""
    return name.replace(",", "").replace(" ", "-")


def file_name(name, seed):
    return f"{slug(name)}-{seed}.json"


def run_opd(lab, arm, folder):
    """Run opd.py, or go on with a run that was killed: -> distances and curves."""
    asked = lab.asked(arm)
    for name in ("prompts", "aligned_prompts"):
        if name in asked:
            asked[name] = str(lab.world / asked[name])
    cfg = Config(
        **{
            "prompts": str(lab.world / "prompts.jsonl"),
            "eval_max_new_tokens": lab.new_tokens,
            "seed": lab.seed,
            "device": "cpu",
            "in_flight": lab.in_flight,
            **lab.followed(asked["steps"]),
            **asked,
            "student": str(lab.model(arm.student)),
            "teacher": str(lab.model(arm.teacher)),
            "out": str(folder),
        }
    )
    refuse_another(folder, {**lab.asked(arm), "student": cfg.student, "teacher": cfg.teacher})
    if not (folder / "result.json").exists():
        is_begun = (folder / "checkpoint" / "state.pt").exists()
        with contextlib.redirect_stdout(io.StringIO()):  # its lines are in metrics.jsonl
            opd.distil(dataclasses.replace(cfg, resume=is_begun))
    found = files.read_json(folder / "result.json")
    kept = {name: x for name, x in found.items() if name.startswith("held_out")}
    for distances in kept.values():
        distances.pop("by_position", None)
    return {**kept, "curves": curves(figures.read_rows(folder))}


def refuse_another(folder, asked):
    """SystemExit if a folder holds a run with other settings. Files are compared by name."""
    path = folder / "config.json"
    if not path.exists():
        return
    had = files.read_json(path)
    for name, value in asked.items():
        if Path(str(had[name])).name != Path(str(value)).name:
            raise SystemExit(f"{folder} holds a run of another {name}; remove it")


def curves(rows):
    """{metric: values against the step} of a run, at most POINTS of them and the last."""
    every = math.ceil(len(rows) / POINTS) or 1
    kept = rows[::every]
    if rows and kept[-1] is not rows[-1]:
        kept.append(rows[-1])
    found = {name: [short(row.get(name)) for row in kept] for name in CURVES}
    # accuracy is known at a few steps only, so no point is left out
    known = [row for row in rows if row.get("accuracy") is not None]
    found["evaluated"] = [row["step"] for row in known]
    found["accuracy"] = [short(row["accuracy"]) for row in known]
    return found


def short(x):
    """A number with five digits, which are enough for a curve."""
    return float(f"{x:.5g}") if isinstance(x, float) else x


def hexadecimal(right):
    """Right or wrong, (prompts, 1) bool -> hexadecimal digits, one for four prompts."""
    bits = "".join(str(int(x)) for x in right.flatten().tolist())
    digits = math.ceil(len(bits) / 4)
    return f"{int(bits.ljust(4 * digits, '0'), 2):0{digits}x}"


def bits(digits):
    """The inverse of hexadecimal: n digits -> (4 n,) of 0. and 1."""
    text = f"{int(digits, 16):0{4 * len(digits)}b}"
    return torch.tensor([float(x) for x in text], dtype=torch.float64)


def write_result(path, made):
    """A JSON file with a line for each key."""
    made = files.finite_or_null(made)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in made.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    files.write_whole(path, lambda file: file.write(text.encode()))


def write_text(text, made, out):
    """Print a table with what made it, and keep it beside the results."""
    text += (
        f"\n{made['command']}, commit {made['commit']}, "
        f"{made['seconds']} s on {made['threads']} thread(s)"
    )
    print(text)
    out.with_suffix(".txt").write_text(text + "\n")


# --- four words -----------------------------------------------------------------------------------

HOLDS = "holds"
CONTRADICTED = "contradicted"  # the opposite, or shown equal where the paper finds a difference
UNDECIDED = "undecided"  # within noise, or not alike on all seeds
NOT_ASKABLE = "not askable here"
MARGIN = 0.05  # of accuracy: two arms that differ by less are equal
# seeds -> the quantile of .975 of Student's t
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


@dataclass(frozen=True)
class Finding:
    """One line of the findings: the claim, what the paper has, what was found, and a word."""

    section: str
    claim: str
    paper: str
    found: str
    word: str


def finding(section, claim, paper, found, *words):
    """A Finding whose word is that of all its criteria together."""
    return Finding(section, claim, paper, found, together(*words))


def so_far(found, seeds, of=3):
    """A Finding that was asked of so many seeds: with fewer than it needs its word says so."""
    if seeds >= of:
        return found
    return dataclasses.replace(found, word=f"{found.word}, {seeds} of {of} seeds so far")


@dataclass(frozen=True)
class Difference:
    """The difference of two accuracies: its mean over seeds, its noise, and each seed's own.

    noise: see mean_over_seeds.
    """

    mean: float
    noise: float
    seeds: tuple = ()

    def __str__(self):
        text = f"{self.mean:+.3f} ± {self.noise:.3f}"
        return f"{text} ({each(self.seeds, '+.3f')})" if len(self.seeds) > 1 else text

    def __neg__(self):
        return Difference(-self.mean, self.noise, tuple(-x for x in self.seeds))

    @property
    def is_equal(self):
        """A test of equivalence: the difference, noise included, is less than MARGIN."""
        return abs(self.mean) + self.noise < MARGIN


def difference(ours, theirs, way, when="after", than=None, exam="accuracy"):
    """The accuracy of one arm minus that of another, on the same seeds: Difference.

    when: "before", "after" or "teacher", of the first arm; than: the same of the second, `when` if
    it is not given; way: one of toy.WAYS.
    """
    means = []
    variances = []
    for a, b in zip(ours, theirs, strict=True):
        assert a["seed"] == b["seed"]
        off = answers(a[exam][when][way]) - answers(b[exam][than or when][way])
        means.append(off.mean().item())
        variances.append((off.var() / len(off)).item())
    return mean_over_seeds(means, variances)


def mean_over_seeds(means, variances):
    """The mean over seeds, and its noise: Difference.

    means: one for each seed; variances: of each of these means, over the prompts of its seed. Noise
    is half of a 95 % interval, the larger one of two: over prompts, two standard errors, pooled
    from the variances; over seeds, of the means themselves, by Student's t. The second is the
    larger one if seeds differ by more than their prompts explain. (It was added after the runs:
    seeds that disagreed stood under a noise of .008. At first it, too, was two standard errors;
    with three seeds that is an interval of 82 %.)
    """
    n = len(means)
    of_prompts = 2 * math.sqrt(sum(variances)) / n
    t = STUDENT_T.get(n, STUDENT_T[10])  # of more than ten seeds it is a little less
    of_seeds = t * stdev(means) / math.sqrt(n) if n > 1 else 0.0
    return Difference(mean(means), max(of_prompts, of_seeds), tuple(means))


def answers(accuracy):
    """One of Lab.accuracies -> 1. for each prompt with a right answer, else 0., (prompts,)."""
    return bits(accuracy["right"])[: accuracy["prompts"]]


def gain(runs, way, when="after", than="before", exam="accuracy"):
    """How far an arm came: accuracy after - before."""
    return difference(runs, runs, way, when, than, exam)


def both(ours, theirs, when="after", than=None):
    """The differences of two arms at T .7 and greedily: [Difference, Difference]."""
    return [difference(ours, theirs, way, when, than) for way in ("T .7", "greedy")]


def more_than(x, bound):
    """Is a Difference surely more than a bound? -> a word."""
    if x.mean - x.noise > bound:
        return HOLDS
    return CONTRADICTED if x.mean + x.noise < bound else UNDECIDED


def above(x):
    """Is a Difference positive, by more than noise and by MARGIN or more? -> a word.

    Of two that are equal neither is above, however sure their small difference is. (MARGIN was
    added after the first runs: without it a claim held at .002 ± .001.)
    """
    if x.is_equal or x.mean < -x.noise:
        return CONTRADICTED
    if x.mean > x.noise and x.mean >= MARGIN:
        return HOLDS
    return UNDECIDED


def ends_above(ours, theirs, way):
    """Does an arm end above another? -> a word. Not askable if both are right nearly always."""
    if all(run["accuracy"]["after"][way]["mean"] >= 0.99 for run in [*ours, *theirs]):
        return NOT_ASKABLE
    return above(difference(ours, theirs, way))


def below(x):
    return above(-x)


def equal(x):
    """Is a Difference surely less than MARGIN? -> a word. Contradicted if it is surely more."""
    if x.is_equal:
        return HOLDS
    if abs(x.mean) - x.noise > MARGIN:
        return CONTRADICTED
    return UNDECIDED


def every_seed(facts):
    """Is a fact true on every seed? -> a word. Contradicted if it is true on none."""
    facts = list(facts)
    if all(facts):
        return HOLDS
    return UNDECIDED if any(facts) else CONTRADICTED


def reaches(values, bound):
    """Is a number at least a bound on every seed? -> a word. NaN (see recovery) is not askable."""
    values = list(values)
    if any(math.isnan(value) for value in values):
        return NOT_ASKABLE
    return every_seed(value >= bound for value in values)


def together(*words):
    """One word for several: all must hold."""
    for word in (NOT_ASKABLE, CONTRADICTED, UNDECIDED):
        if word in words:
            return word
    return HOLDS


def recovery(run, way, exam="accuracy"):
    """The share of its teacher's lead that one run made up: float. NaN without a sure lead."""
    lead = difference([run], [run], way, "teacher", "before", exam)
    if abs(lead.mean) <= lead.noise:
        return math.nan
    return gain([run], way, exam=exam).mean / lead.mean


def share(a, b):
    """a / b, NaN if b is 0."""
    return a / b if b else math.nan


def each(values, form=".2f"):
    """One number for each seed, as text: "0.98, 1.00, 0.97"."""
    return ", ".join("-" if value is None else format(value, form) for value in values)


def held_out(run, when, name):
    """A metric on held-out prompts "before", after the "cold_start", or "after": float."""
    return run[f"held_out_{when}"][name]


# --- a script -------------------------------------------------------------------------------------


def first_sentence(about):
    """The first paragraph of a docstring, in one line."""
    return " ".join(about.split("\n\n")[0].split())


def parse(about, names, own):
    """The flags of a script with arms and probes of these names; own: {flag: help}, see main."""
    parser = argparse.ArgumentParser(description=first_sentence(about))
    for flag, text in own.items():
        parser.add_argument(f"--{flag}", help=text)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--only", nargs="+", default=[], help="these arms and probes, and no report"
    )
    parser.add_argument(
        "--worlds", default="runs/worlds", help="folder of models and runs (runs/worlds)"
    )
    parser.add_argument("--out", default=str(RESULTS), help="folder of the results")
    parser.add_argument(
        "--report",
        action="store_true",
        help="run nothing: make table and figure again, of all seeds",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one seed, a few steps: does it run? Keeps nothing"
    )
    flags = parser.parse_args()
    unknown = set(flags.only) - set(names)
    if unknown:
        parser.error(f"{', '.join(unknown)}: there are {', '.join(names)}")
    lacking = [f"--{flag}" for flag in own if not getattr(flags, flag)]
    if lacking and not flags.report:
        parser.error(f"{', '.join(lacking)}: needed; see --help")
    return flags


def main(
    about,
    arms,
    judge,
    *,
    probes=None,
    models=None,
    prepare=None,
    more=None,
    draw=None,
    world=Lab,
    own=None,
):
    """The command line of a script: runs what is missing, then reports.

    arms: {name: Arm}. probes: {name: (function of (lab, **asked), asked)}. judge: a function of
    {name: [result, one a seed]} -> [Finding]. models: of the world, beside toy.MODELS. prepare: a
    function of a Lab, called before its first run. more: a function of the results -> further
    lines of the table. draw: a function of the results and a path without suffix, for the figure.
    world: Lab, or a class like it; claims of such a class are reported as far as their results are
    there. own: {flag: help}, flags that such a class needs.
    """
    name = Path(sys.argv[0]).stem
    probes = probes or {}
    own = own or {}
    flags = parse(about, [*arms, *probes], own)
    given = {flag: getattr(flags, flag) for flag in own}
    with one_line(f"{name}.py"), tempfile.TemporaryDirectory() as scratch:
        transformers.logging.set_verbosity_error()
        out = Path(flags.out)
        if flags.quick:
            flags.seeds = [0]
            flags.worlds = str(Path(scratch) / "worlds")
            out = Path(scratch)  # its numbers mean nothing
        if not flags.report:
            for seed in flags.seeds:
                lab = world(seed, flags.worlds, out, flags.quick, models, **given)
                if prepare is not None:
                    prepare(lab)
                run_all(lab, arms, probes, flags.only)
        if not flags.only:
            names = [*arms, *probes]
            is_toy = world is Lab
            results = read_results(out, names) if is_toy else read_all(out, names, world.kind)
            text = report(results, arms, judge, more)
            print(text)
            (out / f"{name}.txt").write_text(text + "\n")
            if draw is not None and all(results.values()):
                draw(results, out / name)


def report(results, arms, judge, more=None):
    """All that a script says of its results: every run, further lines, findings, commits: str."""
    lines = [*table(results, arms), *(more(results) if more else []), ""]
    lines += verdicts(judge(results))
    lines += provenance(results)
    return "\n".join(lines)


def run_all(lab, arms, probes, only):
    """Run what is asked for and has no result yet, one after the other."""
    wanted = only or [*arms, *probes]
    for name in wanted:
        if name in arms:
            lab.run(name, arms[name])
        else:
            function, asked = probes[name]
            lab.once(name, asked, lambda function=function, asked=asked: function(lab, **asked))
        print(f"seed {lab.seed}: {name}", file=sys.stderr, flush=True)


def read_all(out, names, kind="toy"):
    """The results that are there: {name: [result, one a seed]}."""
    found = {}
    for name in names:
        found[name] = []
        for path in (Path(out) / kind).glob(file_name(name, "*")):
            if path.stem.removeprefix(f"{slug(name)}-").isdigit():
                found[name].append(files.read_json(path))
        found[name].sort(key=lambda run: run["seed"])
    return found


def of_shared_seeds(results, names):
    """The results of these names, of the seeds that have all of them: {name: [one a seed]}."""
    seeds = set.intersection(*({run["seed"] for run in results[name]} for name in names))
    return {name: [run for run in results[name] if run["seed"] in seeds] for name in names}


def read_results(out, names):
    """The toy's results, of the seeds that have all of these names. SystemExit if none has."""
    found = read_all(out, names)
    whole = of_shared_seeds(found, names)
    if not whole[names[0]]:
        lacking = min(names, key=lambda name: len(found[name]))
        raise SystemExit(f"no seed has all results yet; {lacking} is missing")
    return whole


def table(results, arms):
    """A line for each run: accuracies before, after, and of the teacher; list of lines."""
    width = max(map(len, arms))
    titles = " ".join(f"{f'{way}: before, after, teacher':>28}" for way in toy.WAYS)
    lines = [f"{'arm':{width}} seed {titles} {'overlap':>14} {'reverse KL':>16}"]
    for name in arms:
        for run in results[name]:
            cells = []
            for way in toy.WAYS:
                three = [
                    run["accuracy"][when][way]["mean"] for when in ("before", "after", "teacher")
                ]
                cells.append(f"{three[0]:12.3f} {three[1]:7.3f} {three[2]:7.3f}")
            line = f"{name:{width}} {run['seed']:4d} {' '.join(cells)}"
            if "held_out_after" in run:
                a = run["held_out_before"]
                b = run["held_out_after"]
                line += f" {a['overlap_ratio']:6.3f} -> {b['overlap_ratio']:.3f}"
                line += f" {a['reverse_kl']:7.4f} -> {b['reverse_kl']:.4f}"
            lines.append(line)
    return lines


def verdicts(findings):
    """Findings as lines: the word first."""
    lines = []
    for x in findings:
        lines.append(f"{x.section:10} {x.word:16} {x.claim}: {x.found}")
    return lines


def commit_of(run):
    """The commit that made a result, and whether the code was changed; "none" without git."""
    if run["commit"] is None:
        return "none"
    return run["commit"] + (" and changes" if run["dirty"] else "")


def provenance(results):
    """What made the results, in four lines."""
    runs = [run for of_name in results.values() for run in of_name]
    commits = sorted({commit_of(run) for run in runs})
    seeds = sorted({run["seed"] for run in runs})
    seconds = sum(run["seconds"] for run in runs)
    prompts = {run["accuracy"]["after"]["T .7"]["prompts"] for run in runs if "accuracy" in run}
    return [
        "",
        "accuracy: T 1; T .7 with top-p .95; greedy. One answer to each of "
        f"{', '.join(map(str, prompts))} held-out prompts.",
        "± is noise, 95 %: two standard errors over prompts, pooled, or over seeds, by Student's "
        "t, if that is more.",
        f"seeds {', '.join(map(str, seeds))}; commits {', '.join(commits)}; "
        f"{seconds:.0f} CPU seconds, those of arms that other scripts share included",
    ]
