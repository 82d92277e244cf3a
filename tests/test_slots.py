"""Laws of plumbing/slots.py: it writes what rollout.py writes, and meets what a CUDA graph needs.

There is no GPU in these tests. `Static` runs without a graph what Captured would put into one.
"""

import inspect
import random

import pytest
import torch
from conftest import VOCAB, WINDOW, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    masking_utils,
)

import rollout as plain
from plumbing import slots
from plumbing.slots import Captured, Slots
from rollout import left_pad
from teacher import log_probs

LENGTH = 8
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
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gpt2")]
SEEDS = list(range(10, 10 + len(MANY)))


class Static(Captured):
    """Slots with the rows and columns of a graph, which see late that rows have ended."""

    look_every = 3

    def capture(self, rows, columns):
        return lambda: self.forward(rows, columns)


@pytest.fixture
def use(monkeypatch):
    """A function that makes one class write for all models."""

    def set_kind(kind):
        monkeypatch.setattr(slots, "kind_of", lambda model: kind)

    return set_kind


def sample(model, prompts=MANY, *, write=slots.rollout, n=3, eos_ids=(), seeds=None, **how):
    """Responses of at most LENGTH tokens."""
    return write(
        model,
        prompts,
        n=n,
        max_new_tokens=LENGTH,
        eos_ids=eos_ids,
        seeds=seeds or SEEDS[: len(prompts)],
        **how,
    )


def common(model, count):
    """Token ids that end some responses early and at different times: the most frequent ones."""
    ids = sample(model, write=plain.rollout).ids[:, -LENGTH:]
    return torch.bincount(ids.flatten(), minlength=VOCAB).topk(count).indices.tolist()


def same_text(a, b):
    for field in ("ids", "attention_mask", "is_response", "truncated"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    torch.testing.assert_close(a.log_p, b.log_p)


def forwards(model):
    """A list that gets the (rows, tokens, columns) of every forward pass from now on."""
    seen = []

    def note(module, args, kwargs):
        rows, tokens = kwargs["input_ids"].shape
        seen.append((rows, tokens, kwargs["attention_mask"].size(1)))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def gpt_neo(window):
    """A GPT-Neo: its first layer sees all, its second a window that the cache does not know."""
    config = GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        window_size=window,
        num_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPTNeoForCausalLM(config).double().eval()


def mamba():
    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MambaForCausalLM(config).double().eval()


# --- the same result as the plain loop ----------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", *MORE])
@pytest.mark.parametrize("in_flight", [None, 2, 7])
@pytest.mark.parametrize("kind", [Slots, Static])
def test_the_tokens_are_those_of_the_plain_loop(use, kind, in_flight, name):
    """So it is while rows leave, others take their places, and windows lie over fixed columns.

    This is in float64, in which kernels round alike enough.
    """
    use(kind)
    model = tiny(name).double()
    eos_ids = common(model, 6)
    for how in (
        dict(eos_ids=eos_ids),
        dict(eos_ids=eos_ids, merge=True, temperature=0.7, pad_id=1),
        dict(eos_ids=eos_ids[:2], temperature=0),
        dict(eos_ids=eos_ids[:2], top_p=0.9, n=1, vocab_size=VOCAB - 4),
    ):
        wanted = sample(model, write=plain.rollout, **how)
        same_text(sample(model, in_flight=in_flight, **how), wanted)
        assert len(wanted.response_mask.sum(1).unique()) > 1  # some have ended before others
    assert len(MANY[3]) > WINDOW


def test_the_arguments_and_defaults_are_those_of_the_plain_loop():
    """It can replace rollout.rollout everywhere. Only in_flight is new; by default it is all."""
    ours = dict(inspect.signature(slots.rollout).parameters)
    assert ours.pop("in_flight").default is None
    assert ours == dict(inspect.signature(plain.rollout).parameters)


def test_without_seeds_they_come_from_the_generator_of_torch():
    model = tiny("llama")
    written = []
    for write in (plain.rollout, slots.rollout):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            written.append(write(model, MANY, max_new_tokens=LENGTH, eos_ids=()).ids)
    assert torch.equal(*written)


@pytest.mark.parametrize("in_flight", [None, 4])
def test_everything_is_made_on_the_device_of_the_model(in_flight):
    """With the default device "meta", which holds no numbers, the responses are the same."""
    model = tiny("llama")
    eos_ids = common(model, 6)
    here = sample(model, eos_ids=eos_ids, in_flight=in_flight)
    with torch.device("meta"):
        there = sample(model, eos_ids=eos_ids, in_flight=in_flight)
    same_text(here, there)


@pytest.mark.parametrize("make", [lambda: gpt_neo(6), mamba], ids=["gpt_neo", "mamba"])
@pytest.mark.parametrize("in_flight", [None, 4])
def test_other_caches_are_written_by_the_plain_loop_in_pieces(make, in_flight):
    """For recurrent states, and windows that the cache does not know, what is drawn is scored.

    GPT-Neo's windows end at the last column of the cache. With rows that join later, sampled and
    scored would be nats apart.
    """
    model = make()
    eos_ids = common(model, 6)
    wanted = sample(model, write=plain.rollout, n=2, eos_ids=eos_ids)
    seen = forwards(model)
    r = sample(model, n=2, eos_ids=eos_ids, in_flight=in_flight)
    assert max(rows for rows, _, _ in seen) <= (in_flight or 2 * len(MANY))
    same_text(r, wanted)
    with torch.no_grad():
        scored = log_probs(model, r.ids, r.attention_mask, r.is_response)
    scored = scored.gather(-1, r.ids[r.is_response].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(r.log_p[r.response_mask], scored.float(), rtol=0, atol=1e-5)


def test_the_way_of_writing_is_chosen_by_what_a_model_keeps():
    assert slots.kind_of(tiny("llama")) is slots.kind_of(tiny("gemma3")) is Slots
    assert slots.kind_of(gpt_neo(6)) is slots.kind_of(mamba()) is None


# --- who is in flight ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("in_flight, most", [(1, 1), (2, 2), (3, 3), (8, 6), (11, 9), (None, 24)])
def test_no_more_responses_are_in_flight_than_allowed(name, in_flight, most):
    """A prompt's n responses are written together; if n is more than allowed, one at a time."""
    model = tiny(name)
    seen = forwards(model)
    sample(model, in_flight=in_flight)
    assert max(rows for rows, _, _ in seen) == most


def test_waiting_prompts_take_the_places_of_finished_rows():
    """Prompts wait in a queue. They are read while others are being written, each of them once."""
    model = tiny("llama")
    eos_ids = common(model, 8)
    prompts = MANY * 4
    seen = forwards(model)
    r = sample(model, prompts, eos_ids=eos_ids, in_flight=9, seeds=list(range(len(prompts))))
    in_waves = sum(int(part.max()) for part in r.response_mask.sum(1).split(9))
    assert len(seen) < in_waves

    prompts = [[token, 2] for token in range(3, 40)]
    seen.clear()
    sample(model, prompts, n=1, eos_ids=eos_ids, in_flight=5, seeds=list(range(len(prompts))))
    assert sum(rows for rows, tokens, _ in seen if tokens > 1) == len(prompts)


@pytest.mark.parametrize("kind", [Slots, Static])
def test_rows_that_have_left_leave_no_columns_behind(use, kind):
    """The cache is as wide as a prompt and one response, however many prompts pass through."""
    use(kind)
    model = tiny("llama")
    eos_ids = common(model, 4)
    prompts = [[token, 2] for token in range(3, 40)]
    seen = forwards(model)
    sample(model, prompts, n=1, eos_ids=eos_ids, in_flight=4, seeds=list(range(len(prompts))))
    widest = max(columns for _, _, columns in seen)
    assert widest <= 2 + LENGTH < len(seen)


def slots_of(model, prompts, *, n=1, prompts_at_once, kind=Slots):
    ids, mask = left_pad(prompts, 0)
    return kind(model, ids, mask, n, prompts_at_once, LENGTH)


@pytest.mark.parametrize(
    "places, gone, reads",
    [(4, 1, 1), (4, 3, 3), (5, 1, 0), (8, 1, 0), (8, 2, 2), (9, 2, 0), (9, 3, 3), (4, 4, 4)],
)
@torch.no_grad()
def test_the_next_prompts_are_read_once_a_quarter_of_the_places_is_free(places, gone, reads):
    """So many prompts are read as places are free, in order."""
    state = slots_of(tiny("llama"), [[token] for token in range(3, 20)], prompts_at_once=places)
    assert state.response.tolist() == list(range(places))
    state.feed(torch.full((places,), 5), going=torch.arange(places) >= gone)
    assert sorted(state.response[: state.rows].tolist()) == list(range(gone, places + reads))


# --- what a row holds ---------------------------------------------------------------------------


@torch.no_grad()
def played(state, n, seed):
    """Feed random tokens, let random rows leave, until all prompts were read and all have left.

    Yields after each step what each row has written: [(response, its tokens)].
    """
    chance = random.Random(seed)
    texts = {}
    while state.rows > 0:
        responses = state.response[: state.rows].tolist()
        going = []
        for response in responses:
            text = texts.setdefault(response, [])
            text.append(chance.randrange(VOCAB))
            going.append(len(text) < LENGTH and chance.random() < 0.8)
        tokens = [texts[response][-1] for response in responses]
        state.feed(torch.tensor(tokens), torch.tensor(going))
        responses = state.response[: state.rows].tolist()
        yield [(response, texts.get(response, [])) for response in responses]
    assert sorted(texts) == list(range(len(state.prompt_ids) * n))  # each was written


@pytest.mark.parametrize("name", ["llama", *MORE])
@pytest.mark.parametrize("seed, n, places", [(0, 1, 4), (1, 2, 3), (2, 3, 8)])
def test_each_row_holds_what_a_fresh_reading_of_its_text_gives(name, seed, n, places):
    """Keys, values and next logits are those of the text read alone, whatever joins or leaves."""
    model = tiny(name).double()
    state = slots_of(model, MANY, n=n, prompts_at_once=places)
    checked = 0
    for writing in played(state, n, seed):
        assert len(writing) == state.rows <= n * places
        for i, (response, text) in enumerate(writing):
            prompt = MANY[response // n]
            with torch.no_grad():
                alone = model(input_ids=torch.tensor([prompt + text]), use_cache=True)
            torch.testing.assert_close(state.logits[i], alone.logits[0, -1])
            own = slice(state.P - len(prompt), state.P + len(text))
            for number, layer in enumerate(alone.cache.layers):
                torch.testing.assert_close(state.keys[number][i, :, own], layer.keys[0])
                torch.testing.assert_close(state.values[number][i, :, own], layer.values[0])
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("seed", range(4))
def test_free_rows_stay_within_the_cache_and_finite(monkeypatch, seed):
    """Free rows are computed with the others, and a masked NaN would spread."""
    monkeypatch.setattr(Static, "look_every", 1)
    state = slots_of(tiny("llama"), MANY * 3, prompts_at_once=7, kind=Static)
    for _ in played(state, 1, seed):
        assert state.t.max() < LENGTH
        assert state.logits.isfinite().all()
    assert all(x.isfinite().all() for x in state.keys + state.values)


# --- what a graph needs -------------------------------------------------------------------------


def test_tensors_stay_where_they_are():
    """Addresses and shapes are the same at every step, whatever row leaves or joins."""
    state = slots_of(tiny("llama"), MANY, n=2, prompts_at_once=3)

    def places():
        tensors = [state.response, state.t, state.y, state.attended, *state.keys, *state.values]
        return [(x.data_ptr(), x.shape) for x in tensors]

    at_first = places()
    assert len(at_first) == 4 + 2 * 2
    for _ in played(state, 2, seed=0):
        assert places() == at_first
    assert state.keys[0].shape == (6, 2, max(map(len, MANY)) + LENGTH, 8)


class Noted(TorchDispatchMode):
    """Counts reads by the host, and casts of what has the shape of a weight."""

    def __init__(self, shapes=()):
        super().__init__()
        self.shapes = set(shapes)
        self.reads = 0
        self.casts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.reads += name in ("_local_scalar_dense", "nonzero", "equal")
        self.casts += name == "_to_copy" and args[0].shape in self.shapes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_host_reads_nothing_but_who_has_ended(monkeypatch, use, name):
    """A look reads two numbers, and two more if rows have ended. Between looks nothing is read.

    (transformers reads its masks, but not while a stream is captured.)
    """
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)
    use(Static)
    model = tiny(name)
    reads = []
    for look_every in (1, 100):
        monkeypatch.setattr(Static, "look_every", look_every)
        with Noted() as noted:
            sample(model)
        reads.append(noted.reads)
    often, once = reads
    assert often == once + 2 * (LENGTH - 1)  # none has ended before the last token
    assert once <= 5


def test_the_weights_are_cast_once_a_rollout(use):
    """Under autocast float32 weights are cast when the prompts are read, and not for a token."""
    use(Static)
    model = tiny("llama")
    weights = {p.shape for p in model.parameters() if p.dim() > 1}
    with torch.autocast("cpu", torch.bfloat16), Noted(weights) as noted:
        sample(model)
    assert noted.casts == sum(isinstance(m, torch.nn.Linear) for m in model.modules())


def test_a_step_that_cannot_be_captured_is_run_as_it_is_and_that_is_said(monkeypatch, use):
    """It is said once a rollout, however many graphs there would be. The tokens are the same."""

    def capture(self, rows, columns):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    use(Captured)
    monkeypatch.setattr(Captured, "capture", capture)
    monkeypatch.setattr(Captured, "look_every", 1)
    model = tiny("llama").double()
    eos_ids = common(model, 4)  # so several numbers of rows, each a graph
    with pytest.warns(UserWarning, match="LlamaForCausalLM is not captured.*capturing$") as said:
        r = sample(model, eos_ids=eos_ids)
    assert len(said) == 1
    same_text(r, sample(model, write=plain.rollout, eos_ids=eos_ids))


def test_a_graph_is_captured_once_for_its_rows_and_columns(monkeypatch, use):
    """Graphs have 1, 2, 4, ... rows, or all; and 1,024, 2,048, ... columns, or all."""
    sizes = []

    class Sizes(Static):
        look_every = 1

        def capture(self, rows, columns):
            sizes.append((rows, columns))
            return super().capture(rows, columns)

    use(Sizes)
    model = tiny("llama")
    eos_ids = common(model, 4)
    sample(model, eos_ids=eos_ids)
    assert sizes[0] == (24, 30 + LENGTH)
    assert len(set(sizes)) == len(sizes) > 2
    assert {rows for rows, _ in sizes} <= {24, 16, 8, 4, 2, 1}
    sizes.clear()
    sample(model, [[5] * 1020], n=1)
    assert sizes == [(1, 1024), (1, 1020 + LENGTH)]
