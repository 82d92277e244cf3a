"""loss.py: what the student minimises (paper 2.1, 2.2 and 4.2; Eq. 1 to 5).

For a prompt x, over whole responses y:

    Eq. 1  sequence level    KL(pi_student(.|x) || pi_teacher(.|x)), mean over the prompts
    Eq. 2  the same, split   sum over t of KL(p || q) at s_t, mean over y ~ pi_student(.|x)

At a state s_t = (x, y_<t) that the student visited, p = pi_student(.|s_t) and q =
pi_teacher(.|s_t):

    Eq. 3  sampled token     log p(y_t) - log q(y_t),  minimised as a policy gradient
    Eq. 4  full vocabulary   KL(p || q)
    Eq. 5  top-k             KL(p' || q'), both renormalised on S_t = the k likeliest tokens of p
    code   top-k, released   sum over S_t of w(v) (log p(v) - log q(v)); w is p renormalised on S_t.
                             The authors' code minimises this in place of Eq. 5, as a policy
                             gradient: w and the log-ratio are held constant

The last four are here. Each takes log-probabilities (N, V) in float32 at N states and returns one
number per state, (N,), in nats. ValueError if the two differ in shape, or are coarser (see
check_inputs). The paper's equations sum over t; its settings (A.2) and we take the mean over the
response tokens. The gradient flows into log_p alone. At k = V all four have the same expected
gradient, that of Eq. 4. The exception is the support "difference" (4.2): it is then empty.

All four hold the visited prefixes fixed. The gradient of Eq. 1 and 2 has a second part, the
score-function term of the earlier choices: y_t decides at which states the later KLs are taken.
The paper, the authors' code and we leave this term out (tests/test_loss.py has both parts).

`in_chunks` evaluates any of them from hidden states, so that N x V logits never exist at once.

`forward_kl` is not from the paper. It is a control for experiments. Not here: JSD, which the
paper does not use either, and the plain sum of p log(p/q) over a top-k set, without
renormalisation. Its gradient pays the student for moving its mass out of the set
(tests/test_loss.py shows it).

To copy: this file alone. Its functions take tensors. With two models of transformers, both in eval
mode and the student in float32, that share a vocabulary:

    # ids, attention_mask, is_response: (B, L), of prompt and response. is_response marks the
    # response and its first end token, not the padding behind it. If you write by `generate`, then
    # with do_sample=True, top_k=0, top_p=1.0, temperature=1.0, repetition_penalty=1.0: it, and a
    # model's generation_config.json, have other defaults
    positions = (attention_mask.long().cumsum(1) - 1).clamp_min(0)  # from the first real token

    def at_response_tokens(model):
        out = model(input_ids=ids, attention_mask=attention_mask, position_ids=positions)
        logits = out.logits[:, :-1][is_response[:, 1:].bool()]  # (N, V): t-1 predicts token t
        return logits.float().log_softmax(-1)  # of logits / T, if T is the rollout's temperature

    log_p = at_response_tokens(student)
    with torch.no_grad():
        log_q = at_response_tokens(teacher)
    loss = top_k(log_p, log_q).sum() / is_response.sum()  # all tokens of the step: see opd.py
    loss.backward()
"""

import torch
from torch.utils.checkpoint import checkpoint

SUPPORTS = ("student", "teacher", "intersection", "union", "difference")
LOG_ZERO = -1e4  # nats, for log 0: a token ruled out on one side costs much, and a finite amount


# --- the four losses ----------------------------------------------------------------------------


def sampled_token(log_p, log_q, y):
    """Eq. 3 as a policy gradient: (N, V), (N, V), (N,) token ids -> (N,), nats.

    The value is log p(y) - log q(y). The gradient is -A grad log p(y), with the advantage A =
    log q(y) - log p(y) held constant. Over y ~ p the value's mean is KL(p || q), and the
    gradient's mean is the gradient of KL(p || q). Back-propagating the value itself would have
    zero mean gradient. For one update on what was just drawn: a second one on the same tokens would
    need importance weights.
    """
    check_inputs(log_p, log_q, y)
    y = y.unsqueeze(-1)  # (N, 1)
    log_p_y = log_p.gather(-1, y).squeeze(-1).clamp_min(LOG_ZERO)  # (N,)
    log_q_y = log_q.gather(-1, y).squeeze(-1).clamp_min(LOG_ZERO)  # (N,)
    advantage = (log_q_y - log_p_y).detach()
    return -advantage * ratio(log_p_y)


def full_vocab(log_p, log_q):
    """Eq. 4, KL(p || q) over the whole vocabulary: (N, V), (N, V) -> (N,), nats."""
    check_inputs(log_p, log_q)
    log_p = log_p.clamp_min(LOG_ZERO)
    log_q = log_q.detach().clamp_min(LOG_ZERO)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def top_k(log_p, log_q, k=16, support="student"):
    """Eq. 5, KL(p' || q') with p and q renormalised on a support: (N, V), (N, V) -> (N,), nats.

    It is 0 where the support has fewer than two tokens. So at k = 1 it is always 0 with the
    student's support. ValueError for an unknown support, or a k outside 1..V.
    """
    check_inputs(log_p, log_q)
    S, counts = support_of(log_p.detach(), log_q.detach(), k, support)  # (N, m), (N, m)
    log_p_S = renormalised(log_p, S, counts)  # (N, m)
    log_q_S = renormalised(log_q.detach(), S, counts)  # (N, m)
    kl = log_p_S.exp() * (log_p_S - log_q_S)
    return torch.where(counts, kl, 0).sum(-1)


def top_k_released(log_p, log_q, k=16, support="student"):
    """What the authors' code minimises in place of Eq. 5: (N, V), (N, V) -> (N,), nats.

    The value is sum_S w (log p - log q). The gradient is sum_S w (log p - log q) grad log p, with
    w and the log-ratio held constant. Differs from the paper: w is p renormalised on S, but the
    log-ratio is that of the whole vocabulary. So the gradient is that of
    sum_S (p log(p/q) - p + q), divided by the mass sum_S p (held constant). It is not 0 at k = 1.
    With the support "difference" w is p itself, as in the authors' Non-Overlap arm. That alone
    makes its signal much smaller. ValueError for an unknown support, or a k outside 1..V.
    """
    check_inputs(log_p, log_q)
    S, counts = support_of(log_p.detach(), log_q.detach(), k, support)  # (N, m), (N, m)
    log_w = log_p.gather(-1, S) if support == "difference" else renormalised(log_p, S, counts)
    log_p_S = log_p.gather(-1, S).clamp_min(LOG_ZERO)  # (N, m)
    log_q_S = log_q.gather(-1, S).clamp_min(LOG_ZERO)  # (N, m)
    advantage = (log_w.exp() * (log_q_S - log_p_S)).detach()
    return torch.where(counts, -advantage * ratio(log_p_S), 0).sum(-1)


def ratio(log_p):
    """p / stopgrad(p): its value is 1, its gradient is grad log p. Any shape -> the same."""
    return (log_p - log_p.detach()).exp()


def check_inputs(log_p, log_q, y=None):
    """ValueError unless log_p and log_q are of one shape, in float32 or finer, with one y a state.

    If the models pad their vocabularies to different sizes, gather and topk raise no error, and the
    loss is wrong. Nor do they in bfloat16, whose rounding is larger than a small KL.
    """
    if log_p.shape != log_q.shape:
        raise ValueError(
            f"log_p is {tuple(log_p.shape)}, log_q {tuple(log_q.shape)}: take the same states, and "
            "cut both logits to the shared tokens before the softmax"
        )
    for log_probs in (log_p, log_q):
        if torch.finfo(log_probs.dtype).bits < 32:
            raise ValueError(
                f"{log_probs.dtype} is too coarse: take logits.float().log_softmax(-1)"
            )
    if y is not None and y.shape != log_p.shape[:-1]:
        raise ValueError(f"y is {tuple(y.shape)}, log_p {tuple(log_p.shape)}: one token a state")


# --- a control, not the paper's -----------------------------------------------------------------


def forward_kl(log_p, log_q):
    """KL(q || p) over the whole vocabulary: (N, V), (N, V) -> (N,), nats. Not from the paper.

    arXiv 2609.35259 asks which matters more: the direction of the KL, or who wrote the prefix.
    experiments/own_loop.py asks the same. No --objective names this loss.
    """
    check_inputs(log_p, log_q)
    log_p = log_p.clamp_min(LOG_ZERO)
    log_q = log_q.detach().clamp_min(LOG_ZERO)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


# --- supports: the tokens that a top-k loss looks at (4.2) --------------------------------------


def support_of(log_p, log_q, k, support="student"):
    """The tokens of a support (4.2): (N, V), (N, V) -> ids (N, m), and which count, (N, m) bool.

    P = the student's k likeliest tokens, Q = the teacher's. m is k, or 2k for "union" and
    "difference". "intersection" is the paper's Overlap Top-k, "difference" its Non-Overlap Top-k.
    ValueError for another name, or a k outside 1..V.
    """
    V = log_p.size(-1)
    if not 1 <= k <= V:
        raise ValueError(f"k={k} is outside 1..{V}, the size of the vocabulary")
    if support not in SUPPORTS:
        raise ValueError(f"support={support!r} is none of {', '.join(SUPPORTS)}")
    if support == "student":
        P = log_p.topk(k).indices  # (N, k)
        return P, torch.ones_like(P, dtype=torch.bool)
    Q = log_q.topk(k).indices  # (N, k)
    if support == "teacher":
        return Q, torch.ones_like(Q, dtype=torch.bool)
    P = log_p.topk(k).indices
    shared_of_P = among(P, Q, V)  # (N, k)
    if support == "intersection":
        return P, shared_of_P
    shared_of_Q = among(Q, P, V)  # (N, k)
    both = torch.cat([P, Q], dim=-1)  # (N, 2k)
    if support == "union":
        everything = torch.ones_like(shared_of_P)
        return both, torch.cat([everything, ~shared_of_Q], dim=-1)  # a shared token counts once
    return both, torch.cat([~shared_of_P, ~shared_of_Q], dim=-1)  # difference


def among(ids, others, vocab_size):
    """Which ids are among the others: (N, k), (N, k) -> (N, k) bool."""
    chosen = torch.zeros(len(ids), vocab_size, dtype=torch.bool, device=ids.device)  # (N, V)
    chosen.scatter_(-1, others, True)
    return chosen.gather(-1, ids)


def renormalised(log_p, S, counts):
    """log p on the tokens of S that count, made to sum to 1: (N, V), (N, m), (N, m) -> (N, m)."""
    log_p_S = torch.where(counts, log_p.gather(-1, S), LOG_ZERO)
    return log_p_S.clamp_min(LOG_ZERO).log_softmax(-1)  # the log p of a merged end is -inf


# --- from hidden states, a chunk of logits at a time --------------------------------------------


def in_chunks(per_position, h_p, h_q, log_p_of, log_q_of, y, chunk=128):
    """Evaluate per_position at N positions, with the logits of only `chunk` of them in memory.

        h = trunk(ids, attention_mask, position_ids)    # (B, L, H) of a rollout, padding included
        h_p = h[:, :-1][is_response[:, 1:]]             # (N, H): the state at t-1 predicts token t
        y = ids[is_response]                            # (N,)
        values = in_chunks(lambda log_p, log_q, y: {"loss": top_k(log_p, log_q)},
                           h_p, h_q, log_p_of, log_q_of, y)
        (values["loss"].sum() / response_tokens_of_the_step).backward()

    h_p (N, H), h_q (N, H'): states of student and teacher before each drawn token.
    y (N,): the drawn tokens. log_p_of, log_q_of: hidden states (c, H) -> log-probabilities
    (c, V), for example lambda h: head(h).float().log_softmax(-1).
    per_position(log_p (c, V), log_q (c, V), y (c,)) -> {name: (c, ...)}. Without a teacher h_q is
    None, and so is log_q. What else a token needs, such as an advantage of your own, multiplies
    these values afterwards.

    -> {name: (N, ...)}, differentiable in h_p and in the parameters of log_p_of. The backward pass
    computes the logits of a chunk again, as far as the gradient needs them. What per_position
    only measures should be computed under no_grad, after the loss. ValueError if h_p or h_q has
    not as many positions as y.
    """
    if len(h_p) != len(y):
        raise ValueError(f"h_p has {len(h_p)} positions, y has {len(y)}")
    if h_q is not None and len(h_q) != len(y):
        raise ValueError(f"h_q has {len(h_q)} positions, y has {len(y)}")

    def one_chunk(h_p, h_q, y):
        log_p = log_p_of(h_p)  # (c, V)
        log_q = None
        if h_q is not None:
            with torch.no_grad():
                log_q = log_q_of(h_q)  # (c, V)
        return per_position(log_p, log_q, y)

    chunks_of_h_p = h_p.split(chunk)  # one empty chunk if there is no position
    chunks_of_h_q = [None] * len(chunks_of_h_p) if h_q is None else h_q.split(chunk)
    parts = []
    for inputs in zip(chunks_of_h_p, chunks_of_h_q, y.split(chunk)):
        parts.append(checkpoint(one_chunk, *inputs, use_reentrant=False))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
