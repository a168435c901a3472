"""When does selecting again in every phase pay? CROPI minus influence once, by the protocol of README.md.

From the runs of `bash experiments/acceleration.sh main` and `... reselection`, seeds 0 to 2:

useful        against the number of targeted prompts in the pool for each selected one (0.8 to 6)
repetitions   against how often a selected prompt is seen in a phase (4 to 18)
cosines       of all main CROPI runs, by phase: the mean cosine with the validation means, of targeted prompts
              that were selected in an earlier phase ("trained") and of those that were not ("new")

    python experiments/reselection.py      writes experiments/results/reselection.json and reselection.png
"""

import json
import sys

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from acceleration import RESULTS, interval, smoothed

SEEDS, SELECTED = (0, 1, 2), 144
POOLS = {60: "pool-60", 100: "pool-100", 200: "seed", 430: "pool-430"}  # prompts of each targeted family
PHASES = {16: "phases-16", 8: "seed", 4: "phases-4"}


def load(name):
    """A run's JSON: those of the main runs are in results/acceleration."""
    folder = "acceleration" if name.startswith("seed-") else "reselection"
    return json.loads((RESULTS / folder / f"{name}.json").read_text())


def differences(cropi, influence):
    """CROPI minus influence once, targeted, at half and end; from the runs' names without the seed."""
    found = {"half": [], "end": []}
    for seed in SEEDS:
        one, other = (smoothed(load(f"{name}-{seed}-{method}")["accuracy"]["targeted"])
                      for name, method in ((cropi, "cropi"), (influence, "influence")))
        found["half"].append(one[len(one) // 2] - other[len(other) // 2])
        found["end"].append(one[-1] - other[-1])
    return {place: interval(values) for place, values in found.items()}


def evaluate():
    useful = {round(2 * n / SELECTED, 1): differences(name, name) for n, name in POOLS.items()}
    repetitions = {round(160 * 64 / phases / SELECTED, 1): differences(name, "seed")
                   for phases, name in PHASES.items()}
    runs = [json.loads(path.read_text())["cosines"]
            for path in sorted((RESULTS / "acceleration").glob("seed-*-cropi.json"))]
    cosines = {"seeds": len(runs)}
    for place, name in enumerate(("trained", "new")):
        cosines[name] = []
        for m in range(len(runs[0])):
            values = [run[m][place][1] for run in runs if run[m][place][0]]
            cosines[name].append([np.mean(values), min(values), max(values)] if values else None)
    return {"command": "python experiments/reselection.py", "useful": useful, "repetitions": repetitions,
            "cosines": cosines}


def draw(result, path):
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    labels = {"useful": "targeted prompts in the pool per selected one",
              "repetitions": "times a selected prompt is seen in a phase"}
    for axis, (name, label) in zip(axes, labels.items()):
        for place, color, shift in (("half", "#e59866", 0.99), ("end", "#c0392b", 1.01)):
            x = [float(value) * shift for value in result[name]]  # error bars beside one another
            y = [point[place]["mean"] for point in result[name].values()]
            axis.errorbar(x, y, [point[place]["half_width_95"] for point in result[name].values()],
                          color=color, marker="o", capsize=3, label=place)
        axis.axhline(0, color="black", lw=0.8)
        axis.set(xlabel=label, ylabel="CROPI - influence once, targeted accuracy")
        axis.legend(frameon=False)
    for name, color in (("trained", "#34495e"), ("new", "#27ae60")):
        points = [(m, *point) for m, point in enumerate(result["cosines"][name]) if point]
        m, mean, low, high = zip(*points)
        axes[2].plot(m, mean, color=color, marker="o", label=f"{name} prompts")
        axes[2].fill_between(m, low, high, color=color, alpha=0.15, lw=0)
    axes[2].set(xlabel="phases of training", ylabel="cosine with the validation means")
    axes[2].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    if sys.argv[1:]:
        sys.exit(__doc__)
    (RESULTS / "reselection.json").write_text(json.dumps(evaluate(), indent=1) + "\n")
    draw(json.loads((RESULTS / "reselection.json").read_text()), RESULTS / "reselection.png")


if __name__ == "__main__":
    main()
