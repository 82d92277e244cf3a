"""plumbing/prompts.py: what the student is asked, as text and as token ids; the conversations of a cold start."""

import json
import math
import os
import random
import re
import warnings
from pathlib import Path

import torch

from plumbing.files import json_lines, write_lines
from recipes import in_template, mix_prompts, same_question

THINK = "<think>"


def is_text(x):
    """A string that can be written down: half of a surrogate pair, which JSON may hold, is no character."""
    return isinstance(x, str) and not re.search(r"[\ud800-\udfff]", x)


def is_chat(x):
    """Messages as chat templates take them: a list of {"role": text, "content": text}, not empty."""
    return (
        isinstance(x, list)
        and len(x) > 0
        and all(
            isinstance(m, dict) and is_text(m.get("role")) and is_text(m.get("content")) for m in x
        )
    )


def load_prompts(path):
    """Read JSON lines {"prompt": text or chat messages, "answer": text (optional)}
    -> list of {"prompt", "answer", "id"}; answer: text or None, id: "name of the file:line".

    Raises ValueError naming file and line for what is not that.
    """
    problems = []
    for number, row in json_lines(path):
        prompt, answer = (
            row.get(name) if isinstance(row, dict) else None for name in ("prompt", "answer")
        )
        if not (is_text(prompt) and prompt.strip()) and not is_chat(prompt):
            raise ValueError(
                f'{path}:{number} needs "prompt": text, or a list of {{"role": text, "content": text}}'
            )
        if not is_text(prompt) and prompt[-1]["role"] not in ("user", "tool"):
            raise ValueError(
                f"{path}:{number} ends with what the {prompt[-1]['role']} says; a prompt ends with the "
                "user, or with a tool"
            )
        if answer is not None and not (is_text(answer) and answer.strip()):
            raise ValueError(
                f"{path}:{number} has an answer that is no text ({type(answer).__name__}), or empty; "
                'write "answer": "42", or leave it out'
            )
        problems.append(
            {"prompt": prompt, "answer": answer, "id": f"{os.path.basename(path)}:{number}"}
        )
    if not problems:
        raise ValueError(
            f'{path} holds no prompts; write one {{"prompt": text, "answer": text}} a line'
        )
    return problems


def additions(count, seed=0):
    """Questions with known answers, for a run without --prompts: list of {"prompt", "answer", "id"}."""
    draw = random.Random(seed)
    pairs = draw.sample([(a, b) for a in range(10, 100) for b in range(10, 100)], count)
    return [
        {
            "prompt": f'What is {a} + {b}? End with a line "Answer: " and the number.',
            "answer": str(a + b),
            "id": f"{a} + {b}",
        }
        for a, b in pairs
    ]


def questions(cfg):
    """-> (training, cold start, held-out) lists of {"prompt", "answer"}, in the template; no two share a question."""
    draw, known = random.Random(cfg.seed), set()  # known: questions that are taken

    def key(prompt):
        return same_question(prompt, cfg.template)

    def others(rows):  # each question that is not taken, once
        return list(
            {key(row["prompt"]): row for row in rows if key(row["prompt"]) not in known}.values()
        )

    chats = read_conversations(cfg.cold_start_file) if cfg.cold_start_file else []
    known |= {key(chat[:-1]) for chat in chats}
    train = others(load_prompts(cfg.prompts) if cfg.prompts else additions(512, cfg.seed))
    if cfg.eval:
        held_out = list({json.dumps(row["prompt"]): row for row in load_prompts(cfg.eval)}.values())
        answered = sum(key(row["prompt"]) in known for row in held_out)
        if answered:
            warnings.warn(f"--eval: {answered} of its questions are answered in --cold-start-file")
    else:
        pool = sorted(train, key=lambda row: json.dumps(row["prompt"]))
        held_out = draw.sample(pool, min(64, max(1, len(pool) // 5), len(pool)))
    known |= {key(row["prompt"]) for row in held_out}
    if cfg.cold_start + (cfg.steps > 0) > len(others(train)) and cfg.cold_start:
        raise ValueError(
            f"--cold-start {cfg.cold_start}: only {len(others(train))} prompts to train on, "
            "and OPD needs others than these"
        )
    cold = draw.sample(others(train), cfg.cold_start)
    known |= {key(row["prompt"]) for row in cold}
    train = others(train)
    if cfg.aligned_prompts:
        aligned = others(load_prompts(cfg.aligned_prompts))
        have, train = (
            len(aligned) + len(train),
            mix_prompts(
                aligned, train, cfg.aligned_fraction, torch.Generator().manual_seed(cfg.seed)
            ),
        )
        if len(train) < have:
            warnings.warn(
                f"--aligned-fraction {cfg.aligned_fraction}: the largest such mixture has {len(train)} "
                f"prompts; {have - len(train)} of {have} are left out"
            )
    if not train and cfg.steps:
        raise ValueError(
            f"--prompts {cfg.prompts}: no prompt is left for training beside the held-out ones"
        )
    return tuple(in_template(rows, cfg.template) for rows in (train, cold, held_out))


def some_questions(path, template, seed, count):
    """The first `count` rows of a file, or of additions without one, shuffled by the seed, in a template."""
    rows = in_template(load_prompts(path) if path else additions(512, seed), template)
    return [
        rows[i]
        for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    ]


def encode(tokenizer, prompt, thinking="default"):
    """A prompt as the student reads it: text or chat messages -> token ids, by the chat template where there is one.

    Both models get these very ids. They end with no end of text, which some tokenizers append: nothing would follow.
    Raises ValueError with the prompt where the template refuses it, and for a switch that it does not have.
    """
    if thinking != "default" and "enable_thinking" not in str(tokenizer.chat_template):
        raise ValueError(
            f"--thinking {thinking}: the student's chat template has no enable_thinking; leave it out"
        )
    ids = _encode(tokenizer, prompt, thinking)
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids


def _encode(tokenizer, prompt, thinking):
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        options = {} if thinking == "default" else {"enable_thinking": thinking == "on"}
        try:
            text = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=False, **options
            )
        except (
            Exception
        ) as error:  # whatever a template may raise: it is a program of the checkpoint's
            raise ValueError(
                f"the student's chat template refuses {str(prompt)[:80]!r}: {error}"
            ) from error
        return tokenizer(
            text, add_special_tokens=False
        ).input_ids  # the template has written them already
    if not isinstance(prompt, str):
        prompt = "\n".join(message["content"] for message in prompt)
    return tokenizer(prompt).input_ids


def encode_rows(pair, rows, *, max_prompt_tokens, new_tokens, thinking="default"):
    """Questions {"prompt", ...} -> those that fit, each with its token ids: list of {"prompt", ..., "ids"}.

    Longer prompts are dropped and counted, never cut. thinking: "on", "off" or "default", for chat templates that
    have the switch. Raises ValueError when none is left, when a prompt and new_tokens outgrow a model, or when a
    token has no output row.
    """
    rows = [{**row, "ids": encode(pair.tokenizer, row["prompt"], thinking)} for row in rows]
    fit = [row for row in rows if 0 < len(row["ids"]) <= max_prompt_tokens]
    if not fit:
        raise ValueError(
            f"no prompt has 1 to {max_prompt_tokens} tokens; raise --max-prompt-tokens"
        )
    if len(fit) < len(rows):
        warnings.warn(
            f"{len(rows) - len(fit)} of {len(rows)} prompts dropped: empty, or longer than "
            f"{max_prompt_tokens} tokens"
        )
    for row in fit:
        check_fits(pair, row["ids"], new_tokens, f"prompt {str(row['prompt'])[:80]!r}")
    return fit


def encode_for(cfg, pair, rows):
    """Rows with their token ids, as a run's flags say; none where there are none."""
    new_tokens = max(
        getattr(cfg, before + "max_new_tokens", 0) for before in ("", "eval_", "cold_start_")
    )
    return (
        pair.encode(
            rows,
            max_prompt_tokens=cfg.max_prompt_tokens,
            new_tokens=new_tokens,
            thinking=cfg.thinking,
        )
        if rows
        else []
    )


def check_fits(pair, ids, new_tokens, what):
    """ValueError where token ids and what is still to be written outgrow a model, or have no output row."""
    for model in (pair.student, pair.teacher):
        room = positions(model.config.get_text_config())
        if len(ids) + new_tokens > room:
            raise ValueError(
                f"{what} and its response need {len(ids) + new_tokens} tokens, {model.name_or_path} "
                f"holds {room}; lower --max-new-tokens"
            )
    if max(ids) >= pair.ending["vocab_size"]:
        raise ValueError(f"a token of {what} has no output row; leave it out")


def positions(config):
    """How many tokens a model reads alike: the least of its bounds, as a LongRoPE model (Phi-3) turns all positions
    otherwise from its original length on, so that the start of a long text is not what was sampled. int or inf.
    """
    rope, bounds = (
        getattr(config, "rope_parameters", None) or {},
        [getattr(config, "max_position_embeddings", None)],
    )
    if rope.get("rope_type") == "longrope":
        bounds.append(rope["original_max_position_embeddings"])
    return min(filter(None, bounds), default=math.inf)


def read_conversations(path):
    """JSON lines {"messages": [...]} that end with what the assistant says: -> list of message lists;
    ValueError with the line.
    """
    chats = []
    for number, row in json_lines(path):
        chat = row.get("messages") if isinstance(row, dict) else None
        if not (
            is_chat(chat)
            and len(chat) > 1
            and chat[-1]["role"] == "assistant"
            and chat[-1]["content"]
        ):
            raise ValueError(
                f'{path}:{number} needs "messages" that end with what the assistant says'
            )
        if chat[-1].get("reasoning_content"):
            raise ValueError(
                f'{path}:{number} has "reasoning_content"; write it into "content", between the marks '
                "that the chat template has for a thought"
            )
        chats.append(chat)
    if not chats:
        raise ValueError(f"{path} holds no conversations")
    return chats


def load_conversations(path, pair, thinking="default"):
    """A file of conversations -> [(prompt ids, response ids)], each response with the student's own end.

    Where the template has opened the thought already, <think>, an answer's own opening is left out.
    """
    examples = []
    for *asked, answer in read_conversations(path):
        prompt, text = encode(pair.tokenizer, asked, thinking), answer["content"]
        if pair.tokenizer.decode(prompt[-8:]).rstrip().endswith(THINK) and text.lstrip().startswith(
            THINK
        ):
            text = text.lstrip().removeprefix(THINK).lstrip("\n")
        response = pair.tokenizer(text, add_special_tokens=False).input_ids
        examples.append((prompt, response + pair.ending["eos_ids"][:1]))
        check_fits(pair, sum(examples[-1], []), 0, f"conversation {str(asked)[:80]!r}")
    return examples


def write_selection(path, chosen):
    """Write what recipes.select chose, the aligned prompts to path and the others beside it, and say how to go on."""
    for template, score in sorted(chosen["templates"].items(), key=lambda item: -item[1]):
        print(f"template {template:8} score {score:.4f}   (mass * confidence)")
    path = Path(path)
    others = path.with_name(f"{path.stem}.others{path.suffix}")
    for file, part in ((path, chosen["aligned"]), (others, chosen["others"])):
        write_lines(file, part)
        scores = [row["alignment"]["score"] for row in part]
        print(f"{file}: {len(part)} prompts, scores {min(scores):.4f} to {max(scores):.4f}")
    print(
        f"go on with: opd.py ... --template {chosen['template']} --aligned-prompts {path} --prompts {others}"
    )
