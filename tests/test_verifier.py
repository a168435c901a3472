"""The math verifier against hand labels, without side effects; and a graded verifier of the user's own."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

import collect
import score
import sketch
import train_grpo

PAIRS = [  # response, gold answer, label
    # fractions and decimals
    (r"\boxed{\frac{3}{4}}", "3/4", 1), (r"\boxed{0.75}", r"\frac{3}{4}", 1),
    (r"\boxed{\dfrac{6}{8}}", r"\frac34", 1), (r"\boxed{\tfrac{3}{5}}", r"\frac{3}{4}", 0),
    (r"\boxed{-\frac{1}{2}}", "-0.5", 1), (r"\boxed{\frac12}", r"-\frac12", 0),
    (r"\boxed{1\frac{1}{2}}", r"\frac32", 1), (r"\boxed{3.0}", "3", 1), (r"\boxed{3.14}", r"\pi", 0),
    # large numbers
    (r"\boxed{1,234,567}", "1234567", 1), (r"\boxed{1{,}234}", "1234", 1), (r"\boxed{1,234}", "1235", 0),
    # percentages
    (r"\boxed{50\%}", r"50\%", 1), (r"\boxed{50}", r"50\%", 1), (r"\boxed{50\%}", "50", 1),
    (r"\boxed{5\%}", r"50\%", 0),
    # units
    (r"\boxed{12\text{ cm}}", "12", 1), (r"\boxed{12\,\mathrm{cm}^2}", "12", 1), (r"\boxed{\$18}", "18", 1),
    (r"\boxed{18 \text{ dollars}}", "18", 1), (r"\boxed{90^\circ}", "90", 1),
    (r"\boxed{19\text{ cm}}", r"12\text{ cm}", 0),
    # sets, lists, pairs
    (r"\boxed{\{1,2,3\}}", r"\{3,2,1\}", 1), (r"\boxed{\{1,2\}}", r"\{1,2,3\}", 0),
    (r"\boxed{-1, 2}", "2,-1", 1), (r"\boxed{(1,2)}", "(1,2)", 1), (r"\boxed{(1,2)}", "(2,1)", 0),
    # intervals
    (r"\boxed{(0,1]}", "(0,1]", 1), (r"\boxed{[0,1]}", "(0,1]", 0),
    (r"\boxed{(-\infty, 2)}", r"(-\infty,2)", 1),
    (r"\boxed{(-\infty,0)\cup(1,\infty)}", r"(-\infty,0)\cup(1,\infty)", 1),
    (r"\boxed{(-\infty,0)\cup(1,\infty)}", r"(-\infty,0)", 0),
    # nested braces, expressions, matrices
    (r"\boxed{\frac{\sqrt{2}}{2}}", r"\frac{1}{\sqrt{2}}", 1), (r"\boxed{\sqrt{\frac{4}{9}}}", r"\frac23", 1),
    (r"\boxed{2^{2^{3}}}", "256", 1), (r"\boxed{{7}}", "7", 1),
    (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{2}}{2}", 0), (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", 1),
    (r"\boxed{\pi/2}", r"\frac{\pi}{2}", 1), (r"\boxed{x^2+2x+1}", "(x+1)^2", 1), (r"\boxed{x=3}", "3", 1),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", 1),
    (r"\boxed{\begin{pmatrix}2\\1\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", 0),
    # words
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", 1), (r"\boxed{\text{Carla}}", r"\text{Evelyn}", 0),
    (r"\boxed{\text{B}}", "B", 1), (r"\boxed{\text{even}}", r"\text{odd}", 0),
    # several boxes: only the last one counts
    (r"First \boxed{3}, then \boxed{4}.", "4", 1), (r"First \boxed{3}, then \boxed{4}.", "3", 0),
    # no box
    ("The answer is 42.", "42", 1), ("Therefore x = 5", "5", 1),
    (r"The final answer is $\frac{2}{3}$.", "2/3", 1), ("He pays $18.", "#### 18", 1), ("#### 72", "72", 1),
    ("The answer is 41.", "42", 0),
    # whole solutions as gold answers: GSM8K's and MATH's
    (r"\boxed{15}", "He has 5*3=<<5*3=15>>15.\n#### 15", 1),
    (r"\boxed{5}", "He has 5*3=<<5*3=15>>15.\n#### 15", 0),
    (r"\boxed{0.5}", r"We have $x = 2$ and so $y = \boxed{\frac{1}{2}}$.", 1),
    (r"\boxed{2}", r"We have $x = 2$ and so $y = \boxed{\frac{1}{2}}$.", 0),
    # garbage
    ("", "3", 0), ("I do not know.", "3", 0), (r"\boxed{}", "3", 0), (r"\boxed{", "3", 0),
    (r"}}}\boxed\frac{{{", "3", 0), ("\x00\ufffd\u202e", "3", 0), (r"\boxed{???}", "3", 0), ("3", "", 0),
    # ten thousand characters
    ("We go on. " * 1000 + r"\boxed{17}", "17", 1), ("1 " * 5000, "17", 0), ("(" * 10000, "17", 0),
    (r"\boxed{" * 1500, "17", 0), (r"\frac{1}{" * 1200 + "2" + "}" * 1200, "17", 0),
    # malicious or very expensive input
    (r"\boxed{9^{9^{9^{9}}}}", "9", 0), (r"\boxed{10^{100000000}}", "1", 0), (r"\boxed{1000000!}", "1", 0),
    (r"\boxed{\input{/etc/passwd}}", "1", 0), (r"\boxed{__import__('os').mkdir('broken-in')}", "1", 0),
    (r"\def\a{\a\a}\boxed{\a}", "1", 0), (r"\boxed{\frac{1}{0}}", "0", 0)]


@pytest.mark.parametrize("response, answer, label", PAIRS)
def test_math_agrees_with_hand_labels(response, answer, label, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert collect.verify(response, answer, "math") == label
    assert not os.listdir(tmp_path)


def test_enough_pairs():
    assert len(set(PAIRS)) >= 60 and 0.3 < sum(label for *_, label in PAIRS) / len(PAIRS) < 0.7


OWN = """
from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass
class Key:
    text: str


def share(response, answer):  # of the answer's letters that the response has in their places
    key = Key(**json.loads(answer))
    return sum(a == b for a, b in zip(response, key.text)) / len(key.text)
"""


@pytest.fixture
def graded(world, tmp_path):
    """(verifier, data): a graded verifier, and prompts whose answers are JSON for it."""
    (tmp_path / "own.py").write_text(OWN)
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()[:40]]
    with open(tmp_path / "data.jsonl", "w") as file:
        for row in rows:
            file.write(json.dumps({**row, "answer": json.dumps({"text": row["answer"]})}) + "\n")
    return f"{tmp_path}/own.py:share", tmp_path / "data.jsonl"


def test_graded_rewards_work_all_the_way(graded, world, tmp_path, call):
    verifier, data = graded
    base, rollouts, selected = world / "base", tmp_path / "r.pt", tmp_path / "s.npy"
    assert call(collect, "--model", base, "--data", data, "--out", rollouts, "--k", 4, "--max-new-tokens", 8,
                "--verifier", verifier)[0] == 0
    loaded = sketch.load_rollouts(rollouts)
    rewards, tokenizer = loaded["rewards"], collect.load_tokenizer(base)
    assert len(set(rewards.flatten().tolist())) > 4 and loaded["meta"]["verifier"] == verifier
    text = tokenizer.decode(loaded["responses"][5], skip_special_tokens=True)
    answer = json.loads(loaded["answers"][1])["text"]
    assert rewards[1, 1].item() == pytest.approx(sum(a == b for a, b in zip(text, answer)) / len(answer))
    assert call(sketch, "--model", base, "--rollouts", rollouts, "--out", tmp_path / "t.npy")[0] == 0
    unequal = (rewards.amax(1) != rewards.amin(1)).numpy()
    assert (np.load(tmp_path / "t.npy").any(1) == unequal).all() and 0 < unequal.sum() < 40
    for method in ("passrate", "learnability"):
        arguments = ("--method", method, "--rollouts", rollouts, "--out", selected, "--alpha", 1)
        assert call(score, *arguments)[0] == 0
        assert set(np.load(selected)) == set(np.flatnonzero(unequal))
    arguments = ("--model", base, "--rollouts", rollouts, "--select", selected, "--steps", 2,
                 "--batch-size", 4)
    for named in ((), ("--verifier", "exact")):  # its code must be named; another name would be ignored
        refused, _, error = call(train_grpo, *arguments, "--out", tmp_path / "no", *named)
        assert refused == 2 and verifier in error and error.count("\n") == 1
        assert not (tmp_path / "no").exists()
    assert call(train_grpo, *arguments, "--out", tmp_path / "policy", "--verifier", verifier)[0] == 0
    rows = [json.loads(line) for line in open(tmp_path / "policy/metrics.jsonl")]
    assert all(0 < row["reward"] < 1 for row in rows[1:])


@pytest.mark.parametrize("body, says", [
    ("return 1.5", "it returned 1.5"), ("return float('nan')", "it returned nan"),
    ("return answer[99]", "IndexError"),
    ("return 'yes'", "ValueError"), (None, "no such verifier"), ("an error", "no such verifier")])
def test_bad_verifier_is_one_line(body, says, world, tmp_path, call):
    verifier = f"{tmp_path}/own.py:reward"
    (tmp_path / "own.py").write_text("" if body is None else f"def reward(response, answer):\n    {body}\n")
    code, _, error = call(collect, "--model", world / "base", "--data", world / "train.jsonl", "--limit", 2,
                          "--k", 2, "--max-new-tokens", 4, "--out", tmp_path / "r.pt", "--verifier", verifier)
    line = error[error.index("collect.py: error: "):].splitlines()[0]
    assert code == 2 and verifier in line and says in line and "expected" in line, error
    assert not (tmp_path / "r.pt").exists()


def test_unknown_verifier_is_refused(world, tmp_path, call):
    code, _, error = call(collect, "--model", world / "base", "--data", world / "train.jsonl",
                          "--out", tmp_path / "r.pt", "--verifier", "maths")
    assert code == 2 and "maths" in error and "math, exact or path/to/file.py:function" in error


FORMS = [  # response, gold answer, label: the answer's form decides how it is compared
    # words and strings of letters: text, in which letters have an order
    (r"\boxed{AB}", "AB", 1), (r"\boxed{BA}", "AB", 0), (r"\boxed{hello}", "olleh", 0),
    (r"\boxed{\text{olleh}}", "olleh", 1), (r"\boxed{Evelyn}", r"\text{Evelyn}", 1),
    (r"\boxed{\textbf{evelyn}.}", "Evelyn", 1), (r"\boxed{no\ solution}", r"\text{no solution}", 1),
    (r"\boxed{noitulos on}", "no solution", 0), (r"\boxed{2OH}", "H2O", 0), ("olleh", "olleh", 1),
    (r"The final answer is $\text{Evelyn}$.", "Evelyn", 1), (r"\boxed{b, a}", "a, b", 0),
    # sequences and dates
    (r"\boxed{2 1 3}", "2 1 3", 1), (r"\boxed{2 1 3}", "1 2 3", 0), (r"\boxed{6}", "1 2 3", 0),
    (r"\boxed{2\ 1~3}", "$2 1 3$", 1), (r"\boxed{[3 1 2]}", "[1 2 3]", 0), (r"\boxed{c b a}", "a b c", 0),
    (r"\boxed{2018}", "2024-01-05", 0), (r"\boxed{2024-01-05}", "2024-01-05", 1),
    (r"\boxed{5/24240}", "5/12/2020", 0), (r"\boxed{January 5,2024}", "January 5, 2024", 1),
    (r"\boxed{3:00 MP}", "3:00 PM", 0), (r"\boxed{3{:}00\text{ p.m.}}", "3:00 PM", 1),
    (r"\boxed{-2}", "10-12", 0),
    # mathematics, as before
    (r"\boxed{b}", "B", 1), (r"\boxed{\text{(B)}}", "(B)", 1), (r"\boxed{x2}", "2x", 1),
    (r"\boxed{1+2x+x^2}", "x^2+2x+1", 1), (r"\boxed{3,1,2}", "1,2,3", 1), (r"\boxed{5}", "5 apples", 1),
    (r"\boxed{3,1,2}", r"\{1,2,3\}", 1), (r"\boxed{\{3,1,2\}}", "1, 2 and 3", 1), (r"\boxed{0.4}", "2:5", 1),
    # currency, thousands, exponents, mixed numbers
    (r"\boxed{18.90}", r"\$18.90", 1), (r"\boxed{\$18.9}", r"\$18.90", 1), (r"\boxed{15}", r"#### \$15", 1),
    (r"\boxed{15}", "$15", 1), (r"\boxed{-5}", r"-\$5", 1), (r"It costs \$18.90.", r"\$18.90", 1),
    (r"\boxed{16}", r"\$15", 0), (r"\boxed{\$20,\$15}", "$15 and $20", 1), (r"\boxed{0}", r"1\,000", 0),
    (r"\boxed{1000}", r"1\,000", 1), (r"\boxed{12 000}", "12000", 1), (r"\boxed{0.00001}", "1e-05", 1),
    (r"\boxed{3.5}", "3 1/2", 1), (r"\boxed{15\%}", "15%", 1), (r"\boxed{\frac{1}{2}}", r"$\frac{1}{2}$", 1),
    (r"\boxed{0.5}", ".5", 1), (r"\boxed{18}", "18.", 1), (r"\boxed{18.}", "18", 1),
    # what follows </think> is the response; the last box that is not empty counts
    (r"<think>\boxed{4}</think> It is \boxed{5}", "4", 0), (r"<think>\boxed{4}</think> It is 5.", "4", 0),
    (r"<think>\boxed{4}</think> It is 5.", "5", 1), (r"a</think>b</think>\boxed{5}", "5", 1),
    (r"\boxed{4} \boxed{}", "4", 1), (r"\boxed{4} \boxed{ }", "4", 1), (r"\boxed{4} \boxed{5", "4", 0),
    (r"\boxed{AB} \boxed{}", "AB", 1), (r"\fbox{4}", "4", 1), (r"\boxed{3} \fbox{4}", "3", 0),
    (r"\boxed{4}. The final answer is $7$", "7", 0)]


@pytest.mark.parametrize("response, answer, label", FORMS)
def test_math_reads_an_answer_by_its_form(response, answer, label):
    assert collect.verify(response, answer, "math") == train_grpo.verify(response, answer, "math") == label


@pytest.mark.parametrize("response, answer, label", [
    (r"<think>\boxed{cab}</think> abc", "cab", 0), (r"<think>no</think> abc", "abc", 1),
    (r"\boxed{cab} \boxed{}", "cab", 1), (r"\boxed{cab} \boxed{abc}", "cab", 0), (r"\boxed{a}b}", "a}b", 1)])
def test_exact_reads_the_last_full_box_of_the_answer(response, answer, label):
    assert collect.verify(response, answer, "exact") == label


ALGEBRA = ["9", r"\frac{14}{3}", "p - q", r"6 - 5i", "52_8", r"15\mbox{ cm}^2", "y = 2x + 3", "-ab", "3R^2",
           "n!", r"\text{(C)}", r"1 \pm \sqrt{19}", r"\{1\pm\sqrt{5},-2\}", r"70 \sqrt{2}", "x > 3",
           r"\cot x", "(3, 5)", r"\left(\frac{3}{5},\frac{8}{3}\right]", "1,-2", "x=3 or x=4", "12 cm", "-3",
           "5^{10}", "f(x)", "3, x", r"\begin{pmatrix} -2 \\ -14 \end{pmatrix}", r"120^\circ", "1,234,567",
           "033", r"\pi", "E", "2/3", "1:2"]


def test_mathematics_is_not_compared_as_text():
    assert [answer for answer in ALGEBRA if collect.is_text(answer)] == []
    for answer in ("1 2 " * 5000 + "$x", "5" + "a" * 5000 + "1", "word-" * 5000, "(" * 5000):
        began = time.perf_counter()  # 0.01 s; a regular expression that backtracks would take hours
        collect.is_text(collect.answer_in(answer))
        assert time.perf_counter() - began < 60


def test_arithmetic_that_the_time_limit_can_interrupt(tmp_path):
    """sympy computes with Python's integers, although a faster gmpy2, which ignores signals, is installed."""
    (tmp_path / "gmpy2.py").write_text("def version(*arguments):\n    return '2.1.5'\n"
                                       "def __getattr__(name):\n    return int\n")  # for mpz and others
    for stage in ("collect", "train_grpo"):
        program = (f"import {stage}, sympy.external.gmpy, mpmath; "
                   "print(sympy.external.gmpy.GROUND_TYPES, mpmath.libmp.BACKEND)")
        ours = ("SYMPY_GROUND_TYPES", "MPMATH_NOGMPY")
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                              env={**environment, "PYTHONPATH": f"{tmp_path}:{ROOT}"})
        assert done.stdout.strip() == "python python", done.stderr


@pytest.mark.parametrize("response", [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{(10^{8})!}",
                                      r"\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}"])
def test_time_limit_of_a_response(response, monkeypatch):
    collect.gold_answer("9")
    limits = []
    alarm = signal.alarm
    monkeypatch.setattr(signal, "alarm", lambda seconds: limits.append(seconds) or alarm(seconds))
    assert collect.verify(response, "9", "math") == 0
    assert set(limits) == {2, 0}  # seconds; 0 ends the limit


def test_equal_responses_are_verified_once_and_the_seconds_are_told(world, tmp_path, call):
    """A verifier that takes 0.05 s; also the seconds of train_grpo.py's metrics."""
    (tmp_path / "own.py").write_text("import time\ndef slow(response, answer):\n    time.sleep(0.05)\n"
                                     "    print('verified', response)\n    return len(response) % 2\n")
    verifier = f"{tmp_path}/own.py:slow"
    assert collect.rewards_of(["a", "bb", "a", "a"], "x", verifier, "example 1") == [1, 0, 1, 1]
    began = time.perf_counter()
    code, stdout, _ = call(collect, "--model", world / "base", "--data", world / "train.jsonl", "--limit", 4,
                           "--k", 8, "--max-new-tokens", 8, "--out", tmp_path / "r.pt",
                           "--verifier", verifier)
    *lines, last = stdout.splitlines()
    verified = sum(line.startswith("verified") for line in lines) - 4 - 2  # in the test of answers, and above
    assert code == 0 and 4 <= verified < 32
    told = float(re.search(r"; ([\d.]+) s of verifying$", last)[1])
    assert 0.05 * verified - 0.1 <= told <= time.perf_counter() - began
    np.save(tmp_path / "s.npy", np.arange(4))
    assert call(train_grpo, "--model", world / "base", "--rollouts", tmp_path / "r.pt", "--select",
                tmp_path / "s.npy", "--steps", 1, "--batch-size", 2, "--group", 2,
                "--out", tmp_path / "policy", "--verifier", verifier)[0] == 0
    row = json.loads((tmp_path / "policy/metrics.jsonl").read_text().splitlines()[-1])
    assert 0.1 <= row["verifying_seconds"] < row["sampling_seconds"]


def test_verifier_with_files_beside_it(tmp_path, monkeypatch):
    """Imported at the top and while it is called; one of them is called verifier.py."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "verifier.py").write_text("def half(response):\n    return len(response) / 2\n")
    (folder / "later_helper.py").write_text("LIMIT = 1\n")
    (folder / "own.py").write_text("from verifier import half\ndef reward(response, answer):\n"
                                   "    from later_helper import LIMIT\n"
                                   "    return min(half(response), LIMIT)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in (collect, train_grpo):
        sys.modules.pop("later_helper", None)
        assert module.verify("a", "x", "code/own.py:reward") == 0.5
        assert module.verify("abcd", "x", "code/own.py:reward") == 1


def test_failing_verifier_names_the_response(tmp_path, capsys):
    (tmp_path / "own.py").write_text("def reward(response, answer):\n    return {'yes': 1}[response]\n")
    for module in (collect, train_grpo):
        with pytest.raises(SystemExit):
            module.rewards_of(["yes", "yes", "no"], "x", f"{tmp_path}/own.py:reward", "example 7")
        error = capsys.readouterr().err
        assert "KeyError('no') for answer 'x' and response 'no', response 3 to example 7" in error
        assert error.count("\n") == 1
