"""A file that its header calls fit to copy is: alone in an empty folder, with what the header names, it works."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MODELS = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
def tiny(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
                         initializer_range=0.3)
    return LlamaForCausalLM(config).eval()
student, teacher = tiny(0), tiny(1)
"""
TOKENIZER = """
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
words = "[PAD] [BOS] [EOS] [UNK] user assistant : add the digits 3 7 + = so 0".split()
inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]",
                                    pad_token="[PAD]")
"""

LOSS = """
import torch
from loss import in_chunks, top_k
torch.manual_seed(0)
trunk, head_p, head_q = torch.nn.Linear(8, 8), torch.nn.Linear(8, 20), torch.nn.Linear(6, 20)
x, h_q, y = torch.randn(50, 8), torch.randn(50, 6), torch.randint(20, (50,))
optimizer, losses = torch.optim.AdamW([*trunk.parameters(), *head_p.parameters()], lr=0.05), []
for step in range(20):
    values = in_chunks(lambda log_p, log_q, y: {"loss": top_k(log_p, log_q, 5)}, trunk(x), h_q, head_p, head_q, y,
                       scale=1 / len(y), chunk=16)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(values["loss"].mean().item())
assert losses[-1] < 0.5 * losses[0], losses
"""

ROLLOUT = (
    MODELS
    + """
from rollout import rollout
r = rollout(student, [[5, 6, 7], [8]], n=3, max_new_tokens=6, eos_ids=[2], seeds=[0, 1])
assert r.ids.shape[0] == 6 and r.log_p.shape == r.response_mask.shape and r.response_mask[:, 0].all()
for row in range(6):
    prompt, response = [[5, 6, 7], [8]][row // 3], r.response_ids(row)
    log_p = student(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
    expected = log_p[range(len(response)), response]
    torch.testing.assert_close(r.log_p[row, :len(response)], expected.detach(), rtol=0, atol=1e-4)
"""
)

TEACHER = (
    MODELS
    + TOKENIZER
    + """
from loss import full_vocab
from rollout import rollout
from teacher import Pair, log_probs
pair = Pair.of(student, teacher, tokenizer, tokenizer)
prompts = [tokenizer("add the digits 3 7").input_ids, tokenizer("3 + 7 =").input_ids]
optimizer, losses = torch.optim.AdamW(student.parameters(), lr=3e-3), []
for step in range(15):
    r = pair.write(prompts, n=4, max_new_tokens=6, seed=0)
    grid = pair.grade(r, lambda log_p, log_q, y: {"loss": full_vocab(log_p, log_q)}, scale=1 / r.response_mask.sum())
    of_r = (r.ids, r.attention_mask, r.is_response)
    plain = full_vocab(log_probs(student, *of_r), log_probs(teacher, *of_r)).detach()
    torch.testing.assert_close(grid["loss"][r.response_mask], plain, rtol=1e-4, atol=1e-5)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(plain.mean().item())
assert losses[-1] < 0.7 * losses[0], losses
assert pair.given([(prompts[0], [7, 2])]).response_ids(0) == [7, 2]
"""
)

ANALYSIS = """
import torch
from analysis import auroc, diagnose, overlap_ratio
torch.manual_seed(0)
log_p, log_q = torch.randn(2, 30, 50).log_softmax(-1)
found = diagnose(log_p, log_q, torch.randint(50, (30,)), 16)
assert {name: x.shape for name, x in found.items()} == {name: (30,) for name in found} and "reverse_kl" in found
assert torch.equal(found["overlap_ratio"], overlap_ratio(log_p, log_q, 16)) and 0 < found["overlap_ratio"].mean() < 1
assert (diagnose(log_p, log_p, torch.zeros(30).long(), 16)["overlap_ratio"] == 1).all()
assert auroc(torch.tensor([.1, .9]), torch.tensor([False, True])) == 1
"""

RECIPES = """
import torch
from recipes import apply_template, cold_start, is_degenerate, mix_prompts
assert apply_template("3 + 7", "boxed").startswith("3 + 7 ") and is_degenerate("so " * 40)
asked = [{"prompt": f"{i} + {i}"} for i in range(8)]
mixed = mix_prompts(asked[:4], asked[4:], 0.5, torch.Generator().manual_seed(0))
assert sorted(row["prompt"] for row in mixed) == [row["prompt"] for row in asked]
class Texts:                       # what a pair must be for a cold start: a student, `given` and `grade`
    def given(self, examples):
        self.ids = torch.tensor([prompt + response for prompt, response in examples])
        self.response_mask = torch.ones(len(examples), len(examples[0][1]), dtype=torch.bool)
        return self
    def grade(self, r, per_position, *, scale, with_teacher):
        T = self.response_mask.size(1)
        log_p = self.student(self.ids)[:, -T - 1:-1].log_softmax(-1).flatten(0, 1)
        loss = per_position(log_p, None, self.ids[:, -T:].flatten())["loss"]
        (scale * loss.sum()).backward()
        return {"loss": loss.detach().view(-1, T)}
pair = Texts()
pair.student = student = torch.nn.Sequential(torch.nn.Embedding(16, 32), torch.nn.Linear(32, 16))
examples = [([5, 6, 7 + i], [9, 10, 2]) for i in range(4)]
optimizer = torch.optim.AdamW(student.parameters())
rows = list(cold_start(pair, optimizer, examples, steps=20, lr=1e-2, batch_size=4))
assert [row["step"] for row in rows] == list(range(1, 21)) and rows[-1]["loss"] < 0.5 * rows[0]["loss"], rows
"""

COPIES = {  # file -> what its header says, what goes with it, what a user would write
    "loss.py": ("To copy: this file alone.", [], LOSS),
    "rollout.py": ("To copy: this file alone.", [], ROLLOUT),
    "plumbing/slots.py": (
        "To copy: with rollout.py.",
        ["rollout.py"],
        "from plumbing.slots import fastest\n"
        + ROLLOUT.replace("seeds=[0, 1]", "seeds=[0, 1], decoder=fastest"),
    ),
    "teacher.py": ("To copy: with loss.py and rollout.py.", ["loss.py", "rollout.py"], TEACHER),
    "analysis.py": ("To copy: this file alone.", [], ANALYSIS),
    "recipes.py": (
        "To copy: with analysis.py and plumbing/processes.py;",
        ["analysis.py", "plumbing/processes.py"],
        RECIPES,
    ),
}


@contextlib.contextmanager
def started(tmp_path_factory):
    """Each file in a folder of its own, and the user's script that runs there: {name: process}, all at a time."""
    plain = {key: x for key, x in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    running = {}
    for name, (_, with_it, script) in COPIES.items():
        folder = tmp_path_factory.mktemp("copied")
        for file in (name, *with_it):
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
        (folder / "mine.py").write_text(script, encoding="utf-8")
        running[name] = subprocess.Popen(
            [sys.executable, "mine.py"],
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**plain, "OMP_NUM_THREADS": "1"},
        )
    yield running
    for process in running.values():
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_file_is_copied_with_what_its_header_names_and_nothing_else(tmp_path_factory):
    """In a fresh interpreter that cannot see this repository a user's few lines run, and say nothing."""
    with started(tmp_path_factory) as running:
        for name, process in running.items():
            header = (ROOT / name).read_text(encoding="utf-8").split('"""')[1]
            assert COPIES[name][0] in " ".join(header.split())
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0 and not said, f"{name}: {said}"
