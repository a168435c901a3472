"""The code of README.md and docs/ runs and does what the pages say; their links lead somewhere."""

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT

import acceleration
import collect
import protocol2
import sketch
import smollm2


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S)


def run_blocks(page, code):
    names = {}
    for block in code:
        exec(compile(block, page, "exec"), names)
    return names


@pytest.fixture
def toy(world, micro_run, tmp_path, monkeypatch):
    """A working directory in which runs/toy is the micro run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/toy").mkdir(parents=True)
    for name, folder in (("world", world), ("cropi", micro_run[0] / "cropi"),
                         ("rollouts", micro_run[0] / "rollouts")):
        (tmp_path / "runs/toy" / name).symlink_to(folder)


def test_links():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), (page.name, target)


def test_functions_of_readme():
    """The scripts have the functions that README names, in its code and in its table of equations."""
    code, = blocks("README.md")
    calls = [node.func for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    named = {(call.value.id, call.attr) for call in calls if isinstance(call, ast.Attribute)}
    assert {call.id for call in calls if isinstance(call, ast.Name)} == {"len", "mean", "project", "range"}
    assert {script for script, _ in named} == {"collect", "sketch", "score", "train_grpo"}
    for script, name in named:
        assert callable(getattr(importlib.import_module(script), name))
    table = (ROOT / "README.md").read_text().partition("| equation | function | file |\n")[2]
    rows = [line.split(" | ")[-2:] for line in table.partition("\n\n")[0].splitlines()[1:]]
    assert len(rows) > 10
    for functions, files in rows:
        sources = "".join((ROOT / file).read_text() for file in re.findall(r"\w+\.\w+", files))
        for name in re.findall(r"`(\w+)`", functions):
            assert re.search(rf"^(def|class) {name}\b|^{name}\(\)", sources, re.M), name


def test_readme_is_short():
    """At most 150 lines, and 1300 words outside tables and code."""
    text = (ROOT / "README.md").read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    words = [word for line in prose.splitlines() if not line.startswith("|") for word in line.split()]
    assert text.count("\n") <= 150 and len(words) <= 1300


def test_reported_numbers():
    """docs/results.md and README.md report what experiments/results/ holds."""
    page = (ROOT / "docs/results.md").read_text().splitlines()
    readme = (ROOT / "README.md").read_text().splitlines()
    parts = json.loads((ROOT / "experiments/results/protocol2.json").read_text())
    del parts["command"]
    tables = [protocol2.claims_table(parts), protocol2.economy_table(parts)]
    for part in parts.values():
        for measure in protocol2.MEASURES:
            tables.append(protocol2.table(part[measure]))
    for lines in tables:
        for line in lines:
            assert line in page
    for line in protocol2.summary(parts["main"]):
        assert line in readme

    result = json.loads((ROOT / "experiments/results/acceleration.json").read_text())
    for found in (result, *result["other_worlds"].values()):
        for line in acceleration.table(found):
            assert line in page
    row, = [line for line in readme if line.startswith("| ALPHA=0.1")]
    expected = [np.mean(result["final_accuracy"]["targeted"]["full"]["per_seed"][:4])]
    for method in ("influence", "cropi"):
        expected.append(result["final_accuracy"]["targeted"][f"{method} (alpha)"]["mean"])
    assert re.findall(r"\d\.\d{3}", row) == [f"{value:.3f}" for value in expected]

    result = json.loads((ROOT / "experiments/results/smollm2.json").read_text())["greedy"]
    row, = [line for line in readme if line.startswith("| [SmolLM2-135M]")]
    expected = [np.mean(result["base"]["targeted"])]
    for method in ("full", "influence", "cropi"):
        expected.append(result["final_accuracy"]["targeted"][method]["mean"])
    assert re.findall(r"\d\.\d{3}", row) == [f"{value:.3f}" for value in expected]
    runs = smollm2.load()
    for lines in smollm2.tables(runs, smollm2.evaluate(runs)):
        for line in lines:
            assert line in page


def test_integrations(toy, world, micro_run, call):
    """Samples of the micro run, logged as text, make the rollouts.pt that they came from."""
    rollouts = sketch.load_rollouts(micro_run[0] / "rollouts/train.pt")
    tokenizer, k = collect.load_tokenizer(world / "base"), rollouts["meta"]["k"]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in rollouts["responses"]]
    again = [tokenizer(text).input_ids for text in texts]
    same = [tokens[:len(ids)].tolist() == ids and len(tokens) <= len(ids) + 1
            for tokens, ids in zip(rollouts["responses"], again)]  # false where padding was sampled
    kept = [i for i in range(120) if all(same[i * k:(i + 1) * k])]
    assert len(kept) >= 60 and rollouts["meta"]["max_new_tokens"] == 10
    with open("generations.jsonl", "w") as file:
        for j in [i * k + j for i in kept for j in range(k)]:
            row = {"prompt": tokenizer.decode(rollouts["prompts"][j // k]), "response": texts[j],
                   "answer": rollouts["answers"][j // k], "reward": rollouts["rewards"].flatten()[j].item()}
            print(json.dumps(row), file=file)
    *code, tensorboard = blocks("docs/integrations.md")
    names = run_blocks("docs/integrations.md", code)

    assert call(sketch, "--model", world / "base", "--rollouts", micro_run[0] / "rollouts/train.pt",
                "--out", "r.npy", "--dim", 4096)[0] == 0
    ours, expected = names["sketches"], torch.from_numpy(np.load("r.npy")[:4])
    assert ours.shape == (4, 4096) and expected.norm() > 0
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5 * float(expected.norm()))

    logged = sketch.load_rollouts("logged.pt")
    assert torch.equal(logged["rewards"], rollouts["rewards"][kept])
    rows = [i * k + j for i in kept for j in range(k)]
    for name, expected in (("prompts", kept), ("responses", rows), ("logprobs", rows)):
        assert len(logged[name]) == len(expected)
        for found, i in zip(logged[name], expected):
            torch.testing.assert_close(found, rollouts[name][i], rtol=1e-4, atol=1e-4)
    assert call(sketch, "--model", world / "base", "--rollouts", "logged.pt", "--out", "l.npy", "--dim", 256,
                "--batch-tokens", 128)[0] == 0
    ours = np.load(micro_run[0] / "influence/phase-0/train.npy")[kept]
    np.testing.assert_allclose(np.load("l.npy"), ours, rtol=1e-3, atol=1e-3 * np.abs(ours).max())

    lines = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    selected = np.load(micro_run[0] / "cropi/phase-0/selected.npy")
    chosen = datasets.Dataset.from_parquet("chosen.parquet").to_list()
    scores = np.load(micro_run[0] / "cropi/phase-0/scores.npy")
    assert len(chosen) == len(selected) == 24
    for row, i in zip(chosen, selected):
        assert row["index"] == i and row["pass_rate"] == pytest.approx(float(rollouts["rewards"][i].mean()))
        assert [row["influence_val_sort"], row["influence_val_dbl"]] == pytest.approx(scores[i].tolist())
        assert {name: row[name] for name in lines[i]} == lines[i]
    examples = collect.load_examples("chosen.parquet", ["prompt"], ["answer"], "family", None)
    assert [prompt for prompt, _, _ in examples] == [row["prompt"] for row in chosen]

    verl = pyarrow.parquet.read_table("verl.parquet").to_pylist()
    openrlhf = [json.loads(line) for line in open("openrlhf.jsonl")]
    assert len(verl) == len(openrlhf) == 24
    for ours, theirs, i in zip(verl, openrlhf, selected):
        messages = [{"role": "user", "content": lines[i]["prompt"]}]
        assert ours["prompt"] == theirs["prompt"] == messages and theirs["label"] == lines[i]["answer"]
        assert ours["reward_model"] == {"style": "rule", "ground_truth": lines[i]["answer"]}
        assert ours["extra_info"] == {"split": "train", "index": i} and set(ours) == {
            "data_source", "prompt", "ability", "reward_model", "extra_info"}
    assert names["messages"](messages) == messages
    check_reward_functions(next(block for block in code if "def compute_score" in block))

    test = micro_run[0] / "rollouts/targeted.pt"
    greedy = names["accuracy"](world / "base", test, 0.0, 1)
    rows = (micro_run[0] / "cropi/phase-0/policy/metrics.jsonl").read_text().splitlines()
    assert greedy == pytest.approx(json.loads(rows[0])["eval"]["targeted"]["greedy"])

    if importlib.util.find_spec("tensorboard"):
        exec(compile(tensorboard, "docs/integrations.md", "exec"), names)
        assert list(Path("tensorboard/cropi").iterdir())


def check_reward_functions(block):
    """reward.py on its own: called from a thread, as by verl, and with special tokens, as by OpenRLHF."""
    Path("reward.py").write_text(block)
    Path("call.py").write_text("""
import threading, reward
if __name__ == "__main__":
    call = lambda: print(reward.compute_score("cropi", r"\\boxed{1/2}", "0.5"))
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    pad, end = "<|endoftext|>", "<|im_end|>"
    queries = [f"{pad}{pad}1+1=2{end}", f"{pad}1+1=no solution{end}{pad}", f"1+1=3{end}"]
    print(reward.reward_func(queries, ["1+1="] * 3, ["2", "no solution", "2"])["rewards"].tolist())
""")
    done = subprocess.run([sys.executable, "call.py"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout == "1.0\n[1.0, 1.0, 0.0]\n", done.stderr


def test_walkthrough(toy, capsys):
    names = run_blocks("docs/walkthrough.md", blocks("docs/walkthrough.md"))
    row = torch.from_numpy(names["train"][names["i"]])
    assert (names["ours"] - row).norm() < 1e-5 * row.norm()
    live = names["norms"] > 0
    np.testing.assert_allclose(names["scores"][live], names["stored"][live], atol=1e-5)
    out = capsys.readouterr().out
    assert "the same selection: True" in out and out.count(" solved by beta ") == 10
