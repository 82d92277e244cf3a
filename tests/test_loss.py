"""Laws of loss.py: Eq. 3, 4, 5, the released surrogate, the supports, evaluation in chunks.

Oracles enumerate a small vocabulary in float64; gradients are those of the logits unless a test says otherwise.
Facts and issues in brackets: README.md beside this file.
"""

import copy
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from torch.profiler import ProfilerActivity, profile

from analysis import diagnose
from loss import SUPPORTS, full_vocab, in_chunks, sampled_token, token_sets, top_k, top_k_released
from plumbing import flags

OBJECTIVES = {  # name -> (log_p, log_q, y) -> (N,)
    "sampled": sampled_token,
    "full": lambda log_p, log_q, y: full_vocab(log_p, log_q),
    **{f"top-k {s}": lambda log_p, log_q, y, s=s: top_k(log_p, log_q, 3, s) for s in SUPPORTS},
    **{
        f"top-k-released {s}": lambda log_p, log_q, y, s=s: top_k_released(log_p, log_q, 3, s)
        for s in SUPPORTS
    },
}
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
each_support = pytest.mark.parametrize("support", SUPPORTS)
exact = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)


def test_every_objective_of_the_command_line_is_held_to_these_laws():
    """Who adds a divergence adds it to OBJECTIVES above."""
    assert {name.split()[0] for name in OBJECTIVES} == set(flags.OBJECTIVES)


@st.composite
def pairs(draw):
    """Student logits (N, V) and teacher log-probabilities (N, V), float64, V in 5..8, from flat to peaked."""
    size, scale = draw(st.integers(5, 8)), draw(st.sampled_from([0.3, 1.0, 3.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    z, u = (
        scale * torch.randn(4, size, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    return z, u.log_softmax(-1)


def a_pair():
    generator = torch.Generator().manual_seed(0)
    z, u = (torch.randn(4, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    return z, u.log_softmax(-1)


def with_grad(f, z):
    """f(log p) (N,) and the gradient of its sum with respect to the logits z (N, V)."""
    z = z.clone().requires_grad_()
    value = f(z.log_softmax(-1))
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


def over_samples(f, z):
    """E over y ~ p of f(log p, y), exactly: its value (N,) and the mean of its gradient (N, V)."""
    each = [
        with_grad(lambda log_p: f(log_p, torch.full((len(z),), v)), z) for v in range(z.size(-1))
    ]
    p = z.softmax(-1).unbind(-1)  # V times (N,)
    return (
        sum(p_v * value for p_v, (value, _) in zip(p, each, strict=True)),
        sum(p_v[:, None] * gradient for p_v, (_, gradient) in zip(p, each, strict=True)),
    )


def reverse_kl(log_p, log_q):
    return kl_divergence(Categorical(logits=log_p), Categorical(logits=log_q))


def generalised_kl(log_p, log_q, S):
    """sum_S (p log(p/q) - p + q), zero and stationary at p = q on any fixed set S (N, k)."""
    log_p, log_q = log_p.gather(-1, S), log_q.gather(-1, S)
    return (log_p.exp() * (log_p - log_q) - log_p.exp() + log_q.exp()).sum(-1)


# --- Eq. 3: the sampled token --------------------------------------------------------------------------------------


@given(pairs())
def test_sampled_token_is_the_kl_in_expectation_value_and_gradient(pair):
    """E over y ~ p of the policy gradient of Eq. 3 is grad KL(p || q), exactly (fact 1)."""
    z, log_q = pair
    expected = with_grad(lambda log_p: reverse_kl(log_p, log_q), z)
    for ours, theirs in zip(
        over_samples(lambda log_p, y: sampled_token(log_p, log_q, y), z), expected, strict=True
    ):
        exact(ours, theirs)


@given(pairs())
def test_back_propagating_an_estimator_descends_another_divergence(pair):
    """Why Eq. 3 needs the detached advantage: k1 descends nothing, k2 reverse KL, k3 forward KL
    (fact 3; verl's default yaml)."""
    z, log_q = pair

    def mean_gradient(f):
        return over_samples(
            lambda log_p, y: f((log_p - log_q).gather(-1, y[:, None]).squeeze(-1)), z
        )[1]

    reverse = with_grad(lambda log_p: reverse_kl(log_p, log_q), z)[1]
    forward = with_grad(lambda log_p: reverse_kl(log_q, log_p), z)[1]
    exact(mean_gradient(lambda d: d), torch.zeros_like(z))
    exact(mean_gradient(lambda d: d**2 / 2), reverse)
    exact(mean_gradient(lambda d: (-d).exp() - 1 + d), forward)


@given(pairs(), st.integers(1, 5))
def test_a_top_k_kl_as_the_advantage_of_the_sampled_token_has_no_signal(pair, k):
    """One number a position, whatever token was drawn, is a baseline: zero expected gradient
    (fact 2; miles#2362, #2352, #2410, ms-swift#10079)."""
    z, log_q = pair
    advantage = top_k(z.log_softmax(-1), log_q, k)
    gradient = over_samples(
        lambda log_p, y: advantage * log_p.gather(-1, y[:, None]).squeeze(-1), z
    )[1]
    exact(gradient, torch.zeros_like(z))


# --- Eq. 4, Eq. 5 and the released surrogate -----------------------------------------------------------------------


@given(pairs())
def test_full_vocab_is_the_kl(pair):
    """Eq. 4, value and gradient, against torch.distributions."""
    z, log_q = pair
    for ours, theirs in zip(
        with_grad(lambda log_p: full_vocab(log_p, log_q), z),
        with_grad(lambda log_p: reverse_kl(log_p, log_q), z),
        strict=True,
    ):
        exact(ours, theirs)


@given(pairs())
def test_weighted_log_ratios_over_the_vocabulary_have_the_gradient_of_the_kl(pair):
    """sum_V p (log p - log q) grad log p = grad KL(p || q): the -1 of the product rule sums to nothing."""
    z, log_q = pair
    weight = z.softmax(-1) * (z.log_softmax(-1) - log_q)
    exact(
        with_grad(lambda log_p: (weight * log_p).sum(-1), z)[1],
        with_grad(lambda log_p: full_vocab(log_p, log_q), z)[1],
    )


@pytest.mark.parametrize("objective", [top_k, top_k_released])
@pytest.mark.parametrize("support", [s for s in SUPPORTS if s != "difference"])
@given(pair=pairs())
def test_all_variants_coincide_at_k_equal_to_the_vocabulary(objective, support, pair):
    """At k = V every support is the vocabulary and every objective is Eq. 4, in value and gradient (fact 6):
    the teacher's support too, which makes no forward KL of it (Rethinking-OPD#21)."""
    z, log_q = pair
    for ours, theirs in zip(
        with_grad(lambda log_p: objective(log_p, log_q, z.size(-1), support), z),
        with_grad(lambda log_p: full_vocab(log_p, log_q), z),
        strict=True,
    ):
        exact(ours, theirs)


@given(pairs())
def test_top_k_is_nothing_at_k_1_but_released_is_something(pair):
    """A renormalised set of one token is certain on both sides
    (fact 6, Rethinking-OPD#15); the released log-ratio is not renormalised."""
    z, log_q = pair
    for part in with_grad(lambda log_p: top_k(log_p, log_q, 1), z):
        exact(part, torch.zeros_like(part))
    value, gradient = with_grad(lambda log_p: top_k_released(log_p, log_q, 1), z)
    best = z.argmax(-1, keepdim=True)
    exact(value, (z.log_softmax(-1) - log_q).gather(-1, best).squeeze(-1))
    assert (gradient.abs().sum(-1) > 0).all()


@each_objective
@given(pair=pairs())
def test_student_equal_to_teacher_is_a_fixed_point(objective, pair):
    """Zero loss and zero gradient at p = q, whatever token was drawn."""
    z, _ = pair
    y = torch.arange(len(z))
    for part in with_grad(lambda log_p: objective(log_p, z.log_softmax(-1), y), z):
        exact(part, torch.zeros_like(part))


@each_support
@given(pair=pairs(), k=st.integers(1, 5))
def test_top_k_is_never_negative(support, pair, k):
    """Eq. 5 is a KL between two distributions on the set (OPSD#2: clipped entries made it negative;
    a test of NeMo-RL pins one at -490.5)."""
    assert (top_k(pair[0].log_softmax(-1), pair[1], k, support) >= -1e-12).all()


@given(pairs(), st.integers(1, 5))
def test_released_gradient_is_that_of_the_generalised_kl_over_the_mass(pair, k):
    """Weights renormalised, log-ratio not (fact 5, Rethinking-OPD#19): grad sum_S
    (p log(p/q) - p + q), divided by sum_S p held constant."""
    z, log_q = pair
    S = z.topk(k).indices
    mass = z.softmax(-1).gather(-1, S).sum(-1)
    exact(
        with_grad(lambda log_p: top_k_released(log_p, log_q, k), z)[1],
        with_grad(lambda log_p: generalised_kl(log_p, log_q, S) / mass, z)[1],
    )


@given(pairs(), st.integers(1, 5))
def test_released_and_top_k_gradients_differ_along_the_mass(pair, k):
    """Released - Eq. 5 = c grad log Z_p with c = KL(p' || q') + log(Z_p / Z_q)."""
    z, log_q = pair
    S = z.topk(k).indices
    log_Z_p, log_Z_q = (x.gather(-1, S).logsumexp(-1) for x in (z.log_softmax(-1), log_q))
    c = top_k(z.log_softmax(-1), log_q, k) + log_Z_p - log_Z_q
    difference = [
        with_grad(lambda log_p: f(log_p, log_q, k), z)[1] for f in (top_k_released, top_k)
    ]
    exact(
        difference[0] - difference[1],
        with_grad(lambda log_p: c * log_p.gather(-1, S).logsumexp(-1), z)[1],
    )


@given(pairs(), st.integers(1, 4))
def test_naive_truncation_pays_for_shrinking_the_mass(pair, k):
    """Why nothing here sums p log(p/q) over a set as it is:
    its gradient has the mass as an extra term, p = q included (fact 4, verl#5041)."""
    z, log_q = pair
    S = z.topk(k).indices

    def naive(log_q):
        def cut(log_p):
            log_p_S = log_p.gather(-1, S)
            return (log_p_S.exp() * (log_p_S - log_q.gather(-1, S))).sum(-1)

        return with_grad(cut, z)[1]

    mass, of_mass = with_grad(lambda log_p: log_p.gather(-1, S).exp().sum(-1), z)
    exact(naive(log_q), with_grad(lambda log_p: generalised_kl(log_p, log_q, S), z)[1] + of_mass)
    at_the_teacher = naive(z.log_softmax(-1))
    exact(at_the_teacher, of_mass)
    step = z - 1e-3 * at_the_teacher
    assert (step.softmax(-1).gather(-1, S).sum(-1) < mass).all()


@given(pairs(), st.integers(2, 4))
def test_difference_weighs_raw_in_released_and_renormalised_in_top_k(pair, k):
    """The authors' Non-Overlap arm keeps p itself as weight: smaller by exactly the mass of the set (paper 4.2)."""
    z, log_q = pair
    log_p = z.log_softmax(-1)
    S, member = token_sets(log_p, log_q, k, "difference")
    p, q = (torch.where(member, x.gather(-1, S).exp(), 0) for x in (log_p, log_q))
    exact(
        top_k_released(log_p, log_q, k, "difference"), (p * (log_p - log_q).gather(-1, S)).sum(-1)
    )
    p, q = (x / x.sum(-1, keepdim=True) for x in (p, q))
    exact(top_k(log_p, log_q, k, "difference"), torch.where(member, p * (p / q).log(), 0).sum(-1))


def oracle_set(p, q, k, support):
    """One position's token set from sorted lists: the definition in words."""
    P, Q = (set(sorted(range(len(x)), key=lambda v: -x[v])[:k]) for x in (p.tolist(), q.tolist()))
    return sorted(
        {"student": P, "teacher": Q, "intersection": P & Q, "union": P | Q, "difference": P ^ Q}[
            support
        ]
    )


def oracle(log_p, log_q, k, support, released):
    """Eq. 5 or the released surrogate, one position and one token at a time."""
    values = []
    for log_p_t, log_q_t in zip(log_p, log_q, strict=True):
        S, p, q = oracle_set(log_p_t.detach(), log_q_t, k, support), log_p_t.exp(), log_q_t.exp()
        Z_p, Z_q = sum(p[v] for v in S), sum(q[v] for v in S)
        if released:
            scale = 1 if support == "difference" or not S else Z_p.detach()
            terms = [
                (p[v] / scale * (p[v] / q[v]).log()).detach()
                * (1 + log_p_t[v] - log_p_t[v].detach())
                for v in S
            ]
        else:
            terms = [p[v] / Z_p * ((p[v] / Z_p) / (q[v] / Z_q)).log() for v in S]
        values.append(sum(terms, 0 * p.sum()))
    return torch.stack(values)


@pytest.mark.parametrize("released", [False, True])
@each_support
@given(pair=pairs(), k=st.integers(1, 5))
def test_every_support_against_python_sets(released, support, pair, k):
    """Value and gradient of every objective on every support equal a loop over python sets."""
    z, log_q = pair
    objective = top_k_released if released else top_k
    for ours, theirs in zip(
        with_grad(lambda log_p: objective(log_p, log_q, k, support), z),
        with_grad(lambda log_p: oracle(log_p, log_q, k, support, released), z),
        strict=True,
    ):
        exact(ours, theirs)


@pytest.mark.parametrize("objective", [top_k, top_k_released])
def test_an_impossible_support_or_k_is_refused(objective):
    """The message repeats the value that was given."""
    log_p, log_q = a_pair()
    with pytest.raises(ValueError, match="support='both'"):
        objective(log_p, log_q, 3, "both")
    for k in (0, log_p.size(-1) + 1):
        with pytest.raises(ValueError, match=f"k={k} "):
            objective(log_p, log_q, k)


# --- what every objective keeps ------------------------------------------------------------------------------------


@each_objective
def test_the_teacher_side_never_receives_a_gradient(objective):
    """log q is held constant, whatever it was made from (torchforge#527; ms-swift's _align_vocab copies
    student logits, gradient and all, into columns that the teacher lacks)."""
    z, log_q = a_pair()
    z.requires_grad_(), log_q.requires_grad_()
    loss = objective(z.log_softmax(-1), log_q, torch.arange(len(z))).sum()
    of_student, of_teacher = torch.autograd.grad(loss, (z, log_q), allow_unused=True)
    assert of_student.abs().sum() > 0
    assert of_teacher is None or not of_teacher.any()


@each_objective
def test_the_teacher_matters(objective):
    """Another teacher gives another gradient (ms-swift#6857: SFT on own samples;
    torchforge#527: without a detach the teacher's term had dropped out)."""
    z, log_q = a_pair()
    y = torch.arange(len(z))
    one, other = (
        with_grad(lambda log_p: objective(log_p, q, y), z)[1] for q in (log_q, log_q.flip(-1))
    )
    assert (one - other).abs().max() > 1e-3


@each_objective
def test_inputs_are_not_written_to(objective):
    """The arguments are bit for bit what they were, gradient taken."""
    z, log_q = a_pair()
    log_p, y = z.log_softmax(-1).requires_grad_(), torch.arange(len(z))
    before = [x.detach().clone() for x in (log_p, log_q, y)]
    objective(log_p, log_q, y).sum().backward()
    assert all(torch.equal(x, b) for x, b in zip((log_p, log_q, y), before, strict=True))


@each_objective
@given(pair=pairs())
def test_a_rectangle_gives_what_its_positions_give_packed(objective, pair):
    """(B, T, V) and (N, V) are the same positions: whatever axes stand before the vocabulary, each is on its own."""
    z, log_q = pair
    y = torch.arange(len(z))
    packed, rectangle = (
        with_grad(lambda log_p: objective(log_p, q, at), x)
        for x, q, at in ((z, log_q, y), (z.view(2, 2, -1), log_q.view(2, 2, -1), y.view(2, 2)))
    )
    exact(rectangle[0], packed[0].view(2, 2))
    exact(rectangle[1], packed[1].view_as(rectangle[1]))


@pytest.mark.parametrize("objective", [top_k, top_k_released])
def test_where_nothing_is_said_it_is_the_students_sixteen_likeliest(objective):
    """The defaults: the student's support, k = 16."""
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = torch.randn(2, 5, 40, dtype=torch.float64, generator=generator).log_softmax(-1)
    assert torch.equal(objective(log_p, log_q), objective(log_p, log_q, 16, "student"))


@pytest.mark.parametrize("objective", [top_k, top_k_released])
@pytest.mark.parametrize("support", ["intersection", "difference"])
def test_an_empty_support_gives_zero_with_zero_gradient(objective, support):
    """Top-3 sets that share nothing, or everything, leave no token: loss 0 and a finite zero gradient, no 0/0."""
    z = torch.arange(6, dtype=torch.float64).repeat(2, 1)
    log_q = (
        z.flip(-1) if support == "intersection" else z + torch.tensor([0, 0, 0, 0, 0.1, 0.3])
    ).log_softmax(-1)
    assert not token_sets(z, log_q, 3, support)[1].any()
    for part in with_grad(lambda log_p: objective(log_p, log_q, 3, support), z):
        assert torch.equal(part, torch.zeros_like(part))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_objective
def test_extreme_logits_give_finite_losses_and_gradients(objective, dtype):
    """Logits of +-100 and -inf on either side, or on both, at drawn tokens too (Soup#719, trl#5594)."""
    inf = float("inf")
    z = torch.tensor(
        [
            [100.0, -100, 0, 50, -50],
            [-100, 100, 3, 2, 1],
            [-inf, 5, 4, -inf, 3],
            [1, 2, 3, 4, 5],
            [-inf, 0, -inf, -inf, -inf],
        ]
    )
    u = torch.tensor(
        [
            [-100.0, 100, 0, 50, -50],
            [-100, 100, 3, 2, 1],
            [0, -inf, 4, -inf, -inf],
            [-inf, -inf, -inf, -inf, 0],
            [0, -inf, 1, 2, 3],
        ]
    )
    log_q = u.to(dtype).log_softmax(-1)
    for token in range(z.size(-1)):
        value, gradient = with_grad(
            lambda log_p: objective(log_p, log_q, torch.full((len(z),), token)), z.to(dtype)
        )
        assert value.isfinite().all() and gradient.isfinite().all()


# --- direction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [full_vocab, functools.partial(top_k, k=4)])
def test_a_student_that_is_sure_of_a_mistake_is_hardly_corrected(objective):
    """Why OPD needs a start (5.1): where p is all but certain of a token that q rules out, the KL is nats large and
    its gradient nearly none, since dKL/dz(v) = p(v) (log p(v)/q(v) - KL).
    """
    log_q = torch.tensor([[-9.0, 0.0, -6.0, -6.0, -6.0, -6.0]], dtype=torch.double).log_softmax(-1)
    pushed = []
    for logit in (0.0, 3.0, 6.0, 12.0):  # of the mistake, token 0
        z = torch.tensor([[logit, 0.0, -1.0, -1.0, -1.0, -1.0]], dtype=torch.double)
        value, gradient = with_grad(lambda log_p: objective(log_p, log_q), z)
        pushed.append((value.item(), -gradient[0, 1].item()))  # how hard towards the right token
    assert [value for value, _ in pushed] == sorted(value for value, _ in pushed) and pushed[-1][
        0
    ] > 8
    assert pushed[-1][1] < 1e-3 * pushed[0][1] and pushed[0][1] > 0.5


@pytest.mark.parametrize(
    "divergence, covers",
    [
        (full_vocab, False),
        (functools.partial(top_k, k=16), False),
        (functools.partial(top_k_released, k=16), False),
        (lambda log_p, log_q: reverse_kl(log_q, log_p), True),
    ],
    ids=["full", "top-k", "released", "forward KL"],
)
def test_reverse_kl_picks_a_mode_and_forward_kl_covers_both(divergence, covers):
    """One bell fitted to a teacher of two: ours settle on one, forward KL spreads over both
    (OPSD#14, GLM-5#34, slime#2254: which KL is it?)."""
    v = torch.arange(41.0)
    log_q = torch.logaddexp(-((v - 10) ** 2) / 8, -((v - 30) ** 2) / 8).log_softmax(-1)[None]
    bell = torch.tensor([15.0, 3.0], requires_grad=True)  # mean and width, left of the middle
    adam = torch.optim.Adam([bell], lr=0.2)
    for _ in range(250):
        log_p = (-(((v - bell[0]) / bell[1]) ** 2) / 2).log_softmax(-1)[None]
        adam.zero_grad()
        divergence(log_p, log_q).sum().backward()
        adam.step()
    left = log_p[0, :20].exp().sum()
    assert (0.4 < left < 0.6) if covers else left > 0.99


# --- in_chunks -----------------------------------------------------------------------------------------------------


class SoftCapped(torch.nn.Module):
    """z -> c tanh(z / c), as Gemma 2 does."""

    def __init__(self, head, cap=2.0):
        super().__init__()
        self.head, self.cap = head, cap

    def forward(self, h):  # (..., H) -> (..., V)
        return self.cap * (self.head(h) / self.cap).tanh()


class LowRank(torch.nn.Module):
    """A frozen head and what LoRA adds to it: h W' + h A B."""

    def __init__(self, head, rank=2):
        super().__init__()
        V, H = head.weight.shape
        self.head = head.requires_grad_(False)
        self.A, self.B = (
            torch.nn.Parameter(0.3 * torch.randn(*size)) for size in ((H, rank), (rank, V))
        )

    def forward(self, h):  # (..., H) -> (..., V)
        return self.head(h) + h @ self.A @ self.B


HEADS = {
    "linear": lambda head: head,
    "soft-capped": SoftCapped,
    "low-rank": LowRank,
    "both": lambda head: SoftCapped(LowRank(head)),
}
each_head = pytest.mark.parametrize("kind", HEADS)


def heads_and_states(N=11, V=23, H=6, H_teacher=4, dtype=torch.float32, kind="linear"):
    """Output heads of two sizes, states, drawn tokens: everything that in_chunks reads."""
    torch.manual_seed(0)
    head_p, head_q = (
        torch.nn.Linear(H, V, dtype=dtype),
        torch.nn.Linear(H_teacher, V, bias=False, dtype=dtype),
    )
    for head in (head_p, head_q):
        torch.nn.init.normal_(head.weight)
    h_p, h_q = (torch.randn(N, size, dtype=dtype) for size in (H, H_teacher))
    return h_p, h_q, HEADS[kind](head_p), head_q, torch.randint(V, (N,))


def eagerly(
    per_position,
    h_p,
    h_q,
    head_p,
    head_q,
    y,
    *,
    scale=None,
    temperature=1.0,
    teacher_temperature=1.0,
):
    """What in_chunks must equal: whole tensors and plain autograd."""
    log_p, log_q = (
        (head_p(h_p) / temperature).log_softmax(-1),
        (head_q(h_q) / teacher_temperature).log_softmax(-1),
    )
    out = per_position(log_p, log_q, y)
    if scale is not None:
        (scale * out["loss"].sum()).backward()
    return {name: x.detach() for name, x in out.items()}


def learned(evaluate, per_position, h_p, h_q, head_p, head_q, y, *, scale=1.0, **options):
    """What an evaluation gives, and the gradients that it leaves in the states and in the student's head."""
    states = h_p.clone().requires_grad_()
    head_p.zero_grad()
    out = evaluate(per_position, states, h_q, head_p, head_q, y, scale=scale, **options)
    of_head = {name: p.grad.clone() for name, p in head_p.named_parameters() if p.grad is not None}
    return out, {"states": states.grad, **of_head}


def full(log_p, log_q, y):
    return {"loss": full_vocab(log_p, log_q)}


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.0, 0.7)])
@each_objective
def test_in_chunks_equals_eager(objective, temperatures):
    """Loss, diagnostics and the gradients of states and head, at any chunk size, whatever the sum is multiplied by
    (trl#5731: a fast path with another loss and temperature; trl#6526: the chunked loss forgot the temperature)."""
    inputs = heads_and_states()
    options = dict(scale=-0.3, temperature=temperatures[0], teacher_temperature=temperatures[1])

    def per_position(log_p, log_q, y):
        return {"loss": objective(log_p, log_q, y), **diagnose(log_p, log_q, y, 3)}

    expected = learned(eagerly, per_position, *inputs, **options)
    assert set(expected[1]) == {"states", "weight", "bias"}
    for chunk in (1, 3, 11, 12, None):
        torch.testing.assert_close(
            learned(in_chunks, per_position, *inputs, chunk=chunk, **options),
            expected,
            equal_nan=True,
            rtol=1e-5,
            atol=1e-5,
        )
    out = in_chunks(per_position, *inputs, chunk=3, **{**options, "scale": None})
    torch.testing.assert_close(out["loss"], expected[0]["loss"])


@pytest.mark.parametrize("chunk", [1, 4, None])
@each_head
def test_any_head_learns_in_chunks_what_it_learns_eagerly(kind, chunk):
    """Soft-capped or with a low-rank addition: a head is called, not read (a head that was read as one weight had a
    gradient that was 41 % off). What is frozen of it stays without a gradient."""
    inputs = heads_and_states(kind=kind)
    for objective in (
        full_vocab,
        functools.partial(top_k, k=5),
        functools.partial(top_k_released, k=5),
    ):

        def per_position(log_p, log_q, y):
            return {"loss": objective(log_p, log_q)}

        expected = learned(eagerly, per_position, *inputs, scale=0.7)
        torch.testing.assert_close(
            learned(in_chunks, per_position, *inputs, scale=0.7, chunk=chunk),
            expected,
            rtol=1e-5,
            atol=1e-5,
        )
        assert all(g.any() for g in expected[1].values()) and len(expected[1]) == 3


def test_states_and_tokens_go_in_pairs():
    """A y that was too short had gone unnoticed by a loss that does not look at it."""
    h_p, h_q, head_p, head_q, y = heads_and_states()
    for states, teachers, tokens in ((h_p, h_q, y[1:]), (h_p[1:], h_q, y), (h_p, h_q[1:], y)):
        with pytest.raises(ValueError, match="h_p, h_q and y must be as long"):
            in_chunks(
                lambda log_p, log_q, y: {"loss": full_vocab(log_p, log_q)},
                states,
                teachers,
                head_p,
                head_q,
                tokens,
            )


def test_what_is_only_measured_leaves_no_gradient():
    """Without a scale nothing is learned, whatever asks for it, and no graph is made; what comes out is constant."""
    h_p, h_q, head_p, head_q, y = heads_and_states()
    h_p.requires_grad_()
    learns, found = [], []

    def per_position(log_p, log_q, y):
        learns.append(log_p.requires_grad)
        return full(log_p, log_q, y)

    for scale in (None, 2.0):
        found.append(
            in_chunks(per_position, h_p, h_q, head_p, head_q, y, chunk=11, scale=scale)["loss"]
        )
        assert all(x is None or x.any() for x in (h_p.grad, head_p.weight.grad))
        assert (h_p.grad is None) == (head_p.weight.grad is None) == (scale is None)
    assert learns == [False, True] and not any(x.requires_grad for x in found)
    torch.testing.assert_close(*found)


def test_gradients_add_up_as_backward_adds_them_up():
    """Two calls leave the sum of both, in the states as in the head: micro-batches need no more than that."""
    h_p, h_q, head_p, head_q, y = heads_and_states()
    _, once = learned(in_chunks, full, h_p, h_q, head_p, head_q, y, chunk=4)
    states = h_p.clone().requires_grad_()
    head_p.zero_grad()
    for scale in (1.0, 0.5):
        in_chunks(full, states, h_q, head_p, head_q, y, chunk=4, scale=scale)
    torch.testing.assert_close(
        {"states": states.grad, "weight": head_p.weight.grad, "bias": head_p.bias.grad},
        {name: 1.5 * g for name, g in once.items()},
    )


def test_the_trunk_is_gone_through_once():
    """However many chunks: one backward pass from all states to what is below them, with the eager gradient."""
    h_p, h_q, head_p, head_q, y = heads_and_states()
    found = []
    for evaluate, chunk in ((eagerly, {}), (in_chunks, {"chunk": 2})):
        x, passes = (
            torch.randn(11, 3, generator=torch.Generator().manual_seed(1)).requires_grad_(),
            [],
        )
        states = h_p + (x @ torch.ones(3, 6)).tanh()
        states.register_hook(lambda g, passes=passes: passes.append(g.shape))
        evaluate(full, states, h_q, head_p, head_q, y, scale=1.0, **chunk)
        assert passes == [h_p.shape]
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["states", "head"])
def test_in_chunks_learns_only_where_a_gradient_is_asked_for(frozen):
    """A frozen head, or states that are constants, get none, and the other side gets what it would have had."""
    h_p, h_q, head_p, head_q, y = heads_and_states()
    _, whole = learned(eagerly, full, h_p, h_q, head_p, head_q, y)
    head_p.zero_grad()
    states, head_p = h_p.requires_grad_(frozen != "states"), head_p.requires_grad_(frozen != "head")
    in_chunks(full, states, h_q, head_p, head_q, y, chunk=4, scale=1.0)
    got = {"states": states.grad, "head": head_p.weight.grad}
    assert got.pop(frozen) is None
    torch.testing.assert_close(
        *got.values(), whole["weight" if frozen == "states" else "states"], rtol=1e-5, atol=1e-5
    )


def test_a_head_without_parameters_passes_the_gradient_on():
    """Where a model does more than a linear head, its logits stand for the states."""
    h_p, h_q, head_p, head_q, y = heads_and_states()
    logits = head_p(h_p).detach().requires_grad_()
    in_chunks(full, logits, h_q, lambda h: h, head_q, y, chunk=4, scale=1.0)
    again = logits.detach().requires_grad_()
    full_vocab(again.log_softmax(-1), head_q(h_q).log_softmax(-1)).sum().backward()
    torch.testing.assert_close(logits.grad, again.grad)


def test_each_temperature_reaches_its_own_side():
    """T divides the student's logits, the teacher's T the teacher's, and both change the loss
    (trl GKD ignored the argument)."""
    inputs = heads_and_states()

    def evaluate(**temperatures):
        return in_chunks(
            lambda log_p, log_q, y: {
                "p": log_p[:, 0],
                "q": log_q[:, 0],
                "loss": full_vocab(log_p, log_q),
            },
            *inputs,
            chunk=4,
            **temperatures,
        )

    one, student, teacher = evaluate(), evaluate(temperature=2.0), evaluate(teacher_temperature=2.0)
    assert not torch.allclose(student["p"], one["p"]) and torch.equal(student["q"], one["q"])
    assert torch.equal(teacher["p"], one["p"]) and not torch.allclose(teacher["q"], one["q"])
    assert not torch.allclose(student["loss"], one["loss"]) and not torch.allclose(
        teacher["loss"], one["loss"]
    )


def test_nothing_is_evaluated_twice():
    """The gradient is taken where the logits are: a chunk calls each head and the objective once."""
    h_p, h_q, head_p, head_q, y = heads_and_states()
    calls = []
    for name, head in (("student", head_p), ("teacher", head_q)):
        head.register_forward_hook(lambda *_, name=name: calls.append(name))

    def per_position(log_p, log_q, y):
        calls.append("objective")
        return {"loss": full_vocab(log_p, log_q)}

    in_chunks(per_position, h_p.requires_grad_(), h_q, head_p, head_q, y, chunk=4, scale=1.0)
    assert (
        sorted(calls) == ["objective"] * 3 + ["student"] * 3 + ["teacher"] * 3
        and head_p.weight.grad.any()
    )


def test_in_chunks_gives_the_teacher_no_gradient():
    """Neither its states nor its head, even where they ask for one and the objective forgets to detach."""
    h_p, h_q, head_p, head_q, y = heads_and_states()
    h_q.requires_grad_()
    in_chunks(
        lambda log_p, log_q, y: {"loss": reverse_kl(log_p, log_q)},
        h_p,
        h_q,
        head_p,
        head_q,
        y,
        chunk=4,
        scale=1.0,
    )
    assert head_p.weight.grad is not None and head_q.weight.grad is None and h_q.grad is None


def test_no_position_at_all_gives_nothing_and_no_gradient():
    """A share without a response token: empty values, zero gradients, no 0/0 (LMOps#38)."""
    h_p, h_q, head_p, head_q, y = heads_and_states(N=0)
    out, left = learned(
        in_chunks, lambda *x: {**full(*x), **diagnose(*x, 3)}, h_p, h_q, head_p, head_q, y
    )
    assert all(x.shape == (0,) for x in out.values()) and not any(g.any() for g in left.values())


@pytest.mark.parametrize(
    "objective", [full_vocab, functools.partial(top_k, k=16)], ids=["full", "top-k"]
)
def test_bf16_states_are_scored_in_float32(objective):
    """A divergence between near-equal bf16 models stays >= -1e-6
    (ms-swift#10156: a negative one from mixed precision)."""
    h, _, head, _, y = heads_and_states(N=256, V=500, dtype=torch.bfloat16)
    nearly = h + 2**-8 * torch.randn_like(h)
    loss = in_chunks(
        lambda log_p, log_q, y: {"loss": objective(log_p, log_q)}, h, nearly, head, head, y
    )["loss"]
    assert loss.dtype == torch.float32 and (loss >= -1e-6).all() and loss.sum() > 0


@pytest.mark.parametrize(
    "device, MiB, V, N", [("cpu", 32, 1000, 9000), ("meta", 1024, 150_000, 5000)]
)
def test_a_chunk_is_as_large_as_is_good_for_memory_or_a_row_more(device, MiB, V, N):
    """32 MiB of float32 logits on a CPU, from where on glibc maps a block of its own and gives it back (the largest
    that M_MMAP_THRESHOLD becomes by itself), 1 GiB on anything else."""
    rows, read = [], []
    h, head = torch.zeros(N, 1, device=device), torch.nn.Linear(1, V, device=device)
    head.register_forward_hook(lambda _, args, z: read.append(len(z)))

    def per_position(log_p, log_q, y):
        rows.append(len(y))
        return {"loss": log_p[:, 0]}

    out = in_chunks(
        per_position, h, None, head, None, torch.zeros(N, dtype=torch.long, device=device)
    )
    assert len(out["loss"]) == sum(rows) == N and len(rows) > 1
    assert (rows[0] - 1) * 4 * V < MiB * 2**20 <= rows[0] * 4 * V and set(rows[:-1]) == {
        rows[0]
    } == {max(read)}


def test_a_chunk_has_its_fewest_rows_however_large_the_vocabulary():
    """Each chunk reads the head, and adds to its gradient, once: a chunk of a row would do little else."""
    rows, N, V = [], 131, 2**25
    with torch.device("meta"):
        in_chunks(
            lambda log_p, log_q, y: rows.append(len(y)) or {"loss": log_p[:, 0]},
            torch.zeros(N, 1),
            None,
            torch.nn.Linear(1, V),
            None,
            torch.zeros(N, dtype=torch.long),
        )
    assert rows == [128, 3]


@pytest.mark.parametrize(
    "kind, objective",
    [
        *((kind, full_vocab) for kind in HEADS),
        *((kind, functools.partial(top_k, k=3)) for kind in ("linear", "low-rank")),
    ],
)  # a soft cap makes ties in 8 bits
def test_a_float32_head_learns_from_states_of_16_bits(kind, objective):
    """Under autocast states and logits are bfloat16, weights and losses float32: over several chunks the gradients are
    the eager ones but for a few roundings to 8 bits, and keep the dtype of what they belong to."""
    h_p, h_q, *others = heads_and_states(N=64, H=16, kind=kind)
    per_position = lambda log_p, log_q, y: {"loss": objective(log_p, log_q)}  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        (_, expected), (_, got) = (
            learned(evaluate, per_position, h_p.bfloat16(), h_q.bfloat16(), *others, **chunk)
            for evaluate, chunk in ((eagerly, {}), (in_chunks, {"chunk": 5}))
        )
    assert got.keys() == expected.keys() and got["states"].dtype == torch.bfloat16
    for name in got:
        assert got[name].dtype == expected[name].dtype
        assert (got[name] - expected[name]).float().norm() < 2**-5 * expected[
            name
        ].float().norm(), name


@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_that_both_sides_share_learns_all_the_same(autocast):
    """A teacher that is the student before it (self-distillation) reads without a gradient what the student learns in:
    autocast, which keeps the weight that it has cast, must not keep one that has no gradient."""
    h_p, _, head, _, y = heads_and_states(N=64, H=16)
    h_q = torch.randn(64, 16)
    held = copy.deepcopy(head).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, expected = learned(eagerly, full, h_p, h_q, head, held, y)
        _, got = learned(in_chunks, full, h_p, h_q, head, head, y, chunk=5)
    for name in expected:
        assert (got[name] - expected[name]).norm() < 2**-5 * expected[name].norm(), name


def test_the_states_of_a_chunk_are_those_of_its_own_device():
    """Nothing is made on the default device, here one that holds no numbers."""
    inputs, found = heads_and_states(), []
    for default in ("cpu", "meta"):
        with torch.device(default):
            found.append(
                learned(
                    in_chunks,
                    lambda log_p, log_q, y: {"loss": top_k(log_p, log_q, 3, "union")},
                    *inputs,
                    chunk=4,
                )
            )
    torch.testing.assert_close(*found)


def peak_bytes(f):
    """The most that f held at once beyond what was there before it, from every allocation and release that it made.

    What the process keeps resident is the allocator's affair: glibc may keep freed blocks under 32 MiB.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        f()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    return held.max().item()


def default_loss(log_p, log_q, y):
    return {"loss": top_k(log_p, log_q, 16)}


@pytest.mark.slow
def test_peak_memory_is_a_sixth_of_eager_with_the_same_gradients():
    """N = 2048 positions, V = 50,000: eager autograd holds N x V several times over, chunks do not hold it once
    (DistillKit#4, ms-swift#7295, verl#6593: out of memory at the logits)."""
    inputs = heads_and_states(N=2048, V=50_000, H=64, H_teacher=64)
    inputs[3].requires_grad_(False)
    gradients, peaks = [], []
    for evaluate in (eagerly, in_chunks):

        def step():
            gradients.append(learned(evaluate, default_loss, *inputs, scale=1 / 2048)[1])

        inputs[2].zero_grad()
        peaks.append(peak_bytes(step))
    torch.testing.assert_close(
        *gradients, rtol=1e-5, atol=1e-5 * gradients[0]["states"].abs().max().item()
    )
    assert peaks[1] <= peaks[0] / 6, (
        f"{peaks[1] / 2**20:.0f} MiB against {peaks[0] / 2**20:.0f} MiB"
    )


def test_of_the_gradient_of_the_head_there_is_one_and_that_of_a_chunk():
    """Chunk after chunk is added to it: beside the one (V, H) that is asked for there is one more, in passing."""
    V, H, held = 4000, 64, []
    for N in (3, 12):
        h_p, h_q, head_p, head_q, y = heads_and_states(N=N, V=V, H=H)
        held.append(
            peak_bytes(
                lambda: in_chunks(default_loss, h_p, h_q, head_p, head_q, y, chunk=1, scale=1.0)
            )
        )
    assert 4 * V * H <= held[0] < 2.5 * 4 * V * H and held[1] - held[0] < 0.01 * 4 * V * H


@each_head
def test_memory_does_not_grow_with_the_number_of_positions(kind):
    """Beyond the states and their gradients (H numbers a position) four times the positions cost nothing more
    (NeMo#3272, #3314, #3495, #4222, Soup#722: a loop over chunks without checkpointing bounds nothing)."""
    H, peaks = 4, []
    for N in (1024, 4096):
        h_p, h_q, head_p, head_q, y = heads_and_states(N=N, V=4000, H=H, H_teacher=H, kind=kind)
        h_p.requires_grad_()
        peaks.append(
            peak_bytes(
                lambda: in_chunks(default_loss, h_p, h_q, head_p, head_q, y, chunk=256, scale=1.0)
            )
        )
    assert peaks[1] - peaks[0] <= 4 * (4096 - 1024) * (3 * H + 8)  # bytes; logits would be 49 MB
