"""What two scripts both need stands in both, word for word; and no script imports another."""

import ast
from itertools import combinations

import pytest
from conftest import ROOT

STAGES = ["collect.py", "sketch.py", "score.py", "train_grpo.py"]


def functions(script):
    """{name: source} of a script's top-level functions and classes, main aside."""
    text = (ROOT / script).read_text()
    return {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main"}


@pytest.mark.parametrize("one, other", list(combinations([*STAGES, "plot.py"], 2)))
def test_copies_are_equal(one, other):
    here, there = functions(one), functions(other)
    assert "fail" in here
    for name in here.keys() & there.keys():
        assert here[name] == there[name], f"{name} in {one} and {other}"


def test_shared_functions_are_shared():
    """The copies that must exist, so that a renamed one does not slip out of the test above."""
    shared = {"sample": ("collect.py", "train_grpo.py"), "sample_vllm": ("collect.py", "train_grpo.py"),
              "load_vllm": ("collect.py", "train_grpo.py"), "verify": ("collect.py", "train_grpo.py"),
              "stream_seed": ("collect.py", "train_grpo.py"), "group_advantage": ("sketch.py", "train_grpo.py"),
              "load_rollouts": ("sketch.py", "score.py", "train_grpo.py"), "Ragged": ("sketch.py", "score.py", "train_grpo.py"),
              "replacing": ("collect.py", "sketch.py", "score.py"), "deal": ("collect.py", "sketch.py"),
              "unfinished": ("collect.py", "sketch.py"), "parts_of": ("collect.py", "sketch.py"),
              "token_logprobs": ("sketch.py", "train_grpo.py"),
              "output_logits": ("sketch.py", "train_grpo.py"),
              "fingerprint": ("collect.py", "sketch.py")}
    for name, scripts in shared.items():
        assert all(name in functions(script) for script in scripts)


@pytest.mark.parametrize("script", STAGES)
def test_stages_stand_alone(script):
    tree = ast.parse((ROOT / script).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in imported} & {"collect", "sketch", "score", "train_grpo", "plot"}
