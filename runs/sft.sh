#!/usr/bin/env bash
# Trained tokens/s of finetuning on Alpaca and GSM8K, packed and padded, beside trl's SFTTrainer at several settings, in
# turn on this machine; then both loss curves on the same batches.
#   bash runs/sft.sh path/to/alpaca_data.jsonl.gz path/to/gsm8k/train.jsonl.gz [rounds]     (about 6 minutes a round)
requirements="requirements.txt requirements-test.txt"
source "$(dirname "$0")/setup.sh"
exec python runs/sft.py all "$@"
