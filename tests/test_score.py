"""score.py against brute-force computations in plain Python."""

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import score


def write_sketch(path, array, **changes):
    np.save(path, np.asarray(array, dtype=np.float32))
    sidecar = {"format": 2, "policy": "p", "seed": 0, "keep": 0.1, "dim": array.shape[1],
               "rho_max": "inf", "prompts": len(array)}
    path.with_suffix(".json").write_text(json.dumps({**sidecar, **changes}))
    return path


def test_popi_is_the_cosine_with_the_mean_gradient():
    rng = np.random.default_rng(0)
    train, val = rng.normal(size=(7, 5)).astype(np.float32), rng.normal(size=(2, 4, 5)).astype(np.float32)
    train[3] = 0
    rows = torch.from_numpy(train)
    found = score.popi(rows, rows.norm(dim=1, keepdim=True), torch.from_numpy(val.mean(1)))
    for i in range(7):
        for v in range(2):
            mean = [sum(val[v, s, d] for s in range(4)) / 4 for d in range(5)]
            dot, norms = sum(a * b for a, b in zip(train[i], mean)), math.hypot(*train[i]) * math.hypot(*mean)
            assert found[i, v] == (-math.inf if i == 3 else pytest.approx(dot / norms, rel=1e-5))


@pytest.mark.parametrize("c", [0.0, 60.0])
def test_fusion_counts_each_sets_own_top_n(c):
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.9], [0.1, 0.8], [0.0, 0.7], [-math.inf, -math.inf]])
    # order of the prompts, top 3 first: column 0: 0 1 2 | 3 4; column 1: 2 3 4 | 1 0
    expected = [1 / (c + 1), 1 / (c + 2), 1 / (c + 3) + 1 / (c + 1), 1 / (c + 2), 1 / (c + 3), 0]
    assert score.reciprocal_rank_fusion(scores, 3, c).tolist() == pytest.approx(expected)


def test_ties_go_by_index():
    scores = np.array([[0.5, 0.5, 0.1], [0.5, 0.1, 0.5], [0.1, 0.5, 0.5]])
    # order of the prompts: column 0: 0 1 2; column 1: 0 2 1; column 2: 1 2 0
    fused = score.reciprocal_rank_fusion(scores, 3)
    assert fused.tolist() == pytest.approx([1 + 1 + 1 / 3, 1 / 2 + 1 / 3 + 1, 1 / 3 + 1 / 2 + 1 / 2])
    square = (np.arange(7.0)[:, None] + np.arange(7)) % 7  # every prompt has every rank once
    rotated = score.reciprocal_rank_fusion(square, 7)
    assert len(set(rotated)) == 1  # although 1 + 1/2 + .. + 1/7 is summed in seven orders
    assert score.select(rotated, 2).tolist() == [0, 1]


def test_never_ranked_without_a_gradient():
    scores = np.array([[-math.inf], [0.2], [-math.inf], [-0.9]])
    assert score.select(score.reciprocal_rank_fusion(scores, 3), 3).tolist() == [1, 3]


@pytest.mark.parametrize("alpha, n, expected", [("0.1", 360, 36), ("0.29", 100, 29), ("0.1", 19, 1),
                                                ("1", 7, 7), ("0.07", 100, 7), ("0.1", 9, 0), ("1/3", 9, 3)])
def test_selection_size_is_the_exact_floor(alpha, n, expected):
    assert score.selection_size(Fraction(alpha), n) == expected


def test_whole_stage_against_brute_force(tmp_path, call):
    """1100 prompts (three blocks of rows), two validation sets, ties and zero rows, in plain Python."""
    rng = np.random.default_rng(1)
    train = rng.integers(-2, 3, size=(1100, 4)).astype(np.float32)  # few values: many exact ties
    train[::7] = 0
    vals = [rng.integers(-2, 3, size=(n, 4)).astype(np.float32) for n in (20, 600)]
    paths = [write_sketch(tmp_path / f"{name}.npy", array) for name, array in zip("tab", [train, *vals])]
    code, stdout, _ = call(score, "--train", paths[0], "--val", *paths[1:], "--out", tmp_path / "s.npy",
                           "--alpha", "0.05")
    scores, selected = np.load(tmp_path / "scores.npy"), np.load(tmp_path / "s.npy")
    assert code == 0 and selected.dtype == np.int64
    assert scores.dtype == np.float32 and scores.shape == (1100, 2)
    fused = [0.0] * 1100
    for v, val in enumerate(vals):
        mean = val.astype(np.float64).mean(0)
        for i in range(1100):
            norm = np.linalg.norm(train[i]) * np.linalg.norm(mean)
            cosine = train[i].astype(np.float64) @ mean / norm if norm else -math.inf
            assert scores[i, v] == (pytest.approx(cosine, abs=1e-6) if norm else -math.inf)
        ranking = sorted(range(1100), key=lambda i: (-scores[i, v], i))
        for rank, i in enumerate(ranking[:55], start=1):
            fused[i] += 1 / rank
    assert selected.tolist() == sorted(range(1100), key=lambda i: (-fused[i], i))[:55]


def rollouts_with_rewards(path, rewards):
    rewards = torch.tensor(rewards, dtype=torch.float32)
    n, k = rewards.shape
    torch.save({"prompt_tokens": torch.ones(n, dtype=torch.int32), "prompt_lengths": torch.ones(n).long(),
                "response_tokens": torch.ones(n * k, dtype=torch.int32),
                "response_lengths": torch.ones(n * k).long(), "logprobs": torch.zeros(n * k),
                "rewards": rewards, "answers": ["1"] * n, "families": [""] * n,
                "meta": {"format": 2, "temperature": 1.0, "k": k, "eos_ids": [1], "max_new_tokens": 4,
                         "verifier": "exact"}}, path)
    return path


def test_baselines(tmp_path, call):
    counts = [0, 8, 4, 4, 1, 7, 3, 0, 8, 5] * 2  # correct responses out of 8, for 20 prompts
    rollouts = rollouts_with_rewards(tmp_path / "r.pt", [[1] * c + [0] * (8 - c) for c in counts])

    def selected(method, alpha, seed):
        assert call(score, "--method", method, "--rollouts", rollouts, "--alpha", alpha, "--seed", seed,
                    "--out", tmp_path / "s.npy")[0] == 0
        return np.load(tmp_path / "s.npy").tolist()

    assert selected("full", "0.1", 0) == list(range(20))
    assert len(set(selected("random", "0.5", 0))) == 10
    assert selected("random", "0.5", 0) != selected("random", "0.5", 1)
    live = [i for i in range(20) if 0 < counts[i] < 8]
    assert sorted(selected("passrate", "0.7", 0)) == live  # 14 requested, 12 with reward variance
    assert set(selected("passrate", "0.2", 3)) < set(live)
    learnable = selected("learnability", "0.3", 0)
    assert sorted(learnable[:4]) == [2, 3, 12, 13]  # p = 1/2
    assert set(learnable[4:]) < {6, 9, 16, 19}  # p = 3/8 or 5/8
    pairs = {tuple(selected("learnability", "0.1", seed)) for seed in range(8)}
    assert pairs > {tuple(learnable[:2])}  # ties are broken at random
    assert sorted(selected("learnability", "1", 0)) == live  # p (1 - p) = 0 is never selected


def test_short_selection_says_so(tmp_path, call):
    train = write_sketch(tmp_path / "t.npy", np.vstack([np.zeros((8, 3)), np.eye(3)[:2]]))
    val = write_sketch(tmp_path / "v.npy", np.ones((2, 3)))
    code, stdout, _ = call(score, "--train", train, "--val", val, "--out", tmp_path / "s.npy",
                           "--alpha", "0.5")
    assert code == 0 and np.load(tmp_path / "s.npy").tolist() == [8, 9]
    assert "fewer than floor(alpha N) = 5" in stdout


def test_trust_of_hand_made_sketches(tmp_path, call):
    """Equal norms: all prompts count. One prompt of 1000 times the norm counts alone, which is warned of."""
    rng = np.random.default_rng(0)
    unit = rng.normal(size=(600, 8)) + 1  # two blocks of rows
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    heavy = unit.copy()
    heavy[517] *= -1000
    opposite = np.where(np.arange(40)[:, None] % 2, -1.0, 1.0) * np.eye(8)[0] + 0.01 * np.eye(8)[1]
    train = write_sketch(tmp_path / "t.npy", rng.normal(size=(50, 8)))
    vals = [write_sketch(tmp_path / f"{name}.npy", array)
            for name, array in (("unit", unit), ("heavy", heavy), ("opposite", opposite))]
    code, out, err = call(score, "--train", train, "--val", *vals, "--out", tmp_path / "s.npy",
                          "--alpha", "0.2")
    found = json.loads((tmp_path / "scores.json").read_text())
    assert code == 0 and list(found) == list(map(str, vals))
    found = {Path(path).stem: numbers for path, numbers in found.items()}
    assert found["unit"]["effective_prompts"] == pytest.approx(600, rel=1e-4)
    assert found["unit"]["top_five_share"] == pytest.approx(5 / 600, rel=1e-4)
    halves = unit[::2].mean(0), unit[1::2].mean(0)
    cosine = halves[0] @ halves[1] / np.linalg.norm(halves[0]) / np.linalg.norm(halves[1])
    assert found["unit"]["halves_cosine"] == pytest.approx(cosine, rel=1e-4) and cosine > 0.5
    squares = np.square(heavy).sum(1)
    effective = squares.sum() ** 2 / np.square(squares).sum()
    assert found["heavy"]["effective_prompts"] == pytest.approx(effective, rel=1e-4) and effective < 1.01
    assert found["heavy"]["top_five_share"] > 0.999 and found["heavy"]["halves_cosine"] < -0.5
    assert found["opposite"]["halves_cosine"] < -0.99
    selected, scores = np.load(tmp_path / "s.npy"), np.load(tmp_path / "scores.npy")
    for v, name in enumerate(found):
        assert found[name]["selected_positive"] == pytest.approx((scores[selected, v] > 0).mean())
        assert f"{vals[v]}: " in out and (f"warning: {vals[v]}:" in err) == (name != "unit")


def test_validation_set_without_a_gradient(tmp_path, call):
    """Its column is -inf, the other set ranks alone; only when no set has a gradient does score.py stop."""
    rng = np.random.default_rng(0)
    train = write_sketch(tmp_path / "t.npy", rng.normal(size=(50, 8)))
    good = write_sketch(tmp_path / "good.npy", rng.normal(size=(20, 8)) + 1)
    zero = write_sketch(tmp_path / "zero.npy", np.zeros((20, 8)))
    arguments = ("--train", train, "--alpha", "0.2", "--out", tmp_path / "s.npy", "--val")
    assert call(score, *arguments, good)[0] == 0
    alone, scores = np.load(tmp_path / "s.npy"), np.load(tmp_path / "scores.npy")
    code, out, err = call(score, *arguments, zero, good)
    assert code == 0 and f"warning: {zero}: no prompt with unequal rewards" in err and str(zero) not in out
    assert np.load(tmp_path / "s.npy").tolist() == alone.tolist() and len(alone) == 10
    both = np.load(tmp_path / "scores.npy")
    assert (both[:, 0] == -np.inf).all() and np.allclose(both[:, 1], scores[:, 0], rtol=1e-5, atol=1e-7)
    assert json.loads((tmp_path / "scores.json").read_text())[str(zero)]["effective_prompts"] == 0
    code, _, err = call(score, *arguments, zero, zero)
    assert code == 2 and "found zero mean gradients" in err and err.count("\n") == 1


def test_equal_graded_rewards_are_not_selected(tmp_path, call):
    """A group of eight rewards of 0.1 has no gradient; one of different rewards has."""
    rewards = [[0.1] * 8, [0.1] * 7 + [0.9], [1.0] * 8, [0.5] * 8, [0.2, 0.3] * 4]
    rollouts = rollouts_with_rewards(tmp_path / "r.pt", rewards)
    for method in ("passrate", "learnability"):
        assert call(score, "--method", method, "--rollouts", rollouts, "--alpha", 1,
                    "--out", tmp_path / "s.npy")[0] == 0
        assert sorted(np.load(tmp_path / "s.npy")) == [1, 4]
