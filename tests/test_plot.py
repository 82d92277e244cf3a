"""A run looked at afterwards: tables always, pictures where matplotlib is; no model, made-up runs of a few steps."""

import json
import sys

import pytest

from experiments import plot

FINISHED = {
    "accuracy_before": {"mean": 0.25, "standard_error": 0.02},
    "accuracy_after": {"mean": 0.75, "standard_error": None},
    "accuracy_teacher": {"mean": 0.875, "standard_error": 0.01},
    "gap_recovery": 0.8,
    "steps": 12,
}


def row(step, **other):
    """A line of metrics.jsonl, as opd.py writes it; the second bucket of output positions is empty at odd steps."""
    filled = [x if step % 2 == 0 or i == 0 else None for i, x in enumerate((0.5, 0.25))]
    return {
        "step": step,
        "loss": 1 / step,
        "reverse_kl": 1.5 / step,
        "overlap_ratio": 0.5 + step / 50,
        "overlap_mass_student": 0.9,
        "overlap_mass_teacher": 0.8,
        "overlap_token_advantage": -0.004 / step,
        "entropy_gap": 0.3,
        "entropy_student": 1.0,
        "entropy_teacher": 0.7,
        "reward": -0.2,
        "response_length": 20.0,
        "grad_norm": 0.5,
        "by_position": {
            "width": 16,
            "tokens": [30, 0 if filled[1] is None else 10],
            **{
                name: filled
                for name in ("entropy_student", "entropy_teacher", "reward", "overlap_ratio")
            },
        },
        **other,
    }


def write(folder, rows, result=FINISHED, torn=""):
    """A directory as opd.py leaves it: -> its path."""
    folder.mkdir()
    config = {"student": "S", "teacher": "T", "objective": "top-k", "k": 16, "steps": 12}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    if result:
        (folder / "result.json").write_text(json.dumps(result))
    return str(folder)


@pytest.fixture
def success(tmp_path):
    evaluated = {4: {"accuracy": 0.625}}
    return write(
        tmp_path / "success", [row(step, **evaluated.get(step, {})) for step in range(1, 13)]
    )


@pytest.fixture
def bare(monkeypatch):
    """A machine without matplotlib."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def steps(text):
    return [int(line.split()[0]) for line in text.splitlines() if line[:5].strip().isdigit()]


def test_a_result_of_an_earlier_version_is_shown_as_far_as_it_goes(tmp_path, capsys):
    """Without a gap recovery, and without accuracies: a sentence, no KeyError."""
    for name, gone, said in (
        ("a", ("gap_recovery",), "gap recovery not given"),
        ("b", ("gap_recovery", "accuracy_after"), "accuracy not measured"),
    ):
        result = {key: x for key, x in FINISHED.items() if key not in gone}
        plot.runs([write(tmp_path / name, [row(1)], result)])
        assert said in capsys.readouterr().out


def test_a_finished_run_is_a_table_and_what_came_of_it(success, capsys):
    """First and last step, the evaluated one with its accuracy, columns under their titles, accuracies and recovery."""
    plot.runs([success])
    text = capsys.readouterr().out
    assert {1, 4, 12} <= set(steps(text)) and len(steps(text)) <= 10
    lines = text.splitlines()
    titles, evaluated = lines[1], next(line for line in lines if line.startswith("    4"))
    assert titles.split()[-1] == "acc." and "cut" not in titles
    assert evaluated.endswith("0.625") and len(evaluated) == len(titles)
    assert lines[-1].startswith("accuracy 0.250 +- 0.020 -> 0.750 +- ?, teacher 0.875 +- 0.010; ")
    assert lines[-1].endswith("; gap recovery 0.80")


def test_a_run_without_answers_or_without_a_gap_says_so(tmp_path, capsys):
    """None is a word in the table, not an exception."""
    plot.runs(
        [
            write(tmp_path / "a", [row(1)], {**FINISHED, "accuracy_after": None}),
            write(tmp_path / "b", [row(1)], {**FINISHED, "gap_recovery": None}),
        ]
    )
    text = capsys.readouterr().out
    assert "no answers" in text and "gap recovery not given" in text


@pytest.mark.parametrize("torn", ["", "{", '{"step": 4, "lo', json.dumps(row(4))[:-1]])
def test_a_run_that_was_killed_shows_what_is_whole(tmp_path, torn, capsys):
    """A torn last line is left out; the run counts as not finished."""
    plot.runs([write(tmp_path / "run", [row(1), row(2), row(3)], result=None, torn=torn)])
    text = capsys.readouterr().out
    assert steps(text) == [1, 2, 3] and text.splitlines()[-1] == "not finished: step 3 of 12"


def test_a_broken_line_in_the_middle_is_not_passed_over(tmp_path):
    """Only a kill tears a line, and only the last one: anything else is named."""
    path = write(tmp_path / "run", [row(1)], torn="{torn\n" + json.dumps(row(2)) + "\n")
    with pytest.raises(ValueError, match=r"run/metrics\.jsonl: line 2 "):
        plot.runs([path])


def test_a_run_before_its_first_step_has_nothing_to_draw(tmp_path, capsys):
    """A table without rows, and one line instead of an empty picture."""
    path = write(tmp_path / "run", [], result=None)
    plot.runs([path])
    assert "not finished: step 0 of 12" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no step was logged yet"):
        plot.runs([path], tmp_path / "out.svg")


def test_the_means_by_position_are_a_table_too(success, capsys, bare, tmp_path):
    """Four metrics, a column a bucket under its first position, blank where no response came."""
    plot.runs([success], positions=tmp_path / "out.svg")
    lines = capsys.readouterr().out.split("by output position\n")[1].splitlines()
    assert lines[0].split() == ["step", "0", "16"] and lines[2].split() == ["1", "0.50"]
    assert lines[-1].split() == ["12", "0.50", "0.25"]
    assert [line for line in lines if "," in line] == [
        "student entropy, nats",
        "teacher entropy, nats",
        "reward, nats",
        "overlap ratio, share of the top k",
    ]


def test_a_run_older_than_by_position_is_refused_by_name(success, tmp_path, capsys):
    """One line that names the run, before anything is printed or drawn."""
    old = write(
        tmp_path / "old", [{name: x for name, x in row(1).items() if name != "by_position"}]
    )
    with pytest.raises(ValueError, match="old.*by_position") as error:
        plot.runs([success, old], positions=tmp_path / "out.svg")
    assert (
        "\n" not in str(error.value)
        and not capsys.readouterr().out
        and not (tmp_path / "out.svg").exists()
    )


def test_without_matplotlib_the_table_stands_and_one_line_says_what_to_install(
    success, bare, tmp_path, capsys
):
    """Neither an exception nor a file; the command that draws is given to the letter."""
    plot.runs([success], tmp_path / "out.svg", tmp_path / "positions.svg")
    said = capsys.readouterr()
    assert steps(said.out) and not (tmp_path / "out.svg").exists()
    assert said.err == (
        f"no picture: pip install matplotlib, then python analysis.py --run {success} "
        f"--plot {tmp_path}/out.svg --positions {tmp_path}/positions.svg\n"
    )
    for figure in (plot.phenomenology, plot.forecast):
        figure("results.json", "out.svg")
        assert capsys.readouterr().err.startswith(
            "no picture: pip install matplotlib, then python experiments/"
        )


def test_a_running_mean_keeps_the_first_value_and_what_is_constant():
    """Where a loss starts is a finding (4.1): smoothing leaves it; by hand in between."""
    assert plot.smooth([4.0, 1.0, 1.0, 7.0], 3) == [4.0, 2.0, 3.0, 4.0]
    assert plot.smooth([2.0] * 9, 5) == [2.0] * 9 and plot.smooth([], 5) == []
    assert plot.smooth([3.0, 1.0, 2.0], 1) == [3.0, 1.0, 2.0]


def test_a_thinned_line_keeps_its_ends_and_its_spikes():
    """A long run is drawn with fewer points; a peak of one step is never lost."""
    values = [0.0] * 1000
    values[417], values[733] = 9.0, -9.0
    x, y = plot.thin(list(range(1000)), values, 100)
    assert len(x) <= 102 and x == sorted(x) and (x[0], x[-1]) == (0, 999)
    assert (417, 9.0) in zip(x, y) and (733, -9.0) in zip(x, y)
    assert plot.thin([1, 2, 3], [5, 6, 7], 100) == ([1, 2, 3], [5, 6, 7]) and plot.thin(
        [], [], 9
    ) == ([], [])


def test_a_pair_has_its_colour_everywhere_and_no_two_runs_share_one():
    """A word of the path is the pair's name, the last word first; "mother" holds no "other"."""
    one, two, three, four = plot.colours(
        ["runs/success-0", "success/other", "/home/mother/x", "runs/success-1"]
    )
    assert (one, two) == (plot.COLOURS["success"], plot.COLOURS["other"])
    assert (three, four) == plot.SPARE[:2]


@pytest.mark.filterwarnings("error")
def test_the_pictures_name_their_axes_and_runs_and_are_the_same_twice(success, tmp_path):
    """Figures 6 and 13 as text in the .svg: titles, units, names; no date, no random id; None is no error."""
    pytest.importorskip("matplotlib")
    rows = [row(step, overlap_token_advantage=None, accuracy=None) for step in (1, 2)]
    gappy = write(tmp_path / "gappy", rows, result=None)
    drawn = []
    for attempt in ("a", "b"):
        paths = [tmp_path / f"{attempt}-{kind}.svg" for kind in ("plot", "positions")]
        plot.runs([success, gappy], *paths)
        drawn.append([path.read_bytes() for path in paths])
    assert drawn[0] == drawn[1]
    figure, maps = (x.decode() for x in drawn[0])
    for words in (figure, maps):
        assert (
            ">success<" in words and ">gappy<" in words and ">step<" in words and ">nats<" in words
        )
    for title, unit, *_ in plot.PANELS:
        assert f">{title}<" in figure and f">{unit}<" in figure
    for title in plot.MAPS.values():
        assert f">{title}<" in maps
    assert plot.COLOURS["success"] in figure and "output position (tokens)" in maps
    assert ">−0.004<" in figure  # coordinates are rounded, the words at a tick are not


@pytest.mark.parametrize("values", [(-0.1, 0.2), (0.5, 0.6), (0.001, 1.0), (0.0, 3.0)])
def test_no_value_lies_outside_its_panel(values):
    """Whatever the scale, and from 0 where nothing is negative; a logarithmic axis spans a decade at least."""
    pytest.importorskip("matplotlib")
    plt = plot.pyplot("")
    figure, axes = plt.subplots()
    axes.plot(values)
    plot.limit(plt, axes, "log", None)
    low, high = axes.get_ylim()
    assert low <= min(values) and max(values) <= high
    assert (axes.get_yscale() == "log") == (values == (0.001, 1.0))
    assert (low == 0) == (values in ((0.5, 0.6), (0.0, 3.0)))
    plt.close(figure)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "strange", [dict(overlap_token_advantage=None, loss=-0.1), dict(loss=0.0, entropy_gap=0.0)]
)
def test_a_strange_run_is_drawn_all_the_same(tmp_path, strange):
    """No shared token and a sampled loss below zero; a student that is its own teacher; both after a single step."""
    pytest.importorskip("matplotlib")
    plot.runs([write(tmp_path / "run", [row(1, **strange)], result=None)], tmp_path / "out.svg")


def test_a_forecast_is_drawn_by_verdict(tmp_path):
    """A colour and a legend entry a verdict with its runs counted; a run without a prediction is no point."""
    pytest.importorskip("matplotlib")
    verdicts = (
        "should work",
        "nothing new to teach",
        "harmful (the teacher is behind the student)",
    )
    made = [
        {
            "student": "S",
            "teacher": f"T{i}",
            "seed": 0,
            "verdict": verdict,
            "gain": 0.2 - i / 5,
            "predicted_gain": {"mean": 0.1 - i / 10, "standard_error": 0.02},
        }
        for i, verdict in enumerate(verdicts)
    ]
    made.append({**made[0], "verdict": "undecided", "predicted_gain": None})
    (tmp_path / "forecast.json").write_text(json.dumps({"runs": made}))
    plot.forecast(tmp_path / "forecast.json", tmp_path / "out.svg", "Spearman 1.00")
    words = (tmp_path / "out.svg").read_text(encoding="utf-8")
    assert (
        "Spearman 1.00" in words and plot.COLOURS["success"] in words and "undecided" not in words
    )
    assert all(f">{verdict}, 1 run<" in words for verdict in verdicts)
