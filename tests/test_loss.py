"""Laws of loss.py: Eq. 1 to 5, the released loss, forward KL, supports, evaluation in chunks.

The expected values come from enumerating a small vocabulary in float64. Gradients are those of the
logits, unless a test says otherwise. README.md beside this file explains names like trl#5594.
"""

import copy
import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from torch.profiler import ProfilerActivity, profile

from loss import (
    SUPPORTS,
    forward_kl,
    full_vocab,
    in_chunks,
    sampled_token,
    support_of,
    top_k,
    top_k_released,
)
from plumbing import flags
from rollout import log_softmax, merge_ends

exact = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)
nearly = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)  # float32

OBJECTIVES = {  # name -> (log_p, log_q, y) -> (N,)
    "sampled": sampled_token,
    "full": lambda log_p, log_q, y: full_vocab(log_p, log_q),
}
for s in SUPPORTS:
    OBJECTIVES[f"top-k {s}"] = lambda log_p, log_q, y, s=s: top_k(log_p, log_q, 3, s)
    OBJECTIVES[f"top-k-released {s}"] = lambda p, q, y, s=s: top_k_released(p, q, 3, s)
CONTROLS = {"forward": lambda log_p, log_q, y: forward_kl(log_p, log_q)}  # of experiments alone
EVERY_LOSS = {**OBJECTIVES, **CONTROLS}
each_objective = pytest.mark.parametrize("objective", EVERY_LOSS.values(), ids=EVERY_LOSS.keys())
each_support = pytest.mark.parametrize("support", SUPPORTS)
each_top_k = pytest.mark.parametrize("top_k_loss", [top_k, top_k_released])
Y = torch.arange(4)  # the drawn tokens


def test_every_objective_of_the_command_line_is_held_to_these_laws():
    """If you add a divergence, add it to OBJECTIVES above. CONTROLS have no --objective."""
    assert {name.split()[0] for name in OBJECTIVES} == set(flags.OBJECTIVES)


def seeded(*shape, seed=0):
    """Normal random numbers."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@st.composite
def pairs(draw):
    """Student logits and teacher log-probabilities, (4, V) each, V in 5..8, flat to peaked."""
    V = draw(st.integers(5, 8))
    spread = draw(st.sampled_from([0.3, 1.0, 3.0]))
    z, u = spread * seeded(2, 4, V, seed=draw(st.integers(0, 10**6)))
    return z, u.log_softmax(-1)


def a_pair():
    z, u = seeded(2, 4, 7)
    return z, u.log_softmax(-1)


def with_grad(f, z):
    """f(log p) (N,), and the gradient of its sum with respect to the logits z (N, V)."""
    z = z.clone().requires_grad_()
    value = f(z.log_softmax(-1))
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


def agree(z, f, g):
    """Check that f and g are one function of log p, in value and gradient."""
    exact(with_grad(f, z), with_grad(g, z))


def of_token(log_p, y):
    """(N, V), (N,) -> (N,)."""
    return log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)


def over_samples(f, z):
    """The mean over y ~ p of f(log p, y), by enumeration: of its value and of its gradient."""
    p = z.softmax(-1)
    mean_value = 0
    mean_gradient = 0
    for v in range(z.size(-1)):
        y = torch.full((len(z),), v)
        value, gradient = with_grad(lambda log_p, y=y: f(log_p, y), z)
        mean_value += p[:, v] * value
        mean_gradient += p[:, v : v + 1] * gradient
    return mean_value, mean_gradient


def reverse_kl(log_p, log_q):
    return kl_divergence(Categorical(logits=log_p), Categorical(logits=log_q))


def mass(log_p, S):
    """sum_S p: (N, V), (N, k) -> (N,)."""
    return log_p.gather(-1, S).exp().sum(-1)


def truncated_kl(log_p, log_q, S):
    """sum_S p log(p/q), with nothing renormalised."""
    return (log_p.exp() * (log_p - log_q)).gather(-1, S).sum(-1)


def generalised_kl(log_p, log_q, S):
    """sum_S (p log(p/q) - p + q)."""
    return truncated_kl(log_p, log_q, S) - mass(log_p, S) + mass(log_q, S)


def bucketed(log_p, log_q, S):
    """KL(p || q) if all tokens outside S count as one."""
    p = 1 - mass(log_p, S)
    q = 1 - mass(log_q, S)
    return truncated_kl(log_p, log_q, S) + p * (p / q).log()


# --- Eq. 1, 2 and 3 -----------------------------------------------------------------------------


def test_the_gradient_of_eq_1_is_the_fixed_prefix_gradient_plus_the_future_term():
    """2.1: Eq. 1 is Eq. 2. Its gradient has a score-function term that every loss here leaves out.

    A world of two tokens: two steps, all four responses by enumeration. States: before the first
    token, after token 0, after token 1.
    """
    theta = seeded(4, seed=1).requires_grad_()
    log_p = (seeded(3, 2, 4) @ theta).log_softmax(-1)  # (3, 2)
    log_q = seeded(3, 2, seed=2).log_softmax(-1)
    eq_1 = 0
    for first, second in itertools.product([0, 1], [0, 1]):
        log_p_y = log_p[0, first] + log_p[1 + first, second]  # of the whole response
        log_q_y = log_q[0, first] + log_q[1 + first, second]
        eq_1 = eq_1 + log_p_y.exp() * (log_p_y - log_q_y)

    kl = full_vocab(log_p, log_q)  # (3,)
    visits = log_p[0].exp().detach()  # (2,) the probability of each of the later states
    fixed_prefixes = kl[0] + (visits * kl[1:]).sum()  # in value, Eq. 2
    future = (visits * kl[1:].detach() * log_p[0]).sum()  # the first choice moves the later KL

    def gradient(x):
        return torch.autograd.grad(x, theta, retain_graph=True)[0]

    exact(eq_1, fixed_prefixes)
    exact(gradient(eq_1), gradient(fixed_prefixes) + gradient(future))
    assert gradient(future).norm() > 0.05 * gradient(fixed_prefixes).norm()


@given(pairs())
def test_sampled_token_in_expectation_and_full_vocab_are_the_kl(pair):
    """Eq. 3 and 4: over y ~ p, value and gradient of Eq. 3 are those of KL(p || q)."""
    z, log_q = pair
    kl = with_grad(lambda log_p: reverse_kl(log_p, log_q), z)
    exact(with_grad(lambda log_p: full_vocab(log_p, log_q), z), kl)
    exact(over_samples(lambda log_p, y: sampled_token(log_p, log_q, y), z), kl)


@given(pairs(), st.sampled_from([1, 30]))
def test_each_logit_moves_as_the_teacher_says(pair, scale):
    """The sampled loss moves it by log q - log p of the drawn token. The full KL moves it by its
    own log q - log p, compared with the mean.

    MiniLLM: a gradient through the advantage has mean zero, so no expectation shows it, but it is
    noise. OPSD#2, OPSD#24, trl#5990: clipping log-ratios turns some logits the wrong way.
    """
    z = scale * pair[0]
    log_p = z.log_softmax(-1)
    log_q = (scale * pair[1]).log_softmax(-1)
    advantage = of_token(log_q - log_p, Y)
    drawn = torch.nn.functional.one_hot(Y, z.size(-1))
    value, gradient = with_grad(lambda log_p: sampled_token(log_p, log_q, Y), z)
    exact(value, -advantage)
    exact(-gradient, advantage.unsqueeze(-1) * (drawn - log_p.exp()))
    value, gradient = with_grad(lambda log_p: full_vocab(log_p, log_q), z)
    exact(-gradient, log_p.exp() * (log_q - log_p + value.unsqueeze(-1)))


@given(pairs())
def test_back_propagating_an_estimator_descends_another_divergence(pair):
    """With d = log p(y) - log q(y), k1 = d descends nothing, k2 = d^2 / 2 the reverse KL, and
    k3 = exp(-d) - 1 + d, verl's default, the forward KL."""
    z, log_q = pair

    def mean_gradient(f):
        return over_samples(lambda log_p, y: f(of_token(log_p - log_q, y)), z)[1]

    reverse = with_grad(lambda log_p: reverse_kl(log_p, log_q), z)[1]
    forward = with_grad(lambda log_p: reverse_kl(log_q, log_p), z)[1]
    exact(mean_gradient(lambda d: d), torch.zeros_like(z))
    exact(mean_gradient(lambda d: d**2 / 2), reverse)
    exact(mean_gradient(lambda d: (-d).exp() - 1 + d), forward)
    ours = over_samples(lambda log_p, y: sampled_token(log_p, log_q, y), z)[1]
    exact(ours, reverse)


@given(pairs(), st.integers(1, 5))
def test_a_top_k_kl_as_the_advantage_of_the_sampled_token_has_no_signal(pair, k):
    """It is one number a position, whatever was drawn: a baseline, with zero mean gradient.

    miles#2362, miles#2352, miles#2410, ms-swift#10079.
    """
    z, log_q = pair
    advantage = top_k(z.log_softmax(-1), log_q, k)
    mean = over_samples(lambda log_p, y: advantage * of_token(log_p, y), z)
    exact(mean[1], torch.zeros_like(z))


# --- Eq. 4, Eq. 5 and the released loss ---------------------------------------------------------


@each_top_k
@pytest.mark.parametrize("support", [s for s in SUPPORTS if s != "difference"])
@given(pair=pairs())
def test_all_variants_coincide_at_k_equal_to_the_vocabulary(top_k_loss, support, pair):
    """So the teacher's support does not make it a forward KL (Rethinking-OPD#21)."""
    z, log_q = pair
    all_of_it = functools.partial(top_k_loss, log_q=log_q, k=z.size(-1), support=support)
    agree(z, all_of_it, lambda log_p: full_vocab(log_p, log_q))


@given(pairs())
def test_top_k_is_nothing_at_k_1_but_released_is_something(pair):
    """On one token both renormalised distributions are 1 (Rethinking-OPD#15)."""
    z, log_q = pair
    agree(z, lambda log_p: top_k(log_p, log_q, 1), lambda log_p: 0 * log_p.sum(-1))
    value, gradient = with_grad(lambda log_p: top_k_released(log_p, log_q, 1), z)
    exact(value, of_token(z.log_softmax(-1) - log_q, z.argmax(-1)))
    assert (gradient.abs().sum(-1) > 0).all()


@given(pairs(), st.integers(1, 5))
def test_released_gradient_is_that_of_the_generalised_kl_over_the_mass(pair, k):
    """Rethinking-OPD#19: its weights are renormalised, its log-ratio is not."""
    z, log_q = pair
    S = z.topk(k).indices
    mass_p = mass(z.log_softmax(-1), S)
    released = with_grad(lambda log_p: top_k_released(log_p, log_q, k), z)[1]
    generalised = with_grad(lambda log_p: generalised_kl(log_p, log_q, S) / mass_p, z)[1]
    exact(released, generalised)


@pytest.mark.parametrize("tail", [0.01, 0.03, 0.1])
def test_the_released_gradient_is_nearly_eq_5s_if_the_set_holds_nearly_all(tail):
    """Rethinking-OPD#5: it is off by less than the mass outside the set (4.1: .01 to .03)."""
    z, log_q = seeded(2, 200, 100)
    for x in (z, log_q):  # sixteen tokens share 1 - tail
        x[:, :16] = x[:, :16].softmax(-1) * (1 - tail)
        x[:, 16:] = (x[:, 16:] / 10).softmax(-1) * tail
        x.log_()
    released = with_grad(lambda log_p: top_k_released(log_p, log_q), z)[1]
    eq_5 = with_grad(lambda log_p: top_k(log_p, log_q), z)[1]
    off = (released - eq_5).norm(dim=-1) / eq_5.norm(dim=-1)
    assert tail / 2 < off.mean() < tail


@given(pairs(), st.integers(1, 4))
def test_naive_truncation_pays_for_shrinking_the_mass(pair, k):
    """Nothing here sums p log(p/q) over a set without a correction (verl#5041).

    The gradient of such a sum has that of the mass as an extra term, even at p = q. The generalised
    KL, and the one with a bucket for the rest, have no gradient there and are never negative.
    """
    z, log_q = pair
    S = z.topk(k).indices
    of_mass = with_grad(lambda log_p: mass(log_p, S), z)[1]
    generalised = with_grad(lambda log_p: generalised_kl(log_p, log_q, S), z)[1]
    exact(with_grad(lambda log_p: truncated_kl(log_p, log_q, S), z)[1], generalised + of_mass)
    log_p = z.log_softmax(-1)
    at_the_teacher = with_grad(lambda log_p: truncated_kl(log_p, z.log_softmax(-1), S), z)[1]
    exact(at_the_teacher, of_mass)
    for loss in (top_k, top_k_released):
        ours = functools.partial(loss, log_q=z.log_softmax(-1), k=k)
        exact(with_grad(ours, z)[1], 0 * of_mass)
    assert (mass((z - 1e-3 * of_mass).log_softmax(-1), S) < mass(log_p, S)).all()
    for f in (generalised_kl, bucketed):
        rest = functools.partial(f, log_q=log_p, S=S)
        agree(z, rest, lambda log_p: 0 * log_p.sum(-1))
        assert (f(log_p, log_q, S) >= -1e-12).all()


def test_a_value_below_zero_is_not_clamped_and_teaches():
    """If the teacher puts more on the set, the value is negative, and a clamp would end all
    learning there (verl#7855, verl#7856)."""
    z = torch.tensor([[0.3, 0.29, 0.21, 0.2]]).log()
    log_q = torch.tensor([[0.45, 0.45, 0.05, 0.05]]).log()
    for f in (
        lambda log_p: sampled_token(log_p, log_q, torch.tensor([0])),
        lambda log_p: top_k_released(log_p, log_q, 2),
    ):
        value, gradient = with_grad(f, z)
        assert value.item() < -0.3
        assert gradient[0, 0] < -0.05  # a step makes token 0 likelier


# --- supports -----------------------------------------------------------------------------------


def likeliest(log_p, k):
    """The k likeliest tokens of one state: (V,) -> set of int."""
    log_p = log_p.tolist()
    return set(sorted(range(len(log_p)), key=lambda v: -log_p[v])[:k])


def set_of(log_p, log_q, k, support):
    """The support of one state, by definition (4.2): (V,), (V,) -> list of int."""
    P = likeliest(log_p, k)
    Q = likeliest(log_q, k)
    sets = {"student": P, "teacher": Q, "intersection": P & Q, "union": P | Q, "difference": P ^ Q}
    return sorted(sets[support])


def a_token_at_a_time(log_p, log_q, k, support, released):
    """Eq. 5 or the released loss at one state: (V,), (V,) -> a number."""
    S = set_of(log_p, log_q, k, support)
    mass_p = sum(log_p[v].exp() for v in S)
    mass_q = sum(log_q[v].exp() for v in S)
    total = 0 * log_p.sum()
    for v in S:
        p = log_p[v].exp() / mass_p
        q = log_q[v].exp() / mass_q
        if not released:
            total = total + p * (p / q).log()
            continue
        weight = log_p[v].exp() if support == "difference" else p
        advantage = (weight * (log_q[v] - log_p[v])).detach()
        total = total - advantage * (1 + log_p[v] - log_p[v].detach())
    return total


@each_top_k
@each_support
@given(pair=pairs(), k=st.integers(1, 5))
def test_every_support_against_python_sets(top_k_loss, support, pair, k):
    """Value and gradient are those of a loop over sets, a token at a time, and Eq. 5 is >= 0.

    On the difference the released loss weighs with p itself, as the authors' Non-Overlap arm does.
    ms-swift#9644: a server silently grants 20 tokens at most; here each token of the set counts
    once. OPSD#2: clipped entries make a KL negative. NeMo-RL: a test expects a KL of -490.5.
    """
    z, log_q = pair
    released = top_k_loss is top_k_released

    def by_loop(log_p):
        rows = zip(log_p, log_q)
        return torch.stack([a_token_at_a_time(*row, k, support, released) for row in rows])

    agree(z, lambda log_p: top_k_loss(log_p, log_q, k, support), by_loop)
    assert released or (by_loop(z.log_softmax(-1)) >= -1e-12).all()
    S, counts = support_of(z, log_q, k, support)
    for t in range(len(z)):
        assert sorted(S[t, counts[t]].tolist()) == set_of(z[t], log_q[t], k, support)


@each_objective
def test_what_cannot_be_compared_is_refused(objective):
    """A teacher of more padded tokens, fewer states, or bfloat16 would give a wrong number."""
    log_p, log_q = seeded(2, 4, 9).log_softmax(-1)
    padded = seeded(4, 12).log_softmax(-1)
    with pytest.raises(ValueError, match=r"log_p is \(4, 9\), log_q \(4, 12\): take the same"):
        objective(log_p, padded, Y)
    with pytest.raises(ValueError, match=r"log_q \(1, 9\)"):
        objective(log_p, log_q[:1], Y)
    for coarse in ((log_p.bfloat16(), log_q), (log_p, log_q.half())):
        with pytest.raises(ValueError, match=r"torch\.b?float16 is too coarse"):
            objective(*coarse, Y)


def test_there_is_one_token_a_state():
    """`gather` takes fewer, and would return fewer."""
    log_p, log_q = seeded(2, 4, 9).log_softmax(-1)
    with pytest.raises(ValueError, match=r"y is \(3,\), log_p \(4, 9\): one token a state"):
        sampled_token(log_p, log_q, Y[:3])


@each_top_k
def test_an_impossible_support_or_k_is_refused(top_k_loss):
    """The message names the value. The default is the student's sixteen likeliest tokens."""
    log_p, log_q = seeded(2, 5, 40).log_softmax(-1)
    assert torch.equal(top_k_loss(log_p, log_q), top_k_loss(log_p, log_q, 16, "student"))
    with pytest.raises(ValueError, match="support='both' is none of student, teacher"):
        top_k_loss(log_p, log_q, 3, "both")
    for k in (0, 41):
        with pytest.raises(ValueError, match=f"k={k} is outside 1..40"):
            top_k_loss(log_p, log_q, k)


@each_top_k
@pytest.mark.parametrize("support", ["intersection", "difference"])
def test_an_empty_support_gives_zero_with_zero_gradient(top_k_loss, support):
    """If the two sets share nothing, or everything, no token is left, and there is no 0/0."""
    z = torch.arange(6.0).repeat(2, 1)
    teachers = {"intersection": -z, "difference": z.where(z < 4, 9.0)}
    log_q = teachers[support].log_softmax(-1)
    assert not support_of(z, log_q, 3, support)[1].any()
    agree(z, lambda log_p: top_k_loss(log_p, log_q, 3, support), lambda log_p: 0 * log_p.sum(-1))


# --- what every objective keeps -----------------------------------------------------------------


@each_objective
@given(pair=pairs())
def test_student_equal_to_teacher_is_a_fixed_point(objective, pair):
    """At p = q loss and gradient are 0, whatever token was drawn."""
    z = pair[0]
    log_q = z.log_softmax(-1)
    agree(z, lambda log_p: objective(log_p, log_q, Y), lambda log_p: 0 * log_p.sum(-1))


@each_objective
def test_the_teacher_side_never_receives_a_gradient_nor_the_inputs_another_value(objective):
    """Nothing flows back through log q, whatever it was made from.

    torchforge#527; ms-swift's _align_vocab copies student logits, with their gradient, into columns
    that the teacher lacks.
    """
    z, log_q = a_pair()
    inputs = [z.log_softmax(-1).requires_grad_(), log_q.requires_grad_(), Y]
    before = [x.detach().clone() for x in inputs]
    objective(*inputs).sum().backward()
    assert inputs[0].grad.any()
    assert log_q.grad is None or not log_q.grad.any()
    for x, was in zip(inputs, before):
        assert torch.equal(x, was)


@each_objective
def test_the_teacher_matters(objective):
    """Another teacher gives another gradient (ms-swift#6857: fine-tuning on the student's own
    samples; torchforge#527: without a detach the teacher's term drops out)."""
    z, log_q = a_pair()
    one = with_grad(lambda log_p: objective(log_p, log_q, Y), z)[1]
    other = with_grad(lambda log_p: objective(log_p, log_q.flip(-1), Y), z)[1]
    assert (one - other).abs().max() > 1e-3


@each_objective
@given(pair=pairs())
def test_neither_order_nor_padding_changes_anything(objective, pair):
    """Positions do not mix, ids are only names, and a token that both rule out has no weight."""
    z, log_q = pair
    value, gradient = with_grad(lambda log_p: objective(log_p, log_q, Y), z)
    other = with_grad(lambda log_p: objective(log_p, log_q.flip(0), Y.flip(0)), z.flip(0))
    exact(other, (value.flip(0), gradient.flip(0)))
    renamed = z.size(-1) - 1 - Y
    other = with_grad(lambda log_p: objective(log_p, log_q.flip(-1), renamed), z.flip(-1))
    exact(other, (value, gradient.flip(-1)))
    padded = functools.partial(torch.nn.functional.pad, pad=(0, 3), value=-torch.inf)
    other = with_grad(lambda log_p: objective(log_p, padded(log_q), Y), padded(z))
    exact(other, (value, torch.nn.functional.pad(gradient, (0, 3))))


@each_objective
def test_any_upstream_gradient_reaches_each_position_as_if_it_stood_alone(objective):
    """Liger#968, Liger#678, Liger#1298: losses that are not reduced, under random weights."""
    z, log_q = a_pair()
    weight = seeded(4, seed=1)
    ours = with_grad(lambda log_p: weight * objective(log_p, log_q, Y), z)[1]
    for t in range(4):
        c = slice(t, t + 1)
        alone = with_grad(lambda log_p, c=c: objective(log_p, log_q[c], Y[c]), z[c])
        exact(ours[c], weight[t] * alone[1])


def extreme_logits(seed):
    """Logits of -inf, +-100 and between, (64, 5), each row with a finite one."""
    values = torch.tensor([-torch.inf, -100.0, -50.0, 0.0, 3.0, 100.0])
    picked = torch.randint(6, (64, 5), generator=torch.Generator().manual_seed(seed))
    z = values[picked]
    return torch.where(z.isinf().all(-1, keepdim=True), 0.0, z)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
@each_objective
def test_extreme_logits_give_finite_losses_and_gradients(objective, temperature, dtype):
    """-inf may stand on either side or on both, also at the drawn token; 100 / .05 is 2,000 nats.

    trl#5594. Soup#719: a divergence of probabilities is finite, but its gradient is NaN.
    """
    z = extreme_logits(seed=0).to(dtype).requires_grad_()
    log_q = log_softmax(extreme_logits(seed=1).to(dtype), temperature)
    for token in range(5):
        loss = objective(log_softmax(z, temperature), log_q, torch.full((64,), token))
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), z)[0].isfinite().all()


# --- direction ----------------------------------------------------------------------------------


@given(pairs())
def test_forward_kl_is_the_kl_from_teacher_to_student(pair):
    """2609.35259: KL(q || p), never negative, and its gradient for the logits is p - q."""
    z, log_q = pair
    value, gradient = with_grad(lambda log_p: forward_kl(log_p, log_q), z)
    teacher = Categorical(logits=log_q)
    student = Categorical(logits=z)
    exact(value, kl_divergence(teacher, student))
    assert (value >= -1e-12).all()
    exact(gradient, z.softmax(-1) - log_q.exp())


@pytest.mark.parametrize("divergence", [full_vocab, top_k, top_k_released, forward_kl])
def test_reverse_kl_picks_a_mode_and_forward_kl_covers_both(divergence):
    """One bell is fitted to a teacher with two: our losses settle on one, forward KL covers both.

    OPSD#14, GLM-5#34, slime#2254: which KL is it?
    """
    v = torch.arange(41.0).unsqueeze(0)  # (1, 41)
    log_q = torch.logaddexp(-((v - 10) ** 2) / 8, -((v - 30) ** 2) / 8).log_softmax(-1)
    bell = torch.tensor([15.0, 3.0], requires_grad=True)  # mean and width, left of the middle
    adam = torch.optim.Adam([bell], lr=0.2)
    for _ in range(200):
        log_p = (-(((v - bell[0]) / bell[1]) ** 2) / 2).log_softmax(-1)
        adam.zero_grad()
        divergence(log_p, log_q).sum().backward()
        adam.step()
    left = log_p[0, :20].exp().sum()
    assert 0.4 < left < 0.6 if divergence is forward_kl else left > 0.99


# --- in_chunks ----------------------------------------------------------------------------------


class LogProbs(torch.nn.Module):
    """Hidden states (..., H) -> log-probabilities (..., V). kind names what its head does.

    "low-rank": a frozen head, and what LoRA adds to it. "soft-capped": as Gemma 2. "merged":
    several ends count as one. "no head": the states are the logits.
    """

    def __init__(self, H, V, kind="linear", temperature=1.0):
        super().__init__()
        self.kind = kind
        self.temperature = temperature
        self.head = torch.nn.Identity() if kind == "no head" else torch.nn.Linear(H, V)
        for parameter in self.head.parameters():
            torch.nn.init.normal_(parameter)
        if "low-rank" in kind:
            self.head.requires_grad_(False)
            self.A = torch.nn.Parameter(0.3 * torch.randn(H, 2))
            self.B = torch.nn.Parameter(0.3 * torch.randn(2, V))

    def forward(self, h):
        z = self.head(h)
        if "low-rank" in self.kind:
            z = z + h @ self.A @ self.B
        if "soft-capped" in self.kind:
            z = 2 * (z / 2).tanh()
        log_p = log_softmax(z, self.temperature)
        return merge_ends(log_p, torch.tensor([5, 2, 9])) if self.kind == "merged" else log_p


KINDS = ("linear", "no head", "soft-capped", "low-rank", "soft-capped low-rank", "merged")
each_kind = pytest.mark.parametrize("kind", KINDS)


def positions(N=11, V=23, H=6, H_teacher=4, kind="linear", temperature=1.0):
    """What in_chunks reads: dict of its arguments."""
    torch.manual_seed(0)
    H = V if kind == "no head" else H
    return {
        "h_p": torch.randn(N, H),
        "h_q": torch.randn(N, H_teacher),
        "log_p_of": LogProbs(H, V, kind, temperature),
        "log_q_of": LogProbs(H_teacher, V),
        "y": torch.randint(V, (N,)),
    }


def eagerly(per_position, h_p, h_q, log_p_of, log_q_of, y):
    """What in_chunks must equal: whole tensors and plain autograd."""
    log_q = None if h_q is None else log_q_of(h_q)
    return per_position(log_p_of(h_p), log_q, y)


def learned(evaluate, per_position, inputs, **how):
    """The values, and the gradients of states and head under random weights.

    The weight of every other position is 0.
    """
    weight = seeded(len(inputs["y"])).float()
    weight[::2] = 0
    h_p = inputs["h_p"].clone().requires_grad_()
    head = inputs["log_p_of"]
    head.zero_grad()
    values = evaluate(per_position, **{**inputs, "h_p": h_p}, **how)
    (weight * values["loss"]).sum().backward()
    gradients = {"states": h_p.grad}
    for name, parameter in head.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    return {name: x.detach() for name, x in values.items()}, gradients


def loss_of(objective):
    """A per_position: a loss, and what is only measured."""

    def per_position(log_p, log_q, y):
        with torch.no_grad():
            entropy = torch.special.entr(log_p.exp()).sum(-1)
        return {"loss": objective(log_p, log_q, y), "entropy": entropy, "top": log_p.argmax(-1)}

    return per_position


full = loss_of(OBJECTIVES["full"])
union = loss_of(OBJECTIVES["top-k union"])
default_loss = loss_of(lambda log_p, log_q, y: top_k(log_p, log_q))


@pytest.mark.parametrize("N, chunk", [(11, 1), (11, 3), (11, 11), (11, None), (0, None), (1, 9)])
@each_objective
def test_in_chunks_is_plain_autograd(objective, N, chunk):
    """Values and gradients agree, whatever the chunk and the upstream gradient.

    trl#5731: a fast path with another loss and temperature. trl#6526: no temperature in the
    chunked loss. Liger#330, Liger#974: positions that do not count must get no gradient.
    LMOps#38: a process without a response token has zero gradients, and there is no 0/0.
    """
    inputs = positions(N, temperature=0.7)
    how = {"chunk": chunk} if chunk else {}
    ours = learned(in_chunks, loss_of(objective), inputs, **how)
    nearly(ours, learned(eagerly, loss_of(objective), inputs))
    assert ours[1].keys() == {"states", "head.weight", "head.bias"}
    assert not ours[1]["states"][::2].any()
    assert ours[0]["loss"].shape == (N,)


@pytest.mark.parametrize("per_position", [full, union], ids=["full", "union"])
@each_kind
def test_any_head_learns_in_chunks_what_it_learns_eagerly(kind, per_position):
    """A head is called, and its weight is not read: there may be more to it.

    What is frozen gets no gradient.
    """
    inputs = positions(kind=kind)
    ours = learned(in_chunks, per_position, inputs, chunk=4)
    nearly(ours, learned(eagerly, per_position, inputs))
    assert all(gradient.any() for gradient in ours[1].values())
    assert len(ours[1]) == (1 if kind == "no head" else 3)


@pytest.mark.parametrize("chunk", [4, 128])
def test_in_chunks_works_without_a_teacher(chunk):
    """Then log_q is None, as in supervised fine-tuning."""
    inputs = {**positions(), "h_q": None, "log_q_of": None}

    def per_position(log_p, log_q, y):
        assert log_q is None
        return {"loss": -of_token(log_p, y)}

    ours = learned(in_chunks, per_position, inputs, chunk=chunk)
    nearly(ours, learned(eagerly, per_position, inputs))


@each_objective
def test_without_a_teacher_a_divergence_is_an_error(objective):
    """verl#7769, verl#5592, tinker#103, trl#5765: what is missing is not a distance of 0."""
    with pytest.raises((AttributeError, TypeError)):
        in_chunks(loss_of(objective), **{**positions(), "h_q": None})


@pytest.mark.parametrize("name", ["h_p", "h_q", "y"])
def test_states_and_tokens_go_in_pairs(name):
    """A y that is too short would go unnoticed by a loss that does not look at it."""
    inputs = positions()
    inputs[name] = inputs[name][1:]
    with pytest.raises(ValueError, match="has 1[01] positions, y has 1[01]"):
        in_chunks(full, **inputs)


@pytest.mark.parametrize("learns", [False, True])
def test_no_chunk_is_larger_than_asked_and_each_is_evaluated_once_a_pass(learns):
    """What is only measured has no graph. The backward pass computes the student's logits again."""
    inputs = positions()
    calls = {"log_p_of": [], "log_q_of": []}
    for side, seen in calls.items():
        inputs[side].register_forward_hook(lambda _, args, z, seen=seen: seen.append(len(z)))
    with torch.set_grad_enabled(learns):
        loss = in_chunks(full, **inputs, chunk=4)["loss"]
    assert calls == {"log_p_of": [4, 4, 3], "log_q_of": [4, 4, 3]}
    assert loss.requires_grad == learns
    if learns:
        loss.sum().backward()
        assert sorted(calls["log_p_of"]) == [3, 3, 4, 4, 4, 4]


@pytest.mark.parametrize("frozen", ["states", "head"])
def test_a_gradient_goes_only_where_it_is_asked_for(frozen):
    """A frozen head or constant states get none. The other side gets what it would have had."""
    found = []
    for evaluate in (eagerly, functools.partial(in_chunks, chunk=4)):
        inputs = positions()
        leaves = {"states": inputs["h_p"], "head": inputs["log_p_of"].head.weight}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name != frozen)
        evaluate(full, **inputs)["loss"].sum().backward()
        found.append({name: leaf.grad for name, leaf in leaves.items()})
    nearly(*found)
    assert found[1][frozen] is None


def test_in_chunks_gives_the_teacher_no_gradient():
    """It gets none even if states and head ask for one, and the loss does not detach."""
    inputs = positions()
    inputs["h_q"].requires_grad_()
    learned(in_chunks, loss_of(lambda log_p, log_q, y: reverse_kl(log_p, log_q)), inputs, chunk=4)
    assert inputs["log_p_of"].head.weight.grad.any()
    assert inputs["log_q_of"].head.weight.grad is None
    assert inputs["h_q"].grad is None


@pytest.mark.parametrize("objective", [full_vocab, top_k, forward_kl])
def test_bf16_states_are_scored_in_float32(objective):
    """A divergence of near-equal bf16 models stays >= -1e-6 (ms-swift#10156: mixed precision)."""
    inputs = positions(N=256, V=500)
    h = inputs["h_p"].bfloat16()
    close = h + 2**-8 * torch.randn_like(h)
    head = inputs["log_p_of"].bfloat16()
    per_position = loss_of(lambda log_p, log_q, y: objective(log_p, log_q))
    loss = in_chunks(per_position, h, close, head, head, inputs["y"])["loss"]
    assert loss.dtype == torch.float32
    assert (loss >= -1e-6).all()
    assert loss.sum() > 0


@pytest.mark.parametrize("kind", ["linear", "soft-capped", "low-rank", "shared"])
def test_a_float32_head_learns_from_states_of_16_bits(kind):
    """Gradients are the eager ones but for some roundings to 8 bits, each in its own dtype.

    "shared" is self-distillation: the teacher reads the same head without a gradient. Autocast
    keeps the weight that it has cast, and must not keep one that has no gradient.
    """
    inputs = positions(N=64, H=16, H_teacher=16, kind=kind)
    for name in ("h_p", "h_q"):
        inputs[name] = inputs[name].bfloat16()
    plain = inputs
    if kind == "shared":
        plain = {**inputs, "log_q_of": copy.deepcopy(inputs["log_p_of"]).requires_grad_(False)}
        inputs["log_q_of"] = inputs["log_p_of"]
    with torch.autocast("cpu", torch.bfloat16):
        wanted = learned(eagerly, full, plain)[1]
        ours = learned(in_chunks, full, inputs, chunk=5)[1]
    assert ours.keys() == wanted.keys()
    assert ours["states"].dtype == torch.bfloat16
    for name, gradient in ours.items():
        assert gradient.dtype == wanted[name].dtype
        off = (gradient - wanted[name]).float().norm()
        assert off < 2**-5 * wanted[name].float().norm(), name


@each_objective
def test_everything_is_made_on_the_device_of_the_states(objective):
    """The default device "meta" holds no numbers."""
    inputs = positions()
    here = in_chunks(loss_of(objective), **inputs, chunk=4)
    with torch.device("meta"):
        there = in_chunks(loss_of(objective), **inputs, chunk=4)
    torch.testing.assert_close(there, here, rtol=0, atol=0)


# --- memory -------------------------------------------------------------------------------------


def peak_bytes(f):
    """The most that f held at once beyond what was there before it.

    Every allocation and release is counted. What the process keeps resident depends on its
    allocator.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        f()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    held = torch.tensor([e.nbytes() for e in events]).cumsum(0)
    return held.max().item()


def test_peak_memory_is_a_sixth_of_eager():
    """Eager autograd holds N x V numbers several times over, chunks do not hold them once.

    DistillKit#4, ms-swift#7295, verl#6593: out of memory at the logits.
    """
    inputs = positions(N=512, V=4000, H=16, H_teacher=16)
    inputs["log_q_of"].requires_grad_(False)
    eager = peak_bytes(lambda: learned(eagerly, default_loss, inputs))
    chunked = peak_bytes(lambda: learned(in_chunks, default_loss, inputs, chunk=16))
    assert eager > 3 * 4 * 512 * 4000
    assert chunked <= eager / 6


@each_kind
def test_memory_does_not_grow_with_the_number_of_positions(kind):
    """Four times the positions cost nothing but their states, gradients and values.

    NeMo-RL#3272, NeMo-RL#3314, NeMo-RL#3495, NeMo-RL#4222, Soup#722: a loop over chunks without
    checkpointing bounds nothing. Logits would be 4.6 MB.
    """
    peaks = []
    for N in (192, 768):
        inputs = positions(N=N, V=50 if kind == "no head" else 2000, H=4, kind=kind)
        peaks.append(peak_bytes(lambda x=inputs: learned(in_chunks, default_loss, x, chunk=64)))
    H = inputs["h_p"].size(1)
    assert peaks[1] - peaks[0] <= 4 * (768 - 192) * (4 * H + 32)  # bytes


def test_the_gradients_of_the_head_do_not_pile_up():
    """At most three tensors of (V, H) exist: a chunk's, those before it, the sum."""
    peaks = []
    for N in (3, 12):
        inputs = positions(N=N, V=4000, H=64)
        peaks.append(peak_bytes(lambda x=inputs: learned(in_chunks, default_loss, x, chunk=1)))
    one = 4 * 4000 * 64  # bytes
    assert one <= peaks[0] < 3.2 * one
    assert peaks[1] - peaks[0] < 0.1 * one
