"""The READMEs say what the code does: commands parse, metrics are defined, links lead on."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, config, rows

import opd
from plumbing.flags import PRESETS, Config, Diagnosis, parse_opd

README = (ROOT / "README.md").read_text()
ALL = (
    "README.md",
    "plumbing/README.md",
    "plumbing/figures.md",
    "experiments/README.md",
    "tests/README.md",
)


@pytest.mark.parametrize("name", ALL)
def test_every_flag_that_it_names_exists(name):
    """A flag that a page names exists (TRL's quick start ran into its own ValueError)."""
    known = {"--help", "--preset", "--all", "--config"}
    known |= {"--index-url", "--shutdown-timeout"}  # of pip and torchrun
    for flags in (Config, Diagnosis):
        known |= {"--" + f.name.replace("_", "-") for f in dataclasses.fields(flags)}
    for file in ("experiments/bench.py", "experiments/lab.py", "experiments/context.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / file).read_text()))
    text = (ROOT / name).read_text()
    text = re.sub(r"```text.*?```", "", text, flags=re.DOTALL)  # tables of results
    text = re.sub(r"torchrun .*? -- ", "", text)  # flags of another's
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known


def test_the_commands_on_the_toy_parse():
    """They parse with the files that the toy writes. Only the models are not there yet."""
    commands = re.findall(r"^(python opd.py --preset toy.*)$", README.replace("\\\n", ""), re.M)
    assert len(commands) >= 2
    for command in commands:
        words = command.split()[2:]
        files = {Path(word).name for word in words if word.endswith(".jsonl")}
        assert files == {"prompts.jsonl", "eval.jsonl"}
        without_files = [word.replace("runs/toy/", "a/") for word in words]
        for flag in ("--prompts", "--eval"):
            place = without_files.index(flag)
            del without_files[place : place + 2]
        assert parse_opd(without_files).batch_size == PRESETS["toy"]["batch_size"]


def test_its_commands_are_those_that_ci_runs():
    """.ci/run takes each block after its marker out of the README (TRL's quick start)."""
    ci = (ROOT / ".ci" / "run").read_text()
    markers = re.findall(r"block '([^']+)'", ci)
    assert markers == ["the main command", "the test command"]
    for marker in markers:
        assert len(re.findall(f"<!-- {marker} -->\n```sh\npython3 [^`]+\n```\n", README)) == 1


def test_every_logged_metric_is_defined(world, tmp_path):
    """A table of plumbing/README.md has a row for each name in a line of metrics.jsonl."""
    opd.distil(config(world, tmp_path / "run", steps=1))
    table = (ROOT / "plumbing" / "README.md").read_text()
    for name in rows(tmp_path / "run")[0]:
        both = re.sub(r"_(student|teacher)$", "_student`, `_teacher", name)
        assert f"`{name}`" in table or f"`{both}`" in table or name in ("lr", "step"), name


@pytest.mark.parametrize("name", ALL)
def test_every_link_leads_to_a_file(name):
    """No link to a file that does not exist."""
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
        assert target.startswith("http") or (ROOT / name).parent.joinpath(target).exists(), target


def test_results_name_no_folder_of_one_machine():
    """A command is written down so that another machine can run it."""
    for file in (ROOT / "experiments" / "results").rglob("*.json"):
        command = json.loads(file.read_text()).get("command", "")
        assert not [word for word in command.split() if word.startswith("/")], file
