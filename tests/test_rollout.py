"""Laws of rollout.py, on four architectures: what is drawn, what is recorded of it, where a response ends."""

import copy
import math
import warnings

import pytest
import torch
from conftest import VOCAB, WINDOW, tiny

from plumbing.slots import fastest
from rollout import Waves, draw, left_pad, position_ids, rollout
from teacher import log_probs

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [3, 4, 13, 14]]  # of uneven length
LENGTH = 8
SEED = 10  # with it responses end early and late on all four architectures


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_seeds(count, seed=SEED):
    """A seed a prompt."""
    return torch.randint(2**62, (count,), generator=seeded(seed)).tolist()


def sample(
    model, prompts=PROMPTS, *, eos_ids=(), seed=SEED, n=3, seeds=None, decoder=fastest, **options
):
    return rollout(
        model,
        prompts,
        n=n,
        max_new_tokens=LENGTH,
        eos_ids=eos_ids,
        seeds=seeds or some_seeds(len(prompts), seed),
        decoder=decoder,
        **options,
    )


def responses(r):
    return [r.response_ids(row) for row in range(len(r.ids))]


def common(r, count=3):
    """Token ids that end some rows of a rollout early and at different times: its most frequent ones."""
    return (
        torch.bincount(r.ids[:, -LENGTH:].flatten(), minlength=VOCAB).topk(count).indices.tolist()
    )


def same(a, b):
    """Two rollouts agree bit for bit in every field."""
    return all(torch.equal(getattr(a, field), getattr(b, field)) for field in vars(a))


@torch.no_grad()
def unpadded(model, prompt, response, temperature):
    """Log-probabilities of a response, a token at a time, each from a fresh forward over the tokens before it."""
    found = []
    for t, token in enumerate(response):
        logits = model(input_ids=torch.tensor([prompt + response[:t]])).logits[0, -1]
        found.append((logits / temperature).log_softmax(-1)[token])
    return torch.stack(found)


# --- what is recorded is what is scored ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_log_probs_are_those_of_a_plain_loop_and_of_rescoring(model, temperature):
    """Sampling with cache, left padding and departures = one whole forward = a token at a time without padding; the
    first token is scored at the last prompt position (trl#6126, prime-rl#1525: off by one; trl#6800: positions under
    left padding)."""
    assert min(map(len, PROMPTS)) < WINDOW < LENGTH
    eos_ids = common(sample(model, temperature=temperature))
    r = sample(model, temperature=temperature, eos_ids=eos_ids)
    assert len(r.response_mask.sum(1).unique()) > 2
    for row, response in enumerate(responses(r)):
        alone = unpadded(model, PROMPTS[row // 3], response, temperature)
        torch.testing.assert_close(r.log_p[row, : len(response)], alone, rtol=0, atol=1e-4)
    with torch.no_grad():
        log_p = log_probs(model, r.ids, r.attention_mask, r.is_response, temperature=temperature)
    rescored = log_p.gather(-1, r.ids[r.is_response][:, None]).squeeze(-1)
    torch.testing.assert_close(r.log_p[r.response_mask], rescored, rtol=0, atol=1e-4)
    assert not r.log_p[~r.response_mask].any()


def test_greedy_is_generate_token_for_token_batched_or_alone(model):
    """Temperature 0 = model.generate(do_sample=False) with the same eos ids;
    a row alone = the row in a batch (OPSD#30)."""
    eos_ids = common(sample(model, temperature=0))[1:]
    r = sample(model, n=1, temperature=0, eos_ids=eos_ids)
    assert len(r.response_mask.sum(1).unique()) > 1
    ids, mask = left_pad(PROMPTS, 0)
    made = model.generate(
        ids,
        attention_mask=mask.long(),
        do_sample=False,
        max_new_tokens=LENGTH,
        eos_token_id=eos_ids,
        pad_token_id=0,
    )
    for row, response in enumerate(responses(r)):
        assert response == made[row, ids.size(1) : ids.size(1) + len(response)].tolist()
        assert not made[row, ids.size(1) + len(response) :].any()
        assert (
            response
            == responses(
                sample(model, PROMPTS[row : row + 1], n=1, temperature=0, eos_ids=eos_ids)
            )[0]
        )


def test_nothing_deprecated_is_asked_of_transformers(model):
    """transformers 5.24 calls a cache `cache`: no warning on a newcomer's first screen, no surprise in 5.40."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(model)


def test_padding_changes_nothing(model):
    """Another pad id, more of it, or an eos as pad: the same tokens and log-probabilities (trl#2058)."""
    eos_ids = common(sample(model))
    r = sample(model, eos_ids=eos_ids)
    for pad_id in (1, eos_ids[0]):
        other = sample(model, eos_ids=eos_ids, pad_id=pad_id)
        assert (
            responses(other) == responses(r) and (other.ids[~other.attention_mask] == pad_id).all()
        )
        assert torch.equal(other.log_p, r.log_p) and torch.equal(
            other.attention_mask, r.attention_mask
        )
    longer = sample(model, PROMPTS + [[2] * 20], n=1, temperature=0)
    assert responses(longer)[:3] == responses(sample(model, n=1, temperature=0))


# --- who is in flight ----------------------------------------------------------------------------------------------


# a long prompt joins short ones, which have come less far than it is long
MANY = [
    [12],
    [21],
    [15, 16],
    [5, 6, 7, 8, 9, 10, 11],
    [17] * 30,
    [3, 4, 13, 14],
    [18, 19, 20],
    [22, 23],
]


def batches(model):
    """A list that gets the (rows, tokens) of every forward from now on."""
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("places", [1, 2, 3, 5])
@pytest.mark.parametrize("decoder", [Waves, fastest])
def test_a_response_does_not_depend_on_what_is_written_beside_it(model, decoder, places):
    """The fast path is the plain one: few in flight, the next prompts joining at once or (Gemma 3's sliding windows) in
    waves, give the very tokens of all in flight, since a token's uniform number is its own (in float64, where kernels
    round alike enough)."""
    model = model.double()
    eos_ids = common(sample(model, MANY, n=2), 6)[1:]
    whole, seen = sample(model, MANY, n=2, eos_ids=eos_ids), batches(model)
    few = sample(model, MANY, n=2, eos_ids=eos_ids, in_flight=2 * places + 1, decoder=decoder)
    for field in ("ids", "attention_mask", "response_mask", "truncated"):
        assert torch.equal(getattr(few, field), getattr(whole, field)), field
    torch.testing.assert_close(few.log_p, whole.log_p)
    assert max(rows for rows, _ in seen) <= 2 * places  # never more in flight
    assert len(few.response_mask.sum(1).unique()) > 2


def test_a_response_follows_from_its_prompt_and_its_seed(model):
    """Alone, among others or in another order: the same prompt with the same seed gets the same n responses."""
    model, seeds = model.double(), some_seeds(len(MANY))
    eos_ids = common(sample(model, MANY, n=2), 6)[1:]
    whole = responses(sample(model, MANY, n=2, eos_ids=eos_ids, seeds=seeds))
    for chosen in ([4], [7, 0, 3], list(reversed(range(len(MANY))))):
        some = sample(
            model, [MANY[i] for i in chosen], n=2, eos_ids=eos_ids, seeds=[seeds[i] for i in chosen]
        )
        assert responses(some) == [whole[2 * i + j] for i in chosen for j in range(2)]
    twice = responses(sample(model, [MANY[1]] * 2, n=2, seeds=seeds[:2]))
    assert twice[:2] != twice[2:]  # another seed, other responses


@torch.no_grad()
def one_by_one(model, prompt, u, eos_ids, temperature):
    """A response decoded without cache, batch or padding, each token drawn from a fresh forward by its own number."""
    response = []
    while len(response) < LENGTH and not set(response[-1:]) & set(eos_ids):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, -1].float()
        y = draw((logits / temperature).log_softmax(-1)[None], u[len(response) : len(response) + 1])
        response.append(y.item())
    return response


@pytest.mark.parametrize("in_flight", [None, 6])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("decoder", [Waves, fastest])
def test_the_tokens_are_those_of_one_by_one_decoding(model, decoder, temperature, in_flight):
    """Rows leave, others join and take their places: every response is what a plain loop would have drawn for it."""
    model, seeds = model.double(), some_seeds(len(MANY))
    eos_ids = common(sample(model, MANY, n=2), 6)[1:]
    r = sample(
        model,
        MANY,
        n=2,
        eos_ids=eos_ids,
        seeds=seeds,
        in_flight=in_flight,
        temperature=temperature,
        decoder=decoder,
    )
    for i, seed in enumerate(seeds):
        u = torch.rand(2, LENGTH, dtype=torch.float64, generator=seeded(seed))
        for j in range(2):
            assert r.response_ids(2 * i + j) == one_by_one(
                model, MANY[i], u[j], eos_ids, temperature
            )
    assert len(r.response_mask.sum(1).unique()) > 2


def test_one_prompt_at_least_is_in_flight():
    """Whole prompts: fewer rows than one prompt's n responses are not possible, and more are not written for that."""
    model = tiny("llama").double()
    whole, seen = sample(model, MANY, n=3), batches(model)
    few = sample(model, MANY, n=3, in_flight=1)
    assert torch.equal(few.ids, whole.ids) and max(rows for rows, _ in seen) == 3


@pytest.mark.parametrize("n, places", [(1, None), (3, 4), (2, 1)])
def test_everything_is_made_on_the_device_of_the_model(n, places):
    """Where the default device is another one ("meta" holds no numbers), the very same responses are written."""
    model, seeds = tiny("llama"), some_seeds(len(MANY))
    eos_ids = common(sample(model, MANY, n=n), 6)
    here = sample(model, MANY, n=n, eos_ids=eos_ids, in_flight=places)
    with torch.device("meta"):
        there = rollout(
            model, MANY, n=n, max_new_tokens=LENGTH, eos_ids=eos_ids, in_flight=places, seeds=seeds
        )
        assert len(rollout(model, MANY, max_new_tokens=1, eos_ids=()).ids) == len(
            MANY
        )  # seeds of its own
    assert same(here, there)


# --- what is drawn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.02, 0.2], ids=["near-uniform", "uneven"])
def test_tokens_are_drawn_from_the_whole_softmax(architecture, spread):
    """Chi-square of 4,000 first tokens; every token of a near-uniform model is drawn
    (nano-opd sampled with top_k=50 of generate)."""
    model, n, prompt = tiny(architecture, spread=spread), 4000, [5, 6, 7]
    y = rollout(model, [prompt], n=n, max_new_tokens=1, eos_ids=(), seeds=[0]).ids[:, -1]
    with torch.no_grad():
        expected = n * model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    counts = torch.bincount(y, minlength=VOCAB)
    if spread == 0.02:
        assert (counts > 0).all()
    rare = expected < 5  # pooled, as chi-square needs
    counts, expected = (
        torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts.float(), expected)
    )
    freedom = (~rare).sum() - 1 + rare.any()
    assert ((counts - expected) ** 2 / expected.clamp_min(1e-9)).sum() < freedom + 4 * (
        2 * freedom
    ) ** 0.5


def test_draw_inverts_the_cumulative_probability():
    """u below p(0) takes token 0, from there up to p(0) + p(1) token 1, ...; a token without probability never comes,
    one of 1e-12 does."""
    log_p = torch.tensor([0.0, 0.25, 0.0, 0.25, 0.5, 0.0]).log()
    u = torch.tensor([0.0, 0.2499, 0.25, 0.4999, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(log_p.repeat(6, 1), u).tolist() == [1, 1, 3, 3, 4, 4]
    log_p = torch.tensor([[1 - 1e-12, 1e-12]], dtype=torch.float64).log().float()
    assert draw(log_p, torch.tensor([1 - 1e-13], dtype=torch.float64)).item() == 1


def test_draw_takes_the_smallest_set_that_holds_top_p():
    """Tokens are kept while the mass before them is below top_p; within the set, odds stay as they were."""
    log_p = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log().repeat(20_000, 1)
    u = torch.rand(20_000, dtype=torch.float64, generator=seeded())
    for top_p, expected in (
        (0.4, [0.0, 1, 0, 0]),
        (0.6, [0, 5 / 8, 0, 3 / 8]),
        (0.81, [15 / 95, 50 / 95, 0, 30 / 95]),
        (1.0, [0.15, 0.5, 0.05, 0.3]),
    ):
        share = torch.bincount(draw(log_p, u, top_p), minlength=4) / len(log_p)
        torch.testing.assert_close(share, torch.tensor(expected), rtol=0, atol=0.02)
        assert not share[torch.tensor(expected) == 0].any()


def test_the_smallest_set_is_no_larger_where_it_holds_top_p_exactly():
    """Where half of the mass is in the likeliest token, nothing beside it is drawn at top_p .5, and at .51 one more."""
    log_p = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log().repeat(64, 1)
    u = torch.arange(64).double() / 64
    assert [len(draw(log_p, u, top_p).unique()) for top_p in (0.49, 0.5, 0.51)] == [1, 1, 2]


def test_no_more_is_sorted_than_the_set_needs(monkeypatch):
    """The 1024 likeliest are enough for a sharp softmax, however large the vocabulary."""
    asked, topk = [], torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda x, k, *more: asked.append(k) or topk(x, k, *more)
    )
    sharp = torch.zeros(3, 300_000).index_fill(1, torch.tensor(7), 20.0).log_softmax(-1)
    assert draw(sharp, torch.tensor([0.1, 0.5, 0.9]).double(), 0.99).tolist() == [
        7,
        7,
        7,
    ] and asked == [1024]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_what_is_not_a_number_draws_a_token_all_the_same(top_p):
    """An id of the vocabulary, so that the loss is what reports it."""
    y = draw(torch.full((2, 5), math.nan), torch.tensor([0.0, 0.9]).double(), top_p)
    assert (y >= 0).all() and (y < 5).all()


def test_top_p_limits_the_draw_but_not_the_record(model):
    """Nothing outside the nucleus is drawn; log_p stays that of the full softmax, which is the one that is scored."""
    r = sample(model, n=20, top_p=0.5)
    for row in range(0, len(r.ids), 20):
        with torch.no_grad():
            p = model(input_ids=torch.tensor([PROMPTS[row // 20]])).logits[0, -1].softmax(-1)
        ranked = p.sort(descending=True)
        nucleus = set(ranked.indices[ranked.values.cumsum(0) - ranked.values < 0.5].tolist())
        assert {response[0] for response in responses(r)[row : row + 20]} <= nucleus
    for row in range(0, len(r.ids), 7):
        alone = unpadded(model, PROMPTS[row // 20], r.response_ids(row), 1.0)
        torch.testing.assert_close(r.log_p[row], alone, rtol=0, atol=1e-4)


def test_no_token_beyond_the_shared_vocabulary_is_drawn():
    """Rows of the head that pad the vocabulary (Qwen2.5: 151,936 or 152,064 for 151,665 tokens) get no probability."""
    model, shared = tiny("llama"), VOCAB - 8
    rows = model.get_output_embeddings().weight
    with torch.no_grad():
        rows[shared:] = 30 * torch.cat([rows[:4], -rows[:4]])  # one of each pair is huge
    assert (sample(model).ids[:, -LENGTH:] >= shared).any()
    for temperature in (1.0, 0.0):
        r = sample(model, vocab_size=shared, temperature=temperature)
        assert (r.ids < shared).all()
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1, :shared].log_softmax(-1)
    torch.testing.assert_close(r.log_p[0, 0], log_p.max(), rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_rollouts(model):
    """Twice the same call: the same bits, and other bits for another seed
    (transformers#45943, #48294: a second call lost requests)."""
    eos_ids = common(sample(model))
    assert same(sample(model, eos_ids=eos_ids), sample(model, eos_ids=eos_ids))
    assert responses(sample(model)) != responses(sample(model, seed=1))


def test_the_n_rollouts_of_a_prompt_stand_together(model):
    """Rows i n to i n + n - 1 answer prompt i, from its very ids
    (trl#6359: trained on another prompt than was sampled)."""
    r = sample(model)
    P = r.ids.size(1) - r.response_mask.size(1)
    ids, mask = left_pad(PROMPTS, 0)
    assert torch.equal(r.ids[:, :P], ids.repeat_interleave(3, 0))
    assert torch.equal(r.attention_mask[:, :P], mask.repeat_interleave(3, 0))
    assert len(set(map(tuple, responses(r)))) > len(PROMPTS)
    greedy = responses(sample(model, temperature=0))
    assert greedy == [greedy[row // 3 * 3] for row in range(len(greedy))]


def test_where_nothing_is_said_one_response_is_drawn_from_the_plain_softmax():
    """The defaults: one response a prompt, temperature 1, no top-p, no eos, pad id 0, all of the vocabulary and of the
    rows at once, and seeds from torch's own generator."""
    model = tiny("llama")
    seen = batches(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = rollout(model, MANY, max_new_tokens=LENGTH, eos_ids=())
        assert [rows for rows, _ in seen] == [len(MANY)] * LENGTH
        torch.manual_seed(0)
        said = rollout(
            model,
            MANY,
            n=1,
            max_new_tokens=LENGTH,
            temperature=1.0,
            top_p=1.0,
            eos_ids=(),
            pad_id=0,
            vocab_size=VOCAB,
            in_flight=len(MANY),
            seeds=torch.randint(2**62, (len(MANY),)).tolist(),
        )
    assert same(plain, said) and plain.truncated.all()


# --- where a response ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends, pad_is_eos", [(1, False), (1, True), (3, False), (3, True)])
def test_a_response_ends_with_its_first_eos(model, ends, pad_is_eos):
    """Any of several eos ids ends it (trl#7039), is part of it, and nothing after it is,
    with pad = eos too (trl#6357)."""
    eos_ids = common(sample(model), ends)
    r = sample(model, eos_ids=eos_ids, pad_id=eos_ids[0] if pad_is_eos else 0)
    ended_by = set()
    for row, response in enumerate(responses(r)):
        assert not set(response[:-1]) & set(eos_ids)
        assert r.truncated[row] == (response[-1] not in eos_ids) and (
            len(response) == LENGTH or not r.truncated[row]
        )
        assert (
            r.response_mask[row, : len(response)].all()
            and not r.response_mask[row, len(response) :].any()
        )
        ended_by |= {response[-1]} & set(eos_ids)
    assert ended_by == set(eos_ids)
    assert torch.equal(r.attention_mask[:, -r.response_mask.size(1) :], r.response_mask)
    assert r.response_mask.any(0).all()


def test_without_an_eos_every_response_is_full_and_truncated(model):
    """No eos id at all is no error (trl#5725)."""
    r = sample(model)
    assert r.response_mask.all() and r.response_mask.size(1) == LENGTH and r.truncated.all()


@pytest.mark.parametrize("in_flight", [None, 6])
def test_what_stands_after_an_end_is_padding(model, in_flight):
    """Ids of the padding, no probability, no mask."""
    eos_ids = common(sample(model, MANY))
    r = sample(model, MANY, eos_ids=eos_ids, in_flight=in_flight, pad_id=1)
    after = ~r.response_mask
    assert (
        after.any() and (r.ids[:, -after.size(1) :][after] == 1).all() and not r.log_p[after].any()
    )


def test_the_rectangle_is_as_wide_as_the_longest_response():
    """Where every row ends early nothing is padded beyond the last of them, and no row counts as truncated."""
    r = rollout(
        tiny("llama"), PROMPTS, n=2, max_new_tokens=LENGTH, eos_ids=range(VOCAB), seeds=[0, 1, 2]
    )
    assert (
        r.ids.size(1) == max(map(len, PROMPTS)) + 1
        and r.response_mask.all()
        and not r.truncated.any()
    )


def test_finished_rollouts_leave_the_batch(model):
    """The prompt is read once for its n rollouts, and each step computes only the rows that still write."""
    eos_ids, seen = common(sample(model)), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    r = sample(model, eos_ids=eos_ids)
    writing = [(r.response_mask.sum(1) > t).sum().item() for t in range(1, r.response_mask.size(1))]
    assert seen == [(3, 7)] + [(b, 1) for b in writing]
    assert writing[-1] < writing[0] < 9


# --- the model is left as it was; what is refused ------------------------------------------------------------------


def test_the_model_is_left_as_it_was(model):
    """Configuration, attention and mode are untouched (transformers#45943 switched _attn_implementation; trl#6827)."""

    def state():
        return copy.deepcopy(
            (
                model.config.to_dict(),
                model.generation_config.to_dict(),
                model.training,
                model.config._attn_implementation,
                [p.requires_grad for p in model.parameters()],
            )
        )

    before = state()
    sample(model)
    assert state() == before


def test_the_checkpoints_generation_defaults_are_not_read(model):
    """`generate` would take top_k, penalties and an eos from generation_config.json; what is scored is the plain
    softmax."""
    plain = sample(model)
    model.generation_config.update(
        do_sample=True,
        top_k=1,
        temperature=0.1,
        repetition_penalty=9.0,
        eos_token_id=plain.ids[0, -1].item(),
    )
    assert same(sample(model), plain)


def test_a_cache_is_used_whatever_the_checkpoint_says(model):
    """use_cache: false in config.json (training with checkpointing leaves it there) costs neither time nor memory: a
    token a row is fed, and the logits of one position are computed."""
    plain = sample(model)
    model.config.use_cache = False
    seen, scored = batches(model), []
    model.get_output_embeddings().register_forward_hook(lambda _, args, z: scored.append(z.size(1)))
    assert same(sample(model), plain)
    assert seen[0] == (3, 7) and set(seen[1:]) == {(9, 1)} and set(scored) == {1}


def test_training_mode_is_refused():
    """Dropout would sample from another softmax than the one scored."""
    with pytest.raises(ValueError, match="eval"):
        sample(tiny("gpt2").train())


@pytest.mark.parametrize("prompts", [[], [[5], []]])
def test_an_empty_prompt_is_refused(prompts):
    """There is no state to draw the first token from."""
    with pytest.raises(ValueError, match="at least one token"):
        sample(tiny("llama"), prompts)


def test_no_tokens_to_write_is_refused():
    """One token is the least that a response can have."""
    with pytest.raises(ValueError, match="max_new_tokens"):
        rollout(tiny("llama"), PROMPTS, max_new_tokens=0, eos_ids=())
    assert rollout(tiny("llama"), PROMPTS, max_new_tokens=1, eos_ids=()).response_mask.shape == (
        3,
        1,
    )


# --- small change --------------------------------------------------------------------------------------------------


def test_left_pad_and_position_ids_by_hand():
    """Positions count from the first real token of each row, and padding before it stands at 0."""
    ids, mask = left_pad([[5, 6, 7], [8]], 9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]] and mask.tolist() == [
        [True] * 3,
        [False, False, True],
    ]
    assert position_ids(mask).tolist() == [[0, 1, 2], [0, 0, 0]]
    assert position_ids(torch.tensor([[0, 1, 1, 1]]).bool()).tolist() == [[0, 0, 1, 2]]
