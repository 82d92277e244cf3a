"""plumbing/flags.py: the flags of opd.py and analysis.py, their ranges, the reasons for defaults.

The flags of a command are the fields of a dataclass: Config (opd.py) and Diagnosis (analysis.py).
A flag that cannot work raises a UserError, which names the flag and the remedy, before any model is
loaded.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from loss import SUPPORTS
from plumbing.answers import CHECKERS
from plumbing.files import check_file
from plumbing.models import pick_device
from recipes import apply_template
from teacher import UserError

OBJECTIVES = ("top-k", "full", "sampled", "top-k-released")
LARGEST_SEED = 2**31 - 1
TEACHER_TEMPLATE = (
    'a template around the teacher\'s question, or around the "teacher_prompt" of the line; the '
    "teacher's own chat template goes around that. Without it, the teacher reads the "
    "teacher_prompt as it is, or what the student reads"
)
IN_FLIGHT = (
    "how many responses are written at a time, while the others wait; bounds the memory of the "
    "cache. 0: all"
)
CHECKER = (
    "what decides if an answer is right: built-in compares numbers, and all else as text; "
    "math-verify is the package of that name, which knows that x + 1 is 1 + x (pip install "
    "math-verify)"
)


def flag(
    default,
    why,
    choices=(),
    *,
    at_least=None,
    above=None,
    at_most=None,
    is_file=False,
    group="",
):
    """A field of a dataclass of flags.

    why: what the flag is, and the reason for its default. choices, at_least, above, at_most: the
    values it may have. is_file: its value names a file of JSON lines that is read. group: the title
    of a group in --help, of which this flag is the first.
    """
    about = dict(
        why=why,
        choices=choices,
        at_least=at_least,
        above=above,
        at_most=at_most,
        is_file=is_file,
        group=group,
    )
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True)
class Config:
    """On-policy distillation: the student writes, the teacher grades every token."""

    student: str = flag(
        "", "the model that learns: a directory, or OWNER/NAME on the hub", group="the run"
    )
    teacher: str = flag(
        "", "the model that grades: a directory, or OWNER/NAME on the hub; same tokens"
    )
    prompts: str = flag(
        "",
        'JSON lines {"prompt": ..., "answer": ...}; without it, additions of two numbers',
        is_file=True,
    )
    eval: tuple = flag(
        (),
        "JSON lines to measure on; may be given several times: each file is measured, and their "
        "mean. Without it, a fifth of the prompts (64 at most) is held out for this",
        is_file=True,
    )
    out: str = flag("runs/opd", "directory of the run")
    steps: int = flag(
        100,
        "updates; the default is enough to see where a run goes, the paper's figures show 200",
        at_least=0,
    )
    batch_size: int = flag(
        8,
        "prompts a step (and answers in an update of the cold start); the paper's 64 need a GPU",
        at_least=1,
    )
    max_new_tokens: int = flag(
        128,
        "tokens of a response, at most; the default suits a CPU. The paper finds 3K to 7K best "
        "(6.1)",
        at_least=1,
    )
    lr: float = flag(
        3e-5,
        "learning rate, constant; the default worked here for 0.1 B parameters and 8 responses a "
        "step. The paper takes 1e-6 for 256",
        above=0,
    )

    objective: str = flag(
        "top-k",
        "in this order Eq. 5, Eq. 4, Eq. 3, and what the authors' code minimises",
        choices=OBJECTIVES,
        group="what is learned (2.2)",
    )
    k: int = flag(
        16,
        "how many of the likeliest tokens the top-k loss and the overlap metrics look at; the "
        "paper's. In the paper more gained nothing, and 1 was worse (6.3)",
        at_least=1,
    )
    support: str = flag(
        "student",
        "whose k likeliest tokens the top-k loss looks at; difference: those that only one of the "
        "two models has (4.2)",
        choices=SUPPORTS,
    )
    ends: str = flag(
        "merged",
        "if merged, all tokens that end a response count as one, whichever model uses them; if "
        "own, each counts alone, as in the authors' code. With own, if the ends of the models "
        "differ, our toy's student learns never to end",
        choices=("merged", "own"),
    )
    n: int = flag(
        1,
        "responses to a prompt; the paper takes 4, but its authors report no clear gain over 1 "
        "(issue 22 of their repository, thunlp/OPD)",
        at_least=1,
    )
    max_prompt_tokens: int = flag(
        1024,
        "tokens of a prompt, at most: longer prompts of the student are dropped and counted, never "
        "cut; the paper's",
        at_least=1,
    )
    temperature: float = flag(
        1.0, "of the student, when it writes and when it is scored; the paper's", above=0
    )
    teacher_temperature: float = flag(1.0, "of the teacher when it grades; the paper's", above=0)
    seed: int = flag(
        0, "of the order of the prompts and of all sampling", at_least=0, at_most=LARGEST_SEED
    )

    template: str = flag(
        "none",
        "none (prompts as they are), answer, boxed, or a text of your own with {question} in it "
        "(5.2)",
        group="the prompts, and the two recipes (5)",
    )
    teacher_template: str = flag("", TEACHER_TEMPLATE)
    thinking: str = flag(
        "default",
        "enable_thinking, for chat templates that have it; the teacher's, too, if it has",
        choices=("default", "on", "off"),
    )
    cold_start: int = flag(
        0,
        "how many prompts the teacher answers. The student is fine-tuned on the answers, and OPD "
        "goes on with the other prompts (5.1)",
        at_least=0,
    )
    cold_start_file: str = flag(
        "",
        'JSON lines {"messages": [...]} for that fine-tuning, instead of asking the teacher',
        is_file=True,
    )
    cold_start_steps: int = flag(
        0, "updates of that fine-tuning; 0 is one epoch, as in the paper", at_least=0
    )
    cold_start_lr: float = flag(
        1e-5,
        "highest learning rate of that fine-tuning: warm-up .05, then a cosine; the paper's",
        above=0,
    )
    cold_start_max_new_tokens: int = flag(
        0,
        "tokens of a teacher's answer, at most; 0 is --max-new-tokens. The paper takes 12,288",
        at_least=0,
    )
    cold_start_temperature: float = flag(
        0.7, "of the teacher when it answers; the paper's", at_least=0
    )
    cold_start_top_p: float = flag(
        0.95, "of the teacher when it answers; the paper's", above=0, at_most=1
    )
    aligned_prompts: str = flag(
        "",
        "JSON lines like what the teacher was post-trained on, to mix with --prompts (5.2)",
        is_file=True,
    )
    aligned_fraction: float = flag(
        0.5,
        "their share of the mixture; on the toy .25 to .75 did about equally well, 0 and 1 worse. "
        "The paper advises a mixture and names no share",
        at_least=0,
        at_most=1,
    )

    eval_every: int = flag(
        0,
        "steps between evaluations; 0: before and after the run only",
        at_least=0,
        group="measuring and saving",
    )
    eval_n: int = flag(
        4, "responses a prompt when accuracy is measured; the paper takes 16", at_least=1
    )
    eval_temperature: float = flag(
        0.7,
        "of these responses; the paper's. Greedy accuracy is measured as well, with one response a "
        "prompt",
        at_least=0,
    )
    eval_top_p: float = flag(0.95, "of these responses; the paper's", above=0, at_most=1)
    eval_template: str = flag(
        "",
        "the template of the held-out prompts when accuracy is measured, if it is another than "
        "--template. The paper trains under answer and measures under boxed. KL and overlap are "
        "measured under --template, because they are about the states that training visits. A "
        "teacher with a prompt of its own is asked with that one",
    )
    eval_max_new_tokens: int = flag(
        0,
        "tokens of a response when accuracy is measured, at most; 0 is --max-new-tokens. The paper "
        "takes 31,744",
        at_least=0,
    )
    checker: str = flag("built-in", CHECKER, choices=tuple(CHECKERS))
    resume: bool = flag(False, "go on from the checkpoint in --out")
    save_every: int = flag(25, "steps between checkpoints", at_least=1)

    device: str = flag(
        "auto",
        "auto is cuda if there is one, else cpu; or the name of a device",
        group="machine and memory",
    )
    dtype: str = flag(
        "float32",
        "of the computation and of the teacher's weights. The student's weights are always "
        "float32, because bfloat16 loses small updates. On a CPU that multiplies bfloat16 it is "
        "faster and less exact: plumbing/README.md",
        choices=("float32", "bfloat16"),
    )
    gradient_checkpointing: bool = flag(
        False,
        "compute the student's layers again in the backward pass: takes less memory, and one more "
        "forward pass",
    )
    shard: bool = flag(
        False,
        "cut both models over the processes of torchrun, with gradients and the state of AdamW: a "
        "student of more than about 3e9 parameters does not fit on one GPU of 80 GB",
    )
    in_flight: int = flag(0, IN_FLIGHT, at_least=0)
    micro_batch_tokens: int = flag(
        0,
        "padded tokens in one forward and backward pass; changes the memory, not the result. "
        "0: as many as keep activations within 512 MiB on a CPU, an eighth of a GPU's memory",
        at_least=0,
    )


@dataclass(frozen=True)
class Diagnosis:
    """Diagnose a pair before training, or look at runs after it."""

    student: str = flag(
        "",
        "the model that would learn: a directory, or OWNER/NAME on the hub",
        group="before training: will this pair work?",
    )
    teacher: str = flag(
        "", "the model that would grade: a directory, or OWNER/NAME on the hub; same tokens"
    )
    prompts: str = flag(
        "",
        'JSON lines {"prompt": ..., "answer": ...}; without it, additions of two numbers',
        is_file=True,
    )
    count: int = flag(
        64,
        "how many prompts to ask, the first ones after shuffling by --seed. With 64 prompts a lead "
        "of .2 is seen 9 times in 10, with 24 prompts 5 times in 10",
        at_least=1,
    )
    n: int = flag(2, "responses a prompt", at_least=1)
    finishes: int = flag(
        2, "how often each model finishes a response from each depth (6.1)", at_least=1
    )
    max_new_tokens: int = flag(128, "tokens of a response, at most; opd.py's", at_least=1)
    max_prompt_tokens: int = flag(
        1024,
        "tokens of a prompt, at most: longer ones are dropped and counted, never cut; opd.py's",
        at_least=1,
    )
    template: str = flag(
        "none",
        "none (prompts as they are), answer, boxed, or a text of your own with {question} in it "
        "(5.2)",
    )
    teacher_template: str = flag("", TEACHER_TEMPLATE)
    thinking: str = flag(
        "default",
        "enable_thinking, for chat templates that have it; the teacher's, too, if it has",
        choices=("default", "on", "off"),
    )
    ends: str = flag("merged", "as for opd.py", choices=("merged", "own"))
    k: int = flag(
        16, "how many of the likeliest tokens the overlap metrics look at; the paper's", at_least=1
    )
    temperature: float = flag(
        1.0, "of the student, when it writes and when it is scored; the paper's", above=0
    )
    eval_temperature: float = flag(
        0.7, "of the responses whose accuracy is measured; the paper's", at_least=0
    )
    eval_top_p: float = flag(0.95, "of these responses; the paper's", above=0, at_most=1)
    depths: str = flag(
        "0,0.25,0.5,0.75",
        "the depths at which teacher and student take over from the student's response. With a "
        "decimal point: a share of it. Without: a number of tokens. The paper takes "
        "1024,4096,8192,16384, of responses that are longer than that (6.1). The start, 0, is "
        "always measured",
    )
    checker: str = flag("built-in", CHECKER, choices=tuple(CHECKERS))
    seed: int = flag(
        0, "of the choice of prompts and of all sampling", at_least=0, at_most=LARGEST_SEED
    )
    device: str = flag("auto", "auto is cuda if there is one, else cpu; or the name of a device")
    dtype: str = flag(
        "float32",
        "of the computation and of the teacher's weights",
        choices=("float32", "bfloat16"),
    )
    micro_batch_tokens: int = flag(
        16384, "padded tokens in one forward pass; changes the memory, not the result", at_least=1
    )
    in_flight: int = flag(0, IN_FLIGHT, at_least=0)
    out: str = flag("runs/diagnose.json", "the file of the report; its folder is made if missing")
    tokens: str = flag("", "an .html file: a few responses, every token tinted by its reward")

    run: tuple = flag(
        (),
        "directory of a run; may be given several times, side by side",
        group="after training: what happened?",
    )
    plot: str = flag(
        "",
        "an .svg file: every metric against the step, as in the paper's Figure 6 "
        "(pip install matplotlib)",
    )
    positions: str = flag(
        "",
        "an .svg file: entropies, reward and overlap by output position and step, as in Figure 13 "
        "(pip install matplotlib)",
    )


TOY = dict(
    batch_size=64,
    max_new_tokens=96,
    lr=1e-3,
    eval_n=1,
    cold_start_lr=2e-3,
)
PAPER = dict(  # appendix A.2, and C.1 for the cold start
    steps=200,  # as its figures show; A.2 has one epoch, 279 steps
    batch_size=64,
    n=4,
    max_new_tokens=7168,
    lr=1e-6,
    template="answer",
    eval_template="boxed",
    eval_n=16,
    eval_max_new_tokens=31744,
    dtype="bfloat16",
    cold_start_max_new_tokens=12288,
    in_flight=32,
)
PRESETS = {"toy": TOY, "paper": PAPER}  # from Python: Config(**PRESETS["toy"], student=...)


# --- words -> an instance of a dataclass ---------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError."""

    def error(self, message):
        raise UserError(message)


def layout(prog):
    """The layout of --help."""
    return argparse.HelpFormatter(prog, max_help_position=27)


def named(name):
    """The flag of a field: "max_new_tokens" -> "--max-new-tokens"."""
    return "--" + name.replace("_", "-")


def help_of(field):
    """A field's line of --help: its choices, its reason and [its default]."""
    text = field.metadata["why"]
    choices = [choice for choice in field.metadata["choices"] if choice]
    if choices:
        text = f"{', '.join(choices)}: {text}"
    if field.default not in ("", (), False) or field.type is int:
        text += f" [{field.default}]"
    return text.replace("%", "%%")


def parser_of(kind, program):
    """The argument parser of a dataclass of flags."""
    parser = Parser(
        prog=program,
        usage=f"{program} --student S --teacher T [flags]",
        description=f"{kind.__doc__} [...]: a default.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=layout,
    )
    if kind is Config:
        parser.add_argument(
            "--preset",
            choices=list(PRESETS),
            metavar="X",
            help="toy, paper: settings for the toy world, or those of the paper's appendices A.2 "
            "and C.1; a flag that is given wins over the preset",
        )
    group = parser
    for field in dataclasses.fields(kind):
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        how = dict(type=field.type, metavar="X")
        if field.type is bool:
            how = dict(action="store_true")
        if field.type is tuple:
            how = dict(action="append", metavar="X")
        if field.type is int:
            how["metavar"] = "N"
        group.add_argument(named(field.name), help=help_of(field), **how)
    return parser


def parse(kind, words, program):
    """The words of a command line -> an instance of a dataclass of flags, checked.

    A preset sets the flags that are not given. UserError for an unknown flag, and see check.
    """
    given, unknown = parser_of(kind, program).parse_known_args(words)
    if unknown:
        known = [named(field.name) for field in dataclasses.fields(kind)]
        if kind is Config:
            known.append("--preset")
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"did you mean {near[0]}?" if near else "--help lists them"
        raise UserError(f"unknown flag {unknown[0]}; {hint}")
    given = vars(given)
    preset = PRESETS[given.pop("preset")] if "preset" in given else {}
    flags = check(kind(**{**preset, **given}))
    check_is_read(flags, given)
    return flags


# --- what cannot work ----------------------------------------------------------------------------

READ_ONLY_WITH = {  # flag -> those of which one must be given, or nobody reads it
    "cold_start_steps": ("cold_start", "cold_start_file"),
    "cold_start_lr": ("cold_start", "cold_start_file"),
    "cold_start_max_new_tokens": ("cold_start",),
    "cold_start_temperature": ("cold_start",),
    "cold_start_top_p": ("cold_start",),
    "aligned_fraction": ("aligned_prompts",),
}


def check_is_read(flags, given):
    """UserError if one of the flags that were given, by name, is not read beside the others."""
    for name, others in READ_ONLY_WITH.items():
        if name in given and not any(getattr(flags, other) for other in others):
            needed = " or ".join(named(other) for other in others)
            raise UserError(f"{named(name)} needs {needed}; without it nobody reads it")
    if "run" in given and not given.keys() & {"student", "teacher"}:
        for name in sorted(given.keys() - {"run", "plot", "positions"}):
            raise UserError(f"{named(name)} goes with --student and --teacher, not with --run")
    if "support" in given and not flags.objective.startswith("top-k"):
        raise UserError(
            f"--support {flags.support}: only the top-k losses have one; leave it out, or take "
            "another --objective"
        )


def check_range(name, value, at_least, above, at_most):
    """UserError if a number is not in its range. None: no bound."""
    bounds = []
    fits = math.isfinite(value)
    if at_least is not None:
        bounds.append(f"at least {at_least}")
        fits = fits and value >= at_least
    if above is not None:
        bounds.append(f"above {above}")
        fits = fits and value > above
    if at_most is not None:
        bounds.append(f"at most {at_most}")
        fits = fits and value <= at_most
    if isinstance(value, float):
        bounds.append("finite")
    if not fits:
        raise UserError(f"{name} {value}: must be {' and '.join(bounds)}")


def check_files(paths, name):
    """UserError if one of a flag's files cannot be read, or is given twice."""
    seen = set()
    for path in paths:
        check_file(path, name)
        if Path(path).resolve() in seen:
            raise UserError(f"{name} {path}: the file is given twice; leave it out once")
        seen.add(Path(path).resolve())


def check_writable(name, path):
    """UserError if the folder `path` could not be made, or not be written to. Makes nothing."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"{name} {path}: {folder} cannot be written to ({error.strerror}); take another {name}"
        ) from None


def check(flags):
    """Check each flag by itself: -> the flags.

    UserError if a value is out of range or is none of the choices, or if it names a file, device,
    template or package that is not there.
    """
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        about = field.metadata
        if field.type in (int, float):
            bounds = (about["at_least"], about["above"], about["at_most"])
            check_range(named(field.name), value, *bounds)
        if about["choices"] and value not in about["choices"]:
            choices = ", ".join(choice for choice in about["choices"] if choice)
            raise UserError(f"{named(field.name)} {value!r}: choose from {choices}")
        if field.type is tuple and isinstance(value, str):
            raise UserError(f"{named(field.name)} {value}: from Python give a tuple, ({value!r},)")
        if about["is_file"]:
            if field.type is not tuple:
                value = (value,) if value else ()
            check_files(value, named(field.name))
    apply_template("", flags.template)
    if flags.teacher_template:
        apply_template("", flags.teacher_template)
    if flags.checker == "math-verify" and not importlib.util.find_spec("math_verify"):
        raise UserError("--checker math-verify needs its package: pip install math-verify")
    pick_device(flags.device)
    return flags


def need(flags, *names):
    """UserError if one of these flags was not given."""
    for field in dataclasses.fields(flags):
        if field.name in names and not getattr(flags, field.name):
            raise UserError(f"{named(field.name)} is missing: {field.metadata['why']}")


def check_run(cfg):
    """Check a Config: -> the Config. UserError if a flag, or two of them together, cannot work."""
    check(cfg)
    if cfg.eval_template:
        apply_template("", cfg.eval_template)
    need(cfg, "student", "teacher", "out")
    has_cold_start = bool(cfg.cold_start or cfg.cold_start_file)
    if cfg.steps == 0 and not has_cold_start:
        raise UserError("--steps 0: must be at least 1; 0 is for a cold start alone")
    if cfg.cold_start and cfg.cold_start_file:
        raise UserError(
            "--cold-start asks the teacher, --cold-start-file reads answers: give one of the two"
        )
    one_token = cfg.k == 1 and cfg.support in ("student", "teacher", "intersection")
    if one_token and cfg.objective == "top-k":
        raise UserError(
            "--k 1: renormalised on one token the loss is always 0 (Eq. 5); take a larger k, or "
            "--objective top-k-released"
        )
    if cfg.aligned_prompts and not cfg.prompts:
        raise UserError("--aligned-prompts needs --prompts, the others to mix them with")
    check_writable("--out", cfg.out)
    return cfg


def parse_opd(words):
    """The words of opd.py's command line -> Config. UserError if they cannot work."""
    return check_run(parse(Config, words, "opd.py"))


def parse_analysis(words):
    """The words of analysis.py's command line -> Diagnosis. UserError if they cannot work."""
    flags = parse(Diagnosis, words, "analysis.py")
    has_pair = bool(flags.student or flags.teacher)
    if bool(flags.run) == has_pair:
        raise UserError("give either --student and --teacher, or --run")
    depths_of(flags)
    for name in ("plot", "positions"):
        if getattr(flags, name) and has_pair:
            raise UserError(f"{named(name)} goes with --run, not with --student and --teacher")
    for run in flags.run:
        if not (Path(run) / "metrics.jsonl").is_file():
            raise UserError(f"--run {run}: no metrics.jsonl there; give the --out of an opd.py run")
    for name in ("out", "tokens", "plot", "positions"):
        path = Path(getattr(flags, name))
        if not getattr(flags, name):
            continue
        if path.is_dir():
            raise UserError(f"{named(name)} {path}: a folder; give a file in it")
        if name != "out" and not path.parent.is_dir():
            raise UserError(f"{named(name)} {path}: its folder does not exist; make it first")
        check_writable(named(name), path.parent)
    check_outputs(flags)
    for name in ("plot", "positions"):
        if getattr(flags, name) and not importlib.util.find_spec("matplotlib"):
            raise UserError(f"{named(name)} needs matplotlib: pip install matplotlib")
    if not flags.run:
        need(flags, "student", "teacher", "out")
    return flags


def check_outputs(flags):
    """UserError if analysis.py would write a file over another, or into a model that it reads."""
    models = [Path(folder).resolve() for folder in (flags.student, flags.teacher) if folder]
    taken = {}
    if flags.prompts:
        taken[Path(flags.prompts).resolve()] = "--prompts"
    for name in ("out", "tokens", "plot", "positions"):
        given = getattr(flags, name)
        if not given:
            continue
        path = Path(given).resolve()
        if name in ("plot", "positions") and path.suffix.lower() not in (".svg", ".png", ".pdf"):
            raise UserError(f"{named(name)} {given}: give a file that ends with .svg, .png or .pdf")
        if path.parent in models:
            raise UserError(f"{named(name)} {given}: a model is in that folder; take another one")
        if path in taken:
            raise UserError(f"{named(name)} {given}: {taken[path]} is that file, too")
        taken[path] = named(name)


def depths_of(flags):
    """--depths as analysis.continuation takes it, the start first: "0.5,64" -> (0.0, 0.5, 64).

    UserError for anything but a share below 1 or a number of tokens below --max-new-tokens.
    """
    depths = [0.0]
    for word in flags.depths.split(","):
        try:
            depth = float(word) if "." in word else int(word)
        except ValueError:
            depth = math.nan
        most = 1 if isinstance(depth, float) else flags.max_new_tokens
        if not 0 <= depth < most:
            raise UserError(
                f"--depths {flags.depths}: {word!r} is neither a share from 0.0 to below 1.0 nor a "
                f"number of tokens below --max-new-tokens {flags.max_new_tokens}"
            )
        if depth not in depths:
            depths.append(depth)
    return tuple(depths)


def of_pair(flags):
    """Those of the flags that models.load_pair takes: {name: value}."""
    names = (
        "device",
        "dtype",
        "gradient_checkpointing",
        "micro_batch_tokens",
        "in_flight",
        "ends",
        "shard",
    )
    return {name: getattr(flags, name) for name in names if hasattr(flags, name)}
