"""opd.py: on-policy distillation (arXiv 2604.13016), the whole loop.

    python opd.py --student DIR_OR_HUB --teacher DIR_OR_HUB

    once:       0  mix in aligned prompts; fine-tune on what the teacher answers         recipes.py
    each step:  1  take the next prompts of an endless shuffled list                     plumbing/processes.py
                2  the student writes n responses to each, y ~ p(.|x)                    rollout.py
                3  both models read them: log p, log q at the states it visited          teacher.py
                4  reverse KL at every token, its mean over the step's tokens, backward  loss.py
                5  Eq. 6-10 from the same softmaxes                                      analysis.py
                6  one AdamW update of the student

Not in the loop: a critic, a baseline, a discount, a KL to a reference, an entropy bonus. The reward is dense and needs
none. The batch of a step and its random numbers depend on (seed, step) alone, so a run that was cut goes on bit for
bit. A step whose loss or gradient is not finite is skipped and reported; the third in a row ends the run.

Its flags, each with the reason for its default: plumbing/flags.py. Its folder, checkpoint and Ctrl-C: plumbing/run.py.
"""

import math
import sys
import time

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import loss
from analysis import diagnose, gap_recovery
from plumbing import files, flags, measure, prompts, show
from plumbing.exits import one_line
from plumbing.processes import (
    batch,
    one_of_several,
    over_processes,
    processes,
    share,
    summed_gradients,
)
from plumbing.run import Run
from recipes import cold_start, teacher_rollouts


def objective(cfg):
    """The loss that --objective names: (log_p (N, V), log_q (N, V), y (N,)) -> (N,)."""
    return {
        "top-k": lambda log_p, log_q, y: loss.top_k(log_p, log_q, cfg.k, cfg.support),
        "top-k-released": lambda log_p, log_q, y: loss.top_k_released(
            log_p, log_q, cfg.k, cfg.support
        ),
        "full": lambda log_p, log_q, y: loss.full_vocab(log_p, log_q),
        "sampled": loss.sampled_token,
    }[cfg.objective]


def per_position(cfg):
    """Loss and diagnostics: (log_p (N, V), log_q (N, V), y (N,)) -> {name: (N,)}."""
    descend = objective(cfg)
    return lambda log_p, log_q, y: {
        "loss": descend(log_p, log_q, y),
        **diagnose(log_p, log_q, y, cfg.k),
    }


def update(cfg, pair, optimizer, asked, step):
    """Steps 2 to 6 for the prompts of a step (of Pair.encode): -> this process's Rollout, {metric: of the step}.

    Of several processes each takes its share of the prompts; sums and gradients are those of all.
    """
    started = time.perf_counter()
    r = pair.write(
        [prompt["ids"] for prompt in asked],
        n=cfg.n,
        max_new_tokens=cfg.max_new_tokens,  # 2  y ~ p(.|x)
        temperature=cfg.temperature,
        share=processes(),
        seed=cfg.seed * 1_000_003 + step + 3,
    )  # seed + 1 and + 2 are those of measure.py
    written = time.perf_counter()
    total = over_processes(r.is_response.sum())  # the mean over all response tokens of the step
    grid = pair.grade(
        r,
        per_position(cfg),
        scale=1 / total,
        temperature=cfg.temperature,  # 3, 4, 5
        teacher_temperature=cfg.teacher_temperature,
    )  # {name: (B, T)}; backward: loss.in_chunks
    norm = clip_grad_norm_(summed_gradients(pair.student), 1.0).item()  # 6
    if math.isfinite(norm):  # a loss that is not finite makes the norm so
        optimizer.step()
    optimizer.zero_grad()
    row = measure.means(grid, r, cfg.max_new_tokens)
    if not math.isfinite(norm):
        row["skipped"] = {
            "why": f"loss {row['loss']}, gradient norm {norm}",
            "prompts": measure.broken(grid["loss"], r, share(asked), cfg.n),
        }
    return r, {
        **row,
        "grad_norm": norm,
        "lr": optimizer.param_groups[0]["lr"],
        "time_rollout": written - started,
        "time_update": time.perf_counter() - written,
    }


def fine_tune(cfg, run, pair, optimizer, asked, held_out):
    """5.1: fine-tune on what the teacher answers, in cold_start.jsonl, before OPD begins with a new optimizer."""
    path, length = cfg.cold_start_file, cfg.cold_start_max_new_tokens or cfg.max_new_tokens
    if not path:
        path = run.out / "cold_start.jsonl"
        run.before["cold_start"] = counts = files.append_answers(
            path,
            lambda start: teacher_rollouts(
                pair,
                asked,
                max_new_tokens=length,
                temperature=cfg.cold_start_temperature,
                top_p=cfg.cold_start_top_p,
                seed=cfg.seed,
                start=start,
            ),
        )
        tqdm.write(
            "cold start: {kept} responses of the teacher; "
            "dropped: {unfinished} unfinished, {degenerate} degenerate".format(**counts)
        )
        if not counts["kept"]:
            raise ValueError(
                f"--cold-start {cfg.cold_start}: the teacher finished no response within {length} tokens "
                "without repeating itself; begin anew with a higher --cold-start-max-new-tokens"
            )
    examples = prompts.load_conversations(path, pair, cfg.thinking)
    steps = cfg.cold_start_steps or -(-len(examples) // cfg.cold_start_batch_size)
    for row in tqdm(
        cold_start(
            pair,
            optimizer,
            examples,
            steps=steps,
            lr=cfg.cold_start_lr,
            seed=cfg.seed,
            batch_size=cfg.cold_start_batch_size,
            start=run.cold_step,
        ),
        total=steps,
        initial=run.cold_step,
        desc="cold start",
        mininterval=1,
        disable=None,
    ):
        run.log_cold_start(row, steps)
    run.before["accuracy_cold_start"] = measure.accuracy(cfg, pair, held_out, pair.student)
    run.before["held_out_cold_start"] = measure.distance(cfg, pair, held_out, per_position(cfg))


def distil(cfg):
    """The whole run, in the folder --out: -> what its result.json holds."""
    with Run(flags.check_run(cfg)) as run:
        asked = prompts.questions(cfg)
        pair = run.load_pair()
        train, cold, held_out = (prompts.encode_for(cfg, pair, rows) for rows in asked)
        optimizer = adamw(cfg, pair.student)
        run.restore(pair, optimizer, train, cold, held_out)
        if not run.before:
            run.before = {
                "accuracy_teacher": measure.accuracy(cfg, pair, held_out, pair.teacher),
                "accuracy_before": measure.accuracy(cfg, pair, held_out, pair.student),
                "held_out_before": measure.distance(cfg, pair, held_out, per_position(cfg)),
            }
            run.save_when_due(0, cfg.steps)
        if (cfg.cold_start or cfg.cold_start_file) and "held_out_cold_start" not in run.before:  # 0
            fine_tune(cfg, run, pair, optimizer, cold, held_out)
            optimizer = run.optimizer = adamw(cfg, pair.student)
            run.save_when_due(0, cfg.steps)
        for step in tqdm(
            range(run.step, cfg.steps),
            initial=run.step,
            total=cfg.steps,
            desc="distil",
            mininterval=1,
            disable=None,
        ):  # no bar where stderr is no terminal
            chosen = [train[i] for i in batch(len(train), step, cfg.batch_size, cfg.seed)]  # 1
            r, row = update(cfg, pair, optimizer, chosen, step)
            if cfg.eval_every and (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.steps:
                measured = measure.accuracy(cfg, pair, held_out, pair.student)
                row["accuracy"] = measured and measured["mean"]
            run.log({"step": step + 1, **row}, r)
        after = measure.accuracy(cfg, pair, held_out, pair.student)
        return run.finish(
            {
                "accuracy_after": after,
                "held_out_after": measure.distance(cfg, pair, held_out, per_position(cfg)),
                "gap_recovery": after
                and gap_recovery(
                    run.before["accuracy_before"], after, run.before["accuracy_teacher"]
                ),
            }
        )


def adamw(cfg, student):
    return torch.optim.AdamW(
        student.parameters(), lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True
    )


def main(argv=None):
    with one_line("opd.py"):
        cfg = flags.parse_opd(sys.argv[1:] if argv is None else argv)
        with one_of_several(cfg.device):
            result = distil(cfg)
        print(show.summary(result))
        print(f"{result['seconds']:.0f} s; {cfg.out}/result.json, {cfg.out}/student")


if __name__ == "__main__":
    main()
