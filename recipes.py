"""recipes.py: what to do when it fails (paper 5).

    5.1  off-policy cold start      the teacher answers some prompts, the student is fine-tuned on what it said, and
                                    goes on with OPD from there, on other prompts
    5.2  teacher-aligned prompts    the template and the problems that the teacher was post-trained on, mixed with
                                    others so that the student keeps its entropy
    ours select                     where nobody knows what the teacher was post-trained on: rank a pool by measured
                                    alignment

`opd.py --cold-start`, `--template` and `--aligned-prompts` call these. Alone:

    python recipes.py rollouts --student S --teacher T --prompts F --out conversations.jsonl
    python recipes.py select --student S --teacher T --prompts POOL --templates none,answer,boxed --out aligned.jsonl

Not here: a filter by correctness (the paper has none), embedding similarity (it removes prompts above cosine .6; we
compare normalised text).
"""
import argparse
import contextlib
import json
import math
import os
import unicodedata
from pathlib import Path

import torch
from tqdm import tqdm

from analysis import Parser, finite_or_null, one_line, positions
from loss import in_chunks
from rollout import (Rollout, batch, check_file, encode, from_processes, is_chat, json_lines, left_pad, load_prompts,
                     processes, rollout, sum_over_processes)
from teacher import Pair, learning, micro_batches, pick_device, states

# --- 5.2 the template ----------------------------------------------------------------------------------------------

TEMPLATES = {
    "none": "{question}",
    # DAPO's, the student's default in the paper
    "answer": "Solve the following math problem step by step. The last line of your response should be of the form "
              "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{question}\n\n"
              'Remember to put your answer on its own line after "Answer:".',
    # that of the teacher JustRL. The authors' released data has a literal \boxed{{}} here, an escape left over
    "boxed": "{question} Please reason step by step, and put your final answer within \\boxed{}.",
}


def apply_template(question, template):
    """Put a question into a template, by name or as a string with {question} in it: str -> str.

    Raises ValueError without one.
    """
    form = TEMPLATES.get(template, template)
    if "{question}" not in form:
        raise ValueError(f"template {template!r} is none of {', '.join(TEMPLATES)} and has no {{question}} in it")
    return form.replace("{question}", question)


def in_template(rows, template):
    """Put every question into a template: list of {"prompt": text or chat messages, ...} -> the same, new rows.

    Of a chat it is the last message that is put into it.
    """
    def put(prompt):
        if isinstance(prompt, str):
            return apply_template(prompt, template)
        return [*prompt[:-1], {**prompt[-1], "content": apply_template(prompt[-1]["content"], template)}]
    return [{**row, "prompt": put(row["prompt"])} for row in rows]


# --- 5.2 the content -----------------------------------------------------------------------------------------------


def mix_prompts(aligned, others, fraction, generator):
    """The largest mixture of which exactly round(fraction * size) prompts are aligned, shuffled:
    two lists of rows -> list.

    Prompts of `others` that are also in `aligned` are left out, and so are repeats (see same_question). The paper
    advises the mixture and gives no ratio. Raises ValueError where fraction is outside 0..1 or nothing is left.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"the aligned fraction {fraction} is outside 0..1")
    aligned = list({same_question(row["prompt"]): row for row in aligned}.values())
    known = {same_question(row["prompt"]) for row in aligned}
    others = list({key: row for row in others if (key := same_question(row["prompt"])) not in known}.values())
    size = next((size for size in range(len(aligned) + len(others), 0, -1)
                 if round(fraction * size) <= len(aligned) and size - round(fraction * size) <= len(others)), 0)
    if not size or fraction and not aligned or fraction < 1 and not others:
        raise ValueError(f"{len(aligned)} aligned and {len(others)} other prompts cannot be mixed "
                         f"at a fraction of {fraction}")

    def some(rows, count):
        return [rows[i] for i in torch.randperm(len(rows), generator=generator)[:count].tolist()]
    mixed = some(aligned, round(fraction * size)) + some(others, size - round(fraction * size))
    return some(mixed, size)


def same_question(prompt, template="none"):
    """A key that prompts share when they differ in case, spacing, Unicode form, template or system prompt alone.

    -> str. Templates are the known ones and the given one.
    """
    def bare(text):
        return "".join(unicodedata.normalize("NFKC", text).casefold().split())
    if not isinstance(prompt, str):
        *earlier, last = [message["content"] for message in prompt if message["role"] != "system"] or [""]
        return "".join(map(bare, earlier)) + same_question(last, template)
    text = bare(prompt)
    for form in (*TEMPLATES.values(), TEMPLATES.get(template, template)):
        before, _, after = map(bare, form.partition("{question}"))
        if before + after and text.startswith(before) and text.endswith(after):
            text = text[len(before):len(text) - len(after)]
    return text


def alignment(pair, rows, *, k=16, n=1, max_new_tokens=128, temperature=1.0, seed=0, micro_batch_tokens=16384,
              at_once=64):
    """How well student and teacher meet on each prompt, at states that the student visits:
    -> list of {"mass", "confidence", "score"}.

    mass: the smaller of the two overlap masses (Eq. 9, 10); confidence: exp(-H(q)), 1 where the teacher is certain;
    each a mean over the tokens of n responses. score = mass * confidence. This ranking is ours, not the paper's.
    """
    out = []
    for start in tqdm(range(0, len(rows), at_once), desc="alignment", mininterval=1, leave=False, disable=None):
        r = pair.write([row["ids"] for row in rows[start:start + at_once]], n=n, max_new_tokens=max_new_tokens,
                       temperature=temperature, seed=seed + start)
        grid = positions(pair, r, k, temperature=temperature, micro_batch_tokens=micro_batch_tokens)     # (B, T) each
        mass, mass_q, confidence = (x.view(-1, n * x.size(1)).nanmean(1) for x in (                      # (B/n,) each
            grid["overlap_mass_student"], grid["overlap_mass_teacher"], grid["entropy_teacher"].neg().exp()))
        mass = torch.minimum(mass, mass_q)
        out += [dict(zip(("mass", "confidence", "score"), x))
                for x in torch.stack([mass, confidence, mass * confidence], 1).tolist()]
    return out


def select(pair, rows, *, templates=("none",), keep=0.5, sample=32, encoding, **how):
    """Choose the template and the prompts of a pool where student and teacher meet best: -> dict.

    templates are compared on the first `sample` prompts; then every prompt is scored under the best one, and the best
    share `keep` becomes "aligned", the rest "others": the out-of-distribution share for mix_prompts. encoding and how
    are the options of Pair.encode and of alignment. -> {"template", "templates": {template: mean score}, "aligned",
    "others"}, rows as they came with their "alignment". Ours, not the paper's, which knows its teacher's prompts.
    """
    if not 0 < round(keep * len(rows)) < len(rows):
        raise ValueError(f"--keep {keep}: of {len(rows)} prompts that keeps none, or all")

    def scored(rows, template):
        encoded = pair.encode(in_template([{**row, "row": row} for row in rows], template), **encoding)
        return [{**e["row"], "alignment": a} for e, a in zip(encoded, alignment(pair, encoded, **how))]
    means = {}
    for template in templates:
        some = [row["alignment"]["score"] for row in scored(rows[:sample], template)]
        means[template] = sum(some) / len(some)
    best = max(means, key=means.get)
    ranked = sorted(scored(rows, best), key=lambda row: -row["alignment"]["score"])
    cut = round(keep * len(ranked))
    return {"template": best, "templates": means, "aligned": ranked[:cut], "others": ranked[cut:]}


# --- 5.1 the off-policy cold start ---------------------------------------------------------------------------------


def is_degenerate(text_or_ids, *, loops=4, shortest=16, longest_period=32, gram=8, repeated=0.5):
    """Has this response fallen into repetition? Text counts in words, token ids in tokens; bool.

    True when it ends in a loop: one block of at most `longest_period` items, `loops` times or more in a row, over at
    least `shortest` items; or when, of `gram` * 8 items or more, over half of its runs of `gram` have occurred before
    in it.
    The paper drops "degenerately repetitive" responses without a rule; this one is ours.
    """
    items = text_or_ids.split() if isinstance(text_or_ids, str) else list(text_or_ids)
    for period in range(1, min(longest_period, len(items) // loops) + 1):
        span = max(period * loops, shortest)
        if len(items) >= span and all(items[-i] == items[-i - period] for i in range(1, span - period + 1)):
            return True
    grams = [tuple(items[i:i + gram]) for i in range(len(items) - gram + 1)]
    return len(items) >= gram * 8 and len(set(grams)) < (1 - repeated) * len(grams)


def teacher_rollouts(pair, rows, path, *, max_new_tokens, temperature=0.7, top_p=0.95, seed=0, at_once=64):
    """One response of the teacher to each row (from Pair.encode), written to `path` as they come:
    -> {"kept", "unfinished", "degenerate"}.

    A line is {"messages": [..., {"role": "assistant", "content": text}]}, what other SFT tools read. What is dropped,
    unfinished within max_new_tokens, degenerate or empty, goes to <path>.dropped.jsonl with the reason, so that it can
    be read too. No filter by correctness, as in the paper. Both files are continued where they stop: an interrupted
    call asks for nothing twice. Several processes share the work, and the first one writes.
    """
    path, dropped = Path(path), Path(f"{path}.dropped.jsonl")
    first = processes()[0] == 0
    done = from_processes([whole_lines(file) for file in (path, dropped)] if first else None)[0]
    counts = {"kept": len(done[0]), "unfinished": 0, "degenerate": 0}
    for line in done[1]:
        try:
            counts[json.loads(line)["why"]] += 1
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{dropped}: not what was written there; remove it and {path} to begin anew") from None
    ready = sum(counts.values())
    starts = range(ready - ready % at_once, len(rows), at_once) if ready < len(rows) else ()
    files = (path, dropped) if first else [os.devnull] * 2
    with open(files[0], "a", encoding="utf-8") as kept, open(files[1], "a", encoding="utf-8") as rest:
        for start in tqdm(starts, desc="teacher's responses", mininterval=1, disable=None):
            part = rows[start:start + at_once]
            with pair.autocast():
                r = rollout(pair.teacher, [row["ids"] for row in part], max_new_tokens=max_new_tokens,
                            temperature=temperature, top_p=top_p, **pair.ending,
                            generator=torch.Generator(pair.device).manual_seed(seed * 1_000_003 + start))
            for i in range(max(0, ready - start), len(part)):
                ids, prompt = r.response_ids(i), part[i]["prompt"]
                text = pair.tokenizer.decode(ids if r.truncated[i] else ids[:-1])            # marks of thinking stay
                chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
                line = {"messages": [*chat, {"role": "assistant", "content": text}]}
                why = ("unfinished" if r.truncated[i] else
                       "degenerate" if is_degenerate(ids[:-1]) or not text.strip() else "kept")
                counts[why] += 1
                print(json.dumps(line if why == "kept" else {**line, "why": why}, ensure_ascii=False),
                      file=kept if why == "kept" else rest, flush=True)
    return from_processes(counts)[0]                            # when all is written


def whole_lines(path):
    """The lines of a file that may not exist; a last line without its end, torn by a kill, is cut off the file."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")                        # bytes: a kill may fall within a character
    torn = lines.pop()
    if torn:
        os.truncate(path, path.stat().st_size - len(torn))
    return [line.decode() for line in lines]


def read_conversations(path):
    """JSON lines {"messages": [...]} that end with what the assistant says: -> list of message lists;
    ValueError with the line.
    """
    chats = []
    for number, row in json_lines(path):
        chat = row.get("messages") if isinstance(row, dict) else None
        if not (is_chat(chat) and len(chat) > 1 and chat[-1]["role"] == "assistant" and chat[-1]["content"]):
            raise ValueError(f'{path}:{number} needs "messages" that end with what the assistant says')
        chats.append(chat)
    if not chats:
        raise ValueError(f"{path} holds no conversations")
    return chats


def load_conversations(path, pair, thinking="default"):
    """A file of conversations -> [(prompt ids, response ids)], each response ending as the teacher ends one."""
    options, examples = {} if thinking == "default" else {"enable_thinking": thinking == "on"}, []
    for *asked, answer in read_conversations(path):
        response = pair.tokenizer(answer["content"], add_special_tokens=False).input_ids
        examples.append((encode(pair.tokenizer, asked, **options),
                         response + [pair.end_id] * (pair.end_id is not None)))
        pair.check_fits(sum(examples[-1], []), 0, f"conversation {str(asked)[:80]!r}")
    return examples


def cold_start(pair, optimizer, examples, *, steps, lr=1e-5, warmup=0.05, batch_size=64, seed=0, start=0,
               micro_batch_tokens=16384, chunk=None, whole=contextlib.nullcontext):
    """Fine-tune the student on [(prompt ids, response ids)], response tokens only;
    yields a row of metrics after each update.

    lr rises over the share `warmup` of the steps and falls to 0 as a cosine, as in the paper. The loss is the mean
    negative log-likelihood over all response tokens of a step, whatever the cut into micro-batches. The batch and the
    lr of a step depend on (seed, step) alone, so that `start` goes on with the optimizer of a run that was cut.
    A step whose loss or gradient is not finite is no update: its row has "skipped", the reason and the examples by
    number. Raises FloatingPointError at the third in a row. whole: a context manager around an update and what is done
    with its row, which a signal must not part.
    """
    in_a_row = 0
    student, warm, share = pair.splits[0], max(1, math.ceil(warmup * steps)), processes()
    parameters = list(pair.student.parameters())

    def negative_log_likelihood(log_p, _, y):                                               # (c, V), (c,) -> (c,)
        return {"loss": -log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)}
    for step in range(start, steps):
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warm) * cosine
        chosen = batch(range(len(examples)), step, batch_size, seed)
        r = as_rollout([examples[i] for i in chosen], pair.ending["pad_id"], pair.device)
        total, loss = r.response_mask.sum(), torch.zeros((), device=pair.device)
        parts = list(micro_batches(r, micro_batch_tokens, share))
        for i, (_, ids, mask, is_response) in enumerate(parts):
            def learn():
                h = states(student.trunk, ids, mask, is_response)                            # (N, H)
                return in_chunks(negative_log_likelihood, h, None, student.head, None, ids[is_response], chunk=chunk)[1]
            with pair.autocast():
                part = learning(student, learn, last=i == len(parts) - 1)
            (part * (share[1] / total)).backward()
            loss += part.detach() / total
        loss = sum_over_processes(loss).item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        row = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"],
               "tokens": int(total)}
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        row = finite_or_null(row)
        with whole():
            if bad:
                row["skipped"] = {"why": f"loss {loss}, gradient norm {norm}",
                                  "examples": sorted(i + 1 for i in chosen)}
            else:
                optimizer.step()
            in_a_row = in_a_row + 1 if bad else 0
            optimizer.zero_grad()
            yield row
        if in_a_row == 3:
            raise FloatingPointError(
                f"cold start, steps {step - 1} to {step + 1}: {row['skipped']['why']}; lower --cold-start-lr, or look "
                f"at these conversations: {row['skipped']['examples'][:16]}")


def as_rollout(examples, pad_id, device):
    """[(prompt ids, response ids)] as if they had been sampled, without their probabilities: -> Rollout."""
    prompts, responses = zip(*examples)
    ids, mask = left_pad(prompts, pad_id, device)                                           # (B, P), (B, P)
    backwards, written = left_pad([response[::-1] for response in responses], pad_id, device)
    tokens, written = backwards.flip(1), written.flip(1)                                # (B, T), padded on the right
    return Rollout(torch.cat([ids, tokens], 1), torch.cat([mask, written], 1), written, None, None)


# --- from the command line -----------------------------------------------------------------------------------------


def parse(argv=None):
    """Flags -> namespace; what cannot work is one line on stderr and exit code 2, before a model is loaded."""
    parser = Parser(prog="recipes.py",
                    description="Teacher's responses for a cold start, or the prompts of a pool that suit a pair.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, why in (("rollouts", "the teacher answers every prompt (5.1)"),
                      ("select", "rank a pool by measured alignment (ours)")):
        command = commands.add_parser(name, help=why, description=why, allow_abbrev=False,
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for flag in ("student", "teacher"):
            command.add_argument(f"--{flag}", required=True, help="directory or hub name")
        command.add_argument("--prompts", required=True, help='JSON lines {"prompt": ...}')
        command.add_argument("--out", required=True, help="file to write; rollouts goes on with one that is there")
        command.add_argument("--max-new-tokens", type=int, default=128, help="of a response")
        command.add_argument("--max-prompt-tokens", type=int, default=1024,
                             help="longer prompts are dropped and counted")
        command.add_argument("--thinking", default="default", choices=("default", "on", "off"),
                             help="of chat templates that have it")
        command.add_argument("--seed", type=int, default=0, help="of all sampling")
        command.add_argument("--device", default="auto", help="auto: cuda where there is one, else cpu")
        command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation")
        command.add_argument("--trust-remote-code", action="store_true",
                             help="run code that a checkpoint brings; read it first")
        if name == "rollouts":
            command.add_argument("--count", type=int, help="the first so many prompts (default: all)")
            command.add_argument("--template", default="none",
                                 help="none, answer, boxed, or your own text with {question} in it")
            command.add_argument("--temperature", type=float, default=0.7, help="of the teacher; the paper's")
            command.add_argument("--top-p", type=float, default=0.95, help="of the teacher; the paper's")
        else:
            command.add_argument("--templates", default="none", help="to compare, by name, separated by commas")
            command.add_argument("--keep", type=float, default=0.5, help="share of the pool that counts as aligned")
            command.add_argument("--n", type=int, default=1, help="responses a prompt")
            command.add_argument("--k", type=int, default=16, help="of the overlap masses")
    flags = parser.parse_args(argv)
    if not Path(flags.out).absolute().parent.is_dir():
        parser.error(f"--out {flags.out}: its folder does not exist; make it first")
    for name in ("max_new_tokens", "max_prompt_tokens", "count", "n", "k"):
        value = getattr(flags, name, None)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if not 0 < getattr(flags, "keep", 0.5) < 1:
        parser.error(f"--keep {flags.keep}: must lie between 0 and 1")
    if getattr(flags, "temperature", 0) < 0 or not 0 < getattr(flags, "top_p", 1) <= 1:
        parser.error("--temperature must not be negative, --top-p above 0 and at most 1")
    try:
        check_file(flags.prompts, "--prompts")
        pick_device(flags.device, flags.dtype)
        for template in flags.templates.split(",") if flags.command == "select" else [flags.template]:
            apply_template("", template)
    except ValueError as error:
        parser.error(str(error))
    return flags


def main(argv=None):
    flags = parse(argv)
    with one_line("recipes.py"):
        rows = load_prompts(flags.prompts)
        pair = Pair.load(flags.student, flags.teacher, device=flags.device, dtype=flags.dtype,
                         trust_remote_code=flags.trust_remote_code)
        encoding = dict(max_prompt_tokens=flags.max_prompt_tokens, new_tokens=flags.max_new_tokens,
                        thinking=flags.thinking)
        if flags.command == "rollouts":
            counts = teacher_rollouts(
                pair, pair.encode(in_template(rows[:flags.count], flags.template), **encoding), flags.out,
                seed=flags.seed, max_new_tokens=flags.max_new_tokens, temperature=flags.temperature, top_p=flags.top_p)
            print(f"{counts['kept']} responses in {flags.out}; {counts['unfinished']} unfinished and "
                  f"{counts['degenerate']} degenerate ones in {flags.out}.dropped.jsonl")
            return
        chosen = select(pair, rows, templates=flags.templates.split(","), keep=flags.keep, encoding=encoding,
                        k=flags.k, n=flags.n, max_new_tokens=flags.max_new_tokens, seed=flags.seed)
    for template, score in sorted(chosen["templates"].items(), key=lambda item: -item[1]):
        print(f"template {template:8} score {score:.4f}   (mass * confidence)")
    out = Path(flags.out)
    others = out.with_name(f"{out.stem}.others{out.suffix}")
    for path, part in ((out, chosen["aligned"]), (others, chosen["others"])):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), encoding="utf-8")
        scores = [row["alignment"]["score"] for row in part]
        print(f"{path}: {len(part)} prompts, scores {min(scores):.4f} to {max(scores):.4f}")
    print(f"go on with: opd.py ... --template {chosen['template']} --aligned-prompts {out} --prompts {others}")


if __name__ == "__main__":
    main()
