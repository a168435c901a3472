"""Cost of a GRPO step: train_grpo.py against TRL's GRPOTrainer on the same policy, prompts and settings.

Both sample 8 responses to each of 64 prompts with transformers, verify them and make one AdamW update with a
KL term, in float32. Each side first tries several micro-batch sizes and keeps the fastest. The two then
alternate in one process; each starts every round with a fresh policy, and the first step of a round is not
counted. The metric is sampled tokens per second over the whole step.

    pip install trl && python experiments/train_cost.py        after run_cropi.sh (toy); results: trl 1.16.0

Prints each round and writes experiments/results/train_cost.json: speedup_vs_trl and the seconds of each part.
"""

import argparse
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from functools import wraps
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_grpo

PROMPTS, GROUP, LR, KL, ENTROPY = 64, 8, 1e-4, 1e-3, 1e-3  # per step, as in the toy


def timed(function, clock, part, applies=lambda: True):
    """Wraps `function`: adds the seconds of each call to clock[part] if applies() is true."""
    @wraps(function)
    def run(*arguments, **keywords):
        began, counts = time.perf_counter(), applies()
        result = function(*arguments, **keywords)
        clock[part] += counts * (time.perf_counter() - began)
        return result
    return run


def without_gradient():
    return not torch.is_grad_enabled()


def ours(model, rollouts, tokenizer, steps, micro):
    """Our steps: [(sampled tokens, {part: seconds})]. micro: tokens per micro-batch."""
    args = argparse.Namespace(engine="hf", kv_tokens=65536, batch_tokens=micro, kl_coef=KL,
                              entropy_coef=ENTROPY, max_grad_norm=1.0, batch_size=PROMPTS, group=GROUP,
                              dtype="float32",
                              train_temperature=rollouts["meta"]["temperature"], dynamic_sampling=False,
                              token_mean=False, seed=0)
    policy, reference = (train_grpo.load_policy(model, "cpu", "float32") for _ in range(2))
    sampler, state = train_grpo.Sampler(args, "cpu", tokenizer, [rollouts]), train_grpo.State()
    sampler.update(policy)
    optimizer, found = torch.optim.AdamW(policy.parameters(), lr=LR), []
    clock, originals, part = {}, {}, "log-probs of the reference"
    for name in ("response_logits", "token_logprobs"):
        originals[name] = getattr(train_grpo, name)
        setattr(train_grpo, name, timed(originals[name], clock, part, without_gradient))
    for step in range(steps):
        began, clock[part] = time.perf_counter(), 0.0
        state.step = step
        pool = range(len(rollouts["prompts"]))
        groups, row = train_grpo.sample_groups(sampler, rollouts, pool, state, args)
        sampled = time.perf_counter()
        for group in groups:
            group.advantages = train_grpo.group_advantage(torch.tensor(group.rewards))
        train_grpo.grpo_step(policy, reference, optimizer, groups, args)
        ended = time.perf_counter()
        seconds = {"step": ended - began, "sampling and verifying": sampled - began, **clock}
        found.append((row["tokens"], seconds))
    for name, original in originals.items():
        setattr(train_grpo, name, original)
    return found


def trls(model, rollouts, tokenizer, steps, micro):
    """TRL's steps, in the same format as `ours`. micro: responses per micro-batch."""
    clock, tokens, found = {}, [], []
    meta = rollouts["meta"]

    def reward(completions, completion_ids, answer, **_):
        tokens.append(sum(map(len, completion_ids)))
        return [train_grpo.verify(text, gold, meta["verifier"]) for text, gold in zip(completions, answer)]

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.update({"step": -time.perf_counter(), "sampling and verifying": 0.0,
                          "log-probs of the reference": 0.0})
            tokens.clear()

        def on_step_end(self, *_, **__):
            clock["step"] += time.perf_counter()
            found.append((sum(tokens), dict(clock)))

    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            folder, per_device_train_batch_size=micro, gradient_accumulation_steps=PROMPTS * GROUP // micro,
            num_generations=GROUP, max_completion_length=meta["max_new_tokens"],
            temperature=meta["temperature"], top_k=0, top_p=1.0, beta=KL, learning_rate=LR,
            lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=1.0, max_steps=steps,
            loss_type="grpo", use_cpu=True, bf16=False, gradient_checkpointing=False, seed=0, report_to=[],
            logging_strategy="no", save_strategy="no", disable_tqdm=True)
        prompts = [tokenizer.decode(prompt) for prompt in rollouts["prompts"]]
        data = Dataset.from_dict({"prompt": prompts, "answer": rollouts["answers"]})
        policy = train_grpo.load_policy(model, "cpu", "float32")
        trainer = trl.GRPOTrainer(policy, reward, config, train_dataset=data, processing_class=tokenizer,
                                  callbacks=[Clock()])
        for name in ("_generate", "_calculate_rewards"):
            setattr(trainer, name, timed(getattr(trainer, name), clock, "sampling and verifying"))
        trainer._get_per_token_logps_and_entropies = timed(
            trainer._get_per_token_logps_and_entropies, clock, "log-probs of the reference", without_gradient)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return found


def speed(steps):
    """Sampled tokens per second and the mean seconds of each part, without the first step."""
    steps = steps[1:]
    parts = {part: round(statistics.mean(s[part] for _, s in steps), 4) for part in steps[0][1]}
    return {"tokens_a_second": round(sum(t for t, _ in steps) / sum(s["step"] for _, s in steps), 1),
            "tokens_a_step": round(statistics.mean(t for t, _ in steps), 1), "seconds_a_step": parts}


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--model", type=Path, default=ROOT / "runs/toy/world/base")
    parser.add_argument("--rollouts", type=Path, default=ROOT / "runs/toy/rollouts/train.pt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="per round; the first is a warm-up (6)")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/train_cost.json")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    rollouts, tokenizer = train_grpo.load_rollouts(args.rollouts), train_grpo.load_tokenizer(args.model)
    sides = {"train_grpo.py": (ours, (1024, 2048, 4096, 8192)), "TRL": (trls, (64, 128, 256, 512))}
    best, tried = {}, {}
    for side, (run, sizes) in sides.items():
        tried[side] = {}
        for size in sizes:
            tried[side][size] = speed(run(args.model, rollouts, tokenizer, 4, size))["tokens_a_second"]
        best[side] = max(sizes, key=tried[side].get)
        print(f"{side}: micro-batch {best[side]} of {tried[side]}")
    rounds = []
    for number in range(args.rounds):
        row = {side: speed(run(args.model, rollouts, tokenizer, args.steps, best[side]))
               for side, (run, _) in sides.items()}
        row["speedup"] = round(row["train_grpo.py"]["tokens_a_second"] / row["TRL"]["tokens_a_second"], 3)
        rounds.append(row)
        print(f"round {number + 1}: {json.dumps(row)}")
    ratios = [each["speedup"] for each in rounds]
    results = {"speedup_vs_trl": statistics.median(ratios), "min": min(ratios), "max": max(ratios),
               "micro_batch": best, "tried": tried, "rounds": rounds, "prompts_a_step": PROMPTS,
               "group": GROUP, "lr": LR, "kl_coef": KL,
               "command": " ".join(["python experiments/train_cost.py", *sys.argv[1:]]),
               "versions": {"python": platform.python_version(), "torch": torch.__version__,
                            "transformers": transformers.__version__, "trl": trl.__version__},
               "threads": torch.get_num_threads()}
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"speedup {results['speedup_vs_trl']} ({min(ratios)} to {max(ratios)}); {args.out}")


if __name__ == "__main__":
    main()
