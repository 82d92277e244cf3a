"""experiments/gpu.py: what a token and a step cost on one GPU, at the shape of Qwen2-1.5B, beside the least they could.

A pair of random weights is made from a configuration, so nothing is downloaded. bfloat16; 64 prompts of 64 tokens,
n = 4, 512 new tokens.

    decode   milliseconds a token at 1, 32 and 256 rows, by launches and by CUDA graphs, beside the floor: the bytes of
             weights and cache that a token reads, over the bandwidth that a copy reaches here
    rollout  tokens a second against generate of transformers (its own cache; a static one, by launches and compiled)
             and generate_batch: same model and sampling; responses all alike long, and of uneven length
    step     seconds of opd.update by phase, and its peak of memory: float32 weights of the student, autocast, AdamW
    loss     peak of memory of in_chunks at 152k tokens, as positions grow

    python experiments/bench.py --device cuda       results/gpu.{json,txt}; 6 minutes at most
    bash experiments/gpu.sh                         after the tests marked gpu
"""

import argparse
import time
import warnings
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import transformers
from lab import ROOT, opd, write_text
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

import loss
from plumbing.files import provenance, write_json
from plumbing.models import activations
from plumbing.slots import Captured, Slots
from rollout import left_pad, rollout
from teacher import Pair, split

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


def model(sizes, device, dtype, seed):
    torch.manual_seed(seed)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(
            Qwen2Config(**sizes.shape, eos_token_id=None, bos_token_id=None), dtype=dtype
        )
    return made.eval()


def prompts_of(sizes):
    draw = torch.Generator().manual_seed(0)
    return torch.randint(
        sizes.shape["vocab_size"], (sizes.prompts, sizes.prompt_tokens), generator=draw
    ).tolist()


def bandwidth(device, size=2**28):
    """Bytes a second, read and written, of a copy."""
    x, y = torch.ones(2, size, device=device)
    return (
        2
        * x.numel()
        * x.element_size()
        / median(clock(device, lambda: y.copy_(x)) for _ in range(5))
    )


def bench_decode(sizes, device):
    m = model(sizes, device, torch.bfloat16, 0)
    prompts, speed, rows = (
        prompts_of(sizes),
        bandwidth(device, 2**28 if device.type == "cuda" else 2**20),
        [],
    )
    weights = sum(p.numel() * p.element_size() for p in m.parameters())
    config, (short, long) = m.config, sizes.decoded
    token = (
        2
        * 2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * (config.hidden_size // config.num_attention_heads)
    )
    for b in (1, 32, sizes.prompts * sizes.n):
        row = {
            "part": "decode",
            "rows": b,
            "floor": (weights + b * token * (sizes.prompt_tokens + (short + long) / 2)) / speed,
        }
        for name, decoder in (("launches", Slots), ("graphs", Captured)):

            def write(tokens):
                return clock(
                    device,
                    lambda: rollout(
                        m, (prompts * b)[:b], max_new_tokens=tokens, eos_ids=(), decoder=decoder
                    ),
                )

            write(short)  # kernels are loaded and chosen
            times = [(write(short), write(long)) for _ in range(2)]
            row[name] = median((b - a) / (long - short) for a, b in times)
            row[f"{name}, first tokens"] = (
                median(a for a, _ in times) - short * row[name]
            )  # prompts, captures
        rows.append(row)
    return [{"part": "bandwidth", "bytes_a_second": speed, "weights": weights}] + rows


def bench_rollout(sizes, device):
    m, prompts, rows = model(sizes, device, torch.bfloat16, 0), prompts_of(sizes), []
    V, ids, mask = m.config.vocab_size, *left_pad(prompts_of(sizes), 0, device)
    started = time.perf_counter()
    for kind, eos in (
        ("even", []),
        ("uneven", list(range(0, V, 256))),
    ):  # random weights: each token, 1 in 256

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

        def count(out):
            if not eos:
                return out.numel()
            ends = torch.isin(out, torch.tensor(eos, device=device)).long()
            return int((ends.cumsum(1) == ends).sum())

        def ours(decoder):
            return int(
                rollout(
                    m,
                    prompts,
                    n=sizes.n,
                    max_new_tokens=sizes.new_tokens,
                    eos_ids=eos,
                    decoder=decoder,
                    seeds=list(range(len(prompts))),
                ).is_response.sum()
            )

        def theirs(**how):
            return count(
                m.generate(ids, attention_mask=mask.long(), generation_config=config(**how))[
                    :, ids.size(1) :
                ]
            )

        def batched():
            out = m.generate_batch(prompts, generation_config=config(), progress_bar=False)
            m.set_attn_implementation("sdpa")  # it leaves its own behind
            return sum(len(x.generated_tokens) for x in out.values())

        arms = {
            "graphs": lambda: ours(Captured),
            "launches": lambda: ours(Slots),
            "generate": theirs,
            "generate, static": lambda: theirs(cache_implementation="static", disable_compile=True),
            "generate, static, compiled": lambda: theirs(cache_implementation="static"),
            "generate_batch": batched,
        }
        arms = {arm: f for arm, f in arms.items() if arm in ("graphs", "launches", *sizes.arms)}
        tokens, seconds, said = {}, {arm: [] for arm in arms}, {}
        for turn in range(3):  # the first is not counted
            for arm, write in arms.items():
                if time.perf_counter() - started > sizes.seconds:
                    said[arm] = "left out for time"
                if arm in said:
                    continue
                try:
                    spent = clock(device, lambda: tokens.update({arm: write()}))
                except Exception as error:  # of an arm that does not run here
                    said[arm] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"[
                        :200
                    ]
                    continue
                seconds[arm] += [spent] * (turn > 0)
        rows += [
            {
                "part": "rollout",
                "lengths": kind,
                "arm": arm,
                "failed": said.get(arm),
                "tokens": tokens.get(arm),
                "seconds": seconds[arm],
            }
            for arm in arms
        ]
    return rows


def pair_of(sizes, device):
    student, teacher = (
        model(sizes, device, torch.float32, 1),
        model(sizes, device, torch.bfloat16, 2),
    )
    V = student.config.vocab_size
    return Pair(
        student,
        teacher.requires_grad_(False),
        None,
        dict(
            eos_ids=list(range(0, V, 256)),
            merge_ends=False,
            pad_id=0,
            vocab_size=V,
            decoder=Captured if device.type == "cuda" else Slots,
        ),
        (split(student, V), split(teacher, V)),
        device,
        autocast=lambda: torch.autocast(device.type, torch.bfloat16),
        micro_batch_tokens=activations(student, device, 2),
    )


def bench_step(sizes, device):
    cfg = opd.Config(
        student="-", teacher="-", n=sizes.n, max_new_tokens=sizes.new_tokens, dtype="bfloat16"
    )
    pair = pair_of(sizes, device)
    optimizer, asked = (
        opd.adamw(cfg, pair.student),
        [{"ids": ids, "prompt": "-"} for ids in prompts_of(sizes)],
    )
    steps = []

    def step(number):
        def run():
            made = {}
            seconds = clock(
                device,
                lambda: made.update(
                    opd.update(cfg, pair, optimizer, asked[: sizes.batch], number)[1]
                ),
            )
            steps.append(
                {
                    "seconds": seconds,
                    **{
                        name: made[name]
                        for name in (
                            "time_rollout",
                            "time_update",
                            "tokens",
                            "sampling_mismatch",
                            "grad_norm",
                        )
                    },
                }
            )

        return run

    step(0)()
    found = [peak(device, step(1 + i)) for i in range(2)]
    return [
        {
            "part": "step",
            "responses": sizes.batch * sizes.n,
            "bytes_above_weights": max(found),
            **row,
        }
        for row in steps[1:]
    ]


def bench_loss(sizes, device):
    V, H, rows = sizes.shape["vocab_size"], sizes.shape["hidden_size"], []
    heads = [torch.nn.Linear(H, V, bias=False, device=device) for _ in range(2)]
    heads[1].requires_grad_(False)
    for N in sizes.positions:
        h_p, h_q = (
            torch.randn(N, H, device=device, requires_grad=True),
            torch.randn(N, H, device=device),
        )
        y, seconds = torch.randint(V, (N,), device=device), []

        def learn():
            h_p.grad = heads[0].weight.grad = None
            with torch.autocast(device.type, torch.bfloat16):
                loss.in_chunks(
                    lambda log_p, log_q, y: {"loss": loss.top_k(log_p, log_q, 16)},
                    h_p,
                    h_q,
                    *heads,
                    y,
                    scale=1.0,
                )

        learn()
        found = peak(device, lambda: seconds.append(clock(device, learn)))
        rows.append({"part": "loss", "N": N, "V": V, "bytes": found, "seconds": seconds[0]})
    return rows


def report(made):
    lines = [f"{made['card']}, torch {made['torch']}, transformers {made['transformers']}"]
    for r in made["rows"]:
        if r["part"] == "bandwidth":
            lines.append(
                f"a copy moves {r['bytes_a_second'] / 1e12:.2f} TB/s; weights {r['weights'] / 1e9:.2f} GB"
            )
        elif r["part"] == "decode":
            lines.append(
                f"decode  {r['rows']:4d} rows: floor {1e3 * r['floor']:6.2f} ms a token, graphs "
                f"{1e3 * r['graphs']:6.2f} ({r['graphs'] / r['floor']:.1f} x the floor), launches "
                f"{1e3 * r['launches']:6.2f} ({r['launches'] / r['graphs']:.1f} x graphs)"
            )
        elif r["part"] == "rollout" and r["seconds"]:
            rates = sorted(r["tokens"] / s for s in r["seconds"])
            lines.append(
                f"rollout {r['lengths']:6} {r['arm']:26}: {rates[0]:8.0f} to {rates[-1]:8.0f} tokens/s"
            )
        elif r["part"] == "rollout":
            lines.append(f"rollout {r['lengths']:6} {r['arm']:26}: did not run: {r['failed']}")
        elif r["part"] == "step":
            lines.append(
                f"step    {r['responses']} responses, {r['tokens']:.0f} tokens: {r['seconds']:.2f} s = "
                f"rollout {r['time_rollout']:.2f} + grade and update {r['time_update']:.2f};\n        "
                f"{r['bytes_above_weights'] / 1e9:.1f} GB above weights and AdamW; "
                f"sampled and scored differ by {r['sampling_mismatch']:.1e} at most"
            )
        elif r["part"] == "loss":
            lines.append(
                f"loss    N {r['N']:6d}, V {r['V']}: peak {r['bytes'] / 2**20:7.0f} MiB, "
                f"{1e3 * r['seconds']:.1f} ms"
            )
    return lines


PARTS = {"decode": bench_decode, "step": bench_step, "loss": bench_loss, "rollout": bench_rollout}


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
    device, sizes, rows = torch.device(flags.device), TINY if flags.quick else FULL, []
    started, out = time.perf_counter(), Path(flags.out) / "gpu"
    out.parent.mkdir(parents=True, exist_ok=True)
    for part in flags.parts:
        print(f"--- {part}", flush=True)
        rows += PARTS[part](sizes, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        card = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
        made = {
            **provenance(),
            "card": card,
            "seconds": round(time.perf_counter() - started),
            "rows": rows,
        }
        write_json(out.with_suffix(".json"), made)  # what is measured is not lost
    write_text("\n".join(report(made)), made, out)


if __name__ == "__main__":
    main()
