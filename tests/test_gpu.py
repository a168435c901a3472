"""The stages on a CUDA GPU against the same on the CPU. Skipped where there is none."""

import json

import numpy as np
import pytest
import torch
from conftest import group_logprobs
from torch import nn

import collect
import sketch
import train_grpo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_sampled_log_probs(world, tmp_path, call):
    """The log-probs that collect.py stores are those of a float32 forward pass on the CPU, within 1e-4."""
    code, *_ = call(collect, "--model", world / "base", "--data", world / "train.jsonl", "--out",
                    tmp_path / "r.pt", "--k", 4, "--max-new-tokens", 8, "--verifier", "exact", "--limit", 30)
    assert code == 0
    rollouts = sketch.load_rollouts(tmp_path / "r.pt")
    policy = sketch.load_policy(world / "base", "cpu", "float32")
    logp, mask = group_logprobs(policy, rollouts["prompts"], rollouts["responses"], 1.0)
    torch.testing.assert_close(logp[mask], torch.cat(rollouts["logprobs"]), atol=1e-4, rtol=0)


def test_sketches(world, micro_run, tmp_path, call):
    found = {}
    for device in ("cpu", "cuda"):
        code, *_ = call(sketch, "--model", micro_run[0] / "cropi/phase-0/policy", "--rollouts",
                        micro_run[0] / "rollouts/train.pt", "--out", tmp_path / f"{device}.npy",
                        "--device", device)
        assert code == 0
        found[device] = torch.from_numpy(np.load(tmp_path / f"{device}.npy"))
    assert found["cpu"].norm() > 0
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-3, atol=1e-5 * float(found["cpu"].norm()))


def test_bfloat16_gradients_are_summed_in_float32():
    """A Linear's gradients per prompt, from bfloat16 factors, against a float64 product of the same."""
    layer = nn.Linear(96, 80, device="cuda", dtype=torch.bfloat16)
    x, delta = (torch.randn(3, 500, n, device="cuda", dtype=torch.bfloat16) for n in (96, 80))
    weight, bias = (gradient for _, gradient in sketch.prompt_gradients(layer, x, delta))
    assert weight.dtype == bias.dtype == torch.float32
    torch.testing.assert_close(weight.double(), delta.mT.double() @ x.double(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(bias.double(), delta.double().sum(1), rtol=1e-4, atol=1e-3)


def test_training(world, micro_run, tmp_path, call):
    """Three GRPO steps: the same responses (their random numbers are drawn on the CPU), metrics within 1%."""
    run, rows = micro_run[0], {}
    for device in ("cpu", "cuda"):
        code, *_ = call(train_grpo, "--model", world / "base", "--rollouts", run / "rollouts/train.pt",
                        "--select", run / "cropi/phase-0/selected.npy", "--out", tmp_path / device,
                        "--steps", 3, "--batch-size", 8, "--group", 4, "--lr", "1e-3", "--verifier", "exact",
                        "--eval", run / "rollouts/targeted.pt", "--device", device)
        assert code == 0
        text = (tmp_path / device / "metrics.jsonl").read_text()
        rows[device] = [json.loads(line) for line in text.splitlines()]
    assert len(rows["cpu"]) == len(rows["cuda"]) == 4  # before the first step and after each
    for one, other in zip(rows["cpu"][1:], rows["cuda"][1:]):
        for name in ("tokens", "reward", "entropy", "grad_norm", "kl"):
            assert other[name] == pytest.approx(one[name], rel=0.01, abs=1e-4), name
