"""plumbing/exits.py: how a command ends. One line on stderr, and an exit code:

2    what was asked for cannot work: flags, files, models
1    it came to an end on its way: memory, disk, numbers that are not finite
128 + the signal: it was stopped (130 Ctrl-C, 143 SIGTERM, 129 a lost terminal)
"""

import contextlib
import logging
import sys
import traceback
import warnings

import torch
import transformers

# what to do where memory runs out, by the function that it ran out in; the innermost counts
ADVICE = {
    "rollout": "writing responses: lower --in-flight or --max-new-tokens (evaluating: --eval-max-new-tokens)",
    "grade": "grading: lower --micro-batch-tokens or --chunk, add --gradient-checkpointing, or lower "
    "--max-new-tokens",
    "load_pair": "loading the models: take smaller ones, --teacher-dtype bfloat16, or --teacher-device-map auto",
}


class Stopped(Exception):
    """By a signal, after what could be saved was."""

    def __init__(self, said, signum):
        super().__init__(said)
        self.code = 128 + signum


def is_out_of_memory(error):
    """PyTorch has a class for a GPU's memory, and only words for a CPU's and for that of CUDA's libraries: bool."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error)
        for words in (
            "can't allocate memory",
            "CUDA error: out of memory",
            "CUBLAS_STATUS_ALLOC_FAILED",
        )
    )


def out_of_memory(error):
    """What to say of an error of memory: what ran out of it, and which flag to change."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.name in ADVICE:
            return f"out of memory while {ADVICE[frame.name]}"
    return "out of memory; take smaller models, or --dtype bfloat16"


@contextlib.contextmanager
def one_line(program):
    """What goes wrong inside is one line on stderr and an exit code; a fault of ours keeps its traceback."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its five tries to connect
    try:
        yield
        return
    except Stopped as stop:
        code, said = stop.code, stop
    except KeyboardInterrupt:
        code, said = 130, "stopped"
    except ValueError as error:
        code, said = 2, error
    except (OSError, FloatingPointError) as error:
        code, said = 1, error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        left = getattr(error, "__notes__", [])  # what a run has to say of its checkpoint
        code, said = 1, "; ".join([out_of_memory(error), *left])
    print(f"{program}: " + " ".join(str(said).split()), file=sys.stderr)
    sys.exit(code)
