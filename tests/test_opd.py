"""opd.py: a step, and a run whose result depends only on what should decide it."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    PROMPTS,
    TEMPLATE,
    WORDS,
    Killed,
    config,
    ready,
    rows,
    tiny,
    weights,
    word_tokenizer,
    write_lines,
)
from transformers import AutoModelForCausalLM

import analysis
import opd
from loss import SUPPORTS, full_vocab, sampled_token, top_k, top_k_released
from plumbing import flags, measure, prompts, show
from plumbing.answers import answered
from plumbing.flags import OBJECTIVES, PRESETS, Config, parse_opd
from recipes import teacher_rollouts
from rollout import batch, from_texts, rollout
from teacher import Pair, UserError, log_probs, micro_batches

METRICS = """loss reverse_kl overlap_ratio overlap_mass_student overlap_mass_teacher
    overlap_token_advantage entropy_gap largest_gap entropy_student entropy_teacher reward
    distance_left end_mass_student end_mass_teacher
    response_length truncated_fraction repetition_fraction grad_norm lr tokens overlap_empty
    sampling_mismatch time_rollout time_update""".split()


def step_of(cfg, pair, train, step=0, optimizer=None):
    """One update on the step's prompts: -> Rollout, metrics."""
    chosen = [train[i] for i in batch(len(train), step, cfg.batch_size, cfg.seed)]
    return opd.update(cfg, pair, optimizer or opd.adamw(cfg, pair.student), chosen, step)


class Gradients:
    """Stands for an optimizer and keeps the clipped gradient of a step: {parameter: gradient}."""

    def __init__(self, student):
        self.student = student
        self.param_groups = [{"lr": 0.0}]

    def step(self):
        self.found = {k: p.grad.clone() for k, p in self.student.named_parameters()}

    def zero_grad(self):
        self.student.zero_grad()


def gradients_of(cfg, step=0):
    """Take a step: -> Pair, Rollout, metrics, clipped gradients."""
    pair, train, _ = ready(cfg)
    keeper = Gradients(pair.student)
    r, row = step_of(cfg, pair, train, step, keeper)
    return pair, r, row, keeper.found


# --- a step -------------------------------------------------------------------------------------


def test_the_update_descends_the_mean_over_all_tokens_of_the_step(world, tmp_path):
    """The gradient is that of the plain mean of Eq. 4 over every response token
    (easydistill#16)."""
    cfg = config(world, tmp_path, objective="full", micro_batch_tokens=20)
    pair, r, row, ours = gradients_of(cfg)
    of_r = (r.ids, r.attention_mask, r.is_response)
    log_p = log_probs(pair.student, *of_r, vocab_size=pair.vocab_size)  # (N, V)
    log_q = log_probs(pair.teacher, *of_r, vocab_size=pair.vocab_size)
    loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    y = r.ids[r.is_response]
    for name, values in analysis.diagnose(log_p, log_q, y, cfg.k, pair.eos_ids).items():
        if name != "log_p":
            assert row[name] == pytest.approx(values.nanmean().item(), rel=1e-4), name
    assert row["end_mass_student"] > 0
    plain = {k: p.grad for k, p in pair.student.named_parameters()}
    norm = math.sqrt(sum(g.square().sum().item() for g in plain.values()))
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for name, g in plain.items():
        torch.testing.assert_close(ours[name], g / max(1, norm), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "objective, support",
    [
        ("top-k", "student"),
        ("top-k", "union"),
        ("top-k-released", "student"),
        ("full", "student"),
        ("sampled", "student"),
    ],
)
def test_the_cut_into_micro_batches_changes_nothing(world, tmp_path, objective, support):
    """There is one denominator a step, whatever the budget (trl#6006, trl#4719,
    easydistill#16)."""
    found = []
    for budget in (1, 10_000):
        cfg = config(world, tmp_path, micro_batch_tokens=budget, objective=objective)
        cfg = dataclasses.replace(cfg, support=support)
        _, _, row, gradients = gradients_of(cfg)
        found.append((row["loss"], row["reverse_kl"], gradients))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_rows_in_flight_change_nothing_but_memory(world, tmp_path):
    """Written a few at a time, the responses are the same."""
    all_at_once = gradients_of(config(world, tmp_path))
    few = gradients_of(config(world, tmp_path, in_flight=3))
    assert torch.equal(all_at_once[1].ids, few[1].ids)
    torch.testing.assert_close(all_at_once[3], few[3], rtol=1e-4, atol=1e-6)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(world, tmp_path):
    """Distances are exactly 0, the overlap is 1; with another teacher they are not (trl#6480)."""
    cfg = config(world, tmp_path, teacher=f"{world}/student")
    _, _, row, gradients = gradients_of(cfg)
    assert max(g.abs().max().item() for g in gradients.values()) < 1e-6
    assert row["loss"] == row["reverse_kl"] == row["entropy_gap"] == row["reward"] == 0
    assert row["overlap_ratio"] == 1
    cfg = config(world, tmp_path)
    pair, _, held_out = ready(cfg)
    assert (
        measure.distance(cfg, pair, held_out, opd.loss_and_metrics(cfg, pair.eos_ids))["reverse_kl"]
        > 0.01
    )


def test_temperatures_are_those_of_writing_and_of_scoring(world, tmp_path):
    """trl GKD, trl#6526: what is sampled at .5 is scored at .5. The teacher keeps its own."""
    warm = gradients_of(config(world, tmp_path))[2]
    cool = gradients_of(config(world, tmp_path, temperature=0.5))[2]
    warm_teacher = gradients_of(config(world, tmp_path, teacher_temperature=2.0))[2]
    assert cool["sampling_mismatch"] < 1e-4
    assert cool["entropy_student"] < warm["entropy_student"] == warm_teacher["entropy_student"]
    assert warm["entropy_teacher"] < warm_teacher["entropy_teacher"]


def test_the_distance_is_measured_at_the_temperature_of_the_run(world, tmp_path):
    """What is sampled at .5 is scored at .5 there, too, and the seed decides what is written."""
    cfg = config(world, tmp_path, temperature=0.5)
    pair, _, held_out = ready(cfg)
    per_position = opd.loss_and_metrics(cfg, pair.eos_ids)
    found = measure.distance(cfg, pair, held_out, per_position)
    assert found["sampling_mismatch"] < 1e-4
    other_seed = dataclasses.replace(cfg, seed=1)
    assert measure.distance(other_seed, pair, held_out, per_position)["loss"] != found["loss"]


def calls_of_heads(pair):
    """What the two output heads give from now on: a list of tensors, filled as they are called."""
    seen = []
    for model in (pair.student, pair.teacher):
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda _, args, out: seen.append(out))
    return seen


def everything(cfg, pair, train, held_out):
    """All that computes with a pair, one thing after the other: yields their names."""
    step_of(cfg, pair, train)
    yield "a step"
    measure.distance(cfg, pair, held_out, opd.loss_and_metrics(cfg, pair.eos_ids))
    yield "the distance"
    list(teacher_rollouts(pair, train[:2], max_new_tokens=6))
    yield "the teacher's answers"
    analysis.diagnose_pair(pair, train[:2], answered=answered, k=4, max_new_tokens=6)
    yield "a diagnosis"


def test_all_is_computed_in_the_dtype_of_the_run(world, tmp_path):
    """What is sampled in bfloat16 and scored in float32 is not on-policy."""
    cfg = config(world, tmp_path, dtype="bfloat16")
    pair, train, held_out = ready(cfg)
    pair.teacher.float()  # its weights alone would make bfloat16
    seen = calls_of_heads(pair)
    for what in everything(cfg, pair, train, held_out):
        assert {out.dtype for out in seen} == {torch.bfloat16}, what
        seen.clear()


def test_the_logits_of_a_chunk_are_all_that_exist_at_a_time(world, tmp_path, monkeypatch):
    """DistillKit#4, ms-swift#7295, verl#6593: in a step and in all that is measured."""
    monkeypatch.setattr(Pair, "chunk", 3)
    cfg = config(world, tmp_path)
    pair, train, held_out = ready(cfg)
    seen = calls_of_heads(pair)
    for what in everything(cfg, pair, train, held_out):
        scored = [len(out) for out in seen if out.dim() == 2]  # (c, V); when sampled (b, 1, V)
        assert what == "the teacher's answers" or max(scored) == 3, what
        seen.clear()


def test_gap_recovery_is_of_the_sampled_accuracies(world, tmp_path, monkeypatch):
    """(after - before) / (teacher - before), and not greedily."""
    share = {"before": (0.2, 0.1), "after": (0.6, 0.9), "teacher": (1.0, 0.8)}

    def accuracy(mean):
        right = torch.arange(100).unsqueeze(1) < 100 * mean
        return measure.counted(right, torch.zeros_like(right))

    def accuracies(cfg, pair, rows, model, when):
        sampled, greedy = share[when]
        return {f"accuracy_{when}": accuracy(sampled), f"greedy_{when}": accuracy(greedy)}

    monkeypatch.setattr(measure, "accuracies", accuracies)
    result = opd.distil(config(world, tmp_path, steps=1))
    assert result["gap_recovery"] == pytest.approx(0.5)


def test_the_optimizer_is_that_of_the_authors_code():
    """AdamW with a weight decay of .01, but for the learning rate."""
    [group] = opd.adamw(Config(lr=0.3), torch.nn.Linear(1, 1)).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.3, (0.9, 0.999), 0.01)


def test_a_step_that_is_not_finite_changes_nothing_and_says_so(world, tmp_path):
    """There is no update, and the row has the reason."""
    cfg = config(world, tmp_path)
    pair, train, _ = ready(cfg)
    with torch.no_grad():
        pair.teacher.lm_head.weight[5] = math.nan
    before = {k: p.clone() for k, p in pair.student.named_parameters()}
    _, row = step_of(cfg, pair, train)
    assert "gradient norm nan" in row["skipped"]
    for name, p in pair.student.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


def test_the_metrics_do_not_depend_on_what_the_padding_holds(world, tmp_path):
    """nano-opd, optipfair#34: diagnostics averaged over padding rank methods wrongly."""
    cfg = config(world, tmp_path, n=3)
    pair, train, _ = ready(cfg)
    found = []
    for pad_id in (0, 5):
        pair.pad_id = pad_id
        r, row = step_of(cfg, pair, train, optimizer=Gradients(pair.student))
        found.append({k: x for k, x in row.items() if not k.startswith("time_")})
        assert row["tokens"] == int(r.response_mask.sum())
    assert not r.attention_mask.all()
    assert found[0] == found[1]


def test_responses_that_are_one_token_over_and_over_are_counted(world, tmp_path):
    """ms-swift#6478, ms-swift#6791: training went on with rollouts of nothing but "!"."""
    cfg = config(world, tmp_path, max_new_tokens=20)
    pair, train, _ = ready(cfg)
    before = step_of(cfg, pair, train)[1]
    pair.student.lm_head.bias = torch.nn.Parameter(100.0 * torch.eye(len(WORDS))[13])
    after = step_of(cfg, pair, train)[1]
    assert before["repetition_fraction"] < 1
    assert after["repetition_fraction"] == 1
    assert after["truncated_fraction"] == 1
    assert after["response_length"] == 20


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective_is_the_one_that_is_named(name, support):
    """prime-rl#1458: a name without a loss of its own does not train another one in silence."""
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = torch.randn(2, 7, 20, generator=generator).log_softmax(-1)
    y = torch.arange(7)
    expected = {
        "top-k": top_k(log_p, log_q, 4, support),
        "full": full_vocab(log_p, log_q),
        "sampled": sampled_token(log_p, log_q, y),
        "top-k-released": top_k_released(log_p, log_q, 4, support),
    }
    cfg = Config(objective=name, k=4, support=support)
    assert torch.equal(opd.objective(cfg, log_p, log_q, y), expected[name])
    with pytest.raises(ValueError, match="has no loss"):
        opd.objective(Config(objective="mse"), log_p, log_q, y)


def test_a_step_counts_each_token_once_whatever_the_parts():
    """The mismatch is the largest of any part. A state without shared tokens is left out of Eq. 7,
    and counts in the rest."""
    means = measure.Means(max_new_tokens=8, device=torch.device("cpu"))
    names = [name for name in METRICS[:11] if name != "loss"]
    for advantages, off in (([-1.0, math.nan], -0.5), ([-3.0], 0.1)):
        count = len(advantages)
        values = {name: torch.ones(count) for name in ("loss", *names)}
        values["overlap_token_advantage"] = torch.tensor(advantages)
        values["log_p"] = torch.full((count,), off)
        part = SimpleNamespace(log_p=torch.zeros(count), place=torch.arange(count))
        means.add(values, part)
    row = means.means(from_texts([[5], [6]], [[7, 2], [8]]))
    assert row["overlap_token_advantage"] == -2
    assert row["overlap_empty"] == 1
    assert row["tokens"] == 3
    assert row["loss"] == 1
    assert row["sampling_mismatch"] == 0.5


# --- a step, watched ----------------------------------------------------------------------------


@pytest.fixture
def step(world, tmp_path):
    """One update, and what each model read in it: asked = {model: [(ids, mask, caching)]}."""
    cfg = config(world, tmp_path, micro_batch_tokens=20, max_prompt_tokens=4)
    with pytest.warns(UserWarning, match="1 of 8 prompts"):
        pair, train, _ = ready(cfg)
    asked = {"student": [], "teacher": []}
    for who, seen in asked.items():

        def note(_, args, kwargs, seen=seen):
            seen.append((kwargs["input_ids"], kwargs["attention_mask"], kwargs["use_cache"]))

        getattr(pair, who).base_model.register_forward_pre_hook(note, with_kwargs=True)
    pair.tokenizer = None  # nothing may be encoded or decoded
    chosen = [train[i] for i in batch(len(train), 0, cfg.batch_size, cfg.seed)]
    r, row = opd.update(cfg, pair, opd.adamw(cfg, pair.student), chosen, 0)
    return SimpleNamespace(
        cfg=cfg, prompts=[row["ids"] for row in chosen], r=r, row=row, asked=asked
    )


def texts(asked, caching):
    """The token ids of each row that was read, without its padding."""
    found = []
    for ids, mask, is_caching in asked:
        if is_caching == caching:
            found += [row[on.bool()].tolist() for row, on in zip(ids, mask)]
    return found


def test_what_was_sampled_is_read_by_both_models_id_by_id(step):
    """No text is decoded and encoded again, no prompt is cut, and nothing is shifted.

    trl#6359; OPSD#3, trl#5241, trl#6063, trl#6057; ms-swift#9414, ms-swift#9429, ms-swift#9671.
    """
    r = step.r
    assert all(len(prompt) <= 4 for prompt in step.prompts)
    sampled = [step.prompts[i // step.cfg.n] + r.response_ids(i) for i in range(len(r.ids))]
    assert texts(step.asked["student"][:1], caching=True) == step.prompts
    assert sorted(texts(step.asked["student"], caching=False)) == sorted(sampled)
    assert texts(step.asked["teacher"], caching=False) == texts(
        step.asked["student"], caching=False
    )


def test_a_step_takes_one_forward_of_the_teacher_a_micro_batch(step):
    """trl#4560, trl#5726: the teacher neither writes nor reads twice."""
    parts = len(micro_batches(step.r, step.cfg.micro_batch_tokens))
    T = step.r.log_p.size(1)
    assert parts > 2
    assert [caching for *_, caching in step.asked["teacher"]] == [False] * parts
    assert [caching for *_, caching in step.asked["student"]] == [True] * T + [False] * parts


def test_the_ratio_of_the_first_update_is_recorded_and_1(step):
    """Qwen3#1799: p as scored over p as sampled is 1 but for rounding, and the row says so."""
    assert 0 <= step.row["sampling_mismatch"] < 1e-5
    assert step.r.log_p[step.r.response_mask].min() < -1


# --- a run --------------------------------------------------------------------------------------


def test_a_run_leaves_the_files_and_metrics_that_it_promises(world, tmp_path):
    """Each file is there, each metric is finite, and result.json is what distil returns."""
    out = tmp_path / "run"
    result = opd.distil(config(world, out))
    names = "config.json metrics.jsonl rollouts.jsonl checkpoint student result.json"
    assert {path.name for path in out.iterdir()} == set(names.split())
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    for row in logged:
        assert all(math.isfinite(row[name]) for name in METRICS)
        assert row["peak_memory_bytes"] > 0
    assert json.loads((out / "result.json").read_text()) == result
    promised = "accuracy_before accuracy_after accuracy_teacher gap_recovery seconds command commit"
    greedy = "greedy_before greedy_after greedy_teacher"
    assert set(promised.split() + greedy.split()) <= result.keys()
    assert result["accuracy_after"]["samples"] == 2  # a fifth of ten prompts, once each
    assert result["greedy_after"].keys() == result["accuracy_after"].keys()
    assert (result["eval_temperature"], result["eval_top_p"]) == (0.7, 0.95)


COLD_START = {"cold_start": 2, "cold_start_max_new_tokens": 24, "cold_start_temperature": 1.0}


@pytest.fixture
def exams(monkeypatch):
    """What is asked when accuracy is measured: [(prompts, (model, answers to each, T, top-p))]."""
    exams = []

    def watched(pair, rows, *, model, n, **how):
        who = "teacher" if model is pair.teacher else "student"
        questions = [row["prompt"] for row in rows]
        exams.append((questions, (who, n, how["temperature"], how.get("top_p", 1.0))))
        return answered(pair, rows, model=model, n=n, **how)

    monkeypatch.setattr(measure, "answered", watched)
    return exams


def test_accuracy_is_the_papers_and_greedy_at_every_stage(world, tmp_path, exams):
    """Both accuracies are measured, of both models: a gain at T .7 may be sharpness alone, a greedy
    one is not. During training only that at T .7 is.
    """
    result = opd.distil(
        config(world, tmp_path / "run", **COLD_START, steps=2, eval_every=1, eval_n=3)
    )
    of_teacher = [("teacher", 3, 0.7, 0.95), ("teacher", 1, 0.0, 1.0)]
    of_student = [("student", 3, 0.7, 0.95), ("student", 1, 0.0, 1.0)]
    before = of_teacher + of_student
    cold_start = of_student
    first_step = of_student[:1]
    after = of_student
    assert [how for _, how in exams] == before + cold_start + first_step + after
    for when in ("teacher", "before", "cold_start", "after"):
        assert result[f"accuracy_{when}"]["samples"] == 6
        assert result[f"greedy_{when}"]["samples"] == 2


def test_accuracy_may_have_a_template_of_its_own(world, tmp_path, exams, monkeypatch):
    """The paper trains under "Answer:" and measures accuracy under \\boxed{}. KL and overlap are
    measured under the template of training."""
    read = []
    distance = measure.distance

    def watched(cfg, pair, rows, per_position):
        read.append([row["prompt"] for row in rows])
        return distance(cfg, pair, rows, per_position)

    monkeypatch.setattr(measure, "distance", watched)
    of_training = "{question} so"
    of_exams = "the digits {question}"
    cfg = config(world, tmp_path / "run", **COLD_START, template=of_training, steps=2, eval_every=1)
    cfg = dataclasses.replace(cfg, eval_template=of_exams)
    opd.distil(cfg)
    _, _, held_out = prompts.questions(cfg)
    trained_on = [row["prompt"] for row in held_out]
    questions = [text.removesuffix(" so") for text in trained_on]
    assert len(read) == 3
    assert all(asked == trained_on for asked in read)
    assert len(exams) == 9
    for asked, _ in exams:
        assert asked == [f"the digits {question}" for question in questions]


def test_the_seed_decides_the_order_of_prompts(world, tmp_path, monkeypatch):
    """A run takes the batches of its own seed."""
    asked = []
    update = opd.update

    def watched(cfg, pair, optimizer, chosen, step):
        asked.append([row["prompt"] for row in chosen])
        return update(cfg, pair, optimizer, chosen, step)

    monkeypatch.setattr(opd, "update", watched)
    cfg = config(world, tmp_path / "run", seed=3, steps=2, eval_every=1)
    opd.distil(cfg)
    _, train, _ = ready(cfg)
    for step in range(2):
        expected = batch(len(train), step, cfg.batch_size, seed=3)
        assert asked[step] == [train[i]["prompt"] for i in expected]
    first, last = rows(tmp_path / "run")
    assert first["accuracy"] is not None
    assert "accuracy" not in last  # it is measured after the last step anyway


@pytest.mark.parametrize(
    "student, teacher",
    [("gpt2", "teacher"), ("gemma3", "gpt2"), ("qwen3", "gemma3"), ("student", "qwen3")],
)
def test_any_architecture_learns_from_any_other(world, tmp_path, student, teacher):
    """Whatever families, sizes and padded vocabularies: what is sampled is scored at every step,
    and the KL falls."""
    cfg = config(world, tmp_path, student=f"{world}/{student}", teacher=f"{world}/{teacher}")
    cfg = dataclasses.replace(cfg, lr=3e-3, batch_size=8)
    pair, train, _ = ready(cfg)
    optimizer = opd.adamw(cfg, pair.student)
    logged = [step_of(cfg, pair, train, step, optimizer)[1] for step in range(12)]
    assert max(row["sampling_mismatch"] for row in logged) < 1e-4
    kl = [row["reverse_kl"] for row in logged]
    assert sum(kl[-3:]) < sum(kl[:3])


def test_bfloat16_computes_over_float32_master_weights(world, tmp_path):
    """At lr 1e-6 bfloat16 would lose most of an update, so weights and moments stay float32."""
    cfg = config(world, tmp_path / "run", dtype="bfloat16", lr=1e-6, steps=2)
    pair, _, _ = ready(cfg)
    assert {p.dtype for p in pair.student.parameters()} == {torch.float32}
    assert {p.dtype for p in pair.teacher.parameters()} == {torch.bfloat16}
    opd.distil(cfg)
    after = weights(tmp_path / "run")
    moved = []
    for name, old in pair.student.state_dict().items():
        if old.abs().max() < 1:
            moved.append((after[name] != old).float().mean().item())
    assert min(moved) > 0.3  # in bfloat16 a step of 1e-6 would leave weights of .3 where they were
    optimizer = opd.adamw(cfg, pair.student)
    pair_rows = ready(cfg)[1]
    step_of(cfg, pair, pair_rows, optimizer=optimizer)
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.float32}


def test_without_answers_there_is_no_accuracy_and_the_same_training(world, tmp_path):
    """Answers are only for measuring (trl#6478, trl#6452, GKDTrainer). What is unknown is null."""
    with_answers = opd.distil(config(world, tmp_path / "answers", steps=2))
    bare = opd.distil(config(world, tmp_path / "bare", prompts=f"{world}/bare.jsonl", steps=2))
    assert with_answers["accuracy_after"]["mean"] is not None
    assert bare["accuracy_before"] is bare["accuracy_after"] is bare["gap_recovery"] is None
    assert bare["greedy_before"] is bare["greedy_after"] is bare["greedy_teacher"] is None
    assert "accuracy" not in show.summary(bare)
    assert rows(tmp_path / "bare") == rows(tmp_path / "answers")
    expected = weights(tmp_path / "answers")
    assert all(torch.equal(x, expected[name]) for name, x in weights(tmp_path / "bare").items())


def test_the_saved_student_is_the_trained_one_and_ends_where_it_learned_to(world, tmp_path):
    """student/ has the weights of the checkpoint and the end tokens of the rollouts."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(world / "student").save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    unsavable = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2]}  # without do_sample
    (base / "generation_config.json").write_text(json.dumps(unsavable))
    out = tmp_path / "run"
    opd.distil(config(world, out, student=str(base), steps=2))
    trained = torch.load(out / "checkpoint" / "state.pt", weights_only=True)["student"]
    assert all(torch.equal(x, trained[name]) for name, x in weights(out).items())
    saved = AutoModelForCausalLM.from_pretrained(out / "student")
    assert saved.generation_config.eos_token_id == [2]


def test_an_end_of_one_model_ends_responses_of_both(world, tmp_path):
    """trl#5725: a student without any eos, in tokenizer or configs, is no crash."""
    student = tmp_path / "student"
    tiny("llama", seed=3, vocab_size=len(WORDS)).save_pretrained(student)
    word_tokenizer(eos=None).save_pretrained(student)
    with pytest.warns(UserWarning, match="student ends a response with"):
        pair, _, _ = ready(config(world, tmp_path / "run", student=str(student)))
    assert pair.eos_ids == [2]


@pytest.mark.parametrize("thinking", ["on", "off", "default"])
def test_the_switch_of_the_template_is_the_same_for_both_models(world, tmp_path, thinking):
    """Both models read the thinking mark or neither does, and config.json says which.

    OPSD#10, OPSD#16, OPSD#18, Rethinking-OPD#6, Rethinking-OPD#18.
    """
    template = TEMPLATE.replace("if think", "if enable_thinking")
    for seed, name in enumerate(("student", "teacher")):
        tiny("llama", seed=seed, vocab_size=len(WORDS)).save_pretrained(tmp_path / name)
        word_tokenizer(chat_template=template).save_pretrained(tmp_path / name)
    of_models = {"student": f"{tmp_path}/student", "teacher": f"{tmp_path}/teacher"}
    cfg = config(world, tmp_path / "run", thinking=thinking, **of_models, steps=1)
    _, train, _ = ready(cfg)
    mark = WORDS.index("so" if thinking == "on" else ":")
    assert all(row["ids"][-1] == mark for row in train)
    opd.distil(cfg)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["thinking"] == thinking
    other = {"on": "off", "off": "default", "default": "on"}[thinking]
    with pytest.raises(UserError, match=f"--thinking '{thinking}'"):
        opd.distil(dataclasses.replace(cfg, thinking=other, resume=True, steps=2))


def test_a_mismatch_is_an_error_before_the_first_step(world, tmp_path, monkeypatch):
    """TensorRT-Model-Connect#660: a decoder may sample from another softmax than is scored."""

    def off(*args, in_flight=None, **how):
        r = rollout(*args, **how)
        r.log_p -= 0.5
        return r

    monkeypatch.setattr(measure, "rollout", off)
    monkeypatch.setattr(opd, "update", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(UserError, match="differ by up to 0.5 nats"):
        opd.distil(config(world, tmp_path / "run"))


def test_k_is_at_most_the_shared_vocabulary(world, tmp_path):
    """ms-swift#9644: so many tokens are looked at as were asked for, or the run is refused."""
    with pytest.raises(UserError, match=f"--k {len(WORDS) + 1}: .* share {len(WORDS)} tokens"):
        opd.distil(config(world, tmp_path, k=len(WORDS) + 1))


# --- resume -------------------------------------------------------------------------------------


def test_k_steps_a_stop_and_the_rest_equal_all_steps_bit_for_bit(world, tmp_path, monkeypatch):
    """verl#5725, entrenar#294: a run that was killed between checkpoints ends as if it was not."""
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    opd.distil(config(world, whole, steps=5))
    update = opd.update

    def dies(cfg, pair, optimizer, chosen, step):
        if step == 3:
            raise Killed
        return update(cfg, pair, optimizer, chosen, step)

    monkeypatch.setattr(opd, "update", dies)
    with pytest.raises(Killed):
        opd.distil(config(world, cut, steps=5))
    assert len(rows(cut)) == 3
    monkeypatch.setattr(opd, "update", update)
    opd.distil(config(world, cut, steps=5, resume=True))
    assert rows(cut) == rows(whole)
    assert (cut / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()
    expected = weights(whole)
    assert all(torch.equal(x, expected[name]) for name, x in weights(cut).items())


def test_a_resume_at_the_border_of_epochs_keeps_the_teacher_of_the_start(world, tmp_path):
    """verl#5725, entrenar#294, open-instruct#1523: no step is lost where an epoch ends.

    trl#5990: a student that is its own teacher is not taught by what it has become.
    """
    own = {"batch_size": 4, "teacher": f"{world}/student", "teacher_temperature": 0.5}
    opd.distil(config(world, tmp_path / "whole", steps=4, **own))  # 8 prompts: 2 steps an epoch
    opd.distil(config(world, tmp_path / "cut", steps=2, **own))
    opd.distil(config(world, tmp_path / "cut", steps=4, resume=True, **own))
    assert [row["step"] for row in rows(tmp_path / "cut")] == [1, 2, 3, 4]
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(x, expected[name]) for name, x in weights(tmp_path / "cut").items())


def test_a_finished_run_goes_on_with_more_steps_and_only_then(world, tmp_path):
    """Four steps and two more are six. Without more steps, or without --resume, nothing is
    changed."""
    out = tmp_path / "run"
    opd.distil(config(world, out))
    left = (out / "result.json").read_bytes()
    for change in ({"resume": True}, {"steps": 6}):
        with pytest.raises(UserError, match="complete"):
            opd.distil(config(world, out, **change))
    assert (out / "result.json").read_bytes() == left
    with pytest.raises(UserError, match="--k 4"):
        opd.distil(config(world, out, steps=6, k=5, resume=True))
    result = opd.distil(config(world, out, steps=6, resume=True))
    opd.distil(config(world, tmp_path / "straight", steps=6))
    assert result["steps"] == 6
    assert rows(out) == rows(tmp_path / "straight")


# --- what a run says ----------------------------------------------------------------------------


def test_accuracies_are_said_as_soon_as_they_are_known(world, tmp_path, capsys):
    """Who lets a long run write into a file sees there where it began, before the first step."""
    found = opd.distil(config(world, tmp_path / "run", steps=1))
    said = capsys.readouterr().out.splitlines()
    began = said.index(
        show.accuracy_line("before", found["accuracy_before"], found["greedy_before"])
    )
    taught = said.index(
        show.accuracy_line("teacher", found["accuracy_teacher"], found["greedy_teacher"])
    )
    titles = said.index(show.columns().splitlines()[-1])
    assert taught < began < titles
    assert said[-1].startswith("student after: accuracy ")


def test_without_answers_no_accuracy_is_said(world, tmp_path, capsys):
    """There is none, and the run works."""
    write_lines(tmp_path / "p.jsonl", [{"prompt": row["prompt"]} for row in PROMPTS])
    with pytest.warns(UserWarning, match="accuracy will not be measured"):
        opd.distil(config(world, tmp_path / "run", prompts=f"{tmp_path}/p.jsonl", steps=1))
    assert "accuracy" not in capsys.readouterr().out


# --- prompts and flags --------------------------------------------------------------------------


def test_several_held_out_files_are_reported_each_and_as_their_mean(world, tmp_path, capsys):
    """The paper averages AIME24, AIME25 and AMC23, of 30, 30 and 40 prompts, so each file counts
    alike. The error is that of a mean of independent files."""
    write_lines(tmp_path / "a.jsonl", PROMPTS[:2])
    write_lines(tmp_path / "b.jsonl", PROMPTS[2:7])
    paths = (f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl")
    run = config(world, tmp_path / "run", eval=paths, steps=2, eval_n=2, eval_every=1)
    with pytest.warns(UserWarning, match="7 of 10 prompts are held out"):
        found = opd.distil(run)
    for name in ("accuracy_before", "greedy_after", "accuracy_teacher"):
        accuracy = found[name]
        files = accuracy["files"]
        assert [x["file"] for x in files] == list(paths)
        assert [len(x["each"]) for x in files] == [2, 5]
        assert accuracy["mean"] == sum(x["mean"] for x in files) / 2
        errors = [x["standard_error"] for x in files]
        assert accuracy["standard_error"] == pytest.approx(math.hypot(*errors) / 2)
        assert sum(sum(x["each"]) for x in files) == sum(accuracy["each"])
    of_files = rows(tmp_path / "run")[0]["accuracy_of_files"]
    assert len(of_files) == 2 and rows(tmp_path / "run")[0]["accuracy"] == sum(of_files) / 2
    gap = analysis.ahead(found["accuracy_teacher"], found["accuracy_before"])
    lead = found["accuracy_teacher"]["mean"] - found["accuracy_before"]["mean"]
    assert gap["mean"] == pytest.approx(lead)
    said = show.summary(found)
    assert "mean of 2 files" in said
    for path in paths:
        assert said.count(path) == 2  # sampled, and greedily


def test_the_held_out_distance_is_of_all_files(world, tmp_path):
    """It takes the first 256 rows, and files stand in turn there, so that none is left out."""
    write_lines(tmp_path / "a.jsonl", PROMPTS[:2])
    write_lines(tmp_path / "b.jsonl", PROMPTS[2:7])
    cfg = config(world, "", eval=(f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"))
    with pytest.warns(UserWarning):
        _, _, held_out = prompts.questions(cfg)
    assert [row["id"][0] for row in held_out] == list("ababbbb")


def test_what_is_odd_about_several_held_out_files_is_said(world, tmp_path):
    """A file that is given twice is refused. A question in two files counts in both. A file without
    answers is in no accuracy. From Python a text is refused; a tuple is needed."""
    write_lines(tmp_path / "a.jsonl", PROMPTS[:2])
    write_lines(tmp_path / "b.jsonl", [{"prompt": PROMPTS[1]["prompt"]}])
    a = f"{tmp_path}/a.jsonl"
    with pytest.raises(UserError, match="--eval .*a.jsonl: the file is given twice"):
        flags.check_run(config(world, tmp_path / "run", eval=(a, f"{tmp_path}/./a.jsonl")))
    with pytest.raises(UserError, match="from Python give a tuple"):
        flags.check_run(config(world, tmp_path / "run", eval=a))
    with pytest.warns(UserWarning) as said:
        prompts.questions(config(world, "", eval=(a, f"{tmp_path}/b.jsonl")))
    texts = [str(warning.message) for warning in said]
    assert f"--eval {tmp_path}/b.jsonl has no answers: it is in no accuracy" in texts
    assert "--eval: 1 of 3 prompts stand in another file, too, and count in both" in texts


def test_held_out_prompts_are_never_trained_on(world, tmp_path):
    """Without --eval a fifth is set apart, even if lines repeat; what --eval has is left out."""
    twice = tmp_path / "twice.jsonl"
    write_lines(twice, PROMPTS + PROMPTS)
    with pytest.warns(UserWarning, match="10 "):
        train, _, held_out = prompts.questions(config(world, "", prompts=str(twice)))
    learned = {row["prompt"] for row in train}
    assert len(train) == 8
    assert len(held_out) == 2
    assert not learned & {row["prompt"] for row in held_out}
    with pytest.raises(UserError, match="no prompt is left"):
        prompts.questions(config(world, "", eval=(f"{world}/prompts.jsonl",)))


def test_a_preset_gives_way_to_a_flag():
    """--preset toy --lr 1 is the toy's settings with another learning rate."""
    cfg = parse_opd(["--student", "s/s", "--teacher", "t/t", "--preset", "toy", "--lr", "1"])
    assert cfg.lr == 1.0
    assert cfg.batch_size == PRESETS["toy"]["batch_size"]


@pytest.mark.parametrize("name", ["", *PRESETS])
def test_every_preset_measures_as_the_paper_does(name):
    """That is at T .7 and top-p .95, for accuracy and for the teacher's answers (A.2, C.1)."""
    cfg = Config(**PRESETS.get(name, {}))
    assert (cfg.eval_temperature, cfg.eval_top_p) == (0.7, 0.95)
    assert (cfg.cold_start_temperature, cfg.cold_start_top_p) == (0.7, 0.95)
    if name == "paper":
        assert (cfg.template, cfg.eval_template) == ("answer", "boxed")
