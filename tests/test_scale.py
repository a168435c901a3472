"""Batches, processes and memory: the plan, torchrun's shards, a run that goes on from its finished batches."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, tiny_qwen, without_seconds
from transformers import AutoModelForCausalLM

import collect
import sketch
import train_grpo


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


def test_the_number_of_threads_changes_rounding_only(micro_run, world, tmp_path, monkeypatch):
    """On some CPUs sums of one thread and of two differ in the last digits; micro_run was made with one."""
    run = micro_run[0]
    one, two = (sketch.load_rollouts(run / "rollouts/train.pt"), tmp_path / "two.pt")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    settings = ("--model", world / "base", "--data", world / "train.jsonl", "--k", 6, "--verifier", "exact",
                "--max-new-tokens", 10, "--out", two)
    assert run_script("collect.py", *settings).returncode == 0
    two = sketch.load_rollouts(two)
    pairs = list(zip(one["responses"], two["responses"], one["logprobs"], two["logprobs"]))
    same = [(logp, other) for response, drawn, logp, other in pairs if torch.equal(response, drawn)]
    assert len(same) >= 0.99 * len(pairs)  # a uniform number at the edge between two tokens may fall on either side
    for logp, other in same:
        torch.testing.assert_close(logp, other, rtol=0, atol=1e-4)
    done = run_script("sketch.py", "--model", run / "cropi/phase-0/policy", "--rollouts", run / "rollouts/train.pt",
                      "--out", tmp_path / "train.npy", "--dim", 256, "--batch-tokens", 128)
    assert done.returncode == 0, done.stderr
    expected, found = np.load(run / "cropi/phase-1/train.npy"), np.load(tmp_path / "train.npy")
    apart = np.linalg.norm(found - expected, axis=1)
    assert (apart <= 1e-3 * np.linalg.norm(expected, axis=1)).all()


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


def test_logits_of_a_real_vocabulary_exist_in_parts():
    """152,064 tokens as in Qwen2.5-7B, 16 responses of 60 tokens: 146M logits in all, at most 2^25 = 34M at once."""
    policy, generator = tiny_qwen(tied=True, vocab=152064), torch.Generator().manual_seed(0)
    prompts = [torch.randint(9, 152064, (3,), generator=generator).tolist() for _ in range(2)]
    responses = [torch.randint(9, 152064, (60,), generator=generator).tolist() for _ in range(16)]
    made, rewards = [], torch.tensor([[0.0, 1.0] * 4] * 2)
    policy.lm_head.register_forward_hook(lambda module, inputs, output: made.append(output.numel()))
    args = SimpleNamespace(batch_tokens=10**6, clip=0.2, kl_coef=0.0, max_grad_norm=1.0)
    train_grpo.grpo_step(policy, None, torch.optim.AdamW(policy.parameters()), prompts, responses, [[0.0] * 60] * 16, rewards,
                         1.0, args)
    sketcher = sketch.Sketcher(policy, sketch.Projection(0, 0.001, 64, "sjlt", "coordinates", "cpu"))
    assert sketcher.fast
    advantages = sketch.group_advantage(rewards).flatten()
    sketcher(prompts, responses, [torch.zeros(60)] * 16, advantages, 8, 1.0)
    total = 16 * 60 * 152064
    assert sum(made) >= 2 * total and max(made) <= 2**25 < total / 4


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


def training(run, world, out, *more):
    """train_grpo.py on what phase 0 of the micro run selected."""
    return ["train_grpo.py", "--model", world / "base", "--rollouts", run / "rollouts/train.pt", "--select",
            run / "cropi/phase-0/selected.npy", "--eval", run / "rollouts/targeted.pt", "--steps", 4, "--batch-size", 6,
            "--group", 4, "--lr", "1e-4", "--eval-every", 2, "--eval-samples", 2, "--batch-tokens", 100, "--save-every", 2,
            "--out", out, *more]


def test_two_processes_train_the_same(micro_run, world, tmp_path):
    """FSDP2 over two processes: the metrics and the policy of one, to float error, and a checkpoint of the usual kind."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = training(micro_run[0], world, one)
    subprocess.run([sys.executable, *map(str, [ROOT / arguments[0], *arguments[1:]])], check=True)
    shards(training(micro_run[0], world, two, "--gradient-checkpointing"))
    rows = [[json.loads(line) for line in open(out / "metrics.jsonl")] for out in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 5
    for first, second in zip(*rows):
        assert first.get("reward") == second.get("reward") and first.get("eval") == second.get("eval")
        for name in ("kl", "grad_norm", "engine_gap"):
            assert second.get(name, 0) == pytest.approx(first.get(name, 0), rel=1e-3, abs=1e-6)
    policies = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (world / "base", one, two)]
    moved, apart = (sum(((other[name] - here[name]) ** 2).sum() for name in here)
                    for here, other in (policies[:2], policies[1:]))
    assert 0 < apart <= 1e-4 * moved
    states = [torch.load(out / "optimizer.pt", weights_only=True)["optimizer"]["state"] for out in (one, two)]
    assert states[0].keys() == states[1].keys() == dict(AutoModelForCausalLM.from_pretrained(one).named_parameters()).keys()
    assert not (two / "lock").exists() and not (two / "checkpoint.pt").exists()


def test_stopped_training_goes_on_and_a_second_run_is_refused(micro_run, world, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "policy"
    command = lambda out: [sys.executable, ROOT / "train_grpo.py",
                           *map(str, training(micro_run[0], world, out, "--save-every", 99)[1:])]
    subprocess.run(command(whole), check=True)
    first = subprocess.Popen(command(out), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "policy.part/metrics.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # it stays in its second step while the other one starts
    second = subprocess.run(command(out), capture_output=True, text=True)
    assert second.returncode == 2 and "another run" in second.stderr and second.stderr.count("\n") == 1
    first.send_signal(signal.SIGINT)
    first.send_signal(signal.SIGCONT)
    said = first.communicate()[1].splitlines()[-1]
    assert first.returncode == 130 and "the same command goes on" in said, said
    assert (tmp_path / "policy.part/checkpoint.pt").exists()
    subprocess.run(command(out), check=True)
    for name in ("model.safetensors", "optimizer.pt"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert without_seconds(out / "metrics.jsonl") == without_seconds(whole / "metrics.jsonl")
