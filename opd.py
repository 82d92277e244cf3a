"""opd.py: on-policy distillation (arXiv 2604.13016), the whole loop.

    python opd.py --student DIR_OR_HUB --teacher DIR_OR_HUB

    once:       0  fine-tune on the teacher's answers, if --cold-start asks for it      recipes.py
    each step:  1  take the next prompts of an endless shuffled list                    rollout.py
                2  the student writes n responses to each, y ~ pi_student(.|x)          rollout.py *
                3  both models read them: states, log p, log q                          teacher.py
                4  the loss at every token, a chunk of logits at a time                 loss.py
                   and Eq. 6 to 10 from the same softmaxes                              analysis.py
                5  its mean over the response tokens of the step, backward
                6  clip the gradient, one AdamW update of the student

    * the commands use its faster twin, plumbing/slots.py

`update` is a step, `distil` is a run.

As in the paper there is no critic, no baseline, no discount, no KL to a reference and no entropy
bonus. The prompts of a step and its random numbers follow from (seed, step) alone. So on a CPU a
run that was cut goes on bit for bit. A step whose gradient is not finite leaves the student as it
is and is counted. The third in a row ends the run.

The flags, each with the reason for its default: plumbing/flags.py. The folder of a run, its
checkpoint and Ctrl-C: plumbing/run.py.
"""

import math
import sys
import time
from functools import partial

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from analysis import diagnose, gap_recovery
from loss import full_vocab, in_chunks, sampled_token, top_k, top_k_released
from plumbing import files, flags, measure, prompts, show
from plumbing.exits import one_line
from plumbing.processes import (
    equal_micro_batches,
    one_of_several,
    over_processes,
    processes,
    share,
    sum_gradients,
    whole,
)
from plumbing.run import Run
from plumbing.slots import rollout  # rollout.rollout, faster
from recipes import cold_start, teacher_rollouts
from rollout import batch, seed_of
from teacher import UserError, log_softmax_of, read_by_teacher, states


def objective(cfg, log_p, log_q, y):
    """The loss that --objective names: log_p (N, V), log_q (N, V), y (N,) ids -> (N,), nats.

    ValueError for another objective, or as the losses of loss.py raise it.
    """
    if cfg.objective == "top-k":
        return top_k(log_p, log_q, cfg.k, cfg.support)  # Eq. 5
    if cfg.objective == "full":
        return full_vocab(log_p, log_q)  # Eq. 4
    if cfg.objective == "sampled":
        return sampled_token(log_p, log_q, y)  # Eq. 3
    if cfg.objective == "top-k-released":
        return top_k_released(log_p, log_q, cfg.k, cfg.support)
    raise ValueError(f"objective={cfg.objective!r} has no loss")


def loss_and_metrics(cfg, ends):
    """What a step evaluates at each state: a function of log_p (N, V), log_q (N, V), y (N,).

    It returns {name: (N,)}: "loss", and Eq. 6 to 10 from `diagnose`. ends: ids of the end tokens.
    """

    def per_position(log_p, log_q, y):
        values = {"loss": objective(cfg, log_p, log_q, y)}
        values.update(diagnose(log_p, log_q, y, cfg.k, ends))  # Eq. 6 to 10
        return values

    return per_position


def update(cfg, pair, optimizer, rows, step):
    """One step of on-policy distillation on some prompts: -> Rollout, {metric: value}.

    rows: the step's prompts, each with its token ids, {"ids": ..., ...}. step: counted from 0.
    Each of several processes takes its share of the rows, and returns the Rollout of that share.
    Gradient and metrics are means over the response tokens of all processes. If the gradient is
    not finite, there is no update, and the metrics have the reason as "skipped".
    """
    started = time.perf_counter()
    seeds = [seed_of(cfg.seed, "rollout", step, i) for i in range(len(rows))]
    with pair.autocast(), whole(pair.student):  # whole: if its weights are sharded, gather them
        r = rollout(  # y ~ pi_student(.|x)
            pair.student,
            [row["ids"] for row in share(rows)],
            n=cfg.n,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            seeds=share(seeds),
            in_flight=pair.in_flight,
            **pair.sampling,  # what ends a response, and if all ends count as one: merge_ends
        )
    written = time.perf_counter()

    total = over_processes(r.is_response.sum())  # one denominator for all parts and processes
    per_position = loss_and_metrics(cfg, pair.eos_ids)
    # from hidden states to log-probabilities: head, temperature, merged ends
    log_p_of = log_softmax_of(pair, pair.student, cfg.temperature)
    log_q_of = log_softmax_of(pair, pair.teacher, cfg.teacher_temperature)
    metrics = measure.Means(cfg.max_new_tokens, pair.device)
    # r itself, unless some prompt has a "teacher_prompt"
    teacher_reads = read_by_teacher(r, share(rows), pair.pad_id)
    for part in equal_micro_batches(r, pair.micro_batch_tokens, teacher_reads):
        with pair.autocast():
            h_p = states(pair.student, part)  # (N, H) before each response token
            with torch.no_grad():
                h_q = states(pair.teacher, part.for_teacher)  # (N, H')
            # {name: (N,)}: "loss", Eq. 5 by default (see objective), and Eq. 6 to 10
            values = in_chunks(per_position, h_p, h_q, log_p_of, log_q_of, part.y, pair.chunk)
        loss = values["loss"].sum() / total  # this part's share of the mean over the step
        loss.backward()
        metrics.add(values, part)
    grad_norm = descend(optimizer, pair.student)  # clip, and update if the gradient is finite

    row = metrics.means(r)
    row["grad_norm"] = grad_norm
    row["lr"] = optimizer.param_groups[0]["lr"]
    row["time_rollout"] = written - started
    row["time_update"] = time.perf_counter() - written
    if not math.isfinite(grad_norm):
        row["skipped"] = f"loss {row['loss']}, gradient norm {grad_norm}"
    return r, row


def descend(optimizer, student):
    """Add up the gradients of all processes, clip their norm to 1, take one AdamW step.

    -> the norm before clipping. If it is not finite, no step is taken.
    """
    sum_gradients(student)
    norm = clip_grad_norm_(student.parameters(), max_norm=1.0).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def adamw(cfg, student):
    """The student's optimizer: the settings of the authors' code, but for the learning rate."""
    return torch.optim.AdamW(
        student.parameters(), lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True
    )


def fine_tune(cfg, run, pair, optimizer, rows):
    """Paper 5.1: fine-tune the student on the teacher's answers to rows, or on --cold-start-file.

    rows: the prompts of the cold start, with their token ids. The answers and a line of metrics
    per update go into the folder of the run. UserError if there is no answer to learn from.
    """
    path = cfg.cold_start_file
    if not path:
        path = run.out / "cold_start.jsonl"
        run.before["cold_start"] = ask_teacher(cfg, run, pair, rows, path)
    examples = prompts.load_conversations(path, pair, cfg.thinking)
    steps = cfg.cold_start_steps or math.ceil(len(examples) / cfg.batch_size)
    updates = cold_start(
        pair,
        optimizer,
        examples,
        steps=steps,
        lr=cfg.cold_start_lr,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        start=run.cold_step,
        share=processes(),
        descend=descend,
        micro_batches=equal_micro_batches,
    )
    for row in progress(updates, "cold start", run.cold_step, steps):
        row["loss"] = over_processes(row["loss"]).item()
        run.log_cold_start(row, steps)


def ask_teacher(cfg, run, pair, rows, path):
    """Add the teacher's answers to the file `path`, from the first row that it lacks.

    -> {"kept", "unfinished", "degenerate": how many}. UserError if none is kept. After a signal the
    batch of answers that is being written is the last.
    """
    length = cfg.cold_start_max_new_tokens or cfg.max_new_tokens

    def answers_from(start):
        batches = teacher_rollouts(
            pair,
            rows,
            max_new_tokens=length,
            temperature=cfg.cold_start_temperature,
            top_p=cfg.cold_start_top_p,
            seed=cfg.seed,
            start=start,
            share=processes(),
            rollout=partial(rollout, in_flight=pair.in_flight),
        )
        for answers in batches:
            yield answers
            run.stop_if_asked()

    with whole(pair.teacher):
        counts = files.append_answers(path, answers_from)
    show.say(
        f"cold start: {show.counted(counts['kept'], 'response')} of the teacher; dropped: "
        f"{counts['unfinished']} unfinished, {counts['degenerate']} degenerate"
    )
    if not counts["kept"]:
        raise UserError(
            f"--cold-start {cfg.cold_start}: the teacher finished no response within {length} "
            "tokens without repeating itself; begin anew with a higher --cold-start-max-new-tokens"
        )
    return counts


def student_now(cfg, pair, exam, held_out, when):
    """Measure the student on the held-out prompts, as plumbing/measure.py does.

    -> {"accuracy_<when>", "greedy_<when>", "held_out_<when>"}. exam: the prompts in the template
    of --eval-template; held_out: in that of training.
    """
    found = measure.accuracies(cfg, pair, exam, pair.student, when)
    per_position = loss_and_metrics(cfg, pair.eos_ids)
    found[f"held_out_{when}"] = measure.distance(cfg, pair, held_out, per_position)
    return found


def distil(cfg):
    """A whole run, in the folder --out: Config -> what its result.json holds, a dict.

    Raises UserError if it cannot work as asked, RunEnded if it cannot go on, and Stopped after a
    signal (plumbing/exits.py).
    """
    with Run(flags.check_run(cfg)) as run:
        texts, cold_texts, held_out_texts = prompts.questions(cfg)
        pair = run.load_pair()
        train = prompts.encode_for(cfg, pair, texts)
        cold = prompts.encode_for(cfg, pair, cold_texts)
        held_out = prompts.encode_for(cfg, pair, held_out_texts)
        exam = prompts.encode_for(cfg, pair, prompts.for_accuracy(cfg, held_out_texts))
        optimizer = adamw(cfg, pair.student)
        run.restore(pair, optimizer, train, cold, held_out)

        if not run.before:
            found = measure.accuracies(cfg, pair, exam, pair.teacher, "teacher")
            found.update(student_now(cfg, pair, exam, held_out, "before"))
            measure.check_on_policy(found["held_out_before"], cfg.dtype)
            measure.check_teaches(cfg, pair, train, found["held_out_before"])
            run.before.update(found)
            run.save_when_due(0, cfg.steps)

        wants_cold_start = cfg.cold_start or cfg.cold_start_file
        if wants_cold_start and "held_out_cold_start" not in run.before:
            fine_tune(cfg, run, pair, optimizer, cold)
            run.before.update(student_now(cfg, pair, exam, held_out, "cold_start"))
            optimizer = adamw(cfg, pair.student)  # without the cold start's running means
            run.optimizer = optimizer
            run.save_when_due(0, cfg.steps)

        for step in progress(range(run.step, cfg.steps), "distil", run.step, cfg.steps):
            chosen = batch(len(train), step, cfg.batch_size, cfg.seed)
            r, row = update(cfg, pair, optimizer, [train[i] for i in chosen], step)
            if cfg.eval_every and (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.steps:
                accuracy = measure.accuracy(cfg, pair, exam, pair.student)
                row["accuracy"] = accuracy and accuracy["mean"]
                if accuracy and "files" in accuracy:
                    row["accuracy_of_files"] = [found["mean"] for found in accuracy["files"]]
            run.log({"step": step + 1, **row}, r)

        result = student_now(cfg, pair, exam, held_out, "after")
        before = run.before["accuracy_before"]
        after = result["accuracy_after"]
        teacher = run.before["accuracy_teacher"]
        result["gap_recovery"] = after and gap_recovery(before, after, teacher)
        result["eval_temperature"] = cfg.eval_temperature
        result["eval_top_p"] = cfg.eval_top_p
        return run.finish(result)


def progress(steps, name, done, total):
    """A progress bar over the steps of a run, if stderr is a terminal."""
    return tqdm(steps, desc=name, initial=done, total=total, mininterval=1, disable=None)


def main(argv=None):
    """The command: parse the flags, run, print the outcome."""
    with one_line("opd.py"):
        cfg = flags.parse_opd(sys.argv[1:] if argv is None else argv)
        with one_of_several(cfg.device):
            result = distil(cfg)
        print(show.summary(result))
        print(f"{result['seconds']:.0f} s; {cfg.out}/result.json, {cfg.out}/student")


if __name__ == "__main__":
    main()
