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
                     must match before two sketches are compared (policy fingerprint, seed, keep, dim, projection, format)
                     and what was seen (prompts, skipped, tokens, seconds).

One backward pass serves many prompts: the weights are frozen; at each layer the gradient that arrives at the output meets
the layer's input, prompt by prompt (for a Linear, delta^T x), and only the kept coordinates go on into the sketch. Where a
model has a layer unknown to prompt_gradients, or this and plain autograd disagree on two prompts, plain autograd makes
the sketches, one prompt a pass, and a line says so.

Departs from the authors' release: every parameter is kept from (theirs keeps coordinates of the first one, the embedding,
only), and log-probs are at the sampling temperature.

    python sketch.py --model runs/toy-world/base --rollouts train.pt val_sort.pt --out train.npy val_sort.npy
"""

import argparse
import hashlib
import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.func import functional_call
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

FORMAT = 1  # of rollouts.pt
KNOWN = (nn.Linear, nn.Embedding, nn.LayerNorm, Conv1D)  # and every RMSNorm: the layers of prompt_gradients
CHUNK = 2**22  # numbers of a layer's gradients that exist at once, unless a single gradient has more


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


def response_logprobs(policy, prompts, responses, temperature):
    """log pi(x_t | s_t) of each response token under softmax(logits / temperature).

    prompts, responses: B sequences of token ids. Returns logp [B, R] (0 where there is no token) and its bool mask [B, R],
    R the longest response. Rows are padded on the right, where a causal model's tokens cannot look: padding and batch
    mates change nothing but the last float digits.
    """
    rows = [torch.cat([torch.as_tensor(p), torch.as_tensor(r)]).long() for p, r in zip(prompts, responses)]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(policy.device)  # [B, T]
    first = min(map(len, prompts)) - 1  # no response token is predicted from before here
    logits = policy(tokens, use_cache=False, logits_to_keep=tokens.shape[1] - first).logits[:, :-1]  # [B, T - 1 - first, V]
    targets = tokens[:, first + 1:]
    logp = -F.cross_entropy(logits.float().div(temperature).flatten(0, 1), targets.flatten(), reduction="none")
    lengths = torch.tensor([len(r) for r in responses], device=policy.device)
    steps = torch.arange(int(lengths.max()), device=policy.device)  # [R]
    mask = steps < lengths[:, None]
    starts = torch.tensor([len(p) for p in prompts], device=policy.device) - 1 - first
    places = (starts[:, None] + steps).clamp(max=targets.shape[1] - 1)
    return logp.view(targets.shape).gather(1, places).masked_fill(~mask, 0), mask


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

    sjlt: a kept coordinate goes to one random place of the sketch with a random sign (sparse Johnson-Lindenstrauss, one
    non-zero a column; Kane and Nelson 2014). rademacher: to all places with random signs / sqrt(dim), made block by block
    and never whole; for comparison, dim times the work. Both are scaled by 1 / sqrt(keep), so that
    E[P drop(x) . P drop(y)] = x . y, with variance (1/keep - 1) S + (|x|^2 |y|^2 + (x . y)^2 - 2 S) / dim, S = sum x_j^2 y_j^2.
    """

    def __init__(self, seed, keep, dim, kind, device):
        self.seed, self.keep, self.dim, self.kind, self.device = seed, keep, dim, kind, device
        self.drawn = {}  # parameter name -> (kept coordinates, their places, their signs)

    def generator(self, *key):
        digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))

    def draw(self, name, numel):
        if name not in self.drawn:
            generator = self.generator(name)
            kept = kept_coordinates(numel, self.keep, generator)
            places = torch.randint(self.dim, kept.shape, generator=generator)
            signs = (torch.randint(2, kept.shape, generator=generator) * 2.0 - 1) / self.keep**0.5
            self.drawn[name] = [x.to(self.device) for x in (kept, places, signs)]
        return self.drawn[name]

    def add(self, name, gradients, sketches):
        """sketches [B, dim] += P drop(gradients [B, *shape of the parameter]), float32."""
        kept, places, signs = self.draw(name, gradients[0].numel())
        gradients = gradients.flatten(1).index_select(1, kept)  # [B, kept]
        if self.kind == "sjlt":
            sketches.scatter_add_(1, places.expand(len(gradients), -1), gradients * signs)
            return
        for number, block in enumerate(gradients.split(512, dim=1)):
            signs = torch.randint(2, (block.shape[1], self.dim), generator=self.generator(name, number), dtype=torch.int8)
            sketches.addmm_(block, (signs * 2 - 1).to(block), alpha=(self.dim * self.keep) ** -0.5)


def prompt_gradients(module, x, delta, b):
    """Gradients of a layer's parameters for each of b prompts: yields (parameter, float32 [b, *its shape]).

    x: the layer's input, delta: the gradient at its output, [b * rows, T, ...], the rows of a prompt side by side.
    """
    delta = delta.reshape(b, -1, delta.shape[-1]).float()  # [b, rows * T, out]
    if isinstance(module, nn.Embedding):
        places = x.reshape(b, -1) + module.num_embeddings * torch.arange(b, device=x.device)[:, None]
        weight = delta.new_zeros(b * module.num_embeddings, delta.shape[-1])
        weight = weight.index_add_(0, places.flatten(), delta.flatten(0, 1)).view(b, -1, delta.shape[-1])
        if module.padding_idx is not None:
            weight[:, module.padding_idx] = 0  # as in autograd: looking the padding id up has no gradient
    elif isinstance(module, (nn.Linear, Conv1D)):
        x = x.reshape(b, -1, x.shape[-1]).float()  # [b, rows * T, in]
        weight = delta.mT @ x if isinstance(module, nn.Linear) else x.mT @ delta
    else:  # a norm is linear in its weight, coordinate by coordinate: its slope is its value at 1 less its value at 0
        one, zero = (functional_call(module, {"weight": torch.full_like(module.weight, c)}, x) for c in (1, 0))
        weight = (delta * (one - zero).reshape(delta.shape)).sum(1)
    yield module.weight, weight
    if getattr(module, "bias", None) is not None:
        yield module.bias, delta.sum(1)


class Sketcher:
    """g~ of batches of prompts at one policy; `fast` says whether one backward pass serves many prompts."""

    def __init__(self, policy, projection, fast=True):
        self.policy, self.projection = policy, projection
        self.names = {parameter: name for name, parameter in policy.named_parameters()}
        modules = [m for m in policy.modules() if next(m.parameters(recurse=False), None) is not None]
        known = all(type(m) in KNOWN or type(m).__name__.endswith("RMSNorm") for m in modules)  # no subclass
        self.fast = fast and known
        policy.requires_grad_(not self.fast)
        self.hooks = [module.register_forward_hook(self.watch) for module in modules if self.fast]

    def watch(self, module, inputs, output):
        x = inputs[0].detach()
        if not output.requires_grad:  # an embedding's: the graph starts here, since the weights are frozen
            output.requires_grad_()
            if len(x) == 1:  # of positions, shared by the rows
                x, output = x.expand(self.rows, *x.shape[1:]), output.expand(self.rows, *output.shape[1:])
        output.register_hook(lambda delta: self.meet(module, x, delta))
        return output

    @torch.no_grad()
    def meet(self, module, x, delta):
        step = max(1, CHUNK // module.weight.numel())  # prompts at a time: as many as CHUNK allows, or one
        rows = step * self.rows // len(self.sketches)
        for sketches, x, delta in zip(self.sketches.split(step), x.split(rows), delta.split(rows)):
            for parameter, gradients in prompt_gradients(module, x, delta, len(sketches)):
                self.projection.add(self.names[parameter], gradients, sketches)

    def __call__(self, prompts, responses, logp_beta, advantages, k, temperature):
        """prompts: b sequences of token ids; responses (b * rows sequences), logp_beta (b * rows tensors [|tau|]) and
        advantages [b * rows], prompt-major: `rows` of each prompt's K trajectories. Returns their part of g~, [b, dim]."""
        self.sketches = torch.zeros(len(prompts), self.projection.dim, device=self.policy.device)
        self.rows = len(responses)
        prompts = [p for p in prompts for _ in range(self.rows // len(prompts))]
        logp, mask = response_logprobs(self.policy, prompts, responses, temperature)
        beta = torch.zeros_like(logp).masked_scatter_(mask, torch.cat(logp_beta).to(logp))
        surrogate = off_policy_surrogate(logp, beta, advantages.to(logp), mask, k)
        if self.fast:
            surrogate.backward()  # the hooks fill self.sketches
        else:
            gradients = torch.autograd.grad(surrogate, list(self.names), materialize_grads=True)
            for name, gradient in zip(self.names.values(), gradients):
                self.projection.add(name, gradient[None].float(), self.sketches)
        return self.sketches

    def close(self):
        for hook in self.hooks:
            hook.remove()


def make_sketcher(policy, projection, arguments, prompts):
    """The fast sketcher where plain autograd confirms it on two trajectories of each of `prompts`, the plain one elsewhere."""
    plain, tolerance = Sketcher(policy, projection, fast=False), 1e-3 if policy.dtype == torch.float32 else 5e-2
    truth = torch.cat([plain(*arguments([prompt], 0, 2)) for prompt in prompts])
    fast = Sketcher(policy, projection)
    if fast.fast and ((fast(*arguments(prompts, 0, 2)) - truth).norm(dim=1) <= tolerance * truth.norm(dim=1)).all():
        return fast
    fast.close()
    print("sketch.py: this architecture is sketched by plain autograd, one prompt a pass (slower, exact)", file=sys.stderr)
    return Sketcher(policy, projection, fast=False)


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


def load_policy(name, device, dtype):
    """The policy pi_theta in evaluation mode: dropout would make log-probs differ from one pass to the next."""
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).to(device).eval()
    except Exception as error:  # transformers raises a dozen types here
        fail(name, f"no loadable model ({error})", "a Hugging Face causal language model", "check the folder or hub name")


def load_rollouts(path):
    """rollouts.pt of collect.py, its ragged arrays also as 1-D tensors: prompts [N], responses and logprobs [N*K]."""
    try:
        rollouts = torch.load(path, weights_only=True)  # refuses a pickle that would run code
        for name, array, offsets in (("prompts", "prompt_tokens", "prompt_offsets"),
                                     ("responses", "response_tokens", "response_offsets"),
                                     ("logprobs", "logprobs", "response_offsets")):
            rollouts[name] = rollouts[array].split(rollouts[offsets].diff().tolist())  # raises where the sum differs
        n, k = rollouts["rewards"].shape
        found = [rollouts["meta"]["format"], *(len(rollouts[name]) for name in ("prompts", "responses", "answers"))]
        if found != [FORMAT, n, n * k, n]:
            raise ValueError(f"format, prompts, responses, answers = {found}")
    except Exception as error:  # a damaged file can raise anything
        fail(path, f"no readable rollouts ({type(error).__name__}: {error})", f"a rollouts.pt of format {FORMAT}",
             "make it with collect.py")
    return rollouts


def fingerprint(policy):
    """sha256 of the parameters' names and bytes: two sketches may be compared only at the same policy."""
    digest = hashlib.sha256()
    for name, parameter in sorted(policy.named_parameters()):
        digest.update(name.encode() + parameter.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def plan_batches(lengths, k, budget, many):
    """[(prompts, first trajectory, end)]: micro-batches of at most `budget` tokens, longest first.

    lengths: {prompt: tokens of its longest row}. A batch holds all k rows of several prompts; a prompt whose k rows are over
    the budget, or any prompt unless `many`, has batches of its own.
    """
    plan, batch = [], []
    for prompt in sorted(lengths, key=lambda i: -lengths[i]):
        rows = max(1, min(k, budget // lengths[prompt]))
        if rows < k or not many:
            plan += [([prompt], first, min(first + rows, k)) for first in range(0, k, rows)]
        elif batch and (len(batch) + 1) * k * lengths[batch[0]] <= budget:
            batch.append(prompt)
        else:
            batch = [prompt]
            plan.append((batch, 0, k))
    return plan


def sketch_file(policy, projection, policy_id, path, out, args):
    """One rollouts.pt to one sketch and its sidecar."""
    began, rollouts = time.perf_counter(), load_rollouts(path)
    prompts, responses, rewards = rollouts["prompts"], rollouts["responses"], rollouts["rewards"]
    n, k = rewards.shape
    live = (rewards.std(1) > 0).nonzero()[:, 0].tolist() if k > 1 else []
    if not live:
        fail(path, f"K = {k} and no prompt with unequal rewards", "K >= 2 with right and wrong responses to some prompt",
             "collect more responses, or other prompts")
    advantages = group_advantage(rewards)  # [N, K]
    lengths = {i: len(prompts[i]) + max(map(len, responses[i * k:(i + 1) * k])) for i in live}

    def arguments(batch, first, end):  # of a Sketcher
        rows = [i * k + j for i in batch for j in range(first, end)]
        return ([prompts[i] for i in batch], [responses[r] for r in rows], [rollouts["logprobs"][r] for r in rows],
                advantages[batch, first:end].flatten(), k, rollouts["meta"]["temperature"])

    with replacing(out) as file:
        sketcher = make_sketcher(policy, projection, arguments, sorted(live, key=lengths.get)[:2])
        sketches = np.lib.format.open_memmap(file.name, mode="w+", dtype=np.float32, shape=(n, args.dim))  # zeros
        with tqdm(total=len(live), desc=f"sketch {out.name}", unit="prompt") as progress:
            for batch, first, end in plan_batches(lengths, k, args.batch_tokens, sketcher.fast):
                sketches[batch] += sketcher(*arguments(batch, first, end)).cpu().numpy()
                progress.update(len(batch) * (end == k))
        sketcher.close()
        sketches.flush()
    sidecar = {"format": FORMAT, "policy": policy_id, "seed": args.seed, "keep": args.keep, "dim": args.dim,
               "projection": args.projection, "prompts": n, "skipped": n - len(live),
               "tokens": sum(len(responses[i * k + j]) for i in live for j in range(k)),
               "seconds": round(time.perf_counter() - began, 2)}
    with replacing(out.with_suffix(".json")) as file:
        file.write(json.dumps(sidecar, indent=1).encode())
    print(f"{out}: {n} prompts, {n - len(live)} skipped for equal rewards, {sidecar['seconds']} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="current policy: a Hugging Face folder or hub name")
    parser.add_argument("--rollouts", required=True, nargs="+", help="rollouts.pt files")
    parser.add_argument("--out", required=True, nargs="+", type=Path, help="a sketch .npy for each of --rollouts")
    parser.add_argument("--keep", type=float, default=0.1, help="probability of keeping a coordinate (0.1)")
    parser.add_argument("--dim", type=int, default=32768, help="numbers a sketch (32768)")
    parser.add_argument("--projection", choices=["sjlt", "rademacher"], default="sjlt", help="kind of P (sjlt)")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens of a micro-batch (8192)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights (float32)")
    parser.add_argument("--seed", type=int, default=0, help="of the projection (0)")
    args = parser.parse_args()
    if not 0 < args.keep <= 1 or args.dim < 1 or len(args.rollouts) != len(args.out):
        parser.error("--keep must be in (0, 1], --dim >= 1, and --out must name one file for each of --rollouts")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for path in args.rollouts:
        load_rollouts(path)  # what is wrong is said before the work
    policy = load_policy(args.model, args.device, args.dtype)
    projection = Projection(args.seed, args.keep, args.dim, args.projection, policy.device)
    policy_id = fingerprint(policy)
    for path, out in zip(args.rollouts, args.out):
        sketch_file(policy, projection, policy_id, path, out, args)


if __name__ == "__main__":
    main()
