"""opd.py as its user sees it: flags, files, and a loop whose result depends on nothing that it should not."""

import dataclasses
import json

import pytest
import torch
from conftest import WORDS, Killed, tiny, word_tokenizer
from transformers import AutoModelForCausalLM

import opd
from plumbing import measure, prompts, show
from plumbing.flags import PRESETS, check_run, parse_opd
from plumbing.processes import batch
from plumbing.run import Run
from teacher import Pair

PROMPTS = [
    {"prompt": " ".join(words), "answer": answer}
    for words, answer in [
        (["add", "3"], "3"),
        (["add", "3", "7"], "0"),
        (["add"], "7"),
        (["the", "digits", "7"], "7"),
        (["so"], "0"),
        (["add", "the", "digits"], "3"),
        (["7", "+", "3", "="], "0"),
        (["3", "="], "3"),
        (["the"], "7"),
        (["add", "0"], "0"),
    ]
]
METRICS = """step loss reverse_kl overlap_ratio overlap_mass_student overlap_mass_teacher overlap_token_advantage
    entropy_gap largest_gap entropy_student entropy_teacher reward response_length truncated_fraction
    repetition_fraction grad_norm lr tokens time_rollout time_update peak_memory_bytes""".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Checkpoint directories NAME-SEED of tiny models, and prompts.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    (folder / "bare.jsonl").write_text(
        "\n".join(json.dumps({"prompt": row["prompt"]}) for row in PROMPTS)
    )
    for name, model in {
        "student": tiny("llama", seed=0, vocab_size=len(WORDS)),
        "teacher": tiny("llama", seed=1, vocab_size=len(WORDS) + 8, hidden=48, layers=3),
        "gpt2": tiny("gpt2", seed=2, vocab_size=len(WORDS) + 3),
        "gemma3": tiny("gemma3", seed=3, vocab_size=len(WORDS)),
        "qwen3": tiny("qwen3", seed=4, vocab_size=len(WORDS) + 1),
    }.items():
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    return folder


def config(world, out, **change):
    return opd.Config(
        **{
            **dict(
                student=f"{world}/student",
                teacher=f"{world}/teacher",
                prompts=f"{world}/prompts.jsonl",
                out=str(out),
                steps=4,
                batch_size=3,
                n=2,
                device="cpu",
                max_new_tokens=6,
                k=4,
                lr=1e-3,
                eval_n=1,
                save_every=2,
            ),
            **change,
        }
    )


def rows(out):
    """metrics.jsonl without what a clock or the operating system decides."""
    return [
        {name: x for name, x in json.loads(line).items() if not name.startswith(("time_", "peak_"))}
        for line in (out / "metrics.jsonl").read_text().splitlines()
    ]


def weights(out):
    return AutoModelForCausalLM.from_pretrained(out / "student").state_dict()


def ready(cfg):
    """What a run has when its loop begins: -> its Config, Pair, prompts and held-out prompts (rows of Pair.encode)."""
    pair = Run(check_run(cfg)).load_pair()
    train, _, held_out = (prompts.encode_for(cfg, pair, rows) for rows in prompts.questions(cfg))
    return cfg, pair, train, held_out


def written(cfg, pair, rows, n, seed=0):
    return pair.write(
        [row["ids"] for row in rows],
        n=n,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        seed=seed,
    )


def measured(cfg, pair, r, learn=False):
    """Loss and metrics of a rollout, as opd.update has them; learn: the gradient of the mean loss is left, too."""
    grid = pair.grade(
        r,
        opd.per_position(cfg),
        scale=1 / r.is_response.sum() if learn else None,
        temperature=cfg.temperature,
        teacher_temperature=cfg.teacher_temperature,
    )
    return measure.means(grid, r, cfg.max_new_tokens)


def updates(cfg, steps):
    """The rows of the first steps of a run, without its folder."""
    _, pair, train, _ = ready(cfg)
    optimizer = opd.adamw(cfg, pair.student)
    chosen = [
        [train[i] for i in batch(len(train), step, cfg.batch_size, cfg.seed)]
        for step in range(steps)
    ]
    return [opd.update(cfg, pair, optimizer, rows, step)[1] for step, rows in enumerate(chosen)]


def test_a_run_leaves_the_files_and_metrics_that_it_promises(world, tmp_path):
    """config, metrics, rollouts, checkpoint, student and result: each there,
    each metric finite and named as documented.
    """
    out = tmp_path / "run"
    result = opd.distil(config(world, out))
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "rollouts.jsonl",
        "checkpoint",
        "student",
        "result.json",
    }
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == [1, 2, 3, 4] and set(METRICS) <= logged[0].keys()
    assert all(torch.isfinite(torch.tensor(float(row[name]))) for row in logged for name in METRICS)
    assert json.loads((out / "result.json").read_text()) == result
    assert {
        "accuracy_before",
        "accuracy_after",
        "accuracy_teacher",
        "gap_recovery",
        "steps",
        "seconds",
        "command",
        "commit",
    } <= result.keys()
    assert result["accuracy_after"]["samples"] == 2  # a fifth of ten prompts, once each


def test_k_steps_a_stop_and_the_rest_equal_all_steps_bit_for_bit(world, tmp_path, monkeypatch):
    """verl#5725, entrenar#294: a run that was killed between checkpoints and resumed is the run that was not."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    opd.distil(config(world, whole, steps=5))
    plain = opd.update

    def dies(cfg, pair, optimizer, rows, step):
        if step == 3:
            raise Killed
        return plain(cfg, pair, optimizer, rows, step)

    monkeypatch.setattr(opd, "update", dies)
    with pytest.raises(Killed):
        opd.distil(config(world, cut, steps=5))
    assert len(rows(cut)) == 3 and not (cut / "result.json").exists()
    monkeypatch.setattr(opd, "update", plain)
    opd.distil(config(world, cut, steps=5, resume=True))
    assert rows(cut) == rows(whole)
    assert (cut / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resume_refuses_another_configuration(world, tmp_path):
    """What a checkpoint was made with and what is asked for must agree, or it is not the same run."""
    opd.distil(config(world, tmp_path, steps=2))
    (tmp_path / "result.json").unlink()
    with pytest.raises(ValueError, match="--k 4"):
        opd.distil(config(world, tmp_path, k=5, resume=True))
    with pytest.raises(ValueError, match="add --resume"):
        opd.Run(config(world, tmp_path))


@pytest.mark.parametrize(
    "student, teacher",
    [
        ("gpt2", "teacher"),
        ("gemma3", "gpt2"),
        ("qwen3", "gemma3"),
        ("student", "qwen3"),
    ],
)
def test_any_architecture_learns_from_any_other(world, tmp_path, student, teacher):
    """Other families, hidden sizes, depths and padded vocabularies: what is scored is what was sampled, at every step
    (Qwen3#1799), and the KL falls.
    """
    out = tmp_path / "run"
    opd.distil(
        config(
            world,
            out,
            student=f"{world}/{student}",
            teacher=f"{world}/{teacher}",
            steps=12,
            batch_size=8,
            lr=3e-3,
        )
    )
    assert max(row["sampling_mismatch"] for row in rows(out)) < 1e-4
    kl = [row["reverse_kl"] for row in rows(out)]  # of 16 responses each; held out there are two
    assert sum(kl[-3:]) < sum(kl[:3])


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
    """trl#6006, #4719: one denominator a step; a budget of one row and a budget for all give
    the same loss and gradient.
    """
    gradients = []
    for budget in (1, 10_000):
        cfg, pair, train, _ = ready(
            config(
                world,
                tmp_path / str(budget),
                micro_batch_tokens=budget,
                objective=objective,
                support=support,
            )
        )
        found = measured(cfg, pair, written(cfg, pair, train, 2), learn=True)
        gradients.append((found["loss"], [p.grad for p in pair.student.parameters()]))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    for a, b in zip(gradients[0][1], gradients[1][1]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_update_descends_the_mean_over_all_tokens_of_the_step(world, tmp_path):
    """easydistill#16, trl#4105: the gradient is that of the plain mean of Eq. 4 over every response token,
    written out eagerly.
    """
    cfg, pair, train, _ = ready(config(world, tmp_path / "run", objective="full"))
    r = written(cfg, pair, train, 1)
    measured(cfg, pair, r, learn=True)
    ours = {name: p.grad.clone() for name, p in pair.student.named_parameters()}
    pair.student.zero_grad()
    losses = []
    for row in range(len(r.ids)):
        ids = r.ids[row][r.attention_mask[row]].unsqueeze(0)  # (1, L) no padding at all
        first = ids.size(1) - int(r.response_mask[row].sum())
        log_p, log_q = (
            m(input_ids=ids).logits[0, first - 1 : -1, : pair.ending["vocab_size"]].log_softmax(-1)
            for m in (pair.student, pair.teacher)
        )
        losses.append((log_p.exp() * (log_p - log_q)).sum(-1))
    torch.cat(losses).mean().backward()
    for name, p in pair.student.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-6)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(world, tmp_path):
    """Distances exactly 0, overlap 1, no gradient, and no gap to recover; trl#6480: else they are above 0."""
    cfg, pair, train, _ = ready(config(world, tmp_path / "same", teacher=f"{world}/student"))
    found = measured(cfg, pair, written(cfg, pair, train, 1), learn=True)
    assert max(p.grad.abs().max().item() for p in pair.student.parameters()) < 1e-6
    assert (
        found["loss"] == found["reverse_kl"] == found["entropy_gap"] == found["reward"] == 0
        and found["overlap_ratio"] == 1
    )
    cfg, pair, _, held_out = ready(config(world, tmp_path / "other"))
    assert measure.distance(cfg, pair, held_out, opd.per_position(cfg))["reverse_kl"] > 0.01


def test_a_sampling_temperature_scales_student_and_score_alike(world, tmp_path):
    """trl GKD, #6526: at temperature .5 the recorded log-probabilities are those that are scored;
    the teacher keeps its own.
    """
    cfg, pair, train, _ = ready(
        config(world, tmp_path / "cool", temperature=0.5, teacher_temperature=2.0)
    )
    r = written(cfg, pair, train, 2)
    cool, warm = (
        measured(cfg, pair, r),
        measured(dataclasses.replace(cfg, temperature=1.0), pair, r),
    )
    assert cool["sampling_mismatch"] < 1e-4 < warm["sampling_mismatch"]
    assert cool["entropy_teacher"] == warm["entropy_teacher"] > cool["entropy_student"]


def test_a_teacher_of_fewer_bits_grades_about_alike(world, tmp_path):
    """--teacher-dtype bfloat16 halves the teacher's memory; student and losses stay float32, and the KL moves by a
    rounding of the teacher's logits."""
    rows = []
    for dtype in ("", "bfloat16"):
        cfg = config(world, tmp_path / (dtype or "same"), teacher_dtype=dtype, steps=1)
        pair = ready(cfg)[1]
        assert {p.dtype for p in pair.teacher.parameters()} == {getattr(torch, dtype or "float32")}
        assert {p.dtype for p in pair.student.parameters()} == {torch.float32}
        rows += updates(cfg, 1)
    assert rows[1]["loss"] != rows[0]["loss"] and rows[1]["reverse_kl"] == pytest.approx(
        rows[0]["reverse_kl"], rel=0.1
    )


def test_bfloat16_computes_over_float32_master_weights(world, tmp_path):
    """At lr 1e-6 most of an update would be lost in bfloat16: weights and optimizer state stay float32,
    the teacher does not.
    """
    cfg = config(world, tmp_path / "run", dtype="bfloat16", lr=1e-6, steps=2)
    pair = ready(cfg)[1]
    assert {p.dtype for p in pair.student.parameters()} == {torch.float32} and {
        p.dtype for p in pair.teacher.parameters()
    } == {torch.bfloat16}
    opd.distil(cfg)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert all(x["exp_avg"].dtype == torch.float32 for x in state["optimizer"]["state"].values())
    moved = [
        (new != old).float().mean().item()
        for new, old in zip(after.parameters(), pair.student.parameters())
        if old.abs().max() < 1
    ]
    assert min(moved) > 0.3  # in bfloat16 a step of 1e-6 would leave weights of .3 where they were


def test_without_answers_there_is_no_accuracy(world, tmp_path):
    """trl#6478: prompt-only rows train; what was not measured is null, not 0."""
    result = opd.distil(config(world, tmp_path / "run", prompts=f"{world}/bare.jsonl", steps=1))
    assert result["accuracy_before"] is result["accuracy_after"] is result["gap_recovery"] is None
    assert "accuracy" not in show.summary(result) and result["held_out_after"]["reverse_kl"] > 0


def test_the_saved_student_is_the_trained_one_and_ends_where_it_learned_to(world, tmp_path):
    """student/ loads anywhere: same weights as the checkpoint, its tokenizer beside it,
    the eos set of the rollouts in its config.
    """
    opd.distil(config(world, tmp_path / "run", steps=2))
    trained = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["student"]
    assert all(torch.equal(x, trained[name]) for name, x in weights(tmp_path / "run").items())
    assert AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "student"
    ).generation_config.eos_token_id == [2]


def test_held_out_prompts_are_never_trained_on(world):
    """Without --eval a fifth is set apart; with it, what stands in both is only measured."""
    train, _, held_out = prompts.questions(config(world, ""))
    assert (
        len(train) == 8
        and len(held_out) == 2
        and not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    )
    with pytest.raises(ValueError, match="no prompt is left"):
        prompts.questions(config(world, "", eval=f"{world}/prompts.jsonl"))


def test_every_epoch_takes_every_prompt_once_in_an_order_of_its_own():
    """verl#5725: the batches of a step depend on step and seed alone, across the borders of epochs too."""
    endless = [i for step in range(21) for i in batch(7, step, 3, seed=1)]
    epochs = [endless[i : i + 7] for i in range(0, 63, 7)]
    assert (
        all(sorted(epoch) == list(range(7)) for epoch in epochs)
        and len({tuple(epoch) for epoch in epochs}) > 5
    )
    assert batch(7, 5, 3, seed=1) == endless[15:18] and batch(7, 5, 3, seed=2) != endless[15:18]


def test_the_metrics_do_not_depend_on_what_the_padding_holds(world, tmp_path):
    """nano-opd, optipfair#34: diagnostics averaged over padding rank methods wrongly."""
    cfg, pair, train, _ = ready(config(world, tmp_path / "run"))
    r = written(cfg, pair, train, 2)
    before = measured(cfg, pair, r)
    r.ids = torch.where(r.attention_mask, r.ids, 5)
    assert measured(cfg, pair, r) == before
    assert before["tokens"] == int(r.response_mask.sum())


def test_a_run_ends_well_where_the_base_model_has_an_unsavable_generation_config(world, tmp_path):
    """Some checkpoints hold a temperature without do_sample, which loads and cannot be saved:
    the student gets a new one.
    """
    student = AutoModelForCausalLM.from_pretrained(world / "student")
    student.save_pretrained(tmp_path / "student")
    word_tokenizer().save_pretrained(tmp_path / "student")
    (tmp_path / "student" / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2]})
    )
    opd.distil(config(world, tmp_path / "run", student=str(tmp_path / "student"), steps=1))
    assert (tmp_path / "run" / "result.json").exists()


def test_a_prompt_that_stands_twice_is_on_one_side_only(world, tmp_path):
    """Repeated lines must not carry held-out prompts into training."""
    twice = tmp_path / "twice.jsonl"
    twice.write_text("\n".join(map(json.dumps, PROMPTS + PROMPTS)))
    train, _, held_out = prompts.questions(config(world, "", prompts=str(twice)))
    assert (
        len(train) == 8
        and len(held_out) == 2
        and not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    )


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--stepz", "3"], "did you mean --steps"),
        (["--steps", "0"], "--steps 0"),
        (["--steps", "many"], "--steps"),
        (["--objective", "mse"], "--objective"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--lr", "-1"], "--lr -1.0"),
        (["--template", "latex"], "latex"),
        (["--eval-top-p", "0"], "--eval-top-p"),
        (["--in-flight", "-1"], "--in-flight -1"),
        (["--micro-batch-tokens", "-5"], "--micro-batch-tokens -5"),
        (["--teacher", ""], "--teacher is missing"),
        (["--device", "gpu"], "--device gpu"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_model_is_loaded(
    flags, says, capsys, tmp_path, monkeypatch
):
    """prime-rl#1458: an unknown or impossible flag is an error: exit code 2,
    one line with the flag, no directory left behind.
    """
    monkeypatch.setattr(Pair, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        opd.main(["--student", "s", "--teacher", "t", "--out", str(tmp_path / "run"), *flags])
    printed = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and says in printed
        and printed.count("\n") == 1
        and not (tmp_path / "run").exists()
    )


def test_micro_batches_and_rows_in_flight_change_nothing_but_memory(world, tmp_path, monkeypatch):
    """A run with few tokens a micro-batch, or few responses in flight, is the same run; by default as many tokens as
    a quarter of a GiB holds."""
    rows, plain, sizes = [], Pair.load, []

    def load(*paths, **how):
        pair = plain(*paths, **how)
        pair.student.register_forward_pre_hook(
            lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
        )  # of rollouts
        return pair

    monkeypatch.setattr(Pair, "load", load)
    for i, change in enumerate((dict(), dict(micro_batch_tokens=20), dict(in_flight=3))):
        cfg = config(world, tmp_path / str(i), steps=2, n=3, **change)
        if not change:
            pair = ready(cfg)[1]
            H, layers = pair.student.config.hidden_size, pair.student.config.num_hidden_layers
            assert pair.micro_batch_tokens == 2**28 // (68 * H * layers)
        sizes.clear()
        rows.append(updates(cfg, 2))
        assert (max(sizes) <= 3) == ("in_flight" in change)
    for other in rows[1:]:
        for a, b in zip(rows[0], other):
            for name in ("loss", "reverse_kl", "grad_norm", "tokens", "overlap_ratio"):
                assert a[name] == pytest.approx(b[name], rel=1e-3), name


def test_a_preset_gives_way_to_a_flag():
    """--preset toy --lr 1 is the toy's settings with another learning rate."""
    cfg = parse_opd(["--student", "s", "--teacher", "t", "--preset", "toy", "--lr", "1"])
    assert (cfg.lr, cfg.batch_size) == (1.0, PRESETS["toy"]["batch_size"])


def test_the_questions_without_a_file_have_their_answers():
    """Any pair of hub models runs at once: additions, each with the sum as its answer."""
    for row in prompts.additions(50):
        a, b = [int(word.strip("?")) for word in row["prompt"].split() if word.strip("?").isdigit()]
        assert row["answer"] == str(a + b)


def test_a_finished_run_goes_on_with_more_steps(world, tmp_path):
    """Four steps and two more are six; without more steps, and without --resume, nothing is touched."""
    out, straight = tmp_path / "run", tmp_path / "straight"
    opd.distil(config(world, out))
    left = (out / "result.json").read_bytes()
    for change in (dict(resume=True), dict(steps=6)):
        with pytest.raises(ValueError, match="complete; .*--resume it with more --steps"):
            opd.Run(config(world, out, **change))
    assert (out / "result.json").read_bytes() == left
    result = opd.distil(config(world, out, steps=6, resume=True))
    opd.distil(config(world, straight, steps=6))
    assert result["steps"] == 6 and rows(out) == rows(straight)
    assert all(torch.equal(x, weights(straight)[name]) for name, x in weights(out).items())
