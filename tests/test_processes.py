"""Several processes are one run: what torchrun starts writes, learns and measures as a single process does.

This file is also what torchrun starts: `main` at its end runs one part of the tests in each process.
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
from test_opd import config, ready, rows, weights  # noqa: F401: a fixture

import opd
import recipes
from plumbing import exits, flags, measure
from plumbing.processes import one_of_several, over_processes, processes, summed_gradients
from plumbing.run import Run

EXAMPLES = [([4, 6], [7, 2]), ([4], [8, 9, 10, 2]), ([5, 5, 5], [2])]  # prompt ids, response ids


def start(*arguments, timeout=120):
    """Two processes: -> what came out of them, with their exit code. Without -- torchrun takes --n for its own."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--",
    ]
    return subprocess.run(
        [*torchrun, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(opd.__file__).parent)},
    )


def words(cfg):
    """A Config as words of the command line."""
    named = {
        name: x
        for name, x in vars(cfg).items()
        if x not in (False, "") and x != getattr(opd.Config, name)
    }
    return [
        word
        for name, x in named.items()
        for word in ["--" + name.replace("_", "-")] + ([] if x is True else [str(x)])
    ]


def whole(p):
    """The gradient of a parameter, of a sharded one put together."""
    return (p.grad.full_tensor() if hasattr(p, "full_tensor") else p.grad).clone()


def gradients(cfg):
    """Gradients and metrics of one update without its step, and of one of the cold start; held-out metrics."""
    (cfg, pair, train, held_out), out = ready(cfg), {}
    asked, steps = [row["ids"] for row in train[:3]], []
    r = pair.write(asked, n=2, max_new_tokens=cfg.max_new_tokens, seed=0, share=processes())
    out["tokens"] = [r.response_ids(row) for row in range(len(r.ids))]
    total = over_processes(r.is_response.sum())
    grid = pair.grade(r, opd.per_position(cfg), scale=1 / total)
    out["gradients"] = [whole(p) for p in summed_gradients(pair.student)]
    out["norm"] = torch.nn.utils.clip_grad_norm_(pair.student.parameters(), 1.0).item()
    out["measured"] = measure.means(grid, r, cfg.max_new_tokens)
    pair.student.zero_grad()
    out["held"] = measure.distance(cfg, pair, held_out[:1], opd.per_position(cfg))[
        "reverse_kl"
    ]  # less than one each
    out["accuracy"] = measure.accuracy(cfg, pair, held_out, pair.student)
    optimizer = opd.adamw(cfg, pair.student)
    optimizer.step = lambda: steps.append([whole(p) for p in pair.student.parameters()])
    out["cold_start"] = next(recipes.cold_start(pair, optimizer, EXAMPLES, steps=4, batch_size=3))
    return {**out, "cold": steps[0]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, shard",
    [
        (dict(objective="full"), False),
        (dict(gradient_checkpointing=True, teacher="gemma3"), False),
        (dict(gradient_checkpointing=True, student="gemma3"), True),
    ],
)
def test_two_processes_have_the_gradients_and_metrics_of_one(world, tmp_path, change, shard):  # noqa: F811
    """trl#4105, easydistill#16 over processes: one denominator for all, whatever each of them got: five or six
    micro-batches of unlike sizes here; in the evaluation one process has nothing to do. The same of a student that is
    sharded, the gradients put together again.
    """
    change = {
        name: f"{world}/{x}" if name in ("student", "teacher") else x for name, x in change.items()
    }
    cfg = config(world, tmp_path / "two", micro_batch_tokens=9, **change, shard=shard)
    done = start(__file__, "gradients", tmp_path, *words(cfg))
    assert done.returncode == 0, done.stderr
    one = gradients(config(world, tmp_path / "one", micro_batch_tokens=9, **change))
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert (
        both[0]["tokens"] == one["tokens"][:2] + one["tokens"][4:]
        and both[1]["tokens"] == one["tokens"][2:4]
    )
    for two in both:
        for name in ("gradients", "cold"):
            for a, b in zip(two[name], one[name], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for name, x in one["measured"].items():
            if name not in ("by_position", "sampling_mismatch"):
                assert two["measured"][name] == pytest.approx(x, rel=1e-5, abs=1e-6), name
        assert two["measured"]["by_position"]["tokens"] == one["measured"]["by_position"]["tokens"]
        assert (
            two["held"] == pytest.approx(one["held"], rel=1e-5)
            and two["accuracy"] == one["accuracy"]
        )
        assert two["cold_start"] == pytest.approx(one["cold_start"], rel=1e-5)
        assert two["norm"] == pytest.approx(one["norm"], rel=1e-5)


@pytest.mark.slow
def test_a_process_that_dies_or_is_stopped_ends_all_and_the_checkpoint_goes_on(world, tmp_path):  # noqa: F811
    """A process killed in step 4 ends all of them in seconds, with a word; one that is told to stop in step 4 stops all
    of them after it; --resume then ends as the run that was not disturbed. The first process alone wrote: no line
    stands twice. Sharded, not sharded, sharded again: the checkpoint is the same.
    """
    how = dict(
        steps=5,
        cold_start=4,
        cold_start_steps=2,
        cold_start_batch_size=2,
        cold_start_max_new_tokens=40,
        cold_start_temperature=1.0,
    )
    cfg = config(world, tmp_path / "two", **how)
    died = start(__file__, "dies", tmp_path, *words(cfg), "--shard")
    assert died.returncode
    assert "opd.py: stopped, as another process has died" in died.stderr
    assert [row["step"] for row in rows(tmp_path / "two")] == [1, 2, 3]
    assert not (tmp_path / "two" / "result.json").exists()
    stopped = start(__file__, "stops", tmp_path, *words(cfg), "--resume")
    assert (
        stopped.returncode
        and "opd.py: stopped after step 4 of 5; the checkpoint of step 4" in stopped.stderr
    )
    assert re.findall(r"exitcode +: (-?\d+)", stopped.stderr) == ["143", "143"]
    done = start(opd.__file__, *words(cfg), "--resume", "--shard")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gap recovery") == 1  # one of them talks
    assert stat.S_ISCHR(
        os.stat(os.devnull).st_mode
    )  # where the other's logs went, and which is there
    opd.distil(config(world, tmp_path / "one", **how))
    two, one = rows(tmp_path / "two"), rows(tmp_path / "one")
    assert [row["step"] for row in two] == [1, 2, 3, 4, 5]
    for name in ("tokens", "reverse_kl", "overlap_ratio", "response_length"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-4), (
            name
        )
    for name in ("cold_start.jsonl", "cold_start.jsonl.dropped.jsonl", "rollouts.jsonl"):
        lines = [sorted((tmp_path / run / name).read_text().splitlines()) for run in ("one", "two")]
        assert lines[0] == lines[1], name
    theirs = weights(tmp_path / "one")
    assert all(
        torch.allclose(x, theirs[name], atol=1e-4) for name, x in weights(tmp_path / "two").items()
    )
    assert json.loads((tmp_path / "two" / "result.json").read_text())["processes"] == 2


def test_more_processes_than_responses_are_refused(world, tmp_path, monkeypatch):  # noqa: F811
    """A process without a response would have no gradient to give, and all would wait for it."""
    monkeypatch.setattr("plumbing.run.processes", lambda: (0, 8))
    with pytest.raises(ValueError, match="--batch-size 3, .*8 processes"):
        Run(config(world, tmp_path))


def main(what, folder, *words):
    cfg = flags.parse_opd(list(words))
    with exits.one_line("opd.py"), one_of_several(cfg.device):
        if what == "gradients":
            rank = torch.distributed.get_rank()
            return torch.save(gradients(cfg), f"{folder}/{rank}.pt")
        plain, leave, sent = (
            opd.update,
            Run.__exit__,
            {"dies": signal.SIGKILL, "stops": signal.SIGTERM}[what],
        )

        def update(cfg, pair, optimizer, rows, step):
            if step == 3 and torch.distributed.get_rank() == 1:
                os.kill(os.getpid(), sent)
            return plain(cfg, pair, optimizer, rows, step)

        def slowly(
            run, *error
        ):  # torchrun's SIGTERM to the others comes before they have said a word
            leave(run, *error)
            time.sleep(2)

        opd.update, Run.__exit__ = update, slowly
        opd.distil(cfg)


if __name__ == "__main__":
    main(*sys.argv[1:])
