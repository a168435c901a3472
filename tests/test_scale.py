"""Batches, ranks and memory: the batch plan, runs under torchrun, and resuming from finished batches."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, grpo_groups, run_script, tiny_qwen, without_seconds
from transformers import AutoModelForCausalLM

import collect
import sketch
import train_grpo


def test_plan_holds_every_prompt_once_within_the_budget():
    """2000 prompts of random sizes, some over the budget. The ranks' shares differ by 2% at most."""
    rng, k, budget = np.random.default_rng(0), 8, 500
    sizes = {int(i): (int(rng.integers(1, 60)), int(rng.integers(1, 90))) for i in rng.permutation(2000)}
    plan, costs = sketch.plan_batches(sizes, k, budget), []
    assert sorted(i for batch, _ in plan for i in batch) == sorted(sizes)
    for batch, rows in plan:
        own, longest = max(sizes[i][0] for i in batch), max(sizes[i][1] for i in batch)
        assert len(batch) * (own + rows * longest) <= budget
        assert rows == k or len(batch) == 1 and own + (rows + 1) * longest > budget
        costs.append(len(batch) * (own + k * longest))
    assert max(len(batch) for batch, _ in plan) > 1 and len(plan) > 1000
    assert sketch.plan_batches({0: (9, 9)}, 4, 5) == [([0], 1)]  # at least one row
    for ranks in (2, 5, 8):
        loads = [sum(costs[rank::ranks]) for rank in range(ranks)]  # as sketch_file assigns them
        assert max(loads) <= 1.02 * min(loads)


def shards(arguments):
    """Runs a stage under torchrun with two ranks. Returns its stdout."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
               ROOT / arguments[0], *map(str, arguments[1:])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_number_of_threads_changes_rounding_only(micro_run, world, tmp_path, monkeypatch):
    """On some CPUs sums over one and over two threads differ in the last digits; micro_run used one."""
    run = micro_run[0]
    one, two = (sketch.load_rollouts(run / "rollouts/train.pt"), tmp_path / "two.pt")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    settings = ("--model", world / "base", "--data", world / "train.jsonl", "--k", 6, "--verifier", "exact",
                "--max-new-tokens", 10, "--out", two)
    assert run_script("collect.py", *settings).returncode == 0
    two = sketch.load_rollouts(two)
    pairs = list(zip(one["responses"], two["responses"], one["logprobs"], two["logprobs"]))
    same = [(logp, other) for response, drawn, logp, other in pairs if torch.equal(response, drawn)]
    assert len(same) >= 0.99 * len(pairs)  # rounding can change which token a uniform number selects
    for logp, other in same:
        torch.testing.assert_close(logp, other, rtol=0, atol=1e-4)
    done = run_script("sketch.py", "--model", run / "cropi/phase-0/policy",
                      "--rollouts", run / "rollouts/train.pt", "--out", tmp_path / "train.npy",
                      "--dim", 256, "--batch-tokens", 128)
    assert done.returncode == 0, done.stderr
    expected, found = np.load(run / "cropi/phase-1/train.npy"), np.load(tmp_path / "train.npy")
    apart = np.linalg.norm(found - expected, axis=1)
    assert (apart <= 1e-3 * np.linalg.norm(expected, axis=1)).all()


def test_two_processes_collect_the_same_bytes(world, tmp_path, call):
    arguments = ["collect.py", "--model", world / "base", "--data", world / "train.jsonl", "--k", 6,
                 "--verifier", "exact", "--max-new-tokens", 10, "--kv-tokens", 3000]
    assert call(collect, *arguments[1:], "--out", tmp_path / "one.pt")[0] == 0
    assert shards([*arguments, "--out", tmp_path / "two.pt"]).count("two.pt:") == 1
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.pt", "two.pt"]


def test_two_processes_sketch_the_same_bytes(micro_run, world, tmp_path):
    run = micro_run[0]
    names = ("train", "val_sort")
    rollouts, outs = [run / f"rollouts/{n}.pt" for n in names], [tmp_path / f"{n}.npy" for n in names]
    shards(["sketch.py", "--model", run / "cropi/phase-0/policy", "--rollouts", *rollouts, "--out", *outs,
            "--dim", 256, "--batch-tokens", 128])
    for name in names:
        assert (tmp_path / f"{name}.npy").read_bytes() == (run / f"cropi/phase-1/{name}.npy").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4  # with the .json files


def test_a_micro_batch_bounds_the_logits():
    """Qwen2.5-7B's 152,064 tokens, 16 responses of 60 tokens, 150 per micro-batch: at most 150 logit rows."""
    vocabulary, budget, generator = 152064, 150, torch.Generator().manual_seed(0)
    policy = tiny_qwen(tied=True, vocab=vocabulary)
    prompts = [torch.randint(9, vocabulary, (3,), generator=generator).tolist() for _ in range(2)]
    responses = [torch.randint(9, vocabulary, (60,), generator=generator).tolist() for _ in range(16)]
    made, rewards = [], torch.tensor([[0.0, 1.0] * 4] * 2)
    policy.lm_head.register_forward_hook(lambda module, inputs, output: made.append(output[..., 0].numel()))
    args = SimpleNamespace(batch_tokens=budget, kl_coef=0.0, entropy_coef=0.001, max_grad_norm=1.0,
                           train_temperature=1.0, token_mean=False, dtype="float32")
    groups = grpo_groups(prompts, responses, [[0.0] * 60] * 16, rewards)
    train_grpo.grpo_step(policy, None, torch.optim.AdamW(policy.parameters()), groups, args)
    trained = made.copy()
    made.clear()
    projection = sketch.Projection(0, 0.001, 64, "cpu")
    advantages = sketch.group_advantage(rewards)
    for (i,), n in sketch.plan_batches({0: (3, 60), 1: (3, 60)}, 8, budget):
        for first in range(0, 8, n):
            own = responses[i * 8 + first:i * 8 + first + n]
            tau = sketch.Trajectories(prompts[i], own, [torch.zeros(60)] * n,
                                      advantages[i, first:first + n], 8, 1.0)
            sketch.sketch_prompts(policy, projection, [tau])
    for rows in (trained, made):
        assert sum(rows) >= 16 * 59 and max(rows) <= budget and len(rows) > 8


class Killed(Exception):
    pass


def killed_after(function, calls):
    """Wraps `function` to raise Killed at call number calls + 1; .count is the number of calls."""
    def counted(*arguments, **options):
        counted.count += 1
        if counted.count > calls:
            raise Killed
        return function(*arguments)

    counted.count = 0
    return counted


def test_sketch_resumes_after_its_finished_batches(micro_run, world, tmp_path, call, monkeypatch):
    run, sketch_prompts = micro_run[0], sketch.sketch_prompts
    arguments = ("--model", run / "cropi/phase-0/policy", "--rollouts", run / "rollouts/train.pt",
                 "--out", tmp_path / "train.npy", "--dim", 256)
    # choose_sketcher's trial makes the first call
    monkeypatch.setattr(sketch, "sketch_prompts", killed_after(sketch_prompts, 1 + 4))
    with pytest.raises(Killed):
        call(sketch, *arguments, "--batch-tokens", 128)
    assert len(list(tmp_path.glob("train.npy.*.parts/*.pt"))) == 4
    counted = killed_after(sketch_prompts, 999)
    monkeypatch.setattr(sketch, "sketch_prompts", counted)
    assert call(sketch, *arguments, "--batch-tokens", 128)[0] == 0
    rollouts = sketch.load_rollouts(run / "rollouts/train.pt")
    longest = rollouts["response_lengths"].view(120, 6).amax(1).tolist()
    varied = (rollouts["rewards"].std(1) > 0).nonzero()[:, 0].tolist()
    plan = sketch.plan_batches({i: (len(rollouts["prompts"][i]), longest[i]) for i in varied}, 6, 128)
    assert len(plan) > 6 and counted.count == 1 + len(plan) - 4
    assert (tmp_path / "train.npy").read_bytes() == (run / "cropi/phase-1/train.npy").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2  # with the .json file


def test_finished_batches_of_other_settings_are_not_used(micro_run, tmp_path, call, monkeypatch):
    run, sketch_prompts = micro_run[0], sketch.sketch_prompts
    arguments = ("--rollouts", run / "rollouts/train.pt", "--out", tmp_path / "train.npy", "--dim", 256,
                 "--batch-tokens", 128)
    for other in (("--model", run / "influence/phase-1/policy"),
                  ("--model", run / "cropi/phase-0/policy", "--seed", 1),
                  ("--model", run / "cropi/phase-0/policy", "--keep", 0.2)):
        monkeypatch.setattr(sketch, "sketch_prompts", killed_after(sketch_prompts, 1 + 4))
        with pytest.raises(Killed):
            call(sketch, *arguments, *other)
    monkeypatch.setattr(sketch, "sketch_prompts", sketch_prompts)
    assert call(sketch, *arguments, "--model", run / "cropi/phase-0/policy")[0] == 0
    assert (tmp_path / "train.npy").read_bytes() == (run / "cropi/phase-1/train.npy").read_bytes()
    assert json.loads((tmp_path / "train.json").read_text())["keep"] == 0.1
    assert len(list(tmp_path.iterdir())) == 2  # the batches of all four runs are removed


def test_collection_resumes_after_its_finished_batches(world, tmp_path, call, monkeypatch):
    arguments = ("--model", world / "base", "--data", world / "train.jsonl", "--k", 2, "--verifier", "exact",
                 "--max-new-tokens", 10, "--kv-tokens", 1000)
    assert call(collect, *arguments, "--out", tmp_path / "whole.pt")[0] == 0
    monkeypatch.setitem(collect.ENGINES, "hf", killed_after(collect.sample, 2))
    with pytest.raises(Killed):
        call(collect, *arguments, "--out", tmp_path / "killed.pt")
    counted = killed_after(collect.sample, 999)
    monkeypatch.setitem(collect.ENGINES, "hf", counted)
    assert call(collect, *arguments, "--out", tmp_path / "killed.pt")[0] == 0
    prompts = torch.load(tmp_path / "whole.pt", weights_only=True)["prompt_lengths"].tolist()
    plan = collect.batches_by_tokens([2 * (p + 10) for p in prompts], 1000)
    assert len(plan) > 4 and counted.count == len(plan) - 2
    assert (tmp_path / "killed.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()


def test_brackets_in_a_name_do_not_match_another_run(world, tmp_path, call):
    """The parts of a[1].pt are removed at its end, those of an unfinished a1.pt are not."""
    (tmp_path / "a1.pt.0.parts").mkdir()
    assert call(collect, "--model", world / "base", "--data", world / "train.jsonl", "--limit", 2, "--k", 0,
                "--max-new-tokens", 10, "--out", tmp_path / "a[1].pt")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a1.pt.0.parts", "a[1].pt"]


def training(run, world, out, *more):
    """Arguments that train on the selection of phase 0 of the micro run."""
    return ["train_grpo.py", "--model", world / "base", "--rollouts", run / "rollouts/train.pt",
            "--select", run / "cropi/phase-0/selected.npy", "--eval", run / "rollouts/targeted.pt",
            "--steps", 4, "--batch-size", 6, "--group", 4, "--lr", "1e-4", "--eval-every", 2,
            "--eval-samples", 2, "--batch-tokens", 100, "--save-every", 2, "--out", out, *more]


@pytest.mark.parametrize("continued", [False, True])
def test_two_processes_train_the_same(continued, micro_run, world, tmp_path, call, monkeypatch):
    """FSDP2 with two ranks gives the metrics and policy of one to float error, and an ordinary checkpoint.

    continued: from optimizer.pt of an earlier phase; and the two ranks resume what one rank has begun.
    """
    one, two, run = tmp_path / "one", tmp_path / "two", micro_run[0]
    model, more = world / "base", ()
    if continued:
        model = run / "cropi/phase-0/policy"
        more = "--model", model, "--optimizer", model / "optimizer.pt"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(train_grpo, "grpo_step", killed_after(train_grpo.grpo_step, 2))
            call(train_grpo, *training(run, world, two, *more)[1:])
        assert (tmp_path / "two.part/checkpoint.pt").exists()
    assert call(train_grpo, *training(run, world, one, *more)[1:])[0] == 0
    shards(training(run, world, two, *more))
    rows = [[json.loads(line) for line in open(out / "metrics.jsonl")] for out in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 5 - continued
    for first, second in zip(*rows):
        assert first.get("reward") == second.get("reward") and first.get("eval") == second.get("eval")
        for name in ("kl", "grad_norm", "sampling_logp_difference"):
            assert second.get(name, 0) == pytest.approx(first.get(name, 0), rel=1e-3, abs=1e-6)
    base, first, second = (AutoModelForCausalLM.from_pretrained(path).state_dict()
                           for path in (model, one, two))
    moved = sum(((first[name] - base[name]) ** 2).sum() for name in base)
    apart = sum(((second[name] - first[name]) ** 2).sum() for name in first)
    assert moved > 0 and apart <= 1e-4 * moved  # often equal to the bit: few groups have a gradient here
    states = [torch.load(out / "optimizer.pt", weights_only=True)["optimizer"]["state"] for out in (one, two)]
    parameters = dict(AutoModelForCausalLM.from_pretrained(one).named_parameters())
    assert states[0].keys() == states[1].keys() == parameters.keys()
    assert not (two / "lock").exists() and not (two / "checkpoint.pt").exists()


@pytest.mark.parametrize("more", [(), ("--dynamic-sampling", "--token-mean")], ids=["grpo", "dapo"])
def test_stopped_training_goes_on_and_a_second_run_is_refused(more, micro_run, world, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "policy"
    def command(out):
        arguments = training(micro_run[0], world, out, "--save-every", 99, *more)
        return [sys.executable, ROOT / arguments[0], *map(str, arguments[1:])]

    subprocess.run(command(whole), check=True)
    first = subprocess.Popen(command(out), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "policy.part/metrics.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # paused while the second run starts
    second = subprocess.run(command(out), capture_output=True, text=True)
    assert second.returncode == 2 and "another run" in second.stderr and second.stderr.count("\n") == 1
    first.send_signal(signal.SIGINT)
    first.send_signal(signal.SIGCONT)
    said = first.communicate()[1].splitlines()[-1]
    assert first.returncode == 130 and "the same command resumes" in said, said
    assert (tmp_path / "policy.part/checkpoint.pt").exists()
    subprocess.run(command(out), check=True)
    for name in ("model.safetensors", "optimizer.pt"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert without_seconds(out / "metrics.jsonl") == without_seconds(whole / "metrics.jsonl")
