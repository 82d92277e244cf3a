"""plumbing/exits.py: how a command ends.

What a user can mend is one line on stderr, and an exit code:

2             it cannot work as asked: flags, files, models (teacher.UserError)
1             it began, and cannot go on: disk, memory, numbers that are not finite (RunEnded)
128 + signal  it was stopped: 130 by Ctrl-C, 143 by SIGTERM, 129 by a lost terminal (Stopped)

Every other exception is a fault of the program and keeps its traceback.
"""

import contextlib
import logging
import sys
import warnings

import torch
import transformers

from teacher import UserError

# PyTorch has an exception of its own for a GPU's memory. If a CPU's memory is full, or a library of
# CUDA finds none, only the words of a RuntimeError tell.
WORDS_FOR_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class RunEnded(UserError):
    """A run has begun and cannot go on."""

    code = 1


class Stopped(Exception):
    """A signal has stopped the run, and its checkpoint is saved."""

    def __init__(self, message, signum):
        super().__init__(message)
        self.code = 128 + signum


def is_out_of_memory(error):
    """Was this exception raised for lack of memory, on a GPU or a CPU? -> bool."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in WORDS_FOR_OUT_OF_MEMORY)


@contextlib.contextmanager
def one_line(program):
    """Inside, what a user can mend ends the program with one line on stderr and an exit code.

    The notes of an exception are added to the line: a run notes its checkpoint. Warnings are shown,
    also those of transformers while it loads a model. program: the name that begins the line.
    """
    warnings.formatwarning = format_warning
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its five tries to connect
    try:
        yield
    except (UserError, Stopped) as error:
        leave(program, error.code, str(error), error)
    except KeyboardInterrupt as error:
        leave(program, 130, "stopped", error)
    except BrokenPipeError as error:
        leave(program, 1, "nobody reads what it prints", error)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        leave(program, 1, OUT_OF_MEMORY, error)


OUT_OF_MEMORY = (
    "out of memory; lower --micro-batch-tokens, --in-flight or --max-new-tokens, "
    "or take --dtype bfloat16"
)


def format_warning(message, *_):
    """A warning as one line, without file and code."""
    return f"warning: {message}\n"


def leave(program, code, message, error):
    """Print one line, the message and the notes of the error, and exit with the code."""
    parts = [message, *getattr(error, "__notes__", [])]
    line = " ".join("; ".join(parts).split())
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"{program}: {line}", file=sys.stderr)
    sys.exit(code)
