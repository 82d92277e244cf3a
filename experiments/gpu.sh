#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: the tests that need one, then what a token and a step cost there
# (results/gpu.txt). It takes what requirements.txt names.
#
#     bash experiments/gpu.sh [PYTHON]            6 minutes and the tests
#     bash experiments/gpu.sh --quick [PYTHON]    tiny models on a CPU: does it run? Keeps nothing
set -euo pipefail
cd "$(dirname "$0")/.."
how=(--device cuda)
if [ "${1:-}" = --quick ]; then
    shift
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
    how=(--device cpu --quick --out "$out")
fi
python=${1:-python}
"$python" -m pytest -q -rs -m "gpu or not slow" tests/test_gpu.py
"$python" experiments/bench.py "${how[@]}"
