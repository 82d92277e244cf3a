"""Laws of recipes.py, and of opd.py's use of it (paper 5): templates, mixtures, repetition, the
teacher's answers, the off-policy cold start."""

import copy
import dataclasses
import itertools
import json
import math

import pytest
import torch
from conftest import WORDS, config, rows, tiny, tiny_pair, weights, write_lines
from hypothesis import given
from hypothesis import strategies as st

import opd
import recipes
from plumbing import files
from plumbing.exits import RunEnded
from plumbing.prompts import load_conversations
from plumbing.slots import rollout as faster_rollout
from recipes import (
    TEMPLATES,
    apply_template,
    cold_start,
    distinct,
    in_template,
    is_degenerate,
    is_in_template,
    mix_prompts,
    question_key,
    teacher_rollouts,
)
from rollout import batch, from_texts, rollout
from teacher import UserError

EOS = 2
LENGTH = 12


def lines(path):
    """The JSON values of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- 5.2 templates ------------------------------------------------------------------------------


def test_a_template_goes_around_text_and_around_the_last_message_of_a_chat():
    """5.2: the question stands in its place. The rest of a row, and the given rows, stay as they
    are."""
    system = {"role": "system", "content": "s {question}"}
    user = {"role": "user", "content": "2 + 3?"}
    given = [{"prompt": "2 + 3?", "answer": "5"}, {"prompt": [system, user], "more": [1]}]
    before = copy.deepcopy(given)
    text, chat = in_template(given, "Q {question} A")
    assert text == {"prompt": "Q 2 + 3? A", "answer": "5"}
    assert chat == {"prompt": [system, {**user, "content": "Q 2 + 3? A"}], "more": [1]}
    assert given == before and in_template(given, "none") == before


templates = st.sampled_from([*TEMPLATES, "so {question}", "{question}!", "so {question} so"])


@given(st.text(max_size=9), templates)
def test_a_question_is_put_into_a_template_once(question, template):
    """In Online-DPO-R1#10 prompts that are in the template already have its instruction twice."""
    put = apply_template(question, template)
    assert apply_template(put, template) == put
    assert in_template(in_template([{"prompt": question}], template), template)[0]["prompt"] == put
    assert is_in_template(put, template) == (template != "none")
    assert question in put
    if template not in ("none", "so {question}"):  # here a space at the end is the question's
        assert is_in_template(put + " \r\n", template)


OWN = "so {question} so"
BOXED = " Please reason step by step, and put your final answer within \\boxed{}."


@pytest.mark.parametrize(
    "question, template",
    [("so x", OWN), ("x so", OWN), ("so so", OWN), ("1 so x so", OWN), (f"x{BOXED} Go.", "boxed")],
)
def test_a_part_of_a_template_is_not_the_template(question, template):
    """Text that only begins or ends like the template, or has it within, still needs it."""
    assert not is_in_template(question, template)
    form = TEMPLATES.get(template, template)
    assert apply_template(question, template) == form.replace("{question}", question)


def test_the_templates_are_those_of_the_paper():
    """DAPO's, and that of JustRL."""
    assert apply_template("1 + 1?", "answer") == (
        "Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        '\n\n1 + 1?\n\nRemember to put your answer on its own line after "Answer:".'
    )
    assert apply_template("1 + 1?", "boxed") == (
        "1 + 1? Please reason step by step, and put your final answer within \\boxed{}."
    )


def test_a_template_that_is_none_is_refused():
    """A template is a name that we know, or a text with {question} in it."""
    with pytest.raises(UserError, match="no template 'latex': take one of none, answer, boxed, or"):
        apply_template("2 + 3?", "latex")


# --- 5.2 questions and mixtures -----------------------------------------------------------------

CHATS = [
    [{"role": "system", "content": f"level {i}"}, {"role": "user", "content": "x"}] for i in "ab"
]


@pytest.mark.parametrize(
    "a, b",
    [
        ("5²", "52"),
        ("1 23", "12 3"),
        ("What is n?", "What is N?"),
        ("x", "x "),
        (CHATS[0], CHATS[1]),
        (CHATS[0], CHATS[0][1:]),
        ("x", [{"role": "assistant", "content": "x"}]),
    ],
)
def test_what_tells_two_questions_apart_is_in_the_key(a, b):
    """SophiaVL-R1#11: system prompts tell chats apart, and 5² is not 52."""
    assert question_key(a) != question_key(b)
    assert distinct([{"prompt": a}, {"prompt": b}, {"prompt": a, "more": 1}]) == [
        {"prompt": a},
        {"prompt": b},
    ]


def test_the_same_text_is_the_same_question():
    """A text is a chat of one user message, and the order of a message's fields does not count."""
    assert question_key("x") == question_key([{"role": "user", "content": "x"}])
    assert question_key("x") == question_key([{"content": "x", "role": "user"}])
    known = {question_key("x")}
    assert distinct([{"prompt": "x"}, {"prompt": "y"}], known) == [{"prompt": "y"}]


def some(name, count):
    return [{"prompt": f"{name} {i}", "answer": None} for i in range(count)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


shares = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
sizes = st.integers(0, 12)


@given(sizes, sizes, shares, st.integers(0, 99))
def test_a_mixture_is_the_largest_with_exactly_its_share_of_aligned_prompts(
    aligned, others, fraction, seed
):
    """5.2: round(fraction * size) are aligned, no prompt is there twice, and no larger size would
    do. The same generator gives the same mixture."""
    given = (some("a", aligned), some("o", others))
    possible = []
    for size in range(1, aligned + others + 1):
        count = round(fraction * size)
        if count <= aligned and size - count <= others:
            possible.append(size)
    size = max(possible, default=0)
    count = round(fraction * size)
    if (fraction > 0 and count == 0) or (fraction < 1 and count == size):  # it would lack one
        with pytest.raises(UserError, match=f"{aligned} aligned and {others} other"):
            mix_prompts(*given, fraction, seeded())
        return
    mixed = mix_prompts(*given, fraction, seeded(seed))
    assert mixed == mix_prompts(*given, fraction, seeded(seed))
    assert len(mixed) == size
    assert len(distinct(mixed)) == len(mixed)
    assert all(row in given[0] + given[1] for row in mixed)
    assert sum(row in given[0] for row in mixed) == count
    assert given == (some("a", aligned), some("o", others))


@pytest.mark.parametrize("fraction, name", [(0.0, "o"), (1.0, "a")])
def test_the_ends_of_the_mixture_are_the_lists_themselves_shuffled(fraction, name):
    """5.2: at 0 it has every other prompt, at 1 every aligned one."""
    mixed = mix_prompts(some("a", 20), some("o", 20), fraction, seeded())
    assert mixed != some(name, 20)
    assert sorted(mixed, key=str) == sorted(some(name, 20), key=str)


def test_both_kinds_are_drawn_at_random_and_shuffled_together():
    """Neither kind stands first, and which prompts of the larger list are taken is up to chance."""
    mixed = mix_prompts(some("a", 20), some("o", 200), 0.5, seeded())
    assert 2 < sum(row["prompt"].startswith("a") for row in mixed[:20]) < 18
    taken = [row for row in mixed if row["prompt"].startswith("o")]
    assert any(row not in some("o", 40) for row in taken)
    assert mixed != mix_prompts(some("a", 20), some("o", 200), 0.5, seeded(1))


def test_a_prompt_on_both_sides_of_a_mixture_is_aligned_and_counts_once():
    """5.2: the paper deduplicates the other prompts against the aligned ones."""
    aligned = [{"prompt": x, "from": "aligned"} for x in "aab"]
    others = [{"prompt": x, "from": "others"} for x in "bxxy"]
    mixed = mix_prompts(aligned, others, 0.5, seeded())
    assert sorted((row["prompt"], row["from"]) for row in mixed) == [
        ("a", "aligned"),
        ("b", "aligned"),
        ("x", "others"),
        ("y", "others"),
    ]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_a_share_outside_0_to_1_is_refused(fraction):
    """The message names it."""
    with pytest.raises(UserError, match=f"{fraction} is outside 0..1"):
        mix_prompts(some("a", 1), some("o", 1), fraction, seeded())


@pytest.mark.parametrize("aligned, others, fraction", [(42, 8, 0.05), (5, 3, 0.1), (3, 100, 0.9)])
def test_a_mixture_without_one_of_the_two_is_refused(aligned, others, fraction):
    """So few of one kind would be rounded to none at all."""
    with pytest.raises(UserError, match="cannot be mixed at a fraction"):
        mix_prompts(some("a", aligned), some("o", others), fraction, seeded())


# --- 5.1 repetition -----------------------------------------------------------------------------


def loops(ids):
    """Does it end in a block of up to 32 items, four times or more, over 16 items or more?"""
    for period in range(1, 33):
        span = max(4 * period, 16)
        block = ids[len(ids) - span :][:period]
        if len(ids) >= span and ids[-span:] == (block * span)[:span]:
            return True
    return False


def says_it_again(ids):
    """Of 64 items or more, have over half of its runs of 8 items occurred before?"""
    runs = []
    again = 0
    for i in range(len(ids) - 7):
        again += ids[i : i + 8] in runs
        runs.append(ids[i : i + 8])
    return len(ids) >= 64 and again > len(runs) / 2


@st.composite
def repetitive(draw):
    """Draw some items, then a block several times, then a part of the block."""
    items = st.lists(st.integers(0, 5), max_size=40)
    block = draw(st.lists(st.integers(0, 9), min_size=1, max_size=40))
    times = draw(st.integers(0, 6))
    return draw(items) + block * times + block[: draw(st.integers(0, 3))]


@given(repetitive())
def test_degenerate_is_its_slow_definition(ids):
    """The paper drops "degenerately repetitive" responses without a rule; this one is ours."""
    assert is_degenerate(ids) == (loops(ids) or says_it_again(ids))


block = list(range(100, 140))
PREFIX = list(range(60))


@pytest.mark.parametrize(
    "ids, expected",
    [
        ([], False),
        ([7] * 15, False),
        ([7] * 16, True),
        ([7] * 16 + [8], False),  # it went on
        (PREFIX + [7] * 16, True),
        (block[:5] * 3 + block[:4], False),  # 3.8 times
        (block[:5] * 4, True),
        (block[:32] * 3 + block[:31], True),  # no loop, but over half was there before
        (list(range(200)) + block[:32] * 3 + block[:31], False),
        (list(range(200)) + block[:32] * 4, True),
        (list(range(400)) + block[:33] * 4, False),  # a block of 33 items is too long
        ([*range(21)] * 3, False),  # 63 items are too few to say it again
        ([*range(21)] * 3 + [0, 30], True),
        ([*range(40)] * 2 + [*range(7)], False),  # 40 of 80 runs
        ([*range(40)] * 2 + [*range(8)], True),
    ],
)
def test_degenerate_at_its_borders(ids, expected):
    """The borders: 4 times, 16 items, blocks of 32; and 64 items, over half of them said before."""
    assert is_degenerate(ids) == expected


THOUGHT = """We need the number of ways to write 12 as a sum of three primes. Let me check the
smallest prime first. If the smallest is 2, the other two sum to 10: 3 + 7 and 5 + 5. Let me check
the next one. If the smallest is 3, the other two sum to 9: 2 + 7, but 2 is smaller than 3. Let me
check the next one. If the smallest is 5, the other two sum to 7: 2 + 5, but 2 is smaller than 5.
Wait, let me check that again. Therefore there are 2 ways. Answer: 2"""


@pytest.mark.parametrize(
    "text, expected",
    [
        (THOUGHT, False),
        (THOUGHT + "\n" + THOUGHT.split("Wait")[0], False),  # once more, to check
        (THOUGHT + " Wait, let me check that again." * 5, True),
        (" ".join(map(str, range(300))), False),
        ("\n".join(f"| {i} | {i * i} |" for i in range(60)), False),
    ],
)
def test_a_long_thought_is_no_loop_unless_it_ends_in_one(text, expected):
    """Phrases that come back, tables and lists of numbers are not degenerate."""
    assert is_degenerate(text.split()) == expected


# --- 5.1 the teacher's answers ------------------------------------------------------------------

TEXTS = "add,the digits,3 7,so,= 0,add 3 7 = 0,+,the,digits so,0 0 7".split(",")


def asked(tokenizer, texts=TEXTS):
    return [{"prompt": text, "ids": tokenizer(text).input_ids} for text in texts]


def canned(pair, said):
    """A rollout that says these token ids, one response a prompt."""
    left = list(said)

    def write(model, prompts, **_):
        assert model is pair.teacher
        responses = [left.pop(0) for _ in prompts]
        r = from_texts(prompts, responses)
        r.truncated = torch.tensor([response[-1] != EOS for response in responses])
        return r

    return write


SPOKEN = [
    [{"role": "system", "content": "the"}, {"role": "user", "content": "so"}],
    "add\u2028so",
    "so",
    "+",
    "3",
]
SAID = [[7, 11, EOS], [9] * LENGTH, [7, 8] * 10 + [EOS], [8, 14, EOS], [EOS]]


def test_finished_responses_are_kept_and_the_others_named():
    """5.1: an answer is a conversation with its ids and why it is kept or not. An answer that only
    ends is not kept."""
    pair = tiny_pair()
    given = [{"prompt": prompt, "ids": [1, 4 + i]} for i, prompt in enumerate(SPOKEN)]
    write = canned(pair, SAID)
    [found] = teacher_rollouts(pair, given, max_new_tokens=LENGTH, rollout=write)
    whys = ["kept", "unfinished", "degenerate", "kept", "degenerate"]
    assert [answer["why"] for answer in found] == whys
    assert [answer["response_ids"] for answer in found] == SAID
    assert [answer["prompt_ids"] for answer in found] == [row["ids"] for row in given]
    texts = ["add 7", " ".join(["digits"] * LENGTH), " ".join(["add the"] * 10), "the so", ""]
    for answer, prompt, text in zip(found, SPOKEN, texts):
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        assert answer["messages"] == [*chat, {"role": "assistant", "content": text}]


class Lossy:
    """A tokenizer whose texts do not tell all of its tokens apart, as bytes that are no UTF-8."""

    eos_token_id = EOS
    unk_token_id = None

    def decode(self, ids):
        return "".join("xyz\ufffd"[i % 4] for i in ids)


def test_what_the_teacher_wrote_is_trained_on_as_written(tmp_path):
    """NeMo-RL#2844, nanochat#693: on the way through text an answer may get a token that the
    teacher did not write. OPSD#3: marks of thinking stay in it."""
    pair = dataclasses.replace(tiny_pair(), tokenizer=Lossy())
    write = canned(pair, [[7, 11, EOS], [15, 3, 10, EOS]])
    given = [{"prompt": "a", "ids": [1, 9]}, {"prompt": "b", "ids": [1, 5]}]
    answers = teacher_rollouts(pair, given, max_new_tokens=LENGTH, rollout=write)
    path = tmp_path / "cold_start.jsonl"
    assert files.append_answers(path, lambda start: answers)["kept"] == 2
    examples = load_conversations(path, pair)
    assert examples == [([1, 9], [7, 11, EOS]), ([1, 5], [15, 3, 10, EOS])]


def test_it_is_the_teacher_who_writes():
    """5.1 is off-policy: the answers are the teacher's, and not the student's."""
    pair = tiny_pair()
    given = asked(pair.tokenizer)
    [found] = teacher_rollouts(pair, given, max_new_tokens=LENGTH, temperature=0.0)
    for model, agree in ((pair.teacher, True), (pair.student, False)):
        ids = [row["ids"] for row in given]
        r = rollout(model, ids, max_new_tokens=LENGTH, temperature=0.0, **pair.sampling)
        written = [r.response_ids(row) for row in range(len(given))]
        assert ([answer["response_ids"] for answer in found] == written) == agree


def test_the_teachers_sampling_is_what_was_asked_for():
    """5.1: it is T .7 and top-p .95 by default, and each prompt has a seed of its own."""
    pair = tiny_pair()
    calls = []

    def note(model, prompts, **how):
        calls.append((len(prompts), how))
        return rollout(model, prompts, **how)

    given = asked(pair.tokenizer)
    list(teacher_rollouts(pair, given, max_new_tokens=5, at_once=4, rollout=note))
    other = {"temperature": 1.0, "top_p": 0.5, "seed": 1}
    list(teacher_rollouts(pair, given, max_new_tokens=5, at_once=4, rollout=note, **other))
    assert [size for size, _ in calls] == [4, 4, 2] * 2
    seeds = [seed for _, how in calls for seed in how.pop("seeds")]
    assert len(set(seeds)) == 20
    paper = {"max_new_tokens": 5, "temperature": 0.7, "top_p": 0.95, **pair.sampling}
    assert [how for _, how in calls[:3]] == [paper] * 3
    assert [how for _, how in calls[3:]] == [{**paper, "temperature": 1.0, "top_p": 0.5}] * 3


@pytest.fixture(scope="module")
def exactly():
    """A pair in float64, and its teacher's answers to all prompts at once."""
    pair = tiny_pair()
    pair.teacher.double()
    pair.eos_ids = [EOS, 9]
    [answers] = teacher_rollouts(pair, asked(pair.tokenizer), max_new_tokens=LENGTH, seed=3)
    assert {answer["why"] for answer in answers} == {"kept", "unfinished", "degenerate"}
    return pair, answers


@given(st.integers(0, 10), st.integers(1, 12), st.integers(1, 4), st.booleans())
def test_what_is_drawn_for_a_row_follows_from_the_seed_and_its_place(
    exactly, start, at_once, world, fast
):
    """The start, the number at once, the processes and the rollout do not matter. Each process
    yields equally often, and joined as by plumbing.processes.gathered the answers are in order."""
    pair, expected = exactly
    how = {"rollout": faster_rollout} if fast else {}
    parts = []
    for rank in range(world):
        found = teacher_rollouts(
            pair,
            asked(pair.tokenizer),
            max_new_tokens=LENGTH,
            seed=3,
            start=start,
            at_once=at_once,
            share=(rank, world),
            **how,
        )
        parts.append(list(found))
    assert len({len(part) for part in parts}) == 1
    found = []
    for lists in zip(*parts):
        for answers in itertools.zip_longest(*lists):
            found += [answer for answer in answers if answer is not None]
    assert found == expected[start:]


def test_more_prompts_are_answered_behind_those_that_are_there(exactly, tmp_path):
    """A file that is there is continued. Nothing is asked twice, and the lines are those of one
    call."""
    pair, expected = exactly
    path = tmp_path / "cold_start.jsonl"
    for count in (3, 3, 10):
        given = asked(pair.tokenizer)[:count]

        def answers_from(start, given=given):
            return teacher_rollouts(
                pair, given, max_new_tokens=LENGTH, seed=3, start=start, at_once=2
            )

        counts = files.append_answers(path, answers_from)
        assert sum(counts.values()) == count
    assert lines(path) == expected


@pytest.mark.parametrize("start", [9, 10, 64])
def test_a_file_that_is_complete_is_asked_for_nothing(start):
    """A run that goes on after its cold start does not write the last answers again."""
    pair = tiny_pair()
    given = asked(pair.tokenizer)[:9]
    assert list(teacher_rollouts(pair, given, max_new_tokens=5, start=start, rollout=None)) == []


# --- 5.1 the fine-tuning ------------------------------------------------------------------------

EXAMPLES = [
    ([1, 7, 8], [9, EOS]),
    ([1], [8, 8, 9, 10, EOS]),
    ([1, 4, 5, 6, 7, 7, 7], [11, EOS]),
    ([1, 9], [EOS]),
    ([1, 12, 4], [5, 6, 14, EOS]),
    ([1, 10, 10, 10], [13, 7, EOS]),
    ([1, 14], [7, 8, 9, 10, 11, 12, 13, EOS]),
]
TOKENS = sum(len(response) for _, response in EXAMPLES)


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it is given and moves nothing."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=1.0)
        self.seen = []

    def step(self):
        self.seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])


def one_update(pair, **how):
    """One update on all EXAMPLES: -> the row of metrics, the gradients."""
    recorder = Recorder(pair.student)
    [row] = cold_start(pair, recorder, EXAMPLES, steps=1, batch_size=len(EXAMPLES), **how)
    return row, recorder.seen[0]


def cross_entropy(model):
    """-log p of each response token of EXAMPLES, from all logits, without padding: (TOKENS,)."""
    losses = []
    for prompt, response in EXAMPLES:
        ids = torch.tensor([prompt + response])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1, : len(WORDS)]
        log_p = logits.log_softmax(-1)
        losses.append(-log_p[torch.arange(len(response)), response])
    return torch.cat(losses)


def close(gradients, expected):
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-6)


def test_the_cold_start_descends_the_mean_over_response_tokens_alone(architecture):
    """trl#6006: it is the cross-entropy of the response tokens over the shared vocabulary, and its
    one denominator is the tokens of the step. The gradient is clipped at 1."""
    pair = tiny_pair(architecture)
    row, gradients = one_update(pair)
    loss = cross_entropy(pair.student).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(pair.student.parameters(), 1.0)
    assert row["step"] == 1 and row["tokens"] == TOKENS
    assert float(row["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 1
    close(gradients, [p.grad for p in pair.student.parameters()])


def test_ends_count_as_one_token_in_the_cold_start_too():
    """The loss of an end is -log of the probability of any end, as in OPD."""
    pair = dataclasses.replace(tiny_pair(), eos_ids=[EOS, 3])  # no example holds token 3
    row, _ = one_update(pair)
    log_odds = []  # what the other end adds to each end of an example
    for prompt, response in EXAMPLES:
        ids = torch.tensor([prompt + response])
        p = pair.student(input_ids=ids).logits[0, -2, : len(WORDS)].softmax(-1)
        log_odds.append(((p[EOS] + p[3]) / p[EOS]).log())
    expected = cross_entropy(pair.student).mean() - sum(log_odds) / TOKENS
    assert float(row["loss"]) == pytest.approx(expected.item(), rel=1e-5)


def test_the_cold_start_asks_nothing_of_the_teacher():
    """The teacher is not called at all."""
    pair = tiny_pair()
    pair.teacher.base_model.register_forward_pre_hook(
        lambda *_: pytest.fail("the teacher was read")
    )
    one_update(pair)


@pytest.mark.parametrize("pad_id", [3, EOS])  # pad = eos, as in SmolLM2
def test_the_fine_tuning_sees_no_pads(architecture, pad_id):
    """trl#2058: with another pad id the update is the same, bit for bit."""
    row, gradients = one_update(tiny_pair(architecture))
    pair = dataclasses.replace(tiny_pair(architecture), pad_id=pad_id)
    assert one_update(pair)[0] == row
    assert all(map(torch.equal, one_update(pair)[1], gradients))


@pytest.mark.parametrize("budget", [1, 25, 60])
def test_the_fine_tuning_sees_no_micro_batches(architecture, budget):
    """trl#4719: the update is the same for any budget."""
    row, gradients = one_update(tiny_pair(architecture))
    pair = tiny_pair(architecture, micro_batch_tokens=budget)
    other, of_other = one_update(pair)
    assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
    assert float(other["loss"]) == pytest.approx(float(row["loss"]), rel=1e-4)
    close(of_other, gradients)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_shares_of_the_processes_add_up_to_the_whole(world):
    """Loss and gradient are parts of one mean over all tokens, however long each share is."""
    pair = tiny_pair()
    row, gradients = one_update(pair, descend=unclipped)
    losses = []
    parts = []
    for rank in range(world):
        of_rank, of_part = one_update(pair, share=(rank, world), descend=unclipped)
        assert of_rank["tokens"] == row["tokens"]
        losses.append(float(of_rank["loss"]))
        parts.append(of_part)
    assert sum(losses) == pytest.approx(float(row["loss"]), rel=1e-5)
    close([sum(of_parameter) for of_parameter in zip(*parts)], gradients)


def unclipped(optimizer, student):
    """Takes the place of recipes.descend."""
    optimizer.step()
    optimizer.zero_grad()
    return 0.0


def test_every_update_begins_without_the_gradient_of_the_last():
    """If weights do not move, the second gradient is that of a run that begins with it."""
    pair = tiny_pair()
    both = Recorder(pair.student)
    second = Recorder(pair.student)
    for recorder, start in ((both, 0), (second, 1)):
        list(cold_start(pair, recorder, EXAMPLES, steps=2, batch_size=3, start=start))
    assert all(map(torch.equal, both.seen[1], second.seen[0]))
    assert not all(map(torch.equal, both.seen[1], both.seen[0]))


@pytest.mark.parametrize(
    "steps, warmup", [(1, 0.05), (2, 0.05), (3, 0.5), (20, 0.05), (21, 0.3), (4, 1.0)]
)
def test_the_learning_rate_rises_and_falls_as_a_cosine(steps, warmup):
    """5.1: it rises to lr in ceil(warmup * steps) equal steps, then falls as half a cosine. No step
    has a rate of 0."""
    pair = tiny_pair()
    recorder = Recorder(pair.student)
    found = []
    for row in cold_start(
        pair, recorder, EXAMPLES, steps=steps, lr=0.5, warmup=warmup, batch_size=1
    ):
        found.append(row["lr"])
        assert recorder.param_groups[0]["lr"] == row["lr"]
    warm = max(1, math.ceil(warmup * steps))
    rise = [0.5 * (i + 1) / warm for i in range(warm)]
    angles = [math.pi * i / (steps - warm) for i in range(steps - warm)]
    fall = [0.25 + 0.25 * math.cos(angle) for angle in angles]
    assert found == pytest.approx(rise + fall)
    assert min(found) > 0 and max(found) == 0.5


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_k_steps_and_the_rest_are_the_whole_bit_for_bit(cut):
    """verl#5725: from `start`, with the optimizer of a run that was cut, it ends as a run that was
    not. The batches are those of rollout.batch."""
    settings = {"steps": 4, "lr": 1e-2, "warmup": 0.5, "batch_size": 3, "seed": 1}

    def trained(*stops):
        pair = tiny_pair()
        optimizer = torch.optim.AdamW(pair.student.parameters())
        found = []
        for stop in stops:
            updates = cold_start(pair, optimizer, EXAMPLES, start=len(found), **settings)
            found += itertools.islice(updates, stop - len(found))
        return found, pair.student.state_dict()

    whole, expected = trained(4)
    found, weights = trained(cut, 4)
    assert found == whole and [row["step"] for row in whole] == [1, 2, 3, 4]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for step, row in enumerate(whole):
        chosen = batch(len(EXAMPLES), step, 3, 1)
        assert row["tokens"] == sum(len(EXAMPLES[i][1]) for i in chosen)


def test_the_student_learns_what_it_is_shown():
    """The loss on a few conversations falls below a tenth, and the greedy answers become theirs."""
    pair = tiny_pair()
    optimizer = torch.optim.AdamW(pair.student.parameters())
    found = list(cold_start(pair, optimizer, EXAMPLES, steps=60, lr=1e-2, batch_size=7))
    assert found[-1]["loss"] < 0.1 * found[0]["loss"]
    ids = [prompt for prompt, _ in EXAMPLES]
    r = rollout(pair.student, ids, max_new_tokens=LENGTH, temperature=0.0, **pair.sampling)
    assert [r.response_ids(row) for row in range(7)] == [response for _, response in EXAMPLES]


def test_a_gradient_that_is_not_finite_is_no_update(monkeypatch):
    """Such a step is logged and changes nothing. The next one is an update again, without the bad
    gradient."""
    norms = iter([1.0, math.nan, math.inf, 1.0, math.nan, 1.0])
    plainly = recipes.clip_grad_norm_
    monkeypatch.setattr(
        recipes, "clip_grad_norm_", lambda *how, **more: plainly(*how, **more) * 0 + next(norms)
    )
    pair = tiny_pair()
    recorder = Recorder(pair.student)
    found = list(cold_start(pair, recorder, EXAMPLES, steps=6, batch_size=2))
    assert ["skipped" in row for row in found] == [False, True, True, False, True, False]
    assert found[1]["skipped"] == "gradient norm nan"
    assert len(recorder.seen) == 3
    alone = Recorder(pair.student)
    monkeypatch.setattr(recipes, "clip_grad_norm_", plainly)
    next(cold_start(pair, alone, EXAMPLES, steps=6, batch_size=2, start=3))
    assert all(map(torch.equal, alone.seen[0], recorder.seen[1]))


def test_weights_that_are_not_finite_give_no_update():
    """A loss of NaN has a gradient of NaN."""
    pair = tiny_pair()
    with torch.no_grad():
        pair.student.get_output_embeddings().weight[3] = math.nan
    recorder = Recorder(pair.student)
    found = list(cold_start(pair, recorder, EXAMPLES, steps=2, batch_size=2))
    assert recorder.seen == [] and all("skipped" in row for row in found)


# --- in a run -----------------------------------------------------------------------------------

COLD = {
    "cold_start": 5,
    "cold_start_steps": 3,
    "cold_start_max_new_tokens": 24,
    "cold_start_lr": 3e-3,
}


def test_a_run_with_a_cold_start_leaves_what_it_promises(world, tmp_path):
    """5.1: it leaves the answers, a line for each update, and measurements before OPD, which has a
    new optimizer. --steps 0 is the control that the paper lacks: fine-tuning alone."""
    out = tmp_path / "run"
    result = opd.distil(config(world, out, steps=2, **COLD))
    answers = lines(out / "cold_start.jsonl")
    assert len(answers) == sum(result["cold_start"].values()) == 5
    for why, count in result["cold_start"].items():
        assert count == sum(answer["why"] == why for answer in answers)
    assert [row["step"] for row in lines(out / "cold_start_metrics.jsonl")] == [1, 2, 3]
    assert [row["lr"] for row in rows(out)] == [1e-3] * 2
    assert result["held_out_cold_start"] != result["held_out_before"]
    alone = opd.distil(config(world, tmp_path / "alone", steps=0, **COLD))
    assert alone["held_out_cold_start"] == result["held_out_cold_start"]
    assert alone["accuracy_after"] == alone["accuracy_cold_start"]
    saved = weights(tmp_path / "alone")
    first = tiny("llama", vocab_size=len(WORDS)).state_dict()
    assert any(not torch.equal(saved[name], first[name]) for name in saved)


def test_opd_after_a_cold_start_has_a_new_optimizer(world, tmp_path, monkeypatch):
    """5.1: without the running means of the cold start."""
    had_state = []
    update = opd.update

    def watched(cfg, pair, optimizer, rows, step):
        had_state.append(len(optimizer.state) > 0)
        return update(cfg, pair, optimizer, rows, step)

    monkeypatch.setattr(opd, "update", watched)
    opd.distil(config(world, tmp_path / "run", steps=2, **COLD))
    assert had_state == [False, True]


def test_the_flags_of_a_cold_start_reach_it(world, tmp_path, monkeypatch):
    """The teacher answers at --cold-start-temperature and -top-p. The defaults are the paper's .7
    and .95. The seed decides its answers and their order."""
    calls = []
    seeds = []

    def note_seed(*args, **how):
        seeds.append(how["seed"])
        return cold_start(*args, **how)

    def note(*args, **how):
        calls.append(how)
        return teacher_rollouts(*args, **how)

    monkeypatch.setattr(opd, "teacher_rollouts", note)
    monkeypatch.setattr(opd, "cold_start", note_seed)
    other = {"cold_start_temperature": 1.0, "cold_start_top_p": 0.9, "seed": 3}
    for name, change in (("paper", {}), ("other", other)):
        opd.distil(config(world, tmp_path / name, steps=0, **COLD, **change))
    found = [(how["temperature"], how["top_p"], how["max_new_tokens"]) for how in calls]
    assert found == [(0.7, 0.95, 24), (1.0, 0.9, 24)]
    assert [how["seed"] for how in calls] == seeds == [0, 3]


def conversations(path, count):
    given = []
    for i in range(count):
        user = {"role": "user", "content": f"so {i}"}
        given.append({"messages": [user, {"role": "assistant", "content": "so + the"}]})
    write_lines(path, given)
    return str(path)


def test_an_epoch_is_the_default_length_of_a_cold_start(world, tmp_path, monkeypatch):
    """5.1: every conversation of a file is used once, and the last batch is filled up from the next
    epoch. The teacher is not asked for answers."""
    monkeypatch.setattr(opd, "teacher_rollouts", lambda *_, **__: pytest.fail("it was asked"))
    file = conversations(tmp_path / "c.jsonl", 7)
    out = tmp_path / "run"
    result = opd.distil(config(world, out, steps=0, cold_start_file=file))
    assert len(lines(out / "cold_start_metrics.jsonl")) == 3  # 7 of them, 3 at a time
    assert "cold_start" not in result and not (out / "cold_start.jsonl").exists()
    assert result["accuracy_cold_start"]["samples"] == 2


@pytest.mark.parametrize(
    "norms, ends", [([math.nan, math.inf, 1, math.nan, 1], False), ([1, *[math.nan] * 4], True)]
)
def test_the_third_step_in_a_row_that_is_not_finite_ends_a_cold_start(
    world, tmp_path, monkeypatch, norms, ends
):
    """Three that are not in a row do not end it."""
    left = iter(norms)
    monkeypatch.setattr(opd, "clip_grad_norm_", lambda *_, **__: torch.tensor(next(left)))
    out = tmp_path / "run"
    cfg = config(world, out, steps=0, **{**COLD, "cold_start_steps": 5})
    if ends:
        with pytest.raises(RunEnded, match="step 4 skipped: .*gradient norm nan"):
            opd.distil(cfg)
        return
    assert opd.distil(cfg)["skipped_steps"] == 3
    logged = lines(out / "cold_start_metrics.jsonl")
    assert [row["grad_norm"] for row in logged] == [None, None, 1, None, 1]
    assert ["skipped" in row for row in logged] == [True, True, False, True, False]
