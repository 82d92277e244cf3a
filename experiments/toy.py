"""experiments/toy.py: the smallest world in which the paper can be watched, on a CPU, in minutes,
as ordinary checkpoint directories.

The task is to add digits modulo 10. A solution writes its thinking down. There are two ways to do
so, the two families of models:

    "left" folds from the left, "right" from the right:
    Add a3 b7 c5 :   so a 0+3= 3 , then um b 3+7= 0 , thus c 0+5= 5 . Answer: 5
    Add a3 b7 c5 :   next c 0+5= 5 , well b 5+7= 2 , let's hmm a 2+3= 5 . Answer: 5

    style      Each step opens with a connector, and hesitations stand anywhere. Of 32 hesitations
               a family has 15 favourites. With the word that the step needs, 16 tokens are
               plausible at a position, as many as k = 16 looks at.
    beliefs    Ten of the 100 additions are written wrong in the pre-training corpus, two times in
               three and always with the same wrong digit (MISTAUGHT). Every model that is trained
               on it believes them, small or large. No way of sampling mends that: greedy accuracy
               is about two thirds.
    slips      Any other step is off by one with probability NOISE. Sampling below temperature 1
               mends these.
    RL         Expert iteration: sample, keep what is correct, fine-tune on it, and again. It finds
               the right sums. As in real post-training, a short fine-tuning on a house style comes
               before it: the beliefs are the same, but 5 of the 15 favourites are replaced.

    student     small, trained on the corpus
    bigger      large, trained on the same corpus until it is as good as the student
    teacher     bigger after house style and RL: it knows more
    sharp       bigger after house style and a fine-tuning on its own unchecked answers of
                temperature .7: it scores higher at temperature 1 and knows nothing new
    early       the teacher at the update of its RL where its score at T 1 is that of sharp
    student-rl  the student after house style and RL
    other       large, of the other family, after house style and RL

    python experiments/toy.py            makes runs/toy/{student,bigger,teacher}
    python experiments/toy.py --all      makes all seven; models that are there are kept
"""

import argparse
import itertools
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass
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
from plumbing import files  # noqa: E402
from plumbing.exits import one_line  # noqa: E402
from plumbing.slots import rollout  # noqa: E402
from rollout import position_ids, seed_of  # noqa: E402

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
    + [label + digit for label in LABELS for digit in DIGITS]
    + [f"{a}+{x}=" for a in DIGITS for x in DIGITS]
    + CONNECTORS
    + HESITATIONS
)
ID = {word: i for i, word in enumerate(WORDS)}

FEWEST = 4  # digits to add
MOST = len(LABELS)
HESITATION = 0.15  # the chance of one before each word
FAVOURITES = 15  # of the 32 hesitations
RUNNERS_UP = 5  # a house style swaps them for as many favourites
NOISE = 0.06  # the chance of a slip in a step
# what the corpus says of these sums, two times in three. They were drawn by chance from the 90 sums
# that do not begin at 0. There are ten, so that a model that believes them is right two times in
# three
MISTAUGHT = {
    "1+3=": 5,
    "1+6=": 6,
    "4+9=": 2,
    "5+4=": 0,
    "5+7=": 1,
    "6+7=": 4,
    "7+1=": 9,
    "8+0=": 7,
    "8+2=": 9,
    "9+3=": 3,
}
MISTAUGHT_SHARE = 2 / 3
SIZES = {"small": (64, 2), "large": (96, 3)}  # hidden size, layers
PLAIN = "{question}"  # two ways to put a question (paper 5.2)
POLITE = "listen , {question}"  # known to models that were pre-trained on both
WAYS = {  # of sampling when accuracy is measured
    "T 1": dict(temperature=1.0, top_p=1.0),
    "T .7": dict(temperature=0.7, top_p=0.95),
    "greedy": dict(temperature=0.0),
}
MODELS = {  # in the order in which they are made
    "student": dict(),
    "bigger": dict(size="large", as_good_as="student"),
    "teacher": dict(start="bigger", house_style=True, rounds=8),
    "sharp": dict(start="bigger", house_style=True, sharpen=True),
    "early": dict(start="bigger", house_style=True, rounds=8, until="sharp"),
    "student-rl": dict(start="student", house_style=True, rounds=8),
    "other": dict(family="right", size="large", house_style=True, rounds=8),
}
FIRST = ("student", "bigger", "teacher")  # what the main command needs


@dataclass(frozen=True)
class Scale:
    """How much of everything goes into a world."""

    small: int = 450  # updates of pre-training, 64 solutions each, never seen twice
    large: int = 400
    house: int = 60  # updates of fine-tuning on the house style
    rounds: int = 8  # of RL, at most
    asked: int = 512  # problems in a round of RL, two answers each
    held_out: int = 2048  # questions to measure on
    trials: int = 1024  # problems that a model is tried on while it is made


FULL = Scale()
QUICK = Scale(small=20, large=20, house=5, rounds=1, asked=32, held_out=32, trials=32)


# --- the world ------------------------------------------------------------------------------------


def wrong_by():
    """How far the corpus's belief about each sum is off: (10, 10) of -1, 0 and +1."""
    off = torch.zeros(10, 10, dtype=torch.long)
    for words, said in MISTAUGHT.items():
        total, x = int(words[0]), int(words[2])
        off[total, x] = (said - total - x + 5) % 10 - 5
    return off


def problems(n, generator, digits=(0, 9)):
    """n random problems: -> digits (n, MOST), and how many of each row count (n,).

    digits: the lowest and the highest that may occur.
    """
    lowest, highest = digits
    return (
        torch.randint(lowest, highest + 1, (n, MOST), generator=generator),
        torch.randint(FEWEST, MOST + 1, (n,), generator=generator),
    )


def prefix(template):
    """The token ids before a question: POLITE -> those of "listen ,"."""
    return [ID[word] for word in template.removesuffix("{question}").split()]


def question(digits, count, template=PLAIN):
    """Problems -> prompts as token ids, and answers (n,), the sums modulo 10."""
    prompts = []
    for row, length in zip(digits.tolist(), count.tolist()):
        labelled = [ID["a0"] + 10 * place + x for place, x in enumerate(row[:length])]
        prompts.append([*prefix(template), ID["Add"], *labelled, ID[":"]])
    counts = torch.arange(MOST) < count.unsqueeze(1)  # (n, MOST)
    return prompts, (digits * counts).sum(1) % 10


def law(kind, family, house_style=False):
    """How often a family says each connector or hesitation: (number of words,) probabilities."""
    generator = torch.Generator().manual_seed(("left", "right").index(family))
    names = CONNECTORS if kind == "connector" else HESITATIONS
    order = torch.randperm(len(names), generator=generator)  # a ranking of the family's own
    p = torch.empty(len(names))
    if kind == "connector":
        p[order] = torch.arange(1, len(names) + 1.0) ** -1.6  # Zipf's law
        return p / p.sum()
    favourites = order[:FAVOURITES]
    runners_up = order[FAVOURITES : FAVOURITES + RUNNERS_UP]
    if house_style:
        replaced = favourites[:RUNNERS_UP]
        favourites = torch.cat([runners_up, favourites[RUNNERS_UP:]])
        runners_up = replaced
    p[:] = 0.01
    p[runners_up] = 0.2
    p[favourites] = torch.arange(1, FAVOURITES + 1.0) ** -0.25
    return p / p.sum()


def say(kind, family, house_style, shape, generator):
    """Draw words of a kind by the family's law: token ids of the given shape."""
    first = ID[CONNECTORS[0] if kind == "connector" else HESITATIONS[0]]
    p = law(kind, family, house_style)
    words = torch.multinomial(p, math.prod(shape), replacement=True, generator=generator)
    return first + words.view(shape)


def totals(x, noise, mistaught, generator):
    """The totals that the corpus writes for digits x (n, S): before and after each step, (n, S)."""
    believed = torch.rand(x.shape, generator=generator) < mistaught  # (n, S)
    slipped = torch.rand(x.shape, generator=generator) < noise
    near_miss = torch.randint(2, x.shape, generator=generator) * 2 - 1  # one too few or too many
    beliefs = wrong_by()
    total = torch.zeros(len(x), dtype=torch.long)
    before = []
    after = []
    for step in range(x.size(1)):
        before.append(total)
        belief = beliefs[total, x[:, step]] * believed[:, step]  # (n,)
        slip = near_miss[:, step] * slipped[:, step]
        off = torch.where(belief != 0, belief, slip)
        total = (total + x[:, step] + off) % 10
        after.append(total)
    return torch.stack(before, 1), torch.stack(after, 1)


def corpus(
    family,
    digits,
    count,
    generator,
    *,
    noise=NOISE,
    mistaught=MISTAUGHT_SHARE,
    house_style=False,
    template=PLAIN,
):
    """Solutions as the pre-training corpus writes them, slips and false beliefs included:
    -> ids, mask, is_response (n, L), padded right.
    """
    n = len(count)
    step = torch.arange(MOST).expand(n, -1)  # (n, S), S = MOST
    on = step < count.unsqueeze(1)  # (n, S) steps that the problem has
    place = step  # (n, S) the digit that a step adds
    if family == "right":
        place = (count.unsqueeze(1) - 1 - step).clamp_min(0)
    x = digits.gather(1, place)
    before, after = totals(x, noise, mistaught, generator)
    last = count.unsqueeze(1) - 1  # (n, 1)
    end = torch.where(step == last, ID["."], ID[","])
    connector = say("connector", family, house_style, (n, MOST), generator)
    words = [connector, ID["a"] + place, ID["0+0="] + 10 * before + x, ID["0"] + after, end]
    steps = torch.stack(words, 2)  # (n, S, 5)
    hesitations = say("hesitation", family, house_style, steps.shape, generator)
    hesitates = torch.rand(steps.shape, generator=generator) < HESITATION
    steps = torch.stack([hesitations, steps], 3)  # (n, S, 5, 2)
    kept = torch.stack([hesitates, torch.ones_like(hesitates)], 3) & on.view(n, MOST, 1, 1)

    def every(word):
        return torch.full((n, 1), ID[word])

    before = torch.tensor(prefix(template), dtype=torch.long).expand(n, -1)
    asked = [before, every("Add"), ID["a0"] + 10 * step + digits, every(":")]
    answer = [every("Answer:"), ID["0"] + after.gather(1, last), every("<eos>")]
    ids = torch.cat([*asked, steps.flatten(1), *answer], 1)  # (n, L)
    yes = torch.ones(n, 1, dtype=torch.bool)
    mask = torch.cat(
        [yes.expand(before.shape), yes, on, yes, kept.flatten(1), yes.expand(-1, 3)], 1
    )
    is_response = torch.arange(ids.size(1)) >= before.size(1) + MOST + 2
    return pack(ids, mask, is_response & mask)


def first_slip(response, digits, count, family="left"):
    """Where a response first leaves the right path: the index of that token.

    None if the response is right and has ended. If it was cut off, it slips just behind its last
    token. Hesitations are free, and so is the choice of connector. response: token ids, eos
    included; digits, count: its problem, a list and an int (see `problems`).
    """
    places = list(range(count))
    if family == "right":
        places.reverse()
    total = 0
    path = []
    for at in places:
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
    """Move the tokens to keep to the left, and cut the columns that no row needs.

    (n, L) each -> (n, L') each.
    """
    order = keep.logical_not().long().argsort(dim=1, stable=True)[:, : keep.sum(1).max()]
    return (
        torch.where(keep, ids, ID["<pad>"]).gather(1, order),
        keep.gather(1, order),
        is_response.gather(1, order),
    )


# --- training and trying --------------------------------------------------------------------------


def fit(model, batches, steps, lr, what, stop=None):
    """Train by maximum likelihood of the response tokens: -> was it stopped?

    AdamW; lr rises over 20 steps, and falls as a cosine to a twentieth. stop: a function, asked
    after every second update whether to stop there.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)

    def share_of_lr(step):
        return min(1, (step + 1) / 20) * (0.525 + 0.475 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_lr)
    bar = tqdm(batches, total=steps, desc=what, mininterval=1, disable=None)
    for step, (ids, mask, is_response) in enumerate(bar):
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False
        ).logits[:, :-1]  # (n, L-1, V)
        target = is_response[:, 1:]  # (n, L-1)
        cross_entropy(logits[target], ids[:, 1:][target]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if stop is not None and step % 2 and stop():
            return True
    return False


def attempt(model, n, generator, samples=1, template=PLAIN, digits=(0, 9), **way):
    """Let a model solve n new problems: -> Rollout, correct (n * samples,) bool."""
    prompts, answers = question(*problems(n, generator, digits), template)
    seeds = torch.randint(2**62, (n,), generator=generator).tolist()
    r = rollout(
        model,
        prompts,
        n=samples,
        max_new_tokens=96,
        eos_ids=[ID["<eos>"]],
        seeds=seeds,
        **way,
    )
    correct = []
    for row, answer in enumerate(answers.repeat_interleave(samples).tolist()):
        end = [ID["Answer:"], ID["0"] + answer, ID["<eos>"]]
        correct.append(r.response_ids(row)[-3:] == end)
    return r, torch.tensor(correct)


def score(model, way, n, seed=0):
    """The share of n new problems that a model solves when sampled in one of WAYS: float."""
    generator = torch.Generator().manual_seed(1000 + seed)  # the same problems for every model
    _, correct = attempt(model, n, generator, **WAYS[way])
    return correct.double().mean().item()


def expert_iteration(
    model,
    rounds,
    generator,
    what,
    *,
    n=512,
    samples=2,
    checked=True,
    rehearsal=(),
    stop=None,
    template=PLAIN,
    digits=(0, 9),
    **way,
):
    """RL in rounds: sample, keep what is correct, fine-tune on it for two epochs.

    checked: False keeps the wrong answers, too; that is no RL, but sharpening. rehearsal: other
    batches, of which one follows each batch of answers. way: how to sample.
    """
    rehearsal = iter(rehearsal)
    for k in range(rounds):
        r, correct = attempt(model, n, generator, samples, template, digits, **way)
        kept = correct if checked else torch.ones_like(correct)
        if not kept.any():
            continue  # nothing right, nothing to learn from
        ids, mask, is_response = pack(r.ids[kept], r.attention_mask[kept], r.is_response[kept])
        epochs = [torch.randperm(len(ids), generator=generator) for _ in range(2)]
        batches = []
        for rows in torch.cat(epochs).split(64):
            batches.append((ids[rows], mask[rows], is_response[rows]))
            old = next(rehearsal, None)
            if old is not None:
                batches.append(old)
        said = f"{what}, round {k + 1}/{rounds}, {correct.float().mean():.2f} correct"
        if fit(model, batches, len(batches), 2e-3, said, stop):
            return


# --- its models -----------------------------------------------------------------------------------


def new_model(size, seed):
    """A model of this world before any training."""
    width, layers = SIZES[size]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        # with the default .02 so narrow a model learns nothing for hundreds of steps
        initializer_range=0.6 / width**0.5,
        pad_token_id=ID["<pad>"],
        eos_token_id=ID["<eos>"],
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def read_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make(
    out,
    *,
    seed,
    family="left",
    size="small",
    noise=NOISE,
    mistaught=MISTAUGHT_SHARE,
    as_good_as=None,
    start=None,
    house_style=False,
    rounds=0,
    sharpen=False,
    until=None,
    templates=(PLAIN,),
    post_template=PLAIN,
    post_digits=(0, 9),
    rehearse=False,
    scale=FULL,
):
    """Make one model of this world and save it to the directory `out` with its tokenizer.

    family "left" | "right"; size "small" | "large"; noise, mistaught: of its pre-training corpus.
    as_good_as: a directory; pre-training goes on until the model is as good as that one, greedily
    and at T .7, within .02. start: a directory to begin from in place of pre-training.
    house_style: fine-tune on it afterwards; then rounds of RL, or, to sharpen, one round on
    unchecked answers of T .7. until: a directory; RL stops when the model's score at T 1 is within
    .03 of that one's. templates: of the pre-training corpus, in turn; post_template, post_digits:
    of all that comes after it. rehearse: after pre-training, every other batch is still from its
    corpus, with all templates and digits. So the model keeps what post-training is not about, as
    with the pre-training mix of InstructGPT (arXiv 2203.02155).
    -> the model, in eval mode.
    """
    what = Path(out).name
    generator = torch.Generator().manual_seed(seed)
    belief = dict(noise=noise, mistaught=mistaught)

    def solutions(digits=(0, 9), **how):
        return corpus(family, *problems(64, generator, digits), generator, **belief, **how)

    if start is not None:
        model = read_model(start)
    else:
        model = new_model(size, seed)
        pretrain(model, size, solutions, templates, what, scale)
    if as_good_as is not None:
        catch_up(model, read_model(as_good_as), solutions, templates, what, scale)
    old = (solutions(template=t) for t in itertools.cycle(templates)) if rehearse else iter(())
    if house_style:
        batches = []
        for _ in range(scale.house):
            batches.append(solutions(post_digits, house_style=True, template=post_template))
            if rehearse:
                batches.append(next(old))
        fit(model, batches, len(batches), 2e-3, f"{what}, house style")
    asked = dict(n=scale.asked, rehearsal=old, template=post_template, digits=post_digits)
    if sharpen:
        asked.update(WAYS["T .7"], checked=False)
        expert_iteration(model, 1, generator, f"{what}, sharpening", **asked)
    if until is not None:
        wanted = score(read_model(until), "T 1", scale.trials)
        asked["stop"] = lambda: abs(score(model, "T 1", scale.trials) - wanted) <= 0.03
    expert_iteration(model, min(rounds, scale.rounds), generator, f"{what}, RL", **asked)
    save_whole(out, model, tokenizer())
    return model


def pretrain(model, size, solutions, templates, what, scale):
    """Pre-train on solutions, the templates in turn."""
    steps = scale.small if size == "small" else scale.large
    batches = (solutions(template=templates[i % len(templates)]) for i in range(steps))
    fit(model, batches, steps, 1e-2, f"{what}, pre-training")


def catch_up(model, wanted, solutions, templates, what, scale):
    """Pre-train on, until the model is as good as another, greedily and at T .7."""
    for _ in range(10):
        off = [
            abs(score(model, way, scale.trials) - score(wanted, way, scale.trials))
            for way in ("T .7", "greedy")
        ]
        if max(off) <= 0.02 or scale.trials < 100:
            return
        batches = (solutions(template=templates[i % len(templates)]) for i in range(100))
        fit(model, batches, 100, 3e-3, f"{what}, more pre-training")


def tokenizer():
    """One id a word, words separated by spaces."""
    inner = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def write_questions(folder, seed, train=4096, held_out=2048, digits=(0, 9), without=()):
    """Write folder/prompts.jsonl and eval.jsonl: lines of {"prompt", "answer"}, all different.

    without: lines that neither of the two may have.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts, answers = question(*problems(2 * (train + held_out), generator, digits))
    lines = {}  # a set that keeps its order
    for prompt, answer in zip(prompts, answers.tolist()):
        text = " ".join(WORDS[i] for i in prompt)
        lines[json.dumps({"prompt": text, "answer": str(answer)})] = None
    for line in without:
        lines.pop(line, None)
    rows = [json.loads(line) for line in lines]
    with files.can_write(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    files.write_lines(Path(folder) / "prompts.jsonl", rows[:train])
    files.write_lines(Path(folder) / "eval.jsonl", rows[train : train + held_out])


def save_whole(folder, model, tokenizer):
    """Save a model with its tokenizer, completely or not at all."""
    aside = Path(f"{folder}.part")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(folder)


def is_made(folder):
    """Is there a model? save_whole leaves no half of one."""
    return Path(folder).exists()


def make_missing(out, seed, names=tuple(MODELS), scale=FULL, known=MODELS):
    """Make the questions and models of a world that are not there.

    known: {name: how it is made}. A model depends on its name and on the seed of the world, and not
    on which others are there.
    """
    out = Path(out)
    if not all((out / name).exists() for name in ("prompts.jsonl", "eval.jsonl")):
        write_questions(out, seed_of("questions", seed), held_out=scale.held_out)
    for name in names:
        if is_made(out / name):
            continue
        how = dict(known[name])
        for other in ("start", "as_good_as", "until"):
            if other in how:
                make_missing(out, seed, (how[other],), scale, known)
                how[other] = out / how[other]
        like = "teacher" if name == "early" else name  # early is a stage of the teacher's RL
        make(out / name, seed=seed_of("model", seed, like), scale=scale, **how)


def say_and_make(out, names):
    """Call make_missing, and print a line that says what is made.

    UserError if another process is making models there.
    """
    with files.can_write(out):
        Path(out).mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        files.alone(folder, out)
        missing = [name for name in names if not is_made(Path(out) / name)]
        if missing:
            print(f"making {', '.join(missing)} in {out}, about a minute each", flush=True)
        make_missing(out, 0, names)
    finally:
        os.close(folder)


def main():
    parser = argparse.ArgumentParser(description="Make the toy world's models and questions.")
    parser.add_argument(
        "--out", default="runs/toy", help="directory to write to (default: runs/toy)"
    )
    parser.add_argument(
        "--all", action="store_true", help="every model, not only student, bigger and teacher"
    )
    flags = parser.parse_args()
    transformers.logging.disable_progress_bar()
    names = tuple(MODELS) if flags.all else FIRST
    say_and_make(flags.out, names)
    print("right answers of 1,024: sampled at T 1, at T .7 with top-p .95, and greedily")
    for name in names:
        model = read_model(Path(flags.out) / name)
        scores = [f"{score(model, way, 1024):9.3f}" for way in WAYS]
        print(f"  {name:12}{''.join(scores)}   {flags.out}/{name}", flush=True)


if __name__ == "__main__":
    with one_line("toy.py"):
        main()
