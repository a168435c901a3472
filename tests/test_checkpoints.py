"""Real checkpoints: what breaks a stage late elsewhere must work, or be refused before the costly work."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_architectures import EXPERTS, GROUPS, HEADS, tiny
from test_scale import shards
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import collect
import sketch
import train_grpo


@pytest.fixture(scope="module")
def toy(world):
    """The toy's tokenizer and the size of its vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    return tokenizer, len(tokenizer)


def save(policy, toy, folder):
    policy.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    policy.save_pretrained(folder)
    toy[0].save_pretrained(folder)
    return folder


def collected(call, folder, world, out, *options):
    """Collects 4 responses to each of 6 prompts with rewards that differ."""
    verifier = out.with_name("length.py")
    verifier.write_text("def odd(response, answer):\n    return len(response) % 2\n")
    code, _, error = call(collect, "--model", folder, "--data", world / "train.jsonl", "--limit", 6, "--k", 4,
                          "--max-new-tokens", 6, "--verifier", f"{verifier}:odd", "--out", out, *options)
    assert code == 0, error
    return ["--rollouts", out]


def training(folder, rollouts, selected, out, *options):
    np.save(selected, np.arange(6))
    meta = torch.load(rollouts[1], weights_only=True)["meta"]
    return ["--model", folder, *rollouts, "--select", selected, "--out", out, "--batch-size", 3, "--group", 4,
            "--lr", 1e-3, "--verifier", meta["verifier"], *options]


def refusal(call, module, *arguments):
    """The only line that a stage prints before it exits with code 2."""
    code, stdout, error = call(module, *arguments)
    assert code == 2 and stdout == "" and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_invalid_generation_settings(place, call, world, tmp_path, toy):
    """Sampling settings without do_sample, which transformers loads and refuses to save."""
    base = save(tiny("qwen2", GROUPS | dict(vocab_size=toy[1])), toy, tmp_path / "base")
    if place == "config.json":
        (base / "generation_config.json").unlink()
    settings = json.loads((base / place).read_text()) | {"temperature": 0.9, "top_p": 0.6}
    (base / place).write_text(json.dumps(settings | {"eos_token_id": [1, 2]}))
    with pytest.raises(ValueError, match="do_sample"):
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "no")
    rollouts = collected(call, base, world, tmp_path / "r.pt")
    arguments = training(base, rollouts, tmp_path / "s.npy", tmp_path / "policy", "--steps", 2)
    assert call(train_grpo, *arguments)[0] == 0
    assert GenerationConfig.from_pretrained(tmp_path / "policy").eos_token_id == [1, 2]


def test_failure_at_the_end_keeps_the_steps(call, world, tmp_path, toy, monkeypatch):
    """The same command ends with the weights of a run that did not fail, without another step."""
    base = save(tiny("qwen2", GROUPS | dict(vocab_size=toy[1])), toy, tmp_path / "base")
    rollouts = collected(call, base, world, tmp_path / "r.pt")
    arguments = training(base, rollouts, tmp_path / "s.npy", tmp_path / "policy", "--steps", 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "save_pretrained", lambda *_: 1 / 0, raising=False)
        patch.setattr(type(tiny("qwen2", GROUPS)), "save_pretrained", lambda *_: 1 / 0)
        code, _, error = call(train_grpo, *arguments)
    assert code == 2 and "ZeroDivisionError" in error and not (tmp_path / "policy").exists()
    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "grpo_step", None)  # no step may be repeated
        assert call(train_grpo, *arguments)[0] == 0
    arguments[arguments.index(tmp_path / "policy")] = tmp_path / "other"
    assert call(train_grpo, *arguments)[0] == 0
    for name in ("model.safetensors", "optimizer.pt"):
        assert (tmp_path / "policy" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_unwritable_tokenizer_is_refused_before_the_first_step(call, world, tmp_path, toy, monkeypatch):
    base = save(tiny("qwen2", GROUPS | dict(vocab_size=toy[1])), toy, tmp_path / "base")
    rollouts = collected(call, base, world, tmp_path / "r.pt")
    monkeypatch.setattr(type(toy[0]), "save_pretrained", lambda *_: 1 / 0)
    monkeypatch.setattr(train_grpo, "grpo_step", None)
    arguments = training(base, rollouts, tmp_path / "s.npy", tmp_path / "policy", "--steps", 2)
    assert "a configuration or tokenizer that cannot be written" in call(train_grpo, *arguments)[2]


class Vision:
    """Gemma 3 with a vision tower that text never reaches, and Ernie 4.5 MoE with a correction bias."""

    @staticmethod
    def gemma3(vocabulary):
        text = dict(vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
        vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                      image_size=16, patch_size=8)
        torch.manual_seed(0)
        config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, eos_token_id=1,
                                      pad_token_id=0, bos_token_id=1, mm_tokens_per_image=4)
        return AutoModelForCausalLM.from_config(config).eval()

    @staticmethod
    def ernie4_5_moe(vocabulary):
        return tiny("ernie4_5_moe", EXPERTS | dict(vocab_size=vocabulary, moe_num_experts=4, moe_k=2))


@pytest.mark.parametrize("kind", ["gemma3", "ernie4_5_moe"])
def test_parameters_without_a_gradient(kind, call, world, tmp_path, toy):
    """Two phases, the second on one rank and on two: the unused weights stay, the others move."""
    policy = getattr(Vision, kind)(toy[1])
    base = save(policy, toy, tmp_path / "base")
    rollouts = collected(call, base, world, tmp_path / "r.pt")
    common = ("--steps", 2, "--save-every", 1)
    first = training(base, rollouts, tmp_path / "s.npy", tmp_path / "one", *common)
    assert call(train_grpo, *first)[0] == 0
    second = ["--ref", base, "--optimizer", tmp_path / "one/optimizer.pt"]
    again = training(tmp_path / "one", rollouts, tmp_path / "s.npy", tmp_path / "two", *common, *second)
    code, _, error = call(train_grpo, *again)
    assert code == 0, error
    shards(["train_grpo.py", *training(tmp_path / "one", rollouts, tmp_path / "s.npy", tmp_path / "ranks",
                                       *common, *second)])
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "two"))
    ranks = load_file(tmp_path / "ranks/model.safetensors")
    unused = [name for name in before if "vision" in name or "multi_modal" in name or "correction" in name]
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert unused and not set(unused) & set(moved) and len(moved) > 10
    for name in after:
        torch.testing.assert_close(ranks[name], after[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_resuming_with_parameters_without_a_gradient(ranks, call, world, tmp_path, toy, monkeypatch):
    """The checkpoint of step 1 is loaded again; the end has the bytes of a run that was never stopped."""
    base = save(Vision.gemma3(toy[1]), toy, tmp_path / "base")
    rollouts = collected(call, base, world, tmp_path / "r.pt")
    settings = ("--steps", 2, "--save-every", 1)
    whole = training(base, rollouts, tmp_path / "s.npy", tmp_path / "whole", *settings)
    stopped = training(base, rollouts, tmp_path / "s.npy", tmp_path / "stopped", *settings)
    with monkeypatch.context() as patch:  # the second step fails
        step = train_grpo.grpo_step
        calls = []
        patch.setattr(train_grpo, "grpo_step",
                      lambda *arguments: calls.append(1) or (step(*arguments) if len(calls) == 1 else 1 / 0))
        with pytest.raises(ZeroDivisionError):
            call(train_grpo, *stopped)
    assert (tmp_path / "stopped.part/checkpoint.pt").exists()
    if ranks == 2:
        shards(["train_grpo.py", *whole])
        shards(["train_grpo.py", *stopped])
        return
    assert call(train_grpo, *whole)[0] == call(train_grpo, *stopped)[0] == 0
    for name in ("model.safetensors", "optimizer.pt"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


LONGROPE = GROUPS | dict(original_max_position_embeddings=16, max_position_embeddings=64, rope_parameters={
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.0], "long_factor": [4.0, 4.0],
    "original_max_position_embeddings": 16})


def test_longrope_is_refused_beyond_its_first_length(call, world, tmp_path, toy):
    """Prompts of up to 10 tokens: 6 response tokens keep the frequencies, 60 would not."""
    base = save(tiny("phi3", LONGROPE | dict(vocab_size=toy[1])), toy, tmp_path / "base")
    assert collect.check_checkpoint(str(base)) == (toy[1], 16)
    data = ("--model", base, "--data", world / "train.jsonl", "--limit", 6, "--k", 4)
    error = refusal(call, collect, *data, "--max-new-tokens", 14, "--out", tmp_path / "no.pt")
    assert "expected 1 to 2 tokens with --max-new-tokens 14" in error
    rollouts = collected(call, base, world, tmp_path / "r.pt")
    for budget in (1, 512):
        assert call(sketch, "--model", base, *rollouts, "--out", tmp_path / f"{budget}.npy", "--dim", 64,
                    "--batch-tokens", budget)[0] == 0
    one, many = np.load(tmp_path / "1.npy"), np.load(tmp_path / "512.npy")
    assert np.abs(one).max() > 0 and np.abs(one - many).max() <= 1e-4 * np.abs(one).max()
    stored = torch.load(rollouts[1], weights_only=True)
    stored["meta"]["max_new_tokens"] = 60  # as if another model had sampled them
    torch.save(stored, rollouts[1])
    sketching = ("--model", base, *rollouts, "--out", tmp_path / "n.npy")
    assert "at most 16 tokens" in refusal(call, sketch, *sketching)
    arguments = training(base, rollouts, tmp_path / "s.npy", tmp_path / "policy", "--steps", 1)
    assert "at most 16 tokens" in refusal(call, train_grpo, *arguments)


@pytest.mark.parametrize("name", ["minimax", "lfm2"])
def test_what_later_stages_refuse_is_refused_before_sampling(name, call, world, tmp_path, toy):
    """Caches that are not of keys and values alone."""
    settings = EXPERTS if name == "minimax" else GROUPS | dict(layer_types=["conv", "full_attention"])
    base = save(tiny(name, settings | dict(vocab_size=toy[1])), toy, tmp_path / "base")
    error = refusal(call, collect, "--model", base, "--data", world / "train.jsonl", "--max-new-tokens", 6,
                    "--out", tmp_path / "r.pt")
    assert "choose another" in error and not list(tmp_path.glob("r.pt*.parts"))


@pytest.mark.parametrize("name, settings", [("granite", GROUPS | dict(logits_scaling=3.0)), ("gemma2", HEADS),
                                            ("cohere", GROUPS)])
def test_scaled_logits_work(name, settings, call, world, tmp_path, toy):
    base = save(tiny(name, settings | dict(vocab_size=toy[1])), toy, tmp_path / "base")
    rollouts = collected(call, base, world, tmp_path / "r.pt")
    assert call(sketch, "--model", base, *rollouts, "--out", tmp_path / "s.npy", "--dim", 64)[0] == 0
    assert json.loads((tmp_path / "s.json").read_text())["log_ratio_max"] < 1e-3


def three_stages(base, rollouts, world, tmp_path):
    """(module, arguments) of each stage that loads a policy."""
    np.save(tmp_path / "sel.npy", np.arange(3))
    return [(collect, ["--model", base, "--data", world / "train.jsonl", "--max-new-tokens", 6, "--out",
                       tmp_path / "x.pt"]),
            (sketch, ["--model", base, "--rollouts", rollouts, "--out", tmp_path / "x.npy"]),
            (train_grpo, ["--model", base, "--rollouts", rollouts, "--select", tmp_path / "sel.npy",
                          "--steps", 1, "--out", tmp_path / "x"])]


@pytest.mark.parametrize("whole", [False, True])
def test_lora_adapter(whole, call, micro_run, world, tmp_path):
    """A folder with an adapter alone, and one that has a whole model beside it."""
    base = tmp_path / "adapter"
    if whole:
        shutil.copytree(world / "base", base)
    base.mkdir(exist_ok=True)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "x"}
    (base / "adapter_config.json").write_text(json.dumps(adapter))
    for module, arguments in three_stages(base, micro_run[0] / "rollouts/train.pt", world, tmp_path):
        assert "merge it: peft's AutoPeftModelForCausalLM" in refusal(call, module, *arguments)


def test_code_in_a_checkpoint_never_runs(call, micro_run, world, tmp_path, monkeypatch):
    """transformers asks on a terminal whether to run it; the answer would be yes."""
    base = shutil.copytree(world / "base", tmp_path / "base")
    (base / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((base / "config.json").read_text()) | {"model_type": "unheard-of"}
    config["auto_map"] = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    (base / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for module, arguments in three_stages(base, micro_run[0] / "rollouts/train.pt", world, tmp_path):
        refusal(call, module, *arguments)
    assert not (tmp_path / "ran").exists()


def test_tokens_beyond_the_embedding(call, world, tmp_path, toy):
    """The prompt is named; rollouts of a larger vocabulary are refused by the later stages."""
    base = save(tiny("qwen2", GROUPS | dict(vocab_size=toy[1])), toy, tmp_path / "base")
    rollouts = collected(call, base, world, tmp_path / "r.pt")
    small = save(tiny("qwen2", GROUPS | dict(vocab_size=4)), toy, tmp_path / "small")
    stages = three_stages(small, rollouts[1], world, tmp_path)
    expected = ("in the prompt of example 1", "ids below 4", "ids below 4")
    for (module, arguments), says in zip(stages, expected):
        assert says in refusal(call, module, *arguments)


def test_quantized_weights(call, micro_run, world, tmp_path, monkeypatch):
    """Their integers have no gradient."""
    load = AutoModelForCausalLM.from_pretrained

    def quantized(*arguments, **options):
        policy = load(*arguments, **options)
        policy.integers = torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
        return policy

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", quantized)
    rollouts = micro_run[0] / "rollouts/train.pt"
    for module, arguments in three_stages(world / "base", rollouts, world, tmp_path):
        assert "quantized weights" in refusal(call, module, *arguments)
