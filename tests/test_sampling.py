"""collect.py samples from beta = softmax(logits / temperature) and stores exactly what it sampled."""

import json

import datasets
import pytest
import torch
from conftest import tiny_qwen

import collect
import sketch

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 2, 3], [4, 4]]


def draw(policy, prompts=PROMPTS, k=6, temperature=1.0, length=12, eos=(1,), seed=0):
    seeds = [collect.stream_seed(seed, *prompt) for prompt in prompts]
    return collect.sample(policy, prompts, k, temperature, length, list(eos), seeds)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ratio_is_one_at_the_behaviour_policy(tmp_path, temperature):
    """The ratio is 1 although generation_config.json asks for top-k and a repetition penalty."""
    tiny_qwen(tied=True).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": 1, "do_sample": True, "top_k": 20, "repetition_penalty": 1.05, "temperature": 0.7}))
    policy = collect.load_policy(tmp_path, "cpu", "float32")
    responses, logprobs = draw(policy, temperature=temperature)
    logp = sketch.token_logprobs(*sketch.response_logits(policy, PROMPTS, responses, temperature))
    mask = torch.arange(logp.shape[1]) < torch.tensor([len(response) for response in responses])[:, None]
    assert mask.sum() == sum(map(len, responses)) > 100
    beta = torch.zeros_like(logp).masked_scatter_(mask, torch.tensor([x for row in logprobs for x in row]))
    assert (sketch.token_ratio(logp, beta)[mask] - 1).abs().max() <= 1e-4
    assert len({token for row in responses for token in row}) > 20  # top_k = 20 allows fewer per position


def test_samples_follow_the_softmax():
    """First tokens of 20000 responses against softmax(logits / T), by Pearson's chi-squared test."""
    policy, n, temperature = tiny_qwen(tied=False), 20000, 0.8
    responses, _ = draw(policy, prompts=[[5, 6, 7]], k=n, temperature=temperature, length=1)
    expected = n * torch.softmax(policy(torch.tensor([[5, 6, 7]])).logits[0, -1] / temperature, -1)
    counts = torch.bincount(torch.tensor(responses)[:, 0], minlength=29)
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert statistic < 28 + 5 * 56**0.5  # mean 28 and variance 56 for 28 degrees of freedom


def test_end_tokens_and_cuts():
    responses, logprobs = draw(tiny_qwen(tied=True), eos=(1, 3))
    ended = [r for r in responses if r[-1] in (1, 3)]
    truncated = [r for r in responses if r[-1] not in (1, 3)]
    assert ended and truncated
    assert all(len(r) == 12 for r in truncated)  # only the length limit truncates
    assert all(token not in (1, 3) for r in responses for token in r[:-1])  # nothing after an end token
    assert [len(r) for r in responses] == [len(r) for r in logprobs]
    assert any(0 in r[:-1] for r in responses)  # inside a response the pad id is an ordinary token


def test_responses_do_not_depend_on_their_batch():
    policy = tiny_qwen(tied=True)
    together, alone = draw(policy)[0], [r for p in PROMPTS for r in draw(policy, [p])[0]]
    assert together == alone and draw(policy, seed=1)[0] != together


def test_greedy_is_the_argmax_of_a_pass_without_cache():
    policy = tiny_qwen(tied=True)
    responses, _ = draw(policy, k=1, temperature=0.0)
    for prompt, response in zip(PROMPTS, responses):
        state = list(prompt)
        for token in response:
            assert token == policy(torch.tensor([state])).logits[0, -1].argmax()
            state.append(token)


def test_file_holds_what_was_sampled(world, tmp_path, call):
    out = tmp_path / "r.pt"
    code, stdout, _ = call(collect, "--model", world / "base", "--data", world / "train.jsonl", "--out", out,
                           "--k", 6, "--verifier", "exact", "--max-new-tokens", 5, "--limit", 30)
    assert code == 0 and "30 prompts x 6" in stdout
    rollouts = torch.load(out, weights_only=True)
    rows = [json.loads(line) for line in open(world / "train.jsonl")][:30]
    tokenizer = collect.load_tokenizer(world / "base")
    loaded = sketch.load_rollouts(out)
    truncated = 0
    for i, row in enumerate(rows):
        assert tokenizer.decode(loaded["prompts"][i]) == row["prompt"]
        assert (rollouts["answers"][i], rollouts["families"][i]) == (row["answer"], row["family"])
        for j in range(6):
            response = loaded["responses"][i * 6 + j].tolist()
            truncated += response[-1] != 1
            assert len(response) == 5 or response[-1] == 1
            text = tokenizer.decode(response, skip_special_tokens=True)
            assert rollouts["rewards"][i, j] == (text == row["answer"])
    assert 0 < truncated < 180 and rollouts["logprobs"].max() <= 0
    dtypes = {name: value.dtype for name, value in rollouts.items() if torch.is_tensor(value)}
    assert dtypes == {"prompt_tokens": torch.int32, "prompt_lengths": torch.int64,
                      "response_tokens": torch.int32, "response_lengths": torch.int64,
                      "logprobs": torch.float32, "rewards": torch.float32}


def test_chat_template_and_instruction(world):
    tokenizer = collect.load_tokenizer(world / "base")
    assert tokenizer.decode(collect.encode_prompt("sort(21)", "=", tokenizer)) == "sort(21)="
    tokenizer.chat_template = ("{% for m in messages %}({{ m['content'] }}){% endfor %}"
                               "{% if add_generation_prompt %}={% endif %}")
    assert tokenizer.decode(collect.encode_prompt("1+2", "*", tokenizer)) == "(1+2*)="
    chat = [{"role": "system", "content": "4"}, {"role": "user", "content": "5"}]
    assert tokenizer.decode(collect.encode_prompt(chat, "*", tokenizer)) == "(4)(5)="


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_local_data(kind, tmp_path):
    """Reads GSM8K's columns, and a prompt of chat messages, from both kinds of local file."""
    chat = [{"role": "user", "content": "2+2="}]
    rows = [{"question": "1+1=", "answer": "one and one #### 2", "chat": chat},
            {"question": "3+3=", "answer": "#### 6", "chat": chat}]
    data = datasets.Dataset.from_list(rows)
    path = str(tmp_path / f"data.{kind}")
    data.to_json(path) if kind == "jsonl" else data.to_parquet(path)
    load = collect.load_examples
    found = load(path, ["prompt", "question"], ["answer"], "family", None)
    assert found == [("1+1=", "one and one #### 2", ""), ("3+3=", "#### 6", "")]
    assert load(path, ["chat"], ["answer"], "question", 1) == [(chat, "one and one #### 2", "1+1=")]


SCHEMAS = {  # a row with the columns of each hub data set
    "openai/gsm8k": {"question": "Tom has 3 apples and buys 4. How many?",
                     "answer": "3+4=<<3+4=7>>7 apples.\n#### 7"},
    "EleutherAI/hendrycks_math": {"problem": "What is $3+4$?", "level": "Level 1", "type": "Algebra",
                                  "solution": "We add $3$ and $4$: $\\boxed{7}$."},
    "HuggingFaceH4/MATH-500": {"problem": "What is $3+4$?", "solution": "We add: $\\boxed{7}$.",
                               "answer": "7", "subject": "Algebra", "level": 1,
                               "unique_id": "test/algebra/1.json"},
    "agentica-org/DeepScaleR-Preview-Dataset": {"problem": "What is $3+4$?", "answer": "7",
                                                "solution": "We add."}}


@pytest.mark.parametrize("name", SCHEMAS)
def test_columns_of_hub_data_sets_are_found(name, tmp_path):
    path = str(tmp_path / "data.parquet")
    datasets.Dataset.from_list([SCHEMAS[name]] * 3).to_parquet(path)
    examples = collect.load_examples(path, ["prompt", "question", "problem"], ["answer", "solution"],
                                     "family", 2)
    assert len(examples) == 2
    prompt, answer, _ = examples[0]
    assert prompt == SCHEMAS[name].get("problem", SCHEMAS[name].get("question"))
    assert collect.verify("I add. \\boxed{7}", answer, "math") == 1
    assert collect.verify("\\boxed{3}", answer, "math") == 0


def test_a_pool_of_several_data_sets_and_several_files_at_once(world, tmp_path, call):
    """One --out holds all data (family: the column, else the data set's name); or one --out per --data."""
    lines = (world / "train.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    sources = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    sources[0].write_text("\n".join(lines[:3]))
    sources[1].write_text(json.dumps({"problem": row["prompt"], "solution": row["answer"]}))
    arguments = ["--model", world / "base", "--k", 2, "--verifier", "exact", "--max-new-tokens", 4,
                 "--data", *sources, "--out"]
    assert call(collect, *arguments, tmp_path / "pool.pt")[0] == 0
    assert call(collect, *arguments, tmp_path / "one.pt", tmp_path / "two.pt")[0] == 0
    pool, one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True)
                      for name in ("pool", "one", "two"))
    assert pool["families"] == [row["family"]] * 3 + [str(sources[1])] and two["families"] == [""]
    assert pool["answers"] == one["answers"] + two["answers"] and len(one["answers"]) == 3
    assert pool["response_tokens"][:len(one["response_tokens"])].tolist() == one["response_tokens"].tolist()
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize("response, answer, verifier, reward", [
    ("632", "632", "exact", 1), (" 632\n", "632", "exact", 1), ("6320", "632", "exact", 0),
    ("", "632", "exact", 0), ("so \\boxed{cab}", "cab", "exact", 1),
    ("\\boxed{abc} no, \\boxed{cab}", "abc", "exact", 0), ("\\boxed{ab}c", "abc", "exact", 0),
    ("so \\boxed{ \\frac{1}{2} }.", "\\frac{1}{2}", "exact", 1), ("\\boxed{ab} }", "ab", "exact", 1),
    ("\\boxed{cab", "cab", "exact", 0), ("cab}", "cab", "exact", 0),
    ("The answer is 72.", "48/2 = 24 ... #### 72", "math", 1), ("#### 1,234", "#### 1234", "math", 1),
    ("\\boxed{\\frac{1}{2}}", "0.5", "math", 1), ("\\boxed{0.25}", "\\frac14", "math", 1),
    ("I think \\boxed{7}", "so \\boxed{8}", "math", 0), ("no idea", "3", "math", 0),
    ("72 or 73", "72", "math", 0)])
def test_verifier(response, answer, verifier, reward):
    assert collect.verify(response, answer, verifier) == reward
