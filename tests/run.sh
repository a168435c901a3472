#!/usr/bin/env bash
# Runs all tests, in two processes, since most of their time goes into starting processes of one thread each.
# Makes .venv on first use; set PYTHON to use your own Python instead. Arguments are passed to pytest:
#
#   bash tests/run.sh -n 0 -k score
set -euo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh
export HF_HUB_OFFLINE=1
exec "$PYTHON" -m pytest tests -n 2 --dist loadfile --durations=12 "$@"
