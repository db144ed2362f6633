#!/usr/bin/env bash
# LoRA of rank 8 beside full finetuning on Alpaca, from a base model pretrained on TEXT: losses and memory.
#   bash runs/lora.sh TEXT path/to/alpaca_data.jsonl.gz [PRETRAIN_SECONDS [STEPS]]      (about 5 minutes)
requirements="requirements.txt"
source "$(dirname "$0")/setup.sh"
exec python runs/lora.py "$@"
