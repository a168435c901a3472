# Close to the paper's main experiment: Qwen2.5-1.5B-Instruct on GSM8K, MATH and DeepScaleR (59,588 prompts).
# GSM8K and MATH are targeted; the other four test sets show what happens to harder mathematics.
#
#   PRESET=presets/qwen2.5-1.5b.sh NPROC=8 bash run_cropi.sh
#   METHOD=full PRESET=presets/qwen2.5-1.5b.sh NPROC=8 bash run_cropi.sh      full-data GRPO in the same loop
#   DRY_RUN=1 PRESET=presets/qwen2.5-1.5b.sh bash run_cropi.sh                prints the commands only
#
# From the paper: the model, the data sets, K, K_VAL, TEMPERATURE, VAL_LIMIT, ALPHA, KEEP, DIM, BATCH, GROUP,
# LR, KL_COEF, the length limit and 1000 steps. ENTROPY_COEF: the paper's or its release's. Assumed: the
# release sets no temperature for RL, which in its framework (verl) means TRAIN_TEMPERATURE=1 and greedy
# validation, EVAL_TEMPERATURE=0. Ours: the copies of the data sets on the hub, none of which was loaded here
# (columns and sizes are those that other public code names); MATH-500 as MATH's test set; the wording of the
# instruction; 10 phases of 100 steps.
#
# Validation: the last 100 train problems of GSM8K and of MATH, which leave the pool. Tests are whole: GSM8K
# 1319, MATH 500, Gaokao 2023 EN 385, AMC23 40, OlympiadBench 674 (open-ended, text only, English) and AIME24
# 30 problems. OlympiadBench's answers are lists: they are joined by commas, and math-verify compares them.
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
#   evaluation    21 x 2,948 test prompts x 500 tokens / 15,000                           0.6 GPU hours
# The total is 35 GPU hours, or about 4.4 hours on 8 GPUs if every stage scales perfectly.
# Disk: 2 GB of rollouts. Each of the 10 phases adds 59,588 x 32768 x 4 bytes = 7.8 GB of sketches and
# 12P bytes = 18.5 GB for the policy and the optimizer in float32. The total is 265 GB, plus 19 GB for
# checkpoints during training.
MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
TRAIN=${TRAIN:-"openai/gsm8k:main:train[:-100] \
nlile/hendrycks-MATH-benchmark::train[:-100] \
agentica-org/DeepScaleR-Preview-Dataset"}
VAL=${VAL:-'gsm8k=openai/gsm8k:main:train[-100:] math=nlile/hendrycks-MATH-benchmark::train[-100:]'}
TEST=${TEST:-'gsm8k_test=openai/gsm8k:main:test math500=HuggingFaceH4/MATH-500::test
gaokao2023=MARIO-Math-Reasoning/Gaokao2023-Math-En::train amc23=math-ai/amc23::test
olympiadbench=Hothan/OlympiadBench:OE_TO_maths_en_COMP:train aime24=HuggingFaceH4/aime_2024::train'}
ANSWER_KEY=${ANSWER_KEY:-final_answer answer solution}
INSTRUCTION=${INSTRUCTION:-' Please reason step by step, and put your final answer within \boxed{}.'}
RUN=${RUN:-runs/qwen2.5-1.5b}
K=${K:-8} K_VAL=${K_VAL:-32} VAL_LIMIT=${VAL_LIMIT:-100} MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-2048}
TEMPERATURE=${TEMPERATURE:-0.5}
TRAIN_TEMPERATURE=${TRAIN_TEMPERATURE:-1.0} EVAL_TEMPERATURE=${EVAL_TEMPERATURE:-0}
ALPHA=${ALPHA:-0.1} KEEP=${KEEP:-0.1} DIM=${DIM:-32768} PHASES=${PHASES:-10} STEPS=${STEPS:-100}
BATCH=${BATCH:-128} GROUP=${GROUP:-8} LR=${LR:-1e-6}
KL_COEF=${KL_COEF:-0.001} ENTROPY_COEF=${ENTROPY_COEF:-0.001}
EVAL_EVERY=${EVAL_EVERY:-50} SAVE_EVERY=${SAVE_EVERY:-25}
DTYPE=${DTYPE:-bfloat16}
KV_TOKENS=${KV_TOKENS:-1000000}  # 29 GB of vLLM's KV cache on each GPU
