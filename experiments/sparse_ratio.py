"""Precision of the sketch: does the ranking by sketches find the top 10% that the ranking by full gradients finds?

For each share `keep` of coordinates and each projection: the overlap between the top 10% by cosine of sketches with a
validation set's mean and the top 10% by cosine of full float32 gradients, among prompts with a gradient; mean over the
validation sets, then mean and spread over seeds of the projection. 1 is perfect, 0.1 chance. Beside it the correlation of
the two cosines. All gradients are those of sketch.py's Sketcher at the base policy.

sjlt, rows    sketch.py's own Projection, --drop coordinates and --drop rows.
rademacher    sketch.py's dense Projection, where kept coordinates x dim stay below --dense-numbers.
gaussian      (toy) a dense Gaussian projection at every keep, drawn from its exact law: the sketches of gradients G [n, kept]
              are distributed as C Z / sqrt(dim), C C^T = G G^T, Z [n, dim] standard normal, so that no matrix is needed.
32-bit        an imitation (toy only): sjlt of gradients that were read wrongly. TRAK's CUDA kernel multiplies row by features
              in uint32; a batch of 16 gradients overflows where 16 x kept > 2^32: for 1.54e9 parameters at keep > 0.17.
              Here element (row, j) of a batch of 16 is read at (row x kept + j) mod L, L = 2^32 scaled by the parameters.
bfloat16      sjlt of a bfloat16 policy's gradients against the full float32 gradients of the float32 policy, keep 0.1 (toy).

    python experiments/sparse_ratio.py toy                 after run_cropi.sh
    python experiments/sparse_ratio.py smollm2 --prompts 40 --seeds 3 --dense-numbers 1e8       after experiments/smollm2.py
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


def gradients_of(policy, path, live, projection, batch_tokens=1024):
    """Yields (places in `live`, sketches) of sketch.py's Sketcher with the given projection, batch by batch."""
    rollouts = sketch.load_rollouts(path)
    prompts, responses, advantages = rollouts["prompts"], rollouts["responses"], sketch.group_advantage(rollouts["rewards"])
    k = rollouts["meta"]["k"]
    longest = rollouts["response_offsets"].diff().view(-1, k).amax(1).tolist()
    sketcher = sketch.Sketcher(policy, projection)
    assert sketcher.fast
    plan = sketch.plan_batches({i: (len(prompts[i]), longest[i]) for i in live}, k, batch_tokens, True)
    for batch, at_once, _ in tqdm(plan, desc=f"gradients of {path.name}", unit="batch"):
        for first in range(0, k, at_once):
            rows = [i * k + j for i in batch for j in range(first, min(first + at_once, k))]
            yield [live.index(i) for i in batch], sketcher(
                [prompts[i] for i in batch], [responses[r] for r in rows], [rollouts["logprobs"][r] for r in rows],
                advantages.flatten()[rows], k, rollouts["meta"]["temperature"])
    sketcher.close()


def full_gradients(policy, path, live):
    """float32 [n, parameters] of the prompts `live`."""
    found = np.zeros((len(live), Whole(policy).dim), np.float32)
    for places, gradients in gradients_of(policy, path, live, Whole(policy)):
        found[places] += gradients.numpy()
    return found


class Many(Whole):
    """In the place of a Projection: many of them, and what exact cosines need, of gradients that are never whole.

    A row of sums is the sums of every projection in turn, then the dot product with `mean` and the squared norm. total [D] is
    the sum of all gradients seen, where `mean` is None.
    """

    def __init__(self, policy, projections, mean=None):
        super().__init__(policy)
        self.projections, self.mean = projections, mean
        self.total = torch.zeros(self.dim) if mean is None else None
        embedding, head = policy.get_input_embeddings().weight, policy.get_output_embeddings().weight
        self.tied = next(name for name, p in policy.named_parameters() if p is embedding) if embedding is head else None
        self.waiting = {}  # the head's part of a tied gradient, until the embedding's comes

    def zeros(self, b):
        return torch.cat([*(projection.zeros(b) for projection in self.projections), torch.zeros(b, 2)], 1)

    def parts(self, sums):
        return sums.split([*(2 * projection.dim for projection in self.projections), 1, 1], 1)

    def add(self, name, shape, gradients, sums):
        *parts, dots, squares = self.parts(sums)
        for projection, part in zip(self.projections, parts):
            projection.add(name, shape, gradients[:, projection.draw(name, shape)[0]], part)
        flat = gradients.flatten(1)
        here = slice(self.starts[name], self.starts[name] + flat.shape[1])
        if self.mean is None:
            self.total[here] += flat.sum(0)
        else:
            dots += flat @ self.mean[here, None]
            squares += torch.linalg.vecdot(flat, flat)[:, None]
            if name == self.tied and sums.data_ptr() in self.waiting:
                squares += 2 * torch.linalg.vecdot(flat, self.waiting.pop(sums.data_ptr()))[:, None]
            elif name == self.tied:
                self.waiting[sums.data_ptr()] = flat


def streamed(policy, train_path, live, val_path, val_live, seeds, dim, dense_numbers, keeps):
    """Exact cosines [n, 1] and {(projection, keep, seed): cosines [n, 1]}, where the gradients do not fit into memory."""
    total = Whole(policy).dim
    cells = [(kind, keep, seed) for kind in ("sjlt", "rows", "rademacher") for keep in keeps for seed in range(seeds)
             if kind != "rademacher" or (keep * total * dim <= dense_numbers and seed == 0)]
    projections = [sketch.Projection(seed, keep, dim, "rademacher" if kind == "rademacher" else "sjlt",
                                     "rows" if kind == "rows" else "coordinates", "cpu") for kind, keep, seed in cells]
    many = Many(policy, projections)
    means = sum(sums.sum(0) for _, sums in gradients_of(policy, val_path, val_live, many, 512))[None] / len(val_live)
    mean = many.total / len(val_live)
    many = Many(policy, projections, mean)
    rows = many.zeros(len(live))
    for places, sums in gradients_of(policy, train_path, live, many, 512):
        rows[places] += sums
    *parts, dots, squares = many.parts(torch.cat([rows, means]))
    exact = dots[:-1].double() / squares[:-1].double().sqrt() / mean.double().norm()
    return exact, {cell: sketch_cosines(projection.sketches(part), len(live))
                   for cell, projection, part in zip(cells, projections, parts)}


def cosines(train, means):
    """[n, V] of train [n, D] and validation means [V, D], in blocks of columns, in float64."""
    dots, squares, norms = 0, 0, 0
    for start in range(0, train.shape[1], 2**22):
        block, mean = (torch.from_numpy(np.asarray(x[:, start:start + 2**22])).double() for x in (train, means))
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


def curves(policy, rows, n, seeds, dim, dense_numbers, kinds=("sjlt", "rows", "rademacher", "gaussian"), keeps=KEEPS):
    """{(projection, keep, seed): cosines [n, V]} from sketches of rows [n + V, D], the last V the validation means."""
    shapes = {name: parameter.shape for name, parameter in policy.named_parameters()}
    starts, total = Whole(policy).starts, rows.shape[1]
    cells = [(kind, keep, seed) for kind in kinds for keep in keeps for seed in seeds
             if kind != "rademacher" or keep * total * dim <= dense_numbers]
    grams = {cell: torch.zeros(len(rows), len(rows), dtype=torch.float64) for cell in cells if cell[0] == "gaussian"}
    projections = {(kind, keep, seed): sketch.Projection(seed, keep, dim, "rademacher" if kind == "rademacher" else "sjlt",
                                                         "rows" if kind == "rows" else "coordinates", "cpu")
                   for kind, keep, seed in cells}
    sums = {cell: projections[cell].zeros(len(rows)) for cell in cells if cell[0] != "gaussian"}
    with tqdm(total=len(shapes) * len(cells), desc="projections", unit="parameter") as progress:
        for name, shape in shapes.items():  # one parameter of all prompts in memory at a time
            block = torch.from_numpy(np.ascontiguousarray(rows[:, starts[name]:starts[name] + shape.numel()]))
            block = block.view(len(rows), *shape)
            for cell in cells:
                projection = projections[cell]
                wanted, kept, _ = projection.draw(name, shape)
                if cell[0] == "gaussian":
                    for some in kept.split(2**20):
                        part = block.flatten(1).index_select(1, some)
                        grams[cell] += (part @ part.T).double()
                else:
                    projection.add(name, shape, block[:, wanted], sums[cell])
                projection.drawn.clear()
                progress.update()
    found = {}
    for cell in cells:
        if cell[0] == "gaussian":
            values, vectors = torch.linalg.eigh(grams[cell])
            z = torch.randn(len(rows), dim, generator=torch.Generator().manual_seed(cell[2]), dtype=torch.float64)
            sketches = vectors * values.clamp(min=0).sqrt() @ z
        else:
            sketches = projections[cell].sketches(sums[cell])
        found[cell] = sketch_cosines(sketches, n)
    return found


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
    train, *validation = (torch.from_numpy(np.asarray(gradients)) for gradients in (train, *validation))
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
    n, total = len(live), Whole(policy).dim
    if world == "smollm2":
        exact, found = streamed(policy, train_path, live, val_paths[0], val_live[0], args.seeds, args.dim, args.dense_numbers,
                                args.keeps)
    else:
        train, *validation = (full_gradients(policy, path, prompts)
                              for path, prompts in zip((train_path, *val_paths), (live, *val_live)))
        rows = np.concatenate([train, *(gradients.mean(0, keepdims=True, dtype=np.float64) for gradients in validation)])
        rows = rows.astype(np.float32)
        exact, found = cosines(rows[:n], rows[n:]), {}
        for seed in seeds:  # the sums of all would take 10 GB
            found |= curves(policy, rows, n, [seed], args.dim, args.dense_numbers)
        found |= faulty_curve(train, validation, args.seeds, args.dim)
        low = [full_gradients(policy.bfloat16(), path, prompts)
               for path, prompts in zip((train_path, *val_paths), (live, *val_live))]
        low = np.concatenate([low[0], *(gradients.mean(0, keepdims=True) for gradients in low[1:])])
        for seed in seeds:
            found["bfloat16", 0.1, seed] = curves(policy, low, n, [seed], args.dim, 0, ["sjlt"], [0.1])["sjlt", 0.1, seed]
    table = {}
    for (kind, keep, _), value in found.items():
        table.setdefault(kind, {}).setdefault(str(keep), []).append(agreement(value, exact))
    summary = {kind: {keep: {"overlap": [round(overlap, 4) for overlap, _ in cells],
                             "mean": round(float(np.mean([overlap for overlap, _ in cells])), 4),
                             "correlation": round(float(np.mean([correlation for _, correlation in cells])), 4)}
                      for keep, cells in curve.items()} for kind, curve in table.items()}
    return {"command": "python experiments/sparse_ratio.py " + " ".join(sys.argv[1:]), "parameters": total, "live_prompts": n,
            "selected": round(n / 10), "validation_sets": len(val_paths), "dim": args.dim, "seeds": args.seeds,
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
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS, help="of smollm2 (all): 1.0 takes 1 GB a seed")
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
