"""What the tests share: tiny random models, a tokenizer of a few words, one deterministic hypothesis profile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

settings.register_profile("laws", derandomize=True, database=None, deadline=None, max_examples=15)
settings.load_profile("laws")
torch.set_num_threads(1)  # tiny tensors: a second thread only costs


def pytest_configure(config):
    """Tests marked slow run where they are asked for: python -m pytest -m slow."""
    config.addinivalue_line("markers", "slow: needs a browser, or minutes")
    config.addinivalue_line(
        "markers", "gpu: needs an NVIDIA GPU; bash experiments/gpu.sh runs all of them"
    )
    config.option.markexpr = config.option.markexpr or "not slow"
    whole = (
        config.args_source is not pytest.Config.ArgsSource.ARGS and not config.option.collectonly
    )
    config.half = int(os.environ.get("HALF_OF_THE_TESTS", 0)) if whole else None
    if config.half == 0:  # no file was named: another process runs every other test
        config.other = subprocess.Popen(
            [sys.executable, "-m", "pytest", *config.invocation_params.args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "HALF_OF_THE_TESTS": "1"},
        )


def pytest_collection_modifyitems(config, items):
    if config.half is not None:
        items[:] = items[config.half :: 2]
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


def pytest_sessionfinish(session):
    """What the other process said stands above the last line of this one; where it failed both have."""
    if session.config.half == 0:
        said, _ = session.config.other.communicate()
        print(f"\n{said}")
        if session.config.other.returncode not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = session.config.other.returncode


VOCAB = 48
WINDOW = 5  # Gemma 3: shorter than prompt + response, so that it bites
ARCHITECTURES = (
    "llama",
    "gemma3",
    pytest.param("qwen3", marks=pytest.mark.slow),
    pytest.param("gpt2", marks=pytest.mark.slow),
)


def tiny(architecture, *, seed=0, vocab_size=VOCAB, hidden=32, layers=2, spread=0.3):
    """A two-layer causal model in eval mode, float32; spread is wide enough for softmaxes far from uniform."""
    shared = dict(
        vocab_size=vocab_size,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    body = dict(
        shared,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=64,
    )
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    gemma = dict(body, sliding_window=WINDOW, layer_types=kinds, query_pre_attn_scalar=hidden // 4)
    gemma2 = dict(gemma, final_logit_softcapping=2.0, attn_logit_softcapping=None)
    gpt2 = dict(shared, n_embd=hidden, n_layer=layers, n_head=4, n_positions=64)
    config, cls = {
        "llama": lambda: (LlamaConfig(**body), LlamaForCausalLM),
        "qwen3": lambda: (Qwen3Config(**body), Qwen3ForCausalLM),
        "gpt2": lambda: (GPT2Config(**gpt2), GPT2LMHeadModel),
        "gemma3": lambda: (Gemma3TextConfig(**gemma), Gemma3ForCausalLM),
        "gemma2": lambda: (Gemma2Config(**gemma2), Gemma2ForCausalLM),
    }[architecture]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(config).float().eval()


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture
def model(architecture):
    return tiny(architecture)


WORDS = "[PAD] [BOS] [EOS] [UNK] user assistant : add the digits 3 7 + = so 0".split()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% if think %} so{% endif %}{% endif %}"
)


def word_tokenizer(words=WORDS, *, chat_template=None, eos="[EOS]"):
    """One id a word, in the order given; a BOS is written before every text, as Llama's tokenizer does."""
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = ("[BOS]", words.index("[BOS]"))
    inner.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[bos])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="[BOS]",
        eos_token=eos,
        unk_token="[UNK]",
        pad_token="[PAD]",
    )
    made.chat_template = chat_template
    return made


class Killed(BaseException):
    """Stands for kill -9 in tests of one process: nothing of opd.py catches it."""
