#!/usr/bin/env bash
# Seconds of evaluating HellaSwag with eval.py and with lm-evaluation-harness's hf model, in turn on this machine, with the
# figures of both. The rows are prepared ones (query, choices, gold).
#   bash runs/evaluate.sh path/to/hellaswag_sub.validation.jsonl.gz [rounds]      (about 4 minutes a round)
requirements="requirements.txt requirements-test.txt"
source "$(dirname "$0")/setup.sh"
exec python runs/evaluate.py "$@"
