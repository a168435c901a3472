"""Stage 4 of CROPI: GRPO on the selected prompts only; the next phase starts from the policy it writes.

For each prompt of a step's batch, G responses o_1 .. o_G are sampled from the current policy. The update
maximizes, averaged over the prompts,

    J(theta) = 1/G sum_i 1/|o_i| sum_t [min(rho A_i, clip(rho, 1-eps, 1+eps) A_i) - lambda_KL k3 + lambda_H H]
    A_i = (R_i - mean R) / (std R + 1e-4)                  rho = pi_theta / pi_old
    k3 = e^D - D - 1,  D = log pi_ref - log pi_theta       H = entropy of pi_theta(. | s_t)

pi_ref is --ref, the policy before any RL, in every phase. AdamW (PyTorch's default weight decay, 0.01) makes
one update per batch: pi_old is pi_theta itself, rho is 1 with the gradient of log pi, nothing is clipped.

DAPO (Yu et al. 2025) is --dynamic-sampling, which replaces groups of equal rewards by the groups of further
prompts, in at most 10 rounds of --batch-size prompts per step (if too few remain, the batch is smaller), and
--token-mean, which averages over all tokens of the batch. Its higher upper clip has no effect where rho is 1.

Reads   --rollouts   rollouts.pt of collect.py: prompts, answers and, in its meta, temperature, length limit,
                     end tokens and verifier. Its responses are not used.
        --select     selected.npy of score.py: int64 [n], the prompts to train on.
        --eval       rollouts.pt files made with --k 0: test sets. Accuracy is the mean reward of
                     --eval-samples responses per prompt at --eval-temperature, and of one greedy response.
        --optimizer  optimizer.pt of the previous phase: AdamW's state, the step count and the place in the
                     order of prompts continue from it.
Writes  --out        a Hugging Face checkpoint, optimizer.pt, args.json and metrics.jsonl, one line per step:
            step (over all phases), seconds (of this phase, without evaluation), sampling_seconds, eval;
            of all that was sampled: reward, frac_reward_zero_std (share of groups with equal rewards),
            tokens, response_length (mean tokens), frac_truncated (share that reach the length limit), rounds;
            of the update: groups, kl and entropy (per token, in nats), grad_norm, sampling_logp_difference
            (mean |trainer's log-prob - sampler's| per token); sample and sample_reward, a prompt with its
            first response as text: read some, since a policy also learns what only deceives the verifier.

The run works in OUT.part. If it is stopped (Ctrl-C saves a checkpoint) or killed, the same command resumes
from the last checkpoint (--save-every). On a CPU with the same number of threads, it ends with the same
policy, byte for byte: random numbers depend on (seed, step, place in the batch) only. --dtype bfloat16 is
mixed precision: weights and AdamW's state stay float32. Under torchrun, FSDP2 shards weights, gradients and
AdamW's state, and each rank samples its share of the prompts; another number of ranks can resume a run. After
Ctrl-C, torchrun kills the ranks in 30 s: set --shutdown_timeout to more seconds than a step takes.

    python train_grpo.py --model runs/toy/world/base --rollouts train.pt --select selected.npy --out policy \\
        --eval test.pt --steps 30 --batch-size 64 --lr 1e-4
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
from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

FORMAT = 2  # of rollouts.pt
CLIP = 0.2  # eps, the paper's value; no flag: with one update per batch, clipping never applies
ROUNDS = 10  # of dynamic sampling per step, at most
LOGITS = 2**25  # logits held in memory at a time (at least those of one response)
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)  # unsharded states, on rank 0
SHARDS = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=WORLD > 1)  # to load them


# ---- the equations ----
def group_advantage(rewards):
    """A_k = (R_k - mean R) / (std R + 1e-4), std with Bessel's correction; 0 in a group of equal rewards.

    rewards: [..., K], K >= 2, one group per row. Returns the same shape.

    >>> group_advantage(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    tensor([[ 0.7070, -0.7070],
            [ 0.0000,  0.0000]])
    """
    advantages = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)
    equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)  # std R may be rounding
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


# ---- the model: forward pass and update ----
def output_logits(policy, hidden, temperature):
    """float32 logits / temperature [B, R, V] of hidden states [B, R, H]: output layer and Gemma 2's cap."""
    logits = policy.get_output_embeddings()(hidden)
    cap = getattr(policy.config, "final_logit_softcapping", None)
    return (cap * (logits / cap).tanh() if cap else logits).float() / temperature


def token_logprobs(logits, targets, mask):
    """log pi(x_t | s_t) [B, R] of `targets` under softmax(logits [B, R, V]); 0 outside mask, bool [B, R]."""
    logp = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return logp.view(mask.shape).masked_fill(~mask, 0)


def group_hidden(base_model, prompts, responses):
    """The hidden states that predict each response token, of b prompts with n responses each.

    base_model: the policy without its output layer. prompts: b sequences of token ids; responses: b * n
    sequences, prompt-major. Returns hidden [b * n, R, H], R the length of the longest response, the response
    tokens [b * n, R] and the bool mask [b * n, R] of those that exist.

    A prompt is read once: its n responses share its cached keys and values, through which their gradients
    flow back. Prompts are padded on the left and masked; responses are padded on the right, after all real
    tokens. So the composition of the batch changes results by rounding only.
    """
    device, n = base_model.device, len(responses) // len(prompts)
    prompts, responses = [[torch.as_tensor(x).long() for x in rows] for rows in (prompts, responses)]
    tokens = pad_sequence(prompts, batch_first=True, padding_side="left").to(device)  # [b, P]
    exist = [torch.ones_like(p) for p in prompts]
    attention = pad_sequence(exist, batch_first=True, padding_side="left").to(device)  # [b, P]
    positions, cache = (attention.cumsum(1) - 1).clamp(min=0), DynamicCache(config=base_model.config)
    hidden = base_model(tokens, attention_mask=attention, position_ids=positions, past_key_values=cache)[0]
    hidden = hidden[:, -1:].repeat_interleave(n, 0)  # [b * n, 1, H], which predicts the first response token

    targets = pad_sequence(responses, batch_first=True).to(device)  # [b * n, R]
    exist = [torch.ones_like(r).bool() for r in responses]
    mask = pad_sequence(exist, batch_first=True).to(device)  # [b * n, R]
    if targets.shape[1] > 1:
        cache.batch_repeat_interleave(n)
        inputs = targets[:, :-1]
        attention = torch.cat([attention.repeat_interleave(n, 0), torch.ones_like(inputs)], 1)
        positions = attention.cumsum(1)[:, tokens.shape[1]:] - 1
        later = base_model(inputs, attention_mask=attention, position_ids=positions, past_key_values=cache)[0]
        hidden = torch.cat([hidden, later], 1)
    return hidden, targets, mask


def backbone(policy):
    """The policy without its output layer; under FSDP the policy, whose forward pass is then the same."""
    return policy if WORLD > 1 else policy.base_model


def plan_batches(sizes, k, budget):
    """Micro-batches of at most `budget` tokens, padding included, longest first: [(prompts, rows)].

    sizes: {prompt: (its tokens, tokens of its longest response)}. A micro-batch has all k responses to its
    prompts (rows = k). A prompt that exceeds the budget gets its own, with `rows` responses per pass.
    """
    plan, prompt_width, width = [], 0, 0
    for prompt in sorted(sizes, key=lambda i: -sizes[i][0] - k * sizes[i][1]):
        own, longest = sizes[prompt]
        prompt_width, width = max(prompt_width, own), max(width, longest)
        if plan and (len(plan[-1][0]) + 1) * (prompt_width + k * width) <= budget:
            plan[-1][0].append(prompt)
        else:
            plan.append(([prompt], max(1, min(k, (budget - own) // longest))))
            prompt_width, width = own, longest
    return plan


def grpo_step(policy, reference, optimizer, prompts, responses, logp_sampled, rewards, args):
    """One AdamW update towards higher J on a batch of groups. Returns its row of metrics.jsonl.

    prompts: B sequences of token ids; responses, logp_sampled: B*G lists, prompt-major; rewards: [B, G]. J is
    a mean over the B*G responses (--token-mean: over all tokens); each micro-batch adds its part. args: the
    command line's train_temperature, kl_coef, entropy_coef, token_mean, max_grad_norm and batch_tokens.
    """
    group, tokens, device = rewards.shape[1], sum(map(len, responses)), policy.device
    advantages = group_advantage(rewards).flatten().to(device)  # [B*G]
    sums, sizes = torch.zeros(3, device=device), {}  # over all tokens: of k3, H and |logp - logp_sampled|
    for j, prompt in enumerate(prompts):
        sizes[j] = len(prompt), max(map(len, responses[j * group:(j + 1) * group]))
    passes = []
    for batch, n in plan_batches(sizes, group, args.batch_tokens):
        passes += [(batch, range(group)[first:first + n]) for first in range(0, group, n)]
    for turn in range(0, len(passes), WORLD):
        mine = turn + RANK < len(passes)  # a rank without work joins FSDP's collectives with weight 0
        batch, which = passes[turn + RANK if mine else 0]
        rows = [j * group + i for j in batch for i in which]
        groups = [prompts[j] for j in batch], [responses[r] for r in rows]
        hidden, targets, mask = group_hidden(backbone(policy), *groups)  # [b * n, R, H], [b * n, R]
        with torch.no_grad():
            hidden_ref = group_hidden(backbone(reference), *groups)[0] if reference else None
        sampled = [torch.tensor(logp_sampled[r]) for r in rows]
        sampled = pad_sequence(sampled, batch_first=True).to(device)  # [b * n, R]
        leaf = hidden.detach().requires_grad_()  # the output layer's backward pass comes first
        weights = advantages[torch.tensor(rows, device=device)]  # [b * n]
        at_once = max(1, LOGITS // (mask.shape[1] * policy.config.get_text_config().vocab_size))
        for some in torch.arange(len(rows), device=device).split(at_once):
            logits = output_logits(policy, leaf[some], args.train_temperature)  # [at_once, R, V]
            logp = token_logprobs(logits, targets[some], mask[some])
            entropy, logp_ref = token_entropy(logits, mask[some]), logp.detach()
            if reference:  # otherwise k3 and its gradient are 0
                with torch.no_grad():
                    logits = output_logits(reference, hidden_ref[some], args.train_temperature)
                    logp_ref = token_logprobs(logits, targets[some], mask[some])
            objective = grpo_objective(logp, logp.detach(), logp_ref, entropy, weights[some], mask[some],
                                       CLIP, args.kl_coef, args.entropy_coef)
            if args.token_mean:  # weights |o_i| / mean |o|
                objective = objective * mask[some].sum(1) * (len(responses) / tokens)
            (-objective.sum() * mine * WORLD / len(responses)).backward()  # FSDP takes the mean over ranks
            seen = kl_k3(logp, logp_ref), entropy, (logp - sampled[some]).abs()  # 0 where there is no token
            sums += mine * torch.stack([x.detach().sum() for x in seen])
        hidden.backward(leaf.grad)
    if WORLD > 1:
        torch.distributed.all_reduce(sums)
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    kl, entropy, difference = (sums / tokens).tolist()
    return {"groups": len(prompts), "kl": kl, "entropy": entropy, "sampling_logp_difference": difference,
            "grad_norm": float(whole(grad_norm))}


def whole(tensor):
    """A tensor that FSDP has sharded, whole on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_forward(policy):
    """Refuses a policy whose own logits are not those of group_hidden and output_logits."""
    prompts, responses = [[1, 0, 1], [0, 1, 1, 0, 1]], [[0, 1, 1, 0], [1, 1, 0, 1, 0, 0], [1, 1], [0, 0, 1]]
    try:
        with torch.no_grad():
            found = output_logits(policy, group_hidden(policy.base_model, prompts, responses)[0], 1.0)
            expected = policy(torch.tensor([prompts[0] + responses[0]], device=policy.device)).logits[:, 2:6]
        if not (found[:1, :4] - expected).norm() <= 1e-2 * expected.norm():  # or NaN
            raise ValueError("other logits with a KV cache, or not those of the output layer")
    except Exception as error:  # a cache that cannot be repeated, for example
        fail(policy.name_or_path, f"no usable forward pass ({error!r})", "a transformer with a KV cache",
             "choose another model")


def build_policy(name, args):
    """The policy or the reference, in float32: sharded by FSDP2 under torchrun, otherwise under autocast."""
    if WORLD == 1:  # mixed precision: an update of 1e-6 would be rounded away in bfloat16 weights
        policy = load_policy(name, args.device, "float32")
        check_forward(policy)
        autocast = torch.autocast(policy.device.type, torch.bfloat16, args.dtype == "bfloat16")
        for module in (policy, policy.base_model, policy.get_output_embeddings()):
            module.forward = autocast(module.forward)
        return policy
    precision = MixedPrecisionPolicy(getattr(torch, args.dtype), torch.float32)
    mesh = torch.distributed.init_device_mesh(torch.device(args.device).type, (WORLD,))
    for rank in range(WORLD):  # one after the other: the host holds one whole copy at a time
        if rank == RANK:
            policy = load_policy(name, "cpu", "float32")  # a GPU may have room for shards only
            if RANK == 0:
                check_forward(policy)
            policy.forward = policy.base_model.forward  # FSDP's hooks gather weights around policy.forward
            # GradientCheckpointingLayer is transformers' base class of decoder layers
            layers = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
            for module in [*layers, policy]:
                fully_shard(module, mesh=mesh, mp_policy=precision)
        torch.distributed.barrier()
    return policy


# ---- sampling and rewards ----
def stream_seed(*key):
    """A seed for torch.Generator from any key: every use of random numbers gets a stream of its own."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")


@torch.no_grad()
def sample(policy, prompts, k, temperature, max_new_tokens, eos_ids, seeds):
    """tau_1 .. tau_k ~ softmax(logits / temperature) for each prompt, and log pi of every token (engine hf).

    prompts: B lists of token ids. seeds: B ints; a prompt's responses depend on its own seed, not on the rest
    of the batch. temperature 0 is argmax. Returns responses and logprobs, B*k lists each, prompt-major. A
    response includes its end token, unless it was truncated at max_new_tokens.
    """
    device, width = policy.device, max(map(len, prompts))
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniforms = [torch.rand(k, max_new_tokens, dtype=torch.float64, generator=rng) for rng in rngs]
    uniforms = torch.cat(uniforms).to(device)  # [B*k, max_new_tokens]
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # [B, P], left-padded
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # [B, P]
    cache, positions = DynamicCache(config=policy.config), (mask.cumsum(1) - 1).clamp(min=0)
    logits = policy(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache,
                    logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(k)  # a prompt is prefilled once, not k times
    logits, mask = logits.repeat_interleave(k, 0), mask.repeat_interleave(k, 0)  # [B*k, V], [B*k, P]

    end = torch.tensor(eos_ids, device=device)
    active = torch.arange(len(mask), device=device)  # rows that have not ended
    responses, logprobs = [[] for _ in range(len(mask))], [[] for _ in range(len(mask))]
    for t in range(max_new_tokens):
        logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # [active, V]
        if temperature:
            cdf = logp.exp().cumsum(-1, dtype=torch.float64)
            u = uniforms[active, t, None] * cdf[:, -1:]  # [active, 1]
            token = torch.searchsorted(cdf, u, right=True).clamp(max=cdf.shape[1] - 1)  # first cdf > u
        else:
            token = logp.argmax(-1, keepdim=True)
        for row, x, logp_x in zip(active.tolist(), token.tolist(), logp.gather(1, token).tolist()):
            responses[row] += x
            logprobs[row] += logp_x
        unfinished = (~torch.isin(token[:, 0], end)).nonzero()[:, 0]
        if len(unfinished) == 0 or t + 1 == max_new_tokens:
            break
        if len(unfinished) < len(active):  # ended rows leave the batch
            cache.batch_select_indices(unfinished)
            active, token, mask = active[unfinished], token[unfinished], mask[unfinished]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = policy(token, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                        past_key_values=cache).logits[:, -1]
    return responses, logprobs


def load_vllm(name, dtype, kv_tokens, context):
    """vLLM in this process. kv_tokens: in its KV cache; context: longest prompt and response together."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where weights can be replaced
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # float32 attention in float32, not in TF32
    gpu = torch.cuda.is_available()
    try:
        config = AutoConfig.from_pretrained(name).get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * width * getattr(torch, dtype).itemsize  # cache bytes
        with warnings.catch_warnings(action="ignore"):  # from packages that vLLM imports
            from vllm import LLM

            return LLM(name, dtype=dtype, max_model_len=context, logprobs_mode="processed_logprobs",
                       generation_config="vllm", skip_tokenizer_init=True, use_tqdm_on_load=False,
                       kv_cache_memory_bytes=max(kv_tokens, 2 * context + 1024) * token,
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
    outputs = [output for request in requests for output in request.outputs]
    logprobs = [[at[x].logprob for at, x in zip(o.logprobs, o.token_ids)] for o in outputs]
    return [list(output.token_ids) for output in outputs], logprobs


ENGINES = {"hf": sample, "vllm": sample_vllm}
KV_TOKENS = {"hf": 65536, "vllm": 262144}  # default of --kv-tokens


@cache
def load_function(name):
    """The function that 'path/to/file.py:function' names. Runs the file."""
    path, _, function = name.rpartition(":")
    try:
        spec = importlib.util.spec_from_file_location("verifier", path)
        sys.modules["verifier"] = module = importlib.util.module_from_spec(spec)  # for dataclasses
        spec.loader.exec_module(module)
        return getattr(module, function)
    except Exception as error:  # whatever the user's file raises
        fail(name, f"no such verifier ({error!r})", "math, exact or path/to/file.py:function", "see --help")


def verify(response, answer, verifier):
    """R(tau) in [0, 1]: whether, or how well, the text `response` gives `answer`.

    verifier 'path/to/file.py:function': the number in [0, 1] that your function(response, answer) returns.
    'exact': the last \\boxed{} of the response, or else all of it, is the answer up to white space.
    'math': math-verify compares the last expression with the answer as mathematics: 1/2 = 0.5, and 3 - 2 + 4
    = 5, so a policy may repeat a sum of the prompt. Of an answer with '####' (GSM8K), what follows counts.

    >>> verify("so it is \\\\boxed{cab}", "cab", "exact"), verify("It is 0.5.", "reason #### 1/2", "math")
    (1.0, 1.0)
    """
    if verifier not in ("exact", "math"):
        try:
            reward = float(load_function(verifier)(response, answer))
            if not 0 <= reward <= 1:  # or NaN
                raise ValueError(f"it returned {reward}")
            return reward
        except Exception as error:
            fail(verifier, f"{error!r} for answer {answer[:80]!r} and response {response[:80]!r}",
                 "a number in [0, 1]", "fix the function")
    if verifier == "exact":
        _, boxed, last = response.rpartition("\\boxed{")  # without a box, all of the response is `last`
        return float(bool(re.match(rf"\s*{re.escape(answer.strip())}\s*" + ("}" if boxed else r"\Z"), last)))
    import math_verify  # here, since it loads sympy, which 'exact' does not need

    gold = answer.rpartition("####")[2].strip()
    gold = math_verify.parse(gold if "\\boxed" in gold or "$" in gold else f"${gold}$")
    last = response[max(response.rfind("\\boxed"), 0):]  # of several boxes math-verify would return a list
    return float(bool(gold) and math_verify.verify(gold, math_verify.parse(last)))


class Sampler:
    """Samples with vLLM, with the policy itself or, under torchrun, with an unsharded copy of it."""

    def __init__(self, args, tokenizer, rollouts):
        self.engine, self.kv_tokens, self.tokenizer, self.model = args.engine, args.kv_tokens, tokenizer, None
        if args.engine == "vllm":
            longest = [int(r["prompt_lengths"].max()) + r["meta"]["max_new_tokens"] for r in rollouts]
            self.model = load_vllm(args.model, args.dtype, args.kv_tokens, max(longest))
            self.sleep()
        elif WORLD > 1:
            self.model = load_policy(args.model, args.device, args.dtype)

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
        """k verified responses to each of the B prompts `batch` of a rollouts.pt. seeds: B ints.

        Every rank samples its share and receives the others'. Returns B groups (k responses, k lists of
        log-probs, k rewards).
        """
        meta, groups = rollouts["meta"], {}
        prompts = {j: rollouts["prompts"][batch[j]].tolist() for j in range(RANK, len(batch), WORLD)}
        costs = {j: (0, k * (len(prompt) + meta["max_new_tokens"])) for j, prompt in prompts.items()}
        budget = self.kv_tokens if self.engine == "hf" else sys.maxsize  # vLLM schedules its cache itself
        for some, _ in plan_batches(costs, 1, budget):
            queries, own_seeds = [prompts[j] for j in some], [seeds[j] for j in some]
            responses, logprobs = ENGINES[self.engine](self.model, queries, k, temperature,
                                                       meta["max_new_tokens"], meta["eos_ids"], own_seeds)
            texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
            for number, j in enumerate(some):
                rows, answer = slice(number * k, (number + 1) * k), rollouts["answers"][batch[j]]
                rewards = [verify(text, answer, meta["verifier"]) for text in texts[rows]]
                groups[j] = responses[rows], logprobs[rows], rewards
        if WORLD > 1:
            of_ranks = [None] * WORLD
            torch.distributed.all_gather_object(of_ranks, groups)
            groups = {j: group for share in of_ranks for j, group in share.items()}
        return [groups[j] for j in range(len(batch))]


def pack_output_layer(model):
    """Repacks a tied output layer: on a CPU, reloading weights makes vLLM drop its packed copy."""
    head = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


def check_step(row, first):
    """Stops if the gradient is not finite or the sampler's log-probs are not the policy's (other weights)."""
    difference = row["sampling_logp_difference"]
    found = f"log-probs that differ from the policy's by {difference:.3f} per token on average"
    if not difference <= 0.5:  # or NaN
        fail("the sampler", found, "at most 0.5", "its weights were not updated, or the policy has diverged")
    if not math.isfinite(row["grad_norm"]):
        fail("the update", f"a gradient norm of {row['grad_norm']}", "a finite one", "lower --lr")
    if first and difference > 0.1 and RANK == 0:
        print(f"train_grpo.py: warning: the sampler has {found}; try --dtype float32", file=sys.stderr)


def evaluate(sampler, tests, args):
    """{"eval": {test set: {"mean": accuracy at --eval-temperature, "greedy": greedy accuracy}}}."""
    results = {}
    for name, test in tests.items():
        batch, results[name] = range(len(test["prompts"])), {}
        seeds = [stream_seed(args.seed, "eval", i) for i in batch]  # the same in every evaluation
        greedy = sampled = sampler(test, batch, 1, 0.0, seeds)
        if args.eval_temperature:
            sampled = sampler(test, batch, args.eval_samples, args.eval_temperature, seeds)
        for kind, groups in (("mean", sampled), ("greedy", greedy)):
            results[name][kind] = float(torch.tensor([group[2] for group in groups]).mean())
    return {"eval": results} if results else {}


def next_prompts(selected, position, count, seed):
    """`count` prompts from a position on: epoch after epoch over `selected`, each in its own random order."""
    prompts, (first, offset) = [], divmod(position, len(selected))
    for epoch in range(first, first + math.ceil((offset + count) / len(selected))):
        generator = torch.Generator().manual_seed(stream_seed(seed, "order", epoch))
        prompts += [selected[i] for i in torch.randperm(len(selected), generator=generator).tolist()]
    return prompts[offset:offset + count]


def sample_groups(sampler, rollouts, selected, position, step, args):
    """A step's groups as grpo_step takes them, the next position, and the metrics of all that was sampled."""
    sampled, size = [], args.batch_size  # sampled: (prompt, responses, logprobs, rewards) of each group
    for turn in range(ROUNDS if args.dynamic_sampling else 1):
        batch = next_prompts(selected, position, size, args.seed)
        seeds = [stream_seed(args.seed, step, turn * size + j) for j in range(size)]
        groups = sampler(rollouts, batch, args.group, args.train_temperature, seeds)
        sampled += [(rollouts["prompts"][i], *group) for i, group in zip(batch, groups)]
        position += size
        unequal = [group for group in sampled if max(group[3]) > min(group[3])]
        if len(unequal) >= size:
            break
    kept = sampled
    if args.dynamic_sampling:
        kept = unequal[:size] or sampled[-size:]  # none is unequal: their advantages are 0
    prompts, responses, logprobs, rewards = zip(*kept)
    groups = prompts, sum(responses, []), sum(logprobs, []), torch.tensor(rewards)
    responses, rewards = sum((group[1] for group in sampled), []), [group[3] for group in sampled]
    tokens = sum(map(len, responses))
    truncated = [response[-1] not in rollouts["meta"]["eos_ids"] for response in responses]
    row = {"reward": float(torch.tensor(rewards).mean()), "rounds": turn + 1,
           "frac_reward_zero_std": 1 - len(unequal) / len(sampled), "tokens": tokens,
           "response_length": tokens / len(responses), "frac_truncated": sum(truncated) / len(truncated)}
    return groups, position, row


# ---- files and ranks ----
def fail(source, found, expected, hint):
    """Reports wrong input in one line on stderr and exits with code 2."""
    time.sleep(5 * (os.environ.get("RANK", "0") > "0"))  # torchrun ends this rank if rank 0 failed, too
    line = f"{Path(sys.argv[0]).name}: error: {source}: found {found}; expected {expected}; {hint}"
    print(" ".join(line.split()), file=sys.stderr)  # an exception's text may have several lines
    raise SystemExit(2)


def load_rollouts(path):
    """rollouts.pt of collect.py; "prompts" [N], "responses" and "logprobs" [N*K] are sequences of tensors."""
    try:
        rollouts = torch.load(path, weights_only=True, mmap=True)  # refuses a pickle that would run code
        if rollouts["meta"]["format"] != FORMAT:
            raise ValueError(f"format {rollouts['meta']['format']}")
        (n, k), lengths = rollouts["rewards"].shape, rollouts["response_lengths"].tolist()
        rollouts["prompts"] = rollouts["prompt_tokens"].split(rollouts["prompt_lengths"].tolist())
        rollouts["responses"] = rollouts["response_tokens"].split(lengths)
        rollouts["logprobs"] = rollouts["logprobs"].split(lengths)
        found = [len(rollouts[name]) for name in ("prompts", "responses", "answers")]
        if found != [n, n * k, n]:
            raise ValueError(f"{found} prompts, responses, answers for rewards [{n}, {k}]")
    except Exception as error:  # a damaged file can raise anything
        fail(path, f"no readable rollouts ({error!r})", f"a rollouts.pt of format {FORMAT}", "collect again")
    return rollouts


def check_verifiers(sources, named):
    """Refuses verifiers that are code which --verifier does not name, and a name that no file has."""
    found = {source["meta"]["verifier"] for source in sources}
    unnamed = found - {"exact", "math", named}
    if unnamed or named not in (None, *found):
        expected = f"that of the rollouts, {', '.join(unnamed or found)}"
        fail("--verifier", named or "nothing", expected, "name it if you trust its code")


def load_selection(path, n):
    """selected.npy of score.py as a list: indices of prompts, best first."""
    try:
        selected = np.load(path, allow_pickle=False)
        if selected.dtype != np.int64 or selected.ndim != 1 or not 0 <= selected.min() <= selected.max() < n:
            raise ValueError(f"{selected.dtype} {list(selected.shape)}, or indices out of range")
    except Exception as error:  # missing, truncated, not .npy, a pickle, of other rollouts
        fail(path, f"no usable selection ({error})", f"int64 indices of {n} prompts", "run score.py on them")
    return selected.tolist()


def load_tokenizer(name):
    try:
        folder = Path(name)
        if folder.is_dir() and not [*folder.glob("*token*"), *folder.glob("vocab*")]:
            raise OSError("no tokenizer file")  # from which transformers would make an empty tokenizer
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises a dozen types here
        fail(name, f"no tokenizer ({error})", "a checkpoint with its tokenizer", "save the tokenizer there")


def load_policy(name, device, dtype):
    """The policy pi_theta in evaluation mode: dropout would make log-probs differ between passes."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention takes seconds for each new shape
    try:
        policy = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).to(device).eval()
        if policy._is_stateful:  # Mamba, for example: its state is not in the KV cache that all stages share
            raise ValueError("a recurrent state")
        return policy
    except Exception as error:  # transformers raises a dozen types here
        fail(name, f"no usable model ({error})", "a causal transformer with a KV cache", "choose another one")


def lock_folder(folder, out):
    """Makes the folder in which a run works on `out` and locks it, as long as the returned file is open."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")
        if RANK == 0:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        fail(out, "another run that is writing it", "one run per folder", "wait or choose another --out")
    except OSError as error:
        fail(out, f"a path that cannot be written ({error})", "a writable place", "choose another --out")


def check_space(policy, part, saves):
    """Refuses a disk without room for the policy with AdamW's state and, if `saves`, a checkpoint of both.

    part: the folder in which the run works; a checkpoint in it stays, all else is going to be replaced.
    """
    # a tenth more for the tokenizer and for tied weights, which a sharded policy's checkpoint has twice
    needed, contents = 3.3 * sum(p.numel() * p.element_size() for p in policy.parameters()), "the policy"
    checkpoint = part / "checkpoint.pt"
    if saves and not checkpoint.exists():
        needed, contents = 2 * needed, "the policy and a checkpoint"
    replaced = sum(file.stat().st_size for file in part.iterdir() if file != checkpoint)
    free = shutil.disk_usage(part).free + replaced
    if free < needed:
        fail(part, f"{free / 1e9:.1f} GB of free disk",
             f"{needed / 1e9:.1f} GB for {contents}, with AdamW's state", "free some, or change --out")


class Checkpoint:
    """The folder OUT.part in which a run works, and the checkpoint in it that a run resumes from."""

    def __init__(self, args, selected):
        self.out, self.part = args.out, args.out.with_name(args.out.name + ".part")
        may_change = ("kv_tokens", "batch_tokens", "device")  # when resuming
        settings = {name: value for name, value in vars(args).items() if name not in may_change}
        self.settings = json.loads(json.dumps({**settings, "selected": selected}, default=str))

    def check_settings(self, folder):
        """Refuses a folder that was made with other settings."""
        found = json.loads((folder / "args.json").read_text()) if (folder / "args.json").exists() else {}
        changed = ", ".join(key for key in self.settings if found.get(key) != self.settings[key])
        if changed:
            fail(folder, f"a run with another {changed}", "equal settings", "remove it or change --out")

    def restore(self, policy, optimizer):
        """Loads this run's checkpoint, if there is one, or else the state of --optimizer.

        Returns step (over all phases), done (steps of this run), position (in the order of prompts), metrics.
        """
        state, path = {"step": 0, "done": 0, "position": 0, "metrics": []}, self.settings["optimizer"]
        if (self.part / "checkpoint.pt").exists():
            self.check_settings(self.part)
            path = self.part / "checkpoint.pt"
        try:
            if path:
                state |= torch.load(path, weights_only=True, mmap=True)  # nothing is read yet
                states.set_state_dict(policy, optimizer, model_state_dict=state.pop("weights", {}),
                                      optim_state_dict=state.pop("optimizer"), options=SHARDS)
        except Exception as error:  # missing, damaged, or of another model
            fail(path, f"no usable state ({error})", "an optimizer.pt of this model", "use the policy's own")
        for group in optimizer.param_groups:
            group.update(optimizer.defaults)  # use this run's learning rate; loading turns tuples into lists
        if RANK == 0:
            (self.part / "new.json").write_text(json.dumps(self.settings))
            os.replace(self.part / "new.json", self.part / "args.json")
        return [state[name] for name in ("step", "done", "position", "metrics")]

    def save(self, policy, optimizer, **state):
        """Writes the checkpoint to resume from. state: what `restore` returns, by name."""
        state["weights"], state["optimizer"] = states.get_state_dict(policy, optimizer, options=WHOLE)
        if RANK == 0:
            torch.save(state, self.part / "new.pt")
            os.replace(self.part / "new.pt", self.part / "checkpoint.pt")

    def finish(self, policy, optimizer, tokenizer, **state):
        """Writes the policy and optimizer.pt, with `state` (step, position), and renames OUT.part to OUT."""
        weights, state["optimizer"] = states.get_state_dict(policy, optimizer, options=WHOLE)
        if RANK == 0:
            # sharded, tied weights come back as two: a whole model stores them once
            trained = policy if WORLD == 1 else load_policy(self.settings["model"], "cpu", "float32")
            trained.load_state_dict(weights)
            trained.save_pretrained(self.part)
            tokenizer.save_pretrained(self.part)
            torch.save(state, self.part / "optimizer.pt")
            for leftover in ("checkpoint.pt", "lock"):
                (self.part / leftover).unlink(missing_ok=True)
            os.replace(self.part, self.out)


def log_metrics(path, metrics, row):
    """Adds a step's row to this run's metrics and writes them all to metrics.jsonl."""
    metrics.append(row)
    if RANK == 0:
        path.write_text("".join(json.dumps(row) + "\n" for row in metrics))


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


# ---- the command line ----
def parse_arguments():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
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
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens per micro-batch (8192)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of matmuls")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of the order of prompts (0)")
    args = parser.parse_args()
    args.kv_tokens = args.kv_tokens or KV_TOKENS[args.engine]
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
    return args


def start(args):
    """Silences the libraries, joins torchrun's other ranks and sets this rank's device."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # an unparsable response has reward 0
    if WORLD > 1:
        if args.device == "cuda":
            args.device += f":{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(days=1))


def main():
    args = parse_arguments()
    start(args)
    rollouts = load_rollouts(args.rollouts)
    selected = load_selection(args.select, len(rollouts["prompts"]))
    tests = {Path(path).stem: load_rollouts(path) for path in args.eval}
    check_verifiers([rollouts, *tests.values()], args.verifier)
    args.train_temperature = args.train_temperature or rollouts["meta"]["temperature"]
    if args.eval_temperature is None:
        args.eval_temperature = args.train_temperature
    checkpoint = Checkpoint(args, selected)
    if args.out.exists():
        checkpoint.check_settings(args.out)
        print(f"{args.out}: complete, nothing to do")
        return
    checkpoint.lock = lock_folder(checkpoint.part, args.out)
    tokenizer = load_tokenizer(args.model)
    sampler = Sampler(args, tokenizer, [rollouts, *tests.values()])  # first: vLLM starts with an empty GPU
    policy = build_policy(args.model, args)
    check_space(policy, checkpoint.part, args.steps > args.save_every)
    reference = build_policy(args.ref or args.model, args) if args.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr)
    step, done, position, metrics = checkpoint.restore(policy, optimizer)

    sampler.update(policy)
    if step == 0:
        metrics = [{"step": 0, "seconds": 0.0, **evaluate(sampler, tests, args)}]
    seconds = metrics[-1]["seconds"] if metrics else 0.0
    stop, stopped = StopRequest(), False
    progress = tqdm(initial=done, total=args.steps, unit="step", desc=f"train {args.out}", disable=RANK > 0)
    while done < args.steps and not stopped:
        began = time.perf_counter()
        groups, position, row = sample_groups(sampler, rollouts, selected, position, step, args)
        row["sampling_seconds"] = time.perf_counter() - began
        sampler.sleep()
        row |= grpo_step(policy, reference, optimizer, *groups, args)
        check_step(row, done == 0)
        row["sample"] = tokenizer.decode([*groups[0][0].tolist(), *groups[1][0]])
        row["sample_reward"] = float(groups[3][0, 0])
        sampler.update(policy)
        step, done, seconds = step + 1, done + 1, seconds + time.perf_counter() - began
        if done == args.steps or step % args.eval_every == 0:
            row |= evaluate(sampler, tests, args)
        log_metrics(checkpoint.part / "metrics.jsonl", metrics, {"step": step, "seconds": seconds, **row})
        progress.set_postfix(reward=f"{row['reward']:.2f}", zero_std=f"{row['frac_reward_zero_std']:.2f}")
        progress.update()
        stopped = stop.received()
        if done < args.steps and (stopped or done % args.save_every == 0):
            checkpoint.save(policy, optimizer, step=step, done=done, position=position, metrics=metrics)
    progress.close()
    if done < args.steps:
        if RANK == 0:
            print(f"{args.out}: stopped after step {done}; the same command resumes it", file=sys.stderr)
        sys.exit(130)
    checkpoint.finish(policy, optimizer, tokenizer, step=step, position=position)
    if RANK == 0:
        accuracies = [f"{test} {found['mean']:.3f}" for test, found in metrics[-1].get("eval", {}).items()]
        print(f"{args.out}: {done} steps on {len(selected)} prompts, {seconds:.0f} s", *accuracies, sep="; ")
    if WORLD > 1 and args.engine == "hf":  # vLLM does it itself
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as error:
        fail(f"rank {RANK}", f"too little GPU memory ({error})", "room for a micro-batch and the KV cache",
             "lower --batch-tokens or --kv-tokens, or use more GPUs")
