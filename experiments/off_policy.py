"""Estimators of a prompt's gradient from old responses, compared at the policies of CROPI's phases.

The policies are those after 1, 2 and 3 phases of the CROPI run (the equation) of each seed of
experiments/acceleration.sh; there, the same old responses are weighed in several ways (estimators.py):

rho          the equation
clip         PPO's clip; recentred: an option of the authors' release; no-ratio: weight 1
10, 5, 2, 1  weight min(rho, c), c as given (sketch.py --rho-max)
unit         the equation; the validation mean is that of unit gradients
fresh        the equation with as many responses, sampled from the current policy

For the train prompts (every sixth one, K = 8):

cosine       mean cosine of a prompt's gradient with the one from 64 further fresh responses, over every
             twelfth prompt, of those that have both; above_0.6: the share of such cosines
overlap      of every twelfth prompt, the top 10% by cosine with the validation mean, against the top 10% by
             the fresh gradients and means; mean over the two sets. Chance: 0.1
targeted     share of the selection (score.py, ALPHA = 0.03) that is of the targeted families
as_rho       overlap of this selection with that of rho

For the two validation sets (100 prompts, K = 16), means over the sets except in per_set:

top_five, effective    of the prompts' squared gradient norms (score.py, `trust`)
halves       cosine between the means over even and over odd responses
fresh        cosine of the validation mean with that of 64 further fresh responses; in `reference`, what
             their own halves have

Gradients are sketched with keep = 1 and dim 32768 (standard error of a cosine: about 0.006).
`effective_by_phase`: the effective number for every c at the policies after 0 to 7 phases. `small_lr`: as_rho
of the policy after one phase at a learning rate of 1e-6 (seed 0), where all should select the same.

    for seed in 0 1 2 3; do python experiments/off_policy.py $seed; done    after experiments/acceleration.sh;
                                              resumable; 7 minutes a seed
    python experiments/off_policy.py          evaluates: writes experiments/results/off_policy.json and .png
"""

import json
import subprocess
import sys
from fractions import Fraction

import matplotlib
import numpy as np
import torch
import transformers

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from estimators import EQUATION, ROOT, SURROGATES, sample, sketch
from sparse_ratio import RESULTS, gradients_of

sys.path.insert(0, str(ROOT))
import score

RUNS, OUT = ROOT / "runs/acceleration", ROOT / "runs/off_policy"
SETS, TARGETED, ALPHA, REFERENCE = ("val_sort", "val_dbl"), ("sort", "dbl"), Fraction("0.03"), 64
CUTS, EVERY, PHASES = (10, 5, 2, 1), 6, range(1, 4)


def truncated(c):
    return lambda logp, logp_beta, advantages, mask, k, _: EQUATION(logp, logp_beta, advantages, mask, k, c)


ESTIMATORS = {**SURROGATES, **{str(c): truncated(c) for c in CUTS}}


def gradients(policy, rollouts, chosen=None, estimator="rho", every=1):
    """Sketches [N / every, dim] from a range of each prompt's responses; zero rows for equal rewards."""
    rewards = rollouts["rewards"][:, chosen or slice(None)]
    varied = [i for i in (rewards.std(1) > 0).nonzero()[:, 0].tolist() if i % every == 0]
    projection = sketch.Projection(0, 1.0, 32768, "cpu")
    found = torch.zeros(-(-len(rewards) // every), projection.dim)
    sketch.off_policy_surrogate = ESTIMATORS[estimator]
    for places, sketches in gradients_of(policy, rollouts, varied, projection, chosen, 4096):
        found[[varied[place] // every for place in places]] += sketches
    sketch.off_policy_surrogate = EQUATION
    return found


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def scores(sketches, means):
    return score.popi(sketches, sketches.norm(dim=1, keepdim=True), torch.stack(means)).numpy()


def selection(train, means):
    values = score.reciprocal_rank_fusion(scores(train, means), int(ALPHA * len(train)))
    return score.select(values, int(ALPHA * len(train))).tolist()


def top(column):
    """The top 10% of a column of scores; never a prompt without a gradient."""
    best = np.argsort(-column, kind="stable")[:len(column) // 10]
    return set(best[np.isfinite(column[best])].tolist())


def compare(train, sets, reference, families, rho_selected):
    """The measures of one estimator. train [N, dim]; sets: {name: (all, even, odd responses) [100, dim]}."""
    means, per_set = [], {}
    for name, (whole, even, odd) in sets.items():
        trust = score.trust(whole.norm(dim=1), torch.stack([whole[::2].sum(0), whole[1::2].sum(0)]))
        means.append(whole.mean(0))
        per_set[name] = {"top_five": trust["top_five_share"], "effective": trust["effective_prompts"],
                         "halves": cosine(even.mean(0), odd.mean(0)),
                         "fresh": cosine(means[-1], reference[name].mean(0))}
    some, exact = train[::2], reference["train"]
    both = (some.norm(dim=1) > 0) & (exact.norm(dim=1) > 0)
    cosines = torch.nn.functional.cosine_similarity(some[both], exact[both])
    columns = zip(scores(some, means).T, scores(exact, [reference[name].mean(0) for name in SETS]).T)
    overlaps = [len(top(found) & top(best)) / (len(some) // 10) for found, best in columns]
    selected = selection(train, means)
    result = {"cosine": float(cosines.mean()), "above_0.6": float((cosines > 0.6).float().mean()),
              "overlap": float(np.mean(overlaps)),
              "targeted": float(np.mean([families[i] in TARGETED for i in selected])),
              "as_rho": len(set(selected) & set(rho_selected or selected)) / len(selected)}
    for measure in next(iter(per_set.values())):
        result[measure] = float(np.mean([values[measure] for values in per_set.values()]))
    return {**result, "per_set": per_set}, selected


def effective_by_cut(path, old):
    """{c: effective number of validation prompts, mean over the sets} at one policy."""
    policy, found = sketch.load_policy(path, "cpu", "float32"), {}
    for name in ("rho", *map(str, CUTS)):
        squares = [gradients(policy, old[of], estimator=name).norm(dim=1).double().square() for of in SETS]
        found[name] = float(np.mean([float(s.sum() ** 2 / s.square().sum()) for s in squares]))
    return found


def measure(path, folder, world, old):
    """All estimators at the policy in `path`; fresh responses go to `folder`."""
    policy, meta = sketch.load_policy(path, "cpu", "float32"), old["train"]["meta"]
    folder.mkdir(parents=True, exist_ok=True)
    families, fresh, reference, halves = old["train"]["families"][::EVERY], {}, {}, {}
    for name in ("train", *SETS):
        lines, train = (world / f"{name}.jsonl").read_text().splitlines(), name == "train"
        for kind, k, every in (("fresh", old[name]["meta"]["k"], EVERY), ("reference", REFERENCE, 2 * EVERY)):
            data = folder / f"{kind}-{name}.jsonl"
            data.write_text("".join(line + "\n" for line in lines[::every if train else 1]))
            sample(path, data, data.with_suffix(".pt"), k, meta, {"fresh": 1, "reference": 2}[kind])
        fresh[name] = sketch.load_rollouts(folder / f"fresh-{name}.pt")
        further = sketch.load_rollouts(folder / f"reference-{name}.pt")
        reference[name] = gradients(policy, further)
        halves[name] = [gradients(policy, further, range(start, REFERENCE, 2)) for start in (0, 1)]
    result, rho_selected = {}, None
    for estimator in (*ESTIMATORS, "unit", "fresh"):
        source, name = fresh if estimator == "fresh" else old, estimator if estimator in ESTIMATORS else "rho"
        if estimator != "unit":
            every = EVERY if source is old else 1
            train, sets = gradients(policy, source["train"], estimator=name, every=every), {}
            for of in SETS:
                parts = [None, range(0, source[of]["meta"]["k"], 2), range(1, source[of]["meta"]["k"], 2)]
                sets[of] = [gradients(policy, source[of], part, name) for part in parts]
            if estimator == "rho":
                equation = train, sets
        else:
            train, sets = equation
            sets = {of: [torch.nn.functional.normalize(part, dim=1) for part in parts]
                    for of, parts in sets.items()}
        result[estimator], selected = compare(train, sets, reference, families, rho_selected)
        rho_selected = rho_selected or selected
    both = [part.norm(dim=1) > 0 for part in halves["train"]]
    cosines = torch.nn.functional.cosine_similarity(*halves["train"], dim=1)[both[0] & both[1]]
    per_set = {of: cosine(*(part.mean(0) for part in halves[of])) for of in SETS}
    result["reference"] = {"cosine": float(cosines.mean()), "fresh": float(np.mean(list(per_set.values()))),
                           "per_set": per_set}
    return result


def measure_seed(seed):
    """Measures one seed and saves after each policy."""
    run, out, path = RUNS / f"seed-{seed}", OUT / f"seed-{seed}", RESULTS / f"off_policy/seed-{seed}.json"
    path.parent.mkdir(exist_ok=True)
    saved = json.loads(path.read_text()) if path.exists() else {}
    old = {name: sketch.load_rollouts(run / f"rollouts/{name}.pt") for name in ("train", *SETS)}
    policies = [run / "world/base"] + [run / f"cropi/phase-{m}/policy" for m in range(7)]
    places = {str(m): policies[m] for m in PHASES}
    if seed == "0":
        places["small_lr"] = out / "small-lr"
        if not (out / "small-lr/config.json").exists():
            subprocess.run([
                sys.executable, ROOT / "train_grpo.py", "--model", policies[0], "--lr", "1e-6",
                "--rollouts", run / "rollouts/train.pt", "--select", run / "cropi/phase-0/selected.npy",
                "--steps", "20", "--batch-size", "64", "--batch-tokens", "2048", "--verifier", "exact",
                "--out", out / "small-lr"], check=True)
    for place, policy in places.items():
        if place not in saved:
            saved[place] = measure(policy, out / f"fresh-{place}", run / "world", old)
            path.write_text(json.dumps(saved) + "\n")
    if "effective_by_phase" not in saved:
        saved["effective_by_phase"] = [effective_by_cut(policy, old) for policy in policies]
        path.write_text(json.dumps(saved) + "\n")


def spread(values):
    """Mean, lowest and highest over the seeds."""
    return {"mean": round(float(np.mean(values)), 4), "low": round(float(min(values)), 4),
            "high": round(float(max(values)), 4)}


def evaluate():
    paths = sorted((RESULTS / "off_policy").glob("seed-*.json"))
    seeds = {path.stem.split("-")[1]: json.loads(path.read_text()) for path in paths}
    result = {"command": "python experiments/off_policy.py", "seeds": list(seeds), "phases": {}}
    for m in map(str, PHASES):
        result["phases"][m] = {}
        for estimator, measures in next(iter(seeds.values()))[m].items():
            result["phases"][m][estimator] = {
                name: spread([saved[m][estimator][name] for saved in seeds.values()])
                for name in measures if name != "per_set"}
    result["small_lr"] = {name: values["as_rho"] for name, values in seeds["0"]["small_lr"].items()
                          if name != "reference"}
    result["effective_by_phase"] = {
        c: [spread([saved["effective_by_phase"][m][c] for saved in seeds.values()]) for m in range(8)]
        for c in ("rho", *map(str, CUTS))}
    return result


def draw(result, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    for number, (c, phases) in enumerate(result["effective_by_phase"].items()):
        color, x = plt.cm.viridis(number / 5), np.arange(len(phases))
        left.plot(x, [p["mean"] for p in phases], marker="o", markersize=3, color=color,
                  label="rho (the equation)" if c == "rho" else f"min(rho, {c})")
        left.fill_between(x, [p["low"] for p in phases], [p["high"] for p in phases], color=color, alpha=0.12)
    left.set(xlabel="phases of training", yscale="log",
             ylabel="effective number of validation prompts\n(of 100; mean of two sets)")
    for number, name in enumerate(("rho", "5", "2", "1", "no-ratio", "clip", "fresh")):
        values = [phase[name]["fresh"] for phase in result["phases"].values()]
        right.plot(PHASES, [v["mean"] for v in values], marker="o", markersize=3,
                   label=f"min(rho, {name})" if name.isdigit() else name.replace("-", " "),
                   color="black" if name == "fresh" else f"C{number}")
    right.set(xlabel="phases of training", xticks=PHASES,
              ylabel="cosine of the validation mean\nwith that of 64 fresh responses")
    left.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
    left.minorticks_off()
    left.legend(frameon=False, fontsize=7)
    right.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    for axis in (left, right):
        axis.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    if len(sys.argv) == 2:
        measure_seed(sys.argv[1])
        return
    result = evaluate()
    (RESULTS / "off_policy.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, RESULTS / "off_policy.png")


if __name__ == "__main__":
    main()
