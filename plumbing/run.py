"""plumbing/run.py: the folder of a run: its lock, its checkpoint, its logs; Ctrl-C. Nothing of training.

The checkpoint holds all that a run has logged, and on --resume the logs are written anew from it: whatever happened
after it comes again, bit for bit. A signal is heeded between two steps; a second one leaves at once.
"""
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from plumbing import show
from plumbing.exits import Stopped
from plumbing.files import finite_or_null, provenance, read_json, write_json, write_lines, write_whole
from plumbing.flags import Config, named
from plumbing.measure import peak_memory
from plumbing.processes import over_processes, processes
from teacher import Pair

LOGS = ("metrics.jsonl", "rollouts.jsonl", "cold_start_metrics.jsonl")
MAY_DIFFER = {"resume", "steps", "out", "lr", "cold_start_lr", "eval_every", "save_every", "micro_batch_tokens",
              "chunk", "in_flight", "gradient_checkpointing", "trust_remote_code", "device"}     # of a run that goes on
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Run:
    """with Run(cfg) as run: ... Inside, `run.step`, `run.cold_step` and `run.before` tell how far it has come."""

    def __init__(self, cfg):
        self.cfg, self.out, self.first = cfg, Path(cfg.out), processes()[0] == 0         # the first process writes
        self.path, self.started, self.got, self.saved = self.out / "checkpoint" / "state.pt", time.time(), None, None
        self.step, self.cold_step, self.skipped, self.in_a_row, self.seconds = 0, 0, 0, 0, 0.0
        self.before, self.logs, self.warned = {}, {name: [] for name in LOGS}, []
        self.look_at_out()

    def look_at_out(self):
        """ValueError where --out and --resume do not go together, before anything is loaded."""
        cfg, out = self.cfg, self.cfg.out
        had, done = (read_json(self.out / f"{name}.json") if (self.out / f"{name}.json").exists() else None
                     for name in ("config", "result"))
        if cfg.batch_size < processes()[1] or cfg.cold_start_batch_size < processes()[1]:
            raise ValueError(f"--batch-size {cfg.batch_size}, --cold-start-batch-size {cfg.cold_start_batch_size}: "
                             f"each of the {processes()[1]} processes needs a prompt")
        if done is not None and not (cfg.resume and cfg.steps > done.get("steps", 0)):
            raise ValueError(f"--out {out}: the run there is complete; take another --out, or --resume it with more "
                             "--steps")
        if had is not None and not {"student", "teacher"} <= had.keys():
            raise ValueError(f"--out {out}: its config.json is not that of a run; take another --out")
        if cfg.resume and had is None:
            raise ValueError(f"--out {out}: no run there to resume, no checkpoint; leave --resume out")
        if not self.path.exists() and (done is not None or (self.out / LOGS[0]).exists()):
            raise ValueError(f"--out {out}: the run there has lost its checkpoint; restore it, or take another --out")
        if self.path.exists() and not cfg.resume:
            raise ValueError(f"--out {out}: holds another run; add --resume to go on with it, or take another --out")
        if cfg.resume:
            self.same_run(had)

    def same_run(self, had):
        """ValueError where a run was begun with flags that decide its result, and they were other ones."""
        def same(a, b):                                                         # a path may be put another way
            return a == b or isinstance(a, str) and os.path.exists(a) and os.path.realpath(a) == os.path.realpath(b)
        for name, value in dataclasses.asdict(self.cfg).items():
            before = had.get(name, getattr(Config, name))                       # a flag that is new had its default
            if name not in MAY_DIFFER and not same(value, before):
                raise ValueError(f"--resume: the run in {self.out} had {named(name)} {before!r}; "
                                 "give the same flags, or take another --out")

    # --- its life --------------------------------------------------------------------------------------------------

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        self.out.mkdir(parents=True, exist_ok=True)
        if self.first:
            folder = os.open(self.out, os.O_RDONLY)                             # the lock goes with its holder
            self.stack.callback(os.close, folder)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.stack.close()
                raise ValueError(f"--out {self.out}: another process is at this run; wait for it, or take another "
                                 "--out") from None
            except OSError:
                pass                                                            # a file system without locks
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                before = signal.getsignal(signum)
                if signum != signal.SIGHUP or before != signal.SIG_IGN:         # nohup
                    self.stack.callback(signal.signal, signum, before)
                    signal.signal(signum, self.catch)
        return self

    def catch(self, signum, _):
        if self.got is not None and processes()[1] == 1:
            print(f"left at once; {self.left()}", file=sys.stderr, flush=True)
            os._exit(128 + signum)
        self.got = signum
        if self.first:
            print(f"stopping after this step; once more leaves at once ({self.left()})", file=sys.stderr, flush=True)

    def stop_if_asked(self):
        """Between two steps: save and leave where a signal came, to any of the processes."""
        got = torch.tensor(self.got or 0)
        if dist.is_initialized():
            got = over_processes(got.to("cuda" if dist.get_backend() == "nccl" else "cpu"), dist.ReduceOp.MAX)
        if got:
            if self.saved is not None and self.saved != (self.cold_step, self.step):
                self.save()
            raise Stopped(f"stopped after step {self.step} of {self.cfg.steps}; {self.left()}, the same command with "
                          "--resume goes on", int(got))

    def __exit__(self, kind, error, trace):
        self.stack.close()
        if isinstance(error, OSError) and error.errno is not None:              # of the system, no line of ours
            raise OSError(f"{error.filename or self.out}: {error.strerror}; {self.left()}; when that is mended, "
                          "--resume goes on") from None
        if isinstance(error, Exception):
            error.add_note(f"{self.left()}, --resume goes on")

    def left(self):
        """What is there to go on from, in words."""
        if self.saved is None:
            return "no checkpoint was made yet"
        cold, step = self.saved
        return f"the checkpoint of step {step} is whole" if step or not cold else (
            f"the checkpoint of step {cold} of the cold start is whole")

    def clock(self):
        return self.seconds + time.time() - self.started

    # --- the checkpoint --------------------------------------------------------------------------------------------

    def load_pair(self):
        """The two models as the flags say: -> teacher.Pair."""
        names = ("device dtype teacher_dtype teacher_device_map gradient_checkpointing trust_remote_code "
                 "micro_batch_tokens chunk in_flight").split()
        pair = Pair.load(self.cfg.student, self.cfg.teacher, **{name: getattr(self.cfg, name) for name in names})
        if self.cfg.k > pair.ending["vocab_size"]:
            raise ValueError(f"--k {self.cfg.k}: the two models share {pair.ending['vocab_size']} tokens; take a "
                             "smaller k")
        return pair

    def restore(self, pair, optimizer, train, cold):
        """Go on from the checkpoint, or begin. train, cold (and held_out): rows of Pair.encode."""
        self.pair, self.optimizer = pair, optimizer
        asked = [[row["ids"] for row in train], [[row["ids"] for row in cold], [
            (row["ids"], row["answer"]) for row in self.held_out]]]
        self.digests = [hashlib.sha256(repr(x).encode()).hexdigest() for x in asked]
        if self.path.exists():
            self.load()
        if self.first:
            (self.out / "result.json").unlink(missing_ok=True)
            for name in LOGS[:3 if self.cfg.cold_start or self.cfg.cold_start_file else 2]:
                if self.saved is not None:
                    write_lines(self.out / name, self.logs[name])
            write_json(self.out / "config.json", {**dataclasses.asdict(self.cfg), **provenance()})

    def load(self):
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            self.same_run(state["config"])
            weights, moments, step = state["student"], state["optimizer"], state["step"]
        except ValueError:
            raise
        except Exception as error:                                              # whatever torch makes of a broken file
            raise ValueError(f"--resume: {self.path} is not a whole checkpoint of opd.py ({type(error).__name__}); "
                             "restore it from a copy, or begin anew with another --out") from None
        if step > self.cfg.steps:
            raise ValueError(f"--steps {self.cfg.steps}: the run in {self.out} has come to step {step}; "
                             "ask for more, or take another --out")
        if state["digests"][1] != self.digests[1]:
            raise ValueError("--resume: the held-out prompts, or those of the cold start, are not those of the steps "
                             "before; give the files as they were (with an --eval, and no cold start, some can be left "
                             "out)")
        if state["digests"][0] != self.digests[0]:
            tqdm.write("warning: --resume: the prompts are not those of the steps before; the rest of the run takes "
                       "them as they are now")
        try:
            self.pair.student.load_state_dict(weights)
            self.optimizer.load_state_dict(moments)
        except (RuntimeError, ValueError, KeyError):
            raise ValueError(f"--resume: {self.path} does not fit the model in --student {self.cfg.student}; "
                             "give the one that it was begun with") from None
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.lr
        for name in ("step", "cold_step", "skipped", "before", "logs", "warned", "seconds"):
            setattr(self, name, state[name])
        self.saved = self.cold_step, self.step

    def save(self):
        """The checkpoint, written aside and renamed: whatever happens meanwhile leaves the last one whole.

        None is made of weights that are not finite, nor among skipped steps, which a run that goes on counts anew.
        """
        if self.in_a_row:
            return
        student = self.pair.student.state_dict()
        if not torch.stack([x.isfinite().all() for x in student.values()]).all():
            raise FloatingPointError(f"step {self.step}: the update has left weights that are not finite; "
                                     f"{self.left()}, --resume with a lower --lr")
        if self.first:
            self.path.parent.mkdir(exist_ok=True)
            state = {"config": dataclasses.asdict(self.cfg), "digests": self.digests, "student": student,
                     "optimizer": self.optimizer.state_dict(), "step": self.step, "cold_step": self.cold_step,
                     "skipped": self.skipped, "before": self.before, "logs": self.logs, "warned": self.warned,
                     "seconds": self.clock()}
            write_whole(self.path, lambda file: torch.save(state, file))
        self.saved = self.cold_step, self.step

    # --- the logs --------------------------------------------------------------------------------------------------

    def append(self, name, row):
        self.logs[name].append(row)
        if self.first:
            with open(self.out / name, "a") as file:
                print(json.dumps(row), file=file)

    def count(self, row, remedy):
        """Count a step without an update; the third in a row ends the run."""
        self.in_a_row = self.in_a_row + 1 if "skipped" in row else 0
        self.skipped += "skipped" in row
        if "skipped" in row:
            said = f"step {row['step']} skipped: {row['skipped']['why']}"
            named = row["skipped"].get("prompts") or [f"conversation {i}" for i in row["skipped"]["examples"]]
            said += f"; {', '.join(named[:8])}" + (f" and {len(named) - 8} more" if named[8:] else "")
            if self.in_a_row == 3:
                raise FloatingPointError(f"{said}, the third in a row; look at these; {self.left()}, --resume with a "
                                         f"lower {remedy}")
            tqdm.write(f"warning: {said}")

    def log(self, row, r):
        """After a step: its line in metrics.jsonl, now and then some texts and a readable line; the checkpoint."""
        self.step = row["step"]
        self.count(row, "--lr")
        row = finite_or_null({**row, "skipped_steps": self.skipped, "peak_memory_bytes": peak_memory(self.pair.device)})
        self.append("metrics.jsonl", row)
        if self.step % max(1, self.cfg.steps // 20) == 0 or self.step == 1:
            for ids, mask, cut in list(zip(r.ids, r.attention_mask, r.truncated))[:2]:
                self.append("rollouts.jsonl", {"step": self.step, "truncated": bool(cut),
                                               "text": self.pair.tokenizer.decode(ids[mask])})
            tqdm.write(show.columns() + "\n" + show.line(row) if self.step == 1 else show.line(row))
        for kind, sign in show.signs(self.logs["metrics.jsonl"], self.cfg.dtype).items():
            if sign and kind not in self.warned:
                self.warned.append(kind)
                tqdm.write(f"warning: step {self.step}: {sign}")
        if self.step % self.cfg.save_every == 0 or self.step == self.cfg.steps:
            self.save()
        self.stop_if_asked()

    def log_cold_start(self, row, last):
        self.cold_step = row["step"]
        self.count(row, "--cold-start-lr")
        self.append("cold_start_metrics.jsonl", finite_or_null(row))
        if self.cold_step % self.cfg.save_every == 0 or self.cold_step == last:
            self.save()
        self.stop_if_asked()

    def finish(self, result):
        """Save the student, and write result.json last: it stands for a complete run."""
        result = {**self.before, **result, "steps": self.step, "skipped_steps": self.skipped, "seconds": self.clock(),
                  **provenance()}
        if self.first:
            pair = self.pair
            pair.student.generation_config = transformers.GenerationConfig(     # an inherited one may not be savable
                eos_token_id=sorted(pair.ending["eos_ids"]) or None, bos_token_id=pair.tokenizer.bos_token_id,
                pad_token_id=pair.tokenizer.pad_token_id)
            try:
                pair.student.save_pretrained(self.out / "student")
                pair.tokenizer.save_pretrained(self.out / "student")
            except Exception as error:                                          # safetensors has one of its own
                raise OSError(f"{self.out}/student cannot be written: {error}; {self.left()}, --resume goes on") \
                    from error
            write_json(self.out / "result.json", result)
        return result
