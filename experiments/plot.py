"""experiments/plot.py: the results of the experiments as pictures (of a run: plumbing/figures.py).

    phenomenology  results/phenomenology.json: accuracy and overlap ratio of its pairs
    forecast       results/forecast.json: the gain predicted before training against the real one
    recipe         results/recipe.json: the cold start and its controls, mixing of aligned prompts
    mechanism      results/mechanism.json: success and failure side by side, supports
    cost           results/cost.json: budgets, depth, supports, coherence of the gradients
    real           results/real.json: success, failures and recovery on a real language model
    again          results/again.json: one setting changed at a time on the same model
    overview       success, failure and recovery of several results in one picture

Pictures need matplotlib, which is optional: without it a line says what to install.
"""

import json
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing import figures  # noqa: E402
from plumbing.figures import PANELS, limit, read_rows, save, smooth  # noqa: E402, F401

# the same in every figure
COLOURS = {
    "success": "#1a7f5a",
    "bigger": "#c8553d",
    "weaker": "#0072b2",
    "other": "#7d5ba6",
    "reverse": "#8a8a8a",
    "reverse-bigger": "#b8a06a",
}
SPARE = (
    "#0072b2",
    "#e69f00",
    "#56b4e9",
    "#cc79a7",
    "#000000",
)  # Okabe and Ito: safe for the colour-blind
NAMES = {
    "success": "post-trained teacher, same family",
    "bigger": "bigger teacher, same pipeline",
    "weaker": "less post-trained teacher, same family",
    "other": "post-trained teacher, other family",
    "reverse": "post-trained student, its earlier self as teacher",
    "reverse-bigger": "post-trained student, the bigger one as teacher",
}
ARMS = (
    "opd",
    "sft 100",
    "sft 100 + opd",
    "sft 300",
    "sft 300, fresh",
    "sft 100 T.7",
    "sft 100 T.7 + opd",
    "sft 300 T.7",
    "sft 300 T.7, fresh",
)  # of 5.1
VERDICTS = {  # by how a verdict begins
    "should work": (COLOURS["success"], "o"),
    "nothing new": (COLOURS["bigger"], "s"),
    "incompatible": (COLOURS["other"], "^"),
    "harmful": (COLOURS["reverse"], "v"),
    "undecided": ("#000000", "x"),
}


def read_json(path):
    return json.loads(path.read_text()) if path.is_file() else None


def pyplot(again):
    """matplotlib.pyplot; without matplotlib None, and a line that says what to do."""
    try:
        return figures.pyplot()
    except ModuleNotFoundError:
        print(f"no picture: pip install matplotlib, then {again}", file=sys.stderr)
        return None


def opened(results, script):
    """pyplot, and the runs of a results file; (None, None) without matplotlib."""
    plt = pyplot(f"python experiments/{script}.py --report {results}")
    return (plt, None) if plt is None else (plt, read_json(Path(results))["runs"])


def forecast(results, out, note=""):
    """Real against predicted gain in accuracy, a point for each run, coloured by its verdict."""
    plt, runs = opened(results, "forecast")
    if plt is None:
        return
    known = [run for run in runs if (run.get("predicted_gain") or {}).get("mean") is not None]
    figure, axes = plt.subplots(figsize=(6.5, 4.8), layout="constrained")
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.axline(
        (0, 0), slope=1, color="0.65", linewidth=0.8, linestyle="--", label="realised as predicted"
    )
    for verdict, (colour, marker) in VERDICTS.items():
        mine = [run for run in known if run["verdict"].startswith(verdict)]
        if mine:
            axes.errorbar(
                [run["predicted_gain"]["mean"] for run in mine],
                [run["gain"] for run in mine],
                xerr=[run["predicted_gain"]["standard_error"] or 0 for run in mine],
                color=colour,
                fmt=marker,
                label=f"{mine[0]['verdict']}, {len(mine)} run{'s' * (len(mine) > 1)}",
                markersize=6,
                markeredgecolor="white",
                elinewidth=0.7,
            )
    if len(known) > 2:
        label_outliers(axes, known)
    axes.set(
        xlabel="predicted gain in accuracy: teacher - student, "
        "finishing the student's responses (± 1 s.e.)",
        ylabel="realised gain in accuracy: after - before",
    )
    axes.set_title(note, fontsize=9)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save(plt, figure, out)


def label_outliers(axes, known, count=3):
    """Names what lies two standard deviations off the line through all runs.

    A pair is named once, and no name stands over another.
    """
    import numpy  # is there where matplotlib is

    x, y = numpy.array([[run["predicted_gain"]["mean"], run["gain"]] for run in known]).T
    off = abs(y - numpy.polyval(numpy.polyfit(x, y, 1), x))
    far, named = 2 * (off**2).mean() ** 0.5, {}
    for i in numpy.argsort(-off, kind="stable"):
        name = f"{known[i]['student']} ← {known[i]['teacher']}"
        free = all(
            abs(x[i] - x[j]) > 0.3 * numpy.ptp(x) or abs(y[i] - y[j]) > 0.06 * numpy.ptp(y)
            for j in named.values()
        )
        if off[i] > far and len(named) < count and name not in named and free:
            named[name] = i
            axes.annotate(
                name,
                (x[i], y[i]),
                xytext=(0, 6),
                textcoords="offset points",
                fontsize=8,
                ha="center",
            )


def recipe(results, out):
    """Paper 5: accuracy of the arms of 5.1; accuracy and entropy by the aligned share of 5.2.

    The mean, and every seed.
    """
    plt, runs = opened(results, "recipe")
    if plt is None:
        return
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, 3.6), layout="constrained", width_ratios=(1.25, 1, 1)
    )
    bars(
        left,
        runs,
        {
            arm: COLOURS[
                "other" if arm == "opd" else "success" if arm.endswith("+ opd") else "reverse"
            ]
            for arm in ARMS
        },
    )
    cold = [run for run in runs if run["part"] == "5.1"]
    for key, name in (("accuracy_before", "student before"), ("accuracy_teacher", "teacher")):
        level = sum(run[key]["mean"] for run in cold) / len(cold)
        left.axhline(level, color="0.3", linewidth=0.9, linestyle="--")
        left.annotate(
            name,
            (0.02, level),
            xycoords=("axes fraction", "data"),
            fontsize=8,
            textcoords="offset points",
            xytext=(0, 2),
        )
    left.set_xticks(range(len(ARMS)), ARMS, rotation=40, ha="right", rotation_mode="anchor")
    left.set_title("5.1 cold start, teacher of the other family")
    for axes, title, value in (
        (
            middle,
            "5.2 accuracy on all digits",
            lambda run: run["accuracies"]["aligned, all"]["mean"],
        ),
        (right, "5.2 entropy of the student", lambda run: run["held_out_after"]["entropy_student"]),
    ):
        for template, colour, marker, name in (
            ("aligned", COLOURS["success"], "o", "teacher's template"),
            ("unaligned", COLOURS["other"], "s", "other template"),
        ):
            mine = [run for run in runs if run.get("template") == template]
            at = sorted({run["fraction"] for run in mine})
            values = [
                [value(run) for run in mine if run["fraction"] == fraction] for fraction in at
            ]
            axes.plot(
                at, [sum(v) / len(v) for v in values], color=colour, linewidth=1.8, label=name
            )
            for fraction, v in zip(at, values):
                axes.plot([fraction] * len(v), v, marker, color=colour, markersize=4, alpha=0.7)
        axes.set(xlabel="share of aligned content", title=title)
        axes.set_xticks((0, 0.25, 0.5, 0.75, 1))
    middle.set_ylabel("accuracy, under the teacher's template")
    right.set_ylabel("nats")
    figure.legend(
        *middle.get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False
    )
    save(plt, figure, out)


def mechanism(results, out):
    """Paper 4: metrics against step for success and failure, accuracy on other supports.

    Mean and range of the seeds.
    """
    plt, runs = opened(results, "mechanism")
    if plt is None:
        return
    figure, grid = plt.subplots(2, 4, figsize=(12, 5), layout="constrained")
    aligning(
        plt,
        grid.flat[:7],
        {
            f"{pair}: {NAMES[name]}": (
                COLOURS[name],
                [run for run in runs if (run["pair"], run["support"]) == (pair, "student")],
            )
            for pair, name in (("success", "success"), ("failure", "bigger"))
        },
    )
    right = grid[1, 3]
    success = [{**run, "arm": run["support"]} for run in runs if run["pair"] == "success"]
    fluent = [
        {**run, "arm": f"{run['support']}, fluent"} for run in runs if run["pair"] == "fluent"
    ]
    shown = [run for run in success + fluent if ", raw" not in run["arm"]]
    bars(
        right,
        shown,
        {
            arm: COLOURS[
                "reverse"
                if arm.startswith("difference")
                else "weaker"
                if arm.endswith("fluent")
                else "success"
            ]
            for arm in dict.fromkeys(run["arm"] for run in shown)
        },
    )
    for mine, place in ((success, (-0.5, 2.5)), (fluent, (2.5, 4.5))):
        level = sum(run["accuracy_before"]["mean"] for run in mine) / len(mine)
        right.plot(place, (level, level), color="0.3", linewidth=0.9, linestyle="--")
    right.tick_params(axis="x", rotation=40)
    right.set_title("4.2 by support (dashed: before)", fontsize=9)
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    save(plt, figure, out)


def real(results, out):
    """Figure 6 on a real language model: success beside other teachers; all accuracies.

    Mean and range of the seeds.
    """
    plt, runs = opened(results, "real")
    if plt is None:
        return
    figure, grid = plt.subplots(2, 4, figsize=(12, 5), layout="constrained")
    colours = {
        "success": COLOURS["success"],
        "nothing new": COLOURS["bigger"],
        "other way": COLOURS["other"],
        "cold start": COLOURS["weaker"],
        "intersection": COLOURS["reverse"],
    }
    aligning(
        plt,
        grid.flat,
        {
            label: (colours[name], [run for run in runs if run["run"] == name])
            for name, label in (
                ("success", "post-trained copy of the student"),
                ("nothing new", "copy trained on its own answers, unselected"),
                ("other way", "copy that works the sums out from the right"),
            )
        },
        window=1,
    )
    bars(grid[1, 3], [{**run, "arm": run["run"]} for run in runs if run["run"] in colours], colours)
    plt.setp(grid[1, 3].get_xticklabels(), rotation=35, ha="right", rotation_mode="anchor")
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    save(plt, figure, out)


def again(results, out):
    """One setting changed at a time on the real model; the overlap ratio with four teachers."""
    overlap_and_accuracy(
        results,
        out,
        "again",
        {
            "success": (COLOURS["success"], "after expert iteration"),
            "other way": (COLOURS["bigger"], "from right to left"),
            "words": (COLOURS["other"], "in words"),
            "words, cold": (COLOURS["weaker"], "in words, after a cold start"),
        },
        {
            "success": COLOURS["success"],
            "sampled": COLOURS["success"],
            "full": COLOURS["success"],
            "unaligned": COLOURS["reverse"],
            "first 30 %": COLOURS["reverse"],
            "one prompt": COLOURS["reverse"],
            "other way": COLOURS["bigger"],
            "words": COLOURS["other"],
            "words, cold": COLOURS["weaker"],
            "reverse": SPARE[4],
        },
    )


def longer(results, out):
    """A teacher in words, after no cold start, a short one and a long one."""
    arms = {
        "words": (COLOURS["other"], "no cold start"),
        "words, cold": (COLOURS["weaker"], "10 updates"),
        "long cold": (SPARE[1], "60 updates"),
    }
    overlap_and_accuracy(
        results, out, "longer", arms, {name: colour for name, (colour, _) in arms.items()}
    )


def overlap_and_accuracy(results, out, name, followed, colours):
    """The held-out overlap ratio before and after OPD of the runs followed, {run: (colour, label)}.

    Beside it all accuracies {run: colour}: before, after a cold start, and after OPD.
    """
    plt, runs = opened(results, name)
    if plt is None:
        return
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.6), width_ratios=(1, 2), layout="constrained"
    )
    for arm, (colour, label) in followed.items():
        mine = [run for run in runs if run["run"] == arm]
        ends = [
            [run.get("held_out_cold_start", run["held_out_before"]), run["held_out_after"]]
            for run in mine
        ]
        band(
            left,
            (0, mine[0]["steps"]),
            [[x["overlap_ratio"] for x in two] for two in ends],
            colour,
            label=label,
        )
    left.set(xlabel="step of OPD", ylim=(0, 1), title="overlap ratio (Eq. 6), held out")
    left.legend(frameon=False, fontsize=8)
    bars(right, [{**run, "arm": run["run"]} for run in runs], colours)
    for place, arm in enumerate(colours):
        for when, style in (("accuracy_before", "--"), ("accuracy_cold_start", ":")):
            levels = [run[when]["mean"] for run in runs if run["run"] == arm and run.get(when)]
            if levels:
                right.plot(
                    (place - 0.35, place + 0.35),
                    [sum(levels) / len(levels)] * 2,
                    style,
                    color="0.3",
                )
    right.set_title("accuracy (dashed: before; dotted: after the cold start)")
    save(plt, figure, out)


def ends(results, out):
    """Accuracy and length of responses against step; both end with the same token, or do not."""
    plt, runs = opened(results, "ends")
    if plt is None:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for arm, colour, style, label in (
        ("ordinary", COLOURS["success"], "-", "both end with the same token"),
        ("merged", COLOURS["bigger"], "--", "with different ones, one event (merged)"),
        ("own", COLOURS["other"], "-", "with different ones, each for itself (own)"),
    ):
        mine = [run for run in runs if run["arm"] == arm]
        steps, evaluated, accuracy = accuracies(mine)
        band(left, evaluated, accuracy, colour, style, label)
        band(right, steps, [run["curves"]["response_length"] for run in mine], colour, style)
    left.set(xlabel="step", ylim=(0, 1), title="accuracy of the student")
    right.set(xlabel="step", ylim=(0, None), title="tokens a response")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    save(plt, figure, out)


def followups(results, out):
    """What later papers say: accuracy of each arm, and against the reverse KL of two runs."""
    plt, runs = opened(results, "followups")
    if plt is None:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    bars(
        left,
        runs,
        {
            "all": COLOURS["success"],
            "16 prompts": COLOURS["weaker"],
            "1 prompt": COLOURS["weaker"],
            "first 30 %": COLOURS["bigger"],
            "sharp": COLOURS["reverse"],
            "fails": COLOURS["other"],
        },
    )
    left.set_title("one setting changed at a time", fontsize=9)
    right.set_title("accuracy along the reverse KL", fontsize=9)
    for arm, colour, label in (
        ("all", COLOURS["success"], "success"),
        ("fails", COLOURS["other"], "failure"),
    ):
        for i, run in enumerate(run for run in runs if run["arm"] == arm):
            known = [
                (kl, x)
                for kl, x in zip(run["curves"]["reverse_kl"], run["curves"]["accuracy"])
                if x is not None
            ]
            known = [(run["held_out_before"]["reverse_kl"], run["accuracy_before"]["mean"]), *known]
            right.plot(
                *zip(*known),
                "o-",
                color=colour,
                markersize=3,
                linewidth=1,
                label=None if i else label,
            )
    right.set(xlabel="reverse KL, nats a token", xscale="log", ylabel="accuracy", ylim=(0, 1))
    right.legend(frameon=False, fontsize=8)
    save(plt, figure, out)


def aligning(plt, grid, groups, window=7):
    """Panels of Figure 6, and |p - q| of 4.1, with a band for each group.

    groups: {label: (colour, runs, one for each seed)}; window: steps that are averaged.
    """
    panels = [
        panel
        for panel in PANELS
        if panel.metric
        in (
            "overlap_ratio",
            "overlap_mass_student",
            "overlap_token_advantage",
            "entropy_gap",
            "loss",
            "grad_norm",
        )
    ]
    panels.insert(
        4,
        figures.Panel(
            "|p - q| at the token of largest advantage", "probability", "largest_gap", low=0
        ),
    )
    for axes, panel in zip(grid, panels):
        for label, (colour, mine) in groups.items():
            for name, style in ((panel.metric, "-"), (panel.of_teacher, "--")):
                if name:
                    band(
                        axes,
                        mine[0]["curves"]["step"],
                        [smooth(run["curves"][name], window) for run in mine],
                        colour,
                        style,
                        label if style == "-" else None,
                    )
        axes.set_title(panel.title, fontsize=9)
        axes.set(xlabel="step", ylabel=panel.unit)
        axes.locator_params(axis="x", integer=True)
        limit(plt, axes, panel)


def bars(axes, runs, colours):
    """A bar an arm, {arm: colour}: the mean of its accuracy after training, and a point a seed."""
    for place, (arm, colour) in enumerate(colours.items()):
        values = [run["accuracy_after"]["mean"] for run in runs if run["arm"] == arm]
        axes.bar(place, sum(values) / len(values), color=colour, alpha=0.35, width=0.7)
        axes.plot([place] * len(values), values, "o", color=colour, markersize=4, clip_on=False)
    axes.set_xticks(
        range(len(colours)),
        [re.sub(r"(?<=,) | (?=\+|T|prompt|30 %)", "\n", arm) for arm in colours],
        fontsize=8,
    )
    axes.set(ylabel="accuracy after", ylim=(0, 1))


def cost(results, out):
    """Paper 6: accuracy by response budget and support, gain by depth, what the mean reward says.

    And whether the gradients of positions point the same way.
    """
    plt, runs = opened(results, "cost")
    if plt is None:
        return

    def of(part):
        return [run for run in runs if run["part"] == part]

    figure, ((length, depth, support), (area, coherence, cosine)) = plt.subplots(
        2, 3, figsize=(11, 6), layout="constrained"
    )
    seeds = sorted({run["seed"] for run in runs})
    budgets = list(dict.fromkeys(int(run["arm"]) for run in of("length")))
    band(
        length,
        budgets,
        [
            [run["accuracy_after"]["mean"] for run in of("length") if run["seed"] == seed]
            for seed in seeds
        ],
        COLOURS["success"],
        "o-",
    )
    length.set_xscale("log", base=2)
    length.set_xticks(budgets, budgets)
    length.set(
        xlabel="tokens a response may have",
        ylabel="accuracy after",
        ylim=(0, 1),
        title="6.1 response budget",
    )
    cuts = [run["depths"] for run in of("depth")]
    at = [sum(x["tokens"] for x in place) / len(place) for place in zip(*cuts)]
    band(depth, at, [[x["mean"] for x in each] for each in cuts], COLOURS["success"], "o-")
    depth.plot(
        at,
        [sum(x["even"] for x in place) / len(place) for place in zip(*cuts)],
        "--",
        color="0.3",
        linewidth=1,
    )
    depth.set(
        xlabel="tokens that the student wrote",
        ylabel="teacher - student",
        ylim=(0, None),
        title="6.1 who finishes it (dashed: by slips alone)",
    )
    bars(
        support,
        of("support"),
        dict.fromkeys((run["arm"] for run in of("support")), COLOURS["success"]),
    )
    plt.setp(support.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor")
    longer, places = of("longer"), list(dict.fromkeys(run["arm"] for run in of("support")))
    support.plot(
        [places.index(run["arm"]) for run in longer],
        [run["accuracy_after"]["mean"] for run in longer],
        "o",
        color=COLOURS["success"],
        markerfacecolor="white",
        markersize=5,
    )
    support.set_title(f"6.3 support (○ after {longer[0]['steps']} steps)")
    for place, pair in enumerate(("success", "bigger", "other")):
        mine = [
            [run for run in of("signal") if (run["arm"], run["seed"]) == (pair, seed)]
            for seed in seeds
        ]
        known = [run["auroc"] for (run, *_) in mine if run["auroc"] is not None]
        area.plot([place] * len(known), known, "o", color=COLOURS[pair])
        for axes, name in ((coherence, "coherence"), (cosine, "cosine")):
            band(
                axes,
                range(3),
                [[run[name] for run in each] for each in mine],
                COLOURS[pair],
                "o-",
                label=NAMES[pair],
            )
    area.axhline(0.5, color="0.6", linewidth=0.8)
    area.set_xticks(range(3), ["succeeds", "teaches\nnothing", "ruins"])
    area.set(
        ylabel="AUROC, before training",
        ylim=(0.4, 1),
        xlim=(-0.5, 2.5),
        title="6.2 right or wrong, by mean reward",
    )
    for axes, label in (
        (coherence, "length of the sum / sum of lengths"),
        (cosine, "mean cosine of two positions"),
    ):
        axes.set_xticks(range(3), ["before", "half-way", "after"])
        axes.set(ylabel=label, title="6.2 do gradients point one way?", ylim=(0, None))
    figure.legend(
        *cosine.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    save(plt, figure, out)


def band(axes, x, curves, colour, style="-", label=None):
    """A line through the mean over seeds, their range behind it; at most some 60 points."""
    every = max(1, math.ceil(len(x) / 60))
    x, curves = x[::every], [values[::every] for values in curves]
    middle = [sum(values) / len(values) for values in zip(*curves)]
    axes.plot(x, middle, style, color=colour, label=label, linewidth=1.8)
    axes.fill_between(
        x,
        [min(values) for values in zip(*curves)],
        [max(values) for values in zip(*curves)],
        color=colour,
        alpha=0.15,
        linewidth=0,
    )


def phenomenology(results, out):
    """Accuracy and overlap ratio against step, the reversed pairs by themselves.

    Mean and range of the seeds.
    """
    plt, runs = opened(results, "phenomenology")
    if plt is None:
        return
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for pair, colour in COLOURS.items():
        mine = [run for run in runs if run["pair"] == pair]
        if not mine:
            continue
        steps, evaluated, accuracy = accuracies(mine)
        teacher = sum(run["accuracy_teacher"]["mean"] for run in mine) / len(mine)
        axes = right if pair.startswith("reverse") else left
        axes.plot(evaluated[-1] * 1.04, teacher, marker="<", color=colour, clip_on=False)
        band(axes, evaluated, accuracy, colour)
        if axes is left:
            band(middle, steps, [smooth(run["curves"]["overlap_ratio"], 7) for run in mine], colour)
        left.plot([], [], color=colour, label=NAMES[pair])
    left.set(xlabel="step", ylim=(0, 1), title="accuracy of the student (◂ its teacher)")
    middle.set(xlabel="step", ylim=(0, 1), title="overlap ratio, k = 16 (Eq. 6)")
    right.set(xlabel="step", ylim=(0, 1), title="accuracy, reversed pairs (3.3)")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    save(plt, figure, out)


def overview(results, out):
    """The paper at a glance: a pair that works, one that fails, and that one recovered.

    Draws nothing where phenomenology.json or recipe.json is not there yet.
    """
    plt = pyplot("python experiments/report.py")
    if plt is None:
        return
    made = [read_json(Path(results) / f"{name}.json") for name in ("phenomenology", "recipe")]
    if not all(made):
        return
    pairs, cold = (each["runs"] for each in made)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, colour, mine in (
        (
            "works: same way of thinking,\nnew capability",
            "success",
            [r for r in pairs if r["pair"] == "success"],
        ),
        (
            "recovers: 100 steps of SFT\non the teacher's answers first",
            "weaker",
            [r for r in cold if r["arm"] == "sft 100 + opd"],
        ),
        (
            "fails: as good a teacher,\nanother way of thinking",
            "other",
            [r for r in cold if r["arm"] == "opd"],
        ),
    ):
        steps, evaluated, accuracy = accuracies(mine)
        cold_start = [run.get("accuracy_cold_start") for run in mine]
        if all(cold_start):
            rise = [
                (run["accuracy_before"]["mean"], start["mean"])
                for run, start in zip(mine, cold_start)
            ]
            band(panels[0], (-100, 0), rise, COLOURS[colour], ":")
            accuracy = [[start["mean"], *values[1:]] for start, values in zip(cold_start, accuracy)]
        band(panels[0], evaluated, accuracy, COLOURS[colour], label=name)
        band(
            panels[1],
            steps,
            [smooth(run["curves"]["overlap_ratio"], 7) for run in mine],
            COLOURS[colour],
        )
        teacher = sum(run["accuracy_teacher"]["mean"] for run in mine) / len(mine)
        panels[0].plot(210, teacher, marker="<", color=COLOURS[colour], clip_on=False)
    panels[0].set(
        xlabel="step of on-policy distillation (dotted: of SFT)",
        ylim=(0, 1),
        xlim=(-105, 210),
        title="accuracy of the student (◂ its teacher)",
    )
    panels[1].set(
        xlabel="step of on-policy distillation",
        ylim=(0, 1),
        xlim=(0, 210),
        title="overlap of the 16 likeliest tokens (Eq. 6)",
    )
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    save(plt, figure, out)


def accuracies(runs):
    """Runs with the same steps -> the steps, those with an accuracy, the accuracies of each run."""
    steps, known = runs[0]["curves"]["step"], runs[0]["curves"]["accuracy"]
    evaluated = [0, *(step for step, x in zip(steps, known) if x is not None), steps[-1]]
    return (
        steps,
        evaluated,
        [
            [
                run["accuracy_before"]["mean"],
                *(x for x in run["curves"]["accuracy"] if x is not None),
                run["accuracy_after"]["mean"],
            ]
            for run in runs
        ],
    )
