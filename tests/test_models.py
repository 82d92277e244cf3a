"""Laws of plumbing/models.py: what is loaded is what was saved, and a model that would be trained
on something else than it wrote is refused before the first step.

Files and flags that cannot work are in test_bad_input.py, all architectures in
test_architectures.py.
"""

import json
import re

import pytest
import torch
from conftest import ARCHITECTURES, TEMPLATE, VOCAB, WORDS, tiny, tiny_pair, word_tokenizer
from tokenizers import processors
from transformers import (
    BertConfig,
    BertLMHeadModel,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from loss import full_vocab
from plumbing import models, slots
from plumbing.exits import one_line
from plumbing.models import checkpoint_layers, load, load_pair, load_tokenizer, pick_device, probe
from rollout import from_texts, rollout
from teacher import UserError, micro_batches, states, values_of

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [3, 4, 13, 14], [10, 11]]
RESPONSES = [[10], [11, 12, 13, 14, 15, 3], [4, 11, 12], [13, 4, 5, 6, 7, 1, 2, 2]]


def save(folder, model, tokenizer=True):
    model.save_pretrained(folder)
    if tokenizer:
        word_tokenizer().save_pretrained(folder)


def change(folder, **values):
    """Write other values into a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# --- what is loaded ------------------------------------------------------------------------------


def test_a_loaded_model_says_what_the_saved_one_said_in_eval_mode(tmp_path):
    """In training mode dropout would make what is sampled and what is scored differ."""
    saved = tiny("gpt2", vocab_size=len(WORDS))
    save(tmp_path, saved, tokenizer=False)
    loaded = load(tmp_path)
    ids = torch.arange(5).unsqueeze(0)
    assert not loaded.training
    assert torch.equal(loaded(input_ids=ids).logits, saved(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pair_has_a_student_in_float32_and_a_frozen_teacher(world, dtype):
    """bfloat16 would lose small updates. The Pair has the settings of the flags."""
    pair = load_pair(
        f"{world}/student",
        f"{world}/teacher",
        device="cpu",
        dtype=dtype,
        ends="own",
        in_flight=3,
        micro_batch_tokens=77,
    )
    assert {p.dtype for p in pair.student.parameters()} == {torch.float32}
    assert {p.dtype for p in pair.teacher.parameters()} == {getattr(torch, dtype)}
    assert all(p.requires_grad for p in pair.student.parameters())
    assert not any(p.requires_grad for p in pair.teacher.parameters())
    assert not pair.student.training and not pair.teacher.training
    assert pair.dtype == getattr(torch, dtype)
    assert (pair.merge_ends, pair.in_flight, pair.micro_batch_tokens) == (False, 3, 77)
    assert load_pair(f"{world}/student", f"{world}/teacher", device="cpu").in_flight is None


def test_as_many_tokens_go_into_a_micro_batch_as_256_mib_hold():
    """A token takes 17 values of 4 bytes a layer and hidden unit, or one if checkpointed."""
    model = tiny("llama", hidden=32, layers=2)
    whole = models.activations(model, torch.device("cpu"), 4)
    assert whole == 2**29 // (17 * 2 * 32 * 4)
    assert models.activations(model, torch.device("cpu"), 2) == 2**29 // (17 * 2 * 32 * 2)
    checkpoint_layers(model)
    assert models.activations(model, torch.device("cpu"), 4) == 2**29 // (19 * 32 * 4)


def test_a_model_of_four_tokens_is_a_model(tmp_path):
    """The probe uses only ids that the model has."""
    save(tmp_path, tiny("llama", vocab_size=4), tokenizer=False)
    assert load(tmp_path).config.vocab_size == 4


def test_a_hub_is_asked_for_safetensors_and_no_code(world, monkeypatch):
    """A directory is looked at first; what a name on the hub holds only transformers knows."""
    plain = models.AutoModelForCausalLM.from_pretrained
    calls = []

    def watched(path, **how):
        calls.append(how)
        return plain(path, **how)

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", watched)
    load(world / "student")
    assert calls[0]["use_safetensors"] is True
    assert calls[0]["trust_remote_code"] is False


# --- weights and config.json ---------------------------------------------------------------------


@pytest.mark.parametrize("layers, biases", [(2, True), (4, False)])
def test_a_weight_without_a_place_is_refused(tmp_path, layers, biases):
    """LlamaFactory#3721, transformers#44031: config.json has 2 layers and no biases, the file has
    weights of 4 layers, or biases. transformers drops the rest in silence."""
    config = tiny("llama", layers=layers).config
    config.attention_bias = biases
    save(tmp_path, LlamaForCausalLM(config), tokenizer=False)
    change(tmp_path, num_hidden_layers=2, attention_bias=False)
    if biases:
        first = "model.layers.0.self_attn.k_proj.bias (8 such in all)"
    else:
        first = "model.layers.2.input_layernorm.weight (18 such in all)"
    with pytest.raises(UserError, match=re.escape(first) + " has no place in the model"):
        load(tmp_path)


def test_a_missing_weight_and_one_of_another_shape_are_refused(tmp_path):
    """transformers would fill them with random numbers."""
    save(tmp_path / "more", tiny("llama", layers=2), tokenizer=False)
    change(tmp_path / "more", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"layers.2.* \(9 such in all\) is missing, or has another"):
        load(tmp_path / "more")
    save(tmp_path / "wider", tiny("llama"), tokenizer=False)
    change(tmp_path / "wider", intermediate_size=96)
    with pytest.raises(UserError, match=r"mlp.* \(6 such in all\) is missing, or has another"):
        load(tmp_path / "wider")


def test_what_transformers_says_of_a_checkpoint_is_shown(tmp_path, caplog):
    """A tokenizer of Mistral, saved by an old version, splits text wrongly. transformers says so
    while it loads, and the user hears it."""
    words = [*WORDS, *(f"w{i}" for i in range(100_000))]  # as large as Mistral's
    word_tokenizer(words).save_pretrained(tmp_path)
    config = {"model_type": "mistral", "transformers_version": "4.56.0"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    with one_line("test"):
        load_tokenizer(tmp_path)
    assert "incorrect tokenization" in caplog.text


def test_a_refused_checkpoint_is_one_line(tmp_path, caplog):
    """The table that transformers prints of the same weights is left out."""
    save(tmp_path, tiny("llama"), tokenizer=False)
    change(tmp_path, num_hidden_layers=1)
    with one_line("test"), pytest.raises(UserError):
        load(tmp_path)
    assert "LOAD REPORT" not in caplog.text


def test_a_quantised_student_is_refused_before_it_is_loaded(tmp_path):
    """Its weights cannot be trained."""
    save(tmp_path, tiny("llama"), tokenizer=False)
    change(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match="quantised weights cannot be trained; take the checkpoint"):
        load(tmp_path, trainable=True)


# --- directory or hub ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["studnet", "./studnet", "a/b/c", "here/studnet", "/no/where"])
def test_a_path_that_is_not_there_is_said_at_once(path, tmp_path, monkeypatch):
    """A typo is not looked for on the hub. A bare name is a directory only, and so is OWNER/NAME if
    OWNER is a folder here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(models, "AutoTokenizer", None)
    with pytest.raises(UserError, match=f"^{path}: no such directory here; give the directory"):
        load_tokenizer(path)


def test_a_name_of_an_owner_is_looked_for_on_the_hub(tmp_path, monkeypatch, capsys):
    """Only OWNER/NAME is, after no such directory was found."""
    monkeypatch.chdir(tmp_path)
    calls = []

    class Hub:
        def from_pretrained(path, **how):
            calls.append(path)

    monkeypatch.setattr(models, "AutoTokenizer", Hub)
    load_tokenizer("HuggingFaceTB/SmolLM2-135M")
    assert calls == ["HuggingFaceTB/SmolLM2-135M"]
    assert "no such directory here, asking the hub" in capsys.readouterr().err


# --- two tokenizers ------------------------------------------------------------------------------


def tokenizer_without_bos():
    """trl#5885: it has the same ids, but writes no BOS, so the teacher reads what it never saw."""
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", special_tokens=[]
    )
    return tokenizer


def tokenizer_padding_with(token):
    tokenizer = word_tokenizer()
    tokenizer.pad_token = token
    return tokenizer


@pytest.mark.parametrize(
    "other, sentence",
    [
        (tokenizer_padding_with("so"), "special tokens of only one of the two: ['[PAD]', 'so']"),
        (word_tokenizer(chat_template=TEMPLATE), "chat templates differ: a prompt goes"),
        (tokenizer_without_bos(), "the tokenizers encode"),
        (word_tokenizer(), None),
    ],
)
def test_tokenizers_that_work_together_but_differ_are_told_of(other, sentence):
    found = models.surprises(word_tokenizer(), other)
    assert len(found) == (sentence is not None)
    assert sentence is None or found[0].startswith(sentence)


def test_surprises_are_warnings_of_the_pair(world, tmp_path):
    save(tmp_path, tiny("llama", seed=1, vocab_size=len(WORDS)))
    word_tokenizer(chat_template=TEMPLATE).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="chat templates differ"):
        load_pair(world / "student", tmp_path, device="cpu")


# --- the probe -----------------------------------------------------------------------------------


def gpt_neo(window=6):
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=window,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPTNeoForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "gpt2", "qwen3"])
def test_the_probe_passes_what_works(architecture, dtype):
    probe(tiny(architecture), architecture, dtype)


def test_a_window_that_a_fast_decoder_gets_wrong_is_an_error(monkeypatch):
    """TensorRT-Model-Connect#660: GPT-Neo's local windows all end at the cache's last column. In
    slots, where rows join later, sampled and scored would be nats apart. The slots leave GPT-Neo
    out; if they did not, the probe would refuse it."""
    probe(gpt_neo(), "neo")
    monkeypatch.setattr(slots, "kind_of", lambda model: slots.Slots)
    with pytest.raises(UserError, match="neo: GPTNeoForCausalLM samples from another softmax"):
        probe(gpt_neo(), "neo")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("seed", range(5))
def test_rows_of_the_probe_join_rows_that_are_on_their_way(architecture, seed, monkeypatch):
    """Else a decoder that mixes rows up would pass."""
    joined = []
    plain = slots.Slots.join

    def watched(self):
        before = self.rows
        plain(self)
        joined.append(0 < before < self.rows)

    monkeypatch.setattr(slots.Slots, "join", watched)
    models.written(tiny(architecture, seed=seed))
    assert any(joined)


def test_the_text_of_the_probe_is_longer_than_a_window():
    """If a window is longer than the model's positions, it cannot be seen at all."""
    for model, window in ((gpt_neo(6), 6), (gpt_neo(40), 40), (tiny("gemma3"), 5)):
        assert models.window(model.config) == window
        r = models.written(model)
        texts = r.attention_mask.sum(1)
        assert (texts > window).sum() >= 2
    assert models.written(gpt_neo(256)).ids.size(1) <= 64
    assert models.window(tiny("llama").config) == 0


class ReadsAhead(LlamaForCausalLM):
    """A llama whose attention is not causal."""

    def forward(self, input_ids=None, attention_mask=None, **inputs):
        rows, columns = input_ids.shape
        past = inputs.get("cache")
        if past is None:
            attention_mask = torch.zeros(rows, 1, columns, columns)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **inputs)


class NoCache(LlamaForCausalLM):
    """A llama that forgets what it read before. Its forward accepts unknown arguments."""

    def forward(self, input_ids=None, cache=None, attention_mask=None, **inputs):
        if input_ids.size(1) == 1:
            attention_mask = None
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **inputs)


class OldCache(LlamaForCausalLM):
    """A llama that knows no argument `cache`."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None,
                logits_to_keep=0):  # fmt: skip
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )


class NoMask(LlamaForCausalLM):
    """A llama that reads the padding of a prompt like text."""

    def forward(self, input_ids=None, attention_mask=None, **inputs):
        if input_ids.size(1) > 1:
            attention_mask = torch.ones_like(attention_mask)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **inputs)


@pytest.mark.parametrize(
    "kind, sentence",
    [
        (ReadsAhead, "is no causal language model, a later token changes"),
        (NoCache, "samples from another softmax than a reading of the whole text gives"),
        (OldCache, "cannot write: .*cache"),
        (NoMask, "reads a text differently if padding stands before it"),
    ],
)
def test_a_model_that_breaks_a_promise_is_refused(kind, sentence):
    """The forward of a checkpoint's own code may make every token nats off, or fail in step 1."""
    torch.manual_seed(0)
    model = kind(tiny("llama").config).eval()
    with pytest.raises(UserError, match=sentence):
        probe(model, "custom")


def test_bert_is_no_causal_language_model():
    """It loads as one, but reads ahead."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.3,
    )
    with pytest.raises(UserError, match="bert: BertLMHeadModel is no causal language model"):
        probe(BertLMHeadModel(config).eval(), "bert")


def mamba(kind, seed):
    torch.manual_seed(seed)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "mamba2":
        heads = {"num_heads": 4, "head_dim": 16, "n_groups": 1}
        config = Mamba2Config(**sizes, **ids, **heads, initializer_range=0.3)
        return Mamba2ForCausalLM(config).eval()
    if kind == "falcon-mamba":
        config = FalconMambaConfig(**sizes, **ids, initializer_range=0.3)
        return FalconMambaForCausalLM(config).eval()
    return MambaForCausalLM(MambaConfig(**sizes, **ids, initializer_range=0.3)).eval()


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("mamba", "float32"),
        ("mamba", "bfloat16"),
        ("falcon-mamba", "bfloat16"),
        pytest.param("mamba2", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_models_of_states_alone_work_in_the_dtype_of_the_run(kind, dtype, tmp_path):
    """transformers#43828, transformers#46773: with a bfloat16 teacher, or under autocast, such
    models may fail in the middle of a run. Here they work, with gradients."""
    for name, seed in (("student", 0), ("teacher", 1)):
        save(tmp_path / name, mamba(kind, seed))
    pair = load_pair(tmp_path / "student", tmp_path / "teacher", device="cpu", dtype=dtype)
    with pair.autocast():
        r = slots.rollout(
            pair.student, PROMPTS, n=2, max_new_tokens=6, seeds=[0, 1, 2, 3], **pair.sampling
        )
    for part in micro_batches(r, 20):
        values = values_of(pair, part, lambda log_p, log_q, y: {"loss": full_vocab(log_p, log_q)})
        values["loss"].sum().backward()
    assert all(p.grad.isfinite().all() for p in pair.student.parameters() if p.grad is not None)


def test_the_probe_runs_in_the_dtype_of_the_run(tmp_path, monkeypatch):
    """What fails only in this dtype fails before the first step. The student's weights are float32,
    and it computes under autocast."""
    for name in ("student", "teacher"):
        save(tmp_path / name, tiny("llama", vocab_size=len(WORDS)))
    pair = (tmp_path / "student", tmp_path / "teacher")
    plain = LlamaForCausalLM.forward

    def fails_in_bfloat16(self, *args, **inputs):
        out = plain(self, *args, **inputs)
        if out.logits.dtype == torch.bfloat16:
            raise RuntimeError("expected m1 and m2 to have the same dtype")
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", fails_in_bfloat16)
    load_pair(*pair, device="cpu")
    with pytest.raises(UserError, match="student: LlamaForCausalLM cannot be run: expected m1"):
        load_pair(*pair, device="cpu", dtype="bfloat16")


# --- devices -------------------------------------------------------------------------------------


def test_a_process_of_several_asks_for_its_own_gpu(monkeypatch):
    """No process opens a context on the first GPU before its own is set."""
    asked = []

    def ones(*_, device, **__):
        asked.append(device)
        return torch.zeros(())

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "ones", ones)
    pick_device("cuda")
    assert asked == ["cuda:3"]


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "cuda:99"])
def test_a_device_that_cannot_be_used_is_refused(name):
    with pytest.raises(UserError, match=f"^--device {name}: .*; --device cpu works everywhere"):
        pick_device(name)
    assert pick_device("auto").type in ("cpu", "cuda")


# --- checkpointed layers -------------------------------------------------------------------------


def gradients(pair, r):
    """{parameter: gradient} of the sum of a loss over a rollout."""
    pair.student.zero_grad()
    for part in micro_batches(r, 10_000):
        values = values_of(pair, part, lambda log_p, log_q, y: {"loss": full_vocab(log_p, log_q)})
        values["loss"].sum().backward()
    found = {}
    for name, p in pair.student.named_parameters():
        if p.grad is not None:
            found[name] = p.grad.clone()
    return found


def kept_for_backward(model, r):
    """The bytes that autograd keeps of the layers until the backward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        h = states(model, micro_batches(r, 10_000)[0])
        assert h.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpointed_layers_give_the_same_gradients_from_less_memory(architecture):
    """trl#6827: transformers checkpoints layers only in training mode. Here the model stays in eval
    mode, writes the same tokens and has the same gradients."""
    pair = tiny_pair(architecture)
    how = {"n": 2, "max_new_tokens": 6, "eos_ids": [], "seeds": [0, 1, 2, 3]}
    before = rollout(pair.student, PROMPTS, **how)
    plain = gradients(pair, before)
    kept = kept_for_backward(pair.student, before)
    checkpoint_layers(pair.student)
    after = rollout(pair.student, PROMPTS, **how)
    assert not pair.student.training
    assert torch.equal(before.ids, after.ids) and torch.equal(before.log_p, after.log_p)
    torch.testing.assert_close(gradients(pair, after), plain, rtol=1e-4, atol=1e-5)
    assert kept_for_backward(pair.student, before) < 0.5 * kept


def test_a_checkpointed_layer_does_not_drop_out():
    """OPT's layers read their own training flag, so checkpointing must not set it."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=64,
        dropout=0.5,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    pair = tiny_pair()
    pair.student = OPTForCausalLM(config).eval()
    r = from_texts(PROMPTS, RESPONSES)
    plain = gradients(pair, r)
    checkpoint_layers(pair.student)
    torch.testing.assert_close(gradients(pair, r), plain, rtol=1e-4, atol=1e-5)


def test_what_has_no_layers_to_checkpoint_is_refused():
    with pytest.raises(UserError, match="Linear has no layers .*leave --gradient-checkpointing"):
        checkpoint_layers(torch.nn.Linear(2, 2))
