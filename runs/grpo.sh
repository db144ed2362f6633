#!/usr/bin/env bash
# Seconds a step and peak memory of GRPO on GSM8K's questions, 8 of them with 8 answers of 64 tokens each, with and
# without a reference, beside trl's GRPOTrainer at two settings, in turn on this machine.
#   bash runs/grpo.sh path/to/gsm8k/train.jsonl.gz [rounds]                             (about 12 minutes a round)
requirements="requirements.txt requirements-test.txt"
source "$(dirname "$0")/setup.sh"
exec python runs/grpo.py all "$@"
