# Sourced by the other commands: makes .venv and installs the requirement files named in $requirements, once.
# A changed requirement file, or a .venv that moved, is installed again; otherwise this takes milliseconds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wanted="$PWD $(cat $requirements | cksum)"
for stamp in .venv/installed*; do
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && installed=yes
done
if [ -z "${installed:-}" ]; then
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        command -v "$python" >/dev/null && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' && break
        python=""
    done
    if [ -z "$python" ]; then
        echo "no Python 3.10 or newer was found; install one, or name it as in PYTHON=/path/to/python bash $0" >&2
        exit 1
    fi
    echo "setting up .venv with $("$python" --version); this downloads torch and takes a minute or more, once"
    if ! "$python" -m venv .venv; then
        echo "$python cannot make a virtual environment; on Debian and Ubuntu, apt install python3-venv" >&2
        exit 1
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' $requirements)
    echo "$wanted" > ".venv/installed-$(echo $requirements | cksum | cut -d' ' -f1)"
fi
export PATH="$PWD/.venv/bin:$PATH"
