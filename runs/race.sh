#!/usr/bin/env bash
# The race on tinyshakespeare against nanoGPT's CPU command, in turn on this machine, and the table of docs/benchmarks.md.
#   bash runs/race.sh path/to/tinyshakespeare.txt[.gz] path/to/nanoGPT      (about half an hour on 2 quiet cores)
requirements="requirements.txt"
source "$(dirname "$0")/setup.sh"
exec python runs/race.py "$@"
