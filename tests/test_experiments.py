"""The experiments: what was run is kept, the four words mean what lab.py says, and loops and probes
measure what they claim to measure."""

import collections
import copy
import dataclasses
import json
import math
import re
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import bench
import cost
import followups
import forecast
import lab
import mechanism
import own_loop
import phenomenology
import pytest
import recipe
import torch
import tour
import toy
from conftest import ROOT, WORDS, Killed, tiny_pair
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import analysis
import opd
from analysis import auroc
from loss import full_vocab, top_k
from plumbing import files
from plumbing.flags import PRESETS, Config
from plumbing.prompts import load_prompts
from rollout import batch, from_texts, rollout
from teacher import UserError, eos_ids, log_probs

RESULTS = ROOT / "experiments" / "results"
OF_THE_TOY = (phenomenology, mechanism, recipe, cost, followups, forecast)


# --- results of the toy, each a file ------------------------------------------------------------


@pytest.fixture
def a_lab(tmp_path):
    return lab.Lab(3, tmp_path / "worlds", tmp_path / "results")


def test_a_result_is_made_once_and_kept_with_what_made_it(a_lab, monkeypatch):
    """There is a file for each name and seed, and NaN is null in it."""
    command = "x.py --out /here --worlds '/over there' --seeds 3"
    origin = {"commit": "abc", "dirty": False, "command": command}
    monkeypatch.setattr(files, "provenance", lambda: dict(origin))
    asked = {"steps": 3, "part": (1, 2)}
    made = a_lab.once("sft, opd", asked, lambda: {"found": [0.5, math.nan]})
    assert made["found"][0] == 0.5
    path = a_lab.results / "toy" / "sft-opd-3.json"
    kept = json.loads(path.read_text())
    assert kept.pop("seconds") >= 0
    assert kept == {
        "name": "sft, opd",
        "seed": 3,
        "measured in": "float32",
        "asked": {"steps": 3, "part": [1, 2]},
        "found": [0.5, None],
        "commit": "abc",
        "dirty": False,
        "command": "x.py --seeds 3",
    }
    again = a_lab.once("sft, opd", asked, lambda: 1 / 0)  # is not called
    assert again["found"] == [0.5, None]
    a_lab.seed = 4
    a_lab.once("sft, opd", asked, lambda: {"found": 1})
    assert len(list(path.parent.iterdir())) == 2


def test_a_result_of_other_settings_is_refused(a_lab):
    """The message names the file to remove."""
    a_lab.once("opd", {"steps": 3}, dict)
    with pytest.raises(SystemExit, match="opd-3.json was made with other settings; remove it"):
        a_lab.once("opd", {"steps": 4}, dict)


def test_a_result_may_have_been_made_in_another_dtype(a_lab):
    """Some CPUs compute in bfloat16, others do not: the result of an arm is the same."""
    a_lab.once("opd", {"steps": 3, "dtype": "bfloat16"}, lambda: {"found": 1})
    again = a_lab.once("opd", {"steps": 3, "dtype": "float32"}, lambda: 1 / 0)  # is not called
    assert again["asked"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("when", ["made", "written"])
def test_a_result_that_was_killed_is_made_again_and_none_is_half_there(a_lab, monkeypatch, when):
    """There is no file before its last byte is on the disk."""

    def dies(*_):
        raise Killed

    with monkeypatch.context() as patch:
        if when == "written":
            patch.setattr(files.os, "fsync", dies)
        with pytest.raises(Killed):
            a_lab.once("opd", {}, dies if when == "made" else dict)
    assert not list(a_lab.results.rglob("*.json*"))
    assert a_lab.once("opd", {}, lambda: {"found": 1})["found"] == 1


def test_what_decides_an_arm_is_the_preset_and_what_the_arm_says(a_lab):
    """An arm's own settings win over the preset of the toy. A loop of its own is named."""
    asked = a_lab.asked(lab.arm("student", "teacher", lr=0.5, support="intersection"))
    expected = {**PRESETS["toy"], "student": "student", "teacher": "teacher", "steps": 100}
    assert asked == {**expected, "lr": 0.5, "support": "intersection"}
    without = phenomenology.ARMS["no-teacher"]
    assert a_lab.asked(without) == {**expected, "train": "train_without_teacher"}


def test_quick_takes_a_few_steps_of_everything(a_lab):
    """It never takes more steps than were asked for."""
    a_lab.quick = True
    for steps, taken in ((400, 4), (100, 4), (0, 0)):
        asked = a_lab.asked(lab.arm("student", "other", **recipe.FEW, steps=steps))
        assert (asked["steps"], asked["batch_size"]) == (taken, 8)
        assert (asked["cold_start"], asked["cold_start_steps"]) == (16, 2)
    assert "cold_start" not in a_lab.asked(lab.arm("student", "other"))


def test_one_name_stands_for_one_run_in_every_script(a_lab):
    """Scripts that share an arm ask for the same settings. Nothing is run twice under two names,
    and no two names share a file."""
    settings = {}
    for script in OF_THE_TOY:
        for name, arm in script.ARMS.items():
            asked = (a_lab.asked(arm), arm.exams)
            assert settings.setdefault(name, asked) == asked
        for name, (function, given_) in getattr(script, "PROBES", {}).items():
            asked = (function.__name__, given_)
            assert settings.setdefault(name, asked) == asked
    distinct = {json.dumps(asked, sort_keys=True) for asked in settings.values()}
    assert len(distinct) == len(settings)
    assert len({lab.slug(name) for name in settings}) == len(settings)
    for script in (mechanism, cost, followups, forecast):
        assert script.ARMS["success"] is phenomenology.ARMS["success"] or script is forecast


def test_every_model_of_an_arm_is_one_of_a_world():
    """The name of a model stands for one way to make it."""
    known = dict(toy.MODELS)
    for script in (recipe, forecast):
        for name, how in script.MODELS.items():
            assert known.setdefault(name, how) == how
    for script in OF_THE_TOY:
        there = {*toy.MODELS, *getattr(script, "MODELS", {})}
        if script is followups:
            there.add("teacher-unk")  # of followups.prepare
        for arm in script.ARMS.values():
            assert {arm.student, arm.teacher} <= there


# --- runs of the toy ----------------------------------------------------------------------------


def world_of(folder, *names):
    """A Lab with 32 prompts, 8 held-out ones, and models of random weights by these names."""
    made = lab.Lab(3, folder, folder / "results")
    toy.write_questions(made.world, 3, train=32, held_out=8)
    for seed, name in enumerate(names):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(toy, "SIZES", {"small": (16, 1)})
            toy.new_model("small", seed).save_pretrained(made.world / name)
        toy.tokenizer().save_pretrained(made.world / name)
    return made


SHORT = dict(steps=4, batch_size=4, max_new_tokens=8, save_every=2)
ONE_STEP = {**SHORT, "steps": 1}


@pytest.fixture
def short(monkeypatch):
    """Responses have eight tokens at most."""
    monkeypatch.setattr(lab.Lab, "new_tokens", 8)


@pytest.fixture
def unmeasured(monkeypatch):
    """Accuracies are not measured."""
    monkeypatch.setattr(lab.Lab, "accuracies", lambda *_: None)


def test_a_killed_arm_goes_on_and_ends_as_one_that_nothing_stopped(
    tmp_path, monkeypatch, short, unmeasured
):
    """It goes on from its checkpoint. A finished run is not run again."""
    update = opd.update
    done = []

    def counted(cfg, pair, optimizer, rows, step, dies_at=None):
        if step == dies_at:
            raise Killed
        done.append(step)
        return update(cfg, pair, optimizer, rows, step)

    arm = lab.arm("student", "teacher", **SHORT)
    whole = world_of(tmp_path / "whole", "student", "teacher").run("arm", arm)
    cut = world_of(tmp_path / "cut", "student", "teacher")
    monkeypatch.setattr(opd, "update", partial(counted, dies_at=3))
    with pytest.raises(Killed):
        cut.run("arm", arm)
    monkeypatch.setattr(opd, "update", counted)
    done.clear()
    found = cut.run("arm", arm)
    assert done == [2, 3]
    for part in ("curves", "held_out_before", "held_out_after"):
        assert found[part] == whole[part]
    assert len(found["curves"]["loss"]) == 4
    (cut.results / "toy" / "arm-3.json").unlink()  # of a run that was measured in vain
    assert cut.run("arm", arm)["curves"] == whole["curves"]
    assert done == [2, 3]


def test_a_run_of_other_settings_is_not_taken_for_an_arm(tmp_path, short, unmeasured):
    """A run is refused if its settings differ. Files are compared by name: a world may be moved."""
    here = world_of(tmp_path / "here", "student", "teacher")
    here.run("arm", lab.arm("student", "teacher", **ONE_STEP))
    result = tmp_path / "here" / "results" / "toy" / "arm-3.json"
    result.unlink()
    with pytest.raises(SystemExit, match="runs/arm holds a run of another lr; remove it"):
        here.run("arm", lab.arm("student", "teacher", **ONE_STEP, lr=0.5))
    (tmp_path / "here").rename(tmp_path / "there")
    there = lab.Lab(3, tmp_path / "there", tmp_path / "there" / "results")
    there.run("arm", lab.arm("student", "teacher", **ONE_STEP))


def test_a_student_that_is_trained_again_is_measured_again(tmp_path, short):
    """A loop of its own has no checkpoint: what a killed one left counts for nothing."""
    here = world_of(tmp_path, "student", "teacher")
    folder = here.folder("arm") / "student"
    folder.mkdir(parents=True)
    stale = folder / f"accuracy-float32-{files.digest(toy.PLAIN)[:8]}.json"
    stale.write_text('{"T 1": "stale"}')
    assert here.accuracies(folder, toy.PLAIN) == {"T 1": "stale"}
    arm = lab.Arm("student", "teacher", ONE_STEP, train=own_loop.reverse_by_student)
    assert here.run("arm", arm)["accuracy"]["after"]["T 1"] != "stale"


def test_a_student_is_trained_again_if_it_is_not_there(a_lab, monkeypatch):
    """The result may be there although the run was removed."""

    def train(name, arm):
        folder = a_lab.folder(name) / "student"
        folder.mkdir(parents=True)  # fails if it is trained twice
        (folder / "config.json").touch()

    monkeypatch.setattr(a_lab, "train", train)
    for _ in range(2):
        assert a_lab.trained("sft, opd", None) == a_lab.world / "runs" / "sft-opd" / "student"


def test_every_model_is_measured_once_with_the_same_random_numbers(tmp_path, short, monkeypatch):
    """Each held-out prompt is answered once, and a bit is kept for it."""
    here = world_of(tmp_path, "student", "twin", "teacher")
    for file in (here.world / "student").glob("model*"):
        (here.world / "twin" / file.name).write_bytes(file.read_bytes())
    asked = []

    def answered(pair, rows, *, n, seed, max_new_tokens, **how):
        asked.append((len(rows), n, seed, how))
        length = rows[0]["ids"][0] + sum(len(row["ids"]) for row in rows)
        generator = torch.Generator().manual_seed(length + round(10 * how["temperature"]))
        return torch.rand(len(rows), n, generator=generator) < 0.5, None

    monkeypatch.setattr(lab, "answered", answered)
    mine = here.accuracies(here.world / "student", toy.PLAIN)
    assert here.accuracies(here.world / "twin", toy.PLAIN) == mine
    assert [how for *_, how in asked] == 2 * list(toy.WAYS.values())
    for count, n, seed, _ in asked:
        assert (count, n, seed) == (8, 1, 3)
    for found in mine.values():
        assert found["mean"] == lab.bits(found["right"]).mean()
        assert found["prompts"] == 8
    assert here.accuracies(here.world / "student", toy.PLAIN) == mine
    assert len(asked) == 6
    assert here.accuracies(here.world / "student", toy.POLITE) != mine  # measured apart


def test_an_arm_is_measured_under_the_templates_of_its_exams(tmp_path, monkeypatch):
    """Under each, the student is measured before and after, and the teacher; 5.2 asks for two."""
    here = world_of(tmp_path, "student", "teacher")
    monkeypatch.setattr(lab, "run_opd", lambda lab, arm, folder: {"curves": {}})
    monkeypatch.setattr(here, "accuracies", lambda folder, template: (folder.name, template))
    made = here.train(
        "arm", recipe.Arm("student", "teacher", exams={"a": toy.PLAIN, "b": toy.POLITE})
    )
    assert made == {
        "curves": {},
        "a": {
            "before": ("student", toy.PLAIN),
            "after": ("student", toy.PLAIN),
            "teacher": ("teacher", toy.PLAIN),
        },
        "b": {
            "before": ("student", toy.POLITE),
            "after": ("student", toy.POLITE),
            "teacher": ("teacher", toy.POLITE),
        },
    }


def steps_of(count, every=10):
    """Rows of metrics.jsonl, accuracy at every tenth."""
    rows = []
    for step in range(1, count + 1):
        rows.append({"step": step, "loss": step / 3, "tokens": 7})
        if step % every == 0:
            rows[-1]["accuracy"] = step / 1000
    return rows


@pytest.mark.parametrize("count", [0, 1, 100, 101, 400, 499])
def test_a_curve_keeps_a_hundred_points_and_the_last(count):
    """Numbers have five digits. Accuracy has steps of its own and loses no point."""
    found = lab.curves(steps_of(count))
    every = max(1, math.ceil(count / 100))
    kept = list(range(1, count + 1, every))
    if count and kept[-1] != count:
        kept.append(count)
    assert found["step"] == kept
    assert len(kept) <= 101
    assert found["loss"] == [float(f"{step / 3:.5g}") for step in kept]
    assert found["reverse_kl"] == len(kept) * [None]
    assert found["evaluated"] == list(range(10, count + 1, 10))
    assert found["accuracy"] == [step / 1000 for step in found["evaluated"]]
    assert set(found) == {*lab.CURVES, "evaluated"}


# --- the command line of a script ---------------------------------------------------------------


def right(*answers):
    """An accuracy of these answers, 1 or 0."""
    answers = torch.tensor(answers, dtype=torch.float64)
    return {
        "mean": answers.mean().item(),
        "prompts": len(answers),
        "right": lab.hexadecimal(answers),
    }


def run_of(seed, **accuracies):
    """A result: before=, after=, teacher= lists of 1 and 0, the same in every way."""
    found = {when: {way: right(*x) for way in toy.WAYS} for when, x in accuracies.items()}
    return {"seed": seed, "accuracy": found}


HALF = 32 * [1, 0]  # of 64 prompts


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A script of two arms and a probe, whose runs cost nothing: a function of its flags.

    -> what was run, (seed, name).
    """
    ran = []

    def train(self, name, arm):
        ran.append((self.seed, name))
        return run_of(self.seed, before=HALF, after=HALF, teacher=HALF)

    def probe(lab, prompts):
        ran.append((lab.seed, "probe"))
        return {"found": prompts}

    def judge(results):
        seeds = [run["seed"] for run in results["one"]]
        return [lab.Finding("3.1", "a claim", "the paper", f"in seeds {seeds}", lab.HOLDS)]

    def call(*flags, worlds=True):
        ran.clear()
        folders = ["--out", str(tmp_path / "out"), "--worlds", str(tmp_path / "worlds")]
        monkeypatch.setattr(sys, "argv", ["experiments/some.py", *folders, *flags])
        arms = {"one": lab.arm("student", "teacher"), "two": lab.arm("student", "bigger")}
        lab.main("About.", arms, judge, probes={"probe": (probe, {"prompts": 5})})
        return list(ran)

    monkeypatch.setattr(lab.Lab, "train", train)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    return call


def test_a_script_runs_what_is_missing_and_reports(script, tmp_path, capsys):
    """It reports seeds that have all results. --only reports nothing, --report runs nothing."""
    assert script("--only", "one", "--seeds", "0", "1", "2") == [(0, "one"), (1, "one"), (2, "one")]
    assert not (tmp_path / "out" / "some.txt").exists()
    with pytest.raises(SystemExit, match="no seed has all results yet; two is missing"):
        script("--report")
    assert script("--seeds", "0", "2") == [(0, "two"), (0, "probe"), (2, "two"), (2, "probe")]
    said = capsys.readouterr().out
    assert "3.1        holds            a claim: in seeds [0, 2]" in said
    assert script("--report") == []
    assert (tmp_path / "out" / "some.txt").read_text() == said == capsys.readouterr().out
    made = tmp_path / "out" / "toy" / "probe-2.json"
    made.unlink()
    assert script("--seeds", "2") == [(2, "probe")]
    with pytest.raises(SystemExit, match="2"):
        script("--only", "three")
    assert "three: there are one, two, probe" in capsys.readouterr().err


def test_quick_keeps_nothing_and_changes_nothing(script, tmp_path, capsys):
    """It keeps neither results nor worlds, and changes no global."""
    before = copy.deepcopy((PRESETS, toy.FULL, toy.MODELS, toy.WAYS, toy.SIZES, lab.CURVES))
    assert script("--quick") == [(0, "one"), (0, "two"), (0, "probe")]
    assert "a claim: in seeds [0]" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "worlds").exists()
    assert (PRESETS, toy.FULL, toy.MODELS, toy.WAYS, toy.SIZES, lab.CURVES) == before


def test_the_bench_makes_its_toy_by_a_scale(monkeypatch, tmp_path):
    """--quick changes no global of another module."""
    asked = []
    monkeypatch.setattr(toy, "make_missing", lambda world, **how: asked.append(how["scale"]))
    monkeypatch.setattr(bench, "write_text", lambda *_: None)
    before = copy.deepcopy(PRESETS)
    flags = ["--parts", "trl", "--world", str(tmp_path), "--out", str(tmp_path / "out")]
    for more in ([], ["--quick"]):
        monkeypatch.setattr(sys, "argv", ["bench.py", *flags, *more])
        bench.main()
    assert asked == [toy.FULL, toy.QUICK]
    assert PRESETS == before


@pytest.mark.parametrize("words", [["--device", "cuda"], ["--device=cuda"]])
def test_the_bench_of_a_gpu_is_another_one(words, monkeypatch):
    """However the flag is written; one that is cut short is refused."""
    ran = []
    monkeypatch.setitem(sys.modules, "gpu", SimpleNamespace(main=ran.append))
    monkeypatch.setattr(sys, "argv", ["bench.py", *words])
    bench.main()
    assert ran == [words]
    monkeypatch.setattr(sys, "argv", ["bench.py", "--dev", "cuda"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()


def test_the_table_has_a_line_for_each_run(capsys):
    """The line has accuracies before, after, and of the teacher, in each of three ways. Below
    stands what made the results."""
    made = run_of(7, before=[0, 0, 0, 0], after=[1, 1, 0, 0], teacher=[1, 1, 1, 0])
    made.update(commit="abc", dirty=True, seconds=3.4)
    held_out = {"overlap_ratio": 0.5, "reverse_kl": 0.25}
    made["held_out_before"] = held_out
    made["held_out_after"] = {name: x / 2 for name, x in held_out.items()}
    probe = {"seed": 8, "commit": "def", "dirty": False, "seconds": 2}
    results = {"arm": [made], "probe": [probe]}
    title, line = lab.table(results, ["arm"])
    assert line.split()[:2] == ["arm", "7"]
    assert line.split()[2:11] == 3 * ["0.000", "0.500", "0.750"]
    assert line.endswith("0.500 -> 0.250  0.2500 -> 0.1250")
    assert title.split()[:2] == ["arm", "seed"]
    assert lab.provenance(results)[-1] == (
        "seeds 7, 8; commits abc and changes, def; 5 CPU seconds, those of arms that other "
        "scripts share included"
    )
    assert "One answer to each of 4 held-out prompts." in lab.provenance(results)[1]


# --- four words ---------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits_and_hexadecimal_digits_are_inverse(answers):
    """They are so for any length. The last digit is filled up with zeros."""
    digits = lab.hexadecimal(torch.tensor(answers).unsqueeze(1))
    found = lab.bits(digits).tolist()
    assert len(digits) == math.ceil(len(answers) / 4)
    assert found[: len(answers)] == answers
    assert sum(found[len(answers) :]) == 0


def test_a_difference_and_its_noise_by_hand_over_prompts():
    """On one seed the differences are 1 0 1 0, on the other 0 0 1 1. Both means are 1/2, with
    variances of 1/12. So the mean is 1/2, and the noise sqrt(1/12 + 1/12), none over seeds."""
    ours = [run_of(0, after=[1, 1, 1, 0]), run_of(1, after=[1, 0, 1, 1])]
    theirs = [run_of(0, after=[0, 1, 0, 0]), run_of(1, after=[1, 0, 0, 0])]
    found = lab.difference(ours, theirs, "T .7")
    assert found.mean == pytest.approx(1 / 2)
    assert found.noise == pytest.approx((1 / 12 + 1 / 12) ** 0.5)
    assert str(found) == "+0.500 ± 0.408 (+0.500, +0.500)"
    with pytest.raises(ValueError):
        lab.difference(ours, theirs[:1], "T .7")  # a seed is missing
    with pytest.raises(AssertionError):
        lab.difference(ours, theirs[::-1], "T .7")  # the seeds differ


def test_the_noise_is_that_over_seeds_if_they_differ_by_more_than_their_prompts_explain():
    """Seeds of .3, 0 and 0 with hardly any noise of their own: the standard deviation is .3 /
    sqrt(3), the standard error .1. By Student's t, with two degrees of freedom, 95 % lie within 4.3
    of these. Such a mean is not surely above 0; neither is one of .3, .1 and .2."""
    found = lab.mean_over_seeds([0.3, 0.0, 0.0], [1e-6] * 3)
    assert found.mean == pytest.approx(0.1)
    assert found.noise == pytest.approx(0.43)
    assert lab.above(found) == "undecided"
    assert lab.above(lab.mean_over_seeds([0.3, 0.1, 0.2], [1e-6] * 3)) == "undecided"
    alike = lab.mean_over_seeds([0.1, 0.1, 0.1], [1e-6] * 3)
    assert alike.noise == pytest.approx(2 * (3e-6) ** 0.5 / 3)
    assert lab.above(alike) == "holds"
    assert lab.mean_over_seeds([0.3], [1e-4]).noise == pytest.approx(0.02)


def test_with_more_than_ten_seeds_the_noise_is_that_of_ten_at_least():
    means = [0.1 * i for i in range(12)]
    error = torch.tensor(means, dtype=torch.float64).std().item() / 12**0.5
    noise = lab.mean_over_seeds(means, [0.0] * 12).noise
    assert 2.2 * error < noise < 2.27 * error


def test_the_quantiles_are_those_of_students_t():
    """A mean of n normal numbers lies within t standard errors of its expectation 95 times of 100.
    With 100,000 draws the share is off by .0007."""
    generator = torch.Generator().manual_seed(0)
    for n, t in lab.STUDENT_T.items():
        x = torch.randn(100_000, n, generator=generator, dtype=torch.float64)
        inside = x.mean(1).abs() <= t * x.std(1) / n**0.5
        assert inside.double().mean() == pytest.approx(0.95, abs=0.003)


def test_a_difference_of_one_arm_with_itself_and_a_gain():
    """An arm is compared with its teacher and its own start, also in another exam."""
    made = [run_of(0, before=[0, 0, 1, 1], after=[1, 1, 1, 0], teacher=[1, 1, 1, 1])]
    assert lab.difference(made, made, "greedy", than="teacher").mean == -0.25
    assert lab.gain(made, "greedy").mean == 0.25
    assert lab.difference(made, made, "greedy", "teacher", "before").mean == 0.5
    made[0]["polite"] = {"before": {"T 1": right(0, 0)}, "after": {"T 1": right(1, 1)}}
    assert lab.gain(made, "T 1", exam="polite").mean == 1


WORDS_OF = (  # mean, noise; is it above 0? below? none?
    (0.10, 0.02, "holds", "contradicted", "contradicted"),
    (-0.10, 0.02, "contradicted", "holds", "contradicted"),
    (0.01, 0.02, "contradicted", "contradicted", "holds"),  # shown equal
    (0.00, 0.00, "contradicted", "contradicted", "holds"),
    (0.03, 0.01, "contradicted", "contradicted", "holds"),  # surely above, by less than counts
    (0.04, 0.02, "undecided", "contradicted", "undecided"),  # surely above, perhaps by enough
    (0.01, 0.04, "undecided", "undecided", "undecided"),  # within noise
    (0.06, 0.02, "holds", "contradicted", "undecided"),
    (-0.10, 0.20, "undecided", "undecided", "undecided"),
)


@pytest.mark.parametrize("mean, noise, above, below, equal", WORDS_OF)
def test_the_word_for_a_difference(mean, noise, above, below, equal):
    """Contradicted: the opposite is shown, or equality where a difference is claimed."""
    x = lab.Difference(mean, noise)
    assert lab.above(x) == above
    assert lab.below(x) == below
    assert lab.equal(x) == equal


def test_the_word_for_a_bound():
    """Surely more, surely less, or not sure; the bound itself is not more."""
    assert lab.more_than(lab.Difference(0.7, 0.05), 0.6) == "holds"
    assert lab.more_than(lab.Difference(0.5, 0.05), 0.6) == "contradicted"
    assert lab.more_than(lab.Difference(0.6, 0.0), 0.6) == "undecided"
    assert lab.more_than(-lab.Difference(0.02, 0.01), -lab.MARGIN) == "holds"  # no worse
    assert lab.more_than(-lab.Difference(0.04, 0.02), -lab.MARGIN) == "undecided"


def test_more_data_never_takes_a_finding_back():
    """As the noise shrinks, a word other than undecided stays what it is."""
    for mean in torch.linspace(-0.2, 0.2, 81).tolist():
        for question in (lab.above, lab.below, lab.equal):
            words = []
            for noise in torch.linspace(0.3, 0, 61).tolist():
                words.append(question(lab.Difference(mean, noise)))
            decided = [word for word in words if word != lab.UNDECIDED]
            assert decided or abs(abs(mean) - lab.MARGIN) < 1e-6
            assert len(set(decided)) <= 1


def test_the_word_for_seeds_and_for_several_words():
    """A fact may be true on all seeds, on none or on some. Of several words the worst counts."""
    assert lab.every_seed([True, True]) == "holds"
    assert lab.every_seed(x > 1 for x in (0, 1)) == "contradicted"
    assert lab.every_seed([True, False]) == "undecided"
    assert lab.reaches([0.8, 1.0], 0.8) == "holds"
    assert lab.reaches([0.7, 1.0], 0.8) == "undecided"
    assert lab.reaches([math.nan, 1.0], 0.8) == lab.NOT_ASKABLE
    assert lab.together("holds", "holds") == "holds"
    assert lab.together("holds", "undecided") == "undecided"
    assert lab.together("undecided", "contradicted", "holds") == "contradicted"
    assert lab.together("contradicted", lab.NOT_ASKABLE) == lab.NOT_ASKABLE


def test_of_two_arms_that_are_right_nearly_always_neither_can_be_better():
    """A ceiling is no finding. One arm below it is enough to ask."""
    full = run_of(0, before=HALF, after=64 * [1], teacher=HALF)
    half = run_of(0, before=HALF, after=HALF, teacher=HALF)
    assert lab.ends_above([full], [full], "greedy") == lab.NOT_ASKABLE
    assert lab.ends_above([full], [half], "greedy") == "holds"
    assert lab.ends_above([half], [full], "greedy") == "contradicted"
    assert lab.ends_above([half, half], [full, full], "greedy") == "contradicted"
    assert lab.ends_above([full, half], [full, full], "greedy") == "undecided"


def test_recovery_is_a_share_of_a_sure_lead():
    """If the lead is within noise there is no recovery."""
    made = run_of(0, before=32 * [0, 0], after=24 * [1, 0] + 8 * [0, 0], teacher=HALF)
    assert lab.recovery(made, "greedy") == pytest.approx(0.75)
    made = run_of(0, before=63 * [0] + [1], after=64 * [1], teacher=62 * [0] + [1, 1])
    assert math.isnan(lab.recovery(made, "greedy"))


def test_results_are_read_of_the_seeds_that_have_all(tmp_path):
    """They stand in the order of the seeds. A name that begins like another one is another name."""
    folder = tmp_path / "toy"
    folder.mkdir()

    def put(name, seed):
        (folder / lab.file_name(name, seed)).write_text(json.dumps({"name": name, "seed": seed}))

    for name, seeds in {"sft": (10, 2, 1), "sft, opd": (2, 10, 3), "sft 1": (2, 10)}.items():
        for seed in seeds:
            put(name, seed)
    found = lab.read_results(tmp_path, ["sft", "sft, opd", "sft 1"])
    for name in ("sft", "sft, opd", "sft 1"):
        assert found[name] == [{"name": name, "seed": seed} for seed in (2, 10)]
    with pytest.raises(SystemExit, match="no seed has all results yet; opd is missing"):
        lab.read_results(tmp_path, ["sft", "opd"])


def test_the_commit_of_a_result_is_told_without_a_repository_too():
    """So .ci/run runs them: on copies of the files, of which git knows nothing."""
    assert lab.commit_of({"commit": "abc", "dirty": False}) == "abc"
    assert lab.commit_of({"commit": "abc", "dirty": True}) == "abc and changes"
    assert lab.commit_of({"commit": None, "dirty": None}) == "none"


def test_the_file_of_a_name():
    """It has no commas and no spaces."""
    assert lab.file_name("sft T 1, opd", 3) == "sft-T-1-opd-3.json"


# --- what the scripts say of a world in which nothing happens ------------------------------------


def nothing(seed):
    """A result in which the student is always as good as its teacher, and no curve moves."""
    found = run_of(seed, before=HALF, after=HALF, teacher=HALF)
    found["accuracy, other template"] = found["accuracy"]
    measured = collections.defaultdict(lambda: 0.5)
    for when in ("before", "cold_start", "after"):
        found[f"held_out_{when}"] = measured
    found["curves"] = {name: 20 * [0.5] for name in lab.CURVES}
    same = {"reverse_kl": 0.5, "overlap_ratio": 0.5, "auroc": {"mean": 0.6, "standard_error": 0.0}}
    same.update(size=1.0, coherence=0.5)
    found.update(front=3, back=3, before=0.1, at=0.1, after=0.1, saved=0.5)
    found["found"] = collections.defaultdict(lambda: {**same, "before": same})
    return found


@pytest.mark.parametrize(
    "script, holds, unasked",
    [
        (phenomenology, {"3.2": 1, "3.3": 2, "ours": 2, "2608.31046": 1}, 1),
        (mechanism, {"4.1": 1, "4.2": 2}, 1),
        (recipe, {"5.2": 1}, 2),
        (cost, {"6.2": 2, "6.3": 1, "ours": 1}, 1),
        (followups, {"2609.04172": 1, "2609.35259": 1, "ours": 1}, 2),
    ],
)
def test_where_nothing_happens_equalities_hold_and_differences_are_contradicted(
    script, holds, unasked
):
    """So many claims of each section hold. A share of nothing is not askable. Two are undecided:
    the AUROC, which lies at its bound, and the template, whose criterion has no bound but 0."""
    results = collections.defaultdict(lambda: [nothing(seed) for seed in (0, 1)])
    even = [{"mean": 0.5, "even": 0.5} for _ in range(4)]
    results["depths"] = [{"seed": seed, "found": even} for seed in (0, 1)]
    findings = script.judge(results)
    words = collections.Counter(x.word for x in findings)
    assert words[lab.UNDECIDED] == (script in (cost, recipe))
    assert words[lab.NOT_ASKABLE] == unasked
    assert collections.Counter(x.section for x in findings if x.word == lab.HOLDS) == holds


# --- results of bench.py -------------------------------------------------------------------------


def test_results_of_several_commands_are_joined_once():
    """The rows of one command do not count twice."""
    made_by = {"commit": "c", "threads": 1, "seconds": 2}
    first = {
        "command": "x.py --out /here --worlds /there --seeds 0",
        **made_by,
        "rows": [{"seed": 0}],
    }
    second = {"command": "x.py --seeds 1", **made_by, "rows": [{"seed": 1}]}
    made = bench.join([first, second])
    assert made["rows"] == [{"seed": 0}, {"seed": 1}]
    assert made["seconds"] == 4
    assert made["command"] == "x.py --seeds 0 ; x.py --seeds 1"
    cases = (
        (first, "twice"),
        ({**second, "commit": "d"}, "commits"),
        ({**second, "threads": 2}, "threads"),
    )
    for other, why in cases:
        with pytest.raises(SystemExit, match=why):
            bench.join([first, other])


def test_the_results_of_bench_say_where_they_come_from():
    """They hold a command that another machine can run, the commit and the seconds."""
    made = json.loads((RESULTS / "bench.json").read_text())
    assert "bench" in made["command"]
    assert not any(word.startswith("/") for word in made["command"].split())
    assert made["seconds"] > 0
    assert made["threads"] > 0
    assert len(made["commit"]) == 12
    assert (RESULTS / "bench.txt").exists()


# --- 4: curves and slips ------------------------------------------------------------------------


def curve(name, values):
    return {"curves": {name: values}}


def test_a_rise_and_what_is_left_of_a_gap_by_hand():
    """Both compare the means over the first and the last five steps."""
    made = curve("overlap_ratio", [0.1, 0.2, 0.3, 0.4, 0.5, 9.0, 0.5, 0.6, 0.7, 0.8, 0.9])
    assert mechanism.rise(made) == pytest.approx(0.4)
    made = curve("advantage", [None, -4, -4, -4, -4, -4, 9, -1, -1, -1, -1, -1])
    assert mechanism.shrinks(made, "advantage") == 0.25
    assert math.isnan(mechanism.shrinks(curve("gap", 10 * [0]), "gap"))


def test_a_fall_is_the_lowest_five_steps_of_the_first_half():
    """One low step counts for a fifth of it. What comes in the second half is no first fall."""
    start = 5 * [0.6]
    assert mechanism.fall(curve("overlap_ratio", start + 5 * [0.5] + 10 * [0.1])) == pytest.approx(
        0.1
    )
    assert mechanism.fall(curve("overlap_ratio", start + 15 * [0.7])) == pytest.approx(0)
    one = start + [0.1] + 14 * [0.6]
    assert mechanism.fall(curve("overlap_ratio", one)) == pytest.approx(0.1)
    assert mechanism.fall(curve("overlap_ratio", [0.5, 0.4, 0.3, 0.2])) == pytest.approx(-0.1)


def test_slips_are_told_apart_by_what_both_find_likely(tmp_path):
    """The shares are those of a loop over single, unpadded responses."""
    here = world_of(tmp_path, "student", "teacher")
    pair = here.load("student", "teacher")
    digits, count = toy.problems(48, torch.Generator().manual_seed(3))
    rows = [{"ids": ids} for ids in toy.question(digits, count)[0]]
    r = here.write(pair, rows, "slips")
    expected = {"shared": 0, "another": 0}
    places = set()
    for i, row in enumerate(rows):
        response = r.response_ids(i)
        at = toy.first_slip(response, digits[i].tolist(), count[i].item())
        before = torch.tensor([row["ids"] + response[:at]])
        in_both = True
        for model in (pair.student, pair.teacher):
            likeliest = model(before).logits[0, -1].topk(60).indices
            in_both = in_both and response[at] in likeliest
        expected["shared" if in_both else "another"] += 1 / 48
        places.add(at)
    assert mechanism.slips_of(here, "student", 48, 60) == pytest.approx(expected)
    assert min(expected.values()) > 0
    assert len(places) > 1


def test_a_right_response_and_one_that_is_cut_off_have_no_slip(tmp_path, monkeypatch):
    """The shares are of all responses, with those that have no slip."""
    here = world_of(tmp_path, "student", "teacher")

    def write(pair, rows, what):
        written = []
        for i, row in enumerate(rows):
            generator = torch.Generator().manual_seed(i)
            digits = [int(toy.WORDS[x][1]) for x in row["ids"][1:-1]]
            padded = torch.tensor([digits + [0] * (toy.MOST - len(digits))])
            count = torch.tensor([len(digits)])
            ids, _, on = toy.corpus("left", padded, count, generator, noise=0.0, mistaught=0.0)
            response = ids[0, on[0]].tolist()
            written.append((response, response[:9], [toy.ID["Add"]])[i % 3])
        return from_texts([row["ids"] for row in rows], written)

    monkeypatch.setattr(here, "write", write)
    shares = mechanism.slips_of(here, "student", 6, 16)
    assert sum(shares.values()) == pytest.approx(1 / 3)


# --- 3.3: the distance between two teachers ------------------------------------------------------


def test_two_teachers_that_are_one_are_no_distance_apart(tmp_path, monkeypatch, short):
    """At the states of student-rl their KL is 0, and the student is as far from either."""
    here = world_of(tmp_path, "student-rl", "student", "sharp")
    monkeypatch.setattr(here, "model", lambda name: here.world / name.replace("bigger", "student"))
    found = phenomenology.between_teachers(here, 8)["found"]
    assert found["student || bigger"]["reverse_kl"] == pytest.approx(0, abs=1e-6)
    assert found["student || bigger"]["overlap_ratio"] == 1
    assert found["student-rl || bigger"] == found["student-rl || student"]
    for name in ("student-rl || student", "student-rl || sharp", "student || sharp"):
        assert found[name]["reverse_kl"] > 0.1


# --- 5 and later papers: files and models that are made before -----------------------------------


def test_low_and_high_digits_are_asked_apart(tmp_path):
    """There are 4,096 prompts of each, none of them is in the exam, and they are written once."""
    here = lab.Lab(0, tmp_path, tmp_path)
    recipe.prepare(here)
    exam = {row["prompt"] for row in load_prompts(here.world / "eval.jsonl")}
    for name, digits in (("low", "01234"), ("high", "56789")):
        path = here.world / f"{name}-prompts.jsonl"
        rows = load_prompts(path)
        assert len(rows) == 4096
        assert not exam & {row["prompt"] for row in rows}
        said = set(re.findall(r"\d", " ".join(row["prompt"] for row in rows)))
        assert said == set(digits)
        path.write_text("kept")
    recipe.prepare(here)
    assert path.read_text() == "kept"


@pytest.mark.filterwarnings("ignore:special tokens of only one")
def test_the_teacher_with_another_end_is_the_teacher_with_two_words_swapped(tmp_path):
    """It writes <unk> where the teacher ends, and its files say that this is its end."""
    here = world_of(tmp_path, "teacher")
    followups.prepare(here)
    lines = (here.world / "prompts.jsonl").read_text().splitlines()
    assert (here.world / "16-prompts.jsonl").read_text().splitlines() == lines[:16]
    assert (here.world / "1-prompts.jsonl").read_text().splitlines() == lines[:1]
    eos, unk = toy.ID["<eos>"], toy.ID["<unk>"]
    ids = torch.tensor([[toy.ID["Add"], eos, unk, 40]])
    swapped = torch.tensor([[toy.ID["Add"], unk, eos, 40]])
    order = list(range(len(toy.WORDS)))
    order[eos], order[unk] = unk, eos
    teacher = toy.read_model(here.world / "teacher")
    other = toy.read_model(here.world / "teacher-unk")
    torch.testing.assert_close(other(ids).logits[..., order], teacher(swapped).logits)
    with pytest.warns(UserWarning, match="see --ends"):
        pair = here.load("teacher", "teacher-unk")
    assert pair.eos_ids == [eos, unk]
    assert eos_ids(other, AutoTokenizer.from_pretrained(here.world / "teacher-unk")) == {unk}
    followups.prepare(here)  # once


# --- loops of our own ---------------------------------------------------------------------------


def test_reverse_kl_by_the_student_is_the_update_of_opd(tmp_path, short, monkeypatch):
    """After two steps, in micro-batches of one response, the weights agree."""
    here = world_of(tmp_path, "student", "teacher")
    load = here.load

    def in_parts(*names):
        return dataclasses.replace(load(*names), micro_batch_tokens=1)

    monkeypatch.setattr(here, "load", in_parts)
    settings = dict(steps=2, batch_size=4)
    arm = lab.Arm("student", "teacher", settings, train=own_loop.reverse_by_student)
    made = own_loop.reverse_by_student(here, arm, here.folder("arm"))
    pair = here.load("student", "teacher")
    first = copy.deepcopy(pair.student.state_dict())
    rows = here.rows(pair, 4096)
    assert len(rows) == 32
    cfg = Config(objective="full", lr=PRESETS["toy"]["lr"], seed=3, max_new_tokens=8)
    optimizer = opd.adamw(cfg, pair.student)
    metrics = []
    for step in range(2):
        chosen = batch(len(rows), step, 4, 3)
        metrics.append(opd.update(cfg, pair, optimizer, [rows[i] for i in chosen], step)[1])
    student = toy.read_model(here.folder("arm") / "student").state_dict()
    for name, weight in pair.student.state_dict().items():
        torch.testing.assert_close(student[name], weight, rtol=0, atol=1e-6)
    assert max((student[name] - first[name]).abs().max() for name in first) > 1e-3
    for name in ("loss", "reverse_kl", "grad_norm"):
        expected = [row[name] for row in metrics]
        assert made["curves"][name] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("writer", ["student", "teacher"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_one_who_is_asked_writes_and_the_kl_has_the_direction_asked_for(
    tmp_path, short, monkeypatch, writer, direction
):
    """The rollout has the log-probabilities of its writer. The loss is KL(p || q) or KL(q || p) at
    its states."""
    here = world_of(tmp_path, "student", "teacher")
    kept = []
    train = own_loop.train

    def noted(lab, arm, folder, loss_of, writer="student"):
        def of(r):
            loss_at = loss_of(r)
            kept.append((r, loss_at))
            return loss_at

        return train(lab, arm, folder, of, writer)

    monkeypatch.setattr(own_loop, "train", noted)
    loop = getattr(own_loop, f"{direction}_by_{writer}")
    arm = lab.Arm("student", "teacher", dict(steps=1, batch_size=4), train=loop)
    found = loop(here, arm, here.folder("arm"))
    ((r, loss_at),) = kept
    states = (r.ids, r.attention_mask, r.is_response)
    log_p = log_probs(toy.read_model(here.world / "student"), *states)
    log_q = log_probs(toy.read_model(here.world / "teacher"), *states)
    wrote = {"student": log_p, "teacher": log_q}[writer]
    y = r.ids[r.is_response].unsqueeze(-1)
    torch.testing.assert_close(wrote.gather(-1, y).squeeze(-1), r.log_p[r.response_mask])
    a, b = (log_p, log_q) if direction == "reverse" else (log_q, log_p)
    kl = (a.exp() * (a - b)).sum(-1)
    torch.testing.assert_close(loss_at(log_p, log_q, None), kl)
    assert found["curves"]["loss"] == pytest.approx([kl.mean().item()], rel=1e-4)


def test_without_a_teacher_the_fifth_of_the_drawn_tokens_that_was_least_likely_is_pushed_down(
    monkeypatch,
):
    """The gradient is that of .5 log p(y), and nothing else. Padding is no drawn token, and the
    teacher is not asked."""
    monkeypatch.setattr(own_loop, "train", lambda lab, arm, folder, loss_of: loss_of)
    loss_of = own_loop.train_without_teacher(None, None, None)
    z = torch.randn(10, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3])
    log_p = z.log_softmax(-1)
    drawn = log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1).detach()
    r = from_texts([[1], [1]], [y[:7].tolist(), y[7:].tolist()])
    r.log_p[r.response_mask] = drawn
    r.log_p[~r.response_mask] = -100.0  # four columns of padding in the second row
    log_q = torch.full_like(log_p, math.nan)
    loss = loss_of(r)(log_p, log_q, y)
    unlikely = drawn.argsort()[:2].tolist()
    assert [i for i, x in enumerate(loss) if x == 0.5] == sorted(unlikely)
    assert loss.count_nonzero() == 2
    (g,) = torch.autograd.grad(loss.sum(), z)
    p = log_p.detach().exp()
    for i in range(10):
        expected = torch.zeros(6)
        if i in unlikely:
            expected = 0.5 * (torch.eye(6)[y[i]] - p[i])
            assert g[i, y[i]] > 0  # descended: its logit falls
        torch.testing.assert_close(g[i], expected)


# --- 2606.09471: the trap -----------------------------------------------------------------------


def solution(digits, slips_at=None):
    """The token ids of a plain solution; slips_at: the step whose digit is one too many."""
    said = []
    total = 0
    for place, x in enumerate(digits):
        said += ["so", toy.LABELS[place], f"{total}+{x}="]
        total = (total + x + (place == slips_at)) % 10
        said += [str(total), "." if place + 1 == len(digits) else ","]
    said += ["Answer:", str(total), "<eos>"]
    return [toy.ID[word] for word in said]


def test_the_trap_is_measured_before_at_and_after_the_first_slip(monkeypatch):
    """One response is right, two slip at their ninth and their fourth token, one is cut off. The
    teacher goes on behind the slip."""
    digits = [3, 7, 5, 1]
    written = [
        solution(digits),
        solution(digits, slips_at=1),
        solution(digits, slips_at=0),
        solution(digits)[:12],
    ]
    rows = [{"prompt": "Add a3 b7 c5 d1 :", "ids": [3]} for _ in written]
    kl = torch.full((4, 24), math.nan)
    for i, response in enumerate(written):
        kl[i, : len(response)] = 1.0 + i
    kl[1, 8] = 10.0
    kl[2, 3] = 20.0
    kl[1, 9:23] = 0.25
    asked = []

    def answered(pair, rows, *, model, starts, **how):
        asked.append((model, starts, how["temperature"]))
        return torch.tensor([[True], [False]]), None

    monkeypatch.setattr(followups, "answered", answered)
    monkeypatch.setattr(followups, "grade", lambda *_: {"kl": kl})
    fake = SimpleNamespace(
        load=lambda *names: SimpleNamespace(teacher=names[1]),
        rows=lambda pair, count: rows,
        write=lambda pair, rows, what: from_texts([[3]] * 4, written),
        first_slip=partial(lab.Lab.first_slip, None),
        new_tokens=96,
        quick=False,
        seed=0,
    )
    found = followups.trap(fake, 4)
    assert found["before"] == pytest.approx((8 * 2.0 + 3 * 3.0) / 11)
    assert found["at"] == 15.0
    after = len(written[1]) - 9, len(written[2]) - 4
    assert found["after"] == pytest.approx((after[0] * 0.25 + after[1] * 3.0) / sum(after))
    assert (found["saved"], found["slips"]) == (0.5, 2)
    assert asked == [("teacher", [written[1][:9], written[2][:4]], 0.7)]


# --- 6 and 2.2 ----------------------------------------------------------------------------------


def test_entropy_passes_where_enough_tokens_say_so():
    """6.1: a few lost responses do not decide, and a part that no response reaches says nothing."""
    rows = [
        {"tokens": [64, 64, 0], "entropy_student": [1.0, 1.0, None]},
        {"tokens": [64, 64, 64, 6], "entropy_student": [1.0, 1.0, 1.0, 2.0]},
        {"tokens": [64, 64, 64, 64], "entropy_student": [1.0, 1.0, 1.0, 2.0]},
        {"tokens": [64, 64, 64, 64], "entropy_student": [1.0, 2.0, 2.0, 2.0]},
    ]
    front = slice(1)
    back = slice(3, None)
    assert cost.passed(rows, front, 1.5) is None
    assert cost.passed(rows, back, 1.5) == 3
    assert cost.passed(rows, front, 0.5) == 1
    assert cost.passed(rows, slice(1, 3), 1.5) == 4  # the mean over both, by their tokens


def test_the_quarters_are_those_of_the_longest_responses(monkeypatch):
    """Of eight buckets, they are the first two and the last two."""
    flat = {"tokens": 8 * [64], "entropy_student": 8 * [1.0]}
    bent = {"tokens": 8 * [64], "entropy_student": [*7 * [1.0], 2.5]}
    lost = {"tokens": 8 * [64], "entropy_student": [1.0, 2.5, *6 * [9.0]]}
    rows = [{"by_position": x} for x in (flat, bent, lost)]
    monkeypatch.setattr(cost, "read_rows", lambda folder: rows)
    fake = SimpleNamespace(trained=lambda *_: None, folder=lambda name: name)
    assert cost.backwards(fake) == {"front": 3, "back": 2}


def test_the_error_of_an_auroc_is_that_over_prompts():
    """With four times the prompts the error halves. Four equal answers to a prompt tell no more
    than one."""
    generator = torch.Generator().manual_seed(0)

    def measured(prompts, copies=1):
        scores = torch.randn(prompts, 2, generator=generator)
        labels = torch.rand(prompts, 2, generator=generator) < torch.sigmoid(scores)
        scores = scores.repeat_interleave(copies, 1).flatten()
        labels = labels.repeat_interleave(copies, 1).flatten()
        found = cost.auroc_with_error(scores, labels, 2 * copies, draws=400)
        assert found["mean"] == auroc(scores, labels)
        return found["standard_error"]

    few = measured(100)
    assert few == pytest.approx(0.035, rel=0.2)  # the spread of the area over such samples
    assert measured(400) == pytest.approx(few / 2, rel=0.2)
    assert measured(100, copies=4) == pytest.approx(few, rel=0.25)
    alike = cost.auroc_with_error(torch.randn(8), torch.ones(8).bool(), 2)
    assert alike == {"mean": None, "standard_error": None}


def test_the_size_and_angle_of_a_gradient_do_not_mistake_noise_for_signal():
    """2.2: with four batches, and noise of 5 times the signal, the norm of their mean would be off,
    and so would the angle."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.zeros(50, dtype=torch.float64)
    other = torch.zeros(50, dtype=torch.float64)
    exact[0] = 2.0  # size 2
    other[:2] = torch.tensor([1.8, 2.4])  # size 3, cosine .6

    def measured(share):
        noise = torch.randn(2, 4, 50, generator=generator, dtype=torch.float64) * 0.4**0.5
        batches = {"Eq. 4": exact + share * noise[0], "other": other + 0.1 * noise[1]}
        return cost.expectations(batches, "Eq. 4")

    sizes = [measured(1.0)["Eq. 4"]["size"] for _ in range(2000)]
    assert sum(size**2 for size in sizes) / 2000 == pytest.approx(4, abs=0.3)  # not 4 + 20 / 4
    calm = measured(0.1)
    assert calm["other"]["size"] == pytest.approx(3, abs=0.2)
    assert calm["other"]["cosine"] == pytest.approx(0.6, abs=0.1)
    assert calm["other"]["noise"] == pytest.approx(0.2 / 9, abs=0.01)
    assert calm["Eq. 4"]["cosine"] == pytest.approx(1)


def test_what_the_gain_by_depth_would_be_by_even_slips(monkeypatch):
    """6.1: if the two are right .64 and .81 of the time from the start, the gain half-way is
    .64^.5 (.81^.5 - .64^.5) = .8 (.9 - .8)."""
    asked = []

    def finished(pair, rows, responses, depth, **how):
        asked.append((responses, how["temperature"], how["top_p"]))
        student = torch.tensor([0.60, 0.68, 0.64, 0.64])
        return {"student": student, "teacher": torch.full((4,), 0.81), "tokens": 30 * depth}

    monkeypatch.setattr(cost, "continuation", finished)
    monkeypatch.setattr(cost, "DEPTHS", (0.0, 0.5))
    fake = SimpleNamespace(
        load=lambda *names: None,
        rows=lambda pair, count: 4 * [{"ids": [1], "answer": "2"}],
        write=lambda *_: SimpleNamespace(response_ids=lambda i: [i]),
        new_tokens=96,
        quick=False,
        seed=0,
    )
    found = cost.depths(fake, 4)["found"]
    assert [x["even"] for x in found] == pytest.approx([0.17, 0.08])
    assert [x["mean"] for x in found] == pytest.approx([0.17, 0.17])
    assert found[0]["standard_error"] == pytest.approx((0.0032 / 3) ** 0.5 / 2)
    assert [x["tokens"] for x in found] == [0, 15]
    assert asked == 2 * [([[0], [1], [2], [3]], 0.7, 0.95)]


PROMPTS = [[1, 4], [1, 5, 6], [1, 6, 7, 4, 5], [1, 4, 7, 5], [1, 7], [1, 5, 4, 4, 4]]


def written(architecture="llama"):
    """A pair, and what its student wrote to six prompts."""
    pair = tiny_pair(architecture, micro_batch_tokens=20)
    return pair, rollout(pair.student, PROMPTS, max_new_tokens=6, seeds=range(6), **pair.sampling)


def full(log_p, log_q, y):
    return full_vocab(log_p, log_q)


def top_4(log_p, log_q, y):
    return top_k(log_p, log_q, 4)


@pytest.mark.parametrize("objective", [full, top_4])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.5, "teacher_temperature": 2.0}])
def test_the_gradients_of_positions_sum_to_that_of_the_output_head(objective, how):
    """sum_t g_t h_t' is the gradient of the summed loss on the head's weight, by autograd on plain
    logits. By default both temperatures are 1."""
    pair, r = written()
    chunks = list(cost.logit_gradients(pair, r, objective, chunk=3, **how))
    assert sum(len(g) for g, _ in chunks) == r.response_mask.sum()
    assert max(len(g) for g, _ in chunks) == 3

    opinion = partial(log_probs, vocab_size=len(WORDS))
    rollout = (r.ids, r.attention_mask, r.is_response)
    T = how.get("temperature", 1.0)
    log_p = opinion(pair.student, *rollout, temperature=T)  # (N, V)
    T = how.get("teacher_temperature", 1.0)
    log_q = opinion(pair.teacher, *rollout, temperature=T)  # (N, V)
    total = objective(log_p, log_q, r.ids[r.is_response]).sum()
    head = pair.student.get_output_embeddings().weight
    (expected,) = torch.autograd.grad(total, head)  # (V, H)
    assert expected.abs().max() > 0.1
    found = sum(g.T @ h for g, h in chunks)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for p in pair.student.parameters())  # it measures only


@pytest.mark.filterwarnings("ignore:Gemma2ForCausalLM does more")
def test_where_the_head_is_not_linear_only_logits_are_compared():
    """Gemma 2 caps its logits. Then h is 1, and g is the gradient on the logits themselves, which
    sums to 0 over a softmax."""
    pair, r = written("gemma2")
    pair.micro_batch_tokens = 1000
    ((g, h),) = cost.logit_gradients(pair, r, full)
    N = r.response_mask.sum()
    assert g.shape == (N, len(WORDS))
    assert h.shape == (N, 1)
    assert (h == 1).all()
    torch.testing.assert_close(g.sum(-1), torch.zeros(N), rtol=0, atol=1e-5)
    assert g.norm(dim=-1).min() > 0


# --- the forecast -------------------------------------------------------------------------------


def test_a_rank_correlation_by_hand():
    """Ranks 1 2.5 2.5 4 against 1 2 3 4 give 4.5 / sqrt(4.5 * 5). None if nothing varies."""
    assert forecast.ranks([3, 5, 5, 9]) == [1, 2.5, 2.5, 4]
    assert forecast.spearman([3, 5, 5, 9], [0, 1, 2, 3]) == pytest.approx(0.9**0.5)
    assert forecast.spearman([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert forecast.spearman([1, 2, 3], [0.3, 0.2, 0.1]) == pytest.approx(-1)
    assert forecast.spearman([1, 1, 1], [1, 2, 3]) is None


def test_pairs_that_another_script_has_run_keep_their_names():
    """They keep their 100 steps, too. Every pair is diagnosed and distilled."""
    pairs = {(arm.student, arm.teacher): name for name, arm in forecast.ARMS.items()}
    assert set(pairs) == set(forecast.PAIRS)
    assert pairs["student", "teacher"] == "success"
    assert pairs["student", "other"] == "other"
    assert pairs["student-rl", "student"] == "student-rl from student"  # reverse has 400 steps
    assert all(arm.settings == {} for arm in forecast.ARMS.values())
    asked = [asked for _, asked in forecast.PROBES.values()]
    assert {(x["student"], x["teacher"]) for x in asked} == set(pairs)


def a_pair(seed, word, gained, after_half=0.1):
    """A diagnosed and distilled pair whose teacher surely leads."""
    sure = {"mean": 0.3, "standard_error": 0.05}
    cuts = [{"gain": {"mean": x}} for x in (0.3, 0.2, after_half, 0.0)]
    flat = collections.defaultdict(lambda: {"mean": 0.5})
    return {
        "name": "success",
        "seed": seed,
        "later": forecast.is_later("success", seed),
        "verdict": word,
        "gain": {way: lab.Difference(gained, 0.02) for way in ("T .7", "greedy")},
        "pilot": 0.5,
        "report": {
            "greedy": {"gain": sure},
            "continuation": cuts,
            "predicted_gain": {"mean": 0.15},
            "metrics": flat,
            "first_tokens": flat,
            "worst_bucket": collections.defaultdict(float),
        },
    }


def test_a_rule_has_its_record_on_seeds_that_it_was_not_chosen_on():
    """Counted apart: what came of each verdict on seeds 0 to 2, and on later ones."""
    pairs = [
        a_pair(0, analysis.SHOULD_WORK, 0.3),
        a_pair(2, analysis.SHOULD_WORK, 0.3),
        a_pair(3, analysis.SHOULD_WORK, 0.2),
        a_pair(4, analysis.SHOULD_WORK, 0.0),
        a_pair(5, analysis.NOTHING_NEW, 0.0),
    ]
    old, new = forecast.by_age(pairs)
    assert [pair["seed"] for pair in new] == [3, 4, 5]
    (kept,) = forecast.promises(old, "there")
    assert kept.word == lab.HOLDS
    assert kept.found == "2 of 2 runs, greedily by +0.300 or more"
    broken, nothing = forecast.promises(new, "there")
    assert broken.word == lab.CONTRADICTED
    assert broken.found == "1 of 2 runs, greedily by +0.000 or more"
    assert nothing.word == lab.HOLDS
    assert forecast.record(pairs) == {analysis.SHOULD_WORK: (2, 1), analysis.NOTHING_NEW: (1, 0)}
    text = "\n".join(forecast.record_lines(pairs))
    assert "chosen on: 2 runs" in text
    assert "later pairs: 3 runs" in text
    assert "  2 runs,   1 gained greedily; +0.00 .. +0.20 T .7, +0.00 .. +0.20 greedily" in text


def test_a_candidate_is_judged_by_how_it_tells_who_gained():
    """Of those that the rule was chosen on; of pairs that all gained there is no area."""
    won = a_pair(0, analysis.UNDECIDED, 0.3, after_half=0.2)
    lost = a_pair(1, analysis.UNDECIDED, 0.0, after_half=-0.1)
    later = a_pair(3, analysis.UNDECIDED, 0.0, after_half=0.5)
    lines = forecast.candidate_lines([won, lost, later])
    assert lines[1].startswith("the rule was chosen on 2 pairs whose teacher surely leads greedily")
    assert "of these 1 gained greedily" in lines[1]
    line = {line[:36].strip(): line[37:] for line in lines[2:]}
    assert line["gain after 50 %"] == "1.00  gained +0.20 .. +0.20, not -0.10 .. -0.10"
    assert line["overlap ratio"].startswith("0.50")
    line = {line[:36].strip(): line[37:] for line in forecast.candidate_lines([won])[2:]}
    assert line["gain after 50 %"] == "   -  gained +0.20 .. +0.20, not none"
    assert forecast.candidate_lines([later]) == []


# --- the tour -----------------------------------------------------------------------------------


def test_the_tour_names_lines_that_are_there():
    """A decorated function is found at the line where it is written."""
    for _, read, _ in tour.STOPS:
        for function in read:
            file, line, name = re.match(r"(\w+\.py):(\d+) (\S+)", tour.where(function)).groups()
            lines = (ROOT / file).read_text().splitlines()[int(line) - 1 :]
            assert f"def {name}(" in "".join(lines[:2]), name  # a decorator may stand above


def test_the_tour_refuses_a_stop_that_it_does_not_have(capsys):
    """It says so in one line, with exit code 2."""
    with pytest.raises(SystemExit, match="2"):
        tour.main(["9"])
    assert "stop 9: there are 8" in capsys.readouterr().err


def test_the_tour_prints_the_commands_that_it_runs_and_runs_each_once(
    tmp_path, monkeypatch, capsys
):
    """Models that are missing are made first."""
    ran = []
    made = []
    names = ("overlap_ratio", "overlap_mass_student", "overlap_mass_teacher")
    report_of = {
        "metrics": {name: {"mean": 0.5} for name in names},
        "first_tokens": {"overlap_ratio": {"mean": 0.625}},
        "greedy": {"gain": {"mean": 0.25}},
        "verdict": "should work",
    }

    def command(words):
        ran.append(" ".join(words))
        made_of = {"student": words[words.index("--student") + 1], **report_of}
        Path(words[words.index("--out") + 1]).write_text(json.dumps(made_of))

    command.__module__ = "analysis"
    monkeypatch.setattr(tour.analysis, "main", command)
    monkeypatch.setattr(tour.toy, "say_and_make", lambda *asked: made.append(asked))
    flags = ["3", "--models", "there", "--out", str(tmp_path), "--count", "5"]
    for _ in range(2):
        tour.main(flags)
        said = capsys.readouterr().out
        assert len(ran) == 3
        for words in ran:
            assert f"   python analysis.py {words}\n" in said
        assert "overlap ratio 0.50, of the first 8 tokens 0.62" in said
        assert "greedy lead +0.25: should work" in said
    assert made[0] == ("there", ("student", "teacher", "sharp", "other"))
    assert "--student there/student --teacher there/teacher" in ran[0]
    with pytest.raises(UserError, match="is of there/student; take another --out"):
        tour.main(["3", "--models", "elsewhere", *flags[3:]])


def test_a_run_of_the_tour_that_was_killed_goes_on(tmp_path, monkeypatch, capsys):
    """The command that is printed is that of a reader, who begins anew."""
    ran = []

    def command(words):
        ran.append(words)
        out = Path(words[words.index("--out") + 1])
        out.mkdir(exist_ok=True)
        (out / "config.json").write_text('{"student": "there/student"}')
        if len(ran) == 1:
            raise Killed
        (out / "result.json").write_text("{}")

    command.__module__ = "opd"
    stop = tour.Tour("there", tmp_path, 5, 4)
    folder = tmp_path / "run"
    asked = (["--out", str(folder)], folder / "result.json", folder / "config.json")
    with pytest.raises(Killed):
        stop.call(command, *asked)
    assert stop.call(command, *asked) == {}
    assert ran == [asked[0], [*asked[0], "--resume"]]
    assert capsys.readouterr().out == f"   python opd.py --out {folder}\n"
