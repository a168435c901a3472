"""The verdicts of experiments/protocol2.py follow the rules that experiments/README.md states."""

import json

import pytest

import protocol2
from acceleration import evaluate

FULL = [0.0, 0.2, 0.4, 0.6, 0.6]  # targeted accuracy, which smoothed reaches its end, 0.6, after 40 steps


def stored(targeted, related=0.3, shift=0.0, seconds=1.0):
    """A stored run with an evaluation every 10 steps, whose steps take `seconds` each."""
    targeted = [value + shift for value in targeted]
    accuracy = {"targeted": targeted, "related": [related + shift] * 5, "other": [0.2] * 5}
    return {"steps": [0, 10, 20, 30, 40], "seconds": [10 * i * seconds for i in range(5)],
            "tokens": [100 * i for i in range(5)], "accuracy": accuracy, "greedy": accuracy}


def test_one_base_policy(tmp_path, monkeypatch):
    """Runs that began with different policies are not compared."""
    monkeypatch.setattr(protocol2, "RESULTS", tmp_path)
    (tmp_path / "protocol2").mkdir()
    for name, policy in (("full", "a"), ("cropi", "a")):
        run = {**stored(FULL), "base_policy": policy}
        (tmp_path / f"protocol2/{name}-3.json").write_text(json.dumps(run))
    assert {name: list(runs) for name, runs in protocol2.load().items()} == {"full": [3], "cropi": [3]}
    (tmp_path / "protocol2/dapo-3.json").write_text(json.dumps({**run, "base_policy": "b"}))
    with pytest.raises(SystemExit, match="dapo-3.json: found base policy b; expected .* of this seed, a"):
        protocol2.load()


def test_accuracy_after_equal_seconds():
    """Full data takes 40 s; at 40 s a method of half the speed is where it was at its step 20."""
    methods = {"full": {0: stored(FULL)}, "cropi": {0: stored([0.0, 0.3, 0.6, 0.9, 0.9], seconds=2.0)}}
    found = protocol2.after_equal_seconds(methods, "greedy", "cropi", "full")
    assert found["mean"] == pytest.approx((0.3 + 0.6 + 0.9) / 3 - 0.6)


def verdicts(**methods):
    """{number of the claim: verdict}; each method's run on three seeds, of different levels."""
    seeds = {}
    for name, run in methods.items():
        seeds[name] = {seed: stored(**run, shift=0.01 * seed) for seed in range(3)}
    rows = protocol2.claims(evaluate(seeds, measure="greedy", pairs=protocol2.PAIRS))
    return {claim[0]: found for claim, _, found in rows}


@pytest.fixture
def runs():
    """A world in which everything that is claimed holds, by far."""
    return {"full": {"targeted": FULL}, "influence": {"targeted": [0.0, 0.1, 0.3, 0.5, 0.5]},
            "cropi": {"targeted": [0.0, 0.9, 0.9, 0.9, 0.9]},
            "economical": {"targeted": [0.0, 0.9, 0.9, 0.9, 0.9]}}


def test_all_claims_hold(runs):
    assert verdicts(**runs) == {number: "holds" for number in "12345678"}


def test_claims_that_fail(runs):
    slow = verdicts(**{**runs, "cropi": {"targeted": [0.0, 0.9, 0.9, 0.9, 0.9], "seconds": 9.0}})
    assert slow["1"] == "holds" and slow["2"] == "does not hold" and slow["8"] == "holds"
    better = verdicts(**{**runs, "influence": {"targeted": [0.0, 0.95, 0.95, 0.95, 0.95]}})
    assert [better[number] for number in "345"] == ["does not hold"] * 3
    assert verdicts(**{**runs, "cropi": {"targeted": FULL, "related": 0.2}})["6"] == "does not hold"
    never = verdicts(**{**runs, "economical": {"targeted": [0.0, 0.5, 0.5, 0.5, 0.5]}})
    assert never["7"] == never["8"] == "does not hold"


def test_claims_in_between(runs):
    """CROPI as full data: neither faster nor better; economical CROPI twice as fast as it in seconds."""
    changed = {"cropi": {"targeted": FULL}, "economical": {"targeted": FULL, "seconds": 0.5}}
    found = verdicts(**{**runs, **changed})
    assert [found[number] for number in "128"] == ["in direction"] * 3 and found["3"] == "undecided"
    assert found["4"] == found["7"] == "holds"  # influence once is lower, economical CROPI the same
