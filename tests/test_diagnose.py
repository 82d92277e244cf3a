"""A pair before training (analysis.py, second half; paper 4, 6): who is right, where they part, and the verdict."""
import contextlib
import dataclasses
import inspect
import itertools
import json
import math

import pytest
import torch
from conftest import tiny, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import analysis
import opd
from analysis import HARMFUL, INCOMPATIBLE, NOTHING_NEW, SHARED_MASS, SHOULD_WORK, UNDECIDED, VERDICTS
from experiments import plot, tokens
from loss import full_vocab, top_k
from recipes import as_rollout
from rollout import draw
from teacher import Pair, freeze, split

WORDS = "[PAD] [BOS] [EOS] [UNK] add the so + \\boxed{3} \\boxed{7} \\boxed{0}".split()
EOS, BOX = 2, {"3": 8, "7": 9, "0": 10}                    # a box is one token: tiny models are right now and then
PROMPTS = [[1, 4], [1, 5, 6], [1, 6, 7, 4, 5], [1, 4, 7, 5], [1, 7], [1, 7, 7, 7], [1, 5, 4, 4, 4], [1, 6]]
ANSWERS = "3 7 0 7 3 0 3 7".split()
LENGTH = 6


def pair_of(student, teacher):
    """Two models as a Pair, without files."""
    return Pair(student, freeze(teacher), word_tokenizer(WORDS), EOS,
                dict(eos_ids={EOS}, pad_id=0, vocab_size=len(WORDS)),
                (split(student, len(WORDS)), split(teacher, len(WORDS))), torch.device("cpu"), contextlib.nullcontext)


def different():
    """A student and a wider, deeper teacher with padded rows of its head."""
    return pair_of(tiny("llama", vocab_size=len(WORDS)),
                   tiny("llama", seed=1, vocab_size=len(WORDS) + 3, hidden=48, layers=3))


def equal():
    return pair_of(tiny("llama", vocab_size=len(WORDS)), tiny("llama", vocab_size=len(WORDS)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """student/, teacher/ and prompts.jsonl."""
    folder, pair = tmp_path_factory.mktemp("files"), different()
    for name, model in (("student", pair.student), ("teacher", pair.teacher)):
        model.save_pretrained(folder / name)
        pair.tokenizer.save_pretrained(folder / name)
    lines = [{"prompt": pair.tokenizer.decode(ids[1:]), "answer": answer} for ids, answer in zip(PROMPTS, ANSWERS)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def how(pair, **change):
    return {**dict(n=2, max_new_tokens=LENGTH, temperature=1.0, top_p=1.0, **pair.ending,
                   generator=torch.Generator().manual_seed(0)), **change}


def plain(model, r, row):
    """Logits (T, V) of one response, from its tokens alone, without padding."""
    ids = r.ids[row][r.attention_mask[row]].unsqueeze(0)                                     # (1, L)
    return model(input_ids=ids).logits[0, -int(r.response_mask[row].sum()) - 1:-1, :len(WORDS)]


# --- auroc, estimate -----------------------------------------------------------------------------------------------

scored = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=12)


@given(scored)
def test_auroc_counts_the_pairs_in_the_right_order_and_ties_half(rows):
    """6.2: over all pairs of a true and a false one; None where there is no such pair."""
    scores, labels = (torch.tensor(x) for x in zip(*rows))
    pairs = [(a > b) + (a == b) / 2 for a, yes in rows for b, no in rows if yes and not no]
    got = analysis.auroc(scores.double(), labels)
    assert got == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)


@given(scored, st.sampled_from([lambda x: x ** 3, lambda x: 2 * x - 7, torch.exp, lambda x: (x > 0) + x]))
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
    assert got == {"mean": pytest.approx(mean, abs=1e-9), "standard_error": pytest.approx(error, abs=1e-9)}


# --- answered ------------------------------------------------------------------------------------------------------


def copying(calls):
    """A rollout that answers with the box that ends its prompt, after as many words as that has; notes its calls."""
    def write(model, prompts, *, n, max_new_tokens, **_):
        calls.append((prompts, n, max_new_tokens))
        said = [(p, ([6] * len(p) + [p[-1], EOS])[:max_new_tokens]) for p in prompts for _ in range(n)]
        r = as_rollout(said, 0, "cpu")
        r.truncated = torch.tensor([EOS not in r.response_ids(i) for i in range(len(r.ids))])
        return r
    return write


def test_what_is_written_to_its_end_is_judged_as_it_stands(monkeypatch):
    """6.1: a start that ends in an eos, or has used the budget up, asks no model for more."""
    monkeypatch.setattr(analysis, "rollout", lambda *_, **__: pytest.fail("a model was asked"))
    pair = equal()
    starts = [[6, BOX["7"], EOS], [BOX["3"], EOS], [EOS], [6, 6, 6, 6, BOX["7"], EOS], [6, 6, 6, 6, 6, BOX["7"]],
              [6] * (LENGTH + 2)]
    right, truncated = analysis.answered(pair.student, pair.tokenizer, PROMPTS[:6], ["7"] * 6, starts=starts,
                                         **how(pair, n=3))
    assert right.tolist() == [[x] * 3 for x in (True, False, False, True, True, False)]
    assert truncated.tolist() == [[x] * 3 for x in (False, False, False, False, True, True)]


def test_the_budget_counts_the_start():
    """A response has max_new_tokens in all, the start among them, whatever else is in its batch."""
    pair, seen = different(), []
    plain_decode = pair.tokenizer.decode
    pair.tokenizer.decode = lambda ids, **options: seen.append(list(ids)) or plain_decode(ids, **options)
    starts = [[4] * 5, [], [5] * 3, [6], [7] * 2, [10] * 4, [8] * 6, []]
    _, truncated = analysis.answered(pair.student, pair.tokenizer, PROMPTS, ANSWERS, starts=starts,
                                    **how(pair, n=4, generator=torch.Generator().manual_seed(1)))
    assert len(seen) == 7 * 4 + 1 and max(map(len, seen)) == LENGTH           # the one that is full is judged once
    for i, start in enumerate(starts):
        mine = [ids for ids in seen if ids[:len(start)] == start]
        assert len(mine) >= (1 if len(start) == LENGTH else 4), i             # nothing of it was written again
        assert all(len(ids) == LENGTH or ids[-1] == EOS for ids in mine), i
    assert sum(EOS != ids[-1] for ids in seen) == truncated.sum() - 3         # that one stands four times
    assert 0 < truncated.double().mean() < 1


@pytest.mark.parametrize("rows, n", [(1, 1), (6, 2), (7, 3), (2, 5), (256, 4)])
def test_rows_bounds_the_sequences_in_flight(monkeypatch, rows, n):
    """At most `rows` responses are written at once, or the n of one prompt, and every prompt once."""
    calls, pair = [], equal()
    monkeypatch.setattr(analysis, "rollout", copying(calls))
    analysis.answered(pair.student, pair.tokenizer, PROMPTS, ANSWERS, **how(pair, n=n, rows=rows))
    assert max(len(prompts) * n for prompts, *_ in calls) <= max(rows, n)
    assert sorted(p for prompts, *_ in calls for p in prompts) == sorted(PROMPTS)


@pytest.mark.parametrize("rows", [1, 4, 256])
def test_results_stand_in_the_order_of_the_prompts(monkeypatch, rows):
    """They are written in the order of their lengths; each is held against its own answer all the same."""
    calls, pair = [], equal()
    monkeypatch.setattr(analysis, "rollout", copying(calls))
    boxes = "7 3 0 0 7 3 7 0".split()
    starts = [[BOX[box]] for box in boxes]
    wrong = {1, 4, 6}
    answers = ["8" if i in wrong else box for i, box in enumerate(boxes)]
    right, truncated = analysis.answered(pair.student, pair.tokenizer, PROMPTS, answers, starts=starts,
                                         **how(pair, rows=rows, max_new_tokens=8))
    assert right.tolist() == [[i not in wrong] * 2 for i in range(8)]
    assert truncated.tolist() == [[1 + len(p) + 1 + 2 > 8] * 2 for p in PROMPTS]
    assert sorted(p for prompts, *_ in calls for p in prompts) == sorted(p + s for p, s in zip(PROMPTS, starts))


def test_what_is_asked_of_a_model_reaches_the_rollout(monkeypatch):
    """Every option of the sampling, in each part; parts are of like length, and as long as the one with most room."""
    parts, write, pair = [], copying([]), equal()
    monkeypatch.setattr(analysis, "rollout", lambda model, prompts, **asked: parts.append((prompts, asked)) or write(
        model, prompts, **asked))
    options = dict(temperature=0.3, top_p=0.9, eos_ids={EOS}, pad_id=5, vocab_size=7, in_flight=3,
                   generator=torch.Generator())
    starts = [[6] * (i % 3) for i in range(len(PROMPTS))]
    analysis.answered(pair.student, pair.tokenizer, PROMPTS, ANSWERS, starts=starts, n=2, max_new_tokens=9, rows=4,
                      **options)
    room = {tuple(p + start): 9 - len(start) for p, start in zip(PROMPTS, starts)}
    for prompts, asked in parts:
        assert asked == {**options, "n": 2, "max_new_tokens": max(room[tuple(p)] for p in prompts)}
    lengths = [len(p) for prompts, _ in parts for p in prompts]
    assert lengths == sorted(lengths) and len(parts) == 4


# The same ids as WORDS, where an answer is what follows "Answer:": whatever is said after it is part of it.
SPOKEN = "[PAD]|[BOS]|[EOS]|[UNK]|add|the|so|+|Answer: 3|Answer: 7|Answer: 0".split("|")


def test_the_end_of_a_response_is_no_part_of_its_answer():
    """"Answer: 7 [EOS]" says 7, both where a model has answered and where a diagnosis counts who is right."""
    pair = dataclasses.replace(different(), tokenizer=word_tokenizer(SPOKEN))
    right, truncated = analysis.answered(pair.student, pair.tokenizer, PROMPTS[:2], ["7", "7"],
                                         starts=[[6, BOX["7"], EOS], [6, BOX["7"], 6, EOS]], **how(pair))
    assert right.tolist() == [[True] * 2, [False] * 2] and right.dtype == truncated.dtype == torch.bool
    r = pair.write(PROMPTS, n=8, max_new_tokens=LENGTH, seed=0)
    said = [" ".join(SPOKEN[i] for i in r.response_ids(row) if i > 3) for row in range(64)]        # but special ones
    right = [analysis.same_answer(analysis.read_answer(text), ANSWERS[row // 8]) for row, text in enumerate(said)]
    assert analysis.diagnose_pair(pair, rows(), **{**SMALL, "n": 8})["right"] == sum(right)
    assert any(yes and r.response_ids(row)[-1] == EOS for row, yes in enumerate(right))


def test_all_rows_of_a_part_are_in_flight_where_nothing_is_said(monkeypatch):
    """in_flight bounds memory only where it is given."""
    asked, write, pair = [], copying([]), equal()
    monkeypatch.setattr(analysis, "rollout", lambda *args, in_flight, **options: asked.append(in_flight) or write(
        *args, **options))
    analysis.answered(pair.student, pair.tokenizer, PROMPTS, ANSWERS, **how(pair))
    assert asked == [None]


def test_a_bar_says_what_it_counts_and_is_not_in_a_log(monkeypatch, capsys):
    """Where stderr is no terminal nothing is printed; where it is one the bar has a name, and goes away."""
    pair, seen, bar = equal(), [], analysis.tqdm
    monkeypatch.setattr(analysis, "tqdm", lambda x, **options: seen.append(options) or bar(x, **options))
    for options in ({}, dict(what="student from 0.5")):
        analysis.answered(pair.student, pair.tokenizer, PROMPTS, ANSWERS, **how(pair), **options)
    assert [options["desc"] for options in seen] == ["evaluate", "student from 0.5"]
    assert not any(options["leave"] for options in seen)
    assert capsys.readouterr().err == ""


# --- 6.1 continuation ----------------------------------------------------------------------------------------------


def own_responses(pair):
    r = pair.write(PROMPTS, max_new_tokens=LENGTH, seed=5)
    return [r.response_ids(i) for i in range(len(PROMPTS))]


def continued(pair, depths, n=8):
    return analysis.continuation(pair, PROMPTS, ANSWERS, own_responses(pair), depths, n=n, max_new_tokens=LENGTH,
                                 temperature=1.0, top_p=1.0, seed=3)


def test_continuation_at_depth_0_is_plain_accuracy():
    """6.1: with nothing written, each model answers on its own, with the same draws as an evaluation of that seed."""
    pair = different()
    gain, student, teacher, tokens = continued(pair, [0.0])[0.0]
    alone = [analysis.accuracy(model, pair.tokenizer, PROMPTS, ANSWERS,
                               **how(pair, n=8, generator=torch.Generator().manual_seed(3)))
             for model in (pair.student, pair.teacher)]
    assert [student.mean().item(), teacher.mean().item()] == [x["mean"] for x in alone]
    assert torch.equal(gain, teacher - student) and gain.any() and tokens == 0


def test_continuation_at_depth_1_leaves_nothing_to_gain():
    """6.1: at the end of its responses both models have what the student wrote, right or wrong."""
    pair = different()
    texts = [pair.tokenizer.decode(ids, skip_special_tokens=True) for ids in own_responses(pair)]
    right = [float(analysis.same_answer(analysis.read_answer(text), answer)) for text, answer in zip(texts, ANSWERS)]
    gain, student, teacher, tokens = continued(pair, [1.0])[1.0]
    assert student.tolist() == teacher.tolist() == right and 0 < sum(right) < len(right) and not gain.any()
    assert tokens == sum(map(len, own_responses(pair))) / len(PROMPTS)


def test_a_depth_is_a_share_or_a_count_of_tokens(monkeypatch):
    """6.1 cuts at 1K, 4K, ... tokens: an int. A float is a share of each response; neither goes beyond its end."""
    pair, seen = equal(), []

    def answered(model, tokenizer, prompts, answers, *, starts, n, **_):
        seen.append(starts)
        return torch.zeros(len(prompts), n), None
    monkeypatch.setattr(analysis, "answered", answered)
    responses = [[6] * length for length in (1, 2, 3, 4, 5, 6, 2, 1)]
    out = analysis.continuation(pair, PROMPTS, ANSWERS, responses, [0.5, 2, 1.0, 9], n=1, max_new_tokens=LENGTH,
                                temperature=1.0, top_p=1.0, seed=0)
    lengths = [[len(start) for start in starts] for starts in seen]
    assert lengths[0::2] == lengths[1::2] == [                                # student and teacher from the same starts
        [0, 1, 1, 2, 2, 3, 1, 0], [1, 2, 2, 2, 2, 2, 2, 1], [1, 2, 3, 4, 5, 6, 2, 1], [1, 2, 3, 4, 5, 6, 2, 1]]
    assert {depth: x[3] for depth, x in out.items()} == {0.5: 10 / 8, 2: 14 / 8, 1.0: 3.0, 9: 3.0}


def test_both_models_are_asked_the_same_way(monkeypatch):
    """Same prompts, answers, draws and options; only the model, and what the bar says, differ."""
    pair, calls = different(), []

    def answered(model, tokenizer, prompts, answers, *, generator, what, **options):
        calls.append((model, (prompts, answers, generator.initial_seed(), options), what))
        return torch.zeros(len(prompts), options["n"]), None
    monkeypatch.setattr(analysis, "answered", answered)
    responses = [[6] * 4] * len(PROMPTS)
    analysis.continuation(pair, PROMPTS, ANSWERS, responses, [0.5], n=3, max_new_tokens=5, temperature=0.3, top_p=0.6,
                          seed=7)
    (one, asked, student), (other, again, teacher) = calls
    assert one is pair.student and other is pair.teacher and asked == again
    assert asked == (PROMPTS, ANSWERS, 7, dict(starts=[[6] * 2] * 8, n=3, max_new_tokens=5, temperature=0.3, top_p=0.6,
                                              **pair.ending))
    assert "student" in student and "teacher" in teacher and "0.5" in student and "0.5" in teacher


def test_the_depths_share_a_response_out_evenly():
    """6.1: from plain accuracy on, in equal steps, and short of the end, where nothing is left to gain."""
    assert analysis.DEPTHS == tuple(i / len(analysis.DEPTHS) for i in range(len(analysis.DEPTHS)))
    assert all(inspect.signature(f).parameters["depths"].default is analysis.DEPTHS
               for f in (analysis.continuation, analysis.diagnose_pair))


def test_a_teacher_that_is_the_student_gains_nothing_anywhere():
    """Both draw with the same seed: the difference is not small but 0, at every depth."""
    out = continued(equal(), analysis.DEPTHS + (2,), n=4)
    assert all(not gain.any() for gain, *_ in out.values()) and any(student.any() for _, student, *_ in out.values())


# --- where they part: positions, buckets ---------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, teacher_temperature", [(1.0, 1.0), (0.7, 2.0)])
def test_positions_are_the_diagnosis_of_the_plain_logits(temperature, teacher_temperature):
    """Eq. 6 to 10 at each response token as from whole logits without padding; NaN where there is none
    (nano-opd averaged over padding)."""
    pair = different()
    r = pair.write(PROMPTS, n=2, max_new_tokens=LENGTH, seed=0)
    grid = analysis.positions(pair, r, 3, temperature=temperature, teacher_temperature=teacher_temperature)
    assert not r.response_mask.all()
    for name, x in grid.items():
        assert name == "overlap_token_advantage" or torch.equal(x.isnan(), ~r.response_mask), name
        assert x.shape == r.response_mask.shape and x[~r.response_mask].isnan().all()
    for row in range(len(r.ids)):
        log_p, log_q = (plain(model, r, row).div(t).log_softmax(-1).detach() for model, t in
                        ((pair.student, temperature), (pair.teacher, teacher_temperature)))
        naive = analysis.diagnose(log_p, log_q, torch.tensor(r.response_ids(row)), 3)
        torch.testing.assert_close({name: x[row, :len(log_p)] for name, x in grid.items()}, naive,
                                   rtol=1e-3, atol=1e-4, equal_nan=True)


def test_positions_are_measured_at_temperature_1_and_without_a_graph():
    """The defaults are the models as they are, and nothing is kept for a backward pass."""
    pair, grads = different(), []
    r = pair.write(PROMPTS, max_new_tokens=LENGTH, seed=0)
    said = analysis.positions(pair, r, 3, temperature=1.0, teacher_temperature=1.0)
    for model in (pair.student, pair.teacher):
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            part.register_forward_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    torch.testing.assert_close(analysis.positions(pair, r, 3), said, rtol=0, atol=0, equal_nan=True)
    assert grads and not any(grads)


def test_positions_do_not_see_the_cut_into_micro_batches():
    """trl#6006: memory changes, the numbers do not."""
    pair = different()
    r = pair.write(PROMPTS, n=2, max_new_tokens=LENGTH, seed=0)
    one, other = (analysis.positions(pair, r, 3, micro_batch_tokens=budget) for budget in (1, 10_000))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


@given(st.lists(st.tuples(st.integers(0, 250), st.integers(-9, 9)), min_size=1, max_size=40), st.integers(1, 12))
def test_buckets_share_out_every_token_and_add_up_to_the_whole(tokens, width):
    """Fig. 13: bucket i holds positions i * width and on, the last all beyond; weighed by tokens they give the mean."""
    position, x = (torch.tensor(column) for column in zip(*tokens))
    sums = analysis.by_position(position, {"reward": x.double()}, width)
    assert all(len(s) == analysis.BUCKETS for s in sums.values())
    means, places = analysis.bucket_means(sums, width), [min(p // width, analysis.BUCKETS - 1) for p, _ in tokens]
    inside = [[x for place, (_, x) in zip(places, tokens) if place == i] for i in range(max(places) + 1)]
    assert means["width"] == width and means["tokens"] == list(map(len, inside)) and sum(means["tokens"]) == len(tokens)
    assert means["reward"] == [pytest.approx(sum(xs) / len(xs), abs=1e-5) if xs else None for xs in inside]
    total = sum(n * mean for n, mean in zip(means["tokens"], means["reward"]) if n)
    assert total / len(tokens) == pytest.approx(sum(x for _, x in tokens) / len(tokens), abs=1e-4)


def test_no_token_fills_no_bucket():
    """Lists end with the last bucket that holds a token: here they are empty. Means have five decimals."""
    nothing = analysis.by_position(torch.zeros(0, dtype=torch.long), {"reward": torch.zeros(0)}, 4)
    assert analysis.bucket_means(nothing, 4) == {"width": 4, "tokens": [], "reward": []}
    third = analysis.by_position(torch.tensor([9, 9, 8]), {"reward": torch.tensor([1.0, 0, 0])}, 4)
    assert analysis.bucket_means(third, 4) == {"width": 4, "tokens": [0, 0, 3], "reward": [None, None, 0.33333]}


def test_the_buckets_of_a_training_step_add_up_to_its_means(files, tmp_path):
    """Fig. 13 and Fig. 6 are one measurement: the buckets, weighed by their tokens, are the logged metrics."""
    run = opd.Run(opd.Config(student=f"{files}/student", teacher=f"{files}/teacher", prompts=f"{files}/prompts.jsonl",
                             out=str(tmp_path / "run"), k=3, max_new_tokens=20, device="cpu"))
    r = run.write(run.prompts, 3, 0)
    measured = opd.measure(run.cfg, *run.pair.splits, r, learn=False)
    b = measured["by_position"]
    assert b["width"] == 2 and sum(b["tokens"]) == measured["tokens"]         # 20 tokens in 16 buckets, rounded up
    assert b["tokens"] == [int(r.response_mask[:, i:i + 2].sum()) for i in range(0, r.response_mask.size(1), 2)]
    for name in analysis.BY_POSITION:
        mean = sum(n * x for n, x in zip(b["tokens"], b[name])) / measured["tokens"]
        assert mean == pytest.approx(measured[name], abs=2e-5), name


# --- 6.2 coherence -------------------------------------------------------------------------------------------------


def directions(n, V=5, H=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, size, dtype=torch.float64, generator=generator) for size in (V, H))


def chunked(g, h, size):
    return analysis.coherence(zip(g.split(size), h.split(size)))


def test_coherence_is_its_definition_on_the_whole_matrices():
    """|mean G| / mean |G|, the mean cosine of all pairs and the mean size, with every G = g h' written out."""
    g, h = directions(7)
    g[3] = 0                                                                  # a position that asks for nothing
    G = (g.unsqueeze(-1) * h.unsqueeze(1)).flatten(1)                                        # (7, V H)
    sizes = G.norm(dim=-1)
    unit = G[sizes > 0] / sizes[sizes > 0].unsqueeze(-1)
    cosines = [float(a @ b) for a, b in itertools.combinations(unit, 2)]
    assert chunked(g, h, 3) == pytest.approx({
        "coherence": (G.mean(0).norm() / sizes.mean()).item(), "null": (sizes.norm() / sizes.sum()).item(),
        "cosine": sum(cosines) / len(cosines), "size": sizes.mean().item(), "positions": 6})


@pytest.mark.parametrize("size", [1, 3, 10])
def test_gradients_that_are_all_one_cohere_fully(size):
    """Coherence and cosine 1, whatever the chunks."""
    g, h = (x.expand(10, -1) for x in directions(1))
    assert chunked(g, h, size) == pytest.approx(
        {"coherence": 1, "null": 10 ** -0.5, "cosine": 1, "size": (g[0].norm() * h[0].norm()).item(), "positions": 10})


def test_gradients_of_random_directions_cohere_as_their_null_says():
    """400 directions in 1,200 dimensions: |sum|^2 is its mean to a part in 25, the mean cosine 0 to 1e-4."""
    got = chunked(*directions(400, 40, 30), 64)
    assert got["coherence"] / got["null"] == pytest.approx(1, abs=0.06) and abs(got["cosine"]) < 4e-4


def test_the_null_is_the_root_mean_square_over_all_signs():
    """Over all 64 sign patterns of six gradients, exactly: the cross terms cancel."""
    g, h = directions(6)
    squares = [chunked(g * torch.tensor(signs).double().unsqueeze(-1), h, 6)["coherence"] ** 2
               for signs in itertools.product((-1, 1), repeat=6)]
    assert chunked(g, h, 6)["null"] == pytest.approx(math.sqrt(sum(squares) / 64))


def test_coherence_knows_neither_chunks_nor_axes_nor_scale():
    """Unchanged by the cut and by a rotation of logits and states; a scale goes into the size alone."""
    g, h = directions(9)
    generator = torch.Generator().manual_seed(1)
    Q, R = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0] for n in (5, 4))
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


@pytest.mark.parametrize("objective", [lambda log_p, log_q, y: full_vocab(log_p, log_q),
                                       lambda log_p, log_q, y: top_k(log_p, log_q, 4)], ids=["full", "top-k"])
@pytest.mark.parametrize("temperature, teacher_temperature", [(1.0, 1.0), (0.5, 2.0)])
def test_the_gradients_of_positions_sum_to_that_of_the_output_head(objective, temperature, teacher_temperature):
    """sum_t g_t h_t' = the gradient of the summed loss on the head's weight, by autograd on plain logits."""
    pair = different()
    r = pair.write(PROMPTS, max_new_tokens=LENGTH, seed=0)
    chunks = list(analysis.logit_gradients(pair, r, objective, temperature=temperature, micro_batch_tokens=20, chunk=3,
                                           teacher_temperature=teacher_temperature))
    assert sum(len(g) for g, _ in chunks) == r.response_mask.sum() and max(len(g) for g, _ in chunks) == 3
    total = 0
    for row in range(len(r.ids)):
        log_p, log_q = (plain(model, r, row).div(t).log_softmax(-1) for model, t in
                        ((pair.student, temperature), (pair.teacher, teacher_temperature)))
        total = total + objective(log_p, log_q, torch.tensor(r.response_ids(row))).sum()
    weight = pair.student.get_output_embeddings().weight
    expected, = torch.autograd.grad(total, weight)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(sum(g.T @ h for g, h in chunks), expected, rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for p in pair.student.parameters())             # a measurement leaves nothing behind


def test_the_gradients_of_positions_are_at_temperature_1_where_nothing_is_said():
    """Both temperatures default to the models as they are."""
    pair = different()
    r = pair.write(PROMPTS, max_new_tokens=LENGTH, seed=0)
    plain, said = (list(analysis.logit_gradients(pair, r, lambda log_p, log_q, y: full_vocab(log_p, log_q), **options))
                   for options in ({}, dict(temperature=1.0, teacher_temperature=1.0)))
    torch.testing.assert_close(plain, said, rtol=0, atol=0)


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


@pytest.mark.filterwarnings("ignore:Gemma2ForCausalLM does more")
def test_where_the_head_is_not_linear_only_logits_are_compared():
    """Gemma 2 caps its logits: h is 1 and g the gradient on the logits themselves, which sums to 0 over a softmax."""
    pair = pair_of(tiny("gemma2", vocab_size=len(WORDS)), tiny("llama", vocab_size=len(WORDS)))
    r = pair.write(PROMPTS, max_new_tokens=LENGTH, seed=0)
    for g, h in analysis.logit_gradients(pair, r, lambda log_p, log_q, y: full_vocab(log_p, log_q)):
        assert g.shape == (r.response_mask.sum(), len(WORDS)) and h.shape == (len(g), 1) and (h == 1).all()
        torch.testing.assert_close(g.sum(-1), torch.zeros(len(g)), rtol=0, atol=1e-5)
        assert g.norm(dim=-1).min() > 0


# --- the verdict ---------------------------------------------------------------------------------------------------


def report(*, mass=0.95, mass_teacher=0.97, kl=0.3, alone=(0.2, 0.01), gain=(0.1, 0.01), student=0.3, answers=True):
    """What verdict reads, made by hand: alone and gain are (mean, standard error) of teacher - student."""
    at = lambda mean, error: {"mean": mean, "standard_error": error}
    made = {"metrics": {"overlap_mass_student": at(mass, 0.01), "overlap_mass_teacher": at(mass_teacher, 0.01),
                        "reverse_kl": at(kl, 0.01)}}
    if answers:
        made["continuation"] = [{"depth": 0.0, "tokens": 0.0, "student": at(student, 0.01), "gain": at(*alone),
                                 "teacher": at(student + alone[0], 0.01)}]
        made["predicted_gain"] = at(*gain)
    return made


@pytest.mark.parametrize("change, expected", [
    ({}, SHOULD_WORK),                                                        # alike, and better where the student is
    (dict(mass=SHARED_MASS), SHOULD_WORK), (dict(mass_teacher=SHARED_MASS), SHOULD_WORK),
    (dict(mass=SHARED_MASS - 1e-6), INCOMPATIBLE), (dict(mass_teacher=SHARED_MASS - 1e-6), INCOMPATIBLE),
    (dict(gain=(-0.1, 0.01)), INCOMPATIBLE),                                  # better alone, lost where the student is
    (dict(gain=(-0.02, 0.01)), NOTHING_NEW), (dict(gain=(-0.020001, 0.01)), INCOMPATIBLE),
    (dict(gain=(0.02, 0.01)), NOTHING_NEW), (dict(gain=(0.020001, 0.01)), SHOULD_WORK),
    (dict(alone=(0.0, 0.01)), SHOULD_WORK),                                   # the student's states are what counts
    (dict(alone=(0.02, 0.01), gain=(-0.1, 0.01)), HARMFUL),                   # no better alone, and worse there
    (dict(alone=(0.020001, 0.01), gain=(-0.1, 0.01)), INCOMPATIBLE),
    (dict(alone=(-0.02, 0.01)), SHOULD_WORK), (dict(alone=(-0.020001, 0.01)), HARMFUL),
    (dict(alone=(-0.2, 0.01), mass=0.3), HARMFUL),                            # 3.3 comes before 3.1
    (dict(alone=(-0.2, 0.01), gain=(0.1, 0.01)), HARMFUL),
    (dict(alone=(0.0, 0.01), gain=(0.0, 0.01), mass=0.3), INCOMPATIBLE),
    (dict(kl=9e-7), NOTHING_NEW), (dict(kl=2e-6), SHOULD_WORK),
    (dict(kl=0.0, alone=(0.0, 0.0), gain=(0.0, 0.0)), NOTHING_NEW), (dict(kl=0.0, answers=False), NOTHING_NEW),
    (dict(answers=False), UNDECIDED), (dict(answers=False, mass=0.5), INCOMPATIBLE),
    (dict(alone=(0.0, None), gain=(0.0, None)), NOTHING_NEW),                 # one prompt: no standard error
], ids=str)
def test_a_verdict_at_each_border(change, expected):
    """3.1 to 3.3: the shared mass against SHARED_MASS, gains against two standard errors, harm before all else."""
    verdict, reasons = analysis.verdict(report(**change))
    assert verdict == expected and reasons


def test_a_pair_that_solves_nothing_is_told_so():
    """Two zeros are no evidence of equal skill: the prompts are too hard, or the responses too short."""
    hint = "neither solved"
    assert any(hint in x for x in analysis.verdict(report(student=0.0, alone=(0.0, 0.0), gain=(0.0, 0.0)))[1])
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
    assert analysis.verdict(report(kl=1e-6))[0] == SHOULD_WORK                # agreeing is to lie below, not on it
    assert not any("neither solved" in x for x in analysis.verdict(report(student=0.5, alone=(-0.5, 0.1)))[1])


def test_every_verdict_is_one_of_the_five_and_names_its_numbers():
    """The smaller mass and both gains stand in the reasons, as measured, and none of the five is out of reach."""
    gains, found = (-0.4, 0.0, 0.3), set()
    for mass, mass_teacher, kl, alone, gain, error, answers in itertools.product(
            (0.25, 0.95), (0.45, 0.97), (0.0, 0.7), gains, gains, (0.01, 0.3), (True, False)):
        verdict, reasons = analysis.verdict(report(mass=mass, mass_teacher=mass_teacher, kl=kl, alone=(alone, error),
                                                   gain=(gain, error), answers=answers))
        found.add(verdict)
        if kl:
            assert f"{min(mass, mass_teacher):.3f}" in reasons[0] and str(SHARED_MASS) in reasons[0]
        if kl and answers:
            assert f"{alone:+.3f} +- {error:.3f}" in reasons[1] and f"{gain:+.3f} +- {error:.3f}" in reasons[2]
    assert found == set(VERDICTS) and len(VERDICTS) == 5


# --- a whole diagnosis ---------------------------------------------------------------------------------------------

METRICS = """reverse_kl overlap_ratio overlap_mass_student overlap_mass_teacher overlap_token_advantage entropy_gap
    largest_gap entropy_student entropy_teacher reward""".split()
SMALL = dict(k=3, n=2, max_new_tokens=LENGTH, finishes=2)


def rows(answers=True):
    return [{"prompt": "", "ids": ids, "answer": answer if answers else None} for ids, answer in zip(PROMPTS, ANSWERS)]


@pytest.mark.parametrize("answers", [True, False])
def test_a_diagnosis_has_every_part_and_is_json(answers):
    """Means over tokens within a prompt, then over prompts; no answers, no accuracies; no NaN in a file."""
    pair = different()
    got = analysis.diagnose_pair(pair, rows(answers), **SMALL)
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    parts = {"prompts", "responses", "k", "response_length", "truncated_fraction", "metrics", "by_position", "verdict",
             "reasons", "undefined"}
    assert set(got) == (parts | {"auroc", "right", "continuation", "predicted_gain"} if answers else parts)
    assert set(got["metrics"]) == set(METRICS) and (got["prompts"], got["responses"], got["k"]) == (8, 16, 3)
    r = pair.write(PROMPTS, n=2, max_new_tokens=LENGTH, seed=0)
    grid = analysis.positions(pair, r, 3)
    for name in METRICS:
        prompts = [grid[name][2 * i:2 * i + 2][r.response_mask[2 * i:2 * i + 2]].nanmean() for i in range(8)]
        assert got["metrics"][name] == pytest.approx(analysis.estimate(torch.stack(prompts)), rel=1e-5), name
    assert got["undefined"] == {}
    assert got["response_length"] == r.response_mask.sum().item() / 16 and got["verdict"] in VERDICTS
    b = got["by_position"]
    assert set(b) == {*analysis.BY_POSITION, "width", "tokens", "reward_5_95"}
    assert b["tokens"] == r.response_mask.sum(0).tolist()
    assert all(low <= mean <= high for (low, high), mean in zip(b["reward_5_95"], b["reward"]))
    if answers:
        assert [c["depth"] for c in got["continuation"]] == list(analysis.DEPTHS)
        texts = [pair.tokenizer.decode(r.response_ids(i), skip_special_tokens=True) for i in range(16)]
        right = torch.tensor([analysis.same_answer(analysis.read_answer(text), ANSWERS[i // 2])
                              for i, text in enumerate(texts)])
        assert 0 < got["right"] == right.sum()
        assert got["auroc"] == pytest.approx(analysis.auroc(grid["reward"].nanmean(1), right))
        gains = [c["gain"]["mean"] for c in got["continuation"]]
        assert got["predicted_gain"]["mean"] == pytest.approx(sum(gains) / len(gains))


def test_each_argument_of_a_diagnosis_goes_where_it_belongs(monkeypatch):
    """temperature is that of the student's own responses and of the measurement, the eval_ pair that of the endings."""
    asked = {}

    def note(owner, name):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: asked.setdefault(name, []).append(
            (args[2:], options)) or plain(*args, **options))
    note(Pair, "write"), note(analysis, "positions"), note(analysis, "continuation")
    analysis.diagnose_pair(different(), rows(), k=4, n=3, max_new_tokens=5, temperature=0.8, eval_temperature=0.3,
                           eval_top_p=0.6, finishes=2, depths=(0.0, 3), seed=7, micro_batch_tokens=99)
    assert asked["write"] == [((), dict(n=3, max_new_tokens=5, temperature=0.8, seed=7))]
    assert asked["positions"] == [((4,), dict(temperature=0.8, micro_batch_tokens=99))]
    assert [options for _, options in asked["continuation"]] == 2 * [
        dict(n=2, max_new_tokens=5, temperature=0.3, top_p=0.6, seed=7)]
    assert [args[0] for args, _ in asked["continuation"]] == 2 * [ANSWERS]
    r = different().write(PROMPTS, n=3, max_new_tokens=5, temperature=0.8, seed=7)
    assert [args[1] for args, _ in asked["continuation"]] == 2 * [[r.response_ids(3 * i) for i in range(8)]]
    assert [args[2] for args, _ in asked["continuation"]] == [[0.0], [3]]


def test_the_flags_have_the_defaults_of_the_functions():
    """What the command does where nothing is said is what the function does."""
    flags = vars(analysis.parse(["--student", "s", "--teacher", "t"]))
    for function in (analysis.diagnose_pair, analysis.positions, analysis.logit_gradients, Pair.encode, Pair.load):
        said = {name: x.default for name, x in inspect.signature(function).parameters.items() if name in flags}
        said = {name: default for name, default in said.items() if default is not inspect.Parameter.empty}
        assert said and said == {name: flags[name] for name in said}, function.__name__
    assert flags["out"] == "diagnose.json"


def test_without_arguments_the_command_line_is_read(monkeypatch):
    """As any program does, from parse and from main."""
    monkeypatch.setattr("sys.argv", ["analysis.py", *BOTH, "--k", "7"])
    assert analysis.parse().k == 7
    monkeypatch.setattr("sys.argv", ["analysis.py", "--k", "0"])
    with pytest.raises(SystemExit):
        analysis.main()


def test_the_flags_of_loading_and_of_the_pages_go_where_they_belong(files, monkeypatch, tmp_path, capsys):
    """Device, dtype and thinking to the pair; a few of the prompts to the page of tokens; runs to the pictures."""
    asked, load, encode = {}, Pair.load, Pair.encode
    monkeypatch.setattr(Pair, "load", lambda *names, **options: asked.update(options) or load(*names, **options))
    monkeypatch.setattr(Pair, "encode", lambda *args, **options: asked.update(options) or encode(*args, **options))
    monkeypatch.setattr(tokens, "write_page", lambda pair, rows, _, **options: asked.update(page=(len(rows), options)))
    monkeypatch.setattr(analysis, "diagnose_pair", lambda pair, rows, **_: asked.update(rows=len(rows)) or {})
    monkeypatch.setattr(analysis, "show", lambda _: "the table")
    analysis.main(["--student", f"{files}/student", "--teacher", f"{files}/teacher", "--count", "30", "--device", "cpu",
                   "--dtype", "bfloat16", "--thinking", "off", "--k", "3", "--max-new-tokens", "5", "--seed", "7",
                   "--max-prompt-tokens", "50", "--temperature", "0.5", "--tokens", str(tmp_path / "x.html"),
                   "--out", str(tmp_path / "x.json")])
    assert {name: asked[name] for name in ("device", "dtype", "thinking", "max_prompt_tokens", "new_tokens")} == dict(
        device="cpu", dtype="bfloat16", thinking="off", max_prompt_tokens=50, new_tokens=5)
    few, options = asked["page"]
    assert 1 < few < asked["rows"] == 30 and options == dict(k=3, max_new_tokens=5, temperature=0.5, seed=7)
    assert str(tmp_path / "x.html") in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr(plot, "runs", lambda *args: asked.update(runs=args) or "drawn")
    assert analysis.main(["--run", str(tmp_path), "--plot", "x.svg", "--positions", "y.svg"]) == "drawn"
    assert asked["runs"] == ([str(tmp_path)], "x.svg", "y.svg")


def test_the_spread_of_the_reward_is_that_of_each_bucket():
    """From the 5th to the 95th of a hundred tokens, bucket by bucket, and as many are cut off as have no eos."""
    pair = different()
    got = analysis.diagnose_pair(pair, rows(False), k=3, n=6, max_new_tokens=31)
    r = pair.write(PROMPTS, n=6, max_new_tokens=31, seed=0)
    reward, b = analysis.positions(pair, r, 3)["reward"], got["by_position"]
    assert b["width"] == 2 and len(b["tokens"]) == len(b["reward_5_95"]) == analysis.BUCKETS
    for i, spread in enumerate(b["reward_5_95"]):
        inside = reward[:, 2 * i:2 * i + 2]
        inside = inside[~inside.isnan()]
        assert spread == pytest.approx([inside.quantile(0.05).item(), inside.quantile(0.95).item()], rel=1e-5)
    assert got["truncated_fraction"] == r.truncated.double().mean().item() and 0 < got["truncated_fraction"] < 1


def test_some_answers_are_enough():
    """Prompts without an answer count in the metrics and not in what is right."""
    pair, found = different(), []
    r = pair.write(PROMPTS, n=8, max_new_tokens=LENGTH, seed=0)
    texts = [pair.tokenizer.decode(r.response_ids(i), skip_special_tokens=True) for i in range(64)]
    right = [analysis.same_answer(analysis.read_answer(text), ANSWERS[i // 8]) for i, text in enumerate(texts)]
    for kept in ([0, 1, 2, 3], [3, 4, 5, 6, 7], [1, 4, 6]):
        some = [{**row, "answer": row["answer"] if i in kept else None} for i, row in enumerate(rows())]
        found.append(analysis.diagnose_pair(pair, some, **{**SMALL, "n": 8}))
        assert found[-1]["right"] == sum(sum(right[8 * i:8 * i + 8]) for i in kept)
    assert found[0]["metrics"] == found[1]["metrics"] and any(x["right"] for x in found)


def test_a_teacher_that_is_the_student_has_nothing_new():
    """Every distance exactly 0, overlap 1 (trl#6480), and the verdict says so."""
    got = analysis.diagnose_pair(equal(), rows(), **SMALL)
    distances = ("reverse_kl", "entropy_gap", "reward", "overlap_token_advantage")
    metrics = got["metrics"]
    assert {metrics[name]["mean"] for name in distances} == {0.0} and metrics["overlap_ratio"]["mean"] == 1.0
    assert metrics["overlap_mass_student"] == metrics["overlap_mass_teacher"]
    assert got["predicted_gain"]["mean"] == 0 and got["auroc"] in (None, 0.5) and got["verdict"] == NOTHING_NEW


@pytest.mark.parametrize("own, depths", [(False, 1), (True, 3)])
def test_where_nobody_solves_anything_deeper_cuts_are_not_tried(monkeypatch, own, depths):
    """6.1 on problems beyond both says nothing, and costs most of the time; one right response and it is worth it."""
    asked = []

    def answered(model, tokenizer, prompts, answers, *, starts, n, **_):
        asked.append(starts)
        return torch.zeros(len(prompts), n, dtype=torch.bool), None
    monkeypatch.setattr(analysis, "answered", answered)
    monkeypatch.setattr(analysis, "same_answer", lambda *_: own)
    got = analysis.diagnose_pair(different(), rows(), **SMALL, depths=(0.0, 0.25, 0.5))
    assert [c["depth"] for c in got["continuation"]] == [0.0, 0.25, 0.5][:depths] and len(asked) == 2 * depths
    assert any("neither solved a single one" in reason for reason in got["reasons"])


def test_the_report_tells_student_from_teacher_and_errors_are_over_prompts(monkeypatch):
    """A student that solves what no teacher does is worth deeper cuts; the predicted gain is each prompt's mean over
    the depths, its error that of the mean over prompts."""
    pair, generator, gains = different(), torch.Generator().manual_seed(0), []

    def answered(model, tokenizer, prompts, answers, *, n, **_):
        made = torch.zeros(len(prompts), n) if model is pair.teacher else torch.randint(
            2, (len(prompts), n), generator=generator).float()
        if model is pair.student:
            gains.append(-made.double().mean(1))
        return made, None
    monkeypatch.setattr(analysis, "answered", answered)
    monkeypatch.setattr(analysis, "same_answer", lambda *_: False)
    got = analysis.diagnose_pair(pair, rows(), **SMALL, depths=(0.0, 0.25, 0.5))
    assert [(c["student"], c["teacher"]["mean"], c["gain"]) for c in got["continuation"]] == [
        (analysis.estimate(-gain), 0, analysis.estimate(gain)) for gain in gains] and len(gains) == 3
    assert got["predicted_gain"] == pytest.approx(analysis.estimate(torch.stack(gains).mean(0)))


def test_a_diagnosis_is_made_on_the_device_of_the_pair():
    """Where the default device is another one, which holds no numbers, the report is the same."""
    here = analysis.diagnose_pair(different(), rows(False), **SMALL)
    pair = different()
    r = pair.write(PROMPTS, n=2, max_new_tokens=LENGTH, seed=0)
    pair.write = lambda *_, **__: r
    with torch.device("meta"):
        there = analysis.diagnose_pair(pair, rows(False), **SMALL)
    assert there == here


def test_the_same_seed_gives_the_same_report():
    """A diagnosis can be repeated; another seed samples other responses."""
    one, again, other = (analysis.diagnose_pair(different(), rows(), **SMALL, seed=seed) for seed in (0, 0, 1))
    assert one == again and one["metrics"] != other["metrics"]


@pytest.mark.parametrize("answers", [True, False])
def test_the_table_shows_every_metric_and_the_verdict(answers):
    """What is in diagnose.json can be read off the screen."""
    got = analysis.diagnose_pair(different(), rows(answers), **SMALL)
    text = analysis.show(got)
    for x in got["metrics"].values():
        assert f"{x['mean']:9.4f} +- {x['standard_error']:.4f}" in text
    assert f"verdict: {got['verdict']}" in text and all(reason in text for reason in got["reasons"])
    b = got["by_position"]
    assert all(f"{tokens:8d} {reward:9.3f}" in text for tokens, reward in zip(b["tokens"], b["reward"]))
    if answers:
        gains = [c["gain"] for c in got["continuation"]]
        assert all(f"{x['mean']:+9.3f} +- {x['standard_error']:.3f}" in text for x in gains)
        assert f"{got['auroc']:9.4f}" in text and f"{got['predicted_gain']['mean']:+8.3f}" in text
    got["metrics"]["overlap_token_advantage"] = {"mean": None, "standard_error": None}       # no token shared anywhere
    assert "none shared" in analysis.show(got)


def test_the_table_by_hand():
    """Every number stands in the row of its name and in the column of its heading."""
    at = lambda mean, error=0.25: {"mean": mean, "standard_error": error}                           # noqa: E731
    names = "overlap_ratio overlap_mass_student overlap_mass_teacher overlap_token_advantage entropy_student " \
            "entropy_teacher entropy_gap largest_gap reverse_kl reward".split()
    made = {"prompts": 3, "responses": 6, "response_length": 7.5, "truncated_fraction": 0.5, "k": 4, "verdict": "so",
            "reasons": ["one", "two"], "metrics": {name: at(i + 0.5) for i, name in enumerate(names)}, "right": 2,
            "auroc": 0.75, "predicted_gain": at(0.125, None),
            "continuation": [{"depth": 0.25, "tokens": 1.5, "student": at(0.1), "teacher": at(0.4), "gain": at(0.3)},
                             {"depth": 12, "tokens": 9.0, "student": at(0.2), "teacher": at(0.1),
                              "gain": at(-0.1, None)}],
            "by_position": {"width": 8, "tokens": [5, 0, 3], "reward": [-0.5, None, -1.5],
                            "reward_5_95": [[-2.0, 0.5], None, [-3.0, 0.25]], "overlap_ratio": [0.5, None, 0.75],
                            "entropy_student": [1.25, None, 1.5], "entropy_teacher": [1.0, None, 2.0]}}
    made["metrics"]["reward"]["standard_error"] = None                        # one prompt
    lines = analysis.show(made).split("\n")
    rows = [line.split() for line in lines]
    assert rows[0][:6] == "3 prompts, 6 responses of 7.5".split() and "50% cut off" in lines[0]
    assert [row[-3:] for row in rows[1:10]] == [[f"{i}.5000", "+-", "0.2500"] for i in range(9)]
    assert rows[10][-3:-1] == ["9.5000", "+-"] and not made_up(rows[10][-1])
    assert "k = 4" in lines[1] and all(("student" in lines[i], "teacher" in lines[i]) == sides for i, sides in (
        (2, (True, False)), (3, (False, True)), (5, (True, False)), (6, (False, True))))
    assert rows[11][-5:] == "0.7500 2 right, 4 not".split()
    assert rows[13][-3:] == ["student", "teacher", "gain"]
    assert rows[14] == "from 25% ( 1.5 tokens in) 0.100 0.400 +0.300 +- 0.250".split()
    assert rows[15][:-1] == "from 12 tokens ( 9.0 tokens in) 0.200 0.100 -0.100 +-".split()
    assert not made_up(rows[15][-1])
    assert rows[16][:-1] == "mean over these depths +0.125 +-".split() and not made_up(rows[16][-1]) and not rows[17]
    assert rows[18][:4] == ["position", "tokens", "reward", "5"] and rows[18][-4:] == "H student H teacher".split()
    assert rows[19] == "0-7 5 -0.500 -2.00 .. 0.50 0.500 1.250 1.000".split()
    assert rows[20] == "16-23 3 -1.500 -3.00 .. 0.25 0.750 1.500 2.000".split() and not rows[21]     # 8-15 holds none
    assert lines[22:] == ["verdict: so", "  - one", "  - two"]
    assert "not defined" in analysis.show({**made, "auroc": None})


# --- the command line ----------------------------------------------------------------------------------------------


def command(files, *more):
    return ["--student", f"{files}/student", "--teacher", f"{files}/teacher", "--prompts", f"{files}/prompts.jsonl",
            *more]


def test_the_command_writes_the_report_with_its_origin_and_prints_the_table(files, tmp_path, capsys):
    """diagnose.json holds the numbers of the table and what made them: command, commit, versions."""
    out = tmp_path / "diagnose.json"
    analysis.main(command(files, "--k", "3", "--max-new-tokens", "6", "--count", "5", "--out", str(out)))
    written = json.loads(out.read_text())
    assert analysis.show(written) in capsys.readouterr().out and list(tmp_path.iterdir()) == [out]
    assert {"command", "commit", "python", "torch", "transformers", "threads", "verdict", "metrics"} <= written.keys()
    assert (written["prompts"], written["student"], written["torch"]) == (5, f"{files}/student", torch.__version__)


def test_the_command_is_the_function_on_the_first_prompts_of_a_shuffled_file(files, tmp_path):
    """--seed shuffles the file and fixes all sampling, --count cuts it, and every other number goes to the function."""
    numbers = dict(k=3, n=3, max_new_tokens=5, temperature=0.9, eval_temperature=0.5, eval_top_p=0.8, finishes=3,
                   seed=4, micro_batch_tokens=64)
    out = tmp_path / "diagnose.json"
    analysis.main(command(files, "--count", "5", "--out", str(out), *itertools.chain.from_iterable(
        (f"--{name.replace('_', '-')}", str(x)) for name, x in numbers.items())))
    lines = (files / "prompts.jsonl").read_text().splitlines()
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(4)).tolist()
    pair = Pair.load(f"{files}/student", f"{files}/teacher")
    encoded = pair.encode([json.loads(lines[i]) for i in order[:5]], max_prompt_tokens=1024, new_tokens=5)
    expected = analysis.diagnose_pair(pair, encoded, **numbers)
    written = json.loads(out.read_text())
    assert {name: written[name] for name in expected} == expected
    assert (written["teacher"], written["processes"]) == (f"{files}/teacher", 1)


@pytest.mark.parametrize("flags, says", [
    (["--propmts", "x"], "did you mean --prompts"),
    (["--stud", "x"], "unknown flag --stud"),
    (["--prompts", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--n", "0"], "--n 0: must be at least 1"),
    (["--k", "many"], "--k"),
    (["--temperature", "0"], "--temperature"),
    (["--eval-top-p", "1.5"], "--eval-top-p"),
    (["--out", "no/such/folder/diagnose.json"], "its folder does not exist"),
    (["--tokens", "no/such/folder/out.html"], "its folder does not exist"),
    (["--template", "latex"], "latex"),
    (["--run", "runs/x"], "give either"), (["--plot", "f.svg"], "--plot and --positions go with --run"),
])
def test_a_diagnosis_that_cannot_work_is_one_line_and_no_model_is_loaded(flags, says, capsys, tmp_path, monkeypatch):
    """prime-rl#1458: exit code 2, one line with the flag, no file left behind."""
    refused(["--student", "s", "--teacher", "t", *flags], says, capsys, tmp_path, monkeypatch)


@pytest.mark.parametrize("flags, says", [
    (["--student", "s"], "--teacher is missing"), (["--teacher", "t"], "--student is missing"),
    ([], "give either"), (["--run", "."], "no metrics.jsonl there"),
])
def test_half_a_command_is_one_line_too(flags, says, capsys, tmp_path, monkeypatch):
    """A pair without its other half, and a run that is none."""
    refused(flags, says, capsys, tmp_path, monkeypatch)


BOTH = ["--student", "s", "--teacher", "t"]


@pytest.mark.parametrize("flags, right", [
    *((BOTH + [f"--{name}", str(least - wrong)], not wrong) for wrong in (0, 1) for name, least in (
        ("count", 1), ("n", 1), ("max-new-tokens", 1), ("max-prompt-tokens", 1), ("finishes", 1), ("k", 1),
        ("micro-batch-tokens", 1))),
    (BOTH + ["--temperature", "1e-3"], True), (BOTH + ["--temperature", "0"], False),
    (BOTH + ["--temperature", "-1"], False), (BOTH + ["--eval-temperature", "0"], True),
    (BOTH + ["--eval-temperature", "-0.001"], False), (BOTH + ["--eval-top-p", "0"], False),
    (BOTH + ["--eval-top-p", "1e-3"], True), (BOTH + ["--eval-top-p", "1"], True),
    (BOTH + ["--eval-top-p", "1.001"], False),
    (BOTH, True), (BOTH[:2], False), (BOTH[2:], False), (BOTH + ["--run", "run"], False), (["--run", "run"], True),
    (BOTH[:2] + ["--run", "run"], False), (BOTH[2:] + ["--run", "run"], False), ([], False),
    (["--run", "run", "--run", "run"], True), (["--run", "run", "--run", "other"], False),
    (["--run", "run", "--tokens", "x.html"], False), (BOTH + ["--tokens", "x.html"], True),
    (["--run", "run", "--plot", "x.svg"], True), (["--run", "run", "--positions", "x.svg"], True),
    (BOTH + ["--plot", "x.svg"], False), (BOTH + ["--positions", "x.svg"], False),
    (["--run", "run", "--plot", "no/x.svg"], False), (["--run", "run", "--positions", "no/x.svg"], False),
    (BOTH + ["--prompts", "run/metrics.jsonl"], True), (BOTH + ["--prompts", "run"], False),
    (BOTH + ["--thinking", "off"], True), (BOTH + ["--thinking", "maybe"], False),
    (BOTH + ["--dtype", "bfloat16"], True), (BOTH + ["--dtype", "float8"], False), (BOTH + ["--stu", "s"], False),
], ids=lambda x: " ".join(x).removeprefix(" ".join(BOTH)) if isinstance(x, list) else str(x))
def test_flags_at_each_border(flags, right, capsys, tmp_path, monkeypatch):
    """What cannot work is refused before anything is loaded, and what can work is not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir(), (tmp_path / "run" / "metrics.jsonl").touch()
    with contextlib.nullcontext() if right else pytest.raises(SystemExit) as stop:
        analysis.parse(flags)
    assert right or stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def refused(flags, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(analysis.Pair, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        analysis.main(flags)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and says in printed and printed.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--k", "12"], ["--device", "gpu"]])
def test_what_only_the_models_can_tell_is_one_line_all_the_same(files, flags, capsys, tmp_path, monkeypatch):
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
    monkeypatch.setattr(torch, "searchsorted", lambda mass, *rest, **options: kept.append(
        mass.diff(prepend=torch.zeros(len(mass), 1)) > 0) or searchsorted(mass, *rest, **options))
    flat = torch.linspace(0, 0.2, 5000)[torch.randperm(5000, generator=generator)].log_softmax(-1)
    sharp = flat.index_fill(0, torch.tensor(7), 20.0).log_softmax(-1)
    p, order = flat.double().exp().sort(descending=True)
    size = int((p.cumsum(-1) - p < top_p).sum())                              # of the smallest set, by a full sort
    assert least < size < 5000
    u = torch.rand(401, dtype=torch.float64, generator=generator)
    y = draw(torch.stack([sharp] + [flat] * 400), u, top_p)
    assert y[0] == 7 and kept[0].sum(-1).tolist() == [1] + [size] * 400
    ranks = order.argsort()[y[1:]]                                                           # (400,) token -> rank
    assert ranks.max() < size
    counts = torch.histc(ranks.double(), bins=2, min=0, max=size) / len(ranks)
    torch.testing.assert_close(counts, torch.full((2,), 0.5).double(), rtol=0, atol=0.08)    # each half as often
