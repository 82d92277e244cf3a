#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: the tests that need one, then what a token and a step cost there (results/gpu.txt).
# It takes what requirements.txt names; torch 2.11 or later.    bash experiments/gpu.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
"$python" -m pytest -q -m gpu -rs
"$python" experiments/bench.py --device cuda
