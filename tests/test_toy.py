"""The toy world is what experiments/toy.py says it is."""

import json
import os
import sys

import pytest
import torch
import toy
from transformers import AutoModelForCausalLM, AutoTokenizer

from plumbing import files
from plumbing.answers import read_answer
from rollout import from_texts
from teacher import UserError

TINY = toy.Scale(small=2, large=2, house=2, rounds=1, asked=4, held_out=8, trials=4)
FAMILIES = ["left", "right"]
RIGHT = dict(noise=0.0, mistaught=0.0)


def corpus(family, n, **how):
    """n problems and solutions: -> digits (n, MOST), count (n,), [prompt ids], [response ids]."""
    generator = torch.Generator().manual_seed(0)
    digits, count = toy.problems(n, generator)
    ids, mask, is_response = toy.corpus(family, digits, count, generator, **how)
    prompts = [ids[i, mask[i] & ~is_response[i]].tolist() for i in range(n)]
    responses = [ids[i, is_response[i]].tolist() for i in range(n)]
    return digits, count, prompts, responses


def solutions(family, n, **how):
    """n solutions: [(the digits to add, response ids)]."""
    digits, count, _, responses = corpus(family, n, **how)
    problems = [digits[i, : count[i]].tolist() for i in range(n)]
    return list(zip(problems, responses))


def words(ids):
    return [toy.WORDS[i] for i in ids]


def sums_and_digits(said):
    """The sums of a solution, as "3+7=", and the digits that it says; the answer is the last."""
    return [word for word in said if "=" in word], [word for word in said if word.isdigit()]


def right_answer(asked):
    """The right digit after a sum: "3+7=" -> 0."""
    return (int(asked[0]) + int(asked[2])) % 10


def said_of_each_sum(family, n, **how):
    """What n solutions say after each sum: {"3+7=": list of int}."""
    found = {}
    for _, response in solutions(family, n, **how):
        sums, digits = sums_and_digits(words(response))
        for asked, said in zip(sums, digits):
            found.setdefault(asked, []).append(int(said))
    return found


def share(values, x):
    return values.count(x) / len(values)


# --- the corpus ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_solution_without_mistakes_is_right_in_every_step(family):
    """Each step adds the next digit in the family's order; the answer is the sum modulo 10."""
    for problem, response in solutions(family, 200, **RIGHT):
        said = words(response)
        places = list(range(len(problem)))
        if family == "right":
            places.reverse()
        total = 0
        expected = []
        for place in places:
            expected.append((toy.LABELS[place], f"{total}+{problem[place]}="))
            total = (total + problem[place]) % 10
        labels = [word for word in said if word in toy.LABELS]
        sums, digits = sums_and_digits(said)
        assert list(zip(labels, sums)) == expected
        assert [int(digit) for digit in digits[:-1]] == [right_answer(asked) for asked in sums]
        assert read_answer(" ".join(said[:-1])) == str(total)
        assert said[-1] == "<eos>"


@pytest.mark.parametrize("template, before", [(toy.PLAIN, []), (toy.POLITE, ["listen", ","])])
def test_the_prompt_of_a_solution_is_its_problem(template, before):
    """It reads "Add a3 b7 c5 :", behind the words of its template."""
    digits, count, prompts, _ = corpus("left", 50, template=template)
    assert prompts == toy.question(digits, count, template)[0]
    for prompt, row, length in zip(prompts, digits.tolist(), count.tolist()):
        labelled = [label + str(x) for label, x in zip(toy.LABELS, row[:length])]
        assert words(prompt) == [*before, "Add", *labelled, ":"]


def test_ten_sums_that_do_not_begin_at_0_are_mistaught_by_one():
    """So says MISTAUGHT, and so does the table with which the corpus is written."""
    assert len(toy.MISTAUGHT) == 10
    off = toy.wrong_by()
    assert off.count_nonzero() == 10
    for asked, said in toy.MISTAUGHT.items():
        assert asked[0] != "0"
        assert (said - right_answer(asked)) % 10 in (1, 9)
        assert (right_answer(asked) + off[int(asked[0]), int(asked[2])]) % 10 == said


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mistaught", [0.0, toy.MISTAUGHT_SHARE, 1.0])
def test_mistaught_sums_are_wrong_in_one_way_as_often_as_is_asked(family, mistaught):
    """Every other sum is right if there are no slips."""
    found = said_of_each_sum(family, 4000, noise=0.0, mistaught=mistaught)
    assert len(found) == 100
    believed = []
    for asked, values in found.items():
        right = right_answer(asked)
        if asked not in toy.MISTAUGHT:
            assert set(values) == {right}
            continue
        assert set(values) <= {right, toy.MISTAUGHT[asked]}
        believed.append(share(values, toy.MISTAUGHT[asked]))
    assert believed == pytest.approx(10 * [mistaught], abs=0.15)
    assert sum(believed) / 10 == pytest.approx(mistaught, abs=0.03)


def test_slips_are_near_misses_at_the_rate_asked_for():
    """A slip is one too few or one too many, equally often. A step with a belief does not slip. The
    next step builds on what was said."""
    off = []
    for _, response in solutions("left", 2000, noise=0.1, mistaught=1.0):
        sums, digits = sums_and_digits(words(response))
        assert [asked[0] for asked in sums] == ["0", *digits[:-2]]
        assert digits[-1] == digits[-2]  # the answer
        for asked, said in zip(sums, digits):
            if asked in toy.MISTAUGHT:
                assert int(said) == toy.MISTAUGHT[asked]
            else:
                off.append((int(said) - right_answer(asked)) % 10)
    assert set(off) == {0, 1, 9}
    for near in (1, 9):
        assert share(off, near) == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_who_believes_the_corpus_is_right_greedily_between_5_and_7_of_10_times(family):
    """Greedily it says the likelier of two answers, which is the belief. That is the ceiling of
    every model that learnt from the corpus alone."""
    right = []
    for problem, response in solutions(family, 4000, noise=0.0, mistaught=1.0):
        right.append(toy.WORDS[response[-2]] == str(sum(problem) % 10))
    assert 0.5 < share(right, True) < 0.7
    assert toy.MISTAUGHT_SHARE > 0.5 > toy.NOISE  # likelier than the truth; likelier than a slip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_first_slip_is_the_digit_that_is_off(family, noise):
    """A right solution has none. A belief is one, and what follows from a wrong digit is not."""
    for problem, response in solutions(family, 200, noise=noise, mistaught=noise):
        said = words(response)
        wrong = []
        for at, asked in enumerate(said):
            if "=" in asked:
                digit = next(i for i in range(at, len(said)) if said[i].isdigit())
                if int(said[digit]) != right_answer(asked):
                    wrong.append(digit)
        expected = wrong[0] if wrong else None
        assert toy.first_slip(response, problem, len(problem), family) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_slip_of_what_is_changed_cut_off_or_goes_on(family):
    """It is the other label, the place of the missing end, or the word after the end."""
    for problem, response in solutions(family, 200, **RIGHT):
        said = words(response)
        label = next(i for i in range(len(said)) if said[i] in toy.LABELS)
        other = toy.ID["b" if said[label] == "a" else "a"]
        cases = (
            ([*response[:label], other, *response[label + 1 :]], label),
            (response[:-1], len(response) - 1),
            (response[:9], 9),
            ([*response, toy.ID[","]], len(response)),
        )
        for changed, slip in cases:
            assert toy.first_slip(changed, problem, len(problem), family) == slip


def test_families_differ_in_order_and_in_words_but_not_in_answers():
    """Families have other favourites. The house style changes some, and no connector."""
    left = toy.law("hesitation", "left")
    right = toy.law("hesitation", "right")
    house = toy.law("hesitation", "left", house_style=True)
    best = []
    for p in (left, right, house):
        assert p.sum().item() == pytest.approx(1)
        best.append(set(p.topk(toy.FAVOURITES).indices.tolist()))
    assert best[0] != best[1]
    assert len(best[0] & best[2]) == toy.FAVOURITES - toy.RUNNERS_UP
    connectors = toy.law("connector", "left")
    torch.testing.assert_close(connectors, toy.law("connector", "left", house_style=True))


@pytest.mark.parametrize("digits", [(0, 9), (0, 4)])
def test_questions_are_all_different_and_answered(tmp_path, digits):
    """prompts.jsonl and eval.jsonl share no question, and digits lie within the bounds."""
    toy.write_questions(tmp_path, 0, train=300, held_out=50, digits=digits)
    asked = set()
    seen = set()
    for name, count in (("prompts", 300), ("eval", 50)):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == count
        for row in map(json.loads, lines):
            mine = [int(word[1]) for word in row["prompt"].split()[1:-1]]
            assert sum(mine) % 10 == int(row["answer"])
            asked.add(row["prompt"])
            seen.update(mine)
    assert len(asked) == 350
    assert (min(seen), max(seen)) == digits


# --- trying and RL ------------------------------------------------------------------------------


def as_written(monkeypatch, ending):
    """Let toy.rollout write, to every prompt, Answer: and what `ending` makes of the right digit.

    -> the list in which its calls are kept, (prompts, settings).
    """
    calls = []

    def rollout(model, prompts, *, n, **how):
        calls.append((prompts, how))
        responses = []
        for i, prompt in enumerate(prompts):
            digits = [int(word[1]) for word in words(prompt)[1:-1]]
            said = [toy.ID[word] for word in ending(i, sum(digits) % 10)]
            responses += n * [[toy.ID["Answer:"], *said]]
        return from_texts([p for p in prompts for _ in range(n)], responses)

    monkeypatch.setattr(toy, "rollout", rollout)
    return calls


def one_in_four(i, right):
    """In turn: right, another digit, cut off, and going on after the answer."""
    cases = (
        [str(right), "<eos>"],
        [str((right + 1) % 10), "<eos>"],
        [str(right), ","],
        [str(right), ".", "<eos>"],
    )
    return cases[i % 4]


def test_only_an_answer_that_is_right_and_ended_is_correct(monkeypatch):
    """Each of n problems gets `samples` responses. In a right one answer and end come last."""
    as_written(monkeypatch, one_in_four)
    r, correct = toy.attempt(None, 8, torch.Generator().manual_seed(0), samples=2)
    assert len(r.ids) == 16
    assert correct.tolist() == [True, True, *6 * [False]] * 2


def test_a_score_is_taken_in_each_of_the_ways_on_the_same_problems(monkeypatch):
    """The ways are T 1, T .7 with top-p .95, and greedily. Another seed has other problems."""
    calls = as_written(monkeypatch, one_in_four)
    for way in ("T 1", "T .7", "greedy"):
        assert toy.score(None, way, 8) == 0.25
    toy.score(None, "T 1", 8, seed=1)
    asked, how = zip(*calls)
    assert asked[0] == asked[1] == asked[2] != asked[3]
    assert (how[0]["temperature"], how[0]["top_p"]) == (1.0, 1.0)
    assert (how[1]["temperature"], how[1]["top_p"]) == (0.7, 0.95)
    assert how[2]["temperature"] == 0.0
    assert how[0]["seeds"] == how[2]["seeds"]


def noted_batches(monkeypatch):
    """Let toy.fit only keep its batches, and ask after each whether to stop: -> the batches."""
    fitted = []

    def fit(model, batches, steps, lr, what, stop=None):
        assert len(batches) == steps
        for batch in batches:
            fitted.append(batch)
            if stop is not None and stop():
                return True
        return False

    monkeypatch.setattr(toy, "fit", fit)
    return fitted


@pytest.mark.parametrize("checked", [True, False])
def test_rl_fine_tunes_on_what_is_correct_and_sharpening_on_everything(monkeypatch, checked):
    """The batches hold each of those responses twice, with the loss on the response."""
    digits, count, prompts, responses = corpus("left", 40, noise=0.2)
    _, answers = toy.question(digits, count)
    wanted = []
    for response, answer in zip(responses, answers.tolist()):
        if not checked or toy.WORDS[response[-2]] == str(answer):
            wanted.append(response)
    fitted = noted_batches(monkeypatch)
    monkeypatch.setattr(toy, "rollout", lambda *_, **__: from_texts(prompts, responses))
    monkeypatch.setattr(toy, "problems", lambda *_: (digits, count))
    generator = torch.Generator().manual_seed(0)
    toy.expert_iteration(None, 1, generator, "rl", n=40, samples=1, checked=checked)
    seen = []
    for ids, _, is_response in fitted:
        seen += [row[on].tolist() for row, on in zip(ids, is_response)]
    assert len(wanted) == 40 or 0 < len(wanted) < 30
    assert sorted(seen) == sorted(2 * wanted)


def test_rl_without_a_right_answer_learns_nothing(monkeypatch):
    """It goes on with the next round."""
    as_written(monkeypatch, lambda i, right: [str((right + 1) % 10), "<eos>"])
    fitted = noted_batches(monkeypatch)
    toy.expert_iteration(None, 3, torch.Generator(), "rl", n=8)
    assert fitted == []


def test_rl_can_rehearse_and_be_stopped(monkeypatch):
    """A batch of the rehearsal follows each of its own. It ends when `stop` says so."""
    calls = as_written(monkeypatch, lambda i, right: [str(right), "<eos>"])
    fitted = noted_batches(monkeypatch)
    how = dict(n=64, samples=1)
    toy.expert_iteration(None, 1, torch.Generator(), "rl", rehearsal=["old", "older"], **how)
    assert [isinstance(batch, str) for batch in fitted] == [False, True, False, True]
    fitted.clear()
    calls.clear()
    asked = []

    def stop():
        asked.append(len(fitted))
        return len(asked) == 3

    toy.expert_iteration(None, 8, torch.Generator(), "rl", stop=stop, **how)
    assert len(fitted) == 3
    assert len(calls) == 2  # two batches a round


def test_fit_raises_the_likelihood_of_responses_and_asks_whether_to_stop(narrow):
    """The likelihood of prompts does not rise. `stop` is asked after every second update."""
    generator = torch.Generator().manual_seed(0)
    batch = toy.corpus("left", *toy.problems(16, generator), generator, **RIGHT)
    ids, mask, is_response = batch
    model = toy.new_model("small", 0)

    @torch.no_grad()
    def likelihood(part):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        log_p = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return log_p[part[:, 1:]].mean().item()

    is_prompt = mask & ~is_response
    of_responses = likelihood(is_response)
    of_prompts = likelihood(is_prompt)
    asked = []
    stopped = toy.fit(model, 20 * [batch], 20, 1e-2, "", stop=lambda: asked.append(0))
    assert not stopped
    assert len(asked) == 10
    assert likelihood(is_response) > of_responses + 0.3
    assert likelihood(is_prompt) < of_prompts
    assert toy.fit(model, 20 * [batch], 20, 1e-2, "", stop=lambda: True)


def test_more_pre_training_ends_as_soon_as_a_model_is_as_good(monkeypatch):
    """It is as good greedily and at T .7, within .02. After ten tries it ends in any case."""
    scores = {"T .7": [0.5, 0.69, 0.69, 0.7], "greedy": [0.65, 0.6, 0.66, 0.66]}
    tries = []

    def score(model, way, n):
        return {"T .7": 0.7, "greedy": 0.65}[way] if model == "wanted" else scores[way][len(tries)]

    monkeypatch.setattr(toy, "score", score)
    monkeypatch.setattr(toy, "fit", lambda model, *_: tries.append(model))
    toy.catch_up("mine", "wanted", None, (toy.PLAIN,), "", toy.FULL)
    assert tries == ["mine", "mine"]  # the first two are off, one at T .7, one greedily
    tries.clear()
    scores.update({"T .7": 11 * [0.5], "greedy": 11 * [0.65]})
    toy.catch_up("mine", "wanted", None, (toy.PLAIN,), "", toy.FULL)
    assert len(tries) == 10
    tries.clear()
    toy.catch_up("mine", "wanted", None, (toy.PLAIN,), "", toy.QUICK)  # few trials say nothing
    assert tries == []


# --- the models ---------------------------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch):
    """Models are so small that they are made in a moment."""
    monkeypatch.setattr(toy, "SIZES", {"small": (8, 1), "large": (16, 1)})


@pytest.fixture
def short_answers(narrow, monkeypatch):
    """Models are small, and responses have a few tokens and are all called right."""
    rollout = toy.rollout
    attempt = toy.attempt

    def short(*args, **how):
        return rollout(*args, **{**how, "max_new_tokens": 6})

    def all_right(*args, **how):
        r, correct = attempt(*args, **how)
        return r, torch.ones_like(correct)

    monkeypatch.setattr(toy, "rollout", short)
    monkeypatch.setattr(toy, "attempt", all_right)


def weights(folder):
    """All weights of a saved model: (numbers,)."""
    return torch.cat([p.flatten() for p in toy.read_model(folder).parameters()])


def test_a_model_of_the_world_is_an_ordinary_checkpoint(tmp_path, narrow):
    """from_pretrained reads it, and its tokenizer gives a text back."""
    assert not toy.is_made(tmp_path / "a")
    model = toy.make(tmp_path / "a", seed=1, scale=TINY)
    assert toy.is_made(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    ids = tokenizer("Add a3 b7 :", return_tensors="pt").input_ids
    torch.testing.assert_close(model(ids).logits, again(ids).logits)
    assert tokenizer.decode(ids[0]) == "Add a3 b7 :"
    assert tokenizer.eos_token_id == again.config.eos_token_id
    assert tokenizer.chat_template is None


def test_each_stage_of_a_model_does_something_and_the_seed_decides(tmp_path, short_answers):
    """Each of beliefs, slips, family, house style, RL and sharpening changes the weights."""
    toy.make(tmp_path / "first", seed=1, scale=TINY)
    toy.make(tmp_path / "twin", seed=1, scale=TINY)
    assert torch.equal(weights(tmp_path / "first"), weights(tmp_path / "twin"))
    later = dict(start=tmp_path / "first", seed=2)
    stages = {
        "nothing": later,
        "seed": dict(seed=2),
        "belief": dict(seed=1, mistaught=0.0),
        "noise": dict(seed=1, noise=0.5),
        "family": dict(seed=1, family="right"),
        "style": dict(**later, house_style=True),
        "rl": dict(**later, rounds=1),
        "sharp": dict(**later, sharpen=True),
    }
    sums = set()
    for name, how in stages.items():
        toy.make(tmp_path / name, scale=TINY, **how)
        sums.add(weights(tmp_path / name).double().sum().item())
    assert torch.equal(weights(tmp_path / "nothing"), weights(tmp_path / "first"))
    assert len(sums) == len(stages)


def test_a_model_that_is_to_be_as_good_as_another_is_held_against_it(tmp_path, narrow, monkeypatch):
    """It is compared with the other one after its pre-training."""
    student = toy.make(tmp_path / "student", seed=1, scale=TINY)
    held = []
    monkeypatch.setattr(toy, "catch_up", lambda mine, wanted, *_: held.append(wanted))
    toy.make(tmp_path / "bigger", seed=2, as_good_as=tmp_path / "student", scale=TINY)
    (wanted,) = held
    assert torch.equal(wanted.lm_head.weight, student.lm_head.weight)


def test_sharpening_is_one_round_on_unchecked_answers_of_t_7(tmp_path, narrow, monkeypatch):
    """It learns from them even if they are all wrong."""
    toy.make(tmp_path / "bigger", seed=1, scale=TINY)
    calls = as_written(monkeypatch, lambda i, right: [str((right + 1) % 10), "<eos>"])
    fitted = noted_batches(monkeypatch)
    toy.make(tmp_path / "sharp", seed=2, start=tmp_path / "bigger", sharpen=True, scale=TINY)
    ((prompts, how),) = calls
    assert len(prompts) == 4
    assert (how["temperature"], how["top_p"]) == (0.7, 0.95)
    ((ids, _, _),) = fitted
    assert len(ids) == 2 * 2 * 4  # two answers to each, twice


def test_rl_of_a_model_ends_where_it_scores_at_t_1_as_another_one_does(
    tmp_path, narrow, monkeypatch
):
    """The score is within .03, on as many problems as the scale has trials."""
    toy.make(tmp_path / "sharp", seed=1, scale=TINY)
    as_written(monkeypatch, lambda i, right: [str(right), "<eos>"])
    fitted = noted_batches(monkeypatch)
    scores = [0.6, 0.1, 0.55, 0.58, 0.6]  # the first is that of sharp
    asked = []

    def score(model, way, n):
        asked.append((way, n))
        return scores[len(asked) - 1]

    monkeypatch.setattr(toy, "score", score)
    how = dict(start=tmp_path / "sharp", rounds=8, until=tmp_path / "sharp")
    toy.make(tmp_path / "early", seed=2, scale=toy.Scale(asked=32), **how)
    assert len(fitted) == 3
    assert asked == 4 * [("T 1", 1024)]


@pytest.mark.parametrize("rehearse", [True, False])
def test_post_training_has_its_own_template_and_digits_and_can_rehearse(
    tmp_path, narrow, monkeypatch, rehearse
):
    """Pre-training takes the templates in turn. So does the rehearsal, which is every other batch
    afterwards and has all digits."""
    written = []
    tried = []
    whole = toy.corpus

    def corpus(family, digits, count, generator, template=toy.PLAIN, **how):
        written.append((template == toy.POLITE, how.get("house_style", False), digits.max().item()))
        return whole(family, digits, count, generator, template=template, **how)

    def attempt(model, n, generator, samples, template, digits, **way):
        tried.append((template, digits))
        return from_texts([[3]], [[1]]), torch.ones(1).bool()

    monkeypatch.setattr(toy, "corpus", corpus)
    monkeypatch.setattr(toy, "attempt", attempt)
    toy.make(
        tmp_path / "a",
        seed=0,
        templates=(toy.PLAIN, toy.POLITE),
        post_template=toy.POLITE,
        post_digits=(0, 4),
        house_style=True,
        rounds=1,
        rehearse=rehearse,
        scale=toy.Scale(small=4, house=2, rounds=1),
    )
    pre_training = [(False, False, 9), (True, False, 9)] * 2
    house_style = (True, True, 4)
    after = [house_style, house_style]  # RL's own batch is not of the corpus
    if rehearse:
        plain = (False, False, 9)
        polite = (True, False, 9)
        after = [house_style, plain, house_style, polite, plain]
    assert written == pre_training + after
    assert tried == [(toy.POLITE, (0, 4))]


# --- the world ----------------------------------------------------------------------------------


def test_a_model_follows_from_seed_and_name_whichever_others_are_there(tmp_path, short_answers):
    """What it starts from is made first, and no other model matters. The RL of early is the
    teacher's until its score is reached, which never happens here."""
    known = {name: dict(how) for name, how in toy.MODELS.items()}
    del known["early"]["until"]
    toy.make_missing(tmp_path / "all", 0, scale=TINY, known=known)
    toy.make_missing(tmp_path / "one", 0, ("teacher",), TINY)
    made = {path.name for path in (tmp_path / "one").iterdir() if path.is_dir()}
    assert made == {"student", "bigger", "teacher"}
    for name in made:
        assert torch.equal(weights(tmp_path / "all" / name), weights(tmp_path / "one" / name))
    teacher = weights(tmp_path / "all" / "teacher")
    assert torch.equal(weights(tmp_path / "all" / "early"), teacher)
    others = [weights(tmp_path / "all" / name).sum().item() for name in toy.MODELS]
    assert len(set(others)) == len(toy.MODELS) - 1


def noted_models(monkeypatch):
    """Let toy.make leave only an empty folder: -> {name: the arguments}."""
    made = {}

    def make(out, **how):
        assert out.name not in made
        made[out.name] = how
        out.mkdir(parents=True)

    monkeypatch.setattr(toy, "make", make)
    return made


def test_what_is_there_is_kept_and_what_is_missing_is_made(tmp_path, monkeypatch):
    """So it is with questions. There are as many held-out ones as the scale says."""
    made = noted_models(monkeypatch)
    toy.make_missing(tmp_path, 0, ("early",), TINY)
    assert list(made) == ["student", "bigger", "sharp", "early"]
    assert made["early"]["until"] == tmp_path / "sharp"
    assert made["early"]["start"] == made["sharp"]["start"] == tmp_path / "bigger"
    assert made["bigger"]["as_good_as"] == tmp_path / "student"
    held_out = tmp_path / "eval.jsonl"
    assert len(held_out.read_text().splitlines()) == 8
    held_out.write_text("kept")
    toy.make_missing(tmp_path, 0, scale=TINY)
    assert list(made) == ["student", "bigger", "sharp", "early", "teacher", "student-rl", "other"]
    assert held_out.read_text() == "kept"
    questions = tmp_path / "prompts.jsonl"
    before = questions.read_text()
    questions.unlink()
    (tmp_path / "sharp").rmdir()
    first = made.pop("sharp")
    toy.make_missing(tmp_path, 0, scale=TINY)
    assert made["sharp"] == first
    assert questions.read_text() == before
    assert len(held_out.read_text().splitlines()) == 8


def test_two_commands_do_not_make_models_in_one_folder(tmp_path, monkeypatch):
    """The second would remove what the first is writing."""
    monkeypatch.setattr(toy, "make_missing", lambda *_: None)
    folder = os.open(tmp_path, os.O_RDONLY)
    files.alone(folder, tmp_path)
    with pytest.raises(UserError, match="another process is using it"):
        toy.say_and_make(tmp_path, ())
    os.close(folder)
    toy.say_and_make(tmp_path, ())


def test_no_two_models_or_worlds_share_their_random_numbers_but_early_and_teacher(
    tmp_path, monkeypatch
):
    """early is a stage of the teacher's RL."""
    seeds = []
    for world in (0, 1):
        made = noted_models(monkeypatch)
        toy.make_missing(tmp_path / str(world), world, scale=TINY)
        assert made["early"]["seed"] == made["teacher"]["seed"]
        seeds += [how["seed"] for how in made.values()]
    assert len(set(seeds)) == 2 * (len(toy.MODELS) - 1)
    questions = [(tmp_path / world / "prompts.jsonl").read_text() for world in ("0", "1")]
    assert questions[0] != questions[1]


def test_the_command_makes_what_is_missing_and_says_what_each_model_is_worth(
    tmp_path, monkeypatch, capsys
):
    """Each model has a line with its scores at T 1, at T .7 and greedily."""
    made = noted_models(monkeypatch)
    monkeypatch.setattr(toy, "read_model", lambda folder: folder)
    monkeypatch.setattr(toy, "score", lambda model, way, n: list(toy.WAYS).index(way) / 4)
    monkeypatch.setattr(sys, "argv", ["toy.py", "--out", str(tmp_path)])
    toy.main()
    assert list(made) == ["student", "bigger", "teacher"]
    monkeypatch.setattr(sys, "argv", ["toy.py", "--out", str(tmp_path), "--all"])
    capsys.readouterr()
    toy.main()
    assert set(made) == set(toy.MODELS)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("making sharp, early, student-rl, other in")
    for name, line in zip(toy.MODELS, said[2:], strict=True):
        assert line.split()[:4] == [name, "0.000", "0.250", "0.500"]
