"""experiments/folded.py: unbiased, the same from hooks as from plain autograd, for any batch."""

import json

import numpy as np
import pytest
import torch
from conftest import run_script, tiny_qwen
from test_gradients import TEMPERATURE, K, naive_gradient, rollouts

import folded
import score
import sketch

DIM = 4096


@pytest.fixture
def factors(monkeypatch):
    monkeypatch.setattr(sketch, "layer_gradients", folded.layer_factors)


def groups():
    prompts, responses, beta, rewards = rollouts()
    advantages = sketch.group_advantage(rewards)
    return [sketch.Trajectories(prompt, responses[i * K:(i + 1) * K], beta[i * K:(i + 1) * K], advantages[i],
                                K, TEMPERATURE) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("tied", [True, False])
def test_inner_products_are_unbiased(factors, monkeypatch, tied):
    """Against the float64 gradients of plain autograd, over 400 seeds."""
    monkeypatch.setattr(folded.Folded, "p", 8)  # smaller than every side of this model's weights
    prompts, responses, beta, rewards = rollouts()
    policy = tiny_qwen(tied).double()
    exact = []
    for i, prompt in enumerate(prompts[:3]):
        rows = slice(i * K, (i + 1) * K)
        gradient = naive_gradient(policy, prompt, responses[rows], beta[rows], rewards[i].tolist())
        exact.append(torch.cat([part.flatten() for part in gradient]))
    exact = torch.stack(exact)
    truth = exact @ exact.T
    policy = policy.float()
    found = []
    for seed in range(400):
        sketches, _ = sketch.sketch_prompts(policy, folded.Folded(seed, 0.3, 256, "cpu"), groups()[:3])
        found.append(sketches.double() @ sketches.double().T)
    found = torch.stack(found)
    error = (found.mean(0) - truth).abs() / (found.std(0) / len(found) ** 0.5)
    scale = truth.diag().sqrt()
    assert (error <= 3.5).all(), error  # six different numbers
    assert ((found.std(0) / len(found) ** 0.5) <= 0.05 * scale[:, None] * scale).all()  # a sharp test


@pytest.mark.parametrize("tied", [True, False])
def test_sketch_of_a_prompt_does_not_depend_on_its_batch(factors, tied):
    policy = tiny_qwen(tied)
    projection = folded.Folded(0, 0.3, DIM, "cpu")
    together, _ = sketch.sketch_prompts(policy, projection, groups())
    for i, group in enumerate(groups()):
        alone, _ = sketch.sketch_prompts(policy, projection, [group])
        plain, _ = sketch.sketch_prompt(policy, projection, group)
        for found in (alone[0], plain):
            torch.testing.assert_close(found, together[i], rtol=1e-4, atol=1e-5 * float(found.norm()))


def test_command_line(micro_run, world, tmp_path, call):
    """It writes what score.py reads, uses the hooks, and is not mixed up with sketch.py's sketches."""
    run = micro_run[0]
    files = [run / f"rollouts/{name}.pt" for name in ("train", "val_sort")]
    outs = [tmp_path / "train.npy", tmp_path / "val.npy"]
    done = run_script("experiments/folded.py", "--model", world / "base", "--rollouts", *files,
                      "--out", *outs, "--dim", 256)
    assert done.returncode == 0 and "plain autograd" not in done.stderr, done.stderr
    theirs = run / "influence/phase-0/train.npy"
    assert np.array_equal(np.load(outs[0]).any(1), np.load(theirs).any(1))
    assert "64 x 64" in json.loads(outs[0].with_suffix(".json").read_text())["keep"]
    arguments = ["--alpha", "0.1", "--out", tmp_path / "selected.npy"]
    assert call(score, "--train", outs[0], "--val", outs[1], *arguments)[0] == 0
    code, _, error = call(score, "--train", theirs, "--val", outs[1], *arguments)
    assert code == 2 and "folded" in error
