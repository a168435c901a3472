"""Claim 1, acceleration: steps and seconds that CROPI needs to the accuracy at which full data ends, beside other rules.

Reads the runs of experiments/acceleration.sh and writes experiments/results/acceleration.json (curves, settings, versions,
the numbers below) and acceleration.png, targeted and untargeted accuracy against steps and against seconds: mean over the
seeds, band from the lowest to the highest.

Accuracy is the mean reward at T = 1 over 4 responses a test prompt; smoothed: averaged with the evaluations before and
after (10 steps apart). Seconds are those of collection (what the method needs of it) and selection as whole processes, and
of training without its evaluations. With A the smoothed targeted accuracy of full data at its last step, for each seed

    step_acceleration = (steps full data needs to A) / (steps CROPI needs to A)
    wall_acceleration = the same of seconds

where "needs to" is the first crossing of the smoothed curve, linear between evaluations; 0 where it never crosses.

    bash experiments/acceleration.sh                 the runs, then this
    python experiments/acceleration.py plot          the figure anew from the JSON
"""

import json
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
sys.path.insert(0, str(ROOT))
import plot

METHODS = ("full", "random", "passrate", "learnability", "influence", "cropi")


def smoothed(accuracy):
    """Each value averaged with its neighbours, the first and the last with the one that they have."""
    padded = np.pad(np.asarray(accuracy, float), 1, constant_values=np.nan)
    return np.nanmean(np.stack([padded[:-2], padded[1:-1], padded[2:]]), axis=0)


def crossing(x, y, level):
    """Where the curve through the points (x, y) first reaches `level`; infinity if it never does.

    >>> crossing([0, 10, 20], [0.2, 0.4, 0.8], 0.5)
    12.5
    """
    above = np.flatnonzero(np.asarray(y) >= level)
    if len(above) == 0:
        return float("inf")
    i = above[0]
    return float(x[0] if i == 0 else x[i - 1] + (level - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


def measure():
    seeds = sorted((ROOT / "runs/acceleration").glob("seed-*"))
    curves = {method: [] for method in METHODS}
    for folder in seeds:
        for method in METHODS:
            run = plot.read_run(folder / method)
            steps, seconds, tests = plot.curve(run)
            curves[method].append({
                "steps": steps.tolist(), "seconds": seconds.round(2).tolist(), "collection": round(run["collection"], 2),
                **{test: values[0].round(5).tolist() for test, values in tests.items()}})
    found = {"step": [], "wall": []}
    for full, cropi in zip(curves["full"], curves["cropi"]):
        level = smoothed(full["targeted"])[-1]
        for name, axis in (("step", "steps"), ("wall", "seconds")):
            needed = [crossing(run[axis], smoothed(run["targeted"]), level) for run in (full, cropi)]
            found[name].append(round(needed[0] / needed[1], 3))
    result = {"command": "bash experiments/acceleration.sh", "seeds": [folder.name.split("-")[1] for folder in seeds],
              "settings": {line.partition("=")[0]: line.partition("=")[2] for file in ("rollouts", "cropi")
                           for line in (seeds[0] / file / "settings.txt").read_text().splitlines()},
              "torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    for name, ratios in found.items():
        result[f"{name}_acceleration"] = {"median": float(np.median(ratios)), "per_seed": ratios}
    for key, place in (("half_accuracy", lambda n: n // 2), ("final_accuracy", lambda n: n - 1)):
        for test in ("targeted", "untargeted"):
            values = {method: [round(float(smoothed(run[test])[place(len(run[test]))]), 4) for run in curves[method]]
                      for method in METHODS}
            result.setdefault(key, {})[test] = {method: {"mean": round(float(np.mean(v)), 4), "per_seed": v}
                                                for method, v in values.items()}
    return {**result, "curves": curves}


def draw(result, path):
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.8), sharey="row")
    for row, test in zip(axes, ("targeted", "untargeted")):
        for method, runs in result["curves"].items():
            accuracy = np.array([run[test] for run in runs])  # [seeds, evaluations]
            for axis, x in zip(row, ("steps", "seconds")):
                at = np.mean([run[x] for run in runs], axis=0)
                axis.plot(at, accuracy.mean(0), color=plot.COLORS[method], label=method, lw=2)
                axis.fill_between(at, accuracy.min(0), accuracy.max(0), color=plot.COLORS[method], alpha=0.15, lw=0)
                axis.grid(alpha=0.25)
        row[0].set_ylabel(f"{test}: mean reward")
    axes[1, 0].set_xlabel("GRPO steps")
    axes[1, 1].set_xlabel("seconds (collection + selection + training)")
    axes[0, 0].legend(frameon=False, fontsize=8)
    axes[0, 0].set_title(f"{len(result['seeds'])} seeds: mean, lowest to highest", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    if sys.argv[1:] not in ([], ["plot"]):
        sys.exit(__doc__)
    path = RESULTS / "acceleration.json"
    if not sys.argv[1:]:
        path.write_text(json.dumps(measure()) + "\n")
    result = json.loads(path.read_text())
    for name in ("step_acceleration", "wall_acceleration"):
        print(name, result[name])
    for method in METHODS:
        print(f"{method:13}", *(f"{key} {test}: {result[key][test][method]['mean']:.3f}  " for key in
                                ("half_accuracy", "final_accuracy") for test in ("targeted", "untargeted")))
    draw(result, RESULTS / "acceleration.png")


if __name__ == "__main__":
    main()
