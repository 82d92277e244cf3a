"""What went wrong in other implementations and is tested nowhere else here; all of it, row by row: tests/README.md.

The last test holds that table to the tests that it names.
"""

import ast
import dataclasses
import functools
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TEMPLATE, WORDS, tiny, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from test_loss import (
    a_pair,
    each_objective,
    eagerly,
    exact,
    generalised_kl,
    heads_and_states,
    learned,
    pairs,
    with_grad,
)
from test_opd import PROMPTS, config, measured, ready, rows, weights, written  # noqa: F401: a fixture
from test_teacher import close, fitting, gradients
from tokenizers import processors

import opd
from loss import full_vocab, in_chunks, sampled_token, token_sets, top_k, top_k_released
from plumbing.flags import check_run
from plumbing.models import load_pair, surprises
from plumbing.processes import batch
from plumbing.prompts import encode
from plumbing.run import Run
from plumbing.show import IMPLAUSIBLE
from rollout import rollout
from teacher import check_pair, micro_batches, split

ROOT = Path(__file__).resolve().parent.parent


def seeded(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# --- sums over a part of the vocabulary ----------------------------------------------------------------------------


def bucketed(log_p, log_q, S):
    """KL(p || q) where all tokens outside of S (N, k) count as one: (N, V), (N, V) -> (N,)."""
    p, q = (x.gather(-1, S).exp() for x in (log_p, log_q))  # (N, k)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))  # (N, k+1)
    return (p * (p / q).log()).sum(-1)


@given(pairs(), st.integers(1, 4))
def test_generalised_renormalised_and_bucketed_sums_rest_at_the_teacher(pair, k):
    """fact 4: never negative, and without a gradient at p = q, where the plain sum over a set has one."""
    z, log_q = pair
    S = z.topk(k).indices
    for f in (
        lambda a, b: generalised_kl(a, b, S),
        lambda a, b: bucketed(a, b, S),
        lambda a, b: top_k(a, b, k),
    ):
        for part in with_grad(lambda log_p, f=f: f(log_p, z.log_softmax(-1)), z):
            exact(part, torch.zeros_like(part))
        assert (f(z.log_softmax(-1), log_q) >= -1e-12).all()
    plain = with_grad(
        lambda log_p: (log_p.exp() * (log_p - z.log_softmax(-1))).gather(-1, S).sum(-1), z
    )[1]
    exact(
        plain, with_grad(lambda log_p: log_p.exp().gather(-1, S).sum(-1), z)[1]
    )  # that of the mass in S


@pytest.mark.parametrize("tail", [0.01, 0.03, 0.1])
def test_the_released_gradient_is_nearly_that_of_eq_5_where_the_set_holds_nearly_all(tail):
    """fact 5, Rethinking-OPD#5: relative to its size it is off by less than the mass outside the set
    (4.1: .01 to .03)."""
    z, log_q = (
        torch.cat(
            [
                (spread * x).log_softmax(-1) + torch.tensor(mass, dtype=x.dtype).log()
                for x, spread, mass in ((part[:, :16], 1, 1 - tail), (part[:, 16:], 0.1, tail))
            ],
            -1,
        )
        for part in seeded(2, 200, 100)
    )
    released, eq_5 = (
        with_grad(lambda log_p, f=f: f(log_p, log_q, 16), z)[1] for f in (top_k_released, top_k)
    )
    off = ((released - eq_5).norm(dim=-1) / eq_5.norm(dim=-1)).mean()
    assert tail / 2 < off < tail


@pytest.mark.parametrize(
    "objective",
    [
        lambda log_p, log_q: sampled_token(log_p, log_q, torch.tensor([0])),
        lambda log_p, log_q: top_k_released(log_p, log_q, 2),
    ],
    ids=["sampled", "released"],
)
def test_a_value_below_zero_is_not_clamped_and_teaches(objective):
    """verl#7855, verl#7856: where the teacher puts more on the set than the student the value is negative, and a clamp
    at 0 would end all learning there; a bucket for the rest cannot be negative."""
    z, log_q = (
        torch.tensor([x], dtype=torch.float64).log()
        for x in ([0.3, 0.29, 0.21, 0.2], [0.45, 0.45, 0.05, 0.05])
    )
    value, gradient = with_grad(lambda log_p: objective(log_p, log_q), z)
    assert value.item() < -0.3 and gradient[0, 0] < -0.05  # a step makes token 0 likelier
    assert bucketed(z, log_q, torch.tensor([[0, 1]])) > 0


class OneState(torch.nn.Module):
    """A causal model that is an output head alone: its hidden states are 1."""

    def __init__(self, logits):
        super().__init__()
        self.output = torch.nn.Linear(1, len(logits), bias=False, dtype=logits.dtype)
        self.output.weight.data[:, 0] = logits

    def get_output_embeddings(self):
        return self.output

    def base_model(self, input_ids, **_):
        return SimpleNamespace(
            last_hidden_state=torch.ones_like(input_ids, dtype=self.output.weight.dtype)[..., None]
        )

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.output(self.base_model(input_ids).last_hidden_state))


@pytest.mark.parametrize("spread, stray", [(1.0, 5e-4), (3.0, 1e-5)])
def test_fake_columns_would_take_probability_and_are_cut_before_the_softmax(spread, stray):
    """fact 7, Liger's fused_linear_distillation: 128 columns of logit 0 beside Qwen2.5's 151,936 take so much, in
    silence; the head of a Split leaves them out, whichever model has them."""
    z = spread * seeded(151_936)
    padded = torch.nn.functional.pad(z, (0, 128))
    assert padded.softmax(-1)[-128:].sum().item() == pytest.approx(stray, rel=0.2)
    head = split(OneState(padded), len(z)).head
    exact(head(torch.ones(1, 1, dtype=z.dtype)).log_softmax(-1)[0], z.log_softmax(-1))


# --- gradients -----------------------------------------------------------------------------------------------------


@given(pairs())
def test_the_advantage_of_the_drawn_token_is_a_constant(pair):
    """MiniLLM: a gradient through it has mean zero, so that no expectation shows it, and adds noise at every token."""
    z, log_q = pair
    for token in range(z.size(-1)):
        advantage = (log_q - z.log_softmax(-1))[:, token]
        exact(
            with_grad(lambda log_p: sampled_token(log_p, log_q, torch.full((len(z),), token)), z)[
                1
            ],
            with_grad(lambda log_p: -advantage * log_p[:, token], z)[1],
        )


@each_objective
def test_any_upstream_gradient_reaches_each_position_as_if_it_stood_alone(objective):
    """Liger#968, Liger#678, Liger#1298: unreduced losses under random weights, against one position at a time."""
    z, log_q = a_pair()
    y, weight, leaf = torch.arange(len(z)), seeded(len(z)), z.clone().requires_grad_()
    (ours,) = torch.autograd.grad(objective(leaf.log_softmax(-1), log_q, y), leaf, weight)
    for t in range(len(z)):
        alone = with_grad(
            lambda log_p: objective(log_p, log_q[t : t + 1], y[t : t + 1]), z[t : t + 1]
        )[1]
        exact(ours[t : t + 1], weight[t] * alone)


@each_objective
def test_positions_that_do_not_count_have_no_gradient_in_chunks(objective):
    """Liger#330, Liger#974: random weights, 0 at every other position, then summed: as with eager autograd, and the
    states of what is left out get exactly nothing."""
    h_p, h_q, head_p, head_q, y = heads_and_states()
    weight, found = seeded(len(y)).float(), []
    weight[::2] = 0

    def per_position(log_p, log_q, rows):  # the row's number in place of its token
        return {"loss": weight[rows] * objective(log_p, log_q, y[rows])}

    for evaluate in (eagerly, functools.partial(in_chunks, chunk=3)):
        found.append(
            learned(evaluate, per_position, h_p, h_q, head_p, head_q, torch.arange(len(y)))[1]
        )
    assert found[0].keys() == {"states", "weight", "bias"}
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert not found[1]["states"][::2].any()


@each_objective
def test_logits_of_100_at_a_low_temperature_in_bfloat16_leave_finite_gradients(objective):
    """Soup#719: 100 / .05 is 2,000 nats; a divergence of probabilities would be finite, with a gradient of NaN."""
    z = (
        (100 * torch.tensor([[1, -1, 0, 0.5, -0.5], [-1, 1, 1, -1, 0], [0, 0, 0, 0, 1]]))
        .bfloat16()
        .requires_grad_()
    )
    for token in range(z.size(-1)):
        z.grad = None
        out = in_chunks(
            lambda *at: {"loss": objective(*at)},
            z,
            z.detach().flip(-1),
            lambda h: h,
            lambda h: h,
            torch.full((len(z),), token),
            scale=1.0,
            temperature=0.05,
            teacher_temperature=0.05,
        )
        assert out["loss"].isfinite().all() and z.grad.isfinite().all()


@given(pairs(), st.sampled_from([1, 30]))
def test_no_log_ratio_is_clipped_and_each_token_moves_as_the_teacher_says(pair, scale):
    """OPSD#2, OPSD#24, trl#5990: at hundreds of nats too, a token's logit moves by log q - log p, against 1 - p for the
    drawn one, against the mean over the vocabulary for all: entries that were clipped would turn some of them round."""
    z, log_q = scale * pair[0], (scale * pair[1]).log_softmax(-1)
    log_p = z.log_softmax(-1)
    for token in range(z.size(-1)):
        y = torch.full((len(z),), token)
        moved = -with_grad(lambda log_p: sampled_token(log_p, log_q, y), z)[1][:, token]
        exact(moved, ((log_q - log_p) * (1 - log_p.exp()))[:, token])
    value, gradient = with_grad(lambda log_p: full_vocab(log_p, log_q), z)
    exact(-gradient, log_p.exp() * (log_q - log_p + value.unsqueeze(-1)))


# --- a step, watched -----------------------------------------------------------------------------------------------


@pytest.fixture
def step(world, tmp_path):  # noqa: F811
    """One update, with all that it asks of either model: a namespace of cfg, its rows, the Rollout r, the row of
    metrics, and asked, [(ids, mask, caching)] by model.

    Prompts of more than 4 tokens are too long for it.
    """
    with pytest.warns(UserWarning, match="1 of 8 prompts dropped"):
        cfg, pair, train, _ = ready(
            config(world, tmp_path / "run", micro_batch_tokens=20, max_prompt_tokens=4)
        )
    asked = {"student": [], "teacher": []}
    for who, seen in asked.items():

        def note(_, args, kwargs, seen=seen):
            seen.append((kwargs["input_ids"], kwargs["attention_mask"], kwargs["use_cache"]))

        getattr(pair, who).base_model.register_forward_pre_hook(note, with_kwargs=True)
    pair.tokenizer = type("Mute", (), {"decode": pair.tokenizer.decode})()  # it cannot encode
    chosen = [train[i] for i in batch(len(train), 0, cfg.batch_size, cfg.seed)]
    r, row = opd.update(cfg, pair, opd.adamw(cfg, pair.student), chosen, 0)
    return SimpleNamespace(cfg=cfg, rows=chosen, r=r, metrics=row, asked=asked)


def texts(asked, caching):
    """The token ids of each row, without its padding, of whole forwards or (caching) of the first one of a rollout."""
    return [
        ids[mask.bool()].tolist()
        for part in asked
        if part[2] == caching
        for ids, mask in zip(*part[:2])
    ]


def test_what_was_sampled_is_read_by_both_models_id_by_id(step):
    """trl#6359: prompts whole or not at all, cut neither before nor after sampling; OPSD#3, trl#5241, trl#6063,
    trl#6057: ids all the way, nothing decoded and encoded again; ms-swift#9414, ms-swift#9429, ms-swift#9671: no shift
    between what the student wrote and what the teacher reads."""
    r, asked, prompts = step.r, step.asked, [row["ids"] for row in step.rows]
    whole = [encode(word_tokenizer(), row["prompt"]) for row in PROMPTS]
    assert all(prompt in whole and len(prompt) <= 4 for prompt in prompts)
    sampled = [prompts[i // step.cfg.n] + r.response_ids(i) for i in range(len(r.ids))]
    assert texts(asked["student"][:1], caching=True) == prompts
    assert sorted(texts(asked["student"], caching=False)) == sorted(sampled)
    assert texts(asked["teacher"], caching=False) == texts(asked["student"], caching=False)


def test_a_step_takes_one_forward_of_the_teacher_a_micro_batch(step):
    """trl#4560, trl#5726: the teacher neither writes nor reads twice; the student reads the prompts, writes a token a
    forward and is graded in the same micro-batches."""
    parts, T = (
        len(list(micro_batches(step.r.attention_mask, step.cfg.micro_batch_tokens))),
        step.r.log_p.size(1),
    )
    assert [caching for *_, caching in step.asked["teacher"]] == [False] * parts and parts > 2
    assert [caching for *_, caching in step.asked["student"]] == [True] * T + [False] * parts


def test_the_ratio_of_the_first_update_is_recorded_and_1(step):
    """Qwen3#1799: one update a rollout, so p as scored over p as sampled is 1 but for rounding, and the row says so."""
    assert (
        0 <= step.metrics["sampling_mismatch"] < 1e-5
        and step.r.log_p[step.r.response_mask].min() < -1
    )


# --- what a run is made of -----------------------------------------------------------------------------------------


def test_answers_are_for_measuring_alone(world, tmp_path):  # noqa: F811
    """trl#6478, trl#6452, GKDTrainer: rows of prompts alone train, bit for bit as the same prompts with answers do."""
    for name in ("prompts", "bare"):
        opd.distil(config(world, tmp_path / name, prompts=f"{world}/{name}.jsonl", steps=2))
    assert (
        rows(tmp_path / "bare") == rows(tmp_path / "prompts")
        and rows(tmp_path / "bare")[0]["tokens"] > 0
    )
    with_answers = weights(tmp_path / "prompts")
    assert all(torch.equal(x, with_answers[name]) for name, x in weights(tmp_path / "bare").items())


def test_n_responses_to_a_prompt_are_one_each_to_n_copies_of_it(architecture, monkeypatch):
    """Rethinking-OPD#22: n is a way to fill a step (its authors see no clear gain of 4 or 8 over 1): with the same
    uniform numbers the same tokens, the same mean over tokens, the same gradient."""
    student, teacher = (
        tiny(architecture).double(),
        tiny(architecture, seed=1).double().requires_grad_(False),
    )
    found, numbers = (
        [],
        torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    )
    for prompts, n in (([[5, 6, 7], [8]], 3), ([[5, 6, 7]] * 3 + [[8]] * 3, 1)):
        with monkeypatch.context() as patch:
            drawn = iter(numbers.split(n))
            patch.setattr(torch, "rand", lambda *_, **__: next(drawn))
            r = rollout(student, prompts, n=n, max_new_tokens=6, eos_ids=range(0, 48, 6))
        found.append((r.ids, r.response_mask, r.log_p, gradients(student, teacher, r)))
    close(*found)


def test_vocabularies_of_one_size_with_two_ids_exchanged_are_refused():
    """trl#4393, trl#5885: as many tokens, and the same ones, are not the same tokens."""
    words = ["the" if word == "add" else "add" if word == "the" else word for word in WORDS]
    with pytest.raises(ValueError, match="disagree on 2 token ids: 'add' "):
        check_pair(**fitting(teacher_tokenizer=word_tokenizer(words)))


@pytest.mark.filterwarnings("ignore:student ends", "ignore:special tokens")
def test_an_end_of_one_model_ends_responses_of_both_and_no_end_is_refused(world, tmp_path):  # noqa: F811
    """trl#5725: no eos in the student's tokenizer, config or generation config is no crash; with none in the teacher's
    either nothing would ever end, and a line says what to set.
    """
    for name in ("student", "teacher"):
        tiny("llama", seed=len(name), vocab_size=len(WORDS)).save_pretrained(tmp_path / name)
        word_tokenizer(eos=None).save_pretrained(tmp_path / name)
    opd.distil(config(world, tmp_path / "one", student=f"{tmp_path}/student", steps=1))
    assert rows(tmp_path / "one")[0]["response_length"] > 0
    with pytest.raises(ValueError, match="has a token that ends a response.*set eos_token_id"):
        opd.distil(
            config(
                world,
                tmp_path / "run",
                student=f"{tmp_path}/student",
                teacher=f"{tmp_path}/teacher",
            )
        )


@pytest.mark.parametrize("thinking", ["on", "off", "default"])
def test_the_switch_of_the_template_is_recorded_and_the_same_for_both_models(
    world, tmp_path, thinking
):  # noqa: F811
    """OPSD#10, OPSD#16, OPSD#18, Rethinking-OPD#6, Rethinking-OPD#18: both models read the thinking mark or neither
    does, config.json says which, and --resume with another is refused."""
    template = TEMPLATE.replace("if think", "if enable_thinking")
    for name in ("student", "teacher"):
        tiny("llama", seed=len(name), vocab_size=len(WORDS)).save_pretrained(tmp_path / name)
        word_tokenizer(chat_template=template).save_pretrained(tmp_path / name)
    made = dict(student=f"{tmp_path}/student", teacher=f"{tmp_path}/teacher", steps=1)
    opd.distil(config(world, tmp_path / "run", thinking=thinking, **made))
    (cfg, pair, train, _), read = (
        ready(config(world, tmp_path / "new", thinking=thinking, **made)),
        {},
    )
    for who in ("student", "teacher"):
        getattr(pair, who).base_model.register_forward_pre_hook(
            lambda _, args, kwargs, who=who: read.setdefault(who, []).append(kwargs["input_ids"]),
            with_kwargs=True,
        )
    r = written(cfg, pair, train[:3], 1)
    read.clear()
    measured(cfg, pair, r)
    mark, P = (
        WORDS.index("so" if thinking == "on" else ":"),
        r.ids.size(1) - r.response_mask.size(1),
    )
    assert (r.ids[:, P - 1] == mark).all() and all(row["ids"][-1] == mark for row in train)
    torch.testing.assert_close(read["teacher"], read["student"], rtol=0, atol=0)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["thinking"] == thinking
    other = {"on": "off", "off": "default", "default": "on"}[thinking]
    with pytest.raises(ValueError, match=f"--thinking '{thinking}'"):
        opd.distil(
            config(world, tmp_path / "run", thinking=other, resume=True, **{**made, "steps": 2})
        )


@each_objective
def test_without_a_teacher_there_is_an_error_and_no_loss(objective):
    """verl#7769, verl#5592, tinker#103, trl#5765: missing log-probabilities must not read as a distance of 0."""
    h_p, _, head_p, head_q, y = heads_and_states()
    with pytest.raises((AttributeError, TypeError)):
        in_chunks(lambda *at: {"loss": objective(*at)}, h_p, None, head_p, head_q, y)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_each_models_temperature_is_its_own_flag_and_a_number_above_0(value):
    """slime#2085, miles#1345: the teacher's T is never the student's by accident, nor 0, nor undefined."""
    for name in ("temperature", "teacher_temperature"):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {value}"):
            check_run(opd.Config(student="s", teacher="t", **{name: value}))
    cfg = opd.Config(temperature=0.6)
    assert cfg.teacher_temperature == 1.0


def test_as_many_tokens_are_looked_at_as_were_asked_for(world, tmp_path):  # noqa: F811
    """ms-swift#9644: a server that grants 20 of them in silence; here k different ones, the likeliest, or a refusal."""
    log_p, log_q = (x.log_softmax(-1) for x in seeded(2, 30, 60))
    for support, of in (("student", log_p), ("teacher", log_q)):
        S, member = token_sets(log_p, log_q, 32, support)
        assert member.all() and all(len(set(row)) == 32 for row in S.tolist())
        assert (of.gather(-1, S).min(-1).values > of.scatter(-1, S, -1e9).max(-1).values).all()
    with pytest.raises(
        ValueError, match=f"--k {len(WORDS) + 1}: the two models share {len(WORDS)} tokens"
    ):
        opd.distil(config(world, tmp_path, k=len(WORDS) + 1))


def only_13(pair):
    """The student writes token 13 over and over."""
    pair.student.lm_head.bias = torch.nn.Parameter(100.0 * torch.eye(len(WORDS))[13])


@pytest.fixture
def change(monkeypatch):
    """Of a function: every run's pair goes through it as soon as it is loaded. -> the pairs."""

    def every(change):
        pairs, load = [], Run.load_pair

        def load_pair(run):
            pairs.append(load(run))
            with torch.no_grad():
                change(pairs[-1])
            return pairs[-1]

        monkeypatch.setattr(Run, "load_pair", load_pair)
        return pairs

    return every


def test_responses_that_are_one_token_over_and_over_are_counted_in_the_row(world, tmp_path):  # noqa: F811
    """ms-swift#6478, ms-swift#6791: rollouts of nothing but "!" trained on; repetition_fraction shows it at once."""
    cfg, pair, train, _ = ready(config(world, tmp_path, max_new_tokens=20))
    optimizer = opd.adamw(cfg, pair.student)
    before = opd.update(cfg, pair, optimizer, train[:3], 0)[1]
    only_13(pair)
    after = opd.update(cfg, pair, optimizer, train[:3], 1)[1]
    assert before["repetition_fraction"] < 1 and after["repetition_fraction"] == 1


def test_a_resume_at_the_border_of_epochs_goes_on_with_the_teacher_of_the_start(
    world, tmp_path, change
):  # noqa: F811
    """verl#5725, entrenar#294, open-instruct#1523: no step is skipped where an epoch ends at the checkpoint; trl#5990:
    a student that is its own teacher (sharper, by its temperature) does not become a student of what it has become."""
    how = dict(
        batch_size=4, teacher=f"{world}/student", teacher_temperature=0.5
    )  # 8 prompts: 2 steps an epoch
    loaded = change(lambda pair: None)
    opd.distil(config(world, tmp_path / "whole", steps=4, **how))
    opd.distil(config(world, tmp_path / "cut", steps=2, **how))
    opd.distil(config(world, tmp_path / "cut", steps=4, resume=True, **how))
    assert [row["step"] for row in rows(tmp_path / "cut")] == [1, 2, 3, 4]
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    whole, teacher = weights(tmp_path / "whole"), loaded[-1].teacher
    start = ready(config(world, tmp_path / "new"))[1]
    assert all(torch.equal(x, whole[name]) for name, x in weights(tmp_path / "cut").items())
    for name, x in start.student.state_dict().items():
        assert torch.equal(x, teacher.state_dict()[name]) and not torch.equal(x, whole[name])


# --- what is said of a pair or a run that may surprise ---------------------------------------------------------------


@pytest.mark.parametrize("spread, warned", [(1, False), (60, True)])
def test_an_implausible_distance_at_the_start_is_a_warning(
    world,
    tmp_path,
    change,
    capsys,
    spread,  # noqa: F811
    warned,
):
    """ms-swift#9414: 20 nats a token are no other way of thinking, but another template or shifted tokens."""
    change(lambda pair: pair.teacher.lm_head.weight.mul_(spread))
    result = opd.distil(config(world, tmp_path, steps=1))
    assert (result["held_out_before"]["reverse_kl"] > IMPLAUSIBLE) == warned
    assert ("nats a token apart" in capsys.readouterr().out) == warned


def test_a_run_that_only_repeats_from_its_first_step_on_is_a_warning(
    world, tmp_path, capsys, change
):  # noqa: F811
    """ms-swift#6791: rollouts of nothing but "!" fall from no better state, so that collapse has nothing to see."""
    change(only_13)
    opd.distil(config(world, tmp_path, max_new_tokens=20, steps=2))
    assert (
        capsys.readouterr().out.count("of the responses only repeat themselves, see rollouts.jsonl")
        == 1
    )


def test_a_teacher_whose_tokenizer_writes_no_bos_is_warned_of():
    """trl#5885: one map of tokens to ids, and another first token: the teacher reads what it never saw."""
    bare = word_tokenizer()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", special_tokens=[]
    )
    (said,) = surprises(word_tokenizer(), bare)
    assert re.match("the tokenizers encode .* differently, by a BOS", said)


# --- what is written down ------------------------------------------------------------------------------------------


def test_every_flag_is_read():
    """prime-rl#1458: a field that nobody reads would be accepted and do nothing."""
    read = set()
    for path in (ROOT / "opd.py", *(ROOT / "plumbing").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("cfg", "self.cfg"):
                read.add(node.attr)
    read |= set(inspect.signature(load_pair).parameters)  # what flags.of_pair hands on by name
    assert {field.name for field in dataclasses.fields(opd.Config)} - read == {
        "preset"
    }  # parse reads it


def test_the_commands_of_the_readme_are_run_by_ci():
    """TRL's quick start runs into an error of TRL's own; .ci/run takes both of ours out of the README."""
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    blocks = re.findall(r"^bash .*\$\(block \'(.*?)\'\)", ci, flags=re.MULTILINE)
    assert blocks == ["the main command", "the test command"]
    for name, command in zip(blocks, ("python opd.py --preset toy", "python -m pytest")):
        block = readme.split(f"<!-- {name} -->\n```sh\n")[1].split("\n```\n")[0]
        assert command in block and readme.count(f"<!-- {name} -->") == 1


def sources(text):
    """The sources that a text names, "trl#6006, #4719" and "OPSD#2/#24" in full: -> set."""
    return {
        found[1] + number
        for found in re.finditer(r"([A-Za-z][\w-]*)((?:#\d+)(?:(?:, |/)#\d+)*)", text)
        for number in re.findall(r"#\d+", found[2])
    }


def test_the_table_names_tests_that_are_there_and_that_name_their_source():
    """tests/README.md: each row has a test or the reason why not, and a docstring says what the row says it is from."""
    docstrings = {}
    for path in Path(__file__).parent.glob("test_*.py"):
        docstrings |= {
            f"{path.name}::{node.name}": " ".join((ast.get_docstring(node) or "").split())
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef)
        }
    tables = (ROOT / "tests" / "README.md").read_text().split("## What went wrong elsewhere")[1]
    table = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in tables.splitlines()
        if line.startswith("| ") and not line.startswith("| source |")
    ]
    assert len({row[0] for row in table}) == len(table) >= 64
    for source, law, tested in table:
        names = re.findall(r"`(test_\w+\.py::test_\w+)`", tested)
        assert law and (names or tested.startswith("does not apply: ")), source
        assert (
            names == re.findall(r"`([^`]*::[^`]*)`", tested) and set(names) <= docstrings.keys()
        ), (source, names)
        said = " ".join(docstrings[name] for name in names)
        for name in source.split(", ") if names else ():
            assert name in (sources(said) if "#" in name else said), (name, names)
