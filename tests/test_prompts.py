"""Laws of plumbing/prompts.py: what the student is asked, from a file to token ids, and in which order."""

import itertools
import json

import pytest
from conftest import TEMPLATE, word_tokenizer

from plumbing.processes import batch
from plumbing.prompts import additions, encode, load_prompts


def test_load_prompts_reads_text_and_chat(tmp_path):
    """Text or messages, an answer or none, blank lines skipped; the id is file and line."""
    chat = [{"role": "user", "content": "3 + 7 ="}]
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "add é", "answer": "0"}\n\n' + json.dumps({"prompt": chat}) + "\n",
        encoding="utf-8",
    )
    assert load_prompts(path) == [
        {"prompt": "add é", "answer": "0", "id": "prompts.jsonl:1"},
        {"prompt": chat, "answer": None, "id": "prompts.jsonl:3"},
    ]


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "cut',
        '{"question": "3 + 7"}',
        '["add"]',
        '{"prompt": "  "}',
        '{"prompt": []}',
        '{"prompt": [{"role": "user"}]}',
        '{"prompt": 7}',
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    """File and line number stand in the message."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "add"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2 "):
        load_prompts(path)


def test_a_file_without_prompts_is_refused(tmp_path):
    """An empty file is an error now rather than an empty batch later."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="no prompts"):
        load_prompts(path)


@pytest.mark.parametrize(
    "options, switch",
    [
        ({}, {}),
        ({"thinking": "on"}, {"enable_thinking": True}),
        ({"thinking": "off"}, {"enable_thinking": False}),
    ],
)
def test_encode_writes_the_template_once(options, switch):
    """Text and one user message are the same prompt, the template's BOS the only one,
    its options honoured (OPSD#10)."""
    tokenizer = word_tokenizer(chat_template=TEMPLATE.replace("if think", "if enable_thinking"))
    chat = [{"role": "user", "content": "add 3 7"}]
    ids = encode(tokenizer, "add 3 7", **options)
    assert ids == encode(tokenizer, chat, **options)
    assert ids == tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=False, **switch
    )
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids).endswith("so" if options == {"thinking": "on"} else ":")


def test_encode_without_a_template_is_plain_text():
    """The tokenizer's own ids, its BOS included; messages are joined by lines."""
    tokenizer = word_tokenizer()
    ids = tokenizer("add 3 7").input_ids
    assert encode(tokenizer, "add 3 7") == ids and ids[0] == tokenizer.bos_token_id
    assert (
        encode(
            tokenizer, [{"role": "system", "content": "add"}, {"role": "user", "content": "3 7"}]
        )
        == ids
    )


def test_additions_are_all_pairs_of_two_digits():
    """8,100 questions and no more, each once, with their sums; a seed fixes the order."""
    asked = additions(90 * 90)
    pairs = {
        tuple(int(word.rstrip("?")) for word in row["prompt"].split() if word[0].isdigit())
        for row in asked
    }
    assert pairs == set(itertools.product(range(10, 100), repeat=2)) and len(asked) == 8100
    for row in asked[:50]:
        a, b = (int(word.rstrip("?")) for word in row["prompt"].split() if word[0].isdigit())
        assert row["answer"] == str(a + b)
    assert additions(5) == additions(5, 0) == asked[:5] != additions(5, 1)


def test_every_epoch_of_every_seed_is_another_shuffle():
    """Neither the next epoch nor the next seed repeats an order, nor does the next epoch of one that of the other."""
    orders = [tuple(batch(40, epoch, 40, seed)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25 and all(sorted(order) == list(range(40)) for order in orders)
