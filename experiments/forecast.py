"""experiments/forecast.py: is the diagnosis before training worth having? Toy models, sixteen
pairs a seed.

Each pair is diagnosed as `analysis.py --student S --teacher T` does it, then distilled for 100
steps with the settings of every other pair. The results keep every input that a rule may want:
gains by depth, overlap ratio and masses over all positions, at the first eight tokens and in the
worst stretch of positions, the greedy lead. The verdict is that of today's analysis.verdict.

The rule is chosen on seeds 0, 1, 2 here, and on four pairs in real.py (CHOSEN_ON). So what is said
of later seeds is its record. Criteria, fixed before the runs of each seed:
    rank       Spearman correlation of the predicted gain (the mean gain over depths) with the gain
               that came, at T .7: .8 or more in every seed
    promise    every run that "should work" gains surely, at T .7 and greedily
    no promise every run with "nothing new to teach" gains surely less than .05 greedily

    python experiments/forecast.py              results/forecast.{txt,svg}
    python experiments/forecast.py --quick      a few steps: does it run?
"""

import lab
import phenomenology
import plot
import torch
from lab import above, arm, each, every_seed, finding, gain, more_than, together

from analysis import NOTHING_NEW, SHOULD_WORK, VERDICTS, auroc, diagnose_pair, sure, verdict
from plumbing.answers import answered
from plumbing.slots import rollout

MODELS = {
    "student-2": dict(),  # made like the student, from other random numbers
    "style": dict(start="bigger", house_style=True),
    "honest": dict(size="large", mistaught=0.0),  # from a corpus without false beliefs
    "right": dict(family="right", size="large"),
}
PAIRS = (
    ("student", "student-2"),
    ("student", "bigger"),
    ("student", "style"),
    ("student", "sharp"),
    ("student", "early"),
    ("student", "teacher"),
    ("student", "student-rl"),
    ("student", "honest"),
    ("student", "right"),
    ("student", "other"),
    ("student-rl", "student"),
    ("student-rl", "bigger"),
    ("student-rl", "sharp"),
    ("student-rl", "teacher"),
    ("bigger", "teacher"),
    ("right", "other"),
)


LATER = 3  # the first of the toy's seeds that the rule was not chosen on


def name_of(student, teacher):
    return f"{student} from {teacher}"


def arms():
    """{name: Arm}; an arm that phenomenology.py has, too, keeps its name and is run once."""
    there = {}
    for name, of_name in phenomenology.ARMS.items():
        if of_name.settings == {} and of_name.train is None:
            there[of_name.student, of_name.teacher] = name
    found = {}
    for student, teacher in PAIRS:
        name = there.get((student, teacher), name_of(student, teacher))
        found[name] = arm(student, teacher)
    return found


ARMS = arms()


def diagnosis(lab, student, teacher, prompts):
    """The report of analysis.diagnose_pair, without the means by position."""
    pair = lab.load(student, teacher)
    report = diagnose_pair(
        pair,
        lab.rows(pair, 8 if lab.quick else prompts),
        answered=answered,
        rollout=rollout,
        n=2,
        max_new_tokens=96,
        seed=lab.seed,
    )
    del report["by_position"]
    return {"report": report}


PROBES = {
    f"diagnosis of {name}": (
        diagnosis,
        {"student": of_name.student, "teacher": of_name.teacher, "prompts": 128},
    )
    for name, of_name in ARMS.items()
}


def ranks(x):
    """1 for the smallest; ties share the mean of their ranks: list -> list."""
    return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]


def spearman(x, y):
    """The correlation of the ranks: float, or None if one of them does not vary."""
    middle = (len(x) + 1) / 2
    a = [rank - middle for rank in ranks(x)]
    b = [rank - middle for rank in ranks(y)]
    scale = (sum(r * r for r in a) * sum(r * r for r in b)) ** 0.5
    return sum(r * s for r, s in zip(a, b)) / scale if scale else None


def is_later(name, seed):
    return seed >= LATER


def pairs_of(results, names, is_later=is_later):
    """Diagnosed and distilled pairs, a dict for each: {"name", "seed", "later", "report",
    "verdict", "gain": {way: Difference}, "pilot"}.

    later: was the rule made before this pair was diagnosed, by is_later(name, seed)? pilot: the
    share of the reverse KL that three steps took away.
    """
    found = []
    for name in names:
        both = lab.of_shared_seeds(results, (name, f"diagnosis of {name}"))
        for run, diagnosed in zip(*both.values(), strict=True):
            report = diagnosed["report"]
            kl = run["curves"]["reverse_kl"]
            found.append(
                {
                    "name": name,
                    "seed": run["seed"],
                    "later": is_later(name, run["seed"]),
                    "report": report,
                    "verdict": verdict(report)[0],
                    "gain": {way: gain([run], way) for way in ("T .7", "greedy", "T 1")},
                    "pilot": 1 - kl[min(3, len(kl) - 1)] / kl[0],
                }
            )
    return found


def leads(pair):
    """The teacher's lead at T .7, by depth: list, the first from the start."""
    return [cut["gain"]["mean"] for cut in pair["report"]["continuation"]]


def metric(name):
    return lambda pair: pair["report"]["metrics"][name]["mean"]


PREDICTORS = {
    "predicted gain (mean over depths)": lambda pair: pair["report"]["predicted_gain"]["mean"],
    "teacher's lead at T .7": lambda pair: leads(pair)[0],
    "teacher's greedy lead": lambda pair: pair["report"]["greedy"]["gain"]["mean"],
    "overlap ratio": metric("overlap_ratio"),
    "minus reverse KL": lambda pair: -metric("reverse_kl")(pair),
}
CANDIDATES = {  # to tell which pairs gain, of those whose teacher knows more
    "predicted gain": PREDICTORS["predicted gain (mean over depths)"],
    "gain after 25 %": lambda pair: leads(pair)[1],
    "gain after 50 %": lambda pair: leads(pair)[2],
    "mean gain after 25, 50, 75 %": lambda pair: lab.mean(leads(pair)[1:]),
    "overlap ratio": metric("overlap_ratio"),
    "overlap ratio, first tokens": lambda pair: first(pair, "overlap_ratio"),
    "overlap ratio, worst bucket": lambda pair: pair["report"]["worst_bucket"]["overlap_ratio"],
    "overlap mass, teacher": metric("overlap_mass_teacher"),
    "overlap mass, teacher, first tokens": lambda pair: first(pair, "overlap_mass_teacher"),
    "share of the KL gone after 3 steps": lambda pair: pair["pilot"],
}


def first(pair, name):
    return pair["report"]["first_tokens"][name]["mean"]


def by_seed(pairs, value, way):
    """The rank correlation of a predictor with the gain that came, one number for each seed."""
    found = []
    for seed in sorted({pair["seed"] for pair in pairs}):
        mine = [pair for pair in pairs if pair["seed"] == seed]
        values = [value(pair) for pair in mine]
        found.append(spearman(values, [pair["gain"][way].mean for pair in mine]))
    return found


def judge(results):
    """The criteria above."""
    pairs = pairs_of(results, ARMS)
    ranked = by_seed(pairs, PREDICTORS["predicted gain (mean over depths)"], "T .7")
    yield finding(
        "ours",
        "the diagnosis ranks the gains beforehand",
        "not there",
        f"Spearman {each(ranked)}",
        every_seed((x or 0) >= 0.8 for x in ranked),
    )
    old, new = by_age(pairs)
    yield from promises(old, "on the seeds that the rule was chosen on")
    for found in promises(new, "on later seeds"):
        yield lab.so_far(found, seeds=len({pair["seed"] for pair in new}))


def by_age(pairs):
    """Those that the rule was chosen on, and later ones: two lists."""
    old = [pair for pair in pairs if not pair["later"]]
    new = [pair for pair in pairs if pair["later"]]
    return old, new


def promises(pairs, where):
    """What became of "should work" and of "nothing new to teach": yields Findings.

    A verdict that no pair has says nothing.
    """
    promised = [pair["gain"] for pair in pairs if pair["verdict"] == SHOULD_WORK]
    if promised:
        words = [together(above(x["T .7"]), above(x["greedy"])) for x in promised]
        yield finding(
            "ours",
            f'a pair that "should work" gains, {where}',
            "not there",
            f"{words.count(lab.HOLDS)} of {len(words)} runs, greedily by "
            f"{min(x['greedy'].mean for x in promised):+.3f} or more",
            *words,
        )
    nothing = [pair["gain"] for pair in pairs if pair["verdict"] == NOTHING_NEW]
    if nothing:
        words = [more_than(-x["greedy"], -lab.MARGIN) for x in nothing]
        yield finding(
            "ours",
            f'a pair with "nothing new to teach" gains no knowledge, {where}',
            "not there",
            f"{words.count(lab.HOLDS)} of {len(words)} runs, greedily by "
            f"{max(x['greedy'].mean for x in nothing):+.3f} at most",
            *words,
        )


def more(results):
    """Every pair, the predictors, and what came by verdict."""
    pairs = pairs_of(results, ARMS)
    lines = pair_lines(pairs)
    lines.append("")
    for name, value in PREDICTORS.items():
        lines.append(
            f"Spearman, each seed: {name:34} with the gain at T .7 "
            f"{each(by_seed(pairs, value, 'T .7'))}; greedily "
            f"{each(by_seed(pairs, value, 'greedy'))}"
        )
    return lines + candidate_lines(pairs) + record_lines(pairs)


def pair_lines(pairs):
    """A line a pair: what was measured before, and what came."""
    lines = [
        "",
        f"{'pair':26} seed {'overlap':>7} {'first 8':>7} {'rev. KL':>7} "
        f"{'predicted gain':>16} {'greedy lead':>11} {'came, T .7':>10} {'greedy':>7}  verdict",
    ]
    for pair in pairs:
        report = pair["report"]
        metrics = report["metrics"]
        predicted = report["predicted_gain"]
        lines.append(
            f"{pair['name']:26} {pair['seed']:4d} {metrics['overlap_ratio']['mean']:7.3f} "
            f"{first(pair, 'overlap_ratio'):7.3f} {metrics['reverse_kl']['mean']:7.3f} "
            f"{predicted['mean']:+8.3f} +- {predicted['standard_error']:.3f} "
            f"{report['greedy']['gain']['mean']:+11.3f} "
            f"{pair['gain']['T .7'].mean:+10.3f} {pair['gain']['greedy'].mean:+7.3f}  "
            f"{pair['verdict']}"
        )
    return lines


def gains_greedily(pair):
    return above(pair["gain"]["greedy"]) == lab.HOLDS


def candidate_lines(pairs):
    """How well each candidate tells the pairs that gained from those that did not, among those
    whose teacher surely leads greedily, of those that the rule was chosen on."""
    old, _ = by_age(pairs)
    asked = [pair for pair in old if sure(pair["report"]["greedy"]["gain"]) > 0]
    if not asked:
        return []
    won = torch.tensor([gains_greedily(pair) for pair in asked])
    lines = [
        "",
        f"the rule was chosen on {len(asked)} pairs whose teacher surely leads greedily; of these "
        f"{int(won.sum())} gained greedily; AUROC of a candidate, its values",
    ]
    for name, value in CANDIDATES.items():
        values = torch.tensor([value(pair) for pair in asked])
        area = auroc(values, won)
        lines.append(
            f"{name:36} {'   -' if area is None else f'{area:.2f}'}  gained {span(values[won])}, "
            f"not {span(values[~won])}"
        )
    return lines


def span(values):
    """From the least to the largest, to read: "+0.10 .. +0.30"."""
    values = [float(value) for value in values]
    return f"{min(values):+.2f} .. {max(values):+.2f}" if values else "none"


def record_lines(pairs):
    """What came by verdict, of the pairs that the rule was chosen on and of later ones."""
    lines = []
    for which, mine in zip(("chosen on", "later pairs"), by_age(pairs)):
        if mine:
            lines += ["", f"{which}: {len(mine)} runs"]
        for name in VERDICTS:
            called = [pair for pair in mine if pair["verdict"] == name]
            if not called:
                continue
            lines.append(
                f"{name:62} {len(called):3d} runs, {sum(map(gains_greedily, called)):3d} gained "
                f"greedily; {came(called, 'T .7')} T .7, {came(called, 'greedy')} greedily"
            )
    return lines


def record(pairs):
    """{verdict: (later pairs that are called so, of which gained greedily)}."""
    _, new = by_age(pairs)
    found = {}
    for name in VERDICTS:
        called = [pair for pair in new if pair["verdict"] == name]
        if called:
            found[name] = (len(called), sum(map(gains_greedily, called)))
    return found


def came(pairs, way):
    return span(pair["gain"][way].mean for pair in pairs)


if __name__ == "__main__":
    lab.main(__doc__, ARMS, judge, probes=PROBES, models=MODELS, more=more, draw=plot.forecast)
