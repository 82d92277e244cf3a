"""What the experiments share: a killed one goes on, noise is what it says, no number in their README is typed."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import again
import cost
import lab
import longer
import mechanism
import pytest
import real
import recipe
import report
import torch
import tour
import toy
from conftest import ROOT, TEMPLATE, WORDS, Killed, tiny, word_tokenizer

import opd
from loss import full_vocab, top_k
from plumbing.flags import check
from plumbing.prompts import load_prompts
from teacher import Pair, log_probs

HERE = ROOT / "experiments"
README = (HERE / "README.md").read_text()
RESULTS = sorted((HERE / "results").glob("*.json"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        tiny("llama", seed=seed, vocab_size=len(WORDS)).save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    (folder / "prompts.jsonl").write_text(
        "\n".join(
            json.dumps({"prompt": f"add {a} {b}", "answer": str((a + b) % 10)})
            for a in (0, 3, 7)
            for b in (0, 3, 7)
        )
    )
    return dict(
        student=f"{folder}/student",
        teacher=f"{folder}/teacher",
        prompts=f"{folder}/prompts.jsonl",
        steps=4,
        batch_size=2,
        max_new_tokens=5,
        k=4,
        eval_n=1,
        save_every=2,
        device="cpu",
    )


def test_a_killed_run_goes_on_and_a_finished_one_is_not_run_again(settings, tmp_path, monkeypatch):
    """The curve is that of a run that nothing stopped; a second call computes nothing, and its seconds still count."""
    monkeypatch.setattr(lab, "EARLIER", [])
    whole = lab.run(**settings, out=str(tmp_path / "whole"))
    update, log = opd.update, opd.Run.log

    def dies(cfg, pair, optimizer, rows, step):
        if step == 3:
            raise Killed
        return update(cfg, pair, optimizer, rows, step)

    monkeypatch.setattr(opd, "update", dies)
    with pytest.raises(Killed):
        lab.run(**settings, out=str(tmp_path / "cut"))
    logged = []
    monkeypatch.setattr(opd, "update", update)
    monkeypatch.setattr(
        opd.Run, "log", lambda run, row, *rest: (logged.append(row["step"]), log(run, row, *rest))
    )
    cut = lab.run(**settings, out=str(tmp_path / "cut"))
    assert logged == [3, 4]  # from the checkpoint of step 2
    for name in ("loss", "overlap_ratio", "reward", "accuracy"):
        assert cut["curves"][name] == whole["curves"][name] and len(whole["curves"][name]) == 4
    assert lab.run(**settings, out=str(tmp_path / "cut")) == cut and logged == [3, 4]
    assert (
        lab.EARLIER[-1] == pytest.approx(cut["seconds"], abs=0.5)
        and lab.EARLIER[0] < 0.1 < cut["seconds"]
    )
    longer = lab.run(**{**settings, "steps": 5}, out=str(tmp_path / "cut"))
    assert logged == [3, 4, 5] and longer["steps"] == 5


def test_a_template_of_ones_own_may_have_a_comma(settings):
    """--template is one; only --templates is cut at commas (5.2)."""
    assert "," in recipe.TEMPLATES["aligned"]
    cfg = opd.Config(**settings, template=recipe.TEMPLATES["aligned"], out="runs/none")
    assert check(cfg) == cfg


@pytest.mark.parametrize("change", [dict(lr=1e-2), dict(objective="full"), dict(seed=1)])
def test_runs_of_other_settings_are_not_taken_for_ones_own(settings, tmp_path, monkeypatch, change):
    """Whichever of the two has a default, nor where it has come further, nor those of another commit."""
    for kept, asked in ((settings, {**settings, **change}), ({**settings, **change}, settings)):
        out = str(tmp_path / str(kept is settings))
        lab.run(**kept, out=out)
        for call in (asked, {**kept, "steps": 3}):
            with pytest.raises(SystemExit, match="other settings or of another commit"):
                lab.run(**call, out=out)
    monkeypatch.setattr(lab.files, "provenance", lambda: {"commit": "another"})
    with pytest.raises(SystemExit, match="take another --runs"):
        lab.run(**kept, out=out)


def test_a_run_that_was_killed_further_on_is_not_cut_back(settings, tmp_path):
    """A checkpoint of step 4 does not become a run of 2 steps."""
    lab.run(**settings, out=str(tmp_path))
    (tmp_path / "result.json").unlink()
    with pytest.raises(ValueError, match="come to step 4; ask for more"):
        lab.run(**{**settings, "steps": 2}, out=str(tmp_path))


def test_a_run_without_a_step_has_empty_curves(settings, tmp_path):
    """As the arms of 5.1 that fine-tune only: measured before and after, and plot.py can read it."""
    said = [{"role": "user", "content": "add 3 7"}, {"role": "assistant", "content": "so 0"}]
    (tmp_path / "answers.jsonl").write_text(json.dumps({"messages": said}))
    made = lab.run(
        **{**settings, "steps": 0},
        cold_start_file=str(tmp_path / "answers.jsonl"),
        cold_start_steps=2,
        out=str(tmp_path / "run"),
    )
    assert made["curves"] == {name: [] for name in lab.CURVES}
    assert made["accuracy_cold_start"] == made["accuracy_after"]


def arm(*runs):
    return [
        {key: {"mean": mean, "standard_error": error} for key, (mean, error) in run.items()}
        for run in runs
    ]


def test_a_difference_and_its_noise_by_hand():
    """Two standard errors: of the prompts, 2 sqrt((.03^2 + .04^2) / 2) = .0707, or of seeds that differ,
    2 sqrt(.02 / 2) = .2; a second key of the same prompts takes nothing off.
    """
    same = arm({"a": (0.7, 0.03)}, {"a": (0.8, 0.03)}), arm({"a": (0.5, 0.04)}, {"a": (0.6, 0.04)})
    assert lab.difference(*same, of=("a",)) == pytest.approx((0.2, 0.005**0.5))
    assert lab.difference(*same, of=("a", "a")) == pytest.approx((0.2, 0.005**0.5))
    apart = arm({"a": (0.7, 0.03)}, {"a": (0.8, 0.03)}), arm({"b": (0.5, 0.04)}, {"b": (0.4, 0.04)})
    assert lab.difference(*apart, of=("a",), than=("b",)) == pytest.approx((0.3, 0.2))
    with pytest.raises(ValueError):
        lab.difference(same[0], same[1][:1], of=("a",))  # a seed is missing


def test_results_of_several_commands_are_joined_once(tmp_path):
    """The seeds of one command twice would halve the noise."""
    parts = [
        {
            "command": f"x.py --seeds {seed}",
            "commit": "c",
            "threads": 1,
            "seconds": 2,
            "runs": [{"seed": seed}],
        }
        for seed in (0, 1)
    ]
    made = lab.join(parts)
    assert [run["seed"] for run in made["runs"]] == [0, 1] and made["seconds"] == 4
    assert made["command"] == "x.py --seeds 0 ; x.py --seeds 1"
    for other, why in (
        (parts[0], "twice"),
        ({**parts[1], "commit": "d"}, "commits"),
        ({**parts[1], "threads": 2}, "threads"),
    ):
        with pytest.raises(SystemExit, match=why):
            lab.join([parts[0], other])


def test_what_an_experiment_needs_is_asked_for_before_anything_runs(monkeypatch, capsys):
    """One line, exit code 2."""
    monkeypatch.setattr(sys, "argv", ["x.py", "--student", "S"])
    with pytest.raises(SystemExit, match="2"):
        lab.main("x", "", None, None, {"student": "", "teacher": "", "prompts": ""})
    assert "--teacher, --prompts: needed" in capsys.readouterr().err


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_say_where_they_come_from(path):
    """Command, commit of a clean tree, seconds; a figure that a page can carry."""
    made = json.loads(path.read_text())
    assert path.stem in made["command"] and made["seconds"] > 0 and made["threads"] > 0
    assert len(made["commit"]) == 12 and path.with_suffix(".txt").exists()
    if path.stem != "bench":
        assert len({run["seed"] for run in made["runs"]}) >= 3
        assert path.with_suffix(".svg").stat().st_size < 150_000


def test_the_tables_of_findings_are_a_fresh_report():
    """Nobody types a number, and what does not hold says so; every criterion belongs to one finding."""
    made = report.results_of(HERE / "results")
    assert report.put(report.findings(made), "findings", README) == README
    assert report.put(report.scripts(made), "scripts", README) == README
    assert (HERE / "results" / "findings.md").read_text() == report.criteria(made)
    named = [
        name
        for finding in report.FINDINGS
        for cell in finding[2:4]
        for name in cell.split("; ")
        if name
    ]
    assert sorted(named) == sorted(name for script in report.PAPER for name in report.PAPER[script])
    assert set(named) >= {name for name, *_ in report.judged(made)}


def test_a_finding_of_several_criteria_holds_where_all_of_them_do():
    """Some: partly; of criteria that were not asked yet nothing is said."""
    holds = {"a": True, "b": False, "c": True}
    assert [report.summed_up(names, holds) for names in ("a; c", "a; b", "b", "d", "", "a; d")] == [
        "holds",
        "partly",
        "**does not**",
        "",
        "",
        "holds",
    ]


def test_what_else_the_page_shows_of_results_stands_there_to_the_letter():
    """The bench's table whole, the forecast's from its summary on; of recipe.txt whole lines, in order. Every link
    leads to a file."""
    assert (
        report.put(
            report.printed(HERE / "results" / "forecast.txt", "Spearman"), "forecast", README
        )
        == README
    )
    assert report.put(report.printed(HERE / "results" / "bench.txt"), "bench", README) == README
    block = README.split("```text\n5.1 arm ")[1].split("```")[0].splitlines()[1:]
    lines = iter((HERE / "results" / "recipe.txt").read_text().splitlines())
    assert len(block) > 5 and all(line in lines for line in block)
    assert all((HERE / target).exists() for target in re.findall(r"\]\(([^)#]+)\)", README))


def test_a_page_without_its_markers_is_refused():
    """Named, and nothing is written; with them only what is between changes."""
    first, last = report.MARKERS["bench"]
    assert report.put("new\n", "bench", f"a\n{first}old\n{last}b\n") == f"a\n{first}new\n{last}b\n"
    with pytest.raises(SystemExit, match="<!-- end of the bench -->"):
        report.put("new\n", "bench", f"a\n{first}")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_name_no_folder_of_one_machine(path):
    """A command is written down so that another machine can run it."""
    assert not [
        word for word in json.loads(path.read_text())["command"].split() if word.startswith("/")
    ]


def test_entropy_passes_where_enough_tokens_say_so():
    """6.1: one response that got lost is not the end of all responses; a quarter that nobody reaches says nothing."""

    def row(tokens, entropy):
        return {"by_position": {"tokens": tokens, "entropy_student": entropy}}

    full, lost, quiet = [64, 64, 64, 64], [64, 64, 64, 6], [64, 64, 0]
    rows = [
        row(quiet, [1.0, 1.0, None]),
        row(lost, [1.0, 1.0, 1.0, 2.0]),
        row(full, [1.0, 1.0, 1.0, 2.0]),
        row(full, [1.0, 2.0, 2.0, 2.0]),
    ]
    assert cost.passed(rows) == {"front": None, "back": 3} and cost.passed(rows, nats=0.5) == {
        "front": 1,
        "back": 3,
    }


def test_the_size_and_angle_of_a_gradient_do_not_mistake_noise_for_signal():
    """2.2: four batches, noise 5 times the signal: the norm of their mean would be off by a factor, an angle too."""
    generator, trials = torch.Generator().manual_seed(0), []
    exact, other = torch.zeros(2, 50, dtype=torch.float64)
    exact[0], other[:2] = 2.0, torch.tensor([1.8, 2.4])  # sizes 2 and 3, cosine .6
    for _ in range(2000):
        noise = torch.randn(2, 4, 50, generator=generator, dtype=torch.float64) * (20 / 50) ** 0.5
        trials.append(
            cost.expectations({"Eq. 4": exact + noise[0], "other": other + 0.1 * noise[1]}, "Eq. 4")
        )
    squares = [trial["Eq. 4"]["size"] ** 2 for trial in trials if trial["Eq. 4"]["size"] > 0]
    assert sum(squares) / len(trials) == pytest.approx(4, abs=0.3)  # not 4 + 20 / 4
    calm = cost.expectations(
        {"Eq. 4": exact + 0.1 * noise[0], "other": other + 0.1 * noise[1]}, "Eq. 4"
    )
    assert calm["other"]["size"] == pytest.approx(3, abs=0.2) and calm["other"][
        "cosine"
    ] == pytest.approx(0.6, abs=0.1)
    assert calm["other"]["noise"] == pytest.approx(0.2 / 9, abs=0.01) and calm["Eq. 4"][
        "cosine"
    ] == pytest.approx(1)


def test_what_the_gain_by_depth_would_be_by_slips_alone(monkeypatch):
    """6.1: right .64 and .81 of the time from the start: half-way .64^.5 (.81^.5 - .64^.5) = .8 (.9 - .8)."""

    def finished(pair, rows, responses, **settings):
        s, t = torch.full((4,), 0.64), torch.full((4,), 0.81)
        return {depth: (t - s, s, t, 30 * depth) for depth in (0.0, 0.5)}

    wrote = SimpleNamespace(write=lambda prompts, **_: SimpleNamespace(response_ids=lambda i: [i]))
    monkeypatch.setattr(cost, "load", lambda *paths: wrote)
    monkeypatch.setattr(cost, "encoded", lambda *_: [{"ids": [1], "answer": "2"}] * 4)
    monkeypatch.setattr(cost.analysis, "continuation", finished)
    assert [x["even"] for x in cost.depths(Path("w"), 0, True)] == pytest.approx([0.17, 0.08])


def two(architecture="llama"):
    """A student, and a wider, deeper teacher with padded rows of its head; what the student wrote to six prompts."""
    student = tiny(architecture, vocab_size=len(WORDS))
    teacher = tiny("llama", seed=1, vocab_size=len(WORDS) + 3, hidden=48, layers=3)
    pair = Pair.of(student, teacher, word_tokenizer(), word_tokenizer())
    prompts = [[1, 4], [1, 5, 6], [1, 6, 7, 4, 5], [1, 4, 7, 5], [1, 7], [1, 5, 4, 4, 4]]
    return pair, pair.write(prompts, max_new_tokens=6, seed=0)


def full(log_p, log_q, y):
    return full_vocab(log_p, log_q)


@pytest.mark.parametrize(
    "objective", [full, lambda log_p, log_q, y: top_k(log_p, log_q, 4)], ids=["full", "top-k"]
)
@pytest.mark.parametrize("temperature, teacher_temperature", [(1.0, 1.0), (0.5, 2.0)])
def test_the_gradients_of_positions_sum_to_that_of_the_output_head(
    objective, temperature, teacher_temperature
):
    """sum_t g_t h_t' = the gradient of the summed loss on the head's weight, by autograd on plain logits."""
    pair, r = two()
    pair.micro_batch_tokens = 20
    chunks = list(
        cost.logit_gradients(
            pair,
            r,
            objective,
            temperature=temperature,
            chunk=3,
            teacher_temperature=teacher_temperature,
        )
    )
    assert (
        sum(len(g) for g, _ in chunks) == r.response_mask.sum()
        and max(len(g) for g, _ in chunks) == 3
    )
    log_p, log_q = (
        log_probs(
            model, r.ids, r.attention_mask, r.is_response, vocab_size=len(WORDS), temperature=t
        )
        for model, t in ((pair.student, temperature), (pair.teacher, teacher_temperature))
    )  # (N, V)
    total = objective(log_p, log_q, r.ids[r.is_response]).sum()
    (expected,) = torch.autograd.grad(total, pair.student.get_output_embeddings().weight)  # (V, H)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(sum(g.T @ h for g, h in chunks), expected, rtol=1e-3, atol=1e-4)
    assert all(
        p.grad is None for p in pair.student.parameters()
    )  # a measurement leaves nothing behind


def test_the_gradients_of_positions_are_at_temperature_1_where_nothing_is_said():
    """Both temperatures default to the models as they are."""
    plain, said = (
        list(cost.logit_gradients(*two(), full, **options))
        for options in ({}, dict(temperature=1.0, teacher_temperature=1.0))
    )
    torch.testing.assert_close(plain, said, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Gemma2ForCausalLM does more")
def test_where_the_head_is_not_linear_only_logits_are_compared():
    """Gemma 2 caps its logits: h is 1 and g the gradient on the logits themselves, which sums to 0 over a softmax."""
    pair, r = two("gemma2")
    ((g, h),) = cost.logit_gradients(pair, r, full)
    assert (
        g.shape == (r.response_mask.sum(), len(WORDS)) and h.shape == (len(g), 1) and (h == 1).all()
    )
    torch.testing.assert_close(g.sum(-1), torch.zeros(len(g)), rtol=0, atol=1e-5)
    assert g.norm(dim=-1).min() > 0


def test_slips_are_told_apart_by_what_both_find_likely(tmp_path):
    """4.2: against a loop over responses, each by itself and unpadded."""
    for seed, name in enumerate(("student", "teacher")):
        tiny("llama", seed=seed, vocab_size=len(toy.WORDS)).save_pretrained(tmp_path / name)
        toy.tokenizer().save_pretrained(tmp_path / name)
    pair, expected, places = (
        Pair.load(tmp_path / "student", tmp_path / "teacher", device="cpu"),
        {},
        set(),
    )
    digits, count = toy.problems(48, torch.Generator().manual_seed(3))
    prompts, _ = toy.question(digits, count)
    r = pair.write(prompts, max_new_tokens=96, seed=3)
    for i, prompt in enumerate(prompts):
        at = toy.first_slip(r.response_ids(i), digits[i].tolist(), count[i].item())
        before, token = torch.tensor([prompt + r.response_ids(i)[:at]]), r.response_ids(i)[at]
        likely = [
            set(model(before).logits[0, -1].topk(60).indices.tolist())
            for model in (pair.student, pair.teacher)
        ]
        kind = "shared" if token in likely[0] & likely[1] else "apart"
        expected[kind] = expected.get(kind, 0) + 1 / 48
        places.add(at)
    assert mechanism.slips(
        tmp_path / "student", tmp_path / "teacher", 3, k=60, n=48
    ) == pytest.approx(expected)
    assert len(expected) == 2 and len(places) > 1


@pytest.mark.slow
def test_the_real_model_s_scripts_run_on_any_chat_model(tmp_path):
    """A tiny one with random weights: three teachers, all runs, both diagnoses, three judges; the later scripts read
    what the earlier have run.
    """
    model = tiny("llama", vocab_size=len(WORDS))
    model.config.max_position_embeddings = 256
    model.save_pretrained(tmp_path / "base")
    word_tokenizer(chat_template=TEMPLATE).save_pretrained(tmp_path / "base")
    world, runs = tmp_path / "world", tmp_path / "runs"
    for script, other in (
        (real, {}),
        (again, {"real": tmp_path / "real.json"}),
        (longer, {"again": tmp_path / "again.json"}),
    ):
        made = script.seed_runs(0, world, runs, True, tmp_path / "base", **other)
        assert {run["run"] for run in made} >= set(script.RUNS)
        results = {"runs": made, "command": "x", "commit": "c", "seconds": 1, "threads": 1}
        lab.write(results, tmp_path / script.__name__, lab.CURVES, script.report)
    with pytest.raises(SystemExit, match="has no runs of seed 1"):
        again.seed_runs(1, world, runs, True, tmp_path / "base", tmp_path / "real.json")
    with pytest.raises(SystemExit, match="again.json has no runs of seed 1"):
        longer.seed_runs(1, world, runs, True, tmp_path / "base", tmp_path / "again.json")


def test_sums_are_asked_as_the_teachers_were_trained_and_in_other_words(tmp_path):
    """All 727 once, none of them an example; the same ones in other words; what is held out is in neither."""
    real.write_questions(tmp_path, 3)
    rows = {
        name: load_prompts(tmp_path / f"{name}.jsonl")
        for name in ("eval", "prompts", "wordy", "one")
    }
    asked = {name: [row["prompt"][-1]["content"] for row in part] for name, part in rows.items()}
    assert (
        len(set(asked["eval"] + asked["prompts"])) == 727
        and "5 + 6 + 9" not in asked["eval"] + asked["prompts"]
    )
    digits = re.findall(r"\d", asked["prompts"][0])
    assert asked["one"] == asked["prompts"][:1]
    assert asked["wordy"][0] == "What is the sum of {}, {} and {}?".format(*digits)
    for row in rows["wordy"]:
        assert sum(map(int, re.findall(r"\d", row["prompt"][-1]["content"]))) == int(row["answer"])
    assert real.steps_of(5, 6, 9) == "5 + 6 = 11, 11 + 9 = 20. Answer: 20"
    assert real.backwards(5, 6, 9) == "9 + 6 = 15, 15 + 5 = 20. Answer: 20"
    assert (
        again.in_words(9, 9, 9)
        == "Nine plus nine is eighteen, eighteen plus nine is twenty-seven. Answer: 27"
    )


def test_equal_is_more_than_not_different():
    """Within noise, and the noise within the margin: neither a noisy run nor a small but sure difference will do."""
    assert lab.equal(0.01, 0.02) and lab.equal(-0.01, 0.02)
    assert not lab.equal(0.03, 0.02) and not lab.equal(0.01, 0.045) and not lab.equal(-0.04, 0.2)


def test_the_tour_names_lines_that_are_there(tmp_path, capsys):
    """Eight stops, each with a claim of a section; a decorated function is found where it is written."""
    assert len(tour.STOPS) == 8
    for claim, call, read, _ in tour.STOPS:
        assert re.match(r"\d(\.\d)? ", claim) and call
        for function in read:
            file, line, name = re.match(r"(\w+\.py):(\d+) (\S+)", tour.where(function)).groups()
            lines = (ROOT / file).read_text().splitlines()[int(line) - 1 :]
            assert f"def {name.split('.')[-1]}(" in "".join(lines[:2]), (
                name
            )  # a decorator may stand above
    for words, said in (
        (["--models", str(tmp_path)], "experiments/toy.py --all"),
        (["9"], "has no"),
    ):
        with pytest.raises(SystemExit, match="2"):
            tour.main(words)
        assert said in capsys.readouterr().err
