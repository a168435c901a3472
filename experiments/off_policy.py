"""Claim 2, off-policy fidelity: how close do off-policy gradients stay to on-policy ones over the phases?

At the base policy and after each phase of a CROPI run (experiments/acceleration.sh), for 400 train prompts of
the toy (every sixth), three estimates of a prompt's gradient are compared:

old                  eq. g(s0) from the first K of 32 responses that the BASE policy sampled once, with the
                     token ratio
old_without_ratio    the same with rho = 1 (and the gradient of log pi)
fresh                the on-policy gradient from K of 32 FRESH responses of the current policy

The reference of all three is the gradient from 64 further fresh responses. "fresh" shows the sampling noise
at K responses, which bounds what "old" can reach; the gap between the two is the error of reusing old
responses. "split" compares the two halves of the reference. Gradients are sketched with keep = 1 and dim
32768 (standard error of a cosine: about 0.006).

cosine       mean over the prompts that have both gradients, and the share of those prompts above 0.6
overlap      of the top 10% (40 of 400) by cosine with the validation mean, averaged over the two validation
             sets. The validation mean of "old" is from the run's K_VAL responses of the base policy; that of
             "fresh" and of the reference is from 64 fresh responses. Chance: 0.1
targeted     share of that top 10% from the two targeted families (a twelfth of the pool), averaged likewise
neighbour    share of prompts whose nearest other prompt, by cosine of gradients, is the same as in the
             reference. Chance: 0.003
live         share of prompts with reward variance, which have a nonzero gradient

    python experiments/off_policy.py          after experiments/acceleration.sh; about 20 minutes
    python experiments/off_policy.py plot     redraws the figure from the JSON

Writes experiments/results/off_policy.json and off_policy.png.
"""

import json
import subprocess
import sys

import matplotlib
import numpy as np
import torch
import transformers

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sparse_ratio import RESULTS, ROOT, gradients_of, sketch

RUN, OUT = ROOT / "runs/acceleration/seed-0", ROOT / "runs/off_policy"
KS, REFERENCE, EVERY, SETS = (2, 4, 8, 16, 32), 64, 6, ("val_sort", "val_dbl")


def collect(policy, data, out, k, seed):
    if not out.exists():
        subprocess.run([sys.executable, ROOT / "collect.py", "--model", policy, "--data", data,
                        "--out", out, "--k", str(k), "--temperature", "1.0", "--max-new-tokens", "10",
                        "--verifier", "exact", "--seed", str(seed)], check=True)
    return sketch.load_rollouts(out)


def gradients(policy, rollouts, chosen):
    """Sketches [N, dim] from a range of each prompt's responses; zero rows for prompts with equal rewards."""
    varied = (rollouts["rewards"][:, chosen].std(1) > 0).nonzero()[:, 0].tolist()
    projection = sketch.Projection(0, 1.0, 32768, "cpu")
    found = torch.zeros(len(rollouts["prompts"]), projection.dim)
    for places, sketches in gradients_of(policy, rollouts, varied, projection, chosen, 4096):
        found[[varied[place] for place in places]] += sketches
    return found


def without_ratio(logp, _):
    """Replaces token_ratio: the value is 1, the gradient is that of log pi."""
    return (logp - logp.detach()).exp()


def top(sketches, mean):
    """The indices of the top 10% by cosine with `mean`; never of a prompt without a gradient."""
    score = (sketches @ mean / sketches.norm(dim=1)).nan_to_num(-torch.inf)
    best = torch.argsort(score, descending=True, stable=True)[:len(score) // 10]
    return set(best[score[best] > -torch.inf].tolist())


def neighbours(sketches, chosen):
    """For each prompt of the mask `chosen`, its nearest other prompt of that mask."""
    units = torch.nn.functional.normalize(sketches[chosen], dim=1)
    return (units @ units.T).fill_diagonal_(-torch.inf).argmax(1)


def compare(found, means, reference, reference_means, targeted):
    both = (found.norm(dim=1) > 0) & (reference.norm(dim=1) > 0)
    cosines = torch.nn.functional.cosine_similarity(found[both], reference[both])
    chosen = [top(found, mean) for mean in means]
    exact = [top(reference, mean) for mean in reference_means]
    overlap = [len(ours & best) / (len(found) // 10) for ours, best in zip(chosen, exact)]
    return {"cosine": float(cosines.mean()), "above_0.6": float((cosines > 0.6).float().mean()),
            "overlap": float(np.mean(overlap)),
            "targeted": float(np.mean([len(ours & targeted) / len(ours) for ours in chosen])),
            "neighbour": float((neighbours(found, both) == neighbours(reference, both)).float().mean()),
            "live": float((found.norm(dim=1) > 0).float().mean())}


def measure():
    OUT.mkdir(parents=True, exist_ok=True)
    data, base = OUT / "train.jsonl", RUN / "world" / "base"
    lines = (RUN / "world" / "train.jsonl").read_text().splitlines()[::EVERY]
    data.write_text("".join(line + "\n" for line in lines))
    old = collect(base, data, OUT / "old.pt", max(KS), 1)
    targeted = {i for i, family in enumerate(old["families"]) if family in ("sort", "dbl")}
    old_sets = [sketch.load_rollouts(RUN / f"rollouts/{name}.pt") for name in SETS]
    first, middle, end = max(KS), max(KS) + REFERENCE // 2, max(KS) + REFERENCE  # responses of the reference
    phases = []
    for m, path in enumerate([base] + [RUN / f"cropi/phase-{m}/policy" for m in range(4)]):
        policy = sketch.load_policy(path, "cpu", "float32")
        fresh = collect(path, data, OUT / f"fresh-{m}.pt", end, 2)
        fresh_sets = []
        for name in SETS:
            out = OUT / f"fresh-{m}-{name}.pt"
            fresh_sets.append(collect(path, RUN / "world" / f"{name}.jsonl", out, REFERENCE, 2))
        reference = gradients(policy, fresh, range(first, end))
        means = [gradients(policy, rollouts, range(REFERENCE)).mean(0) for rollouts in fresh_sets]
        halves = [gradients(policy, fresh, part) for part in (range(first, middle), range(middle, end))]
        row = {"phase": m, "split": compare(halves[0], means, halves[1], means, targeted),
               "reference": compare(reference, means, reference, means, targeted), "fresh": {}, "old": {},
               "old_without_ratio": {}}
        for k in KS:
            row["fresh"][k] = compare(gradients(policy, fresh, range(k)), means, reference, means, targeted)
        for kind, ratio in (("old", sketch.token_ratio), ("old_without_ratio", without_ratio)):
            saved, sketch.token_ratio = sketch.token_ratio, ratio
            old_means = [gradients(policy, rollouts, range(rollouts["meta"]["k"])).mean(0)
                         for rollouts in old_sets]
            for k in KS:
                found = gradients(policy, old, range(k))
                row[kind][k] = compare(found, old_means, reference, means, targeted)
            sketch.token_ratio = saved
        phases.append(row)
        print(json.dumps(row), flush=True)
    return {"command": "python experiments/off_policy.py", "run": "seed 0 of experiments/acceleration.sh",
            "prompts": len(old["prompts"]), "torch": torch.__version__,
            "transformers": transformers.__version__, "phases": phases}


def draw(result, path):
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    phases = [row["phase"] for row in result["phases"]]
    styles = {"fresh": ("#34495e", "fresh"), "old": ("#c0392b", "old, with ratio"),
              "old_without_ratio": ("#e59866", "old, without ratio")}
    titles = {"cosine": "mean cosine with the reference", "overlap": "overlap of the top 10%",
              "targeted": "targeted families' share of the top 10%"}
    for axis, (measure, title) in zip(axes, titles.items()):
        for kind, (color, label) in styles.items():
            for k, line in (("8", "-"), ("32", ":")):
                axis.plot(phases, [row[kind][k][measure] for row in result["phases"]], line, color=color,
                          marker="o", markersize=3, label=f"{label}, K = {k}")
        bound, label = "split", "halves of the reference"
        if measure == "targeted":
            bound, label = "reference", "the reference"
        values = [row[bound][measure] for row in result["phases"]]
        axis.plot(phases, values, "--", color="#95a5a6", label=label)
        axis.set(title=title, xlabel="phases of training", ylim=(0, 1), xticks=phases)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    if sys.argv[1:] not in ([], ["plot"]):
        sys.exit(__doc__)
    path = RESULTS / "off_policy.json"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not sys.argv[1:]:
        path.write_text(json.dumps(measure(), indent=1) + "\n")
    draw(json.loads(path.read_text()), RESULTS / "off_policy.png")


if __name__ == "__main__":
    main()
