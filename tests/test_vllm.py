"""ENGINE=vllm: vLLM samples from the current policy, before the first update and after each one.

If vLLM is not installed, tests/vllm.sh creates an environment with its CPU build for these tests.
"""

import argparse
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, group_logprobs, run_loop, run_script, tiny_qwen

import train_grpo

pytest.importorskip("vllm")
K = "24"  # 24 x 120 = 2880 responses per engine


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """The folder RUN of one phase of the whole loop with vLLM."""
    folder = tmp_path_factory.mktemp("vllm")
    run_loop(folder, world, ENGINE="vllm", BASELINE="", PHASES="1", STEPS="4", K=K, MAX_NEW_TOKENS="5",
             VAL=f"dbl={world}/val_dbl.jsonl")
    return folder


@pytest.fixture(scope="module")
def rollouts(run, world, tmp_path_factory):
    """{engine: the train prompts' rollouts}, sampled with the same settings."""
    hf = tmp_path_factory.mktemp("hf") / "train.pt"
    done = run_script("collect.py", "--model", world / "base", "--data", world / "train.jsonl", "--out", hf,
                      "--k", K, "--max-new-tokens", 5, "--verifier", "exact")
    assert done.returncode == 0, done.stderr
    return {"hf": train_grpo.load_rollouts(hf), "vllm": train_grpo.load_rollouts(run / "rollouts/train.pt")}


def test_every_ratio_is_one_at_the_base_policy(rollouts, world):
    """The engine's log-probs equal the trainer's, temperature included: log rho = 0 to float error."""
    ours, k = rollouts["vllm"], int(K)
    policy = train_grpo.load_policy(world / "base", "cpu", "float32")
    prompts = [prompt for prompt in ours["prompts"] for _ in range(k)]
    logp, mask = group_logprobs(policy, prompts, list(ours["responses"]),
                                ours["meta"]["temperature"])
    assert (logp[mask] - torch.cat(list(ours["logprobs"]))).abs().max() < 1e-4


def test_prompts_and_end_tokens_are_the_same(rollouts):
    for name in ("prompt_tokens", "prompt_lengths"):
        assert torch.equal(rollouts["hf"][name], rollouts["vllm"][name])
    for found in rollouts.values():
        ends, limit, truncated = set(found["meta"]["eos_ids"]), found["meta"]["max_new_tokens"], 0
        for response in found["responses"]:
            assert not ends & set(response[:-1].tolist()) and len(response) <= limit
            truncated += int(response[-1]) not in ends
            assert int(response[-1]) in ends or len(response) == limit
        assert 0 < truncated < len(found["responses"])


@pytest.mark.parametrize("what", ["reward", "length", "log-prob"])
def test_engines_sample_the_same_distribution(rollouts, what):
    """The difference of the means over 2880 responses, summed per prompt, is within four standard errors."""
    values = {}
    for engine, found in rollouts.items():
        of_each = {"reward": found["rewards"].flatten(), "length": found["response_lengths"],
                   "log-prob": torch.stack([logp.sum() for logp in found["logprobs"]])}[what]
        values[engine] = of_each.double().view(-1, int(K))  # [N, K]
    one, other = values["hf"], values["vllm"]
    error = ((one.var(1) + other.var(1)) / int(K)).sum().sqrt()
    assert error > 0 and (one.mean(1) - other.mean(1)).sum().abs() < 4 * error


def steps_of(policy):
    return [json.loads(line) for line in (policy / "metrics.jsonl").read_text().splitlines()][1:]


def test_engine_follows_each_update(run):
    """Trainer's and engine's log-probs of the samples agree after three updates that moved the policy."""
    steps = steps_of(run / "cropi/phase-0/policy")
    assert len(steps) == 4 and all(step["sampling_logp_difference"] < 1e-5 for step in steps)
    assert all(step["kl"] > 1e-4 for step in steps[1:])  # stale weights would give a gap of about sqrt(2 kl)


def test_two_processes_train_the_same(run, world, tmp_path):
    """Two engines with weights sharded by FSDP2 give the metrics of one rank to float error."""
    settings = json.loads((run / "cropi/phase-0/policy/args.json").read_text())
    arguments = []
    for name in ("model", "ref", "rollouts", "select", "steps", "batch_size", "group", "lr", "engine",
                 "eval_every"):
        arguments += [f"--{name.replace('_', '-')}", str(settings[name])]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
                    ROOT / "train_grpo.py", *arguments, "--out", tmp_path / "two"], check=True)
    one, two = steps_of(run / "cropi/phase-0/policy"), steps_of(tmp_path / "two")
    for name in ("reward", "tokens", "kl", "grad_norm"):
        assert [step[name] for step in two] == pytest.approx([step[name] for step in one], rel=1e-4, abs=1e-7)


def test_weights_and_cached_prefixes_are_replaced(tmp_path):
    """One engine samples the same long prompts (whole cache blocks) while the weights, some tied, change."""
    policy = tiny_qwen(tied=True, hidden_size=64, num_key_value_heads=1, num_attention_heads=2,
                       max_position_embeddings=512)
    policy.save_pretrained(tmp_path)
    args = argparse.Namespace(engine="vllm", model=str(tmp_path), dtype="float32", kv_tokens=4096)
    rollouts = {"prompt_lengths": torch.tensor([400]), "meta": {"max_new_tokens": 112}}
    sampler = train_grpo.Sampler(args, "cpu", None, [rollouts])
    seeded = [torch.Generator().manual_seed(i) for i in (0, 1)]
    prompts = [torch.randint(2, 29, (400,), generator=rng).tolist() for rng in seeded]
    repeated = [p for p in prompts for _ in range(8)]
    for update in range(4):
        drawn, logprobs = train_grpo.sample_vllm(sampler.model, prompts, 8, 0.7, 20, [1], [update, 99])
        logp, mask = group_logprobs(policy, repeated, drawn, 0.7)
        flat = torch.tensor([x for row in logprobs for x in row])
        found = torch.zeros_like(logp).masked_scatter_(mask, flat)
        assert len(drawn) == 16 and (logp - found).abs().max() < 1e-3
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        sampler.update(policy)
