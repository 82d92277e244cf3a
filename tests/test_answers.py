"""What text is worth: answers, accuracy, collapse, repetition, templates."""
import pytest
import torch
from conftest import VOCAB, tiny, word_tokenizer

from analysis import gap_recovery
from plumbing.answers import read_answer, same_answer
from plumbing.flags import Config
from plumbing.measure import accuracy
from plumbing.show import collapse
from recipes import TEMPLATES, apply_template, is_degenerate
from teacher import Pair, split


@pytest.mark.parametrize("text, answer", [
    (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\boxed{1} no, \boxed{2}", "2"), (r"\boxed{ 7 }", "7"),
    (r"\boxed{x", None), ("Answer: 12", "12"), ("Answer: 3\nAnswer: 4\nthat is all", "4"), ("... . Answer: 5", "5"),
    ("Answer:", None), ("nothing", None), ("", None), (r"Answer: 3 and \boxed{4}", "4"), ("**Answer:** 12", "12"),
    ("**Answer: 12**", "12"), ("answer: 12", "12"), (r"\boxed{4} or \boxed{5", "4"),
])
def test_the_answer_is_the_last_box_or_what_follows_the_last_answer(text, answer):
    r"""\boxed{...} with nested braces first, then "Answer:"; None where a response has neither."""
    assert read_answer(text) == answer


@pytest.mark.parametrize("said, want", [
    ("7", "7"), ("7.0", "7"), ("1,200", "1200"), ("$-3$", "-3"), (r"\frac{3}{4}", "0.75"), (r"\dfrac34", "3/4"),
    ("12 .", "12"), ("+5", "5"), (r"\(12\)", "12"), (r"\[12\]", "12"), (r"90^{\circ}", "90"), (r"50\%", "50"),
    ("No", "no"), (r"\text{Yes}", "yes"), (r"2\sqrt{3}", r"2 \sqrt{3}"), (r"90^\circ", "90"), ("\u22124", "-4"),
    ("007", "7"),
])
def test_equal_answers_are_equal_however_written(said, want):
    """Numbers compare as exact fractions, text without case and spacing."""
    assert same_answer(said, want)


@pytest.mark.parametrize("said, want", [
    ("7", "8"), (None, "7"), ("", "7"), ("1/0", "1"), ("0.3333", "1/3"), ("seven", "7"), ("12", "1,200"), ("1,2", "12"),
    ("9" * 400, "9" * 399),
])
def test_other_answers_are_not(said, want):
    """No rounding, no guessing, no exception."""
    assert not same_answer(said, want)


def test_accuracy_is_the_mean_over_prompts_with_the_error_of_that_mean(monkeypatch):
    """Four samples of one prompt are not four independent ones:
    the error comes from the spread of the prompts' means.
    """
    texts = iter(["Answer: 1", "Answer: 1", "Answer: 2", "Answer: 1",
                  "Answer: 0", "Answer: 0"])                              # 3 prompts x 2: 1, .5, 0
    tokenizer = word_tokenizer()
    monkeypatch.setattr(tokenizer, "decode", lambda *_, **__: next(texts))
    student, teacher = tiny("llama"), tiny("llama", seed=1)
    pair = Pair(student, teacher, tokenizer, dict(eos_ids=(), merge_ends=True, pad_id=0, vocab_size=VOCAB),
                (split(student, VOCAB), split(teacher, VOCAB)), torch.device("cpu"))
    rows = [{"ids": [i], "answer": answer} for i, answer in ((1, "1"), (2, "1"), (4, None), (3, "1"))]
    got = accuracy(Config(eval_n=2, max_new_tokens=2, eval_temperature=1.0, eval_top_p=1.0), pair, rows, student)
    assert got == {"mean": 0.5, "standard_error": pytest.approx(0.5 / 3 ** 0.5), "samples": 6, "truncated": 1.0}
    assert accuracy(Config(), pair, rows[2:3], student) is None           # no answer, no accuracy


def test_gap_recovery_is_a_share_of_a_gap_that_is_there():
    """(after - before) / (teacher - before), and None where the gap is within two standard errors."""
    at = lambda mean: {"mean": mean, "standard_error": 0.02}
    assert gap_recovery(at(0.5), at(0.8), at(0.9)) == pytest.approx(0.75)
    assert gap_recovery(at(0.9), at(0.6), at(0.5)) == pytest.approx(0.75)
    assert gap_recovery(at(0.5), at(0.8), at(0.55)) is None
    assert gap_recovery(at(0.5), at(0.6), at(0.57)) == pytest.approx(10 / 7)       # 2 sqrt(2) .02 = .0566


def history(**ends):
    """Twenty-four rows of metrics: ten at rest, then ten at the ends given, with a ramp between."""
    rest = {"overlap_mass_student": 0.98, "overlap_mass_teacher": 0.98, "reward": -0.1, "entropy_student": 0.8,
            "response_length": 30.0, "repetition_fraction": 0.0}
    return [{name: x + min(1, max(0, i - 9) / 4) * (ends.get(name, x) - x) for name, x in rest.items()}
            for i in range(24)]


@pytest.mark.parametrize("ends, alarm", [
    (dict(overlap_mass_student=0.6, entropy_student=2.5), True), (dict(reward=-0.9, response_length=90.0), True),
    (dict(reward=-0.9, repetition_fraction=0.5), True), (dict(overlap_mass_teacher=0.8, response_length=50.0), True),
    (dict(), False), (dict(overlap_mass_student=0.6), False),
    (dict(entropy_student=2.5), False), (dict(reward=-0.01, response_length=90.0), False),
    (dict(entropy_student=0.3, reward=-0.9), False),
])
def test_collapse_is_something_falling_while_something_else_climbs(ends, alarm):
    """Either alone may be learning; both together are the paper's signature of a run going under (5.1, 6.1)."""
    assert bool(collapse(history(**ends))) == alarm
    assert collapse(history(**ends)[:9]) is None               # too early to tell


REST = dict(overlap_mass_student=1.0, overlap_mass_teacher=1.0, reward=0.0, entropy_student=0.5, response_length=32.0,
            repetition_fraction=0.125)
FALLEN = dict(reward=-4.0)
RISEN = dict(response_length=64.0)


@pytest.mark.parametrize("change, alarm", [
    ({**RISEN, "overlap_mass_student": 0.90625}, False), ({**RISEN, "overlap_mass_student": 0.875}, True),   # by .1
    ({**RISEN, "overlap_mass_teacher": 0.90625}, False), ({**RISEN, "overlap_mass_teacher": 0.875}, True),
    ({**RISEN, "reward": -0.1875}, False), ({**RISEN, "reward": -0.21875}, True),                            # .2 nats
    ({**FALLEN, "response_length": 48.0}, False), ({**FALLEN, "response_length": 48.5}, True),               # by half
    ({**FALLEN, "entropy_student": 0.78125}, False), ({**FALLEN, "entropy_student": 0.8125}, True),          # .3 nats
    ({**FALLEN, "repetition_fraction": 0.3125}, False), ({**FALLEN, "repetition_fraction": 0.34375}, True),  # by .2
])
def test_collapse_at_each_border(change, alarm):
    """Two windows are enough; a fall and a rise count from just beyond their borders, in means over whole windows."""
    rows = [REST] * 5 + [{**REST, **change}] * 5
    said = collapse(rows)
    assert bool(said) == alarm and collapse(rows[1:]) is None
    assert not alarm or all(f"{name} {REST[name]:.2f} -> {change[name]:.2f}" in said for name in change)
    assert collapse(rows[:-1] + [REST]) is None                # four steps of five: not yet
    assert bool(collapse(rows, window=4)) == alarm
    assert bool(collapse([{**REST, **RISEN, **FALLEN}] * 5 + rows)) == alarm       # the best, not the first


@pytest.mark.parametrize("before, after, alarm", [
    ({"overlap_mass_student": 0.1}, {"overlap_mass_student": 0.0}, False), ({"reward": 0.2}, {"reward": 0.0}, False),
    ({"response_length": 33.0, "reward": 0.0}, {"response_length": 49.25, "reward": -4.0}, False),
    ({"response_length": 33.0, "reward": 0.0}, {"response_length": 49.75, "reward": -4.0}, True)])
def test_what_is_exactly_on_the_border_has_not_crossed_it(before, after, alarm):
    """A fall of .1, or of .2 nats, is not more than that; half of an odd length is no whole number."""
    rows = [{**REST, **before}] * 5 + [{**REST, **RISEN, **after}] * 5
    assert bool(collapse(rows)) == alarm


def test_less_than_two_windows_are_too_early_to_tell():
    """However drastic: nine steps hold no two windows of five."""
    drastic = [REST] * 4 + [{**REST, "reward": -99.0, "response_length": 999.0}] * 5
    assert collapse(drastic) is None and collapse([REST] + drastic)


@pytest.mark.parametrize("last, alarm", [(1.5, False), (1.53125, True)])
def test_a_high_entropy_has_to_rise_by_half_of_itself(last, alarm):
    """From 1 nat on half of it is more than .3."""
    rows = [{**REST, "entropy_student": 1.0}] * 5 + [{**REST, **FALLEN, "entropy_student": last}] * 5
    assert bool(collapse(rows)) == alarm


@pytest.mark.parametrize("text", ["the same words again " * 12, "well " * 20, "x = 1 so " * 3 + "ha ha ha ha " * 8,
                                  " ".join(f"step {i % 3} we add the same number to both sides" for i in range(30)),
                                  " ".join(str(i) for i in range(40)) * 4 + " and that is all",      # a long block
                                  "we look at it once more " * 12 + "and so the answer is seven"])   # an end after it
def test_loops_are_degenerate(text):
    """ms-swift#9644: a block over and over, at the end or nearly throughout, as words or as ids."""
    assert is_degenerate(text) and is_degenerate([hash(word) for word in text.split()])


@pytest.mark.parametrize("text", ["", "one", "no no no", "so a 0+3= 3 , then um b 3+7= 0 , thus c 0+5= 5 . Answer: 5",
                                  " ".join(f"x{i} + y{i} = z{i}" for i in range(50)),
                                  "We have 1 + 1 = 2, so 2 + 2 = 4, and 4 + 4 = 8. " * 2])
def test_ordinary_text_is_not(text):
    """Lists, short answers and a sentence said twice are no loop."""
    assert not is_degenerate(text)


def test_a_template_wraps_the_question_and_nothing_else():
    """Rethinking-OPD's released data has a literal \\boxed{{}}; ours says \\boxed{},
    and braces in questions survive.
    """
    assert apply_template("{1, 2}?", "none") == "{1, 2}?"
    assert apply_template("{1, 2}?", "boxed").startswith("{1, 2}? Please") \
        and "\\boxed{}." in apply_template("x", "boxed")
    assert apply_template("x", "Q: {question} {A}") == "Q: x {A}"
    assert all("{question}" in template for template in TEMPLATES.values())
    with pytest.raises(ValueError, match="latex"):
        apply_template("x", "latex")
