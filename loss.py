"""loss.py: what the student minimises (paper 2.2 and 4.2; Eq. 3, 4, 5).

At a state s_t = (x, y_<t) that the student visited, p = pi_student(.|s_t) and q = pi_teacher(.|s_t):

    Eq. 3  sampled token     log p(y_t) - log q(y_t),  descended as a policy gradient
    Eq. 4  full vocabulary   KL(p || q)
    Eq. 5  top-k             KL(p' || q'),  both renormalised on S_t = the student's k likeliest tokens
    code   top-k, released   sum_v w(v) (log p(v) - log q(v)),  w = p renormalised on S_t and held constant

Each takes log-probabilities (N, V) at N packed positions and returns one number a position, (N,), in nats.
The gradient flows to log_p alone. At k = V all four have the same (expected) gradient, that of Eq. 4
(but for the support "difference", which is then empty).
`in_chunks` evaluates any of them from hidden states without ever holding N x V logits.
All tokens that end a response are one of the V, whichever the two models use: rollout.one_end, from teacher.Pair.grade.

To copy: this file alone. Tensors only: no models, no files. Not here: forward KL, JSD, and top-k sums without
renormalisation, whose gradient pays the student for moving its mass out of the set (tests/test_loss.py shows it).
"""

import torch

SUPPORTS = ("student", "teacher", "intersection", "union", "difference")
FLOOR = -1e4  # nats: stands for log 0, so that a token ruled out on one side is dear but finite
CHUNK = {
    "cpu": 2**23,
    "cuda": 2**28,
}  # logits of a chunk, 32 MiB and 1 GiB; of at least 128 positions


def sampled_token(log_p, log_q, y):
    """Eq. 3 as a policy gradient: (N, V), (N, V), (N,) token ids -> (N,).

    value log p(y) - log q(y); gradient -A grad log p(y) with the advantage A = log q(y) - log p(y) held constant.
    Over y ~ p the value's mean is KL(p || q) and the gradient's mean is the gradient of KL(p || q). Back-propagating
    the value itself would have zero mean gradient.
    """
    log_p, log_q = (
        x.gather(-1, y.unsqueeze(-1)).squeeze(-1).clamp_min(FLOOR) for x in (log_p, log_q)
    )  # (N,)
    advantage = (log_q - log_p).detach()
    return -advantage * _ratio(log_p)


def full_vocab(log_p, log_q):
    """Eq. 4, KL(p || q) over the whole vocabulary: (N, V), (N, V) -> (N,)."""
    log_p, log_q = log_p.clamp_min(FLOOR), log_q.detach().clamp_min(FLOOR)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def top_k(log_p, log_q, k=16, support="student"):
    """Eq. 5, KL(p' || q') with p and q renormalised on a support of each position: (N, V), (N, V) -> (N,).

    0 where the support has fewer than two tokens, so identically 0 at k = 1 with the student's support.
    support: see token_sets; "intersection" and "difference" are the paper's Overlap and Non-Overlap Top-k (4.2).
    """
    S, member = token_sets(log_p, log_q, k, support)  # (N, m), (N, m)
    log_p, log_q = _renormalise(log_p, S, member), _renormalise(log_q.detach(), S, member)
    return torch.where(member, log_p.exp() * (log_p - log_q), 0).sum(-1)


def top_k_released(log_p, log_q, k=16, support="student"):
    """What the authors' code descends in place of Eq. 5: (N, V), (N, V) -> (N,).

    value sum_S w (log p - log q); gradient sum_S w (log p - log q) grad log p, w held constant.
    Differs from the paper: w is p renormalised on S, but the log-ratio is the full-vocabulary one, which makes the
    gradient that of sum_S (p log(p/q) - p + q) divided by the mass sum_S p (held constant), and is not 0 at k = 1.
    With support "difference" w stays p itself, as in the authors' Non-Overlap arm:
    a much smaller signal by scale alone.
    """
    S, member = token_sets(log_p, log_q, k, support)  # (N, m), (N, m)
    w = log_p.gather(-1, S) if support == "difference" else _renormalise(log_p, S, member)
    log_p, log_q = log_p.gather(-1, S).clamp_min(FLOOR), log_q.gather(-1, S).clamp_min(FLOOR)
    advantage = (w.exp() * (log_q - log_p)).detach()  # (N, m)
    return torch.where(member, -advantage * _ratio(log_p), 0).sum(-1)


def token_sets(log_p, log_q, k, support):
    """The tokens that a top-k loss looks at: (N, V), (N, V) -> ids (N, m), member (N, m) bool; only members count.

    With P = TopK(p, k) and Q = TopK(q, k): "student" P, "teacher" Q, "intersection" P & Q, "union" P | Q,
    "difference" (P | Q) - (P & Q). Raises ValueError for an unknown support or a k outside 1..V.
    """
    if support not in SUPPORTS:
        raise ValueError(f"support={support!r} is none of {', '.join(SUPPORTS)}")
    if not 1 <= k <= log_p.size(-1):
        raise ValueError(f"k={k} is outside 1..{log_p.size(-1)}, the size of the vocabulary")
    P = None if support == "teacher" else log_p.detach().topk(k).indices  # (N, k)
    Q = None if support == "student" else log_q.detach().topk(k).indices  # (N, k)
    if support in ("student", "teacher"):
        S = Q if P is None else P
        return S, torch.ones_like(S, dtype=torch.bool)
    in_P, in_Q = (
        torch.zeros_like(log_p, dtype=torch.bool).scatter_(-1, S, True) for S in (P, Q)
    )  # (N, V)
    if support == "intersection":
        return P, in_Q.gather(-1, P)
    only_Q = ~in_P.gather(-1, Q)  # (N, k)
    from_P = torch.ones_like(only_Q) if support == "union" else ~in_Q.gather(-1, P)
    return torch.cat([P, Q], -1), torch.cat([from_P, only_Q], -1)  # (N, 2k)


def in_chunks(
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
    chunk=None,
):
    """Evaluate per_position over N packed positions, a chunk at a time; logits exist for one chunk only, in float32.

        in_chunks(lambda log_p, log_q, y: {"loss": top_k(log_p, log_q)}, h_p, h_q, head_p, head_q, y, scale=1 / len(y))

    per_position(log_p (c, V), log_q (c, V), y (c,)) -> {name: (c,)}; "loss" among them is what may be learned from.
    h_p (N, H), h_q (N, H'): hidden states of student and teacher; without h_q log_q is None. y (N,): sampled tokens.
    head_p, head_q: any modules or functions (c, H) -> (c, V). What a head adds up from trainable parts (LoRA's W + B A)
    it adds up within the call, of which each chunk is one. chunk: positions, by default those of CHUNK logits.
    `scale` calls backward for you: scale * (sum of the losses) leaves its gradient in whatever h_p and head_p depend
    on, a chunk's while its logits are there; of it only the part in h_p is kept, for one pass through the trunk.
    """
    if len(h_p) != len(y) or h_q is not None and len(h_q) != len(y):
        raise ValueError(f"h_p, h_q and y must be as long, one entry a position; y has {len(y)}")
    if chunk is None:
        V = head_p(h_p[:1].detach()).size(-1)
        chunk = max(128, -(-CHUNK.get(h_p.device.type, 2**28) // V))  # rounded up

    def log_softmax(head, h, T):  # (c, H) -> (c, V)
        z = head(h).float()
        return (z if T == 1 else z / T).log_softmax(-1)

    parts, gradients = [], []
    for start in range(0, max(1, len(h_p)), chunk):
        c = slice(start, start + chunk)
        h = h_p[c].detach().requires_grad_(scale is not None)  # (c, H), a leaf of its own
        with torch.no_grad():
            log_q = (
                None
                if h_q is None
                else log_softmax(head_q, h_q[c], teacher_temperature).to(h.device)
            )
        with torch.set_grad_enabled(scale is not None):
            values = per_position(log_softmax(head_p, h, temperature), log_q, y[c])
        if scale is not None:
            (scale * values["loss"].sum()).backward()  # as far as h, and the head
            gradients.append(h.grad)
        parts.append({name: x.detach() for name, x in values.items()})
    if scale is not None and h_p.requires_grad:
        h_p.backward(torch.cat(gradients))  # through the trunk, once
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _renormalise(log_x, S, member):
    """log x on S, scaled so that the members' probabilities sum to 1: (N, V), (N, m), (N, m) -> (N, m)."""
    return torch.where(member, log_x.gather(-1, S), FLOOR).clamp_min(FLOOR).log_softmax(-1)


def _ratio(log_p):
    """p / stopgrad(p): 1 in value, grad log p in gradient."""
    return (log_p - log_p.detach()).exp()
