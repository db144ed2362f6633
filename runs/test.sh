#!/usr/bin/env bash
# Sets up .venv and runs every test in two processes; arguments go to pytest, as in: bash runs/test.sh -k resume
requirements="requirements.txt requirements-clean.txt requirements-test.txt"
source "$(dirname "$0")/setup.sh"
ruff check .
exec python -m pytest -q -n 2 "$@" tests
