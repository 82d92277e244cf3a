"""experiments/plot.py: runs as tables and pictures.

    diagnosis      the report of analysis.py before training, as a table
    runs           directories of opd.py beside each other (python analysis.py --run): a table each, the paper's
                   Figure 6, heat maps as its Figure 13
    phenomenology  results/phenomenology.json: accuracy and overlap ratio of its pairs
    forecast       results/forecast.json: the gain that was predicted before training against the one that came
    recipe         results/recipe.json: the cold start and its controls, the mixing of aligned prompts
    mechanism      results/mechanism.json: success and failure side by side, supports
    cost           results/cost.json: response budgets, depth, supports, coherence of the gradients
    real           results/real.json: success, failures and recovery on a real language model
    again          results/again.json: one setting changed at a time on the same model
    overview       success, failure and recovery of several results in one picture

Pictures need matplotlib, which is optional: without it the tables are still printed, and a line says what to install.
"""

import itertools
import json
import math
import re
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from analysis import plus_minus  # noqa: E402

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
COLUMNS = (  # of the table of a run: metric, title, format
    ("step", "step", "5d"),
    ("loss", "loss", "7.4f"),
    ("reverse_kl", "rev. KL", "7.4f"),
    ("overlap_ratio", "overlap", "7.3f"),
    ("overlap_mass_student", "mass p", "6.3f"),
    ("overlap_mass_teacher", "mass q", "6.3f"),
    ("overlap_token_advantage", "adv.", "7.4f"),
    ("entropy_gap", "H gap", "6.3f"),
    ("response_length", "length", "6.1f"),
    ("truncated_fraction", "cut", "4.2f"),
    ("grad_norm", "|grad|", "6.3f"),
    ("accuracy", "acc.", "5.3f"),
)  # 82 columns; accuracy where it was measured
PANELS = (  # of Figure 6: title, unit, lower limit (None: the data's) or "log", upper limit, metric, teacher's
    ("accuracy", "share of answers", 0, 1, "accuracy", None),
    ("overlap ratio (Eq. 6)", "share of the top k", 0, 1, "overlap_ratio", None),
    (
        "overlap mass (Eq. 9; dashed: 10)",
        "probability",
        None,
        1,
        "overlap_mass_student",
        "overlap_mass_teacher",
    ),
    ("overlap-token advantage (Eq. 7)", "nats", None, 0, "overlap_token_advantage", None),
    ("entropy gap (Eq. 8)", "nats", 0, None, "entropy_gap", None),
    ("entropy", "nats", 0, None, "entropy_student", "entropy_teacher"),
    ("loss", "nats", "log", None, "loss", None),
    ("reverse KL (Eq. 4)", "nats", "log", None, "reverse_kl", None),
    ("gradient norm", "before clipping at 1", "log", None, "grad_norm", None),
)
MAPS = {
    "entropy_student": "student entropy",
    "entropy_teacher": "teacher entropy",
    "reward": "reward",
    "overlap_ratio": "overlap ratio",
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


# --- what a run left behind ----------------------------------------------------------------------------------------


def load(paths):
    """Directories of runs -> [{"path", "name", "rows", "config", "result"}]; result None: not finished."""
    names = [Path(path).resolve().name for path in paths]
    return [
        {
            "path": str(path),
            "name": name if names.count(name) == 1 else str(path),
            "rows": read_rows(path),
            **{kind: read_json(Path(path) / f"{kind}.json") for kind in ("config", "result")},
        }
        for path, name in zip(paths, names)
    ]


def read_json(path):
    return json.loads(path.read_text()) if path.is_file() else None


def read_rows(path):
    """The rows of metrics.jsonl; a last line that a kill has torn is left out, any other is a ValueError."""
    lines, rows = (Path(path) / "metrics.jsonl").read_text().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{path}/metrics.jsonl: line {number} is not JSON") from None
    return rows


def curve(rows, metric):
    """Where a metric was measured, and what it was: -> (steps, values), None left out."""
    pairs = [
        (row["step"], row[metric])
        for row in rows
        if row.get(metric) is not None and math.isfinite(row[metric])
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


# --- as tables -----------------------------------------------------------------------------------------------------


def some(rows, count):
    """About `count` rows evenly spread, first and last among them; an evaluated one is preferred to its neighbours."""
    stride = max(1, (len(rows) - 1) / (count - 1))
    picked = set()
    for i in range(min(count, len(rows))):
        at = i * stride
        near = [
            j
            for j, row in enumerate(rows)
            if abs(j - at) <= stride / 2 and row.get("accuracy") is not None
        ]
        inside = 0 < round(at) < len(rows) - 1
        picked.add(min(near, key=lambda j: abs(j - at)) if near and inside else round(at))
    return [rows[i] for i in sorted(picked)]


def cell(value, form):
    width = form.split(".")[0].rstrip("d")
    return f"{'':>{width}}" if value is None else f"{value:{form}}"


def table(run):
    """What a run logged, at about ten of its steps, and what came of it: str."""
    rows, config = run["rows"], run["config"] or {}
    lines = [
        run["path"]
        + (": {student} <- {teacher}, {objective}, k = {k}".format(**config) if config else "")
    ]
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    lines.append(
        " ".join(f"{title:>{form.split('.')[0].rstrip('d')}}" for _, title, form in columns)
    )
    lines += [
        " ".join(cell(row.get(name), form) for name, _, form in columns).rstrip()
        for row in some(rows, 10)
    ]
    return "\n".join(lines + [outcome(run)])


def diagnosis(report):
    """The report as a table: str."""
    r, lines = report, []
    lines.append(
        f"{r['prompts']} prompts, {r['responses']} responses of {r['response_length']:.1f} tokens, "
        f"{r['truncated_fraction']:.0%} cut off; nats, +- standard error over prompts"
    )
    titles = {
        "overlap_ratio": f"overlap ratio, k = {r['k']}, Eq. 6",
        "overlap_mass_student": "overlap mass, student, Eq. 9",
        "overlap_mass_teacher": "overlap mass, teacher, Eq. 10",
        "overlap_token_advantage": "overlap-token advantage, Eq. 7",
        "entropy_student": "entropy, student",
        "entropy_teacher": "entropy, teacher",
        "entropy_gap": "entropy gap |H(q) - H(p)|, Eq. 8",
        "largest_gap": "largest gap, 4.1",
        "reverse_kl": "reverse KL",
        "reward": "mean reward",
    }
    for name in [*titles, *(name for name in r["metrics"] if name not in titles)]:
        x = r["metrics"][name]
        lines.append(
            f"{titles.get(name, name):32} "
            + ("none shared" if x["mean"] is None else plus_minus(x, "9.4f"))
        )
    if "continuation" in r:
        score = "not defined" if r["auroc"] is None else f"{r['auroc']:9.4f}"
        lines.append(
            f"{'AUROC of the mean reward, 6.2':32} {score}   {r['right']} right, "
            f"{r['responses'] - r['right']} not"
        )
        lines += ["", "who finishes the student's responses, 6.1:   student   teacher      gain"]
        for c in r["continuation"]:
            place = f"{c['depth']:.0%}" if isinstance(c["depth"], float) else f"{c['depth']} tokens"
            lines.append(
                f"  from {place:>9} ({c['tokens']:7.1f} tokens in) {c['student']['mean']:13.3f} "
                f"{c['teacher']['mean']:9.3f} {plus_minus(c['gain'], '+9.3f')}"
            )
        lines.append(f"  {'mean over these depths':54} {plus_minus(r['predicted_gain'], '+8.3f')}")
    b = r["by_position"]
    lines += ["", "position      tokens    reward   overlap   H student   H teacher"]
    for i, tokens in enumerate(b["tokens"]):
        if tokens:
            lines.append(
                f"{i * b['width']:5d}-{(i + 1) * b['width'] - 1:<5d} {tokens:8d} {b['reward'][i]:9.3f} "
                f"{b['overlap_ratio'][i]:9.3f} {b['entropy_student'][i]:11.3f} "
                f"{b['entropy_teacher'][i]:11.3f}"
            )
    reasons = [
        textwrap.fill(reason, 100, initial_indent="  - ", subsequent_indent="    ")
        for reason in r["reasons"]
    ]
    return "\n".join([*lines, "", f"verdict: {r['verdict']}", *reasons])


def outcome(run):
    """The accuracies and the gap recovery of a finished run, or how far it has come: one line."""
    result = run["result"]
    if result is None:
        of = f" of {run['config']['steps']}" if run["config"] else ""
        return f"not finished: step {run['rows'][-1]['step'] if run['rows'] else 0}{of}"
    if result.get("accuracy_after") is None:
        return "accuracy not measured: the held-out prompts have no answers"
    before, after, teacher = (
        plus_minus(result[f"accuracy_{who}"]) for who in ("before", "after", "teacher")
    )
    recovered = result.get("gap_recovery")
    return f"accuracy {before} -> {after}, teacher {teacher}; gap recovery " + (
        "not given, teacher and student are within noise of each other"
        if recovered is None
        else f"{recovered:.2f}"
    )


def position_table(run):
    """The four metrics by output position, at about six steps: str; a column a bucket, titled by its first position."""
    rows, lines = run["rows"], [f"{run['path']}, by output position"]
    width, buckets = (
        rows[0]["by_position"]["width"],
        max(len(row["by_position"]["tokens"]) for row in rows),
    )
    lines.append(f"{'step':>5} " + " ".join(f"{i * width:6d}" for i in range(buckets)))
    for metric, title in MAPS.items():
        lines.append(f"{title}, {'share of the top k' if metric == 'overlap_ratio' else 'nats'}")
        lines += [
            f"{row['step']:5d} " + " ".join(cell(x, "6.2f") for x in row["by_position"][metric])
            for row in some(rows, 6)
        ]
    return "\n".join(lines)


# --- as pictures ---------------------------------------------------------------------------------------------------


def pyplot(again):
    """matplotlib.pyplot set up for every figure here; without matplotlib None, and a line that says what to do."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"no picture: pip install matplotlib, then {again}", file=sys.stderr)
        return None
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "svg.fonttype": "none",
            "svg.hashsalt": "opd",
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    return plt


def opened(results, script):
    """pyplot, and the runs of a results file; (None, None) without matplotlib, and a line that says what to do."""
    plt = pyplot(f"python experiments/{script}.py --report {results}")
    return (plt, None) if plt is None else (plt, read_json(Path(results))["runs"])


def save(plt, figure, out):
    """The same bytes for the same data; coordinates in an .svg to a hundredth of a point, which takes off a quarter."""
    figure.savefig(out, metadata={"Date": None}, facecolor="white")
    plt.close(figure)
    if str(out).endswith(".svg"):
        text = re.sub(
            r' [dxy]="[^"]+"',
            lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]),
            Path(out).read_text(encoding="utf-8"),
        )
        Path(out).write_text(text, encoding="utf-8")


def ticks(plt, **how):
    return plt.MaxNLocator(5, steps=(1, 2, 5, 10), **how)


def runs(paths, plot=None, positions=None):
    """Tables of runs; plot, positions: .svg files for Figure 6 and for the heat maps of Figure 13.

    Raises ValueError where positions are asked for and a run has none.
    """
    loaded = load(paths)
    if positions:
        for run in loaded:
            if any("by_position" not in row for row in run["rows"]):
                raise ValueError(
                    f"--positions: {run['path']} is older than by_position in metrics.jsonl; run it again"
                )
    begun = [run for run in loaded if run["rows"]]
    print(
        "\n\n".join(
            [table(run) for run in loaded] + [position_table(run) for run in begun if positions]
        )
    )
    asked = [f"--{name} {out}" for name, out in (("plot", plot), ("positions", positions)) if out]
    if asked and not begun:
        raise ValueError(f"{' '.join(asked)}: nothing to draw, no step was logged yet")
    plt = (
        pyplot(" ".join(["python analysis.py", *(f"--run {path}" for path in paths), *asked]))
        if asked
        else None
    )
    if plt and plot:
        draw_runs(plt, begun, plot)
    if plt and positions:
        draw_positions(plt, begun, positions)


def colours(paths):
    """A colour a run: COLOURS where a word of its path is a pair's name (the last such word), else a spare one."""
    spare, taken, out = itertools.cycle(SPARE), set(), []
    for path in paths:
        pair = next(
            (word for word in reversed(re.split(r"[^a-z]+", str(path).lower())) if word in COLOURS),
            None,
        )
        out.append(next(spare) if pair is None or pair in taken else COLOURS[pair])
        taken.add(pair)
    return out


def smooth(values, window):
    """Running mean over `window` values around each; at the start over 1, 3, 5, ..., at the end over what is left."""
    out = []
    for i in range(len(values)):
        half = min(window // 2, i)
        part = values[i - half : i + half + 1]
        out.append(sum(part) / len(part))
    return out


def thin(steps, values, most):
    """About `most` points of a line: both ends, the lowest and the highest of every stretch -> (steps, values)."""
    stretch = max(1, -(-2 * len(steps) // most))
    parts = [range(i, min(i + stretch, len(steps))) for i in range(0, len(steps), stretch)]
    kept = {best(part, key=values.__getitem__) for part in parts for best in (min, max)}
    kept = sorted(kept | {0, len(steps) - 1} if steps else kept)
    return [steps[i] for i in kept], [values[i] for i in kept]


def draw_runs(plt, loaded, out):
    """The paper's Figure 6: every metric against the step, a colour a run."""
    window = max(1, max(len(run["rows"]) for run in loaded) // 30) * 2 + 1
    figure, grid = plt.subplots(3, 3, figsize=(9.5, 7), layout="constrained", sharex=True)
    for run, colour in zip(loaded, colours([run["path"] for run in loaded])):
        draw_accuracy(grid[0, 0], run, colour)
        for axes, (*_, metric, of_teacher) in list(zip(grid.flat, PANELS))[1:]:
            for name, style in ((metric, "-"), (of_teacher, "--")):
                steps, values = curve(run["rows"], name)
                axes.plot(
                    *thin(steps, values, 200 // len(loaded)), color=colour, linewidth=0.6, alpha=0.4
                )
                axes.plot(
                    *thin(steps, smooth(values, window), 200 // len(loaded)),
                    style,
                    color=colour,
                    linewidth=1.7,
                )
        grid[0, 0].plot([], [], color=colour, linewidth=1.7, label=run["name"])
    for axes, (title, unit, low, high, *_) in zip(grid.flat, PANELS):
        axes.set_title(title, fontsize=9)
        axes.set_ylabel(unit)
        limit(plt, axes, low, high)
    for axes in grid[-1]:
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(ticks(plt, integer=True))
    grid[0, 0].plot([], [], "k--", linewidth=1.2, label="its teacher")
    figure.align_ylabels()
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"thin: single steps; bold: running mean over {window} steps", fontsize=9)
    save(plt, figure, out)


def limit(plt, axes, low, high):
    """The limits of a panel; "log": where the values span a decade, else from 0, and free where one is negative."""
    lowest, highest = axes.dataLim.intervaly
    if low == "log" and highest > 10 * lowest > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(plt.LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(plt.NullLocator())
    else:
        axes.set_ylim(low if low != "log" else 0 if lowest >= 0 else None, high)


def draw_accuracy(axes, run, colour):
    """Before at step 0, where evaluated in between, after at the last step; the teacher's level dashed."""
    steps, values = curve(run["rows"], "accuracy")
    result = run["result"]
    if result and result["accuracy_after"]:
        steps = [0, *steps, result["steps"]]
        values = [result["accuracy_before"]["mean"], *values, result["accuracy_after"]["mean"]]
        axes.plot(
            steps[:: len(steps) - 1],
            2 * [result["accuracy_teacher"]["mean"]],
            "--",
            color=colour,
            linewidth=1.2,
        )
    if steps:  # an unclipped line of no points upsets the layout
        axes.plot(
            steps, values, color=colour, linewidth=1.7, marker="o", markersize=3.5, clip_on=False
        )


def draw_positions(plt, loaded, out):
    """The paper's Figures 13 and 23: a row a run, a map a metric; colour over output position (x) and step (y)."""
    figure, grid = plt.subplots(
        len(loaded),
        4,
        figsize=(9.5, 1.2 + 1.8 * len(loaded)),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey="row",
    )
    values = {
        metric: [
            x
            for run in loaded
            for row in run["rows"]
            for x in row["by_position"][metric]
            if x is not None
        ]
        for metric in MAPS
    }
    nats, reward = (
        scale(values["entropy_student"] + values["entropy_teacher"]),
        scale(values["reward"]),
    )
    looks = {
        "entropy_student": ("viridis", 0, nats),
        "entropy_teacher": ("viridis", 0, nats),
        "reward": ("RdBu", -reward, reward),
        "overlap_ratio": ("magma", 0, 1),
    }
    for run, line in zip(loaded, grid):
        for axes, (metric, title) in zip(line, MAPS.items()):
            colours, low, high = looks[metric]
            axes.imshow(**heat(run["rows"], metric, most=100), cmap=colours, vmin=low, vmax=high)
            axes.set_facecolor("0.85")
            axes.set_title(title if run is loaded[0] else "", fontsize=9)
        line[0].yaxis.set_major_locator(ticks(plt, integer=True))
        line[0].set_ylabel(textwrap.fill(run["name"], 24) + "\nstep")
    for axes in grid[-1]:
        axes.set(
            xlabel="output position (tokens)",
            xlim=(0, max(line[0].images[0].get_extent()[1] for line in grid)),
        )
    bars = (
        (slice(0, 2), "nats", "max"),
        (slice(2, 3), "nats", "both"),
        (slice(3, 4), "share of the top k", "neither"),
    )
    for columns, unit, beyond in bars:
        where = grid[:, columns]
        figure.colorbar(
            where[0, 0].images[0],
            ax=where,
            location="bottom",
            label=unit,
            extend=beyond,
            shrink=0.8,
            aspect=30 * where.shape[1],
            ticks=ticks(plt),
        )
    figure.suptitle(
        "means over the tokens of a step, at most 100 steps a run; grey: no response came this far",
        fontsize=9,
    )
    save(plt, figure, out)


def scale(values):
    """Where a colour scale ends: 99 % of the sizes lie below, since one token at a rare position may be far out."""
    return sorted(map(abs, values))[int(0.99 * (len(values) - 1))] or 1.0


def heat(rows, metric, most):
    """Rows of metrics.jsonl, at most `most` of them, evenly spread -> what imshow takes: values (steps, buckets), NaN
    where there is no token, and their edges in tokens and steps.
    """
    buckets, width = (
        max(len(row["by_position"]["tokens"]) for row in rows),
        rows[0]["by_position"]["width"],
    )
    shown = rows[:: -(-len(rows) // most)]
    values = [[math.nan if x is None else x for x in row["by_position"][metric]] for row in shown]
    return {
        "X": [line + [math.nan] * (buckets - len(line)) for line in values],
        "aspect": "auto",
        "origin": "lower",
        "interpolation": "none",
        "extent": (0, width * buckets, rows[0]["step"] - 0.5, rows[-1]["step"] + 0.5),
    }


def forecast(results, out, note=""):
    """Realised against predicted gain in accuracy, a point a run, coloured by the verdict before training."""
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
        xlabel="predicted gain in accuracy: teacher - student, finishing the student's responses (± 1 s.e.)",
        ylabel="realised gain in accuracy: after - before",
    )
    axes.set_title(note, fontsize=9)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save(plt, figure, out)


def label_outliers(axes, known, count=3):
    """Names what lies two standard deviations off the line through all runs: a pair once, no name over another."""
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
    """Paper 5: accuracy of the arms of 5.1; accuracy and entropy against the aligned share of 5.2; mean, every seed."""
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
    """Paper 4: metrics against step for success and failure, accuracy on other supports; mean, range of the seeds."""
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
    """Figure 6 on a real language model: success beside other teachers, mean and range of the seeds; all accuracies."""
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
    """The held-out overlap ratio before and after OPD of the runs followed, {run: (colour, label)}, and all accuracies
    {run: colour}, before, after a cold start, and after OPD.
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
    """Accuracy and length of the responses against step, where both end alike and where they do not."""
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
    """What later papers say: accuracy of each arm, and against the reverse KL along success and failure."""
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
    """Panels of Figure 6, and |p - q| of 4.1, with a band a group: {label: (colour, runs, one a seed)}. window: steps
    that are averaged.
    """
    panels = [
        panel
        for panel in PANELS
        if panel[4]
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
        ("|p - q| at the token of largest advantage", "probability", 0, None, "largest_gap", None),
    )
    for axes, (title, unit, low, high, *names) in zip(grid, panels):
        for label, (colour, mine) in groups.items():
            for name, style in zip(names, ("-", "--")):
                if name:
                    band(
                        axes,
                        mine[0]["curves"]["step"],
                        [smooth(run["curves"][name], window) for run in mine],
                        colour,
                        style,
                        label if style == "-" else None,
                    )
        axes.set_title(title, fontsize=9)
        axes.set(xlabel="step", ylabel=unit)
        axes.locator_params(axis="x", integer=True)
        limit(plt, axes, low, high)


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
    """Paper 6: accuracy by response budget and support, gain by depth, what the mean reward and the gradients say."""
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
    """A line through the mean over seeds, and their range behind it; of a long one every second point, or fewer."""
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
    """Accuracy and overlap ratio against step, the reversed pairs by themselves; mean, range of the seeds."""
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
    """The paper at a glance, from a folder of results: a pair that works, one that fails, and that one recovered.

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
    """Of runs with the same steps -> the steps, where accuracy was measured, and what it was there, a list a run."""
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
