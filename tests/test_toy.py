"""The toy world is what experiments/toy.py says it is."""

import json

import pytest
import torch
import toy
from transformers import AutoModelForCausalLM, AutoTokenizer

from plumbing.answers import read_answer
from rollout import from_texts


def corpus(family, noise, n):
    """n problems and solutions: -> digits (n, MOST), count (n,), [prompt ids], [response ids]."""
    generator = torch.Generator().manual_seed(0)
    digits, count = toy.problems(n, generator)
    ids, mask, is_response = toy.corpus(family, digits, count, noise, generator)
    prompts = [ids[i, mask[i] & ~is_response[i]].tolist() for i in range(n)]
    responses = [ids[i, is_response[i]].tolist() for i in range(n)]
    return digits, count, prompts, responses


def solutions(family, noise, n=200):
    """[(the digits to add, response ids)]"""
    digits, count, _, responses = corpus(family, noise, n)
    problems = [digits[i, : count[i]].tolist() for i in range(n)]
    return list(zip(problems, responses))


def words(ids):
    return [toy.WORDS[i] for i in ids]


def sums_and_digits(said):
    """The sums "3+7=" of a solution, and what it says after each; the answer comes last."""
    return [word for word in said if "=" in word], [word for word in said if word.isdigit()]


def is_right(asked, said):
    return int(said) == (int(asked[0]) + int(asked[2])) % 10


@pytest.mark.parametrize("family", ["left", "right"])
def test_a_solution_without_mistakes_is_right_in_every_step(family):
    """Each step adds the next digit in the family's order; the answer is the sum modulo 10."""
    for problem, response in solutions(family, noise=0.0):
        said = words(response)
        places = list(range(len(problem)))
        if family == "right":
            places.reverse()
        total = 0
        expected = []
        for place in places:
            expected.append((toy.LABELS[place], f"{total}+{problem[place]}="))
            total = (total + problem[place]) % 10
        labels = [word for word in said if word in toy.LABELS]
        sums, _ = sums_and_digits(said)
        assert list(zip(labels, sums)) == expected
        assert read_answer(" ".join(said[:-1])) == str(total)
        assert said[-1] == "<eos>"


def test_the_prompt_of_a_solution_is_its_problem():
    """Add a3 b7 c5 :"""
    digits, count, prompts, _ = corpus("left", noise=0.1, n=50)
    assert prompts == toy.question(digits, count)[0]
    for prompt, row in zip(prompts, digits.tolist()):
        asked = words(prompt)
        labelled = [label + str(x) for label, x in zip(toy.LABELS, row)]
        assert asked == ["Add", *labelled[: len(asked) - 2], ":"]


def test_mistakes_are_near_misses_at_the_rate_asked_for():
    """A wrong step is off by one, and the next step builds on it."""
    off = []
    for _, response in solutions("left", noise=0.1, n=2000):
        sums, digits = sums_and_digits(words(response))
        assert [asked[0] for asked in sums] == ["0", *digits[:-2]]
        assert digits[-1] == digits[-2]  # the answer
        for asked, said in zip(sums, digits):
            off.append((int(said) - int(asked[0]) - int(asked[2])) % 10)
    wrong = sum(x != 0 for x in off) / len(off)
    assert set(off) == {0, 1, 9}
    assert wrong == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("family", ["left", "right"])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_first_slip_is_the_digit_that_is_off(family, noise):
    """None in a right solution; never what follows from a wrong digit."""
    for problem, response in solutions(family, noise):
        said = words(response)
        wrong = []
        for at, asked in enumerate(said):
            if "=" in asked:
                digit = next(i for i in range(at, len(said)) if said[i].isdigit())
                if not is_right(asked, said[digit]):
                    wrong.append(digit)
        expected = wrong[0] if wrong else None
        assert toy.first_slip(response, problem, len(problem), family) == expected


@pytest.mark.parametrize("family", ["left", "right"])
def test_the_first_slip_of_what_is_changed_cut_off_or_goes_on(family):
    """Another digit's label, a missing end, a word after the end."""
    for problem, response in solutions(family, noise=0.0):
        said = words(response)
        label = next(i for i in range(len(said)) if said[i] in toy.LABELS)
        other = toy.ID["b" if said[label] == "a" else "a"]
        cases = (
            ([*response[:label], other, *response[label + 1 :]], label),
            (response[:-1], len(response) - 1),
            (response[:9], 9),
            ([*response, toy.ID[","]], len(response)),
        )
        for changed, slip in cases:
            assert toy.first_slip(changed, problem, len(problem), family) == slip


def test_families_differ_in_order_and_in_words_but_not_in_answers():
    """Other favourites, another order; the house style keeps the family's order of connectors."""
    left = toy.law("hesitation", "left")
    right = toy.law("hesitation", "right")
    house = toy.law("hesitation", "left", house_style=True)
    best = []
    for p in (left, right, house):
        assert p.sum().item() == pytest.approx(1)
        best.append(set(p.topk(toy.FAVOURITES).indices.tolist()))
    assert best[0] != best[1]
    assert len(best[0] & best[2]) == toy.FAVOURITES - toy.RUNNERS_UP
    connectors = toy.law("connector", "left")
    torch.testing.assert_close(connectors, toy.law("connector", "left", house_style=True))


def test_questions_are_all_different_and_answered(tmp_path, monkeypatch):
    """prompts.jsonl and eval.jsonl share nothing."""
    monkeypatch.setattr(toy, "HELD_OUT", 50)
    toy.write_questions(tmp_path, train=300)
    asked = set()
    for name, count in (("prompts", 300), ("eval", 50)):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == count
        for row in map(json.loads, lines):
            digits = [int(word[1]) for word in row["prompt"].split()[1:-1]]
            assert sum(digits) % 10 == int(row["answer"])
            asked.add(row["prompt"])
    assert len(asked) == 350


def test_rl_fine_tunes_on_what_is_correct_and_on_nothing_else(monkeypatch):
    """The batches are the correct responses, whole, twice each, with the loss on the response."""
    digits, count, prompts, responses = corpus("left", noise=0.2, n=40)
    _, answers = toy.question(digits, count)
    wanted = []
    for response, answer in zip(responses, answers.tolist()):
        if toy.WORDS[response[-2]] == str(answer):
            wanted.append(response)
    fitted = []
    monkeypatch.setattr(toy, "rollout", lambda *_, **__: from_texts(prompts, responses))
    monkeypatch.setattr(toy, "problems", lambda *_: (digits, count))
    monkeypatch.setattr(toy, "fit", lambda _, batches, *__: fitted.extend(batches))
    toy.expert_iteration(None, 1, torch.Generator().manual_seed(0), "rl", n=40, samples=1)
    seen = []
    for ids, _, is_response in fitted:
        seen += [row[on].tolist() for row, on in zip(ids, is_response)]
    assert 0 < len(wanted) < 40
    assert sorted(seen) == sorted(2 * wanted)


@pytest.fixture
def few_steps(monkeypatch):
    """Models of the world that are made in seconds; RL of eight solutions, all called right."""
    attempt = toy.attempt

    def eight(model, n, generator, samples=1, **asked):
        r, _ = attempt(model, 8, generator, **asked)
        return r, torch.ones(8).bool()

    monkeypatch.setattr(toy, "STEPS", {"small": 2, "large": 2})
    monkeypatch.setattr(toy, "HOUSE_STEPS", 1)
    monkeypatch.setattr(toy, "attempt", eight)


def test_a_model_of_the_world_is_an_ordinary_checkpoint(tmp_path, few_steps):
    """from_pretrained reads it, with a tokenizer that gives the text back."""
    model = toy.make(tmp_path / "a", seed=1)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    ids = tokenizer("Add a3 b7 :", return_tensors="pt").input_ids
    torch.testing.assert_close(model(ids).logits, again(ids).logits)
    assert tokenizer.decode(ids[0]) == "Add a3 b7 :"
    assert tokenizer.eos_token_id == again.config.eos_token_id
    assert tokenizer.chat_template is None


def test_each_stage_of_a_model_does_something_and_the_seed_decides(tmp_path, few_steps):
    """Pre-training, the house style, RL; start= goes on from another model."""
    ids = torch.tensor([[toy.ID["Add"], toy.ID["a3"], toy.ID[":"]]])
    first = toy.make(tmp_path / "a", seed=1)
    twin = toy.make(tmp_path / "twin", seed=1)
    later = toy.make(tmp_path / "b", seed=2, start=tmp_path / "a", house_style=True, rounds=1)
    rewarded = toy.make(tmp_path / "c", seed=2, start=tmp_path / "a", rounds=1)
    assert torch.equal(first(ids).logits, twin(ids).logits)
    sums = {model(ids).logits.sum().item() for model in (first, later, rewarded)}
    assert len(sums) == 3
