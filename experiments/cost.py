"""experiments/cost.py: what dense rewards cost, and how much of the vocabulary they need (paper 6
and 2.2), toy world.

6.1 short, long the success pair (small <- big, post-trained) with response budgets of 8 to 192
                tokens; a solution takes some 33. Hold if 48 is better than the shortest, and than
                the longest, by more than noise (here and below two standard errors,
                lab.difference). Where 48 cuts nothing off, a longer budget can only be worse if
                responses grow, as the paper's do; the table has both
6.1 backwards   the paper's longest budget collapses from the end of the responses forwards. Here
                no budget collapses, but the pair that fails does (small <- other family's): holds
                if in every seed its entropy passes 1.5 nats in the last quarter of the 96
                positions before it does in the first (in five earlier runs, of recipe.py at commit
                54e2e90: in two). A quarter speaks once it holds a fourth of the tokens it ever
                does
6.1 depth       teacher and student finish the student's responses from four depths. Holds if the
                teacher's gain falls from each depth to the next, to a quarter of the first or
                less. (A first version asked for 0 within two standard errors at the last; seed 0
                had +.046, +-.006, at commit 54e2e90.) It says little: if slips fall evenly, cannot
                be undone, and the teacher is as good on any right beginning as on its own, the
                gain at depth d is s^d (t^(1-d) - s^(1-d)), s and t being the accuracies; this
                stands beside it
6.2 global      AUROC of a response's mean reward for its being right, with the teacher that
                succeeds, and with the two that fail: the bigger one of the same pipeline (the
                paper's case), which teaches nothing, and the other family's, which ruins the
                student. Holds if all are .6 or more, and those no more than .1 behind. The reward
                where a response first goes wrong stands beside it. (6.2 success: the first alone,
                as in real.py; judged after the runs)
6.2 coherence   the gradients of single positions with the same three. The paper supposes that a
                failing teacher's are large and cancel: holds for each of the two if, at step 0,
                where all three grade the same tokens, they are larger than the successful
                teacher's, and their sum smaller beside them (`coherence` below; the mean cosine of
                two positions, which weighs small ones alike, may say otherwise: it is printed and
                drawn)
6.3 support     sampled token, the student's likeliest 1 (top-k-released, as Eq. 5 is 0 there), 4,
                16, 32, all. Holds if, after 100 steps, 1 ends below 16 of the same objective by
                more than noise, and no other does, nor by lab.MARGIN, noise included; the noisy
                one, the sampled token, is asked after 800 (after 100, when all were, it was .023
                behind, noise .016, and still rising: commit 5ae144f)
2.2 estimators  Eq. 3, 4, 5 and the released surrogate on the same tokens: how noisy is the
                gradient of the output head from one batch to the next, how far does its mean point
                where Eq. 4 points, and what does a step take? Holds if all end equal to Eq. 4
                (lab.equal) after 800 steps. (Asked after 200, at commit 5ae144f, they were .04 to
                .05 behind and still rising. 800 were chosen with runs of seed 0 in view)

    python experiments/cost.py              three seeds; results/cost.{json,txt,svg}
    python experiments/cost.py --quick      one seed, few steps: does it run?
"""

import math
from functools import partial
from statistics import mean

import plot
import torch
from lab import (
    MARGIN,
    Config,
    analysis,
    difference,
    distil,
    encoded,
    equal,
    load,
    main,
    make_models,
    opd,
    told,
    toy,
    verdicts,
    write,
    write_text,
)

from plumbing.answers import answered, read_answer, same_answer
from plumbing.figures import read_rows
from rollout import log_softmax
from teacher import grade, log_softmax_of, micro_batches, states

BUDGETS = (8, 16, 24, 32, 48, 96, 192)
SUPPORTS = {
    "sampled": dict(objective="sampled"),
    "top-1, released": dict(objective="top-k-released", k=1),
    "top-16, released": dict(objective="top-k-released"),
    "top-4": dict(k=4),
    "top-16": {},
    "top-32": dict(k=32),
    "full": dict(objective="full"),
}
ESTIMATORS = {
    "Eq. 3, sampled": SUPPORTS["sampled"],
    "Eq. 4, full": SUPPORTS["full"],
    "Eq. 5, top-16": SUPPORTS["top-16"],
    "released, top-16": SUPPORTS["top-16, released"],
}
LONGER = ("sampled", "full", "top-16", "top-16, released")
TEACHERS = {"success": "teacher", "bigger": "bigger", "other": "other"}


def seed_runs(seed, world, scratch, quick):
    make_models(world, seed)
    steps, runs = 4 if quick else 100, []

    def run(part, arm, teacher="teacher", **settings):
        out = scratch / f"{part}-{arm}-{settings.get('steps', steps)}-{seed}"
        settings = {
            **dict(
                seed=seed,
                steps=steps,
                eval_every=steps // 4,
                eval_n=1 if quick else 4,
                eval_max_new_tokens=96,
            ),
            **settings,
        }
        found = distil(world / "student", world / teacher, world, out, **settings)
        curves = found.pop("curves")
        runs.append(
            {
                "part": part,
                "arm": arm,
                "seed": seed,
                **found,
                "passed": passed(read_rows(out)),
                "accuracies": [x for x in curves["accuracy"] if x is not None],
                "overlap": curves["overlap_ratio"][-1],
                "length": curves["response_length"][-1],
                "cut_off": max(curves["truncated_fraction"]),
                "largest_grad_norm": max(curves["grad_norm"]),
                "time_update": mean(curves["time_update"]),
            }
        )
        return out / "student"

    for budget in BUDGETS:
        run("length", str(budget), max_new_tokens=budget)
    for arm, settings in SUPPORTS.items():
        run("support", arm, **settings)
    for arm in LONGER:
        run("longer", arm, **SUPPORTS[arm], steps=8 * steps, eval_every=steps)
    for pair, teacher in TEACHERS.items():
        for when, after in (("before", 0), ("half-way", steps // 2), ("after", steps)):
            student = run("coherence", pair, teacher, steps=after) if after else world / "student"
            runs.append(
                {
                    "part": "signal",
                    "arm": pair,
                    "when": when,
                    "seed": seed,
                    **signal(student, world / teacher, world, seed, quick, slips=when == "before"),
                }
            )
    runs.append(
        {"part": "depth", "arm": "success", "seed": seed, "depths": depths(world, seed, quick)}
    )
    runs += [
        {"part": "estimator", "arm": arm, "seed": seed, **found}
        for arm, found in gradient_noise(world, seed, quick).items()
    ]
    return runs


def passed(rows, nats=1.5):
    """The first step of a run at which the student's entropy is above that many nats in the mean
    over the tokens of the first and of the last quarter of the positions: {"front", "back"}, None
    where it never is. Steps are left out at which a quarter holds less than a fourth of the
    tokens that it does at another: one response that got lost.
    """
    rows, found = [row["by_position"] for row in rows], {}
    quarter = max(len(row["tokens"]) for row in rows) // 4
    for name, part in (("front", slice(quarter)), ("back", slice(3 * quarter, None))):
        counts = [sum(row["tokens"][part]) for row in rows]
        totals = [
            sum(n * h for n, h in zip(row["tokens"][part], row["entropy_student"][part]) if n)
            for row in rows
        ]
        found[name] = next(
            (
                step
                for step, (count, total) in enumerate(zip(counts, totals), 1)
                if count >= max(counts) / 4 and total > nats * count
            ),
            None,
        )
    return found


def signal(student, teacher, world, seed, quick, slips):
    """Coherence of the positions' gradients and AUROC of the mean reward, at the states that the
    student visits.

    slips: and the mean reward where a response first goes wrong; for a student that thinks as its
    family does.
    """
    pair, count = load(student, teacher), 16 if quick else 256
    rows = encoded(pair, world / "prompts.jsonl", count)
    r = write(pair, [row["ids"] for row in rows], max_new_tokens=96, n=4, seed=seed)
    grid = grade(pair, r, partial(analysis.diagnose, k=16))  # {name: (B, T)}
    right = torch.tensor(
        [
            same_answer(
                read_answer(pair.tokenizer.decode(r.response_ids(i), skip_special_tokens=True)),
                rows[i // 4]["answer"],
            )
            for i in range(len(r.ids))
        ]
    )
    at_slips = []
    for i, reward in enumerate(grid["reward"] if slips else ()):
        digits = [
            int(word[1]) for word in rows[i // 4]["prompt"].split()[1:-1]
        ]  # "Add a3 b7 :" -> 3, 7
        at = toy.first_slip(r.response_ids(i), digits, len(digits))
        if at is not None and at < len(r.response_ids(i)):
            at_slips.append(reward[at].item())
    gradients = logit_gradients(pair, r, partial(opd.objective, Config()))
    return {
        **coherence(gradients),
        "auroc": analysis.auroc(grid["reward"].nanmean(1), right),
        "right": right.float().mean().item(),
        "reward": grid["reward"].nanmean().item(),
        "reward_at_slips": mean(at_slips) if at_slips else None,
    }


def logit_gradients(pair, r, objective, *, temperature=1.0, teacher_temperature=1.0, chunk=1024):
    """What each position of a rollout asks of the output head, a chunk at a time:
    yields g (c, V) = d loss / d logits, h (c, H).

    objective: (log_p, log_q, y) -> (N,). Its gradient on the head's weight (V, H) at position t is
    the outer product g_t h_t'. Where a model does more than a linear head, h is 1 and only the
    logits are compared.
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
    """6.2: how far the gradients G_t = g_t h_t' of single positions point one way: of chunks g
    (c, V), h (c, H).

    coherence  |mean_t G_t| / mean_t |G_t|, Frobenius norms: 1 when all are equal, 0 when they
               cancel
    null       its root mean square when every G_t gets a random sign, exactly: sqrt(sum |G_t|^2) /
               sum |G_t|
    cosine     the mean cosine between two different positions, each weighing the same; its null is
               0
    size       mean_t |G_t|, and positions, how many have a gradient at all
    The paper supposes, and does not test, that a failing teacher's gradients are large and cancel.
    """
    total, units, norms = 0.0, 0.0, []
    for g, h in chunks:
        norm = g.norm(dim=-1) * h.norm(dim=-1)  # (c,) = |g h'|
        unit = g / norm.clamp_min(1e-30).unsqueeze(-1)  # zero rows stay zero
        total, units = total + g.T @ h, units + unit.T @ h  # (V, H)
        norms.append(norm)
    norms = torch.cat(norms).double()
    n, size = int((norms > 0).sum()), norms.sum().item()
    if n < 2:
        raise ValueError("coherence needs two positions with a gradient")
    return {
        "coherence": total.double().norm().item() / size,
        "null": norms.norm().item() / size,
        "cosine": (units.double().norm().item() ** 2 - n) / (n * (n - 1)),
        "size": size / len(norms),
        "positions": n,
    }


def depths(world, seed, quick):
    """Gain of the teacher over the student who finish the student's responses, its s.e. over
    prompts, and what it would be if the teacher were as good on any right beginning (6.1 depth,
    above): a dict a depth.
    """
    pair = load(world / "student", world / "teacher")
    rows = encoded(pair, world / "prompts.jsonl", 16 if quick else 512)
    r = write(pair, [row["ids"] for row in rows], max_new_tokens=96, seed=seed)
    responses = [r.response_ids(i) for i in range(len(rows))]
    how = dict(answered=answered, n=4, max_new_tokens=96, seed=seed)
    found = {
        depth: analysis.continuation(pair, rows, responses, depth, **how)
        for depth in analysis.DEPTHS
    }
    s = found[0.0]["student"].mean().item()
    t = found[0.0]["teacher"].mean().item()
    return [
        {
            "depth": depth,
            "tokens": x["tokens"],
            **analysis.estimate(x["teacher"] - x["student"]),
            "even": s**depth * (t ** (1 - depth) - s ** (1 - depth)),
        }
        for depth, x in found.items()
    ]


def gradient_noise(world, seed, quick):
    """The output head's gradient of the mean loss, eight batches of 64 prompts, the same tokens
    for all estimators: what `expectations` says of it, a dict an estimator.
    """
    pair, made = load(world / "student", world / "teacher"), {}
    batches, size = (2, 8) if quick else (8, 64)
    rows = encoded(pair, world / "prompts.jsonl", batches * size)
    for batch in range(batches):
        prompts = [row["ids"] for row in rows[batch * size : (batch + 1) * size]]
        r = write(pair, prompts, max_new_tokens=96, seed=1000 * seed + batch)
        for arm, settings in ESTIMATORS.items():
            objective = partial(opd.objective, Config(**settings))
            total = sum(g.T @ h for g, h in logit_gradients(pair, r, objective))
            made.setdefault(arm, []).append(total / r.response_mask.sum())  # (V, H)
    return expectations(
        {arm: torch.stack(each).flatten(1).double() for arm, each in made.items()}, "Eq. 4, full"
    )


def expectations(made, exact):
    """What the gradients G of several batches, {estimator: (batches, numbers)}, say of their
    expectation: a dict each.

    size: its norm; cosine: of it with that of the exact estimator's; noise: the variance of G
    over the square of size. All from inner products of different batches, in which noise cancels:
    it does not pass for an angle.
    """

    def across(a, b):
        products = a @ b.T
        return ((products.sum() - products.trace()) / (len(a) * (len(a) - 1))).item()

    found = {}
    for arm, g in made.items():
        ours, theirs = across(g, g), across(made[exact], made[exact])
        found[arm] = {
            "noise": g.square().sum().item() / len(g) / ours - 1,
            "size": math.sqrt(max(0, ours)),
            "cosine": across(g, made[exact]) / math.sqrt(max(1e-30, ours * theirs)),
        }
    return found


# --- the report -----------------------------------------------------------------------------------


def judge(runs):
    """The criteria above: [(name, criterion, what was found, does it hold)]."""
    arms = {}
    for r in runs:
        arms.setdefault((r["part"], r["arm"], r.get("when")), []).append(r)

    def of(part, arm, when=None):
        return arms[part, arm, when]

    lines = []
    for name, budget in (("short", BUDGETS[0]), ("long", BUDGETS[-1])):
        gain, noise = difference(of("length", "48"), of("length", str(budget)))
        lines.append((f"6.1 {name}", f"48 better than {budget}", told(gain, noise), gain > noise))
    fails = {r["seed"]: r["passed"] for r in of("coherence", "other")}.values()  # of the longer run
    lines.append(
        (
            "6.1 backwards",
            "back before front, every seed",
            ", ".join(f"step {x['back']} and {x['front']}" for x in fails),
            all(
                x["back"] is not None and (x["front"] is None or x["back"] < x["front"])
                for x in fails
            ),
        )
    )
    each = list(zip(*(r["depths"] for r in of("depth", "success"))))  # a depth, its seeds
    gains = [mean(x["mean"] for x in seeds) for seeds in each]
    noise = 2 * math.sqrt(sum(x["standard_error"] ** 2 for x in each[-1])) / len(each[-1])
    even = [mean(x["even"] for x in seeds) for seeds in each]
    lines.append(
        (
            "6.1 depth",
            "falls, to a quarter or less",
            ", ".join(f"{x:+.3f}" for x in gains)
            + f" (noise of the last {noise:.3f}; even slips: "
            + f"{', '.join(f'{x:+.3f}' for x in even)})",
            gains == sorted(gains, reverse=True) and gains[-1] <= gains[0] / 4,
        )
    )
    areas = {
        pair: mean(
            math.nan if r["auroc"] is None else r["auroc"] for r in of("signal", pair, "before")
        )
        for pair in TEACHERS
    }
    lines.append(
        (
            "6.2 global",
            "AUROC all >= .6, failing ones not .1 behind",
            ", ".join(f"{pair} {x:.3f}" for pair, x in areas.items()),
            min(areas.values()) >= 0.6 and min(areas.values()) >= areas["success"] - 0.1,
        )
    )
    lines.append(("6.2 success", "AUROC > .6", f"{areas['success']:.3f}", areas["success"] > 0.6))
    now = {
        pair: [
            mean(r[name] for r in of("signal", pair, "before"))
            for name in ("size", "coherence", "cosine")
        ]
        for pair in TEACHERS
    }
    for pair in ("bigger", "other"):
        lines.append(
            (
                f"6.2 coherence, {pair}",
                "larger, and less coherent",
                " against ".join(
                    "|G| {:.3f}, coherence {:.3f} (cosine {:.3f})".format(*now[x])
                    for x in (pair, "success")
                ),
                now[pair][0] > now["success"][0] and now[pair][1] < now["success"][1],
            )
        )
    against = {
        arm: difference(
            of("support", arm), of("support", "top-16" + ", released" * arm.endswith("released"))
        )
        for arm in SUPPORTS
        if not arm.startswith("top-16")
    }
    early, against["sampled"] = (
        against["sampled"],
        difference(of("longer", "sampled"), of("longer", "top-16")),
    )
    lines.append(
        (
            "6.3 support",
            "only top-1 below top-16",
            ", ".join(f"{arm} {told(*x)}" for arm, x in against.items())
            + f"; sampled after 100 steps {told(*early)}",
            all(
                x < -noise if arm.startswith("top-1,") else x >= -noise and x - noise > -MARGIN
                for arm, (x, noise) in against.items()
            ),
        )
    )
    ends = {
        arm: difference(of("longer", arm), of("longer", "full")) for arm in LONGER if arm != "full"
    }
    lines.append(
        (
            "2.2 estimators",
            "same end as Eq. 4",
            ", ".join(f"{arm} {told(*x)}" for arm, x in ends.items()),
            all(equal(*x) for x in ends.values()),
        )
    )
    return lines


def report(made, out):
    lines = [
        f"{'part':8} {'arm':16} {'seed':>4} {'before':>7} {'after':>7} {'lowest':>7} "
        f"{'overlap':>7} {'length':>7} {'cut off, at most':>16} {'largest |grad|':>14} "
        f"{'update s':>8}"
    ]
    for r in made["runs"]:
        if r["part"] in ("length", "support", "longer"):
            lines.append(
                f"{r['part']:8} {r['arm']:16} {r['seed']:4d} {r['accuracy_before']['mean']:7.3f} "
                f"{r['accuracy_after']['mean']:7.3f} "
                f"{min(r['accuracies'] + [r['accuracy_after']['mean']]):7.3f} {r['overlap']:7.3f} "
                f"{r['length']:7.1f} {r['cut_off']:16.3f} {r['largest_grad_norm']:14.3f} "
                f"{r['time_update']:8.3f}"
            )
    for r in made["runs"]:
        if r["part"] == "signal":
            at_slips = (
                f", at first slips {r['reward_at_slips'] or math.nan:.3f}"
                if r["when"] == "before"
                else ""
            )
            lines.append(
                f"signal   {r['arm']:8} {r['when']:8} {r['seed']:4d} AUROC "
                f"{math.nan if r['auroc'] is None else r['auroc']:.3f}, "
                f"right {r['right']:.3f}; |G| {r['size']:.3f}, coherence {r['coherence']:.4f}, "
                f"null {r['null']:.4f}, cosine {r['cosine']:.4f}; reward {r['reward']:.3f}"
                + at_slips
            )
    for r in made["runs"]:
        if r["part"] == "depth":
            lines.append(
                f"depth    seed {r['seed']}: "
                + ", ".join(
                    f"{x['tokens']:.1f} tokens in {x['mean']:+.3f} +- {x['standard_error']:.3f} "
                    f"({x['even']:+.3f})"
                    for x in r["depths"]
                )
            )
        if r["part"] == "estimator":
            lines.append(
                f"gradient {r['arm']:16} {r['seed']:4d} size {r['size']:.4f}, "
                f"noise {r['noise']:.3f} of it, cosine with Eq. 4 {r['cosine']:.4f}"
            )
    write_text("\n".join(lines + verdicts(judge(made["runs"]))), made, out)
    plot.cost(out.with_suffix(".json"), out.with_suffix(".svg"))


if __name__ == "__main__":
    main("cost", __doc__, seed_runs, report)
