"""plumbing/show.py: what a person reads: the line of a step, the end of a run, a diagnosis."""

import textwrap

from analysis import plus_minus

MISMATCH = {  # nats: rounding stays well below, another softmax does not
    "float32": 0.01,
    "bfloat16": 1.0,
}
COLUMNS = (  # of the line of a step: metric, title, width, format
    ("step", "step", 5, "d"),
    ("loss", "loss", 7, ".4f"),
    ("reverse_kl", "rev. KL", 7, ".4f"),
    ("overlap_ratio", "overlap", 7, ".3f"),
    ("overlap_mass_student", "mass p", 6, ".3f"),
    ("overlap_mass_teacher", "mass q", 6, ".3f"),
    ("overlap_token_advantage", "adv.", 7, ".4f"),
    ("entropy_gap", "H gap", 6, ".3f"),
    ("response_length", "length", 6, ".1f"),
    ("truncated_fraction", "cut", 4, ".2f"),
    ("grad_norm", "|grad|", 6, ".3f"),
)
METRICS = {  # of a diagnosis, in words
    "reverse_kl": "reverse KL",
    "overlap_mass_student": "overlap mass, student, Eq. 9",
    "overlap_mass_teacher": "overlap mass, teacher, Eq. 10",
    "overlap_token_advantage": "overlap-token advantage, Eq. 7",
    "entropy_gap": "entropy gap |H(q) - H(p)|, Eq. 8",
    "largest_gap": "largest gap, 4.1",
    "entropy_student": "entropy, student",
    "entropy_teacher": "entropy, teacher",
    "reward": "mean reward",
}

# --- a step --------------------------------------------------------------------------------------


def cell(value, width, form):
    """A number of a table, or "-" if it was not measured: str, `width` wide."""
    text = "-" if value is None else format(value, form)
    return text.rjust(width)


def titles(columns=COLUMNS):
    """The titles of a table, each above its column: str."""
    return " ".join(title.rjust(width) for _, title, width, _ in columns)


def columns():
    """What stands above the lines of a run: what a line is, and the titles."""
    what = "each line is one step, a mean over its response tokens; columns: plumbing/README.md"
    return f"{what}\n{titles()}"


def line(row, columns=COLUMNS):
    """A row of metrics.jsonl as one readable line."""
    return " ".join(cell(row.get(name), width, form) for name, _, width, form in columns)


def mismatch(row, dtype):
    """A sentence if log-probabilities as sampled and as scored differ beyond rounding, else None.

    row: with "sampling_mismatch", nats; dtype: of the computation, "float32" or "bfloat16".
    """
    off = row["sampling_mismatch"]
    if off is None or off <= MISMATCH[dtype]:
        return None
    return (
        f"log-probabilities as sampled and as scored differ by up to {off:.2g} nats: "
        "this is not on-policy"
    )


# --- the end of a run ----------------------------------------------------------------------------


def summary(result):
    """What a person wants to know when a run ends, before -> after, +- one standard error: str.

    result: the content of result.json.
    """
    before = result["held_out_before"]
    after = result["held_out_after"]
    lines = outcome(result)
    lines.append(
        f"held out       reverse KL {change(before, after, 'reverse_kl', '.4f')}, "
        f"overlap ratio {change(before, after, 'overlap_ratio', '.3f')}"
    )
    lines.append(
        f"overlap mass   student {change(before, after, 'overlap_mass_student', '.3f')}, "
        f"teacher {change(before, after, 'overlap_mass_teacher', '.3f')}"
    )
    if result["skipped_steps"]:
        skipped = result["skipped_steps"]
        lines.append(f"skipped        {skipped} steps, whose loss or gradient was not finite")
    return "\n".join(lines)


def change(before, after, metric, form):
    return f"{before[metric]:{form}} -> {after[metric]:{form}}"


def outcome(result):
    """The accuracies of a finished run and its gap recovery: three lines, none without answers."""
    if result["accuracy_after"] is None:
        return []
    sampled = f"T {result['eval_temperature']:g}, top-p {result['eval_top_p']:g}"
    asked = how_many(result["accuracy_after"])
    return [
        f"accuracy       {course(result, 'accuracy')}; {sampled}, {asked}",
        f"greedy         {course(result, 'greedy')}",
        f"gap recovery   {recovery(result)}",
    ]


def course(result, kind):
    """The student before -> (after a cold start) -> after, and the teacher: str.

    kind: "accuracy" or "greedy".
    """
    stages = [plus_minus(result[f"{kind}_before"])]
    if result.get(f"{kind}_cold_start"):
        stages.append(f"{plus_minus(result[f'{kind}_cold_start'])} (cold start)")
    stages.append(plus_minus(result[f"{kind}_after"]))
    teacher = plus_minus(result[f"{kind}_teacher"])
    return f"{' -> '.join(stages)}, teacher {teacher}"


def how_many(accuracy):
    """Of what an accuracy is the mean: "64 prompts, 4 answers to each"."""
    prompts = len(accuracy["each"])
    answers = accuracy["samples"] // prompts
    return f"{counted(prompts, 'prompt')}, {counted(answers, 'answer')} to each"


def counted(number, noun):
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def recovery(result):
    """What became of the gap between student and teacher, in words."""
    before = result["accuracy_before"]["mean"]
    after = result["accuracy_after"]["mean"]
    teacher = result["accuracy_teacher"]["mean"]
    side = "above" if after >= before else "below"
    end = f"the student ended {abs(after - before):.3f} {side} its start"
    if result["gap_recovery"] is None:
        return "not given: teacher and student are within noise of each other"
    if teacher < before:
        return f"not given: the teacher is behind the student; {end}"
    if after < before:
        return f"none: {end}"
    return f"{result['gap_recovery']:.2f} of the way from student to teacher"


# --- before training -----------------------------------------------------------------------------


def diagnosis(report):
    """The report of analysis.diagnose_pair as a table: str."""
    lines = metric_lines(report)
    if "continuation" in report:
        lines += continuation_lines(report)
    lines += position_lines(report["by_position"])
    lines += ["", f"verdict: {report['verdict']}"]
    for reason in report["reasons"]:
        lines.append(textwrap.fill(reason, 100, initial_indent="  - ", subsequent_indent="    "))
    return "\n".join(lines)


def metric_lines(report):
    """A line for each metric of the diagnosis."""
    names = {**METRICS, "overlap_ratio": f"overlap ratio, k = {report['k']}, Eq. 6"}
    lines = [
        f"{report['prompts']} prompts, {report['responses']} responses of "
        f"{report['response_length']:.1f} tokens, {report['truncated_fraction']:.0%} cut off; "
        "nats, +- standard error over prompts"
    ]
    for metric, found in report["metrics"].items():
        shown = "none shared" if found["mean"] is None else plus_minus(found, "9.4f")
        lines.append(f"{names.get(metric, metric):32} {shown}")
    return lines


def continuation_lines(report):
    """Who finishes the student's responses better: a line for each depth."""
    auroc = "not defined"
    if report["auroc"] is not None:
        auroc = f"{report['auroc']:9.4f}"
    right = report["right"]
    wrong = report["wrong"]
    lines = [
        f"{'AUROC of the mean reward, 6.2':32} {auroc}   {right} right, {wrong} not",
        "",
        "who finishes the student's responses, 6.1:   student   teacher      gain",
    ]
    for cut in report["continuation"]:
        depth = cut["depth"]
        place = f"{depth:.0%}" if isinstance(depth, float) else f"{depth} tokens"
        student = cut["student"]["mean"]
        teacher = cut["teacher"]["mean"]
        gain = plus_minus(cut["gain"], "+9.3f")
        start = f"  from {place:>9} ({cut['tokens']:7.1f} tokens in)"
        lines.append(f"{start} {student:13.3f} {teacher:9.3f} {gain}")
    gain = plus_minus(report["predicted_gain"], "+8.3f")
    lines.append(f"  {'mean over these depths':54} {gain}")
    return lines


def position_lines(by_position):
    """A line for each bucket of output positions that holds a token."""
    widths = {"reward": 9, "overlap_ratio": 9, "entropy_student": 11, "entropy_teacher": 11}
    lines = ["", "position      tokens    reward   overlap   H student   H teacher"]
    for i, tokens in enumerate(by_position["tokens"]):
        if tokens == 0:
            continue
        first = i * by_position["width"]
        last = first + by_position["width"] - 1
        values = [cell(by_position[name][i], width, ".3f") for name, width in widths.items()]
        cells = " ".join(values)
        place = f"{first:5d}-{last:<5d}"
        lines.append(f"{place} {tokens:8d} {cells}")
    return lines
