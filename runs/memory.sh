#!/usr/bin/env bash
# Peak memory of one training step at vocabulary 50,304, beside that of the logits alone.
requirements="requirements.txt"
source "$(dirname "$0")/setup.sh"
exec python runs/memory.py
