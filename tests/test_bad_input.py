"""What a user can get wrong: refused in one line that says what and what to do, with exit code 2.

Each line of a table is a command that would work, with some flags changed, and the words of its
refusal. Nothing is left behind. If flags or files are refused, no model is loaded.
"""

import ast
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, WORDS, tiny, word_tokenizer
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import analysis
import opd
from plumbing import flags, models

# "opd" and "analysis" begin with all that they need, "runs" is analysis.py without a pair.
# {w} is the folder of good and bad files; " ... " stands for any text.
FLAGS = """
opd --frobnicate 3                 | unknown flag --frobnicate; --help lists them
opd --stepz 3                      | unknown flag --stepz; did you mean --steps?
opd --prest toy                    | unknown flag --prest; did you mean --preset?
opd --max-new 3                    | unknown flag --max-new; did you mean --max-new-tokens?
opd --teacher-device-map auto      | unknown flag --teacher-device-map
opd --chunk 5                      | unknown flag --chunk
opd --batch-size                   | --batch-size: expected one argument
opd --student ''                   | --student is missing: the model that learns
opd --teacher ''                   | --teacher is missing: the model that grades
opd --steps many                   | --steps: invalid int value: 'many'
opd --batch-size 1.5               | --batch-size: invalid int value: '1.5'
opd --steps 0                      | --steps 0: must be at least 1
opd --steps -1                     | --steps -1: must be at least 0
opd --save-every 0                 | --save-every 0: must be at least 1
opd --n 0                          | --n 0: must be at least 1
opd --max-new-tokens 0             | --max-new-tokens 0: must be at least 1
opd --k 0                          | --k 0: must be at least 1
opd --lr -1                        | --lr -1.0: must be above 0
opd --lr nan                       | --lr nan: must be above 0
opd --lr inf                       | --lr inf: must be above 0
opd --temperature 0                | --temperature 0.0: must be above 0
opd --temperature nan              | --temperature nan: must be above 0
opd --teacher-temperature 0        | --teacher-temperature 0.0: must be above 0
opd --teacher-temperature -1       | --teacher-temperature -1.0: must be above 0
opd --teacher-temperature inf      | --teacher-temperature inf: must be above 0
opd --eval-temperature nan         | --eval-temperature nan: must be at least 0
opd --eval-top-p 0                 | --eval-top-p 0.0: must be above 0 and at most 1
opd --aligned-fraction 1.5         | 1.5: must be at least 0 and at most 1
opd --in-flight -1                 | --in-flight -1: must be at least 0
opd --micro-batch-tokens -5        | --micro-batch-tokens -5: must be at least 0
opd --seed -1                      | --seed -1: must be at least 0 and at most 2147483647
opd --objective mse                | --objective 'mse': choose from top-k, full, sampled
opd --support all                  | --support 'all': choose from student, teacher, intersection
opd --dtype float8                 | --dtype 'float8': choose from float32, bfloat16
opd --preset papre                 | --preset: invalid choice: 'papre' ... 'toy', 'paper'
opd --ends none                    | --ends 'none': choose from merged, own
opd --template latex               | no template 'latex': ... answer, boxed, ... {{question}} in it
opd --eval-template latex          | no template 'latex': ... answer, boxed, ... {{question}} in it
opd --device gpu                   | --device gpu: ... ; --device cpu works everywhere
opd --device mps                   | --device mps: ... ; --device cpu works everywhere
opd --device meta                  | --device meta: ... ; --device cpu works everywhere
opd --cold-start 2 --cold-start-file {w}/one.jsonl | give one of the two
opd --cold-start-steps 2           | --cold-start-steps needs --cold-start or --cold-start-file
opd --cold-start-lr .1             | --cold-start-lr needs --cold-start or --cold-start-file
opd --cold-start-file {w}/one.jsonl --cold-start-top-p .9 | --cold-start-top-p needs --cold-start;
opd --aligned-fraction .3          | --aligned-fraction needs --aligned-prompts; without it
opd --support union --objective full | --support union: only the top-k losses have one
opd --k 1                          | --k 1: ... always 0 ... or --objective top-k-released
opd --template '{{question}} {{question}}' | a text with {{question}} in it, once
opd --eval ''                      | --eval: No such file or directory; give a file
opd --student {w}/cut/student --out {w}/cut | the trained student would be written over
opd --teacher {w}/cut/student --out {w}/cut --resume | the trained student would be written over
opd --out {w}/models               | holds student, but no run that wrote it; take another --out
opd --out {w}/answers              | holds cold_start.jsonl, but no run that wrote it; take
opd --prompts '' --aligned-prompts {w}/one.jsonl   | --aligned-prompts needs --prompts
opd --cold-start 9                 | --cold-start 9: only 8 prompts to train on
opd --shard                        | --shard cuts the models over several processes
opd --resume                       | no run there to resume, no checkpoint; leave --resume out
opd --out {w}/one.jsonl            | cannot be written to (Not a directory); take another --out
opd --out {w}/one.jsonl/run        | cannot be written to (Not a directory); take another --out
opd --out /proc/run                | /proc/run: /proc cannot be written to ... take another --out
opd --out {w}/student              | its config.json is not that of a run; take another --out
opd --out {w}/done                 | the run there is complete; take another --out, or --resume it
opd --out {w}/done --resume        | the run there is complete; take another --out, or --resume it
opd --out {w}/cut                  | holds a run; add --resume to go on, or take another --out
opd --out {w}/lost --resume        | has lost its checkpoint; restore it, or take another --out
opd --out {w}/lost --seed 1        | has lost its checkpoint; restore it, or take another --out
opd --out {w}/cut --resume --steps 1 | --steps 1: the run in ... ask for more, or take another --out
opd --out {w}/cut --resume --k 5   | had --k 4; give the same flags, or take another --out
opd --out {w}/cut --resume --eval-template boxed | had --eval-template ''; give the same flags
opd --out {w}/damaged --resume     | state.pt is not a whole checkpoint ... with another --out
opd --out {w}/stranger --resume    | state.pt is not a whole checkpoint ... with another --out

analysis --frobnicate 3            | unknown flag --frobnicate; --help lists them
analysis --positons x.svg          | unknown flag --positons; did you mean --positions?
analysis --student ''              | --student is missing: the model that would learn
analysis --student '' --teacher '' | give either --student and --teacher, or --run
analysis --run {w}/done            | give either --student and --teacher, or --run
analysis --count 0                 | --count 0: must be at least 1
analysis --temperature nan         | --temperature nan: must be above 0
analysis --temperature inf         | --temperature inf: must be above 0
analysis --eval-temperature -1     | --eval-temperature -1.0: must be at least 0
analysis --template latex          | no template 'latex': ... answer, boxed, ... {{question}} in it
analysis --device gpu              | --device gpu: ... ; --device cpu works everywhere
analysis --plot x.svg              | --plot goes with --run, not with --student and --teacher
analysis --positions x.svg         | --positions goes with --run, not with --student and --teacher
analysis --out ''                  | --out is missing: the file of the report
analysis --out {w}                 | : a folder; give a file in it
analysis --out /proc/d/d.json      | /proc cannot be written to ... take another --out
analysis --tokens nowhere/x.html   | nowhere/x.html: its folder does not exist; make it first
analysis --out {w}/prompts.jsonl   | --out {w}/prompts.jsonl: --prompts is that file, too
analysis --tokens {w}/prompts.jsonl | --tokens {w}/prompts.jsonl: --prompts is that file, too
analysis --out {w}/teacher/x.json  | /teacher/x.json: a model is in that folder; take another one
analysis --tokens x --out ./x      | --tokens x: --out is that file, too
runs --run {w}/nowhere             | no metrics.jsonl there; give the --out of an opd.py run
runs --run {w}/done --tokens x.html | --tokens goes with --student and --teacher, not with --run
runs --run {w}/done --count 5      | --count goes with --student and --teacher, not with --run
runs --run {w}/done --plot x.jsonl | --plot x.jsonl: give a file that ends with .svg, .png or .pdf
runs --run {w}/done --plot x.svg --positions x.svg | --positions x.svg: --plot is that file, too
runs --run {w}/done --plot no/x.svg | --plot no/x.svg: its folder does not exist; make it first
"""

FILES = """
opd --prompts nowhere.jsonl        | --prompts nowhere.jsonl: No such file or directory; give a
opd --eval nowhere.jsonl           | --eval nowhere.jsonl: No such file or directory; give a
opd --aligned-prompts nowhere      | --aligned-prompts nowhere: No such file or directory; give a
opd --cold-start-file nowhere      | --cold-start-file nowhere: No such file or directory; give a
opd --prompts {w}                  | : Is a directory; give a file of JSON lines
opd --prompts {w}/empty.jsonl      | empty.jsonl holds no prompts; write one {{"prompt": text
opd --prompts {w}/blank.jsonl      | blank.jsonl holds no prompts; write one {{"prompt": text
opd --prompts {w}/cut.jsonl        | cut.jsonl:2 is not JSON ( ... ; write one JSON object a line
opd --prompts {w}/deep.jsonl       | deep.jsonl:1 is not JSON ( ... ; write one JSON object a line
opd --prompts {w}/digits.jsonl     | digits.jsonl:1 is not JSON ( ... ; write one JSON object a line
opd --prompts {w}/latin.jsonl      | latin.jsonl:1 is not UTF-8; save the file as UTF-8
opd --prompts {w}/list.jsonl       | list.jsonl:1 is not an object; write one {{"prompt": ... line
opd --prompts {w}/other-key.jsonl  | other-key.jsonl:1 needs "prompt": text, or a list of
opd --prompts {w}/number.jsonl     | number.jsonl:1 needs "prompt": text, or a list of
opd --prompts {w}/no-text.jsonl    | no-text.jsonl:1 needs "prompt": text, or a list of
opd --prompts {w}/chat-empty.jsonl | chat-empty.jsonl:1 needs "prompt": text, or a list of
opd --prompts {w}/chat-no-role.jsonl | chat-no-role.jsonl:1 needs "prompt": text, or a list of
opd --prompts {w}/chat-strings.jsonl | chat-strings.jsonl:1 needs "prompt": text, or a list of
opd --prompts {w}/chat-parts.jsonl | chat-parts.jsonl:1 needs "prompt": text, or a list of
opd --prompts {w}/chat-answered.jsonl | jsonl:1 ends with what the assistant says; end the prompt
opd --prompts {w}/answer-number.jsonl | answer-number.jsonl:1 has an answer that is no text (int)
opd --prompts {w}/answer-list.jsonl | answer-list.jsonl:1 has an answer that is no text (list)
opd --eval {w}/answer-empty.jsonl  | answer-empty.jsonl:1 has an answer ... leave it out
opd --cold-start-file {w}/chat.jsonl | jsonl:1 needs "messages" that end with what the
opd --eval {w}/prompts.jsonl       | no prompt is left for training beside the held-out ones
analysis --prompts nowhere.jsonl   | --prompts nowhere.jsonl: No such file or directory; give a
analysis --prompts {w}/empty.jsonl | empty.jsonl holds no prompts; write one {{"prompt": text
analysis --prompts {w}/cut.jsonl   | cut.jsonl:2 is not JSON ( ... ; write one JSON object a line
"""

CHECKPOINTS = """
opd --student studnet              | studnet: no such directory here; give the directory of a
opd --student {w}/nowhere          | nowhere: no such directory here; give the directory of a
opd --teacher ./nowhere            | ./nowhere: no such directory here; give the directory of a
opd --student {w}/one.jsonl        | one.jsonl: no such directory here; give the directory of a
opd --student {w}/no-config        | no-config: no config.json there; give a directory that
opd --student {w}/pickle           | pickle: no safetensors there ... convert it where you trust it
opd --student {w}/bad-config       | bad-config cannot be read: It looks like the config file
opd --teacher {w}/no-tokenizer     | no-tokenizer cannot be read: Couldn't instantiate the backend
opd --teacher {w}/bad-tokenizer    | bad-tokenizer cannot be read: Expecting property name
opd --teacher {w}/other-tokens     | 12 token ids: 'user' (student 4, teacher 15) ... take a
analysis --teacher studnet         | studnet: no such directory here; give the directory of a
analysis --teacher {w}/other-tokens | 12 token ids: 'user' (student 4, teacher 15) ... take a
"""

MODELS = """
opd --student {w}/own-code         | it brings code of its own, which is never run here
opd --student {w}/unknown-type     | unknown-type cannot be read: The checkpoint ... give the
opd --teacher {w}/truncated        | truncated cannot be read: Error while deserializing header
opd --teacher {w}/garbage          | garbage cannot be read: Error while deserializing header
opd --teacher {w}/another-size     | (21 such in all) is missing, or has another ... take a whole
opd --student {w}/headless         | lm_head.weight (1 such in all) is missing, or has another
opd --student {w}/more-layers      | (9 such in all) has no place in the model that
opd --teacher {w}/not-finite       | its logits are not finite; the checkpoint is damaged
opd --teacher {w}/bert             | BertLMHeadModel is no causal language ... take a decoder
opd --teacher {w}/t5               | t5 cannot be read: Unrecognized configuration class
opd --teacher {w}/end-beyond       | token 99 ends a response, ... output rows for 16 tokens
opd --student {w}/no-end --teacher {w}/no-end | neither student nor teacher has a token that ends a
opd --k 17                         | --k 17: the two models share 16 tokens; take a smaller k
opd --prompts {w}/long.jsonl       | no prompt is left for training beside the held-out ones
opd --max-prompt-tokens 2          | no prompt has 1 to 2 tokens; raise --max-prompt-tokens
opd --max-new-tokens 70            | holds 64; lower --max-new-tokens
opd --eval {w}/long.jsonl          | holds 64; lower --max-new-tokens
analysis --teacher {w}/not-finite  | its logits are not finite; the checkpoint is damaged
analysis --max-prompt-tokens 2     | no prompt has 1 to 2 tokens; raise --max-prompt-tokens
"""

LINE = '{"prompt": "add 3", "answer": "3"}'
TEXTS = {  # name of a file: what it holds
    "one": LINE,
    "empty": "",
    "blank": " \n\n",
    "cut": LINE + '\n{"prompt": "add',
    "deep": '{"prompt": ' + "[" * 100_000,
    "digits": '{"prompt": ' + "7" * 5000 + "}",
    "long": '{"prompt": "' + "add " * 70 + '", "answer": "0"}',
    "list": '["add", "3"]',
    "other-key": '{"question": "add 3"}',
    "number": '{"prompt": 3}',
    "no-text": '{"prompt": "  "}',
    "chat-empty": '{"prompt": []}',
    "chat-no-role": '{"prompt": [{"content": "add"}]}',
    "chat-strings": '{"prompt": ["add", "3"]}',
    "chat-parts": '{"prompt": [{"role": "user", "content": ["add"]}]}',
    "chat-answered": '{"prompt": [{"role": "assistant", "content": "add"}]}',
    "answer-number": '{"prompt": "add 3", "answer": 3}',
    "answer-list": '{"prompt": "add 3", "answer": ["3"]}',
    "answer-empty": '{"prompt": "add 3", "answer": ""}',
    "chat": '{"messages": [{"role": "user", "content": "add"}]}',
}


def rows_of(table):
    """[(command line, [what the refusal says])] of a table."""
    rows = []
    for line in table.strip().splitlines():
        if line:
            words, says = line.split(" | ")
            rows.append((words.strip(), says.strip().split(" ... ")))
    return rows


# --- good and bad files --------------------------------------------------------------------------


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def change(folder, **values):
    """Write other values into a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder with a good pair, and with checkpoints, files and runs, each broken in one way."""
    folder = tmp_path_factory.mktemp("bad")
    write_files(folder)
    write_checkpoints(folder)
    write_runs(folder)
    return folder


def write_files(folder):
    for name, text in TEXTS.items():
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with open(folder / "prompts.jsonl", "w") as file:
        for a in (0, 3, 7):
            for b in (0, 3, 7):
                file.write(json.dumps({"prompt": f"add {a} {b}", "answer": "0"}) + "\n")


def write_checkpoints(folder):
    good = tiny("llama", vocab_size=len(WORDS))
    save(folder / "student", good, word_tokenizer())
    copies = (
        "teacher truncated garbage pickle no-config bad-config bad-tokenizer no-tokenizer "
        "another-size more-layers own-code unknown-type end-beyond"
    )
    for name in copies.split():
        shutil.copytree(folder / "student", folder / name)
    save(folder / "teacher", tiny("llama", seed=1, vocab_size=len(WORDS)), word_tokenizer())
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "garbage" / "model.safetensors").write_bytes(b"no weights at all")
    (folder / "pickle" / "model.safetensors").unlink()
    torch.save(good.state_dict(), folder / "pickle" / "pytorch_model.bin")
    (folder / "no-config" / "config.json").unlink()
    (folder / "bad-config" / "config.json").write_text("{")
    (folder / "bad-tokenizer" / "tokenizer.json").write_text("{")
    (folder / "no-tokenizer" / "tokenizer.json").unlink()
    (folder / "no-tokenizer" / "tokenizer_config.json").unlink()
    change(folder / "another-size", hidden_size=64, head_dim=16)
    change(folder / "more-layers", num_hidden_layers=1)
    change(folder / "unknown-type", model_type="none-that-there-is")
    classes = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
    change(folder / "own-code", model_type="mine", auto_map=classes)
    (folder / "own-code" / "mine.py").write_text(f"open({str(folder / 'was-run')!r}, 'w')")
    change(folder / "end-beyond", eos_token_id=99)

    broken = tiny("llama", vocab_size=len(WORDS))
    broken.get_output_embeddings().weight.data[3] = float("nan")
    save(folder / "not-finite", broken, word_tokenizer())
    save(folder / "headless", good.model, word_tokenizer())
    save(folder / "other-tokens", good, word_tokenizer(WORDS[:4] + WORDS[:3:-1]))
    save(folder / "no-end", good, word_tokenizer(eos=None))
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    save(folder / "bert", BertForMaskedLM(bert), word_tokenizer())
    t5 = T5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    t5.decoder_start_token_id = 0
    save(folder / "t5", T5ForConditionalGeneration(t5), word_tokenizer())


def write_runs(folder):
    (folder / "models" / "student").mkdir(parents=True)
    (folder / "answers").mkdir()
    (folder / "answers" / "cold_start.jsonl").write_text("")
    opd.main(command("opd", folder, folder / "done")[1])
    shutil.copytree(folder / "done", folder / "cut")
    (folder / "cut" / "result.json").unlink()
    for name in ("damaged", "lost", "stranger"):
        shutil.copytree(folder / "cut", folder / name)
    state = folder / "damaged" / "checkpoint" / "state.pt"
    state.write_bytes(state.read_bytes()[:5000])
    shutil.rmtree(folder / "lost" / "checkpoint")
    torch.save({"hello": 1}, folder / "stranger" / "checkpoint" / "state.pt")


def command(line, bad, out):
    """A line of a table -> the main of its command, and the words that it gets."""
    name, *words = shlex.split(line.format(w=bad))
    if name == "runs":
        return analysis.main, words
    pair = f"--student {bad}/student --teacher {bad}/teacher --prompts {bad}/prompts.jsonl"
    sizes = "--max-new-tokens 5 --k 4 --device cpu"
    if name == "analysis":
        return analysis.main, [*f"{pair} {sizes} --count 4 --out {out}.json".split(), *words]
    run = f"--out {out} --steps 2 --batch-size 2 --eval-n 1"
    return opd.main, [*f"{pair} {sizes} {run}".split(), *words]


def listing(folder):
    """The files there, with their sizes."""
    return sorted((str(path), path.stat().st_size) for path in Path(folder).rglob("*"))


# --- the tables ----------------------------------------------------------------------------------


def check_refused(line, says, bad, tmp_path, capfd, monkeypatch):
    """One line on stderr, exit code 2, at once, and no file made or changed."""
    monkeypatch.chdir(tmp_path)
    main, words = command(line, bad, tmp_path / "run")
    before = listing(bad)
    started = time.process_time()
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert time.process_time() - started < 5
    printed = capfd.readouterr().err
    assert stop.value.code == 2, printed
    for part in says:
        assert part.format(w=bad) in printed, printed
    name = "opd.py: " if main is opd.main else "analysis.py: "
    assert printed.startswith(name) and printed.count("\n") == 1 and "Traceback" not in printed
    assert listing(bad) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("line, says", rows_of(FLAGS) + rows_of(FILES) + rows_of(CHECKPOINTS))
def test_what_cannot_work_is_one_line_before_a_model_is_loaded(
    line, says, bad, tmp_path, capfd, monkeypatch
):
    """prime-rl#1458: no mistake of a user is accepted in silence."""
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    check_refused(line, says, bad, tmp_path, capfd, monkeypatch)


@pytest.mark.parametrize("line, says", rows_of(MODELS))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_that_cannot_work_is_one_line(line, says, bad, tmp_path, capfd, monkeypatch):
    check_refused(line, says, bad, tmp_path, capfd, monkeypatch)
    assert not (bad / "was-run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(bad, tmp_path, capfd, monkeypatch):
    says = ["--device cuda: ", "; --device cpu works everywhere"]
    check_refused("opd --device cuda", says, bad, tmp_path, capfd, monkeypatch)


@pytest.mark.parametrize("name", ["plot", "positions"])
def test_a_picture_without_matplotlib_is_refused(name, bad, tmp_path, capfd, monkeypatch):
    """Else the command would end with exit code 0, and without a file."""
    plain = importlib.util.find_spec

    def without_matplotlib(module, *package):
        return None if module == "matplotlib" else plain(module, *package)

    monkeypatch.setattr(importlib.util, "find_spec", without_matplotlib)
    line = f"runs --run {bad}/done --{name} x.svg"
    says = [f"--{name} needs matplotlib: pip install matplotlib"]
    check_refused(line, says, bad, tmp_path, capfd, monkeypatch)


@pytest.mark.slow
def test_the_command_itself_says_it_in_one_line(bad, tmp_path):
    """In a process of its own, nothing that a library prints stands beside the line."""
    _, words = command("opd --teacher {w}/garbage", bad, tmp_path / "run")
    done = subprocess.run(
        [sys.executable, opd.__file__, *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr.startswith("opd.py: ") and done.stderr.count("\n") == 1
    assert "garbage cannot be read" in done.stderr


# --- what works ----------------------------------------------------------------------------------


def test_a_report_goes_into_runs_and_its_folder_is_made(bad, tmp_path, monkeypatch):
    """So git does not see it."""
    monkeypatch.chdir(tmp_path)
    main, words = command("analysis", bad, tmp_path / "run")
    where = words.index("--out")
    main(words[:where] + words[where + 2 :])
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    report = json.loads((tmp_path / "runs" / "diagnose.json").read_text())
    assert report["student"] == f"{bad}/student"


def test_every_flag_has_a_reason_and_a_default_that_works():
    """`check` accepts the defaults, alone and with each preset."""
    for kind in (flags.Config, flags.Diagnosis):
        flags.check(kind())
        assert "--student" in flags.parser_of(kind, "x.py").format_help()
    for name in flags.PRESETS:
        cfg = flags.parse(flags.Config, ["--preset", name, "--lr", "0.5"], "opd.py")
        assert cfg.lr == 0.5 and cfg.batch_size == flags.PRESETS[name]["batch_size"]


def test_every_flag_is_read():
    """prime-rl#1458: a flag that nobody reads would be accepted and do nothing."""
    read = set()
    for path in (ROOT / "opd.py", ROOT / "analysis.py", *(ROOT / "plumbing").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value)
                if owner in ("cfg", "self.cfg", "args", "flags"):
                    read.add(node.attr)
    read |= set(flags.of_pair(flags.Config()))
    fields = set(flags.Config.__dataclass_fields__) | set(flags.Diagnosis.__dataclass_fields__)
    assert fields - read == set()


# --- nothing that is read is run -----------------------------------------------------------------


def test_nothing_that_is_read_is_evaluated():
    """Text of models and files is never run: no eval, exec or pickle; torch.load for weights."""
    forbidden = ("eval", "exec", "compile", "__import__", "pickle.load", "os.system")
    for part in (".", "plumbing", "experiments"):
        for path in (ROOT / part).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                name = ast.unparse(node.func)
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert name not in forbidden, path
                assert "shell" not in keywords, path
                if name == "torch.load":
                    assert keywords.get("weights_only") == "True", path


class Program:
    """What a pickle may hold: a call, made when it is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_checkpoint_that_is_a_program_is_not_run(bad, tmp_path, capfd):
    """state.pt is read as tensors, and nothing else in it is run."""
    out = tmp_path / "run"
    shutil.copytree(bad / "cut", out)
    torch.save(Program(str(tmp_path / "was-run")), out / "checkpoint" / "state.pt")
    main, words = command("opd --resume", bad, out)
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and not (tmp_path / "was-run").exists()
    assert "is not a whole checkpoint of opd.py" in capfd.readouterr().err
