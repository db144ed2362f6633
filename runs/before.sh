#!/usr/bin/env bash
# Tokens/s and memory of training on a CPU beside an earlier commit of this repository, in turn on this machine.
#   bash runs/before.sh COMMIT path/to/tinyshakespeare.txt [rounds]                     (about 5 minutes a round)
requirements="requirements.txt"
source "$(dirname "$0")/setup.sh"
exec python runs/before.py "$@"
