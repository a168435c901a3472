#!/usr/bin/env bash
# The runs of the protocol (experiments/README.md): every method in the toy world, one world per seed, and the
# variations. The numbers of each finished run are written to experiments/results/acceleration/NAME.json at
# once; runs that have such a file are not made again. acceleration.py evaluates them.
#
#   bash experiments/acceleration.sh [PART...]     resumable; JOBS=2 seeds side by side, one thread each
#   SEEDS="0 1" bash experiments/acceleration.sh main weights
#
# The parts, by default the first five: main (full data, influence once, CROPI), weights (CROPI with other
# estimators of the gradient), baselines, variations (ALPHA = 0.1, CANDIDATES = 1/3), worlds (other targeted
# families); reselection (pools with fewer and with more targeted prompts, shorter and longer phases; stored
# in experiments/results/reselection); pilot (the runs that chose RHO_MAX below; in experiments/results/pilot).
# Run nothing else on the machine: seconds are compared.
set -euo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh
export PYTHON OMP_NUM_THREADS=1 BASELINE= RESULTS=experiments/results/acceleration RUNS=runs/acceleration
export LR=5e-5 PHASES=8 STEPS=20 # protocol 1's, also where the defaults of the toy change
mkdir -p "$RUNS" "$RESULTS" experiments/results/reselection

# run NAME METHOD: makes the run $RUN/METHOD with the environment's settings and stores its numbers. WORLD has
# further arguments of make_toy.py for its world $TOY.
run() {
    [ ! -e "$RESULTS/$1.json" ] || return 0
    if [ ! -e "$TOY/seconds.tsv" ]; then
        "$PYTHON" toy/make_toy.py --out "$TOY" --seed "$SEED" --sft-steps 700 ${WORLD:-}
        printf 'world\t0\n' >"$TOY/seconds.tsv"
    fi
    METHOD=$2 bash run_cropi.sh >>"$RUNS/log-$(basename "$RUN").txt" 2>&1
    "$PYTHON" experiments/acceleration.py store "$RUN/$2" "$RESULTS/$1.json"
    echo "$(date +%H:%M) $1"
}

# vary NAME METHOD SETTING...: a run with other settings in the world and with the rollouts of seed $SEED
vary() {
    local name=$1-$SEED method=$2
    shift 2
    (
        export RUN=$RUNS/$name "$@"
        mkdir -p "$RUN" "$RUNS/seed-$SEED/rollouts"
        ln -sfn "../seed-$SEED/rollouts" "$RUN/rollouts"
        run "$name-$method" "$method"
    )
}

# part NAME: the runs of one part for seed $SEED
part() {
    local method pair a b
    case $1 in
    main) for method in full influence cropi; do run "seed-$SEED-$method" "$method"; done ;;
    weights)
        run "seed-$SEED-cropi" cropi
        vary truncated cropi RHO_MAX=2
        for estimator in clip no-ratio fresh; do
            vary "$estimator" cropi SKETCH=experiments/estimators.py ESTIMATOR="$estimator"
        done
        ;;
    baselines)
        for method in dapo random passrate learnability; do run "seed-$SEED-$method" "$method"; done
        ;;
    variations)
        vary alpha influence ALPHA=0.1
        vary alpha cropi ALPHA=0.1
        # the stored runs are of commit efb6923: a random third of all prompts in each phase
        vary third cropi CANDIDATES=1/3 SKETCH="bash experiments/random_first.sh"
        ;;
    worlds)
        for pair in "max rev" "uniq sum"; do
            read -r a b <<<"$pair"
            (
                export RUN=$RUNS/$a-$b-$SEED TOY=$RUNS/$a-$b-$SEED/world WORLD="--targeted $pair"
                export VAL="$a=$TOY/val_$a.jsonl $b=$TOY/val_$b.jsonl"
                for method in full influence cropi; do run "$a-$b-$SEED-$method" "$method"; done
            )
        done
        ;;
    reselection)
        export RESULTS=experiments/results/reselection
        vary phases-4 cropi PHASES=4 STEPS=40
        vary phases-16 cropi PHASES=16 STEPS=10
        for n in 60 100 430; do
            (
                export RUN=$RUNS/pool-$n-$SEED TOY=$RUNS/pool-$n-$SEED/world
                export WORLD="--pool-targeted $n"
                for method in influence cropi; do run "pool-$n-$SEED-$method" "$method"; done
            )
        done
        ;;
    pilot)
        for c in 2 5; do vary "$c" cropi RHO_MAX="$c"; done
        ;;
    esac
}

# seed S PART...: these parts of one seed, one run after the other
seed() {
    export SEED=$1 RUN=$RUNS/seed-$1 TOY=$RUNS/seed-$1/world
    local name
    for name in "${@:2}"; do
        case $name-$SEED in # the seeds of each part
        main-* | pilot-* | worlds-[01] | reselection-[0-2]) part "$name" ;;
        weights-[0-3] | baselines-[0-3] | variations-[0-3]) part "$name" ;;
        esac
    done
}
export -f run vary part seed

if [ "${1:-}" = pilot ]; then
    RUNS=runs/pilot RESULTS=experiments/results/pilot SEEDS="20 21"
    mkdir -p "$RUNS" "$RESULTS"
fi
printf '%s\n' ${SEEDS:-0 1 2 3 4 5 6 7} | xargs -P "${JOBS:-2}" -I {} \
    bash -euo pipefail -c "seed {} ${*:-main weights baselines variations worlds}"
case "$*" in
pilot) "$PYTHON" experiments/acceleration.py pilot ;;
reselection) "$PYTHON" experiments/reselection.py ;;
*) "$PYTHON" experiments/acceleration.py ;;
esac
