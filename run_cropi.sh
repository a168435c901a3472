#!/usr/bin/env bash
# CROPI, the whole loop: collect once, then for each phase sketch, score, train.
#
#   bash run_cropi.sh                                    a toy world made on the spot, on a CPU, with full data beside CROPI
#   METHOD=learnability bash run_cropi.sh                another selection rule in the same loop
#   MODEL=Qwen/Qwen2.5-1.5B-Instruct TRAIN=... VAL=... bash run_cropi.sh       your model and data (README.md)
#   PRESET=presets/qwen2.5-1.5b.sh NPROC=8 bash run_cropi.sh                   the paper's main experiment
#
# A run that was stopped goes on where it was when started again with the same settings.
set -euo pipefail
cd "$(dirname "$0")"
die() { echo "run_cropi.sh: error: $*" >&2; exit 2; }

# ---- every knob ----------------------------------------------------------------------------------------------------
PRESET=${PRESET:-}                    # a file that sets some of the knobs below; what the environment sets goes before it
[ -z "$PRESET" ] || [ -f "$PRESET" ] || die "PRESET $PRESET: no such file; expected one of: $(echo presets/*)"
[ -z "$PRESET" ] || . "$PRESET"
METHOD=${METHOD:-cropi}               # full | random | passrate | learnability | influence (selected once) | cropi
MODEL=${MODEL:-}                      # base policy: Hugging Face folder or hub name; empty: the toy world and its settings
if [ -z "$MODEL" ]; then
    TOY=${TOY:-runs/toy-world}        # where the toy's data and base policy are made, once
    MODEL=$TOY/base
    RUN=${RUN:-runs/toy}
    BASELINE=${BASELINE-full}         # a second method to run first and to draw beside METHOD; BASELINE= for none
    TRAIN=${TRAIN:-$TOY/train.jsonl}
    VAL=${VAL:-sort=$TOY/val_sort.jsonl dbl=$TOY/val_dbl.jsonl}
    TEST=${TEST:-targeted=$TOY/test_targeted.jsonl untargeted=$TOY/test_untargeted.jsonl}
    VERIFIER=${VERIFIER:-exact} MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-10} TEMPERATURE=${TEMPERATURE:-1.0}
    K_VAL=${K_VAL:-16} PHASES=${PHASES:-3} STEPS=${STEPS:-30} BATCH=${BATCH:-64} LR=${LR:-1e-4} DIM=${DIM:-8192}
    BATCH_TOKENS=${BATCH_TOKENS:-2048}
else
    TOY=
fi
RUN=${RUN:-runs/$(basename "$MODEL")} # folder of everything this makes
BASELINE=${BASELINE:-}
TRAIN=${TRAIN:-}                      # train prompts: .jsonl, .parquet or hub data sets name[:config[:split]]
VAL=${VAL:-}                          # validation sets, name=source, separated by spaces
TEST=${TEST:-}                        # test sets, likewise
PROMPT_KEY=${PROMPT_KEY:-prompt question problem}    # column of the prompt: the first that the data has
ANSWER_KEY=${ANSWER_KEY:-answer solution}            # column of the answer, likewise
INSTRUCTION=${INSTRUCTION:-}          # text appended to every prompt
VERIFIER=${VERIFIER:-math}            # math | exact
VAL_LIMIT=${VAL_LIMIT:-100}           # prompts of a validation set that are used
K=${K:-8}                             # trajectories a train prompt
K_VAL=${K_VAL:-32}                    # trajectories a validation prompt
TEMPERATURE=${TEMPERATURE:-0.5}       # of all sampling (0.5 in the paper)
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-2048}
PHASES=${PHASES:-4}                   # M
STEPS=${STEPS:-50}                    # GRPO steps a phase
ALPHA=${ALPHA:-0.1}                   # share of the prompts selected
KEEP=${KEEP:-0.1}                     # share of the gradient's coordinates kept
DIM=${DIM:-32768}                     # numbers a sketch
RRF_C=${RRF_C:-0}                     # c of the rank fusion
BATCH=${BATCH:-128}                   # prompts a GRPO step
GROUP=${GROUP:-8}                     # responses a prompt
LR=${LR:-1e-6}                        # AdamW
KL_COEF=${KL_COEF:-0.001}             # lambda_KL, towards the base policy
EVAL_EVERY=${EVAL_EVERY:-10}          # steps between evaluations
EVAL_SAMPLES=${EVAL_SAMPLES:-4}       # responses a test prompt
SAVE_EVERY=${SAVE_EVERY:-50}          # steps between checkpoints within a phase
ENGINE=${ENGINE:-}                    # what samples: hf (transformers) or vllm; empty: vllm on a GPU, hf elsewhere
KV_TOKENS=${KV_TOKENS:-65536}         # tokens in a process's KV cache while sampling: lower it where memory is short
BATCH_TOKENS=${BATCH_TOKENS:-8192}    # tokens of a micro-batch with gradients: likewise
DTYPE=${DTYPE:-float32}               # or bfloat16; training keeps float32 weights either way
NPROC=${NPROC:-1}                     # processes (GPUs) of this machine, by torchrun
GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING:-}   # anything: training takes less memory for a third more arithmetic
SEED=${SEED:-0}
PYTHON=${PYTHON:-}                    # a Python that has requirements.txt; empty: a .venv made on first use

# ---- set-up --------------------------------------------------------------------------------------------------------
. ./setup.sh
ENGINE=${ENGINE:-${GPU:+vllm}} ENGINE=${ENGINE:-hf}

launch=("$PYTHON")
[ "$NPROC" -eq 1 ] || launch=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC")

now() { "$PYTHON" -c 'import time; print(time.time())'; }

# stage FOLDER NAME COMMAND...: run a command once; its wall-clock seconds, written down when it ended well, mark it as done
stage() {
    local folder=$1 name=$2 began
    shift 2
    grep -q "^$name	" "$folder/seconds.tsv" 2>/dev/null && return
    mkdir -p "$folder"
    echo "+ $*"
    began=$(now)
    "$@"
    printf '%s\t%s\n' "$name" "$("$PYTHON" -c "import time; print(round(time.time() - $began, 2))")" >>"$folder/seconds.tsv"
}

# settings FOLDER NAME...: a folder made with other settings is not gone on with
settings() {
    local folder=$1 name text=
    shift
    for name in "$@"; do text="$text$name=${!name}"$'\n'; done
    mkdir -p "$folder"
    [ -e "$folder/settings.txt" ] || printf '%s' "$text" >"$folder/settings.txt"
    if [ "$text" != "$(cat "$folder/settings.txt")"$'\n' ]; then
        die "$folder holds a run with other settings: $(printf '%s' "$text" | diff "$folder/settings.txt" - | grep '^[<>]' |
            tr '\n' ' '); remove it or set RUN to another folder"
    fi
}

for method in $BASELINE $METHOD; do
    case $method in
    full | random | passrate | learnability | influence | cropi) ;;
    *) die "METHOD $method; expected full, random, passrate, learnability, influence or cropi" ;;
    esac
done
[ -n "$TRAIN" ] && [ -n "$VAL" ] || die "MODEL is set but TRAIN or VAL is not; README.md has an example"

mkdir -p "$RUN"
exec 9>"$RUN/lock" # held until this script and its stages have ended, however they end: killed ones take a moment
! command -v flock >/dev/null || flock -w 5 9 || die "another run_cropi.sh is at work in $RUN; wait for it or set RUN"

if [ -n "$TOY" ]; then
    stage "$TOY" world "$PYTHON" toy/make_toy.py --out "$TOY"
fi

# ---- stage 1, once: rollouts of the base policy --------------------------------------------------------------------
ROLLOUTS=$RUN/rollouts
settings "$ROLLOUTS" MODEL TRAIN VAL TEST PROMPT_KEY ANSWER_KEY INSTRUCTION VERIFIER VAL_LIMIT K K_VAL TEMPERATURE \
    MAX_NEW_TOKENS ENGINE DTYPE SEED

collect() { # NAME K ARGUMENT...
    local name=$1 k=$2
    shift 2
    stage "$ROLLOUTS" "$name" "${launch[@]}" collect.py --model "$MODEL" --k "$k" --temperature "$TEMPERATURE" \
        --max-new-tokens "$MAX_NEW_TOKENS" --verifier "$VERIFIER" --prompt-key $PROMPT_KEY --answer-key $ANSWER_KEY \
        --instruction "$INSTRUCTION" --engine "$ENGINE" --kv-tokens "$KV_TOKENS" --dtype "$DTYPE" --seed "$SEED" "$@"
}

val_sources=() val_names=() val_rollouts=() test_sources=() tests=()
for pair in $VAL; do
    val_sources+=("${pair#*=}") val_names+=("val_${pair%%=*}") val_rollouts+=("$ROLLOUTS/val_${pair%%=*}.pt")
done
for pair in $TEST; do
    test_sources+=("${pair#*=}") tests+=("$ROLLOUTS/${pair%%=*}.pt")
done
collect train "$K" --data $TRAIN --out "$ROLLOUTS/train.pt"
collect val "$K_VAL" --limit "$VAL_LIMIT" --data "${val_sources[@]}" --out "${val_rollouts[@]}"
[ -z "$TEST" ] || collect test 0 --data "${test_sources[@]}" --out "${tests[@]}"

# ---- stages 2 to 4, phase after phase ------------------------------------------------------------------------------
run_method() { # METHOD
    local method=$1 folder=$RUN/$1 policy=$MODEL optimizer=() m phase val name
    settings "$folder" PHASES STEPS ALPHA KEEP DIM RRF_C BATCH GROUP LR KL_COEF EVAL_EVERY EVAL_SAMPLES SAVE_EVERY
    for ((m = 0; m < PHASES; m++)); do
        phase=$folder/phase-$m
        echo "== $method, phase $m =="
        mkdir -p "$phase"
        case $method in
        influence | cropi)
            if [ "$method" = influence ] && [ "$m" -gt 0 ]; then
                stage "$folder" "phase-$m-score" cp "$folder/phase-0/selected.npy" "$phase/selected.npy"
            else
                val=()
                for name in "${val_names[@]}"; do val+=("$phase/$name.npy"); done
                stage "$folder" "phase-$m-sketch" "${launch[@]}" sketch.py --model "$policy" \
                    --rollouts "$ROLLOUTS/train.pt" "${val_rollouts[@]}" --out "$phase/train.npy" "${val[@]}" \
                    --keep "$KEEP" --dim "$DIM" --batch-tokens "$BATCH_TOKENS" --dtype "$DTYPE" --seed "$SEED"
                stage "$folder" "phase-$m-score" "$PYTHON" score.py --train "$phase/train.npy" --val "${val[@]}" \
                    --rollouts "$ROLLOUTS/train.pt" --out "$phase/selected.npy" --alpha "$ALPHA" --rrf-c "$RRF_C"
            fi
            ;;
        *) # the random choices of a phase are its own
            stage "$folder" "phase-$m-score" "$PYTHON" score.py --method "$method" --rollouts "$ROLLOUTS/train.pt" \
                --out "$phase/selected.npy" --alpha "$ALPHA" --seed "$((SEED * 1000 + m))"
            ;;
        esac
        stage "$folder" "phase-$m-train" "${launch[@]}" train_grpo.py --model "$policy" --ref "$MODEL" \
            --rollouts "$ROLLOUTS/train.pt" --select "$phase/selected.npy" --out "$phase/policy" --steps "$STEPS" \
            --batch-size "$BATCH" --group "$GROUP" --lr "$LR" --kl-coef "$KL_COEF" --eval-every "$EVAL_EVERY" \
            --eval-samples "$EVAL_SAMPLES" --save-every "$SAVE_EVERY" --engine "$ENGINE" --kv-tokens "$KV_TOKENS" \
            --batch-tokens "$BATCH_TOKENS" --dtype "$DTYPE" --seed "$SEED" ${GRADIENT_CHECKPOINTING:+--gradient-checkpointing} \
            ${tests[@]+--eval "${tests[@]}"} ${optimizer[@]+"${optimizer[@]}"}
        policy=$phase/policy optimizer=(--optimizer "$phase/policy/optimizer.pt")
    done
}

folders=()
for method in $BASELINE $METHOD; do
    case " ${folders[*]-} " in *" $RUN/$method "*) continue ;; esac
    run_method "$method"
    folders+=("$RUN/$method")
done
"$PYTHON" plot.py "${folders[@]}" --out "$RUN"
