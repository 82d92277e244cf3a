"""Every causal architecture that transformers builds tiny from a configuration works, or is refused
in one line.

    python tests/test_architectures.py      tries them all and writes the table, architectures.md
"""

import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from analysis import diagnose  # noqa: E402
from plumbing import slots  # noqa: E402
from plumbing.models import probe  # noqa: E402
from teacher import Pair, UserError, has_linear_head, micro_batches, values_of  # noqa: E402

TABLE = Path(__file__).parent / "architectures.md"
VOCAB = 48
SECONDS = 30  # of a processor, for one architecture
SIZES = {  # a configuration is given those of these that it has
    VOCAB: "vocab_size",
    64: "max_position_embeddings n_positions n_ctx intermediate_size n_inner ffn_dim d_ff "
    "decoder_ffn_dim encoder_ffn_dim",
    32: "hidden_size n_embd d_model moe_intermediate_size shared_expert_intermediate_size "
    "word_embed_proj_dim embedding_size",
    16: "mamba_d_head mamba_head_dim",
    8: "head_dim state_size mamba_d_state kv_lora_rank q_lora_rank qk_rope_head_dim "
    "qk_nope_head_dim v_head_dim",
    6: "sliding_window window_size attention_window_size local_attention attention_chunk_size",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_experts num_local_experts n_routed_experts mamba_n_heads mamba_num_heads time_step_rank",
    2: "num_key_value_heads num_experts_per_tok eos_token_id mamba_expand expand",
    1: "n_groups mamba_n_groups n_group topk_group first_k_dense_replace bos_token_id",
}
OTHERS = {"pad_token_id": 0, "initializer_range": 0.3, "rotary_dim": 4}
OF_ONE = {  # attention in every other layer, where four layers would have none, and the like
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
}


def settings_of(name):
    """What the configuration of an architecture is given: {field: value}."""
    fields = vars(CONFIG_MAPPING[name]().get_text_config())
    given = dict(OTHERS)
    for size, names in SIZES.items():
        given.update(dict.fromkeys(names.split(), size))
    given = {field: value for field, value in given.items() if field in fields}
    given.update(OF_ONE.get(name, {}))
    if "qk_rope_head_dim" in given:  # attention through low ranks has head sizes of its own
        given.pop("head_dim", None)
        given["num_key_value_heads"] = 4
    return given


def configuration(name):
    """The configuration of a tiny model of an architecture."""
    kind = type(CONFIG_MAPPING[name]().get_text_config())
    given = settings_of(name)
    while True:
        try:
            return kind(**given)
        except Exception as error:  # a field that this configuration does not let itself be given
            said = str(error).replace("`", "'")
            wrong = [field for field in given if f"'{field}'" in said]
            if not wrong:
                raise
            del given[wrong[0]]


def build(name):
    """A tiny random model of an architecture, float32, in eval mode."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configuration(name)).float().eval()
    if sum(p.numel() for p in model.parameters()) > 3e7:
        raise ValueError("too large")
    return model


def outcome(name):
    """What becomes of an architecture, in words; an exception is a fault of ours."""
    try:
        model = build(name)
    except Exception:  # whatever a configuration makes of these sizes
        return "not built from these sizes"
    try:
        probe(model, name)
    except UserError as refusal:
        reason = str(refusal).split(": ", 1)[1].split(" ", 1)[1].split(";")[0]
        return "refused: " + reason.replace("|", "/")[:140]
    return "works" + graded(model)


def graded(model):
    """Let a model write, and grade itself as its own teacher: -> remarks for the table."""
    model.linear_head = has_linear_head(model)
    pair = Pair(model, model, None, vocab_size=VOCAB, eos_ids=[2])
    r = slots.rollout(
        model, [[5, 3, 6, 4], [7, 3]], n=2, max_new_tokens=6, seeds=[0, 1], **pair.sampling
    )

    def loss_and_diagnostics(log_p, log_q, y):
        return {"loss": -log_p.max(-1).values, **diagnose(log_p, log_q, y, 4)}

    apart = 0.0
    for part in micro_batches(r, 10_000):
        values = values_of(pair, part, loss_and_diagnostics)
        values["loss"].sum().backward()
        apart = max(apart, (values["log_p"] - part.log_p).abs().max().item())
    assert apart < 0.05, f"sampled and scored are {apart} nats apart"
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(x.isfinite().all() for x in gradients)
    said = ""
    if not model.linear_head:
        said += ", by its own logits"
    if apart > 1e-3:
        said += ", sampled and scored over .001 nats apart"
    return said


def tried(name):
    """`outcome` in a process of its own: some architectures never return, or crash."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            os.write(write, outcome(name).encode())
        except BaseException:
            os.write(write, ("TRACEBACK " + traceback.format_exc()[-300:]).encode())
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said or f"not tried: took over {SECONDS} s"


def table():
    """The outcomes as Markdown, a row for each."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    names_of = {}
    for name in NAMES:
        names_of.setdefault(tried(name), []).append(name)
    lines = [
        f"Tiny random models of transformers {transformers.__version__}, tried by "
        "`python tests/test_architectures.py`: probed, written by, graded.",
        "",
        "| outcome | architectures |",
        "|---|---|",
    ]
    order = sorted(names_of, key=lambda said: ("works" not in said, -len(names_of[said]), said))
    for said in order:
        lines.append(f"| {said} ({len(names_of[said])}) | {', '.join(names_of[said])} |")
    return "\n".join(lines) + "\n"


def working(text):
    """The architectures that work according to a table: set of str."""
    names = set()
    for line in text.splitlines():
        if line.startswith("| works"):
            names.update(line.split("|")[2].strip().split(", "))
    return names


@pytest.mark.slow
def test_every_architecture_works_or_is_refused_in_one_line():
    """None ends in a traceback, and none is scored from another softmax than it sampled from."""
    text = table()
    assert "TRACEBACK" not in text, text
    assert "mamba" in working(text)
    known = working(TABLE.read_text()) & NAMES.keys()  # this transformers may have fewer
    assert known <= working(text)


if __name__ == "__main__":
    TABLE.write_text(table())
    print(TABLE.read_text())
