"""plumbing/figures.py: runs looked at afterwards (python analysis.py --run DIR ...).

A table for each run; the paper's Figure 6, with every metric against the step; its Figures 13 and
23, heat maps over step and output position. Pictures need matplotlib, which is optional.
"""

import itertools
import json
import math
import textwrap
from pathlib import Path
from typing import NamedTuple

from plumbing import show
from plumbing.files import read_json
from teacher import UserError

COLOURS = (  # one for each run; by Okabe and Ito, who made them for the colour-blind as well
    "#009e73",
    "#d55e00",
    "#0072b2",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
)
COLUMNS = (*show.COLUMNS, ("accuracy", "acc.", 5, ".3f"))  # of the table of a run


class Panel(NamedTuple):
    """A panel of Figure 6. low, high: limits of its axis; None: the data decide."""

    title: str
    unit: str
    metric: str
    of_teacher: str | None = None  # drawn dashed
    low: float | None = None
    high: float | None = None
    log: bool = False


PANELS = (
    Panel("accuracy", "share of answers", "accuracy", low=0, high=1),
    Panel("overlap ratio (Eq. 6)", "share of the top k", "overlap_ratio", low=0, high=1),
    Panel(
        "overlap mass (Eq. 9; dashed: 10)",
        "probability",
        "overlap_mass_student",
        "overlap_mass_teacher",
        high=1,
    ),
    Panel("overlap-token advantage (Eq. 7)", "nats", "overlap_token_advantage", high=0),
    Panel("entropy gap (Eq. 8)", "nats", "entropy_gap", low=0),
    Panel("entropy", "nats", "entropy_student", "entropy_teacher", low=0),
    Panel("loss", "nats", "loss", log=True),
    Panel("reverse KL (Eq. 4)", "nats", "reverse_kl", log=True),
    Panel("gradient norm", "before clipping at 1", "grad_norm", log=True),
)
MAPS = (  # of Figure 13: metric, title, unit, colours
    ("entropy_student", "student entropy", "nats", "viridis"),
    ("entropy_teacher", "teacher entropy", "nats", "viridis"),
    ("reward", "reward", "nats", "RdBu"),
    ("overlap_ratio", "overlap ratio", "share of the top k", "magma"),
)


def runs(paths, plot=None, positions=None):
    """Print a table for each run, and draw what is asked for.

    paths: folders of runs; plot, positions: files for Figure 6 and for Figure 13, or None.
    UserError if a folder holds no run, or if there is nothing to draw.
    """
    loaded = load(paths)
    begun = [run for run in loaded if run["rows"]]
    tables = [table(run) for run in loaded]
    if positions:
        tables += [position_table(run) for run in begun]
    print("\n\n".join(tables))
    if (plot or positions) and not begun:
        raise UserError("--plot, --positions: nothing to draw, no step was logged yet")
    if plot:
        draw_runs(begun, plot)
    if positions:
        draw_positions(begun, positions)


# --- what a run left behind ----------------------------------------------------------------------


def load(paths):
    """Folders of runs -> [{"path", "name", "rows", "config", "result"}].

    config and result are None if there is no such file. Without a result a run is not finished.
    """
    names = [Path(path).resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    loaded = []
    for path, name in zip(paths, names):
        run = {"path": str(path), "rows": read_rows(path)}
        run["name"] = name.replace("$", r"\$")  # or matplotlib would read a formula
        if name.startswith("_"):
            run["name"] = " " + run["name"]  # or it would be left out of the legend
        for kind in ("config", "result"):
            file = Path(path) / f"{kind}.json"
            run[kind] = read_json(file) if file.is_file() else None
        loaded.append(run)
    return loaded


def read_rows(path):
    """The rows of a run's metrics.jsonl. A last line that is cut off, by a kill, is left out."""
    file = Path(path) / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"--run {path}: no metrics.jsonl there; give the --out of a run")
    lines = file.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            if number < len(lines):
                raise UserError(f"{file}:{number} is not JSON; restore the file") from None
            continue
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{file}:{number} is not a step; restore the file")
        rows.append(row)
    return rows


def curve(rows, metric):
    """The steps at which a metric was measured, and its values: -> two lists."""
    measured = [row for row in rows if row.get(metric) is not None]
    steps = [row["step"] for row in measured]
    values = [row[metric] for row in measured]
    return steps, values


# --- as tables -----------------------------------------------------------------------------------


def spread(rows, most):
    """At most `most` rows, evenly spread, with the first and the last among them."""
    stride = max(1, (len(rows) - 1) / (most - 1))
    places = [round(i * stride) for i in range(min(most, len(rows)))]
    return [rows[i] for i in places]


def table(run):
    """What a run logged at some of its steps, and its outcome: str."""
    rows = run["rows"]
    title = run["path"]
    if run["config"]:
        title += ": {student} <- {teacher}, {objective}, k = {k}".format(**run["config"])
    evaluated = [row for row in rows if row.get("accuracy") is not None]
    shown = {row["step"]: row for row in spread(rows, 10) + spread(evaluated, 10)}
    columns = COLUMNS if evaluated else show.COLUMNS
    lines = [title, show.titles(columns)]
    for step in sorted(shown):
        lines.append(show.line(shown[step], columns))
    return "\n".join(lines + outcome(run))


def outcome(run):
    """The outcome of a run, or how far it has come: list of lines."""
    if run["result"]:
        no_answers = ["accuracy not measured: the held-out prompts have no answers"]
        return show.outcome(run["result"]) or no_answers
    step = run["rows"][-1]["step"] if run["rows"] else 0
    steps = f" of {run['config']['steps']}" if run["config"] else ""
    return [f"not finished: step {step}{steps}"]


def position_table(run):
    """Figure 13 in numbers, at six steps: str.

    A column is a bucket of output positions, and its title is the first of them.
    """
    rows = run["rows"]
    width = rows[0]["by_position"]["width"]
    firsts = [i * width for i in range(buckets(rows))]
    lines = [f"{run['path']}, by output position"]
    lines.append(" step " + " ".join(f"{first:6d}" for first in firsts))
    for metric, title, unit, _ in MAPS:
        lines.append(f"{title}, {unit}")
        for row in spread(rows, 6):
            cells = [show.cell(x, 6, ".2f") for x in row["by_position"][metric]]
            lines.append(f"{row['step']:5d} {' '.join(cells)}")
    return "\n".join(lines)


def buckets(rows):
    """How many buckets of output positions the longest response reached."""
    return max(len(row["by_position"]["tokens"]) for row in rows)


# --- as pictures ---------------------------------------------------------------------------------


def pyplot():
    """matplotlib.pyplot, with the same settings for every figure. Equal data give equal bytes."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["font.size"] = 9
    plt.rcParams["svg.fonttype"] = "none"
    plt.rcParams["svg.hashsalt"] = "opd"
    plt.rcParams["axes.spines.top"] = False
    plt.rcParams["axes.spines.right"] = False
    return plt


def save(plt, figure, out):
    """Write a figure to the file `out`, without the date."""
    figure.savefig(out, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def whole_steps(plt):
    """A locator of a few ticks, at whole numbers, for an axis of steps."""
    return plt.MaxNLocator(5, steps=(1, 2, 5, 10), integer=True)


def smooth(values, window):
    """Running mean over `window` values around each; over fewer near the two ends.

    [4, 1, 1, 7], 3 -> [4, 2, 3, 4]. The first value stays: where a loss starts is a finding (4.1).
    """
    means = []
    for i in range(len(values)):
        half = min(window // 2, i)
        part = values[i - half : i + half + 1]
        means.append(sum(part) / len(part))
    return means


def draw_runs(loaded, out):
    """Draw the paper's Figure 6: every metric against the step, a colour for each run."""
    plt = pyplot()
    figure, grid = plt.subplots(3, 3, figsize=(9.5, 7), layout="constrained", sharex=True)
    longest = max(len(run["rows"]) for run in loaded)
    window = 2 * max(1, longest // 30) + 1
    for run, colour in zip(loaded, itertools.cycle(COLOURS)):
        draw_accuracy(grid[0, 0], run, colour)
        for axes, panel in list(zip(grid.flat, PANELS))[1:]:
            draw_metric(axes, run["rows"], panel.metric, window, colour, "-")
            if panel.of_teacher:
                draw_metric(axes, run["rows"], panel.of_teacher, window, colour, "--")
    for axes, panel in zip(grid.flat, PANELS):
        axes.set_title(panel.title, fontsize=9)
        axes.set_ylabel(panel.unit)
        limit(plt, axes, panel)
    for axes in grid[-1]:
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(whole_steps(plt))
    grid[0, 0].plot([], [], "k--", linewidth=1.2, label="its teacher")
    figure.align_ylabels()
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"thin: single steps; bold: running mean over {window} steps", fontsize=9)
    save(plt, figure, out)


def draw_metric(axes, rows, metric, window, colour, style):
    """Draw a metric of one run: the single steps thin, their running mean bold."""
    steps, values = curve(rows, metric)
    axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.4)
    axes.plot(steps, smooth(values, window), style, color=colour, linewidth=1.7)


def draw_accuracy(axes, run, colour):
    """Draw the accuracy before a run, at each evaluation and after it, and the teacher's dashed."""
    steps, values = curve(run["rows"], "accuracy")
    result = run["result"]
    if result and result["accuracy_after"]:
        steps = [0, *steps, result["steps"]]
        values = [result["accuracy_before"]["mean"], *values, result["accuracy_after"]["mean"]]
        teacher = result["accuracy_teacher"]["mean"]
        axes.plot((0, result["steps"]), (teacher, teacher), "--", color=colour, linewidth=1.2)
    axes.plot(steps, values, "o-", color=colour, linewidth=1.7, markersize=3.5, label=run["name"])


def limit(plt, axes, panel):
    """Set the limits of a panel's axis.

    If panel.log is set, the axis is logarithmic, provided that its values are positive and span
    more than a decade.
    """
    lowest, highest = axes.dataLim.intervaly
    if panel.log and highest > 10 * lowest > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(plt.LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(plt.NullLocator())
    elif panel.log and lowest >= 0:
        axes.set_ylim(0, None)
    else:
        axes.set_ylim(panel.low, panel.high)


def draw_positions(loaded, out):
    """Draw the paper's Figures 13 and 23: a row for each run, a map for each metric.

    The position in the response goes to the right, the step upwards. The colour is the mean over
    the tokens there.
    """
    plt = pyplot()
    height = 1.6 + 1.8 * len(loaded)
    figure, grid = plt.subplots(
        len(loaded),
        len(MAPS),
        figsize=(9.5, height),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey="row",
    )
    for column, (metric, title, unit, colours) in enumerate(MAPS):
        low, high = limits(loaded, metric)
        for axes, run in zip(grid[:, column], loaded):
            image = axes.imshow(
                heat(run["rows"], metric),
                cmap=colours,
                vmin=low,
                vmax=high,
                aspect="auto",
                extent=extent(run["rows"]),
                origin="lower",
                interpolation="none",
            )
            axes.set_facecolor("0.85")
        grid[0, column].set_title(title, fontsize=9)
        grid[-1, column].set_xlabel("output position (tokens)")
        beyond = "neither" if metric == "overlap_ratio" else "both"
        figure.colorbar(image, ax=grid[:, column], location="bottom", label=unit, extend=beyond)
    for axes, run in zip(grid[:, 0], loaded):
        axes.set_ylabel(textwrap.fill(run["name"], 24) + "\nstep")
        axes.yaxis.set_major_locator(whole_steps(plt))
    furthest = max(extent(run["rows"])[1] for run in loaded)
    grid[0, 0].set_xlim(0, furthest)
    figure.suptitle("mean over the tokens of a step; grey: no response came this far", fontsize=9)
    save(plt, figure, out)


def limits(loaded, metric):
    """Where the colours of a map begin and end, the same for all runs: -> low, high.

    99 % of the values lie within, since a single token at a rare position may be far out.
    """
    if metric == "overlap_ratio":
        return 0, 1
    names = ("entropy_student", "entropy_teacher") if "entropy" in metric else (metric,)
    sizes = []
    for run in loaded:
        for row in run["rows"]:
            for name in names:
                sizes += [abs(x) for x in row["by_position"][name] if x is not None]
    sizes.sort()
    high = sizes[int(0.99 * (len(sizes) - 1))] or 1
    low = -high if metric == "reward" else 0
    return low, high


def heat(rows, metric):
    """A metric by step and bucket of output positions: (steps, buckets), NaN without a token."""
    lines = []
    for row in rows:
        values = row["by_position"][metric]
        missing = [None] * (buckets(rows) - len(values))
        lines.append([math.nan if x is None else x for x in values + missing])
    return lines


def extent(rows):
    """The edges of a map: -> left and right position, lower and upper step."""
    tokens = rows[0]["by_position"]["width"] * buckets(rows)
    first = rows[0]["step"]
    last = rows[-1]["step"]
    return 0, tokens, first - 0.5, last + 0.5
