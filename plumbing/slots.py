"""plumbing/slots.py: rollout.rollout, faster, with the same result.

`rollout` replaces the whole function of rollout.py. It writes all responses in one cache that is
allocated once. A row is a place for one response, and nothing ever moves to another column.

    P = 4 columns of the prompt, padded on the left    then token t of the response in column P + t

    row 0    .   .   p   p    y0  y1  y2              has ended
    row 1    p   p   p   p    y0  y1  y2  y3
    row 2    .   p   p   p    y0  y1                  has joined later

A row that ends is overwritten with the last row, here row 2 in place of row 0. Rows that are in use
are always the first ones. The next prompts join behind them, and they start at column P again, so
the cache is never wider than the longest prompt and one response.

On a GPU, a step of eager transformers is dozens of small launches a layer, which take longer than
what they compute. `Captured` records a step in a CUDA graph and replays all of them in one launch.
It looks only at every 16th token which rows have ended, and reads nothing from the GPU in between.

For models whose cache is more than keys and values, rollout.rollout writes.

To copy: with rollout.py.
"""

import math
import warnings

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import rollout as plain
from rollout import (
    as_rollout,
    check,
    draw,
    left_pad,
    log_softmax,
    merge_ends,
    position_ids,
    uniform,
)


@torch.no_grad()
def rollout(
    model,
    prompts,
    *,
    n=1,
    max_new_tokens,
    eos_ids,
    merge=False,
    temperature=1.0,
    top_p=1.0,
    pad_id=0,
    vocab_size=None,
    seeds=None,
    in_flight=None,
):
    """Sample n responses to each prompt, see rollout.rollout: same arguments, same Rollout.

    in_flight: at most so many responses are written at a time, which bounds the memory of the
    cache; all by default. If it is less than n, a prompt is read again for each of its responses.
    If rollout.rollout writes for the model, n are then written at a time.
    """
    check(model, prompts, n, max_new_tokens, eos_ids, temperature, top_p)
    prompts_at_once = len(prompts)
    if in_flight:
        prompts_at_once = min(prompts_at_once, max(1, in_flight // n))
    kind = kind_of(model)
    if kind is None:
        return in_pieces(
            model,
            prompts,
            prompts_at_once,
            n=n,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            merge=merge,
            temperature=temperature,
            top_p=top_p,
            pad_id=pad_id,
            vocab_size=vocab_size,
            seeds=seeds,
        )

    device = model.get_input_embeddings().weight.device
    eos = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
    u = uniform(seeds, len(prompts), n, max_new_tokens).to(device)  # (B, T)
    if in_flight and in_flight < n:
        prompts = [prompt for prompt in prompts for _ in range(n)]
        n = 1
        prompts_at_once = min(len(prompts), in_flight)
    prompt_ids, prompt_mask = left_pad(prompts, pad_id, device)  # (m, P), (m, P)

    B = len(prompts) * n
    tokens = torch.full((B, max_new_tokens), pad_id, device=device)
    log_p = torch.zeros((B, max_new_tokens), device=device)
    lengths = torch.zeros(B, dtype=torch.long, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)

    slots = kind(model, prompt_ids, prompt_mask, n, prompts_at_once, max_new_tokens)
    while slots.rows > 0:
        response = slots.response[: slots.rows]  # (b,) which response each row writes
        t = slots.t[: slots.rows]  # (b,) and which token of it
        log_probs = log_softmax(slots.logits[:, :vocab_size], temperature)  # (b, V)
        if merge:
            log_probs = merge_ends(log_probs, eos)
        if temperature > 0:
            y = draw(log_probs, u[response, t], top_p)  # (b,)
        else:
            y = log_probs.argmax(-1)
        tokens[response, t] = y
        log_p[response, t] = log_probs.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        lengths[response] += (~ended[response]).long()  # some rows go on after their end, see feed
        ended[response] |= (y.unsqueeze(-1) == eos).any(-1)
        going = ~ended[response] & (t + 1 < max_new_tokens)
        slots.feed(y, going)

    after_the_end = torch.arange(max_new_tokens, device=device) >= lengths.unsqueeze(1)  # (B, T)
    tokens = tokens.masked_fill(after_the_end, pad_id)
    log_p = log_p.masked_fill(after_the_end, 0)
    copies = torch.arange(len(prompts), device=device).repeat_interleave(n)  # (B,)
    return as_rollout(prompt_ids[copies], prompt_mask[copies], tokens, log_p, lengths, ended)


def kind_of(model):
    """The class that writes for a model: Captured on a GPU, else Slots; None: rollout.rollout."""
    config = model.config.get_text_config(decoder=True)
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    if not all(type(layer) in known for layer in DynamicCache(config=config).layers):
        return None  # recurrent states
    if "local" in getattr(config, "attention_layers", []):
        # GPT-Neo: all windows end at the cache's last column, and the cache is not told of them
        return None
    return Captured if model.device.type == "cuda" else Slots


def in_pieces(model, prompts, prompts_at_once, *, n, seeds, pad_id, **how):
    """rollout.rollout for prompts_at_once prompts at a time, joined: -> Rollout."""
    if seeds is None:
        seeds = torch.randint(2**62, (len(prompts),), device="cpu").tolist()
    pieces = []
    for start in range(0, len(prompts), prompts_at_once):
        some = slice(start, start + prompts_at_once)
        piece = plain.rollout(model, prompts[some], n=n, seeds=seeds[some], pad_id=pad_id, **how)
        pieces.append(piece)

    T = max(piece.log_p.size(1) for piece in pieces)
    tokens = []
    log_p = []
    for piece in pieces:
        length = piece.log_p.size(1)
        tokens.append(pad(piece.ids[:, -length:], (0, T - length), value=pad_id))
        log_p.append(pad(piece.log_p, (0, T - length)))
    prompt_ids, prompt_mask = left_pad(prompts, pad_id, pieces[0].ids.device)  # (m, P), (m, P)
    return as_rollout(
        prompt_ids.repeat_interleave(n, dim=0),
        prompt_mask.repeat_interleave(n, dim=0),
        torch.cat(tokens),
        torch.cat(log_p),
        lengths=torch.cat([piece.response_mask.sum(1) for piece in pieces]),
        ended=torch.cat([~piece.truncated for piece in pieces]),
    )


class Slots(DynamicCache):
    """The responses that are being written: B rows and C columns, of which `rows` rows are in use.

    It is the cache that transformers gets. Layers with a sliding window (Gemma 3) end the windows
    of all rows at the same column. So in a model with such layers, no prompt joins before all rows
    have left.
    """

    look_every = 1  # tokens between two looks at which rows have ended

    def __init__(self, model, prompt_ids, prompt_mask, n, prompts_at_once, max_new_tokens):
        super().__init__()
        self.model = model
        self.prompt_ids = prompt_ids  # (m, P)
        self.prompt_mask = prompt_mask  # (m, P)
        self.n = n
        self.prompts_at_once = prompts_at_once
        self.P = prompt_ids.size(1)
        self.columns = self.P + max_new_tokens

        B = prompts_at_once * n
        self.response = prompt_ids.new_zeros(B)  # which response a row writes
        self.t = prompt_ids.new_zeros(B)  # which token of it comes next
        self.y = prompt_ids.new_zeros(B)  # the token before that
        self.attended = prompt_mask.new_zeros(B, self.columns)  # the columns that a row reads
        self.keys = []  # of each layer (B, heads, C, d)
        self.values = []
        self.logits = None  # (rows, V) for the next token

        self.rows = 0  # in use, the first ones
        self.width = self.P  # columns in use
        self.prompts_read = 0  # prompts that have been read
        self.steps = 0  # tokens
        self.in_waves = False  # are there sliding windows?
        self.join()

    def feed(self, y, going):
        """The rows read their tokens y (b,), for the next logits.

        Rows that are not going, (b,) bool, leave at the next look, and the next prompts join.
        """
        self.y[: self.rows] = y
        self.steps += 1
        full = self.width + 1 == self.columns  # a row has written max_new_tokens
        if full or self.steps % self.look_every == 0:
            self.leave(going)
        if self.rows > 0:
            self.width += 1
            self.logits = self.step()
            self.t.add_(1).clamp_(max=self.columns - self.P - 1)  # of free rows, too: unused
        self.join()

    def leave(self, going):
        """Free the rows that are not going, (b,) bool: the last ones that are take their places."""
        staying = int(going.sum())
        if staying < self.rows:
            free = (~going[:staying]).nonzero().squeeze(-1)
            last = staying + going[staying:].nonzero().squeeze(-1)
            for state in (self.response, self.t, self.y, self.attended, *self.keys, *self.values):
                state[free] = state[last]
        self.rows = staying
        self.width = self.P
        if staying > 0:
            self.width += int(self.t[:staying].max())

    def join(self):
        """Read the next prompts, each once for its n responses, into the free rows.

        Fewer than a quarter of the places would not pay for a forward pass of their own.
        """
        free = self.prompts_at_once - math.ceil(self.rows / self.n)
        all_read = self.prompts_read == len(self.prompt_ids)
        if all_read or 4 * free < self.prompts_at_once:
            return
        if self.in_waves and self.rows > 0:
            return

        mask = self.prompt_mask[self.prompts_read : self.prompts_read + free]  # (m, P)
        out = self.model(
            input_ids=self.prompt_ids[self.prompts_read : self.prompts_read + free],
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=True,
            logits_to_keep=1,
        )
        copies = torch.arange(len(mask), device=mask.device).repeat_interleave(self.n)  # (b,)
        first = self.rows
        new = slice(first, first + len(copies))
        self.response[new] = self.prompts_read * self.n + torch.arange(
            len(copies), device=mask.device
        )
        self.t[first:] = 0
        self.attended[first:] = False
        self.attended[new, : self.P] = mask[copies]
        self.keep_states(out.cache, copies, new)

        logits = out.logits[copies, -1]  # (b, V)
        self.logits = logits if first == 0 else torch.cat([self.logits[:first], logits])
        self.rows += len(copies)
        self.prompts_read += len(mask)

    def keep_states(self, cache, copies, new):
        """Copy what a prompt left in a cache of transformers into its n rows."""
        if not self.keys:
            B = len(self.t)
            for layer in cache.layers:
                if type(layer) is DynamicSlidingWindowLayer:
                    self.in_waves = True
                _, heads, _, d = layer.keys.shape
                _, _, _, d_of_values = layer.values.shape
                # zeros, because masked columns are read, too; the dtype is that of the values,
                # because autocast leaves keys in float32
                self.keys.append(layer.values.new_zeros(B, heads, self.columns, d))
                self.values.append(layer.values.new_zeros(B, heads, self.columns, d_of_values))
        for i, layer in enumerate(cache.layers):
            # a layer with a sliding window has kept only the last columns
            start = self.P - layer.keys.size(2)
            self.keys[i][new, :, start : self.P] = layer.keys[copies].to(self.keys[i].dtype)
            self.values[i][new, :, start : self.P] = layer.values[copies]

    def step(self):
        """Each row in use reads its token y: -> the logits of the next one, (rows, V)."""
        return self.forward(self.rows, self.width)

    def forward(self, rows, columns):
        """The first rows read their tokens, within the first columns: -> logits (rows, V).

        The host reads nothing, and all tensors stay where they are: a graph can be captured.
        """
        t = self.t[:rows]
        self.cell = (torch.arange(rows, device=t.device), self.P + t)  # where each row writes
        self.attended[self.cell] = True
        self.columns_read = columns
        attended = self.attended[:rows, :columns]
        out = self.model(
            input_ids=self.y[:rows].unsqueeze(1),
            attention_mask=attended,
            position_ids=attended.sum(1, keepdim=True) - 1,
            cache=self,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def update(self, keys, values, layer_idx, *args, **kwargs):
        """Called by a layer: takes new keys and values (b, h, 1, d), returns all, (b, h, L, d)."""
        rows, columns = self.cell  # (b,), (b,)
        all_keys = self.keys[layer_idx]
        all_values = self.values[layer_idx]
        all_keys[rows, :, columns] = keys.squeeze(2).to(all_keys.dtype)
        all_values[rows, :, columns] = values.squeeze(2)
        b = len(rows)
        return all_keys[:b, :, : self.columns_read], all_values[:b, :, : self.columns_read]

    def get_seq_length(self, layer_idx=0):
        """The column at which windows end.

        Without windows, any column that is not before a new token will do.
        """
        if self.in_waves:
            return self.P + self.t[0]
        return self.columns_read - 1

    def get_mask_sizes(self, query_length, layer_idx):
        """The columns of the attention mask, and the first of them."""
        return self.columns_read, 0


class Captured(Slots):
    """Slots whose step is the replay of a CUDA graph.

    A graph is captured when it is first needed: for 1, 2, 4, 8, ... rows and 1,024, 2,048, ...
    columns. Free rows and columns are computed, too, but not read. Graphs live as long as the
    rollout. Under autocast the weights are cast when the prompts are read. Autocast keeps these
    casts, so a replay casts none.
    """

    look_every = 16

    def __init__(self, *args):
        self.graphs = {}  # (rows, columns) -> a function that replays the graph, -> logits
        self.pool = None  # the memory that the graphs share
        self.can_capture = True
        super().__init__(*args)

    def step(self):
        """As Slots.step, by a graph that is large enough; without a graph if capturing fails."""
        B = len(self.t)
        rows = min(1 << (self.rows - 1).bit_length(), B)
        columns = min(math.ceil(self.width / 1024) * 1024, self.columns)
        size = (rows, columns)
        if self.can_capture and size not in self.graphs:
            try:
                self.graphs[size] = self.capture(rows, columns)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.can_capture = False
                reason = str(error).splitlines()[0]
                warnings.warn(
                    f"{type(self.model).__name__} is not captured in a CUDA graph "
                    f"and writes at the speed of its launches: {reason}",
                    stacklevel=2,
                )
        if not self.can_capture:
            return super().step()
        logits = self.graphs[size]()
        return logits[: self.rows]

    def capture(self, rows, columns):
        """forward(rows, columns) as a graph: -> a function that replays it."""
        self.forward(rows, columns)  # loads the kernels; done again, it writes the same
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.current_stream()):  # current again if a capture fails
            with torch.cuda.graph(graph, pool=self.pool):
                logits = self.forward(rows, columns)
        self.pool = graph.pool()

        def replay():
            graph.replay()
            return logits

        return replay
