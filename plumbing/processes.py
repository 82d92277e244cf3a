"""plumbing/processes.py: one run on several processes (torchrun), or on one, where all of this does nothing.

Each process writes and grades its share of a step's prompts. Only sums and gradients travel. Imports nothing of the
project.
"""

import contextlib
import datetime
import functools
import os
import signal
import sys
import warnings

import torch
import torch.distributed as dist
from tqdm import tqdm


def processes():
    """The rank of this process and how many there are: (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(items):
    """What this process takes of a list: every so many-th."""
    rank, world = processes()
    return items[rank::world]


def gathered(mine):
    """The inverse of share: what each process has made of its share, as one list on all of them."""
    if not dist.is_initialized():
        return mine
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def over_processes(x, op=None):
    """The sum of a tensor over all processes (or another dist.ReduceOp), on all of them."""
    if dist.is_initialized():
        dist.all_reduce(x, op or dist.ReduceOp.SUM)
    return x


def summed_gradients(model):
    """The parameters of a model, whose gradients are now the sums over all processes: list, as an optimizer takes them.

    A parameter that no process has used keeps no gradient; the optimizer leaves it alone, as in a single process.
    """
    parameters = list(model.parameters())
    if dist.is_initialized():
        used = torch.tensor(
            [p.grad is not None for p in parameters], dtype=torch.int, device=parameters[0].device
        )
        for p, anywhere in zip(parameters, over_processes(used).tolist()):
            if anywhere:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                if not hasattr(p, "full_tensor"):  # sharded: they are added up already
                    dist.all_reduce(p.grad)
    return parameters


def batch(count, step, size, seed):
    """Which of `count` examples a step takes: slice `step` of one endless list, a new shuffle of all of them each
    epoch: -> list of int. It depends on (seed, step) alone.
    """
    taken = []
    for place in range(step * size, (step + 1) * size):
        epoch, i = divmod(place, count)
        if i == 0 or not taken:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(count, generator=generator).tolist()
        taken.append(order[i])
    return taken


@contextlib.contextmanager
def one_of_several(device):
    """Inside, this is one of the processes that torchrun started, if it did: nccl on GPUs, gloo on CPUs. A GPU each.

    The first one writes and talks. Where another one dies this one ends at once, with a line: no collective would end.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        timeout=datetime.timedelta(hours=1)
    )  # one may write longer than the others, not so long
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
        warnings.simplefilter("ignore")
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # torchrun's, after a death, must not come before the line below
    try:
        yield
    except RuntimeError as error:
        if not any(name in str(error) for name in ("gloo", "NCCL", "Connection")):
            raise
        print(
            "opd.py: stopped, as another process has died; the last checkpoint is whole: --resume "
            f"({str(error).splitlines()[0]})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # not by the way of destructors: those of gloo abort, or wait for the others
    dist.destroy_process_group()
