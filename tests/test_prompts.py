"""Laws of plumbing/prompts.py: what the student is asked, from a file to token ids.

Also the shuffle that deals prompts out to steps, and the templates around them (5.2).
"""

import contextlib
import dataclasses
import itertools
import json
import warnings
from dataclasses import replace

import pytest
from conftest import TEMPLATE, WORDS, tiny, word_tokenizer, write_lines
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import Phi3Config, PreTrainedTokenizerFast

from plumbing.flags import Config, Diagnosis
from plumbing.prompts import (
    additions,
    check_fits,
    conversation_keys,
    encode,
    encode_for,
    encode_rows,
    for_accuracy,
    load_conversations,
    load_prompts,
    out_of_template,
    positions,
    questions,
    read_conversations,
    some_questions,
)
from recipes import TEMPLATES, apply_template, question_key
from teacher import UserError, make_pair

EOS = WORDS.index("[EOS]")


def lines(path, *rows):
    """A file of JSON lines: -> its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def pair_of(tokenizer):
    vocab_size = len(tokenizer)
    student = tiny("llama", vocab_size=vocab_size)
    teacher = tiny("llama", seed=1, vocab_size=vocab_size)
    return make_pair(student, teacher, tokenizer, tokenizer)


@contextlib.contextmanager
def says(*texts):
    """Check that these warnings are given, in any order, and no others."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    assert sorted(str(warning.message) for warning in seen) == sorted(texts)


# --- files ---------------------------------------------------------------------------------------


def test_load_prompts_reads_text_and_chat(tmp_path):
    """A prompt is text or messages, with or without an answer. Its id is file and line."""
    path = tmp_path / "prompts.jsonl"
    chat = [user("3 + 7 ="), said("so"), {"role": "tool", "content": "7"}]
    first = '{"prompt": "add é", "answer": "0"}\n\n'
    path.write_text(first + json.dumps({"prompt": chat}) + "\n", encoding="utf-8")
    assert load_prompts(path) == [
        {"prompt": "add é", "answer": "0", "id": "prompts.jsonl:1"},
        {"prompt": chat, "answer": None, "id": "prompts.jsonl:3"},
    ]


USER = '{"role": "user", "content": "add"}'
SAID = '{"role": "assistant", "content": "so"}'
BAD_PROMPTS = f"""
needs "prompt" | {{"question": "3 + 7"}}
is not an object; write one | ["add"]
needs "prompt" | {{"prompt": "  "}}
needs "prompt" | {{"prompt": []}}
needs "prompt" | {{"prompt": [{{"role": "user"}}]}}
needs "prompt" | {{"prompt": 7}}
is not JSON | {{"prompt": "cut
ends with what the assistant says | {{"prompt": [{USER}, {SAID}]}}
ends with what the system says | {{"prompt": [{{"role": "system", "content": "add"}}]}}
has \\ud83d, half of a character | {{"prompt": "add \\ud83d 3"}}
has \\udc00, half of a character | {{"prompt": "add", "teacher_prompt": [{{"\\udc00": 3}}]}}
has an answer that is no text | {{"prompt": "add", "answer": 7}}
has an answer that is no text (str), or empty | {{"prompt": "add", "answer": " "}}
"""
BAD_CONVERSATIONS = f"""
needs "messages" | []
needs "messages" | 3
needs "messages" | {{}}
needs "messages" | {{"messages": []}}
needs "messages" | {{"messages": "add so"}}
needs "messages" | {{"messages": [{SAID}]}}
needs "messages" | {{"messages": [{USER}, {USER}]}}
needs "messages" | {{"messages": ["add", {SAID}]}}
needs "messages" | {{"messages": [{USER}, {{"role": "assistant", "content": ""}}]}}
needs "messages" | {{"messages": [{USER}, {{"role": "assistant", "content": null}}]}}
is not JSON | {{"messages": [{USER}
has \\ud83d, half of a character | {{"messages": [{USER}, {SAID}, "\\ud83d"]}}
needs "prompt_ids" | {{"messages": [{USER}, {SAID}], "prompt_ids": [1]}}
needs "prompt_ids" | {{"messages": [{USER}, {SAID}], "prompt_ids": [1], "response_ids": []}}
needs "prompt_ids" | {{"messages": [{USER}, {SAID}], "prompt_ids": [1], "response_ids": [-1]}}
needs "prompt_ids" | {{"messages": [{USER}, {SAID}], "prompt_ids": [1], "response_ids": ["a"]}}
"""


@pytest.mark.parametrize("case", BAD_PROMPTS.strip().split("\n"))
def test_a_line_that_is_no_prompt_is_named(tmp_path, case):
    """The message names file and line. xinference#4833: a prompt ends with the user or a tool."""
    why, line = case.split(" | ")
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "add"}}\n{line}\n')
    with pytest.raises(UserError) as refused:
        load_prompts(path)
    assert str(refused.value).startswith(f"{path}:2 {why}")


@pytest.mark.parametrize("case", BAD_CONVERSATIONS.strip().split("\n"))
def test_a_line_that_is_no_conversation_is_named(tmp_path, case):
    """The message names file and line, whatever is wrong with it."""
    why, line = case.split(" | ")
    path = tmp_path / "c.jsonl"
    path.write_text(f'{{"messages": [{USER}, {SAID}]}}\n\n{line}\n')
    with pytest.raises(UserError) as refused:
        read_conversations(path)
    assert str(refused.value).startswith(f"{path}:3 {why}")


def test_a_file_with_nothing_in_it_is_refused(tmp_path):
    """An empty file is an error at once, and not an empty batch later."""
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no prompts"):
        load_prompts(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="holds no conversations"):
        read_conversations(tmp_path / "empty.jsonl")


def test_what_a_cold_start_has_not_kept_is_no_conversation(tmp_path):
    """Another run may use cold_start.jsonl, without its unfinished answers."""
    chat = {"messages": [user("add"), said("so")]}
    kept = {**chat, "why": "kept"}
    path = lines(tmp_path / "c.jsonl", {**chat, "why": "unfinished"}, kept, chat)
    assert [row["where"] for row in read_conversations(path)] == [f"{path}:2", f"{path}:3"]


def test_additions_are_all_pairs_of_two_digits():
    """There are 8,100 questions, each once, with their sums. The seed gives their order."""
    rows = additions(90 * 90)
    pairs = set()
    for row in rows:
        a, b = (int(number) for number in row["id"].split(" + "))
        assert f"What is {a} + {b}?" in row["prompt"]
        assert row["answer"] == str(a + b)
        pairs.add((a, b))
    assert pairs == set(itertools.product(range(10, 100), repeat=2))
    assert additions(5, 0) == rows[:5] != additions(5, 1)


# --- templates -----------------------------------------------------------------------------------


def test_a_template_wraps_the_question_and_nothing_else():
    """The released data has a literal \\boxed{{}}, ours has \\boxed{}. Braces in questions stay."""
    assert apply_template("{1, 2}?", "none") == "{1, 2}?"
    boxed = apply_template("{1, 2}?", "boxed")
    assert boxed.startswith("{1, 2}? Please") and "\\boxed{}." in boxed
    assert apply_template("x", "Q: {question} {A}") == "Q: x {A}"
    assert all("{question}" in template for template in TEMPLATES.values())
    with pytest.raises(UserError, match="latex"):
        apply_template("x", "latex")


@pytest.mark.parametrize("template", ["answer", "boxed", "so {question} so"])
def test_a_prompt_that_is_in_the_template_is_put_once_and_that_is_said(tmp_path, template):
    """In Online-DPO-R1#10 the instruction stands in the prompt twice."""
    put = apply_template("add 3", template)
    chat = [user(apply_template("add 7", template))]
    path = lines(tmp_path / "p.jsonl", {"prompt": put}, {"prompt": chat}, {"prompt": "add"})
    note = "--prompts: 2 of 3 prompts are in the template already and stay as they are"
    cfg = Diagnosis(prompts=path, template=template, count=3)
    with says(note):
        rows = some_questions(cfg)
    prompts = [row["prompt"] for row in rows]
    for prompt in (put, chat, apply_template("add", template)):
        assert prompt in prompts
    with says():
        some_questions(dataclasses.replace(cfg, template="none"))


@pytest.mark.parametrize("space", ["\n", " ", "\r\n"])
def test_spaces_around_a_template_are_not_another_prompt(tmp_path, space):
    """In Online-DPO-R1#10 the instruction stands in the prompt twice."""
    put = space + apply_template("add 3", "answer") + space
    cfg = Diagnosis(prompts=lines(tmp_path / "p.jsonl", {"prompt": put}), template="answer")
    with says("--prompts: 1 of 1 prompts are in the template already and stay as they are"):
        [row] = some_questions(cfg)
    assert row["prompt"] == put
    assert out_of_template([row], "answer")[0]["prompt"] == "add 3"


def test_prompts_in_two_templates_are_counted(tmp_path):
    """5.2 compares templates, and DAPO's prompts come in theirs."""
    put = apply_template("add 3", "answer")
    path = lines(tmp_path / "p.jsonl", {"prompt": put}, {"prompt": "add"})
    with says("--prompts: 1 of 2 prompts are in the template 'answer', too, and have both now"):
        some_questions(Diagnosis(prompts=path, template="boxed"))


# --- questions -----------------------------------------------------------------------------------


def config(folder, prompts, **change):
    """The Config of a run on these prompts. Flags that are lists of rows become files."""
    flags = {"prompts": prompts, "steps": 4, **change}
    for name, value in flags.items():
        if isinstance(value, list):
            flags[name] = lines(folder / f"{name}.jsonl", *value)
        if name == "eval":
            flags[name] = (flags[name],)
    return Config(student="s", teacher="t", **flags)


def some(count, word="add"):
    return [{"prompt": f"{word} {i}", "answer": str(i)} for i in range(count)]


def keys(rows):
    return {question_key(row["prompt"]) for row in rows}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("change", [{}, {"template": "answer"}, {"eval": some(30)[::5]}], ids=str)
def test_training_cold_start_and_held_out_share_no_question(tmp_path, seed, change):
    """5.1: OPD has other prompts than the cold start, and neither has held-out ones."""
    cfg = config(tmp_path, some(20) + some(10), cold_start=3, seed=seed, **change)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = questions(cfg)
        assert questions(cfg) == parts
        other = questions(config(tmp_path, some(20), cold_start=3, seed=seed + 9, **change))
    train, cold, held_out = parts
    assert len(cold) == 3 and train and held_out
    for a, b in itertools.combinations(parts, 2):
        assert not keys(a) & keys(b)
    for part in parts:
        assert len(keys(part)) == len(part)
    assert other[1] != cold


def test_a_fifth_is_held_out_whatever_the_order_of_the_file(tmp_path):
    """At most 64 are held out, and the same ones if the lines of the file are shuffled."""
    train, _, held_out = questions(config(tmp_path, some(20)))
    _, _, again = questions(config(tmp_path, some(20)[::-1]))
    assert len(train) == 16 and len(held_out) == 4
    assert keys(held_out) == keys(again)
    assert len(questions(config(tmp_path, some(500)))[2]) == 64


@pytest.mark.parametrize(
    "line, warned",
    [
        ({"answers": "5"}, '"answers" is not read; did you mean "answer"?'),
        ({"teacherprompt": "so"}, '"teacherprompt" is not read; did you mean "teacher_prompt"?'),
        ({"answer": "5", "answers": ["5", "five"], "id": 3}, None),
    ],
)
def test_a_key_that_looks_misspelt_is_named(tmp_path, line, warned):
    """Otherwise a run would end without its accuracy, or without what the teacher may read."""
    path = tmp_path / "rows.jsonl"
    write_lines(path, [{"prompt": "add 3", **line}, {"prompt": "add 5", **line}])
    with says(*([f"{path}: {warned}"] if warned else [])):
        assert len(load_prompts(path)) == 2


def test_questions_without_answers_are_told_before_training(tmp_path):
    rows = [{"prompt": f"add {i}"} for i in range(5)]
    with says('accuracy will not be measured: no held-out prompt has an "answer"'):
        questions(config(tmp_path, rows))


def test_questions_are_the_same_only_if_all_of_their_text_is(tmp_path):
    """SophiaVL-R1#11: system prompts, powers, spaces and case tell questions apart."""
    chats = [[{"role": "system", "content": f"level {i}"}, user("add 3")] for i in range(40)]
    texts = ["5²", "52", "1 23", "12 3", "n", "N", "add 3"]
    rows = [{"prompt": prompt, "answer": "3"} for prompt in chats + texts]
    with says():
        parts = questions(config(tmp_path, rows))
    assert sum(map(len, parts)) == 47


def test_what_is_left_out_is_counted_and_said(tmp_path):
    """Repeated prompts, held-out prompts and answered prompts are counted and left out."""
    rows = some(10) + some(3) + [{"prompt": [user("add 9")]}]
    answered = [{"messages": [user("add 4"), said("so")]}]
    with says(
        "--prompts: 4 of 14 prompts repeat another one and are left out",
        "--prompts: 1 of 10 prompts are answered in --cold-start-file and left out",
        "--prompts: 2 of 9 prompts are held out in --eval and left out",
        "--eval: 1 of 3 prompts are answered in --cold-start-file",
    ):
        train, _, held_out = questions(
            config(tmp_path, rows, eval=some(5)[2:], cold_start_file=answered)
        )
    assert len(train) == 7 and len(held_out) == 3


def test_a_cold_start_leaves_prompts_for_distillation_or_says_so(tmp_path):
    """Of 16 prompts 3 are held out. A cold start may take 12 and leave one to OPD, or all 13."""

    def sizes(**change):
        return [len(part) for part in questions(config(tmp_path, some(16), **change))]

    assert sizes(cold_start=12) == [1, 12, 3]
    assert sizes(cold_start=13, steps=0) == [0, 13, 3]
    with pytest.raises(UserError, match="--cold-start 13: only 13 prompts"):
        sizes(cold_start=13)
    with pytest.warns(UserWarning), pytest.raises(UserError, match="no prompt is left"):
        sizes(eval=some(16))


@pytest.mark.parametrize("template", ["none", "boxed", "so {question} so"])
def test_the_questions_of_a_file_of_conversations_are_not_asked_again(tmp_path, template):
    """5.1: they are neither distilled nor held out, whether plain or in the template there."""
    plain = [{"messages": [user(row["prompt"]), said("so")]} for row in some(20)[:5]]
    put = [apply_template(row["prompt"], template) for row in some(20)[5:10]]
    file = plain + [{"messages": [user(prompt), said("so")]} for prompt in put]
    with pytest.warns(UserWarning, match="10 of 20 prompts are answered"):
        train, cold, held_out = questions(
            config(tmp_path, some(20), template=template, cold_start_file=file)
        )
    assert cold == []
    asked = {row["prompt"] for row in train + held_out}
    assert asked == {apply_template(row["prompt"], template) for row in some(20)[10:]}


@pytest.mark.parametrize("training", ["none", "answer", "Q: {question}"])
@pytest.mark.parametrize("of_accuracy", ["", "none", "answer", "boxed"])
def test_one_template_stands_around_a_question_in_training_and_one_in_accuracy(
    tmp_path, training, of_accuracy
):
    """The paper trains under "answer" and measures under "boxed". If a prompt is in one of the two
    already, as text or as a chat, it is taken out of that one first."""
    measured = of_accuracy or training
    held_out = [
        {"prompt": "add 1"},
        {"prompt": apply_template("add 2", training)},
        {"prompt": apply_template("add 3", measured)},
        {"prompt": [user("so"), said("so"), user(apply_template("add 4", measured))]},
    ]
    cfg = config(tmp_path, some(9)[3:], eval=held_out, template=training, eval_template=of_accuracy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train, _, held_out = questions(cfg)

    def put(template):
        texts = [apply_template(f"add {i}", template) for i in (1, 2, 3, 4)]
        return [*texts[:3], [user("so"), said("so"), user(texts[3])]]

    assert [row["prompt"] for row in held_out] == put(training)
    assert [row["prompt"] for row in for_accuracy(cfg, held_out)] == put(measured)
    assert apply_template("add 3", training) not in [row["prompt"] for row in train]
    assert len(train) == 5


def test_a_question_in_the_template_of_accuracy_is_held_out_all_the_same(tmp_path):
    """All files may be in it, as published ones are. Their questions are the bare ones."""
    boxed = [{**row, "prompt": apply_template(row["prompt"], "boxed")} for row in some(9)]
    cfg = config(tmp_path, boxed, eval=boxed[:4], template="answer", eval_template="boxed")
    with pytest.warns(UserWarning, match="4 of 9 prompts are held out in --eval and left out"):
        train, _, held_out = questions(cfg)
    asked = [apply_template(row["prompt"], "answer") for row in some(9)]
    assert {row["prompt"] for row in held_out} == set(asked[:4])
    assert {row["prompt"] for row in train} == set(asked[4:])


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_aligned_prompts_have_their_share_and_nothing_seen_elsewhere(tmp_path, fraction):
    """5.2: exactly that share of the training prompts is aligned."""
    aligned = some(8) + some(6, "so")
    cfg = config(
        tmp_path,
        some(30),
        aligned_prompts=aligned,
        aligned_fraction=fraction,
        cold_start=4,
        template="boxed",
    )
    with pytest.warns(UserWarning):
        train, cold, held_out = questions(cfg)
    put = {apply_template(row["prompt"], "boxed") for row in aligned}
    assert sum(row["prompt"] in put for row in train) == round(fraction * len(train))
    assert len(keys(train)) == len(train) > 3
    assert not keys(train) & keys(cold + held_out)


def test_the_size_of_a_mixture_is_said(tmp_path):
    """A few aligned prompts make a small mixture, however many others there are."""
    cfg = config(tmp_path, some(10), aligned_prompts=some(2, "so"))
    with says(
        "--aligned-fraction 0.5: the largest such mixture has 5 prompts; 5 of 10 are left out"
    ):
        train, _, _ = questions(cfg)
    assert len(train) == 5


# --- token ids -----------------------------------------------------------------------------------

SWITCHED = TEMPLATE.replace("if think", "if enable_thinking")


@pytest.mark.parametrize(
    "thinking, options",
    [
        ("default", {}),
        ("on", {"enable_thinking": True}),
        ("off", {"enable_thinking": False}),
    ],
)
def test_encode_writes_the_template_once(thinking, options):
    """A text and a chat of one user message are one prompt, with one BOS (OPSD#10: the switch)."""
    tokenizer = word_tokenizer(chat_template=SWITCHED)
    chat = [user("add 3 7")]
    ids = encode(tokenizer, "add 3 7", thinking)
    assert ids == encode(tokenizer, chat, thinking)
    assert ids == tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=False, **options
    )
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids).endswith("so") == (thinking == "on")


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_switch_that_the_template_does_not_have_is_refused(template):
    """trl#2919: without this --thinking off would do nothing."""
    with pytest.raises(UserError, match="--thinking off: .* no enable_thinking"):
        encode(word_tokenizer(chat_template=template), "add 3", "off")


def test_what_a_template_refuses_is_named_with_its_line():
    """A template is a program. Whatever it raises, the message names the line of the prompt."""
    tokenizer = word_tokenizer(chat_template="{{ raise_exception('no system prompts') }}")
    row = {"prompt": "add", "id": "p.jsonl:3"}
    with pytest.raises(UserError, match="p.jsonl:3: .* refuses it: no system prompts"):
        encode_rows(pair_of(tokenizer), [row], max_prompt_tokens=9, new_tokens=1)


def test_encode_without_a_template_is_plain_text():
    """The ids are the tokenizer's own, with its BOS. Messages are joined by line breaks."""
    tokenizer = word_tokenizer()
    ids = tokenizer("add 3 7").input_ids
    assert encode(tokenizer, "add 3 7") == ids
    assert ids[0] == tokenizer.bos_token_id
    assert encode(tokenizer, [{"role": "system", "content": "add"}, user("3 7")]) == ids


def with_ends():
    """A tokenizer that appends two ends to every text."""
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS] [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", EOS)]
    )
    return tokenizer


def test_a_plain_prompt_ends_with_no_end_of_text():
    """trlx#287: some tokenizers append one, and the student would write on behind the end."""
    tokenizer = with_ends()
    add, three = WORDS.index("add"), WORDS.index("3")
    assert encode(tokenizer, "add 3") == [tokenizer.bos_token_id, add, three]


def test_an_end_that_a_chat_template_writes_stays():
    """DialoGPT's template ends the user's turn with one; what the tokenizer appends is left out."""
    tokenizer = with_ends()
    tokenizer.chat_template = "{{ messages[-1]['content'] }} [EOS]"
    assert encode(tokenizer, "add 3") == [WORDS.index("add"), WORDS.index("3"), EOS]


def test_long_prompts_are_dropped_and_counted_never_cut():
    """Those that fit keep their ids. If none is left, the message names the flag."""
    pair = pair_of(word_tokenizer())
    rows = [{"prompt": "add " * count} for count in (1, 2, 9)]
    with says("1 of 3 prompts dropped: empty, or longer than 4 tokens"):
        fit = encode_rows(pair, rows, max_prompt_tokens=4, new_tokens=1)
    assert [row["ids"] for row in fit] == [
        encode(pair.tokenizer, row["prompt"]) for row in rows[:2]
    ]
    with pytest.raises(UserError, match="no prompt has 1 to 1 tokens; raise --max-prompt-tokens"):
        encode_rows(pair, rows, max_prompt_tokens=1, new_tokens=1)


def test_a_text_that_outgrows_a_model_is_refused():
    """transformers#33129: beyond its original length LongRoPE rotates all positions differently."""
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 16,
    }
    phi = Phi3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters=rope,
    )
    pair = pair_of(word_tokenizer())
    assert positions(phi) == 16
    assert positions(pair.student.config) == 64
    pair.teacher.config.rope_parameters = rope
    both = (pair.student, pair.teacher)
    check_fits(pair, both, [4] * 6, 10, "p.jsonl:3")
    with pytest.raises(
        UserError, match="p.jsonl:3 and .* need 17 tokens, .* holds 16; lower --max"
    ):
        check_fits(pair, both, [4] * 6, 11, "p.jsonl:3")

    with pytest.raises(UserError, match="a token of p.jsonl:3 has no output row"):
        check_fits(pair, both, [len(WORDS)], 1, "p.jsonl:3")


def test_a_cold_start_that_is_not_asked_for_needs_no_room():
    """--preset paper sets the length of its answers, 12,288 tokens; these models hold 64."""
    pair = pair_of(word_tokenizer())
    rows = [{"prompt": "add 3"}]
    paper = Config(max_new_tokens=6, cold_start_max_new_tokens=12288)
    assert len(encode_for(paper, pair, rows)) == 1
    with pytest.raises(UserError, match="need 12291 tokens, .* holds 64"):
        encode_for(replace(paper, cold_start=1), pair, rows)


# --- conversations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chat_template, thinking", [(None, "default"), (SWITCHED, "default"), (SWITCHED, "on")]
)
def test_a_conversation_is_the_prompt_as_encoded_and_the_answer_with_its_end(
    tmp_path, chat_template, thinking
):
    """trl#6359: its prompt has the very ids of OPD. It has no BOS within and one end."""
    pair = pair_of(word_tokenizer(chat_template=chat_template))
    asked = [{"role": "system", "content": "the"}, user("add + so")]
    chats = [[*asked, said("so\u2028add the")], [*asked, said("7")]]
    path = lines(tmp_path / "c.jsonl", *({"messages": chat} for chat in chats))
    prompt = encode(pair.tokenizer, asked, thinking)
    so, add, the, seven = (WORDS.index(word) for word in ("so", "add", "the", "7"))
    assert load_conversations(path, pair, thinking) == [
        (prompt, [so, add, the, EOS]),
        (prompt, [seven, EOS]),
    ]


def letters(**options):
    """A tokenizer of single characters that puts a space before a text, as SentencePiece does."""
    special = ["<unk>", "</s>", "<|user|>", "<|assistant|>"]
    vocabulary = [*special, *"▁\nadso37+"]
    inner = Tokenizer(models.BPE({x: i for i, x in enumerate(vocabulary)}, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", **options
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:]})
    tokenizer.chat_template = "<|user|>{{ messages[-1]['content'] }}<|assistant|>\n"
    return tokenizer


def test_an_answer_is_encoded_within_its_conversation(tmp_path):
    """NeMo-RL#2844: encoded alone, an answer may begin with a space that nobody wrote."""
    tokenizer = letters()
    pair = pair_of(tokenizer)
    path = lines(tmp_path / "c.jsonl", {"messages": [user("add 3"), said("so 7")]})
    [(prompt, response)] = load_conversations(path, pair)
    assert prompt == encode(tokenizer, "add 3")
    assert tokenizer.convert_ids_to_tokens(response) == ["s", "o", "▁", "7", "</s>"]
    alone = tokenizer("so 7", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(alone)[0] == "▁"


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_mark_of_thinking_that_the_prompt_ends_with_is_not_learnt_twice(tmp_path, end):
    """The template of R1-Distill writes the first <think> itself."""
    tokenizer = letters()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    tokenizer.chat_template += "<think>" + end.replace("\n", r"{{ '\n' }}")
    path = lines(tmp_path / "c.jsonl", {"messages": [user("add 3"), said(f"<think>{end}so 7")]})
    [(prompt, response)] = load_conversations(path, pair_of(tokenizer))
    assert prompt == encode(tokenizer, "add 3")
    whole = tokenizer.decode(prompt + response)
    assert whole.count("<think>") == 1 and whole.endswith(f"<think>{end}so 7</s>")


def test_conversations_of_unknown_words_are_refused(tmp_path):
    """As prompts of such words are."""
    path = lines(tmp_path / "c.jsonl", {"messages": [user("who knows"), said("nobody at all")]})
    with pytest.raises(UserError, match=r"of the conversations in .*c.jsonl are \[UNK\]"):
        load_conversations(path, pair_of(word_tokenizer()))


def test_a_reason_of_the_users_own_leaves_no_conversation_out(tmp_path):
    """Only the two words that a cold start writes do."""
    row = {"messages": [user("add 3"), said("so 7")]}
    rows = [{**row, "why": why} for why in ("carries", "kept", "unfinished", "degenerate")]
    assert len(load_conversations(lines(tmp_path / "c.jsonl", *rows), pair_of(letters()))) == 2


@pytest.mark.parametrize("prompt", ["add", "add xyz", "so 3 +"])
def test_an_answer_whose_first_token_would_span_the_border_is_encoded_alone(tmp_path, prompt):
    """So no part of the answer is lost if it runs together with the prompt."""
    pair = pair_of(word_tokenizer())
    path = lines(tmp_path / "c.jsonl", {"messages": [user(prompt), said("so 7 0")]})
    [(ids, response)] = load_conversations(path, pair)
    assert ids == encode(pair.tokenizer, prompt)
    assert response == [*(WORDS.index(word) for word in ("so", "7", "0")), EOS]


def test_ids_that_a_cold_start_has_written_are_used_as_they_are(tmp_path):
    """nanochat#693: tokens may get lost through text. Ids of another tokenizer are refused."""
    pair = pair_of(letters())
    a, d, s, o = pair.tokenizer.convert_tokens_to_ids(["a", "d", "s", "o"])
    row = {
        "messages": [user("add"), said("so")],
        "prompt_ids": [a, d],
        "response_ids": [s, o, 1],
        "why": "kept",
    }
    path = lines(tmp_path / "c.jsonl", row)
    assert load_conversations(path, pair) == [([a, d], [s, o, 1])]
    lines(tmp_path / "c.jsonl", row, {**row, "response_ids": [a, o, 1]})
    with pytest.raises(UserError, match='c.jsonl:2: its "response_ids" are of another tokenizer'):
        load_conversations(path, pair)


def test_an_answer_needs_a_token_before_it(tmp_path):
    """Without a BOS an empty prompt has none: padding would predict the answer's first token."""
    path = lines(tmp_path / "c.jsonl", {"messages": [user(""), said("so")]})
    no_bos = letters()
    no_bos.chat_template = None
    with pytest.raises(UserError, match="c.jsonl:1: there is no token before the answer"):
        load_conversations(path, pair_of(no_bos))
    assert load_conversations(path, pair_of(word_tokenizer()))  # it writes a BOS


def test_an_answer_ends_with_the_end_that_stands_for_all(tmp_path):
    """rollout.merge_ends: every other end has probability 0, and the loss would be infinite."""
    other = WORDS.index("7")
    pair = replace(pair_of(word_tokenizer()), eos_ids=[EOS, other])
    add, so = WORDS.index("add"), WORDS.index("so")
    row = {
        "messages": [user("add"), said("so")],
        "prompt_ids": [add],
        "response_ids": [so, other],
        "why": "kept",
    }
    path = lines(tmp_path / "c.jsonl", row)
    assert load_conversations(path, pair) == [([add], [so, EOS])]
    apart = replace(pair, merge_ends=False)
    assert load_conversations(path, apart) == [([add], [so, other])]

    path = lines(tmp_path / "c.jsonl", {"messages": [user("add"), said("so 7 so")]})
    assert load_conversations(path, apart) == [
        (encode(pair.tokenizer, "add"), [so, other, so, EOS])
    ]
    with pytest.raises(UserError, match="c.jsonl:1: an end token stands within its answer"):
        load_conversations(path, pair)


def test_conversations_that_are_not_in_the_template_are_counted(tmp_path):
    """5.1 and 5.2 together: they are learnt as they are, and that is said."""
    bare = {"messages": [user("add 3"), said("3")]}
    inside = {"messages": [user("Q: add 7"), said("7")]}
    path = lines(tmp_path / "c.jsonl", bare, inside)
    with says(
        "--cold-start-file: 1 of 2 prompts are not in --template; they are learnt as they are"
    ):
        conversation_keys(Config(cold_start_file=str(path), template="Q: {question}"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conversation_keys(Config(cold_start_file=str(path)))


def test_a_diagnosis_asks_each_question_once(tmp_path):
    """Else its standard errors would be those of more prompts than there are."""
    path = lines(tmp_path / "p.jsonl", *({"prompt": x} for x in ("a", "b", "a", "a")))
    with says("--prompts: 2 of 4 prompts repeat another one and are left out"):
        rows = some_questions(Diagnosis(prompts=str(path)))
    assert sorted(row["prompt"] for row in rows) == ["a", "b"]


def test_a_conversation_that_a_model_cannot_hold_is_refused(tmp_path):
    """trl#6359: if it is longer than the model's positions, it is named and never cut."""
    path = lines(tmp_path / "c.jsonl", {"messages": [user("add"), said("so " * 70)]})
    with pytest.raises(UserError, match="c.jsonl:1 .* 73 tokens.* holds 64"):
        load_conversations(path, pair_of(word_tokenizer()))
