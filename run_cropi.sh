#!/usr/bin/env bash
# Runs the whole CROPI loop: collect rollouts once; then, in each phase, sketch, score and train.
#
#   bash run_cropi.sh                           full-data GRPO and CROPI in a toy world; 14 minutes
#   METHOD=learnability bash run_cropi.sh       another selection method in the same loop
#   STEPS=0 bash run_cropi.sh                   selects prompts once and trains nothing
#   MODEL=Qwen/Qwen2.5-1.5B-Instruct TRAIN=... VAL=... bash run_cropi.sh
#                                               your own model and data (README.md)
#   PRESET=presets/qwen2.5-1.5b.sh NPROC=8 bash run_cropi.sh
#                                               close to the paper's main experiment; never run
#   DRY_RUN=1 bash run_cropi.sh                 prints the commands of a run; runs and writes nothing
#
# If a run was stopped or killed, the same command with the same settings resumes it. Relative paths in the
# knobs are relative to the folder in which the command is given, which may be any folder.
set -euo pipefail
[ ! -L "$0" ] || exec bash "$(readlink -f "$0")" # called by a symbolic link

# ---- knobs: set them in the environment ----------------------------------------------------------------
DRY_RUN=${DRY_RUN:-}                  # 1: print the commands, run nothing
PYTHON=${PYTHON:-}                    # a Python with requirements.txt; empty: .venv, made on first use
. "$(dirname "$0")/setup.sh"          # sets PYTHON, ROOT (the project's folder), and GPU=1 if there is a GPU;
                                      # has the functions that are called below and not defined below
PRESET=${PRESET:-}                    # file that sets some of the knobs below; the environment overrides it
[ -z "$PRESET" ] || load_preset
MODEL=${MODEL:-}                      # base policy: Hugging Face folder or hub name; empty: the toy world
[ -n "$MODEL" ] || . "$ROOT/presets/toy.sh"
METHOD=${METHOD:-cropi}               # full, dapo (all prompts too), random, passrate, learnability,
                                      # influence (selects once) or cropi (selects in every phase)
RUN=${RUN:-runs/$(basename "$MODEL")} # output folder
BASELINE=${BASELINE:-}                # methods to run before METHOD and to plot with it
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
TEMPERATURE=${TEMPERATURE:-0.5}       # sampling temperature of the rollouts; 0.5 is the paper's;
                                      # collect.py on its own has 1.0, the policy as it is
TRAIN_TEMPERATURE=${TRAIN_TEMPERATURE:-$TEMPERATURE}     # sampling temperature during GRPO
EVAL_TEMPERATURE=${EVAL_TEMPERATURE:-$TRAIN_TEMPERATURE} # in evaluations; 0: greedy decoding only
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-2048}                # length limit of a response
PHASES=${PHASES:-4}                   # number of phases, the paper's M
STEPS=${STEPS:-50}                    # GRPO steps per phase; 0: only METHOD's first selection, no training
ALPHA=${ALPHA:-0.1}                   # fraction of the train prompts selected
RESPONSES=${RESPONSES:-}              # responses per train prompt to sketch, drawn in each phase; empty: K
CANDIDATES=${CANDIDATES:-1}           # from phase 1 on, fraction of the train prompts with a gradient to
                                      # sketch: those with the best scores in the phase before, and a fifth
                                      # at random
MOMENTUM=${MOMENTUM:-0}               # weight of the phases before in the average of scores; 0: none
KEEP=${KEEP:-0.1}                     # probability of keeping a gradient coordinate in the sketch
DIM=${DIM:-32768}                     # numbers per sketch
RHO_MAX=${RHO_MAX:-inf}               # cap on the ratio rho as a token's weight; inf: none, as in the paper
SKETCH=${SKETCH:-}                    # script or command in place of sketch.py (docs/integrations.md)
TRAINER=${TRAINER:-}                  # script or command in place of train_grpo.py (the same page)
RRF_C=${RRF_C:-0}                     # constant c of reciprocal rank fusion
BATCH=${BATCH:-128}                   # prompts per GRPO step
GROUP=${GROUP:-8}                     # responses per prompt in a GRPO step
DYNAMIC=${DYNAMIC:-}                  # 1: dynamic sampling with any METHOD: further prompts replace those
                                      # whose responses have equal rewards; METHOD=dapo always does this
LR=${LR:-1e-6}                        # AdamW's learning rate, constant
KL_COEF=${KL_COEF:-0.001}             # lambda_KL, the weight of the KL term to the base policy
ENTROPY_COEF=${ENTROPY_COEF:-0.001}   # lambda_H, the weight of the entropy bonus
EVAL_EVERY=${EVAL_EVERY:-10}          # steps between evaluations
EVAL_SAMPLES=${EVAL_SAMPLES:-4}       # sampled responses per test prompt
SAVE_EVERY=${SAVE_EVERY:-50}          # steps between checkpoints within a phase
ENGINE=${ENGINE:-}                    # sampler, hf (transformers) or vllm; empty: vllm on a GPU, else hf
KV_TOKENS=${KV_TOKENS:-}              # tokens in each rank's KV cache; lower it if sampling is out of memory;
                                      # empty: 65536 with ENGINE=hf, 262144 with vllm
BATCH_TOKENS=${BATCH_TOKENS:-}        # tokens per micro-batch; lower it if gradients run out of memory;
                                      # empty: the scripts' default, 4096 on a GPU, else 512
DTYPE=${DTYPE:-float32}               # float32 or bfloat16; training keeps float32 weights in both cases
NPROC=${NPROC:-1}                     # ranks (GPUs) on this machine; more than 1 uses torchrun
SEED=${SEED:-0}                       # random seed

# ---- before the first stage ----------------------------------------------------------------------------
# Most of these functions check knobs. The main function of setup.sh is run_stage FOLDER NAME COMMAND...: it
# runs the command unless FOLDER/seconds.tsv says that NAME is done.
set -f                                # sources such as train[:-100] are no patterns
ROLLOUTS=$RUN/rollouts
check_knobs
choose_engine                         # sets ENGINE
choose_launcher                       # sets launch, which starts a command on NPROC ranks
choose_programs                       # sets sketch and train, the commands of stages 2 and 4
read_methods                          # sets methods
read_data_sets                        # sets val_names, val_sources, val_rollouts, test_sources, test_rollouts
print_plan
lock_folder "$ROLLOUTS" wait
if [ -n "${TOY:-}" ] && [ "$MODEL" = "$TOY/base" ]; then # of presets/toy.sh
    run_stage "$TOY" world "$PYTHON" "$ROOT/toy/make_toy.py" --out "$TOY" --seed "$SEED" --targeted $TARGETED
fi
list_files                            # sets files: the size and time of every local input

# ---- stage 1, once: rollouts of the base policy --------------------------------------------------------
rollout_knobs="MODEL TRAIN VAL TEST PROMPT_KEY ANSWER_KEY INSTRUCTION VERIFIER VAL_LIMIT K K_VAL TEMPERATURE
    MAX_NEW_TOKENS ENGINE DTYPE SEED"
training_knobs="PHASES STEPS TRAINER BATCH GROUP DYNAMIC TRAIN_TEMPERATURE LR KL_COEF ENTROPY_COEF EVAL_EVERY
    EVAL_SAMPLES EVAL_TEMPERATURE SAVE_EVERY"
[ "$STEPS" -gt 0 ] || training_knobs= # a selection only
record_settings "$ROLLOUTS" $rollout_knobs

collect() { # NAME K ARGUMENT...
    local name=$1
    local k=$2
    shift 2
    run_stage "$ROLLOUTS" "$name" "${launch[@]}" "$ROOT/collect.py" --model "$MODEL" --k "$k" \
        --temperature "$TEMPERATURE" --max-new-tokens "$MAX_NEW_TOKENS" --verifier "$VERIFIER" \
        --prompt-key $PROMPT_KEY --answer-key $ANSWER_KEY --instruction "$INSTRUCTION" \
        --engine "$ENGINE" ${KV_TOKENS:+--kv-tokens "$KV_TOKENS"} --dtype "$DTYPE" --seed "$SEED" "$@"
}

# The cheapest first: a wrong source ends the run before the train prompts are sampled.
if [ ${#test_sources[@]} -gt 0 ]; then
    collect test 0 --data "${test_sources[@]}" --out "${test_rollouts[@]}"
fi
collect val "$K_VAL" --limit "$VAL_LIMIT" --data "${val_sources[@]}" --out "${val_rollouts[@]}"
collect train "$K" --data $TRAIN --out "$ROLLOUTS/train.pt"

# ---- stages 2 to 4, in each phase: sketch, score, train ------------------------------------------------
run_method() { # METHOD
    local method=$1
    local folder=$RUN/$method
    local policy=$MODEL # theta(m): the base policy at first
    local optimizer=()  # AdamW's state, kept across phases
    local objective=()
    local before=() average=() # scores of the phase before, for sketch.py and score.py; none in phase 0
    local m phase name val_sketches
    lock_folder "$folder" refuse
    record_settings "$folder" $rollout_knobs ALPHA RESPONSES CANDIDATES MOMENTUM KEEP DIM RHO_MAX SKETCH \
        RRF_C $training_knobs
    if [ "$method" = dapo ]; then
        objective=(--dynamic-sampling --token-mean)
    elif [ -n "$DYNAMIC" ]; then
        objective=(--dynamic-sampling)
    fi
    for ((m = 0; m < PHASES; m++)); do
        phase=$folder/phase-$m
        echo "== $method, phase $m of $PHASES =="
        make_folder "$phase"

        if [ "$method" = influence ] && [ "$m" -gt 0 ]; then # it selects once
            run_stage "$folder" "phase-$m-score" cp "$folder/phase-0/selected.npy" "$phase/selected.npy"
        elif [ "$method" = influence ] || [ "$method" = cropi ]; then
            val_sketches=()
            for name in "${val_names[@]}"; do
                val_sketches+=("$phase/$name.npy")
            done
            run_stage "$folder" "phase-$m-sketch" "${sketch[@]}" \
                --model "$policy" --rollouts "$ROLLOUTS/train.pt" "${val_rollouts[@]}" \
                --out "$phase/train.npy" "${val_sketches[@]}" --keep "$KEEP" --dim "$DIM" \
                ${RESPONSES:+--responses "$RESPONSES"} ${before[@]+"${before[@]}"} --rho-max "$RHO_MAX" \
                ${BATCH_TOKENS:+--batch-tokens "$BATCH_TOKENS"} --dtype "$DTYPE" --seed "$SEED"
            run_stage "$folder" "phase-$m-score" "$PYTHON" "$ROOT/score.py" --train "$phase/train.npy" \
                --val "${val_sketches[@]}" --out "$phase/selected.npy" --alpha "$ALPHA" --rrf-c "$RRF_C" \
                ${average[@]+"${average[@]}"}
            before=(--candidates "$CANDIDATES" --scores "$phase/scores.npy")
            average=(--momentum "$MOMENTUM" --previous "$phase/scores.npy")
        else # the other methods need rewards at most; each phase has its own seed for random choices
            run_stage "$folder" "phase-$m-score" "$PYTHON" "$ROOT/score.py" --method "${method/dapo/full}" \
                --rollouts "$ROLLOUTS/train.pt" --out "$phase/selected.npy" --alpha "$ALPHA" \
                --seed "$((SEED * 1000 + m))"
        fi

        [ "$STEPS" -gt 0 ] || break
        run_stage "$folder" "phase-$m-train" "${train[@]}" \
            --model "$policy" --ref "$MODEL" --rollouts "$ROLLOUTS/train.pt" \
            --select "$phase/selected.npy" --out "$phase/policy" --steps "$STEPS" \
            --batch-size "$BATCH" --group "$GROUP" --lr "$LR" --kl-coef "$KL_COEF" \
            --eval-every "$EVAL_EVERY" --eval-samples "$EVAL_SAMPLES" --save-every "$SAVE_EVERY" \
            --engine "$ENGINE" ${KV_TOKENS:+--kv-tokens "$KV_TOKENS"} \
            ${BATCH_TOKENS:+--batch-tokens "$BATCH_TOKENS"} --dtype "$DTYPE" --seed "$SEED" \
            --entropy-coef "$ENTROPY_COEF" --verifier "$VERIFIER" \
            --train-temperature "$TRAIN_TEMPERATURE" --eval-temperature "$EVAL_TEMPERATURE" \
            ${objective[@]+"${objective[@]}"} ${test_rollouts[@]+--eval "${test_rollouts[@]}"} \
            ${optimizer[@]+"${optimizer[@]}"}
        policy=$phase/policy
        optimizer=(--optimizer "$phase/policy/optimizer.pt")
        [ "$m" -gt 0 ] || print_time_left "$method"
    done
}

folders=()
for method in "${methods[@]}"; do
    run_method "$method"
    folders+=("$RUN/$method")
done
run_every_time "$PYTHON" "$ROOT/plot.py" "${folders[@]}" --out "$RUN"
[ "$STEPS" -gt 0 ] || print_selection
