"""experiments/real.py: a real language model learns to add from copies of itself that were trained
further (paper 3, 4, 5, 6).

    arm            student <- teacher (sums.py); if nothing else is said, 12 steps of 16 responses
                   at a learning rate of 1e-5, in bfloat16 or float32 (sums.DTYPE)
    success        base <- expert: after three rounds of expert iteration, it knows more
    round 1; round 2   base <- expert-1; <- expert-2: after one round, and after two
    copy           base <- copy: after three rounds on its own answers, right or wrong
    backwards      base <- backwards: works from the right
    words          base <- words: works in words

    words, 72; words, fast; words, 72 fast     72 steps; 12 at 1e-4; 72 at 1e-4
    words, sft     no OPD: 72 updates of fine-tuning at 1e-4 on 480 answers of words, T 1
    words, cold    60 such updates on 400 answers, then 12 steps of OPD at 1e-5
    reverse        expert <- base, its earlier self; 100 steps
    sharper        base <- base at teacher temperature .4: a sharper score, nothing new
    no teacher     no teacher: unlikely tokens are pushed down (2608.31046)

    float32        success, computed in float32
    intersection; difference    base <- expert on the tokens that both find likely; on those that
                   only one of the two does
    sampled; full  base <- expert by Eq. 3, by Eq. 4
    wordy          base <- expert on the same questions in other words, under another system prompt
    8 tokens       base <- expert, responses of 8 tokens, the first 30 % of a solution (2606.22600)
    one prompt     base <- expert, one question 16 times a step (2609.04172)

Criteria, fixed before the runs ("surely": by more than noise; above and below by .05, too: lab.py).
If nothing else is said, they are asked greedily and at T .7, of seeds 0, 1, 2.
    3.1 equal way    there are two teachers: the expert after the last round at which it scores
                     surely less than words at T .7 (weaker, alike), and words (stronger, other).
                     The first has the surely better student, at T .7 and greedily. Asked on seeds
                     3, 4, 5; not askable if no round scores less
    3.2 skill        success makes up .8 of its teacher's lead, in every seed
    3.2 first round  round 1 ends surely above its start, greedily
    3.2 nothing new  copy gains surely less than .05, greedily
    3.2 sharper      surely more at T 1, greedy accuracy equal to where it began
    3.3 reverse      it ends equal to its teacher
    no teacher       it ends less than .05 below success, surely: at T 1, at T .7 and greedily
    float32          it ends equal to success. Asked where success was computed in bfloat16. Run
                     first; if not, all is run in float32
    4.1 masses       in success both are .95 or more at the first step, in every seed
    4.1 overlap      in success the overlap ratio rises, in every seed (three steps at either end)
    4.1 gaps         in success the advantage, the entropy gap and p - q halve, in every seed
    4.1 small loss   copy begins with less than half of success's loss and gradient, in every seed
    4.2 shared       intersection ends equal to success
    4.2 others       difference ends surely below it
    5.1 fails        words gains surely less than a quarter of what success does, at T .7
    5.1 not slow     the same of words, 72, of words, fast, and of words, 72 fast
    5.1 rescues      words, cold ends surely above words, 72 fast, after as many updates
    beats            words, cold ends surely above words, sft, after as many updates; not askable if
                     both are right .99 of the time
    3.1 from right   backwards gains surely less than half of what success does, at T .7
    5.2 template     success ends above wordy, by more than noise (the paper's effect is .03)
    2.2 estimators   sampled and success end equal to full
    one prompt       it gains .72 or more of what success gains at T .7, in every seed
    first 30 %       8 tokens gains .8 or more of what success gains at T .7, in every seed
    6.2 success      the AUROC of a response's mean reward, by expert, is surely above .6
    6.2 failure      that by words, and by copy, is at most .1 behind it, surely
    6.2 coherence    the gradients of words and copy at single positions are larger than expert's,
                     and their sum is smaller beside them, in every seed
    promise          on seeds 3, 4: of the arms from success to words every one whose diagnosis says
                     "should work" gains surely, at T .7 and greedily; every one with "nothing new
                     to teach" gains surely less than .05 greedily
    trap             after the base's first slip the KL to expert is half of what it is at the slip
                     or less, and expert, going on from there, is right less than .1 of the time, in
                     every seed (2606.09471)

    python experiments/real.py --base DIR_OR_HUB     results/real.{txt,svg}; more than 30 hours of
                                                     one thread
    python experiments/real.py --base DIR_OR_HUB --only words success --seeds 1
"""

import math
from functools import partial

import cost
import followups
import forecast
import lab
import mechanism
import phenomenology
import plot
import sums
from lab import (
    Arm,
    Difference,
    above,
    arm,
    below,
    both,
    difference,
    each,
    ends_above,
    equal,
    every_seed,
    finding,
    gain,
    more_than,
    reaches,
    recovery,
    share,
)
from own_loop import train_without_teacher

from analysis import diagnose_pair
from plumbing.answers import answered
from plumbing.slots import rollout

AT_1 = dict(cold_start_temperature=1.0, cold_start_top_p=1.0)
TAUGHT = {  # arm -> its teacher; all are diagnosed beforehand
    "success": "expert",
    "round 1": "expert-1",
    "round 2": "expert-2",
    "copy": "copy",
    "backwards": "backwards",
    "words": "words",
}
ARMS = {
    **{name: arm("base", teacher) for name, teacher in TAUGHT.items()},
    "words, 72": arm("base", "words", steps=72),
    "words, fast": arm("base", "words", lr=1e-4),
    "words, 72 fast": arm("base", "words", steps=72, lr=1e-4),
    "words, sft": arm(
        "base", "words", cold_start=480, cold_start_steps=72, cold_start_lr=1e-4, steps=0, **AT_1
    ),
    "words, cold": arm(
        "base", "words", cold_start=400, cold_start_steps=60, cold_start_lr=1e-4, **AT_1
    ),
    "reverse": arm("expert", "base", steps=100),
    "sharper": arm("base", "base", teacher_temperature=0.4),
    "no teacher": Arm("base", "expert", train=train_without_teacher),
    "float32": arm("base", "expert", dtype="float32"),
    "intersection": arm("base", "expert", support="intersection"),
    "difference": arm("base", "expert", support="difference"),
    "sampled": arm("base", "expert", objective="sampled"),
    "full": arm("base", "expert", objective="full"),
    "wordy": arm("base", "expert", prompts="wordy.jsonl"),
    "8 tokens": arm("base", "expert", max_new_tokens=8),
    "one prompt": arm("base", "expert", prompts="one.jsonl"),
}
PATIENT = ("words, 72", "words, fast", "words, 72 fast")
BY_ROUND = ("round 1", "round 2", "success")
CHOSEN_ON = {("success", 0), ("success", 1), ("words", 0), ("words", 1)}  # by the rule, in 9cb83c2
ENDS = 3  # steps at either end that are averaged


# --- probes ---------------------------------------------------------------------------------------


def diagnosis(lab, teacher, prompts):
    """The report of `analysis.py --student base --teacher ...`, without the means by position."""
    pair = lab.load("base", teacher)
    report = diagnose_pair(
        pair,
        lab.rows(pair, 4 if lab.quick else prompts),
        answered=answered,
        rollout=rollout,
        n=2,
        max_new_tokens=lab.new_tokens,
        seed=lab.seed,
    )
    del report["by_position"]
    return {"report": report}


def signal(lab, teacher, prompts, samples, coherent):
    """6.2, before training: a teacher's rewards and gradients on the base's answers."""
    count = 4 if lab.quick else prompts
    return cost.signal_of(lab, "base", teacher, count, samples, coherent)


def trap(lab, prompts):
    return followups.trap(lab, prompts, "base", "expert")


PROBES = {
    **{
        f"diagnosis of {name}": (diagnosis, {"teacher": teacher, "prompts": 64})
        for name, teacher in TAUGHT.items()
    },
    **{
        f"signal of {teacher}": (
            signal,
            {"teacher": teacher, "prompts": 256, "samples": 4, "coherent": 64},
        )
        for teacher in ("expert", "words", "backwards", "copy")
    },
    "trap": (trap, {"prompts": 256}),
}


# --- the report -----------------------------------------------------------------------------------


def less_than_share(ours, theirs, part):
    """Does an arm gain surely less than a part of what another gains, at T .7? -> a word."""
    means = []
    variances = []
    for one, other in zip(ours, theirs, strict=True):
        a = gain([one], "T .7")
        b = gain([other], "T .7")
        means.append(part * b.mean - a.mean)
        error = (part * b.noise + a.noise) / 2  # noise is two errors; the sum is the worst case
        variances.append(error**2)
    return more_than(lab.mean_over_seeds(means, variances), 0)


def two(offs):
    """Differences at T .7 and greedily, as text."""
    return f"{offs[0]} at T .7, {offs[1]} greedily"


def skill(runs):
    greedy = [recovery(run, "greedy") for run in runs["success"]]
    at_7 = [recovery(run, "T .7") for run in runs["success"]]
    yield finding(
        "3.2",
        "what a teacher newly knows can be learnt",
        "gap recovery above .8 where the teacher is the student after RL (4.1)",
        f"recovery {each(greedy)} greedily, {each(at_7)} at T .7",
        reaches(greedy, 0.8),
        reaches(at_7, 0.8),
    )


def first_round(runs):
    x = gain(runs["round 1"], "greedy")
    yield finding(
        "ours", "so can what it knows after one round", "not there", f"gain {x} greedily", above(x)
    )


def nothing_new(runs):
    x = gain(runs["copy"], "greedy")
    yield finding(
        "3.2",
        "a copy that knows no more teaches nothing",
        "gap recovery .05 and .16 from bigger ones of the same pipeline",
        f"gain {x} greedily, {gain(runs['copy'], 'T .7')} at T .7",
        more_than(-x, -lab.MARGIN),
    )


def sharper(runs):
    x = gain(runs["sharper"], "greedy")
    at_1 = gain(runs["sharper"], "T 1")
    yield finding(
        "ours",
        "the base itself, as a teacher at temperature .4, teaches sharpness and no knowledge",
        "not there",
        f"gain {at_1} at T 1, {x} greedily",
        above(at_1),
        equal(x),
    )


def reverse(runs):
    offs = both(runs["reverse"], runs["reverse"], "after", "teacher")
    yield finding(
        "3.3",
        "its earlier self takes back what expert iteration gave",
        "from about .54 to about .30 to .34; the earlier self has .28",
        f"student - teacher at the end {two(offs)}",
        *map(equal, offs),
    )


def no_teacher(runs):
    yield phenomenology.pushed_down(runs["no teacher"], runs["success"])


def ends(run, name):
    """The means of a metric over the first and over the last steps."""
    return mechanism.start_and_end(run, name, ENDS)


def aligning(runs):
    success = runs["success"]
    masses = []
    for run in success:
        sides = [run["curves"][f"overlap_mass_{side}"][0] for side in ("student", "teacher")]
        masses.append(min(sides))
    yield finding(
        "4.1",
        "the shared tokens hold nearly all of both models' mass from the first step on",
        ".97 to .99 throughout, in its failing run too",
        f"the smaller of the two {each(masses, '.3f')}",
        every_seed(x >= 0.95 for x in masses),
    )
    rises = [end - start for start, end in (ends(run, "overlap_ratio") for run in success)]
    yield finding(
        "4.1",
        "in success the overlap ratio rises",
        "about .72 to above .91",
        f"by {each(rises)}",
        every_seed(x > 0 for x in rises),
    )
    for name, title in (
        ("overlap_token_advantage", "the overlap-token advantage goes to 0"),
        ("entropy_gap", "the entropy gap narrows"),
        ("largest_gap", "p - q on the token of largest advantage shrinks"),
    ):
        of_start = [mechanism.shrinks(run, name, ENDS) for run in success]
        yield finding(
            "4.1",
            f"in success {title}",
            "so; persists in failure",
            f"to {each(of_start)} of its size",
            every_seed(x <= 0.5 for x in of_start),
        )


def small_loss(runs):
    begun = {}
    for name in ("loss", "grad_norm"):
        begun[name] = []
        for of_copy, of_success in zip(runs["copy"], runs["success"], strict=True):
            ratio = share(of_copy["curves"][name][0], of_success["curves"][name][0])
            begun[name].append(ratio)
    yield finding(
        "4.1",
        "with copy, trained on the base's own answers, loss and gradient begin small",
        "so where nothing new is taught: a small loss is no success",
        f"loss {each(begun['loss'])} of success's, gradient norm {each(begun['grad_norm'])}",
        every_seed(x < 0.5 for x in begun["loss"]),
        every_seed(x < 0.5 for x in begun["grad_norm"]),
    )


def rounding(runs):
    offs = both(runs["float32"], runs["success"])
    yield finding(
        "ours",
        "success ends in float32 as in bfloat16",
        "not there; its runs are in bfloat16",
        two(offs),
        *map(equal, offs),
    )


def supports(runs):
    shared = both(runs["intersection"], runs["success"])
    yield finding(
        "4.2",
        "the shared tokens suffice",
        "Overlap equals Student Top-k",
        two(shared),
        *map(equal, shared),
    )
    others = both(runs["difference"], runs["success"])
    yield finding(
        "4.2",
        "the tokens that are not shared do not suffice",
        "Non-Overlap is clearly weaker",
        two(others),
        *map(below, others),
    )


def from_right(runs):
    yield finding(
        "3.1",
        "a teacher that works from the right teaches little",
        "student about .15 with the stronger teacher, .20 with the weaker",
        f"gain {gain(runs['backwards'], 'T .7')} at T .7, success {gain(runs['success'], 'T .7')}",
        less_than_share(runs["backwards"], runs["success"], 0.5),
    )


def in_words(runs):
    x = gain(runs["words"], "greedy")
    yield finding(
        "5.1",
        "OPD from a teacher that works in words fails",
        "it learns, to a lower ceiling (AMC23, about .12 to .26)",
        f"gain {gain(runs['words'], 'T .7')} at T .7, {x} greedily",
        less_than_share(runs["words"], runs["success"], 0.25),
    )


def not_slow(runs):
    gains = [f"{name}: {gain(runs[name], 'T .7')}" for name in PATIENT]
    yield finding(
        "ours",
        "it fails, and is not just slow: six times the steps, ten times the rate, both",
        "not there",
        f"{', '.join(gains)} at T .7",
        *(less_than_share(runs[name], runs["success"], 0.25) for name in PATIENT),
    )


def cold_start(runs):
    offs = both(runs["words, cold"], runs["words, 72 fast"])
    yield finding(
        "5.1",
        "a cold start and OPD do more than as many updates of OPD alone",
        "it raises the ceiling (AMC23, about .36 to .40)",
        f"{two(offs)}, of as many updates of OPD",
        *map(above, offs),
    )
    offs = both(runs["words, cold"], runs["words, sft"])
    yield finding(
        "ours",
        "cold start and OPD do more than as many updates of fine-tuning alone",
        "not controlled",
        two(offs),
        *(ends_above(runs["words, cold"], runs["words, sft"], way) for way in ("T .7", "greedy")),
    )


def template(runs):
    offs = both(runs["success"], runs["wordy"])
    yield finding(
        "5.2",
        "the teacher's template helps",
        "mean about .54 against .51",
        two(offs),
        *(more_than(off, 0) for off in offs),
    )


def estimators(runs):
    sampled = both(runs["sampled"], runs["full"])
    top_16 = both(runs["success"], runs["full"])
    yield finding(
        "ours",
        "Eq. 3, 4 and 5 end alike",
        "not there",
        f"Eq. 3 {two(sampled)}, Eq. 5 {two(top_16)}, of Eq. 4",
        *map(equal, [*sampled, *top_16]),
    )


def of_the_gain(runs, name):
    """The share of success's gain at T .7 that an arm gains, one number for each seed."""
    pairs = zip(runs[name], runs["success"], strict=True)
    return [share(gain([a], "T .7").mean, gain([b], "T .7").mean) for a, b in pairs]


def one_prompt(runs):
    shares = of_the_gain(runs, "one prompt")
    yield finding(
        "2609.04172",
        "one prompt gives most of the gain",
        ".87 of it at step 300, .72 at 1,000",
        f"{each(shares)} of the gain at T .7",
        reaches(shares, 0.72),
    )


def first_tokens(runs):
    shares = of_the_gain(runs, "8 tokens")
    yield finding(
        "2606.22600",
        "the first 30 % of the tokens give nearly all",
        "so",
        f"{each(shares)} of the gain at T .7",
        reaches(shares, 0.8),
    )


def area(runs, teacher):
    """The AUROC with a teacher: its mean over seeds, and noise, as a Difference."""
    return cost.mean_area([run["auroc"] for run in runs[f"signal of {teacher}"]])


def good_rewards(runs):
    good = area(runs, "expert")
    yield finding(
        "6.2",
        "a good teacher's mean reward ranks answers",
        "AUROC .733",
        f"{good.mean:.3f} ± {good.noise:.3f}",
        more_than(good, 0.6),
    )


def rewards_of(teacher, runs):
    good = area(runs, "expert")
    bad = area(runs, teacher)
    behind = Difference(good.mean - bad.mean, math.hypot(good.noise, bad.noise))
    yield finding(
        "6.2",
        f"the mean reward of {teacher} ranks them, too",
        "AUROC .751 with the one that fails",
        f"{bad.mean:.3f} ± {bad.noise:.3f}, {behind.mean:.3f} ± {behind.noise:.3f} behind",
        more_than(-behind, -0.1),
    )


def gradients_of(teacher, runs):
    claim = f"the gradients of {teacher} are large and cancel"
    yield cost.cancelling(claim, runs[f"signal of {teacher}"], runs["signal of expert"])


def equal_way(runs):
    claim = "on later seeds, a weaker teacher that thinks alike makes the better student"
    paper = "student about .20 with the weaker, .15 with the stronger"
    alike = []
    other = []
    for words, *rounds in zip(*(runs[name] for name in ("words", *BY_ROUND)), strict=True):
        weaker = [run for run in rounds if is_weaker(run, words)]
        if weaker:
            alike.append(weaker[-1])
            other.append(words)
    if not alike:
        seeds = each((run["seed"] for run in runs["words"]), "d")
        found = f"on seeds {seeds} no expert scores surely less than words"
        yield finding("3.1", claim, paper, found, lab.NOT_ASKABLE)
        return
    teachers = difference(alike, other, "T .7", "teacher")
    offs = both(alike, other)
    found = finding(
        "3.1",
        claim,
        paper,
        f"teachers {teachers} at T .7; students {two(offs)}; seeds "
        f"{each((run['seed'] for run in alike), 'd')}",
        *map(above, offs),
    )
    yield lab.so_far(found, len(alike))


def is_weaker(run, other):
    """Does the teacher of a run score surely less than that of another, at T .7?"""
    x = difference([run], [other], "T .7", "teacher")
    return x.mean < -x.noise


def promises(runs):
    yield from forecast.promises(pairs_of(runs), "on seeds 3 and 4")


def pairs_of(runs):
    """The pairs of forecast.pairs_of. Later ones are those that are not in CHOSEN_ON."""
    return forecast.pairs_of(runs, TAUGHT, lambda name, seed: (name, seed) not in CHOSEN_ON)


def trapped(runs):
    yield followups.agreement(runs["trap"])


CLAIMS = (  # asked of seeds 0 to 2: a claim, and the arms and probes that it needs, on three seeds
    (skill, ("success",)),
    (first_round, ("round 1",)),
    (nothing_new, ("copy",)),
    (sharper, ("sharper",)),
    (no_teacher, ("no teacher", "success")),
    (reverse, ("reverse",)),
    (from_right, ("backwards", "success")),
    (in_words, ("words", "success")),
    (not_slow, (*PATIENT, "success")),
    (cold_start, ("words, cold", "words, 72 fast", "words, sft")),
    (aligning, ("success",)),
    (small_loss, ("copy", "success")),
    (rounding, ("float32", "success")),
    (supports, ("intersection", "difference", "success")),
    (template, ("success", "wordy")),
    (good_rewards, ("signal of expert",)),
    (partial(rewards_of, "words"), ("signal of words", "signal of expert")),
    (partial(rewards_of, "copy"), ("signal of copy", "signal of expert")),
    (partial(gradients_of, "words"), ("signal of words", "signal of expert")),
    (partial(gradients_of, "copy"), ("signal of copy", "signal of expert")),
    (estimators, ("sampled", "success", "full")),
    (one_prompt, ("one prompt", "success")),
    (first_tokens, ("8 tokens", "success")),
    (trapped, ("trap",)),
)


LATER_CLAIMS = (  # the same, of later seeds
    (equal_way, ("words", *BY_ROUND)),  # counts the seeds that have a weaker expert itself
    (promises, tuple(both for name in TAUGHT for both in (name, f"diagnosis of {name}"))),
)
SEEDS = {equal_way: 0}  # that a claim needs, if not three


def judge(runs):
    """Every claim, of the seeds that have its arms: yields Findings. runs: of lab.read_all.

    The word of fewer than three seeds says so.
    """
    first = {}
    later = {}
    in_float32 = {run["seed"] for run in runs["success"] if run["asked"]["dtype"] == "float32"}
    for name, of_name in runs.items():
        if name == "float32":
            of_name = [run for run in of_name if run["seed"] not in in_float32]
        first[name] = [run for run in of_name if run["seed"] < forecast.LATER]
        later[name] = [run for run in of_name if run["seed"] >= forecast.LATER]
    for claims, of_seeds in ((CLAIMS, first), (LATER_CLAIMS, later)):
        for claim, names in claims:
            some = lab.of_shared_seeds(of_seeds, names)
            seeds = len(some[names[0]])
            if seeds == 0:
                continue
            for found in claim(some):
                yield lab.so_far(found, seeds, SEEDS.get(claim, 3))


def more(runs):
    """The diagnoses and what came; signals; which models were made anew and came out otherwise."""
    pairs = pairs_of(runs)
    lines = forecast.pair_lines(pairs) + forecast.candidate_lines(pairs)
    return lines + forecast.record_lines(pairs) + signal_lines(runs) + unlike_models(runs)


def signal_lines(runs):
    """The rewards and gradients of each teacher: a line for each seed."""
    lines = []
    for name, of_name in runs.items():
        if name.startswith("signal of "):
            lines += [f"{name}, seed {x['seed']}: {cost.signal_line(x)}" for x in of_name]
    return lines


def unlike_models(runs):
    """A model that was made twice and is not the same: then arms differ in it, too."""
    digests = {}
    for of_name in runs.values():
        for run in of_name:
            for model, digest in run.get("models", {}).items():
                digests.setdefault((run["seed"], model), set()).add(digest)
    return [
        f"seed {seed}: {model} was made {len(made)} times, and not alike"
        for (seed, model), made in sorted(digests.items())
        if len(made) > 1
    ]


if __name__ == "__main__":
    lab.main(
        __doc__,
        ARMS,
        judge,
        probes=PROBES,
        more=more,
        draw=plot.real,
        world=sums.RealLab,
        own={"base": "directory or hub name of a chat model that adds badly"},
    )
