"""plumbing/models.py: checkpoints from a directory or the hub, and whether they are what they should be."""

import contextlib
import os
import re
import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from plumbing.exits import is_out_of_memory
from plumbing.slots import fastest
from rollout import position_ids, rollout
from teacher import Pair, check_tokens


def load_pair(
    student,
    teacher,
    *,
    device="auto",
    dtype="float32",
    teacher_dtype="",
    teacher_device_map="",
    gradient_checkpointing=False,
    trust_remote_code=False,
    micro_batch_tokens=0,
    chunk=0,
    in_flight=0,
    ends="merged",
    shard=False,
):
    """Two directories or hub names -> teacher.Pair. Raises ValueError where they cannot be read (load) or do not fit
    (teacher.check_pair); what costs least is looked at first.

    The student's weights are float32 whatever the dtype of the computation. micro_batch_tokens 0: see activations.
    shard: cut them over all processes, see plumbing/shard.py; each reads all of them first, into the memory of its CPU.
    """
    device = pick_device(device)
    mine, theirs = (load_tokenizer(path, trust_remote_code) for path in (student, teacher))
    check_tokens(mine, theirs)
    dtypes = [getattr(torch, name) for name in (dtype, teacher_dtype or dtype)]
    student = load(
        student,
        device="cpu" if shard else device,
        trust_remote_code=trust_remote_code,
        trainable=True,
    )
    teacher = load(
        teacher,
        device=device,
        dtype=dtypes[1],
        device_map=teacher_device_map or None,
        trust_remote_code=trust_remote_code,
    )
    for surprise in surprises(mine, theirs):
        warnings.warn(surprise)
    if gradient_checkpointing:
        checkpoint_layers(student)
    pair = Pair.of(
        student,
        teacher,
        mine,
        theirs,
        merge_ends=ends == "merged",
        chunk=chunk or None,
        autocast=(
            contextlib.nullcontext
            if dtype == "float32"
            else lambda: torch.autocast(device.type, dtypes[0])
        ),
    )
    pair.micro_batch_tokens = micro_batch_tokens or activations(student, device, dtypes[0].itemsize)
    pair.ending.update(in_flight=in_flight or None, decoder=fastest)
    if shard:
        from plumbing.shard import shard_student  # torch.distributed: half a second

        shard_student(pair, device, dtypes[0])
    return pair


def surprises(mine, theirs):
    """What two tokenizers of the same tokens do otherwise, in words."""
    special, text = (
        [set(tokenizer.all_special_tokens) for tokenizer in (mine, theirs)],
        next(iter(mine.get_vocab())),
    )
    if special[0] != special[1]:
        yield f"special tokens of only one of the two: {sorted(special[0] ^ special[1])}"
    if mine.chat_template != theirs.chat_template:
        yield "chat templates differ: both models read the student's text"
    if not mine.chat_template and mine(text).input_ids != theirs(text).input_ids:
        yield f"the tokenizers encode {text!r} differently, by a BOS perhaps: both read the student's ids"


def activations(model, device, width):
    """How many tokens' activations, of `width` bytes a value, fit into a quarter GiB (CPU) or an eighth of a GPU: int.

    17 values a token, layer and hidden unit (arXiv 2205.05198, section 4.1: 34 bytes in 16 bits, attention scores
    aside, which no longer are kept), with checkpointed layers one, and 17 in the layer at hand. Rough: norms and
    residuals stay float32 under autocast.
    """
    config, layers = (
        model.config.get_text_config(),
        model.config.get_text_config().num_hidden_layers,
    )
    room = (
        torch.cuda.get_device_properties(device).total_memory // 8
        if device.type == "cuda"
        else 2**28
    )
    kept = layers + 17 if model.is_activation_checkpointing else 17 * layers  # values a hidden unit
    return max(1, room // (kept * width * config.hidden_size))


def load(
    path,
    *,
    device="cpu",
    dtype=torch.float32,
    device_map=None,
    trust_remote_code=False,
    trainable=False,
):
    """A causal language model from a directory or the hub, in eval mode:
    dropout would make sampled and scored softmax differ. device_map: of transformers, in place of device.

    Read from safetensors alone, as a pickle may run code; code of the checkpoint's own runs with trust_remote_code.
    Raises ValueError with the path for what is no whole checkpoint of a causal language model: a weight that is missing
    or of another shape, which transformers would replace by random numbers, is one; so is a model that reads ahead.
    """
    with refused(f"{path} cannot be read"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if trainable and getattr(config, "quantization_config", None):
        raise ValueError(
            f"{path}: quantised weights cannot be trained; take the checkpoint that they were made from"
        )
    with refused(f"{path} cannot be read"):
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    lacks = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if lacks:
        raise ValueError(
            f"{path}: {lacks[0]} ({len(lacks)} such in all) is missing, or has another shape than "
            "config.json says; take a whole checkpoint"
        )
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError(
            f"{path}: the devices here do not hold it; take a smaller model, or --teacher-dtype bfloat16"
        )
    model = (model if device_map else model.to(device)).eval()
    probe(model, path)
    return model


def load_tokenizer(path, trust_remote_code=False):
    """The tokenizer of a directory or of the hub; ValueError with the path where there is none."""
    check_directory(path)
    with refused(f"{path} cannot be read"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def check_directory(path):
    """ValueError where a path is no directory of safetensors and no hub's name, NAME or OWNER/NAME: said at once, not
    after a search online. Where OWNER is a folder here, a folder is meant.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{path}: no config.json there; give the directory of a checkpoint")
    if folder.is_dir() and not next(folder.glob("*.safetensors"), None):
        raise ValueError(
            f"{path}: no safetensors there, and nothing else is read, since a pickle may run code; "
            "convert it where you trust it: from_pretrained, then save_pretrained"
        )
    is_name = re.fullmatch(r"[\w.-]*\w[\w.-]*(/[\w.-]*\w[\w.-]*)?", str(path))
    if not folder.is_dir() and (
        folder.exists() or not is_name or "/" in path and folder.parent.is_dir()
    ):
        raise ValueError(
            f"{path}: no such directory, and no hub name; give the directory of a checkpoint"
        )


@contextlib.contextmanager
def refused(what):
    """Whatever a foreign checkpoint makes transformers raise is a ValueError, in one line."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            error = (
                "it brings code of its own; if you have read and trust it, add --trust-remote-code"
            )
        said = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{what}: {said or type(error).__name__}; give a directory or hub name of a causal language "
            "model with its tokenizer"
        ) from None


@torch.no_grad()
def probe(model, path):
    """ValueError where a model breaks a promise that all of this rests on, found out by trying, in a dozen tokens:

    no token changes what is said of an earlier one (BERT loads as a causal model, too); a text reads the same alone and
    in a batch padded on the left; what `rollout` records of each token is what a reading of the whole text says.
    """
    V, device = len(model.get_input_embeddings().weight), model.get_input_embeddings().weight.device

    def read(ids, mask):  # (b, L) -> (b, L, V)
        return (
            model(
                input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False
            )
            .logits.float()
            .log_softmax(-1)
        )

    def keeps(promise, *off):
        if not max(off) <= torch.finfo(model.dtype).eps ** 0.5 * (
            log_p.max() - log_p.min()
        ):  # far above rounding
            raise ValueError(
                f"{path}: {type(model).__name__} {promise}; take a decoder that transformers runs so"
            )

    with refused(f"{path}: {type(model).__name__} cannot be run"):
        text = torch.arange(3, 12, device=device).unsqueeze(0) % V  # (1, 9)
        log_p, begun = (read(ids, torch.ones_like(ids)) for ids in (text, text[:, :-1]))
    if not log_p.isfinite().all():
        raise ValueError(
            f"{path}: its logits are not finite; the checkpoint is damaged, or outgrows --dtype"
        )
    keeps(
        "is no causal language model, a later token changes what it says of an earlier one",
        (log_p[:, :-1] - begun).abs().max(),
    )
    with refused(f"{path}: {type(model).__name__} cannot write"):
        r = rollout(
            model,
            [[5 % V, 3 % V, 6 % V, 4 % V], [7 % V, 3 % V]],
            n=2,
            max_new_tokens=8,
            seeds=[0, 1],
            eos_ids=range(0, V, 6),
            decoder=fastest,
        )  # some end before the others
        padded = read(r.ids, r.attention_mask)
        alone = [
            read(ids[mask].unsqueeze(0), mask[mask].unsqueeze(0))[0]
            for ids, mask in zip(r.ids, r.attention_mask)
        ]
    keeps(
        "reads a text otherwise where padding stands before it",
        *((x - y[mask]).abs().max() for x, y, mask in zip(alone, padded, r.attention_mask)),
    )
    for i, x in enumerate(alone):
        y = r.ids[i, r.is_response[i]]
        scored = x[-len(y) - 1 : -1].gather(-1, y.unsqueeze(-1)).squeeze(-1)
        keeps(
            "samples from another softmax than a reading of the whole text gives",
            (scored - r.log_p[i, : len(y)]).abs().max(),
        )


def pick_device(name):
    """A torch.device; "auto" is cuda where there is one, else cpu. ValueError for one that is not there, or that has no
    float64, with which tokens are drawn (mps), or no numbers (meta).
    """
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    mine = (
        f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    )  # of torchrun: a GPU each
    try:
        one = torch.ones((), dtype=torch.float64, device=mine)
        one.item()
        return one.device
    except (RuntimeError, AssertionError, TypeError) as error:
        said = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"--device {name}: {said}; --device cpu works everywhere") from None


def checkpoint_layers(model):
    """Keep the inputs of the layers for the backward pass and compute the rest again: memory for one more forward.

    transformers does so in layers that are in training mode, and only where grad is enabled; what is inside them stays
    in eval mode, and a layer that drops out by itself no longer does.
    Raises ValueError for an architecture that has no such layers.
    """
    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers to checkpoint; leave --gradient-checkpointing out"
        )
    model.activation_checkpointing_enable()
    for layer in layers:
        layer.training = True  # of the layer alone, not of its parts
        for name, x in vars(layer).items():
            if "dropout" in name and isinstance(x, float):
                setattr(layer, name, 0.0)
