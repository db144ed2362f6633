#!/usr/bin/env bash
# Training tokens/s on packed rows, with attention within documents and with masks, in turn on this machine.
#   bash runs/packed.sh [rounds]      (about a minute a round)
requirements="requirements.txt"
source "$(dirname "$0")/setup.sh"
exec python runs/packed.py "$@"
