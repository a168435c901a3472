"""Claim 2, off-policy fidelity: how near do the gradients of the old answers stay to fresh on-policy ones, phase after phase?

At the base policy and after each phase of a CROPI run (experiments/acceleration.sh), for 400 train prompts of the toy (every
sixth): the gradient of eq. g(s0) from the first K of 32 responses that the BASE policy once gave, with the token ratio and
without it (rho = 1, its gradient that of log pi), beside the gradient from K of 32 FRESH responses of the current policy. All
are compared with one reference: 64 further fresh responses. The fresh gradient at the same K shows what K alone costs, that
is the noise ceiling; what the off-policy one lies below it is the price of old answers. "split" compares the reference's
halves. Gradients are sketched at keep = 1 and dim 32768 (a cosine is off by about 0.006).

cosine       mean over the prompts that have both gradients, and the share of them above 0.6.
overlap      of the top 10% (40 of 400) by cosine with the validation mean (for old: from the loop's own K_VAL answers of the
             base policy; for fresh and reference: 64 fresh ones), mean over the two validation sets. Chance: 0.1.
targeted     share of that top 10% that is of the two targeted families (in the pool: a twelfth), mean over the two sets.
neighbour    share of prompts whose nearest other prompt, by cosine of gradients, is the reference's. Chance: 0.003.
live         share of the prompts that have a gradient.

    python experiments/off_policy.py          after experiments/acceleration.sh; about 20 minutes
    python experiments/off_policy.py plot     the figure anew from the numbers

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

WORLD, RUN, OUT = ROOT / "runs/toy-world", ROOT / "runs/acceleration/seed-0", ROOT / "runs/off_policy"
KS, REFERENCE, EVERY, SETS = (2, 4, 8, 16, 32), 64, 6, ("val_sort", "val_dbl")


def collect(policy, data, out, k, seed):
    if not out.exists():
        subprocess.run([sys.executable, ROOT / "collect.py", "--model", policy, "--data", data, "--out", out, "--k", str(k),
                        "--temperature", "1.0", "--max-new-tokens", "10", "--verifier", "exact", "--seed", str(seed)],
                       check=True)
    return sketch.load_rollouts(out)


def gradients(policy, rollouts, chosen):
    """Sketches [N, dim] of a range of each prompt's responses; zero where their rewards are equal."""
    live = (rollouts["rewards"][:, chosen].std(1) > 0).nonzero()[:, 0].tolist()
    projection = sketch.Projection(0, 1.0, 32768, "sjlt", "coordinates", "cpu")
    found = torch.zeros(len(rollouts["prompts"]), projection.dim)
    for places, sketches in gradients_of(policy, rollouts, live, projection, chosen, 4096):
        found[[live[place] for place in places]] += sketches
    return found


def without_ratio(logp, _):
    """In the place of token_ratio: 1, its gradient that of log pi."""
    return (logp - logp.detach()).exp()


def top(sketches, mean):
    """The 10% of highest cosine with `mean`; a prompt without a gradient is never among them."""
    score = (sketches @ mean / sketches.norm(dim=1)).nan_to_num(-torch.inf)
    best = torch.argsort(score, descending=True, stable=True)[:len(score) // 10]
    return set(best[score[best] > -torch.inf].tolist())


def neighbours(sketches, live):
    """The nearest other prompt of each prompt in `live`, among these."""
    units = torch.nn.functional.normalize(sketches[live], dim=1)
    return (units @ units.T).fill_diagonal_(-torch.inf).argmax(1)


def compare(found, means, reference, reference_means, targeted):
    both = (found.norm(dim=1) > 0) & (reference.norm(dim=1) > 0)
    cosines = torch.nn.functional.cosine_similarity(found[both], reference[both])
    chosen = [top(found, mean) for mean in means]
    overlap = [len(ours & top(reference, truth)) / (len(found) // 10) for ours, truth in zip(chosen, reference_means)]
    return {"cosine": float(cosines.mean()), "above_0.6": float((cosines > 0.6).float().mean()),
            "overlap": float(np.mean(overlap)),
            "targeted": float(np.mean([len(ours & targeted) / len(ours) for ours in chosen])),
            "neighbour": float((neighbours(found, both) == neighbours(reference, both)).float().mean()),
            "live": float((found.norm(dim=1) > 0).float().mean())}


def measure():
    OUT.mkdir(parents=True, exist_ok=True)
    data, base = OUT / "train.jsonl", WORLD / "base"
    data.write_text("".join(line + "\n" for line in (WORLD / "train.jsonl").read_text().splitlines()[::EVERY]))
    old = collect(base, data, OUT / "old.pt", max(KS), 1)
    targeted = {i for i, family in enumerate(old["families"]) if family in ("sort", "dbl")}
    old_sets = [sketch.load_rollouts(RUN / f"rollouts/{name}.pt") for name in SETS]
    paths = [base] + [RUN / f"cropi/phase-{m}/policy" for m in range(4)]
    phases = []
    for m, path in enumerate(paths):
        policy = sketch.load_policy(path, "cpu", "float32")
        fresh = collect(path, data, OUT / f"fresh-{m}.pt", max(KS) + REFERENCE, 2)
        fresh_sets = [collect(path, WORLD / f"{name}.jsonl", OUT / f"fresh-{m}-{name}.pt", REFERENCE, 2) for name in SETS]
        reference = gradients(policy, fresh, range(max(KS), max(KS) + REFERENCE))
        means = [gradients(policy, rollouts, range(REFERENCE)).mean(0) for rollouts in fresh_sets]
        middle = max(KS) + REFERENCE // 2
        halves = [gradients(policy, fresh, part) for part in (range(max(KS), middle), range(middle, max(KS) + REFERENCE))]
        row = {"phase": m, "split": compare(halves[0], means, halves[1], means, targeted),
               "reference": compare(reference, means, reference, means, targeted), "fresh": {}, "old": {},
               "old_without_ratio": {}}
        for k in KS:
            row["fresh"][k] = compare(gradients(policy, fresh, range(k)), means, reference, means, targeted)
        for kind, ratio in (("old", sketch.token_ratio), ("old_without_ratio", without_ratio)):
            saved, sketch.token_ratio = sketch.token_ratio, ratio
            old_means = [gradients(policy, rollouts, range(rollouts["meta"]["k"])).mean(0) for rollouts in old_sets]
            for k in KS:
                row[kind][k] = compare(gradients(policy, old, range(k)), old_means, reference, means, targeted)
            sketch.token_ratio = saved
        phases.append(row)
        print(json.dumps(row), flush=True)
    return {"command": "python experiments/off_policy.py", "run": "seed 0 of experiments/acceleration.sh",
            "prompts": len(old["prompts"]), "torch": torch.__version__, "transformers": transformers.__version__,
            "phases": phases}


def draw(result, path):
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    phases = [row["phase"] for row in result["phases"]]
    styles = {"fresh": ("#34495e", "fresh"), "old": ("#c0392b", "old, with ratio"),
              "old_without_ratio": ("#e59866", "old, without ratio")}
    for axis, measure, title in zip(axes, ("cosine", "overlap", "targeted"), (
            "mean cosine with the reference", "overlap of the top 10%", "targeted families' share of the top 10%")):
        for kind, (color, label) in styles.items():
            for k, line in (("8", "-"), ("32", ":")):
                axis.plot(phases, [row[kind][k][measure] for row in result["phases"]], line, color=color, marker="o",
                          markersize=3, label=f"{label}, K = {k}")
        kind, label = ("reference", "the reference") if measure == "targeted" else ("split", "halves of the reference")
        axis.plot(phases, [row[kind][measure] for row in result["phases"]], "--", color="#95a5a6", label=label)
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
