"""What can happen to a run: it is killed, stopped, out of disk or memory, or not finite.

What is on the disk stays intact, and --resume ends as the run that nothing disturbed, bit for bit.
"""

import contextlib
import copy
import errno
import functools
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import PROMPTS, TEMPLATE, Killed, config, ready, rows, tiny, write_lines
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.optim import AdamW
from transformers import AutoTokenizer

import opd
from plumbing import files, measure, run
from plumbing.exits import RunEnded, Stopped, one_line
from plumbing.models import load_pair
from plumbing.run import LOGS, MAY_DIFFER, Run
from recipes import teacher_rollouts
from teacher import UserError

COLD = {
    "steps": 3,
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
    """These runs take copies of a pair that is read once. Reading is tested elsewhere."""
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
    """All that a run leaves behind, to compare: steps, texts, weights, moments, result."""
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
    opd.distil(config(world, out, **COLD))
    return outcome(out)


# --- what happens to it -------------------------------------------------------------------------


def at_call(patch, owners, name, number, act, after=False):
    """Let the number-th call of a function do `act`, too, whichever owner it is called through."""
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


def send(signum):
    return lambda *_, **__: os.kill(os.getpid(), signum)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def ended(world, out, capfd):
    """A function that runs with something happening at a call: -> exit code, the line on stderr."""

    def run_to_its_end(*call, **change):
        with pytest.MonkeyPatch.context() as patch:
            at_call(patch, *call)
            with pytest.raises(SystemExit) as end, one_line("opd.py"):
                opd.distil(config(world, out, **{"steps": 5, **change}))
        said = capfd.readouterr().err
        assert said.count("opd.py: ") == 1
        return end.value.code, said[said.index("opd.py: ") :]

    return run_to_its_end


@pytest.fixture
def resumed(world, out):
    """A function that goes on, with these flags: -> outcome."""

    def go_on(**change):
        opd.distil(config(world, out, **{"steps": 5, "resume": True, **change}))
        return outcome(out)

    return go_on


@pytest.fixture
def cut(world, out):
    """A run that was killed in its fourth step, after the checkpoint of the second."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at_call(patch, [opd], "update", 4, die)
        opd.distil(config(world, out, steps=5))
    return out


NOTHING = ([opd], "update", 0, None)  # happens

# --- killed -------------------------------------------------------------------------------------

PLACES = {
    "a line of a log": ([files, run], "append_lines"),
    "a rename": ([os], "replace"),
    "an update": ([AdamW], "step"),
    "an evaluation": ([measure], "accuracy"),
}
a_line = st.tuples(
    st.just("a line of a log"), st.integers(1, 12), st.sampled_from(["torn", "after"])
)
anywhere = st.tuples(
    st.sampled_from(sorted(PLACES)), st.integers(1, 7), st.sampled_from(["before", "after"])
)


def a_half_line(path, lines):
    with open(path, "a") as file:
        file.write(json.dumps(lines[0])[:20])
    raise Killed


@pytest.mark.parametrize(
    "kills",
    [
        [("a line of a log", 4, "torn")],  # after the checkpoint within the cold start
        [("a rename", 3, "before"), ("an update", 2, "after")],
        [("an evaluation", 2, "before"), ("a line of a log", 7, "after")],
    ],
)
def test_killed_and_resumed_a_run_ends_the_same(world, whole_cold, tmp_path, kills):
    """Some of the places of the next test, and it really dies there."""
    found, deaths = killed(world, tmp_path / "run", kills)
    assert found == whole_cold and deaths == len(kills)


@pytest.mark.slow
@settings(max_examples=20, phases=[Phase.generate])  # to shrink takes minutes
@given(kills=st.lists(st.one_of(a_line, anywhere), min_size=1, max_size=3))
def test_killed_after_any_line_of_a_log_and_resumed_a_run_ends_the_same(
    world, whole_cold, tmp_path_factory, kills
):
    """It may be killed after any line of the answers, the cold start, the metrics or the texts,
    within a line, and before or after a rename, an update or an evaluation.
    """
    found, _ = killed(world, tmp_path_factory.mktemp("killed") / "run", kills)
    assert found == whole_cold


def killed(world, out, kills):
    """A run is killed at these places, and resumed each time: -> its outcome, how often it died."""
    deaths = 0
    for place, number, when in kills:
        act = a_half_line if when == "torn" else die
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            at_call(patch, *PLACES[place], number, act, after=when == "after")
            opd.distil(config(world, out, resume=(out / "config.json").exists(), **COLD))
        if (out / "result.json").exists():
            break  # so many lines were never written
        deaths += 1
    else:
        opd.distil(config(world, out, resume=(out / "config.json").exists(), **COLD))
    return outcome(out), deaths


@pytest.mark.slow
def test_killed_twenty_times_by_the_clock_a_run_ends_the_same(world, tmp_path):
    """kill -9 comes at random moments."""
    draw = random.Random(0)
    how = {**COLD, "steps": 60, "eval_every": 16}
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


@pytest.mark.parametrize(
    "owner, name, number, after, signum",
    [
        pytest.param(opd, "rollout", 3, True, signal.SIGINT, id="in a rollout"),
        pytest.param(opd, "states", 6, False, signal.SIGTERM, id="in grading, by SIGTERM"),
        pytest.param(AdamW, "step", 3, True, signal.SIGHUP, id="after the update, by SIGHUP"),
        pytest.param(run, "append_lines", 3, True, signal.SIGINT, id="after a line"),
        pytest.param(torch, "save", 2, False, signal.SIGINT, id="while saving"),
        pytest.param(measure, "distance", 1, True, signal.SIGINT, id="before the first step"),
    ],
)
def test_a_signal_ends_the_step_and_saves(
    whole, out, ended, resumed, owner, name, number, after, signum
):
    """The exit code is 128 + signal, and --resume ends as the run that nothing disturbed."""
    code, said = ended([owner], name, number, send(signum), after, save_every=50)
    saved = checkpoint(out)["run"]["step"]
    assert code == 128 + signum
    assert f"stopped after step {saved} of 5; the checkpoint of step {saved} is whole" in said
    assert saved == len(rows(out)) and not (out / "result.json").exists()
    assert resumed(save_every=50) == whole


@pytest.mark.parametrize("update, after", [(2, False), (2, True), (3, True)])
def test_a_signal_in_a_cold_start_keeps_its_updates(whole_cold, out, ended, resumed, update, after):
    """An update and its count are saved together, however far away --save-every is."""
    far = {**COLD, "save_every": 50}
    code, said = ended([AdamW], "step", update, send(signal.SIGINT), after, **far)
    state = checkpoint(out)
    assert code == 130 and f"the checkpoint of step {update} of the cold start is whole" in said
    assert state["run"]["cold_step"] == update == state["optimizer"]["state"][0]["step"]
    assert resumed(**COLD) == whole_cold


def test_a_signal_while_the_teacher_answers_waits_for_one_batch(
    whole_cold, out, ended, resumed, monkeypatch
):
    """The answers that are there are kept, and the others are asked for later."""
    monkeypatch.setattr(opd, "teacher_rollouts", functools.partial(teacher_rollouts, at_once=2))
    code, said = ended([opd], "rollout", 1, send(signal.SIGINT), **COLD)
    assert code == 130 and "stopped after step 0 of 3; the checkpoint of step 0 is whole" in said
    assert len((out / "cold_start.jsonl").read_text().splitlines()) == 2
    assert resumed(**COLD) == whole_cold


def test_a_finished_run_that_goes_on_is_not_complete_until_it_ends(world, out, ended, resumed):
    """result.json is there if, and only if, the run is complete."""
    opd.distil(config(world, out, steps=2))
    of_two_steps = (out / "result.json").read_text()
    ended([opd], "update", 1, send(signal.SIGINT), resume=True)
    assert not (out / "result.json").exists()
    assert resumed()["result"]["steps"] == 5
    assert (out / "result-of-step-2.json").read_text() == of_two_steps


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(world, tmp_path, out, resumed):
    """It does not wait for the step. The checkpoint stays intact."""

    def twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    started = time.perf_counter()
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, [AdamW], "step", 4, twice)
        child = in_a_child(config(world, out, steps=5), tmp_path / "said")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == -signal.SIGINT and time.perf_counter() - started < 30
    assert "the checkpoint of step 2 is whole" in (tmp_path / "said").read_text()
    assert checkpoint(out)["run"]["step"] == 2
    assert resumed()["result"]["steps"] == 5


def test_the_signal_handler_writes_past_a_buffer_that_may_be_in_use(world, out, capfd):
    """When a signal comes tqdm may be writing to sys.stderr, where a second write is an error."""

    class InUse:
        def write(self, _):
            raise RuntimeError("reentrant call")

    with Run(config(world, out)) as a_run, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", InUse())
        os.kill(os.getpid(), signal.SIGINT)
        assert a_run.signal == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # for the second one
    assert "stopping after this step" in capfd.readouterr().err


def test_handlers_are_given_back(world, out):
    """Between its runs a script has its own Ctrl-C. Under nohup SIGHUP stays ignored."""
    before = [signal.getsignal(signum) for signum in run.SIGNALS]
    with contextlib.suppress(Killed), Run(config(world, out)):
        assert all(signal.getsignal(signum) not in before for signum in run.SIGNALS)
        raise Killed
    assert [signal.getsignal(signum) for signum in run.SIGNALS] == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Run(config(world, out)):
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) not in before


class Gone(io.StringIO):
    """A stdout that nobody can read any more."""

    def write(self, _):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_reader_that_is_gone_costs_nothing(world, whole, out, monkeypatch):
    """opd.py | head goes on to its end; so does a run whose terminal is closed under nohup."""
    monkeypatch.setattr(sys, "stdout", Gone())
    opd.distil(config(world, out, steps=5))
    assert outcome(out) == whole


def test_a_signal_saves_when_the_reader_is_gone(whole, out, ended, resumed, monkeypatch):
    """Ctrl-C in opd.py | tee log stops tee, too; a closed terminal sends SIGHUP and reads nothing.
    The line of a step comes before its checkpoint, and must not be its end."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Gone())
        code, _ = ended([opd], "rollout", 4, send(signal.SIGINT), save_every=50)
    assert code == 130 and checkpoint(out)["run"]["step"] == 4
    assert resumed(save_every=50) == whole


def test_an_error_ends_with_its_code_when_the_terminal_is_gone(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Gone())
    with pytest.raises(SystemExit) as end, one_line("opd.py"):
        raise UserError("no")
    assert end.value.code == 2


# --- one at a time ------------------------------------------------------------------------------


def test_two_processes_do_not_write_one_run(world, out, monkeypatch):
    """If a run only seems dead, a second one is refused and the first goes on."""
    told = []

    def meanwhile(*_):
        with pytest.raises(UserError, match="another process is using it"):
            opd.distil(config(world, out, resume=True))
        told.append(True)

    at_call(monkeypatch, [opd], "update", 2, meanwhile)
    opd.distil(config(world, out, steps=2))
    assert told == [True] and [row["step"] for row in rows(out)] == [1, 2]


def test_a_second_run_that_is_refused_leaves_the_folder(world, out, monkeypatch):
    """It is still empty while the models of the first are being loaded."""
    load_pair = run.load_pair

    def meanwhile(*words, **how):
        with monkeypatch.context() as patch:
            patch.setattr(run, "load_pair", load_pair)
            with pytest.raises(UserError, match="another process is using it"):
                opd.distil(config(world, out))
        return load_pair(*words, **how)

    monkeypatch.setattr(run, "load_pair", meanwhile)
    opd.distil(config(world, out, steps=1))
    assert len(rows(out)) == 1


def test_a_resume_that_is_late_leaves_the_result_of_the_first(world, cut, resumed, monkeypatch):
    """The folder is read under the lock, so a run that ended meanwhile is seen as complete."""
    at_call(monkeypatch, [run], "alone", 1, lambda *_: resumed())
    with pytest.raises(UserError, match="complete"):
        opd.distil(config(world, cut, steps=5, resume=True))
    assert (cut / "result.json").exists() and len(rows(cut)) == 5


# --- what --resume finds ------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [b"", b'{"step": 4, "loss": 0.1', b"\xff\xfe{\n"])
def test_the_logs_follow_from_the_checkpoint(whole, cut, resumed, tail):
    """What a crash of the machine left in the logs, or beside the checkpoint, is ignored."""
    with open(cut / "metrics.jsonl", "ab") as file:
        file.write(tail)
    (cut / "rollouts.jsonl").unlink()
    aside = cut / "checkpoint" / "state.pt.tmp"
    aside.write_bytes(b"half a checkpoint")
    assert resumed() == whole and not aside.exists()


def test_the_next_day_is_no_other_file(world, tmp_path, out, monkeypatch):
    """A run goes on the next day, though some templates (Llama 3.x, SmolLM3) write the date."""
    monkeypatch.setattr(run, "load_pair", load_pair)
    shutil.copytree(world / "student", tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    for day, change in (("3", {"steps": 2}), ("7", {"steps": 3, "resume": True})):
        tokenizer.chat_template = f"{day} {TEMPLATE}"
        tokenizer.save_pretrained(tmp_path / "student")
        opd.distil(config(world, out, student=f"{tmp_path}/student", **change))
    texts = [json.loads(line)["text"] for line in (out / "rollouts.jsonl").read_text().splitlines()]
    assert [text.split()[0] for text in texts[::2]] == ["3", "3", "7"]


@pytest.mark.parametrize("change", [{}, {"eval": ("held_out.jsonl",)}])
def test_prompts_can_be_left_out_and_held_out_ones_cannot(
    world, tmp_path, out, monkeypatch, change
):
    """A prompt that breaks a run can be taken out. Held-out prompts must stay, or before and after
    could not be compared.
    """
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "held_out.jsonl", PROMPTS[8:])
    write_lines(tmp_path / "prompts.jsonl", PROMPTS[:8])
    change = {**change, "prompts": "prompts.jsonl"}
    opd.distil(config(world, out, steps=1, **change))
    write_lines(tmp_path / "prompts.jsonl", PROMPTS[:4])
    says = pytest.raises(UserError, match="held-out prompts")
    if "eval" in change:
        says = pytest.warns(UserWarning, match="prompts are not those of the steps before")
    with says:
        opd.distil(config(world, out, steps=2, resume=True, **change))


def test_the_answers_of_a_cold_start_stay(world, tmp_path, out, monkeypatch):
    """Other answers in --cold-start-file would be another cold start. Another rate is said."""
    path = tmp_path / "answers.jsonl"
    answers = []
    for row in PROMPTS[:3]:
        asked = {"role": "user", "content": row["prompt"]}
        answers.append({"messages": [asked, {"role": "assistant", "content": "so 7"}]})
    write_lines(path, answers)
    cold = {"cold_start_file": str(path), "steps": 1}
    opd.distil(config(world, out, **cold))
    more = config(world, out, **{**cold, "steps": 2, "cold_start_lr": 0.5}, resume=True)
    with pytest.warns(UserWarning, match="--cold-start-lr 0.5: the run began with 1e-05; cold_st"):
        opd.distil(more)
    answers[0]["messages"][1]["content"] = "so 3"
    write_lines(path, answers)
    with pytest.raises(UserError, match="or those of the cold start, are not those"):
        opd.distil(replace(more, steps=3))


def test_a_checkpoint_of_another_student_is_refused(cut, resumed):
    """It is refused if the directory has the same name, but holds another model."""
    state = checkpoint(cut)
    state["student"] = tiny("llama", hidden=48, vocab_size=16).state_dict()
    torch.save(state, cut / "checkpoint" / "state.pt")
    with pytest.raises(UserError, match="does not fit the model in --student"):
        resumed()


def test_flags_that_decide_a_result_stay(world, cut, resumed, monkeypatch):
    """A path may be written in another way, and flags that decide no result may change."""
    for change in ({"k": 5}, {"seed": 1}, {"teacher": f"{world}/gpt2"}):
        with pytest.raises(UserError, match=f"had --{next(iter(change))} "):
            resumed(**change)
    monkeypatch.chdir(world)
    with pytest.warns(UserWarning, match="--lr 1e-05: the run began with 0.001"):
        resumed(teacher="./teacher", lr=1e-5, device="auto", save_every=3)
    assert [row["lr"] for row in rows(cut)] == [1e-3, 1e-3, 1e-5, 1e-5, 1e-5]
    assert not files.same("a", "b") and not files.same("3", 3)
    assert files.same(("./teacher", "x"), ("teacher", "x"))
    assert files.same(["./teacher", "x"], ("teacher", "x"))  # argparse makes lists
    assert not files.same(("teacher",), ("teacher", "x")) and not files.same(("a",), ("b",))


def test_what_made_a_run_is_on_record(tmp_path, cut, monkeypatch):
    """The record has flags, versions, command, commit, and whether the code was changed since. It
    has null if the code is in no repository. A file that git does not track changes nothing.
    """
    made = files.read_json(cut / "config.json")
    assert {"student", "lr", "command", "commit", "dirty", "python", "torch"} <= made.keys()

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
    git("add", "files.py")
    git("commit", "-m", "one")
    commit, dirty = told()
    assert len(commit) == 12 and dirty is False
    (tmp_path / "files.py").write_text("two")
    assert told() == (commit, True)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert told() == (None, None)


# --- the teacher's answers ----------------------------------------------------------------------


def test_answers_are_asked_for_once(tmp_path):
    """A file that is there is continued where it stops. A torn last line is cut off and asked for
    again. Every other line counts, whatever its "why".
    """
    path = tmp_path / "cold_start.jsonl"
    begun = []

    def batches(start):
        begun.append(start)
        yield [{"why": "kept"}, {"why": "unfinished"}]
        yield []
        yield [{"why": "degenerate"}]

    expected = {"kept": 1, "unfinished": 1, "degenerate": 1}
    assert files.append_answers(path, batches) == expected
    path.write_text(path.read_text() + '{"messages": [], "wh')
    assert files.append_answers(path, lambda start: begun.append(start) or []) == expected
    assert begun == [0, 3]
    assert [row["why"] for _, row in files.json_lines(path)] == list(expected)


@pytest.mark.parametrize("line", ["{}", "[]", "no JSON", '{"why": "bored"}'])
def test_a_line_of_another_kind_is_named(tmp_path, line):
    """A file that was edited by hand is not written over."""
    path = tmp_path / "cold_start.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match="cold_start.jsonl:1 is "):
        files.append_answers(path, lambda start: [])
    assert path.read_text() == line + "\n"


def test_only_the_first_process_writes_the_answers(tmp_path, monkeypatch):
    """Other processes would cut off a good line that is being written."""
    path = tmp_path / "cold_start.jsonl"
    path.write_text('{"mess')
    monkeypatch.setattr(files, "processes", lambda: (1, 2))
    files.append_answers(path, lambda start: [[{"why": "kept"}]])
    assert path.read_text() == '{"mess'


def test_a_teacher_that_finishes_nothing_is_told_of_with_the_flag(world, out, monkeypatch):
    """A cold start without an answer is refused."""
    nothing = {"kept": 0, "unfinished": 3, "degenerate": 1}
    monkeypatch.setattr(files, "append_answers", lambda *_: nothing)
    with pytest.raises(UserError, match="higher --cold-start-max-new-tokens"):
        opd.distil(config(world, out, **COLD))


# --- out of disk --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, reason",
    [
        ("checkpoint/state.pt", "No space left"),
        ("checkpoint/state.pt", "Permission denied"),
        ("checkpoint/state.pt", "Is a directory"),
        ("metrics.jsonl", "No space left"),
        ("result.json", "No space left"),
        ("student", "full"),
    ],
)
def test_a_file_that_cannot_be_written_leaves_the_one_before(
    whole, cut, ended, resumed, name, reason
):
    """The run ends with one line and exit code 1, and the last checkpoint keeps its bytes. There is
    no result.json. When the fault is mended, --resume ends as if nothing had happened.
    """
    before = (cut / "checkpoint" / "state.pt").read_bytes()
    aside = cut / f"{name}.tmp"
    call = NOTHING

    def no_permission(a, b):
        raise PermissionError(errno.EACCES, "Permission denied", str(a))

    def full(*_, **__):  # safetensors has an exception of its own
        raise SafetensorError("I/O error: disk full")

    if reason == "No space left":
        aside.symlink_to("/dev/full")
    elif reason == "Is a directory":
        aside.mkdir()
    elif reason == "Permission denied":
        call = ([os], "replace", 4, no_permission)  # two logs, config.json, the checkpoint
    else:
        call = ([transformers.PreTrainedModel], "save_pretrained", 1, full)
    code, said = ended(*call, resume=True)
    assert code == 1 and f"{cut}/{name} cannot be written: " in said and reason in said
    step = 5 if name in ("result.json", "student") else 2
    assert f"the checkpoint of step {step} is whole, --resume goes on" in said
    if step == 2:
        assert (cut / "checkpoint" / "state.pt").read_bytes() == before
    assert not (cut / "result.json").exists()
    if reason == "Is a directory":
        aside.rmdir()
    assert not aside.exists() and resumed() == whole


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """If writing is stopped, the old file is still there, and nothing beside it."""
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


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 100_000, "1" * 5000])
def test_a_file_that_is_not_what_was_written_is_named(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="a.json is not .*restore or remove it"):
        files.read_json(path)


# --- not finite ---------------------------------------------------------------------------------


@pytest.fixture
def breaks(monkeypatch):
    """A function that makes the teacher's states NaN in the updates with these numbers."""
    plain_states = opd.states
    plain_update = opd.update
    steps = []

    def update(*args):
        steps.append(args[-1] + 1)
        return plain_update(*args)

    def break_at(*numbers):
        def states(model, part):
            h = plain_states(model, part)
            is_teacher = not next(model.parameters()).requires_grad
            return h * math.nan if is_teacher and steps[-1] in numbers else h

        monkeypatch.setattr(opd, "update", update)
        monkeypatch.setattr(opd, "states", states)

    return break_at


def copies(pair):
    return [p.detach().clone() for p in pair.student.parameters()]


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_a_step_that_is_not_finite_is_skipped_and_counted(world, out, capfd, monkeypatch, breaks):
    """Nothing is updated, null stands for the numbers, and the run goes on."""
    breaks(2)
    students = []
    for step in (1, 2, 3, 4):
        at_call(monkeypatch, [opd], "update", step, lambda _, p, *x: students.append(copies(p)))
    result = opd.distil(config(world, out, save_every=1))
    logged = rows(out)
    assert ["skipped" in row for row in logged] == [False, True, False, False]
    assert [row["skipped_steps"] for row in logged] == [0, 1, 1, 1]
    assert equal(students[1], students[2]) and not equal(students[2], students[3])
    assert logged[1]["loss"] is logged[1]["reverse_kl"] is logged[1]["grad_norm"] is None
    assert "NaN" not in (out / "metrics.jsonl").read_text()
    assert "step 2 skipped" in capfd.readouterr().out and result["skipped_steps"] == 1


def test_an_infinite_gradient_of_a_finite_loss_is_no_update_either(world, out, monkeypatch):
    """The norm of the gradient decides, and not the loss."""
    cfg = config(world, out)
    pair, train, _ = ready(cfg)
    before = copies(pair)
    plain = opd.clip_grad_norm_
    monkeypatch.setattr(opd, "clip_grad_norm_", lambda *a, **how: plain(*a, **how) * math.inf)
    _, row = opd.update(cfg, pair, opd.adamw(cfg, pair.student), train[:3], 0)
    assert "skipped" in row and math.isfinite(row["loss"]) and not math.isfinite(row["grad_norm"])
    assert equal(before, pair.student.parameters())
    assert all(p.grad is None for p in pair.student.parameters())


def test_three_in_a_row_end_the_run_before_anything_is_saved(
    out, ended, resumed, monkeypatch, breaks
):
    """The exit code is 1, and the checkpoint is from before the first of them. --resume may lower
    the learning rate. Two in a row and one later do not end a run.
    """
    breaks(1, 2, 4, 6, 7, 8)
    code, said = ended(*NOTHING, steps=9, save_every=1)
    assert code == 1 and "the third in a row" in said and "step 5 is whole" in said
    assert checkpoint(out)["run"]["step"] == 5
    breaks(0)
    resumed(steps=9, save_every=1, lr=1e-4)
    logged = rows(out)
    assert [row["step"] for row in logged] == list(range(1, 10))
    assert logged[-1]["skipped_steps"] == 3
    assert [row["lr"] for row in logged] == [1e-3] * 5 + [1e-4] * 4


def test_weights_that_an_update_broke_are_never_a_checkpoint(out, ended):
    """From such a checkpoint a run could only go on to NaN."""

    def break_it(optimizer):
        optimizer.param_groups[0]["params"][0].data[0] = math.inf

    code, said = ended([AdamW], "step", 3, break_it, True, save_every=1)
    assert code == 1 and "step 3: " in said and "weights that are not finite" in said
    state = checkpoint(out)
    assert state["run"]["step"] == 2 and all(x.isfinite().all() for x in state["student"].values())


def test_held_out_prompts_that_break_end_the_run(world, out):
    """An evaluation that is not finite is not taken for a number, though no gradient tells."""
    cfg = config(world, out)
    pair, _, held_out = ready(cfg)
    pair.teacher.get_output_embeddings().weight[3] = math.nan
    with pytest.raises(RunEnded, match="not finite"):
        measure.distance(cfg, pair, held_out, opd.loss_and_metrics(cfg, pair.eos_ids))


def test_a_reward_that_is_not_finite_is_null_and_no_reason_to_stop(world, out, monkeypatch):
    """trl#5594: if the teacher rules out a sampled token, the reward is -inf, and is written as
    null. The loss stays finite.
    """
    pair = load_pair(f"{world}/student", f"{world}/teacher", device="cpu")
    ruled_out = torch.arange(4, 12)
    head = pair.teacher.get_output_embeddings()
    head.register_forward_hook(lambda *x: x[-1].index_fill(-1, ruled_out, -math.inf))
    monkeypatch.setattr(run, "load_pair", lambda *_, **__: pair)
    opd.distil(config(world, out, objective="full"))
    for row in rows(out):
        assert row["reward"] is None and "skipped" not in row
        assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])


def test_what_is_sampled_and_not_scored_ends_the_run_before_step_1(out, ended, monkeypatch):
    """If it went on, training would not be on-policy."""
    plain = measure.rollout

    def off(*args, **how):
        r = plain(*args, **how)
        r.log_p -= 2.8
        return r

    monkeypatch.setattr(measure, "rollout", off)
    code, said = ended(*NOTHING)
    assert code == 2 and "as sampled and as scored" in said
    assert not (out / "metrics.jsonl").exists()


def test_a_number_that_is_not_finite_becomes_null_and_keeps_its_name():
    """Every other value stays as it is."""
    good = {"loss": 0.5, "tokens": 3, "by_position": [None], "why": "nan"}
    assert files.finite_or_null(good) == good
    bad = {"held_out": {"advantage": math.nan, "each": (1, math.inf)}, "loss": -math.inf}
    null = {"held_out": {"advantage": None, "each": [1, None]}, "loss": None}
    assert files.finite_or_null(bad) == null


# --- out of memory, and faults of the program ---------------------------------------------------


def too_much(*_, **__):
    """Ask for more memory than any machine has; the CPU raises its own error."""
    torch.empty(2**48, dtype=torch.uint8)


def gpu_is_full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("fails", [too_much, gpu_is_full])
def test_out_of_memory_is_one_line_and_the_run_goes_on_with_less(ended, resumed, fails):
    """The line names flags to change and what is left. --resume may use less memory."""
    code, said = ended([opd], "update", 4, fails)
    assert code == 1 and said.count("\n") == 1
    assert "out of memory" in said and "--micro-batch-tokens" in said and "step 2 is whole" in said
    left = resumed(micro_batch_tokens=10)
    assert [row["step"] for row in left["metrics.jsonl"]] == [1, 2, 3, 4, 5]


def test_out_of_memory_at_the_models_leaves_no_folder(out, ended):
    code, said = ended([run], "load_pair", 1, too_much)
    assert code == 1 and "out of memory" in said and not out.exists()


@pytest.mark.parametrize("error", [ValueError("max() arg is an empty sequence"), KeyError("x")])
def test_a_fault_of_the_program_keeps_its_traceback(world, out, monkeypatch, error):
    """Only what a user can mend is one line. The last checkpoint stays intact here, too."""

    def fault(*_):
        raise error

    at_call(monkeypatch, [opd], "update", 4, fault)
    with pytest.raises(type(error)) as raised, one_line("opd.py"):
        opd.distil(config(world, out))
    assert raised.value is error and "step 2 is whole" in error.__notes__[0]
    assert checkpoint(out)["run"]["step"] == 2


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
    """The code is 2 if it cannot work, 1 if it cannot go on, 128 + the signal if it was stopped."""
    with pytest.raises(SystemExit) as stop, one_line("x.py"):
        raise error
    assert stop.value.code == code and capsys.readouterr().err == said


# --- the same twice -----------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_files(world, whole, tmp_path):
    """On one machine, with as many threads, they agree to the last bit. Another seed differs."""
    opd.distil(config(world, tmp_path / "again", steps=5))
    assert outcome(tmp_path / "again") == whole
    opd.distil(config(world, tmp_path / "other", steps=5, seed=1))
    assert outcome(tmp_path / "other")["metrics.jsonl"] != whole["metrics.jsonl"]
