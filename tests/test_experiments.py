"""The experiments: a killed one goes on, noise is what it says, no number in README is typed."""

import dataclasses
import json
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import again
import cost
import lab
import longer
import mechanism
import pytest
import real
import report
import torch
import tour
import toy
from conftest import ROOT, TEMPLATE, WORDS, Killed, config, tiny, tiny_pair, word_tokenizer

import opd
from loss import full_vocab, top_k
from plumbing.prompts import load_prompts
from teacher import UserError, log_probs

HERE = ROOT / "experiments"
RESULTS = HERE / "results"
README = (HERE / "README.md").read_text()
SCRIPTS = sorted(path.stem for path in RESULTS.glob("*.json"))


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture
def settings(world):
    """Settings of a short run, as the scripts hand them to lab.run."""
    flags = dataclasses.asdict(config(world, ""))
    del flags["out"]
    return {**flags, "batch_size": 2, "n": 1}


def test_a_killed_run_goes_on_and_a_finished_one_is_not_run_again(settings, tmp_path, monkeypatch):
    """Its curve is that of a run that nothing stopped; its seconds count in a later call, too."""
    monkeypatch.setattr(lab, "EARLIER", [])
    update = opd.update
    done = []

    def dies(cfg, pair, optimizer, rows, step):
        if step == 3:
            raise Killed
        return update(cfg, pair, optimizer, rows, step)

    def counts(cfg, pair, optimizer, rows, step):
        done.append(step)
        return update(cfg, pair, optimizer, rows, step)

    whole = lab.run(**settings, out=str(tmp_path / "whole"))
    out = str(tmp_path / "cut")
    monkeypatch.setattr(opd, "update", dies)
    with pytest.raises(Killed):
        lab.run(**settings, out=out)
    monkeypatch.setattr(opd, "update", counts)
    cut = lab.run(**settings, out=out)
    assert done == [2, 3]  # from the checkpoint after two steps
    for name in ("loss", "overlap_ratio", "reward", "accuracy"):
        assert len(whole["curves"][name]) == 4
        assert cut["curves"][name] == whole["curves"][name]
    assert lab.run(**settings, out=out) == cut
    assert done == [2, 3]
    assert lab.EARLIER[0] < 0.1 < cut["seconds"]
    assert lab.EARLIER[-1] == pytest.approx(cut["seconds"], abs=0.5)
    longer_run = lab.run(**{**settings, "steps": 5}, out=out)
    assert done == [2, 3, 4]
    assert longer_run["steps"] == 5


@pytest.mark.parametrize("change", [{"lr": 1e-2}, {"objective": "full"}, {"seed": 1}])
def test_runs_of_other_settings_are_not_taken_for_ones_own(settings, tmp_path, change):
    """Whichever of the two is the default, nor one that has come further."""
    settings["steps"] = 2
    changed = {**settings, **change}
    for kept, asked in ((settings, changed), (changed, settings)):
        out = str(tmp_path / str(kept is settings))
        lab.run(**kept, out=out)
        for other in (asked, {**kept, "steps": 1}):
            with pytest.raises(SystemExit, match="other settings or of another commit"):
                lab.run(**other, out=out)


def test_runs_of_another_commit_are_not_taken_for_ones_own(settings, tmp_path, monkeypatch):
    """What another version measured is another number."""
    settings["steps"] = 1
    lab.run(**settings, out=str(tmp_path))
    monkeypatch.setattr(lab.files, "provenance", lambda: {"commit": "another"})
    with pytest.raises(SystemExit, match="take another --runs"):
        lab.run(**settings, out=str(tmp_path))


def test_a_run_that_was_killed_further_on_is_not_cut_back(settings, tmp_path):
    """A checkpoint of step 4 does not become a run of 2 steps."""
    lab.run(**settings, out=str(tmp_path))
    (tmp_path / "result.json").unlink()
    with pytest.raises(UserError, match="come to step 4; ask for more"):
        lab.run(**{**settings, "steps": 2}, out=str(tmp_path))


def test_a_run_without_a_step_has_empty_curves(settings, tmp_path):
    """As the arms of 5.1 that fine-tune only: measured before and after."""
    said = [{"role": "user", "content": "add 7 7"}, {"role": "assistant", "content": "so 0"}]
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"messages": said}))
    cold = {"steps": 0, "cold_start_file": str(answers), "cold_start_steps": 2}
    made = lab.run(**{**settings, **cold}, out=str(tmp_path / "run"))
    assert made["curves"] == {name: [] for name in lab.CURVES}
    assert made["accuracy_cold_start"] == made["accuracy_after"]


# --- what is said of them -----------------------------------------------------------------------


def accuracies(name, *values):
    """One run a seed, of {name: accuracy}; values: (mean, standard error)."""
    return [{name: {"mean": mean, "standard_error": error}} for mean, error in values]


def test_a_difference_and_its_noise_by_hand():
    """Two standard errors: of the prompts, 2 sqrt((.03^2 + .04^2) / 2) = .0707, or of seeds that
    differ, 2 sqrt(.02 / 2) = .2; a second key of the same prompts takes nothing off."""
    ours = accuracies("a", (0.7, 0.03), (0.8, 0.03))
    theirs = accuracies("a", (0.5, 0.04), (0.6, 0.04))
    apart = accuracies("b", (0.5, 0.04), (0.4, 0.04))
    assert lab.difference(ours, theirs, of=("a",)) == pytest.approx((0.2, 0.005**0.5))
    assert lab.difference(ours, theirs, of=("a", "a")) == pytest.approx((0.2, 0.005**0.5))
    assert lab.difference(ours, apart, of=("a",), than=("b",)) == pytest.approx((0.3, 0.2))
    with pytest.raises(ValueError):
        lab.difference(ours, theirs[:1], of=("a",))  # a seed is missing


def test_two_that_know_their_prompts_are_compared_prompt_by_prompt():
    """Each of 8 prompts gains 1 right answer of 4: a lead of .25. Older results do not know their
    prompts, and the errors are added up."""
    before = {"mean": 0.375, "standard_error": 0.15, "samples": 32, "each": [0, 1, 2, 3] * 2}
    after = {"mean": 0.625, "standard_error": 0.15, "samples": 32, "each": [1, 2, 3, 4] * 2}
    lead = lab.lead(after, before)
    assert lead["mean"] == pytest.approx(0.25)
    assert lead["standard_error"] < 0.2
    del after["each"]
    assert lab.lead(after, before)["standard_error"] == pytest.approx(0.15 * 2**0.5)


def test_equal_is_more_than_not_different():
    """Within noise, and the noise within the margin: neither a noisy run nor a small but sure
    difference will do."""
    assert lab.equal(0.01, 0.02)
    assert lab.equal(-0.01, 0.02)
    for off, noise in ((0.03, 0.02), (0.01, 0.045), (-0.04, 0.2)):
        assert not lab.equal(off, noise)


def test_results_of_several_commands_are_joined_once():
    """The seeds of one command twice would halve the noise."""
    made_by = {"commit": "c", "threads": 1, "seconds": 2}
    first = {"command": "x.py --seeds 0", **made_by, "runs": [{"seed": 0}]}
    second = {"command": "x.py --seeds 1", **made_by, "runs": [{"seed": 1}]}
    made = lab.join([first, second])
    assert made["runs"] == [{"seed": 0}, {"seed": 1}]
    assert made["seconds"] == 4
    assert made["command"] == "x.py --seeds 0 ; x.py --seeds 1"
    cases = (
        (first, "twice"),
        ({**second, "commit": "d"}, "commits"),
        ({**second, "threads": 2}, "threads"),
    )
    for other, why in cases:
        with pytest.raises(SystemExit, match=why):
            lab.join([first, other])


def test_what_an_experiment_needs_is_asked_for_before_anything_runs(monkeypatch, capsys):
    """One line, exit code 2."""
    monkeypatch.setattr(sys, "argv", ["x.py", "--student", "S"])
    with pytest.raises(SystemExit, match="2"):
        lab.main("x", "", None, None, {"student": "", "teacher": "", "prompts": ""})
    assert "--teacher, --prompts: needed" in capsys.readouterr().err


# --- the page of findings -----------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_results_say_where_they_come_from(script):
    """A command that another machine can run, the commit, the seconds; three seeds or more."""
    made = json.loads((RESULTS / f"{script}.json").read_text())
    assert script in made["command"]
    assert not any(word.startswith("/") for word in made["command"].split())
    assert made["seconds"] > 0
    assert made["threads"] > 0
    assert len(made["commit"]) == 12
    assert (RESULTS / f"{script}.txt").exists()
    if script != "bench":
        assert len({run["seed"] for run in made["runs"]}) >= 3
        assert (RESULTS / f"{script}.svg").exists()


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "bench"])
def test_a_table_of_results_is_written_from_them(script, tmp_path, monkeypatch):
    """Results that an earlier version measured are still read, and say what they said."""
    module = __import__(script)
    monkeypatch.setattr(module.plot, script, lambda *_: None)
    made = json.loads((RESULTS / f"{script}.json").read_text())
    module.report(made, tmp_path / script)
    written = (tmp_path / f"{script}.txt").read_text()
    assert written == (RESULTS / f"{script}.txt").read_text()


def test_the_tables_of_findings_are_a_fresh_report():
    """Nobody types a number, and what does not hold says so; every criterion belongs to one
    finding."""
    made = report.results_of(RESULTS)
    assert report.put(report.findings(made), "findings", README) == README
    assert report.put(report.scripts(made), "scripts", README) == README
    assert (RESULTS / "findings.md").read_text() == report.criteria(made)
    named = []
    for _, _, on_the_toy, on_a_real_model, _ in report.FINDINGS:
        named += [name for name in on_the_toy.split("; ") + on_a_real_model.split("; ") if name]
    known = []
    for criteria in report.PAPER.values():
        known += criteria
    assert sorted(named) == sorted(known)
    assert set(named) >= {name for name, *_ in report.judged(made)}


def test_what_else_the_page_shows_of_results_stands_there_to_the_letter():
    """The bench's table whole, the forecast's from its summary on; of recipe.txt whole lines, in
    order."""
    forecast = report.printed(RESULTS / "forecast.txt", "Spearman")
    bench = report.printed(RESULTS / "bench.txt")
    assert report.put(forecast, "forecast", README) == README
    assert report.put(bench, "bench", README) == README
    block = README.split("```text\n5.1 arm ")[1].split("```")[0].splitlines()[1:]
    lines = iter((RESULTS / "recipe.txt").read_text().splitlines())
    assert len(block) > 5
    assert all(line in lines for line in block)


def test_a_finding_of_several_criteria_holds_where_all_of_them_do():
    """Some: partly; of criteria that were not asked yet nothing is said."""
    holds = {"a": True, "b": False, "c": True}
    expected = {"a; c": "holds", "a; d": "holds", "a; b": "partly", "b": "**does not**", "d": ""}
    for names, said in expected.items():
        assert report.summed_up(names, holds) == said
    assert report.summed_up("", holds) == ""


def test_a_page_without_its_markers_is_refused():
    """By name; with them only what is between changes."""
    first, last = report.MARKERS["bench"]
    page = f"a\n{first}old\n{last}b\n"
    assert report.put("new\n", "bench", page) == f"a\n{first}new\n{last}b\n"
    with pytest.raises(SystemExit, match="<!-- end of the bench -->"):
        report.put("new\n", "bench", f"a\n{first}")


# --- 6.1 and 2.2 --------------------------------------------------------------------------------


def step(tokens, entropy):
    return {"by_position": {"tokens": tokens, "entropy_student": entropy}}


def test_entropy_passes_where_enough_tokens_say_so():
    """6.1: one response that got lost is not the end of all; a quarter that nobody reaches says
    nothing."""
    rows = [
        step([64, 64, 0], [1.0, 1.0, None]),
        step([64, 64, 64, 6], [1.0, 1.0, 1.0, 2.0]),
        step([64, 64, 64, 64], [1.0, 1.0, 1.0, 2.0]),
        step([64, 64, 64, 64], [1.0, 2.0, 2.0, 2.0]),
    ]
    assert cost.passed(rows) == {"front": None, "back": 3}
    assert cost.passed(rows, nats=0.5) == {"front": 1, "back": 3}


def test_the_size_and_angle_of_a_gradient_do_not_mistake_noise_for_signal():
    """2.2: four batches, noise 5 times the signal: the norm of their mean would be off by a
    factor, an angle too."""
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


def test_what_the_gain_by_depth_would_be_by_slips_alone(monkeypatch):
    """6.1: right .64 and .81 of the time from the start: half-way .64^.5 (.81^.5 - .64^.5) = .8
    (.9 - .8)."""

    def finished(pair, rows, responses, depth, **how):
        student, teacher = torch.full((4,), 0.64), torch.full((4,), 0.81)
        return {"student": student, "teacher": teacher, "tokens": 30 * depth}

    written = SimpleNamespace(response_ids=lambda i: [i])
    monkeypatch.setattr(cost, "load", lambda *paths: None)
    monkeypatch.setattr(cost, "write", lambda pair, prompts, **how: written)
    monkeypatch.setattr(cost, "encoded", lambda *_: [{"ids": [1], "answer": "2"}] * 4)
    monkeypatch.setattr(cost.analysis, "continuation", finished)
    monkeypatch.setattr(cost.analysis, "DEPTHS", (0.0, 0.5))
    found = cost.depths(Path("w"), 0, True)
    assert [x["even"] for x in found] == pytest.approx([0.17, 0.08])


PROMPTS = [[1, 4], [1, 5, 6], [1, 6, 7, 4, 5], [1, 4, 7, 5], [1, 7], [1, 5, 4, 4, 4]]


def written(architecture="llama"):
    """A pair, and what its student wrote to six prompts."""
    pair = tiny_pair(architecture, micro_batch_tokens=20)
    return pair, lab.write(pair, PROMPTS, max_new_tokens=6, seed=0)


def full(log_p, log_q, y):
    return full_vocab(log_p, log_q)


def top_4(log_p, log_q, y):
    return top_k(log_p, log_q, 4)


@pytest.mark.parametrize("objective", [full, top_4])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.5, "teacher_temperature": 2.0}])
def test_the_gradients_of_positions_sum_to_that_of_the_output_head(objective, how):
    """sum_t g_t h_t' = the gradient of the summed loss on the head's weight, by autograd on plain
    logits. Where nothing is said, temperatures are 1."""
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
    """Gemma 2 caps its logits: h is 1 and g the gradient on the logits themselves, which sums to
    0 over a softmax."""
    pair, r = written("gemma2")
    pair.micro_batch_tokens = 1000
    ((g, h),) = cost.logit_gradients(pair, r, full)
    N = r.response_mask.sum()
    assert g.shape == (N, len(WORDS))
    assert h.shape == (N, 1)
    assert (h == 1).all()
    torch.testing.assert_close(g.sum(-1), torch.zeros(N), rtol=0, atol=1e-5)
    assert g.norm(dim=-1).min() > 0


# --- 4.2 ----------------------------------------------------------------------------------------


def test_slips_are_told_apart_by_what_both_find_likely(tmp_path):
    """Against a loop over responses, each by itself and unpadded."""
    for seed, name in enumerate(("student", "teacher")):
        tiny("llama", seed=seed, vocab_size=len(toy.WORDS)).save_pretrained(tmp_path / name)
        toy.tokenizer().save_pretrained(tmp_path / name)
    paths = (tmp_path / "student", tmp_path / "teacher")
    pair = lab.load(*paths)
    digits, count = toy.problems(24, torch.Generator().manual_seed(3))
    prompts, _ = toy.question(digits, count)
    r = lab.write(pair, prompts, max_new_tokens=96, seed=3)
    expected = {"shared": 0, "apart": 0}
    places = set()
    for i, prompt in enumerate(prompts):
        response = r.response_ids(i)
        at = toy.first_slip(response, digits[i].tolist(), count[i].item())
        before = torch.tensor([prompt + response[:at]])
        in_both = True
        for model in (pair.student, pair.teacher):
            likeliest = model(before).logits[0, -1].topk(60).indices
            in_both = in_both and response[at] in likeliest
        expected["shared" if in_both else "apart"] += 1 / 24
        places.add(at)
    assert mechanism.slips(*paths, 3, k=60, n=24) == pytest.approx(expected)
    assert min(expected.values()) > 0
    assert len(places) > 1


# --- the real model's scripts, and the tour -----------------------------------------------------


@pytest.mark.slow
def test_the_real_model_s_scripts_run_on_any_chat_model(tmp_path):
    """A tiny one with random weights; the later scripts read what the earlier have run."""
    base, world, runs = tmp_path / "base", tmp_path / "world", tmp_path / "runs"
    model = tiny("llama", vocab_size=len(WORDS))
    model.config.max_position_embeddings = 256
    model.save_pretrained(base)
    word_tokenizer(chat_template=TEMPLATE).save_pretrained(base)
    scripts = (
        (real, {}),
        (again, {"real": tmp_path / "real.json"}),
        (longer, {"again": tmp_path / "again.json"}),
    )
    for script, earlier in scripts:
        made = script.seed_runs(0, world, runs, True, base, **earlier)
        assert {run["run"] for run in made} >= set(script.RUNS)
        results = {"runs": made, "command": "x", "commit": "c", "seconds": 1, "threads": 1}
        lab.save(results, tmp_path / script.__name__, lab.CURVES, script.report)
    with pytest.raises(SystemExit, match="real.json has no runs of seed 1"):
        again.seed_runs(1, world, runs, True, base, tmp_path / "real.json")
    with pytest.raises(SystemExit, match="again.json has no runs of seed 1"):
        longer.seed_runs(1, world, runs, True, base, tmp_path / "again.json")


def test_sums_are_asked_as_the_teachers_were_trained_and_in_other_words(tmp_path):
    """All 727 once, none of them an example; the same ones in other words; what is held out is in
    neither."""
    real.write_questions(tmp_path, 3)
    rows = {}
    asked = {}
    for name in ("eval", "prompts", "wordy", "one"):
        rows[name] = load_prompts(tmp_path / f"{name}.jsonl")
        asked[name] = [row["prompt"][-1]["content"] for row in rows[name]]
    plain = asked["eval"] + asked["prompts"]
    assert len(set(plain)) == 727
    assert "5 + 6 + 9" not in plain
    assert asked["one"] == asked["prompts"][:1]
    digits = re.findall(r"\d", asked["prompts"][0])
    assert asked["wordy"][0] == "What is the sum of {}, {} and {}?".format(*digits)
    for row, text in zip(rows["wordy"], asked["wordy"]):
        assert sum(map(int, re.findall(r"\d", text))) == int(row["answer"])


def test_three_ways_to_work_a_sum_out():
    """From the left, from the right, in words."""
    assert real.steps_of(5, 6, 9) == "5 + 6 = 11, 11 + 9 = 20. Answer: 20"
    assert real.backwards(5, 6, 9) == "9 + 6 = 15, 15 + 5 = 20. Answer: 20"
    in_words = "Nine plus nine is eighteen, eighteen plus nine is twenty-seven. Answer: 27"
    assert again.in_words(9, 9, 9) == in_words


def test_the_tour_names_lines_that_are_there():
    """A decorated function is found where it is written."""
    for _, _, read, _ in tour.STOPS:
        for function in read:
            file, line, name = re.match(r"(\w+\.py):(\d+) (\S+)", tour.where(function)).groups()
            lines = (ROOT / file).read_text().splitlines()[int(line) - 1 :]
            assert f"def {name}(" in "".join(lines[:2]), name  # a decorator may stand above


@pytest.mark.parametrize("words, said", [(["--models", "."], "toy.py --all"), (["9"], "has no")])
def test_the_tour_says_what_it_lacks(words, said, tmp_path, monkeypatch, capsys):
    """One line, exit code 2."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        tour.main(words)
    assert said in capsys.readouterr().err
