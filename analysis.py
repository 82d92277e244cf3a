"""analysis.py: will it work, is it working, and why (paper 2.3, 4, 6; Eq. 6 to 10).

At a state that the student visited, p student, q teacher, P = TopK(p, k), Q = TopK(q, k), I = P & Q:

    Eq. 6      overlap ratio            |I| / k
    Eq. 7      overlap-token advantage  (1/|I|) sum_I p'(v) (log q'(v) - log p'(v)),  p', q' renormalised on I
    Eq. 8      entropy gap              |H(q) - H(p)|, full vocabulary, absolute value at each position
    Eq. 9, 10  overlap mass             sum_I p(v)  and  sum_I q(v), not renormalised
    4.1        largest gap              |p(v) - q(v)| at the v of P with the largest p(v) |log q(v) - log p(v)|

The first half takes log-probabilities (N, V) at N packed positions and returns one number a position, (N,); the paper's
E_t is their mean over all positions of all responses. The second half diagnoses a teacher.Pair before training.

    python analysis.py --student S --teacher T --prompts F   before: will this pair work? table, verdict, diagnose.json
    python analysis.py ... --tokens out.html                 and the responses, every token tinted by its reward
    python analysis.py --run DIR [--run ...] --plot out.svg [--positions out.svg]   after: what happened (Fig. 6, 13)

To copy: this file alone. `main` needs plumbing/ and experiments/.
"""

import math
import sys

import torch

FLOOR = -1e4  # nats: stands for log 0, so that 0 log 0 is 0 and p log(p/0) finite

# --- Eq. 6 to 10, a position at a time -----------------------------------------------------------------------------


def shared_tokens(log_p, log_q, k):
    """P = TopK(p, k) and which of it is in TopK(q, k): (N, V), (N, V) -> (N, k) ids, (N, k) bool, the set I in P."""
    if not 1 <= k <= log_p.size(-1):
        raise ValueError(f"k={k} is outside 1..{log_p.size(-1)}, the size of the vocabulary")
    P, Q = log_p.topk(k).indices, log_q.topk(k).indices
    return P, torch.zeros_like(log_q, dtype=torch.bool).scatter_(-1, Q, True).gather(-1, P)


def overlap_ratio(log_p, log_q, k, shared=None):
    """Eq. 6, the share of the student's k likeliest tokens that are among the teacher's:
    (N, V), (N, V) -> (N,) in 0..1. shared, here and below: what shared_tokens gives, where it is known already.
    """
    P, in_I = shared or shared_tokens(log_p, log_q, k)
    return in_I.to(log_p.dtype).mean(-1)


def overlap_token_advantage(log_p, log_q, k, shared=None):
    """Eq. 7: (N, V), (N, V) -> (N,), nats, <= 0, since it is exactly -KL(p' || q') / |I|; NaN where I is empty.

    Read it with the overlap mass: it says nothing of what lies outside I. The paper does not discuss an empty I;
    we leave such a position out of the mean (torch.nanmean) and count it.
    """
    P, in_I = shared or shared_tokens(log_p, log_q, k)
    log_p, log_q = (
        torch.where(in_I, x.gather(-1, P), FLOOR).clamp_min(FLOOR).log_softmax(-1)
        for x in (log_p, log_q)
    )
    total = torch.where(in_I, log_p.exp() * (log_q - log_p), 0).sum(-1)
    return torch.where(in_I.any(-1), total / in_I.sum(-1), math.nan)


def overlap_mass(log_p, log_q, k, shared=None):
    """Eq. 9 and 10, the probability that each model puts on the shared tokens:
    (N, V), (N, V) -> ((N,) by p, (N,) by q).
    """
    P, in_I = shared or shared_tokens(log_p, log_q, k)
    return tuple((x.gather(-1, P).exp() * in_I).sum(-1) for x in (log_p, log_q))


def largest_gap(log_p, log_q, k, shared=None):
    """4.1, |p - q| at the token that asks most of the student, of its k likeliest the one with the largest
    p(v) |log q(v) - log p(v)|: (N, V), (N, V) -> (N,) in 0..1. The paper plots p - q; signs would cancel in a mean.
    """
    P, _ = shared or shared_tokens(log_p, log_q, k)
    log_p, log_q = (x.gather(-1, P).clamp_min(FLOOR) for x in (log_p, log_q))  # (N, k)
    asks_most = (log_p.exp() * (log_q - log_p).abs()).argmax(-1, keepdim=True)  # (N, 1)
    return (log_p.exp() - log_q.exp()).abs().gather(-1, asks_most).squeeze(-1)


def entropy(log_p):
    """H(p) = -sum_v p(v) log p(v) over the whole vocabulary: (N, V) -> (N,), nats."""
    return -(log_p.exp() * log_p.clamp_min(FLOOR)).sum(-1)


def entropy_gap(H_p, H_q):
    """Eq. 8, |H(q) - H(p)|, from the entropies: (N,), (N,) -> (N,), nats."""
    return (H_q - H_p).abs()


def reverse_kl(log_p, log_q):
    """KL(p || q) over the whole vocabulary, a measurement only (Eq. 4 is what may be descended):
    (N, V), (N, V) -> (N,), nats.
    """
    return (log_p.exp() * log_p.clamp_min(FLOOR).sub_(log_q.clamp_min(FLOOR))).sum(-1)


@torch.no_grad()
def diagnose(log_p, log_q, y, k):
    """All of the above and the reward from one top-k of each side: (N, V), (N, V), (N,) ids -> {name: (N,)}.

    reward: log q(y) - log p(y) at the sampled token (its mean over a response is the paper's sequence mean reward);
    log_p: log p(y), to hold against what the rollout recorded.
    """
    shared = shared_tokens(log_p, log_q, k)
    mass_p, mass_q = overlap_mass(log_p, log_q, k, shared)
    H_p, H_q = entropy(log_p), entropy(log_q)
    p_y, q_y = (x.gather(-1, y.unsqueeze(-1)).squeeze(-1) for x in (log_p, log_q))
    return {
        "reverse_kl": reverse_kl(log_p, log_q),
        "overlap_ratio": overlap_ratio(log_p, log_q, k, shared),
        "overlap_mass_student": mass_p,
        "overlap_mass_teacher": mass_q,
        "overlap_token_advantage": overlap_token_advantage(log_p, log_q, k, shared),
        "entropy_gap": entropy_gap(H_p, H_q),
        "largest_gap": largest_gap(log_p, log_q, k, shared),
        "entropy_student": H_p,
        "entropy_teacher": H_q,
        "reward": q_y - p_y,
        "log_p": p_y,
    }


def auroc(scores, labels):
    """The chance that a true one scores above a false one, ties counting half: (B,), (B,) bool -> float.

    None where all labels are alike. Paper 6.2 scores responses by their mean reward and labels them by their answers.
    """
    positive, negative = scores[labels], scores[~labels].sort().values
    if not len(positive) or not len(negative):
        return None
    below, not_above = (
        torch.searchsorted(negative, positive, right=right) for right in (False, True)
    )
    return ((below + not_above).double().mean() / (2 * len(negative))).item()


# --- Before training: will this pair work? -------------------------------------------------------------------------

BUCKETS = 16  # of output positions
BY_POSITION = ("entropy_student", "entropy_teacher", "reward", "overlap_ratio")
DEPTHS = (
    0.0,
    0.25,
    0.5,
    0.75,
)  # of the student's response, where the teacher takes over (paper 6.1)
INCOMPATIBLE, NOTHING_NEW, SHOULD_WORK, HARMFUL, UNDECIDED = VERDICTS = (
    "incompatible thinking (cold start first)",
    "nothing new to teach",
    "should work",
    "harmful (the teacher is behind the student)",
    "undecided (prompts with answers, or more of them, are needed)",
)
SHARED_MASS = 0.8  # below it two models do not think alike; paper: .97-.99 where it works, .3-.8 where it swings
LEAD = 0.1  # of accuracy: a smaller one is not worth a run
SHARE, GAIN = (0.0, 1.0), (-1.0, 1.0)  # within which accuracies, and their differences, lie


def estimate(x, extremes=()):
    """Mean over prompts, NaN left out, and its standard error, None where undefined:
    (prompts,) -> {"mean", "standard_error"}.

    extremes: SHARE or GAIN; the error is at least that as if one more prompt of each had been seen, since a few prompts
    that agree prove nothing.
    """
    x = x[~x.isnan()].double()
    errors = [
        (y.std() / len(y) ** 0.5).item()
        for y in (x, torch.cat([x, x.new_tensor(extremes)]))
        if len(x) > 1
    ]
    return {
        "mean": x.mean().item() if len(x) else None,
        "standard_error": max(errors, default=None),
    }


def ahead(a, b):
    """How far accuracy a (of plumbing.measure) is ahead of b, prompt by prompt: {"mean", "standard_error"}. Where one
    does not know its prompts, as in results of earlier versions, the two errors are added up.
    """
    each = [
        torch.tensor(x["each"]).double() / x["samples"] * len(x["each"])
        for x in (a, b)
        if "each" in x
    ]
    if len(each) == 2 and len(each[0]) == len(each[1]):
        return estimate(each[0] - each[1], GAIN)
    errors = [math.inf if x["standard_error"] is None else x["standard_error"] for x in (a, b)]
    return {"mean": a["mean"] - b["mean"], "standard_error": math.hypot(*errors)}


def by_position(grid, mask, width, over_processes=lambda x: x):
    """Means over buckets of `width` output positions, of which the last takes all that lies beyond (Fig. 13):
    {name: (B, T)}, (B, T) bool -> {"width", "tokens": [...], name: [...]}, None where a bucket has no finite mean.
    """
    bucket = (torch.arange(mask.size(1), device=mask.device) // width).clamp_max(
        BUCKETS - 1
    )  # (T,)

    def sums(x):  # (B, T) -> (BUCKETS,)
        x = torch.where(mask, x, 0).sum(0, dtype=torch.float32)
        return over_processes(torch.zeros(BUCKETS, device=x.device).index_add(0, bucket, x))

    tokens = sums(mask)
    means = {name: (sums(grid[name]) / tokens).tolist() for name in BY_POSITION}
    used = int((tokens > 0).sum())
    return {
        "width": width,
        "tokens": tokens[:used].int().tolist(),
        **{
            name: [round(x, 5) if math.isfinite(x) else None for x in xs[:used]]
            for name, xs in means.items()
        },
    }


def plus_minus(x, form=".3f"):
    """What `estimate` found, to read: {"mean": .5, "standard_error": None} -> "0.500 +- ?"."""
    error = x["standard_error"]
    return f"{x['mean']:{form}} +- " + (
        "?" if error is None else f"{error:{form.lstrip('+').lstrip('0123456789')}}"
    )


def gap_recovery(before, after, teacher):
    """(after - before) / (teacher - before) of three accuracies: float, or None where teacher and student lie within
    two standard errors of each other, or have none, being of one prompt: the ratio then says nothing.
    """
    gap = ahead(teacher, before)
    return (after["mean"] - before["mean"]) / gap["mean"] if sure(gap) else None


def sure(x):
    """Is an estimate further from 0 than chance allows: 1 above, -1 below, else 0, and of one prompt, too."""
    error = math.inf if x["standard_error"] is None else x["standard_error"]
    return 0 if abs(x["mean"]) <= 2 * error else math.copysign(1, x["mean"])


def continuation(pair, rows, responses, depths=DEPTHS, *, answered, n, **how):
    """Paper 6.1: cut the student's responses at some depth and let teacher and student each finish them n times.

    rows: from Pair.encode; responses: token ids, one a row. answered(pair, rows, model=, starts=, n=, **how) ->
    right (rows, n) bool, truncated (rows, n) bool; it is plumbing.answers.answered. A depth that is a float is a share
    of each response, an int a count of tokens; 0.0 is plain accuracy. -> {depth: (gain, student, teacher, tokens)},
    shares of right answers (rows,), gain = teacher - student, and the mean cut.
    """
    out = {}
    for depth in depths:
        cuts = [
            min(len(y), depth) if isinstance(depth, int) else int(depth * len(y)) for y in responses
        ]
        starts = [y[:cut] for y, cut in zip(responses, cuts)]
        student, teacher = (
            answered(pair, rows, model=model, starts=starts, n=n, **how)[0].double().mean(1)
            for model in (pair.student, pair.teacher)
        )  # (rows,) each
        out[depth] = (teacher - student, student, teacher, sum(cuts) / len(cuts))
    return out


def diagnose_pair(
    pair,
    rows,
    *,
    answered,
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
    """Sample the student and measure what the paper says decides: -> the content of diagnose.json, verdict included.

    rows: from Pair.encode, {"prompt", "answer" or None, "ids"}; answered: see continuation. Each metric is a mean over
    tokens within a prompt, then over prompts, with the standard error of the latter. What needs answers is left out
    without them. Where nobody has solved a prompt at the first depth, deeper ones are not tried.
    """
    r = pair.write(
        [row["ids"] for row in rows],
        n=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    grid = pair.grade(r, lambda *x: diagnose(*x, k), temperature=temperature)  # {name: (B, T)}
    report = {
        "prompts": len(rows),
        "responses": len(r.ids),
        "k": k,
        "response_length": r.response_mask.sum(1).double().mean().item(),
        "truncated_fraction": r.truncated.double().mean().item(),
        "metrics": {
            name: estimate(x.view(len(rows), -1).nanmean(1).cpu())
            for name, x in grid.items()
            if name != "log_p"
        },
        "by_position": by_position(grid, r.response_mask, -(-max_new_tokens // BUCKETS)),
    }
    report["sampling_mismatch"] = (
        torch.where(r.response_mask, grid["log_p"] - r.log_p, 0).abs().max().item()
    )
    asked = [i for i, row in enumerate(rows) if row["answer"] is not None]
    if asked:
        some, how = [rows[i] for i in asked], dict(answered=answered, max_new_tokens=max_new_tokens)
        responses = [[r.response_ids(i * n + j) for j in range(n)] for i in asked]
        right = torch.cat(
            [
                answered(pair, some, starts=[y[j] for y in responses], max_new_tokens=0)[0]
                for j in range(n)
            ],
            1,
        )  # (asked, n); nothing is left to write: judged as they stand
        reward = grid["reward"].nanmean(1).view(-1, n)[asked].cpu()  # sequence mean reward
        report["auroc"], report["right"] = (
            auroc(reward.flatten(), right.flatten()),
            int(right.sum()),
        )
        finished = {}
        for depth in depths:
            finished |= continuation(
                pair,
                some,
                [y[0] for y in responses],
                [depth],
                n=finishes,
                seed=seed,
                temperature=eval_temperature,
                top_p=eval_top_p,
                **how,
            )
            if (
                depth == depths[0]
                and not right.any()
                and not any(x.any() for x in finished[depth][1:3])
            ):
                break
        report["continuation"] = [
            {
                "depth": depth,
                "tokens": tokens,
                "student": estimate(student, SHARE),
                "gain": estimate(gain, GAIN),
                "teacher": estimate(teacher, SHARE),
            }
            for depth, (gain, student, teacher, tokens) in finished.items()
        ]
        report["predicted_gain"] = estimate(
            torch.stack([gain for gain, *_ in finished.values()]).mean(0), GAIN
        )
    report["verdict"], report["reasons"] = verdict(report)
    return report


def verdict(report):
    """One of VERDICTS and reasons in words, from compatibility and new capability at states that the student visits.

    Differs from the paper: it gives no rule. These are ours, and each leans on one of its sections. That nothing was
    seen decides nothing: "nothing new" takes an upper bound, two errors above the gain, below LEAD.
    """
    metrics = report["metrics"]
    mass = min(
        metrics["overlap_mass_student"], metrics["overlap_mass_teacher"], key=lambda x: x["mean"]
    )
    apart = INCOMPATIBLE if sure({**mass, "mean": mass["mean"] - SHARED_MASS}) < 0 else UNDECIDED
    reasons = [
        f"the tokens that both find likely hold {plus_minus(mass, '.3f')} of the probability, "
        f"{'below' if mass['mean'] < SHARED_MASS else 'at least'} {SHARED_MASS} "
        "(4.1: .97 to .99 where it works; 5.1: as low as .3 where it does not)"
    ]
    if report.get("truncated_fraction", 0) > 0.5:
        reasons += ["most responses were cut off: take a higher --max-new-tokens"]
    if metrics["reverse_kl"]["mean"] < 1e-6:
        return NOTHING_NEW, [
            "student and teacher agree at every state: there is no gradient (Eq. 4)"
        ]
    if "continuation" not in report:
        return apart, reasons
    first, gain = report["continuation"][0], report["predicted_gain"]
    reasons += [
        f"on its own, teacher - student is {plus_minus(first['gain'], '+.3f')} in accuracy",
        f"finishing what the student began, mean over depths, it is {plus_minus(gain, '+.3f')} (6.1)",
    ]
    if first["student"]["mean"] == first["teacher"]["mean"] == 0:
        return apart, reasons + [
            'neither solved one of these prompts: an answer stands after "Answer:" or in \\boxed{} (--template answer asks '
            "for it); else take easier ones, or a higher --max-new-tokens"
        ]
    if sure(first["gain"]) < 0:
        return HARMFUL, reasons + [
            "distillation copies the teacher's distribution, its mistakes included (3.3)"
        ]
    if apart == INCOMPATIBLE or sure(first["gain"]) > 0 > sure(gain):
        return INCOMPATIBLE, reasons + [
            "the two part ways at states that the student visits (3.1); a cold start moves those (5.1)"
        ]
    if sure(gain) < 0:
        return HARMFUL, reasons + ["where the student is, the teacher does worse (3.3)"]
    error, m = gain["standard_error"] or math.inf, report["prompts"]
    if sure(gain) == 0 and gain["mean"] + 2 * error < LEAD:
        return NOTHING_NEW, reasons + [
            f"{LEAD} or more would have shown: size or another seed is no new knowledge (3.2)"
        ]
    if sure(gain) == 0:
        nearer = max(
            gain["mean"], LEAD - gain["mean"]
        )  # of the two that it may be: a gain, or less than LEAD
        more = (
            f"at most {max(1, math.ceil(m * (2 * error / nearer) ** 2) - m)} more"
            if error < math.inf
            else "more"
        )
        return UNDECIDED, reasons + [
            f"nothing is sure after {m} prompts: {more} decide if it stays so (--count)"
        ]
    return SHOULD_WORK, reasons + [
        "alike enough to be followed, and better where the student is (3.1, 3.2)"
    ]


def main(argv=None):
    from experiments import plot, tokens
    from plumbing import answers, files, flags, prompts, show
    from plumbing.exits import one_line

    with one_line("analysis.py"):
        asked = flags.parse_analysis(sys.argv[1:] if argv is None else argv)
        if asked.run:
            return plot.runs(asked.run, asked.plot, asked.positions)
        from teacher import Pair

        rows = prompts.some_questions(asked.prompts, asked.template, asked.seed, asked.count)
        pair = Pair.load(asked.student, asked.teacher, **flags.of_pair(asked))
        rows = prompts.encode_for(asked, pair, rows)
        how = {
            name: getattr(asked, name) for name in ("k", "max_new_tokens", "temperature", "seed")
        }
        if asked.tokens:
            tokens.write_page(pair, rows[:8], asked.tokens, **how)
        report = diagnose_pair(
            pair,
            rows,
            answered=answers.answered,
            n=asked.n,
            finishes=asked.finishes,
            eval_temperature=asked.eval_temperature,
            eval_top_p=asked.eval_top_p,
            **how,
        )
        print(plot.diagnosis(report))
        if said := show.mismatch(report, asked.dtype):
            print(f"warning: {said}", file=sys.stderr)
        files.write_json(
            asked.out,
            dict(student=asked.student, teacher=asked.teacher, **report, **files.provenance()),
        )
        print(f"\n{asked.out}" + f", {asked.tokens}" * bool(asked.tokens))


if __name__ == "__main__":
    main()
