"""plumbing/run.py: the folder of a run: its lock, its checkpoint, its logs, and Ctrl-C.

The checkpoint holds all that a run has logged. --resume writes the logs again from it and goes on.
The steps between the checkpoint and a kill are done again. On a CPU they come out the same bit for
bit. On a GPU, whose kernels add in no fixed order, their numbers differ, and the lines that were
logged are replaced. A stopped run (Ctrl-C, SIGTERM) saves first and loses nothing, unless its last
step was skipped (see Run.save).
"""

import contextlib
import dataclasses
import os
import signal
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import GenerationConfig

from plumbing import show
from plumbing.exits import RunEnded, Stopped
from plumbing.files import (
    alone,
    append_lines,
    can_write,
    digest,
    finite_or_null,
    provenance,
    read_json,
    same,
    write_json,
    write_lines,
    write_whole,
)
from plumbing.flags import named, of_pair
from plumbing.measure import peak_memory
from plumbing.models import check_k, load_pair
from plumbing.processes import gathered, is_sharded, over_processes, processes
from plumbing.prompts import load_conversations
from teacher import UserError

METRICS = "metrics.jsonl"
TEXTS = "rollouts.jsonl"
COLD_METRICS = "cold_start_metrics.jsonl"
LOGS = (METRICS, TEXTS, COLD_METRICS)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MAY_DIFFER = {  # flags that --resume may change; of these only the two rates decide a result
    "resume",
    "steps",
    "out",
    "lr",
    "cold_start_lr",
    "eval_every",
    "save_every",
    "micro_batch_tokens",
    "in_flight",
    "gradient_checkpointing",
    "shard",
    "device",
}


@dataclass
class State:
    """How far a run has come. A checkpoint holds this, the weights and the optimizer's moments."""

    config: dict  # the flags
    step: int = 0
    cold_step: int = 0  # updates of the cold start
    skipped: int = 0  # steps and updates whose gradient was not finite
    in_a_row: int = 0  # of these, the last ones
    before: dict = field(default_factory=dict)  # what was measured before the first step
    logs: dict = field(default_factory=lambda: {name: [] for name in LOGS})
    seconds: float = 0.0  # of work, until the checkpoint
    digests: dict = field(default_factory=dict)  # of the questions


class Run:
    """The folder of a run, to be used as `with Run(cfg) as run:`, which takes the lock.

    `step`, `cold_step` and `before` tell how far the run has come. On entry: UserError if the
    folder and the flags do not agree (look), RunEnded if it cannot be written.
    """

    def __init__(self, cfg):
        self.cfg = cfg
        self.out = Path(cfg.out)
        self.path = self.out / "checkpoint" / "state.pt"
        self.is_first = processes()[0] == 0  # the first process writes
        self.state = State(dataclasses.asdict(cfg))
        self.started = time.time()
        self.checkpoint = None  # what was read from the disk, until `restore`
        self.saved = ""  # the checkpoint that is there, in words
        self.signal = 0  # the number of the last signal that came
        self.has_titles = False  # were the titles of the readable lines printed?

    @property
    def step(self):
        """How many steps are done: int."""
        return self.state.step

    @property
    def cold_step(self):
        """How many updates of the cold start are done: int."""
        return self.state.cold_step

    @property
    def before(self):
        """What was measured before the first step: dict, to be filled."""
        return self.state.before

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            with can_write(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
            if self.is_first:
                folder = os.open(self.out, os.O_RDONLY)  # the lock ends with its holder
                stack.callback(os.close, folder)
                alone(folder, self.out)
                stack.callback(self.remove_if_empty)  # not if it is another run's
            gathered([None])  # the others wait until the first process has the lock
            self.look()
            for signum in SIGNALS:
                handler = signal.getsignal(signum)
                if signum == signal.SIGHUP and handler == signal.SIG_IGN:
                    continue  # nohup
                stack.callback(signal.signal, signum, handler)
                signal.signal(signum, self.catch)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind, error, trace):
        self.stack.close()
        cannot_work = isinstance(error, UserError) and error.code == 2
        if error is not None and self.saved and not cannot_work:
            error.add_note(f"{self.saved}, --resume goes on")

    def remove_if_empty(self):
        """Remove the folder if nothing is in it."""
        with contextlib.suppress(OSError):
            self.out.rmdir()

    # --- what is in --out ------------------------------------------------------------------------

    def look(self):
        """Read the checkpoint, if there is one. UserError if --out and the flags do not agree."""
        cfg = self.cfg
        config = self.out / "config.json"
        result = self.out / "result.json"
        has_checkpoint = self.path.exists()
        if cfg.batch_size < processes()[1]:
            raise UserError(
                f"--batch-size {cfg.batch_size}: each of the {processes()[1]} processes needs a "
                "prompt; take a larger --batch-size"
            )
        if cfg.shard and processes()[1] == 1:
            raise UserError(
                "--shard cuts the models over several processes: start them with torchrun, or "
                "leave it out"
            )
        for model in (cfg.student, cfg.teacher):
            if Path(model).resolve() == (self.out / "student").resolve():
                raise UserError(
                    f"--out {cfg.out}: the trained student would be written over {model}, which "
                    "the run reads; take another --out"
                )
        for name in ("student", "cold_start.jsonl"):
            if (self.out / name).exists() and not config.exists():
                raise UserError(
                    f"--out {cfg.out}: holds {name}, but no run that wrote it; take another --out"
                )
        if config.exists() and "teacher" not in read_json(config):
            raise UserError(
                f"--out {cfg.out}: its config.json is not that of a run; take another --out"
            )
        if result.exists():
            goes_on = has_checkpoint and cfg.resume
            if not goes_on or cfg.steps <= read_json(result).get("steps", cfg.steps):
                raise UserError(
                    f"--out {cfg.out}: the run there is complete; take another --out, or --resume "
                    "it with more --steps"
                )
        if has_checkpoint and not cfg.resume:
            raise UserError(
                f"--out {cfg.out}: holds a run; add --resume to go on, or take another --out"
            )
        if cfg.resume and not has_checkpoint and not config.exists():
            raise UserError(
                f"--out {cfg.out}: no run there to resume, no checkpoint; leave --resume out"
            )
        if not has_checkpoint and (self.out / METRICS).exists():
            raise UserError(
                f"--out {cfg.out}: the run there has lost its checkpoint; restore it, or take "
                "another --out"
            )
        if has_checkpoint:
            self.read_checkpoint()

    def read_checkpoint(self):
        """Read the checkpoint.

        UserError if it is broken, was made with other flags that decide a result, or has done more
        than --steps.
        """
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            state = State(**found["run"])
        except Exception as error:  # whatever torch makes of a broken file
            raise UserError(
                f"--resume: {self.path} is not a whole checkpoint of opd.py "
                f"({type(error).__name__}); restore it, or begin anew with another --out"
            ) from None
        for name, value in self.state.config.items():
            had = state.config.get(name)
            if name not in MAY_DIFFER and not same(value, had):
                raise UserError(
                    f"--resume: the run in {self.out} had {named(name)} {had!r}; give the same "
                    "flags, or take another --out"
                )
        for name, log in (("lr", METRICS), ("cold_start_lr", COLD_METRICS)):
            now = getattr(self.cfg, name)
            had = state.config[name]
            if now != had:
                warnings.warn(
                    f"{named(name)} {now:g}: the run began with {had:g}; {log} has that of each "
                    "step",
                    stacklevel=2,
                )
        if state.step > self.cfg.steps:
            raise UserError(
                f"--steps {self.cfg.steps}: the run in {self.out} has already done {state.step} "
                "steps; ask for more, or take another --out"
            )
        state.config = self.state.config
        self.state = state
        self.checkpoint = found

    # --- the beginning ---------------------------------------------------------------------------

    def load_pair(self):
        """Load the two models with the flags of the run: -> teacher.Pair.

        UserError, see models.load_pair, or if --k is larger than their vocabulary, or if
        --cold-start-file has a line that they cannot learn.
        """
        cfg = self.cfg
        pair = load_pair(cfg.student, cfg.teacher, **of_pair(cfg))
        check_k(cfg.k, pair)
        if cfg.cold_start_file:
            load_conversations(cfg.cold_start_file, pair, cfg.thinking)
        return pair

    def restore(self, pair, optimizer, train, cold, held_out):
        """Go on from the checkpoint, or begin; write the logs and config.json again.

        train, cold, held_out: the questions, {"prompt", "answer", ...}. They are compared with
        those of the checkpoint as text, since some chat templates write the date into a prompt.
        UserError if the checkpoint belongs to other questions or another model.
        """
        self.pair = pair
        self.optimizer = optimizer
        digests = {"train": digest_of(train), "others": digest_of(cold + held_out)}
        if self.cfg.cold_start_file:
            digests["others"] += digest(Path(self.cfg.cold_start_file).read_bytes())
        said = f"{len(train)} prompts to learn from, {len(held_out)} held out"
        if self.checkpoint:
            self.check_questions(digests)
            self.load_checkpoint()
            said += f"; going on after step {self.step}"
        self.state.digests = digests
        if self.is_first:
            show.say(said)
            self.keep_result()
            for name, rows in self.state.logs.items():
                if rows or (self.out / name).exists():
                    write_lines(self.out / name, rows)
            write_json(self.out / "config.json", {**self.state.config, **provenance()})

    def keep_result(self):
        """Rename the result of a run that goes on: result.json marks a run that is complete."""
        result = self.out / "result.json"
        if result.exists():
            steps = read_json(result)["steps"]
            with can_write(result):
                result.rename(self.out / f"result-of-step-{steps}.json")

    def check_questions(self, digests):
        """UserError if held-out or cold-start questions have changed; a warning if others have."""
        had = self.state.digests
        if had["others"] != digests["others"]:
            raise UserError(
                "--resume: the held-out prompts, or those of the cold start, are not those of the "
                "steps before; give the files as they were (only with --eval and without a cold "
                "start may --prompts change)"
            )
        if had["train"] != digests["train"]:
            warnings.warn(
                "--resume: the prompts are not those of the steps before; the rest of the run uses "
                "those given now",
                stacklevel=2,
            )

    def load_checkpoint(self):
        """Put weights and moments of the checkpoint in place; UserError if they do not fit."""
        student = self.pair.student
        weights = self.checkpoint["student"]
        moments = self.checkpoint["optimizer"]
        try:
            if self.cfg.shard:
                from plumbing.shard import load_full_state

                load_full_state(student, self.optimizer, weights, moments)
            else:
                student.load_state_dict(weights)
                self.optimizer.load_state_dict(moments)
        except (RuntimeError, ValueError, KeyError):
            raise UserError(
                f"--resume: {self.path} does not fit the model in --student {self.cfg.student}; "
                "give the model that the run began with"
            ) from None
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.lr
        self.checkpoint = None  # frees its memory
        self.saved = self.in_words()

    # --- the checkpoint --------------------------------------------------------------------------

    def save(self):
        """Write the checkpoint aside and rename it, so that a failure leaves the last one whole.

        After a skipped step nothing is saved: a run that goes on would count them from 0 again.
        RunEnded if the weights are not finite, or if the file cannot be written.
        """
        if self.state.in_a_row or not self.before:
            return
        self.check_weights()
        weights, moments = self.full_state()
        if self.is_first:
            run = {**vars(self.state), "seconds": self.clock()}
            whole = {"run": run, "student": weights, "optimizer": moments}
            with can_write(self.path):
                self.path.parent.mkdir(exist_ok=True)
            write_whole(self.path, lambda file: torch.save(whole, file))
            (self.out / METRICS).touch()  # so that a run without a step has one, too
        self.saved = self.in_words()

    def check_weights(self):
        """RunEnded if a weight of the student, in any process, is not finite."""
        finite = torch.tensor(1, device=self.pair.device)
        for p in self.pair.student.parameters():
            mine = p.to_local() if is_sharded(p) else p
            finite *= mine.isfinite().all()
        if not over_processes(finite, dist.ReduceOp.MIN):
            raise RunEnded(
                f"step {self.step}: the update has left weights that are not finite; take a lower "
                "--lr"
            )

    def full_state(self):
        """The whole weights and moments: two state_dicts.

        With --shard only the first process gets them; the dicts of the others are empty.
        """
        if self.cfg.shard:
            from plumbing.shard import full_state  # a second, only for those who shard

            return full_state(self.pair.student, self.optimizer)
        return self.pair.student.state_dict(), self.optimizer.state_dict()

    def in_words(self):
        """The checkpoint, which has just been written or read, in words."""
        if self.cold_step and not self.step:
            return f"the checkpoint of step {self.cold_step} of the cold start is whole"
        return f"the checkpoint of step {self.step} is whole"

    def clock(self):
        """Seconds that the run has taken so far, without the time between its parts."""
        return self.state.seconds + time.time() - self.started

    # --- Ctrl-C ----------------------------------------------------------------------------------

    def catch(self, signum, _):
        """Note a signal; `stop_if_asked` obeys it. A second one is not caught and ends at once.

        With several processes it is caught, too: torchrun passes signals on, so the second may be
        the first one again.
        """
        self.signal = signum
        is_alone = processes()[1] == 1
        if is_alone:
            signal.signal(signum, signal.SIG_DFL)
        if self.is_first:
            said = "\nstopping after this step, or these measurements"
            if is_alone:
                said += "; once more leaves at once"
            else:
                said += "; torchrun may wait 30 s only"
            if self.saved:
                said += f" ({self.saved})"
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, f"{said}\n".encode())  # sys.stderr may be writing at this moment

    def stop_if_asked(self):
        """Between two steps: save, and raise Stopped, if a signal has come to any process."""
        signum = torch.tensor(self.signal, device=self.pair.device)
        signum = int(over_processes(signum, dist.ReduceOp.MAX))
        if signum:
            self.save()
            raise Stopped(f"stopped after step {self.step} of {self.cfg.steps}", signum)

    def save_when_due(self, step, steps):
        """Save every --save-every steps, and after the last of `steps`; then stop_if_asked."""
        if step % self.cfg.save_every == 0 or step == steps:
            self.save()
        self.stop_if_asked()

    # --- the logs --------------------------------------------------------------------------------

    def log(self, row, r):
        """Log a step: a line of metrics; about 20 times a run two texts and a readable line, too.

        row: {"step": from 1, metric: value}, and "skipped": a reason, if there was no update.
        r: the Rollout of this process. Saves and stops, see save_when_due; RunEnded, see
        count_skipped.
        """
        self.state.step = row["step"]
        self.count_skipped(row)
        row["skipped_steps"] = self.state.skipped
        row["peak_memory_bytes"] = peak_memory(self.pair.device)
        row = finite_or_null(row)
        self.append(METRICS, row)
        every = max(1, self.cfg.steps // 20)
        if self.step == 1 or self.step % every == 0:
            for i in range(min(2, len(r.ids))):
                text = self.pair.tokenizer.decode(r.ids[i, r.attention_mask[i]])
                truncated = bool(r.truncated[i])
                self.append(TEXTS, {"step": self.step, "truncated": truncated, "text": text})
            if not self.has_titles:
                show.say(show.columns())
                self.has_titles = True
            show.say(show.line(row))
        self.save_when_due(self.step, self.cfg.steps)

    def log_cold_start(self, row, steps):
        """Log an update of the cold start: a line of metrics. steps: how many there are in all."""
        self.state.cold_step = row["step"]
        self.count_skipped(row)
        self.append(COLD_METRICS, finite_or_null(row))
        self.save_when_due(self.cold_step, steps)

    def count_skipped(self, row):
        """Warn of a step without an update; at the third in a row: RunEnded."""
        if "skipped" not in row:
            self.state.in_a_row = 0
            return
        self.state.skipped += 1
        self.state.in_a_row += 1
        said = f"step {row['step']} skipped: {row['skipped']}"
        if self.state.in_a_row == 3:
            raise RunEnded(f"{said}, the third in a row; take a lower --lr, or --cold-start-lr")
        show.say(f"warning: {said}")

    def append(self, name, row):
        """Add a row to a log, and to its file."""
        self.state.logs[name].append(row)
        if self.is_first:
            append_lines(self.out / name, [row])

    # --- the end ---------------------------------------------------------------------------------

    def finish(self, result):
        """Write the student, then result.json, the mark of a complete run: -> its content."""
        result = {
            **self.before,
            **result,
            "steps": self.step,
            "skipped_steps": self.state.skipped,
            "seconds": self.clock(),
            **provenance(),
        }
        weights, _ = self.full_state()
        if self.is_first:
            self.save_student(weights)
            write_json(self.out / "result.json", result)
        return result

    def save_student(self, weights):
        """Write student/, for from_pretrained. RunEnded if it cannot be written."""
        tokenizer = self.pair.tokenizer
        student = self.pair.student
        student.generation_config = GenerationConfig(  # an inherited one may be unsavable
            eos_token_id=self.pair.eos_ids,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        folder = self.out / "student"
        with can_write(folder):
            try:
                student.save_pretrained(folder, state_dict=weights)
                tokenizer.save_pretrained(folder)
            except SafetensorError as error:  # its own, for a full disk
                raise RunEnded(f"{folder} cannot be written: {error}") from None


def digest_of(rows):
    """A digest of the texts of questions: prompts, teacher_prompts and answers."""
    return digest([(row["prompt"], row.get("teacher_prompt"), row["answer"]) for row in rows])
