"""experiments/real.py: a real language model learns a real skill from a post-trained copy of
itself (paper 3, 4, 5, 6).

The base (SmolLM2-135M-Instruct; --base takes any chat model) is asked as a chat to add three
digits, with two worked examples before: "5 + 6 + 9" -> "5 + 6 = 11, 11 + 9 = 20. Answer: 20". Its
teachers are copies of it:

    expert     after rounds of expert iteration: it answers new questions, and is fine-tuned on its
               right answers (3.2)
    copy       after as many rounds on its own answers, right or wrong, which teach it nothing new
               (3.2)
    backwards  fine-tuned on the same sums worked out from the right, "9 + 6 = 15, ...", then as
               expert (3.1)

and its runs, all with the same settings, questions and seed:

    success        base <- expert
    nothing new    base <- copy
    other way      base <- backwards
    cold start     base, fine-tuned on the answers of backwards first, <- backwards (5.1)
    intersection   base <- expert, only the tokens that both find likely (4.2)

Criteria, fixed before the first run of the script; three seeds. What is compared is compared
prompt by prompt:
    skill         the expert leads the base by .3 or more, and success makes up .8 of that lead or
                  more, in every seed
    masses        both overlap masses are .95 or more at the first step of success (the paper: .97
                  to .99 throughout, in its failing run too)
    overlap       the overlap ratio rises in success, first and last three steps, in every seed
    nothing new   the gain is below a quarter of that of success
    other way     the gain is below half of that of success, and a mass lies below .95 at the first
                  step
    cold start    ends above the other way without it by more than noise
    intersection  ends within .05 of success, noise included (lab.equal asks for more: they may
                  differ by so little)
    reward        AUROC of the mean reward for right answers, over all seeds: above .6 with expert;
                  the other's is told
Judged after the runs, by the toy's criteria (mechanism.py):
    gaps          overlap-token advantage, entropy gap and largest gap halve in success
    small loss    loss and gradient norm of nothing new begin below half of those of success

    python experiments/real.py --base DIR_OR_HUB    results/real.{json,txt,svg}; an hour a seed on
                                                    2 cores

With --runs DIR models and runs are kept, and what was killed goes on. (A teacher that works the
sums out in words was tried first, on seed 5: after 320 examples it was right .25 of the time, and
no better teacher.)
"""

import json
import math
import random
from statistics import mean

import plot
import torch
from real_lab import (
    MARGIN,
    analysis,
    difference,
    encoded,
    load,
    main,
    run,
    slots,
    verdicts,
    write,
    write_text,
)

from plumbing.answers import answered, read_answer, same_answer
from recipes import cold_start

NEEDED = {
    "base": "directory or hub name of a chat model that follows worked examples, and adds badly"
}
NEW_TOKENS, HELD_OUT, ROUNDS, SAMPLES = 48, 64, 3, 160
MICRO = 700  # tokens in a forward: .8 of the default's time
SETTINGS = dict(
    steps=12,
    batch_size=16,
    max_new_tokens=NEW_TOKENS,
    lr=1e-5,
    eval_n=6,
    eval_temperature=1.0,
    eval_top_p=1.0,
    eval_max_new_tokens=NEW_TOKENS,
    device="auto",
    micro_batch_tokens=MICRO,
)
COLD = dict(
    cold_start=96,
    cold_start_steps=6,
    cold_start_lr=3e-5,
    cold_start_temperature=1.0,
    cold_start_top_p=1.0,
)
RUNS = {
    "success": ("expert", {}),
    "nothing new": ("copy", {}),
    "other way": ("backwards", {}),
    "cold start": ("backwards", COLD),
    "intersection": ("expert", dict(support="intersection")),
}
ENDS = 3  # steps at either end that are averaged


# --- the questions --------------------------------------------------------------------------------


def steps_of(a, b, c):
    return f"{a} + {b} = {a + b}, {a + b} + {c} = {a + b + c}. Answer: {a + b + c}"


def backwards(a, b, c):
    return f"{c} + {b} = {b + c}, {b + c} + {a} = {a + b + c}. Answer: {a + b + c}"


EXAMPLES = ((5, 6, 9), (3, 8, 4))
PLAIN, WORDY = (
    ("Add.", "{} + {} + {}"),
    ("You are a careful accountant.", "What is the sum of {}, {} and {}?"),
)


def question(digits, template=PLAIN):
    """A row as load_prompts gives it: the chat, with two worked examples, and the sum."""
    system, asks = template
    chat = [{"role": "system", "content": system}]
    for example in EXAMPLES:
        chat += [
            {"role": "user", "content": asks.format(*example)},
            {"role": "assistant", "content": steps_of(*example)},
        ]
    return {
        "prompt": [*chat, {"role": "user", "content": asks.format(*digits)}],
        "answer": str(sum(digits)),
    }


def digits_of(row):
    return map(int, row["prompt"][-1]["content"].split(" + "))


def write_questions(world, seed):
    """All 729 sums of three digits from 1 to 9 but the examples, shuffled: world/eval.jsonl and
    prompts.jsonl, the latter in other words too (wordy.jsonl), and its first alone (one.jsonl).
    """
    sums = [(a, b, c) for a in range(1, 10) for b in range(1, 10) for c in range(1, 10)]
    sums = [digits for digits in sums if digits not in EXAMPLES]
    random.Random(seed).shuffle(sums)
    for name, part, template in (
        ("eval", sums[:HELD_OUT], PLAIN),
        ("prompts", sums[HELD_OUT:], PLAIN),
        ("wordy", sums[HELD_OUT:], WORDY),
        ("one", sums[HELD_OUT : HELD_OUT + 1], PLAIN),
    ):
        (world / f"{name}.jsonl").write_text(
            "".join(json.dumps(question(x, template)) + "\n" for x in part)
        )


# --- the teachers ---------------------------------------------------------------------------------


def fine_tune(pair, examples, seed, lr=3e-5):
    """One epoch over [(prompt ids, response ids)] in batches of 16."""
    optimizer = torch.optim.AdamW(pair.student.parameters(), lr=lr)
    for _ in cold_start(
        pair,
        optimizer,
        examples,
        steps=math.ceil(len(examples) / 16),
        lr=lr,
        batch_size=16,
        seed=seed,
    ):
        pass


def expert_iteration(pair, rows, rounds, seed, samples=SAMPLES, keep=same_answer):
    """Let the student of a pair answer new rows (of lab.encoded) each round, and fine-tune it on
    the finished answers for which keep(what it says, what is right) holds.
    """
    draw = random.Random(seed)
    for number in range(rounds):
        chosen = draw.sample(rows, min(samples, len(rows)))
        ids = [row["ids"] for row in chosen]
        r = write(pair, ids, max_new_tokens=NEW_TOKENS, seed=seed + number)
        said = [r.response_ids(i) for i in range(len(chosen))]
        good = [
            (row["ids"], ids)
            for row, ids, cut in zip(chosen, said, r.truncated.tolist())
            if not cut
            and keep(
                read_answer(pair.tokenizer.decode(ids, skip_special_tokens=True)), row["answer"]
            )
        ]
        print(f"round {number + 1}: {len(good)} of {len(chosen)} answers kept", flush=True)
        if good:
            fine_tune(pair, good, seed + number)


def taught(pair, rows, seed, count=SAMPLES):
    """Fine-tune the student of a pair on sums worked out from the right."""
    chosen = random.Random(seed).sample(rows, min(count, len(rows)))
    end = pair.tokenizer.eos_token_id
    fine_tune(
        pair,
        [
            (
                row["ids"],
                pair.tokenizer(backwards(*digits_of(row)), add_special_tokens=False).input_ids
                + [end],
            )
            for row in chosen
        ],
        seed,
    )


def teachers(base, world, seed, quick):
    """world/{expert,copy,backwards}, made where they are not there."""
    for name in ("expert", "copy", "backwards"):
        if (world / name / "tokenizer_config.json").exists():
            continue
        pair = load(base, base, device="auto", micro_batch_tokens=MICRO)
        rows = encoded(pair, world / "prompts.jsonl", max_prompt_tokens=512, new_tokens=NEW_TOKENS)
        rounds, samples = (1, 16) if quick else (ROUNDS, SAMPLES)
        if name == "backwards":
            taught(pair, rows, seed, samples)
            if not quick:
                expert_iteration(pair, rows, rounds - 1, seed)  # until it is as good
        else:
            expert_iteration(
                pair,
                rows,
                rounds,
                seed,
                samples,
                *([lambda said, right: True] if name == "copy" else []),
            )
        pair.student.save_pretrained(world / name)
        pair.tokenizer.save_pretrained(world / name)


# --- the runs -------------------------------------------------------------------------------------


def distilled(name, student, teacher, world, scratch, seed, quick, **how):
    """A run of SETTINGS and what `how` says, or what is there of it in scratch: its result, its
    curves."""
    settings = {**SETTINGS, "prompts": str(world / "prompts.jsonl"), **how}
    if quick:
        settings.update(steps=2, batch_size=4, max_new_tokens=8, eval_n=1, eval_max_new_tokens=8)
        if "cold_start" in how:
            settings.update(cold_start=8, cold_start_steps=1, cold_start_max_new_tokens=NEW_TOKENS)
    return {
        "run": name,
        "seed": seed,
        **run(
            **settings,
            student=str(student),
            teacher=str(teacher),
            seed=seed,
            eval=(str(world / "eval.jsonl"),),
            out=str(scratch / f"{name.replace(' ', '-')}-{seed}"),
        ),
    }


def seed_runs(seed, world, scratch, quick, base):
    world.mkdir(parents=True, exist_ok=True)
    write_questions(world, seed)
    teachers(base, world, seed, quick)
    made = [
        distilled(name, base, world / teacher, world, scratch, seed, quick, **how)
        for name, (teacher, how) in RUNS.items()
    ]
    for teacher in ("expert", "backwards"):
        pair = load(base, world / teacher, device="auto", micro_batch_tokens=MICRO)
        rows = encoded(
            pair,
            world / "eval.jsonl",
            4 if quick else 32,
            max_prompt_tokens=512,
            new_tokens=NEW_TOKENS,
        )
        found = analysis.diagnose_pair(
            pair,
            rows,
            answered=answered,
            rollout=slots.rollout,
            n=2,
            max_new_tokens=NEW_TOKENS,
            seed=seed,
            eval_temperature=1.0,
            eval_top_p=1.0,
        )
        made.append(
            {
                "run": f"diagnosis, {teacher}",
                "seed": seed,
                **{name: found.get(name) for name in ("verdict", "auroc", "predicted_gain")},
                "metrics": found["metrics"],
            }
        )
    return made


def of(runs, name):
    return [r for r in runs if r["run"] == name]


def gain(runs):
    """What the student gained, in each seed."""
    return [r["accuracy_after"]["mean"] - r["accuracy_before"]["mean"] for r in runs]


def first(runs, name):
    """A metric at the first step, in each seed."""
    return [r["curves"][name][0] for r in runs]


def judge(runs):
    """The criteria above: [(name, criterion, what was found, does it hold)]."""
    good, nothing, other, cold, shared = (of(runs, name) for name in RUNS)
    leads = [r["accuracy_teacher"]["mean"] - r["accuracy_before"]["mean"] for r in good]
    recovered = [a / (b or math.nan) for a, b in zip(gain(good), leads)]
    masses = {
        who: [
            min(first(part, f"overlap_mass_{side}")[i] for side in ("student", "teacher"))
            for i in range(len(part))
        ]
        for who, part in (("success", good), ("other way", other))
    }
    rise = [
        mean(r["curves"]["overlap_ratio"][-ENDS:]) - mean(r["curves"]["overlap_ratio"][:ENDS])
        for r in good
    ]
    gaps = {
        name: [
            mean(mean(r["curves"][name][part]) for r in good)
            for part in (slice(ENDS), slice(-ENDS, None))
        ]
        for name in ("overlap_token_advantage", "entropy_gap", "largest_gap")
    }
    begins = {
        name: [mean(first(part, name)) for part in (nothing, good)]
        for name in ("loss", "grad_norm")
    }
    better, noise = difference(cold, other)
    off, spread = difference(shared, good)
    auroc = {
        name: [r["auroc"] for r in of(runs, f"diagnosis, {name}")]
        for name in ("expert", "backwards")
    }

    def each(values, form="+.3f"):
        return ", ".join("none" if x is None else format(x, form) for x in values)

    return [
        (
            "real skill",
            "lead >= .3, .8 of it made up, each seed",
            f"lead {each(leads)}; of it {each(recovered, '.2f')}",
            min(leads) >= 0.3 and min(recovered) >= 0.8,
        ),
        (
            "real masses",
            "both >= .95 at the first step",
            each(masses["success"], ".3f"),
            min(masses["success"]) >= 0.95,
        ),
        ("real overlap", "the ratio rises, each seed", each(rise), min(rise) > 0),
        (
            "real gaps",
            "halve in success",
            "; ".join("{:+.4f} -> {:+.4f}".format(*ends) for ends in gaps.values()),
            all(abs(b) < abs(a) / 2 for a, b in gaps.values()),
        ),
        (
            "real small loss",
            "nothing new's loss and gradient < half of success's",
            "; ".join("{:.3f} against {:.3f}".format(*two) for two in begins.values()),
            all(a < b / 2 for a, b in begins.values()),
        ),
        (
            "real nothing new",
            "gain < a quarter of success's",
            f"{each(gain(nothing))} against {each(gain(good))}",
            mean(gain(nothing)) < mean(gain(good)) / 4,
        ),
        (
            "real other way",
            "gain < half of success's, a mass < .95",
            f"{each(gain(other))}; masses {each(masses['other way'], '.3f')}",
            mean(gain(other)) < mean(gain(good)) / 2 and max(masses["other way"]) < 0.95,
        ),
        (
            "real cold start",
            f"above the other way by > {noise:.3f}",
            f"{better:+.3f}",
            better > noise,
        ),
        (
            "real intersection",
            f"|it - success| + noise < {MARGIN}",
            f"{off:+.3f} (noise {spread:.3f})",
            abs(off) + spread < MARGIN,
        ),
        (
            "real reward",
            "AUROC > .6 with expert, each seed",
            f"{each(auroc['expert'], '.3f')}; with backwards {each(auroc['backwards'], '.3f')}",
            all(x is not None and x > 0.6 for x in auroc["expert"]),
        ),
    ]


def report(made, out):
    lines = [
        f"{'run':13} {'seed':>4} {'before':>7} {'after':>7} {'teacher':>8} {'overlap':>14} "
        f"{'reverse KL':>15} {'masses, first step':>18} {'s':>5}"
    ]
    for r in made["runs"]:
        if "curves" not in r:
            lines.append(
                f"{r['run']:18} {r['seed']:4d} {r['verdict']}; AUROC "
                f"{'none' if r['auroc'] is None else format(r['auroc'], '.3f')}"
            )
            continue
        a, b = r["held_out_before"], r["held_out_after"]
        lines.append(
            f"{r['run']:13} {r['seed']:4d} {r['accuracy_before']['mean']:7.3f} "
            f"{r['accuracy_after']['mean']:7.3f} {r['accuracy_teacher']['mean']:8.3f} "
            f"{a['overlap_ratio']:6.3f} -> {b['overlap_ratio']:.3f} "
            f"{a['reverse_kl']:6.3f} -> {b['reverse_kl']:.3f} "
            f"{r['curves']['overlap_mass_student'][0]:10.3f} "
            f"{r['curves']['overlap_mass_teacher'][0]:.3f} {r['seconds']:7.0f}"
        )
    write_text("\n".join(lines + verdicts(judge(made["runs"]))), made, out)
    plot.real(out.with_suffix(".json"), out.with_suffix(".svg"))


if __name__ == "__main__":
    main("real", __doc__, seed_runs, report, NEEDED)
