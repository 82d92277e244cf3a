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
from conftest import WORDS, Killed, tiny
from safetensors import SafetensorError
from test_opd import PROMPTS, config, ready, rows, weights  # noqa: F401: a fixture

import analysis
import opd
import recipes
import rollout
import teacher
from plumbing import exits, files, measure, models, processes, prompts, run, show, slots
from plumbing.run import LOGS, Run

COLD = dict(
    cold_start=4,
    cold_start_steps=3,
    cold_start_batch_size=2,
    cold_start_max_new_tokens=40,
    cold_start_temperature=1.0,
)
CLOCK = ("seconds", "peak_memory_bytes", "command", "commit", "dirty", "resume")  # and time_...


@pytest.fixture(autouse=True)
def a_terminal():
    """These tests as a terminal starts them, under nohup too, which ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def timeless(x):
    """A value of a JSON file without what a clock, the memory, or the command and state of the code decide."""
    if isinstance(x, dict):
        kept = [name for name in x if name not in CLOCK and not name.startswith("time_")]
        return {name: timeless(x[name]) for name in kept}
    return [timeless(value) for value in x] if isinstance(x, list) else x


def outcome(out):
    """All that a run left, to compare with another's: every step and sample in order, weights, results."""
    texts = {
        name: [timeless(json.loads(line)) for line in (out / name).read_text().splitlines()]
        for name in LOGS
        if (out / name).exists()
    }
    state = torch.load(out / "checkpoint" / "state.pt", weights_only=True)
    moments = state["optimizer"]["state"].items()
    tensors = {
        **{f"student {name}": x for name, x in state["student"].items()},
        **{f"optimizer {i} {name}": x for i, part in moments for name, x in part.items()},
        **{f"saved {name}": x for name, x in weights(out).items()},
    }
    return (
        texts,
        timeless(json.loads((out / "result.json").read_text())),
        timeless(json.loads((out / "config.json").read_text()) | {"out": ""}),
        {name: x.tolist() for name, x in tensors.items()},
    )


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):  # noqa: F811
    """What a run of five steps leaves that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    opd.distil(config(world, out, steps=5))
    return outcome(out)


def stop(world, out, capfd, **change):  # noqa: F811
    """The command, which ends with an exit code: -> code, what stood on stderr, progress bars left out."""
    cfg = config(world, out, **{"steps": 5, **change})
    named = {
        name: x
        for name, x in vars(cfg).items()
        if x not in (False, "") and x != getattr(opd.Config, name)
    }
    with pytest.raises(SystemExit) as end:
        opd.main(
            [
                word
                for name, x in named.items()
                for word in ["--" + name.replace("_", "-")] + ([] if x is True else [str(x)])
            ]
        )
    said = capfd.readouterr().err
    return end.value.code, said[said.index("opd.py: ") :]


def resumed(world, out, **change):  # noqa: F811
    opd.distil(config(world, out, **{"steps": 5, "resume": True, **change}))
    return outcome(out)


# --- killed --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how, times", [("by place", 30), ("by clock", 20)])
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(world, tmp_path, how, times):  # noqa: F811
    """kill -9 while it starts, asks the teacher, fine-tunes, writes, learns, logs, saves, evaluates and ends, and at
    random moments: student, optimizer, every metric of every step, samples and result are the same, bit for bit.
    """
    done = subprocess.run(
        [sys.executable, __file__, str(world), str(tmp_path), how],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(opd.__file__).parent)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["never reached"] == [] and told["kills"] >= times, told
    for killed in tmp_path.glob("killed*"):
        assert outcome(killed) == outcome(tmp_path / "whole")
    assert not list(tmp_path.glob("killed*/**/*.tmp"))


# --- stopped -------------------------------------------------------------------------------------------------------


def signals_at(monkeypatch, owner, name, call, signum=signal.SIGINT, after=False):
    """The call-th call of a function sends this process a signal, before or after it does its work."""
    plain, calls = getattr(owner, name), iter(range(1, 10**6))

    def sends(*args, **kwargs):
        now = next(calls) == call
        if now and not after:
            os.kill(os.getpid(), signum)
        out = plain(*args, **kwargs)
        if now and after:
            os.kill(os.getpid(), signum)
        return out

    monkeypatch.setattr(owner, name, sends)


@pytest.mark.parametrize(
    "owner, name, call, after, steps",
    [
        pytest.param(slots.Slots, "feed", 30, False, None, id="in a rollout"),
        pytest.param(teacher.Pair, "grade", 4, False, 3, id="in grading"),
        pytest.param(
            torch.optim.AdamW, "step", 3, False, 3, id="before the update", marks=pytest.mark.slow
        ),
        pytest.param(torch.optim.AdamW, "step", 3, True, 3, id="after the update"),
        pytest.param(Run, "append", 3, False, None, id="before logging", marks=pytest.mark.slow),
        pytest.param(Run, "append", 3, True, None, id="after logging", marks=pytest.mark.slow),
        pytest.param(torch, "save", 2, False, 2, id="while saving"),
    ],
)
def test_control_c_finishes_the_step_saves_and_says_how_to_go_on(
    world, whole, tmp_path, capfd, monkeypatch, owner, name, call, after, steps
):  # noqa: F811
    """Exit code 130, a checkpoint of the last whole step whatever --save-every says, and the same end."""
    with monkeypatch.context() as patch:
        signals_at(patch, owner, name, call, after=after)
        code, said = stop(world, tmp_path / "run", capfd, save_every=2)
    saved = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["step"]
    assert code == 130 and said == (
        f"opd.py: stopped after step {saved} of 5; the checkpoint of step {saved} is "
        "whole, the same command with --resume goes on\n"
    )
    assert saved == len(rows(tmp_path / "run")) and steps in (None, saved)
    assert not (tmp_path / "run" / "result.json").exists()
    assert resumed(world, tmp_path / "run", save_every=2)[1:] == whole[1:]


def test_a_finished_run_that_goes_on_is_not_complete_until_it_ends(
    world, tmp_path, capfd, monkeypatch
):  # noqa: F811
    """result.json is there when, and only when, the run is complete."""
    opd.distil(config(world, tmp_path / "run", steps=2))
    with monkeypatch.context() as patch:
        signals_at(patch, opd, "update", 1)
        assert stop(world, tmp_path / "run", capfd, resume=True)[0] == 130
    assert not (tmp_path / "run" / "result.json").exists()
    opd.distil(config(world, tmp_path / "run", steps=5, resume=True))
    assert (tmp_path / "run" / "result.json").exists()


def test_a_run_stopped_before_its_first_step_keeps_what_was_measured(
    world,
    whole,
    tmp_path,
    capfd,  # noqa: F811
    monkeypatch,
):
    """Nothing was learned yet; both models have been measured, and that is kept."""
    with monkeypatch.context() as patch:
        signals_at(patch, measure, "distance", 1)
        code, said = stop(world, tmp_path / "run", capfd)
    assert code == 130 and said.startswith(
        "opd.py: stopped after step 0 of 5; the checkpoint of step 0 is whole"
    )
    assert resumed(world, tmp_path / "run") == whole


def test_control_c_in_a_cold_start_keeps_its_updates(world, tmp_path, capfd, monkeypatch):  # noqa: F811
    """An update and its count are not parted."""
    opd.distil(config(world, tmp_path / "whole", steps=2, **COLD))
    for i, after in enumerate((False, True)):
        out = tmp_path / f"run-{i}"
        with monkeypatch.context() as patch:
            signals_at(patch, torch.optim.AdamW, "step", 2, after=after)
            code, said = stop(world, out, capfd, **COLD)
        state = torch.load(out / "checkpoint" / "state.pt", weights_only=True)
        assert code == 130 and state["cold_step"] == 2 == state["optimizer"]["state"][0]["step"]
        opd.distil(config(world, out, steps=2, resume=True, **COLD))
        assert outcome(out) == outcome(tmp_path / "whole")


@pytest.mark.parametrize("update", [2, 3])
def test_a_cold_start_is_saved_between_its_checkpoints(world, tmp_path, capfd, monkeypatch, update):  # noqa: F811
    """Stopped in the midst of it, or at its last update, with --save-every far away: nothing is lost."""
    opd.distil(config(world, tmp_path / "whole", steps=2, save_every=50, **COLD))
    with monkeypatch.context() as patch:
        signals_at(patch, torch.optim.AdamW, "step", update)
        code, said = stop(world, tmp_path / "run", capfd, save_every=50, steps=2, **COLD)
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert code == 130 and state["cold_step"] == update == state["optimizer"]["state"][0]["step"]
    assert f"the checkpoint of step {update} of the cold start is whole" in said
    opd.distil(config(world, tmp_path / "run", steps=2, save_every=50, resume=True, **COLD))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_terminal_that_is_gone_costs_nothing(world, whole, tmp_path, capfd, monkeypatch):  # noqa: F811
    """A pipe that is closed, an ssh session that ends: a run goes on from its checkpoint."""

    def gone(*_, **__):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with monkeypatch.context() as patch:
        plain = show.line
        patch.setattr(show, "line", lambda row: gone() if row["step"] == 3 else plain(row))
        code, said = stop(world, tmp_path / "pipe", capfd, save_every=2)
    assert (
        code == 1
        and "Broken pipe; the checkpoint of step 2 is whole" in said
        and said.count("\n") == 1
    )
    assert resumed(world, tmp_path / "pipe", save_every=2)[1:] == whole[1:]
    with monkeypatch.context() as patch:
        signals_at(patch, opd, "update", 3, signal.SIGHUP)
        assert stop(world, tmp_path / "ssh", capfd)[0] == 129
    assert resumed(world, tmp_path / "ssh")[1:] == whole[1:]


def test_sigterm_does_as_control_c_does(world, whole, tmp_path, capfd, monkeypatch):  # noqa: F811
    """A scheduler that takes the machine back sends it; exit code 143."""
    with monkeypatch.context() as patch:
        signals_at(patch, opd, "update", 3, signal.SIGTERM)
        code, said = stop(world, tmp_path / "run", capfd)
    assert code == 143 and said.startswith("opd.py: stopped after step 3 of 5")
    assert resumed(world, tmp_path / "run")[1:] == whole[1:]


def test_control_c_twice_leaves_at_once(world, tmp_path):  # noqa: F811
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
            opd.distil(config(world, tmp_path / "run", steps=5))
        os._exit(0)
    started = time.perf_counter()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130 and time.perf_counter() - started < 20
    assert (
        "stopping after this step; once more leaves at once (the checkpoint of step 2 is whole)\n"
        "left at once; the checkpoint of step 2 is whole\n"
    ) in (tmp_path / "said").read_text()
    assert torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["step"] == 2
    assert resumed(world, tmp_path / "run")[1]["steps"] == 5


def test_handlers_are_given_back(world, tmp_path, monkeypatch):  # noqa: F811
    """A script that makes several runs has its own Ctrl-C between them; nohup is heeded."""
    before = [signal.getsignal(s) for s in run.SIGNALS]
    opd.distil(config(world, tmp_path / "run", steps=1))
    monkeypatch.setattr(opd, "update", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        opd.distil(config(world, tmp_path / "cut", steps=1))
    assert [signal.getsignal(s) for s in run.SIGNALS] == before
    with Run(config(world, tmp_path / "other")):
        assert all(signal.getsignal(s) not in before for s in run.SIGNALS)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Run(
        config(world, tmp_path / "nohup")
    ):  # a job of a script can be told to stop all the same
        assert (
            signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            and signal.getsignal(signal.SIGINT) != before[0]
        )
    signal.signal(signal.SIGHUP, before[2])
    assert [signal.getsignal(s) for s in run.SIGNALS] == before


def test_two_processes_do_not_write_one_run(world, tmp_path, monkeypatch):  # noqa: F811
    """A run that seems dead and is not: the second is told, the first goes on; the lock ends with its holder."""
    other, plain, told = Run(config(world, tmp_path / "run", steps=2)), opd.update, []

    def meanwhile(*args):
        with pytest.raises(ValueError, match="another process is at it; wait for it"):
            other.__enter__()
        told.append(True)
        return plain(*args)

    monkeypatch.setattr(opd, "update", meanwhile)
    opd.distil(config(world, tmp_path / "run", steps=2))
    assert told == [True, True] and [row["step"] for row in rows(tmp_path / "run")] == [1, 2]


# --- torn ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cut(world, tmp_path, monkeypatch):  # noqa: F811
    """A run that was killed in its fourth step, after the checkpoint of the second."""
    plain = opd.update

    def dies(cfg, pair, optimizer, rows, step):
        if step == 3:
            raise Killed
        return plain(cfg, pair, optimizer, rows, step)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(opd, "update", dies)
        opd.distil(config(world, tmp_path / "run", steps=5))
    return tmp_path / "run"


@pytest.mark.parametrize("tail", [b"", b'{"step": 4, "loss": 0.1', b"\xff\xfe{\n"])
def test_the_logs_follow_from_the_checkpoint(world, whole, cut, tail):  # noqa: F811
    """Whatever a kill or a crash of the machine left in them: they are written anew, and the run ends the same."""
    with open(cut / "metrics.jsonl", "ab") as file:
        file.write(tail)
    (cut / "rollouts.jsonl").unlink()
    assert resumed(world, cut) == whole


def test_a_half_written_checkpoint_beside_the_whole_one_is_passed_over(world, whole, cut):  # noqa: F811
    """What stands aside was never the checkpoint."""
    (cut / "checkpoint" / "state.pt.tmp").write_bytes(
        (cut / "checkpoint" / "state.pt").read_bytes()[:999]
    )
    assert resumed(world, cut) == whole and not (cut / "checkpoint" / "state.pt.tmp").exists()


def test_a_checkpoint_of_other_prompts_goes_on_with_a_warning(world, tmp_path):  # noqa: F811
    """The one change that must be possible: to leave out a prompt that breaks the run. It is said. What was measured
    before on one set of held-out prompts is not held against what comes out on another.
    """
    given, held_out = tmp_path / "p.jsonl", tmp_path / "e.jsonl"
    given.write_text("\n".join(map(json.dumps, PROMPTS[:8])))
    held_out.write_text("\n".join(map(json.dumps, PROMPTS[8:])))
    for out, change in ((tmp_path / "with", dict(eval=str(held_out))), (tmp_path / "without", {})):
        given.write_text("\n".join(map(json.dumps, PROMPTS[:8])))
        opd.distil(config(world, out, prompts=str(given), steps=2, **change))
        given.write_text("\n".join(map(json.dumps, PROMPTS[:4])))
        with (
            pytest.warns(UserWarning, match="the prompts are not those of the steps before")
            if change
            else pytest.raises(
                ValueError, match="the held-out prompts, .* are not those of the steps before"
            )
        ):
            opd.distil(config(world, out, prompts=str(given), steps=4, resume=True, **change))
    assert [row["step"] for row in rows(tmp_path / "with")] == [1, 2, 3, 4]
    assert (tmp_path / "without" / "result.json").exists()  # that of the two steps


def test_a_checkpoint_of_another_student_is_refused(world, cut, tmp_path):  # noqa: F811
    """The directory has the same name and holds another model."""
    shutil.copytree(world / "student", tmp_path / "student")
    state = torch.load(cut / "checkpoint" / "state.pt", weights_only=True)
    state["student"] = tiny("llama", hidden=48, vocab_size=len(WORDS)).state_dict()
    torch.save(state, cut / "checkpoint" / "state.pt")
    with pytest.raises(ValueError, match="does not fit the model in --student"):
        resumed(world, cut)


def test_what_made_a_run_is_on_record(world, cut):  # noqa: F811
    """config.json holds the flags, versions, commit, whether it was changed, and the command."""
    resumed(world, cut)
    made = json.loads((cut / "config.json").read_text())
    assert {
        "student",
        "command",
        "commit",
        "dirty",
        "python",
        "torch",
        "transformers",
        "threads",
    } <= made.keys()


# --- out of disk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["full", "no permission", "in the way"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last(
    world, whole, cut, capfd, monkeypatch, what
):  # noqa: F811
    """A disk that is full in the midst of it, a permission that was taken, a directory in the way: one line, exit code
    1, and the bytes of the checkpoint before.
    """
    before, aside = (
        (cut / "checkpoint" / "state.pt").read_bytes(),
        cut / "checkpoint" / "state.pt.tmp",
    )
    with monkeypatch.context() as patch:
        if what == "full":
            aside.symlink_to("/dev/full")
        elif what == "in the way":
            aside.mkdir()
        else:
            plain = os.replace
            patch.setattr(
                os,
                "replace",
                lambda a, b: (
                    plain(a, b)
                    if "state" not in str(b)
                    else (_ for _ in ()).throw(
                        PermissionError(errno.EACCES, "Permission denied", str(a))
                    )
                ),
            )
        code, said = stop(world, cut, capfd, resume=True)
    reason = {
        "full": "No space left on device",
        "no permission": "Permission denied",
        "in the way": "Is a directory",
    }[what]
    assert code == 1 and said == (
        f"opd.py: {cut}/checkpoint/state.pt: {reason}; the checkpoint of step 2 is whole; "
        f"when that "
        "is mended, --resume goes on\n"
    )
    assert (cut / "checkpoint" / "state.pt").read_bytes() == before and not (
        cut / "result.json"
    ).exists()
    if what == "in the way":
        aside.rmdir()
    assert not aside.exists() and resumed(world, cut) == whole


def test_a_log_that_cannot_be_written_leaves_the_last_checkpoint(world, whole, cut, capfd):  # noqa: F811
    """The disk is full when a step is logged: what the log should hold comes again from the checkpoint."""
    (cut / "metrics.jsonl.tmp").symlink_to("/dev/full")
    code, said = stop(world, cut, capfd, resume=True)
    assert (
        code == 1
        and "metrics.jsonl: No space left on device; the checkpoint of step 2 is whole" in said
    )
    assert said.count("\n") == 1
    assert resumed(world, cut) == whole


def test_a_result_that_cannot_be_written_is_not_there(world, whole, cut, capfd, monkeypatch):  # noqa: F811
    """result.json stands for a complete run: half of one is none."""
    (cut / "result.json.tmp").symlink_to("/dev/full")
    code, said = stop(world, cut, capfd, resume=True)
    assert (
        code == 1
        and "result.json: No space left on device; the checkpoint of step 5 is whole" in said
    )
    assert not (cut / "result.json").exists() and resumed(world, cut) == whole


def test_a_student_that_cannot_be_written_is_one_line(world, whole, cut, capfd, monkeypatch):  # noqa: F811
    """safetensors has an exception of its own for a full disk."""

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        code, said = stop(world, cut, capfd, resume=True)
    assert code == 1 and said == (
        f"opd.py: {cut}/student cannot be written: I/O error: No space left on device (os "
        "error 28); the checkpoint of step 5 is whole, --resume goes on\n"
    )
    assert not (cut / "result.json").exists() and resumed(world, cut) == whole


# --- not finite ----------------------------------------------------------------------------------------------------


def breaks(monkeypatch, at):
    """The teacher's states are NaN in the updates with these numbers, from 0."""
    plain, tried = teacher.Pair.grade, []

    def grade(pair, r, per_position, *, scale=None, **how):
        tried.extend([0] * (scale is not None))
        student, graded = pair.splits
        if scale is not None and len(tried) - 1 in at:
            pair.splits = (
                student,
                graded._replace(trunk=lambda ids, mask: graded.trunk(ids, mask) * math.nan),
            )
        out = plain(pair, r, per_position, scale=scale, **how)
        pair.splits = student, graded
        return out

    monkeypatch.setattr(teacher.Pair, "grade", grade)


def test_a_step_that_is_not_finite_is_skipped_counted_and_named(
    world, tmp_path, capfd, monkeypatch
):  # noqa: F811
    """Nothing is updated, no NaN or 0 stands for a number, metrics and a line name the prompts, and the run goes on."""
    breaks(monkeypatch, at=(1,))
    before, plain, cfg = [], opd.update, config(world, tmp_path / "run", steps=4, save_every=1)

    def watched(cfg, pair, *others):
        before.append([p.detach().clone() for p in pair.student.parameters()])
        return plain(cfg, pair, *others)

    monkeypatch.setattr(opd, "update", watched)
    result = opd.distil(cfg)
    logged = rows(tmp_path / "run")
    assert [("skipped" in row, row["skipped_steps"]) for row in logged] == [
        (False, 0),
        (True, 1),
        (False, 1),
        (False, 1),
    ]
    assert all(torch.equal(a, b) for a, b in zip(before[1], before[2]))  # the second step
    assert not all(torch.equal(a, b) for a, b in zip(before[2], before[3]))
    bad, train = logged[1], prompts.questions(cfg)[0]
    assert bad["loss"] is bad["reverse_kl"] is bad["grad_norm"] is None
    assert sorted(bad["skipped"]["prompts"]) == sorted(
        train[i]["id"] for i in processes.batch(len(train), 1, 3, 0)
    )
    assert bad["skipped"]["why"] == "loss nan, gradient norm nan"
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    said = capfd.readouterr().out
    names = ", ".join(bad["skipped"]["prompts"])
    assert f"warning: step 2 skipped: loss nan, gradient norm nan; of {names}" in said
    assert result["skipped_steps"] == 1 and "skipped        1 steps" in show.summary(result)


def one_update(cfg):
    """-> Pair, and the row of the first step's update."""
    _, pair, train, _ = ready(cfg)
    chosen = [train[i] for i in processes.batch(len(train), 0, cfg.batch_size, cfg.seed)]
    return (
        pair,
        lambda: opd.update(cfg, pair, opd.adamw(cfg, pair.student), chosen, 0)[1],
        [r["id"] for r in chosen],
    )


def test_only_the_prompts_whose_responses_break_are_named(world, tmp_path):  # noqa: F811
    """Of a step's prompts the one is named at whose tokens the loss is not finite."""
    pair, update, names = one_update(config(world, tmp_path / "run", micro_batch_tokens=1, n=1))
    plain, seen = pair.splits[1].trunk, []

    def trunk(ids, mask):
        seen.append(0)
        return plain(ids, mask) * (math.nan if len(seen) == 2 else 1)  # the second row

    pair.splits = (pair.splits[0], pair.splits[1]._replace(trunk=trunk))
    row = update()
    assert len(row["skipped"]["prompts"]) == 1 and row["skipped"]["prompts"][0] in names


def test_an_infinite_gradient_of_a_finite_loss_is_no_update_either(world, tmp_path, monkeypatch):  # noqa: F811
    """The norm is what tells; all prompts of the step are named."""
    pair, update, names = one_update(config(world, tmp_path / "run"))
    before = [p.detach().clone() for p in pair.student.parameters()]
    plain = opd.clip_grad_norm_
    monkeypatch.setattr(opd, "clip_grad_norm_", lambda *args: plain(*args) * math.inf)
    row = update()
    assert (
        not math.isfinite(row["grad_norm"])
        and math.isfinite(row["loss"])
        and row["skipped"]["prompts"] == names
    )
    assert all(torch.equal(a, b) for a, b in zip(before, pair.student.parameters()))
    assert all(p.grad is None for p in pair.student.parameters())


def test_three_in_a_row_end_the_run_before_anything_is_saved(world, tmp_path, capfd, monkeypatch):  # noqa: F811
    """Exit code 1, the reason, the prompts, the remedy; the checkpoint is from before the first of them, and --resume
    may lower the learning rate. Two in a row and one later do not end it.
    """
    with monkeypatch.context() as patch:
        breaks(patch, at=(0, 1, 3, 5, 6, 7))
        code, said = stop(world, tmp_path / "run", capfd, steps=9, save_every=1)
    assert (
        code == 1
        and said.startswith(
            "opd.py: step 8 skipped: loss nan, gradient norm nan; of prompts.jsonl:"
        )
        and "the third in a row" in said
        and "--resume with a lower --lr" in said
    )
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == 5 and all(x.isfinite().all() for x in state["student"].values())
    assert not (tmp_path / "run" / "result.json").exists()
    opd.distil(config(world, tmp_path / "run", steps=9, save_every=1, resume=True, lr=1e-4))
    logged = rows(tmp_path / "run")
    assert [row["step"] for row in logged] == list(range(1, 10)) and logged[-1][
        "skipped_steps"
    ] == 3
    assert [row["lr"] for row in logged] == [1e-3] * 5 + [1e-4] * 4


def test_weights_that_an_update_broke_are_never_a_checkpoint(world, tmp_path, monkeypatch):  # noqa: F811
    """A checkpoint that could only go on to NaN would be worse than none."""
    plain = torch.optim.AdamW.step

    def step(optimizer):
        plain(optimizer)
        if optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 3:
            optimizer.param_groups[0]["params"][0].data[0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(
        FloatingPointError, match="step 3: the update has left weights that are not finite"
    ):
        opd.distil(config(world, tmp_path / "run", steps=4, save_every=1))
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == 2 and all(x.isfinite().all() for x in state["student"].values())


def test_held_out_prompts_that_break_end_the_run_with_a_line(world, tmp_path):  # noqa: F811
    """Without a gradient to give it away, too: no evaluation of NaN passes for a number."""
    cfg, pair, _, held_out = ready(config(world, tmp_path / "run"))
    pair.teacher.get_output_embeddings().weight[3] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        measure.distance(cfg, pair, held_out, opd.per_position(cfg))


# --- out of memory -------------------------------------------------------------------------------------------------


def too_much(*_, **__):
    """More than any machine has: the CPU's own error."""
    torch.empty(2**48, dtype=torch.uint8)


def gpu_is_full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def in_step_4(monkeypatch, fails):
    """Before the fourth update something happens."""
    plain = opd.update

    def update(cfg, pair, optimizer, rows, step):
        if step == 3:
            fails()
        return plain(cfg, pair, optimizer, rows, step)

    monkeypatch.setattr(opd, "update", update)


@pytest.mark.parametrize("fails", [too_much, gpu_is_full])
@pytest.mark.parametrize(
    "owner, name, says",
    [
        (
            teacher,
            "in_chunks",
            "grading: lower --micro-batch-tokens or --chunk, add --gradient-checkpointing, or lower "
            "--max-new-tokens",
        ),
        (
            rollout,
            "draw",
            "writing responses: lower --in-flight or --max-new-tokens (evaluating: --eval-max-new-tokens)",
        ),
    ],
)
def test_out_of_memory_says_which_flag_to_turn(
    world, whole, tmp_path, capfd, monkeypatch, owner, name, says, fails
):  # noqa: F811
    """One line in place of a traceback, exit code 1; the run goes on from its checkpoint, with less."""
    with monkeypatch.context() as patch:
        in_step_4(patch, lambda: patch.setattr(owner, name, fails))
        code, said = stop(world, tmp_path / "run", capfd, micro_batch_tokens=30, save_every=2)
    assert code == 1 and said == (
        f"opd.py: out of memory while {says}; the checkpoint of step 2 is whole, --resume goes on\n"
    )
    texts, *rest = resumed(world, tmp_path / "run", micro_batch_tokens=10**6, save_every=2)
    assert [row["step"] for row in texts["metrics.jsonl"]] == [1, 2, 3, 4, 5]


def test_out_of_memory_at_the_models_says_what_to_take(world, tmp_path, capfd, monkeypatch):  # noqa: F811
    """Before the first step there is no checkpoint to speak of."""
    monkeypatch.setattr(models, "load", too_much)
    code, said = stop(world, tmp_path / "run", capfd)
    assert (
        code == 1
        and said.startswith("opd.py: out of memory while loading the models: take smaller ones")
        and said.count("\n") == 1
        and not (tmp_path / "run").exists()
    )


def test_another_error_stays_what_it_is(world, tmp_path, monkeypatch):  # noqa: F811
    """A fault of the program is no lack of memory: it keeps its traceback, and the last checkpoint is whole."""

    def fault():
        raise RuntimeError("a fault of ours")

    in_step_4(monkeypatch, fault)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        opd.main(
            [
                "--student",
                f"{world}/student",
                "--teacher",
                f"{world}/teacher",
                "--prompts",
                f"{world}/prompts.jsonl",
                "--out",
                str(tmp_path / "run"),
                "--k",
                "4",
                "--max-new-tokens",
                "6",
                "--batch-size",
                "3",
                "--save-every",
                "2",
            ]
        )
    assert torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["step"] == 2


def test_a_teacher_that_finishes_nothing_is_told_of_with_the_flag(world, tmp_path, monkeypatch):  # noqa: F811
    """An empty cold start is no cold start; the answers that were cut off can be read beside it."""
    monkeypatch.setattr(
        files, "append_answers", lambda *_: {"kept": 0, "unfinished": 3, "degenerate": 1}
    )
    with pytest.raises(
        ValueError,
        match="--cold-start 4: the teacher finished no response within 40 tokens .*higher "
        "--cold-start-max-new-tokens",
    ):
        opd.distil(config(world, tmp_path / "run", **COLD))


def test_a_model_of_four_tokens_is_a_model(tmp_path):
    """The checks at load take ids that it has."""
    tiny("llama", vocab_size=4).save_pretrained(tmp_path)
    assert models.load(tmp_path).config.vocab_size == 4


# --- the same twice, and nothing made up ---------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_files(world, whole, tmp_path):  # noqa: F811
    """On one machine with as many threads: every metric of every step, to the last bit; another seed gives others."""
    opd.distil(config(world, tmp_path / "again", steps=5))
    assert outcome(tmp_path / "again") == whole
    opd.distil(config(world, tmp_path / "other", steps=5, seed=1))
    assert outcome(tmp_path / "other")[0] != whole[0]


def test_the_chunk_changes_memory_and_not_the_run(world, tmp_path):  # noqa: F811
    """--chunk 1 has the logits of one position at a time."""
    found = []
    for chunk in (0, 1):
        opd.distil(config(world, tmp_path / str(chunk), steps=2, chunk=chunk))
        found.append(rows(tmp_path / str(chunk)))
    for a, b in zip(*found):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_what_cannot_be_computed_is_null(world, tmp_path):  # noqa: F811
    """Never 0: no answers, no gap, a single prompt."""
    bare = opd.distil(
        config(world, tmp_path / "bare", prompts=f"{world}/bare.jsonl", steps=2, eval_every=1)
    )
    assert (
        bare["accuracy_before"]
        is bare["gap_recovery"]
        is rows(tmp_path / "bare")[0]["accuracy"]
        is None
    )
    same = opd.distil(config(world, tmp_path / "same", teacher=f"{world}/student", steps=1))
    assert same["gap_recovery"] is None
    assert "not given: teacher and student are within noise" in show.summary(same)
    (tmp_path / "one.jsonl").write_text(json.dumps(PROMPTS[0]))
    one = opd.distil(config(world, tmp_path / "one", eval=str(tmp_path / "one.jsonl"), steps=1))
    assert one["accuracy_after"]["standard_error"] is one[
        "gap_recovery"
    ] is None and "+- ?" in show.summary(one)


def test_a_reward_that_is_not_finite_is_null_and_no_reason_to_stop(world, tmp_path, monkeypatch):  # noqa: F811
    """trl#5594: a teacher that rules the sampled token out: losses stay finite, the reward is -inf and so null."""
    plain = teacher.Pair.of.__func__

    def of(cls, *models, **settings):
        pair = plain(cls, *models, **settings)
        student, graded = pair.splits
        pair.splits = (
            student,
            graded._replace(
                head=lambda h: graded.head(h).index_fill(-1, torch.arange(4, 12), -math.inf)
            ),
        )
        return pair

    monkeypatch.setattr(teacher.Pair, "of", classmethod(of))
    opd.distil(config(world, tmp_path / "run", objective="full", steps=12))  # 10: signs of collapse
    for row in rows(tmp_path / "run"):
        assert row["reward"] is None and "skipped" not in row
        assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])


def test_a_number_that_is_not_finite_becomes_null_and_keeps_its_name():
    """Every other value stays."""
    good = {"loss": 0.5, "tokens": 3, "by_position": [None], "why": "nan"}
    assert files.finite_or_null(good) == good
    assert files.finite_or_null({**good, "loss": math.nan, "reward": -math.inf}) == {
        **good,
        "loss": None,
        "reward": None,
    }
    assert files.finite_or_null({"held_out": {"advantage": math.nan, "each": (1, math.inf)}}) == {
        "held_out": {"advantage": None, "each": [1, None]}
    }


def test_a_mean_without_an_error_does_not_look_like_a_sure_one():
    """What one prompt says has no standard error, and 0 would be the surest of all."""
    assert analysis.plus_minus({"mean": 0.5, "standard_error": 0.25}) == "0.500 +- 0.250"
    assert analysis.plus_minus({"mean": 0.5, "standard_error": None}) == "0.500 +- ?"
    assert (
        analysis.plus_minus({"mean": 0.5, "standard_error": 0.25}, "+9.2f") == "    +0.50 +- 0.25"
    )
    known, unknown = {"mean": 0.9, "standard_error": 0.0}, {"mean": 0.1, "standard_error": None}
    assert (
        analysis.gap_recovery(unknown, known, known)
        is analysis.gap_recovery(known, known, unknown)
        is None
    )
    assert analysis.gap_recovery({**unknown, "standard_error": 0.0}, known, known) == 1


def test_the_commit_and_whether_it_was_changed_are_told(tmp_path, monkeypatch):
    """Null where the code is in no repository; what git does not track changes nothing."""

    def git(*words):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *words],
            check=True,
            capture_output=True,
        )

    monkeypatch.setattr(files, "__file__", str(tmp_path / "analysis.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert files.provenance()["commit"] is files.provenance()["dirty"] is None
    (tmp_path / "analysis.py").write_text("one")
    git("init"), git("add", "."), git("commit", "-m", "one")
    (tmp_path / "notes").write_text("mine")
    made = files.provenance()
    assert (
        len(made["commit"]) == 12 and made["dirty"] is False and made["torch"] == torch.__version__
    )
    (tmp_path / "analysis.py").write_text("two")
    assert files.provenance()["commit"] == made["commit"] and files.provenance()["dirty"] is True
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert files.provenance()["commit"] is files.provenance()["dirty"] is None


@pytest.mark.parametrize(
    "error, code, said",
    [
        (ValueError("no\n  such"), 2, "x.py: no such\n"),
        (OSError(28, "No space", "a"), 1, "x.py: [Errno 28] No space: 'a'\n"),
        (FloatingPointError("nan"), 1, "x.py: nan\n"),
        (KeyboardInterrupt(), 130, "x.py: stopped\n"),
        (exits.Stopped("saved", signal.SIGTERM), 143, "x.py: saved\n"),
        (
            torch.OutOfMemoryError("CUDA"),
            1,
            "x.py: out of memory; take smaller models, or --dtype bfloat16\n",
        ),
        (MemoryError(), 1, "x.py: out of memory; take smaller models, or --dtype bfloat16\n"),
    ],
)
def test_each_end_has_its_exit_code_and_line(error, code, said, capsys):
    """2: cannot work; 1: came to an end on its way; 128 + the signal."""
    with pytest.raises(SystemExit) as stop, exits.one_line("x.py"):
        raise error
    assert stop.value.code == code and capsys.readouterr().err == said


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """Whatever stops the writing, what was there is there, and nothing beside it."""
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def breaks(file):
        file.write(b"half")
        raise Killed

    with pytest.raises(Killed):
        files.write_whole(path, breaks)
    assert files.read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="No such file") as error:
        files.write_whole(tmp_path / "none" / "a", breaks)
    assert error.value.filename == str(tmp_path / "none" / "a")
    for text in ("{", "[]", "\xff", "[" * 10**5):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="a.json is not .*restore or remove it"):
            files.read_json(path)


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
        plain = os.fsync

        def half(number):
            path = os.readlink(f"/proc/self/fd/{number}")
            if Path(path).name == f"{name}.tmp":
                os.truncate(path, int(os.path.getsize(path) * share))
                kill()
            plain(number)

        os.fsync = half

    return arm


def half_a_line(step):
    """A bomb: half of the line of this many steps from now stands in metrics.jsonl."""

    def arm():
        plain, left = Run.append, [step]

        def append(a_run, name, row):
            left[0] -= name == "metrics.jsonl"
            if left[0]:
                return plain(a_run, name, row)
            line = json.dumps(row)
            with open(a_run.out / name, "a") as file:
                file.write(line[: len(line) // 2])
            kill()

        Run.append = append

    return arm


def bombs(draw):
    """Where a run dies, in the order in which a run comes to these places."""

    def replaced(name):
        return lambda a, b: Path(b).name == name

    early = [
        at_call(teacher.Pair, "load"),
        at_call(teacher.Pair, "load", after=True),
        half_a_file("config.json"),
        at_call(os, "replace", when=replaced("config.json"), after=True),
        at_call(measure, "accuracy", 1),
        at_call(measure, "accuracy", 2, after=True),
        half_a_file("state.pt"),
        at_call(os, "replace", when=replaced("state.pt"), after=True),
        at_call(teacher, "rollout", 1, after=True),
        at_call(recipes, "is_degenerate", 2),
        at_call(torch.optim.AdamW, "step", 2),
        at_call(measure, "accuracy", 1),
    ]
    middle = [
        at_call(slots.Slots, "feed", draw.randint(5, 9)),
        at_call(torch.Tensor, "backward", draw.randint(3, 6)),
        at_call(torch.optim.AdamW, "step", 2),
        at_call(torch.optim.AdamW, "step", 3, after=True),
        half_a_line(3),
        at_call(Run, "log", 3),
        at_call(Run, "log", 3, after=True),
        at_call(os, "replace", when=replaced("metrics.jsonl")),
        half_a_file("metrics.jsonl"),
        half_a_file("state.pt", 0.01),
        half_a_file("state.pt", 1),
        at_call(os, "replace", when=replaced("state.pt")),
        at_call(os, "replace", when=replaced("state.pt"), after=True),
    ]
    draw.shuffle(middle)
    clock = [(steps, draw.uniform(0, 0.1)) for steps in (0, 1, 0, 2, 0, 1, 2, 1)]
    late = [
        at_call(Run, "finish"),
        at_call(measure, "distance", 1, after=True),
        at_call(run, "write_json", when=lambda path, _: Path(path).name == "result.json"),
        half_a_file("result.json"),
    ]
    return early + middle[:7] + clock + middle[7:] + late


def main(world, folder, how):
    """A run of sixty steps that nothing disturbs, and one that is killed; one import for all of them."""
    torch.set_num_threads(1)
    draw, folder = random.Random(0), Path(folder)
    opd.tqdm.write = lambda *_, **__: None

    def start(out, bomb=None):
        """-> the exit code of a process of its own, -9 where it was killed."""
        child = os.fork()
        if not child:
            code = 1
            with contextlib.suppress(SystemExit):
                if callable(bomb):
                    bomb()
                sys.argv = ["opd.py"]
                opd.distil(
                    config(
                        world,
                        out,
                        steps=60,
                        save_every=2,
                        eval_every=16,
                        resume=(out / "config.json").exists(),
                        **COLD,
                    )
                )
                code = 0
            os._exit(code)
        if isinstance(bomb, tuple):  # so many more steps, and then by the clock
            log = out / "metrics.jsonl"
            had = log.read_bytes().count(b"\n") if bomb[0] else 0
            while bomb[0] and log.read_bytes().count(b"\n") < had + bomb[0]:
                time.sleep(0.001)
            time.sleep(bomb[1])
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    started = time.perf_counter()
    assert start(folder / "whole") == 0
    duration, kills, never, killed = time.perf_counter() - started, 0, [], folder / "killed"
    for i, bomb in enumerate(bombs(draw) if how == "by place" else []):
        code = start(killed, bomb)
        kills += code == -signal.SIGKILL
        if code != -signal.SIGKILL:
            never.append(i)
            if (killed / "result.json").exists():
                break
    while how == "by clock" and kills < 20:
        if (killed / "result.json").exists():  # then another from the start
            killed.rename(folder / f"killed, {len(list(folder.iterdir()))}")
        kills += start(killed, (0, draw.uniform(0, 0.4) * duration)) == -signal.SIGKILL
    if not (killed / "result.json").exists():
        assert start(killed) == 0
    print(json.dumps({"kills": kills, "never reached": never}))


if __name__ == "__main__":
    main(*sys.argv[1:])
