"""experiments/context.py: what student and teacher read, and what follows from the results."""

import json

import context
import lab
import pytest
import sums

from plumbing.prompts import load_prompts


def asked(folder, arm, seed=0):
    """The rows of an arm: [held out, for training]."""
    context.write_questions(folder, seed, arm)
    return [load_prompts(folder / f"{name}.jsonl") for name in ("eval", "prompts")]


def last(chat):
    return chat[-1]["content"]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_student_is_asked_the_same_and_only_the_teacher_reads_a_hint(tmp_path, seed):
    """Of 727 sums 64 are held out, and no sum is in both."""
    hint = asked(tmp_path, "hint", seed)
    assert list(map(len, hint)) == [64, 663]
    assert len({last(row["prompt"]) for part in hint for row in part}) == 727
    for arm in context.ARMS:
        for ours, theirs in zip(asked(tmp_path, arm, seed), hint):
            for a, b in zip(ours, theirs, strict=True):
                assert (a["prompt"], a["answer"]) == (b["prompt"], b["answer"])
                assert ("teacher_prompt" in a) == (arm != "expert")


def test_the_hint_is_the_worked_answer_and_the_control_has_that_of_another_sum(tmp_path):
    """Both are written alike. In the examples the hint is always right: they show the format."""
    hint = asked(tmp_path, "hint")[1]
    other = asked(tmp_path, "other sum")[1]
    for right, wrong in zip(hint, other):
        a, b, c = map(int, last(right["prompt"]).split(" + "))
        solved = f"({a} + {b} = {a + b}, {a + b} + {c} = {a + b + c})"
        assert last(right["teacher_prompt"]) == f"{a} + {b} + {c} {solved}"
        assert right["answer"] == str(a + b + c)
        assert last(wrong["teacher_prompt"]).startswith(f"{a} + {b} + {c} (")
        assert solved not in last(wrong["teacher_prompt"])
        assert right["teacher_prompt"][:-1] == wrong["teacher_prompt"][:-1]
    examples = [message["content"] for message in hint[0]["teacher_prompt"][1:-1]]
    assert examples[0] == "5 + 6 + 9 (5 + 6 = 11, 11 + 9 = 20)"
    assert examples[1] == sums.forwards(5, 6, 9)


def accuracy(right):
    """An accuracy of 64 prompts, of which so many are right, as measure.share_right gives it."""
    each = [1] * right + [0] * (64 - right)
    return {"mean": right / 64, "standard_error": 0.05, "samples": 64, "each": each}


def run_of(arm, seed, before, after, teacher, kl=(0.1, 0.02), mass=0.97):
    """A result whose curves have three steps at either end."""
    made = {"name": arm, "seed": seed, "seconds": 1.0, "commit": "c", "dirty": False}
    made["accuracy"] = {}
    for when, right in (("before", before), ("after", after), ("teacher", teacher)):
        made["accuracy"][when] = {"greedy": accuracy(right), "T .7": accuracy(right)}
    made["curves"] = {
        "step": [1, 2, 3, 4, 5, 6],
        "reverse_kl": [kl[0]] * 3 + [kl[1]] * 3,
        "overlap_ratio": [0.8] * 3 + [0.9] * 3,
        "overlap_mass_student": [mass] * 6,
        "overlap_mass_teacher": [0.99] * 6,
    }
    return made


def words_of(hint, other, expert, **curves):
    results = {
        "hint": [run_of("hint", seed, *hint, **curves) for seed in range(3)],
        "other sum": [run_of("other sum", seed, *other) for seed in range(3)],
        "expert": [run_of("expert", seed, *expert) for seed in range(3)],
    }
    return [x.word for x in context.judge(results)]


def test_the_findings_follow_from_the_numbers():
    good = words_of((30, 62, 62), (30, 30, 20), (30, 62, 60))
    assert good == [lab.HOLDS] * 7
    format_alone = words_of((30, 62, 62), (30, 62, 20), (30, 62, 60))
    assert format_alone[2] == format_alone[3] == lab.CONTRADICTED
    no_lead = words_of((30, 30, 30), (30, 30, 30), (30, 62, 62), kl=(0.1, 0.09), mass=0.9)
    assert no_lead[0] == no_lead[4] == no_lead[5] == no_lead[6] == lab.CONTRADICTED


def test_of_fewer_than_three_seeds_a_finding_says_so():
    results = {arm: [run_of(arm, 0, 30, 62, 62)] for arm in context.ARMS}
    words = [x.word for x in context.judge(results)]
    assert all(word.endswith(", 1 of 3 seeds so far") for word in words)


def test_results_are_read_by_seed_and_a_missing_arm_is_named(tmp_path):
    """An arm can be added without running the others again."""
    (tmp_path / "context").mkdir()
    for arm in context.ARMS[:2]:
        with pytest.raises(SystemExit, match="no seed has all arms yet"):
            context.read_results(tmp_path)
        path = tmp_path / "context" / lab.file_name(arm, 1)
        path.write_text(json.dumps(run_of(arm, 1, 30, 60, 60)))
    without = context.read_results(tmp_path)
    assert list(without) == ["hint", "other sum"]
    assert len(list(context.judge(without))) == 6
    path = tmp_path / "context" / lab.file_name("expert", 1)
    path.write_text(json.dumps(run_of("expert", 1, 30, 60, 60)))
    found = context.read_results(tmp_path)
    assert [run["seed"] for runs in found.values() for run in runs] == [1, 1, 1]
    assert len(context.table(found)) == 4
