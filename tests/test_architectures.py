"""Tiny random models of many architectures: exact gradients, or one line that says why not."""

import argparse

import pytest
import torch
from conftest import grpo_groups
from test_gradients import K, Whole, naive_gradient, relative_error, rollouts, trajectories
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import collect
import sketch
import train_grpo

SIZES = dict(vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=1)
GROUPS = dict(num_key_value_heads=2)
HEADS = dict(num_key_value_heads=2, head_dim=8)
EXPERTS = dict(num_key_value_heads=2, num_experts=4, num_local_experts=4, num_experts_per_tok=2,
               moe_intermediate_size=8, experts_implementation="eager")
BATCHED = {
    "llama": GROUPS, "mistral": GROUPS, "qwen2": GROUPS, "qwen3": HEADS, "gpt2": {}, "gpt_neox": {},
    "gptj": dict(rotary_dim=4), "gpt_neo": dict(attention_types=[[["global", "local"], 1]], num_layers=2),
    "gpt_bigcode": dict(n_inner=24), "bloom": dict(n_head=4, n_layer=2), "phi": GROUPS, "phi3": GROUPS,
    "stablelm": GROUPS, "starcoder2": GROUPS, "olmo": GROUPS, "olmo2": GROUPS, "olmo3": GROUPS,
    "granite": GROUPS | dict(logits_scaling=3.0), "smollm3": GROUPS, "glm": HEADS, "glm4": HEADS,
    "mpt": dict(d_model=16, n_heads=4, n_layers=2), "ernie4_5": GROUPS, "exaone4": GROUPS, "seed_oss": HEADS}
PLAIN = {  # scaled embeddings, positions with an offset, fused experts, layers of their own
    "gemma": HEADS, "gemma2": HEADS, "gemma3_text": HEADS, "opt": dict(ffn_dim=24, word_embed_proj_dim=16),
    "qwen3_moe": EXPERTS | HEADS, "mixtral": EXPERTS, "olmoe": EXPERTS, "falcon": dict(ffn_hidden_size=24),
    "ctrl": dict(n_embd=16, dff=24, n_layer=2, n_head=4), "cohere": GROUPS, "cohere2": GROUPS,
    "minicpm3": {}, "llama4_text": EXPERTS, "nemotron": GROUPS, "granitemoe": EXPERTS, "gpt_oss": EXPERTS}
REFUSED = {  # states instead of a cache of keys and values
    "mamba": {}, "jamba": EXPERTS, "qwen3_next": EXPERTS | HEADS,
    "recurrent_gemma": dict(lru_width=16), "rwkv": {}}


def tiny(name, settings):
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES | settings)).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


@pytest.mark.parametrize("name", [*BATCHED, *PLAIN])
def test_sketch_is_exact(name):
    """Batched where the layers allow it, plain autograd elsewhere; the gradient of the equation in both."""
    policy = tiny(name, {**BATCHED, **PLAIN}[name])
    sketcher = sketch.choose_sketcher(policy, Whole(policy))
    assert (sketcher.func is sketch.sketch_prompts) == (name in BATCHED)
    found, _ = sketcher(trajectories([0, 1, 2]))
    prompts, responses, beta, rewards = rollouts()
    own = slice(2 * K, 3 * K)
    policy.double().requires_grad_(True)
    truth = naive_gradient(policy, prompts[2], responses[own], beta[own], rewards[2].tolist())
    assert relative_error(found[-1], truth) <= 1e-5


@pytest.mark.parametrize("name", [*BATCHED, *PLAIN])
def test_grpo_step_is_exact(name):
    """One SGD step with learning rate 1 adds the gradient of J, computed per token in float64."""
    policy, temperature, bonus = tiny(name, {**BATCHED, **PLAIN}[name]), 0.7, 0.02
    train_grpo.check_forward(policy)
    before = [parameter.detach().double().clone() for parameter in policy.parameters()]
    prompts, responses, beta, rewards = rollouts(n=2)
    args = argparse.Namespace(kl_coef=0.0, entropy_coef=bonus, max_grad_norm=1e9, batch_tokens=64,
                              train_temperature=temperature, token_mean=False, dtype="float32")
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    groups = grpo_groups(prompts, responses, [b.tolist() for b in beta], rewards)
    train_grpo.grpo_step(policy, None, optimizer, groups, args)
    after = [parameter.detach().double() for parameter in policy.parameters()]
    moved = torch.cat([(new - old).flatten() for new, old in zip(after, before)])
    policy.double()
    with torch.no_grad():
        for parameter, old in zip(policy.parameters(), before):
            parameter.copy_(old)
    objective = 0
    for i, response in enumerate(responses):
        group = rewards[i // K].double()
        advantage = (group[i % K] - group.mean()) / (group.std() + 1e-4)
        for t, token in enumerate(response):
            state = torch.cat([prompts[i // K], response[:t]])[None]
            logp = torch.log_softmax(policy(state).logits[0, -1] / temperature, -1)
            entropy = -(logp.exp() * logp).sum()
            ratio = (logp[token] - logp[token].detach()).exp()
            objective = objective + (ratio * advantage + bonus * entropy) / len(response) / len(responses)
    gradients = torch.autograd.grad(objective, list(policy.parameters()), allow_unused=True)
    truth = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, policy.parameters())]
    assert relative_error(moved, torch.cat([g.flatten() for g in truth])) <= 1e-5


@pytest.mark.parametrize("stage", [sketch, train_grpo])
def test_unusable_cache_is_refused_in_one_line(stage, capsys):
    """MiniMax's linear attention has a cache of its own."""
    policy = tiny("minimax", EXPERTS)
    with pytest.raises(SystemExit) as stop:
        stage.check_forward(policy)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "choose another model" in error


@pytest.mark.parametrize("stage", [sketch, train_grpo])
def test_cache_that_cuts_gradients_is_refused(stage, monkeypatch, capsys):
    """The logits are right, but no gradient reaches the prompt through its cached keys and values."""
    policy, update = tiny("llama", GROUPS), DynamicCache.update
    stage.check_forward(policy)

    def cut(cache, keys, values, layer, *arguments, **options):
        found = update(cache, keys, values, layer, *arguments, **options)
        stored = cache.layers[layer]
        stored.keys, stored.values = stored.keys.detach(), stored.values.detach()
        return found

    monkeypatch.setattr(DynamicCache, "update", cut)
    with pytest.raises(SystemExit):
        stage.check_forward(policy)
    assert "another gradient" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bloom", "gemma2", "mixtral", "cohere"])
def test_sampled_logprobs_are_those_of_a_pass_without_a_cache(name):
    """Two prompts of different lengths; every second token ends a response, so that rows leave the batch."""
    policy = tiny(name, {**BATCHED, **PLAIN}[name])
    prompts = [[0, 1, 0], [1]]
    responses, logprobs = collect.sample(policy, prompts, 4, 1.0, 4, list(range(1, 29, 2)), [0, 1])
    assert len({len(response) for response in responses}) > 1
    for number, (response, logp) in enumerate(zip(responses, logprobs)):
        tokens = torch.tensor(prompts[number // 4] + response)
        with torch.no_grad():
            expected = policy(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logp), expected[-len(response):], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", [collect, sketch, train_grpo], ids=["collect", "sketch", "train_grpo"])
@pytest.mark.parametrize("name", ["mamba", "jamba", "qwen3_next", "rwkv", "recurrent_gemma"])
def test_recurrent_state_is_refused_at_once(name, stage, tmp_path, capsys):
    tiny(name, REFUSED[name]).save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stop:
        stage.load_policy(str(tmp_path), "cpu", "float32")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.splitlines()[-1].count("a recurrent state") == 1
