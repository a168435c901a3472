"""Batches, processes and memory: the plan, torchrun's shards, a run that goes on from its finished batches."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import collect
import sketch


@pytest.mark.parametrize("many", [True, False])
def test_plan_holds_every_prompt_once_within_the_budget(many):
    rng = np.random.default_rng(0)
    sizes = {int(i): (int(rng.integers(1, 60)), int(rng.integers(1, 90))) for i in rng.permutation(200)}
    k, budget = 8, 500
    plan = sketch.plan_batches(sizes, k, budget, many)
    assert sorted(i for batch, *_ in plan for i in batch) == sorted(sizes)
    for batch, rows, tokens in plan:
        own, longest = max(sizes[i][0] for i in batch), max(sizes[i][1] for i in batch)
        assert len(batch) * (own + rows * longest) <= budget and tokens == len(batch) * (own + k * longest)
        assert rows == k or len(batch) == 1 and own + (rows + 1) * longest > budget
    assert (max(len(batch) for batch, *_ in plan) > 1) == many
    assert sketch.plan_batches({0: (9, 9)}, 4, 5, many) == [([0], 1, 45)]  # a row is the least


def test_deal_is_by_cost():
    """Each piece once; loads differ by no more than the costliest piece; a piece of half the work stays alone."""
    costs = np.random.default_rng(0).integers(1, 100, 57).tolist()
    shares = sketch.deal(costs, 5)
    assert sorted(i for share in shares for i in share) == list(range(57))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs)
    assert sorted(map(len, sketch.deal([9, 3, 3, 3], 2))) == [1, 3]


def shards(arguments):
    """A stage by torchrun in two processes."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
                           ROOT / arguments[0], *map(str, arguments[1:])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_collect_the_same_bytes(micro_run, world, tmp_path):
    arguments = ["collect.py", "--model", world / "base", "--data", world / "train.jsonl", "--k", 6, "--verifier", "exact",
                 "--max-new-tokens", 10, "--kv-tokens", 3000]
    one = subprocess.run([sys.executable, *map(str, [ROOT / arguments[0], *arguments[1:], "--out", tmp_path / "one.pt"])])
    assert one.returncode == 0
    assert shards([*arguments, "--out", tmp_path / "two.pt"]).count("two.pt:") == 1
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.pt", "two.pt"]


def test_two_processes_sketch_the_same_bytes(micro_run, world, tmp_path):
    run = micro_run[0]
    names = ("train", "val_sort")
    shards(["sketch.py", "--model", run / "cropi/phase-0/policy", "--rollouts", *(run / f"rollouts/{n}.pt" for n in names),
            "--out", *(tmp_path / f"{n}.npy" for n in names), "--dim", 256, "--batch-tokens", 128])
    for name in names:
        assert (tmp_path / f"{name}.npy").read_bytes() == (run / f"cropi/phase-1/{name}.npy").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4  # with the .json files


class Killed(Exception):
    pass


def killed_after(function, calls):
    """`function`, which raises at its call number calls + 1; .count tells how often it was called."""
    def counted(*arguments):
        counted.count += 1
        if counted.count > calls:
            raise Killed
        return function(*arguments)

    counted.count = 0
    return counted


def test_sketch_goes_on_from_finished_batches(micro_run, world, tmp_path, call, monkeypatch):
    run, call_ = micro_run[0], sketch.Sketcher.__call__
    arguments = ("--model", run / "cropi/phase-0/policy", "--rollouts", run / "rollouts/train.pt", "--out",
                 tmp_path / "train.npy", "--dim", 256)
    monkeypatch.setattr(sketch.Sketcher, "__call__", killed_after(call_, 3 + 4))  # three calls are the comparison's
    with pytest.raises(Killed):
        call(sketch, *arguments, "--batch-tokens", 128)
    assert len(list((tmp_path / "train.npy.parts").glob("*.npy"))) == 4
    counted = killed_after(call_, 999)
    monkeypatch.setattr(sketch.Sketcher, "__call__", counted)
    assert call(sketch, *arguments, "--batch-tokens", 128)[0] == 0
    rollouts = sketch.load_rollouts(run / "rollouts/train.pt")
    longest = rollouts["response_offsets"].diff().view(120, 6).amax(1).tolist()
    live = (rollouts["rewards"].std(1) > 0).nonzero()[:, 0].tolist()
    plan = sketch.plan_batches({i: (len(rollouts["prompts"][i]), longest[i]) for i in live}, 6, 128, True)
    assert len(plan) > 6 and counted.count == 3 + len(plan) - 4
    assert (tmp_path / "train.npy").read_bytes() == (run / "cropi/phase-1/train.npy").read_bytes()


def test_finished_batches_of_other_settings_are_not_used(micro_run, tmp_path, call, monkeypatch):
    run, call_ = micro_run[0], sketch.Sketcher.__call__
    arguments = ("--rollouts", run / "rollouts/train.pt", "--out", tmp_path / "train.npy", "--dim", 256, "--batch-tokens", 128)
    for other in (("--model", run / "influence/phase-1/policy"), ("--model", run / "cropi/phase-0/policy", "--seed", 1),
                  ("--model", run / "cropi/phase-0/policy", "--drop", "rows")):
        monkeypatch.setattr(sketch.Sketcher, "__call__", killed_after(call_, 3 + 4))
        with pytest.raises(Killed):
            call(sketch, *arguments, *other)
    monkeypatch.setattr(sketch.Sketcher, "__call__", call_)
    assert call(sketch, *arguments, "--model", run / "cropi/phase-0/policy")[0] == 0
    assert (tmp_path / "train.npy").read_bytes() == (run / "cropi/phase-1/train.npy").read_bytes()
    assert json.loads((tmp_path / "train.json").read_text())["drop"] == "coordinates"


def test_collection_goes_on_from_finished_batches(world, tmp_path, call, monkeypatch):
    arguments = ("--model", world / "base", "--data", world / "train.jsonl", "--k", 2, "--verifier", "exact",
                 "--max-new-tokens", 10, "--kv-tokens", 1000)
    assert call(collect, *arguments, "--out", tmp_path / "whole.pt")[0] == 0
    monkeypatch.setitem(collect.ENGINES, "hf", killed_after(collect.sample, 2))
    with pytest.raises(Killed):
        call(collect, *arguments, "--out", tmp_path / "killed.pt")
    counted = killed_after(collect.sample, 999)
    monkeypatch.setitem(collect.ENGINES, "hf", counted)
    assert call(collect, *arguments, "--out", tmp_path / "killed.pt")[0] == 0
    prompts = torch.load(tmp_path / "whole.pt", weights_only=True)["prompt_offsets"].diff().tolist()
    plan = collect.batches_by_tokens([2 * (p + 10) for p in prompts], 1000)
    assert len(plan) > 4 and counted.count == len(plan) - 2
    assert (tmp_path / "killed.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()
