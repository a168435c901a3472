# What surrounds the method. run_cropi.sh, the tests and the experiments source this file.
#
# The functions are for run_cropi.sh. They check the knobs, run a stage once and time it, keep the settings of
# a run together, and stop two runs from writing to one folder. The commands after them, at the end, find or
# make the Python that runs everything.
#
# A reader who skips this file misses no part of CROPI: every command of a run stands in run_cropi.sh. What is
# missed is how a stopped run resumes, where its seconds and settings are stored, and how .venv is made.

die() { # MESSAGE...: reports an error and exits
    echo "run_cropi.sh: error: $*" >&2
    exit 2
}

# ---- before a run --------------------------------------------------------------------------------------

load_preset() { # reads PRESET, a file in the current folder or else in the project's folder
    local file=$PRESET
    [ -f "$file" ] || file=$ROOT/$PRESET
    [ -f "$file" ] || die "PRESET $PRESET: no such file; name an existing one: presets/qwen2.5-1.5b.sh, say"
    . "$(dirname "$file")/$(basename "$file")" # with a slash: bash looks for a plain name in PATH
}

# A wrong knob ends the run here, not hours later in the stage that reads it. Some shells export GROUP, say.
check_knobs() {
    local whole='(0|[1-9][0-9]*)'
    local number='([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?'
    local share="$number|$whole/$whole"
    check_each "a whole number above 0" "$whole" "x > 0" K K_VAL VAL_LIMIT MAX_NEW_TOKENS PHASES DIM \
        BATCH EVAL_EVERY EVAL_SAMPLES SAVE_EVERY NPROC ${KV_TOKENS:+KV_TOKENS} ${BATCH_TOKENS:+BATCH_TOKENS}
    check_each "a whole number above 1" "$whole" "x > 1" GROUP ${RESPONSES:+RESPONSES}
    check_each "1, or nothing" 1 "x == 1" ${DYNAMIC:+DYNAMIC}
    check_each "a whole number" "$whole" "x >= 0" SEED STEPS
    check_each "a number above 0" "$number" "x > 0" TEMPERATURE TRAIN_TEMPERATURE
    check_each "a number, 0 or more" "$number" "x >= 0" EVAL_TEMPERATURE RRF_C LR KL_COEF ENTROPY_COEF
    [ "$RHO_MAX" = inf ] || check_each "a number above 0, or inf" "$number" "x > 0" RHO_MAX
    check_each "a number above 0, at most 1" "$number" "x > 0 && x <= 1" KEEP
    check_each "a number, 0 or more, below 1" "$number" "x >= 0 && x < 1" MOMENTUM
    check_each "a share above 0, at most 1, such as 0.1 or 1/10" "$share" "x > 0 && x <= 1" ALPHA
    check_each "a share from ALPHA ($ALPHA) to 1" "$share" "x >= $ALPHA && x <= 1" CANDIDATES
}

# check_each EXPECTED PATTERN CONDITION NAME...: each knob has the form of the pattern and meets the condition
check_each() {
    local expected=$1
    local pattern="^($2)$"
    local condition=$3
    local name
    shift 3
    for name in "$@"; do
        if ! [[ ${!name} =~ $pattern ]] ||
            ! awk "BEGIN { x = ${!name}; exit !($condition) }" 2>/dev/null; then
            die "$name: found ${!name}; expected $expected; set or unset $name in the environment"
        fi
    done
}

read_methods() { # makes the array methods: BASELINE's and METHOD's, each once
    local method
    methods=()
    [ "$STEPS" -gt 0 ] || BASELINE= # a selection only
    for method in $BASELINE $METHOD; do
        case $method in
        full | dapo | random | passrate | learnability | influence | cropi) ;;
        *)
            die "METHOD $method: unknown method; expected full, dapo, random, passrate, learnability," \
                "influence or cropi; set METHOD and BASELINE to these names"
            ;;
        esac
        case " ${methods[*]-} " in
        *" $method "*) ;;
        *) methods+=("$method") ;;
        esac
    done
    [ ${#methods[@]} -gt 0 ] || die "METHOD: found no name; expected one such as cropi; set METHOD"
}

# From VAL and TEST, which are name=source pairs, makes the arrays val_names, val_sources, val_rollouts,
# test_sources and test_rollouts. The last of each are the files of the rollouts.
read_data_sets() {
    local pair twice
    if ! [[ $TRAIN =~ [^[:space:]] && $VAL =~ [^[:space:]] ]]; then
        die "MODEL is set but TRAIN or VAL is not; set both as in the example of README.md"
    fi
    for pair in $VAL $TEST; do
        if ! [[ $pair =~ ^[^=/]+=.+$ ]]; then
            die "VAL, TEST: found $pair; expected name=source, and no slash in the name; name each source"
        fi
    done
    val_names=()
    val_sources=()
    val_rollouts=()
    for pair in $VAL; do
        val_names+=("val_${pair%%=*}")
        val_sources+=("${pair#*=}")
        val_rollouts+=("$ROLLOUTS/val_${pair%%=*}.pt")
    done
    test_sources=()
    test_rollouts=()
    for pair in $TEST; do
        test_sources+=("${pair#*=}")
        test_rollouts+=("$ROLLOUTS/${pair%%=*}.pt")
    done
    twice=$(printf '%s\n' "$ROLLOUTS/train.pt" "${val_rollouts[@]}" \
        ${test_rollouts[@]+"${test_rollouts[@]}"} | sort | uniq -d)
    if [ -n "$twice" ]; then
        die "VAL, TEST: two sets for the file" $twice "; expected different names; rename one"
    fi
}

choose_engine() { # makes the default of ENGINE explicit
    if [ -z "$ENGINE" ] && [ -n "$GPU" ]; then
        ENGINE=vllm
        if [ -z "$DRY_RUN" ]; then
            echo "ENGINE=vllm is the default on a GPU, but was tested on CPUs only; if it fails, set ENGINE=hf"
        fi
    fi
    ENGINE=${ENGINE:-hf}
}

# Makes the array launch, the start of a command that runs on NPROC ranks. On Ctrl-C a rank finishes its step
# and saves a checkpoint before it is killed: hence the long timeout. Only this launcher may tell a stage its
# rank: with RANK=1 left in the environment, a stage would leave its work to another rank.
choose_launcher() {
    unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT
    launch=("$PYTHON")
    if [ "$NPROC" -ne 1 ]; then
        launch+=(-m torch.distributed.run --standalone --nproc_per_node "$NPROC" --shutdown_timeout 1800)
    fi
}

# Makes the arrays sketch and train, the commands of stages 2 and 4: the project's scripts, SKETCH or TRAINER.
# The folder of PYTHON comes first in PATH, so that a command such as torchrun is that of PYTHON.
choose_programs() {
    if [[ $PYTHON = */* ]] && [ -d "${PYTHON%/*}" ]; then
        PATH=$(cd "${PYTHON%/*}" && pwd):$PATH
    fi
    choose_program SKETCH "$ROOT/sketch.py"
    sketch=("${program[@]}")
    choose_program TRAINER "$ROOT/train_grpo.py"
    train=("${program[@]}")
}

# choose_program KNOB DEFAULT: makes the array program. A script runs like a stage, with PYTHON on NPROC ranks.
# Otherwise the knob is a command, such as 'torchrun --nproc_per_node 8 my.py', and starts its ranks itself.
choose_program() {
    local value=${!1}
    local words=($value)
    if [ -z "$value" ]; then
        program=("${launch[@]}" "$2")
    elif [ -f "$value" ]; then
        program=("${launch[@]}" "$value")
    elif [ ${#words[@]} -gt 1 ] && command -v "${words[0]}" >/dev/null; then
        program=("${words[@]}")
    else
        die "$1 $value: found no such file or command; expected a Python script or a command of several" \
            "words; set $1 to one"
    fi
}

print_plan() { # what the run does, and what it writes
    [ -z "$DRY_RUN" ] || return 0
    if [ "$STEPS" -eq 0 ]; then
        echo "$MODEL: $METHOD selects once; nothing is trained; files: $RUN; commands: $RUN/commands.txt"
        return 0
    fi
    echo "$MODEL: ${BASELINE:+$BASELINE and }$METHOD, $PHASES phases of $STEPS GRPO steps"
    echo "  once: collect $K responses per train prompt and $K_VAL per validation prompt"
    echo "  in each phase: select (influence, cropi: sketch, score; ALPHA = $ALPHA), train"
    echo "  files: $RUN/rollouts and $RUN/METHOD/phase-m; the command of every stage: $RUN/commands.txt"
    echo "  disk, each phase: 12 bytes per parameter, $((4 * DIM / 1024)) kB per sketched prompt;" \
        "while it trains more than $SAVE_EVERY steps, 12 bytes per parameter more"
}

# ---- during a run --------------------------------------------------------------------------------------

make_folder() { # FOLDER
    [ -n "$DRY_RUN" ] || mkdir -p "$1" 2>/dev/null || die_unwritten "$1"
}

# replace_file FILE TEXT: where the disk is full, it fails and FILE stays as it was, never empty or cut
replace_file() {
    { printf '%s\n' "$2" >"$1.part" && mv -f "$1.part" "$1"; } 2>/dev/null
}

die_unwritten() { # FILE
    die "$1: could not be written; expected space and permission; free space, or set RUN to another folder"
}

# lock_folder FOLDER wait|refuse: what to do while another run_cropi.sh writes to FOLDER. Methods of one RUN
# may run side by side: each locks its own folder, and the first one collects. The stages of a killed run hold
# its lock until they have exited, so try for 5 seconds.
lock_folder() {
    local folder=$1
    local otherwise=$2
    [ -z "$DRY_RUN" ] || return 0
    make_folder "$folder"
    touch "$folder/lock" 2>/dev/null || die_unwritten "$folder/lock"
    exec 9>"$folder/lock"
    if ! command -v flock >/dev/null || flock -w 5 9; then
        return 0
    fi
    if [ "$otherwise" != wait ]; then
        die "another run_cropi.sh is running in $folder; wait until it ends or set RUN to another folder"
    fi
    echo "waiting for another run_cropi.sh that writes to $folder"
    flock 9
}

# list_files: sets files, a line for each local file of MODEL, VERIFIER and the data sets: its size and its
# time of change. (A hash of large weights takes minutes.) cp -p and rsync -a keep the times in a copy.
list_files() {
    [ -z "$DRY_RUN" ] || return 0
    files=$(PYTHONIOENCODING=utf-8:surrogateescape "$PYTHON" -c '
import sys, time
from pathlib import Path
for name in sys.argv[1:]:
    path = Path(name if Path(name).exists() else name.partition(":")[0])  # of file.py:function, folder:config
    for file in sorted([path, *path.glob("*"), *path.glob("data/*")]):
        if file.is_file() and not file.name.startswith("."):
            changed = time.gmtime(file.stat().st_mtime)
            print(file, file.stat().st_size, "bytes", time.strftime("%Y-%m-%dT%H:%M:%SZ", changed))
' "$MODEL" "$VERIFIER" $TRAIN "${val_sources[@]}" ${test_sources[@]+"${test_sources[@]}"})
}

# record_settings FOLDER NAME...: writes the named knobs to FOLDER/settings.txt and files to FOLDER/files.txt.
# If these exist with other contents, stops with an error; only the knobs of training, which STEPS=0 leaves out,
# may be added later. All of RUN depends on the rollouts, so the hint for these is to remove RUN.
record_settings() {
    local folder=$1
    local file=$1/settings.txt
    local text=
    local name stored
    [ -z "$DRY_RUN" ] || return 0
    shift
    for name in "$@"; do
        text="$text$name=${!name}"$'\n'
    done
    text=${text%$'\n'}
    stored=$(cat "$file" 2>/dev/null || true)
    if [ -n "$stored" ] && [ "$STEPS" -eq 0 ] && [[ $stored = "$text"$'\n'* ]]; then
        text=$stored # this selection has been trained on
    elif [ -n "$stored" ] && [[ $text = "$stored"$'\n'PHASES=* ]]; then
        replace_file "$file" "$text" || die_unwritten "$file" # it was made with STEPS=0; now it is trained on
    fi
    record "$file" "$text" "use the stored settings, remove ${folder%/rollouts}"
    record "$folder/files.txt" "$files" \
        "if the contents are the same, remove only $folder/files.txt; else remove ${folder%/rollouts}"
}

record() { # FILE TEXT HINT
    [ -s "$1" ] || replace_file "$1" "$2" || die_unwritten "$1"
    if [ "$2" != "$(cat "$1")" ]; then
        die "$1 differs from what this run has (< stored, > requested):" \
            "$(printf '%s\n' "$2" | diff "$1" - | grep '^[<>]' | tr '\n' ' ');" \
            "$3, or set RUN to another folder"
    fi
}

# run_stage FOLDER NAME COMMAND...: runs a command unless it is done, and adds it to RUN/commands.txt. A
# command that succeeds is recorded as done in FOLDER/seconds.tsv, with its seconds. Those of an attempt that
# fails or is stopped (but not by SIGKILL) are kept until then in FOLDER/NAME.seconds.
run_stage() {
    local folder=$1
    local name=$2
    local line rows
    shift 2
    if [ -n "$DRY_RUN" ]; then
        echo "+$(printf ' %q' "$@")"
        return 0
    fi
    if grep -q "^$name	" "$folder/seconds.tsv" 2>/dev/null; then
        return 0
    fi
    line=$(printf '%q ' "$@")
    if ! grep -qxF -- "$line" "$RUN/commands.txt" 2>/dev/null; then
        { printf '%s\n' "$line" >>"$RUN/commands.txt"; } 2>/dev/null || die_unwritten "$RUN/commands.txt"
    fi
    make_folder "$folder"
    began=$("$PYTHON" -c 'import time; print(time.time())') # not local: the trap needs both
    attempts=$folder/$name.seconds
    trap 'replace_file "$attempts" "$(stage_seconds)" || true' EXIT
    "$@"
    case $name in
    phase-*-sketch) [ -z "$SKETCH" ] || check_output SKETCH "$@" ;;
    phase-*-train) [ -z "$TRAINER" ] || check_output TRAINER "$@" ;;
    esac
    rows=$(cat "$folder/seconds.tsv" 2>/dev/null || true; printf '%s\t%s' "$name" "$(stage_seconds)")
    replace_file "$folder/seconds.tsv" "$rows" || die_unwritten "$folder/seconds.tsv"
    trap - EXIT
    rm -f "$attempts"
}

# check_output KNOB COMMAND...: a user's program that ends well must have written what follows its --out,
# sketches or a checkpoint. If it has not, the stage is not done, and the same command starts it again.
check_output() {
    local knob=$1
    while [ "$1" != --out ]; do
        shift
    done
    shift
    while [ $# -gt 0 ] && [[ $1 != --* ]]; do
        if [ "$knob" = SKETCH ] && [ ! -f "$1" ]; then
            die "SKETCH $SKETCH: found no $1; expected a sketch with its .json; correct the program"
        fi
        if [ "$knob" = TRAINER ] && ! is_checkpoint "$1"; then
            die "TRAINER $TRAINER: found no checkpoint in $1; expected config.json, *.safetensors of a whole" \
                "model and tokenizer_config.json; correct the program"
        fi
        shift
    done
}

is_checkpoint() { # FOLDER
    [ -f "$1/config.json" ] && [ -f "$1/tokenizer_config.json" ] &&
        [ -n "$(find "$1" -maxdepth 1 -name 'model*.safetensors')" ]
}

stage_seconds() { # wall-clock seconds of the current stage, with those of its earlier attempts
    local earlier
    earlier=$(cat "$attempts" 2>/dev/null || echo 0)
    "$PYTHON" -c "import time; print(round(time.time() - $began + $earlier, 2))"
}

print_selection() { # the last lines of a run with STEPS=0
    local phase=$RUN/$METHOD/phase-0
    [ -z "$DRY_RUN" ] || return 0
    echo "$phase/selected.npy: the selected prompts; numpy.load gives their places in TRAIN, counted from 0"
    echo "$ROLLOUTS/train.pt: tokens, answers and rewards of all prompts"
    if [ -f "$phase/scores.npy" ]; then
        echo "$phase/scores.npy: the influence of all prompts on each validation set; the selection is best first"
    fi
    echo "docs/integrations.md makes a data set of them (\"The selection as a data set\"); to train on this" \
        "selection, run the same command with STEPS above 0"
}

run_every_time() { # COMMAND...: runs a command also if an earlier run has done so
    if [ -n "$DRY_RUN" ]; then
        echo "+ $*"
    else
        "$@"
    fi
}

# print_time_left METHOD: after phase 0, how long the further phases will take; influence selects in the first
# phase only
print_time_left() {
    local method=$1
    local seconds=$RUN/$method/seconds.tsv
    local repeated=^phase-0-train
    if [ -n "$DRY_RUN" ] || [ "$PHASES" -eq 1 ]; then
        return 0
    fi
    if grep -q "^phase-$((PHASES - 1))-train" "$seconds"; then # the last phase is done
        return 0
    fi
    if [ "$method" = cropi ]; then
        repeated=^phase-0-
    fi
    awk -v method="$method" -v n="$((PHASES - 1))" -v repeated="$repeated" \
        '/^phase-0-/ { took += $2 } $0 ~ repeated { more += n * $2 / 60 }
        END { printf "%s: phase 0 took %.0f s, ", method, took
              printf "the other %d take about %.1f min\n", n, more }' \
        "$seconds"
}

# ---- the Python ----------------------------------------------------------------------------------------
# Sets ROOT, the project's folder, and PYTHON, the Python of its .venv, which is made on first use, unless the
# user has set PYTHON. If nvidia-smi works, sets GPU=1 and installs vLLM as well. DRY_RUN installs nothing.
ROOT=$(dirname "${BASH_SOURCE[0]}")
PYTHON=${PYTHON:-}
GPU=
requirements=requirements.txt
if nvidia-smi >/dev/null 2>&1; then
    GPU=1
    requirements=requirements-vllm.txt
fi
if [ -n "${DRY_RUN:-}" ]; then
    PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
    return 0
fi
if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: ${PYTHON:-python3} is $("${PYTHON:-python3}" -V 2>&1); expected Python 3.11 or later;" \
        "put one first in PATH, or set PYTHON to one that has requirements.txt" >&2
    exit 2
fi
if [ -z "$PYTHON" ]; then
    PYTHON=$ROOT/.venv/bin/python
    wanted=$(cat "$ROOT/requirements.txt" "$ROOT/$requirements")
    if [ "$wanted" != "$(cat "$ROOT/.venv/installed" 2>/dev/null)" ]; then
        echo "Installing $requirements into .venv (once)"
        python3 -m venv "$ROOT/.venv"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/$requirements"
        echo "$wanted" >"$ROOT/.venv/installed"
    fi
fi
export TOKENIZERS_PARALLELISM=false
