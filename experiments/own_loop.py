"""experiments/own_loop.py: training that opd.py does not do: the teacher writes, the KL turned
around, no teacher at all. Controls for claims of later papers.

There is one loop, which is opd.update with another loss or another writer. The learning rate, the
batch and the steps are those of the lab.
"""

import torch
from lab import curves
from tqdm import tqdm

from analysis import diagnose
from loss import forward_kl, full_vocab, in_chunks, ratio
from opd import adamw, descend
from plumbing.flags import Config
from plumbing.measure import Means
from plumbing.slots import rollout
from rollout import batch, seed_of
from teacher import log_softmax_of, micro_batches, states

PENALTY = 0.5  # of 2608.31046: the advantage of an unlikely token is -.5
UNLIKELY = 0.2  # the fifth of the drawn tokens that the student found least likely


def train(lab, arm, folder, loss_of, writer="student"):
    """Descend a loss on what the student, or the teacher, writes, and save folder/student.

    loss_of: Rollout -> a function of log_p (N, V), log_q (N, V), y (N,) -> (N,).
    """
    asked = lab.asked(arm)
    pair = lab.load(arm.student, arm.teacher)
    rows = lab.rows(pair, 4096)
    cfg = Config(lr=asked["lr"])
    optimizer = adamw(cfg, pair.student)
    log_p_of = log_softmax_of(pair, pair.student, 1.0)
    log_q_of = log_softmax_of(pair, pair.teacher, 1.0)
    kept = []
    for step in tqdm(range(asked["steps"]), desc=folder.name, mininterval=1, disable=None):
        chosen = batch(len(rows), step, asked["batch_size"], lab.seed)
        with pair.autocast():
            r = rollout(
                getattr(pair, writer),
                [rows[i]["ids"] for i in chosen],
                seeds=[seed_of(lab.seed, "rollout", step, i) for i in range(len(chosen))],
                max_new_tokens=lab.new_tokens,
                in_flight=pair.in_flight,
                **pair.sampling,
            )
        loss_at = loss_of(r)

        def per_position(log_p, log_q, y, loss_at=loss_at):
            return {"loss": loss_at(log_p, log_q, y), **diagnose(log_p, log_q, y, 16)}

        total = r.is_response.sum()
        metrics = Means(lab.new_tokens, pair.device)
        for part in micro_batches(r, pair.micro_batch_tokens):
            with pair.autocast():
                h_p = states(pair.student, part)
                with torch.no_grad():
                    h_q = states(pair.teacher, part)
                values = in_chunks(per_position, h_p, h_q, log_p_of, log_q_of, part.y, pair.chunk)
            (values["loss"].sum() / total).backward()
            metrics.add(values, part)
        grad_norm = descend(optimizer, pair.student)
        kept.append({"step": step + 1, **metrics.means(r), "grad_norm": grad_norm})
    pair.student.save_pretrained(folder / "student")
    pair.tokenizer.save_pretrained(folder / "student")
    return {"curves": curves(kept)}


def train_without_teacher(lab, arm, folder):
    """2608.31046: a policy gradient that only pushes unlikely drawn tokens down."""

    def loss_of(r):
        drawn = r.log_p[r.response_mask]  # (N,) log p of the drawn tokens of the step
        threshold = drawn.quantile(UNLIKELY)

        def loss_at(log_p, log_q, y):
            log_p_y = log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)  # (N,)
            advantage = torch.where(log_p_y.detach() <= threshold, -PENALTY, 0.0)
            return -advantage * ratio(log_p_y)

        return loss_at

    return train(lab, arm, folder, loss_of)


def reverse_by_student(lab, arm, folder):
    return train(lab, arm, folder, lambda r: reverse)


def reverse_by_teacher(lab, arm, folder):
    return train(lab, arm, folder, lambda r: reverse, "teacher")


def forward_by_student(lab, arm, folder):
    return train(lab, arm, folder, lambda r: forward)


def forward_by_teacher(lab, arm, folder):
    return train(lab, arm, folder, lambda r: forward, "teacher")


def reverse(log_p, log_q, y):
    return full_vocab(log_p, log_q)


def forward(log_p, log_q, y):
    return forward_kl(log_p, log_q)
