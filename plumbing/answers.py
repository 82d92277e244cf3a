"""plumbing/answers.py: is a response right? The answer in it, compared as a number where it is one.

Not here: symbolic equality. x + 1 and 1 + x are two texts; the package math-verify proves such things equal.
"""

import re
from fractions import Fraction

import torch
from tqdm import tqdm

# Where an answer stands
BRACE = re.compile(
    r"\\boxed\s*\{|\\\\(?!boxed)|\\[{}]|[{}]"
)  # \{, \} and the \\ of a row are no braces
BARE_BOX = re.compile(r"\\boxed\s*([+-]?(?:\d|\\[dt]?frac)[^\s$]*)")  # \boxed 7
MARK = re.compile(
    r"answer[\s*]*[:\uff1a][\s*]*|####(?=[^\n#]*\Z)", re.IGNORECASE
)  # \uff1a: a wide colon

# What means nothing, or the same
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
SIZE = re.compile(r"\\(?:left|right)(?![A-Za-z])\.?")  # "\right." is drawn as nothing
SPACE = re.compile(
    r"(?<!\\)\\[,;: ()\[\]]|\\q?quad(?![A-Za-z])|\\?\$|~"
)  # the "\\ " of a matrix is none
NO_SPACE = re.compile(r"(?<![\d,]) | (?!\d)")  # any but those of "1 1/4" and "10, 100"
SPELLINGS = (
    (r"\dfrac", r"\frac"),
    (r"\tfrac", r"\frac"),
    (r"^{\circ}", "°"),
    (r"^\circ", "°"),
    (r"\%", "%"),
    ("{,}", ","),
    (r"\!", ""),
    ("\u2212", "-"),  # \u2212: the minus of typesetters
    (r"\leq", r"\le"),
    (r"\geq", r"\ge"),
    (r"\neq", r"\ne"),
    ("π", r"\pi"),
)
DOLLARS = re.compile(r"\\\$ ?(-?\d[\d,.]*)")  # \$180; a bare $ may open a formula
BRACED = re.compile(r"(\^|_|\\sqrt) ?\{(\w)\}")  # x^{2}, \sqrt{2}: one letter or digit
SEPARATOR = re.compile(
    r"(\\\\|\\[{}]|\\(?:begin|end)\{\w+\}|[()\[\],;&=<>])(?! ?0\d) ?"
)  # 1,05 is it 1.05?

# Numbers
FRACTION = re.compile(
    r"\\frac(?:\{([+-]?\d{1,40})\}|(\d)) ?(?:\{(\d{1,40})\}|(\d))"
)  # \frac{-1}{2}, \frac12
NUMBER = re.compile(
    r"""(?P<sign>[+-]?)\ ?(?:(?P<whole>\d{1,40})\ (?=\d+/))?(?P<size>        # -, the 1 of 1 3/4
    \d{1,40}/0{0,9}[1-9]\d{0,39}                                                            # 3/4, not 3/0
    | [1-9]\d{0,2}(?:,\d{3}){1,12}(?:\.\d{0,40})?                                           # 1,200.50
    | \d{1,40}(?:\.\d{0,40})? | \.\d{1,40})""",
    re.VERBOSE,
)  # 12, 12., 1.5, .5
NAMES = """percent % | degree ° | dollar | cent | mile | yard | foot feet ft | inch inches in | kilometer km | meter |
    centimeter cm | kilogram kg | gram | pound lb | ounce oz | liter | second | minute | hour hr | day | week | month |
    year | unit | mph"""  # 20 m may be a product
UNITS = {name: names.split()[0] for names in NAMES.split("|") for name in names.split()}


def read_answer(text):
    r"""The answer in a response: inside its last closed \boxed{...}, else the number after a \boxed without braces,
    else after its last "Answer:", or "####" in the last line; None without any.

    read_answer(r"so \boxed{\frac{1}{2}}.") -> r"\frac{1}{2}"      read_answer("**Answer**: 12 .") -> "12 ."
    """
    open_at, boxes = [], []  # starts of open braces, None for those of no box
    for brace in BRACE.finditer(text):
        if brace[0] == "{" or brace[0].startswith(r"\boxed"):
            open_at.append(brace.end() if len(brace[0]) > 1 else None)
        elif brace[0] == "}" and open_at and (start := open_at.pop()) is not None:
            boxes.append((start, brace.start()))
    if boxes:
        return text[slice(*max(boxes))].strip()
    if bare := BARE_BOX.findall(text):
        return bare[-1].rstrip(".,;")
    marked = MARK.split(text.strip())[1:]
    rest = marked[-1].strip() if marked else ""
    for start, end in ((r"\[", r"\]"), ("$$", "$$")):  # a formula of its own lines
        if rest.startswith(start):
            return rest[2:].partition(end)[0].strip() or None
    return rest.split("\n")[0].strip("* ").strip() or None


def as_number(text):
    r"""The number that a text is, exactly, or None; a known unit after it does not matter.

    "1,200" "$-3$" "2.50" "3/4" "1 1/4" "1\frac{1}{4}" "\frac{-1}{2}" "\dfrac34" "12%" "20\text{ miles}" -> Fraction
    "3 4" "10, 100" "\frac{12}" "1/0" "2k" "5 million" -> None
    """
    quantity = _quantity(_plain(text))
    return quantity and quantity[0]


def same_answer(said, want):
    r"""Is an answer right? Compared as numbers, or piece by piece between brackets, commas and the like: bool.
    Either may be a whole solution, as some files have them: its answer is read first.

    Equal: 5/4 and 1 1/4; B and \text{(B)}; Yes and yes; (0.5, 1) and \left(\frac12,1\right); 18 and $\boxed{18}$;
    10 and "3 + 7 = 10 #### 10"; 20 and 20\text{ miles}; x^2 and x^{2}. Different: 20 miles and 20 cm; \$5 and 5 cents;
    3 4 and 34; n and N.
    """
    if said is None or want is None:
        return False
    said, want = (_plain(read_answer(str(text)) or text) for text in (said, want))
    if _quantity(said) or _quantity(want):
        return _same_piece(said, want)  # 1,200 is one piece here, and two in (1,200)
    said, want = SEPARATOR.split(said), SEPARATOR.split(want)
    return len(said) == len(want) and all(map(_same_piece, said, want))


def _plain(text):
    r"""A text without what LaTeX and Markdown put around it, and without the spaces that mean nothing.

    r"\left( \dfrac{1}{2}, 3 \right)" -> r"(\frac{1}{2}, 3)"      r"$20 \text{ miles}$" -> "20miles"      "(b)" -> "B"
    """
    text = DOLLARS.sub(r"\1 dollars", SIZE.sub("", TEXT.sub(r"\1", str(text))))
    text = SPACE.sub(" ", re.sub(r"(?<=\d)\\,(?=\d{3}(?!\d))", "", text))  # 1\,000 is a thousand
    text = NO_SPACE.sub("", " ".join(text.split()).strip("* ").rstrip(". "))
    for spelling, ours in SPELLINGS:
        text = text.replace(spelling, ours)
    text = BRACED.sub(r"\1\2", text)
    choice = re.fullmatch(r"\(?([A-Ja-j])\)?", text)
    return choice[1].upper() if choice else text


def _quantity(text):
    """A plain text as (Fraction, unit or ""), None where it is no number: "20miles" -> (20, "mile")."""
    found = NUMBER.match(FRACTION.sub(r" \1\2/\3\4 ", text).strip())  # 1\frac34 is 1 3/4
    unit = found.string[found.end() :].strip().lower() if found else None
    unit = unit and (UNITS.get(unit) or UNITS.get(unit.removesuffix("s")))
    if unit is None:
        return None
    size = int(found["whole"] or 0) + Fraction(found["size"].replace(",", ""))
    return (-size if found["sign"] == "-" else size), unit


def _same_piece(a, b):
    """Two plain texts the same: as they stand, as words without case, or as numbers (of one unit if both have one)."""
    if a == b or a.lower() == b.lower() and a.isalpha() and (len(a) > 2 or a.lower() == "no"):
        return True
    a, b = _quantity(a), _quantity(b)
    return bool(a and b) and a[0] == b[0] and (a[1] == b[1] or not a[1] or not b[1])


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
    **how,
):
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
    order = sorted(
        (i for i in range(len(rows)) if room[i] > 0),
        key=lambda i: len(rows[i]["ids"]) + len(starts[i]),
    )
    size = max(1, at_once // n)  # like lengths: little padding
    for first in tqdm(
        range(0, len(order), size), desc="answers", leave=False, mininterval=1, disable=None
    ):
        part = order[first : first + size]
        mine, asked = (
            part[share[0] :: share[1]],
            part + part[:1] * (share[1] - len(part)),
        )  # who has none writes, too
        r = pair.write(
            [rows[i]["ids"] + starts[i] for i in asked],
            model=model,
            n=n,
            seed=seed + first,
            share=share,
            max_new_tokens=max(room[i] for i in part),
            **how,
        )
        for row in range(len(mine) * n):
            i, j = mine[row // n], row % n
            right[i, j], truncated[i, j] = judge(i, starts[i] + r.response_ids(row)[: room[i]])
    return right, truncated
