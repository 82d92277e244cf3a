"""What only a GPU can show, and what a CUDA build of torch can show without one.

The first half runs forward passes on fake `cuda` tensors: they have shapes and devices, but no
numbers. A mix of devices, or a read by the host, is an error there. A CPU build of torch cannot
index such tensors, so it skips these tests. The second half needs a GPU: bash experiments/gpu.sh.
"""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, VOCAB, tiny
from test_slots import LENGTH, MANY, Static, common, sample
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

import loss
import rollout as plain
from analysis import diagnose
from loss import in_chunks
from plumbing import slots
from plumbing.slots import Captured, Slots
from rollout import draw, left_pad, log_softmax, merge_ends, position_ids
from teacher import Pair, grade, log_softmax_of

NAMES = ["llama", "qwen2", "qwen3", "gemma3"]
DTYPES = [torch.float32, torch.bfloat16]
ENDS = [3, 5, 8]


def model_of(name):
    if name != "qwen2":
        return tiny(name)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config).eval()


# --- on fake tensors, without a GPU -------------------------------------------------------------

a_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build of torch")
each_model = pytest.mark.parametrize("name", NAMES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


@contextlib.contextmanager
def fake_gpu(dtype):
    """Fake tensors without gradients, and autocast: torch.autocast turns it off without a GPU."""
    with FakeTensorMode(), torch.no_grad():
        torch.set_autocast_enabled("cuda", dtype != torch.float32)
        torch.set_autocast_dtype("cuda", dtype)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()


def fake(real):
    """The same model with fake float32 weights on "cuda"."""
    with torch.device("cuda"):
        return type(real)(real.config).eval()


def in_cuda(*tensors):
    return all(x.device.type == "cuda" for x in tensors)


class Strict(TorchDispatchMode):
    """Refuses a CPU tensor. As an index it would be copied to the GPU, which no capture allows."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() > 0:
            assert out.device.type == "cuda", func
        return out


@a_cuda_build
def test_fake_tensors_refuse_a_mix_of_devices_and_a_read():
    """The tests below rely on this."""
    real = model_of("llama")
    with fake_gpu(torch.bfloat16):
        model = fake(real)
        ids = torch.ones(2, 5, dtype=torch.long, device="cuda")
        assert model(input_ids=ids).logits.dtype == torch.bfloat16
        with pytest.raises(FakeTensorDeviceMismatchError):
            model(input_ids=ids.cpu())
        with pytest.raises(DataDependentOutputException):
            int(ids.sum())


@a_cuda_build
@each_model
@each_dtype
def test_prompts_are_read_and_tokens_written_without_a_read_by_the_host(monkeypatch, name, dtype):
    """Neither reading the prompts nor a step that is captured needs a number on the CPU."""
    monkeypatch.setattr(Static, "look_every", 100)
    real = model_of(name)
    with fake_gpu(dtype):
        model = fake(real)
        ids, mask = left_pad(MANY, 0, "cuda")
        ends = torch.tensor(ENDS, device="cuda")
        u = torch.rand(2 * len(MANY), LENGTH, dtype=torch.float64, device="cuda")
        state = Static(model, ids, mask, 2, len(MANY), LENGTH)
        for _ in range(2):
            with Strict():
                log_p = merge_ends(log_softmax(state.logits[:, : VOCAB - 4], 0.7), ends)
                y = draw(log_p, u[state.response, state.t])
                state.feed(y, going=y != 3)
            assert in_cuda(log_p, y, state.logits, *state.keys, *state.values)
        assert state.logits.shape == (2 * len(MANY), VOCAB)
        assert state.logits.dtype == dtype and log_p.dtype == torch.float32


def objectives():
    """Each loss, and those over a support with each support: {name: function}."""
    found = {"full": lambda log_p, log_q, y: loss.full_vocab(log_p, log_q)}
    found["sampled"] = loss.sampled_token
    for support in loss.SUPPORTS:

        def top_k(log_p, log_q, y, support=support):
            return loss.top_k(log_p, log_q, 4, support)

        def released(log_p, log_q, y, support=support):
            return loss.top_k_released(log_p, log_q, 4, support)

        found[f"top-k {support}"] = top_k
        found[f"top-k-released {support}"] = released
    return found


@a_cuda_build
@each_model
@each_dtype
@pytest.mark.parametrize("merged", [False, True])
def test_every_loss_and_every_diagnostic_stays_on_the_gpu(name, dtype, merged):
    """From hidden states, in chunks, they are computed without a read by the host."""

    def everything(log_p, log_q, y):
        values = {name: objective(log_p, log_q, y) for name, objective in objectives().items()}
        values.update(diagnose(log_p, log_q, y, 4))
        return values

    real = model_of(name)
    with fake_gpu(dtype):
        pair = Pair(fake(real), fake(real), None, VOCAB - 4, ENDS, merge_ends=merged)
        ids, mask = left_pad(MANY, 0, "cuda")  # (b, L), (b, L)
        hidden = []
        for model in (pair.student, pair.teacher):
            h = model.base_model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position_ids(mask),
                use_cache=False,
            )[0]  # (b, L, H)
            hidden.append(h.flatten(0, 1))  # (N, H)
        h_p, h_q = hidden
        log_p_of = log_softmax_of(pair, pair.student, 0.7)
        log_q_of = log_softmax_of(pair, pair.teacher)
        with Strict():
            values = in_chunks(everything, h_p, h_q, log_p_of, log_q_of, ids.flatten(), chunk=100)
        assert len(values) >= 2 + 2 * len(loss.SUPPORTS) + 11
        for x in values.values():
            assert in_cuda(x) and x.shape == (ids.numel(),) and x.dtype == torch.float32


# --- on a GPU -----------------------------------------------------------------------------------


def paired(name, dtype):
    """A student in float32 that computes in dtype, as the commands load it, and its teacher."""
    student = model_of(name).to("cuda")
    teacher = model_of(name).to("cuda").requires_grad_(False)
    return Pair(student, teacher, None, VOCAB, ENDS, dtype=dtype)


@pytest.mark.gpu
@each_model
@pytest.mark.parametrize(
    "dtype, most", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=["float32", "bfloat16"]
)
def test_what_is_sampled_is_what_is_scored(name, dtype, most):
    """Written by graphs and scored by a forward pass, it differs by rounding, also in step 2."""
    pair = paired(name, dtype)
    for step in range(2):
        with pair.autocast():
            r = sample(pair.student, seeds=[step] * len(MANY), **pair.sampling)

        def score(log_p, log_q, y):
            return {"log_p": log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)}

        off = r.log_p - grade(pair, r, score)["log_p"]
        assert off[r.response_mask].abs().max() < most
        with torch.no_grad():
            for p in pair.student.parameters():
                p += 0.05 * torch.randn_like(p)


@pytest.mark.gpu
@each_model
@pytest.mark.parametrize("in_flight", [None, 6])
def test_graphs_write_what_launches_write(name, in_flight, monkeypatch, recwarn):
    """In float64 the tokens are those of Slots and of the plain loop, greedily and sampled."""
    captured = []
    capture = Captured.capture

    def noted(self, rows, columns):
        captured.append(rows)
        return capture(self, rows, columns)

    monkeypatch.setattr(Captured, "capture", noted)
    model = model_of(name).double().to("cuda")
    eos_ids = common(model, 4)
    for temperature in (0.0, 1.0):
        wanted = sample(model, write=plain.rollout, eos_ids=eos_ids, temperature=temperature)
        for kind in (Slots, Captured):
            monkeypatch.setattr(slots, "kind_of", {Slots: launches, Captured: graphs}[kind])
            r = sample(model, eos_ids=eos_ids, temperature=temperature, in_flight=in_flight)
            assert torch.equal(wanted.ids, r.ids)
            assert torch.equal(wanted.is_response, r.is_response)
            torch.testing.assert_close(wanted.log_p, r.log_p)
    assert captured
    assert not [w for w in recwarn if "captured" in str(w.message)]


def launches(model):
    return Slots


def graphs(model):
    return Captured


@pytest.mark.gpu
@each_model
def test_the_host_waits_only_if_it_looks_who_has_ended(name, monkeypatch):
    """Between two looks nothing makes the CPU wait, except reading prompts and capturing."""

    def may_wait(method):
        def wrapped(*args):
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("default")
            try:
                return method(*args)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return wrapped

    for method in ("leave", "join", "capture"):
        monkeypatch.setattr(Captured, method, may_wait(getattr(Captured, method)))
    model = model_of(name).to("cuda")
    fed = []
    feed = Captured.feed

    def strict(self, y, going):
        torch.cuda.set_sync_debug_mode("error")  # from the first token on, sampling included
        fed.append(len(y))
        feed(self, y, going)
        if self.rows == 0:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Captured, "feed", strict)
    try:
        sample(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(fed) == LENGTH


@pytest.mark.gpu
def test_the_memory_of_the_loss_does_not_grow_with_the_positions():
    """It grows only by hidden states, their gradient, and a few numbers a position."""
    V = 50_000
    H = 64
    student_head = torch.nn.Linear(H, V, bias=False, device="cuda")
    teacher_head = torch.nn.Linear(H, V, bias=False, device="cuda").requires_grad_(False)

    def top_k(log_p, log_q, y):
        return {"loss": loss.top_k(log_p, log_q, 16)}

    peaks = []
    for N in (4096, 16_384, 65_536):
        h_p = torch.randn(N, H, device="cuda", requires_grad=True)
        h_q = torch.randn(N, H, device="cuda")
        y = torch.randint(V, (N,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        values = in_chunks(
            top_k,
            h_p,
            h_q,
            lambda h: student_head(h).log_softmax(-1),
            lambda h: teacher_head(h).log_softmax(-1),
            y,
            chunk=1024,
        )
        values["loss"].sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before - 4 * N * H * 4)
        student_head.weight.grad = None
    assert max(peaks) < 1.1 * min(peaks), peaks
    assert max(peaks) < 12 * 1024 * V * 4, peaks


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_toy_recovers_on_a_gpu(tmp_path_factory, dtype):
    """With --device cuda the toy preset recovers .8 or more of the gap. The student learns new
    sums: greedily it ends at .85 of the teacher's accuracy or more."""
    world = tmp_path_factory.getbasetemp() / "toy"
    if not (world / "teacher" / "config.json").exists():
        subprocess.run([sys.executable, "experiments/toy.py", "--out", world], cwd=ROOT, check=True)
    out = tmp_path_factory.mktemp("run") / dtype
    command = ["opd.py", "--preset", "toy", "--steps", "100", "--device", "cuda", "--dtype", dtype]
    command += ["--student", world / "student", "--teacher", world / "teacher"]
    command += ["--prompts", world / "prompts.jsonl", "--eval", world / "eval.jsonl", "--out", out]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    result = json.loads((out / "result.json").read_text())
    assert result["gap_recovery"] and result["gap_recovery"] >= 0.8, result["gap_recovery"]
    before = result["greedy_before"]["mean"]
    after = result["greedy_after"]["mean"]
    teacher = result["greedy_teacher"]["mean"]
    assert before <= 0.75
    assert after >= 0.85 * teacher
