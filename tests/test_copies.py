"""Each script stands alone: what two need is copied verbatim into both; none imports another."""

import ast
import doctest
import importlib
import os
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from conftest import ROOT

STAGES = ["collect.py", "sketch.py", "score.py", "train_grpo.py"]


def functions(script):
    """{name: source} of a script's top-level functions and classes, except those of the command line."""
    text = (ROOT / script).read_text()
    nodes = [node for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(text, node) for node in nodes
            if node.name not in ("main", "parse_arguments")}


RANKED = ["collect.py", "sketch.py", "train_grpo.py"]  # those that torchrun can start


@pytest.mark.parametrize("one, other", list(combinations([*STAGES, "plot.py"], 2)))
def test_copies_are_equal(one, other):
    """join_ranks differs: each stage has its own libraries to silence and its own backend."""
    here, there = functions(one), functions(other)
    same_kind = (one in RANKED) == (other in RANKED)  # where there are ranks, fail waits for rank 0
    for name in here.keys() & there.keys() - {"join_ranks"} - (set() if same_kind else {"fail"}):
        assert here[name] == there[name], f"{name} in {one} and {other}"


def test_shared_functions_are_shared():
    """These copies must exist; otherwise renaming one copy would exclude it from the test above."""
    everywhere = {"collect", "sketch", "score", "train_grpo"}
    shared = {"fail": everywhere, "load_rollouts": {"sketch", "train_grpo"},
              "load_policy": everywhere - {"score"}, "stream_seed": everywhere - {"score"},
              "leave_ranks": everywhere - {"score"}, "replacing": everywhere - {"train_grpo"}}
    for name in ("group_advantage", "response_logits", "pad", "token_logprobs", "plan_batches",
                 "check_forward"):
        shared[name] = {"sketch", "train_grpo"}
    for name in ("sample", "sample_vllm", "load_vllm", "verify", "verify_by_function", "load_tokenizer",
                 "batches_by_tokens"):
        shared[name] = {"collect", "train_grpo"}
    for name in ("run_batches", "remove_parts"):
        shared[name] = {"collect", "sketch"}
    for name, scripts in shared.items():
        assert {Path(script).stem for script in STAGES if name in functions(script)} == scripts, name


@pytest.mark.parametrize("script", STAGES)
def test_stages_stand_alone(script):
    tree = ast.parse((ROOT / script).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in imported}
    assert not packages & {"collect", "sketch", "score", "train_grpo", "plot"}


BANNERS = ["1. The paper", "2. Faster, same numbers", "3. Files, resuming, bad input"]
PART_1 = {"score.py": 160, "collect.py": 200, "sketch.py": 240, "train_grpo.py": 250}  # lines to aim for


@pytest.mark.parametrize("script", STAGES)
def test_the_paper_comes_first(script):
    """Three parts in order; main, of at most 60 lines, is in the first, whose length is limited."""
    lines = (ROOT / script).read_text().splitlines()
    banners = [number for number, line in enumerate(lines) if line.startswith("# ==== ")]
    assert [lines[number].strip("# =") for number in banners] == BANNERS
    assert banners[1] <= 1.15 * PART_1[script]
    main, = [node for node in ast.parse("\n".join(lines)).body if getattr(node, "name", "") == "main"]
    assert banners[0] < main.lineno <= main.end_lineno <= banners[1]
    assert main.end_lineno - main.lineno < 60


@pytest.mark.parametrize("script", [*STAGES, "experiments/last_number.py"])
def test_docstring_examples(script, monkeypatch):
    monkeypatch.syspath_prepend((ROOT / script).parent)
    examples = doctest.testmod(importlib.import_module(Path(script).stem))
    assert examples.attempted > 0 and examples.failed == 0


@pytest.mark.parametrize("script", STAGES)
def test_stage_alone_in_a_folder(script, micro_run, world, tmp_path):
    """A copy of the script in an empty folder, with nothing of the repository on the path, on real files."""
    shutil.copy(ROOT / script, tmp_path)
    run, _ = micro_run
    phase, rollouts = run / "cropi/phase-0", run / "rollouts"
    arguments = {
        "collect.py": ["--model", world / "base", "--data", world / "train.jsonl", "--verifier", "exact",
                       "--k", 2, "--max-new-tokens", 10, "--limit", 8, "--out", "train.pt"],
        "sketch.py": ["--model", world / "base", "--rollouts", rollouts / "val_sort.pt", "--out", "val.npy",
                      "--dim", 64],
        "score.py": ["--train", phase / "train.npy", "--val", phase / "val_sort.npy",
                     "--out", "selected.npy"],
        "train_grpo.py": ["--model", world / "base", "--rollouts", rollouts / "train.pt",
                          "--select", phase / "selected.npy", "--steps", 1, "--batch-size", 2,
                          "--out", "policy"]}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, script, *map(str, arguments[script])], cwd=tmp_path,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = {"collect.py": "train.pt", "sketch.py": "val.json", "score.py": "scores.npy",
            "train_grpo.py": "policy/model.safetensors"}
    assert (tmp_path / made[script]).exists()


@pytest.mark.parametrize("script", [*STAGES, "toy/make_toy.py"])
def test_waiting_threads_leave_their_core(script):
    """Set before torch is imported, which reads it once, and only if the user has not."""
    text = (ROOT / script).read_text()
    setting = 'os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")'
    assert text.count(setting) == 1 and text.index(setting) < text.index("\nimport torch")
