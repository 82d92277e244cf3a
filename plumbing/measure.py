"""plumbing/measure.py: a step's metrics; accuracy and distance on held-out prompts."""

import math
import resource
import sys

import torch
import torch.distributed as dist

from analysis import (
    BUCKETS,
    NO_DISTANCE,
    SHARE,
    estimate,
    mean_of,
    means_by_position,
    sums_by_position,
)
from plumbing import show
from plumbing.answers import answered
from plumbing.exits import RunEnded
from plumbing.processes import is_sharded, over_processes, processes, share, whole
from plumbing.slots import rollout
from recipes import is_degenerate
from rollout import seed_of
from teacher import UserError, micro_batches, read_by_teacher, values_of

MAY_BE_EMPTY = "overlap_token_advantage"  # NaN where the two models share no likely token


class Means:
    """The mean of each metric over all response tokens of a step, added up part by part.

    max_new_tokens: of a response, at most; it decides the buckets of output positions.
    """

    def __init__(self, max_new_tokens, device):
        self.width = math.ceil(max_new_tokens / BUCKETS)  # output positions in a bucket
        self.sums = {}  # {metric: sum over tokens}
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.empty = torch.zeros((), dtype=torch.float64, device=device)
        self.mismatch = torch.zeros((), device=device)
        self.positions = {}  # {metric: (BUCKETS,) sums}

    def add(self, values, part):
        """Add a MicroBatch. values: {metric: (N,)}, "loss" and those of analysis.diagnose."""
        values = {name: x.detach() for name, x in values.items()}
        log_p = values.pop("log_p")  # (N,) as scored
        if len(log_p):
            off = (log_p - part.log_p).abs().max()
            self.mismatch = torch.maximum(self.mismatch, off)
        self.tokens += len(log_p)
        self.empty += values[MAY_BE_EMPTY].isnan().sum()
        for name, x in values.items():
            total = x.double().nansum() if name == MAY_BE_EMPTY else x.double().sum()
            self.sums[name] = self.sums.get(name, 0) + total
        for name, x in sums_by_position(values, part.place, self.width).items():
            self.positions[name] = self.positions.get(name, 0) + x

    def means(self, r):
        """{metric: mean over the response tokens of all processes}, and what else a step logs.

        r: this process's Rollout, for lengths and ends. A mean over no token is NaN. Each metric
        is defined in plumbing/README.md.
        """
        tokens = over_processes(self.tokens)
        empty = over_processes(self.empty)
        row = {}
        for name, x in self.sums.items():
            count = tokens - empty if name == MAY_BE_EMPTY else tokens
            row[name] = (over_processes(x) / count).item()
        row.update(of_responses(r))
        row["overlap_empty"] = int(empty)
        row["tokens"] = int(tokens)
        row["sampling_mismatch"] = over_processes(self.mismatch, dist.ReduceOp.MAX).item()
        positions = {name: over_processes(x) for name, x in self.positions.items()}
        row["by_position"] = means_by_position(positions, self.width)
        return row


def of_responses(r):
    """Length, ends and repetition of the responses of all processes: {metric: float}."""
    lengths = r.response_mask.sum(1)  # (B,)
    written = lengths > 0  # an idle process has a response without a token
    repeated = 0
    for i in written.nonzero().squeeze(-1).tolist():
        response = r.response_ids(i)
        repeated += is_degenerate(response if r.truncated[i] else response[:-1])
    sums = [lengths.sum(), written.sum(), (r.truncated & written).sum()]
    counted = torch.tensor([*map(int, sums), repeated], dtype=torch.float64, device=lengths.device)
    tokens, responses, truncated, repeated = over_processes(counted).tolist()
    return {
        "response_length": tokens / responses,
        "truncated_fraction": truncated / responses,
        "repetition_fraction": repeated / responses,
    }


def accuracies(cfg, pair, rows, model, when):
    """The accuracy of a model as the paper measures it, and greedily; prints both.

    when: one of show.MEASURED. -> {"accuracy_<when>": ..., "greedy_<when>": ...}, None without
    answers.
    """
    sampled = accuracy(cfg, pair, rows, model)
    greedy = greedy_accuracy(cfg, pair, rows, model)
    if sampled:
        show.say(show.accuracy_line(when, sampled, greedy))
    return {f"accuracy_{when}": sampled, f"greedy_{when}": greedy}


def accuracy(cfg, pair, rows, model):
    """How often a model is right if it samples --eval-n answers to each row: see share_right."""
    return share_right(
        cfg,
        pair,
        rows,
        model,
        n=cfg.eval_n,
        temperature=cfg.eval_temperature,
        top_p=cfg.eval_top_p,
    )


def greedy_accuracy(cfg, pair, rows, model):
    """How often a model is right if it takes the likeliest token each time: see share_right."""
    return share_right(cfg, pair, rows, model, n=1, temperature=0.0)


def share_right(cfg, pair, rows, model, *, n, **how):
    """How often a model of the pair is right on the rows that have answers, asked n times each.

    -> what `counted` returns, or None if no row has an answer. If the rows come from several
    files, "files" has the same for each of them, in order, and mean and standard error are those
    of the mean of the files. Every model gets the same random numbers. how: temperature, top_p.
    """
    rows = [row for row in rows if row["answer"] is not None]
    if not rows:
        return None
    right, truncated = answered(
        pair,
        rows,
        model=model,
        n=n,
        max_new_tokens=cfg.eval_max_new_tokens or cfg.max_new_tokens,
        seed=cfg.seed,
        share=processes(),
        checker=cfg.checker,
        **how,
    )
    right = over_processes(right.int().to(pair.device)).cpu()  # (rows, n)
    truncated = over_processes(truncated.int().to(pair.device)).cpu()
    found = counted(right, truncated)
    files = list(dict.fromkeys(row.get("file") for row in rows))
    if len(files) > 1:
        found["files"] = []
        for file in files:
            is_of_file = torch.tensor([row["file"] == file for row in rows])
            of_file = counted(right[is_of_file], truncated[is_of_file])
            found["files"].append({"file": file, **of_file})
        found.update(mean_of(found["files"]))
    return found


def counted(right, truncated):
    """An accuracy: which answers are right, and which truncated, (rows, n) bool each -> dict.

    "mean" is the share of right answers. "standard_error" is that of a mean over prompts, since
    the answers to one prompt are not independent. "samples" is the number of answers, "truncated"
    the share that was cut off, "each" the number of right answers to each row.
    """
    return {
        **estimate(right.double().mean(1), SHARE),
        "samples": right.numel(),
        "truncated": truncated.double().mean().item(),
        "each": right.sum(1).tolist(),
    }


@torch.no_grad()
def distance(cfg, pair, rows, per_position):
    """The metrics of a step, on the first 256 held-out rows: {name: value}, see Means.means.

    The student writes one response to each, at --temperature. RunEnded if the loss is not finite.
    """
    rows = rows[:256]
    seeds = [seed_of(cfg.seed, "distance", i) for i in range(len(rows))]
    idle = not share(rows)
    mine = share(rows) or rows[:1]  # an idle process writes, too, and counts nothing
    with pair.autocast(), whole(pair.student, pair.teacher):
        r = rollout(
            pair.student,
            [row["ids"] for row in mine],
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            seeds=share(seeds) or seeds[:1],
            in_flight=pair.in_flight,
            **pair.sampling,
        )
        if idle:
            r.is_response[:] = False
        metrics = Means(cfg.max_new_tokens, pair.device)
        teacher_reads = read_by_teacher(r, mine, pair.pad_id)
        for part in micro_batches(r, pair.micro_batch_tokens, teacher_reads):
            values = values_of(
                pair,
                part,
                per_position,
                temperature=cfg.temperature,
                teacher_temperature=cfg.teacher_temperature,
            )
            metrics.add(values, part)
    found = metrics.means(r)
    if not math.isfinite(found["loss"]):
        raise RunEnded(
            f"held-out prompts, loss {found['loss']}: a model's output is not finite; look at the "
            "two checkpoints, or --resume with a lower --lr"
        )
    return found


def check_on_policy(metrics, dtype):
    """UserError if log-probabilities as sampled and as scored differ by more than rounding does."""
    mismatch = show.mismatch(metrics, dtype)
    if mismatch:
        raise UserError(mismatch)


def check_teaches(cfg, pair, rows, metrics):
    """UserError if OPD begins where student and teacher agree at every state.

    Then the gradient (Eq. 4) is rounding, which AdamW would scale up to full updates. In bfloat16
    rounding alone makes a distance, so the weights are compared, too. rows: the prompts.
    """
    if cfg.cold_start or cfg.cold_start_file:
        return  # the student is moved first
    reads_more = any("teacher_prompt" in row for row in rows)
    grades_as_it_writes = cfg.teacher_temperature == cfg.temperature
    is_copy = not reads_more and grades_as_it_writes and same_weights(pair)
    if is_copy or metrics["reverse_kl"] < NO_DISTANCE:
        raise UserError(
            "student and teacher agree at every state: there is nothing to learn; take another "
            'teacher, or give it more to read in "teacher_prompt"'
        )


def same_weights(pair):
    """Are the teacher's weights the student's, but for their dtype? -> bool."""
    of_student = dict(pair.student.named_parameters())
    of_teacher = dict(pair.teacher.named_parameters())
    same = of_student.keys() == of_teacher.keys()
    same = same and all(is_same_weight(p, of_teacher[name]) for name, p in of_student.items())
    everywhere = torch.tensor(int(same), device=pair.device)
    return bool(over_processes(everywhere, dist.ReduceOp.MIN))


def is_same_weight(p, q):
    """Is q the weight p, but for its dtype? Of sharded ones, the part of this process: -> bool."""
    p = p.to_local() if is_sharded(p) else p
    q = q.to_local() if is_sharded(q) else q
    return p.shape == q.shape and torch.equal(p.to(q.dtype), q)


def peak_memory(device):
    """The peak of memory so far, bytes: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
