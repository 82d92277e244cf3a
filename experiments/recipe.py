"""experiments/recipe.py: how to recover a run that fails (paper 5), on the toy world; three
seeds, five in results.

5.1, off-policy cold start. Student small, teacher big and post-trained, of the *other* family:
the pair that fails.
    opd                       200 steps of OPD
    sft 100                   a cold start alone: 100 SFT steps on 1,024 of the teacher's responses
    sft 100 + opd             the same, then 200 steps of OPD on other prompts
    sft 100 T.7, + opd        both, with responses drawn as in the paper, at temperature .7 and
                              top-p .95, not 1 and 1
    sft 300                   300 SFT steps on the same responses: as many updates as sft 100 +
                              opd, no OPD
    sft 300, fresh            300 SFT steps on 4,095 responses: as many updates, new responses in
                              place of OPD
    sft 300 T.7, and fresh    both, with responses drawn at temperature .7 and top-p .95
    holds if, in the mean over seeds: gap recovery < .2 for opd, < .5 for sft 100 alone, >= .8 for
    sft 100 + opd; and if sft 100 + opd ends above opd and above both sft 300 by more than noise
    (two standard errors); and the same of sft 100 T.7 + opd and the two sft 300 T.7, which were
    added last, after five seeds without them (commit 54e2e90). A first version (commit 0f8080b),
    T .7, 60 or 80 SFT steps and 100 of OPD, missed the last criterion: .53 and .32. Temperature
    and steps were then chosen on the worlds of seeds 4 and 5, after a look at why seed 0 failed.

5.2, teacher-aligned prompts. Student and teacher were pre-trained on two templates; the teacher
was post-trained under one of them and on lists of low digits only (0 to 4). The student is
distilled on low ("aligned") or high digits (5 to 9), under the teacher's template or the other,
and on mixtures. Accuracy is measured on digits 0 to 9, under both templates.
    template   holds if aligned - unaligned accuracy, mean over both evaluation templates, exceeds
               two standard errors
    content    holds if accuracy, under the teacher's template, is higher by more than two standard
               errors, and the student's entropy lower, with aligned content
    mixing     aligned fractions 0, .25, .5, .75, 1: the paper asks for it and does not run it; no
               criterion
    selection  in results only: a search for the teacher's template and prompts in a pool, which
               told them apart by so little that it was removed

    python experiments/recipe.py              results/recipe.{json,txt,svg}
    python experiments/recipe.py --quick      one seed, few steps: does it run?
"""

import math
from statistics import mean

import plot
from lab import (
    analysis,
    difference,
    distil,
    load,
    main,
    make_models,
    recovery,
    told,
    toy,
    verdicts,
    write_text,
)

from plumbing.answers import answered
from plumbing.prompts import encode_rows, load_prompts
from recipes import in_template

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
LOW, HIGH = (0, 4), (5, 9)
TEMPLATES = {"aligned": toy.POLITE, "unaligned": toy.PLAIN}


def seed_runs(seed, world, scratch, quick):
    return cold_starts(seed, world, scratch, quick) + prompts(seed, world, scratch, quick)


# --- 5.1 ------------------------------------------------------------------------------------------


def cold_starts(seed, world, scratch, quick):
    make_models(world, seed)
    few, sft, opd_steps = (64, 1, 2) if quick else (1024, 100, 200)
    cold, control = (
        dict(cold_start=few, cold_start_steps=sft),
        dict(cold_start_steps=sft + opd_steps, steps=0),
    )
    sharp, runs = dict(cold_start_temperature=0.7, cold_start_top_p=0.95), []
    for arm, settings in (
        ("opd", {}),
        ("sft 100 + opd", cold),
        ("sft 100 T.7 + opd", {**cold, **sharp}),
        ("sft 300", dict(control, cold_start=few)),
        ("sft 300, fresh", dict(control, cold_start=4 * few - 1)),
        ("sft 300 T.7", dict(control, cold_start=few, **sharp)),
        ("sft 300 T.7, fresh", dict(control, cold_start=4 * few - 1, **sharp)),
    ):
        result = distil(
            world / "student",
            world / "other",
            world,
            scratch / f"{arm}-{seed}",
            seed=seed,
            eval_n=1 if quick else 4,
            eval_every=max(1, opd_steps // 5),
            **{"steps": opd_steps, **settings},
        )
        runs.append({"part": "5.1", "arm": arm, "seed": seed, **result})
        if arm.endswith("+ opd"):
            kept = ("accuracy_teacher", "accuracy_before", "held_out_before", "commit")
            runs.append(
                {
                    "part": "5.1",
                    "arm": arm.removesuffix(" + opd"),
                    "seed": seed,
                    **{name: result[name] for name in kept},
                    "accuracy_after": result["accuracy_cold_start"],
                    "held_out_after": result["held_out_cold_start"],
                }
            )
    return runs


# --- 5.2 ------------------------------------------------------------------------------------------


def prompts(seed, world, scratch, quick):
    world = world / "templates"
    if not (world / "teacher" / "config.json").exists():
        world.mkdir(parents=True, exist_ok=True)
        both = dict(templates=(toy.PLAIN, toy.POLITE))
        toy.make(world / "student", seed=100 * seed + 71, **both)
        toy.make(world / "bigger", size="large", seed=100 * seed + 72, **both)
        toy.make(
            world / "teacher",
            start=world / "bigger",
            house_style=True,
            rounds=toy.ROUNDS,
            seed=100 * seed + 73,
            post_template=toy.POLITE,
            post_digits=LOW,
            rehearse=True,
        )
        for name, digits, number in (("low", LOW, 1), ("high", HIGH, 2), (".", (0, 9), 3)):
            (world / name).mkdir(exist_ok=True)
            toy.write_questions(world / name, seed=100 * seed + number, digits=digits)
    runs, steps = [], 3 if quick else 100

    def arm(template, fraction):
        out = scratch / f"{template}-{fraction}-{seed}"
        result = distil(
            world / "student",
            world / "teacher",
            world,
            out,
            seed=seed,
            steps=steps,
            eval_n=1 if quick else 2,
            template=TEMPLATES[template],
            prompts=str(world / "high" / "prompts.jsonl"),
            aligned_prompts=str(world / "low" / "prompts.jsonl"),
            aligned_fraction=fraction,
        )
        del result["curves"]
        runs.append(
            {
                "part": "5.2",
                "arm": f"{template} template, {fraction:.2f} aligned content",
                "seed": seed,
                "template": template,
                "fraction": fraction,
                **result,
                "accuracies": accuracies(out / "student", world, seed, quick),
            }
        )

    for fraction in FRACTIONS:
        arm("aligned", fraction)
    for fraction in (0.0, 1.0):
        arm("unaligned", fraction)
    for model in ("student", "teacher"):
        runs.append(
            {
                "part": "5.2",
                "arm": model,
                "seed": seed,
                "accuracies": accuracies(world / model, world, seed, quick),
            }
        )
    return runs


def accuracies(model, world, seed, quick):
    """{"<template>, <digits>": accuracy} of a saved model."""
    pair, out = load(model, model), {}
    for template, text in TEMPLATES.items():
        for digits in (".", "low", "high"):
            rows = in_template(
                load_prompts(world / digits / "eval.jsonl")[: 16 if quick else 256], text
            )
            rows = encode_rows(pair, rows, max_prompt_tokens=64, new_tokens=96)
            right, truncated = answered(pair, rows, n=4, max_new_tokens=96, seed=seed)  # (rows, 4)
            out[f"{template}, {'all' if digits == '.' else digits}"] = {
                **analysis.estimate(right.double().mean(1)),
                "samples": right.numel(),
                "truncated": truncated.double().mean().item(),
            }
    return out


# --- the report -----------------------------------------------------------------------------------


def report(made, out):
    lines = report_cold_starts(made["runs"]) + [""] + report_prompts(made["runs"]) + [""]
    write_text("\n".join(lines + verdicts(judge(made["runs"]))), made, out)
    plot.recipe(out.with_suffix(".json"), out.with_suffix(".svg"))


def judge(runs):
    """The criteria above, on the mean over seeds: [(name, criterion, what was found, does it
    hold)]."""
    cold = {
        arm: sorted((r for r in runs if r["arm"] == arm), key=lambda r: r["seed"])
        for arm in plot.ARMS
    }
    lines = []
    for arm, sign, bound in (
        ("opd", "<", 0.2),
        ("sft 100", "<", 0.5),
        ("sft 100 + opd", ">=", 0.8),
    ):
        recovered = [recovery(r) for r in cold[arm]]
        value = math.nan if None in recovered else mean(recovered)
        lines.append(
            (
                f"5.1 {arm}",
                f"gap recovery {sign} {bound}",
                f"{value:.3f}",
                value < bound if sign == "<" else value >= bound,
            )
        )
    for T in ("", " T.7"):
        controls = ("opd", f"sft 300{T}", f"sft 300{T}, fresh")
        against = [difference(cold[f"sft 100{T} + opd"], cold[arm]) for arm in controls]
        lines.append(
            (
                f"5.1 cold start{T}",
                f"above {', '.join(controls)}",
                ", ".join(told(gain, noise) for gain, noise in against),
                all(gain > noise for gain, noise in against),
            )
        )
    arms, all_digits = by_template(runs), ("aligned, all", "unaligned, all")
    aligned, unaligned, other_content = (
        [r["accuracies"] for r in arms[arm]]
        for arm in (("aligned", 1.0), ("unaligned", 1.0), ("aligned", 0.0))
    )
    gain, noise = difference(aligned, unaligned, all_digits)
    lines.append(
        ("5.2 template", f"aligned - unaligned > {noise:.3f}", f"{gain:+.3f}", gain > noise)
    )
    gain, noise = difference(aligned, other_content, all_digits[:1])
    ours, theirs = entropy(arms["aligned", 1.0]), entropy(arms["aligned", 0.0])
    lines.append(
        (
            "5.2 content",
            f"gain > {noise:.3f} and lower entropy",
            f"{gain:+.3f}, H {ours:.3f} against {theirs:.3f}",
            gain > noise and ours < theirs,
        )
    )
    return lines


def by_template(runs):
    """The runs of 5.2: {(template, fraction): one a seed}."""
    arms = {}
    for r in sorted((r for r in runs if "fraction" in r), key=lambda r: r["seed"]):
        arms.setdefault((r["template"], r["fraction"]), []).append(r)
    return arms


def entropy(arm):
    return mean(r["held_out_after"]["entropy_student"] for r in arm)


def report_cold_starts(runs):
    """5.1: every run; a list of lines."""
    lines = [
        f"{'5.1 arm':18} {'seed':>4} {'teacher':>8} {'before':>7} {'after':>7} {'recovery':>9} "
        f"{'overlap':>8} {'masses at the end':>18} {'H student':>9}"
    ]
    for r in sorted(
        (r for r in runs if r["part"] == "5.1"),
        key=lambda r: (plot.ARMS.index(r["arm"]), r["seed"]),
    ):
        recovered, b = recovery(r), r["held_out_after"]
        lines.append(
            f"{r['arm']:18} {r['seed']:4d} {r['accuracy_teacher']['mean']:8.3f} "
            f"{r['accuracy_before']['mean']:7.3f} {r['accuracy_after']['mean']:7.3f} "
            f"{'none' if recovered is None else f'{recovered:.3f}':>9} {b['overlap_ratio']:8.3f} "
            f"{b['overlap_mass_student']:9.3f} {b['overlap_mass_teacher']:8.3f} "
            f"{b['entropy_student']:9.3f}"
        )
    return lines


def report_prompts(runs):
    """5.2: every run, then what has no criterion; a list of lines."""
    titles = [
        f"{template}, {digits}" for template in TEMPLATES for digits in ("all", "low", "high")
    ]
    lines = [
        "5.2: accuracy on problems with all, low, high digits, "
        "evaluated under the teacher's template and under the other",
        f"{'arm':42} {'seed':>4} "
        + " ".join(
            f"{t.replace('unaligned', 'other').replace('aligned', 'teacher'):>13}" for t in titles
        )
        + f" {'H student':>9}",
    ]
    mine = [r for r in runs if r["part"] == "5.2" and r["arm"] != "selection"]
    order = list(dict.fromkeys(r["arm"] for r in mine))
    for r in sorted(mine, key=lambda r: (order.index(r["arm"]), r["seed"])):
        H = f"{r['held_out_after']['entropy_student']:9.3f}" if "held_out_after" in r else ""
        lines.append(
            f"{r['arm']:42} {r['seed']:4d} "
            + " ".join(f"{r['accuracies'][t]['mean']:13.3f}" for t in titles)
            + f" {H:>9}"
        )

    arms = by_template(runs)
    for key, name in (("aligned, all", "teacher"), ("unaligned, all", "other")):
        each, error = difference(
            *([r["accuracies"] for r in arms[arm, 1.0]] for arm in TEMPLATES), (key,)
        )
        lines.append(f"template, evaluated under the {name} one alone: {told(each, error)}")
    mixtures = []
    for fraction in FRACTIONS:
        mine = arms["aligned", fraction]
        accuracy = mean(r["accuracies"]["aligned, all"]["mean"] for r in mine)
        mixtures.append(f"{fraction:.2f}: accuracy {accuracy:.3f}, H {entropy(mine):.3f}")
    lines.append("mixing, mean over seeds: " + "; ".join(mixtures))
    for r in runs:
        if r["arm"] == "selection":
            lines.append(
                f"selection, seed {r['seed']}: {r['aligned_share_of_the_kept_half']:.3f} of the "
                "kept half is aligned content (chance .5); scores of the templates: "
                + ", ".join(f"{t!r} {s:.4f}" for t, s in r["templates"].items())
                + (", the teacher's found" if r["template_found"] else ", the teacher's NOT found")
            )
    return lines


if __name__ == "__main__":
    main(
        "recipe",
        __doc__,
        seed_runs,
        report,
        curves=("step", "overlap_ratio", "accuracy"),
    )
