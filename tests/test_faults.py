"""What can happen to a run: it is killed, stopped, out of disk, out of memory, or its numbers are not finite.

What is there stays whole, and with --resume the run ends as the one that nothing disturbed, bit for bit.
This file is also a program: `main` at its end kills a run many times, for a test.
"""
import contextlib
import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError

import analysis
import opd
import recipes
import rollout
import teacher
from conftest import WORDS, Killed, tiny
from test_opd import PROMPTS, config, rows, weights, world                                 # noqa: F401: a fixture

COLD = dict(cold_start=4, cold_start_steps=3, cold_start_batch_size=2, cold_start_max_new_tokens=40,
            cold_start_temperature=1.0)
CLOCK = ("seconds", "peak_memory_bytes", "command", "commit", "dirty", "earlier_starts", "resume")   # and time_...


def timeless(x):
    """A value of a JSON file without what a clock, the memory, or the command and state of the code decide."""
    if isinstance(x, dict):
        kept = [name for name in x if name not in CLOCK and not name.startswith("time_")]
        return {name: timeless(x[name]) for name in kept}
    return [timeless(value) for value in x] if isinstance(x, list) else x


def outcome(out):
    """All that a run left, to compare with another's: every step and sample in order, weights, results."""
    texts = {name: [timeless(json.loads(line)) for line in (out / name).read_text().splitlines()]
             for name in opd.LOGS if (out / name).exists()}
    state = torch.load(out / "checkpoint" / "state.pt", weights_only=True)
    moments = state["optimizer"]["state"].items()
    tensors = {**{f"student {name}": x for name, x in state["student"].items()},
               **{f"optimizer {i} {name}": x for i, part in moments for name, x in part.items()},
               **{f"saved {name}": x for name, x in weights(out).items()}}
    return (texts, timeless(json.loads((out / "result.json").read_text())), timeless(json.loads(
        (out / "config.json").read_text()) | {"out": ""}), {name: x.tolist() for name, x in tensors.items()})


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):                                                         # noqa: F811
    """What a run of five steps leaves that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    opd.Run(config(world, out, steps=5)).go()
    return outcome(out)


def stop(world, out, capfd, **change):                                                      # noqa: F811
    """The command, which ends with an exit code: -> code, what stood on stderr, progress bars left out."""
    cfg = config(world, out, **{"steps": 5, **change})
    named = {name: x for name, x in vars(cfg).items() if x not in (False, "") and x != getattr(opd.Config, name)}
    with pytest.raises(SystemExit) as end:
        opd.main([word for name, x in named.items() for word in
                  ["--" + name.replace("_", "-")] + ([] if x is True else [str(x)])])
    said = capfd.readouterr().err
    return end.value.code, said[said.index("opd.py: "):]


def resumed(world, out, **change):                                                          # noqa: F811
    opd.Run(config(world, out, **{"steps": 5, "resume": True, **change})).go()
    return outcome(out)


# --- killed --------------------------------------------------------------------------------------------------------


def test_a_run_killed_thirty_times_ends_as_one_that_was_not(world, tmp_path):               # noqa: F811
    """kill -9 while it starts, asks the teacher, fine-tunes, writes, learns, logs, saves, evaluates and ends, by place
    and by the clock: student, optimizer, every metric of every step, samples and result are the same, bit for bit.
    """
    done = subprocess.run([sys.executable, __file__, str(world), str(tmp_path)], capture_output=True, text=True,
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1",
                                            "PYTHONPATH": str(Path(opd.__file__).parent)})
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["never reached"] == [] and told["kills"] >= 30, told
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    leftovers = {path.name for path in (tmp_path / "killed").rglob("*.tmp")}
    assert not leftovers


@pytest.mark.slow
def test_the_command_killed_by_the_clock_ends_as_if_it_had_not_been(world, tmp_path):       # noqa: F811
    """The same for processes of their own, `python opd.py`, killed at twenty random moments from their start on."""
    draw, kills = random.Random(0), 0
    how = dict(steps=40, batch_size=8, n=4, max_new_tokens=40, eval_n=4, save_every=3)

    def command(out, *more):
        cfg = config(world, out, **how)
        named = {name: x for name, x in vars(cfg).items() if x not in (False, "") and x != getattr(opd.Config, name)}
        return subprocess.Popen([sys.executable, opd.__file__, *more, *(
            word for name, x in named.items() for word in ("--" + name.replace("_", "-"), str(x)))],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    started = time.perf_counter()
    undisturbed = command(tmp_path / "whole")
    assert undisturbed.communicate()[0] is None and undisturbed.returncode == 0
    duration = time.perf_counter() - started
    while kills < 20:
        process = command(tmp_path / "cut", *["--resume"] * (tmp_path / "cut" / "config.json").exists())
        try:
            said = process.communicate(timeout=draw.uniform(0.3, 1.2) * duration)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        if "the run there is complete" in said:                                       # then once more from the start
            assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
            shutil.rmtree(tmp_path / "cut")
            continue
        assert process.returncode == 0, said
    process = command(tmp_path / "cut", *["--resume"] * (tmp_path / "cut" / "config.json").exists())
    said = process.communicate()[1]
    assert process.returncode == 0 or "the run there is complete" in said, said
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


# --- stopped -------------------------------------------------------------------------------------------------------


def signals_at(monkeypatch, owner, name, call, signum=signal.SIGINT, after=False):
    """The call-th call of a function sends this process a signal, before or after it does its work."""
    plain, calls = getattr(owner, name), iter(range(1, 10 ** 6))

    def sends(*args, **kwargs):
        now = next(calls) == call
        if now and not after:
            os.kill(os.getpid(), signum)
        out = plain(*args, **kwargs)
        if now and after:
            os.kill(os.getpid(), signum)
        return out
    monkeypatch.setattr(owner, name, sends)


@pytest.mark.parametrize("owner, name, call, after, steps", [
    pytest.param(rollout.Flight, "advance", 30, False, None, id="in a rollout"),
    pytest.param(opd, "measure", 4, False, 2, id="in grading"),
    pytest.param(torch.optim.AdamW, "step", 3, False, 3, id="before the update"),
    pytest.param(torch.optim.AdamW, "step", 3, True, 3, id="after the update"),
    pytest.param(opd.Run, "log", 3, False, 3, id="before logging"),
    pytest.param(opd.Run, "log", 3, True, 3, id="after logging"),
    pytest.param(torch, "save", 2, False, 2, id="while saving"),
    pytest.param(opd.Run, "finish", 1, False, 5, id="at the end")])
def test_control_c_drops_or_finishes_the_step_saves_and_says_how_to_go_on(
        world, whole, tmp_path, capfd, monkeypatch, owner, name, call, after, steps):       # noqa: F811
    """Exit code 130, a checkpoint of the last whole step whatever --save-every says, and the same end."""
    with monkeypatch.context() as patch:
        signals_at(patch, owner, name, call, after=after)
        code, said = stop(world, tmp_path / "run", capfd, save_every=2)
    saved = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["step"]
    assert code == 130 and said == (f"opd.py: stopped after step {saved} of 5; the checkpoint of step {saved} is "
                                    f"whole, the "
                                    "same command with --resume goes on\n")
    assert abs(saved - len(rows(tmp_path / "run"))) < 2 and steps in (None, saved)
    assert not (tmp_path / "run" / "result.json").exists()
    assert resumed(world, tmp_path / "run", save_every=2)[1:] == whole[1:]


def test_a_finished_run_that_goes_on_is_not_complete_until_it_ends(world, tmp_path, capfd, monkeypatch):  # noqa: F811
    """result.json is there when, and only when, the run is complete."""
    opd.Run(config(world, tmp_path / "run", steps=2)).go()
    with monkeypatch.context() as patch:
        signals_at(patch, opd, "measure", 2)
        assert stop(world, tmp_path / "run", capfd, resume=True)[0] == 130
    assert not (tmp_path / "run" / "result.json").exists()
    opd.Run(config(world, tmp_path / "run", steps=5, resume=True)).go()
    assert (tmp_path / "run" / "result.json").exists()


def test_a_run_stopped_before_its_first_step_begins_again(world, whole, tmp_path, capfd, monkeypatch):  # noqa: F811
    """Nothing was learned yet, and nothing is there but what says which run it was to be."""
    with monkeypatch.context() as patch:
        signals_at(patch, opd.Run, "distance", 1)
        code, said = stop(world, tmp_path / "run", capfd)
    assert code == 130 and said.startswith("opd.py: stopped after step 0 of 5; no checkpoint was made yet, the same "
                                           "command")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
    assert resumed(world, tmp_path / "run") == whole


def test_control_c_in_a_cold_start_keeps_its_updates(world, tmp_path, capfd, monkeypatch):  # noqa: F811
    """An update and its count are not parted."""
    opd.Run(config(world, tmp_path / "whole", steps=2, **COLD)).go()
    for i, after in enumerate((False, True)):
        out = tmp_path / f"run-{i}"
        with monkeypatch.context() as patch:
            signals_at(patch, torch.optim.AdamW, "step", 2, after=after)
            code, said = stop(world, out, capfd, **COLD)
        state = torch.load(out / "checkpoint" / "state.pt", weights_only=True)
        assert code == 130 and state["cold_step"] == 2 == state["optimizer"]["state"][0]["step"]
        opd.Run(config(world, out, steps=2, resume=True, **COLD)).go()
        assert outcome(out) == outcome(tmp_path / "whole")


@pytest.mark.parametrize("update", [2, 3])
def test_a_cold_start_is_saved_between_its_checkpoints(world, tmp_path, capfd, monkeypatch, update):   # noqa: F811
    """Stopped in the midst of it, or in the evaluation that follows, with --save-every far away: nothing is lost."""
    opd.Run(config(world, tmp_path / "whole", steps=2, save_every=50, **COLD)).go()
    with monkeypatch.context() as patch:
        if update == 3:
            signals_at(patch, opd.Run, "accuracy", 3)
        else:
            signals_at(patch, torch.optim.AdamW, "step", 2)
        code, said = stop(world, tmp_path / "run", capfd, save_every=50, steps=2, **COLD)
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert code == 130 and state["cold_step"] == update == state["optimizer"]["state"][0]["step"]
    assert f"the checkpoint of step {update} of the cold start is whole" in said
    opd.Run(config(world, tmp_path / "run", steps=2, save_every=50, resume=True, **COLD)).go()
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("how", ["signal", "memory"])
def test_an_evaluation_within_the_run_can_be_stopped(world, tmp_path, capfd, monkeypatch, how):        # noqa: F811
    """It may take minutes: Ctrl-C does not wait for it, the update before it is saved, its line is written later."""
    change = dict(eval_every=2, save_every=50)
    opd.Run(config(world, tmp_path / "whole", steps=5, **change)).go()
    plain, calls = opd.Run.accuracy, []

    def accuracy(run, *args):
        calls.append(0)
        if len(calls) == 4 and how == "memory":                                             # before: 2, at step 2: 1
            patch.setattr(analysis, "accuracy", too_much)
        elif len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(run, *args)
    with monkeypatch.context() as patch:
        patch.setattr(opd.Run, "accuracy", accuracy)
        code, said = stop(world, tmp_path / "run", capfd, **change)
    assert code == (1 if how == "memory" else 130) and "the checkpoint of step 4 is whole" in said
    assert len(rows(tmp_path / "run")) == 3 and len(calls) == 4
    opd.Run(config(world, tmp_path / "run", steps=5, resume=True, **change)).go()
    ours, theirs = outcome(tmp_path / "run"), outcome(tmp_path / "whole")
    assert ours[0] == theirs[0] and ours[3] == theirs[3] and "accuracy" in ours[0]["metrics.jsonl"][3]


def test_a_terminal_that_is_gone_costs_nothing(world, whole, tmp_path, capfd, monkeypatch):  # noqa: F811
    """A pipe that is closed, an ssh session that ends: SIGHUP and a broken stdout are reasons to save."""
    def gone(*_, **__):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    with monkeypatch.context() as patch:
        plain = opd.Run.tell
        patch.setattr(opd.Run, "tell", lambda run, row: gone() if run.step == 3 else plain(run, row))
        code, said = stop(world, tmp_path / "pipe", capfd, save_every=2)
    assert code == 1 and said.startswith("opd.py: stdout: Broken pipe; the checkpoint of step 3 is whole")
    assert resumed(world, tmp_path / "pipe", save_every=2)[1:] == whole[1:]
    with monkeypatch.context() as patch:
        signals_at(patch, opd, "measure", 5, signal.SIGHUP)
        assert stop(world, tmp_path / "ssh", capfd)[0] == 129
    assert resumed(world, tmp_path / "ssh")[1:] == whole[1:]


def test_sigterm_does_as_control_c_does(world, whole, tmp_path, capfd, monkeypatch):        # noqa: F811
    """A scheduler that takes the machine back sends it; exit code 143."""
    with monkeypatch.context() as patch:
        signals_at(patch, opd, "measure", 5, signal.SIGTERM)
        code, said = stop(world, tmp_path / "run", capfd)
    assert code == 143 and said.startswith("opd.py: stopped after step 3 of 5")
    assert resumed(world, tmp_path / "run")[1:] == whole[1:]


def test_control_c_twice_leaves_at_once(world, tmp_path):                                   # noqa: F811
    """The second one does not wait for what the first one waits for; the checkpoint before is whole."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            sys.stderr = open(tmp_path / "said", "w")
            plain, calls = torch.optim.AdamW.step, []

            def twice(optimizer):
                calls.append(0)
                if len(calls) == 4:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.01)
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(30)
                return plain(optimizer)
            torch.optim.AdamW.step = twice
            opd.Run(config(world, tmp_path / "run", steps=5)).go()
        os._exit(0)
    started = time.perf_counter()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130 and time.perf_counter() - started < 20
    assert ("finishing what is being written; once more leaves at once\n"
            "left at once; the last checkpoint is whole\n") in (tmp_path / "said").read_text()
    assert torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["step"] == 2
    assert resumed(world, tmp_path / "run")[1]["steps"] == 5


def test_handlers_are_given_back(world, tmp_path, monkeypatch):                             # noqa: F811
    """A script that makes several runs has its own Ctrl-C between them."""
    before = [signal.getsignal(s) for s in opd.Signals.ALL]
    opd.Run(config(world, tmp_path / "run", steps=1)).go()
    monkeypatch.setattr(opd.Run, "update", lambda run: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        opd.Run(config(world, tmp_path / "cut", steps=1)).go()
    assert [signal.getsignal(s) for s in opd.Signals.ALL] == before
    with opd.Signals():
        assert all(signal.getsignal(s) not in before for s in opd.Signals.ALL)
    monkeypatch.setattr(signal, "getsignal", lambda s: signal.SIG_IGN)
    signals = opd.Signals()
    with signals:                                              # nohup is heeded; a job of a script can be told to stop
        assert set(signals.before) == {signal.SIGINT, signal.SIGTERM}
    monkeypatch.undo()
    assert [signal.getsignal(s) for s in opd.Signals.ALL] == before


def test_two_processes_do_not_write_one_run(world, tmp_path, monkeypatch):                  # noqa: F811
    """A run that seems dead and is not: the second is told, the first goes on; the lock ends with its holder."""
    other = opd.Run(config(world, tmp_path / "run", steps=2))
    plain = opd.Run.update

    def meanwhile(run):
        if run is not other and run.step == 1:
            with pytest.raises(ValueError, match="another process is at this run"):
                other.go()
        return plain(run)
    monkeypatch.setattr(opd.Run, "update", meanwhile)
    opd.Run(config(world, tmp_path / "run", steps=2)).go()
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]


# --- torn ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cut(world, tmp_path, monkeypatch):                                                      # noqa: F811
    """A run that was killed in its fourth step, after the checkpoint of the second."""
    plain = opd.Run.update

    def dies(run):
        if run.step == 3:
            raise Killed
        return plain(run)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(opd.Run, "update", dies)
        opd.Run(config(world, tmp_path / "run", steps=5)).go()
    return tmp_path / "run"


@pytest.mark.parametrize("tail", [b"", b"{", b'{"step": 4, "loss": 0.1', b'{"step": 4', b"\x00" * 50, b"\xff\xfe{\n",
                                  b"[]\n", b"4\n", b'{"step": "4"}\n', b"\n"])
def test_a_torn_last_line_is_cut_off_and_said(world, whole, cut, tail, capsys):             # noqa: F811
    """Whatever a kill or a crash of the machine left behind the last whole line."""
    with open(cut / "metrics.jsonl", "ab") as file:
        file.write(tail)
    assert resumed(world, cut) == whole
    said = capsys.readouterr().out
    assert "--resume: metrics.jsonl is cut back to the checkpoint, step 2, and goes on from there" in said
    assert ("its last line was torn" in said) == bool(tail)


def test_a_half_written_checkpoint_beside_the_whole_one_is_passed_over(world, whole, cut):  # noqa: F811
    """What stands aside was never the checkpoint."""
    (cut / "checkpoint" / "state.pt.tmp").write_bytes((cut / "checkpoint" / "state.pt").read_bytes()[:999])
    assert resumed(world, cut) == whole and not (cut / "checkpoint" / "state.pt.tmp").exists()


def test_a_checkpoint_of_other_prompts_goes_on_with_a_warning(world, tmp_path):             # noqa: F811
    """The one change that must be possible: to leave out a prompt that breaks the run. It is said. What was measured
    before on one set of held-out prompts is not held against what comes out on another.
    """
    given, held_out = tmp_path / "p.jsonl", tmp_path / "e.jsonl"
    given.write_text("\n".join(map(json.dumps, PROMPTS[:8])))
    held_out.write_text("\n".join(map(json.dumps, PROMPTS[8:])))
    for out, change in ((tmp_path / "with", dict(eval=str(held_out))), (tmp_path / "without", {})):
        given.write_text("\n".join(map(json.dumps, PROMPTS[:8])))
        opd.Run(config(world, out, prompts=str(given), steps=2, **change)).go()
        given.write_text("\n".join(map(json.dumps, PROMPTS[:4])))
        later = opd.Run(config(world, out, prompts=str(given), steps=4, resume=True, **change))
        with (pytest.warns(UserWarning, match="the prompts are not those of the steps before") if change
              else pytest.raises(ValueError, match="the held-out prompts, .* are not those of the steps before")):
            later.go()
    assert [row["step"] for row in rows(tmp_path / "with")] == [1, 2, 3, 4]
    assert (tmp_path / "without" / "result.json").exists()                                  # that of the two steps


def test_a_checkpoint_of_another_student_is_refused(world, cut, tmp_path):                  # noqa: F811
    """The directory has the same name and holds another model."""
    shutil.copytree(world / "student", tmp_path / "student")
    state = torch.load(cut / "checkpoint" / "state.pt", weights_only=True)
    state["student"] = tiny("llama", hidden=48, vocab_size=len(WORDS)).state_dict()
    torch.save(state, cut / "checkpoint" / "state.pt")
    with pytest.raises(ValueError, match="does not fit the model in --student"):
        resumed(world, cut)


def test_the_starts_of_a_run_are_all_on_record(world, cut):                                 # noqa: F811
    """config.json holds versions, commit, whether it was changed, and command of each start."""
    resumed(world, cut)
    made = json.loads((cut / "config.json").read_text())
    assert {"command", "commit", "dirty", "python", "torch", "transformers", "threads"} <= made.keys()
    assert [set(start) for start in made["earlier_starts"]] == [{"command", "commit", "dirty"}]


# --- out of disk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["full", "no permission", "in the way"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last(world, whole, cut, capfd, monkeypatch, what):  # noqa: F811
    """A disk that is full in the midst of it, a permission that was taken, a directory in the way: one line, exit code
    1, and the bytes of the checkpoint before.
    """
    before, aside = (cut / "checkpoint" / "state.pt").read_bytes(), cut / "checkpoint" / "state.pt.tmp"
    with monkeypatch.context() as patch:
        if what == "full":
            aside.symlink_to("/dev/full")
        elif what == "in the way":
            aside.mkdir()
        else:
            plain = os.replace
            patch.setattr(os, "replace", lambda a, b: plain(a, b) if "state" not in str(b) else (_ for _ in ()).throw(
                PermissionError(errno.EACCES, "Permission denied", str(a))))
        code, said = stop(world, cut, capfd, resume=True)
    reason = {"full": "No space left on device", "no permission": "Permission denied",
              "in the way": "Is a directory"}[what]
    assert code == 1 and said == (f"opd.py: {cut}/checkpoint/state.pt: {reason}; the checkpoint of step 2 is whole; "
                                  f"when that "
                                  "is mended, --resume goes on\n")
    assert (cut / "checkpoint" / "state.pt").read_bytes() == before and not (cut / "result.json").exists()
    if what == "in the way":
        aside.rmdir()
    assert not aside.exists() and resumed(world, cut) == whole


def test_a_log_that_cannot_be_written_leaves_the_last_checkpoint(world, whole, cut, capfd, monkeypatch):  # noqa: F811
    """The disk is full when a step is logged, and has room again for a checkpoint: the line is written later."""
    plain = opd.Run.log_file
    with monkeypatch.context() as patch:
        patch.setattr(opd.Run, "log_file", lambda run, name: (
            open("/dev/full", "a") if name == "metrics.jsonl" else plain(run, name)))
        code, said = stop(world, cut, capfd, resume=True)
    assert code == 1 and f"{cut}: No space left on device; the checkpoint of step 3 is whole" in said
    assert said.count("\n") == 1
    assert resumed(world, cut)[1:] == whole[1:] and [row["step"] for row in rows(cut)] == [1, 2, 3, 4, 5]


def test_a_result_that_cannot_be_written_is_not_there(world, whole, cut, capfd, monkeypatch):  # noqa: F811
    """result.json stands for a complete run: half of one is none."""
    (cut / "result.json.tmp").symlink_to("/dev/full")
    code, said = stop(world, cut, capfd, resume=True)
    assert code == 1 and "result.json: No space left on device; the checkpoint of step 5 is whole" in said
    assert not (cut / "result.json").exists() and resumed(world, cut) == whole


def test_a_student_that_cannot_be_written_is_one_line(world, whole, cut, capfd, monkeypatch):  # noqa: F811
    """safetensors has an exception of its own for a full disk."""
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        code, said = stop(world, cut, capfd, resume=True)
    assert code == 1 and said == (f"opd.py: {cut}/student cannot be written: I/O error: No space left on device (os "
                                  "error 28); the checkpoint of step 5 is whole, --resume goes on\n")
    assert not (cut / "result.json").exists() and resumed(world, cut) == whole


# --- not finite ----------------------------------------------------------------------------------------------------


def breaks(monkeypatch, at):
    """The teacher's states are NaN in the updates with these numbers, from 0."""
    plain, tried = opd.measure, []

    def measure(cfg, student, teacher, r, *, learn, **how):
        tried.extend([0] * learn)
        if learn and len(tried) - 1 in at:
            trunk = teacher.trunk
            teacher = teacher._replace(trunk=lambda ids, mask: trunk(ids, mask) * math.nan)
        return plain(cfg, student, teacher, r, learn=learn, **how)
    monkeypatch.setattr(opd, "measure", measure)


def test_a_step_that_is_not_finite_is_skipped_counted_and_named(world, tmp_path, capfd, monkeypatch):  # noqa: F811
    """Nothing is updated, no NaN or 0 stands for a number, metrics and a line name the prompts, and the run goes on."""
    breaks(monkeypatch, at=(1,))
    before, run = [], opd.Run(config(world, tmp_path / "run", steps=4, save_every=1))
    plain = run.update

    def watched():
        before.append([p.detach().clone() for p in run.pair.student.parameters()])
        return plain()
    run.update = watched
    result = run.go()
    logged = rows(tmp_path / "run")
    assert [("skipped" in row, row["skipped_steps"]) for row in logged] == [
        (False, 0), (True, 1), (False, 1), (False, 1)]
    assert all(torch.equal(a, b) for a, b in zip(before[1], before[2]))                     # the second step
    assert not all(torch.equal(a, b) for a, b in zip(before[2], before[3]))
    bad = logged[1]
    assert bad["loss"] is bad["reverse_kl"] is bad["grad_norm"] is None and bad["undefined"]["loss"] == "nan"
    chosen = opd.batch(range(len(run.prompts)), 1, 3, 0)
    assert sorted(bad["skipped"]["prompts"]) == sorted(run.prompt_names[i] for i in chosen)
    assert bad["skipped"]["why"] == "loss nan, gradient norm nan"
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    said = capfd.readouterr().out
    names = ", ".join(bad["skipped"]["prompts"])
    assert f"warning: step 2 skipped: loss nan, gradient norm nan; prompts {names}" in said
    assert result["skipped_steps"] == 1 and "skipped        1 steps" in opd.summary(result)


def test_only_the_prompts_whose_responses_break_are_named(world, tmp_path):                 # noqa: F811
    """Of a step's prompts the one is named at whose tokens the loss is not finite."""
    run = opd.Run(config(world, tmp_path / "run", micro_batch_tokens=1, n=1))
    plain, seen = run.pair.splits[1].trunk, []

    def trunk(ids, mask):
        seen.append(0)
        return plain(ids, mask) * (math.nan if len(seen) == 2 else 1)                       # the second row
    run.pair.splits = (run.pair.splits[0], run.pair.splits[1]._replace(trunk=trunk))
    _, row = run.update()
    assert len(row["skipped"]["prompts"]) == 1 and row["skipped"]["prompts"][0] in run.prompt_names


def test_an_infinite_gradient_of_a_finite_loss_is_no_update_either(world, tmp_path, monkeypatch):  # noqa: F811
    """The norm is what tells; all prompts of the step are named."""
    run = opd.Run(config(world, tmp_path / "run"))
    before = [p.detach().clone() for p in run.pair.student.parameters()]
    plain = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: plain(*args) * math.inf)
    _, row = run.update()
    assert row["grad_norm"] is None and math.isfinite(row["loss"]) and len(row["skipped"]["prompts"]) == 3
    assert all(torch.equal(a, b) for a, b in zip(before, run.pair.student.parameters()))
    assert all(p.grad is None for p in run.pair.student.parameters())


def test_three_in_a_row_end_the_run_before_anything_is_saved(world, tmp_path, capfd, monkeypatch):  # noqa: F811
    """Exit code 1, the reason, the prompts, the remedy; the checkpoint is from before the first of them, and --resume
    may lower the learning rate. Two in a row and one later do not end it.
    """
    with monkeypatch.context() as patch:
        breaks(patch, at=(0, 1, 3, 5, 6, 7))
        code, said = stop(world, tmp_path / "run", capfd, steps=9, save_every=1)
    assert code == 1 and said.startswith("opd.py: step 8, the third without an update in a row: loss nan, gradient "
                                         "norm nan; "
                                         "prompts prompts.jsonl:") and "--resume with a lower --lr" in said
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == 5 and all(x.isfinite().all() for x in state["student"].values())
    assert not (tmp_path / "run" / "result.json").exists()
    opd.Run(config(world, tmp_path / "run", steps=9, save_every=1, resume=True, lr=1e-4)).go()
    logged = rows(tmp_path / "run")
    assert [row["step"] for row in logged] == list(range(1, 10)) and logged[-1]["skipped_steps"] == 3
    assert [row["lr"] for row in logged] == [1e-3] * 5 + [1e-4] * 4


def test_weights_that_an_update_broke_are_never_a_checkpoint(world, tmp_path, monkeypatch):  # noqa: F811
    """A checkpoint that could only go on to NaN would be worse than none."""
    plain = torch.optim.AdamW.step

    def step(optimizer):
        plain(optimizer)
        if optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 3:
            optimizer.param_groups[0]["params"][0].data[0] = math.inf
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(FloatingPointError, match="step 3: the update has left weights that are not finite"):
        opd.Run(config(world, tmp_path / "run", steps=4, save_every=1)).go()
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == 2 and all(x.isfinite().all() for x in state["student"].values())


def test_held_out_prompts_that_break_end_the_run_with_a_line(world, tmp_path):              # noqa: F811
    """Without a gradient to give it away, too: no evaluation of NaN passes for a number."""
    run = opd.Run(config(world, tmp_path / "run"))
    run.pair.teacher.get_output_embeddings().weight[3] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        run.distance()


# --- out of memory -------------------------------------------------------------------------------------------------


def too_much(*_, **__):
    """More than any machine has: the CPU's own error."""
    torch.empty(2 ** 48, dtype=torch.uint8)


def gpu_is_full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("fails", [too_much, gpu_is_full])
@pytest.mark.parametrize("owner, name, says", [
    (opd, "grade", "out of memory while updating: lower --micro-batch-tokens (now 30) or --chunk (now automatic), add "
                   "--gradient-checkpointing, or begin anew with a lower --max-new-tokens (now 6); the checkpoint of "
                   "step 3 is whole"),
    (rollout, "draw", "out of memory while writing responses: lower --in-flight (now 6), or begin anew with a lower "
                      "--max-new-tokens (now 6); the checkpoint of step 3 is whole")])
def test_out_of_memory_says_which_flag_to_turn(world, whole, tmp_path, capfd, monkeypatch, owner, name, says,
                                               fails):                                      # noqa: F811
    """One line in place of a traceback, exit code 1; the steps so far are saved, and go on with less."""
    plain = opd.Run.update

    def update(run):
        if run.step == 3:
            patch.setattr(owner, name, fails)
        return plain(run)
    with monkeypatch.context() as patch:
        patch.setattr(opd.Run, "update", update)
        code, said = stop(world, tmp_path / "run", capfd, micro_batch_tokens=30, save_every=4)
    assert code == 1 and said == f"opd.py: {says}, --resume goes on\n"
    texts, *rest = resumed(world, tmp_path / "run", micro_batch_tokens=10 ** 6)
    assert [row["step"] for row in texts["metrics.jsonl"]] == [1, 2, 3, 4, 5]


def test_out_of_memory_at_the_models_says_what_to_take(world, tmp_path, capfd, monkeypatch):  # noqa: F811
    """Before the first step there is no checkpoint to speak of."""
    monkeypatch.setattr(opd.Pair, "load", too_much)
    code, said = stop(world, tmp_path / "run", capfd)
    assert code == 1 and said.startswith("opd.py: out of memory while loading the models: take smaller ones") \
        and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_another_error_stays_what_it_is(world, tmp_path, monkeypatch):                      # noqa: F811
    """A fault of the program is no lack of memory: it keeps its traceback, and the steps so far are saved."""
    plain = opd.Run.update

    def update(run):
        if run.step == 3:
            raise RuntimeError("a fault of ours")
        return plain(run)
    monkeypatch.setattr(opd.Run, "update", update)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        opd.main(["--student", f"{world}/student", "--teacher", f"{world}/teacher", "--prompts",
                  f"{world}/prompts.jsonl", "--out", str(tmp_path / "run"), "--k", "4", "--max-new-tokens", "6",
                  "--batch-size", "3"])
    assert torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["step"] == 3


def test_a_teacher_that_finishes_nothing_is_told_of_with_the_flag(world, tmp_path, monkeypatch):  # noqa: F811
    """An empty cold start is no cold start; the answers that were cut off can be read beside it."""
    monkeypatch.setattr(opd, "teacher_rollouts", lambda *_, **__: {"kept": 0, "unfinished": 3, "degenerate": 1})
    with pytest.raises(ValueError, match="--cold-start 4: the teacher finished no response within 40 tokens .*higher "
                                         "--cold-start-max-new-tokens"):
        opd.Run(config(world, tmp_path / "run", **COLD)).go()


def test_a_model_of_four_tokens_is_a_model(tmp_path):
    """The checks at load take ids that it has."""
    tiny("llama", vocab_size=4).save_pretrained(tmp_path)
    assert teacher.load(tmp_path).config.vocab_size == 4


# --- the same twice, and nothing made up ---------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_files(world, whole, tmp_path):                        # noqa: F811
    """On one machine with as many threads: every metric of every step, to the last bit; another seed gives others."""
    opd.Run(config(world, tmp_path / "again", steps=5)).go()
    assert outcome(tmp_path / "again") == whole
    opd.Run(config(world, tmp_path / "other", steps=5, seed=1)).go()
    assert outcome(tmp_path / "other")[0] != whole[0]


def test_the_chunk_changes_memory_and_not_the_run(world, tmp_path):                         # noqa: F811
    """--chunk 1 has the logits of one position at a time."""
    found = []
    for chunk in (0, 1):
        opd.Run(config(world, tmp_path / str(chunk), steps=2, chunk=chunk)).go()
        found.append(rows(tmp_path / str(chunk)))
    for a, b in zip(*found):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_what_cannot_be_computed_is_null_with_its_reason(world, tmp_path):                  # noqa: F811
    """Never 0: no answers, no gap, a single prompt, no shared token."""
    bare = opd.Run(config(world, tmp_path / "bare", prompts=f"{world}/bare.jsonl", steps=2, eval_every=1)).go()
    assert bare["accuracy_before"] is bare["gap_recovery"] is None
    assert bare["undefined"] == dict.fromkeys(("accuracy_teacher", "accuracy_before", "accuracy_after", "gap_recovery"),
                                              "no held-out prompt has an answer")
    assert rows(tmp_path / "bare")[0]["accuracy"] is None
    assert rows(tmp_path / "bare")[0]["undefined"] == {"accuracy": "no held-out prompt has an answer"}
    same = opd.Run(config(world, tmp_path / "same", teacher=f"{world}/student", steps=1)).go()
    assert same["gap_recovery"] is None and same["undefined"]["gap_recovery"] == opd.WITHIN_NOISE
    assert "not given: teacher and student are within noise" in opd.summary(same)
    (tmp_path / "one.jsonl").write_text(json.dumps(PROMPTS[0]))
    one = opd.Run(config(world, tmp_path / "one", eval=str(tmp_path / "one.jsonl"), steps=1)).go()
    assert one["accuracy_after"]["standard_error"] is one["gap_recovery"] is None
    assert one["undefined"]["standard_error"] == "one held-out prompt has no spread" and "+- ?" in opd.summary(one)


def test_a_reward_that_is_not_finite_is_null_and_no_reason_to_stop(world, tmp_path):        # noqa: F811
    """trl#5594: a teacher that rules the sampled token out: losses stay finite, the reward is -inf and said to be."""
    run = opd.Run(config(world, tmp_path / "run", objective="full", steps=12))              # 10: signs of collapse
    head = run.pair.splits[1].head

    class Rules(type(head)):
        def __call__(self, h):
            return super().__call__(h).index_fill(-1, torch.arange(4, 12), -math.inf)
    run.pair.splits = (run.pair.splits[0], run.pair.splits[1]._replace(head=Rules(head.linear, head.rows)))
    run.go()
    for row in rows(tmp_path / "run"):
        assert row["reward"] is None and row["undefined"]["reward"] == "-inf" and "skipped" not in row
        assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])


def test_a_number_that_is_not_finite_becomes_null_and_keeps_its_name():
    """Every other value stays, reasons that are there too; a row of finite numbers is the row itself."""
    good = {"loss": 0.5, "tokens": 3, "by_position": [None], "why": "nan"}
    assert analysis.finite_or_null(good) is good
    assert analysis.finite_or_null({**good, "loss": math.nan, "reward": -math.inf, "undefined": {"x": "none"}}) == {
        **good, "loss": None, "reward": None, "undefined": {"x": "none", "loss": "nan", "reward": "-inf"}}


def test_a_mean_without_an_error_does_not_look_like_a_sure_one():
    """What one prompt says has no standard error, and 0 would be the surest of all."""
    assert analysis.plus_minus({"mean": 0.5, "standard_error": 0.25}) == "0.500 +- 0.250"
    assert analysis.plus_minus({"mean": 0.5, "standard_error": None}) == "0.500 +- ?"
    assert analysis.plus_minus({"mean": 0.5, "standard_error": 0.25}, "+9.2f") == "    +0.50 +- 0.25"
    known, unknown = {"mean": 0.9, "standard_error": 0.0}, {"mean": 0.1, "standard_error": None}
    assert analysis.gap_recovery(unknown, known, known) is analysis.gap_recovery(known, known, unknown) is None
    assert analysis.gap_recovery({**unknown, "standard_error": 0.0}, known, known) == 1


def test_a_diagnosis_says_why_a_value_is_null(world):                                       # noqa: F811
    """One prompt has no spread, responses that are all wrong no AUROC, models that share nothing no advantage."""
    pair = opd.Pair.load(f"{world}/student", f"{world}/teacher", device="cpu")
    rows = pair.encode([{"prompt": "add 3", "answer": "none says this"}], max_prompt_tokens=9, new_tokens=5)
    with torch.no_grad():
        pair.teacher.get_output_embeddings().weight.neg_()
    report = analysis.diagnose_pair(pair, rows, k=1, n=2, max_new_tokens=5, finishes=1)
    assert report["auroc"] is report["predicted_gain"]["standard_error"] is None
    assert report["undefined"]["auroc"] == "the responses are all right, or all wrong"
    assert report["undefined"]["standard_error"] == "one prompt has no spread"
    shared = report["metrics"]["overlap_token_advantage"]["mean"] is not None
    assert ("overlap_token_advantage" in report["undefined"]) != shared


def test_the_commit_and_whether_it_was_changed_are_told(tmp_path, monkeypatch):
    """Null where the code is in no repository; what git does not track changes nothing."""
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *words], check=True,
                       capture_output=True)
    monkeypatch.setattr(analysis, "__file__", str(tmp_path / "analysis.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert analysis.provenance()["commit"] is analysis.provenance()["dirty"] is None
    (tmp_path / "analysis.py").write_text("one")
    git("init"), git("add", "."), git("commit", "-m", "one")
    (tmp_path / "notes").write_text("mine")
    made = analysis.provenance()
    assert len(made["commit"]) == 12 and made["dirty"] is False and made["torch"] == torch.__version__
    (tmp_path / "analysis.py").write_text("two")
    assert analysis.provenance()["commit"] == made["commit"] and analysis.provenance()["dirty"] is True
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert analysis.provenance()["commit"] is analysis.provenance()["dirty"] is None


@pytest.mark.parametrize("error, code, said", [
    (ValueError("no\n  such"), 2, "x.py: no such\n"),
    (OSError(28, "No space", "a"), 1, "x.py: [Errno 28] No space: 'a'\n"),
    (FloatingPointError("nan"), 1, "x.py: nan\n"), (KeyboardInterrupt(), 130, "x.py: stopped\n"),
    (opd.Stopped("saved", signal.SIGTERM), 143, "x.py: saved\n"), (opd.Stopped("saved", None), 130, "x.py: saved\n"),
    (opd.NoMemory("lower it"), 1, "x.py: lower it\n"),
    (torch.OutOfMemoryError("CUDA"), 1, "x.py: out of memory; take smaller models, or --dtype bfloat16 (CUDA)\n"),
    (MemoryError(), 1, "x.py: out of memory; take smaller models, or --dtype bfloat16\n")])
def test_each_end_has_its_exit_code_and_line(error, code, said, capsys):
    """2: cannot work; 1: came to an end on its way; 128 + the signal."""
    with pytest.raises(SystemExit) as stop, analysis.one_line("x.py"):
        raise error
    assert stop.value.code == code and capsys.readouterr().err == said


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """Whatever stops the writing, what was there is there, and nothing beside it."""
    path = tmp_path / "a.json"
    analysis.write_json(path, {"a": 1})

    def breaks(file):
        file.write(b"half")
        raise Killed
    with pytest.raises(Killed):
        analysis.write_whole(path, breaks)
    assert analysis.read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="No such file") as error:
        analysis.write_whole(tmp_path / "none" / "a", breaks)
    assert error.value.filename == str(tmp_path / "none" / "a")
    for text in ("{", "[]", "\xff", "[" * 10 ** 5):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="a.json is not .*restore or remove it"):
            analysis.read_json(path)


# --- a run that is killed many times ------------------------------------------------------------------------------


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner, name, call=1, after=False, when=lambda *_, **__: True):
    """A bomb: this process dies at the call-th call of a function that fits."""
    def arm():
        plain, left = getattr(owner, name), [call]

        def dies(*args, **kwargs):
            left[0] -= bool(when(*args, **kwargs))
            if left[0] == 0 and not after:
                kill()
            out = plain(*args, **kwargs)
            if left[0] == 0:
                kill()
            return out
        setattr(owner, name, dies)
    return arm


def half_a_file(name, share=0.5):
    """A bomb: of the next file of this name only a share of the bytes gets to the disk."""
    def arm():
        plain = analysis.write_whole

        def half(path, write):
            if Path(path).name != name:
                return plain(path, write)

            def torn(file):
                write(file)
                file.flush()
                file.truncate(int(file.tell() * share))
                kill()
            plain(path, torn)
        analysis.write_whole = half
    return arm


def half_a_line(step):
    """A bomb: half of the line of this many steps from now stands in metrics.jsonl."""
    def arm():
        plain, left = opd.Run.log, [step]

        def log(run, row, samples, metrics, texts):
            left[0] -= 1
            if left[0]:
                return plain(run, row, samples, metrics, texts)
            line = json.dumps(row)
            metrics.write(line[:len(line) // 2])
            metrics.flush()
            kill()
        opd.Run.log = log
    return arm


def bombs(draw):
    """Where a run dies, in the order in which a run comes to these places."""
    def replaced(name):
        return lambda a, b: Path(b).name == name
    early = [at_call(opd.Pair, "load"), at_call(opd.Pair, "load", after=True), half_a_file("config.json"),
             at_call(os, "replace", when=replaced("config.json"), after=True), at_call(opd.Run, "accuracy", 1),
             at_call(opd.Run, "accuracy", 2, after=True), half_a_file("state.pt"),
             at_call(os, "replace", when=replaced("state.pt"), after=True), at_call(recipes, "rollout", 1, after=True),
             at_call(recipes, "is_degenerate", 2), at_call(torch.optim.AdamW, "step", 2),
             at_call(opd.Run, "accuracy", 1)]
    middle = [at_call(rollout.Flight, "advance", draw.randint(5, 9)),
              at_call(torch.Tensor, "backward", draw.randint(3, 6)),
              at_call(torch.optim.AdamW, "step", 2), at_call(torch.optim.AdamW, "step", 3, after=True), half_a_line(3),
              at_call(opd.Run, "log", 3), at_call(opd.Run, "log", 3, after=True),
              at_call(analysis, "write_whole", when=lambda path, _: Path(path).name == "metrics.jsonl"),
              half_a_file("metrics.jsonl"), half_a_file("state.pt", 0.01), half_a_file("state.pt", 1),
              at_call(os, "replace", when=replaced("state.pt")),
              at_call(os, "replace", when=replaced("state.pt"), after=True)]
    draw.shuffle(middle)
    clock = [(steps, draw.uniform(0, 0.1)) for steps in (0, 1, 0, 2, 0, 1, 2, 1)]
    late = [at_call(opd.Run, "finish"), at_call(opd.Run, "distance", 1, after=True),
            at_call(opd.analysis, "write_json", when=lambda path, _: Path(path).name == "result.json"),
            half_a_file("result.json")]
    return early + middle[:7] + clock + middle[7:] + late


def main(world, folder):
    """A run of sixty steps that nothing disturbs, and one that is killed at every bomb; one import for all of them."""
    torch.set_num_threads(1)
    draw, folder = random.Random(0), Path(folder)
    opd.tqdm.write = lambda *_: None

    def start(out, bomb=None):
        """-> the exit code of a process of its own, -9 where it was killed."""
        child = os.fork()
        if not child:
            code = 1
            with contextlib.suppress(SystemExit):
                if callable(bomb):
                    bomb()
                sys.argv = ["opd.py"]
                opd.Run(config(world, out, steps=60, save_every=2, eval_every=16, resume=(out / "config.json").exists(),
                               **COLD)).go()
                code = 0
            os._exit(code)
        if isinstance(bomb, tuple):                                     # so many more steps, and then by the clock
            had = (out / "metrics.jsonl").read_bytes().count(b"\n")
            while (out / "metrics.jsonl").read_bytes().count(b"\n") < had + bomb[0]:
                time.sleep(0.001)
            time.sleep(bomb[1])
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert start(folder / "whole") == 0
    kills, never = 0, []
    for i, bomb in enumerate(bombs(draw)):
        code = start(folder / "killed", bomb)
        kills += code == -signal.SIGKILL
        if code != -signal.SIGKILL:
            never.append(i)
            if (folder / "killed" / "result.json").exists():
                break
    if not (folder / "killed" / "result.json").exists():
        assert start(folder / "killed") == 0
    print(json.dumps({"kills": kills, "never reached": never}))


if __name__ == "__main__":
    main(*sys.argv[1:])
