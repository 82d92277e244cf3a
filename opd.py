"""opd.py: on-policy distillation (arXiv 2604.13016), the whole loop.

    python opd.py --student DIR_OR_HUB --teacher DIR_OR_HUB

    once:       0  with --cold-start, fine-tune on what the teacher answers              recipes.py
    each step:  1  take the next prompts, aligned and others mixed                       recipes.py
                2  the student writes n responses to each, y ~ p(.|x)                    rollout.py
                3  both models read them: log p, log q at the states it visited          teacher.py
                4  reverse KL at every token, and its mean over the tokens of the step   loss.py
                5  Eq. 6-10 from the same softmaxes                                      analysis.py
                6  one AdamW update of the student

Not in the loop: a critic, a baseline, a discount, a KL to a reference, an entropy bonus. The reward is dense and needs
none. The batch of a step and its sampling seed depend on (seed, step) alone, so a run that was cut goes on bit for bit.
A step whose loss or gradient is not finite is skipped and reported; the third in a row ends the run.
"""
import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

import analysis
import loss
from recipes import (apply_template, cold_start, in_template, is_degenerate, load_conversations, mix_prompts,
                     read_conversations, same_question, teacher_rollouts)
from rollout import additions, batch, check_file, from_processes, load_prompts, processes
from teacher import NoMemory, Pair, grade, in_memory, pick_device

OBJECTIVES = ("top-k", "full", "sampled", "top-k-released")


def flag(default, why, *choices):
    return field(default=default, metadata={"why": why, "choices": choices or None})


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. Each field is a flag; the text says why the default is what it is."""
    student: str = flag("", "directory or hub name of the model that learns")
    teacher: str = flag("", "directory or hub name of the model that grades; same tokens as the student")
    prompts: str = flag("", 'JSON lines {"prompt": ..., "answer": ...}; without it, additions of two numbers')
    eval: str = flag("", "JSON lines to measure on; without it, a fifth of the prompts (64 at most), not trained on")
    out: str = flag("runs/opd", "directory of the run")
    preset: str = flag("", "settings of the toy world or of the paper (section 6); flags win over it",
                       "", "toy", "paper")
    resume: bool = flag(False, "go on from the checkpoint in --out")
    objective: str = flag("top-k", "Eq. 5, 4, 3, or what the authors' code descends", *OBJECTIVES)
    k: int = flag(16, "the paper's; larger gained nothing, 1 was worse (6.3); also the k of the overlap metrics")
    support: str = flag("student", "whose k likeliest tokens the top-k loss looks at (4.2)", *loss.SUPPORTS)
    steps: int = flag(100, "enough to see which way a run goes; the paper's figures show 200")
    batch_size: int = flag(8, "prompts a step; the paper's 64 wants a GPU")
    n: int = flag(1, "rollouts a prompt; the paper takes 4, issue 22 of its code reports no clear gain over 1")
    max_new_tokens: int = flag(128, "response tokens; what a CPU can do. The paper finds 3K to 7K best (6.1)")
    max_prompt_tokens: int = flag(1024, "longer prompts are dropped and counted, never cut; the paper's")
    lr: float = flag(3e-5, "constant, no warm-up; worked here at 0.1 B and 8 rollouts a step. Paper: 1e-6, 256")
    temperature: float = flag(1.0, "of the student, when it writes and when it is scored; the paper's")
    teacher_temperature: float = flag(1.0, "of the teacher when it grades; the paper's")
    template: str = flag("none", "none (as they are), answer, boxed, or your own text with {question} in it (5.2)")
    thinking: str = flag("default", "enable_thinking of chat templates that have it", "default", "on", "off")
    cold_start: int = flag(0, "prompts that the teacher answers for a fine-tuning before OPD, "
                           "which sees other ones (5.1)")
    cold_start_file: str = flag("", 'conversations for it, {"messages": [...]} a line, in place of asking the teacher')
    cold_start_steps: int = flag(0, "updates of that fine-tuning; 0: one epoch, as in the paper")
    cold_start_batch_size: int = flag(16, "responses in one of them; the paper takes 64")
    cold_start_lr: float = flag(1e-5, "its highest; warm-up .05, then a cosine; the paper's")
    cold_start_max_new_tokens: int = flag(0, "of the teacher's responses; 0: as max_new_tokens; paper: 12,288")
    cold_start_temperature: float = flag(0.7, "the teacher's when it answers; the paper's. On the toy 1 ended as "
                                         "well in the mean, and was never far behind (experiments/recipe.py)")
    cold_start_top_p: float = flag(0.95, "of the same; the paper's")
    aligned_prompts: str = flag("", "JSON lines, like what the teacher was post-trained on, "
                                "to mix with --prompts (5.2)")
    aligned_fraction: float = flag(0.5, "their share of the mixture; on the toy .25 to .75 did alike, 0 and 1 worse. "
                                   "The paper advises to mix and gives no share")
    eval_every: int = flag(0, "steps between evaluations; 0: before and after only")
    eval_n: int = flag(4, "responses a prompt when evaluating; the paper takes 16")
    eval_temperature: float = flag(0.7, "the paper's")
    eval_top_p: float = flag(0.95, "the paper's")
    eval_max_new_tokens: int = flag(0, "0: as max_new_tokens; the paper takes 31,744")
    save_every: int = flag(25, "steps between checkpoints")
    seed: int = flag(0, "of the prompts' order and of all sampling")
    device: str = flag("auto", "auto: cuda where there is one, else cpu")
    dtype: str = flag("float32", "of the computation; the student's weights stay float32: bfloat16 loses small updates",
                      "float32", "bfloat16")
    teacher_device_map: str = flag("", "auto: a teacher larger than one GPU, placed on several by transformers (pip "
                                   "install accelerate)", "", "auto", "balanced", "balanced_low_0", "sequential")
    gradient_checkpointing: bool = flag(False, "compute the student's layers again in the backward pass: one more "
                                        "forward, for long responses")
    teacher_dtype: str = flag("", "of the teacher's weights, where it is not --dtype: bfloat16 halves their memory",
                              "", "float32", "bfloat16", "float16")
    in_flight: int = flag(0, "responses written at a time, the next prompts wait; bounds the cache's memory; 0: all")
    chunk: int = flag(0, "positions whose logits exist at a time; changes memory, not the result. 0: 32 MiB of "
                         "logits on a CPU, 1 GiB on a GPU")
    trust_remote_code: bool = flag(False, "run code that a checkpoint brings; read it first. Without it only "
                                          "safetensors and transformers' own code are used")
    micro_batch_tokens: int = flag(0, "padded tokens in one forward and backward; changes memory, not the result. 0: "
                                   "what keeps activations in a quarter GiB on a CPU, an eighth of a GPU's memory")


PRESETS = {
    "toy": dict(batch_size=64, max_new_tokens=96, lr=1e-3, eval_n=2, eval_temperature=1.0, eval_top_p=1.0,
                cold_start_lr=2e-3, cold_start_batch_size=64, cold_start_temperature=1.0, cold_start_top_p=1.0),
    "paper": dict(steps=200, batch_size=64, n=4, max_new_tokens=7168, lr=1e-6, template="answer", eval_n=16,
                  eval_max_new_tokens=31744, dtype="bfloat16", cold_start_batch_size=64,
                  cold_start_max_new_tokens=12288, in_flight=32),
}


# --- flags and files -----------------------------------------------------------------------------------------------


def parse(argv):
    """Flags -> Config. Whatever cannot work is one line on stderr and exit code 2, before a model is loaded."""
    parser = analysis.Parser(prog="opd.py", description=__doc__.splitlines()[0], allow_abbrev=False,
                             argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        name, why = "--" + f.name.replace("_", "-"), f"{f.metadata['why']} (default: {f.default!r})".replace("%", "%%")
        if f.type is bool:
            parser.add_argument(name, action="store_true", help=why)
        else:
            choices = f.metadata["choices"]
            metavar = None if choices else f.type.__name__.upper()
            parser.add_argument(name, type=f.type, choices=choices, help=why, metavar=metavar)
    given = vars(parser.parse_args(argv))
    try:
        cfg = check(Config(**{**PRESETS.get(given.get("preset", ""), {}), **given}))
        for name, needs in unread(cfg).items():
            if name in given:
                raise ValueError(f"--{name.replace('_', '-')} does nothing without {needs}; leave it out, or add that")
        return cfg
    except ValueError as error:
        parser.error(str(error))


def unread(cfg):
    """The flags that nothing reads beside the others; a preset may hold them: {name: what it needs}."""
    of_the_teacher = "cold_start_max_new_tokens cold_start_temperature cold_start_top_p".split()
    of_the_tuning = "cold_start_steps cold_start_batch_size cold_start_lr".split()
    return {**(dict.fromkeys(of_the_teacher, "--cold-start N") if not cfg.cold_start else {}),
            **(dict.fromkeys(of_the_tuning, "--cold-start N or --cold-start-file")
               if not cfg.cold_start and not cfg.cold_start_file else {}),
            **({"aligned_fraction": "--aligned-prompts"} if not cfg.aligned_prompts else {}),
            **({"support": "a top-k --objective"} if not cfg.objective.startswith("top-k") else {})}


def check(cfg):
    """The Config itself, or ValueError with the flag and the remedy."""
    for name in ("student", "teacher"):
        if not getattr(cfg, name):
            raise ValueError(f"--{name} is missing: a directory or hub name of a causal language model")
    for name in ("prompts", "eval", "cold_start_file", "aligned_prompts"):
        if getattr(cfg, name):
            check_file(getattr(cfg, name), "--" + name.replace("_", "-"))
    for name in ("k", "batch_size", "cold_start_batch_size", "n", "max_new_tokens", "max_prompt_tokens", "eval_n",
                 "save_every"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be at least 1")
    if cfg.steps < (not cfg.cold_start and not cfg.cold_start_file):
        raise ValueError(f"--steps {cfg.steps}: must be at least 1; 0 only after a cold start")
    if cfg.cold_start and cfg.cold_start_file:
        raise ValueError("--cold-start asks the teacher, --cold-start-file reads its answers: give one of the two")
    if cfg.cold_start_steps and not cfg.cold_start and not cfg.cold_start_file:
        raise ValueError("--cold-start-steps without --cold-start N, the number of prompts that the teacher answers")
    if cfg.aligned_prompts and not cfg.prompts:
        raise ValueError("--aligned-prompts needs --prompts, the others to mix them with")
    if not 0 <= cfg.aligned_fraction <= 1:
        raise ValueError(f"--aligned-fraction {cfg.aligned_fraction}: must lie in 0..1")
    for name in ("lr", "cold_start_lr", "temperature", "teacher_temperature"):
        if not 0 < getattr(cfg, name) < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be above 0")
    for name in ("eval_temperature", "eval_every", "eval_max_new_tokens", "in_flight", "micro_batch_tokens", "chunk",
                 "cold_start", "cold_start_steps", "cold_start_max_new_tokens", "cold_start_temperature"):
        if not 0 <= getattr(cfg, name) < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must not be negative, nor infinite")
    if not 0 <= cfg.seed < 2 ** 31:
        raise ValueError(f"--seed {cfg.seed}: must lie in 0..{2 ** 31 - 1}")
    for name in ("eval_top_p", "cold_start_top_p"):
        if not 0 < getattr(cfg, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must lie above 0 and be at most 1")
    apply_template("", cfg.template)
    pick_device(cfg.device, cfg.dtype, cfg.teacher_dtype)
    check_writable(cfg.out)
    return cfg


def check_writable(out):
    """ValueError where a run cannot leave its files; nothing is left by asking."""
    try:
        folder = Path(out)
        while not folder.exists():
            folder = folder.parent
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--out {out}: {folder} cannot be written to ({error.strerror}); take another --out") from None


def questions(cfg):
    """-> (training, cold start, held-out) lists of {"prompt", "answer"}, in the template; no two share a question."""
    train = load_prompts(cfg.prompts) if cfg.prompts else additions(512, cfg.seed)
    train = {json.dumps(row["prompt"]): row for row in train}                   # a prompt that stands twice counts once
    draw, chats = random.Random(cfg.seed), read_conversations(cfg.cold_start_file) if cfg.cold_start_file else []
    seen = {same_question(chat[:-1], cfg.template) for chat in chats}

    def unseen(rows):
        return [row for row in rows if same_question(row["prompt"], cfg.template) not in seen]
    train = unseen(train.values())
    if cfg.eval:
        held_out = list({json.dumps(row["prompt"]): row for row in load_prompts(cfg.eval)}.values())
        if len(unseen(held_out)) < len(held_out):
            known = len(held_out) - len(unseen(held_out))
            warnings.warn(f"--eval: {known} of its questions are answered in --cold-start-file")
    else:
        pool = sorted(train, key=lambda row: json.dumps(row["prompt"]))
        held_out = draw.sample(pool, min(64, max(1, len(pool) // 5), len(pool)))
    seen |= {same_question(row["prompt"], cfg.template) for row in held_out}
    train, cold = unseen(train), []
    if cfg.cold_start:
        if cfg.cold_start + (cfg.steps > 0) > len(train):
            raise ValueError(f"--cold-start {cfg.cold_start}: only {len(train)} prompts to train on, "
                             "and OPD needs others than these")
        cold = draw.sample(train, cfg.cold_start)
        seen |= {same_question(row["prompt"], cfg.template) for row in cold}
        train = unseen(train)
    if cfg.aligned_prompts:
        train = mix_prompts(unseen(load_prompts(cfg.aligned_prompts)), train, cfg.aligned_fraction,
                            torch.Generator().manual_seed(cfg.seed))
    if not train and cfg.steps:
        raise ValueError(f"--prompts {cfg.prompts}: no prompt is left for training beside the held-out ones")
    return tuple(in_template(rows, cfg.template) for rows in (train, cold, held_out))


# --- one step ------------------------------------------------------------------------------------------------------


def objective(cfg):
    """The loss that --objective names: (log_p, log_q, y) -> (N,)."""
    return {"top-k": lambda log_p, log_q, y: loss.top_k(log_p, log_q, cfg.k, cfg.support),
            "top-k-released": lambda log_p, log_q, y: loss.top_k_released(log_p, log_q, cfg.k, cfg.support),
            "full": lambda log_p, log_q, y: loss.full_vocab(log_p, log_q),
            "sampled": loss.sampled_token}[cfg.objective]


def measure(cfg, student, teacher, r, *, learn, seconds=None):
    """Loss and diagnostics of a rollout, as means over all its response tokens: -> {name: float}.

    learn: also accumulate the gradient of the mean loss in the student. The tokens of the *whole* rollout are counted
    first and are the only denominator, so that neither the cut into micro-batches nor their padding changes the update.
    "broken", a list, has the rows of the rollout at which loss or reverse KL are not finite.
    """
    descend = objective(cfg)

    def per_position(log_p, log_q, y):
        return {"loss": descend(log_p, log_q, y), **analysis.diagnose(log_p, log_q, y, cfg.k)}
    share, total, sums, mismatch = processes(), int(r.response_mask.sum()), {}, []
    broken = torch.zeros(len(r.ids), dtype=torch.bool, device=r.ids.device)                  # (B,)
    width, buckets = -(-cfg.max_new_tokens // analysis.BUCKETS), {}
    with torch.set_grad_enabled(learn):
        for rows, is_response, out, losses in grade(
                student, teacher, r, per_position, micro_batch_tokens=cfg.micro_batch_tokens, share=share,
                temperature=cfg.temperature, teacher_temperature=cfg.teacher_temperature, seconds=seconds,
                chunk=cfg.chunk or None):
            if learn:
                (losses * (share[1] / total)).backward()                 # of the processes' gradients the mean is taken
            finite = (out["loss"] + out["reverse_kl"]).isfinite()                            # (N,)
            broken[rows] = torch.zeros_like(is_response).masked_scatter(is_response, ~finite).any(1)
            recorded = r.log_p[rows][r.response_mask[rows]]                                  # (N,)
            mismatch.append((out.pop("log_p") - recorded).abs().max())
            position = (is_response.cumsum(1) - 1)[is_response]                        # (N,) 0, 1, 2, ... a response
            for name, x in analysis.by_position(
                    position, {name: out[name] for name in analysis.BY_POSITION}, width).items():
                buckets[name] = buckets.get(name, 0) + x                                     # (BUCKETS,)
            for name, x in out.items():
                defined = ~x.isnan() if name == "overlap_token_advantage" else torch.ones_like(x, dtype=torch.bool)
                sums[name] = sums.get(name, 0) + torch.stack([torch.where(defined, x, 0).sum(), defined.sum()])
    parts = [part for part in from_processes(
        sums and (on_cpu(sums), on_cpu(buckets), torch.stack(mismatch).max().cpu(), broken.cpu())) if part]
    sums, buckets = ({name: sum(part[i][name] for part in parts) for name in parts[0][i]} for i in (0, 1))
    means = {name: (x / count).item() for name, (x, count) in sums.items()}
    defined = int(sums["overlap_token_advantage"][1])
    if not defined:
        means["overlap_token_advantage"] = None
        means["undefined"] = {"overlap_token_advantage": "at no position do the two share a likely token"}
    return {**means, "overlap_empty": total - defined,
            "sampling_mismatch": torch.stack([part[2] for part in parts]).max().item(), "tokens": total,
            "by_position": analysis.bucket_means(buckets, width),
            "broken": torch.stack([part[3] for part in parts]).any(0).nonzero().view(-1).tolist()}


def on_cpu(sums):
    """{name: tensor}, fetched from the device at once."""
    return dict(zip(sums, torch.stack(list(sums.values())).cpu()))


# --- a run ---------------------------------------------------------------------------------------------------------


class Run:
    """Models, prompts and files of one run. Experiments make one from a Config and call go()."""

    def __init__(self, cfg):
        self.cfg, self.out, self.started = check(cfg), Path(cfg.out), time.perf_counter()
        self.first = processes()[0] == 0                            # of several processes this one writes and talks
        self.look_at_out()
        if min(cfg.batch_size * cfg.n, cfg.cold_start_batch_size) < processes()[1]:
            raise ValueError(f"--batch-size {cfg.batch_size}, --n {cfg.n}, --cold-start-batch-size "
                             f"{cfg.cold_start_batch_size}: each of the {processes()[1]} processes needs a response")
        train, cold, held_out = questions(cfg)
        with in_memory("loading the models: take smaller ones, --teacher-dtype bfloat16, or --teacher-device-map auto"):
            self.pair = Pair.load(cfg.student, cfg.teacher, device=cfg.device, dtype=cfg.dtype,
                                  teacher_dtype=cfg.teacher_dtype, teacher_device_map=cfg.teacher_device_map,
                                  gradient_checkpointing=cfg.gradient_checkpointing,
                                  trust_remote_code=cfg.trust_remote_code)
        self.check_disk()
        if cfg.k > self.pair.ending["vocab_size"]:
            raise ValueError(f"--k {cfg.k}: the two models share {self.pair.ending['vocab_size']} tokens; "
                             "take a smaller k")
        self.pair.ending["in_flight"] = cfg.in_flight or None
        if not cfg.micro_batch_tokens:
            self.cfg = cfg = dataclasses.replace(cfg, micro_batch_tokens=self.pair.micro_batch_tokens())
        train = self.encode(train) if train else []
        self.prompts, self.prompt_names = [row["ids"] for row in train], [row["id"] for row in train]
        self.cold = self.encode(cold) if cold else []
        held_out = self.encode(held_out)
        self.held_out, self.answers = [row["ids"] for row in held_out], [row["answer"] for row in held_out]
        unanswered = self.answers.count(None)
        if 0 < unanswered < len(self.answers):
            warnings.warn(f"{unanswered} of {len(self.answers)} held-out prompts have no answer "
                          "and do not count in accuracy")
        self.digests = [hashlib.sha256(repr(x).encode()).hexdigest() for x in (
            self.prompts, ([row["ids"] for row in self.cold], self.held_out, self.answers))]
        self.optimizer, self.signals = self.new_optimizer(), Signals()
        self.before, self.step, self.cold_step, self.history, self.seconds, self.warned = {}, 0, 0, [], 0.0, []
        self.skipped, self.in_a_row = 0, 0                            # steps
        self.unlogged, self.saved = None, None                        # samples and row of the last step; see place

    def look_at_out(self):
        """ValueError where --out and --resume do not go together, before anything is loaded."""
        cfg, out = self.cfg, self.out
        config, result = (analysis.read_json(out / f"{name}.json") if (out / f"{name}.json").exists() else None
                          for name in ("config", "result"))
        if result is not None and not (cfg.resume and cfg.steps > result.get("steps", math.inf)):
            raise ValueError(f"--out {cfg.out}: the run there is complete; take another --out, or --resume it with "
                             "more --steps")
        if config is not None and not {"student", "teacher"} <= config.keys():
            raise ValueError(f"--out {cfg.out}: its config.json is not that of a run; take another --out")
        if cfg.resume and config is None:
            raise ValueError(f"--out {cfg.out}: no run there to resume, no checkpoint; leave --resume out")
        whole, metrics = (out / "checkpoint" / "state.pt").exists(), out / "metrics.jsonl"
        if not whole and (result is not None or (out / "student").exists() or
                          metrics.exists() and metrics.stat().st_size):
            raise ValueError(f"--out {cfg.out}: the run there has lost its checkpoint; restore it, or take another "
                             "--out")
        if not cfg.resume and whole:
            raise ValueError(f"--out {cfg.out}: holds another run; add --resume to go on with it, or take another "
                             "--out")
        if cfg.resume:
            self.same_run(config)

    def same_run(self, config):
        """ValueError where a run was begun with flags that decide its result, and they were other ones."""
        def same(a, b):                                                         # a path may be put another way
            return a == b or isinstance(a, str) and os.path.exists(a) and os.path.realpath(a) == os.path.realpath(b)
        for name, value in dataclasses.asdict(self.cfg).items():
            had = config.get(name, getattr(Config, name))                       # a flag that is new had its default
            if name not in MAY_DIFFER and not same(value, had):
                raise ValueError(f"--resume: the run in {self.cfg.out} had --{name.replace('_', '-')} {had!r}; "
                                 "give the same flags, or take another --out")

    def check_disk(self):
        """ValueError where a checkpoint, the one that replaces it, and the student would not fit on the disk."""
        size = sum(p.numel() for p in self.pair.student.parameters())
        folder = next(folder for folder in (self.out, *self.out.absolute().parents) if folder.exists())
        one = (self.out / "checkpoint" / "state.pt").exists()                   # of the two is there already
        need = (28 - 12 * one) * size                                 # float32: weights and two moments; the student
        free = shutil.disk_usage(folder).free
        if free < need:
            raise ValueError(f"--out {self.cfg.out}: {free / 1e9:.1f} GB are free there, and {need / 1e9:.1f} GB are "
                             "needed for two checkpoints and the student; make room, or take an --out elsewhere")

    def new_optimizer(self):
        return torch.optim.AdamW(self.pair.student.parameters(), lr=self.cfg.lr, betas=(0.9, 0.999), weight_decay=0.01,
                                 fused=True)

    def encode(self, rows):
        cfg = self.cfg
        return self.pair.encode(rows, max_prompt_tokens=cfg.max_prompt_tokens, thinking=cfg.thinking, new_tokens=max(
            cfg.max_new_tokens, cfg.eval_max_new_tokens, cfg.cold_start_max_new_tokens))

    def write(self, prompts, n, seed):
        with in_memory(f"writing responses: lower --in-flight (now {self.cfg.in_flight or len(prompts) * n}), or begin "
                       f"anew with a lower --max-new-tokens (now {self.cfg.max_new_tokens})"):
            return self.pair.write(prompts, n=n, max_new_tokens=self.cfg.max_new_tokens,
                                   temperature=self.cfg.temperature, seed=seed)

    def accuracy(self, model, what):
        """avg@eval_n on the held-out prompts that have answers, None without any. The same draws for every model."""
        cfg, asked = self.cfg, [i for i, answer in enumerate(self.answers) if answer is not None]
        if not asked:
            return None
        with self.pair.autocast(), in_memory(
                "evaluating: lower --in-flight, or begin anew with a lower --eval-max-new-tokens"):
            return analysis.accuracy(
                model, self.pair.tokenizer, [self.held_out[i] for i in asked], [self.answers[i] for i in asked],
                what=what, n=cfg.eval_n, max_new_tokens=cfg.eval_max_new_tokens or cfg.max_new_tokens,
                temperature=cfg.eval_temperature, top_p=cfg.eval_top_p, **self.pair.ending,
                generator=torch.Generator(self.pair.device).manual_seed(cfg.seed + 1))

    def distance(self):
        """Eq. 6-10 and the reverse KL on held-out prompts, at states that the student visits now: {name: float}."""
        r = self.write(self.held_out[:256], 1, self.cfg.seed + 2)
        with self.pair.autocast(), in_memory("measuring: " + self.smaller()):
            row = measure(self.cfg, *self.pair.splits, r, learn=False)
        if row.pop("broken"):
            raise FloatingPointError(f"held-out prompts, loss {row['loss']}: a model's output is not finite; " + (
                self.left() + ", --resume with a lower --lr" if self.step else "look at the two checkpoints"))
        return analysis.finite_or_null(row)

    def smaller(self):
        """What to do where an update does not fit into the memory, in words."""
        cfg = self.cfg
        return (f"lower --micro-batch-tokens (now {cfg.micro_batch_tokens}) or --chunk (now "
                f"{cfg.chunk or 'automatic'}), add --gradient-checkpointing, or begin anew with a lower "
                f"--max-new-tokens (now {cfg.max_new_tokens})")

    def place(self):
        """How far the run has come."""
        return self.cold_step, self.step, self.unlogged is not None

    def left(self):
        """What is there to go on from, in words."""
        if self.saved is None:
            return "no checkpoint was made yet"
        cold, step, _ = self.saved
        return f"the checkpoint of step {step} is whole" if step or not cold else (
            f"the checkpoint of step {cold} of the cold start is whole")

    def update(self):
        """One step: rollout, grading, update. -> two responses to read, and the row of metrics.jsonl.

        Where loss or gradient are not finite nothing is updated; the row has "skipped", the reason and the prompts.
        """
        cfg, clock, seconds = self.cfg, time.perf_counter(), {}
        chosen = batch(range(len(self.prompts)), self.step, cfg.batch_size, cfg.seed)
        r = self.write([self.prompts[i] for i in chosen], cfg.n, cfg.seed * 1_000_003 + self.step + 3)
        written = time.perf_counter()
        with in_memory("updating: " + self.smaller()):
            with self.pair.autocast():
                row = measure(cfg, *self.pair.splits, r, learn=True, seconds=seconds)
            norm = torch.nn.utils.clip_grad_norm_(self.pair.student.parameters(), 1.0).item()
            loss, broken = row["loss"], row.pop("broken")
            bad = not math.isfinite(loss) or not math.isfinite(norm)
            with self.signals.whole():                                # weights, count and row belong together
                if not bad:
                    self.optimizer.step()
                self.optimizer.zero_grad()
                self.step += 1
                self.skipped, self.in_a_row = self.skipped + bad, self.in_a_row + 1 if bad else 0
                done = time.perf_counter()
                responses = [r.response_ids(i) for i in range(len(r.ids))]
                samples = [{"step": self.step, "truncated": bool(r.truncated[i]),
                            "text": self.pair.tokenizer.decode(r.ids[i][r.attention_mask[i]])}
                           for i in range(min(2, len(r.ids)))]
                row = analysis.finite_or_null({
                    "step": self.step, **row, "response_length": row["tokens"] / len(responses),
                    "truncated_fraction": r.truncated.float().mean().item(),
                    "repetition_fraction": sum(map(is_degenerate, responses)) / len(responses), "grad_norm": norm,
                    "lr": self.optimizer.param_groups[0]["lr"], "skipped_steps": self.skipped,
                    "time_rollout": written - clock, "time_teacher": seconds["teacher"],
                    "time_update": done - written - seconds["teacher"],
                    "peak_memory_bytes": peak_memory(self.pair.device)})
                if bad:                                  # all of the prompts, where the gradient alone is broken
                    names = {self.prompt_names[chosen[i // cfg.n]]: None for i in broken or range(len(responses))}
                    row["skipped"] = {"why": f"loss {loss}, gradient norm {norm}", "prompts": list(names)}
                self.unlogged = samples, row
        return samples, row

    def save(self):
        """The checkpoint, written aside and renamed: whatever happens meanwhile leaves the last one whole.

        None is made of weights that are not finite, nor among skipped steps, which a run that goes on counts anew.
        """
        if not self.first or self.in_a_row:
            return
        student = self.pair.student.state_dict()
        if not torch.stack([x.isfinite().all() for x in student.values()]).all():
            raise FloatingPointError(f"step {self.step}: the update has left weights that are not finite; "
                                     f"{self.left()}, --resume with a lower --lr")
        folder = self.out / "checkpoint"
        folder.mkdir(exist_ok=True)
        for name in LOGS:                                             # never behind the checkpoint, whatever is cut off
            with contextlib.suppress(FileNotFoundError), open(self.out / name) as file:
                os.fsync(file.fileno())
        state = {"config": dataclasses.asdict(self.cfg), "step": self.step, "cold_step": self.cold_step,
                 "before": self.before, "warned_of": self.warned, "seconds": self.clock(), "skipped": self.skipped,
                 "digests": self.digests, "unlogged": self.unlogged, "student": student,
                 "optimizer": self.optimizer.state_dict()}
        with self.signals.whole():
            analysis.write_whole(folder / "state.pt", lambda file: torch.save(state, file))
            self.saved = self.place()

    def restore(self, path):
        """Go on from a checkpoint; lines that were logged after it are dropped, since those steps come again."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.same_run(state["config"])
            student, optimizer, step = state["student"], state["optimizer"], state["step"]
        except ValueError:
            raise
        except Exception as error:                                              # whatever torch makes of a broken file
            raise ValueError(f"--resume: {path} is not a whole checkpoint of opd.py ({type(error).__name__}); "
                             "restore it from a copy, or begin anew with another --out") from None
        if step > self.cfg.steps:
            raise ValueError(f"--steps {self.cfg.steps}: the run in {self.cfg.out} has come to step {step}; "
                             "ask for more, or take another --out")
        prompts, measured = state.get("digests", self.digests)
        if measured != self.digests[1]:
            raise ValueError("--resume: the held-out prompts, or those of the cold start, are not those of the steps "
                             "before; give the files as they were (with an --eval, and no cold start, some can be left "
                             "out)")
        if prompts != self.digests[0]:
            warnings.warn("--resume: the prompts are not those of the steps before; the rest of the run takes them as "
                          "they are now")
        try:
            self.pair.student.load_state_dict(student)
            self.optimizer.load_state_dict(optimizer)
        except (RuntimeError, ValueError, KeyError):
            raise ValueError(f"--resume: {path} does not fit the model in --student {self.cfg.student}; "
                             "give the one that it was begun with") from None
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.lr
        self.cold_step, self.before, self.seconds = (state[x] for x in ("cold_step", "before", "seconds"))
        self.step, self.unlogged = step, state.get("unlogged")
        self.skipped, self.warned = state.get("skipped", 0), state.get("warned_of", [])      # of an older one: none
        self.saved = self.place()
        if self.first:
            logged = step - (self.unlogged is not None)
            self.history = self.rewind("metrics.jsonl", logged, every=True)
            self.rewind("rollouts.jsonl", logged)
            if self.cold_start_wanted():
                self.rewind("cold_start_metrics.jsonl", self.cold_step, every=True)

    def rewind(self, name, step, every=False):
        """Cut a JSON-lines file of the run back to a step, a torn line and what follows it too: -> the rows that stay.

        every: ValueError where these are not steps 1, 2, ... to `step`, each once.
        """
        path, rows = self.out / name, []
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        torn = lines.pop() != b""
        for line in lines:
            try:
                row = json.loads(line)
                rows += [row] * (row["step"] <= step)
            except (ValueError, TypeError, KeyError):
                torn = True
                break
        if every and [row["step"] for row in rows] != list(range(1, step + 1)):
            raise ValueError(f"--resume: {path} should have steps 1 to {step}, each once, and has {len(rows)} lines of "
                             "them; restore it from a copy, or begin anew with another --out")
        if torn or len(rows) < len(lines):
            tqdm.write(f"--resume: {name} is cut back to the checkpoint, step {step}, and goes on from there"
                       + ("; its last line was torn" if torn else ""))
            text = "".join(json.dumps(row) + "\n" for row in rows)
            analysis.write_whole(path, lambda file: file.write(text.encode()))
        return rows

    @contextlib.contextmanager
    def kept(self):
        """Whatever ends the run inside, what is there stays whole, what can be saved is, and one line says so."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with self.alone():
                yield
        except FloatingPointError:
            raise
        except (Exception, KeyboardInterrupt) as error:
            if not self.signals.held and self.saved not in (None, self.place()):        # held: in the midst of a step
                with contextlib.suppress(Exception):
                    self.save()
            if isinstance(error, KeyboardInterrupt):
                if not self.first:
                    sys.exit(128 + (self.signals.got or signal.SIGINT))
                raise Stopped(f"stopped after step {self.step} of {self.cfg.steps}; {self.left()}, the same command "
                              "with --resume goes on", self.signals.got) from None
            if isinstance(error, NoMemory):
                raise NoMemory(f"{error}; {self.left()}, --resume goes on") from error
            if isinstance(error, OSError) and error.errno is not None:                  # of the system, no line of ours
                where = error.filename or ("stdout" if isinstance(error, BrokenPipeError) else self.out)
                raise OSError(f"{where}: {error.strerror}; {self.left()}; when that is mended, --resume goes "
                              "on") from None
            raise

    @contextlib.contextmanager
    def alone(self):
        """A lock on the directory of the run, which the system frees however a process ends; ValueError where another
        has it.
        """
        folder = os.open(self.out, os.O_RDONLY)
        try:
            if self.first:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {self.out}: another process is at this run; wait for it, or take another "
                             "--out") from None
        except OSError:
            pass                                                              # a file system without locks
        try:
            yield
        finally:
            os.close(folder)

    def log_file(self, name):
        """A log of the run, open to be added to; of several processes the first alone has one."""
        return open(self.out / name if self.first else os.devnull, "a")

    def clock(self):
        return self.seconds + time.perf_counter() - self.started

    def go(self):
        """Measure, train, measure: -> what result.json holds.

        Ctrl-C and SIGTERM drop the step at hand or finish it, save, and raise KeyboardInterrupt.
        """
        with self.signals, self.kept():
            self.begin()
            if self.cold_start_wanted() and "held_out_cold_start" not in self.before:
                self.fine_tune()
            self.distil()
            return self.finish()

    def begin(self):
        """Go on from the checkpoint where there is one; else measure both models and make the first."""
        path = self.out / "checkpoint" / "state.pt"
        if path.exists():
            self.restore(path)
        if self.first:
            (self.out / "result.json").unlink(missing_ok=True)
            path = self.out / "config.json"
            had = analysis.read_json(path) if self.saved is not None and path.exists() else {}
            start = {name: had[name] for name in ("command", "commit", "dirty") if name in had}
            analysis.write_json(path, {**dataclasses.asdict(self.cfg), **analysis.provenance(),
                                       "earlier_starts": had.get("earlier_starts", []) + [start] * bool(start)})
        if self.saved is not None:
            return
        before = {"accuracy_teacher": self.accuracy(self.pair.teacher, "teacher's accuracy"),
                  "accuracy_before": self.accuracy(self.pair.student, "student's accuracy"),
                  "held_out_before": self.distance()}
        for name in LOGS[:3 if self.cold_start_wanted() else 2]:
            self.log_file(name).close()
        self.before, apart = before, before["held_out_before"]["reverse_kl"]
        if apart > IMPLAUSIBLE:
            tqdm.write(f"warning: student and teacher begin {apart:.1f} nats a token apart: was the teacher trained "
                       "with another template? If not, begin with a cold start (paper 5.1)")
        self.save()

    def distil(self):
        """The steps that are left; a line of metrics each."""
        cfg = self.cfg
        tqdm.write(" ".join(f"{title:>{form.split('.')[0].rstrip('d')}}" for _, title, form in COLUMNS))
        with (self.log_file("metrics.jsonl") as metrics, self.log_file("rollouts.jsonl") as texts,
              tqdm(total=cfg.steps, initial=self.step - bool(self.unlogged), desc="distil", mininterval=1) as bar):
            while self.step < cfg.steps or self.unlogged:
                samples, row = self.unlogged or self.update()
                if cfg.eval_every and self.step % cfg.eval_every == 0 and self.step < cfg.steps:
                    measured = self.accuracy(self.pair.student, "student's accuracy")
                    row["accuracy"] = measured and measured["mean"]
                    if measured is None:
                        row["undefined"] = {**row.get("undefined", {}), "accuracy": UNANSWERED}
                self.log(row, samples, metrics, texts)        # cut off here it is logged anew, see restore
                self.unlogged = None
                self.tell(row)
                bar.update()
                if self.step % cfg.save_every == 0 or self.step == cfg.steps:
                    self.save()

    def cold_start_wanted(self):
        return bool(self.cfg.cold_start or self.cfg.cold_start_file)

    def fine_tune(self):
        """5.1: fine-tune on the teacher's responses, in cold_start.jsonl, then begin OPD with a new optimizer."""
        cfg, path = self.cfg, Path(self.cfg.cold_start_file or self.out / "cold_start.jsonl")
        if not cfg.cold_start_file:
            length = cfg.cold_start_max_new_tokens or cfg.max_new_tokens
            with in_memory("writing the teacher's responses: lower --in-flight"):
                counts = teacher_rollouts(self.pair, self.cold, path, seed=cfg.seed, max_new_tokens=length,
                                          temperature=cfg.cold_start_temperature, top_p=cfg.cold_start_top_p)
            tqdm.write("cold start: {kept} responses of the teacher; "
                       "dropped: {unfinished} unfinished, {degenerate} degenerate".format(**counts))
            self.before["cold_start"] = counts
            if not counts["kept"]:
                raise ValueError(f"--cold-start {cfg.cold_start}: the teacher finished no response within {length} "
                                 "tokens without repeating itself; begin anew with a higher "
                                 "--cold-start-max-new-tokens")
        examples = load_conversations(path, self.pair, cfg.thinking)
        steps = cfg.cold_start_steps or -(-len(examples) // cfg.cold_start_batch_size)
        with in_memory("fine-tuning: " + self.smaller()), self.log_file("cold_start_metrics.jsonl") as metrics:
            for row in tqdm(cold_start(self.pair, self.optimizer, examples, steps=steps, lr=cfg.cold_start_lr,
                                       seed=cfg.seed, batch_size=cfg.cold_start_batch_size, start=self.cold_step,
                                       micro_batch_tokens=cfg.micro_batch_tokens, chunk=cfg.chunk or None,
                                       whole=self.signals.whole),
                            total=steps, initial=self.cold_step, desc="cold start", mininterval=1):
                print(json.dumps(row), file=metrics, flush=True)
                self.cold_step = row["step"]
                self.skipped += "skipped" in row
                if "skipped" in row:
                    tqdm.write("warning: cold start, step {step} skipped: {skipped}".format(**row))
                elif self.cold_step % cfg.save_every == 0 or self.cold_step == steps:
                    self.save()
        self.before["accuracy_cold_start"] = self.accuracy(self.pair.student, "accuracy after the cold start")
        self.before["held_out_cold_start"] = self.distance()
        self.optimizer = self.new_optimizer()
        self.save()

    def log(self, row, samples, metrics, texts):
        """One JSON line and, now and then, some texts to read."""
        self.history.append(row)
        print(json.dumps(row), file=metrics, flush=True)
        for sample in samples if self.now_and_then() else ():
            print(json.dumps(sample), file=texts, flush=True)

    def now_and_then(self):
        """At the first step and at some twenty others."""
        return self.step % max(1, self.cfg.steps // 20) == 0 or self.step == 1

    def tell(self, row):
        """A readable line now and then, and a warning, once of a kind, when the run goes under."""
        if self.now_and_then():
            tqdm.write(" ".join("-".rjust(len(f"{0:{form}}")) if row[name] is None else f"{row[name]:{form}}"
                                for name, _, form in COLUMNS))
        if "skipped" in row:
            why, names = row["skipped"]["why"], row["skipped"]["prompts"]
            said = f"{why}; prompts {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if names[8:] else "")
            if self.in_a_row == 3:
                raise FloatingPointError(f"step {self.step}, the third without an update in a row: {said}; look at "
                                         f"these; {self.left()}, --resume with a lower --lr")
            tqdm.write(f"warning: step {self.step} skipped: {said}")
        off, repeats = row["sampling_mismatch"] or 0.0, row["repetition_fraction"]
        signs = {"collapse": analysis.collapse(self.history)}
        if repeats > 0.5:
            signs["repetition"] = f"{repeats:.0%} of the responses only repeat themselves, see rollouts.jsonl"
        if off > MISMATCH[self.cfg.dtype]:
            signs["mismatch"] = (f"log-probabilities as sampled and as scored differ by up to {off:.2g} nats: "
                                 "this is not on-policy")
        for kind, sign in signs.items():
            if sign and kind not in self.warned:
                self.warned.append(kind)
                tqdm.write(f"warning: step {self.step}: {sign}")

    def finish(self):
        """Measure the student that came out, save it, and write result.json last: it stands for a complete run."""
        before, after = self.before["accuracy_before"], self.accuracy(self.pair.student, "student's accuracy")
        recovery = after and analysis.gap_recovery(before, after, self.before["accuracy_teacher"])
        result = {**self.before, "accuracy_after": after, "held_out_after": self.distance(), "gap_recovery": recovery,
                  "steps": self.step, "skipped_steps": self.skipped, "seconds": self.clock(), **analysis.provenance()}
        if after is None:
            unanswered = [name for name in result if name.startswith("accuracy")]
            why = dict.fromkeys([*unanswered, "gap_recovery"], UNANSWERED)
        else:
            why = {} if recovery is not None else {"gap_recovery": WITHIN_NOISE}
            if after["standard_error"] is None:
                why["standard_error"] = "one held-out prompt has no spread"
        result["undefined"] = why
        if not self.first:
            return result
        # a new one: an inherited one may not be savable
        self.pair.student.generation_config = transformers.GenerationConfig(
            eos_token_id=sorted(self.pair.ending["eos_ids"]) or None, bos_token_id=self.pair.tokenizer.bos_token_id,
            pad_token_id=self.pair.tokenizer.pad_token_id)
        try:
            self.pair.student.save_pretrained(self.out / "student")
            self.pair.tokenizer.save_pretrained(self.out / "student")
        except Exception as error:                                              # safetensors has one of its own
            raise OSError(f"{self.out}/student cannot be written: {error}; {self.left()}, --resume goes on") from error
        analysis.write_json(self.out / "result.json", result)
        return result


def peak_memory(device):
    """Bytes at the peak so far: of the allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after what could be saved was."""

    def __init__(self, said, signum):
        super().__init__(said)
        self.code = 128 + (signum or signal.SIGINT)


class Signals:
    """Inside, Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt: at once or, while held, at the release. The second of
    them ends the process there and then; not under torchrun, which passes on each and kills after half a minute.
    """
    ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self):
        self.held, self.waits, self.got, self.before = False, False, None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {signum: signal.signal(signum, self.catch) for signum in self.ALL
                           if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN}      # nohup

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def catch(self, signum, _):
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
        if self.got and alone:
            print("left at once; the last checkpoint is whole", file=sys.stderr, flush=True)
            os._exit(128 + signum)
        if self.got:
            return
        self.got, self.waits = signum, self.held
        if not self.held:
            raise KeyboardInterrupt
        if alone:
            print("finishing what is being written; once more leaves at once", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def whole(self):
        """A block that no signal cuts in two. One that an error does stays held: there is nothing whole to save."""
        outer, self.held = self.held, True
        yield
        self.held = outer
        if self.waits and not outer:
            self.waits = False
            raise KeyboardInterrupt


LOGS = ("metrics.jsonl", "rollouts.jsonl", "cold_start_metrics.jsonl")
MAY_DIFFER = {"resume", "steps", "out", "lr", "cold_start_lr", "eval_every", "save_every", "micro_batch_tokens",
              "chunk", "in_flight", "gradient_checkpointing", "trust_remote_code", "device"}     # of a run that goes on
UNANSWERED = "no held-out prompt has an answer"
WITHIN_NOISE = "teacher and student are within noise of each other"
IMPLAUSIBLE = 5.0                                  # nats: the other family of the toy begins below 4
MISMATCH = {"float32": 0.01, "bfloat16": 1.0}      # nats: rounding stays well below; another softmax does not
COLUMNS = (                                        # of the readable line: metric, title, format
    ("step", "step", "5d"), ("loss", "loss", "8.4f"), ("reverse_kl", "rev. KL", "8.4f"),
    ("overlap_ratio", "overlap", "8.3f"),
    ("overlap_mass_student", "mass p", "7.4f"), ("overlap_mass_teacher", "mass q", "7.4f"),
    ("overlap_token_advantage", "adv.", "8.4f"), ("entropy_gap", "H gap", "7.4f"), ("entropy_student", "H p", "6.3f"),
    ("reward", "reward", "8.4f"), ("response_length", "length", "7.1f"), ("truncated_fraction", "cut", "5.2f"),
    ("grad_norm", "|grad|", "7.3f"))


def summary(result):
    """What a person wants to know when a run ends, in three lines."""
    before, after, lines = result["held_out_before"], result["held_out_after"], []
    if result["accuracy_after"]:
        said = [f"{name} {analysis.plus_minus(result[key])}" for name, key in
                (("student before", "accuracy_before"), ("after the cold start", "accuracy_cold_start"),
                 ("after", "accuracy_after"), ("teacher", "accuracy_teacher")) if key in result]
        recovered = result["gap_recovery"]
        lines = ["accuracy       " + ", ".join(said), "gap recovery   " + (
            f"{recovered:.2f} of the way from student to teacher" if recovered is not None
            else "not given: " + WITHIN_NOISE)]
    lines.append(f"held out       reverse KL {before['reverse_kl']:.4f} -> {after['reverse_kl']:.4f}, overlap ratio "
                 f"{before['overlap_ratio']:.3f} -> {after['overlap_ratio']:.3f}, overlap mass "
                 f"{after['overlap_mass_student']:.4f} and {after['overlap_mass_teacher']:.4f}")
    if result["skipped_steps"]:
        lines.append(f"skipped        {result['skipped_steps']} steps whose loss or gradient was not finite; "
                     "metrics.jsonl names their prompts")
    return "\n".join(lines)


@contextlib.contextmanager
def one_of_several(cfg):
    """Inside, this is one of the processes that torchrun started, if it did: nccl on GPUs, gloo on CPUs. A GPU each."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if cfg.device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=datetime.timedelta(hours=1))     # one may write longer than the others, not so long
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
        warnings.simplefilter("ignore")
    try:
        yield
    except RuntimeError as error:
        if any(name in str(error) for name in ("gloo", "NCCL", "Connection")):              # the others are not there
            raise ConnectionError("stopped, as another process has died; the last checkpoint is whole: "
                                  "--resume") from None
        raise
    finally:
        dist.destroy_process_group()


def main(argv=None):
    with analysis.one_line("opd.py"):
        cfg = parse(argv)
        with one_of_several(cfg):
            result = Run(cfg).go()
    print(summary(result))
    print(f"{result['seconds']:.0f} s; {cfg.out}/result.json, {cfg.out}/student")


if __name__ == "__main__":
    main()
