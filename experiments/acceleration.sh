#!/usr/bin/env bash
# The runs of the protocol (experiments/README.md): every method in the toy world, one world per seed, and the
# variations. The numbers of each finished run are written to experiments/results/acceleration/NAME.json at
# once; runs that have such a file are not made again. acceleration.py evaluates them.
#
#   bash experiments/acceleration.sh               resumable; JOBS=2 seeds side by side, one thread each
#   SEEDS="0 1" METHODS="full influence cropi" bash experiments/acceleration.sh
#
# Run nothing else on the machine: seconds are compared.
set -euo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh
export PYTHON OMP_NUM_THREADS=1 BASELINE= RESULTS=experiments/results/acceleration
mkdir -p runs/acceleration "$RESULTS"

# run NAME METHOD: makes one run in runs/acceleration/$FOLDER, with the environment's settings, and stores it
run() {
    local folder=runs/acceleration/$FOLDER
    [ ! -e "$RESULTS/$1.json" ] || return 0
    METHOD=$2 RUN=$folder bash run_cropi.sh >>"runs/acceleration/log-$FOLDER.txt" 2>&1
    "$PYTHON" experiments/acceleration.py store "$folder/$2" "$RESULTS/$1.json"
    echo "$(date +%H:%M) $1"
}

# seed S: all runs of one seed, one after the other
seed() {
    export SEED=$1
    local methods=${METHODS:-full influence cropi} world=runs/acceleration/seed-$1/world
    [ "$1" -gt 3 ] || methods=${METHODS:-full influence cropi dapo random passrate learnability}
    for method in $methods; do FOLDER=seed-$1 run "seed-$1-$method" "$method"; done
    [ -z "${METHODS:-}" ] && [ "$1" -le 3 ] || return 0
    for variation in "alpha ALPHA=0.1 influence" "alpha ALPHA=0.1 cropi" "third CANDIDATES=1/3 cropi"; do
        read -r name setting method <<<"$variation"
        mkdir -p "runs/acceleration/$name-$1" # of the same world and rollouts
        ln -sfn ../seed-$1/rollouts "runs/acceleration/$name-$1/rollouts"
        (export TOY=$world FOLDER=$name-$1 "${setting?}" && run "$name-$1-$method" "$method")
    done
    [ "$1" -le 1 ] || return 0
    for pair in "max rev" "uniq sum"; do
        read -r a b <<<"$pair"
        (
            export FOLDER=$a-$b-$1
            export TOY=runs/acceleration/$FOLDER/world
            export VAL="$a=$TOY/val_$a.jsonl $b=$TOY/val_$b.jsonl" TARGETED="$a $b"
            for method in full influence cropi; do run "$FOLDER-$method" "$method"; done
        )
    done
}
export -f run seed
printf '%s\n' ${SEEDS:-0 1 2 3 4 5 6 7} | xargs -P "${JOBS:-2}" -I {} bash -euo pipefail -c 'seed {}'
"$PYTHON" experiments/acceleration.py
