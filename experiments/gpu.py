"""experiments/gpu.py: what a token and a step cost on one GPU, at the shape of Qwen2-1.5B.

Two models of random weights are made from a configuration, so nothing is downloaded. They compute
in bfloat16, on 64 prompts of 64 tokens with n = 4 and 512 new tokens.

    decode   milliseconds a token at 1, 32 and 256 rows, by launches and by CUDA graphs. Beside it
             the floor: the bytes of weights and cache that a token reads, over the bandwidth that
             a copy reaches here
    rollout  tokens a second against generate of transformers (its own cache; a static one, by
             launches and compiled) and generate_batch: same model and sampling; responses of
             equal length, and of uneven length
    step     seconds of opd.update by phase, and its peak of memory: float32 weights of the
             student, autocast, AdamW
    loss     peak of memory of in_chunks, forward and backward, with a vocabulary of 152k tokens, as
             positions grow

    python experiments/bench.py --device cuda       results/gpu.{json,txt}; 6 minutes at most
    bash experiments/gpu.sh                         after the tests that need a GPU
    bash experiments/gpu.sh --quick                 tiny models on a CPU: does it run?
"""

import argparse
import time
import warnings
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

import torch
import transformers
from lab import ROOT, write_text
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

import loss
import opd
from plumbing import slots
from plumbing.files import provenance, write_json
from plumbing.flags import Config
from plumbing.models import activations
from rollout import left_pad
from teacher import LOGITS_OF_A_CHUNK, Pair

FULL = SimpleNamespace(
    shape=dict(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
    ),
    prompts=64,
    prompt_tokens=64,
    n=4,
    new_tokens=512,
    decoded=(17, 145),
    batch=16,
    positions=(2048, 8192, 32_768),
    arms=("generate", "generate, static", "generate_batch", "generate, static, compiled"),
    seconds=240,
)
TINY = SimpleNamespace(
    shape=dict(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=256,
    ),
    prompts=4,
    prompt_tokens=8,
    n=2,
    new_tokens=8,
    decoded=(2, 5),
    batch=2,
    positions=(8, 16),
    arms=("generate", "generate, static"),
    seconds=240,
)
KINDS = {"launches": slots.Slots, "graphs": slots.Captured}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def clock(device, f):
    """Seconds until all that f asks for is done."""
    synchronize(device)
    started = time.perf_counter()
    f()
    synchronize(device)
    return time.perf_counter() - started


def peak(device, f):
    """Bytes on the GPU at the peak of f, less those before it; 0 on a CPU."""
    if device.type != "cuda":
        f()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    return torch.cuda.max_memory_allocated() - before


def model_of(sizes, device, dtype, seed):
    torch.manual_seed(seed)
    config = Qwen2Config(**sizes.shape, eos_token_id=None, bos_token_id=None)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def prompts_of(sizes):
    generator = torch.Generator().manual_seed(0)
    size = (sizes.prompts, sizes.prompt_tokens)
    return torch.randint(sizes.shape["vocab_size"], size, generator=generator).tolist()


def write(kind, model, prompts, **how):
    """A rollout by launches or by graphs."""
    with mock.patch.object(slots, "kind_of", lambda model: KINDS[kind]):
        return slots.rollout(model, prompts, **how)


def bandwidth(device):
    """Bytes a second, read and written, of a copy."""
    size = 2**28 if device.type == "cuda" else 2**20
    x = torch.ones(size, device=device)
    y = torch.ones(size, device=device)
    seconds = [clock(device, lambda: y.copy_(x)) for _ in range(5)]
    return 2 * x.numel() * x.element_size() / median(seconds)


def bytes_of_weights(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


def bytes_of_a_token(config):
    """The bytes of keys and values that a token leaves in the cache, in bfloat16."""
    d = config.hidden_size // config.num_attention_heads
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * d


# --- the parts ----------------------------------------------------------------------------------


def bench_decode(sizes, device):
    model = model_of(sizes, device, torch.bfloat16, seed=0)
    speed = bandwidth(device)
    weights = bytes_of_weights(model)
    short, long = sizes.decoded
    columns = sizes.prompt_tokens + (short + long) / 2
    rows = [{"part": "bandwidth", "bytes_a_second": speed, "weights": weights}]
    for b in (1, 32, sizes.prompts * sizes.n):
        prompts = (prompts_of(sizes) * b)[:b]
        read = weights + b * columns * bytes_of_a_token(model.config)
        row = {"part": "decode", "rows": b, "floor": read / speed}
        for kind in KINDS:

            def seconds(tokens, kind=kind, prompts=prompts):
                how = dict(max_new_tokens=tokens, eos_ids=[])
                return clock(device, lambda: write(kind, model, prompts, **how))

            seconds(short)  # kernels are loaded and chosen
            times = [(seconds(short), seconds(long)) for _ in range(2)]
            a_token = median((b - a) / (long - short) for a, b in times)
            row[kind] = a_token
            first = median(a for a, _ in times)
            row[f"{kind}, first tokens"] = first - short * a_token  # prompts, captures
        rows.append(row)
    return rows


def bench_rollout(sizes, device):
    model = model_of(sizes, device, torch.bfloat16, seed=0)
    V = model.config.vocab_size
    started = time.perf_counter()
    rows = []
    # random weights: each token that ends a response comes once in 256
    for lengths, eos in (("even", []), ("uneven", list(range(0, V, 256)))):
        arms = arms_of(sizes, device, model, eos)
        tokens = {}
        failed = {}
        seconds = {arm: [] for arm in arms}
        for turn in range(3):  # the first is not counted
            for arm, run in arms.items():
                if time.perf_counter() - started > sizes.seconds:
                    failed[arm] = "left out for time"
                if arm in failed:
                    continue

                written = []

                def counted(run=run, written=written):
                    written.append(run())

                try:
                    spent = clock(device, counted)
                except Exception as error:  # of an arm that does not run here
                    first_line = str(error).strip().splitlines()[:1]
                    failed[arm] = f"{type(error).__name__}: {first_line}"[:200]
                    continue
                tokens[arm] = written[0]
                if turn > 0:
                    seconds[arm].append(spent)
        for arm in arms:
            row = {"part": "rollout", "lengths": lengths, "arm": arm, "failed": failed.get(arm)}
            row["tokens"] = tokens.get(arm)
            row["seconds"] = seconds[arm]
            rows.append(row)
    return rows


def arms_of(sizes, device, model, eos):
    """The ways to write, {name: a function that writes and returns the number of tokens}."""
    prompts = prompts_of(sizes)
    ids, mask = left_pad(prompts, 0, device)

    def ours(kind):
        how = dict(n=sizes.n, max_new_tokens=sizes.new_tokens, eos_ids=eos)
        r = write(kind, model, prompts, seeds=list(range(len(prompts))), **how)
        return int(r.is_response.sum())

    def config(**how):
        return GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            num_return_sequences=sizes.n,
            max_new_tokens=sizes.new_tokens,
            pad_token_id=0,
            eos_token_id=eos or None,
            **how,
        )

    def generate(**how):
        out = model.generate(ids, attention_mask=mask.long(), generation_config=config(**how))
        out = out[:, ids.size(1) :]
        if not eos:
            return out.numel()
        ends = torch.isin(out, torch.tensor(eos, device=device)).long()
        before_the_end = ends.cumsum(1) - ends == 0
        return int(before_the_end.sum())

    def generate_batch():
        out = model.generate_batch(prompts, generation_config=config(), progress_bar=False)
        model.set_attn_implementation("sdpa")  # generate_batch leaves its own behind
        return sum(len(x.generated_tokens) for x in out.values())

    static = dict(cache_implementation="static")
    arms = {
        "graphs": lambda: ours("graphs"),
        "launches": lambda: ours("launches"),
        "generate": generate,
        "generate, static": lambda: generate(**static, disable_compile=True),
        "generate, static, compiled": lambda: generate(**static),
        "generate_batch": generate_batch,
    }
    chosen = ("graphs", "launches", *sizes.arms)
    return {arm: run for arm, run in arms.items() if arm in chosen}


def pair_of(sizes, device):
    student = model_of(sizes, device, torch.float32, seed=1)
    teacher = model_of(sizes, device, torch.bfloat16, seed=2).requires_grad_(False)
    V = student.config.vocab_size
    return Pair(
        student=student,
        teacher=teacher,
        tokenizer=None,
        vocab_size=V,
        eos_ids=list(range(0, V, 256)),
        merge_ends=False,
        dtype=torch.bfloat16,
        micro_batch_tokens=activations(student, device, 2),
    )


def bench_step(sizes, device):
    cfg = Config(
        student="-", teacher="-", n=sizes.n, max_new_tokens=sizes.new_tokens, dtype="bfloat16"
    )
    pair = pair_of(sizes, device)
    optimizer = opd.adamw(cfg, pair.student)
    rows = [{"ids": ids, "prompt": "-"} for ids in prompts_of(sizes)]
    names = ("time_rollout", "time_update", "tokens", "sampling_mismatch", "grad_norm")
    steps = []

    def step():
        started = time.perf_counter()
        _, row = opd.update(cfg, pair, optimizer, rows[: sizes.batch], len(steps))
        synchronize(device)
        seconds = time.perf_counter() - started
        steps.append({"seconds": seconds, **{name: row[name] for name in names}})

    step()
    found = max(peak(device, step) for _ in range(2))
    size = {"responses": sizes.batch * sizes.n, "bytes_above_weights": found}
    return [{"part": "step", **size, **row} for row in steps[1:]]


def bench_loss(sizes, device):
    V = sizes.shape["vocab_size"]
    H = sizes.shape["hidden_size"]
    student_head = torch.nn.Linear(H, V, bias=False, device=device)
    teacher_head = torch.nn.Linear(H, V, bias=False, device=device).requires_grad_(False)

    def top_k(log_p, log_q, y):
        return {"loss": loss.top_k(log_p, log_q, 16)}

    def log_p_of(h):
        return student_head(h).float().log_softmax(-1)

    def log_q_of(h):
        return teacher_head(h).float().log_softmax(-1)

    chunk = max(128, LOGITS_OF_A_CHUNK[device.type] // V)  # as Pair.chunk
    rows = []
    for N in sizes.positions:
        h_p = torch.randn(N, H, device=device, requires_grad=True)
        h_q = torch.randn(N, H, device=device)
        y = torch.randint(V, (N,), device=device)
        seconds = []

        def learn(h_p=h_p, h_q=h_q, y=y, seconds=seconds):
            h_p.grad = None
            student_head.weight.grad = None
            started = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16):
                values = loss.in_chunks(top_k, h_p, h_q, log_p_of, log_q_of, y, chunk)
            values["loss"].sum().backward()
            synchronize(device)
            seconds.append(time.perf_counter() - started)

        learn()
        found = peak(device, learn)
        rows.append({"part": "loss", "N": N, "V": V, "bytes": found, "seconds": seconds[-1]})
    return rows


PARTS = {"decode": bench_decode, "step": bench_step, "loss": bench_loss, "rollout": bench_rollout}


# --- the table ----------------------------------------------------------------------------------


def line_of(row):
    """One row of the table."""
    r = SimpleNamespace(**row)
    if r.part == "bandwidth":
        return f"a copy moves {r.bytes_a_second / 1e12:.2f} TB/s; weights {r.weights / 1e9:.2f} GB"
    if r.part == "decode":
        return (
            f"decode  {r.rows:4d} rows: floor {1e3 * r.floor:6.2f} ms a token, "
            f"graphs {1e3 * r.graphs:6.2f} ({r.graphs / r.floor:.1f} x the floor), "
            f"launches {1e3 * r.launches:6.2f} ({r.launches / r.graphs:.1f} x graphs)"
        )
    if r.part == "rollout" and not r.seconds:
        return f"rollout {r.lengths:6} {r.arm:26}: did not run: {r.failed}"
    if r.part == "rollout":
        slowest = r.tokens / max(r.seconds)
        fastest = r.tokens / min(r.seconds)
        return f"rollout {r.lengths:6} {r.arm:26}: {slowest:8.0f} to {fastest:8.0f} tokens/s"
    if r.part == "step":
        return (
            f"step    {r.responses} responses, {r.tokens:.0f} tokens: {r.seconds:.2f} s = "
            f"rollout {r.time_rollout:.2f} + grade and update {r.time_update:.2f};\n"
            f"        {r.bytes_above_weights / 1e9:.1f} GB above weights and AdamW; "
            f"sampled and scored differ by {r.sampling_mismatch:.1e} at most"
        )
    size = f"N {r.N:6d}, V {r.V}"
    return f"loss    {size}: peak {r.bytes / 2**20:7.0f} MiB, {1e3 * r.seconds:.1f} ms"


def report(made):
    versions = f"torch {made['torch']}, transformers {made['transformers']}"
    lines = [f"{made['card']}, {versions}"]
    lines += [line_of(row) for row in made["rows"]]
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default=str(ROOT / "experiments" / "results"))
    parser.add_argument(
        "--quick", action="store_true", help="tiny models: does it run? On a CPU, too: --device cpu"
    )
    flags = parser.parse_args(argv)
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "no GPU here, and nothing was measured; without one: python experiments/bench.py"
        )
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    device = torch.device(flags.device)
    sizes = TINY if flags.quick else FULL
    card = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    out = Path(flags.out) / "gpu"
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    rows = []
    for part in flags.parts:
        print(f"--- {part}", flush=True)
        rows += PARTS[part](sizes, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        made = {**provenance(), "card": card, "seconds": round(time.perf_counter() - started)}
        made["rows"] = rows
        write_json(out.with_suffix(".json"), made)  # what is measured is not lost
    write_text(report(made), made, out)


if __name__ == "__main__":
    main()
