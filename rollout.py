"""rollout.py: the student writes (paper 2.2): y ~ p(.|x), drawn from exactly the softmax that the loss scores.

    prompts ──▶ token ids ──▶ prefill once a prompt ──▶ n copies of its cache
            ──▶ a token a step; who has finished leaves, the next prompts take the places

No top-k, no top-p, no repetition penalty stands between the softmax and the draw: `generate` of transformers has such
defaults (and reads more from a checkpoint's generation_config.json), and then the student is trained on text that it
did not write. top_p exists here for evaluation alone.
"""
import json
import os
import random
import re
from dataclasses import dataclass

import torch
import torch.distributed as dist
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
    log_p: torch.Tensor            # (B, T)   log-probability of each response token under the full softmax;
                                   #          0 in the padding
    truncated: torch.Tensor        # (B,)     bool, no eos within max_new_tokens

    def response_ids(self, row):
        """The tokens of one response, its eos included: list of int."""
        mask = self.response_mask[row]
        return self.ids[row, -mask.numel():][mask].tolist()


@torch.no_grad()
def rollout(model, prompts, *, n=1, max_new_tokens, temperature=1.0, top_p=1.0, eos_ids=(), pad_id=0, vocab_size=None,
            in_flight=None, generator=None):
    """Sample n responses to each prompt (lists of token ids, any lengths)
    from softmax(logits[:vocab_size] / temperature).

    Temperature 0 takes the likeliest token. top_p < 1 draws from the smallest set of tokens that holds that mass: for
    evaluation only, as the loss scores the full softmax; log_p is always that of the full softmax.
    Any of eos_ids ends a response and belongs to it; without eos_ids every response has max_new_tokens tokens.
    pad_id only fills the rectangle: it may equal an eos, since masks decide what counts.
    in_flight: how many responses are written at a time, all of them by default; whole prompts, at least one. It bounds
    the cache's memory.
    Each token has a uniform number of its own, so that generator's state, n and max_new_tokens fix the responses
    whatever is written beside them, but for rounding: kernels round otherwise for another batch or number of threads.
    Of several processes (torch.distributed) each writes the responses to its share of the prompts, and all get all of
    them: all must call with the same arguments and the same state of the generator.
    Raises ValueError for an empty prompt, for no tokens to write, and for a model in training mode (dropout would
    sample another softmax).
    """
    if model.training:
        raise ValueError("call model.eval() before rollout: with dropout on, "
                         "what is sampled is not what the loss scores")
    if not prompts or not all(prompts) or max_new_tokens < 1:
        raise ValueError("every prompt needs at least one token, and max_new_tokens must be at least 1")
    device, B, T = model.get_input_embeddings().weight.device, len(prompts) * n, max_new_tokens
    eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
    u = torch.rand(B, T, dtype=torch.float64, device=device, generator=generator)
    tokens, log_ps = torch.zeros((B, T), dtype=torch.long, device=device), torch.zeros((B, T), device=device)
    length, ended = torch.zeros(B, dtype=torch.long, device=device), torch.zeros(B, dtype=torch.bool, device=device)
    rank, world = processes()
    flight, waiting = Flight(model, n, max(1, min(B, in_flight or B) // n), pad_id), prompts[rank::world]
    mine = torch.arange(B, device=device).view(-1, n)[rank::world].flatten()                # rows of these prompts
    while waiting or len(flight.rows):
        waiting = flight.board(waiting)
        rows = mine[flight.rows]                                                            # (b,)
        t = length[rows]                                                                    # (b,)
        log_p = (flight.logits[:, :vocab_size].float() / (temperature or 1.0)).log_softmax(-1)          # (b, V)
        y = draw(log_p, u[rows, t], top_p) if temperature else log_p.argmax(-1)             # (b,)
        tokens[rows, t], log_ps[rows, t] = y, log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        length[rows], ended[rows] = t + 1, torch.isin(y, eos)
        flight.advance(y, going=~ended[rows] & (t + 1 < T))
    tokens, log_ps, length, ended = map(sum_over_processes, (tokens, log_ps, length, ended.int()))
    T = int(length.max())
    written = torch.arange(T, device=device) < length.unsqueeze(1)                          # (B, T)
    ids, mask = (x.repeat_interleave(n, 0) for x in left_pad(prompts, pad_id, device))      # (B, P), (B, P)
    ids = torch.cat([ids, tokens[:, :T].masked_fill(~written, pad_id)], 1)                  # (B, P+T)
    return Rollout(ids, torch.cat([mask, written], 1), written, log_ps[:, :T], ended == 0)


class Flight:
    """The responses that are being written: b rows, each at a token of its own, over the L columns of one cache. They
    end together on the right, and what a row has not written itself is masked.
    """

    def __init__(self, model, n, places, pad_id):
        self.model, self.n, self.places, self.pad_id = model, n, places, pad_id             # places: prompts at a time
        self.rows = torch.empty(0, dtype=torch.long, device=model.get_input_embeddings().weight.device)     # (b,)
        self.boarded, self.cache, self.seen, self.logits = 0, None, None, None              # seen (b, L), logits (b, V)
        self.in_place = False                                                               # known with the first cache

    def board(self, waiting):
        """Read the next prompts once and start n responses to each, if a quarter of the places is free (all of them,
        where not every layer of the cache is a plain DynamicLayer): -> the prompts that go on waiting.
        """
        free = self.places - -(-len(self.rows) // self.n)
        if not waiting or len(self.rows) and not (self.in_place and 4 * free >= self.places):
            return waiting
        ids, mask = left_pad(waiting[:free], self.pad_id, self.rows.device)                 # (m, P), (m, P)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=True,
                         logits_to_keep=1)
        copies = torch.arange(len(ids), device=ids.device).repeat_interleave(self.n)        # (m * n,)
        rows = torch.arange(self.boarded, self.boarded + len(copies), device=ids.device)    # (m * n,)
        mask, logits = mask[copies], out.logits[copies, -1]                                 # (m * n, P), (m * n, V)
        if len(self.rows):
            unused = int(self.seen.any(0).long().argmax())                      # columns of rows that have left
            L = max(self.seen.size(1) - unused, mask.size(1))
            for layer, new in zip(self.cache.layers, out.cache.layers):
                layer.join(new, copies, L)
            self.rows, self.logits = torch.cat([self.rows, rows]), torch.cat([self.logits, logits])
            self.seen = torch.cat([pad(x[:, -L:], (max(0, L - x.size(1)), 0)) for x in (self.seen, mask)])
        else:
            self.rows, self.seen, self.logits, self.cache = rows, mask, logits, out.cache
            self.cache.reorder_cache(copies)
            self.in_place = all(type(layer) is DynamicLayer for layer in self.cache.layers)
            if self.in_place:
                for i, layer in enumerate(self.cache.layers):                   # one after the other: memory
                    self.cache.layers[i] = InPlace(layer, max(map(len, waiting)))
        self.boarded += len(copies)
        return waiting[free:]

    def advance(self, y, going):
        """Feed each row's new token y (b,) and get the next logits; rows that are not going (b,) leave."""
        b = int(going.sum())
        if b < len(going):
            order = torch.arange(b, device=y.device)                               # the last rows fill the holes
            order[~going[:b]] = b + going[b:].nonzero().squeeze(-1)
            self.rows, self.seen, y = self.rows[order], self.seen[order], y[order]
            self.cache.reorder_cache(order)
        if b:
            self.seen = torch.cat([self.seen, self.seen.new_ones(b, 1)], 1)                 # (b, L+1)
            self.logits = self.model(
                input_ids=y.unsqueeze(1), attention_mask=self.seen, position_ids=self.seen.sum(1, keepdim=True) - 1,
                cache=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]           # (b, V)
        else:
            self.cache = self.logits = None                                                 # before the next is made


class InPlace(DynamicLayer):
    """Keys and values (b, h, L, d) of one layer as views of larger buffers: a new token is written where it belongs,
    and the last row over one that has left, where DynamicLayer copies everything.
    """

    def __init__(self, layer, widest):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.widest = widest                                                    # of the prompts still to come
        self.lay_out(layer.keys, layer.values, len(layer.keys))

    def lay_out(self, keys, values, rows):
        """New buffers (rows, h, C, d) with half as many columns again, finite everywhere: masked is not unread.

        The columns in use end where the widest prompt would, so that it can join. Keys get the dtype of the values:
        autocast leaves float32 keys, which attention then rounds.
        """
        b, h, L, _ = keys.shape
        self.b, self.end = b, max(L, self.widest)
        self.buffers = [values.new_zeros(rows, h, self.end + self.end // 2 + 32, x.size(-1)) for x in (keys, values)]
        for buffer, x in zip(self.buffers, (keys, values)):
            buffer[:b, :, self.end - L:self.end] = x
        self.show(L)

    def show(self, L):
        self.keys, self.values = (x[:self.b, :, self.end - L:self.end] for x in self.buffers)

    def update(self, keys, values, *args, **kwargs):
        L = self.keys.size(-2)
        if self.end == self.buffers[0].size(-2):
            self.lay_out(self.keys, self.values, len(self.buffers[0]))
        for buffer, x in zip(self.buffers, (keys, values)):
            buffer[:self.b, :, self.end] = x.squeeze(-2)
        self.end += 1
        self.show(L + 1)
        return self.keys, self.values

    def reorder_cache(self, order):
        """Row i becomes what row order[i] is; only rows that move are copied."""
        order = order.to(self.keys.device)                               # a layer may stand on another device
        moved = (order != torch.arange(len(order), device=order.device)).nonzero().squeeze(-1)
        for x in (self.keys, self.values):
            x[moved] = x[order[moved]]
        self.b = len(order)
        self.show(self.keys.size(-2))

    def join(self, layer, copies, L):
        """Rows `copies` of another layer come in; L columns are in use then."""
        m, P = len(copies), layer.keys.size(-2)
        for buffer, x in zip(self.buffers, (layer.keys, layer.values)):
            buffer[self.b:self.b + m, :, self.end - P:self.end] = x[copies.to(x.device)]
        self.b += m
        self.show(L)


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


# --- several processes ---------------------------------------------------------------------------------------------


def processes():
    """The rank of this process and how many there are: (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(x):
    """The sum of a tensor that each process has, on all of them; in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def from_processes(x):
    """What each process has, by rank, on all of them: object -> list."""
    everyone = [x]
    if dist.is_initialized():
        everyone *= dist.get_world_size()
        dist.all_gather_object(everyone, x)
    return everyone


# --- what the student is asked -------------------------------------------------------------------------------------


def check_file(path, flag=""):
    """ValueError where a file of JSON lines cannot be read, before anything expensive starts."""
    what = f"{flag} {path}".strip()
    if not os.path.exists(path):
        raise ValueError(f"{what}: no such file; give a file of JSON lines")
    if not os.path.isfile(path):
        raise ValueError(f"{what}: not a file, where one of JSON lines is needed")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{what}: may not be read; change its permissions")


def json_lines(path):
    """The JSON values of a file, a line each, blank ones left out: yields (number of the line, value).

    Files come from elsewhere: whatever stands in them, the only exception is a ValueError that names file and line.
    """
    check_file(path)
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):                           # bytes: \n alone ends a line, not U+2028
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                value = json.loads(text) if text.strip() else None
            except UnicodeDecodeError:
                raise ValueError(f"{path}:{number} is not UTF-8; save the file as UTF-8") from None
            except (ValueError, RecursionError) as error:                  # a number of 5,000 digits, 1,000 brackets
                why = getattr(error, "msg", None) or str(error)
                raise ValueError(f"{path}:{number} is not JSON ({why}); write one JSON object a line") from None
            if text.strip():
                yield number, value


def is_text(x):
    """A string that can be written down: half of a surrogate pair, which JSON may hold, is no character."""
    return isinstance(x, str) and not re.search(r"[\ud800-\udfff]", x)


def is_chat(x):
    """Messages as chat templates take them: a list of {"role": text, "content": text}, not empty."""
    return isinstance(x, list) and len(x) > 0 and all(
        isinstance(m, dict) and is_text(m.get("role")) and is_text(m.get("content")) for m in x)


def load_prompts(path):
    """Read JSON lines {"prompt": text or chat messages, "answer": text (optional)}
    -> list of {"prompt", "answer", "id"}; answer: text or None, id: "name of the file:line".

    Raises ValueError naming file and line for what is not that.
    """
    problems = []
    for number, row in json_lines(path):
        prompt, answer = (row.get(name) if isinstance(row, dict) else None for name in ("prompt", "answer"))
        if not (is_text(prompt) and prompt.strip()) and not is_chat(prompt):
            raise ValueError(f'{path}:{number} needs "prompt": text, or a list of {{"role": text, "content": text}}')
        if answer is not None and not (is_text(answer) and answer.strip()):
            raise ValueError(f'{path}:{number} has an answer that is no text ({type(answer).__name__}), or empty; '
                             'write "answer": "42", or leave it out')
        problems.append({"prompt": prompt, "answer": answer, "id": f"{os.path.basename(path)}:{number}"})
    if not problems:
        raise ValueError(f'{path} holds no prompts; write one {{"prompt": text, "answer": text}} a line')
    return problems


def encode(tokenizer, prompt, **chat_options):
    """A prompt as the student reads it: text or chat messages -> token ids,
    through the chat template where there is one.

    chat_options go to the template (enable_thinking=False for Qwen3, say). Both models get these very ids.
    Raises ValueError with the prompt where the template refuses it.
    """
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **chat_options)
        except Exception as error:                # whatever a template may raise: it is a program of the checkpoint's
            raise ValueError(f"the student's chat template refuses {str(prompt)[:80]!r}: {error}") from error
        return tokenizer(text, add_special_tokens=False).input_ids          # the template has written them already
    if not isinstance(prompt, str):
        prompt = "\n".join(message["content"] for message in prompt)
    return tokenizer(prompt).input_ids


def additions(count, seed=0):
    """Questions with known answers, for a run without --prompts: list of {"prompt", "answer", "id"}."""
    draw = random.Random(seed)
    pairs = draw.sample([(a, b) for a in range(10, 100) for b in range(10, 100)], count)
    return [{"prompt": f'What is {a} + {b}? End with a line "Answer: " and the number.', "answer": str(a + b),
             "id": f"{a} + {b}"} for a, b in pairs]


def batch(prompts, step, size, seed):
    """The prompts of a step: slice `step` of one endless list, a new shuffle of all prompts each epoch."""
    taken = []
    for place in range(step * size, (step + 1) * size):
        epoch, i = divmod(place, len(prompts))
        if i == 0 or not taken:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(len(prompts), generator=generator).tolist()
        taken.append(prompts[order[i]])
    return taken
