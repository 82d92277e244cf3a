"""Laws of the first half of analysis.py: Eq. 6 to 10, a position at a time, in float64. And of files as JSON."""

import functools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_loss import peak_bytes
from torch.distributions import Categorical, kl_divergence

from analysis import (
    FLOOR,
    diagnose,
    entropy,
    entropy_gap,
    largest_gap,
    overlap_mass,
    overlap_ratio,
    overlap_token_advantage,
    reverse_kl,
    shared_tokens,
)
from plumbing.files import write_json

exact = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10, equal_nan=True)

# Worked by hand at k = 3: P = {0, 1, 2}, Q = {2, 3, 0}, I = {0, 2}.
P = torch.tensor([[0.50, 0.20, 0.15, 0.10, 0.05]], dtype=torch.float64)
Q = torch.tensor([[0.20, 0.04, 0.40, 0.30, 0.06]], dtype=torch.float64)


@st.composite
def pairs(draw):
    """Two sets of log-probabilities (N, V), float64, V in 5..8, from flat to peaked."""
    size, scale = draw(st.integers(5, 8)), draw(st.sampled_from([0.3, 1.0, 3.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    z, u = (
        scale * torch.randn(4, size, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    return z.log_softmax(-1), u.log_softmax(-1)


@st.composite
def pairs_with_holes(draw):
    """The same, where each model has ruled some tokens out, never all of a position."""
    ruled_out = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7)), max_size=12)

    def with_holes(log_x):
        log_x = log_x.clone()
        for t, v in draw(ruled_out):
            if v < log_x.size(-1) and log_x[t].isfinite().sum() > 1:
                log_x[t, v] = -math.inf
        return log_x.log_softmax(-1)

    log_p, log_q = draw(pairs())
    return with_holes(log_p), with_holes(log_q)


def metrics(log_p, log_q, k, *shared):
    """Every metric of two models: {name: (N,)}."""
    mass_p, mass_q = overlap_mass(log_p, log_q, k, *shared)
    H_p, H_q = entropy(log_p), entropy(log_q)
    return {
        "overlap_ratio": overlap_ratio(log_p, log_q, k, *shared),
        "overlap_mass_student": mass_p,
        "overlap_mass_teacher": mass_q,
        "overlap_token_advantage": overlap_token_advantage(log_p, log_q, k, *shared),
        "entropy_gap": entropy_gap(H_p, H_q),
        "largest_gap": largest_gap(log_p, log_q, k, *shared),
        "entropy_student": H_p,
        "entropy_teacher": H_q,
        "reverse_kl": reverse_kl(log_p, log_q),
    }


@pytest.mark.parametrize(
    "name, by_hand",
    {
        "overlap_ratio": 2 / 3,  # Eq. 6
        "overlap_token_advantage": (
            10 / 13 * math.log((1 / 3) / (10 / 13))  # Eq. 7, p' = (.50, .15) / .65
            + 3 / 13 * math.log((2 / 3) / (3 / 13))
        )
        / 2,  #        q' = (.20, .40) / .60
        "entropy_gap": abs(
            sum(-q * math.log(q) for q in Q[0].tolist())
            - sum(-p * math.log(p) for p in P[0].tolist())
        ),  # Eq. 8
        "overlap_mass_student": 0.50 + 0.15,  # Eq. 9
        "overlap_mass_teacher": 0.20 + 0.40,  # Eq. 10
        "largest_gap": 0.50 - 0.20,  # .5 |ln .4| is most, though token 1 has the largest log-ratio
    }.items(),
)
def test_equations_6_to_10_by_hand(name, by_hand):
    """Each equation on the example at the top of this file."""
    exact(metrics(P.log(), Q.log(), 3)[name], torch.tensor([by_hand], dtype=torch.float64))


@given(pairs(), st.integers(1, 5))
def test_overlap_against_python_sets(pair, k):
    """Ratio and masses equal a loop over python sets; masses are not renormalised."""
    log_p, log_q = pair
    for t, (p, q) in enumerate(zip(log_p.exp().tolist(), log_q.exp().tolist(), strict=True)):
        best = [set(sorted(range(len(x)), key=lambda v: -x[v])[:k]) for x in (p, q)]
        shared = best[0] & best[1]
        ours = metrics(log_p[t : t + 1], log_q[t : t + 1], k)
        for name, oracle in (
            ("overlap_ratio", len(shared) / k),
            ("overlap_mass_student", sum(p[v] for v in shared)),
            ("overlap_mass_teacher", sum(q[v] for v in shared)),
        ):
            exact(ours[name], torch.tensor([oracle], dtype=torch.float64))


@given(pairs(), st.integers(1, 5))
def test_overlap_token_advantage_is_minus_the_kl_on_the_shared_tokens_over_their_number(pair, k):
    """Eq. 7 per position is exactly -KL(p' || q') / |I|, hence never positive."""
    log_p, log_q = pair
    for t, advantage in enumerate(overlap_token_advantage(log_p, log_q, k).tolist()):
        I = sorted(set(log_p[t].topk(k).indices.tolist()) & set(log_q[t].topk(k).indices.tolist()))
        if not I:
            assert math.isnan(advantage)
            continue
        p, q = (Categorical(probs=x[t, I].exp()) for x in (log_p, log_q))
        assert (
            advantage == pytest.approx(-kl_divergence(p, q).item() / len(I), abs=1e-12)
            and advantage <= 1e-12
        )


def test_an_empty_intersection_is_left_out_of_the_mean_and_counted():
    """The paper is silent on it: the advantage is NaN there, nanmean skips it, isnan counts it;
    ratio and masses are 0."""
    rising = torch.arange(1, 6, dtype=torch.float64)[None] / 15
    log_p, log_q = torch.cat([P, rising, P]).log(), torch.cat([Q, rising.flip(-1), P]).log()
    ours = metrics(log_p, log_q, 2)  # {0, 1} and {2, 3}; {4, 3} and {0, 1}; {0, 1} twice
    for name in ("overlap_ratio", "overlap_mass_student", "overlap_mass_teacher"):
        assert not ours[name][:2].any() and ours[name][2] > 0
    assert ours["overlap_token_advantage"].isnan().tolist() == [True, True, False]
    assert ours["overlap_token_advantage"].nanmean() == ours["overlap_token_advantage"][2] == 0


@given(pairs())
def test_entropy_and_reverse_kl_are_those_of_torch_distributions(pair):
    """Over the whole vocabulary, not a renormalised top-k (nano-opd took the entropy gap there)."""
    log_p, log_q = pair
    p, q = (Categorical(logits=x) for x in pair)
    exact(entropy(log_p), p.entropy())
    exact(entropy_gap(entropy(log_p), entropy(log_q)), (q.entropy() - p.entropy()).abs())
    exact(reverse_kl(log_p, log_q), kl_divergence(p, q))


@given(pairs_with_holes(), st.integers(1, 5))
def test_where_a_token_is_ruled_out_all_is_finite_and_as_torch_distributions_say(pair, k):
    """0 log 0 = 0; a token that the teacher alone rules out costs p(v) (log p(v) + 1e4), on top of what torch finds on
    the others. No number is infinite, and the advantage alone may be NaN, where nothing is shared."""
    log_p, log_q = pair
    ours = diagnose(log_p, log_q, torch.zeros(len(log_p), dtype=torch.long), k)
    p, q = (Categorical(logits=x) for x in pair)
    for name, oracle in (
        ("entropy_student", p.entropy()),
        ("entropy_teacher", q.entropy()),
        ("entropy_gap", (q.entropy() - p.entropy()).abs()),
    ):
        exact(ours[name], oracle)
    dear = log_p.isfinite() & log_q.isinf()
    priced = torch.where(dear, FLOOR, log_q)  # 1e4 nats: the price of a token ruled out
    oracle = torch.where(log_p.isfinite(), log_p.exp() * (log_p - priced), 0).sum(-1)
    exact(ours["reverse_kl"], oracle)
    exact(ours["reverse_kl"][~dear.any(-1)], kl_divergence(p, q)[~dear.any(-1)])
    assert FLOOR == -1e4 and (dear.any(-1) <= (ours["reverse_kl"] > 0)).all()
    for name in ours.keys() - {"reward", "log_p", "overlap_token_advantage"}:
        assert ours[name].isfinite().all(), name
    advantage = ours["overlap_token_advantage"]
    assert not advantage.isinf().any() and torch.equal(
        advantage.isnan(), ours["overlap_ratio"] == 0
    )


def test_the_entropy_gap_is_absolute_before_the_mean():
    """Gaps of opposite sign add up (Eq. 8); the difference of the two mean entropies would be nothing."""
    sharp, flat = (
        torch.tensor([0.0, 0, 9]).double().log_softmax(-1),
        torch.zeros(3).double().log_softmax(-1),
    )
    log_p, log_q = torch.stack([sharp, flat]), torch.stack([flat, sharp])
    exact(entropy(log_p).mean(), entropy(log_q).mean())
    exact(entropy_gap(entropy(log_p), entropy(log_q)).mean(), entropy(flat) - entropy(sharp))


@given(pairs(), st.integers(1, 5))
def test_ranges(pair, k):
    """Ratio in multiples of 1/k, masses in 0..1, entropies in 0..log V, reverse KL not negative."""
    ours, size = metrics(*pair, k), pair[0].size(-1)
    exact(ours["overlap_ratio"] * k, (ours["overlap_ratio"] * k).round())
    for name in ("overlap_ratio", "overlap_mass_student", "overlap_mass_teacher"):
        assert (ours[name] >= 0).all() and (ours[name] <= 1 + 1e-12).all()
    for name in ("entropy_student", "entropy_teacher"):
        assert (ours[name] >= 0).all() and (ours[name] <= math.log(size) + 1e-12).all()
    assert (ours["reverse_kl"] >= -1e-12).all()


@given(pairs(), st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_order_of_the_vocabulary_does_not_matter(pair, k, random):
    """Renaming the tokens changes no metric."""
    order = list(range(pair[0].size(-1)))
    random.shuffle(order)
    exact(metrics(*pair, k), metrics(*(x[:, order] for x in pair), k))


@given(pairs(), st.integers(1, 5))
def test_equal_models_are_at_distance_zero(pair, k):
    """p = q: ratio 1, equal masses, and distances of exactly 0 (trl#6480: a held-out loss that was 0 for unequal ones
    as well)."""
    log_p, log_q = pair
    ours = metrics(log_p, log_p.clone(), k)
    assert (ours["overlap_ratio"] == 1).all()
    assert torch.equal(ours["overlap_mass_student"], ours["overlap_mass_teacher"])
    exact(ours["overlap_mass_student"], log_p.exp().topk(k).values.sum(-1))
    assert all(
        not ours[name].any() for name in ("reverse_kl", "entropy_gap", "overlap_token_advantage")
    )
    assert (reverse_kl(log_p, log_q) > 0).all()


@given(st.one_of(pairs(), pairs_with_holes()), st.integers(1, 5))
def test_diagnose_is_the_single_functions(pair, k):
    """One top-k of each side gives the very numbers of the functions above, the reward and log p(y); each finds the
    shared tokens itself where they are not given."""
    log_p, log_q = pair
    y = torch.arange(len(log_p))
    log_p_y, log_q_y = (x[torch.arange(len(y)), y] for x in pair)
    all_at_once = diagnose(log_p, log_q, y, k)
    exact(all_at_once, {**metrics(log_p, log_q, k), "reward": log_q_y - log_p_y, "log_p": log_p_y})
    alone, told = metrics(log_p, log_q, k), metrics(log_p, log_q, k, shared_tokens(log_p, log_q, k))
    assert alone.keys() == told.keys() == all_at_once.keys() - {"reward", "log_p"}
    for name, x in alone.items():
        torch.testing.assert_close(told[name], x, rtol=0, atol=0, equal_nan=True)


@given(pairs(), st.integers(1, 5))
def test_the_shared_tokens_are_those_of_the_students_set_in_the_teachers(pair, k):
    """(N, k) ids and (N, k) bool: P by falling probability, true where Q holds the token too."""
    P, in_I = shared_tokens(*pair, k)
    for t, (p, q) in enumerate(zip(*(x.tolist() for x in pair))):
        best = [sorted(range(len(x)), key=lambda v: -x[v])[:k] for x in (p, q)]
        assert P[t].tolist() == best[0] and in_I[t].tolist() == [v in best[1] for v in best[0]]


def test_diagnose_holds_three_tensors_of_the_size_of_its_inputs():
    """p and the two logarithms without their infinities, from as few (N, V) as will do: a fourth is a third more."""
    log_p, log_q = torch.randn(2, 16, 20_000).log_softmax(-1)
    held = peak_bytes(lambda: diagnose(log_p, log_q, torch.arange(16), 16))
    assert held < 3.5 * 4 * log_p.numel()


def test_diagnose_takes_no_gradient():
    """Diagnostics are measurements: nothing of them reaches the student."""
    log_p = P.log().requires_grad_()
    assert not any(x.requires_grad for x in diagnose(log_p, Q.log(), torch.tensor([0]), 3).values())


@given(pairs())
def test_the_mean_reward_over_samples_is_minus_the_reverse_kl(pair):
    """E over y ~ p of log q(y) - log p(y) = -KL(p || q): the sign of the paper's sequence mean reward."""
    log_p, log_q = pair
    rewards = [
        diagnose(log_p, log_q, torch.full((len(log_p),), v), 3)["reward"]
        for v in range(log_p.size(-1))
    ]
    exact((torch.stack(rewards, -1) * log_p.exp()).sum(-1), -reverse_kl(log_p, log_q))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_tokens_of_probability_zero_are_harmless(k):
    """0 log 0 = 0: what the student rules out counts nothing, k larger than its support included."""
    ninf = -math.inf
    log_p = torch.tensor([[1.0, 2, ninf, ninf, ninf]], dtype=torch.float64).log_softmax(-1)
    log_q = torch.tensor([[2.0, 1, 0, ninf, ninf]], dtype=torch.float64).log_softmax(-1)
    ours = metrics(log_p, log_q, k)
    assert not any(ours[name].isinf().any() for name in ours)
    exact(ours["entropy_student"], Categorical(logits=log_p[:, :2]).entropy())
    exact(ours["reverse_kl"], (log_p[:, :2].exp() * (log_p - log_q)[:, :2]).sum(-1))
    assert ours["overlap_token_advantage"].isnan().any() == (k == 1)  # P = {1}, Q = {0}
    assert (ours["overlap_token_advantage"].nan_to_num() <= 0).all()


@given(pairs(), st.integers(1, 5))
def test_the_largest_gap_is_where_most_is_asked(pair, k):
    """4.1 by a loop: of the student's k likeliest tokens the one with the largest p |log q/p|, and |p - q| there."""
    gaps = []
    for p, q in zip(*(x.exp().tolist() for x in pair)):
        likeliest = sorted(range(len(p)), key=lambda v: -p[v])[:k]
        v = max(likeliest, key=lambda v: p[v] * abs(math.log(q[v] / p[v])))
        gaps.append(abs(p[v] - q[v]))
    exact(largest_gap(*pair, k), torch.tensor(gaps, dtype=torch.float64))


@given(pairs(), st.integers(1, 5))
def test_a_rectangle_is_measured_as_its_positions_are(pair, k):
    """(B, T, V) and packed (N, V) are the same positions, whatever axes stand before the vocabulary."""
    rectangle = metrics(*(x.view(2, 2, -1) for x in pair), k)
    exact({name: x.flatten() for name, x in rectangle.items()}, metrics(*pair, k))


def test_the_metrics_have_the_dtype_of_their_side():
    """Each is of the student's dtype but the teacher's own; a ratio of counts is no exception."""
    ours = metrics(P.log().float(), Q.log(), 3)
    assert ours["overlap_ratio"].dtype == ours["overlap_mass_student"].dtype == torch.float32
    assert ours["overlap_mass_teacher"].dtype == ours["entropy_teacher"].dtype == torch.float64


@pytest.mark.parametrize("k", [0, 6])
@pytest.mark.parametrize(
    "metric",
    [
        overlap_ratio,
        overlap_token_advantage,
        overlap_mass,
        lambda *pair_k: diagnose(*pair_k[:2], torch.tensor([0]), pair_k[2]),
    ],
)
def test_a_k_outside_of_the_vocabulary_is_refused(metric, k):
    """The message repeats it; 1 and V themselves are in order."""
    with pytest.raises(ValueError, match=f"k={k} "):
        metric(P.log(), Q.log(), k)
    metric(P.log(), Q.log(), 1), metric(P.log(), Q.log(), 5)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_a_diagnosis_is_finite_where_a_side_rules_tokens_out(k):
    """0 log 0 = 0 as in the single functions, and what the teacher alone rules out is dearer than float32 can say."""
    ninf = -math.inf
    log_p = (
        torch.tensor([[1.0, 2, ninf, ninf, ninf], [3, 2, 1, ninf, ninf]]).double().log_softmax(-1)
    )
    log_q = torch.tensor([[2.0, 1, 0, ninf, ninf], [0, ninf, 1, 2, ninf]]).double().log_softmax(-1)
    ours = diagnose(log_p, log_q, torch.tensor([0, 1]), k)
    for name, x in metrics(log_p, log_q, k).items():
        exact(ours[name], x)
    assert (
        104 * log_p[1, 1].exp() < ours["reverse_kl"][1] < math.inf
    )  # the smallest float32 has the log -103.3
    assert ours["reward"][1] == ninf  # as measured: the loss clamps, not we


def test_diagnose_is_float32_under_autocast():
    """--dtype bfloat16 computes the models in 16 bits, not what is measured of them."""
    torch.manual_seed(0)
    log_p, log_q = torch.randn(2, 50, 300).log_softmax(-1)
    y = torch.arange(50)
    plain = diagnose(log_p, log_q, y, 16)
    with torch.autocast("cpu", torch.bfloat16):
        under = diagnose(log_p, log_q, y, 16)
    assert all(x.dtype == torch.float32 for x in under.values())
    torch.testing.assert_close(under, plain, rtol=0, atol=0, equal_nan=True)


def test_json_is_laid_out_by_a_blank_a_level_and_leaves_nothing_beside_it(tmp_path):
    """A file to read: one key a line, a list of numbers on one; what was there before is replaced."""
    for value in ({"old": 1}, {"a": [1, 2], "b": {"c": None}}):
        write_json(tmp_path / "x.json", value)
    assert (tmp_path / "x.json").read_text() == '{\n "a": [1, 2],\n "b": {\n  "c": null\n }\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_json_keeps_every_value_and_puts_numbers_on_one_line(tmp_path):
    """What is read back is what was written, brackets and line ends inside of texts too."""
    value = {
        "x": [1, None, 2.5],
        "runs": [{"text": "[\n1\n]", "y": []}, {"names": ["a, b", "c"], "z": [[1, 2], [3]]}],
    }
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == value and '"x": [1, null, 2.5]' in text and "[1, 2]" in text
