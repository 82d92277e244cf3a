"""plumbing/show.py: what a person reads: the line of a step, the end of a run, a diagnosis."""

import contextlib
import textwrap

from tqdm import tqdm

from analysis import (
    ALIKE,
    FIRST_TOKENS,
    K_OF_ALIKE,
    LEAD,
    LEAST_TOKENS,
    plus_minus,
    sure,
    surely_above,
    surely_below,
)

MISMATCH = {  # nats: rounding stays well below, another softmax does not
    "float32": 0.01,
    "bfloat16": 1.0,
}
COLUMNS = (  # of the line of a step: metric, title, width, format
    ("step", "step", 5, "d"),
    ("loss", "loss", 7, ".4f"),
    ("reverse_kl", "rev.KL", 7, ".4f"),
    ("overlap_ratio", "overlap", 7, ".3f"),
    ("overlap_mass_student", "mass_p", 6, ".3f"),
    ("overlap_mass_teacher", "mass_q", 6, ".3f"),
    ("overlap_token_advantage", "adv.", 7, ".4f"),
    ("entropy_gap", "H_gap", 6, ".3f"),
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
    "distance_left": "distance left, mean |reward|",
    "end_mass_student": "probability of an end, student",
    "end_mass_teacher": "probability of an end, teacher",
}


def say(text):
    """Print a line beside the progress bars. If nobody can read it any more, a run goes on."""
    with contextlib.suppress(OSError):
        tqdm.write(text)


# --- a step --------------------------------------------------------------------------------------


def cell(value, width, form):
    """A number in a table, or "-" if it was not measured: str, `width` wide."""
    text = "-" if value is None else format(value, form)
    return text.rjust(width)


def titles(columns=COLUMNS):
    """The titles of a table, each above its column: str."""
    return " ".join(title.rjust(width) for _, title, width, _ in columns)


def columns():
    """What stands above the lines of a run: what a line is, and the titles: str."""
    return (
        "each line is one step, a mean over its response tokens; p: student, q: teacher\n"
        f"(plumbing/README.md has every column)\n{titles()}"
    )


def line(row, columns=COLUMNS):
    """A row of metrics.jsonl as one readable line: str."""
    return " ".join(cell(row.get(name), width, form) for name, _, width, form in columns)


MEASURED = {  # what a run measures -> in words
    "teacher": "teacher",
    "before": "student before",
    "cold_start": "student after the cold start",
    "after": "student after",
}


def accuracy_line(when, sampled, greedy):
    """Two accuracies that were just measured, as a line: "student before: accuracy 0.465 ..."."""
    return f"{MEASURED[when]}: accuracy {plus_minus(sampled)}, greedy {plus_minus(greedy)}"


def mismatch(row, dtype):
    """A sentence if log-probabilities as sampled and as scored differ beyond rounding, else None.

    row: with "sampling_mismatch", nats; dtype: of the computation, "float32" or "bfloat16".
    """
    off = row["sampling_mismatch"]
    if off is None or off <= MISMATCH[dtype]:
        return None
    return (
        f"log-probabilities as sampled and as scored differ by up to {off:.2g} nats, so this is "
        "not on-policy; take --dtype float32, or another architecture"
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
        f"distance       reverse KL {change(before, after, 'reverse_kl', '.4f')}, "
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
    """A metric before -> after: str."""
    return f"{before[metric]:{form}} -> {after[metric]:{form}}"


def outcome(result):
    """The accuracies of a finished run, also of each file if it has several, and its gap recovery.

    -> list of lines, none if the prompts have no answers.
    """
    if result["accuracy_after"] is None:
        return []
    sampled = f"T {result['eval_temperature']:g}, top-p {result['eval_top_p']:g}"
    files = result["accuracy_after"].get("files", [])
    asked = f"mean of {len(files)} files" if files else how_many(result["accuracy_after"])
    lines = [f"accuracy       {course(result, 'accuracy')}; {sampled}, {asked}"]
    for place, found in enumerate(files):
        of_file = course(result, "accuracy", place)
        lines.append(f"  {found['file']}: {of_file}; {how_many(found)}")
    lines.append(f"greedy         {course(result, 'greedy')}")
    for place, found in enumerate(files):
        lines.append(f"  {found['file']}: {course(result, 'greedy', place)}")
    lines.append(f"gap recovery   {recovery(result)}")
    return lines


def course(result, kind, place=None):
    """The student before -> (after a cold start) -> after, and the teacher: str.

    kind: "accuracy" or "greedy"; place: which of several held-out files; None: their mean.
    """
    found = {}
    for when in ("before", "cold_start", "after", "teacher"):
        accuracy = result.get(f"{kind}_{when}")
        if accuracy:
            found[when] = plus_minus(accuracy if place is None else accuracy["files"][place])
    stages = [found["before"]]
    if "cold_start" in found:
        stages.append(f"{found['cold_start']} (cold start)")
    stages.append(found["after"])
    return f"{' -> '.join(stages)}, teacher {found['teacher']}"


def how_many(accuracy):
    """How many answers an accuracy is the mean of: "64 prompts, 4 answers to each"."""
    prompts = len(accuracy["each"])
    answers = accuracy["samples"] // prompts
    return f"{counted(prompts, 'prompt')}, {counted(answers, 'answer')} to each"


def counted(number, noun):
    """A number with its noun: "1 prompt", "2 prompts"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def recovery(result):
    """What became of the gap between student and teacher, in words: str."""
    before = result["accuracy_before"]["mean"]
    after = result["accuracy_after"]["mean"]
    teacher = result["accuracy_teacher"]["mean"]
    side = "above" if after >= before else "below"
    end = f"the student ended {abs(after - before):.3f} {side} its start"
    if before == after == teacher == 0:
        return (
            'not given: neither model was right once; answers are read after "Answer:" or in '
            "\\boxed{} (--template answer asks for it)"
        )
    if result["gap_recovery"] is None:
        return "not given: teacher and student are within noise of each other"
    if teacher < before:
        return f"not given: the teacher is behind the student; {end}"
    if after < before:
        return f"none: {end}"
    return f"{result['gap_recovery']:.2f} of the way from student to teacher"


# --- before training -----------------------------------------------------------------------------

FOR = "for"
AGAINST = "against"
IN_THE_MEAN = "in the mean"  # alone neither: the same in the paper's success and failure
UNSURE = "within noise"
RECORD = {  # verdict: (pairs that had it, of which gained greedily), of pairs after the rule
    "incompatible thinking (cold start first)": (9, 0),
    "nothing new to teach": (13, 0),
    "should work": (30, 29),
    "harmful (the teacher is behind the student)": (17, 1),
    "undecided (prompts with answers, or more of them, are needed)": (2, 2),
}
DIRECTIONS = {1: FOR, 0: UNSURE, -1: AGAINST}  # of a gain, by analysis.sure


def diagnosis(report):
    """The report of analysis.diagnose_pair as tables, and the verdict: str."""
    lines = metric_lines(report)
    if "greedy" in report:
        lines += accuracy_lines(report)
    lines += position_lines(report["by_position"])
    lines += sign_lines(report)
    lines += ["", f"verdict: {report['verdict']}"]
    if report["verdict"] in RECORD:
        called, gained = RECORD[report["verdict"]]
        lines.append(
            f"  record: of {counted(called, 'pair')} with this verdict {gained} gained "
            "greedily (experiments/README.md)"
        )
    for reason in report["reasons"]:
        lines.append(textwrap.fill(reason, 100, initial_indent="  - ", subsequent_indent="    "))
    return "\n".join(lines)


def metric_lines(report):
    """A line for each metric of the diagnosis; overlap also at the start, and where it is worst."""
    names = {**METRICS, "overlap_ratio": f"overlap ratio, k = {report['k']}, Eq. 6"}
    start = f"first {FIRST_TOKENS}"
    worst = f"worst bucket of {LEAST_TOKENS:.0%} or more"  # of all tokens
    header = f"{'formulas: plumbing/README.md':34} {'all tokens':17} {start:17} {worst}"
    lines = [
        f"{report['prompts']} prompts, {report['responses']} responses of "
        f"{report['response_length']:.1f} tokens at T {report['temperature']:g}, "
        f"{report['truncated_fraction']:.0%} cut off; nats, +- standard error over prompts",
        "",
        header,
    ]
    for metric, found in report["metrics"].items():
        shown = "none shared" if found["mean"] is None else plus_minus(found, "8.4f")
        line = f"{names.get(metric, metric):32} {shown:18}"
        if metric in report["first_tokens"]:
            first = plus_minus(report["first_tokens"][metric], "8.4f")
            line += f"{first:18}{report['worst_bucket'][metric]:8.4f}"
        lines.append(line.rstrip())
    return lines


def accuracy_lines(report):
    """How often each model is right: on its own, and finishing what the student began (6.1)."""
    sampled = f"T {report['eval_temperature']:g}, top-p {report['eval_top_p']:g}"
    asked = counted(report["greedy"]["prompts"], "prompt")
    title = f"right answers, {asked}; greedily or at {sampled}"
    rows = [("greedy, from the start", report["greedy"])]
    for cut in report["continuation"]:
        name = from_depth(cut)
        if cut["depth"] and not isinstance(cut["depth"], int):
            name += f" ({cut['tokens']:.1f} tokens)"
        if cut["depth"]:
            name += " of a student's answer"
        rows.append((f"sampled, {name}", cut))
    lines = ["", f"{title:61} student   teacher"]
    for name, found in rows:
        student = found["student"]["mean"]
        teacher = found["teacher"]["mean"]
        lines.append(f"  {name:57} {student:9.3f} {teacher:9.3f}")
    if any(cut["left_out"] for cut in report["continuation"]):
        kept = counted(cut["responses"], "response")
        lines.append(
            f"  (sampled: {kept}; {cut['left_out']} end before the deepest cut and are left out)"
        )
    auroc = "not defined" if report["auroc"] is None else f"{report['auroc']:.3f}"
    lines.append(
        f"AUROC of the mean reward: {auroc} ({report['right']} responses at T "
        f"{report['temperature']:g} are right, {report['wrong']} wrong)"
    )
    return lines


def from_depth(cut):
    """The depth at which both models take over from the student, in words: str."""
    depth = cut["depth"]
    if depth == 0:
        return "from the start"
    return f"after {depth} tokens" if isinstance(depth, int) else f"after {depth:.0%}"


def sign_lines(report):
    """Which way each measurement points, and why: a table, list of lines."""
    title = "why (4.1 is the paper's section)"
    lines = ["", f"{'what decides':28} {'measured':16} {'for, against':13} {title}"]
    for name, measured, points, why in signs(report):
        start = f"{name:28} {measured:16} {points:13} "
        lines.append((start + why).rstrip())
    return lines


def signs(report):
    """What points for OPD, or against it: rows of name, what was measured, which way, and why.

    The section before a figure of the paper is its source. Which way a number points is our
    reading. Not here: the overlap ratio of all tokens, the masses, and the AUROC. In the paper
    they are alike in a success and in a failure (4.1, 6.2).
    """
    first = report["first_tokens"]["overlap_ratio"]
    points, why = of_overlap(first, report["k"])
    rows = [(f"overlap, first {FIRST_TOKENS} positions", plus_minus(first), points, why)]
    if "greedy" not in report:
        return rows

    lead = report["greedy"]["gain"]
    rows.append(("teacher's lead, greedy", plus_minus(lead, "+.3f"), *of_greedy_lead(lead)))
    T = report["eval_temperature"]
    for cut in report["continuation"]:
        gain = cut["gain"]
        points, why = DIRECTIONS[sure(gain)], ""
        if cut["depth"] == 0:
            points, why = of_lead(gain)
        elif cut is report["continuation"][-1] and gain["mean"] > 0:
            why = "6.1: it shrinks later in a response"
        rows.append((f"  at T {T:g}, {from_depth(cut)}", plus_minus(gain, "+.3f"), points, why))
    gain = report["predicted_gain"]
    if gain is not None:  # None: no response is as long as --depths asks
        rows.append(
            (f"  mean of those at T {T:g}", plus_minus(gain, "+.3f"), DIRECTIONS[sure(gain)], "")
        )
    return rows


def of_overlap(ratio, k):
    """Which way the overlap ratio of the first tokens points, and why: (str, str)."""
    if k != K_OF_ALIKE:
        return "", f"our threshold is one for k = {K_OF_ALIKE}"
    if surely_below(ratio, ALIKE):
        return AGAINST, f"below our threshold of {ALIKE}"
    if surely_above(ratio, ALIKE):
        return FOR, f"above our threshold of {ALIKE}"
    return UNSURE, "more prompts would tell"


def of_greedy_lead(lead):
    """Which way the teacher's lead in greedy accuracy points, and why: (str, str)."""
    if sure(lead) < 0:
        return AGAINST, "it knows less; see 3.3"
    if surely_below(lead, LEAD):
        return AGAINST, f"3.2: nothing new, the lead is below {LEAD}"
    if sure(lead) > 0:
        return FOR, "3.2: it knows something new"
    return UNSURE, "more prompts would tell"


def of_lead(lead):
    """Which way the teacher's lead in sampled accuracy points, and why: (str, str)."""
    if sure(lead) < 0:
        return AGAINST, "3.3: the student fell, .54 to about .3"
    return IN_THE_MEAN, "4.1: about +.25 in success and failure"


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
