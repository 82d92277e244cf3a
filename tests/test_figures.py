"""What a person reads of a run: lines and last words (show.py), tables and pictures (figures.py).

There is no model here, only made-up runs of a few steps.
"""

import json

import pytest

from plumbing import figures, show
from teacher import UserError


def accuracy(mean, error, prompts=64):
    return {"mean": mean, "standard_error": error, "samples": 4 * prompts, "each": [1] * prompts}


HELD_OUT = {
    "reverse_kl": 1.5,
    "overlap_ratio": 0.25,
    "overlap_mass_student": 0.75,
    "overlap_mass_teacher": 0.625,
}
FINISHED = {
    "accuracy_before": accuracy(0.25, 0.02),
    "accuracy_after": accuracy(0.75, None),
    "accuracy_teacher": accuracy(0.875, 0.01),
    "greedy_before": accuracy(0.125, 0.03),
    "greedy_after": accuracy(0.5, 0.04),
    "greedy_teacher": accuracy(0.625, 0.02),
    "eval_temperature": 0.7,
    "eval_top_p": 0.95,
    "held_out_before": HELD_OUT,
    "held_out_after": {name: x / 2 for name, x in HELD_OUT.items()},
    "gap_recovery": 0.8,
    "skipped_steps": 0,
    "steps": 12,
}


def row(step, **other):
    """A line of metrics.jsonl; the second bucket of output positions is empty at odd steps."""
    second = 0.25 if step % 2 == 0 else None
    by_position = {"width": 16, "tokens": [30, 10 if second else 0]}
    for metric, *_ in figures.MAPS:
        by_position[metric] = [0.5, second]
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
        "response_length": 20.0,
        "truncated_fraction": 0.0,
        "grad_norm": 0.5,
        "by_position": by_position,
        **other,
    }


def write(folder, rows, result=FINISHED, torn=""):
    """Write a folder as opd.py leaves it: -> its path."""
    folder.mkdir()
    config = {"student": "S", "teacher": "T", "objective": "top-k", "k": 16, "steps": 12}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines) + torn)
    if result:
        (folder / "result.json").write_text(json.dumps(result))
    return str(folder)


@pytest.mark.parametrize("step", ["3", None, 2.5])
def test_a_row_whose_step_is_no_number_is_refused(step, tmp_path):
    run = write(tmp_path / "run", [row(1), {**row(2), "step": step}])
    with pytest.raises(UserError, match="metrics.jsonl:2 is not a step; restore the file"):
        figures.read_rows(run)


@pytest.fixture
def success(tmp_path):
    rows = [row(step) for step in range(1, 41)]
    rows[3]["accuracy"] = 0.625
    return write(tmp_path / "success", rows)


def steps(text):
    return [int(line.split()[0]) for line in text.splitlines() if line[:5].strip().isdigit()]


# --- a line, and the last words ------------------------------------------------------------------


def test_numbers_of_a_step_stand_under_their_titles():
    """A line has at most 80 columns, and a dash for what was not measured."""
    titles = show.columns().splitlines()[-1]
    line = show.line(row(3, overlap_token_advantage=None))
    assert len(line) == len(titles) <= 80
    assert line.split()[:3] == ["3", "0.3333", "0.5000"] and line.split()[6] == "-"
    for end in (titles.index(title) + len(title) for title in ("loss", "adv.", "|grad|")):
        assert line[end - 1] != " " and line[end : end + 1] in (" ", "")


def test_the_last_lines_say_what_changed_and_of_how_many_prompts():
    """The reader can tell two prompts from two hundred."""
    lines = show.summary(FINISHED).splitlines()
    assert lines[0] == (
        "accuracy       0.250 +- 0.020 -> 0.750 +- ?, teacher 0.875 +- 0.010; "
        "T 0.7, top-p 0.95, 64 prompts, 4 answers to each"
    )
    assert lines[1] == "greedy         0.125 +- 0.030 -> 0.500 +- 0.040, teacher 0.625 +- 0.020"
    assert lines[2] == "gap recovery   0.80 of the way from student to teacher"
    assert lines[3].endswith("reverse KL 1.5000 -> 0.7500, overlap ratio 0.250 -> 0.125")
    assert lines[4].endswith("student 0.750 -> 0.375, teacher 0.625 -> 0.312")
    few = {**FINISHED, "accuracy_after": accuracy(0.25, 0.25, prompts=1)}
    assert ", 1 prompt, 4 answers to each" in show.summary(few)
    cold = {"accuracy_cold_start": accuracy(0.5, 0.02), "greedy_cold_start": accuracy(0.25, 0.02)}
    more = {**FINISHED, **cold, "skipped_steps": 2}
    assert "-> 0.500 +- 0.020 (cold start) -> 0.750" in show.summary(more)
    assert "-> 0.250 +- 0.020 (cold start) -> 0.500" in show.summary(more)
    assert show.summary(more).splitlines()[-1].startswith("skipped        2 steps")


@pytest.mark.parametrize(
    "before, after, teacher, recovered, said",
    [
        (0.2, 0.5, 0.8, 0.5, "0.50 of the way from student to teacher"),
        (0.5, 0.1, 0.8, -1.33, "none: the student ended 0.400 below its start"),
        (
            0.9,
            0.2,
            0.1,
            0.88,
            "not given: the teacher is behind the student; the student ended 0.700 below its start",
        ),
        (
            0.5,
            0.6,
            0.1,
            -0.25,
            "not given: the teacher is behind the student; the student ended 0.100 above its start",
        ),
        (0.5, 0.6, 0.5, None, "not given: teacher and student are within noise of each other"),
        (
            0.0,
            0.0,
            0.0,
            None,
            'not given: neither model was right once; answers are read after "Answer:" or in '
            "\\boxed{} (--template answer asks for it)",
        ),
        (
            0.1,
            0.0,
            0.0,
            -1.0,
            "not given: the teacher is behind the student; the student ended 0.100 below its start",
        ),
    ],
)
def test_the_gap_recovery_is_told_in_words_that_fit(before, after, teacher, recovered, said):
    """A student that ended below its start has gone no share of the way to its teacher."""
    result = {
        **FINISHED,
        "accuracy_before": accuracy(before, 0.01),
        "accuracy_after": accuracy(after, 0.01),
        "accuracy_teacher": accuracy(teacher, 0.01),
        "gap_recovery": recovered,
    }
    assert f"gap recovery   {said}" in show.summary(result).splitlines()


def test_a_mismatch_is_told_from_rounding():
    """float32 within .01 nats, bfloat16 within 1."""
    assert show.mismatch({"sampling_mismatch": 0.009}, "float32") is None
    assert show.mismatch({"sampling_mismatch": 0.9}, "bfloat16") is None
    assert "0.02 nats" in show.mismatch({"sampling_mismatch": 0.02}, "float32")
    assert "1.1 nats" in show.mismatch({"sampling_mismatch": 1.1}, "bfloat16")


# --- tables of runs ------------------------------------------------------------------------------


def test_a_finished_run_is_a_table_and_what_came_of_it(success, capsys):
    """It has the first step, the last, the evaluated one and about ten others; then accuracies."""
    figures.runs([success])
    text = capsys.readouterr().out
    assert {1, 4, 40} <= set(steps(text)) and len(steps(text)) <= 11
    lines = text.splitlines()
    evaluated = next(line for line in lines if line.startswith("    4"))
    assert lines[0] == f"{success}: S <- T, top-k, k = 16"
    assert lines[1].endswith("acc.") and evaluated.endswith("0.625")
    assert len(evaluated) == len(lines[1])
    assert lines[-3:] == show.summary(FINISHED).splitlines()[:3]


def test_a_run_without_answers_says_so(tmp_path, capsys):
    figures.runs([write(tmp_path / "a", [row(1)], {**FINISHED, "accuracy_after": None})])
    assert "the held-out prompts have no answers" in capsys.readouterr().out


@pytest.mark.parametrize("torn", ["", "{", '{"step": 4, "lo', json.dumps(row(4))[:-1]])
def test_a_run_that_was_killed_shows_what_is_whole(tmp_path, torn, capsys):
    """A torn last line is left out; the run is not finished."""
    figures.runs([write(tmp_path / "run", [row(1), row(2), row(3)], result=None, torn=torn)])
    text = capsys.readouterr().out
    assert steps(text) == [1, 2, 3] and text.splitlines()[-1] == "not finished: step 3 of 12"


def test_what_is_no_run_is_refused_by_name(tmp_path):
    """So are a broken line that no kill explains, a folder without a run, a run without a step."""
    for i, torn in enumerate(("{torn", "{}", "3", "\xff")):
        broken = write(tmp_path / f"{i}", [row(1)], torn=f"{torn}\n{json.dumps(row(2))}\n")
        with pytest.raises(UserError, match=rf"{i}/metrics\.jsonl:2 is not (JSON|a step)"):
            figures.runs([broken])
    with pytest.raises(UserError, match="no metrics.jsonl there"):
        figures.runs([tmp_path])
    begun = write(tmp_path / "begun", [], result=None)
    with pytest.raises(UserError, match="no step was logged yet"):
        figures.runs([begun], tmp_path / "out.svg")


def test_the_means_by_position_are_a_table_too(success, capsys, tmp_path, monkeypatch):
    """The table has four metrics, and a column for each bucket under its first position."""
    monkeypatch.setattr(figures, "draw_positions", lambda *_: None)
    figures.runs([success], positions=tmp_path / "out.svg")
    lines = capsys.readouterr().out.split("by output position\n")[1].splitlines()
    assert lines[0].split() == ["step", "0", "16"]
    assert lines[2].split() == ["1", "0.50", "-"]
    assert lines[-1].split() == ["40", "0.50", "0.25"]
    assert [line for line in lines if "," in line] == [
        "student entropy, nats",
        "teacher entropy, nats",
        "reward, nats",
        "overlap ratio, share of the top k",
    ]


# --- pictures ------------------------------------------------------------------------------------


def test_a_running_mean_keeps_the_first_value_and_what_is_constant():
    """Where a loss starts is a finding (4.1), so smoothing does not move it."""
    assert figures.smooth([4.0, 1.0, 1.0, 7.0], 3) == [4.0, 2.0, 3.0, 4.0]
    assert figures.smooth([2.0] * 9, 5) == [2.0] * 9
    assert figures.smooth([], 5) == []
    assert figures.smooth([3.0, 1.0, 2.0], 1) == [3.0, 1.0, 2.0]


@pytest.mark.filterwarnings("error")
def test_pictures_name_their_axes_and_runs_and_are_the_same_twice(success, tmp_path):
    """The .svg has titles, units and names as text, and neither a date nor a random id."""
    pytest.importorskip("matplotlib")
    rows = [row(step, overlap_token_advantage=None) for step in (1, 2)]
    gaps = write(tmp_path / "_gaps $1", rows, result=None)
    drawn = []
    for attempt in ("a", "b"):
        paths = [tmp_path / f"{attempt}-{kind}.svg" for kind in ("plot", "positions")]
        figures.runs([success, gaps], *paths)
        drawn.append([path.read_text(encoding="utf-8") for path in paths])
    assert drawn[0] == drawn[1]
    figure, maps = drawn[0]
    for words in drawn[0]:
        for word in ("success", " _gaps $1", "step", "nats"):  # matplotlib would hide "_gaps"
            assert f">{word}<" in words
    for panel in figures.PANELS:
        assert f">{panel.title}<" in figure and f">{panel.unit}<" in figure
    for _, title, *_ in figures.MAPS:
        assert f">{title}<" in maps
    assert "output position (tokens)" in maps


@pytest.mark.parametrize("values", [(-0.1, 0.2), (0.5, 0.6), (0.001, 1.0), (0.0, 3.0)])
def test_no_value_lies_outside_its_panel(values):
    """An axis is logarithmic if its values span a decade, else it begins at 0 or below."""
    pytest.importorskip("matplotlib")
    plt = figures.pyplot()
    figure, axes = plt.subplots()
    axes.plot(values)
    figures.limit(plt, axes, figures.Panel("", "", "loss", log=True))
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
    """It may share no token, have a loss below 0, be its own teacher, or have one step."""
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "run", [row(1, **strange)], result=None)
    figures.runs([path], tmp_path / "out.svg", tmp_path / "positions.svg")
    assert (tmp_path / "out.svg").exists() and (tmp_path / "positions.svg").exists()


def test_a_map_is_empty_where_no_response_came():
    """There stands NaN, which is drawn grey. The colours of the reward are symmetric about 0."""
    rows = [row(1), row(2)]
    one, two = figures.heat(rows, "reward")
    assert one[0] == 0.5 and one[1] != one[1] and two == [0.5, 0.25]
    assert figures.limits([{"rows": rows}], "reward") == (-0.5, 0.5)
    assert figures.limits([{"rows": rows}], "overlap_ratio") == (0, 1)
    assert figures.extent(rows) == (0, 32, 0.5, 2.5)
