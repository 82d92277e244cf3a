"""What text is worth: answers, accuracy, collapse, repetition, templates."""

import itertools
import json
import re
import time
from fractions import Fraction

import pytest
import torch
from conftest import VOCAB, tiny, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from analysis import ahead, estimate, gap_recovery
from plumbing.answers import as_number, read_answer, same_answer
from plumbing.flags import Config
from plumbing.measure import accuracy
from plumbing.prompts import load_prompts
from plumbing.show import collapse
from recipes import TEMPLATES, apply_template, is_degenerate
from teacher import Pair, split


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed{x", None),
        ("Answer: 12", "12"),
        ("Answer: 3\nAnswer: 4\nthat is all", "4"),
        ("... . Answer: 5", "5"),
        ("Answer:", None),
        ("nothing", None),
        ("", None),
        (r"Answer: 3 and \boxed{4}", "4"),
        ("**Answer:** 12", "12"),
        ("**Answer: 12**", "12"),
        ("answer: 12", "12"),
        (r"\boxed{4} or \boxed{5", "4"),
    ],
)
def test_the_answer_is_the_last_box_or_what_follows_the_last_answer(text, answer):
    r"""\boxed{...} with nested braces first, then "Answer:"; None where a response has neither."""
    assert read_answer(text) == answer


@pytest.mark.parametrize(
    "said, want",
    [
        ("7", "7"),
        ("7.0", "7"),
        ("1,200", "1200"),
        ("$-3$", "-3"),
        (r"\frac{3}{4}", "0.75"),
        (r"\dfrac34", "3/4"),
        ("12 .", "12"),
        ("+5", "5"),
        (r"\(12\)", "12"),
        (r"\[12\]", "12"),
        (r"90^{\circ}", "90"),
        (r"50\%", "50"),
        ("No", "no"),
        (r"\text{Yes}", "yes"),
        (r"2\sqrt{3}", r"2 \sqrt{3}"),
        (r"90^\circ", "90"),
        ("\u22124", "-4"),
        ("007", "7"),
        ("x^{2}", "x^2"),
        (r"2\sqrt3", r"2\sqrt{3}"),
        ("x_{1}", "x_1"),
        (r"x \leq 3", r"x\le 3"),
        ("2π", r"2\pi"),
        (r"\begin{pmatrix} 1.0 & \frac12 \end{pmatrix}", r"\begin{pmatrix} 1 & 1/2 \end{pmatrix}"),
    ],
)
def test_equal_answers_are_equal_however_written(said, want):
    """Numbers compare as exact fractions, text without case and spacing."""
    assert same_answer(said, want)


@pytest.mark.parametrize(
    "said, want",
    [
        ("7", "8"),
        (None, "7"),
        ("", "7"),
        ("1/0", "1"),
        ("0.3333", "1/3"),
        ("seven", "7"),
        ("12", "1,200"),
        ("1,2", "12"),
        ("9" * 400, "9" * 399),
        ("n", "N"),
        ("x", "X"),
        ("aB", "Ab"),
    ],
)
def test_other_answers_are_not(said, want):
    """No rounding, no guessing, no exception."""
    assert not same_answer(said, want)


@pytest.mark.parametrize(
    "text", ["**Answer**: 12", "Answer : 12", "Answer\uff1a12", "**Answer** :\n\n**12**"]
)
def test_the_word_answer_may_be_bold_spaced_or_have_a_wide_colon(text):
    """As chat models write it: Markdown around the word alone, French spacing, a Chinese colon."""
    assert read_answer(text) == "12"


@pytest.mark.parametrize(
    "text",
    [
        "Answer: \\[ 12 \\]",
        "Answer:\n\\[ 12 \\]",
        "**Answer:**\n\n\\[\n12\n\\]\nDone.",
        "Answer:\n$$\n12\n$$",
    ],
)
def test_an_answer_may_be_a_displayed_formula(text):
    r"""The block after "Answer:" is read to its end, over several lines; \[ alone is no answer."""
    assert read_answer(text) == "12"


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"\boxed 7", "7"),
        (r"so $\boxed 7$.", "7"),
        (r"it is \boxed -3.", "-3"),
        (r"\boxed\frac{1}{2}$", r"\frac{1}{2}"),
        (r"\boxed{4}, as \boxed 5 is wrong", "4"),
        (r"I use \boxed as asked. Answer: 4", "4"),
        (r"\boxed{7", None),
    ],
)
def test_a_box_without_braces_holds_the_number_after_it(text, answer):
    r"""hendrycks/math has "\boxed 7" among its solutions; a box with braces goes first, and words are in no box."""
    assert read_answer(text) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"\boxed{\left\{ 1,2 \right.}", r"\left\{ 1,2 \right."),
        (r"\boxed{x \}}", r"x \}"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{a \\{b}}", r"a \\{b}"),
        (r"\\boxed{7}", "7"),
    ],
)
def test_an_escaped_brace_opens_and_closes_nothing(text, answer):
    r"""\left\{ without its \right\} is a system of equations; after the \\ of a row a brace is a brace."""
    assert read_answer(text) == answer


@pytest.mark.parametrize(
    "text", ["5/4", "1 1/4", r"1\frac{1}{4}", r"1 \frac14", r"$1\dfrac{1}{4}$", "1.25", "1 2/8"]
)
def test_a_mixed_number_is_its_sum(text):
    r"""MATH has 12\frac{3}{5} and 8\frac47: a whole number beside a fraction."""
    assert (
        as_number(text) == Fraction(5, 4)
        and same_answer(text, "5/4")
        and same_answer("-" + text.strip("$"), "-5/4")
    )


@pytest.mark.parametrize(
    "text", [r"\frac{-1}{2}", "-1/2", r"-\frac{1}{2}", r"-\tfrac12", "\u22121 / 2", "-.5"]
)
def test_a_fraction_may_carry_its_sign_inside(text):
    r"""\frac{-1}{2} and -\frac{1}{2} are one number."""
    assert as_number(text) == Fraction(-1, 2) and same_answer(text, "-1/2")


@pytest.mark.parametrize(
    "text", ["B", "b", r"\text{(B)}", "(B)", r"\textbf{(B)}", r"\mathrm{B}", r"$\text{B}$.", "B)"]
)
def test_a_choice_is_its_letter(text):
    r"""MATH has B, \text{B} and \text{(B)} for one choice."""
    assert (
        same_answer(text, "B") and same_answer(r"\text{(B)}", text) and not same_answer(text, "C")
    )


@pytest.mark.parametrize(
    "text", [r"\frac{\pi}{2}", r"2\frac{\sqrt{3}}{3}x", r"(\frac12, \frac{x}{3})"]
)
def test_the_size_of_a_fraction_means_nothing_anywhere(text):
    r"""DeepMath writes \dfrac, MATH \frac."""
    assert same_answer(text, text.replace("frac", "dfrac")) and same_answer(
        text.replace("frac", "tfrac"), text
    )


@pytest.mark.parametrize(
    "said, want, right",
    [
        ("20", r"20\text{ miles}", True),
        ("20 miles", r"20\text{ miles}", True),
        (r"20 \mathrm{~mile}", "20", True),
        ("20 cm", "20 km", False),
        ("20 miles", "20%", False),
        ("90 degrees", r"90^\circ", True),
        ("$180", r"\$180", True),
        ("7 feet", "7 ft", True),
        (r"\$5", "5 cents", False),
        (r"\$5", "5 dollars", True),
        (r"\$1,200", "1200", True),
        ("5 cm", "5 centimeters", True),
        ("5 kg", "5", True),
        ("5 million", "5", False),
        ("2k", "2", False),
        ("4i", "4", False),
        ("5e", "5", False),
    ],
)
def test_a_known_unit_may_be_left_out_but_not_changed(said, want, right):
    r"""MATH has 20\text{ miles}, and \$180; a letter after a number is a factor, a million is no unit."""
    assert same_answer(said, want) == same_answer(want, said) == right


@pytest.mark.parametrize(
    "gold",
    [
        r"$\boxed{18}$",
        r"She sells 9 * 2 = 18, so \boxed{18}.",
        "9 * 2 = 18\n#### 18",
        "1 + 1 = 2\n9 * 2 = <<9*2=18>>18 eggs\n#### 18 \n",
        "Answer: 18",
    ],
)
def test_a_gold_answer_may_hold_its_whole_solution(tmp_path, gold):
    """GSM8K's answers end in "#### 18", MATH's solutions in a box: read, not wrong for everybody."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "How many?", "answer": gold}) + "\n")
    want = load_prompts(path)[0]["answer"]
    assert (
        same_answer("18", want)
        and same_answer(want, want)
        and not any(same_answer(x, want) for x in ("9", "2"))
    )


def test_four_signs_before_the_last_line_are_a_heading():
    """ "#### Step 1" is Markdown; only what ends a text is its answer."""
    assert (
        read_answer("#### Step 1\nWe add.\n#### 10") == "10"
        and read_answer("#### Step 1\nWe add.") is None
    )
    assert read_answer("Answer: 4\n#### Step 1\nWe add.") == "4"


def test_a_power_keeps_its_stars():
    """Bold is stripped around an answer, not in it: 2**3 is not 23."""
    assert read_answer("**Answer: 2**3**") == "2**3"


def test_a_mixed_number_is_not_the_digits_put_together():
    """1 1/4 is 5/4, not 11/4."""
    assert not same_answer("1 1/4", "11/4") and not same_answer(r"1\frac{1}{4}", "11/4")


def test_two_numbers_are_not_one():
    """A space between digits is no decoration."""
    assert not same_answer("3 4", "34") and as_number("3 4") is None


@pytest.mark.parametrize(
    "said, want, right",
    [
        ("10, 100", "10100", False),
        ("10,100", "10100", True),
        ("(10,100)", "10100", False),
        ("0,1", "01", False),
        ("(10,100)", "(10, 100)", True),
        ("3,5,7", "3, 5, 7", True),
        ("1,05", "1,5", False),
        ("12,34", "1234", False),
        (r"10{,}100", "10100", True),
        (r"10,\!100", "10100", True),
        (r"10\,100", "10100", True),
    ],
)
def test_a_comma_groups_thousands_only_where_it_can(said, want, right):
    """lm-evaluation-harness#4039: 0,1 is a pair; a space after the comma makes a list, brackets make a tuple."""
    assert same_answer(said, want) == same_answer(want, said) == right


def test_half_a_fraction_is_none():
    r"""\frac{12} lacks its denominator; \frac{12}{3}4 is 4 * 4."""
    assert (
        as_number(r"\frac{12}") is None
        and not same_answer(r"\frac{12}", "1/2")
        and same_answer(r"\frac12", "1/2")
    )
    assert as_number(r"\frac{12}{3}4") is None and as_number(r"\frac{1}{0}") is None


def test_the_end_of_a_row_is_no_space():
    r"""Two backslashes and a space: the row ends, with the space or without; "\ " alone is a space."""
    rows = r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"
    assert same_answer(rows, rows.replace(r" \\ ", r"\\")) and same_answer(
        rows, rows.replace(r"\\ 3", r"\\ 3.0")
    )
    assert not same_answer(rows, rows.replace(r"\\ ", r"\ ")) and not same_answer(
        rows, rows.replace(r"\\ ", "& ")
    )


@pytest.mark.parametrize(
    "said, want, right",
    [
        ("(0.5, 1)", r"\left( \frac{1}{2}, 1 \right)", True),
        ("[-1, 1]", "(-1, 1)", False),
        ("(1, 2)", "(2, 1)", False),
        (r"\{2.0\}", r"\{2\}", True),
        (r"\{2\}", "2", False),
        ("k > 1", "k>1.0", True),
        ("f(n)", "f(N)", False),
        (r"\leftarrow", r"\rightarrow", False),
        (r"\Delta", r"\delta", False),
        ("(Yes, No)", "(yes, no)", True),
        ("0.(5)", "0.(05)", False),
        (r"\sin 30^\circ", r"\sin 30", False),
        ("1, 2", "1", False),
    ],
)
def test_tuples_are_compared_piece_by_piece(said, want, right):
    """Numbers within brackets are numbers, brackets and order count, and so does the case of a symbol."""
    assert same_answer(said, want) == same_answer(want, said) == right


FORMS = [  # as in 1,124 gold answers of AIME, AMC, DAPO, DeepMath and MATH
    "204",
    "-7007",
    "0",
    "1.5",
    "-8.18",
    r"\frac{3}{4}",
    r"-\frac{10}{3}",
    r"\frac92",
    "11/4",
    r"12\frac{3}{5}",
    r"8\frac47",
    "1 1/4",
    "3980000000000",
    "1,200",
    r"\$180",
    r"25\text{ miles}",
    r"45^\circ",
    r"65\%",
    "10, 100",
    r"\pi",
    r"2\pi i",
    r"\frac{\pi}{2}",
    r"\frac{\sqrt{6} - \sqrt{2}}{4}",
    r"-\frac{1}{\sqrt{2}}",
    r"2 + \sqrt{3}",
    "x^2 + 12x + 35",
    "(45x + 28)(x + 2)",
    "(2,1)",
    r"[4,\infty)",
    r"(-\infty, -8) \cup (-8, \infty)",
    r"\{x, x^3\}",
    r"\left( \frac{11}{2}, -1, 1 \right)",
    r"\begin{pmatrix} 0 & 1 \\ 2 & 0 \end{pmatrix}",
    "k > 1",
    "f(x) = x",
    "p^{n-1}",
    "U_r",
    "5e",
    "Yes",
    "No",
    "True",
    r"\text{even}",
    r"\text{(B)}",
    "C",
    r"\mathbb{Q}",
    r"\infty",
    r"O(n \log n)",
    r"\max\{b, c\}",
]
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d[\d,.]*\d|[A-Za-z]+|\S")
REWRITINGS = {
    "dollars": lambda x: f"${x}$",
    "box": lambda x: rf"\boxed{{{x}}}",
    "dfrac": lambda x: x.replace(r"\frac", r"\dfrac"),
    "tfrac": lambda x: x.replace(r"\frac", r"\tfrac"),
    "text": lambda x: re.sub(r"^([A-Za-z]+)$", r"\\text{\1}", x),
    "minus": lambda x: x.replace("-", "\u2212"),
    "spaces": lambda x: " ".join(TOKEN.findall(x)).join("  "),
}
PARTS = st.sampled_from(
    [
        "1",
        "12",
        "1,200",
        " ",
        ", ",
        "/",
        "-",
        ".",
        "{",
        "}",
        "(",
        ")",
        "x",
        r"\text{",
        r"\frac",
        "%",
        r"\,",
        r"\\",
        r"\{",
        "$",
        r"\boxed",
        "####",
        "mile",
        r"^\circ",
        "\u0663",
        "Answer:",
        "\n",
    ]
)
TEXTS = st.lists(PARTS, max_size=9).map("".join)


@pytest.mark.parametrize("rewrite", REWRITINGS.values(), ids=REWRITINGS)
def test_a_gold_answer_equals_itself_rewritten(rewrite):
    """Signs, boxes, sizes, wrappers and spaces that mean nothing make no other answer of it."""
    assert [
        x for x in FORMS if not (same_answer(rewrite(x), x) and same_answer(x, rewrite(x)))
    ] == []


def test_no_two_forms_are_one_answer():
    """Each of the forms is an answer of its own."""
    assert [pair for pair in itertools.combinations(FORMS, 2) if same_answer(*pair)] == []


@given(st.sampled_from(FORMS) | TEXTS, st.sampled_from(FORMS) | TEXTS)
def test_sameness_is_reflexive_and_symmetric_and_keeps_numbers_and_texts_apart(a, b):
    """What is a number equals numbers only, and only its own value."""
    assert same_answer(a, a) and same_answer(b, a) == same_answer(a, b)
    a, b = (read_answer(x) or x for x in (a, b))  # of a whole solution the answer in it
    if same_answer(a, b):
        assert as_number(a) == as_number(b)


@given(st.fractions(max_denominator=999), st.sampled_from(["", " miles", r"\%"]))
def test_a_number_has_its_value_in_every_spelling(x, unit):
    """Plain, as \\frac, and as a mixed number beyond 1."""
    sign, whole, rest = "-" * (x < 0), abs(x) // 1, abs(x) % 1
    spellings = [f"{x}", rf"\frac{{{x.numerator}}}{{{x.denominator}}}"]
    if whole and rest:
        spellings += [
            f"{sign}{whole} {rest}",
            rf"{sign}{whole}\dfrac{{{rest.numerator}}}{{{rest.denominator}}}",
        ]
    for spelling in spellings:
        assert as_number(spelling + unit) == x and same_answer(spelling + unit, str(x))
        assert not same_answer(spelling + unit, str(x + 1))


@pytest.mark.parametrize(
    "part",
    [
        "####",
        "# ",
        "answer ",
        "answer*",
        r"\boxed ",
        r"\frac{1}",
        r"\text {",
        "1 ",
        "1,",
        ", ",
        r"\\",
        r"\{",
        r"\,",
        "$",
        "(",
        "1,000",
        "1/",
        "a",
        "\u0663",
        "Answer:$$",
    ],
)
def test_a_hundred_thousand_characters_take_no_time(part):
    """However they repeat: each rule goes over a text once."""
    text = part * (100_000 // len(part))
    started = time.perf_counter()
    for x in (text, text + "!", "Answer: " + text, "1" + text):
        read_answer(x)
        as_number(x)
        assert same_answer(x, x) and same_answer(x, "42") == same_answer("42", x)
    assert time.perf_counter() - started < 6


def test_accuracy_is_the_mean_over_prompts_with_the_error_of_that_mean(monkeypatch):
    """Four samples of one prompt are not four independent ones:
    the error comes from the spread of the prompts' means.
    """
    texts = iter(
        ["Answer: 1", "Answer: 1", "Answer: 2", "Answer: 1", "Answer: 0", "Answer: 0"]
    )  # 3 prompts x 2: 1, .5, 0
    tokenizer = word_tokenizer()
    monkeypatch.setattr(tokenizer, "decode", lambda *_, **__: next(texts))
    student, teacher = tiny("llama"), tiny("llama", seed=1)
    pair = Pair(
        student,
        teacher,
        tokenizer,
        dict(eos_ids=(), merge_ends=True, pad_id=0, vocab_size=VOCAB),
        (split(student, VOCAB), split(teacher, VOCAB)),
        torch.device("cpu"),
    )
    rows = [
        {"ids": [i], "answer": answer} for i, answer in ((1, "1"), (2, "1"), (4, None), (3, "1"))
    ]
    got = accuracy(
        Config(eval_n=2, max_new_tokens=2, eval_temperature=1.0, eval_top_p=1.0),
        pair,
        rows,
        student,
    )
    assert got == {
        "mean": 0.5,
        "standard_error": pytest.approx(0.5 / 3**0.5),
        "samples": 6,
        "truncated": 1.0,
        "each": [2, 1, 0],
    }
    assert accuracy(Config(), pair, rows[2:3], student) is None  # no answer, no accuracy


def test_gap_recovery_is_a_share_of_a_gap_that_is_there():
    """(after - before) / (teacher - before), and None where the gap is within two standard errors."""
    at = lambda mean: {"mean": mean, "standard_error": 0.02}
    assert gap_recovery(at(0.5), at(0.8), at(0.9)) == pytest.approx(0.75)
    assert gap_recovery(at(0.9), at(0.6), at(0.5)) == pytest.approx(0.75)
    assert gap_recovery(at(0.5), at(0.8), at(0.55)) is None
    assert gap_recovery(at(0.5), at(0.6), at(0.57)) == pytest.approx(
        10 / 7
    )  # 2 sqrt(2) .02 = .0566


def test_accuracies_of_the_same_prompts_are_compared_in_pairs():
    """Case 18: before, after and teacher answer the same prompts with the same draws. A teacher who solves each that
    the student does, and a tenth more, is ahead beyond doubt; by two separate errors the gap was noise.
    """

    def of(each, **more):
        return {
            **estimate(torch.tensor(each) / 2, (0.0, 1.0)),
            "samples": 2 * len(each),
            "each": each,
            **more,
        }

    before = of([2, 0] * 50)
    teacher = of([2, 0] * 40 + [2, 2] * 10)
    unpaired = [{name: x[name] for name in ("mean", "standard_error")} for x in (before, teacher)]
    assert gap_recovery(before, teacher, teacher) == pytest.approx(1)
    assert gap_recovery(unpaired[0], unpaired[1], unpaired[1]) is None
    lead = ahead(teacher, before)
    assert lead["mean"] == pytest.approx(0.1) and lead["standard_error"] == pytest.approx(
        0.0332, abs=1e-3
    )
    assert ahead(unpaired[1], before)["standard_error"] > 0.06  # one side does not know


def history(**ends):
    """Twenty-four rows of metrics: ten at rest, then ten at the ends given, with a ramp between."""
    rest = {
        "overlap_mass_student": 0.98,
        "overlap_mass_teacher": 0.98,
        "reward": -0.1,
        "entropy_student": 0.8,
        "response_length": 30.0,
        "repetition_fraction": 0.0,
    }
    return [
        {name: x + min(1, max(0, i - 9) / 4) * (ends.get(name, x) - x) for name, x in rest.items()}
        for i in range(24)
    ]


@pytest.mark.parametrize(
    "ends, alarm",
    [
        (dict(overlap_mass_student=0.6, entropy_student=2.5), True),
        (dict(reward=-0.9, response_length=90.0), True),
        (dict(reward=-0.9, repetition_fraction=0.5), True),
        (dict(overlap_mass_teacher=0.8, response_length=50.0), True),
        (dict(), False),
        (dict(overlap_mass_student=0.6), False),
        (dict(entropy_student=2.5), False),
        (dict(reward=-0.01, response_length=90.0), False),
        (dict(entropy_student=0.3, reward=-0.9), False),
    ],
)
def test_collapse_is_something_falling_while_something_else_climbs(ends, alarm):
    """Either alone may be learning; both together are the paper's signature of a run going under (5.1, 6.1)."""
    assert bool(collapse(history(**ends))) == alarm
    assert collapse(history(**ends)[:9]) is None  # too early to tell


REST = dict(
    overlap_mass_student=1.0,
    overlap_mass_teacher=1.0,
    reward=0.0,
    entropy_student=0.5,
    response_length=32.0,
    repetition_fraction=0.125,
)
FALLEN = dict(reward=-4.0)
RISEN = dict(response_length=64.0)


@pytest.mark.parametrize(
    "change, alarm",
    [
        ({**RISEN, "overlap_mass_student": 0.90625}, False),
        ({**RISEN, "overlap_mass_student": 0.875}, True),  # by .1
        ({**RISEN, "overlap_mass_teacher": 0.90625}, False),
        ({**RISEN, "overlap_mass_teacher": 0.875}, True),
        ({**RISEN, "reward": -0.1875}, False),
        ({**RISEN, "reward": -0.21875}, True),  # .2 nats
        ({**FALLEN, "response_length": 48.0}, False),
        ({**FALLEN, "response_length": 48.5}, True),  # by half
        ({**FALLEN, "entropy_student": 0.78125}, False),
        ({**FALLEN, "entropy_student": 0.8125}, True),  # .3 nats
        ({**FALLEN, "repetition_fraction": 0.3125}, False),
        ({**FALLEN, "repetition_fraction": 0.34375}, True),  # by .2
    ],
)
def test_collapse_at_each_border(change, alarm):
    """Two windows are enough; a fall and a rise count from just beyond their borders, in means over whole windows."""
    rows = [REST] * 5 + [{**REST, **change}] * 5
    said = collapse(rows)
    assert bool(said) == alarm and collapse(rows[1:]) is None
    assert not alarm or all(
        f"{name} {REST[name]:.2f} -> {change[name]:.2f}" in said for name in change
    )
    assert collapse(rows[:-1] + [REST]) is None  # four steps of five: not yet
    assert bool(collapse(rows, window=4)) == alarm
    assert (
        bool(collapse([{**REST, **RISEN, **FALLEN}] * 5 + rows)) == alarm
    )  # the best, not the first


@pytest.mark.parametrize(
    "before, after, alarm",
    [
        ({"overlap_mass_student": 0.1}, {"overlap_mass_student": 0.0}, False),
        ({"reward": 0.2}, {"reward": 0.0}, False),
        (
            {"response_length": 33.0, "reward": 0.0},
            {"response_length": 49.25, "reward": -4.0},
            False,
        ),
        (
            {"response_length": 33.0, "reward": 0.0},
            {"response_length": 49.75, "reward": -4.0},
            True,
        ),
    ],
)
def test_what_is_exactly_on_the_border_has_not_crossed_it(before, after, alarm):
    """A fall of .1, or of .2 nats, is not more than that; half of an odd length is no whole number."""
    rows = [{**REST, **before}] * 5 + [{**REST, **RISEN, **after}] * 5
    assert bool(collapse(rows)) == alarm


def test_less_than_two_windows_are_too_early_to_tell():
    """However drastic: nine steps hold no two windows of five."""
    drastic = [REST] * 4 + [{**REST, "reward": -99.0, "response_length": 999.0}] * 5
    assert collapse(drastic) is None and collapse([REST] + drastic)


@pytest.mark.parametrize("last, alarm", [(1.5, False), (1.53125, True)])
def test_a_high_entropy_has_to_rise_by_half_of_itself(last, alarm):
    """From 1 nat on half of it is more than .3."""
    rows = [{**REST, "entropy_student": 1.0}] * 5 + [
        {**REST, **FALLEN, "entropy_student": last}
    ] * 5
    assert bool(collapse(rows)) == alarm


@pytest.mark.parametrize(
    "text",
    [
        "the same words again " * 12,
        "well " * 20,
        "x = 1 so " * 3 + "ha ha ha ha " * 8,
        " ".join(f"step {i % 3} we add the same number to both sides" for i in range(30)),
        " ".join(str(i) for i in range(40)) * 4 + " and that is all",  # a long block
        "we look at it once more " * 12 + "and so the answer is seven",
    ],
)  # an end after it
def test_loops_are_degenerate(text):
    """ms-swift#9644: a block over and over, at the end or nearly throughout, as words or as ids."""
    assert is_degenerate(text) and is_degenerate([hash(word) for word in text.split()])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "one",
        "no no no",
        "so a 0+3= 3 , then um b 3+7= 0 , thus c 0+5= 5 . Answer: 5",
        " ".join(f"x{i} + y{i} = z{i}" for i in range(50)),
        "We have 1 + 1 = 2, so 2 + 2 = 4, and 4 + 4 = 8. " * 2,
    ],
)
def test_ordinary_text_is_not(text):
    """Lists, short answers and a sentence said twice are no loop."""
    assert not is_degenerate(text)


def test_a_template_wraps_the_question_and_nothing_else():
    """Rethinking-OPD's released data has a literal \\boxed{{}}; ours says \\boxed{},
    and braces in questions survive.
    """
    assert apply_template("{1, 2}?", "none") == "{1, 2}?"
    assert apply_template("{1, 2}?", "boxed").startswith(
        "{1, 2}? Please"
    ) and "\\boxed{}." in apply_template("x", "boxed")
    assert apply_template("x", "Q: {question} {A}") == "Q: x {A}"
    assert all("{question}" in template for template in TEMPLATES.values())
    with pytest.raises(ValueError, match="latex"):
        apply_template("x", "latex")
