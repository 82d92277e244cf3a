"""experiments/bench.py: what a step costs, beside what people would use instead. Ratios, side by
side, alternating.

rollout   tokens a second against generate and generate_batch (continuous batching) of
          transformers: same model, prompts and sampling, n = 4; lengths as they come ("uneven")
          and all alike ("even"); and the time of a token against the time that reading the weights
          once takes on this machine
loss      peak memory and time of in_chunks against whole tensors and plain autograd, growing N and
          vocabulary
step      seconds by phase and peak memory of opd.py, one setting changed at a time
processes the toy's step in two processes of one thread beside one process of one thread and of two
trl       the whole step against TRL's DistillationTrainer, in an environment of its own

python experiments/bench.py                          on a toy pair, made first
python experiments/bench.py --student S --teacher T --prompts F.jsonl --max-new-tokens 256
                                                     and on another
python experiments/bench.py --trl PYTHON             a python that has trl and datasets
python experiments/bench.py --quick                  does it run?
python experiments/bench.py --report A.json B.json   parts that ran one by one
results/bench.{json,txt}
"""

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median

import torch
import toy
import transformers
from lab import ROOT, first_sentence, without_folders, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import loss
import opd
import teacher
from plumbing.files import provenance, write_json
from plumbing.flags import PRESETS, Config, check_run
from plumbing.processes import one_of_several
from plumbing.prompts import encode, encode_for, load_prompts, questions
from plumbing.run import Run
from plumbing.slots import rollout
from rollout import batch, left_pad

GIB = 2**30
PARTS = ("rollout", "loss", "step", "processes", "trl")
VOCABULARIES = (50_000, 152_000, 262_000)  # about those of GPT-2, Qwen 2.5 and 3, Gemma 3
POSITIONS = (512, 1024, 2048, 4096, 8192)
WIDTH = 256  # hidden size in the loss part
EAGER = 6  # N x V tensors that eager holds; what would not fit is left out


def alternate(arms, repeats):
    """Run the functions of {name: f} in turn: -> {name: [what f returned, ...]}.

    There is one round more than `repeats`, the first, and it is not counted. An arm that takes more
    than five times as long as the quickest there is not run again, and its first round counts.
    """
    first, seconds = {}, {}
    for name, f in arms.items():
        started = time.perf_counter()
        first[name] = f()
        seconds[name] = time.perf_counter() - started
    slow = {name for name in arms if seconds[name] > 5 * min(seconds.values())}
    results = {name: [first[name]] if name in slow else [] for name in arms}
    for _ in range(repeats):
        for name, f in arms.items():
            if name not in slow:
                results[name].append(f())
    return results


def clock(f):
    started = time.perf_counter()
    f()
    return time.perf_counter() - started


def in_a_process(python, what, *, processes=1, threads=None, **how):
    """Run `what` of this file in a fresh process, or in several: -> its result.

    So its peak of memory is its own.
    """
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        "--",
    ]
    run = subprocess.run(
        [python, *torchrun * (processes > 1), __file__, "--one", what, json.dumps(how)],
        env={**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise RuntimeError(f"{what} {how}: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def peak():
    """The most memory that this process has held, in bytes. Linux only.

    getrusage would report the parent's peak if that is larger.
    """
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


# --- rollout --------------------------------------------------------------------------------------


def bench_rollout(name, model, prompts, max_new_tokens, batched, quick):
    """Time the ways to write with a model: -> results, one for each arm and kind of length.

    model: a directory; prompts: a file; batched: whether to time generate_batch, too.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompts = [
        encode(tokenizer, row["prompt"]) for row in load_prompts(prompts)[: 4 if quick else 16]
    ]
    pad_id = tokenizer.pad_token_id or 0
    arms = ("ours", "generate", "generate_batch")[: 3 if batched else 2]
    repeats = 1 if quick else 3
    uneven = sorted(teacher.eos_ids(model, tokenizer))
    return [
        *rates("uneven", name, model, prompts, max_new_tokens, uneven, pad_id, arms, repeats),
        *rates("even", name, model, prompts, max_new_tokens // 4, [], pad_id, arms, repeats),
        floor(name, model, prompts, pad_id),
    ]


def rates(lengths, name, model, prompts, max_new_tokens, eos_ids, pad_id, arms, repeats, n=4):
    """Tokens a second of several ways to write: -> results, one for each arm."""
    written = {}
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=max_new_tokens,
        num_return_sequences=n,
        pad_token_id=pad_id,
        eos_token_id=eos_ids or None,
    )
    model.generation_config = config

    def ours():
        r = rollout(
            model,
            prompts,
            n=n,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            pad_id=pad_id,
            seeds=list(range(len(prompts))),
        )
        return r.response_mask.sum(1).tolist()

    def theirs():
        torch.manual_seed(0)
        ids, mask = left_pad(prompts, pad_id)
        out = model.generate(ids, attention_mask=mask.long(), generation_config=config)
        out = out[:, ids.size(1) :]
        ends = torch.isin(out, torch.tensor(eos_ids, dtype=torch.long))
        return torch.where(ends.any(1), ends.int().argmax(1) + 1, out.size(1)).tolist()

    def continuous():
        torch.manual_seed(0)
        out = model.generate_batch(prompts, generation_config=config, progress_bar=False)
        model.set_attn_implementation("sdpa")  # generate_batch leaves its own behind
        return [len(x.generated_tokens) for x in out.values()]

    def rate(arm, f):
        started = time.perf_counter()
        written[arm] = f()
        return sum(written[arm]) / (time.perf_counter() - started)

    ways = {"ours": ours, "generate": theirs, "generate_batch": continuous}
    made = alternate({arm: partial(rate, arm, ways[arm]) for arm in arms}, repeats)
    return [
        {
            "part": "rollout",
            "model": name,
            "lengths": lengths,
            "arm": arm,
            "sequences": len(prompts) * n,
            "tokens": sum(written[arm]),
            "longest": max(written[arm]),
            "tokens_per_second": made[arm],
            "ratio": [a / b for a, b in zip(made["ours"], made[arm] * len(made["ours"]))],
        }
        for arm in made
    ]


def floor(name, model, prompts, pad_id):
    """The time of one more token, for one row and for all, and of reading every weight once."""
    once = {id(p): p for p in model.parameters()}
    if not model.config.tie_word_embeddings:
        del once[id(model.get_input_embeddings().weight)]  # only a row of it is read
    weights, memory = sum(p.numel() * p.element_size() for p in once.values()), torch.ones(2**28)
    bandwidth = memory.numel() * 4 / median(clock(memory.sum) for _ in range(5))

    def seconds(rows, tokens):
        how = dict(max_new_tokens=tokens, eos_ids=(), pad_id=pad_id)
        write = partial(rollout, model, (prompts * 4)[:rows], **how)
        return median(clock(write) for _ in range(3))

    step = {}
    for rows in (1, len(prompts) * 4):
        step[rows] = (seconds(rows, 17) - seconds(rows, 1)) / 16
    return {
        "part": "floor",
        "model": name,
        "weights": weights,
        "bandwidth": bandwidth,
        "floor": weights / bandwidth,
        "seconds_a_token": step,
    }


# --- loss -----------------------------------------------------------------------------------------


OBJECTIVES = {
    "top-k": lambda log_p, log_q, y: loss.top_k(log_p, log_q, 16),
    "full": lambda log_p, log_q, y: loss.full_vocab(log_p, log_q),
    "sampled": loss.sampled_token,
}


def loss_inputs(N, V):
    torch.manual_seed(0)
    heads = [torch.nn.Linear(WIDTH, V, bias=False) for _ in range(2)]
    heads[1].requires_grad_(False)
    return (
        torch.randn(N, WIDTH, requires_grad=True),
        torch.randn(N, WIDTH),
        *heads,
        torch.randint(V, (N,)),
    )


def learn(arm, objective, inputs):
    """Loss and gradients by in_chunks, or by whole tensors and plain autograd."""

    def per_position(log_p, log_q, y):
        return {"loss": OBJECTIVES[objective](log_p, log_q, y)}

    h_p, h_q, head_p, head_q, y = inputs
    h_p.grad = head_p.weight.grad = None

    def log_p_of(h):
        return head_p(h).log_softmax(-1)

    def log_q_of(h):
        return head_q(h).log_softmax(-1)

    if arm == "ours":
        V = head_p.out_features
        chunk = max(128, teacher.LOGITS_OF_A_CHUNK["cpu"] // V)  # teacher.Pair's
        values = loss.in_chunks(per_position, h_p, h_q, log_p_of, log_q_of, y, chunk)
    else:
        with torch.no_grad():
            log_q = log_q_of(h_q)
        values = per_position(log_p_of(h_p), log_q, y)
    values["loss"].sum().backward()


def loss_memory(arm, objective, N, V):
    inputs = loss_inputs(N, V)
    before = peak()
    learn(arm, objective, inputs)
    return peak() - before


def bench_loss(quick):
    rows = []
    for V in VOCABULARIES[: 1 if quick else None]:
        for N in POSITIONS[: 1 if quick else None]:
            for objective in OBJECTIVES if V == 152_000 and N in (1024, 4096, 8192) else ("top-k",):
                for arm in ("ours", "eager") if EAGER * N * V * 4 < 16 * GIB else ("ours",):
                    how = dict(arm=arm, objective=objective, N=N, V=V)
                    rows.append(
                        {
                            "part": "loss",
                            **how,
                            "bytes": in_a_process(sys.executable, "loss", **how),
                        }
                    )
        for objective in OBJECTIVES if V <= 152_000 else ():
            inputs = loss_inputs(256 if quick else 1024, V)
            times = alternate(
                {
                    arm: partial(clock, partial(learn, arm, objective, inputs))
                    for arm in ("ours", "eager")
                },
                1 if quick else 3,
            )
            rows.append(
                {
                    "part": "loss time",
                    "objective": objective,
                    "N": len(inputs[4]),
                    "V": V,
                    "seconds": times,
                    "ratio": [a / b for a, b in zip(times["ours"], times["eager"])],
                }
            )
    return rows


# --- the whole step -------------------------------------------------------------------------------


def our_step(steps, **settings):
    """Medians over the steps of a run of opd.py, without the first.

    -> {"seconds", "time_rollout", "time_teacher" (of the teacher's trunk), "time_update" (the rest
    after the rollout), "tokens", "bytes"}
    """
    cfg = Config(**settings, out=tempfile.mkdtemp() + "/run")
    rows = []
    spent = []
    with one_of_several(cfg.device), Run(check_run(cfg)) as run:  # as opd.distil begins
        texts, _, _ = questions(cfg)
        pair = run.load_pair()
        train = encode_for(cfg, pair, texts)
        optimizer = opd.adamw(cfg, pair.student)

        def states(model, part):
            started = time.perf_counter()
            h = teacher.states(model, part)
            if model is pair.teacher:
                spent.append(time.perf_counter() - started)
            return h

        opd.states = states
        for step in range(steps + 1):
            chosen = [train[i] for i in batch(len(train), step, cfg.batch_size, cfg.seed)]
            spent.clear()
            started = time.perf_counter()
            _, row = opd.update(cfg, pair, optimizer, chosen, step)
            row["seconds"] = time.perf_counter() - started
            row["time_teacher"] = sum(spent)
            row["time_update"] -= sum(spent)
            rows.append(row)
    return {
        **{
            name: median(row[name] for row in rows[1:])
            for name in ("seconds", "time_rollout", "time_teacher", "time_update", "tokens")
        },
        "bytes": peak(),
    }


def trl_step(steps, student, teacher, prompts, batch_size, max_new_tokens, lr):
    """The same for TRL: -> {"seconds", "bytes"}.

    Its loss is the reverse KL (beta 1). The student samples from its full softmax, in float32.
    """
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    tokenizer = AutoTokenizer.from_pretrained(student, padding_side="left")
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}]
            if tokenizer.chat_template
            else row["prompt"]
        }
        for row in load_prompts(prompts)
    ]
    config = DistillationConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch_size,
        max_completion_length=max_new_tokens,
        beta=1.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_steps=steps + 1,
        learning_rate=lr,
        warmup_steps=0,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        teacher_model_init_kwargs={"dtype": "float32"},
    )
    marks = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args, **options):
            marks.append(time.perf_counter())

    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
    )
    trainer.train()
    marks.append(time.perf_counter())
    return {"seconds": median(b - a for a, b in zip(marks[1:], marks[2:])), "bytes": peak()}


def bench_step(pairs, quick):
    rows = []
    for name, pair in pairs.items():
        B, T = pair["batch_size"], pair["max_new_tokens"]
        for what, change in (
            ("as it is", {}),
            ("twice the prompts", {"batch_size": 2 * B}),
            ("n = 4", {"n": 4}),
            ("a quarter of the length", {"max_new_tokens": T // 4}),
            ("k = 64", {"k": 64}),
            ("full vocabulary", {"objective": "full"}),
            ("sampled token", {"objective": "sampled"}),
            ("bfloat16", {"dtype": "bfloat16"}),
        )[: 2 if quick else None]:
            rows.append(
                {
                    "part": "step",
                    "model": name,
                    "what": what,
                    **in_a_process(
                        sys.executable,
                        "step",
                        steps=10 if name == "toy" and not quick else 2,
                        **{**pair, **change},
                    ),
                }
            )
    return rows


def bench_processes(pair, quick):
    """Tokens a second of the toy in one process and in two.

    Two processes share the prompts of one, or have as many each.
    """
    rows = []
    for B in (64,) if quick else (64, 256):

        def rate(processes, threads, batch_size):
            step = in_a_process(
                sys.executable,
                "step",
                processes=processes,
                threads=threads,
                steps=2 if quick else 20,
                **{**pair, "batch_size": batch_size},
            )
            return step["tokens"] / step["seconds"]

        arms = {
            "one process, one thread": partial(rate, 1, 1, B),
            "one process, two threads": partial(rate, 1, 2, B),
            "two processes": partial(rate, 2, 1, B),
            "two processes, each as many": partial(rate, 2, 1, 2 * B),
        }
        made = alternate(
            {
                arm: f
                for arm, f in arms.items()
                if not quick or "thread" not in arm or "one thread" in arm
            },
            1 if quick else 5,
        )
        for arm, rates in made.items():
            rows.append(
                {
                    "part": "processes",
                    "model": "toy",
                    "batch_size": B,
                    "arm": arm,
                    "tokens_per_second": rates,
                    "ratio": [a / b for a, b in zip(rates, made["one process, one thread"])],
                }
            )
    return rows


def bench_trl(python, pairs, quick):
    rows = []
    for name, pair in pairs.items():
        steps = 2 if quick else 20 if name == "toy" else 3
        made = alternate(
            {
                "ours": partial(in_a_process, sys.executable, "step", steps=steps, **pair),
                "trl": partial(in_a_process, python, "trl", steps=steps, **pair),
            },
            1 if quick else 3,
        )
        rows.append(
            {
                "part": "trl",
                "model": name,
                **{
                    f"{arm} {x}": [run[x] for run in made[arm]]
                    for arm in made
                    for x in ("seconds", "bytes")
                },
            }
        )
    return rows


# --- the report -----------------------------------------------------------------------------------


def spread(x, form=".2f"):
    return f"{median(x):{form}} ({min(x):{form}} .. {max(x):{form}})"


def report(rows):
    """The table: list of lines. What is compared is a ratio with its spread."""
    lines = []
    peaks = {}
    for row in rows:
        if row["part"] != "loss":
            lines.append(LINES[row["part"]](row))
            continue
        what = (row["objective"], row["V"])
        if what not in peaks:
            peaks[what] = [other for other in rows if is_like(other, row)]
            lines.append(line_of_peaks(peaks[what]))
    return lines


def is_like(row, other):
    """Are both peaks of the same loss and vocabulary?"""
    return all(row.get(name) == other[name] for name in ("part", "objective", "V"))


def line_of_rollout(row):
    return (
        f"rollout {row['model']:5} {row['lengths']:6} {row['sequences']:4d} sequences, mean "
        f"{row['tokens'] / row['sequences']:5.1f}, longest {row['longest']:4d}: {row['arm']:14} "
        f"{median(row['tokens_per_second']):7.0f} tokens/s, "
        f"ours is {spread(row['ratio'])} times as fast"
    )


def line_of_floor(row):
    cells = []
    for rows, seconds in row["seconds_a_token"].items():
        share = row["floor"] / seconds
        cells.append(f"{seconds * 1e3:.2f} ms at {rows} rows ({share:.0%} of the floor's speed)")
    return (
        f"decode {row['model']}: {row['weights'] / 1e6:.1f} MB of weights at "
        f"{row['bandwidth'] / 1e9:.1f} GB/s take {row['floor'] * 1e3:.2f} ms; a token takes "
        f"{', '.join(cells)}"
    )


def line_of_peaks(rows):
    """The peaks of one loss and vocabulary, for every N."""
    of_arms = []
    for arm in ("ours", "eager"):
        cells = [f"N {row['N']}: {row['bytes'] / 2**20:.0f}" for row in rows if row["arm"] == arm]
        of_arms.append(f"{arm} {', '.join(cells)}")
    return f"loss {rows[0]['objective']:7} V = {rows[0]['V']:6d}: peak MiB {'; '.join(of_arms)}"


def line_of_loss_time(row):
    return (
        f"loss {row['objective']:7} V = {row['V']:6d}: N {row['N']}: "
        f"{median(row['seconds']['ours']):.2f} s, {spread(row['ratio'])} of eager's time"
    )


def line_of_step(row):
    return (
        f"step {row['model']:5} {row['what']:24}: {row['seconds']:7.3f} s = "
        f"rollout {row['time_rollout']:.3f} + teacher {row['time_teacher']:.3f} "
        f"+ update {row['time_update']:.3f}; "
        f"{row['tokens'] / row['seconds']:6.0f} tokens/s, peak {row['bytes'] / 1e9:.2f} GB"
    )


def line_of_processes(row):
    return (
        f"processes toy, {row['batch_size']:3d} prompts, {row['arm']:27}: "
        f"{median(row['tokens_per_second']):6.0f} tokens/s, "
        f"{spread(row['ratio'])} times the first's"
    )


def line_of_trl(row):
    faster = [a / b for a, b in zip(row["trl seconds"], row["ours seconds"])]
    smaller = [a / b for a, b in zip(row["ours bytes"], row["trl bytes"])]
    return (
        f"trl {row['model']}: ours {median(row['ours seconds']):.3f} s a step, TRL "
        f"{median(row['trl seconds']):.3f} s: {spread(faster)} times as fast, "
        f"{spread(smaller)} of its peak memory "
        f"({median(row['ours bytes']) / 1e9:.2f} and {median(row['trl bytes']) / 1e9:.2f} GB)"
    )


LINES = {  # of a row of each part
    "rollout": line_of_rollout,
    "floor": line_of_floor,
    "loss time": line_of_loss_time,
    "step": line_of_step,
    "processes": line_of_processes,
    "trl": line_of_trl,
}


def join(parts):
    """The results of several commands as one: their rows and commands one after the other."""
    commands = [without_folders(part["command"]) for part in parts]
    if len(set(commands)) < len(parts):
        raise SystemExit("the same results twice")
    if len({(part["commit"], part["threads"]) for part in parts}) > 1:
        raise SystemExit("these results come from different commits, or numbers of threads")
    return {
        **parts[0],
        "command": " ; ".join(commands),
        "seconds": sum(part["seconds"] for part in parts),
        "rows": [row for part in parts for row in part["rows"]],
    }


def parse(argv):
    parser = argparse.ArgumentParser(description=first_sentence(__doc__), allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument(
        "--world",
        help="directory of a toy world, made if it is not there (default: a temporary one)",
    )
    for name in ("student", "teacher", "prompts"):
        parser.add_argument(f"--{name}", help="of a second pair")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, help="of the second pair's rollouts"
    )
    parser.add_argument(
        "--generate-batch",
        nargs="*",
        default=["toy"],
        help="pairs for which it is timed too (default: toy; on a CPU it takes minutes and 10 GB)",
    )
    parser.add_argument(
        "--trl", help="a python with trl and datasets; without it that part is left out"
    )
    parser.add_argument("--out", default=str(ROOT / "experiments" / "results"))
    parser.add_argument(
        "--report",
        nargs="+",
        help="run nothing: the table from results files of single parts, joined",
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--device", help="cuda: another bench, at the size of Qwen2-1.5B on a GPU, see gpu.py"
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # of in_a_process
    return parser.parse_args(argv)


def pairs_of(flags):
    """{"toy", and "real" if there is a second pair: flags of a run}; the toy's models are made."""
    world = Path(flags.world or tempfile.mkdtemp())
    scale = toy.QUICK if flags.quick else toy.FULL
    toy.make_missing(world, seed=0, names=("student", "teacher"), scale=scale)
    pairs = {
        "toy": {
            "student": str(world / "student"),
            "teacher": str(world / "teacher"),
            "prompts": str(world / "prompts.jsonl"),
        }
    }
    for name in ("batch_size", "max_new_tokens", "lr"):
        pairs["toy"][name] = PRESETS["toy"][name]
    if flags.student:
        pairs["real"] = {
            "student": flags.student,
            "teacher": flags.teacher,
            "prompts": flags.prompts,
            "batch_size": 8,
            "max_new_tokens": 64,
            "lr": 3e-5,
        }
    return pairs


def measured(part, flags, pairs):
    """The rows of one part."""
    if part == "loss":
        return bench_loss(flags.quick)
    if part == "step":
        return bench_step(pairs, flags.quick)
    if part == "processes":
        return bench_processes(pairs["toy"], flags.quick)
    if part == "trl":
        return bench_trl(flags.trl, pairs, flags.quick) if flags.trl else []
    rows = []
    for name, pair in pairs.items():
        longest = flags.max_new_tokens if name == "real" else pair["max_new_tokens"]
        batched = name in flags.generate_batch and not flags.quick
        model = pair["teacher"]
        rows += bench_rollout(name, model, pair["prompts"], longest, batched, flags.quick)
    return rows


def main():
    if any(word.split("=")[0] == "--device" for word in sys.argv[1:]):
        import gpu

        gpu.main(sys.argv[1:])
        return
    flags = parse(sys.argv[1:])
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    if flags.one:
        what, how = flags.one
        one = {"loss": loss_memory, "step": our_step, "trl": trl_step}[what]
        print(json.dumps(one(**json.loads(how))))
        return
    out = Path(tempfile.mkdtemp() if flags.quick else flags.out) / "bench"  # quick means nothing
    out.parent.mkdir(parents=True, exist_ok=True)
    if flags.report:
        made = join([json.loads(Path(path).read_text()) for path in flags.report])
        write_json(out.with_suffix(".json"), made)
    else:
        made = run_parts(flags, out)
    write_text("\n".join(report(made["rows"])), made, out)


def run_parts(flags, out):
    """Measure, and save what is there after each part: -> what bench.json holds."""
    started = time.perf_counter()
    pairs = pairs_of(flags)
    rows = []
    for part in flags.parts:
        print(f"--- {part}", flush=True)
        rows += measured(part, flags, pairs)
        made = {**provenance(), "seconds": round(time.perf_counter() - started), "rows": rows}
        write_json(out.with_suffix(".json"), made)
    return made


if __name__ == "__main__":
    main()
