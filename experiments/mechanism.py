"""experiments/mechanism.py: why does it work (paper 4)? Toy models.

    arm                student <- teacher on the support of the loss (4.2); 100 steps
    success            the student's 16 likeliest tokens
    bigger             the same, from a teacher that knows no more: the failing run of 4.1
    intersection       those of them that are among the teacher's 16 likeliest (Overlap Top-k)
    difference         the tokens that are among the 16 likeliest of only one of the two
                       (Non-Overlap Top-k)
    student, raw; intersection, raw; difference, raw
                       the same with what the authors' code descends (top-k-released)

Criteria, fixed before the runs. "Start" and "end" are means over the first and last five steps.
    4.1 overlap      rises by .15 or more in success, and by less than half of that in bigger, in
                     every seed
    4.1 masses       both .97 or more at the end of success, in every seed
    4.1 advantage, entropy gap, largest gap     each at least halves in success, in every seed
    4.1 persist      entropy gap and largest gap keep .7 of their size in bigger, in every seed
    4.1 small loss   bigger starts with less than half of success's loss and less than half of its
                     gradient norm, in every seed
    4.2 shared       intersection ends equal to success, at T .7 and greedily; the same, raw
    4.2 others       difference ends surely below success at T .7 and greedily; the same, raw
    4.2 self-reinforcing
                     the overlap ratio of intersection rises by .8 of what it does in success or
                     more, in every seed; that of difference first falls: in the first half, the
                     mean of some five steps in a row lies .01 or more below the start, in every
                     seed

The probe `slips` tells how the student's responses first go wrong: on a token that is among the 16
likeliest of both models, which the intersection can correct, or on another one.

    python experiments/mechanism.py              results/mechanism.{txt,svg}
    python experiments/mechanism.py --quick      a few steps: does it run?
"""

from statistics import mean

import lab
import phenomenology
import plot
import torch
import toy
from lab import arm, below, both, difference, each, equal, every_seed, finding, reaches, share

from loss import support_of
from rollout import position_ids

ARMS = {
    "success": phenomenology.ARMS["success"],
    "bigger": phenomenology.ARMS["bigger"],
    "intersection": arm("student", "teacher", support="intersection"),
    "difference": arm("student", "teacher", support="difference"),
    "student, raw": arm("student", "teacher", objective="top-k-released"),
    "intersection, raw": arm(
        "student", "teacher", support="intersection", objective="top-k-released"
    ),
    "difference, raw": arm("student", "teacher", support="difference", objective="top-k-released"),
}
ENDS = 5  # steps that are averaged


@torch.no_grad()
def slips(lab, arms, problems, k=16):
    """How the student's responses first go wrong (toy.first_slip), before and after each arm.

    -> {"before" or the arm: {"shared", "another": share of the responses}}
    """
    found = {}
    for name in ("before", *arms):
        student = "student" if name == "before" else lab.trained(name, ARMS[name])
        found[name] = slips_of(lab, student, 64 if lab.quick else problems, k)
    return {"found": found}


def slips_of(lab, student, n, k):
    pair = lab.load(student, "teacher")
    digits, count = toy.problems(n, torch.Generator().manual_seed(lab.seed))
    rows = [{"ids": ids} for ids in toy.question(digits, count)[0]]
    r = lab.write(pair, rows, "slips")
    log_p, log_q = (
        model(
            input_ids=r.ids,
            attention_mask=r.attention_mask,
            position_ids=position_ids(r.attention_mask),
        ).logits.log_softmax(-1)
        for model in (pair.student, pair.teacher)
    )  # (B, L, V)
    shares = {"shared": 0.0, "another": 0.0}
    for i, problem in enumerate(zip(digits.tolist(), count.tolist())):
        response = r.response_ids(i)
        at = toy.first_slip(response, *problem)
        if at is None or at == len(response):  # right, or just cut off
            continue
        before = -r.response_mask.size(1) + at - 1  # the position that predicts it
        S, counts = support_of(log_p[i, [before]], log_q[i, [before]], k, "intersection")  # (1, k)
        shares["shared" if response[at] in S[counts] else "another"] += 1 / n
    return shares


PROBES = {
    "slips": (slips, {"arms": ["success", "intersection", "difference"], "problems": 1024}),
}


def start_and_end(run, name, steps=ENDS):
    """The means of a metric over the first and over the last steps."""
    known = [x for x in run["curves"][name] if x is not None]
    return mean(known[:steps]), mean(known[-steps:])


def rise(run):
    start, end = start_and_end(run, "overlap_ratio")
    return end - start


def fall(run):
    """How far the overlap ratio lies below its start at its lowest in the first half of a run."""
    values = run["curves"]["overlap_ratio"]
    start = mean(values[:ENDS])
    half = values[: len(values) // 2]
    lowest = min(mean(half[i : i + ENDS]) for i in range(max(1, len(half) - ENDS + 1)))
    return start - lowest


def shrinks(run, name, steps=ENDS):
    """The size of a metric at the end, as a share of that at the start."""
    start, end = start_and_end(run, name, steps)
    return share(abs(end), abs(start))


def beginnings(ours, theirs, name):
    """A metric at the start of some runs, as a share of that of others, one for each seed."""
    return [
        share(start_and_end(a, name)[0], start_and_end(b, name)[0]) for a, b in zip(ours, theirs)
    ]


def judge(runs):
    """Judge by the criteria above: list of Finding."""
    return [*in_success(runs), *in_failure(runs), *supports(runs), *reinforcing(runs)]


def in_success(runs):
    """4.1: what aligns in success?"""
    success = runs["success"]
    bigger = runs["bigger"]
    rises = [rise(run) for run in success]
    of_failure = [rise(run) for run in bigger]
    yield finding(
        "4.1",
        "the overlap ratio rises in success, and does not with bigger, which teaches nothing",
        "about .72 to above .91; in failure about .745 to .78",
        f"by {each(rises)}; in failure by {each(of_failure)}",
        every_seed(a >= 0.15 and b < a / 2 for a, b in zip(rises, of_failure)),
    )
    masses = []
    for run in success:
        p = start_and_end(run, "overlap_mass_student")[1]
        q = start_and_end(run, "overlap_mass_teacher")[1]
        masses.append(min(p, q))
    begun = [start_and_end(run, "overlap_mass_student")[0] for run in success]
    of_failure = [start_and_end(run, "overlap_mass_student")[1] for run in bigger]
    yield finding(
        "4.1",
        "the shared tokens hold .97 of both models' mass at the end of success",
        ".97 to .99 throughout, in failure too, so it tells nothing by itself",
        f"the smaller of the two {each(masses, '.3f')}; the student's begins at "
        f"{each(begun, '.3f')}, and ends in failure at {each(of_failure, '.3f')}",
        every_seed(x >= 0.97 for x in masses),
    )
    for name, title in (
        ("overlap_token_advantage", "the overlap-token advantage goes to 0"),
        ("entropy_gap", "the entropy gap narrows"),
        ("largest_gap", "p - q on the token of largest advantage shrinks"),
    ):
        shares = [shrinks(run, name) for run in success]
        yield finding(
            "4.1",
            f"in success {title}",
            "so; persists in failure",
            f"to {each(shares)} of its size",
            every_seed(x <= 0.5 for x in shares),
        )


def in_failure(runs):
    """4.1: do the gaps persist in failure, and is the loss small from the start?"""
    success = runs["success"]
    bigger = runs["bigger"]
    shares = {
        name: [shrinks(run, name) for run in bigger] for name in ("entropy_gap", "largest_gap")
    }
    begun = {name: beginnings(bigger, success, name) for name in shares}
    yield finding(
        "4.1",
        "where nothing new is taught the gaps persist",
        "so",
        f"entropy gap {each(shares['entropy_gap'])} of its size at the end, p - q "
        f"{each(shares['largest_gap'])}; they begin at {each(begun['entropy_gap'])} and "
        f"{each(begun['largest_gap'])} of success's",
        every_seed(x >= 0.7 for x in shares["entropy_gap"]),
        every_seed(x >= 0.7 for x in shares["largest_gap"]),
    )
    ratios = {name: beginnings(bigger, success, name) for name in ("loss", "grad_norm")}
    yield finding(
        "4.1",
        "where nothing new is taught loss and gradient begin small",
        "so: a small loss is no success",
        f"loss {each(ratios['loss'])} of success's, gradient norm {each(ratios['grad_norm'])}",
        every_seed(x < 0.5 for x in ratios["loss"]),
        every_seed(x < 0.5 for x in ratios["grad_norm"]),
    )


def supports(runs):
    """4.2: what the student learns from part of the tokens."""
    for raw, objective in (("", "Eq. 5"), (", raw", "the authors' loss")):
        whole = runs[f"student{raw}" if raw else "success"]
        for support, claim, paper, criterion in (
            ("intersection", "the shared tokens suffice", "Overlap equals Student Top-k", equal),
            (
                "difference",
                "the tokens that are not shared do not suffice",
                "Non-Overlap is clearly weaker",
                below,
            ),
        ):
            part = runs[support + raw]
            offs = both(part, whole)
            yield finding(
                "4.2",
                f"{claim}, {objective}",
                paper,
                f"{offs[0]} at T .7, {offs[1]} greedily, {difference(part, whole, 'T 1')} at T 1",
                *map(criterion, offs),
            )


def reinforcing(runs):
    """4.2: what the overlap ratio does if the loss looks at part of the tokens."""
    success = runs["success"]
    shares = [share(rise(a), rise(b)) for a, b in zip(runs["intersection"], success)]
    falls = [fall(run) for run in runs["difference"]]
    yield finding(
        "4.2",
        "with only the shared tokens the overlap rises as much as with all 16, Eq. 5",
        "so: alignment reinforces itself",
        f"{each(shares)} of the rise",
        reaches(shares, 0.8),
    )
    yield finding(
        "4.2",
        "with only the tokens that are not shared the overlap first falls, Eq. 5",
        "so, then it partly recovers",
        f"by {each(falls, '.3f')} at its lowest",
        every_seed(x >= 0.01 for x in falls),
    )


def more(runs):
    """Lines that say how responses first go wrong."""
    lines = ["", "share of responses that first go wrong on a shared token, on another (slips)"]
    for run in runs["slips"]:
        cells = [f"{name} {x['shared']:.3f} {x['another']:.3f}" for name, x in run["found"].items()]
        lines.append(f"seed {run['seed']}: {'; '.join(cells)}")
    return lines


if __name__ == "__main__":
    lab.main(__doc__, ARMS, judge, probes=PROBES, more=more, draw=plot.mechanism)
