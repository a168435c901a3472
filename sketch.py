"""Stage 2 of CROPI: each prompt's off-policy policy gradient at the current policy, sparsely projected.

    rho_{k,t} = pi_theta(x_{k,t} | s_{k,t}) / beta(x_{k,t} | s_{k,t})               token ratio
    A_k       = (R_k - mean R) / (std R + 1e-4)                                     group advantage
    g(s0)     = 1/K sum_k 1/|tau_k| sum_t grad_theta rho_{k,t} A_k                  off-policy gradient
    g~(s0)    = P drop(g(s0))                                                       sparse random projection

The trajectories tau_1 .. tau_K were sampled once by collect.py from beta = pi_theta(0). There is no clipping
and no KL term. drop keeps each coordinate of the gradient with probability --keep, drawn once over ALL
parameters and the same for every prompt. P maps the kept ones to --dim numbers, so that dot products of
sketches are unbiased estimates of dot products of gradients.

Reads   --model      the current policy theta
        --rollouts   rollouts.pt files (their meta has the temperature): train prompts, validation sets
Writes  --out        a sketch for each: float32 .npy [N, dim], one row per prompt, zero for equal rewards.
                     With --candidates 1/3 only a third of the train prompts with a gradient is sketched;
                     other rows are zero. The .json beside it records what comparable sketches share.

    python sketch.py --model runs/toy/world/base --rollouts train.pt val_sort.pt --out train.npy val_sort.npy
    python sketch.py --model POLICY --rollouts train.pt --out train.npy --rho-max 2 --candidates 1/3
    torchrun --nproc_per_node 8 sketch.py --model POLICY --rollouts train.pt --out train.npy --dtype bfloat16
"""

import argparse
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave their core to others

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache


# ==== 1. The paper ==========================================================================================
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


def token_ratio(logp, logp_beta):
    """rho_{k,t} = pi_theta(x_{k,t} | s_{k,t}) / beta(x_{k,t} | s_{k,t}), from log-probs of any one shape."""
    return (logp - logp_beta).exp()


def off_policy_surrogate(logp, logp_beta, advantages, mask, k, rho_max=math.inf):
    """The scalar whose gradient is g (of several prompts: the sum of their g).

    It is the sum over rows of 1/K 1/|tau_k| sum_t rho_{k,t} A_k. logp, logp_beta: [B, T], one trajectory per
    row. advantages: [B]. mask: bool [B, T], True where a token exists. k: K, even if the batch does not have
    all K trajectories of a prompt. rho_max: a token contributes min(rho, rho_max) A_k grad log pi; this is
    A_k grad rho if rho_max is infinite (truncated importance weights: Ionides 2008; Espeholt et al. 2018).
    """
    ratio = token_ratio(logp, logp_beta)
    weight = (rho_max / ratio.detach()).clamp(max=1)  # 1, or rho_max / rho where rho is larger; a constant
    per_token = weight * ratio * advantages[:, None]  # [B, T]
    return ((per_token * mask).sum(1) / mask.sum(1)).sum() / k


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
class Trajectories:
    """n of the K trajectories of one prompt, sampled from beta; n < K if all are too many for one pass."""

    prompt: torch.Tensor  # token ids [|s0|]
    responses: list  # n tensors of token ids, [|tau_k|] each
    logp_beta: list  # n tensors [|tau_k|]: log beta of each token, at `temperature`
    advantages: torch.Tensor  # [n], in the group of all K responses
    k: int  # K
    temperature: float


def batch_surrogate(policy, batch, rho_max):
    """off_policy_surrogate of b prompts (each with n responses), and log rho of the tokens [tokens]."""
    prompts = [group.prompt for group in batch]
    responses = sum([group.responses for group in batch], [])  # b * n
    logp_beta = sum([group.logp_beta for group in batch], [])  # b * n
    logp_beta = pad_sequence(logp_beta, batch_first=True).to(policy.device)  # [b * n, R]
    advantages = torch.cat([group.advantages for group in batch]).to(policy.device)  # [b * n]
    logits, targets, mask = response_logits(policy, prompts, responses, batch[0].temperature)
    logp = token_logprobs(logits, targets, mask)  # [b * n, R]
    surrogate = off_policy_surrogate(logp, logp_beta, advantages, mask, batch[0].k, rho_max)
    return surrogate, (logp.detach() - logp_beta)[mask]


def prompt_gradient(policy, group, rho_max=math.inf):
    """g(s0) by plain autograd, {parameter name: gradient}, and log rho of the tokens [tokens]."""
    # all parameters; a tied weight is named once, and autograd sums the gradients of its uses
    parameters = dict(policy.requires_grad_(True).named_parameters())
    surrogate, log_ratio = batch_surrogate(policy, [group], rho_max)
    gradients = torch.autograd.grad(surrogate, parameters.values(), allow_unused=True)
    used = {name: gradient for name, gradient in zip(parameters, gradients) if gradient is not None}
    return used, log_ratio


def kept_coordinates(numel, keep, generator):
    """drop: indices of the kept coordinates among `numel`, each kept with probability `keep`; ascending."""
    if keep == 1:
        return torch.arange(numel)
    draws = int(numel * keep + 10 * (numel * keep) ** 0.5 + 10)  # the mean and ten standard deviations
    gaps = torch.empty(draws, dtype=torch.float64).geometric_(keep, generator=generator)  # >= 1, to the next
    kept = gaps.cumsum(0).long() - 1
    return kept[kept < numel]


def stream_seed(*key):
    """A seed for torch.Generator from any key, so that each use of random numbers has its own stream."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")


class Projection:
    """P drop(.): a linear map from all parameters to `dim` numbers, drawn on the CPU from (seed, name).

    P adds each kept coordinate to one random bucket of the sketch with a random sign: a sparse
    Johnson-Lindenstrauss transform with one non-zero per column (Kane and Nelson 2014). With the scale 1 /
    sqrt(keep), P drop(x) . P drop(y) has mean x . y and variance (1/keep - 1) S + (|x|^2 |y|^2 +
    (x . y)^2 - 2 S) / dim, where S = sum_j x_j^2 y_j^2.
    """

    def __init__(self, seed, keep, dim, device):
        self.seed = seed
        self.keep = keep
        self.dim = dim
        self.device = device
        self.drawn = {}  # parameter name -> (kept coordinates, their buckets), 8 bytes per kept coordinate

    def draw(self, name, numel):
        """(kept, buckets) of a parameter. A bucket >= dim means bucket - dim with sign -1."""
        if name not in self.drawn:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, name))
            kept = kept_coordinates(numel, self.keep, generator)
            buckets = torch.randint(2 * self.dim, (len(kept),), generator=generator)
            dtype = torch.int32 if numel < 2**31 else torch.int64
            self.drawn[name] = kept.to(self.device, dtype), buckets.to(self.device, dtype)
        return self.drawn[name]

    def zeros(self, b):
        """Accumulators [b, 2 dim] for `add`: by bucket, first those of sign +1, then those of sign -1."""
        return torch.zeros(b, 2 * self.dim, device=self.device)

    def add(self, name, gradients, sums):
        """Adds a parameter's part to sums [b, 2 dim], from its float32 gradients [b, *parameter shape]."""
        gradients = gradients.flatten(1)
        kept, buckets = self.draw(name, gradients.shape[1])
        sums.scatter_add_(1, buckets.expand(len(gradients), -1), gradients.index_select(1, kept))

    def sketches(self, sums):
        """g~ [b, dim], from the sums over all parameters."""
        return (sums[:, :self.dim] - sums[:, self.dim:]) / self.keep**0.5


def sketch_prompt(policy, projection, group, rho_max=math.inf):
    """g~(s0) [dim], and log rho of the tokens [tokens]."""
    gradient, log_ratio = prompt_gradient(policy, group, rho_max)
    sums = projection.zeros(1)
    for name, part in gradient.items():
        projection.add(name, part[None].float(), sums)
    return projection.sketches(sums)[0], log_ratio


def sketch_file(args, sketcher, identity, number):
    """Sketches --rollouts file `number`. Row i of its --out is g~ of prompt i, zero where rewards are equal.

    sketcher: (list of b Trajectories, rho_max) -> g~ [b, dim], log rho. identity: for the .json.
    """
    began = time.perf_counter()
    rollouts = load_rollouts(args.rollouts[number])
    rewards = rollouts["rewards"]  # [N, K]
    advantages = group_advantage(rewards)  # [N, K]
    unequal = [i for i in range(len(rewards)) if rewards[i].max() > rewards[i].min()]  # others: no gradient
    drawn, weighted, m = draw(args, number, unequal, advantages, identity)  # unless economical: all, m = K
    plan = plan_batches(prompt_sizes(rollouts, drawn), m, args.batch_tokens)

    def sketch_batch(micro_batch):
        """g~ [b, dim] of b prompts, n of the m responses per pass; tokens; sum and maximum of |log rho|."""
        prompts, n = micro_batch
        sketches = 0
        log_ratios = []
        for first in range(0, m, n):
            part = slice(first, first + n)
            batch = [select_trajectories(rollouts, i, drawn[i][part], weighted[i][part]) for i in prompts]
            found, log_ratio = sketcher(batch, args.rho_max)
            sketches = sketches + found  # a gradient is a sum over responses, and P drop(.) is linear
            log_ratios.append(log_ratio.abs())
        log_ratios = torch.cat(log_ratios)
        return sketches.cpu(), len(log_ratios), float(log_ratios.sum()), float(log_ratios.max())

    settings = [identity, args.batch_tokens, drawn, sha256(args.rollouts[number])]
    results = run_batches(sketch_batch, plan, args.out[number], settings)  # resumes; ranks share the batches
    if RANK == 0:
        write_sketch(args, number, identity, len(rewards), len(unequal), m, plan, results, began)


def main():
    args = parse_arguments()
    device = join_ranks(args.device)
    policy = load_policy(args.model, device, args.dtype)
    projection = Projection(args.seed, args.keep, args.dim, device)
    sketcher = choose_sketcher(policy, projection)  # sketch_prompt for each prompt, or the same in one pass
    identity = {"format": FORMAT, "policy": fingerprint(policy), "seed": args.seed, "keep": args.keep,
                "dim": args.dim, "rho_max": str(args.rho_max)}  # JSON has no infinity
    for number in range(len(args.rollouts)):
        sketch_file(args, sketcher, identity, number)
    remove_parts(args.out)
    leave_ranks()


# ==== 2. Faster, same numbers ===============================================================================
# One backward pass makes the gradients of many prompts, in micro-batches of at most --batch-tokens tokens.
# Without it, sketch_prompt would make the same sketches, one prompt per pass. Only the economical selection,
# which is ours and off by default, makes other ones.

Conv1D = transformers.pytorch_utils.Conv1D
BATCHED = (torch.nn.Linear, torch.nn.Embedding, torch.nn.LayerNorm, Conv1D)  # and RMSNorm: layer_gradients
# Numbers in a layer's per-prompt gradients held at a time (at least one prompt's): they fit a CPU's cache.
CHUNK = 2**26 if torch.cuda.is_available() else 2**20


def layer_gradients(layer, x, delta):
    """Gradients of a layer's parameters for each of b prompts: yields (parameter, float32 [b, *its shape]).

    x: the layer's input (of an RMSNorm, its output); delta: the gradient at its output. Both [b, T,
    features], T over the tokens of all of a prompt's rows; the x of an embedding is ids [b, T, 1].
    """
    if isinstance(layer, torch.nn.Embedding):
        weight = torch.zeros(len(delta), *layer.weight.shape, device=x.device)
        weight.scatter_add_(1, x.expand_as(delta), delta.float())
        if layer.padding_idx is not None:
            weight[:, layer.padding_idx] = 0  # as in autograd: the padding id has no gradient
    elif isinstance(layer, torch.nn.Linear):
        weight = matmul_float32(delta.mT, x)
    elif isinstance(layer, Conv1D):
        weight = matmul_float32(x.mT, delta)
    elif isinstance(layer, torch.nn.LayerNorm):
        weight = (delta.float() * F.layer_norm(x.float(), layer.normalized_shape, eps=layer.eps)).sum(1)
    else:  # RMSNorm: output / weight is the normalized input; if not (Gemma), choose_sketcher notices
        weight = (delta.float() * x).sum(1) / layer.weight.float()
    yield layer.weight, weight
    if getattr(layer, "bias", None) is not None:
        yield layer.bias, delta.float().sum(1)


def matmul_float32(left, right):
    """left [b, m, T] @ right [b, T, n] with float32 sums and result; bfloat16 factors stay so on a GPU."""
    if left.is_cuda and left.dtype == right.dtype == torch.bfloat16:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


@contextmanager
def layer_hooks(policy, projection, sums):
    """Inside it, a backward pass adds the projected gradients of b prompts to sums [b, 2 dim].

    Whenever the gradient at a layer's output is known, so are the gradients of its parameters, and their kept
    coordinates are added. A layer may be called several times, and layers may share a weight: all uses are
    added under the weight's one name. Rows of the batch are prompt-major, equally many per prompt.
    """
    names = {parameter: name for name, parameter in policy.named_parameters()}

    def after_forward(layer, inputs, output):
        x = inputs[0] if isinstance(layer, BATCHED) else output
        output.requires_grad_()  # the weights are frozen, so the graph starts at the embedding's output
        output.register_hook(partial(add_gradients, layer, x.detach()))

    def add_gradients(layer, x, delta):
        delta = delta.reshape(len(sums), -1, delta.shape[-1])  # [b, T, features]
        x = x.reshape(*delta.shape[:2], -1)
        at_once = max(1, CHUNK // layer.weight.numel())  # prompts
        for start in range(0, len(sums), at_once):
            some = slice(start, start + at_once)
            for parameter, gradients in layer_gradients(layer, x[some], delta[some]):
                projection.add(names[parameter], gradients, sums[some])

    handles = [layer.register_forward_hook(after_forward) for layer in layers_with_weights(policy)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layers_with_weights(policy):
    return [layer for layer in policy.modules() if list(layer.parameters(recurse=False))]


def sketch_prompts(policy, projection, batch, rho_max=math.inf):
    """g~ [b, dim] of b prompts' Trajectories by one backward pass, and log rho of their tokens [tokens]."""
    policy.requires_grad_(False)  # weights: the hooks make their gradients, one for each prompt
    sums = projection.zeros(len(batch))
    with layer_hooks(policy, projection, sums):
        surrogate, log_ratio = batch_surrogate(policy, batch, rho_max)
        surrogate.backward()
    return projection.sketches(sums), log_ratio


def sketch_one_by_one(policy, projection, batch, rho_max=math.inf):
    """As sketch_prompts, by sketch_prompt: for policies with layers that layer_gradients does not know."""
    sketches, log_ratios = zip(*[sketch_prompt(policy, projection, group, rho_max) for group in batch])
    return torch.stack(sketches), torch.cat(log_ratios)


def choose_sketcher(policy, projection):
    """sketch_prompts if it agrees with plain autograd on a trial, otherwise sketch_one_by_one.

    Returns a function of (batch, rho_max). The trial: two prompts with two responses each, logp_beta = 0, so
    that rho is pi_theta, and advantages of one sign, since cancelling would magnify rounding.
    """
    check_forward(policy)
    one_by_one = partial(sketch_one_by_one, policy, projection)
    batched = partial(sketch_prompts, policy, projection)
    trial = [Trajectories([1, 0, 1], [[0, 1, 1, 0], [1, 1, 0, 1, 0, 0]], [torch.zeros(4), torch.zeros(6)],
                          torch.tensor([1.0, 0.5]), k=2, temperature=1.0),
             Trajectories([0, 1, 1, 0, 1], [[1, 1], [0, 0, 1]], [torch.zeros(2), torch.zeros(3)],
                          torch.tensor([0.75, 1.0]), k=2, temperature=1.0)]
    agrees = False
    known = [type(layer) in BATCHED or type(layer).__name__.endswith("RMSNorm")  # a subclass may do anything
             for layer in layers_with_weights(policy)]
    if all(known):
        expected, _ = one_by_one(trial)
        try:
            found, _ = batched(trial)
            error = (found - expected).norm(dim=1) / expected.norm(dim=1)
            tolerance = 1e-2 if policy.dtype == torch.float32 else 0.1  # of rounding, in deep models
            agrees = bool((error <= tolerance).all())  # false for NaN
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # CTRL changes a layer's output in place, which a hook does not allow
            pass
    if agrees:
        return batched
    if RANK == 0:
        print("sketch.py: plain autograd for this model, one prompt per pass", file=sys.stderr)
    return one_by_one


# ---- economical selection: ours, not the paper's, and off by default; it changes numbers ----
def draw(args, number, unequal, advantages, identity):
    """What to sketch of --rollouts file `number`: {prompt: numbers of m responses}, their advantages, and m.

    By default that is all K responses to each prompt in `unequal`. --candidates and --responses draw from
    them, in the first file only, anew for each policy. unequal: prompts with a gradient; advantages: [N, K].
    """
    m = k = advantages.shape[1]
    candidates = unequal
    if number == 0:
        m = min(args.responses or k, k)
        candidates = draw_candidates(args, unequal, len(advantages), identity)
    drawn = {}
    weighted = {}
    for i in candidates:
        seed = stream_seed(identity["seed"], identity["policy"], "responses", i)
        drawn[i], weighted[i] = draw_responses(advantages[i], m, seed)
    return drawn, weighted, m


def draw_responses(advantages, m, seed):
    """m of a prompt's K responses and their weighted advantages, whose g(s0) is that of all K on average.

    Strata are the n+ responses with A > 0 and the n- with A < 0. Of these, m+ = min(n+, m // 2), m- = min(n-,
    m - m+) and then m+ = min(n+, m - m-) are drawn without replacement. A drawn response's A is multiplied by
    n+ / m+ or n- / m-. If fewer than m have A != 0, some with A = 0, which add nothing, are taken as well:
    a micro-batch has equally many of each prompt. advantages: [K]. Returns a list and a tensor [m].
    """
    k = len(advantages)
    if m == k:
        return list(range(k)), advantages
    generator = torch.Generator().manual_seed(seed)
    positive = (advantages > 0).nonzero()[:, 0]
    negative = (advantages < 0).nonzero()[:, 0]
    m_positive = min(len(positive), m // 2)
    m_negative = min(len(negative), m - m_positive)
    m_positive = min(len(positive), m - m_negative)
    weights = torch.zeros_like(advantages)
    for stratum, size in ((positive, m_positive), (negative, m_negative)):
        chosen = stratum[torch.randperm(len(stratum), generator=generator)[:size]]
        weights[chosen] = len(stratum) / size
    numbers = weights.argsort(descending=True, stable=True)[:m].sort().values
    return numbers.tolist(), (weights * advantages)[numbers]


def draw_candidates(args, unequal, n, identity):
    """--candidates of the prompts with a gradient, in order: by --scores and at random, or all at random.

    By scores: four fifths of them are those of the best rank in any column of S, ties by index; the others
    are drawn from the rest. n: number of prompts in the file.
    """
    size = int(args.candidates * len(unequal))
    if size < 1:
        fail(f"--candidates {float(args.candidates)}", f"none of {len(unequal)} prompts with a gradient",
             "at least one candidate", "raise it")
    if size == len(unequal):
        return unequal
    best = []
    if args.scores:
        scores = load_scores(args.scores, unequal, n)
        ranks = np.argsort(np.argsort(-scores, axis=0, kind="stable"), axis=0)  # [N, V], from 0
        ranks = np.where(np.isfinite(scores), ranks, n).min(1)  # n: never scored
        order = np.argsort(ranks, kind="stable")
        best = order[ranks[order] < n][:4 * size // 5].tolist()
    generator = torch.Generator().manual_seed(stream_seed(identity["seed"], identity["policy"]))
    rest = sorted(set(unequal) - set(best))
    drawn = torch.randperm(len(rest), generator=generator)[:size - len(best)].tolist()
    return sorted(best + [rest[i] for i in drawn])


# ---- micro-batches ----
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


# ==== 3. Files, resuming, bad input =========================================================================
# The command line, rollouts.pt and .npy, batches that survive a kill and are shared by torchrun's processes
# (ranks), and one-line errors. Nothing here changes a number; skip it, unless you change how files are made.

FORMAT = 2  # of rollouts.pt and of the sketches' .json files
RANK = int(os.environ.get("RANK", "0"))  # of this process among those that torchrun has started
WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # their number


def parse_arguments():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=NOTES, formatter_class=layout)
    parser.add_argument("--model", required=True, help="current policy: a Hugging Face folder or hub name")
    parser.add_argument("--rollouts", required=True, nargs="+", type=Path, help="rollouts.pt files")
    parser.add_argument("--out", required=True, nargs="+", type=Path, help="a .npy for each of --rollouts")
    parser.add_argument("--keep", type=float, default=0.1, help="probability of keeping a coordinate (0.1)")
    parser.add_argument("--dim", type=int, default=32768, help="numbers per sketch (32768)")
    parser.add_argument("--rho-max", type=float, default=math.inf, help="largest weight of a token (inf)")
    parser.add_argument("--responses", type=int,
                        help="sketch the first file's prompts from so many of their K responses (all)")
    parser.add_argument("--candidates", type=Fraction, default=Fraction(1),
                        help="share of the first file's prompts with a gradient to sketch (1)")
    parser.add_argument("--scores", type=Path,
                        help="scores.npy of the phase before: candidates by score, else at random")
    parser.add_argument("--batch-tokens", type=int, default=4096 if torch.cuda.is_available() else 512,
                        help="tokens per micro-batch, bounds its memory (4096 on a GPU, 512 elsewhere)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"],
                        help="of the weights (float32); gradients are summed in float32 either way")
    parser.add_argument("--seed", type=int, default=0, help="of the projection and of the candidates (0)")
    args = parser.parse_args()
    check_arguments(args)
    return args


NOTES = """
A killed run, started again with the same command, resumes after its finished batches. Under torchrun, on a
shared file system, the ranks share the batches. On CPUs the bytes are the same for any number of ranks with
the same number of threads each (torchrun sets one; some CPUs round differently with more).

The .json has what must match before two sketches are compared: format, policy (a fingerprint of its weights),
seed, keep, dim and rho_max. And what was seen: prompts, how many of them were skipped for equal rewards and
how many were sketched (candidates), from how many responses each; tokens, seconds, mean and maximum of
|log rho|.

Economical selection, not in the paper: --responses 2 sketches a train prompt from 2 of its K responses, drawn
from those above and below the mean reward and weighted so that the gradient is unbiased. --candidates 1/4
sketches a quarter of the train prompts with a gradient: with --scores, mostly those that scored best in the
phase before (use score.py --momentum, too: a single phase's scores are noisy), otherwise at random.
"""


def check_arguments(args):
    """Refuses bad options, and rollouts without any gradient, before the model is loaded."""
    if args.responses is not None and args.responses < 2:
        fail("--responses", args.responses, "at least 2: a right and a wrong one", "leave it out for all K")
    if not (0 < args.keep <= 1 and 0 < args.candidates <= 1 and args.dim >= 1 and args.rho_max > 0):
        fail("--keep, --candidates, --dim, --rho-max",
             f"{args.keep}, {args.candidates}, {args.dim}, {args.rho_max}",
             "0 < keep, candidates <= 1; dim >= 1; rho-max > 0", "use the paper's 0.1, 1, 32768, inf")
    outs = {out.resolve() for out in args.out}
    sidecars = {out.with_suffix(".json") for out in outs}
    if not len(args.rollouts) == len(args.out) == len(sidecars - outs):
        fail("--out", ", ".join(map(str, args.out)), f"{len(args.rollouts)} .npy files of different names",
             "name one for each of --rollouts")
    vocabulary, longest = check_checkpoint(args.model)
    equal = []  # files whose prompts all have equal rewards
    for path in args.rollouts:
        rollouts = load_rollouts(path)
        check_fits(path, rollouts, vocabulary, longest)
        rewards = rollouts["rewards"]
        if rewards.shape[1] < 2:
            fail(path, f"K = {rewards.shape[1]}", "K >= 2, to compare responses", "collect with --k 2")
        if not rewards.diff().any():
            equal.append(path)
    if args.rollouts[0] in equal or (equal and equal == args.rollouts[1:]):  # train, or all validation sets
        fail(", ".join(map(str, equal)), "no prompt with unequal rewards",
             "prompts with right and wrong responses", "collect more responses, or other prompts")


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


def fingerprint(policy):
    """sha256 of the parameters' names and bytes: equal for equal policies."""
    digest = hashlib.sha256()
    for name, parameter in sorted(policy.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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


def check_fits(path, rollouts, vocabulary, longest):
    """Refuses rollouts with token ids or lengths that the policy does not have."""
    parts = [rollouts["prompt_tokens"], rollouts["response_tokens"]]
    largest = max(int(part.max()) for part in parts if len(part))
    length = int(rollouts["prompt_lengths"].max()) + rollouts["meta"]["max_new_tokens"]
    if largest >= vocabulary or length > longest:
        fail(path, f"token ids up to {largest} and sequences of up to {length} tokens",
             f"ids below {vocabulary} and at most {longest} tokens", "collect with this model")


def select_trajectories(rollouts, prompt, numbers, advantages):
    """Trajectories of one prompt: `numbers` of its K responses, and their advantages [n]."""
    k = rollouts["rewards"].shape[1]
    rows = [prompt * k + number for number in numbers]
    return Trajectories(rollouts["prompts"][prompt], [rollouts["responses"][row] for row in rows],
                        [rollouts["logprobs"][row] for row in rows], advantages, k,
                        rollouts["meta"]["temperature"])


def prompt_sizes(rollouts, drawn):
    """{prompt: (its tokens, tokens of the longest drawn response)} for plan_batches."""
    lengths = rollouts["response_lengths"].view_as(rollouts["rewards"])
    return {i: (len(rollouts["prompts"][i]), int(lengths[i, numbers].max())) for i, numbers in drawn.items()}


def load_scores(path, unequal, n):
    """scores.npy of score.py, [N, V]. Refuses one of other prompts. unequal: those with a gradient."""
    try:
        scores = np.load(path, allow_pickle=False)
        scored = np.isfinite(scores).any(1).nonzero()[0].tolist()
        if scores.dtype != np.float32 or len(scores) != n or not set(scored) <= set(unequal):
            raise ValueError(f"{scores.dtype} {list(scores.shape)}, scores of prompts without a gradient")
    except Exception as error:  # missing, truncated, not .npy, a pickle, of other rollouts
        fail(path, f"no usable scores ({error})", f"those of score.py for these {n} prompts",
             "name the scores.npy of the phase before")
    return scores


class LogLines:
    """A file for tqdm where stderr is no terminal: a line for each update, no carriage returns."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        pass


BAR = {} if sys.stderr.isatty() else {"file": LogLines(), "mininterval": 60}


def run_batches(work, plan, out, settings):
    """Saves work(batch) of each batch of a plan in OUT.HASH.parts, HASH of the settings.

    Each rank does every WORLD-th batch, unless its file exists. Returns when all ranks have finished: an
    iterator over the results in the plan's order, which reads one at a time, since all may not fit in memory.
    """
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    folder = out.with_name(f"{out.name}.{digest[:16]}.parts")
    parts = [folder / f"{number}.pt" for number in range(len(plan))]
    if out.is_dir():
        fail(out, "a folder, which cannot be written", "a file to write", "choose another --out")
    lock(out)
    numbers = range(RANK, len(plan), WORLD)
    for number in tqdm(numbers, str(out), unit="batch", delay=1, disable=RANK > 0, **BAR):
        if not parts[number].exists():
            with replacing(parts[number]) as file:
                torch.save(work(plan[number]), file)
    if WORLD > 1:
        torch.distributed.barrier()
    return (torch.load(part, weights_only=True, mmap=True) for part in parts)


LOCKS = {}  # --out: an open file, whose lock ends with this process


def lock(out):
    """One run per --out. If only torchrun was killed, its ranks work on and still hold the lock."""
    if out in LOCKS:
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        LOCKS[out] = open(out.with_name(out.name + ".lock"), "w")
        if RANK == 0:
            fcntl.flock(LOCKS[out], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(out, "another run that is writing it", "one run per --out", "wait or choose another --out")
    except OSError as error:
        fail(out, f"a path that cannot be written ({error})", "a writable place", "choose another --out")
    if WORLD > 1:
        torch.distributed.barrier()


def remove_parts(outs):
    """Removes locks, and finished batches of this and of earlier, unfinished runs that had the same --out."""
    if RANK == 0:
        for out in outs:
            for folder in out.parent.glob(f"{glob.escape(out.name)}.*.parts"):
                shutil.rmtree(folder)
            out.with_name(out.name + ".lock").unlink(missing_ok=True)


@contextmanager
def reporting_full_disk(path):
    """Reports a disk that becomes full while `path` is written; torch.save hides this in a RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError):
        if shutil.disk_usage(path.parent).free > 2**20:
            raise
        fail(path, "a full disk", "room for it", "free some, then run the same command again")


@contextmanager
def replacing(path):
    """Opens a temporary file, to fail early, and renames it to `path` when it is complete."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("a folder has this name")
        file = open(part, "wb")
    except OSError as error:
        fail(path, f"a path that cannot be written ({error})", "a writable place", "choose another --out")
    with reporting_full_disk(path), file:
        yield file
    os.replace(part, path)


def write_sketch(args, number, identity, n_prompts, n_unequal, m, plan, results, began):
    """Writes the .npy and .json of --rollouts file `number` from the results of a plan; says what was seen.

    Rows are written where they belong, one by one: memory does not grow with the number of prompts.
    """
    out = args.out[number]
    shape = n_prompts, identity["dim"]
    candidates = sum(len(batch) for batch, _ in plan)
    tokens = 0
    log_ratio_sum = 0.0
    log_ratio_max = 0.0
    with replacing(out) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        start = file.tell()
        file.truncate(start + 4 * math.prod(shape))  # rows that are not written are zero
        for (batch, _), (sketches, part_tokens, part_sum, part_max) in zip(plan, results):
            for prompt, row in zip(batch, sketches.numpy()):
                file.seek(start + 4 * shape[1] * prompt)
                file.write(row.tobytes())
            tokens += part_tokens
            log_ratio_sum += part_sum
            log_ratio_max = max(log_ratio_max, part_max)
    mean = log_ratio_sum / max(1, tokens)
    skipped = n_prompts - n_unequal
    seconds = round(time.perf_counter() - began, 2)
    sidecar = {**identity, "prompts": n_prompts, "skipped": skipped, "candidates": candidates,
               "responses": m,
               "tokens": tokens, "log_ratio_mean": mean, "log_ratio_max": log_ratio_max, "seconds": seconds}
    with replacing(out.with_suffix(".json")) as file:
        file.write(json.dumps(sidecar, indent=1).encode())
    print(f"{out}: {n_prompts} prompts, {skipped} of them skipped for equal rewards, {candidates} sketched; "
          f"|log rho| {mean:.3f} on average, at most {log_ratio_max:.1f}; {seconds} s")
    if mean > 0.05 and args.model == load_rollouts(args.rollouts[number])["meta"]["model"]:
        print(f"sketch.py: warning: {args.rollouts[number]}: mean |log rho| is {mean:.3f} although --model "
              "sampled it; the engine rounds differently: collect with --engine hf, or with float32",
              file=sys.stderr)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def join_ranks(device):
    """Joins the other processes of torchrun, silences the libraries, returns this rank's device."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if RANK >= WORLD or (WORLD > 1 and "MASTER_ADDR" not in os.environ):
        fail("RANK, WORLD_SIZE", f"{RANK}, {WORLD}", "those that torchrun sets", "unset both")
    if WORLD > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        if device == "cuda":
            return f"cuda:{os.environ['LOCAL_RANK']}"
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
        fail(f"rank {RANK}", f"too little GPU memory ({error})", "room for a micro-batch",
             "lower --batch-tokens")
