# The paper's main experiment: Qwen2.5-1.5B-Instruct on GSM8K, MATH and DeepScaleR (59,588 prompts). The
# validation sets are from GSM8K and MATH.
#
#   PRESET=presets/qwen2.5-1.5b.sh NPROC=8 bash run_cropi.sh
#   METHOD=full PRESET=presets/qwen2.5-1.5b.sh NPROC=8 bash run_cropi.sh      full-data GRPO in the same loop
#
# From the paper: the model, the data, K, K_VAL, TEMPERATURE, VAL_LIMIT, ALPHA, KEEP, DIM, BATCH, GROUP, LR,
# KL_COEF, ENTROPY_COEF, the length limit and 1000 steps. Our choices: the copies of the data sets on the hub, the last 100
# train problems as a validation set (test sets are used for evaluation only), the wording of the instruction,
# and 10 phases of 100 steps.
#
# Cost: an ESTIMATE; this preset has not been run. Assumptions: H100 GPUs; 500 tokens per response and 100 per
# prompt; vLLM samples 15,000 tokens per second and GPU; sketching reaches 25% and updates 35% of 989 TFLOP/s
# (bf16); 60% of the prompts have unequal rewards; P = 1.54e9 parameters; 6P FLOP per token for a forward and
# backward pass, 2P for a forward pass.
#   collection    59,588 x 8 x 500 = 2.4e8 tokens / 15,000                                4.4 GPU hours, once
#   sketches      10 x 35,750 x (8 x 500 + 100) tokens x 6P / 2.5e14                      15 GPU hours
#   sampling      1000 steps x 128 x 8 x 500 tokens / 15,000                              9.5 GPU hours
#   updates       1000 x 128 x (8 x 500 + 100) tokens x 8P / 3.5e14                       5.1 GPU hours
#                 (8P: policy and reference)
#   evaluation    21 x 1,819 test prompts x 5 responses x 500 tokens / 15,000             1.8 GPU hours
# The total is 36 GPU hours, or about 4.5 hours on 8 GPUs if every stage scales perfectly.
# Disk: 2 GB of rollouts. Each of the 10 phases adds 59,588 x 32768 x 4 bytes = 7.8 GB of sketches and
# 12P bytes = 18.5 GB for the policy and the optimizer in float32. The total is 265 GB, plus 37 GB for
# checkpoints during training.
MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
TRAIN=${TRAIN:-"openai/gsm8k:main:train[:-100] \
nlile/hendrycks-MATH-benchmark::train[:-100] \
agentica-org/DeepScaleR-Preview-Dataset"}
VAL=${VAL:-'gsm8k=openai/gsm8k:main:train[-100:] math=nlile/hendrycks-MATH-benchmark::train[-100:]'}
TEST=${TEST:-'gsm8k_test=openai/gsm8k:main:test math500=HuggingFaceH4/MATH-500::test'}
INSTRUCTION=${INSTRUCTION:-' Please reason step by step, and put your final answer within \boxed{}.'}
RUN=${RUN:-runs/qwen2.5-1.5b}
K=${K:-8} K_VAL=${K_VAL:-32} VAL_LIMIT=${VAL_LIMIT:-100}
TEMPERATURE=${TEMPERATURE:-0.5} MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-2048}
ALPHA=${ALPHA:-0.1} KEEP=${KEEP:-0.1} DIM=${DIM:-32768} PHASES=${PHASES:-10} STEPS=${STEPS:-100}
BATCH=${BATCH:-128} GROUP=${GROUP:-8} LR=${LR:-1e-6}
KL_COEF=${KL_COEF:-0.001} ENTROPY_COEF=${ENTROPY_COEF:-0.001}
EVAL_EVERY=${EVAL_EVERY:-50} EVAL_SAMPLES=${EVAL_SAMPLES:-4} SAVE_EVERY=${SAVE_EVERY:-25}
DTYPE=${DTYPE:-bfloat16}
KV_TOKENS=${KV_TOKENS:-1000000}  # 29 GB of vLLM's KV cache on each GPU
