"""Claim 1, acceleration: steps and seconds that each method needs to reach full data's final accuracy.

Reads the runs of experiments/acceleration.sh. Writes experiments/results/acceleration.json (curves, settings,
versions and the numbers below) and acceleration.png (targeted and untargeted accuracy against steps and
seconds: mean over the seeds, band from the lowest to the highest seed).

Accuracy is the mean reward at T = 1 over 4 responses per test prompt. Smoothed accuracy averages each
evaluation with the ones before and after it (10 steps apart). Seconds cover collection (only what the method
needs), selection (wall-clock time of its processes) and training without evaluation. With A = the smoothed
targeted accuracy of full data at its last step, for each seed

    step_acceleration = (steps until full data reaches A) / (steps until CROPI reaches A)
    wall_acceleration = the same ratio in seconds

A method reaches A at the first crossing of its smoothed curve, interpolated linearly between evaluations. The
ratio is 0 if CROPI never reaches A.

    bash experiments/acceleration.sh                 makes the runs, then starts this script
    python experiments/acceleration.py plot          redraws the figure from the JSON
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
    """Averages each value with its neighbours; the first and the last value have only one neighbour."""
    padded = np.pad(np.asarray(accuracy, float), 1, constant_values=np.nan)
    return np.nanmean(np.stack([padded[:-2], padded[1:-1], padded[2:]]), axis=0)


def crossing(x, y, level):
    """The x at which the curve through the points (x, y) first reaches `level`; infinity if it never does.

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
            (steps, seconds, _), tests = plot.curve(run)
            curves[method].append({
                "steps": steps.tolist(), "seconds": seconds.round(2).tolist(),
                "collection": round(run["collection"], 2),
                **{test: values[0].round(5).tolist() for test, values in tests.items()}})
    ratios = {"step": [], "wall": []}
    for full, cropi in zip(curves["full"], curves["cropi"]):
        level = smoothed(full["targeted"])[-1]
        for name, axis in (("step", "steps"), ("wall", "seconds")):
            needed = [crossing(run[axis], smoothed(run["targeted"]), level) for run in (full, cropi)]
            ratios[name].append(round(needed[0] / needed[1], 3))
    settings = {}
    for file in ("rollouts", "cropi"):
        for line in (seeds[0] / file / "settings.txt").read_text().splitlines():
            settings[line.partition("=")[0]] = line.partition("=")[2]
    result = {"command": "bash experiments/acceleration.sh",
              "seeds": [folder.name.split("-")[1] for folder in seeds], "settings": settings,
              "torch": torch.__version__, "transformers": transformers.__version__,
              "threads": torch.get_num_threads()}
    for name, values in ratios.items():
        result[f"{name}_acceleration"] = {"median": float(np.median(values)), "per_seed": values}
    for key in ("half_accuracy", "final_accuracy"):
        result[key] = {"targeted": {}, "untargeted": {}}
        for test, by_method in result[key].items():
            for method in METHODS:
                curves_of_test = [smoothed(run[test]) for run in curves[method]]
                place = len(curves_of_test[0]) // 2 if key == "half_accuracy" else -1
                values = [round(float(accuracy[place]), 4) for accuracy in curves_of_test]
                by_method[method] = {"mean": round(float(np.mean(values)), 4), "per_seed": values}
    return {**result, "curves": curves}


def draw(result, path):
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.8), sharey="row")
    for row, test in zip(axes, ("targeted", "untargeted")):
        for method, runs in result["curves"].items():
            accuracy = np.array([run[test] for run in runs])  # [seeds, evaluations]
            color = plot.COLORS[method]
            for axis, x in zip(row, ("steps", "seconds")):
                at = np.mean([run[x] for run in runs], axis=0)
                axis.plot(at, accuracy.mean(0), color=color, label=method, lw=2)
                axis.fill_between(at, accuracy.min(0), accuracy.max(0), color=color, alpha=0.15, lw=0)
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
        means = []
        for key in ("half_accuracy", "final_accuracy"):
            for test in ("targeted", "untargeted"):
                means.append(f"{key} {test}: {result[key][test][method]['mean']:.3f}  ")
        print(f"{method:13}", *means)
    draw(result, RESULTS / "acceleration.png")


if __name__ == "__main__":
    main()
