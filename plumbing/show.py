"""plumbing/show.py: what a person reads: a line a step, warnings, the end of a run."""

from analysis import plus_minus

WITHIN_NOISE = "teacher and student are within noise of each other"
IMPLAUSIBLE = 5.0  # nats: the other family of the toy begins below 4
MISMATCH = {
    "float32": 0.01,
    "bfloat16": 1.0,
}  # nats: rounding stays well below; another softmax does not
COLUMNS = (  # of the readable line: metric, title, format
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
)  # 80 columns together


def columns():
    """The titles of the readable lines of a run, and what a line is."""
    titles = " ".join(f"{title:>{form.split('.')[0].rstrip('d')}}" for _, title, form in COLUMNS)
    return f"each line is one step, a mean over its response tokens; the columns: plumbing/README.md\n{titles}\n"


def line(row):
    """A row of metrics.jsonl as one readable line."""
    return " ".join(
        "-".rjust(len(f"{0:{form}}")) if row[name] is None else f"{row[name]:{form}}"
        for name, _, form in COLUMNS
    )


def summary(result):
    """What a person wants to know when a run ends, in four lines: before -> after. +- is one standard error."""
    before, after, lines = result["held_out_before"], result["held_out_after"], []
    if result["accuracy_after"]:
        way = [plus_minus(result["accuracy_before"]), plus_minus(result["accuracy_after"])]
        if result.get("accuracy_cold_start"):
            way.insert(1, f"{plus_minus(result['accuracy_cold_start'])} (cold start)")
        recovered = result["gap_recovery"]
        lines = [
            f"accuracy       {' -> '.join(way)}, teacher {plus_minus(result['accuracy_teacher'])}",
            "gap recovery   "
            + (
                f"{recovered:.2f} of the way from student to teacher"
                if recovered is not None
                else "not given: " + WITHIN_NOISE
            ),
        ]
    lines.append(
        f"held out       reverse KL {before['reverse_kl']:.4f} -> {after['reverse_kl']:.4f}, overlap ratio "
        f"{before['overlap_ratio']:.3f} -> {after['overlap_ratio']:.3f}"
    )
    lines.append(
        "overlap mass   "
        + ", ".join(
            f"{who} {before[f'overlap_mass_{who}']:.3f} -> {after[f'overlap_mass_{who}']:.3f}"
            for who in ("student", "teacher")
        )
    )
    if result["skipped_steps"]:
        lines.append(
            f"skipped        {result['skipped_steps']} steps whose loss or gradient was not finite; "
            "metrics.jsonl names their prompts"
        )
    return "\n".join(lines)


def collapse(history, window=5):
    """A sentence when a run shows signs of collapse, else None. history: the rows of metrics.jsonl so far.

    Something that should hold has fallen from its best (either overlap mass by .1, or the reward by .2 nats) while
    something that should not has risen from its lowest (student entropy or response length by half, the entropy by .3
    nats at least; repetition by .2). Each is a mean over `window` steps.
    """
    falling, rising = (
        ("overlap_mass_student", "overlap_mass_teacher", "reward"),
        ("entropy_student", "response_length", "repetition_fraction"),
    )
    history = [row for row in history if all(row[name] is not None for name in falling + rising)]
    if len(history) < 2 * window:
        return None

    def now_and(best, name):
        means = [
            sum(row[name] for row in history[i : i + window]) / window
            for i in range(len(history) - window + 1)
        ]
        return best(means), means[-1]

    high, low = (
        {name: now_and(max, name) for name in falling},
        {name: now_and(min, name) for name in rising},
    )
    falls = [
        name
        for name, (best, now) in high.items()
        if best - now > (0.2 if name == "reward" else 0.1)
    ]
    least = {
        "entropy_student": lambda best: max(0.3, best / 2),
        "response_length": lambda best: best / 2,
        "repetition_fraction": lambda best: 0.2,
    }
    rises = [name for name, (best, now) in low.items() if now - best > least[name](best)]
    if not (falls and rises):
        return None
    said = ", ".join(
        "{} {:.2f} -> {:.2f}".format(name, *{**high, **low}[name]) for name in falls + rises
    )
    return f"signs of collapse: {said}; lower --lr or --max-new-tokens, or begin with a cold start (paper 5.1, 6.1)"


def mismatch(row, dtype):
    """A sentence where log-probabilities as sampled and as scored are not the same but for rounding, else ""."""
    off = row.get("sampling_mismatch") or 0.0
    return (
        f"log-probabilities as sampled and as scored differ by up to {off:.2g} nats: this is not on-policy"
        * (off > MISMATCH[dtype])
    )


def signs(history, dtype):
    """What is wrong with a run, by its last row and those before: {kind: a sentence, or None}."""
    row = history[-1]
    repeats, apart = row["repetition_fraction"], history[0]["reverse_kl"] or 0.0
    return {
        "collapse": collapse(history),
        "repetition": f"{repeats:.0%} of the responses only repeat themselves, see rollouts.jsonl"
        * (repeats > 0.5),
        "mismatch": mismatch(row, dtype),
        "apart": f"student and teacher begin {apart:.1f} nats a token apart: was the teacher trained with another "
        "template? If not, begin with a cold start (paper 5.1)" * (apart > IMPLAUSIBLE),
    }
