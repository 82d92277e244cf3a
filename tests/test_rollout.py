"""Laws of rollout.py: what is drawn, what is recorded of it, where a response ends.

test_slots.py holds plumbing/slots.py, which the commands use, to the same results.
"""

import collections
import copy
import itertools
import math
import warnings

import pytest
import torch
from conftest import VOCAB, WINDOW, WORDS, tiny, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from analysis import diagnose
from loss import full_vocab, top_k
from rollout import (
    batch,
    draw,
    from_texts,
    left_pad,
    merge_ends,
    position_ids,
    rollout,
    seed_of,
    uniform,
)
from teacher import grade, log_probs, make_pair, micro_batches, values_of

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [3, 4, 13, 14]]  # of uneven length
SEEDS = [10, 11, 12]
LENGTH = 8
LAST = 1 - 2**-53  # the largest number below 1
MAMBAS = {
    "mamba": (MambaConfig, MambaForCausalLM),
    "falcon_mamba": (FalconMambaConfig, FalconMambaForCausalLM),
}


def make(name):
    """A tiny model in float64, in which kernels round alike enough to draw the same tokens."""
    if name not in MAMBAS:
        return tiny(name).double()
    config, cls = MAMBAS[name]
    sizes = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "initializer_range": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(config(vocab_size=VOCAB, **sizes)).double().eval()


def sample(model, prompts=PROMPTS, *, n=3, eos_ids=(), seeds=None, **how):
    """Responses of at most LENGTH tokens."""
    seeds = seeds or SEEDS[: len(prompts)]
    return rollout(model, prompts, n=n, max_new_tokens=LENGTH, eos_ids=eos_ids, seeds=seeds, **how)


def responses(r):
    return [r.response_ids(row) for row in range(len(r.ids))]


def common(model, count, **how):
    """Tokens that end some responses early and at different times: all but the most frequent."""
    tokens = itertools.chain(*responses(sample(model, **how)))
    return [token for token, _ in collections.Counter(tokens).most_common(count + 1)[1:]]


def same(a, b):
    """Two rollouts agree bit for bit in every field."""
    return all(torch.equal(getattr(a, field), getattr(b, field)) for field in vars(a))


def inputs_of(model):
    """A list that gets the shape of every input from now on."""
    seen = []

    def note(module, args, kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def nucleus(p, top_p):
    """The smallest set of tokens with a mass of top_p, the likeliest first: list of int."""
    kept = []
    mass = 0.0
    for token in sorted(range(len(p)), key=lambda token: -p[token]):
        if mass < top_p:
            kept.append(token)
        mass += p[token]
    return kept


def token_at(p, u, order):
    """The first token of `order` at which their cumulated probability exceeds the share u."""
    share = u * sum(p[token] for token in order)
    cumulated = 0.0
    for token in order:
        cumulated += p[token]
        if cumulated > share:
            return token


@torch.no_grad()
def written_alone(
    model, prompt, u, *, eos_ids=(), merge=False, temperature=1.0, top_p=1.0, vocab_size=VOCAB
):
    """A response and its log-probabilities, each token from a fresh reading of all before it.

    There is no cache, no batch and no padding. u: (LENGTH,), a uniform number for each token.
    """
    response = []
    log_p = []
    while len(response) < LENGTH and not set(response) & set(eos_ids):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, -1, :vocab_size]
        p = (logits / (temperature or 1.0)).softmax(-1)
        if merge:
            together = p[list(eos_ids)].sum()
            p[list(eos_ids)] = 0
            p[eos_ids[0]] = together
        order = nucleus(p.tolist(), top_p) if top_p < 1 else range(vocab_size)
        token = token_at(p.tolist(), u[len(response)].item(), order)
        if temperature == 0:
            token = p.argmax().item()
        response.append(token)
        log_p.append(p[token].log().item())
    return response, log_p


# --- what is drawn and recorded is what a plain reading gives -----------------------------------

HOW = {  # the last two: how many of the likeliest tokens end a response, and which is the padding
    "no end": ({}, 0, 0),
    "one end": ({}, 1, 0),
    "several ends": ({"temperature": 0.7}, 4, 1),
    "the padding is an end": ({"n": 1}, 3, "end"),
    "merged ends": ({"merge": True, "temperature": 2.0}, 4, "end"),
    "a part of the vocabulary": ({"vocab_size": VOCAB - 8}, 3, 0),
    "top-p": ({"top_p": 0.6, "temperature": 0.7}, 3, 0),
    "greedy": ({"temperature": 0}, 2, 0),
}
NAMES = [
    "llama",
    "gemma3",
    "gpt2",
    "mamba",
    pytest.param("qwen3", marks=pytest.mark.slow),
    pytest.param("falcon_mamba", marks=pytest.mark.slow),
]
each_model = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize("how", HOW)
@each_model
def test_a_response_is_what_a_reading_token_by_token_draws(name, how):
    """Row i*n + j answers prompt i from its very ids, with random numbers from seed i alone.

    So it is the same whatever is written beside it, and however long that is. Any of several end
    tokens ends it and belongs to it, also if the padding is one; nothing after it counts. log_p is
    that of the whole softmax, under top-p as well; the first is that of the last prompt position.
    Rethinking-OPD#22: n is one way to fill a step, and n copies of a prompt are another.
    trl#2058, trl#5725, trl#6126, trl#6357, trl#6359, trl#6800, trl#7039, prime-rl#1525, OPSD#30;
    transformers#18388 (positions under left padding); transformers#46773, transformers#32677 (a
    mask of earlier columns reached Mamba's one token: 8.5 nats off).
    """
    options, ends, pad_id = HOW[how]
    model = make(name)
    n = options.get("n", 2)
    eos_ids = common(model, ends, **options)
    pad_id = eos_ids[0] if pad_id == "end" else pad_id
    options = {**options, "eos_ids": eos_ids}
    r = sample(model, **{**options, "n": n}, pad_id=pad_id)

    options.pop("n", None)
    wanted = []
    for i, seed in enumerate(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        for u in torch.rand(LENGTH, n, dtype=torch.float64, generator=generator).T:
            wanted.append(written_alone(model, PROMPTS[i], u, **options))
    assert responses(r) == [response for response, _ in wanted]
    copies = [prompt for prompt in PROMPTS for _ in range(n)]
    given = from_texts(copies, responses(r), pad_id)
    for field in ("ids", "attention_mask", "is_response"):
        assert torch.equal(getattr(r, field), getattr(given, field)), field
    log_p = torch.tensor([x for _, log_p in wanted for x in log_p])
    torch.testing.assert_close(r.log_p[r.response_mask], log_p, rtol=0, atol=1e-5)
    assert not r.log_p[~r.response_mask].any()
    assert r.truncated.tolist() == [response[-1] not in eos_ids for response, _ in wanted]
    if ends > 1:
        assert len({len(response) for response, _ in wanted}) > 1
    assert min(map(len, PROMPTS)) < WINDOW < LENGTH


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("merged", [False, True])
def test_what_is_sampled_is_what_is_scored(architecture, temperature, merged):
    """The rollout's record, the plain scores and the grades have the same log-probabilities."""
    model = tiny(architecture, vocab_size=len(WORDS), spread=0.2)
    pair = make_pair(model, copy.deepcopy(model), word_tokenizer(), word_tokenizer())
    pair.eos_ids = [2, 14, 9]
    pair.merge_ends = merged
    r = sample(model, n=8, temperature=temperature, **pair.sampling)
    last = {response[-1] for response in responses(r) if len(response) < LENGTH}
    assert last == {2} if merged else last <= {2, 14, 9} and len(last) > 1
    recorded = r.log_p[r.response_mask]
    ends = pair.eos_ids if merged else ()
    where = (r.ids, r.attention_mask, r.is_response)
    plain = log_probs(model, *where, vocab_size=len(WORDS), ends=ends, temperature=temperature)
    y = r.ids[r.is_response].unsqueeze(-1)
    torch.testing.assert_close(plain.gather(-1, y).squeeze(-1), recorded, rtol=0, atol=1e-4)
    how = {"temperature": temperature, "teacher_temperature": temperature}
    graded = grade(pair, r, lambda log_p, log_q, y: diagnose(log_p, log_q, y, 4), **how)
    torch.testing.assert_close(graded["log_p"][r.response_mask], recorded, rtol=0, atol=1e-4)
    assert graded["reverse_kl"][r.response_mask].abs().max() < 1e-5


def test_greedy_is_generate_token_for_token(model):
    """At temperature 0 it writes what model.generate(do_sample=False) writes."""
    eos_ids = common(model, 2, temperature=0)
    r = sample(model, n=1, temperature=0, eos_ids=eos_ids)
    assert len(r.response_mask.sum(1).unique()) > 1
    ids, mask = left_pad(PROMPTS, 0)
    settings = {"do_sample": False, "eos_token_id": eos_ids, "pad_token_id": 0}
    made = model.generate(ids, attention_mask=mask.long(), max_new_tokens=LENGTH, **settings)
    torch.testing.assert_close(r.ids, made[:, : r.ids.size(1)], rtol=0, atol=0)


def test_by_default_one_response_is_drawn_from_the_plain_softmax():
    """The default is temperature 1, no top-p, all of the vocabulary, seeds of torch's generator.

    transformers#45943, transformers#48294: a second call lost requests; here it repeats the first.
    """
    model = tiny("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = rollout(model, PROMPTS, max_new_tokens=LENGTH, eos_ids=())
        torch.manual_seed(0)
        seeds = torch.randint(2**62, (3,)).tolist()
    assert same(plain, sample(model, n=1, seeds=seeds, temperature=1.0, top_p=1.0, pad_id=0))


# --- where the work is done ---------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
def test_finished_rows_leave_the_batch(model, use_cache):
    """A prompt is read once for its n responses. Then only rows that still write feed a token.

    If a checkpoint says use_cache: false, as training leaves it, nothing changes. Logits are
    computed for one position.
    """
    eos_ids = common(model, 5)
    model.config.use_cache = use_cache
    seen = inputs_of(model)
    scored = set()
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, logits: scored.add(logits.size(1)))
    r = sample(model, eos_ids=eos_ids)
    writing = [int((r.response_mask.sum(1) > t).sum()) for t in range(1, r.log_p.size(1))]
    assert seen == [(3, 7)] + [(rows, 1) for rows in writing]
    assert writing[-1] < writing[0] < 9
    assert scored == {1}


def test_everything_is_made_on_the_device_of_the_model():
    """With the default device "meta", which holds no numbers, the responses are the same."""
    model = tiny("llama")
    how = {"eos_ids": common(model, 4), "merge": True, "top_p": 0.9}
    here = sample(model, **how)
    with torch.device("meta"):
        assert same(here, sample(model, **how))
        assert rollout(model, PROMPTS, max_new_tokens=1, eos_ids=()).truncated.all()


def test_the_model_is_left_as_it_was_and_its_generation_defaults_are_not_read(model):
    """transformers#45943 switched _attn_implementation; trl#6827 lost arguments after `generate`.

    `generate` takes top_k, penalties and an end from generation_config.json; we score the plain
    softmax. Nothing that transformers has deprecated is asked of it.
    """

    def state():
        configs = (model.config.to_dict(), model.generation_config.to_dict())
        learns = [p.requires_grad for p in model.parameters()]
        return copy.deepcopy((configs, model.training, model.config._attn_implementation, learns))

    before = state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = sample(model)
    assert state() == before
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.1, repetition_penalty=9.0)
    model.generation_config.eos_token_id = plain.ids[0, -1].item()
    assert same(sample(model), plain)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"training": True}, "eval"),
        ({"prompts": []}, "at least one token"),
        ({"prompts": [[5], []]}, "at least one token"),
        ({"prompts": torch.tensor([[5, 6]])}, "one list each: use ids.tolist()"),
        ({"prompts": [5, 6]}, "one list each"),
        ({"prompts": [torch.tensor([5, 6])]}, "one list each"),
        ({"eos_ids": 2}, "eos_ids must be a list of token ids, not 2"),
        ({"eos_ids": torch.tensor([2, 2])}, "eos_ids must be a list of token ids, not tensor"),
        ({"eos_ids": [2, 5, 2]}, "names a token twice"),
        ({"seeds": 3}, "seeds=3: there must be one for each of the 1 prompts"),
        ({"seeds": [3, 4]}, "there must be one for each"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"n": 0}, "n=0: must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0: must be at least 0"),
        ({"temperature": math.nan}, "temperature=nan: must be at least 0"),
        ({"top_p": 0}, "top_p=0: must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1: must be above 0 and at most 1"),
    ],
)
def test_what_cannot_be_written_is_refused(changes, says):
    """Dropout would draw from another softmax than is scored; an end named twice counts double."""
    model = tiny("gpt2").train("training" in changes)
    asked = {"prompts": [[5]], "max_new_tokens": 1, "eos_ids": [2], **changes}
    asked.pop("training", None)
    with pytest.raises(ValueError, match=says):
        rollout(model, **asked)


# --- ends ---------------------------------------------------------------------------------------


@given(
    st.integers(0, 99),
    st.permutations(range(8)),
    st.integers(2, 4),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_merged_ends_are_one_event_in_value_and_gradient(seed, order, count, temperature):
    """2609.20511 calls them equivalent stopping actions.

    The first end has the probability of all, the others none, the rest what they had: still a
    distribution, with the gradient of logits that are merged before the softmax.
    """
    ends = torch.tensor(order[:count])
    others = torch.tensor(order[count:])
    numbers = torch.Generator().manual_seed(seed)
    z, weight = 3 * torch.randn(2, 5, 8, dtype=torch.float64, generator=numbers)
    z.requires_grad_()
    scaled = z / temperature
    p = scaled.softmax(-1)
    merged = merge_ends(scaled.log_softmax(-1), ends)
    assert torch.equal(merged, merge_ends(scaled.log_softmax(-1), ends.tolist()))
    wanted = p.index_fill(1, ends, 0)
    wanted[:, ends[0]] = p[:, ends].sum(-1)
    torch.testing.assert_close(merged.exp(), wanted)
    torch.testing.assert_close(merged.exp().sum(-1), torch.ones_like(z[:, 0]))

    one = scaled[:, ends].logsumexp(-1, keepdim=True)
    before = torch.cat([one, scaled[:, others]], -1).log_softmax(-1)
    after = torch.cat([merged[:, ends[:1]], merged[:, others]], -1)
    weight = weight[:, : before.size(1)]
    torch.testing.assert_close(after, before)
    (of_before,) = torch.autograd.grad((weight * before).sum(), z, retain_graph=True)
    (of_after,) = torch.autograd.grad((weight * after).sum(), z)
    torch.testing.assert_close(of_after, of_before)


@pytest.mark.parametrize("ends", [[], [3]])
def test_with_one_end_nothing_changes(ends):
    log_p = torch.randn(2, 8).log_softmax(-1)
    assert merge_ends(log_p, torch.tensor(ends, dtype=torch.long)) is log_p


def test_a_teacher_that_ends_with_another_token_grades_as_if_it_ended_with_the_students():
    """So for pairs as in the paper's 3.1 and 5.1 every distance, and the gradient, are those of an
    ordinary pair. Token by token they are not."""
    size = len(WORDS)
    student = tiny("llama", vocab_size=size)
    teachers = {name: tiny("qwen3", seed=1, vocab_size=size) for name in ("ordinary", "swapped")}
    head = teachers["swapped"].get_output_embeddings().weight
    head.data[[2, 14]] = head.data[[14, 2]]
    teachers["token by token"] = teachers["swapped"]

    def per_position(log_p, log_q, y):
        losses = {"loss": full_vocab(log_p, log_q), "eq5": top_k(log_p, log_q, 4)}
        return {**losses, **diagnose(log_p, log_q, y, 4)}

    found = {}
    for name, teacher in teachers.items():
        pair = make_pair(student, teacher, word_tokenizer(), word_tokenizer())
        pair.eos_ids = [2, 14]
        pair.merge_ends = name != "token by token"
        r = sample(student, n=4, eos_ids=[2, 14], merge=True)
        [part] = micro_batches(r, 10_000)
        student.zero_grad()
        values = values_of(pair, part, per_position)
        values["loss"].sum().backward()
        found[name] = {k: x.detach() for k, x in values.items()}
        found[name]["gradient"] = student.get_output_embeddings().weight.grad.clone()
    close = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(found["swapped"], found["ordinary"], **close)
    other = found["token by token"]["gradient"]
    assert not torch.allclose(other, found["ordinary"]["gradient"], rtol=0.1)


# --- from a softmax to a token ------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=2, max_size=8).filter(sum))
def test_draw_inverts_the_cumulative_probability(counts):
    """Of evenly spaced numbers each token gets exactly its share. Without probability it gets
    none (nano-opd sampled with the top_k=50 of `generate`)."""
    total = sum(counts)
    log_p = (torch.tensor(counts, dtype=torch.float64) / total).log().repeat(total, 1)
    y = draw(log_p, (torch.arange(total) + 0.5).double() / total)
    assert torch.bincount(y, minlength=len(counts)).tolist() == counts


@pytest.mark.parametrize(
    "p, top_p, u, token",
    [
        ([0.0, 0.25, 0.75, 0.0], 1, 0.0, 1),
        ([0.0, 0.25, 0.75, 0.0], 1, 0.25, 2),  # a border belongs to the next token
        ([0.0, 0.25, 0.75, 0.0], 1, LAST, 2),
        ([1 - 1e-12, 1e-12], 1, 1 - 1e-13, 1),  # more than float32 tells apart
        ([1 / 3] * 3, 1, LAST, 2),  # they add up to less than 1
        ([0.2, 0.5, 0.3], 0.49, LAST, 1),
        ([0.2, 0.5, 0.3], 0.5, LAST, 1),  # one token has that mass: no second one is needed
        ([0.2, 0.5, 0.3], 0.51, LAST, 2),
    ],
)
def test_draw_at_the_borders(p, top_p, u, token):
    log_p = torch.tensor([p], dtype=torch.float64).log()
    if top_p == 1:  # otherwise in float64, in which half is exactly half
        log_p = log_p.float()
    assert draw(log_p, torch.tensor([u], dtype=torch.float64), top_p).item() == token


@pytest.mark.parametrize("V, spread", [(4, 1.0), (60, 3.0), (3000, 0.1), (3000, 9.0)])
@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.95])
def test_draw_takes_the_smallest_set_that_holds_top_p(V, spread, top_p):
    """Within the set odds stay as they were. It may have more than 1,024 tokens."""
    generator = torch.Generator().manual_seed(0)
    log_p = (spread * torch.randn(V, generator=generator)).log_softmax(-1)
    p = log_p.double().exp().tolist()
    order = nucleus(p, top_p)
    u = (torch.arange(100) + 0.5).double() / 100
    wanted = [token_at(p, share, order) for share in u.tolist()]
    assert draw(log_p.repeat(100, 1), u, top_p).tolist() == wanted


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_what_is_not_a_number_draws_a_token_all_the_same(top_p):
    """The token is an id of the vocabulary, so the loss is what reports the NaN."""
    y = draw(torch.full((2, 5), torch.nan), torch.tensor([0.0, 0.9]).double(), top_p)
    assert (y >= 0).all()
    assert (y < 5).all()


def test_columns_that_pad_the_vocabulary_would_take_probability():
    """Liger's fused_linear_distillation: 128 columns of logit 0 silently take 5e-4.

    If they are cut before the softmax they take none, even if they are huge.
    """
    z = torch.randn(151_936, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(z, (0, 128))
    assert padded.softmax(-1)[-128:].sum().item() == pytest.approx(5e-4, rel=0.2)
    model = tiny("llama")
    whole = sample(model, vocab_size=VOCAB - 8)
    model.get_output_embeddings().weight.data[-8:] = 0
    assert same(whole, sample(model, vocab_size=VOCAB - 8))
    assert (whole.ids < VOCAB - 8).all()


# --- padding and random numbers -----------------------------------------------------------------


def test_padding_by_hand():
    """Positions count from the first real token of each row. Padding before it has position 0."""
    ids, mask = left_pad([[5, 6, 7], [8]], 9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[True] * 3, [False, False, True]]
    assert position_ids(mask).tolist() == [[0, 1, 2], [0, 0, 0]]
    assert position_ids(torch.tensor([[0, 1, 1, 1]])).tolist() == [[0, 0, 1, 2]]
    r = from_texts([[5, 6], [7]], [[3], [4, 2]], pad_id=9)
    assert r.ids.tolist() == [[5, 6, 3, 9], [9, 7, 4, 2]]
    assert r.attention_mask.int().tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert r.is_response.int().tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]]
    assert r.response_mask.int().tolist() == [[1, 0], [1, 1]]
    assert responses(r) == [[3], [4, 2]]
    with pytest.raises(ValueError, match="every prompt needs at least one token"):
        from_texts([[5, 6], []], [[3], [4]])
    with pytest.raises(ValueError, match="2 prompts, 1 responses: give one to each"):
        from_texts([[5, 6], [7]], [[3]])
    nothing_said = from_texts([[5, 6], [7]], [[], []])
    assert nothing_said.response_mask.shape == (2, 0)
    assert nothing_said.ids.dtype == torch.long


def test_uniform_numbers_follow_from_the_seed_of_their_prompt():
    """Each token has its own number, in float64. The other seeds of a call do not change it.

    A longer limit changes none of the earlier numbers.
    """
    u = uniform([7, 8], 2, 3, 1000)
    assert u.shape == (6, 1000)
    assert u.dtype == torch.float64
    assert torch.equal(u[3:], uniform([8], 1, 3, 1000))
    assert torch.equal(u[:, :10], uniform([7, 8], 2, 3, 10))
    assert len(u.unique()) == u.numel()
    share = torch.histc(u, bins=10, min=0, max=1) / u.numel()
    assert (share - 0.1).abs().max() < 0.02


def test_no_two_purposes_share_a_seed():
    """One hashed rule makes all seeds. With a formula for each purpose a step could draw the
    numbers of the evaluation, or of the cold start."""
    what = ("rollout", "answer", "distance", "teacher's response", "order", "page")
    grid = list(itertools.product(range(8), what, range(200)))
    for seed, name, step in itertools.product([0, 1], what[:3], [62, 63, 126, 127, 190, 191]):
        grid += [(seed, name, step, i) for i in range(8)]
    seeds = {seed_of(*place) for place in grid}
    assert len(seeds) == len(grid)
    assert 0 <= min(seeds) < max(seeds) < 2**63
    assert seed_of(0, "rollout", 7) == seed_of(0, "rollout", 7)
    assert seed_of(0, "1", 2) != seed_of(0, 1, 2) != seed_of(0, 12)


@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 9))
def test_every_epoch_takes_each_example_once_and_a_step_follows_from_its_number(count, size, seed):
    """Batches are slices of one endless list of shuffles, and may reach into the next epoch."""
    steps = range(3 * count)
    endless = list(itertools.chain(*[batch(count, step, size, seed) for step in steps]))
    assert len(endless) == 3 * count * size
    for start in range(0, len(endless), count):
        assert sorted(endless[start : start + count]) == list(range(count))
    assert batch(count, 2, size, seed) == endless[2 * size : 3 * size]


def test_every_epoch_of_every_seed_is_another_shuffle():
    """Neither the next epoch nor the next seed repeats an order."""
    orders = [tuple(batch(40, epoch, 40, seed)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25
    assert all(sorted(order) == list(range(40)) for order in orders)
