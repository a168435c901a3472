"""Stage 2 of CROPI: each prompt's off-policy policy gradient at the current policy, sparsely projected.

    rho_{k,t} = pi_theta(x_{k,t} | s_{k,t}) / beta(x_{k,t} | s_{k,t})               token ratio
    A_k       = (R_k - mean R) / (std R + 1e-4)                                     group advantage
    g(s0)     = 1/K sum_k 1/|tau_k| sum_t grad_theta rho_{k,t} A_k                  off-policy gradient
    g~(s0)    = P drop(g(s0))                                                       sparse random projection

The trajectories tau_1 .. tau_K were sampled once by collect.py from beta = pi_theta(0). There is no clipping
and no KL term. drop keeps each coordinate of the gradient with probability --keep, drawn once over ALL
parameters and the same for every prompt. P maps the kept coordinates to --dim numbers, so that dot products
of sketches are unbiased estimates of dot products of gradients.

Reads   --model      the current policy theta: a Hugging Face folder or hub name.
        --rollouts   one or more rollouts.pt of collect.py.
Writes  --out        a sketch for each: float32 .npy [N, dim], one row per prompt. A prompt whose rewards are
                     all equal has a zero gradient: it is skipped and counted, and its row is zero. A .json of
                     the same name holds what must match before two sketches are compared (format, policy
                     fingerprint, seed, keep, dim) and what was seen (prompts, skipped, tokens, seconds).

One backward pass serves many prompts. sketch_batch runs the forward pass (group_hidden), the backward pass of
the output layer and that of the other layers. The weights are frozen; at each layer, hooks (Sketcher) combine
the layer's input x with the gradient delta at its output into one gradient per prompt (prompt_gradients; for
a Linear, delta^T x) and add the kept coordinates to the sketches (Projection.add). So each response token
contributes to every layer's kept coordinates. A model with a layer unknown to prompt_gradients, or for which
a trial disagrees with plain autograd, is sketched by plain autograd, one prompt per pass; a line says so.

A killed run, started again with the same command, resumes after the batches that it finished. Under torchrun
(one file system) the ranks share the batches of one plan. The bytes are the same for any number of ranks with
the same number of threads each (torchrun sets one; some CPUs round differently with more). Differs from the
authors' release: all parameters are sketched (there only the embedding); log-probs are at the sampling
temperature.

    python sketch.py --model runs/toy-world/base --rollouts train.pt val_sort.pt --out train.npy val_sort.npy
    torchrun --nproc_per_node 8 sketch.py --model MODEL --rollouts train.pt --out train.npy --dtype bfloat16
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.pytorch_utils import Conv1D

FORMAT = 2  # of rollouts.pt and of the sketches' .json files
BATCHED = (nn.Linear, nn.Embedding, nn.LayerNorm, Conv1D)  # and every RMSNorm: what prompt_gradients knows
CHUNK = 2**20  # numbers of a layer's gradients at once, at least one prompt's: they stay in a CPU's cache
LOGITS = 2**25  # logits in memory at once, at least one response's
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun


# ---- the equations ----
def group_advantage(rewards):
    """A_k = (R_k - mean R) / (std R + 1e-4), std with Bessel's correction; 0 in a group of equal rewards.

    rewards: [..., K], K >= 2, one group per row. Returns the same shape.

    >>> group_advantage(torch.tensor([[1., 0.], [1., 1.]])).round(decimals=3).tolist()
    [[0.707, -0.707], [0.0, 0.0]]
    """
    std = rewards.std(-1, keepdim=True)
    advantages = (rewards - rewards.mean(-1, keepdim=True)) / (std + 1e-4)
    return torch.where(std > 0, advantages, torch.zeros_like(advantages))


def token_ratio(logp, logp_beta):
    """rho_{k,t} = pi_theta(x_{k,t} | s_{k,t}) / beta(x_{k,t} | s_{k,t}), from log-probs of any one shape."""
    return (logp - logp_beta).exp()


def off_policy_surrogate(logp, logp_beta, advantages, mask, k):
    """The scalar whose gradient is g: sum over rows of 1/K 1/|tau_k| sum_t rho_{k,t} A_k.

    logp, logp_beta: [B, T], one trajectory per row; rows may be of different prompts. advantages: [B]. mask:
    bool [B, T], True where a token exists. k: K, even if not all of a prompt's K trajectories are in the
    batch.
    """
    per_token = token_ratio(logp, logp_beta) * advantages[:, None]  # [B, T]
    return ((per_token * mask).sum(1) / mask.sum(1)).sum() / k


def kept_coordinates(numel, keep, generator):
    """drop: the indices of the kept coordinates among `numel`, each kept with probability `keep`; ascending.

    Only the gaps between them are drawn, which are geometric.
    """
    if keep == 1:
        return torch.arange(numel)
    draws = int(numel * keep + 10 * (numel * keep) ** 0.5 + 10)  # ten standard deviations above the mean
    gaps = torch.empty(draws, dtype=torch.float64).geometric_(keep, generator=generator)
    kept = gaps.cumsum(0).long() - 1
    return kept[kept < numel]


class Projection:
    """P drop(.): a linear map from all parameters to `dim` numbers, drawn on the CPU from (seed, name).

    P adds each kept coordinate to one random bucket of the sketch with a random sign: a sparse
    Johnson-Lindenstrauss transform with one non-zero per column (Kane and Nelson 2014). Scaled by 1 /
    sqrt(keep), E[P drop(x) . P drop(y)] = x . y, with S = sum_j x_j^2 y_j^2 and the variance
    (1/keep - 1) S + (|x|^2 |y|^2 + (x . y)^2 - 2 S) / dim.
    """

    def __init__(self, seed, keep, dim, device):
        self.seed, self.keep, self.dim, self.device = seed, keep, dim, device
        self.drawn = {}  # parameter name -> (kept coordinates, their buckets), 8 bytes per kept coordinate

    def draw(self, name, numel):
        """(kept, buckets) of a parameter. A bucket >= dim means bucket - dim with sign -1."""
        if name not in self.drawn:
            digest = hashlib.sha256(repr((self.seed, name)).encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
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
    """log pi(x_t | s_t) [B, R] of the tokens `targets` [B, R] under softmax(logits), logits [B, R, V].

    mask: bool [B, R], True where a token exists; the result is 0 elsewhere.
    """
    logp = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return logp.view(mask.shape).masked_fill(~mask, 0)


def group_hidden(base_model, prompts, responses):
    """The hidden states that predict each response token, of b prompts with n responses each.

    base_model: the policy without its output layer. prompts: b sequences of token ids; responses: b * n
    sequences, prompt-major. Returns hidden [b * n, R, H], R the length of the longest response, the response
    tokens [b * n, R] and the bool mask [b * n, R] of those that exist.

    A prompt is read once: its n responses share its cached keys and values, through which their gradients
    flow back. Prompts are padded on the left and masked; responses are padded on the right, which no token
    attends to. So the composition of the batch changes results by rounding only.
    """
    pad, device, n = nn.utils.rnn.pad_sequence, base_model.device, len(responses) // len(prompts)
    cache = DynamicCache(config=base_model.config)
    prompts = [torch.as_tensor(prompt).long() for prompt in prompts]
    responses = [torch.as_tensor(response).long() for response in responses]
    tokens = pad(prompts, batch_first=True, padding_side="left").to(device)  # [b, P]
    lengths = torch.tensor([len(p) for p in prompts], device=device)[:, None]  # [b, 1]
    positions = torch.arange(-tokens.shape[1], 0, device=device) + lengths  # [b, P], negative on padding
    attention = (positions >= 0).long()
    hidden = base_model(tokens, attention_mask=attention, position_ids=positions.clamp(min=0),
                        past_key_values=cache)[0]
    hidden = hidden[:, -1:].repeat_interleave(n, 0)  # [b * n, 1, H], which predicts the first response token

    targets = pad(responses, batch_first=True).to(device)  # [b * n, R]
    steps = torch.arange(targets.shape[1], device=device)
    mask = steps < torch.tensor([len(r) for r in responses], device=device)[:, None]  # [b * n, R]
    if len(steps) > 1:
        cache.batch_repeat_interleave(n)
        inputs, positions = targets[:, :-1], lengths.repeat_interleave(n, 0) + steps[:-1]
        attention = torch.cat([attention.repeat_interleave(n, 0), torch.ones_like(inputs)], 1)
        later = base_model(inputs, attention_mask=attention, position_ids=positions, past_key_values=cache)[0]
        hidden = torch.cat([hidden, later], 1)
    return hidden, targets, mask


def product(a, b):
    """a @ b [b, m, n] in float32. A GPU multiplies bfloat16 factors as they are and sums in float32."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def prompt_gradients(layer, x, delta):
    """Gradients of a layer's parameters for each of b prompts: yields (parameter, float32 [b, *its shape]).

    x: the layer's input (of an RMSNorm, its output); delta: the gradient at its output. Both [b, T,
    features], T over the tokens of all of a prompt's rows; the x of an embedding is ids [b, T].
    """
    if isinstance(layer, nn.Embedding):
        b, features = len(delta), delta.shape[-1]
        rows = x + layer.num_embeddings * torch.arange(b, device=x.device)[:, None]
        weight = torch.zeros(b * layer.num_embeddings, features, device=x.device)
        weight = weight.index_add_(0, rows.flatten(), delta.flatten(0, 1).float()).view(b, -1, features)
        if layer.padding_idx is not None:
            weight[:, layer.padding_idx] = 0  # as in autograd: the padding id has no gradient
    elif isinstance(layer, nn.Linear):
        weight = product(delta.mT, x)
    elif isinstance(layer, Conv1D):
        weight = product(x.mT, delta)
    elif isinstance(layer, nn.LayerNorm):
        weight = (delta.float() * F.layer_norm(x.float(), layer.normalized_shape, eps=layer.eps)).sum(1)
    else:  # RMSNorm: output / weight is the normalized input
        weight = (delta.float() * x).sum(1) / layer.weight.float()
    yield layer.weight, weight
    if getattr(layer, "bias", None) is not None:
        yield layer.bias, delta.float().sum(1)


class Sketcher:
    """Hooks on a policy's layers that add each prompt's projected gradients to `sums` [b, 2 dim].

    batched: one backward pass makes the gradients of many prompts. Otherwise there are no hooks, and plain
    autograd makes those of one prompt per pass.
    """

    def __init__(self, policy, projection, batched=True):
        self.policy, self.projection, self.output_layer = policy, projection, policy.get_output_embeddings()
        self.names = {parameter: name for name, parameter in policy.named_parameters()}
        layers = [m for m in policy.modules() if next(m.parameters(recurse=False), None) is not None]
        known = [type(m) in BATCHED or type(m).__name__.endswith("RMSNorm") for m in layers]  # no subclasses
        self.batched = batched and all(known)
        policy.requires_grad_(not self.batched)
        policy.zero_grad()  # plain autograd reads .grad
        hooked = layers if self.batched else []
        self.hooks = [layer.register_forward_hook(self.after_forward) for layer in hooked]
        self.calls = {}  # layer -> (input, gradient at the output) of its calls: prompts, responses

    def after_forward(self, layer, inputs, output):
        """Forward hook: keeps the input (an RMSNorm's output) until the gradient at the output arrives."""
        x = inputs[0].detach() if isinstance(layer, BATCHED) else output.detach()
        if layer is self.output_layer:
            if output.requires_grad:
                output.register_hook(lambda delta: self.add_layer(layer, [(x, delta)], self.output_sums))
            return
        if not output.requires_grad:  # an embedding's: the graph starts here, since the weights are frozen
            output.requires_grad_()
        calls = self.calls.setdefault(layer, [])
        calls.append(None)
        output.register_hook(partial(self.after_backward, layer, calls, len(calls) - 1, x))

    def after_backward(self, layer, calls, number, x, delta):
        """Backward hook: adds the layer's contribution when the gradients of all its calls are known."""
        calls[number] = x, delta
        if None not in calls:
            self.add_layer(layer, calls, self.sums)
            calls.clear()

    @torch.no_grad()
    def add_layer(self, layer, calls, sums):
        """Adds a layer's contribution to sums [b, 2 dim]. calls: (input, gradient at the output) of each."""
        b, by_prompt = len(sums), []
        for tensors in zip(*calls):
            features = tensors[0].shape[-1:] if tensors[0].is_floating_point() else ()  # token ids have none
            by_prompt.append(torch.cat([tensor.reshape(b, -1, *features) for tensor in tensors], 1))
        x, delta = by_prompt  # [b, T, features]
        step = max(1, CHUNK // layer.weight.numel())  # prompts at a time
        for start in range(0, b, step):
            some = slice(start, start + step)
            for parameter, gradients in prompt_gradients(layer, x[some], delta[some]):
                self.projection.add(self.names[parameter], gradients, sums[some])

    def close(self):
        for hook in self.hooks:
            hook.remove()


def output_layer_backward(sketcher, hidden, targets, mask, logp_beta, advantages, k, temperature):
    """The backward pass of off_policy_surrogate through the output layer. Returns its gradient at `hidden`.

    hidden: [b * n, R, H]; targets, mask, logp_beta: [b * n, R]; advantages: [b * n]; k: K.

    There are two backward passes because the logits of a whole batch do not fit into memory at a vocabulary
    of 150,000. So they are computed, differentiated and freed for a few responses at a time, from a copy of
    the hidden states that is cut off from the graph; the other layers then have one pass for all responses.
    """
    policy, hidden, n = sketcher.policy, hidden.detach().requires_grad_(), len(hidden) // len(sketcher.sums)
    logits_per_response = mask.shape[1] * policy.config.get_text_config().vocab_size
    rows = max(1, LOGITS // logits_per_response)  # responses at a time
    block = max(n, rows // n * n)  # whole prompts, or one prompt whose responses do not fit together
    for start in range(0, len(hidden), block):
        end = min(start + block, len(hidden))
        sketcher.output_sums = sketcher.sums[start // n:end // n]
        for first in range(start, end, rows):
            some = slice(first, min(first + rows, end))
            logits = output_logits(policy, hidden[some], temperature)
            logp = token_logprobs(logits, targets[some], mask[some])
            off_policy_surrogate(logp, logp_beta[some], advantages[some], mask[some], k).backward()
    return hidden.grad


def sketch_batch(sketcher, prompts, responses, logp_beta, advantages, k, temperature):
    """What n of the K trajectories of each of b prompts contribute to g~ [b, dim].

    prompts: b sequences of token ids. responses (b * n sequences), logp_beta (b * n tensors [|tau|]) and
    advantages [b * n] are prompt-major.
    """
    policy, projection, pad = sketcher.policy, sketcher.projection, nn.utils.rnn.pad_sequence
    b, n, device = len(prompts), len(responses) // len(prompts), policy.device
    sums, prompts_per_pass = projection.zeros(b), b if sketcher.batched else 1
    for first in range(0, b, prompts_per_pass):
        end = first + prompts_per_pass
        rows, sketcher.sums = slice(first * n, end * n), sums[first:end]  # a view, which the hooks fill
        hidden, targets, mask = group_hidden(policy.base_model, prompts[first:end], responses[rows])
        beta = pad(logp_beta[rows], batch_first=True).float().to(device)  # [prompts_per_pass * n, R]
        delta = output_layer_backward(sketcher, hidden, targets, mask, beta, advantages[rows].to(device), k,
                                      temperature)
        hidden.backward(delta)
        for parameter, name in sketcher.names.items():
            if parameter.grad is not None:  # in batched mode there is none
                projection.add(name, parameter.grad[None].float(), sketcher.sums)
                parameter.grad = None
    return projection.sketches(sums)


def check_forward(policy):
    """Refuses a policy whose own logits are not those of group_hidden and output_logits.

    Returns what it was tried on: 2 random prompts and 2 random responses to each, token ids on the CPU.
    """
    rng, vocabulary = torch.Generator().manual_seed(0), policy.get_input_embeddings().num_embeddings
    tokens = [torch.randint(vocabulary, (length,), generator=rng) for length in (3, 5, 4, 6, 2, 5)]
    prompts, responses, tolerance = tokens[:2], tokens[2:], 1e-3 if policy.dtype == torch.float32 else 5e-2
    try:
        with torch.no_grad():
            found = output_logits(policy, group_hidden(policy.base_model, prompts, responses)[0], 1.0)[0, :4]
            expected = policy(torch.cat([prompts[0], responses[0]])[None].to(policy.device)).logits[0, 2:6]
            same = (found - expected).norm() <= tolerance * expected.norm()  # [4, V]; false for NaN
    except Exception as error:  # a cache that cannot be repeated, for example
        fail(policy.name_or_path, f"no usable forward pass ({error!r})", "a transformer with a KV cache",
             "choose another model")
    if not same:
        fail(policy.name_or_path, "logits that are not the output layer's, or not those with a KV cache",
             "an ordinary transformer", "choose another model")
    return prompts, responses


def make_sketcher(policy, projection):
    """A batched Sketcher where it agrees with plain autograd on two random prompts, otherwise a plain one."""
    prompts, responses = check_forward(policy)
    with torch.no_grad():
        hidden, targets, mask = group_hidden(policy.base_model, prompts, responses)
        logp = token_logprobs(output_logits(policy, hidden, 1.0), targets, mask)
    beta = [row[exists].cpu() for row, exists in zip(logp, mask)]  # so that every ratio is 1
    batch = prompts, responses, beta, torch.tensor([1.0, -1.0, 0.5, 1.0]), 2, 1.0
    truth = sketch_batch(Sketcher(policy, projection, batched=False), *batch)
    sketcher = Sketcher(policy, projection)
    if sketcher.batched:
        try:
            error = (sketch_batch(sketcher, *batch) - truth).norm(dim=1)
        except RuntimeError:  # an in-place operation on the embedding's output, for example
            error = torch.inf
        tolerance = 1e-3 if policy.dtype == torch.float32 else 5e-2
        if (error <= tolerance * truth.norm(dim=1)).all():  # false for NaN
            return sketcher
    sketcher.close()
    if RANK == 0:
        print("sketch.py: this architecture is sketched by plain autograd, one prompt per pass (slower, as "
              "exact)", file=sys.stderr)
    return Sketcher(policy, projection, batched=False)


def load_policy(name, device, dtype):
    """The policy pi_theta in evaluation mode: dropout would make log-probs differ between passes."""
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).to(device).eval()
    except Exception as error:  # transformers raises a dozen types here
        fail(name, f"no loadable model ({error})", "a causal language model", "check the folder or hub name")


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
    def tokens(batch):
        own, longest = (max(column) for column in zip(*(sizes[i] for i in batch)))
        return len(batch) * (own + k * longest)

    plan = []
    for prompt in sorted(sizes, key=lambda i: -tokens([i])):
        if plan and tokens([*plan[-1][0], prompt]) <= budget:
            plan[-1][0].append(prompt)
        else:
            own, longest = sizes[prompt]
            plan.append(([prompt], max(1, min(k, (budget - own) // longest))))
    return plan


def barrier():
    """Waits for the other ranks."""
    if WORLD > 1:
        torch.distributed.barrier()


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


def parts_folder(out, settings):
    """OUT.HASH.parts, with a file per finished batch until the run is done; HASH is of the settings."""
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    return out.with_name(f"{out.name}.{digest[:16]}.parts")


def sketch_prompts(sketcher, rollouts, batch, rows):
    """g~ [b, dim] of the prompts with indices `batch`, in passes over `rows` of the K responses to each."""
    prompts, sketch = [rollouts["prompts"][i] for i in batch], 0
    advantages = group_advantage(rollouts["rewards"][batch])  # [b, K]
    k = advantages.shape[1]
    for first in range(0, k, rows):
        end = min(first + rows, k)
        which = [i * k + j for i in batch for j in range(first, end)]
        responses, beta = ([rollouts[name][r] for r in which] for name in ("responses", "logprobs"))
        sketch = sketch + sketch_batch(sketcher, prompts, responses, beta, advantages[:, first:end].flatten(),
                                       k, rollouts["meta"]["temperature"])
    return sketch


def sketch_file(sketcher, path, out, identity, batch_tokens):
    """Sketches one rollouts.pt into a .npy and its .json. identity: policy and projection, for the .json.

    The files of finished batches are kept, so that a run that is killed at a later rollouts.pt resumes there.
    """
    began, rollouts = time.perf_counter(), load_rollouts(path)
    (n, k), lengths = rollouts["rewards"].shape, rollouts["response_lengths"].view_as(rollouts["rewards"])
    varied = (rollouts["rewards"].std(1) > 0).nonzero()[:, 0].tolist() if k > 1 else []
    if not varied:
        fail(path, f"K = {k} and no prompt with unequal rewards", "K >= 2 and prompts with unequal rewards",
             "collect more responses, or other prompts")
    longest = lengths.amax(1).tolist()
    plan = plan_batches({i: (len(rollouts["prompts"][i]), longest[i]) for i in varied}, k, batch_tokens)
    mine = range(RANK, len(plan), WORLD)  # every rank gets long and short ones: the plan is sorted
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = parts_folder(out, {**identity, "rollouts": digest, "batch_tokens": batch_tokens})
    with replacing(out) if RANK == 0 else nullcontext() as file:
        for number in tqdm(mine, desc=f"sketch {out.name}", unit="batch", disable=RANK > 0):
            batch, rows = plan[number]
            part = folder / f"{number}.npy"
            if not part.exists():
                sketch = sketch_prompts(sketcher, rollouts, batch, rows)
                with replacing(part) as part_file:
                    np.save(part_file, sketch.cpu().numpy())
        barrier()
        if RANK > 0:
            return
        assemble(file, (n, identity["dim"]), plan, folder)
    sidecar = {**identity, "prompts": n, "skipped": n - len(varied),
               "seconds": round(time.perf_counter() - began, 2), "tokens": int(lengths[varied].sum())}
    with replacing(out.with_suffix(".json")) as file:
        file.write(json.dumps(sidecar, indent=1).encode())
    print(f"{out}: {n} prompts, {n - len(varied)} skipped for equal rewards, {sidecar['seconds']} s")


def assemble(file, shape, plan, folder):
    """Writes the finished batches of a plan as one .npy, row by row; rows of skipped prompts stay zero."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    start = file.tell()
    file.truncate(start + shape[0] * shape[1] * 4)
    for number, (batch, _) in enumerate(plan):
        for prompt, row in zip(batch, np.load(folder / f"{number}.npy", allow_pickle=False)):
            file.seek(start + prompt * row.nbytes)
            file.write(row.tobytes())


# ---- the command line ----
def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--model", required=True, help="current policy: a Hugging Face folder or hub name")
    parser.add_argument("--rollouts", required=True, nargs="+", type=Path, help="rollouts.pt files")
    parser.add_argument("--out", required=True, nargs="+", type=Path, help="a .npy for each of --rollouts")
    parser.add_argument("--keep", type=float, default=0.1, help="probability of keeping a coordinate (0.1)")
    parser.add_argument("--dim", type=int, default=32768, help="numbers per sketch (32768)")
    parser.add_argument("--batch-tokens", type=int, default=8192 if torch.cuda.is_available() else 512,
                        help="tokens per micro-batch (8192 on a GPU, 512 elsewhere)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"],
                        help="of the weights (float32); gradients are summed in float32 either way")
    parser.add_argument("--seed", type=int, default=0, help="of the projection (0)")
    args = parser.parse_args()
    if not 0 < args.keep <= 1 or args.dim < 1:
        fail("--keep, --dim", f"{args.keep}, {args.dim}", "0 < keep <= 1, dim >= 1", "the paper: 0.1, 32768")
    if len(args.rollouts) != len(args.out):
        fail("--out", f"{len(args.out)} names", len(args.rollouts), "name one for each of --rollouts")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for path in args.rollouts:
        load_rollouts(path)  # so that bad input is refused before any work
    if WORLD > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        args.device += f":{os.environ['LOCAL_RANK']}" if args.device == "cuda" else ""
    policy = load_policy(args.model, args.device, args.dtype)
    identity = {"format": FORMAT, "policy": fingerprint(policy), "seed": args.seed, "keep": args.keep,
                "dim": args.dim}
    sketcher = make_sketcher(policy, Projection(args.seed, args.keep, args.dim, policy.device))
    for path, out in zip(args.rollouts, args.out):
        sketch_file(sketcher, path, out, identity, args.batch_tokens)
    barrier()
    for out in args.out if RANK == 0 else ():
        for folder in out.parent.glob(f"{out.name}.*.parts"):
            shutil.rmtree(folder)
    if WORLD > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
