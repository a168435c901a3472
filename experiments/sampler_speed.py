"""Tokens per second of collect.py's sampler and of `model.generate` on the same prompts.

`generate` produces what the rollouts need: K responses per prompt from the full softmax (no top-k, no top-p)
and the log-prob of each token, for which it keeps the logits of every step. The two samplers alternate in one
process. Prints the ratio of each round and the median, and writes experiments/results/sampler_speed.json.

    python experiments/sampler_speed.py                        after run_cropi.sh
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import collect
import train_grpo


def ours(policy, prompts, k, temperature, length, eos_ids):
    responses, _ = collect.sample(policy, prompts, k, temperature, length, eos_ids, range(len(prompts)))
    return sum(map(len, responses))


@torch.no_grad()
def generate(policy, prompts, k, temperature, length, eos_ids):
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    done = policy.generate(tokens, attention_mask=mask, do_sample=True, temperature=temperature, top_k=0,
                           top_p=1.0, num_return_sequences=k, max_new_tokens=length, eos_token_id=eos_ids,
                           pad_token_id=eos_ids[0], return_dict_in_generate=True, output_scores=True)
    drawn = done.sequences[:, width:]
    logprobs = policy.compute_transition_scores(done.sequences, done.scores, normalize_logits=True)
    ended = torch.isin(drawn, torch.tensor(eos_ids)).int().cumsum(1)
    real = (ended == 0) | ((ended == 1) & torch.isin(drawn, torch.tensor(eos_ids)))
    assert logprobs[real].isfinite().all()
    return int(real.sum())


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--model", default=ROOT / "runs/toy/world/base")
    parser.add_argument("--rollouts", default=ROOT / "runs/toy/rollouts/train.pt")
    parser.add_argument("--prompts", type=int, default=256, help="prompts per batch (256)")
    parser.add_argument("--max-new-tokens", type=int, help="length limit (that of the rollouts)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    policy = collect.load_policy(args.model, "cpu", "float32")
    rollouts, generator = train_grpo.load_rollouts(args.rollouts), torch.Generator().manual_seed(0)
    meta = rollouts["meta"]
    chosen = torch.randperm(len(rollouts["prompts"]), generator=generator)[:args.prompts]
    prompts = [rollouts["prompts"][i].tolist() for i in chosen]
    length = args.max_new_tokens or meta["max_new_tokens"]
    ratios = []
    for number in range(args.rounds + 1):
        speeds = []
        for sampler in (ours, generate):
            began = time.perf_counter()
            tokens = sampler(policy, prompts, 8, meta["temperature"], length, meta["eos_ids"])
            speeds.append(tokens / (time.perf_counter() - began))
        if number:  # the first round warms up
            ratios.append(speeds[0] / speeds[1])
            print(f"round {number}: ours {speeds[0]:.0f} tokens/s, generate {speeds[1]:.0f} tokens/s, "
                  f"ratio {ratios[-1]:.2f}")
    result = {"command": "python experiments/sampler_speed.py",
              "speedup": round(statistics.median(ratios), 2),
              "rounds": [round(ratio, 2) for ratio in ratios], "prompts": args.prompts, "k": 8,
              "max_new_tokens": length, "torch": torch.__version__, "transformers": transformers.__version__,
              "threads": torch.get_num_threads()}
    (ROOT / "experiments/results/sampler_speed.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"median ratio {result['speedup']} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
