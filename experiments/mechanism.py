"""experiments/mechanism.py: why it works (paper 4), on the toy world, three seeds.

4.1, progressive alignment. The same student learns from two teachers of its own family: the post-trained one
("success") and the bigger one of the same pipeline ("failure"). The first and last five steps, means over seeds;
holds if
    overlap     rises by .15 or more in success, and by less than half of that rise in failure
    masses      student's and teacher's are both >= .97 at the end of success (the paper: throughout)
    advantage   its size at least halves in success
    gap         the entropy gap at least halves in success
    small loss  failure starts with less than half of success's loss, and less than half of its gradient norm
    largest     p - q at the token of largest advantage at least halves in success

4.2, the shared tokens suffice. The success pair on other supports, with Eq. 5 and with what the authors' code descends
("raw": log-ratio and, on "difference", weights not renormalised); holds if
    overlap     "intersection" ends within two standard errors of "student"
    overlap raw the same of the raw ones; added after Eq. 5 had not held on seed 0, and before it ran
    others      "difference" ends more than two standard errors below "student", for Eq. 5 and raw
    k 64        why overlap did not hold (commit e1d1d1c): where a sum is due, 97 % of the student's probability of
                wrong digits is on tokens that are not shared, since the teacher's hesitations fill its 16. So with
                k = 64, which leaves room for them, "intersection" should end within two standard errors of "student"

    python experiments/mechanism.py              results/mechanism.{json,txt,svg}
    python experiments/mechanism.py --quick      one seed, few steps: does it run?
"""
from statistics import mean

import torch

import plot
from lab import analysis, difference, distil, main, models, told, toy, verdicts, write_text
from loss import token_sets
from rollout import position_ids
from teacher import Pair

PAIRS = {"success": "teacher", "failure": "bigger"}
SUPPORTS = {name + more: dict(support=name, **settings)
            for more, settings in (("", {}), (", raw", dict(objective="top-k-released")), (", k 64", dict(k=64)))
            for name in ("student", "intersection", "difference") if (name, more) != ("difference", ", k 64")}
ENDS = 5                              # steps at either end that are averaged


def seed_runs(seed, world, scratch, quick):
    models(world, seed)
    steps = 2 * ENDS if quick else 100
    arms = [(pair, "student", {}) for pair in PAIRS] + [("success", *item) for item in list(SUPPORTS.items())[1:]]
    runs = []
    for pair, support, settings in arms:
        student, teacher, out = world / "student", world / PAIRS[pair], scratch / f"{pair}-{support}-{seed}"
        result = distil(student, teacher, world, out, seed=seed, steps=steps, eval_every=steps // 5,
                        eval_n=1 if quick else 4, **settings)
        runs.append({"pair": pair, "support": support, "seed": seed, **result,
                     "wrong_before": wrong_digits(student, teacher, seed, settings.get("k", 16)),
                     "wrong_after": wrong_digits(out / "student", teacher, seed, settings.get("k", 16))})
    return runs


@torch.no_grad()
def wrong_digits(student, teacher, seed, k=16):
    """Where the student has written "3+7=" of 512 problems: its mean probability p of the nine wrong digits, the
    part of it on digits that are among both models' k likeliest tokens, and the teacher's probability q of the nine.
    """
    pair = Pair.load(student, teacher, device="cpu")
    prompts, _ = toy.question(*toy.problems(512, torch.Generator().manual_seed(seed)))
    r = pair.write(prompts, max_new_tokens=96, seed=seed)
    log_p, log_q = (model(input_ids=r.ids, attention_mask=r.attention_mask, position_ids=position_ids(
        r.attention_mask)).logits.log_softmax(-1) for model in (pair.student, pair.teacher))       # (B, L, V)
    sums = r.ids - toy.ID["0+0="]                                                                  # (B, L) 10 a + x
    due = (sums >= 0) & (sums < 100) & (r.attention_mask > 0)
    due[:, :-r.response_mask.size(1)] = False                                                      # none in a prompt
    log_p, log_q, right = log_p[due], log_q[due], (sums[due] // 10 + sums[due]) % 10               # (N, V), (N,)
    S, member = token_sets(log_p, log_q, k, "intersection")
    digits = slice(toy.ID["0"], toy.ID["0"] + 10)
    wrong = torch.arange(10) != right[:, None]                                                     # (N, 10)
    p, q = (log[:, digits].exp() * wrong for log in (log_p, log_q))
    shared = p * torch.zeros_like(log_p).scatter(1, S, member.float())[:, digits]
    return {name: x.sum(1).mean().item() for name, x in (("p", p), ("shared", shared), ("q", q))}


def ends(runs, name):
    """A metric in the first and in the last steps: the means over runs."""
    known = [[x for x in run["curves"][name] if x is not None] for run in runs]
    return [mean(mean(values[part]) for values in known) for part in (slice(ENDS), slice(-ENDS, None))]


def judge(runs):
    """The criteria above: [(name, criterion, what was found, does it hold)]."""
    good, bad = ([r for r in runs if r["pair"] == pair and r["support"] == "student"] for pair in PAIRS)
    def of_both(name):
        return ends(good, name), ends(bad, name)
    rise, fail = (b - a for a, b in of_both("overlap_ratio"))
    p, q = (ends(good, f"overlap_mass_{side}")[1] for side in ("student", "teacher"))
    lines = [("4.1 overlap", "rise >= .15, and twice failure's", f"{rise:+.3f} against {fail:+.3f}",
              rise >= 0.15 and fail < rise / 2), ("4.1 masses", "both >= .97 at the end", f"{p:.4f}, {q:.4f}",
                                                  min(p, q) >= 0.97)]
    for name, title in (("overlap_token_advantage", "advantage"), ("entropy_gap", "gap"), ("largest_gap", "largest")):
        (a, b), (c, d) = of_both(name)
        lines.append((f"4.1 {title}", "halves in success", f"{a:.4f} -> {b:.4f} (failure {c:.4f} -> {d:.4f})",
                      abs(b) <= abs(a) / 2))
    losses, norms = of_both("loss"), of_both("grad_norm")
    lines.append(("4.1 small loss", "failure's loss and gradient < half of success's",
                  f"{losses[1][0]:.4f} against {losses[0][0]:.4f}, {norms[1][0]:.3f} against {norms[0][0]:.3f}",
                  losses[1][0] < losses[0][0] / 2 and norms[1][0] < norms[0][0] / 2))
    arms = {support: [r for r in runs if r["pair"] == "success" and r["support"] == support] for support in SUPPORTS}
    for more in ("", ", raw", ", k 64"):
        off, noise = difference(arms[f"intersection{more}"], arms[f"student{more}"])
        lines.append((f"4.2 overlap{more}", f"|intersection - student| <= {noise:.3f}", f"{off:+.3f}",
                      abs(off) <= noise))
    others = [difference(arms[f"difference{raw}"], arms[f"student{raw}"]) for raw in ("", ", raw")]
    lines.append(("4.2 others", "difference below student by more than noise", "; raw ".join(
        told(off, noise) for off, noise in others), all(off < -noise for off, noise in others)))
    return lines


def report(made, out):
    lines = [f"{'pair':8} {'support':16} {'seed':>4} {'before':>7} {'after':>7} {'recovery':>9} {'overlap':>14} "
             f"{'loss':>17} {'|grad|':>6} {'p(wrong digit), shared part':>32}"]
    for r in made["runs"]:
        recovery = analysis.gap_recovery(r["accuracy_before"], r["accuracy_after"], r["accuracy_teacher"])
        a, b = r["held_out_before"], r["held_out_after"]
        lines.append(f"{r['pair']:8} {r['support']:16} {r['seed']:4d} {r['accuracy_before']['mean']:7.3f} "
                     f"{r['accuracy_after']['mean']:7.3f} {'none' if recovery is None else f'{recovery:.3f}':>9} "
                     f"{a['overlap_ratio']:6.3f} -> {b['overlap_ratio']:.3f} {a['loss']:7.4f} -> {b['loss']:.4f} "
                     f"{r['curves']['grad_norm'][0]:6.3f} " + " -> ".join(
                         f"{r[when]['p']:.4f}, {r[when]['shared']:.4f}" for when in ("wrong_before", "wrong_after")))
    write_text("\n".join(lines + verdicts(judge(made["runs"]))), made, out)
    plot.mechanism(out.with_suffix(".json"), out.with_suffix(".svg"))


if __name__ == "__main__":
    main("mechanism", __doc__.splitlines()[0], seed_runs, report)
