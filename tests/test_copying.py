"""A file works in an empty folder, together with the files that its header names."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import config, ready

import loss
import opd
import recipes
import rollout
import teacher

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
vocabulary = {word: i for i, word in enumerate(words)}
inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=inner, eos_token="[EOS]", unk_token="[UNK]", pad_token="[PAD]"
)
"""

LOSS = """
import torch
from loss import in_chunks, top_k

torch.manual_seed(0)
trunk, head_p, head_q = torch.nn.Linear(8, 8), torch.nn.Linear(8, 20), torch.nn.Linear(6, 20)
x, h_q, y = torch.randn(50, 8), torch.randn(50, 6), torch.randint(20, (50,))
optimizer = torch.optim.AdamW([*trunk.parameters(), *head_p.parameters()], lr=0.05)
losses = []
for step in range(20):
    values = in_chunks(
        lambda log_p, log_q, y: {"loss": top_k(log_p, log_q, 5)},
        trunk(x),
        h_q,
        lambda h: head_p(h).log_softmax(-1),
        lambda h: head_q(h).log_softmax(-1),
        y,
        chunk=16,
    )
    loss = values["loss"].mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < 0.5 * losses[0], losses
"""

ROLLOUT = (
    MODELS
    + """
from rollout import rollout

prompts = [[5, 6, 7], [8]]
r = rollout(student, prompts, n=3, max_new_tokens=6, eos_ids=[2], seeds=[0, 1])
assert r.ids.shape[0] == 6 and r.log_p.shape == r.response_mask.shape
for row in range(6):
    prompt, response = prompts[row // 3], r.response_ids(row)
    logits = student(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
    expected = logits.log_softmax(-1)[range(len(response)), response]
    torch.testing.assert_close(r.log_p[row, :len(response)], expected.detach(), rtol=0, atol=1e-4)
"""
)

TEACHER = (
    MODELS
    + TOKENIZER
    + """
from loss import full_vocab
from rollout import rollout
from teacher import grade, log_probs, make_pair, micro_batches, values_of

def per_position(log_p, log_q, y):
    return {"loss": full_vocab(log_p, log_q)}

pair = make_pair(student, teacher, tokenizer, tokenizer)
prompts = [tokenizer("add the digits 3 7").input_ids, tokenizer("3 + 7 =").input_ids]
optimizer, losses = torch.optim.AdamW(student.parameters(), lr=3e-3), []
for step in range(15):
    r = rollout(student, prompts, n=4, max_new_tokens=6, seeds=[0, 1], **pair.sampling)
    of_r = (r.ids, r.attention_mask, r.is_response)
    plain = full_vocab(log_probs(student, *of_r), log_probs(teacher, *of_r)).detach()
    grid = grade(pair, r, per_position)
    torch.testing.assert_close(grid["loss"][r.response_mask], plain, rtol=1e-4, atol=1e-5)
    for part in micro_batches(r, pair.micro_batch_tokens):
        (values_of(pair, part, per_position)["loss"].sum() / r.is_response.sum()).backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(plain.mean().item())
assert losses[-1] < 0.7 * losses[0], losses
"""
)

ANALYSIS = """
import torch
from analysis import auroc, diagnose, overlap_ratio, shared_tokens

torch.manual_seed(0)
log_p, log_q = torch.randn(2, 30, 50).log_softmax(-1)
found = diagnose(log_p, log_q, torch.randint(50, (30,)), 16)
assert {x.shape for x in found.values()} == {(30,)} and "reverse_kl" in found
P, in_I = shared_tokens(log_p, log_q, 16)
assert torch.equal(found["overlap_ratio"], overlap_ratio(in_I))
assert auroc(torch.tensor([.1, .9]), torch.tensor([False, True])) == 1
"""

RECIPES = (
    MODELS
    + TOKENIZER
    + """
from recipes import apply_template, cold_start, is_degenerate, mix_prompts, teacher_rollouts
from teacher import make_pair

assert apply_template("3 + 7", "boxed").startswith("3 + 7 ") and is_degenerate([5] * 40)
asked = [{"prompt": f"{i} + {i}"} for i in range(8)]
mixed = mix_prompts(asked[:4], asked[4:], 0.5, torch.Generator().manual_seed(0))
assert sorted(row["prompt"] for row in mixed) == [row["prompt"] for row in asked]
pair = make_pair(student, teacher, tokenizer, tokenizer)
rows = [{"prompt": "3 + 7 =", "ids": tokenizer("3 + 7 =").input_ids}] * 4
(answers,) = teacher_rollouts(pair, rows, max_new_tokens=8)
examples = [(answer["prompt_ids"], answer["response_ids"]) for answer in answers]
optimizer = torch.optim.AdamW(student.parameters())
told = list(cold_start(pair, optimizer, examples, steps=20, lr=1e-2, batch_size=4))
assert told[-1]["loss"] < 0.5 * told[0]["loss"], told
"""
)

COPIES = {  # file -> what its header says, what goes with it, what a user would write
    "loss.py": ("To copy: this file alone.", [], LOSS),
    "rollout.py": ("To copy: this file alone.", [], ROLLOUT),
    "plumbing/slots.py": (
        "To copy: with rollout.py.",
        ["rollout.py"],
        ROLLOUT.replace("from rollout import", "from plumbing.slots import"),
    ),
    "teacher.py": ("To copy: with loss.py and rollout.py.", ["loss.py", "rollout.py"], TEACHER),
    "analysis.py": (
        "To copy: with rollout.py, teacher.py and loss.py.",
        ["rollout.py", "teacher.py", "loss.py"],
        ANALYSIS,
    ),
    "recipes.py": (
        "To copy: with loss.py, rollout.py and teacher.py.",
        ["loss.py", "rollout.py", "teacher.py"],
        RECIPES,
    ),
}


def example(module):
    """The lines of code in the header of a file."""
    return textwrap.dedent(module.__doc__[module.__doc__.index("To copy:") :].split("\n\n", 1)[1])


def test_the_examples_in_the_headers_run_and_agree_with_the_pair():
    """Their shift, mask and positions, where everyone errs, are those of teacher.log_probs."""
    mine = {}
    exec(MODELS + TOKENIZER, mine)
    mine["model"] = mine["student"]
    mine["step"] = 0
    names = "log_softmax, position_ids, rollout, seed_of"
    exec(f"from rollout import {names}\n" + example(rollout), mine)
    r = mine["r"]
    assert len(mine["texts"]) == 8
    whole = (r.ids, r.attention_mask, r.is_response)
    log_p = teacher.log_probs(mine["student"], *whole)
    log_q = teacher.log_probs(mine["teacher"], *whole)
    torch.testing.assert_close(mine["log_p"], log_p, rtol=0, atol=1e-5)

    mine.update(ids=r.ids, attention_mask=r.attention_mask, is_response=r.is_response)
    exec("from loss import top_k\n" + example(loss), mine)
    torch.testing.assert_close(mine["loss"], loss.top_k(log_p, log_q).mean())
    weight = mine["student"].get_input_embeddings().weight
    assert weight.grad.abs().sum() > 0


def test_the_example_of_a_cold_start_runs(capsys):
    """The header of recipes.py: the teacher's finished answers, then two updates on them."""
    mine = {}
    exec(MODELS + TOKENIZER, mine)
    mine["student_tokenizer"] = mine["teacher_tokenizer"] = mine["tokenizer"]
    mine["rows"] = [{"prompt": "3 + 7 =", "ids": mine["tokenizer"]("3 + 7 =").input_ids}] * 4
    lines = example(recipes).replace("max_new_tokens=512", "max_new_tokens=64")
    exec(
        "from recipes import cold_start, teacher_rollouts\nfrom teacher import make_pair\n"
        + lines.replace("steps=100", "steps=2"),
        mine,
    )
    assert len(mine["examples"]) > 0
    assert re.fullmatch(r"(\d \d\.\d{4} nats a token\n){2}", capsys.readouterr().out)


def test_the_loop_of_the_front_page_takes_the_steps_of_opd(world, tmp_path, capsys):
    """Three steps on models of the same vocabulary have the losses of opd.update."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (loop,) = re.findall(r"```python\n(import json\n.*?)```", readme, flags=re.DOTALL)
    loop = loop.replace("runs/toy/teacher", str(world / "gemma3"))
    loop = loop.replace("max_new_tokens=96", "max_new_tokens=40")  # these models know 64 positions
    mine = {}
    exec(loop.replace("runs/toy", str(world)), mine)
    said = re.findall(r"(\S+) nats a token\n", capsys.readouterr().out)

    cfg = config(world, tmp_path, teacher=f"{world}/gemma3", n=8, max_new_tokens=40, k=16)
    pair, _, _ = ready(cfg)
    optimizer = opd.adamw(cfg, pair.student)
    rows = [{"ids": ids} for ids in mine["prompts"]]
    losses = [opd.update(cfg, pair, optimizer, rows, step)[1]["loss"] for step in range(3)]
    assert [float(x) for x in said] == pytest.approx(losses, abs=2e-4)
    assert losses[0] > 1.01 * losses[2]  # it learns: so the three are not one number


@contextlib.contextmanager
def started(tmp_path_factory):
    """Copy each file into a folder of its own, and start a script there: {name: process}."""
    plain = {**os.environ, "OMP_NUM_THREADS": "1"}
    plain.pop("PYTHONPATH", None)
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
            env=plain,
        )
    yield running
    for process in running.values():
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_file_is_copied_with_what_its_header_names_and_nothing_else(tmp_path_factory):
    """A user's few lines run in a fresh interpreter that cannot see this repository."""
    with started(tmp_path_factory) as running:
        for name, process in running.items():
            header = (ROOT / name).read_text(encoding="utf-8").split('"""')[1]
            assert COPIES[name][0] in " ".join(header.split())
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, f"{name}: {said}"
            assert not said, f"{name}: {said}"
