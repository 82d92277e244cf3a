"""plumbing/models.py: checkpoints from a directory or the hub, and whether they can be trained on.

load_pair reads two checkpoints and makes a teacher.Pair of them. Weights are read from safetensors
alone, since a pickle may run code. Code that comes with a checkpoint is never run. `probe` tries
each model on a few tokens. A model that would be trained on something else than it wrote is
refused here, before the first step.
"""

import contextlib
import logging
import os
import re
import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from plumbing import slots
from plumbing.exits import is_out_of_memory
from plumbing.prompts import positions
from rollout import log_softmax, position_ids
from teacher import UserError, check_tokens, make_pair


def load_pair(
    student,
    teacher,
    *,
    device="auto",
    dtype="float32",
    gradient_checkpointing=False,
    micro_batch_tokens=0,
    in_flight=0,
    ends="merged",
    shard=False,
):
    """Two directories or hub names -> teacher.Pair.

    dtype: of the computation and of the teacher's weights; the student's weights are float32.
    micro_batch_tokens 0: as many as `activations` says. in_flight 0: all. ends: "merged", or "own".
    shard: cut both models over all processes; each process reads all of them into the memory of
    its CPU first. UserError if a checkpoint cannot be read or fails the probe (load), or if the two
    do not fit (teacher.check_pair). What costs least is checked first.
    """
    device = pick_device(device)
    dtype = getattr(torch, dtype)
    student_tokenizer = load_tokenizer(student)
    teacher_tokenizer = load_tokenizer(teacher)
    check_tokens(student_tokenizer, teacher_tokenizer)
    place = torch.device("cpu") if shard else device
    student = load(student, device=place, dtype=dtype, trainable=True)
    teacher = load(teacher, device=place, dtype=dtype)
    for surprise in surprises(student_tokenizer, teacher_tokenizer):
        warnings.warn(surprise, stacklevel=2)
    if gradient_checkpointing:
        checkpoint_layers(student)
    pair = make_pair(
        student,
        teacher,
        student_tokenizer,
        teacher_tokenizer,
        merge_ends=ends == "merged",
        dtype=dtype,
        micro_batch_tokens=micro_batch_tokens or activations(student, device, dtype.itemsize),
        in_flight=in_flight or None,
    )
    if shard:
        from plumbing.shard import shard_pair  # imports torch.distributed: half a second

        shard_pair(pair, device)
    return pair


def check_k(k, pair):
    """UserError if --k is larger than the vocabulary of the pair."""
    if k > pair.vocab_size:
        raise UserError(f"--k {k}: the two models share {pair.vocab_size} tokens; take a smaller k")


def pick_device(name):
    """The name of a device -> torch.device; "auto" is cuda if there is one, else cpu.

    Under torchrun each process takes a GPU of its own. UserError if the device is not there, if it
    has no float64, which drawing tokens needs (mps), or if it holds no numbers (meta).
    """
    asked = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        one = torch.ones((), dtype=torch.float64, device=name)
        one.item()
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"--device {asked}: {reason}; --device cpu works everywhere") from None
    return one.device


# --- reading -------------------------------------------------------------------------------------


def load(path, *, device="cpu", dtype=torch.float32, trainable=False):
    """A causal language model from a directory or the hub, probed, in eval mode.

    dtype: of the computation and of the weights; a trainable model has weights in float32.
    UserError, with the path, if this is not exactly a checkpoint of a causal language model. A
    weight that is missing, or has another shape than config.json says, would be random. A weight
    that config.json does not provide for would be left out.
    """
    device = torch.device(device)
    with refused(f"{path} cannot be read"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if trainable and getattr(config, "quantization_config", None):
        raise UserError(
            f"{path}: quantised weights cannot be trained; take the checkpoint they were made from"
        )
    with refused(f"{path} cannot be read"):
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32 if trainable else dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_weights(path, info)
    model = model.to(device).eval()
    probe(model, path, dtype)
    return model


def check_weights(path, info):
    """UserError if the weights of a checkpoint are not those of its model."""
    mismatched = [name for name, *_ in info["mismatched_keys"]]
    lacking = sorted([*info["missing_keys"], *mismatched])
    if lacking:
        raise UserError(
            f"{path}: {lacking[0]} ({len(lacking)} such in all) is missing, or has another shape "
            "than config.json says; take a whole checkpoint"
        )
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        raise UserError(
            f"{path}: {unexpected[0]} ({len(unexpected)} such in all) has no place in the model "
            "that config.json describes; take the config.json that belongs to these weights"
        )


def is_no_report(record):
    """A filter for the log of transformers: False for its table of missing and unexpected weights.

    check_weights refuses these. All else that transformers logs while it loads is shown.
    """
    text = record.getMessage()
    return "LOAD REPORT" not in text or "CONVERSION" in text


logging.getLogger("transformers.modeling_utils").addFilter(is_no_report)


def load_tokenizer(path):
    """The tokenizer of a directory or of the hub. UserError with the path if there is none."""
    check_directory(path)
    with refused(f"{path} cannot be read"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def check_directory(path):
    """UserError if a path is neither a directory with safetensors nor a possible name on the hub.

    Only OWNER/NAME is looked for on the hub. If OWNER is a folder here, a folder is meant.
    """
    folder = Path(path)
    if not folder.is_dir():
        can_be_on_the_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))
        if folder.exists() or folder.parent.is_dir() or not can_be_on_the_hub:
            raise UserError(
                f"{path}: no such directory here; give the directory of a checkpoint, or "
                "OWNER/NAME on the hub"
            )
        print(f"{path}: no such directory here, asking the hub", file=sys.stderr)
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"{path}: no config.json there; give a directory that holds a model")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{path}: no safetensors there, and nothing else is read, since a pickle may run code; "
            "convert it where you trust it: from_pretrained, then save_pretrained"
        )


@contextlib.contextmanager
def refused(what):
    """Inside, whatever transformers raises over a checkpoint is a UserError, in one line.

    what: the start of the line. A lack of memory is raised as it is.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it brings code of its own, which is never run here"
        raise UserError(
            f"{what}: {reason}; give the directory, or OWNER/NAME on the hub, of a causal language "
            "model with its tokenizer"
        ) from error


def surprises(student_tokenizer, teacher_tokenizer):
    """What two tokenizers with the same tokens do differently: list of warnings."""
    found = []
    student_special = set(student_tokenizer.all_special_tokens)
    teacher_special = set(teacher_tokenizer.all_special_tokens)
    if student_special != teacher_special:
        differing = sorted(student_special ^ teacher_special)
        found.append(f"special tokens of only one of the two: {differing}")
    if student_tokenizer.chat_template != teacher_tokenizer.chat_template:
        found.append(
            "chat templates differ: a prompt goes into the student's, a teacher_prompt (see "
            "--teacher-template) into the teacher's"
        )
    if not student_tokenizer.chat_template:
        text = next(iter(student_tokenizer.get_vocab()))
        if student_tokenizer(text).input_ids != teacher_tokenizer(text).input_ids:
            found.append(
                f"the tokenizers encode {text!r} differently, perhaps by a BOS: both models read "
                "the student's ids"
            )
    return found


# --- promises ------------------------------------------------------------------------------------

WINDOWS = (  # what configurations call the length of a sliding or local window
    "sliding_window",
    "window_size",
    "attention_window_size",
    "local_attention",
    "attention_chunk_size",
)
LONGEST_WINDOW = 4096  # tokens; the text of the probe is not made longer than that
WRITTEN = 20  # tokens of a response of the probe; on a GPU rows leave at every 16th
# The largest difference that rounding may make, as a share of the range of log p. ROUNDING_ALONE:
# to a text that goes on. ROUNDING: to a text that is written with a cache, or read beside others.
ROUNDING_ALONE = {torch.float32: 3.5e-4, torch.bfloat16: 0.09}
ROUNDING = {torch.float32: 1.5e-3, torch.bfloat16: 0.09}
TEMPERATURE = 2.0  # of the probe: so some rows end early and others late, with any model


@torch.no_grad()
def probe(model, path, dtype=torch.float32):
    """Try a model on a few tokens, in the dtype of the run. UserError with the path if

    - it cannot be run or cannot write in that dtype, or its logits are not finite,
    - a later token changes what it says of an earlier one (BERT loads as a causal model, too),
    - it reads a text beside longer ones, with padding on the left, differently than alone, or
    - `rollout` records other log-probabilities than a reading of the whole text gives.
    """
    name = f"{path}: {type(model).__name__}"
    device = model.get_input_embeddings().weight.device
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    with autocast, refused(f"{name} cannot be run"):
        text = torch.tensor([probe_prompt(model, 9)], device=device)  # (1, 9)
        log_p = read(model, text, 9)  # (1, 9, V)
        log_p_of_start = read(model, text[:, :-1], 8)  # (1, 8, V)
    log_p_range = log_p.max() - log_p.min()  # nats
    if not log_p.isfinite().all():
        raise UserError(
            f"{path}: its logits are not finite; the checkpoint is damaged, or outgrows --dtype"
        )
    if apart(log_p[:, :-1], log_p_of_start) > ROUNDING_ALONE[dtype] * log_p_range:
        raise UserError(
            f"{name} is no causal language model, a later token changes what it says of an earlier "
            "one; take a decoder"
        )

    with autocast, refused(f"{name} cannot write"):
        r = written(model)
        T = r.log_p.size(1)
        log_p_beside = read(model, r.ids, T + 1, r.attention_mask)[:, :-1]  # (B, T, V)
        log_p_alone = []  # of each row, (t, V)
        for row, mask in enumerate(r.attention_mask):
            text = r.ids[row, mask].unsqueeze(0)
            t = len(r.response_ids(row))
            log_p_alone.append(read(model, text, t + 1)[0, :-1])
    for row, alone in enumerate(log_p_alone):
        t = len(alone)
        beside = log_p_beside[row, :t]  # (t, V)
        if apart(beside, alone) > ROUNDING[dtype] * log_p_range:
            raise UserError(
                f"{name} reads a text differently if padding stands before it; take another "
                "architecture"
            )
        y = torch.tensor(r.response_ids(row), device=device).unsqueeze(-1)  # (t, 1)
        scored = beside.gather(-1, y).squeeze(-1)  # (t,)
        if apart(scored, r.log_p[row, :t]) > ROUNDING[dtype] * log_p_range:
            raise UserError(
                f"{name} samples from another softmax than a reading of the whole text gives; take "
                "another architecture"
            )


def apart(x, y):
    """The largest difference between two tensors, inf if one of them holds NaN: float."""
    return (x - y).abs().nan_to_num(torch.inf).max().item()


def read(model, ids, last, mask=None):
    """log p of a model at the `last` positions of each row: (b, L), (b, L) -> (b, last, V)."""
    if mask is None:
        mask = torch.ones_like(ids, dtype=torch.bool)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids(mask),
        use_cache=False,
        logits_to_keep=last,
    ).logits
    return log_softmax(logits, TEMPERATURE)


def written(model):
    """Six responses of the probe, three at a time: -> Rollout.

    Two prompts are longer than the model's window, if that can be tried. Every twelfth token of
    the vocabulary is an end, so some rows leave early, and others join while the rest go on.
    """
    config = model.config.get_text_config()
    longest = max(8, min(window(config) + 4, positions(config) - WRITTEN))
    lengths = (longest, 2, 4, longest - 1, 3, 6)
    vocab_size = len(model.get_input_embeddings().weight)
    return slots.rollout(
        model,
        [probe_prompt(model, length) for length in lengths],
        max_new_tokens=WRITTEN,
        temperature=TEMPERATURE,
        eos_ids=list(range(0, vocab_size, 12)),
        seeds=list(range(len(lengths))),
        in_flight=3,
    )


def probe_prompt(model, length):
    """`length` token ids from the middle of the vocabulary: list of int.

    Its beginning is full of special tokens. Some models have never seen them, and amplify rounding
    in bfloat16 when they read them.
    """
    vocab_size = len(model.get_input_embeddings().weight)
    return [(vocab_size // 2 + 37 * i) % vocab_size for i in range(length)]


def window(config):
    """The longest sliding or local window of a configuration, tokens; 0 if none can be tried."""
    lengths = [0]
    for name in WINDOWS:
        length = getattr(config, name, None)
        if isinstance(length, int) and length <= LONGEST_WINDOW:
            lengths.append(length)
    return max(lengths)


# --- memory --------------------------------------------------------------------------------------


def activations(model, device, width):
    """How many tokens may be in a micro-batch, so that its activations fit into memory: int.

    They may take 512 MiB on a CPU, and an eighth of a GPU's memory. width: bytes a value. There
    are 17 values a token, layer and hidden unit (arXiv 2205.05198, section 4.1: 34 bytes in 16
    bits, without attention scores, which are not kept). With checkpointed layers it is 1, and 17
    in the layer at hand. This is rough: norms and residuals stay float32 under autocast.

    On one thread, SmolLM2 in parts of one response took 1.1 times as long as in parts of two or
    more.
    """
    config = model.config.get_text_config()
    layers = config.num_hidden_layers
    room = 2**29  # bytes
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory // 8
    values = 17 * layers  # a hidden unit
    if model.is_activation_checkpointing:
        values = layers + 17
    return max(1, room // (values * width * config.hidden_size))


def checkpoint_layers(model):
    """Keep only the inputs of the layers for the backward pass, and compute the rest again there.

    transformers does so in layers that are in training mode. So the layers are put in training
    mode, but not what is inside them, and a dropout of the layer's own is set to 0. UserError for
    an architecture without such layers.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no layers to checkpoint; "
            "leave --gradient-checkpointing out"
        )
    model.activation_checkpointing_enable()
    for layer in layers:
        layer.training = True
        for name, value in vars(layer).items():
            if "dropout" in name and isinstance(value, float):
                setattr(layer, name, 0.0)
