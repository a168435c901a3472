# The paper's experiment with DeepSeek-R1-Distill-Qwen-1.5B: responses of up to 8192 tokens, 300 steps; Gaokao
# 2023 EN, AMC23, OlympiadBench and AIME24 are targeted.
#
#   PRESET=presets/r1-distill-qwen-1.5b.sh NPROC=8 bash run_cropi.sh
#
# From the paper: the model, the data sets, the length limit, the steps, and what qwen2.5-1.5b.sh takes from
# it. That these four sets are targeted was worked out from the averages in the paper's table. From the
# release, and assumed: as in qwen2.5-1.5b.sh. Ours: the copies on the hub, none of which was loaded here, 3
# phases of 100 steps, and how the four sets are divided, which have no train problems.
#
# Validation: the first 100 of Gaokao's 385 and of OlympiadBench's 674 problems, 20 of AMC23's 40, 15 of
# AIME24's 30. Test: the others (285, 574, 20 and 15), and GSM8K 1319, MATH 500. 15 and 20 problems are few,
# for validation and for a test: set VAL and TEST to larger sources if you have them. Answers that are lists
# are joined by commas. The pool is that of qwen2.5-1.5b.sh, with all train problems of GSM8K and MATH.
#
# Cost: an ESTIMATE, as in qwen2.5-1.5b.sh, for 4000 tokens per response, 12,000 sampled tokens per second and
# GPU, P = 1.78e9.
#   collection    59,788 x 8 x 4000 tokens / 12,000                                       44 GPU hours, once
#   sketches      3 x 35,870 x (8 x 4000 + 100) tokens x 6P / 2.5e14                      41 GPU hours
#   sampling      300 steps x 128 x 8 x 4000 tokens / 12,000                              28 GPU hours
#   updates       300 x 128 x (8 x 4000 + 100) tokens x 8P / 3.5e14                       14 GPU hours
#   evaluation    7 x 2,713 test prompts x 4000 tokens / 12,000                           1.8 GPU hours
# The total is 129 GPU hours. Disk: 16 GB of rollouts; each of the 3 phases adds 7.8 GB of sketches and 12P =
# 21 GB for the policy and the optimizer: 103 GB, plus 21 GB for checkpoints during training.
MODEL=${MODEL:-deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B}
TRAIN=${TRAIN:-'openai/gsm8k:main:train nlile/hendrycks-MATH-benchmark::train
agentica-org/DeepScaleR-Preview-Dataset'}
VAL=${VAL:-'gaokao2023=MARIO-Math-Reasoning/Gaokao2023-Math-En::train[:100] amc23=math-ai/amc23::test[:20]
olympiadbench=Hothan/OlympiadBench:OE_TO_maths_en_COMP:train[:100]
aime24=HuggingFaceH4/aime_2024::train[:15]'}
TEST=${TEST:-'gsm8k_test=openai/gsm8k:main:test math500=HuggingFaceH4/MATH-500::test
gaokao2023_test=MARIO-Math-Reasoning/Gaokao2023-Math-En::train[100:] amc23_test=math-ai/amc23::test[20:]
olympiadbench_test=Hothan/OlympiadBench:OE_TO_maths_en_COMP:train[100:]
aime24_test=HuggingFaceH4/aime_2024::train[15:]'}
ANSWER_KEY=${ANSWER_KEY:-final_answer answer solution}
INSTRUCTION=${INSTRUCTION:-' Please reason step by step, and put your final answer within \boxed{}.'}
RUN=${RUN:-runs/r1-distill-qwen-1.5b}
K=${K:-8} K_VAL=${K_VAL:-32} VAL_LIMIT=${VAL_LIMIT:-100} MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-8192}
TEMPERATURE=${TEMPERATURE:-0.5}
TRAIN_TEMPERATURE=${TRAIN_TEMPERATURE:-1.0} EVAL_TEMPERATURE=${EVAL_TEMPERATURE:-0}
ALPHA=${ALPHA:-0.1} KEEP=${KEEP:-0.1} DIM=${DIM:-32768} PHASES=${PHASES:-3} STEPS=${STEPS:-100}
BATCH=${BATCH:-128} GROUP=${GROUP:-8} LR=${LR:-1e-6}
KL_COEF=${KL_COEF:-0.001} ENTROPY_COEF=${ENTROPY_COEF:-0.001}
EVAL_EVERY=${EVAL_EVERY:-50} SAVE_EVERY=${SAVE_EVERY:-25}
DTYPE=${DTYPE:-bfloat16}
KV_TOKENS=${KV_TOKENS:-1000000}    # 29 GB of vLLM's KV cache on each GPU
BATCH_TOKENS=${BATCH_TOKENS:-8192}  # activations 24 GB, logits 30 GB; with 16384, twice that, it would not fit
