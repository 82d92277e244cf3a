"""experiments/tour.py: the paper in eight stops, some eight minutes on one core. Each prints what
the paper claims, the command that asks, the numbers that come back, and the lines to read.

    python experiments/tour.py                 all stops
    python experiments/tour.py 4 6 7           some of them

Models that are missing in runs/toy are made first. A command is printed as it is run. What it
leaves is kept in runs/tour, and a stop whose result is there is not run again.

The tour shows the claims on one seed and in short runs, and proves none of them. What was measured
with care is in experiments/README.md.
"""

import argparse
import contextlib
import inspect
import io
import shlex
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy  # noqa: E402

import analysis  # noqa: E402
import loss  # noqa: E402
import opd  # noqa: E402
import recipes  # noqa: E402
import rollout  # noqa: E402
import teacher as grading  # noqa: E402
from plumbing import files, models, prompts, show, slots  # noqa: E402
from plumbing.exits import one_line  # noqa: E402
from rollout import seed_of  # noqa: E402
from teacher import UserError  # noqa: E402

TEACHERS = {
    "teacher": "knows more, and writes alike",
    "sharp": "samples more sharply, knows no more",
    "other": "knows as much, but adds from the last digit to the first",
}


STAGES = {"before": "", "cold_start": " (after the cold start)", "after": ""}


class Tour:
    """The toy's models, and the commands of a stop. steps: of a run; count: prompts."""

    def __init__(self, folder, out, steps, count):
        self.folder = folder
        self.out = Path(out)
        self.steps = steps
        self.count = count
        self.commands = []  # of the present stop

    def call(self, main, words, result, config):
        """Print a command, and run it if its result is not there: -> the result, a dict.

        config: the file that names the models of the result. UserError if they are others.
        """
        command = shlex.join(["python", f"{main.__module__}.py", *words])
        if command not in self.commands:
            self.commands.append(command)
            print(f"   {command}", flush=True)
        if not result.exists():
            was_cut = config.exists()
            with contextlib.redirect_stdout(io.StringIO()):
                main([*words, "--resume"] if was_cut else words)
        student = files.read_json(config)["student"]
        if not files.same(student, f"{self.folder}/student"):
            raise UserError(f"{result} is of {student}; take another --out")
        return files.read_json(result)

    def pair_of(self, teacher):
        return ["--student", f"{self.folder}/student", "--teacher", f"{self.folder}/{teacher}"]

    def diagnosis(self, teacher):
        out = self.out / f"{teacher}-{self.count}.json"
        words = [*self.pair_of(teacher), "--prompts", f"{self.folder}/prompts.jsonl"]
        words += ["--count", str(self.count), "--out", str(out)]
        return self.call(analysis.main, words, out, out)

    def run(self, teacher, *more):
        """A run of opd.py: -> what it did, in words."""
        name = f"{teacher}-{'cold-' if more else ''}{self.steps}"
        words = ["--preset", "toy", *self.pair_of(teacher)]
        words += ["--prompts", f"{self.folder}/prompts.jsonl"]
        words += ["--eval", f"{self.folder}/eval.jsonl", "--steps", str(self.steps), *more]
        out = self.out / name
        words += ["--out", str(out)]
        result = self.call(opd.main, words, out / "result.json", out / "config.json")
        before = result["held_out_before"]
        after = result["held_out_after"]
        return (
            f"{course(result, 'accuracy')}\n{course(result, 'greedy')}\n"
            f"overlap ratio {before['overlap_ratio']:.2f} -> {after['overlap_ratio']:.2f}, "
            f"reverse KL {before['reverse_kl']:.3f} -> {after['reverse_kl']:.3f}"
        )

    def graded(self, per_position):
        """Let the student write, and grade each position: -> pair, Rollout, {name: (B, T)}."""
        student, teacher = f"{self.folder}/student", f"{self.folder}/teacher"
        pair = models.load_pair(student, teacher, device="cpu")
        rows = prompts.load_prompts(f"{self.folder}/eval.jsonl")[: self.count]
        rows = prompts.encode_rows(pair, rows, max_prompt_tokens=64, new_tokens=96)
        seeds = [seed_of(0, "tour", i) for i in range(len(rows))]
        ids = [row["ids"] for row in rows]
        r = slots.rollout(pair.student, ids, seeds=seeds, max_new_tokens=96, **pair.sampling)
        return pair, r, grading.grade(pair, r, per_position)


def course(result, name):
    """An accuracy before, after a cold start, after, and the teacher's: one line."""
    stages = []
    for when in STAGES:
        if f"{name}_{when}" in result:
            stages.append(f"{result[f'{name}_{when}']['mean']:.2f}{STAGES[when]}")
    return f"{name:8} {' -> '.join(stages)}, teacher {result[f'{name}_teacher']['mean']:.2f}"


# --- the stops: a function gives the numbers ------------------------------------------------------


def every_token(tour):
    def per_position(log_p, log_q, y):
        return {"reward": (log_q - log_p).gather(-1, y[:, None])[:, 0]}

    pair, r, grid = tour.graded(per_position)
    reward = torch.where(r.response_mask, grid["reward"], 0)
    i = int(reward.min(1).values.argmin())
    ids = r.response_ids(i)
    worst = int(reward[i].argmin())
    said = pair.tokenizer.convert_ids_to_tokens(ids)
    before = " ".join(said[max(0, worst - 4) : worst])
    return (
        f"the teacher graded the {int(r.response_mask.sum())} tokens of {len(r.ids)} responses; "
        f'it likes least "{said[worst]}" after "... {before}": {reward[i, worst]:.1f} nats'
    )


def estimators(tour):
    def per_position(log_p, log_q, y):
        return {
            "Eq. 3": loss.sampled_token(log_p, log_q, y),
            "Eq. 4": loss.full_vocab(log_p, log_q),
            "Eq. 5": loss.top_k(log_p, log_q, 16),
        }

    _, r, grid = tour.graded(per_position)
    cells = []
    for name, x in grid.items():
        x = x[r.response_mask]
        cells.append(f"{name} {x.mean():.3f} (standard deviation {x.std():.3f})")
    return "; ".join(cells) + " nats a token"


def verdicts(tour):
    lines = []
    for teacher, what in TEACHERS.items():
        report = tour.diagnosis(teacher)
        m = {name: x["mean"] for name, x in report["metrics"].items()}
        first = report["first_tokens"]["overlap_ratio"]["mean"]
        lines.append(
            f"{teacher}: {what}\n  overlap ratio {m['overlap_ratio']:.2f}, of the first "
            f"{analysis.FIRST_TOKENS} tokens {first:.2f} (our threshold: {analysis.ALIKE}); "
            f"the shared tokens hold {m['overlap_mass_student']:.2f} of the student's probability, "
            f"{m['overlap_mass_teacher']:.2f} of the teacher's\n  the teacher's greedy lead "
            f"{report['greedy']['gain']['mean']:+.2f}: {report['verdict']}"
        )
    return "\n".join(lines)


def depth(tour):
    cells = []
    for x in tour.diagnosis("teacher")["continuation"]:
        cells.append(f"{show.from_depth(x)} {x['gain']['mean']:+.2f}")
    areas = []
    for teacher in TEACHERS:
        area = tour.diagnosis(teacher)["auroc"]
        areas.append(f"{teacher} {'?' if area is None else format(area, '.2f')}")
    return (
        f"both finish the student's answers; teacher's lead: {', '.join(cells)}\n"
        f"AUROC of the mean reward (.5 is chance): {', '.join(areas)}\n"
        "of more answers: teacher .81, other .60 (experiments/README.md)"
    )


STOPS = (
    (
        "2.2  The student writes, the teacher grades every token: log q(y) - log p(y).",
        (rollout.rollout, grading.grade),
        every_token,
    ),
    (
        "2.2  One token estimates the reverse KL (Eq. 3); the whole vocabulary is exact (Eq. 4); "
        "16 tokens come close, here (Eq. 5).",
        (loss.sampled_token, loss.full_vocab, loss.top_k),
        estimators,
    ),
    (
        "3    A teacher helps if it thinks alike and knows something new. Its size and its score "
        "do not tell.",
        (analysis.overlap_ratio, analysis.overlap_mass, analysis.verdict),
        verdicts,
    ),
    (
        "4.1  Success: accuracy and overlap rise together.",
        (opd.update, opd.distil),
        lambda tour: tour.run("teacher"),
    ),
    (
        "3.2  Nothing new: to a teacher that only samples more sharply, which pays at T 1 alone, "
        "the student comes close, and learns nothing. Its greedy accuracy stays.",
        (analysis.gap_recovery,),
        lambda tour: tour.run("sharp"),
    ),
    (
        "3.1  Failure: a good teacher that works from the other end ruins the student (in the "
        "paper its student only ends lower than that of a weaker one that writes alike).",
        (analysis.diagnose,),
        lambda tour: tour.run("other"),
    ),
    (
        "5.1  A cold start, fine-tuning on the teacher's own answers, lets the same pair work.",
        (recipes.teacher_rollouts, recipes.cold_start),
        lambda tour: tour.run("other", "--cold-start", "1024", "--cold-start-steps", "100"),
    ),
    (
        "6    Dense rewards cost depth: late in a response the teacher helps less. Its mean "
        "reward ranks answers.",
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
    parser.add_argument("stops", nargs="*", type=int, default=[], help="which stops (default: all)")
    parser.add_argument("--models", default="runs/toy", help="folder of the toy models (runs/toy)")
    parser.add_argument("--out", default="runs/tour", help="folder of the results (runs/tour)")
    parser.add_argument("--steps", type=int, default=60, help="of each of the four runs")
    parser.add_argument("--count", type=int, default=64, help="prompts of a diagnosis")
    flags = parser.parse_args(argv)
    for number in flags.stops:
        if not 1 <= number <= len(STOPS):
            parser.error(f"stop {number}: there are {len(STOPS)}")
    transformers.logging.disable_progress_bar()
    if flags.count < 1:
        parser.error(f"--count {flags.count}: at least 1")
    toy.say_and_make(flags.models, ("student", *TEACHERS))
    tour = Tour(flags.models, flags.out, flags.steps, flags.count)
    for number in flags.stops or range(1, len(STOPS) + 1):
        claim, read, ask = STOPS[number - 1]
        tour.commands.clear()
        print(f"\nstop {number}, paper {claim}", flush=True)
        answer = ask(tour).replace("\n", "\n      ")
        print(f"   -> {answer}")
        print(f"   read {', '.join(map(where, read))}", flush=True)
    print(
        f"\nThe results stay in {flags.out}. To run a command by itself, give it another --out.\n"
        'Next: "Will my pair work?" in README.md'
    )


if __name__ == "__main__":
    with one_line("tour.py"):
        main()
