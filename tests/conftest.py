"""What the tests share: tiny random models, a tokenizer of a few words, one pair, one world of
checkpoints."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
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
    logging,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

settings.register_profile("laws", derandomize=True, database=None, deadline=None, max_examples=15)
settings.load_profile("laws")
torch.set_num_threads(1)  # tiny tensors: a second thread only costs


def pytest_configure(config):
    """Tests marked slow run only if they are asked for: python -m pytest -m slow."""
    config.addinivalue_line("markers", "slow: needs minutes, several processes, or a browser")
    config.addinivalue_line(
        "markers", "gpu: needs an NVIDIA GPU; bash experiments/gpu.sh runs them"
    )
    config.option.markexpr = config.option.markexpr or "not slow"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


@pytest.fixture(autouse=True)
def verbosity():
    """The verbosity of transformers that a test sets ends with the test."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


# --- tiny models --------------------------------------------------------------------------------

VOCAB = 48
WINDOW = 5  # Gemma 3's: shorter than prompt + response, so that it bites
ARCHITECTURES = (
    "llama",
    "gemma3",
    pytest.param("qwen3", marks=pytest.mark.slow),
    pytest.param("gpt2", marks=pytest.mark.slow),
)


def tiny(architecture, *, seed=0, vocab_size=VOCAB, hidden=32, layers=2, spread=0.3):
    """A causal model in eval mode, in float32.

    spread: of the weights; .3 is wide enough for softmaxes far from uniform.
    """
    shared = {
        "vocab_size": vocab_size,
        "initializer_range": spread,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    body = {
        **shared,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 64,
    }
    gemma = {
        **body,
        "sliding_window": WINDOW,
        "layer_types": (["sliding_attention", "full_attention"] * layers)[:layers],
        "query_pre_attn_scalar": hidden // 4,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if architecture == "llama":
            model = LlamaForCausalLM(LlamaConfig(**body))
        elif architecture == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**body))
        elif architecture == "gpt2":
            sizes = {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": 64}
            model = GPT2LMHeadModel(GPT2Config(**shared, **sizes))
        elif architecture == "gemma3":
            model = Gemma3ForCausalLM(Gemma3TextConfig(**gemma))
        elif architecture == "gemma2":
            caps = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": None}
            model = Gemma2ForCausalLM(Gemma2Config(**gemma, **caps))
    return model.float().eval()


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture
def model(architecture):
    return tiny(architecture)


# --- a tokenizer of a few words -----------------------------------------------------------------

WORDS = "[PAD] [BOS] [EOS] [UNK] user assistant : add the digits 3 7 + = so 0".split()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% if think %} so{% endif %}{% endif %}"
)


def word_tokenizer(words=WORDS, *, chat_template=None, eos="[EOS]"):
    """One id a word, in the order given. Like Llama's it writes a BOS before every text."""
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = ("[BOS]", vocabulary["[BOS]"])
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


# --- one pair -----------------------------------------------------------------------------------


def tiny_pair(architecture="llama", **settings):
    """A teacher.Pair of a student and a teacher of another width and depth, over the words."""
    from teacher import make_pair

    student = tiny(architecture, vocab_size=len(WORDS))
    teacher = tiny(architecture, seed=1, vocab_size=len(WORDS) + 8, hidden=16, layers=3)
    return make_pair(student, teacher, word_tokenizer(), word_tokenizer(), **settings)


# --- one world: checkpoints, prompts, and the Config of a run -----------------------------------

PROMPTS = (
    {"prompt": "add 3", "answer": "3"},
    {"prompt": "add 3 7", "answer": "0"},
    {"prompt": "add", "answer": "7"},
    {"prompt": "the digits 7", "answer": "7"},
    {"prompt": "so", "answer": "0"},
    {"prompt": "add the digits", "answer": "3"},
    {"prompt": "7 + 3 =", "answer": "0"},
    {"prompt": "3 =", "answer": "3"},
    {"prompt": "the", "answer": "7"},
    {"prompt": "add 0", "answer": "0"},
)


def write_lines(path, rows):
    """JSON lines, as a user writes them."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder of checkpoints (student, teacher, gpt2, gemma3, qwen3), prompts.jsonl,
    bare.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    write_lines(folder / "prompts.jsonl", PROMPTS)
    write_lines(folder / "bare.jsonl", [{"prompt": row["prompt"]} for row in PROMPTS])
    count = len(WORDS)
    checkpoints = {
        "student": tiny("llama", seed=0, vocab_size=count),
        "teacher": tiny("llama", seed=1, vocab_size=count + 8, hidden=48, layers=3),
        "gpt2": tiny("gpt2", seed=2, vocab_size=count + 3),
        "gemma3": tiny("gemma3", seed=3, vocab_size=count),
        "qwen3": tiny("qwen3", seed=4, vocab_size=count + 1),
    }
    for name, model in checkpoints.items():
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    return folder


def config(world, out, **change):
    """The Config of a short run in the world."""
    from plumbing.flags import Config

    settings = {
        "student": f"{world}/student",
        "teacher": f"{world}/teacher",
        "prompts": f"{world}/prompts.jsonl",
        "out": str(out),
        "steps": 4,
        "batch_size": 3,
        "n": 2,
        "device": "cpu",
        "max_new_tokens": 6,
        "k": 4,
        "lr": 1e-3,
        "eval_n": 1,
        "save_every": 2,
    }
    return Config(**{**settings, **change})


def rows(out):
    """The lines of metrics.jsonl, without what a clock or the operating system decides."""
    found = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.append({k: x for k, x in row.items() if not k.startswith(("time_", "peak_"))})
    return found


def weights(out):
    """The saved student of a run: {name: tensor}."""
    return AutoModelForCausalLM.from_pretrained(out / "student").state_dict()


def ready(cfg):
    """What a run has when its loop begins: Pair, prompts to learn from, held-out prompts."""
    from plumbing import flags, prompts
    from plumbing.models import load_pair

    pair = load_pair(cfg.student, cfg.teacher, **flags.of_pair(flags.check_run(cfg)))
    train, _, held_out = prompts.questions(cfg)
    return pair, prompts.encode_for(cfg, pair, train), prompts.encode_for(cfg, pair, held_out)


class Killed(BaseException):
    """Stands for kill -9 in tests of one process: nothing of opd.py catches it."""
