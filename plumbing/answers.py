"""plumbing/answers.py: is a response right? The answer in it, compared as a number where it is one."""
import re
from fractions import Fraction

import torch
from tqdm import tqdm


def read_answer(text):
    r"""The answer in a response: inside its last closed \boxed{...}, else after its last "Answer:";
    None without either.

    read_answer(r"so \boxed{\frac{1}{2}}.") -> r"\frac{1}{2}"      read_answer("Answer: 12 .") -> "12 ."
    """
    open_at, boxes = [], []                                    # starts of open braces, None for those of no box
    for brace in re.finditer(r"\\boxed\s*\{|[{}]", text):
        if brace[0] != "}":
            open_at.append(brace.end() if len(brace[0]) > 1 else None)
        elif open_at and (start := open_at.pop()) is not None:
            boxes.append((start, brace.start()))
    if boxes:
        return text[slice(*max(boxes))].strip()
    rest = re.split(r"answer:", text, flags=re.IGNORECASE)[1:]
    return rest[-1].replace("**", "").strip().split("\n")[0].strip() or None if rest else None


def as_number(text):
    r"""The number that a text is, exactly, or None:
    "1,200" "$-3$" "2.50" "\frac{3}{4}" "3/4" "12%" "12 ." -> Fraction.
    """
    text = _bare(text).replace("{,}", "").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"^([+-]?)\\frac\{?([0-9]{1,40})\}?\{?([0-9]{1,40})\}?$", r"\1\2/\3", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text)
    if not re.fullmatch(r"[+-]?(\d{1,40}/\d{1,40}|\d{1,40}\.?\d{0,40}|\.\d{1,40})", text):
        return None
    try:
        return Fraction(text.rstrip("."))
    except ZeroDivisionError:
        return None


def same_answer(said, want):
    """Is an answer right? Compared as numbers where both are,
    else as text without case, spaces, $ and \\text{}: bool.
    """
    if said is None:
        return False
    a, b = as_number(said), as_number(want)
    return a == b if a is not None and b is not None else _bare(said).lower() == _bare(want).lower()


def _bare(text):
    text = re.sub(r"\\(text|mathrm|mbox)\{([^{}]*)\}", r"\2", str(text))
    text = re.sub(r"\\left|\\right|\\[()\[\]!,; ]|\^\{?\\circ\}?|\\?[%$]|\s", "", text)
    return text.strip("*").rstrip(".").replace("\u2212", "-")


def answered(pair, rows, *, model=None, starts=None, n=1, max_new_tokens, seed=0, at_once=256, share=(0, 1), **how):
    """Each of the rows (from Pair.encode) answered n times by a model of the pair, the student by default:
    -> right (rows, n) bool, truncated (rows, n) bool.

    starts: the beginning of each response, already written (token ids); it counts towards max_new_tokens. Where it ends
    in an eos or has used them up there is nothing left to write, and it is judged as it stands. `at_once` responses of
    like length are written at a time. share: (rank, processes); what others do is False here.
    """
    eos, starts = pair.ending["eos_ids"], starts or [[] for _ in rows]
    right, truncated = torch.zeros(2, len(rows), n, dtype=torch.bool)

    def judge(i, ids):
        text = pair.tokenizer.decode(ids, skip_special_tokens=True)
        return same_answer(read_answer(text), rows[i]["answer"]), not (ids and ids[-1] in eos)
    room = [0 if start and start[-1] in eos else max_new_tokens - len(start) for start in starts]
    for i in range(share[0], len(rows), share[1]):
        if room[i] <= 0:
            right[i], truncated[i] = map(torch.tensor, judge(i, starts[i]))
    order = sorted((i for i in range(len(rows)) if room[i] > 0), key=lambda i: len(rows[i]["ids"]) + len(starts[i]))
    size = max(1, at_once // n)                                                         # like lengths: little padding
    for first in tqdm(range(0, len(order), size), desc="answers", leave=False, mininterval=1, disable=None):
        part = order[first:first + size]
        mine = part[share[0]::share[1]]
        if mine:
            r = pair.write([rows[i]["ids"] + starts[i] for i in part], model=model, n=n, seed=seed + first, share=share,
                           max_new_tokens=max(room[i] for i in part), **how)
            for row in range(len(r.ids)):
                i, j = mine[row // n], row % n
                right[i, j], truncated[i, j] = judge(i, starts[i] + r.response_ids(row)[:room[i]])
    return right, truncated
