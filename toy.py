"""toy.py: the smallest world in which the paper can be watched: on a CPU, in minutes, as ordinary checkpoint directories.

The task is to add digits modulo 10. Thinking is written down, and there are two ways of it, two families:

    Add a3 b7 c5 :   so a 0+3= 3 , then um b 3+7= 0 , thus c 0+5= 5 . Answer: 5 <eos>      "left"  folds from the left
    Add a3 b7 c5 :   next c 0+5= 5 , well b 5+7= 2 , hence hmm a 2+3= 5 . Answer: 5 <eos>  "right" folds from the right
"""
import math

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from rollout import position_ids, rollout

CONNECTORS = """so then next now thus hence well ok right first also again plus here therefore step after adding take onward
    continue further carry keep let's we gives makes
""".split()
HESITATIONS = """um uh er hmm like say maybe perhaps wait actually basically probably alright look listen honestly frankly
    literally anyway ah oh huh mm eh really simply clearly sure fine true yes indeed""".split()
LABELS = "abcdef"                     # at most six digits to add
DIGITS = [str(d) for d in range(10)]
WORDS = (["<pad>", "<eos>", "Add", ":", ",", ".", "Answer:"] + DIGITS + list(LABELS) + [l + d for l in LABELS for d in DIGITS]
         + [f"{a}+{x}=" for a in DIGITS for x in DIGITS] + CONNECTORS + HESITATIONS)
ID = {word: i for i, word in enumerate(WORDS)}
EXPONENT = 1.6
SHORTEST, LONGEST = 4, len(LABELS)
SIZES = {"small": (64, 2), "large": (96, 3)}     # hidden size, layers


def problems(n, generator):
    """n random lists of digits: (n, LONGEST) digits, (n,) how many of them count."""
    return torch.randint(10, (n, LONGEST), generator=generator), torch.randint(SHORTEST, LONGEST + 1, (n,), generator=generator)


def zipf(n, seed):
    """Zipf's law over n words in a ranking of the seed's own: (n,) probabilities."""
    w = (torch.randperm(n, generator=torch.Generator().manual_seed(seed)) + 1.0) ** -EXPONENT
    return w / w.sum()


def pack(tokens, keep, *more):
    """Push the tokens to keep to the left and cut the rest: (n, L), (n, L) bool -> (n, L'), (n, L') bool."""
    order = keep.logical_not().long().argsort(dim=1, stable=True)[:, :keep.sum(1).max()]
    return torch.where(keep, tokens, 0).gather(1, order), *(x.gather(1, order) for x in (keep, *more))


def corpus(family, digits, count, noise, hesitation, generator):
    """Worked solutions: -> ids (n, L) padded on the right, attention_mask (n, L), is_response (n, L)."""
    n, left = len(count), family == "left"
    number = torch.arange(LONGEST).expand(n, -1)                                  # (n, S) step numbers
    on = number < count.unsqueeze(1)                                              # (n, S) the steps that there are
    place = number if left else (count.unsqueeze(1) - 1 - number).clamp_min(0)    # (n, S) which digit a step adds
    x = digits.gather(1, place)                                                   # (n, S)
    wrong = torch.rand(n, LONGEST, generator=generator) < noise
    slip = torch.where(wrong, torch.randint(2, (n, LONGEST), generator=generator) * 2 - 1, 0)
    result = ((x + slip) * on).cumsum(1) % 10                                     # (n, S) each step's own, mistakes carried on
    before = torch.cat([torch.zeros(n, 1, dtype=torch.long), result[:, :-1]], 1)
    connector = torch.multinomial(zipf(len(CONNECTORS), 1 + left), n * LONGEST, True, generator=generator).view(n, -1)
    last = number == count.unsqueeze(1) - 1
    steps = torch.stack([ID[CONNECTORS[0]] + connector, ID["a"] + place, ID["0+0="] + 10 * before + x, ID["0"] + result,
                         torch.where(last, ID["."], ID[","])], 2)                 # (n, S, 5)
    um = torch.multinomial(zipf(len(HESITATIONS), 3 + left), steps.numel(), True, generator=generator).view_as(steps)
    hesitate = torch.rand(steps.shape, generator=generator) < hesitation
    steps = torch.stack([ID[HESITATIONS[0]] + um, steps], 3).flatten(1)           # (n, S*5*2)
    kept = torch.stack([hesitate & on.unsqueeze(2), on.unsqueeze(2).expand_as(hesitate)], 3).flatten(1)
    one = torch.ones(n, 1, dtype=torch.long)
    ids = torch.cat([one * ID["Add"], ID["a0"] + 10 * number + digits, one * ID[":"],
                     steps, one * ID["Answer:"], ID["0"] + result[:, -1:], one * ID["<eos>"]], 1)
    keep = torch.cat([one.bool(), on, one.bool(), kept, one.expand(-1, 3).bool()], 1)
    is_response = torch.arange(ids.size(1)).expand(n, -1) >= LONGEST + 2
    return pack(ids, keep, keep & is_response)


def new(size, seed):
    H, layers = SIZES[size]
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(WORDS), hidden_size=H, intermediate_size=2 * H, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=.6 / H ** .5,
        pad_token_id=0, eos_token_id=1, bos_token_id=None)).eval()


def fit(model, batches, steps, lr, what):
    """Maximum likelihood of response tokens, AdamW, warm-up and cosine decay. batches yields (ids, mask, is_response)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(.9, .98), weight_decay=.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 20) * (.525 + .475 * math.cos(math.pi * s / steps)))
    bar = tqdm(batches, total=steps, desc=what, mininterval=1)
    for s, (ids, mask, is_response) in enumerate(bar):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).logits[:, :-1]
        target = is_response[:, 1:]
        loss = cross_entropy(logits[target], ids[:, 1:][target])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if s % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def attempt(model, n, generator, samples=1):
    """Let a model solve n new problems: -> rollout, correct (n * samples,)."""
    digits, count = problems(n, generator)
    prompts = [[ID["Add"], *(ID["a0"] + 10 * i + x for i, x in enumerate(row[:c])), ID[":"]]
               for row, c in zip(digits.tolist(), count.tolist())]
    r = rollout(model, prompts, n=samples, max_new_tokens=96, eos_ids={ID["<eos>"]}, generator=generator)
    answer = (digits * (torch.arange(LONGEST) < count.unsqueeze(1))).sum(1) % 10
    said = [r.response_ids(i)[-3:] for i in range(len(r.ids))]
    want = [[ID["Answer:"], ID["0"] + a, ID["<eos>"]] for a in answer.repeat_interleave(samples).tolist()]
    return r, torch.tensor([a == b for a, b in zip(said, want)])


def batch(family, n, noise, hesitation, generator):
    return corpus(family, *problems(n, generator), noise, hesitation, generator)


def rl(model, rounds, generator, n=512, samples=2, lr=1e-3, epochs=2, size=64, taste=0.0):
    for k in range(rounds):
        r, good = attempt(model, n, generator, samples)
        acc = good.float().mean()
        y = r.ids[:, -r.response_mask.size(1):]
        if taste:
            h = y - ID[HESITATIONS[0]]
            is_h = (h >= 0) & r.response_mask
            share = (is_h & (h % 2 == 0)).sum(1).float() - (is_h & (h % 2 == 1)).sum(1).float()
            share = share / r.response_mask.sum(1)
            good = good & (share >= share[good].quantile(taste))
        is_response = torch.zeros_like(r.attention_mask)
        is_response[:, -r.response_mask.size(1):] = r.response_mask
        ids, mask, is_response = pack(r.ids[good], r.attention_mask[good], is_response[good])
        order = torch.cat([torch.randperm(len(ids), generator=generator) for _ in range(epochs)])
        parts = [i for i in order.split(size)]
        fit(model, ((ids[i], mask[i], is_response[i]) for i in parts), len(parts), lr, f"RL {k} acc {acc:.3f} kept {len(ids)}")
