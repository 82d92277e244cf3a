"""A teacher that reads another prompt: the same responses stand behind it, and on the student's
side nothing changes."""

import functools
import math
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import PROMPTS, TEMPLATE, VOCAB, WORDS, config, ready, tiny, word_tokenizer
from conftest import write_lines as write
from hypothesis import given
from hypothesis import strategies as st

import opd
from analysis import continuation, diagnose
from loss import full_vocab
from plumbing import measure, prompts
from plumbing.answers import answered
from plumbing.flags import Config, parse_opd
from plumbing.processes import equal_micro_batches
from recipes import apply_template, teacher_rollouts
from rollout import from_texts
from teacher import (
    Pair,
    UserError,
    grade,
    has_linear_head,
    log_probs,
    make_pair,
    micro_batches,
    read_by_teacher,
    states,
    values_of,
)

identical = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5, equal_nan=True)
ASKED = [[5, 6, 7, 8, 9, 10, 11], [12], [3, 4, 13, 14]]
READ = [[20, 21], [22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32], [33]]
RESPONSES = [[30], [31, 32, 33, 34, 35, 36], [40, 41, 2]]
prompt_lists = st.lists(
    st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=12), min_size=3, max_size=3
)


def rows_of(read=READ):
    """Prompts of which the teacher reads others."""
    return [{"ids": ids, "teacher_ids": other} for ids, other in zip(ASKED, read)]


def full(log_p, log_q, y):
    return {"loss": full_vocab(log_p, log_q), **diagnose(log_p, log_q, y, 4, [2])}


@functools.cache
def pair_of(micro_batch_tokens=1000):
    student = tiny("llama")
    teacher = tiny("llama", seed=1, hidden=16, layers=3).requires_grad_(False)
    for model in (student, teacher):
        model.linear_head = has_linear_head(model)
    return Pair(student, teacher, None, VOCAB, [2], micro_batch_tokens=micro_batch_tokens)


def alone(model, prompt, response):
    """log p before each token of a response, from its unpadded text alone: (t, V)."""
    text = torch.tensor([prompt + response])
    logits = model(input_ids=text).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)


# --- the grades ----------------------------------------------------------------------------------


def test_equal_prompts_give_bit_equal_grades():
    """A teacher_prompt that says what the prompt says changes nothing, to the bit."""
    r = from_texts(ASKED, RESPONSES)
    same = read_by_teacher(r, rows_of(ASKED))
    plain = grade(pair_of(), r, full)
    for name, x in grade(pair_of(), r, full, teacher_reads=same).items():
        identical(x, plain[name])


def test_without_prompts_of_its_own_the_teacher_reads_the_very_rollout():
    """No copy is made, and a MicroBatch is what both models read."""
    r = from_texts(ASKED, RESPONSES)
    assert read_by_teacher(r, [{"ids": ids} for ids in ASKED]) is r
    (part,) = micro_batches(r, 1000)
    identical(part.for_teacher.ids, part.ids)


@given(prompt_lists)
def test_the_teacher_grades_the_same_tokens_behind_its_own_prompt(read):
    """At each response token log q is that of the teacher's text alone, log p that of the
    student's."""
    pair = pair_of()
    r = from_texts(ASKED, RESPONSES)

    def both(log_p, log_q, y):
        return {"log_p": log_p, "log_q": log_q}

    found = grade(pair, r, both, teacher_reads=read_by_teacher(r, rows_of(read)))
    for row, response in enumerate(RESPONSES):
        t = len(response)
        close(found["log_p"][row, :t], alone(pair.student, ASKED[row], response))
        close(found["log_q"][row, :t], alone(pair.teacher, read[row], response))


@given(prompt_lists)
def test_the_student_reads_the_same_whatever_the_teacher_reads(read):
    """Ids, mask and hidden states of the student agree to the bit, for single rows and for all, and
    gradients flow through them."""
    pair = pair_of()
    r = from_texts(ASKED, RESPONSES)
    other = read_by_teacher(r, rows_of(read))
    for budget in (1, 1000):
        parts = {tuple(part.rows): part for part in micro_batches(r, budget, other)}
        for plain in micro_batches(r, budget):
            hinted = parts[tuple(plain.rows)] if budget == 1 else parts.popitem()[1]
            if plain.rows != hinted.rows:  # all rows, the longest text of either model first
                assert sorted(plain.rows) == sorted(hinted.rows)
                continue
            for name in ("ids", "attention_mask", "is_response", "y", "log_p", "place"):
                identical(getattr(plain, name), getattr(hinted, name))
            ours, theirs = states(pair.student, hinted), states(pair.student, plain)
            identical(ours, theirs)
            assert ours.requires_grad
            count = hinted.for_teacher.is_response.sum()
            assert count == len(hinted.y)
            identical(hinted.for_teacher.ids[hinted.for_teacher.is_response], hinted.y)


@pytest.mark.parametrize("budget", [1, 12, 20, 1000])
def test_padding_and_micro_batches_change_no_grade_and_no_gradient(budget):
    """So it is for single rows, for uneven parts, and for all rows together."""
    r = from_texts(ASKED, RESPONSES)
    other = read_by_teacher(r, rows_of())

    def gradient(pair):
        pair.student.zero_grad()
        for part in micro_batches(r, pair.micro_batch_tokens, other):
            (values_of(pair, part, full)["loss"].sum() / r.is_response.sum()).backward()
        return [p.grad.clone() for p in pair.student.parameters()]

    close(gradient(pair_of(budget)), gradient(pair_of()))
    cut = grade(pair_of(budget), r, full, teacher_reads=other)
    for name, x in grade(pair_of(), r, full, teacher_reads=other).items():
        close(cut[name], x)


@given(prompt_lists, st.integers(1, 60))
def test_neither_model_reads_more_than_the_budget_at_a_time(read, budget):
    """Else a long hint could fill the memory. Only a single row may be longer than the budget."""
    r = from_texts(ASKED, RESPONSES)
    parts = micro_batches(r, budget, read_by_teacher(r, rows_of(read)))
    assert sorted(row for part in parts for row in part.rows) == [0, 1, 2]
    for part in parts:
        for text in (part, part.for_teacher):
            assert text.ids.numel() <= budget or len(part.rows) == 1


def test_n_responses_stand_behind_one_prompt_of_the_teacher():
    """For the teacher, too, rows i * n to i * n + n - 1 are the responses to prompt i."""
    doubled = [ids for ids in ASKED for _ in range(2)]
    r = from_texts(doubled, RESPONSES + RESPONSES)
    read = read_by_teacher(r, rows_of())
    for i in range(len(r.ids)):
        text = read.ids[i, read.attention_mask[i]].tolist()
        assert text == READ[i // 2] + r.response_ids(i)


def test_the_idle_part_of_a_process_reads_no_response_for_the_teacher(monkeypatch):
    """With a sharded pair every process calls the teacher equally often, even without a token."""
    r = from_texts(ASKED, RESPONSES)
    monkeypatch.setattr("plumbing.processes.over_processes", lambda x, op: x + 1)
    parts = equal_micro_batches(r, 1000, read_by_teacher(r, rows_of()))
    assert len(parts) == 2
    values = values_of(pair_of(), parts[1], full)
    assert values["loss"].shape == (0,)


# --- from a file ---------------------------------------------------------------------------------

HINTED = [{**row, "teacher_prompt": f"so {row['prompt']} = {row['answer']}"} for row in PROMPTS]


@pytest.fixture
def hinted(tmp_path):
    """A file of prompts with a teacher_prompt: -> its path."""
    write(tmp_path / "hinted.jsonl", HINTED)
    return str(tmp_path / "hinted.jsonl")


def test_a_step_descends_the_kl_to_the_teacher_behind_its_own_prompt(world, tmp_path, hinted):
    """The gradient is that of the plain mean over all response tokens, from the log_probs of each
    model's own text."""
    cfg = config(world, tmp_path / "run", prompts=hinted, objective="full", micro_batch_tokens=20)
    pair, train, _ = ready(cfg)
    found = {}

    class Keeper:
        param_groups = [{"lr": 0.0}]

        def step(self):
            found.update({k: p.grad.clone() for k, p in pair.student.named_parameters()})

        def zero_grad(self):
            pair.student.zero_grad()

    r, row = opd.update(cfg, pair, Keeper(), train[:3], step=0)
    read = read_by_teacher(r, train[:3], pair.pad_id)
    assert read is not r
    log_p = log_probs(pair.student, r.ids, r.attention_mask, r.is_response)
    log_q = log_probs(
        pair.teacher,
        read.ids,
        read.attention_mask,
        read.is_response,
        vocab_size=pair.vocab_size,
    )
    loss = full_vocab(log_p, log_q).mean()
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in pair.student.parameters()))
    for name, p in pair.student.named_parameters():
        torch.testing.assert_close(found[name], p.grad / max(1, norm), rtol=1e-3, atol=1e-6)


def test_held_out_distance_and_diagnosis_see_what_the_teacher_reads(world, tmp_path, hinted):
    """With the hint the reverse KL of the same two models is another one."""
    found = []
    for path in (f"{world}/prompts.jsonl", hinted):
        cfg = config(world, tmp_path / "run", prompts=path, objective="full")
        pair, _, held_out = ready(cfg)
        per_position = opd.loss_and_metrics(cfg, pair.eos_ids)
        found.append(measure.distance(cfg, pair, held_out, per_position))
    assert found[0]["entropy_student"] == found[1]["entropy_student"]
    assert found[0]["response_length"] == found[1]["response_length"]
    assert abs(found[0]["reverse_kl"] - found[1]["reverse_kl"]) > 1e-3


class Recorder:
    """In place of a rollout: keeps the prompts, and answers each with one token."""

    def __init__(self):
        self.asked = []

    def __call__(self, model, asked, **how):
        self.asked.append((model, asked))
        return from_texts(asked, [[WORDS.index("3"), 2]] * (len(asked) * how.get("n", 1)))


def test_each_model_answers_its_own_prompt(monkeypatch):
    """So it is for accuracy, greedy accuracy, and the endings of 6.1."""
    recorder = Recorder()
    monkeypatch.setattr("plumbing.answers.rollout", recorder)
    tokenizer = word_tokenizer()
    pair = make_pair(
        tiny("llama", vocab_size=len(WORDS)),
        tiny("llama", seed=1, vocab_size=len(WORDS)),
        tokenizer,
        tokenizer,
    )
    rows = [{"ids": [5, 6], "teacher_ids": [7, 8, 9], "answer": "3"}]
    answered(pair, rows, max_new_tokens=4)
    answered(pair, rows, model=pair.student, max_new_tokens=4)
    answered(pair, rows, model=pair.teacher, max_new_tokens=4)
    assert [asked for _, asked in recorder.asked] == [[[5, 6]], [[5, 6]], [[7, 8, 9]]]
    recorder.asked.clear()
    continuation(pair, rows, [[10, 11]], 0.5, answered=answered, n=1, max_new_tokens=4)
    assert [asked for _, asked in recorder.asked] == [[[5, 6, 10]], [[7, 8, 9, 10]]]
    assert [model for model, _ in recorder.asked] == [pair.student, pair.teacher]


def test_in_a_cold_start_the_teacher_answers_its_prompt_and_the_student_learns_behind_its_own():
    """The file keeps the student's prompt ids, and the teacher's answer."""
    recorder = Recorder()
    tokenizer = word_tokenizer()
    model = tiny("llama", vocab_size=len(WORDS))
    pair = make_pair(model, tiny("llama", vocab_size=len(WORDS)), tokenizer, tokenizer)
    row = {"prompt": "add 3", "ids": [5, 6], "teacher_ids": [7, 8, 9]}
    [[line]] = teacher_rollouts(pair, [row], max_new_tokens=4, rollout=recorder)
    assert recorder.asked == [(pair.teacher, [[7, 8, 9]])]
    assert line["prompt_ids"] == [5, 6]
    assert line["messages"][0] == {"role": "user", "content": "add 3"}


def test_the_teachers_prompt_goes_through_its_own_chat_template():
    """The student's goes through the student's. Without a teacher_prompt both read those ids."""
    plain = word_tokenizer(chat_template=TEMPLATE)
    other = word_tokenizer(chat_template=TEMPLATE.replace("assistant :", "assistant : so"))
    pair = make_pair(
        tiny("llama", vocab_size=len(WORDS)), tiny("llama", vocab_size=len(WORDS)), plain, other
    )
    rows = [{"prompt": "add 3", "teacher_prompt": "add 7"}, {"prompt": "add 3"}]
    hinted, bare = prompts.encode_rows(pair, rows, max_prompt_tokens=9, new_tokens=4)
    assert plain.decode(hinted["ids"]) == "[BOS] user : add 3 assistant :"
    assert plain.decode(hinted["teacher_ids"]) == "[BOS] user : add 7 assistant : so"
    assert bare["ids"] == hinted["ids"] and "teacher_ids" not in bare


@pytest.mark.parametrize("template", ["none", "answer", "boxed"])
def test_the_teacher_template_stands_around_the_question_or_its_own_prompt(tmp_path, template):
    """5.2 turned around: --template is for the student, --teacher-template for the teacher. A
    question may be in the student's template already."""
    lines = [
        {"prompt": "add 3"},
        {"prompt": apply_template("add 7", template)},
        {"prompt": "add", "teacher_prompt": "so add"},
        {"prompt": [{"role": "user", "content": "the 3"}]},
    ]
    write(tmp_path / "p.jsonl", lines)
    cfg = Config(
        prompts=str(tmp_path / "p.jsonl"), template=template, teacher_template="hint {question} !"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train, _, held_out = prompts.questions(cfg)
    found = {}
    for row in train + held_out:
        text = prompts.question_text(row["teacher_prompt"])
        found[text] = prompts.question_text(row["prompt"])
    asked = {"add 3": "add 3", "add 7": "add 7", "so add": "add", "the 3": "the 3"}
    assert found == {f"hint {a} !": apply_template(b, template) for a, b in asked.items()}


# --- what cannot work ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "teacher_prompt, said",
    [
        ("", 'p.jsonl:2 needs "teacher_prompt": text, or a list of'),
        (" \n", 'p.jsonl:2 needs "teacher_prompt"'),
        (None, 'p.jsonl:2 needs "teacher_prompt"'),
        ([], 'p.jsonl:2 needs "teacher_prompt"'),
        (
            [{"role": "assistant", "content": "so"}],
            "p.jsonl:2 ends with what the assistant says; end the teacher_prompt",
        ),
    ],
)
def test_what_is_no_teacher_prompt_is_refused_with_its_line(tmp_path, teacher_prompt, said):
    write(tmp_path / "p.jsonl", [PROMPTS[0], {"prompt": "add", "teacher_prompt": teacher_prompt}])
    with pytest.raises(UserError, match=said):
        prompts.load_prompts(tmp_path / "p.jsonl")


def test_a_teacher_prompt_that_is_too_long_is_refused_with_its_line(world, tmp_path):
    """The tiny models hold 64 tokens. The student's prompts are not dropped for it."""
    rows = [*HINTED, {"prompt": "add 7 7", "teacher_prompt": "so " * 60}]
    write(tmp_path / "p.jsonl", rows)
    cfg = config(world, tmp_path / "run", prompts=f"{tmp_path}/p.jsonl")
    with pytest.raises(UserError, match="the teacher_prompt of prompt p.jsonl:11 .* holds 64"):
        ready(cfg)


def test_prompts_without_a_teacher_prompt_beside_others_are_counted(world, tmp_path, hinted):
    """A held-out file without hints would measure another teacher, silently."""
    write(tmp_path / "eval.jsonl", [{"prompt": "add add"}])
    cfg = config(world, tmp_path / "run", prompts=hinted, eval=(f"{tmp_path}/eval.jsonl",))
    with pytest.warns(UserWarning, match='1 of 11 prompts have no "teacher_prompt"'):
        prompts.questions(cfg)


def test_a_teacher_template_without_room_for_the_question_is_refused(world):
    words = ["--student", f"{world}/student", "--teacher", f"{world}/teacher"]
    with pytest.raises(UserError, match="no template 'so': take one of"):
        parse_opd([*words, "--teacher-template", "so"])


def test_a_run_does_not_go_on_with_other_prompts_of_the_teacher(world, tmp_path, hinted):
    """The teacher's prompts are part of what names the questions."""
    from plumbing.run import digest_of

    assert digest_of(prompts.load_prompts(hinted)) != digest_of(
        prompts.load_prompts(f"{world}/prompts.jsonl")
    )


def test_a_run_learns_from_itself_with_a_hint(world, tmp_path, hinted):
    """Student and teacher are one checkpoint. Without a hint there is no gradient, and no run; with
    one the student comes nearer to the teacher."""
    cfg = config(
        world,
        tmp_path / "run",
        prompts=hinted,
        teacher=f"{world}/student",
        objective="full",
        steps=12,
        batch_size=6,
    )
    result = opd.distil(cfg)
    assert result["held_out_before"]["reverse_kl"] > 0.01
    assert result["held_out_after"]["reverse_kl"] < 0.9 * result["held_out_before"]["reverse_kl"]

    plain = replace(cfg, prompts=f"{world}/prompts.jsonl", out=str(tmp_path / "plain"))
    with pytest.raises(UserError, match="agree at every state: there is nothing to learn"):
        opd.distil(plain)
    opd.distil(replace(plain, cold_start=2, steps=1))  # the cold start moves the student first


def test_a_copy_in_bfloat16_has_nothing_to_teach_either(world, tmp_path, hinted):
    """There rounding alone makes a reverse KL of more than NO_DISTANCE."""
    cfg = config(
        world, tmp_path, teacher=f"{world}/student", dtype="bfloat16", max_new_tokens=24, steps=1
    )
    pair, train, _ = ready(cfg)
    far = {"reverse_kl": 0.01}
    assert measure.same_weights(pair)
    with pytest.raises(UserError, match="agree at every state"):
        measure.check_teaches(cfg, pair, train, far)
    measure.check_teaches(replace(cfg, teacher_temperature=0.5), pair, train, far)
    reading_more = [{**train[0], "teacher_prompt": "so"}, *train[1:]]
    measure.check_teaches(cfg, pair, reading_more, far)
    next(pair.student.parameters()).data[0, 0] += 1
    assert not measure.same_weights(pair)
    measure.check_teaches(cfg, pair, train, far)
    assert not measure.same_weights(ready(replace(cfg, teacher=f"{world}/teacher"))[0])
