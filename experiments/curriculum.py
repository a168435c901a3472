"""Why recomputing influence in every phase does not beat computing it once: ablations of CROPI's phases.

Each variant starts from the policy after CROPI's first phase (experiments/acceleration.sh) and reruns phases
1 to 3 with one change:

fresh       before each selection the CURRENT policy samples new responses to all train and validation prompts
            (same K)
no ratio    the old responses without the token ratio (rho = 1, with the gradient of log pi)
size        prompts are ranked by the inner product with the validation mean, which depends on the size of a
            prompt's gradient, instead of by the cosine, which does not

    python experiments/curriculum.py run      after experiments/acceleration.sh; about 25 minutes; resumable
    python experiments/curriculum.py          recomputes the numbers and the figure from the runs
    python experiments/curriculum.py plot     redraws the figure from the JSON

Writes experiments/results/curriculum.json and curriculum.png: for each variant and seed the smoothed targeted
accuracy at half of the steps and at the end and the targeted families' share of each selection; and the
deviation of the token ratios from 1.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import matplotlib
import numpy as np
import torch
import transformers

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import plot
import score
import train_grpo
from acceleration import RESULTS, smoothed

RUNS, OUT = ROOT / "runs/acceleration", ROOT / "runs/curriculum"
VARIANTS = ("no ratio", "fresh", "size")
SETS = ("val_sort", "val_dbl")


def stage(script, *arguments):
    subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], check=True,
                   stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def rollouts_for(variant, policy, old, folder, seed):
    """Makes the rollouts that a variant sketches and returns their paths: {train, val_sort, val_dbl}."""
    paths = {name: folder / f"{name}.pt" for name in ("train", *SETS)}
    for name, path in paths.items():
        if path.exists():
            continue
        rollouts = torch.load(old / f"{name}.pt", weights_only=True)
        k, temperature = rollouts["meta"]["k"], rollouts["meta"]["temperature"]
        if variant == "fresh":
            stage("collect.py", "--model", policy, "--data", old.parent / f"world/{name}.jsonl", "--k", k,
                  "--verifier", "exact", "--max-new-tokens", 10, "--seed", seed, "--out", path)
        elif variant == "no ratio":  # with beta = pi_theta the ratio is 1
            ragged = train_grpo.load_rollouts(old / f"{name}.pt")
            model = train_grpo.load_policy(policy, "cpu", "float32")
            prompts = [prompt for prompt in ragged["prompts"] for _ in range(k)]
            logprobs = []
            for start in range(0, len(prompts), 512):
                some = slice(start, start + 512)
                responses = [ragged["responses"][i] for i in range(len(prompts))[some]]
                with torch.no_grad():
                    hidden, tokens, mask = train_grpo.group_hidden(model.base_model, prompts[some], responses)
                    logits = train_grpo.output_logits(model, hidden, temperature)
                logprobs.append(train_grpo.token_logprobs(logits, tokens, mask)[mask])
            torch.save({**rollouts, "logprobs": torch.cat(logprobs)}, path)
        else:
            path.symlink_to(old / f"{name}.pt")
    return paths


def select(variant, folder, rollouts):
    names, out = [folder / f"{name}.npy" for name in ("train", *SETS)], folder / "selected.npy"
    if variant != "size":
        stage("score.py", "--train", names[0], "--val", *names[1:], "--rollouts", rollouts, "--out", out)
        return
    train, *sets = map(np.load, names)
    scores = train @ np.stack([each.mean(0) for each in sets]).T  # [N, V]
    scores[~train.any(1)] = -np.inf
    n = score.selection_size(Fraction("0.1"), len(train))
    np.save(out, score.select(score.reciprocal_rank_fusion(scores, n), n))


def run(seed, variant):
    source, target = RUNS / f"seed-{seed}", OUT / f"seed-{seed}" / variant.replace(" ", "-")
    target.mkdir(parents=True, exist_ok=True)
    policy = source / "cropi/phase-0/policy"
    for m in (1, 2, 3):
        folder = target / f"phase-{m}"
        folder.mkdir(exist_ok=True)
        if not (folder / "selected.npy").exists():
            old = (source / "rollouts").resolve()
            rollouts = rollouts_for(variant, policy, old, folder, 100 * int(seed) + m)
            stage("sketch.py", "--model", policy, "--rollouts", *rollouts.values(), "--out",
                  *(folder / f"{name}.npy" for name in rollouts), "--dim", 8192, "--batch-tokens", 2048,
                  "--seed", seed)
            select(variant, folder, rollouts["train"])
        settings = json.loads((source / f"cropi/phase-{m}/policy/args.json").read_text())
        arguments = []
        for name in ("steps", "batch_size", "group", "lr", "kl_coef", "eval_every", "eval_samples",
                     "save_every", "seed"):
            arguments += [f"--{name.replace('_', '-')}", settings[name]]
        stage("train_grpo.py", "--model", policy, "--ref", source / "world/base",
              "--rollouts", source / "rollouts/train.pt", "--select", folder / "selected.npy",
              "--out", folder / "policy", "--optimizer", policy / "optimizer.pt", "--batch-tokens", 2048,
              *arguments, "--eval", source / "rollouts/targeted.pt")
        policy = folder / "policy"
    print(f"seed {seed}, {variant}: done", flush=True)


def curve(folders):
    """{step: targeted accuracy} over the evaluations of these phases."""
    found = {}
    for folder in folders:
        for row in map(json.loads, (folder / "policy/metrics.jsonl").read_text().splitlines()):
            if "eval" in row:
                found[row["step"]] = row["eval"]["targeted"]["mean"]
    return found


def log_ratios(seed, m):
    """|log rho| of every response token at the policy before phase m.

    The rollouts of "no ratio" hold that policy's log-probs, the rollouts of the run those of the base policy.
    """
    new = torch.load(OUT / seed / f"no-ratio/phase-{m}/train.pt", weights_only=True)["logprobs"]
    return (new - torch.load(RUNS / seed / "rollouts/train.pt", weights_only=True)["logprobs"]).abs()


def measure():
    seeds = sorted(path.name for path in OUT.glob("seed-*"))
    result = {"command": "python experiments/curriculum.py", "seeds": seeds, "curves": {},
              "targeted_share": {}, "torch": torch.__version__,
              "transformers": transformers.__version__, "drift": []}
    for m in (1, 2, 3):
        logs = torch.cat([log_ratios(seed, m) for seed in seeds])
        outside = (logs > np.log(2)).float().mean()
        result["drift"].append({"phase": m, "mean |log rho|": round(float(logs.mean()), 3),
                                "share outside 1/2..2": round(float(outside), 3)})
    for variant in ("cropi", "influence", *VARIANTS):
        curves, shares = [], []
        for seed in seeds:
            own = OUT / seed / variant.replace(" ", "-") if variant in VARIANTS else RUNS / seed / variant
            first = RUNS / seed / "cropi" if variant in VARIANTS else own
            folders = [first / "phase-0", *(own / f"phase-{m}" for m in (1, 2, 3))]
            curves.append(curve(folders))
            families = np.array(torch.load(RUNS / seed / "rollouts/train.pt", weights_only=True)["families"])
            targeted = np.isin(families, ("sort", "dbl"))
            chosen = [np.load(folder / "selected.npy") for folder in folders]
            shares.append([round(float(targeted[each].mean()), 4) for each in chosen])
        result["curves"][variant] = {"steps": list(curves[0]), "targeted": [list(c.values()) for c in curves]}
        result["targeted_share"][variant] = shares
        values = np.array([smoothed(list(c.values())) for c in curves])  # [seeds, evaluations]
        for key, place in (("half_accuracy", values.shape[1] // 2), ("final_accuracy", -1)):
            result.setdefault(key, {})[variant] = {"mean": round(float(values[:, place].mean()), 4),
                                                   "per_seed": values[:, place].round(4).tolist()}
    return result


def draw(result, path):
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    colors = {"cropi": plot.COLORS["cropi"], "influence": plot.COLORS["influence"], "fresh": "#34495e",
              "no ratio": "#8e44ad", "size": "#16a085"}
    for variant, curves in result["curves"].items():
        values = np.array([smoothed(each) for each in curves["targeted"]])
        axes[0].plot(curves["steps"], values.mean(0), color=colors[variant], label=variant)
        axes[1].plot(range(4), np.mean(result["targeted_share"][variant], axis=0), marker="o", markersize=3,
                     color=colors[variant])
    axes[0].set(xlabel="GRPO steps", ylabel="targeted: mean reward, smoothed",
                title=f"means of {len(result['seeds'])} seeds")
    axes[1].set(xlabel="phase", title="targeted families' share of the selection", ylim=(0, 1),
                xticks=range(4))
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    if sys.argv[1:] not in ([], ["run"], ["plot"]):
        sys.exit(__doc__)
    path = RESULTS / "curriculum.json"
    if sys.argv[1:] == ["run"]:
        seeds = [folder.name.split("-")[1] for folder in sorted(RUNS.glob("seed-*"))]
        torch.set_num_threads(1)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        jobs = [(seed, variant) for variant in VARIANTS for seed in seeds]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, *zip(*jobs)))
    if sys.argv[1:] != ["plot"]:
        path.write_text(json.dumps(measure(), indent=1) + "\n")
    result = json.loads(path.read_text())
    for variant in result["curves"]:
        shares = np.mean(result["targeted_share"][variant], axis=0).round(2)
        half, end = result["half_accuracy"][variant], result["final_accuracy"][variant]
        print(f"{variant:12} half {half['mean']:.3f}, end {end['mean']:.3f} {end['per_seed']}, "
              f"targeted {shares.tolist()}")
    print(*result["drift"], sep="\n")
    draw(result, RESULTS / "curriculum.png")


if __name__ == "__main__":
    main()
