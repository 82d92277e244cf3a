"""plumbing/shard.py: a student too large for one GPU, each of its weights in as many parts as there are processes.

torch's fully_shard: a layer's weights are gathered where it computes, its gradient is added up and cut where it has
computed, and AdamW sees its own part alone: 16 bytes a parameter become 16 over the number of processes. What is no
layer (embeddings, norm, head) is gathered once for a micro-batch, so that the head is called a chunk at a time.
"""

import contextlib

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from transformers.modeling_layers import GradientCheckpointingLayer

from plumbing.processes import over_processes, processes


def shard_student(pair, device, dtype):
    """Cut the student of a Pair over all processes, before its optimizer is made; dtype: of the computation.
    ValueError where it has no layers that transformers names.
    """
    student, mesh = pair.student, init_device_mesh(device.type, (processes()[1],))
    layers = [
        module for module in student.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if not layers:
        raise ValueError(f"{type(student).__name__} has no layers to shard; leave --shard out")
    for layer in layers:  # gathered as autocast would cast them
        fully_shard(
            layer,
            mesh=mesh,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=None if dtype == torch.float32 else dtype,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            ),
        )
    fully_shard(student, mesh=mesh, reshard_after_forward=False)
    for module in parts(student):
        module.set_gradient_divide_factor(1.0)  # the sum, not the mean
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    if not pair.splits[0].own_logits:  # the trunk alone is a forward, too
        student.trunk = pair.splits[0].trunk
        register_fsdp_forward_method(student, "trunk")
        pair.splits = pair.splits[0]._replace(trunk=student.trunk), pair.splits[1]
    pair.device, pair.whole = device, lambda: whole(student)
    pair.rounds = lambda n: int(
        over_processes(torch.tensor(n, device=device), torch.distributed.ReduceOp.MAX)
    )


def parts(student):
    return [module for module in student.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def whole(student):
    """Inside, every process has all weights, gathered once: layers in the computation's dtype, the rest in float32."""
    for module in parts(student):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in parts(student):
        module.set_reshard_after_forward(module is not student, recurse=False)
        module.reshard()


def joined(state, wanted):
    """A state_dict of sharded weights as one of whole ones, on the CPU; all processes ask, who does not want it gets
    None in place of the tensors.
    """

    def one(x):
        x = x.full_tensor() if isinstance(x, DTensor) else x
        return x.cpu() if wanted and isinstance(x, torch.Tensor) else x if wanted else None

    return tree_map(one, state)


def cut(state, like):
    """A state_dict of whole tensors, {name: tensor}, with those cut that are sharded in another one."""

    def one(x, mine):
        return distribute_tensor(x.to(mine.device), mine.device_mesh, mine.placements)

    return {
        name: one(x, like[name]) if isinstance(like[name], DTensor) else x
        for name, x in state.items()
    }


def cut_moments(state, parameters):
    """An optimizer's state_dict, whole, cut as its parameters are."""
    return {
        **state,
        "state": {
            i: cut(of_one, {name: parameters[i] if x.dim() else x for name, x in of_one.items()})
            for i, of_one in state["state"].items()
        },
    }
