"""The toy world is what experiments/toy.py says it is."""

import json

import pytest
import torch
import toy
from transformers import AutoModelForCausalLM, AutoTokenizer

from plumbing.answers import read_answer
from rollout import Rollout, left_pad


def solutions(family, noise, n=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    digits, count = toy.problems(n, generator)
    ids, mask, is_response = toy.corpus(family, digits, count, noise, generator)
    return digits, count, ids, mask, is_response


@pytest.mark.parametrize("family", ["left", "right"])
def test_a_solution_without_mistakes_is_right_in_every_step(family):
    """Read back from the text: each step adds the next digit of the family's order,
    and the answer is the sum modulo 10.
    """
    digits, count, ids, mask, is_response = solutions(family, noise=0.0)
    for row, (d, c) in enumerate(zip(digits.tolist(), count.tolist())):
        words = [toy.WORDS[i] for i in ids[row][is_response[row]]]
        steps = [
            (a, b)
            for a, b in zip([w for w in words if w in toy.LABELS], [w for w in words if "=" in w])
        ]
        order = list(range(c)) if family == "left" else list(range(c))[::-1]
        total, expected = 0, []
        for place in order:
            expected.append((toy.LABELS[place], f"{total}+{d[place]}="))
            total = (total + d[place]) % 10
        assert (
            steps == expected
            and read_answer(" ".join(words[:-1])) == str(total)
            and words[-1] == "<eos>"
        )
        prompt = [toy.WORDS[i] for i in ids[row][mask[row] & ~is_response[row]]]
        assert prompt == ["Add", *(toy.LABELS[i] + str(x) for i, x in enumerate(d[:c])), ":"]


def test_mistakes_are_near_misses_at_the_rate_asked_for():
    """A wrong step is off by one, and the next step builds on it."""
    *_, ids, _, is_response = solutions("left", noise=0.1, n=2000)
    off = []
    for row in range(len(ids)):
        words = [
            w for w in (toy.WORDS[i] for i in ids[row][is_response[row]]) if "=" in w or w.isdigit()
        ][:-1]
        off += [
            (int(said) - int(asked[0]) - int(asked[2])) % 10
            for asked, said in zip(words[::2], words[1::2])
        ]
    assert set(off) == {0, 1, 9} and sum(x != 0 for x in off) / len(off) == pytest.approx(
        0.1, abs=0.01
    )


@pytest.mark.parametrize("family", ["left", "right"])
def test_the_first_slip_is_where_a_step_is_wrong(family):
    """None in a right solution; in the corpus's own mistakes the digit that is one off, never what follows from it."""
    for noise in (0.0, 0.2):
        digits, count, ids, _, is_response = solutions(family, noise)
        for row, (d, c) in enumerate(zip(digits.tolist(), count.tolist())):
            response = ids[row][is_response[row]].tolist()
            words, off = [toy.WORDS[i] for i in response], None
            for at, word in enumerate(words):
                if "=" in word:
                    said = next(i for i in range(at + 1, len(words)) if words[i].isdigit())
                    if off is None and int(words[said]) != (int(word[0]) + int(word[2])) % 10:
                        off = said
            assert toy.first_slip(response, d, c, family) == off
            if off is None:
                label = next(i for i, word in enumerate(words) if word in toy.LABELS)
                other = toy.ID["b" if words[label] == "a" else "a"]
                assert (
                    toy.first_slip([*response[:label], other, *response[label + 1 :]], d, c, family)
                    == label
                )
                assert toy.first_slip(response[:-1], d, c, family) == len(response) - 1  # cut off
                assert toy.first_slip(response[:9], d, c, family) == 9
                assert toy.first_slip([*response, toy.ID[","]], d, c, family) == len(
                    response
                )  # it went on


def test_families_differ_in_order_and_in_words_but_not_in_answers():
    """Two ways of thinking: other favourites, another order; the house style keeps the family's order of connectors."""
    left, right, house = (
        toy.law("hesitation", *of) for of in (("left",), ("right",), ("left", True))
    )
    best = [set(p.topk(toy.FAVOURITES).indices.tolist()) for p in (left, right, house)]
    assert len(best[0] & best[2]) == toy.FAVOURITES - toy.RUNNERS_UP and best[0] != best[1]
    assert all(p.sum().item() == pytest.approx(1) for p in (left, right, house))
    torch.testing.assert_close(toy.law("connector", "left"), toy.law("connector", "left", True))


def test_questions_are_all_different_and_answered(tmp_path, monkeypatch):
    """prompts.jsonl and eval.jsonl share nothing."""
    monkeypatch.setattr(toy, "HELD_OUT", 50)
    toy.write_questions(tmp_path, train=300)
    parts = [
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("prompts.jsonl", "eval.jsonl")
    ]
    assert [len(part) for part in parts] == [300, 50] and len(
        {row["prompt"] for part in parts for row in part}
    ) == 350
    for row in parts[1]:
        assert sum(int(word[1]) for word in row["prompt"].split()[1:-1]) % 10 == int(row["answer"])


def test_rl_fine_tunes_on_what_is_correct_and_on_nothing_else(monkeypatch):
    """Expert iteration: the batches that it fits are the correct responses, whole, twice each,
    with the loss on the response.
    """
    digits, count, ids, mask, is_response = solutions("left", noise=0.2, n=40)
    prompts, answers = toy.question(digits, count)
    told = [[toy.WORDS[i] for i in row[r]] for row, r in zip(ids, is_response)]
    right = [words[-2] == str(answer) for words, answer in zip(told, answers.tolist())]
    T, P = int(is_response.sum(1).max()), max(map(len, prompts))
    left_ids, left_mask = left_pad(prompts, 0)
    said, said_mask, _ = toy.pack(ids, is_response, is_response)
    r = Rollout(
        torch.cat([left_ids, said], 1),
        torch.cat([left_mask, said_mask], 1),
        torch.cat([torch.zeros_like(left_mask), said_mask], 1),
        torch.zeros(40, T),
        torch.zeros(40).bool(),
    )
    monkeypatch.setattr(toy, "rollout", lambda *_, **__: r)
    monkeypatch.setattr(toy, "problems", lambda *_: (digits, count))
    fitted = []
    monkeypatch.setattr(toy, "fit", lambda _, batches, *__: fitted.extend(batches))
    toy.expert_iteration(None, 1, torch.Generator().manual_seed(0), "rl", n=40, samples=1)
    seen = [
        tuple(row[on].tolist())
        for part_ids, _, part_on in fitted
        for row, on in zip(part_ids, part_on)
    ]
    wanted = [tuple(row[on].tolist()) for row, on, good in zip(ids, is_response, right) if good]
    assert 0 < len(wanted) < 40 and sorted(seen) == sorted(2 * wanted) and r.ids.size(1) == P + T


def test_a_model_of_the_world_is_an_ordinary_checkpoint(tmp_path, monkeypatch):
    """make() -> a directory for from_pretrained, with a tokenizer that gives the text back;
    start= goes on from another.
    """
    monkeypatch.setattr(toy, "STEPS", {"small": 2, "large": 2})
    monkeypatch.setattr(toy, "HOUSE_STEPS", 1)
    monkeypatch.setattr(
        toy,
        "attempt",
        lambda model, n, generator, samples=1, plain=toy.attempt, **asked: (
            plain(model, 8, generator, **asked)[0],
            torch.ones(8).bool(),
        ),
    )
    model = toy.make(tmp_path / "a", seed=1)
    again, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "a"),
        AutoTokenizer.from_pretrained(tmp_path / "a"),
    )
    ids = tokenizer("Add a3 b7 :", return_tensors="pt").input_ids
    torch.testing.assert_close(model(ids).logits, again(ids).logits)
    assert (
        tokenizer.decode(ids[0]) == "Add a3 b7 :"
        and tokenizer.eos_token_id == again.config.eos_token_id
        and tokenizer.chat_template is None
    )
    twin = toy.make(tmp_path / "twin", seed=1)
    later = toy.make(tmp_path / "b", seed=2, start=tmp_path / "a", house_style=True, rounds=1)
    rewarded = toy.make(tmp_path / "c", seed=2, start=tmp_path / "a", rounds=1)
    assert torch.equal(model(ids).logits, twin(ids).logits)
    assert (
        len({m(ids).logits.sum().item() for m in (model, later, rewarded)}) == 3
    )  # each stage does something
