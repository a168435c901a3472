"""The sparse random projection: linear, reproducible, unbiased, of the theoretical variance."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_qwen
from test_gradients import trajectories

import score
import sketch
from sketch import Projection, kept_coordinates
from sparse_ratio import Rademacher

KINDS = {"sjlt": Projection, "rademacher": Rademacher}  # sketch.py's, and the one it is compared with
SHAPES = {"a.weight": (40, 30), "b.bias": (17,), "c.weight": (100,)}


def project(gradients, seed=0, keep=0.3, dim=64, kind="sjlt"):
    """Sketches [B, dim] of the gradients {name: [B, *shape]}."""
    projection = KINDS[kind](seed, keep, dim, "cpu")
    sums = projection.zeros(len(next(iter(gradients.values()))))
    for name, gradient in gradients.items():
        projection.add(name, gradient, sums)
    return projection.sketches(sums)


def random_gradients(b, seed):
    rng = torch.Generator().manual_seed(seed)  # the mean 0.5 keeps sums far from zero
    return {name: 0.5 + torch.randn(b, *shape, generator=rng) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("kind", ["sjlt", "rademacher"])
def test_linear(kind):
    x, y = random_gradients(3, 1), random_gradients(3, 2)
    mixed = {name: 2 * x[name] - 3 * y[name] for name in SHAPES}
    expected = 2 * project(x, kind=kind) - 3 * project(y, kind=kind)
    torch.testing.assert_close(project(mixed, kind=kind), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sjlt", "rademacher"])
def test_same_in_another_process(kind, tmp_path):
    script = (f"import sys, torch; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
              f"from test_projection import *; torch.randn(5)\n"
              f"torch.save(project(random_gradients(2, 4), kind={kind!r}), sys.argv[1])")
    subprocess.run([sys.executable, "-c", script, tmp_path / "x.pt"], check=True)
    here = project(random_gradients(2, 4), kind=kind)
    assert torch.equal(torch.load(tmp_path / "x.pt"), here)
    assert not torch.equal(project(random_gradients(2, 4), kind=kind, seed=1), here)


def test_same_on_a_reloaded_model(tmp_path):
    policy = tiny_qwen(tied=True)
    policy.save_pretrained(tmp_path)
    loaded = sketch.load_policy(tmp_path, "cpu", "float32")
    loaded.save_pretrained(tmp_path / "again")
    sketches = []
    for model in (policy, loaded, sketch.load_policy(tmp_path / "again", "cpu", "float32")):
        projection = Projection(0, 0.3, 64, "cpu")
        sketches.append(sketch.sketch_prompts(model, projection, trajectories([0, 1, 2]))[0])
    in_memory, one, other = sketches
    assert torch.equal(one, other) and one.abs().sum() > 0
    # weights in a mapped file are aligned differently, which changes how CPU kernels round
    torch.testing.assert_close(in_memory, one, rtol=1e-5, atol=1e-6 * float(one.norm()))


@pytest.mark.parametrize("kind, keep", [("sjlt", 0.3), ("sjlt", 1.0), ("rademacher", 0.3)])
def test_inner_products_unbiased_with_the_variance_of_theory(kind, keep):
    x, y = random_gradients(1, 5), random_gradients(1, 6)
    y = {name: 0.5 * x[name] + y[name] for name in SHAPES}
    pair = {name: torch.cat([x[name], y[name]]) for name in SHAPES}
    flat = torch.cat([pair[name].flatten(1) for name in SHAPES], 1).double()
    truth, dim, seeds = float(flat[0] @ flat[1]), 64, 600
    found = []
    for seed in range(seeds):
        sketches = project(pair, seed, keep, dim, kind).double()
        found.append(sketches[0] @ sketches[1])
    found = torch.stack(found)
    squares = float((flat[0] ** 2 * flat[1] ** 2).sum())
    variance = (1 / keep - 1) * squares
    variance += float(flat[0] @ flat[0] * (flat[1] @ flat[1]) + truth**2 - 2 * squares) / dim
    assert abs(found.mean() - truth) <= 3 * (variance / seeds) ** 0.5
    # the sample variance of a nearly normal variable has a relative standard error of sqrt(2 / seeds) = 6%
    assert float(found.var()) == pytest.approx(variance, rel=4 * (2 / seeds) ** 0.5)


def test_kept_coordinates_are_bernoulli():
    """Rate, range, order and independence of adjacent coordinates: a million coordinates, three rates."""
    for keep in (0.1, 0.01, 0.7):
        n = 1_000_000
        kept = kept_coordinates(n, keep, torch.Generator().manual_seed(1))
        assert (kept.diff() > 0).all() and kept[0] >= 0 and kept[-1] < n
        assert abs(len(kept) - keep * n) <= 4 * (keep * (1 - keep) * n) ** 0.5
        both = int((kept.diff() == 1).sum())  # adjacent pairs with both kept: a share of keep^2
        assert abs(both - keep**2 * n) <= 5 * (keep**2 * n) ** 0.5
    assert kept_coordinates(50, 1.0, torch.Generator()).tolist() == list(range(50))


def test_masks_cover_every_kind_of_parameter():
    policy = tiny_qwen(tied=True)
    kinds = {"embed": [0, 0], "attn": [0, 0], "mlp": [0, 0], "norm": [0, 0]}
    for seed in range(20):
        projection = Projection(seed, 0.1, 8, "cpu")
        for name, parameter in policy.named_parameters():
            kind = next(kind for kind in ("norm", "attn", "mlp", "embed") if kind in name)
            kinds[kind][0] += len(projection.draw(name, parameter.numel())[0])
            kinds[kind][1] += parameter.numel()
    for kept, total in kinds.values():
        assert total > 1000 and abs(kept - 0.1 * total) <= 4 * (0.09 * total) ** 0.5


def test_candidates(micro_run, world, tmp_path, call):
    """A share of the first rollouts.pt is sketched, drawn anew for each policy; the others are whole."""
    run = micro_run[0]
    rollouts = [run / f"rollouts/{name}.pt" for name in ("train", "val_sort")]
    drawn = []
    for number, model in enumerate((world / "base", run / "cropi/phase-0/policy")):
        for name, share in (("all", "1"), ("third", "1/3"), ("again", "1/3")):
            outs = [tmp_path / f"{number}-{name}-{which}.npy" for which in ("t", "v")]
            assert call(sketch, "--model", model, "--rollouts", *rollouts, "--out", *outs, "--dim", 64,
                        "--candidates", share)[0] == 0
        names = ("all", "third", "again")
        every, third, again = (np.load(tmp_path / f"{number}-{name}-t.npy") for name in names)
        chosen = third.any(1)
        assert np.array_equal(third, again) and chosen.sum() < every.any(1).sum()
        apart = np.linalg.norm(third - every, axis=1)[chosen]  # other prompts share the micro-batches
        assert (apart <= 1e-4 * np.linalg.norm(every, axis=1)[chosen]).all()
        files = [tmp_path / f"{number}-{name}-v.npy" for name in ("all", "third")]
        assert files[0].read_bytes() == files[1].read_bytes()
        sidecar = json.loads((tmp_path / f"{number}-third-t.json").read_text())
        assert sidecar["candidates"] == chosen.sum() == (120 - sidecar["skipped"]) // 3
        drawn.append(chosen)
    assert (drawn[0] != drawn[1]).any()
    assert call(score, "--train", tmp_path / "1-third-t.npy", "--val", tmp_path / "1-all-v.npy",
                "--alpha", "0.1", "--out", tmp_path / "s.npy")[0] == 0
    assert drawn[1][np.load(tmp_path / "s.npy")].all()
