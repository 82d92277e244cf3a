"""rollout.py: the student writes (paper 2.2): y ~ p(.|x), drawn from exactly the softmax that the loss scores.

    prompts -> read once each -> n rows of one cache -> a token a row and step -> who has finished leaves,
                                                                                  the next prompt takes its place

No top-k, no top-p, no repetition penalty stands between the softmax and the draw: `generate` of transformers has such
defaults (and reads more from a checkpoint's generation_config.json), and then the student is trained on text that it
did not write. top_p exists here for evaluation alone.

To copy: this file alone. Models and token ids: no tokenizers, no files.
"""
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer


@dataclass
class Rollout:
    """B = len(prompts) * n responses; those to prompt i are rows i*n to i*n + n-1.

    P and T: longest prompt and response.
    """
    ids: torch.Tensor              # (B, P+T) prompts padded on the left, responses on the right
    attention_mask: torch.Tensor   # (B, P+T) bool, true at prompt and response tokens
    response_mask: torch.Tensor    # (B, T)   bool, true up to and including the first eos
    log_p: torch.Tensor            # (B, T)   log-probability of each response token under the full softmax, 0 elsewhere
    truncated: torch.Tensor        # (B,)     bool, no eos within max_new_tokens

    @property
    def is_response(self):
        """(B, P+T) bool, true at response tokens."""
        return pad(self.response_mask, (self.ids.size(1) - self.response_mask.size(1), 0))

    def response_ids(self, row):
        """The tokens of one response, its eos included: list of int."""
        return self.ids[row, self.is_response[row]].tolist()


@torch.no_grad()
def rollout(model, prompts, *, n=1, max_new_tokens, temperature=1.0, top_p=1.0, eos_ids=(), pad_id=0, vocab_size=None,
            in_flight=None, seeds=None):
    """Sample n responses to each prompt (lists of token ids) from softmax(logits[:vocab_size] / temperature).

    Temperature 0 takes the likeliest token. top_p < 1 draws from the smallest set of tokens that holds that mass: for
    evaluation only, as the loss scores the full softmax; log_p is always that of the full softmax.
    Any of eos_ids ends a response and belongs to it; without eos_ids every response has max_new_tokens tokens.
    pad_id only fills the rectangle: it may equal an eos, since masks decide what counts.
    in_flight: how many responses are written at a time, all of them by default; it bounds the cache's memory.
    seeds: an int a prompt. Each token has a uniform number of its own, drawn from its prompt's seed, so that a response
    is the same whatever is written beside it, but for rounding. None: seeds of torch's global generator.
    Raises ValueError for an empty prompt, for no tokens to write, and for a model in training mode (dropout would
    sample another softmax).
    """
    if model.training:
        raise ValueError("call model.eval() before rollout: with dropout on, "
                         "what is sampled is not what the loss scores")
    if not prompts or not all(prompts) or max_new_tokens < 1:
        raise ValueError("every prompt needs at least one token, and max_new_tokens must be at least 1")
    device, B, T = model.get_input_embeddings().weight.device, len(prompts) * n, max_new_tokens
    seeds = torch.randint(2 ** 62, (len(prompts),)).tolist() if seeds is None else seeds
    u = torch.cat([torch.rand(n, T, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                   for seed in seeds]).to(device)                                           # (B, T)
    eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
    tokens, log_p = torch.full((B, T), pad_id, device=device), torch.zeros((B, T), device=device)
    length, truncated = torch.zeros(B, dtype=torch.long, device=device), torch.ones(B, dtype=torch.bool, device=device)
    places, waiting = max(1, min(B, in_flight or B) // n), list(range(len(prompts)))        # of prompts
    slots = Slots(model, rows=places * n, columns=max(map(len, prompts)) + T)
    while waiting or len(slots.rows):
        free = places - -(-len(slots.rows) // n)
        if waiting and (free == places or slots.can_join and 4 * free >= places):           # few, larger prefills
            some, waiting = waiting[:free], waiting[free:]
            slots.read(*left_pad([prompts[i] for i in some], pad_id, device),
                       rows=torch.tensor([range(i * n, i * n + n) for i in some], device=device))
        rows, t = slots.rows, length[slots.rows]                                # (b,) being written, (b,) at which token
        logits = slots.logits[:, :vocab_size].float()                                       # (b, V)
        log_probs = (logits / temperature if temperature not in (0, 1) else logits).log_softmax(-1)
        y = draw(log_probs, u[rows, t], top_p) if temperature else log_probs.argmax(-1)     # (b,)
        tokens[rows, t], log_p[rows, t] = y, log_probs.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        truncated[rows], length[rows] = ~torch.isin(y, eos), t + 1
        slots.feed(y, going=truncated[rows] & (t + 1 < T))
    T = int(length.max())
    ids, mask = (x.repeat_interleave(n, 0) for x in left_pad(prompts, pad_id, device))      # (B, P), (B, P)
    written = torch.arange(T, device=device) < length.unsqueeze(1)                          # (B, T)
    return Rollout(torch.cat([ids, tokens[:, :T]], 1), torch.cat([mask, written], 1), written, log_p[:, :T], truncated)


class Slots:
    """The responses being written: b rows of one cache of B rows x C columns, each with a column of its own to write to.

    A prompt stands in columns 0 to P-1, its response from P on, and `seen` masks the rest. Nothing is shifted: where a
    row leaves, the last one takes its place. Where a model's cache is more than keys and values (sliding windows,
    recurrent states) it stays as transformers made it, and the next prompts wait until all rows have left.
    """

    def __init__(self, model, rows, columns):
        self.model, self.cache, self.logits, self.can_join = model, None, None, True        # logits (b, V)
        device = model.get_input_embeddings().weight.device
        self.seen = torch.zeros(rows, columns, dtype=torch.bool, device=device)             # (B, C)
        self.rows = self.column = torch.empty(0, dtype=torch.long, device=device)           # (b,), (b,)

    def read(self, ids, mask, rows):
        """Read prompts (m, P) once and begin a response to each of them in each of its rows (m, n)."""
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=True,
                         logits_to_keep=1)
        (m, n), P, b = rows.shape, ids.size(1), len(self.rows)
        copies, here = torch.arange(m, device=ids.device).repeat_interleave(n), slice(b, b + m * n)     # (m * n,)
        self.rows = torch.cat([self.rows, rows.flatten()])
        self.column = torch.cat([self.column, torch.full_like(copies, P)])
        self.seen[here] = False
        self.seen[here, :P] = mask[copies]
        logits = out.logits[copies, -1]                                                     # (m * n, V)
        self.logits = torch.cat([self.logits, logits]) if b else logits
        layers, self.can_join = out.cache.layers, all(type(layer) is DynamicLayer for layer in out.cache.layers)
        if not self.can_join:
            self.cache = out.cache
            return self.cache.reorder_cache(copies)
        if self.cache is None:
            self.cache, out.cache.layers = out.cache, [SlotLayer(self, layer) for layer in layers]
        for mine, new in zip(self.cache.layers, layers):
            mine.join(new, copies, here)

    def feed(self, y, going):
        """Rows that are not going (b,) leave; each of the others reads its token y (b,), which gives its next logits."""
        b = int(going.sum())
        if b < len(going):
            order = torch.arange(b, device=y.device)                            # row i becomes what row order[i] is
            order[~going[:b]] = b + going[b:].nonzero().squeeze(-1)
            self.rows, self.column, self.seen[:b], y = (x[order] for x in (self.rows, self.column, self.seen, y))
            self.cache.reorder_cache(order)
        if b:
            self.seen[torch.arange(b, device=y.device), self.column] = True
            self.width = int(self.column.max()) + 1
            seen = self.seen[:b, :self.width]                                               # (b, L)
            self.logits = self.model(input_ids=y.unsqueeze(1), attention_mask=seen, cache=self.cache, use_cache=True,
                                     position_ids=seen.sum(1, keepdim=True) - 1, logits_to_keep=1).logits[:, -1]
            self.column += 1


class SlotLayer(DynamicLayer):
    """Keys and values of one layer in buffers (B, h, C, d) that stay where they are; finite: what is masked is read, too.

    Keys get the dtype of the values: autocast leaves float32 keys, which attention then rounds.
    """

    def __init__(self, slots, layer):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        (B, C), h = slots.seen.shape, layer.keys.size(1)
        self.slots = slots
        self.buffers = [layer.values.new_zeros(B, h, C, x.size(-1)) for x in (layer.keys, layer.values)]

    def join(self, layer, copies, here):
        for buffer, x in zip(self.buffers, (layer.keys, layer.values)):
            buffer[here, :, :x.size(2)] = x[copies.to(x.device)]

    def update(self, keys, values, *args, **kwargs):
        b, column = len(keys), self.slots.column.to(keys.device)                            # (b,)
        for buffer, x in zip(self.buffers, (keys, values)):
            buffer[torch.arange(b, device=keys.device), :, column] = x.squeeze(2).to(buffer.dtype)
        return [buffer[:b, :, :self.slots.width] for buffer in self.buffers]                # (b, h, L, d)

    def get_seq_length(self):
        return self.slots.width - 1

    def reorder_cache(self, order):
        order = order.to(self.buffers[0].device)                                # a layer may stand on another device
        moved = (order != torch.arange(len(order), device=order.device)).nonzero().squeeze(-1)
        for buffer in self.buffers:
            buffer[moved] = buffer[order[moved]]


def draw(log_p, u, top_p=1.0):
    """One token a row, from exp(log_p), or from its smallest set of tokens with mass >= top_p:
    (b, V), (b,) uniform numbers in [0, 1) -> (b,), the first token up to which the mass exceeds u.
    """
    p, order = log_p.exp(), None                                                            # (b, V)
    if top_p < 1:
        m, V = 256, p.size(-1)                                   # a few tokens hold that mass: no need to sort all V
        top, order = p.topk(min(m, V))
        while m < V and (top.double().sum(-1) < top_p).any():
            m *= 16
            top, order = p.topk(min(m, V))
        p = torch.where(top.cumsum(-1) - top < top_p, top, 0)    # keep while the mass before a token is below top_p
    mass = p.cumsum(-1, dtype=torch.float64)                     # float32 would lose tokens of 1e-7 and less
    y = torch.searchsorted(mass, (u * mass[:, -1]).unsqueeze(-1), right=True)                   # (b, 1)
    y = y.clamp_max(p.size(-1) - 1)                              # for rounding, and for NaN, which the loss reports
    return (y if order is None else order.gather(-1, y)).squeeze(-1)


def left_pad(prompts, pad_id, device=None):
    """[[5, 6], [7]] -> ids [[5, 6], [pad, 7]], mask [[1, 1], [0, 1]]:
    lists of token ids -> (B, P) long, (B, P) bool.
    """
    P = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (P - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[False] * (P - len(prompt)) + [True] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


def position_ids(attention_mask):
    """0, 1, 2, ... from the first real token of each row, 0 in the padding before it: (B, L) -> (B, L)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
