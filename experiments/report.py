"""experiments/report.py: the tables of findings, from results/*.json. Nobody types a number of
ours.

    python experiments/report.py      writes results/findings.md: every criterion and what was
                                      found; puts the findings, one line each, and the tables of
                                      scripts, forecast and bench into experiments/README.md, each
                                      between its two markers; puts opd.update into README.md;
                                      draws the figures

What a criterion means is in its script's first lines, and every seed is in results/<script>.txt.
"""

import importlib
import inspect
import json

import lab
import plot

MARKERS = {
    name: (f"<!-- the {name} -->\n", f"<!-- end of the {name} -->\n")
    for name in ("findings", "scripts", "forecast", "bench")
}
STEP = "<!-- the step -->\n```python\n"  # of README.md
PAPER = {  # script -> verdict of its judge -> what the paper has
    "phenomenology": {
        "3.1 thinking": "weaker Qwen3-4B-Base-GRPO: student .20 of mean accuracy; "
        "stronger Qwen3-4B: .15",
        "3.2 knowledge": "recovery .05 and .16 from bigger, .17 and .59 from the same after RL, "
        "of lower overlap",
        "3.3 lost": ".77 and .92 of it",
        "3.3 reverse": "from .54 to .30-.34, whether the earlier self teaches or R1-Distill-7B",
    },
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
        "4.2 others": "Non-Overlap Top-k is clearly weaker",
    },
    "recipe": {
        "5.1 opd": ".12 -> .26: it learns, to a lower ceiling",
        "5.1 sft 100": "not there",
        "5.1 cold start": ".36 -> .40 with it, .12 -> .26 without; no control of equal compute",
        "5.1 cold start T.7": "the same, drawn at T .7",
        "5.1 sft 100 + opd": "the ceiling rises",
        "5.2 template": ".51 -> .54, recovery 80 -> 85 %",
        "5.2 content": "better, at lower overlap and much lower entropy (1.5 against 3 to 6 nats)",
    },
    "cost": {
        "6.1 short": "3K and 7K tokens are best, .5K and 1K learn little",
        "6.1 long": "10K and 15K collapse near step 200",
        "6.1 backwards": "in the 15K run the entropy rises first at the end of the responses",
        "6.1 depth": "+.366, +.271, +.152, +.024 at 1K, 4K, 8K, 16K tokens",
        "6.2 global": "AUROC .733 with the teacher that succeeds, .751 with the one that fails",
        "6.2 success": "AUROC .733",
        "6.2 coherence, bigger": "a hypothesis, not tested",
        "6.2 coherence, other": "not there",
        "6.3 support": "AIME24 .454 sampled, .446 top-1, .473 top-4, .458 top-16",
        "2.2 estimators": "none",
    },
    "real": {
        "real skill": "gap recovery above .8 where the teacher is the student after RL (4.1)",
        "real masses": ".97 to .99 throughout",
        "real overlap": ".72 -> .91 in success",
        "real gaps": "narrow in success",
        "real small loss": "failure starts with a small loss and a small gradient",
        "real nothing new": "recovery .05 and .16 from a teacher of the same pipeline",
        "real other way": "student .15 of mean accuracy with the stronger teacher, "
        ".20 with the weaker",
        "real cold start": ".36 -> .40 with it, .12 -> .26 without",
        "real intersection": "Overlap Top-k equals Student Top-k",
        "real reward": "AUROC .733 with the teacher that succeeds, .751 with the one that fails",
    },
    "again": {
        "again 2.2 estimators": "none",
        "again 3.3 reverse": "from .54 to .30-.34, the score of its earlier self .28",
        "again 3.3 lost": ".77 and .92 of it",
        "again 5.2 template": ".51 -> .54, recovery 80 -> 85 %",
        "again one prompt": "2609.04172: one prompt gives 62 to 89 % of the gain",
        "again first 30 %": "2605.27028, 2605.31490: the first 30 % of the tokens give nearly all",
        "again low KL": "2606.09471: a low KL need not mean success",
        "again words": "student .15 of mean accuracy with the stronger teacher, "
        ".20 with the weaker",
        "again words, cold": ".36 -> .40 with it, .12 -> .26 without",
    },
    "longer": {"longer cold start": ".36 -> .40 with it, .12 -> .26 without"},
    "ends": {
        "ends start": "none, ours: its pairs of 3.1 and 5.1 end with different tokens",
        "ends merged": "none, ours",
        "ends own": "none, ours",
    },
    "followups": {
        "later one prompt": "2609.04172: one prompt gives 62 to 89 % of the gain",
        "later first 30 %": "2605.27028, 2605.31490: the first 30 % of the tokens give nearly all",
        "later sharp": "none, a control",
        "later low KL": "2606.09471: a low KL need not mean success",
        "later no end": "the sampled token is said to stop ending in long runs",
    },
    "forecast": {"forecast rank": "none, ours", "forecast promise": "none, ours"},
}


# section, claim, criteria on the toy, on the real model ("; " between them), what it means
FINDINGS = (
    (
        "3.1",
        "a weaker teacher that thinks alike wins",
        "3.1 thinking",
        "real other way; again words",
        "compare overlap ratio and masses before scores",
    ),
    (
        "3.2",
        "only what is new can be learnt",
        "3.2 knowledge",
        "real skill; real nothing new",
        "take a teacher that was post-trained further, not one that is only larger",
    ),
    (
        "3.3",
        "a worse teacher undoes post-training",
        "3.3 lost",
        "again 3.3 lost",
        "the student moves towards its teacher, for better or worse",
    ),
    (
        "3.3",
        "until the student is its earlier self again",
        "3.3 reverse",
        "again 3.3 reverse",
        "a little of the gain stays; on the real model, in 12 steps, .3 to .9 of it",
    ),
    (
        "4.1",
        "success: overlap rises, the gaps close",
        "4.1 overlap; 4.1 advantage; 4.1 gap; 4.1 largest",
        "real overlap; real gaps",
        "watch overlap and masses together: in a failure either may rise",
    ),
    (
        "4.1",
        "in success the shared tokens come to hold 97 %",
        "4.1 masses",
        "real masses",
        "masses far below it at the first step: cold start first",
    ),
    (
        "4.1",
        "where nothing new is taught the loss begins small",
        "4.1 small loss",
        "real small loss",
        "a small loss is no success",
    ),
    (
        "4.2",
        "the shared tokens are enough",
        "4.2 overlap; 4.2 overlap, raw; 4.2 fluent; 4.2 fluent, raw",
        "real intersection",
        "where they hold .98, yes; else the mistakes that only the student makes are outside",
    ),
    (
        "4.2",
        "tokens that are not shared teach less than the 16",
        "4.2 others",
        "",
        "but more than the shared ones alone, on the toy",
    ),
    (
        "5.1",
        "a cold start rescues a failing pair",
        "5.1 opd; 5.1 sft 100; 5.1 sft 100 + opd; 5.1 cold start",
        "again words, cold; longer cold start",
        "make it long enough; OPD adds to what it does",
    ),
    (
        "5.1",
        "and beats fine-tuning on answers drawn at T .7",
        "5.1 cold start T.7",
        "",
        "draw the answers at T 1",
    ),
    ("5.1", "it helps a pair that does not fail, too", "", "real cold start", "a little"),
    (
        "5.2",
        "the teacher's template helps",
        "5.2 template",
        "again 5.2 template",
        "use it where you know it: .03 on the toy, as much as the noise; "
        ".07 with its wording on the real model",
    ),
    (
        "5.2",
        "the teacher's own prompts help",
        "5.2 content",
        "",
        "mix them with others, a quarter to three quarters",
    ),
    ("6.1", "short responses teach little", "6.1 short", "", "leave room to finish"),
    (
        "6.1",
        "long ones collapse, from the end",
        "6.1 long; 6.1 backwards",
        "",
        "not to be seen here: the responses of a run that works do not grow",
    ),
    (
        "6.1",
        "deep in a response the teacher helps less",
        "6.1 depth",
        "",
        "late, few mistakes are left to avoid, which explains it",
    ),
    (
        "6.2",
        "a good teacher's mean reward ranks answers",
        "6.2 success",
        "real reward",
        "it can sort answers",
    ),
    (
        "6.2",
        "a failing teacher's does so too",
        "6.2 global",
        "",
        "a low AUROC is a warning, a high one no promise: .70 to .89 with a real one",
    ),
    (
        "6.2",
        "hypothesis: a failing teacher's gradients cancel",
        "6.2 coherence, bigger; 6.2 coherence, other",
        "",
        "they do not: they lead somewhere wrong",
    ),
    (
        "6.3",
        "only the single likeliest token is too few",
        "6.3 support",
        "",
        "k from 4 to 32, or all",
    ),
    (
        "ours",
        "Eq. 3, 4 and 5 end alike",
        "2.2 estimators",
        "again 2.2 estimators",
        "on the toy Eq. 5 stops a little short of Eq. 4 in long runs",
    ),
    (
        "ours",
        "unlike ends ruin, merged ends mend",
        "ends start; ends merged; ends own",
        "",
        "leave `--ends merged`",
    ),
    (
        "ours",
        "the diagnosis ranks gains beforehand",
        "forecast rank; forecast promise",
        "",
        "run `analysis.py` before you train; of three real teachers that it promised, one failed",
    ),
    (
        "2609.04172",
        "one prompt gives most of the gain",
        "later one prompt",
        "again one prompt",
        "take many prompts",
    ),
    (
        "2605.27028",
        "the first 30 % of tokens suffice",
        "later first 30 %",
        "again first 30 %",
        "leave room to finish",
    ),
    (
        "2606.09471",
        "where a run fails its KL may halve",
        "later low KL",
        "again low KL",
        "look at accuracy: while it collapses the KL falls, too",
    ),
    (
        "ours",
        "a sharpened teacher teaches the same",
        "later sharp",
        "",
        "a sharper teacher taught more",
    ),
    (
        "ours",
        "the sampled token stops ending in long runs",
        "later no end",
        "",
        "not seen in 400 steps",
    ),
)


def results_of(results):
    """{script: its results file}, of those that have one."""
    return {
        script: json.loads(path.read_text())
        for script in PAPER
        if (path := results / f"{script}.json").exists()
    }


def judged(made):
    """[(name, criterion, found, holds)] of all scripts."""
    return [
        line
        for script, results in made.items()
        for line in importlib.import_module(script).judge(results["runs"])
    ]


def row(*cells):
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def criteria(made):
    """A row a criterion: the paper's number, the criterion, what was found, whether it holds."""
    paper = {name: said for names in PAPER.values() for name, said in names.items()}
    head = [
        row("finding", "paper", "criterion", "ours, mean over seeds", "holds"),
        "|---|---|---|---|---|",
    ]
    return (
        "\n".join(
            head
            + [
                row(name, paper[name], criterion, found, "yes" if holds else "**no**")
                for name, criterion, found, holds in judged(made)
            ]
        )
        + "\n"
    )


def summed_up(names, holds):
    """One word for several criteria, "; " between their names: all hold, none, or some."""
    held = [holds[name] for name in names.split("; ") if name in holds]
    if not held:
        return ""
    return "holds" if all(held) else "partly" if any(held) else "**does not**"


def findings(made):
    """A row a finding: the claim, whether it holds on the toy and on the real model, what it
    means."""
    holds = {name: held for name, _, _, held in judged(made)}
    return (
        "\n".join(
            [
                row("", "claim", "toy", "real model", "what it means for you"),
                "|---|---|---|---|---|",
            ]
            + [
                row(section, claim, summed_up(toy, holds), summed_up(real, holds), means)
                for section, claim, toy, real, means in FINDINGS
            ]
        )
        + "\n"
    )


def scripts(made):
    """A row a script: what it asks, by its first line, and what it took; all of it on two cores."""
    lines = [
        row("script", "what it asks", "seeds", "seconds of one thread", "commit"),
        "|---|---|---|---|---|",
    ]
    for script, results in made.items():
        about = lab.first_sentence(importlib.import_module(script).__doc__)
        asks = about.split(": ", 1)[1].rstrip(".")
        lines.append(
            row(
                f"[{script}.py]({script}.py)",
                asks,
                str(len({run["seed"] for run in results["runs"]})),
                f"{results['seconds'] * results['threads']:,}",
                results["commit"],
            )
        )
    hours = sum(results["seconds"] * results["threads"] for results in made.values()) / 7200
    return (
        "\n".join(lines)
        + f"\n\nAll of them: {hours:.1f} hours on 2 cores, two side by side with one thread each.\n"
    )


def printed(path, start=""):
    """The lines that a script wrote, from the first that begins so, as a block of Markdown."""
    text = "\n" + path.read_text().strip()
    return "```text\n" + text[text.index(f"\n{start}") + 1 :] + "\n```\n"


def put(made, name, text):
    """A page with `made` between its two markers of that name: str."""
    first, last = MARKERS[name]
    if first not in text or last not in text:
        raise SystemExit(
            f"experiments/README.md: put the lines {first.strip()} and {last.strip()} "
            "where it belongs"
        )
    before, rest = text.split(first)
    return before + first + made + last + rest.split(last)[1]


def main():
    readme, results = lab.ROOT / "experiments" / "README.md", lab.ROOT / "experiments" / "results"
    made, text = results_of(results), readme.read_text()
    (results / "findings.md").write_text(criteria(made))
    for name, table in (
        ("findings", findings(made)),
        ("scripts", scripts(made)),
        ("forecast", printed(results / "forecast.txt", "Spearman")),
        ("bench", printed(results / "bench.txt")),
    ):
        text = put(table, name, text)
    readme.write_text(text)
    front = lab.ROOT / "README.md"
    before, _, rest = front.read_text().partition(STEP)
    front.write_text(
        before + STEP + inspect.getsource(lab.opd.update) + rest[rest.index("```\n") :]
    )
    print(findings(made))
    for script in made:
        getattr(plot, script)(results / f"{script}.json", results / f"{script}.svg")
    plot.overview(results, results / "overview.svg")


if __name__ == "__main__":
    main()
