"""plumbing/processes.py: one run on several processes (torchrun).

Each process writes and grades its share of a step's prompts. In a step only sums and gradients go
from one process to another. With one process, all of this does nothing.
"""

import contextlib
import dataclasses
import datetime
import functools
import os
import signal
import sys
import warnings

import torch
import torch.distributed as dist
from tqdm import tqdm

from teacher import micro_batches


def processes():
    """The rank of this process and the number of processes: (0, 1) without torch.distributed."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def share(items):
    """This process's part of a list: items rank, rank + processes, ..."""
    rank, world = processes()
    return items[rank::world]


def gathered(mine):
    """The inverse of share: what each process made of its share -> one list, on every process."""
    if not dist.is_initialized():
        return mine
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    items = []
    for place in range(max(map(len, parts))):
        for part in parts:
            items += part[place : place + 1]
    return items


def over_processes(x, op=dist.ReduceOp.SUM):
    """The sum of a tensor over all processes (or another dist.ReduceOp), on each of them.

    With several processes the sum is written into x, of any shape.
    """
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


def sum_gradients(model):
    """Replace each gradient by its sum over all processes.

    A parameter that no process has used keeps no gradient, so the optimizer leaves it alone, as
    with a single process. FSDP has added up the gradients of sharded parameters already.
    """
    if not dist.is_initialized():
        return
    parameters = list(model.parameters())
    used = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device)
    used_anywhere = over_processes(used.int()).tolist()
    for p, is_used in zip(parameters, used_anywhere):
        if is_used and p.grad is None:
            p.grad = torch.zeros_like(p)
        if is_used and not is_sharded(p):
            dist.all_reduce(p.grad)


def is_sharded(parameter):
    """Is this parameter a DTensor, of which each process holds a part?"""
    return hasattr(parameter, "full_tensor")


def equal_micro_batches(r, budget, teacher_reads=None):
    """teacher.micro_batches, as many of them on every process: -> list of MicroBatch.

    A sharded model gathers its weights in every forward and backward, so all processes must call
    it equally often. A process that has fewer parts gets idle ones, without a response token.
    """
    parts = micro_batches(r, budget, teacher_reads)
    count = over_processes(torch.tensor(len(parts), device=r.ids.device), dist.ReduceOp.MAX)
    first = parts[0]
    idle = dataclasses.replace(
        first,
        is_response=torch.zeros_like(first.is_response),  # (b, L)
        for_teacher=dataclasses.replace(
            first.for_teacher, is_response=torch.zeros_like(first.for_teacher.is_response)
        ),
        y=first.y[:0],
        log_p=first.log_p[:0],
        place=first.place[:0],
    )
    return parts + [idle] * (int(count) - len(parts))


@contextlib.contextmanager
def whole(*models):
    """Inside, every process holds all weights of these models, also of those that are sharded.

    So each process may call a model as often as it needs to. Of a sharded model the layers are in
    the dtype of the computation, and the rest is in the dtype of its weights.
    """
    parts = []
    for model in models:
        parts += [module for module in model.modules() if hasattr(module, "unshard")]
    try:
        for module in parts:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
    finally:
        for module in parts:
            is_layer = module not in models
            module.set_reshard_after_forward(is_layer, recurse=False)
            module.reshard()


@contextlib.contextmanager
def one_of_several(device):
    """Inside, this is one of the processes that torchrun started, if it started any.

    nccl connects GPUs, one for each process, and gloo connects CPUs. Only the first process
    prints. If another process dies, this one prints a line and ends at once; it would wait for
    ever. device: the value of --device.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # a process may write for much longer than the others
    dist.init_process_group(timeout=datetime.timedelta(hours=1))
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
        warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's must not end this before it prints
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in ("gloo", "NCCL", "Connection")):
            raise
        reason = str(error).splitlines()[0]
        print(
            "opd.py: stopped, since another process has ended; if there is a checkpoint, it is "
            f"whole: go on with --resume ({reason})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the destructors of gloo would abort, or wait for the others
    is_first = dist.get_rank() == 0
    dist.destroy_process_group()
    if not is_first:
        os._exit(0)  # the work is done; in its destructors a process may still abort
