"""The READMEs say what the code does: commands parse, metrics are defined, numbers are the scripts', links lead on."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import again
import longer
import pytest
from test_opd import METRICS

import opd
from plumbing.flags import DIAGNOSIS, ROLLOUTS, SELECTION, Config, parse

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
ALL = ("README.md", "plumbing/README.md", "experiments/README.md", "tests/README.md")


@pytest.mark.parametrize("name", ALL)
def test_every_flag_that_it_names_exists(name):
    """TRL's quick start ran into its own ValueError: no flag is made up."""
    fields = [
        f for flags in (Config, DIAGNOSIS, ROLLOUTS, SELECTION) for f in dataclasses.fields(flags)
    ]
    known = {"--" + f.name.replace("_", "-") for f in fields} | {"--help", "--all"}
    for file in ("experiments/bench.py", "experiments/lab.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / file).read_text()))
    known |= {f"--{flag}" for flag in (*again.NEEDED, *longer.NEEDED)}
    prose = re.sub(
        r"```text.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL
    )  # without tables of results
    prose = re.sub(r"torchrun .*? -- ", "", prose)  # and without flags of another's
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose)) <= known


def test_the_main_command_parses():
    """Flags and values in turn, on the files that the toy writes."""
    line = next(
        line for line in README.splitlines() if line.startswith("python opd.py --preset toy")
    )
    flags = line.split()[2:]
    assert {Path(word).name for word in flags if word.endswith(".jsonl")} == {
        "prompts.jsonl",
        "eval.jsonl",
    }
    assert flags[::2] == [word for word in flags if word.startswith("--")]


def test_help_is_two_screens_and_begins_with_what_matters(monkeypatch, capsys):
    """100 lines of 100 columns; every flag has a reason; the first group has ten."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit, match="0"):
        parse(Config, ["--help"], "opd.py")
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 100 and max(map(len, said.splitlines())) <= 100
    groups = {
        part.splitlines()[0]: re.findall(r"^  (--[a-z-]+)", part, re.MULTILINE)
        for part in said.split("\n\n")
    }
    assert len(groups["what matters first:"]) == 10
    assert {flag for group in groups.values() for flag in group} == {
        "--" + f.name.replace("_", "-") for f in dataclasses.fields(Config)
    }


def test_its_commands_are_those_that_ci_runs():
    """Nothing is typed twice: .ci/run takes each block after its marker, with one code block behind it."""
    markers = re.findall(r"block '([^']+)'", (ROOT / ".ci" / "run").read_text())
    assert markers == ["the main command", "the test command"]
    for marker in markers:
        assert len(re.findall(f"<!-- {marker} -->\n```sh\npython3 [^`]+\n```\n", README)) == 1, (
            marker
        )


def test_the_step_that_it_shows_is_the_one_that_runs():
    """Pasted whole; report.py does it."""
    assert f"<!-- the step -->\n```python\n{inspect.getsource(opd.update)}```\n" in README


def test_it_is_short():
    """A page that is read: at most 160 lines and 12 kB; the map names each file's size."""
    assert len(README.splitlines()) <= 160 and len(README.encode()) <= 12_000
    sizes = re.findall(r"\| \[\w+\.py\]\((\w+\.py)\) \| (\d+) \|", README)
    assert {file for file, _ in sizes} == {path.name for path in ROOT.glob("*.py")}
    for file, lines in sizes:
        assert int(lines) == len((ROOT / file).read_text().splitlines()), file


def test_every_logged_metric_is_defined():
    """A table row for each metric."""
    table = (ROOT / "plumbing" / "README.md").read_text()
    for name in METRICS:
        both = re.sub(r"_(student|teacher)$", "_student`, `_teacher", name)
        said = f"`{name}`" in table or f"`{both}`" in table
        assert said or name.startswith("time_") or name in ("step", "lr"), name


@pytest.mark.parametrize("name", ALL)
def test_every_link_leads_to_a_file(name):
    """No link to a file that does not exist."""
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
        assert target.startswith("http") or (ROOT / name).parent.joinpath(target).exists(), target


def test_results_name_no_folder_of_one_machine():
    """A command is written down so that another machine can run it."""
    for file in (ROOT / "experiments" / "results").glob("*.json"):
        command = json.loads(file.read_text())["command"]
        assert not [word for word in command.split() if word.startswith("/")], file
