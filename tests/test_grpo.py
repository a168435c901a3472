"""train_grpo.py: objective and gradient against closed forms in float64, and a bandit that it must learn."""

import argparse
import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import group_logprobs, grpo_groups, tiny_qwen
from test_gradients import relative_error
from test_scale import shards, training
from transformers import Qwen2Tokenizer

import train_grpo

CLIP, KL, ENTROPY = 0.2, 0.05, 0.03


def test_objective_and_gradient_in_closed_form():
    """The KL and entropy terms and every branch of the min: ratios beyond both clips, both signs of A."""
    rng = torch.Generator().manual_seed(0)
    shape = (6, 9)
    logp = (-2 + torch.randn(shape, generator=rng, dtype=torch.float64)).requires_grad_()
    old = logp.detach() + 0.4 * torch.randn(shape, generator=rng, dtype=torch.float64)
    ref = logp.detach() + 0.5 * torch.randn(shape, generator=rng, dtype=torch.float64)
    advantages = torch.tensor([1.5, -0.7, 0.3, -2.0, 0.0, 1.0], dtype=torch.float64)
    lengths = [9, 1, 5, 7, 3, 8]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    entropy = torch.rand(shape, generator=rng, dtype=torch.float64).requires_grad_()
    found = train_grpo.grpo_objective(logp, old, ref, entropy, advantages, mask, CLIP, KL, ENTROPY)
    slope, entropy_slope = torch.autograd.grad(found.sum(), (logp, entropy))
    torch.testing.assert_close(entropy_slope, ENTROPY * mask.double() / mask.sum(1, keepdim=True))
    clipped = {True: 0, False: 0}
    for i in range(6):
        total = 0.0
        for t in range(9):
            if t >= lengths[i]:
                assert slope[i, t] == 0
                continue
            x, a = logp[i, t].item(), advantages[i].item()
            ratio, delta = torch.tensor(x - old[i, t].item()).exp().item(), ref[i, t].item() - x
            k3 = torch.tensor(delta, dtype=torch.float64).exp().item() - delta - 1
            ratio = torch.tensor(x - old[i, t].item(), dtype=torch.float64).exp().item()
            outside = ratio > 1 + CLIP if a > 0 else ratio < 1 - CLIP  # the clipped term is the minimum
            total += (min(max(ratio, 1 - CLIP), 1 + CLIP) if outside else ratio) * a - KL * k3
            total += ENTROPY * entropy[i, t].item()
            pull = KL * (torch.tensor(delta, dtype=torch.float64).exp().item() - 1)
            expected = (0 if outside else ratio * a) + pull
            assert slope[i, t].item() == pytest.approx(expected / lengths[i], abs=1e-12)
            clipped[outside and a != 0] += 1
        assert found[i].item() == pytest.approx(total / lengths[i], abs=1e-12)
    assert min(clipped.values()) >= 5
    free = train_grpo.grpo_objective(logp, old, logp.detach(), entropy, advantages, mask, CLIP, KL, ENTROPY)
    penalty = (train_grpo.kl_k3(logp, ref) * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(found, free - KL * penalty)


def test_entropy_and_gradient_in_closed_form():
    """H = -sum p log p and dH/dz_x = -p_x (log p_x + H), per token by scalars in float64."""
    logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = (4 * logits).requires_grad_()  # from nearly certain to nearly uniform
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2, [True] + [False] * 3])
    found = train_grpo.token_entropy(logits, mask)
    slope = torch.autograd.grad(found.sum(), logits)[0]
    for i in range(3):
        for t in range(4):
            if not mask[i, t]:
                assert found[i, t] == 0 and not slope[i, t].any()
                continue
            weights = [math.exp(z) for z in logits[i, t].tolist()]
            p = [weight / sum(weights) for weight in weights]
            entropy = -sum(x * math.log(x) for x in p)
            assert found[i, t].item() == pytest.approx(entropy, abs=1e-12)
            expected = [-x * (math.log(x) + entropy) for x in p]
            assert slope[i, t].tolist() == pytest.approx(expected, abs=1e-12)


def test_advantages():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0], [0.25, 1, 0.5, 0.25]])
    found = train_grpo.group_advantage(rewards)
    for row, values in zip(found.tolist(), rewards.tolist()):
        mean = sum(values) / 4
        std = (sum((r - mean) ** 2 for r in values) / 3) ** 0.5
        assert row == pytest.approx([(r - mean) / (std + 1e-4) for r in values], rel=1e-5)
        assert std or row == [0.0] * 4


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 2]]


def test_equal_graded_rewards_have_no_advantage():
    """The standard deviation of eight rewards of 0.1 is not 0 in floating point."""
    rewards = torch.full((1, 8), 0.1)
    assert rewards.std() > 0 and not train_grpo.group_advantage(rewards).any()


def one_step(batch_tokens, token_mean=False, optimizer=torch.optim.SGD):
    """grpo_step on 3 prompts x 4 responses of varying length, with log-probs of another policy.

    Returns the change of all parameters, the row of metrics and the inputs.
    """
    rng = torch.Generator().manual_seed(1)
    responses = []
    for _ in range(12):
        length = int(torch.randint(1, 8, (), generator=rng))
        responses.append(torch.randint(29, (length,), generator=rng).tolist())
    policy, reference = tiny_qwen(tied=True), tiny_qwen(tied=True, seed=5)
    before = copy.deepcopy(policy).double()
    logp, mask = group_logprobs(policy, PROMPTS, responses, 0.8)
    noise = 0.3 * torch.randn(logp.shape, generator=rng)
    old = [(logp[i] + noise[i])[mask[i]].tolist() for i in range(12)]
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]])
    args = argparse.Namespace(kl_coef=KL, entropy_coef=ENTROPY, max_grad_norm=1e9, batch_tokens=batch_tokens,
                              train_temperature=0.8, token_mean=token_mean, dtype="float32")
    row = train_grpo.grpo_step(policy, reference, optimizer(policy.parameters(), lr=1.0),
                               grpo_groups(PROMPTS, responses, old, rewards), args)
    pairs = zip(policy.parameters(), before.parameters())
    move = torch.cat([(a.double() - b).flatten() for a, b in pairs]).detach()
    return move, row, (before, reference.double(), responses, old, rewards)


@pytest.mark.parametrize("token_mean", [False, True])
@pytest.mark.parametrize("batch_tokens", [10**6, 40])
def test_step_is_the_gradient_of_the_objective(token_mean, batch_tokens):
    """One SGD step with learning rate 1 adds the gradient of J, computed here per token in float64.

    J is a mean over tokens within each response, then over responses (GRPO), or over all tokens (DAPO).
    """
    move, row, (policy, reference, responses, old, rewards) = one_step(batch_tokens, token_mean)
    total, gap, entropies, tokens = 0, 0, 0, sum(map(len, responses))
    for i, response in enumerate(responses):
        group = rewards[i // 4].double()
        advantage = (group[i % 4] - group.mean()) / (group.std() + 1e-4)
        for t, token in enumerate(response):
            state = torch.tensor([PROMPTS[i // 4] + response[:t]])
            distribution = torch.log_softmax(policy(state).logits[0, -1] / 0.8, -1)
            logp, entropy = distribution[token], -(distribution.exp() * distribution).sum()
            delta = torch.log_softmax(reference(state).logits[0, -1] / 0.8, -1)[token].detach() - logp
            ratio = (logp - logp.detach()).exp()  # pi_old is the policy itself: one update per batch
            gain = ratio * advantage - KL * (delta.exp() - delta - 1) + ENTROPY * entropy
            gap += abs(logp.item() - old[i][t])
            entropies += entropy.item()
            total = total + gain * (1 / tokens if token_mean else 1 / len(response) / 12)
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(policy.parameters()))])
    assert relative_error(move, truth) <= 1e-4
    mean_gap, mean_entropy = (x / sum(map(len, responses)) for x in (gap, entropies))
    assert row["entropy"] == pytest.approx(mean_entropy, rel=1e-4) and mean_entropy > 1
    assert row["sampling_logp_difference"] == pytest.approx(mean_gap, rel=1e-4) and gap > 1


def test_accumulation_is_the_whole_batch():
    whole, first, _ = one_step(10**6)
    single, second, _ = one_step(1)  # twelve micro-batches of one response
    assert relative_error(single, whole) <= 1e-5 and second["kl"] == pytest.approx(first["kl"], rel=1e-5)


MIXED = [[1.0, 1, 1, 1], [1, 0, 0, 1], [0.1, 0.1, 0.1, 0.1]]  # the first and the last group are equal
EQUAL = [[1.0, 1, 1, 1], [0, 0, 0, 0], [0.1, 0.1, 0.1, 0.1]]


def steps_without_coefficients(batches, monkeypatch, batch_tokens=40, token_mean=False, all_groups=False):
    """An AdamW step with lambda_KL = lambda_H = 0 on each of the batches, which are given by their rewards.

    all_groups: with the groups of equal rewards in the passes. Returns the policy; and the gradient, the row
    of metrics and the responses that reached response_logits, all of the last step.
    """
    rng = torch.Generator().manual_seed(2)
    policy = tiny_qwen(tied=True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
    args = argparse.Namespace(kl_coef=0.0, entropy_coef=0.0, max_grad_norm=1e9, batch_tokens=batch_tokens,
                              train_temperature=0.8, token_mean=token_mean, dtype="float32")
    gradient = []
    seen = []

    def keep_gradient(*_):
        gradient.clear()
        gradient.extend(parameter.grad.flatten() for parameter in policy.parameters())

    def counted(policy, prompts, responses, temperature):
        seen.extend(responses)
        return original(policy, prompts, responses, temperature)

    optimizer.register_step_pre_hook(keep_gradient)
    original = train_grpo.response_logits
    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "response_logits", counted)
        if all_groups:
            patch.setattr(train_grpo, "groups_with_gradient", lambda groups, args: groups)
        for rewards in batches:
            lengths = torch.randint(1, 8, (12,), generator=rng).tolist()
            responses = [torch.randint(29, (length,), generator=rng).tolist() for length in lengths]
            logprobs = [[-1.0] * length for length in lengths]
            groups = grpo_groups(PROMPTS, responses, logprobs, torch.tensor(rewards))
            seen.clear()
            row = train_grpo.grpo_step(policy, None, optimizer, groups, args)
    return policy, torch.cat(gradient), row, (seen, responses)


@pytest.mark.parametrize("token_mean", [False, True])
@pytest.mark.parametrize("batch_tokens", [10**6, 40, 1])
def test_equal_groups_are_left_out_and_change_no_gradient(token_mean, batch_tokens, monkeypatch):
    """Only the second group reaches the policy; J is still a mean over all three, the metrics are not."""
    settings = ([MIXED], monkeypatch, batch_tokens, token_mean)
    _, whole, _, (seen, responses) = steps_without_coefficients(*settings, all_groups=True)
    assert sorted(seen) == sorted(responses)
    _, found, row, (seen, responses) = steps_without_coefficients(*settings)
    assert sorted(seen) == sorted(responses[4:8])
    assert whole.norm() > 0 and relative_error(found, whole) <= 1e-6
    logp, mask = group_logprobs(tiny_qwen(tied=True), PROMPTS[1:2], responses[4:8], 0.8)
    difference = (logp[mask] + 1).abs().mean().item()  # the sampler's log-probs are -1
    assert row["sampling_logp_difference"] == pytest.approx(difference, rel=1e-5)
    assert row["groups"] == 3 and row["kl"] == 0 and row["entropy"] > 0


def test_batch_of_equal_groups_makes_the_same_update(monkeypatch):
    """After an ordinary step, AdamW moves the weights by its momentum and weight decay, bit for bit."""
    before, _, _, _ = steps_without_coefficients([MIXED], monkeypatch)
    expected, _, _, _ = steps_without_coefficients([MIXED, EQUAL], monkeypatch, all_groups=True)
    found, gradient, row, (seen, responses) = steps_without_coefficients([MIXED, EQUAL], monkeypatch)
    assert sorted(seen) == sorted(responses[:4]) and not gradient.any()
    for old, one, other in zip(before.parameters(), expected.parameters(), found.parameters()):
        assert torch.equal(one, other) and not torch.equal(old, other)
    assert row["grad_norm"] == 0 and all(math.isfinite(value) for value in row.values())


@pytest.mark.parametrize("kl, entropy", [(KL, 0.0), (0.0, ENTROPY)])
def test_equal_groups_stay_where_they_have_a_gradient(kl, entropy):
    groups = grpo_groups(PROMPTS, [[3]] * 12, [[-1.0]] * 12, torch.tensor(MIXED))
    args = argparse.Namespace(kl_coef=kl, entropy_coef=entropy)
    assert train_grpo.groups_with_gradient(groups, args) == groups
    args = argparse.Namespace(kl_coef=0.0, entropy_coef=0.0)
    assert train_grpo.groups_with_gradient(groups, args) == groups[1:2]


@pytest.mark.parametrize("verifier", ["exact", "all"])
def test_two_processes_leave_out_equal_groups(verifier, micro_run, world, tmp_path, call, monkeypatch):
    """FSDP2 with two ranks gives the metrics and policy of one. all: every response of the batch has 1.0."""
    run = tmp_path / "run"
    shutil.copytree(micro_run[0], run)
    if verifier == "all":
        (tmp_path / "all.py").write_text("def reward(response, answer):\n    return 1.0\n")
        verifier = f"{tmp_path}/all.py:reward"
        for name in ("train", "targeted"):
            rollouts = torch.load(run / f"rollouts/{name}.pt", weights_only=True)
            rollouts["meta"]["verifier"] = verifier
            torch.save(rollouts, run / f"rollouts/{name}.pt")
    model = run / "cropi/phase-0/policy"
    more = ("--kl-coef", 0, "--entropy-coef", 0, "--verifier", verifier, "--lr", "1e-3", "--model", model,
            "--optimizer", model / "optimizer.pt", "--steps", 2)
    assert call(train_grpo, *training(run, world, tmp_path / "one", *more)[1:])[0] == 0
    shards(training(run, world, tmp_path / "two", *more))
    rows = [[json.loads(line) for line in open(tmp_path / out / "metrics.jsonl")] for out in ("one", "two")]
    for first, second in zip(*rows, strict=True):
        for name in ("reward", "groups", "entropy", "grad_norm", "sampling_logp_difference"):
            assert second.get(name, 0) == pytest.approx(first.get(name, 0), rel=1e-3, abs=1e-6)
    if verifier == "exact":
        assert any(0 < row.get("frac_reward_zero_std", 0) < 1 for row in rows[0])
    else:
        assert all(row.get("grad_norm", 0) == 0 for row in rows[0])
    base, first, second = (train_grpo.load_policy(path, "cpu", "float32").state_dict()
                           for path in (model, tmp_path / "one", tmp_path / "two"))
    moved = sum(((first[name] - base[name]) ** 2).sum() for name in base)
    apart = sum(((second[name] - first[name]) ** 2).sum() for name in first)
    assert moved > 0 and apart <= 1e-4 * moved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_armed_bandit(tmp_path, call, dtype):
    """One prompt, two equally likely one-token answers: GRPO raises the mean reward from 0.5 to over 0.9."""
    policy = tiny_qwen(tied=False, vocab=2)
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    def expected_reward(model):
        return torch.softmax(model(torch.tensor([[0]])).logits[0, -1], -1)[1].item()

    assert expected_reward(policy) == 0.5
    policy.save_pretrained(tmp_path / "base")
    tokenizer = Qwen2Tokenizer(vocab={"a": 0, "b": 1}, merges=[], unk_token="a", pad_token="a", eos_token="a")
    tokenizer.save_pretrained(tmp_path / "base")
    torch.save({"prompt_tokens": torch.zeros(1, dtype=torch.int32), "prompt_lengths": torch.tensor([1]),
                "response_tokens": torch.zeros(0, dtype=torch.int32),
                "response_lengths": torch.zeros(0, dtype=torch.int64),
                "logprobs": torch.zeros(0), "rewards": torch.zeros(1, 0), "answers": ["b"], "families": [""],
                "meta": {"format": 2, "temperature": 1.0, "max_new_tokens": 1, "eos_ids": [7],
                         "verifier": "exact"}}, tmp_path / "r.pt")
    np.save(tmp_path / "s.npy", np.array([0]))
    code, _, err = call(train_grpo, "--model", tmp_path / "base", "--rollouts", tmp_path / "r.pt",
                        "--select", tmp_path / "s.npy", "--out", tmp_path / "policy", "--steps", 40,
                        "--batch-size", 4, "--lr", 1e-2, "--dtype", dtype)
    assert code == 0, err
    trained = train_grpo.load_policy(tmp_path / "policy", "cpu", "float32")
    assert expected_reward(trained) > 0.9
    weight = trained.lm_head.weight
    assert (weight != weight.bfloat16().float()).any()  # mixed precision keeps float32 weights
    rows = [json.loads(line) for line in open(tmp_path / "policy/metrics.jsonl")]
    assert [row["step"] for row in rows] == list(range(41)) and rows[-1]["reward"] > rows[1]["reward"]


def test_each_epoch_visits_every_selected_prompt_once():
    selected, size = [3, 8, 1, 9, 4], 4
    visited = [i for step in range(10) for i in train_grpo.next_prompts(selected, step * size, size, seed=2)]
    epochs = [visited[start:start + 5] for start in range(0, 40, 5)]
    assert all(sorted(epoch) == sorted(selected) for epoch in epochs) and len(set(map(tuple, epochs))) > 4
    large = train_grpo.next_prompts(selected, 0, 10, seed=2)  # a batch that spans two epochs
    assert sorted(large) == sorted(selected * 2)


class Planned:
    """Stands for a Sampler: the rewards of a prompt are planned; its responses are the prompt's token."""

    def __init__(self, rewards):
        self.rewards, self.asked, self.seeds = rewards, [], []

    def __call__(self, rollouts, batch, k, temperature, seeds):
        self.asked += batch
        self.seeds += seeds
        return [train_grpo.Group([i], [[i]] * k, [[0.0]] * k, self.rewards[i]) for i in batch]


def planned_groups(rewards, dynamic, size=4):
    """What sample_groups makes of planned rewards: groups, position in the order of prompts, row, sampler."""
    args = argparse.Namespace(batch_size=size, group=2, seed=3, train_temperature=1.0,
                              dynamic_sampling=dynamic)
    rollouts = {"prompts": [[i] for i in range(len(rewards))], "meta": {"eos_ids": [0]}}
    sampler, selected = Planned(rewards), list(range(len(rewards)))
    state = train_grpo.State(step=7)
    groups, row = train_grpo.sample_groups(sampler, rollouts, selected, state, args)
    return groups, state.position, row, sampler


def test_dynamic_sampling_replaces_groups_of_equal_rewards():
    """Every third group is unequal: rounds of 4 prompts until 4 such groups are found, in order."""
    rewards = [[0.0, 1.0] if i % 3 == 0 else [0.3, 0.3] for i in range(30)]
    groups, position, row, sampler = planned_groups(rewards, dynamic=True)
    order = train_grpo.next_prompts(list(range(30)), 0, 30, 3)
    expected = [i for i in order if i % 3 == 0][:4]
    assert [group.prompt[0] for group in groups] == expected
    assert all(group.rewards == [0.0, 1.0] for group in groups)
    assert [group.responses for group in groups] == [[[i], [i]] for i in expected]
    assert sampler.asked == order[:position] and position == 4 * row["rounds"] and row["rounds"] > 1
    assert len(set(sampler.seeds)) == position and row["tokens"] == 2 * position
    unequal = sum(i % 3 == 0 for i in sampler.asked)
    assert row["frac_reward_zero_std"] == pytest.approx(1 - unequal / position)
    _, plain_position, plain, _ = planned_groups(rewards, dynamic=False)
    assert plain_position == 4 and plain["rounds"] == 1


def test_dynamic_sampling_is_bounded():
    """Ten rounds: then the batch is smaller or, without any unequal group, one without a gradient."""
    few = [[0.0, 1.0] if i == 5 else [1.0, 1.0] for i in range(60)]
    groups, position, row, _ = planned_groups(few, dynamic=True, size=6)
    assert [group.prompt[0] for group in groups] == [5] and row["rounds"] == 10 and position == 60
    groups, _, row, _ = planned_groups([[0.2, 0.2]] * 60, dynamic=True, size=6)
    rewards = torch.tensor([group.rewards for group in groups])
    assert len(groups) == 6 and not train_grpo.group_advantage(rewards).any() and row["rounds"] == 10


def test_temperatures(micro_run, world, tmp_path, call):
    """The trainer's log-probs are at the temperature of its own samples; --eval-temperature 0 is greedy."""
    run = micro_run[0]
    arguments = ("--model", world / "base", "--rollouts", run / "rollouts/train.pt", "--eval",
                 run / "rollouts/targeted.pt", "--select", run / "cropi/phase-0/selected.npy", "--steps", 1,
                 "--batch-size", 6, "--eval-samples", 2)
    rows = {}
    for name, more in (("follows", ()), ("equal", ("--train-temperature", 1.0, "--eval-temperature", 1.0)),
                       ("apart", ("--train-temperature", 0.3, "--eval-temperature", 0))):
        assert call(train_grpo, *arguments, "--out", tmp_path / name, *more)[0] == 0
        rows[name] = [json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")]
    assert [row["eval"] for row in rows["follows"]] == [row["eval"] for row in rows["equal"]]
    assert rows["apart"][1]["entropy"] < 0.8 * rows["follows"][1]["entropy"]
    for name in rows:
        assert rows[name][1]["sampling_logp_difference"] < 1e-5
    result = rows["apart"][0]["eval"]["targeted"]
    assert result["mean"] == result["greedy"] == rows["follows"][0]["eval"]["targeted"]["greedy"]
    assert rows["follows"][0]["eval"]["targeted"]["mean"] != result["mean"]


def test_sample_of_a_step_and_its_reward(micro_run, world, tmp_path, call, monkeypatch):
    """sample is a selected prompt with its response; sample_reward is the reward of that response."""
    earned = {}  # responses that differ have different rewards

    def graded(response, answer, verifier):
        return earned.setdefault((response, answer), len(earned) / 1000)

    monkeypatch.setattr(train_grpo, "verify", graded)
    run = micro_run[0]
    assert call(train_grpo, "--model", world / "base", "--rollouts", run / "rollouts/train.pt", "--select",
                run / "cropi/phase-0/selected.npy", "--steps", 3, "--batch-size", 4, "--group", 4,
                "--train-temperature", 2.0, "--out", tmp_path / "policy")[0] == 0
    rollouts = train_grpo.load_rollouts(run / "rollouts/train.pt")
    tokenizer = train_grpo.load_tokenizer(world / "base")
    answers = {tokenizer.decode(prompt): answer
               for prompt, answer in zip(rollouts["prompts"], rollouts["answers"])}
    for line in open(tmp_path / "policy/metrics.jsonl"):
        row = json.loads(line)
        if row["step"] > 0:
            prompt = next(text for text in answers if row["sample"].startswith(text))
            response = row["sample"].removeprefix(prompt).replace("<eos>", "").replace("<pad>", "")
            assert row["sample_reward"] == pytest.approx(earned[response, answers[prompt]])


@pytest.mark.parametrize("shift, code, says", [(0.05, 0, ""), (-0.3, 0, "warning: the sampler has log-probs"),
                                               (0.7, 2, "error: the sampler: found log-probs")])
def test_sampler_with_other_log_probs(shift, code, says, micro_run, world, tmp_path, call, monkeypatch):
    """Above 0.1 nats per token it is warned of once, above 0.5 the run stops before it writes a policy."""
    original = train_grpo.sample

    def shifted(*arguments):
        responses, logprobs = original(*arguments)
        return responses, [[x + shift for x in row] for row in logprobs]

    monkeypatch.setitem(train_grpo.ENGINES, "hf", shifted)
    run = micro_run[0]
    found, _, err = call(train_grpo, "--model", world / "base", "--rollouts", run / "rollouts/train.pt",
                         "--select", run / "cropi/phase-0/selected.npy", "--steps", 2, "--batch-size", 2,
                         "--group", 2, "--out", tmp_path / "policy")
    assert found == code and err.count("train_grpo.py: ") == bool(says) and says in err
    assert (tmp_path / "policy").exists() == (code == 0)


def test_gradient_that_is_not_finite(micro_run, world, tmp_path, call, monkeypatch):
    """The run stops before it writes a policy, even in the last step."""
    original = train_grpo.token_entropy
    monkeypatch.setattr(train_grpo, "token_entropy", lambda logits, mask: original(logits, mask) * math.inf)
    run = micro_run[0]
    found, _, err = call(train_grpo, "--model", world / "base", "--rollouts", run / "rollouts/train.pt",
                         "--select", run / "cropi/phase-0/selected.npy", "--steps", 1, "--batch-size", 2,
                         "--group", 2, "--out", tmp_path / "policy")
    assert found == 2 and "error: the update: found a gradient norm of nan" in err
    assert not (tmp_path / "policy").exists()
