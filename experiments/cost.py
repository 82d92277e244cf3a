"""experiments/cost.py: what dense rewards cost, and how much of the vocabulary they need (paper 6
and 2.2). Toy models.

    arm            student <- teacher; 100 steps if not said otherwise
    success        responses of 96 tokens at most (a solution takes some 32), top-16
    8 to 48 tokens  a response budget of that many
    sampled, top-1 raw, top-4, top-32, full     the support of the loss; "raw" is the authors' loss
    student, raw   top-16 of the authors' loss
    long; long sampled; long full               400 steps with Eq. 5, Eq. 3, Eq. 4
    bigger, other  the two pairs that fail (phenomenology.py)

Criteria, fixed before the runs ("surely": by more than noise, and .05; lab.py).
    6.1 short      8 tokens end surely below success, at T .7 and greedily
    6.1 long       not askable: a response of a run that works ends by itself after some 32 tokens,
                   and a larger budget changes nothing
    6.1 backwards  in the failing run, other, the entropy passes 1.5 nats in the last quarter of
                   the 96 positions before it does in the first, in every seed. A quarter counts at
                   a step if it holds a fourth or more of the most tokens that it ever holds
    6.1 depth      both models finish the student's responses at T .7. The teacher's gain over the
                   student falls from each depth to the next, to a quarter of the first or less, in
                   every seed. (It says little: if slips fall evenly and cannot be undone, the gain
                   at depth d is s^d (t^(1-d) - s^(1-d)), where s and t are the accuracies of
                   student and teacher. This value is printed beside it.)
    6.2 success    the AUROC of a response's mean reward for its being right is surely above .6
    6.2 failure    that of bigger, and that of other, is at most .1 behind it, surely; contradicted
                   if it is surely more
    6.2 coherence  the hypothesis that the paper does not test: at step 0 the gradients of single
                   positions of a failing teacher, bigger or other, are larger than those of
                   success, and their sum is smaller compared with them (`coherence`), in every
                   seed
    6.3 support    top-1 raw ends surely below student, raw at T .7; top-4, top-32, full and sampled
                   end equal to success at T .7
    2.2 estimators long and long sampled end equal to long full, at T .7 and greedily
    2.2 ends       long sampled is cut off more often than long by .05, in every seed (ours: it is
                   said that students of the sampled token stop ending their responses in long
                   runs)

    python experiments/cost.py              results/cost.{txt,svg}
    python experiments/cost.py --quick      a few steps: does it run?
"""

import math
from functools import partial
from statistics import mean

import lab
import mechanism
import phenomenology
import plot
import torch
import toy
from lab import (
    NOT_ASKABLE,
    arm,
    below,
    both,
    difference,
    each,
    equal,
    every_seed,
    finding,
    more_than,
)

import opd
from analysis import DEPTHS, auroc, continuation, diagnose, estimate
from plumbing.answers import answered, read_answer, same_answer
from plumbing.figures import read_rows
from plumbing.flags import Config
from rollout import log_softmax
from teacher import grade, log_softmax_of, micro_batches, states

BUDGETS = (8, 16, 24, 32, 48)
SUPPORTS = {
    "sampled": dict(objective="sampled"),
    "top-1 raw": dict(objective="top-k-released", k=1),
    "top-4": dict(k=4),
    "top-32": dict(k=32),
    "full": dict(objective="full"),
}
ARMS = {
    "success": phenomenology.ARMS["success"],
    "bigger": phenomenology.ARMS["bigger"],
    "other": phenomenology.ARMS["other"],
    "student, raw": mechanism.ARMS["student, raw"],
    **{f"{n} tokens": arm("student", "teacher", max_new_tokens=n) for n in BUDGETS},
    **{name: arm("student", "teacher", **how) for name, how in SUPPORTS.items()},
    "long": arm("student", "teacher", steps=400),
    "long sampled": arm("student", "teacher", steps=400, objective="sampled"),
    "long full": arm("student", "teacher", steps=400, objective="full"),
}
TEACHERS = {"success": "teacher", "bigger": "bigger", "other": "other"}
FAILING = {"bigger": "knows no more", "other": "works from the other end"}
ESTIMATORS = {
    "Eq. 3, sampled": dict(objective="sampled"),
    "Eq. 4, full": dict(objective="full"),
    "Eq. 5, top-16": {},
    "raw, top-16": dict(objective="top-k-released"),
}
BINS = 20  # of the histogram of rewards


# --- probes ---------------------------------------------------------------------------------------


def backwards(lab, nats=1.5):
    """The first step of the failing run at which the student's entropy is above that many nats.

    The entropy is the mean over the tokens of a quarter of the positions, the first ("front") or
    the last ("back"). A step is left out if the quarter holds less than a fourth of the most tokens
    that it holds at any step: a few lost responses would decide.
    -> {"front", "back"}, None if it never is
    """
    lab.trained("other", ARMS["other"])
    rows = read_rows(lab.folder("other"))
    positions = [row["by_position"] for row in rows]
    quarter = max(len(x["tokens"]) for x in positions) // 4
    return {
        "front": passed(positions, slice(quarter), nats),
        "back": passed(positions, slice(3 * quarter, None), nats),
    }


def passed(positions, part, nats):
    """The first step at which the entropy of some buckets of positions is above that many nats."""
    counts = [sum(x["tokens"][part]) for x in positions]
    for step, x in enumerate(positions, start=1):
        count = counts[step - 1]
        total = sum(
            n * h for n, h in zip(x["tokens"][part], x["entropy_student"][part]) if h is not None
        )
        if count and count >= max(counts) / 4 and total > nats * count:
            return step
    return None


def signal(lab, prompts, samples):
    """With each teacher, before training and after it: does the mean reward tell right answers
    from wrong ones, and do the gradients of single positions point one way?
    """
    found = {}
    for name, teacher in TEACHERS.items():
        count = 16 if lab.quick else prompts
        found[name] = {
            "before": signal_of(lab, "student", teacher, count, samples),
            "after": signal_of(lab, lab.trained(name, ARMS[name]), teacher, count, samples),
        }
    return {"found": found}


def signal_of(lab, student, teacher, prompts, samples, coherent=None):
    """The same of one pair; coherence on the answers to the first `coherent` prompts, or to all."""
    pair = lab.load(student, teacher)
    rows = lab.rows(pair, prompts)
    r = lab.write(pair, rows, "signal", n=samples)
    rewards = grade(pair, r, partial(diagnose, k=16))["reward"]  # (B, T)
    scores = rewards.nanmean(1)  # (B,)
    right = []
    for i in range(len(r.ids)):
        text = pair.tokenizer.decode(r.response_ids(i), skip_special_tokens=True)
        right.append(same_answer(read_answer(text), rows[i // samples]["answer"]))
    right = torch.tensor(right)
    low = scores.quantile(0.01).item()
    high = scores.quantile(0.99).item()
    histogram = {"from": low, "to": high}
    for label, which in (("right", right), ("wrong", ~right)):
        inside = scores[which].clamp(low, high)
        histogram[label] = torch.histc(inside.float(), BINS, low, high).int().tolist()
    some = lab.write(pair, rows[:coherent], "signal", n=samples) if coherent else r
    gradients = logit_gradients(pair, some, partial(opd.objective, Config()))
    return {
        **coherence(gradients),
        "auroc": auroc_with_error(scores, right, samples),
        "right": right.double().mean().item(),
        "reward": rewards.nanmean().item(),
        "histogram": histogram,
    }


def signal_line(x):
    """What signal_of found, as text."""
    area = "none"
    if x["auroc"]["mean"] is not None:
        area = f"{x['auroc']['mean']:.3f} +- {x['auroc']['standard_error']:.3f}"
    return (
        f"AUROC {area}, right {x['right']:.3f}; |G| {x['size']:.3f}, coherence "
        f"{x['coherence']:.4f}, null {x['null']:.4f}, cosine {x['cosine']:.4f}; reward "
        f"{x['reward']:.3f}"
    )


def auroc_with_error(scores, right, samples, draws=200):
    """AUROC, and its standard error by a bootstrap over prompts: {"mean", "standard_error"}.

    scores, right: (prompts * samples,), the answers to a prompt one after the other.
    """
    area = auroc(scores, right)
    generator = torch.Generator().manual_seed(0)
    scores = scores.view(-1, samples)
    right = right.view(-1, samples)
    areas = []
    for _ in range(draws):
        chosen = torch.randint(len(scores), (len(scores),), generator=generator)
        drawn = auroc(scores[chosen].flatten(), right[chosen].flatten())
        if drawn is not None:
            areas.append(drawn)
    error = torch.tensor(areas, dtype=torch.float64).std().item() if len(areas) > 1 else None
    return {"mean": area, "standard_error": error}


def logit_gradients(pair, r, objective, *, temperature=1.0, teacher_temperature=1.0, chunk=1024):
    """What each position of a rollout asks of the output head, a chunk at a time:
    yields g (c, V) = d loss / d logits, h (c, H).

    objective: (log_p, log_q, y) -> (N,). Its gradient on the head's weight (V, H) at position t is
    the outer product g_t h_t'. If a model's head is not linear, h is 1 and only the logits are
    compared.
    """
    student = pair.student
    log_q_of = log_softmax_of(pair, pair.teacher, teacher_temperature)
    for part in micro_batches(r, pair.micro_batch_tokens):
        with torch.no_grad(), pair.autocast():
            h_p = states(student, part)  # (N, H)
            h_q = states(pair.teacher, part)  # (N, H')
        for start in range(0, len(part.y), chunk):
            c = slice(start, start + chunk)
            h = h_p[c]
            with torch.no_grad(), pair.autocast():
                z = student.get_output_embeddings()(h) if student.linear_head else h
                log_q = log_q_of(h_q[c])  # (c, V)
            z = z[:, : pair.vocab_size].float().requires_grad_()  # (c, V)
            with torch.enable_grad():
                loss = objective(log_softmax(z, temperature), log_q, part.y[c]).sum()
            (g,) = torch.autograd.grad(loss, z)
            yield g, h.float() if student.linear_head else torch.ones_like(z[:, :1])


def coherence(chunks):
    """6.2: how far the gradients G_t = g_t h_t' of single positions point one way.

    chunks: of g (c, V) and h (c, H), see logit_gradients.

    coherence  |mean_t G_t| / mean_t |G_t|, Frobenius norms: 1 if all are equal, 0 if they cancel
    null       the root mean square of coherence if every G_t gets a random sign, exactly:
               sqrt(sum |G_t|^2) / sum |G_t|
    cosine     the mean cosine between two different positions, each as heavy; its null is 0
    size       mean_t |G_t|
    positions  how many positions have a gradient

    The paper supposes, and does not test, that a failing teacher's gradients are large and cancel.
    """
    total = 0.0
    units = 0.0
    norms = []
    for g, h in chunks:
        norm = g.norm(dim=-1) * h.norm(dim=-1)  # (c,) = |g h'|
        unit = g / norm.clamp_min(1e-30).unsqueeze(-1)  # zero rows stay zero
        total = total + g.T @ h  # (V, H)
        units = units + unit.T @ h  # (V, H)
        norms.append(norm)
    norms = torch.cat(norms).double()
    n = int((norms > 0).sum())
    size = norms.sum().item()
    if n < 2:
        raise ValueError("coherence needs two positions with a gradient")
    return {
        "coherence": total.double().norm().item() / size,
        "null": norms.norm().item() / size,
        "cosine": (units.double().norm().item() ** 2 - n) / (n * (n - 1)),
        "size": size / len(norms),
        "positions": n,
    }


def depths(lab, prompts):
    """The teacher's gain over the student if both finish the student's responses (paper 6.1).

    For each depth: an estimate over prompts, and what the gain would be if slips fell evenly
    ("even").
    """
    pair = lab.load("student", "teacher")
    rows = lab.rows(pair, 16 if lab.quick else prompts)
    r = lab.write(pair, rows, "depths")
    responses = [r.response_ids(i) for i in range(len(rows))]
    how = dict(n=2, max_new_tokens=lab.new_tokens, seed=lab.seed, **toy.WAYS["T .7"])
    endings = [
        continuation(pair, rows, responses, depth, answered=answered, **how) for depth in DEPTHS
    ]
    s = endings[0]["student"].mean().item()
    t = endings[0]["teacher"].mean().item()
    found = []
    for depth, x in zip(DEPTHS, endings):
        found.append(
            {
                "depth": depth,
                "tokens": x["tokens"],
                **estimate(x["teacher"] - x["student"]),
                "even": s**depth * (t ** (1 - depth) - s ** (1 - depth)),
            }
        )
    return {"found": found}


def gradient_noise(lab, batches, size):
    """How noisy the estimators of the loss are: `expectations` of the output head's gradient, over
    batches of prompts. All estimators see the same tokens.
    """
    pair = lab.load("student", "teacher")
    if lab.quick:
        batches = 2
        size = 8
    rows = lab.rows(pair, batches * size)
    made = {name: [] for name in ESTIMATORS}
    for batch in range(batches):
        mine = rows[batch * size : (batch + 1) * size]
        r = lab.write(pair, mine, f"gradient noise {batch}")
        for name, settings in ESTIMATORS.items():
            objective = partial(opd.objective, Config(**settings))
            total = sum(g.T @ h for g, h in logit_gradients(pair, r, objective))
            made[name].append(total / r.response_mask.sum())  # (V, H)
    gradients = {name: torch.stack(of_name).flatten(1).double() for name, of_name in made.items()}
    return {"found": expectations(gradients, "Eq. 4, full")}


def expectations(made, exact):
    """What the gradients G of several batches say of their expectation: {estimator: a dict}.

    made: {estimator: (batches, numbers)}. size: the norm of the expectation; cosine: that between
    it and the expectation of the exact estimator; noise: the variance of G over the square of size.
    size and cosine come from inner products of different batches. There the noise cancels, so it
    is not taken for a difference in size or direction.
    """

    def across(a, b):
        products = a @ b.T
        return ((products.sum() - products.trace()) / (len(a) * (len(a) - 1))).item()

    found = {}
    for name, g in made.items():
        ours = across(g, g)
        theirs = across(made[exact], made[exact])
        found[name] = {
            "noise": g.square().sum().item() / len(g) / ours - 1,
            "size": math.sqrt(max(0, ours)),
            "cosine": across(g, made[exact]) / math.sqrt(max(1e-30, ours * theirs)),
        }
    return found


PROBES = {
    "backwards": (backwards, {"nats": 1.5}),
    "signal": (signal, {"prompts": 256, "samples": 4}),
    "depths": (depths, {"prompts": 512}),
    "gradient noise": (gradient_noise, {"batches": 8, "size": 64}),
}


# --- the report -----------------------------------------------------------------------------------


def judge(runs):
    """Judge by the criteria above: list of Finding."""
    return [*depth(runs), *rewards(runs), *gradients(runs), *supports(runs)]


def depth(runs):
    """6.1: what does depth cost?"""
    success = runs["success"]
    offs = both(runs["8 tokens"], success)
    yield finding(
        "6.1",
        "short responses teach little",
        "0.5K and 1K tokens learn little, 3K and 7K are best",
        f"8 tokens: {offs[0]} at T .7, {offs[1]} greedily, of 96",
        *map(below, offs),
    )
    length = mean(run["curves"]["response_length"][-1] for run in success)
    cut = mean(run["curves"]["truncated_fraction"][-1] for run in success)
    yield finding(
        "6.1",
        "long ones collapse",
        "10K and 15K tokens collapse near step 200",
        f"responses end by themselves after {length:.0f} tokens, {cut:.0%} are cut off at 96: a "
        "larger budget is the same",
        NOT_ASKABLE,
    )
    back = [run["back"] for run in runs["backwards"]]
    front = [run["front"] for run in runs["backwards"]]
    yield finding(
        "6.1",
        "a collapse begins at the end of the responses",
        "in the 15K run the entropy rises first at the end",
        f"in the failing run the last quarter passes 1.5 nats at step {each(back, 'd')}, the first "
        f"at {each(front, 'd')}",
        every_seed(
            b is not None and (f is None or b < f) for b, f in zip(back, front, strict=True)
        ),
    )
    gains = [[x["mean"] for x in run["found"]] for run in runs["depths"]]
    even = [mean(run["found"][i]["even"] for run in runs["depths"]) for i in range(len(DEPTHS))]
    yield finding(
        "6.1",
        "deep in a response the teacher helps less",
        "+.366, +.271, +.152, +.024 after 1K, 4K, 8K, 16K tokens",
        f"{'; '.join(each(x) for x in gains)} from depths {each(DEPTHS)}; if mistakes "
        f"were spread evenly {each(even)}",
        every_seed(x == sorted(x, reverse=True) and x[-1] <= x[0] / 4 for x in gains),
    )


def area(runs, name):
    """The AUROC with a teacher before training: Difference."""
    return mean_area([run["found"][name]["before"]["auroc"] for run in runs["signal"]])


def mean_area(areas):
    """The mean over seeds of AUROCs (auroc_with_error), and its noise: as a Difference."""
    means = [math.nan if x["mean"] is None else x["mean"] for x in areas]
    variances = [(x["standard_error"] or 0) ** 2 for x in areas]
    return lab.mean_over_seeds(means, variances)


def rewards(runs):
    """6.2: does the mean reward of a response rank answers?"""
    good = area(runs, "success")
    yield finding(
        "6.2",
        "a good teacher's mean reward ranks answers",
        "AUROC .733",
        f"{good.mean:.3f} ± {good.noise:.3f}",
        more_than(good, 0.6),
    )
    for name, what in FAILING.items():
        bad = area(runs, name)
        behind = lab.Difference(good.mean - bad.mean, math.hypot(good.noise, bad.noise))
        yield finding(
            "6.2",
            f"the mean reward of {name}, which {what} and fails, ranks them, too",
            "AUROC .751 with the one that fails",
            f"{bad.mean:.3f} ± {bad.noise:.3f}, {behind.mean:.3f} ± {behind.noise:.3f} behind",
            more_than(-behind, -0.1),
        )


def gradients(runs):
    """6.2: do the gradients of a failing teacher cancel?"""
    now = {name: [run["found"][name]["before"] for run in runs["signal"]] for name in TEACHERS}
    for name, what in FAILING.items():
        claim = f"the gradients of {name}, which {what} and fails, are large and cancel"
        yield cancelling(claim, now[name], now["success"])


def cancelling(claim, failing, working):
    """Are gradients of one teacher larger than those of another, and less coherent? -> Finding.

    failing, working: results of signal_of, one for each seed.
    """
    size = {}
    coherence = {}
    for who, runs in (("failing", failing), ("working", working)):
        size[who] = each((x["size"] for x in runs), ".3f")
        coherence[who] = each((x["coherence"] for x in runs), ".3f")
    return finding(
        "6.2",
        claim,
        "a hypothesis, not tested",
        f"size {size['failing']} against {size['working']}, coherence {coherence['failing']} "
        f"against {coherence['working']}",
        every_seed(
            a["size"] > b["size"] and a["coherence"] < b["coherence"]
            for a, b in zip(failing, working)
        ),
    )


def supports(runs):
    """6.3 and 2.2: how many tokens does the loss need, and which estimator?"""
    success = runs["success"]
    off = difference(runs["top-1 raw"], runs["student, raw"], "T .7")
    yield finding(
        "6.3",
        "the single likeliest token is too few",
        "AIME24 .446, against .458 of top-16; unstable",
        f"{off} of top-16 at T .7",
        below(off),
    )
    offs = {
        name: difference(runs[name], success, "T .7")
        for name in ("sampled", "top-4", "top-32", "full")
    }
    yield finding(
        "6.3",
        "the sampled token, 4 or 32 likely ones, or all do as well as 16",
        "AIME24 .454 sampled, .473 top-4, .463 top-64",
        ", ".join(f"{name} {x}" for name, x in offs.items()) + " at T .7",
        *map(equal, offs.values()),
    )
    offs = {
        f"{name}, {way}": difference(runs[name], runs["long full"], way)
        for name in ("long", "long sampled")
        for way in ("T .7", "greedy")
    }
    yield finding(
        "ours",
        "Eq. 3, 4 and 5 end alike",
        "not there",
        ", ".join(f"{name} {x}" for name, x in offs.items()) + ", of Eq. 4, after 400 steps",
        *map(equal, offs.values()),
    )
    cut = {
        name: [run["curves"]["truncated_fraction"][-1] for run in runs[name]]
        for name in ("long", "long sampled")
    }
    yield finding(
        "ours",
        "after a long run with the sampled token alone, responses no longer end",
        "not there",
        f"cut off after 400 steps {each(cut['long sampled'])}, with Eq. 5 {each(cut['long'])}",
        every_seed(a - b >= 0.05 for a, b in zip(cut["long sampled"], cut["long"])),
    )


def more(runs):
    """Lines on the depths, the mean reward, coherence, and the estimators."""
    lines = [""]
    for run in runs["depths"]:
        cells = [
            f"{x['tokens']:.1f} tokens in {x['mean']:+.3f} +- {x['standard_error']:.3f} "
            f"({x['even']:+.3f})"
            for x in run["found"]
        ]
        lines.append(f"depths, seed {run['seed']}: {', '.join(cells)}")
    for run in runs["signal"]:
        for name in TEACHERS:
            for when in ("before", "after"):
                said = signal_line(run["found"][name][when])
                lines.append(f"signal, seed {run['seed']}: {name:8} {when:6} {said}")
    for run in runs["gradient noise"]:
        for name, x in run["found"].items():
            lines.append(
                f"gradient, seed {run['seed']}: {name:16} size {x['size']:.4f}, noise "
                f"{x['noise']:.3f} of it, cosine with Eq. 4 {x['cosine']:.4f}"
            )
    return lines


if __name__ == "__main__":
    lab.main(__doc__, ARMS, judge, probes=PROBES, more=more, draw=plot.cost)
