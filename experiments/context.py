"""experiments/context.py: a model learns from itself: the teacher is the same checkpoint and may
read the worked answer.

The student is asked "8 + 3 + 9" as a chat, with two worked examples before. Its teacher reads
"8 + 3 + 9 (8 + 3 = 11, 11 + 9 = 20)", in the examples, too. So the two think alike, and what is
new comes from what the teacher may read (the paper's outlook names such a teacher). Accuracy is
measured on held-out sums, which the student is asked without the hint.

    python experiments/context.py
        writes runs/context/prompts.jsonl and eval.jsonl, for the command in ../README.md
    python experiments/context.py --base DIR_OR_HUB
        trains and measures the arms below: results/context/ARM-SEED.json, context.{txt,svg}

The base is SmolLM2-135M-Instruct. The arms differ in the teacher alone:

    hint        the base, which reads the worked answer
    other sum   the base, which reads the worked answer of another sum: format without knowledge
    expert      the base after three rounds of expert iteration (sums.py), which reads what the
                student reads: knowledge in the weights

Criteria, fixed before the first run, three seeds. "Lead" is the teacher's over the student before.
    hint        the lead is .3 or more, greedily, in every seed
    learnt      the student makes up .8 of the lead, greedily and at T .7, in every seed
    knowledge   hint ends above other sum, greedily
    format      other sum ends where the student began, greedily
    expert      hint and expert end alike, greedily
    masses      both overlap masses are .95 or more at the first step of hint (the paper: .97)
    aligning    in hint the overlap ratio rises and the reverse KL falls below a half, in every seed
"""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from statistics import mean

import plot
import sums
import toy
from lab import (
    RESULTS,
    above,
    commit_of,
    curves,
    each,
    equal,
    every_seed,
    file_name,
    finding,
    first_sentence,
    mean_over_seeds,
    once,
    refuse_another,
    share,
    so_far,
    verdicts,
)

import opd
from analysis import ahead, plus_minus
from plumbing import figures, files, models
from plumbing.exits import one_line
from plumbing.flags import Config
from rollout import seed_of

ARMS = ("hint", "other sum", "expert")
HELD_OUT = 64
ENDS = 3  # steps at either end that are averaged
SETTINGS = dict(steps=16, batch_size=16, lr=1e-5, max_new_tokens=48)
QUICK = dict(steps=4, batch_size=2, max_new_tokens=8, eval_n=1)

# --- the questions --------------------------------------------------------------------------------


def hinted(digits, solved):
    """What the teacher reads: the sum of digits, and the worked answer of the sum `solved`."""
    a, b, c = solved
    return f"{' + '.join(map(str, digits))} ({a} + {b} = {a + b}, {a + b} + {c} = {a + b + c})"


def row(digits, solved=None):
    """A line of the files: what the student reads, what the teacher reads, and the answer.

    solved: the digits whose worked answer the teacher reads, None for no teacher_prompt.
    """
    made = sums.question(digits)
    if solved is not None:
        examples = [(hinted(x, x), x) for x in sums.EXAMPLES]
        made["teacher_prompt"] = sums.chat("Add.", examples, hinted(digits, solved))
    return made


def write_questions(folder, seed, arm="hint", held_out=HELD_OUT):
    """Write prompts.jsonl and eval.jsonl: all sums of three digits from 1 to 9 but the examples."""
    asked = sums.all_sums(seed_of(seed, "context"))
    others = asked[1:] + asked[:1]  # for each sum another one
    rows = []
    for digits, other in zip(asked, others):
        solved = {"hint": digits, "other sum": other, "expert": None}[arm]
        rows.append(row(digits, solved))
    folder.mkdir(parents=True, exist_ok=True)
    files.write_lines(folder / "eval.jsonl", rows[:held_out])
    files.write_lines(folder / "prompts.jsonl", rows[held_out:])


# --- the runs -------------------------------------------------------------------------------------


def expert(base, folder, seed, quick):
    """The base after expert iteration on the training sums, made if it is not there: -> folder."""
    if not toy.is_made(folder):
        pair = models.load_pair(base, base, device="cpu")
        rows = sums.encoded(pair, folder.parent / "expert-questions" / "prompts.jsonl")
        rounds, samples = (1, 8) if quick else (sums.ROUNDS, sums.SAMPLES)
        for _ in sums.expert_iteration(pair, rows, rounds, seed, samples):
            pass
        toy.save_whole(folder, pair.student, pair.tokenizer)
    return folder


def train(arm, base, folder, seed, quick):
    """Run opd.py, or go on with a run that was killed: -> what the result holds."""
    questions = folder / f"{arm.replace(' ', '-')}-questions"
    write_questions(questions, seed, arm, 4 if quick else HELD_OUT)
    out = folder / arm.replace(" ", "-")
    teacher = base
    if arm == "expert":
        teacher = str(expert(base, folder / f"expert-of-{Path(base).name}", seed, quick))
    cfg = Config(
        student=base,
        teacher=teacher,
        prompts=str(questions / "prompts.jsonl"),
        eval=(str(questions / "eval.jsonl"),),
        out=str(out),
        seed=seed,
        **{**SETTINGS, **(QUICK if quick else {})},
    )
    refuse_another(out, {"student": base, "teacher": teacher, **SETTINGS})
    if not (out / "result.json").exists():
        is_begun = (out / "checkpoint" / "state.pt").exists()
        opd.distil(dataclasses.replace(cfg, resume=is_begun))
    found = files.read_json(out / "result.json")
    made = {"curves": curves(figures.read_rows(out))}
    made["accuracy"] = {}
    for when in ("before", "after", "teacher"):
        made["accuracy"][when] = {
            "T .7": found[f"accuracy_{when}"],
            "greedy": found[f"greedy_{when}"],
        }
    for when in ("before", "after"):
        made[f"held_out_{when}"] = found[f"held_out_{when}"]
        made[f"held_out_{when}"].pop("by_position", None)
    return made


# --- what was found -------------------------------------------------------------------------------


def greedy_difference(ours, theirs, than="after"):
    """The greedy accuracy of one arm after training minus that of another: Difference.

    than: when the other is measured, "before" or "after". Both have the same seeds.
    """
    found = []
    for a, b in zip(ours, theirs, strict=True):
        assert a["seed"] == b["seed"]
        found.append(ahead(a["accuracy"]["after"]["greedy"], b["accuracy"][than]["greedy"]))
    means = [x["mean"] for x in found]
    return mean_over_seeds(means, [x["standard_error"] ** 2 for x in found])


def lead(run, way, when="teacher"):
    """How far the teacher, or the student after training, is ahead of the student before: float."""
    return run["accuracy"][when][way]["mean"] - run["accuracy"]["before"][way]["mean"]


def recovered(run, way):
    """The share of its teacher's lead that the student made up: float."""
    return share(lead(run, way, "after"), lead(run, way))


def ends(run, name):
    """The means of a metric over the first and over the last steps."""
    values = run["curves"][name]
    return mean(values[:ENDS]), mean(values[-ENDS:])


def judge(results):
    """{arm: [result, one a seed]} -> the findings, in the order of the criteria."""
    for found in claims(results):
        yield so_far(found, len(results["hint"]))


def claims(results):
    """The findings on the seeds that are there, however few."""
    hint = results["hint"]
    other = results["other sum"]
    leads = [lead(run, "greedy") for run in hint]
    yield finding(
        "outlook",
        "the same model is right more often if it reads the worked answer",
        "not run",
        f"lead {each(leads)} greedily",
        every_seed(x >= 0.3 for x in leads),
    )
    greedy = [recovered(run, "greedy") for run in hint]
    sampled = [recovered(run, "T .7") for run in hint]
    yield finding(
        "outlook",
        "the student learns from itself what it could not do without the hint",
        "not run",
        f"recovery {each(greedy)} greedily, {each(sampled)} at T .7",
        every_seed(x >= 0.8 for x in [*greedy, *sampled]),
    )
    x = greedy_difference(hint, other)
    yield finding(
        "outlook",
        "a worked answer teaches more than a worked answer of another sum",
        "not run",
        f"{x} greedily",
        above(x),
    )
    x = greedy_difference(other, other, "before")
    yield finding(
        "outlook",
        "the worked answer of another sum teaches nothing",
        "not run",
        f"gain {x} greedily",
        equal(x),
    )
    if "expert" in results:
        x = greedy_difference(hint, results["expert"])
        yield finding(
            "outlook",
            "the hint teaches as much as an expert of the same size",
            "not run",
            f"{x} greedily",
            equal(x),
        )
    masses = []
    for run in hint:
        of_both = [run["curves"][f"overlap_mass_{side}"][0] for side in ("student", "teacher")]
        masses.append(min(of_both))
    yield finding(
        "4.1",
        "the shared tokens hold nearly all of both models' mass from the first step on",
        ".97 to .99 throughout, in failure too, so it tells nothing by itself",
        f"the smaller of the two {each(masses, '.3f')}",
        every_seed(x >= 0.95 for x in masses),
    )
    overlaps = [ends(run, "overlap_ratio") for run in hint]
    kls = [ends(run, "reverse_kl") for run in hint]
    rises = [last - first for first, last in overlaps]
    falls = [last / first for first, last in kls]
    yield finding(
        "4.1",
        "the overlap ratio rises, the reverse KL falls below a half",
        "overlap about .72 to above .91",
        f"overlap by {each(rises)}, KL to {each(falls)} of its size",
        every_seed(x > 0 for x in rises),
        every_seed(x < 0.5 for x in falls),
    )


def table(results):
    """A line for each run: accuracies before, after, and of the teacher."""
    lines = [f"{'teacher':10} seed {'greedy: before, after, teacher':>46} {'T .7':>46}"]
    for arm, runs in results.items():
        for run in runs:
            cells = []
            for way in ("greedy", "T .7"):
                three = [run["accuracy"][when][way] for when in ("before", "after", "teacher")]
                cells.append("  ".join(map(plus_minus, three)))
            lines.append(f"{arm:10} {run['seed']:4d} {cells[0]:>46} {cells[1]:>46}")
    return lines


def read_results(out):
    """{arm: [result, one a seed]} of the seeds that have every arm.

    The expert is left out until it has all seeds of hint. SystemExit if no seed is complete.
    """
    found = {}
    for arm in ARMS:
        found[arm] = {}
        for path in (out / "context").glob(file_name(arm, "*")):
            run = files.read_json(path)
            found[arm][run["seed"]] = run
    if not found["hint"].keys() <= found["expert"].keys():
        del found["expert"]
    seeds = sorted(set.intersection(*(set(of_arm) for of_arm in found.values())))
    if not seeds:
        raise SystemExit("no seed has all arms yet; python experiments/context.py --base DIR")
    return {arm: [of_arm[seed] for seed in seeds] for arm, of_arm in found.items()}


def told(results):
    """All that is said of the results: every run, findings, commits: str."""
    runs = [run for of_arm in results.values() for run in of_arm]
    lines = [*table(results), "", *verdicts(judge(results)), ""]
    lines.append(
        f"T .7 with top-p .95, 4 answers to each of {HELD_OUT} held-out sums; greedily one. "
        "The student is asked without the hint. ± is noise, 95 %; +- is one standard error."
    )
    commits = sorted({commit_of(run) for run in runs})
    seconds = sum(run["seconds"] for run in runs)
    lines.append(f"commits {', '.join(commits)}; {seconds:.0f} CPU seconds")
    return "\n".join(lines)


def report(out):
    """Write context.txt and context.svg from the results."""
    results = read_results(out)
    text = told(results)
    print(text)
    (out / "context.txt").write_text(text + "\n")
    plot.context(results, out / "context")


def main():
    parser = argparse.ArgumentParser(description=first_sentence(__doc__))
    parser.add_argument("--base", help="train and measure the arms with this chat model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument(
        "--arms", nargs="+", default=ARMS, choices=ARMS, metavar="ARM", help="(all)"
    )
    parser.add_argument("--out", default=str(RESULTS), help="folder of the results")
    parser.add_argument("--runs", default="runs/context", help="folder of questions and runs")
    parser.add_argument(
        "--report", action="store_true", help="run nothing: make table and figure again"
    )
    parser.add_argument(
        "--quick", action="store_true", help="four steps of one seed; keeps nothing"
    )
    flags = parser.parse_args()
    folder = Path(flags.runs)
    if flags.report:
        report(Path(flags.out))
        return
    if not flags.base:
        write_questions(folder, flags.seeds[0])
        print(
            f"wrote {folder}/prompts.jsonl and {folder}/eval.jsonl; README.md has a run with them"
        )
        return
    models.check_directory(flags.base)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) if flags.quick else Path(flags.out)
        seeds = flags.seeds[:1] if flags.quick else flags.seeds
        for seed in seeds:
            for arm in flags.arms:
                where = (Path(scratch) if flags.quick else folder) / f"seed-{seed}"
                once(
                    out / "context" / file_name(arm, seed),
                    {"name": arm, "seed": seed},
                    {"model": Path(flags.base).name, **SETTINGS},
                    lambda arm=arm, seed=seed, where=where: train(
                        arm, flags.base, where, seed, flags.quick
                    ),
                )
                print(f"seed {seed}: {arm}", file=sys.stderr, flush=True)
        if tuple(flags.arms) == ARMS:
            report(out)


if __name__ == "__main__":
    with one_line("context.py"):
        main()
