"""experiments/mechanism.py: why it works (paper 4), on the toy world, three seeds.

4.1, progressive alignment. The same student learns from two teachers of its own family: the
post-trained one ("success") and the bigger one of the same pipeline ("failure"). The first and
last five steps, means over seeds; holds if
    overlap     rises by .15 or more in success, and by less than half of that rise in failure
    masses      student's and teacher's are both >= .97 at the end of success (the paper:
                throughout)
    advantage   its size at least halves in success
    gap         the entropy gap at least halves in success
    small loss  failure starts with less than half of success's loss, and less than half of its
                gradient norm
    largest     p - q at the token of largest advantage at least halves in success

4.2, the shared tokens suffice. The success pair on other supports, with Eq. 5 and with what the
authors' code descends ("raw": log-ratio and, on "difference", weights not renormalised); holds if
    overlap     "intersection" ends equal to "student" (lab.equal: within noise, and noise included
                within .05)
    overlap raw the same of the raw ones; added after Eq. 5 had not held on seed 0, and before it
                ran
    others      "difference" ends more than two standard errors below "student", for Eq. 5 and raw
    fluent      the first two in another world, where they should hold if what is missing is this:
                of the responses that go wrong, four in five do so first on a token that is not
                shared, which the intersection cannot correct (`slips`; seed 0 at commit a1bf3b2).
                There 8 hesitations are favourites and not 15, so that mistakes are among the 16
                likeliest tokens of both, and pre-training is three times as long, so that little
                else goes wrong (fixed after a look at seed 9, before seeds 0 to 2 ran). At the
                learning rate of the others it did not hold: -.024, raw -.017, noise .013 (commit
                5cd2b96); slips outside of the shared tokens, which nothing holds there, had become
                more. So these runs take three times the steps at a third of it, which was fixed
                with Eq. 5's six runs in view, and not the raw ones

    python experiments/mechanism.py              results/mechanism.{json,txt,svg}
    python experiments/mechanism.py --quick      one seed, few steps: does it run?
"""

import itertools
from statistics import mean
from unittest.mock import patch

import plot
import torch
from lab import (
    MARGIN,
    PRESETS,
    difference,
    distil,
    equal,
    load,
    main,
    make_models,
    recovery,
    told,
    toy,
    verdicts,
    write,
    write_text,
)

from loss import support_of
from rollout import position_ids

PAIRS = {"success": "teacher", "failure": "bigger", "fluent": "teacher"}
OBJECTIVES = {"": "top-k", ", raw": "top-k-released"}
SUPPORTS = {
    name + raw: dict(support=name, objective=objective)
    for raw, objective in OBJECTIVES.items()
    for name in ("student", "intersection", "difference")
}
ENDS = 5  # steps at either end that are averaged
LR = PRESETS["toy"]["lr"]


def seed_runs(seed, world, scratch, quick):
    make_models(world, seed)
    steps = 2 * ENDS if quick else 100
    worlds = {"success": world, "failure": world, "fluent": fluent(world / "fluent", seed)}
    arms = (
        [("failure", "student")]
        + [("success", support) for support in SUPPORTS]
        + [("fluent", support) for support in SUPPORTS if not support.startswith("difference")]
    )
    runs = []
    for pair, support in arms:
        where, out = worlds[pair], scratch / f"{pair}-{support}-{seed}"
        student, teacher, slower = (
            where / "student",
            where / PAIRS[pair],
            3 if pair == "fluent" else 1,
        )
        result = distil(
            student,
            teacher,
            where,
            out,
            seed=seed,
            steps=slower * steps,
            lr=LR / slower,
            eval_every=slower * steps // 5,
            eval_n=1 if quick else 4,
            **SUPPORTS[support],
        )
        if pair == "fluent" or support != "student":  # not 4.1: the first gradient is told
            result["curves"] = {"grad_norm": result["curves"]["grad_norm"][:1]}
        runs.append(
            {
                "pair": pair,
                "support": support,
                "seed": seed,
                **result,
                "slips_before": slips(student, teacher, seed, n=64 if quick else 1024),
                "slips_after": slips(out / "student", teacher, seed, n=64 if quick else 1024),
            }
        )
    return runs


def fluent(world, seed):
    """The directory of a world of fewer words and longer pre-training, made where it is not
    there."""
    if not (world / "teacher" / "tokenizer_config.json").exists():
        with patch.multiple(
            toy, FAVOURITES=8, STEPS={size: 3 * steps for size, steps in toy.STEPS.items()}
        ):
            toy.make_all(world, seed)
    return world


@torch.no_grad()
def slips(student, teacher, seed, k=16, n=1024):
    """How n responses of the student go wrong first (toy.first_slip), as shares of the responses:
    on a token that is among both models' k likeliest there ("shared"), or on another one
    ("apart").
    """
    pair, found = load(student, teacher), {"shared": 0, "apart": 0}
    digits, count = toy.problems(n, torch.Generator().manual_seed(seed))
    r = write(pair, toy.question(digits, count)[0], max_new_tokens=96, seed=seed)
    log_p, log_q = (
        model(
            input_ids=r.ids,
            attention_mask=r.attention_mask,
            position_ids=position_ids(r.attention_mask),
        ).logits.log_softmax(-1)
        for model in (pair.student, pair.teacher)
    )  # (B, L, V)
    for i, problem in enumerate(zip(digits.tolist(), count.tolist())):
        response = r.response_ids(i)
        at = toy.first_slip(response, *problem)
        if at is not None and at < len(response):  # not just cut off
            before = -r.response_mask.size(1) + at - 1  # what predicts it
            S, member = support_of(
                log_p[i, [before]], log_q[i, [before]], k, "intersection"
            )  # (1, k)
            found["shared" if response[at] in S[member] else "apart"] += 1 / len(digits)
    return found


def ends(runs, name):
    """A metric in the first and in the last steps: the means over runs."""
    known = [[x for x in run["curves"][name] if x is not None] for run in runs]
    return [
        mean(mean(values[part]) for values in known) for part in (slice(ENDS), slice(-ENDS, None))
    ]


def judge(runs):
    """The criteria above: [(name, criterion, what was found, does it hold)]."""
    arms = {}
    for r in runs:
        arms.setdefault((r["pair"], r["support"]), []).append(r)
    good, bad = arms["success", "student"], arms["failure", "student"]

    def of_both(name):
        return ends(good, name), ends(bad, name)

    rise, fail = (b - a for a, b in of_both("overlap_ratio"))
    p, q = (ends(good, f"overlap_mass_{side}")[1] for side in ("student", "teacher"))
    lines = [
        (
            "4.1 overlap",
            "rise >= .15, and twice failure's",
            f"{rise:+.3f} against {fail:+.3f}",
            rise >= 0.15 and fail < rise / 2,
        ),
        ("4.1 masses", "both >= .97 at the end", f"{p:.4f}, {q:.4f}", min(p, q) >= 0.97),
    ]
    for name, title in (
        ("overlap_token_advantage", "advantage"),
        ("entropy_gap", "gap"),
        ("largest_gap", "largest"),
    ):
        (a, b), (c, d) = of_both(name)
        lines.append(
            (
                f"4.1 {title}",
                "halves in success",
                f"{a:.4f} -> {b:.4f} (failure {c:.4f} -> {d:.4f})",
                abs(b) <= abs(a) / 2,
            )
        )
    losses, norms = of_both("loss"), of_both("grad_norm")
    lines.append(
        (
            "4.1 small loss",
            "failure's loss and gradient < half of success's",
            f"{losses[1][0]:.4f} against {losses[0][0]:.4f}, "
            f"{norms[1][0]:.3f} against {norms[0][0]:.3f}",
            losses[1][0] < losses[0][0] / 2 and norms[1][0] < norms[0][0] / 2,
        )
    )
    for pair, raw in itertools.product(("success", "fluent"), OBJECTIVES):
        off, noise = difference(arms[pair, f"intersection{raw}"], arms[pair, f"student{raw}"])
        lines.append(
            (
                f"4.2 {'overlap' if pair == 'success' else pair}{raw}",
                f"|intersection - student| <= {noise:.3f} (and + it < {MARGIN})",
                f"{off:+.3f}",
                equal(off, noise),
            )
        )
    others = [
        difference(arms["success", f"difference{raw}"], arms["success", f"student{raw}"])
        for raw in OBJECTIVES
    ]
    lines.append(
        (
            "4.2 others",
            "difference below student by more than noise",
            "; raw ".join(told(off, noise) for off, noise in others),
            all(off < -noise for off, noise in others),
        )
    )
    return lines


def report(made, out):
    lines = [
        f"{'pair':8} {'support':16} {'seed':>4} {'before':>7} {'after':>7} {'recovery':>9} "
        f"{'overlap':>14} {'loss':>17} {'|grad|':>6}  goes wrong on a shared token, another"
    ]
    for r in made["runs"]:
        recovered = recovery(r)
        recovered = "none" if recovered is None else f"{recovered:.3f}"
        a, b = r["held_out_before"], r["held_out_after"]
        lines.append(
            f"{r['pair']:8} {r['support']:16} {r['seed']:4d} {r['accuracy_before']['mean']:7.3f} "
            f"{r['accuracy_after']['mean']:7.3f} {recovered:>9} "
            f"{a['overlap_ratio']:6.3f} -> {b['overlap_ratio']:.3f} "
            f"{a['loss']:7.4f} -> {b['loss']:.4f} {r['curves']['grad_norm'][0]:6.3f}  "
            + " -> ".join(
                f"{x['shared']:.3f}, {x['apart']:.3f}"
                for x in (r["slips_before"], r["slips_after"])
            )
        )
    write_text("\n".join(lines + verdicts(judge(made["runs"]))), made, out)
    plot.mechanism(out.with_suffix(".json"), out.with_suffix(".svg"))


if __name__ == "__main__":
    main(
        "mechanism",
        __doc__,
        seed_runs,
        report,
        curves=(
            "step",
            "loss",
            "overlap_ratio",
            "overlap_mass_student",
            "overlap_mass_teacher",
            "overlap_token_advantage",
            "entropy_gap",
            "largest_gap",
            "grad_norm",
        ),
    )
