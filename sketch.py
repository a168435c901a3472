"""Stage 2 of CROPI: each prompt's off-policy policy gradient at the current policy, sparsely projected.

    rho_{k,t} = pi_theta(x_{k,t} | s_{k,t}) / beta(x_{k,t} | s_{k,t})               token ratio
    A_k       = (R_k - mean R) / (std R + 1e-4)                                     group advantage
    g(s0)     = 1/K sum_k 1/|tau_k| sum_t grad_theta rho_{k,t} A_k                  off-policy gradient
    g~(s0)    = P drop(g(s0))                                                       sparse random projection

The trajectories tau_1 .. tau_K were sampled once by collect.py from beta = pi_theta(0); no clipping, no KL
term. (--rho-max c: a token weighs min(rho, c) instead of rho.) drop keeps each coordinate of the gradient
with probability --keep, drawn once over ALL parameters and the same for every prompt. P maps the kept ones to
--dim numbers, so that dot products of sketches are unbiased estimates of dot products of gradients.

Reads   --model      the current policy theta; --rollouts: one or more rollouts.pt of collect.py.
Writes  --out        a sketch for each: float32 .npy [N, dim], one row per prompt, zero where all rewards are
                     equal and, in the first file (the train prompts), for all but a share of --candidates.
                     The .json beside it holds what must match before two sketches are compared (format,
                     policy fingerprint, seed, keep, dim, rho_max) and what was seen (prompts, candidates,
                     those of them skipped for equal rewards, tokens, seconds, mean and maximum |log rho|).

One backward pass serves many prompts: at each layer, hooks (Sketcher) combine the input with the gradient at
the output into one gradient per prompt (prompt_gradients) and add the kept coordinates to the sketches
(Projection.add). A model with a layer unknown to prompt_gradients, or for which a trial disagrees with
autograd (make_sketcher), is sketched by plain autograd, one prompt per pass; a line says so.

A killed run, started again with the same command, resumes after its finished batches. Under torchrun, on
a shared file system, the ranks share the batches. On CPUs the bytes are the same for any number of ranks with
the same number of threads each (torchrun sets one; some CPUs round differently with more).

    python sketch.py --model runs/toy/world/base --rollouts train.pt val_sort.pt --out train.npy val_sort.npy
    torchrun --nproc_per_node 8 sketch.py --model MODEL --rollouts train.pt --out train.npy --dtype bfloat16
"""

import argparse
import glob
import hashlib
import json
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.pytorch_utils import Conv1D

FORMAT = 2  # of rollouts.pt and of the sketches' .json files
BATCHED = (nn.Linear, nn.Embedding, nn.LayerNorm, Conv1D)  # and every RMSNorm: what prompt_gradients knows
# Size of a layer's per-prompt gradients that are held at a time (at least one prompt's): fits a CPU's cache.
CHUNK = 2**26 if torch.cuda.is_available() else 2**20
LOGITS = 2**25  # logits held in memory at a time (at least those of one response)
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun


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


def token_ratio(logp, logp_beta):
    """rho_{k,t} = pi_theta(x_{k,t} | s_{k,t}) / beta(x_{k,t} | s_{k,t}), from log-probs of any one shape."""
    return (logp - logp_beta).exp()


def off_policy_surrogate(logp, logp_beta, advantages, mask, k, rho_max=math.inf):
    """The scalar whose gradient is g: sum over rows of 1/K 1/|tau_k| sum_t rho_{k,t} A_k.

    logp, logp_beta: [B, T], one trajectory per row; rows may be of different prompts. advantages: [B]. mask:
    bool [B, T], True where a token exists. k: K, even if not all of a prompt's K trajectories are in the
    batch. rho_max: c; a token contributes min(rho, c) grad log pi A_k, which is grad rho A_k for c = inf
    (truncated importance weights: Ionides 2008; IMPALA, Espeholt et al. 2018).
    """
    ratio = token_ratio(logp, logp_beta)
    ratio = ratio * (rho_max / ratio.detach()).clamp(max=1)  # min(rho, c); its gradient has this weight, too
    per_token = ratio * advantages[:, None]  # [B, T]
    return ((per_token * mask).sum(1) / mask.sum(1)).sum() / k


def kept_coordinates(numel, keep, generator):
    """drop: indices of the kept coordinates among `numel`, each kept with probability `keep`; ascending."""
    if keep == 1:
        return torch.arange(numel)
    draws = int(numel * keep + 10 * (numel * keep) ** 0.5 + 10)  # ten standard deviations above the mean
    gaps = torch.empty(draws, dtype=torch.float64).geometric_(keep, generator=generator)  # between kept ones
    kept = gaps.cumsum(0).long() - 1
    return kept[kept < numel]


def stream_seed(*key):
    """A seed for torch.Generator from any key: every use of random numbers gets a stream of its own."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")


class Projection:
    """P drop(.): a linear map from all parameters to `dim` numbers, drawn on the CPU from (seed, name).

    P adds each kept coordinate to one random bucket of the sketch with a random sign: a sparse
    Johnson-Lindenstrauss transform with one non-zero per column (Kane and Nelson 2014). With the scale 1 /
    sqrt(keep), P drop(x) . P drop(y) has the mean x . y and the variance (1/keep - 1) S + (|x|^2 |y|^2 +
    (x . y)^2 - 2 S) / dim, where S = sum_j x_j^2 y_j^2.
    """

    def __init__(self, seed, keep, dim, device):
        self.seed, self.keep, self.dim, self.device = seed, keep, dim, device
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


# ---- the model: forward pass and gradient ----
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


def prompt_gradients(layer, x, delta):
    """Gradients of a layer's parameters for each of b prompts: yields (parameter, float32 [b, *its shape]).

    x: the layer's input (of an RMSNorm, its output); delta: the gradient at its output. Both [b, T,
    features], T over the tokens of all of a prompt's rows; the x of an embedding is ids [b, T, 1].
    """
    if isinstance(layer, nn.Embedding):
        weight = torch.zeros(len(delta), *layer.weight.shape, device=x.device)
        weight.scatter_add_(1, x.expand_as(delta), delta.float())
        if layer.padding_idx is not None:
            weight[:, layer.padding_idx] = 0  # as in autograd: the padding id has no gradient
    elif isinstance(layer, (nn.Linear, Conv1D)):
        left, right = (delta, x) if isinstance(layer, nn.Linear) else (x, delta)
        if left.is_cuda and left.dtype == right.dtype == torch.bfloat16:  # factors as they are, float32 sums
            weight = torch.bmm(left.mT, right, out_dtype=torch.float32)
        else:
            weight = left.mT.float() @ right.float()
    elif isinstance(layer, nn.LayerNorm):
        weight = (delta.float() * F.layer_norm(x.float(), layer.normalized_shape, eps=layer.eps)).sum(1)
    else:  # RMSNorm: output / weight is the normalized input; if not (Gemma), make_sketcher notices
        weight = (delta.float() * x).sum(1) / layer.weight.float()
    yield layer.weight, weight
    if getattr(layer, "bias", None) is not None:
        yield layer.bias, delta.float().sum(1)


class Sketcher:
    """Hooks on a policy's layers that add each prompt's projected gradients to `sums` [b, 2 dim].

    batched: one backward pass makes the gradients of many prompts. Otherwise, or if a layer is unknown, there
    are no hooks, and plain autograd makes those of one prompt per pass.
    """

    def __init__(self, policy, projection, batched=True):
        self.policy, self.projection = policy, projection
        self.names = {parameter: name for name, parameter in policy.named_parameters()}
        layers = [m for m in policy.modules() if list(m.parameters(recurse=False))]
        known = [type(m) in BATCHED or type(m).__name__.endswith("RMSNorm") for m in layers]  # no subclasses
        self.batched = batched and all(known)
        policy.requires_grad_(not self.batched)
        policy.zero_grad()  # plain autograd reads .grad
        self.hooks = [layer.register_forward_hook(self.after_forward) for layer in layers if self.batched]
        self.sums = None  # [b, 2 dim], where the hooks add the gradients of a backward pass over b prompts
        self.log_ratios = []  # (sum, maximum) of |log rho| over the tokens of each backward pass
        self.calls = {}  # layer -> [(input, gradient at the output)] of its calls: prompts, responses

    def after_forward(self, layer, inputs, output):
        """Forward hook: keeps the input (an RMSNorm's output) until the gradient at the output arrives."""
        x = (inputs[0] if isinstance(layer, BATCHED) else output).detach()
        output.requires_grad_()  # the graph starts at the embeddings' outputs, since the weights are frozen
        calls = self.calls.setdefault(layer, [])
        calls.append(None)
        output.register_hook(partial(self.after_backward, layer, len(calls) - 1, x))

    def after_backward(self, layer, number, x, delta):
        """Backward hook: adds the layer's contribution when the gradients of all its calls are known."""
        delta = delta.reshape(len(self.sums), -1, delta.shape[-1])  # [b, T, features]
        self.calls[layer][number] = x.reshape(*delta.shape[:2], -1), delta
        if None in self.calls[layer]:
            return
        xs, deltas = (torch.cat(tensors, 1) for tensors in zip(*self.calls.pop(layer)))
        at_once = max(1, CHUNK // layer.weight.numel())  # prompts
        for x, delta, sums in zip(xs.split(at_once), deltas.split(at_once), self.sums.split(at_once)):
            for parameter, gradients in prompt_gradients(layer, x, delta):
                self.projection.add(self.names[parameter], gradients, sums)

    def add_autograd(self, sums):
        """Adds to sums [1, 2 dim] what plain autograd has left in the parameters' .grad; clears it."""
        for parameter, name in self.names.items():
            if parameter.grad is not None:
                self.projection.add(name, parameter.grad[None].float(), sums)
                parameter.grad = None

    def close(self):
        for hook in self.hooks:
            hook.remove()


def sketch_batch(sketcher, prompts, responses, logp_beta, advantages, k, temperature, rho_max=math.inf):
    """What n of the K trajectories of each of b prompts contribute to g~ [b, dim].

    prompts: b sequences of token ids. responses (b * n sequences), logp_beta (b * n tensors [|tau|]) and
    advantages [b * n] are prompt-major.

    The logits of a batch with a vocabulary of 150,000 do not fit into memory. So the output layer has passes
    of its own, over a few responses each, from a copy of the hidden states; the other layers have one.
    """
    policy, projection, n = sketcher.policy, sketcher.projection, len(responses) // len(prompts)
    if len(prompts) > 1 and not sketcher.batched:  # plain autograd: one prompt per pass
        sketches = []
        for i, prompt in enumerate(prompts):
            own = slice(i * n, (i + 1) * n)
            sketches.append(sketch_batch(sketcher, [prompt], responses[own], logp_beta[own], advantages[own],
                                         k, temperature, rho_max))
        return torch.cat(sketches)
    sums = projection.zeros(len(prompts))
    advantages = advantages.to(policy.device)
    beta = pad_sequence(logp_beta, batch_first=True).float().to(policy.device)  # [b * n, R]
    hidden, targets, mask = group_hidden(policy.base_model, prompts, responses)
    leaf = hidden.detach().requires_grad_()  # [b * n, R, H]
    at_once = max(1, LOGITS // (mask.shape[1] * policy.config.get_text_config().vocab_size))  # that fit
    if at_once >= n:  # whole prompts, or an even share of one prompt's responses
        at_once = at_once // n * n
    else:
        at_once = max(i for i in range(1, at_once + 1) if n % i == 0)
    for start in range(0, len(leaf), at_once):
        some = slice(start, start + at_once)
        sketcher.sums = sums[start // n:(start + at_once - 1) // n + 1]
        logits = output_logits(policy, leaf[some], temperature)  # [at_once, R, V]
        logp = token_logprobs(logits, targets[some], mask[some])
        off_policy_surrogate(logp, beta[some], advantages[some], mask[some], k, rho_max).backward()
        log_ratio = (logp.detach() - beta[some]).abs()  # 0 - 0 outside the mask
        sketcher.log_ratios.append(torch.stack([log_ratio.sum(), log_ratio.max()]))
    sketcher.sums = sums
    hidden.backward(leaf.grad)
    sketcher.add_autograd(sums)  # where batched, there is nothing: the hooks have filled the sums
    return projection.sketches(sums)


def make_sketcher(policy, projection):
    """A batched Sketcher if it agrees with autograd on the policy's own logits, otherwise a plain one.

    Each is tried on two prompts with two responses each and logp_beta = 0, so that rho is pi_theta.
    """
    prompts, responses = [[1, 0, 1], [0, 1, 1, 0, 1]], [[0, 1, 1, 0], [1, 1, 0, 1, 0, 0], [1, 1], [0, 0, 1]]
    logp_beta = [torch.zeros(len(r)) for r in responses]
    advantages = torch.tensor([1.0, 0.5, 0.75, 1.0])  # of one sign: cancelling would magnify rounding
    tolerance = 1e-2 if policy.dtype == torch.float32 else 0.1
    problem = "a gradient that differs from that of the model's own logits"
    sketcher, sums = Sketcher(policy, projection, batched=False), projection.zeros(2)
    for j, response in enumerate(responses):
        tokens = torch.tensor(prompts[j // 2] + response, device=policy.device)
        pi = policy(tokens[None]).logits[0, :-1].float().softmax(-1).gather(1, tokens[1:, None])
        (advantages[j] / 2 * pi[-len(response):].mean()).backward()
        sketcher.add_autograd(sums[j // 2:j // 2 + 1])
    truth = projection.sketches(sums)
    for batched in (True, False):
        sketcher = Sketcher(policy, projection, batched)
        try:
            found = sketch_batch(sketcher, prompts, responses, logp_beta, advantages, 2, 1.0)
            error = (found - truth).norm(dim=1) / truth.norm(dim=1)
            if (error <= tolerance).all():  # false for NaN
                if not sketcher.batched and RANK == 0:
                    print("sketch.py: plain autograd for this model, one prompt per pass", file=sys.stderr)
                return sketcher
        except Exception as error:  # a cache that cannot be repeated, for example
            problem = repr(error)
        sketcher.close()
    fail(policy.name_or_path, problem, "a transformer with a KV cache", "choose another model")


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


def fingerprint(policy):
    """sha256 of the parameters' names and bytes: equal for equal policies."""
    digest = hashlib.sha256()
    for name, parameter in sorted(policy.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- batches, files, ranks ----
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


@contextmanager
def replacing(path):
    """Opens a temporary file, to fail early, and renames it to `path` when it is complete."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path if path.is_dir() else part, "wb")  # opening a folder raises
    except OSError as error:
        fail(path, f"a path that cannot be written ({error})", "a writable place", "choose another --out")
    with file:
        yield file
    os.replace(part, path)


def run_batches(work, plan, out, settings):
    """Saves work(batch) of each batch of a plan in OUT.HASH.parts, HASH of the settings. Returns the results.

    Each rank does every WORLD-th batch, unless its file exists. Returns when all ranks have finished.
    """
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    parts = [out.with_name(f"{out.name}.{digest[:16]}.parts") / f"{i}.pt" for i in range(len(plan))]
    for number in tqdm(range(RANK, len(plan), WORLD), str(out), unit="batch", delay=1, disable=RANK > 0):
        if not parts[number].exists():
            with replacing(out if out.is_dir() else parts[number]) as file:  # a wrong --out fails before work
                torch.save(work(plan[number]), file)
    if WORLD > 1:
        torch.distributed.barrier()
    return (torch.load(part, weights_only=True, mmap=True) for part in parts)


def sketch_prompts(sketcher, rollouts, rho_max, micro_batch):
    """g~ [b, dim] of a micro-batch (prompts, rows), and the sum and maximum of |log rho| over its tokens."""
    (prompts, rows), sketches = micro_batch, 0
    advantages = group_advantage(rollouts["rewards"][prompts])  # [b, K]
    k, sketcher.log_ratios = advantages.shape[1], []
    for first in range(0, k, rows):
        at = [i * k + j for i in prompts for j in range(k)[first:first + rows]]
        sketches = sketches + sketch_batch(
            sketcher, [rollouts["prompts"][i] for i in prompts], [rollouts["responses"][j] for j in at],
            [rollouts["logprobs"][j] for j in at], advantages[:, first:first + rows].flatten(), k,
            rollouts["meta"]["temperature"], rho_max)
    sums, maxima = torch.stack(sketcher.log_ratios).cpu().T
    return sketches.cpu(), float(sums.sum()), float(maxima.max())


def sketch_file(sketcher, path, out, identity, batch_tokens, share=1):
    """Sketches one rollouts.pt into a .npy and its .json. identity: policy and projection, for the .json.

    share: that of the prompts that are candidates, drawn from the seed and the policy. Other rows are zero.
    """
    began, rollouts = time.perf_counter(), load_rollouts(path)
    (n, k), lengths = rollouts["rewards"].shape, rollouts["response_lengths"].view_as(rollouts["rewards"])
    generator = torch.Generator().manual_seed(stream_seed(identity["seed"], identity["policy"]))
    candidates = torch.randperm(n, generator=generator)[:int(share * n)].sort().values
    varied = candidates[rollouts["rewards"][candidates].diff().any(1)].tolist()  # with unequal rewards
    if share < 1 and not varied:
        fail(path, "no candidate with unequal rewards", "at least one", "raise --candidates")
    sizes = {i: (len(rollouts["prompts"][i]), int(lengths[i].max())) for i in varied}
    plan = plan_batches(sizes, k, batch_tokens)
    with open(path, "rb") as file:
        settings = [identity, batch_tokens, str(share), hashlib.file_digest(file, "sha256").hexdigest()]
    work = partial(sketch_prompts, sketcher, rollouts, float(identity["rho_max"]))
    results = run_batches(work, plan, out, settings)
    if RANK > 0:
        return
    log_ratio_sum, log_ratio_max = 0.0, 0.0  # over all tokens
    with replacing(out) as file:  # only its name is used; rows of skipped prompts stay zero
        np.lib.format.open_memmap(file.name, "w+", "<f4", (n, identity["dim"]))
        for (batch, _), (sketches, part_sum, part_max) in zip(plan, results):
            np.load(file.name, mmap_mode="r+")[batch] = sketches.numpy()  # unmapped after each part
            log_ratio_sum, log_ratio_max = log_ratio_sum + part_sum, max(log_ratio_max, part_max)
    tokens = int(lengths[varied].sum())
    sidecar = {**identity, "prompts": n, "candidates": len(candidates),
               "skipped": len(candidates) - len(varied), "tokens": tokens,
               "log_ratio_mean": log_ratio_sum / max(1, tokens), "log_ratio_max": log_ratio_max,
               "seconds": round(time.perf_counter() - began, 2)}
    with replacing(out.with_suffix(".json")) as file:
        file.write(json.dumps(sidecar, indent=1).encode())
    mean = sidecar["log_ratio_mean"]
    print(f"{out}: {n} prompts, {len(candidates)} candidates, {sidecar['skipped']} of them skipped for equal "
          f"rewards; |log rho| {mean:.3f} on average, at most {log_ratio_max:.1f}; {sidecar['seconds']} s")
    if mean > 0.05 and sketcher.policy.name_or_path == rollouts["meta"]["model"]:
        print(f"sketch.py: warning: {path}: mean |log rho| is {mean:.3f} although --model sampled it; "
              "the engine rounds differently: collect with --engine hf, or with float32", file=sys.stderr)


# ---- the command line ----
def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--model", required=True, help="current policy: a Hugging Face folder or hub name")
    parser.add_argument("--rollouts", required=True, nargs="+", type=Path, help="rollouts.pt files")
    parser.add_argument("--out", required=True, nargs="+", type=Path, help="a .npy for each of --rollouts")
    parser.add_argument("--keep", type=float, default=0.1, help="probability of keeping a coordinate (0.1)")
    parser.add_argument("--dim", type=int, default=32768, help="numbers per sketch (32768)")
    parser.add_argument("--rho-max", type=float, default=math.inf, help="largest weight of a token (inf)")
    parser.add_argument("--candidates", type=Fraction, default=Fraction(1),
                        help="share of the first rollouts.pt to sketch, drawn anew for each policy (1)")
    parser.add_argument("--batch-tokens", type=int, default=8192 if torch.cuda.is_available() else 512,
                        help="tokens per micro-batch (8192 on a GPU, 512 elsewhere)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"],
                        help="of the weights (float32); gradients are summed in float32 either way")
    parser.add_argument("--seed", type=int, default=0, help="of the projection (0)")
    args = parser.parse_args()
    if not (0 < args.keep <= 1 and 0 < args.candidates <= 1 and args.dim >= 1 and args.rho_max > 0):
        fail("--keep, --candidates, --dim, --rho-max",
             f"{args.keep}, {args.candidates}, {args.dim}, {args.rho_max}",
             "0 < keep, candidates <= 1; dim >= 1; rho-max > 0", "use the paper's 0.1, 1, 32768, inf")
    sidecars = {out.resolve().with_suffix(".json") for out in args.out}
    if not len(args.rollouts) == len(args.out) == len(sidecars - {out.resolve() for out in args.out}):
        fail("--out", ", ".join(map(str, args.out)), f"{len(args.rollouts)} .npy files of different names",
             "name one for each of --rollouts")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rewards = {path: load_rollouts(path)["rewards"] for path in args.rollouts}  # bad input fails before work
    for path, found in rewards.items():
        if found.shape[1] < 2:
            fail(path, f"K = {found.shape[1]}", "K >= 2, to compare responses", "collect with --k 2 or more")
    flat = [path for path, found in rewards.items() if not found.diff().any()]  # every gradient is zero
    if args.rollouts[0] in flat or (flat and flat == args.rollouts[1:]):  # train, or all validation sets
        fail(", ".join(map(str, flat)), "no prompt with unequal rewards",
             "prompts with right and wrong responses", "collect more responses, or other prompts")
    if WORLD > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        args.device += f":{os.environ['LOCAL_RANK']}" if args.device == "cuda" else ""
    policy = load_policy(args.model, args.device, args.dtype)
    identity = {"format": FORMAT, "policy": fingerprint(policy), "seed": args.seed, "keep": args.keep,
                "dim": args.dim, "rho_max": str(args.rho_max)}  # JSON has no infinity
    sketcher = make_sketcher(policy, Projection(args.seed, args.keep, args.dim, policy.device))
    for number, (path, out) in enumerate(zip(args.rollouts, args.out)):
        share = 1 if number else args.candidates
        sketch_file(sketcher, path, out, identity, args.batch_tokens, share)
    for out in args.out if RANK == 0 else ():
        for folder in out.parent.glob(f"{glob.escape(out.name)}.*.parts"):
            shutil.rmtree(folder)
    if WORLD > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as error:
        fail(f"rank {RANK}", f"too little GPU memory ({error})", "room for a micro-batch",
             "lower --batch-tokens")
