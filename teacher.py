"""teacher.py: the teacher grades every token that the student wrote (paper 2.2).

    log_probs       log p(v | s_t) of a model at the states s_t before each response token: the
                    plain way, (N, V) at once. What follows needs less memory
    make_pair       two models with the same tokens -> Pair; others are refused
    read_by_teacher the same responses behind prompts of the teacher's own, if it has some
    micro_batches   a rollout in parts that fit into memory
    states          the hidden states before each response token, for one part
    values_of       a loss and diagnostics at every token of a part: differentiable
    grade           diagnostics at every token of a rollout: measured only

The teacher reads exactly the token ids that the student wrote; nothing is decoded and encoded
again. Only its prompt may be another one: it may have a hint in it (for a copy of the student), or
a template of the teacher's own.

To copy: with loss.py and rollout.py.
"""

import contextlib
import math
import warnings
from dataclasses import dataclass

import torch

from loss import in_chunks
from rollout import as_rollout, left_pad, log_softmax, merge_ends, position_ids

LOGITS_OF_A_CHUNK = {"cpu": 2**23, "cuda": 2**28}  # 32 MiB and 1 GiB in float32


class UserError(ValueError):
    """What a user can mend. The commands print it as one line and exit with its code."""

    code = 2


def log_probs(
    model, ids, attention_mask, is_response, *, vocab_size=None, ends=(), temperature=1.0
):
    """log softmax(logits / T) at the states that predict the response tokens, packed row by row.

    ids (B, L), attention_mask (B, L) bool, is_response (B, L) bool -> (N, V), nats, differentiable.
    For a rollout r: log_probs(model, r.ids, r.attention_mask, r.is_response). vocab_size: the
    logits are cut to so many tokens; None: to none. ends: end tokens that count as one, such as
    pair.eos_ids.
    """
    logits = model(
        input_ids=ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
    ).logits  # (B, L, V)
    logits = logits[:, :-1][is_response[:, 1:].bool()]  # (N, V): the state at t-1 predicts token t
    log_p = log_softmax(logits[:, :vocab_size], temperature)
    return merge_ends(log_p, ends)


# --- does the pair fit? -------------------------------------------------------------------------


@dataclass
class Pair:
    """Student and teacher over the tokens that they share.

    make_pair makes one, checks that the two fit, and freezes the teacher. Without tokenizers:
    Pair(student, teacher, None, V, ends), which is enough to write, to grade and to train.
    """

    student: torch.nn.Module
    teacher: torch.nn.Module
    tokenizer: object  # the student's
    vocab_size: int  # V: the tokens that both may draw and score
    eos_ids: list  # every token that ends a response of either, the student's own first
    merge_ends: bool = True  # do they count as one token?
    pad_id: int = 0
    dtype: torch.dtype = torch.float32  # of the computation; the student's weights are float32
    micro_batch_tokens: int = 16384  # padded tokens in one forward and backward
    in_flight: int | None = None  # responses written at a time (plumbing/slots.py); None: all
    teacher_tokenizer: object = None  # the same tokens; its chat template is for teacher_prompt

    @property
    def device(self):
        """The torch.device of the student."""
        return self.student.get_input_embeddings().weight.device

    @property
    def chunk(self):
        """How many positions' logits exist at a time, see loss.in_chunks: int."""
        return max(128, LOGITS_OF_A_CHUNK.get(self.device.type, 2**28) // self.vocab_size)

    @property
    def sampling(self):
        """The arguments of `rollout` that follow from the two models: dict."""
        return {
            "eos_ids": self.eos_ids,
            "merge": self.merge_ends,
            "pad_id": self.pad_id,
            "vocab_size": self.vocab_size,
        }

    def autocast(self):
        """A context in which models compute in self.dtype."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def make_pair(student, teacher, student_tokenizer, teacher_tokenizer, **settings):
    """Two models and their tokenizers -> Pair.

    settings: fields of Pair. Sets both models to eval mode: with dropout, what is drawn is not what
    is scored. Freezes the teacher, so a student that is to learn has to be another object.
    UserError if the two do not fit, see check_pair.
    """
    student.eval()
    teacher.eval()
    vocab_size = check_pair(student, teacher, student_tokenizer, teacher_tokenizer)
    for model in (student, teacher):
        if not has_linear_head(model):
            warnings.warn(
                f"{type(model).__name__} does more than a linear output head: its own logits are "
                "used, which takes more memory",
                stacklevel=2,
            )
    ends = eos_ids(student, student_tokenizer) | eos_ids(teacher, teacher_tokenizer)
    own = student_tokenizer.eos_token_id
    pad_id = student_tokenizer.pad_token_id or 0
    return Pair(
        student=student,
        teacher=teacher.requires_grad_(False),
        tokenizer=student_tokenizer,
        vocab_size=vocab_size,
        eos_ids=sorted(ends, key=lambda i: (i != own, i)),
        pad_id=pad_id if pad_id < vocab_size else 0,  # a pad token may have no embedding
        teacher_tokenizer=teacher_tokenizer,
        **settings,
    )


def eos_ids(model, tokenizer):
    """The end tokens that generation config, config and tokenizer name: set of token ids."""
    config = model.config.get_text_config()  # of the text part, if a model has more
    found = set()
    for ids in (
        model.generation_config.eos_token_id,
        getattr(config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        if isinstance(ids, int):
            found.add(ids)
        elif ids is not None:
            found.update(ids)
    return {i for i in found if i >= 0}  # -1 stands for none


def check_pair(student, teacher, student_tokenizer, teacher_tokenizer):
    """How many token ids the two models share, and may sample and score: int.

    Models of one family pad their vocabularies to different sizes (Qwen2.5: 151,936 rows up to 3B,
    152,064 from 7B on; real tokens stop near 151,665). Logits are cut to the real tokens *before*
    the softmax, so the padding gets no probability.

    UserError if the token ids of the two differ, if neither has an end token, if an end token has
    no output row, or if more than 1 % of the tokens have none. Warns of other tokens without a row
    (Gemma 3's <image_soft_token>), which are cut, and of end tokens that differ.
    """
    check_tokens(student_tokenizer, teacher_tokenizer)
    tokens = student_tokenizer.get_vocab()  # token -> id
    count = max(tokens.values()) + 1
    student_rows = student.get_output_embeddings().weight.size(0)
    teacher_rows = teacher.get_output_embeddings().weight.size(0)
    size = min(student_rows, teacher_rows, count)

    student_ends = eos_ids(student, student_tokenizer)
    teacher_ends = eos_ids(teacher, teacher_tokenizer)
    ends = student_ends | teacher_ends
    if not ends:
        raise UserError(
            "neither student nor teacher has a token that ends a response, so no response would "
            "end; set eos_token_id in the generation_config.json of one of them"
        )
    if max(ends) >= size:
        raise UserError(
            f"token {max(ends)} ends a response, but student and teacher have output rows for "
            f"{size} tokens; correct eos_token_id in generation_config.json or config.json"
        )
    cut = [token for token, i in tokens.items() if i >= size]
    if len(cut) > size // 100:
        raise UserError(
            f"student and teacher have {student_rows} and {teacher_rows} output rows for {count} "
            "tokens; take checkpoints with their own tokenizers"
        )
    if cut:
        warnings.warn(
            f"no output row for {len(cut)} tokens, which can be neither sampled nor scored: "
            f"{cut[:3]}",
            stacklevel=2,
        )
    if student_ends != teacher_ends:
        names = student_tokenizer.convert_ids_to_tokens
        warnings.warn(
            f"student ends a response with {names(sorted(student_ends))}, teacher with "
            f"{names(sorted(teacher_ends))}: see --ends",
            stacklevel=2,
        )
    return size


def check_tokens(student_tokenizer, teacher_tokenizer):
    """UserError if two tokenizers give a token different ids; it names the first such tokens."""
    mine = student_tokenizer.get_vocab()  # token -> id
    theirs = teacher_tokenizer.get_vocab()
    differ = [t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t)]
    if not differ:
        return
    differ.sort(key=lambda t: (mine.get(t, theirs.get(t)), t))
    first = []
    for t in differ[:3]:
        first.append(f"{t!r} (student {mine.get(t, 'absent')}, teacher {theirs.get(t, 'absent')})")
    raise UserError(
        f"student and teacher disagree on {len(differ)} token ids: {', '.join(first)}; take a "
        "teacher with the student's tokenizer"
    )


# --- a teacher that reads another prompt ---------------------------------------------------------


def teacher_ids(row):
    """The token ids of the prompt that the teacher reads: a row's "teacher_ids", or its "ids"."""
    return row.get("teacher_ids", row["ids"])


def read_by_teacher(r, rows, pad_id=0):
    """The same responses behind the prompts that the teacher reads: -> Rollout.

    rows: the prompts of r, {"ids"} and, if the teacher reads another prompt, "teacher_ids". If no
    row has these, the result is r itself. Differs from the paper, whose teacher reads what the
    student reads. Among its future work is such a teacher: a copy of the student that knows more
    because of what it may read.
    """
    if not any("teacher_ids" in row for row in rows):
        return r
    prompts = [teacher_ids(row) for row in rows]
    n = len(r.ids) // len(rows)
    prompt_ids, prompt_mask = left_pad(prompts, pad_id, r.ids.device)  # (m, P'), (m, P')
    return as_rollout(
        prompt_ids.repeat_interleave(n, dim=0),  # (B, P')
        prompt_mask.repeat_interleave(n, dim=0),
        r.ids[:, -r.log_p.size(1) :],  # (B, T)
        r.log_p,
        r.response_mask.sum(1),
        ~r.truncated,
    )


# --- a rollout in micro-batches -----------------------------------------------------------------


@dataclass
class Text:
    """What a model reads: b responses behind their prompts, in L columns."""

    ids: torch.Tensor  # (b, L)
    attention_mask: torch.Tensor  # (b, L) bool
    is_response: torch.Tensor  # (b, L) bool


@dataclass
class MicroBatch(Text):
    """Some responses of a rollout as the student reads them, with N response tokens in all."""

    for_teacher: Text  # the same responses as the teacher reads them, (b, L')
    rows: list  # b ints: which rows of the rollout
    y: torch.Tensor  # (N,) the response tokens, row by row
    log_p: torch.Tensor  # (N,) their log-probabilities when they were drawn, nats
    place: torch.Tensor  # (N,) which token of its response each is: 0, 1, ...


def micro_batches(r, budget, teacher_reads=None):
    """Cut a rollout into parts of at most `budget` padded tokens: -> list of MicroBatch.

    The budget holds for what each of the two models reads. A row that exceeds it is a part of its
    own. Rows of similar length are together, the longest first, so that memory peaks early.
    Columns that are padding in every row of a part are left out. teacher_reads: the Rollout from
    read_by_teacher; None: the teacher reads what the student reads.
    """
    columns = [used_columns(r)]
    if teacher_reads is not None and teacher_reads is not r:
        columns.append(used_columns(teacher_reads))

    def width(rows):
        """Columns that some rows need, in the wider of the two texts."""
        widths = [max(end[i] for i in rows) - min(start[i] for i in rows) for start, end in columns]
        return max(widths)

    longest_first = sorted(range(len(r.ids)), key=lambda row: -width([row]))
    groups = []
    for row in longest_first:
        rows = groups[-1] + [row] if groups else [row]
        if groups and width(rows) * len(rows) <= budget:
            groups[-1] = rows
        else:
            groups.append([row])
    return [cut(r, rows, teacher_reads or r) for rows in groups]


def used_columns(r):
    """The column of each row's first token, and the one behind its last: two lists of B ints."""
    mask = r.attention_mask.long()
    start = mask.argmax(1).tolist()
    end = (mask.cumsum(1).argmax(1) + 1).tolist()
    return start, end


def cut(r, rows, teacher_reads):
    """Some rows of a rollout as a part: row numbers -> MicroBatch."""
    mine = rows_of(r, rows)
    written = r.response_mask[rows]  # (b, T)
    place = torch.arange(written.size(1), device=written.device).expand_as(written)
    return MicroBatch(
        **vars(mine),
        for_teacher=mine if teacher_reads is r else rows_of(teacher_reads, rows),
        rows=rows,
        y=mine.ids[mine.is_response],
        log_p=r.log_p[rows][written],
        place=place[written],
    )


def rows_of(r, rows):
    """Some rows of a rollout, without the columns that are padding in all of them: -> Text."""
    used = r.attention_mask[rows].any(0).nonzero().squeeze(-1).tolist()
    columns = slice(used[0], used[-1] + 1)
    return Text(r.ids[rows, columns], r.attention_mask[rows, columns], r.is_response[rows, columns])


# --- from a micro-batch to hidden states, from hidden states to log-probabilities ----------------


def states(model, text):
    """The hidden states before each response token of a Text, packed row by row: (N, H).

    If a model's head is not linear, its own logits take the place of hidden states, and H is the
    number of its output rows.
    """
    h = trunk_of(model)(
        input_ids=text.ids,
        attention_mask=text.attention_mask,
        position_ids=position_ids(text.attention_mask),
        use_cache=False,
    )[0]  # (b, L, H)
    return h[:, :-1][text.is_response[:, 1:]]  # the state at t-1 predicts token t


def trunk_of(model):
    """The part of a model that makes its hidden states; all of it if its head is not linear."""
    if hasattr(model, "trunk"):
        return model.trunk  # of a sharded model, see plumbing/shard.py
    return model.base_model if has_linear_head(model) else model


def log_softmax_of(pair, model, temperature=1.0):
    """The way from `states` to log-probabilities: a function (c, H) -> (c, V), nats.

    It applies the head, cuts the logits to pair.vocab_size, divides them by the temperature, and
    merges the ends if the pair wants it.
    """
    head = model.get_output_embeddings() if has_linear_head(model) else None
    merged = pair.eos_ids if pair.merge_ends else []
    ends = torch.tensor(merged, dtype=torch.long, device=pair.device)

    def to_log_probs(h):
        logits = h if head is None else head(h)
        log_p = log_softmax(logits[:, : pair.vocab_size], temperature)
        return merge_ends(log_p, ends)

    return to_log_probs


def has_linear_head(model):
    """Are a model's logits its head's output for the last hidden states? -> bool.

    They are not with soft-capping (Gemma 2) or scaling (Cohere). Llama 4 has no trunk of its own.
    It is tried once, and kept as model.linear_head.
    """
    if not hasattr(model, "linear_head"):
        model.linear_head = try_head(model)
    return model.linear_head


@torch.no_grad()
def try_head(model):
    """Apply a model's head to its last hidden states of 8 tokens: are these its logits? -> bool."""
    if model.base_model is model:
        return False
    head = model.get_output_embeddings()
    ids = torch.arange(8, device=head.weight.device).unsqueeze(0) % len(head.weight)  # (1, 8)
    inputs = {"input_ids": ids, "position_ids": ids, "use_cache": False}
    logits = model(**inputs).logits
    h = model.base_model(**inputs)[0]
    made = head(h.to(head.weight.dtype))  # of a Mamba in bfloat16 the states are float32
    off = (logits - made).abs().max()
    return bool(off <= torch.finfo(logits.dtype).eps * logits.abs().max())


def values_of(
    pair, part, per_position, *, temperature=1.0, teacher_temperature=1.0, with_teacher=True
):
    """per_position (see loss.in_chunks) at every response token of a MicroBatch: {name: (N, ...)}.

    Differentiable in the student. with_teacher=False: the teacher does not read, log_q is None.
    """
    with pair.autocast():
        h_p = states(pair.student, part)  # (N, H)
        h_q = None
        if with_teacher:
            with torch.no_grad():
                h_q = states(pair.teacher, part.for_teacher)  # (N, H')
        log_p_of = log_softmax_of(pair, pair.student, temperature)
        log_q_of = log_softmax_of(pair, pair.teacher, teacher_temperature)
        return in_chunks(per_position, h_p, h_q, log_p_of, log_q_of, part.y, pair.chunk)


@torch.no_grad()
def grade(pair, r, per_position, *, teacher_reads=None, temperature=1.0, teacher_temperature=1.0):
    """per_position at every response token of a rollout, measured only: -> {name: (B, T)}.

    A place without a token has NaN (0 if the values are integers). Values (N, ...) become
    (B, T, ...). per_position: see loss.in_chunks. teacher_reads: see micro_batches.
    """
    grids = {}
    for part in micro_batches(r, pair.micro_batch_tokens, teacher_reads):
        values = values_of(
            pair,
            part,
            per_position,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
        )
        rows = torch.tensor(part.rows, device=part.ids.device)
        row_of_token = rows[part.is_response.nonzero()[:, 0]]  # (N,)
        for name, x in values.items():
            if name not in grids:
                empty = math.nan if x.is_floating_point() else 0
                grids[name] = x.new_full((*r.response_mask.shape, *x.shape[1:]), empty)
            grids[name][row_of_token, part.place] = x
    return grids
