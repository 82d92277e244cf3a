"""experiments/tour.py: the paper in eight stops, two minutes on one core. Each prints what the
paper claims, the call that asks, the number that comes back, and the lines to read.

    python experiments/toy.py --all            the toy models, once: some three minutes
    python experiments/tour.py                 all stops
    python experiments/tour.py 5 6 7           some of them

One seed and few prompts: it shows, and proves nothing. What was measured with care is in
experiments/README.md.
"""

import argparse
import contextlib
import inspect
import io
import tempfile
from pathlib import Path

import torch
import transformers
from lab import PRESETS, Config, encoded, load, write

import analysis
import loss
import opd
import recipes
import rollout
import teacher as grading
from plumbing import slots
from plumbing.answers import answered

TEACHERS = {
    "teacher": "post-trained, same family",
    "bigger": "larger, same pipeline",
    "other": "another family",
}


class Tour:
    """The toy's models, and what several stops ask of them. steps: of the runs; count: prompts."""

    def __init__(self, models, steps=40, count=64):
        self.models = Path(models)
        self.steps = steps
        self.count = count
        self.diagnoses = {}

    def pair(self, teacher="teacher"):
        return load(self.models / "student", self.models / teacher)

    def rows(self, pair):
        return encoded(pair, self.models / "eval.jsonl", self.count)

    def graded(self, per_position):
        """What the student wrote, each position of it graded: -> pair, Rollout, {name: (B, T)}."""
        pair = self.pair()
        r = write(pair, [row["ids"] for row in self.rows(pair)], max_new_tokens=96, seed=0)
        return pair, r, grading.grade(pair, r, per_position)

    def diagnosis(self, teacher):
        if teacher not in self.diagnoses:
            pair = self.pair(teacher)
            self.diagnoses[teacher] = analysis.diagnose_pair(
                pair,
                self.rows(pair),
                answered=answered,
                rollout=slots.rollout,
                max_new_tokens=96,
                eval_temperature=1.0,
                eval_top_p=1.0,
            )
        return self.diagnoses[teacher]

    def run(self, teacher, **settings):
        """A run of opd.py in a folder that is thrown away: -> its result, the loss of its first
        step."""
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            result = opd.distil(
                Config(
                    **{
                        **PRESETS["toy"],
                        **dict(
                            student=str(self.models / "student"),
                            teacher=str(self.models / teacher),
                            steps=self.steps,
                            prompts=str(self.models / "prompts.jsonl"),
                            eval=str(self.models / "eval.jsonl"),
                            out=f"{out}/run",
                            device="cpu",
                            batch_size=min(64, self.count),
                        ),
                        **settings,
                    }
                )
            )
        before = result["held_out_before"]
        after = result["held_out_after"]
        return (
            f"accuracy {result['accuracy_before']['mean']:.2f} -> "
            f"{result['accuracy_after']['mean']:.2f}, "
            f"teacher {result['accuracy_teacher']['mean']:.2f}; "
            f"overlap ratio {before['overlap_ratio']:.2f} -> {after['overlap_ratio']:.2f}; "
            f"reverse KL {before['reverse_kl']:.3f} -> {after['reverse_kl']:.3f}"
        )


# --- the stops: claim, call, what to read; the function gives the number --------------------------


def every_token(tour):
    pair, r, grid = tour.graded(
        lambda log_p, log_q, y: {"reward": (log_q - log_p).gather(-1, y[:, None])[:, 0]}
    )
    i = int(torch.where(r.response_mask, grid["reward"], 0).min(1).values.argmin())
    ids, rewards = r.response_ids(i), grid["reward"][i]
    worst = int(rewards[: len(ids)].argmin())
    said = pair.tokenizer.convert_ids_to_tokens(ids)
    before = " ".join(said[max(0, worst - 4) : worst])
    return (
        f"{int(r.response_mask.sum())} rewards for {len(r.ids)} responses; "
        f'the lowest, {rewards[worst]:.1f} nats, for "{said[worst]}" after "... {before}"'
    )


def estimators(tour):
    _, r, grid = tour.graded(
        lambda log_p, log_q, y: {
            "Eq. 3": loss.sampled_token(log_p, log_q, y),
            "Eq. 4": loss.full_vocab(log_p, log_q),
            "Eq. 5": loss.top_k(log_p, log_q, 16),
        }
    )
    return (
        "; ".join(
            f"{name} {x[r.response_mask].mean():.3f} (spread {x[r.response_mask].std():.3f})"
            for name, x in grid.items()
        )
        + " nats a token"
    )


def overlap(tour):
    lines = []
    for teacher, what in TEACHERS.items():
        m = {name: x["mean"] for name, x in tour.diagnosis(teacher)["metrics"].items()}
        lines.append(
            f"{what:26} ratio {m['overlap_ratio']:.2f}, masses {m['overlap_mass_student']:.2f} and "
            f"{m['overlap_mass_teacher']:.2f}, reverse KL {m['reverse_kl']:.2f}"
        )
    return "\n".join(lines)


def verdicts(tour):
    lines = []
    for teacher, what in TEACHERS.items():
        found = tour.diagnosis(teacher)
        gain = found.get("predicted_gain")
        lines.append(
            f"{what:26} predicted gain {analysis.plus_minus(gain, '+.2f') if gain else '?'}: "
            f"{found['verdict']}"
        )
    return "\n".join(lines)


def depth(tour):
    found = tour.diagnosis("teacher")
    gains = ", ".join(
        f"{x['gain']['mean']:+.2f} after {x['tokens']:.0f} tokens" for x in found["continuation"]
    )
    area = {teacher: tour.diagnosis(teacher)["auroc"] for teacher in TEACHERS}
    return f"{gains}\nAUROC of the mean reward: " + ", ".join(
        f"{TEACHERS[teacher]} {'?' if x is None else format(x, '.2f')}"
        for teacher, x in area.items()
    )


STOPS = (
    (
        "2.2  The student writes, the teacher grades every token: log q(y) - log p(y).",
        "r = rollout(pair.student, prompts, max_new_tokens=96, ...); grade(pair, r, ...)",
        (rollout.rollout, grading.grade),
        every_token,
    ),
    (
        "2.2  One token estimates the reverse KL (Eq. 3); the whole vocabulary is exact (Eq. 4); "
        "16 tokens do (Eq. 5).",
        "loss.sampled_token, loss.full_vocab, loss.top_k",
        (loss.sampled_token, loss.full_vocab, loss.top_k),
        estimators,
    ),
    (
        "4.1  Two models that think alike share the tokens that hold nearly all of the "
        "probability (Eq. 6, 9, 10).",
        "python analysis.py --student runs/toy/student --teacher ...",
        (analysis.overlap_ratio, analysis.overlap_mass),
        overlap,
    ),
    (
        "3    A teacher helps if it thinks alike and knows what is new. Its size and score do "
        "not tell.",
        "the same command",
        (analysis.verdict, analysis.continuation),
        verdicts,
    ),
    (
        "4.1  Success: accuracy and overlap rise together.",
        "python opd.py --preset toy --teacher runs/toy/teacher ...",
        (opd.update, opd.distil),
        lambda tour: tour.run("teacher"),
    ),
    (
        "3.1  Failure: from another family's teacher the same student forgets what it knew.",
        "python opd.py --preset toy --teacher runs/toy/other ...",
        (analysis.diagnose,),
        lambda tour: tour.run("other"),
    ),
    (
        "5.1  A cold start, fine-tuning on the teacher's own answers, lets the same pair work.",
        "python opd.py ... --cold-start 1024 --cold-start-steps 100",
        (recipes.teacher_rollouts, recipes.cold_start),
        lambda tour: tour.run(
            "other", cold_start=16 * tour.count, cold_start_steps=100 * tour.steps // 40
        ),
    ),
    (
        "6    Dense rewards cost depth: late in a response the teacher helps less. Its mean "
        "reward ranks answers.",
        "the command of stop 3",
        (analysis.continuation, analysis.auroc),
        depth,
    ),
)


def where(function):
    """The file and line of a function: "loss.py:41 top_k"."""
    function = inspect.unwrap(function)
    path = Path(inspect.getsourcefile(function)).name
    return f"{path}:{inspect.getsourcelines(function)[1]} {function.__qualname__}"


def main(argv=None):
    parser = argparse.ArgumentParser(description="The paper in eight stops.")
    parser.add_argument(
        "stops", nargs="*", type=int, default=[], help="which ones; all where none is named"
    )
    parser.add_argument(
        "--models", default="runs/toy", help="what experiments/toy.py --all has written"
    )
    parser.add_argument("--steps", type=int, default=40, help="of each of the three runs")
    parser.add_argument("--count", type=int, default=64, help="prompts")
    flags = parser.parse_args(argv)
    missing = [
        name
        for name in ("student", *TEACHERS)
        if not (Path(flags.models) / name / "config.json").exists()
    ]
    if missing:
        parser.error(
            f"{flags.models} has no {', '.join(missing)}: python experiments/toy.py --all --out "
            f"{flags.models} makes them"
        )
    if bad := [n for n in flags.stops if not 1 <= n <= len(STOPS)]:
        parser.error(f"stop {bad[0]}: there are {len(STOPS)}")
    transformers.logging.disable_progress_bar()
    tour = Tour(flags.models, flags.steps, flags.count)
    for number in flags.stops or range(1, len(STOPS) + 1):
        claim, call, read, ask = STOPS[number - 1]
        print(f"\n{number}  {claim}\n   {call}", flush=True)
        print("   -> " + ask(tour).replace("\n", "\n      "))
        print(f"   read {', '.join(map(where, read))}", flush=True)


if __name__ == "__main__":
    main()
