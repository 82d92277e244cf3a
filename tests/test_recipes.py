"""Laws of recipes.py and of opd.py's use of it (paper 5): templates, mixtures, selection, the off-policy cold start."""

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import TEMPLATE, Killed, tiny, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import opd
import recipes
import teacher
from analysis import diagnose
from plumbing import measure, show
from plumbing.files import append_answers
from plumbing.processes import batch
from plumbing.prompts import encode, load_conversations, load_prompts, questions
from recipes import (
    TEMPLATES,
    alignment,
    apply_template,
    cold_start,
    in_template,
    is_degenerate,
    mix_prompts,
    same_question,
    select,
    teacher_rollouts,
)
from rollout import rollout
from teacher import Pair, split

WORDS = "[PAD] [BOS] [EOS] [UNK] user assistant : add the so + \\boxed{3} \\boxed{7} \\boxed{0} é".split()
EOS, LENGTH = 2, 12
PROMPTS = [
    {"prompt": " ".join(words), "answer": answer}
    for words, answer in [
        (["add"], "3"),
        (["add", "the"], "7"),
        (["so", "+"], "0"),
        (["add", "+", "the"], "7"),
        (["+"], "3"),
        (["é", "+"], "0"),
        (["so"], "3"),
        (["the", "so", "the"], "0"),
        (["add", "so"], "7"),
        (["+", "+", "so"], "7"),
        (["é"], "0"),
        (["so", "so", "add"], "3"),
        (["the"], "0"),
        (["é", "add"], "7"),
        (["so", "é"], "3"),
        (["+", "add"], "0"),
    ]
]


def pair_of(student, teacher, **tokenizer):
    """Two models as a Pair, without files."""
    return Pair(
        student,
        teacher.requires_grad_(False),
        word_tokenizer(WORDS, **tokenizer),
        dict(eos_ids=[EOS], merge_ends=True, pad_id=0, vocab_size=len(WORDS)),
        (split(student, len(WORDS)), split(teacher, len(WORDS))),
        torch.device("cpu"),
    )


def a_student(architecture="llama"):
    return tiny(architecture, vocab_size=len(WORDS) + 5)


def a_teacher():
    return tiny("llama", seed=22, vocab_size=len(WORDS) + 3, hidden=48, layers=3)


def different(**tokenizer):
    return pair_of(a_student(), a_teacher(), **tokenizer)


def encoded(pair, rows=PROMPTS):
    return pair.encode(rows, max_prompt_tokens=40, new_tokens=LENGTH)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().split("\n") if line]


def keys(rows):
    return {same_question(row["prompt"]) for row in rows}


# --- 5.2 template and content --------------------------------------------------------------------------------------


def test_a_template_goes_around_text_and_around_the_last_message_of_a_chat():
    """5.2: the question in its place, everything else of a row as it was, and the rows that came unchanged."""
    chat = [{"role": "system", "content": "s {question}"}, {"role": "user", "content": "2 + 3?"}]
    rows = [{"prompt": "2 + 3?", "answer": "5"}, {"prompt": chat, "answer": None, "more": [1]}]
    before = copy.deepcopy(rows)
    text, talk = in_template(rows, "boxed")
    assert text == {"prompt": apply_template("2 + 3?", "boxed"), "answer": "5"}
    assert talk == {
        **rows[1],
        "prompt": [chat[0], {"role": "user", "content": apply_template("2 + 3?", "boxed")}],
    }
    assert rows == before and in_template(rows, "none") == before
    assert in_template(rows[:1], "Q {question} A")[0]["prompt"] == "Q 2 + 3? A"


@given(
    st.integers(0, 12),
    st.integers(0, 12),
    st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1)),
    st.integers(0, 99),
)
def test_a_mixture_is_the_largest_with_exactly_its_share_of_aligned_prompts(
    aligned, others, fraction, seed
):
    """5.2: round(fraction * size) of them, no prompt twice, no larger size would do; one generator, one mixture."""
    rows = [
        [{"prompt": f"{name} {i}", "answer": None} for i in range(n)]
        for name, n in (("a", aligned), ("o", others))
    ]
    before = copy.deepcopy(rows)
    sizes = [
        n
        for n in range(1, aligned + others + 1)
        if round(fraction * n) <= aligned and n - round(fraction * n) <= others
    ]
    if not sizes:
        with pytest.raises(ValueError, match=f"{aligned} aligned and {others} other"):
            mix_prompts(*rows, fraction, torch.Generator())
        return
    mixed, again = (
        mix_prompts(*rows, fraction, torch.Generator().manual_seed(seed)) for _ in range(2)
    )
    assert (
        len(mixed) == max(sizes)
        and len(keys(mixed)) == len(mixed)
        and mixed == again
        and rows == before
    )
    assert sum(row in rows[0] for row in mixed) == round(fraction * len(mixed))
    assert all(row in rows[0] + rows[1] for row in mixed)


def test_the_ends_of_the_mixture_are_the_lists_themselves():
    """5.2: fraction 0 takes every other prompt and fraction 1 every aligned one, shuffled; neither goes in order."""
    rows = [[{"prompt": f"{name} {i}"} for i in range(20)] for name in "ao"]
    for fraction, part in ((0.0, rows[1]), (1.0, rows[0])):
        mixed = mix_prompts(*rows, fraction, torch.Generator().manual_seed(0))
        assert mixed != part and sorted(mixed, key=str) == sorted(part, key=str)
    half = mix_prompts(*rows, 0.5, torch.Generator().manual_seed(0))
    assert (
        len(half) == 40 and 2 < sum(row in rows[0] for row in half[:20]) < 18
    )  # the two are shuffled together
    assert half != mix_prompts(*rows, 0.5, torch.Generator().manual_seed(1))


def test_a_prompt_on_both_sides_of_a_mixture_is_aligned_and_counts_once():
    """5.2: the paper deduplicates the other prompts against the aligned ones; repeats on one side go as well."""
    aligned = [{"prompt": x} for x in ("What is 1 + 1?", "what is 1+1?", "What is 2 + 2?")]
    others = [
        {"prompt": x}
        for x in ("WHAT IS 2 + 2?", apply_template("What is 1 + 1?", "boxed"), "x", "X", "y")
    ]
    mixed = mix_prompts(aligned, others, 0.5, torch.Generator())
    assert sorted(same_question(row["prompt"]) for row in mixed) == [
        "whatis1+1?",
        "whatis2+2?",
        "x",
        "y",
    ]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_a_share_outside_0_to_1_is_refused(fraction):
    """It is named in the message."""
    with pytest.raises(ValueError, match="outside 0..1"):
        mix_prompts([{"prompt": "a"}], [{"prompt": "b"}], fraction, torch.Generator())


QUESTION = "Find x so that 2x + ½ = 7."


@pytest.mark.parametrize(
    "other",
    [
        QUESTION.upper(),
        f"  {QUESTION}\n",
        QUESTION.replace(" ", " \t\u00a0"),
        QUESTION.replace("7", "７"),
        QUESTION.replace("½", "1\u20442"),
        *(apply_template(QUESTION, name) for name in TEMPLATES),
        apply_template(QUESTION.upper(), "answer").replace("\n\n", " "),
        [{"role": "user", "content": QUESTION}],
        [{"role": "user", "content": apply_template(QUESTION, "boxed")}],
        [{"role": "system", "content": "Think."}, {"role": "user", "content": QUESTION.lower()}],
    ],
)
def test_the_same_question_in_another_guise(other):
    """Case, spacing, Unicode form, known templates, chat or text, a system prompt: none makes a new question."""
    assert same_question(other) == same_question(QUESTION)


@pytest.mark.parametrize(
    "other",
    [
        QUESTION.replace("7", "8"),
        QUESTION.replace("+", "-"),
        QUESTION + " Why?",
        "Find " + QUESTION,
        "",
        "x",
        apply_template("", "boxed"),
        apply_template(QUESTION.replace("2x", "x2"), "answer"),
        [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": QUESTION},
        ],
    ],
)
def test_another_question_is_another_question(other):
    """One digit, one sign, one sentence or an earlier turn more: a prompt of its own."""
    assert same_question(other) != same_question(QUESTION)


# --- ours: alignment, select ---------------------------------------------------------------------------------------


def test_alignment_is_mass_times_confidence_at_the_students_states():
    """Eq. 9, 10 and exp(-H(q)), means over the tokens of a prompt's n responses; each in 0..1."""
    pair, rows = different(), encoded(different())
    got = alignment(pair, rows, k=3, n=2, max_new_tokens=LENGTH, temperature=0.8, seed=4)
    r = pair.write(
        [row["ids"] for row in rows], n=2, max_new_tokens=LENGTH, temperature=0.8, seed=4
    )
    grid = pair.grade(r, lambda *x: diagnose(*x, 3), temperature=0.8)
    for i, x in enumerate(got):
        mask, mine = (
            r.response_mask[2 * i : 2 * i + 2],
            {name: y[2 * i : 2 * i + 2] for name, y in grid.items()},
        )
        mass = min(mine[f"overlap_mass_{of}"][mask].mean().item() for of in ("student", "teacher"))
        confidence = mine["entropy_teacher"][mask].neg().exp().mean().item()
        assert x == pytest.approx(
            {"mass": mass, "confidence": confidence, "score": mass * confidence}, rel=1e-5
        )
        assert all(0 <= value <= 1 for value in x.values())
    assert len(got) == len(rows) and len({x["score"] for x in got}) > 10


@pytest.mark.parametrize(
    "scale, mass, confidence", [(1000.0, 1.0, 1.0), (0.0, 4 / len(WORDS), 1 / len(WORDS))]
)
def test_a_certain_twin_aligns_fully_and_a_teacher_without_opinion_hardly(scale, mass, confidence):
    """One model in both roles: where it is certain the score is 1, where it is uniform k/V * 1/V."""
    models = [a_student(), a_student()]
    for model in models:
        model.get_output_embeddings().weight.data *= scale
    pair = pair_of(*models)
    for x in alignment(pair, encoded(pair), k=4, max_new_tokens=LENGTH):
        assert x == pytest.approx(
            {"mass": mass, "confidence": confidence, "score": mass * confidence}, abs=2e-3
        )


def test_alignment_goes_through_the_pool_in_parts():
    """As many prompts at once as asked for, every prompt once, in order."""
    pair = different()
    rows, asked, write = encoded(pair), [], pair.write
    pair.write = lambda prompts, **how: asked.append(prompts) or write(prompts, **how)
    assert len(alignment(pair, rows, k=3, max_new_tokens=3, at_once=5)) == 16
    assert list(map(len, asked)) == [5, 5, 5, 1] and [p for part in asked for p in part] == [
        row["ids"] for row in rows
    ]


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.6])
def test_select_keeps_the_best_share_and_gives_the_rows_back(monkeypatch, keep):
    """The best round(keep * n) of a pool, best first; rows as they came, and what was measured beside them."""
    monkeypatch.setattr(
        recipes, "alignment", lambda pair, rows, **_: [{"score": row["good"]} for row in rows]
    )
    pool = [{**row, "good": i * 7 % 16} for i, row in enumerate(PROMPTS)]
    before = copy.deepcopy(pool)
    pair = different()
    got = select(
        pair, pool, lambda rows: encoded(pair, rows), templates=("so {question}",), keep=keep
    )
    assert [row["good"] for row in got["aligned"] + got["others"]] == list(range(15, -1, -1))
    assert len(got["aligned"]) == round(keep * 16) and pool == before
    for row in got["aligned"] + got["others"]:
        measured = row.pop("alignment")
        assert row in pool and measured == {
            "score": row["good"]
        }  # not in the template, without ids


def test_select_takes_the_template_under_which_a_sample_scores_best(monkeypatch):
    """5.2, where nobody knows the teacher's template: means over the first `sample` prompts, then all in the best."""
    seen = []

    def by_template(pair, rows, **how):
        seen.append((rows[0]["prompt"][:2], len(rows), how))
        return [{"score": {"so": 0.9, "ad": 0.1, "+ ": 0.5}[row["prompt"][:2]]} for row in rows]

    monkeypatch.setattr(recipes, "alignment", by_template)
    templates = ("add {question}", "so {question}", "+ {question}")
    pair = different()
    got = select(
        pair, PROMPTS, lambda rows: encoded(pair, rows), templates=templates, sample=3, k=5
    )
    assert got["template"] == "so {question}"
    assert got["templates"] == pytest.approx(dict(zip(templates, (0.1, 0.9, 0.5))))
    assert seen == [
        ("ad", 3, {"k": 5}),
        ("so", 3, {"k": 5}),
        ("+ ", 3, {"k": 5}),
        ("so", 16, {"k": 5}),
    ]


# --- 5.1 is it fit to be learned from? -----------------------------------------------------------------------------

THOUGHT = """We need the number of ways to write 12 as a sum of three primes. Let me check the smallest prime first. If
the smallest is 2, the other two sum to 10: 3 + 7 and 5 + 5. So that gives 2 + 3 + 7 and 2 + 5 + 5. Let me check the
next one. If the smallest is 3, the other two sum to 9: 2 + 7, but 2 is smaller than 3, so that gives nothing. Let me
check the next one. If the smallest is 5, the other two sum to 7: 2 + 5, but 2 is smaller than 5, so that gives nothing.
Wait, let me check that again. If the smallest is 3, the other two sum to 9, and 9 is odd, so one of them is 2. Yes, so
that gives nothing. Therefore there are 2 ways. Answer: 2"""


@pytest.mark.parametrize(
    "text, degenerate",
    [
        (THOUGHT, False),
        (
            THOUGHT + "\n" + THOUGHT.split("Wait")[0],
            False,
        ),  # thought through, and once more to check
        (THOUGHT + " So the answer is 2 . Answer: 2 Answer: 2", False),  # said twice at the end
        (THOUGHT + " Wait, let me check that again." * 5, True),
        (THOUGHT + " 2" * 20, True),
        (" ".join(map(str, range(300))), False),
        (", ".join(str(i * i % 97) for i in range(90)), False),
        ("| n | n^2 |\n" + "\n".join(f"| {i} | {i * i} |" for i in range(60)), False),
    ],
)
def test_a_long_thought_is_no_loop_unless_it_ends_in_one(text, degenerate):
    """The paper drops what is degenerately repetitive: phrases that come back, tables and lists of numbers are not."""
    assert is_degenerate(text) == degenerate


# --- 5.1 the teacher's responses -----------------------------------------------------------------------------------


def canned(pair, responses):
    """A pair whose teacher says these token ids, one response a prompt."""

    def write(prompts, *, model, **_):
        assert model is pair.teacher
        said = [responses.pop(0) for _ in prompts]
        r = pair.given(list(zip(prompts, said)))
        r.truncated = torch.tensor([ids[-1] != EOS for ids in said])
        return r

    pair.write = write
    return pair


def answer(pair, rows, path, **how):
    """The teacher's answers in their two files: -> counts."""
    return append_answers(path, lambda start: teacher_rollouts(pair, rows, start=start, **how))


SPOKEN = [
    {"prompt": [{"role": "system", "content": "the"}, {"role": "user", "content": "so"}]},
    {"prompt": "add\u2028é"},
    {"prompt": "so"},
    {"prompt": "+ +"},
]


def test_finished_responses_are_kept_and_the_others_named(tmp_path):
    """5.1: unfinished and degenerate ones go to a file of their own, with the reason; a line is a conversation."""
    path = tmp_path / "c.jsonl"
    pair = canned(different(), [[7, 11, EOS], [9] * LENGTH, [7, 8] * 10 + [EOS], [8, 14, EOS]])
    counts = answer(pair, encoded(pair, SPOKEN), path, max_new_tokens=LENGTH)
    assert counts == {"kept": 2, "unfinished": 1, "degenerate": 1}
    said = lambda text: {"role": "assistant", "content": text}
    assert lines(path) == [
        {"messages": [*SPOKEN[0]["prompt"], said("add \\boxed{3}")]},
        {"messages": [{"role": "user", "content": "+ +"}, said("the é")]},
    ]
    assert lines(f"{path}.dropped.jsonl") == [
        {
            "messages": [
                {"role": "user", "content": "add\u2028é"},
                said(" ".join(["so"] * LENGTH)),
            ],
            "why": "unfinished",
        },
        {
            "messages": [{"role": "user", "content": "so"}, said(" ".join(["add the"] * 10))],
            "why": "degenerate",
        },
    ]


def test_it_is_the_teacher_who_writes(tmp_path):
    """5.1 is off-policy: greedy responses are the teacher's own, and not the student's."""
    pair, path = different(), tmp_path / "c.jsonl"
    answer(pair, encoded(pair), path, max_new_tokens=LENGTH, temperature=0.0)
    said = [x["messages"] for x in lines(path) + lines(f"{path}.dropped.jsonl")]
    found = {question["content"]: answer["content"] for question, answer in said}
    for model, agree in ((pair.teacher, True), (pair.student, False)):
        r = rollout(
            model,
            [row["ids"] for row in encoded(pair)],
            max_new_tokens=LENGTH,
            temperature=0.0,
            **pair.ending,
        )
        texts = [
            pair.tokenizer.decode([x for x in r.response_ids(i) if r.truncated[i] or x != EOS])
            for i in range(16)
        ]
        assert ([found[row["prompt"]] for row in PROMPTS] == texts) == agree


def test_special_tokens_within_an_answer_come_back(tmp_path):
    """OPSD#3: marks of thinking may be special tokens; what the teacher wrote is what is learned."""
    pair, path, so, add = different(), tmp_path / "c.jsonl", WORDS.index("so"), WORDS.index("add")
    pair.tokenizer.add_special_tokens({"additional_special_tokens": ["so"]})
    canned(pair, [[so, add, so, add, EOS]])
    assert answer(pair, encoded(pair)[:1], path, max_new_tokens=9)["kept"] == 1
    assert load_conversations(path, pair)[0][1] == [so, add, so, add, EOS]


def test_the_teachers_sampling_is_what_was_asked_for():
    """5.1: T .7 and top-p .95 by default; a part of the prompts at a time, each with its own seed."""
    pair, calls = different(), []
    write = pair.write

    def noted(prompts, **how):
        calls.append(
            (len(prompts), how["temperature"], how["top_p"], how["max_new_tokens"], how["seed"])
        )
        return write(prompts, **how)

    pair.write = noted
    parts = list(teacher_rollouts(pair, encoded(pair), max_new_tokens=LENGTH, at_once=7, seed=1))
    assert [call[:4] for call in calls] == [
        (7, 0.7, 0.95, LENGTH),
        (7, 0.7, 0.95, LENGTH),
        (2, 0.7, 0.95, LENGTH),
    ]
    assert len({call[4] for call in calls}) == 3 and list(map(len, parts)) == [7, 7, 2]


def asked(pair, folder, at_once):
    """-> counts and the bytes of both files."""
    counts = answer(
        pair, encoded(pair, SAID), folder / "c.jsonl", max_new_tokens=LENGTH, at_once=at_once
    )
    return counts, [(folder / name).read_bytes() for name in ("c.jsonl", "c.jsonl.dropped.jsonl")]


def killed_at(row, batches):
    """Lists of answers, of which the one numbered `row` is never reached."""
    left = iter(range(row))

    def until_then(answers):
        for one in answers:
            if next(left, None) is None:
                raise Killed
            yield one

    for answers in batches:
        yield until_then(answers)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What calls that nobody interrupts leave, by at_once."""
    return {
        at_once: asked(different(), tmp_path_factory.mktemp("whole"), at_once) for at_once in (1, 3)
    }


SAID = PROMPTS[:7] + [{"prompt": "add\u2028+\u2028é"}] + PROMPTS[7:10]


def cut(pair, folder, at_once, whole, row, torn):
    """A call that was killed while it wrote the line of a row, after `torn` bytes of it."""
    folder.mkdir()
    with pytest.raises(Killed):
        append_answers(
            folder / "c.jsonl",
            lambda start: killed_at(
                row,
                teacher_rollouts(
                    pair, encoded(pair, SAID), start=start, max_new_tokens=LENGTH, at_once=at_once
                ),
            ),
        )
    for name, text in zip(("c.jsonl", "c.jsonl.dropped.jsonl"), whole):
        there = (folder / name).read_bytes()
        assert text.startswith(there)
        line = text[len(there) :].split(b"\n")[0]
        if line and json.loads(line)["messages"][0]["content"] == SAID[row]["prompt"]:
            with open(folder / name, "ab") as file:
                file.write(line[: torn(line)])


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize(
    "row, torn",
    [
        (0, lambda line: 0),
        (2, lambda line: 20),
        (4, len),
        (8, lambda line: 1),
        (10, len),
    ],
    ids=["0 clean", "2 torn", "4 without its end", "8 torn", "10 without its end"],
)
def test_a_call_that_was_killed_goes_on_to_the_very_files(tmp_path, whole, at_once, row, torn):
    """Killed at any line, torn or not, and called again: byte for byte the files of a call that was not."""
    counts, files = whole[at_once]
    assert min(counts["kept"], counts["unfinished"]) > 2
    cut(different(), tmp_path / "cut", at_once, files, row, torn)
    assert asked(different(), tmp_path / "cut", at_once) == (counts, files)


def test_a_line_torn_within_a_character_is_a_torn_line(tmp_path, whole):
    """A kill may fall between two bytes of an accented letter."""
    cut(different(), tmp_path / "cut", 3, whole[3][1], 5, lambda line: line.index("é".encode()) + 1)
    assert asked(different(), tmp_path / "cut", 3) == whole[3]


@pytest.mark.parametrize("at_once", [1, 3])  # 11 prompts: a last part of two
def test_complete_files_are_asked_for_nothing(tmp_path, at_once):
    """A second call samples nothing, changes nothing and counts the same."""
    first, pair = asked(different(), tmp_path, at_once), different()
    pair.write = lambda *_, **__: pytest.fail("the teacher was asked")
    assert asked(pair, tmp_path, at_once) == first


def test_more_prompts_are_answered_where_they_are_new(tmp_path):
    """A call for more goes on behind what is there."""
    pair, (_, (before, _)) = different(), asked(different(), tmp_path, 3)
    more = encoded(pair, SAID + PROMPTS[10:14])
    counts = answer(pair, more, tmp_path / "c.jsonl", max_new_tokens=LENGTH, at_once=3)
    assert sum(counts.values()) == len(SAID) + 4 and (tmp_path / "c.jsonl").read_bytes().startswith(
        before
    )
    said = lines(tmp_path / "c.jsonl") + lines(tmp_path / "c.jsonl.dropped.jsonl")
    assert sorted(x["messages"][0]["content"] for x in said) == sorted(
        row["prompt"] for row in more
    )


# --- 5.1 conversations ---------------------------------------------------------------------------------------------


SWITCHED = TEMPLATE.replace("if think", "if enable_thinking")


@pytest.mark.parametrize(
    "chat_template, thinking", [(None, "default"), (SWITCHED, "default"), (SWITCHED, "on")]
)
def test_a_conversation_is_the_prompt_as_encoded_and_the_answer_with_its_end(
    tmp_path, chat_template, thinking
):
    """trl#6359: the very ids that OPD would ask with, template and its switch included; no BOS within, one end."""
    pair, path = different(chat_template=chat_template), tmp_path / "c.jsonl"
    asked = [{"role": "system", "content": "the"}, {"role": "user", "content": "add + so"}]
    answers = ["so\u2028add the", "\\boxed{7}"]  # U+2028 ends no line of JSON
    chats = [{"messages": [*asked, {"role": "assistant", "content": answer}]} for answer in answers]
    path.write_text(
        "\n\n".join(json.dumps(chat, ensure_ascii=False) for chat in chats) + "\n", encoding="utf-8"
    )
    prompt = encode(pair.tokenizer, asked, thinking)
    assert load_conversations(path, pair, thinking) == [
        (prompt, [9, 7, 8, EOS]),
        (prompt, [12, EOS]),
    ]


def test_a_conversation_that_a_model_cannot_hold_is_refused(tmp_path):
    """trl#6359: longer than its positions, it is named and never cut."""
    path = tmp_path / "c.jsonl"
    path.write_text(GOOD.replace('"so"', json.dumps("so " * 70)))
    with pytest.raises(ValueError, match="73 tokens.* holds 64"):
        load_conversations(path, different())


GOOD = '{"messages": [{"role": "user", "content": "add"}, {"role": "assistant", "content": "so"}]}'


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        "3",
        "{}",
        '{"messages": []}',
        '{"messages": "add so"}',
        '{"prompt": "add"}',
        GOOD.replace("assistant", "user"),
        GOOD.replace('"so"', '""'),
        GOOD.replace('"so"', "null"),
        '{"messages": [{"role": "assistant", "content": "so"}]}',
        '{"messages": ["add", "so"]}',
        GOOD[:-4],
        GOOD.replace('"content": "add"', '"text": "add"'),
        GOOD.replace('{"role": "user", "content": "add"}', '"add"'),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path, line):
    """File and line, whatever is wrong with it."""
    path = tmp_path / "c.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(ValueError, match='c.jsonl:3 (needs "messages"|is not JSON)'):
        load_conversations(path, different())
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no conversations"):
        load_conversations(path, different())


def test_what_is_kept_can_be_learned_from(tmp_path):
    """5.1: whatever teacher_rollouts keeps, load_conversations reads; a teacher who ends at once has said nothing."""
    pair, path = canned(different(), [[7, EOS], [EOS], [8, EOS]]), tmp_path / "c.jsonl"
    counts = answer(pair, encoded(pair)[:3], path, max_new_tokens=LENGTH)
    assert counts["kept"] == len(load_conversations(path, pair)) == 2


# --- 5.1 the fine-tuning -------------------------------------------------------------------------------------------

EXAMPLES = [
    ([1, 7, 8], [9, EOS]),
    ([1], [8, 8, 9, 10, EOS]),
    ([1, 4, 5, 6, 7, 7, 7], [11, EOS]),
    ([1, 9], [EOS]),
    ([1, 12, 4], [5, 6, 14, EOS]),
    ([1, 10, 10, 10], [13, 7, EOS]),
    ([1, 14], [7, 8, 9, 10, 11, 12, 13, EOS]),
]


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it is given and moves nothing."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=1.0)
        self.seen = []

    def step(self):
        self.seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])


def one_update(pair, **how):
    """-> the row of metrics and the gradients of one update on all EXAMPLES."""
    recorder = Recorder(pair.student)
    (row,) = cold_start(pair, recorder, EXAMPLES, steps=1, batch_size=len(EXAMPLES), **how)
    return row, recorder.seen[0]


def test_examples_become_a_rollout_and_come_back():
    """Prompts padded on the left, responses on the right, both masked."""
    pair = different()
    pair.ending["pad_id"] = 3
    r = pair.given(EXAMPLES)
    for row, (prompt, response) in enumerate(EXAMPLES):
        assert (
            r.response_ids(row) == response
            and r.ids[row][r.attention_mask[row]].tolist() == prompt + response
        )
    P = max(len(prompt) for prompt, _ in EXAMPLES)
    assert (
        r.attention_mask[:, P - 1].all()
        and r.response_mask[:, 0].all()
        and (r.ids[~r.attention_mask] == 3).all()
    )


def test_the_cold_start_descends_the_mean_over_response_tokens_alone(architecture):
    """trl#6006: cross-entropy written out over the response tokens of unpadded examples, over the shared vocabulary,
    with the tokens of the step as its one denominator: the loss, its gradient, clipped at 1."""
    pair = pair_of(a_student(architecture), a_teacher())
    row, gradients = one_update(pair)
    losses = []
    for prompt, response in EXAMPLES:
        logits = pair.student(input_ids=torch.tensor([prompt + response])).logits[
            0, len(prompt) - 1 : -1, : len(WORDS)
        ]
        losses.append(-logits.log_softmax(-1)[torch.arange(len(response)), response])
    loss = torch.cat(losses).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(pair.student.parameters(), 1.0)
    assert row["tokens"] == len(torch.cat(losses)) == sum(len(response) for _, response in EXAMPLES)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 1
    for ours, p in zip(gradients, pair.student.parameters()):
        torch.testing.assert_close(ours, p.grad, rtol=1e-3, atol=1e-6)


def test_every_update_begins_without_the_gradient_of_the_last():
    """Weights that do not move: the second gradient is that of a run that begins there."""
    pair = different()
    both, second = Recorder(pair.student), Recorder(pair.student)
    for recorder, start in ((both, 0), (second, 1)):
        list(cold_start(pair, recorder, EXAMPLES, steps=2, batch_size=3, start=start))
    assert all(map(torch.equal, both.seen[1], second.seen[0]))
    assert not all(map(torch.equal, both.seen[1], both.seen[0]))


def test_the_fine_tuning_sees_neither_pads_nor_micro_batches(architecture, monkeypatch):
    """trl#2058, #4719: bit for bit with another pad id; any budget and any chunk of logits, the same update."""
    pair = pair_of(a_student(architecture), a_teacher())
    row, gradients = one_update(pair)
    pair.ending["pad_id"] = EOS  # pad = eos, as in SmolLM2
    padded, of_padded = one_update(pair)
    assert padded == row and all(map(torch.equal, of_padded, gradients))
    chunks, in_chunks = [], teacher.in_chunks
    monkeypatch.setattr(
        teacher,
        "in_chunks",
        lambda f, *args, **how: in_chunks(
            lambda log_p, log_q, y: chunks.append(len(y)) or f(log_p, log_q, y), *args, **how
        ),
    )
    for budget, chunk, largest in ((1, None, 8), (25, None, None), (10_000, 3, 3), (10_000, 1, 1)):
        chunks.clear()
        pair.micro_batch_tokens, pair.chunk = budget, chunk
        other, of_other = one_update(pair)
        assert (
            other == pytest.approx(row, rel=1e-4)
            and max(chunks) == (largest or max(chunks))
            and len(chunks) > 2
        )
        for a, b in zip(of_other, gradients):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "steps, warmup", [(1, 0.05), (2, 0.05), (3, 0.5), (20, 0.05), (21, 0.3), (4, 1.0)]
)
def test_the_learning_rate_rises_and_falls_as_a_cosine(steps, warmup):
    """5.1: in ceil(warmup * steps) equal steps up to lr, then half a cosine towards 0, which no step has."""
    pair = different()
    got = [
        row["lr"]
        for row in cold_start(
            pair, Recorder(pair.student), EXAMPLES, steps=steps, lr=0.5, warmup=warmup, batch_size=1
        )
    ]
    warm = max(1, math.ceil(warmup * steps))
    rise = [0.5 * (i + 1) / warm for i in range(warm)]
    fall = [0.25 + 0.25 * math.cos(math.pi * i / (steps - warm)) for i in range(steps - warm)]
    assert got == pytest.approx(rise + fall) and min(got) > 0 and max(got) == 0.5


def test_four_steps_are_two_and_two_more_bit_for_bit():
    """verl#5725: with the optimizer of the run that was cut, `start` gives the run that was not."""
    whole, cut = different(), different()
    settings = dict(steps=4, lr=1e-2, warmup=0.5, batch_size=3, seed=1)
    rows = list(
        cold_start(whole, torch.optim.AdamW(whole.student.parameters()), EXAMPLES, **settings)
    )
    optimizer = torch.optim.AdamW(cut.student.parameters())
    first = list(itertools.islice(cold_start(cut, optimizer, EXAMPLES, **settings), 2))
    assert first + list(cold_start(cut, optimizer, EXAMPLES, **settings, start=2)) == rows
    assert [row["tokens"] for row in rows] == [
        sum(len(EXAMPLES[i][1]) for i in batch(len(EXAMPLES), step, 3, 1)) for step in range(4)
    ]
    ours, theirs = cut.student.state_dict(), whole.student.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_student_learns_what_it_is_shown():
    """The loss on a few conversations falls to a small part, and its greedy answers become theirs."""
    pair = different()
    optimizer = torch.optim.AdamW(pair.student.parameters())
    rows = list(cold_start(pair, optimizer, EXAMPLES, steps=60, lr=1e-2, batch_size=len(EXAMPLES)))
    assert rows[-1]["loss"] < 0.1 * rows[0]["loss"] and [row["step"] for row in rows] == list(
        range(1, 61)
    )
    r = rollout(
        pair.student,
        [prompt for prompt, _ in EXAMPLES],
        max_new_tokens=LENGTH,
        temperature=0.0,
        **pair.ending,
    )
    assert [r.response_ids(i) for i in range(len(EXAMPLES))] == [
        response for _, response in EXAMPLES
    ]


def test_a_fine_tuning_that_is_not_finite_updates_nothing():
    """Each such step is named with its examples; weights and optimizer stay as they were."""
    pair = different()
    pair.student.get_output_embeddings().weight.data[3] = math.nan
    recorder = Recorder(pair.student)
    rows = list(cold_start(pair, recorder, EXAMPLES, steps=3, batch_size=2))
    assert not recorder.seen and [row["step"] for row in rows] == [1, 2, 3]
    assert all(
        "loss nan" in row["skipped"]["why"] and len(row["skipped"]["examples"]) == 2 for row in rows
    )


def test_a_step_of_a_fine_tuning_that_is_not_finite_is_passed_over(monkeypatch):
    """The next one is an update again, with none of the gradient that was not."""
    norms = iter([1.0, math.nan, math.inf, 1.0, math.nan, 1.0])
    monkeypatch.setattr(recipes, "clip_grad_norm_", lambda *_: torch.tensor(next(norms)))
    pair = different()
    recorder = Recorder(pair.student)
    rows = list(cold_start(pair, recorder, EXAMPLES, steps=6, batch_size=2))
    assert ["skipped" in row for row in rows] == [False, True, True, False, True, False]
    assert len(recorder.seen) == 3 and all(
        x.isfinite().all() for seen in recorder.seen for x in seen
    )


# --- in a run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """student/, teacher/, prompts.jsonl, and guises.jsonl: every question four times, never the same text."""
    folder = tmp_path_factory.mktemp("world")
    for name, model in (("student", a_student()), ("teacher", a_teacher())):
        model.save_pretrained(folder / name)
        word_tokenizer(WORDS).save_pretrained(folder / name)
    guises = [
        {**row, "prompt": guise}
        for row in PROMPTS
        for guise in (
            row["prompt"],
            row["prompt"].upper() + " ",
            apply_template(row["prompt"], "boxed"),
            [{"role": "user", "content": row["prompt"]}],
        )
    ]
    for name, rows in (("prompts", PROMPTS), ("guises", guises)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def config(world, out="", **change):
    return opd.Config(
        **{
            **dict(
                student=f"{world}/student",
                teacher=f"{world}/teacher",
                prompts=f"{world}/prompts.jsonl",
                out=str(out),
                steps=4,
                batch_size=3,
                device="cpu",
                max_new_tokens=LENGTH,
                k=4,
                lr=1e-3,
                eval_n=2,
                save_every=2,
                cold_start_lr=3e-3,
                cold_start_batch_size=4,
            ),
            **change,
        }
    )


COLD = dict(cold_start=8, cold_start_steps=5)


def conversations(path, rows):
    path.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        *(
                            row["prompt"]
                            if isinstance(row["prompt"], list)
                            else [{"role": "user", "content": row["prompt"]}]
                        ),
                        {"role": "assistant", "content": "so + the"},
                    ]
                }
            )
            + "\n"
            for row in rows
        )
    )
    return str(path)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"template": "answer"},
        {"prompts": "guises.jsonl"},
        {"prompts": "guises.jsonl", "eval": "some.jsonl"},
    ],
    ids=str,
)
def test_cold_start_distillation_and_held_out_share_no_question(world, tmp_path, seed, change):
    """5.1: OPD goes on with other prompts, and neither sees what is measured on, in any case, template or chat form."""
    change = {name: f"{world}/{x}" if x.endswith(".jsonl") else x for name, x in change.items()}
    if change.pop("eval", None):  # every other question, each in one guise
        rows = load_prompts(f"{world}/guises.jsonl")
        (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, rows[1::8])))
        change["eval"] = str(tmp_path / "e.jsonl")
    train, cold, held_out = questions(config(world, seed=seed, cold_start=3, **change))
    assert len(cold) == 3 and train and held_out
    assert (
        not keys(train) & keys(cold)
        and not keys(train) & keys(held_out)
        and not keys(cold) & keys(held_out)
    )
    assert keys(train + cold + held_out) <= keys(PROMPTS)
    assert (train, cold, held_out) == questions(config(world, seed=seed, cold_start=3, **change))
    assert cold != questions(config(world, seed=seed + 9, cold_start=3, **change))[1]


def test_a_cold_start_leaves_prompts_for_distillation_or_says_so(world):
    """16 questions, 3 held out: 12 for a cold start and one for OPD, or all 13 where there is no OPD."""
    assert [len(x) for x in questions(config(world, cold_start=12))] == [1, 12, 3]
    assert [len(x) for x in questions(config(world, cold_start=13, steps=0))] == [0, 13, 3]
    with pytest.raises(ValueError, match="--cold-start 13: only 13 prompts"):
        questions(config(world, cold_start=13))


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_aligned_prompts_have_their_share_and_nothing_seen_elsewhere(world, tmp_path, fraction):
    """5.2: exactly the fraction of what is trained on, without questions that are held out or in the cold start."""
    guises = load_prompts(f"{world}/guises.jsonl")
    new = [{"prompt": f"+ {'so ' * i}+"} for i in range(6)]
    pool = guises[1::4][:8] + new  # in upper case, and new ones
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, pool)))
    change = dict(
        cold_start=4,
        aligned_prompts=str(tmp_path / "a.jsonl"),
        aligned_fraction=fraction,
        template="boxed",
    )
    train, cold, held_out = questions(config(world, **change))
    assert not keys(train) & keys(cold + held_out) and len(keys(train)) == len(train) > 3
    from_pool = [
        row
        for row in train
        if row["prompt"] in {apply_template(x["prompt"], "boxed") for x in pool}
    ]
    assert len(from_pool) == round(fraction * len(train))
    assert fraction == 0 or any(
        row["prompt"] == apply_template(x["prompt"], "boxed") for row in train for x in new
    )
    assert (train, cold, held_out) == questions(config(world, **change))


def left(out):
    """What a run leaves, without clocks: bytes, metrics, accuracies and weights."""
    metrics = [
        {name: x for name, x in row.items() if not name.startswith(("time_", "peak_"))}
        for row in lines(out / "metrics.jsonl")
    ]
    result = json.loads((out / "result.json").read_text())
    result = {
        name: x
        for name, x in result.items()
        if name not in ("seconds", "command", "commit", "dirty")
    }
    return (
        (out / "cold_start.jsonl").read_bytes(),
        (out / "cold_start_metrics.jsonl").read_text(),
        (out / "rollouts.jsonl").read_text(),
        metrics,
        result,
    )


def weights(out):
    return AutoModelForCausalLM.from_pretrained(out / "student").state_dict()


def in_the_answers(monkeypatch):
    monkeypatch.setattr(
        opd, "teacher_rollouts", lambda *args, **how: killed_at(2, teacher_rollouts(*args, **how))
    )


def in_the_fine_tuning(monkeypatch):
    def dies(*args, **how):
        for row in cold_start(*args, **how):
            if row["step"] == 4:
                raise Killed
            yield row

    monkeypatch.setattr(opd, "cold_start", dies)


def after_the_fine_tuning(monkeypatch):
    plain, calls = measure.accuracy, iter(["of the teacher", "before"])

    def dies(*args):
        if next(calls, None) is None:
            raise Killed
        return plain(*args)

    monkeypatch.setattr(measure, "accuracy", dies)


def in_the_distillation(monkeypatch):
    plain = opd.update

    def dies(cfg, pair, optimizer, rows, step):
        if step == 3:
            raise Killed
        return plain(cfg, pair, optimizer, rows, step)

    monkeypatch.setattr(opd, "update", dies)


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    opd.distil(config(world, out, **COLD))
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", [in_the_answers, in_the_fine_tuning, after_the_fine_tuning, in_the_distillation]
)
def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(
    world, tmp_path, monkeypatch, uninterrupted, where
):
    """verl#5725: in the teacher's responses, the fine-tuning, the evaluation after it or OPD: bit for bit one run."""
    out = tmp_path / "cut"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        where(patch)
        opd.distil(config(world, out, **COLD))
    assert not (out / "result.json").exists()
    opd.distil(config(world, out, **COLD, resume=True))
    assert left(out) == left(uninterrupted)
    ours, theirs = weights(out), weights(uninterrupted)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_with_a_cold_start_leaves_what_it_promises(world, uninterrupted):
    """5.1: the answers, each update of the fine-tuning, and measurements between it and OPD, whose optimizer is new."""
    answers, log, _, metrics, result = left(uninterrupted)
    assert [json.loads(line)["step"] for line in log.splitlines()] == [1, 2, 3, 4, 5] and len(
        metrics
    ) == 4
    kept = answers.decode().splitlines()
    assert result["cold_start"]["kept"] == len(kept) > 2 and sum(result["cold_start"].values()) == 8
    cold = {row["prompt"] for row in questions(config(world, **COLD))[1]}
    assert {json.loads(line)["messages"][0]["content"] for line in kept} <= cold
    assert {
        "accuracy_before",
        "accuracy_cold_start",
        "accuracy_after",
        "held_out_cold_start",
    } <= result.keys()
    assert result["held_out_cold_start"] != result[
        "held_out_before"
    ] and "(cold start)" in show.summary(result)
    assert {row["lr"] for row in metrics} == {1e-3}


def test_without_distillation_it_is_the_fine_tuning_alone(world, tmp_path, uninterrupted):
    """5.1's missing control: --steps 0 after a cold start measures, saves and reports the fine-tuned student."""
    result = opd.distil(config(world, tmp_path / "run", steps=0, **COLD))
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (
        written == result
        and result["steps"] == 0
        and result["accuracy_after"] == result["accuracy_cold_start"]
    )
    assert result["accuracy_cold_start"] == left(uninterrupted)[4]["accuracy_cold_start"]
    saved, first = weights(tmp_path / "run"), a_student().state_dict()
    assert any(not torch.equal(saved[name], first[name]) for name in saved)


def test_the_answers_of_a_cold_start_are_drawn_as_asked(world, tmp_path, monkeypatch):
    """--cold-start-temperature and -top-p reach the teacher that answers; .7 and .95, the paper's, unless asked."""
    asked = []
    monkeypatch.setattr(
        opd,
        "teacher_rollouts",
        lambda *args, **how: asked.append(how) or teacher_rollouts(*args, **how),
    )
    for name, change in (
        ("paper", {}),
        ("wide", dict(cold_start_temperature=1.0, cold_start_top_p=1.0)),
    ):
        opd.distil(config(world, tmp_path / name, steps=0, **COLD, **change))
    assert [(how["temperature"], how["top_p"]) for how in asked] == [(0.7, 0.95), (1.0, 1.0)]


def test_the_third_step_in_a_row_that_is_not_finite_ends_a_cold_start(world, tmp_path, monkeypatch):
    """Three in all do not: only a row of them says that something is wrong, and with what."""
    for norms, ends in (
        ([math.nan, math.inf, 1.0, math.nan, 1.0], False),
        ([1.0, *[math.nan] * 4], True),
    ):
        left = iter(norms)
        monkeypatch.setattr(recipes, "clip_grad_norm_", lambda *_: torch.tensor(next(left)))
        cfg = config(world, tmp_path / str(ends), steps=0, **COLD)
        if not ends:
            assert opd.distil(cfg)["skipped_steps"] == 3
            continue
        with pytest.raises(
            FloatingPointError,
            match="step 4 skipped: .*gradient norm nan.*third in a row.*start-lr",
        ):
            opd.distil(cfg)
    log = lines(tmp_path / "False" / "cold_start_metrics.jsonl")
    assert [row["grad_norm"] for row in log] == [None, None, 1, None, 1]
    assert ["skipped" in row for row in log] == [True, True, False, True, False]


def test_an_epoch_is_the_default_length_of_a_cold_start(world, tmp_path):
    """5.1: every conversation once, the last batch filled up from the next epoch."""
    file = conversations(tmp_path / "c.jsonl", PROMPTS[:9])
    opd.distil(config(world, tmp_path / "run", steps=0, cold_start_file=file))
    assert len(lines(tmp_path / "run" / "cold_start_metrics.jsonl")) == 3  # 9 of them, 4 at a time


def test_a_file_of_conversations_is_read_and_its_questions_are_not_distilled(
    world, tmp_path, monkeypatch
):
    """5.1: nobody asks the teacher, and OPD sees other questions, whatever guise those of the file are in."""
    monkeypatch.setattr(
        opd, "teacher_rollouts", lambda *_, **__: pytest.fail("the teacher was asked")
    )
    file = conversations(
        tmp_path / "c.jsonl",
        [{"prompt": apply_template(row["prompt"], "boxed").upper()} for row in PROMPTS[:3]]
        + [
            {
                "prompt": [
                    {"role": "system", "content": "so"},
                    {"role": "user", "content": row["prompt"]},
                ]
            }
            for row in PROMPTS[3:6]
        ],
    )
    cfg = config(world, tmp_path / "run", steps=1, cold_start_file=file, template="so {question}")
    train, cold, held_out = questions(cfg)
    assert train and not cold
    assert not {row["prompt"] for row in train} & {"so " + row["prompt"] for row in PROMPTS[:6]}
    result = opd.distil(cfg)
    assert (
        result["accuracy_cold_start"]["samples"] == 2 * len(held_out) and "cold_start" not in result
    )
    assert not (tmp_path / "run" / "cold_start.jsonl").exists()


def test_what_a_file_of_conversations_answers_is_not_held_out(world, tmp_path):
    """5.1: the fine-tuning would have seen the answers of what the run is measured on."""
    file = conversations(tmp_path / "c.jsonl", PROMPTS[:10])
    for seed in range(4):
        train, _, held_out = questions(config(world, cold_start_file=file, seed=seed))
        assert train and held_out and not keys(held_out) & keys(PROMPTS[:10])


@pytest.mark.parametrize("template", ["none", "boxed", "so {question} so"])
def test_the_answers_of_one_run_serve_the_next(world, tmp_path, template):
    """5.1: cold_start.jsonl holds prompts in the run's template; given to another run with it, none is distilled."""
    _, cold, _ = questions(config(world, cold_start=6, template=template))
    file = conversations(tmp_path / "c.jsonl", cold)
    train, none, held_out = questions(config(world, cold_start_file=file, template=template))
    prompts = [row["prompt"] for row in cold]
    assert not none and train and not [row for row in train + held_out if row["prompt"] in prompts]


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--steps", "0"], "0 only after a cold start"),
        (["--steps", "-1", "--cold-start", "3"], "--steps -1"),
        (["--cold-start", "-2"], "--cold-start -2: must be at least 0"),
        (["--cold-start", "3", "--cold-start-file", __file__], "give one of the two"),
        (["--cold-start-steps", "3"], "--cold-start-steps without --cold-start"),
        (["--cold-start-file", "nowhere.jsonl"], "--cold-start-file nowhere.jsonl: No such file"),
        (["--cold-start", "3", "--cold-start-lr", "0"], "--cold-start-lr 0.0"),
        (["--cold-start", "3", "--cold-start-batch-size", "0"], "--cold-start-batch-size 0"),
        (
            ["--cold-start", "3", "--cold-start-max-new-tokens", "-1"],
            "--cold-start-max-new-tokens -1",
        ),
        (["--cold-start", "3", "--cold-start-temperature", "-1"], "--cold-start-temperature -1.0"),
        (["--cold-start", "3", "--cold-start-top-p", "1.5"], "--cold-start-top-p 1.5"),
        (["--cold-start", "500"], "--cold-start 500: only 448 prompts"),
        (["--aligned-prompts", "nowhere.jsonl"], "--aligned-prompts nowhere.jsonl: No such file"),
        (["--aligned-prompts", __file__], "--aligned-prompts needs --prompts"),
        (["--aligned-fraction", "1.5"], "--aligned-fraction 1.5"),
        (["--aligned-fraction", "nan"], "--aligned-fraction nan"),
    ],
)
def test_a_cold_start_that_cannot_work_is_one_line_and_no_model_is_loaded(
    flags, says, capsys, tmp_path, monkeypatch
):
    """prime-rl#1458: exit code 2, one line with the flag, no directory left behind."""
    refused(
        opd.main,
        ["--student", "s", "--teacher", "t", "--out", str(tmp_path / "run"), *flags],
        says,
        capsys,
        tmp_path,
        monkeypatch,
    )


def refused(main, flags, says, capsys, folder, monkeypatch):
    monkeypatch.setattr(Pair, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    there = sorted(folder.iterdir())
    with pytest.raises(SystemExit) as stop:
        main(flags)
    printed = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and says in printed
        and printed.count("\n") == 1
        and sorted(folder.iterdir()) == there
    )


@pytest.mark.parametrize(
    "line", ["not json", "{}", '{"messages": 3}', GOOD.replace('"content": "add"', '"text": "add"')]
)
def test_a_file_that_holds_no_conversations_is_one_line(line, capsys, world, tmp_path, monkeypatch):
    """File and line of --cold-start-file, before a model is loaded."""
    file = tmp_path / "c.jsonl"
    file.write_text(f"{GOOD}\n{line}\n")
    refused(
        opd.main,
        [
            "--student",
            "s",
            "--teacher",
            "t",
            "--prompts",
            f"{world}/prompts.jsonl",
            "--cold-start-file",
            str(file),
            "--out",
            str(tmp_path / "run"),
        ],
        "c.jsonl:2",
        capsys,
        tmp_path,
        monkeypatch,
    )


# --- the command line ----------------------------------------------------------------------------------------------


def command(world, name, out, *more):
    return [
        name,
        "--student",
        f"{world}/student",
        "--teacher",
        f"{world}/teacher",
        "--out",
        str(out),
        "--prompts",
        f"{world}/prompts.jsonl",
        "--max-new-tokens",
        str(LENGTH),
        *more,
    ]


def test_the_command_rollouts_writes_what_the_teacher_says_and_counts(world, tmp_path, capsys):
    """Kept and dropped add up to the prompts asked; called again it says the same and changes nothing."""
    out = tmp_path / "c.jsonl"
    recipes.main(command(world, "rollouts", out, "--count", "9", "--template", "so {question}"))
    kept, dropped = lines(out), lines(f"{out}.dropped.jsonl")
    why = [row["why"] for row in dropped]
    printed = capsys.readouterr().out
    assert printed == (
        f"{len(kept)} responses in {out}; {why.count('unfinished')} unfinished and "
        f"{why.count('degenerate')} degenerate ones in {out}.dropped.jsonl\n"
    )
    assert len(kept) + len(dropped) == 9 and kept
    assert {row["messages"][0]["content"] for row in kept + dropped} == {
        "so " + row["prompt"] for row in PROMPTS[:9]
    }
    before = out.read_bytes()
    recipes.main(command(world, "rollouts", out, "--count", "9", "--template", "so {question}"))
    assert capsys.readouterr().out == printed and out.read_bytes() == before


def test_the_command_select_splits_the_pool_in_two_files_of_prompts(world, tmp_path, capsys):
    """Both can be given to opd.py as they are, --aligned-prompts and --prompts; template and scores are printed."""
    out = tmp_path / "aligned.jsonl"
    recipes.main(
        command(world, "select", out, "--templates", "none,boxed", "--keep", "0.25", "--k", "3")
    )
    others = tmp_path / "aligned.others.jsonl"
    parts = [lines(out), lines(others)]
    scores = [[row["alignment"]["score"] for row in part] for part in parts]
    assert list(map(len, parts)) == [4, 12] and min(scores[0]) >= max(scores[1])
    read = [
        {"prompt": row["prompt"], "answer": row["answer"]}
        for row in load_prompts(out) + load_prompts(others)
    ]
    assert sorted(map(str, read)) == sorted(map(str, PROMPTS))
    printed = capsys.readouterr().out
    best = printed.split()[1]
    assert f"{out}: 4 prompts, scores {min(scores[0]):.4f} to {max(scores[0]):.4f}" in printed
    assert best in ("none", "boxed") and printed.endswith(
        f"--template {best} --aligned-prompts {out} --prompts {others}\n"
    )
    questions(config(world, aligned_prompts=str(out), prompts=str(others), template=best))


@pytest.mark.parametrize(
    "name, more, says",
    [
        ("select", ["--keep", "0"], "--keep 0.0"),
        ("select", ["--keep", "1.1"], "--keep 1.1"),
        ("select", ["--templates", "none,latex"], "latex"),
        ("rollouts", ["--template", "latex"], "latex"),
        ("rollouts", ["--prompts", "nowhere.jsonl"], "--prompts nowhere.jsonl: No such file"),
        ("rollouts", ["--out", "no/such/folder/c.jsonl"], "its folder does not exist"),
        ("select", ["--n", "0"], "--n"),
        ("rollouts", ["--max-new-tokens", "0"], "--max-new-tokens"),
        ("rollouts", ["--temperature", "-1"], "--temperature"),
        ("rollouts", ["--top-p", "0"], "--top-p"),
        ("rollouts", ["--count", "many"], "--count"),
        ("rollouts", ["--count", "0"], "--count"),
        ("rollouts", ["--keep", "0.5"], "--keep"),
        ("selects", [], "say which: rollouts"),
        ("select", ["--template", "none"], "--template"),
        ("rollouts", ["--max-new-token", "5"], "did you mean --max-new-tokens"),
    ],
)
def test_a_recipe_that_cannot_work_is_one_line_and_no_model_is_loaded(
    world, name, more, says, capsys, tmp_path, monkeypatch
):
    """prime-rl#1458: exit code 2, one line with the flag, the nearest one where it is misspelt, no file left behind."""
    monkeypatch.chdir(tmp_path)
    refused(
        recipes.main, command(world, name, "out.jsonl", *more), says, capsys, tmp_path, monkeypatch
    )


@pytest.mark.parametrize("missing", ["--student", "--teacher", "--prompts", "--out"])
def test_a_recipe_needs_its_pair_its_prompts_and_its_file(
    world, missing, capsys, tmp_path, monkeypatch
):
    """Each is named when it is missing."""
    flags = command(world, "rollouts", tmp_path / "out.jsonl")
    i = flags.index(missing)
    refused(recipes.main, flags[:i] + flags[i + 2 :], missing, capsys, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "more, says",
    [
        (["--k", "16"], "16"),
        (["--device", "gpu"], "gpu"),
        (["--keep", "0.02"], "--keep 0.02"),
        (["--keep", "1"], "--keep 1.0"),
    ],
)
def test_what_only_pool_and_models_can_tell_is_one_line_all_the_same(
    world, more, says, capsys, tmp_path
):
    """A k beyond the shared vocabulary, a device that is none, a share that keeps no prompt of so small a pool."""
    with pytest.raises(SystemExit) as stop:
        recipes.main(command(world, "select", tmp_path / "a.jsonl", "--k", "3", *more))
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and says in printed and printed.count("\n") == 1
