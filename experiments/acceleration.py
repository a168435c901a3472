"""Evaluates the runs of experiments/acceleration.sh by the protocol of experiments/README.md.

store RUN FILE    saves a finished run's numbers: settings, evaluations (steps, seconds, tokens, accuracies),
                  the seconds and the properties of each selection, the trust in the validation means and the
                  mean cosine of targeted prompts, selected before or not. acceleration.sh calls it.
pilot             reads experiments/results/pilot/*.json; prints by which score c was chosen.
(nothing)         reads experiments/results/acceleration/*.json; writes acceleration.json and acceleration.png
                  (accuracy against steps, seconds and sampled tokens: mean over the seeds, band from the
                  lowest to the highest) and prints the tables of docs/results.md.

In acceleration.json, for every method: step_acceleration, wall_acceleration and token_acceleration (median,
per_seed): what full data needs to reach its own smoothed final accuracy over what the method needs to reach
the same; half_accuracy and final_accuracy of each test (mean, per_seed), smoothed; differences: of CROPI and
each method and of PAIRS, on the seeds that both have (mean, 95% interval by Student's t, per_seed).

    bash experiments/acceleration.sh
    python experiments/acceleration.py
"""

import hashlib
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
from plot import crossing, smoothed
from selection import properties, selected_properties

TESTS = ("targeted", "related", "other")
ROWS = {"full": "full data", "influence": "influence once", "cropi": "CROPI",
        "cropi (truncated)": "CROPI, RHO_MAX=2", "cropi (clip)": "CROPI, PPO's clip",
        "cropi (no-ratio)": "CROPI, no ratio", "cropi (fresh)": "CROPI, fresh responses in each phase",
        "cropi (third)": "CROPI, CANDIDATES=1/3, random in each phase",
        "influence (alpha)": "influence once, ALPHA=0.1", "cropi (alpha)": "CROPI, ALPHA=0.1", "dapo": "DAPO",
        "random": "random", "passrate": "pass rate", "learnability": "learnability"}  # in this order
AXES = ("steps", "seconds", "tokens")
# Student's t, 97.5% quantile of n - 1 degrees of freedom
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # for n seeds
PAIRS = (("influence", "full"), ("cropi (alpha)", "influence (alpha)"))  # compared, as CROPI with each


def store(folder, path):
    run = plot.read_run(folder)
    x, tests = plot.curve(run)
    settings = {}
    for file in (folder.parent / "rollouts/settings.txt", folder / "settings.txt"):
        for line in file.read_text().splitlines():
            settings[line.partition("=")[0]] = line.partition("=")[2]
    rollouts = torch.load(folder.parent / "rollouts/train.pt", weights_only=True, mmap=True)
    names = [pair.partition("=")[0] for pair in settings["VAL"].split()]
    targeted = np.isin(run["families"], names)
    trusts, cosines, trained = [], [], np.zeros(len(targeted), bool)
    for m, phase in enumerate(run["phases"]):
        if (folder / f"phase-{m}/scores.json").exists():
            trusts.append(list(json.loads((folder / f"phase-{m}/scores.json").read_text()).values()))
            scores = np.load(folder / f"phase-{m}/scores.npy").mean(1)
            groups = [scores[targeted & of & np.isfinite(scores)] for of in (trained, ~trained)]
            cosines.append([[len(group), round(float(group.mean()), 4) if len(group) else None]
                            for group in groups])
        trained[phase["selected"]] = True
        for fresh in folder.glob(f"phase-{m}/fresh-*.pt"):  # what estimators.py sampled for this phase
            tokens = len(torch.load(fresh, weights_only=True, mmap=True)["response_tokens"])
            x[2, x[0] >= phase["rows"][0]["step"]] += tokens
    base = hashlib.sha256((ROOT / settings["MODEL"] / "model.safetensors").read_bytes()).hexdigest()
    result = {"settings": settings, "base_policy": base[:16], "torch": torch.__version__,
              "transformers": transformers.__version__, "threads": torch.get_num_threads(),
              **dict(zip(AXES, x.round(2).tolist())), "collection": round(run["collection"], 2),
              "selection": [phase["selection"] for phase in run["phases"]],
              "pool": properties(rollouts, np.arange(len(targeted)), names),
              "selected": selected_properties(rollouts, [p["selected"] for p in run["phases"]], names),
              "trust": trusts, "cosines": cosines,
              "accuracy": {test: values[0].round(5).tolist() for test, values in tests.items()},
              "greedy": {test: values[1].round(5).tolist() for test, values in tests.items()}}
    path.write_text(json.dumps(rounded(result)) + "\n")


def rounded(value):
    """A nested result with floats of five digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def load():
    """{world: {method: {seed: stored run}}}. The file seed-0-cropi.json is of the world "seed"."""
    worlds = {}
    for path in sorted((RESULTS / "acceleration").glob("*.json")):
        world, seed, method = path.stem.rsplit("-", 2)
        worlds.setdefault(world, {}).setdefault(method, {})[int(seed)] = json.loads(path.read_text())
    for variation in [name for name, methods in worlds.items() if "full" not in methods]:
        for method, runs in worlds.pop(variation).items():  # in the worlds of the seeds
            worlds["seed"][f"{method} ({variation})"] = runs
    return worlds


def interval(differences):
    """Mean and half width of the 95% interval of paired differences."""
    n, half = len(differences), None
    if n > 1:
        half = round(float(STUDENT[n] * np.std(differences, ddof=1) / n**0.5), 4)
    return {"mean": round(float(np.mean(differences)), 4), "half_width_95": half,
            "per_seed": [round(float(d), 4) for d in differences]}


def evaluate(methods, tests=TESTS, measure="accuracy", pairs=PAIRS):
    """The numbers of one world, from its {method: {seed: run}}. measure: accuracy (sampled) or greedy."""
    result, at = {"seeds": {name: sorted(runs) for name, runs in methods.items()}}, {"half": {}, "final": {}}
    for place, values in at.items():
        for test in tests:
            values[test] = {}
            for name, runs in methods.items():
                curves = {seed: smoothed(run[measure][test]) for seed, run in runs.items()}
                values[test][name] = {seed: float(c[len(c) // 2 if place == "half" else -1])
                                      for seed, c in curves.items()}
        result[f"{place}_accuracy"] = {test: {
            name: {"mean": round(float(np.mean(list(seeds.values()))), 4),
                   "per_seed": [round(seeds[seed], 4) for seed in sorted(seeds)]}
            for name, seeds in of_test.items()} for test, of_test in values.items()}
    for axis, key in zip(AXES, ("step", "wall", "token")):
        result[f"{key}_acceleration"] = {}
        for name, runs in methods.items():
            ratios = []
            for seed in sorted(set(runs) & set(methods["full"])):
                full, level = methods["full"][seed], at["final"]["targeted"]["full"][seed]
                needed = [crossing(run[axis], smoothed(run[measure]["targeted"]), level)
                          for run in (full, runs[seed])]
                if needed[1] == 0:
                    print(f"{name}, seed {seed}: no acceleration, full data ends at or below the base policy")
                else:
                    ratios.append(round(needed[0] / needed[1], 3))
            median = float(np.median(ratios)) if ratios else None
            result[f"{key}_acceleration"][name] = {"median": median, "per_seed": ratios}
    result["differences"] = {}
    for one, other in (*(("cropi", name) for name in methods if name != "cropi"), *pairs):
        if one in methods and other in methods:
            shared = sorted(set(methods[one]) & set(methods[other]))
            result["differences"][f"{one} - {other}"] = {
                place: {test: interval([values[test][one][s] - values[test][other][s] for s in shared])
                        for test in tests} for place, values in at.items()}
    return result


def table(result):
    """Lines of a Markdown table: a row per method of one world, with the number of its seeds."""
    columns = ("method (seeds)", "targeted, step 80", "targeted, step 160 (each seed)",
               "CROPI minus it, same seeds", "related", "other", "speed-up in steps", "tokens", "seconds")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in [name for name in ROWS if name in result["seeds"]]:
        half = result["half_accuracy"]["targeted"][name]["mean"]
        final = {test: result["final_accuracy"][test][name] for test in TESTS}
        each = ", ".join(f"{value:.3f}" for value in final["targeted"]["per_seed"])
        difference = ""
        if f"cropi - {name}" in result["differences"]:
            found = result["differences"][f"cropi - {name}"]["final"]["targeted"]
            difference = f"{found['mean']:+.3f} ± {found['half_width_95']:.3f}"
        cells = [f"{ROWS[name]} ({len(result['seeds'][name])})", f"{half:.3f}",
                 f"{final['targeted']['mean']:.3f} ({each})", difference,
                 *(f"{final[test]['mean']:.3f}" for test in ("related", "other"))]
        for axis in ("step", "token", "wall"):
            median = result[f"{axis}_acceleration"][name]["median"]
            cells.append(f"{median:.2f}" if median else "never")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(methods, path):
    figure, axes = plt.subplots(len(TESTS), 3, figsize=(14, 9), sharey="row")
    for row, test in zip(axes, TESTS):
        for name, runs in [(name, runs) for name, runs in methods.items() if name in plot.COLORS]:
            accuracy = np.array([run["accuracy"][test] for run in runs.values()])  # [seeds, evaluations]
            color = plot.COLORS[name]
            for axis, x in zip(row, AXES):
                at = np.mean([run[x] for run in runs.values()], axis=0)
                axis.plot(at, accuracy.mean(0), color=color, label=f"{name}, {len(runs)} seeds", lw=2)
                if len(runs) > 1:
                    axis.fill_between(at, accuracy.min(0), accuracy.max(0), color=color, alpha=0.12, lw=0)
                axis.grid(alpha=0.25)
        row[0].set_ylabel(f"{test}: mean reward")
    for axis, label in zip(axes[-1], ("GRPO steps", "seconds, all stages", "sampled tokens, all stages")):
        axis.set_xlabel(label)
    axes[0, 0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def pilot():
    """Prints, for each c, the mean of the smoothed targeted accuracy over half, end and the seeds."""
    found = {}
    for path in sorted((RESULTS / "pilot").glob("*.json")):
        curve = smoothed(json.loads(path.read_text())["accuracy"]["targeted"])
        found.setdefault(path.stem.split("-")[0], []).append((curve[len(curve) // 2], curve[-1]))
    for c, values in found.items():
        print(f"c = {c}: {np.mean(values):.4f}; half, end of each seed: {np.round(values, 3).tolist()}")


def main():
    if sys.argv[1:] == ["pilot"]:
        pilot()
        return
    if sys.argv[1:2] == ["store"] and len(sys.argv) == 4:
        store(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    if sys.argv[1:]:
        sys.exit(__doc__)
    worlds = load()
    results = {world: evaluate(methods) for world, methods in worlds.items() if "full" in methods}
    (RESULTS / "acceleration.json").write_text(json.dumps(
        {"command": "bash experiments/acceleration.sh", **results.pop("seed"), "other_worlds": results},
        indent=1) + "\n")
    result = json.loads((RESULTS / "acceleration.json").read_text())
    print("\n".join(table(result)))
    for world, found in result["other_worlds"].items():
        print(f"\n{world}", *table(found), sep="\n")
    for pair, places in result["differences"].items():
        for place, tests in places.items():
            found = [f"{test} {value['mean']:+.3f} ± {value['half_width_95']:.3f}"
                     for test, value in tests.items() if value["half_width_95"] is not None]
            print(f"{pair}, {place}: {', '.join(found)}")
    draw(worlds["seed"], RESULTS / "acceleration.png")


if __name__ == "__main__":
    main()
