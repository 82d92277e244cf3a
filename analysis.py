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
    """Eq. 6, the share of the student's k likeliest tokens that are among the teacher's:
    (N, V), (N, V) -> (N,) in 0..1.
    """
    return _shared(log_p, log_q, k)[1].to(log_p.dtype).mean(-1)


def overlap_token_advantage(log_p, log_q, k):
    """Eq. 7: (N, V), (N, V) -> (N,), nats, <= 0, since it is exactly -KL(p' || q') / |I|; NaN where I is empty.

    Read it with the overlap mass: it says nothing of what lies outside I. The paper does not discuss an empty I;
    we leave such a position out of the mean (torch.nanmean) and count it.
    """
    S, shared = _shared(log_p, log_q, k)
    return _advantage(log_p.gather(-1, S), log_q.gather(-1, S), shared)


def overlap_mass(log_p, log_q, k):
    """Eq. 9 and 10, the probability that each model puts on the shared tokens:
    (N, V), (N, V) -> ((N,) by p, (N,) by q).
    """
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
    """KL(p || q) over the whole vocabulary, a measurement only (Eq. 4 is what may be descended):
    (N, V), (N, V) -> (N,), nats.
    """
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
    p_I, q_I = (torch.where(shared, x, -1e4).clamp_min(-1e4).log_softmax(-1) for x in (p_S, q_S))   # 0 log 0 = 0
    total = torch.where(shared, p_I.exp() * (q_I - p_I), 0).sum(-1)
    return torch.where(shared.any(-1), total / shared.sum(-1), math.nan)


# --- Is the answer right? ------------------------------------------------------------------------------------------


def read_answer(text):
    r"""The answer in a response: inside its last closed \boxed{...}, else after its last "Answer:";
    None without either.

    read_answer(r"so \boxed{\frac{1}{2}}.") -> r"\frac{1}{2}"      read_answer("Answer: 12 .") -> "12 ."
    """
    for box in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth = 1
        for i in range(box.end(), len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[box.end():i].strip()
    rest = re.split(r"answer:", text, flags=re.IGNORECASE)[1:]
    return rest[-1].replace("**", "").strip().split("\n")[0].strip() or None if rest else None


def as_number(text):
    r"""The number that a text is, exactly, or None:
    "1,200" "$-3$" "2.50" "\frac{3}{4}" "3/4" "12%" "12 ." -> Fraction.
    """
    text = _bare(text).replace("{,}", "").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"^([+-]?)\\frac\{?([0-9]+)\}?\{?([0-9]+)\}?$", r"\1\2/\3", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text)
    if not re.fullmatch(r"[+-]?(\d{1,40}/\d{1,40}|\d{1,40}\.?\d{0,40}|\.\d{1,40})", text):
        return None
    try:
        return Fraction(text.rstrip("."))
    except ZeroDivisionError:
        return None


def same_answer(said, want):
    """Is an answer right? Compared as numbers where both are,
    else as text without case, spaces, $ and \\text{}: bool.
    """
    if said is None:
        return False
    a, b = as_number(said), as_number(want)
    return a == b if a is not None and b is not None else _bare(said).lower() == _bare(want).lower()


def _bare(text):
    text = re.sub(r"\\(text|mathrm|mbox)\{([^{}]*)\}", r"\2", str(text))
    text = re.sub(r"\\left|\\right|\\[()\[\]!,; ]|\^\{?\\circ\}?|\\?[%$]|\s", "", text)
    return text.strip("*").rstrip(".").replace("\u2212", "-")


def accuracy(model, tokenizer, prompts, answers, *, n, max_new_tokens, temperature, top_p, eos_ids, pad_id, vocab_size,
             generator, rows=256, what="evaluate"):
    """avg@n: each of the prompts (token ids) answered n times. -> {"mean", "standard_error", "samples", "truncated"}.

    The standard error is that of the mean over prompts, from the spread of the prompts' own means: the n answers to one
    prompt are not independent. `rows` bounds the sequences in flight.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))                       # little padding
    means, truncated, at_once = [], 0, max(1, rows // n)
    for start in tqdm(range(0, len(order), at_once), desc=what, leave=False, mininterval=1, disable=None):
        part = order[start:start + at_once]
        r = rollout(model, [prompts[i] for i in part], n=n, max_new_tokens=max_new_tokens, temperature=temperature,
                    top_p=top_p, eos_ids=eos_ids, pad_id=pad_id, vocab_size=vocab_size, generator=generator)
        texts = [tokenizer.decode(r.response_ids(row), skip_special_tokens=True) for row in range(len(r.ids))]
        right = [same_answer(read_answer(text), answers[part[row // n]]) for row, text in enumerate(texts)]
        means += [sum(right[i:i + n]) / n for i in range(0, len(right), n)]
        truncated += int(r.truncated.sum())
    means = torch.tensor(means, dtype=torch.float64)                                         # (prompts,)
    error = (means.std() / len(means) ** 0.5).item() if len(means) > 1 else None
    return {"mean": means.mean().item(), "standard_error": error, "samples": len(means) * n,
            "truncated": truncated / (len(means) * n)}


def gap_recovery(before, after, teacher):
    """(after - before) / (teacher - before) from three results of `accuracy`:
    float, or None where the gap is within noise.

    None when teacher and student lie within two standard errors of each other: the ratio then says nothing.
    """
    gap = teacher["mean"] - before["mean"]
    noise = math.hypot(teacher["standard_error"] or 0, before["standard_error"] or 0)
    return (after["mean"] - before["mean"]) / gap if abs(gap) > 2 * noise else None


# --- Is the run going under? ---------------------------------------------------------------------------------------


def collapse(history, window=5):
    """A sentence when a run shows signs of collapse, else None. history: the rows of metrics.jsonl so far.

    Something that should hold has fallen from its best (either overlap mass by .1, or the reward by .2 nats) while
    something that should not has risen from its lowest (student entropy or response length by half, the entropy by .3
    nats at least; repetition by .2). Each is a mean over `window` steps.
    """
    if len(history) < 2 * window:
        return None

    def now_and(best, name):
        means = [sum(row[name] for row in history[i:i + window]) / window for i in range(len(history) - window + 1)]
        return best(means), means[-1]
    high = {name: now_and(max, name) for name in ("overlap_mass_student", "overlap_mass_teacher", "reward")}
    low = {name: now_and(min, name) for name in ("entropy_student", "response_length", "repetition_fraction")}
    falls = [name for name, (best, now) in high.items() if best - now > (0.2 if name == "reward" else 0.1)]
    least = {"entropy_student": lambda best: max(0.3, best / 2), "response_length": lambda best: best / 2,
             "repetition_fraction": lambda best: 0.2}
    rises = [name for name, (best, now) in low.items() if now - best > least[name](best)]
    if not (falls and rises):
        return None
    said = ", ".join("{} {:.2f} -> {:.2f}".format(name, *{**high, **low}[name]) for name in falls + rises)
    return f"signs of collapse: {said}; lower --lr or --max-new-tokens, or begin with a cold start (paper 5.1, 6.1)"
