"""Other trainers in the loop (TRAINER, examples/train_trl.py), and a selection without training."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import MICRO, ROOT, run_loop

from train_grpo import load_policy

needs_trl = pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="TRL is not installed")

# A trainer that scales the weights and leaves only a checkpoint: no metrics.jsonl, no optimizer.pt. Its first
# run leaves nothing, and its second one fails.
TRAINER = """
import argparse, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
parser = argparse.ArgumentParser()
for name in ("model", "rollouts", "select", "out"):
    parser.add_argument(f"--{name}", required=True)
args, _ = parser.parse_known_args()
runs = Path(__file__).with_name("runs")
runs.touch()
runs.write_text(runs.read_text() + " ".join(sys.argv[1:]) + "\\n")
attempt = len(runs.read_text().splitlines())
if attempt <= 2:
    sys.exit(3 * (attempt == 2))
policy = AutoModelForCausalLM.from_pretrained(args.model)
for weight in policy.parameters():
    weight.data *= 1.01
policy.save_pretrained(args.out)
AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
"""


def all_weights(folder):
    policy = load_policy(folder, "cpu", "float32")
    return torch.cat([weight.detach().flatten() for weight in policy.parameters()])


def trl_command(rollouts, selected, out, *options):
    command = [sys.executable, ROOT / "examples/train_trl.py", "--rollouts", rollouts, "--select", selected,
               "--out", out, "--batch-size", 4, "--group", 16, "--train-temperature", 1, *options]
    return [*map(str, command)]


def test_trainer_that_only_leaves_a_checkpoint(micro_run, world, tmp_path):
    """It is started again until it has left one; phase 1 sketches its policy; no accuracies are shown."""
    script = tmp_path / "my trainer.py"
    script.write_text(TRAINER)
    run = tmp_path / "run"
    run.mkdir()
    os.symlink(micro_run[0] / "rollouts", run / "rollouts")
    settings = {**os.environ, **MICRO, "TOY": str(world), "RUN": str(run), "TRAINER": str(script),
                "BASELINE": ""}

    def loop():
        return subprocess.run(["bash", ROOT / "run_cropi.sh"], capture_output=True, text=True, env=settings)

    done = loop()
    message = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and message.startswith(f"run_cropi.sh: error: TRAINER {script}: ")
    assert f"found no checkpoint in {run}/cropi/phase-0/policy" in message
    assert loop().returncode == 3
    done = loop()
    assert done.returncode == 0, done.stderr
    assert "no accuracies: its phases have no metrics.jsonl with evaluations" in done.stdout
    assert "To reach it" not in done.stdout and "accuracy.png" not in done.stdout
    assert (run / "selected.png").exists()

    calls = [line.split(" --") for line in (tmp_path / "runs").read_text().splitlines()]
    phases = run / "cropi"
    assert len(calls) == 4 and calls[0] == calls[1] == calls[2]
    assert calls[3][0] == f"--model {phases}/phase-0/policy" and f"ref {world}/base" in calls[3]
    assert f"optimizer {phases}/phase-0/policy/optimizer.pt" in calls[3]
    policies = [json.loads((phases / f"phase-{m}/train.json").read_text())["policy"] for m in (0, 1)]
    assert policies[0] != policies[1]
    torch.testing.assert_close(all_weights(phases / "phase-1/policy"), 1.01**2 * all_weights(world / "base"))


def test_selection_without_training(micro_run, world, tmp_path):
    """STEPS=0: METHOD's first selection, the same as with training, without baselines; how to load it."""
    os.symlink(micro_run[0] / "rollouts", tmp_path / "rollouts")
    out = run_loop(tmp_path, world, STEPS="0")  # BASELINE=influence
    assert not (tmp_path / "influence").exists() and not (tmp_path / "cropi/phase-0/policy").exists()
    assert not (tmp_path / "cropi/phase-1").exists()
    file = tmp_path / "cropi/phase-0/selected.npy"
    assert file.read_bytes() == (micro_run[0] / "cropi/phase-0/selected.npy").read_bytes()
    assert f"{file}: the selected prompts" in out and "best first" in out and "docs/integrations.md" in out
    assert "cropi            0        24" in out and (tmp_path / "selected.png").exists()
    seconds = (tmp_path / "cropi/seconds.tsv").read_text()

    run_loop(tmp_path, world, BASELINE="", PHASES="1", STEPS="1")  # trains on this selection
    assert (tmp_path / "cropi/seconds.tsv").read_text().startswith(seconds)
    assert (tmp_path / "cropi/phase-0/policy/model.safetensors").exists()
    run_loop(tmp_path, world, STEPS="0")  # nothing is left to do
    assert "STEPS=1\n" in (tmp_path / "cropi/settings.txt").read_text()


@pytest.fixture(scope="module")
def trl_run(world, tmp_path_factory):
    """(folder RUN, stdout) of two phases of the loop with TRL."""
    run = tmp_path_factory.mktemp("trl")
    return run, run_loop(run, world, BASELINE="", TRAINER=str(ROOT / "examples/train_trl.py"))


@needs_trl
def test_trl_trains_two_phases(trl_run, world, tmp_path):
    """Each phase changes the policy of the one before; the reference of the KL term is --ref."""
    run, out = trl_run
    assert "no accuracies" in out
    phases = [run / f"cropi/phase-{m}" for m in (0, 1)]
    policies = [json.loads((phase / "train.json").read_text())["policy"] for phase in phases]
    assert policies[0] != policies[1]
    weights = [all_weights(f) for f in (world / "base", phases[0] / "policy", phases[1] / "policy")]
    for before, after in zip(weights, weights[1:]):  # 3 AdamW steps of about 1e-3
        assert 1e-3 < (after - before).abs().max() < 1e-2
    assert not list(phases[1].glob("policy/checkpoint-*")) and not (phases[1] / "policy.part").exists()

    command = trl_command(run / "rollouts/train.pt", phases[1] / "selected.npy", tmp_path / "again",
                          "--model", phases[0] / "policy", "--ref", world / "base", "--steps", 1)
    kl, = re.findall("'kl': '([^']*)'", subprocess.run(command, capture_output=True, text=True).stdout)
    assert float(kl) > 1e-4  # at the start of phase 1 it is 0 to --model, not to --ref


@needs_trl
def test_trl_learns_and_resumes(trl_run, world, tmp_path):
    """The reward of two prompts rises (to 0.78 with seeds 1 to 3); a killed run goes on from a checkpoint."""
    rollouts = trl_run[0] / "rollouts/train.pt"
    rewards = torch.load(rollouts, weights_only=True)["rewards"]
    half = (rewards.mean(1) - 0.5).abs().argsort()[:2]
    np.save(tmp_path / "two.npy", half.numpy())
    command = trl_command(rollouts, tmp_path / "two.npy", tmp_path / "policy", "--model", world / "base",
                          "--steps", 20, "--lr", "1e-4", "--save-every", 5, "--seed", 1)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "policy.part/checkpoint-10/trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "policy.part/checkpoint-15").mkdir(exist_ok=True)
    (tmp_path / "policy.part/checkpoint-15/trainer_state.json").unlink(missing_ok=True)  # killed while saving
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = [float(reward) for reward in re.findall("'reward': '([^']*)'", done.stdout)]
    assert len(seen) == 10  # steps 11 to 20
    assert np.mean(seen[-5:]) > float(rewards[half].mean()) + 0.15
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "reward" not in again.stdout  # the phase is done


@needs_trl
def test_trl_refuses(trl_run, world, tmp_path):
    """Dynamic sampling, and a verifier of the user's that is not named."""
    run = trl_run[0]
    rollouts = torch.load(run / "rollouts/train.pt", weights_only=True)
    rollouts["meta"]["verifier"] = "my.py:reward"
    torch.save(rollouts, tmp_path / "mine.pt")
    cases = {"--dynamic-sampling": (run / "rollouts/train.pt", ["--dynamic-sampling"]),
             "--verifier": (tmp_path / "mine.pt", [])}
    for found, (file, more) in cases.items():
        command = trl_command(file, run / "cropi/phase-0/selected.npy", tmp_path / "policy",
                              "--model", world / "base", "--steps", 1, *more)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(f"train_trl.py: error: {found}: found ")
