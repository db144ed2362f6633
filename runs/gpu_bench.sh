#!/usr/bin/env bash
# Every goal of docs/kernels.md on one NVIDIA GPU, in one table, in under 8 minutes.
#   bash runs/gpu_bench.sh path/to/nanoGPT path/to/nanochat      their models beside ours; without paths they are left out
# PYTHON names an interpreter whose torch has CUDA already, and nothing is installed then.
requirements="requirements.txt"
if [ -n "${PYTHON:-}" ]; then
    cd "$(dirname "$0")/.."
    exec "$PYTHON" runs/gpu_bench.py "$@"
fi
source "$(dirname "$0")/setup.sh"
exec python runs/gpu_bench.py "$@"
