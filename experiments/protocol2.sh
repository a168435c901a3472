#!/usr/bin/env bash
# The runs of protocol 2 (experiments/README.md): a toy world in which greedy accuracy has to be earned, one
# world per seed. The numbers of each finished run are written to experiments/results/protocol2/NAME-SEED.json
# (extras: protocol2_extras/) at once; runs that have such a file are not made again.
#
#   bash experiments/protocol2.sh              the main methods, seeds 0 to 7; resumable; JOBS=2 seeds side by
#                                              side, one thread each
#   PART=extras bash experiments/protocol2.sh  further settings, with full data and CROPI beside them, seeds 0
#                                              to 3
#   SEEDS="0 1" bash experiments/protocol2.sh
#
# Another kind of CPU rounds differently, and makes another base policy from the same seed: make all runs of one
# seed and part on one machine. Run nothing else on it: seconds are compared.
set -euo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh
export PYTHON OMP_NUM_THREADS=1 BASELINE= LR=3e-5 PHASES=7 STEPS=40
export PART=${PART:-main} RUNS=runs/protocol2 RESULTS=experiments/results/protocol2
seeds="0 1 2 3 4 5 6 7"
if [ "$PART" = extras ]; then
    RESULTS=experiments/results/protocol2_extras
    seeds="0 1 2 3"
fi
mkdir -p "$RUNS" "$RESULTS"
unset K

# run NAME METHOD SETTING...: makes a run in the world of seed $SEED and stores its numbers. Runs share the
# world's rollouts, unless a setting is one of theirs (K).
run() {
    local file=$RESULTS/$1-$SEED.json
    [ ! -e "$file" ] || return 0
    if [ ! -e "$TOY/seconds.tsv" ]; then
        "$PYTHON" toy/make_toy.py --out "$TOY" --seed "$SEED" --sft-steps 550
        printf 'world\t0\n' >"$TOY/seconds.tsv"
    fi
    (
        export RUN=$RUNS/$SEED/$1 METHOD=$2 "${@:3}"
        mkdir -p "$RUN" "$RUNS/$SEED/rollouts"
        [ -n "${K:-}" ] || ln -sfn ../rollouts "$RUN/rollouts"
        bash run_cropi.sh >>"$RUNS/log-$SEED.txt" 2>&1
        "$PYTHON" experiments/acceleration.py store "$RUN/$METHOD" "$file"
    )
    echo "$(date +%H:%M) $1, seed $SEED"
}

seed() { # SEED
    local random_first="bash experiments/random_first.sh"
    export SEED=$1 TOY=$RUNS/$1/world
    if [ "$PART" = main ]; then
        run full full
        run cropi cropi
        run economical cropi RESPONSES=2 MOMENTUM=0.5 CANDIDATES=1/4 SKETCH="$random_first"
        run influence influence
        run dynamic cropi RESPONSES=2 MOMENTUM=0.5 CANDIDATES=1/4 SKETCH="$random_first" DYNAMIC=1
        run dapo dapo
        return 0
    fi
    run full full
    run cropi cropi
    run candidates cropi CANDIDATES=1/4 SKETCH="$random_first"
    run allfirst cropi RESPONSES=2 MOMENTUM=0.5 CANDIDATES=1/4
    run responses cropi RESPONSES=2
    run cheap cropi RESPONSES=2 MOMENTUM=0.5
    run momentum cropi MOMENTUM=0.5
    run k4 cropi K=4
    for method in learnability random passrate; do
        run "$method" "$method"
    done
}
export -f run seed
printf '%s\n' ${SEEDS:-$seeds} | xargs -P "${JOBS:-2}" -I {} bash -euo pipefail -c "seed {}"
