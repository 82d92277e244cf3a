"""A pair before training (second half of analysis.py; paper 4 and 6): where the two models part,
who finishes the student's responses better, the verdict, the command."""

import dataclasses
import inspect
import itertools
import json
import math

import pytest
import torch
from conftest import tiny, word_tokenizer, write_lines

import analysis
from analysis import (
    ALIKE,
    DEPTHS,
    GAIN,
    HARMFUL,
    INCOMPATIBLE,
    LEAD,
    NOTHING_NEW,
    SHARE,
    SHOULD_WORK,
    UNDECIDED,
    VERDICTS,
    auroc,
    continuation,
    diagnose,
    diagnose_pair,
    estimate,
    judged,
    plus_minus,
    sure,
    verdict,
    worst_bucket,
)
from plumbing import figures, measure, page, prompts, show
from plumbing.answers import answered, read_answer, same_answer
from plumbing.flags import Config, Diagnosis, depths_of, parse_analysis
from plumbing.models import load_pair
from rollout import rollout, seed_of
from teacher import UserError, grade, make_pair

WORDS = "[PAD] [BOS] [EOS] [UNK] add the so + \\boxed{3} \\boxed{7} \\boxed{0}".split()
EOS = 2
BOXES = {"3": 8, "7": 9, "0": 10}  # a box is one token: tiny models are right now and then
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
METRICS = (
    "reverse_kl overlap_ratio overlap_mass_student overlap_mass_teacher overlap_token_advantage "
    "entropy_gap largest_gap entropy_student entropy_teacher reward distance_left "
    "end_mass_student end_mass_teacher"
).split()


def pair_of(student, teacher, **settings):
    return make_pair(student, teacher, word_tokenizer(WORDS), word_tokenizer(WORDS), **settings)


def different(**settings):
    """A student, and a wider, deeper teacher with padded rows of its head."""
    student = tiny("llama", vocab_size=len(WORDS))
    teacher = tiny("llama", seed=1, vocab_size=len(WORDS) + 3, hidden=48, layers=3)
    return pair_of(student, teacher, **settings)


def equal():
    return pair_of(tiny("llama", vocab_size=len(WORDS)), tiny("llama", vocab_size=len(WORDS)))


def rows(answers=ANSWERS):
    """The prompts with their ids and these answers."""
    return [{"prompt": "", "ids": ids, "answer": a} for ids, a in zip(PROMPTS, answers)]


def written(pair, n=2, max_new_tokens=LENGTH, seed=0, **how):
    """The student's responses to PROMPTS, those of a diagnosis with this seed."""
    seeds = [seed_of(seed, "diagnosis", i) for i in range(len(PROMPTS))]
    return rollout(
        pair.student,
        PROMPTS,
        n=n,
        max_new_tokens=max_new_tokens,
        seeds=seeds,
        **pair.sampling,
        **how,
    )


def responses(r):
    return [r.response_ids(row) for row in range(len(r.ids))]


def is_right(ids, answer):
    """Is a response right, judged by its words?"""
    text = " ".join(WORDS[i] for i in ids if i > 3)
    return same_answer(read_answer(text), answer)


def measured(pair, r, k=3, **temperatures):
    """Eq. 6 to 10 at every token of a rollout: {name: (B, T)}."""
    return grade(pair, r, lambda *states: diagnose(*states, k, pair.eos_ids), **temperatures)


# --- where they part ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, teacher_temperature", [(1.0, 1.0), (0.7, 2.0)])
def test_the_metrics_are_those_of_the_plain_logits(temperature, teacher_temperature):
    """Eq. 6 to 10 at each response token are those of all logits without padding. Elsewhere stands
    NaN (nano-opd averaged over padding)."""
    pair = different()
    r = written(pair)
    assert not r.response_mask.all()
    temperatures = {"temperature": temperature, "teacher_temperature": teacher_temperature}
    grid = measured(pair, r, **temperatures)
    for name, x in grid.items():
        assert x.shape == r.response_mask.shape
        assert x[~r.response_mask].isnan().all()
        assert name == "overlap_token_advantage" or not x[r.response_mask].isnan().any()
    for row, response in enumerate(responses(r)):
        ids = r.ids[row][r.attention_mask[row]].unsqueeze(0)  # (1, L)
        log_p = []
        for model, T in ((pair.student, temperature), (pair.teacher, teacher_temperature)):
            logits = model(input_ids=ids).logits[0, -len(response) - 1 : -1, : len(WORDS)]
            log_p.append(logits.div(T).log_softmax(-1))
        plain = diagnose(*log_p, torch.tensor(response), 3, pair.eos_ids)
        ours = {name: x[row, : len(response)] for name, x in grid.items()}
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_the_metrics_see_neither_micro_batches_nor_padding():
    """trl#6006, nano-opd: the numbers are the same for any budget and any padding."""
    pair = different()
    r = written(pair)
    found = measured(pair, r)
    for budget in (1, 30):
        other = measured(dataclasses.replace(pair, micro_batch_tokens=budget), r)
        torch.testing.assert_close(other, found, rtol=1e-4, atol=1e-5, equal_nan=True)
    ids = torch.where(r.attention_mask, r.ids, 7)
    other = measured(pair, dataclasses.replace(r, ids=ids))
    torch.testing.assert_close(other, found, rtol=0, atol=0, equal_nan=True)


def test_the_buckets_of_a_training_step_add_up_to_its_means():
    """Fig. 13 and Fig. 6 are one measurement: the buckets, weighted by their tokens, give the
    metrics that are logged."""
    import opd

    pair = different()
    r = written(pair, n=3, max_new_tokens=20)
    means = measure.Means(20, pair.device)
    per_position = opd.loss_and_metrics(Config(k=3), pair.eos_ids)
    for part in measure.micro_batches(r, 30):
        means.add(measure.values_of(pair, part, per_position), part)
    row = means.means(r)
    b = row["by_position"]
    assert b["width"] == 2  # 20 tokens in 16 buckets, rounded up
    assert sum(b["tokens"]) == row["tokens"] == r.response_mask.sum()
    for name in analysis.BY_POSITION:
        total = sum(tokens * x for tokens, x in zip(b["tokens"], b[name]))
        assert total / row["tokens"] == pytest.approx(row[name], abs=2e-5)


# --- 6.1 continuation ---------------------------------------------------------------------------


def continued(pair, depth, n=8, **how):
    given = responses(written(pair, n=1, seed=5))
    how = {"max_new_tokens": LENGTH, "temperature": 1.0, "top_p": 1.0, "seed": 3, **how}
    return continuation(pair, rows(), given, depth, answered=answered, n=n, **how)


def test_continuation_at_depth_0_is_plain_accuracy():
    """6.1: with nothing written each model answers alone, with the random numbers of an evaluation
    of that seed."""
    pair = different()
    found = continued(pair, 0.0)
    cfg = Config(seed=3, eval_n=8, max_new_tokens=LENGTH, eval_temperature=1.0, eval_top_p=1.0)
    for who, model in (("student", pair.student), ("teacher", pair.teacher)):
        alone = measure.accuracy(cfg, pair, rows(), model)
        assert found[who].tolist() == [count / 8 for count in alone["each"]]
    assert found["tokens"] == 0
    assert not torch.equal(found["student"], found["teacher"])


def test_continuation_at_depth_1_leaves_nothing_to_gain():
    """6.1: at the end of its responses both have what the student wrote, right or wrong."""
    pair = different()
    given = responses(written(pair, n=1, seed=5))
    right = [float(is_right(ids, answer)) for ids, answer in zip(given, ANSWERS)]
    found = continued(pair, 1.0)
    assert 0 < sum(right) < 8
    assert found["student"].tolist() == found["teacher"].tolist() == right
    assert found["tokens"] == sum(map(len, given)) / 8


@pytest.mark.parametrize(
    "depth, cuts",
    [
        (0.5, [0, 1, 1, 2, 2, 3, 1, 0]),
        (2, [1, 2, 2, 2, 2, 2, 2, 1]),
        (1.0, [1, 2, 3, 4, 5, 6, 2, 1]),
        (9, [1, 2, 3, 4, 5, 6, 2, 1]),
    ],
)
def test_a_depth_is_a_share_or_a_count_of_tokens(depth, cuts):
    """An int is a count of tokens, as 6.1 cuts at 1K, 4K, ...; a float is a share of each response.
    Both models begin from the same starts and are asked the same way."""
    pair = different()
    given = [list(range(length)) for length in (1, 2, 3, 4, 5, 6, 2, 1)]
    calls = []

    def note(pair, rows, *, model, n, **how):
        calls.append((model, rows, n, how))
        return torch.zeros(len(rows), n), None

    found = continuation(pair, rows(), given, depth, answered=note, n=3, top_p=0.6, seed=7)
    starts = [response[:cut] for response, cut in zip(given, cuts)]
    how = {"starts": starts, "top_p": 0.6, "seed": 7}
    assert calls == [(pair.student, rows(), 3, how), (pair.teacher, rows(), 3, how)]
    assert found["tokens"] == sum(cuts) / 8


def test_the_depths_share_a_response_out_evenly():
    """6.1: they begin with plain accuracy and go in equal steps, short of the end."""
    assert DEPTHS == tuple(i / len(DEPTHS) for i in range(len(DEPTHS)))
    assert inspect.signature(diagnose_pair).parameters["depths"].default is DEPTHS


@pytest.mark.parametrize("depth", [*DEPTHS, 2])
def test_a_teacher_that_is_the_student_gains_nothing_anywhere(depth):
    """Both draw with the same numbers: the difference is not small but 0."""
    found = continued(equal(), depth, n=4)
    assert found["student"].any() and torch.equal(found["student"], found["teacher"])


def test_both_models_finish_a_response_in_the_dtype_of_the_computation():
    """If a run computes in bfloat16, a student that finishes in float32 is not the one that is
    trained."""
    pair = different(dtype=torch.bfloat16)
    seen = {"student": set(), "teacher": set()}
    for name, dtypes in seen.items():
        head = getattr(pair, name).get_output_embeddings()
        head.register_forward_hook(lambda _, args, out, dtypes=dtypes: dtypes.add(out.dtype))
    continuation(
        pair, rows(), [[7, 7]] * 8, 0.5, answered=answered, n=1, max_new_tokens=LENGTH, seed=3
    )
    assert seen == {"student": {torch.bfloat16}, "teacher": {torch.bfloat16}}


def test_finished_responses_are_judged_as_they_stand():
    """Each row has n finished responses; each is judged, and nothing is written."""
    pair = different()
    r = written(pair, n=3)
    each = [[r.response_ids(3 * i + j) for j in range(3)] for i in range(8)]
    pair.student = pair.teacher = None
    pair.student = torch.nn.Linear(1, 1)  # answers nothing
    right = judged(pair, rows(), each, answered)
    for i, j in itertools.product(range(8), range(3)):
        assert right[i, j] == is_right(each[i][j], ANSWERS[i])
    assert right.any() and not right.all()


# --- the verdict --------------------------------------------------------------------------------


def report(
    *,
    overlap=0.7,
    kl=0.3,
    alone=(0.2, 0.01),
    greedy=(0.2, 0.01),
    gain=(0.1, 0.01),
    student=0.3,
    answers=True,
    cut=0.0,
    k=16,
):
    """What `verdict` reads, made by hand.

    alone, greedy and gain: (mean, standard error) of teacher - student.
    """

    def of(mean, error=0.01):
        return {"mean": mean, "standard_error": error}

    made = {
        "prompts": 24,
        "k": k,
        "truncated_fraction": cut,
        "metrics": {"reverse_kl": of(kl)},
        "first_tokens": {"overlap_ratio": of(overlap)},
    }
    if answers:
        first = {"student": of(student), "teacher": of(student + alone[0]), "gain": of(*alone)}
        made["continuation"] = [{"depth": 0.0, "tokens": 0.0, **first}]
        at_0 = {"student": of(student), "teacher": of(student + greedy[0])}
        made["greedy"] = {**at_0, "gain": of(*greedy), "prompts": 24}
        made["predicted_gain"] = of(*gain)
    return made


UNSURE_BELOW = ALIKE - 0.0199  # within two errors of .01
SURELY_BELOW = ALIKE - 0.0201
UNSURE_ABOVE = ALIKE + 0.0199
SURELY_ABOVE = ALIKE + 0.0201
NOBODY = {"student": 0.0, "alone": (0.0, 0.04), "greedy": (0.0, 0.04)}  # solved any
BORDERS = [
    ({}, SHOULD_WORK),  # alike, knows more, and is better where the student is
    ({"overlap": SURELY_ABOVE}, SHOULD_WORK),
    ({"overlap": UNSURE_ABOVE}, UNDECIDED),
    ({"overlap": UNSURE_BELOW}, UNDECIDED),
    ({"overlap": SURELY_BELOW}, INCOMPATIBLE),
    ({"overlap": UNSURE_BELOW, "answers": False}, UNDECIDED),
    ({"overlap": SURELY_BELOW, "answers": False}, INCOMPATIBLE),
    ({"answers": False}, UNDECIDED),
    ({"gain": (0.020001, 0.01)}, SHOULD_WORK),
    ({"gain": (0.02, 0.01)}, UNDECIDED),
    ({"gain": (0.0, 0.01)}, UNDECIDED),  # it knows more, but not where the student is
    ({"gain": (-0.02, 0.01)}, UNDECIDED),
    ({"gain": (-0.020001, 0.01)}, HARMFUL),  # better alone, worse where the student is
    ({"gain": (-0.1, 0.01), "overlap": SURELY_BELOW}, INCOMPATIBLE),
    ({"alone": (0.0, 0.01)}, SHOULD_WORK),  # the student's states are what counts
    ({"alone": (-0.02, 0.01)}, SHOULD_WORK),
    ({"alone": (-0.020001, 0.01)}, HARMFUL),
    ({"alone": (-0.2, 0.01), "overlap": 0.3}, HARMFUL),  # 3.3 comes before 3.1
    ({"overlap": 0.3, "k": 8}, UNDECIDED),  # the bound is one for k = 16
    ({"alone": (-0.2, 0.01), "k": 8}, HARMFUL),
    ({"greedy": (-0.020001, 0.01)}, HARMFUL),
    ({"greedy": (-0.02, 0.01)}, NOTHING_NEW),  # it samples more sharply, and knows no more
    ({"greedy": (0.0799, 0.01)}, NOTHING_NEW),
    ({"greedy": (0.0801, 0.01)}, SHOULD_WORK),
    ({"greedy": (0.1, 0.0501)}, UNDECIDED),
    ({"greedy": (0.0, 0.0499), "gain": (0.0, 0.5)}, NOTHING_NEW),  # nothing to know
    ({"greedy": (0.0, 0.0501), "gain": (0.0, 0.01)}, UNDECIDED),  # too few prompts to say so
    ({"greedy": (0.0, 0.01), "overlap": 0.3}, INCOMPATIBLE),
    ({"kl": 9e-7}, NOTHING_NEW),
    ({"kl": 9e-7, "answers": False}, NOTHING_NEW),
    ({"kl": 1e-6}, SHOULD_WORK),
    ({"alone": (0.0, None), "greedy": (1.0, None), "gain": (1.0, None)}, UNDECIDED),  # one prompt
    ({**NOBODY, "gain": (0.0, 0.04)}, UNDECIDED),
    ({**NOBODY, "overlap": 0.3}, INCOMPATIBLE),
]


@pytest.mark.parametrize("change, expected", BORDERS, ids=str)
def test_a_verdict_at_each_border(change, expected):
    """3.1 to 3.3: harm comes first. The overlap is held against ALIKE, gains against two standard
    errors, the greedy lead against LEAD."""
    found, reasons = verdict(report(**change))
    assert found == expected and reasons


def test_every_verdict_is_one_of_the_five_and_has_reasons():
    """Each of the five can come out."""
    leads = (-0.4, 0.0, 0.3)
    found = set()
    for overlap, alone, greedy, gain, error, answers in itertools.product(
        (0.25, 0.95), leads, leads, leads, (0.01, 0.3), (True, False)
    ):
        name, reasons = verdict(
            report(
                overlap=overlap,
                alone=(alone, error),
                greedy=(greedy, error),
                gain=(gain, error),
                answers=answers,
            )
        )
        found.add(name)
        assert reasons and all(isinstance(reason, str) for reason in reasons)
    assert found == set(VERDICTS) and len(VERDICTS) == 5


@pytest.mark.parametrize("x", [(0.2, 0.09), (0.2, 0.11), (0.05, 0.01), (0.2, None)])
def test_what_is_promised_or_denied_is_outside_two_standard_errors(x):
    """A lead surely below LEAD is "nothing new"; else one surely above 0 is "should work"."""
    found, _ = verdict(report(greedy=x, gain=x))
    mean, error = x
    sure_lead = error is not None and mean - 2 * error > 0
    sure_none = error is not None and mean + 2 * error < LEAD
    assert (found == NOTHING_NEW) == sure_none
    assert (found == SHOULD_WORK) == (sure_lead and not sure_none)


@pytest.mark.parametrize(
    "change, said, words",
    [
        ({"cut": 0.9}, True, "higher --max-new-tokens"),
        ({"cut": 0.5}, False, "higher --max-new-tokens"),
        (NOBODY, True, "neither solved"),
        ({**NOBODY, "student": 0.1}, False, "neither solved"),
        ({**NOBODY, "alone": (0.1, 0.01)}, False, "neither solved"),
        ({**NOBODY, "greedy": (0.5, 0.05)}, False, "neither solved"),  # greedily the teacher did
        ({"gain": (0.05, 0.1)}, True, "take more (--count)"),
        ({"greedy": (0.0, 0.01)}, True, "samples more sharply"),
        ({"greedy": (0.0, 0.01), "gain": (0.0, 0.01)}, False, "samples more sharply"),
        ({"answers": False}, True, "without answers"),
        ({"overlap": 0.3}, True, "less than 0.55 are shared"),
    ],
    ids=str,
)
def test_the_reasons_say_what_decided_and_what_would_mend_a_diagnosis(change, said, words):
    """They name responses cut off, prompts beyond both, too few prompts, a sharper teacher."""
    assert any(words in reason for reason in verdict(report(**change))[1]) == said


def test_the_default_number_of_prompts_tells_a_lead_of_a_fifth():
    """By simulation: the student's chances are drawn from Beta(.8, 1.2), the teacher's are .2
    higher on average, and each model writes two endings. Such a lead is seen 9 times in 10, with
    24 prompts half of the time. Without a lead one is seen 1 time in 20."""
    count = parse_analysis(["--student", "s", "--teacher", "t"]).count

    def told(prompts, lead):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            student = torch.distributions.Beta(0.8, 1.2).sample((500, prompts))
            teacher = student + (1 - student) * lead / 0.6
            right = torch.distributions.Binomial(2, teacher).sample() / 2
            right -= torch.distributions.Binomial(2, student).sample() / 2
        return sum(sure(estimate(gains, GAIN)) > 0 for gains in right) / 500

    assert told(count, 0.2) >= 0.9
    assert 0.4 < told(24, 0.2) < 0.65
    assert told(count, 0.0) < 0.05


# --- a whole diagnosis --------------------------------------------------------------------------


def diagnosed(pair, given=None, **change):
    how = {"answered": answered, "k": 3, "n": 2, "max_new_tokens": LENGTH, **change}
    return diagnose_pair(pair, given or rows(), **how)


NO_ANSWERS = [None] * 8
PARTS = (
    "prompts responses k temperature eval_temperature eval_top_p response_length "
    "truncated_fraction metrics first_tokens worst_bucket by_position sampling_mismatch verdict "
    "reasons"
).split()
WITH_ANSWERS = ["auroc", "right", "wrong", "greedy", "continuation", "predicted_gain"]


def test_a_diagnosis_is_means_over_tokens_then_over_prompts():
    """Without answers, what needs them is left out. There is no NaN in it."""
    pair = different()
    found = diagnosed(pair, rows(NO_ANSWERS))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert sorted(found) == sorted(PARTS) and sorted(found["metrics"]) == sorted(METRICS)
    assert (found["prompts"], found["responses"], found["k"]) == (8, 16, 3)
    r = written(pair)
    grid = measured(pair, r)
    for name in METRICS:
        prompts = []
        for i in range(8):
            of_prompt = grid[name][2 * i : 2 * i + 2]
            prompts.append(of_prompt[r.response_mask[2 * i : 2 * i + 2]].nanmean())
        expected = estimate(torch.stack(prompts))
        assert found["metrics"][name] == pytest.approx(expected, rel=1e-5), name
    assert found["response_length"] == r.response_mask.sum().item() / 16
    assert 0 < found["truncated_fraction"] == r.truncated.sum().item() / 16 < 1
    assert found["by_position"]["tokens"] == r.response_mask.sum(0).tolist()
    assert found["sampling_mismatch"] < 1e-4
    assert found["verdict"] in VERDICTS


def test_a_diagnosis_with_answers_says_who_is_right_and_who_gains():
    """6.1, 6.2: it has the AUROC of the responses' mean rewards, and the gain at each depth."""
    pair = different()
    found = diagnosed(pair)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert sorted(found) == sorted(PARTS + WITH_ANSWERS)
    r = written(pair)
    right = [is_right(ids, ANSWERS[i // 2]) for i, ids in enumerate(responses(r))]
    rewards = measured(pair, r)["reward"].nanmean(1)
    assert 0 < found["right"] == sum(right) == 16 - found["wrong"]
    assert found["auroc"] == pytest.approx(auroc(rewards, torch.tensor(right)))
    assert [x["depth"] for x in found["continuation"]] == list(DEPTHS)
    gains = [x["gain"]["mean"] for x in found["continuation"]]
    assert found["predicted_gain"]["mean"] == pytest.approx(sum(gains) / len(gains))


def test_what_was_sampled_is_held_against_what_is_scored():
    """sampling_mismatch is the largest difference of the two log-probabilities of a token."""
    pair = different()

    def off(*args, **how):
        r = rollout(*args, **how)
        r.log_p[3, 0] += 0.5
        r.log_p[~r.response_mask] = 9
        return r

    found = diagnosed(pair, rows(NO_ANSWERS), rollout=off)
    assert found["sampling_mismatch"] == pytest.approx(0.5, abs=1e-4)


def test_a_diagnosis_has_its_means_bucket_by_bucket():
    """With 31 tokens at most there are 16 buckets of two positions."""
    pair = different()
    found = diagnosed(pair, rows(NO_ANSWERS), n=6, max_new_tokens=31)["by_position"]
    reward = measured(pair, written(pair, n=6, max_new_tokens=31))["reward"]
    assert found["width"] == 2 and len(found["reward"]) == analysis.BUCKETS
    for i, mean in enumerate(found["reward"]):
        expected = reward[:, 2 * i : 2 * i + 2].nanmean().item()
        assert mean == pytest.approx(expected, abs=1e-5)


def test_the_overlap_of_the_first_tokens_is_told_apart():
    """It is the mean over the first eight tokens of each response, and then over prompts."""
    pair = different()
    found = diagnosed(pair, rows(NO_ANSWERS), max_new_tokens=20)["first_tokens"]
    r = written(pair, max_new_tokens=20)
    assert r.response_mask.size(1) > 8
    grid = measured(pair, r)
    assert sorted(found) == sorted(analysis.SHARED)
    for name in found:
        prompts = []
        for i in range(8):
            prompts.append(grid[name][2 * i : 2 * i + 2, :8].nanmean())
        assert found[name] == pytest.approx(estimate(torch.stack(prompts)), rel=1e-5)


def test_the_worst_bucket_is_the_least_mean_of_enough_tokens():
    """Each metric has a worst bucket of its own. One with less than 2 % of the tokens does not
    count, and one without any has no mean."""
    by_position = {
        "tokens": [60, 0, 38, 2, 1],
        "overlap_ratio": [0.7, None, 0.6, 0.5, 0.1],
        "overlap_mass_student": [0.8, None, 0.9, 0.9, 0.1],
        "overlap_mass_teacher": [0.8, None, 0.9, 0.7, 0.1],
    }
    worst = {"overlap_ratio": 0.6, "overlap_mass_student": 0.8, "overlap_mass_teacher": 0.8}
    assert worst_bucket(by_position) == worst
    by_position["tokens"] = [60, 0, 37, 2, 1]
    worst = {"overlap_ratio": 0.5, "overlap_mass_student": 0.8, "overlap_mass_teacher": 0.7}
    assert worst_bucket(by_position) == worst
    found = diagnosed(different(), rows(NO_ANSWERS))
    assert found["worst_bucket"] == worst_bucket(found["by_position"])


def test_the_greedy_lead_is_the_likeliest_answer_of_each_model():
    """3.2: new knowledge is a lead in greedy accuracy, which sharper sampling cannot give."""
    pair = different()
    found = diagnosed(pair)["greedy"]
    right = {}
    for name, model in (("student", pair.student), ("teacher", pair.teacher)):
        r = rollout(model, PROMPTS, max_new_tokens=LENGTH, temperature=0.0, **pair.sampling)
        each = [is_right(ids, answer) for ids, answer in zip(responses(r), ANSWERS)]
        right[name] = torch.tensor(each).double()
        assert found[name] == estimate(right[name], SHARE)
    assert right["student"].any() or right["teacher"].any()
    assert found["gain"] == estimate(right["teacher"] - right["student"], GAIN)


@pytest.mark.parametrize("kept", [(0, 1, 2, 3), (3, 4, 5, 6, 7), (1, 4, 6)])
def test_some_answers_are_enough(kept):
    """Prompts without an answer count in the metrics, and not in what is right or in the AUROC of
    the mean rewards."""
    pair = different()
    some = [answer if i in kept else None for i, answer in enumerate(ANSWERS)]
    found = diagnosed(pair, rows(some), n=8)
    r = written(pair, n=8)
    places = [row for row in range(64) if row // 8 in kept]
    right = torch.tensor([is_right(r.response_ids(row), ANSWERS[row // 8]) for row in places])
    rewards = measured(pair, r)["reward"][places]
    assert found["right"] == right.sum() > 0
    assert found["wrong"] == (~right).sum()
    assert found["auroc"] == pytest.approx(auroc(rewards.nanmean(1), right))
    assert found["metrics"] == diagnosed(pair, rows(NO_ANSWERS), n=8)["metrics"]


def test_each_argument_of_a_diagnosis_goes_where_it_belongs(monkeypatch):
    """`temperature` is for the student's own responses and for measuring them; eval_temperature and
    eval_top_p are for the endings. Greedy answers have temperature 0."""
    pair = different()
    asked = {}
    made = []

    def note_rollout(model, prompts, **how):
        asked["rollout"] = (model, prompts, how)
        made.append(rollout(model, prompts, **how))
        return made[0]

    def note_grade(pair, r, per_position, **how):
        asked["grade"] = how
        return grade(pair, r, per_position, **how)

    endings = []

    def all_right(pair, rows, *, starts, model=None, n=1, max_new_tokens, **how):
        if model is not None:
            endings.append((model, starts, n, max_new_tokens, how))
        return torch.ones(len(rows), n, dtype=torch.bool), None

    monkeypatch.setattr(analysis, "grade", note_grade)
    found = diagnose_pair(
        pair,
        rows(),
        answered=all_right,
        rollout=note_rollout,
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
    seeds = [seed_of(7, "diagnosis", i) for i in range(8)]
    how = {"n": 3, "max_new_tokens": 5, "temperature": 0.8, "seeds": seeds, **pair.sampling}
    assert asked == {
        "rollout": (pair.student, PROMPTS, how),
        "grade": {"temperature": 0.8, "teacher_reads": made[0]},
    }
    first = responses(written(pair, n=3, max_new_tokens=5, temperature=0.8, seed=7))[::3]
    greedy = {"temperature": 0.0}
    expected = [(pair.student, [[]] * 8, 1, 5, greedy), (pair.teacher, [[]] * 8, 1, 5, greedy)]
    how = {"temperature": 0.3, "top_p": 0.6, "seed": 7}
    deep = [ids for ids in first if len(ids) > 3]
    assert 0 < len(deep) < 8
    for starts in ([[]] * len(deep), [ids[:3] for ids in deep]):
        for model in (pair.student, pair.teacher):
            expected.append((model, starts, 2, 5, how))
    assert endings == expected
    assert found["k"] == 4


def test_counts_of_tokens_are_asked_of_the_responses_that_are_longer():
    """6.1 cuts responses after 1K to 16K tokens. At each depth the same responses count: those that
    go on after the deepest cut. If depths are shares, all count."""
    pair = different()
    given = [list(range(length)) for length in (1, 2, 3, 4, 5, 6, 2, 1)]

    def note(pair, rows, *, starts, n, **how):
        return torch.ones(len(rows), n), None

    report, gain = analysis.gains(pair, rows(), given, (0.0, 2, 4), True, answered=note, n=1)
    assert [(cut["tokens"], cut["responses"]) for cut in report] == [(0, 2), (2, 2), (4, 2)]
    assert {cut["left_out"] for cut in report} == {6}
    assert gain["mean"] == 0
    report, _ = analysis.gains(pair, rows(), given, (0.0, 0.5), True, answered=note, n=1)
    assert [cut["responses"] for cut in report] == [8, 8]
    assert analysis.gains(pair, rows(), given, (0.0, 6), True, answered=note, n=1) == ([], None)


def test_responses_that_are_all_too_short_leave_it_undecided(monkeypatch):
    """What was measured is shown, and the verdict says which flag to lower."""
    monkeypatch.setattr(analysis, "gains", lambda *args, **how: ([], None))
    report = diagnosed(different())
    said = show.diagnosis(report)
    assert "greedy, from the start" in said and "mean of those at T 0.7" not in said
    report["first_tokens"]["overlap_ratio"] = {"mean": 0.7, "standard_error": 0.01}
    report["k"] = analysis.K_OF_ALIKE
    word, reasons = analysis.verdict(report)
    assert word == analysis.UNDECIDED
    assert reasons[-1] == "no response is longer than the deepest of --depths"
    report["greedy"]["gain"] = {"mean": -0.4, "standard_error": 0.05}
    assert analysis.verdict(report)[0] == analysis.HARMFUL  # it is behind, however short they are


@pytest.mark.parametrize(
    "depths, found",
    [
        ("0,0.25,0.5,0.75", (0.0, 0.25, 0.5, 0.75)),
        ("64", (0.0, 64)),
        ("0.5,1,127", (0.0, 0.5, 1, 127)),
        ("0.0,.5", (0.0, 0.5)),
    ],
)
def test_a_depth_with_a_point_is_a_share_and_the_start_is_always_there(depths, found):
    """Whole numbers count tokens, as in 6.1; our own depths are shares."""
    taken = depths_of(Diagnosis(depths=depths))
    assert taken == found
    assert list(map(type, taken)) == list(map(type, found))


@pytest.mark.parametrize("depths", ["", "a", "1.0", "-1", "128", "0.5,,", "nan", "0.5;3", "1e3."])
def test_other_depths_are_refused(depths):
    """At 128 tokens, which is --max-new-tokens, nothing would be left to finish."""
    with pytest.raises(UserError, match="--depths"):
        depths_of(Diagnosis(depths=depths))


def test_a_teacher_that_is_the_student_has_nothing_new():
    """Every distance is exactly 0 and the overlap is 1 (trl#6480), and the verdict says so."""
    found = diagnosed(equal())
    metrics = found["metrics"]
    for name in ("reverse_kl", "entropy_gap", "reward", "overlap_token_advantage", "largest_gap"):
        assert metrics[name]["mean"] == 0
    assert metrics["overlap_ratio"]["mean"] == 1
    assert metrics["overlap_mass_student"] == metrics["overlap_mass_teacher"]
    assert found["predicted_gain"]["mean"] == 0 and found["auroc"] in (None, 0.5)
    assert found["verdict"] == NOTHING_NEW


class Judge:
    """Stands for `answered`: each model is right with a chance of its own. It notes the endings."""

    def __init__(self, pair, student=0.0, teacher=0.0, own=0.0):
        self.generator = torch.Generator().manual_seed(0)
        self.chance = {id(pair.student): student, id(pair.teacher): teacher, id(None): own}
        self.shares = []  # (rows,) of each call for endings

    def __call__(self, pair, rows, *, model=None, n=1, **_):
        drawn = torch.rand(len(rows), n, generator=self.generator)
        right = drawn < self.chance[id(model)]
        if model is not None:
            self.shares.append(right.double().mean(1))
        return right, None


def test_deeper_cuts_are_not_tried_if_nobody_solves_anything():
    """6.1: on problems that neither model solves they say nothing, and cost most of the time."""
    pair = different()
    judge = Judge(pair)
    found = diagnosed(pair, answered=judge, depths=(0.0, 0.25, 0.5))
    assert len(found["continuation"]) == 1 and len(judge.shares) == 2 + 2  # the greedy ones, too
    assert any("neither solved" in reason for reason in found["reasons"])


@pytest.mark.parametrize("student, teacher", [(0.5, 0.0), (0.0, 0.5)])
def test_the_report_tells_student_from_teacher_and_errors_are_over_prompts(student, teacher):
    """Deeper cuts are tried if one of the two solves something. The predicted gain is the mean over
    depths and prompts, and its error is that over prompts."""
    pair = different()
    judge = Judge(pair, student=student, teacher=teacher)
    six = rows([*ANSWERS[:6], None, None])
    found = diagnosed(pair, six, answered=judge, depths=(0.0, 0.25, 0.5))
    gains = []
    for i, at in enumerate([found["greedy"], *found["continuation"]]):
        of_student = judge.shares[2 * i]
        of_teacher = judge.shares[2 * i + 1]
        gains.append(of_teacher - of_student)
        assert at["student"] == estimate(of_student, SHARE)
        assert at["teacher"] == estimate(of_teacher, SHARE)
        assert at["gain"] == estimate(gains[-1], GAIN)
    assert len(gains) == 1 + 3
    assert len(gains[0]) == found["greedy"]["prompts"] == 6
    assert "\nright answers, 6 prompts; greedily" in show.diagnosis(found)
    assert found["predicted_gain"] == estimate(torch.stack(gains[1:]).mean(0), GAIN)


def test_a_diagnosis_is_made_on_the_device_of_the_pair():
    """The report is the same if the default device is another one, which holds no numbers."""
    pair = different()
    r = written(pair)
    here = diagnosed(pair, rows(NO_ANSWERS))
    with torch.device("meta"):
        there = diagnosed(pair, rows(NO_ANSWERS), rollout=lambda *_, **__: r)
    assert there == here


def test_the_same_seed_gives_the_same_report():
    """A diagnosis can be repeated; another seed samples other responses."""
    one = diagnosed(different())
    assert diagnosed(different()) == one
    assert diagnosed(different(), seed=1)["metrics"] != one["metrics"]


def test_the_table_holds_every_number_and_says_what_there_is_not():
    """All of the report can be read off the screen, also if no token is shared, or if there is no
    error or no AUROC."""
    made = diagnosed(different())
    nothing = {"mean": None, "standard_error": None}
    for change in ({}, {"auroc": None, "predicted_gain": {"mean": 0.5, "standard_error": None}}):
        text = " ".join(show.diagnosis({**made, **change}).split())
        for x in (*made["metrics"].values(), *made["first_tokens"].values()):
            assert plus_minus(x, ".4f") in text
        for x in made["worst_bucket"].values():
            assert f"{x:.4f}" in text
        for x in (made["greedy"], *made["continuation"]):
            assert f"{x['student']['mean']:.3f} {x['teacher']['mean']:.3f}" in text
            assert plus_minus(x["gain"], "+.3f") in text
        assert max(map(len, show.diagnosis(made).splitlines())) <= 100
        assert f"verdict: {made['verdict']}" in text
    made["metrics"]["overlap_token_advantage"] = nothing
    assert "none shared" in show.diagnosis(made)
    for name in WITH_ANSWERS:
        del made[name]
    assert show.diagnosis(made)


def test_a_verdict_is_shown_with_its_record(monkeypatch):
    """How many pairs were called so on new seeds, and how many of them gained; nothing else."""
    made = diagnosed(different())
    monkeypatch.setattr(show, "RECORD", {made["verdict"]: (12, 7)})
    line = "record: of 12 pairs with this verdict 7 gained greedily (experiments/README.md)"
    assert f"verdict: {made['verdict']}\n  {line}\n" in show.diagnosis(made)
    monkeypatch.setattr(show, "RECORD", {})
    assert "record" not in show.diagnosis(made)


SIGNS = [  # what is changed, the row, which way it points
    ({"overlap": SURELY_BELOW}, "overlap, first 8 positions", "against"),
    ({"overlap": UNSURE_BELOW}, "overlap, first 8 positions", "within noise"),
    ({"overlap": UNSURE_ABOVE}, "overlap, first 8 positions", "within noise"),
    ({"overlap": SURELY_ABOVE}, "overlap, first 8 positions", "for"),
    ({"overlap": SURELY_ABOVE, "k": 8}, "overlap, first 8 positions", ""),
    ({"greedy": (0.0801, 0.01)}, "teacher's lead, greedy", "for"),
    ({"greedy": (0.0799, 0.01)}, "teacher's lead, greedy", "against"),
    ({"greedy": (0.1, 0.0501)}, "teacher's lead, greedy", "within noise"),
    ({"greedy": (-0.5, 0.01)}, "teacher's lead, greedy", "against"),
    ({"alone": (0.3, 0.01)}, "at T 0.7, from the start", "in the mean"),
    ({"alone": (-0.3, 0.01)}, "at T 0.7, from the start", "against"),
    ({"gain": (0.3, 0.01)}, "mean of those at T 0.7", "for"),
    ({"gain": (0.02, 0.01)}, "mean of those at T 0.7", "within noise"),
    ({"gain": (-0.3, 0.01)}, "mean of those at T 0.7", "against"),
]


@pytest.mark.parametrize("change, name, points", SIGNS, ids=str)
def test_each_measurement_points_one_way(change, name, points):
    """The verdict asks what is for or against. In the paper the lead in score is alike in a success
    and in a failure."""
    made = {"eval_temperature": 0.7, **report(**change)}
    found = {row[0].strip(): row[2] for row in show.signs(made)}
    assert found[name] == points


@pytest.mark.parametrize("lead, why", [(0.1, "6.1: it shrinks later in a response"), (-0.1, "")])
def test_a_lead_that_is_none_does_not_shrink_with_depth(lead, why):
    """The reason stands at the deepest cut, and only if the teacher is ahead there."""
    made = {"eval_temperature": 0.7, **report()}
    for depth in (0.25, 0.5):
        gain = {"mean": lead, "standard_error": 0.01}
        made["continuation"].append({"depth": depth, "gain": gain})
    found = {row[0].strip(): row[3] for row in show.signs(made)}
    assert found["at T 0.7, after 25%"] == ""
    assert found["at T 0.7, after 50%"] == why


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """student/, teacher/ and prompts.jsonl."""
    folder = tmp_path_factory.mktemp("files")
    pair = different()
    for name in ("student", "teacher"):
        getattr(pair, name).save_pretrained(folder / name)
        pair.tokenizer.save_pretrained(folder / name)
    texts = [pair.tokenizer.decode(ids[1:]) for ids in PROMPTS]
    lines = [{"prompt": text, "answer": answer} for text, answer in zip(texts, ANSWERS)]
    write_lines(folder / "prompts.jsonl", lines)
    return folder


@pytest.fixture
def command(files, tmp_path):
    """Runs analysis.py on the files with more flags: -> the report that it writes."""

    def run(**flags):
        named = {
            "student": files / "student",
            "teacher": files / "teacher",
            "prompts": files / "prompts.jsonl",
            "out": tmp_path / "made" / "d.json",
            "device": "cpu",
            "k": 3,
            "max_new_tokens": LENGTH,
            **flags,
        }
        words = []
        for name, value in named.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        analysis.main(words)
        return json.loads((tmp_path / "made" / "d.json").read_text())

    return run


def test_the_command_writes_the_report_with_its_origin_and_prints_the_table(
    command, files, capsys, tmp_path, monkeypatch
):
    """The file holds the numbers of the table and what made them; its folder is made."""
    monkeypatch.setattr("sys.argv", ["analysis.py", "--template", "add {question}"])
    report = command(count=5)
    said = capsys.readouterr().out
    assert show.diagnosis(report) in said
    assert said.endswith(f"\nreport: {tmp_path / 'made' / 'd.json'}\n")  # and no page
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "d.json"]
    assert {"commit", "python", "transformers", "threads"} <= report.keys()
    assert report["command"] == "analysis.py --template 'add {question}'"  # can be typed
    assert report["student"] == f"{files}/student" and report["teacher"] == f"{files}/teacher"
    assert report["torch"] == torch.__version__


def test_the_command_is_the_function_on_some_prompts_of_the_file(command, files):
    """--seed draws them and fixes all sampling, and every other number goes to the function."""
    numbers = {
        "k": 4,
        "n": 3,
        "max_new_tokens": 5,
        "temperature": 0.9,
        "eval_temperature": 0.5,
        "eval_top_p": 0.8,
        "finishes": 3,
        "seed": 4,
    }
    report = command(count=5, micro_batch_tokens=64, template="add {question} +", **numbers)
    pair = load_pair(f"{files}/student", f"{files}/teacher", device="cpu", micro_batch_tokens=64)
    asked = {"template": "add {question} +", "seed": 4, "count": 5}
    some = prompts.some_questions(Diagnosis(prompts=f"{files}/prompts.jsonl", **asked))
    given = prompts.encode_rows(pair, some, max_prompt_tokens=1024, new_tokens=5)
    expected = diagnose_pair(pair, given, answered=answered, **numbers)
    assert {name: report[name] for name in expected} == expected


def test_prompts_of_unknown_words_are_refused(command, capsys):
    """Without --prompts additions are asked, for which the toy's tokenizer has no words. What it
    writes then is noise, and not incompatible thinking."""
    with pytest.warns(UserWarning, match="no --prompts: asks built-in additions"):
        with pytest.raises(SystemExit) as stopped:
            command(prompts="")
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "tokens of the prompts are [UNK]" in said and "give --prompts" in said


def test_a_few_unknown_words_are_no_reason_to_refuse():
    """Up to half of the tokens of all prompts may be unknown, and all of one prompt."""
    tokenizer = word_tokenizer(WORDS)
    unknown = tokenizer.unk_token_id
    prompts.check_known(tokenizer, [[4, 5, 6], [unknown, unknown, unknown]])
    with pytest.raises(UserError, match=r"4 of 7 tokens of the prompts are \[UNK\]"):
        prompts.check_known(tokenizer, [[4, 5, 6], [unknown] * 4])
    tokenizer.unk_token = None  # bytes: every text has tokens
    prompts.check_known(tokenizer, [[unknown, unknown, unknown]])


@pytest.mark.parametrize("function", [diagnose_pair, prompts.encode_rows])
def test_the_flags_have_the_defaults_of_the_functions(function):
    """Without flags the command does what the function does without arguments."""
    parsed = parse_analysis(["--student", "s", "--teacher", "t"])
    flags = {**vars(parsed), "depths": depths_of(parsed)}
    defaults = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in flags and parameter.default is not inspect.Parameter.empty:
            defaults[name] = parameter.default
    assert defaults and defaults == {name: flags[name] for name in defaults}


def test_the_flags_of_loading_and_of_the_page_go_where_they_belong(
    command, tmp_path, monkeypatch, capsys
):
    """Some prompts go to the page of tokens, which is named at the end, and the dtype goes to the
    pair."""
    asked = {}

    def note_page(pair, rows, path, **how):
        asked.update(page=path, rows=len(rows), dtype=pair.dtype, ends=pair.merge_ends, how=how)

    monkeypatch.setattr(page, "write_page", note_page)
    path = str(tmp_path / "x.html")
    report = command(tokens=path, dtype="bfloat16", ends="own", temperature=0.5, seed=7)
    assert capsys.readouterr().out.endswith(f"\npage: {path}\n")
    assert asked == {
        "page": path,
        "rows": 8,
        "dtype": torch.bfloat16,
        "ends": False,
        "how": {
            "checker": "built-in",
            "k": 3,
            "max_new_tokens": LENGTH,
            "temperature": 0.5,
            "seed": 7,
        },
    }
    assert report["metrics"]


def test_runs_go_to_the_pictures_and_no_model_is_loaded(tmp_path, monkeypatch):
    """analysis.py --run reads the folder of a run, and nothing else."""
    asked = []
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr(figures, "runs", lambda *how: asked.append(how))
    monkeypatch.setattr("sys.argv", ["analysis.py", "--run", str(tmp_path)])
    analysis.main()
    assert len(asked) == 1 and list(asked[0][0]) == [str(tmp_path)]


def test_a_mismatch_is_told_by_the_command_too(command, monkeypatch, capsys):
    """If what was sampled is not what is scored, it says so, and the file has the number."""
    plainly = diagnose_pair

    def off(*args, **how):
        return {**plainly(*args, **how), "sampling_mismatch": 0.5}

    monkeypatch.setattr(analysis, "diagnose_pair", off)
    report = command(count=2)
    assert "differ by up to 0.5 nats, so this is not on-policy" in capsys.readouterr().err
    assert report["sampling_mismatch"] == 0.5


def test_no_mismatch_is_no_warning(command, capsys):
    """A difference by rounding alone is not warned of."""
    assert math.isfinite(command(count=2)["sampling_mismatch"])
    assert "warning" not in capsys.readouterr().err
