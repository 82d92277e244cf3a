"""experiments/plot.py: runs as pictures. python experiments/plot.py results/phenomenology.json out.svg

Needs matplotlib, which is optional: without it, says so and draws nothing.
"""
import json
import sys

# the same in every figure
COLOURS = {"success": "#1a7f5a", "bigger": "#c8553d", "other": "#7d5ba6", "reverse": "#8a8a8a"}
NAMES = {"success": "post-trained teacher, same family", "bigger": "bigger teacher, same pipeline",
         "other": "post-trained teacher, other family", "reverse": "post-trained student, its earlier self as teacher"}


def draw(results, out):
    """Accuracy and overlap ratio against step, a line a pair, mean over seeds with the range of the seeds behind it."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"no picture: pip install matplotlib, then python experiments/plot.py {results} {out}", file=sys.stderr)
        return
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    with open(results) as file:
        runs = json.load(file)["runs"]
    plt.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "opd",
                         "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for pair, colour in COLOURS.items():
        mine = [run for run in runs if run["pair"] == pair]
        if not mine:
            continue
        steps = mine[0]["curves"]["step"]
        evaluated = [0] + [s for s, x in zip(steps, mine[0]["curves"]["accuracy"]) if x is not None] + [steps[-1]]
        accuracy = [[run["accuracy_before"]["mean"], *(x for x in run["curves"]["accuracy"] if x is not None),
                     run["accuracy_after"]["mean"]] for run in mine]
        teacher = sum(run["accuracy_teacher"]["mean"] for run in mine) / len(mine)
        left.plot(evaluated[-1] * 1.04, teacher, marker="<", color=colour, clip_on=False)
        for axes, x, curves in ((left, evaluated, accuracy),
                                (right, steps, [run["curves"]["overlap_ratio"] for run in mine])):
            middle = [sum(values) / len(values) for values in zip(*curves)]
            axes.plot(x, middle, color=colour, label=NAMES[pair], linewidth=1.8)
            axes.fill_between(x, [min(values) for values in zip(*curves)], [max(values) for values in zip(*curves)],
                              color=colour, alpha=0.15, linewidth=0)
    left.set(xlabel="step", ylabel="accuracy of the student (◂ its teacher)", ylim=(0, 1))
    right.set(xlabel="step", ylabel="overlap ratio, k = 16 (Eq. 6)", ylim=(0, 1))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(out, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/plot.py RESULTS.json OUT.svg")
    draw(*sys.argv[1:])
