"""Laws of the first half of analysis.py: Eq. 6 to 10 at single states, in float64, against plain
loops; then means with their errors, accuracies, and output positions."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from torch.profiler import ProfilerActivity, profile

import analysis
from analysis import (
    BUCKETS,
    BY_POSITION,
    GAIN,
    SHARE,
    ahead,
    auroc,
    diagnose,
    entropy,
    entropy_gap,
    estimate,
    gap_recovery,
    largest_gap,
    means_by_position,
    overlap_mass,
    overlap_ratio,
    overlap_token_advantage,
    plus_minus,
    reverse_kl,
    shared_tokens,
    sums_by_position,
    sure,
)

exact = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10, equal_nan=True)
ks = st.integers(1, 5)


def float64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@st.composite
def pairs(draw):
    """Log-probabilities of two models (4, V), V in 5..8, from flat to peaked."""
    size = draw(st.integers(5, 8))
    scale = draw(st.sampled_from([0.3, 1.0, 3.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    logits = scale * torch.randn(2, 4, size, dtype=torch.float64, generator=generator)
    return logits.log_softmax(-1).unbind()


@st.composite
def pairs_with_holes(draw):
    """The same, but each model rules some tokens out, never all of a state."""
    ruled_out = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=12)
    pair = []
    for log_x in draw(pairs()):
        for state, token in draw(ruled_out):
            if log_x[state].isfinite().sum() > 1:
                log_x[state, token] = -math.inf
        pair.append(log_x.log_softmax(-1))
    return pair


def metrics(log_p, log_q, k):
    """Every metric by its own function: {name: (N,)}."""
    P, in_I = shared_tokens(log_p, log_q, k)
    return {
        "reverse_kl": reverse_kl(log_p, log_q),
        "overlap_ratio": overlap_ratio(in_I),
        "overlap_mass_student": overlap_mass(log_p, P, in_I),
        "overlap_mass_teacher": overlap_mass(log_q, P, in_I),
        "overlap_token_advantage": overlap_token_advantage(log_p, log_q, P, in_I),
        "entropy_gap": entropy_gap(entropy(log_p), entropy(log_q)),
        "largest_gap": largest_gap(log_p, log_q, P),
        "entropy_student": entropy(log_p),
        "entropy_teacher": entropy(log_q),
    }


# --- the formulas, in loops over one state ------------------------------------------------------


def log(x):
    return math.log(x) if x > 0 else analysis.LOG_ZERO


def entropy_of(p):
    return -sum(x * log(x) for x in p)


def advantage_of(p, q, I):
    """Eq. 7."""
    if not I:
        return math.nan
    mass_p = sum(p[v] for v in I)
    mass_q = sum(q[v] for v in I)
    total = 0
    for v in I:
        own = p[v] / mass_p
        total += own * (math.log(q[v] / mass_q) - math.log(own))
    return total / len(I)


def gap_of(p, q, P):
    """4.1."""

    def asks(v):
        return p[v] * abs(log(q[v]) - log(p[v]))

    most = max(P, key=asks)
    return abs(p[most] - q[most])


def by_loops(p, q, P, I):
    """All metrics of one state but Eq. 6 and 7. p, q: lists of probabilities; P, I: of tokens."""
    return {
        "reverse_kl": sum(x * (log(x) - log(y)) for x, y in zip(p, q)),
        "overlap_mass_student": math.fsum(p[v] for v in I),
        "overlap_mass_teacher": math.fsum(q[v] for v in I),
        "entropy_gap": abs(entropy_of(q) - entropy_of(p)),
        "largest_gap": gap_of(p, q, P),
        "entropy_student": entropy_of(p),
        "entropy_teacher": entropy_of(q),
    }


def sets(log_p, log_q, k):
    """(P, I) of each state, as lists of tokens."""
    found = []
    for tokens, shared in zip(*shared_tokens(log_p, log_q, k)):
        found.append((tokens.tolist(), tokens[shared].tolist()))
    return found


def likeliest(p, k):
    return sorted(range(len(p)), key=lambda v: -p[v])[:k]


@given(pairs(), ks)
def test_the_shared_tokens_are_those_of_the_students_set_in_the_teachers(pair, k):
    """P stands in the order of falling probability, and I in the order of P."""
    found = sets(*pair, k)
    for i, (p, q) in enumerate(zip(pair[0].tolist(), pair[1].tolist())):
        P = likeliest(p, k)
        assert found[i] == (P, [v for v in P if v in likeliest(q, k)])


@given(st.one_of(pairs(), pairs_with_holes()), ks)
def test_every_metric_is_its_formula(pair, k):
    """Each is taken over the whole vocabulary, and masses are not renormalised. 0 log 0 is 0, and a
    token that only the teacher rules out costs 1e4 nats, so no number is infinite."""
    ours = metrics(*pair, k)
    assert analysis.LOG_ZERO == -1e4
    for i, (P, I) in enumerate(sets(*pair, k)):
        p = pair[0][i].exp().tolist()
        q = pair[1][i].exp().tolist()
        assert ours["overlap_ratio"][i].item() == pytest.approx(len(I) / k)  # Eq. 6
        for name, x in by_loops(p, q, P, I).items():
            exact(ours[name][i].item(), x, msg=name)


@given(pairs(), ks)
def test_the_overlap_token_advantage_is_minus_the_kl_on_the_shared_tokens(pair, k):
    """Eq. 7 is -KL(p' || q') / |I|, so never positive; NaN if nothing is shared."""
    ours = metrics(*pair, k)["overlap_token_advantage"]
    for i, (_, I) in enumerate(sets(*pair, k)):
        p = pair[0][i].exp()
        q = pair[1][i].exp()
        exact(ours[i].item(), advantage_of(p.tolist(), q.tolist(), I))
        exact(ours[i : i + 1], float64(advantage_of(p.tolist(), q.tolist(), I)))
        if I:
            kl = kl_divergence(Categorical(probs=p[I]), Categorical(probs=q[I]))
            exact(ours[i], -kl / len(I))
            assert ours[i] <= 1e-12


@given(pairs_with_holes(), ks)
def test_where_tokens_are_ruled_out_the_advantage_is_finite_or_there_is_none(pair, k):
    """Never infinite, never positive, and NaN exactly where nothing is shared."""
    ours = metrics(*pair, k)
    advantage = ours["overlap_token_advantage"]
    assert torch.equal(advantage.isnan(), ours["overlap_ratio"] == 0)
    assert not advantage.isinf().any()
    assert (advantage.nan_to_num() <= 1e-12).all()


# Worked by hand at k = 3: P = {0, 1, 2}, Q = {2, 3, 0}, I = {0, 2}.
p = float64(0.50, 0.20, 0.15, 0.10, 0.05).unsqueeze(0)
q = float64(0.20, 0.04, 0.40, 0.30, 0.06).unsqueeze(0)


def test_equations_6_to_10_by_hand():
    """p' = (.50, .15) / .65 and q' = (.20, .40) / .60. The gap is that of token 0, .5 |ln .4|,
    though token 1 has the largest log-ratio."""
    first = 10 / 13 * math.log((1 / 3) / (10 / 13))
    second = 3 / 13 * math.log((2 / 3) / (3 / 13))
    by_hand = {
        "overlap_ratio": 2 / 3,
        "overlap_token_advantage": (first + second) / 2,
        "overlap_mass_student": 0.65,
        "overlap_mass_teacher": 0.60,
        "largest_gap": 0.30,
    }
    ours = metrics(p.log(), q.log(), 3)
    for name, x in by_hand.items():
        torch.testing.assert_close(ours[name].item(), x, rtol=1e-6, atol=0, msg=name)


def test_an_empty_intersection_is_left_out_of_the_mean_and_counted():
    """nanmean skips it, isnan counts it; ratio and masses are 0 there."""
    rising = float64(1, 2, 3, 4, 5).unsqueeze(0) / 15
    log_p = torch.cat([p, rising, p]).log()  # at k = 2: {0, 1}, {4, 3}, {0, 1}
    log_q = torch.cat([q, rising.flip(-1), p]).log()  # {2, 3}, {0, 1}, {0, 1}
    ours = metrics(log_p, log_q, 2)
    for name in ("overlap_ratio", "overlap_mass_student", "overlap_mass_teacher"):
        assert (ours[name] > 0).tolist() == [False, False, True]
    assert ours["overlap_token_advantage"].isnan().tolist() == [True, True, False]
    assert ours["overlap_token_advantage"].nanmean() == 0


@given(pairs())
def test_entropy_and_reverse_kl_are_those_of_torch_distributions(pair):
    """The entropy gap is over the whole vocabulary; nano-opd took that of a renormalised top-k."""
    student = Categorical(logits=pair[0])
    teacher = Categorical(logits=pair[1])
    ours = metrics(*pair, 3)
    exact(ours["entropy_student"], student.entropy())
    exact(ours["entropy_gap"], (teacher.entropy() - student.entropy()).abs())
    exact(ours["reverse_kl"], kl_divergence(student, teacher))


def test_the_entropy_gap_is_absolute_at_each_state():
    """Eq. 8: gaps of opposite sign add up. The gap of the two mean entropies would be 0."""
    sharp = float64(0, 0, 9).log_softmax(-1)
    flat = float64(0, 0, 0).log_softmax(-1)
    H_p = entropy(torch.stack([sharp, flat]))
    H_q = entropy(torch.stack([flat, sharp]))
    exact(H_p.mean(), H_q.mean())
    exact(entropy_gap(H_p, H_q).mean(), entropy(flat) - entropy(sharp))


@given(pairs(), ks)
def test_ranges(pair, k):
    """The ratio is a multiple of 1/k; masses are in 0..1, entropies in 0..log V; the KL is >= 0."""
    ours = metrics(*pair, k)
    tops = {
        "overlap_ratio": 1,
        "overlap_mass_student": 1,
        "overlap_mass_teacher": 1,
        "largest_gap": 1,
        "entropy_student": math.log(pair[0].size(-1)),
        "entropy_teacher": math.log(pair[0].size(-1)),
        "reverse_kl": math.inf,
    }
    for name, top in tops.items():
        assert (ours[name] >= 0).all()
        assert (ours[name] <= top + 1e-6).all()
    shared = ours["overlap_ratio"] * k
    torch.testing.assert_close(shared, shared.round())


@given(pairs(), ks, st.randoms(use_true_random=False))
def test_the_order_of_the_vocabulary_does_not_matter(pair, k, random):
    """If the tokens are renamed, no metric changes."""
    order = list(range(pair[0].size(-1)))
    random.shuffle(order)
    renamed = [log_x[:, order] for log_x in pair]
    exact(metrics(*renamed, k), metrics(*pair, k))


@given(pairs(), ks)
def test_equal_models_are_at_distance_zero(pair, k):
    """p = q: ratio 1, equal masses, distances of exactly 0; unequal models are apart (trl#6480: a
    held-out loss that was 0 for these as well)."""
    ours = metrics(pair[0], pair[0].clone(), k)
    assert (ours["overlap_ratio"] == 1).all()
    exact(ours["overlap_mass_student"], pair[0].exp().topk(k).values.sum(-1))
    exact(ours["overlap_mass_teacher"], ours["overlap_mass_student"])
    for name in ("reverse_kl", "entropy_gap", "overlap_token_advantage", "largest_gap"):
        assert not ours[name].any()
    assert (reverse_kl(*pair) > 0).all()


@given(pairs())
def test_the_mean_reward_over_samples_is_minus_the_reverse_kl(pair):
    """The mean of log q(y) - log p(y) over y ~ p is -KL(p || q): the sign of the paper's reward."""
    log_p = pair[0]
    total = torch.zeros(len(log_p), dtype=torch.float64)
    for token in range(log_p.size(-1)):
        y = torch.full((len(log_p),), token)
        found = diagnose(*pair, y, 3)
        exact(found["log_p"], log_p[:, token])
        total += found["reward"] * log_p[:, token].exp()
    exact(total, -reverse_kl(*pair))


@given(st.one_of(pairs(), pairs_with_holes()), ks)
def test_diagnose_is_the_single_functions(pair, k):
    """It returns the very numbers of the functions above, the reward and its size, log p(y), and
    the probability of an end."""
    y = torch.arange(len(pair[0]))
    ours = diagnose(*pair, y, k, ends=[0, 2])
    expected = metrics(*pair, k)
    expected["log_p"] = pair[0][y, y]
    expected["reward"] = pair[1][y, y] - pair[0][y, y]
    expected["distance_left"] = expected["reward"].abs()
    expected["end_mass_student"] = pair[0][:, [0, 2]].exp().sum(-1)
    expected["end_mass_teacher"] = pair[1][:, [0, 2]].exp().sum(-1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("k", [0, 6])
def test_a_k_outside_of_the_vocabulary_is_refused(k):
    """The message names it; 1 and V themselves are allowed."""
    with pytest.raises(ValueError, match=f"k={k} "):
        diagnose(p.log(), q.log(), torch.tensor([0]), k)
    diagnose(p.log(), q.log(), torch.tensor([0]), 1)
    diagnose(p.log(), q.log(), torch.tensor([0]), 5)


def test_diagnose_refuses_what_the_losses_refuse():
    """A teacher of more padded tokens, or a token too few, would give wrong numbers."""
    log_p = torch.zeros(3, 5).log_softmax(-1)
    padded = torch.zeros(3, 8).log_softmax(-1)
    y = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"log_p is \(3, 5\), log_q \(3, 8\)"):
        diagnose(log_p, padded, y, 2)
    with pytest.raises(ValueError, match=r"y is \(2,\), log_p \(3, 5\)"):
        diagnose(log_p, log_p, y[:2], 2)


def test_diagnose_takes_no_gradient_and_changes_no_argument():
    """Diagnostics are measurements: nothing of them reaches the student."""
    log_p = p.log().requires_grad_()
    log_q = q.log()
    found = diagnose(log_p, log_q, torch.tensor([0]), 3)
    assert not any(x.requires_grad for x in found.values())
    assert torch.equal(log_p, p.log()) and torch.equal(log_q, q.log())


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


def test_diagnose_holds_three_tensors_of_the_size_of_its_inputs():
    """p and the two logarithms without their infinities; a fourth would be a third more memory."""
    log_p, log_q = torch.randn(2, 16, 20_000).log_softmax(-1)
    y = torch.arange(16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        diagnose(log_p, log_q, y, 16)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = torch.tensor([event.nbytes() for event in events]).cumsum(0)  # bytes after each event
    assert held.max() < 3.5 * log_p.nbytes


# --- 6.2 auroc ----------------------------------------------------------------------------------

scored = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=12)


def columns(rows):
    """[(score, label)] -> (B,) float64, (B,) bool."""
    scores = torch.tensor([score for score, _ in rows], dtype=torch.float64)
    return scores, torch.tensor([label for _, label in rows])


@given(scored)
def test_auroc_counts_the_pairs_in_the_right_order_and_ties_half(rows):
    """6.2: the share is over all pairs of a true and a false one; None if there is no such pair."""
    wins = []
    for true in [score for score, label in rows if label]:
        for false in [score for score, label in rows if not label]:
            wins.append((true > false) + (true == false) / 2)
    expected = pytest.approx(sum(wins) / len(wins)) if wins else None
    assert auroc(*columns(rows)) == expected


@given(scored, st.sampled_from([lambda x: x**3, lambda x: 2 * x - 7, torch.exp]))
def test_auroc_knows_the_order_of_the_scores_alone(rows, rising):
    """No rising map of the scores changes it; negated scores give one minus it."""
    scores, labels = columns(rows)
    found = auroc(scores, labels)
    assert auroc(rising(scores), labels) == found
    if found is not None:
        assert auroc(-scores, labels) == pytest.approx(1 - found)


def test_labels_may_be_0_and_1():
    """As integers they would index the scores."""
    assert auroc(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 1])) == 1


# --- means and their errors ---------------------------------------------------------------------

number_or_nan = st.one_of(st.just(math.nan), st.floats(-5, 5))


@given(st.lists(number_or_nan, max_size=8))
def test_an_estimate_is_the_mean_and_its_standard_error_without_nan(x):
    """The error is sqrt(sum (x - mean)^2 / (n - 1) / n). NaN is left out; None if n < 2."""
    found = estimate(float64(*x))
    kept = [y for y in x if not math.isnan(y)]
    n = len(kept)
    mean = sum(kept) / n if n else None
    error = None
    if n > 1:
        error = math.sqrt(sum((y - mean) ** 2 for y in kept) / (n - 1) / n)
    assert found["mean"] == pytest.approx(mean, abs=1e-9)
    assert found["standard_error"] == pytest.approx(error, abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_the_error_of_shares_is_at_least_that_with_one_more_prompt_of_each_kind(x):
    """A few prompts that agree prove nothing; the mean stays that of what was seen."""
    found = estimate(float64(*x), SHARE)
    plain = estimate(float64(*x))
    more = estimate(float64(*x, 0, 1))
    assert found["mean"] == plain["mean"]
    assert found["standard_error"] == max(plain["standard_error"], more["standard_error"])


def test_two_prompts_that_agree_prove_nothing():
    """Two prompts that both gain .5 have a standard error above 0, and the gain is not sure."""
    both = estimate(float64(0.5, 0.5), GAIN)
    assert both["mean"] == 0.5 and both["standard_error"] > 0.25
    assert not sure(both)
    many = float64(*[0, 1] * 20)  # many that disagree: their own spread decides
    assert estimate(many, SHARE) == estimate(many)


@pytest.mark.parametrize("prompts", [2, 8, 24, 64])
@pytest.mark.parametrize("chance", [0.02, 0.1, 0.5, 0.9])
def test_two_errors_cover_an_accuracy(chance, prompts):
    """By simulation, with two answers to each prompt: two errors on either side hold the true
    accuracy 92 times in 100 or more, even with two prompts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        right = torch.distributions.Binomial(2, chance).sample((400, prompts)) / 2
    covered = 0
    for shares in right:
        x = estimate(shares, SHARE)
        covered += abs(x["mean"] - chance) <= 2 * x["standard_error"]
    assert covered / len(right) >= 0.92


@pytest.mark.parametrize(
    "mean, error, expected",
    [(0.2, 0.1, 0), (0.21, 0.1, 1), (-0.2, 0.1, 0), (-0.21, 0.1, -1), (0.5, None, 0), (0, 0, 0)],
)
def test_sure_is_beyond_two_standard_errors(mean, error, expected):
    """Without an error nothing is sure."""
    assert sure({"mean": mean, "standard_error": error}) == expected


def test_an_estimate_to_read():
    """Sign and width are for the mean alone; an error that is not known is a question mark."""
    assert plus_minus({"mean": 0.5, "standard_error": 0.0123}, "9.4f") == "   0.5000 +- 0.0123"
    assert plus_minus({"mean": 0.5, "standard_error": 0.0123}) == "0.500 +- 0.012"
    assert plus_minus({"mean": 0.5, "standard_error": 0.0123}, "+.2f") == "+0.50 +- 0.01"
    assert plus_minus({"mean": 0.5, "standard_error": None}) == "0.500 +- ?"


# --- accuracies ---------------------------------------------------------------------------------


def accuracy(each, n=4):
    """A result of measure.accuracy: right answers of n to each prompt."""
    shares = float64(*each) / n
    return {**estimate(shares, SHARE), "samples": n * len(each), "each": each}


counts = st.lists(st.integers(0, 4), min_size=3, max_size=3)


@given(counts, counts)
def test_an_accuracy_is_ahead_prompt_by_prompt(a, b):
    """It is the estimate of the differences, also if one of the two has twice as many answers."""
    difference = float64(*a) / 4 - float64(*b) / 4
    assert ahead(accuracy(a), accuracy(b)) == estimate(difference, GAIN)
    twice = accuracy([2 * x for x in a], n=8)
    assert ahead(twice, accuracy(b)) == estimate(difference, GAIN)


@given(counts, counts, counts)
def test_the_gap_recovery_is_the_share_of_the_gap_if_there_surely_is_one(before, after, teacher):
    """None if the paired difference is within two standard errors of 0."""
    found = gap_recovery(accuracy(before), accuracy(after), accuracy(teacher))
    if not sure(ahead(accuracy(teacher), accuracy(before))):
        assert found is None
    else:
        gained = sum(after) - sum(before)
        assert found == pytest.approx(gained / (sum(teacher) - sum(before)))


def test_a_gap_is_seen_prompt_by_prompt():
    """On two kinds of prompts the teacher is better by .25 each: the gap is sure, though it is
    within the noise of the two means. The same numbers in another order are noise."""
    before = [0, 3] * 6
    half = [0, 3, 1, 4] * 3
    teacher = [1, 4] * 6
    assert gap_recovery(accuracy(before), accuracy(half), accuracy(teacher)) == pytest.approx(0.5)
    assert gap_recovery(accuracy(before), accuracy(before), accuracy(teacher)) == 0
    few = accuracy(before[:4])
    assert gap_recovery(few, few, accuracy(teacher[:4])) is None
    turned = accuracy(teacher[::-1])
    assert gap_recovery(accuracy(before), accuracy(half), turned) is None


# --- output positions ---------------------------------------------------------------------------


def in_buckets(responses, width):
    """The means by position of responses, in which every metric has the same numbers."""
    numbers = []
    places = []
    for response in responses:
        numbers += response
        places += range(len(response))
    values = dict.fromkeys(BY_POSITION, torch.tensor(numbers, dtype=torch.float32))
    place = torch.tensor(places, dtype=torch.long)
    return means_by_position(sums_by_position(values, place, width), width)


@st.composite
def responses(draw):
    """A response of 0 to 60 numbers from -9 to 9."""
    length = draw(st.integers(0, 60))
    start = draw(st.integers(0, 18))
    step = draw(st.integers(0, 18))
    return [(start + step * i) % 19 - 9 for i in range(length)]


@given(st.lists(responses(), min_size=1, max_size=6), st.integers(1, 12))
def test_buckets_share_out_every_token(responses, width):
    """Fig. 13: bucket i holds the positions from i * width on, and the last bucket all that follow.
    Lists end with the last bucket that holds a token."""
    inside = [[] for _ in range(BUCKETS)]
    for response in responses:
        for position, x in enumerate(response):
            inside[min(position // width, BUCKETS - 1)].append(x)
    inside = [numbers for numbers in inside if numbers]
    means = in_buckets(responses, width)
    assert means["width"] == width
    assert means["tokens"] == [len(numbers) for numbers in inside]
    for name in BY_POSITION:
        expected = [sum(numbers) / len(numbers) for numbers in inside]
        assert means[name] == pytest.approx(expected, abs=1e-5)


def test_sums_over_parts_are_the_sums_over_the_whole():
    """Micro-batches and processes add their sums up."""
    torch.manual_seed(0)
    place = torch.randint(40, (30,))
    values = {name: torch.randn(30) for name in BY_POSITION}
    whole = sums_by_position(values, place, 2)
    first = {name: x[:11] for name, x in values.items()}
    second = {name: x[11:] for name, x in values.items()}
    one = sums_by_position(first, place[:11], 2)
    other = sums_by_position(second, place[11:], 2)
    exact({name: one[name] + other[name] for name in whole}, whole)
    assert whole["tokens"].sum() == 30


def test_no_token_fills_no_bucket_and_json_has_no_nan():
    """Without a token the lists are empty. A mean that is not finite is None."""
    empty = dict.fromkeys(BY_POSITION, [])
    assert in_buckets([[], []], 4) == {"width": 4, "tokens": [], **empty}
    thirds = dict.fromkeys(BY_POSITION, [0.33333, None, 0])
    found = in_buckets([[1, 5, 0], [0, math.nan], [0]], 1)
    assert found == {"width": 1, "tokens": [3, 2, 1], **thirds}
