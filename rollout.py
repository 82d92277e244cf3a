"""rollout.py: the student writes (paper 2.2): y ~ p(.|x), drawn from exactly the softmax that the loss scores.

    prompts ──▶ token ids ──▶ prefill once a prompt ──▶ n copies of its cache
            ──▶ a token a step; who has finished leaves

No top-k, no top-p, no repetition penalty stands between the softmax and the draw: `generate` of transformers has such
defaults (and reads more from a checkpoint's generation_config.json), and then the student is trained on text that it
did not write. top_p exists here for evaluation alone.
"""
import json
import random
from dataclasses import dataclass

import torch


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
            generator=None):
    """Sample n responses to each prompt (lists of token ids, any lengths)
    from softmax(logits[:vocab_size] / temperature).

    Temperature 0 takes the likeliest token. top_p < 1 draws from the smallest set of tokens that holds that mass: for
    evaluation only, as the loss scores the full softmax; log_p is always that of the full softmax.
    Any of eos_ids ends a response and belongs to it; without eos_ids every response has max_new_tokens tokens.
    pad_id only fills the rectangle: it may equal an eos, since masks decide what counts.
    The same generator state gives the same responses, on the same machine and thread count, for the same prompts in one
    call: another batch composition gives the draws to other rows, other kernels round the logits differently.
    Raises ValueError for an empty prompt, for no tokens to write, and for a model in training mode (dropout would
    sample another softmax).
    """
    if model.training:
        raise ValueError("call model.eval() before rollout: with dropout on, "
                         "what is sampled is not what the loss scores")
    if not prompts or not all(prompts) or max_new_tokens < 1:
        raise ValueError("every prompt needs at least one token, and max_new_tokens must be at least 1")
    device = model.get_input_embeddings().weight.device
    ids, mask = left_pad(prompts, pad_id, device)                                           # (B/n, P), (B/n, P)
    out = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=True, logits_to_keep=1)
    cache = out.cache
    cache.reorder_cache(torch.arange(len(ids), device=device).repeat_interleave(n))  # n copies of each prompt's cache
    ids, mask, logits = (x.repeat_interleave(n, 0) for x in (ids, mask, out.logits[:, -1]))  # (B, P), (B, P), (B, V)

    B, eos = len(ids), torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
    tokens = torch.full((B, max_new_tokens), pad_id, device=device)
    written = torch.zeros((B, max_new_tokens), dtype=torch.bool, device=device)
    log_ps = torch.zeros((B, max_new_tokens), device=device)
    rows, seen = torch.arange(B, device=device), mask                               # rows still being written, (b,)
    for t in range(max_new_tokens):
        log_p = (logits[:, :vocab_size].float() / (temperature or 1.0)).log_softmax(-1)     # (b, V)
        y = draw(log_p, top_p, generator) if temperature else log_p.argmax(-1)              # (b,)
        tokens[rows, t], written[rows, t] = y, True
        log_ps[rows, t] = log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        going = (~torch.isin(y, eos)).nonzero().squeeze(-1)                                 # indices into the b rows
        if len(going) < len(rows):
            rows, y, seen = rows[going], y[going], seen[going]
            cache.reorder_cache(going)
        if len(rows) == 0 or t + 1 == max_new_tokens:
            break
        seen = torch.cat([seen, seen.new_ones(len(rows), 1)], 1)                            # (b, P+t+1)
        logits = model(input_ids=y.unsqueeze(-1), attention_mask=seen, position_ids=position_ids(seen)[:, -1:],
                       cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    truncated = torch.zeros(B, dtype=torch.bool, device=device).index_fill_(0, rows, True)
    tokens, written, log_ps = tokens[:, :t + 1], written[:, :t + 1], log_ps[:, :t + 1]      # (B, T) each
    return Rollout(torch.cat([ids, tokens], 1), torch.cat([mask, written], 1), written, log_ps, truncated)


def draw(log_p, top_p=1.0, generator=None):
    """One token a row, from exp(log_p), or from its smallest set of tokens with mass >= top_p: (b, V) -> (b,)."""
    p = log_p.exp()
    if top_p < 1:
        m, V = 256, p.size(-1)                                   # a few tokens hold that mass: no need to sort all V
        top, order = p.topk(min(m, V))
        while m < V and (top.double().sum(-1) < top_p).any():
            m *= 16
            top, order = p.topk(min(m, V))
        p = top
        p = torch.where(p.cumsum(-1) - p < top_p, p, 0)          # keep while the mass before a token is below top_p
        return order.gather(-1, torch.multinomial(p, 1, generator=generator)).squeeze(-1)
    return torch.multinomial(p, 1, generator=generator).squeeze(-1)


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


# --- what the student is asked -------------------------------------------------------------------------------------


def load_prompts(path):
    """Read JSON lines {"prompt": text or chat messages, "answer": text (optional)} -> list of dicts.

    Raises ValueError naming file and line for what is not that.
    """
    problems = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not JSON ({error.msg}); write one JSON object a line") from None
            prompt = row.get("prompt") if isinstance(row, dict) else None
            chat = isinstance(prompt, list) and prompt and all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in prompt)
            if not chat and not (isinstance(prompt, str) and prompt.strip()):
                raise ValueError(f'{path}:{number} needs "prompt": text, '
                                 f'or a list of {{"role": text, "content": text}}')
            problems.append({"prompt": prompt, "answer": None if row.get("answer") is None else str(row["answer"])})
    if not problems:
        raise ValueError(f"{path} holds no prompts")
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
    """Questions with known answers, for a run without --prompts: list of {"prompt", "answer"}."""
    draw = random.Random(seed)
    pairs = draw.sample([(a, b) for a in range(10, 100) for b in range(10, 100)], count)
    return [{"prompt": f'What is {a} + {b}? End with a line "Answer: " and the number.', "answer": str(a + b)}
            for a, b in pairs]


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
