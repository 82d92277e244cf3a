"""teacher.py: the teacher grades every token that the student wrote (paper 2.2).

    check_pair   do the two models speak of the same tokens at all?
    split        a model as trunk (ids -> hidden states) and head (hidden states -> logits), so that logits can be made
                 where and when they are needed
    grade        both models over the student's responses, a micro-batch at a time: loss and diagnostics a position
    Pair         the two models loaded, checked and ready to write and to grade

The teacher reads the student's very token ids; nothing is decoded and encoded again.
"""
import contextlib
import re
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from loss import in_chunks
from rollout import encode, position_ids, rollout


def load(path, *, device="cpu", dtype=torch.float32, device_map=None, trust_remote_code=False):
    """A causal language model from a directory or the hub, in eval mode:
    dropout would make sampled and scored softmax differ. device_map: of transformers, in place of device.

    Read from safetensors alone, as a pickle may run code; code of the checkpoint's own runs with trust_remote_code.
    Raises ValueError with the path for what is no whole checkpoint of a causal language model: a weight that is missing
    or of another shape, which transformers would replace by random numbers, is one; so is a model that reads ahead.
    """
    with of_checkpoint(path):
        model, found = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, device_map=device_map, use_safetensors=True, trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True, output_loading_info=True)
    lacks = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if lacks:
        raise ValueError(f"{path}: {lacks[0]} ({len(lacks)} such in all) is missing, or has another shape than "
                         "config.json says; take a whole checkpoint")
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError(f"{path}: the devices here do not hold it; take a smaller model, or --teacher-dtype bfloat16")
    model = (model if device_map else model.to(device)).eval()
    check_causal(model, path)
    return model


def load_tokenizer(path, trust_remote_code=False):
    """The tokenizer of a directory or of the hub; ValueError with the path where there is none."""
    check_directory(path)
    with of_checkpoint(path):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def check_directory(path):
    """ValueError where a path is no hub's name and no directory of safetensors: said at once, not by a search online.

    A hub's name is NAME or OWNER/NAME; where OWNER is a folder here, a folder is meant.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{path}: no config.json there; give the directory of a checkpoint")
        if not next(folder.glob("*.safetensors"), None):
            raise ValueError(f"{path}: no safetensors there, and nothing else is read, since a pickle may run code; "
                             "convert it where you trust it: from_pretrained, then save_pretrained")
    elif folder.exists():
        raise ValueError(f"{path}: a file; give the directory of a checkpoint")
    elif not re.fullmatch(r"[\w.-]*\w[\w.-]*(/[\w.-]*\w[\w.-]*)?", path):
        raise ValueError(f"{path}: no such directory; give that of a checkpoint, or a hub name")
    elif "/" in path and folder.parent.is_dir():
        raise ValueError(f"{path}: no such directory, and no hub name, as there is a folder {folder.parent} here; give "
                         "the directory of a checkpoint")


@contextlib.contextmanager
def of_checkpoint(path):
    """Whatever broken files make transformers raise is a ValueError with their path, in one line."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            error = "it brings code of its own; if you have read and trust it, add --trust-remote-code"
        said = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} cannot be read: {said or type(error).__name__}; give a directory or hub name of a "
                         "causal language model with its tokenizer") from None


class NoMemory(MemoryError):
    """With a message that says which flag to change."""


@contextlib.contextmanager
def in_memory(what):
    """What runs out of memory inside says while doing what, and which flag to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or isinstance(error, NoMemory):
            raise
        raise NoMemory(f"out of memory while {what}") from error


def is_out_of_memory(error):
    """PyTorch has a class for a GPU's memory, and only words for a CPU's and for that of CUDA's libraries: bool."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in (
        "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"))


@torch.no_grad()
def check_causal(model, path):
    """ValueError where a later token changes an earlier logit (BERT, which transformers loads as causal too), or where
    logits are not finite.
    """
    embedding = model.get_input_embeddings().weight                                                          # (V, H)
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=embedding.device) % len(embedding)               # (2, 4)
    z = model(input_ids=ids).logits[:, :3]                                                                   # (2, 3, V)
    if not z.isfinite().all():
        raise ValueError(f"{path}: its logits are not finite; the checkpoint is damaged, or outgrows --dtype")
    if (z[0] - z[1]).abs().max() > torch.finfo(z.dtype).eps ** 0.5 * z.abs().max():      # far above rounding
        raise ValueError(f"{path}: {type(model).__name__} is no causal language model, a later token changes what it "
                         "says of an earlier one; take a decoder")


def pick_device(name, *dtypes):
    """A torch.device; "auto" is cuda where there is one, else cpu. ValueError for one that is not there, or that cannot
    compute in one of the dtypes (names).
    """
    if name.startswith("mps"):
        raise ValueError("--device mps: it has no float64, with which tokens are drawn; take --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}; --device cpu works everywhere") from None
    if device.type == "meta":
        raise ValueError("--device meta: it holds no numbers; take --device cpu")
    if device.type == "cuda" and "bfloat16" in dtypes and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError("--dtype bfloat16: this GPU does not compute in it; take --dtype float32")
    return device


def freeze(model):
    """The teacher never learns."""
    return model.eval().requires_grad_(False)


def checkpoint_layers(model):
    """Keep the inputs of the layers for the backward pass and compute the rest again: memory for one more forward.

    transformers does so in layers that are in training mode, and only where grad is enabled; what is inside them stays
    in eval mode, and a layer that drops out by itself no longer does.
    Raises ValueError for an architecture that has no such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers to checkpoint; leave --gradient-checkpointing out")
    model.activation_checkpointing_enable()
    for layer in layers:
        layer.training = True                                                   # of the layer alone, not of its parts
        for name, x in vars(layer).items():
            if "dropout" in name and isinstance(x, float):
                setattr(layer, name, 0.0)


def eos_ids(model, tokenizer):
    """Every token id that ends a response of this model, from its generation config, its config
    and its tokenizer: set of int.
    """
    found = set()
    config = model.config.get_text_config()                             # that of the text part, where there are more
    for ids in (model.generation_config.eos_token_id, getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return found


def check_pair(student, teacher, student_tokenizer, teacher_tokenizer):
    """The number of token ids that both models share and may sample and score: int.

    Models of one family pad their vocabularies to different sizes (Qwen2.5: 151,936 rows up to 3B, 152,064 from 7B on;
    real tokens stop near 151,665). Cut to the real tokens *before* the softmax, the padding gets no probability.
    Raises ValueError when the token -> id maps differ, with the first tokens that do, when a model has no row for a
    token that ends a response, or when no token ends one. Warns where the pair works but may surprise: other tokens
    without a row (they are cut; Gemma 3's <image_soft_token> is one), other eos or special tokens, another chat
    template, a BOS that only one of the tokenizers writes.
    """
    check_tokens(student_tokenizer, teacher_tokenizer)
    tokens = student_tokenizer.get_vocab()                                                  # token -> id
    ends = [eos_ids(student, student_tokenizer), eos_ids(teacher, teacher_tokenizer)]
    rows = [model.get_output_embeddings().weight.size(0) for model in (student, teacher)]
    size = min(*rows, max(tokens.values()) + 1)
    cut = [token for token, i in tokens.items() if i >= size]
    beyond = sorted(i for i in ends[0] | ends[1] if i >= size)
    if beyond:
        raise ValueError(f"token {beyond[0]} ends a response, and student and teacher have output rows for {size} "
                         "tokens; mend eos_token_id in generation_config.json or config.json")
    if len(cut) > size // 100:
        raise ValueError(f"student and teacher have {rows[0]} and {rows[1]} output rows "
                         f"for {max(tokens.values()) + 1} tokens; take checkpoints with their own tokenizers")
    if cut:
        warnings.warn(f"no output row for {len(cut)} tokens, which can be neither sampled nor scored: {cut[:3]}")
    if not ends[0] | ends[1]:
        raise ValueError("neither student nor teacher has a token that ends a response, so that none would end; "
                         "set eos_token_id in the generation_config.json of one of them")
    if ends[0] != ends[1]:
        warnings.warn(f"student ends a response with {_names(student_tokenizer, ends[0])}, teacher with "
                      f"{_names(student_tokenizer, ends[1])}: any of them ends a rollout")
    specials = [set(tokenizer.all_special_tokens) for tokenizer in (student_tokenizer, teacher_tokenizer)]
    if specials[0] != specials[1]:
        warnings.warn(f"special tokens of only one of the two: {sorted(specials[0] ^ specials[1])}")
    if student_tokenizer.chat_template != teacher_tokenizer.chat_template:
        warnings.warn("chat templates differ: both models read the student's text")
    text = next(iter(tokens))
    if not student_tokenizer.chat_template and student_tokenizer(text).input_ids != teacher_tokenizer(text).input_ids:
        warnings.warn(f"the tokenizers encode {text!r} differently, by a BOS perhaps: both models read the student's "
                      "ids")
    return size


def check_tokens(student_tokenizer, teacher_tokenizer):
    """ValueError where the two map a token to different ids, with the first tokens that differ."""
    mine, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()             # token -> id
    if mine == theirs:
        return

    def place(vocab, token):
        return vocab.get(token, "absent")
    differ = sorted((t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t)),
                    key=lambda t: (mine.get(t, theirs.get(t)), t))
    first = ", ".join(f"{t!r} (student {place(mine, t)}, teacher {place(theirs, t)})" for t in differ[:3])
    raise ValueError(f"student and teacher disagree on {len(differ)} token ids: {first}; "
                     "take a teacher with the student's tokenizer")


def _names(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(sorted(ids)) or "nothing"


class Split(NamedTuple):
    """A model in two parts, whose composition is the model's own logits over the first V tokens."""
    trunk: Callable      # ids (b, L), attention_mask (b, L) -> (b, L, H)
    head: Callable       # (..., H) -> (..., V)
    own_logits: bool     # true where the model does more than a linear head: then H = V and the head is the identity
    ddp: Callable | None = None      # of a student that several processes train together, see learning


class Head:
    """The first V rows of a model's output layer: (..., H) -> (..., V)."""

    def __init__(self, linear, vocab_size):
        self.linear, self.rows = linear, vocab_size

    def _cut(self, x):
        return x if x is None or len(x) == self.rows else x[:self.rows]         # a slice has a backward pass of its own

    weight = property(lambda self: self._cut(self.linear.weight))                           # (V, H)
    bias = property(lambda self: self._cut(self.linear.bias))                               # (V,) or None

    def __call__(self, h):
        return linear(h.to(self.linear.weight.device), self.weight, self.bias)


@torch.no_grad()
def _agrees(model, head):
    """Does head(last hidden state) equal the model's logits on a few tokens?"""
    ids = (torch.arange(8, device=head.weight.device) % len(head.weight)).unsqueeze(0)      # (1, 8)
    own, made = model(input_ids=ids).logits, head(model.base_model(input_ids=ids).last_hidden_state)
    return (own - made.to(own.device)).abs().max() <= torch.finfo(own.dtype).eps * own.abs().max()


def split(model, vocab_size):
    """Split(trunk, head) of a transformers causal model, over its first vocab_size tokens.

    Where logits are more than a linear map of the last hidden state (soft-capping in Gemma 2, scaling in Cohere) the
    two are compared once, here, found to differ, and the trunk gives the model's own logits instead; memory then grows
    with N x V, and a warning says so.
    """
    head = model.get_output_embeddings()
    if _agrees(model, head):
        def trunk(ids, attention_mask):
            return model.base_model(input_ids=ids, attention_mask=attention_mask,
                                    position_ids=position_ids(attention_mask), use_cache=False).last_hidden_state
        return Split(trunk, Head(head, vocab_size), False)

    def trunk(ids, attention_mask):
        return model(input_ids=ids, attention_mask=attention_mask, position_ids=position_ids(attention_mask),
                     use_cache=False).logits[..., :vocab_size]
    warnings.warn(f"{type(model).__name__} does more than a linear output head: "
                  "its own logits are used, at more memory")
    return Split(trunk, lambda h: h, True)


def states(trunk, ids, attention_mask, is_response):
    """The hidden states that predict the response tokens, packed: (b, L), (b, L), (b, L) bool -> (N, H)."""
    h = trunk(ids, attention_mask)                                                  # (b, L, H)
    return h[:, :-1][is_response[:, 1:]]                                            # the state at t-1 predicts token t


def micro_batches(rollout, budget, share=(0, 1)):
    """Cut a rollout into parts of at most `budget` padded tokens (at least one row), rows of like length together.

    share: (rank, processes), of which each takes every so many rows.
    Yields rows (b,), ids (b, L), attention_mask (b, L), is_response (b, L)
    without columns that are padding in every row.
    """
    mask = rollout.attention_mask
    is_response = torch.zeros_like(mask)
    is_response[:, mask.size(1) - rollout.response_mask.size(1):] = rollout.response_mask    # (B, P+T)
    start, end = mask.long().argmax(1).tolist(), (mask.long().cumsum(1).argmax(1) + 1).tolist()
    order = sorted(range(len(start)), key=lambda row: (end[row] - start[row], row))[share[0]::share[1]]
    while order:
        part = [order.pop()]                                                    # the longest first: memory peaks early
        left, right = start[part[0]], end[part[0]]
        while order:
            row = order[-1]
            l, r = min(left, start[row]), max(right, end[row])
            if (r - l) * (len(part) + 1) > budget:
                break
            part, left, right = part + [order.pop()], l, r
        rows = torch.tensor(part, device=mask.device)
        yield rows, *(x[rows, left:right] for x in (rollout.ids, mask, is_response))


def grade(student, teacher, rollout, per_position, *, micro_batch_tokens, temperature=1.0, teacher_temperature=1.0,
          seconds=None, share=(0, 1), chunk=None):
    """Loss and diagnostics at every position of a rollout, a micro-batch at a time, as two Splits see it.

    Yields rows (b,), is_response (b, L), {name: (N,)} from per_position, packed row by row, and the sum of the losses
    (see loss.in_chunks); where grad is enabled call its backward before asking for the next.
    seconds, a dict, collects the time spent in the teacher's trunk. share: of several processes, see micro_batches.
    chunk: positions whose logits exist at a time, see loss.in_chunks.
    """
    parts = list(micro_batches(rollout, micro_batch_tokens, share))
    for i, (rows, ids, mask, is_response) in enumerate(parts):
        started = time.perf_counter()
        with torch.no_grad():
            h_q = states(teacher.trunk, ids, mask, is_response)                             # (N, H')
        if seconds is not None:
            seconds["teacher"] = seconds.get("teacher", 0.0) + time.perf_counter() - started

        def learn():
            h_p = states(student.trunk, ids, mask, is_response)                             # (N, H)
            return in_chunks(per_position, h_p, h_q, student.head, teacher.head, ids[is_response],
                             temperature=temperature, teacher_temperature=teacher_temperature, chunk=chunk)
        yield rows, is_response, *learning(student, learn, last=i == len(parts) - 1)


# --- several processes ---------------------------------------------------------------------------------------------


class Runs(torch.nn.Module):
    """DistributedDataParallel wants a module whose forward it can watch; this one runs what it is given."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, f):
        return f()


def together(model, student):
    """A student's Split with DistributedDataParallel around the model: rank 0's weights everywhere, and the mean of the
    processes' gradients after a backward. As it is where there is one process.
    """
    if not dist.is_initialized():
        return student
    embedding = model.get_input_embeddings().weight
    ids = (torch.arange(8, device=embedding.device) % len(embedding)).unsqueeze(0)                           # (1, 8)
    total = student.head(student.trunk(ids, torch.ones_like(ids))).sum()
    idle = [g is None for g in torch.autograd.grad(total, list(model.parameters()), allow_unused=True)]  # experts, say
    return student._replace(ddp=DistributedDataParallel(
        Runs(model), forward_sync_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=any(idle)))


def learning(student, f, last):
    """f(), whose backward through the last micro-batch of an update sums the gradients of all processes."""
    if student.ddp is None or not torch.is_grad_enabled():
        return f()
    with contextlib.nullcontext() if last else student.ddp.no_sync():
        return student.ddp(f)


# --- the two together ----------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """Student and teacher on one device, over the V tokens that they share. Pair.load makes one.

    The student's weights are float32 whatever the dtype of the computation; the teacher is frozen.
    """
    student: torch.nn.Module
    teacher: torch.nn.Module
    tokenizer: Callable      # the student's
    end_id: int | None       # the token with which the teacher ends a response
    ending: dict             # eos_ids, pad_id, vocab_size (and in_flight): what every rollout of either model is given
    splits: tuple            # Split of the student, Split of the teacher
    device: torch.device
    autocast: Callable       # context manager of the computation's dtype

    @classmethod
    def load(cls, student, teacher, *, device="auto", dtype="float32", teacher_dtype="", teacher_device_map="",
             gradient_checkpointing=False, trust_remote_code=False):
        """Two directories or hub names -> Pair. Raises ValueError where they cannot be read (load) or do not fit
        (check_pair); what costs least is looked at first.
        """
        device = pick_device(device, dtype, teacher_dtype)
        mine, theirs = (load_tokenizer(path, trust_remote_code) for path in (student, teacher))
        check_tokens(mine, theirs)
        plain, dtype = dtype == "float32", getattr(torch, dtype)
        autocast = contextlib.nullcontext if plain else lambda: torch.autocast(device.type, dtype)
        student = load(student, device=device, trust_remote_code=trust_remote_code)
        teacher = freeze(load(teacher, device=device, dtype=getattr(torch, teacher_dtype) if teacher_dtype else dtype,
                              device_map=teacher_device_map or None, trust_remote_code=trust_remote_code))
        if gradient_checkpointing:
            checkpoint_layers(student)
        vocab_size = check_pair(student, teacher, mine, theirs)
        eos = eos_ids(student, mine) | eos_ids(teacher, theirs)
        end_id = theirs.eos_token_id if theirs.eos_token_id is not None else min(eos, default=None)
        return cls(student, teacher, mine, end_id,
                   dict(eos_ids=eos, pad_id=mine.pad_token_id or 0, vocab_size=vocab_size),
                   (together(student, split(student, vocab_size)), split(teacher, vocab_size)), device, autocast)

    def encode(self, rows, *, max_prompt_tokens, new_tokens, thinking="default"):
        """Questions {"prompt", ...} -> those that fit, each with its token ids: list of {"prompt", ..., "ids"}.

        Longer prompts are dropped and counted, never cut. thinking: "on", "off" or "default", for chat templates that
        have the switch. Raises ValueError when none is left, when a prompt and new_tokens outgrow a model, or when a
        token has no output row.
        """
        options = {} if thinking == "default" else {"enable_thinking": thinking == "on"}
        rows = [{**row, "ids": encode(self.tokenizer, row["prompt"], **options)} for row in rows]
        fit = [row for row in rows if 0 < len(row["ids"]) <= max_prompt_tokens]
        if not fit:
            raise ValueError(f"no prompt has 1 to {max_prompt_tokens} tokens; raise --max-prompt-tokens")
        if len(fit) < len(rows):
            dropped = f"{len(rows) - len(fit)} of {len(rows)} prompts dropped"
            warnings.warn(f"{dropped}: empty, or longer than {max_prompt_tokens} tokens")
        for row in fit:
            self.check_fits(row["ids"], new_tokens, f"prompt {str(row['prompt'])[:80]!r}")
        return fit

    def check_fits(self, ids, new_tokens, what):
        """ValueError where token ids and what is still to be written outgrow a model, or have no output row."""
        for model in (self.student, self.teacher):
            room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            if room and len(ids) + new_tokens > room:
                raise ValueError(f"{what} and its response need {len(ids) + new_tokens} tokens, {model.name_or_path} "
                                 f"holds {room}; lower --max-new-tokens")
        if max(ids) >= self.ending["vocab_size"]:
            raise ValueError(f"a token of {what} has no output row; leave it out")

    def micro_batch_tokens(self):
        """How many tokens' activations fit into a quarter of a GiB on a CPU, an eighth of a GPU's memory, in the
        student: int.

        17 values a token, layer and hidden unit (arXiv 2205.05198, section 4.1: 34 bytes in 16 bits, attention scores
        aside, which no longer are kept), with checkpointed layers one, and 17 in the layer at hand. Rough: norms and
        residuals stay float32 under autocast.
        """
        config = self.student.config.get_text_config()
        width = 4 if self.autocast is contextlib.nullcontext else 2                                     # bytes a value
        room = (torch.cuda.get_device_properties(self.device).total_memory // 8 if self.device.type == "cuda"
                else 2 ** 28)
        layers = config.num_hidden_layers
        kept = layers + 17 if self.student.is_activation_checkpointing else 17 * layers       # values a hidden unit
        return max(1, room // (kept * width * config.hidden_size))

    def write(self, prompts, *, n=1, max_new_tokens, temperature=1.0, seed):
        """The student's responses to prompts (token ids), from exactly the softmax that is scored: -> Rollout."""
        with self.autocast():
            return rollout(self.student, prompts, n=n, max_new_tokens=max_new_tokens, temperature=temperature,
                           **self.ending, generator=torch.Generator(self.device).manual_seed(seed))
