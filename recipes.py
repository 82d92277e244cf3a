"""recipes.py: what to do when it fails (paper 5).

    5.1  off-policy cold start     the teacher answers some prompts, the student is fine-tuned on
                                   the answers, and OPD goes on with other prompts
    5.2  teacher-aligned prompts   the template and the problems that the teacher was post-trained
                                   on. The paper advises to mix these problems with others

`opd.py --cold-start`, `--template` and `--aligned-prompts` call these.

Not here: a filter by correctness (the paper has none), and embeddings that find similar prompts
(the paper compares texts, then embeddings; we compare texts alone).

To copy: with loss.py, rollout.py and teacher.py. With two models, their tokenizers, and rows of
{"prompt": text, "ids": its token ids}:

    pair = make_pair(student, teacher, student_tokenizer, teacher_tokenizer)
    examples = []
    for answers in teacher_rollouts(pair, rows, max_new_tokens=512):
        examples += [(a["prompt_ids"], a["response_ids"]) for a in answers if a["why"] == "kept"]
    optimizer = torch.optim.AdamW(pair.student.parameters())
    for row in cold_start(pair, optimizer, examples, steps=100):
        print(f"{row['step']} {row['loss']:.4f} nats a token")
    optimizer = torch.optim.AdamW(pair.student.parameters(), lr=1e-6)  # a new one for OPD
"""

import json
import math

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from rollout import batch, from_texts, seed_of
from rollout import rollout as plain_rollout
from teacher import UserError, teacher_ids, values_of
from teacher import micro_batches as plain_micro_batches

# --- 5.2 the template and the content -----------------------------------------------------------

TEMPLATES = {
    "none": "{question}",
    # DAPO's, under which the paper trains
    "answer": (
        "Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        "\n\n"
        '{question}\n\nRemember to put your answer on its own line after "Answer:".'
    ),
    # that of the teacher JustRL, and of the paper's evaluations. The authors' data has a literal
    # \boxed{{}} here, a slip
    "boxed": ("{question} Please reason step by step, and put your final answer within \\boxed{}."),
}


def apply_template(question, template):
    """Put a question into a template (5.2): str -> str.

    template: a name of TEMPLATES, or a text with {question} in it; UserError for anything else. A
    question that is in the template already stays as it is.
    """
    form = TEMPLATES.get(template, template)
    if form.count("{question}") != 1:
        raise UserError(
            f"there is no template {template!r}: take one of {', '.join(TEMPLATES)}, or a text "
            "with {question} in it, once"
        )
    if is_in_template(question, template):
        return question
    return form.replace("{question}", question)


def is_in_template(question, template):
    """Does a text begin and end as the template does? Not with "none", which adds nothing: bool."""
    return bare_question(question, template) is not None


def bare_question(text, template):
    """The question of a text that is in the template, or None: str.

    Spaces and line ends outside of the template do not count.
    """
    before, _, after = TEMPLATES.get(template, template).partition("{question}")
    before = before.lstrip()
    after = after.rstrip()
    if before:
        text = text.lstrip()
    if after:
        text = text.rstrip()
    adds = bool(before or after)
    has_room = len(text) >= len(before) + len(after)  # they do not overlap
    if adds and has_room and text.startswith(before) and text.endswith(after):
        return text[len(before) : len(text) - len(after)]
    return None


def in_template(rows, template):
    """Put the question of every row into a template: [{"prompt", ...}] -> new rows.

    UserError for an unknown template, see apply_template.
    """
    return [{**row, "prompt": prompt_in_template(row["prompt"], template)} for row in rows]


def prompt_in_template(prompt, template):
    """Put a text, or the last message of a chat, into a template: -> text or chat."""
    if isinstance(prompt, str):
        return apply_template(prompt, template)
    content = apply_template(prompt[-1]["content"], template)
    return [*prompt[:-1], {**prompt[-1], "content": content}]


def question_key(prompt):
    """A key that two prompts share if they are the same question: text or chat -> str.

    They are the same if all of their text is. A text counts as a chat of one message of the user.
    """
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return json.dumps(chat, sort_keys=True)


def distinct(rows, known=()):
    """The rows with each question once, without those whose question_key is in `known`: -> rows."""
    seen = set(known)
    kept = []
    for row in rows:
        key = question_key(row["prompt"])
        if key not in seen:
            seen.add(key)
            kept.append(row)
    return kept


def mix_prompts(aligned, others, fraction, generator):
    """The largest mixture in which round(fraction * size) prompts are aligned, shuffled: -> rows.

    aligned, others: lists of rows. A prompt of `others` that is also in `aligned` is left out, and
    so are repeats. The paper advises a mixture (5.2), but runs none and gives no ratio. UserError
    if fraction is outside 0..1, or if the mixture would lack one of the two.
    """
    if not 0 <= fraction <= 1:
        raise UserError(f"the aligned fraction {fraction} is outside 0..1")
    aligned = distinct(aligned)
    others = distinct(others, known={question_key(row["prompt"]) for row in aligned})
    size = len(aligned) + len(others)
    while round(fraction * size) > len(aligned) or size - round(fraction * size) > len(others):
        size -= 1
    count = round(fraction * size)
    lacks_aligned = fraction > 0 and count == 0
    lacks_others = fraction < 1 and count == size
    if lacks_aligned or lacks_others:
        raise UserError(
            f"{len(aligned)} aligned and {len(others)} other prompts cannot be mixed at a fraction "
            f"of {fraction}; give more of them, or another fraction"
        )
    mixed = drawn(aligned, count, generator) + drawn(others, size - count, generator)
    return drawn(mixed, size, generator)


def drawn(rows, count, generator):
    """`count` of the rows, drawn without replacement, in random order: -> list."""
    order = torch.randperm(len(rows), generator=generator)[:count]
    return [rows[i] for i in order.tolist()]


# --- 5.1 the off-policy cold start --------------------------------------------------------------


def is_degenerate(ids, *, loops=4, shortest=16, longest_period=32, gram=8, repeated=0.5):
    """Has a response fallen into repetition? A list of token ids, or of other items -> bool.

    True if it ends in a loop: a block of at most `longest_period` items that stands there `loops`
    times or more, and at least `shortest` items long in all. Also true if it has at least
    `gram` * 8 items, and more than the share `repeated` of its runs of `gram` items have occurred
    in it before. The paper drops "degenerately repetitive" responses (5.1) without a rule; this
    one is ours.
    """
    for period in range(1, min(longest_period, len(ids) // loops) + 1):
        span = max(period * loops, shortest)
        tail = ids[-span:]
        if len(tail) == span and tail[period:] == tail[:-period]:
            return True
    if len(ids) < gram * 8:
        return False
    grams = [tuple(ids[i : i + gram]) for i in range(len(ids) - gram + 1)]
    return len(set(grams)) < (1 - repeated) * len(grams)


def teacher_rollouts(
    pair,
    rows,
    *,
    max_new_tokens,
    temperature=0.7,
    top_p=0.95,
    seed=0,
    start=0,
    at_once=64,
    share=(0, 1),
    rollout=plain_rollout,
):
    """One response of the teacher to each row from row `start` on (5.1): yields lists of answers.

    rows: {"prompt", "ids"}, and "teacher_ids" if the teacher reads another prompt. An answer is
    {"messages": the chat with the response, "prompt_ids", "response_ids", "why"}; why is "kept",
    "unfinished" or "degenerate" (repetitive or empty). As in the paper there is no filter by
    correctness.

    A list holds the answers to the next `at_once` rows. share: (rank, processes); each of several
    processes answers its part of these: the rank-th and every `processes`-th after it. What is
    drawn for a row follows from the seed and its place. The defaults of temperature and top_p are
    the paper's.
    """
    rank, world = share
    first_batch = start - start % at_once  # batches are the same whether or not a run was cut
    batches = range(first_batch, len(rows), at_once) if start < len(rows) else []
    for first in progress(batches, "teacher's responses"):
        # row `start` is process 0's, so that the lists of all, taken in turn, are in order
        mine = (rank + max(0, start - first)) % world
        places = range(first, min(first + at_once, len(rows)))[mine::world]
        if not places:
            yield []
            continue
        with pair.autocast():
            r = rollout(
                pair.teacher,
                [teacher_ids(rows[i]) for i in places],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seeds=[seed_of(seed, "teacher's response", i) for i in places],
                **pair.sampling,
            )
        answers = []
        for row_of_rollout, i in enumerate(places):
            if i >= start:
                response = r.response_ids(row_of_rollout)
                answers.append(answer(pair, rows[i], response, bool(r.truncated[row_of_rollout])))
        yield answers


def answer(pair, row, response, truncated):
    """A response of the teacher as a line of cold_start.jsonl: -> dict, see teacher_rollouts."""
    body = response if truncated else response[:-1]  # without the end token
    text = pair.tokenizer.decode(body)
    why = "kept"
    if truncated:
        why = "unfinished"
    elif is_degenerate(body) or not text.strip():
        why = "degenerate"
    prompt = row["prompt"]
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {
        "messages": [*chat, {"role": "assistant", "content": text}],
        "prompt_ids": row["ids"],
        "response_ids": response,
        "why": why,
    }


def descend(optimizer, student):
    """Clip the gradient's norm to 1 and take a step: -> the norm before clipping.

    If it is not finite, no step is taken.
    """
    norm = clip_grad_norm_(student.parameters(), max_norm=1.0).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def cold_start(
    pair,
    optimizer,
    examples,
    *,
    steps,
    lr=1e-5,
    warmup=0.05,
    batch_size=64,
    seed=0,
    start=0,
    share=(0, 1),
    descend=descend,
    micro_batches=plain_micro_batches,
):
    """Fine-tune the student on [(prompt ids, response ids)], response tokens only (5.1, C.1).

    A generator: without a loop over it nothing happens. It yields a dict per step: {"step" from 1,
    "loss": (), nats per token, "grad_norm", "lr", "tokens"}. The loss is the mean negative
    log-likelihood over all response tokens of the step. lr rises over the share `warmup` of the
    steps and falls to 0 as a cosine, as in the paper. So the optimizer's own lr does not matter,
    and it ends near 0: make a new one for what follows. If the gradient is not finite, there is no
    update, and the dict has the reason as "skipped".

    Batch and lr of a step follow from (seed, step). So with the optimizer of a run that was cut,
    `start` goes on from there. share: (rank, processes); each of several processes takes its part
    of the examples. "loss" is then its part of the mean, to be added up, and descend and
    micro_batches have to be those that opd.py passes.
    """
    rank, world = share
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, steps, warmup)
        chosen = [examples[i] for i in batch(len(examples), step, batch_size, seed)]
        total = sum(len(response) for _, response in chosen)  # one denominator, of all processes
        mine = chosen[rank::world]
        prompts = [prompt for prompt, _ in mine]
        responses = [response for _, response in mine]
        r = from_texts(prompts, responses, pair.pad_id, pair.device)
        mean_loss = torch.zeros((), device=pair.device)
        for part in micro_batches(r, pair.micro_batch_tokens):
            values = values_of(pair, part, negative_log_likelihood, with_teacher=False)
            loss = values["loss"].sum() / total
            loss.backward()
            mean_loss += loss.detach()
        grad_norm = descend(optimizer, pair.student)
        row = {
            "step": step + 1,
            "loss": mean_loss,
            "grad_norm": grad_norm,
            "lr": optimizer.param_groups[0]["lr"],
            "tokens": total,
        }
        if not math.isfinite(grad_norm):
            row["skipped"] = f"gradient norm {grad_norm}"
        yield row


def negative_log_likelihood(log_p, _, y):
    """-log p(y): (N, V), no teacher, (N,) token ids -> {"loss": (N,)}, nats."""
    return {"loss": -log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)}


def cosine(step, steps, warmup):
    """The share of the highest lr at a step, from 0: a linear warm-up, then a cosine to 0: float.

    The warm-up takes the share `warmup` of the steps.
    """
    warm = max(1, math.ceil(warmup * steps))
    rise = min(1, (step + 1) / warm)
    done = max(0, step - warm) / max(1, steps - warm)
    return rise * 0.5 * (1 + math.cos(math.pi * done))


def progress(steps, name):
    """A progress bar over the steps, if stderr is a terminal."""
    return tqdm(steps, desc=name, mininterval=1, disable=None)
