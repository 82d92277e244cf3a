"""rollout.py: the student writes (paper 2.2): y ~ p(.|x), drawn from exactly the softmax that the loss scores.

A prompt is read once for its n responses, rows of one cache; who has ended makes room for the next prompt. No top-k,
top-p or repetition penalty stands between softmax and draw, as in `generate` of transformers: the student would be
trained on text that it did not write. top_p is here for evaluation. To copy: this file alone. transformers >= 5.24.
"""
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


@dataclass
class Rollout:
    """B = len(prompts) * n responses, those to prompt i in rows i*n to i*n + n-1. P, T: longest prompt, response."""
    ids: torch.Tensor              # (B, P+T) prompts padded on the left, responses on the right
    attention_mask: torch.Tensor   # (B, P+T) bool, true at prompt and response tokens
    is_response: torch.Tensor      # (B, P+T) bool, true at response tokens, up to and including the first eos
    log_p: torch.Tensor            # (B, T)   log-probability of each response token under the full softmax, 0 elsewhere
    truncated: torch.Tensor        # (B,)     bool, no eos within max_new_tokens

    @property
    def response_mask(self):       # (B, T)   bool, without the columns of the prompts
        return self.is_response[:, -self.log_p.size(1):]

    def response_ids(self, row):
        """The tokens of one response, its eos included: list of int."""
        return self.ids[row, self.is_response[row]].tolist()


@torch.no_grad()
def rollout(model, prompts, *, n=1, max_new_tokens, temperature=1.0, top_p=1.0, eos_ids, merge_ends=False, pad_id=0,
            vocab_size=None, in_flight=None, seeds=None):
    """Sample n responses to each prompt (token ids) from softmax(logits[:vocab_size] / temperature): -> Rollout.

    Temperature 0 takes the likeliest token; top_p < 1 draws from the smallest set of tokens with that mass. log_p is
    always that of the full softmax, as the loss scores it. Any of eos_ids ends a response and belongs to it; with
    merge_ends they are one event, see one_end. pad_id fills the rectangle and may equal an eos. in_flight: responses
    written at a time, all by default; it bounds memory.
    seeds: an int a prompt, random by default. Each token has a uniform number of its own that follows from it: a
    response is the same whatever is written beside it, but for rounding. ValueError where nothing can be written.
    """
    if model.training:
        raise ValueError("call model.eval() before rollout: with dropout, what is sampled is not what the loss scores")
    if not prompts or not all(prompts) or max_new_tokens < 1:
        raise ValueError("every prompt needs at least one token, and max_new_tokens must be at least 1")
    device, B, T = model.get_input_embeddings().weight.device, len(prompts) * n, max_new_tokens
    seeds = seeds if seeds is not None else torch.randint(2 ** 62, (len(prompts),), device="cpu").tolist()
    u = torch.cat([torch.rand(n, T, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(seed))
                   for seed in seeds]).to(device)                                           # (B, T)
    eos = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
    tokens, log_p = torch.full((B, T), pad_id, device=device), torch.zeros((B, T), device=device)
    length, ended = torch.zeros(B, dtype=torch.long, device=device), torch.zeros(B, dtype=torch.bool, device=device)
    ids, mask = left_pad(prompts, pad_id, device)                                           # (m, P), (m, P)
    slots = Slots(model, ids, mask, n, places=max(1, min(B, in_flight or B) // n), columns=ids.size(1) + T)
    slots.fill()
    while len(slots.rows):
        rows, t = slots.rows, length[slots.rows]                        # (b,) who is writing, and at which token
        z = one_end(slots.logits[:, :vocab_size].float(), eos[:len(eos) * merge_ends], temperature or 1.0)      # (b, V)
        log_probs = (z / (temperature or 1.0)).log_softmax(-1)                              # (b, V)
        y = draw(log_probs, u[rows, t], top_p) if temperature else log_probs.argmax(-1)     # (b,)
        tokens[rows, t], log_p[rows, t] = y, log_probs.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        ended[rows], length[rows] = torch.isin(y, eos), t + 1
        slots.feed(y, t, going=~ended[rows] & (t + 1 < T))
        slots.fill()
    T = int(length.max())
    written = torch.arange(T, device=device) < length.unsqueeze(1)                          # (B, T)
    ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)                   # (B, P), (B, P)
    return Rollout(torch.cat([ids, tokens[:, :T]], 1), torch.cat([mask, written], 1),
                   torch.cat([torch.zeros_like(mask), written], 1), log_p[:, :T], ~ended)


class Slots(DynamicCache):
    """The responses being written: b rows of one cache of B rows x C columns. A prompt stands in the first P columns,
    padded on the left, token t of its response in column P + t; so each row writes to a column of its own.

    Nothing is shifted: where a row leaves, the last one takes its place. Where a model's cache is more than keys and
    values (sliding windows, recurrent states) it keeps its `own_cache`; the next prompts wait until all have left.
    """

    def __init__(self, model, ids, mask, n, places, columns):                   # ids, mask (m, P); places: of prompts
        super().__init__()
        self.model, self.ids, self.mask, self.n, self.places, self.columns = model, ids, mask, n, places, columns
        self.begun = 0                                                                      # prompts
        self.rows, self.logits = ids.new_empty(0), torch.empty(0, device=ids.device)        # (b,), (b, V)
        self.buffers, self.own_cache = [], None                     # keys and values of each layer, (B, h, C, d)

    def fill(self):
        """Read the next prompts, where there are some and at least a quarter of the places is free."""
        b, P = len(self.rows), self.ids.size(1)
        free = self.places - -(-b // self.n)
        if self.begun == len(self.ids) or (b and (self.own_cache or 4 * free < self.places)):
            return
        ids, mask = (x[self.begun:self.begun + free] for x in (self.ids, self.mask))
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=True,
                         logits_to_keep=1)
        copies = torch.arange(len(ids), device=ids.device).repeat_interleave(self.n)        # each prompt n times
        self.rows = torch.cat([self.rows, torch.arange(len(copies), device=ids.device) + self.begun * self.n])
        self.logits, self.begun = torch.cat([self.logits[:b], out.logits[copies, -1]]), self.begun + len(ids)
        if any(type(layer) is not DynamicLayer for layer in out.cache.layers):
            self.own_cache = out.cache
            return self.own_cache.reorder_cache(copies)
        for i, layer in enumerate(out.cache.layers):
            if i == len(self.buffers):          # zeros, since what is masked is read; autocast leaves keys in float32
                self.buffers.append([layer.values.new_zeros(self.places * self.n, x.size(1), self.columns, x.size(3))
                                     for x in (layer.keys, layer.values)])
            for buffer, x in zip(self.buffers[i], (layer.keys, layer.values)):
                buffer[b:b + len(copies), :, :P] = x[copies.to(x.device)]

    def feed(self, y, t, going):
        """Rows that are not going leave; the others read their token y, number t, for the next logits: (b,) each."""
        b, P = int(going.sum()), self.ids.size(1)
        if b < len(going):
            left, last = (~going[:b]).nonzero().squeeze(-1), b + going[b:].nonzero().squeeze(-1)
            order = torch.arange(b, device=y.device).index_put((left,), last)               # row i becomes row order[i]
            self.rows, y, t = self.rows[order], y[order], t[order]
            for buffer in sum(self.buffers, []):
                buffer[left.to(buffer.device)] = buffer[last.to(buffer.device)]
            if self.own_cache:
                self.own_cache.reorder_cache(order)
        if b:
            self.at, self.width = (torch.arange(b, device=y.device), P + t), P + int(t.max()) + 1
            written = torch.arange(self.width - P, device=y.device) <= t.unsqueeze(1)       # (b, L-P)
            seen = torch.cat([self.mask[self.rows // self.n], written], 1)                  # (b, L)
            position = seen.sum(1, keepdim=True) - 1                                        # (b, 1)
            if self.own_cache and not any(hasattr(layer, "keys") for layer in self.own_cache.layers):
                seen = seen[:, -1:]                         # Mamba: states alone, nothing to attend to
            self.logits = self.model(input_ids=y.unsqueeze(1), attention_mask=seen, cache=self.own_cache or self,
                                     position_ids=position, use_cache=True, logits_to_keep=1).logits[:, -1]

    def update(self, keys, values, layer_idx, *args, **kwargs):
        """Of transformers' Cache: write the new keys and values (b, h, 1, d): -> all of the layer's, (b, h, L, d)."""
        rows, columns = (x.to(keys.device) for x in self.at)                                # (b,), (b,)
        for buffer, x in zip(self.buffers[layer_idx], (keys, values)):
            buffer[rows, :, columns] = x.squeeze(2).to(buffer.dtype)
        return [buffer[:len(keys), :, :self.width] for buffer in self.buffers[layer_idx]]

    def get_seq_length(self, layer_idx=0):                                      # before this token
        return self.width - 1

    def get_mask_sizes(self, query_length, layer_idx):
        return self.width, 0


def draw(log_p, u, top_p=1.0):
    """The first token up to which the mass of exp(log_p), or of its smallest set of tokens with mass >= top_p, exceeds
    the share u of the whole: (b, V), (b,) uniform numbers in [0, 1) -> (b,).
    """
    p = log_p.exp()                                                                         # (b, V)
    if top_p < 1:
        top, order = p.topk(min(1024, p.size(-1)))               # a few tokens hold that mass: no need to sort all V
        if (top.double().sum(-1) < top_p).any():
            top, order = p.sort(descending=True)
        kept = torch.where(top.cumsum(-1) - top < top_p, top, 0)        # while the mass before a token is below top_p
        return order.gather(-1, draw(kept.log(), u).unsqueeze(-1)).squeeze(-1)
    mass = p.cumsum(-1, dtype=torch.float64)                     # float32 would lose tokens of 1e-7 and less
    y = torch.searchsorted(mass, (u * mass[:, -1]).unsqueeze(-1), right=True).squeeze(-1)   # (b,)
    return y.clamp_max(p.size(-1) - 1)                           # for rounding, and for NaN, which the loss reports


def one_end(logits, ends, temperature=1.0):
    """Logits (..., V) with all tokens `ends` (e,) that end a response as one event: the first has the mass of all.

    Student and teacher of a family often end with different tokens (Qwen3-1.7B-Base <|endoftext|>, Qwen3-4B
    <|im_end|>: the paper's 3.1 and 5.1). Token by token each rules out the other's end, and the student is taught
    never to end. Differs from the paper, which compares tokens. With one end nothing changes.
    """
    if len(ends) < 2:
        return logits
    ends = torch.as_tensor(ends, device=logits.device)
    whole = (logits[..., ends] / temperature).logsumexp(-1, keepdim=True) * temperature
    return logits.index_fill(-1, ends[1:], -torch.inf).index_copy(-1, ends[:1], whole)


def left_pad(prompts, pad_id, device=None):
    """[[5, 6], [7]] -> ids [[5, 6], [pad, 7]], mask [[1, 1], [0, 1]]: lists of ids -> (B, P) long, (B, P) bool."""
    P = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (P - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    return ids, torch.tensor([[0] * (P - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device) > 0


def position_ids(attention_mask):
    """0, 1, 2, ... from the first real token of each row, 0 in the padding before it: (B, L) -> (B, L)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
