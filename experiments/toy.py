"""experiments/toy.py: the smallest world in which the paper can be watched, on a CPU, in minutes,
as ordinary checkpoint directories.

The task is to add digits modulo 10. Thinking is written down, and there are two ways of it, the
two families:

    "left" folds from the left, "right" from the right:
    Add a3 b7 c5 :   so a 0+3= 3 , then um b 3+7= 0 , thus c 0+5= 5 . Answer: 5
    Add a3 b7 c5 :   next c 0+5= 5 , well b 5+7= 2 , let's hmm a 2+3= 5 . Answer: 5

    style      each step opens with a connector, and hesitations fall anywhere: 15 of 32 words are
               a family's favourites, so that with the word of substance 16 tokens are plausible at
               a position. k = 16 looks at just these.
    mistakes   a step of the pre-training corpus is wrong with probability `noise`, and what
               follows builds on it. A model of any size fits that too, so that a bigger one from
               the same pipeline is no better and has nothing new to teach.
    RL         expert iteration: sample, keep what is correct, fine-tune on it, again. New
               capability, same way of thinking. Before it comes, as in real post-training, a short
               fine-tune on a house style: same mistakes, but 5 of the 15 favourites replaced. So
               the better teacher starts from a lower overlap, and there is something to align to.

    python experiments/toy.py            runs/toy/{student,bigger,teacher}: a small model, a big
                                         one of the same family, that one post-trained
    python experiments/toy.py --all      and {student-rl,other}: the student post-trained, a big
                                         post-trained one of the other family
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.slots import rollout  # noqa: E402
from rollout import position_ids  # noqa: E402

CONNECTORS = "so then next now thus hence well ok right let's".split()
HESITATIONS = """um uh er hmm like say maybe perhaps wait actually basically probably alright look
listen honestly frankly
    literally anyway ah oh huh mm eh really simply clearly sure fine true yes indeed""".split()
DIGITS = [str(digit) for digit in range(10)]
LABELS = "abcdef"
WORDS = (
    ["<pad>", "<eos>", "<unk>", "Add", ":", ",", ".", "Answer:"]
    + DIGITS
    + list(LABELS)
    + [l + d for l in LABELS for d in DIGITS]
    + [f"{a}+{x}=" for a in DIGITS for x in DIGITS]
    + CONNECTORS
    + HESITATIONS
)
ID = {word: i for i, word in enumerate(WORDS)}

FEWEST, MOST = 4, len(LABELS)  # digits to add
HESITATION = 0.15  # the chance of one before each word
FAVOURITES, RUNNERS_UP = (
    15,
    5,
)  # of the 32 hesitations; a house style swaps the runners-up for as many favourites
NOISE = 0.06  # a solution of five steps is right with probability .94 ** 5 = .73
SIZES = {"small": (64, 2), "large": (96, 3)}  # hidden size, layers
STEPS = {
    "small": 450,
    "large": 400,
}  # of pre-training, 64 solutions each, made on the fly and never seen twice
HOUSE_STEPS = 60  # of fine-tuning on the house style
ROUNDS = 8  # of RL: each samples 1,024 solutions
HELD_OUT = 256  # questions to measure on
PLAIN, POLITE = (
    "{question}",
    "listen , {question}",
)  # two ways to put a question (paper 5.2); worlds know the plain
# one, unless they are pre-trained on both


# --- the world ------------------------------------------------------------------------------------


def problems(n, generator, digits=(0, 9)):
    """n random lists of digits, lowest to highest: -> digits (n, MOST), how many of them count
    (n,)."""
    return (
        torch.randint(digits[0], digits[1] + 1, (n, MOST), generator=generator),
        torch.randint(FEWEST, MOST + 1, (n,), generator=generator),
    )


def prefix(template):
    """The token ids before a question: POLITE -> those of "listen ,"."""
    return [ID[word] for word in template.removesuffix("{question}").split()]


def question(digits, count, template=PLAIN):
    """-> the prompts as token ids, and the answers (n,): sums modulo 10."""
    prompts = [
        [
            *prefix(template),
            ID["Add"],
            *(ID["a0"] + 10 * place + x for place, x in enumerate(row[:c])),
            ID[":"],
        ]
        for row, c in zip(digits.tolist(), count.tolist())
    ]
    return prompts, (digits * (torch.arange(MOST) < count.unsqueeze(1))).sum(1) % 10


def law(kind, family, house_style=False):
    """How often a family says each connector or hesitation: (number of words,) probabilities."""
    names = CONNECTORS if kind == "connector" else HESITATIONS
    order = torch.randperm(
        len(names), generator=torch.Generator().manual_seed(("left", "right").index(family))
    )
    p = torch.empty(len(names))
    if kind == "connector":
        p[order] = (
            torch.arange(1, len(names) + 1.0) ** -1.6
        )  # Zipf's law, the ranking a family's own
    else:
        favourites, runners_up, others = order.split(
            [FAVOURITES, RUNNERS_UP, len(order) - FAVOURITES - RUNNERS_UP]
        )
        if house_style:
            favourites, runners_up = (
                torch.cat([runners_up, favourites[RUNNERS_UP:]]),
                favourites[:RUNNERS_UP],
            )
        p[favourites], p[runners_up], p[others] = (
            torch.arange(1, FAVOURITES + 1.0) ** -0.25,
            0.2,
            0.01,
        )
    return p / p.sum()


def say(kind, family, house_style, shape, generator):
    """Words of a kind by the family's law: token ids of that shape."""
    first = ID[CONNECTORS[0] if kind == "connector" else HESITATIONS[0]]
    return first + torch.multinomial(
        law(kind, family, house_style), math.prod(shape), replacement=True, generator=generator
    ).view(shape)


def corpus(family, digits, count, noise, generator, house_style=False, template=PLAIN):
    """Solutions as the pre-training corpus writes them, mistakes included:
    -> ids, mask, is_response (n, L), padded right.
    """
    n, step = len(count), torch.arange(MOST).expand(len(count), -1)  # (n, S), S = MOST
    on = step < count.unsqueeze(1)  # (n, S) steps that there are
    place = (
        step if family == "left" else (count.unsqueeze(1) - 1 - step).clamp_min(0)
    )  # (n, S) the digit that a step adds
    x = digits.gather(1, place)
    slip = (
        torch.randint(2, (n, MOST), generator=generator) * 2 - 1
    )  # a near miss: one too many or too few
    slip = slip * (torch.rand(n, MOST, generator=generator) < noise)
    after = ((x + slip) * on).cumsum(1) % 10  # (n, S) what each step says
    before = torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], 1)
    end = torch.where(step == count.unsqueeze(1) - 1, ID["."], ID[","])
    steps = torch.stack(
        [
            say("connector", family, house_style, (n, MOST), generator),
            ID["a"] + place,
            ID["0+0="] + 10 * before + x,
            ID["0"] + after,
            end,
        ],
        2,
    )  # (n, S, 5)
    steps = torch.stack(
        [
            say(
                "hesitation", family, house_style, steps.shape, generator
            ),  # each may be hesitated at
            steps,
        ],
        3,
    )  # (n, S, 5, 2)
    kept = on.view(n, MOST, 1, 1).repeat(1, 1, 5, 2)
    kept[..., 0] &= torch.rand(kept.shape[:3], generator=generator) < HESITATION
    one = torch.ones_like(count).unsqueeze(1)  # (n, 1)
    ids = torch.cat(
        [
            one * ID["Add"],
            ID["a0"] + 10 * step + digits,
            one * ID[":"],
            steps.flatten(1),
            one * ID["Answer:"],
            ID["0"] + after[:, -1:],
            one * ID["<eos>"],
        ],
        1,
    )
    keep = torch.cat([one > 0, on, one > 0, kept.flatten(1), (one > 0).expand(-1, 3)], 1)
    before = one * torch.tensor(prefix(template), dtype=torch.long)  # (n, words of the template)
    is_response = torch.cat([before < 0, (torch.arange(ids.size(1)) >= MOST + 2) & keep], 1)
    return pack(torch.cat([before, ids], 1), torch.cat([before >= 0, keep], 1), is_response)


def first_slip(response, digits, count, family="left"):
    """Where a response first leaves the right path: the index of that token, or None of a right
    one that ended.

    response: token ids, eos included; digits, count: its problem, as lists and ints (see
    `problems`). Hesitations are free, and so is the choice of connector. A response that was cut
    off slips past its end.
    """
    place, total, path = list(range(count)), 0, []
    for at in place if family == "left" else place[::-1]:
        path += ["connector", ID["a"] + at, ID["0+0="] + 10 * total + digits[at]]
        total = (total + digits[at]) % 10
        path += [ID["0"] + total, ID[","]]
    path[-1:] = [ID["."], ID["Answer:"], ID["0"] + total, ID["<eos>"]]
    done = 0
    for index, token in enumerate(response):
        if ID[HESITATIONS[0]] <= token <= ID[HESITATIONS[-1]]:
            continue
        is_connector = ID[CONNECTORS[0]] <= token <= ID[CONNECTORS[-1]]
        if done == len(path) or path[done] != ("connector" if is_connector else token):
            return index
        done += 1
    return None if done == len(path) else len(response)


def pack(ids, keep, is_response):
    """Move the tokens to keep to the left and cut what is left of the width: (n, L) each -> (n,
    L') each."""
    order = keep.logical_not().long().argsort(dim=1, stable=True)[:, : keep.sum(1).max()]
    return (
        torch.where(keep, ids, ID["<pad>"]).gather(1, order),
        keep.gather(1, order),
        is_response.gather(1, order),
    )


# --- its models -----------------------------------------------------------------------------------


def fit(model, batches, steps, lr, what):
    """Maximum likelihood of the response tokens; AdamW, 20 steps of warm-up, cosine to a
    twentieth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 20) * (0.525 + 0.475 * math.cos(math.pi * step / steps)),
    )
    for ids, mask, is_response in tqdm(
        batches, total=steps, desc=what, mininterval=1, disable=None
    ):
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False
        ).logits[:, :-1]  # (n, L-1, V)
        target = is_response[:, 1:]  # (n, L-1)
        cross_entropy(logits[target], ids[:, 1:][target]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def attempt(model, n, generator, samples=1, template=PLAIN, digits=(0, 9)):
    """Let a model solve n new problems, `samples` times each: -> Rollout, correct (n *
    samples,)."""
    prompts, answers = question(*problems(n, generator, digits), template)
    seeds = torch.randint(2**62, (n,), generator=generator).tolist()
    r = rollout(
        model,
        prompts,
        n=samples,
        max_new_tokens=96,
        eos_ids=[ID["<eos>"]],
        seeds=seeds,
    )
    ends = [
        [ID["Answer:"], ID["0"] + answer, ID["<eos>"]]
        for answer in answers.repeat_interleave(samples).tolist()
    ]
    return r, torch.tensor([r.response_ids(row)[-3:] == end for row, end in enumerate(ends)])


def expert_iteration(model, rounds, generator, what, n=512, samples=2, rehearsal=(), **asked):
    """RL by keeping what is correct; asked: the template and the digits of its problems.

    rehearsal: an iterator of other batches, of which one follows each of these.
    """
    rehearsal = iter(rehearsal)
    for k in range(rounds):
        r, kept = attempt(model, n, generator, samples, **asked)
        if not kept.any():
            continue  # nothing right, nothing to learn from
        score = f"{what}, RL round {k + 1}/{rounds}, {kept.float().mean():.2f} correct"
        ids, mask, is_response = pack(r.ids[kept], r.attention_mask[kept], r.is_response[kept])
        parts = torch.cat([torch.randperm(len(ids), generator=generator) for _ in range(2)]).split(
            64
        )  # two epochs
        batches = [
            b
            for i in parts
            for b in ((ids[i], mask[i], is_response[i]), next(rehearsal, None))
            if b
        ]
        fit(model, batches, len(batches), 2e-3, score)


def make(
    out,
    *,
    family="left",
    size="small",
    noise=NOISE,
    house_style=False,
    rounds=0,
    seed=0,
    start=None,
    templates=(PLAIN,),
    post_template=PLAIN,
    post_digits=(0, 9),
    rehearse=False,
):
    """One model of this world, saved to the directory `out` with its tokenizer: -> the model, in
    eval mode.

    family "left" | "right"; size "small" | "large"; noise: the chance of a mistake in a step of
    its pre-training corpus; house_style: fine-tune on it afterwards; rounds of RL after that.
    start: a directory to begin from in place of pre-training. templates: of the pre-training
    corpus, in turn; post_template, post_digits: of all that comes after it. rehearse: while that
    goes on, every other batch is of the pre-training corpus, plainly put, all digits: what the
    post-training is not about is kept, as by the pre-training mix of InstructGPT (arXiv
    2203.02155).
    """
    what, generator = Path(out).name, torch.Generator().manual_seed(seed)
    if start is not None:
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).eval()
    else:
        H, layers = SIZES[size]
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(WORDS),
                hidden_size=H,
                intermediate_size=2 * H,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=256,
                tie_word_embeddings=False,
                initializer_range=0.6
                / H**0.5,  # the default .02 leaves so narrow a model asleep for hundreds of steps
                pad_token_id=ID["<pad>"],
                eos_token_id=ID["<eos>"],
                bos_token_id=None,
            )
        ).eval()
    old = (
        corpus(family, *problems(64, generator), noise, generator)
        for _ in (itertools.count() if rehearse else ())
    )
    if start is None:
        fit(
            model,
            (
                corpus(
                    family,
                    *problems(64, generator),
                    noise,
                    generator,
                    False,
                    templates[step % len(templates)],
                )
                for step in range(STEPS[size])
            ),
            STEPS[size],
            1e-2,
            f"{what}, pre-training",
        )
    if house_style:
        new = (
            corpus(
                family, *problems(64, generator, post_digits), noise, generator, True, post_template
            )
            for _ in range(HOUSE_STEPS)
        )
        batches = (batch for one in new for batch in (one, next(old, None)) if batch)
        fit(model, batches, HOUSE_STEPS * (1 + rehearse), 2e-3, f"{what}, house style")
    expert_iteration(
        model, rounds, generator, what, rehearsal=old, template=post_template, digits=post_digits
    )
    model.save_pretrained(out)
    tokenizer().save_pretrained(out)
    return model


def tokenizer():
    """One id a word, words separated by spaces."""
    inner = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def write_questions(folder, train=4096, seed=0, digits=(0, 9)):
    """folder/prompts.jsonl and folder/eval.jsonl, {"prompt", "answer"} a line, all different."""
    prompts, answers = question(
        *problems(2 * (train + HELD_OUT), torch.Generator().manual_seed(seed), digits)
    )
    lines = list(
        dict.fromkeys(
            json.dumps({"prompt": " ".join(WORDS[i] for i in prompt), "answer": str(answer)})
            for prompt, answer in zip(prompts, answers.tolist())
        )
    )
    for name, part in (("prompts", lines[:train]), ("eval", lines[train : train + HELD_OUT])):
        (Path(folder) / f"{name}.jsonl").write_text("\n".join(part) + "\n")


def make_all(out, seed=0, everything=False):
    """The questions and models that `python experiments/toy.py [--all]` makes: -> {name: model}."""
    out, seed = Path(out), 10 * seed
    out.mkdir(parents=True, exist_ok=True)
    write_questions(out, seed=seed)
    made = {
        "student": make(out / "student", seed=seed + 1),
        "bigger": make(out / "bigger", size="large", seed=seed + 2),
        "teacher": make(
            out / "teacher", house_style=True, rounds=ROUNDS, seed=seed + 3, start=out / "bigger"
        ),
    }
    if everything:
        made["student-rl"] = make(
            out / "student-rl",
            house_style=True,
            rounds=ROUNDS,
            seed=seed + 4,
            start=out / "student",
        )
        made["other"] = make(
            out / "other",
            family="right",
            size="large",
            house_style=True,
            rounds=ROUNDS,
            seed=seed + 5,
        )
    return made


def main():
    parser = argparse.ArgumentParser(description="Make the toy world's models and questions.")
    parser.add_argument(
        "--out", default="runs/toy", help="directory to write to (default: runs/toy)"
    )
    parser.add_argument(
        "--all", action="store_true", help="every model, not only student, bigger and teacher"
    )
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    transformers.logging.disable_progress_bar()
    many, minutes = ("five", 4) if flags.all else ("three", 2)
    print(f"making {many} models in {flags.out}, some {minutes} minutes on 2 cores", flush=True)
    for name, model in make_all(Path(flags.out), flags.seed, flags.all).items():
        r, correct = attempt(model, 512, torch.Generator().manual_seed(flags.seed))
        said = " ".join(WORDS[i] for i in r.response_ids(0)[:-1])
        size = sum(p.numel() for p in model.parameters()) / 1e3
        print(
            f"{flags.out}/{name}: {size:.0f}K parameters, "
            f"{correct.float().mean():.2f} right of 512 problems; says: {said}"
        )


if __name__ == "__main__":
    main()
