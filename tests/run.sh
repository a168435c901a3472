#!/usr/bin/env bash
# Runs all tests, a file at a time in each of two processes: most of their time goes into starting stages of one
# thread each.
# Makes .venv on first use; set PYTHON to use your own Python instead. Arguments are passed to pytest:
#
#   bash tests/run.sh -n 0 -k score
set -euo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh
export HF_HUB_OFFLINE=1
exec "$PYTHON" -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder --durations=12 "$@"
