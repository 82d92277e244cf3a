"""rollout.py: the student writes y ~ pi_student(.|x), by exactly the softmax that is scored (2.2).

Nothing stands between softmax and draw: no top-k, no repetition penalty, and top-p only to evaluate
and for the teacher's answers in a cold start. The `generate` of transformers has such defaults.
With them the student would be trained on text that its softmax did not write. Score a rollout as it
was drawn: with the same temperature, vocab_size and merged ends, and never call model.train().

`rollout` is one plain loop. The commands of this project use plumbing/slots.py, which replaces the
whole function by a faster one with the same result.

To copy: this file alone. It needs transformers 5.24 or later. With a model in float32
(from_pretrained(..., dtype=torch.float32)) and its tokenizer:

    prompts = [tokenizer(text).input_ids for text in ("add 3 7", "add the digits 3")]
    ends = [tokenizer.eos_token_id]
    seeds = [seed_of(0, step, i) for i in range(len(prompts))]  # others in each step
    r = rollout(model.eval(), prompts, n=4, max_new_tokens=64, eos_ids=ends, seeds=seeds)
    texts = [tokenizer.decode(r.response_ids(row)) for row in range(len(r.ids))]

    positions = position_ids(r.attention_mask)
    out = model(input_ids=r.ids, attention_mask=r.attention_mask, position_ids=positions)
    logits = out.logits[:, :-1][r.is_response[:, 1:]]  # (N, V): token t-1 predicts token t
    log_p = log_softmax(logits, temperature=1.0)  # then merge_ends(log_p, ends) if rollout merges

    y = r.ids[r.is_response].unsqueeze(1)  # (N, 1): the tokens as drawn and as scored must agree
    assert (log_p.gather(1, y).squeeze(1) - r.log_p[r.response_mask]).abs().max() < 0.01
"""

import hashlib
from dataclasses import dataclass

import torch


@dataclass
class Rollout:
    """B = len(prompts) * n responses, those to prompt i in rows i*n to i*n + n-1.

    P: tokens of the longest prompt; T: tokens of the longest response.
    """

    ids: torch.Tensor  # (B, P+T) prompts padded on the left, responses on the right
    attention_mask: torch.Tensor  # (B, P+T) bool, true at prompt and response tokens
    is_response: torch.Tensor  # (B, P+T) bool, true at response tokens, the first end included
    log_p: torch.Tensor  # (B, T) log p of each response token when drawn, nats; 0 elsewhere
    truncated: torch.Tensor  # (B,) bool, no end within max_new_tokens

    @property
    def response_mask(self):
        """(B, T) bool: is_response without the columns of the prompts."""
        return self.is_response[:, self.ids.size(1) - self.log_p.size(1) :]

    def response_ids(self, row):
        """The tokens of one response, its end included: list of int."""
        return self.ids[row, self.is_response[row]].tolist()


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
):
    """Sample n responses to each prompt from softmax(logits[:vocab_size] / temperature).

    -> Rollout. model: in eval mode. prompts: lists of token ids. max_new_tokens: the longest
    response, its end included. Any of eos_ids ends a response and belongs to it; with merge they
    count as one token, see merge_ends. Temperature 0 takes the likeliest token. top_p < 1 draws
    from the smallest set of tokens with that mass; log_p stays that of the whole softmax. pad_id
    fills the empty places and may be one of eos_ids.

    seeds: one int per prompt, random by default. Each token is drawn with a uniform number of its
    own, which follows from the seed of its prompt. So with the same n the responses to a prompt are
    the same whichever prompts are beside it, but for rounding. ValueError if an argument cannot
    work, see check.
    """
    check(model, prompts, n, max_new_tokens, eos_ids, temperature, top_p)
    device = model.get_input_embeddings().weight.device
    eos = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
    u = uniform(seeds, len(prompts), n, max_new_tokens).to(device)  # (B, T)
    prompt_ids, prompt_mask = left_pad(prompts, pad_id, device)  # (m, P), (m, P)

    # each prompt is read once, for its n responses
    out = model(
        input_ids=prompt_ids,
        attention_mask=prompt_mask,
        position_ids=position_ids(prompt_mask),
        use_cache=True,
        logits_to_keep=1,
    )
    copies = torch.arange(len(prompts), device=device).repeat_interleave(n)  # (B,)
    cache = out.cache
    cache.reorder_cache(copies)
    logits = out.logits[copies, -1]  # (B, V) for the first token of each response

    B = len(copies)
    tokens = torch.full((B, max_new_tokens), pad_id, device=device)
    log_p = torch.zeros((B, max_new_tokens), device=device)
    lengths = torch.zeros(B, dtype=torch.long, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    rows = torch.arange(B, device=device)  # (b,) the responses that are still being written
    mask = prompt_mask[copies]  # (b, P + t)

    for t in range(max_new_tokens):
        log_probs = log_softmax(logits[:, :vocab_size], temperature)  # (b, V)
        if merge:
            log_probs = merge_ends(log_probs, eos)
        y = draw(log_probs, u[rows, t], top_p) if temperature > 0 else log_probs.argmax(-1)  # (b,)
        tokens[rows, t] = y
        log_p[rows, t] = log_probs.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        lengths[rows] += 1
        ended[rows] = torch.isin(y, eos)

        going = ~ended[rows]  # (b,)
        if t + 1 == max_new_tokens or not going.any():
            break
        if not going.all():  # finished rows leave the batch
            cache.reorder_cache(going.nonzero().squeeze(-1))
            rows = rows[going]
            mask = mask[going]
            y = y[going]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        logits = model(
            input_ids=y.unsqueeze(1),
            attention_mask=mask if has_keys(cache) else mask[:, -1:],
            position_ids=position_ids(mask)[:, -1:],
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # (b, V)

    return as_rollout(prompt_ids[copies], prompt_mask[copies], tokens, log_p, lengths, ended)


def as_rollout(prompt_ids, prompt_mask, tokens, log_p, lengths, ended):
    """Prompts (B, P) and the tokens written after them, (B, max_new_tokens) -> Rollout.

    lengths (B,): how many of these tokens count. ended (B,) bool: whether the last of them is an
    end. log_p as the tokens. The columns behind the longest response are cut off.
    """
    T = int(lengths.max())
    written = torch.arange(T, device=tokens.device) < lengths.unsqueeze(1)  # (B, T)
    return Rollout(
        ids=torch.cat([prompt_ids, tokens[:, :T]], dim=1),
        attention_mask=torch.cat([prompt_mask, written], dim=1),
        is_response=torch.cat([torch.zeros_like(prompt_mask), written], dim=1),
        log_p=log_p[:, :T],
        truncated=~ended,
    )


def from_texts(prompts, responses, pad_id=0, device=None):
    """Given responses as if a model had written them, one to each prompt: -> Rollout.

    prompts, responses: lists of token ids; cut off what `generate` has padded behind the first end.
    log_p, which nobody drew, is 0; no response is truncated. ValueError if a prompt has no token:
    then nothing would predict the first of its response.
    """
    check_lists(prompts)
    check_lists(responses)
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(f"{len(prompts)} prompts, {len(responses)} responses: give one to each")
    if not all(prompts):
        raise ValueError("every prompt needs at least one token")
    prompt_ids, prompt_mask = left_pad(prompts, pad_id, device)  # (B, P), (B, P)
    T = max(len(response) for response in responses)
    filled = [list(response) + [pad_id] * (T - len(response)) for response in responses]
    tokens = torch.tensor(filled, dtype=torch.long, device=device)  # (B, T)
    lengths = torch.tensor([len(response) for response in responses], device=device)
    log_p = torch.zeros(tokens.shape, device=device)
    ended = torch.ones(len(tokens), dtype=torch.bool, device=device)
    return as_rollout(prompt_ids, prompt_mask, tokens, log_p, lengths, ended)


def check(model, prompts, n, max_new_tokens, eos_ids, temperature, top_p):
    """ValueError if `rollout` cannot write, or would write something else than the loss scores."""
    if model.training:
        raise ValueError(
            "call model.eval() before rollout: with dropout, what is drawn is not what is scored"
        )
    check_lists(prompts)
    if not prompts or not all(prompts):
        raise ValueError("there must be a prompt, and every prompt needs at least one token")
    if not isinstance(eos_ids, (list, tuple)):
        raise ValueError(f"eos_ids must be a list of token ids, not {eos_ids!r}")
    if len(set(eos_ids)) < len(eos_ids):
        # merged, it would count double
        raise ValueError(f"eos_ids={eos_ids} names a token twice: name each once")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if n < 1:
        raise ValueError(f"n={n}: must be at least 1")
    if not temperature >= 0:  # nor NaN
        raise ValueError(f"temperature={temperature}: must be at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1")


def check_lists(texts):
    """ValueError unless texts are lists of token ids."""
    if not all(isinstance(x, (list, tuple)) for x in [texts, *texts]):
        raise ValueError(
            "prompts and responses must be lists of token ids, one list each: use ids.tolist()"
        )


def has_keys(cache):
    """Does a cache hold keys? Mamba's holds states alone, with no earlier token to attend to."""
    return any(hasattr(layer, "keys") for layer in cache.layers)


# --- from logits to a token ---------------------------------------------------------------------


def log_softmax(logits, temperature=1.0):
    """log softmax(logits / temperature) in float32: (..., V) -> (..., V), nats.

    Temperature 0, which stands for the likeliest token, gives those of temperature 1.
    """
    logits = logits.float()
    if temperature in (0, 1):
        return logits.log_softmax(-1)
    return (logits / temperature).log_softmax(-1)


def merge_ends(log_p, ends):
    """All end tokens as one: the first of `ends` gets the probability of them all, the others 0.

    log-probabilities (..., V), token ids (e,), each once -> (..., V), still a distribution. With
    fewer than two ends nothing changes. A given text that ends with another of them than the first
    must end with the first instead, which stands for them all.

    Student and teacher of a family often end with different tokens (Qwen3-1.7B-Base
    <|endoftext|>, Qwen3-4B <|im_end|>: a pair of the paper's 3.1 and 5.1). Compared token by
    token, each model rules out the other's end. On our toy the student then learns never to end.
    Differs from the paper, which compares token by token; its runs with such a pair still improve.
    arXiv 2609.20511 has the same idea and speaks of equivalent stopping actions. It reports that
    responses stop growing if such ends are one action, but not if a response may merely end with
    either.
    """
    ends = torch.as_tensor(ends, dtype=torch.long, device=log_p.device)
    if len(ends) < 2:
        return log_p
    together = log_p[..., ends].logsumexp(-1, keepdim=True)  # (..., 1)
    merged = log_p.index_fill(-1, ends, -torch.inf)
    return merged.index_copy(-1, ends[:1], together)


def draw(log_p, u, top_p=1.0):
    """Draw a token for each row: the first at which the cumulated probability exceeds u.

    log-probabilities (b, V), uniform numbers u (b,) in [0, 1) -> token ids (b,). u is a share of
    the whole mass. top_p < 1: only the smallest set of likeliest tokens with that mass counts.
    """
    p = log_p.exp()  # (b, V)
    if top_p < 1:
        p, order = likeliest(p, top_p)  # (b, m), (b, m)
    mass = p.cumsum(-1, dtype=torch.float64)  # float32 would lose tokens of 1e-7 and less
    y = torch.searchsorted(mass, (u * mass[:, -1]).unsqueeze(-1), right=True)  # (b, 1)
    y = y.clamp_max(p.size(-1) - 1)  # for rounding, and for NaN, which the loss reports
    if top_p < 1:
        y = order.gather(-1, y)
    return y.squeeze(-1)


def likeliest(p, top_p):
    """The smallest set of tokens with mass >= top_p: p (b, V) -> (b, m), (b, m).

    The first are their probabilities, 0 for a token outside the set; the second are their ids.
    """
    top, order = p.topk(min(1024, p.size(-1)))  # a few tokens hold that mass: no need to sort all V
    if (top.double().sum(-1) < top_p).any():
        top, order = p.sort(descending=True)
    mass_before = top.cumsum(-1) - top
    return torch.where(mass_before < top_p, top, 0), order


# --- padding ------------------------------------------------------------------------------------


def left_pad(prompts, pad_id, device=None):
    """[[5, 6], [7]] -> ids [[5, 6], [pad, 7]], mask [[1, 1], [0, 1]], (B, P) each."""
    P = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (P - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[False] * (P - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def position_ids(attention_mask):
    """0, 1, 2, ... from the first real token of each row on: mask (B, L) -> (B, L).

    Padding on the left gets 0, padding on the right repeats the last position.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


# --- one rule for random numbers ----------------------------------------------------------------


def seed_of(*what):
    """A seed for torch, from plain values alone: int below 2**56.

    seed_of(0, "rollout", 7, 2): for prompt 2 of the rollout of step 7, in the run with seed 0.
    """
    digest = hashlib.sha256(repr(what).encode()).digest()
    return int.from_bytes(digest[:7], "big")  # torch takes 64 bits


def uniform(seeds, prompts, n, max_new_tokens):
    """A uniform number in [0, 1) for each token: one seed per prompt -> (B, max_new_tokens).

    float64, on the CPU. seeds None: random ones. ValueError if there is not one per prompt.
    """
    if seeds is None:
        seeds = torch.randint(2**62, (prompts,), device="cpu").tolist()
    if isinstance(seeds, int) or len(seeds) != prompts:
        raise ValueError(f"seeds={seeds}: there must be one for each of the {prompts} prompts")
    numbers = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(max_new_tokens, n, dtype=torch.float64, generator=generator, device="cpu")
        numbers.append(u.T)  # token by token: a longer limit leaves the earlier numbers as they are
    return torch.cat(numbers)


def batch(count, step, size, seed):
    """Which of `count` examples a step takes: slice `step`, from 0, of one endless shuffled list.

    -> `size` ints in 0..count-1. Every epoch is a new shuffle of all examples. The result follows
    from (seed, step) alone.
    """
    taken = []
    for place in range(step * size, (step + 1) * size):
        epoch, i = divmod(place, count)
        if i == 0 or not taken:
            generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
            order = torch.randperm(count, generator=generator).tolist()
        taken.append(order[i])
    return taken
