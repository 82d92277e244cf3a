"""experiments/plot.py: the results of the experiments as pictures (of a run: plumbing/figures.py).

The toy. Each is a function of (results, path): results is {arm or probe: [result, one a seed]}, and
path.svg is written.
    phenomenology  before, after and teacher of every pair; whether it is sharper or knows more
    mechanism      Figure 6 for success and failure; accuracy by support
    recipe         the cold start and its controls; template and share of aligned content
    cost           budgets, depth, supports, rewards of right and wrong answers, gradients
    followups      fewer prompts, fewer tokens, unlike ends; direction of the KL and who writes
    forecast       the gain that came against the one that was predicted
    overview       a pair that works, one that fails, and the same one after a cold start

SmolLM2.
    context        a model that learns from itself, reading the worked answer
    real           a model that learns to add from copies of itself; a pair that fails, or is slow

A colour means the same pair in every figure. A solid line is T .7, a dashed one greedy.
Pictures need matplotlib, which is optional: without it a line says what to install.
"""

import json
import math
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from analysis import verdict as verdict_of  # noqa: E402
from plumbing import figures  # noqa: E402
from plumbing.figures import PANELS, limit, save, smooth  # noqa: E402

# the same in every figure
COLOURS = {
    "success": "#1a7f5a",
    "bigger": "#c8553d",
    "sharp": "#e69f00",
    "early": "#56b4e9",
    "other": "#7d5ba6",
    "self": "#cc79a7",
    "no-teacher, lr by 10": "#000000",
    "reverse": "#8a8a8a",
    "reverse-bigger": "#b8a06a",
    "reverse-sharp": "#5f5020",
    "cold start": "#0072b2",
}
SPARE = (
    "#0072b2",
    "#e69f00",
    "#56b4e9",
    "#cc79a7",
    "#000000",
)  # Okabe and Ito: safe for the colour-blind
NAMES = {
    "success": "teacher: knows more",
    "early": "early: knows more, less RL",
    "sharp": "sharp: only sharper",
    "bigger": "bigger: knows no more",
    "self": "itself at temperature .5",
    "no-teacher, lr by 10": "no teacher, unlikely tokens down",
    "other": "other: knows more, thinks otherwise",
    "reverse": "its earlier self",
    "reverse-bigger": "bigger",
    "reverse-sharp": "sharp",
}  # the teacher of an arm
FORWARD = (
    "success",
    "early",
    "sharp",
    "bigger",
    "self",
    "no-teacher, lr by 10",
    "other",
)  # 3.1 and 3.2
REVERSED = ("reverse", "reverse-bigger", "reverse-sharp")  # 3.3
WITHOUT_TEACHER = (
    "self",
    "no-teacher, lr by 10",
    "sharper",
    "no teacher",
)  # an accuracy of the teacher would say nothing
REAL = {  # arm of real.py -> its colour, and its name
    "success": (COLOURS["success"], "expert: three rounds of RL"),
    "round 2": (COLOURS["early"], "after two rounds"),
    "round 1": (COLOURS["early"], "after one round"),
    "copy": (COLOURS["bigger"], "copy: unchecked answers"),
    "sharper": (COLOURS["self"], "itself at temperature .4"),
    "no teacher": ("#000000", "no teacher"),
    "backwards": (COLOURS["sharp"], "works from the right"),
    "words": (COLOURS["other"], "works in words"),
    "words, 72": (COLOURS["other"], "words, 72 steps"),
    "words, fast": (COLOURS["other"], "words, ten times the rate"),
    "words, 72 fast": (COLOURS["other"], "words, 72 steps at that rate"),
    "words, sft": (COLOURS["cold start"], "words, 72 updates of SFT"),
    "words, cold": (COLOURS["cold start"], "words, 60 of SFT, then OPD"),
    "reverse": (COLOURS["reverse"], "expert from base, 100 steps"),
    "float32": ("#000000", "expert, in float32"),
    "intersection": ("#000000", "expert, shared tokens"),
    "difference": ("#000000", "expert, other tokens"),
    "sampled": ("#000000", "expert, Eq. 3"),
    "full": ("#000000", "expert, Eq. 4"),
    "wordy": ("#000000", "expert, other template"),
    "8 tokens": ("#000000", "expert, 8 tokens"),
    "one prompt": ("#000000", "expert, one prompt"),
}
REWARDED = {  # teacher whose rewards real.py measures -> the arm that has its colour
    "expert": "success",
    "backwards": "backwards",
    "words": "words",
    "copy": "copy",
}
WAYS = {"T .7": "at T .7", "greedy": "greedily"}
STYLES = {"T .7": "-", "greedy": "--"}
MARKERS = {"T .7": "o", "greedy": "^"}
VERDICTS = {  # by how a verdict begins
    "should work": (COLOURS["success"], "o"),
    "nothing new to teach": (COLOURS["bigger"], "s"),
    "incompatible thinking": (COLOURS["other"], "^"),
    "harmful": (COLOURS["reverse"], "v"),
    "undecided": ("#000000", "x"),
}
GREY = "0.35"


def read_json(path):
    return json.loads(path.read_text()) if path.is_file() else None


def pyplot(again):
    """matplotlib.pyplot; without matplotlib None, and a line that says what to do."""
    try:
        plt = figures.pyplot()
    except ModuleNotFoundError:
        print(f"no picture: pip install matplotlib, then {again}", file=sys.stderr)
        return None
    plt.rcParams["axes.titlesize"] = 9
    return plt


def anew(script):
    """The command that draws the figure of a script of the toy."""
    return f"python experiments/{script}.py --report"


def keep(plt, figure, path):
    """Write a figure to path.svg."""
    save(plt, figure, f"{path}.svg")


# --- what the figures share -----------------------------------------------------------------------


def level(run, when, way, exam="accuracy"):
    """An accuracy of a run "before", "after" or of the "teacher": float."""
    return run[exam][when][way]["mean"]


def levels(runs, when, way, exam="accuracy"):
    """The same of each seed."""
    return [level(run, when, way, exam) for run in runs]


def gains(runs, way):
    """The gain of each seed."""
    return [level(run, "after", way) - level(run, "before", way) for run in runs]


def curve(run, name, window=1):
    """A metric against the step, smoothed."""
    values = [math.nan if x is None else x for x in run["curves"][name]]
    return smooth(values, window)


def band(axes, x, curves, colour, style="-", label=None):
    """A line through the mean over seeds, their range behind it; at most some 60 points."""
    every = max(1, math.ceil(len(x) / 60))
    x = list(x)[::every]
    by_point = list(zip(*curves))[::every]
    middle = [mean(values) for values in by_point]
    lowest = [min(values) for values in by_point]
    highest = [max(values) for values in by_point]
    axes.plot(x, middle, style, color=colour, label=label, linewidth=1.8)
    axes.fill_between(x, lowest, highest, color=colour, alpha=0.15, linewidth=0)


def rows(axes, results, arms, way, without_teacher=()):
    """A row for each arm: a ring before, a line to the mean after, a dot a seed, the teacher's bar.

    arms: {name: (colour, label)}, from top to bottom.
    """
    for place, (name, (colour, _)) in enumerate(arms.items()):
        runs = results[name]
        before = mean(levels(runs, "before", way))
        after = levels(runs, "after", way)
        if name not in without_teacher:
            teacher = mean(levels(runs, "teacher", way))
            axes.plot(teacher, place, "|", color="black", markersize=13, markeredgewidth=1.6)
        axes.plot((before, mean(after)), (place, place), color=colour, linewidth=2.2, alpha=0.5)
        axes.plot(before, place, "o", color=colour, markerfacecolor="white", markersize=6)
        axes.plot(after, [place] * len(after), "o", color=colour, markersize=5, alpha=0.8)
    labels = [label for _, label in arms.values()]
    axes.set_yticks(range(len(arms)), labels)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel("accuracy")


def both_ways(two, results, arms, title, without_teacher=()):
    """The same rows at T .7 and greedily, in two panels with the same limits."""
    for axes, (way, how) in zip(two, WAYS.items()):
        rows(axes, results, arms, way, without_teacher)
        axes.set_title(f"{title}, {how}")
    two[1].sharex(two[0])
    two[0].autoscale(axis="x")
    two[1].tick_params(axis="y", labelleft=False)


def signs(axes):
    """What the signs of `rows` mean, for a legend: lists of handles and labels."""
    (before,) = axes.plot([], [], "o", color=GREY, markerfacecolor="white", markersize=6)
    (after,) = axes.plot([], [], "o", color=GREY, markersize=5)
    (teacher,) = axes.plot([], [], "|", color="black", markersize=11, markeredgewidth=1.6)
    return [before, after, teacher], ["before", "after, a dot a seed", "its teacher"]


def below(figure, handles, labels, columns):
    """A legend under a figure."""
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def aligning(plt, grid, groups, window=7):
    """Panels of Figure 6, and |p - q| of 4.1, with a band for each group.

    groups: {label: (colour, runs, one for each seed)}; window: steps that are averaged.
    """
    wanted = (
        "overlap_ratio",
        "overlap_mass_student",
        "overlap_token_advantage",
        "entropy_gap",
        "loss",
        "grad_norm",
    )
    panels = [panel for panel in PANELS if panel.metric in wanted]
    largest = figures.Panel(
        "|p - q| at the token of largest advantage", "probability", "largest_gap", low=0
    )
    panels.insert(4, largest)
    for axes, panel in zip(grid, panels):
        for label, (colour, runs) in groups.items():
            steps = runs[0]["curves"]["step"]
            ours = [curve(run, panel.metric, window) for run in runs]
            band(axes, steps, ours, colour, "-", label)
            if panel.of_teacher:
                theirs = [curve(run, panel.of_teacher, window) for run in runs]
                band(axes, steps, theirs, colour, "--")
        axes.set_title(panel.title, fontsize=9)
        axes.set(xlabel="step", ylabel=panel.unit)
        axes.locator_params(axis="x", integer=True)
        limit(plt, axes, panel)


# --- the toy --------------------------------------------------------------------------------------


def phenomenology(results, path):
    """Paper 3: how far every pair came; whether it is sharper or knows more; overlap."""
    plt = pyplot(anew("phenomenology"))
    if plt is None:
        return
    figure, grid = plt.subplots(2, 3, figsize=(12, 6.6), layout="constrained", height_ratios=(7, 5))
    forward = {name: (COLOURS[name], NAMES[name]) for name in FORWARD}
    back = {name: (COLOURS[name], NAMES[name]) for name in REVERSED}
    both_ways(grid[0, :2], results, forward, "3.1, 3.2: student ← teacher", WITHOUT_TEACHER)
    both_ways(grid[1, :2], results, back, "3.3: student after RL ← teacher")
    sharper_or_wiser(grid[0, 2], results)
    overlap = grid[1, 2]
    for name in FORWARD:
        runs = results[name]
        ratios = [curve(run, "overlap_ratio", 7) for run in runs]
        band(overlap, runs[0]["curves"]["step"], ratios, COLOURS[name], "-", NAMES[name])
    overlap.set(xlabel="step", ylim=(0, 1), title="overlap ratio, k = 16 (Eq. 6)")
    handles, labels = signs(grid[1, 0])
    more_handles, more_labels = overlap.get_legend_handles_labels()
    below(figure, handles + more_handles, labels + more_labels, 4)
    keep(plt, figure, path)


def sharper_or_wiser(axes, results):
    """Gain greedily against gain at T 1, a point an arm and seed.

    Without other: it ruins the student, far off to the lower left.
    """
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.axvline(0, color="0.6", linewidth=0.8)
    for name in FORWARD:
        if name != "other":
            runs = results[name]
            axes.plot(gains(runs, "T 1"), gains(runs, "greedy"), "o", color=COLOURS[name])
    axes.margins(0.12)
    axes.set(xlabel="gain at T 1: sharper, or knows more", ylabel="gain greedily: knows more")
    axes.set_title("3.2: sharper, or knows more? (without other)")


def mechanism(results, path):
    """Paper 4: metrics against the step for success and failure; accuracy by support."""
    plt = pyplot(anew("mechanism"))
    if plt is None:
        return
    figure, grid = plt.subplots(3, 3, figsize=(11, 8), layout="constrained")
    groups = {}
    for name, label in (("success", "success"), ("bigger", "failure")):
        groups[f"{label} ({NAMES[name]})"] = (COLOURS[name], results[name])
    aligning(plt, [*grid.flat[:6], grid[2, 2]], groups)
    supports = {
        "success": (COLOURS["success"], "student's 16"),
        "intersection": (COLOURS["success"], "those of them shared"),
        "difference": (COLOURS["reverse"], "those not shared"),
        "student, raw": (COLOURS["success"], "student's 16, raw"),
        "intersection, raw": (COLOURS["success"], "shared, raw"),
        "difference, raw": (COLOURS["reverse"], "not shared, raw"),
    }
    both_ways(grid[2, :2], results, supports, "4.2 by support (raw: authors' loss)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    more_handles, more_labels = signs(grid[2, 0])
    below(figure, handles + more_handles, labels + more_labels, 5)
    keep(plt, figure, path)


def recipe(results, path):
    """Paper 5: the arms of 5.1 and their overlap; accuracy and entropy of 5.2."""
    plt = pyplot(anew("recipe"))
    if plt is None:
        return
    figure, grid = plt.subplots(2, 3, figsize=(12, 6.8), layout="constrained")
    arms = {
        "opd": (COLOURS["other"], "300 OPD"),
        "sft": (COLOURS["reverse"], "100 SFT (T .7)"),
        "sft, opd": (COLOURS["cold start"], "100 SFT (T .7), 200 OPD"),
        "sft only": (COLOURS["reverse"], "300 SFT (T .7)"),
        "sft T 1": (COLOURS["reverse"], "100 SFT (T 1)"),
        "sft T 1, opd": (COLOURS["cold start"], "100 SFT (T 1), 200 OPD"),
        "sft T 1 only": (COLOURS["reverse"], "300 SFT (T 1)"),
    }
    both_ways(grid[0, :2], results, arms, "5.1: updates, student ← other")
    overlaps(grid[0, 2], results)
    exams = {"accuracy": "the teacher's", "accuracy, other template": "the other"}
    for axes, (exam, template) in zip(grid[1], exams.items()):
        for way in WAYS:
            values = {name: levels(results[name], "after", way, exam) for name in PROMPTS}
            by_share(axes, values, STYLES[way], MARKERS[way])
            before = mean(levels(results["aligned"], "before", way, exam))
            axes.axhline(before, color=GREY, linewidth=0.9, linestyle=STYLES[way])
        axes.set(ylabel="accuracy after", title=f"5.2: measured under {template} template")
    grid[1, 1].sharey(grid[1, 0])
    grid[1, 0].autoscale(axis="y")
    values = {}
    for name in PROMPTS:
        values[name] = [run["held_out_after"]["entropy_student"] for run in results[name]]
    by_share(grid[1, 2], values, "-")
    grid[1, 2].set(ylabel="nats", title="5.2: entropy of the student after")
    handles, labels = signs(grid[0, 0])
    for way, label in (("T .7", "5.2: T .7"), ("greedy", "greedily")):
        style = STYLES[way] + MARKERS[way]
        handles += grid[1, 0].plot([], [], style, color=COLOURS["success"], markersize=4)
        labels.append(label)
    handles += grid[1, 0].plot([], [], "-", color=GREY, linewidth=0.9)
    handles += grid[1, 0].plot([], [], "o", color=GREY, markersize=4)
    labels += ["before", "trained under the other template"]
    below(figure, handles, labels, 7)
    keep(plt, figure, path)


def overlaps(axes, results):
    """The overlap ratio against the update; the cold start is dotted."""
    for name, label, style in (
        ("opd", "OPD alone", "-"),
        ("sft, opd", "after SFT on answers of T .7", "-"),
        ("sft T 1, opd", "after SFT on answers of T 1", "--"),
    ):
        colour = COLOURS["other" if name == "opd" else "cold start"]
        against_update(axes, results[name], "overlap_ratio", colour, label, style)
    axes.set(xlabel="update", ylim=(0, 1), title="5.1: overlap ratio (dotted: SFT)")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def against_update(axes, runs, name, colour, label, style="-"):
    """A metric against the update. A cold start comes first, dotted, as a straight line."""
    asked = runs[0]["asked"]
    updates = asked.get("cold_start_steps", 0)
    if updates:
        begun = [run["held_out_before"][name] for run in runs]
        started = [run["held_out_cold_start"][name] for run in runs]
        band(axes, (0, updates), list(zip(begun, started)), colour, ":")
    steps = [updates + step for step in runs[0]["curves"]["step"]]
    band(axes, steps, [curve(run, name, 7) for run in runs], colour, style, label)


SHARES = {"share 0": 0, "share .25": 0.25, "share .5": 0.5, "share .75": 0.75, "aligned": 1}
PROMPTS = (*SHARES, "other template")


def by_share(axes, values, style, marker="o"):
    """Values against the share of aligned content, a mark a seed; grey for the other template.

    values: {arm of PROMPTS: one a seed}.
    """
    colour = COLOURS["success"]
    at = list(SHARES.values())
    axes.plot(at, [mean(values[name]) for name in SHARES], style, color=colour, linewidth=1.8)
    for name, share in SHARES.items():
        axes.plot([share] * len(values[name]), values[name], marker, color=colour, markersize=4)
    others = values["other template"]
    axes.plot([1.1] * len(others), others, marker, color=GREY, markersize=4)
    axes.set_xlabel("share of aligned content")
    axes.set_xticks(at)


def cost(results, path):
    """Paper 6: budget, depth, coherence; supports and AUROC; rewards of right and wrong answers."""
    plt = pyplot(anew("cost"))
    if plt is None:
        return
    figure, grid = plt.subplots(3, 3, figsize=(12, 9), layout="constrained")
    budgets(grid[0, 0], results)
    depths(grid[0, 1], results["depths"])
    coherence(grid[0, 2], results["signal"])
    supports = {
        "success": (COLOURS["success"], "top-16"),
        "sampled": (COLOURS["success"], "sampled token"),
        "top-4": (COLOURS["success"], "top-4"),
        "top-32": (COLOURS["success"], "top-32"),
        "full": (COLOURS["success"], "all tokens"),
        "student, raw": (COLOURS["success"], "top-16, raw"),
        "top-1 raw": (COLOURS["success"], "top-1, raw"),
        "long": (COLOURS["success"], "top-16, 400 steps"),
        "long sampled": (COLOURS["success"], "sampled, 400 steps"),
        "long full": (COLOURS["success"], "all tokens, 400 steps"),
    }
    both_ways(grid[1, :2], results, supports, "6.3, 2.2: support of the loss")
    areas(grid[1, 2], results["signal"])
    for axes, name in zip(grid[2], SIGNALS):
        found = [run["found"][name]["before"] for run in results["signal"]]
        rewards(axes, found, COLOURS[name])
        axes.set_title(f"6.2: reward by a teacher that {SIGNALS[name]}")
    handles, labels = signs(grid[1, 0])
    below(figure, handles, labels, 3)
    keep(plt, figure, path)


SIGNALS = {"success": "knows more", "bigger": "knows no more", "other": "thinks otherwise"}
TICKS = [label.replace(" ", "\n", 1) for label in SIGNALS.values()]


def budgets(axes, results):
    """Accuracy against the tokens that a response may have."""
    arms = {}
    for name, runs in results.items():
        if name.endswith(" tokens"):
            arms[int(name.removesuffix(" tokens"))] = runs
    arms[96] = results["success"]
    at = sorted(arms)
    for way, style in STYLES.items():
        by_budget = [levels(arms[tokens], "after", way) for tokens in at]
        band(axes, at, list(zip(*by_budget)), COLOURS["success"], style + MARKERS[way], WAYS[way])
        before = mean(levels(results["success"], "before", way))
        axes.axhline(before, color=GREY, linewidth=0.9, linestyle=style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, at)
    axes.minorticks_off()
    axes.set(xlabel="tokens a response may have", ylabel="accuracy after", ylim=(0, 1.03))
    axes.set_title("6.1: response budget (grey: before)")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def depths(axes, runs):
    """The teacher's gain over the student if both finish its responses; the same for even slips."""
    by_depth = list(zip(*(run["found"] for run in runs)))
    at = [mean(x["tokens"] for x in of_depth) for of_depth in by_depth]
    found = [[x["mean"] for x in run["found"]] for run in runs]
    even = [mean(x["even"] for x in of_depth) for of_depth in by_depth]
    band(axes, at, found, COLOURS["success"], "-o", "measured")
    axes.plot(at, even, ":", color=GREY, label="if slips fall evenly")
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel="tokens that the student wrote", ylabel="teacher - student, accuracy")
    axes.set_title("6.1: who finishes it, at T .7")
    axes.legend(frameon=False, fontsize=8)


def coherence(axes, runs):
    """How far the gradients of positions point one way, before and after training."""
    for place, name in enumerate(SIGNALS):
        for when, marker in (("before", "o"), ("after", "D")):
            values = [run["found"][name][when]["coherence"] for run in runs]
            null = mean(run["found"][name][when]["null"] for run in runs)
            shift = -0.15 if when == "before" else 0.15
            face = COLOURS[name] if when == "before" else "white"
            axes.plot(
                [place + shift] * len(values),
                values,
                marker,
                color=COLOURS[name],
                markerfacecolor=face,
                markersize=5,
            )
            axes.plot((place + shift - 0.1, place + shift + 0.1), (null, null), color=GREY)
    axes.plot([], [], "o", color=GREY, label="before training")
    axes.plot([], [], "D", color=GREY, markerfacecolor="white", label="after")
    axes.plot([], [], color=GREY, label="random signs")
    axes.set_xticks(range(len(SIGNALS)), TICKS)
    axes.margins(y=0.3)
    axes.set(xlim=(-0.5, len(SIGNALS) - 0.5), ylim=(0, None))
    axes.set(ylabel="length of the sum / sum of lengths")
    axes.set_title("6.2: do gradients point one way?")
    axes.legend(frameon=False, fontsize=8)


def areas(axes, runs):
    """AUROC of a response's mean reward for its being right, with two standard errors."""
    for place, name in enumerate(SIGNALS):
        for i, run in enumerate(runs):
            area = run["found"][name]["before"]["auroc"]
            if area["mean"] is not None:
                x = place + 0.15 * (i - (len(runs) - 1) / 2)
                error = 2 * (area["standard_error"] or 0)
                axes.errorbar(x, area["mean"], error, fmt="o", color=COLOURS[name], elinewidth=1)
    axes.axhline(0.5, color="0.6", linewidth=0.8)
    axes.set_xticks(range(len(SIGNALS)), TICKS)
    axes.set(xlim=(-0.5, len(SIGNALS) - 0.5), ylabel="AUROC, before training (± 2 s.e.)")
    axes.set_title("6.2: right or wrong, by mean reward")


def rewards(axes, found, colour_of_right):
    """Figure 14: the mean rewards of right and of wrong answers as densities, a line a seed.

    found: results of cost.signal_of, one for each seed.
    """
    for label, colour in (("right", colour_of_right), ("wrong", "black")):
        for i, x in enumerate(found):
            histogram = x["histogram"]
            counts = histogram[label]
            width = (histogram["to"] - histogram["from"]) / len(counts)
            edges = [histogram["from"] + j * width for j in range(len(counts) + 1)]
            area = width * (sum(counts) or 1)
            heights = [count / area for count in counts]
            axes.stairs(heights, edges, color=colour, linewidth=1.3, label=None if i else label)
    axes.set(xlabel="mean reward of a response, nats", ylabel="density, each of area 1")
    axes.locator_params(axis="x", nbins=5)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def followups(results, path):
    """What later papers say: fewer prompts and tokens, unlike ends; direction and writer."""
    plt = pyplot(anew("followups"))
    if plt is None:
        return
    figure, grid = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    colour = COLOURS["success"]
    arms = {
        "success": (colour, "4,096 prompts, 96 tokens"),
        "16 prompts": (colour, "16 prompts"),
        "1 prompt": (colour, "1 prompt"),
        "10 tokens": (colour, "10 tokens a response"),
        "unlike ends": (colour, "unlike ends, one event"),
        "own ends": (colour, "unlike ends, each for itself"),
    }
    both_ways(grid[0], results, arms, "student ← teacher, one setting changed")
    for axes, (way, how) in zip(grid[1], WAYS.items()):
        two_by_two(axes, results, way)
        axes.set_title(f"direction of the KL and who writes, {how} (dashed: before)")
    handles, labels = signs(grid[0, 0])
    more_handles, more_labels = grid[1, 0].get_legend_handles_labels()
    below(figure, handles + more_handles, labels + more_labels, 6)
    keep(plt, figure, path)


def two_by_two(axes, results, way):
    """2609.35259: a bar for each direction and writer, a dot a seed; dashed: before."""
    for shift, direction, colour in (
        (-0.2, "reverse", COLOURS["success"]),
        (0.2, "forward", COLOURS["reverse"]),
    ):
        for place, writer in enumerate(("student", "teacher")):
            values = levels(results[f"{direction} by {writer}"], "after", way)
            label = None if place else f"{direction} KL"
            axes.bar(place + shift, mean(values), 0.36, color=colour, alpha=0.4, label=label)
            for i, value in enumerate(values):
                x = place + shift + 0.08 * (i - (len(values) - 1) / 2)
                axes.plot(x, value, "o", color=colour, markersize=5, clip_on=False)
    before = mean(levels(results["reverse by student"], "before", way))
    axes.axhline(before, color=GREY, linewidth=1, linestyle="--")
    axes.set_xticks((0, 1), ("the student writes", "the teacher writes"))
    axes.set(ylabel="accuracy after", ylim=(0, 1))


def forecast(results, path):
    """The gain that came against the predicted one, a point a run, coloured by its verdict."""
    plt = pyplot(anew("forecast"))
    if plt is None:
        return
    figure, grid = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharey=True)
    reports = []
    runs = []
    for name, diagnosed in results.items():
        if name.startswith("diagnosis of "):
            reports += [x["report"] for x in diagnosed]
            runs += results[name.removeprefix("diagnosis of ")]
    for axes, (way, title) in zip(grid, WAYS.items()):
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.axvline(0, color="0.6", linewidth=0.8)
        axes.axline((0, 0), slope=1, color="0.65", linewidth=0.8, linestyle="--")
        for verdict, (colour, marker) in VERDICTS.items():
            mine = [i for i, x in enumerate(reports) if verdict_of(x)[0].startswith(verdict)]
            if not mine:
                continue
            predicted = [reports[i]["predicted_gain"] for i in mine]
            axes.errorbar(
                [x["mean"] for x in predicted],
                gains([runs[i] for i in mine], way),
                xerr=[2 * (x["standard_error"] or 0) for x in predicted],
                color=colour,
                fmt=marker,
                markersize=6,
                elinewidth=0.6,
                label=f"{verdict}, {len(mine)} runs",
            )
        axes.set_xlabel("predicted gain: teacher - student, finishing its responses (± 2 s.e.)")
        axes.set_title(f"the gain that came, {title}")
    grid[0].set_ylabel("accuracy after - before")
    handles, labels = grid[0].get_legend_handles_labels()
    below(figure, handles, labels, 5)
    keep(plt, figure, path)


def overview(results, path):
    """The paper at a glance: a pair that works, one that fails, and that one recovered."""
    plt = pyplot("python experiments/report.py")
    if plt is None:
        return
    figure, (accuracy, overlap) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for name, colour, label in (
        ("success", COLOURS["success"], "works: a teacher that thinks alike\nand knows more"),
        (
            "sft, opd",
            COLOURS["cold start"],
            "recovers: the failing pair,\nafter 100 updates of SFT",
        ),
        ("opd", COLOURS["other"], "fails: as good a teacher\nthat thinks otherwise"),
    ):
        runs = results[name]
        against_update(overlap, runs, "overlap_ratio", colour, label)
        started = results["sft"] if name == "sft, opd" else None
        last = accuracy_against_update(accuracy, runs, colour, started)
        teacher = mean(levels(runs, "teacher", "T .7"))
        accuracy.plot(last + 5, teacher, "<", color=colour, clip_on=False)
    accuracy.set_title("accuracy of the student at T .7 (◂ its teacher)")
    overlap.set_title("overlap of the 16 likeliest tokens (Eq. 6)")
    for axes in (accuracy, overlap):
        axes.set(xlabel="update (dotted: of SFT)", xlim=(0, 308), ylim=(0, 1.03))
    handles, labels = overlap.get_legend_handles_labels()
    below(figure, handles, labels, 3)
    keep(plt, figure, path)


def accuracy_against_update(axes, runs, colour, started=None):
    """Accuracy at T .7 before, where it was followed, and after: -> the last update.

    started: runs that end where a cold start does, of the same seeds.
    """
    begun = levels(runs, "before", "T .7")
    updates = 0
    if started:
        updates = started[0]["asked"]["cold_start_steps"]
        after_start = levels(started, "after", "T .7")
        band(axes, (0, updates), list(zip(begun, after_start)), colour, ":")
        begun = after_start
    ends = levels(runs, "after", "T .7")
    last = runs[0]["asked"]["steps"]
    followed = [step for step in runs[0]["curves"]["evaluated"] if step < last]
    at = [0, *followed, last]
    curves = []
    for first, run, end in zip(begun, runs, ends):
        curves.append([first, *run["curves"]["accuracy"][: len(followed)], end])
    band(axes, [updates + step for step in at], curves, colour)
    return updates + last


# --- SmolLM2 --------------------------------------------------------------------------------------


def context(results, path):
    """Accuracy before and after, reverse KL and overlap mass, by what the teacher reads."""
    plt = pyplot("python experiments/context.py --report")
    if plt is None:
        return
    arms = {
        "hint": (COLOURS["success"], "itself, reading\nthe worked answer"),
        "other sum": (COLOURS["sharp"], "itself, reading that\nof another sum"),
        "expert": (COLOURS["early"], "expert: itself\nafter RL"),
    }
    arms = {arm: look for arm, look in arms.items() if arm in results}
    figure, panels = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    for axes, (way, how) in zip(panels, {"greedy": "greedily", "T .7": "at T .7"}.items()):
        rows(axes, results, arms, way)
        axes.set_title(f"the student without a hint, {how}")
        axes.set_xlim(0, 1.03)
    panels[1].tick_params(axis="y", labelleft=False)
    for axes, name, title in (
        (panels[2], "reverse_kl", "reverse KL, nats"),
        (panels[3], "overlap_mass_student", "overlap mass of the student (Eq. 9)"),
    ):
        for arm, (colour, _) in arms.items():
            runs = results[arm]
            band(axes, runs[0]["curves"]["step"], [curve(run, name) for run in runs], colour)
        axes.set_title(title)
        axes.set_xlabel("step")
    panels[2].set_ylim(bottom=0)
    handles, labels = signs(panels[0])
    below(figure, handles, labels, 3)
    keep(plt, figure, path)


def real(results, path):
    """Every arm before and after; Figure 6 of three arms; long runs with words; Figure 14.

    An arm without results is left out.
    """
    plt = pyplot("python experiments/report.py")
    if plt is None:
        return
    judged = [name for name in REWARDED if results[f"signal of {name}"]]
    figure = plt.figure(figsize=(13, 12.5 if judged else 10), layout="constrained")
    top, bottom, last = figure.subfigures(3, 1, height_ratios=(1.2, 1, 0.5 if judged else 0.01))
    two = top.subplots(1, 2, sharey=True)
    there = {name: look for name, look in REAL.items() if results[name]}
    both_ways(two, results, there, "base", WITHOUT_TEACHER)
    grid = bottom.subplots(2, 4)
    groups = {}
    for name in ("success", "copy", "words"):
        if name in there:
            colour, label = REAL[name]
            groups[label] = (colour, results[name])
    aligning(plt, grid.flat, groups, window=1)
    accuracy = grid[1, 3]
    for name, style in (("words, 72", "-"), ("words, 72 fast", "--")):
        runs = results[name]
        if not runs:
            continue
        band(
            accuracy,
            [0, *runs[0]["curves"]["evaluated"]],
            [[level(run, "before", "T .7"), *run["curves"]["accuracy"]] for run in runs],
            COLOURS["other"],
            style,
            label=name,
        )
    accuracy.set(title="accuracy with words, T .7", xlabel="step", ylim=(0, 1))
    if accuracy.lines:
        accuracy.legend(frameon=False, fontsize=7)
    else:
        accuracy.set_visible(False)
    for place, name in enumerate(judged):
        axes = last.add_subplot(1, len(REWARDED), place + 1)
        rewards(axes, results[f"signal of {name}"], REAL[REWARDED[name]][0])
        axes.set_title(f"reward by {name}")
    handles, labels = signs(two[0])
    more_handles, more_labels = grid[0, 0].get_legend_handles_labels()
    below(figure, [*handles, *more_handles], [*labels, *more_labels], 6)
    keep(plt, figure, path)
