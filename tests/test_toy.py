"""The toy world: right answers, disjoint files, the protocol's sizes, another world for another seed."""

import json
import random
import re

import pytest

import make_toy

SOLVE = {  # answers derived from the prompt alone, by other means than the generators'
    "+": lambda text: str(sum(map(int, text.strip("=").split("+")))),
    "-": lambda text: str(int(text.strip("=").split("-")[0]) - int(text.strip("=").split("-")[1])),
    "*": lambda text: str(int(text.strip("=").split("*")[0]) * int(text.strip("=").split("*")[1])),
    "max": lambda text: str(max(int(n) for n in text.split(","))),
    "sum": lambda text: str(sum(int(digit) for digit in text)),
    "count": lambda text: str(sum(digit == text[0] for digit in text[2:])),
    "dbl": lambda text: str(int(text) + int(text)),
    "trp": lambda text: str(int(text) + int(text) + int(text)),
    "sort": lambda text: "".join(c * text.count(c) for c in sorted(set(text))),
    "rev": lambda text: "".join(reversed(text)),
    "next": lambda text: text.translate(str.maketrans("abcdefgh", "bcdefgha")),
    "uniq": lambda text: "".join(c for i, c in enumerate(text) if c not in text[:i]),
    "zip": lambda text: "".join(sum(zip(*text.split(",")), ()))}


def solve(prompt):
    word = re.match(r"[a-z]+(?=\()|\d+([+*-])", prompt)
    return SOLVE[word[1] or word[0]](prompt if word[1] else prompt[len(word[0]) + 1:-1])


@pytest.mark.parametrize("family", make_toy.FAMILIES)
def test_answers_are_right_and_mistakes_are_not(family):
    rng = random.Random(1)
    for make in (make_toy.FAMILIES[family], *make_toy.related(family)):
        drawn = [make(rng) for _ in range(200)]
        assert all(answer == solve(prompt) and len(answer) <= 9 for prompt, answer, _ in drawn)
        assert sum(answer != mistake for _, answer, mistake in drawn) > 40  # add often has no carry


@pytest.mark.parametrize("targeted", [["sort", "dbl"], ["max", "rev"]])
def test_files(targeted, tmp_path):
    seen = make_toy.write_data(tmp_path, make_toy.FAMILIES, targeted, make_toy.SIZES, random.Random(0))
    rows = {path.stem: [json.loads(line) for line in path.read_text().splitlines()]
            for path in tmp_path.glob("*.jsonl")}
    assert rows.keys() == {"train", *(f"val_{name}" for name in targeted), "test_targeted", "test_related",
                           "test_other"}
    assert {name: len(of_file) for name, of_file in rows.items() if "val" not in name} == {
        "train": 4800, "test_targeted": 400, "test_related": 200, "test_other": 200}
    prompts = [row["prompt"] for of_file in rows.values() for row in of_file]
    assert len(set(prompts)) == len(prompts) and set(prompts) == seen
    assert sum(row["family"] in targeted for row in rows["train"]) == 400
    shapes = {name: {re.sub("[a-h]", "a", re.sub(r"\d", "1", row["prompt"])) for row in rows[name]}
              for name in ("train", "test_related")}
    assert not shapes["train"] & shapes["test_related"]  # forms that the pool does not have
    assert {row["family"] for row in rows["test_related"]} == set(targeted)
    again = tmp_path / "again"
    again.mkdir()
    other = make_toy.write_data(again, make_toy.FAMILIES, targeted, make_toy.SIZES, random.Random(1))
    assert len(other & seen) < 0.5 * len(seen)
