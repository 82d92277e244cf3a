"""experiments/report.py: the tables of findings, from the results. Nobody types a number of ours.

    python experiments/report.py

It writes results/findings.md: every claim about the toy and about SmolLM2, what the paper has, what
was found here, and the outcome in a word; and the commits and seconds of each script. It writes the
table of each script, results/NAME.txt. It puts short tables of findings and scripts, and lines of
context.txt, forecast.txt and bench.txt, into experiments/README.md, each between its two markers.
It draws every figure anew. A script of the toy without results is left out, and named.

Criteria stand in the first lines of a script. The four words are explained in lab.py.
"""

import importlib
import sys

import context
import forecast
import lab
import plot
import real

from plumbing.exits import one_line

TOY = ("phenomenology", "mechanism", "recipe", "cost", "followups", "forecast")
OVERVIEW = ("success", "opd", "sft", "sft, opd")  # arms of the figure of the front page
IN_CONTEXT = ("teacher", "hint", "other sum", "expert")  # lines of context.txt begin so
IN_FORECAST = ("chosen on", "later pairs", *forecast.VERDICTS)  # of forecast.txt
IN_BENCH = (  # of bench.txt
    "rollout toy   uneven",
    "rollout real  uneven",
    "step toy   as it is",
    "step real  as it is",
    "step real  bfloat16",
    "loss top-k   V = 152000",
    "processes toy, 256 prompts, one process",
    "processes toy, 256 prompts, two processes ",
    "trl",
)
HEADINGS = {  # of experiments/README.md: the paragraphs about what a script found
    "phenomenology": "When does it work? (paper 3)",
    "mechanism": "Why does it work? (paper 4)",
    "recipe": "How to recover (paper 5)",
    "cost": "What it costs (paper 6), and which loss (2.2)",
    "followups": "What later papers say, and ends that differ",
    "forecast": "Before training",
}
SHORT = ("section", "claim", "outcome")  # titles
NOT_YET = "Not measured yet.\n"


# --- what is there --------------------------------------------------------------------------------


def toy_results(folder):
    """{script: {arm or probe: [result, one a seed]}} of the toy's scripts that have results."""
    found = {}
    for script in TOY:
        module = importlib.import_module(script)
        names = [*module.ARMS, *getattr(module, "PROBES", {})]
        try:
            found[script] = lab.read_results(folder, names)
        except SystemExit as refusal:
            print(f"{script}.py is left out: {refusal}", file=sys.stderr)
    return found


def real_results(folder):
    """{arm or probe: [result, one a seed]} of real.py: the results that are there."""
    return lab.read_all(folder, [*real.ARMS, *real.PROBES], "real")


def judged(results):
    """What the scripts of the toy find in their results: list of lab.Finding."""
    findings = []
    for script, of_script in results.items():
        findings += importlib.import_module(script).judge(of_script)
    return findings


# --- tables ---------------------------------------------------------------------------------------


def row(*cells):
    """A line of a table of Markdown."""
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def table(titles, rows):
    """A table of Markdown: str."""
    lines = [row(*titles), row(*("---" for _ in titles))]
    lines += [row(*cells) for cells in rows]
    return "\n".join(lines) + "\n"


def emphasised(word):
    """A word in bold, if it is not "holds"."""
    return word if word == lab.HOLDS else f"**{word}**"


def left_out(results):
    """A paragraph that names the scripts of the toy without results, "" if there is none."""
    missing = [f"{script}.py" for script in TOY if script not in results]
    if not missing:
        return ""
    return f"\nNo seed of {', '.join(missing)} has all of its results yet.\n"


def findings_in_short(results):
    """Section, claim and word, of the toy. A section leads to its paragraphs."""
    rows = []
    for script, of_script in results.items():
        for x in judged({script: of_script}):
            section = f"[{x.section}](#{anchor(HEADINGS[script])})"
            rows.append((section, x.claim, emphasised(x.word)))
    return table(SHORT, rows) + left_out(results)


def anchor(heading):
    """Where a heading of a page is found on GitHub: "How to recover (5)" -> "how-to-recover-5"."""
    kept = [letter for letter in heading.lower() if letter.isalnum() or letter in " -_"]
    return "".join(kept).replace(" ", "-")


def real_in_short(results):
    """The same of real.py."""
    rows = [(x.section, x.claim, emphasised(x.word)) for x in real.judge(results)]
    return table(SHORT, rows) if rows else NOT_YET


def findings_in_full(findings):
    """Findings as a table, with what the paper has."""
    titles = ("section", "claim", "the paper", "found here (mean over seeds)", "outcome")
    rows = []
    for x in findings:
        rows.append((x.section, x.claim, x.paper, x.found, emphasised(x.word)))
    return table(titles, rows)


def context_results(folder):
    """{arm: [result, one a seed]} of context.py; none if no seed is complete."""
    try:
        return context.read_results(folder)
    except SystemExit as refusal:
        print(f"context.py is left out: {refusal}", file=sys.stderr)
        return {}


def findings_of_context(folder):
    """The findings of context.py, from its results in a folder."""
    results = context_results(folder)
    return findings_in_full(context.judge(results)) if results else NOT_YET


def findings_of_real(results):
    """The findings of real.py. A claim is left out if no seed has its arms."""
    findings = list(real.judge(results))
    return findings_in_full(findings) if findings else NOT_YET


def page(toy, of_real, folder):
    """results/findings.md: str."""
    return f"""# Findings

`python experiments/report.py` writes this page. Criteria stand in the first lines of each script.

## The toy

*holds*: it is here as the claim says. *contradicted*: the opposite, or shown equal where the claim
has a difference. *undecided*: within noise, or otherwise from seed to seed. *not askable here*: the
toy cannot show it. ± is noise, half of a 95 % interval. Numbers with commas between them are those
of the seeds, in order. Claims marked *ours* are not the paper's.

{findings_in_full(judged(toy))}{left_out(toy)}
## SmolLM2-135M-Instruct that learns from itself

{findings_of_context(folder)}
## SmolLM2-135M-Instruct that learns to add

{findings_of_real(of_real)}
## What they took

{provenance(toy, of_real, folder)}
What was measured before this toy world stands in [before.md](before.md).
"""


def by_script(toy, of_real, folder):
    """{script: {arm or probe: [result, one a seed]}} of all scripts that have results."""
    found = {**toy, "context": context_results(folder), "real": of_real}
    return {script: results for script, results in found.items() if any(results.values())}


def scripts(toy, of_real, folder):
    """A table of what each script asks, by its first sentence."""
    rows = []
    for script in by_script(toy, of_real, folder):
        about = lab.first_sentence(importlib.import_module(script).__doc__)
        asks = about.split(": ", 1)[1].removesuffix(" Toy models.").rstrip(".")
        rows.append((f"[{script}.py]({script}.py)", asks))
    return table(("script", "what it asks"), rows)


def provenance(toy, of_real, folder):
    """A table of the seeds, CPU seconds and commits of each script."""
    rows = []
    once = {}  # arms that scripts share
    for script, results in by_script(toy, of_real, folder).items():
        runs = [run for of_name in results.values() for run in of_name]
        world = "toy" if script in toy else "SmolLM2"
        for run in runs:
            once[world, run["name"], run["seed"]] = run["seconds"]
        seeds = sorted({run["seed"] for run in runs})
        seconds = sum(run["seconds"] for run in runs)
        commits = sorted({lab.commit_of(run) for run in runs})
        rows.append(
            (f"{script}.py", ", ".join(map(str, seeds)), f"{seconds:,.0f}", ", ".join(commits))
        )
    hours = {"toy": 0, "SmolLM2": 0}
    for (world, _, _), seconds in once.items():
        hours[world] += seconds / 3600
    return table(("script", "seeds", "CPU seconds", "commits"), rows) + (
        "\nA script's seconds count the arms that it shares with others. If each arm is counted "
        f"once,\nthe toy takes {hours['toy']:.1f} hours of one thread, SmolLM2 "
        f"{hours['SmolLM2']:.1f}.\n"
    )


def printed(path, only):
    """Lines that a script wrote, as a block of Markdown: those that begin with one of `only`."""
    if not path.exists():
        return NOT_YET
    taken = [line for line in path.read_text().splitlines() if line.startswith(only)]
    return "\n".join(["```text", *taken, "```", ""])


# --- pages ----------------------------------------------------------------------------------------


def markers(name):
    """The lines between which a table of experiments/README.md stands."""
    return f"<!-- the {name} -->\n", f"<!-- end of the {name} -->\n"


def put(made, name, text):
    """A page with `made` between its two markers of that name: str. SystemExit without them."""
    first, last = markers(name)
    if first not in text or last not in text:
        raise SystemExit(
            f"experiments/README.md: put the lines {first.strip()} and {last.strip()} "
            "where it belongs"
        )
    before, rest = text.split(first)
    after = rest.split(last)[1]
    return before + first + made + last + after


def filled(text, toy, of_real, folder):
    """experiments/README.md with its tables made anew: str."""
    text = put(findings_in_short(toy), "findings", text)
    text = put(real_in_short(of_real), "findings on SmolLM2", text)
    text = put(scripts(toy, of_real, folder), "scripts", text)
    text = put(printed(folder / "context.txt", IN_CONTEXT), "context", text)
    text = put(printed(folder / "forecast.txt", IN_FORECAST), "forecast", text)
    return put(printed(folder / "bench.txt", IN_BENCH), "bench", text)


def draw(toy, of_real, folder):
    """Draw all figures."""
    for script, results in toy.items():
        getattr(plot, script)(results, folder / script)
    if of_real["success"]:
        plot.real(of_real, folder / "real")
    for name, read in (
        ("context", lambda: context.read_results(folder)),
        ("overview", lambda: lab.read_results(folder, OVERVIEW)),
    ):
        try:
            getattr(plot, name)(read(), folder / name)
        except SystemExit as refusal:
            print(f"{name}.svg is not drawn: {refusal}", file=sys.stderr)


def tables(toy, of_real, folder):
    """{script: what it says of its results} of every script that has results."""
    found = {}
    in_context = context_results(folder)
    if in_context:
        found["context"] = context.told(in_context) + "\n"
    for script, results in {**toy, "real": of_real}.items():
        module = importlib.import_module(script)
        more = getattr(module, "more", None)
        if any(results.values()):
            found[script] = lab.report(results, module.ARMS, module.judge, more) + "\n"
    return found


def main():
    toy = toy_results(lab.RESULTS)
    of_real = real_results(lab.RESULTS)
    for script, text in tables(toy, of_real, lab.RESULTS).items():
        (lab.RESULTS / f"{script}.txt").write_text(text)
    (lab.RESULTS / "findings.md").write_text(page(toy, of_real, lab.RESULTS))
    readme = lab.ROOT / "experiments" / "README.md"
    readme.write_text(filled(readme.read_text(), toy, of_real, lab.RESULTS))
    print(findings_in_short(toy))
    draw(toy, of_real, lab.RESULTS)


if __name__ == "__main__":
    with one_line("report.py"):
        main()
