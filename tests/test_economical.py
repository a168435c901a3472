"""Economical selection: m of K responses, candidates by score, scores averaged over the phases."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import tiny_qwen
from test_scale import shards
from test_score import write_sketch

import score
import sketch


def group(rewards, numbers=None, advantages=None):
    """Trajectories of one prompt with a response per reward; `numbers` of them with these advantages."""
    rng = torch.Generator().manual_seed(0)
    k = len(rewards)
    responses = [torch.randint(2, 29, (2 + i,), generator=rng) for i in range(k)]
    beta = [torch.rand(len(response), generator=rng, dtype=torch.float64) - 3.5 for response in responses]
    if numbers is None:
        numbers = range(k)
        advantages = sketch.group_advantage(torch.tensor(rewards, dtype=torch.float64))
    return sketch.Trajectories(torch.tensor([3, 4, 5]), [responses[i] for i in numbers],
                               [beta[i] for i in numbers], advantages, k, 0.7)


@pytest.mark.parametrize("rewards, m, draws", [
    ([1.0, 0, 0, 1], 2, 2 * 2), ([1.0, 0, 0, 1], 3, 2), ([1.0, 0, 0, 0], 2, 3), ([0.1, 0.2, 0.8, 1.0], 2, 4),
    ([0.1, 0.5, 0.5, 0.9], 3, 1), ([1.0, 0, 0, 0, 0, 0, 0, 0], 2, 7), ([1.0] * 7 + [0.0], 4, 35)])
def test_mean_over_all_draws_is_the_gradient_of_all_responses(rewards, m, draws, monkeypatch):
    """All draws, found with many seeds, are equally likely: their mean is the expectation.

    In float64, except for transformers' RMSNorm, which computes in float32.
    """
    advantages = sketch.group_advantage(torch.tensor(rewards, dtype=torch.float64))
    found = {}
    counts = {}
    for seed in range(60 * draws):
        numbers, weighted = sketch.draw_responses(advantages, m, seed)
        assert len(numbers) == len(weighted) == m and len(set(numbers)) == m
        key = tuple(numbers)
        found[key] = numbers, weighted
        counts[key] = counts.get(key, 0) + 1
    assert len(found) == draws and min(counts.values()) > 20 and max(counts.values()) < 120
    policy = tiny_qwen(tied=True).double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # response_logits rounds to float32
    truth, _ = sketch.prompt_gradient(policy, group(rewards))
    mean = dict.fromkeys(truth, 0)
    for numbers, weighted in found.values():
        part, _ = sketch.prompt_gradient(policy, group(rewards, numbers, weighted))
        for name, gradient in part.items():
            mean[name] = mean[name] + gradient / draws
    for name, gradient in truth.items():
        assert (mean[name] - gradient).norm() <= 1e-6 * gradient.norm()


def test_right_and_wrong_responses_are_always_drawn():
    for rewards, m in itertools.product(([1.0] + [0.0] * 7, [1.0] * 7 + [0.0], [1.0, 0.0] * 4), range(2, 8)):
        advantages = sketch.group_advantage(torch.tensor(rewards))
        _, weighted = sketch.draw_responses(advantages, m, 0)
        assert (weighted > 0).any() and (weighted < 0).any()
        right = int(sum(rewards))
        expected = min(right, m // 2)
        expected = min(right, m - min(8 - right, m - expected))
        assert int((weighted > 0).sum()) == expected


@pytest.fixture
def inputs(micro_run, world):
    return ["--model", world / "base", "--rollouts", micro_run[0] / "rollouts/train.pt",
            micro_run[0] / "rollouts/val_sort.pt", "--dim", 64]


def test_two_responses_cost_two_responses(inputs, micro_run, tmp_path, call, monkeypatch):
    """The policy sees 2 of the train prompts' 6 responses, and all of the validation prompts'."""
    seen = []
    forward = sketch.response_logits

    def counted(policy, prompts, responses, temperature):
        seen.append((len(prompts), len(responses), sum(map(len, responses))))
        return forward(policy, prompts, responses, temperature)

    monkeypatch.setattr(sketch, "check_forward", lambda policy: None)
    monkeypatch.setattr(sketch, "response_logits", counted)
    outs = [tmp_path / "t.npy", tmp_path / "v.npy"]
    assert call(sketch, *inputs, "--out", *outs, "--responses", 2)[0] == 0
    train, val = (json.loads(out.with_suffix(".json").read_text()) for out in outs)
    assert (train["responses"], val["responses"]) == (2, 6)
    rewards = sketch.load_rollouts(micro_run[0] / "rollouts/train.pt")["rewards"]
    assert train["candidates"] == int((rewards.amax(1) > rewards.amin(1)).sum()) == len(np.load(outs[0])[
        np.load(outs[0]).any(1)])
    trial = [calls for calls in seen if calls[:2] == (2, 4) and calls[2] == 15]  # choose_sketcher's
    work = seen[3:]  # after the trial: two prompts one by one, and both at once
    assert trial and sum(tokens for _, _, tokens in work) == train["tokens"] + val["tokens"]
    assert sum(n for _, n, _ in work) == 2 * train["candidates"] + 6 * val["candidates"]


def test_same_bytes_for_any_number_of_ranks(inputs, tmp_path, call):
    """And the same draws, to rounding, in batches of another size; others for another seed."""
    def run(name, *options):
        out = [tmp_path / f"{name}-t.npy", tmp_path / f"{name}-v.npy"]
        assert call(sketch, *inputs, "--out", *out, "--responses", 2, *options)[0] == 0
        return out[0]

    one = run("one")
    shards(["sketch.py", *inputs, "--out", tmp_path / "two-t.npy", tmp_path / "two-v.npy", "--responses", 2])
    assert one.read_bytes() == (tmp_path / "two-t.npy").read_bytes()
    assert np.abs(np.load(run("small", "--batch-tokens", 64)) - np.load(one)).max() < 1e-4
    rollouts = torch.load(inputs[3], weights_only=True)
    advantages = sketch.group_advantage(rollouts["rewards"])
    numbers = [sketch.draw_responses(advantages[0], 2, seed)[0] for seed in range(20)]
    assert len({str(drawn) for drawn in numbers}) > 1


def test_fewer_than_two_responses_are_refused(inputs, tmp_path, call):
    code, _, error = call(sketch, *inputs, "--out", tmp_path / "t.npy", tmp_path / "v.npy", "--responses", 1)
    assert code == 2 and "--responses: found 1; expected at least 2" in error


def candidates(scores, unequal, n, share, folder, policy="p"):
    """sketch.py's candidates by `scores` [n, V]."""
    np.save(folder / "scores.npy", scores.astype(np.float32))
    args = type("", (), {"candidates": share, "scores": folder / "scores.npy"})
    return sketch.draw_candidates(args, unequal, n, {"seed": 0, "policy": policy})


def test_candidates_by_score(tmp_path):
    """Four fifths are of the best rank in any column, the others change with the policy."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(200, 3))
    unequal = list(range(0, 200, 2))
    scores[1::2] = -np.inf
    best = sorted(unequal, key=lambda i: (min((scores[:, v] > scores[i, v]).sum() for v in range(3)), i))[:20]
    found = [set(candidates(scores, unequal, 200, 0.25, tmp_path, policy)) for policy in "abcd"]
    for drawn in found:
        assert len(drawn) == 25 and set(best) <= drawn <= set(unequal)
    assert len({frozenset(drawn) for drawn in found}) == 4
    assert candidates(scores, unequal, 200, 1, tmp_path) == unequal


def test_candidates_that_were_never_scored(tmp_path):
    """If few prompts have a score, the others are drawn at random."""
    scores = np.full((40, 1), -np.inf)
    scores[[3, 8]] = 0.5
    drawn = candidates(scores, list(range(40)), 40, 0.5, tmp_path)
    assert len(drawn) == 20 and {3, 8} <= set(drawn)


@pytest.mark.parametrize("kind", ["rows", "pool", "missing"])
def test_scores_of_another_pool_are_refused(kind, tmp_path, capsys):
    scores = np.zeros((41 if kind == "rows" else 40, 1))
    unequal = list(range(40)) if kind != "pool" else list(range(39))  # prompt 39 has a score, but no gradient
    if kind == "missing":
        scores = scores.astype(object)
    with pytest.raises(SystemExit) as stop:
        if kind == "missing":
            args = type("", (), {"candidates": 0.5, "scores": tmp_path / "none.npy"})
            sketch.draw_candidates(args, unequal, 40, {"seed": 0, "policy": "p"})
        else:
            candidates(scores, unequal, 40, 0.5, tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "no usable scores" in error


def phase(folder, call, train, val, *options):
    """Scores one phase in its own folder; returns scores.npy and selected.npy."""
    folder.mkdir()
    sketches = [write_sketch(folder / "train.npy", train), write_sketch(folder / "val_a.npy", val)]
    code, _, error = call(score, "--train", sketches[0], "--val", sketches[1], "--out",
                          folder / "selected.npy", "--alpha", "0.2", *options)
    assert code == 0, error
    return np.load(folder / "scores.npy"), np.load(folder / "selected.npy")


def test_momentum(tmp_path, call):
    """S(m) in closed form over three phases, with prompts that are no candidates in some of them."""
    rng = np.random.default_rng(1)
    trains = rng.normal(size=(3, 30, 16))
    vals = rng.normal(size=(3, 10, 16)) + 1
    trains[0, :5] = trains[1, 3:8] = trains[2, 6:9] = 0
    expected = np.full(30, -np.inf)
    for m in range(3):
        mean = vals[m].astype(np.float32).mean(0)
        lengths = np.linalg.norm(trains[m], axis=1)
        with np.errstate(invalid="ignore"):
            cosines = trains[m] @ mean / np.linalg.norm(mean) / lengths
        for i in range(30):
            if lengths[i] == 0:
                continue
            expected[i] = cosines[i] if np.isinf(expected[i]) else 0.3 * cosines[i] + 0.7 * expected[i]
        options = ["--previous", tmp_path / f"phase-{m - 1}/scores.npy"] if m else []
        options = ["--momentum", 0.7, *options]
        found, selected = phase(tmp_path / f"phase-{m}", call, trains[m], vals[m], *options)
        np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5, atol=1e-7)
        sketched = np.where(lengths > 0, expected, -np.inf)
        assert selected.tolist() == np.argsort(-sketched, kind="stable")[:6].tolist()


def test_momentum_of_zero_is_the_paper(tmp_path, call):
    rng = np.random.default_rng(2)
    train, val = rng.normal(size=(30, 8)), rng.normal(size=(10, 8))
    phase(tmp_path / "other", call, rng.normal(size=(30, 8)), val)
    plain = phase(tmp_path / "plain", call, train, val)
    zero = phase(tmp_path / "zero", call, train, val, "--momentum", 0, "--previous",
                 tmp_path / "other/scores.npy")
    assert np.array_equal(plain[0], zero[0]) and np.array_equal(plain[1], zero[1])


def test_a_set_without_a_gradient_ranks_nothing_by_its_old_scores(tmp_path, call):
    """With momentum 0, as run_cropi.sh calls it by default, earlier scores change nothing."""
    rng = np.random.default_rng(5)
    train = rng.normal(size=(30, 8))
    found = {}
    for name, second in (("before", rng.normal(size=(10, 8))), ("plain", np.zeros((10, 8)))):
        (tmp_path / name).mkdir()
        sketches = [write_sketch(tmp_path / name / f"{part}.npy", array)
                    for part, array in (("t", train), ("a", np.ones((10, 8))), ("b", second))]
        for out, more in (("s", []), ("again", ["--previous", tmp_path / "before/scores.npy"])):
            if name == "before" and out == "again":
                continue
            assert call(score, "--train", sketches[0], "--val", *sketches[1:], "--alpha", "0.2", "--out",
                        tmp_path / name / f"{out}.npy", *more)[0] == 0
            found[name, out] = [np.load(tmp_path / name / f"{file}.npy") for file in (out, "scores")]
    plain, again = found["plain", "s"], found["plain", "again"]
    assert np.isneginf(plain[1][:, 1]).all()
    assert np.array_equal(plain[0], again[0]) and np.array_equal(plain[1], again[1])


def test_fewer_candidates_than_the_selection(tmp_path, call):
    """Only candidates are selected, even if others have a score of an earlier phase; the line says so."""
    rng = np.random.default_rng(3)
    train, val = rng.normal(size=(30, 8)), rng.normal(size=(10, 8))
    phase(tmp_path / "before", call, train, val)
    train[4:] = 0
    sketches = [write_sketch(tmp_path / "t.npy", train), write_sketch(tmp_path / "val_a.npy", val)]
    code, stdout, _ = call(score, "--train", sketches[0], "--val", sketches[1], "--alpha", "0.2", "--out",
                           tmp_path / "s.npy", "--previous", tmp_path / "before/scores.npy")
    assert code == 0 and sorted(np.load(tmp_path / "s.npy")) == [0, 1, 2, 3]
    assert "4 of 30 prompts by cropi (fewer than floor(alpha N) = 6" in stdout


@pytest.mark.parametrize("kind", ["rows", "columns", "sets", "truncated", "missing"])
def test_previous_scores_of_other_sketches_are_refused(kind, tmp_path, call):
    rng = np.random.default_rng(4)
    train, val = rng.normal(size=(30, 8)), rng.normal(size=(10, 8))
    phase(tmp_path / "before", call, train, val)
    previous = tmp_path / "before/scores.npy"
    if kind == "rows":
        np.save(previous, np.load(previous)[:29])
    elif kind == "columns":
        np.save(previous, np.repeat(np.load(previous), 2, axis=1))
    elif kind == "truncated":
        previous.write_bytes(previous.read_bytes()[:-4])
    elif kind == "missing":
        previous.unlink()
    sketches = [write_sketch(tmp_path / "t.npy", train),
                write_sketch(tmp_path / ("val_b.npy" if kind == "sets" else "val_a.npy"), val)]
    code, _, error = call(score, "--train", sketches[0], "--val", sketches[1], "--alpha", "0.2", "--out",
                          tmp_path / "s.npy", "--previous", previous)
    assert code == 2 and error.count("\n") == 1 and f"{previous}: found no usable scores" in error
    assert not (tmp_path / "s.npy").exists()
