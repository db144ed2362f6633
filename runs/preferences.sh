#!/usr/bin/env bash
# Pairs/s and peak memory of dpo.py and reward.py beside trl's DPOTrainer and RewardTrainer, in turn on this machine.
#   bash runs/preferences.sh path/to/ultrafeedback/train_clean.jsonl.gz [rounds]      (about 5 minutes a round)
requirements="requirements.txt requirements-test.txt"
source "$(dirname "$0")/setup.sh"
exec python runs/preferences.py all "$@"
