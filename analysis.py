"""analysis.py: is it working, and why (paper 2.3; Eq. 6 to 10).

At a state that the student visited, p student, q teacher, P = TopK(p, k), Q = TopK(q, k), I = P & Q:

    Eq. 6      overlap ratio            |I| / k
    Eq. 7      overlap-token advantage  (1/|I|) sum_I p'(v) (log q'(v) - log p'(v)),  p', q' renormalised on I
    Eq. 8      entropy gap              |H(q) - H(p)|, full vocabulary, absolute value at each position
    Eq. 9, 10  overlap mass             sum_I p(v)  and  sum_I q(v), not renormalised

The first half knows only tensors: log-probabilities (N, V) at N packed positions in, one number a position out, (N,).
The paper's E_t is their mean over all positions of all responses. The second half reads answers, measures accuracy,
and watches a run for signs of collapse.
"""
import math
import re
from fractions import Fraction

import torch
from tqdm import tqdm

from rollout import rollout

# --- Eq. 6 to 10, a position at a time -----------------------------------------------------------------------------


def overlap_ratio(log_p, log_q, k):
    """Eq. 6, the share of the student's k likeliest tokens that are among the teacher's: (N, V), (N, V) -> (N,) in 0..1."""
    return _shared(log_p, log_q, k)[1].to(log_p.dtype).mean(-1)


def overlap_token_advantage(log_p, log_q, k):
    """Eq. 7: (N, V), (N, V) -> (N,), nats, <= 0, since it is exactly -KL(p' || q') / |I|; NaN where I is empty.

    Read it with the overlap mass: it says nothing of what lies outside I. The paper does not discuss an empty I;
    we leave such a position out of the mean (torch.nanmean) and count it.
    """
    S, shared = _shared(log_p, log_q, k)
    return _advantage(log_p.gather(-1, S), log_q.gather(-1, S), shared)


def overlap_mass(log_p, log_q, k):
    """Eq. 9 and 10, the probability that each model puts on the shared tokens: (N, V), (N, V) -> ((N,) by p, (N,) by q)."""
    S, shared = _shared(log_p, log_q, k)
    return tuple((x.gather(-1, S).exp() * shared).sum(-1) for x in (log_p, log_q))


def entropy(log_p):
    """H(p) = -sum_v p(v) log p(v) over the whole vocabulary: (N, V) -> (N,), nats."""
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0).sum(-1)                        # 0 log 0 = 0


def entropy_gap(log_p, log_q):
    """Eq. 8, |H(q) - H(p)|: (N, V), (N, V) -> (N,), nats."""
    return (entropy(log_q) - entropy(log_p)).abs()


def reverse_kl(log_p, log_q):
    """KL(p || q) over the whole vocabulary, a measurement only (Eq. 4 is what may be descended): (N, V), (N, V) -> (N,), nats."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)


def diagnose(log_p, log_q, y, k):
    """All of the above and the reward from one top-k of each side: (N, V), (N, V), (N,) ids -> {name: (N,)}.

    reward: log q(y) - log p(y) at the sampled token (its mean over a response is the paper's sequence mean reward);
    log_p: log p(y), to hold against what the rollout recorded.
    """
    log_p, log_q = log_p.detach(), log_q.detach()
    S, shared = _shared(log_p, log_q, k)                                    # (N, k) ids, (N, k) bool
    p_S, q_S = log_p.gather(-1, S), log_q.gather(-1, S)                     # (N, k)
    H_p, H_q = entropy(log_p), entropy(log_q)                               # (N,)
    p_y, q_y = (x.gather(-1, y.unsqueeze(-1)).squeeze(-1) for x in (log_p, log_q))
    return {"reverse_kl": reverse_kl(log_p, log_q), "overlap_ratio": shared.to(log_p.dtype).mean(-1),
            "overlap_mass_student": (p_S.exp() * shared).sum(-1), "overlap_mass_teacher": (q_S.exp() * shared).sum(-1),
            "overlap_token_advantage": _advantage(p_S, q_S, shared), "entropy_gap": (H_q - H_p).abs(),
            "entropy_student": H_p, "entropy_teacher": H_q, "reward": q_y - p_y, "log_p": p_y}


def _shared(log_p, log_q, k):
    """P = TopK(p, k) and which of it is in TopK(q, k): (N, V), (N, V) -> (N, k) ids, (N, k) bool."""
    P, Q = log_p.topk(k).indices, log_q.topk(k).indices
    return P, torch.zeros_like(log_q, dtype=torch.bool).scatter_(-1, Q, True).gather(-1, P)


def _advantage(p_S, q_S, shared):
    """Eq. 7 from log-probabilities on P and the mask of I: (N, k), (N, k), (N, k) -> (N,)."""
    p_I, q_I = (torch.where(shared, x, -1e4).log_softmax(-1) for x in (p_S, q_S))
    total = torch.where(shared, p_I.exp() * (q_I - p_I), 0).sum(-1)
    return torch.where(shared.any(-1), total / shared.sum(-1), math.nan)
