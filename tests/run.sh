#!/usr/bin/env bash
# Runs all tests. Makes .venv on first use; set PYTHON to use your own Python instead. Arguments are passed to
# pytest:
#
#   bash tests/run.sh -k score
set -euo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh
export HF_HUB_OFFLINE=1
exec "$PYTHON" -m pytest tests --durations=8 "$@"
