"""experiments/sums.py and real.py: what SmolLM2 is asked, and what follows from its results."""

import fcntl
import json
import os
import re
import sys
from types import SimpleNamespace

import forecast
import lab
import plot
import pytest
import real
import sums
import torch
import toy
from conftest import TEMPLATE, WORDS, Killed, tiny, word_tokenizer

from plumbing import measure
from plumbing.prompts import load_prompts

# --- the questions ------------------------------------------------------------------------------


def test_sums_are_asked_as_the_teachers_were_trained_and_in_other_words(tmp_path):
    """All 727 sums are asked once, and none of them is an example. The prompts in other words are
    the same sums. No held-out sum is among them."""
    sums.write_questions(tmp_path, 3)
    rows = {}
    asked = {}
    for name in ("eval", "prompts", "wordy", "one"):
        rows[name] = load_prompts(tmp_path / f"{name}.jsonl")
        asked[name] = [row["prompt"][-1]["content"] for row in rows[name]]
    plain = asked["eval"] + asked["prompts"]
    assert len(asked["eval"]) == sums.HELD_OUT
    assert len(set(plain)) == 727
    assert "5 + 6 + 9" not in plain
    assert asked["one"] == asked["prompts"][:1]
    digits = re.findall(r"\d", asked["prompts"][0])
    assert asked["wordy"][0] == "What is the sum of {}, {} and {}?".format(*digits)
    for row in rows["wordy"] + rows["eval"]:
        assert sum(sums.digits_of(row)) == int(row["answer"])


def test_three_ways_to_work_a_sum_out():
    """A sum is worked out from the left, from the right, or in words."""
    assert sums.forwards(5, 6, 9) == "5 + 6 = 11, 11 + 9 = 20. Answer: 20"
    assert sums.backwards(5, 6, 9) == "9 + 6 = 15, 15 + 5 = 20. Answer: 20"
    in_words = "Nine plus nine is eighteen, eighteen plus nine is twenty-seven. Answer: 27"
    assert sums.in_words(9, 9, 9) == in_words


@pytest.mark.parametrize(
    "said, place",
    [
        ("5 + 6 = 11, 11 + 9 = 20. Answer: 20", None),
        ("So 5 + 6 is 11, and", None),  # as far as it goes
        ("5 + 6 = 12, 12 + 9 = 21. Answer: 21", 9),  # the second digit of 12
        ("5 + 6 = 1, 1 + 9", 9),  # where the second digit should be
        ("5 + 6 = 11, 12 + 9 = 21", 13),
        ("6 + 5 = 11", 0),
    ],
)
def test_a_slip_is_the_first_digit_that_is_wrong(said, place):
    assert sums.first_slip(said, (5, 6, 9)) == place


@pytest.mark.parametrize(
    "said, at",
    [
        ("5| +| 6| =| |1|1|,| |1|1| +| |9| =| |2|0|.| Answer|:| |2|0|", None),
        ("5| +| 6| =| |1|2|,| |1|2| +| |9| =| |2|1|.| Answer|:| |2|1|", 6),
        ("5| +| 6| =| |1|1|,| |1|1| +", 12),  # cut off: behind its last token
    ],
)
def test_a_slip_is_found_at_its_token(said, at):
    pieces = said.split("|")

    def decode(ids, skip_special_tokens):
        return "".join(pieces[i] for i in ids)

    pair = SimpleNamespace(tokenizer=SimpleNamespace(decode=decode))
    row = sums.question((5, 6, 9))
    assert sums.RealLab.first_slip(None, pair, row, list(range(len(pieces)))) == at


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    """A tiny chat model of random weights that knows the words of the questions."""
    known = list(WORDS)
    for template in (sums.PLAIN, sums.WORDY):
        for message in sums.question((1, 2, 3), template)["prompt"]:
            known += message["content"].split()
    known = list(dict.fromkeys(known))
    model = tiny("llama", vocab_size=len(known))
    model.config.max_position_embeddings = 256
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    word_tokenizer(known, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture
def run_script(base, tmp_path, monkeypatch):
    def run(*flags):
        command = ["real.py", "--worlds", str(tmp_path), "--out", str(tmp_path), *flags]
        monkeypatch.setattr(sys, "argv", command)
        lab.main(
            real.__doc__,
            real.ARMS,
            real.judge,
            probes=real.PROBES,
            world=sums.RealLab,
            own={"base": "the base"},
        )

    return run


def test_the_base_is_asked_for_before_anything_runs(run_script, capsys):
    """The refusal is one line, with exit code 2."""
    with pytest.raises(SystemExit, match="2"):
        run_script("--only", "success")
    assert "--base: needed; see --help" in capsys.readouterr().err


def test_worked_examples_are_read_once_and_the_answers_are_the_same(base, tmp_path):
    """What all prompts begin with is read for one of them, then only the question of each. So the
    probabilities are those of reading all of it, and afterwards the model reads all of it again."""
    made = sums.RealLab(0, tmp_path, tmp_path, base=base)
    pair = made.load("base", "base")
    rows = made.rows(pair, 6, "eval")
    read = []  # (rows, tokens) of each forward pass
    embed = pair.student.get_input_embeddings()
    embed.register_forward_hook(lambda module, args, out: read.append(tuple(args[0].shape)))
    plainly = made.write(pair, rows, "test")
    before = list(read)
    read.clear()
    with sums.worked_examples_once(pair.student, rows):
        shortly = made.write(pair, rows, "test")
        again = made.write(pair, rows[:4], "test")
    P = len(rows[0]["ids"])
    S = len(os.path.commonprefix([row["ids"] for row in rows]))
    assert 0 < S < P
    assert before[0] == (6, P)
    assert read[:2] == [(1, S), (6, P - S)]
    assert read[2 : len(before) + 1] == before[1:]
    assert read[len(before) + 1] == (4, P - S)  # the examples have been read
    assert torch.equal(shortly.ids, plainly.ids)
    assert torch.equal(again.ids, plainly.ids[:4, : again.ids.size(1)])
    torch.testing.assert_close(shortly.log_p, plainly.log_p)
    made.write(pair, rows, "test")
    assert read[-len(before) :] == before


def test_what_a_model_was_measured_at_is_kept_in_its_world(base, tmp_path):
    """Nothing is written into the base's own folder, and other seeds have other questions."""
    here = sums.RealLab(0, tmp_path, tmp_path, True, base=base)
    before = sorted(path.name for path in base.iterdir())
    found = here.accuracies(here.model("base"), here.exam)
    assert sorted(path.name for path in base.iterdir()) == before
    assert [path.parent.name for path in here.world.rglob("accuracy-*.json")] == ["base"]
    assert found["greedy"]["prompts"] == 8


def test_what_was_measured_in_one_dtype_is_not_taken_for_another(base, tmp_path, monkeypatch):
    """A base that scores near one half answers otherwise in bfloat16."""
    here = sums.RealLab(0, tmp_path, tmp_path, True, base=base)
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setattr(here, "dtype", dtype)
        here.accuracies(here.model("base"), here.exam)
    assert len(list(here.world.rglob("accuracy-*.json"))) == 2


def test_experts_are_made_together_and_each_once(base, tmp_path, monkeypatch):
    """expert-1 and expert-2 are the expert after its first and second round."""
    here = sums.RealLab(0, tmp_path, tmp_path, base=base)
    kept = []
    monkeypatch.setattr(here, "save", lambda pair, name: kept.append(name))
    monkeypatch.setattr(sums, "expert_iteration", lambda *_: iter(range(sums.ROUNDS)))
    here.model("expert-1")
    assert kept == ["expert-1", "expert-2", "expert"]
    (here.world / "expert-2").mkdir()
    kept.clear()
    here.model("expert-2")
    assert kept == []
    here.model("expert")
    assert kept == ["expert-1", "expert"]  # one that is there may be in use
    with pytest.raises(ValueError, match="no model teacher"):
        here.model("teacher")


def test_one_process_at_a_time_makes_something(base, tmp_path, monkeypatch):
    """Questions, a model or a measurement: another process waits, it would do it again or read half
    of it. Of different things it waits for none."""
    held = []

    def is_held(path):
        with open(f"{path}.lock") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(path.name)

    monkeypatch.setattr(sums.files, "write_lines", lambda path, rows: is_held(path))
    here = sums.RealLab(0, tmp_path, tmp_path, True, base=base)
    made_by = {"copy": "copy", "expert-1": "expert", "expert": "expert"}
    monkeypatch.setattr(here, "make", lambda name: is_held(here.world / made_by[name]))
    for name in made_by:
        here.model(name)
    monkeypatch.setattr(
        lab.Lab, "accuracies", lambda self, folder, exam: is_held(folder / "accuracies")
    )
    student = tmp_path / "student"
    here.accuracies(student, here.exam)
    questions = ["eval.jsonl", "prompts.jsonl", "wordy.jsonl", "one.jsonl"]
    assert held == [*questions, "copy", "expert", "expert", "accuracies"]
    with open(student / "accuracies.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # left again


def test_a_model_is_whole_or_not_there(base, tmp_path):
    """If the process is killed while it saves, the model is made again."""
    here = sums.RealLab(0, tmp_path, tmp_path, True, base=base)

    class Dies:
        def save_pretrained(self, folder):
            folder.mkdir(parents=True, exist_ok=True)
            raise Killed

    class Saves:
        def save_pretrained(self, folder):
            folder.mkdir(parents=True, exist_ok=True)

    for _ in range(2):
        with pytest.raises(Killed):
            here.save(SimpleNamespace(student=Saves(), tokenizer=Dies()), "copy")
        assert not here.is_made("copy")
    here.save(SimpleNamespace(student=Saves(), tokenizer=Saves()), "copy")
    assert here.is_made("copy")


def test_questions_that_are_there_are_not_written_again(tmp_path):
    """Another process may be reading them. Worlds of another base have a folder of their own."""
    here = sums.RealLab(0, tmp_path, tmp_path, base="a/b")
    path = here.world / "prompts.jsonl"
    written = path.stat().st_mtime_ns
    sums.RealLab(0, tmp_path, tmp_path, base="a/b")
    assert path.stat().st_mtime_ns == written
    assert sums.RealLab(0, tmp_path, tmp_path, base="a/c").world != here.world


@pytest.mark.slow
def test_every_arm_and_probe_runs_on_any_chat_model(run_script, base, tmp_path, monkeypatch):
    """They run on a tiny model with random weights. A second call runs nothing again."""
    # it answers nothing right, so its expert learns nothing and agrees with it
    monkeypatch.setattr(measure, "check_teaches", lambda *_: None)
    run_script("--quick", "--base", str(base))
    run_script("--base", str(base), "--seeds", "0", "--only", "8 tokens")
    path = tmp_path / "real" / "8-tokens-0.json"
    made = json.loads(path.read_text())
    assert made["asked"]["base"] == "base"
    assert set(made["models"]) == {"base", "expert"}
    assert made["accuracy"]["after"]["greedy"]["prompts"] == sums.HELD_OUT
    changed = path.stat().st_mtime_ns
    run_script("--base", str(base), "--seeds", "0", "--only", "8 tokens")
    assert path.stat().st_mtime_ns == changed


# --- what follows -------------------------------------------------------------------------------


def accuracy(right, prompts=160):
    """An accuracy with so many right answers, in every way of sampling."""
    bits = "1" * right + "0" * (prompts - right)
    found = {"mean": right / prompts, "standard_error": 0.01, "prompts": prompts}
    return {way: {**found, "right": f"{int(bits, 2):0{prompts // 4}x}"} for way in toy.WAYS}


def run_of(seed, before, after, teacher):
    curves = {
        "step": list(range(1, 7)),
        "evaluated": [6],
        "accuracy": [after / 160],
        "loss": [0.4] * 3 + [0.1] * 3,
        "grad_norm": [2.0] * 6,
    }
    for name in ("overlap_mass_student", "overlap_mass_teacher"):
        curves[name] = [0.97] * 6
    for name in ("overlap_token_advantage", "entropy_gap", "largest_gap"):
        curves[name] = [0.4] * 3 + [0.1] * 3
    curves["overlap_ratio"] = [0.7] * 3 + [0.8] * 3
    levels = {"before": before, "after": after, "teacher": teacher}
    return {
        "seed": seed,
        "seconds": 1.0,
        "asked": {"dtype": "bfloat16"},
        "accuracy": {when: accuracy(right) for when, right in levels.items()},
        "curves": curves,
    }


GOOD = (80, 140, 140)
NOTHING = (80, 80, 80)
OUTCOMES = {  # what the paper would have: (before, after, teacher), right answers of 160
    "success": GOOD,
    "round 1": (80, 110, 110),
    "round 2": (80, 130, 130),
    "backwards": (80, 85, 140),
    "words": (80, 80, 125),
    "words, 72": (80, 80, 125),
    "words, fast": (80, 80, 125),
    "words, 72 fast": (80, 80, 125),
    "words, sft": (80, 100, 125),
    "words, cold": (80, 120, 125),
    "reverse": (140, 80, 80),
    "difference": (80, 82, 140),
    "wordy": (80, 120, 140),
    "8 tokens": (80, 136, 140),
    "one prompt": (80, 130, 140),
}


def results(seeds=(0, 1, 2), **others):
    found = {name: [] for name in [*real.ARMS, *real.PROBES]}
    outcomes = {name: GOOD for name in real.ARMS} | {"copy": NOTHING} | OUTCOMES | others
    for name, levels in outcomes.items():
        found[name] = [run_of(seed, *levels) for seed in seeds]
    for run in found["copy"]:
        run["curves"]["loss"] = [0.1] * 6
        run["curves"]["grad_norm"] = [0.5] * 6
    histogram = {"from": -1.0, "to": 0.0, "right": [1, 3], "wrong": [3, 1]}
    same = {"null": 0.1, "cosine": 0.1, "right": 0.5, "reward": -0.5, "histogram": histogram}
    same["auroc"] = {"mean": 0.8, "standard_error": 0.01}
    good = {"size": 1.0, "coherence": 0.5, **same}
    bad = {"size": 2.0, "coherence": 0.2, **same}
    trap = {"before": 0.1, "at": 1.0, "after": 0.1, "saved": 0.0}
    for teacher in ("expert", "words", "backwards", "copy"):
        signal = good if teacher == "expert" else bad
        probe = f"signal of {teacher}"
        found[probe] = [{"seed": seed, "seconds": 1.0, **signal} for seed in seeds]
    found["trap"] = [{"seed": seed, "seconds": 1.0, **trap} for seed in seeds]
    return found


def words_of(found):
    return {x.claim: x.word for x in real.judge(found)}


def test_what_the_paper_has_holds_and_its_opposite_is_contradicted():
    """So it is for all claims but one: a rise without new knowledge, which these numbers lack."""
    held = words_of(results())
    missed = {claim for claim, word in held.items() if word != lab.HOLDS}
    assert missed == {
        "the base itself, as a teacher at temperature .4, teaches sharpness and no knowledge"
    }
    opposite = words_of(
        results(
            **{
                "success": NOTHING,
                "copy": GOOD,
                "words, 72 fast": GOOD,
                "words, sft": GOOD,
                "reverse": (140, 140, 80),
            }
        )
    )
    for claim in (
        "a copy that knows no more teaches nothing",
        "its earlier self takes back what expert iteration gave",
        "it fails, and is not just slow: six times the steps, ten times the rate, both",
        "a cold start and OPD do more than as many updates of OPD alone",
        "cold start and OPD do more than as many updates of fine-tuning alone",
    ):
        assert opposite[claim] == lab.CONTRADICTED


def test_a_claim_is_asked_of_the_seeds_that_have_its_arms():
    """It is left out if no seed has them."""
    found = results()
    found["reverse"] = []
    found["copy"] = found["copy"][1:]
    judged = words_of(found)
    assert "its earlier self takes back what expert iteration gave" not in judged
    (small,) = (x for x in real.judge(found) if x.claim.startswith("with copy, trained on"))
    assert small.found == "loss 0.25, 0.25 of success's, gradient norm 0.25, 0.25"
    assert small.word == "holds, 2 of 3 seeds so far"
    assert list(real.judge({name: [] for name in found})) == []


def test_the_dtypes_are_compared_where_there_are_two():
    """On a CPU that does not compute in bfloat16, success is in float32, too."""
    found = results()
    for run in found["success"][1:]:
        run["asked"]["dtype"] = "float32"
    assert words_of(found)["success ends in float32 as in bfloat16"] == "holds, 1 of 3 seeds so far"


def test_the_weaker_teacher_is_the_expert_after_the_last_round_below_the_one_in_words():
    """This is asked on seeds 3 and above. Each seed has its own round, or none."""
    claim = "on later seeds, a weaker teacher that thinks alike makes the better student"
    assert claim not in words_of(results())
    assert words_of(results(range(6))) == words_of(results()) | {claim: lab.HOLDS}
    (found,) = real.judge(results((3, 4, 5)))
    assert found.claim == claim
    assert found.found.startswith("teachers -0.094 ± 0.0")  # round 1: 110 against 125 right
    assert found.found.endswith("seeds 3, 4, 5")
    assert found.word == lab.HOLDS
    (found,) = real.judge(results((3, 4, 5), words=(80, 80, 100)))
    assert found.found == "on seeds 3, 4, 5 no expert scores surely less than words"
    assert found.word == lab.NOT_ASKABLE


def test_a_seed_without_a_weaker_expert_does_not_count():
    """Each seed has a weaker one in `results`; on two of these words is made weaker than all."""
    found = results((3, 4, 5))
    weak = results((3, 4, 5), words=(80, 80, 100))["words"]
    found["words"] = [found["words"][0], *weak[1:]]
    (made,) = real.judge(found)
    assert made.found.endswith("seeds 3")
    assert made.word == "holds, 1 of 3 seeds so far"


def test_the_rule_was_chosen_on_four_pairs_and_the_others_are_its_record(monkeypatch):
    """Those that were diagnosed after its commit, whatever their seed."""
    seen = []
    monkeypatch.setattr(forecast, "pairs_of", lambda runs, names, is_later: seen.append(is_later))
    real.pairs_of({})
    (is_later,) = seen
    old = [(arm, seed) for arm in real.TAUGHT for seed in range(5) if not is_later(arm, seed)]
    assert old == [("success", 0), ("success", 1), ("words", 0), ("words", 1)]


def test_a_model_that_was_made_again_otherwise_is_told():
    found = results((0, 1))
    for arm in ("success", "words"):
        for run in found[arm]:
            run["models"] = {"base": "b", "expert": "e"}
    assert real.unlike_models(found) == []
    found["words"][1]["models"]["expert"] = "f"
    assert real.unlike_models(found) == ["seed 1: expert was made 2 times, and not alike"]


def test_a_teacher_has_a_line_of_rewards_for_each_seed_that_has_them():
    """A claim that compares two teachers waits for both; that on the good one, for it alone."""
    found = results((0, 1))
    found["signal of words"] = found["signal of words"][1:]
    found["signal of copy"] = []
    lines = real.signal_lines(found)
    assert [line.partition(":")[0] for line in lines if "words" in line or "expert" in line] == [
        "signal of expert, seed 0",
        "signal of expert, seed 1",
        "signal of words, seed 1",
    ]
    assert lines[0].endswith(
        "AUROC 0.800 +- 0.010, right 0.500; |G| 1.000, coherence 0.5000, null 0.1000, cosine "
        "0.1000; reward -0.500"
    )
    words = words_of(found)
    assert words["a good teacher's mean reward ranks answers"] == "holds, 2 of 3 seeds so far"
    of_words = "the mean reward of words ranks them, too"
    assert words[of_words] == "holds, 1 of 3 seeds so far"
    assert not any("of copy " in claim for claim in words)


def test_the_figure_is_drawn(tmp_path):
    """As far as there are results."""
    pytest.importorskip("matplotlib")
    some = results()
    some["words"] = some["words, 72"] = some["reverse"] = []
    for name in some:
        if name.startswith("signal of "):
            some[name] = []
    plot.real(some, tmp_path / "some")
    assert "</svg>" in (tmp_path / "some.svg").read_text()
    plot.real(results(), tmp_path / "real")
    assert "</svg>" in (tmp_path / "real.svg").read_text()
    assert set(plot.REAL) == set(real.ARMS)
