"""The code of docs/integrations.md runs, and does what the page says."""

import importlib.util
import json
import re

import numpy as np
import torch
from conftest import ROOT

import collect
import sketch


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S)


def test_integrations(world, micro_run, tmp_path, monkeypatch, call):
    """Samples of the micro run, logged as text, make the rollouts.pt that they came from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/toy").mkdir(parents=True)
    for name, folder in (("world", world), ("cropi", micro_run[0] / "cropi")):
        (tmp_path / "runs/toy" / name).symlink_to(folder)
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
    *code, trl = blocks("docs/integrations.md")
    names = {}
    for block in code:
        exec(compile(block, "docs/integrations.md", "exec"), names)

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
    chosen = [json.loads(line) for line in open("chosen.jsonl")]
    assert chosen == [lines[i] for i in selected]
    examples = collect.load_examples("chosen.parquet", ["prompt"], ["answer"], "family", None)
    assert [prompt for prompt, _, _ in examples] == [row["prompt"] for row in chosen]

    if importlib.util.find_spec("trl"):
        exec(compile(trl, "docs/integrations.md", "exec"), names)
        assert collect.load_policy("trl-policy", "cpu", "float32")
