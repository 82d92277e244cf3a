"""experiments/again.py: what did not hold on the toy, and what later papers say, asked of the
real model of real.py.

Base, questions, expert and settings are those of real.py, whose runs of the same seeds are read
from its results: success (base <- expert) and other way (base <- a teacher that works the sums
out from the right). New here:

    sampled, full  base <- expert by Eq. 3 and Eq. 4 (2.2)
    reverse        expert <- base: the student's own earlier self teaches (3.3)
    unaligned      the same questions in other words, under another system prompt: not as the
                   teacher was post-trained, and not as all are measured (the paper measures under
                   the teacher's template, too) (5.2)
    first 30 %     responses of 8 tokens, of 27 that a solution takes; measured at 48 (arXiv
                   2606.22600)
    one prompt     the same question 16 times a step (2609.04172)
    words          base <- a copy that is fine-tuned on the sums in words, "Five plus six is
                   eleven, ...", until it is right .8 of the time: a way that the base does not
                   have (3.1)
    words, cold    the same after a cold start on its answers (5.1)

Criteria, fixed before the first run, those of the toy where it has one; three seeds, paired
prompt by prompt:
    2.2 estimators  sampled and success both end equal to full (lab.equal: within noise, and .05
                    noise included)
    3.3 reverse     ends equal to its teacher
    3.3 lost        loses .8 or more of what the expert had gained over the base, mean over seeds
    5.2 template    success ends above unaligned by more than noise
    one prompt      gains half of what success does, or more
    first 30 %      gains .8 of it, or more
    low KL          other way and words, where accuracy falls: the held-out reverse KL ends below
                    half of what it was (ours)
    words           a mass lies below .95 at the first step, and the gain is below half of that of
                    success
    words, cold     ends above words by more than noise

    python experiments/again.py --base DIR_OR_HUB --real experiments/results/real.json
    writes results/again.{json,txt,svg}

Two and a half hours a seed, of one thread. 6.1's long budgets need no run: hardly a response of
success is cut off at 48 tokens.
"""

import json
import math
import random
from pathlib import Path
from statistics import mean

import plot
from real import (
    MICRO,
    NEW_TOKENS,
    SAMPLES,
    digits_of,
    distilled,
    fine_tune,
    first,
    gain,
    of,
    teachers,
    write_questions,
)
from real_lab import difference, encoded, equal, load, main, told, verdicts, write_text

from plumbing.answers import answered

NEEDED = {
    "base": "the chat model of real.py",
    "real": "results file of real.py, of the same seeds and more",
}
SHARED = ("success", "other way")  # runs of real.py
COLD = dict(
    cold_start=160,
    cold_start_steps=10,
    cold_start_lr=1e-4,
    cold_start_temperature=1.0,
    cold_start_top_p=1.0,
)
RUNS = {  # name -> (student, teacher, settings)
    "sampled": ("base", "expert", dict(objective="sampled")),
    "full": ("base", "expert", dict(objective="full")),
    "reverse": ("expert", "base", {}),
    "unaligned": ("base", "expert", dict(prompts="wordy.jsonl")),
    "first 30 %": ("base", "expert", dict(max_new_tokens=8)),
    "one prompt": ("base", "expert", dict(prompts="one.jsonl")),
    "words": ("base", "words", {}),
    "words, cold": ("base", "words", COLD),
}
WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen
    seventeen eighteen nineteen twenty twenty-one twenty-two twenty-three twenty-four twenty-five
    twenty-six twenty-seven""".split()


def in_words(a, b, c):
    return (
        f"{WORDS[a].capitalize()} plus {WORDS[b]} is {WORDS[a + b]}, "
        f"{WORDS[a + b]} plus {WORDS[c]} is {WORDS[a + b + c]}. Answer: {a + b + c}"
    )


def teach_words(base, world, seed, quick):
    """world/words, made where it is not there: rounds of fine-tuning, until it answers .8 of new
    questions rightly."""
    if (world / "words" / "tokenizer_config.json").exists():
        return
    pair = load(base, base, device="auto", micro_batch_tokens=MICRO)
    draw = random.Random(seed)
    rows = encoded(pair, world / "prompts.jsonl", max_prompt_tokens=512, new_tokens=NEW_TOKENS)
    for number in range(1 if quick else 12):
        fine_tune(
            pair,
            [
                (
                    row["ids"],
                    pair.tokenizer(in_words(*digits_of(row)), add_special_tokens=False).input_ids
                    + [pair.tokenizer.eos_token_id],
                )
                for row in draw.sample(rows, 16 if quick else SAMPLES)
            ],
            seed + number,
            lr=1e-4,
        )
        asked = draw.sample(rows, 48)
        right = (
            answered(pair, asked, max_new_tokens=NEW_TOKENS, seed=seed + number)[0].float().mean()
        )
        print(f"words, round {number + 1}: {right:.2f} right", flush=True)
        if right >= 0.8:
            break
    pair.student.save_pretrained(world / "words")
    pair.tokenizer.save_pretrained(world / "words")


def runs_of(path, seed, names, script):
    """The runs of these names in the results of another script; SystemExit where one is missing."""
    found = [
        run
        for run in json.loads(Path(path).read_text())["runs"]
        if run["seed"] == seed and run["run"] in names
    ]
    if len(found) < len(names):
        raise SystemExit(
            f"{path} has no runs of seed {seed}: "
            f"python experiments/{script} --seeds {seed} makes them"
        )
    return found


def seed_runs(seed, world, scratch, quick, base, real):
    shared = runs_of(real, seed, SHARED, "real.py")
    world.mkdir(parents=True, exist_ok=True)
    write_questions(world, seed)
    teachers(base, world, seed, quick)
    teach_words(base, world, seed, quick)
    made = []
    for name, (student, teacher, how) in RUNS.items():
        student, teacher = (base if who == "base" else world / who for who in (student, teacher))
        if "prompts" in how:
            how = {**how, "prompts": str(world / how["prompts"])}
        made.append(distilled(name, student, teacher, world, scratch, seed, quick, **how))
    return shared + made


def judge(runs):
    """The criteria above: [(name, criterion, what was found, does it hold)]."""
    arms = {name: of(runs, name) for name in (*SHARED, *RUNS)}
    gains = {name: gain(mine) for name, mine in arms.items()}
    against = {name: difference(arms[name], arms["full"]) for name in ("sampled", "success")}
    reverse = arms["reverse"]
    off, noise = difference(reverse, reverse, than=("accuracy_teacher",))
    given = difference(reverse, reverse, ("accuracy_before",), ("accuracy_teacher",))[0]
    lost = -mean(gains["reverse"]) / (given or math.nan)
    ahead, spread = difference(arms["success"], arms["unaligned"])
    share = {
        name: mean(gains[name]) / (mean(gains["success"]) or math.nan)
        for name in ("one prompt", "first 30 %")
    }
    falls = [
        (r["held_out_before"]["reverse_kl"], r["held_out_after"]["reverse_kl"], lead)
        for name in ("other way", "words")
        for r, lead in zip(arms[name], gains[name])
        if lead < 0
    ]
    masses = [
        min(pair)
        for pair in zip(
            *(first(arms["words"], f"overlap_mass_{x}") for x in ("student", "teacher"))
        )
    ]
    better, doubt = difference(arms["words, cold"], arms["words"])

    def each(values):
        return ", ".join(f"{x:+.3f}" for x in values)

    return [
        (
            "again 2.2 estimators",
            "same end as Eq. 4",
            ", ".join(f"{name} {told(*x)}" for name, x in against.items()),
            all(equal(*x) for x in against.values()),
        ),
        ("again 3.3 reverse", "ends equal to its teacher", told(off, noise), equal(off, noise)),
        ("again 3.3 lost", ">= .8 of what it had gained", f"{lost:.2f}", lost >= 0.8),
        ("again 5.2 template", "success above unaligned", told(ahead, spread), ahead > spread),
        (
            "again one prompt",
            "half of the gain of success",
            f"{share['one prompt']:.2f}",
            share["one prompt"] >= 0.5,
        ),
        (
            "again first 30 %",
            ".8 of the gain of success",
            f"{share['first 30 %']:.2f}",
            share["first 30 %"] >= 0.8,
        ),
        (
            "again low KL",
            "where accuracy falls KL halves",
            "; ".join(f"{a:.2f} -> {b:.2f}, {x:+.3f}" for a, b, x in falls)
            or "accuracy falls nowhere",
            bool(falls) and all(b < a / 2 for a, b, _ in falls),
        ),
        (
            "again words",
            "a mass < .95, gain < half of success's",
            f"{each(gains['words'])} against {each(gains['success'])}; masses {each(masses)}",
            max(masses) < 0.95 and mean(gains["words"]) < mean(gains["success"]) / 2,
        ),
        (
            "again words, cold",
            "above words by more than noise",
            told(better, doubt),
            better > doubt,
        ),
    ]


def report(made, out):
    lines = [
        f"{'run':11} {'seed':>4} {'before':>7} {'after':>7} {'teacher':>8} {'overlap':>14} "
        f"{'reverse KL':>15} {'cut off':>7} {'s':>5}"
    ]
    for r in made["runs"]:
        a, b = r["held_out_before"], r["held_out_after"]
        lines.append(
            f"{r['run']:11} {r['seed']:4d} {r['accuracy_before']['mean']:7.3f} "
            f"{r['accuracy_after']['mean']:7.3f} {r['accuracy_teacher']['mean']:8.3f} "
            f"{a['overlap_ratio']:6.3f} -> {b['overlap_ratio']:.3f} "
            f"{a['reverse_kl']:6.3f} -> {b['reverse_kl']:.3f} {b['truncated_fraction']:7.3f} "
            f"{r['seconds']:5.0f}"
        )
    write_text("\n".join(lines + verdicts(judge(made["runs"]))), made, out)
    plot.again(out.with_suffix(".json"), out.with_suffix(".svg"))


if __name__ == "__main__":
    main(
        "again",
        __doc__,
        seed_runs,
        report,
        NEEDED,
        curves=(
            "step",
            "reverse_kl",
            "loss",
            "overlap_mass_student",
            "overlap_mass_teacher",
            "truncated_fraction",
        ),
    )
