"""Laws of teacher.py: which pairs fit, logits from states, grading (packed, in micro-batches, one denominator)."""

import functools
import re
import warnings

import pytest
import torch
from conftest import ARCHITECTURES, TEMPLATE, VOCAB, WORDS, tiny, word_tokenizer

from analysis import diagnose
from loss import full_vocab, sampled_token, top_k
from plumbing.models import checkpoint_layers, load, surprises
from rollout import Rollout, left_pad, rollout
from teacher import Pair, Split, check_pair, eos_ids, log_probs, micro_batches, split, states

close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5, equal_nan=True)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [3, 4, 13, 14], [20, 21]]
RESPONSES = [[30], [31, 32, 33, 34, 35, 36], [40, 41, 42], [43, 44, 45, 46, 47, 1, 2, 2]]


def written(prompts=PROMPTS, responses=RESPONSES, pad_id=0):
    """The Rollout that these texts would be, recorded log-probabilities aside."""
    ids, mask = left_pad(prompts, pad_id)
    T = max(map(len, responses))
    tail = torch.tensor([r + [pad_id] * (T - len(r)) for r in responses])
    tail_mask = torch.tensor([[True] * len(r) + [False] * (T - len(r)) for r in responses])
    return Rollout(
        torch.cat([ids, tail], 1),
        torch.cat([mask, tail_mask], 1),
        torch.cat([torch.zeros_like(mask), tail_mask], 1),
        torch.zeros(tail.shape),
        torch.zeros(len(ids), dtype=torch.bool),
    )


def full(log_p, log_q, y):
    return {"loss": full_vocab(log_p, log_q), **diagnose(log_p, log_q, y, 4)}


def paired(student, teacher, *, budget=10_000, vocab=VOCAB, **settings):
    """The Pair of two models without tokenizers."""
    return Pair(
        student,
        teacher,
        None,
        dict(eos_ids=[2], merge_ends=True, pad_id=0, vocab_size=vocab),
        (split(student, vocab), split(teacher, vocab)),
        torch.device("cpu"),
        micro_batch_tokens=budget,
        **settings,
    )


def graded(student, teacher, r, per_position=full, *, budget=10_000, vocab=VOCAB, **options):
    """{name: (B, T)} of a whole rollout, NaN outside the responses."""
    return paired(student, teacher, budget=budget, vocab=vocab).grade(r, per_position, **options)


def gradients(student, teacher, r, per_position=full, *, scale=None, **options):
    """Gradients of the token mean: the step's whole token count is the only denominator, {parameter: gradient}."""
    student.zero_grad()
    graded(student, teacher, r, per_position, scale=scale or 1 / r.response_mask.sum(), **options)
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


TEACHER = {"hidden": 16, "layers": 3}


def models(architecture):
    """A student and a frozen teacher of another width and depth."""
    return tiny(architecture), tiny(architecture, seed=1, **TEACHER).requires_grad_(False)


# --- do the two fit? -----------------------------------------------------------------------------------------------


def fitting(**changes):
    """Arguments of check_pair for a student and a teacher whose heads are padded to different sizes."""
    made = {
        "student": tiny("llama", vocab_size=len(WORDS) + 4),
        "teacher": tiny("llama", vocab_size=len(WORDS) + 9),
        "student_tokenizer": word_tokenizer(),
        "teacher_tokenizer": word_tokenizer(),
    }
    return {**made, **changes}


def test_a_fitting_pair_gives_the_number_of_real_tokens_in_silence():
    """Heads padded to different sizes are cut to the tokens that exist
    (Qwen2.5: 151,936 and 152,064 rows for 151,665)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_pair(**fitting()) == len(WORDS)


def test_tokenizers_that_disagree_are_refused_with_the_first_tokens_named():
    """Same words, two ids exchanged, one word more: the lowest ids stand in the message (trl#4393, #5885)."""
    words = list(WORDS)
    words[7], words[8] = words[8], words[7]
    other = word_tokenizer(words + ["um"])
    first = "3 token ids: 'add' (student 7, teacher 8), 'the' (student 8, teacher 7), 'um' (student absent, teacher 16)"
    with pytest.raises(ValueError, match=re.escape(first)):
        check_pair(**fitting(teacher_tokenizer=other))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_with_fewer_rows_than_tokens_is_refused(role):
    """Its checkpoint belongs to another tokenizer."""
    with pytest.raises(ValueError, match="12 .*output rows for 16 tokens"):
        check_pair(**fitting(**{role: tiny("llama", vocab_size=12)}))


def test_a_stray_token_without_a_row_is_cut_with_a_warning():
    """Gemma 3 1B: <image_soft_token> has an id and no output row; the pair is good without it,
    unless it ends a response.
    """
    words = WORDS + [f"w{i}" for i in range(200)]
    pair = dict(
        student=tiny("llama", vocab_size=len(words)),
        teacher=tiny("llama", vocab_size=len(words) - 1),
        student_tokenizer=word_tokenizer(words),
        teacher_tokenizer=word_tokenizer(words),
    )
    with pytest.warns(
        UserWarning,
        match=re.escape(
            "no output row for 1 tokens, which can be neither sampled nor scored: ['w199']"
        ),
    ):
        assert check_pair(**pair) == len(words) - 1
    pair["student"].generation_config.eos_token_id = len(words) - 1
    with pytest.raises(
        ValueError,
        match="token 215 ends a response, .*output rows for 215 tokens; mend eos_token_id",
    ):
        check_pair(**pair)


def ending_with(ids):
    model = tiny("llama", vocab_size=len(WORDS))
    model.generation_config.eos_token_id = ids
    return model


def padding_with(token):
    tokenizer = word_tokenizer()
    tokenizer.pad_token = token
    return tokenizer


def test_a_pair_that_ends_otherwise_is_warned_of():
    """Other eos ids (ms-swift#9526: length explosion): the pair goes on, with one warning."""
    with pytest.warns(UserWarning) as caught:
        assert check_pair(**fitting(teacher=ending_with([2, 14]))) == len(WORDS)
    assert len(caught) == 1
    assert "student ends a response with ['[EOS]'], teacher with ['[EOS]', 'so']" in str(
        caught[0].message
    )


@pytest.mark.parametrize(
    "theirs, message",
    [
        (padding_with("so"), "special tokens of only one of the two: ['[PAD]', 'so']"),
        (
            word_tokenizer(chat_template=TEMPLATE),
            "chat templates differ: both models read the student's text",
        ),
    ],
)
def test_tokenizers_that_work_but_may_surprise_are_warned_of(theirs, message):
    """Other special tokens, or another template, of the same tokens."""
    assert list(surprises(word_tokenizer(), theirs)) == [message]
    assert not list(surprises(word_tokenizer(), word_tokenizer()))


@pytest.mark.parametrize(
    "generation, config, token, expected",
    [
        ([5, 6], None, "[EOS]", {2, 5, 6}),
        (5, 6, "[EOS]", {2, 5, 6}),
        (None, [6, 7], None, {6, 7}),
        (None, None, None, set()),
    ],
)
def test_every_eos_id_is_found(generation, config, token, expected):
    """One id, a list or none, from generation config, config and tokenizer
    (trl#7039: only one was honoured; trl#5725: None)."""
    model, tokenizer = tiny("llama"), word_tokenizer()
    model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token = (
        generation,
        config,
        token,
    )
    assert eos_ids(model, tokenizer) == expected


def test_loaded_models_are_in_eval_mode_and_the_teacher_is_frozen(tmp_path):
    """load gives what was saved, without dropout; a Pair leaves no parameter of the teacher that could learn."""
    saved, ids = tiny("gpt2", vocab_size=len(WORDS)), torch.arange(5)[None]
    saved.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert not model.training and torch.equal(
        model(input_ids=ids).logits, saved(input_ids=ids).logits
    )
    pair = Pair.of(saved, model, word_tokenizer(), word_tokenizer())
    assert not pair.teacher.training and not any(p.requires_grad for p in pair.teacher.parameters())
    assert all(p.requires_grad for p in pair.student.parameters())


# --- trunk and head ------------------------------------------------------------------------------------------------


def test_trunk_and_head_are_the_models_own_logits(model):
    """head(trunk(x)) = logits over the first V tokens, under left padding as without (trl#6800, transformers#18388:
    GPT-2's learned positions)."""
    trunk, head, own_logits = split(model, VOCAB - 8)
    assert not own_logits
    ids, mask = left_pad(PROMPTS, 0)
    made = head(trunk(ids, mask))
    for row, prompt in enumerate(PROMPTS):
        close(
            made[row, -len(prompt) :],
            model(input_ids=torch.tensor([prompt])).logits[0, :, : VOCAB - 8],
        )


def test_a_bias_of_the_head_is_part_of_it():
    """A head with a bias is cut along with its weight."""
    model, ids = tiny("llama"), torch.arange(10)[None]
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB))
    trunk, head, own_logits = split(model, VOCAB - 8)
    assert not own_logits
    close(
        head(trunk(ids, torch.ones_like(ids, dtype=torch.bool))),
        model(input_ids=ids).logits[..., : VOCAB - 8],
    )


def test_soft_capped_logits_are_found_out_and_kept():
    """Gemma 2 does more than a linear head: its own logits are taken, with a warning, and graded like any other."""
    model, ids = tiny("gemma2"), torch.arange(10)[None]
    with pytest.warns(UserWarning, match="Gemma2ForCausalLM does more than a linear output head"):
        trunk, head, own_logits = split(model, VOCAB - 8)
    own = model(input_ids=ids).logits[..., : VOCAB - 8]
    assert own_logits and own.abs().max() <= 2
    close(head(trunk(ids, torch.ones_like(ids, dtype=torch.bool))), own)
    with pytest.warns(UserWarning, match="linear output head"):
        ours = graded(model, tiny("llama"), written())
    log_p = (
        plain(model, 1).log_softmax(-1).gather(-1, torch.tensor(RESPONSES[1])[:, None]).squeeze(-1)
    )
    close(ours["log_p"][1, : len(log_p)], log_p.detach())


def padded_with_junk(architecture, model, **size):
    """The same model with eight rows of large weights more."""
    wide = tiny(architecture, seed=9, vocab_size=VOCAB + 8, **size)
    with torch.no_grad():
        for name, p in wide.named_parameters():
            rows = len(model.get_parameter(name))
            p[:rows], p[rows:] = model.get_parameter(name), 100 * p[rows:]
    return wide


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_padded_vocabulary_columns_change_nothing(architecture, padded):
    """Junk rows at the end of either head, with large weights: the same loss, diagnostics and gradients
    (fact 7; Qwen2.5's 151,936 and 152,064 rows: trl#2215, #3028, #6252, #6457, LMOps#286, #331, torchtune#2119, #2416,
    #2598, Qwen3#292)."""
    both = dict(zip(("student", "teacher"), models(architecture), strict=True))
    wide = padded_with_junk(
        architecture, both[padded], **{"student": {}, "teacher": TEACHER}[padded]
    )
    one, other, r = both.values(), {**both, padded: wide}.values(), written()
    close(graded(*other, r), graded(*one, r))
    of_wide, of_narrow = gradients(*other, r), gradients(*one, r)
    close({name: g[: len(of_narrow[name])] for name, g in of_wide.items()}, of_narrow)
    assert not any(g[len(of_narrow[name]) :].any() for name, g in of_wide.items())


# --- states and micro-batches --------------------------------------------------------------------------------------


def test_states_are_those_before_each_response_token(model):
    """Packed row by row, the state at t - 1 for token t (ms-swift#8436: logits and labels unshifted)."""
    r = written()
    trunk, *_ = split(model, VOCAB)
    expected = []
    for row in range(len(PROMPTS)):
        text = torch.tensor([PROMPTS[row] + RESPONSES[row]])
        h = trunk(text, torch.ones_like(text, dtype=torch.bool))[0]
        expected += [h[len(PROMPTS[row]) + t - 1] for t in range(len(RESPONSES[row]))]
    close(states(trunk, r.ids, r.attention_mask, r.is_response), torch.stack(expected))


@pytest.mark.parametrize("budget", [1, 9, 20, 30, 47, 10_000])
def test_micro_batches_deal_out_every_row_once_within_the_budget(budget):
    """Each row whole and once, the response marked, no column that is padding throughout,
    at most `budget` tokens or one row."""
    r, dealt = written(pad_id=30), []  # pad: a response token too
    for rows, columns in micro_batches(r.attention_mask, budget):
        ids, mask, is_response = (
            x[rows, columns] for x in (r.ids, r.attention_mask, r.is_response)
        )
        assert mask.numel() <= budget or len(rows) == 1
        assert mask.any(0).all()
        for row, i, m, s in zip(rows, ids, mask, is_response, strict=True):
            assert (
                i[m].tolist() == PROMPTS[row] + RESPONSES[row] and i[s].tolist() == RESPONSES[row]
            )
            dealt.append(row)
    assert sorted(dealt) == list(range(len(PROMPTS)))


def test_micro_batches_keep_rows_of_like_length_together():
    """A long row does not pad short ones: 4 rows of 2 and 4 of 20 tokens make 4 parts at 44 tokens,
    without a padded token."""
    mask = written([[3]] * 8, [[5], [6] * 19] * 4).attention_mask
    parts = [mask[rows, columns] for rows, columns in micro_batches(mask, 44)]
    assert [part.shape for part in parts] == [(2, 20), (2, 20), (4, 2)] and all(
        part.all() for part in parts
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("budget", [1, 20])
def test_any_budget_gives_the_same_loss_and_gradients(architecture, budget):
    """One batch of 4 = 4 micro-batches of 1 = some of 2, unequal lengths, one denominator
    (trl#6006, #4719; easydistill#16)."""
    student, teacher = models(architecture)
    r = written()
    close(graded(student, teacher, r, budget=budget), graded(student, teacher, r))
    close(gradients(student, teacher, r, budget=budget), gradients(student, teacher, r))


# --- grade against plain single rows -------------------------------------------------------------------------------


def plain(model, row):
    """Logits that predict the response tokens of one row, from the unpadded text alone: (T_row, V)."""
    prompt, response = PROMPTS[row], RESPONSES[row]
    return model(input_ids=torch.tensor([prompt + response])).logits[
        0, len(prompt) - 1 : -1, :VOCAB
    ]


def test_grade_is_a_loop_over_unpadded_rows(architecture):
    """Mixed lengths in one batch = single texts, value and gradients of the token mean (allen3325: trained on prompt
    and after eos; trl#7024, optipfair#34). Student and teacher differ in width and depth."""
    student, teacher = models(architecture)
    ours, of_ours = graded(student, teacher, written()), gradients(student, teacher, written())
    student.zero_grad()
    losses = []
    for row, response in enumerate(RESPONSES):
        log_p, log_q = (plain(model, row).log_softmax(-1) for model in (student, teacher))
        losses.append(full_vocab(log_p, log_q))
        expected = full(log_p.detach(), log_q.detach(), torch.tensor(response))
        close({name: x[row, : len(response)] for name, x in ours.items()}, expected)
    torch.cat(losses).mean().backward()
    close(of_ours, {name: p.grad for name, p in student.named_parameters() if p.grad is not None})


def test_padding_and_other_rows_change_nothing(architecture):
    """Losses and gradients do not see the pad id (bit for bit), and no row sees the others or their prompts
    (trl#2058, #7024)."""
    student, teacher = models(architecture)
    bits = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
    one, of_one = graded(student, teacher, written()), gradients(student, teacher, written())
    for other in (written(pad_id=30), written(pad_id=2)):
        bits(graded(student, teacher, other), one)
        bits(gradients(student, teacher, other), of_one)
    crowd = written(PROMPTS[:1] + [[9] * 20], RESPONSES[:1] + [[8] * 15])
    alone = graded(student, teacher, crowd)
    close({name: x[0, 0] for name, x in alone.items()}, {name: x[0, 0] for name, x in one.items()})


def test_only_states_that_predict_response_tokens_get_a_gradient():
    """Neither prompt nor padding nor the last token is trained on
    (trl#6006), and there are as many losses as response tokens."""
    r = written()
    ((rows, _),) = micro_batches(r.attention_mask, 10_000)
    h = torch.randn(*r.ids.shape, 8, requires_grad=True)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, VOCAB)
    pair = paired(tiny("llama"), tiny("llama", seed=1))
    pair.splits = (Split(lambda ids, mask: h, head, False), pair.splits[1])
    out = pair.grade(r, full, scale=1.0)
    assert (~out["loss"].isnan()).sum() == r.response_mask.sum() == sum(map(len, RESPONSES))
    trained = torch.zeros_like(r.is_response)
    for i, row in enumerate(rows):
        first = len(r.ids[0]) - r.response_mask.size(1)
        trained[i, first - 1 : first - 1 + len(RESPONSES[row])] = True
    assert torch.equal(h.grad.abs().sum(-1) > 0, trained)


def test_rollouts_without_a_response_token_leave_zero_gradients():
    """No position counts, nothing is divided by nothing (LMOps#38; distillm and trl: 0/0, then NaN)."""
    student, teacher = models("llama")
    r = written()
    r.attention_mask &= ~r.is_response
    r.is_response = torch.zeros_like(r.is_response)
    out = paired(student, teacher, budget=20).grade(r, full, scale=1.0)
    assert all(x.isnan().all() for x in out.values())
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


# --- the plain form ------------------------------------------------------------------------------------------------


def test_log_probs_are_those_of_single_unpadded_rows(model):
    """log softmax of the states before each response token, packed row by row, cut to the shared vocabulary."""
    r = written()
    expected = torch.cat(
        [plain(model, row)[:, : VOCAB - 8] / 0.7 for row in range(len(PROMPTS))]
    ).log_softmax(-1)
    close(
        log_probs(
            model, r.ids, r.attention_mask, r.is_response, vocab_size=VOCAB - 8, temperature=0.7
        ),
        expected,
    )


@pytest.mark.parametrize("budget, chunk", [(10_000, None), (20, 3), (1, 1)])
@pytest.mark.parametrize("temperature, teacher_temperature", [(1.0, 1.0), (0.7, 2.0)])
def test_grade_is_its_plain_twin(architecture, budget, chunk, temperature, teacher_temperature):
    """Pair.grade = log_probs of both models and the loss on whole tensors: log p(y), entropies, losses and gradients,
    at each of the N response tokens, however it is cut."""
    student, teacher = models(architecture)
    r, V, seen = written(), VOCAB - 8, []
    r.ids %= V

    def per_position(log_p, log_q, y):
        seen.append(len(y))
        entropies = [-(x.exp() * x).sum(-1) for x in (log_p, log_q)]
        return {
            "loss": top_k(log_p, log_q, 4),
            "log_p": log_p.gather(-1, y[:, None]).squeeze(-1),
            "H_p": entropies[0],
            "H_q": entropies[1],
        }

    pair = paired(student, teacher, budget=budget, vocab=V, chunk=chunk)
    grid = pair.grade(
        r, per_position, scale=1.0, temperature=temperature, teacher_temperature=teacher_temperature
    )
    of_grade = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    assert sum(seen) == r.response_mask.sum() == sum(map(len, RESPONSES))  # N, each once
    of_r = (r.ids, r.attention_mask, r.is_response)
    log_p = log_probs(student, *of_r, vocab_size=V, temperature=temperature)
    log_q = log_probs(teacher, *of_r, vocab_size=V, temperature=teacher_temperature)
    expected = per_position(log_p, log_q, r.ids[r.is_response])
    assert grid.keys() == expected.keys()
    for name, x in expected.items():
        assert (
            grid[name].shape == r.response_mask.shape and grid[name][~r.response_mask].isnan().all()
        )
        close(grid[name][r.response_mask], x.detach())
    expected["loss"].sum().backward()
    close(of_grade, {name: p.grad for name, p in student.named_parameters()})


def test_what_is_only_measured_leaves_no_gradient():
    """Without a scale the student learns nothing; without the teacher it is not read."""
    student, teacher = models("llama")
    graded(student, teacher, written())
    assert all(p.grad is None for p in student.parameters())
    teacher.base_model.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was read"))
    pair = Pair(
        student,
        teacher,
        None,
        dict(eos_ids=[], merge_ends=False),
        (split(student, VOCAB), None),
        torch.device("cpu"),
    )
    pair.splits = (pair.splits[0], Split(teacher.base_model, None, False))
    given = []
    pair.grade(
        written(),
        lambda log_p, log_q, y: given.append(log_q) or {"loss": log_p[:, 0]},
        with_teacher=False,
    )
    assert given == [None]


def test_scale_multiplies_the_gradient():
    """Twice the scale, twice the gradient; the values stay those of single positions."""
    student, teacher = models("llama")
    one, two = (
        gradients(student, teacher, written(), scale=scale, budget=20) for scale in (1.0, 2.0)
    )
    close(two, {name: 2 * g for name, g in one.items()})
    close(graded(student, teacher, written(), scale=2.0), graded(student, teacher, written()))


def test_whole_numbers_and_vectors_have_their_grid_too():
    """A value a position may be an id, 0 where there is none, or a row of numbers."""
    r = written()
    out = graded(
        *models("llama"),
        r,
        lambda log_p, log_q, y: {"loss": log_p[:, 0], "y": y, "three": log_p[:, :3]},
        budget=20,
    )
    assert torch.equal(
        out["y"], torch.where(r.response_mask, r.ids[:, -r.response_mask.size(1) :], 0)
    )
    assert (
        out["three"].shape == (*r.response_mask.shape, 3)
        and out["three"][~r.response_mask].isnan().all()
    )
    close(out["three"][..., 0], out["loss"])


# --- what is written, what is given --------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_shares_of_the_processes_are_the_whole(world):
    """Of several processes each writes to every so many-th prompt what one alone would have written to it."""
    pair = paired(*[model.double() for model in models("llama")])
    whole = pair.write(PROMPTS, n=2, max_new_tokens=8, seed=3)
    rows = [whole.response_ids(row) for row in range(len(whole.ids))]
    for rank in range(min(world, len(PROMPTS))):
        part = pair.write(PROMPTS, n=2, max_new_tokens=8, seed=3, share=(rank, world))
        mine = [2 * i + j for i in range(rank, len(PROMPTS), world) for j in range(2)]
        assert [part.response_ids(row) for row in range(len(part.ids))] == [rows[i] for i in mine]
        for row, i in enumerate(mine):
            close(part.log_p[row, : len(rows[i])], whole.log_p[i, : len(rows[i])])


def test_another_model_writes_and_another_seed_draws():
    """The student writes where nothing is said; every prompt has a seed of its own that follows from the seed."""
    student, teacher = models("llama")
    pair = paired(student, teacher)
    texts = lambda seed, model=None: [  # noqa: E731
        r.response_ids(row)
        for r in [pair.write([[5, 6]] * 4, max_new_tokens=8, seed=seed, model=model)]
        for row in range(4)
    ]
    assert texts(0) == texts(0, student) != texts(1) and texts(0) != texts(0, teacher)
    assert len(set(map(tuple, texts(0)))) > 1


def test_given_texts_are_a_rollout():
    """Conversations as if the student had written them: the same grid, graded the same."""
    student, teacher = models("llama")
    ours, expected = paired(student, teacher).given(list(zip(PROMPTS, RESPONSES))), written()
    for field in ("ids", "attention_mask", "is_response", "response_mask"):
        assert torch.equal(getattr(ours, field), getattr(expected, field)), field
    assert [ours.response_ids(row) for row in range(len(PROMPTS))] == RESPONSES
    close(graded(student, teacher, ours), graded(student, teacher, expected))


def test_a_pair_computes_in_the_dtype_of_its_autocast():
    """Rollout and grades under one autocast: what was sampled in bfloat16 is scored in bfloat16, by both models."""
    student, teacher = models("llama")
    pair, dtypes = (
        paired(student, teacher, autocast=lambda: torch.autocast("cpu", torch.bfloat16)),
        [],
    )
    for model in (student, teacher):
        model.get_output_embeddings().register_forward_hook(
            lambda _, args, z: dtypes.append(z.dtype)
        )
    r = pair.write(PROMPTS, n=2, max_new_tokens=6, seed=0)
    steps = len(dtypes)
    log_p = pair.grade(r, full, scale=1.0)["log_p"]
    assert (
        set(dtypes) == {torch.bfloat16}
        and len(dtypes) > steps == 6
        and log_p.dtype == torch.float32
    )
    assert (log_p.nan_to_num() - r.log_p).abs().max() < 0.3
    assert all(p.grad.dtype == torch.float32 for p in student.parameters())


# --- the teacher ---------------------------------------------------------------------------------------------------


def test_the_teacher_gets_no_gradient_even_unfrozen(architecture):
    """Its forward is under no_grad, its side of the loss detached."""
    student, teacher = tiny(architecture), tiny(architecture, seed=1)
    assert gradients(student, teacher, written())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    "objective",
    [
        lambda log_p, log_q, y: {"loss": full_vocab(log_p, log_q)},
        lambda log_p, log_q, y: {"loss": top_k(log_p, log_q, 4)},
        lambda log_p, log_q, y: {"loss": sampled_token(log_p, log_q, y)},
    ],
    ids=["full", "top-k", "sampled"],
)
def test_the_teacher_decides_the_gradient(architecture, objective):
    """Another teacher, another gradient (ms-swift#6857, atropos#456, #464);
    the student itself as teacher: loss 0, no gradient."""
    student = tiny(architecture)
    one, other = (
        gradients(student, tiny(architecture, seed=seed), written(), objective) for seed in (1, 2)
    )
    assert max((one[name] - other[name]).abs().max() for name in one) > 1e-3
    twin = tiny(architecture)
    assert not graded(student, twin, written(), objective)["loss"].nansum()
    assert (
        max(g.abs().max() for g in gradients(student, twin, written(), objective).values()) < 1e-5
    )


@pytest.mark.parametrize("budget", [20, 10_000])
def test_the_teacher_reads_each_micro_batch_once(budget):
    """One forward a micro-batch, the loss's backward included, and it reads exactly the student's ids
    (trl#4560; ms-swift#9414)."""
    student, teacher = models("qwen3")
    pair, seen = paired(student, teacher, budget=budget), {"student": [], "teacher": []}
    for name, model in (("student", student), ("teacher", teacher)):

        def record(_, args, kwargs, name=name):
            seen[name].append((kwargs["input_ids"], kwargs["position_ids"]))

        model.base_model.register_forward_pre_hook(record, with_kwargs=True)
    pair.grade(written(), full, scale=1.0)
    assert len(seen["teacher"]) == len(list(micro_batches(written().attention_mask, budget)))
    torch.testing.assert_close(seen["teacher"], seen["student"], rtol=0, atol=0)


def test_architectures_may_differ():
    """Whatever shares the vocabulary can teach: another architecture, width, depth and number of padded rows."""
    student, teacher = (
        tiny("gpt2", vocab_size=VOCAB + 3),
        tiny("gemma3", vocab_size=VOCAB + 7, **TEACHER),
    )
    ours = graded(student, teacher, written(), budget=20)
    for row, response in enumerate(RESPONSES):
        log_p, log_q = (plain(model, row).log_softmax(-1).detach() for model in (student, teacher))
        close(
            {name: x[row, : len(response)] for name, x in ours.items()},
            full(log_p, log_q, torch.tensor(response)),
        )


@pytest.mark.parametrize("temperature, teacher_temperature", [(1.0, 1.0), (0.7, 1.0), (0.7, 2.0)])
def test_what_was_sampled_is_what_is_graded(architecture, temperature, teacher_temperature):
    """At the sampling temperature log p(y) of grade equals what rollout recorded: a ratio of 1 on the first update
    (Qwen3#1799); the teacher's temperature is its own (trl GKD, slime#2085)."""
    student, teacher = models(architecture)
    r = rollout(
        student,
        PROMPTS,
        n=2,
        max_new_tokens=8,
        temperature=temperature,
        eos_ids=range(0, VOCAB, 6),
        seeds=[0, 1, 2, 3],
    )
    ours = graded(
        student, teacher, r, temperature=temperature, teacher_temperature=teacher_temperature
    )
    torch.testing.assert_close(ours["log_p"].nan_to_num(), r.log_p, rtol=0, atol=1e-4)
    logits = teacher(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1]
    log_q = (logits / teacher_temperature).log_softmax(-1)[r.response_ids(2)[0]]
    assert (ours["reward"] + ours["log_p"])[2, 0].item() == pytest.approx(log_q.item(), abs=1e-4)


def kept_for_backward(student, teacher, r):
    """Bytes of what autograd keeps of the trunk until its backward, each tensor once, weights aside."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in student.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    pair = paired(student, teacher)
    (trunk, *others), of_teacher = pair.splits

    def watched(*args):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return trunk(*args)

    pair.splits = Split(watched, *others), of_teacher
    pair.grade(r, full, scale=1.0)
    return sum(kept.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpointed_layers_give_the_same_gradients_from_less_memory(architecture):
    """transformers checkpoints in training mode alone, which dropout and rollout read too: the model stays in eval
    mode, writes the same tokens, has the same gradients, and keeps less after a rollout too (trl#6827).
    """
    student, teacher = models(architecture)
    how = dict(n=2, max_new_tokens=6, eos_ids=(), seeds=[0, 1, 2, 3])
    before = rollout(student, PROMPTS, **how)
    plain, kept = gradients(student, teacher, before), kept_for_backward(student, teacher, before)
    checkpoint_layers(student)
    after = rollout(student, PROMPTS, **how)
    assert (
        not student.training
        and torch.equal(before.ids, after.ids)
        and torch.equal(before.log_p, after.log_p)
    )
    close(gradients(student, teacher, after), plain)
    assert kept_for_backward(student, teacher, before) < 0.5 * kept


def test_a_checkpointed_layer_does_not_drop_out():
    """A layer that reads its own training flag for dropout, as OPT's does, would no longer be scored as it sampled."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            ffn_dim=64,
            dropout=0.5,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        )
    ).eval()
    r = written()
    plain = gradients(model, tiny("llama"), r)
    checkpoint_layers(model)
    close(gradients(model, tiny("llama"), r), plain)


def test_what_has_no_layers_to_checkpoint_is_refused():
    with pytest.raises(ValueError, match="leave --gradient-checkpointing out"):
        checkpoint_layers(torch.nn.Linear(2, 2))


def test_a_teacher_is_placed_by_transformers(tmp_path):
    """--teacher-device-map: the same grades; without accelerate one line says what to install."""
    tiny("llama", vocab_size=len(WORDS)).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    try:
        import accelerate  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install accelerate"):
            Pair.load(tmp_path, tmp_path, device="cpu", teacher_device_map="auto")
        return
    pair = Pair.load(tmp_path, tmp_path, device="cpu", teacher_device_map="auto")
    ids = torch.arange(6).unsqueeze(0)
    assert torch.equal(pair.teacher(ids).logits, pair.student(ids).logits)
