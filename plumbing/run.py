"""plumbing/run.py: the folder of a run: its lock, its checkpoint, its logs; Ctrl-C. Nothing of training.

The checkpoint holds all that a run has logged, and on --resume the logs are written anew from it: what happened after
it comes again, bit for bit. A signal is heeded between two steps; a second one leaves at once.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from plumbing import show
from plumbing.exits import Stopped
from plumbing.files import (
    alone,
    digest,
    finite_or_null,
    provenance,
    read_json,
    same,
    write_json,
    write_lines,
    write_whole,
)
from plumbing.flags import Config, named, of_pair
from plumbing.measure import peak_memory
from plumbing.processes import over_processes, processes
from teacher import Pair

METRICS, TEXTS, COLD = LOGS = ("metrics.jsonl", "rollouts.jsonl", "cold_start_metrics.jsonl")
STATE = "step cold_step skipped before logs warned seconds digests".split()  # of a checkpoint
MAY_DIFFER = {
    "resume",
    "steps",
    "out",
    "lr",
    "cold_start_lr",
    "eval_every",
    "save_every",
    "micro_batch_tokens",
    "chunk",
    "in_flight",
    "gradient_checkpointing",
    "shard",
    "trust_remote_code",
    "device",
}  # on --resume
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Run:
    """with Run(cfg) as run: ... `run.step`, `run.cold_step` and `run.before` tell how far it has come."""

    def __init__(self, cfg):
        self.cfg, self.out, self.first = (
            cfg,
            Path(cfg.out),
            processes()[0] == 0,
        )  # the first process writes
        self.path, self.started, self.signal, self.saved = (
            self.out / "checkpoint" / "state.pt",
            time.time(),
            None,
            None,
        )
        self.step, self.cold_step, self.skipped, self.in_a_row, self.seconds = 0, 0, 0, 0, 0.0
        self.before, self.logs, self.warned, self.state = {}, {name: [] for name in LOGS}, [], None
        self.titled = False  # of the readable lines
        self.look_at_out()

    def look_at_out(self):
        """ValueError where --out and --resume do not go together, before anything is loaded."""
        cfg, begun, result = self.cfg, self.path.exists(), self.out / "result.json"
        if min(cfg.batch_size, cfg.cold_start_batch_size) < processes()[1]:
            raise ValueError(
                f"--batch-size {cfg.batch_size}, --cold-start-batch-size {cfg.cold_start_batch_size}: "
                f"each of the {processes()[1]} processes needs a prompt"
            )
        if cfg.shard and processes()[1] == 1:
            raise ValueError(
                "--shard cuts the student over several processes: start them with torchrun, or leave it "
                "out"
            )
        if result.exists() and not (
            begun and cfg.resume and cfg.steps > read_json(result).get("steps", cfg.steps)
        ):
            raise ValueError(
                f"--out {cfg.out}: the run there is complete; take another --out, or --resume it with "
                "more --steps"
            )
        if begun and not cfg.resume:
            raise ValueError(
                f"--out {cfg.out}: holds another run; add --resume to go on, or take another --out"
            )
        if cfg.resume and not begun and not (self.out / "config.json").exists():
            raise ValueError(
                f"--out {cfg.out}: no run there to resume, no checkpoint; leave --resume out"
            )
        if (self.out / "config.json").exists() and "teacher" not in read_json(
            self.out / "config.json"
        ):
            raise ValueError(
                f"--out {cfg.out}: its config.json is not that of a run; take another --out"
            )
        if not begun and (self.out / METRICS).exists():
            raise ValueError(
                f"--out {cfg.out}: the run there has lost its checkpoint; restore it, or take another "
                "--out"
            )
        if begun:
            self.state = self.read_checkpoint()

    def read_checkpoint(self):
        """What the checkpoint holds; ValueError where it is none, or one of other flags that decide a result."""
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            vars(self).update({name: state[name] for name in STATE})
        except Exception as error:  # whatever torch makes of a broken file
            raise ValueError(
                f"--resume: {self.path} is not a whole checkpoint of opd.py ({type(error).__name__}); "
                "restore it from a copy, or begin anew with another --out"
            ) from None
        for name, value in dataclasses.asdict(self.cfg).items():
            had = state["config"].get(
                name, getattr(Config, name)
            )  # a flag that is new had its default
            if name not in MAY_DIFFER and not same(value, had):
                raise ValueError(
                    f"--resume: the run in {self.out} had {named(name)} {had!r}; "
                    "give the same flags, or take another --out"
                )
        if self.step > self.cfg.steps:
            raise ValueError(
                f"--steps {self.cfg.steps}: the run in {self.out} has come to step {self.step}; "
                "ask for more, or take another --out"
            )
        return state

    # --- one at a time, and Ctrl-C ---------------------------------------------------------------------------------

    def __enter__(self):
        self.out.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if self.first:
                folder = os.open(self.out, os.O_RDONLY)  # the lock goes with its holder
                stack.callback(os.close, folder)
                alone(folder, self.out)
            for signum in SIGNALS if threading.current_thread() is threading.main_thread() else ():
                before = signal.getsignal(signum)
                if signum != signal.SIGHUP or before != signal.SIG_IGN:  # nohup
                    stack.callback(signal.signal, signum, before)
                    signal.signal(signum, self.catch)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind, error, trace):
        self.stack.close()
        with contextlib.suppress(OSError):
            self.out.rmdir()  # where nothing is in it
        if isinstance(error, OSError) and error.errno is not None:  # of the system, no line of ours
            raise OSError(
                f"{error.filename or self.out}: {error.strerror}; {self.left()}; when that is mended, "
                "--resume goes on"
            ) from None
        if error is not None:
            error.add_note(f"{self.left()}, --resume goes on")

    def catch(self, signum, _):
        if self.signal and processes()[1] == 1:  # torchrun passes each of them on
            print(f"left at once; {self.left()}", file=sys.stderr, flush=True)
            os._exit(128 + signum)
        self.signal = signum
        if self.first:
            more = "; once more leaves at once" * (processes()[1] == 1)
            print(f"stopping after this step{more} ({self.left()})", file=sys.stderr, flush=True)

    def stop_if_asked(self):
        """Between two steps: save and leave where a signal came, to any of the processes."""
        got = torch.tensor(self.signal or 0, device=self.pair.device)
        if int(over_processes(got, dist.ReduceOp.MAX)):
            self.save()
            raise Stopped(
                f"stopped after step {self.step} of {self.cfg.steps}; {self.left()}, the same command with "
                "--resume goes on",
                int(got),
            )

    def left(self):
        """What is there to go on from, in words."""
        if self.saved is None:
            return "no checkpoint was made yet"
        cold, step = self.saved
        return (
            f"the checkpoint of step {step} is whole"
            if step or not cold
            else (f"the checkpoint of step {cold} of the cold start is whole")
        )

    # --- the checkpoint --------------------------------------------------------------------------------------------

    def load_pair(self):
        """The two models as the flags say: -> teacher.Pair."""
        pair = Pair.load(self.cfg.student, self.cfg.teacher, **of_pair(self.cfg))
        if self.cfg.k > pair.ending["vocab_size"]:
            raise ValueError(
                f"--k {self.cfg.k}: the two models share {pair.ending['vocab_size']} tokens; take a "
                "smaller k"
            )
        return pair

    def restore(self, pair, optimizer, train, cold, held_out):
        """Go on from the checkpoint, or begin. train, cold, held_out: rows of Pair.encode."""
        self.pair, self.optimizer = pair, optimizer
        asked = (
            [(row["ids"], row["answer"]) for row in train],
            [(row["ids"], row["answer"]) for row in cold + held_out],
        )
        digests = [digest(x) for x in asked]
        if self.state:
            self.go_on(digests)
        if self.first:
            print(
                f"{len(train)} prompts to learn from, {len(held_out)} held out"
                + f"; going on after step {self.step}" * bool(self.state),
                flush=True,
            )
        self.digests, self.state = digests, None
        if self.first:
            (self.out / "result.json").unlink(missing_ok=True)
            for name in LOGS:
                if self.logs[name] or (self.out / name).exists():
                    write_lines(self.out / name, self.logs[name])
            write_json(self.out / "config.json", {**dataclasses.asdict(self.cfg), **provenance()})

    def go_on(self, digests):
        if self.digests[1] != digests[1]:
            raise ValueError(
                "--resume: the held-out prompts, or those of the cold start, are not those of the steps "
                "before; give the files as they were (with an --eval, and no cold start, some can be left "
                "out)"
            )
        if self.digests[0] != digests[0]:
            warnings.warn(
                "--resume: the prompts are not those of the steps before; the rest of the run takes them as "
                "they are now"
            )
        try:
            if self.cfg.shard:
                from plumbing.shard import cut, cut_moments

                self.state["student"] = cut(self.state["student"], self.pair.student.state_dict())
                self.state["optimizer"] = cut_moments(
                    self.state["optimizer"], list(self.pair.student.parameters())
                )
            self.pair.student.load_state_dict(self.state["student"])
            self.optimizer.load_state_dict(self.state["optimizer"])
        except (RuntimeError, ValueError, KeyError):
            raise ValueError(
                f"--resume: {self.path} does not fit the model in --student {self.cfg.student}; "
                "give the one that it was begun with"
            ) from None
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.lr
        self.saved = self.cold_step, self.step

    def save(self):
        """The checkpoint, written aside and renamed: whatever happens meanwhile leaves the last one whole.

        None is made of weights that are not finite, nor among skipped steps, which a run that goes on counts anew.
        """
        if self.in_a_row or not self.before:
            return
        student, moments = self.pair.student.state_dict(), self.optimizer.state_dict()
        mine = [x.to_local() if self.cfg.shard else x for x in student.values()]
        if not over_processes(
            torch.stack([x.isfinite().all() for x in mine]).all().int(), dist.ReduceOp.MIN
        ):
            raise FloatingPointError(
                f"step {self.step}: the update has left weights that are not finite; "
                f"{self.left()}, --resume with a lower --lr"
            )
        student, moments = self.whole(student), self.whole(moments)
        if self.first:
            self.path.parent.mkdir(exist_ok=True)
            state = {
                **{name: getattr(self, name) for name in STATE},
                "config": dataclasses.asdict(self.cfg),
                "seconds": self.clock(),
                "student": student,
                "optimizer": moments,
            }
            write_whole(self.path, lambda file: torch.save(state, file))
            (self.out / METRICS).touch()  # of a run without a step, too
        self.saved = self.cold_step, self.step

    def whole(self, state):
        """A state_dict; of a sharded student a whole one, for the first process alone."""
        if self.cfg.shard:
            from plumbing.shard import joined  # half a second, for those who shard

            state = joined(state, self.first)
        return state

    def clock(self):
        return self.seconds + time.time() - self.started

    # --- the logs --------------------------------------------------------------------------------------------------

    def append(self, name, row):
        self.logs[name].append(row)
        if self.first:
            with open(self.out / name, "a") as file:
                print(json.dumps(row), file=file)

    def count(self, row):
        """Tell of a step without an update; the third in a row ends the run."""
        self.in_a_row = self.in_a_row + 1 if "skipped" in row else 0
        if self.in_a_row:
            self.skipped += 1
            why, *others = row["skipped"].values()  # prompts by name, examples by number
            said = f"step {row['step']} skipped: {why}; of {', '.join(map(str, others[0][:8]))}"
            said += f" and {len(others[0]) - 8} more" * (len(others[0]) > 8)
            if self.in_a_row == 3:
                raise FloatingPointError(
                    f"{said}, the third in a row; look at these; {self.left()}, --resume with a "
                    "lower --lr, or --cold-start-lr"
                )
            tqdm.write(f"warning: {said}")

    def log(self, row, r):
        """After a step: its line in metrics.jsonl, now and then two texts and a readable line; the checkpoint."""
        self.step = row["step"]
        self.count(row)
        row = finite_or_null(
            {
                **row,
                "skipped_steps": self.skipped,
                "peak_memory_bytes": peak_memory(self.pair.device),
            }
        )
        self.append(METRICS, row)
        if self.step % max(1, self.cfg.steps // 20) == 0 or self.step == 1:
            for ids, mask, cut in list(zip(r.ids, r.attention_mask, r.truncated))[:2]:
                self.append(
                    TEXTS,
                    {
                        "step": self.step,
                        "truncated": bool(cut),
                        "text": self.pair.tokenizer.decode(ids[mask]),
                    },
                )
            tqdm.write(show.columns() * (not self.titled) + show.line(row))
            self.titled = True
        for kind, sign in show.signs(self.logs[METRICS], self.cfg.dtype).items():
            if sign and kind not in self.warned:
                self.warned.append(kind)
                tqdm.write(f"warning: step {self.step}: {sign}")
        self.save_when_due(self.step, self.cfg.steps)

    def log_cold_start(self, row, steps):
        """After an update of the cold start."""
        self.cold_step = row["step"]
        self.count(row)
        self.append(COLD, finite_or_null(row))
        self.save_when_due(self.cold_step, steps)

    def save_when_due(self, step, steps):
        """The checkpoint every so many steps, and the place where a signal is heeded."""
        if step % self.cfg.save_every == 0 or step == steps:
            self.save()
        self.stop_if_asked()

    def finish(self, result):
        """Save the student, and write result.json last: it stands for a complete run. -> what it holds."""
        result = {
            **self.before,
            **result,
            "steps": self.step,
            "skipped_steps": self.skipped,
            "seconds": self.clock(),
            **provenance(),
        }
        student = self.whole(self.pair.student.state_dict())
        if self.first:
            tokenizer = self.pair.tokenizer
            self.pair.student.generation_config = (
                transformers.GenerationConfig(  # an inherited one may be unsavable
                    eos_token_id=self.pair.ending["eos_ids"],
                    bos_token_id=tokenizer.bos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            )
            try:
                self.pair.student.save_pretrained(self.out / "student", state_dict=student)
                tokenizer.save_pretrained(self.out / "student")
            except Exception as error:  # safetensors has one of its own
                raise OSError(
                    f"{self.out}/student cannot be written: {error}; {self.left()}, --resume goes "
                    "on"
                ) from None
            write_json(self.out / "result.json", result)
        return result
