"""Files and answers come from elsewhere: whatever stands in them, nothing but our own ValueError comes out, and soon.

Two thousand lines and as many answers in the slow part, a few of them in the fast one.
"""

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recipes
from plumbing.answers import read_answer, same_answer
from plumbing.prompts import is_chat, load_prompts, read_conversations

few_and_many = pytest.mark.parametrize("count", [200, pytest.param(2_000, marks=pytest.mark.slow)])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": st.text()}
)
NEARLY = st.fixed_dictionaries(
    {},
    optional={"role": st.sampled_from(["user", "assistant"]) | JSON, "content": st.text() | JSON},
)
GOOD = st.fixed_dictionaries(
    {"prompt": st.text(min_size=1) | st.lists(MESSAGE, min_size=1, max_size=3)},
    optional={"answer": st.none() | st.text(min_size=1)},
)
CHAT = st.fixed_dictionaries({"messages": st.lists(MESSAGE, min_size=2, max_size=3)})
ROW = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.text() | st.lists(NEARLY, max_size=3) | JSON,
        "answer": st.text() | JSON,
        "messages": st.lists(NEARLY, max_size=3) | JSON,
    },
)


@st.composite
def lines(draw):
    """Bytes of one line: a good one, JSON of nearly the right shape, a few bytes of either changed, or anything."""
    line = draw(
        st.one_of(
            GOOD.map(lambda row: json.dumps(row).encode()),
            CHAT.map(lambda row: json.dumps(row).encode()),
            ROW.map(lambda row: json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass")),
            JSON.map(lambda value: json.dumps(value).encode()),
            st.binary(max_size=40),
        )
    )
    for at, byte in draw(
        st.lists(st.tuples(st.integers(0, 60), st.binary(max_size=2)), max_size=1)
    ):
        line = line[:at] + byte + line[at + 1 :]
    return line


PIECES = st.sampled_from(
    [
        "\\boxed{",
        "\\boxed {",
        "\\boxed",
        "{",
        "}",
        "Answer:",
        "answer: ",
        "**",
        "$",
        "\\frac",
        "\\dfrac{",
        "\\text{",
        "\\left",
        "\\right",
        "\\(",
        "\\!",
        "^\\circ",
        "%",
        "/",
        ".",
        ",",
        "-",
        "+",
        "\u2212",
        "1",
        "23",
        "1,000",
        "0",
        "\u0663",
        "\u00b2",
        "\n",
        " ",
        "x",
    ]
)
ANSWER = st.lists(PIECES | st.text(max_size=4), max_size=12).map("".join)


def fuzzed(count, *strategies):
    return lambda test: settings(max_examples=count)(given(*strategies)(test))


@few_and_many
def test_any_bytes_are_prompts_or_one_line_of_ours(count, tmp_path):
    """What is read is usable text; what is not is a ValueError that names the file, and the line if there is one."""
    path, read = tmp_path / "prompts.jsonl", []

    @fuzzed(count, st.lists(lines(), min_size=1, max_size=2))
    def run(parts):
        path.write_bytes(b"\n".join(parts))
        for load in (load_prompts, read_conversations):
            try:
                rows = load(path)
            except ValueError as error:
                assert re.match(
                    rf"{re.escape(str(path))}(:\d+| holds no)", str(error)
                ) and "\n" not in str(error)
                assert type(error) is ValueError
                continue
            read.append(0)
            for row in rows if load is load_prompts else ():
                json.dumps(row, ensure_ascii=False).encode()  # no half of a character
                assert row["answer"] is None or row["answer"].strip()
                assert (
                    row["prompt"].strip()
                    if isinstance(row["prompt"], str)
                    else is_chat(row["prompt"])
                )
                recipes.same_question(row["prompt"])
                recipes.in_template([row], "answer")

    run()
    assert len(read) > count // 20  # some of it is read, too


@few_and_many
def test_any_text_has_an_answer_or_none(count):
    """read_answer, as_number and same_answer take what models write: no exception, and an answer equals itself."""

    @fuzzed(count, ANSWER, ANSWER)
    def run(said, want):
        answer = read_answer(said)
        assert answer is None or isinstance(answer, str) and answer == answer.strip()
        assert isinstance(same_answer(answer, want), bool)
        assert same_answer(want, want) and not same_answer(None, want)
        assert same_answer(answer, want) == (answer is not None and same_answer(want, answer))
        recipes.is_degenerate(said)

    run()


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 20_000,
        "\\boxed{" * 10_000 + "}" * 9_999,
        "}" * 100_000,
        "Answer:" * 20_000,
        "\\boxed" + " " * 100_000,
        "\\boxed{\\frac" + "1" * 100_000 + "x}",
        "\\boxed{" + "9," * 50_000 + "}",
        "\\boxed{" + "\\text{" * 20_000 + "}",
        "\\boxed{" + "1" * 50_000 + "/" + "1" * 50_000 + "}",
    ],
    ids=range(9),
)
def test_a_long_answer_takes_no_time(text):
    """A model that has gone wild writes a hundred thousand characters of one kind: a quadratic reader would hang."""
    started = time.perf_counter()
    answer = read_answer(text)
    same_answer(answer, "42")
    same_answer(text, text)
    assert time.perf_counter() - started < 2


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "a", "Answer:"]), max_size=14).map("".join))
def test_the_last_closed_box_is_read(text):
    """In one pass over the braces what a search from every box would find."""

    def slow(text):
        for box in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
            depth = 1
            for i in range(box.end(), len(text)):
                depth += (text[i] == "{") - (text[i] == "}")
                if depth == 0:
                    return text[box.end() : i].strip()
        return None

    found = slow(text)
    if found is not None:
        assert read_answer(text) == found
