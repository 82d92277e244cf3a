"""plumbing/slots.py: rollout.Waves, faster. Slots: rows that never move. Captured: a token of all rows in one launch.

On a GPU a token of eager transformers is dozens of launches a layer, whatever the number of rows, which take longer
than what they compute. A CUDA graph replays them all at once, on the addresses that it was captured with.
To copy: with rollout.py.
"""

import warnings

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from rollout import Waves, position_ids


def fastest(model, *args, **kwargs):
    """The decoder for a model, see rollout: Slots where its cache is keys and values; on one GPU Captured."""
    if not all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        for layer in DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    ):
        return Waves(model, *args, **kwargs)  # recurrent states
    devices = {p.device for p in model.parameters()}
    on_one_gpu = len(devices) == 1 and devices.pop().type == "cuda"
    return (Captured if on_one_gpu else Slots)(model, *args, **kwargs)


class Slots(DynamicCache):
    """The responses being written: the first b rows of one cache of B rows x C columns. A prompt stands in the first P
    columns, padded on the left, token t of its response in column P + t; so each row writes to a column of its own.

    Nothing is shifted: where a row leaves, the last one takes its place, and the next prompts join at the end; where
    layers see a sliding window they wait until all have left, since transformers ends the windows of all rows at one
    column.
    """

    every = 1  # tokens between two looks at who has ended

    def __init__(
        self, model, ids, mask, n, places, max_new_tokens
    ):  # ids, mask (m, P); places: of prompts
        super().__init__()
        B, P, self.columns = places * n, ids.size(1), ids.size(1) + max_new_tokens
        self.model, self.ids, self.mask, self.n, self.places = model, ids, mask, n, places
        self.rows, self.at, self.y = ids.new_zeros(
            3, B
        )  # which response a row writes, at which token, the token
        self.seen = mask.new_zeros(B, self.columns)  # the columns that it attends to
        self.b, self.begun, self.steps, self.width = (
            0,
            0,
            0,
            P,
        )  # rows, prompts, tokens so far; columns in use
        self.logits, self.buffers = (
            torch.empty(0, device=ids.device),
            [],
        )  # (b, V); a layer's keys and values
        self.fill()

    row = property(lambda self: self.rows[: self.b])  # (b,)
    t = property(lambda self: self.at[: self.b])  # (b,)

    def feed(self, y, going):
        """The rows read their tokens y (b,), for the next logits. Who is not going, (b,) bool, leaves; others join."""
        self.y[: self.b], self.steps = y, self.steps + 1
        if self.steps % self.every == 0 or self.width + 1 == self.columns:
            self.leave(going)
        if self.b:
            self.width += 1
            self.logits = self.step()
            self.at.add_(1).clamp_(
                max=self.columns - self.ids.size(1) - 1
            )  # those of free rows go on, in vain
        self.fill()

    def leave(self, going):
        b, P = int(going.sum()), self.ids.size(1)
        if b < self.b:
            left, last = (~going[:b]).nonzero().squeeze(-1), b + going[b:].nonzero().squeeze(-1)
            for x in [self.rows, self.at, self.y, self.seen] + sum(self.buffers, []):
                x[left.to(x.device)] = x[last.to(x.device)]
        self.b, self.width = b, P + int(self.at[:b].max()) if b else P

    def fill(self):
        """Read the next prompts, where there are some and at least a quarter of the places is free."""
        b, P = self.b, self.ids.size(1)
        free = self.places - -(-b // self.n)
        if self.begun == len(self.ids) or b and (self.in_waves or 4 * free < self.places):
            return
        ids, mask = (x[self.begun : self.begun + free] for x in (self.ids, self.mask))
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=True,
            logits_to_keep=1,
        )
        copies = torch.arange(len(ids), device=ids.device).repeat_interleave(
            self.n
        )  # each prompt n times
        new = slice(b, b + len(copies))
        self.rows[new] = torch.arange(len(copies), device=ids.device) + self.begun * self.n
        self.at[b:], self.seen[b:], self.seen[new, :P] = 0, False, mask[copies]
        self.logits = torch.cat([self.logits[:b], out.logits[copies, -1]])
        self.b, self.begun = b + len(copies), self.begun + len(ids)
        self.in_waves = any(type(layer) is DynamicSlidingWindowLayer for layer in out.cache.layers)
        for i, layer in enumerate(out.cache.layers):
            if i == len(
                self.buffers
            ):  # zeros, since what is masked is read; autocast leaves keys in float32
                self.buffers.append(
                    [
                        layer.values.new_zeros(len(self.at), x.size(1), self.columns, x.size(3))
                        for x in (layer.keys, layer.values)
                    ]
                )
            for buffer, x in zip(self.buffers[i], (layer.keys, layer.values)):
                buffer[new, :, P - x.size(2) : P] = x[
                    copies.to(x.device)
                ]  # of a sliding window only the last

    def step(self):
        """Each row reads its token y, number t: -> the logits after it, (b, V). No read by the host, no new address."""
        self.cell = torch.arange(self.b, device=self.at.device), self.ids.size(1) + self.t
        self.seen[self.cell] = True
        seen = self.seen[: self.b, : self.width]  # (b, L)
        return self.model(
            input_ids=self.y[: self.b].unsqueeze(1),
            attention_mask=seen,
            position_ids=seen.sum(1, keepdim=True) - 1,
            cache=self,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def update(self, keys, values, layer_idx, *args, **kwargs):
        """Of transformers' Cache: write the new keys and values (b, h, 1, d): -> all of the layer's, (b, h, L, d)."""
        rows, columns = (x.to(keys.device) for x in self.cell)  # (b,), (b,)
        for buffer, x in zip(self.buffers[layer_idx], (keys, values)):
            buffer[rows, :, columns] = x.squeeze(2).to(buffer.dtype)
        return [buffer[: len(keys), :, : self.width] for buffer in self.buffers[layer_idx]]

    def get_seq_length(self, layer_idx=0):
        """The column of the new token, at which windows end; without windows any that is not before it."""
        return self.ids.size(1) + self.at[0] if self.in_waves else self.width - 1

    def get_mask_sizes(self, query_length, layer_idx):
        return self.width, 0


class Captured(Slots):
    """Slots whose step is a replay of a CUDA graph, captured where it is first needed: for 1, 2, 4, 8, ... rows and
    1,024, 2,048, ... columns. Free rows and columns are computed, too, and nothing of them is read.

    The graphs live as long as the rollout. Under autocast the casts of the weights are those of the first prompts,
    which autocast keeps: nothing is cast in a replay. What cannot be captured is run as it is, and that is said.
    """

    every = 16

    def __init__(self, *args, **kwargs):
        self.graphs, self.pool = {}, None  # (rows, columns): a graph, its logits
        super().__init__(*args, **kwargs)

    def step(self):
        b, width = self.b, self.width
        self.b, self.width = (
            min(1 << (b - 1).bit_length(), len(self.at)),
            min(-(-width // 1024) * 1024, self.columns),
        )
        logits = self.replay(super().step)
        self.b, self.width = b, width
        return logits[:b]

    def replay(self, step):
        size = self.b, self.width
        if size not in self.graphs:
            try:
                self.graphs[size] = self.capture(step)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                warnings.warn(
                    f"{type(self.model).__name__} is not captured in a CUDA graph and writes at the speed of "
                    f"its launches: {str(error).splitlines()[0]}"
                )
                self.capture = lambda step: step
                self.graphs[size] = step
        return self.graphs[size]()

    def capture(self, step):
        """step() as a graph: what it allocates is kept, what it reads from outside stays where it is."""
        step()  # loads the kernels; done again, it writes the same
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.current_stream()):  # current again where a capture fails
            with torch.cuda.graph(graph, pool=self.pool):
                logits = step()
        self.pool = graph.pool()
        return lambda: graph.replay() or logits
