#!/usr/bin/env bash
# Seconds, MB/s and peak memory of preparing text: the standard library, with training the tokenizer, then N gigabytes
# made of copies of the text files given (files of their own, so that nothing is read twice from one).
#   bash runs/prepare.sh 1 path/to/text/*.jsonl.gz
requirements="requirements.txt"
source "$(dirname "$0")/setup.sh"
exec python runs/prepare.py "$@"
