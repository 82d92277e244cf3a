"""plumbing/flags.py: every flag of the three commands, with the reason for its default and the range that it allows.

A command's flags are the fields of a dataclass: Config (opd.py), DIAGNOSIS (analysis.py), ROLLOUTS and SELECTION
(recipes.py). Whatever cannot work is a ValueError with flag and remedy, before a model is loaded.
"""

import argparse
import dataclasses
import difflib
import inspect
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from loss import SUPPORTS
from plumbing.files import check_file
from plumbing.models import load_pair, pick_device
from recipes import apply_template

OBJECTIVES = ("top-k", "full", "sampled", "top-k-released")
POSITIVE, COUNT, FROM_0 = dict(above=0), dict(low=1), dict(low=0)  # ranges
FILE = "JSON lines"  # how the reason of a flag begins whose value is such a file


def flag(default, why, *choices, group=None, **range_):
    """A field; `group` opens a labelled group of --help. range_: low (least), above (more than), high (most)."""
    return field(
        default=default,
        metadata={"why": why, "choices": choices or None, "group": group, "range": range_},
    )


@dataclass(frozen=True)
class Config:
    """On-policy distillation: the student writes, the teacher grades every token. Why a default is what it is stands
    beside it.
    """

    student: str = flag(
        "", "directory or hub name of the model that learns", group="what matters first"
    )
    teacher: str = flag(
        "", "directory or hub name of the model that grades; same tokens as the student"
    )
    prompts: str = flag(
        "", FILE + ' {"prompt": ..., "answer": ...}; without it, additions of two numbers'
    )
    eval: str = flag(
        "", FILE + " to measure on; without it, a fifth of the prompts (64 at most), not trained on"
    )
    out: str = flag("runs/opd", "directory of the run")
    preset: str = flag(
        "",
        "settings of the toy world or of the paper (section 6); flags win over it",
        "",
        "toy",
        "paper",
    )
    steps: int = flag(
        100, "updates; enough to see which way a run goes. The paper's figures show 200", **FROM_0
    )
    batch_size: int = flag(8, "prompts a step; the paper's 64 wants a GPU", **COUNT)
    max_new_tokens: int = flag(
        128, "response tokens; what a CPU can do. The paper finds 3K to 7K best (6.1)", **COUNT
    )
    lr: float = flag(
        3e-5,
        "learning rate, constant; worked here at 0.1 B and 8 rollouts a step. Paper: 1e-6, 256",
        **POSITIVE,
    )

    objective: str = flag(
        "top-k",
        "Eq. 5, 4, 3, or what the authors' code descends",
        *OBJECTIVES,
        group="what is learned (2.2)",
    )
    k: int = flag(
        16,
        "likeliest tokens that loss and overlap metrics look at; the paper's. Larger gained nothing, 1 "
        "was worse (6.3)",
        **COUNT,
    )
    support: str = flag(
        "student", "whose k likeliest tokens the top-k loss looks at (4.2)", *SUPPORTS
    )
    ends: str = flag(
        "merged",
        "tokens that end a response are one event, whichever student and teacher use; own: each "
        "its own, as in the authors' code: where they differ, the student is taught never to end",
        "merged",
        "own",
    )
    n: int = flag(
        1,
        "rollouts a prompt; the paper takes 4, issue 22 of its code reports no clear gain over 1",
        **COUNT,
    )
    max_prompt_tokens: int = flag(
        1024, "longer prompts are dropped and counted, never cut; the paper's", **COUNT
    )
    temperature: float = flag(
        1.0, "of the student, when it writes and when it is scored; the paper's", **POSITIVE
    )
    teacher_temperature: float = flag(1.0, "of the teacher when it grades; the paper's", **POSITIVE)
    seed: int = flag(0, "of the prompts' order and of all sampling", low=0, high=2**31 - 1)

    template: str = flag(
        "none",
        "none (as they are), answer, boxed, or your own text with {question} in it (5.2)",
        group="how the prompts are put, and the two recipes (5)",
    )
    thinking: str = flag(
        "default", "enable_thinking of chat templates that have it", "default", "on", "off"
    )
    cold_start: int = flag(
        0,
        "prompts that the teacher answers for a fine-tuning before OPD, "
        "which sees other ones (5.1)",
        **FROM_0,
    )
    cold_start_file: str = flag(
        "", FILE + ' {"messages": [...]} for it, in place of asking the teacher'
    )
    cold_start_steps: int = flag(
        0, "updates of that fine-tuning; 0: one epoch, as in the paper", **FROM_0
    )
    cold_start_batch_size: int = flag(
        16, "responses in one of these updates; the paper takes 64", **COUNT
    )
    cold_start_lr: float = flag(
        1e-5,
        "highest learning rate of that fine-tuning: warm-up .05, then a cosine; the paper's",
        **POSITIVE,
    )
    cold_start_max_new_tokens: int = flag(
        0, "of the teacher's responses; 0: as max_new_tokens; paper: 12,288", **FROM_0
    )
    cold_start_temperature: float = flag(
        0.7,
        "the teacher's when it answers; the paper's. On the toy 1 ended as well "
        "in the mean, and was never far behind (experiments/recipe.py)",
        **FROM_0,
    )
    cold_start_top_p: float = flag(
        0.95, "of the teacher when it answers; the paper's", above=0, high=1
    )
    aligned_prompts: str = flag(
        "", FILE + " like what the teacher was post-trained on, to mix with --prompts (5.2)"
    )
    aligned_fraction: float = flag(
        0.5,
        "their share of the mixture; on the toy .25 to .75 did alike, 0 and 1 worse. "
        "The paper advises to mix and gives no share",
        low=0,
        high=1,
    )

    eval_every: int = flag(
        0,
        "steps between evaluations; 0: before and after only",
        group="measuring and saving",
        **FROM_0,
    )
    eval_n: int = flag(4, "responses a prompt when evaluating; the paper takes 16", **COUNT)
    eval_temperature: float = flag(0.7, "of the answers that are measured; the paper's", **FROM_0)
    eval_top_p: float = flag(0.95, "of the same; the paper's", above=0, high=1)
    eval_max_new_tokens: int = flag(0, "0: as max_new_tokens; the paper takes 31,744", **FROM_0)
    resume: bool = flag(False, "go on from the checkpoint in --out")
    save_every: int = flag(25, "steps between checkpoints", **COUNT)

    device: str = flag(
        "auto", "cuda where there is one, else cpu; or the name of one", group="machine and memory"
    )
    dtype: str = flag(
        "float32",
        "of the computation; the student's weights stay float32: bfloat16 loses small updates",
        "float32",
        "bfloat16",
    )
    teacher_dtype: str = flag(
        "",
        "of the teacher's weights, where it is not --dtype: bfloat16 halves their memory",
        "",
        "float32",
        "bfloat16",
        "float16",
    )
    teacher_device_map: str = flag(
        "",
        "for a teacher larger than one GPU, placed on several by transformers (pip "
        "install accelerate)",
        "",
        "auto",
        "balanced",
        "balanced_low_0",
        "sequential",
    )
    gradient_checkpointing: bool = flag(
        False,
        "compute the student's layers again in the backward pass: one more "
        "forward, for long responses",
    )
    shard: bool = flag(
        False,
        "cut the student's weights, gradients and AdamW over the processes of torchrun: of more "
        "than some 3e9 parameters they fit no GPU alone",
    )
    in_flight: int = flag(
        0,
        "responses written at a time, the next prompts wait; bounds the cache's memory; 0: all",
        **FROM_0,
    )
    chunk: int = flag(
        0,
        "positions whose logits exist at a time; changes memory, not the result. 0: 32 MiB of logits "
        "on a CPU, 1 GiB on a GPU",
        **FROM_0,
    )
    micro_batch_tokens: int = flag(
        0,
        "padded tokens in one forward and backward; changes memory, not the result. 0: "
        "what keeps activations in a quarter GiB on a CPU, an eighth of a GPU's memory",
        **FROM_0,
    )
    trust_remote_code: bool = flag(
        False,
        "run code that a checkpoint brings; read it first. Without it only "
        "safetensors and transformers' own code are used",
    )


PRESETS = {
    "toy": dict(
        batch_size=64,
        max_new_tokens=96,
        lr=1e-3,
        eval_n=2,
        eval_temperature=1.0,
        eval_top_p=1.0,
        cold_start_lr=2e-3,
        cold_start_batch_size=64,
        cold_start_temperature=1.0,
        cold_start_top_p=1.0,
    ),
    "paper": dict(
        steps=200,
        batch_size=64,
        n=4,
        max_new_tokens=7168,
        lr=1e-6,
        template="answer",
        eval_n=16,
        eval_max_new_tokens=31744,
        dtype="bfloat16",
        cold_start_batch_size=64,
        cold_start_max_new_tokens=12288,
        in_flight=32,
    ),
}


def command(doc, shared, **own):
    """A dataclass of flags: those of Config whose names are in `shared`, and its own."""
    of_config = {
        f.name: (f.name, f.type, field(default=f.default, metadata=f.metadata))
        for f in dataclasses.fields(Config)
    }
    made = [of_config[name] for name in shared.split()] + [
        (name, type(f.default), f) for name, f in own.items()
    ]
    return dataclasses.make_dataclass("Flags", made, frozen=True, namespace={"__doc__": doc})


BOTH = "student teacher prompts max_new_tokens max_prompt_tokens thinking ends seed device dtype trust_remote_code "
DIAGNOSIS = command(
    "Diagnose a pair before training, or look at runs after it.",
    BOTH + "template temperature k eval_temperature eval_top_p",
    count=flag(
        64,
        "prompts to sample, the first ones of the file shuffled by --seed; with 64 a lead of .2 is told 9 "
        "times in 10, with 24 in 5 (tests/test_diagnose.py)",
        group="before: will this pair work?",
        **COUNT,
    ),
    n=flag(2, "responses a prompt", **COUNT),
    finishes=flag(2, "endings that each model writes at each depth (6.1)", **COUNT),
    micro_batch_tokens=flag(
        16384, "padded tokens in one forward; changes memory, not the result", **COUNT
    ),
    out=flag("diagnose.json", "where the report goes"),
    tokens=flag("", "an .html file: a few responses, every token tinted by its reward"),
    run=flag(
        (),
        "directory of a run; may be given several times, side by side",
        group="after: what happened?",
    ),
    plot=flag(
        "",
        "an .svg file: the paper's Figure 6, every metric against the step (pip install matplotlib)",
    ),
    positions=flag(
        "", "an .svg file: entropies, reward and overlap by output position and step (Fig. 13)"
    ),
)
ROLLOUTS = command(
    "rollouts: the teacher answers every prompt, for a cold start (5.1)",
    BOTH + "template",
    out=flag("", "file to write; goes on with one that is there", group="what is written"),
    count=flag(2**31, "the first so many prompts", **COUNT),
    temperature=flag(0.7, "of the teacher; the paper's", **FROM_0),
    top_p=flag(0.95, "of the teacher; the paper's", above=0, high=1),
)
SELECTION = command(
    "select: rank a pool of prompts by measured alignment (ours)",
    BOTH + "n k",
    out=flag("", "file to write", group="what is written"),
    templates=flag("none", "to compare, by name, separated by commas"),
    keep=flag(0.5, "share of the pool that counts as aligned", low=0.01, high=0.99),
)


class Parser(argparse.ArgumentParser):
    """argparse whose every refusal is a ValueError, with the nearest flag where one is misspelt."""

    def error(self, message):
        raise ValueError(message)

    def parse_known_args(self, args=None, namespace=None):
        given, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, 1)
            self.error(
                f"unknown flag {unknown[0]}"
                + (f"; did you mean {near[0]}?" if near else "; --help lists them")
            )
        return given, unknown


def narrow(prog):
    """The layout of --help: two screens of 50 lines and 100 columns for opd.py's."""
    return argparse.HelpFormatter(prog, max_help_position=27)


def of_pair(flags):
    """Those of a command's flags that Pair.load takes, by name."""
    names = set(inspect.signature(load_pair).parameters) - {"student", "teacher"}
    return {f.name: getattr(flags, f.name) for f in dataclasses.fields(flags) if f.name in names}


def named(name):
    return "--" + name.replace("_", "-")


def parse(cls, words, prog):
    """Words of a command line -> an instance of a dataclass of flags, checked; a preset fills in what was not given."""
    parser = group = Parser(
        prog=prog,
        usage=f"{prog} --student S --teacher T [flags]",
        description=cls.__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=narrow,
    )
    for f in dataclasses.fields(cls):
        group = parser.add_argument_group(f.metadata["group"]) if f.metadata["group"] else group
        choices = f.metadata["choices"]
        kinds = {bool: dict(action="store_true"), tuple: dict(action="append", metavar="X")}
        how = kinds.get(
            f.type, dict(type=f.type, choices=choices, metavar="N" if f.type is int else "X")
        )
        why = ", ".join(filter(None, choices or ())) + ": " * bool(choices) + f.metadata["why"]
        why += "" if f.default is False or f.default in ("", ()) else f" [{f.default}]"
        group.add_argument(named(f.name), help=why.replace("%", "%%"), **how)
    given = vars(parser.parse_args(words))
    return check(cls(**{**PRESETS.get(given.get("preset", ""), {}), **given}))


def check(flags):
    """The flags themselves, or ValueError with the first that is out of range, or no file, device or template."""
    for f in dataclasses.fields(flags):
        x, range_ = getattr(flags, f.name), f.metadata["range"]
        low, above, high = (range_.get(name) for name in ("low", "above", "high"))
        if f.type in (int, float) and not (
            math.isfinite(x)
            and (low is None or x >= low)
            and (above is None or x > above)
            and (high is None or x <= high)
        ):
            words = {
                "at least": low,
                "above": above,
                "at most": high,
                "finite": "" if f.type is float else None,
            }
            must = " and ".join(
                f"{word} {bound}".strip() for word, bound in words.items() if bound is not None
            )
            raise ValueError(f"{named(f.name)} {x}: must be {must}")
        if f.metadata["choices"] and x not in f.metadata["choices"]:
            raise ValueError(
                f"{named(f.name)} {x!r}: none of {', '.join(map(repr, f.metadata['choices']))}"
            )
        if x and f.metadata["why"].startswith(FILE):
            check_file(x, named(f.name))
    for template in (
        flags.templates.split(",")
        if hasattr(flags, "templates")
        else [getattr(flags, "template", "none")]
    ):
        apply_template("", template)
    pick_device(flags.device)
    return flags


def need(flags, *names):
    """The flags themselves, or ValueError with the first of these names that was not given."""
    for f in dataclasses.fields(flags):
        if f.name in names and not getattr(flags, f.name):
            raise ValueError(f"{named(f.name)} is missing: {f.metadata['why']}")
    return flags


def check_run(cfg):
    """A Config itself, or ValueError with the flag and the remedy; what two flags say together, too."""
    need(check(cfg), "student", "teacher", "out")
    cold = cfg.cold_start or cfg.cold_start_file
    if cfg.steps == 0 and not cold:
        raise ValueError("--steps 0: must be at least 1; 0 only after a cold start")
    if cfg.cold_start and cfg.cold_start_file:
        raise ValueError(
            "--cold-start asks the teacher, --cold-start-file reads its answers: give one of the two"
        )
    if cfg.cold_start_steps and not cold:
        raise ValueError(
            "--cold-start-steps without --cold-start N, the number of prompts that the teacher answers"
        )
    if cfg.aligned_prompts and not cfg.prompts:
        raise ValueError("--aligned-prompts needs --prompts, the others to mix them with")
    check_writable(cfg.out)
    return cfg


def check_writable(out):
    """ValueError where a run cannot leave its files; nothing is left by asking."""
    folder = next(
        folder
        for folder in (Path(out).absolute(), *Path(out).absolute().parents)
        if folder.exists()
    )
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"--out {out}: {folder} cannot be written to ({error.strerror}); take another --out"
        ) from None


def check_folders(*files):
    for file in filter(None, files):
        if not Path(file).absolute().parent.is_dir():
            raise ValueError(f"{file}: its folder does not exist; make it first")


def parse_opd(words):
    return check_run(parse(Config, words, "opd.py"))


def parse_analysis(words):
    flags = parse(DIAGNOSIS, words, "analysis.py")
    if bool(flags.run) == bool(flags.student or flags.teacher):
        raise ValueError("give either --student and --teacher, or --run")
    if flags.run and flags.tokens or not flags.run and (flags.plot or flags.positions):
        raise ValueError(
            "--plot and --positions go with --run, --tokens with --student and --teacher"
        )
    for run in flags.run:
        if not (Path(run) / "metrics.jsonl").is_file():
            raise ValueError(
                f"--run {run}: no metrics.jsonl there; give the --out of an opd.py run"
            )
    check_folders(flags.out, flags.tokens, flags.plot, flags.positions)
    return flags if flags.run else need(flags, "student", "teacher")


def parse_recipes(words):
    """-> the name of the command, and its flags."""
    commands = {"rollouts": ROLLOUTS, "select": SELECTION}
    if not words or words[0] not in commands:
        raise ValueError(
            "say which: rollouts (the teacher answers prompts, 5.1) or select (prompts that suit a pair); "
            "each has --help"
        )
    flags = parse(commands[words[0]], words[1:], "recipes.py " + words[0])
    check_folders(flags.out)
    return words[0], need(flags, "student", "teacher", "prompts", "out")
