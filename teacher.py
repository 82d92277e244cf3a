"""teacher.py: the teacher grades every token that the student wrote (paper 2.2).

    log_probs    log p(v | s_t) of a model at the states s_t before each response token: the plain form, (N, V)
    check_pair   do the two models speak of the same tokens at all?
    split        a model as trunk (ids -> hidden states) and head (hidden states -> logits)
    Pair         the two together. Its `grade` is log_probs of both, the loss and the diagnostics at every position,
                 a micro-batch and a chunk at a time

The teacher reads the student's very token ids; nothing is decoded and encoded again.
To copy: with loss.py and rollout.py. Pair.of takes models; Pair.load, which reads checkpoints, needs plumbing/.
"""

import contextlib
import math
import warnings
from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch

from loss import in_chunks
from rollout import Rollout, left_pad, one_end, position_ids, rollout


def log_probs(
    model, ids, attention_mask, is_response, *, vocab_size=None, ends=(), temperature=1.0
):
    """log softmax(logits / T) at the states that predict the response tokens, packed row by row:
    (B, L) ids, (B, L) bool, (B, L) bool true at response tokens -> (N, V), nats, differentiable.

    A model's opinion of a rollout r: log_probs(model, r.ids, r.attention_mask, r.is_response); of one by Pair.write,
    to which all ends are one, with ends=pair.ending["eos_ids"].
    """
    logits = model(
        input_ids=ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
    ).logits  # (B, L, V)
    z = logits[:, :-1][is_response[:, 1:]]  # (N, V): the state at t-1 predicts token t
    return (one_end(z[:, :vocab_size].float(), ends, temperature) / temperature).log_softmax(-1)


# --- does the pair fit? --------------------------------------------------------------------------------------------


def eos_ids(model, tokenizer):
    """Every token id that ends a response of this model, by its generation config, config and tokenizer: set of int."""
    config, found = model.config.get_text_config(), set()  # of the text part, if more
    for ids in (
        model.generation_config.eos_token_id,
        getattr(config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return {i for i in found if i >= 0}  # -1 stands for none


def check_pair(student, teacher, student_tokenizer, teacher_tokenizer):
    """The number of token ids that both models share and may sample and score: int.

    Models of one family pad their vocabularies to different sizes (Qwen2.5: 151,936 rows up to 3B, 152,064 from 7B on;
    real tokens stop near 151,665). Cut to the real tokens *before* the softmax, the padding gets no probability.
    Raises ValueError where the two have other token ids, no row for a token that ends a response, or no such token.
    Warns of what may surprise: other tokens without a row (Gemma 3's <image_soft_token>: cut), other eos tokens.
    """
    check_tokens(student_tokenizer, teacher_tokenizer)
    tokens = student_tokenizer.get_vocab()  # token -> id
    ends = [eos_ids(student, student_tokenizer), eos_ids(teacher, teacher_tokenizer)]
    rows = [model.get_output_embeddings().weight.size(0) for model in (student, teacher)]
    size = min(*rows, max(tokens.values()) + 1)
    cut = [token for token, i in tokens.items() if i >= size]
    beyond = sorted(i for i in ends[0] | ends[1] if i >= size)
    if beyond:
        raise ValueError(
            f"token {beyond[0]} ends a response, and student and teacher have output rows for {size} "
            "tokens; mend eos_token_id in generation_config.json or config.json"
        )
    if len(cut) > size // 100:
        raise ValueError(
            f"student and teacher have {rows[0]} and {rows[1]} output rows "
            f"for {max(tokens.values()) + 1} tokens; take checkpoints with their own tokenizers"
        )
    if not ends[0] | ends[1]:
        raise ValueError(
            "neither student nor teacher has a token that ends a response, so that none would end; "
            "set eos_token_id in the generation_config.json of one of them"
        )
    if cut:
        warnings.warn(
            f"no output row for {len(cut)} tokens, which can be neither sampled nor scored: {cut[:3]}"
        )
    if ends[0] != ends[1]:
        names = [student_tokenizer.convert_ids_to_tokens(sorted(ids)) or "nothing" for ids in ends]
        warnings.warn(
            f"student ends a response with {names[0]}, teacher with {names[1]}: see --ends"
        )
    return size


def check_tokens(student_tokenizer, teacher_tokenizer):
    """ValueError where the two map a token to different ids, with the first tokens that differ."""
    mine, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()  # token -> id
    differ = sorted(
        (t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t)),
        key=lambda t: (mine.get(t, theirs.get(t)), t),
    )
    if differ:
        first = ", ".join(
            f"{t!r} (student {mine.get(t, 'absent')}, teacher {theirs.get(t, 'absent')})"
            for t in differ[:3]
        )
        raise ValueError(
            f"student and teacher disagree on {len(differ)} token ids: {first}; "
            "take a teacher with the student's tokenizer"
        )


# --- a model in two parts, a rollout in micro-batches --------------------------------------------------------------


class Split(NamedTuple):
    """A model in two parts, whose composition is the model's own logits over the first V tokens."""

    trunk: Callable  # ids (b, L), attention_mask (b, L) -> (b, L, H)
    head: Callable  # (..., H) -> (..., V)
    own_logits: bool  # true where the model does more than a linear head: then H = V and the head is the identity


def split(model, vocab_size):
    """Split(trunk, head) of a transformers causal model, over its first vocab_size tokens.

    Where logits are more than a linear map of the last hidden state (soft-capping in Gemma 2, scaling in Cohere), which
    is tried once, here, the trunk gives the model's own logits instead; memory then grows with N x V: a warning.
    """
    output = model.get_output_embeddings()

    def trunk(ids, mask):
        return model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False
        ).last_hidden_state

    def logits(ids, mask):
        return model(
            input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False
        ).logits[..., :vocab_size]

    parts = Split(trunk, lambda h: output(h.to(output.weight.device))[..., :vocab_size], False)
    whole = Split(logits, lambda z: z, True)
    ids = torch.arange(8, device=output.weight.device).unsqueeze(0) % vocab_size  # (1, 8)
    with torch.no_grad(), contextlib.suppress(AttributeError):  # Llama 4 has no trunk of its own
        own, made = (part.head(part.trunk(ids, torch.ones_like(ids))) for part in (whole, parts))
        if (own - made.to(own.device)).abs().max() <= torch.finfo(own.dtype).eps * own.abs().max():
            return parts
    warnings.warn(
        f"{type(model).__name__} does more than a linear output head: "
        "its own logits are used, at more memory"
    )
    return whole


def states(trunk, ids, attention_mask, is_response):
    """The hidden states that predict the response tokens, packed: (b, L), (b, L), (b, L) bool -> (N, H)."""
    h = trunk(ids, attention_mask)[:, :-1]  # the state at t-1 predicts token t
    return h[is_response[:, 1:].to(h.device)]


def micro_batches(attention_mask, budget):
    """Cut a rollout (B, L) into parts of at most `budget` padded tokens, or one row; rows of like length together, the
    longest first, so that memory peaks early: yields rows (list of int), the columns that are not all padding (slice).
    """
    start = attention_mask.long().argmax(1).tolist()
    end = (attention_mask.long().cumsum(1).argmax(1) + 1).tolist()
    order = sorted(range(len(start)), key=lambda row: (end[row] - start[row], row))
    while order:
        rows = [order.pop()]
        left, right = start[rows[0]], end[rows[0]]
        while order:
            l, r = min(left, start[order[-1]]), max(right, end[order[-1]])
            if (r - l) * (len(rows) + 1) > budget:
                break
            rows, left, right = rows + [order.pop()], l, r
        yield rows, slice(left, right)


@dataclass
class Pair:
    """Student and teacher over the V tokens that they share; the teacher is frozen. Pair.load or Pair.of makes one."""

    student: torch.nn.Module
    teacher: torch.nn.Module
    tokenizer: Callable  # the student's
    ending: dict  # eos_ids, merge_ends, pad_id, vocab_size, in_flight, decoder: for each rollout
    splits: tuple  # Split of the student, Split of the teacher
    device: torch.device
    autocast: Callable = contextlib.nullcontext  # -> context manager of the computation's dtype
    micro_batch_tokens: int = 16384  # padded tokens in one forward and backward
    chunk: int | None = None  # positions whose logits exist at a time
    whole: Callable = (
        contextlib.nullcontext
    )  # -> context manager inside which a sharded student is whole
    rounds: Callable = int  # micro-batches here -> of the busiest process, if sharded

    @classmethod
    def of(
        cls, student, teacher, student_tokenizer, teacher_tokenizer, *, merge_ends=True, **settings
    ):
        """Two models in eval mode and their tokenizers -> Pair; ValueError where they do not fit, see check_pair."""
        vocab_size = check_pair(student, teacher, student_tokenizer, teacher_tokenizer)
        eos = sorted(
            eos_ids(student, student_tokenizer) | eos_ids(teacher, teacher_tokenizer),
            key=lambda i: (i != student_tokenizer.eos_token_id, i),
        )  # the student's own first
        return cls(
            student,
            teacher.requires_grad_(False),
            student_tokenizer,
            dict(
                eos_ids=eos,
                merge_ends=merge_ends,
                pad_id=student_tokenizer.pad_token_id or 0,
                vocab_size=vocab_size,
            ),
            (split(student, vocab_size), split(teacher, vocab_size)),
            student.get_input_embeddings().weight.device,
            **settings,
        )

    @classmethod
    def load(cls, student, teacher, **how):
        """Two directories or hub names -> Pair, see plumbing.models.load_pair."""
        from plumbing.models import load_pair

        return load_pair(student, teacher, **how)

    def encode(self, rows, **how):
        """Questions {"prompt", ...} -> those that fit, with their token ids {..., "ids"}, see plumbing.prompts."""
        from plumbing.prompts import encode_rows

        return encode_rows(self, rows, **how)

    def write(self, prompts, *, model=None, seed, share=(0, 1), **how):
        """Responses of the student, or of another model, to prompts (token ids), see rollout.rollout: -> Rollout.

        Every prompt has a seed of its own that follows from `seed` and its place. share: (rank, processes), of which
        each writes to every so many-th prompt what it would have written alone.
        """
        draw, mine = torch.Generator().manual_seed(seed), slice(share[0], None, share[1])
        seeds = torch.randint(2**62, (len(prompts),), device="cpu", generator=draw).tolist()
        with (
            self.autocast(),
            self.whole() if model in (None, self.student) else contextlib.nullcontext(),
        ):
            return rollout(
                model or self.student, prompts[mine], seeds=seeds[mine], **self.ending, **how
            )

    def given(self, examples):
        """[(prompt ids, response ids)] as if the student had written them, without their probabilities: -> Rollout."""
        prompts, responses = zip(*examples)
        ids, mask = left_pad(prompts, self.ending["pad_id"], self.device)  # (B, P), (B, P)
        tokens, written = (
            x.flip(1)
            for x in left_pad(  # (B, T), right-padded
                [response[::-1] for response in responses], self.ending["pad_id"], self.device
            )
        )
        return Rollout(
            torch.cat([ids, tokens], 1),
            torch.cat([mask, written], 1),
            torch.cat([torch.zeros_like(mask), written], 1),
            torch.zeros(written.shape),
            ~written[:, -1],
        )

    def grade(
        self,
        r,
        per_position,
        *,
        scale=None,
        with_teacher=True,
        temperature=1.0,
        teacher_temperature=1.0,
    ):
        """per_position (see loss.in_chunks) at every response token of a rollout: -> {name: (B, T)}, elsewhere NaN
        (0 of integers); of what is (N, ...) it makes (B, T, ...).

        scale: leave the gradient of scale * (sum of the losses) in the student; the cut into micro-batches and chunks
        changes nothing of it. None: measure only. Without the teacher log_q is None.
        """
        (student, teacher), out = self.splits, {}
        ends = self.ending["eos_ids"] if self.ending["merge_ends"] else []
        ends = torch.tensor(ends, dtype=torch.long, device=self.device)
        head_p, head_q = (
            lambda h: one_end(student.head(h).float(), ends, temperature),
            lambda h: one_end(teacher.head(h).float(), ends.to(h.device), teacher_temperature),
        )
        parts = [
            (*part, scale) for part in micro_batches(r.attention_mask, self.micro_batch_tokens)
        ]
        idle = self.rounds(len(parts)) - len(
            parts
        )  # a sharded student: every process calls it as often
        parts += [(*parts[0][:2], scale and 0 * scale)] * idle
        for rows, columns, weight in parts:
            ids, mask, is_response = (
                x[rows, columns] for x in (r.ids, r.attention_mask, r.is_response)
            )  # (b, L)
            with self.autocast():
                with torch.no_grad():
                    h_q = (
                        states(teacher.trunk, ids, mask, is_response) if with_teacher else None
                    )  # (N, H')
                with torch.set_grad_enabled(weight is not None):
                    h_p = states(student.trunk, ids, mask, is_response)  # (N, H)
                values = in_chunks(
                    per_position,
                    h_p,
                    h_q,
                    head_p,
                    head_q,
                    ids[is_response],
                    scale=weight,
                    temperature=temperature,
                    teacher_temperature=teacher_temperature,
                    chunk=self.chunk,
                )
            for name, x in values.items():  # (N, ...), packed row by row
                empty = math.nan if x.is_floating_point() else 0
                grid = out.setdefault(
                    name, x.new_full((*r.response_mask.shape, *x.shape[1:]), empty)
                )  # (B, T)
                grid[rows] = grid[rows].index_put(
                    (r.response_mask[rows],), x
                )  # set in a copy of the rows, put back
        return out
