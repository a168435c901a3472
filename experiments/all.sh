#!/usr/bin/env bash
# Runs every measurement and redraws every figure. Runs whose numbers are in experiments/results/ are not made
# again; but off_policy.py needs the main runs' folders in runs/acceleration. So in a fresh clone first
#   rm -rf experiments/results/{protocol2,protocol2_extras,acceleration,reselection,smollm2}
# and plan a day on two CPU cores. Run it again to resume after an interruption (finished commands are
# recorded in runs/done). Most scripts can redraw their figure alone from the stored numbers; see their
# docstrings.
#
#   bash experiments/all.sh        needs an environment with requirements.txt; installs the compared packages
set -euo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh
"$PYTHON" -m pip install --quiet --no-deps traker trl==1.16.0
"$PYTHON" -m pip install --quiet accelerate scikit-learn
export PYTHON

once() { # COMMAND...: runs it unless an earlier run of it succeeded
    local done
    done=runs/done/$(tr -c 'a-z0-9\n' '-' <<<"${*##*/}")
    if [ ! -e "$done" ]; then
        echo "== $*"
        "$@"
        mkdir -p runs/done
        touch "$done"
    fi
}

once bash run_cropi.sh
once bash experiments/protocol2.sh
once env PART=extras bash experiments/protocol2.sh
once "$PYTHON" experiments/protocol2.py
once "$PYTHON" experiments/cost_model.py
once bash experiments/acceleration.sh pilot
once bash experiments/acceleration.sh
for seed in 0 1 2 3; do once "$PYTHON" experiments/off_policy.py "$seed"; done
once "$PYTHON" experiments/off_policy.py
once "$PYTHON" experiments/selection.py
once "$PYTHON" experiments/similarity.py runs/protocol2/{0,1}/cropi/cropi --out experiments/results/similarity_toy
once bash experiments/acceleration.sh reselection
once "$PYTHON" experiments/train_cost.py
once bash experiments/smollm2.sh
once "$PYTHON" experiments/sketch_cost.py
once "$PYTHON" experiments/folded_compare.py
once "$PYTHON" experiments/sparse_ratio.py toy --dense-numbers 3.5e9
once "$PYTHON" experiments/sparse_ratio.py smollm2 --prompts 50 --seeds 3 --dense-numbers 1e8
