"""plumbing/measure.py: a step's metrics from the grid of its positions; accuracy and distance on held-out prompts."""

import resource
import sys
import warnings

import torch
import torch.distributed as dist

from analysis import BUCKETS, SHARE, by_position, estimate
from plumbing import show
from plumbing.answers import answered
from plumbing.processes import gathered, over_processes, processes
from recipes import is_degenerate


def means(grid, r, max_new_tokens):
    """{name: (B, T)} of Pair.grade -> {name: mean over all response tokens, of all processes}, and what else a line of
    metrics.jsonl says of them. overlap_token_advantage leaves positions out where the two share no likely token.
    """
    mask, grid = r.response_mask, dict(grid)
    mismatch = torch.where(mask, grid.pop("log_p") - r.log_p, 0).abs().max()
    total = over_processes(mask.sum())
    row = {}
    for name, x in grid.items():
        counts = mask & ~x.isnan() if name == "overlap_token_advantage" else mask
        n = over_processes(counts.sum())
        row[name] = (over_processes(torch.where(counts, x, 0).sum(dtype=torch.float64)) / n).item()
    empty = over_processes((mask & grid["overlap_token_advantage"].isnan()).sum())
    responses = [
        r.response_ids(i)[: None if cut else -1] for i, cut in enumerate(r.truncated)
    ]  # without eos
    counted = torch.tensor(
        [len(responses), int(r.truncated.sum()), sum(map(is_degenerate, responses))],
        dtype=torch.float64,
        device=mask.device,
    )
    number, cut, repeated = over_processes(counted).tolist()
    return {
        **row,
        "response_length": int(total) / number,
        "truncated_fraction": cut / number,
        "repetition_fraction": repeated / number,
        "overlap_empty": int(empty),
        "tokens": int(total),
        "sampling_mismatch": over_processes(mismatch, dist.ReduceOp.MAX).item(),
        "by_position": by_position(grid, mask, -(-max_new_tokens // BUCKETS), over_processes),
    }


def broken(losses, r, rows, n):
    """The names of those of this process's rows at whose tokens the loss (B, T) is not finite, or of all where none is:
    of all processes, as a list.
    """
    bad = (r.response_mask & ~losses.isfinite()).any(1).view(-1, n).any(1).tolist()
    names, all_names = (
        [name for name in gathered(some) if name]
        for some in (
            [row["id"] if is_bad else None for row, is_bad in zip(rows, bad)],
            [row["id"] for row in rows],
        )
    )
    return list(dict.fromkeys(names or all_names))


def accuracy(cfg, pair, rows, model):
    """avg@eval_n of a model on the rows that have answers: -> {"mean", "standard_error", "samples", "truncated",
    "each": right answers to each of the prompts}, None where none has. The same draws for every model.

    The standard error is that of the mean over prompts, from the spread of the prompts' own means: the n answers to one
    prompt are not independent.
    """
    rows = [row for row in rows if row["answer"] is not None]
    if not rows:
        return None
    right, truncated = (
        over_processes(x.int().to(pair.device)).cpu()
        for x in answered(
            pair,
            rows,
            model=model,
            n=cfg.eval_n,
            max_new_tokens=cfg.eval_max_new_tokens or cfg.max_new_tokens,
            temperature=cfg.eval_temperature,
            top_p=cfg.eval_top_p,
            seed=cfg.seed + 1,
            share=processes(),
        )
    )
    return {
        **estimate(right.double().mean(1), SHARE),
        "samples": right.numel(),
        "truncated": truncated.double().mean().item(),
        "each": right.sum(1).tolist(),
    }


def distance(cfg, pair, rows, per_position):
    """The metrics of a step on held-out rows, at states that the student visits now: {name: float}."""
    rows, (rank, world) = rows[:256], processes()
    idle, rows = (
        rank >= len(rows),
        rows + rows[:1] * (world - len(rows)),
    )  # it writes, and counts nothing
    r = pair.write(
        [row["ids"] for row in rows],
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        seed=cfg.seed + 2,
        share=(rank, world),
    )
    r.is_response &= not idle
    with pair.whole():
        grid = pair.grade(
            r,
            per_position,
            temperature=cfg.temperature,
            teacher_temperature=cfg.teacher_temperature,
        )
    found = means(grid, r, cfg.max_new_tokens)
    if said := show.mismatch(found, cfg.dtype):
        warnings.warn(said)
    if found["loss"] != found["loss"] or abs(found["loss"]) == float("inf"):
        raise FloatingPointError(
            f"held-out prompts, loss {found['loss']}: a model's output is not finite; look at the "
            "two checkpoints, or --resume with a lower --lr"
        )
    return found


def peak_memory(device):
    """Bytes at the peak so far: of the allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
