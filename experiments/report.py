"""experiments/report.py: the table of findings, from results/*.json. Nobody types a number of ours.

    python experiments/report.py      prints it, puts it and the bench's table into experiments/README.md, each between
                                      its two markers, and draws the figures

A finding stands beside what the paper says (section 3 to 6 of arXiv 2604.13016; its numbers are single runs). What ours
means is in the script's first lines, where its criterion is, and every seed is in results/<script>.txt.
"""
import importlib
import json

import lab
import plot

MARKERS = {name: (f"<!-- the {name} -->\n", f"<!-- end of the {name} -->\n")
           for name in ("findings", "forecast", "bench")}
PAPER = {   # script -> verdict of its judge -> what the paper has
    "phenomenology": {
        "3.1 thinking": "weaker Qwen3-4B-Base-GRPO: student .20 of mean accuracy; stronger Qwen3-4B: .15",
        "3.2 knowledge": "recovery .05 and .16 from bigger, .17 and .59 from the same after RL, of lower overlap",
        "3.3 lost": ".77 and .92 of it",
        "3.3 reverse": "from .54 to .30-.34, whether the earlier self teaches or R1-Distill-7B"},
    "mechanism": {
        "4.1 overlap": ".72 -> .91 in success, .745 -> .78 in failure",
        "4.1 masses": ".97 to .99 throughout",
        "4.1 advantage": "towards 0 in success, stays negative in failure (not judged)",
        "4.1 gap": "narrows in success, persists in failure (not judged)",
        "4.1 largest": "shrinks in success, persists in failure (not judged)",
        "4.1 small loss": "failure starts with a small loss and a small gradient",
        "4.2 overlap": "Overlap Top-k equals Student Top-k (with the raw log-ratio, as below)",
        "4.2 overlap, raw": "Overlap Top-k equals Student Top-k",
        "4.2 fluent": "as above",
        "4.2 fluent, raw": "as above",
        "4.2 others": "Non-Overlap Top-k is clearly weaker"},
    "recipe": {
        "5.1 opd": ".12 -> .26: it learns, to a lower ceiling",
        "5.1 sft 100": "not there",
        "5.1 cold start": ".36 -> .40 with it, .12 -> .26 without; no control of equal compute",
        "5.1 cold start T.7": "the same, drawn at T .7",
        "5.1 sft 100 + opd": "the ceiling rises",
        "5.2 template": ".51 -> .54, recovery 80 -> 85 %",
        "5.2 content": "better, at lower overlap and much lower entropy (1.5 against 3 to 6 nats)"},
    "cost": {
        "6.1 short": "3K and 7K tokens are best, .5K and 1K learn little",
        "6.1 long": "10K and 15K collapse near step 200",
        "6.1 backwards": "in the 15K run the entropy rises first at the end of the responses",
        "6.1 depth": "+.366, +.271, +.152, +.024 at 1K, 4K, 8K, 16K tokens",
        "6.2 global": "AUROC .733 with the teacher that succeeds, .751 with the one that fails",
        "6.2 coherence, bigger": "a hypothesis, not tested",
        "6.2 coherence, other": "not there",
        "6.3 support": "AIME24 .454 sampled, .446 top-1, .473 top-4, .458 top-16",
        "2.2 estimators": "none"},
    "real": {
        "Fig. 6 overlap": ".72 -> .91 in success",
        "3.3 text": "the student regresses all the way to the level of its worse teacher"},
    "ends": {
        "ends start": "none, ours: its pairs of 3.1 and 5.1 end with different tokens",
        "ends merged": "none, ours",
        "ends own": "none, ours"},
    "followups": {
        "later one prompt": "2609.04172: one prompt gives 62 to 89 % of the gain",
        "later first 30 %": "2605.27028, 2605.31490: the first 30 % of the tokens give nearly all",
        "later sharp": "none, a control",
        "later low KL": "2606.09471: a low KL need not mean success",
        "later no end": "the sampled token is said to stop ending in long runs"},
    "forecast": {"forecast rank": "none, ours", "forecast promise": "none, ours"},
}


def table(results):
    """Markdown, a row a finding; a script without results yet is left out."""
    lines = ["| finding | paper | criterion | ours, mean over seeds | holds |", "|---|---|---|---|---|"]
    commands = []
    for script, paper in PAPER.items():
        path = results / f"{script}.json"
        if not path.exists():
            continue
        made = json.loads(path.read_text())
        for name, criterion, found, holds in importlib.import_module(script).judge(made["runs"]):
            cells = (name, paper[name], criterion, found, "yes" if holds else "**no**")
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        seeds = len({run["seed"] for run in made["runs"]})
        commands.append(f"`python experiments/{script}.py`: {seeds} seeds, {made['seconds']} s on {made['threads']} "
                        f"thread(s), commit {made['commit']}")
    return "\n".join([*lines, "", *(f"- {command}" for command in commands)]) + "\n"


def printed(path, start=""):
    """The lines that a script wrote, from the first that begins so, as a block of Markdown."""
    text = "\n" + path.read_text().strip()
    return "```text\n" + text[text.index(f"\n{start}") + 1:] + "\n```\n"


def put(made, name, text):
    """A page with `made` between its two markers of that name: str."""
    first, last = MARKERS[name]
    if first not in text or last not in text:
        raise SystemExit(f"experiments/README.md: put the lines {first.strip()} and {last.strip()} where it belongs")
    before, rest = text.split(first)
    return before + first + made + last + rest.split(last)[1]


def main():
    readme, results = lab.ROOT / "experiments" / "README.md", lab.ROOT / "experiments" / "results"
    made = table(results)
    print(made)
    text = put(made, "findings", readme.read_text())
    text = put(printed(results / "forecast.txt", "Spearman"), "forecast", text)
    readme.write_text(put(printed(results / "bench.txt"), "bench", text))
    for path in results.glob("*.json"):
        if path.stem in PAPER:
            getattr(plot, path.stem)(path, path.with_suffix(".svg"))
    plot.overview(results, results / "overview.svg")


if __name__ == "__main__":
    main()
