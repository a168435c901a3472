"""Plots and a table of one or more runs of run_cropi.sh.

Reads   run folders RUN/METHOD (and RUN/rollouts next to them). Runs of one method with several seeds are
        drawn as their mean with a band from the lowest to the highest. Runs without metrics.jsonl (of another
        trainer, or of STEPS=0) have no curves.
Writes  OUT/accuracy.png   accuracy on each test set against GRPO steps, seconds and sampled tokens. Solid
                           lines: mean reward at the evaluation's temperature; dotted: greedy decoding.
                           Seconds and tokens cover training, selection and the collection that the method
                           needs, but no evaluation.
        OUT/training.png   entropy and mean response length of each GRPO step.
        OUT/selected.png   the selection of each phase by family (if the data has families) and by pass rate
                           under beta.
Prints  a table: method, phase, prompts selected, selection seconds, training seconds, accuracies at the end
        of the phase (greedy decoding, then the mean of the samples in brackets); by both measures, how many
        steps each method needs to the smoothed accuracy on the first test set at which full data ends; and
        the prompts that the last method selected first, as text.

    python plot.py runs/toy/full runs/toy/cropi --out runs/toy
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import AutoTokenizer

COLORS = {"cropi": "#c0392b", "influence": "#e59866", "full": "#34495e", "dapo": "#8e44ad",
          "random": "#95a5a6", "passrate": "#2980b9", "learnability": "#27ae60"}


def fail(source, found, expected, hint):
    """Reports wrong input in one line on stderr and exits with code 2."""
    line = f"{Path(sys.argv[0]).name}: error: {source}: found {found}; expected {expected}; {hint}"
    print(" ".join(line.split()), file=sys.stderr)  # an exception's text may have several lines
    raise SystemExit(2)


def read_seconds(path):
    """{stage: seconds} of a seconds.tsv."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    return {stage: float(seconds) for stage, seconds in rows}


def read_run(folder):
    """A run: its method, phases [{selected, selection (seconds), rows of metrics.jsonl}], seconds and tokens
    of the collection that it needs, and the rewards and families of the train prompts."""
    shared, phases, method = folder.parent / "rollouts", [], folder.resolve().name
    needed = {"full": (), "dapo": (), "random": (), "passrate": ("train",), "learnability": ("train",)}
    needed = needed.get(method, ("train", "val"))  # stages of the collection
    try:
        seconds = read_seconds(folder / "seconds.tsv")
        collected = read_seconds(shared / "seconds.tsv")
        while (selected := folder / f"phase-{len(phases)}" / "selected.npy").exists():
            m = len(phases)
            metrics = selected.parent / "policy" / "metrics.jsonl"
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            rows = [json.loads(line) for line in lines]
            phases.append({
                "selected": np.load(selected),
                "selection": seconds.get(f"phase-{m}-sketch", 0) + seconds.get(f"phase-{m}-score", 0),
                "training": rows[-1]["seconds"] if rows else seconds.get(f"phase-{m}-train", 0),
                "rows": rows})
        rollouts = torch.load(shared / "train.pt", weights_only=True, mmap=True)
        tokens = 0
        for path in [path for stage in needed for path in shared.glob(f"{stage}*.pt")]:
            tokens += len(torch.load(path, weights_only=True, mmap=True)["response_tokens"])
    except (OSError, ValueError) as error:
        fail(folder, f"no readable run ({error})", "a folder RUN/METHOD of run_cropi.sh", "run it first")
    if not phases:
        fail(folder, "no selection", "phase-0/selected.npy", "run run_cropi.sh until it has selected")
    return {"method": method, "phases": phases, "collection": sum(collected[stage] for stage in needed),
            "tokens": tokens, "rewards": rollouts["rewards"].numpy(), "families": rollouts["families"]}


def curve(run):
    """x [3, evaluations] (steps, seconds, tokens so far) and {test: (accuracy, greedy accuracy)} of a run."""
    x, tests, spent, tokens = [], {}, run["collection"], run["tokens"]
    for phase in run["phases"]:
        spent += phase["selection"]
        for row in phase["rows"]:
            tokens += row.get("tokens", 0)  # the row before the first step has none
            if "eval" in row:
                x.append((row["step"], spent + row["seconds"], tokens))
                for test, result in row["eval"].items():
                    tests.setdefault(test, []).append((result["mean"], result["greedy"]))
        spent += phase["training"]
    return np.array(x).T, {test: np.array(values).T for test, values in tests.items()}


def smoothed(accuracy):
    """Averages each value with its neighbours; the first and the last value have only one neighbour."""
    padded = np.pad(np.asarray(accuracy, float), 1, constant_values=np.nan)
    return np.nanmean(np.stack([padded[:-2], padded[1:-1], padded[2:]]), axis=0)


def crossing(x, y, level):
    """The x at which the curve through the points (x, y) first reaches `level`; infinity if it never does.

    >>> crossing([0, 10, 20], [0.1, 0.3, 0.2], 0.2)
    5.0
    """
    above = np.flatnonzero(np.asarray(y) >= level)
    if len(above) == 0:
        return float("inf")
    i = above[0]
    return float(x[0] if i == 0 else x[i - 1] + (level - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


def evaluated(runs):
    """The test sets of the first run that has evaluations."""
    return next((tests for run in runs if (tests := list(curve(run)[1]))), [])


def plot_accuracy(runs, path):
    """One row per test set, columns for steps, seconds and sampled tokens, two lines per method."""
    tests = evaluated(runs)
    methods = {}
    for run in runs:
        if set(tests) <= set(evaluated([run])):
            methods.setdefault(run["method"], []).append(curve(run))
    if not tests:
        return None
    figure, axes = plt.subplots(len(tests), 3, figsize=(14, 3.4 * len(tests)), sharey="row", squeeze=False)
    for row, test in zip(axes, tests):
        for method, curves in methods.items():
            accuracy = np.array([tests_of[test] for _, tests_of in curves])  # [seeds, 2, evaluations]
            for axis, x in zip(row, np.mean([x for x, _ in curves], axis=0)):
                color = COLORS.get(method)
                axis.plot(x, accuracy[:, 0].mean(0), color=color, label=method, lw=2)
                axis.plot(x, accuracy[:, 1].mean(0), color=color, ls=":", lw=1)
                if len(curves) > 1:
                    low, high = accuracy[:, 0].min(0), accuracy[:, 0].max(0)
                    axis.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
        row[0].set_ylabel(f"{test}: mean reward")
    labels = "GRPO steps", "seconds (collection, selection, training)", "sampled tokens (the same)"
    for axis, label in zip(axes[-1], labels):
        axis.set_xlabel(label)
    axes[0, 0].legend(frameon=False, title="solid: sampled, dotted: greedy", title_fontsize=8)
    return save_lines(figure, path)


def plot_training(runs, path):
    """Entropy and mean response length by step, one line per method: the mean over its runs."""
    labels = {"entropy": "entropy per token (nats)", "response_length": "tokens per response"}
    methods = {}
    for run in runs:
        rows = [row for phase in run["phases"] for row in phase["rows"] if row["step"]]
        if rows and all(name in row for row in rows for name in labels):
            methods.setdefault(run["method"], []).append(rows)
    if not methods:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
    for axis, (name, label) in zip(axes, labels.items()):
        for method, seeds in methods.items():
            values = np.mean([[row[name] for row in rows] for rows in seeds], axis=0)
            axis.plot([row["step"] for row in seeds[0]], values, color=COLORS.get(method), label=method)
        axis.set_xlabel("GRPO steps")
        axis.set_ylabel(label)
    axes[0].legend(frameon=False)
    return save_lines(figure, path)


def save_lines(figure, path):
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_xlim(left=0)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    return path


def shares(labels, groups):
    """Percentage of each label in each group of labels: [labels, groups]."""
    return np.array([[100 * np.mean(np.asarray(group) == label) for group in groups] for label in labels])


def plot_selected(runs, path):
    """For each method that selects: the share of each family and pass rate in the pool and in each phase."""
    first = {}
    for run in runs:
        first.setdefault(run["method"], run)  # one seed per method
    runs = [run for method, run in first.items() if method not in ("full", "dapo")]
    if not runs:
        return None
    k = runs[0]["rewards"].shape[1]
    columns = 2 if any(runs[0]["families"]) else 1
    figure, axes = plt.subplots(len(runs), columns, figsize=(5.5 * columns, 4.2 * len(runs)), squeeze=False)
    for row, run in zip(axes, runs):
        correct = run["rewards"].sum(1).round().astype(int)  # [N], of K
        rates = [f"{c}/{k}" for c in range(k + 1)]
        properties = [("pass rate under the base policy", correct, range(k + 1), rates)]
        if columns == 2:
            families = sorted(set(run["families"]))
            properties.insert(0, ("family", np.array(run["families"]), families, families))
        for axis, (title, values, labels, names) in zip(row, properties):
            table = shares(labels, [values] + [values[phase["selected"]] for phase in run["phases"]])
            axis.imshow(table, cmap="Reds", vmin=0, vmax=table.max(), aspect="auto")
            phases = [f"phase {m}" for m in range(len(run["phases"]))]
            axis.set_xticks(range(table.shape[1]), ["pool", *phases], fontsize=8)
            axis.set_yticks(range(len(names)), names, fontsize=8)
            axis.set_title(f"{run['method']}: % by {title}", fontsize=10)
            for (i, j), value in np.ndenumerate(table):
                color = "white" if value > 0.6 * table.max() else "black"
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    return path


def print_table(runs):
    tests = evaluated(runs)
    if tests:
        print("\nAccuracies: greedy decoding (mean of the samples; the same at temperature 0)", end="")
    print(f"\n{'method':<13}{'phase':>5}{'selected':>10}{'selection s':>13}{'training s':>12}"
          + "".join(f"{test:>16}" for test in tests))
    for run in runs:
        method, phases = run["method"], run["phases"]
        if evaluated([run]):
            start = phases[0]["rows"][0] if phases[0]["rows"] else {}
            print(f"{method:<13}{'base':>5}{'':>35}{accuracies(start, tests)}")
        for m, phase in enumerate(phases):
            end = phase["rows"][-1] if phase["rows"] else {}
            print(f"{method:<13}{m:>5}{len(phase['selected']):>10}{phase['selection']:>13.1f}"
                  f"{phase['training']:>12.1f}{accuracies(end, tests)}".rstrip())
        print(f"{method:<13}collection {run['collection']:.1f} s")
        if not evaluated([run]):
            print(f"{method:<13}no accuracies: its phases have no metrics.jsonl with evaluations")


def accuracies(row, tests):
    """The accuracies on each test set in a row of metrics.jsonl, as text; blank where there are none."""
    text = ""
    for test in tests:
        found = row.get("eval", {}).get(test)
        text += f"{found['greedy']:>8.3f} ({found['mean']:.3f})" if found else " " * 16
    return text


def print_headline(runs):
    """Steps and seconds to full data's smoothed final accuracy on the first test set, by both measures."""
    curves = {run["method"]: curve(run) for run in runs if evaluated([run])}
    if "full" not in curves:
        return
    test = next(iter(curves["full"][1]))
    curves = {method: (x, tests) for method, (x, tests) in curves.items() if test in tests}
    sampled, greedy = curves["full"][1][test]
    measures = {"greedy decoding": 1, "the mean of the samples": 0}  # their places in a curve
    if np.array_equal(sampled, greedy):
        del measures["the mean of the samples"]  # evaluated at temperature 0
    for measure, place in measures.items():
        level = smoothed(curves["full"][1][test][place])[-1]
        print(f"\nBy {measure} full data ends at {level:.3f} on {test} (smoothed). To reach it:")
        for method, (x, tests) in curves.items():
            steps, seconds = (crossing(axis, smoothed(tests[test][place]), level) for axis in x[:2])
            reached = f"{steps:.0f} steps, {seconds:.0f} s" if np.isfinite(steps) else "not reached"
            print(f"{method:<13} {reached}")


def print_prompts(folder, run):
    """The three prompts that were selected first, in the first and in the last phase, as text."""
    try:
        rollouts = torch.load(folder.parent / "rollouts/train.pt", weights_only=True, mmap=True)
        prompts = rollouts["prompt_tokens"].split(rollouts["prompt_lengths"].tolist())
        tokenizer = AutoTokenizer.from_pretrained(rollouts["meta"]["model"])
    except Exception:  # the base policy was moved; transformers raises a dozen types
        return
    for m in {0, len(run["phases"]) - 1}:
        print(f"\nSelected first by {run['method']} in phase {m}:")
        for i in run["phases"][m]["selected"][:3]:
            text = " ".join(tokenizer.decode(prompts[i]).split())
            print(f"  {text[:200]}  (answer {rollouts['answers'][i][:40]})")


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("runs", nargs="+", type=Path, help="folders RUN/METHOD made by run_cropi.sh")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the plots (the current one)")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # some prompts have characters that it cannot show
    runs = [read_run(folder) for folder in args.runs]
    args.out.mkdir(parents=True, exist_ok=True)
    print_table(runs)
    print_headline(runs)
    print()
    for path in (plot_accuracy(runs, args.out / "accuracy.png"),
                 plot_training(runs, args.out / "training.png"),
                 plot_selected(runs, args.out / "selected.png")):
        if path:
            print(path)
    if runs[-1]["method"] not in ("full", "dapo"):
        print_prompts(args.runs[-1], runs[-1])


if __name__ == "__main__":
    main()
