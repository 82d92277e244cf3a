"""rollout.py: the student writes (paper 2.2): y ~ p(.|x), drawn from exactly the softmax that the loss scores.

A prompt is read once for its n responses, rows of one cache; who has ended leaves it. No top-k, top-p or repetition
penalty stands between softmax and draw, as in `generate` of transformers: the student would be trained on text that it
did not write. top_p is here for evaluation. To copy: this file alone. It needs transformers 5.24 or later.
The same faster, for most models: decoder=plumbing.slots.fastest, which the commands of this project take.
"""

from dataclasses import dataclass

import torch


@dataclass
class Rollout:
    """B = len(prompts) * n responses, those to prompt i in rows i*n to i*n + n-1. P, T: longest prompt, response."""

    ids: torch.Tensor  # (B, P+T) prompts padded on the left, responses on the right
    attention_mask: torch.Tensor  # (B, P+T) bool, true at prompt and response tokens
    is_response: (
        torch.Tensor
    )  # (B, P+T) bool, true at response tokens, up to and including the first eos
    log_p: (
        torch.Tensor
    )  # (B, T)   log-probability of each response token under the full softmax, 0 elsewhere
    truncated: torch.Tensor  # (B,)     bool, no eos within max_new_tokens

    @property
    def response_mask(self):  # (B, T)   bool, without the columns of the prompts
        return self.is_response[:, -self.log_p.size(1) :]

    def response_ids(self, row):
        """The tokens of one response, its eos included: list of int."""
        return self.ids[row, self.is_response[row]].tolist()


@torch.no_grad()
def rollout(
    model,
    prompts,
    *,
    n=1,
    max_new_tokens,
    temperature=1.0,
    top_p=1.0,
    eos_ids,
    merge_ends=False,
    pad_id=0,
    vocab_size=None,
    in_flight=None,
    seeds=None,
    decoder=None,
):
    """Sample n responses to each prompt (token ids) from softmax(logits[:vocab_size] / temperature): -> Rollout.

    Temperature 0 takes the likeliest token; top_p < 1 draws from the smallest set of tokens with that mass. log_p is
    always that of the full softmax, as the loss scores it. Any of eos_ids ends a response and belongs to it; with
    merge_ends they are one event, see one_end. pad_id fills the rectangle and may equal an eos. in_flight: responses
    written at a time, all by default; it bounds memory. decoder: Waves, or what does the same, see plumbing/slots.py.
    seeds: an int a prompt, random by default. Each token has a uniform number of its own that follows from it: a
    response is the same whatever is written beside it, but for rounding. ValueError where nothing can be written.
    """
    if model.training:
        raise ValueError(
            "call model.eval() before rollout: with dropout, what is sampled is not what the loss scores"
        )
    if not prompts or not all(prompts) or max_new_tokens < 1:
        raise ValueError(
            "every prompt needs at least one token, and max_new_tokens must be at least 1"
        )
    device, B, T = model.get_input_embeddings().weight.device, len(prompts) * n, max_new_tokens
    seeds = (
        seeds if seeds is not None else torch.randint(2**62, (len(prompts),), device="cpu").tolist()
    )
    u = torch.cat(
        [
            torch.rand(
                n,
                T,
                dtype=torch.float64,
                device="cpu",
                generator=torch.Generator().manual_seed(seed),
            )
            for seed in seeds
        ]
    ).to(device)  # (B, T)
    eos = torch.tensor(
        list(dict.fromkeys(eos_ids)), dtype=torch.long, device=device
    )  # each once, in order
    merged = eos if merge_ends else eos[:0]  # those that are one event
    ids, mask = left_pad(prompts, pad_id, device)  # (m, P), (m, P)
    tokens, log_p = torch.full((B, T), pad_id, device=device), torch.zeros((B, T), device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    writing = (decoder or Waves)(
        model, ids, mask, n, places=max(1, min(B, in_flight or B) // n), max_new_tokens=T
    )
    while len(writing.row):
        row, t = writing.row, writing.t  # (b,) who is writing, and at which token
        z = one_end(writing.logits[:, :vocab_size].float(), merged, temperature or 1.0)  # (b, V)
        log_probs = (z / (temperature or 1.0)).log_softmax(-1)  # (b, V)
        y = draw(log_probs, u[row, t], top_p) if temperature else log_probs.argmax(-1)  # (b,)
        tokens[row, t], log_p[row, t] = y, log_probs.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        ended[row] |= (y.unsqueeze(-1) == eos).any(-1)
        writing.feed(y, going=~ended[row] & (t + 1 < T))
    is_end = torch.isin(tokens, eos).long()  # (B, T)
    written = (
        is_end.cumsum(1) == is_end
    )  # up to the first end, whatever a row that had ended wrote after it
    T = int(written.sum(1).max())
    tokens, log_p, written = (
        x[:, :T] for x in (tokens.where(written, pad_id), log_p.where(written, 0), written)
    )
    ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)  # (B, P), (B, P)
    return Rollout(
        torch.cat([ids, tokens], 1),
        torch.cat([mask, written], 1),
        torch.cat([torch.zeros_like(mask), written], 1),
        log_p,
        ~ended,
    )


class Waves:
    """The responses being written, b rows of transformers' own cache, whatever the architecture keeps there; the next
    prompts begin when all of these have ended. plumbing/slots.py does the same faster.
    """

    def __init__(
        self, model, ids, mask, n, places, max_new_tokens
    ):  # ids, mask (m, P); places: of prompts
        self.model, self.n, self.waves = model, n, list(zip(ids.split(places), mask.split(places)))
        self.begun, self.row = 0, ids.new_empty(0)  # (b,) which response each row writes
        self.begin()

    def begin(self):
        """Read the prompts of the next wave, each once for its n responses."""
        ids, mask = self.waves.pop(0)
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=True,
            logits_to_keep=1,
        )
        copies = torch.arange(len(ids), device=ids.device).repeat_interleave(self.n)
        self.row = torch.arange(len(copies), device=ids.device) + self.begun * self.n
        self.begun, self.t, self.mask = (
            self.begun + len(ids),
            torch.zeros_like(self.row),
            mask[copies],
        )
        self.cache, self.logits = out.cache, out.logits[copies, -1]  # (b, V) for the next token
        self.cache.reorder_cache(copies)

    def feed(self, y, going):
        """The rows read their tokens y (b,), for the next logits; who is not going, (b,) bool, leaves."""
        kept = going.nonzero().squeeze(-1)
        if len(kept) < len(going):
            self.row, self.t, self.mask, y = (x[kept] for x in (self.row, self.t, self.mask, y))
            self.cache.reorder_cache(kept)
        if len(kept):
            self.t = self.t + 1
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(y), 1)], 1)  # (b, P + t)
            seen = (
                self.mask
                if any(hasattr(layer, "keys") for layer in self.cache.layers)
                else self.mask[:, -1:]
            )
            self.logits = self.model(  # Mamba has states alone: no earlier token to attend to
                input_ids=y.unsqueeze(1),
                attention_mask=seen,
                position_ids=position_ids(self.mask)[:, -1:],
                cache=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        elif self.waves:
            self.begin()


def draw(log_p, u, top_p=1.0):
    """The first token up to which the mass of exp(log_p), or of its smallest set of tokens with mass >= top_p, exceeds
    the share u of the whole: (b, V), (b,) uniform numbers in [0, 1) -> (b,).
    """
    p = log_p.exp()  # (b, V)
    if top_p < 1:
        top, order = p.topk(
            min(1024, p.size(-1))
        )  # a few tokens hold that mass: no need to sort all V
        if (top.double().sum(-1) < top_p).any():
            top, order = p.sort(descending=True)
        kept = torch.where(
            top.cumsum(-1) - top < top_p, top, 0
        )  # while the mass before a token is below top_p
        return order.gather(-1, draw(kept.log(), u).unsqueeze(-1)).squeeze(-1)
    mass = p.cumsum(-1, dtype=torch.float64)  # float32 would lose tokens of 1e-7 and less
    y = torch.searchsorted(mass, (u * mass[:, -1]).unsqueeze(-1), right=True).squeeze(-1)  # (b,)
    return y.clamp_max(p.size(-1) - 1)  # for rounding, and for NaN, which the loss reports


def one_end(logits, ends, temperature=1.0):
    """Logits (..., V) with all tokens `ends` (e,) that end a response as one event: the first has the mass of all.

    Student and teacher of a family often end with different tokens (Qwen3-1.7B-Base <|endoftext|>, Qwen3-4B
    <|im_end|>: the paper's 3.1 and 5.1). Token by token each rules out the other's end, and the student is taught
    never to end. Differs from the paper, which compares tokens. With one end nothing changes. The temperature only
    tells how to add the masses up: these are logits still, to be divided by it.
    """
    if not isinstance(ends, torch.Tensor):  # each once
        ends = torch.tensor(list(dict.fromkeys(ends)), dtype=torch.long, device=logits.device)
    if len(ends) < 2:
        return logits
    whole = (logits[..., ends] / temperature).logsumexp(-1, keepdim=True) * temperature
    return logits.index_fill(-1, ends[1:], -torch.inf).index_copy(-1, ends[:1], whole)


def left_pad(prompts, pad_id, device=None):
    """[[5, 6], [7]] -> ids [[5, 6], [pad, 7]], mask [[1, 1], [0, 1]]: lists of ids -> (B, P) long, (B, P) bool."""
    P = max(map(len, prompts))
    ids = torch.tensor(
        [[pad_id] * (P - len(prompt)) + list(prompt) for prompt in prompts], device=device
    )
    return ids, torch.tensor(
        [[0] * (P - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    ) > 0


def position_ids(attention_mask):
    """0, 1, 2, ... from the first real token of each row, 0 in the padding before it: (B, L) -> (B, L)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
