"""Does CROPI pay? Time to full data's accuracy, in the toy (measured) and at a real model's size (computed).

    time = collection + phases x selection + steps x step

For the toy, the parts are those of protocol 2's main runs (experiments/protocol2.sh), mean over the seeds;
steps are the median over them of what a method needs to full data's final accuracy, by greedy decoding and by
the sampled mean. For Qwen2.5-1.5B-Instruct the assumptions are those of presets/qwen2.5-1.5b.sh (H100 hours;
nothing of it was run) and the steps are the paper's: about 1,750 of full data and 660 of CROPI to the same
accuracy. That the cheaper selections need the same 660 steps is an assumption.

    python experiments/cost_model.py        writes experiments/results/cost_model.json and cost_model.png
"""

import json
import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from acceleration import RESULTS
from plot import crossing, smoothed
from protocol2 import MEASURES, ROWS, load

METHODS = ("full", "influence", "cropi", "economical")
PARTS = {"collection": "#95a5a6", "selection": "#c0392b", "training": "#34495e"}

# GPU hours, as in the header of presets/qwen2.5-1.5b.sh
HOUR = 3600
PASS = 6 * 1.54e9  # FLOP per token, forward and backward; with a reference's forward pass 8/6 of it
TRAIN = 35_750 * (8 * 500 + 100)  # tokens of the train prompts with a gradient, in one phase
TWO = 35_750 * (2 * 500 + 100)  # the same with RESPONSES=2
CHEAP = (TWO + 6 * TWO / 4) / 7  # and with CANDIDATES=1/4 as well, mean of seven phases: all in phase 0
VALIDATION = 200 * (32 * 500 + 100)
COLLECTION = 59_588 * 8 * 500 / 15_000 / HOUR
SELECTION, TWO_SELECTION, CHEAP_SELECTION = (
    (train + VALIDATION) * PASS / 2.5e14 / HOUR for train in (TRAIN, TWO, CHEAP))
STEP = 128 * (8 * 500 / 15_000 + (8 * 500 + 100) * PASS * 8 / 6 / 3.5e14) / HOUR
LARGE = {"full": (0, 0, 1750), "cropi": (COLLECTION, SELECTION, 660),
         "responses": (COLLECTION, TWO_SELECTION, 660),
         "allfirst": (COLLECTION, CHEAP_SELECTION, 660)}  # collection, selection of a phase, steps


def time_of(collection, selection, step, steps, steps_per_phase):
    """{part: time} of a method that needs `steps` steps; a phase's selection comes before its first step."""
    return {"collection": collection, "selection": math.ceil(steps / steps_per_phase) * selection,
            "training": steps * step}


def toy(methods, measure):
    """{method: {part: seconds}}; None for a method that does not reach full data's accuracy in the median."""
    stored = MEASURES[measure]
    result = {}
    for name in METHODS:
        runs = methods[name]
        steps = []
        for seed, run in runs.items():
            level = smoothed(methods["full"][seed][stored]["targeted"])[-1]
            steps.append(crossing(run["steps"], smoothed(run[stored]["targeted"]), level))
        step = [(run["seconds"][-1] - run["collection"] - sum(run["selection"])) / run["steps"][-1]
                for run in runs.values()]
        result[name] = None
        if np.isfinite(np.median(steps)):
            mean = [float(np.mean(part)) for part in (
                [run["collection"] for run in runs.values()],
                [np.mean(run["selection"]) for run in runs.values()], step)]
            result[name] = {"steps": float(np.median(steps)), **time_of(*mean, float(np.median(steps)), 40)}
            if name == "influence":  # it selects once
                result[name]["selection"] = float(np.mean([sum(run["selection"]) for run in runs.values()]))
    return result


def main():
    methods = load()
    panels = {f"toy, {measure} (seconds, measured)": toy(methods, measure) for measure in MEASURES}
    panels["Qwen2.5-1.5B (GPU hours, computed)"] = {
        name: {"steps": steps, **time_of(collection, selection, STEP, steps, 100)}
        for name, (collection, selection, steps) in LARGE.items()}
    stored = {"seeds": list(methods["full"]), **panels}
    (RESULTS / "cost_model.json").write_text(json.dumps(stored, indent=1) + "\n")

    figure, axes = plt.subplots(1, len(panels), figsize=(12, 2.6))
    for axis, (title, panel) in zip(axes, panels.items()):
        for row, name in enumerate(panel):
            left = 0
            for part, color in PARTS.items():
                width = panel[name][part] if panel[name] else 0
                axis.barh(row, width, left=left, color=color, label=part if row == 0 else None)
                left += width
            axis.text(left, row, f" {left:.3g}" if left else " not reached", va="center", fontsize=8)
            print(f"{title}: {ROWS[name]}: {left:.3g}", panel[name])
        axis.set_yticks(range(len(panel)), [ROWS[name] for name in panel], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "cost_model.png", dpi=130)


if __name__ == "__main__":
    main()
