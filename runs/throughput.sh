#!/usr/bin/env bash
# Training tokens/s against nanoGPT at 6 layers, 384 wide, 6 heads, context 256, batch 8, in turn on this machine.
#   bash runs/throughput.sh path/to/tinyshakespeare.txt path/to/nanoGPT [rounds]      (about 2 minutes a round)
requirements="requirements.txt"
source "$(dirname "$0")/setup.sh"
exec python runs/throughput.py "$@"
