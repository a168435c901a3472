"""Stage 2 of CROPI: every prompt's off-policy policy gradient at the current policy, sparsely projected.

    rho_{k,t} = pi_theta(x_{k,t} | s_{k,t}) / beta(x_{k,t} | s_{k,t})                                 token ratio
    g(s0)     = 1/K sum_k 1/|tau_k| sum_t grad_theta rho_{k,t} A_k                            off-policy gradient
    A_k       = (R_k - mean R) / (std R + 1e-4)                                                   group advantage
    g~(s0)    = P drop(g(s0))                                                            sparse random projection

from the trajectories that collect.py sampled once from beta = pi_theta(0); no clipping, no KL term. drop keeps each
coordinate of the gradient with probability --keep, drawn once over ALL parameters, the same for every prompt; P sends the
kept ones to --dim numbers, so that dot products of sketches estimate dot products of gradients without bias.

Reads   --model      the current policy theta, a Hugging Face folder or hub name.
        --rollouts   one or more rollouts.pt of collect.py.
Writes  --out        for each a sketch: float32 .npy [N, dim], row i for prompt i; a zero row where all rewards of a prompt
                     are equal (its gradient is zero: it is skipped and counted). Beside it a .json of the same name: what
                     must match before two sketches are compared (policy fingerprint, seed, keep, dim, drop, projection,
                     format) and what was seen (prompts, skipped, tokens, seconds).

One backward pass serves many prompts: the weights are frozen; at each layer the gradient that arrives at the output meets
the layer's input, prompt by prompt (for a Linear, delta^T x), and only the kept coordinates go on into the sketch. Where a
model has a layer unknown to prompt_gradients, or this and plain autograd disagree on a trial, plain autograd makes the
sketches, one prompt a pass, and a line says so.

Finished batches lie in OUT.parts until all are there: a killed run, started again, goes on from them. Under torchrun (on
one file system) the batches are dealt out by cost; the bytes are those of one process, whose batches are the same.

Departs from the authors' release: every parameter is kept from (theirs keeps coordinates of the first one, the embedding,
only), and log-probs are at the sampling temperature.

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
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.pytorch_utils import Conv1D

FORMAT = 1  # of rollouts.pt
KNOWN = (nn.Linear, nn.Embedding, nn.LayerNorm, Conv1D)  # and every RMSNorm: the layers of prompt_gradients
CHUNK = 2**22  # numbers of a layer's gradients that exist at once, unless a single gradient has more
LOGITS = 2**25  # logits that exist at once, unless a single response has more
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's


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


def output_logits(policy, hidden):
    """Logits [B, T, V] of hidden states [B, T, H]: the output layer and, in Gemma 2, its soft cap."""
    logits, cap = policy.get_output_embeddings()(hidden), getattr(policy.config, "final_logit_softcapping", None)
    return cap * (logits / cap).tanh() if cap else logits


def group_hidden(policy, prompts, responses):
    """What predicts each response token, n responses to each of b prompts: hidden states [b * n, R, H], R the longest response.

    prompts: b sequences of token ids; responses: b * n, prompt-major. Also returns the response tokens [b * n, R] and the bool
    mask [b * n, R] of those that exist. A prompt is read once: its n responses share its keys and values, through which their
    gradients meet. Prompts are padded on the left and masked, responses on the right, where a causal model's tokens cannot
    look: padding and batch mates change nothing but the last float digits.
    """
    pad, device, n = nn.utils.rnn.pad_sequence, policy.device, len(responses) // len(prompts)
    tokens = pad([torch.as_tensor(p).long() for p in prompts], batch_first=True, padding_side="left").to(device)  # [b, P]
    lengths = torch.tensor([len(p) for p in prompts], device=device)[:, None]
    places = torch.arange(-tokens.shape[1], 0, device=device) + lengths  # [b, P], negative where there is no token
    cache, seen = DynamicCache(config=policy.config), (places >= 0).long()
    trunk = policy.base_model  # without the output layer, whose logits are made a few rows at a time
    hidden = trunk(tokens, attention_mask=seen, position_ids=places.clamp(min=0), past_key_values=cache)[0]  # [b, P, H]
    hidden = hidden[:, -1:].repeat_interleave(n, 0)  # a prompt's last token predicts the first token of each response

    targets = pad([torch.as_tensor(r).long() for r in responses], batch_first=True).to(device)  # [b * n, R]
    steps = torch.arange(targets.shape[1], device=device)
    mask = steps < torch.tensor([len(r) for r in responses], device=device)[:, None]
    if len(steps) > 1:
        cache.batch_repeat_interleave(n)
        inputs = targets[:, :-1]
        seen = torch.cat([seen.repeat_interleave(n, 0), torch.ones_like(inputs)], 1)
        hidden = torch.cat([hidden, trunk(inputs, attention_mask=seen, past_key_values=cache,
                                          position_ids=lengths.repeat_interleave(n, 0) + steps[:-1])[0]], 1)
    return hidden, targets, mask


def token_logprobs(policy, hidden, targets, mask, temperature):
    """log pi(x_t | s_t) under softmax(logits / temperature) of tokens `targets` [B, R] from hidden states [B, R, H].

    Returns [B, R], 0 where the bool mask [B, R] says that there is no token.
    """
    logits = output_logits(policy, hidden).float() / temperature  # [B, R, V]
    return -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(mask.shape).masked_fill(~mask, 0)


def token_ratio(logp, logp_beta):
    """rho_{k,t} = pi_theta(x_{k,t} | s_{k,t}) / beta(x_{k,t} | s_{k,t}), from log-probs of any one shape."""
    return (logp - logp_beta).exp()


def off_policy_surrogate(logp, logp_beta, advantages, mask, k):
    """The scalar whose gradient is g: sum over rows of 1/K 1/|tau_k| sum_t rho_{k,t} A_k.

    logp, logp_beta: [B, T], one trajectory a row, of any prompts. advantages: [B]. mask: bool [B, T]. k: K, also where
    only some of a prompt's K trajectories are in the batch. Returns [].
    """
    per_token = token_ratio(logp, logp_beta) * advantages[:, None]  # [B, T]
    return ((per_token * mask).sum(1) / mask.sum(1)).sum() / k


def kept_coordinates(numel, keep, generator):
    """drop: each of `numel` coordinates is kept with probability `keep`, independently. Returns int64 [about keep * numel].

    Only kept ones are drawn: the gaps between them are geometric.
    """
    if keep == 1:
        return torch.arange(numel)
    draws = int(numel * keep + 10 * (numel * keep) ** 0.5 + 10)  # ten standard deviations above the mean
    gaps = torch.empty(draws, dtype=torch.float64).geometric_(keep, generator=generator)
    kept = gaps.cumsum(0).long() - 1
    return kept[kept < numel]


class Projection:
    """P drop(.), a linear map from all parameters to `dim` numbers, drawn from (seed, parameter name) on the CPU.

    drop: 'coordinates' keeps each with probability `keep`; 'rows' draws over whole rows (of the first dimension) of each
    parameter, so that the others' gradients need not be computed. kind: 'sjlt' sends a kept coordinate to one random place
    of the sketch with a random sign (sparse Johnson-Lindenstrauss, one non-zero a column; Kane and Nelson 2014);
    'rademacher' to all places with random signs / sqrt(dim), made block by block and never whole; for comparison, dim times
    the work. Both are scaled by 1 / sqrt(keep), so that E[P drop(x) . P drop(y)] = x . y, of variance (for coordinates)
    (1/keep - 1) S + (|x|^2 |y|^2 + (x . y)^2 - 2 S) / dim, S = sum x_j^2 y_j^2.
    """

    def __init__(self, seed, keep, dim, kind, drop, device):
        self.seed, self.keep, self.dim, self.kind, self.drop, self.device = seed, keep, dim, kind, drop, device
        self.drawn = {}  # parameter name -> kept rows, kept coordinates of these, places of the kept ones

    def generator(self, *key):
        digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))

    def draw(self, name, shape):
        """(rows, kept, places) of a parameter; a slice where all are kept. int32: 8 bytes a kept coordinate."""
        if name not in self.drawn:
            generator, everything = self.generator(name), slice(None)
            numel = shape.numel()
            if self.drop == "rows":
                rows, kept = kept_coordinates(shape[0], self.keep, generator), everything
                count = len(rows) * numel // shape[0]
            else:
                rows, kept = everything, kept_coordinates(numel, self.keep, generator)
                count = len(kept)
            places = torch.randint(2 * self.dim, (count,), generator=generator)  # the upper half is subtracted
            dtype = torch.int32 if numel < 2**31 else torch.int64
            self.drawn[name] = [x if x is everything else x.to(self.device, dtype) for x in (rows, kept, places)]
        return self.drawn[name]

    def zeros(self, b):
        """Sums for `add` to add to: [b, 2 dim], what has sign +, then what has sign -."""
        return torch.zeros(b, 2 * self.dim, device=self.device)

    def add(self, name, shape, gradients, sums):
        """sums [b, 2 dim] += a parameter's part, from float32 gradients [b, kept rows, ...] of the parameter's `shape`."""
        _, kept, places = self.draw(name, shape)
        gradients = gradients.flatten(1)
        if not isinstance(kept, slice):
            gradients = gradients.index_select(1, kept)  # [b, kept]
        if self.kind == "sjlt":
            sums.scatter_add_(1, places.expand(len(gradients), -1), gradients)
            return
        for number, block in enumerate(gradients.split(512, dim=1)):
            signs = torch.randint(2, (block.shape[1], self.dim), generator=self.generator(name, number), dtype=torch.int8)
            sums[:, :self.dim].addmm_(block, (signs * 2 - 1).to(block), alpha=self.dim**-0.5)

    def sketches(self, sums):
        """g~ [b, dim] of the sums over all parameters."""
        return (sums[:, :self.dim] - sums[:, self.dim:]) / self.keep**0.5


def product(a, b):
    """a @ b [b, m, n] in float32. A GPU takes bfloat16 factors as they are: its products and sums of them are float32."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def prompt_gradients(module, x, delta, rows):
    """Gradients of a layer's parameters for each of b prompts: yields (parameter, float32 [b, kept rows, ...]).

    x: the layer's input (of an RMSNorm its output), delta: the gradient at its output, [b, tokens of a prompt's
    trajectories, ...]. rows: parameter -> which rows of its first dimension are wanted.
    """
    wanted, b = rows(module.weight), len(delta)
    if isinstance(module, nn.Embedding):
        places = x[..., 0] + module.num_embeddings * torch.arange(b, device=x.device)[:, None]
        weight = torch.zeros(b * module.num_embeddings, delta.shape[-1], device=x.device)
        weight = weight.index_add_(0, places.flatten(), delta.flatten(0, 1).float()).view(b, -1, delta.shape[-1])
        if module.padding_idx is not None:
            weight[:, module.padding_idx] = 0  # as in autograd: looking the padding id up has no gradient
    elif isinstance(module, nn.Linear):
        weight, wanted = product(delta[..., wanted].mT, x), slice(None)
    elif isinstance(module, Conv1D):
        weight, wanted = product(x[..., wanted].mT, delta), slice(None)
    elif isinstance(module, nn.LayerNorm):
        weight = (delta.float() * F.layer_norm(x.float(), module.normalized_shape, eps=module.eps)).sum(1)
    else:  # RMSNorm: its output over its weight is the slope
        weight = (delta.float() * x).sum(1) / module.weight.float()
    yield module.weight, weight[:, wanted]
    if getattr(module, "bias", None) is not None:
        yield module.bias, delta.float().sum(1)[:, rows(module.bias)]


class Sketcher:
    """g~ of batches of prompts at one policy; `fast` says whether one backward pass serves many prompts."""

    def __init__(self, policy, projection, fast=True):
        self.policy, self.projection, self.head = policy, projection, policy.get_output_embeddings()
        self.names = {parameter: name for name, parameter in policy.named_parameters()}
        modules = [m for m in policy.modules() if next(m.parameters(recurse=False), None) is not None]
        known = all(type(m) in KNOWN or type(m).__name__.endswith("RMSNorm") for m in modules)  # no subclass
        self.fast = fast and known
        policy.requires_grad_(not self.fast)
        policy.zero_grad()  # plain autograd reads .grad
        self.hooks = [module.register_forward_hook(self.watch) for module in modules if self.fast]

    def watch(self, module, inputs, output):
        x = inputs[0].detach() if isinstance(module, KNOWN) else output.detach()
        if module is self.head:
            if output.requires_grad:
                output.register_hook(lambda delta: self.meet(module, [(x, delta)], self.chunk))
            return
        if not output.requires_grad:  # an embedding's: the graph starts here, since the weights are frozen
            output.requires_grad_()
        calls = self.calls.setdefault(module, [])
        calls.append(None)  # one for the prompts, one for the responses
        output.register_hook(lambda delta, call=len(calls) - 1: self.arrive(module, calls, call, x, delta))

    def arrive(self, module, calls, call, x, delta):
        calls[call] = x, delta
        if None not in calls:
            self.meet(module, calls, self.sums)
            calls.clear()

    @torch.no_grad()
    def meet(self, module, calls, sums):
        """Adds a layer's part to sums [b, 2 dim] from calls [(inputs, gradients at the outputs)], each of all b prompts."""
        step, b = max(1, CHUNK // module.weight.numel()), len(sums)  # prompts at a time: as many as CHUNK allows, or one
        x, delta = (torch.cat([part.reshape(b, -1, part.shape[-1] if part.is_floating_point() else 1) for part in parts], 1)
                    .split(step) for parts in zip(*calls))  # [b, tokens of a prompt's rows, in or out]
        for part, some in enumerate(sums.split(step)):
            for parameter, gradients in prompt_gradients(module, x[part], delta[part], self.wanted):
                self.projection.add(self.names[parameter], parameter.shape, gradients, some)

    def wanted(self, parameter):
        return self.projection.draw(self.names[parameter], parameter.shape)[0]

    def __call__(self, prompts, responses, logp_beta, advantages, k, temperature):
        """prompts: b sequences of token ids; responses (b * n sequences), logp_beta (b * n tensors [|tau|]) and
        advantages [b * n], prompt-major: n of each prompt's K trajectories. Returns their part of g~, [b, dim]."""
        self.sums, self.calls, n = self.projection.zeros(len(prompts)), {}, len(responses) // len(prompts)
        hidden, targets, mask = group_hidden(self.policy, prompts, responses)
        beta = torch.zeros(mask.shape, device=mask.device).masked_scatter_(mask, torch.cat(logp_beta).float().to(mask.device))
        leaf, advantages = hidden.detach().requires_grad_(), advantages.to(mask.device)
        vocabulary = self.policy.config.get_text_config().vocab_size
        rows = max(1, LOGITS // (mask.shape[1] * vocabulary))  # whose logits exist at once
        block = max(n, rows // n * n)  # of whole prompts, or parts of a single one
        for start in range(0, len(responses), block):
            self.chunk = self.sums[start // n:(start + block) // n]
            for some in torch.arange(start, min(start + block, len(responses)), device=mask.device).split(rows):
                logp = token_logprobs(self.policy, leaf[some], targets[some], mask[some], temperature)
                off_policy_surrogate(logp, beta[some], advantages[some], mask[some], k).backward()
        hidden.backward(leaf.grad)  # in fast mode the hooks have filled self.sums after this
        if not self.fast:
            for parameter, name in self.names.items():
                if parameter.grad is not None:
                    kept = parameter.grad[self.wanted(parameter)].float()
                    self.projection.add(name, parameter.shape, kept[None], self.sums)
                    parameter.grad = None
        return self.projection.sketches(self.sums)

    def close(self):
        for hook in self.hooks:
            hook.remove()


def make_sketcher(policy, projection):
    """The fast sketcher where plain autograd confirms it on two prompts with two trajectories each, the plain one elsewhere."""
    rng = torch.Generator().manual_seed(0)
    made_up = [torch.randint(policy.get_input_embeddings().num_embeddings, (n,), generator=rng) for n in (3, 5, 4, 6, 2, 5)]
    prompts, responses, advantages = made_up[:2], made_up[2:], torch.tensor([1.0, -1.0, 0.5, 1.0])
    with torch.no_grad():
        hidden, targets, mask = group_hidden(policy, prompts, responses)
        own = policy(prompts[0][None].to(policy.device)).logits[0, -1]
        if not torch.allclose(output_logits(policy, hidden)[0, 0], own, rtol=1e-2, atol=1e-2 * float(own.abs().max())):
            fail(policy.name_or_path, "logits that are scaled after the output layer", "a model without that", "choose another")
        logp = token_logprobs(policy, hidden, targets, mask, 1.0)
    beta = [row[here].cpu() for row, here in zip(logp, mask)]  # so that every ratio is 1
    plain = Sketcher(policy, projection, fast=False)
    truth = torch.cat([plain(prompts[i:i + 1], *(x[2 * i:2 * i + 2] for x in (responses, beta, advantages)), 2, 1.0)
                       for i in (0, 1)])
    fast, tolerance = Sketcher(policy, projection), 1e-3 if policy.dtype == torch.float32 else 5e-2
    if fast.fast:
        error = (fast(prompts, responses, beta, advantages, 2, 1.0) - truth).norm(dim=1)
        if (error <= tolerance * truth.norm(dim=1)).all():  # never where an error is NaN
            return fast
    fast.close()
    if RANK == 0:
        print("sketch.py: this architecture is sketched by plain autograd, one prompt a pass (slower, exact)", file=sys.stderr)
    return Sketcher(policy, projection, fast=False)


def plan_batches(sizes, k, budget, many):
    """[(prompts, rows, tokens)]: micro-batches of at most `budget` tokens, longest prompts first; tokens: what all of it costs.

    sizes: {prompt: (its tokens, tokens of its longest response)}. A batch holds all k responses to several prompts (rows = k);
    a prompt that is over the budget by itself, or any prompt unless `many`, stands alone with `rows` responses at a time.
    """
    def tokens(batch, rows):
        own, longest = (max(column) for column in zip(*(sizes[i] for i in batch)))
        return len(batch) * (own + rows * longest)  # with padding

    plan = []
    for prompt in sorted(sizes, key=lambda i: -tokens([i], k)):
        own, longest = sizes[prompt]
        rows = max(1, min(k, (budget - own) // longest))
        if many and plan and rows == plan[-1][1] == k and tokens([*plan[-1][0], prompt], k) <= budget:
            plan[-1][0].append(prompt)
        else:
            plan.append(([prompt], rows))
    return [(batch, rows, tokens(batch, k)) for batch, rows in plan]


def deal(costs, processes):
    """Which process does what: the costliest first, each to the least loaded. Returns a list of indices for each process."""
    shares, loads = [[] for _ in range(processes)], [0] * processes
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += costs[i]
    return shares


def barrier():
    """Waits for torchrun's other processes."""
    if WORLD > 1:
        torch.distributed.barrier()


@contextmanager
def replacing(path):
    """A file to write under a temporary name, renamed to `path` at the end: a killed run leaves no half of a file.

    Opened before the work is done, so that an output that cannot be written is refused at once.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path if path.is_dir() else part, "wb")  # a folder raises
    except OSError as error:
        fail(path, f"a path that cannot be written ({error})", "a writable place", "choose another --out")
    with file:
        yield file
    os.replace(part, path)


def parts_of(out):
    """The folder OUT.parts, where every finished batch leaves a file until the whole run is done."""
    return out.with_name(out.name + ".parts")


def unfinished(out, settings):
    """parts_of(out), emptied if it was made with other settings."""
    folder, text = parts_of(out), json.dumps(settings)
    note = folder / "settings.json"
    if RANK == 0 and not (note.exists() and note.read_text() == text):
        shutil.rmtree(folder, ignore_errors=True)
        with replacing(note) as file:
            file.write(text.encode())
    barrier()
    return folder


def assemble(file, shape, plan, folder):
    """The parts of a plan as one .npy, row by row; the other rows are zero."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    start = file.tell()
    file.truncate(start + shape[0] * shape[1] * 4)
    for number, (batch, *_) in enumerate(plan):
        for prompt, row in zip(batch, np.load(folder / f"{number}.npy", allow_pickle=False)):
            file.seek(start + prompt * row.nbytes)
            file.write(row.tobytes())


def load_policy(name, device, dtype):
    """The policy pi_theta in evaluation mode: dropout would make log-probs differ from one pass to the next."""
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).to(device).eval()
    except Exception as error:  # transformers raises a dozen types here
        fail(name, f"no loadable model ({error})", "a Hugging Face causal language model", "check the folder or hub name")


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


def fingerprint(policy):
    """sha256 of the parameters' names and bytes: says whether two files come of the same policy."""
    digest = hashlib.sha256()
    for name, parameter in sorted(policy.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def sketch_file(sketcher, path, out, identity, batch_tokens):
    """One rollouts.pt to one sketch and its sidecar. identity: what the sidecar says of policy and projection. Its parts stay:
    a run that is killed later on does not sketch again."""
    began, rollouts = time.perf_counter(), load_rollouts(path)
    prompts, responses, rewards = rollouts["prompts"], rollouts["responses"], rollouts["rewards"]
    n, k = rewards.shape
    live = (rewards.std(1) > 0).nonzero()[:, 0].tolist() if k > 1 else []
    if not live:
        fail(path, f"K = {k} and no prompt with unequal rewards", "K >= 2 with right and wrong responses to some prompt",
             "collect more responses, or other prompts")
    advantages = group_advantage(rewards).flatten()  # [N * K]
    longest = rollouts["response_offsets"].diff().view(n, k).amax(1).tolist()
    plan = plan_batches({i: (len(prompts[i]), longest[i]) for i in live}, k, batch_tokens, sketcher.fast)
    mine = deal([tokens for *_, tokens in plan], WORLD)[RANK]  # of one plan for all processes

    def sketch_rows(batch, first, end):
        rows = [i * k + j for i in batch for j in range(first, end)]
        return sketcher([prompts[i] for i in batch], [responses[r] for r in rows], [rollouts["logprobs"][r] for r in rows],
                        advantages[rows], k, rollouts["meta"]["temperature"])

    with open(path, "rb") as file:
        settings = {**identity, "rollouts": hashlib.file_digest(file, "sha256").hexdigest(), "batch_tokens": batch_tokens}

    with replacing(out) if RANK == 0 else nullcontext() as file:
        folder = unfinished(out, settings)
        for number in tqdm(mine, desc=f"sketch {out.name}", unit="batch", disable=RANK > 0):
            batch, rows, _ = plan[number]
            part = folder / f"{number}.npy"
            if not part.exists():
                found = sum(sketch_rows(batch, first, min(first + rows, k)) for first in range(0, k, rows))
                with replacing(part) as part_file:
                    np.save(part_file, found.cpu().numpy())
        barrier()
        if RANK == 0:
            assemble(file, (n, identity["dim"]), plan, folder)
    if RANK > 0:
        return
    sidecar = {**identity, "prompts": n, "skipped": n - len(live), "seconds": round(time.perf_counter() - began, 2),
               "tokens": sum(len(responses[i * k + j]) for i in live for j in range(k))}
    with replacing(out.with_suffix(".json")) as file:
        file.write(json.dumps(sidecar, indent=1).encode())
    print(f"{out}: {n} prompts, {n - len(live)} skipped for equal rewards, {sidecar['seconds']} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="current policy: a Hugging Face folder or hub name")
    parser.add_argument("--rollouts", required=True, nargs="+", type=Path, help="rollouts.pt files")
    parser.add_argument("--out", required=True, nargs="+", type=Path, help="a sketch .npy for each of --rollouts")
    parser.add_argument("--keep", type=float, default=0.1, help="probability of keeping a coordinate (0.1)")
    parser.add_argument("--dim", type=int, default=32768, help="numbers a sketch (32768)")
    parser.add_argument("--drop", choices=["coordinates", "rows"], default="coordinates", help="what is drawn: coordinates, or "
                        "whole rows of each weight: less arithmetic, noisier sketches (coordinates)")
    parser.add_argument("--projection", choices=["sjlt", "rademacher"], default="sjlt", help="kind of P (sjlt)")
    parser.add_argument("--batch-tokens", type=int, default=8192 if torch.cuda.is_available() else 512,
                        help="tokens of a micro-batch (8192 on a GPU, 512 elsewhere)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights (float32); "
                        "gradients are summed and projected in float32 either way")
    parser.add_argument("--seed", type=int, default=0, help="of the projection (0)")
    args = parser.parse_args()
    if not 0 < args.keep <= 1 or args.dim < 1 or len(args.rollouts) != len(args.out):
        parser.error("--keep must be in (0, 1], --dim >= 1, and --out must name one file for each of --rollouts")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for path in args.rollouts:
        load_rollouts(path)  # what is wrong is said before the work
    if WORLD > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        args.device += f":{os.environ['LOCAL_RANK']}" if args.device == "cuda" else ""
    policy = load_policy(args.model, args.device, args.dtype)
    identity = {"format": FORMAT, "policy": fingerprint(policy), "seed": args.seed, "keep": args.keep, "dim": args.dim,
                "drop": args.drop, "projection": args.projection}
    sketcher = make_sketcher(policy, Projection(args.seed, args.keep, args.dim, args.projection, args.drop, policy.device))
    for path, out in zip(args.rollouts, args.out):
        sketch_file(sketcher, path, out, identity, args.batch_tokens)
    barrier()
    for out in args.out if RANK == 0 else ():
        shutil.rmtree(parts_of(out))
    if WORLD > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
