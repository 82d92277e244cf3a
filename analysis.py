"""analysis.py: will it work, is it working, and why (paper 2.3, 4, 6; Eq. 6 to 10).

At a state that the student visited, p student, q teacher, P = TopK(p, k), Q = TopK(q, k), I = P & Q:

    Eq. 6      overlap ratio            |I| / k
    Eq. 7      overlap-token advantage  (1/|I|) sum_I p'(v) (log q'(v) - log p'(v)),  p', q' renormalised on I
    Eq. 8      entropy gap              |H(q) - H(p)|, full vocabulary, absolute value at each position
    Eq. 9, 10  overlap mass             sum_I p(v)  and  sum_I q(v), not renormalised
    4.1        largest gap              |p(v) - q(v)| at the v of P with the largest p(v) |log q(v) - log p(v)|

The first half knows only tensors: log-probabilities (N, V) at N packed positions in, one number a position out, (N,).
The paper's E_t is their mean over all positions of all responses. What follows reads answers, diagnoses a pair before
training, measures how coherent the gradients are, and watches a run:

    python analysis.py --student S --teacher T --prompts F   before: will this pair work? table, verdict, diagnose.json
    python analysis.py ... --tokens out.html                 and the responses, every token tinted by its reward
    python analysis.py --run DIR [--run ...] --plot out.svg [--positions out.svg]   after: what happened (Fig. 6, 13)
"""
import argparse
import contextlib
import difflib
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from rollout import additions, check_file, load_prompts, processes, rollout
from teacher import NoMemory, Pair, grade, is_out_of_memory, micro_batches, pick_device, states

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


def largest_gap(log_p, log_q, k):
    """4.1, |p - q| at the token that asks most of the student, of its k likeliest the one with the largest
    p(v) |log q(v) - log p(v)|: (N, V), (N, V) -> (N,) in 0..1. The paper plots p - q; signs would cancel in a mean.
    """
    S = log_p.topk(k).indices
    return _largest_gap(log_p.gather(-1, S), log_q.gather(-1, S))


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
    a, b = log_p.clamp_min(-1e4), log_q.clamp_min(-1e4)                     # (N, V), 0 log 0 = 0
    p = a.exp()                                                             # (N, V)
    H_p = -_dot(p, a)                                                       # (N,), from as few N x V as will do
    KL = _dot(p, a.sub_(b))
    H_q = -_dot(torch.exp(b, out=p), b)
    p_y, q_y = (x.gather(-1, y.unsqueeze(-1)).squeeze(-1) for x in (log_p, log_q))
    return {"reverse_kl": KL, "overlap_ratio": shared.to(log_p.dtype).mean(-1),
            "overlap_mass_student": (p_S.exp() * shared).sum(-1), "overlap_mass_teacher": (q_S.exp() * shared).sum(-1),
            "overlap_token_advantage": _advantage(p_S, q_S, shared), "entropy_gap": (H_q - H_p).abs(),
            "largest_gap": _largest_gap(p_S, q_S),
            "entropy_student": H_p, "entropy_teacher": H_q, "reward": q_y - p_y, "log_p": p_y}


def _dot(x, y):
    """sum_v x(v) y(v) without the products in memory, in full precision: (N, V), (N, V) -> (N,)."""
    with torch.autocast(x.device.type, enabled=False):
        return (x.unsqueeze(1) @ y.unsqueeze(2)).view(-1)


def _shared(log_p, log_q, k):
    """P = TopK(p, k) and which of it is in TopK(q, k): (N, V), (N, V) -> (N, k) ids, (N, k) bool."""
    if not 1 <= k <= log_p.size(-1):
        raise ValueError(f"k={k} is outside 1..{log_p.size(-1)}, the size of the vocabulary")
    P, Q = log_p.topk(k).indices, log_q.topk(k).indices
    return P, torch.zeros_like(log_q, dtype=torch.bool).scatter_(-1, Q, True).gather(-1, P)


def _advantage(p_S, q_S, shared):
    """Eq. 7 from log-probabilities on P and the mask of I: (N, k), (N, k), (N, k) -> (N,)."""
    p_I, q_I = (torch.where(shared, x, -1e4).clamp_min(-1e4).log_softmax(-1) for x in (p_S, q_S))   # 0 log 0 = 0
    total = torch.where(shared, p_I.exp() * (q_I - p_I), 0).sum(-1)
    return torch.where(shared.any(-1), total / shared.sum(-1), math.nan)


def _largest_gap(p_S, q_S):
    """From log-probabilities on P: (N, k), (N, k) -> (N,)."""
    p, q = p_S.exp(), q_S.exp()
    asks = (p * (q_S.clamp_min(-1e4) - p_S.clamp_min(-1e4))).abs()                          # (N, k)
    return (p - q).abs().gather(-1, asks.argmax(-1, keepdim=True)).squeeze(-1)


# --- Is the answer right? ------------------------------------------------------------------------------------------


def read_answer(text):
    r"""The answer in a response: inside its last closed \boxed{...}, else after its last "Answer:";
    None without either.

    read_answer(r"so \boxed{\frac{1}{2}}.") -> r"\frac{1}{2}"      read_answer("Answer: 12 .") -> "12 ."
    """
    open_at, boxes = [], []                                    # starts of open braces, None for those of no box
    for brace in re.finditer(r"\\boxed\s*\{|[{}]", text):
        if brace[0] != "}":
            open_at.append(brace.end() if len(brace[0]) > 1 else None)
        elif open_at and (start := open_at.pop()) is not None:
            boxes.append((start, brace.start()))
    if boxes:
        return text[slice(*max(boxes))].strip()
    rest = re.split(r"answer:", text, flags=re.IGNORECASE)[1:]
    return rest[-1].replace("**", "").strip().split("\n")[0].strip() or None if rest else None


def as_number(text):
    r"""The number that a text is, exactly, or None:
    "1,200" "$-3$" "2.50" "\frac{3}{4}" "3/4" "12%" "12 ." -> Fraction.
    """
    text = _bare(text).replace("{,}", "").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"^([+-]?)\\frac\{?([0-9]{1,40})\}?\{?([0-9]{1,40})\}?$", r"\1\2/\3", text)
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


@torch.no_grad()
def answered(model, tokenizer, prompts, answers, *, starts=None, n, max_new_tokens, temperature, top_p, eos_ids, pad_id,
             vocab_size, generator, in_flight=None, rows=256, what="evaluate"):
    """Each of the prompts (token ids) answered n times: -> right (prompts, n) bool, truncated (prompts, n) bool.

    starts: the beginning of each response, already written (token ids); it counts towards max_new_tokens. Where it ends
    in an eos or has used them up there is nothing left to write, and it is judged as it stands.
    `rows` of like length go to rollout at a time, in_flight of which are written at a time.
    """
    starts = starts or [[] for _ in prompts]
    right, truncated = torch.zeros(2, len(prompts), n, dtype=torch.bool)

    def judge(i, ids):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return same_answer(read_answer(text), answers[i]), not (ids and ids[-1] in eos_ids)
    room = [0 if start and start[-1] in eos_ids else max_new_tokens - len(start) for start in starts]
    for i in range(len(prompts)):
        if room[i] <= 0:
            right[i], truncated[i] = map(torch.tensor, judge(i, starts[i]))
    order = sorted((i for i in range(len(prompts)) if room[i] > 0), key=lambda i: len(prompts[i]) + len(starts[i]))
    at_once = max(1, rows // n)                                                         # like lengths: little padding
    for first in tqdm(range(0, len(order), at_once), desc=what, leave=False, mininterval=1, disable=None):
        part = order[first:first + at_once]
        r = rollout(model, [prompts[i] + starts[i] for i in part], n=n, max_new_tokens=max(room[i] for i in part),
                    temperature=temperature, top_p=top_p, eos_ids=eos_ids, pad_id=pad_id, vocab_size=vocab_size,
                    in_flight=in_flight, generator=generator)
        for row in range(len(r.ids)):
            i, j = part[row // n], row % n
            right[i, j], truncated[i, j] = judge(i, starts[i] + r.response_ids(row)[:room[i]])
    return right, truncated


def accuracy(model, tokenizer, prompts, answers, **how):
    """avg@n, see answered: -> {"mean", "standard_error", "samples", "truncated"}.

    The standard error is that of the mean over prompts, from the spread of the prompts' own means: the n answers to one
    prompt are not independent.
    """
    right, truncated = answered(model, tokenizer, prompts, answers, **how)
    return {**estimate(right.double().mean(1)), "samples": right.numel(), "truncated": truncated.double().mean().item()}


def estimate(x):
    """Mean over prompts, NaN left out, and its standard error, None where undefined:
    (prompts,) -> {"mean", "standard_error"}.
    """
    x = x[~x.isnan()].double()
    return {"mean": x.mean().item() if len(x) else None,
            "standard_error": (x.std() / len(x) ** 0.5).item() if len(x) > 1 else None}


def plus_minus(x, form=".3f"):
    """What `estimate` found, to read: {"mean": .5, "standard_error": None} -> "0.500 +- ?"."""
    error = x["standard_error"]
    return f"{x['mean']:{form}} +- " + ("?" if error is None else f"{error:{form.lstrip('+').lstrip('0123456789')}}")


def auroc(scores, labels):
    """The chance that a true one scores above a false one, ties counting half: (B,), (B,) bool -> float.

    None where all labels are alike. Paper 6.2 scores responses by their mean reward and labels them by their answers.
    """
    positive, negative = scores[labels], scores[~labels].sort().values
    if not len(positive) or not len(negative):
        return None
    below, not_above = (torch.searchsorted(negative, positive, right=right) for right in (False, True))
    return ((below + not_above).double().mean() / (2 * len(negative))).item()


def gap_recovery(before, after, teacher):
    """(after - before) / (teacher - before) from three results of `accuracy`:
    float, or None where the gap is within noise.

    None when teacher and student lie within two standard errors of each other, or have none, being of one prompt: the
    ratio then says nothing.
    """
    gap = teacher["mean"] - before["mean"]
    noise = math.hypot(*(math.inf if x["standard_error"] is None else x["standard_error"] for x in (teacher, before)))
    return (after["mean"] - before["mean"]) / gap if abs(gap) > 2 * noise else None


# --- Before training: will this pair work? -------------------------------------------------------------------------

DEPTHS = (0.0, 0.25, 0.5, 0.75)         # of the student's response, where the teacher takes over (paper 6.1)
BUCKETS = 16                            # of output positions
BY_POSITION = ("entropy_student", "entropy_teacher", "reward", "overlap_ratio")
INCOMPATIBLE, NOTHING_NEW, SHOULD_WORK, HARMFUL, UNDECIDED = VERDICTS = (
    "incompatible thinking (cold start first)", "nothing new to teach", "should work",
    "harmful (the teacher is behind the student)", "undecided (prompts with answers are needed)")
SHARED_MASS = 0.8        # below it two models do not think alike. Paper: .97-.99 where distillation works,
                         # .3-.8 where it swings


@torch.no_grad()
def positions(pair, r, k, *, temperature=1.0, teacher_temperature=1.0, micro_batch_tokens=16384):
    """`diagnose` at every position of a rollout: -> {name: (B, T)}, NaN where there is no response token."""
    out = {}
    with pair.autocast():
        for rows, _, values, _ in grade(*pair.splits, r, lambda *x: diagnose(*x, k), temperature=temperature,
                                        teacher_temperature=teacher_temperature, micro_batch_tokens=micro_batch_tokens):
            for name, x in values.items():
                part = x.new_full((len(rows), r.response_mask.size(1)), math.nan)            # (b, T)
                part[r.response_mask[rows]] = x                                              # packed row by row
                out.setdefault(name, x.new_full(r.response_mask.shape, math.nan))[rows] = part
    return out


def by_position(position, values, width):
    """Sums over buckets of `width` output positions:
    (N,) long, {name: (N,)} -> {"tokens": (BUCKETS,), name: (BUCKETS,)}.

    The last bucket takes all that lies beyond.
    """
    bucket = (position // width).clamp_max(BUCKETS - 1)                                      # (N,)
    values = {"tokens": torch.ones_like(position, dtype=torch.float32), **values}
    return {name: torch.zeros(BUCKETS, device=x.device).index_add(0, bucket, x.detach().float())
            for name, x in values.items()}


def bucket_means(sums, width):
    """What by_position summed, as lists of means, up to the last bucket that holds a token, None where there is none:
    {"width", "tokens", name: [...]}.
    """
    tokens = [int(x) for x in sums["tokens"]]
    used = max((i + 1 for i, x in enumerate(tokens) if x), default=0)
    means = {name: [x / t if t else None for x, t in zip(sums[name].tolist(), tokens)]
             for name in sums if name != "tokens"}
    return {"width": width, "tokens": tokens[:used],
            **{name: [round(x, 5) if x is not None and math.isfinite(x) else None for x in xs[:used]]
               for name, xs in means.items()}}


def continuation(pair, prompts, answers, responses, depths=DEPTHS, *, n, max_new_tokens, temperature, top_p, seed):
    """Paper 6.1: cut the student's responses at some depth and let teacher and student each finish them n times.

    prompts, responses: token ids, one response a prompt. A depth that is a float is a share of each response, an int a
    count of tokens. -> {depth: (gain (prompts,), student (prompts,), teacher (prompts,), tokens)}, shares of right
    answers and gain = teacher - student; `tokens` is the mean cut. Depth 0.0 is plain accuracy, and at 1.0 nothing is
    left to finish.
    """
    out = {}
    for depth in depths:
        cuts = [min(len(y), depth) if isinstance(depth, int) else int(depth * len(y)) for y in responses]
        student, teacher = (answered(
            model, pair.tokenizer, prompts, answers, starts=[y[:cut] for y, cut in zip(responses, cuts)], n=n,
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, **pair.ending,
            what=f"{name} from {depth}", generator=torch.Generator(pair.device).manual_seed(seed))[0].double().mean(1)
            for name, model in (("student", pair.student), ("teacher", pair.teacher)))       # (prompts,) each
        out[depth] = (teacher - student, student, teacher, sum(cuts) / len(cuts))
    return out


def diagnose_pair(pair, rows, *, k=16, n=2, max_new_tokens=128, temperature=1.0, eval_temperature=0.7, eval_top_p=0.95,
                  finishes=2, depths=DEPTHS, seed=0, micro_batch_tokens=16384):
    """Sample the student and measure what the paper says decides: -> the content of diagnose.json, verdict included.

    rows: from Pair.encode, {"prompt", "answer" or None, "ids"}. Each metric is a mean over tokens within a prompt, then
    over prompts, with the standard error of the latter. What needs answers is left out without them. Where nobody has
    solved a prompt, neither the student in these responses nor a model at the first depth, deeper ones are not tried.
    """
    prompts = [row["ids"] for row in rows]
    r = pair.write(prompts, n=n, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    grid = positions(pair, r, k, temperature=temperature, micro_batch_tokens=micro_batch_tokens)     # {name: (B, T)}
    del grid["log_p"]
    report = {"prompts": len(rows), "responses": len(r.ids), "k": k,
              "response_length": r.response_mask.sum(1).double().mean().item(),
              "truncated_fraction": r.truncated.double().mean().item(),
              "metrics": {name: estimate(x.view(len(rows), -1).nanmean(1).cpu()) for name, x in grid.items()}}
    width = -(-max_new_tokens // BUCKETS)
    position = torch.arange(r.response_mask.size(1), device=pair.device).expand_as(
        r.response_mask)[r.response_mask]                                                    # (N,)
    here = {name: grid[name][r.response_mask] for name in BY_POSITION}                       # (N,)
    report["by_position"] = bucket_means(by_position(position, here, width), width)
    bucket = (position // width).clamp_max(BUCKETS - 1)
    spread = [here["reward"][bucket == b] for b in range(len(report["by_position"]["tokens"]))]
    report["by_position"]["reward_5_95"] = [x.quantile(x.new_tensor([0.05, 0.95])).tolist() if len(x) else None
                                            for x in spread]

    asked = [i for i, row in enumerate(rows) if row["answer"] is not None]
    if asked:
        answers = [rows[i]["answer"] for i in asked]
        texts = [[pair.tokenizer.decode(r.response_ids(i * n + j), skip_special_tokens=True) for j in range(n)]
                 for i in asked]
        right = torch.tensor([[same_answer(read_answer(text), a) for text in row] for row, a in zip(texts, answers)])
        reward = grid["reward"].nanmean(1).view(-1, n)[asked].cpu()                          # sequence mean reward
        report["auroc"] = auroc(reward.flatten(), right.flatten())
        report["right"] = int(right.sum())
        finished = {}
        for depth in depths:
            finished |= continuation(
                pair, [prompts[i] for i in asked], answers, [r.response_ids(i * n) for i in asked], [depth], n=finishes,
                max_new_tokens=max_new_tokens, temperature=eval_temperature, top_p=eval_top_p, seed=seed)
            if depth == depths[0] and not right.any() and not any(x.any() for x in finished[depth][1:3]):
                break
        report["continuation"] = [
            {"depth": depth, "tokens": tokens, "student": estimate(student), "teacher": estimate(teacher),
             "gain": estimate(gain)} for depth, (gain, student, teacher, tokens) in finished.items()]
        report["predicted_gain"] = estimate(torch.stack([gain for gain, *_ in finished.values()]).mean(0))
    report["verdict"], report["reasons"] = verdict(report)
    why = {"overlap_token_advantage": report["metrics"]["overlap_token_advantage"]["mean"] is None and
           "at no position do the two share a likely token",
           "auroc": "auroc" in report and report["auroc"] is None and "the responses are all right, or all wrong",
           "standard_error": len(rows) == 1 and "one prompt has no spread"}
    report["undefined"] = {name: reason for name, reason in why.items() if reason}
    return report


def verdict(report):
    """One of VERDICTS and reasons in words, from compatibility and new capability at states that the student visits.

    Differs from the paper: it gives no rule. These are ours, and each leans on one of its sections.
    """
    def sure(x):        # further from 0 than chance allows: 1 above, -1 below, else 0
        error = math.inf if x["standard_error"] is None else x["standard_error"]            # one prompt proves nothing
        return 0 if abs(x["mean"]) <= 2 * error else math.copysign(1, x["mean"])
    metrics = {name: x["mean"] for name, x in report["metrics"].items()}
    mass = min(metrics["overlap_mass_student"], metrics["overlap_mass_teacher"])
    compatible = mass >= SHARED_MASS
    reasons = [f"the tokens that both find likely hold {mass:.3f} of the probability, "
               f"{'at least' if compatible else 'below'} {SHARED_MASS} (4.1: .97 to .99 where it works; "
               "5.1: as low as .3 where it does not)"]
    if metrics["reverse_kl"] < 1e-6:
        return NOTHING_NEW, ["student and teacher agree at every state: there is no gradient (Eq. 4)"]
    if "continuation" not in report:
        return (UNDECIDED if compatible else INCOMPATIBLE), reasons
    first, gain = report["continuation"][0], report["predicted_gain"]
    reasons += [f"on its own, teacher - student is {plus_minus(first['gain'], '+.3f')} in accuracy",
                f"from the student's own beginnings, mean over depths, teacher - student is "
                f"{plus_minus(gain, '+.3f')} (6.1)"]
    if first["student"]["mean"] == first["teacher"]["mean"] == 0:
        reasons.append("neither solved a single one of these prompts: take easier ones, or a higher --max-new-tokens")
    if sure(first["gain"]) < 0:
        return HARMFUL, reasons + ["distillation copies the teacher's distribution, its mistakes included (3.3)"]
    if not compatible or sure(first["gain"]) > 0 > sure(gain):
        return INCOMPATIBLE, reasons + [
            "the two part ways at states that the student visits (3.1); a cold start moves those (5.1)"]
    if sure(gain) < 0:
        return HARMFUL, reasons + ["where the student is, the teacher does worse (3.3)"]
    if sure(gain) == 0:
        return NOTHING_NEW, reasons + [
            "a gain within two standard errors: size or another seed is no new knowledge (3.2)"]
    return SHOULD_WORK, reasons + ["alike enough to be followed, and better where the student is (3.1, 3.2)"]


def show(report):
    """The report as a table: str."""
    r, lines = report, []
    lines.append(f"{r['prompts']} prompts, {r['responses']} responses of {r['response_length']:.1f} tokens, "
                 f"{r['truncated_fraction']:.0%} cut off; nats, +- standard error over prompts")
    titles = {
        "overlap_ratio": f"overlap ratio, k = {r['k']}, Eq. 6",
        "overlap_mass_student": "overlap mass, student, Eq. 9", "overlap_mass_teacher": "overlap mass, teacher, Eq. 10",
        "overlap_token_advantage": "overlap-token advantage, Eq. 7", "entropy_student": "entropy, student",
        "entropy_teacher": "entropy, teacher", "entropy_gap": "entropy gap, Eq. 8",
        "largest_gap": "largest gap, 4.1", "reverse_kl": "reverse KL", "reward": "mean reward"}
    for name, title in titles.items():
        x = r["metrics"][name]
        lines.append(f"{title:32} " + (
            "none shared" if x["mean"] is None else plus_minus(x, "9.4f")))
    if "continuation" in r:
        score = "not defined" if r["auroc"] is None else f"{r['auroc']:9.4f}"
        lines.append(f"{'AUROC of the mean reward, 6.2':32} {score}   {r['right']} right, "
                     f"{r['responses'] - r['right']} not")
        lines += ["", "who finishes the student's responses, 6.1:   student   teacher      gain"]
        for c in r["continuation"]:
            place = f"{c['depth']:.0%}" if isinstance(c["depth"], float) else f"{c['depth']} tokens"
            lines.append(
                f"  from {place:>9} ({c['tokens']:7.1f} tokens in) {c['student']['mean']:13.3f} "
                f"{c['teacher']['mean']:9.3f} {plus_minus(c['gain'], '+9.3f')}")
        lines.append(f"  {'mean over these depths':54} {plus_minus(r['predicted_gain'], '+8.3f')}")
    b = r["by_position"]
    lines += ["", "position      tokens    reward  5 % .. 95 %         overlap   H student   H teacher"]
    for i, tokens in enumerate(b["tokens"]):
        if tokens:
            low, high = b["reward_5_95"][i]
            lines.append(f"{i * b['width']:5d}-{(i + 1) * b['width'] - 1:<5d} {tokens:8d} {b['reward'][i]:9.3f} "
                         f"{low:7.2f} .. {high:5.2f} {b['overlap_ratio'][i]:12.3f} "
                         f"{b['entropy_student'][i]:11.3f} {b['entropy_teacher'][i]:11.3f}")
    return "\n".join([*lines, "", f"verdict: {r['verdict']}", *(f"  - {reason}" for reason in r["reasons"])])


# --- The open hypothesis (6.2): do the gradients of single positions point one way? --------------------------------


def logit_gradients(pair, r, objective, *, temperature=1.0, teacher_temperature=1.0, micro_batch_tokens=16384,
                    chunk=1024):
    """What each position of a rollout asks of the output head, a chunk at a time:
    yields g (c, V) = d loss / d logits, h (c, H).

    objective: (log_p, log_q, y) -> (N,). Its gradient on the head's weight (V, H) at position t is the outer product
    g_t h_t'. Where a model does more than a linear head (Split.own_logits) h is 1 and only the logits are compared.
    """
    student, teacher = pair.splits
    for _, ids, mask, is_response in micro_batches(r, micro_batch_tokens):
        with torch.no_grad(), pair.autocast():
            h_p, h_q = (states(s.trunk, ids, mask, is_response) for s in (student, teacher))         # (N, H), (N, H')
        for h_p, h_q, y in zip(*(x.split(chunk) for x in (h_p, h_q, ids[is_response]))):
            with torch.no_grad(), pair.autocast():
                z, log_q = student.head(h_p).float(), (teacher.head(h_q).float() / teacher_temperature).log_softmax(-1)
            z = z.requires_grad_()
            with torch.enable_grad():
                loss = objective((z / temperature).log_softmax(-1), log_q, y).sum()
            yield torch.autograd.grad(loss, z)[0], torch.ones_like(z[:, :1]) if student.own_logits else h_p.float()


def coherence(chunks):
    """How far the gradients G_t = g_t h_t' of single positions point one way: chunks of (g (c, V), h (c, H)) -> dict.

    coherence  |mean_t G_t| / mean_t |G_t|, Frobenius norms: 1 when all are equal, 0 when they cancel
    null       its root mean square when every G_t gets a random sign, exactly: sqrt(sum |G_t|^2) / sum |G_t|
    cosine     the mean cosine between two different positions, each weighing the same; its null is 0
    size       mean_t |G_t|, and positions, how many have a gradient at all
    The paper supposes, and does not test, that a failing teacher's gradients are large and cancel.
    """
    total = units = 0.0
    norms = []
    for g, h in chunks:
        norm = g.norm(dim=-1) * h.norm(dim=-1)                                               # (c,) = |g h'|
        unit = g / norm.clamp_min(1e-30).unsqueeze(-1)                                       # zero rows stay zero
        total, units = total + g.T @ h, units + unit.T @ h                                   # (V, H)
        norms.append(norm)
    norms = torch.cat(norms).double()
    n, size = int((norms > 0).sum()), norms.sum().item()
    if n < 2:
        raise ValueError("coherence needs two positions with a gradient")
    return {"coherence": total.double().norm().item() / size, "null": norms.norm().item() / size,
            "cosine": (units.double().norm().item() ** 2 - n) / (n * (n - 1)), "size": size / len(norms),
            "positions": n}


# --- Is the run going under? ---------------------------------------------------------------------------------------


def collapse(history, window=5):
    """A sentence when a run shows signs of collapse, else None. history: the rows of metrics.jsonl so far.

    Something that should hold has fallen from its best (either overlap mass by .1, or the reward by .2 nats) while
    something that should not has risen from its lowest (student entropy or response length by half, the entropy by .3
    nats at least; repetition by .2). Each is a mean over `window` steps.
    """
    falling, rising = ("overlap_mass_student", "overlap_mass_teacher", "reward"), (
        "entropy_student", "response_length", "repetition_fraction")
    history = [row for row in history if all(row[name] is not None for name in falling + rising)]
    if len(history) < 2 * window:
        return None

    def now_and(best, name):
        means = [sum(row[name] for row in history[i:i + window]) / window for i in range(len(history) - window + 1)]
        return best(means), means[-1]
    high, low = {name: now_and(max, name) for name in falling}, {name: now_and(min, name) for name in rising}
    falls = [name for name, (best, now) in high.items() if best - now > (0.2 if name == "reward" else 0.1)]
    least = {"entropy_student": lambda best: max(0.3, best / 2), "response_length": lambda best: best / 2,
             "repetition_fraction": lambda best: 0.2}
    rises = [name for name, (best, now) in low.items() if now - best > least[name](best)]
    if not (falls and rises):
        return None
    said = ", ".join("{} {:.2f} -> {:.2f}".format(name, *{**high, **low}[name]) for name in falls + rises)
    return f"signs of collapse: {said}; lower --lr or --max-new-tokens, or begin with a cold start (paper 5.1, 6.1)"


# --- From the command line -----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse whose every refusal is one line, with the nearest flag where one is misspelt."""

    def error(self, message):
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)

    def parse_known_args(self, args=None, namespace=None):                     # of subcommands too
        given, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, 1)
            self.error(f"unknown flag {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; --help lists them"))
        return given, unknown


@contextlib.contextmanager
def one_line(program):
    """What goes wrong inside is one line on stderr. Exit code 2: what was asked for cannot work (files, models, flags);
    1: it came to an end on its way (memory, disk, numbers that are not finite); 130: Ctrl-C.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)                            # its five tries to connect
    code = None
    try:
        yield
    except KeyboardInterrupt as stop:
        code, said = getattr(stop, "code", 130), str(stop) or "stopped"
    except ValueError as error:
        code, said = 2, error
    except (OSError, FloatingPointError) as error:
        code, said = 1, error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        code, said = 1, str(error) if isinstance(error, NoMemory) else (
            "out of memory; take smaller models, or --dtype bfloat16" + (f" ({error})" if str(error) else ""))
    if code:
        print(f"{program}: " + " ".join(str(said).split()), file=sys.stderr)
        sys.exit(code)


def provenance():
    """What made the numbers: command line, commit and whether the code was changed since (dirty), versions.

    commit and dirty are null where the code is not in a git repository.
    """
    def git(*arguments):
        if not shutil.which("git"):
            return None
        done = subprocess.run(["git", "--no-optional-locks", "-C", str(Path(__file__).resolve().parent), *arguments],
                              capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"command": " ".join(portable(word) for word in sys.argv), "commit": git("rev-parse", "--short=12", "HEAD"),
            "dirty": None if changed is None else bool(changed), "python": sys.version.split()[0],
            "torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads(),
            "processes": processes()[1]}


def portable(word):
    """A word of a command without the folders of one machine: "/home/me/bin/python" -> "python"."""
    return Path(word).name if word.startswith("/") else word


def finite_or_null(row):
    """JSON has no NaN, and 0 would be a lie: {"loss": nan, "tokens": 3}
    -> {"loss": None, "tokens": 3, "undefined": {"loss": "nan"}}. A row of finite numbers stays as it is.
    """
    bad = {name: str(x) for name, x in row.items() if isinstance(x, float) and not math.isfinite(x)}
    return {**row, **dict.fromkeys(bad), "undefined": {**row.get("undefined", {}), **bad}} if bad else row


def read_json(path):
    """What write_json wrote; ValueError with the path for anything else."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); restore or remove it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not what was written there; restore or remove it")
    return value


def write_json(path, value):
    """Whole or not at all; a list of numbers on one line."""
    text = json.dumps(value, indent=1)
    text = re.sub(r'\[\n([^][{}"]*)\n *\]', lambda found: f"[{' '.join(found[1].split())}]", text)
    write_whole(path, lambda file: file.write((text + "\n").encode()))


def write_whole(path, write):
    """Call write with a binary file that then stands at path: written aside, to the disk, renamed. A kill, a full disk
    or a loss of permission at any moment leaves what was there before.
    """
    aside = Path(f"{path}.tmp")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error         # torch.save hides it so
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None


def parse(argv=None):
    """Flags -> namespace; what cannot work is one line on stderr and exit code 2, before a model is loaded."""
    parser = Parser(prog="analysis.py", description="Diagnose a pair before training, or look at runs after it.",
                    allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    before = parser.add_argument_group("before: will this pair work?")
    for name in ("student", "teacher"):
        before.add_argument(f"--{name}", help="directory or hub name")
    before.add_argument("--prompts", help='JSON lines {"prompt", "answer"}; without it, additions of two numbers')
    for name, default, why in (
            ("count", 24, "prompts to sample, the first ones of the file shuffled by --seed"),
            ("n", 2, "responses a prompt"), ("max-new-tokens", 128, "of a response"),
            ("max-prompt-tokens", 1024, "longer prompts are dropped and counted"),
            ("finishes", 2, "endings that each model writes at each depth (6.1)"), ("k", 16, "of the overlap metrics"),
            ("seed", 0, "of the choice of prompts and of all sampling"),
            ("micro-batch-tokens", 16384, "padded tokens in one forward; changes memory, not the result")):
        before.add_argument(f"--{name}", type=int, default=default, help=why)
    before.add_argument("--temperature", type=float, default=1.0, help="of the student when it writes, as in training")
    before.add_argument("--eval-temperature", type=float, default=0.7, help="of both when they finish a response")
    before.add_argument("--eval-top-p", type=float, default=0.95, help="of both when they finish a response")
    before.add_argument("--template", default="none",
                        help="none, answer, boxed, or your own text with {question} in it")
    before.add_argument("--thinking", default="default", choices=("default", "on", "off"),
                        help="of chat templates that have it")
    before.add_argument("--device", default="auto", help="auto: cuda where there is one, else cpu")
    before.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation")
    before.add_argument("--trust-remote-code", action="store_true",
                        help="run code that a checkpoint brings; read it first")
    before.add_argument("--out", default="diagnose.json", help="where the report goes")
    before.add_argument("--tokens", help="an .html file: a few responses, every token tinted by its reward")
    after = parser.add_argument_group("after: what happened?")
    after.add_argument("--run", action="append", help="directory of a run; may be given several times, side by side")
    after.add_argument("--plot", help="an .svg file: the paper's Figure 6, every metric against the step")
    after.add_argument("--positions",
                       help="an .svg file: entropies, reward and overlap by output position and step (Fig. 13)")
    flags = parser.parse_args(argv)
    for name in ("count", "n", "max_new_tokens", "max_prompt_tokens", "finishes", "k", "micro_batch_tokens"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(flags, name)}: must be at least 1")
    if flags.temperature <= 0 or flags.eval_temperature < 0 or not 0 < flags.eval_top_p <= 1:
        parser.error("--temperature must be above 0, --eval-temperature not negative, "
                     "--eval-top-p above 0 and at most 1")
    if bool(flags.run) == bool(flags.student or flags.teacher):
        parser.error("give either --student and --teacher, or --run")
    if flags.run and flags.tokens or not flags.run and (flags.plot or flags.positions):
        parser.error("--plot and --positions go with --run, --tokens with --student and --teacher")
    if not flags.run and not (flags.student and flags.teacher):
        parser.error(f"--{'teacher' if flags.student else 'student'} is missing: a directory or hub name")
    try:
        if flags.prompts:
            check_file(flags.prompts, "--prompts")
        pick_device(flags.device, flags.dtype)
    except ValueError as error:
        parser.error(str(error))
    for run in flags.run or []:
        if not (Path(run) / "metrics.jsonl").is_file():
            parser.error(f"--run {run}: no metrics.jsonl there; give the --out of an opd.py run")
    for path in filter(None, (flags.out, flags.tokens, flags.plot, flags.positions)):
        if not Path(path).absolute().parent.is_dir():
            parser.error(f"{path}: its folder does not exist; make it first")
    return flags


def main(argv=None):
    flags = parse(argv)
    with one_line("analysis.py"):
        if flags.run:
            from experiments import plot
            return plot.runs(flags.run, flags.plot, flags.positions)
        from recipes import in_template                        # here, since recipes builds on this file
        rows = in_template(load_prompts(flags.prompts) if flags.prompts else additions(512, flags.seed), flags.template)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(flags.seed)).tolist()
        pair = Pair.load(flags.student, flags.teacher, device=flags.device, dtype=flags.dtype,
                         trust_remote_code=flags.trust_remote_code)
        rows = pair.encode([rows[i] for i in order[:flags.count]], max_prompt_tokens=flags.max_prompt_tokens,
                           new_tokens=flags.max_new_tokens, thinking=flags.thinking)
        if flags.tokens:
            from experiments import tokens
            tokens.write_page(pair, rows[:8], flags.tokens, k=flags.k, max_new_tokens=flags.max_new_tokens,
                              temperature=flags.temperature, seed=flags.seed)
            print(flags.tokens)
        report = diagnose_pair(pair, rows, **{name: getattr(flags, name) for name in (
            "k", "n", "max_new_tokens", "temperature", "eval_temperature", "eval_top_p", "finishes", "seed",
            "micro_batch_tokens")})
    print(show(report))
    write_json(flags.out, {"student": flags.student, "teacher": flags.teacher, **report, **provenance()})


if __name__ == "__main__":
    main()
