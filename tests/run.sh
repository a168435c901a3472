#!/usr/bin/env bash
# All tests. Makes .venv on first use; PYTHON=... takes yours instead. Arguments go to pytest:  bash tests/run.sh -k score
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-}
if [ -z "$PYTHON" ]; then
    PYTHON=.venv/bin/python
    if ! cmp -s requirements.txt .venv/installed; then
        echo "Installing requirements.txt into .venv (once)"
        python3 -m venv .venv
        .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
        cp requirements.txt .venv/installed
    fi
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$PYTHON" -m pytest tests --durations=8 "$@"
