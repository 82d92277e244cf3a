"""plumbing/shard.py: models too large for one GPU, cut over the processes (--shard).

With torch's fully_shard a layer's weights are gathered when it computes. Its gradient is added up
over the processes and cut, so that AdamW sees a part of each weight: the 16 bytes a parameter of
the student are divided by the number of processes. The teacher is cut as well; it is frozen and
has no gradient. Embeddings, last norm and head are gathered once for a micro-batch, since the head
is called a chunk at a time.
"""

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from plumbing.processes import processes
from teacher import UserError


def shard_pair(pair, device):
    """Cut both models of a Pair over all processes, before the optimizer is made.

    UserError, see shard.
    """
    mesh = init_device_mesh(device.type, (processes()[1],))
    for model in (pair.student, pair.teacher):
        shard(model, mesh, pair.dtype)


def shard(model, mesh, dtype):
    """Cut a model over a DeviceMesh; dtype: of the computation in its layers, as with autocast.

    UserError for a model without layers, or that has LayerNorm, in bfloat16 on a CPU.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"{type(model).__name__} has no layers to shard; leave --shard out")
    has_layer_norm = any(isinstance(m, torch.nn.LayerNorm) for m in model.modules())
    if mesh.device_type == "cpu" and dtype != torch.float32 and has_layer_norm:
        raise UserError(
            f"{type(model).__name__}: on a CPU a sharded LayerNorm computes in float32 alone; take "
            "--dtype float32"
        )
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the sum, not the mean
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other

    def trunk(**inputs):
        return model.base_model(**inputs)

    if model.linear_head:  # then teacher.states calls the trunk alone
        model.trunk = trunk
        register_fsdp_forward_method(model, "trunk")


def full_state(student, optimizer):
    """Whole weights and moments, on the CPU: -> two state_dicts, those of an uncut model.

    All processes call it together. The first one gets the tensors, the others two empty dicts.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(student, options=options)
    if not optimizer.state:  # torch would fill it by an update of nothing, and count that
        return weights, optimizer.state_dict()
    moments = get_optimizer_state_dict(student, optimizer, options=options)
    if not moments:
        return weights, moments
    places = {name: place for place, name in enumerate(parameter_names(student))}
    return weights, renamed(moments, places)


def load_full_state(student, optimizer, weights, moments):
    """The inverse of full_state: every process is given all of it, and takes its parts."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(student, weights, options=options)
    if moments["state"]:
        names = dict(enumerate(parameter_names(student)))
        options.strict = False  # a parameter that was never used has no moments
        set_optimizer_state_dict(student, optimizer, renamed(moments, names), options=options)


def parameter_names(student):
    """The names of the parameters, in the order in which an optimizer numbers them: list."""
    return [name for name, _ in student.named_parameters()]


def renamed(moments, names):
    """An optimizer's state_dict with other keys for its parameters; names: {old: new}."""
    state = {names[old]: values for old, values in moments["state"].items()}
    groups = []
    for group in moments["param_groups"]:
        groups.append({**group, "params": [names[old] for old in group["params"]]})
    return {"state": state, "param_groups": groups}
