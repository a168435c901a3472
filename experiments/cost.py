"""Claim 4, cost: seconds per phase of CROPI, by part. (The paper: 2776 s of selection, 3584 s of training.)

Reads the CROPI runs of experiments/acceleration.sh. Selection is the wall-clock time of its processes;
training excludes evaluation.

    python experiments/cost.py           writes experiments/results/cost.json and cost.png, prints the table
    python experiments/cost.py plot      redraws the figure from the JSON
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments/results"
PARTS = ("sketch: start-up and trial", "sketch: train prompts", "sketch: validation prompts", "score",
         "train: sampling", "train: updates", "start-up and evaluation, not counted")
PAPER = {"selection": 2776, "training": 3584, "total": 6360}


def measure():
    rows, collection = [], []
    for run in sorted((ROOT / "runs/acceleration").glob("seed-*")):
        seconds = {}
        for file in ("rollouts", "cropi"):
            for line in (run / file / "seconds.tsv").read_text().splitlines():
                name, value = line.split("\t")
                seconds[name] = float(value)
        collection.append(seconds["train"] + seconds["val"])
        for m, phase in enumerate(sorted((run / "cropi").glob("phase-*"))):
            sketched = {name: json.loads((phase / f"{name}.json").read_text())["seconds"]
                        for name in ("train", "val_sort", "val_dbl")}
            steps = [json.loads(line) for line in (phase / "policy/metrics.jsonl").read_text().splitlines()]
            sampling = sum(step.get("sampling_seconds", 0) for step in steps)
            rows.append([seconds[f"phase-{m}-sketch"] - sum(sketched.values()), sketched["train"],
                         sketched["val_sort"] + sketched["val_dbl"], seconds[f"phase-{m}-score"], sampling,
                         steps[-1]["seconds"] - sampling, seconds[f"phase-{m}-train"] - steps[-1]["seconds"]])
    rows = np.array(rows)  # [seeds x phases, parts]
    totals = {"selection": rows[:, :4].sum(1), "training": rows[:, 4:6].sum(1), "total": rows[:, :6].sum(1)}
    spread = {}
    for name, values in [*totals.items(), *zip(PARTS, rows.T)]:
        spread[name] = {"mean": round(float(values.mean()), 2), "min": round(float(values.min()), 2),
                        "max": round(float(values.max()), 2)}
    return {"command": "python experiments/cost.py", "seeds": len(collection), "phases": len(rows),
            "steps_a_phase": steps[-1]["step"] // (m + 1), "one_phase": spread,
            "collection_once": round(float(np.mean(collection)), 2), "paper": PAPER}


def draw(result, path):
    figure, axis = plt.subplots(figsize=(8, 2.2))
    left = 0
    for part in PARTS[:-1]:
        width = result["one_phase"][part]["mean"]
        axis.barh([0], [width], left=left, label=f"{part} {width:.1f} s")
        left += width
    axis.set(yticks=[], xlabel="seconds of one phase")
    axis.legend(fontsize=7, ncols=3, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    if sys.argv[1:] not in ([], ["plot"]):
        sys.exit(__doc__)
    path = RESULTS / "cost.json"
    if not sys.argv[1:]:
        path.write_text(json.dumps(measure(), indent=1) + "\n")
    result = json.loads(path.read_text())
    for name, value in result["one_phase"].items():
        paper = f"   paper: {PAPER[name]} s" if name in PAPER else ""
        print(f"{name:38} {value['mean']:8.1f} s ({value['min']:.1f} to {value['max']:.1f}){paper}")
    draw(result, RESULTS / "cost.png")


if __name__ == "__main__":
    main()
