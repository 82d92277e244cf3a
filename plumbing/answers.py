r"""plumbing/answers.py: is a response right? The answer is read from the text and compared.

Numbers are compared exactly, everything else as text without what LaTeX puts around it. Not here:
units, other ways to write a tuple, algebra. So x + 1 and 1 + x are two answers. The package
math-verify knows that they are equal: --checker math-verify compares with it.
"""

import re
from fractions import Fraction

import torch
from tqdm import tqdm

from plumbing.processes import whole
from plumbing.prompts import positions
from plumbing.slots import rollout
from rollout import seed_of
from teacher import teacher_ids

# --- reading -------------------------------------------------------------------------------------

# what opens a box, plain braces, and what is passed over: \{, \} and the \\ at the end of a row
BRACE = re.compile(r"\\boxed\s*\{|\\\\(?!boxed)|\\[{}]|[{}]")
# "Answer:", also bold or with a wide colon, and the start of a formula; "####" in the last line
MARK = re.compile(r"answer[\s*]*[:\uff1a][\s*]*(?:\\\[|\$\$)?\s*|####(?=[^\n#]*\Z)", re.IGNORECASE)
LINE_END = re.compile(r"\n|\\\]|\$\$")  # of a line, or of a formula


def read_answer(text):
    r"""The answer in a response: str, or None if there is none.

    It is inside the last closed \boxed{...}. Without a box, it stands behind the last "Answer:" or
    "####", which counts in the last line only. Empty ones do not count. A thought is not an answer:
    only what follows the last </think> counts.

    read_answer(r"so \boxed{\frac{1}{2}}.") -> r"\frac{1}{2}"
    read_answer("<think>Answer: 5?</think>**Answer**: 7") -> "7"
    """
    text = text.rpartition("</think>")[2].strip()
    if "<think>" in text:
        return None  # cut off in the middle of a thought
    box = last_box(text)
    if box is not None:
        return box.strip()
    for part in reversed(MARK.split(text)[1:]):
        first_line = LINE_END.split(part)[0]
        answer = first_line.strip().strip("*").strip()
        if answer:
            return answer
    return None


def last_box(text):
    r"""What stands in the last closed \boxed{...} that is not empty: str or None."""
    open_braces = []  # for each: where the content of its box begins, or None if it is not a box's
    start = -1
    content = None
    for brace in BRACE.finditer(text):
        if brace[0].startswith(r"\boxed"):
            open_braces.append(brace.end())
        elif brace[0] == "{":
            open_braces.append(None)
        elif brace[0] == "}" and open_braces:
            begun = open_braces.pop()
            if begun is not None and begun > start and text[begun : brace.start()].strip():
                start = begun
                content = text[begun : brace.start()]
    return content


# --- comparing -----------------------------------------------------------------------------------

SPELLINGS = (
    (r"\dfrac", r"\frac"),
    (r"\tfrac", r"\frac"),
    (r"^{\circ}", "°"),
    (r"^\circ", "°"),
    (r"\%", "%"),
    (r"\leq", r"\le"),
    (r"\geq", r"\ge"),
    (r"\varnothing", r"\emptyset"),
    ("∞", r"\infty"),
    ("{,}", ","),
    ("π", r"\pi"),
    ("\u2212", "-"),  # the minus of typesetters
    ("\u2013", "-"),  # en dash
)
# \left \right \displaystyle \( \) \[ \] \! \, \$ $, but not what follows the end of a row, \\
INVISIBLE = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])|(?<!\\)\\[()\[\]!,]|\\?\$")
WIDE_SPACE = re.compile(r"\\q?quad(?![A-Za-z])|(?<!\\)\\[;: ]|~")
FONT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|boldsymbol|mathit|mbox)\{([^{}]*)\}"
)
SPACE = re.compile(r"(?<![\d,]) | (?!\d)")  # any but those of "1 1/4" and "10, 100"
FRACTION = re.compile(r"\\frac(?:\{([+-]?\d+)\}|(\d))(?:\{(\d+)\}|(\d))")  # \frac{-1}{2}, \frac12
SHORT_BRACES = re.compile(r"\{(\w)\}")  # x^{2}, \sqrt{3}
NAMED = re.compile(r"([A-Za-z](?:\([A-Za-z]\))?)=([^=]*)")  # x=7, f(x)=2x
CHOICE = re.compile(r"\(?([A-J])\)?")  # (B)
NUMBER = re.compile(
    r"""(?P<sign>[+-]?)
    (?:(?P<whole>\d{1,40})\ (?=\d+/))?    # the 1 of 1 3/4
    (?P<size>\d{1,40}/0*[1-9]\d{0,39}     # 3/4, not 3/0
    |[1-9]\d{0,2}(?:,\d{3}){1,12}(?:\.\d{0,40})?    # 1,200.50
    |\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})  # 12, 1.5, .5
    [%°]?""",
    re.VERBOSE,
)


def same_answer(said, want):
    r"""Are two answers, str or None, the same? None never is. -> bool.

    Either may be a whole solution, as in some files: its answer is then read first.

    The same: 5/4 and 1 1/4; 1,200 and 1200.0; \text{(B)} and B; Yes and yes; x = 7 and 7; 18 and
    "9 * 2 = 18 #### 18". Different: 3 4 and 34; n and N; x = 7 and y = 7; 0.3333 and 1/3; 20 miles
    and 20.
    """
    if said is None or want is None:
        return False
    name, value = named(read_answer(said) or said)
    other_name, other_value = named(read_answer(want) or want)
    if name and other_name and name != other_name:
        return False
    return canonical(value) == canonical(other_value)


def named(answer):
    r"""The name of an answer, if it has one, and the rest: "$x = 7$" -> ("x", "7")."""
    text = plain(answer)
    found = NAMED.fullmatch(text)
    if found:
        return found[1], found[2]
    return "", text


def canonical(answer):
    r"""A form that is equal for equal answers: a Fraction if the answer is a number, else a str.

    canonical(r"$1\dfrac{1}{4}$") -> Fraction(5, 4)
    canonical(r"\left( 2, \text{even} \right)") -> "(2,even)"
    """
    text = plain(answer)
    number = NUMBER.fullmatch(text)
    if number:
        size = int(number["whole"] or 0) + Fraction(number["size"].replace(",", ""))
        return -size if number["sign"] == "-" else size
    if text.lower() in ("yes", "no", "true", "false"):
        return text.lower()
    return text.replace(", ", ",")  # (10, 100) and (10,100)


def plain(text):
    r"""A text without LaTeX markup and meaningless spaces: "$x = \frac12$." -> "x=1/2"."""
    text = WIDE_SPACE.sub(" ", INVISIBLE.sub("", text))
    text = SPACE.sub("", " ".join(text.split()))
    for spelling, ours in SPELLINGS:
        text = text.replace(spelling, ours)
    text = FRACTION.sub(r" \1\2/\3\4 ", FONT.sub(r"\1", text))
    text = SPACE.sub("", text.strip(" *`").rstrip(".,;"))
    if text.startswith("{") and text.endswith("}") and text.count("{") == 1:
        text = text[1:-1]
    text = SHORT_BRACES.sub(r"\1", text)
    choice = CHOICE.fullmatch(text)
    return choice[1] if choice else text


def same_to_math_verify(said, want):
    r"""Does math-verify say that two answers are the same? None never is. -> bool.

    The same: x + 1 and 1 + x; \sqrt{8} and 2\sqrt{2}.
    """
    from math_verify import parse, verify  # not among the requirements

    if said is None or want is None:
        return False
    box = r"\boxed{{{}}}".format
    return verify(parse(box(read_answer(want) or want)), parse(box(said)))


CHECKERS = {"built-in": same_answer, "math-verify": same_to_math_verify}  # choices of --checker


# --- asking --------------------------------------------------------------------------------------


def answered(
    pair,
    rows,
    *,
    model=None,
    starts=None,
    n=1,
    max_new_tokens,
    seed=0,
    at_once=256,
    share=(0, 1),
    checker="built-in",
    **how,
):
    """Let a model of the pair, by default the student, answer each row n times.

    -> right (rows, n) bool, truncated (rows, n) bool. rows: from plumbing.prompts.encode_rows. The
    teacher reads the prompt of its own, if a row has one. starts: for each row the token ids that
    are written already. They count towards max_new_tokens; a start that has ended, or has used
    these up, is judged as it stands. Responses of similar length are written together, at_once at
    a time. share: (rank, processes); the rows of other processes are False. checker: a name in
    CHECKERS. how: temperature, top_p.
    """
    rank, processes = share
    is_same = CHECKERS[checker]
    prompts = [teacher_ids(row) if model is pair.teacher else row["ids"] for row in rows]
    model = model or pair.student
    starts = starts or [[] for _ in rows]
    right = torch.zeros(len(rows), n, dtype=torch.bool)
    truncated = torch.zeros(len(rows), n, dtype=torch.bool)

    room = []  # tokens that each response may still have
    for start in starts:
        has_ended = len(start) > 0 and start[-1] in pair.eos_ids
        room.append(0 if has_ended else max(0, max_new_tokens - len(start)))

    for i in range(rank, len(rows), processes):
        if room[i] == 0:
            right[i], truncated[i] = judged(pair, rows[i], prompts[i], starts[i], is_same)

    lengths = [len(prompt) + len(start) for prompt, start in zip(prompts, starts)]
    unfinished = [i for i in range(len(rows)) if room[i] > 0]
    if not unfinished:
        return right, truncated
    unfinished.sort(key=lambda i: lengths[i])
    longest = positions(model.config.get_text_config())
    groups = grouped(unfinished, lengths, room, max(1, at_once // n), longest)
    bar = tqdm(groups, desc="answers", leave=False, mininterval=1, disable=None)
    with pair.autocast(), whole(model):
        for group in bar:
            mine = group[rank::processes]
            if not mine:
                continue
            r = rollout(
                model,
                [prompts[i] + starts[i] for i in mine],
                n=n,
                max_new_tokens=max(room[i] for i in group),
                seeds=[seed_of(seed, "answer", i) for i in mine],
                in_flight=pair.in_flight,
                **pair.sampling,
                **how,
            )
            for row in range(len(mine) * n):
                i = mine[row // n]
                j = row % n
                response = starts[i] + r.response_ids(row)[: room[i]]
                right[i, j], truncated[i, j] = judged(pair, rows[i], prompts[i], response, is_same)
    return right, truncated


def grouped(order, lengths, room, size, longest):
    """Cut a list of rows into groups that are written together: -> list of lists of row numbers.

    lengths: of each row's text so far, tokens; room: what it may still have. All of a group write
    as much as the one with the most room, and no text of the group may outgrow the `longest` that
    the model knows. size: rows of a group, at most.
    """
    groups = []
    group = []
    for i in order:
        wider = [*group, i]
        most = max(lengths[j] for j in wider) + max(room[j] for j in wider)
        if group and (len(wider) > size or most > longest):
            groups.append(group)
            wider = [i]
        group = wider
    return [*groups, group] if group else groups


def judged(pair, row, prompt_ids, ids, is_same=same_answer):
    """Is a response (ids) to a row right by is_same, and is it cut off? -> (bool, bool)."""
    is_right = is_same(read_answer(text_said(pair, prompt_ids, ids)), row["answer"])
    is_cut = len(ids) == 0 or ids[-1] not in pair.eos_ids
    return is_right, is_cut


def text_said(pair, prompt_ids, ids):
    """The text of a response (ids) to a prompt, for read_answer: str.

    Without special tokens and ends. The marks of a thought stay; some tokenizers call them special.
    """
    tokenizer = pair.tokenizer
    hidden = set(pair.eos_ids)
    for i, token in tokenizer.added_tokens_decoder.items():
        if token.special and token.content not in ("<think>", "</think>"):
            hidden.add(i)
    text = tokenizer.decode([i for i in ids if i not in hidden])
    if tokenizer.decode(prompt_ids[-8:]).rstrip().endswith("<think>"):
        text = "<think>" + text  # the chat template has begun the thought
    return text
