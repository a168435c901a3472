# The toy world of toy/README.md, in which run_cropi.sh runs if MODEL is not set: its knobs.
#
#   bash run_cropi.sh        full-data GRPO and CROPI; 14 minutes on two CPU cores
RUN=${RUN:-runs/toy}
TOY=${TOY:-$RUN/world}            # folder of the toy's data and base policy, made once, from SEED
TARGETED=${TARGETED:-sort dbl}    # its targeted families; if changed, set VAL: NAME=$TOY/val_NAME.jsonl
MODEL=${MODEL:-$TOY/base}
BASELINE=${BASELINE-full}         # BASELINE= for none
TRAIN=${TRAIN:-$TOY/train.jsonl}
VAL=${VAL:-sort=$TOY/val_sort.jsonl dbl=$TOY/val_dbl.jsonl}
TEST=${TEST:-targeted=$TOY/test_targeted.jsonl related=$TOY/test_related.jsonl
    other=$TOY/test_other.jsonl}
VERIFIER=${VERIFIER:-exact}
ENGINE=${ENGINE:-hf}               # also on a GPU: fast enough for so small a policy
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-10}
TEMPERATURE=${TEMPERATURE:-1.0}
K_VAL=${K_VAL:-16}
ALPHA=${ALPHA:-0.03}
DIM=${DIM:-8192}
PHASES=${PHASES:-3}
STEPS=${STEPS:-40}
BATCH=${BATCH:-64}
LR=${LR:-3e-5}
BATCH_TOKENS=${BATCH_TOKENS:-2048}
