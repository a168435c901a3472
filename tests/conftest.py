"""Helpers and fixtures of the tests: tiny models, a tiny toy world, and runs of the whole loop on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # torchrun's default; equal bytes need equal numbers of threads

import pytest
import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy"), str(ROOT / "experiments")]
torch.set_num_threads(1)
MICRO = {"PHASES": "2", "STEPS": "3", "BATCH": "4", "GROUP": "4", "K": "6", "K_VAL": "6", "DIM": "256",
         "SAVE_EVERY": "1", "EVAL_EVERY": "2", "EVAL_SAMPLES": "2", "ALPHA": "0.2", "LR": "1e-3",
         "PYTHON": sys.executable, "BASELINE": "influence", "BATCH_TOKENS": "128", "ENGINE": "hf"}


def tiny_qwen(tied, seed=0, vocab=29, **config):
    """A random Qwen2 with weights large enough that gradients are not small and log-probs not uniform."""
    torch.manual_seed(seed)
    settings = dict(vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                    tie_word_embeddings=tied, eos_token_id=1, pad_token_id=0)
    model = Qwen2ForCausalLM(Qwen2Config(**settings | config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def group_logprobs(policy, prompts, responses, temperature):
    """log pi(x_t | s_t) [b * n, R] and mask of n responses to each of b prompts, by train_grpo.py."""
    import train_grpo

    with torch.no_grad():
        logits, targets, mask = train_grpo.response_logits(policy, prompts, responses, temperature)
        return train_grpo.token_logprobs(logits, targets, mask), mask


def grpo_groups(prompts, responses, logprobs, rewards):
    """train_grpo.py's Groups with advantages, from prompt-major lists and rewards [B, G]."""
    import train_grpo

    groups = []
    for j, of_group in enumerate(rewards):
        rows = slice(j * len(of_group), (j + 1) * len(of_group))
        advantages = train_grpo.group_advantage(of_group)
        groups.append(train_grpo.Group(prompts[j], responses[rows], logprobs[rows], of_group.tolist(),
                                       advantages))
    return groups


def run_script(name, *arguments, cwd=None):
    """Runs a stage as a user does. Returns the completed process."""
    command = [sys.executable, ROOT / name, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def run_loop(run, world, **knobs):
    """Runs run_cropi.sh on the micro world, with `knobs` in its environment. Returns its stdout."""
    done = subprocess.run(["bash", ROOT / "run_cropi.sh"], capture_output=True, text=True,
                          env={**os.environ, **MICRO, "TOY": str(world), "RUN": str(run), **knobs})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A toy world with four families, and a base policy after 200 SFT steps."""
    folder = tmp_path_factory.mktemp("world")
    command = [sys.executable, ROOT / "toy/make_toy.py", "--micro", "--sft-steps", "200", "--out", folder]
    subprocess.run(command, check=True)  # after the bandit of test_grpo.py it learned nothing in this process
    (folder / "seconds.tsv").write_text("world\t1\n")  # tells run_cropi.sh that the world exists
    GenerationConfig(eos_token_id=1, pad_token_id=0, do_sample=True, top_k=20, repetition_penalty=1.05,
                     temperature=0.7).save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="session")
def micro_run(tmp_path_factory, world):
    """(folder RUN, stdout) of two phases of the whole loop on the micro world."""
    run = tmp_path_factory.mktemp("run") / "micro"
    return run, run_loop(run, world)


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, *arguments) runs a stage's main() in this process: (exit code, stdout, stderr)."""

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def without_seconds(path):
    """A file's bytes. For .json and .jsonl, the parsed content without the wall-clock entries (*seconds)."""
    if path.suffix not in (".json", ".jsonl"):
        return path.read_bytes()
    try:
        documents = [json.loads(path.read_text())]
    except ValueError:
        documents = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in document.items() if not k.endswith("seconds")} for document in documents]
