#!/usr/bin/env bash
# Runs the whole CROPI loop: collect rollouts once; then, in each phase, sketch, score and train.
#
#   bash run_cropi.sh                           full-data GRPO and CROPI in a toy world; 7 to 14 minutes
#   METHOD=learnability bash run_cropi.sh       another selection method in the same loop
#   MODEL=Qwen/Qwen2.5-1.5B-Instruct TRAIN=... VAL=... bash run_cropi.sh
#                                               your own model and data (README.md)
#   PRESET=presets/qwen2.5-1.5b.sh NPROC=8 bash run_cropi.sh
#                                               the paper's main experiment
#   DRY_RUN=1 bash run_cropi.sh                 prints the commands of a run; runs and writes nothing
#
# If a run was stopped or killed, the same command with the same settings resumes it.
set -euo pipefail
cd "$(dirname "$0")"
die() { echo "run_cropi.sh: error: $*" >&2; exit 2; }

# ---- knobs: set them in the environment ----------------------------------------------------------------
PRESET=${PRESET:-}                    # file that sets some of the knobs below; the environment overrides it
[ -z "$PRESET" ] || [ -f "$PRESET" ] ||
    die "PRESET $PRESET: no such file; set PRESET to an existing file such as: $(echo presets/*)"
[ -z "$PRESET" ] || . "$PRESET"
METHOD=${METHOD:-cropi}               # full, dapo (all prompts too), random, passrate, learnability,
                                      # influence (selects once) or cropi (selects in every phase)
DRY_RUN=${DRY_RUN:-}                  # 1: print the commands, run nothing
MODEL=${MODEL:-}                      # base policy: Hugging Face folder or hub name; empty: the toy world
if [ -z "$MODEL" ]; then
    RUN=${RUN:-runs/toy}
    TOY=${TOY:-$RUN/world}            # folder of the toy's data and base policy, made once, from SEED
    TARGETED=${TARGETED:-sort dbl}    # its targeted families; if changed, set VAL: NAME=$TOY/val_NAME.jsonl
    MODEL=$TOY/base
    BASELINE=${BASELINE-full}         # methods to run before METHOD and to plot with it; BASELINE= for none
    TRAIN=${TRAIN:-$TOY/train.jsonl}
    VAL=${VAL:-sort=$TOY/val_sort.jsonl dbl=$TOY/val_dbl.jsonl}
    TEST=${TEST:-targeted=$TOY/test_targeted.jsonl related=$TOY/test_related.jsonl
        other=$TOY/test_other.jsonl}
    VERIFIER=${VERIFIER:-exact} MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-10} TEMPERATURE=${TEMPERATURE:-1.0}
    K_VAL=${K_VAL:-16} ALPHA=${ALPHA:-0.03} DIM=${DIM:-8192} PHASES=${PHASES:-8} STEPS=${STEPS:-20}
    BATCH=${BATCH:-64} LR=${LR:-5e-5} BATCH_TOKENS=${BATCH_TOKENS:-2048}
else
    TOY=
fi
RUN=${RUN:-runs/$(basename "$MODEL")} # output folder
BASELINE=${BASELINE:-}
TRAIN=${TRAIN:-}                      # train prompts: .jsonl or .parquet files, or hub data sets
                                      # name[:config[:split]], separated by spaces; no path has a space
VAL=${VAL:-}                          # validation sets: name=source pairs, separated by spaces
TEST=${TEST:-}                        # test sets, in the same form; may be empty
PROMPT_KEY=${PROMPT_KEY:-prompt question problem}    # prompt column: the first of these that exists
ANSWER_KEY=${ANSWER_KEY:-answer solution}            # answer column, likewise
INSTRUCTION=${INSTRUCTION:-}          # text appended to every prompt that is a string
VERIFIER=${VERIFIER:-math}            # math, exact or your own function, path/to/file.py:function
VAL_LIMIT=${VAL_LIMIT:-100}           # prompts used per validation set (the first ones)
K=${K:-8}                             # responses per train prompt
K_VAL=${K_VAL:-32}                    # responses per validation prompt
TEMPERATURE=${TEMPERATURE:-0.5}       # sampling temperature of the rollouts (paper: 0.5)
TRAIN_TEMPERATURE=${TRAIN_TEMPERATURE:-$TEMPERATURE}     # sampling temperature during GRPO
EVAL_TEMPERATURE=${EVAL_TEMPERATURE:-$TRAIN_TEMPERATURE} # in evaluations; 0: greedy decoding only
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-2048}                # length limit of a response
PHASES=${PHASES:-4}                   # number of phases, the paper's M
STEPS=${STEPS:-50}                    # GRPO steps per phase
ALPHA=${ALPHA:-0.1}                   # fraction of the train prompts selected
CANDIDATES=${CANDIDATES:-1}           # fraction of the train prompts sketched, drawn anew in each phase
KEEP=${KEEP:-0.1}                     # probability of keeping a gradient coordinate in the sketch
DIM=${DIM:-32768}                     # numbers per sketch
RHO_MAX=${RHO_MAX:-inf}               # cap on the ratio rho as a token's weight; inf: none, as in the paper
SKETCH=${SKETCH:-sketch.py}           # script of stage 2, to compare estimators of the gradient
RRF_C=${RRF_C:-0}                     # constant c of reciprocal rank fusion
BATCH=${BATCH:-128}                   # prompts per GRPO step
GROUP=${GROUP:-8}                     # responses per prompt in a GRPO step
LR=${LR:-1e-6}                        # AdamW's learning rate, constant
KL_COEF=${KL_COEF:-0.001}             # lambda_KL, the weight of the KL term to the base policy
ENTROPY_COEF=${ENTROPY_COEF:-0.001}   # lambda_H, the weight of the entropy bonus
EVAL_EVERY=${EVAL_EVERY:-10}          # steps between evaluations
EVAL_SAMPLES=${EVAL_SAMPLES:-4}       # sampled responses per test prompt
SAVE_EVERY=${SAVE_EVERY:-50}          # steps between checkpoints within a phase
ENGINE=${ENGINE:-}                    # sampler, hf (transformers) or vllm; empty: vllm on a GPU, else hf
KV_TOKENS=${KV_TOKENS:-}              # tokens in each rank's KV cache; lower it if sampling is out of memory;
                                      # empty: 65536 with ENGINE=hf, 262144 with vllm
BATCH_TOKENS=${BATCH_TOKENS:-8192}    # tokens per micro-batch; lower it if gradients run out of memory
DTYPE=${DTYPE:-float32}               # float32 or bfloat16; training keeps float32 weights in both cases
NPROC=${NPROC:-1}                     # ranks (GPUs) on this machine; more than 1 uses torchrun
SEED=${SEED:-0}                       # random seed
PYTHON=${PYTHON:-}                    # a Python with requirements.txt; empty: .venv, made on first use

# ---- set-up --------------------------------------------------------------------------------------------
. ./setup.sh
ENGINE=${ENGINE:-${GPU:+vllm}} ENGINE=${ENGINE:-hf}

set -f # sources such as train[:-100] are no patterns

launch=("$PYTHON") # on Ctrl-C a rank finishes its step and saves a checkpoint before it is killed
[ "$NPROC" -eq 1 ] || launch=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC"
    --shutdown_timeout 1800)

# seconds: wall-clock seconds of the current stage, with those of its earlier attempts
seconds() {
    "$PYTHON" -c "import time; print(round(time.time() - $began + $(cat "$attempts" 2>/dev/null || echo 0), 2))"
}

# stage FOLDER NAME COMMAND...: runs a command unless it is done, and adds it to RUN/commands.txt. A command
# that succeeds is recorded as done in FOLDER/seconds.tsv, with its seconds. Those of an attempt that fails or
# is stopped (but not by SIGKILL) are kept until then.
stage() {
    local folder=$1 name=$2 line
    shift 2
    [ -z "$DRY_RUN" ] || { echo "+$(printf ' %q' "$@")" && return 0; }
    ! grep -q "^$name	" "$folder/seconds.tsv" 2>/dev/null || return 0
    line=$(printf '%q ' "$@")
    grep -qxF -- "$line" "$RUN/commands.txt" 2>/dev/null || printf '%s\n' "$line" >>"$RUN/commands.txt"
    mkdir -p "$folder"
    began=$("$PYTHON" -c 'import time; print(time.time())') attempts=$folder/$name.seconds
    trap 'spent=$(seconds); echo "$spent" >"$attempts"' EXIT
    "$@"
    printf '%s\t%s\n' "$name" "$(seconds)" >>"$folder/seconds.tsv"
    trap - EXIT
    rm -f "$attempts"
}

# settings FOLDER NAME...: writes the named knobs to FOLDER/settings.txt. If that file exists with other
# values, stops with an error.
settings() {
    local folder=$1 name text=
    [ -z "$DRY_RUN" ] || return 0
    shift
    for name in "$@"; do text="$text$name=${!name}"$'\n'; done
    mkdir -p "$folder"
    [ -e "$folder/settings.txt" ] || printf '%s' "$text" >"$folder/settings.txt"
    if [ "$text" != "$(cat "$folder/settings.txt")"$'\n' ]; then
        die "$folder holds a run with other settings (< stored, > requested):" \
            "$(printf '%s' "$text" | diff "$folder/settings.txt" - | grep '^[<>]' | tr '\n' ' ');" \
            "use the stored settings, remove $folder, or set RUN to another folder"
    fi
}

for method in $BASELINE $METHOD; do
    case $method in
    full | dapo | random | passrate | learnability | influence | cropi) ;;
    *) die "METHOD $method: unknown method; expected full, dapo, random, passrate, learnability, influence" \
        "or cropi; set METHOD and BASELINE to these names" ;;
    esac
done
[ -n "$TRAIN" ] && [ -n "$VAL" ] ||
    die "MODEL is set but TRAIN or VAL is not; set both as in the example of README.md"
ROLLOUTS=$RUN/rollouts
val_sources=() val_names=() val_rollouts=() test_sources=() tests=()
for pair in $VAL; do
    val_sources+=("${pair#*=}") val_names+=("val_${pair%%=*}")
    val_rollouts+=("$ROLLOUTS/val_${pair%%=*}.pt")
done
for pair in $TEST; do
    test_sources+=("${pair#*=}") tests+=("$ROLLOUTS/${pair%%=*}.pt")
done
twice=$(printf '%s\n' "$ROLLOUTS/train.pt" "${val_rollouts[@]}" ${tests[@]+"${tests[@]}"} | sort | uniq -d)
[ -z "$twice" ] || die "VAL, TEST: two sets for the file" $twice "; expected different names; rename one"
awk "BEGIN { exit !($CANDIDATES >= $ALPHA && $CANDIDATES <= 1) }" ||
    die "CANDIDATES $CANDIDATES: expected a share between ALPHA ($ALPHA) and 1; set it or ALPHA"

# lock FOLDER wait|refuse: what to do while another run_cropi.sh writes to FOLDER. Methods of one RUN may run
# side by side: each locks its own folder, and the first one collects. The stages of a killed run hold its
# lock until they have exited, so try for 5 seconds.
lock() {
    [ -z "$DRY_RUN" ] || return 0
    mkdir -p "$1"
    exec 9>"$1/lock"
    ! command -v flock >/dev/null || flock -w 5 9 || {
        [ "$2" = wait ] ||
            die "another run_cropi.sh is running in $1; wait until it ends or set RUN to another folder"
        echo "waiting for another run_cropi.sh that writes to $1"
        flock 9
    }
}

if [ -z "$DRY_RUN" ]; then
    echo "$MODEL: ${BASELINE:+$BASELINE and }$METHOD, $PHASES phases of $STEPS GRPO steps"
    echo "  once: collect $K responses per train prompt and $K_VAL per validation prompt"
    echo "  in each phase: select (influence, cropi: sketch, score; ALPHA = $ALPHA), train"
    echo "  files: $RUN/rollouts and $RUN/METHOD/phase-m; the command of every stage: $RUN/commands.txt"
    echo "  disk, each phase: 12 bytes per parameter, $((4 * DIM / 1024)) kB per sketched prompt;" \
        "while it trains more than $SAVE_EVERY steps, 12 bytes per parameter more"
fi

lock "$ROLLOUTS" wait
if [ -n "$TOY" ]; then
    stage "$TOY" world "$PYTHON" toy/make_toy.py --out "$TOY" --seed "$SEED" --targeted $TARGETED
fi

# ---- stage 1, once: rollouts of the base policy --------------------------------------------------------
settings "$ROLLOUTS" MODEL TRAIN VAL TEST PROMPT_KEY ANSWER_KEY INSTRUCTION VERIFIER VAL_LIMIT K K_VAL \
    TEMPERATURE MAX_NEW_TOKENS ENGINE DTYPE SEED

collect() { # NAME K ARGUMENT...
    local name=$1 k=$2
    shift 2
    stage "$ROLLOUTS" "$name" "${launch[@]}" collect.py --model "$MODEL" --k "$k" \
        --temperature "$TEMPERATURE" --max-new-tokens "$MAX_NEW_TOKENS" --verifier "$VERIFIER" \
        --prompt-key $PROMPT_KEY --answer-key $ANSWER_KEY --instruction "$INSTRUCTION" \
        --engine "$ENGINE" ${KV_TOKENS:+--kv-tokens "$KV_TOKENS"} --dtype "$DTYPE" --seed "$SEED" "$@"
}

collect train "$K" --data $TRAIN --out "$ROLLOUTS/train.pt"
collect val "$K_VAL" --limit "$VAL_LIMIT" --data "${val_sources[@]}" --out "${val_rollouts[@]}"
[ -z "$TEST" ] || collect test 0 --data "${test_sources[@]}" --out "${tests[@]}"

# ---- stages 2 to 4, in each phase: sketch, score, train ------------------------------------------------
run_method() { # METHOD
    local method=$1 folder=$RUN/$1 policy=$MODEL optimizer=() dapo=() rule m phase val name
    lock "$folder" refuse
    settings "$folder" PHASES STEPS ALPHA CANDIDATES KEEP DIM RHO_MAX SKETCH RRF_C BATCH GROUP \
        TRAIN_TEMPERATURE LR KL_COEF ENTROPY_COEF EVAL_EVERY EVAL_SAMPLES EVAL_TEMPERATURE SAVE_EVERY
    [ "$method" != dapo ] || dapo=(--dynamic-sampling --token-mean)
    for ((m = 0; m < PHASES; m++)); do
        phase=$folder/phase-$m
        echo "== $method, phase $m of $PHASES =="
        [ -n "$DRY_RUN" ] || mkdir -p "$phase"
        case $method in
        influence | cropi)
            if [ "$method" = influence ] && [ "$m" -gt 0 ]; then
                stage "$folder" "phase-$m-score" cp "$folder/phase-0/selected.npy" "$phase/selected.npy"
            else
                val=()
                for name in "${val_names[@]}"; do val+=("$phase/$name.npy"); done
                stage "$folder" "phase-$m-sketch" "${launch[@]}" "$SKETCH" --model "$policy" \
                    --rollouts "$ROLLOUTS/train.pt" "${val_rollouts[@]}" \
                    --out "$phase/train.npy" "${val[@]}" --keep "$KEEP" --dim "$DIM" \
                    --candidates "$CANDIDATES" --rho-max "$RHO_MAX" --batch-tokens "$BATCH_TOKENS" \
                    --dtype "$DTYPE" --seed "$SEED"
                stage "$folder" "phase-$m-score" "$PYTHON" score.py --train "$phase/train.npy" \
                    --val "${val[@]}" --out "$phase/selected.npy" --alpha "$ALPHA" --rrf-c "$RRF_C"
            fi
            ;;
        *) # each phase has its own seed for random choices
            rule=${method/dapo/full}
            stage "$folder" "phase-$m-score" "$PYTHON" score.py --method "$rule" \
                --rollouts "$ROLLOUTS/train.pt" --out "$phase/selected.npy" --alpha "$ALPHA" \
                --seed "$((SEED * 1000 + m))"
            ;;
        esac
        stage "$folder" "phase-$m-train" "${launch[@]}" train_grpo.py --model "$policy" --ref "$MODEL" \
            --rollouts "$ROLLOUTS/train.pt" --select "$phase/selected.npy" --out "$phase/policy" \
            --steps "$STEPS" --batch-size "$BATCH" --group "$GROUP" --lr "$LR" --kl-coef "$KL_COEF" \
            --eval-every "$EVAL_EVERY" --eval-samples "$EVAL_SAMPLES" --save-every "$SAVE_EVERY" \
            --engine "$ENGINE" ${KV_TOKENS:+--kv-tokens "$KV_TOKENS"} --batch-tokens "$BATCH_TOKENS" \
            --dtype "$DTYPE" --seed "$SEED" --entropy-coef "$ENTROPY_COEF" --verifier "$VERIFIER" \
            --train-temperature "$TRAIN_TEMPERATURE" --eval-temperature "$EVAL_TEMPERATURE" \
            ${dapo[@]+"${dapo[@]}"} ${tests[@]+--eval "${tests[@]}"} ${optimizer[@]+"${optimizer[@]}"}
        policy=$phase/policy optimizer=(--optimizer "$phase/policy/optimizer.pt")
        [ "$m" -gt 0 ] || [ "$PHASES" -eq 1 ] || [ -n "$DRY_RUN" ] || rest "$method"
    done
}

rest() { # METHOD: says how long its further phases will take; influence selects in the first phase only
    local repeated=^phase-0-train
    ! grep -q "^phase-$((PHASES - 1))-train" "$RUN/$1/seconds.tsv" || return 0
    [ "$1" != cropi ] || repeated=^phase-0-
    awk -v method="$1" -v n="$((PHASES - 1))" -v repeated="$repeated" \
        '/^phase-0-/ { took += $2 } $0 ~ repeated { more += n * $2 / 60 }
        END { printf "%s: phase 0 took %.0f s, the other %d take about %.1f min\n", method, took, n, more }' \
        "$RUN/$1/seconds.tsv"
}

folders=()
for method in $BASELINE $METHOD; do
    case " ${folders[*]-} " in *" $RUN/$method "*) continue ;; esac
    run_method "$method"
    folders+=("$RUN/$method")
done
if [ -n "$DRY_RUN" ]; then
    echo "+ $PYTHON plot.py ${folders[*]} --out $RUN"
else
    "$PYTHON" plot.py "${folders[@]}" --out "$RUN"
fi
