"""What a user can get wrong: refused in one line that says what and what to do, with exit code 2, and nothing is left.

Each case is a change of a command that works. No case without a model takes five seconds, and none of those loads one.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import WORDS, tiny, word_tokenizer
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import opd
from plumbing import models

LINE = '{"prompt": "add 3", "answer": "3"}'
TEXTS = {  # name of a file of prompts: what it holds
    "prompts": "\n".join(
        json.dumps({"prompt": f"add {a} {b}", "answer": "0"}) for a in (0, 3, 7) for b in (0, 3, 7)
    ),
    "empty": "",
    "blank": " \n\n",
    "cut": LINE + '\n{"prompt": "add',
    "list": '["add", "3"]',
    "other-key": '{"question": "add 3"}',
    "number": '{"prompt": 3}',
    "no-text": '{"prompt": "  "}',
    "answer-number": '{"prompt": "add 3", "answer": 3}',
    "answer-list": '{"prompt": "add 3", "answer": ["3"]}',
    "answer-empty": '{"prompt": "add 3", "answer": ""}',
    "chat-empty": '{"prompt": []}',
    "chat-no-role": '{"prompt": [{"content": "add"}]}',
    "chat-strings": '{"prompt": ["add", "3"]}',
    "chat-parts": '{"prompt": [{"role": "user", "content": ["add"]}]}',
    "half": '{"prompt": "\\ud83d add"}',
    "deep": '{"prompt": ' + "[" * 100_000,
    "digits": '{"prompt": ' + "7" * 5000 + "}",
    "long": json.dumps({"prompt": "add " * 70, "answer": "0"}),
    "one": LINE,
    "conversation": '{"messages": [{"role": "user", "content": "add"}]}',
}


def save(folder, model, tokenizer=True):
    model.save_pretrained(folder)
    if tokenizer:
        (word_tokenizer() if tokenizer is True else tokenizer).save_pretrained(folder)


def change(folder, **values):
    """Other values in the config.json of a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Checkpoints and files of prompts, most of them broken, each in one way."""
    folder, V = tmp_path_factory.mktemp("bad"), len(WORDS)
    for name, text in TEXTS.items():
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    good = tiny("llama", vocab_size=V)
    for name in (
        "student",
        "teacher",
        "truncated",
        "garbage",
        "pickle",
        "no-config",
        "bad-config",
        "bad-tokenizer",
        "another-size",
        "not-finite",
        "own-code",
        "unknown-type",
    ):
        save(folder / name, good)
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "garbage" / "model.safetensors").write_bytes(b"no weights at all")
    (folder / "pickle" / "model.safetensors").unlink()
    torch.save(good.state_dict(), folder / "pickle" / "pytorch_model.bin")
    (folder / "no-config" / "config.json").unlink()
    (folder / "bad-config" / "config.json").write_text("{")
    (folder / "bad-tokenizer" / "tokenizer.json").write_text("{")
    change(folder / "another-size", hidden_size=64, head_dim=16)
    change(folder / "unknown-type", model_type="none-that-there-is")
    change(
        folder / "own-code",
        model_type="mine",
        auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"},
    )
    (folder / "own-code" / "mine.py").write_text(f"open({str(folder / 'was-run')!r}, 'w')")
    broken = tiny("llama", vocab_size=V)
    broken.get_output_embeddings().weight.data[3] = float("nan")
    save(folder / "not-finite", broken)
    save(folder / "no-tokenizer", good, tokenizer=False)
    save(folder / "headless", good.model)
    save(folder / "other-tokens", good, word_tokenizer(WORDS[:4] + WORDS[:3:-1]))
    save(folder / "end-beyond", good)
    change(folder / "end-beyond", eos_token_id=99)
    save(folder / "no-end", good, word_tokenizer(eos=None))
    small = dict(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    save(folder / "bert", BertForMaskedLM(BertConfig(**small)))
    save(
        folder / "t5",
        T5ForConditionalGeneration(
            T5Config(
                vocab_size=V,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        ),
    )
    opd.main(words(folder, folder / "done", {}))
    shutil.copytree(folder / "done", folder / "cut")
    (folder / "cut" / "result.json").unlink()
    shutil.copytree(folder / "cut", folder / "damaged")
    state = folder / "damaged" / "checkpoint" / "state.pt"
    state.write_bytes(state.read_bytes()[:5000])
    shutil.copytree(folder / "cut", folder / "lost")
    shutil.rmtree(folder / "lost" / "checkpoint")
    shutil.copytree(folder / "cut", folder / "another's")
    torch.save({"hello": 1}, folder / "another's" / "checkpoint" / "state.pt")
    return folder


def words(world, out, flags):
    """A command that works, as words, with some flags changed: None leaves one out, True is a switch."""
    flags = {
        **dict(
            student=world / "student",
            teacher=world / "teacher",
            prompts=world / "prompts.jsonl",
            out=out,
            steps=2,
            batch_size=2,
            max_new_tokens=5,
            k=4,
            eval_n=1,
            device="cpu",
        ),
        **flags,
    }
    return [
        str(word)
        for name, value in flags.items()
        if value is not None
        for word in ["--" + name.replace("_", "-")] + ([] if value is True else [value])
    ]


CPU = "; --device cpu works everywhere"  # what lines of a kind have in common
WHERE = "no such directory, and no hub name; give the directory of a checkpoint"
MODEL = "; give a directory or hub name of a causal language model with its tokenizer"
FIELDS = 'needs "prompt": text, or a list of {"role": text, "content": text}'
ANSWER = 'or empty; write "answer": "42", or leave it out'
AGAIN = "restore it from a copy, or begin anew with another --out"
NO_GPU = (
    {} if torch.cuda.is_available() else {"no GPU": (dict(device="cuda"), "--device cuda: ", CPU)}
)
FLAGS = {  # each: the flags that are changed, what the line must say, remedy included
    "unknown": (dict(frobnicate=3), "unknown flag --frobnicate; --help lists them"),
    "misspelt": (dict(stepz=3), "unknown flag --stepz; did you mean --steps?"),
    "abbreviated": (dict(max_new=3), "unknown flag --max-new; did you mean --max-new-tokens?"),
    "no value": (dict(batch_size=True, steps=None), "--batch-size: expected one argument"),
    "no student": (dict(student=None), "--student is missing: directory or hub name"),
    "no teacher": (dict(teacher=""), "--teacher is missing: directory or hub name"),
    "not a number": (dict(steps="many"), "--steps: invalid int value: 'many'"),
    "half a prompt": (dict(batch_size=1.5), "--batch-size: invalid int value: '1.5'"),
    "no step": (dict(steps=0), "--steps 0: must be at least 1"),
    "no save": (dict(save_every=0), "--save-every 0: must be at least 1"),
    "no rollout": (dict(n=0), "--n 0: must be at least 1"),
    "no token": (dict(max_new_tokens=0), "--max-new-tokens 0: must be at least 1"),
    "objective": (dict(objective="mse"), "--objective: invalid choice: 'mse' (choose from"),
    "support": (dict(support="all"), "--support: invalid choice: 'all' (choose from"),
    "dtype": (dict(dtype="float8"), "--dtype: invalid choice: 'float8' (choose from"),
    "released without k": (dict(objective="top-k-released", k=0), "--k 0: must be at least 1"),
    "lr below 0": (dict(lr=-1), "--lr -1.0: must be above 0"),
    "lr nan": (dict(lr="nan"), "--lr nan: must be above 0"),
    "temperature 0": (dict(temperature=0), "--temperature 0.0: must be above 0"),
    "eval temperature nan": (
        dict(eval_temperature="nan"),
        "--eval-temperature nan: must be at least 0",
    ),
    "eval top-p 0": (dict(eval_top_p=0), "--eval-top-p 0.0: must be above 0 and at most 1"),
    "fraction": (
        dict(aligned_fraction=1.5),
        "--aligned-fraction 1.5: must be at least 0 and at most 1",
    ),
    "in flight": (dict(in_flight=-1), "--in-flight -1: must be at least 0"),
    "micro-batch": (dict(micro_batch_tokens=-5), "--micro-batch-tokens -5: must be at least 0"),
    "chunk": (dict(chunk=-5), "--chunk -5: must be at least 0"),
    "seed": (dict(seed=-1), "--seed -1: must be at least 0 and at most 2147483647"),
    "template": (
        dict(template="latex"),
        "template 'latex' is none of none, answer, boxed and has no {question} in it",
    ),
    "two cold starts": (
        dict(cold_start=2, cold_start_file="{world}/one.jsonl"),
        "give one of the two",
    ),
    "steps of no cold start": (
        dict(cold_start_steps=2),
        "--cold-start-steps without --cold-start N",
    ),
    "aligned alone": (
        dict(prompts=None, aligned_prompts="{world}/one.jsonl"),
        "--aligned-prompts needs --prompts",
    ),
    "more than there is": (dict(cold_start=9), "--cold-start 9: only 8 prompts to train on"),
    "resume of nothing": (
        dict(resume=True),
        "no run there to resume, no checkpoint; leave --resume out",
    ),
    "device": (dict(device="gpu"), "--device gpu: ", CPU),
    **NO_GPU,
    "mps": (dict(device="mps"), "--device mps: ", CPU),
    "meta": (dict(device="meta"), "--device meta: ", CPU),
    "out is a file": (
        dict(out="{world}/one.jsonl"),
        "one.jsonl cannot be written to (Not a directory); take another --out",
    ),
    "out in a file": (
        dict(out="{world}/one.jsonl/run"),
        "one.jsonl cannot be written to (Not a directory); take another --out",
    ),
    "out of the machine": (
        dict(out="/proc/run"),
        "--out /proc/run: /proc cannot be written to",
        "; take another --out",
    ),
    "out is a model": (
        dict(out="{world}/student"),
        "its config.json is not that of a run; take another --out",
    ),
    "out is complete": (
        dict(out="{world}/done"),
        "the run there is complete; take another --out, or --resume it",
    ),
    "resumed and complete": (
        dict(out="{world}/done", resume=True),
        "complete; take another --out, or --resume",
    ),
    "out is another's": (
        dict(out="{world}/cut"),
        "holds another run; add --resume to go on, or take another --out",
    ),
    "checkpoint lost": (
        dict(out="{world}/lost", resume=True),
        "the run there has lost its checkpoint; restore it",
    ),
    "logs of another": (
        dict(out="{world}/lost", seed=1),
        "the run there has lost its checkpoint; restore it, or",
    ),
    "fewer steps": (
        dict(out="{world}/cut", resume=True, steps=1),
        "--steps 1: the run in ",
        "; ask for more, or take",
    ),
    "another k": (
        dict(out="{world}/cut", resume=True, k=5),
        "had --k 4; give the same flags, or take another --out",
    ),
}
FILES = {
    "missing": (
        dict(prompts="nowhere.jsonl"),
        "--prompts nowhere.jsonl: No such file or directory; give a file of JSON lines",
    ),
    "eval missing": (
        dict(eval="nowhere.jsonl"),
        "--eval nowhere.jsonl: No such file or directory; give a file of JSON lines",
    ),
    "a directory": (dict(prompts="{world}"), ": Is a directory; give a file of JSON lines"),
    "empty": (
        dict(prompts="{world}/empty.jsonl"),
        'empty.jsonl holds no prompts; write one {"prompt": text',
    ),
    "blank": (
        dict(prompts="{world}/blank.jsonl"),
        'blank.jsonl holds no prompts; write one {"prompt": text',
    ),
    "not JSON": (
        dict(prompts="{world}/cut.jsonl"),
        "cut.jsonl:2 is not JSON (",
        "; write one JSON object a line",
    ),
    "too deep": (
        dict(prompts="{world}/deep.jsonl"),
        "deep.jsonl:1 is not JSON (",
        "; write one JSON object a line",
    ),
    "too many digits": (
        dict(prompts="{world}/digits.jsonl"),
        "digits.jsonl:1 is not JSON (",
        "; write one JSON object a line",
    ),
    "not UTF-8": (
        dict(prompts="{world}/latin.jsonl"),
        "latin.jsonl:1 is not UTF-8; save the file as UTF-8",
    ),
    "not an object": (dict(prompts="{world}/list.jsonl"), "list.jsonl:1 ", FIELDS),
    "no prompt": (dict(prompts="{world}/other-key.jsonl"), "other-key.jsonl:1 ", FIELDS),
    "a number": (dict(prompts="{world}/number.jsonl"), "number.jsonl:1 ", FIELDS),
    "no text": (dict(prompts="{world}/no-text.jsonl"), "no-text.jsonl:1 ", FIELDS),
    "half a character": (dict(prompts="{world}/half.jsonl"), "half.jsonl:1 ", FIELDS),
    "answer a number": (
        dict(prompts="{world}/answer-number.jsonl"),
        "answer-number.jsonl:1 has an answer that is no text (int)",
        ANSWER,
    ),
    "answer a list": (
        dict(prompts="{world}/answer-list.jsonl"),
        "answer-list.jsonl:1 has an answer that is no text (list)",
        ANSWER,
    ),
    "answer empty": (
        dict(eval="{world}/answer-empty.jsonl"),
        "answer-empty.jsonl:1 has an answer that is no text",
        ANSWER,
    ),
    "chat empty": (dict(prompts="{world}/chat-empty.jsonl"), "chat-empty.jsonl:1 ", FIELDS),
    "chat without role": (
        dict(prompts="{world}/chat-no-role.jsonl"),
        "chat-no-role.jsonl:1 ",
        FIELDS,
    ),
    "chat of strings": (
        dict(prompts="{world}/chat-strings.jsonl"),
        "chat-strings.jsonl:1 ",
        FIELDS,
    ),
    "chat of parts": (dict(prompts="{world}/chat-parts.jsonl"), "chat-parts.jsonl:1 ", FIELDS),
    "no assistant": (
        dict(cold_start_file="{world}/conversation.jsonl"),
        'conversation.jsonl:1 needs "messages" that end with what the assistant says',
    ),
    "none left": (
        dict(eval="{world}/prompts.jsonl"),
        "no prompt is left for training beside the held-out ones",
    ),
}
CHECKPOINTS = {  # seen before weights are loaded
    "no directory": (dict(student="{world}/nowhere"), "nowhere: ", WHERE),
    "no relative one": (dict(teacher="./nowhere"), "./nowhere: ", WHERE),
    "a file": (dict(student="{world}/one.jsonl"), "one.jsonl: ", WHERE),
    "no config": (
        dict(student="{world}/no-config"),
        "no-config: no config.json there; give the directory of a checkpoint",
    ),
    "pickled": (
        dict(student="{world}/pickle"),
        "pickle: no safetensors there",
        "convert it where you trust it: from_pretrained",
    ),
    "broken config": (
        dict(student="{world}/bad-config"),
        "bad-config cannot be read: It looks like the config file",
        MODEL,
    ),
    "no tokenizer": (
        dict(teacher="{world}/no-tokenizer"),
        "no-tokenizer cannot be read: Couldn't instantiate the backend",
        MODEL,
    ),
    "broken tokenizer": (
        dict(teacher="{world}/bad-tokenizer"),
        "bad-tokenizer cannot be read: Expecting property name",
        MODEL,
    ),
    "other tokens": (
        dict(teacher="{world}/other-tokens"),
        "disagree on 12 token ids: 'user' (student 4, teacher 15)",
        "; take a teacher with the",
    ),
}
MODELS = {
    "own code": (
        dict(student="{world}/own-code"),
        "it brings code of its own; if you have read and trust it, add --trust-remote-code",
    ),
    "unknown architecture": (
        dict(student="{world}/unknown-type"),
        "unknown-type cannot be read: The checkpoint you are",
        MODEL,
    ),
    "truncated weights": (
        dict(teacher="{world}/truncated"),
        "truncated cannot be read: Error while deserializing header",
        MODEL,
    ),
    "no weights": (
        dict(teacher="{world}/garbage"),
        "garbage cannot be read: Error while deserializing header",
        MODEL,
    ),
    "weights of another size": (
        dict(teacher="{world}/another-size"),
        "(21 such in all) is missing, or has another shape",
        "; take a whole checkpoint",
    ),
    "no head": (
        dict(student="{world}/headless"),
        "headless: lm_head.weight (1 such in all) is missing, or has another",
        "; take a whole checkpoint",
    ),
    "not finite": (
        dict(teacher="{world}/not-finite"),
        "not-finite: its logits are not finite; the checkpoint is damaged",
    ),
    "not causal": (
        dict(teacher="{world}/bert"),
        "bert: BertLMHeadModel is no causal language model",
        "; take a decoder",
    ),
    "encoder and decoder": (
        dict(teacher="{world}/t5"),
        "t5 cannot be read: Unrecognized configuration class",
        MODEL,
    ),
    "an end beyond the rows": (
        dict(teacher="{world}/end-beyond"),
        "token 99 ends a response",
        "output rows for 16 tokens; mend eos_token_id",
    ),
    "no end": (
        dict(student="{world}/no-end", teacher="{world}/no-end"),
        "neither student nor teacher has a token that ends a response",
        "; set eos_token_id in",
    ),
    "k above the vocabulary": (
        dict(k=17),
        "--k 17: the two models share 16 tokens; take a smaller k",
    ),
    "no prompt fits": (
        dict(prompts="{world}/long.jsonl"),
        "no prompt is left for training beside the held-out ones",
    ),
    "no prompt is short enough": (
        dict(max_prompt_tokens=2),
        "no prompt has 1 to 2 tokens; raise --max-prompt-tokens",
    ),
    "outgrows the context": (dict(max_new_tokens=70), "holds 64; lower --max-new-tokens"),
    "question outgrows the context": (
        dict(eval="{world}/long.jsonl"),
        "holds 64; lower --max-new-tokens",
    ),
    "no accelerate": (
        dict(teacher_device_map="auto"),
        "teacher cannot be read: Using a `device_map`",
    ),
    "damaged checkpoint": (
        dict(out="{world}/damaged", resume=True),
        "state.pt is not a whole checkpoint of opd.py (OSError)",
        AGAIN,
    ),
    "checkpoint of something": (
        dict(out="{world}/another's", resume=True),
        "state.pt is not a whole checkpoint of opd.py (KeyError)",
        AGAIN,
    ),
}


def listing(folder):
    """What lies there, with its sizes."""
    return sorted(
        (str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*")
    )


KINDS = {"flags": FLAGS, "files": FILES, "checkpoints": CHECKPOINTS, "models": MODELS}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param((case, kind), id=name)
        for kind, cases in KINDS.items()
        for name, case in cases.items()
    ],
)
def test_what_cannot_work_is_one_line_with_the_remedy_and_leaves_nothing(
    world, case, tmp_path, capfd, monkeypatch
):
    """prime-rl#1458 and every mistake that we could think of: exit code 2, one line, no traceback, no directory, and
    without a model at once.
    """
    (flags, *says), kind = case
    flags = {
        name: value.format(world=world) if isinstance(value, str) else value
        for name, value in flags.items()
    }
    if kind != "models":
        monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    monkeypatch.chdir(tmp_path)
    out = Path(flags.get("out") or tmp_path / "run")
    before = listing(out) if out.is_dir() and out.is_relative_to(world) else out.exists()
    started = time.perf_counter()
    with pytest.raises(SystemExit) as stop:
        opd.main(words(world, tmp_path / "run", flags))
    assert time.perf_counter() - started < 5
    printed = capfd.readouterr().err
    assert stop.value.code == 2 and all(part in printed for part in says), printed
    assert (
        printed.startswith("opd.py: ") and printed.count("\n") == 1 and "Traceback" not in printed
    )
    assert before == (listing(out) if isinstance(before, list) else out.exists()) and not list(
        tmp_path.iterdir()
    )
    assert not (world / "was-run").exists()


def test_the_table_has_its_forty_cases():
    """As many as were asked for, and more."""
    assert sum(map(len, KINDS.values())) >= 40


@pytest.mark.slow
def test_the_command_itself_says_it_in_one_line(world, tmp_path):
    """A process of its own: nothing that a library prints stands beside the line."""
    flags = dict(teacher=f"{world}/garbage")
    done = subprocess.run(
        [sys.executable, opd.__file__, *words(world, tmp_path / "run", flags)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr.startswith("opd.py: ") and done.stderr.count("\n") == 1
    assert "garbage cannot be read" in done.stderr


def test_a_teacher_that_no_device_holds_is_refused(world, tmp_path, monkeypatch, capfd):
    """A weight on the meta device has no numbers: what accelerate leaves there cannot grade."""
    plain = models.AutoModelForCausalLM.from_pretrained

    def placed(path, **how):
        model, found = plain(path, **how)
        return (model.to("meta") if str(path).endswith("teacher") else model), found

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", placed)
    with pytest.raises(SystemExit) as stop:
        opd.main(words(world, tmp_path / "run", {}))
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    assert (
        "teacher: the devices here do not hold it; take a smaller model, or"
        in capfd.readouterr().err
    )


def test_a_hub_is_asked_for_safetensors_and_no_code(world, monkeypatch):
    """A directory is looked at before; of a name on the hub only transformers knows what there is."""
    asked, plain = [], models.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        models.AutoModelForCausalLM,
        "from_pretrained",
        lambda path, **how: asked.append(how) or plain(path, **how),
    )
    models.load(world / "student")
    assert asked[0]["use_safetensors"] is True and asked[0]["trust_remote_code"] is False


def test_code_of_a_checkpoint_runs_where_the_user_says_so(world, tmp_path, capfd):
    """--trust-remote-code, and only that, runs what stands beside the weights."""
    with pytest.raises(SystemExit):
        opd.main(
            words(world, tmp_path / "run", dict(student=world / "own-code", trust_remote_code=True))
        )
    assert (world / "was-run").exists()
    (world / "was-run").unlink()


def test_nothing_that_is_read_is_evaluated():
    """Text of models and files stays text: no eval, exec or pickle in the product, torch.load of weights alone."""
    root = Path(opd.__file__).parent
    for path in [
        path for part in ("", "plumbing", "experiments") for path in (root / part).glob("*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in (
                    "eval",
                    "exec",
                    "compile",
                    "__import__",
                    "pickle.load",
                    "os.system",
                ), path
                if name == "torch.load":
                    assert any(
                        k.arg == "weights_only" and ast.unparse(k.value) == "True"
                        for k in node.keywords
                    ), path
                assert not any(k.arg == "shell" for k in node.keywords), path


def test_a_checkpoint_that_is_a_program_is_not_run(world, tmp_path, capfd):
    """A pickle may call anything when it is read; state.pt is read as tensors alone."""
    out = tmp_path / "run"
    shutil.copytree(world / "cut", out)

    class Program:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-run"),)

    torch.save(Program(), out / "checkpoint" / "state.pt")
    with pytest.raises(SystemExit) as stop:
        opd.main(words(world, out, dict(resume=True)))
    assert stop.value.code == 2 and not (tmp_path / "was-run").exists()
    assert "is not a whole checkpoint of opd.py" in capfd.readouterr().err
