"""experiments/report.py: the tables of findings, from the results. Nobody types a number of ours.

    python experiments/report.py

It writes results/findings.md: every claim about the toy and about SmolLM2, what the paper has, what
was found here, and a word. It puts the tables of findings and scripts and what context.py,
forecast.py and bench.py print into experiments/README.md, each between its two markers. It puts
opd.update into README.md. It draws every figure anew. A script of the toy without results is left
out, and named.

Criteria stand in the first lines of a script. The four words are explained in lab.py.
"""

import importlib
import inspect
import sys

import context
import lab
import plot

from plumbing import files

TOY = ("phenomenology", "mechanism", "recipe", "cost", "followups", "forecast")
REAL = ("real", "again", "longer")
OVERVIEW = ("success", "opd", "sft", "sft, opd")  # arms of the figure of the front page
STEP = "<!-- the step -->\n```python\n"  # of README.md
NOT_YET = "Not measured yet.\n"

# criteria of the scripts of SmolLM2: section, claim, what the paper has
CLAIMS = {
    "real skill": (
        "3.2",
        "what a teacher newly knows can be learnt",
        "gap recovery above .8 where the teacher is the student after RL (4.1)",
    ),
    "real masses": (
        "4.1",
        "the shared tokens hold nearly all of both models' mass",
        ".97 to .99 throughout, in its failing run too",
    ),
    "real overlap": (
        "4.1",
        "in success the overlap ratio rises",
        "about .72 to above .91",
    ),
    "real gaps": (
        "4.1",
        "in success advantage, entropy gap and p - q shrink",
        "so",
    ),
    "real small loss": (
        "4.1",
        "where nothing new is taught loss and gradient begin small",
        "so",
    ),
    "real nothing new": (
        "3.2",
        "a teacher that knows no more teaches nothing",
        "gap recovery .05 and .16 from bigger ones of the same pipeline",
    ),
    "real other way": (
        "3.1",
        "a teacher that thinks otherwise teaches little",
        "student about .15 with the stronger teacher, .20 with the weaker",
    ),
    "real cold start": (
        "5.1",
        "a cold start helps, although the pair does not fail",
        "AMC23 about .36 to .40 with it, .12 to .26 without",
    ),
    "real intersection": (
        "4.2",
        "the shared tokens suffice",
        "Overlap equals Student Top-k",
    ),
    "real reward": (
        "6.2",
        "a good teacher's mean reward ranks answers",
        "AUROC .733; .751 with the one that fails",
    ),
    "again 2.2 estimators": (
        "2.2",
        "Eq. 3, 4 and 5 end alike",
        "not there",
    ),
    "again 3.3 reverse": (
        "3.3",
        "its earlier self takes back what post-training gave, all of it",
        "from about .54 to about .30 to .34; the earlier self has .28",
    ),
    "again 3.3 lost": (
        "3.3",
        "its earlier self takes back most of it",
        "about .77 to .92 of it",
    ),
    "again 5.2 template": (
        "5.2",
        "the teacher's template helps",
        "mean about .54 against .51",
    ),
    "again one prompt": (
        "2609.04172",
        "one prompt gives most of the gain",
        ".87 of it at step 300, .72 at 1,000",
    ),
    "again first 30 %": (
        "2606.22600",
        "the first 30 % of the tokens give nearly all",
        "so",
    ),
    "again low KL": (
        "ours",
        "where a run fails its KL may fall all the same",
        "not there",
    ),
    "again words": (
        "3.1",
        "a teacher that works in words teaches little",
        "student about .15 with the stronger teacher, .20 with the weaker",
    ),
    "again words, cold": (
        "5.1",
        "a short cold start rescues it",
        "AMC23 about .36 to .40 with it, .12 to .26 without",
    ),
    "longer cold start": (
        "5.1",
        "a long cold start rescues it",
        "AMC23 about .36 to .40 with it, .12 to .26 without",
    ),
}


# --- what is there --------------------------------------------------------------------------------


def toy_results(folder):
    """{script: {arm or probe: [result, one a seed]}} of the scripts of the toy that have some."""
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
    """{script: its results file} of the scripts of SmolLM2."""
    found = {}
    for script in REAL:
        path = folder / f"{script}.json"
        if path.exists():
            found[script] = files.read_json(path)
        else:
            print(f"{script}.py is left out: no {path.name}", file=sys.stderr)
    return found


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
    """Bold, if it is not "holds"."""
    return word if word == lab.HOLDS else f"**{word}**"


def left_out(results):
    """A paragraph that names the scripts of the toy without results, "" if there is none."""
    missing = [f"{script}.py" for script in TOY if script not in results]
    if not missing:
        return ""
    return f"\nNo seed of {', '.join(missing)} has all of its results yet.\n"


def findings_in_short(results):
    """Section, claim, word and what was found, of the toy."""
    rows = [(x.section, x.claim, emphasised(x.word), x.found) for x in judged(results)]
    return table(("section", "claim", "word", "found"), rows) + left_out(results)


def findings_in_full(findings):
    """The same with what the paper has."""
    titles = ("section", "claim", "the paper", "found here (mean over seeds)", "word")
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
    """Of context.py, from its results in a folder."""
    results = context_results(folder)
    return findings_in_full(context.judge(results)) if results else NOT_YET


def findings_of_real(results):
    """A row a criterion of the scripts of SmolLM2."""
    titles = ("section", "claim", "the paper", "criterion", "found (mean over seeds)", "word")
    rows = []
    for script, made in results.items():
        for name, criterion, found, holds in importlib.import_module(script).judge(made["runs"]):
            section, claim, paper = CLAIMS[name]
            word = emphasised(lab.HOLDS if holds else "missed")
            rows.append((section, claim, paper, criterion, found, word))
    return table(titles, rows)


def page(toy, real, folder):
    """results/findings.md: str."""
    commits = [f"{script}.py at {made['commit']}" for script, made in real.items()]
    return f"""# Findings

`python experiments/report.py` writes this page. Criteria stand in the first lines of each script.

## The toy

*holds*: as the paper has it. *contradicted*: the opposite, or shown equal where the paper finds a
difference. *undecided*: within noise, or otherwise from seed to seed. *not askable here*: the toy
cannot show it. ± is noise, two standard errors. Numbers with commas between them are those of the
seeds, in order.

{findings_in_full(judged(toy))}{left_out(toy)}
## SmolLM2-135M-Instruct that learns from itself

{findings_of_context(folder)}
## SmolLM2-135M-Instruct, measured before the new toy world

These runs are older than the toy world of today and its four words. A criterion holds or is missed.
Accuracy is at T 1. Commits: {", ".join(commits)}.

{findings_of_real(real)}"""


def scripts(toy, real, folder):
    """A row a script: what it asks, by its first sentence, and what it took."""
    titles = ("script", "what it asks", "seeds", "CPU seconds", "commits")
    rows = []
    shared = {}
    for script, results in toy.items():
        runs = [run for of_name in results.values() for run in of_name]
        for run in runs:
            shared[run["name"], run["seed"]] = run["seconds"]
        seconds = sum(run["seconds"] for run in runs)
        commits = {lab.commit_of(run) for run in runs}
        rows.append(script_row(script, runs, seconds, commits))
    hours = sum(shared.values()) / 3600
    of_real = 0
    of_context = [run for of_arm in context_results(folder).values() for run in of_arm]
    if of_context:
        seconds = sum(run["seconds"] for run in of_context)
        of_real += seconds / 3600
        commits = {lab.commit_of(run) for run in of_context}
        rows.append(script_row("context", of_context, seconds, commits))
    for script, made in real.items():
        seconds = made["seconds"] * made["threads"]
        of_real += seconds / 3600
        rows.append(script_row(script, made["runs"], seconds, {made["commit"]}))
    return table(titles, rows) + (
        "\nA script's seconds count the arms that it shares with others. Each arm once, the toy "
        f"takes {hours:.1f} hours of one thread. SmolLM2 took {of_real:.1f}.\n"
    )


def script_row(script, runs, seconds, commits):
    about = lab.first_sentence(importlib.import_module(script).__doc__)
    asks = about.split(": ", 1)[1].removesuffix(" Toy models.").rstrip(".")
    seeds = {run["seed"] for run in runs}
    return (
        f"[{script}.py]({script}.py)",
        asks,
        ", ".join(str(seed) for seed in sorted(seeds)),
        f"{seconds:,.0f}",
        ", ".join(sorted(commits)),
    )


def printed(path, start=""):
    """The lines that a script wrote, from the first that begins so, as a block of Markdown."""
    if not path.exists():
        return NOT_YET
    text = "\n" + path.read_text().strip()
    return "```text\n" + text[text.index(f"\n{start}") + 1 :] + "\n```\n"


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


def filled(text, toy, real, folder):
    """experiments/README.md with its tables made anew: str."""
    text = put(findings_in_short(toy), "findings", text)
    text = put(scripts(toy, real, folder), "scripts", text)
    text = put(printed(folder / "context.txt"), "context", text)
    text = put(printed(folder / "forecast.txt", "Spearman"), "forecast", text)
    return put(printed(folder / "bench.txt"), "bench", text)


def with_update(text):
    """README.md with opd.update as it is: str."""
    before, rest = text.split(STEP)
    after = rest[rest.index("```\n") :]
    return before + STEP + inspect.getsource(lab.opd.update) + after


def draw(toy, real, folder):
    """All figures."""
    for script, results in toy.items():
        getattr(plot, script)(results, folder / script)
    for script in real:
        getattr(plot, script)(folder / f"{script}.json", folder / f"{script}.svg")
    for name, read in (
        ("context", lambda: context.read_results(folder)),
        ("overview", lambda: lab.read_results(folder, OVERVIEW)),
    ):
        try:
            getattr(plot, name)(read(), folder / name)
        except SystemExit as refusal:
            print(f"{name}.svg is not drawn: {refusal}", file=sys.stderr)


def main():
    toy = toy_results(lab.RESULTS)
    real = real_results(lab.RESULTS)
    (lab.RESULTS / "findings.md").write_text(page(toy, real, lab.RESULTS))
    readme = lab.ROOT / "experiments" / "README.md"
    readme.write_text(filled(readme.read_text(), toy, real, lab.RESULTS))
    front = lab.ROOT / "README.md"
    front.write_text(with_update(front.read_text()))
    print(findings_in_short(toy))
    draw(toy, real, lab.RESULTS)


if __name__ == "__main__":
    main()
