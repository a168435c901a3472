#!/usr/bin/env bash
# sketch.py as run_cropi.sh called it for protocol 2's runs: CANDIDATES counts in phase 0, too, where the
# candidates are drawn at random, since there are no scores.
#
#   SKETCH='bash experiments/random_first.sh' CANDIDATES=1/4 bash run_cropi.sh
set -euo pipefail
case " $* " in
*" --scores "*) ;;
*) set -- "$@" --candidates "$CANDIDATES" ;;
esac
exec python "$(dirname "$0")/../sketch.py" "$@"
