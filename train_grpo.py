"""Stage 4 of CROPI: GRPO on the selected prompts alone; the policy it leaves starts the next phase.

For each prompt of a step's batch, G responses o_1 .. o_G are sampled from the policy as it is, and the policy climbs

    J(theta) = 1/G sum_i 1/|o_i| sum_t [ min(rho A_i, clip(rho, 1-eps, 1+eps) A_i) - lambda_KL k3 ]
    A_i = (R_i - mean R) / (std R + 1e-4)      rho = pi_theta / pi_old      k3 = e^D - D - 1,  D = log pi_ref - log pi_theta

averaged over the batch's prompts, by one update a batch of AdamW (PyTorch's, weight decay 0.01 as by default). So pi_old is
pi_theta itself, rho is 1 with the gradient of log pi, and the clip never binds; pi_ref is --ref, the policy before any RL, in
every phase.

Reads   --rollouts   rollouts.pt of collect.py: prompts, answers, and in its meta the temperature, the length limit, the end
                     tokens and the verifier; its old responses are not used here.
        --select     selected.npy of score.py: int64 [n], the prompts to train on.
        --eval       rollouts.pt files made with --k 0: test sets. Accuracy is the mean reward at their temperature over
                     --eval-samples responses a prompt (what J climbs), and greedy decoding beside it.
        --optimizer  optimizer.pt of the phase before: AdamW's state and the count of steps go on.
Writes  --out        a Hugging Face checkpoint (safetensors, tokenizer) with optimizer.pt, args.json and metrics.jsonl, a JSON
                     object a step: step (over all phases), reward, live (share of groups with unequal rewards), kl,
                     engine_gap (mean |log-prob of the trainer - log-prob of what sampled|, a token), grad_norm, tokens,
                     truncated, seconds (of training so far in this phase, evaluation left out), sampling_seconds (of this
                     step), eval. TensorBoard files of the same, where tensorboard is installed.

The run works in OUT.part and renames it at its end. Stopped (Ctrl-C leaves a checkpoint) or killed and started again with the
same command, it goes on from the last checkpoint (--save-every) and ends with the same bytes: random numbers come from
(seed, step, place in the batch). --dtype bfloat16 is mixed precision: the weights and AdamW's state stay float32.
--engine vllm samples with vLLM in this process; it gets the new weights after every update. Under torchrun, FSDP2 shards
weights, gradients and AdamW's state; each process holds a whole copy (or an engine) that samples its share of the prompts.
Files are those of one process, and either goes on with the other's checkpoints.
Departs from the paper: no entropy bonus (theirs is 0.001).

    python train_grpo.py --model runs/toy-world/base --rollouts train.pt --select selected.npy --eval test.pt \\
        --steps 30 --batch-size 64 --lr 1e-4 --out policy
    torchrun --nproc_per_node 8 train_grpo.py --model MODEL --rollouts train.pt --select selected.npy --steps 100 \\
        --dtype bfloat16 --gradient-checkpointing --out policy
"""

import argparse
import fcntl
import hashlib
import json
import logging
import os
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

FORMAT = 1  # of rollouts.pt
LOGITS = 2**25  # logits that exist at once, unless a single response has more
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # states of all processes' shards together, on process 0


def fail(file, found, expected, mend):
    """Wrong input: one line on stderr, exit code 2."""
    line = f"{Path(sys.argv[0]).name}: error: {file}: found {found}; expected {expected}; {mend}"
    print(" ".join(line.split()), file=sys.stderr)  # an exception's text may have several lines
    raise SystemExit(2)


def group_advantage(rewards):
    """A_k = (R_k - mean R) / (std R + 1e-4), std with Bessel's correction; 0 for a group of equal rewards.

    rewards: [..., K], K >= 2, one group a row. Returns the same shape.

    >>> group_advantage(torch.tensor([[1., 0.], [1., 1.]])).round(decimals=3).tolist()
    [[0.707, -0.707], [0.0, 0.0]]
    """
    std = rewards.std(-1, keepdim=True)
    advantages = (rewards - rewards.mean(-1, keepdim=True)) / (std + 1e-4)
    return torch.where(std > 0, advantages, torch.zeros_like(advantages))


def kl_k3(logp, logp_ref):
    """k3 = e^D - D - 1 with D = log pi_ref - log pi_theta: a token's estimate of KL(pi_theta || pi_ref), never negative."""
    delta = logp_ref - logp
    return delta.exp() - delta - 1


def grpo_objective(logp, logp_old, logp_ref, advantages, mask, clip, kl_coef):
    """1/|o_i| sum_t [ min(rho A_i, clip(rho, 1 - clip, 1 + clip) A_i) - kl_coef k3 ], one number a response.

    logp, logp_old, logp_ref: [B, T] log-probs of the response tokens under pi_theta, pi_old and pi_ref (None: no KL term).
    advantages: [B]. mask: bool [B, T], True where a token exists. Returns [B]; J is its mean over the batch.
    """
    ratio = (logp - logp_old).exp()  # [B, T]
    advantages = advantages[:, None]
    tokens = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    if logp_ref is not None:
        tokens = tokens - kl_coef * kl_k3(logp, logp_ref)
    return (tokens * mask).sum(1) / mask.sum(1)


def last_hidden(policy, tokens, **inputs):
    """The hidden states [B, T, H] that the policy's output layer turns into logits, which are not made for all T."""
    found = []
    hook = policy.base_model.register_forward_hook(lambda module, arguments, output: found.append(output[0]))
    try:
        policy(tokens, logits_to_keep=1, **inputs)
    finally:
        hook.remove()
    return found[0]


def output_logits(policy, hidden):
    """Logits [B, T, V] of hidden states [B, T, H]: the output layer and, in Gemma 2, its soft cap."""
    logits, cap = policy.get_output_embeddings()(hidden), getattr(policy.config, "final_logit_softcapping", None)
    return cap * (logits / cap).tanh() if cap else logits


def check_output_logits(policy, name):
    """Refuses a model whose own logits are not those of output_logits (some models scale them)."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=policy.device)
    with torch.no_grad():
        if not torch.allclose(policy(tokens).logits, output_logits(policy, last_hidden(policy, tokens)), rtol=1e-2):
            fail(name, "logits that are scaled after the output layer", "a model without that", "choose another model")


def response_hidden(policy, prompts, responses):
    """What predicts each response token: hidden states [B, R, H], R the longest response.

    prompts, responses: B sequences of token ids. Also returns the response tokens [B, R] and the bool mask [B, R] of those that
    exist. Rows are padded on the right, where a causal model's tokens cannot look: padding and batch mates change nothing but
    the last float digits.
    """
    pad, device = nn.utils.rnn.pad_sequence, policy.device
    rows = [torch.cat([torch.as_tensor(p), torch.as_tensor(r)]).long() for p, r in zip(prompts, responses)]
    hidden = last_hidden(policy, pad(rows, batch_first=True).to(device), use_cache=False)  # [B, T, H]
    targets = pad([torch.as_tensor(r).long() for r in responses], batch_first=True).to(device)  # [B, R]
    steps = torch.arange(targets.shape[1], device=device)
    mask = steps < torch.tensor([len(r) for r in responses], device=device)[:, None]
    starts = torch.tensor([len(p) for p in prompts], device=device)[:, None] - 1  # the place before the response
    places = (starts + steps).clamp(max=hidden.shape[1] - 1)[..., None]
    return hidden.gather(1, places.expand(-1, -1, hidden.shape[2])), targets, mask


def token_logprobs(policy, hidden, targets, mask, temperature):
    """log pi(x_t | s_t) under softmax(logits / temperature) of tokens `targets` [B, R] from hidden states [B, R, H].

    Returns [B, R], 0 where the bool mask [B, R] says that there is no token.
    """
    logits = output_logits(policy, hidden).float() / temperature  # [B, R, V]
    return -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(mask.shape).masked_fill(~mask, 0)


def rows_at_once(policy, mask):
    """Rows of a batch in parts whose logits exist at once: at most LOGITS numbers, or a single response's."""
    numbers = mask.shape[1] * policy.config.get_text_config().vocab_size
    return torch.arange(len(mask), device=mask.device).split(max(1, LOGITS // numbers))


def response_logprobs(policy, prompts, responses, temperature):
    """log pi(x_t | s_t) of each response token, without a gradient: [B, R], and the bool mask [B, R] of tokens that exist."""
    with torch.no_grad():
        hidden, targets, mask = response_hidden(policy, prompts, responses)
        return torch.cat([token_logprobs(policy, hidden[some], targets[some], mask[some], temperature)
                          for some in rows_at_once(policy, mask)]), mask


def stream_seed(*key):
    """A seed for torch.Generator out of any key, so that a stream of random numbers belongs to what it is used for."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")


@torch.no_grad()
def sample(policy, prompts, k, temperature, max_new_tokens, eos_ids, seeds):
    """tau_1 .. tau_k ~ softmax(logits / temperature) for each prompt, and log pi of every token. (Engine 'hf'.)

    prompts: B lists of token ids. seeds: B ints; the uniforms that choose a prompt's tokens come from its own seed, so
    that its responses do not depend on what shares the batch. temperature 0 is argmax, for evaluation.
    Returns responses and logprobs, B*k lists each, prompt-major. A response holds its end token, unless it was cut at
    max_new_tokens.
    """
    device, width = policy.device, max(map(len, prompts))
    uniforms = torch.stack([torch.rand(k, max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(s))
                            for s in seeds]).flatten(0, 1).to(device)  # [B*k, max_new_tokens]
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # [B, P], left-padded
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # [B, P]
    cache = DynamicCache(config=policy.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = policy(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits
    cache.batch_repeat_interleave(k)  # a prompt is read once, not k times
    logits, mask = logits[:, -1].repeat_interleave(k, 0), mask.repeat_interleave(k, 0)  # [B*k, V], [B*k, P]

    end = torch.tensor(eos_ids, device=device)
    live = torch.arange(len(mask), device=device)  # rows that have not ended
    drawn = torch.zeros(len(mask), max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(mask), max_new_tokens, device=device)
    lengths = torch.zeros(len(mask), dtype=torch.long, device=device)
    for t in range(max_new_tokens):
        logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # [live, V]
        if temperature:
            cdf = logp.exp().cumsum(-1, dtype=torch.float64)
            token = torch.searchsorted(cdf, uniforms[live, t, None] * cdf[:, -1:], right=True)  # first cdf > u
            token = token.clamp(max=cdf.shape[1] - 1)  # [live, 1]
        else:
            token = logp.argmax(-1, keepdim=True)
        drawn[live, t], logprobs[live, t], lengths[live] = token[:, 0], logp.gather(1, token)[:, 0], t + 1
        going = (~torch.isin(token[:, 0], end)).nonzero()[:, 0]
        if len(going) == 0 or t + 1 == max_new_tokens:
            break
        if len(going) < len(live):  # ended rows leave the batch
            cache.batch_select_indices(going)
            live, token, mask = live[going], token[going], mask[going]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = policy(token, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                        past_key_values=cache).logits[:, -1]
    drawn, logprobs, lengths = drawn.tolist(), logprobs.tolist(), lengths.tolist()
    return [row[:n] for row, n in zip(drawn, lengths)], [row[:n] for row, n in zip(logprobs, lengths)]


def load_vllm(name, dtype, kv_tokens, context):
    """vLLM's engine in this process: sample_vllm takes it in the policy's place.

    dtype: of the weights. kv_tokens: tokens in its KV cache. context: tokens of the longest prompt and response together.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where the weights can be replaced
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # float32 attention in float32, not in TF32
    gpu = torch.cuda.is_available()
    try:
        config = AutoConfig.from_pretrained(name).get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * width * getattr(torch, dtype).itemsize  # bytes of its keys and values
        with warnings.catch_warnings(action="ignore"):  # vLLM's own, of what it imports
            from vllm import LLM

            return LLM(name, dtype=dtype, max_model_len=context, logprobs_mode="processed_logprobs", generation_config="vllm",
                       kv_cache_memory_bytes=max(kv_tokens, 2 * context + 1024) * token, skip_tokenizer_init=True,
                       enforce_eager=not gpu, enable_sleep_mode=gpu, use_tqdm_on_load=False,
                       gpu_memory_utilization=0.01,  # the share that must be free at the start; the cache's size is given
                       distributed_executor_backend="external_launcher" if WORLD > 1 else None)
    except Exception as error:  # no vLLM, or one that cannot run this model here
        fail(name, f"no vLLM engine for it ({error})", "vLLM and a model that it knows",
             "pip install -r requirements-vllm.txt, lower --kv-tokens, or choose --engine hf")


def sample_vllm(llm, prompts, k, temperature, max_new_tokens, eos_ids, seeds):
    """What `sample` does, by vLLM. (Engine 'vllm'.) Equal batches with equal seeds give equal responses."""
    from vllm import SamplingParams

    if not llm.reset_prefix_cache():  # of older weights, or of whatever was asked before
        raise RuntimeError("vLLM did not empty its cache")
    settings = [SamplingParams(n=k, seed=seed % 2**62, temperature=temperature, max_tokens=max_new_tokens, ignore_eos=True,
                               stop_token_ids=eos_ids, logprobs=0, detokenize=False) for seed in seeds]
    requests = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    found = [response for request in requests for response in request.outputs]
    return [list(r.token_ids) for r in found], [[at[x].logprob for at, x in zip(r.logprobs, r.token_ids)] for r in found]


ENGINES = {"hf": sample, "vllm": sample_vllm}


def update_vllm(llm, weights):
    """The policy's `weights`, pairs (name, tensor), into the engine by vLLM's own loading.

    On a GPU the engine slept (level 2, without weights and cache) while the policy was trained.
    """

    def pack_again(model):  # on a CPU vLLM has packed the weights, and forgets the copy that a tied output layer has
        head = getattr(model, "lm_head", None)
        if hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)

    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what training has freed goes back to the GPU
        llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    llm.apply_model(pack_again)
    if torch.cuda.is_available():
        llm.wake_up(tags=["kv_cache"])


def verify(response, answer, verifier):
    """R(tau) in {0, 1}: does the text `response` give `answer`?

    verifier 'exact': the content of the response's last \\boxed{}, or the whole response, equals the answer but for white
    space around it. 'math': math-verify finds the response's final expression and compares it with the answer as
    mathematics (1/2 = 0.5); of an answer with '####' (GSM8K) only what follows counts.

    >>> verify("so it is \\\\boxed{cab}", "cab", "exact"), verify("It is 0.5.", "reason #### 1/2", "math")
    (1.0, 1.0)
    """
    if verifier == "exact":
        boxed = response.rpartition("\\boxed{")[2].partition("}")[0] if "\\boxed{" in response else response
        return float(boxed.strip() == answer.strip())
    import math_verify  # here: 'exact' does not pay for loading sympy

    gold = answer.rpartition("####")[2].strip()
    gold = math_verify.parse(gold if "\\boxed" in gold or "$" in gold else f"${gold}$")
    last = response[max(response.rfind("\\boxed"), 0):]  # of several boxes math-verify would make a list
    return float(bool(gold) and math_verify.verify(gold, math_verify.parse(last)))


class Ragged:
    """Sequences in one flat array: number i is flat[offsets[i]:offsets[i + 1]]."""

    def __init__(self, flat, offsets):
        self.flat, self.offsets = flat, offsets.tolist()
        if self.offsets[-1] != len(flat):
            raise ValueError(f"{len(flat)} elements, offsets to {self.offsets[-1]}")

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        return self.flat[self.offsets[i]:self.offsets[i + 1]]


def load_rollouts(path):
    """rollouts.pt of collect.py, its flat arrays also as sequences of 1-D tensors: prompts [N], responses, logprobs [N*K]."""
    try:
        rollouts = torch.load(path, weights_only=True, mmap=True)  # refuses a pickle that would run code
        for name, array, offsets in (("prompts", "prompt_tokens", "prompt_offsets"),
                                     ("responses", "response_tokens", "response_offsets"),
                                     ("logprobs", "logprobs", "response_offsets")):
            rollouts[name] = Ragged(rollouts[array], rollouts[offsets])
        n, k = rollouts["rewards"].shape
        found = [rollouts["meta"]["format"], *(len(rollouts[name]) for name in ("prompts", "responses", "answers"))]
        if found != [FORMAT, n, n * k, n]:
            raise ValueError(f"format, prompts, responses, answers = {found}")
    except Exception as error:  # a damaged file can raise anything
        fail(path, f"no readable rollouts ({type(error).__name__}: {error})", f"a rollouts.pt of format {FORMAT}",
             "make it with collect.py")
    return rollouts


def load_selection(path, n):
    """selected.npy of score.py: indices of prompts, best first."""
    try:
        selected = np.load(path, allow_pickle=False)
        if selected.dtype != np.int64 or selected.ndim != 1 or not 0 <= selected.min() <= selected.max() < n:
            raise ValueError(f"{selected.dtype} {list(selected.shape)}, or indices out of range")
    except Exception as error:  # missing, truncated, not .npy, a pickle, of other rollouts
        fail(path, f"no usable selection ({error})", f"int64 indices of {n} prompts", "make it from these rollouts")
    return selected.tolist()


def load_tokenizer(name):
    try:
        if Path(name).is_dir() and not list(Path(name).glob("*token*")) and not list(Path(name).glob("vocab*")):
            raise OSError("no tokenizer file")  # of which transformers would make an empty tokenizer
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises a dozen types here
        fail(name, f"no tokenizer ({error})", "a checkpoint with its tokenizer", "save the tokenizer into the model's folder")


def load_policy(name, device, dtype):
    """The policy pi_theta in evaluation mode: dropout would make log-probs differ from one pass to the next."""
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).to(device).eval()
    except Exception as error:  # transformers raises a dozen types here
        fail(name, f"no loadable model ({error})", "a Hugging Face causal language model", "check the folder or hub name")


def batch_of_step(selected, size, step, seed):
    """The `size` prompts of a step: epoch after epoch over `selected`, each epoch in an order of its own."""
    batch = []
    for place in range(step * size, (step + 1) * size):
        epoch, offset = divmod(place, len(selected))
        if not batch or offset == 0:
            order = torch.randperm(len(selected), generator=torch.Generator().manual_seed(stream_seed(seed, "order", epoch)))
        batch.append(selected[order[offset]])
    return batch


def batches_by_tokens(lengths, budget):
    """Batches of indices, longest first, such that (indices in a batch) x (its greatest length) <= budget tokens."""
    batches, batch = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            batches.append(batch)
            batch = []
        batch.append(i)
    return batches + [batch]


def roll_out(policy, tokenizer, prompts, answers, k, temperature, meta, seeds, args):
    """k verified responses a prompt: responses, logprobs (B*k lists each, prompt-major) and rewards [B, k].

    Every process samples its share of the prompts and gets those of the others.
    """
    mine, found = range(RANK, len(prompts), WORLD), []
    plan = [range(len(mine))]  # vLLM minds its cache itself
    if args.engine == "hf":
        plan = batches_by_tokens([k * (len(prompts[i]) + meta["max_new_tokens"]) for i in mine], args.kv_tokens)
    for batch in plan if mine else ():
        batch = [mine[j] for j in batch]
        drawn, logp = ENGINES[args.engine](policy, [prompts[i] for i in batch], k, temperature, meta["max_new_tokens"],
                                           meta["eos_ids"], [seeds[i] for i in batch])
        texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
        for j, i in enumerate(batch):
            here = slice(j * k, (j + 1) * k)
            found.append((i, drawn[here], logp[here], [verify(text, answers[i], meta["verifier"]) for text in texts[here]]))
    everyones = [found]
    if WORLD > 1:
        everyones = [None] * WORLD
        torch.distributed.all_gather_object(everyones, found)
    _, responses, logprobs, rewards = zip(*sorted((row for rows in everyones for row in rows), key=lambda row: row[0]))
    return [r for group in responses for r in group], [p for group in logprobs for p in group], torch.tensor(rewards)


def evaluate(policy, tokenizer, tests, args):
    """{"eval": {test set: {"mean": sampled accuracy, "greedy": greedy accuracy}}}, by the same random numbers every time."""
    results = {}
    for name, (prompts, answers, meta) in tests.items():
        seeds = [stream_seed(args.seed, "eval", i) for i in range(len(prompts))]
        mean, greedy = (float(roll_out(policy, tokenizer, prompts, answers, k, temperature, meta, seeds, args)[2].mean())
                        for k, temperature in ((args.eval_samples, meta["temperature"]), (1, 0.0)))
        results[name] = {"mean": mean, "greedy": greedy}
    return {"eval": results} if results else {}


def grpo_step(policy, reference, optimizer, prompts, responses, logp_sampled, rewards, temperature, args):
    """One AdamW update towards higher J on a batch of groups. Returns what metrics.jsonl says of it.

    prompts: B lists; responses, logp_sampled: B*G lists, prompt-major; rewards: [B, G]. Micro-batches of --batch-tokens only
    save memory, and processes time: each adds its part of the same mean over the B*G responses.
    """
    group, total_tokens, device = rewards.shape[1], sum(map(len, responses)), policy.device
    advantages = group_advantage(rewards).flatten().to(device)  # [B*G]
    sums = torch.zeros(2, device=device)  # of k3 and of |logp - logp_sampled|, over the tokens
    plan = batches_by_tokens([len(prompts[i // group]) + len(r) for i, r in enumerate(responses)], args.batch_tokens)
    for turn in range(0, len(plan), WORLD):
        mine = turn + RANK < len(plan)  # FSDP needs every process in every turn: one without a batch weighs another's by 0
        rows = plan[turn + RANK if mine else 0]
        queries, answers = [prompts[i // group] for i in rows], [responses[i] for i in rows]
        checkpoint_layers(policy, True)
        hidden, targets, mask = response_hidden(policy, queries, answers)  # [b, R, H], [b, R], [b, R]
        checkpoint_layers(policy, False)
        logp_ref = response_logprobs(reference, queries, answers, temperature)[0] if reference is not None else None
        sampled = torch.zeros(mask.shape, device=device)
        sampled.masked_scatter_(mask, torch.tensor([x for i in rows for x in logp_sampled[i]], device=device))
        leaf, here = hidden.detach().requires_grad_(), torch.tensor(rows, device=device)
        for some in rows_at_once(policy, mask):
            logp = token_logprobs(policy, leaf[some], targets[some], mask[some], temperature)
            ref = None if logp_ref is None else logp_ref[some]
            objective = grpo_objective(logp, logp.detach(), ref, advantages[here[some]], mask[some], args.clip, args.kl_coef)
            (-objective.sum() * mine * WORLD / len(responses)).backward()  # FSDP takes the processes' mean
            k3 = kl_k3(logp.detach(), ref) if ref is not None else torch.zeros_like(logp)
            sums += mine * torch.stack([(k3 * mask[some]).sum(), (logp.detach() - sampled[some]).abs().sum()])
        hidden.backward(leaf.grad)
    if WORLD > 1:
        torch.distributed.all_reduce(sums)
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    kl, gap = (sums / total_tokens).tolist()
    return {"reward": float(rewards.mean()), "live": float((rewards.std(1) > 0).float().mean()), "tokens": total_tokens,
            "kl": kl, "engine_gap": gap, "grad_norm": float(whole(grad_norm))}


def whole(tensor):
    """A tensor that FSDP has sharded, whole on every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def checkpoint_layers(policy, on):
    """With --gradient-checkpointing: layers forget their activations, and make them anew in the backward pass. Off for
    sampling, whose cache they would not fill."""
    for module in policy.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = on


def shard(model, device, dtype):
    """FSDP2: every process holds on `device` a part of each layer's weights, gathered when the layer runs (in `dtype`)."""
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if dtype == "bfloat16" else MixedPrecisionPolicy()
    mesh = torch.distributed.init_device_mesh(torch.device(device).type, (WORLD,))
    for module in [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] + [model]:
        fully_shard(module, mesh=mesh, mp_policy=precision)


def tensorboard_writer(folder, step):
    """A writer of TensorBoard files where the package is there, else None. What was written from `step` on is dropped."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=step)


def check_same_settings(folder, settings):
    """A folder made with other settings is neither gone on with nor written over."""
    there = json.loads((folder / "args.json").read_text()) if (folder / "args.json").exists() else {}
    changed = ", ".join(key for key in settings if there.get(key) != settings[key])
    if changed:
        fail(folder, f"a run with another {changed}", "the same settings", "remove it or choose another --out")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="policy to train: a Hugging Face folder or hub name")
    parser.add_argument("--ref", help="reference of the KL term, theta(0) in every phase (--model)")
    parser.add_argument("--rollouts", required=True, help="rollouts.pt with the train prompts")
    parser.add_argument("--select", required=True, help="selected.npy: the prompts to train on")
    parser.add_argument("--eval", nargs="*", default=[], help="test sets: rollouts.pt files, told apart by their names")
    parser.add_argument("--optimizer", help="optimizer.pt of the phase before")
    parser.add_argument("--out", required=True, type=Path, help="folder of the new policy")
    parser.add_argument("--steps", type=int, required=True, help="AdamW updates")
    parser.add_argument("--batch-size", type=int, default=128, help="prompts a step (128)")
    parser.add_argument("--group", type=int, default=8, help="responses a prompt, G (8)")
    parser.add_argument("--lr", type=float, default=1e-6, help="AdamW's learning rate, constant (1e-6)")
    parser.add_argument("--kl-coef", type=float, default=1e-3, help="lambda_KL (0.001); 0 needs no reference in memory")
    parser.add_argument("--clip", type=float, default=0.2, help="eps of the ratio's clipping (0.2)")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="gradient clipping (1.0)")
    parser.add_argument("--eval-every", type=int, default=10, help="steps between evaluations (10)")
    parser.add_argument("--eval-samples", type=int, default=4, help="responses a test prompt (4)")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints to go on from (50)")
    parser.add_argument("--engine", choices=list(ENGINES), default="hf", help="what samples: transformers or vLLM (hf)")
    parser.add_argument("--kv-tokens", type=int, default=65536, help="tokens in the KV cache at once (65536)")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens of an update's micro-batch (8192)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the arithmetic (float32)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory for a third more arithmetic")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.group < 2 or min(args.steps, args.batch_size, args.eval_every, args.save_every, args.eval_samples) < 1:
        parser.error("--group must be >= 2 (an advantage needs a variance); step, batch and sample counts >= 1")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # an unparsable response is a wrong one, not news

    if WORLD > 1:
        if args.device == "cuda":
            args.device += f":{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(days=1))

    # Inputs
    rollouts, part = load_rollouts(args.rollouts), args.out.with_name(args.out.name + ".part")
    meta, answers, prompts = rollouts["meta"], rollouts["answers"], [p.tolist() for p in rollouts["prompts"]]
    selected = load_selection(args.select, len(prompts))
    may_change = ("kv_tokens", "batch_tokens", "device", "gradient_checkpointing")  # a run may go on with less memory
    settings = {name: value for name, value in vars(args).items() if name not in may_change}
    settings = json.loads(json.dumps({**settings, "selected": selected}, default=str))
    if args.out.exists():
        check_same_settings(args.out, settings)
        print(f"{args.out}: complete, nothing to do")
        return
    loaded = {Path(path).stem: load_rollouts(path) for path in args.eval}
    tests = {name: ([p.tolist() for p in test["prompts"]], test["answers"], test["meta"]) for name, test in loaded.items()}
    tokenizer = load_tokenizer(args.model)
    if args.engine == "vllm":  # before the policy: while it starts it needs the most memory
        longest = [max(map(len, p)) + m["max_new_tokens"] for p, _, m in [(prompts, answers, meta), *tests.values()]]
        sampler = load_vllm(args.model, args.dtype, args.kv_tokens, max(longest))
        if torch.cuda.is_available():
            sampler.sleep(level=2)

    def load(name):
        model = load_policy(name, args.device if WORLD == 1 else "cpu", "float32")  # no GPU holds a whole one before its shard
        check_output_logits(model, name)
        if WORLD > 1:
            shard(model, args.device, args.dtype)
        else:  # mixed precision: in bfloat16 weights an update of 1e-6 would round away
            for module in (model, model.get_output_embeddings()):
                module.forward = torch.autocast(model.device.type, torch.bfloat16, args.dtype == "bfloat16")(module.forward)
        return model

    policy, reference = load(args.model), load(args.ref or args.model) if args.kl_coef else None
    if args.engine == "hf":  # one process samples from the weights that it trains
        sampler = policy if WORLD == 1 else load_policy(args.model, args.device, args.dtype)
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr)

    # The state of the phase before, or of this one where it was stopped
    first, done, metrics = 0, 0, []  # steps of earlier phases, steps of this one
    if args.optimizer:
        try:
            state = torch.load(args.optimizer, weights_only=True)
            set_optimizer_state_dict(policy, optimizer, state["optimizer"], options=WHOLE)
            first = state["step"]
        except Exception as error:  # missing, damaged, or of another model
            fail(args.optimizer, f"no usable state ({error})", "an optimizer.pt of the same model", "take the policy's own")
    try:
        part.mkdir(parents=True, exist_ok=True)
        lock = open(part / "lock", "w") if RANK == 0 else None
    except OSError as error:
        fail(args.out, f"a path that cannot be written ({error})", "a writable place", "choose another --out")
    if lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however that ends
        except OSError:
            fail(args.out, "another run that is writing it", "one run a folder", "wait for it or choose another --out")
    if (part / "checkpoint.pt").exists():
        check_same_settings(part, settings)
        state = torch.load(part / "checkpoint.pt", weights_only=True)
        set_model_state_dict(policy, state["policy"], options=WHOLE)
        set_optimizer_state_dict(policy, optimizer, state["optimizer"], options=WHOLE)
        done, metrics = state["step"], state["metrics"]
    if RANK == 0:
        (part / "args.json").write_text(json.dumps(settings))
    for group in optimizer.param_groups:
        group.update(optimizer.defaults)  # this run's learning rate; and tuples, which a loaded state has as lists

    # Training
    def update_sampler():
        weights = ((name, whole(weight.detach())) for name, weight in policy.named_parameters())
        if args.engine == "vllm":
            update_vllm(sampler, weights)
        elif sampler is not policy:
            for ours, (_, weight) in zip(sampler.parameters(), weights):
                ours.data.copy_(weight)

    def save(path, **state):
        state |= {"optimizer": get_optimizer_state_dict(policy, optimizer, options=WHOLE)}
        if RANK == 0:
            torch.save(state, part / "new.pt")
            os.replace(part / "new.pt", path)

    stop = torch.zeros(1)

    def stop_after_this_step(number, _):
        stop.fill_(1)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the run at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_after_this_step)
    update_sampler()
    if first + done == 0 and not metrics:
        metrics.append({"step": 0, "seconds": 0.0, **evaluate(sampler, tokenizer, tests, args)})
    clock = metrics[-1]["seconds"] if metrics else 0.0
    writer = tensorboard_writer(part / "tensorboard", first + done + 1) if RANK == 0 else None
    progress = tqdm(range(done, args.steps), initial=done, total=args.steps, desc=f"train {args.out}", unit="step",
                    disable=RANK > 0)
    for s in progress:
        began, step, last = time.perf_counter(), first + s, s + 1 == args.steps
        batch = batch_of_step(selected, args.batch_size, step, args.seed)
        queries, seeds = [prompts[i] for i in batch], [stream_seed(args.seed, step, j) for j in range(len(batch))]
        responses, logp_sampled, rewards = roll_out(sampler, tokenizer, queries, [answers[i] for i in batch], args.group,
                                                    meta["temperature"], meta, seeds, args)
        sampled = time.perf_counter()
        if args.engine == "vllm" and torch.cuda.is_available():
            sampler.sleep(level=2)
        row = grpo_step(policy, reference, optimizer, queries, responses, logp_sampled, rewards, meta["temperature"], args)
        update_sampler()
        row["sampling_seconds"] = sampled - began
        row["truncated"] = sum(r[-1] not in meta["eos_ids"] for r in responses) / len(responses)
        clock += time.perf_counter() - began
        if last or (step + 1) % args.eval_every == 0:
            row.update(evaluate(sampler, tokenizer, tests, args))
        metrics.append({"step": step + 1, "seconds": clock, **row})
        if RANK == 0:
            (part / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        if writer:
            accuracy = {f"eval/{test}": result["mean"] for test, result in row.pop("eval", {}).items()}
            for name, value in {**row, **accuracy}.items():
                writer.add_scalar(name, value, step + 1)
        progress.set_postfix(reward=f"{row['reward']:.2f}", live=f"{row['live']:.2f}")
        if WORLD > 1:
            torch.distributed.all_reduce(stop, torch.distributed.ReduceOp.MAX)
        if (stop or (s + 1) % args.save_every == 0) and not last:
            save(part / "checkpoint.pt", step=s + 1, policy=get_model_state_dict(policy, options=WHOLE), metrics=metrics)
        if stop and not last:
            progress.close()  # else the bar would be drawn once more, after the message
            if RANK == 0:
                print(f"{args.out}: stopped after step {s + 1} of {args.steps}; the same command goes on", file=sys.stderr)
            sys.exit(130)

    save(part / "optimizer.pt", step=first + args.steps)
    weights = get_model_state_dict(policy, options=WHOLE)
    if RANK == 0:
        trained = policy if WORLD == 1 else load_policy(args.model, "cpu", "float32")
        trained.load_state_dict(weights)
        trained.save_pretrained(part)
        tokenizer.save_pretrained(part)
        for leftover in (part / "checkpoint.pt", part / "lock"):
            leftover.unlink(missing_ok=True)
        if writer:
            writer.close()
        os.replace(part, args.out)
        print(f"{args.out}: {args.steps} steps on {len(selected)} prompts, {clock:.0f} s; "
              f"{json.dumps(metrics[-1].get('eval', {}))}")
    if WORLD > 1 and args.engine == "hf":  # vLLM does it itself
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
