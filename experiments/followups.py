"""experiments/followups.py: what later papers say of on-policy distillation, and ends that differ.
Toy models.

    arm            student <- teacher; 100 steps
    success        4,096 prompts, responses of 96 tokens at most, both end with the same token
    16 prompts; 1 prompt     the first 16 prompts, or the first alone; as many responses a step
                   (2609.04172)
    10 tokens      responses of 10 tokens, the first 30 % of a solution (2606.22600)
    reverse by student; forward by student; reverse by teacher; forward by teacher
                   the direction of the KL over the whole vocabulary, and who writes (2609.35259)
    unlike ends    the teacher ends with another token; all ends count as one token, as is our
                   default (2609.20511 does so, too)
    own ends       the same teacher, compared token by token (--ends own), as in the authors' code

Criteria, fixed before the runs ("surely": by more than noise, and .05; lab.py).
    one prompt     1 prompt gains .72 or more of what success gains at T .7, in every seed
    16 prompts     it ends equal to success at T .7
    first 30 %     10 tokens gains .8 or more of what success gains at T .7, in every seed
    direction      forward by teacher ends equal to forward by student, at T .7 and greedily
    prefix         reverse by teacher ends surely below reverse by student, at T .7 and greedily
    trap           after the first slip of the student's response the KL is at most half of what it
                   is at the slip, and a teacher that goes on from there is right less than .1 of
                   the time, in every seed (2606.09471)
    unlike ends    it ends equal to success, at T .7 and greedily
    own ends       at T .7 it ends .3 or more below where it began, in every seed (ours: the paper's
                   own pairs with unlike ends improve)

    python experiments/followups.py              results/followups.{txt,svg}
    python experiments/followups.py --quick      a few steps: does it run?
"""

import lab
import own_loop
import phenomenology
import plot
import toy
from lab import (
    Arm,
    arm,
    below,
    both,
    difference,
    each,
    equal,
    every_seed,
    finding,
    gain,
    reaches,
    share,
)
from transformers import AutoTokenizer

from analysis import diagnose
from plumbing.answers import answered
from teacher import grade

ARMS = {
    "success": phenomenology.ARMS["success"],
    "16 prompts": arm("student", "teacher", prompts="16-prompts.jsonl"),
    "1 prompt": arm("student", "teacher", prompts="1-prompts.jsonl"),
    "10 tokens": arm("student", "teacher", max_new_tokens=10),
    "reverse by student": Arm("student", "teacher", train=own_loop.reverse_by_student),
    "forward by student": Arm("student", "teacher", train=own_loop.forward_by_student),
    "reverse by teacher": Arm("student", "teacher", train=own_loop.reverse_by_teacher),
    "forward by teacher": Arm("student", "teacher", train=own_loop.forward_by_teacher),
    "unlike ends": arm("student", "teacher-unk"),
    "own ends": arm("student", "teacher-unk", ends="own"),
}


def prepare(lab):
    """Write the first prompts into files, and make the teacher that ends with <unk>."""
    lab.model("teacher")
    lines = (lab.world / "prompts.jsonl").read_text().splitlines(keepends=True)
    for count in (16, 1):
        (lab.world / f"{count}-prompts.jsonl").write_text("".join(lines[:count]))
    folder = lab.world / "teacher-unk"
    if toy.is_made(folder):
        return
    teacher = toy.read_model(lab.world / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(lab.world / "teacher")
    ends = [toy.ID["<eos>"], toy.ID["<unk>"]]
    for weight in (teacher.get_input_embeddings().weight, teacher.get_output_embeddings().weight):
        weight.data[ends] = weight.data[ends[::-1]]
    teacher.config.eos_token_id = teacher.generation_config.eos_token_id = ends[1]
    tokenizer.eos_token = "<unk>"
    toy.save_whole(folder, teacher, tokenizer)


def trap(lab, prompts, student="student", teacher="teacher"):
    """2606.09471: the KL before, at and after the first slip of the student's responses.

    -> {"before", "at", "after": mean reverse KL, nats; "saved": how often the teacher is right if
    it goes on behind the slip; "slips": how many there were}
    """
    pair = lab.load(student, teacher)
    rows = lab.rows(pair, 16 if lab.quick else prompts)
    r = lab.write(pair, rows, "trap")

    def per_position(log_p, log_q, y):
        return {"kl": diagnose(log_p, log_q, y, 16)["reverse_kl"]}

    kl = grade(pair, r, per_position)["kl"]  # (B, T)
    parts = {"before": [], "at": [], "after": []}
    slipped = []
    starts = []
    for i, row in enumerate(rows):
        response = r.response_ids(i)
        at = lab.first_slip(pair, row, response)
        if at is None or at == len(response):  # right, or just cut off
            continue
        parts["before"] += kl[i, :at].tolist()
        parts["at"].append(kl[i, at].item())
        parts["after"] += kl[i, at + 1 : len(response)].tolist()
        slipped.append(row)
        starts.append(response[: at + 1])
    means = {name: sum(values) / max(1, len(values)) for name, values in parts.items()}
    saved, _ = answered(
        pair,
        slipped,
        model=pair.teacher,
        starts=starts,
        max_new_tokens=lab.new_tokens,
        seed=lab.seed,
        **toy.WAYS["T .7"],
    )
    return {**means, "saved": saved.double().mean().item(), "slips": len(slipped)}


PROBES = {"trap": (trap, {"prompts": 1024})}


def judge(runs):
    """Judge by the criteria above: list of Finding."""
    return [*with_less(runs), *direction(runs), *trapped(runs), *ends(runs)]


def with_less(runs):
    """Do fewer prompts, or fewer tokens, give as much?"""
    success = runs["success"]

    def shares(name):
        return [
            share(gain([a], "T .7").mean, gain([b], "T .7").mean)
            for a, b in zip(runs[name], success)
        ]

    yield finding(
        "2609.04172",
        "one prompt gives most of the gain",
        ".87 of it at step 300, .72 at 1,000",
        f"{each(shares('1 prompt'))} of the gain at T .7",
        reaches(shares("1 prompt"), 0.72),
    )
    off = difference(runs["16 prompts"], success, "T .7")
    yield finding(
        "2609.04172",
        "sixteen diverse prompts give as much as all",
        "so",
        f"{off} at T .7; {each(shares('16 prompts'))} of the gain",
        equal(off),
    )
    yield finding(
        "2606.22600",
        "the first 30 % of the tokens give nearly all",
        "so",
        f"{each(shares('10 tokens'))} of the gain at T .7",
        reaches(shares("10 tokens"), 0.8),
    )


def direction(runs):
    """Does the direction of the KL matter, or who writes?"""
    forward = [runs["forward by teacher"], runs["forward by student"]]
    reverse = [runs["reverse by teacher"], runs["reverse by student"]]
    offs = both(*forward)
    yield finding(
        "2609.35259",
        "forward KL learns alike on the student's and the teacher's responses",
        "so",
        f"the teacher's: {offs[0]} at T .7, {offs[1]} greedily, "
        f"{difference(*forward, 'T 1')} at T 1",
        *map(equal, offs),
    )
    offs = both(*reverse)
    yield finding(
        "2609.35259",
        "reverse KL needs the student's responses",
        "so",
        f"the teacher's: {offs[0]} at T .7, {offs[1]} greedily, "
        f"{difference(*reverse, 'T 1')} at T 1; of the student's, reverse KL ends "
        f"{difference(reverse[1], forward[1], 'T 1')} from forward at T 1",
        *map(below, offs),
    )


def trapped(runs):
    """Is anything taught after a mistake?"""
    yield agreement(runs["trap"])


def agreement(traps):
    """What `trap` found, one a seed: -> Finding."""
    return finding(
        "2606.09471",
        "after a mistake that cannot be mended the teacher agrees",
        "low KL there, and nothing is taught",
        f"KL before, at and after the first slip: "
        f"{'; '.join(each((x[part] for part in ('before', 'at', 'after'))) for x in traps)}; the "
        f"teacher who goes on is right {each(x['saved'] for x in traps)} of the time",
        every_seed(x["after"] <= x["at"] / 2 and x["saved"] < 0.1 for x in traps),
    )


def ends(runs):
    """Do end tokens that differ do harm?"""
    offs = both(runs["unlike ends"], runs["success"])
    yield finding(
        "ours",
        "two models with different end tokens: no harm if all ends count as one",
        "2609.20511 treats them so, too",
        f"{offs[0]} at T .7, {offs[1]} greedily",
        *map(equal, offs),
    )
    lost = [gain([run], "T .7").mean for run in runs["own ends"]]
    yield finding(
        "ours",
        "compared token by token, these ends ruin the student",
        "not so in its own runs with unlike ends",
        f"{each(lost)} at T .7",
        every_seed(x <= -0.3 for x in lost),
    )


if __name__ == "__main__":
    lab.main(__doc__, ARMS, judge, probes=PROBES, prepare=prepare, draw=plot.followups)
