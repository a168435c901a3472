#!/usr/bin/env bash
# sketch.py, but CANDIDATES counts from the second phase on: in the first, which has no scores of a phase before,
# all prompts with a gradient are sketched. For run_cropi.sh:
#
#   SKETCH='bash experiments/all_first.sh' CANDIDATES=1/4 bash run_cropi.sh
set -euo pipefail
case " $* " in
*" --scores "*) ;;
*) set -- "$@" --candidates 1 ;;
esac
exec python "$(dirname "$0")/../sketch.py" "$@"
