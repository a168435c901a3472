"""plot.py's table and headlines, from run folders that are written here by hand."""

import json
import re

import numpy as np
import pytest
import torch

import plot


@pytest.fixture
def write_run(tmp_path):
    """write_run(method, greedy, sampled, test="targeted"): a run of one phase, an evaluation per 10 steps."""

    def write(method, greedy, sampled, test="targeted"):
        shared = tmp_path / "rollouts"
        shared.mkdir(exist_ok=True)
        (shared / "seconds.tsv").write_text("val\t5\ntrain\t15\n")
        rollouts = {"response_tokens": torch.zeros(30), "rewards": torch.zeros(4, 2), "families": [""] * 4}
        torch.save(rollouts, shared / "train.pt")
        policy = tmp_path / method / "phase-0/policy"
        policy.mkdir(parents=True)
        np.save(policy.parent / "selected.npy", np.arange(2))
        seconds = "phase-0-sketch\t7\nphase-0-score\t1\nphase-0-train\t99\n"
        (policy.parent.parent / "seconds.tsv").write_text(seconds)
        with open(policy / "metrics.jsonl", "w") as file:
            for i, (one, other) in enumerate(zip(greedy, sampled)):
                row = {"step": 10 * i, "seconds": 20.0 * i, "eval": {test: {"mean": other, "greedy": one}}}
                print(json.dumps(row), file=file)
        return tmp_path / method

    return write


def show(folders, capsys):
    runs = [plot.read_run(folder) for folder in folders]
    plot.print_table(runs)
    plot.print_headline(runs)
    return capsys.readouterr().out


def test_headlines_by_both_measures(write_run, capsys):
    """Smoothed, full data ends at 0.6 by greedy decoding and at 0.3 by the samples."""
    full = write_run("full", [0.0, 0.2, 0.6, 0.6], [0.0, 0.1, 0.3, 0.3])
    cropi = write_run("cropi", [0.0, 0.9, 0.9, 0.9], [0.0, 0.1, 0.2, 0.3])  # smoothed 0.45, 0.6 and to 0.25
    out = show([full, cropi], capsys)
    greedy, sampled = out.partition("By the mean of the samples")[::2]
    assert "By greedy decoding full data ends at 0.600 on targeted" in greedy and "ends at 0.300" in sampled
    # full data's smoothed greedy curve is 0.1, 0.267, 0.467, 0.6; the collection costs 0, each selection 8 s
    assert re.search(r"full +30 steps, 68 s\ncropi +10 steps, 48 s\n", greedy)
    assert re.search(r"full +30 steps, 68 s\ncropi +not reached\n", sampled)
    assert re.search(r"cropi +0 +2 +8\.0 +60\.0 +0\.900 \(0\.300\)\n", out)


def test_runs_with_other_test_sets(write_run, capsys, tmp_path):
    """A run without the first run's test set has no accuracies in the table, no curve and no headline."""
    full = write_run("full", [0.0, 0.5, 0.5], [0.0, 0.4, 0.4])
    other = write_run("cropi", [0.0, 0.7, 0.7], [0.0, 0.7, 0.7], test="gsm8k")
    out = show([full, other], capsys)
    assert re.search(r"cropi +0 +2 +8\.0 +40\.0\n", out) and "gsm8k" not in out and "0.700" not in out
    assert "cropi" not in out.partition("By greedy decoding")[2]
    runs = [plot.read_run(folder) for folder in (full, other)]
    assert plot.plot_accuracy(runs, tmp_path / "a.png").exists()


def test_evaluation_at_temperature_zero(write_run, capsys):
    """Samples and greedy decoding are the same then: one headline."""
    out = show([write_run("full", [0.0, 0.5, 0.5], [0.0, 0.5, 0.5])], capsys)
    assert out.count("To reach it") == 1 and "By greedy decoding full data ends at 0.500" in out
