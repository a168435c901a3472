"""sketch.py's off-policy gradient against plain autograd in float64, one token at a time."""

import copy
import json
import math

import pytest
import torch
from conftest import group_logprobs, tiny_qwen
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.pytorch_utils import Conv1D

import sketch
import sparse_ratio

TEMPERATURE, K = 0.7, 4


class Whole:
    """Replaces Projection and keeps every coordinate in place, so that the sketch is the gradient itself."""

    def __init__(self, policy):
        self.starts, self.dim, self.device = {}, 0, policy.device
        for name, parameter in policy.named_parameters():
            self.starts[name] = self.dim
            self.dim += parameter.numel()

    def zeros(self, b):
        return torch.zeros(b, self.dim)

    def add(self, name, gradients, sums):
        gradients = gradients.flatten(1)
        sums[:, self.starts[name]:self.starts[name] + gradients.shape[1]] += gradients

    def sketches(self, sums):
        return sums


class HiddenHead(nn.Module):
    """An output layer that uses the embedding's weight without owning it, so that no hook sees this use."""

    def __init__(self, embedding):
        super().__init__()
        self.weight = lambda: embedding.weight

    def forward(self, x):
        return nn.functional.linear(x, self.weight())


def rollouts(n=5, vocab=29, seed=3):
    """n prompts, K responses of varying length to each, log-probs of another policy, and mixed rewards."""
    rng = torch.Generator().manual_seed(seed)

    def tokens(low, high):  # the pad id 0 included
        length = int(torch.randint(low, high, (), generator=rng))
        return torch.randint(vocab, (length,), generator=rng)

    prompts = [tokens(1, 7) for _ in range(n)]
    responses = [tokens(1, 9) for _ in range(n * K)]
    beta = [-3 + torch.rand(len(r), generator=rng) for r in responses]
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]])[:n]
    return prompts, responses, beta, rewards


def naive_gradient(policy, prompt, responses, beta, rewards, rho_max=math.inf):
    """1/K sum_k 1/|tau_k| sum_t grad rho_{k,t} A_k, by one forward and one backward pass per token.

    With rho_max: min(rho_{k,t}, rho_max) grad log pi instead of grad rho. It uses no code of sketch.py.
    """
    parameters = list(policy.parameters())
    mean = sum(rewards) / K
    std = (sum((r - mean) ** 2 for r in rewards) / (K - 1)) ** 0.5
    total = [torch.zeros_like(p) for p in parameters]
    for response, logp_beta, reward in zip(responses, beta, rewards):
        for t in range(len(response)):
            state = torch.cat([prompt, response[:t]])[None]
            probabilities = torch.softmax(policy(state).logits[0, -1] / TEMPERATURE, -1)
            ratio = probabilities[response[t]] / logp_beta[t].double().exp()
            weight = (reward - mean) / (std + 1e-4) / K / len(response)
            if ratio > rho_max:
                ratio = rho_max * probabilities[response[t]].log()
            of_token = torch.autograd.grad(ratio * weight, parameters, allow_unused=True)
            for sum_, gradient in zip(total, of_token):
                if gradient is not None:
                    sum_ += gradient
    return torch.cat([t.flatten() for t in total])


def gradients(policy, prompts, batched=True, rows=None):
    """sketch.py's gradients [N, parameters] of `prompts`; `rows`: trajectories per pass (K)."""
    sketcher = sketch.sketch_prompts if batched else sketch.sketch_one_by_one
    total = 0
    rows = rows or K
    for first in range(0, K, rows):
        total = total + sketcher(policy, Whole(policy), trajectories(prompts, first, first + rows))[0]
    return total


def trajectories(chosen, first=0, end=K):
    """sketch.py's Trajectories of the prompts `chosen`: numbers first .. end - 1 of each."""
    prompts, responses, beta, rewards = rollouts()
    advantages = sketch.group_advantage(rewards)
    batch = []
    for i in chosen:
        rows = range(i * K + first, i * K + end)
        batch.append(sketch.Trajectories(prompts[i], [responses[row] for row in rows],
                                         [beta[row] for row in rows], advantages[i, first:end], K,
                                         TEMPERATURE))
    return batch


def relative_error(found, expected):
    return ((found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def policy_and_truth(request):
    policy = tiny_qwen(tied=request.param)
    prompts, responses, beta, rewards = rollouts()
    double = tiny_qwen(tied=request.param).double()
    truth = []
    for i, prompt in enumerate(prompts):
        own = slice(i * K, (i + 1) * K)
        truth.append(naive_gradient(double, prompt, responses[own], beta[own], rewards[i].tolist()))
    return policy, torch.stack(truth)


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "plain"])
def test_gradient_is_the_equation(policy_and_truth, batched):
    policy, truth = policy_and_truth
    assert relative_error(gradients(policy, [0, 1, 2, 3, 4], batched), truth) <= 1e-5


def test_gradient_does_not_depend_on_its_batch(policy_and_truth, monkeypatch):
    policy, truth = policy_and_truth
    reverse = gradients(policy, [4, 3, 2, 1, 0]).flip(0)
    alone = torch.cat([gradients(policy, [i]) for i in range(5)])
    row_by_row = torch.cat([gradients(policy, [i], rows=1) for i in range(5)])
    monkeypatch.setattr(sketch, "CHUNK", 600)  # a layer's gradients of one or two prompts at a time
    in_chunks = gradients(policy, [0, 1, 2, 3, 4])
    for found in (reverse, alone, row_by_row, in_chunks):
        assert relative_error(found, truth) <= 1e-5


def batched(policy):
    """Whether choose_sketcher takes the hooks."""
    return sketch.choose_sketcher(policy, Whole(policy)).func is sketch.sketch_prompts


def test_weight_used_outside_its_layer_is_noticed():
    """Supported layer types are not enough: batched gradients are first checked against plain autograd."""
    policy = tiny_qwen(tied=True)
    assert batched(policy)
    policy = tiny_qwen(tied=True)
    policy.lm_head = HiddenHead(policy.model.embed_tokens)
    assert not batched(policy)


@pytest.mark.parametrize("rho_max", [0.2, 0.5, 1e9])
def test_truncated_gradient_is_the_equation(policy_and_truth, rho_max):
    """Some ratios are above 0.5 and 0.2, none above 1e9, where the gradient is the plain one."""
    policy, truth = policy_and_truth
    prompts, responses, beta, rewards = rollouts()
    found, _ = sketch.sketch_prompts(policy, Whole(policy), trajectories([0, 1, 2, 3, 4]), rho_max)
    double = copy.deepcopy(policy).double().requires_grad_(True)
    for i in range(5):
        own = slice(i * K, (i + 1) * K)
        expected = naive_gradient(double, prompts[i], responses[own], beta[own], rewards[i].tolist(), rho_max)
        assert relative_error(found[i], expected) <= 1e-5
    assert (relative_error(found, truth) <= 1e-5) == (rho_max == 1e9)


def test_truncated_weights_in_closed_form():
    """d/d logp is min(rho, c) A / |tau| / K; a ratio of 0 gives 0, not NaN; c = inf changes no bit."""
    ratios = torch.tensor([[0.0, 0.5, 1.0, 4.0, 300.0]], dtype=torch.float64)
    mask, advantages = torch.ones(1, 5, dtype=torch.bool), torch.tensor([-1.5], dtype=torch.float64)
    for rho_max in (0.7, 5.0, math.inf):
        logp = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
        found = sketch.off_policy_surrogate(logp, -ratios.log(), advantages, mask, 2, rho_max)
        weights = ratios.clamp(max=rho_max)
        assert found.item() == pytest.approx(-1.5 * weights.sum().item() / 5 / 2, rel=1e-12)
        slope = torch.autograd.grad(found, logp)[0]
        torch.testing.assert_close(slope, -1.5 * weights / 5 / 2, rtol=1e-12, atol=0)
    logp = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.tensor([1.0, -1.0, 0.3])
    plain = (sketch.token_ratio(logp, 0.1) * weights[:, None]).sum(1) / 4
    truncated = sketch.off_policy_surrogate(logp, 0.1, weights, torch.ones(3, 4, dtype=torch.bool), 1)
    assert torch.equal(*(torch.autograd.grad(value.sum(), logp)[0] for value in (plain, truncated)))


def test_surrogate_counts_tokens_of_each_trajectory():
    """By hand, for rho = (2, 1) and (1), A = (1, -1) and K = 2: (1 (2 + 1) / 2 - 1) / 2 = 0.25."""
    logp = torch.tensor([[0.0, 0.0], [0.0, 9.0]])
    beta = torch.tensor([[-0.6931472, 0.0], [0.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False]])
    found = sketch.off_policy_surrogate(logp, beta, torch.tensor([1.0, -1.0]), mask, 2)
    assert found.item() == pytest.approx(0.25)


def module_cases():
    torch.manual_seed(1)
    x = torch.randn(6, 5, 8)  # 3 prompts with 2 trajectories of 5 tokens
    ids = torch.randint(7, (6, 5))
    cases = {"linear": (nn.Linear(8, 4), x), "linear without bias": (nn.Linear(8, 4, bias=False), x),
             "Conv1D": (Conv1D(4, 8), x), "LayerNorm": (nn.LayerNorm(8), x),
             "LayerNorm without bias": (nn.LayerNorm(8, bias=False), x),
             "RMSNorm": (nn.RMSNorm(8), x), "RMSNorm of Qwen2": (Qwen2RMSNorm(8), x),
             "RMSNorm of heads": (Qwen2RMSNorm(4), x.view(6, 5, 2, 4)),
             "embedding": (nn.Embedding(7, 4), ids),
             "embedding with a padding id": (nn.Embedding(7, 4, padding_idx=2), ids)}
    for module, _ in cases.values():
        for parameter in module.parameters():
            parameter.data.add_(torch.randn_like(parameter))
    return cases


@pytest.mark.parametrize("name", module_cases())
def test_batched_gradients_are_the_looped_ones(name):
    """layer_gradients against one backward pass per prompt through the module itself, in float64."""
    module, x = module_cases()[name]
    output = module(x)
    delta = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    flat = delta.reshape(3, -1, delta.shape[-1])
    seen = output.detach() if type(module).__name__.endswith("RMSNorm") else x
    with torch.no_grad():
        found = dict(sketch.layer_gradients(module, seen.reshape(*flat.shape[:2], -1), flat))
    assert found.keys() == set(module.parameters())
    module.double()
    x = x.double() if x.is_floating_point() else x
    for prompt in range(3):
        rows = slice(2 * prompt, 2 * prompt + 2)
        module.zero_grad()
        module(x[rows]).backward(delta[rows].double())
        for parameter, gradients in found.items():
            torch.testing.assert_close(gradients[prompt].double(), parameter.grad, rtol=1e-5, atol=1e-5)


def test_unknown_layer_means_plain_autograd(capsys):
    """A subclass may compute anything, so only the exact types that layer_gradients supports are batched."""
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    policy = tiny_qwen(tied=False)
    scaled = Scaled(16, 29, bias=False)
    scaled.weight = policy.lm_head.weight
    policy.lm_head = scaled
    assert not batched(policy)
    assert "plain autograd" in capsys.readouterr().err
    prompts, responses, beta, rewards = rollouts()
    found = gradients(policy, [2], batched=False)
    own = slice(2 * K, 3 * K)
    truth = naive_gradient(policy.double(), prompts[2], responses[own], beta[own], rewards[2].tolist())
    assert relative_error(found[0], truth) <= 1e-5


@pytest.mark.parametrize("projection", [sketch.Projection, sparse_ratio.Rademacher])
def test_sketch_is_the_projection_of_the_true_gradient(policy_and_truth, projection):
    """The sketch that the hooks add up layer by layer is P drop(g) of the reference gradient g."""
    policy, truth = policy_and_truth
    projection = projection(5, 0.3, 64, "cpu")
    sums = projection.zeros(5)
    start = 0
    for name, parameter in policy.named_parameters():
        gradients = truth[:, start:start + parameter.numel()].view(5, *parameter.shape).float()
        projection.add(name, gradients, sums)
        start += parameter.numel()
    expected = projection.sketches(sums)
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)  # as an earlier backward pass leaves it
    for sketcher in (sketch.sketch_prompts, sketch.sketch_one_by_one):
        found, _ = sketcher(policy, projection, trajectories([0, 1, 2, 3, 4]))
        assert relative_error(found, expected) <= 1e-5


def test_bfloat16_policy_has_float32_gradients():
    """Each layer's products and sums over tokens are float32: exact to float32 given bfloat16 inputs."""
    torch.manual_seed(0)
    module = nn.Linear(8, 4, bias=False).bfloat16()
    x, delta = torch.randn(2, 5000, 8).bfloat16(), torch.randn(2, 5000, 4).bfloat16()
    with torch.no_grad():
        (_, found), = sketch.layer_gradients(module, x, delta.float())
    assert found.dtype == torch.float32
    assert relative_error(found.flatten(1), (delta.double().mT @ x.double()).flatten(1)) <= 1e-6
    policy = tiny_qwen(tied=True)
    exact = gradients(policy, [0, 1, 2, 3, 4])
    found = gradients(tiny_qwen(tied=True).bfloat16(), [0, 1, 2, 3, 4])
    assert found.dtype == torch.float32 and (torch.cosine_similarity(found, exact) > 0.99).all()


def test_trial_accepts_a_deep_bfloat16_policy():
    """The rounding of a random policy of 24 layers does not look like another gradient."""
    for seed in range(3):
        torch.manual_seed(seed)
        sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=24,
                     num_attention_heads=4, num_key_value_heads=2)
        policy = LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16().eval()
        assert batched(policy)


def test_sidecar_has_the_log_ratios(micro_run, world, tmp_path, call):
    """Mean and maximum of |log rho|; a warning where the model that sampled has other log-probs now."""
    path, out = micro_run[0] / "rollouts/val_sort.pt", tmp_path / "s.npy"
    rollouts, k = sketch.load_rollouts(path), 6
    policy = sketch.load_policy(str(micro_run[0] / "cropi/phase-0/policy"), "cpu", "float32")
    expected = []
    for i in (rollouts["rewards"].std(1) > 0).nonzero()[:, 0].tolist():
        rows = slice(i * k, (i + 1) * k)
        logp, mask = group_logprobs(policy, [rollouts["prompts"][i]], rollouts["responses"][rows], 1.0)
        expected.append((logp[mask] - torch.cat(rollouts["logprobs"][rows])).abs())
    expected = torch.cat(expected)
    base, trained = str(world / "base"), policy.name_or_path
    shifted = torch.load(path, weights_only=True)
    assert shifted["meta"]["model"] == base
    torch.save({**shifted, "logprobs": shifted["logprobs"] - 0.1}, tmp_path / "shifted.pt")
    for model, source, mean, maximum, warned in (
            (trained, path, float(expected.mean()), float(expected.max()), False),
            (base, path, 0, 0, False), (base, tmp_path / "shifted.pt", 0.1, 0.1, True)):
        code, _, err = call(sketch, "--model", model, "--rollouts", source, "--out", out, "--dim", 64)
        sidecar = json.loads(out.with_suffix(".json").read_text())
        assert code == 0 and sidecar["log_ratio_mean"] == pytest.approx(mean, rel=1e-3, abs=1e-5)
        assert sidecar["log_ratio_max"] == pytest.approx(maximum, rel=1e-3, abs=1e-4)
        assert ("warning" in err and "mean |log rho| is 0.100" in err) == warned
    assert expected.mean() > 0.01 and expected.max() > 2 * expected.mean()
