"""A pair before training (analysis.py, second half; paper 4, 6): who is right, where they part, and the verdict."""

import contextlib
import dataclasses
import inspect
import itertools
import json
import math

import cost
import pytest
import torch
from conftest import tiny, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

import analysis
import opd
import teacher
from analysis import (
    HARMFUL,
    INCOMPATIBLE,
    NOTHING_NEW,
    SHARED_MASS,
    SHOULD_WORK,
    UNDECIDED,
    VERDICTS,
    diagnose,
)
from experiments import plot, tokens
from plumbing import measure
from plumbing.answers import answered, read_answer, same_answer
from plumbing.flags import parse_analysis
from plumbing.models import load_pair
from plumbing.prompts import encode_rows
from rollout import draw
from teacher import Pair, split

WORDS = "[PAD] [BOS] [EOS] [UNK] add the so + \\boxed{3} \\boxed{7} \\boxed{0}".split()
EOS, BOX = 2, {"3": 8, "7": 9, "0": 10}  # a box is one token: tiny models are right now and then
PROMPTS = [
    [1, 4],
    [1, 5, 6],
    [1, 6, 7, 4, 5],
    [1, 4, 7, 5],
    [1, 7],
    [1, 7, 7, 7],
    [1, 5, 4, 4, 4],
    [1, 6],
]
ANSWERS = "3 7 0 7 3 0 3 7".split()
LENGTH = 6


def pair_of(student, teacher):
    """Two models as a Pair, without files."""
    return Pair(
        student,
        teacher.requires_grad_(False),
        word_tokenizer(WORDS),
        dict(eos_ids=[EOS], merge_ends=True, pad_id=0, vocab_size=len(WORDS)),
        (split(student, len(WORDS)), split(teacher, len(WORDS))),
        torch.device("cpu"),
    )


def different():
    """A student and a wider, deeper teacher with padded rows of its head."""
    return pair_of(
        tiny("llama", vocab_size=len(WORDS)),
        tiny("llama", seed=1, vocab_size=len(WORDS) + 3, hidden=48, layers=3),
    )


def equal():
    return pair_of(tiny("llama", vocab_size=len(WORDS)), tiny("llama", vocab_size=len(WORDS)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """student/, teacher/ and prompts.jsonl."""
    folder, pair = tmp_path_factory.mktemp("files"), different()
    for name, model in (("student", pair.student), ("teacher", pair.teacher)):
        model.save_pretrained(folder / name)
        pair.tokenizer.save_pretrained(folder / name)
    lines = [
        {"prompt": pair.tokenizer.decode(ids[1:]), "answer": answer}
        for ids, answer in zip(PROMPTS, ANSWERS)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def rows(right=ANSWERS):
    """The prompts as Pair.encode gives them, with these answers, or None."""
    return [
        {"prompt": "", "ids": ids, "answer": answer}
        for ids, answer in zip(PROMPTS, right or [None] * 8)
    ]


def positions(pair, r, k, **temperatures):
    """Eq. 6 to 10 at every position of a rollout: {name: (B, T)}."""
    return pair.grade(r, lambda *x: diagnose(*x, k), **temperatures)


def plain(model, r, row):
    """Logits (T, V) of one response, from its tokens alone, without padding."""
    ids = r.ids[row][r.attention_mask[row]].unsqueeze(0)  # (1, L)
    return model(input_ids=ids).logits[0, -int(r.response_mask[row].sum()) - 1 : -1, : len(WORDS)]


# --- auroc, estimate -----------------------------------------------------------------------------------------------

scored = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=12)


@given(scored)
def test_auroc_counts_the_pairs_in_the_right_order_and_ties_half(rows):
    """6.2: over all pairs of a true and a false one; None where there is no such pair."""
    scores, labels = (torch.tensor(x) for x in zip(*rows))
    pairs = [(a > b) + (a == b) / 2 for a, yes in rows for b, no in rows if yes and not no]
    got = analysis.auroc(scores.double(), labels)
    assert got == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)


@given(
    scored, st.sampled_from([lambda x: x**3, lambda x: 2 * x - 7, torch.exp, lambda x: (x > 0) + x])
)
def test_auroc_knows_the_order_of_the_scores_alone(rows, rising):
    """Unchanged by any monotone map of the scores, and one minus itself when they are negated."""
    scores, labels = (torch.tensor(x) for x in zip(*rows))
    got = analysis.auroc(scores.double(), labels)
    assert analysis.auroc(rising(scores.double()), labels) == got
    assert got is None or analysis.auroc(-scores.double(), labels) == pytest.approx(1 - got)


@given(st.lists(st.one_of(st.just(math.nan), st.floats(-5, 5)), max_size=8))
def test_an_estimate_is_the_mean_and_its_standard_error_without_nan(x):
    """sqrt(sum (x - mean)^2 / (n - 1) / n), NaN left out; None where n is too small for either."""
    kept = [y for y in x if not math.isnan(y)]
    got, n = analysis.estimate(torch.tensor(x, dtype=torch.float64)), len(kept)
    mean = sum(kept) / n if n else None
    error = math.sqrt(sum((y - mean) ** 2 for y in kept) / (n - 1) / n) if n > 1 else None
    assert got == {
        "mean": pytest.approx(mean, abs=1e-9),
        "standard_error": pytest.approx(error, abs=1e-9),
    }


# --- answered ------------------------------------------------------------------------------------------------------


def copying(calls):
    """A rollout that answers with the box that ends its prompt, after as many words as that has; notes its calls."""

    def write(model, prompts, *, n, max_new_tokens, **options):
        calls.append((prompts, dict(options, n=n, max_new_tokens=max_new_tokens)))
        said = [
            (p, ([6] * len(p) + [p[-1], EOS])[:max_new_tokens]) for p in prompts for _ in range(n)
        ]
        r = equal().given(said)
        r.truncated = torch.tensor([EOS not in r.response_ids(i) for i in range(len(r.ids))])
        return r

    return write


def test_what_is_written_to_its_end_is_judged_as_it_stands(monkeypatch):
    """6.1: a start that ends in an eos, or has used the budget up, asks no model for more."""
    monkeypatch.setattr(teacher, "rollout", lambda *_, **__: pytest.fail("a model was asked"))
    starts = [
        [6, BOX["7"], EOS],
        [BOX["3"], EOS],
        [EOS],
        [6, 6, 6, 6, BOX["7"], EOS],
        [6, 6, 6, 6, 6, BOX["7"]],
        [6] * (LENGTH + 2),
    ]
    right, truncated = answered(equal(), rows(["7"] * 6), starts=starts, n=3, max_new_tokens=LENGTH)
    assert right.tolist() == [[x] * 3 for x in (True, False, False, True, True, False)]
    assert truncated.tolist() == [[x] * 3 for x in (False, False, False, False, True, True)]


def test_the_budget_counts_the_start():
    """A response has max_new_tokens in all, the start among them, whatever else is in its batch."""
    pair, seen = different(), []
    plain_decode = pair.tokenizer.decode
    pair.tokenizer.decode = lambda ids, **options: (
        seen.append(list(ids)) or plain_decode(ids, **options)
    )
    starts = [[4] * 5, [], [5] * 3, [6], [7] * 2, [10] * 4, [8] * 6, []]
    _, truncated = answered(pair, rows(), starts=starts, n=4, max_new_tokens=LENGTH, seed=1)
    assert (
        len(seen) == 7 * 4 + 1 and max(map(len, seen)) == LENGTH
    )  # the one that is full is judged once
    for i, start in enumerate(starts):
        mine = [ids for ids in seen if ids[: len(start)] == start]
        assert len(mine) >= (1 if len(start) == LENGTH else 4), i  # nothing of it was written again
        assert all(len(ids) == LENGTH or ids[-1] == EOS for ids in mine), i
    assert sum(EOS != ids[-1] for ids in seen) == truncated.sum() - 3  # that one stands four times
    assert 0 < truncated.double().mean() < 1


@pytest.mark.parametrize("at_once, n", [(1, 1), (6, 2), (7, 3), (2, 5), (256, 4)])
def test_at_once_bounds_the_responses_that_are_written_at_a_time(monkeypatch, at_once, n):
    """At most that many, or the n of one prompt, and every prompt once."""
    calls = []
    monkeypatch.setattr(teacher, "rollout", copying(calls))
    answered(equal(), rows(), n=n, max_new_tokens=LENGTH, at_once=at_once)
    assert max(len(prompts) * n for prompts, _ in calls) <= max(at_once, n)
    assert sorted(p for prompts, _ in calls for p in prompts) == sorted(PROMPTS)


@pytest.mark.parametrize("at_once", [1, 4, 256])
def test_results_stand_in_the_order_of_the_prompts(monkeypatch, at_once):
    """They are written in the order of their lengths; each is held against its own answer all the same."""
    calls = []
    monkeypatch.setattr(teacher, "rollout", copying(calls))
    boxes = "7 3 0 0 7 3 7 0".split()
    starts = [[BOX[box]] for box in boxes]
    wrong = {1, 4, 6}
    right, truncated = answered(
        equal(),
        rows(["8" if i in wrong else box for i, box in enumerate(boxes)]),
        starts=starts,
        n=2,
        at_once=at_once,
        max_new_tokens=8,
    )
    assert right.tolist() == [[i not in wrong] * 2 for i in range(8)]
    assert truncated.tolist() == [[1 + len(p) + 1 + 2 > 8] * 2 for p in PROMPTS]
    assert sorted(p for prompts, _ in calls for p in prompts) == sorted(
        p + s for p, s in zip(PROMPTS, starts)
    )


def test_what_is_asked_of_a_model_reaches_the_rollout(monkeypatch):
    """Every option of the sampling, in each part; parts are of like length, as long as the one with most room, and
    each prompt has draws of its own."""
    parts, pair = [], equal()
    monkeypatch.setattr(teacher, "rollout", copying(parts))
    options = dict(temperature=0.3, top_p=0.9)
    pair.ending = dict(eos_ids=[EOS], pad_id=5, vocab_size=7, in_flight=3)
    starts = [[6] * (i % 3) for i in range(len(PROMPTS))]
    answered(pair, rows(), starts=starts, n=2, max_new_tokens=9, at_once=4, **options)
    room = {tuple(p + start): 9 - len(start) for p, start in zip(PROMPTS, starts)}
    seeds = [seed for _, asked in parts for seed in asked.pop("seeds")]
    assert len(set(seeds)) == len(PROMPTS)
    for prompts, asked in parts:
        assert asked == {
            **options,
            **pair.ending,
            "n": 2,
            "max_new_tokens": max(room[tuple(p)] for p in prompts),
        }
    lengths = [len(p) for prompts, _ in parts for p in prompts]
    assert lengths == sorted(lengths) and len(parts) == 4


@pytest.mark.parametrize("world", [2, 3])
def test_the_shares_of_the_processes_are_the_whole(world):
    """Each answers what it would have answered alone; what others do is False there."""
    starts = [[], [6], [BOX["0"], EOS], [], [6] * LENGTH, [], [6, BOX["3"]], [7]]
    one, *shares = (
        answered(
            different(), rows(), starts=starts, n=4, max_new_tokens=LENGTH, at_once=12, share=share
        )
        for share in [(0, 1)] + [(rank, world) for rank in range(world)]
    )
    for whole, *parts in zip(one, *shares):
        assert whole.any() and torch.equal(sum(part.int() for part in parts), whole.int())


# The same ids as WORDS, where an answer is what follows "Answer:": whatever is said after it is part of it.
SPOKEN = "[PAD]|[BOS]|[EOS]|[UNK]|add|the|so|+|Answer: 3|Answer: 7|Answer: 0".split("|")


def test_the_end_of_a_response_is_no_part_of_its_answer():
    """ "Answer: 7 [EOS]" says 7, both where a model has answered and where a diagnosis counts who is right."""
    pair = dataclasses.replace(different(), tokenizer=word_tokenizer(SPOKEN))
    right, truncated = answered(
        pair,
        rows(["7", "7"]),
        n=2,
        max_new_tokens=LENGTH,
        starts=[[6, BOX["7"], EOS], [6, BOX["7"], 6, EOS]],
    )
    assert (
        right.tolist() == [[True] * 2, [False] * 2] and right.dtype == truncated.dtype == torch.bool
    )
    r = pair.write(PROMPTS, n=8, max_new_tokens=LENGTH, seed=0)
    said = [
        " ".join(SPOKEN[i] for i in r.response_ids(row) if i > 3) for row in range(64)
    ]  # but special ones
    right = [same_answer(read_answer(text), ANSWERS[row // 8]) for row, text in enumerate(said)]
    assert diagnosed(pair, n=8)["right"] == sum(right)
    assert any(yes and r.response_ids(row)[-1] == EOS for row, yes in enumerate(right))


def test_a_bar_says_what_it_counts_and_is_not_in_a_log(monkeypatch, capsys):
    """Where stderr is no terminal nothing is printed; where it is one the bar has a name, and goes away."""
    seen = []
    monkeypatch.setattr(
        "plumbing.answers.tqdm", lambda x, **options: seen.append(options) or tqdm(x, **options)
    )
    answered(equal(), rows(), max_new_tokens=LENGTH)
    (options,) = seen
    assert options["desc"] == "answers" and not options["leave"] and capsys.readouterr().err == ""


# --- 6.1 continuation ----------------------------------------------------------------------------------------------


def own_responses(pair):
    r = pair.write(PROMPTS, max_new_tokens=LENGTH, seed=5)
    return [r.response_ids(i) for i in range(len(PROMPTS))]


def continued(pair, depths, n=8):
    return analysis.continuation(
        pair,
        rows(),
        own_responses(pair),
        depths,
        answered=answered,
        n=n,
        max_new_tokens=LENGTH,
        temperature=1.0,
        top_p=1.0,
        seed=3,
    )


def test_continuation_at_depth_0_is_plain_accuracy():
    """6.1: with nothing written, each model answers on its own, with the same draws as an evaluation of that seed."""
    pair = different()
    gain, student, teacher, tokens = continued(pair, [0.0])[0.0]
    cfg = opd.Config(seed=2, eval_n=8, max_new_tokens=LENGTH, eval_temperature=1.0, eval_top_p=1.0)
    alone = [measure.accuracy(cfg, pair, rows(), model) for model in (pair.student, pair.teacher)]
    assert [student.mean().item(), teacher.mean().item()] == [x["mean"] for x in alone]
    assert torch.equal(gain, teacher - student) and gain.any() and tokens == 0


def test_continuation_at_depth_1_leaves_nothing_to_gain():
    """6.1: at the end of its responses both models have what the student wrote, right or wrong."""
    pair = different()
    texts = [pair.tokenizer.decode(ids, skip_special_tokens=True) for ids in own_responses(pair)]
    right = [float(same_answer(read_answer(text), answer)) for text, answer in zip(texts, ANSWERS)]
    gain, student, teacher, tokens = continued(pair, [1.0])[1.0]
    assert (
        student.tolist() == teacher.tolist() == right
        and 0 < sum(right) < len(right)
        and not gain.any()
    )
    assert tokens == sum(map(len, own_responses(pair))) / len(PROMPTS)


def test_a_depth_is_a_share_or_a_count_of_tokens():
    """6.1 cuts at 1K, 4K, ... tokens: an int. A float is a share of each response; neither goes beyond its end."""
    seen = []

    def answered(pair, rows, *, model, starts, n):
        seen.append(starts)
        return torch.zeros(len(rows), n), None

    responses = [[6] * length for length in (1, 2, 3, 4, 5, 6, 2, 1)]
    out = analysis.continuation(
        equal(), rows(), responses, [0.5, 2, 1.0, 9], answered=answered, n=1
    )
    lengths = [[len(start) for start in starts] for starts in seen]
    assert (
        lengths[0::2]
        == lengths[1::2]
        == [  # student and teacher from the same starts
            [0, 1, 1, 2, 2, 3, 1, 0],
            [1, 2, 2, 2, 2, 2, 2, 1],
            [1, 2, 3, 4, 5, 6, 2, 1],
            [1, 2, 3, 4, 5, 6, 2, 1],
        ]
    )
    assert {depth: x[3] for depth, x in out.items()} == {0.5: 10 / 8, 2: 14 / 8, 1.0: 3.0, 9: 3.0}


def test_both_models_are_asked_the_same_way():
    """Same prompts, answers, draws and options; only the model differs."""
    pair, calls = different(), []

    def answered(*asked, model, **options):
        calls.append((model, asked, options))
        return torch.zeros(len(PROMPTS), options["n"]), None

    options = dict(n=3, max_new_tokens=5, temperature=0.3, top_p=0.6, seed=7)
    analysis.continuation(
        pair, rows(), [[6] * 4] * len(PROMPTS), [0.5], answered=answered, **options
    )
    (one, *asked), (other, *again) = calls
    assert one is pair.student and other is pair.teacher and asked == again
    assert asked == [(pair, rows()), dict(starts=[[6] * 2] * 8, **options)]


def test_the_depths_share_a_response_out_evenly():
    """6.1: from plain accuracy on, in equal steps, and short of the end, where nothing is left to gain."""
    assert analysis.DEPTHS == tuple(i / len(analysis.DEPTHS) for i in range(len(analysis.DEPTHS)))
    assert all(
        inspect.signature(f).parameters["depths"].default is analysis.DEPTHS
        for f in (analysis.continuation, analysis.diagnose_pair)
    )


def test_a_teacher_that_is_the_student_gains_nothing_anywhere():
    """Both draw with the same seed: the difference is not small but 0, at every depth."""
    out = continued(equal(), analysis.DEPTHS + (2,), n=4)
    assert all(not gain.any() for gain, *_ in out.values()) and any(
        student.any() for _, student, *_ in out.values()
    )


# --- where they part: positions, buckets ---------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, teacher_temperature", [(1.0, 1.0), (0.7, 2.0)])
def test_positions_are_the_diagnosis_of_the_plain_logits(temperature, teacher_temperature):
    """Eq. 6 to 10 at each response token as from whole logits without padding; NaN where there is none
    (nano-opd averaged over padding)."""
    pair = different()
    r = pair.write(PROMPTS, n=2, max_new_tokens=LENGTH, seed=0)
    grid = positions(pair, r, 3, temperature=temperature, teacher_temperature=teacher_temperature)
    assert not r.response_mask.all()
    for name, x in grid.items():
        assert name == "overlap_token_advantage" or torch.equal(x.isnan(), ~r.response_mask), name
        assert x.shape == r.response_mask.shape and x[~r.response_mask].isnan().all()
    for row in range(len(r.ids)):
        log_p, log_q = (
            plain(model, r, row).div(t).log_softmax(-1).detach()
            for model, t in ((pair.student, temperature), (pair.teacher, teacher_temperature))
        )
        naive = diagnose(log_p, log_q, torch.tensor(r.response_ids(row)), 3)
        torch.testing.assert_close(
            {name: x[row, : len(log_p)] for name, x in grid.items()},
            naive,
            rtol=1e-3,
            atol=1e-4,
            equal_nan=True,
        )


def test_positions_are_measured_at_temperature_1_and_without_a_graph():
    """The defaults are the models as they are, and nothing is kept for a backward pass."""
    pair, grads = (
        dataclasses.replace(different(), chunk=100),
        [],
    )  # no look at the size of the vocabulary
    r = pair.write(PROMPTS, max_new_tokens=LENGTH, seed=0)
    said = positions(pair, r, 3, temperature=1.0, teacher_temperature=1.0)
    for model in (pair.student, pair.teacher):
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            part.register_forward_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    torch.testing.assert_close(positions(pair, r, 3), said, rtol=0, atol=0, equal_nan=True)
    assert grads and not any(grads)


def test_positions_do_not_see_the_cut_into_micro_batches():
    """trl#6006: memory changes, the numbers do not."""
    pair = different()
    r = pair.write(PROMPTS, n=2, max_new_tokens=LENGTH, seed=0)
    one, other = (
        positions(dataclasses.replace(pair, micro_batch_tokens=budget), r, 3)
        for budget in (1, 10_000)
    )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


def in_buckets(responses, width):
    """by_position of responses, a list of numbers each: every metric has these numbers."""
    lengths = torch.tensor([[len(response)] for response in responses])  # (B, 1)
    mask = torch.arange(int(lengths.max())) < lengths  # (B, T)
    grid = torch.full(mask.shape, math.nan)  # (B, T)
    grid[mask] = torch.tensor(sum(responses, []), dtype=torch.float32)
    return analysis.by_position(dict.fromkeys(analysis.BY_POSITION, grid), mask, width)


@st.composite
def numbers(draw):
    """A response of 0 to 60 numbers from -9 to 9."""
    length, start, by = draw(st.integers(0, 60)), draw(st.integers(0, 18)), draw(st.integers(0, 18))
    return [(start + by * i) % 19 - 9 for i in range(length)]


@given(st.lists(numbers(), min_size=1, max_size=6), st.integers(1, 12))
def test_buckets_share_out_every_token_and_add_up_to_the_whole(responses, width):
    """Fig. 13: bucket i holds positions i * width and on, the last all beyond; weighed by tokens they give the mean.
    Lists end with the last bucket that holds a token."""
    means, inside = in_buckets(responses, width), [[] for _ in range(analysis.BUCKETS)]
    for response in responses:
        for position, x in enumerate(response):
            inside[min(position // width, analysis.BUCKETS - 1)].append(x)
    inside = [xs for xs in inside if xs]
    assert means["width"] == width and means["tokens"] == list(map(len, inside))
    for name in analysis.BY_POSITION:
        assert means[name] == [pytest.approx(sum(xs) / len(xs), abs=1e-5) for xs in inside]
    total = sum(n * mean for n, mean in zip(means["tokens"], means["reward"]))
    assert total == pytest.approx(sum(map(sum, responses)), abs=1e-4 * sum(means["tokens"]))


def test_no_token_fills_no_bucket():
    """Lists are empty then. Means have five decimals, and one that is not finite is None: JSON has no NaN."""
    assert in_buckets([[], []], 4) == {
        "width": 4,
        "tokens": [],
        **{name: [] for name in analysis.BY_POSITION},
    }
    means = in_buckets([[1, 5, 0], [0, math.nan], [0]], 1)
    assert means == {
        "width": 1,
        "tokens": [3, 2, 1],
        **{name: [0.33333, None, 0] for name in analysis.BY_POSITION},
    }


def test_the_buckets_of_a_training_step_add_up_to_its_means():
    """Fig. 13 and Fig. 6 are one measurement: the buckets, weighed by their tokens, are the logged metrics."""
    pair, cfg = different(), opd.Config(k=3)
    r = pair.write(PROMPTS, n=3, max_new_tokens=20, seed=0)
    measured = measure.means(pair.grade(r, opd.per_position(cfg)), r, 20)
    b = measured["by_position"]
    assert (
        b["width"] == 2 and sum(b["tokens"]) == measured["tokens"]
    )  # 20 tokens in 16 buckets, rounded up
    assert b["tokens"] == [
        int(r.response_mask[:, i : i + 2].sum()) for i in range(0, r.response_mask.size(1), 2)
    ]
    for name in analysis.BY_POSITION:
        mean = sum(n * x for n, x in zip(b["tokens"], b[name])) / measured["tokens"]
        assert mean == pytest.approx(measured[name], abs=2e-5), name


# --- 6.2 coherence -------------------------------------------------------------------------------------------------


def directions(n, V=5, H=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, size, dtype=torch.float64, generator=generator) for size in (V, H))


def chunked(g, h, size):
    return cost.coherence(zip(g.split(size), h.split(size)))


def test_coherence_is_its_definition_on_the_whole_matrices():
    """|mean G| / mean |G|, the mean cosine of all pairs and the mean size, with every G = g h' written out."""
    g, h = directions(7)
    g[3] = 0  # a position that asks for nothing
    G = (g.unsqueeze(-1) * h.unsqueeze(1)).flatten(1)  # (7, V H)
    sizes = G.norm(dim=-1)
    unit = G[sizes > 0] / sizes[sizes > 0].unsqueeze(-1)
    cosines = [float(a @ b) for a, b in itertools.combinations(unit, 2)]
    assert chunked(g, h, 3) == pytest.approx(
        {
            "coherence": (G.mean(0).norm() / sizes.mean()).item(),
            "null": (sizes.norm() / sizes.sum()).item(),
            "cosine": sum(cosines) / len(cosines),
            "size": sizes.mean().item(),
            "positions": 6,
        }
    )


@pytest.mark.parametrize("size", [1, 3, 10])
def test_gradients_that_are_all_one_cohere_fully(size):
    """Coherence and cosine 1, whatever the chunks."""
    g, h = (x.expand(10, -1) for x in directions(1))
    assert chunked(g, h, size) == pytest.approx(
        {
            "coherence": 1,
            "null": 10**-0.5,
            "cosine": 1,
            "size": (g[0].norm() * h[0].norm()).item(),
            "positions": 10,
        }
    )


def test_gradients_of_random_directions_cohere_as_their_null_says():
    """400 directions in 1,200 dimensions: |sum|^2 is its mean to a part in 25, the mean cosine 0 to 1e-4."""
    got = chunked(*directions(400, 40, 30), 64)
    assert (
        got["coherence"] / got["null"] == pytest.approx(1, abs=0.06) and abs(got["cosine"]) < 4e-4
    )


def test_the_null_is_the_root_mean_square_over_all_signs():
    """Over all 64 sign patterns of six gradients, exactly: the cross terms cancel."""
    g, h = directions(6)
    squares = [
        chunked(g * torch.tensor(signs).double().unsqueeze(-1), h, 6)["coherence"] ** 2
        for signs in itertools.product((-1, 1), repeat=6)
    ]
    assert chunked(g, h, 6)["null"] == pytest.approx(math.sqrt(sum(squares) / 64))


def test_coherence_knows_neither_chunks_nor_axes_nor_scale():
    """Unchanged by the cut and by a rotation of logits and states; a scale goes into the size alone."""
    g, h = directions(9)
    generator = torch.Generator().manual_seed(1)
    Q, R = (
        torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
        for n in (5, 4)
    )
    whole = chunked(g, h, 9)
    assert all(chunked(g, h, size) == pytest.approx(whole) for size in (1, 2, 5))
    assert chunked(g @ Q, h @ R, 4) == pytest.approx(whole)
    assert chunked(-3 * g, 2 * h, 4) == pytest.approx({**whole, "size": 6 * whole["size"]})


def test_opposite_gradients_cancel():
    """6.2: large single gradients, no step."""
    g, h = directions(5)
    got = chunked(torch.cat([g, -2 * g]), torch.cat([h, h / 2]), 4)
    assert got["coherence"] == pytest.approx(0, abs=1e-9) and got["size"] > 1 and got["cosine"] < 0


@pytest.mark.parametrize("count", [0, 1])
def test_one_gradient_has_nothing_to_agree_with(count):
    """Fewer than two positions with a gradient: refused, rather than a coherence of 1."""
    g, h = directions(4)
    g[count:] = 0
    with pytest.raises(ValueError, match="two positions"):
        chunked(g, h, 2)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_gradients_of_any_size_cohere_alike(scale):
    """Small ones are gradients too: only what is exactly 0 has no direction."""
    g, h = directions(6)
    whole = chunked(g, h, 6)
    assert chunked(scale * g, h, 6) == pytest.approx({**whole, "size": scale * whole["size"]})


def test_two_gradients_are_enough():
    """Their cosine is the mean over the one pair that there is."""
    g, h = directions(2)
    G = (g.unsqueeze(-1) * h.unsqueeze(1)).flatten(1)
    assert chunked(g, h, 1)["cosine"] == pytest.approx(torch.cosine_similarity(*G, dim=0).item())


# --- the verdict ---------------------------------------------------------------------------------------------------


def report(
    *,
    mass=0.95,
    mass_teacher=0.97,
    kl=0.3,
    alone=(0.2, 0.01),
    gain=(0.1, 0.01),
    student=0.3,
    answers=True,
):
    """What verdict reads, made by hand: alone and gain are (mean, standard error) of teacher - student."""
    at = lambda mean, error: {"mean": mean, "standard_error": error}
    made = {
        "prompts": 24,
        "metrics": {
            "overlap_mass_student": at(mass, 0.01),
            "overlap_mass_teacher": at(mass_teacher, 0.01),
            "reverse_kl": at(kl, 0.01),
        },
    }
    if answers:
        made["continuation"] = [
            {
                "depth": 0.0,
                "tokens": 0.0,
                "student": at(student, 0.01),
                "gain": at(*alone),
                "teacher": at(student + alone[0], 0.01),
            }
        ]
        made["predicted_gain"] = at(*gain)
    return made


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, SHOULD_WORK),  # alike, and better where the student is
        (dict(mass=SHARED_MASS), SHOULD_WORK),
        (dict(mass_teacher=SHARED_MASS), SHOULD_WORK),
        (dict(mass=SHARED_MASS - 0.0201), INCOMPATIBLE),
        (dict(mass_teacher=SHARED_MASS - 0.0201), INCOMPATIBLE),
        (dict(mass=SHARED_MASS - 0.0199), SHOULD_WORK),
        (dict(mass_teacher=SHARED_MASS - 0.0199), SHOULD_WORK),
        (dict(mass=SHARED_MASS - 0.0199, answers=False), UNDECIDED),  # within two errors
        (dict(gain=(-0.1, 0.01)), INCOMPATIBLE),  # better alone, lost where the student is
        (dict(gain=(-0.02, 0.01)), NOTHING_NEW),
        (dict(gain=(-0.020001, 0.01)), INCOMPATIBLE),
        (dict(gain=(0.02, 0.01)), NOTHING_NEW),
        (dict(gain=(0.020001, 0.01)), SHOULD_WORK),
        (dict(alone=(0.0, 0.01)), SHOULD_WORK),  # the student's states are what counts
        (dict(alone=(0.02, 0.01), gain=(-0.1, 0.01)), HARMFUL),  # no better alone, and worse there
        (dict(alone=(0.020001, 0.01), gain=(-0.1, 0.01)), INCOMPATIBLE),
        (dict(alone=(-0.02, 0.01)), SHOULD_WORK),
        (dict(alone=(-0.020001, 0.01)), HARMFUL),
        (dict(alone=(-0.2, 0.01), mass=0.3), HARMFUL),  # 3.3 comes before 3.1
        (dict(alone=(-0.2, 0.01), gain=(0.1, 0.01)), HARMFUL),
        (dict(alone=(0.0, 0.01), gain=(0.0, 0.01), mass=0.3), INCOMPATIBLE),
        (dict(kl=9e-7), NOTHING_NEW),
        (dict(kl=2e-6), SHOULD_WORK),
        (dict(kl=0.0, alone=(0.0, 0.0), gain=(0.0, 0.0)), NOTHING_NEW),
        (dict(kl=0.0, answers=False), NOTHING_NEW),
        (dict(answers=False), UNDECIDED),
        (dict(answers=False, mass=0.5), INCOMPATIBLE),
        (dict(alone=(0.0, None), gain=(0.0, None)), UNDECIDED),  # one prompt: no standard error
        (dict(gain=(0.0799, 0.01)), SHOULD_WORK),
        (dict(alone=(0.0, 0.05), gain=(0.0, 0.0501)), UNDECIDED),
        (dict(alone=(0.0, 0.05), gain=(0.0, 0.0499)), NOTHING_NEW),  # an upper bound below LEAD
        (
            dict(student=0.0, alone=(0.0, 0.04), gain=(0.0, 0.04)),
            UNDECIDED,
        ),  # nobody solved anything
    ],
    ids=str,
)
def test_a_verdict_at_each_border(change, expected):
    """3.1 to 3.3: the shared mass against SHARED_MASS, gains against two standard errors, harm before all else."""
    verdict, reasons = analysis.verdict(report(**change))
    assert verdict == expected and reasons


def test_that_most_responses_were_cut_off_is_said():
    """90 % cut off, and the advice was a cold start."""
    assert not any(
        "cut off" in x for x in analysis.verdict({**report(), "truncated_fraction": 0.5})[1]
    )
    assert any(
        "take a higher --max-new-tokens" in x
        for x in analysis.verdict({**report(), "truncated_fraction": 0.9})[1]
    )


def test_what_was_not_seen_is_undecided_and_says_what_it_would_take():
    """Case 16: a gain within two standard errors of 24 prompts was "nothing new to teach"."""
    verdict, reasons = analysis.verdict(report(alone=(0.05, 0.1), gain=(0.05, 0.1)))
    assert verdict == UNDECIDED
    assert "nothing is sure after 24 prompts: at most 360 more decide if it stays so" in reasons[-1]
    verdict, reasons = analysis.verdict(report(student=0.0, alone=(0.0, 0.02), gain=(0.0, 0.02)))
    assert verdict == UNDECIDED and "neither solved one of these" in reasons[-1]


@given(st.floats(-0.2, 0.2), st.floats(0.001, 0.3))
def test_with_so_many_more_prompts_it_would_be_decided(mean, error):
    """One at least; as many more make an error at which the same gain is no longer undecided."""
    verdict, reasons = analysis.verdict(report(gain=(mean, error)))
    if verdict == UNDECIDED:
        more = int(reasons[-1].split("at most ")[1].split()[0])
        assert more >= 1
        smaller = error * (24 / (24 + more)) ** 0.5 * 0.999
        assert analysis.verdict(report(gain=(mean, smaller)))[0] != UNDECIDED


def test_a_few_prompts_that_agree_prove_nothing():
    """Case 17: two prompts that both gain .5 had a standard error of 0, and "should work"."""
    both = analysis.estimate(torch.tensor([0.5, 0.5]), analysis.GAIN)
    assert both["mean"] == 0.5 and both["standard_error"] > 0.25 and not analysis.sure(both)
    assert analysis.estimate(torch.ones(2), analysis.SHARE)["standard_error"] > 0.2
    x = torch.tensor([0.0, 1.0] * 20)  # many that disagree: their own spread decides
    assert analysis.estimate(x, analysis.SHARE) == analysis.estimate(x)


def drawn(p, extremes, *, of=None, n=2):
    """Estimates from shares of n answers to prompts of chance p (samples, prompts), or from what p is ahead of `of`."""

    def shares(p):
        return torch.distributions.Binomial(n, p).sample() / n

    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = shares(p) - (0 if of is None else shares(of))
    return [analysis.estimate(row, extremes) for row in x]


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("prompts", [2, 8, 24, 64])
def test_two_errors_cover_an_accuracy(p, prompts):
    """Case 17: 19 times in 20, be it from two prompts (of .93 is what 8 coins allow)."""
    found = drawn(torch.full((400, prompts), p), analysis.SHARE)
    assert sum(abs(x["mean"] - p) <= 2 * x["standard_error"] for x in found) / len(found) >= 0.92


def test_the_default_number_of_prompts_tells_a_lead_of_a_fifth():
    """Case 16, by simulation: prompts as unlike as Beta(.8, 1.2) makes them, the teacher's chances .2 higher in the
    mean, two endings of each model: 9 of 10 leads are told, by 24 prompts half of them; without a lead, 1 in 20.
    """
    count = parse_analysis(["--student", "s", "--teacher", "t"]).count
    told = {}
    for prompts, lead in ((24, 0.2), (count, 0.2), (count, 0.0)):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            p = torch.distributions.Beta(0.8, 1.2).sample((500, prompts))
        found = drawn(p + (1 - p) * lead / 0.6, analysis.GAIN, of=p)
        told[prompts, lead] = sum(analysis.sure(x) > 0 for x in found) / len(found)
    assert told[count, 0.2] >= 0.9 and 0.4 < told[24, 0.2] < 0.65 and told[count, 0.0] < 0.05


def test_a_pair_that_solves_nothing_is_told_so():
    """Two zeros are no evidence of equal skill: the prompts are too hard, or the responses too short."""
    hint = "neither solved"
    assert any(
        hint in x
        for x in analysis.verdict(report(student=0.0, alone=(0.0, 0.0), gain=(0.0, 0.0)))[1]
    )
    for change in (dict(student=0.1, alone=(0.0, 0.01)), dict(student=0.0, alone=(0.1, 0.01))):
        assert not any(hint in x for x in analysis.verdict(report(**change))[1])


def made_up(error):
    """Does a standard error that there is not, of one prompt, stand there as a number after all?"""
    return any(digit in error for digit in "123456789")


def test_the_reasons_say_on_which_side_the_mass_lies_and_what_has_no_error():
    """At least SHARED_MASS or below it; one prompt has no standard error, and none is made up for it."""
    assert "at least" in analysis.verdict(report(mass=SHARED_MASS))[1][0]
    assert "below" in analysis.verdict(report(mass=SHARED_MASS / 2))[1][0]
    after = analysis.verdict(report(alone=(0.2, None)))[1][1].split("+0.200 +- ")[1]
    assert not made_up(after.split()[0])
    assert (
        analysis.verdict(report(kl=1e-6))[0] == SHOULD_WORK
    )  # agreeing is to lie below, not on it
    assert not any(
        "neither solved" in x for x in analysis.verdict(report(student=0.5, alone=(-0.5, 0.1)))[1]
    )


def test_every_verdict_is_one_of_the_five_and_names_its_numbers():
    """The smaller mass and both gains stand in the reasons, as measured, and none of the five is out of reach."""
    gains, found = (-0.4, 0.0, 0.3), set()
    for mass, mass_teacher, kl, alone, gain, error, answers in itertools.product(
        (0.25, 0.95), (0.45, 0.97), (0.0, 0.7), gains, gains, (0.01, 0.3), (True, False)
    ):
        verdict, reasons = analysis.verdict(
            report(
                mass=mass,
                mass_teacher=mass_teacher,
                kl=kl,
                alone=(alone, error),
                gain=(gain, error),
                answers=answers,
            )
        )
        found.add(verdict)
        if kl:
            assert f"{min(mass, mass_teacher):.3f}" in reasons[0] and str(SHARED_MASS) in reasons[0]
        if kl and answers:
            assert (
                f"{alone:+.3f} +- {error:.3f}" in reasons[1]
                and f"{gain:+.3f} +- {error:.3f}" in reasons[2]
            )
    assert found == set(VERDICTS) and len(VERDICTS) == 5


# --- a whole diagnosis ---------------------------------------------------------------------------------------------

METRICS = """reverse_kl overlap_ratio overlap_mass_student overlap_mass_teacher overlap_token_advantage entropy_gap
    largest_gap entropy_student entropy_teacher reward""".split()
SMALL = dict(answered=answered, k=3, n=2, max_new_tokens=LENGTH, finishes=2)


def diagnosed(pair, asked=None, **change):
    return analysis.diagnose_pair(pair, asked or rows(), **{**SMALL, **change})


@pytest.mark.parametrize("answers", [ANSWERS, None], ids=["answers", "none"])
def test_a_diagnosis_has_every_part_and_is_json(answers):
    """Means over tokens within a prompt, then over prompts; no answers, no accuracies; no NaN in a file."""
    pair = different()
    got = diagnosed(pair, rows(answers))
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    parts = {
        "prompts",
        "responses",
        "k",
        "response_length",
        "truncated_fraction",
        "metrics",
        "by_position",
        "verdict",
        "reasons",
    }
    parts.add("sampling_mismatch")
    assert set(got) == (
        parts | {"auroc", "right", "continuation", "predicted_gain"} if answers else parts
    )
    assert set(got["metrics"]) == set(METRICS) and (got["prompts"], got["responses"], got["k"]) == (
        8,
        16,
        3,
    )
    r = pair.write(PROMPTS, n=2, max_new_tokens=LENGTH, seed=0)
    grid = positions(pair, r, 3)
    for name in METRICS:
        prompts = [
            grid[name][2 * i : 2 * i + 2][r.response_mask[2 * i : 2 * i + 2]].nanmean()
            for i in range(8)
        ]
        assert got["metrics"][name] == pytest.approx(
            analysis.estimate(torch.stack(prompts)), rel=1e-5
        ), name
    assert (
        got["response_length"] == r.response_mask.sum().item() / 16 and got["verdict"] in VERDICTS
    )
    b = got["by_position"]
    assert set(b) == {*analysis.BY_POSITION, "width", "tokens"}
    assert b["tokens"] == r.response_mask.sum(0).tolist()
    if answers:
        assert [c["depth"] for c in got["continuation"]] == list(analysis.DEPTHS)
        texts = [
            pair.tokenizer.decode(r.response_ids(i), skip_special_tokens=True) for i in range(16)
        ]
        right = torch.tensor(
            [same_answer(read_answer(text), ANSWERS[i // 2]) for i, text in enumerate(texts)]
        )
        assert 0 < got["right"] == right.sum()
        assert got["auroc"] == pytest.approx(analysis.auroc(grid["reward"].nanmean(1), right))
        gains = [c["gain"]["mean"] for c in got["continuation"]]
        assert got["predicted_gain"]["mean"] == pytest.approx(sum(gains) / len(gains))


def everything_right(pair, asked, *, n=1, **_):
    return torch.ones(len(asked), n, dtype=torch.bool), None


def test_each_argument_of_a_diagnosis_goes_where_it_belongs(monkeypatch):
    """temperature is that of the student's own responses and of the measurement, the eval_ pair that of the endings."""
    asked = {}

    def note(owner, name):
        plain = getattr(owner, name)
        monkeypatch.setattr(
            owner,
            name,
            lambda *args, **options: (
                asked.setdefault(name, []).append((args[1:], options)) or plain(*args, **options)
            ),
        )

    note(Pair, "write"), note(Pair, "grade"), note(analysis, "continuation")
    analysis.diagnose_pair(
        different(),
        rows(),
        answered=everything_right,
        k=4,
        n=3,
        max_new_tokens=5,
        temperature=0.8,
        eval_temperature=0.3,
        eval_top_p=0.6,
        finishes=2,
        depths=(0.0, 3),
        seed=7,
    )
    assert asked["write"] == [((PROMPTS,), dict(n=3, max_new_tokens=5, temperature=0.8, seed=7))]
    assert [options for _, options in asked["grade"]] == [dict(temperature=0.8)]
    r = different().write(PROMPTS, n=3, max_new_tokens=5, temperature=0.8, seed=7)
    assert asked["continuation"] == [
        (
            (rows(), [r.response_ids(3 * i) for i in range(8)], [depth]),
            dict(
                answered=everything_right, n=2, max_new_tokens=5, temperature=0.3, top_p=0.6, seed=7
            ),
        )
        for depth in (0.0, 3)
    ]


def test_the_flags_have_the_defaults_of_the_functions():
    """What the command does where nothing is said is what the function does."""
    flags = vars(parse_analysis(["--student", "s", "--teacher", "t"]))
    for function in (analysis.diagnose_pair, encode_rows, load_pair):
        said = {
            name: x.default
            for name, x in inspect.signature(function).parameters.items()
            if name in flags
        }
        said = {
            name: default
            for name, default in said.items()
            if default is not inspect.Parameter.empty
        }
        said |= {
            "micro_batch_tokens": Pair.micro_batch_tokens
        }  # load_pair asks how much memory there is
        assert len(said) > 1 and said == {name: flags[name] for name in said}, function.__name__
    assert flags["out"] == "diagnose.json"


def test_without_arguments_the_command_line_is_read(monkeypatch, capsys):
    """As any program does."""
    monkeypatch.setattr("sys.argv", ["analysis.py", *BOTH, "--k", "-7"])
    with pytest.raises(SystemExit):
        analysis.main()
    assert "--k -7" in capsys.readouterr().err


def test_the_flags_of_loading_and_of_the_pages_go_where_they_belong(
    files, monkeypatch, tmp_path, capsys
):
    """Device, dtype and thinking to the pair; a few of the prompts to the page of tokens; runs to the pictures."""
    asked, load, encode = {}, Pair.load, Pair.encode
    monkeypatch.setattr(
        Pair, "load", lambda *names, **options: asked.update(options) or load(*names, **options)
    )
    monkeypatch.setattr(
        Pair,
        "encode",
        lambda *args, **options: (
            asked.update(options) or encode(*args, **{**options, "thinking": "default"})
        ),
    )  # there is no such switch
    monkeypatch.setattr(
        tokens,
        "write_page",
        lambda pair, rows, _, **options: asked.update(page=(len(rows), options)),
    )
    monkeypatch.setattr(
        analysis, "diagnose_pair", lambda pair, rows, **_: asked.update(rows=len(rows)) or {}
    )
    monkeypatch.setattr(plot, "diagnosis", lambda _: "the table")
    analysis.main(
        [
            "--student",
            f"{files}/student",
            "--teacher",
            f"{files}/teacher",
            "--count",
            "30",
            "--device",
            "cpu",
            "--dtype",
            "bfloat16",
            "--thinking",
            "off",
            "--k",
            "3",
            "--max-new-tokens",
            "5",
            "--seed",
            "7",
            "--max-prompt-tokens",
            "50",
            "--temperature",
            "0.5",
            "--tokens",
            str(tmp_path / "x.html"),
            "--out",
            str(tmp_path / "x.json"),
        ]
    )
    assert {
        name: asked[name]
        for name in ("device", "dtype", "thinking", "max_prompt_tokens", "new_tokens")
    } == dict(device="cpu", dtype="bfloat16", thinking="off", max_prompt_tokens=50, new_tokens=5)
    few, options = asked["page"]
    assert 1 < few < asked["rows"] == 30 and options == dict(
        k=3, max_new_tokens=5, temperature=0.5, seed=7
    )
    assert str(tmp_path / "x.html") in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr(plot, "runs", lambda *args: asked.update(runs=args) or "drawn")
    assert (
        analysis.main(["--run", str(tmp_path), "--plot", "x.svg", "--positions", "y.svg"])
        == "drawn"
    )
    assert asked["runs"] == ([str(tmp_path)], "x.svg", "y.svg")


def test_a_diagnosis_has_its_means_bucket_by_bucket():
    """31 tokens in 16 buckets of two; and as many responses are cut off as have no eos."""
    pair = different()
    got = diagnosed(pair, rows(None), n=6, max_new_tokens=31)
    r = pair.write(PROMPTS, n=6, max_new_tokens=31, seed=0)
    reward, b = positions(pair, r, 3)["reward"], got["by_position"]
    assert b["width"] == 2 and len(b["tokens"]) == len(b["reward"]) == analysis.BUCKETS
    for i, mean in enumerate(b["reward"]):
        assert mean == pytest.approx(reward[:, 2 * i : 2 * i + 2].nanmean().item(), abs=1e-5)
    assert (
        got["truncated_fraction"] == r.truncated.double().mean().item()
        and 0 < got["truncated_fraction"] < 1
    )


def test_some_answers_are_enough():
    """Prompts without an answer count in the metrics and not in what is right."""
    pair, found = different(), []
    r = pair.write(PROMPTS, n=8, max_new_tokens=LENGTH, seed=0)
    texts = [pair.tokenizer.decode(r.response_ids(i), skip_special_tokens=True) for i in range(64)]
    right = [same_answer(read_answer(text), ANSWERS[i // 8]) for i, text in enumerate(texts)]
    for kept in ([0, 1, 2, 3], [3, 4, 5, 6, 7], [1, 4, 6]):
        some = [answer if i in kept else None for i, answer in enumerate(ANSWERS)]
        found.append(diagnosed(pair, rows(some), n=8))
        assert found[-1]["right"] == sum(sum(right[8 * i : 8 * i + 8]) for i in kept)
    assert found[0]["metrics"] == found[1]["metrics"] and any(x["right"] for x in found)


def test_a_teacher_that_is_the_student_has_nothing_new():
    """Every distance exactly 0, overlap 1 (trl#6480), and the verdict says so."""
    got = diagnosed(equal())
    distances = ("reverse_kl", "entropy_gap", "reward", "overlap_token_advantage")
    metrics = got["metrics"]
    assert {metrics[name]["mean"] for name in distances} == {0.0} and metrics["overlap_ratio"][
        "mean"
    ] == 1.0
    assert metrics["overlap_mass_student"] == metrics["overlap_mass_teacher"]
    assert (
        got["predicted_gain"]["mean"] == 0
        and got["auroc"] in (None, 0.5)
        and got["verdict"] == NOTHING_NEW
    )


@pytest.mark.parametrize("own, depths", [(False, 1), (True, 3)])
def test_where_nobody_solves_anything_deeper_cuts_are_not_tried(own, depths):
    """6.1 on problems beyond both says nothing, and costs most of the time; one right response and it is worth it."""
    asked = []

    def answered(pair, rows, *, max_new_tokens, n=1, model=None, **_):
        right = torch.zeros(len(rows), n, dtype=torch.bool)
        if model:
            asked.append(model)
        else:  # the student's own, as they stand
            assert max_new_tokens == 0
            right[-1, -1] = own
        return right, None

    got = diagnosed(different(), answered=answered, depths=(0.0, 0.25, 0.5))
    assert [c["depth"] for c in got["continuation"]] == [0.0, 0.25, 0.5][:depths] and len(
        asked
    ) == 2 * depths
    assert any("neither solved one of these" in reason for reason in got["reasons"])


def test_the_report_tells_student_from_teacher_and_errors_are_over_prompts():
    """A student that solves what no teacher does is worth deeper cuts; the predicted gain is each prompt's mean over
    the depths, its error that of the mean over prompts."""
    pair, generator, gains = different(), torch.Generator().manual_seed(0), []

    def answered(pair, rows, *, model=None, n=1, **_):
        made = torch.zeros(len(rows), n, dtype=torch.bool)
        if model is pair.student:
            made = torch.randint(2, (len(rows), n), generator=generator).bool()
            gains.append(-made.double().mean(1))
        return made, None

    got = diagnosed(pair, answered=answered, depths=(0.0, 0.25, 0.5))
    assert [(c["student"], c["teacher"]["mean"], c["gain"]) for c in got["continuation"]] == [
        (analysis.estimate(-gain, analysis.SHARE), 0, analysis.estimate(gain, analysis.GAIN))
        for gain in gains
    ]
    assert len(gains) == 3
    assert got["predicted_gain"] == pytest.approx(
        analysis.estimate(torch.stack(gains).mean(0), analysis.GAIN)
    )


def test_a_diagnosis_is_made_on_the_device_of_the_pair():
    """Where the default device is another one, which holds no numbers, the report is the same."""
    here = diagnosed(different(), rows(None))
    pair = different()
    r = pair.write(PROMPTS, n=2, max_new_tokens=LENGTH, seed=0)
    pair.write = lambda *_, **__: r
    with torch.device("meta"):
        there = diagnosed(pair, rows(None))
    assert there == here


def test_the_same_seed_gives_the_same_report():
    """A diagnosis can be repeated; another seed samples other responses."""
    one, again, other = (diagnosed(different(), seed=seed) for seed in (0, 0, 1))
    assert one == again and one["metrics"] != other["metrics"]


@pytest.mark.parametrize("answers", [ANSWERS, None], ids=["answers", "none"])
def test_the_table_shows_every_metric_and_the_verdict(answers):
    """What is in diagnose.json can be read off the screen."""
    got = diagnosed(different(), rows(answers))
    text = plot.diagnosis(got)
    for x in got["metrics"].values():
        assert f"{x['mean']:9.4f} +- {x['standard_error']:.4f}" in text
    assert f"verdict: {got['verdict']}" in text and all(
        reason in " ".join(text.split()) for reason in got["reasons"]
    )
    b = got["by_position"]
    assert all(
        f"{tokens:8d} {reward:9.3f}" in text for tokens, reward in zip(b["tokens"], b["reward"])
    )
    if answers:
        gains = [c["gain"] for c in got["continuation"]]
        assert all(f"{x['mean']:+9.3f} +- {x['standard_error']:.3f}" in text for x in gains)
        assert f"{got['auroc']:9.4f}" in text and f"{got['predicted_gain']['mean']:+8.3f}" in text
    got["metrics"]["overlap_token_advantage"] = {
        "mean": None,
        "standard_error": None,
    }  # no token shared anywhere
    assert "none shared" in plot.diagnosis(got)


def test_the_table_by_hand():
    """Every number stands in the row of its name and in the column of its heading."""
    at = lambda mean, error=0.25: {"mean": mean, "standard_error": error}  # noqa: E731
    names = (
        "overlap_ratio overlap_mass_student overlap_mass_teacher overlap_token_advantage entropy_student "
        "entropy_teacher entropy_gap largest_gap reverse_kl reward".split()
    )
    made = {
        "prompts": 3,
        "responses": 6,
        "response_length": 7.5,
        "truncated_fraction": 0.5,
        "k": 4,
        "verdict": "so",
        "reasons": ["one", "two"],
        "metrics": {name: at(i + 0.5) for i, name in enumerate(names)},
        "right": 2,
        "auroc": 0.75,
        "predicted_gain": at(0.125, None),
        "continuation": [
            {"depth": 0.25, "tokens": 1.5, "student": at(0.1), "teacher": at(0.4), "gain": at(0.3)},
            {
                "depth": 12,
                "tokens": 9.0,
                "student": at(0.2),
                "teacher": at(0.1),
                "gain": at(-0.1, None),
            },
        ],
        "by_position": {
            "width": 8,
            "tokens": [5, 0, 3],
            "reward": [-0.5, None, -1.5],
            "overlap_ratio": [0.5, None, 0.75],
            "entropy_student": [1.25, None, 1.5],
            "entropy_teacher": [1.0, None, 2.0],
        },
    }
    made["metrics"]["reward"]["standard_error"] = None  # one prompt
    lines = plot.diagnosis(made).split("\n")
    rows = [line.split() for line in lines]
    assert rows[0][:6] == "3 prompts, 6 responses of 7.5".split() and "50% cut off" in lines[0]
    assert [row[-3:] for row in rows[1:10]] == [[f"{i}.5000", "+-", "0.2500"] for i in range(9)]
    assert rows[10][-3:-1] == ["9.5000", "+-"] and not made_up(rows[10][-1])
    assert "k = 4" in lines[1] and all(
        ("student" in lines[i], "teacher" in lines[i]) == sides
        for i, sides in (
            (2, (True, False)),
            (3, (False, True)),
            (5, (True, False)),
            (6, (False, True)),
        )
    )
    assert rows[11][-5:] == "0.7500 2 right, 4 not".split()
    assert rows[13][-3:] == ["student", "teacher", "gain"]
    assert rows[14] == "from 25% ( 1.5 tokens in) 0.100 0.400 +0.300 +- 0.250".split()
    assert rows[15][:-1] == "from 12 tokens ( 9.0 tokens in) 0.200 0.100 -0.100 +-".split()
    assert not made_up(rows[15][-1])
    assert (
        rows[16][:-1] == "mean over these depths +0.125 +-".split()
        and not made_up(rows[16][-1])
        and not rows[17]
    )
    assert rows[18] == "position tokens reward overlap H student H teacher".split()
    assert rows[19] == "0-7 5 -0.500 0.500 1.250 1.000".split()
    assert (
        rows[20] == "16-23 3 -1.500 0.750 1.500 2.000".split() and not rows[21]
    )  # 8-15 holds none
    assert lines[22:] == ["verdict: so", "  - one", "  - two"]
    assert "not defined" in plot.diagnosis({**made, "auroc": None})


# --- the command line ----------------------------------------------------------------------------------------------


def command(files, *more):
    return [
        "--student",
        f"{files}/student",
        "--teacher",
        f"{files}/teacher",
        "--prompts",
        f"{files}/prompts.jsonl",
        *more,
    ]


def test_the_command_writes_the_report_with_its_origin_and_prints_the_table(
    files, tmp_path, capsys
):
    """diagnose.json holds the numbers of the table and what made them: command, commit, versions."""
    out = tmp_path / "diagnose.json"
    analysis.main(
        command(files, "--k", "3", "--max-new-tokens", "6", "--count", "5", "--out", str(out))
    )
    written = json.loads(out.read_text())
    assert plot.diagnosis(written) in capsys.readouterr().out and list(tmp_path.iterdir()) == [out]
    assert {
        "command",
        "commit",
        "python",
        "torch",
        "transformers",
        "threads",
        "verdict",
        "metrics",
    } <= written.keys()
    assert (written["prompts"], written["student"], written["torch"]) == (
        5,
        f"{files}/student",
        torch.__version__,
    )


def test_the_command_is_the_function_on_the_first_prompts_of_a_shuffled_file(files, tmp_path):
    """--seed shuffles the file and fixes all sampling, --count cuts it, and every other number goes to the function."""
    numbers = dict(
        k=3,
        n=3,
        max_new_tokens=5,
        temperature=0.9,
        eval_temperature=0.5,
        eval_top_p=0.8,
        finishes=3,
        seed=4,
    )
    out = tmp_path / "diagnose.json"
    flags = {**numbers, "count": 5, "micro_batch_tokens": 64, "out": out}
    analysis.main(
        command(
            files,
            *itertools.chain.from_iterable(
                (f"--{name.replace('_', '-')}", str(x)) for name, x in flags.items()
            ),
        )
    )
    lines = (files / "prompts.jsonl").read_text().splitlines()
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(4)).tolist()
    pair = Pair.load(f"{files}/student", f"{files}/teacher", micro_batch_tokens=64)
    encoded = pair.encode(
        [json.loads(lines[i]) for i in order[:5]], max_prompt_tokens=1024, new_tokens=5
    )
    expected = analysis.diagnose_pair(pair, encoded, answered=answered, **numbers)
    written = json.loads(out.read_text())
    assert {name: written[name] for name in expected} == expected
    assert (written["teacher"], written["processes"]) == (f"{files}/teacher", 1)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--propmts", "x"], "did you mean --prompts"),
        (["--stud", "x"], "unknown flag --stud"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--n", "0"], "--n 0: must be at least 1"),
        (["--k", "many"], "--k"),
        (["--temperature", "0"], "--temperature"),
        (["--eval-top-p", "1.5"], "--eval-top-p"),
        (["--out", "no/such/folder/diagnose.json"], "its folder does not exist"),
        (["--tokens", "no/such/folder/out.html"], "its folder does not exist"),
        (["--template", "latex"], "latex"),
        (["--run", "runs/x"], "give either"),
        (["--plot", "f.svg"], "--plot and --positions go with --run"),
    ],
)
def test_a_diagnosis_that_cannot_work_is_one_line_and_no_model_is_loaded(
    flags, says, capsys, tmp_path, monkeypatch
):
    """prime-rl#1458: exit code 2, one line with the flag, no file left behind."""
    refused(["--student", "s", "--teacher", "t", *flags], says, capsys, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--student", "s"], "--teacher is missing"),
        (["--teacher", "t"], "--student is missing"),
        ([], "give either"),
        (["--run", "."], "no metrics.jsonl there"),
    ],
)
def test_half_a_command_is_one_line_too(flags, says, capsys, tmp_path, monkeypatch):
    """A pair without its other half, and a run that is none."""
    refused(flags, says, capsys, tmp_path, monkeypatch)


BOTH = ["--student", "s", "--teacher", "t"]


@pytest.mark.parametrize(
    "flags, right",
    [
        *(
            (BOTH + [f"--{name}", str(least - wrong)], not wrong)
            for wrong in (0, 1)
            for name, least in (
                ("count", 1),
                ("n", 1),
                ("max-new-tokens", 1),
                ("max-prompt-tokens", 1),
                ("finishes", 1),
                ("k", 1),
                ("micro-batch-tokens", 1),
            )
        ),
        (BOTH + ["--temperature", "1e-3"], True),
        (BOTH + ["--temperature", "0"], False),
        (BOTH + ["--temperature", "-1"], False),
        (BOTH + ["--eval-temperature", "0"], True),
        (BOTH + ["--eval-temperature", "-0.001"], False),
        (BOTH + ["--eval-top-p", "0"], False),
        (BOTH + ["--eval-top-p", "1e-3"], True),
        (BOTH + ["--eval-top-p", "1"], True),
        (BOTH + ["--eval-top-p", "1.001"], False),
        (BOTH, True),
        (BOTH[:2], False),
        (BOTH[2:], False),
        (BOTH + ["--run", "run"], False),
        (["--run", "run"], True),
        (BOTH[:2] + ["--run", "run"], False),
        (BOTH[2:] + ["--run", "run"], False),
        ([], False),
        (["--run", "run", "--run", "run"], True),
        (["--run", "run", "--run", "other"], False),
        (["--run", "run", "--tokens", "x.html"], False),
        (BOTH + ["--tokens", "x.html"], True),
        (["--run", "run", "--plot", "x.svg"], True),
        (["--run", "run", "--positions", "x.svg"], True),
        (BOTH + ["--plot", "x.svg"], False),
        (BOTH + ["--positions", "x.svg"], False),
        (["--run", "run", "--plot", "no/x.svg"], False),
        (["--run", "run", "--positions", "no/x.svg"], False),
        (BOTH + ["--prompts", "run/metrics.jsonl"], True),
        (BOTH + ["--prompts", "run"], False),
        (BOTH + ["--thinking", "off"], True),
        (BOTH + ["--thinking", "maybe"], False),
        (BOTH + ["--dtype", "bfloat16"], True),
        (BOTH + ["--dtype", "float8"], False),
        (BOTH + ["--stu", "s"], False),
    ],
    ids=lambda x: " ".join(x).removeprefix(" ".join(BOTH)) if isinstance(x, list) else str(x),
)
def test_flags_at_each_border(flags, right, tmp_path, monkeypatch):
    """What cannot work is refused before anything is loaded, and what can work is not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir(), (tmp_path / "run" / "metrics.jsonl").touch()
    with contextlib.nullcontext() if right else pytest.raises(ValueError) as refusal:
        parse_analysis(flags)
    assert right or "\n" not in str(refusal.value)


def refused(flags, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pair, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        analysis.main(flags)
    printed = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and says in printed
        and printed.count("\n") == 1
        and not list(tmp_path.iterdir())
    )


@pytest.mark.parametrize("flags", [["--k", "12"], ["--device", "gpu"]])
def test_what_only_the_models_can_tell_is_one_line_all_the_same(
    files, flags, capsys, tmp_path, monkeypatch
):
    """A k beyond the shared vocabulary, a device that is none: opd.py names flag and remedy, and so does this."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        analysis.main(command(files, "--max-new-tokens", "4", *flags))
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and flags[1] in printed and printed.count("\n") == 1


# --- evaluation draws from the smallest set ------------------------------------------------------------------------


@pytest.mark.parametrize("top_p, least", [(0.03, 1), (0.6, 256), (0.9, 4096), (0.999, 4096)])
def test_a_flat_softmax_is_cut_where_a_full_sort_would_cut_it(monkeypatch, top_p, least):
    """Over 5,000 nearly equal tokens the smallest set goes far beyond the 256 that are looked at first; a sharp row
    beside them is cut as if it were alone."""
    generator, kept, searchsorted = torch.Generator().manual_seed(0), [], torch.searchsorted
    monkeypatch.setattr(
        torch,
        "searchsorted",
        lambda mass, *rest, **options: (
            kept.append(mass.diff(prepend=torch.zeros(len(mass), 1)) > 0)
            or searchsorted(mass, *rest, **options)
        ),
    )
    flat = torch.linspace(0, 0.2, 5000)[torch.randperm(5000, generator=generator)].log_softmax(-1)
    sharp = flat.index_fill(0, torch.tensor(7), 20.0).log_softmax(-1)
    p, order = flat.double().exp().sort(descending=True)
    size = int((p.cumsum(-1) - p < top_p).sum())  # of the smallest set, by a full sort
    assert least < size < 5000
    u = torch.rand(401, dtype=torch.float64, generator=generator)
    y = draw(torch.stack([sharp] + [flat] * 400), u, top_p)
    assert y[0] == 7 and kept[0].sum(-1).tolist() == [1] + [size] * 400
    ranks = order.argsort()[y[1:]]  # (400,) token -> rank
    assert ranks.max() < size
    counts = torch.histc(ranks.double(), bins=2, min=0, max=size) / len(ranks)
    torch.testing.assert_close(
        counts, torch.full((2,), 0.5).double(), rtol=0, atol=0.08
    )  # each half as often
