#!/usr/bin/env bash
# MinHash beside datasketch, its memory for 1 GB of text, and its recall and precision on known pairs.
#   bash runs/dedup.sh path/to/documents.jsonl.gz      (about 5 minutes)
requirements="requirements.txt requirements-test.txt"
source "$(dirname "$0")/setup.sh"
python runs/dedup.py speed "$1"
python runs/dedup.py accuracy "$1"
exec python runs/dedup.py memory "$1" 1
