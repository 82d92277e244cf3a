"""The README says what the code does: its commands parse, its metrics are logged, its numbers are the scripts'."""
import dataclasses
import json
import re
from pathlib import Path

import analysis
import opd
from test_opd import METRICS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_every_flag_that_it_names_exists():
    """TRL's quick start ran into its own ValueError: here the main command parses, and no flag is made up."""
    line = next(line for line in README.splitlines() if line.startswith("python opd.py --preset toy"))
    flags = line.split()[2:]
    known = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(opd.Config)} | {"--help", "--all"}
    for file in ("analysis.py", "recipes.py", "experiments/bench.py", "experiments/lab.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / file).read_text()))
    prose = re.sub(r"```text.*?```", "", README, flags=re.DOTALL)              # without the tables, which name a script
    prose = re.sub(r"torchrun .*? -- ", "", prose)                              # and without flags of another's
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose)) <= known
    assert {Path(word).name for word in flags if word.endswith(".jsonl")} == {"prompts.jsonl", "eval.jsonl"}
    assert flags[::2] == [word for word in flags if word.startswith("--")]


def test_every_logged_metric_is_defined_and_every_file_is_there():
    """A table row for each metric; no link to a file that does not exist."""
    for name in METRICS:
        both = re.sub(r"_(student|teacher)$", "_student`, `_teacher", name)
        said = f"`{name}`" in README or f"`{both}`" in README
        assert said or name.startswith("time_") or name in ("step", "lr"), name
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_its_table_is_the_one_that_the_script_wrote():
    """Nobody types a number: what the README shows of results/*.txt stands there to the letter."""
    results = ROOT / "experiments" / "results"
    assert (results / "bench.txt").read_text().strip() in README
    for name in ("forecast", "recipe"):                                         # of these a part: whole lines, in order
        block = README.split(f"results/{name}.svg)\n```text\n")[1].split("```")[0].splitlines()
        lines = iter((results / f"{name}.txt").read_text().splitlines())
        assert len(block) > 9 and all(line in lines for line in block if line)


def test_results_name_no_folder_of_one_machine():
    """A command is written down so that another machine can run it."""
    assert [analysis.portable(word) for word in ("/home/me/python", "exp/x.py")] == ["python", "exp/x.py"]
    for file in (ROOT / "experiments" / "results").glob("*.json"):
        command = json.loads(file.read_text())["command"]
        assert not [word for word in command.split() if word.startswith("/")], file
