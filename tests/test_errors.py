"""Invalid input: exit code 2, a one-line error that names the file, and existing output is not changed."""

import contextlib
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file

import collect
import plot
import score
import sketch
import train_grpo

OLD = b"an output of an earlier run"


class Refusal:
    """Runs a stage on invalid input and checks its exit code, its error line and the existing output."""

    def __init__(self, call, folder):
        self.call, self.out = call, folder / "out.bin"

    def __call__(self, module, *arguments, names, says, out=None):
        target = out or self.out
        if out is None:
            target.write_bytes(OLD)
        code, stdout, err = self.call(module, *arguments, "--out", target)
        assert code == 2 and stdout == "", err
        lines = err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"{module.__name__}.py: error: "), err
        assert str(names) in lines[0] and says in lines[0] and "; expected " in lines[0], err
        if out is None:
            assert target.read_bytes() == OLD


@pytest.fixture
def refuses(call, tmp_path):
    return Refusal(call, tmp_path)


@pytest.fixture
def files(micro_run, world):
    """Valid inputs, taken from the micro run."""
    run, _ = micro_run
    phase = run / "cropi/phase-0"
    return {"base": world / "base", "data": world / "train.jsonl", "rollouts": run / "rollouts/train.pt",
            "test": run / "rollouts/targeted.pt",
            "train": phase / "train.npy", "val": phase / "val_sort.npy", "selected": phase / "selected.npy"}


def truncated(path, folder):
    """A copy of the first two thirds of a file's bytes; a sketch's .json is copied in full."""
    copy = folder / path.name
    copy.write_bytes(path.read_bytes()[:path.stat().st_size * 2 // 3])
    if path.with_suffix(".json").exists():
        shutil.copy(path.with_suffix(".json"), copy.with_suffix(".json"))
    return copy


def altered_sketch(path, folder, change=lambda array: array, **sidecar):
    copy = folder / "altered.npy"
    np.save(copy, change(np.load(path)))
    seen = json.loads(path.with_suffix(".json").read_text())
    copy.with_suffix(".json").write_text(json.dumps({**seen, **sidecar}))
    return copy


def altered_rollouts(path, folder, **changes):
    copy = folder / "altered.pt"
    torch.save({**torch.load(path, weights_only=True), **changes}, copy)
    return copy


class Bomb:
    def __reduce__(self):
        return print, ("this code ran",)  # on stdout, which must be empty on an error


def bad_rollouts(kind, good, folder):
    path = folder / f"{kind}.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "torch-pickle":
        torch.save(Bomb(), path)
    elif kind == "other":
        torch.save({"weight": torch.zeros(3)}, path)
    elif kind == "text":
        path.write_text("not a tensor in sight\n")
    elif kind == "truncated":
        return truncated(good, folder)
    elif kind == "format 1":
        return altered_rollouts(good, folder, meta={"format": 1})
    elif kind == "inconsistent":
        return altered_rollouts(good, folder, response_tokens=torch.zeros(5, dtype=torch.int32))
    return path


KINDS = ["missing", "pickle", "torch-pickle", "other", "text", "truncated", "inconsistent", "format 1"]


@pytest.mark.parametrize("stage, kind", [
    (stage, kind) for stage in ("sketch", "score", "train_grpo") for kind in KINDS
    if (stage, kind) != ("score", "inconsistent")])  # score.py reads the rewards only
def test_bad_rollouts(stage, kind, files, refuses, tmp_path):
    bad = bad_rollouts(kind, files["rollouts"], tmp_path)
    if stage == "sketch":
        refuses(sketch, "--model", files["base"], "--rollouts", bad,
                names=bad, says="found no readable rollouts")
    elif stage == "score":
        refuses(score, "--method", "random", "--rollouts", bad, names=bad, says="found no readable rollouts")
    else:
        refuses(train_grpo, "--model", files["base"], "--rollouts", bad, "--select", files["selected"],
                "--steps", 1, names=bad, says="found no readable rollouts", out=tmp_path / "policy")
        assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("which", ["train", "val"])
def test_missing_and_truncated_sketches(which, files, refuses, tmp_path):
    for bad in (tmp_path / "none.npy", truncated(files[which], tmp_path)):
        paths = {**files, which: bad}
        refuses(score, "--train", paths["train"], "--val", paths["val"], names=bad.name, says="found")


def test_sketch_that_is_a_pickle(files, refuses, tmp_path):
    np.save(tmp_path / "p.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    shutil.copy(files["train"].with_suffix(".json"), tmp_path / "p.json")
    refuses(score, "--train", tmp_path / "p.npy", "--val", files["val"],
            names="p.npy", says="no readable sketch")


@pytest.mark.parametrize("key, value", [("seed", 7), ("keep", 0.5), ("policy", "another"),
                                        ("rho_max", "5.0")])
def test_sketches_that_do_not_match(key, value, files, refuses, tmp_path):
    other = altered_sketch(files["val"], tmp_path, **{key: value})
    refuses(score, "--train", files["train"], "--val", other, names=other, says=f"found {key} {value}")


def test_sketches_of_another_dim(files, refuses, tmp_path):
    other = altered_sketch(files["val"], tmp_path, lambda array: array[:, :100], dim=100)
    refuses(score, "--train", files["train"], "--val", other, names=other, says="found dim 100")


def test_nan_in_a_sketch(files, refuses, tmp_path):
    def poison(array):
        array[3, 5] = np.nan
        return array

    bad = altered_sketch(files["train"], tmp_path, poison)
    refuses(score, "--train", bad, "--val", files["val"], names=bad, says="NaN or infinity in row 3")


@pytest.mark.parametrize("alpha, says", [("0", "found 0.0"), ("-0.1", "found -0.1"), ("1.5", "found 1.5"),
                                         ("0.001", "at least one prompt")])
def test_alpha(alpha, says, files, refuses):
    refuses(score, "--train", files["train"], "--val", files["val"], f"--alpha={alpha}",
            names="--alpha", says=says)


def test_one_response_has_no_variance(files, refuses, call, tmp_path):
    good = torch.load(files["rollouts"], weights_only=True)
    one = altered_rollouts(files["rollouts"], tmp_path, rewards=good["rewards"][:, :1],
                           response_lengths=torch.ones(120).long(),
                           response_tokens=good["response_tokens"][:120], logprobs=good["logprobs"][:120])
    refuses(sketch, "--model", files["base"], "--rollouts", one, names=one, says="found K = 1")
    code, out, err = call(sketch, "--model", files["base"], "--rollouts", files["rollouts"],
                          files["rollouts"], one, "--out", *(tmp_path / f"{x}.npy" for x in "abc"))
    assert code == 2 and not out and f"{one}: found K = 1" in err  # also as one of two validation sets
    refuses(score, "--method", "learnability", "--rollouts", one, names=one, says="found K = 1")


@pytest.mark.parametrize("names", [["a.npy"], ["a.npy", "a.npy"], ["a.npy", "b.json"], ["a.npy", "a.bin"]])
def test_sketches_that_would_overwrite_each_other(names, files, call, tmp_path):
    """Each is a file with a .json of the same name next to it."""
    code, out, err = call(sketch, "--model", files["base"], "--rollouts", *[files["rollouts"]] * 2,
                          "--out", *(tmp_path / name for name in names))
    assert code == 2 and not out and err.count("\n") == 1 and "2 .npy files of different names" in err
    assert not list(tmp_path.iterdir())


def test_no_prompt_with_a_variance(files, refuses, tmp_path):
    flat = altered_rollouts(files["rollouts"], tmp_path, rewards=torch.ones(120, 6))
    refuses(sketch, "--model", files["base"], "--rollouts", flat,
            names=flat, says="no prompt with unequal rewards")
    refuses(score, "--method", "passrate", "--rollouts", flat,
            names=flat, says="no prompt with unequal rewards")


def test_no_validation_set_with_a_variance(files, call, tmp_path, monkeypatch):
    """It is refused before the model is loaded: the train prompts are not sketched in vain."""
    flat = altered_rollouts(files["rollouts"], tmp_path, rewards=torch.ones(120, 6))
    monkeypatch.setattr(sketch, "load_policy", None)
    code, out, err = call(sketch, "--model", files["base"], "--rollouts", files["rollouts"], flat,
                          "--out", tmp_path / "a.npy", tmp_path / "b.npy")
    assert code == 2 and not out and err.count("\n") == 1
    assert f"{flat}: found no prompt with unequal rewards" in err
    assert not list(tmp_path.glob("*.npy"))


def test_ranks_report_an_error_once(files, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, ROOT / "sketch.py", "--model", files["base"], "--rollouts",
                           tmp_path / "none.pt", "--out", tmp_path / "a.npy"], capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count("sketch.py: error: ") == 1


@pytest.mark.parametrize("text, says", [
    ("", "expected a .jsonl or .parquet file that is not empty"),
    ('{"prompt": "1+1=", "answer": "2"}\nnot json\n', "unreadable data"),
    ('{"query": "1+1=", "answer": "2"}\n',
     "columns ['query', 'answer']; expected a column prompt or question"),
    ('{"prompt": "1+1="}\n', "columns ['prompt']; expected a column answer or solution"),
    ('{"prompt": "1+1=", "answer": " "}\n', "an empty prompt or answer in example 1"),
    ('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "", "answer": "2"}\n',
     "an empty prompt or answer in example 2"),
    (json.dumps({"prompt": "1+" * 40, "answer": "2"}) + "\n", "a prompt of 80 tokens (example 1)")])
def test_bad_data(text, says, files, refuses, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(text)
    refuses(collect, "--model", files["base"], "--data", data, "--max-new-tokens", 8, names=data, says=says)


def test_chat_messages_without_a_chat_template(files, refuses, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}) + "\n")
    refuses(collect, "--model", files["base"], "--data", data, "--max-new-tokens", 8,
            names=files["base"], says="found no chat template")


def test_missing_data(files, refuses, tmp_path):
    refuses(collect, "--model", files["base"], "--data", tmp_path / "no.jsonl",
            names="no.jsonl", says="Unable to find")


def test_model_folder_without_tokenizer_or_model(files, refuses, tmp_path):
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(files["base"] / name, tmp_path / name)
    refuses(collect, "--model", tmp_path, "--data", files["data"], names=tmp_path, says="found no tokenizer")
    shutil.copytree(files["base"], tmp_path / "damaged")
    (tmp_path / "damaged/config.json").unlink()
    refuses(collect, "--model", tmp_path / "damaged", "--data", files["data"], "--max-new-tokens", 8,
            names=tmp_path / "damaged", says="found no usable config.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    refuses(sketch, "--model", empty, "--rollouts", files["rollouts"],
            names=empty, says="found no usable config.json")


@pytest.mark.parametrize("stage, place, flag", [
    ("collect", "nn.Embedding.forward", "--kv-tokens"), ("sketch", "Tensor.backward", "--batch-tokens"),
    ("train_grpo", "optim.AdamW.step", "--batch-tokens or --kv-tokens, or use more GPUs")])
def test_gpu_out_of_memory(stage, place, flag, files, tmp_path):
    """Told in one line with the flag to lower; the error is raised by `place`."""
    inputs = {"collect": ["--data", files["data"], "--max-new-tokens", 8],
              "sketch": ["--rollouts", files["rollouts"]],
              "train_grpo": ["--rollouts", files["rollouts"], "--select", files["selected"], "--steps", 1]}
    program = f"""import runpy, sys, torch
def allocate(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
torch.{place} = allocate
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""
    command = [sys.executable, "-c", program, ROOT / f"{stage}.py", "--model", files["base"],
               "--out", tmp_path / "out", *map(str, inputs[stage])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line = done.stderr.partition(f"{stage}.py: error: ")[2].splitlines()[0]  # after the progress bar
    assert line.startswith("rank 0: found too little GPU memory (CUDA out of memory. Tried to allocate 2")
    assert line.endswith(f"; lower {flag}")


@pytest.mark.parametrize("saves, resumes, copies", [(False, False, 1), (True, False, 2), (True, True, 1)])
def test_disk_space_that_a_run_needs(saves, resumes, copies, capsys, tmp_path, monkeypatch):
    """A copy has 12 bytes per float32 parameter and a tenth; what else is in the folder will be replaced."""
    policy = torch.nn.Linear(25, 40, bias=False)
    run = SimpleNamespace(part=tmp_path, args=SimpleNamespace(steps=2 if saves else 1, save_every=1))
    (tmp_path / "new.pt").write_bytes(bytes(100))
    if resumes:
        (tmp_path / "checkpoint.pt").write_bytes(bytes(10**5))
    for free, refused in ((copies * 13200 - 100, False), (copies * 13200 - 101, True)):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
            with pytest.raises(SystemExit) if refused else contextlib.nullcontext():
                train_grpo.Run.check_space(run, policy)
    assert ("and a checkpoint" in capsys.readouterr().err) == (copies == 2)


def test_disk_without_room_for_the_policy(files, refuses, call, tmp_path, monkeypatch):
    """train_grpo.py asks before the first step for what its last step will write."""
    arguments = ("--model", files["base"], "--rollouts", files["rollouts"], "--select", files["selected"],
                 "--steps", 1, "--save-every", 1, "--batch-size", 2, "--group", 2)  # no checkpoint
    size = 13.2 * sum(weight.numel() for weight in load_file(files["base"] / "model.safetensors").values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 10**5))
    refuses(train_grpo, *arguments, names=tmp_path / "policy", says="GB of free disk; expected",
            out=tmp_path / "policy")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    assert call(train_grpo, *arguments, "--out", tmp_path / "policy")[0] == 0
    written = sum(file.stat().st_size for file in (tmp_path / "policy").iterdir())
    assert 0.9 * size < written < size


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_engine_that_is_not_installed(files, refuses, tmp_path):
    base = files["base"]
    refuses(collect, "--model", base, "--data", files["data"], "--max-new-tokens", 9, "--engine", "vllm",
            names=base, says="No module named")
    refuses(train_grpo, "--model", base, "--rollouts", files["rollouts"], "--select", files["selected"],
            "--steps", 1, "--engine", "vllm",
            names=base, says="requirements-vllm.txt", out=tmp_path / "policy")


@pytest.mark.parametrize("stage", ["collect", "sketch", "score", "train_grpo"])
def test_output_that_cannot_be_written(stage, files, refuses, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    out = blocked / "out"
    arguments = {
        "collect": (collect, "--model", files["base"], "--data", files["data"], "--max-new-tokens", 4),
        "sketch": (sketch, "--model", files["base"], "--rollouts", files["rollouts"]),
        "score": (score, "--train", files["train"], "--val", files["val"]),
        "train_grpo": (train_grpo, "--model", files["base"], "--rollouts", files["rollouts"],
                       "--select", files["selected"], "--steps", 1)}[stage]
    refuses(*arguments, names=out, says="cannot be written", out=out)
    assert blocked.read_text() == "a file where a folder should be"


@pytest.mark.parametrize("kind", ["missing", "truncated", "out of range"])
def test_bad_selection(kind, files, refuses, tmp_path):
    bad = truncated(files["selected"], tmp_path) if kind == "truncated" else tmp_path / "bad.npy"
    if kind == "out of range":
        np.save(bad, np.array([3, 120]))
    refuses(train_grpo, "--model", files["base"], "--rollouts", files["rollouts"], "--select", bad,
            "--steps", 1, names=bad, says="no usable selection", out=tmp_path / "policy")


@pytest.mark.parametrize("flag, value", [("--train-temperature", 0), ("--eval-temperature", -1),
                                         ("--group", 1), ("--steps", 0)])
def test_training_flags_out_of_range(flag, value, files, refuses, tmp_path):
    refuses(train_grpo, "--model", files["base"], "--rollouts", files["rollouts"],
            "--select", files["selected"], "--steps", 1, flag, value,
            names=flag, says=f"found {value}", out=tmp_path / "policy")


def test_training_folder_of_other_settings(files, refuses, tmp_path):
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"lr": 0.5}))
    refuses(train_grpo, "--model", files["base"], "--rollouts", files["rollouts"],
            "--select", files["selected"], "--steps", 1, names=folder, says="a run with another", out=folder)
    assert [path.name for path in folder.iterdir()] == ["args.json"]


def test_training_folder_of_another_selection(files, call, tmp_path):
    """A finished policy is rejected when selected.npy has the same path but other prompts."""
    arguments = ["--model", files["base"], "--rollouts", files["rollouts"], "--select", tmp_path / "s.npy",
                 "--steps", 1, "--batch-size", 1, "--out", tmp_path / "policy"]
    np.save(tmp_path / "s.npy", np.array([1, 2]))
    assert call(train_grpo, *arguments)[0] == 0
    code, stdout, _ = call(train_grpo, *arguments)
    assert code == 0 and "complete, nothing to do" in stdout
    memory = ["--batch-tokens", 100, "--kv-tokens", 100]  # these may differ from the finished run's
    assert call(train_grpo, *arguments, *memory)[0] == 0
    np.save(tmp_path / "s.npy", np.array([2, 1]))
    code, _, err = call(train_grpo, *arguments)
    assert code == 2 and "a run with another selected" in err


def test_plot_of_no_run(refuses, tmp_path):
    refuses(plot, tmp_path, names=tmp_path, says="no readable run", out=tmp_path)


def test_exit_code_of_a_process(tmp_path):
    done = run_script("score.py", "--method", "full", "--rollouts", tmp_path / "none.pt",
                      "--out", tmp_path / "s.npy")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "none.pt" in done.stderr


@pytest.mark.parametrize("script", ["collect.py", "sketch.py", "score.py", "train_grpo.py", "plot.py"])
def test_help(script):
    done = run_script(script, "--help")
    assert done.returncode == 0 and "Reads" in done.stdout and "Writes" in done.stdout and not done.stderr


@pytest.mark.parametrize("stage", ["collect", "sketch", "score"])
def test_disk_that_becomes_full(stage, files, call, tmp_path, monkeypatch):
    """The output is written to a device that is always full; after that the same command works."""
    out = tmp_path / "out.npy"
    arguments = {
        "collect": (collect, "--model", files["base"], "--data", files["data"], "--max-new-tokens", 4,
                    "--limit", 2, "--verifier", "exact"),
        "sketch": (sketch, "--model", files["base"], "--rollouts", files["rollouts"], "--dim", 64),
        "score": (score, "--train", files["train"], "--val", files["val"])}[stage]
    part = out.with_name("out.npy.part")
    part.symlink_to("/dev/full")
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=0)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        code, _, error = call(*arguments, "--out", out)
    assert code == 2 and f"{out}: found a full disk" in error.splitlines()[-1] and "Traceback" not in error
    part.unlink()
    assert call(*arguments, "--out", out)[0] == 0 and out.exists()


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="of its own"), collect.replacing(tmp_path / "out"):
        raise RuntimeError("of its own")


@pytest.mark.parametrize("stage", ["collect", "sketch"])
def test_one_writer(stage, files, call, tmp_path):
    """Another process holds the lock, as the ranks of a killed torchrun would."""
    out = tmp_path / "out"
    arguments = {
        "collect": (collect, "--model", files["base"], "--data", files["data"], "--max-new-tokens", 4,
                    "--limit", 2, "--verifier", "exact"),
        "sketch": (sketch, "--model", files["base"], "--rollouts", files["rollouts"], "--dim", 64)}[stage]
    program = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); input()"
    with subprocess.Popen([sys.executable, "-c", f"{program}; print()", f"{out}.lock"], text=True,
                          stdin=subprocess.PIPE) as other:
        while not Path(f"{out}.lock").exists():
            time.sleep(0.01)
        time.sleep(0.5)
        code, _, error = call(*arguments, "--out", out)
        assert code == 2 and "another run that is writing it" in error and not list(tmp_path.glob("*.parts"))
        other.communicate("\n")
    assert call(*arguments, "--out", out)[0] == 0
    assert not Path(f"{out}.lock").exists()


@pytest.mark.parametrize("stage", ["collect", "sketch", "score", "train_grpo"])
def test_ctrl_c(stage, tmp_path):
    """One line and exit code 130, as of a program that SIGINT has ended."""
    program = """import runpy, sys
import argparse
def interrupt(*arguments):
    raise KeyboardInterrupt
argparse.ArgumentParser.parse_args = interrupt
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""
    command = [sys.executable, "-c", program, ROOT / f"{stage}.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == f"{stage}.py: stopped; run the same command again to go on\n"


@pytest.mark.parametrize("rank, world_size", [("1", "1"), ("0", "2"), ("3", "2")])
def test_ranks_that_torchrun_did_not_set(rank, world_size, files, tmp_path):
    """Left in the environment by a cluster: RANK=1 WORLD_SIZE=1 would collect nothing."""
    environment = {**os.environ, "RANK": rank, "WORLD_SIZE": world_size}
    arguments = {"collect.py": ["--data", files["data"], "--max-new-tokens", 4],
                 "sketch.py": ["--rollouts", files["rollouts"]],
                 "train_grpo.py": ["--rollouts", files["rollouts"], "--select", files["selected"],
                                   "--steps", 1]}
    for script, inputs in arguments.items():
        command = [sys.executable, ROOT / script, "--model", files["base"], "--out", tmp_path / "x", *inputs]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"RANK, WORLD_SIZE: found {rank}, {world_size}; expected those that torchrun" in done.stderr
    assert not list(tmp_path.iterdir())


def test_progress_in_a_log_file(files, tmp_path):
    """Lines, at most one a minute, and no carriage return."""
    arguments = ["--rollouts", files["rollouts"], "--select", files["selected"], "--steps", 30,
                 "--batch-size", 2, "--group", 2, "--out", tmp_path / "policy", "--model", files["base"]]
    done = run_script("train_grpo.py", *arguments)
    assert done.returncode == 0 and "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert 1 <= len(lines) <= 3 and all(line.startswith(f"train {tmp_path / 'policy'}: ") for line in lines)
    assert "30/30" in lines[-1]
