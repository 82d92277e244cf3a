"""report.py: the pages of findings are made from the results, and nobody types a number of ours."""

import json

import forecast
import lab
import plot
import pytest
import report
from conftest import ROOT

from plumbing import show

README = ROOT / "experiments" / "README.md"
RESULTS = lab.RESULTS


def finding(word):
    return lab.Finding("3.1", "KL(p || q) falls", "so", "by 1", word)


# --- pages --------------------------------------------------------------------------------------


def test_the_pages_are_a_fresh_report(capsys):
    """After a new result, or a change to what a script asks, report.py has to run again."""
    toy = report.toy_results(RESULTS)
    real = report.real_results(RESULTS)
    text = README.read_text()
    assert report.filled(text, toy, real, RESULTS) == text
    assert (RESULTS / "findings.md").read_text() == report.page(toy, real, RESULTS)
    for script, text in report.tables(toy, real, RESULTS).items():
        assert (RESULTS / f"{script}.txt").read_text() == text, script


@pytest.mark.parametrize("marker", ["<!-- the bench -->\n", "<!-- end of the bench -->\n"])
def test_a_page_without_markers_is_refused(marker):
    first, last = report.markers("bench")
    text = f"a\n{first}old\n{last}b\n"
    assert report.put("new\n", "bench", text) == f"a\n{first}new\n{last}b\n"
    with pytest.raises(SystemExit, match=r"<!-- the bench --> and <!-- end of the bench -->"):
        report.put("new\n", "bench", text.replace(marker, ""))


def test_a_script_that_lacks_results_is_left_out_and_named(tmp_path, capsys):
    for name in ("success", "bigger"):
        (tmp_path / "toy").mkdir(exist_ok=True)
        (tmp_path / "toy" / f"{name}-0.json").write_text('{"seed": 0}')
    toy = report.toy_results(tmp_path)
    real = report.real_results(tmp_path)
    assert toy == {}
    assert not any(real.values())
    assert report.findings_of_real(real) == report.NOT_YET
    said = capsys.readouterr().err
    for script in report.TOY:
        assert f"{script}.py is left out: " in said
    assert "recipe.py" in report.findings_in_short(toy)
    text = report.filled(README.read_text(), toy, real, tmp_path)
    first, last = report.markers("forecast")
    assert first + report.NOT_YET + last in text


def test_the_record_that_a_diagnosis_prints_is_that_of_the_results():
    """Of both worlds, of the pairs that the rule was not chosen on."""
    toy = lab.read_all(RESULTS, [*forecast.ARMS, *forecast.PROBES])
    real = report.real_results(RESULTS)
    pairs = forecast.pairs_of(toy, forecast.ARMS) + report.real.pairs_of(real)
    assert show.RECORD == forecast.record(pairs)


# --- tables -------------------------------------------------------------------------------------


def test_a_word_is_bold_if_it_is_not_holds(monkeypatch):
    found = [finding(lab.HOLDS), finding(lab.UNDECIDED)]
    monkeypatch.setattr(report, "judged", lambda results: found)
    full = report.findings_in_full(found).splitlines()
    assert full[2:] == [
        r"| 3.1 | KL(p \|\| q) falls | so | by 1 | holds |",
        r"| 3.1 | KL(p \|\| q) falls | so | by 1 | **undecided** |",
    ]
    short = report.findings_in_short({"recipe": {}}).splitlines()
    assert short[2:4] == [
        r"| [3.1](#how-to-recover-paper-5) | KL(p \|\| q) falls | holds |",
        r"| [3.1](#how-to-recover-paper-5) | KL(p \|\| q) falls | **undecided** |",
    ]


def test_a_row_leads_to_a_heading_that_is_there():
    lines = README.read_text().splitlines()
    assert set(report.HEADINGS) == set(report.TOY)
    for heading in report.HEADINGS.values():
        assert lines.count(f"## {heading}") == 1
    assert report.anchor("What it costs (6), and 2.2") == "what-it-costs-6-and-22"


def test_an_arm_that_scripts_share_is_counted_once(tmp_path):
    run = {"name": "success", "seed": 0, "seconds": 1800.0, "commit": "abc", "dirty": True}
    toy = {"phenomenology": {"success": [run]}, "mechanism": {"success": [run]}}
    table = report.provenance(toy, {}, tmp_path)
    assert table.count(".py | 0 | 1,800 | abc and changes |") == 2
    assert "the toy takes 0.5 hours of one thread, SmolLM2 0.0" in table


# --- results ------------------------------------------------------------------------------------


def test_every_result_says_what_made_it():
    paths = [*(RESULTS / "toy").glob("*.json"), *(RESULTS / "real").glob("*.json")]
    assert paths
    for path in paths:
        made = json.loads(path.read_text())
        assert path.name == lab.file_name(made["name"], made["seed"])
        assert made["command"].startswith("experiments/")
        assert len(made["commit"]) == 12
        assert made["seconds"] >= 0  # a probe may only read what a run has left


# --- figures ------------------------------------------------------------------------------------


def test_figures_are_drawn_from_the_results(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for script, results in report.toy_results(RESULTS).items():
        getattr(plot, script)(results, tmp_path / script)
        assert "</svg>" in (tmp_path / f"{script}.svg").read_text()


@pytest.mark.parametrize("name", [*report.TOY, "real", "overview"])
def test_without_matplotlib_a_line_says_what_to_install(name, tmp_path, capsys, monkeypatch):
    def missing():
        raise ModuleNotFoundError("matplotlib")

    monkeypatch.setattr(plot.figures, "pyplot", missing)
    getattr(plot, name)({}, tmp_path / name)
    assert "no picture: pip install matplotlib, then python experiments/" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
