"""Every causal architecture that transformers builds tiny from a configuration: it works, or it is refused in a line.

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
from plumbing.models import probe  # noqa: E402
from teacher import Pair, split  # noqa: E402

TABLE, VOCAB, SECONDS = Path(__file__).parent / "architectures.md", 48, 15
SMALL = {  # of these a configuration is given what it has
    VOCAB: "vocab_size",
    64: "max_position_embeddings n_positions n_ctx intermediate_size n_inner ffn_dim d_ff decoder_ffn_dim "
    "encoder_ffn_dim",
    32: "hidden_size n_embd d_model moe_intermediate_size shared_expert_intermediate_size word_embed_proj_dim "
    "embedding_size",
    16: "mamba_d_head mamba_head_dim",
    8: "head_dim state_size mamba_d_state kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_attention_heads n_head n_heads "
    "decoder_attention_heads encoder_attention_heads num_experts num_local_experts n_routed_experts mamba_n_heads "
    "mamba_num_heads time_step_rank",
    2: "num_key_value_heads num_experts_per_tok eos_token_id mamba_expand expand",
    1: "n_groups mamba_n_groups n_group topk_group first_k_dense_replace bos_token_id",
}
SMALL = {name: size for size, names in SMALL.items() for name in names.split()} | {
    "pad_token_id": 0,
    "initializer_range": 0.3,
    "rotary_dim": 4,
}
MORE = {  # attention in every other layer, where four would have none
    "bamba": dict(attn_layer_indices=[1, 3]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 2),
    "mamba2": dict(num_heads=4, head_dim=16),
}


def build(name):
    """A tiny random model of an architecture, float32, in eval mode."""
    kind = CONFIG_MAPPING[name]
    text = kind().get_text_config()
    given = {
        **{field: x for field, x in SMALL.items() if field in vars(text)},
        **MORE.get(name, {}),
    }
    if "qk_rope_head_dim" in given:  # attention through low ranks has head sizes of its own
        given.pop("head_dim", None)
        given["num_key_value_heads"] = 4
    while True:
        try:
            config = type(text)(**given)
            break
        except Exception as error:  # a field that this configuration does not let itself be given
            wrong = [
                field for field in given if f"'{field}'" in str(error) or f"`{field}`" in str(error)
            ]
            if not wrong:
                raise
            del given[wrong[0]]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    if sum(p.numel() for p in model.parameters()) > 3e7:
        raise ValueError("too large")
    return model


def tried(name):
    """What becomes of an architecture, in words; an exception where it would be a traceback."""
    try:
        model = build(name)
    except Exception:  # whatever a configuration makes of these sizes
        return "not built from these sizes"
    try:
        probe(model, name)
    except ValueError as refusal:
        return (
            "refused: "
            + str(refusal).split(": ", 1)[1].split(" ", 1)[1].split(";")[0].replace("|", "/")[:140]
        )
    parts = split(model, VOCAB)
    pair = Pair(
        model,
        model,
        None,
        dict(eos_ids=[2], merge_ends=True, pad_id=0, vocab_size=VOCAB),
        (parts, parts),
        torch.device("cpu"),
    )
    r = pair.write([[5, 3, 6, 4], [7, 3]], n=2, max_new_tokens=6, seed=0)
    grid = pair.grade(r, lambda *x: {"loss": -x[0].max(-1).values, **diagnose(*x, 4)}, scale=1.0)
    off = (grid["log_p"].nan_to_num() - r.log_p).abs().max()
    assert off < 0.05, f"sampled and scored are {off} nats apart"
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(x.isfinite().all() for x in gradients)
    apart = ", sampled and scored over .001 nats apart" * bool(off > 1e-3)
    return "works" + ", by its own logits" * parts.own_logits + apart


def told(name):
    """`tried` in a process of its own, since some take forever, or down with them the interpreter."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.alarm(SECONDS)
            os.write(write, tried(name).encode())
        except BaseException:
            os.write(write, ("TRACEBACK " + traceback.format_exc()[-300:]).encode())
        os._exit(0)
    os.close(write)
    with open(read) as said:
        text = said.read()
    os.waitpid(child, 0)
    return text or f"not tried: took over {SECONDS} s"


def table():
    """The outcome of each, as Markdown; those of one outcome in one row."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    rows = {}
    for name in NAMES:
        rows.setdefault(told(name), []).append(name)
    lines = [
        f"Tiny random models of transformers {transformers.__version__}, tried by `python "
        "tests/test_architectures.py`: probed, written by, graded.",
        "",
        "| outcome | architectures |",
        "|---|---|",
    ]
    for outcome, names in sorted(
        rows.items(), key=lambda row: ("works" not in row[0], -len(row[1]), row[0])
    ):
        lines.append(f"| {outcome} ({len(names)}) | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def working(made):
    """The architectures of a table that work, however: set of str."""
    return {
        name
        for line in made.splitlines()
        if line.startswith("| works")
        for name in line.split("|")[2].strip().split(", ")
    }


@pytest.mark.slow
def test_every_architecture_works_or_is_refused_in_one_line():
    """Cases 2 and the crashes: none ends in a traceback, none is graded by other numbers than it was sampled with."""
    made = table()
    assert "TRACEBACK" not in made, made
    assert "mamba" in working(made)
    assert working(TABLE.read_text()) & NAMES.keys() <= working(
        made
    )  # of those that this transformers has


if __name__ == "__main__":
    TABLE.write_text(table())
    print(TABLE.read_text())
