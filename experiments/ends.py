"""experiments/ends.py: student and teacher end a response with different tokens (the paper's own
pairs of 3.1 and 5.1).

    ordinary   the success pair of the toy: both end with <eos>
    merged     its teacher with the rows of <eos> and <unk> exchanged in embedding and head, so
               that it ends with the other one; all ends are one event (--ends merged, the default)
    own        the same teacher, every token for itself, as in the authors' code (--ends own)

A teacher that differs in this alone knows what it knew. What holds:
    start      merged: reverse KL and overlap ratio on held-out prompts are the ordinary pair's to
               1e-6, in every seed
    merged     its student ends equal to the ordinary one (lab.equal: within noise, and noise
               included within .05)
    own        its student ends .3 or more below where it began, in every seed: it is taught never
               to end

    python experiments/ends.py              three seeds; results/ends.{json,txt,svg}
    python experiments/ends.py --quick      one seed, few steps: does it run?
"""

import plot
from lab import (
    MARGIN,
    difference,
    distil,
    equal,
    main,
    make_models,
    told,
    toy,
    verdicts,
    write_text,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

ARMS = {
    "ordinary": ("teacher", "merged"),
    "merged": ("teacher-unk", "merged"),
    "own": ("teacher-unk", "own"),
}


def other_end(world):
    """The teacher that ends with <unk>: a directory of its own beside it."""
    teacher, tokenizer = (
        kind.from_pretrained(world / "teacher") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    ends = [toy.ID["<eos>"], toy.ID["<unk>"]]
    for weight in (teacher.get_input_embeddings().weight, teacher.get_output_embeddings().weight):
        weight.data[ends] = weight.data[ends[::-1]]
    teacher.config.eos_token_id = teacher.generation_config.eos_token_id = ends[1]
    tokenizer.eos_token = "<unk>"
    teacher.save_pretrained(world / "teacher-unk")
    tokenizer.save_pretrained(world / "teacher-unk")


def seed_runs(seed, world, scratch, quick):
    make_models(world, seed)
    other_end(world)
    steps = 5 if quick else 100
    return [
        {
            "arm": arm,
            "seed": seed,
            **distil(
                world / "student",
                world / teacher,
                world,
                scratch / f"{arm}-{seed}",
                ends=ends,
                steps=steps,
                eval_every=steps // 5,
                eval_n=1 if quick else 4,
                seed=seed,
            ),
        }
        for arm, (teacher, ends) in ARMS.items()
    ]


def judge(runs):
    """The criteria above: [(name, criterion, what was found, does it hold)]."""
    arms = {arm: [r for r in runs if r["arm"] == arm] for arm in ARMS}
    off = max(
        abs(a["held_out_before"][name] - b["held_out_before"][name])
        for a, b in zip(arms["merged"], arms["ordinary"])
        for name in ("reverse_kl", "overlap_ratio")
    )
    gap, noise = difference(arms["merged"], arms["ordinary"])
    lost = [r["accuracy_after"]["mean"] - r["accuracy_before"]["mean"] for r in arms["own"]]
    return [
        ("ends start", "distances off by <= 1e-6", f"{off:.1e}", off <= 1e-6),
        (
            "ends merged",
            f"within noise, and {MARGIN}, of the ordinary pair",
            told(gap, noise),
            equal(gap, noise),
        ),
        (
            "ends own",
            "every seed loses .3 or more",
            ", ".join(f"{x:+.3f}" for x in lost),
            max(lost) <= -0.3,
        ),
    ]


def report(made, out):
    lines = [
        f"{'arm':9} {'seed':>4} {'teacher':>8} {'before':>7} {'after':>7} {'reverse KL':>17} "
        f"{'overlap':>14} {'length':>6} {'cut off':>7}"
    ]
    for r in made["runs"]:
        a, b = r["held_out_before"], r["held_out_after"]
        lines.append(
            f"{r['arm']:9} {r['seed']:4d} {r['accuracy_teacher']['mean']:8.3f} "
            f"{r['accuracy_before']['mean']:7.3f} {r['accuracy_after']['mean']:7.3f} "
            f"{a['reverse_kl']:7.4f} -> {b['reverse_kl']:.4f} {a['overlap_ratio']:6.3f} -> "
            f"{b['overlap_ratio']:.3f} {b['response_length']:6.1f} {b['truncated_fraction']:7.3f}"
        )
    write_text("\n".join(lines + verdicts(judge(made["runs"]))), made, out)
    plot.ends(out.with_suffix(".json"), out.with_suffix(".svg"))


if __name__ == "__main__":
    main(
        "ends",
        __doc__,
        seed_runs,
        report,
        curves=("step", "response_length", "truncated_fraction", "accuracy"),
    )
