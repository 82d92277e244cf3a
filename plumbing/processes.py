"""plumbing/processes.py: one run on several processes (torchrun).

Each process writes and grades its share of a step's prompts. Of a step only sums and gradients
travel. On one process all of this does nothing.
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
    """The part of a list that is this process's: every so many-th item."""
    rank, world = processes()
    return items[rank::world]


def gathered(mine):
    """The inverse of share: what each process made of its share -> one list, on all of them."""
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
    """A tensor added up over all processes (or by another dist.ReduceOp), on all of them."""
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


def sum_gradients(model):
    """Replace each gradient by its sum over all processes.

    A parameter that no process has used keeps no gradient, so that the optimizer leaves it alone
    as it does on a single process. FSDP has added the gradients of a sharded model up already.
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
    """teacher.micro_batches, as many on every process: -> list of MicroBatch.

    A sharded model gathers its weights in every forward and backward, so all processes must call
    it equally often. What a process lacks are idle parts: no response token, no gradient.
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
    """Inside, every process holds all weights of those of these models that are sharded.

    Then the processes may call a model as often as each of them needs to. Layers are in the dtype
    of the computation, the rest is float32.
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

    nccl joins GPUs, one for each process, and gloo CPUs. The first process prints. If another
    process dies, this one ends at once with a line, as it would wait for ever.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=datetime.timedelta(hours=1))  # one may write much longer
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
        warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's must not come before our line
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in ("gloo", "NCCL", "Connection")):
            raise
        reason = str(error).splitlines()[0]
        print(
            "opd.py: stopped, as another process has ended; if there is a checkpoint, it is whole: "
            f"--resume ({reason})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the destructors of gloo would abort, or wait for the others
    is_first = dist.get_rank() == 0
    dist.destroy_process_group()
    if not is_first:
        os._exit(0)  # once, in a test, a process aborted as it ended, after its work
