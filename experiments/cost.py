"""Claim 4, cost: seconds per phase of CROPI, by part. (The paper: 2776 s of selection, 3584 s of training.)

Reads what experiments/acceleration.sh has stored of the CROPI runs. Selection is the wall-clock time of its
processes; training excludes evaluation.

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
sys.path.insert(0, str(ROOT))
import plot

PARTS = ("sketch: start-up and trial", "sketch: train prompts", "sketch: validation prompts", "score",
         "train: sampling", "train: updates", "start-up and evaluation, not counted")
PAPER = {"selection": 2776, "training": 3584, "total": 6360}


def phase_costs(folder):
    """Seconds of each phase of a finished CROPI run RUN/cropi, in the order of PARTS."""
    seconds, rows = plot.read_seconds(folder / "seconds.tsv"), []
    for m in range(len(list(folder.glob("phase-*")))):
        phase = folder / f"phase-{m}"
        sketched = {path.stem: json.loads(path.read_text())["seconds"]
                    for path in [phase / "train.json", *phase.glob("val_*.json")]}
        steps = [json.loads(line) for line in (phase / "policy/metrics.jsonl").read_text().splitlines()]
        sampling = sum(step.get("sampling_seconds", 0) for step in steps)
        train = sketched.pop("train")
        val = sum(sketched.values())
        rows.append([seconds[f"phase-{m}-sketch"] - train - val, train, val, seconds[f"phase-{m}-score"],
                     sampling, steps[-1]["seconds"] - sampling,
                     seconds[f"phase-{m}-train"] - steps[-1]["seconds"]])
    return [[round(value, 2) for value in row] for row in rows]


def measure():
    runs = [json.loads(path.read_text())
            for path in sorted((RESULTS / "acceleration").glob("seed-*-cropi.json"))]
    rows = np.array([row for run in runs for row in run["cost"]])  # [seeds x phases, parts]
    totals = {"selection": rows[:, :4].sum(1), "training": rows[:, 4:6].sum(1), "total": rows[:, :6].sum(1)}
    spread = {}
    for name, values in [*totals.items(), *zip(PARTS, rows.T)]:
        spread[name] = {"mean": round(float(values.mean()), 2), "min": round(float(values.min()), 2),
                        "max": round(float(values.max()), 2)}
    return {"command": "python experiments/cost.py", "seeds": len(runs), "phases": len(rows),
            "steps_per_phase": runs[0]["steps"][-1] // len(runs[0]["cost"]), "one_phase": spread,
            "collection_once": round(float(np.mean([run["collection"] for run in runs])), 2), "paper": PAPER}


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
