"""Files and answers come from elsewhere. Whatever stands in them, they are read soon, or refused.

The slow part tries two thousand lines and as many answers, the fast part a few of them.
"""

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbing.answers import canonical, read_answer, same_answer
from plumbing.prompts import is_chat, is_conversation, load_prompts, read_conversations
from recipes import in_template, is_degenerate, question_key
from teacher import UserError

few_and_many = pytest.mark.parametrize("count", [200, pytest.param(2_000, marks=pytest.mark.slow)])


def fuzzed(count, *strategies):
    return lambda test: settings(max_examples=count)(given(*strategies)(test))


# --- files ---------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
ROLE = st.sampled_from(["user", "assistant"])
MESSAGE = st.fixed_dictionaries({"role": ROLE, "content": st.text()})
NEARLY = st.fixed_dictionaries({}, optional={"role": ROLE | JSON, "content": st.text() | JSON})
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
        "prompt_ids": JSON,
        "response_ids": JSON,
        "why": JSON,
    },
)


@st.composite
def lines(draw):
    """The bytes of a line: good JSON, JSON of nearly the right shape, or anything."""
    of_json = (GOOD | CHAT | ROW | JSON).map(lambda value: json.dumps(value).encode())
    line = draw(of_json | st.binary(max_size=40))
    if draw(st.booleans()):
        at = draw(st.integers(0, 60))
        line = line[:at] + draw(st.binary(max_size=2)) + line[at + 1 :]
    return line


@few_and_many
def test_any_bytes_are_prompts_or_one_line_of_ours(count, tmp_path):
    """What is read can be used. Everything else is a UserError of one line that names the file."""
    path = tmp_path / "prompts.jsonl"
    read = []

    @fuzzed(count, st.lists(lines(), min_size=1, max_size=2))
    def run(parts):
        path.write_bytes(b"\n".join(parts))
        for load in (load_prompts, read_conversations):
            try:
                rows = load(path)
            except UserError as error:
                assert re.match(rf"{re.escape(str(path))}(:\d+| holds no)", str(error))
                assert "\n" not in str(error)
                continue
            read.append(load)
            for row in rows:
                check(row)

    def check(row):
        if "messages" in row:
            assert is_conversation(row["messages"])
            assert (row["prompt_ids"] is None) == (row["response_ids"] is None)
            return
        prompt = row["prompt"]
        assert prompt.strip() if isinstance(prompt, str) else is_chat(prompt)
        assert row["answer"] is None or row["answer"].strip()
        question_key(prompt)
        in_template([row], "answer")

    run()
    assert len(read) > count // 20  # some of it is read
    assert load_prompts in read and read_conversations in read


# --- answers -------------------------------------------------------------------------------------

MARKS = r"\boxed{ \boxed \frac \dfrac{ \text{ \left \right \( \! \, \\ \{ ^\circ % $ { } ** ` ####"
MARKS += " Answer: answer: <think> </think> x= / . , - + 1 23 1,000 0 mile x \u2212 \u0663 \u00b2"
PIECE = st.sampled_from([*MARKS.split(), " ", "\n", ", "])
TEXT = st.lists(PIECE | st.text(max_size=4), max_size=12).map("".join)


@few_and_many
def test_any_text_has_an_answer_or_none(count):
    """Nothing raises. An answer equals itself, and a number equals only its value."""

    @fuzzed(count, TEXT, TEXT)
    def run(said, want):
        answer = read_answer(said)
        assert answer is None or answer == answer.strip()
        assert same_answer(want, want)
        assert not same_answer(None, want)
        assert same_answer(said, want) == same_answer(want, said)
        if same_answer(said, want):
            a = canonical(read_answer(said) or said)
            b = canonical(read_answer(want) or want)
            assert type(a) is type(b)
        is_degenerate(said.split())

    run()


@pytest.mark.parametrize(
    "part", [*MARKS.split(), "1 ", "1,", ", ", "1/", "# ", "answer ", "\\text"]
)
def test_a_hundred_thousand_characters_take_no_time(part):
    """A broken model may repeat itself for long, so each rule goes over a text once."""
    text = part * (100_000 // len(part))
    started = time.perf_counter()
    for x in (text + "!", "Answer: 1" + text, "\\boxed{" + text + "}"):
        canonical(read_answer(x) or x)
    assert time.perf_counter() - started < 6


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "a", "Answer:"]), max_size=14).map("".join))
def test_the_last_closed_box_is_read(text):
    """One pass over the braces finds what a search from every box, but empty ones, would find."""

    def slow(text):
        for box in reversed(list(re.finditer(r"\\boxed\{", text))):
            depth = 1
            for i in range(box.end(), len(text)):
                depth += (text[i] == "{") - (text[i] == "}")
                if depth == 0:
                    break
            content = text[box.end() : i].strip() if depth == 0 else ""
            if content:
                return content
        return None

    found = slow(text)
    if found is not None:
        assert read_answer(text) == found
