r"""Laws of plumbing/answers.py: which answer a text holds, which answers are equal, who is right.

Accuracy, and the share of a gap that a run recovers, stand here, too.
"""

import importlib.util
import itertools
import math
import re
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from conftest import tiny, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from analysis import ahead, estimate, gap_recovery
from plumbing import answers
from plumbing.answers import answered, canonical, read_answer, same_answer
from plumbing.flags import Config, parse_opd
from plumbing.measure import accuracy, greedy_accuracy
from recipes import is_degenerate
from rollout import from_texts
from teacher import UserError, make_pair

# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} no, \boxed{ 2 }", "2"),
        (r"\boxed{4} or \boxed{5", "4"),
        (r"\boxed{x", None),
        (r"Answer: 3 and \boxed{4}", "4"),
        (r"I use \boxed as asked. Answer: 4", "4"),
        ("Answer: 3\nAnswer: 4\nthat is all", "4"),
        ("nothing, Answer:", None),
        ("Answer: 7\n\nAnswer: **", "7"),
        (r"So \boxed{7}. I put it within \boxed{}.", "7"),
        (r"It goes within \boxed{ }. Answer: 7", "7"),
        (r"within \boxed{}", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_the_answer_is_in_the_last_closed_box_or_behind_the_last_answer(text, answer):
    """A box comes before "Answer:"; a text without either has no answer. Neither has an empty one:
    the template "boxed" has an empty box, which weak models repeat."""
    assert read_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "Answer: 12",
        "answer: 12",
        "... . Answer : 12",
        "Answer\uff1a12",
        "**Answer**: 12",
        "**Answer:** 12",
        "**Answer: 12**",
        "**Answer** :\n\n**12**",
        "Answer: \\[ 12 \\]",
        "**Answer:**\n\n\\[\n12\n\\]\nDone.",
        "Answer:\n$$\n12\n$$",
    ],
)
def test_the_word_answer_may_be_bold_spaced_or_before_a_formula(text):
    """So chat models write it: in Markdown, with French spacing, a Chinese colon, or a formula."""
    assert read_answer(text) == "12"


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<think>Is it \\boxed{5}? No.</think>\nAnswer: 7", "7"),
        ("<think>Is it \\boxed{5}? Let me", None),
        ("<think>\\boxed{5}</think>", None),
        ("Is it \\boxed{5}? No.</think>\\boxed{7}", "7"),
        ("<think>a</think>Answer: 3 <think>b</think>Answer: 4", "4"),
        ("<think>a</think>Answer: 3 <think>Answer: 4", None),
    ],
)
def test_a_thought_is_not_an_answer(text, answer):
    """trl#4563: only what follows the last </think> counts, and nothing of an open thought."""
    assert read_answer(text) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"\boxed{\left\{ 1,2 \right.}", r"\left\{ 1,2 \right."),
        (r"\boxed{x \}}", r"x \}"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{a \\{b}}", r"a \\{b}"),
        (r"\\boxed{7}", "7"),
        ("**Answer: 2**3**", "2**3"),
        ("#### Step 1\nWe add.\n#### 10", "10"),
        ("#### Step 1\nWe add.", None),
        ("Answer: 4\n#### Step 1\nWe add.", "4"),
    ],
)
def test_what_is_no_mark_is_part_of_the_text(text, answer):
    r"""An escaped brace opens nothing, a power keeps its stars, and "####" may begin a heading."""
    assert read_answer(text) == answer


# --- comparing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "want, spellings",
    [
        ("7", r"7.0|+7|007|$7$|\(7\)|\[7\]|7 .|7\%|7^\circ|7^{\circ}|\$7|\frac{7}{1}"),
        (
            "7",
            r"x = 7|{7}|\mathbf{7}|\displaystyle 7|`7`|$x=7$.|\boxed{7}|Answer: 7|so #### 7",
        ),
        ("7", r"f(x) = 7|7,|7;|\boldsymbol{7}"),
        ("-3", "\u20133|\u22123|$-3$|- 3|-3.00|\\frac{-3}{1}|-\\frac62"),
        ("1200", r"1,200|1{,}200|1,\!200|1\,200|1,200.0"),
        ("5/4", r"1 1/4|1\frac{1}{4}|1 \frac14|1\dfrac{1}{4}|1.25|1 2/8|\frac54|\tfrac{5}{4}"),
        ("-1/2", r"\frac{-1}{2}|-\frac{1}{2}|-.5|- 1 / 2"),
        ("Yes", r"yes|\text{Yes}|YES"),
        ("B", r"\text{(B)}|(B)|B)|\mathrm{B}|\textbf{(B)}|$\text{B}$."),
        (r"2\sqrt{3}", r"2 \sqrt{3}|2\sqrt3"),
        ("x^2", "x^{2}|x ^ 2"),
        (r"x\le3", r"x \leq 3"),
        ("2π", r"2\pi|2 \pi"),
        ("(2,1)", r"(2, 1)|\left( 2, 1 \right)|$(2,\; 1)$"),
        (r"(\frac12,\text{even})", r"\left( \dfrac{1}{2}, \mathrm{even} \right)"),
        (r"\{1\}", r"\left\{ 1 \right\}"),
        (r"y = 2x", r"2x|$y=2x$"),
        (r"\infty", "∞"),
        (r"\emptyset", r"\varnothing"),
    ],
)
def test_equal_answers_are_equal_however_they_are_written(want, spellings):
    """Numbers are compared by value, text without its fonts, sizes and spaces."""
    for said in spellings.split("|"):
        assert same_answer(said, want), said
        assert same_answer(want, said), said


DIFFERENT = r"""
8 | 7
seven | 7
12 | 1,200
1,2 | 12
3 4 | 34
10, 100 | 10100
(10,100) | 10100
0,1 | 01
1 1/4 | 11/4
0.3333 | 1/3
1/0 | 1
\frac{12} | 1/2
\frac{12}{3}4 | 16
\frac{ab}{c} | \frac{a}{bc}
2k | 2
20 miles | 20
n | N
x = 5 | y = 5
k = 2x + 1 | y = 2x + 1
f(x) = 2x | f(n) = 2x
sin | SIN
abc | ABC
\Delta | \delta
\leftarrow | \rightarrow
\sin 30^\circ | \sin 30
\{2\} | 2
[-1, 1] | (-1, 1)
(1, 2) | (2, 1)
0.(5) | 0.(05)
1 \\ 2 | 1 \ 2
1 \\ 2 | 1 & 2
"""


@pytest.mark.parametrize("line", DIFFERENT.strip().split("\n"))
def test_other_answers_are_not_equal(line):
    """Nothing is rounded or guessed, upper case is not lower case, and nothing raises."""
    said, want = line.split(" | ")
    assert not same_answer(said, want)
    assert not same_answer(want, said)


def test_no_answer_is_never_right_and_long_numbers_differ():
    """Neither None nor an empty text; 400 digits are beyond what is read as a number."""
    assert not same_answer(None, "7")
    assert not same_answer("", "7")
    assert not same_answer("9" * 400, "9" * 399)


@pytest.mark.parametrize(
    "gold",
    [
        r"$\boxed{18}$",
        r"She sells 9 * 2 = 18, so \boxed{18}.",
        "9 * 2 = <<9*2=18>>18 eggs\n#### 18 \n",
        "Answer: 18",
    ],
)
def test_a_gold_answer_may_be_a_whole_solution(gold):
    """The answer is read from it: GSM8K's end in "#### 18", MATH's have a box."""
    assert same_answer("18", gold)
    assert same_answer(gold, gold)
    assert not same_answer("9", gold)


FORMS = [  # as in 1,124 gold answers of AIME, AMC, DAPO, DeepMath and MATH
    *"204 -7007 0 1.5 -8.18 11/4 3980000000000 1,200 x^2+12x+35 (45x+28)(x+2) (2,1) k>1".split(),
    *r"\frac{3}{4} -\frac{10}{3} \frac92 12\frac{3}{5} 8\frac47 \$180 45^\circ 65\% \pi".split(),
    *r"\frac{\pi}{2} -\frac{1}{\sqrt{2}} [4,\infty) \{x,x^3\} \text{even} \text{(B)} C U_r".split(),
    *r"\mathbb{Q} \infty p^{n-1} 5e Yes No True".split(),
    "1 1/4",
    "10, 100",
    r"2\pi i",
    r"2 + \sqrt{3}",
    r"\frac{\sqrt{6} - \sqrt{2}}{4}",
    r"(-\infty, -8) \cup (-8, \infty)",
    r"\left( \frac{11}{2}, -1, 1 \right)",
    r"\begin{pmatrix} 0 & 1 \\ 2 & 0 \end{pmatrix}",
    "f(x) = x",
    r"O(n \log n)",
    r"\max\{b, c\}",
]
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d[\d,.]*\d|[A-Za-z]+|\S")
REWRITINGS = {
    "dollars": lambda x: f"${x}$",
    "box": lambda x: rf"\boxed{{{x}}}",
    "marked": lambda x: f"Thus\n**Answer:** ${x}$.",
    "dfrac": lambda x: x.replace(r"\frac", r"\dfrac"),
    "text": lambda x: re.sub(r"^([A-Za-z]+)$", r"\\text{\1}", x),
    "minus": lambda x: x.replace("-", "\u2212"),
    "spaces": lambda x: " ".join(TOKEN.findall(x)).join("  "),
}


@pytest.mark.parametrize("rewrite", REWRITINGS.values(), ids=REWRITINGS)
def test_a_gold_answer_equals_itself_rewritten(rewrite):
    """Signs, boxes, sizes, wrappers and spaces that mean nothing make no other answer."""
    assert [form for form in FORMS if not same_answer(rewrite(form), form)] == []


def test_no_two_forms_are_one_answer():
    """Each of the forms is an answer of its own."""
    assert [pair for pair in itertools.combinations(FORMS, 2) if same_answer(*pair)] == []


@given(st.fractions(max_denominator=999))
def test_a_number_has_its_value_in_every_spelling(x):
    """It may be plain, a \\frac, or, beyond 1, a mixed number."""
    sign = "-" if x < 0 else ""
    whole, rest = divmod(abs(x), 1)
    spellings = [f"{x}", rf"\frac{{{x.numerator}}}{{{x.denominator}}}"]
    if whole and rest:
        spellings.append(f"{sign}{whole} {rest}")
        spellings.append(rf"{sign}{whole}\dfrac{{{rest.numerator}}}{{{rest.denominator}}}")
    for spelling in spellings:
        value = canonical(spelling)
        assert isinstance(value, Fraction) and value == x
        assert not same_answer(spelling, str(x + 1))


# --- answered ------------------------------------------------------------------------------------

WORDS = "[PAD] [BOS] [EOS] [UNK] add the so + \\boxed{3} \\boxed{7} \\boxed{0} <think>".split()
EOS = 2
BOX = {"3": 8, "7": 9, "0": 10}  # a box is one token: tiny models are right now and then
THINK = 11
PROMPTS = [[1, 4], [1, 5, 6], [1, 6, 7, 4, 5], [1, 4, 7, 5], [1, 7], [1, 7, 7, 7], [1, 5, 4, 4, 4]]
ANSWERS = "3 7 0 7 3 0 3".split()
LENGTH = 6


@pytest.fixture
def pair():
    student = tiny("llama", vocab_size=len(WORDS))
    teacher = tiny("llama", seed=1, vocab_size=len(WORDS))
    return make_pair(student, teacher, word_tokenizer(WORDS), word_tokenizer(WORDS))


def rows(wanted=ANSWERS):
    return [{"ids": ids, "answer": answer} for ids, answer in zip(PROMPTS, wanted)]


@pytest.fixture
def calls(monkeypatch):
    """A rollout that says its prompt's last token after as many words as the prompt has tokens."""
    calls = []

    def write(model, prompts, *, n, max_new_tokens, **options):
        lengths = {"n": n, "max_new_tokens": max_new_tokens}
        calls.append({"model": model, "prompts": prompts, **lengths, **options})
        each = [prompt for prompt in prompts for _ in range(n)]
        said = [([6] * len(p) + [p[-1], EOS])[:max_new_tokens] for p in each]
        return from_texts(each, said)

    monkeypatch.setattr(answers, "rollout", write)
    return calls


def test_what_is_written_to_its_end_is_judged_as_it_stands(pair, calls):
    """6.1: a start that ends in an eos, or has used the budget up, asks no model for more."""
    starts = [
        [6, BOX["7"], EOS],
        [BOX["3"], EOS],
        [EOS],
        [6, 6, 6, 6, BOX["7"], EOS],
        [6, 6, 6, 6, 6, BOX["7"]],
        [6] * (LENGTH + 2),
    ]
    wanted = rows(["7"] * 6)[:6]
    right, truncated = answered(pair, wanted, starts=starts, n=2, max_new_tokens=LENGTH)
    assert right.tolist() == [[x] * 2 for x in (True, False, False, True, True, False)]
    assert truncated.tolist() == [[x] * 2 for x in (False, False, False, False, True, True)]
    assert calls == []


def test_another_checker_says_what_is_right(pair, monkeypatch):
    """--checker names the function that compares what was read with what is wanted."""
    asked = []

    def generous(said, want):
        asked.append((said, want))
        return True

    monkeypatch.setitem(answers.CHECKERS, "math-verify", generous)
    right, _ = answered(pair, rows(), n=1, max_new_tokens=LENGTH, checker="math-verify")
    assert right.all()
    assert sorted(want for _, want in asked) == sorted(row["answer"] for row in rows())


@pytest.mark.skipif(
    not importlib.util.find_spec("math_verify"), reason="math-verify is not installed"
)
def test_math_verify_knows_algebra():
    """x + 1 is 1 + x. None is no answer; a gold answer may be a whole solution."""
    same = answers.same_to_math_verify
    assert same("x + 1", "1 + x") and same(r"\sqrt{8}", r"2\sqrt{2}") and same("0.5", r"\frac12")
    assert same("18", "9 * 2 = 18 #### 18") and not same("17", "18") and not same(None, "18")


def test_math_verify_that_is_missing_is_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["--student", "s", "--teacher", "t", "--checker", "math-verify"]
    with pytest.raises(UserError, match="needs its package: pip install math-verify"):
        parse_opd(words)


def test_the_budget_counts_the_start(pair, monkeypatch):
    """A start and what is written behind it are at most max_new_tokens, whatever the batch."""
    starts = [[4] * 5, [], [5] * 3, [6], [7] * 2, [10] * 4, [8] * 6]
    judged = []
    plainly = answers.judged

    def seen(pair, row, prompt_ids, ids, is_same):
        judged.append((PROMPTS.index(prompt_ids), ids))
        return plainly(pair, row, prompt_ids, ids, is_same)

    monkeypatch.setattr(answers, "judged", seen)
    _, truncated = answered(pair, rows(), starts=starts, n=4, max_new_tokens=LENGTH, seed=1)
    assert len(judged) == 6 * 4 + 1  # the one that is full is judged once
    for i, ids in judged:
        assert ids[: len(starts[i])] == starts[i]
        assert len(ids) == LENGTH or (len(ids) < LENGTH and ids[-1] == EOS)
    assert 0 < truncated.double().mean() < 1


@pytest.mark.parametrize("at_once, n", [(1, 1), (6, 2), (7, 3), (2, 5), (256, 4)])
def test_at_once_bounds_the_responses_that_are_written_at_a_time(pair, calls, at_once, n):
    """They are at most that many, or the n of one prompt. The shortest prompts come first."""
    answered(pair, rows(), n=n, max_new_tokens=LENGTH, at_once=at_once)
    assert max(len(call["prompts"]) * n for call in calls) <= max(at_once, n)
    written = [prompt for call in calls for prompt in call["prompts"]]
    assert sorted(written) == sorted(PROMPTS)
    assert [len(prompt) for prompt in written] == sorted(map(len, PROMPTS))


def test_no_row_is_written_past_the_positions_of_the_model():
    """All of a group write as much as the one with the most room. A row that has 50 of its 55
    tokens may have 5 more; beside one that has none it would write 55, and GPT-2 has 64 places."""
    gpt2 = tiny("gpt2", vocab_size=len(WORDS))
    pair = make_pair(gpt2, gpt2, word_tokenizer(WORDS), word_tokenizer(WORDS))
    starts = [[6] * (50 * (i % 2)) for i in range(len(PROMPTS))]
    right, _ = answered(pair, rows(), starts=starts, max_new_tokens=55, temperature=2.0)
    assert right.shape == (7, 1)


texts = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=12)


@given(texts, st.integers(1, 5), st.sampled_from([30, 45, 60, math.inf]))
def test_a_group_fits_into_the_model_or_is_one_row(texts, size, longest):
    """Each row is in one group, in order; with room enough the groups are full."""
    lengths = [length for length, _ in texts]
    room = [more for _, more in texts]
    groups = answers.grouped(range(len(texts)), lengths, room, size, longest)
    assert [i for group in groups for i in group] == list(range(len(texts)))
    for group in groups:
        most = max(lengths[i] for i in group) + max(room[i] for i in group)
        assert len(group) == 1 or (len(group) <= size and most <= longest)
    if longest == math.inf:
        assert all(len(group) == size for group in groups[:-1])


@pytest.mark.parametrize("at_once", [1, 4, 256])
def test_results_stand_in_the_order_of_the_prompts(pair, calls, at_once):
    """Responses are written in the order of their lengths, and held against their own answers."""
    starts = [[BOX[answer]] for answer in ANSWERS]
    wrong = {1, 4, 6}
    wanted = ["8" if i in wrong else answer for i, answer in enumerate(ANSWERS)]
    right, truncated = answered(
        pair, rows(wanted), starts=starts, n=2, at_once=at_once, max_new_tokens=8
    )
    assert right.tolist() == [[i not in wrong] * 2 for i in range(7)]
    assert truncated.tolist() == [[1 + len(p) + 1 + 2 > 8] * 2 for p in PROMPTS]


def test_what_is_asked_of_a_model_reaches_the_rollout(pair, calls):
    """Each part gets the sampling options, the ends, in_flight, and the room of its longest row."""
    pair = replace(pair, in_flight=3, pad_id=5)
    starts = [[6] * (i % 3) for i in range(len(PROMPTS))]
    answered(
        pair,
        rows(),
        model=pair.teacher,
        starts=starts,
        n=2,
        max_new_tokens=9,
        at_once=4,
        temperature=0.3,
        top_p=0.9,
    )
    room = {tuple(p + start): 9 - len(start) for p, start in zip(PROMPTS, starts)}
    for call in calls:
        prompts = call.pop("prompts")
        assert call.pop("model") is pair.teacher
        assert len(call.pop("seeds")) == len(prompts)
        assert call == {
            **pair.sampling,
            "temperature": 0.3,
            "top_p": 0.9,
            "in_flight": 3,
            "n": 2,
            "max_new_tokens": max(room[tuple(prompt)] for prompt in prompts),
        }


def test_the_draws_of_a_row_follow_from_the_seed_and_its_place_alone(pair, calls):
    """The size of the groups, the other rows and the processes change nothing."""

    def seeds(**how):
        calls.clear()
        answered(pair, rows(), max_new_tokens=LENGTH, **how)
        return {tuple(p): seed for c in calls for p, seed in zip(c["prompts"], c["seeds"])}

    alone = seeds()
    assert calls[0]["model"] is pair.student  # if no other is named
    assert len(set(alone.values())) == len(PROMPTS)
    assert seeds(at_once=2) == alone
    assert seeds(share=(0, 2)) | seeds(share=(1, 2)) == alone
    assert not set(seeds(seed=1).values()) & set(alone.values())


@pytest.mark.parametrize("world", [2, 3, 9])
def test_the_shares_of_the_processes_are_the_whole(pair, world):
    """Each process has the results of its own rows, and False for those of others."""
    starts = [[], [6], [BOX["0"], EOS], [], [6] * LENGTH, [], [6, BOX["3"]]]

    def by(share):
        return answered(
            pair, rows(), starts=starts, n=4, max_new_tokens=LENGTH, at_once=12, share=share
        )

    shares = [by((rank, world)) for rank in range(world)]
    for i, whole in enumerate(by((0, 1))):
        assert whole.any()
        assert torch.equal(sum(share[i].int() for share in shares), whole.int())


def test_the_end_of_a_response_is_no_part_of_its_answer(pair):
    """ "Answer: 7 [EOS]" says 7."""
    spoken = word_tokenizer([word.replace("\\boxed{7}", "Answer: 7") for word in WORDS])
    pair = replace(pair, tokenizer=spoken)
    starts = [[6, BOX["7"], EOS], [6, BOX["7"], 6, EOS]]
    right, _ = answered(pair, rows(["7", "7"]), starts=starts, max_new_tokens=LENGTH)
    assert right.tolist() == [[True], [False]]


@pytest.mark.parametrize("is_special", [False, True])
def test_ends_and_marks_of_a_thought_are_what_they_are(pair, is_special):
    """Whether or not a tokenizer calls them special. The teacher's end may be an ordinary token to
    the student's tokenizer, and QwQ's marks of a thought are none that are special."""
    words = [*WORDS[:-1], "Answer:", "7", "<stop>", "<think>", "</think>"]
    answer, seven, stop, think, thought = range(len(WORDS) - 1, len(words))
    tokenizer = word_tokenizer(words)
    if is_special:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<stop>", "<think>", "</think>"]}
        )
    pair = replace(pair, tokenizer=tokenizer, eos_ids=[EOS, stop])
    says_7 = {
        (answer, seven, stop): True,
        (think, 6, thought, answer, seven, EOS): True,
        (think, answer, seven, stop): False,
        (answer, seven, think, 6, thought, stop): False,
    }
    starts = [list(ids) for ids in says_7]
    right, _ = answered(pair, rows(["7"] * 4), starts=starts, max_new_tokens=LENGTH)
    assert right.squeeze(1).tolist() == list(says_7.values())


def test_a_thought_that_the_template_has_begun_is_a_thought(pair):
    """If the template writes <think>, the response has none of its own, and is still a thought."""
    starts = [[BOX["7"], EOS]] * 2
    asked = [{"ids": [1, 4], "answer": "7"}, {"ids": [1, 4, THINK], "answer": "7"}]
    right, _ = answered(pair, asked, starts=starts, max_new_tokens=LENGTH)
    assert right.tolist() == [[True], [False]]


# --- accuracy ------------------------------------------------------------------------------------


def test_accuracy_is_the_mean_over_prompts_with_the_error_of_that_mean(pair, calls):
    """Two answers to one prompt are not independent, so the error is that over prompts."""
    asked = [
        {"ids": [1, BOX["3"]], "answer": "3"},
        {"ids": [1, BOX["3"]], "answer": "7"},
        {"ids": [1, BOX["3"]], "answer": None},
        {"ids": [1, 4, BOX["0"]], "answer": "0"},
    ]
    cfg = Config(eval_n=2, max_new_tokens=4)
    got = accuracy(cfg, pair, asked, pair.student)
    assert got["mean"] == pytest.approx(2 / 3)
    assert got["each"] == [2, 0, 2]
    assert got["samples"] == 6
    assert got["truncated"] == pytest.approx(1 / 3)
    assert got["standard_error"] >= (2 / 3 * 1 / 3 / 2) ** 0.5 - 1e-6
    assert accuracy(cfg, pair, asked[2:3], pair.student) is None  # no answer, no accuracy


def likeliest(model, ids, end):
    """What a model says if it takes the likeliest token each time: token ids."""
    said = []
    while len(said) < LENGTH and said[-1:] != [end]:
        logits = model(torch.tensor([ids + said])).logits
        said.append(logits[0, -1].argmax().item())
    return said


@torch.no_grad()
def test_greedy_accuracy_takes_the_likeliest_token_each_time(pair):
    """Each prompt is answered once, whatever the settings of sampling."""
    asked = rows()
    expected = []
    for row in asked:
        text = pair.tokenizer.decode(likeliest(pair.student, row["ids"], EOS))
        expected.append(int(same_answer(read_answer(text), row["answer"])))
    assert 0 < sum(expected) < len(expected)
    for seed in (0, 1):
        cfg = Config(eval_n=3, eval_temperature=2.0, max_new_tokens=LENGTH, seed=seed)
        got = greedy_accuracy(cfg, pair, asked, pair.student)
        assert got["each"] == expected
        assert got["samples"] == len(asked)


def of(each):
    """An accuracy whose prompts were answered twice each, with so many right answers."""
    found = estimate(torch.tensor(each) / 2, (0.0, 1.0))
    return {**found, "samples": 2 * len(each), "each": each}


def test_gap_recovery_is_a_share_of_a_gap_that_is_there():
    """It is (after - before) / (teacher - before), and None if chance may explain the gap."""
    low = of([0, 1] * 50)
    middle = of([1, 1] * 50)
    high = of([2, 1] * 50)
    assert gap_recovery(low, middle, high) == pytest.approx(0.5)
    assert gap_recovery(high, middle, low) == pytest.approx(0.5)
    assert gap_recovery(low, high, low) is None
    assert gap_recovery(low, high, of([0, 1] * 49 + [1, 1])) is None


def test_accuracies_of_the_same_prompts_are_compared_in_pairs():
    """A teacher that solves what the student does, and a tenth more, is surely ahead."""
    before = of([2, 0] * 50)
    teacher = of([2, 0] * 40 + [2, 2] * 10)
    lead = ahead(teacher, before)
    assert lead["mean"] == pytest.approx(0.1)
    assert lead["standard_error"] < 0.035 < before["standard_error"]
    assert gap_recovery(before, teacher, teacher) == pytest.approx(1)


# --- repetition ----------------------------------------------------------------------------------


LOOPS = [
    "the same words again " * 12,
    "well " * 20,
    "x = 1 so " * 3 + "ha ha ha ha " * 8,
    " ".join(f"step {i % 3} we add the same to both sides" for i in range(30)),
    " ".join(map(str, range(40))) * 4 + " and that is all",  # a long block
    "we look at it once more " * 12 + "and so the answer is seven",  # an end after it
]
NO_LOOPS = [
    "",
    "no no no",
    "so a 0+3= 3 , then um b 3+7= 0 , thus c 0+5= 5 . Answer: 5",
    " ".join(f"x{i} + y{i} = z{i}" for i in range(50)),
    "We have 1 + 1 = 2, so 2 + 2 = 4, and 4 + 4 = 8. " * 2,
]


def test_a_loop_is_a_block_over_and_over():
    """ms-swift#9644: it stands at the end or nearly throughout; a list is none."""
    assert all(is_degenerate(text.split()) for text in LOOPS)
    assert not any(is_degenerate(text.split()) for text in NO_LOOPS)
