"""experiments/phenomenology.py: when does on-policy distillation work (paper 3)? Toy models.

    arm             student <- teacher                                             steps
    success         student <- teacher: bigger, and knows more                     100
    bigger          student <- bigger: the same beliefs                            100
    sharp           student <- sharp: the same beliefs, sampled more sharply       100
    early           student <- early: knows more, and scores as sharp does at T 1  100
    other           student <- other: knows more, works from the other end         100
    self            student <- itself at teacher temperature .5: nothing new       100
    no-teacher      no teacher: a fixed negative advantage, -.5, on the fifth of the
                    drawn tokens that the student found least likely (2608.31046)  100
    no-teacher, lr by 10   the same at a tenth of the learning rate. It was added after
                    no-teacher had ruined the student on two seeds                 100
    reverse         student-rl <- student, its earlier self                        400
    reverse-bigger  student-rl <- bigger                                           400
    reverse-sharp   student-rl <- sharp                                            400

Criteria, fixed before the runs ("surely": by more than noise, and .05; lab.py).
    3.1 thinking     early scores surely less than other (T .7). Its student scores surely more, at
                     T .7 and greedily, and overlaps more at the start, in every seed
    3.2 knowledge    success makes up .8 of its teacher's greedy lead, in every seed
    3.2 size         bigger: greedy accuracy and that at T .7 end equal to where they began
    3.2 sharpness    sharp: greedy accuracy ends equal to where it began
    3.2 no news      self: surely more at T 1, greedy accuracy equal to where it began
    3.2 overlap      success begins at a lower overlap ratio than bigger, in every seed
    3.3 score        early and sharp are equal at T 1 (else not askable); the student of early ends
                     surely above that of sharp, greedily
    3.3 reverse      reverse ends equal to its teacher, at T .7 and greedily
    3.3 bigger       reverse-bigger ends equal to reverse, at T .7 and greedily
    3.3 sharp        reverse-sharp ends equal to reverse, greedily
    3.3 same target  at the states of student-rl, KL(student || bigger) is less than a quarter of
                     the KL of student-rl to either of them, in every seed
    no teacher       no-teacher ends equal to success or above: at T 1, at T .7 and greedily. Of its
                     two learning rates the one that scores higher at T 1 counts

    python experiments/phenomenology.py              results/phenomenology.{txt,svg}
    python experiments/phenomenology.py --quick      a few steps: does it run?
"""

import lab
import plot
import torch
import toy
from lab import (
    Arm,
    above,
    arm,
    below,
    both,
    difference,
    each,
    equal,
    every_seed,
    finding,
    gain,
    held_out,
    more_than,
    reaches,
    recovery,
    share,
)
from own_loop import train_without_teacher

from analysis import entropy, overlap_ratio, reverse_kl, shared_tokens
from teacher import log_probs

ARMS = {
    "success": arm("student", "teacher"),
    "bigger": arm("student", "bigger"),
    "sharp": arm("student", "sharp"),
    "early": arm("student", "early"),
    "other": arm("student", "other"),
    "self": arm("student", "student", teacher_temperature=0.5),
    "no-teacher": Arm("student", "teacher", train=train_without_teacher),
    "no-teacher, lr by 10": Arm("student", "teacher", dict(lr=1e-4), train=train_without_teacher),
    "reverse": arm("student-rl", "student", steps=400),
    "reverse-bigger": arm("student-rl", "bigger", steps=400),
    "reverse-sharp": arm("student-rl", "sharp", steps=400),
}


@torch.no_grad()
def between_teachers(lab, prompts):
    """How far models are apart at the states that student-rl visits: {pair: {metric: mean}}."""
    pair = lab.load("student-rl", "student")
    r = lab.write(pair, lab.rows(pair, 16 if lab.quick else prompts), "between teachers")
    log_p = {}
    for name in ("student-rl", "student", "bigger", "sharp"):
        model = toy.read_model(lab.model(name))
        log_p[name] = log_probs(model, r.ids, r.attention_mask, r.is_response)  # (N, V)
    found = {}
    for a, b in (
        ("student", "bigger"),
        ("student", "sharp"),
        ("student-rl", "student"),
        ("student-rl", "bigger"),
        ("student-rl", "sharp"),
    ):
        _, in_I = shared_tokens(log_p[a], log_p[b], 16)
        found[f"{a} || {b}"] = {
            "reverse_kl": reverse_kl(log_p[a], log_p[b]).mean().item(),
            "overlap_ratio": overlap_ratio(in_I).mean().item(),
            "entropy": entropy(log_p[a]).mean().item(),
        }
    return {"found": found}


PROBES = {"between-teachers": (between_teachers, {"prompts": 512})}


def judge(runs):
    """Judge by the criteria above: list of Finding."""
    return [
        *thinking(runs),
        *knowledge(runs),
        *reversal(runs),
        *same_target(runs),
        *without_teacher(runs),
    ]


def overlap(runs):
    """The held-out overlap ratio at the start, one number for each seed."""
    return [held_out(run, "before", "overlap_ratio") for run in runs]


def thinking(runs):
    """3.1: does a weaker teacher that thinks alike make the better student?"""
    early = runs["early"]
    other = runs["other"]
    teachers = difference(early, other, "T .7", "teacher")
    students = both(early, other)
    alike = every_seed(a > b for a, b in zip(overlap(early), overlap(other)))
    yield finding(
        "3.1",
        "a weaker teacher that thinks alike makes the better student",
        "weaker on average, its student about .20 against about .15",
        f"teachers {teachers}; students {students[0]} at T .7, {students[1]} greedily; overlap at "
        f"the start {each(overlap(early))} against {each(overlap(other))}",
        below(teachers),
        *map(above, students),
        alike,
    )


def knowledge(runs):
    """3.2: does only new knowledge teach?"""
    success = runs["success"]
    bigger = runs["bigger"]
    sharp = runs["sharp"]
    made_up = [recovery(run, "greedy") for run in success]
    yield finding(
        "3.2",
        "what a teacher newly knows can be learnt",
        "gap recovery .17 and .59 from teachers after RL",
        f"recovery of the greedy lead {each(made_up)}, at T .7 "
        f"{each(recovery(run, 'T .7') for run in success)}",
        reaches(made_up, 0.8),
    )
    gains = both(bigger, bigger, than="before")
    yield finding(
        "3.2",
        "a bigger teacher that knows no more teaches nothing",
        "gap recovery .05 and .16 from bigger ones of the same pipeline",
        f"gain {gains[0]} at T .7, {gains[1]} greedily",
        *map(equal, gains),
    )
    gains = [gain(sharp, way) for way in toy.WAYS]
    yield finding(
        "ours",
        "a teacher that only samples more sharply teaches no knowledge",
        "not there",
        f"gain {gains[2]} greedily ({gains[0]} at T 1, {gains[1]} at T .7)",
        equal(gains[2]),
    )
    gains = [gain(runs["self"], way) for way in toy.WAYS]
    yield finding(
        "ours",
        "the student itself, as a teacher at temperature .5, teaches sharpness and no knowledge",
        "not there",
        f"gain {gains[0]} at T 1, {gains[2]} greedily",
        above(gains[0]),
        equal(gains[2]),
    )
    yield finding(
        "3.2",
        "the teacher that knows more begins at the lower overlap",
        ".715 against .742 to .747, .703 against .757",
        f"{each(overlap(success))} against {each(overlap(bigger))}",
        every_seed(a < b for a, b in zip(overlap(success), overlap(bigger))),
    )


def reversal(runs):
    """3.3: a score does not predict success, and a worse teacher takes back what RL gave."""
    early = runs["early"]
    sharp = runs["sharp"]
    reverse = runs["reverse"]
    scores = difference(early, sharp, "T 1", "teacher")
    greedy = difference(early, sharp, "greedy", "teacher")
    ends = difference(early, sharp, "greedy")
    yield finding(
        "3.3",
        "of two teachers with equal scores at T 1 the one that knows more teaches more",
        "the benchmark score predicts nothing",
        f"teachers {scores} at T 1, {greedy} greedily; students "
        f"{difference(early, sharp, 'T 1')} at T 1, {ends} greedily",
        above(ends) if scores.is_equal else lab.NOT_ASKABLE,
    )
    offs = both(reverse, reverse, than="teacher")
    yield finding(
        "3.3",
        "student-rl loses what RL gave if student, its earlier self, is the teacher",
        "from about .54 to about .30 to .34; the earlier self has .28",
        f"student - teacher at the end {offs[0]} at T .7, {offs[1]} greedily",
        *map(equal, offs),
    )
    offs = both(runs["reverse-bigger"], reverse)
    yield finding(
        "3.3",
        "with bigger as the teacher, student-rl ends in the same place",
        "both runs lie on top of each other",
        f"{offs[0]} at T .7, {offs[1]} greedily",
        *map(equal, offs),
    )
    off = difference(runs["reverse-sharp"], reverse, "greedy")
    yield finding(
        "ours",
        "with sharp as the teacher, student-rl ends in the same place if asked greedily",
        "not there",
        f"{off} greedily ({difference(runs['reverse-sharp'], reverse, 'T .7')} at T .7)",
        equal(off),
    )


def same_target(runs):
    """3.3: are a small and a bigger teacher of one pipeline one target to the student?"""
    between = [run["found"] for run in runs["between-teachers"]]

    def kl(name):
        return [x[name]["reverse_kl"] for x in between]

    yield finding(
        "3.3",
        "as teachers of student-rl, student and bigger are the same target",
        "said of R1-Distill-1.5B and 7B, not measured",
        f"KL of the two {each(kl('student || bigger'), '.3f')}; of the student to either "
        f"{each(kl('student-rl || student'), '.3f')} and "
        f"{each(kl('student-rl || bigger'), '.3f')}; their overlap "
        f"{each(x['student || bigger']['overlap_ratio'] for x in between)}",
        every_seed(
            4 * a < min(b, c)
            for a, b, c in zip(
                kl("student || bigger"), kl("student-rl || student"), kl("student-rl || bigger")
            )
        ),
    )


def without_teacher(runs):
    """2608.31046: does training without a teacher do as well?"""
    controls = [runs["no-teacher"], runs["no-teacher, lr by 10"]]
    control = max(controls, key=lambda of_rate: gain(of_rate, "T 1").mean)
    yield pushed_down(control, runs["success"])


def pushed_down(control, success):
    """The Finding of a control without a teacher beside OPD, in all three ways to sample."""
    found = []
    words = []
    for way, how in (("T 1", "at T 1"), ("T .7", "at T .7"), ("greedy", "greedily")):
        off = difference(control, success, way)
        of_gain = share(gain(control, way).mean, gain(success, way).mean)
        found.append(f"{off} of success {how}, {of_gain:.2f} of its gain")
        words.append(more_than(off, -lab.MARGIN))
    return finding(
        "2608.31046",
        "pushing down unlikely tokens does what a teacher does",
        "reaches what OPD reaches",
        "; ".join(found),
        *words,
    )


if __name__ == "__main__":
    lab.main(__doc__, ARMS, judge, probes=PROBES, draw=plot.phenomenology)
