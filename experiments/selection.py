"""Claim 3, what is selected: by phase, in the toy world.

For each phase of CROPI (experiments/protocol2.sh, all seeds) and for the pool: the share of prompts from
the targeted families; the mean pass rate under the base policy; the entropy of its responses (mean of -log
beta over the tokens of a prompt's K responses, nats per token); the share of a phase's selection that the
previous phase selected, too.

    python experiments/selection.py

Writes experiments/results/selection.json and selection.png.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments/results"


def properties(rollouts, which, targeted):
    """Statistics of the prompts `which`; targeted: a list of families."""
    lengths, rewards = rollouts["response_lengths"], rollouts["rewards"]
    k = rewards.shape[1]
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])  # [N*K + 1]
    total = torch.cat([torch.zeros(1), -rollouts["logprobs"].double().cumsum(0)])  # -log beta, cumulated
    sums = total[ends].diff().view(-1, k).sum(1)
    tokens = lengths.view(-1, k).sum(1)
    families, names = np.array(rollouts["families"])[which], sorted(set(rollouts["families"]))
    return {"targeted": float(np.isin(families, targeted).mean()), "pass_rate": float(rewards[which].mean()),
            "entropy": float((sums / tokens)[which].mean()),
            "families": {name: float((families == name).mean()) for name in names}}


def selected_properties(rollouts, selections, targeted):
    """`properties` of the selection of each phase, with its size and the share of it selected before."""
    phases, before = [], None
    for selected in selections:
        kept = None if before is None else len(np.intersect1d(selected, before)) / len(selected)
        phases.append({**properties(rollouts, selected, targeted), "selected": len(selected), "kept": kept})
        before = selected
    return phases


def draw(runs, path):
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2))
    titles = {"targeted": "share of targeted families", "pass_rate": "pass rate under the base policy",
              "entropy": "entropy of responses (nats per token)",
              "kept": "share selected in the previous phase"}
    for axis, (name, title) in zip(axes, titles.items()):
        for run in runs:
            axis.plot([phase[name] for phase in run["phases"]], "o-", markersize=3, label=run["seed"])
            if name != "kept":
                axis.axhline(run["pool"][name], color="#95a5a6", ls=":", lw=1)
        axis.set(title=title, xlabel="phase", ylim=(0, None), xticks=range(len(run["phases"])))
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=7, title="dotted: the pool", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    runs = []
    for path in sorted((RESULTS / "protocol2").glob("cropi-*.json")):
        stored = json.loads(path.read_text())
        seed = path.stem.replace("cropi", "seed")
        runs.append({"seed": seed, "pool": stored["pool"], "phases": stored["selected"]})
    result = {"command": "python experiments/selection.py", "runs": runs}
    (RESULTS / "selection.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(runs, RESULTS / "selection.png")
    for run in runs:
        for name in ("targeted", "pass_rate", "entropy"):
            values = [run["pool"][name], *(phase[name] for phase in run["phases"])]
            print(f"{run['seed']}: {name}, pool and phases: {np.round(values, 2).tolist()}")


if __name__ == "__main__":
    main()
