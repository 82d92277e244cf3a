"""plumbing/prompts.py: what the student is asked, and the conversations of a cold start.

A prompt is text or a list of chat messages. It is read from a file, put into a template, encoded
to token ids by the student's tokenizer, and checked against what the two models can hold. The
teacher reads the same ids, unless the line has a "teacher_prompt", or --teacher-template makes
one. A teacher_prompt is encoded by the teacher's tokenizer, in its own chat template.
"""

import difflib
import itertools
import math
import os
import random
import warnings

import torch

from plumbing.files import json_lines
from recipes import (
    TEMPLATES,
    bare_question,
    distinct,
    in_template,
    is_in_template,
    mix_prompts,
    prompt_in_template,
    question_key,
)
from rollout import seed_of
from teacher import UserError

KEYS = ("prompt", "answer", "teacher_prompt")  # of a line that are read

# --- files ---------------------------------------------------------------------------------------


def is_chat(x):
    """Is this a list of {"role": text, "content": text}, and not an empty one? -> bool."""
    if not isinstance(x, list) or not x:
        return False
    for message in x:
        if not isinstance(message, dict):
            return False
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            return False
    return True


def is_conversation(x):
    """Is this a chat of at least two messages, the last of which is text of the assistant?"""
    if not is_chat(x) or len(x) < 2:
        return False
    return x[-1]["role"] == "assistant" and x[-1]["content"] != ""


def load_prompts(path):
    """Read JSON lines {"prompt", "answer", "teacher_prompt"}, of which the last two are optional.

    An answer is text; a prompt is text or chat messages. -> list of {"prompt", "answer": text or
    None, "id": "name of the file:line"}, with "teacher_prompt" if the line has one. Other keys are
    not read; a warning names one that looks like a misspelling. UserError, with file and line, for
    anything else.
    """
    rows = []
    misspelt = set()
    for number, row in json_lines(path):
        if not isinstance(row, dict):
            raise UserError(
                f'{path}:{number} is not an object; write one {{"prompt": text}} a line, without '
                "brackets around the lines"
            )
        misspelt |= set(near_misses(row))
        answer = row.get("answer")
        asked = {"prompt": row.get("prompt")}
        if "teacher_prompt" in row:
            asked["teacher_prompt"] = row["teacher_prompt"]
        for name, prompt in asked.items():
            check_prompt(prompt, name, f"{path}:{number}")
        if answer is not None and not (isinstance(answer, str) and answer.strip()):
            raise UserError(
                f"{path}:{number} has an answer that is no text ({type(answer).__name__}), or "
                'empty; write "answer": "42", or leave it out'
            )
        name = f"{os.path.basename(path)}:{number}"
        rows.append({**asked, "answer": answer, "id": name})
    if not rows:
        raise UserError(
            f'{path} holds no prompts; write one {{"prompt": text, "answer": text}} a line'
        )
    for key, meant in sorted(misspelt):
        warnings.warn(f'{path}: "{key}" is not read; did you mean "{meant}"?', stacklevel=2)
    return rows


def near_misses(row):
    """Keys of a line that look like one of KEYS that it lacks: yields (key, the one meant)."""
    for key in row.keys() - KEYS:
        for meant in difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8):
            if meant not in row:
                yield key, meant


def check_prompt(prompt, name, where):
    """UserError unless a line's prompt is text, or a chat that ends with the user or a tool.

    name: "prompt" or "teacher_prompt"; where: "path:line".
    """
    is_text = isinstance(prompt, str) and prompt.strip() != ""
    if not is_text and not is_chat(prompt):
        raise UserError(
            f'{where} needs "{name}": text, or a list of {{"role": text, "content": text}}'
        )
    if not is_text and prompt[-1]["role"] not in ("user", "tool"):
        raise UserError(
            f"{where} ends with what the {prompt[-1]['role']} says; end the {name} with a message "
            "of the user, or of a tool"
        )


def additions(count, seed=0):
    """Sums of two numbers, for a run without --prompts: list of {"prompt", "answer", "id"}."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed_of(seed, "additions")).shuffle(pairs)
    rows = []
    for a, b in pairs[:count]:
        question = f'What is {a} + {b}? End with a line "Answer: " and the number.'
        rows.append({"prompt": question, "answer": str(a + b), "id": f"{a} + {b}"})
    return rows


def given_or_additions(path, seed):
    """The prompts of a file: rows; without a file, additions, with a warning that says so."""
    if path:
        return load_prompts(path)
    rows = additions(512, seed)
    warnings.warn(f"no --prompts: asks built-in additions, such as {rows[0]['id']}", stacklevel=2)
    return rows


def read_conversations(path):
    """Read JSON lines {"messages": [...]} that end with what the assistant says.

    -> list of {"messages", "prompt_ids", "response_ids", "where": "path:line"}. The ids are those
    that a cold start of ours has written, else None. Answers that it did not keep are left out.
    UserError, with file and line, for anything else.
    """
    rows = []
    for number, row in json_lines(path):
        where = f"{path}:{number}"
        row = row if isinstance(row, dict) else {}
        if row.get("why") in ("unfinished", "degenerate"):
            continue
        messages = row.get("messages")
        if not is_conversation(messages):
            raise UserError(f'{where} needs "messages" that end with what the assistant says')
        prompt_ids = row.get("prompt_ids")
        response_ids = row.get("response_ids")
        has_ids = prompt_ids is not None or response_ids is not None
        if has_ids and not (are_tokens(prompt_ids) and are_tokens(response_ids)):
            raise UserError(
                f'{where} needs "prompt_ids" and "response_ids" that are lists of tokens, or '
                "neither of them"
            )
        rows.append(
            {
                "messages": messages,
                "prompt_ids": prompt_ids,
                "response_ids": response_ids,
                "where": where,
            }
        )
    if not rows:
        raise UserError(
            f'{path} holds no conversations; write one {{"messages": [...]}} a line, which ends '
            "with what the assistant says"
        )
    return rows


def are_tokens(x):
    """Is this a list of token ids, and not an empty one? -> bool."""
    if not isinstance(x, list) or not x:
        return False
    return all(type(i) is int and i >= 0 for i in x)


# --- which prompts -------------------------------------------------------------------------------


def questions(cfg):
    """The prompts of a run, each question once: -> (training, cold start, held out) lists of rows.

    Rows are {"prompt", "answer", "id"}, put into the template. Two prompts are the same question if
    all of their text is the same. A warning counts those that are left out for that. UserError if a
    file cannot be used, or if there are too few prompts.
    """
    given = given_or_additions(cfg.prompts, cfg.seed)
    train = once(put_in_template(cfg, given, "--prompts"), "--prompts")
    learnt = conversation_keys(cfg)
    train = without(train, learnt, "--prompts", "answered in --cold-start-file")

    if cfg.eval:
        held_out = in_turn([of_eval_file(cfg, path) for path in cfg.eval])
        repeated = len(held_out) - len(keys_of(held_out))
        tell("--eval", repeated, held_out, "stand in another file, too, and count in both")
        in_both = len(keys_of(held_out) & learnt)
        tell("--eval", in_both, held_out, "are answered in --cold-start-file")
        train = without(train, keys_of(held_out), "--prompts", "held out in --eval")
    else:
        pool = sorted(train, key=lambda row: question_key(row["prompt"]))
        size = min(64, max(1, len(pool) // 5), len(pool))
        held_out = random.Random(seed_of(cfg.seed, "held out")).sample(pool, size)
        train = distinct(train, keys_of(held_out))

    needed = cfg.cold_start + (1 if cfg.steps > 0 else 0)
    if cfg.cold_start and needed > len(train):
        raise UserError(
            f"--cold-start {cfg.cold_start}: only {len(train)} prompts to train on, and OPD needs "
            "others than the cold start; take a smaller --cold-start, or more --prompts"
        )
    cold = random.Random(seed_of(cfg.seed, "cold start")).sample(train, cfg.cold_start)
    train = distinct(train, keys_of(cold))

    if cfg.aligned_prompts:
        seen = learnt | keys_of(held_out) | keys_of(cold)
        train = mixed(cfg, train, seen)
    if not train and cfg.steps:
        raise UserError(
            f"--prompts {cfg.prompts}: no prompt is left for training beside the held-out ones; "
            "give more prompts"
        )
    check_teacher_prompts(train + cold + held_out)
    if all(row["answer"] is None for row in held_out):
        warnings.warn(
            'accuracy will not be measured: no held-out prompt has an "answer"', stacklevel=2
        )
    return train, cold, held_out


def of_eval_file(cfg, path):
    """The held-out rows of a file, each question once, in the template, with "file": its path."""
    rows = load_prompts(path)
    name = f"--eval {path}" if len(cfg.eval) > 1 else "--eval"
    rows = once(put_in_template(cfg, rows, name), name)
    if len(cfg.eval) > 1 and all(row["answer"] is None for row in rows):
        warnings.warn(f"{name} has no answers: it is in no accuracy", stacklevel=2)
    return [{**row, "file": path} for row in rows]


def in_turn(lists):
    """The first item of each list, then the second of each, ...: a list that begins with all."""
    items = []
    for of_each in itertools.zip_longest(*lists):
        items += [item for item in of_each if item is not None]
    return items


def check_teacher_prompts(rows):
    """Warn how many rows have no teacher_prompt, if others have one."""
    lacking = sum("teacher_prompt" not in row for row in rows)
    if 0 < lacking < len(rows):
        warnings.warn(
            f'{lacking} of {len(rows)} prompts have no "teacher_prompt": there the teacher reads '
            "what the student reads",
            stacklevel=2,
        )


def mixed(cfg, train, seen):
    """The training prompts mixed with aligned ones (5.2), without the questions in `seen`: -> rows.

    seen: a set of question_key.
    """
    aligned = load_prompts(cfg.aligned_prompts)
    aligned = put_in_template(cfg, aligned, "--aligned-prompts")
    aligned = once(aligned, "--aligned-prompts")
    aligned = without(aligned, seen, "--aligned-prompts", "held out or in the cold start")
    others = without(train, keys_of(aligned), "--prompts", "among --aligned-prompts")
    generator = torch.Generator().manual_seed(seed_of(cfg.seed, "mixture"))
    mixture = mix_prompts(aligned, others, cfg.aligned_fraction, generator)
    have = len(aligned) + len(others)
    if len(mixture) < have:
        warnings.warn(
            f"--aligned-fraction {cfg.aligned_fraction}: the largest such mixture has "
            f"{len(mixture)} prompts; {have - len(mixture)} of {have} are left out",
            stacklevel=2,
        )
    return mixture


def put_in_template(cfg, rows, flag):
    """The rows in --template, with a teacher_prompt in --teacher-template if there is one: -> rows.

    Rows that were in --eval-template are taken out of it. A warning counts the rows of `flag` that
    were in --template before.
    """
    rows = out_of_eval_template(cfg, rows)
    already = 0
    for row in rows:
        already += is_in_template(question_text(row["prompt"]), cfg.template)
    tell(flag, already, rows, "are in the template already and stay as they are")
    for other in TEMPLATES:
        if cfg.template not in ("none", other):
            both = [row for row in rows if is_in_template(question_text(row["prompt"]), other)]
            tell(flag, len(both), rows, f"are in the template {other!r}, too, and have both now")
    if cfg.teacher_template:
        rows = in_teacher_template(rows, cfg.template, cfg.teacher_template)
    return in_template(rows, cfg.template)


def in_teacher_template(rows, template, teacher_template):
    """The rows, each with a teacher_prompt in teacher_template: its own, or the bare question."""
    done = []
    for row, alone in zip(rows, out_of_template(rows, template)):
        prompt = row.get("teacher_prompt", alone["prompt"])
        done.append({**row, "teacher_prompt": prompt_in_template(prompt, teacher_template)})
    return done


def for_accuracy(cfg, held_out):
    """The held-out rows as they are asked when accuracy is measured, in --eval-template: -> rows.

    held_out: rows in --template, from `questions`.
    """
    if cfg.eval_template in ("", cfg.template):
        return held_out
    return in_template(out_of_template(held_out, cfg.template), cfg.eval_template)


def out_of_eval_template(cfg, rows):
    """The rows without --eval-template: one question in two templates is one question: -> rows."""
    template = getattr(cfg, "eval_template", "")
    return rows if template in ("", cfg.template) else out_of_template(rows, template)


def out_of_template(rows, template):
    """Take the questions out of a template; rows that are not in it stay as they are: -> rows."""
    done = []
    for row in rows:
        prompt = row["prompt"]
        bare = bare_question(question_text(prompt), template)
        if bare is not None:
            prompt = with_question(prompt, bare)
        done.append({**row, "prompt": prompt})
    return done


def question_text(prompt):
    """The text that a template goes around: a prompt, or the last message of a chat."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def with_question(prompt, question):
    """The prompt, a text or a chat, with another question in place of its own."""
    if isinstance(prompt, str):
        return question
    return [*prompt[:-1], {**prompt[-1], "content": question}]


def conversation_keys(cfg):
    """The questions of --cold-start-file, in the template, as keys: set of str."""
    if not cfg.cold_start_file:
        return set()
    rows = [{"prompt": x["messages"][:-1]} for x in read_conversations(cfg.cold_start_file)]
    done = in_template(out_of_eval_template(cfg, rows), cfg.template)
    bare = sum(row != row_in_template for row, row_in_template in zip(rows, done))
    tell("--cold-start-file", bare, rows, "are not in --template; they are learnt as they are")
    return keys_of(done)


def keys_of(rows):
    """The question_key of every row: set of str."""
    return {question_key(row["prompt"]) for row in rows}


def once(rows, flag):
    """The rows with each question once; a warning counts the others."""
    first = distinct(rows)
    tell(flag, len(rows) - len(first), rows, "repeat another one and are left out")
    return first


def without(rows, known, flag, why):
    """The rows whose question_key is not in `known`; a warning counts the others, and says why."""
    rest = distinct(rows, known)
    tell(flag, len(rows) - len(rest), rows, f"are {why} and left out")
    return rest


def tell(flag, count, rows, what):
    """Warn that `count` of the prompts of a flag are `what`, unless count is 0."""
    if count:
        warnings.warn(f"{flag}: {count} of {len(rows)} prompts {what}", stacklevel=3)


def some_questions(cfg):
    """--count prompts for a diagnosis, each once, drawn by the seed, in the template: -> rows.

    They are drawn from --prompts, or without it from additions.
    """
    rows = given_or_additions(cfg.prompts, cfg.seed)
    rows = once(put_in_template(cfg, rows, "--prompts"), "--prompts")
    random.Random(seed_of(cfg.seed, "some questions")).shuffle(rows)
    check_teacher_prompts(rows)
    return rows[: cfg.count]


# --- token ids -----------------------------------------------------------------------------------


def encode(tokenizer, prompt, thinking="default", where="a prompt"):
    """A prompt as a model reads it, in the chat template if there is one: -> token ids.

    An end of text, which some tokenizers append to a plain text, is cut off: nothing would follow
    it. UserError, see text_of.
    """
    return tokens_of(tokenizer, text_of(tokenizer, prompt, thinking, where))


def text_of(tokenizer, prompt, thinking="default", where="a prompt"):
    """The text of a prompt, chat template included: str.

    thinking: "on" or "off" for templates that have the switch, or "default". where: the prompt's
    name in an error. UserError if the template has no such switch, or refuses the prompt.
    """
    if thinking != "default" and "enable_thinking" not in str(tokenizer.chat_template):
        raise UserError(
            f"--thinking {thinking}: the chat template of {tokenizer.name_or_path} has no "
            "enable_thinking; leave it out"
        )
    if not tokenizer.chat_template:
        if isinstance(prompt, str):
            return prompt
        return "\n".join(message["content"] for message in prompt)
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    options = {} if thinking == "default" else {"enable_thinking": thinking == "on"}
    try:
        return tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False, **options
        )
    except Exception as error:  # a template is a program in the checkpoint: it may raise anything
        whose = f"the chat template of {tokenizer.name_or_path}"
        raise UserError(f"{where}: {whose} refuses it: {error}") from error


def tokens_of(tokenizer, text):
    """The token ids of a text.

    A chat template writes its own special tokens. Without one the tokenizer adds them, and an end
    of text at the end is cut off.
    """
    if tokenizer.chat_template:
        return tokenizer(text, add_special_tokens=False).input_ids
    ids = tokenizer(text).input_ids
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids


def encode_rows(pair, rows, *, max_prompt_tokens, new_tokens, thinking="default"):
    """Rows {"prompt", ...} -> those that fit, each with its token ids "ids".

    A row with a "teacher_prompt" gets "teacher_ids", too. Prompts without a token, or with more
    than max_prompt_tokens, are dropped and counted in a warning, never cut. UserError if no prompt
    is left, if a prompt and new_tokens outgrow a model, if a token has no output row, if most
    tokens are unknown, or if a teacher_prompt has no token.
    """
    fit = []
    for row in rows:
        where = f"prompt {row.get('id', str(row['prompt'])[:80])}"
        ids = encode(pair.tokenizer, row["prompt"], thinking, where)
        if not 0 < len(ids) <= max_prompt_tokens:
            continue
        row = {**row, "ids": ids}
        readers = (pair.student, pair.teacher)
        if "teacher_prompt" in row:
            readers = (pair.student,)
            row["teacher_ids"] = encode_for_teacher(pair, row, new_tokens, thinking, where)
        check_fits(pair, readers, ids, new_tokens, where)
        fit.append(row)
    if not fit:
        raise UserError(f"no prompt has 1 to {max_prompt_tokens} tokens; raise --max-prompt-tokens")
    if len(fit) < len(rows):
        warnings.warn(
            f"{len(rows) - len(fit)} of {len(rows)} prompts dropped: empty, or longer than "
            f"{max_prompt_tokens} tokens",
            stacklevel=2,
        )
    check_known(pair.tokenizer, [row["ids"] for row in fit], "prompts")
    for_teacher = [row["teacher_ids"] for row in fit if "teacher_ids" in row]
    check_known(pair.tokenizer, for_teacher, "teacher's prompts")
    return fit


def encode_for_teacher(pair, row, new_tokens, thinking, where):
    """The teacher_prompt of a row in the teacher's own chat template: -> token ids.

    UserError if it has no token, or if it and new_tokens outgrow the teacher.
    """
    what = f"the teacher_prompt of {where}"
    tokenizer = pair.teacher_tokenizer or pair.tokenizer
    has_switch = "enable_thinking" in str(tokenizer.chat_template)
    ids = encode(tokenizer, row["teacher_prompt"], thinking if has_switch else "default", what)
    if not ids:
        raise UserError(f"{what} has no token; write what the teacher is to read")
    check_fits(pair, (pair.teacher,), ids, new_tokens, what)
    return ids


def check_known(tokenizer, prompts, what="prompts"):
    """UserError if most tokens of these prompts, lists of ids, are the unknown token.

    what: the name of the prompts in the error.
    """
    ids = [i for prompt in prompts for i in prompt]
    unknown = ids.count(tokenizer.unk_token_id)
    if unknown > len(ids) / 2:
        raise UserError(
            f"{unknown} of {len(ids)} tokens of the {what} are {tokenizer.unk_token}: the "
            "tokenizer does not know their words; give --prompts, and conversations, in words that "
            "it knows, and no template in others"
        )


def encode_for(cfg, pair, rows):
    """encode_rows with the flags of a command: rows -> rows, [] -> []."""
    if not rows:
        return []
    new_tokens = max(cfg.max_new_tokens, getattr(cfg, "eval_max_new_tokens", 0))
    if getattr(cfg, "cold_start", 0):
        new_tokens = max(new_tokens, cfg.cold_start_max_new_tokens)
    return encode_rows(
        pair,
        rows,
        max_prompt_tokens=cfg.max_prompt_tokens,
        new_tokens=new_tokens,
        thinking=cfg.thinking,
    )


def check_fits(pair, models, ids, new_tokens, what):
    """UserError if ids and new_tokens outgrow one of the models, or if an id has no output row.

    what: the name of the text in the error.
    """
    for model in models:
        room = positions(model.config.get_text_config())
        if len(ids) + new_tokens > room:
            raise UserError(
                f"{what} and its response need {len(ids) + new_tokens} tokens, "
                f"{model.name_or_path} holds {room}; lower --max-new-tokens (and, if given, "
                "--eval-max-new-tokens, --cold-start-max-new-tokens), or shorten the text"
            )
    if max(ids) >= pair.vocab_size:
        raise UserError(f"a token of {what} has no output row; leave it out")


def positions(config):
    """The longest text whose positions the model knows: int, or inf.

    A LongRoPE model (Phi-3) encodes all positions of a text in another way if the text is longer
    than its original length. Then the start of the text is not scored as it was sampled, so that
    length is a bound, too.
    """
    bounds = [math.inf]
    if getattr(config, "max_position_embeddings", None):
        bounds.append(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        bounds.append(rope["original_max_position_embeddings"])
    return min(bounds)


def load_conversations(path, pair, thinking="default"):
    """A file of conversations -> list of (prompt ids, response ids), each response with its end.

    Ids that our own cold start has written are used as they are. UserError, with file and line, if
    a line cannot be used or outgrows a model.
    """
    examples = []
    for row in read_conversations(path):
        if row["prompt_ids"]:
            check_same_tokens(pair.tokenizer, row)
            prompt_ids = row["prompt_ids"]
            response_ids = row["response_ids"]
        else:
            *prompt, answer = row["messages"]
            text = text_of(pair.tokenizer, prompt, thinking, row["where"])
            prompt_ids = tokens_of(pair.tokenizer, text)
            content = without_second_mark(text, answer["content"])
            response_ids = continuation(pair.tokenizer, text, prompt_ids, content)
            response_ids = response_ids + pair.eos_ids[:1]
        if not prompt_ids:
            raise UserError(f"{row['where']}: there is no token before the answer; write a prompt")
        if pair.merge_ends:
            response_ids = with_merged_end(response_ids, pair.eos_ids, row["where"])
        both = (pair.student, pair.teacher)
        check_fits(pair, both, prompt_ids + response_ids, 0, row["where"])
        examples.append((prompt_ids, response_ids))
    texts = [ids for example in examples for ids in example]
    check_known(pair.tokenizer, texts, f"conversations in {path}")
    return examples


def without_second_mark(text, answer):
    """An answer without its <think> if the prompt, `text`, ends with one: str.

    The chat template of R1-Distill writes the mark into the prompt.
    """
    if text.rstrip().endswith("<think>"):
        mark = text[text.rindex("<think>") :]  # with the line end behind it, if there is one
        return answer.removeprefix(mark).removeprefix("<think>")
    return answer


def with_merged_end(response_ids, ends, where):
    """A response whose end is the first of `ends`, which stands for them all: -> token ids.

    See rollout.merge_ends: the others have probability 0. UserError if an end stands before the
    last token.
    """
    *answer, last = response_ids
    if any(i in ends for i in answer):
        raise UserError(
            f"{where}: an end token stands within its answer; remove it, or take --ends own"
        )
    return [*answer, ends[0]] if last in ends else response_ids


def continuation(tokenizer, text, prompt_ids, answer):
    """The token ids of an answer as it stands behind its prompt, `text` with prompt_ids.

    Some tokenizers encode the start of a text differently: SentencePiece puts a space before the
    first word. So prompt and answer are encoded together, and the prompt's ids are cut off. If the
    prompt's ids are not a prefix, because a token spans the border, the answer is encoded alone.
    """
    alone = tokenizer(answer, add_special_tokens=False).input_ids
    together = tokens_of(tokenizer, text + answer)
    rest = together[len(prompt_ids) :]
    is_prefix = together[: len(prompt_ids)] == prompt_ids
    if is_prefix and same_words(tokenizer.decode(rest), tokenizer.decode(alone)):
        return rest
    return alone


def same_words(a, b):
    """Are two texts the same but for their spaces? -> bool."""
    return "".join(a.split()) == "".join(b.split())


def check_same_tokens(tokenizer, row):
    """UserError if the response ids of a line do not decode to its last message."""
    said = tokenizer.decode(row["response_ids"][:-1])
    if said != row["messages"][-1]["content"]:
        raise UserError(
            f'{row["where"]}: its "response_ids" are of another tokenizer; remove "prompt_ids" and '
            '"response_ids" from the file'
        )
