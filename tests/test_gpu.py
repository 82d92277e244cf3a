"""What only a GPU can show. Without one each is skipped; with one: bash experiments/gpu.sh."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, VOCAB, tiny
from test_rollout import LENGTH, MANY, PROMPTS, common, sample

import loss
from loss import top_k
from plumbing.slots import Captured, Slots
from rollout import Waves
from teacher import Pair, split

pytestmark = pytest.mark.gpu
NAMES = ("llama", "qwen3", "gemma3")


def paired(name, dtype, decoder):
    """A tiny student in float32 that computes in dtype, as the commands load it, and itself as its teacher."""
    student, teacher = (tiny(name).to("cuda") for _ in range(2))
    return Pair(
        student,
        teacher.requires_grad_(False),
        None,
        dict(eos_ids=[3], merge_ends=True, pad_id=0, vocab_size=VOCAB, decoder=decoder),
        (split(student, VOCAB), split(teacher, VOCAB)),
        torch.device("cuda"),
        autocast=contextlib.nullcontext
        if dtype == torch.float32
        else lambda: torch.autocast("cuda", dtype),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "dtype, off", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=["float32", "bfloat16"]
)
def test_what_is_sampled_is_what_is_scored(name, dtype, off):
    """Decoded by graphs, read whole: the same log-probabilities but for rounding, with changed weights, too."""
    pair = paired(name, dtype, Captured)
    for step in range(2):
        r = pair.write(PROMPTS, n=3, max_new_tokens=LENGTH, seed=step)
        grid = pair.grade(
            r,
            lambda log_p, log_q, y: {"loss": -log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)},
            scale=1.0,
        )
        assert (r.log_p + grid["loss"])[r.response_mask].abs().max() < off
        with torch.no_grad():
            for p in pair.student.parameters():
                p -= 0.1 * p.grad.sign()
                p.grad = None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("in_flight", [None, 6])
def test_graphs_write_what_launches_write(name, in_flight, monkeypatch, recwarn):
    """Greedy and sampled, in float64, where kernels round alike enough: the tokens are those of Slots and of Waves."""
    captured, capture = [], Captured.capture
    monkeypatch.setattr(
        Captured, "capture", lambda self, step: captured.append(self.b) or capture(self, step)
    )
    model = tiny(name).double().to("cuda")
    eos_ids = common(sample(model, MANY, decoder=Waves), 4)
    for temperature in (0.0, 1.0):
        plain, *others = (
            sample(
                model,
                MANY,
                eos_ids=eos_ids,
                temperature=temperature,
                in_flight=in_flight,
                decoder=x,
            )
            for x in (Waves, Slots, Captured)
        )
        for other in others:
            assert torch.equal(plain.ids, other.ids) and torch.equal(
                plain.is_response, other.is_response
            )
            torch.testing.assert_close(plain.log_p, other.log_p)
    assert captured and not [w for w in recwarn if "captured" in str(w.message)]


@pytest.mark.parametrize("name", NAMES)
def test_the_host_waits_only_where_it_looks_who_has_ended(name, monkeypatch):
    """Between two looks, and outside of reading prompts and capturing, nothing makes the CPU wait for the GPU."""

    def waits(f):
        def wrapped(*args):
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("default")
            try:
                return f(*args)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return wrapped

    for method in ("leave", "fill", "capture"):
        monkeypatch.setattr(Captured, method, waits(getattr(Captured, method)))
    model, fed = tiny(name).to("cuda"), []
    feed = Captured.feed

    def strict(self, y, going):
        torch.cuda.set_sync_debug_mode("error")  # from the first token on, sampling included
        fed.append(len(y))
        feed(self, y, going)
        if not self.b:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Captured, "feed", strict)
    try:
        sample(model, MANY, decoder=Captured)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(fed) == LENGTH


def test_the_memory_of_the_loss_does_not_grow_with_the_positions():
    """But for the hidden states, their gradient and what is returned, a few numbers a position."""
    V, H, peaks = 50_000, 64, []
    heads = [torch.nn.Linear(H, V, bias=False, device="cuda") for _ in range(2)]
    heads[1].requires_grad_(False)
    for N in (4096, 16_384, 65_536):
        h_p, h_q = (
            torch.randn(N, H, device="cuda", requires_grad=True),
            torch.randn(N, H, device="cuda"),
        )
        y = torch.randint(V, (N,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss.in_chunks(
            lambda log_p, log_q, y: {"loss": top_k(log_p, log_q, 16)},
            h_p,
            h_q,
            *heads,
            y,
            scale=1.0,
            chunk=1024,
        )
        peaks.append(torch.cuda.max_memory_allocated() - before - 4 * N * H * 4)
        heads[0].weight.grad = None
    assert max(peaks) < 1.1 * min(peaks) and max(peaks) < 12 * 1024 * V * 4, peaks


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_toy_recovers_on_a_gpu(tmp_path_factory, dtype):
    """The main command of the README with --device cuda: the student makes up at least .8 of its teacher's lead."""
    world = tmp_path_factory.getbasetemp() / "toy"
    if not (world / "teacher" / "config.json").exists():
        subprocess.run([sys.executable, "experiments/toy.py", "--out", world], cwd=ROOT, check=True)
    out = tmp_path_factory.mktemp("run") / dtype
    subprocess.run(
        [
            sys.executable,
            "opd.py",
            "--preset",
            "toy",
            "--student",
            world / "student",
            "--teacher",
            world / "teacher",
            "--prompts",
            world / "prompts.jsonl",
            "--eval",
            world / "eval.jsonl",
            "--steps",
            "100",
            "--device",
            "cuda",
            "--dtype",
            dtype,
            "--out",
            out,
        ],
        cwd=ROOT,
        check=True,
    )
    result = json.loads((out / "result.json").read_text())
    assert result["gap_recovery"] and result["gap_recovery"] >= 0.8, result["gap_recovery"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_teacher_on_two_gpus_grades_as_on_one():
    """Its layers on cuda:0 and cuda:1, placed by accelerate; the student is on cuda:0."""
    accelerate = pytest.importorskip("accelerate")
    pair = paired("llama", torch.float32, Captured)
    r = pair.write(PROMPTS, n=2, max_new_tokens=LENGTH, seed=0)

    def both(log_p, log_q, y):
        return {"loss": loss.full_vocab(log_p, log_q)}

    one = pair.grade(r, both)["loss"]
    placed = {
        name: int("layers.1" in name or "norm" in name or "head" in name)
        for name in (
            "model.embed_tokens",
            "model.layers.0",
            "model.layers.1",
            "model.norm",
            "model.rotary_emb",
            "lm_head",
        )
    }
    pair.teacher = accelerate.dispatch_model(pair.teacher, placed)
    pair.splits = pair.splits[0], split(pair.teacher, VOCAB)
    torch.testing.assert_close(pair.grade(r, both)["loss"], one, equal_nan=True)
