"""Claim 3, what is selected: by phase on the toy, and by kind of task on SmolLM2-135M.

toy       for each phase of CROPI (experiments/acceleration.sh, all seeds) and for the pool: the share of
          prompts from the targeted families; the mean pass rate under the base policy; the entropy of its
          responses (mean of -log beta over the tokens of a prompt's K responses, nats per token); the share
          of a phase's selection that the previous phase selected, too.
smollm2   256 natural-language prompts of reasoning-gym, 64 of each of four kinds, and a validation set of one
          kind (experiments/smollm2.py, with its own pool): the share of that kind in the selected 10%,
          relative to its share in the pool and to its share among the prompts with reward variance (only
          these can be selected); for each projection seed in SEEDS.

    python experiments/selection.py toy
    python experiments/selection.py smollm2    about half an hour
    python experiments/selection.py plot       redraws the figure from the JSON

Writes experiments/results/selection.json (each command updates only its own part) and selection.png.
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
KIND, SEEDS = "chain_sum", range(1)


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


def toy():
    runs = []
    for path in sorted((RESULTS / "acceleration").glob("seed-*-cropi.json")):
        stored = json.loads(path.read_text())
        seed = path.stem.rsplit("-", 1)[0]
        runs.append({"seed": seed, "pool": stored["pool"], "phases": stored["selected"]})
    return {"command": "python experiments/selection.py toy", "runs": runs}


def smollm2():
    out = ROOT / "runs/smollm2-mixed"
    if not (out / "val.pt").exists():
        subprocess.run([sys.executable, ROOT / "experiments/smollm2.py", "--prompts", "64", "--out", out],
                       check=True)
    rollouts = torch.load(out / "train.pt", weights_only=True)
    families, varied = np.array(rollouts["families"]), (rollouts["rewards"].std(1) > 0).numpy()
    kind = families == KIND
    selections = []
    for seed in SEEDS:
        here = out / f"seed-{seed}"
        if not (here / "selected.npy").exists():
            subprocess.run([sys.executable, ROOT / "sketch.py", "--model", out / "base",
                            "--rollouts", out / "train.pt", out / "val.pt",
                            "--out", here / "train.npy", here / "val.npy", "--seed", str(seed)], check=True)
            subprocess.run([sys.executable, ROOT / "score.py", "--train", here / "train.npy",
                            "--val", here / "val.npy", "--rollouts", out / "train.pt",
                            "--out", here / "selected.npy"], check=True)
        selected = np.load(here / "selected.npy")
        kinds = {name: int((families[selected] == name).sum()) for name in np.unique(families).tolist()}
        selections.append({"seed": seed, "selected": len(selected), "share": float(kind[selected].mean()),
                           "over_pool": float(kind[selected].mean() / kind.mean()),
                           "over_live": float(kind[selected].mean() / kind[varied].mean()),
                           "kinds": kinds})
    return {"command": "python experiments/selection.py smollm2", "pool": len(kind),
            "live": int(varied.sum()), "share_of_pool": float(kind.mean()),
            "share_of_live": float(kind[varied].mean()), "projections": selections,
            "torch": torch.__version__, "transformers": transformers.__version__}


def draw(result, path):
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2))
    titles = {"targeted": "share of targeted families", "pass_rate": "pass rate under the base policy",
              "entropy": "entropy of responses (nats per token)",
              "kept": "share selected in the previous phase"}
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
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("part", choices=["toy", "smollm2", "plot"])
    part, path = parser.parse_args().part, RESULTS / "selection.json"
    measured = {"toy": toy, "smollm2": smollm2, "plot": dict}[part]()
    result = json.loads(path.read_text()) if path.exists() else {}
    if measured:
        result[part] = measured
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result[part], indent=1))
    if "toy" in result:
        draw(result, RESULTS / "selection.png")


if __name__ == "__main__":
    main()
