"""plumbing/files.py: JSON and JSON lines, read with care and written whole."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from plumbing.processes import gathered, processes


def check_file(path, flag=""):
    """ValueError where a file of JSON lines cannot be read, before anything expensive starts."""
    try:
        open(path, "rb").close()
    except OSError as error:
        raise ValueError(
            f"{flag} {path}: {error.strerror}; give a file of JSON lines".strip()
        ) from None


def json_lines(path):
    """The JSON values of a file, a line each, blank ones left out: yields (number of the line, value).

    Files come from elsewhere: whatever stands in them, the only exception is a ValueError that names file and line.
    """
    check_file(path)
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):  # bytes: \n alone ends a line, not U+2028
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                value = json.loads(text) if text.strip() else None
            except UnicodeDecodeError:
                raise ValueError(f"{path}:{number} is not UTF-8; save the file as UTF-8") from None
            except (
                ValueError,
                RecursionError,
            ) as error:  # a number of 5,000 digits, 1,000 brackets
                why = getattr(error, "msg", None) or str(error)
                raise ValueError(
                    f"{path}:{number} is not JSON ({why}); write one JSON object a line"
                ) from None
            if text.strip():
                yield number, value


def read_json(path):
    """What write_json wrote; ValueError with the path for anything else."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); restore or remove it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not what was written there; restore or remove it")
    return value


def write_json(path, value):
    """Whole or not at all; a list of numbers on one line."""
    text = json.dumps(finite_or_null(value), indent=1)
    text = re.sub(r'\[\n([^][{}"]*)\n *\]', lambda found: f"[{' '.join(found[1].split())}]", text)
    write_whole(path, lambda file: file.write((text + "\n").encode()))


def write_lines(path, rows):
    """JSON lines, whole or not at all."""
    write_whole(
        path, lambda file: file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
    )


def write_whole(path, write):
    """Call write with a binary file that then stands at path: written aside, to the disk, renamed. A kill, a full disk
    or a loss of permission at any moment leaves what was there before.
    """
    aside = Path(f"{path}.tmp")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        cause = (
            error.__context__ if isinstance(error, RuntimeError) else error
        )  # torch.save hides it so
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None


def finite_or_null(x):
    """JSON has no NaN, and 0 would be a lie: {"loss": nan, "tokens": [3]} -> {"loss": None, "tokens": [3]}."""
    if isinstance(x, dict):
        return {name: finite_or_null(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite_or_null(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def digest(x):
    """A name for plain values: 64 hexadecimal digits."""
    return hashlib.sha256(repr(x).encode()).hexdigest()


def provenance():
    """What made the numbers: command line, commit and whether the code was changed since (dirty), versions.

    commit and dirty are null where the code is not in a git repository.
    """

    def git(*arguments):
        if not shutil.which("git"):
            return None
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(Path(__file__).resolve().parent), *arguments],
            capture_output=True,
            text=True,
        )
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "command": " ".join(sys.argv),
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "processes": processes()[1],
    }


def same(a, b):
    """Two values of a flag the same: a path may be put another way."""
    return (
        a == b
        or isinstance(a, str)
        and os.path.exists(a)
        and os.path.realpath(a) == os.path.realpath(b)
    )


def alone(handle, path):
    """Hold an open file or folder for this process, as long as it is open; ValueError where another one holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"--out {path}: another process is at it; wait for it, or take another --out"
        ) from None
    except OSError:
        pass  # a file system without locks


def check_call(path, call):
    """ValueError where the file at path, which is to go on, was begun by another call, which <path>.call.json tells, or
    has lost what was dropped.
    """
    told, there = (
        Path(f"{path}.call.json"),
        [Path(f"{path}{end}").is_file() for end in ("", ".dropped.jsonl")],
    )
    if Path(path).is_dir():
        raise ValueError(f"--out {path}: a folder; give a file in it")
    if any(there) and not all(there):
        raise ValueError(
            f"--out {path}: of it and {path}.dropped.jsonl one is gone, and both together tell how far it "
            "had come; remove the other to begin anew, or take another --out"
        )
    if any(there):
        had = read_json(told) if told.exists() else {}
        for name, x in call.items():
            if name not in ("out", "count", "device") and not same(x, had.get(name)):
                raise ValueError(
                    f"--out {path}: what is there was not begun with this --{name.replace('_', '-')}; "
                    "give the same flags to go on, or take another --out"
                )
    write_json(told, call)


def append_answers(path, batches):
    """Write what recipes.teacher_rollouts yields: the kept conversations to path, the others, with the reason, to
    <path>.dropped.jsonl: -> {"kept", "unfinished", "degenerate"}.

    batches: start -> iterator. Both files are continued where they stop: an interrupted call asks for nothing twice.
    Of several processes the first one writes.
    """
    path, dropped, first = Path(path), Path(f"{path}.dropped.jsonl"), processes()[0] == 0
    counts = {"kept": 0, "unfinished": 0, "degenerate": 0}
    with (
        open(path if first else os.devnull, "a", encoding="utf-8") as kept,
        open(dropped if first else os.devnull, "a", encoding="utf-8") as rest,
    ):
        if first:
            alone(kept, path)
            counts["kept"] = len(whole_lines(path))
            for line in whole_lines(dropped):
                try:
                    counts[json.loads(line)["why"]] += 1
                except (ValueError, KeyError, TypeError):
                    raise ValueError(
                        f"{dropped}: {line[:60]!r} is no line of recipes.py; restore the file, or take "
                        "another --out"
                    ) from None
        counts = gathered([counts])[0]  # what the first process has found there
        for answers in batches(sum(counts.values())):
            for answer in answers:
                counts[answer["why"]] += 1
                good = answer["why"] == "kept"
                print(
                    json.dumps(
                        {"messages": answer["messages"]} if good else answer, ensure_ascii=False
                    ),
                    file=kept if good else rest,
                    flush=True,
                )
    return gathered([counts])[0]  # when all of it is written


def whole_lines(path):
    """The lines of a file; a last line without its end, torn by a kill, is cut off the file."""
    *lines, torn = path.read_bytes().split(b"\n")  # bytes: a kill may fall within a character
    if torn:
        os.truncate(path, path.stat().st_size - len(torn))
    return [line.decode() for line in lines]
