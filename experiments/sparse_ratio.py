"""Precision of the sketch: does ranking by sketches find the top 10% of ranking by full gradients?

For each share `keep` of kept coordinates and each projection: the overlap between the top 10% by cosine of
sketches with a validation set's mean and the top 10% by cosine of full float32 gradients, among prompts with
reward variance. It is averaged over the validation sets; then mean and spread over seeds of the projection
are reported. 1 is perfect, 0.1 is chance. The correlation of the two cosines is reported, too. All gradients
are sketch.py's, at the base policy in float32. SmolLM2's are stored as bfloat16; both the exact cosines and
the sketches are computed from the stored values.

sjlt          sketch.py's Projection
rademacher    a dense projection with random signs, where kept coordinates x dim stay below --dense-numbers
gaussian      a dense Gaussian projection, sampled from its exact distribution: the sketches of gradients G
              [n, kept] are distributed as C Z / sqrt(dim) with C C^T = G G^T and Z [n, dim] standard normal,
              so no projection matrix is needed
32-bit        an imitation (toy only): sjlt of gradients that are read with 32-bit indices. TRAK's CUDA kernel
              computes row x features in uint32, which overflows in a batch of 16 gradients if 16 x kept >
              2^32: for 1.54e9 parameters, at keep > 0.17. Here element (row, j) of a batch of 16 is read at
              (row x kept + j) mod L, with L = 2^32 scaled by the number of parameters
first         sjlt with the release's mask: drop keeps the first keep x parameters coordinates and no others
float16       sjlt of gradients that were rounded to half precision, as the release's projector takes them
bfloat16      sjlt of a bfloat16 policy's gradients, compared with full float32 gradients of the float32
              policy; keep 0.1 (toy only)

    python experiments/sparse_ratio.py toy                     after run_cropi.sh
    python experiments/sparse_ratio.py smollm2 --prompts 50    after experiments/smollm2.sh; 18 GB of memory
    python experiments/sparse_ratio.py toy --projection sjlt   prints the numbers of this projection only
    python experiments/sparse_ratio.py plot                    redraws the figure from the JSON

Writes experiments/results/sparse_ratio_WORLD.json and sparse_ratio.png, unless --projection
restricts the comparison.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
import transformers
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments/results"
sys.path.insert(0, str(ROOT))
import collect
import sketch

KEEPS = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.15, 0.3, 1.0)
WORLDS = {"toy": ("toy/world/base", "toy/rollouts/train.pt", "toy/rollouts/val_sort.pt",
                  "toy/rollouts/val_dbl.pt"),
          "smollm2": ("smollm2/base", "smollm2/seed-0/rollouts/train.pt",
                      "smollm2/seed-0/rollouts/val_chain_sum.pt")}  # in runs/
PAPER = {0.1: 0.70, 0.15: 0.77, 1.0: 0.14}  # read off the paper's figure for Qwen2.5-1.5B, dim 32768
COLORS = {"sjlt": "C0", "rademacher": "C2", "gaussian": "C3", "32-bit": "C4", "first": "C1", "float16": "C6",
          "bfloat16": "C5"}


class Rademacher(sketch.Projection):
    """The dense projection: every kept coordinate goes to all dim places with random signs / sqrt(dim).

    The sign matrix is made in blocks of 512 kept coordinates, never as a whole. This costs dim times the
    arithmetic of sketch.Projection.
    """

    def add(self, name, gradients, sums):
        gradients = gradients.flatten(1)
        kept, _ = self.draw(name, gradients.shape[1])
        for number, block in enumerate(gradients.index_select(1, kept).split(512, dim=1)):
            generator = torch.Generator().manual_seed(collect.stream_seed(self.seed, name, number))
            signs = torch.randint(2, (block.shape[1], self.dim), generator=generator, dtype=torch.int8)
            sums[:, :self.dim].addmm_(block, (signs * 2 - 1).to(block), alpha=self.dim**-0.5)


class First(sketch.Projection):
    """Keeps the first keep x total coordinates instead of random ones. starts: of each parameter."""

    def __init__(self, seed, keep, dim, device, starts, total):
        super().__init__(seed, keep, dim, device)
        self.starts, self.end = starts, int(keep * total)

    def draw(self, name, numel):
        if name not in self.drawn:
            kept = torch.arange(min(numel, max(0, self.end - self.starts[name])))
            generator = torch.Generator().manual_seed(collect.stream_seed(self.seed, name))
            self.drawn[name] = kept, torch.randint(2 * self.dim, (len(kept),), generator=generator)
        return self.drawn[name]


class Float16(sketch.Projection):
    def add(self, name, gradients, sums):
        super().add(name, gradients.half().float(), sums)


class Whole:
    """Replaces a Projection: the sketch is the full gradient, one parameter after the other."""

    def __init__(self, policy):
        self.starts, self.dim = {}, 0
        for name, parameter in policy.named_parameters():
            self.starts[name] = self.dim
            self.dim += parameter.numel()

    def zeros(self, b):
        return torch.zeros(b, self.dim)

    def add(self, name, gradients, sums):
        gradients = gradients.flatten(1)
        sums[:, self.starts[name]:self.starts[name] + gradients.shape[1]] += gradients

    def sketches(self, sums):
        return sums


def prompts_with_variance(path, limit):
    """At most `limit` random prompts with reward variance, in order."""
    varied = (sketch.load_rollouts(path)["rewards"].std(1) > 0).nonzero()[:, 0]
    order = torch.randperm(len(varied), generator=torch.Generator().manual_seed(0))
    return varied[order[:limit]].sort().values.tolist()


def gradients_of(policy, rollouts, prompts, projection, chosen=None, batch_tokens=1024):
    """Yields (places in `prompts`, sketches) per batch, from sketch_prompts with the given projection.

    prompts: those with reward variance. chosen: a range of each prompt's K responses to use instead of all.
    """
    k = rollouts["meta"]["k"]
    chosen = chosen or range(k)
    advantages = sketch.group_advantage(rollouts["rewards"][:, chosen])
    longest = rollouts["response_lengths"].view(-1, k)[:, chosen].amax(1).tolist()
    places = {prompt: place for place, prompt in enumerate(prompts)}
    sizes = {i: (len(rollouts["prompts"][i]), longest[i]) for i in prompts}
    plan = sketch.plan_batches(sizes, len(chosen), batch_tokens)
    for batch, at_once in tqdm(plan, desc="gradients", unit="batch"):
        for first in range(0, len(chosen), at_once):
            part = slice(first, first + at_once)
            taus = [sketch.select_trajectories(rollouts, i, chosen[part], advantages[i, part]) for i in batch]
            for tau in taus:
                tau.k = len(chosen)
            yield [places[i] for i in batch], sketch.sketch_prompts(policy, projection, taus)[0]


def full_gradients(policy, path, prompts, dtype=torch.float32):
    """[n, parameters] of the prompts, computed in float32 and stored as `dtype`."""
    found = torch.zeros(len(prompts), Whole(policy).dim, dtype=dtype)
    for places, gradients in gradients_of(policy, sketch.load_rollouts(path), prompts, Whole(policy)):
        found[places] += gradients.to(dtype)
    return found


def mean_gradient(policy, path, prompts):
    """float32 [1, parameters]: the mean over the prompts, without storing their gradients."""
    found = gradients_of(policy, sketch.load_rollouts(path), prompts, Whole(policy))
    return sum(gradients.sum(0, keepdim=True) for _, gradients in found) / len(prompts)


def cosines(train, means):
    """[n, V] of train [n, D] and validation means [V, D], in blocks of columns, in float64."""
    dots, squares, norms = 0, 0, 0
    for block, mean in zip(train.split(2**22, 1), means.split(2**22, 1)):
        block, mean = block.double(), mean.double()
        dots, squares, norms = dots + block @ mean.T, squares + (block**2).sum(1), norms + (mean**2).sum(1)
    return dots / (squares[:, None] * norms).sqrt()


def top(column, n):
    return set(torch.argsort(column, descending=True, stable=True)[:n].tolist())


def agreement(found, exact):
    """Top-10% overlap and correlation of two [n, V] of cosines, averaged over the V validation sets."""
    n, overlaps, correlations = round(len(exact) / 10), [], []
    for ours, truth in zip(found.T, exact.T):
        overlaps.append(len(top(ours, n) & top(truth, n)) / n)
        ours = ours.nan_to_num()
        correlations.append(np.corrcoef(ours, truth)[0, 1] if ours.std() > 0 else 0)
    return float(np.mean(overlaps)), float(np.mean(correlations))


def sketch_cosines(sketches, n):
    """Cosines [n, V] from sketches [n + V, dim], the last V of validation means; NaN for a zero sketch."""
    units = sketches.double() / sketches.double().norm(dim=1, keepdim=True)
    return units[:n] @ units[n:].T


def curves(policy, train, means, seed, dim, dense_numbers, kinds, keeps=KEEPS):
    """{(kind, keep, seed): cosines [n, V]} from sketches of train [n, D] and validation means [V, D]."""
    starts, n, total = Whole(policy).starts, *train.shape
    projections = {}
    for kind in kinds:
        make = {"rademacher": Rademacher, "float16": Float16,
                "first": partial(First, starts=starts, total=total)}.get(kind, sketch.Projection)
        for keep in keeps:
            if kind != "rademacher" or keep * total * dim <= dense_numbers:
                projections[kind, keep, seed] = make(seed, keep, dim, "cpu")
    grams, sums = {}, {}
    for cell, projection in projections.items():
        if cell[0] == "gaussian":
            grams[cell] = torch.zeros(n + len(means), n + len(means))
        else:
            sums[cell] = projection.zeros(n + len(means))
    parameters = {name: parameter.numel() for name, parameter in policy.named_parameters()}
    for name, numel in tqdm(parameters.items(), desc=f"projections, seed {seed}", unit="parameter"):
        here, step = slice(starts[name], starts[name] + numel), max(1, 2**25 // numel)
        for cell, gram in grams.items():
            for some in projections[cell].draw(name, numel)[0].split(2**20):
                part = torch.cat([rows[:, here].index_select(1, some).float() for rows in (train, means)])
                gram += part @ part.T
        for rows, first in ((train, 0), (means, n)):
            for start in range(0, len(rows), step):  # rows of this parameter in float32: at most 2^25 numbers
                block = rows[start:start + step, here].float()
                for cell, into in sums.items():
                    projections[cell].add(name, block, into[first + start:first + start + len(block)])
        for projection in projections.values():
            projection.drawn.clear()
    sketches = {cell: projections[cell].sketches(rows) for cell, rows in sums.items()}
    for cell, gram in grams.items():
        values, vectors = torch.linalg.eigh(gram.double())
        z = torch.randn(len(gram), dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        sketches[cell] = vectors * values.clamp(min=0).sqrt() @ z
    return {cell: sketch_cosines(sketches[cell], n) for cell in projections}


def misread(gradients, kept, total, batch=16):
    """Kept coordinates of gradients [n, total], read with an index of too few bits in batches of 16 rows."""
    wrap = int(2**32 * total / 1.54e9)
    found = []
    for rows in gradients.split(batch):
        flat = rows.index_select(1, kept).flatten()
        found.append(flat[torch.arange(len(flat)) % wrap].view(len(rows), -1))
    return torch.cat(found)


def faulty_curve(train, validation, seeds, dim):
    """The 32-bit imitation, from full gradients in memory; validation: a list of [n_v, D]."""
    total, found = train.shape[1], {}
    for keep in KEEPS[3:]:
        for seed in range(seeds):
            projection = sketch.Projection(seed, keep, dim, "cpu")
            kept, places = projection.draw("all", total)
            sketches = []
            for gradients in (train, *validation):
                sums = projection.zeros(len(gradients))
                sums.scatter_add_(1, places.expand(len(gradients), -1), misread(gradients, kept, total))
                sketches.append(projection.sketches(sums))
            rows = torch.cat([sketches[0], *(s.mean(0, keepdim=True) for s in sketches[1:])])
            found["32-bit", keep, seed] = sketch_cosines(rows, len(train))
    return found


def measure(world, args):
    model, train_path, *val_paths = (ROOT / "runs" / path for path in WORLDS[world])
    policy, seeds = sketch.load_policy(model, "cpu", "float32"), range(args.seeds)
    prompts = prompts_with_variance(train_path, args.prompts)
    sets = [(path, prompts_with_variance(path, args.prompts)) for path in val_paths]
    stored = torch.float32 if world == "toy" else torch.bfloat16
    train = full_gradients(policy, train_path, prompts, stored)
    means = torch.cat([mean_gradient(policy, *each) for each in sets])
    exact, found = cosines(train, means), {}
    kinds = [kind for kind in args.projection if kind not in ("32-bit", "bfloat16")]
    for seed in seeds:
        found |= curves(policy, train, means, seed, args.dim, args.dense_numbers, kinds)
    if world == "toy" and "32-bit" in args.projection:
        validation = [full_gradients(policy, *each) for each in sets]
        found |= faulty_curve(train, validation, args.seeds, args.dim)
    if world == "toy" and "bfloat16" in args.projection:
        low = full_gradients(policy.bfloat16(), train_path, prompts)
        low_means = torch.cat([mean_gradient(policy, *each) for each in sets])
        for seed in seeds:
            cells = curves(policy, low, low_means, seed, args.dim, 0, ["sjlt"], [0.1])
            found["bfloat16", 0.1, seed] = cells["sjlt", 0.1, seed]
    table, summary = {}, {}
    for (kind, keep, _), value in found.items():
        table.setdefault((kind, str(keep)), []).append(agreement(value, exact))
    for (kind, keep), cells in table.items():
        overlaps, correlations = zip(*cells)  # over the seeds
        summary.setdefault(kind, {})[keep] = {
            "overlap": [round(overlap, 4) for overlap in overlaps],
            "mean": round(float(np.mean(overlaps)), 4), "correlation": round(float(np.mean(correlations)), 4)}
    return {"command": "python experiments/sparse_ratio.py " + " ".join(sys.argv[1:]),
            "parameters": train.shape[1], "prompts_with_variance": len(prompts),
            "selected": round(len(prompts) / 10), "validation_sets": len(val_paths), "dim": args.dim,
            "seeds": args.seeds, "stored_as": str(stored),
            "torch": torch.__version__, "transformers": transformers.__version__, "curves": summary}


def plot():
    files = [path for path in (RESULTS / f"sparse_ratio_{world}.json" for world in WORLDS) if path.exists()]
    figure, axes = plt.subplots(1, len(files), figsize=(5.2 * len(files), 3.8), squeeze=False, sharey=True)
    for axis, path in zip(axes[0], files):
        result = json.loads(path.read_text())
        for kind in [kind for kind in COLORS if kind in result["curves"]]:
            keeps = [float(keep) for keep in result["curves"][kind]]
            values = np.array([cell["overlap"] for cell in result["curves"][kind].values()])  # [keeps, seeds]
            axis.plot(keeps, values.mean(1), "o-", markersize=3, label=kind, color=COLORS[kind])
            axis.fill_between(keeps, values.min(1), values.max(1), alpha=0.15, color=COLORS[kind])
        axis.plot(list(PAPER), list(PAPER.values()), "kx", label="the paper's figure (Qwen2.5-1.5B)")
        axis.set(xscale="log", xlabel="keep", ylim=(0, 1.02),
                 title=f"{path.stem.split('_')[-1]}: {result['prompts_with_variance']} prompts, "
                       f"{result['parameters'] / 1e6:.0f}M parameters, dim {result['dim']}")
    axes[0][0].set_ylabel("overlap with the exact top 10%")
    axes[0][0].legend(fontsize=7, loc="lower center")
    figure.tight_layout()
    figure.savefig(RESULTS / "sparse_ratio.png", dpi=130)


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("world", choices=[*WORLDS, "plot"])
    parser.add_argument("--seeds", type=int, default=5, help="of the projection (5)")
    parser.add_argument("--prompts", type=int, default=300, help="at most, with reward variance (300)")
    parser.add_argument("--dim", type=int, default=32768)
    parser.add_argument("--projection", nargs="+", choices=list(COLORS), default=list(COLORS),
                        help="compare only these and write no files (all)")
    parser.add_argument("--dense-numbers", type=float, default=5e9, help="largest Rademacher matrix (5e9)")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.world != "plot":
        result = measure(args.world, args)
        for kind, curve in result["curves"].items():
            print(f"{kind:12}", *(f"{keep}: {cell['mean']:.3f}" for keep, cell in curve.items()))
        if set(args.projection) != set(COLORS):
            return
        (RESULTS / f"sparse_ratio_{args.world}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot()


if __name__ == "__main__":
    main()
