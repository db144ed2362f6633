#!/usr/bin/env bash
# Tokens/s of generation beside nanoGPT, transformers and train-llm-from-scratch (FK), in turn on this machine: 512 new tokens
# for 1 and 32 rows, then 512 ragged GSM8K prompts of 64 new tokens each. Peers without a path are left out.
#   bash runs/generate.sh path/to/gsm8k/train.jsonl.gz path/to/nanoGPT path/to/train-llm-from-scratch     (about 10 minutes)
requirements="requirements.txt requirements-test.txt"
source "$(dirname "$0")/setup.sh"
exec python runs/generate.py all "$@"
