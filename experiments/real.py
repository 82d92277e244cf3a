"""experiments/real.py: the paper's Figure 6 on real weights; any student and teacher, a GPU if there is one.

    success    student <- teacher
    reverse    teacher <- student: the better model learns from the worse one, with the same settings

Whether a model became better is asked of a text that neither of them wrote: nats a token on the held-out questions
themselves, which nothing here trains on. What holds:
    overlap   in the mean over seeds, first and last five steps compared, the ratio rises by .05 or more in success, and
              the advantage and the entropy gap shrink to .75 of what they were
    text      in every seed nats a token come nearer to those of the teacher, by a tenth of the distance or more: better
              in success, worse in reverse. (Past the teacher and away from it counts against it)

    python experiments/real.py --student S --teacher T --prompts F.jsonl       results/real.{json,txt,svg}

--prompts: {"prompt": ...} a line; a fifth of them is held out. With --runs DIR the runs are kept, and one that was
killed goes on from its checkpoint.
"""
import math

import torch
from torch.nn.functional import cross_entropy

import plot
from lab import main, opd, run, verdicts, write_text
from mechanism import ends
from plumbing.models import load, load_tokenizer, pick_device
from plumbing.prompts import questions

NEEDED = {"student": "directory of the weaker model", "teacher": "directory of the better one",
          "prompts": "JSON lines with questions"}
SETTINGS = dict(batch_size=8, max_new_tokens=32, lr=3e-5, steps=100, eval_n=1)      # minutes a run on two cores


def seed_runs(seed, world, scratch, quick, student, teacher, prompts):
    made = []
    for pair, (learns, grades) in {"success": (student, teacher), "reverse": (teacher, student)}.items():
        out = scratch / f"{pair}-{seed}"
        settings = {**SETTINGS, **(dict(steps=10, max_new_tokens=8) if quick else {}), "student": learns,
                    "teacher": grades, "prompts": prompts, "seed": seed, "out": str(out)}
        texts = [row["prompt"] for row in questions(opd.Config(**settings))[2] if isinstance(row["prompt"], str)]
        made.append({"pair": pair, "seed": seed, **run(**settings), "text_before": nats(learns, texts),
                     "text_teacher": nats(grades, texts), "text_after": nats(out / "student", texts)})
    return made


@torch.no_grad()
def nats(path, texts):
    """Mean over the tokens of the texts, each by itself and its first left out, of -log p(token | those before it)."""
    model, tokenizer, total, count = load(path, device=pick_device("auto")), load_tokenizer(path), 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)   # (1, L)
        if ids.size(1) > 1:
            logits = model(input_ids=ids).logits[0, :-1]                                                     # (L-1, V)
            total += cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()
            count += ids.size(1) - 1
    return total / count


def judge(runs):
    """The criteria above: [(name, criterion, what was found, does it hold)]."""
    good, bad = ([r for r in runs if r["pair"] == pair] for pair in ("success", "reverse"))
    a, b = ends(good, "overlap_ratio")
    shrunk = {name: ends(good, name) for name in ("overlap_token_advantage", "entropy_gap")}
    way = [[1 - abs(r["text_after"] - r["text_teacher"]) / (abs(r["text_before"] - r["text_teacher"]) or math.nan)
            for r in part] for part in (good, bad)]
    return [("Fig. 6 overlap", "rises by .05, advantage and gap to .75",
             f"{a:.3f} -> {b:.3f}, " + ", ".join(f"{c:.3f} -> {d:.3f}" for c, d in shrunk.values()),
             b - a >= 0.05 and all(abs(d) <= 0.75 * abs(c) for c, d in shrunk.values())),
            ("3.3 text", "a tenth of the way to the teacher, both",
             "; ".join(", ".join(f"{x:+.2f}" for x in part) for part in way), min(*way[0], *way[1]) >= 0.1)]


def report(made, out):
    lines = [f"{'pair':8} {'seed':>4} {'nats a token of text (teacher)':>30} {'overlap':>14} {'reverse KL':>15} "
             f"{'masses':>13} {'s':>5}"]
    for r in made["runs"]:
        a, b = r["held_out_before"], r["held_out_after"]
        lines.append(f"{r['pair']:8} {r['seed']:4d} {r['text_before']:8.3f} -> {r['text_after']:8.3f} "
                     f"({r['text_teacher']:7.3f}) "
                     f"{a['overlap_ratio']:6.3f} -> {b['overlap_ratio']:.3f} "
                     f"{a['reverse_kl']:6.3f} -> {b['reverse_kl']:.3f} "
                     f"{b['overlap_mass_student']:6.3f} {b['overlap_mass_teacher']:.3f} {r['seconds']:5.0f}")
    write_text("\n".join(lines + verdicts(judge(made["runs"]))), made, out)
    plot.real(out.with_suffix(".json"), out.with_suffix(".svg"))


if __name__ == "__main__":
    main("real", __doc__.splitlines()[0], seed_runs, report, NEEDED)
