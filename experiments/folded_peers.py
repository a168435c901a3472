"""Per-prompt gradients by other libraries, for folded_compare.py; each reads a prompt with each response.

opacus       gradients of all weights, one for each response, summed over a prompt's responses, then projected
             by sketch.py's projection
bergson      its hooks, which project each linear layer's gradient to p x p numbers, summed over a prompt's
             responses; no embeddings, norms and biases. A prompt has at most dim numbers
dattri-llm   the same with its "logra" projection of both factors; embeddings included, no norms

    pip install --no-deps opacus==1.5.4 bergson==2.5.1 dattri-llm==0.1.0 dattri, and the packages they import
"""

from importlib.metadata import PackageNotFoundError, version

import torch

import sketch


def row_logits(policy, prompts, responses):
    """As sketch_cost.row_logits, by a call of the whole policy, which dattri-llm needs."""
    pad = torch.nn.utils.rnn.pad_sequence
    rows = pad([torch.cat([p, r]).long() for p, r in zip(prompts, responses)], batch_first=True)  # [B, T]
    first = min(map(len, prompts)) - 1
    logits = policy(rows, use_cache=False, logits_to_keep=rows.shape[1] - first).logits
    steps = torch.arange(max(map(len, responses)))
    places = torch.tensor([len(p) - 1 - first for p in prompts])[:, None] + steps
    logits = logits[torch.arange(len(rows))[:, None], places.clamp(max=logits.shape[1] - 1)]  # [B, R, V]
    mask = steps < torch.tensor([len(r) for r in responses])[:, None]
    return logits.float(), pad([r.long() for r in responses], batch_first=True), mask


def row_batches(policy, path, batch_tokens):
    """Yields (prompts, surrogate) with at most batch_tokens tokens; rows are prompt-major, equally many."""
    rollouts = sketch.load_rollouts(path)
    prompts, responses, k = rollouts["prompts"], rollouts["responses"], rollouts["meta"]["k"]
    longest = rollouts["response_lengths"].view(-1, k).amax(1).tolist()
    sizes = {i: (0, len(prompt) + longest[i]) for i, prompt in enumerate(prompts)}
    advantages = sketch.group_advantage(rollouts["rewards"]).flatten()
    for batch, at_once in sketch.plan_batches(sizes, k, batch_tokens):
        for first in range(0, k, at_once):
            ks = range(first, min(first + at_once, k))
            rows = [i * k + j for i in batch for j in ks]
            texts = [prompts[i] for i in batch for _ in ks]
            logits, targets, mask = row_logits(policy, texts, [responses[row] for row in rows])
            logp = sketch.token_logprobs(logits / rollouts["meta"]["temperature"], targets, mask)
            beta = torch.cat([rollouts["logprobs"][row] for row in rows])
            beta = torch.zeros_like(logp).masked_scatter_(mask, beta)
            yield batch, sketch.off_policy_surrogate(logp, beta, advantages[rows], mask, k)


def block_size(policy, dim):
    return int((dim / sum(parameter.dim() == 2 for parameter in policy.parameters())) ** 0.5)


def per_prompt(part, prompts):
    """[b, ...] sums over the rows of each of b prompts."""
    return part.view(len(prompts), -1, *part.shape[1:]).sum(1)


def collect(parts, found, prompts):
    """Adds the rows [b, numbers] of a batch to found {prompt: numbers}."""
    for prompt, row in zip(prompts, torch.cat(parts, 1)):
        found[prompt] = found[prompt] + row if prompt in found else row


def opacus(policy, projection, path, batch_tokens):
    from opacus import GradSampleModule

    policy.requires_grad_(True).train()  # it records nothing in evaluation mode; there is no dropout
    wrapped = GradSampleModule(policy, loss_reduction="sum")
    found = {}
    try:
        for prompts, surrogate in row_batches(policy, path, batch_tokens):
            surrogate.backward()
            sums = projection.zeros(len(prompts))
            for name, parameter in policy.named_parameters():
                projection.add(name, per_prompt(parameter.grad_sample, prompts), sums)
                parameter.grad_sample = None
                parameter.grad = None
            collect([projection.sketches(sums)], found, prompts)
    finally:
        wrapped.to_standard_module()
        policy.eval()
    return found


def bergson(policy, projection, path, batch_tokens):
    from bergson.collector.gradient_collectors import GradientCollector
    from bergson.config import IndexConfig
    from bergson.gradients import GradientProcessor

    policy.requires_grad_(False)
    policy.get_input_embeddings().requires_grad_(True)  # so that there is a graph
    processor = GradientProcessor(projection_dim=block_size(policy, projection.dim))
    collector = GradientCollector(model=policy, data=[], cfg=IndexConfig(run_path="unused"), skip_index=True,
                                  processor=processor)
    found = {}
    with collector:
        for prompts, surrogate in row_batches(policy, path, batch_tokens):
            surrogate.backward()
            collect([per_prompt(part, prompts) for part in collector.mod_grads.values()], found, prompts)
            collector.mod_grads.clear()
    return found


def dattri_llm(policy, projection, path, batch_tokens):
    from dattri_llm import HookManager, HookManagerConfig
    from dattri_llm.gradient.callbacks.capture_callback import CaptureCallback

    policy.requires_grad_(False)
    policy.get_input_embeddings().requires_grad_(True)
    blocks = {"proj_dim": block_size(policy, projection.dim), "proj_max_batch_size": 8,
              "proj_type": "rademacher"}
    config = HookManagerConfig(linear_io=[r"proj$", r"embed_tokens$", r"lm_head$"], include_frozen=True,
                               capture_style="materialized", projection_kwargs={"__default__": blocks})
    capture = CaptureCallback()
    found = {}
    manager = HookManager(policy, config=config, callbacks=[capture])
    try:
        with manager.collect():
            for prompts, surrogate in row_batches(policy, path, batch_tokens):
                surrogate.backward()
                parts = capture.record.gradient.materialize().data.values()
                collect([per_prompt(part.flatten(1), prompts) for part in parts], found, prompts)
    finally:
        manager.remove()
    return found


PEERS = {"opacus": opacus, "bergson": bergson, "dattri-llm": dattri_llm}


def versions():
    found = {}
    for name in (*PEERS, "dattri"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
