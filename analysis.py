"""analysis.py: will it work, is it working, and why (paper 2.3, 4, 6; Eq. 6 to 10).

At a state that the student visited, p is the student, q the teacher, P = TopK(p, k),
Q = TopK(q, k), I = P & Q:

    Eq. 6      overlap ratio            |I| / k
    Eq. 7      overlap-token advantage  (1/|I|) sum_I p'(v) (log q'(v) - log p'(v)), both
                                        renormalised on I
    Eq. 8      entropy gap              |H(q) - H(p)|, full vocabulary, absolute value at each state
    Eq. 9, 10  overlap mass             sum_I p(v)  and  sum_I q(v), not renormalised
    4.1        largest gap              |p(v) - q(v)| at the v of P with the largest
                                        p(v) |log q(v) - log p(v)|

The first part has these: log-probabilities (N, V) at N states -> one number a state, (N,). The
paper's E_t is their mean over all response tokens. The second part has means over prompts and by
output position, the third measures a pair before training.

    python analysis.py --student S --teacher T --prompts F   before: will this pair work?
    python analysis.py ... --tokens out.html                 and every token tinted by its reward
    python analysis.py --run DIR --plot out.svg              after: what happened (Fig. 6)
    python analysis.py --run DIR --positions out.svg         and where in the responses (Fig. 13)

To copy: with rollout.py, teacher.py and loss.py. `main` needs plumbing/.
"""

import math
import sys
from functools import partial
from pathlib import Path

import torch

from loss import LOG_ZERO, among, check_inputs, renormalised
from rollout import rollout as plain_rollout
from rollout import seed_of
from teacher import grade, read_by_teacher

# --- Eq. 6 to 10, a state at a time -------------------------------------------------------------


def shared_tokens(log_p, log_q, k):
    """P = TopK(p, k), and which of it is in TopK(q, k): (N, V), (N, V) -> ids (N, k), bool (N, k).

    The second marks the set I of Eq. 6 to 10 within P. ValueError for a k outside 1..V.
    """
    if not 1 <= k <= log_p.size(-1):
        raise ValueError(f"k={k} is outside 1..{log_p.size(-1)}, the size of the vocabulary")
    P = log_p.topk(k).indices  # (N, k)
    Q = log_q.topk(k).indices  # (N, k)
    return P, among(P, Q, log_p.size(-1))


def overlap_ratio(in_I):
    """Eq. 6, the share of the student's k likeliest tokens that are among the teacher's.

    in_I (N, k) bool, from shared_tokens -> (N,) in 0..1.
    """
    return in_I.float().mean(-1)


def overlap_token_advantage(log_p, log_q, P, in_I):
    """Eq. 7: (N, V), (N, V), and P, in_I (N, k) of shared_tokens -> (N,), nats, NaN if I is empty.

    It is exactly -KL(p' || q') / |I|, so never positive. Read it with the overlap mass: it says
    nothing about what lies outside I. The paper does not discuss an empty I. We leave such a state
    out of the mean (torch.nanmean) and count it.
    """
    log_p = renormalised(log_p, P, in_I)  # (N, k)
    log_q = renormalised(log_q, P, in_I)  # (N, k)
    advantage = torch.where(in_I, log_p.exp() * (log_q - log_p), 0).sum(-1)  # (N,)
    return torch.where(in_I.any(-1), advantage / in_I.sum(-1), math.nan)


def overlap_mass(log_p, P, in_I):
    """Eq. 9 (Eq. 10 if given log q), the probability of I: (N, V), (N, k), (N, k) -> (N,), 0..1."""
    return (log_p.gather(-1, P).exp() * in_I).sum(-1)


def largest_gap(log_p, log_q, P):
    """Paper 4.1, |p - q| at one token of P (N, k): (N, V), (N, V) -> (N,) in 0..1.

    It is the token v that asks most of the student: with the largest p(v) |log q(v) - log p(v)|.
    Differs from the paper, which plots p - q: signs would cancel in a mean. It says "advantage",
    and not whether that is renormalised, as in Eq. 7; here it is not.
    """
    log_p = log_p.gather(-1, P).clamp_min(LOG_ZERO)  # (N, k)
    log_q = log_q.gather(-1, P).clamp_min(LOG_ZERO)  # (N, k)
    asks = log_p.exp() * (log_q - log_p).abs()
    asks_most = asks.argmax(-1, keepdim=True)  # (N, 1)
    gap = (log_p.exp() - log_q.exp()).abs()
    return gap.gather(-1, asks_most).squeeze(-1)


def entropy(log_p):
    """H(p) = -sum_v p(v) log p(v) over the whole vocabulary: (N, V) -> (N,), nats."""
    return -(log_p.exp() * log_p.clamp_min(LOG_ZERO)).sum(-1)


def entropy_gap(H_p, H_q):
    """Eq. 8, |H(q) - H(p)|, from the entropies: (N,), (N,) -> (N,), nats."""
    return (H_q - H_p).abs()


def reverse_kl(log_p, log_q):
    """KL(p || q) over the whole vocabulary: (N, V), (N, V) -> (N,), nats.

    The value of loss.full_vocab, in less memory.
    """
    log_ratio = log_p.clamp_min(LOG_ZERO).sub_(log_q.clamp_min(LOG_ZERO))
    return log_ratio.mul_(log_p.exp()).sum(-1)


@torch.no_grad()
def diagnose(log_p, log_q, y, k, ends=()):
    """All of the above at each state: (N, V), (N, V), drawn tokens y (N,) -> {name: (N,)}.

        reward         log q(y) - log p(y), nats; its mean over a response is the paper's sequence
                       mean reward (6.2)
        distance_left  |log q(y) - log p(y)|, nats (arXiv 2609.04172)
        log_p          log p(y), nats, to compare with what the rollout recorded
        end_mass_*     the probability that the response ends here, with any token of `ends`

    ValueError for a k outside 1..V, and as loss.check_inputs raises it.
    """
    check_inputs(log_p, log_q, y)
    ends = torch.as_tensor(ends, dtype=torch.long, device=log_p.device)
    P, in_I = shared_tokens(log_p, log_q, k)
    H_p = entropy(log_p)
    H_q = entropy(log_q)
    log_p_y = log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)  # (N,)
    log_q_y = log_q.gather(-1, y.unsqueeze(-1)).squeeze(-1)  # (N,)
    return {
        "reverse_kl": reverse_kl(log_p, log_q),
        "overlap_ratio": overlap_ratio(in_I),
        "overlap_mass_student": overlap_mass(log_p, P, in_I),
        "overlap_mass_teacher": overlap_mass(log_q, P, in_I),
        "overlap_token_advantage": overlap_token_advantage(log_p, log_q, P, in_I),
        "entropy_gap": entropy_gap(H_p, H_q),
        "largest_gap": largest_gap(log_p, log_q, P),
        "entropy_student": H_p,
        "entropy_teacher": H_q,
        "end_mass_student": log_p[:, ends].exp().sum(-1),
        "end_mass_teacher": log_q[:, ends].exp().sum(-1),
        "reward": log_q_y - log_p_y,
        "distance_left": (log_q_y - log_p_y).abs(),
        "log_p": log_p_y,
    }


def auroc(scores, labels):
    """The chance that a true one scores above a false one: (B,), (B,) bool -> float.

    A tie counts half. None if all labels are alike. Paper 6.2 scores responses by their mean
    reward, and labels them by whether their answer is right.
    """
    labels = labels.bool()  # integers would index
    positive = scores[labels]
    negative = scores[~labels].sort().values
    if not len(positive) or not len(negative):
        return None
    below = torch.searchsorted(negative, positive)
    not_above = torch.searchsorted(negative, positive, right=True)
    wins = (below + not_above).double() / 2  # of each positive, over how many negatives
    return (wins.mean() / len(negative)).item()


# --- means over prompts, and by output position -------------------------------------------------

SHARE = (0.0, 1.0)  # within which accuracies lie
GAIN = (-1.0, 1.0)  # within which their differences lie
BUCKETS = 16  # of output positions
LEAST_TOKENS = 0.02  # share of all tokens that a bucket must hold to count as the worst
SHARED = ("overlap_ratio", "overlap_mass_student", "overlap_mass_teacher")
BY_POSITION = ("entropy_student", "entropy_teacher", "reward", *SHARED)


def estimate(x, extremes=()):
    """Mean over prompts, and its standard error: (prompts,) -> {"mean", "standard_error"}.

    NaN is left out. The mean of no value is None, and so is the error of fewer than two.
    extremes: SHARE or GAIN. A few prompts that agree prove nothing. So the error is at least what
    it would be with one more prompt at each extreme.
    """
    x = x[~x.isnan()].double()
    mean = x.mean().item() if len(x) else None
    error = None
    if len(x) > 1:
        error = standard_error(x)
        if extremes:
            error = max(error, standard_error(torch.cat([x, x.new_tensor(extremes)])))
    return {"mean": mean, "standard_error": error}


def standard_error(x):
    """The standard error of the mean of x (n,): float."""
    return (x.std() / len(x) ** 0.5).item()


def sure(x):
    """Is an estimate more than two standard errors away from 0? 1 if above, -1 if below, else 0."""
    error = x["standard_error"]
    if error is None or abs(x["mean"]) <= 2 * error:
        return 0
    return 1 if x["mean"] > 0 else -1


def surely_below(x, bound):
    """Is an estimate more than two standard errors below a bound? -> bool."""
    error = x["standard_error"]
    return error is not None and x["mean"] + 2 * error < bound


def surely_above(x, bound):
    """Is an estimate more than two standard errors above a bound? -> bool."""
    error = x["standard_error"]
    return error is not None and x["mean"] - 2 * error > bound


def plus_minus(x, form=".3f"):
    """An estimate as text: {"mean": .5, "standard_error": .0123} -> "0.500 +- 0.012".

    form: the format of the mean. A standard error that is None is shown as "?".
    """
    error = "?"
    if x["standard_error"] is not None:
        digits = form.split(".")[1]  # without sign and width
        error = f"{x['standard_error']:.{digits}}"
    return f"{x['mean']:{form}} +- {error}"


def ahead(a, b):
    """How far accuracy a is ahead of b, compared prompt by prompt: -> an estimate.

    Both are results of plumbing.measure.accuracy on the same prompts. With several files, the
    result is the mean over the files.
    """
    if "files" in a:
        return mean_of([ahead(x, y) for x, y in zip(a["files"], b["files"], strict=True)])
    share_a = torch.tensor(a["each"]).double() / a["samples"] * len(a["each"])  # (prompts,)
    share_b = torch.tensor(b["each"]).double() / b["samples"] * len(b["each"])
    return estimate(share_a - share_b, GAIN)


def mean_of(estimates):
    """The mean of independent estimates, all with the same weight: -> an estimate."""
    means = [x["mean"] for x in estimates]
    errors = [x["standard_error"] for x in estimates]
    error = None if None in errors else math.hypot(*errors) / len(errors)
    return {"mean": sum(means) / len(means), "standard_error": error}


def gap_recovery(before, after, teacher):
    """(after - before) / (teacher - before) of three accuracies, as in the paper: float.

    Each is a result of plumbing.measure.accuracy on the same prompts. None if teacher - before is
    within two standard errors of 0, or if there is one prompt: the ratio then says nothing.
    """
    gap = ahead(teacher, before)
    if not sure(gap):
        return None
    return (after["mean"] - before["mean"]) / gap["mean"]


def sums_by_position(values, place, width):
    """Sums over buckets of `width` output positions; the last bucket takes all that lies beyond.

    values {name: (N,)}, place (N,) of each token in its response, from 0 -> {name: (BUCKETS,)} for
    the names in BY_POSITION and for "tokens", the count.
    """
    bucket = (place // width).clamp_max(BUCKETS - 1)  # (N,)
    empty = torch.zeros(BUCKETS, dtype=torch.float64, device=place.device)
    sums = {"tokens": empty.index_add(0, bucket, torch.ones_like(place, dtype=torch.float64))}
    for name in BY_POSITION:
        sums[name] = empty.index_add(0, bucket, values[name].double())
    return sums


def means_by_position(sums, width):
    """Means over buckets of output positions (Fig. 13), from the sums of sums_by_position.

    -> {"width", "tokens": [...], name: [...]}, a list item for each bucket that holds tokens. A
    mean that is not finite is None.
    """
    used = int((sums["tokens"] > 0).sum())
    tokens = sums["tokens"][:used]
    means = {"width": width, "tokens": tokens.int().tolist()}
    for name in BY_POSITION:
        mean = (sums[name][:used] / tokens).tolist()
        means[name] = [round(x, 5) if math.isfinite(x) else None for x in mean]
    return means


def worst_bucket(by_position):
    """The least mean over the buckets of output positions, of each name in SHARED: {name: float}.

    by_position: from means_by_position. A bucket counts if it holds LEAST_TOKENS of all tokens: the
    mean of a few tokens may be low by chance.
    """
    tokens = by_position["tokens"]
    enough = [i for i, count in enumerate(tokens) if count >= LEAST_TOKENS * sum(tokens)]
    return {name: min(by_position[name][i] for i in enough) for name in SHARED}


# --- before training: will this pair work? ------------------------------------------------------

DEPTHS = (0.0, 0.25, 0.5, 0.75)  # of the student's response, where the teacher takes over (6.1)
INCOMPATIBLE = "incompatible thinking (cold start first)"
NOTHING_NEW = "nothing new to teach"
SHOULD_WORK = "should work"
HARMFUL = "harmful (the teacher is behind the student)"
UNDECIDED = "undecided (prompts with answers, or more of them, are needed)"
VERDICTS = (INCOMPATIBLE, NOTHING_NEW, SHOULD_WORK, HARMFUL, UNDECIDED)
FIRST_TOKENS = 8  # of each response, measured apart
ALIKE = 0.55  # of the overlap ratio at the first tokens; the paper names no bound
K_OF_ALIKE = 16  # with other k the ratio is another number
NO_DISTANCE = 1e-6  # nats of reverse KL; below it two models are the same, but for rounding
LEAD = 0.1  # of greedy accuracy; a smaller one we do not call new knowledge


def continuation(pair, rows, responses, depth, *, answered, n, **how):
    """Paper 6.1: cut the student's responses and let teacher and student each finish them n times.

    rows: prompts with "ids" and "answer"; responses: token ids, one list a row; depth: a share of
    each response if it is a float, a count of tokens if it is an int. 0.0 is plain accuracy.
    answered(pair, rows, model=, starts=, n=, **how) -> (is right, is cut off), (rows, n) bool each,
    where starts are the token ids that are written already: plumbing.answers.answered, or your own.
    -> {"student", "teacher"}: shares of right answers (rows,), and "tokens": kept, on average.

    Differs from the paper, which compares the teacher's ending with the one that the student had
    written: here the student, too, writes a new one.
    """
    cuts = []
    for response in responses:
        cut = min(len(response), depth) if isinstance(depth, int) else int(depth * len(response))
        cuts.append(cut)
    starts = [response[:cut] for response, cut in zip(responses, cuts)]
    student, _ = answered(pair, rows, model=pair.student, starts=starts, n=n, **how)
    teacher, _ = answered(pair, rows, model=pair.teacher, starts=starts, n=n, **how)
    return {
        "student": student.double().mean(1),
        "teacher": teacher.double().mean(1),
        "tokens": sum(cuts) / len(cuts),
    }


def diagnose_pair(
    pair,
    rows,
    *,
    answered,
    rollout=plain_rollout,
    k=16,
    n=2,
    max_new_tokens=128,
    temperature=1.0,
    eval_temperature=0.7,
    eval_top_p=0.95,
    finishes=2,
    depths=DEPTHS,
    seed=0,
):
    """Sample the student and measure what `verdict` needs: -> a report, a plain dict.

    rows: {"prompt", "answer" or None, "ids"}; answered: see continuation; n: responses a prompt;
    max_new_tokens: of a response, at most; depths: see continuation; finishes: endings at each of
    them. Each metric is a mean over the tokens of a prompt, then over prompts, with the standard
    error of the latter. What needs answers is left out if there are none.

    "first_tokens" and "worst_bucket" have the overlap at the first tokens of the responses and at
    the worst output positions. "greedy" has both models' accuracy at temperature 0, one answer to
    each prompt, and the teacher's lead. plumbing/README.md explains all keys.
    """
    with pair.autocast():
        r = rollout(
            pair.student,
            [row["ids"] for row in rows],
            n=n,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seeds=[seed_of(seed, "diagnosis", i) for i in range(len(rows))],
            **pair.sampling,
        )

    def per_position(log_p, log_q, y):
        return diagnose(log_p, log_q, y, k, pair.eos_ids)

    teacher_reads = read_by_teacher(r, rows, pair.pad_id)
    grid = grade(  # {name: (B, T)}
        pair, r, per_position, teacher_reads=teacher_reads, temperature=temperature
    )
    report = {
        "prompts": len(rows),
        "responses": len(r.ids),
        "k": k,
        "temperature": temperature,
        "eval_temperature": eval_temperature,
        "eval_top_p": eval_top_p,
        "response_length": r.response_mask.sum(1).double().mean().item(),
        "truncated_fraction": r.truncated.double().mean().item(),
        **agreement(grid, r, len(rows), max_new_tokens),
    }
    known = [i for i, row in enumerate(rows) if row["answer"] is not None]
    if known:
        responses = [[r.response_ids(i * n + j) for j in range(n)] for i in known]
        reward = grid["reward"].nanmean(1).view(-1, n)[known].cpu()  # (known, n)
        with_answers = [rows[i] for i in known]
        right = judged(pair, with_answers, responses, answered)
        report["auroc"] = auroc(reward.flatten(), right.flatten())
        report["right"] = int(right.sum())
        report["wrong"] = int((~right).sum())
        report["greedy"] = greedy(pair, with_answers, answered, max_new_tokens)
        solvable = any(report["greedy"][who]["mean"] > 0 for who in ("student", "teacher"))
        report["continuation"], report["predicted_gain"] = gains(
            pair,
            with_answers,
            [of_row[0] for of_row in responses],
            depths,
            solvable,
            answered=answered,
            n=finishes,
            max_new_tokens=max_new_tokens,
            temperature=eval_temperature,
            top_p=eval_top_p,
            seed=seed,
        )
    report["verdict"], report["reasons"] = verdict(report)
    return report


def agreement(grid, r, prompts, max_new_tokens):
    """How far the two agree on what the student wrote: {name: (B, T)}, r -> part of a report.

    "sampling_mismatch" compares log p with what the rollout recorded, nats.
    """
    metrics = {}
    for name, x in grid.items():
        if name != "log_p":
            metrics[name] = over_prompts(x, prompts)
    first_tokens = {}
    for name in SHARED:
        first_tokens[name] = over_prompts(grid[name][:, :FIRST_TOKENS], prompts)
    by_position = grid_by_position(grid, r.response_mask, max_new_tokens)
    mismatch = torch.where(r.response_mask, grid["log_p"] - r.log_p, 0).abs().max()
    return {
        "metrics": metrics,
        "first_tokens": first_tokens,
        "worst_bucket": worst_bucket(by_position),
        "by_position": by_position,
        "sampling_mismatch": mismatch.item(),
    }


def over_prompts(x, prompts):
    """The mean over the tokens of each prompt, then over prompts: (B, T) -> an estimate.

    NaN is left out: it stands where a response has no token.
    """
    return estimate(x.reshape(prompts, -1).nanmean(1).cpu())


def grid_by_position(grid, mask, max_new_tokens):
    """{name: (B, T)}, mask (B, T) bool -> what means_by_position returns."""
    width = math.ceil(max_new_tokens / BUCKETS)
    place = torch.arange(mask.size(1), device=mask.device).expand_as(mask)  # (B, T)
    values = {name: grid[name][mask] for name in BY_POSITION}
    return means_by_position(sums_by_position(values, place[mask], width), width)


def judged(pair, rows, responses, answered):
    """Are finished responses right? n lists of token ids for each row -> (rows, n) bool."""
    columns = []
    for j in range(len(responses[0])):
        starts = [of_row[j] for of_row in responses]
        right, _ = answered(pair, rows, starts=starts, max_new_tokens=0)  # nothing left to write
        columns.append(right)
    return torch.cat(columns, dim=1)


def greedy(pair, rows, answered, max_new_tokens):
    """The accuracy of both with the likeliest token each time.

    -> {"student", "teacher", "gain": the difference, "prompts": how many were asked}.
    """
    nothing_written = [[] for _ in rows]
    found = continuation(
        pair,
        rows,
        nothing_written,
        0.0,
        answered=answered,
        n=1,
        max_new_tokens=max_new_tokens,
        temperature=0.0,
    )
    return {**compared(found), "prompts": len(rows)}


def compared(found):
    """What `continuation` found, as estimates: {"student", "teacher", "gain": the difference}."""
    return {
        "student": estimate(found["student"], SHARE),
        "teacher": estimate(found["teacher"], SHARE),
        "gain": estimate(found["teacher"] - found["student"], GAIN),
    }


def gains(pair, rows, responses, depths, solvable, **how):
    """The teacher's gain at several depths (6.1): -> one dict a depth, and the mean over depths.

    If a depth is a count of tokens, only responses that go on after the deepest one count, as in
    the paper. If there are none, the result is [], None. If neither model solves a prompt at the
    first depth, deeper ones are not tried, unless some can be solved: one of the two did greedily.
    """
    deepest = max((depth for depth in depths if isinstance(depth, int)), default=-1)
    deep = [i for i, response in enumerate(responses) if len(response) > deepest]
    left_out = len(rows) - len(deep)
    rows = [rows[i] for i in deep]
    responses = [responses[i] for i in deep]
    if not rows:
        return [], None
    report = []
    gain_at = []
    for depth in depths:
        found = continuation(pair, rows, responses, depth, **how)
        gain_at.append(found["teacher"] - found["student"])  # (rows,)
        tokens = found["tokens"]
        cut = {"depth": depth, "tokens": tokens, "responses": len(rows), "left_out": left_out}
        report.append({**cut, **compared(found)})
        solved = solvable or found["student"].any() or found["teacher"].any()
        if depth == depths[0] and not solved:
            break
    return report, estimate(torch.stack(gain_at).mean(0), GAIN)


def verdict(report):
    """One of VERDICTS, and why: a list of reasons in words.

    Differs from the paper, which gives no rule. Ours is provisional: experiments/README.md tells
    of two teachers about which it errs. "Surely" means by more than two standard errors. The first
    that holds:

        nothing new   the two agree at every state: reverse KL below NO_DISTANCE
        harmful       the teacher is surely behind, alone or greedily
        incompatible  the overlap ratio of the first tokens is surely below ALIKE
        harmful       the teacher is surely behind at the student's states
        nothing new   its greedy lead is surely below LEAD
        should work   it is surely ahead, greedily and at the student's states, and the overlap
                      ratio of the first tokens is surely above ALIKE
        undecided     all else; after the first "harmful", a pair that was measured with another
                      k than 16; after "incompatible", one of which neither solved a prompt

    At the student's states: when it finishes what the student began, mean over depths (6.1).
    report: see diagnose_pair.
    """
    overlap = report["first_tokens"]["overlap_ratio"]
    reasons = []
    if report["metrics"]["reverse_kl"]["mean"] < NO_DISTANCE:
        return NOTHING_NEW, ["student and teacher agree at every state: no gradient (Eq. 4)"]
    if report["truncated_fraction"] > 0.5:
        reasons.append("most responses were cut off: take a higher --max-new-tokens")

    if is_behind(report):
        reasons.append("the student becomes what the teacher is, mistakes included (3.3)")
        return HARMFUL, reasons
    missing = what_is_missing(report)
    if missing:
        reasons.append(missing)
    if report["k"] != K_OF_ALIKE:
        reasons.append(f"our threshold of {ALIKE} is one for k = {K_OF_ALIKE}: leave --k out")
        return UNDECIDED, reasons
    if surely_below(overlap, ALIKE):
        reasons.append(
            f"of the likely first {FIRST_TOKENS} tokens less than {ALIKE} are shared: the two part "
            "ways (3.1); a cold start moves the student (5.1)"
        )
        return INCOMPATIBLE, reasons
    if missing:
        return UNDECIDED, reasons

    lead = report["greedy"]["gain"]
    gain = report["predicted_gain"]
    if sure(gain) < 0:
        reasons.append("the teacher does worse at the student's states (6.1)")
        return HARMFUL, reasons
    if surely_below(lead, LEAD):
        if sure(gain) > 0:
            reasons.append("the teacher samples more sharply: it is ahead, but not greedily")
        reasons.append(
            f"a greedy lead of {LEAD} or more would have shown: neither size (3.2) nor sharper "
            "sampling is new knowledge"
        )
        return NOTHING_NEW, reasons
    if sure(gain) > 0 and sure(lead) > 0 and surely_above(overlap, ALIKE):
        reasons.append("the two are alike enough (3.1)")
        reasons.append("the teacher is surely ahead, greedily and at the student's states (3.2)")
        return SHOULD_WORK, reasons
    reasons.append(
        "the prompts with answers do not say for sure that the two are alike, and that the teacher "
        "is ahead, greedily and at the student's states: take more (--count)"
    )
    return UNDECIDED, reasons


def is_behind(report):
    """Is the teacher surely behind the student, sampled from the prompt or greedily? -> bool."""
    if "greedy" not in report:
        return False
    leads = [report["greedy"]["gain"]]
    leads += [cut["gain"] for cut in report["continuation"][:1]]
    return any(sure(lead) < 0 for lead in leads)


def what_is_missing(report):
    """Why no gain can be judged, in words; None if it can."""
    if "greedy" not in report:
        return "without answers no lead can be measured"
    if not report["continuation"]:
        return "no response is longer than the deepest of --depths"
    asked = [report["greedy"], *report["continuation"]]
    if not any(x["student"]["mean"] or x["teacher"]["mean"] for x in asked):
        return (
            'neither solved one of these prompts; answers are read after "Answer:" or in \\boxed{} '
            "(--template answer asks for it); else take easier ones, or a higher --max-new-tokens"
        )
    return None


def main(argv=None):
    """The command: diagnose a pair, or show runs."""
    from plumbing import answers, exits, figures, files, flags, models, page, prompts, show, slots

    with exits.one_line("analysis.py"):
        args = flags.parse_analysis(sys.argv[1:] if argv is None else argv)
        if args.run:
            figures.runs(args.run, args.plot, args.positions)
            return
        rows = prompts.some_questions(args)
        pair = models.load_pair(args.student, args.teacher, **flags.of_pair(args))
        models.check_k(args.k, pair)
        rows = prompts.encode_for(args, pair, rows)
        sampling = {
            "k": args.k,
            "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature,
            "seed": args.seed,
        }
        if args.tokens:
            page.write_page(pair, rows[:8], args.tokens, checker=args.checker, **sampling)
        report = diagnose_pair(
            pair,
            rows,
            answered=partial(answers.answered, checker=args.checker),
            rollout=partial(slots.rollout, in_flight=pair.in_flight),
            depths=flags.depths_of(args),
            n=args.n,
            finishes=args.finishes,
            eval_temperature=args.eval_temperature,
            eval_top_p=args.eval_top_p,
            **sampling,
        )
        print(show.diagnosis(report))
        mismatch = show.mismatch(report, args.dtype)
        if mismatch:
            print(f"warning: {mismatch}", file=sys.stderr)
        names = {"student": args.student, "teacher": args.teacher}
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        files.write_json(args.out, {**names, **report, **files.provenance()})
        print(f"\nreport: {args.out}")
        if args.tokens:
            print(f"page: {args.tokens}")


if __name__ == "__main__":
    main()
