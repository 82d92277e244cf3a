"""experiments/sums.py: the world of a real language model. It is asked for sums of three digits,
and its teachers are copies of itself that were trained further.

The base (SmolLM2-135M-Instruct; any chat model will do) reads two worked examples and a question:
"5 + 6 + 9" -> "5 + 6 = 11, 11 + 9 = 20. Answer: 20". Asked greedily it is right about every second
time. Its copies:

    expert-1, expert-2, expert
                after one, two and three rounds of expert iteration. In each round it answers 160
                questions at T 1, and is fine-tuned on its right answers
    copy        after three rounds on its own answers, right or wrong
    backwards   fine-tuned on 160 sums that are worked out from the right, "9 + 6 = 15, ...", then
                two rounds of expert iteration
    words       fine-tuned on sums in words, "Five plus six is eleven, ...", 160 a round, until it
                is right .8 of the time

A copy is made from its seed, in float32, and kept in the world's folder. Runs and measurements are
in bfloat16 on a CPU that is fast in it, else in float32; the arm float32 of real.py tells what
that changes.

No held-out sum is trained on, but nearly all have the same digits as one that is, in another order.
Two slips stay, so that later runs compare with earlier ones: backwards is asked in its first round
of expert iteration just the 160 sums that it was fine-tuned on; and a copy's second round on seed 0
draws with the seeds of the first round on seed 1, and so on.
"""

import contextlib
import copy
import fcntl
import hashlib
import math
import os
import random
import re
import sys
from pathlib import Path

import lab
import torch
import toy

from plumbing import files, models, prompts, slots
from plumbing.answers import answered, read_answer, same_answer
from recipes import cold_start
from rollout import seed_of

NEW_TOKENS = 48  # of a response; a solution takes some 27
PROMPT_TOKENS = 512
HELD_OUT = 240
FOLLOWED = 32  # held-out prompts on which a run measures itself on the way
EXPERTS = ("expert-1", "expert-2", "expert")  # after one round of expert iteration, two, three
ROUNDS = len(EXPERTS)
SAMPLES = 160  # questions a round
MOST_ROUNDS = 12  # for the copy in words
ENOUGH = 0.8  # the share of right answers at which its training ends
# bfloat16 where the CPU is fast in it, else float32, which is then several times as fast
DTYPE = "bfloat16" if "AVX512" in torch.backends.cpu.get_cpu_capability() else "float32"

# --- the questions --------------------------------------------------------------------------------

EXAMPLES = ((5, 6, 9), (3, 8, 4))
PLAIN = ("Add.", "{} + {} + {}")  # the system prompt, and the question
WORDY = ("You are a careful accountant.", "What is the sum of {}, {} and {}?")
WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty twenty-one twenty-two twenty-three twenty-four "
    "twenty-five twenty-six twenty-seven"
).split()


def forwards(a, b, c):
    return f"{a} + {b} = {a + b}, {a + b} + {c} = {a + b + c}. Answer: {a + b + c}"


def backwards(a, b, c):
    return f"{c} + {b} = {b + c}, {b + c} + {a} = {a + b + c}. Answer: {a + b + c}"


def in_words(a, b, c):
    first = f"{WORDS[a].capitalize()} plus {WORDS[b]} is {WORDS[a + b]}"
    second = f"{WORDS[a + b]} plus {WORDS[c]} is {WORDS[a + b + c]}"
    return f"{first}, {second}. Answer: {a + b + c}"


def chat(system, examples, last):
    """Worked examples, [(question, digits)], and a question: -> messages."""
    messages = [{"role": "system", "content": system}]
    for text, digits in examples:
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": forwards(*digits)})
    return [*messages, {"role": "user", "content": last}]


def question(digits, template=PLAIN):
    """A line of a file of prompts: {"prompt", "answer"}."""
    system, asks = template
    examples = [(asks.format(*example), example) for example in EXAMPLES]
    return {
        "prompt": chat(system, examples, asks.format(*digits)),
        "answer": str(sum(digits)),
    }


def digits_of(row):
    """The digits of a question, however it is worded."""
    return tuple(int(x) for x in re.findall(r"\d", row["prompt"][-1]["content"]))


def all_sums(seed):
    """The 727 sums of three digits from 1 to 9 that are not examples, shuffled: list of digits."""
    numbers = range(1, 10)
    sums = [(a, b, c) for a in numbers for b in numbers for c in numbers]
    sums = [digits for digits in sums if digits not in EXAMPLES]
    random.Random(seed).shuffle(sums)
    return sums


def write_questions(world, seed):
    """Write eval.jsonl and prompts.jsonl into the world's folder; with them the prompts in other
    words (wordy.jsonl), and the first prompt alone (one.jsonl)."""
    sums = all_sums(seed)
    held_out = sums[:HELD_OUT]
    rest = sums[HELD_OUT:]
    for name, part, template in (
        ("eval", held_out, PLAIN),
        ("prompts", rest, PLAIN),
        ("wordy", rest, WORDY),
        ("one", rest[:1], PLAIN),
    ):
        write_lines(world / f"{name}.jsonl", [question(digits, template) for digits in part])


def write_lines(path, rows):
    """Write a file of JSON lines, unless it is there: another process may be reading it."""
    with alone(path):
        if not path.exists():
            files.write_lines(path, rows)


def first_slip(said, digits):
    """Where a solution first departs from the numbers of the right one: a place in the text.

    None if it does not. Only a solution from the left is right here.
    """
    right = re.findall(r"\d+", forwards(*digits))
    for number, found in zip(right, re.finditer(r"\d+", said)):
        if found[0] != number:
            return found.start() + len(os.path.commonprefix([found[0], number]))
    return None


# --- the copies -----------------------------------------------------------------------------------


def encoded(pair, path):
    """The prompts of a file with their token ids: list of dicts."""
    return prompts.encode_rows(
        pair,
        prompts.load_prompts(path),
        max_prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
    )


def fine_tune(pair, examples, seed, lr=3e-5):
    """Fine-tune the student for one epoch on [(prompt ids, response ids)], in batches of 16."""
    optimizer = torch.optim.AdamW(pair.student.parameters(), lr=lr)
    steps = math.ceil(len(examples) / 16)
    updates = cold_start(pair, optimizer, examples, steps=steps, lr=lr, batch_size=16, seed=seed)
    for _ in updates:
        pass


def on_solutions(pair, rows, solution, seed, lr=3e-5):
    """Fine-tune the student on solutions, written by a function of the digits."""
    end = pair.tokenizer.eos_token_id
    examples = []
    for row in rows:
        text = solution(*digits_of(row))
        ids = pair.tokenizer(text, add_special_tokens=False).input_ids
        examples.append((row["ids"], [*ids, end]))
    fine_tune(pair, examples, seed, lr)


def expert_iteration(pair, rows, rounds, seed, samples=SAMPLES, keep=same_answer):
    """In each round the student answers rows drawn by chance, and is fine-tuned on those finished
    answers for which keep(what it says, what is right) holds. Yields after each round.
    """
    draw = random.Random(seed)
    for number in range(rounds):
        chosen = draw.sample(rows, min(samples, len(rows)))
        with pair.autocast():
            r = slots.rollout(
                pair.student,
                [row["ids"] for row in chosen],
                seeds=[seed_of(seed + number, "experiment", i) for i in range(len(chosen))],
                max_new_tokens=NEW_TOKENS,
                in_flight=pair.in_flight,
                **pair.sampling,
            )
        good = []
        for i, row in enumerate(chosen):
            ids = r.response_ids(i)
            said = read_answer(pair.tokenizer.decode(ids, skip_special_tokens=True))
            if not r.truncated[i] and keep(said, row["answer"]):
                good.append((row["ids"], ids))
        told(f"round {number + 1}: {len(good)} of {len(chosen)} answers kept")
        if good:
            fine_tune(pair, good, seed + number)
        yield


def told(line):
    print(line, file=sys.stderr, flush=True)


def anything(said, right):
    return True


def write_in_words(pair, rows, seed, rounds, samples):
    """Fine-tune the student on sums in words until it is right ENOUGH, for `rounds` at most."""
    draw = random.Random(seed)
    for number in range(rounds):
        chosen = draw.sample(rows, min(samples, len(rows)))
        on_solutions(pair, chosen, in_words, seed + number, lr=1e-4)
        asked = draw.sample(rows, min(48, len(rows)))
        right, _ = answered(pair, asked, max_new_tokens=NEW_TOKENS, seed=seed + number)
        share = right.double().mean().item()
        told(f"in words, round {number + 1}: {share:.2f} right")
        if share >= ENOUGH:
            break


# --- a seed ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def alone(path):
    """A lock on what is made at a path: other processes wait until this one has left the block, or
    has died."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def worked_examples_once(model, rows):
    """In the block, the model reads what the prompts of these rows begin with, the worked examples,
    only once. Nine of ten tokens of a prompt are theirs. Prompts of several lengths are padded on
    the left, and read as ever.
    """
    if len({len(row["ids"]) for row in rows}) > 1:
        yield
        return
    S = len(os.path.commonprefix([row["ids"] for row in rows]))
    S = min(S, len(rows[0]["ids"]) - 1)
    read = model.forward
    begun = []  # the cache of a prompt's first S tokens

    def read_the_rest(input_ids, position_ids=None, cache=None, **how):
        if cache is not None:
            return read(input_ids=input_ids, position_ids=position_ids, cache=cache, **how)
        if not begun:
            begun.append(read(input_ids=input_ids[:1, :S], use_cache=True).cache)
        cache = copy.deepcopy(begun[0])
        cache.batch_repeat_interleave(len(input_ids))
        rest = position_ids[:, S:]
        return read(input_ids=input_ids[:, S:], position_ids=rest, cache=cache, **how)

    model.forward = read_the_rest
    try:
        yield
    finally:
        del model.forward


class RealLab(lab.Lab):
    """One seed of this world: its models, its runs, its results."""

    kind = "real"
    new_tokens = NEW_TOKENS
    max_prompt_tokens = PROMPT_TOKENS
    in_flight = 256  # their cache takes 2 GB
    dtype = DTYPE
    exam = "eval"  # a file of held-out prompts
    defaults = {
        "steps": 12,
        "batch_size": 16,
        "lr": 1e-5,
        "max_new_tokens": NEW_TOKENS,
        "dtype": DTYPE,
    }
    quick_sizes = {
        "batch_size": 4,
        "steps": 2,
        "max_new_tokens": 8,
        "cold_start": 8,
        "cold_start_steps": 1,
    }

    def __init__(self, seed, worlds, results, quick=False, models=None, *, base):
        super().__init__(seed, worlds, results, quick, models)
        self.base = Path(base).resolve() if Path(base).is_dir() else Path(base)
        self.world = self.world.parent / f"{self.base.name}-{seed}"
        self.held_out = 8 if quick else HELD_OUT
        write_questions(self.world, seed)

    def once(self, name, asked, make):
        return super().once(name, {"base": self.base.name, **asked}, make)

    def model(self, name):
        """The folder of a model, made if it is not there."""
        if name == "base":
            return self.base
        made_as = "expert" if name in EXPERTS else name  # one making gives all three experts
        with alone(self.world / made_as):
            if not self.is_made(name):
                self.make(name)
        return self.world / name

    def is_made(self, name):
        return toy.is_made(self.world / name)

    def make(self, name):
        """Train a copy of the base and save it, an expert after each of its rounds."""
        told(f"seed {self.seed}: {name}")
        pair = models.load_pair(str(self.base), str(self.base), device="cpu")
        rows = encoded(pair, self.world / "prompts.jsonl")
        seed = self.seed
        samples = 16 if self.quick else SAMPLES
        if name == "words":
            write_in_words(pair, rows, seed, 1 if self.quick else MOST_ROUNDS, samples)
        elif name == "copy":
            for _ in expert_iteration(pair, rows, ROUNDS, seed, samples, anything):
                pass
        elif name == "backwards":
            chosen = random.Random(seed).sample(rows, min(samples, len(rows)))
            on_solutions(pair, chosen, backwards, seed)
            for _ in expert_iteration(pair, rows, ROUNDS - 1, seed, samples):
                pass
        elif name in EXPERTS:
            for after, _ in zip(EXPERTS, expert_iteration(pair, rows, ROUNDS, seed, samples)):
                if not self.is_made(after):
                    self.save(pair, after)
            return
        else:
            raise ValueError(f"no model {name}")
        self.save(pair, name)

    def train(self, name, arm):
        """Train and measure an arm. Its result also has digests of its models: if one is made again
        on another machine, it may come out differently."""
        made = super().train(name, arm)
        return {**made, "models": {who: self.digest(who) for who in {arm.student, arm.teacher}}}

    def digest(self, name):
        """The digest of a model's weights."""
        found = hashlib.sha256()
        for path in sorted(self.model(name).glob("*.safetensors")):
            with open(path, "rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        return found.hexdigest()[:12]

    def save(self, pair, name):
        """Save the student of a pair, completely or not at all."""
        toy.save_whole(self.world / name, pair.student, pair.tokenizer)

    def exam_rows(self, pair, exam):
        return self.rows(pair, self.held_out, exam)

    def notes(self, folder):
        """The folder that keeps what was measured of a model. The base's is one of this world."""
        if Path(folder) != self.base:
            return Path(folder)
        return self.world / "base"

    def accuracies(self, folder, exam):
        with alone(self.notes(folder) / "accuracies"):
            return super().accuracies(folder, exam)

    def answering(self, model, rows):
        return worked_examples_once(model, rows)

    def followed(self, steps):
        some = self.world / f"eval-{FOLLOWED}.jsonl"
        rows = prompts.load_prompts(self.world / "eval.jsonl")
        write_lines(some, rows[: 4 if self.quick else FOLLOWED])
        return {"eval": (str(some),), "eval_n": 1, "eval_every": 12}

    def first_slip(self, pair, row, response):
        """Where a response first goes wrong: the index of that token, None if it never does.

        A response without a wrong number, but cut off, slips just behind its last token.
        """
        text = pair.tokenizer.decode(response, skip_special_tokens=True)
        if same_answer(read_answer(text), row["answer"]):
            return None
        place = first_slip(text, digits_of(row))
        if place is None:
            return len(response)
        for count in range(1, len(response) + 1):
            if len(pair.tokenizer.decode(response[:count], skip_special_tokens=True)) > place:
                return count - 1
        return len(response)
