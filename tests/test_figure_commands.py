"""plumbing/figures.md: its commands parse and run, its table is the preset, its prompts are ten
lines."""

import dataclasses
import json
import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, ROOT, TEMPLATE, WORDS, word_tokenizer, write_lines
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import opd
from plumbing.flags import PRESETS, Config, parse_analysis, parse_opd
from recipes import TEMPLATES

PAGE = (ROOT / "plumbing" / "figures.md").read_text()
FIGURES = "2 4 5 6 7 8 9 10 11a 11b 13 15".split()
# Qwen3's template has a switch for thinking, that of R1 has none and begins the thought
THINKS = TEMPLATE.replace("{% if think %}", "{% if enable_thinking %}")
BEGINS_A_THOUGHT = TEMPLATE.replace("assistant :", "assistant : <think>")


def commands():
    """Every command of the page without torchrun: lists of words."""
    (run,) = re.findall(r'^RUN="(.*)"$', PAGE, re.MULTILINE)
    found = []
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL):
        for line in block.strip().split("\n"):
            if not line.startswith("RUN="):
                line = line.replace("$RUN", run)
                line = line.removeprefix("torchrun --nproc_per_node 8 -- ")
                found.append(shlex.split(line.removeprefix("python ")))
    return found


def with_files(words, folder):
    """The words, after making every file that they read, in a folder."""
    words = list(words)
    for i, word in enumerate(words):
        if word.endswith(".jsonl"):
            words[i] = str(folder / word)
            rows = PROMPTS[:2] if word.startswith("a") else PROMPTS[6:]  # AIME and AMC
            write_lines(folder / word, PROMPTS[2:6] if word.startswith("dapo") else rows)
        if words[i - 1] == "--run":
            words[i] = str(folder / word)
            Path(words[i]).mkdir(parents=True, exist_ok=True)
            (Path(words[i]) / "metrics.jsonl").touch()
    return words


def test_there_is_a_command_for_each_figure_of_the_paper():
    assert re.findall(r"^\*\*Figure (\w+)\*\*", PAGE, re.MULTILINE) == FIGURES
    assert len(commands()) >= len(FIGURES)
    outs = [words[words.index("--out") + 1] for words in commands() if "--out" in words]
    assert len(outs) == len(set(outs))


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_parses(words, tmp_path, monkeypatch):
    """The flags exist, their values are in range, and they go together. Models are not needed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)  # matplotlib
    program, *words = with_files(words, tmp_path)
    if program == "opd.py":
        cfg = parse_opd([word for word in words])
        assert cfg.eval_n == PRESETS["paper"]["eval_n"] and cfg.student and cfg.teacher
    else:
        parse_analysis(words)


def test_a_run_that_a_figure_takes_from_another_is_made_there():
    """runs/fig6-success stands in three figures and is run once."""
    outs = {words[words.index("--out") + 1] for words in commands() if "--out" in words}
    for words in commands():
        for flag, word in zip(words, words[1:]):
            if flag == "--run":
                assert word in outs
    for name in re.findall(r"`(runs/[\w.-]+)`", PAGE):
        assert name in outs


def test_the_table_of_the_preset_is_the_preset():
    """Each row has the value that --preset paper sets, or the default."""
    cfg = dataclasses.replace(Config(), **PRESETS["paper"])
    rows = re.findall(r"^\| (`--[^|]+`) \| ([^|]+) \|", PAGE, re.MULTILINE)
    told = set()
    for flags, values in rows:
        names = [name[3:-1].replace("-", "_") for name in flags.split(", ")]
        values = values.split(", ")
        values = values * len(names) if len(values) == 1 else values
        for name, value in zip(names, values, strict=True):
            assert str(getattr(cfg, name)) == value.strip(), name
            told.add(name)
    assert PRESETS["paper"].keys() <= told


def test_the_code_for_the_prompts_writes_the_files_that_the_commands_read():
    """The code compiles and writes the files that the commands read. datasets is no requirement."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    compile(code, "figures.md", "exec")
    read = {word for words in commands() for word in words if word.endswith(".jsonl")}
    assert read == set(re.findall(r'write\("([\w.-]+)"', code))
    assert "datasets" not in (ROOT / "requirements.txt").read_text()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models of the paper's two families, each with a chat template like theirs."""
    folder = tmp_path_factory.mktemp("models")
    of_templates = {word for form in TEMPLATES.values() for word in form.split()}
    words = [*WORDS, "<think>", *sorted(of_templates - set(WORDS))]
    sizes = dict(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        initializer_range=0.3,
    )
    for family, kind, config, template in (
        ("qwen3", Qwen3ForCausalLM, Qwen3Config(**sizes), THINKS),
        ("r1", Qwen2ForCausalLM, Qwen2Config(**sizes), BEGINS_A_THOUGHT),
    ):
        for seed, role in enumerate(("student", "teacher")):
            torch.manual_seed(seed)
            kind(config).save_pretrained(folder / f"{family}-{role}")
            tokenizer = word_tokenizer(words, chat_template=template)
            tokenizer.save_pretrained(folder / f"{family}-{role}")
    return folder


SMALL = (
    "--steps 2 --batch-size 2 --n 1 --max-new-tokens 6 --eval-n 1 --eval-max-new-tokens 6 --k 4 "
    "--eval-every 0 --device cpu"
).split()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [words for words in commands() if words[0] == "opd.py"], ids=" ".join
)
def test_every_command_runs_two_steps_on_tiny_models(words, models, tmp_path):
    """Architectures and templates are the paper's; the flags are the same but for sizes."""
    _, *words = with_files(words, tmp_path)
    family = "qwen3" if "Qwen3" in " ".join(words) else "r1"
    small = list(SMALL)
    if "--cold-start" in words:
        words[words.index("--cold-start") + 1] = "4"
        small[small.index("--steps") + 1] = "0"
        small += ["--cold-start-max-new-tokens", "200"]
    if "--k" in words:
        del small[small.index("--k") : small.index("--k") + 2]
        words[words.index("--k") + 1] = str(min(4, int(words[words.index("--k") + 1])))
    for role in ("student", "teacher"):
        words[words.index(f"--{role}") + 1] = str(models / f"{family}-{role}")
    words[words.index("--out") + 1] = str(tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = opd.distil(parse_opd([*words, *small]))
    assert result["steps"] == (0 if "--cold-start" in words else 2)
    assert len(result["accuracy_after"]["files"]) == 3
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["dtype"] == PRESETS["paper"]["dtype"]
