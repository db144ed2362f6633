#!/usr/bin/env bash
# A mixture by temperature beside a proportional one: held-out bits per byte of each source, equal tokens, three seeds.
#   bash runs/mixture.sh path/to/text [steps] [temperature]      (about half an hour on 2 CPU cores)
requirements="requirements.txt"
source "$(dirname "$0")/setup.sh"
exec python runs/mixture.py "$@"
