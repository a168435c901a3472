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


@pytest.mark.parametrize("one, other", list(combinations([*STAGES, "plot.py"], 2)))
def test_copies_are_equal(one, other):
    here, there = functions(one), functions(other)
    assert "fail" in here
    for name in here.keys() & there.keys():
        assert here[name] == there[name], f"{name} in {one} and {other}"


def test_shared_functions_are_shared():
    """These copies must exist; otherwise renaming one copy would exclude it from the test above."""
    everywhere = {"collect", "sketch", "score", "train_grpo"}
    shared = {"fail": everywhere, "load_rollouts": {"sketch", "train_grpo"},
              "load_policy": everywhere - {"score"}, "stream_seed": everywhere - {"score"},
              "replacing": everywhere - {"train_grpo"}}
    for name in ("group_advantage", "output_logits", "token_logprobs", "group_hidden", "plan_batches"):
        shared[name] = {"sketch", "train_grpo"}
    for name in ("sample", "sample_vllm", "load_vllm", "verify", "load_tokenizer"):
        shared[name] = {"collect", "train_grpo"}
    shared["run_batches"] = {"collect", "sketch"}
    for name, scripts in shared.items():
        assert {Path(script).stem for script in STAGES if name in functions(script)} == scripts, name


@pytest.mark.parametrize("script", STAGES)
def test_stages_stand_alone(script):
    tree = ast.parse((ROOT / script).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in imported}
    assert not packages & {"collect", "sketch", "score", "train_grpo", "plot"}


def test_copies_stay_few():
    """Lines of shared functions beyond their first copies: a limit that keeps the scripts short."""
    lines = {}
    for script in STAGES:
        for name, source in functions(script).items():
            lines.setdefault(name, []).append(len(source.splitlines()))
    assert sum(sum(counts[1:]) for counts in lines.values()) <= 290


@pytest.mark.parametrize("script", STAGES)
def test_functions_fit_on_a_screen(script):
    """At most 60 lines per function or class."""
    nodes = ast.walk(ast.parse((ROOT / script).read_text()))
    long = {node.name: node.end_lineno - node.lineno + 1 for node in nodes
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.end_lineno - node.lineno >= 60}
    assert not long


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
