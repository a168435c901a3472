# The paper's main experiment: Qwen2.5-1.5B-Instruct on GSM8K, MATH and DeepScaleR (59,588 prompts), aimed at GSM8K and MATH.
#
#   PRESET=presets/qwen2.5-1.5b.sh NPROC=8 bash run_cropi.sh                 METHOD=full for full-data GRPO in the same loop
#
# From the paper: model, data, K, K_VAL, TEMPERATURE, VAL_LIMIT, ALPHA, KEEP, DIM, BATCH, GROUP, LR, KL_COEF, the length limit
# and 1000 steps. Ours: the copies of the data sets on the hub, the last 100 train problems as a validation set (the test sets
# are only evaluated on), the wording of the instruction, and 10 phases of 100 steps.
#
# What it will cost: an ESTIMATE, never run here. Assumed: H100s, 500 tokens a response and 100 a prompt, vLLM at 15,000 sampled
# tokens a second and GPU, sketching at 25% and updates at 35% of 989 TFLOP/s (bf16), 60% of the prompts with unequal rewards;
# P = 1.54e9 parameters, 6P FLOP a token for forward and backward, 2P for a forward pass.
#   collection    59,588 x 8 x 500 = 2.4e8 tokens / 15,000                                            4.4 GPU hours, once
#   sketches      10 x 35,750 x (8 x 500 + 100) tokens x 6P / 2.5e14                                  15 GPU hours
#   sampling      1000 steps x 128 x 8 x 500 tokens / 15,000                                          9.5 GPU hours
#   updates       1000 x 128 x 8 x 600 tokens x 10P (policy, reference, checkpointing) / 3.5e14       7.5 GPU hours
#   evaluation    21 x 1,819 test prompts x 5 responses x 500 tokens / 15,000                         1.8 GPU hours
# together 38 GPU hours: about 5 hours on 8 GPUs, if all scales. Disk: rollouts 2 GB; a phase's sketches 59,588 x 32768 x 4
# bytes = 7.8 GB, its policy and optimizer in float32 12 P = 18.5 GB: 265 GB in 10 phases, and 37 GB for checkpoints on the way.
MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
TRAIN=${TRAIN:-'openai/gsm8k:main:train[:-100] nlile/hendrycks-MATH-benchmark::train[:-100] agentica-org/DeepScaleR-Preview-Dataset'}
VAL=${VAL:-'gsm8k=openai/gsm8k:main:train[-100:] math=nlile/hendrycks-MATH-benchmark::train[-100:]'}
TEST=${TEST:-'gsm8k_test=openai/gsm8k:main:test math500=HuggingFaceH4/MATH-500::test'}
INSTRUCTION=${INSTRUCTION:-' Please reason step by step, and put your final answer within \boxed{}.'}
RUN=${RUN:-runs/qwen2.5-1.5b}
K=${K:-8} K_VAL=${K_VAL:-32} TEMPERATURE=${TEMPERATURE:-0.5} VAL_LIMIT=${VAL_LIMIT:-100} MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-2048}
ALPHA=${ALPHA:-0.1} KEEP=${KEEP:-0.1} DIM=${DIM:-32768} PHASES=${PHASES:-10} STEPS=${STEPS:-100}
BATCH=${BATCH:-128} GROUP=${GROUP:-8} LR=${LR:-1e-6} KL_COEF=${KL_COEF:-0.001}
EVAL_EVERY=${EVAL_EVERY:-50} EVAL_SAMPLES=${EVAL_SAMPLES:-4} SAVE_EVERY=${SAVE_EVERY:-25}
DTYPE=${DTYPE:-bfloat16} GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING-1}
KV_TOKENS=${KV_TOKENS:-1000000}  # 29 GB of keys and values in vLLM
