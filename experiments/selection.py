"""Claim 3, what is selected: by phase on the toy, and by kind of task on SmolLM2-135M with real-language prompts.

toy       of each phase of CROPI (experiments/acceleration.sh, all seeds), beside the pool: the share of the prompts from the
          targeted families; their mean pass rate under the base policy; the entropy of its responses (mean of -log beta over
          the tokens of a prompt's K responses, nats a token); the share of a phase's selection that the phase before had.
smollm2   256 prompts of reasoning-gym, 64 of each of four kinds, and a validation set of one kind (experiments/smollm2.py,
          pool of its own): the share of that kind in the selected 10%, over its share in the pool, and over its share among
          the prompts with a gradient (which alone can be selected); for each of SEEDS of the projection.

    python experiments/selection.py toy
    python experiments/selection.py smollm2    about half an hour
    python experiments/selection.py plot       the figure anew from the numbers

Writes experiments/results/selection.json and selection.png; a part that was not asked for stays as it was.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import transformers

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments/results"
TARGETED, KIND, SEEDS = ("sort", "dbl"), "chain_sum", range(1)


def properties(rollouts, which):
    """What the prompts `which` are like."""
    offsets, rewards = rollouts["response_offsets"], rollouts["rewards"]
    k = rewards.shape[1]
    sums = torch.cat([torch.zeros(1), -rollouts["logprobs"].double().cumsum(0)])[offsets].diff().view(-1, k).sum(1)
    tokens = offsets.diff().view(-1, k).sum(1)
    families = np.array(rollouts["families"])[which]
    return {"targeted": float(np.isin(families, TARGETED).mean()), "pass_rate": float(rewards[which].mean()),
            "entropy": float((sums / tokens)[which].mean()),
            "families": {family: float((families == family).mean()) for family in sorted(set(rollouts["families"]))}}


def toy():
    runs = []
    for folder in sorted((ROOT / "runs/acceleration").glob("seed-*")):
        rollouts = torch.load(folder / "rollouts/train.pt", weights_only=True)
        phases, before = [], None
        for path in sorted((folder / "cropi").glob("phase-*/selected.npy")):
            selected = np.load(path)
            phases.append({**properties(rollouts, selected), "selected": len(selected),
                           "kept": None if before is None else len(np.intersect1d(selected, before)) / len(selected)})
            before = selected
        runs.append({"seed": folder.name, "pool": properties(rollouts, np.arange(len(rollouts["rewards"]))), "phases": phases})
    return {"command": "python experiments/selection.py toy", "runs": runs}


def smollm2():
    out = ROOT / "runs/smollm2-mixed"
    if not (out / "val.pt").exists():
        subprocess.run([sys.executable, ROOT / "experiments/smollm2.py", "--prompts", "64", "--out", out], check=True)
    rollouts = torch.load(out / "train.pt", weights_only=True)
    kind, live = np.array(rollouts["families"]) == KIND, (rollouts["rewards"].std(1) > 0).numpy()
    selections = []
    for seed in SEEDS:
        here = out / f"seed-{seed}"
        if not (here / "selected.npy").exists():
            subprocess.run([sys.executable, ROOT / "sketch.py", "--model", out / "base", "--rollouts", out / "train.pt",
                            out / "val.pt", "--out", here / "train.npy", here / "val.npy", "--seed", str(seed)], check=True)
            subprocess.run([sys.executable, ROOT / "score.py", "--train", here / "train.npy", "--val", here / "val.npy",
                            "--rollouts", out / "train.pt", "--out", here / "selected.npy"], check=True)
        selected = np.load(here / "selected.npy")
        families = np.array(rollouts["families"])[selected]
        selections.append({"seed": seed, "selected": len(selected), "share": float(kind[selected].mean()),
                           "over_pool": float(kind[selected].mean() / kind.mean()),
                           "over_live": float(kind[selected].mean() / kind[live].mean()),
                           "kinds": {family: int((families == family).sum()) for family in sorted(set(rollouts["families"]))}})
    return {"command": "python experiments/selection.py smollm2", "pool": len(kind), "live": int(live.sum()),
            "share_of_pool": float(kind.mean()), "share_of_live": float(kind[live].mean()), "projections": selections,
            "torch": torch.__version__, "transformers": transformers.__version__}


def draw(result, path):
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2))
    titles = {"targeted": "share of targeted families", "pass_rate": "pass rate under the base policy",
              "entropy": "entropy of responses (nats a token)", "kept": "share selected in the phase before"}
    for axis, (name, title) in zip(axes, titles.items()):
        for run in result["toy"]["runs"]:
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["toy", "smollm2", "plot"])
    part, path = parser.parse_args().part, RESULTS / "selection.json"
    made = {"toy": toy, "smollm2": smollm2, "plot": dict}[part]()
    result = json.loads(path.read_text()) if path.exists() else {}
    if made:
        result[part] = made
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result[part], indent=1))
    if "toy" in result:
        draw(result, RESULTS / "selection.png")


if __name__ == "__main__":
    main()
