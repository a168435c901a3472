"""Precision of the sketch: does the ranking by sketches find the top 10% that the ranking by full gradients finds?

For each share `keep` of coordinates and each projection: the overlap between the top 10% by cosine of sketches with a
validation set's mean and the top 10% by cosine of full float32 gradients, among prompts with a gradient; mean over the
validation sets, then mean and spread over seeds of the projection. 1 is perfect, 0.1 chance. Beside it the correlation of
the two cosines. All gradients are those of sketch.py's Sketcher at the base policy, float32; SmolLM2's are kept in memory
as bfloat16, before exact cosines and sketches are taken of them.

sjlt, rows    sketch.py's own Projection, --drop coordinates and --drop rows.
rademacher    sketch.py's dense Projection, where kept coordinates x dim stay below --dense-numbers.
gaussian      a dense Gaussian projection at every keep, drawn from its exact law: the sketches of gradients G [n, kept]
              are distributed as C Z / sqrt(dim), C C^T = G G^T, Z [n, dim] standard normal, so that no matrix is needed.
32-bit        an imitation (toy only): sjlt of gradients that were read wrongly. TRAK's CUDA kernel multiplies row by features
              in uint32; a batch of 16 gradients overflows where 16 x kept > 2^32: for 1.54e9 parameters at keep > 0.17.
              Here element (row, j) of a batch of 16 is read at (row x kept + j) mod L, L = 2^32 scaled by the parameters.
bfloat16      sjlt of a bfloat16 policy's gradients against the full float32 gradients of the float32 policy, keep 0.1 (toy).

    python experiments/sparse_ratio.py toy                 after run_cropi.sh
    python experiments/sparse_ratio.py smollm2 --prompts 50            after experiments/smollm2.py; 18 GB of memory
    python experiments/sparse_ratio.py plot                the figure anew from the numbers

Writes experiments/results/sparse_ratio_WORLD.json and experiments/results/sparse_ratio.png.
"""

import argparse
import json
import sys
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
import sketch

KEEPS = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.15, 0.3, 1.0)
WORLDS = {"toy": ("toy-world/base", "toy/rollouts/train.pt", "toy/rollouts/val_sort.pt", "toy/rollouts/val_dbl.pt"),
          "smollm2": ("smollm2/base", "smollm2/train.pt", "smollm2/val.pt")}  # below runs/
PAPER = {0.1: 0.70, 0.15: 0.77, 1.0: 0.14}  # read off the paper's figure for Qwen2.5-1.5B, dim 32768


class Whole:
    """In the place of a Projection: the sketch is the gradient, parameter after parameter."""

    def __init__(self, policy):
        self.device, self.starts, self.dim = policy.device, {}, 0
        for name, parameter in policy.named_parameters():
            self.starts[name] = self.dim
            self.dim += parameter.numel()

    def draw(self, name, shape):
        return slice(None), None, None

    def zeros(self, b):
        return torch.zeros(b, self.dim)

    def add(self, name, shape, gradients, sums):
        gradients = gradients.flatten(1)
        sums[:, self.starts[name]:self.starts[name] + gradients.shape[1]] += gradients

    def sketches(self, sums):
        return sums


def live_prompts(path, limit):
    """At most `limit` prompts with a gradient, in order."""
    live = (sketch.load_rollouts(path)["rewards"].std(1) > 0).nonzero()[:, 0]
    return live[torch.randperm(len(live), generator=torch.Generator().manual_seed(0))[:limit]].sort().values.tolist()


def gradients_of(policy, rollouts, prompts, projection, chosen=None, batch_tokens=1024):
    """Yields (places in `prompts`, sketches) of sketch.py's Sketcher with the given projection, batch by batch.

    prompts: those with a gradient. chosen: a range of each prompt's K responses to use instead of all.
    """
    k, responses, logprobs = rollouts["meta"]["k"], rollouts["responses"], rollouts["logprobs"]
    chosen = chosen or range(k)
    advantages = sketch.group_advantage(rollouts["rewards"][:, chosen])
    longest = rollouts["response_offsets"].diff().view(-1, k)[:, chosen].amax(1).tolist()
    sketcher, places = sketch.Sketcher(policy, projection), {prompt: place for place, prompt in enumerate(prompts)}
    assert sketcher.fast
    plan = sketch.plan_batches({i: (len(rollouts["prompts"][i]), longest[i]) for i in prompts}, len(chosen), batch_tokens, True)
    for batch, at_once, _ in tqdm(plan, desc="gradients", unit="batch"):
        for first in range(0, len(chosen), at_once):
            some = chosen[first:first + at_once]
            rows = [i * k + j for i in batch for j in some]
            yield [places[i] for i in batch], sketcher(
                [rollouts["prompts"][i] for i in batch], [responses[r] for r in rows], [logprobs[r] for r in rows],
                advantages[batch][:, first:first + at_once].flatten(), len(chosen), rollouts["meta"]["temperature"])
    sketcher.close()


def full_gradients(policy, path, live, dtype=torch.float32):
    """[n, parameters] of the prompts `live`, computed in float32 and kept as `dtype`."""
    found = torch.zeros(len(live), Whole(policy).dim, dtype=dtype)
    for places, gradients in gradients_of(policy, sketch.load_rollouts(path), live, Whole(policy)):
        found[places] += gradients.to(dtype)
    return found


def mean_gradient(policy, path, live):
    """float32 [1, parameters]: the mean over the prompts `live`, none of which is kept."""
    found = gradients_of(policy, sketch.load_rollouts(path), live, Whole(policy))
    return sum(gradients.sum(0, keepdim=True) for _, gradients in found) / len(live)


def cosines(train, means):
    """[n, V] of train [n, D] and validation means [V, D], in blocks of columns, in float64."""
    dots, squares, norms = 0, 0, 0
    for block, mean in zip(train.split(2**22, 1), means.split(2**22, 1)):
        block, mean = block.double(), mean.double()
        dots, squares, norms = dots + block @ mean.T, squares + (block**2).sum(1), norms + (mean**2).sum(1)
    return dots / (squares[:, None] * norms).sqrt()


def agreement(found, exact):
    """Top-10% overlap and correlation between two [n, V] of cosines, means over the V validation sets."""
    n = round(len(exact) / 10)
    top = lambda column: set(torch.argsort(column, descending=True, stable=True)[:n].tolist())  # noqa: E731
    overlap = np.mean([len(top(a) & top(b)) / n for a, b in zip(found.T, exact.T)])
    finite = found.nan_to_num()
    return float(overlap), float(np.mean([np.corrcoef(a, b)[0, 1] if a.std() > 0 else 0 for a, b in zip(finite.T, exact.T)]))


def sketch_cosines(sketches, n):
    """Of sketches [n + V, dim], the last V those of the validation means: [n, V]; NaN where a sketch is zero."""
    units = sketches.double() / sketches.double().norm(dim=1, keepdim=True)
    return units[:n] @ units[n:].T


def curves(policy, train, means, seed, dim, dense_numbers, kinds=("sjlt", "rows", "rademacher", "gaussian"), keeps=KEEPS):
    """{(projection, keep, seed): cosines [n, V]} from sketches of train [n, D] and of the validation means [V, D]."""
    shapes = {name: parameter.shape for name, parameter in policy.named_parameters()}
    starts, n, total = Whole(policy).starts, *train.shape
    cells = [(kind, keep, seed) for kind in kinds for keep in keeps
             if kind != "rademacher" or keep * total * dim <= dense_numbers]
    projections = {cell: sketch.Projection(seed, cell[1], dim, "rademacher" if cell[0] == "rademacher" else "sjlt",
                                           "rows" if cell[0] == "rows" else "coordinates", "cpu") for cell in cells}
    grams = {cell: torch.zeros(n + len(means), n + len(means)) for cell in cells if cell[0] == "gaussian"}
    sums = {cell: projections[cell].zeros(n + len(means)) for cell in cells if cell[0] != "gaussian"}
    for name, shape in tqdm(shapes.items(), desc=f"projections, seed {seed}", unit="parameter"):
        here, step = slice(starts[name], starts[name] + shape.numel()), max(1, 2**25 // shape.numel())
        for cell, gram in grams.items():
            for some in projections[cell].draw(name, shape)[1].split(2**20):
                part = torch.cat([rows[:, here].index_select(1, some).float() for rows in (train, means)])
                gram += part @ part.T
        for rows, first in ((train, 0), (means, n)):
            for start in range(0, len(rows), step):  # rows of this parameter in float32: at most 2^25 numbers
                block = rows[start:start + step, here].float().view(-1, *shape)
                for cell, into in sums.items():
                    wanted = projections[cell].draw(name, shape)[0]
                    projections[cell].add(name, shape, block[:, wanted], into[first + start:first + start + len(block)])
        for projection in projections.values():
            projection.drawn.clear()
    sketches = {cell: projections[cell].sketches(rows) for cell, rows in sums.items()}
    for cell, gram in grams.items():
        values, vectors = torch.linalg.eigh(gram.double())
        z = torch.randn(len(gram), dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        sketches[cell] = vectors * values.clamp(min=0).sqrt() @ z
    return {cell: sketch_cosines(sketches[cell], n) for cell in cells}


def misread(gradients, kept, total, batch=16):
    """Gradients [n, total] at the kept coordinates, as an index of too few bits would read them, in batches of 16 rows."""
    wrap = int(2**32 * total / 1.54e9)
    found = []
    for rows in gradients.split(batch):
        flat = rows.index_select(1, kept).flatten()
        found.append(flat[torch.arange(len(flat)) % wrap].view(len(rows), -1))
    return torch.cat(found)


def faulty_curve(train, validation, seeds, dim):
    """The 32-bit imitation for whole gradients in memory; validation: a list of [n_v, D]."""
    total, found = train.shape[1], {}
    for keep in KEEPS[3:]:
        for seed in range(seeds):
            projection = sketch.Projection(seed, keep, dim, "sjlt", "coordinates", "cpu")
            _, kept, places = projection.draw("all", torch.Size((total,)))
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
    live, val_live = live_prompts(train_path, args.prompts), [live_prompts(path, args.prompts) for path in val_paths]
    stored = torch.float32 if world == "toy" else torch.bfloat16
    train = full_gradients(policy, train_path, live, stored)
    means = torch.cat([mean_gradient(policy, path, prompts) for path, prompts in zip(val_paths, val_live)])
    exact, found = cosines(train, means), {}
    for seed in seeds:
        found |= curves(policy, train, means, seed, args.dim, args.dense_numbers)
    if world == "toy":
        validation = [full_gradients(policy, path, prompts) for path, prompts in zip(val_paths, val_live)]
        found |= faulty_curve(train, validation, args.seeds, args.dim)
        low = full_gradients(policy.bfloat16(), train_path, live)
        low_means = torch.cat([mean_gradient(policy, path, prompts) for path, prompts in zip(val_paths, val_live)])
        for seed in seeds:
            found["bfloat16", 0.1, seed] = curves(policy, low, low_means, seed, args.dim, 0, ["sjlt"], [0.1])["sjlt", 0.1, seed]
    table = {}
    for (kind, keep, _), value in found.items():
        table.setdefault(kind, {}).setdefault(str(keep), []).append(agreement(value, exact))
    summary = {kind: {keep: {"overlap": [round(overlap, 4) for overlap, _ in cells],
                             "mean": round(float(np.mean([overlap for overlap, _ in cells])), 4),
                             "correlation": round(float(np.mean([correlation for _, correlation in cells])), 4)}
                      for keep, cells in curve.items()} for kind, curve in table.items()}
    return {"command": "python experiments/sparse_ratio.py " + " ".join(sys.argv[1:]), "parameters": train.shape[1],
            "live_prompts": len(live), "selected": round(len(live) / 10), "validation_sets": len(val_paths), "dim": args.dim,
            "seeds": args.seeds, "stored_as": str(stored),
            "torch": torch.__version__, "transformers": transformers.__version__, "curves": summary}


def plot():
    files = [path for path in (RESULTS / f"sparse_ratio_{world}.json" for world in WORLDS) if path.exists()]
    figure, axes = plt.subplots(1, len(files), figsize=(5.2 * len(files), 3.8), squeeze=False, sharey=True)
    for axis, path in zip(axes[0], files):
        result = json.loads(path.read_text())
        for kind, curve in result["curves"].items():
            keeps = [float(keep) for keep in curve]
            values = [cell["overlap"] for cell in curve.values()]
            line, = axis.plot(keeps, [np.mean(v) for v in values], "o-", markersize=3, label=kind)
            axis.fill_between(keeps, [min(v) for v in values], [max(v) for v in values], alpha=0.15, color=line.get_color())
        axis.plot(list(PAPER), list(PAPER.values()), "kx", label="the paper's figure (Qwen2.5-1.5B)")
        axis.set(xscale="log", xlabel="keep", ylim=(0, 1.02), title=f"{path.stem.split('_')[-1]}: {result['live_prompts']} "
                 f"prompts, {result['parameters'] / 1e6:.0f}M parameters, dim {result['dim']}")
    axes[0][0].set_ylabel("overlap with the exact top 10%")
    axes[0][0].legend(fontsize=7, loc="lower center")
    figure.tight_layout()
    figure.savefig(RESULTS / "sparse_ratio.png", dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=[*WORLDS, "plot"])
    parser.add_argument("--seeds", type=int, default=5, help="of the projection (5)")
    parser.add_argument("--prompts", type=int, default=300, help="with a gradient, at most (300)")
    parser.add_argument("--dim", type=int, default=32768)
    parser.add_argument("--dense-numbers", type=float, default=5e9, help="largest Rademacher matrix that is tried (5e9)")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.world != "plot":
        result = measure(args.world, args)
        (RESULTS / f"sparse_ratio_{args.world}.json").write_text(json.dumps(result, indent=1) + "\n")
        for kind, curve in result["curves"].items():
            print(f"{kind:12}", *(f"{keep}: {cell['mean']:.3f}" for keep, cell in curve.items()))
    plot()


if __name__ == "__main__":
    main()
