"""Laws of plumbing/slots.py: rows that never move, prompts that join; what a CUDA graph would compute, without one."""

import random

import pytest
import torch
from conftest import VOCAB, WINDOW, tiny
from test_rollout import LENGTH, MANY, batches, common, sample
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from plumbing.slots import Captured, Slots, fastest
from rollout import Waves, left_pad


class Static(Captured):
    """What is captured on a GPU, run as it is: the rows and columns of a graph, who has ended seen late."""

    every = 3

    def capture(self, step):
        return step


def same_text(a, b):
    for field in ("ids", "attention_mask", "is_response", "truncated"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    torch.testing.assert_close(a.log_p, b.log_p)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "gpt2"])
@pytest.mark.parametrize("in_flight", [None, 6])
@pytest.mark.parametrize("decoder", [Slots, Static])
def test_slots_write_what_waves_write(decoder, in_flight, name):
    """Keys and values where they belong, rows moved into the places of others, windows (Gemma 3) over fixed columns,
    more rows and columns than are in use: the tokens are those of transformers' own cache."""
    model = tiny(name).double()
    eos_ids = common(sample(model, MANY), 6)
    plain = sample(model, MANY, eos_ids=eos_ids, decoder=Waves)
    same_text(sample(model, MANY, eos_ids=eos_ids, decoder=decoder, in_flight=in_flight), plain)
    greedy = dict(eos_ids=eos_ids[:2], temperature=0)
    same_text(
        sample(model, MANY, decoder=decoder, in_flight=in_flight, **greedy),
        sample(model, MANY, decoder=Waves, **greedy),
    )
    assert len(plain.response_mask.sum(1).unique()) > 2 and len(MANY[3]) > WINDOW


def test_the_decoder_is_chosen_by_what_a_model_keeps():
    """Keys and values, of windows too: Slots. Recurrent states: transformers' own cache."""
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)
    ).eval()
    ids, mask = left_pad(MANY, 0)
    chosen = [
        type(fastest(model, ids, mask, 1, 4, LENGTH))
        for model in (tiny("llama"), tiny("gemma3"), mamba)
    ]
    assert chosen == [Slots, Slots, Waves]


def test_waiting_prompts_take_the_places_of_finished_rows():
    """A queue, not waves: prompts are read while others are still being written, and each is read once."""
    model = tiny("llama")
    eos_ids, seen = common(sample(model, MANY), 8), batches(model)
    r = sample(model, MANY, eos_ids=eos_ids, in_flight=9)
    in_waves = sum(
        int(part.max()) for part in r.response_mask.sum(1).split(9)
    )  # one for the prompts of each wave
    assert len(seen) < in_waves
    many = [[prompt] for prompt in range(3, 40)]
    seen.clear()
    sample(model, [prompt + [2] for prompt in many], n=1, eos_ids=eos_ids, in_flight=5)
    assert sum(rows for rows, tokens in seen if tokens > 1) == len(many)  # each is read once


@pytest.mark.parametrize("decoder", [Waves, Slots, Static])
def test_rows_that_have_left_leave_no_columns_behind(decoder):
    """However many prompts pass through few places, the cache is no wider than the prompts and one response."""
    model, widths = tiny("llama"), []
    eos_ids = common(sample(model, MANY), 4)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["attention_mask"].size(1)), with_kwargs=True
    )
    sample(
        model,
        [[token, 2] for token in range(3, 40)],
        n=1,
        eos_ids=eos_ids,
        in_flight=4,
        decoder=decoder,
    )
    assert max(widths) <= 2 + LENGTH < len(widths)


def slots_of(model, prompts, *, n=1, places, decoder=Slots):
    ids, mask = left_pad(prompts, 0)
    return decoder(model, ids, mask, n, places, LENGTH)


@pytest.mark.parametrize(
    "places, gone, reads",
    [(4, 1, 1), (4, 3, 3), (5, 1, 0), (8, 1, 0), (8, 2, 2), (9, 2, 0), (9, 3, 3), (4, 4, 4)],
)
@torch.no_grad()
def test_the_next_prompts_are_read_where_a_quarter_of_the_places_is_free(places, gone, reads):
    """Fewer would not pay for a forward of their own; what is read takes the free places, in order, and no more."""
    slots = slots_of(tiny("llama"), [[token] for token in range(3, 20)], places=places)
    slots.fill()
    assert slots.row.tolist() == list(range(places))
    slots.feed(torch.full((places,), 5), going=torch.arange(places) >= gone)
    assert sorted(slots.row.tolist()) == list(range(gone, places + reads))


@torch.no_grad()
def played(slots, n, seed):
    """Random tokens and departures until all prompts have been read and every row has left: yields the text
    of each response after each step, [(row, its tokens)], of those that have just been read the empty one.
    """
    chance, texts = random.Random(seed), {}
    while slots.b:
        rows = slots.row.tolist()
        for row in rows:
            texts.setdefault(row, []).append(chance.randrange(VOCAB))
        slots.feed(
            torch.tensor([texts[row][-1] for row in rows]),
            going=torch.tensor(
                [len(texts[row]) < LENGTH and chance.random() < 0.8 for row in rows]
            ),
        )
        yield [(row, texts.get(row, [])) for row in slots.row.tolist()]
    assert sorted(texts) == list(range(len(slots.ids) * n))  # each was written


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("seed, n, places", [(0, 1, 4), (1, 2, 3), (2, 3, 8)])
def test_each_slot_holds_what_a_fresh_reading_of_its_text_gives(name, seed, n, places):
    """Whatever comes and goes: the keys and values of a row, and its next logits, are those of its text read alone."""
    model = tiny(name).double()
    slots = slots_of(model, MANY, n=n, places=places)
    P, checked = slots.ids.size(1), 0
    for writing in played(slots, n, seed):
        assert len(slots.logits) >= len(writing) == slots.b <= n * places
        for i, (row, text) in enumerate(writing):
            prompt = MANY[row // n]
            with torch.no_grad():
                alone = model(input_ids=torch.tensor([prompt + text]), use_cache=True)
            torch.testing.assert_close(slots.logits[i], alone.logits[0, -1])
            own = slice(P - len(prompt), P + len(text))
            for buffers, layer in zip(slots.buffers, alone.cache.layers, strict=True):
                for buffer, x in zip(buffers, (layer.keys, layer.values), strict=True):
                    torch.testing.assert_close(buffer[i, :, own], x[0])
            checked += 1
    assert checked > 10 and all(
        x.isfinite().all() for x in sum(slots.buffers, [])
    )  # a masked NaN is one too


def test_buffers_stay_where_they_are(monkeypatch):
    """One allocation a layer for keys and one for values: their addresses and shapes are the same at every step,
    whoever leaves or joins, which is what a CUDA graph needs; what attention is given are views of them.
    """
    model, seen, made = tiny("llama"), [], []
    init, update = Slots.__init__, Slots.update

    def noted(self, keys, values, i, *args, **kwargs):
        views = update(self, keys, values, i, *args, **kwargs)
        seen.append(
            (i, *((x.data_ptr(), x.shape) for x in self.buffers[i]), *(x.data_ptr() for x in views))
        )
        return views

    monkeypatch.setattr(
        Slots, "__init__", lambda self, *args, **kw: made.append(self) or init(self, *args, **kw)
    )
    monkeypatch.setattr(Slots, "update", noted)
    eos_ids = common(sample(model, MANY), 6)
    seen.clear()
    made.clear()
    r = sample(model, MANY, eos_ids=eos_ids, in_flight=9)
    (slots,) = made
    assert (
        slots.begun == len(MANY) > 3 and len(r.response_mask.sum(1).unique()) > 2
    )  # rows joined, rows left
    assert len(set(seen)) == len(slots.buffers) == 2 < len(seen)
    for _, keys, values, *views in set(seen):
        assert views == [keys[0], values[0]] and keys[1] == values[1] == (9, 2, slots.columns, 8)
    assert slots.columns == max(map(len, MANY)) + LENGTH


@pytest.mark.parametrize("seed", range(4))
def test_free_rows_of_a_graph_stay_within_the_cache(monkeypatch, seed):
    """They are computed beside the others: at a column that there is, and to numbers."""
    monkeypatch.setattr(Static, "every", 1)
    slots = slots_of(tiny("llama"), MANY * 3, places=7, decoder=Static)
    for _ in played(slots, 1, seed):
        assert slots.at.max() < LENGTH and slots.logits.isfinite().all()
    assert all(x.isfinite().all() for x in sum(slots.buffers, []))


# --- what a graph needs --------------------------------------------------------------------------------------------


class Noted(TorchDispatchMode):
    """The operations that are asked of torch: reads by the host, and casts of what has the shape of a weight."""

    def __init__(self, shapes=()):
        super().__init__()
        self.shapes, self.reads, self.casts = set(shapes), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.reads += name in ("_local_scalar_dense", "nonzero", "equal")
        self.casts += name == "_to_copy" and args[0].shape in self.shapes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_host_reads_nothing_but_who_has_ended(monkeypatch, name):
    """In every 16th token, which ends the wait for the GPU, two numbers and where rows have ended; in between nothing.
    (transformers reads its masks, but not where a stream is captured.)"""
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)
    model, found = tiny(name), []
    for every in (1, 100):
        monkeypatch.setattr(Static, "every", every)
        with Noted() as noted:
            sample(model, decoder=Static)
        found.append(noted.reads)
    often, once = found
    assert once == 4 and often == once + 2 * (LENGTH - 1)  # none has ended before the last token


def test_the_weights_are_cast_once_a_rollout(monkeypatch):
    """Under autocast the float32 weights of a student are cast when the prompts are read; a token casts none."""
    model = tiny("llama")
    weights = {p.shape for p in model.parameters() if p.dim() > 1}
    with torch.autocast("cpu", torch.bfloat16), Noted(weights) as noted:
        sample(model, decoder=Static)
    assert noted.casts == sum(isinstance(m, torch.nn.Linear) for m in model.modules())


def test_what_cannot_be_captured_is_run_as_it_is_and_that_is_said(monkeypatch):
    """Once a rollout, however many graphs it would have had; the tokens are the same."""

    def capture(self, step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    model = tiny("llama").double()
    eos_ids = common(sample(model, MANY), 4)  # several numbers of rows, each a graph
    plain = sample(model, MANY, eos_ids=eos_ids, decoder=Slots)
    monkeypatch.setattr(Captured, "capture", capture)
    monkeypatch.setattr(Captured, "every", 1)
    with pytest.warns(
        UserWarning, match="LlamaForCausalLM is not captured in a CUDA graph.*capturing$"
    ) as said:
        same_text(sample(model, MANY, eos_ids=eos_ids, decoder=Captured), plain)
    assert len(said) == 1


def test_a_graph_is_captured_once_for_its_rows_and_columns(monkeypatch):
    """For 1, 2, 4, ... rows and all the rows that there are; the columns in steps of 1,024, or all there are."""
    sizes = []
    monkeypatch.setattr(
        Static, "capture", lambda self, step: sizes.append((self.b, self.width)) or step
    )
    monkeypatch.setattr(Static, "every", 1)
    eos_ids = common(sample(tiny("llama"), MANY), 4)
    sample(tiny("llama"), MANY, n=3, eos_ids=eos_ids, decoder=Static)
    assert sizes[0] == (24, 30 + LENGTH) and len(set(sizes)) == len(sizes) > 2
    assert {rows for rows, _ in sizes} <= {24, 16, 8, 4, 2, 1}
    sizes.clear()
    sample(tiny("llama"), [[5] * 1020], n=1, decoder=Static)
    assert sizes == [(1, 1024), (1, 1020 + LENGTH)]
