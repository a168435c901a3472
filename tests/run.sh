#!/usr/bin/env bash
# All tests. Makes .venv on first use; PYTHON=... takes yours instead. Arguments go to pytest:  bash tests/run.sh -k score
set -euo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh
export HF_HUB_OFFLINE=1
exec "$PYTHON" -m pytest tests --durations=8 "$@"
