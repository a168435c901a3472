#!/usr/bin/env bash
# Runs every selection method in the toy world over several seeds. acceleration.py, selection.py,
# off_policy.py, curriculum.py and cost.py read these runs.
#
#   bash experiments/acceleration.sh                 resumable; about 70 minutes on two CPU cores
#   SEEDS="0 1" JOBS=1 bash experiments/acceleration.sh
#
# The seed determines the rollouts, the projection, the random choices, the order of the prompts and all
# samples of training; data and base policy are the same for all seeds. Two seeds run side by side with one
# thread each (this small policy gains little from a second thread), on the same method at about the same
# time. Run nothing else on the machine: the seconds are compared.
set -euo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh
[ -e runs/toy-world/seconds.tsv ] || bash run_cropi.sh # makes the toy world
export PYTHON OMP_NUM_THREADS=1 PHASES=4 STEPS=40
export METHOD=random BASELINE="full cropi influence learnability passrate"
mkdir -p runs/acceleration
echo "progress: runs/acceleration/log-*.txt"
printf '%s\n' ${SEEDS:-0 1 2 3} | xargs -P "${JOBS:-2}" -I {} bash -c \
    'SEED={} RUN=runs/acceleration/seed-{} bash run_cropi.sh >>runs/acceleration/log-{}.txt 2>&1'
"$PYTHON" experiments/acceleration.py
