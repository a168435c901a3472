"""Evaluates the runs of experiments/protocol2.sh by protocol 2 of experiments/README.md.

Reads   experiments/results/protocol2/NAME-SEED.json, the main methods, and protocol2_extras/NAME-SEED.json,
        the extras, if there are any. Methods are compared within one of the two folders, where all runs of a
        seed began with one policy.
Writes  experiments/results/protocol2.json   for "main" and "extras", and each measure, greedy and sampled
                                             (the mean at T = 1), what acceleration.json has: accelerations,
                                             accuracies at half and end, paired differences with their 95%
                                             intervals; accuracies of the base policy; seconds of one phase;
                                             differences in accuracy after equal seconds
        experiments/results/protocol2.png    targeted accuracy against steps and against seconds
Prints  these tables, and the claims with their verdicts.

    bash experiments/protocol2.sh
    python experiments/protocol2.py
"""

import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from acceleration import AXES, RESULTS, TESTS, evaluate, interval
from plot import smoothed

MEASURES = {"greedy": "greedy", "sampled": "accuracy"}  # their names in the stored runs
ROWS = {"full": "full data", "influence": "influence once", "cropi": "CROPI",
        "economical": "economical CROPI", "dynamic": "economical CROPI, DYNAMIC=1",
        "dapo": "DAPO", "responses": "CROPI, RESPONSES=2",
        "candidates": "CROPI, CANDIDATES=1/4, random in phase 0", "momentum": "CROPI, MOMENTUM=0.5",
        "cheap": "CROPI, RESPONSES=2 MOMENTUM=0.5",
        "allfirst": "CROPI, RESPONSES=2 MOMENTUM=0.5 CANDIDATES=1/4, all in phase 0", "k4": "CROPI, K=4",
        "random": "random", "passrate": "pass rate", "learnability": "learnability"}  # in this order
# README's rows
SUMMARY = {"base": "base policy", "full": "full data (`METHOD=full`)",
           "influence": "influence once (`METHOD=influence`)", "cropi": "**CROPI**",
           "dapo": "DAPO (`METHOD=dapo`), six seeds",
           "economical": "economical CROPI (`RESPONSES=2 MOMENTUM=0.5 CANDIDATES=1/4`, random in phase 0)"}
ECONOMIES = {"responses": "RESPONSES=2", "candidates": "CANDIDATES=1/4, random in phase 0",
             "momentum": "MOMENTUM=0.5", "cheap": "RESPONSES=2 MOMENTUM=0.5",
             "economical": "RESPONSES=2 MOMENTUM=0.5 CANDIDATES=1/4, random in phase 0 (economical)",
             "allfirst": "RESPONSES=2 MOMENTUM=0.5 CANDIDATES=1/4, all in phase 0", "k4": "K=4"}
PAIRS = (("influence", "full"), ("dynamic", "economical"), *((name, "cropi") for name in ECONOMIES))
BASELINES = {"main": ("full", "influence", "dapo"),
             "extras": ("random", "passrate", "learnability")}  # of claim 3
DRAWN = {"full": "#34495e", "influence": "#e59866", "cropi": "#c0392b", "economical": "#2980b9"}


def load(part="main"):
    """{method: {seed: stored run}}, in the order of ROWS. part: main or extras."""
    methods = {name: {} for name in ROWS}
    folder = RESULTS / ("protocol2" if part == "main" else "protocol2_extras")
    for path in sorted(folder.glob("*.json")):
        name, _, seed = path.stem.rpartition("-")
        methods[name][int(seed)] = run = json.loads(path.read_text())
        full = json.loads((folder / f"full-{seed}.json").read_text())
        if run["base_policy"] != full["base_policy"]:
            raise SystemExit(f"{path}: found base policy {run['base_policy']}; expected full data's of this "
                             f"seed, {full['base_policy']}; make all runs of a seed on one machine")
    return {name: runs for name, runs in methods.items() if runs}


def one_phase(runs):
    """Mean, lowest and highest seconds of selection and of training in a phase (of training a run's mean)."""
    selection = np.array([run["selection"] for run in runs])  # [seeds, phases]
    training = [(run["seconds"][-1] - run["collection"] - sum(run["selection"])) / len(run["selection"])
                for run in runs]
    return {name: {"mean": round(float(np.mean(values)), 2), "min": round(float(np.min(values)), 2),
                   "max": round(float(np.max(values)), 2)}
            for name, values in (("selection", selection), ("training", np.array(training)))}


def after_equal_seconds(methods, measure, one, other):
    """Difference in smoothed targeted accuracy when as many seconds have passed as full data's run takes."""
    differences = []
    for seed in sorted(set(methods[one]) & set(methods[other])):
        end = methods["full"][seed]["seconds"][-1]
        values = []
        for run in (methods[one][seed], methods[other][seed]):
            curve = smoothed(run[measure]["targeted"])
            values.append(np.interp(end, run["seconds"], curve))
        differences.append(values[0] - values[1])
    return interval(differences)


def table(result):
    """Lines of a Markdown table: a row per method of one measure."""
    columns = ("method (seeds)", "targeted, step 140", "targeted, step 280 (each seed)",
               "CROPI minus it, same seeds", "related", "other", "speed-up in steps", "tokens", "seconds")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, seeds in result["seeds"].items():
        final = {test: result["final_accuracy"][test][name] for test in TESTS}
        each = ", ".join(f"{value:.3f}" for value in final["targeted"]["per_seed"])
        difference = ""
        if f"cropi - {name}" in result["differences"]:
            difference = plus_minus(result["differences"][f"cropi - {name}"]["final"]["targeted"])
        cells = [f"{ROWS[name]} ({len(seeds)})", f"{result['half_accuracy']['targeted'][name]['mean']:.3f}",
                 f"{final['targeted']['mean']:.3f} ({each})", difference,
                 f"{final['related']['mean']:.3f}", f"{final['other']['mean']:.3f}"]
        for axis in ("step", "token", "wall"):
            median = result[f"{axis}_acceleration"][name]["median"]
            cells.append(f"{median:.2f}" if median else "never")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def summary(results):
    """README's table, a row per method: greedy (sampled). Accuracies at the end; medians of speed-ups."""
    columns = ("method", *TESTS, "speed-up in GRPO steps", "in sampled tokens", "in seconds")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, label in SUMMARY.items():
        both = [summary_row(results[measure], name) for measure in MEASURES]
        cells = [f"{greedy} ({sampled})" for greedy, sampled in zip(*both)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def summary_row(result, name):
    """A method's accuracies and speed-ups by one measure, as text."""
    if name == "base":
        return [f"{result['base_accuracy'][test]:.3f}" for test in TESTS]
    accuracies = [f"{result['final_accuracy'][test][name]['mean']:.3f}" for test in TESTS]
    speed_ups = [result[f"{axis}_acceleration"][name]["median"] for axis in ("step", "token", "wall")]
    return accuracies + [f"{value:.2f}x" for value in speed_ups]


def economy_table(parts):
    """Lines of a Markdown table: what a cheaper selection loses against CROPI on the same seeds."""
    columns = ("CROPI with", "seeds", "selected prompts that are targeted",
               "greedy minus CROPI, step 140; 280", "sampled minus CROPI, step 140; 280",
               "not worse than CROPI: greedy; sampled")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, label in ECONOMIES.items():
        results = parts.get("main" if name == "economical" else "extras")
        if results is None or name not in results["targeted_share"]:
            continue
        seeds = results["greedy"]["seeds"][name]
        cells = [label, f"{min(seeds)} to {max(seeds)}",
                 f"{results['targeted_share'][name]:.2f} (CROPI {results['targeted_share']['cropi']:.2f})"]
        verdicts = []
        for measure in MEASURES:
            found = results[measure]["differences"][f"{name} - cropi"]
            found = [found[place]["targeted"] for place in ("half", "final")]
            cells.append("; ".join(plus_minus(difference) for difference in found))
            verdicts.append(not_worse(found))
        cells.append("; ".join(verdicts))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def not_worse(differences):
    """The verdict of claim 7 for a method's differences from CROPI at half and at the end."""
    lower = [ends(found)[0] for found in differences]
    upper = [ends(found)[1] for found in differences]
    return verdict(min(lower) > -0.02, min(upper) < 0)


def ends(difference):
    """Both ends of a difference's 95% interval, which is infinite for one seed."""
    half = difference["half_width_95"]
    half = np.inf if half is None else half
    return difference["mean"] - half, difference["mean"] + half


def claims(main, extras=None):
    """[(claim, the numbers that decide it, verdict)] of one measure, by the rules of the protocol.

    main, extras: this measure's results of the two parts; without extras claim 3 compares with fewer methods.
    """
    def speed_up(axis, name, paper):
        found = main[f"{axis}_acceleration"][name]
        each = found["per_seed"]
        holds = verdict(found["median"] >= paper, found["median"] < 1, between="in direction")
        return f"{found['median']:.2f} ({min(each):.2f} to {max(each):.2f})", holds

    def compared(one, other, place, test="targeted", result=main):
        """The difference, and both ends of its interval."""
        found = result["differences"][f"{one} - {other}"][place][test]
        return found, *ends(found)

    against = {}
    for part, result in (("main", main), ("extras", extras)):
        for name in BASELINES[part]:
            if result and name in result["seeds"]:
                against[name] = [compared("cropi", name, place, result=result) for place in ("half", "final")]
    nearest = [min(against, key=lambda name: against[name][i][0]["mean"]) for i in range(2)]
    best = [f"{ROWS[name]} {plus_minus(against[name][i][0])}" for i, name in enumerate(nearest)]
    best = (f"minus the next, half: {best[0]}; end: {best[1]}",
            verdict(all(found["mean"] > 0 for of in against.values() for found, _, _ in of),
                    any(high < 0 for of in against.values() for _, _, high in of)))
    again, again_low, again_high = compared("cropi", "influence", "final")
    once, once_low, _ = compared("influence", "full", "final")
    related, _, related_high = compared("cropi", "full", "final", "related")
    cheap = [compared("economical", "cropi", place)[0] for place in ("half", "final")]
    return [
        ("1. fewer steps to full data's final targeted accuracy: 2.66x", *speed_up("step", "cropi", 2.66)),
        ("2. less time, collection and selection counted: 2.16x", *speed_up("wall", "cropi", 2.16)),
        ("3. CROPI is the best method on the targeted tests", *best),
        ("4. selecting in every phase beats selecting once", plus_minus(again),
         verdict(again_low > 0, again_high < 0)),
        ("5. influence once does not beat full data", plus_minus(once), verdict(once_low <= 0, once_low > 0)),
        ("6. no loss on related tests", plus_minus(related), verdict(related_high >= 0, related_high < 0)),
        ("7. ours: economical CROPI is not worse than CROPI",
         " (half); ".join(plus_minus(found) for found in cheap), not_worse(cheap)),
        ("8. ours: economical CROPI saves time: 2.16x", *speed_up("wall", "economical", 2.16))]


def claims_table(parts):
    """Lines of a Markdown table: a row per claim, a column per measure."""
    lines = ["| claim | greedy | sampled |", "|---|---|---|"]
    both = [claims(*(parts[part][measure] for part in parts)) for measure in MEASURES]  # main, and extras
    for greedy, sampled in zip(*both):
        lines.append(f"| {greedy[0]} | {greedy[1]}: **{greedy[2]}** | {sampled[1]}: **{sampled[2]}** |")
    return lines


def verdict(holds, fails, between="undecided"):
    return "holds" if holds else "does not hold" if fails else between


def plus_minus(difference):
    half = difference["half_width_95"]
    return f"{difference['mean']:+.3f}" + (f" ± {half:.3f}" if half is not None else "")


def draw(methods, path):
    """Targeted accuracy, mean over the seeds: solid by greedy decoding, dotted the sampled mean."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True)
    for name in [name for name in DRAWN if name in methods]:
        runs = list(methods[name].values())
        for axis, x in zip(axes, AXES):
            at = np.mean([run[x] for run in runs], axis=0)
            for measure, style in (("greedy", "-"), ("accuracy", ":")):
                curves = np.array([run[measure]["targeted"] for run in runs])  # [seeds, evaluations]
                label = f"{ROWS[name]}, {len(runs)} seeds" if measure == "greedy" else None
                axis.plot(at, curves.mean(0), style, color=DRAWN[name], lw=2, label=label)
    for axis, label in zip(axes, ("GRPO steps", "seconds: collection, selection, training")):
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("targeted accuracy")
    axes[0].legend(frameon=False, fontsize=8, title="solid: greedy; dotted: sampled, T = 1", title_fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def report(methods):
    """The results of one part, from its {method: {seed: run}}; prints its tables."""
    results = {}
    for measure, stored in MEASURES.items():
        results[measure] = evaluate(methods, measure=stored, pairs=PAIRS)
        base = {test: round(float(np.mean([run[stored][test][0] for run in methods["full"].values()])), 4)
                for test in TESTS}
        results[measure]["base_accuracy"] = base
        results[measure]["after_equal_seconds"] = {
            f"cropi - {name}": after_equal_seconds(methods, stored, "cropi", name)
            for name in methods if name != "cropi"}
        print(f"\n{measure}; base policy:", ", ".join(f"{test} {value:.3f}" for test, value in base.items()))
        print("\n".join(table(results[measure])))
        for pair, places in results[measure]["differences"].items():
            for place, tests in places.items():
                print(f"{pair}, {place}:", ", ".join(f"{t} {plus_minus(d)}" for t, d in tests.items()))
        for pair, found in results[measure]["after_equal_seconds"].items():
            print(f"{pair}, after full data's seconds: {plus_minus(found)}")
    results["seconds_of_one_phase"] = {name: one_phase(list(runs.values())) for name, runs in methods.items()}
    results["targeted_share"] = {}  # of the selected prompts, mean over the phases and seeds
    for name, runs in methods.items():
        phases = [phase["targeted"] for run in runs.values() for phase in run["selected"]]
        results["targeted_share"][name] = round(float(np.mean(phases)), 3)
    for name, found in results["seconds_of_one_phase"].items():
        print(f"{name}, seconds of a phase: {found}")
    return results


def main():
    parts = {}
    for part in ("main", "extras"):
        methods = load(part)
        if methods:
            print(f"\n== {part} ==")
            parts[part] = report(methods)
    for lines in (claims_table(parts), summary(parts["main"]), economy_table(parts)):
        print("", *lines, sep="\n")
    stored = {"command": "bash experiments/protocol2.sh", **parts}
    (RESULTS / "protocol2.json").write_text(json.dumps(stored, indent=1) + "\n")
    draw(load(), RESULTS / "protocol2.png")


if __name__ == "__main__":
    main()
