"""Stage 4 of CROPI: GRPO on the selected prompts only; the next phase starts from the policy it writes.

For each prompt of a step's batch, G responses o_1 .. o_G are sampled from the current policy. The update
maximizes, averaged over the prompts,

    J(theta) = 1/G sum_i 1/|o_i| sum_t [min(rho A_i, clip(rho, 1-eps, 1+eps) A_i) - lambda_KL k3 + lambda_H H]
    A_i = (R_i - mean R) / (std R + 1e-4)                  rho = pi_theta / pi_old
    k3 = e^D - D - 1,  D = log pi_ref - log pi_theta       H = entropy of pi_theta(. | s_t)

pi_ref is --ref, the policy before any RL; the default, --model, is right in the first phase only. AdamW
(constant learning rate, PyTorch's default weight decay of 0.01, gradients clipped to --max-grad-norm) makes
one update per batch, so pi_old is pi_theta: rho = 1, its gradient is that of log pi, and the clip has no
effect. A group of equal rewards stays in the batch with A = 0, unless --dynamic-sampling replaces it. What is
random is the order of the prompts, seeded by (--seed, epoch), and the responses, seeded by (--seed, step,
place in the batch).

Reads   --rollouts   rollouts.pt of collect.py: prompts, answers and, in its meta, length limit, end tokens,
                     verifier and the temperature (unless --train-temperature). Responses are not used.
        --select     selected.npy of score.py: int64 [n], the prompts to train on.
        --eval       rollouts.pt files made with --k 0: test sets.
        --optimizer  optimizer.pt of the previous phase, whose AdamW state, step and epoch are continued.
Writes  --out        a Hugging Face checkpoint, optimizer.pt, args.json and metrics.jsonl, one line per step.

    python train_grpo.py --model runs/toy/world/base --rollouts train.pt --select selected.npy --out policy \\
        --eval test.pt --steps 30 --batch-size 64 --lr 1e-4
    python train_grpo.py --model policy --ref runs/toy/world/base --optimizer policy/optimizer.pt \\
        --rollouts train.pt --select selected2.npy --out policy2 --steps 30 --batch-size 64 --lr 1e-4
    torchrun --nproc_per_node 8 --shutdown_timeout 1800 train_grpo.py --model MODEL --rollouts train.pt \\
        --select selected.npy --out policy --steps 100 --dtype bfloat16
"""

import argparse
import fcntl
import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cache, lru_cache
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave their core to others
os.environ.setdefault("SYMPY_GROUND_TYPES", "python")  # verify's time limit cannot interrupt gmpy2
os.environ.setdefault("MPMATH_NOGMPY", "1")

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

# ==== 1. The paper ==========================================================================================
CLIP = 0.2  # eps, the paper's value; no flag: with one update per batch, clipping never applies


def group_advantage(rewards):
    """A_k = (R_k - mean R) / (std R + 1e-4), std with Bessel's correction; 0 in a group of equal rewards.

    rewards: [..., K], K >= 2, one group per row. Returns the same shape.

    >>> group_advantage(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    tensor([[ 0.7070, -0.7070],
            [ 0.0000,  0.0000]])
    """
    advantages = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)
    equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)  # std R can be rounding, not 0
    return advantages.masked_fill(equal, 0)


def kl_k3(logp, logp_ref):
    """k3 = e^D - D - 1, D = log pi_ref - log pi_theta: estimates KL(pi_theta || pi_ref) per token, >= 0."""
    delta = logp_ref - logp
    return delta.exp() - delta - 1


def token_entropy(logits, mask):
    """H = -sum_x pi(x | s_t) log pi(x | s_t) [B, R] of softmax(logits), logits [B, R, V]; 0 outside mask."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).masked_fill(~mask, 0)


def grpo_objective(logp, logp_old, logp_ref, entropy, advantages, mask, clip, kl_coef, entropy_coef):
    """1/|o_i| sum_t [ min(rho A_i, clip(rho, 1 - clip, 1 + clip) A_i) - kl_coef k3 + entropy_coef H ].

    logp, logp_old, logp_ref: [B, T] log-probs of the response tokens under pi_theta, pi_old and pi_ref.
    entropy: [B, T]. advantages: [B]. mask: bool [B, T], True where a token exists. Returns [B], one number
    per response; J is its mean.
    """
    ratio = (logp - logp_old).exp()  # [B, T]
    advantages = advantages[:, None]
    tokens = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    tokens = tokens - kl_coef * kl_k3(logp, logp_ref) + entropy_coef * entropy
    return (tokens * mask).sum(1) / mask.sum(1)


def response_logits(policy, prompts, responses, temperature):
    """The logits of pi_theta(. | s_t) for each response token, for b prompts with n responses each.

    prompts: b sequences of token ids; responses: b * n sequences, prompt-major. Returns float32 logits /
    temperature [b * n, R, V], R the length of the longest response; the response tokens [b * n, R]; and the
    bool mask [b * n, R] of those that exist.

    The policy is called twice: with the prompts, then with the responses, which share the cached keys and
    values of their prompt; gradients flow back through these. Prompts are padded on the left and masked,
    responses on the right, where no real token attends to it: what shares a batch changes only rounding.
    """
    n = len(responses) // len(prompts)
    tokens, exist = pad(prompts, "left", policy.device)  # [b, P]
    cache = DynamicCache(config=policy.config)
    positions = (exist.cumsum(1) - 1).clamp(min=0)
    logits = policy(tokens, attention_mask=exist.long(), position_ids=positions, past_key_values=cache,
                    logits_to_keep=1).logits[:, -1:]
    logits = logits.repeat_interleave(n, 0)  # [b * n, 1, V], for the first response token

    targets, mask = pad(responses, "right", policy.device)  # [b * n, R]
    if targets.shape[1] > 1:
        cache.batch_repeat_interleave(n)
        inputs = targets[:, :-1]  # after inputs[:, t] comes targets[:, t + 1]
        exist = torch.cat([exist.repeat_interleave(n, 0), torch.ones_like(inputs).bool()], 1)
        positions = exist.cumsum(1)[:, tokens.shape[1]:] - 1
        later = policy(inputs, attention_mask=exist.long(), position_ids=positions, past_key_values=cache)
        logits = torch.cat([logits, later.logits], 1)  # [b * n, R, V]
    return logits.float().div_(temperature), targets, mask  # in place: logits are the largest tensor


def pad(sequences, side, device):
    """Token ids [B, T] of B sequences, padded with 0 on one side, and the bool mask [B, T] of real tokens."""
    tensors = [torch.as_tensor(sequence).long() for sequence in sequences]
    exist = [torch.ones_like(tensor).bool() for tensor in tensors]
    tokens = pad_sequence(tensors, batch_first=True, padding_side=side)
    return tokens.to(device), pad_sequence(exist, batch_first=True, padding_side=side).to(device)


def token_logprobs(logits, targets, mask):
    """log pi(x_t | s_t) [B, R] of `targets` under softmax(logits [B, R, V]); 0 outside mask, bool [B, R]."""
    logp = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return logp.view(mask.shape).masked_fill(~mask, 0)


@dataclass
class Group:
    """G responses to one prompt that were sampled from the current policy; or some of them."""

    prompt: list  # token ids
    responses: list  # G lists of token ids
    logprobs: list  # G lists: log pi of each token, as the sampler computed it
    rewards: list  # G numbers in [0, 1]
    advantages: torch.Tensor = None  # [G]


def grpo_step(policy, reference, optimizer, groups, args):
    """One AdamW update towards higher J on a batch of groups. Returns its row of metrics.jsonl.

    J is a mean over the batch's responses (with --token-mean: over its tokens), those without a gradient
    included. Each micro-batch adds its part of the gradient. reference: pi_ref, or None without a KL term. On
    several GPUs all ranks have all groups, each computes its share of the micro-batches, and `weight` undoes
    FSDP2's average over ranks.
    """
    everything = sum([group.responses for group in groups], [])  # B*G responses
    n_responses = len(everything)
    n_tokens = sum(len(response) for response in everything)
    sums = torch.zeros(4, device=policy.device)  # over computed tokens: of k3, H, |logp - sampler's| and 1
    computed = groups_with_gradient(groups, args)
    for batch, weight in share_of_rank(micro_batches(computed, args.batch_tokens)):  # weight 1 on one GPU
        prompts = [group.prompt for group in batch]
        responses = sum([group.responses for group in batch], [])  # n of the G responses to each prompt
        with mixed_precision(policy, args.dtype):
            logits, targets, mask = response_logits(policy, prompts, responses, args.train_temperature)
        logp = token_logprobs(logits, targets, mask)  # [b * n, R]
        entropy = token_entropy(logits, mask)
        del logits  # the largest tensor, V numbers per token: frees memory for the reference's logits
        logp_ref = logp.detach()  # without a reference, k3 and its gradient are 0
        if reference:
            with torch.no_grad(), mixed_precision(reference, args.dtype):
                logits, _, _ = response_logits(reference, prompts, responses, args.train_temperature)
                logp_ref = token_logprobs(logits, targets, mask)
                del logits
        advantages = torch.cat([group.advantages for group in batch]).to(policy.device)  # [b * n]
        objective = grpo_objective(logp, logp.detach(), logp_ref, entropy, advantages, mask, CLIP,
                                   args.kl_coef, args.entropy_coef)  # [b * n]
        if args.token_mean:
            objective = objective * mask.sum(1) * (n_responses / n_tokens)  # weights |o_i| / mean |o|
        loss = -objective.sum() / n_responses
        (weight * loss).backward()
        sampled = sum([group.logprobs for group in batch], [])
        sampled = pad_sequence([torch.tensor(logprobs) for logprobs in sampled], batch_first=True)
        difference = (logp - sampled.to(policy.device)).abs()  # 0 where there is no token
        seen = [kl_k3(logp, logp_ref).sum(), entropy.sum(), difference.sum(), mask.sum()]
        sums += weight * torch.stack(seen).detach()
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    sums = mean_over_ranks(sums)
    kl, entropy, difference = (sums[:3] / sums[3]).tolist()
    return {"groups": len(groups), "kl": kl, "entropy": entropy, "sampling_logp_difference": difference,
            "grad_norm": float(whole(grad_norm))}


def main():
    args = parse_arguments()
    device = join_ranks(args.device)
    rollouts = load_rollouts(args.rollouts)
    selected = load_selection(args.select, len(rollouts["prompts"]))
    tests = {Path(path).stem: load_rollouts(path) for path in args.eval}
    check_inputs([rollouts, *tests.values()], args)
    run = Run(args, selected)  # works in OUT.part: checkpoints, metrics, Ctrl-C
    if run.is_complete():
        return
    run.lock()
    tokenizer = load_tokenizer(args.model)
    sampler = Sampler(args, device, tokenizer, [rollouts, *tests.values()])  # vLLM starts on an empty GPU
    policy = build_policy(args.model, device, args.dtype)
    reference = build_policy(args.ref or args.model, device, args.dtype) if args.kl_coef else None
    optimizer = build_optimizer(policy, args.lr)  # AdamW
    run.check_output(policy, tokenizer)
    state = run.resume(policy, optimizer)  # the steps that are done, the place in the order of prompts
    sampler.update(policy)
    if state.step == 0:  # counted over all phases; state.done: since --model
        run.log(state, evaluate(sampler, tests, args))

    while state.done < args.steps and not run.stopped:
        began = time.perf_counter()
        sampler.verifying_seconds = 0.0
        groups, row = sample_groups(sampler, rollouts, selected, state, args)
        row["sampling_seconds"] = time.perf_counter() - began
        row["verifying_seconds"] = sampler.verifying_seconds  # a part of sampling_seconds
        for group in groups:
            group.advantages = group_advantage(torch.tensor(group.rewards))
        sampler.sleep()  # vLLM frees its memory for the update
        row |= grpo_step(policy, reference, optimizer, groups, args)
        check_step(row, warn=state.done == 0)
        sampler.update(policy)  # the next step samples from the new policy
        state.step += 1
        state.done += 1
        state.seconds += time.perf_counter() - began
        row |= show_sample(groups[0], tokenizer)
        if state.done == args.steps or state.step % args.eval_every == 0:
            row |= evaluate(sampler, tests, args)
        run.log(state, row)
        run.save_if_due(policy, optimizer, state)  # also after Ctrl-C, which ends the loop
    run.finish(policy, optimizer, tokenizer, state)
    leave_ranks(args.engine)


# ==== 2. Faster, same numbers ===============================================================================
# Sampling many responses at once, with transformers or vLLM; micro-batches; several GPUs; mixed precision.
# Without it, each would be a loop over single prompts on one device; what they compute is in part 1.

# ---- sampling and rewards ----
ROUNDS = 10  # of dynamic sampling per step, at most


def sample_groups(sampler, rollouts, selected, state, args):
    """The groups of a step and its metrics, those of all that was sampled. Advances state.position.

    --dynamic-sampling: further rounds of --batch-size prompts, until that many groups have unequal rewards.
    """
    size = args.batch_size
    sampled = []
    unequal = []
    rounds = 0
    while rounds == 0 or (args.dynamic_sampling and rounds < ROUNDS and len(unequal) < size):
        batch = next_prompts(selected, state.position, size, args.seed)
        seeds = [stream_seed(args.seed, state.step, rounds * size + j) for j in range(size)]
        groups = sampler(rollouts, batch, args.group, args.train_temperature, seeds)
        sampled += groups
        unequal += [group for group in groups if max(group.rewards) > min(group.rewards)]
        state.position += size
        rounds += 1
    row = sampling_metrics(sampled, rollouts["meta"]["eos_ids"])
    row |= {"rounds": rounds, "frac_reward_zero_std": 1 - len(unequal) / len(sampled)}
    if args.dynamic_sampling:
        sampled = unequal[:size] or sampled[-size:]  # none is unequal: their advantages are 0
    return sampled, row


def next_prompts(selected, position, count, seed):
    """`count` prompts from a position on: epoch after epoch over `selected`, each in its own random order."""
    first, offset = divmod(position, len(selected))
    epochs = math.ceil((offset + count) / len(selected))
    prompts = []
    for epoch in range(first, first + epochs):
        generator = torch.Generator().manual_seed(stream_seed(seed, "order", epoch))
        prompts += [selected[i] for i in torch.randperm(len(selected), generator=generator).tolist()]
    return prompts[offset:offset + count]


def sampling_metrics(groups, eos_ids):
    """Mean reward, tokens, mean response length and the share of truncated responses."""
    responses = sum([group.responses for group in groups], [])
    tokens = sum(len(response) for response in responses)
    truncated = sum(response[-1] not in eos_ids for response in responses)
    return {"reward": float(torch.tensor([group.rewards for group in groups]).mean()), "tokens": tokens,
            "response_length": tokens / len(responses), "frac_truncated": truncated / len(responses)}


def show_sample(group, tokenizer):
    """A prompt with its first response as text, and its reward, for metrics.jsonl."""
    text = tokenizer.decode([*group.prompt, *group.responses[0]])
    return {"sample": text, "sample_reward": float(group.rewards[0])}


def evaluate(sampler, tests, args):
    """{"eval": {test set: {"mean": accuracy at --eval-temperature, "greedy": greedy accuracy}}}."""
    results = {}
    for name, test in tests.items():
        batch = range(len(test["prompts"]))
        seeds = [stream_seed(args.seed, "eval", i) for i in batch]  # the same in every evaluation
        greedy = sampler(test, batch, 1, 0.0, seeds)
        sampled = greedy
        if args.eval_temperature:
            sampled = sampler(test, batch, args.eval_samples, args.eval_temperature, seeds)
        results[name] = {"mean": mean_reward(sampled), "greedy": mean_reward(greedy)}
    return {"eval": results} if results else {}


def mean_reward(groups):
    return float(torch.tensor([group.rewards for group in groups]).mean())


class Sampler:
    """Samples with vLLM, with the policy itself or, under torchrun, with an unsharded copy of it."""

    def __init__(self, args, device, tokenizer, rollouts):
        self.engine = args.engine
        self.dtype = args.dtype
        self.kv_tokens = args.kv_tokens
        self.tokenizer = tokenizer
        self.model = None
        self.verifying_seconds = 0.0  # on this rank, since it was last set to 0
        if args.engine == "vllm":
            longest = [int(r["prompt_lengths"].max()) + r["meta"]["max_new_tokens"] for r in rollouts]
            self.model = load_vllm(args.model, args.dtype, args.kv_tokens, max(longest))
            self.sleep()
        elif WORLD > 1:
            self.model = load_policy(args.model, device, args.dtype)

    def sleep(self):
        """Frees vLLM's memory on a GPU (weights and cache), until the next update."""
        if self.engine == "vllm" and torch.cuda.is_available():
            self.model.sleep(level=2)

    def update(self, policy):
        """Copies the weights of `policy`, and wakes vLLM."""
        weights = ((name, whole(weight.detach())) for name, weight in policy.named_parameters())
        if self.engine == "vllm":
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # memory that training has freed goes back to the GPU
                self.model.wake_up(tags=["weights"])
            self.model.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self.model.apply_model(pack_output_layer)
            if torch.cuda.is_available():
                self.model.wake_up(tags=["kv_cache"])
        elif WORLD == 1:
            self.model = policy
        else:
            for ours, (_, weight) in zip(self.model.parameters(), weights):
                ours.data.copy_(weight)

    def __call__(self, rollouts, batch, k, temperature, seeds):
        """Groups of k verified responses to each of the B prompts `batch` of a rollouts.pt. seeds: B ints.

        Every rank samples its share and receives the others'.
        """
        meta = rollouts["meta"]
        own = range(RANK, len(batch), WORLD)  # places in the batch
        prompts = [rollouts["prompts"][batch[j]].tolist() for j in own]
        costs = [len(prompt) + meta["max_new_tokens"] for prompt in prompts]  # of one response
        budget = sys.maxsize  # vLLM schedules its cache itself
        if self.engine == "hf":
            budget = self.kv_tokens // k
        groups = {}
        for some in batches_by_tokens(costs, budget):
            queries = [prompts[i] for i in some]
            own_seeds = [seeds[own[i]] for i in some]
            with mixed_precision(self.model, self.dtype):
                responses, logprobs = ENGINES[self.engine](
                    self.model, queries, k, temperature, meta["max_new_tokens"], meta["eos_ids"], own_seeds)
            texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
            for number, i in enumerate(some):
                rows = slice(number * k, (number + 1) * k)
                answer = rollouts["answers"][batch[own[i]]]
                name = f"prompt {batch[own[i]]}"
                began = time.perf_counter()
                rewards = rewards_of(texts[rows], answer, meta["verifier"], name)
                self.verifying_seconds += time.perf_counter() - began
                groups[own[i]] = Group(prompts[i], responses[rows], logprobs[rows], rewards)
        groups = gather_from_ranks(groups)
        return [groups[j] for j in range(len(batch))]


def stream_seed(*key):
    """A seed for torch.Generator from any key, so that each use of random numbers has its own stream."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")


@torch.no_grad()
def sample(policy, prompts, k, temperature, max_new_tokens, eos_ids, seeds):
    """tau_1 .. tau_k ~ softmax(logits / temperature) for each prompt, and log pi of every token (engine hf).

    prompts: B lists of token ids. seeds: B ints; a prompt's responses depend on its own seed, not on the rest
    of the batch. temperature 0 is argmax. Returns responses and logprobs, B*k lists each, prompt-major. A
    response includes its end token, unless it was truncated at max_new_tokens.
    """
    device = policy.device
    uniforms = []  # one number per token, drawn on the CPU: the same on every device
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        uniforms.append(torch.rand(k, max_new_tokens, dtype=torch.float64, generator=generator))
    uniforms = torch.cat(uniforms).to(device)  # [B*k, max_new_tokens]
    end = torch.tensor(eos_ids, device=device)

    # the prompts, padded on the left; each is read once and its keys and values are repeated k times
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # [B, P]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # [B, P]
    cache = DynamicCache(config=policy.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = policy(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache,
                    logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(k)
    logits = logits.repeat_interleave(k, 0)  # [B*k, V]
    mask = mask.repeat_interleave(k, 0)  # [B*k, P]

    active = torch.arange(len(mask), device=device)  # rows that have not ended; the others leave the batch
    responses = [[] for _ in range(len(mask))]
    logprobs = [[] for _ in range(len(mask))]
    for t in range(max_new_tokens):
        logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # [active, V]
        if temperature:  # invert the cumulative distribution, whose last value is 1 up to rounding
            cdf = logp.exp().cumsum(-1, dtype=torch.float64)
            u = uniforms[active, t, None] * cdf[:, -1:]  # [active, 1]
            token = torch.searchsorted(cdf, u, right=True).clamp(max=cdf.shape[1] - 1)  # first cdf > u
        else:  # greedy decoding, for the evaluations of train_grpo.py
            token = logp.argmax(-1, keepdim=True)  # [active, 1]
        logp_token = logp.gather(1, token)
        for row, x, logp_x in zip(active.tolist(), token[:, 0].tolist(), logp_token[:, 0].tolist()):
            responses[row].append(x)
            logprobs[row].append(logp_x)
        unfinished = (~torch.isin(token[:, 0], end)).nonzero()[:, 0]
        if len(unfinished) == 0 or t + 1 == max_new_tokens:
            break
        if len(unfinished) < len(active):
            cache.batch_select_indices(unfinished)
            active = active[unfinished]
            token = token[unfinished]
            mask = mask[unfinished]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = policy(token, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                        past_key_values=cache).logits[:, -1]
    return responses, logprobs


def batches_by_tokens(lengths, budget):
    """Batches of indices, longest first, of at most `budget` tokens each, with padding to the longest."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def load_vllm(name, dtype, kv_tokens, context):
    """vLLM in this process. kv_tokens: in its KV cache; context: longest prompt and response together."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where weights can be replaced
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # float32 attention in float32, not in TF32
    gpu = torch.cuda.is_available()
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * width * getattr(torch, dtype).itemsize  # cache bytes
        cache_tokens = max(kv_tokens, 2 * context + 1024)  # vLLM refuses one that cannot hold a long sequence
        with warnings.catch_warnings(action="ignore"):  # from packages that vLLM imports
            from vllm import LLM

            return LLM(name, dtype=dtype, max_model_len=context, logprobs_mode="processed_logprobs",
                       generation_config="vllm", skip_tokenizer_init=True, use_tqdm_on_load=False,
                       kv_cache_memory_bytes=cache_tokens * token,
                       gpu_memory_utilization=0.01,  # free at the start; kv_cache_memory_bytes sets the cache
                       enforce_eager=not gpu, enable_sleep_mode=gpu,
                       distributed_executor_backend="external_launcher" if WORLD > 1 else None)
    except Exception as error:  # no vLLM, or one that cannot run this model here
        fail(name, f"no vLLM engine for it ({error})", "vLLM and a model that it knows",
             "pip install -r requirements-vllm.txt, lower --kv-tokens, or choose --engine hf")


def sample_vllm(llm, prompts, k, temperature, max_new_tokens, eos_ids, seeds):
    """Like `sample`, using vLLM (engine vllm). Equal batches with equal seeds give equal responses."""
    from vllm import SamplingParams

    if not llm.reset_prefix_cache():  # its keys and values are those of older weights
        raise RuntimeError("vLLM did not empty its cache")
    settings = [SamplingParams(n=k, seed=seed % 2**62, temperature=temperature, max_tokens=max_new_tokens,
                               ignore_eos=True, stop_token_ids=eos_ids, logprobs=0, detokenize=False)
                for seed in seeds]
    requests = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    responses = []
    logprobs = []
    for request in requests:
        for output in request.outputs:
            responses.append(list(output.token_ids))
            logprobs.append([at[x].logprob for at, x in zip(output.logprobs, output.token_ids)])
    return responses, logprobs


ENGINES = {"hf": sample, "vllm": sample_vllm}
KV_TOKENS = {"hf": 65536, "vllm": 262144}  # default of --kv-tokens: 1.9 and 7.5 GB for a 1.5B Qwen2.5


def pack_output_layer(model):
    """Repacks a tied output layer: on a CPU, reloading weights makes vLLM drop its packed copy."""
    head = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


def verify(response, answer, verifier):
    """R(tau) in [0, 1]: whether, or how well, the text `response` gives `answer`.

    verifier 'path/to/file.py:function': the number in [0, 1] that your function(response, answer) returns.
    'exact' and 'math' read what follows the last </think>, and of several boxes the last that is not empty.
    'exact': the last \\boxed{} of the response, or else all of it, is the answer up to white space.
    'math': math-verify compares the last box, or else the last expression, with the answer as mathematics;
    a word, a sequence or a date as text (`is_text`). For the answer 0.5, 1/2 is right; 3 - 2 + 4 is accepted
    for 5, even if it only repeats the prompt. Of an answer with '####' (GSM8K) or a box, only that counts.

    >>> verify("so it is \\\\boxed{cab}", "cab", "exact"), verify("It is 0.5.", "reason #### 1/2", "math")
    (1.0, 1.0)
    """
    if verifier not in ("exact", "math"):
        return verify_by_function(response, answer, verifier)  # all of the response
    response = response.rpartition("</think>")[2]
    box = last_box(response)
    if verifier == "exact":
        end = r"\Z" if box is None else "}"
        last = response if box is None else box
        return float(bool(re.match(rf"\s*{re.escape(answer.strip())}\s*" + end, last)))
    gold = gold_answer(answer)
    if isinstance(gold, str):
        return float(plain(answer_in(response)) == gold)
    import math_verify  # here, since it takes a second, and 'exact' does not need it

    last = response.replace("\\$", "") if box is None else as_formula(answer_in(response))
    found = math_verify.parse(last, parsing_timeout=2)  # seconds; usual responses take 0.01 s
    return float(bool(gold) and math_verify.verify(gold, found, timeout_seconds=2))


# ---- micro-batches, several GPUs, mixed precision ----
def groups_with_gradient(groups, args):
    """All groups or, if lambda_KL = lambda_H = 0, those of unequal rewards: the others' gradient is 0.

    If all have equal rewards, the first one remains: its gradient of zeros lets AdamW make its step (momentum
    and weight decay), and every rank takes part.
    """
    if args.kl_coef != 0 or args.entropy_coef != 0:
        return groups
    return [group for group in groups if group.advantages.any()] or groups[:1]


def micro_batches(groups, batch_tokens):
    """Lists of groups, or of parts of one large group, of at most batch_tokens tokens, longest first."""
    size = len(groups[0].responses)
    sizes = {}
    for j, group in enumerate(groups):
        sizes[j] = len(group.prompt), max(len(response) for response in group.responses)
    batches = []
    for chosen, n in plan_batches(sizes, size, batch_tokens):
        for first in range(0, size, n):
            batches.append([part_of(groups[j], slice(first, first + n)) for j in chosen])
    return batches


def part_of(group, rows):
    """A group with some of its responses, and their advantages in the whole group."""
    return Group(group.prompt, group.responses[rows], group.logprobs[rows], group.rewards[rows],
                 group.advantages[rows])


def plan_batches(sizes, k, budget):
    """Micro-batches of at most `budget` tokens, padding included, longest first: [(prompts, rows)].

    sizes: {prompt: (its tokens, tokens of its longest response)}. A micro-batch has all k responses to its
    prompts (rows = k). A prompt that exceeds the budget gets its own, with `rows` responses per pass.
    """
    plan = []
    prompt_width = 0
    width = 0
    for prompt in sorted(sizes, key=lambda i: -sizes[i][0] - k * sizes[i][1]):
        own, longest = sizes[prompt]
        prompt_width = max(prompt_width, own)
        width = max(width, longest)
        if plan and (len(plan[-1][0]) + 1) * (prompt_width + k * width) <= budget:
            plan[-1][0].append(prompt)
        else:
            rows = max(1, min(k, (budget - own) // longest))
            plan.append(([prompt], rows))
            prompt_width = own
            width = longest
    return plan


def share_of_rank(batches):
    """This rank's micro-batches, each with its weight in sums that are averaged over ranks afterwards.

    FSDP2 averages gradients over the ranks, so a micro-batch weighs WORLD. A rank that has one less than the
    others repeats the first with weight 0, since all ranks must take part in every exchange of weights.
    """
    for turn in range(0, len(batches), WORLD):
        if turn + RANK < len(batches):
            yield batches[turn + RANK], WORLD
        else:
            yield batches[0], 0


def mean_over_ranks(sums):
    if WORLD > 1:
        torch.distributed.all_reduce(sums)
    return sums / WORLD


def gather_from_ranks(groups):
    """The groups of all ranks, {place in the batch: group}."""
    if WORLD == 1:
        return groups
    of_ranks = [None] * WORLD
    torch.distributed.all_gather_object(of_ranks, groups)
    everything = {}
    for share in of_ranks:
        everything |= share
    return everything


def whole(tensor):
    """A tensor that FSDP has sharded, whole on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mixed_precision(model, dtype):
    """Runs float32 weights in bfloat16 products (--dtype bfloat16) on one GPU; FSDP2 does it by itself.

    An update of 1e-6 would be rounded away in bfloat16 weights.
    """
    if WORLD > 1 or dtype == "float32" or not isinstance(model, torch.nn.Module):  # vLLM's model is none
        return nullcontext()
    return torch.autocast(model.device.type, torch.bfloat16)


def build_policy(name, device, dtype):
    """The policy or the reference, in float32: whole on one GPU, sharded by FSDP2 under torchrun."""
    if WORLD == 1:
        policy = load_policy(name, device, "float32")
        check_forward(policy)
        return policy
    precision = MixedPrecisionPolicy(getattr(torch, dtype), torch.float32)
    mesh = torch.distributed.init_device_mesh(torch.device(device).type, (WORLD,))
    for rank in range(WORLD):  # one after the other: the host holds one whole copy at a time
        if rank == RANK:
            policy = load_policy(name, "cpu", "float32")  # a GPU may have room for shards only
            if RANK == 0:
                check_forward(policy)
            # GradientCheckpointingLayer is transformers' base class of decoder layers
            layers = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
            for module in [*layers, policy]:
                fully_shard(module, mesh=mesh, mp_policy=precision)
        torch.distributed.barrier()
    return policy


# ==== 3. Files, resuming, bad input =========================================================================
# The command line, checkpoints that survive a kill, refusals before the first step, one-line errors, and
# the rules by which `verify` reads an answer. Skip it, unless you change these or how a run is stored.

FORMAT = 2  # of rollouts.pt
RANK = int(os.environ.get("RANK", "0"))  # of this process among those that torchrun has started
WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # their number
WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)  # unsharded states, on rank 0
SHARDS = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=WORLD > 1)  # to load them
NOTES = """
--dynamic-sampling and --token-mean are DAPO (Yu et al. 2025): groups of equal rewards are replaced by those
of further prompts, in at most 10 rounds of --batch-size prompts per step (if too few remain, the batch is
smaller; the order goes on into the next epoch, so a short selection can give a prompt twice, with other
responses), and J averages over all tokens of the batch. Its higher upper clip has no effect where rho is 1.

metrics.jsonl: step (over all phases), seconds (of this phase, without evaluation), sampling_seconds,
verifying_seconds (a part of these, on rank 0), eval (per test set, the mean reward of --eval-samples
responses per prompt at --eval-temperature, and of one greedy response); of all that was sampled: reward,
frac_reward_zero_std (share of groups with equal rewards), tokens, response_length (mean tokens),
frac_truncated (share that reach the length limit), rounds; of the update: groups, kl and entropy (per token,
in nats), grad_norm, sampling_logp_difference (mean |trainer's log-prob - sampler's| per token); sample and
sample_reward, a prompt with its first response as text: read some, since a policy also learns what only
deceives the verifier. With --kl-coef 0 --entropy-coef 0 the update leaves out groups of equal rewards, whose
gradient is 0 (if all are equal, all but the first): kl, entropy and sampling_logp_difference are then means
over the tokens of the other groups.

The run works in OUT.part. If it is stopped (Ctrl-C saves a checkpoint) or killed, the same command resumes
from the last checkpoint (--save-every). On a CPU with the same number of threads, it ends with the same
policy, byte for byte. --dtype bfloat16 is mixed precision: weights and AdamW's state stay float32. Under
torchrun, FSDP2 shards weights, gradients and AdamW's state, and each rank samples its share of the prompts;
another number of ranks can resume a run. After Ctrl-C, torchrun kills the ranks in 30 s: set
--shutdown_timeout to more seconds than a step takes.
"""


def parse_arguments():
    """The command line, with defaults that depend on other arguments or on the rollouts filled in."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=NOTES, formatter_class=layout)
    parser.add_argument("--model", required=True, help="policy to train: a Hugging Face folder or hub name")
    parser.add_argument("--ref", help="reference of the KL term, theta(0) in every phase (--model)")
    parser.add_argument("--rollouts", required=True, help="rollouts.pt with the train prompts")
    parser.add_argument("--select", required=True, help="selected.npy: the prompts to train on")
    parser.add_argument("--verifier", help="the rollouts' file.py:function, to allow its code to run")
    parser.add_argument("--eval", nargs="*", default=[], help="test sets: rollouts.pt files")
    parser.add_argument("--optimizer", help="optimizer.pt of the previous phase")
    parser.add_argument("--out", required=True, type=Path, help="folder of the new policy")
    parser.add_argument("--steps", type=int, required=True, help="AdamW updates")
    parser.add_argument("--batch-size", type=int, default=128, help="prompts per step (128)")
    parser.add_argument("--group", type=int, default=8, help="responses per prompt, G (8)")
    parser.add_argument("--lr", type=float, default=1e-6, help="AdamW's learning rate, constant (1e-6)")
    parser.add_argument("--train-temperature", type=float, help="of the responses trained on (the rollouts')")
    parser.add_argument("--eval-temperature", type=float, help="of tests (--train-temperature); 0: greedy")
    parser.add_argument("--dynamic-sampling", action="store_true", help="replace groups of equal rewards")
    parser.add_argument("--token-mean", action="store_true", help="J as a mean over the batch's tokens")
    parser.add_argument("--kl-coef", type=float, default=1e-3, help="lambda_KL (0.001); 0: no reference")
    parser.add_argument("--entropy-coef", type=float, default=1e-3, help="lambda_H (0.001)")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="gradient clipping (1.0)")
    parser.add_argument("--eval-every", type=int, default=10, help="steps between evaluations (10)")
    parser.add_argument("--eval-samples", type=int, default=4, help="responses per test prompt (4)")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (50)")
    parser.add_argument("--engine", choices=list(ENGINES), default="hf", help="transformers or vLLM (hf)")
    parser.add_argument("--kv-tokens", type=int, help="tokens in the KV cache (hf: 65536, vllm: 262144)")
    parser.add_argument("--batch-tokens", type=int, default=4096 if torch.cuda.is_available() else 512,
                        help="tokens per micro-batch, bounds its memory (4096 on a GPU, 512 elsewhere)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of matmuls")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of the order of prompts (0)")
    args = parser.parse_args()
    if args.train_temperature is not None and args.train_temperature <= 0:
        fail("--train-temperature", args.train_temperature, "more than 0", "log-probs divide by it")
    if args.eval_temperature is not None and args.eval_temperature < 0:
        fail("--eval-temperature", args.eval_temperature, "0 (greedy) or more", "leave it out")
    if len({Path(path).stem for path in args.eval}) < len(args.eval):
        fail("--eval", args.eval, "files with different names", "rename one: results are stored by name")
    least = {"steps": 1, "batch_size": 1, "group": 2, "eval_every": 1, "eval_samples": 1, "save_every": 1}
    for name, bound in least.items():
        if getattr(args, name) < bound:
            fail(f"--{name.replace('_', '-')}", getattr(args, name), f"at least {bound}", "see --help")
    args.kv_tokens = args.kv_tokens or KV_TOKENS[args.engine]
    args.train_temperature = args.train_temperature or load_rollouts(args.rollouts)["meta"]["temperature"]
    if args.eval_temperature is None:
        args.eval_temperature = args.train_temperature
    return args


def load_rollouts(path):
    """rollouts.pt of collect.py; "prompts" [N], "responses" and "logprobs" [N*K] are sequences of tensors."""
    try:
        rollouts = torch.load(path, weights_only=True, mmap=True)  # refuses a pickle that would run code
        if rollouts["meta"]["format"] != FORMAT:
            raise ValueError(f"format {rollouts['meta']['format']}")
        n, k = rollouts["rewards"].shape
        lengths = rollouts["response_lengths"].tolist()
        rollouts["prompts"] = rollouts["prompt_tokens"].split(rollouts["prompt_lengths"].tolist())
        rollouts["responses"] = rollouts["response_tokens"].split(lengths)
        rollouts["logprobs"] = rollouts["logprobs"].split(lengths)
        found = [len(rollouts[name]) for name in ("prompts", "responses", "answers")]
        if found != [n, n * k, n]:
            raise ValueError(f"{found} prompts, responses, answers for rewards [{n}, {k}]")
    except Exception as error:  # a damaged file can raise anything
        fail(path, f"no readable rollouts ({error!r})", f"a rollouts.pt of format {FORMAT}", "collect again")
    return rollouts


def check_checkpoint(name):
    """(vocabulary size, longest sequence) of a checkpoint; refuses a LoRA adapter.

    longrope changes the frequencies of a whole batch if one of its sequences is longer than the model's first
    pre-training had. A gradient must not depend on what shares its batch, so no sequence may be that long.
    """
    if (Path(name) / "adapter_config.json").exists():
        fail(name, "a LoRA adapter", "a whole model", "merge it: peft's AutoPeftModelForCausalLM."
             f"from_pretrained({name!r}).merge_and_unload().save_pretrained(FOLDER)")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
    except Exception as error:  # missing, damaged, of an unknown kind of model
        fail(name, f"no usable config.json ({error})", "a Hugging Face checkpoint", "check --model")
    longest = getattr(config, "max_position_embeddings", None) or sys.maxsize
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):  # some models have them for each type of layer
        if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
            longest = min(longest, parameters["original_max_position_embeddings"])
    return config.vocab_size, longest


def load_policy(name, device, dtype):
    """The policy pi_theta in evaluation mode: dropout would make log-probs differ between passes."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention takes seconds for each new shape
    try:
        policy = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype),
                                                      trust_remote_code=False).to(device).eval()
        if policy._is_stateful:  # Mamba, for example: its state is not in the KV cache that all stages share
            raise ValueError("a recurrent state")
        if not all(parameter.is_floating_point() for parameter in policy.parameters()):
            raise ValueError("quantized weights, which have no gradient")
        return policy
    except Exception as error:  # transformers raises a dozen types here
        fail(name, f"no usable model ({error})", "a causal transformer with a KV cache", "choose another one")


def check_forward(policy):
    """Refuses a policy if response_logits are not its logits without a cache, or have another gradient."""
    prompts = [[1, 0, 1], [0, 1, 1, 0, 1]]
    responses = [[0, 1, 1, 0], [1, 1, 0, 1, 0, 0], [1, 1], [0, 0, 1]]
    tolerance = 1e-2 if policy.dtype == torch.float32 else 0.1  # of rounding, in deep models
    embedding = policy.requires_grad_(True).get_input_embeddings().weight
    try:
        logits, targets, mask = response_logits(policy, prompts, responses, 1.0)
        plain = []
        for number, response in enumerate(responses):
            prompt = prompts[number // 2]
            tokens = torch.tensor([prompt + response], device=policy.device)
            plain.append(policy(tokens).logits[0, len(prompt) - 1:-1].float())
        found = [logits[mask]]
        expected = [torch.cat(plain)]
        for values in (found, expected):
            loss = F.cross_entropy(values[0], targets[mask])
            values.append(torch.autograd.grad(loss, embedding)[0].float())
        for one, other in zip(found, expected):
            if not (one - other).norm() <= tolerance * other.norm():  # or NaN
                raise ValueError("other logits, or another gradient, with a KV cache than without")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a cache that cannot be repeated, for example
        fail(policy.name_or_path, f"no usable forward pass ({error!r})", "a transformer with a KV cache",
             "choose another model")


def last_box(text):
    """What follows the opening brace of the last \\boxed{ or \\fbox{ that is not empty; None without one."""
    starts = [box.end() for box in re.finditer(r"\\(?:boxed|fbox)\s*\{(?!\s*\})", text)]
    return text[starts[-1]:] if starts else None


def answer_in(text):
    """The last box of a text, or else what follows '####', or else all of it, without currency signs."""
    box = last_box(text)
    if box is None:
        text = text.rpartition("####")[2]
    else:
        text = ""  # of a box without its closing brace
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", box, re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                text = box[:brace.start()]
                break
    text = re.sub(r"\A[^$]*\$([^$]+)\$[\s.]*\Z", r"\1", text.replace("\\$", "").strip())  # the only formula
    without = re.sub(r"\$(?=\s*[\d.])", "", text)
    text = text if "$" in without else without  # $15: dollars
    if re.fullmatch(r"[-+]?\d{1,3}((\\[ ,;:!]|[ ~])\d{3})+(\.\d+)?", text):  # 1\,000
        text = re.sub(r"[^-+\d.]", "", text)
    text = re.sub(r"\A([-+]?[\d.]+)[eE]([-+]?\d+)\Z", r"\1 \\times 10^{\2}", text)
    return re.sub(r"\A([-+]?\d+) (\d+)/(\d+)\Z", r"\1\\frac{\2}{\3}", text)  # 3 1/2


def as_formula(text):
    return text if "$" in text else f"${text}$"


def plain(text):
    """A text without capitals, LaTeX's fonts and spaces, and marks that do not change what it says."""
    text = re.sub(r"\\(?:text|math)[a-z]*|\\mbox|\\[()]|[{}$\"“”]|\.(?!\d)", "", text.casefold())
    text = re.sub(r"\\[ ,;:!]|\\q?quad\b|~", " ", text)
    text = re.sub(r"(?<=[^\W\d_]{2})[!?]", "", " ".join(text.split()))  # n! is a factorial
    text = re.sub(r"\A[\[(]([^,]*)[\])]\Z", r"\1", text)  # (B), [2 1 3]
    return re.sub(r" ?[,;] ?| and | or ", ", ", text)


def is_text(answer):
    """Whether `math` compares an answer as text: words, strings of letters, sequences, dates.

    >>> [is_text(answer) for answer in ("BA", "no solution", "2 1 3", "b, a", "2024-01-05", "3:05 PM")]
    [True, True, True, True, True, True]
    >>> [is_text(answer) for answer in ("B", "2x", "5 apples", "1/2", "2, -1", "x=3", "\\\\pi")]
    [False, False, False, False, False, False, False]
    """
    word = r"[^\W\d_]+['’][^\W\d_]+|[^\W\d_]{3,}(?:-[^\W\d_]{3,})+|[^\W_]+"  # a-b is a difference
    token = rf"[-+]?\d+(?:[-/.:t]\d+)*z?|{word}"
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:/[1-9]\d*)? ?[^\W\d_]*(?: [^\W\d_]+)*"  # and its unit
    ratio = r"\d+:[1-9]\d*"  # 3:05 is a time
    items = plain(answer).split(", ")
    if not all(re.fullmatch(token, part) for part in " ".join(items).split(" ")):
        return False
    letters = len(items) > 1 and not re.search(r"\d", answer)
    return letters or any(len(item) > 1 and not re.fullmatch(f"{number}|{ratio}", item) for item in items)


@lru_cache(maxsize=1000)  # once for all responses to a prompt
def gold_answer(answer):
    """What `math` compares responses with: text, or a list of expressions, empty if the answer has none."""
    gold = answer_in(answer)
    if is_text(gold):
        return plain(gold)
    import math_verify

    return math_verify.parse(as_formula(gold))


class VerifierError(Exception):
    """What your own function did instead of returning a number in [0, 1]."""


def rewards_of(responses, answer, verifier, prompt):
    """R of each response, a text, to one prompt; equal ones are verified once. prompt: named in an error."""
    rewards = {}
    for number, response in enumerate(responses, start=1):
        try:
            if response not in rewards:
                rewards[response] = verify(response, answer, verifier)
        except VerifierError as error:
            fail(verifier, f"{error}, response {number} to {prompt}", "a number in [0, 1]",
                 "fix the function")
    return [rewards[response] for response in responses]


def verify_by_function(response, answer, name):
    """The reward by your own function. name: 'path/to/file.py:function'."""
    try:
        reward = float(load_function(name)(response, answer))
        if not 0 <= reward <= 1:  # or NaN
            raise ValueError(f"it returned {reward}")
        return reward
    except Exception as error:
        raise VerifierError(f"{error!r} for answer {answer[:80]!r} and response {response[:80]!r}") from error


@cache
def load_function(name):
    """The function that 'path/to/file.py:function' names. Runs the file."""
    path, _, function = name.rpartition(":")
    try:
        sys.path.insert(0, str(Path(path).resolve().parent))  # it imports files beside it, as a script does
        spec = importlib.util.spec_from_file_location("users_verifier", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["users_verifier"] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
        return getattr(module, function)
    except Exception as error:  # whatever the user's file raises
        fail(name, f"no such verifier ({error!r})", "math, exact or path/to/file.py:function", "see --help")


def load_tokenizer(name):
    try:
        folder = Path(name)
        if folder.is_dir() and not [*folder.glob("*token*"), *folder.glob("vocab*")]:
            raise OSError("no tokenizer file")  # from which transformers would make an empty tokenizer
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen types here
        fail(name, f"no tokenizer ({error})", "a checkpoint with its tokenizer", "save the tokenizer there")


def check_fits(path, rollouts, vocabulary, longest):
    """Refuses rollouts with token ids or lengths that the policy does not have."""
    parts = [rollouts["prompt_tokens"], rollouts["response_tokens"]]
    largest = max(int(part.max()) for part in parts if len(part))
    length = int(rollouts["prompt_lengths"].max()) + rollouts["meta"]["max_new_tokens"]
    if largest >= vocabulary or length > longest:
        fail(path, f"token ids up to {largest} and sequences of up to {length} tokens",
             f"ids below {vocabulary} and at most {longest} tokens", "collect with this model")


def load_selection(path, n):
    """selected.npy of score.py as a list: indices of prompts, best first."""
    try:
        selected = np.load(path, allow_pickle=False)
        if selected.dtype != np.int64 or selected.ndim != 1 or not 0 <= selected.min() <= selected.max() < n:
            raise ValueError(f"{selected.dtype} {list(selected.shape)}, or indices out of range")
    except Exception as error:  # missing, truncated, not .npy, a pickle, of other rollouts
        fail(path, f"no usable selection ({error})", f"int64 indices of {n} prompts", "run score.py on them")
    return selected.tolist()


def check_inputs(sources, args):
    """Refuses rollouts that --model has not the tokens for, and verifiers that --verifier does not name."""
    vocabulary, longest = check_checkpoint(args.model)
    check_checkpoint(args.ref or args.model)
    for path, source in zip([args.rollouts, *args.eval], sources):
        check_fits(path, source, vocabulary, longest)
    named = args.verifier
    found = {source["meta"]["verifier"] for source in sources}
    unnamed = found - {"exact", "math", named}
    if unnamed or named not in (None, *found):
        expected = f"that of the rollouts, {', '.join(unnamed or found)}"
        fail("--verifier", named or "nothing", expected, "name it if you trust its code")


def check_step(row, warn):
    """Stops if the gradient is not finite or the sampler's log-probs are not the policy's (other weights)."""
    difference = row["sampling_logp_difference"]
    found = f"log-probs that differ from the policy's by {difference:.3f} per token on average"
    if not difference <= 0.5:  # or NaN
        fail("the sampler", found, "at most 0.5", "its weights were not updated, or the policy has diverged")
    if not math.isfinite(row["grad_norm"]):
        fail("the update", f"a gradient norm of {row['grad_norm']}", "a finite one", "lower --lr")
    if warn and difference > 0.1 and RANK == 0:
        print(f"train_grpo.py: warning: the sampler has {found}; try --dtype float32", file=sys.stderr)


class LogLines:
    """A file for tqdm where stderr is no terminal: a line for each update, no carriage returns."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        pass


BAR = {} if sys.stderr.isatty() else {"file": LogLines(), "mininterval": 60}


@dataclass
class State:
    """Where a run is, besides the weights and AdamW's state."""

    step: int = 0  # over all phases
    done: int = 0  # steps of this phase
    position: int = 0  # in the order of prompts
    seconds: float = 0.0  # of this phase, without evaluation
    metrics: list = field(default_factory=list)  # rows of metrics.jsonl


def build_optimizer(policy, lr):
    """AdamW with the state of every parameter, zeros.

    By default a parameter has none before its first gradient (an unused vision tower never gets one), and
    `states` can't load what is missing.
    """
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr)
    for weight in policy.parameters():
        optimizer.state[weight] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(weight),
                                   "exp_avg_sq": torch.zeros_like(weight)}
    return optimizer


def token_ids(config):
    """A GenerationConfig with the special tokens of `config` alone: transformers writes no invalid ones."""
    return GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id,
                            pad_token_id=config.pad_token_id)


class Run:
    """The folder OUT.part in which a run works, until it is renamed to OUT; its checkpoint; Ctrl-C."""

    def __init__(self, args, selected):
        self.args = args
        self.out = args.out
        self.part = args.out.with_name(args.out.name + ".part")
        self.stopped = False  # by Ctrl-C or SIGTERM
        may_change = ("kv_tokens", "batch_tokens", "device")  # when resuming
        settings = {name: value for name, value in vars(args).items() if name not in may_change}
        self.settings = json.loads(json.dumps({**settings, "selected": selected}, default=str))

    def is_complete(self):
        """Whether OUT exists, made with the same settings."""
        if not self.out.exists():
            return False
        self.check_settings(self.out)
        print(f"{self.out}: complete, nothing to do")
        return True

    def check_settings(self, folder):
        """Refuses a folder that was made with other settings."""
        path = folder / "args.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        changed = ", ".join(key for key in self.settings if found.get(key) != self.settings[key])
        if changed:
            fail(folder, f"a run with another {changed}", "equal settings", "remove it or change --out")

    def lock(self):
        """Makes the folder and locks it, as long as this process runs."""
        try:
            self.part.mkdir(parents=True, exist_ok=True)
            self.lock_file = open(self.part / "lock", "w")
            if RANK == 0:
                fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(self.out, "another run that is writing it", "one run per folder",
                 "wait or choose another --out")
        except OSError as error:
            fail(self.out, f"a path that cannot be written ({error})", "a writable place",
                 "choose another --out")

    def check_output(self, policy, tokenizer):
        """Refuses, before the first step, what could not be written after the last one."""
        self.check_space(policy)
        if RANK > 0:
            return
        try:
            for part in (policy.config, token_ids(policy.generation_config), tokenizer):
                part.save_pretrained(self.part)
        except Exception as error:  # transformers validates what it writes
            fail(self.args.model, f"a configuration or tokenizer that cannot be written ({error})",
                 "valid ones", "correct its files")

    def check_space(self, policy):
        """Refuses a disk without room for the policy with AdamW's state and, if one is due, a checkpoint.

        A checkpoint that exists stays; all else in the folder is going to be replaced.
        """
        # a tenth more for the tokenizer and for tied weights, which a sharded policy's checkpoint has twice
        needed = 3.3 * sum(p.numel() * p.element_size() for p in policy.parameters())
        contents = "the policy"
        checkpoint = self.part / "checkpoint.pt"
        if self.args.steps > self.args.save_every and not checkpoint.exists():
            needed = 2 * needed
            contents = "the policy and a checkpoint"
        replaced = sum(file.stat().st_size for file in self.part.iterdir() if file != checkpoint)
        free = shutil.disk_usage(self.part).free + replaced
        if free < needed:
            fail(self.part, f"{free / 1e9:.3g} GB of free disk",
                 f"{needed / 1e9:.3g} GB for {contents}, with AdamW's state", "free some, or change --out")

    def resume(self, policy, optimizer):
        """Loads this run's checkpoint or, if there is none, --optimizer. Returns the State.

        From here on Ctrl-C ends the run after the current step, a second one at once.
        """
        state = State()
        path = self.args.optimizer
        if (self.part / "checkpoint.pt").exists():
            self.check_settings(self.part)
            path = self.part / "checkpoint.pt"
        try:
            if path:
                stored = torch.load(path, weights_only=True, mmap=True)  # nothing is read yet
                states.set_state_dict(policy, optimizer, model_state_dict=stored.pop("weights", {}),
                                      optim_state_dict=stored.pop("optimizer"), options=SHARDS)
                state = State(**stored)
        except Exception as error:  # missing, damaged, or of another model
            fail(path, f"no usable state ({error})", "an optimizer.pt of this model", "use the policy's own")
        for group in optimizer.param_groups:
            group.update(optimizer.defaults)  # use this run's learning rate; loading turns tuples into lists
        if RANK == 0:
            (self.part / "new.json").write_text(json.dumps(self.settings))
            os.replace(self.part / "new.json", self.part / "args.json")
        self.stop = StopRequest()
        self.progress = tqdm(desc=f"train {self.out}", initial=state.done, total=self.args.steps, unit="step",
                             disable=RANK > 0, **BAR)
        return state

    def log(self, state, row):
        """Adds a row to the metrics, and writes them all to metrics.jsonl."""
        state.metrics.append({"step": state.step, "seconds": state.seconds, **row})
        if RANK == 0:
            lines = [json.dumps(row) + "\n" for row in state.metrics]
            with reporting_full_disk(self.part):
                (self.part / "metrics.jsonl").write_text("".join(lines))
        if "reward" in row:
            shown = {"reward": row["reward"], "zero_std": row["frac_reward_zero_std"]}
            shown = {name: f"{value:.2f}" for name, value in shown.items()}
            self.progress.set_postfix(shown, refresh=False)
            self.progress.update()

    def save_if_due(self, policy, optimizer, state):
        """Writes a checkpoint every --save-every steps and when the run is stopped, but not at its end."""
        self.stopped = self.stop.received()
        due = self.stopped or state.done % self.args.save_every == 0
        if not due or state.done == self.args.steps:
            return
        self.save_checkpoint(state, *states.get_state_dict(policy, optimizer, options=WHOLE))

    def save_checkpoint(self, state, weights, moments):
        if RANK == 0:
            with reporting_full_disk(self.part):
                torch.save({**asdict(state), "weights": weights, "optimizer": moments}, self.part / "new.pt")
            os.replace(self.part / "new.pt", self.part / "checkpoint.pt")

    def finish(self, policy, optimizer, tokenizer, state):
        """Writes policy and optimizer.pt, renames OUT.part to OUT. A stopped run exits with 130 instead."""
        self.progress.close()
        if state.done < self.args.steps:
            if RANK == 0:
                print(f"{self.out}: stopped after step {state.done}; the same command resumes it",
                      file=sys.stderr)
            sys.exit(130)
        weights, moments = states.get_state_dict(policy, optimizer, options=WHOLE)
        if RANK > 0:
            return
        try:
            with reporting_full_disk(self.part):
                # sharded, tied weights come back as two: a whole model stores them once
                trained = policy if WORLD == 1 else load_policy(self.args.model, "cpu", "float32")
                trained.load_state_dict(weights)
                trained.generation_config = token_ids(trained.generation_config)
                trained.save_pretrained(self.part)
                tokenizer.save_pretrained(self.part)
                torch.save({"step": state.step, "position": state.position, "optimizer": moments},
                           self.part / "optimizer.pt")
        except Exception as error:  # the steps are not lost
            self.save_checkpoint(state, weights, moments)
            fail(self.part, f"a policy that cannot be written ({error!r})", "one that can",
                 "the same command tries again, from checkpoint.pt")
        for leftover in ("checkpoint.pt", "lock"):
            (self.part / leftover).unlink(missing_ok=True)
        os.replace(self.part, self.out)
        tests = state.metrics[-1].get("eval", {})
        accuracies = [f"{test} {found['mean']:.3f}" for test, found in tests.items()]
        prompts = len(self.settings["selected"])
        print(f"{self.out}: {state.done} steps on {prompts} prompts, {state.seconds:.0f} s", *accuracies,
              sep="; ")


@contextmanager
def reporting_full_disk(path):
    """Reports a disk that becomes full while `path` is written; torch.save hides this in a RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError):
        if shutil.disk_usage(path.parent).free > 2**20:
            raise
        fail(path, "a full disk", "room for it", "free some, then run the same command again")


class StopRequest:
    """Whether Ctrl-C or SIGTERM asked to stop after the current step; a second one ends the run at once."""

    def __init__(self):
        self.flag = torch.zeros(1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.flag.fill_(1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    def received(self):
        """Whether any rank had received it when this was called."""
        flag = self.flag.clone()  # a signal that arrives from here on counts in the next call, on all ranks
        if WORLD > 1:
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)


def join_ranks(device):
    """Joins the other processes of torchrun, silences the libraries, returns this rank's device."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # an unparsable response has reward 0
    if RANK >= WORLD or (WORLD > 1 and "MASTER_ADDR" not in os.environ):
        fail("RANK, WORLD_SIZE", f"{RANK}, {WORLD}", "those that torchrun sets", "unset both")
    if WORLD > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(days=1))
    return device


def leave_ranks(engine="hf"):
    if WORLD > 1 and engine == "hf":  # vLLM does it itself
        torch.distributed.destroy_process_group()


def fail(source, found, expected, hint):
    """Reports wrong input in one line on stderr and exits with code 2."""
    if RANK > 0:
        time.sleep(5)  # torchrun ends this rank if rank 0 has reported the same
    line = f"{Path(sys.argv[0]).name}: error: {source}: found {found}; expected {expected}; {hint}"
    print(" ".join(line.split()), file=sys.stderr)  # an exception's text may have several lines
    raise SystemExit(2)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        fail(f"rank {RANK}", f"too little GPU memory ({error})", "room for a micro-batch and the KV cache",
             "lower --batch-tokens or --kv-tokens, or use more GPUs")
