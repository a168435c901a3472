"""Data as people have it: answers are the file's text, prompts are prompts, names are names."""

import datetime
import decimal
import json

import datasets
import pytest
import torch

import collect

KEYS = (["prompt"], ["answer"], "family", None)


def write(path, *rows):
    """A .jsonl file whose answers are given as they stand in the file."""
    path.write_text("".join(f'{{"prompt": "1+1=", "answer": {row}}}\n' for row in rows))
    return str(path)


def answers_of(path):
    return [answer for _, answer, _ in collect.load_examples(str(path), *KEYS)]


def test_answers_are_the_text_of_the_file(tmp_path):
    found = answers_of(write(tmp_path / "a.jsonl", "0.00001", 2**70, "1", "2.50", "1e-05", "-0", "true",
                             "[1, 2.0]", '"2024-01-05"', '"2024-01-05T10:00:00"', '"007"', '["a", "b"]',
                             '[" x "]'))
    assert found == ["0.00001", "1180591620717411303424", "1", "2.50", "1e-05", "-0", "true", "1, 2.0",
                     "2024-01-05", "2024-01-05T10:00:00", "007", "a, b", " x "]
    dates = answers_of(write(tmp_path / "b.jsonl", '"2024-01-05"', '"2024-01-06"'))  # a column of dates only
    assert dates == ["2024-01-05", "2024-01-06"]


@pytest.mark.parametrize("column, expected", [
    ([0.00001, 1.0, 2.5], ["0.00001", "1", "2.5"]), ([2.0**70, 1e-7, 0.1], [str(2**70), "0.0000001", "0.1"]),
    ([2**62, 1, 0], [str(2**62), "1", "0"]), ([True, False, True], ["true", "false", "true"]),
    ([[1, 2], [3], [4]], ["1, 2", "3", "4"]), (["1e5", " 2", "x"], ["1e5", " 2", "x"]),
    ([decimal.Decimal("1.50"), decimal.Decimal("2.00"), decimal.Decimal("0.01")], ["1.50", "2.00", "0.01"])])
def test_answers_of_typed_columns(column, expected, tmp_path):
    data = datasets.Dataset.from_dict({"prompt": ["1+1="] * 3, "answer": column})
    data.to_parquet(tmp_path / "a.parquet")
    assert answers_of(tmp_path / "a.parquet") == expected


def refused(path, capsys):
    capsys.readouterr()  # the progress bars of `datasets`
    with pytest.raises(SystemExit) as stop:
        collect.load_examples(str(path), *KEYS)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and str(path) in error, error
    return error


@pytest.mark.parametrize("answer, says", [
    ("NaN", "an answer of type float (nan)"), ("-Infinity", "an answer of type float (-inf)"),
    ("null", "an empty prompt or answer"), ("[]", "an empty prompt or answer"), ("[1, null]", "an empty"),
    ('{"value": 3}', "an answer of type dict"), ('[{"value": 3}]', "an answer of type dict")])
def test_answers_that_are_no_text(answer, says, tmp_path, capsys):
    error = refused(write(tmp_path / "a.jsonl", "1", answer), capsys)
    assert says in error and "in example 2" in error


@pytest.mark.parametrize("answer, says", [
    (float("nan"), "type float (nan)"), (b"12", "type bytes"), ({"value": 3}, "type dict"),
    (datetime.datetime(2024, 1, 5), "type datetime"), (datetime.date(2024, 1, 5), "type date")])
def test_answers_of_columns_that_are_no_text(answer, says, tmp_path, capsys):
    datasets.Dataset.from_dict({"prompt": ["1+1="], "answer": [answer]}).to_parquet(tmp_path / "a.parquet")
    error = refused(tmp_path / "a.parquet", capsys)
    assert f"an answer of {says}" in error and "in example 1" in error and "dates are stored as text" in error


@pytest.mark.parametrize("prompt, says", [
    (5, "a prompt of type Number"), (None, "an empty prompt"), ("  \n", "an empty prompt"),
    ([], "an empty prompt"), ({"role": "user", "content": "5"}, "a prompt of type dict"),
    (["5"], "a message without role or content"), ([{"from": "human", "value": "5"}], "without role"),
    ([{"role": "user", "content": None}], "without role"), ([{"role": "user", "content": 5}], "without role"),
    ([{"role": "user", "content": [{"type": "text", "text": "5"}]}], "without role"),
    ([{"role": "user", "content": " "}], "an empty prompt"),
    ([{"role": "user", "content": "5"}, {"role": "assistant", "content": "6"}], "of role 'assistant'"),
    ([{"role": "user", "content": "5"}, {"role": "model", "content": "6"}], "last message of role 'model'")])
def test_prompts_that_are_none(prompt, says, tmp_path, capsys):
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": prompt, "answer": "2"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))  # a blank line is no example
    error = refused(tmp_path / "a.jsonl", capsys)
    assert says in error and "in example 2" in error


@pytest.mark.parametrize("line, says", [
    (b'{"prompt": "caf\xe9", "answer": "2"}', "'utf-8' codec"), (b'["1+1=", "2"]', "example 2, line 3"),
    (b'"text"', "example 2, line 3"), (b'{"prompt": "1+1="', "delimiter"), (b"3", "example 2, line 3")])
def test_lines_that_cannot_be_read(line, says, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "1+1=", "answer": "2"}\n\n' + line + b"\n")
    error = refused(tmp_path / "a.jsonl", capsys)
    assert says in error and "example 2, line 3" in error


def test_forms_of_json_files(tmp_path):
    rows = [{"prompt": "é+1=", "answer": 2.5}, {"answer": "3", "prompt": "1+2=", "more": {"a": [1]}}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())  # with a byte order mark
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "c.json").write_text(lines)
    (tmp_path / "d.JSONL").write_text(lines)
    for name in ("a.jsonl", "b.json", "c.json", "d.JSONL"):
        found = collect.load_examples(str(tmp_path / name), *KEYS)
        assert found == [("é+1=", "2.5", ""), ("1+2=", "3", "")], name


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", ["data*", "[v1] data", "data?", "{a,b}", "**", "a b"])
def test_a_name_is_no_pattern(name, kind, tmp_path):
    for text, stem in (("1", name), ("2", "data2"), ("3", "v data"), ("4", "a"), ("5", "1 data")):
        data = datasets.Dataset.from_dict({"prompt": ["1+1="], "answer": [text]})
        path = str(tmp_path / f"{stem}.{kind}")
        data.to_json(path) if kind == "jsonl" else data.to_parquet(path)
    assert answers_of(tmp_path / f"{name}.{kind}") == ["1"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_pattern_is_no_name(kind, tmp_path, capsys):
    (tmp_path / f"data1.{kind}").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    assert "Unable to find" in refused(tmp_path / f"data*.{kind}", capsys)


def test_prompts_do_not_end_with_an_end_token(world):
    """A tokenizer that puts <bos> before and <eos> after a text; a chat template may still end with <eos>."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = collect.load_tokenizer(world / "base")
    plain = collect.encode_prompt("1+2", "=", tokenizer)
    bos = plain[0]  # any token
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="B $A <eos>", special_tokens=[("B", bos), ("<eos>", tokenizer.eos_token_id)])
    assert tokenizer("1+2=").input_ids == [bos, *plain, tokenizer.eos_token_id]
    assert collect.encode_prompt("1+2", "=", tokenizer) == [bos, *plain]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert collect.encode_prompt("1+2", "=", tokenizer) == plain
    tokenizer.chat_template += "<eos>"
    assert collect.encode_prompt("1+2", "=", tokenizer) == [*plain, tokenizer.eos_token_id]


def collect_rows(call, world, tmp_path, rows, *more):
    """Runs collect.py on rows, with few tokens: (exit code, stderr), and whether it has written anything."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "r.pt"
    code, _, error = call(collect, "--model", world / "base", "--data", data, "--out", out, "--k", 2,
                          "--max-new-tokens", 4, *more)
    return code, error, bool(list(tmp_path.glob("r.pt*")))


def test_template_that_refuses_a_role(world, tmp_path, call, monkeypatch):
    load = collect.load_tokenizer

    def strict(name):
        tokenizer = load(name)
        tokenizer.chat_template = ("{% for m in messages %}{% if m['role'] == 'system' %}"
                                   "{{ raise_exception('no system role') }}{% endif %}"
                                   "{{ m['content'] }}{% endfor %}")
        return tokenizer

    monkeypatch.setattr(collect, "load_tokenizer", strict)
    chat = [{"role": "system", "content": "4"}, {"role": "user", "content": "5"}]
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": chat, "answer": "2"}]
    code, error, written = collect_rows(call, world, tmp_path, rows)
    assert code == 2 and "(example 2: no system role)" in error and error.count("\n") == 1 and not written
    code, error, _ = collect_rows(call, world, tmp_path, [{"prompt": "\ud800", "answer": "2"}])
    assert code == 2 and "a prompt that cannot be tokenized (example 1" in error and error.count("\n") == 1


def test_answers_that_fail_their_own_test(world, tmp_path, call):
    good, bad = {"prompt": "1+1=", "answer": "2"}, {"prompt": "1+1=", "answer": "}{"}
    code, error, _ = collect_rows(call, world, tmp_path, [good] * 3)
    assert code == 0 and "answers" not in error
    code, error, _ = collect_rows(call, world, tmp_path, [good, bad, good, bad])
    assert code == 0 and "2 of 4 answers whose own \\boxed{answer} has reward 0, example 2: '}{'" in error
    code, error, written = collect_rows(call, world, tmp_path / "", [bad] * 3, "--seed", 5)
    line = error.splitlines()[-1]
    assert code == 2 and line.startswith("collect.py: error: ") and "found 3 of 3 answers" in line
    assert not list(tmp_path.glob("r.pt.*"))


def test_own_functions_may_expect_another_form(world, tmp_path, call):
    """A warning only: the function may want JSON. One that raises an error ends the run before it samples."""
    (tmp_path / "own.py").write_text("def json_only(response, answer):\n    return response.startswith('{')\n"
                                     "def fails(response, answer):\n    return answer[1]\n")
    rows = [{"prompt": "1+1=", "answer": str(i % 10)} for i in range(50)]
    code, error, _ = collect_rows(call, world, tmp_path, rows, "--verifier", f"{tmp_path}/own.py:json_only")
    assert code == 0 and "17 of 17 answers whose own" in error
    code, error, _ = collect_rows(call, world, tmp_path, rows, "--verifier", f"{tmp_path}/own.py:fails")
    assert code == 2 and "IndexError" in error and "example 1, tried before sampling" in error


def test_a_hundred_of_many_answers_are_tested(monkeypatch):
    tried = []
    monkeypatch.setattr(collect, "verify", lambda response, answer, verifier: tried.append(int(answer)) or 1)
    for n in (1, 99, 100, 101, 1234, 100000):
        tried.clear()
        collect.check_answers("a", [str(i) for i in range(n)], "math")
        assert min(n, 50) <= len(tried) <= 100 and tried[0] == 0 and n - tried[-1] <= max(1, n / 50)


def test_data_of_one_collection(world, tmp_path, call):
    """All the way: numbers as answers are verified as the file writes them."""
    code, _, _ = collect_rows(call, world, tmp_path, [{"prompt": "1+1=", "answer": 2}], "--verifier", "exact")
    assert code == 0 and torch.load(tmp_path / "r.pt", weights_only=True)["answers"] == ["2"]
