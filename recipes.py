"""recipes.py: what to do when it fails (paper 5).

    5.1  off-policy cold start     the teacher answers some prompts, the student is fine-tuned on that; OPD on others
    5.2  teacher-aligned prompts   the template and the problems that the teacher was post-trained on, mixed with others
    ours select                    where nobody knows what those were: rank a pool by measured alignment

`opd.py --cold-start`, `--template` and `--aligned-prompts` call these. Alone:

    python recipes.py rollouts --student S --teacher T --prompts F --out conversations.jsonl
    python recipes.py select --student S --teacher T --prompts POOL --templates none,answer,boxed --out aligned.jsonl

To copy: with analysis.py and plumbing/processes.py; `pair` is a teacher.Pair, or has its `write`, `given`, `grade`.
Not here: a filter by correctness (the paper has none); embeddings (the paper's copies are found by them, ours by text).
"""

import math
import sys
import unicodedata

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from analysis import diagnose
from plumbing.processes import batch, gathered, over_processes, processes, share, summed_gradients

# --- 5.2 the template and the content --------------------------------------------------------------------------------

TEMPLATES = {
    "none": "{question}",
    # DAPO's, the student's in the paper
    "answer": "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{question}\n\n"
    'Remember to put your answer on its own line after "Answer:".',
    # that of the teacher JustRL. The authors' released data has a literal \boxed{{}} here, an escape left over
    "boxed": "{question} Please reason step by step, and put your final answer within \\boxed{}.",
}


def apply_template(question, template):
    """Put a question into a template, by name or as a string with {question} in it, else ValueError: str -> str."""
    form = TEMPLATES.get(template, template)
    if "{question}" not in form:
        raise ValueError(
            f"template {template!r} is none of {', '.join(TEMPLATES)} and has no {{question}} in it"
        )
    return form.replace("{question}", question)


def in_template(rows, template):
    """Put every question, of a chat the last message, into a template: list of {"prompt", ...} -> new rows."""

    def put(prompt):
        if isinstance(prompt, str):
            return apply_template(prompt, template)
        return [
            *prompt[:-1],
            {**prompt[-1], "content": apply_template(prompt[-1]["content"], template)},
        ]

    return [{**row, "prompt": put(row["prompt"])} for row in rows]


def mix_prompts(aligned, others, fraction, generator):
    """The largest mixture of which round(fraction * size) prompts are aligned, shuffled: two lists of rows -> list.

    Prompts of `others` that are also in `aligned` are left out, and so are repeats (see same_question). The paper
    advises the mixture and gives no ratio. Raises ValueError where fraction is outside 0..1 or nothing is left.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"the aligned fraction {fraction} is outside 0..1")
    aligned = list({same_question(row["prompt"]): row for row in aligned}.values())
    known = {same_question(row["prompt"]) for row in aligned}
    others = list(
        {key: row for row in others if (key := same_question(row["prompt"])) not in known}.values()
    )
    size = next(
        (
            size
            for size in range(len(aligned) + len(others), 0, -1)
            if round(fraction * size) <= len(aligned)
            and size - round(fraction * size) <= len(others)
        ),
        0,
    )
    if not size or fraction and not aligned or fraction < 1 and not others:
        raise ValueError(
            f"{len(aligned)} aligned and {len(others)} other prompts cannot be mixed "
            f"at a fraction of {fraction}"
        )

    def some(rows, count):
        return [rows[i] for i in torch.randperm(len(rows), generator=generator)[:count].tolist()]

    mixed = some(aligned, round(fraction * size)) + some(others, size - round(fraction * size))
    return some(mixed, size)


def same_question(prompt, template="none"):
    """A key that prompts share which differ in case, spacing, Unicode form, template or system prompt alone: str."""

    def bare(text):
        return "".join(unicodedata.normalize("NFKC", text).casefold().split())

    if not isinstance(prompt, str):
        *earlier, last = [
            message["content"] for message in prompt if message["role"] != "system"
        ] or [""]
        return "".join(map(bare, earlier)) + same_question(last, template)
    text = bare(prompt)
    for form in (*TEMPLATES.values(), TEMPLATES.get(template, template)):
        before, _, after = map(bare, form.partition("{question}"))
        if before + after and text.startswith(before) and text.endswith(after):
            text = text[len(before) : len(text) - len(after)]
    return text


def alignment(pair, rows, *, k=16, n=1, max_new_tokens=128, temperature=1.0, seed=0, at_once=64):
    """How well student and teacher meet on each prompt, at states that the student visits: -> list of dict.

    mass: the smaller of the two overlap masses (Eq. 9, 10); confidence: exp(-H(q)), 1 where the teacher is certain;
    each a mean over the tokens of n responses. score = mass * confidence. This ranking is ours, not the paper's.
    """
    out = []
    for start in tqdm(
        range(0, len(rows), at_once), desc="alignment", mininterval=1, leave=False, disable=None
    ):
        r = pair.write(
            [row["ids"] for row in rows[start : start + at_once]],
            n=n,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed + start,
        )
        grid = pair.grade(r, lambda *x: diagnose(*x, k), temperature=temperature)  # {name: (B, T)}
        mass, mass_q, confidence = (
            x.view(-1, n * x.size(1)).nanmean(1)
            for x in (  # (B/n,) each
                grid["overlap_mass_student"],
                grid["overlap_mass_teacher"],
                grid["entropy_teacher"].neg().exp(),
            )
        )
        mass = torch.minimum(mass, mass_q)
        out += [
            dict(zip(("mass", "confidence", "score"), x))
            for x in torch.stack([mass, confidence, mass * confidence], 1).tolist()
        ]
    return out


def select(pair, rows, encode, *, templates=("none",), keep=0.5, sample=32, **how):
    """Choose the template and the prompts of a pool where student and teacher meet best: -> {"template",
    "templates": {template: mean score}, "aligned", "others"}, rows as they came with their "alignment".

    templates are compared on the first `sample` prompts; then every prompt is scored under the best one, and the best
    share `keep` becomes "aligned". encode: rows -> rows with "ids", as of Pair.encode; how: options of alignment.
    Ours, not the paper's, which knows its teacher's prompts.
    """

    def scored(rows, template):
        encoded = encode(in_template([{**row, "row": row} for row in rows], template))
        return [
            {**e["row"], "alignment": a} for e, a in zip(encoded, alignment(pair, encoded, **how))
        ]

    means = {}
    for template in templates:
        some = [row["alignment"]["score"] for row in scored(rows[:sample], template)]
        means[template] = sum(some) / len(some)
    best = max(means, key=means.get)
    ranked = sorted(scored(rows, best), key=lambda row: -row["alignment"]["score"])
    cut = round(keep * len(ranked))
    if not 0 < cut < len(ranked):
        raise ValueError(f"--keep {keep}: of {len(ranked)} prompts that keeps none, or all")
    return {"template": best, "templates": means, "aligned": ranked[:cut], "others": ranked[cut:]}


# --- 5.1 the off-policy cold start ---------------------------------------------------------------------------------


def is_degenerate(text_or_ids, *, loops=4, shortest=16, longest_period=32, gram=8, repeated=0.5):
    """Has this response fallen into repetition? Text counts in words, token ids in tokens; bool.

    True when it ends in a loop, a block of at most `longest_period` items that stands there `loops` times or more, over
    `shortest` items at least; or when, of `gram` * 8 items or more, over half of its runs of `gram` have occurred in it
    before. The paper drops "degenerately repetitive" responses without a rule; this one is ours.
    """
    items = text_or_ids.split() if isinstance(text_or_ids, str) else list(text_or_ids)
    for period in range(1, min(longest_period, len(items) // loops) + 1):
        span = max(period * loops, shortest)
        if len(items) >= span and all(
            items[-i] == items[-i - period] for i in range(1, span - period + 1)
        ):
            return True
    grams = [tuple(items[i : i + gram]) for i in range(len(items) - gram + 1)]
    return len(items) >= gram * 8 and len(set(grams)) < (1 - repeated) * len(grams)


def teacher_rollouts(
    pair, rows, *, max_new_tokens, temperature=0.7, top_p=0.95, seed=0, start=0, at_once=64
):
    """One response of the teacher to each row (of Pair.encode) from row `start` on: yields, some rows at a time, lists
    of {"messages": [..., {"role": "assistant", "content": text}], "why"}.

    why: "kept", or what it is to be dropped for: "unfinished", "degenerate" (or empty). No filter by correctness, as in
    the paper. What is drawn for a row follows from `seed` and its place.
    """
    starts = range(start - start % at_once, len(rows) if start < len(rows) else 0, at_once)
    for first in tqdm(starts, desc="teacher's responses", mininterval=1, disable=None):
        part, said = rows[first : first + at_once], []
        if share(part):
            r = pair.write(
                [row["ids"] for row in part],
                model=pair.teacher,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed * 1_000_003 + first,
                share=processes(),
            )
        for i, row in enumerate(share(part)):
            ids, cut, prompt = r.response_ids(i), r.truncated[i], row["prompt"]
            text = pair.tokenizer.decode(ids if cut else ids[:-1])  # marks of thinking stay
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            why = (
                "unfinished"
                if cut
                else "degenerate"
                if is_degenerate(ids[:-1]) or not text.strip()
                else "kept"
            )
            said.append({"messages": [*chat, {"role": "assistant", "content": text}], "why": why})
        yield gathered(said)[max(0, start - first) :]


def cold_start(
    pair, optimizer, examples, *, steps, lr=1e-5, warmup=0.05, batch_size=64, seed=0, start=0
):
    """Fine-tune the student on [(prompt ids, response ids)], response tokens only: yields a row of metrics an update.

    lr rises over the share `warmup` of the steps and falls to 0 as a cosine, as in the paper. The loss is the mean
    negative log-likelihood over all response tokens of a step. Batch and lr of a step follow from (seed, step), so that
    `start` goes on with the optimizer of a run that was cut. A step whose gradient is not finite is no update: its row
    has "skipped", the reason and the examples by number.
    """

    def negative_log_likelihood(log_p, _, y):  # (c, V), (c,) -> (c,)
        return {"loss": -log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)}

    warm = max(1, math.ceil(warmup * steps))
    for step in range(start, steps):
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warm) * cosine
        chosen = batch(len(examples), step, batch_size, seed)
        r = pair.given([examples[i] for i in share(chosen)])
        total = over_processes(r.response_mask.sum())  # one denominator, whatever the cut
        losses = pair.grade(r, negative_log_likelihood, scale=1 / total, with_teacher=False)[
            "loss"
        ]  # (b, T)
        loss = (over_processes(losses[r.response_mask].sum()) / total).item()
        norm = clip_grad_norm_(summed_gradients(pair.student), 1.0).item()
        row = {
            "step": step + 1,
            "loss": loss,
            "grad_norm": norm,
            "lr": group["lr"],
            "tokens": int(total),
        }
        if math.isfinite(norm):
            optimizer.step()
        else:
            row["skipped"] = {
                "why": f"loss {loss}, gradient norm {norm}",
                "examples": sorted(i + 1 for i in chosen),
            }
        optimizer.zero_grad()
        yield row


def main(argv=None):
    from plumbing import files, flags, prompts
    from plumbing.exits import one_line
    from teacher import Pair

    with one_line("recipes.py"):
        command, asked = flags.parse_recipes(sys.argv[1:] if argv is None else argv)
        rows = prompts.load_prompts(asked.prompts)
        if command == "rollouts":
            files.check_call(asked.out, {**vars(asked), "prompts": files.digest(rows)})
        pair = Pair.load(asked.student, asked.teacher, **flags.of_pair(asked))
        if command == "rollouts":
            rows = prompts.encode_for(asked, pair, in_template(rows[: asked.count], asked.template))
            counts = files.append_answers(
                asked.out,
                lambda start: teacher_rollouts(
                    pair,
                    rows,
                    seed=asked.seed,
                    max_new_tokens=asked.max_new_tokens,
                    temperature=asked.temperature,
                    top_p=asked.top_p,
                    start=start,
                ),
            )
            return print(
                "{kept} responses in {out}; {unfinished} unfinished and {degenerate} degenerate ones in "
                "{out}.dropped.jsonl".format(out=asked.out, **counts)
            )
        prompts.write_selection(
            asked.out,
            select(
                pair,
                rows,
                lambda some: prompts.encode_for(asked, pair, some),
                templates=asked.templates.split(","),
                keep=asked.keep,
                k=asked.k,
                n=asked.n,
                max_new_tokens=asked.max_new_tokens,
                seed=asked.seed,
            ),
        )


if __name__ == "__main__":
    main()
