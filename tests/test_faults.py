"""What can happen to a run: it is killed, stopped, out of disk or memory, or not finite.

What is on the disk stays whole, and --resume ends as the run that nothing disturbed, bit for bit.
"""

import contextlib
import copy
import errno
import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from conftest import PROMPTS, TEMPLATE, Killed, config, ready, rows, tiny, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.optim import AdamW

import opd
from plumbing import files, measure, run, show
from plumbing.exits import RunEnded, Stopped, one_line
from plumbing.models import load_pair
from plumbing.run import LOGS, MAY_DIFFER, Run
from teacher import UserError

COLD = {
    "cold_start": 4,
    "cold_start_steps": 3,
    "cold_start_max_new_tokens": 24,
    "cold_start_temperature": 1.0,
}
CLOCK = ("seconds", "peak_memory_bytes", "command", "commit", "dirty", "resume")  # and time_...


@pytest.fixture(autouse=True)
def a_terminal():
    """These tests run as a terminal starts them, also under nohup, which ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True, scope="module")
def models_are_read_once():
    """These runs take copies of pairs that were read once: reading is tested elsewhere."""
    read = functools.lru_cache(load_pair)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_pair", lambda *paths, **how: copy.deepcopy(read(*paths, **how)))
        yield


# --- what a run leaves --------------------------------------------------------------------------


def timeless(x):
    """A JSON value without what a clock, the memory or the command line decides."""
    if isinstance(x, list):
        return [timeless(value) for value in x]
    if not isinstance(x, dict):
        return x
    kept = [name for name in x if name not in CLOCK and not name.startswith("time_")]
    return {name: timeless(x[name]) for name in kept}


def checkpoint(out):
    return torch.load(out / "checkpoint" / "state.pt", weights_only=True)


def outcome(out):
    """All that a run leaves, to compare: each step and text in order, weights, moments, result."""
    left = {}
    for name in (*LOGS, "cold_start.jsonl"):
        if (out / name).exists():
            lines = (out / name).read_text().splitlines()
            left[name] = [timeless(json.loads(line)) for line in lines]
    left["result"] = timeless(files.read_json(out / "result.json"))
    made = timeless(files.read_json(out / "config.json"))
    left["config"] = {name: x for name, x in made.items() if name not in MAY_DIFFER}
    state = checkpoint(out)
    left["student"] = {name: x.tolist() for name, x in state["student"].items()}
    for place, moments in state["optimizer"]["state"].items():
        left[f"moments {place}"] = {name: x.tolist() for name, x in moments.items()}
    saved = load_file(out / "student" / "model.safetensors")
    left["saved"] = {name: x.tolist() for name, x in saved.items()}
    return left


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The outcome of a run of five steps that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    opd.distil(config(world, out, steps=5))
    return outcome(out)


@pytest.fixture(scope="module")
def whole_cold(world, tmp_path_factory):
    """The outcome of a cold start of three updates and a run of three steps."""
    out = tmp_path_factory.mktemp("whole") / "cold"
    opd.distil(config(world, out, steps=3, **COLD))
    return outcome(out)


def resumed(world, out, **change):
    opd.distil(config(world, out, **{"steps": 5, "resume": True, **change}))
    return outcome(out)


def ended(cfg, capfd):
    """A run that ends with an exit code: -> the code, and its one line on stderr."""
    with pytest.raises(SystemExit) as end, one_line("opd.py"):
        opd.distil(cfg)
    said = capfd.readouterr().err
    assert said.count("opd.py: ") == 1
    return end.value.code, said[said.index("opd.py: ") :]


def at_call(patch, owners, name, number, act, after=False):
    """The number-th call of a function, whichever owner it is called through, does `act`, too."""
    calls = []

    def wrapped(plain):
        def function(*args, **kwargs):
            calls.append(name)
            is_it = len(calls) == number
            if is_it and not after:
                act(*args, **kwargs)
            result = plain(*args, **kwargs)
            if is_it and after:
                act(*args, **kwargs)
            return result

        return function

    for owner in owners:
        patch.setattr(owner, name, wrapped(getattr(owner, name)))


def die(*_, **__):
    raise Killed


def a_half_line(path, lines):
    """A kill in the midst of a write."""
    with open(path, "a") as file:
        file.write(json.dumps(lines[0])[:20])
    raise Killed


# --- killed -------------------------------------------------------------------------------------

PLACES = {
    "a line of a log": ((files, run), "append_lines"),
    "a rename": ((os,), "replace"),
    "an update": ((AdamW,), "step"),
    "an evaluation": ((measure,), "accuracy"),
}
kills_at_lines = st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=2)
kills = st.lists(
    st.tuples(st.sampled_from(sorted(PLACES)), st.integers(1, 7), st.booleans()),
    min_size=1,
    max_size=3,
)


def until_it_ends(world, out, bombs):
    """Run, be killed by each bomb, a function of a monkeypatch, resume, end: -> outcome."""
    for bomb in [*bombs, lambda patch: None]:
        with pytest.MonkeyPatch.context() as patch:
            bomb(patch)
            resume = (out / "config.json").exists()
            if not (out / "result.json").exists():
                with contextlib.suppress(Killed):
                    opd.distil(config(world, out, steps=3, resume=resume, **COLD))
    return outcome(out)


@settings(max_examples=6)
@given(places=kills_at_lines)
def test_killed_after_any_line_of_a_log_and_resumed_a_run_ends_the_same(
    world, whole_cold, tmp_path_factory, places
):
    """k lines of the teacher's answers, the cold start, the metrics and the texts, then a kill
    after the line or in the midst of the next.
    """

    def bomb(k, torn):
        act = a_half_line if torn else die
        return lambda patch: at_call(patch, *PLACES["a line of a log"], k, act, after=not torn)

    out = tmp_path_factory.mktemp("killed") / "run"
    bombs = [bomb(k, torn) for k, torn in places]
    assert until_it_ends(world, out, bombs) == whole_cold


@settings(max_examples=6)
@given(places=kills)
def test_killed_anywhere_and_resumed_a_run_ends_the_same(
    world, whole_cold, tmp_path_factory, places
):
    """Before or after a file is renamed, the student is updated or evaluated, a line is written."""

    def bomb(place, number, after):
        return lambda patch: at_call(patch, *PLACES[place], number, die, after=after)

    out = tmp_path_factory.mktemp("killed") / "run"
    assert until_it_ends(world, out, [bomb(*place) for place in places]) == whole_cold


@pytest.mark.slow
def test_killed_twenty_times_by_the_clock_a_run_ends_the_same(world, tmp_path):
    """kill -9 of a process at random moments."""
    draw = random.Random(0)
    how = {"steps": 60, "eval_every": 16, **COLD}
    started = time.perf_counter()
    opd.distil(config(world, tmp_path / "whole", **how))
    duration = time.perf_counter() - started
    expected = outcome(tmp_path / "whole")
    out = tmp_path / "killed-0"
    kills = 0
    while kills < 20 or not (out / "result.json").exists():
        if (out / "result.json").exists():
            assert outcome(out) == expected
            out = out.with_name(f"killed-{kills}")
        child = in_a_child(config(world, out, resume=(out / "config.json").exists(), **how))
        if kills < 20:
            time.sleep(draw.uniform(0, 0.4) * duration)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        kills += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL)
    assert outcome(out) == expected
    assert not list(tmp_path.glob("killed*/**/*.tmp"))


def in_a_child(cfg, stderr=os.devnull):
    """Start a run in a process of its own: -> its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
        sys.stdout = open(os.devnull, "w")
        opd.distil(cfg)
        code = 0
    finally:
        os._exit(code)


# --- stopped ------------------------------------------------------------------------------------


def send(signum):
    return lambda *_, **__: os.kill(os.getpid(), signum)


@pytest.mark.parametrize(
    "owner, name, number, after, signum",
    [
        pytest.param(opd, "rollout", 3, True, signal.SIGINT, id="in a rollout"),
        pytest.param(opd, "states", 6, False, signal.SIGTERM, id="in grading, by SIGTERM"),
        pytest.param(AdamW, "step", 3, True, signal.SIGHUP, id="after the update, by SIGHUP"),
        pytest.param(run, "append_lines", 3, True, signal.SIGINT, id="after a line"),
        pytest.param(torch, "save", 2, False, signal.SIGINT, id="while saving"),
    ],
)
def test_a_signal_ends_the_step_and_saves(
    world, whole, tmp_path, capfd, monkeypatch, owner, name, number, after, signum
):
    """Exit code 128 + signal, a checkpoint of the last whole step, the same end after --resume."""
    with monkeypatch.context() as patch:
        at_call(patch, [owner], name, number, send(signum), after)
        code, said = ended(config(world, tmp_path / "run", steps=5, save_every=50), capfd)
    saved = checkpoint(tmp_path / "run")["run"]["step"]
    assert code == 128 + signum
    assert f"stopped after step {saved} of 5; the checkpoint of step {saved} is whole" in said
    assert saved == len(rows(tmp_path / "run"))
    assert not (tmp_path / "run" / "result.json").exists()
    assert resumed(world, tmp_path / "run", save_every=50) == whole


def test_a_run_stopped_before_its_first_step_keeps_what_was_measured(
    world, whole, tmp_path, capfd, monkeypatch
):
    with monkeypatch.context() as patch:
        at_call(patch, [measure], "distance", 1, send(signal.SIGINT))
        code, said = ended(config(world, tmp_path / "run", steps=5), capfd)
    assert code == 130 and "the checkpoint of step 0 is whole" in said
    with monkeypatch.context() as patch:
        at_call(patch, [measure], "accuracy", 1, die)  # of the end, when nothing is measured twice
        with pytest.raises(Killed):
            resumed(world, tmp_path / "run")
    assert len(rows(tmp_path / "run")) == 5
    assert resumed(world, tmp_path / "run") == whole


@pytest.mark.parametrize("update, after", [(2, False), (2, True), (3, True)])
def test_a_signal_in_a_cold_start_keeps_its_updates(
    world, whole_cold, tmp_path, capfd, monkeypatch, update, after
):
    """An update and its count are not parted, however far away --save-every is."""
    with monkeypatch.context() as patch:
        at_call(patch, [AdamW], "step", update, send(signal.SIGINT), after)
        cfg = config(world, tmp_path / "run", steps=3, save_every=50, **COLD)
        code, said = ended(cfg, capfd)
    state = checkpoint(tmp_path / "run")
    assert code == 130 and f"the checkpoint of step {update} of the cold start is whole" in said
    assert state["run"]["cold_step"] == update == state["optimizer"]["state"][0]["step"]
    assert resumed(world, tmp_path / "run", steps=3, **COLD) == whole_cold


def test_a_finished_run_that_goes_on_is_not_complete_until_it_ends(
    world, tmp_path, capfd, monkeypatch
):
    """result.json is there if the run is complete, and only then."""
    opd.distil(config(world, tmp_path / "run", steps=2))
    with monkeypatch.context() as patch:
        at_call(patch, [opd], "update", 1, send(signal.SIGINT))
        ended(config(world, tmp_path / "run", steps=5, resume=True), capfd)
    assert not (tmp_path / "run" / "result.json").exists()
    assert resumed(world, tmp_path / "run")["result"]["steps"] == 5


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(world, tmp_path, monkeypatch):
    """The second one does not wait for what the first one waits for; the checkpoint is whole."""

    def twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    at_call(monkeypatch, [AdamW], "step", 4, twice)
    started = time.perf_counter()
    child = in_a_child(config(world, tmp_path / "run", steps=5), tmp_path / "said")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == -signal.SIGINT and time.perf_counter() - started < 30
    assert "the checkpoint of step 2 is whole" in (tmp_path / "said").read_text()
    assert checkpoint(tmp_path / "run")["run"]["step"] == 2
    monkeypatch.undo()
    assert resumed(world, tmp_path / "run")["result"]["steps"] == 5


def test_the_signal_handler_writes_past_a_buffer_that_may_be_in_use(
    world, tmp_path, capfd, monkeypatch
):
    """tqdm may be writing to sys.stderr; to write into it again is an error of its own."""

    class InUse:
        def write(self, _):
            raise RuntimeError("reentrant call")

    with Run(config(world, tmp_path)) as a_run, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", InUse())
        os.kill(os.getpid(), signal.SIGINT)
        assert a_run.signal == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # for the second one
    assert "stopping after this step" in capfd.readouterr().err


def test_handlers_are_given_back(world, tmp_path, monkeypatch):
    """A script that makes several runs has its own Ctrl-C between them; nohup is heeded."""
    before = [signal.getsignal(signum) for signum in run.SIGNALS]
    with contextlib.suppress(Killed), Run(config(world, tmp_path)):
        assert all(signal.getsignal(signum) not in before for signum in run.SIGNALS)
        raise Killed
    assert [signal.getsignal(signum) for signum in run.SIGNALS] == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Run(config(world, tmp_path)):
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) not in before


def test_a_reader_that_is_gone_costs_nothing(world, whole, tmp_path, capfd, monkeypatch):
    """opd.py | head: a run goes on from its checkpoint."""

    def gone(row):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with monkeypatch.context() as patch:
        at_call(patch, [show], "line", 3, gone)
        code, said = ended(config(world, tmp_path / "run", steps=5), capfd)
    assert code == 1 and "the checkpoint of step 2 is whole" in said
    assert resumed(world, tmp_path / "run") == whole


# --- one at a time ------------------------------------------------------------------------------


def test_two_processes_do_not_write_one_run(world, tmp_path, monkeypatch):
    """A run that seems dead and is not: the second is told, the first goes on."""
    told = []

    def meanwhile(*_):
        with pytest.raises(UserError, match="another process is at it"):
            opd.distil(config(world, tmp_path / "run", steps=2, resume=True))
        told.append(True)

    at_call(monkeypatch, [opd], "update", 2, meanwhile)
    opd.distil(config(world, tmp_path / "run", steps=2))
    assert told == [True] and [row["step"] for row in rows(tmp_path / "run")] == [1, 2]


def test_a_resume_while_the_first_run_ends_leaves_its_result(world, tmp_path, cut, monkeypatch):
    """Case 11: the lock comes before the look. The second --resume was made in time to read the
    first one's old checkpoint, and entered when it had ended.
    """
    late = Run(config(world, cut, steps=5, resume=True))
    opd.distil(config(world, cut, steps=5, resume=True))
    with pytest.raises(UserError, match="complete"), late:
        pass
    assert (cut / "result.json").exists() and len(rows(cut)) == 5


# --- what --resume finds ------------------------------------------------------------------------


@pytest.fixture
def cut(world, tmp_path):
    """A run that was killed in its fourth step, after the checkpoint of the second."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at_call(patch, [opd], "update", 4, die)
        opd.distil(config(world, tmp_path / "run", steps=5))
    return tmp_path / "run"


@pytest.mark.parametrize("tail", [b"", b'{"step": 4, "loss": 0.1', b"\xff\xfe{\n"])
def test_the_logs_follow_from_the_checkpoint(world, whole, cut, tail):
    """Whatever a crash of the machine left in them, and beside the checkpoint, is passed over."""
    with open(cut / "metrics.jsonl", "ab") as file:
        file.write(tail)
    (cut / "rollouts.jsonl").unlink()
    aside = cut / "checkpoint" / "state.pt.tmp"
    aside.write_bytes(b"half a checkpoint")
    assert resumed(world, cut) == whole and not aside.exists()


def test_the_next_day_is_no_other_file(world, tmp_path, monkeypatch):
    """Case 3: the templates of Llama 3.x and SmolLM3 write the date into a prompt."""
    monkeypatch.setattr(run, "load_pair", load_pair)
    for model in ("student", "teacher"):
        shutil.copytree(world / model, tmp_path / model)
    models = {"student": f"{tmp_path}/student", "teacher": f"{tmp_path}/teacher"}

    def on(day):
        settings_file = tmp_path / "student" / "tokenizer_config.json"
        settings_file.write_text(
            json.dumps({**files.read_json(settings_file), "chat_template": f"{day} {TEMPLATE}"})
        )
        (tmp_path / "student" / "chat_template.jinja").unlink(missing_ok=True)

    on("3")
    opd.distil(config(world, tmp_path / "run", steps=2, **models))
    on("7")
    opd.distil(config(world, tmp_path / "run", steps=3, resume=True, **models))
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]


def test_prompts_can_be_left_out_and_held_out_ones_cannot(world, tmp_path):
    """A prompt that breaks a run can be taken out; what is measured on other prompts than before
    is not compared.
    """
    prompts = tmp_path / "prompts.jsonl"
    write_lines(tmp_path / "eval.jsonl", PROMPTS[8:])
    for change in ({"eval": str(tmp_path / "eval.jsonl")}, {}):
        cfg = config(world, tmp_path / f"run-{len(change)}", prompts=str(prompts), **change)
        change.update(prompts=str(prompts), out=cfg.out, resume=True)
        write_lines(prompts, PROMPTS[:8])
        opd.distil(config(world, **{**change, "resume": False}, steps=1))
        write_lines(prompts, PROMPTS[:4])
        if "eval" in change:
            with pytest.warns(UserWarning, match="prompts are not those of the steps before"):
                opd.distil(config(world, **change, steps=2))
        else:
            with pytest.raises(UserError, match="held-out prompts"):
                opd.distil(config(world, **change, steps=2))


def test_a_checkpoint_of_another_student_is_refused(world, cut):
    """The directory has the same name and holds another model."""
    state = checkpoint(cut)
    state["student"] = tiny("llama", hidden=48, vocab_size=16).state_dict()
    torch.save(state, cut / "checkpoint" / "state.pt")
    with pytest.raises(UserError, match="does not fit the model in --student"):
        resumed(world, cut)


def test_flags_that_decide_a_result_stay_and_a_path_may_be_put_another_way(world, cut, monkeypatch):
    for change in ({"k": 5}, {"seed": 1}, {"teacher": f"{world}/gpt2"}):
        with pytest.raises(UserError, match=f"had --{next(iter(change))} "):
            resumed(world, cut, **change)
    monkeypatch.chdir(world)
    monkeypatch.setattr(opd, "update", die)
    with pytest.raises(Killed):
        resumed(world, cut, teacher="./teacher", lr=1e-5, device="auto", save_every=3)
    assert files.same("a", "a") and not files.same("a", "b") and not files.same("3", 3)


def test_what_made_a_run_is_on_record(world, cut):
    """config.json holds the flags, versions, commit, whether it was changed, and the command."""
    made = files.read_json(cut / "config.json")
    names = {"student", "lr", "command", "commit", "dirty", "python", "torch", "threads"}
    assert names <= made.keys()


def test_the_commit_and_whether_it_was_changed_are_told(tmp_path, monkeypatch):
    """Null if the code is in no repository; a file that git does not track changes nothing."""

    def git(*words):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *words]
        subprocess.run(command, check=True, capture_output=True)

    def told():
        made = files.provenance()
        return made["commit"], made["dirty"]

    monkeypatch.setattr(files, "__file__", str(tmp_path / "files.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert told() == (None, None)
    (tmp_path / "files.py").write_text("one")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    (tmp_path / "notes").write_text("mine")
    commit, dirty = told()
    assert len(commit) == 12 and dirty is False
    (tmp_path / "files.py").write_text("two")
    assert told() == (commit, True)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert told() == (None, None)


# --- the teacher's answers ----------------------------------------------------------------------


def an_answer(why="kept"):
    return {"messages": [], "why": why}


def test_answers_are_asked_for_once(tmp_path):
    """A file that is there is continued where it stops, a torn last line is cut off and asked for
    again, and every line counts, whatever its "why".
    """
    path = tmp_path / "cold_start.jsonl"
    begun = []

    def batches(start):
        begun.append(start)
        yield [an_answer(), an_answer("unfinished")]
        yield []
        yield [an_answer("degenerate")]

    expected = {"kept": 1, "unfinished": 1, "degenerate": 1}
    assert files.append_answers(path, batches) == expected
    path.write_text(path.read_text() + '{"messages": [], "wh')
    assert files.append_answers(path, lambda start: begun.append(start) or []) == expected
    assert begun == [0, 3]
    assert [row["why"] for _, row in files.json_lines(path)] == list(expected)


@pytest.mark.parametrize("line", ["{}", "[]", "no JSON", '{"why": "bored"}'])
def test_a_line_of_another_kind_is_named(tmp_path, line):
    """The file was edited by hand: nothing is written over."""
    path = tmp_path / "cold_start.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match="cold_start.jsonl:1 is "):
        files.append_answers(path, lambda start: [])
    assert path.read_text() == line + "\n"


def test_only_the_first_process_writes_the_answers(tmp_path, monkeypatch):
    """The others would cut off a good line that is being written."""
    path = tmp_path / "cold_start.jsonl"
    path.write_text('{"mess')
    monkeypatch.setattr(files, "processes", lambda: (1, 2))
    files.append_answers(path, lambda start: [[an_answer()]])
    assert path.read_text() == '{"mess'


def test_a_teacher_that_finishes_nothing_is_told_of_with_the_flag(world, tmp_path, monkeypatch):
    """An empty cold start is no cold start."""
    nothing = {"kept": 0, "unfinished": 3, "degenerate": 1}
    monkeypatch.setattr(files, "append_answers", lambda *_: nothing)
    with pytest.raises(UserError, match="higher --cold-start-max-new-tokens"):
        opd.distil(config(world, tmp_path / "run", **COLD))


# --- out of disk --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, what",
    [
        ("checkpoint/state.pt", "No space left"),
        ("checkpoint/state.pt", "Permission denied"),
        ("checkpoint/state.pt", "Is a directory"),
        ("metrics.jsonl", "No space left"),
        ("result.json", "No space left"),
    ],
)
def test_a_file_that_cannot_be_written_leaves_the_one_before(
    world, whole, cut, capfd, monkeypatch, name, what
):
    """One line with what is left, exit code 1, the bytes of the last checkpoint, and the same end
    when that is mended. result.json, which stands for a complete run, is not there.
    """
    before = (cut / "checkpoint" / "state.pt").read_bytes()
    aside = cut / f"{name}.tmp"
    if what == "No space left":
        aside.symlink_to("/dev/full")
    elif what == "Is a directory":
        aside.mkdir()
    plain = os.replace

    def replace(a, b):
        if what == "Permission denied" and str(b).endswith(name):
            raise PermissionError(errno.EACCES, "Permission denied", str(a))
        plain(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        code, said = ended(config(world, cut, steps=5, resume=True), capfd)
    assert code == 1 and f"{cut}/{name} cannot be written: {what}" in said
    step = 5 if name == "result.json" else 2
    assert f"the checkpoint of step {step} is whole, --resume goes on" in said
    if step == 2:
        assert (cut / "checkpoint" / "state.pt").read_bytes() == before
    assert not (cut / "result.json").exists()
    if what == "Is a directory":
        aside.rmdir()
    assert not aside.exists() and resumed(world, cut) == whole


def test_a_student_that_cannot_be_written_is_one_line(world, whole, cut, capfd, monkeypatch):
    """safetensors has an exception of its own for a full disk."""

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        code, said = ended(config(world, cut, steps=5, resume=True), capfd)
    assert code == 1 and "student cannot be written" in said and "step 5 is whole" in said
    assert not (cut / "result.json").exists() and resumed(world, cut) == whole


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
    with pytest.raises(RunEnded, match="none/a cannot be written: No such file"):
        files.write_whole(tmp_path / "none" / "a", breaks)


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 10**5, "1" * 5000])
def test_a_file_that_is_not_what_was_written_is_named(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="a.json is not .*restore or remove it"):
        files.read_json(path)


# --- not finite ---------------------------------------------------------------------------------


def breaks(patch, at):
    """The teacher's states are NaN in the updates with these numbers, from 0."""
    plain_states = opd.states
    plain_update = opd.update
    tried = []

    def update(*args):
        tried.append("update")
        return plain_update(*args)

    def states(model, part):
        h = plain_states(model, part)
        is_teacher = not next(model.parameters()).requires_grad
        return h * math.nan if is_teacher and len(tried) - 1 in at else h

    patch.setattr(opd, "update", update)
    patch.setattr(opd, "states", states)


def test_a_step_that_is_not_finite_is_skipped_and_counted(world, tmp_path, capfd, monkeypatch):
    """Nothing is updated, no NaN and no 0 stands for a number, and the run goes on."""
    breaks(monkeypatch, at=(1,))
    students = []

    def remember(cfg, pair, *_):
        students.append([p.detach().clone() for p in pair.student.parameters()])

    for step in (1, 2, 3, 4):
        at_call(monkeypatch, [opd], "update", step, remember)
    result = opd.distil(config(world, tmp_path / "run", steps=4, save_every=1))
    logged = rows(tmp_path / "run")
    assert ["skipped" in row for row in logged] == [False, True, False, False]
    assert [row["skipped_steps"] for row in logged] == [0, 1, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(students[1], students[2]))  # the second step
    assert not all(torch.equal(a, b) for a, b in zip(students[2], students[3]))
    assert logged[1]["loss"] is logged[1]["reverse_kl"] is logged[1]["grad_norm"] is None
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "step 2 skipped" in capfd.readouterr().out
    assert result["skipped_steps"] == 1


def test_an_infinite_gradient_of_a_finite_loss_is_no_update_either(world, tmp_path, monkeypatch):
    """The norm is what tells."""
    cfg = config(world, tmp_path / "run")
    pair, train, _ = ready(cfg)
    before = [p.detach().clone() for p in pair.student.parameters()]
    plain = opd.clip_grad_norm_
    monkeypatch.setattr(opd, "clip_grad_norm_", lambda *a, **how: plain(*a, **how) * math.inf)
    _, row = opd.update(cfg, pair, opd.adamw(cfg, pair.student), train[:3], 0)
    assert "skipped" in row and math.isfinite(row["loss"]) and not math.isfinite(row["grad_norm"])
    assert all(torch.equal(a, b) for a, b in zip(before, pair.student.parameters()))
    assert all(p.grad is None for p in pair.student.parameters())


def test_three_in_a_row_end_the_run_before_anything_is_saved(world, tmp_path, capfd, monkeypatch):
    """Exit code 1; the checkpoint is from before the first of them, and --resume may lower the
    learning rate. Two in a row and one later do not end it.
    """
    with monkeypatch.context() as patch:
        breaks(patch, at=(0, 1, 3, 5, 6, 7))
        code, said = ended(config(world, tmp_path / "run", steps=9, save_every=1), capfd)
    assert code == 1 and "the third in a row" in said and "step 5 is whole" in said
    state = checkpoint(tmp_path / "run")
    assert state["run"]["step"] == 5 and all(x.isfinite().all() for x in state["student"].values())
    resumed(world, tmp_path / "run", steps=9, save_every=1, lr=1e-4)
    logged = rows(tmp_path / "run")
    assert [row["step"] for row in logged] == list(range(1, 10))
    assert logged[-1]["skipped_steps"] == 3
    assert [row["lr"] for row in logged] == [1e-3] * 5 + [1e-4] * 4


def test_weights_that_an_update_broke_are_never_a_checkpoint(world, tmp_path, monkeypatch):
    """A checkpoint that could only go on to NaN would be worse than none."""

    def break_it(optimizer):
        optimizer.param_groups[0]["params"][0].data[0] = math.inf

    at_call(monkeypatch, [AdamW], "step", 3, break_it, after=True)
    with pytest.raises(RunEnded, match="step 3: .*weights that are not finite"):
        opd.distil(config(world, tmp_path / "run", steps=4, save_every=1))
    state = checkpoint(tmp_path / "run")
    assert state["run"]["step"] == 2 and all(x.isfinite().all() for x in state["student"].values())


def test_held_out_prompts_that_break_end_the_run(world, tmp_path):
    """There is no gradient to give it away: no evaluation of NaN passes for a number."""
    cfg = config(world, tmp_path / "run")
    pair, _, held_out = ready(cfg)
    pair.teacher.get_output_embeddings().weight[3] = math.nan
    with pytest.raises(RunEnded, match="not finite"):
        measure.distance(cfg, pair, held_out, opd.per_position(cfg))


def test_what_is_sampled_and_not_scored_ends_the_run_before_step_1(world, tmp_path, monkeypatch):
    """Case 6: training would go on, and not on-policy."""
    plain = measure.rollout

    def off(*args, **how):
        r = plain(*args, **how)
        r.log_p -= 2.8
        return r

    monkeypatch.setattr(measure, "rollout", off)
    with pytest.raises(UserError, match="as sampled and as scored"):
        opd.distil(config(world, tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_cannot_be_computed_is_null(world, tmp_path):
    """Never 0: no answers, no gap, a single held-out prompt."""
    bare = config(world, tmp_path / "bare", prompts=f"{world}/bare.jsonl", steps=2, eval_every=1)
    result = opd.distil(bare)
    assert result["accuracy_before"] is result["gap_recovery"] is None
    assert rows(tmp_path / "bare")[0]["accuracy"] is None
    write_lines(tmp_path / "one.jsonl", PROMPTS[:1])
    one = config(world, tmp_path / "one", eval=str(tmp_path / "one.jsonl"), steps=1)
    result = opd.distil(one)
    assert result["accuracy_after"]["standard_error"] is result["gap_recovery"] is None


def test_a_number_that_is_not_finite_becomes_null_and_keeps_its_name():
    """Every other value stays."""
    good = {"loss": 0.5, "tokens": 3, "by_position": [None], "why": "nan"}
    assert files.finite_or_null(good) == good
    bad = {"held_out": {"advantage": math.nan, "each": (1, math.inf)}, "loss": -math.inf}
    null = {"held_out": {"advantage": None, "each": [1, None]}, "loss": None}
    assert files.finite_or_null(bad) == null


# --- out of memory, and faults of the program ---------------------------------------------------


def too_much(*_, **__):
    """More than any machine has: the CPU's own error."""
    torch.empty(2**48, dtype=torch.uint8)


def gpu_is_full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("fails", [too_much, gpu_is_full])
def test_out_of_memory_is_one_line_and_the_run_goes_on_with_less(
    world, tmp_path, capfd, monkeypatch, fails
):
    """Exit code 1, flags to turn, what is left; --resume may take other ones of memory."""
    with monkeypatch.context() as patch:
        at_call(patch, [opd], "update", 4, fails)
        code, said = ended(config(world, tmp_path / "run", steps=5), capfd)
    assert code == 1 and said.count("\n") == 1
    assert "out of memory" in said and "--micro-batch-tokens" in said and "step 2 is whole" in said
    left = resumed(world, tmp_path / "run", micro_batch_tokens=10)
    assert [row["step"] for row in left["metrics.jsonl"]] == [1, 2, 3, 4, 5]


def test_out_of_memory_at_the_models_leaves_no_folder(world, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(run, "load_pair", too_much)
    code, said = ended(config(world, tmp_path / "run"), capfd)
    assert code == 1 and "out of memory" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [ValueError("max() arg is an empty sequence"), KeyError("x")])
def test_a_fault_of_the_program_keeps_its_traceback(world, tmp_path, monkeypatch, error):
    """Case 10: only what a user can mend is one line; the last checkpoint is whole, too."""

    def fault(*_):
        raise error

    at_call(monkeypatch, [opd], "update", 4, fault)
    with pytest.raises(type(error)) as raised, one_line("opd.py"):
        opd.distil(config(world, tmp_path / "run"))
    assert raised.value is error and "step 2 is whole" in error.__notes__[0]
    assert checkpoint(tmp_path / "run")["run"]["step"] == 2


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UserError("no\n  such"), 2, "x.py: no such\n"),
        (RunEnded("disk full"), 1, "x.py: disk full\n"),
        (KeyboardInterrupt(), 130, "x.py: stopped\n"),
        (Stopped("saved", signal.SIGTERM), 143, "x.py: saved\n"),
    ],
)
def test_each_end_has_its_exit_code_and_line(error, code, said, capsys):
    """2: cannot work; 1: cannot go on; 128 + the signal: stopped."""
    with pytest.raises(SystemExit) as stop, one_line("x.py"):
        raise error
    assert stop.value.code == code and capsys.readouterr().err == said


def test_what_transformers_says_at_loading_reaches_the_user():
    """Case 1: it warns of tokenizers saved by an old version, and nobody saw it."""
    with one_line("x.py"):
        assert transformers.logging.get_verbosity() <= transformers.logging.WARNING


# --- the same twice -----------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_files(world, whole, tmp_path):
    """On one machine, with as many threads, to the last bit; another seed gives others."""
    opd.distil(config(world, tmp_path / "again", steps=5))
    assert outcome(tmp_path / "again") == whole
    opd.distil(config(world, tmp_path / "other", steps=5, seed=1))
    assert outcome(tmp_path / "other")["metrics.jsonl"] != whole["metrics.jsonl"]
