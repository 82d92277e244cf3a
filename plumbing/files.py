"""plumbing/files.py: JSON and JSON lines, read with care and written whole."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from plumbing.exits import RunEnded
from plumbing.processes import gathered, processes
from teacher import UserError

# --- reading ------------------------------------------------------------------------------------


def check_file(path, flag=""):
    """UserError if a file of JSON lines cannot be opened; flag: the one that named it."""
    try:
        open(path, "rb").close()
    except OSError as error:
        named = f"{flag} {path}".strip()
        raise UserError(f"{named}: {error.strerror}; give a file of JSON lines") from None


def json_lines(path):
    """The JSON values of a file, one a line: yields (line number from 1, value).

    Blank lines are left out. UserError, with file and line, for a line that is anything else.
    """
    check_file(path)
    with open(path, "rb") as lines:  # bytes: \n alone ends a line, not U+2028
        for number, line in enumerate(lines, start=1):
            encoding = "utf-8-sig" if number == 1 else "utf-8"
            try:
                text = line.decode(encoding)
            except UnicodeDecodeError:
                raise UserError(f"{path}:{number} is not UTF-8; save the file as UTF-8") from None
            if text.strip():
                value = json_value(text, f"{path}:{number}", "write one JSON object a line")
                check_characters(value, f"{path}:{number}")
                yield number, value


def json_value(text, what, remedy):
    """The value of a JSON text. UserError, from `what` and `remedy`, if Python cannot read it.

    That includes a number of 5,000 digits, and 100,000 brackets.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not JSON ({error}); {remedy}") from None


def check_characters(value, where):
    """UserError if a JSON value has half of a character, "\\ud83d", which no tokenizer reads."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise UserError(
            f"{where} has \\u{half:x}, half of a character; write the whole one, or remove it"
        ) from None


def read_json(path):
    """A dict that write_json wrote; UserError with the path if the file holds anything else."""
    remedy = "restore or remove it"
    value = json_value(Path(path).read_bytes(), path, remedy)
    if not isinstance(value, dict):
        raise UserError(f"{path} is not what was written there; {remedy}")
    return value


# --- writing ------------------------------------------------------------------------------------


def write_json(path, value):
    """Write one JSON value, whole or not at all; NaN becomes null. RunEnded, see can_write."""
    text = json.dumps(finite_or_null(value), indent=1) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def write_lines(path, rows):
    """Write a list of values as JSON lines, whole or not at all. RunEnded, see can_write."""
    lines = [json.dumps(row) + "\n" for row in rows]
    write_whole(path, lambda file: file.write("".join(lines).encode()))


def write_whole(path, write):
    """Write a file whole or not at all; write(file) fills it, a binary file.

    It is written beside `path`, flushed to the disk and renamed. So a kill, a full disk or a loss
    of permission at any moment leaves what was there before. RunEnded, see can_write.
    """
    aside = Path(f"{path}.tmp")
    with can_write(path):
        try:
            with open(aside, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def can_write(path):
    """Inside, a full disk or a lack of permission is a RunEnded that names the path."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error
        if isinstance(error, RuntimeError):  # torch.save raises one while an OSError is handled
            cause = error.__context__
        if not isinstance(cause, OSError):
            raise
        raise RunEnded(f"{path} cannot be written: {cause.strerror}") from None


def finite_or_null(x):
    """A value with None in place of each number that is not finite: JSON has none of these.

    {"loss": nan, "tokens": [3]} -> {"loss": None, "tokens": [3]}
    """
    if isinstance(x, dict):
        return {name: finite_or_null(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite_or_null(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x


# --- the teacher's answers ----------------------------------------------------------------------


def append_answers(path, batches):
    """Write what recipes.teacher_rollouts yields to a file of JSON lines: -> {why: how many}.

    batches(start) yields lists of this process's answers, {"why": ..., ...}, to the questions from
    number `start` on. A file that is there is continued, so nothing is asked twice. The first
    process writes the answers of all. UserError if a line of the file is something else, RunEnded
    if it cannot be written.
    """
    counts = {"kept": 0, "unfinished": 0, "degenerate": 0}
    is_first = processes()[0] == 0
    if is_first:
        cut_torn_line(path)
        for number, answer in json_lines(path):
            if not isinstance(answer, dict) or answer.get("why") not in counts:
                raise UserError(f"{path}:{number} is not a line of a cold start; restore the file")
            counts[answer["why"]] += 1
    counts = gathered([counts])[0]  # what the first process has found
    for mine in batches(sum(counts.values())):
        answers = gathered(mine)
        for answer in answers:
            counts[answer["why"]] += 1
        if is_first:
            append_lines(path, answers)
    gathered([None])  # the others wait until all of it is written
    return counts


def append_lines(path, rows):
    """Add values to a file of JSON lines. RunEnded, see can_write."""
    lines = [json.dumps(row) + "\n" for row in rows]
    with can_write(path), open(path, "a") as file:
        file.write("".join(lines))


def cut_torn_line(path):
    """Cut off a last line without its end, torn by a kill; make the file if it is missing."""
    with can_write(path), open(path, "a+b") as file:  # bytes: a kill may fall within a character
        file.seek(0)
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)


# --- what made a run, and who is using it --------------------------------------------------------


def digest(x):
    """A name for plain values, the same for equal ones: 64 hexadecimal digits."""
    return hashlib.sha256(repr(x).encode()).hexdigest()


def provenance():
    """What made the numbers: command line, commit, versions, threads, processes: dict.

    dirty: was the code changed since the commit? commit and dirty are None if the code is not in a
    git repository.
    """
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "command": shlex.join(sys.argv),
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "processes": processes()[1],
    }


def git(*arguments):
    """What git prints about the folder of this code; None without git or a repository."""
    if not shutil.which("git"):
        return None
    folder = str(Path(__file__).resolve().parent)
    command = ["git", "--no-optional-locks", "-C", folder, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def same(a, b):
    """Are two values of a flag the same? Two ways to write one existing path are: bool."""
    if a == b:
        return True
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    both_are_paths = isinstance(a, str) and isinstance(b, str) and os.path.exists(a)
    return both_are_paths and os.path.realpath(a) == os.path.realpath(b)


def alone(handle, path):
    """Lock an open file or folder until it is closed; UserError if another process has locked it.

    On a file system without locks nothing is locked.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"--out {path}: another process is using it; wait for it, or take another --out"
        ) from None
    except OSError:
        pass  # a file system without locks
