#!/usr/bin/env bash
# What cleaning reaches on a corpus made for it (duplicates, spam, planted questions), its speed, and base models
# trained on the dirty and the clean corpus.
#   bash runs/clean.sh path/to/data [documents] [seeds] [steps]
requirements="requirements.txt requirements-clean.txt"
source "$(dirname "$0")/setup.sh"
data="${1:?a folder that holds text/, eval/ and dirty/ is needed}" folder=out/clean
python runs/clean.py make "$data" $folder "${2:-8000}"
python runs/clean.py score "$data" $folder
python runs/clean.py simhash $folder
python runs/clean.py speed "$data" $folder
python runs/clean.py pays $folder "${3:-3}" "${4:-1000}"
