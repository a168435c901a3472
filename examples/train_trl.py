"""Stage 4 of CROPI by TRL's GRPOTrainer: takes train_grpo.py's command line, leaves a checkpoint in --out.

    TRAINER=examples/train_trl.py bash run_cropi.sh                  after .venv/bin/pip install trl==1.16.0
    TRAINER='accelerate launch examples/train_trl.py' MODEL=... bash run_cropi.sh               (never run)

docs/integrations.md says what a trainer must do, and in what this one differs from train_grpo.py.
"""

import os
import shutil
import sys
from pathlib import Path

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_grpo


def as_text(tokenizer, tokens):
    """The text of a prompt. TRL tokenizes it again and adds the first token of tokenizers that have one."""
    whole = tokenizer.decode(tokens)
    for text in (whole, whole.removeprefix(tokenizer.bos_token or "")):
        if tokenizer(text).input_ids == tokens.tolist():
            return text
    train_grpo.fail(repr(whole), "other tokens when it is tokenized again", "the same", "use train_grpo.py")


args = train_grpo.parse_arguments()
if args.out.exists():
    sys.exit()  # the phase is done
if args.dynamic_sampling:
    train_grpo.fail("--dynamic-sampling", "set", "not set", "GRPOTrainer does not replace groups")
part = Path(f"{args.out}.part")  # renamed to --out when it is complete
rollouts = train_grpo.load_rollouts(args.rollouts)
meta = rollouts["meta"]
train_grpo.check_inputs([rollouts], args)  # a verifier of the user's must be named by --verifier
tokenizer = train_grpo.load_tokenizer(args.model)
policy = train_grpo.load_policy(args.model, "cpu", "float32")
policy.generation_config = train_grpo.token_ids(policy.generation_config)  # no sampling settings
policy.config._name_or_path = args.ref or args.model  # from where TRL loads the reference of the KL term

selected = train_grpo.load_selection(args.select, len(rollouts["prompts"]))
seed = train_grpo.stream_seed(args.seed, args.out.parent.name) % 2**31  # --seed is the same in each phase
order = train_grpo.next_prompts(selected, 0, args.steps * args.batch_size, seed)  # of all steps
prompts = [as_text(tokenizer, rollouts["prompts"][i]) for i in order]
data = Dataset.from_dict({"prompt": prompts, "answer": [rollouts["answers"][i] for i in order]})


def reward(completions, answer, **_):
    pairs = zip(completions, answer)
    return [train_grpo.rewards_of([text], gold, meta["verifier"], gold)[0] for text, gold in pairs]


# of a step's responses, each process has a micro-batch of at most --batch-tokens tokens at a time
responses = args.batch_size * args.group // train_grpo.WORLD
if args.batch_size % train_grpo.WORLD:
    train_grpo.fail("--batch-size", args.batch_size, "a multiple of the number of ranks", "change BATCH")
longest = int(rollouts["prompt_lengths"].max()) + meta["max_new_tokens"]
fit = max(1, args.batch_tokens // longest)
micro_batch = max(n for n in range(1, fit + 1) if responses % n == 0)
config = GRPOConfig(
    str(part), max_steps=args.steps, per_device_train_batch_size=micro_batch,
    gradient_accumulation_steps=responses // micro_batch, shuffle_dataset=False, num_generations=args.group,
    temperature=args.train_temperature, top_k=0, max_completion_length=meta["max_new_tokens"],
    loss_type="dapo" if args.token_mean else "grpo", beta=args.kl_coef, entropy_coef=args.entropy_coef,
    use_bias_correction_kl=False, disable_dropout=True, epsilon=train_grpo.CLIP, learning_rate=args.lr,
    lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=args.max_grad_norm, seed=seed,
    bf16=args.dtype == "bfloat16", use_cpu=args.device == "cpu", use_vllm=args.engine == "vllm",
    vllm_max_model_length=longest, vllm_enable_sleep_mode=True, vllm_importance_sampling_correction=False,
    save_steps=args.save_every, save_total_limit=1, logging_steps=1, report_to=[])
trainer = GRPOTrainer(policy, reward, config, train_dataset=data, processing_class=tokenizer)
states = sorted(part.glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime)  # each written last
trainer.train(resume_from_checkpoint=str(states[-1].parent) if states else None)
trainer.save_model()  # with the tokenizer
if trainer.is_world_process_zero():
    os.replace(part, args.out)
    for checkpoint in args.out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
