"""Several processes are one run: they write, learn and measure as one process does.

torchrun starts this file, too: `main` at its end runs a part of the tests in each process.
"""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import Killed, config, ready, rows, tiny_pair, weights
from torch.nn.utils import clip_grad_norm_

import opd
import recipes
from plumbing import flags, measure
from plumbing.exits import one_line
from plumbing.processes import (
    equal_micro_batches,
    gathered,
    is_sharded,
    one_of_several,
    over_processes,
    processes,
    share,
    sum_gradients,
    whole,
)
from plumbing.run import Run
from teacher import UserError

EXAMPLES = [([4, 6], [7, 2]), ([4], [8, 9, 10, 2]), ([5, 5, 5], [2])]  # prompt ids, response ids
COLD = {
    "cold_start": 4,
    "cold_start_steps": 2,
    "cold_start_max_new_tokens": 40,
    "cold_start_temperature": 1.0,
}


def start(*arguments):
    """Run a program in two processes: -> the finished run, with output and exit code."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node", "2", "--"]  # without -- it takes --n for its own
    folder = str(Path(opd.__file__).parent)
    return subprocess.run(
        torchrun + [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": folder},
    )


def words(cfg):
    """A Config as words of the command line."""
    found = []
    for name, x in vars(cfg).items():
        if x not in (False, "") and x != getattr(flags.Config, name):
            found += [flags.named(name)] if x is True else [flags.named(name), str(x)]
    return found


# --- the same gradients and numbers ---------------------------------------------------------------


def full_gradients(student):
    """The gradients of all processes, summed, and unsharded: list of tensors."""
    sum_gradients(student)
    found = []
    for p in student.parameters():
        grad = p.grad.full_tensor() if is_sharded(p) else p.grad
        found.append(grad.clone())
    return found


def gradients(cfg):
    """Gradients and metrics of an update, of the cold start, and on held-out prompts: a dict."""
    pair, train, held_out = ready(cfg)
    optimizer = opd.adamw(cfg, pair.student)
    found = {"items": gathered(share(list(range(5))))}
    teacher = list(pair.teacher.parameters())
    mine = sum(p.to_local().numel() if is_sharded(p) else p.numel() for p in teacher)
    found["share of the teacher"] = mine / sum(p.numel() for p in teacher)

    def descend(optimizer, student):
        found["gradients"] = full_gradients(student)
        norm = clip_grad_norm_(student.parameters(), 1.0).item()
        student.zero_grad()
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd, "descend", descend)
        r, found["row"] = opd.update(cfg, pair, optimizer, train[:3], 0)
    found["tokens"] = [r.response_ids(row) for row in range(len(r.ids))]
    found["of an update"] = found["gradients"]
    found["held out"] = measure.distance(
        cfg, pair, held_out[:1], opd.loss_and_metrics(cfg, pair.eos_ids)
    )
    found["accuracy"] = measure.accuracy(cfg, pair, held_out, pair.student)
    how = {"share": processes(), "descend": descend, "micro_batches": equal_micro_batches}
    cold = recipes.cold_start(pair, optimizer, EXAMPLES, steps=4, batch_size=3, **how)
    found["cold start"] = next(cold)
    found["cold start"]["loss"] = over_processes(found["cold start"]["loss"]).item()
    return found


def numbers(row):
    """The means in a row of metrics."""
    kept = {}
    for name, x in row.items():
        if isinstance(x, (int, float)) and not name.startswith(("time_", "sampling_", "peak_")):
            kept[name] = x
    return kept


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, shard",
    [
        ({"objective": "full", "teacher_template": "so {question} ="}, False),
        ({"gradient_checkpointing": True, "teacher": "gemma3"}, False),
        ({"gradient_checkpointing": True, "student": "gemma3"}, True),
        (
            {"objective": "sampled", "teacher": "gemma3", "teacher_template": "so {question} ="},
            True,
        ),
    ],
)
def test_two_processes_have_the_gradients_and_metrics_of_one(world, tmp_path, change, shard):
    """trl#4105, easydistill#16: there is one denominator for all, though each process has other
    micro-batches. With one held-out prompt a process is idle, and counts nothing. Sharded models
    have the same gradients, and so has a teacher with a prompt of its own.
    """
    change = dict(change)
    for name in ("student", "teacher"):
        if name in change:
            change[name] = f"{world}/{change[name]}"
    how = {"micro_batch_tokens": 9, **change}
    done = start(
        __file__, "gradients", tmp_path, *words(config(world, tmp_path, **how, shard=shard))
    )
    assert done.returncode == 0, done.stderr
    one = gradients(config(world, tmp_path, **how))
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert both[0]["tokens"] == one["tokens"][:2] + one["tokens"][4:]
    assert both[1]["tokens"] == one["tokens"][2:4]
    for two in both:
        for name in ("of an update", "gradients"):  # the second: of the cold start
            for a, b in zip(two[name], one[name], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for name in ("row", "held out", "cold start"):
            expected = pytest.approx(numbers(one[name]), rel=1e-5, abs=1e-6)
            assert numbers(two[name]) == expected, name
        assert two["row"]["by_position"]["tokens"] == one["row"]["by_position"]["tokens"]
        assert two["accuracy"] == one["accuracy"]
        assert two["items"] == [0, 1, 2, 3, 4]
        assert two["share of the teacher"] == pytest.approx(0.5 if shard else 1, abs=0.1)


# --- a whole run ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_that_dies_or_is_stopped_ends_all_and_the_checkpoint_goes_on(world, tmp_path):
    """A process that is killed in step 4 ends all of them in seconds, with a message. One that is
    told to stop in step 4 stops all of them after it. --resume then ends as a run of one process,
    sharded or not. Only the first process writes.
    """
    two = tmp_path / "two"
    cfg = words(config(world, two, steps=5, **COLD))
    died = start(__file__, "dies", tmp_path, *cfg, "--shard")
    assert died.returncode and "another process has ended" in died.stderr
    assert [row["step"] for row in rows(two)] == [1, 2, 3]
    assert not (two / "result.json").exists()
    stopped = start(__file__, "stops", tmp_path, *cfg, "--resume")
    assert "stopped after step 4 of 5; the checkpoint of step 4 is whole" in stopped.stderr
    assert re.findall(r"exitcode +: (-?\d+)", stopped.stderr) == ["143", "143"]
    done = start(opd.__file__, *cfg, "--resume", "--shard")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gap recovery") == 1  # one of them talks
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)  # nobody wrote a file over it

    one = tmp_path / "one"
    opd.distil(config(world, one, steps=5, **COLD))
    assert [row["step"] for row in rows(two)] == [1, 2, 3, 4, 5]
    for name in ("tokens", "reverse_kl", "overlap_ratio", "response_length", "grad_norm"):
        expected = [row[name] for row in rows(one)]
        assert [row[name] for row in rows(two)] == pytest.approx(expected, rel=1e-4), name
    assert (two / "cold_start.jsonl").read_text() == (one / "cold_start.jsonl").read_text()
    theirs = weights(one)
    for name, x in weights(two).items():
        torch.testing.assert_close(x, theirs[name], rtol=0, atol=1e-4)
    assert json.loads((two / "result.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_as_one_and_the_other_way_round(world, tmp_path):
    """The checkpoint does not depend on how many processes wrote it."""
    out = tmp_path / "run"
    assert start(opd.__file__, *words(config(world, out, steps=2))).returncode == 0
    opd.distil(config(world, out, steps=3, resume=True))
    cfg = config(world, out, steps=4, resume=True, shard=True)
    assert start(opd.__file__, *words(cfg)).returncode == 0
    opd.distil(config(world, out, steps=5, resume=True))
    opd.distil(config(world, tmp_path / "one", steps=5))
    expected = [row["loss"] for row in rows(tmp_path / "one")]
    assert [row["loss"] for row in rows(out)] == pytest.approx(expected, rel=1e-4)


def test_what_processes_and_flags_say_together(world, tmp_path, monkeypatch):
    """Each process needs a prompt: without one it has no gradient to give, and all wait for it."""
    with (
        pytest.raises(UserError, match="--shard .*torchrun"),
        Run(config(world, tmp_path, shard=1)),
    ):
        pass
    monkeypatch.setattr("plumbing.run.processes", lambda: (0, 8))
    with pytest.raises(UserError, match="--batch-size 3: .*8 processes"):
        Run(config(world, tmp_path)).__enter__()


def test_layer_norm_is_not_sharded_in_bfloat16_on_a_cpu(tmp_path):
    """There it takes weights and values of one dtype only, and autocast does not cast them."""
    from plumbing.shard import shard_pair

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        pair = tiny_pair("gpt2", dtype=torch.bfloat16)
        with pytest.raises(UserError, match="GPT2LMHeadModel: on a CPU .* take --dtype float32"):
            shard_pair(pair, pair.device)
    finally:
        dist.destroy_process_group()


# --- one process that is sharded ------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """A Pair whose models are cut over one process, and an optimizer."""
    from plumbing.shard import shard_pair

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    pair = tiny_pair()
    shard_pair(pair, pair.device)
    yield pair, torch.optim.AdamW(pair.student.parameters(), lr=0.1)
    dist.destroy_process_group()


def test_an_exception_leaves_the_weights_cut(sharded):
    """A student that stayed gathered would fill the memory."""
    pair, _ = sharded
    models = (pair.student, pair.teacher)
    with pytest.raises(Killed), whole(*models):
        assert not any(is_sharded(p) for model in models for p in model.parameters())
        raise Killed
    assert all(is_sharded(p) for model in models for p in model.parameters())


def test_the_state_of_sharded_models_is_that_of_whole_ones(sharded):
    """A state may be written by one kind and read by the other, moments included. Asking for the
    state of an optimizer before its first step counts no step.
    """
    from plumbing.shard import full_state, load_full_state

    pair, optimizer = sharded
    fresh = tiny_pair().student
    weights, moments = full_state(pair.student, optimizer)
    assert not optimizer.state and not moments["state"]
    fresh.load_state_dict(weights)

    ids = torch.arange(8).unsqueeze(0)
    its_optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.1)
    for model, its in ((pair.student, optimizer), (fresh, its_optimizer)):
        model(input_ids=ids).logits.square().mean().backward()
        its.step()
        its.zero_grad()
    load_full_state(pair.student, optimizer, fresh.state_dict(), its_optimizer.state_dict())
    weights, moments = full_state(pair.student, optimizer)
    for name, x in fresh.state_dict().items():
        torch.testing.assert_close(weights[name], x, rtol=0, atol=0)
    expected = its_optimizer.state_dict()
    torch.testing.assert_close(moments["state"], expected["state"], rtol=0, atol=0)
    for name in ("params", "lr", "weight_decay"):
        assert moments["param_groups"][0][name] == expected["param_groups"][0][name]


# --- what torchrun starts -------------------------------------------------------------------------


def main(what, folder, *words):
    cfg = flags.parse_opd(list(words))
    with one_line("opd.py"), one_of_several(cfg.device):
        if what == "gradients":
            torch.save(gradients(cfg), f"{folder}/{dist.get_rank()}.pt")
            return
        signum = {"dies": signal.SIGKILL, "stops": signal.SIGTERM}[what]
        plain_update = opd.update
        plain_exit = Run.__exit__

        def update(cfg, pair, optimizer, rows, step):
            if step == 3 and dist.get_rank() == 1:
                os.kill(os.getpid(), signum)
            return plain_update(cfg, pair, optimizer, rows, step)

        def slowly(run, *error):  # torchrun's SIGTERM to the others comes before their line
            plain_exit(run, *error)
            time.sleep(2)

        opd.update = update
        Run.__exit__ = slowly
        opd.distil(cfg)


if __name__ == "__main__":
    main(*sys.argv[1:])
