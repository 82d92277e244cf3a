"""teacher.py: which pairs fit; hidden states, micro-batches and grades against single unpadded
rows."""

import functools
import re
import warnings

import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, WORDS, tiny, tiny_pair, word_tokenizer

from analysis import diagnose
from loss import full_vocab, in_chunks, sampled_token, top_k
from plumbing.models import checkpoint_layers
from rollout import from_texts, left_pad, rollout
from teacher import (
    Pair,
    check_pair,
    eos_ids,
    grade,
    has_linear_head,
    log_probs,
    log_softmax_of,
    make_pair,
    micro_batches,
    states,
    values_of,
)

close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5, equal_nan=True)
identical = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [3, 4, 13, 14], [20, 21]]
RESPONSES = [[30], [31, 32, 33, 34, 35, 36], [40, 41, 42], [43, 44, 45, 46, 47, 1, 2, 2]]


def full(log_p, log_q, y):
    return {"loss": full_vocab(log_p, log_q), **diagnose(log_p, log_q, y, 4)}


def pair_of(architecture, *, vocab_size=VOCAB, eos_ids=(2,), **settings):
    """A student and a frozen teacher of another width and depth, without tokenizers."""
    student = tiny(architecture)
    teacher = tiny(architecture, seed=1, hidden=16, layers=3).requires_grad_(False)
    return Pair(student, teacher, None, vocab_size, list(eos_ids), **settings)


def gradients(pair, r, per_position=full, **temperatures):
    """Of the mean loss over all response tokens, part by part: {parameter: gradient}."""
    pair.student.zero_grad()
    total = r.is_response.sum()
    for part in micro_batches(r, pair.micro_batch_tokens):
        values = values_of(pair, part, per_position, **temperatures)
        (values["loss"].sum() / total).backward()
    return {k: p.grad.clone() for k, p in pair.student.named_parameters() if p.grad is not None}


def plain(model, row):
    """Logits before the response tokens of one row, from the unpadded text alone: (T_row, V)."""
    text = torch.tensor([PROMPTS[row] + RESPONSES[row]])
    return model(input_ids=text).logits[0, len(PROMPTS[row]) - 1 : -1]


# --- do the two fit? ----------------------------------------------------------------------------


def fitting(**changes):
    """Arguments of check_pair for a student and a teacher whose heads are padded differently."""
    made = {
        "student": tiny("llama", vocab_size=len(WORDS) + 4),
        "teacher": tiny("llama", vocab_size=len(WORDS) + 9),
        "student_tokenizer": word_tokenizer(),
        "teacher_tokenizer": word_tokenizer(),
    }
    return {**made, **changes}


def test_a_fitting_pair_gives_the_number_of_real_tokens_in_silence():
    """Heads that are padded to different sizes are cut to the tokens that exist (Qwen2.5: 151,936
    and 152,064)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_pair(**fitting()) == len(WORDS)


def test_a_pad_token_without_an_embedding_does_not_pad():
    """A [PAD] that was added to the tokenizer alone, as many scripts do, stands behind the rows."""
    words = [*WORDS, *(f"w{i}" for i in range(100))]
    tokenizer = word_tokenizer([*words, "<pad>"])
    tokenizer.pad_token = "<pad>"
    model = tiny("llama", vocab_size=len(words))
    with pytest.warns(UserWarning, match="no output row for 1 tokens"):
        pair = make_pair(model, model, tokenizer, tokenizer)
    r = rollout(model, [[5, 6], [7]], max_new_tokens=2, **pair.sampling)
    assert r.ids.max() < len(words)


def test_tokenizers_that_disagree_are_refused_with_the_first_tokens_named():
    """If ids are exchanged, or a word is missing, the message has the lowest ids (trl#4393,
    trl#5885)."""
    words = list(WORDS)
    words[7] = "the"
    words[8] = "add"
    first = "'add' (student 7, teacher 8), 'the' (student 8, teacher 7)"
    with pytest.raises(ValueError, match=re.escape(f"2 token ids: {first}")):
        check_pair(**fitting(teacher_tokenizer=word_tokenizer(words)))
    last = f"{first}, 'um' (student absent, teacher 16)"
    with pytest.raises(ValueError, match=re.escape(f"3 token ids: {last}")):
        check_pair(**fitting(teacher_tokenizer=word_tokenizer(words + ["um"])))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_with_fewer_rows_than_tokens_is_refused(role):
    """Its checkpoint belongs to another tokenizer."""
    with pytest.raises(ValueError, match="12 .*output rows for 16 tokens"):
        check_pair(**fitting(**{role: tiny("llama", vocab_size=12)}))


def test_a_stray_token_without_a_row_is_cut_unless_it_ends_a_response():
    """In Gemma 3 1B <image_soft_token> has an id, but no output row. The pair works without it."""
    words = WORDS + [f"w{i}" for i in range(200)]
    arguments = {
        "student": tiny("llama", vocab_size=len(words)),
        "teacher": tiny("llama", vocab_size=len(words) - 1),
        "student_tokenizer": word_tokenizer(words),
        "teacher_tokenizer": word_tokenizer(words),
    }
    with pytest.warns(UserWarning, match="no output row for 1 tokens, .*'w199'"):
        assert check_pair(**arguments) == len(words) - 1
    arguments["student"].generation_config.eos_token_id = len(words) - 1
    with pytest.raises(ValueError, match="token 215 ends a response"):
        check_pair(**arguments)


def test_other_ends_are_warned_of_and_no_end_at_all_is_refused():
    """ms-swift#9526: with other eos ids lengths may explode. trl#5725: without any nothing ends."""
    other = tiny("llama", vocab_size=len(WORDS))
    other.generation_config.eos_token_id = [2, 14]
    with pytest.warns(UserWarning, match="student ends .*EOS.*, teacher with .*'so'") as caught:
        assert check_pair(**fitting(teacher=other)) == len(WORDS)
    assert len(caught) == 1
    endless = word_tokenizer(eos=None)
    with pytest.raises(ValueError, match="set eos_token_id"):
        check_pair(**fitting(student_tokenizer=endless, teacher_tokenizer=endless))


@pytest.mark.parametrize(
    "generation, config, token, expected",
    [
        ([5, 6], None, "[EOS]", {2, 5, 6}),
        (5, 6, "[EOS]", {2, 5, 6}),
        (None, [6, 7], None, {6, 7}),
        (-1, None, "[EOS]", {2}),
        (None, None, None, set()),
    ],
)
def test_every_end_is_found(generation, config, token, expected):
    """Generation config, config and tokenizer may name any number (trl#7039, trl#5725)."""
    model = tiny("llama")
    tokenizer = word_tokenizer()
    model.generation_config.eos_token_id = generation
    model.config.eos_token_id = config
    tokenizer.eos_token = token
    assert eos_ids(model, tokenizer) == expected


def test_the_ends_of_a_pair_are_those_of_both_the_students_own_first():
    """Cold-start answers end with the first. A response of either model ends at any of them."""
    teacher = tiny("llama", vocab_size=len(WORDS))
    teacher.generation_config.eos_token_id = [1, 14]
    with pytest.warns(UserWarning, match="ends a response"):
        pair = make_pair(**fitting(teacher=teacher))
    assert pair.eos_ids == [2, 1, 14]
    assert not any(p.requires_grad for p in pair.teacher.parameters())
    assert all(p.requires_grad for p in pair.student.parameters())


# --- states and heads ---------------------------------------------------------------------------


def test_states_and_head_are_the_models_own_log_probabilities(model):
    """They are packed row by row, the state at t - 1 for token t, with left padding or without.

    ms-swift#8436: logits and labels without a shift; trl#6800, transformers#18388: GPT-2's
    positions.
    """
    pair = Pair(model, model, None, VOCAB - 8, [2])
    (part,) = micro_batches(from_texts(PROMPTS, RESPONSES), 10_000)
    log_p = log_softmax_of(pair, model, 0.7)(states(model, part))
    expected = [plain(model, row)[:, : VOCAB - 8] / 0.7 for row in part.rows]
    close(log_p, torch.cat(expected).log_softmax(-1))


def test_masks_of_0_and_1_are_masks():
    """Those of transformers are integers, which would index the states."""
    model = tiny("llama")
    r = from_texts(PROMPTS, RESPONSES)
    expected = log_probs(model, r.ids, r.attention_mask, r.is_response)
    close(log_probs(model, r.ids, r.attention_mask.long(), r.is_response.long()), expected)


def test_a_pair_has_no_dropout():
    """A model that is made from a config alone is in train mode."""
    student, teacher = (tiny("llama", vocab_size=len(WORDS)).train() for _ in range(2))
    pair = make_pair(**fitting(student=student, teacher=teacher))
    assert not pair.student.training and not pair.teacher.training


def test_a_bias_of_the_head_is_part_of_it():
    """If a head has a bias, it is cut as the weight is."""
    model = tiny("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB))
    test_states_and_head_are_the_models_own_log_probabilities(model)


def test_soft_capped_logits_are_found_out_and_kept():
    """Gemma 2 does more than a linear head. So its own logits are taken, and graded like others."""
    pair = pair_of("llama")
    assert has_linear_head(pair.student)
    student = tiny("gemma2")
    pair.student = student
    r = from_texts(PROMPTS, RESPONSES)
    grid = grade(pair, r, full)
    for row, response in enumerate(RESPONSES):
        logits = plain(student, row)
        assert logits.abs().max() <= 2  # its cap
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(response).unsqueeze(-1))
        close(grid["log_p"][row, : len(response)], expected.squeeze(-1).detach())
    assert max(g.abs().max() for g in gradients(pair, r).values()) > 0
    assert not has_linear_head(student)
    with pytest.warns(UserWarning, match="Gemma2ForCausalLM does more than a linear output head"):
        capped = tiny("gemma2", vocab_size=len(WORDS))
        make_pair(**fitting(student=capped, teacher=tiny("llama", vocab_size=len(WORDS))))


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_padded_vocabulary_columns_change_nothing(architecture, padded):
    """Rows of large weights at the end of either head change no loss, metric or gradient.

    Qwen2.5's 151,936 and 152,064 rows: trl#2215, trl#3028, trl#6252, trl#6457, LMOps#286,
    LMOps#331, torchtune#2119, torchtune#2416, torchtune#2598, Qwen3#292; Liger's
    fused_linear_distillation.
    """
    pair = pair_of(architecture)
    narrow = getattr(pair, padded)
    size = {} if padded == "student" else {"hidden": 16, "layers": 3}
    wide = tiny(architecture, seed=9, vocab_size=VOCAB + 8, **size)
    with torch.no_grad():
        for name, p in wide.named_parameters():
            count = len(narrow.get_parameter(name))
            p[:count] = narrow.get_parameter(name)
            p[count:] *= 100
    r = from_texts(PROMPTS, RESPONSES)
    grid = grade(pair, r, full)
    of_narrow = gradients(pair, r)
    setattr(pair, padded, wide)
    close(grade(pair, r, full), grid)
    for name, g in gradients(pair, r).items():
        count = len(of_narrow[name])
        close(g[:count], of_narrow[name])
        assert not g[count:].any()


# --- micro-batches ------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 9, 20, 30, 47, 10_000])
def test_micro_batches_deal_out_every_row_once_within_the_budget(budget):
    """A part has complete rows with their responses marked, and no column of padding alone. It has
    at most `budget` tokens, or one row."""
    r = from_texts(PROMPTS, RESPONSES, pad_id=30)  # the padding is a response token, too
    r.log_p = torch.arange(r.log_p.numel()).view(r.log_p.shape)
    dealt = []
    for part in micro_batches(r, budget):
        assert part.attention_mask.numel() <= budget or len(part.rows) == 1
        assert part.attention_mask.any(0).all()
        for i, row in enumerate(part.rows):
            text = part.ids[i][part.attention_mask[i]].tolist()
            assert text == PROMPTS[row] + RESPONSES[row]
        responses = [RESPONSES[row] for row in part.rows]
        assert part.y.tolist() == sum(responses, [])
        assert part.place.tolist() == sum([list(range(len(y))) for y in responses], [])
        assert part.log_p.tolist() == r.log_p[part.rows][r.response_mask[part.rows]].tolist()
        dealt += part.rows
    assert sorted(dealt) == list(range(len(PROMPTS)))


def test_micro_batches_keep_rows_of_like_length_together():
    """So a long row does not pad short ones. The longest come first, so that memory peaks
    early."""
    r = from_texts([[3]] * 8, [[5], [6] * 19] * 4)
    parts = [part.attention_mask for part in micro_batches(r, 44)]
    assert [part.shape for part in parts] == [(2, 20), (2, 20), (4, 2)]
    assert all(part.all() for part in parts)


def test_a_chunk_is_what_a_budget_of_logits_holds():
    """On a CPU it is 32 MiB of logits, and 128 positions at least, for 151,665 tokens or for 16."""
    pair = pair_of("llama")
    for vocab_size, chunk in ((151_665, 128), (16_384, 512), (16, 2**19)):
        pair.vocab_size = vocab_size
        assert pair.chunk == chunk


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("budget", [1, 20])
def test_any_budget_gives_the_same_loss_and_gradients(architecture, budget):
    """One batch of four is four of one, or two of two, at unequal lengths, with one denominator
    (trl#6006, trl#4719)."""
    r = from_texts(PROMPTS, RESPONSES)
    whole = pair_of(architecture)
    parts = pair_of(architecture, micro_batch_tokens=budget)
    close(grade(parts, r, full), grade(whole, r, full))
    close(gradients(parts, r), gradients(whole, r))


# --- grades against plain single rows -----------------------------------------------------------


def test_grades_are_a_loop_over_unpadded_rows(architecture):
    """Mixed lengths in one batch are single texts, in value and in the gradient of the token mean.

    allen3325: training on the prompt and after eos; trl#7024, optipfair#34, easydistill#16,
    trl#4105.
    """
    pair = pair_of(architecture)
    r = from_texts(PROMPTS, RESPONSES)
    grid = grade(pair, r, full)
    ours = gradients(pair, r)
    pair.student.zero_grad()
    losses = []
    for row, response in enumerate(RESPONSES):
        log_p = plain(pair.student, row).log_softmax(-1)
        log_q = plain(pair.teacher, row).log_softmax(-1)
        losses.append(full_vocab(log_p, log_q))
        expected = full(log_p.detach(), log_q, torch.tensor(response))
        close({name: x[row, : len(response)] for name, x in grid.items()}, expected)
    torch.cat(losses).mean().backward()
    close(ours, {k: p.grad for k, p in pair.student.named_parameters() if p.grad is not None})


def test_padding_and_other_rows_change_nothing(architecture):
    """The pad id changes no bit, and other rows change nothing (trl#2058, trl#7024)."""
    pair = pair_of(architecture)
    r = from_texts(PROMPTS, RESPONSES)
    grid = grade(pair, r, full)
    of_r = gradients(pair, r)
    for pad_id in (30, 2):
        other = from_texts(PROMPTS, RESPONSES, pad_id=pad_id)
        identical(grade(pair, other, full), grid)
        identical(gradients(pair, other), of_r)
    crowd = from_texts(PROMPTS[:1] + [[9] * 20], RESPONSES[:1] + [[8] * 15])
    for name, x in grade(pair, crowd, full).items():
        close(x[0, 0], grid[name][0, 0])


def test_only_states_that_predict_response_tokens_get_a_gradient():
    """Neither prompt nor padding nor the last token is trained on (trl#6006)."""
    pair = pair_of("llama")
    r = from_texts(PROMPTS, RESPONSES)
    (part,) = micro_batches(r, 10_000)
    h = torch.randn(*r.ids.shape, 32, requires_grad=True)
    pair.student.trunk = lambda **inputs: (h,)
    values = values_of(pair, part, full)
    values["loss"].sum().backward()
    assert len(values["loss"]) == r.response_mask.sum() == sum(map(len, RESPONSES))
    trained = torch.zeros_like(r.is_response)
    P = r.ids.size(1) - r.response_mask.size(1)
    for i, row in enumerate(part.rows):
        trained[i, P - 1 : P - 1 + len(RESPONSES[row])] = True
    assert torch.equal(h.grad.abs().sum(-1) > 0, trained)


def test_a_part_without_a_response_token_leaves_zero_gradients():
    """There is no 0/0 (LMOps#38; distillm and trl: 0/0, then NaN)."""
    pair = pair_of("llama")
    r = from_texts(PROMPTS, RESPONSES)
    r.is_response[:] = False
    (part,) = micro_batches(r, 10_000)
    values = values_of(pair, part, full)
    values["loss"].sum().backward()
    assert all(len(x) == 0 for x in values.values())
    assert not any(p.grad.any() for p in pair.student.parameters())
    assert all(x.isnan().all() for x in grade(pair, r, full).values())


def test_log_probs_are_those_of_single_unpadded_rows(model):
    """They are the log softmax of the logits before each response token, over the shared
    vocabulary."""
    r = from_texts(PROMPTS, RESPONSES)
    expected = [plain(model, row)[:, : VOCAB - 8] / 0.7 for row in range(len(PROMPTS))]
    found = log_probs(
        model, r.ids, r.attention_mask, r.is_response, vocab_size=VOCAB - 8, temperature=0.7
    )
    close(found, torch.cat(expected).log_softmax(-1))


@pytest.mark.parametrize("budget, chunk", [(10_000, 128), (20, 3), (1, 1)])
@pytest.mark.parametrize("temperature, teacher_temperature", [(1.0, 1.0), (0.7, 2.0)])
@pytest.mark.parametrize("merge_ends", [True, False])
def test_a_step_is_its_plain_twin(budget, chunk, temperature, teacher_temperature, merge_ends):
    """In values and gradients, states in chunks and parts agree with log_probs on whole tensors."""
    ends = [2, 9, 30]
    pair = pair_of("llama", eos_ids=ends, merge_ends=merge_ends, vocab_size=VOCAB)
    pair.student.double()  # gradients of up to 6 are added up in several orders
    pair.teacher.double()
    r = from_texts(PROMPTS, RESPONSES)

    def per_position(log_p, log_q, y):
        return {"loss": top_k(log_p, log_q, 4), "log_p": log_p[:, 2], "log_q": log_q[:, 2]}

    log_p_of = log_softmax_of(pair, pair.student, temperature)
    log_q_of = log_softmax_of(pair, pair.teacher, teacher_temperature)
    for part in micro_batches(r, budget):
        h_p = states(pair.student, part)
        h_q = states(pair.teacher, part)
        values = in_chunks(per_position, h_p, h_q, log_p_of, log_q_of, part.y, chunk)
        values["loss"].sum().backward()
    ours = {k: p.grad.clone() for k, p in pair.student.named_parameters()}

    pair.student.zero_grad()
    of_r = (r.ids, r.attention_mask, r.is_response)
    merged = ends if merge_ends else ()
    log_p = log_probs(pair.student, *of_r, ends=merged, temperature=temperature)
    log_q = log_probs(pair.teacher, *of_r, ends=merged, temperature=teacher_temperature)
    expected = per_position(log_p, log_q, r.ids[r.is_response])
    expected["loss"].sum().backward()
    close(ours, {k: p.grad for k, p in pair.student.named_parameters()})
    temperatures = {"temperature": temperature, "teacher_temperature": teacher_temperature}
    grid = grade(pair, r, per_position, **temperatures)
    for name, x in expected.items():
        close(grid[name][r.response_mask], x.detach())
        assert grid[name][~r.response_mask].isnan().all()


def test_what_is_only_measured_leaves_no_gradient():
    """`grade` leaves no gradient. Without the teacher values_of does not call it."""
    pair = pair_of("llama")
    r = from_texts(PROMPTS, RESPONSES)
    assert not any(x.requires_grad for x in grade(pair, r, full).values())
    assert all(p.grad is None for p in pair.student.parameters())
    pair.teacher.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was read"))
    pair.teacher.base_model.register_forward_pre_hook(lambda *_: pytest.fail("it was read"))
    (part,) = micro_batches(r, 10_000)
    given = []

    def per_position(log_p, log_q, y):
        given.append(log_q)
        return {"loss": log_p[:, 0]}

    values_of(pair, part, per_position, with_teacher=False)
    assert given == [None]


def test_whole_numbers_and_vectors_have_their_grid_too():
    """A value of a position may be an id, which is 0 where there is none, or a row of numbers."""
    pair = pair_of("llama", micro_batch_tokens=20)
    r = from_texts(PROMPTS, RESPONSES)
    grid = grade(pair, r, lambda log_p, log_q, y: {"y": y, "three": log_p[:, :3]})
    T = r.response_mask.size(1)
    assert torch.equal(grid["y"], torch.where(r.response_mask, r.ids[:, -T:], 0))
    assert grid["three"].shape == (*r.response_mask.shape, 3)
    assert torch.equal(grid["three"].isnan().all(-1), ~r.response_mask)


def test_a_pair_computes_in_the_dtype_of_its_autocast():
    """What is sampled in bfloat16 is scored in bfloat16 by both models. Gradients are float32."""
    pair = pair_of("llama", dtype=torch.bfloat16)
    dtypes = []
    for model in (pair.student, pair.teacher):
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda _, args, z: dtypes.append(z.dtype))
    with pair.autocast():
        r = rollout(pair.student, PROMPTS, n=2, max_new_tokens=6, **pair.sampling)
    steps = len(dtypes)
    log_p = grade(pair, r, full)["log_p"]
    assert set(dtypes) == {torch.bfloat16}
    assert len(dtypes) > steps
    assert log_p.dtype == torch.float32
    assert (log_p.nan_to_num() - r.log_p).abs().max() < 0.3
    assert {g.dtype for g in gradients(pair, r).values()} == {torch.float32}


# --- the teacher --------------------------------------------------------------------------------


def test_the_teacher_gets_no_gradient_even_unfrozen(architecture):
    """Its states and its side of the loss are computed under no_grad (ms-swift's _align_vocab)."""
    pair = pair_of(architecture)
    pair.teacher.requires_grad_(True)
    assert has_linear_head(pair.teacher)  # tried before it is watched
    graphs = []
    pair.teacher.base_model.register_forward_pre_hook(
        lambda *_: graphs.append(torch.is_grad_enabled())
    )
    assert gradients(pair, from_texts(PROMPTS, RESPONSES))
    assert all(p.grad is None for p in pair.teacher.parameters())
    assert graphs == [False]


OBJECTIVES = {
    "full": lambda log_p, log_q, y: {"loss": full_vocab(log_p, log_q)},
    "top-k": lambda log_p, log_q, y: {"loss": top_k(log_p, log_q, 4)},
    "sampled": lambda log_p, log_q, y: {"loss": sampled_token(log_p, log_q, y)},
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_teacher_decides_the_gradient(architecture, objective):
    """Another teacher gives another gradient (ms-swift#6857, atropos#456, atropos#464)."""
    pair = pair_of(architecture)
    r = from_texts(PROMPTS, RESPONSES)
    one = gradients(pair, r, objective)
    pair.teacher = tiny(architecture, seed=2)
    other = gradients(pair, r, objective)
    assert max((one[name] - other[name]).abs().max() for name in one) > 1e-3
    pair.teacher = tiny(architecture)
    assert not grade(pair, r, objective)["loss"].nansum()
    assert max(g.abs().max() for g in gradients(pair, r, objective).values()) < 1e-5


def test_architectures_may_differ():
    """A model that shares the vocabulary can teach, whatever its family, width, depth or rows."""
    student = tiny("gpt2", vocab_size=VOCAB + 3)
    teacher = tiny("gemma3", vocab_size=VOCAB + 7, hidden=16, layers=3)
    pair = Pair(student, teacher, None, VOCAB, [2], micro_batch_tokens=20)
    grid = grade(pair, from_texts(PROMPTS, RESPONSES), full)
    for row, response in enumerate(RESPONSES):
        log_p = plain(student, row)[:, :VOCAB].log_softmax(-1).detach()
        log_q = plain(teacher, row)[:, :VOCAB].log_softmax(-1).detach()
        expected = full(log_p, log_q, torch.tensor(response))
        close({name: x[row, : len(response)] for name, x in grid.items()}, expected)


@pytest.mark.parametrize("temperature, teacher_temperature", [(1.0, 1.0), (0.7, 2.0)])
@pytest.mark.parametrize("merge_ends", [True, False])
def test_what_was_sampled_is_what_is_graded(
    architecture, temperature, teacher_temperature, merge_ends
):
    """The ratio is 1 on the first update (Qwen3#1799). The teacher's temperature is its own.

    trl GKD, slime#2085, miles#1345.
    """
    pair = pair_of(architecture, eos_ids=range(0, VOCAB, 6), merge_ends=merge_ends)
    r = rollout(
        pair.student,
        PROMPTS,
        n=2,
        max_new_tokens=8,
        temperature=temperature,
        seeds=[0, 1, 2, 3],
        **pair.sampling,
    )
    temperatures = {"temperature": temperature, "teacher_temperature": teacher_temperature}
    grid = grade(pair, r, full, **temperatures)
    torch.testing.assert_close(grid["log_p"].nan_to_num(), r.log_p, rtol=0, atol=1e-4)
    log_q_of = log_softmax_of(pair, pair.teacher, teacher_temperature)
    h = pair.teacher.base_model(input_ids=torch.tensor([PROMPTS[1]]))[0][:, -1]
    log_q = log_q_of(h)[0, r.response_ids(2)[0]]
    close(grid["reward"][2, 0] + grid["log_p"][2, 0], log_q.detach())


# --- checkpointed layers ------------------------------------------------------------------------


def kept_for_backward(pair, r):
    """The bytes that autograd keeps of the trunk until its backward, each tensor once, without
    weights."""
    weights = {p.untyped_storage().data_ptr() for p in pair.student.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    (part,) = micro_batches(r, 10_000)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        states(pair.student, part)
    return sum(kept.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpointed_layers_give_the_same_gradients_from_less_memory(architecture):
    """transformers checkpoints only in training mode; here the model stays in eval mode.

    It writes the same tokens, has the same gradients, and keeps less, also after a rollout
    (trl#6827).
    """
    pair = pair_of(architecture, eos_ids=())
    how = {"n": 2, "max_new_tokens": 6, "eos_ids": (), "seeds": [0, 1, 2, 3]}
    before = rollout(pair.student, PROMPTS, **how)
    expected = gradients(pair, before)
    kept = kept_for_backward(pair, before)
    checkpoint_layers(pair.student)
    after = rollout(pair.student, PROMPTS, **how)
    assert not pair.student.training
    assert torch.equal(before.ids, after.ids)
    assert torch.equal(before.log_p, after.log_p)
    close(gradients(pair, after), expected)
    assert kept_for_backward(pair, before) < 0.5 * kept


def test_a_pair_of_tokenizers_samples_and_grades_without_more(architecture):
    """What make_pair returns is all that a rollout and its grades need."""
    pair = tiny_pair(architecture)
    r = rollout(pair.student, [[7, 8], [9]], n=2, max_new_tokens=5, **pair.sampling)
    grid = grade(pair, r, full)
    assert int((~grid["loss"].isnan()).sum()) == int(r.response_mask.sum())
    assert (r.ids < pair.vocab_size).all()


def test_left_padding_is_what_micro_batches_cut_off():
    """A long prompt of another row costs a row nothing if it is in another part."""
    r = from_texts([[3] * 30, [4]], [[5], [6]])
    short = micro_batches(r, 40)[-1]
    assert short.ids.tolist() == left_pad([[4, 6]], 0)[0].tolist()
