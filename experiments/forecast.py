"""experiments/forecast.py: is the diagnosis before training worth having? Toy models, sixteen
pairs a seed.

Each pair is diagnosed as `analysis.py --student S --teacher T` does it, then distilled for 100
steps with the settings of every other pair. The results keep every input that a rule may want:
gains by depth, overlap ratio and masses over all positions, at the first eight tokens and in the
worst stretch of positions, the greedy lead.

Criteria, fixed before the runs:
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
from lab import above, arm, each, every_seed, finding, gain, more_than, together

from analysis import NOTHING_NEW, SHOULD_WORK, VERDICTS, diagnose_pair
from plumbing.answers import answered
from plumbing.slots import rollout

MODELS = {
    "student-2": dict(),  # as the student, by other random numbers
    "style": dict(start="bigger", house_style=True),
    "honest": dict(size="large", mistaught=0.0),  # of a corpus without false beliefs
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


def name_of(student, teacher):
    return f"{student} from {teacher}"


def arms():
    """{name: Arm}; an arm that phenomenology.py has keeps its name there, and is run once."""
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
    """The report of analysis.diagnose_pair, without what is by position."""
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
    """The correlation of the ranks: float, or None where one of them does not vary."""
    middle = (len(x) + 1) / 2
    a = [rank - middle for rank in ranks(x)]
    b = [rank - middle for rank in ranks(y)]
    scale = (sum(r * r for r in a) * sum(r * r for r in b)) ** 0.5
    return sum(r * s for r, s in zip(a, b)) / scale if scale else None


def pairs_of(results):
    """A dict a run: {"name", "seed", "report", "gain": {way: Difference}}."""
    found = []
    for name in ARMS:
        for run, diagnosed in zip(results[name], results[f"diagnosis of {name}"], strict=True):
            found.append(
                {
                    "name": name,
                    "seed": run["seed"],
                    "report": diagnosed["report"],
                    "gain": {way: gain([run], way) for way in ("T .7", "greedy", "T 1")},
                }
            )
    return found


PREDICTORS = {
    "predicted gain (mean over depths)": lambda report: report["predicted_gain"]["mean"],
    "teacher's lead at T .7": lambda report: report["continuation"][0]["gain"]["mean"],
    "teacher's greedy lead": lambda report: report["greedy"]["gain"]["mean"],
    "overlap ratio": lambda report: report["metrics"]["overlap_ratio"]["mean"],
    "minus reverse KL": lambda report: -report["metrics"]["reverse_kl"]["mean"],
}


def by_seed(pairs, value, way):
    """Spearman of something with the gain that came, a number a seed."""
    found = []
    for seed in sorted({pair["seed"] for pair in pairs}):
        mine = [pair for pair in pairs if pair["seed"] == seed]
        values = [value(pair["report"]) for pair in mine]
        found.append(spearman(values, [pair["gain"][way].mean for pair in mine]))
    return found


def judge(results):
    """The criteria above."""
    return list(findings(pairs_of(results)))


def findings(pairs):
    """A verdict that no pair has says nothing."""
    ranked = by_seed(pairs, PREDICTORS["predicted gain (mean over depths)"], "T .7")
    yield finding(
        "ours",
        "the diagnosis ranks the gains beforehand",
        "not there",
        f"Spearman {each(ranked)}",
        every_seed((x or 0) >= 0.8 for x in ranked),
    )
    promised = [pair["gain"] for pair in pairs if pair["report"]["verdict"] == SHOULD_WORK]
    if promised:
        words = [together(above(x["T .7"]), above(x["greedy"])) for x in promised]
        yield finding(
            "ours",
            'a pair that "should work" gains',
            "not there",
            f"{words.count(lab.HOLDS)} of {len(words)} runs, greedily by "
            f"{min(x['greedy'].mean for x in promised):+.3f} or more",
            *words,
        )
    nothing = [pair["gain"] for pair in pairs if pair["report"]["verdict"] == NOTHING_NEW]
    if nothing:
        words = [more_than(-x["greedy"], -lab.MARGIN) for x in nothing]
        yield finding(
            "ours",
            'a pair with "nothing new to teach" gains no knowledge',
            "not there",
            f"{words.count(lab.HOLDS)} of {len(words)} runs, greedily by "
            f"{max(x['greedy'].mean for x in nothing):+.3f} at most",
            *words,
        )


def more(results):
    """Every pair, the predictors, and what came by verdict."""
    pairs = pairs_of(results)
    lines = [
        "",
        f"{'pair':26} seed {'overlap':>7} {'mass':>6} {'rev. KL':>7} "
        f"{'predicted gain':>16} {'greedy lead':>11} {'came, T .7':>10} {'greedy':>7}  verdict",
    ]
    for pair in pairs:
        report = pair["report"]
        metrics = report["metrics"]
        sides = ("overlap_mass_student", "overlap_mass_teacher")
        mass = min(metrics[side]["mean"] for side in sides)
        predicted = report["predicted_gain"]
        lines.append(
            f"{pair['name']:26} {pair['seed']:4d} {metrics['overlap_ratio']['mean']:7.3f} "
            f"{mass:6.3f} {metrics['reverse_kl']['mean']:7.3f} {predicted['mean']:+8.3f} +- "
            f"{predicted['standard_error']:.3f} {report['greedy']['gain']['mean']:+11.3f} "
            f"{pair['gain']['T .7'].mean:+10.3f} {pair['gain']['greedy'].mean:+7.3f}  "
            f"{report['verdict']}"
        )
    lines.append("")
    for name, value in PREDICTORS.items():
        lines.append(
            f"Spearman, each seed: {name:34} with the gain at T .7 "
            f"{each(by_seed(pairs, value, 'T .7'))}; greedily "
            f"{each(by_seed(pairs, value, 'greedy'))}"
        )
    lines.append("")
    for verdict in VERDICTS:
        mine = [pair["gain"] for pair in pairs if pair["report"]["verdict"] == verdict]
        if not mine:
            continue
        ranges = []
        for way in ("T .7", "greedy"):
            gains = [x[way].mean for x in mine]
            ranges.append(f"{min(gains):+.3f} .. {max(gains):+.3f} {way}")
        lines.append(f"{verdict:62} {len(mine):3d} runs, gain {', '.join(ranges)}")
    return lines


if __name__ == "__main__":
    lab.main(__doc__, ARMS, judge, probes=PROBES, models=MODELS, more=more, draw=plot.forecast)
