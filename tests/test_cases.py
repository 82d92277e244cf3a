"""Small inputs that once came out wrong, each after a public report (repository#number) or a reading of every line.

Those of one kind stand elsewhere: different ends in test_ends.py, answers in test_answers.py, verdicts in
test_diagnose.py, architectures in test_architectures.py. tests/README.md maps them all.
"""

import contextlib
import io
import json

import pytest
import torch
from conftest import TEMPLATE, WORDS, tiny, word_tokenizer
from test_opd import config  # noqa: F401: a fixture
from tokenizers import processors
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
)

import analysis
import opd
import recipes
from analysis import continuation
from plumbing import files, measure
from plumbing.answers import answered
from plumbing.files import append_answers, check_call
from plumbing.flags import parse_analysis, parse_recipes
from plumbing.models import load, pick_device, probe
from plumbing.prompts import (
    check_fits,
    encode,
    load_conversations,
    load_prompts,
    positions,
    questions,
)
from rollout import Rollout, rollout
from teacher import Pair, eos_ids, log_probs, states

EOS, SO = 2, WORDS.index("so")


def paired(**tokenizer):
    student, teacher = (tiny("llama", seed=seed, vocab_size=len(WORDS)) for seed in (0, 1))
    for model in (student, teacher):
        model.generation_config.eos_token_id = EOS
    return Pair.of(student, teacher, word_tokenizer(**tokenizer), word_tokenizer(**tokenizer))


def lines(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(
    "kind, how", [(MambaForCausalLM, MambaConfig), (FalconMambaForCausalLM, FalconMambaConfig)]
)
def test_a_model_of_states_alone_samples_from_what_it_scores(kind, how):
    """Case 2, transformers#46773, #32677: a mask of L + 1 columns reached a one-token input, and from the third token
    on what was recorded was up to 8.5 nats off.
    """
    torch.manual_seed(0)
    model = kind(
        how(
            vocab_size=48,
            hidden_size=32,
            state_size=8,
            num_hidden_layers=2,
            initializer_range=0.3,
            eos_token_id=2,
            pad_token_id=0,
            bos_token_id=1,
        )
    ).eval()
    r = rollout(model, [[5, 6, 7, 8], [9]], n=3, max_new_tokens=10, eos_ids=[2], seeds=[0, 1])
    scored = log_probs(model, r.ids, r.attention_mask, r.is_response)
    y = r.ids[r.is_response]
    scored = scored.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(scored, r.log_p[r.response_mask], rtol=0, atol=1e-4)
    probe(model, "mamba")


def test_a_text_that_crosses_the_original_length_of_longrope_is_refused():
    """Case 3, transformers#33129, unsloth#1199: from that length on all positions turn otherwise, the first ones too,
    and a short row read otherwise beside a long one.
    """
    rope = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4, rope_theta=1e4)
    config = Phi3Config(
        vocab_size=48,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters=rope,
    )
    assert positions(config) == 16 and positions(tiny("llama").config) == 64
    pair = paired()
    pair.teacher.config.rope_parameters = {**rope, "original_max_position_embeddings": 16}
    check_fits(pair, [4] * 6, 10, "a prompt")
    with pytest.raises(ValueError, match="need 17 tokens, .* holds 16; lower --max-new-tokens"):
        check_fits(pair, [4] * 6, 11, "a prompt")


@pytest.mark.parametrize("template", [None, TEMPLATE + "[EOS]"])
def test_a_prompt_ends_with_no_end_of_text(template):
    """Case 4, trlx#287: some tokenizers append it, and the student would write on after the end."""
    tokenizer = word_tokenizer(chat_template=template)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS] [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", EOS)]
    )
    assert encode(tokenizer, "add 3")[-1] not in (EOS,) and encode(tokenizer, "add 3")[0] == 1


OPENED = TEMPLATE.replace("assistant :{%", "assistant : <think> {%")
THINKING = [word if word != "0" else "<think>" for word in WORDS]


@pytest.mark.parametrize(
    "answer, kept",
    [("<think> so", "so"), ("<think>\nso", "so"), ("so", "so"), (" <think>so", "so")],
)
def test_a_thought_is_opened_once(tmp_path, answer, kept):
    """Case 5, trl#6361: the generation prompt opens <think>, and the answer of the file does so again."""
    pair = paired(words=THINKING, chat_template=OPENED)
    chat = [{"role": "user", "content": "add 3"}, {"role": "assistant", "content": answer}]
    [(prompt, response)] = load_conversations(lines(tmp_path / "c.jsonl", {"messages": chat}), pair)
    assert prompt[-1] == THINKING.index("<think>") and response == [SO, EOS]
    plain = paired(words=THINKING, chat_template=TEMPLATE)
    [(prompt, response)] = load_conversations(tmp_path / "c.jsonl", plain)
    assert response == plain.tokenizer(answer, add_special_tokens=False).input_ids + [
        EOS
    ]  # not opened: all of it


def test_reasoning_beside_the_content_is_refused_with_its_line(tmp_path):
    """Case 6, minimind#737: it was dropped, and the thought never closed."""
    user, said = {"role": "user", "content": "add 3"}, {"role": "assistant", "content": "so"}
    path = lines(
        tmp_path / "c.jsonl",
        {"messages": [user, said]},
        {"messages": [user, {**said, "reasoning_content": "3 so"}]},
    )
    with pytest.raises(
        ValueError, match=r'c.jsonl:2 has "reasoning_content"; write it into "content"'
    ):
        load_conversations(path, paired())


def test_both_models_finish_a_response_in_the_dtype_of_the_computation():
    """Case 7: the student finished in float32 what the run computes in bfloat16: not the student that is trained."""
    pair, inside, seen = paired(), [], []

    @contextlib.contextmanager
    def autocast():
        inside.append(1)
        yield
        inside.pop()

    pair.autocast = autocast
    for model in (pair.student, pair.teacher):
        model.register_forward_pre_hook(
            lambda *_, model=model: seen.append((model is pair.student, len(inside)))
        )
    rows = [{"ids": [5, 6], "answer": "3"}]
    continuation(pair, rows, [[7, 8]], [0.5], answered=answered, n=1, max_new_tokens=6)
    assert set(seen) == {(True, 1), (False, 1)}


@pytest.mark.parametrize("line", ["{}", "[]", "no JSON", '{"why": "bored"}'])
def test_a_dropped_answer_without_a_reason_is_one_line(tmp_path, line):
    """The file was edited by hand: named, nothing written over."""
    (tmp_path / "c.jsonl.dropped.jsonl").write_text(line + "\n")
    with pytest.raises(
        ValueError, match="c.jsonl.dropped.jsonl: .* is no line of recipes.py; restore the file"
    ):
        append_answers(tmp_path / "c.jsonl", lambda start: [])
    assert (tmp_path / "c.jsonl.dropped.jsonl").read_text() == line + "\n"


def test_answers_of_another_call_are_not_gone_on_with(tmp_path):
    """Case 8: an --out that was there and other flags said "4 kept", and the files were the old ones."""
    path, call = tmp_path / "c.jsonl", dict(teacher="T", temperature=0.7, prompts="digest")
    check_call(path, call)
    append_answers(path, lambda start: [])
    check_call(path, {**call, "count": 5})
    with pytest.raises(
        ValueError, match="was not begun with this --temperature; give the same flags to go on"
    ):
        check_call(path, {**call, "temperature": 1.0})
    (tmp_path / "c.jsonl.call.json").unlink()
    with pytest.raises(ValueError, match="was not begun with this --teacher"):
        check_call(path, call)
    (tmp_path / "c.jsonl.dropped.jsonl").rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match="c.jsonl.dropped.jsonl one is gone, .* remove the other to begin anew"
    ):
        check_call(path, call)
    with pytest.raises(ValueError, match="a folder; give a file in it"):
        check_call(tmp_path, call)


def test_a_path_put_another_way_is_the_same_call(tmp_path, monkeypatch):
    """teacher and ./teacher, or its absolute path."""
    (tmp_path / "teacher").mkdir()
    monkeypatch.chdir(tmp_path)
    append_answers(tmp_path / "c.jsonl", lambda start: [])
    (tmp_path / "c.jsonl.call.json").write_text('{"teacher": "teacher"}')
    check_call(tmp_path / "c.jsonl", dict(teacher=str(tmp_path / "teacher")))


def test_two_calls_do_not_write_one_file(tmp_path):
    """The second is told at once; every line would stand there twice."""

    def batches(start):
        with pytest.raises(ValueError, match="another process is at it"):
            append_answers(tmp_path / "c.jsonl", lambda start: [])
        return [[{"messages": [], "why": "kept"}]]

    assert append_answers(tmp_path / "c.jsonl", batches)["kept"] == 1


def test_a_torn_line_is_cut_off_by_the_first_process_alone(tmp_path, monkeypatch):
    """The others would look at its length again and cut off a good line."""
    path, cut = tmp_path / "c.jsonl", []
    path.write_text('{"messages": []}\n{"mess')
    monkeypatch.setattr(files.os, "truncate", lambda *_: cut.append(True))
    monkeypatch.setattr(files, "gathered", lambda mine: [dict(kept=1, unfinished=0, degenerate=0)])
    for rank in (1, 0):
        monkeypatch.setattr(files, "processes", lambda: (rank, 2))
        assert append_answers(path, lambda start: [])["kept"] == 1 and len(cut) == (rank == 0)


def test_a_loop_that_ends_is_a_loop():
    """Case 9: responses were counted with their eos, which breaks any loop at its end."""
    ids = torch.tensor([[5] * 20 + [EOS], [5] * 21, [*range(3, 24)]])
    true = torch.ones_like(ids, dtype=torch.bool)
    r = Rollout(ids, true, true, torch.zeros(ids.shape), torch.tensor([False, True, True]))
    grid = {
        name: torch.zeros(ids.shape)
        for name in (
            "log_p",
            "overlap_token_advantage",
            "entropy_student",
            "entropy_teacher",
            "reward",
            "overlap_ratio",
        )
    }
    assert measure.means(grid, r, 21)["repetition_fraction"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("role", ["assistant", "system"])
def test_a_prompt_that_ends_with_no_user_is_refused_with_its_line(tmp_path, role):
    """Case 10, xinference#4833: --template put its text into the assistant's message."""
    user = {"role": "user", "content": "add 3"}
    path = lines(
        tmp_path / "p.jsonl",
        {"prompt": [user]},
        {"prompt": [user, {"role": role, "content": "so"}]},
    )
    with pytest.raises(
        ValueError, match=f"p.jsonl:2 ends with what the {role} says; a prompt ends with the user"
    ):
        load_prompts(path)
    assert load_prompts(lines(path, {"prompt": [user, {"role": "tool", "content": "7"}]}))


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_switch_that_the_template_does_not_have_is_refused(template):
    """Case 11, trl#2919: --thinking off did nothing."""
    with pytest.raises(
        ValueError, match="--thinking off: the student's chat template has no enable_thinking"
    ):
        encode(word_tokenizer(chat_template=template), "add 3", "off")


def test_a_pool_of_which_nothing_is_kept_is_a_line():
    """Case 13: long prompts were dropped, and `min() arg is an empty sequence` came of it."""
    rows = [{"prompt": "add 3"}, {"prompt": "add 7"}]
    with pytest.raises(ValueError, match="--keep 0.5: of 1 prompts that keeps none, or all"):
        recipes.select(
            paired(), rows, lambda rows: [{**rows[0], "ids": [5, 6]}], max_new_tokens=4, k=4
        )


def test_the_size_of_a_mixture_is_said(world, tmp_path):  # noqa: F811
    """Case 14: 30 aligned prompts and 17,000 others at .5 are 61, and nobody was told."""
    aligned = lines(tmp_path / "aligned.jsonl", {"prompt": "add 3 3 3"}, {"prompt": "add 7 7 7"})
    with pytest.warns(
        UserWarning, match="the largest such mixture has 5 prompts; 5 of 10 are left out"
    ):
        train, _, _ = questions(config(world, tmp_path, aligned_prompts=str(aligned)))
    assert len(train) == 5


def test_a_process_of_several_asks_for_its_own_gpu(monkeypatch):
    """Case 15: every process opened a context on the first GPU, before its own was set."""
    asked = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(
        torch, "ones", lambda *_, device, **__: asked.append(device) or torch.zeros(())
    )
    pick_device("cuda")
    assert asked == ["cuda:3"]


def test_states_are_picked_where_the_trunk_has_left_them(monkeypatch):
    """Case 15: under --teacher-device-map they lie on another device than the tokens, where the mask is taken."""
    is_response, asked, plain = torch.tensor([[False, True, True]]), [], torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda x, device: asked.append((x.dtype, device)) or plain(x, device)
    )
    h = states(
        lambda ids, mask: torch.arange(3.0).view(1, 3, 1),
        is_response.long(),
        is_response,
        is_response,
    )
    assert h.flatten().tolist() == [0, 1] and asked == [(torch.bool, h.device)]


def test_an_end_of_minus_one_is_no_end():
    """A generation_config.json with eos_token_id -1 was an OverflowError."""
    model = tiny("llama", vocab_size=len(WORDS))
    model.generation_config.eos_token_id = -1
    assert eos_ids(model, word_tokenizer()) == {EOS}


def test_a_quantised_student_is_refused_before_it_is_loaded(tmp_path):
    """Its weights cannot be trained; to install something, as transformers advised, led nowhere."""
    model = tiny("llama", vocab_size=len(WORDS))
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    quantised = {**told, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(
        ValueError, match="quantised weights cannot be trained; take the checkpoint that"
    ):
        load(tmp_path, trainable=True)


@pytest.mark.parametrize(
    "takes_all, says", [(True, "samples from another softmax"), (False, "cannot write: .*cache")]
)
def test_code_of_a_checkpoint_that_knows_no_cache_of_ours_is_refused(takes_all, says):
    """Its forward takes past_key_values: a TypeError, or with **kwargs every token 3.6 nats off."""
    model = tiny("llama")
    plain = model.forward

    def forward(
        input_ids,
        attention_mask=None,
        position_ids=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        out = plain(
            input_ids=input_ids,
            attention_mask=attention_mask if input_ids.size(1) > 1 else None,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )
        return out

    model.forward = (
        forward
        if takes_all
        else (
            lambda input_ids, attention_mask=None, position_ids=None, use_cache=None, logits_to_keep=0: (
                forward(input_ids, attention_mask, position_ids, use_cache, logits_to_keep)
            )
        )
    )
    with pytest.raises(ValueError, match=says):
        probe(model, "custom")


@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize(
    "parse, words",
    [
        (parse_analysis, ["--student", "s", "--teacher", "t", "--temperature"]),
        (
            parse_recipes,
            [
                "rollouts",
                "--student",
                "s",
                "--teacher",
                "t",
                "--prompts",
                __file__,
                "--temperature",
            ],
        ),
    ],
)
def test_a_number_that_is_none_is_refused_by_every_command(parse, words, number):
    """Case 12: analysis.py and recipes.py went on with it, to a traceback or a verdict."""
    with pytest.raises(ValueError, match=f"--temperature {number}: must be (at least|above) 0"):
        parse([*words, number])


def test_a_mismatch_is_told_at_once(world, tmp_path, monkeypatch):  # noqa: F811
    """Case 19: held_out_before knew it, the warning waited for step 1, and analysis.py never gave one."""

    def off(*args, **how):
        r = rollout(*args, **how)
        r.log_p -= 0.5
        return r

    monkeypatch.setattr("teacher.rollout", off)
    monkeypatch.setattr("opd.update", lambda *_: pytest.fail("a step was taken before it was said"))
    with (
        pytest.warns(UserWarning, match="differ by up to 0.5 nats: this is not on-policy"),
        pytest.raises(pytest.fail.Exception),
    ):
        opd.distil(config(world, tmp_path / "run"))
    out, err = tmp_path / "d.json", io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        analysis.main(
            [
                "--student",
                f"{world}/student",
                "--teacher",
                f"{world}/teacher",
                "--prompts",
                f"{world}/prompts.jsonl",
                "--count",
                "4",
                "--k",
                "4",
                "--max-new-tokens",
                "6",
                "--out",
                str(out),
            ]
        )
    assert (
        "warning: log-probabilities as sampled and as scored differ by up to 0.5 nats"
        in err.getvalue()
    )
    assert json.loads(out.read_text())["sampling_mismatch"] == pytest.approx(0.5, abs=1e-3)
