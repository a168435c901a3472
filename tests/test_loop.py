"""The whole loop on a micro world: all documented files, and the same bytes when repeated or killed."""

import fcntl
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MICRO, ROOT, run_loop, without_seconds
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_micro_run_leaves_every_promised_file(micro_run):
    run, output = micro_run
    rewards = torch.load(run / "rollouts/train.pt", weights_only=True)["rewards"]
    for m in range(2):
        phase = run / "cropi" / f"phase-{m}"
        for name in ("train", "val_sort", "val_dbl"):
            sidecar = json.loads((phase / f"{name}.json").read_text())
            assert np.load(phase / f"{name}.npy").shape == (sidecar["prompts"], sidecar["dim"])
        selected = np.load(phase / "selected.npy")
        assert np.load(phase / "scores.npy").shape == (120, 2) and 0 < len(selected) <= 24
        assert (rewards[selected].std(1) > 0).all()
        policy = AutoModelForCausalLM.from_pretrained(phase / "policy")
        tokenizer = AutoTokenizer.from_pretrained(phase / "policy")
        assert policy(**tokenizer("sort(21)", return_tensors="pt")).logits.isfinite().all()
        rows = [json.loads(line) for line in (phase / "policy/metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == ([0, 1, 2, 3] if m == 0 else [4, 5, 6])
        assert ["sample" in row for row in rows] == [row["step"] > 0 for row in rows]
        assert set(rows[-1]["eval"]) == {"targeted", "related", "other"}
        optimizer = torch.load(phase / "policy/optimizer.pt", weights_only=True)
        assert optimizer["step"] == 3 * (m + 1)  # AdamW's state continues across phases
        assert {float(state["step"]) for state in optimizer["optimizer"]["state"].values()} == {3.0 * (m + 1)}
        args = json.loads((phase / "policy/args.json").read_text())
        assert args["ref"].endswith("base")  # the reference stays theta(0)
    for picture in ("accuracy.png", "training.png", "selected.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG") and str(run / picture) in output
    assert not list(run.rglob("*.part")) and "selection s" in output
    one, other = ((run / f"influence/phase-{m}/selected.npy").read_bytes() for m in range(2))
    assert one == other  # this baseline selects only once


def test_second_phase_is_sketched_at_the_new_policy(micro_run):
    run, _ = micro_run
    first, second = (json.loads((run / f"cropi/phase-{m}/train.json").read_text())["policy"]
                     for m in range(2))
    assert first != second
    assert first == json.loads((run / "influence/phase-0/train.json").read_text())["policy"]


def artefacts(run):
    return {str(path.relative_to(run)): without_seconds(path) for path in sorted(run.rglob("*"))
            if path.is_file() and path.name != "seconds.tsv" and path.suffix != ".png"}


def test_same_bytes_again_and_through_kills_of_the_loop(micro_run, world):
    """CROPI once more in a folder of the same name, killed three times, leaves the same bytes."""
    run, _ = micro_run
    first = run.with_name("first")
    os.rename(run, first)
    try:
        command = dict(args=["bash", ROOT / "run_cropi.sh"], start_new_session=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       env={**os.environ, **MICRO, "TOY": str(world), "RUN": str(run), "BASELINE": ""})
        for until in ("rollouts/val_sort.pt", "cropi/phase-0/policy.part", "cropi/phase-1"):
            process = subprocess.Popen(**command)
            while not (run / until).exists():
                assert process.poll() is None
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        run_loop(run, world, BASELINE="")
        for folder, files in (("rollouts", 9), ("cropi", 30)):
            expected, found = artefacts(first / folder), artefacts(run / folder)
            assert expected.keys() == found.keys() and len(expected) >= files
            assert [name for name in expected if expected[name] != found[name]] == []
    finally:
        shutil.rmtree(run)
        os.rename(first, run)


def test_baselines_run_in_the_same_loop(micro_run, world, tmp_path):
    """full, random, passrate and learnability on the same rollouts, for one step of one phase each."""
    run = tmp_path / "run"
    shutil.copytree(micro_run[0] / "rollouts", run / "rollouts")
    methods = {"full": 120, "random": 24, "passrate": 24, "learnability": 24}
    run_loop(run, world, BASELINE="full random passrate", METHOD="learnability", PHASES="1", STEPS="1")
    assert "collect.py" not in (run / "commands.txt").read_text()  # the rollouts are shared
    for method, n in methods.items():
        assert len(np.load(run / method / "phase-0/selected.npy")) == n
        assert (run / method / "phase-0/policy/model.safetensors").exists()
        assert not (run / method / "phase-0/train.npy").exists()


def test_loop_refuses_other_settings(micro_run, world):
    run, _ = micro_run
    before = artefacts(run)
    done = subprocess.run(["bash", ROOT / "run_cropi.sh"], capture_output=True, text=True,
                          env={**os.environ, **MICRO, "TOY": str(world), "RUN": str(run), "LR": "1e-2"})
    assert done.returncode == 2 and "LR=1e-2" in done.stderr and artefacts(run) == before


def test_old_python_is_refused(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2 && exit\nexit 1\n')
    old.chmod(0o755)
    for script in ("run_cropi.sh", "tests/run.sh"):
        done = subprocess.run(["bash", ROOT / script], capture_output=True, text=True,
                              env={**os.environ, "PYTHON": str(old), "RUN": str(tmp_path / "run")})
        assert done.returncode == 2 and not done.stdout and not (tmp_path / "run").exists()
        assert "is Python 3.9.2; expected Python 3.11 or later" in done.stderr
        assert done.stderr.count("\n") == 1


def test_seconds_of_a_stage_count_its_stopped_attempts(tmp_path):
    """The first attempt fails and the second is stopped, each after a second; the third succeeds at once."""
    fake = tmp_path / "python"
    fake.write_text(f"""#!/bin/bash
[[ $1 = */collect.py ]] || exec {sys.executable} "$@"
attempt=$(cat {tmp_path}/attempt)
[ $attempt -lt 3 ] || {{ grep -q gsm8k_test.pt <<<"$*" && exit 0; exit 1; }}
sleep 1
[ $attempt -eq 1 ] || kill -INT -- -$(ps -o pgid= $$ | tr -d ' ')
exit 1
""")
    fake.chmod(0o755)
    run = tmp_path / "run"
    for attempt in (1, 2, 3):
        (tmp_path / "attempt").write_text(str(attempt))
        subprocess.run(["bash", ROOT / "run_cropi.sh"], capture_output=True, start_new_session=True,
                       env={**os.environ, "PYTHON": str(fake), "PRESET": "presets/qwen2.5-1.5b.sh",
                            "RUN": str(run), "ENGINE": "hf"})
        assert (run / "rollouts/seconds.tsv").exists() == (attempt == 3)
    (stage, seconds), = (line.split() for line in (run / "rollouts/seconds.tsv").read_text().splitlines())
    assert stage == "test" and float(seconds) > 2
    assert not (run / "rollouts/test.seconds").exists()


PRESETS = sorted((ROOT / "presets").glob("*.sh"))
METHODS = ("full", "dapo", "random", "passrate", "learnability", "influence", "cropi")


@pytest.mark.parametrize("preset", ["", *(f"presets/{path.name}" for path in PRESETS)])
def test_dry_run_prints_every_command_and_writes_nothing(preset, tmp_path):
    """Run in a copy: all methods, two phases. Each option of a command is one of its script."""
    for name in ("run_cropi.sh", "setup.sh"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    before = sorted(tmp_path.rglob("*"))
    settings = {"DRY_RUN": "1", "PRESET": preset, "PHASES": "2", "BASELINE": " ".join(METHODS),
                "RUN": "runs/x"}
    environment = {key: os.environ[key] for key in ("PATH", "HOME")}
    done = subprocess.run(["bash", "run_cropi.sh"], cwd=tmp_path, capture_output=True, text=True,
                          env=environment | settings)
    assert done.returncode == 0 and not done.stderr and sorted(tmp_path.rglob("*")) == before
    commands = [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]
    scripts = [Path(command[1]).name for command in commands if command[0] != "cp"]
    assert scripts.count("collect.py") == 3 and scripts.count("train_grpo.py") == 2 * len(METHODS)
    assert scripts.count("sketch.py") == 3 and scripts[-1] == "plot.py" and "1" not in scripts
    for command in commands:  # every option exists
        if command[0] != "cp" and Path(command[1]).name not in ("make_toy.py", "plot.py"):
            options = {word for word in command if word.startswith("--")}
            assert all(f'"{option}"' in (ROOT / command[1]).read_text() for option in options), command
    dapo = [command for command in commands if "runs/x/dapo/phase-1/policy" in command]
    assert len(dapo) == 1 and {"--dynamic-sampling", "--token-mean"} < set(dapo[0])


def test_dynamic_sampling_with_any_method(quick):
    """DYNAMIC=1 gives every training stage the option; dapo has it always, and alone the mean over tokens."""
    for dynamic in ("", "1"):
        done, _ = quick(DRY_RUN="1", DYNAMIC=dynamic, BASELINE=" ".join(METHODS))
        for method in METHODS:
            training = [line.split() for line in done.stdout.splitlines()
                        if "/train_grpo.py " in line and f" run/{method}/phase" in line]
            assert len(training) == 2
            for words in training:
                assert words.count("--dynamic-sampling") == (dynamic == "1" or method == "dapo")
                assert words.count("--token-mean") == (method == "dapo")
    assert quick(DYNAMIC="1")[0].returncode == 0
    settings = quick.folder / "run/cropi/settings.txt"
    assert "\nDYNAMIC=1\n" in settings.read_text()
    assert refused(quick()[0], "run/cropi/settings.txt", "< DYNAMIC=1", "> DYNAMIC=")


def test_programs_are_scripts_or_commands(quick):
    """A script starts like a stage, on NPROC ranks; a command of several words starts as it is."""
    ranks = "-m torch.distributed.run --standalone --nproc_per_node 2 --shutdown_timeout 1800"
    for knob, option in (("TRAINER", " --select "), ("SKETCH", " --keep ")):
        for value, start in (("check.py", f"{quick.folder.parent}/python {ranks} check.py"),
                             ("env A=1 check.py", "env A=1 check.py")):
            done, _ = quick(DRY_RUN="1", NPROC="2", **{knob: value})
            lines = [line for line in done.stdout.splitlines() if option in line]
            assert len(lines) == 2 and lines[0].startswith(f"+ {start} --model ckpt "), (start, lines)
        for value in ("none.py", "no-such-command --fast", "ls"):
            done, _ = quick(DRY_RUN="1", **{knob: value})
            assert refused(done, f"{knob} {value}: found no such file or command")
    for knob, found, stages in (("SKETCH", "no run/cropi/phase-0/train.npy", 4),
                                ("TRAINER", "no checkpoint in run/cropi/phase-0/policy", 3)):
        done, log = quick(**{knob: "check.py"})  # it leaves nothing; collected once
        assert refused(done, f"{knob} check.py: found {found}") and len(log) == stages, log
        shutil.rmtree(quick.folder / "run/cropi")
    assert quick()[0].returncode == 0
    assert refused(quick(TRAINER="env check.py")[0], "< TRAINER= > TRAINER=env check.py")


def test_sources_arrive_as_they_are_and_names_are_unique(tmp_path):
    """A slice of a hub data set is not a pattern, even where a file matches it."""
    (tmp_path / "set:train[1]").touch()
    (tmp_path / "set:train1").touch()
    knobs = {"DRY_RUN": "1", "MODEL": "m", "TRAIN": f"{tmp_path}/set:train[1]", "VAL": "a=a.jsonl b=b.jsonl"}

    def loop(**more):
        return subprocess.run(["bash", ROOT / "run_cropi.sh"], capture_output=True, text=True,
                              env={**os.environ, **knobs, **more})

    assert f"--data {tmp_path}/set:train\\[1\\] " in loop().stdout
    for more in ({"TEST": "t=t.jsonl t=u.jsonl"}, {"VAL": "a=a.jsonl a=b.jsonl"}, {"TEST": "val_a=t.jsonl"},
                 {"TEST": "train=t.jsonl"}):
        done = loop(**more)
        assert done.returncode == 2 and "expected different names" in done.stderr
        assert done.stderr.count("\n") == 1


def test_candidates_below_alpha_are_refused(tmp_path):
    for candidates, refused in (("0.05", True), ("1.5", True), ("0.1", False), ("1/2", False)):
        done = subprocess.run(["bash", ROOT / "run_cropi.sh"], capture_output=True, text=True,
                              env={**os.environ, "DRY_RUN": "1", "ALPHA": "0.1", "CANDIDATES": candidates})
        assert (done.returncode == 2 and "CANDIDATES" in done.stderr) == refused


@pytest.fixture
def quick(tmp_path):
    """quick(**knobs): run_cropi.sh in a folder with inputs, by stages that only log their rank and command.

    The loop and its stages find the folder as their current one; LIMIT is the largest file of the loop, in
    bytes, from the end of stage number FULL on.
    """
    mine = tmp_path / "my folder"
    (mine / "ckpt").mkdir(parents=True)
    for name in ("ckpt/config.json", "ckpt/model.safetensors", "a.jsonl", "v.jsonl", "t.jsonl", "check.py"):
        (mine / name).write_text("1\n")
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/bash
[ "$1" != -c ] || exec {sys.executable} "$@"
rank="${{RANK-no rank}} ${{WORLD_SIZE-}}${{LOCAL_RANK-}}${{MASTER_ADDR-}}${{MASTER_PORT-}}"
echo "$rank $PWD $*" >>"{tmp_path}/log"
if [ "$(wc -l <"{tmp_path}/log")" = "${{FULL-}}" ]; then prlimit --pid $PPID --fsize=$LIMIT; fi
""")
    python.chmod(0o755)
    settings = {"PYTHON": str(python), "MODEL": "ckpt", "TRAIN": "a.jsonl", "VAL": "v=v.jsonl",
                "TEST": "t=t.jsonl", "VERIFIER": "check.py:reward", "RUN": "run", "PHASES": "2"}

    def quick(script=ROOT / "run_cropi.sh", limit=None, **knobs):
        (tmp_path / "log").write_text("")
        limit_files = None
        if limit is not None:
            def limit_files():
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        done = subprocess.run(["bash", script], cwd=mine, capture_output=True, text=True,
                              restore_signals=False,  # SIGXFSZ stays ignored: writing fails as on a full disk
                              preexec_fn=limit_files, env={**os.environ, **settings, **knobs})
        return done, (tmp_path / "log").read_text().splitlines()

    quick.folder = mine
    return quick


def refused(done, *words):
    """Whether the loop ended with exit code 2 and one line that has all the words."""
    one_line = done.stderr.startswith("run_cropi.sh: error: ") and done.stderr.count("\n") == 1
    return done.returncode == 2 and one_line and all(word in done.stderr for word in words)


def test_relative_paths_are_those_of_the_caller(quick, tmp_path):
    """From another folder, through a symbolic link: inputs and RUN are there, the stages the project's."""
    link = tmp_path / "bin/cropi"
    link.parent.mkdir()
    link.symlink_to(os.path.relpath(ROOT / "run_cropi.sh", link.parent))
    done, log = quick(link)
    assert done.returncode == 0, done.stderr
    assert len(log) == 10 and all(line.startswith(f"no rank  {quick.folder} {ROOT}/") for line in log)
    assert "--model ckpt " in log[0] and any("--data t.jsonl --out run/rollouts/t.pt" in line for line in log)
    assert (quick.folder / "run/cropi/phase-1").is_dir()
    (quick.folder / "my.sh").write_text("ALPHA=0.23\n")
    (link.parent / "my.sh").write_text("ALPHA=0.24\n")
    path = f"{link.parent}:{os.environ['PATH']}"  # where bash looks for a plain name first
    for preset, expected in (("my.sh", "--alpha 0.23"), (str(link.parent / "my.sh"), "--alpha 0.24"),
                             ("presets/qwen2.5-7b.sh", "--max-new-tokens 4096")):
        done, _ = quick(DRY_RUN="1", PRESET=preset, PATH=path)
        assert done.returncode == 0 and expected in done.stdout
    done, _ = quick(DRY_RUN="1", MODEL="Qwen/Qwen2.5-1.5B-Instruct", SKETCH="check.py")
    assert "--model Qwen/Qwen2.5-1.5B-Instruct " in done.stdout and "python check.py --model" in done.stdout


def test_changed_inputs_are_refused(quick):
    """A file that has another size or another time; in each case the message names that file alone."""
    names = ["ckpt/config.json", "ckpt/model.safetensors", "a.jsonl", "v.jsonl", "t.jsonl", "check.py"]
    assert quick()[0].returncode == 0
    for name in names:
        file = quick.folder / name
        for content, later in (("2\n", 10), ("10\n", 0)):
            times = file.stat()
            file.write_text(content)
            os.utime(file, (times.st_atime, times.st_mtime + later))
            done, log = quick()
            assert refused(done, f"< {name} 2 bytes", f"> {name} {len(content)} bytes", "remove run,")
            assert not log
            assert [other for other in names if f" {other} " in done.stderr] == [name]
            file.write_text("1\n")
            os.utime(file, (times.st_atime, times.st_mtime))
    (quick.folder / "ckpt/generation_config.json").write_text("{}")
    assert refused(quick()[0], "> ckpt/generation_config.json 2 bytes")
    (quick.folder / "ckpt/generation_config.json").unlink()
    done, log = quick()
    assert done.returncode == 0 and len(log) == 1 and "/plot.py run/cropi --out run" in log[0]
    shutil.rmtree(quick.folder / "run/rollouts")  # what was made from these rollouts is not used with others
    assert refused(quick(K="4")[0], "run/cropi/settings.txt", "K=4")


def test_rank_left_in_the_environment_reaches_no_stage(quick):
    left = {"RANK": "1", "WORLD_SIZE": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    done, log = quick(**left)
    assert done.returncode == 0 and len(log) == 10 and all(line.startswith("no rank  /") for line in log)


@pytest.mark.skipif(not shutil.which("prlimit"), reason="needs prlimit of util-linux")
def test_full_disk_ends_the_loop_in_one_line(quick):
    """No byte, or a few, can be written: at the start, or after the given stage. The rerun ends the run."""
    for limit in (0, 7):
        for full in range(7):
            shutil.rmtree(quick.folder / "run", ignore_errors=True)
            if full == 0:
                done, _ = quick(limit=limit, PHASES="1")
            else:
                done, _ = quick(FULL=str(full), LIMIT=str(limit), PHASES="1")
            assert refused(done, "could not be written"), (limit, full, done.stderr)
            done, _ = quick(PHASES="1")
            assert done.returncode == 0, (limit, full, done.stderr)
            for folder, stages in (("rollouts", 3), ("cropi", 3)):
                rows = (quick.folder / "run" / folder / "seconds.tsv").read_text().splitlines()
                assert len(rows) == stages and all(float(row.split("\t")[1]) >= 0 for row in rows)
                assert "SEED=0\n" in (quick.folder / "run" / folder / "settings.txt").read_text()
    (quick.folder / "file").write_text("")
    assert refused(quick(RUN="file/run")[0], "file/run/rollouts: could not be written")
    (quick.folder / "other/commands.txt").mkdir(parents=True)
    assert refused(quick(RUN="other")[0], "other/commands.txt: could not be written")


def test_knobs_are_checked_at_the_start(quick):
    for name, values in {"GROUP": ("staff", "1", "8.0"), "K": ("0", "-1", "08", "a[0]"), "SEED": ("-1", "x"),
                         "BATCH_TOKENS": ("many",), "LR": ("1e", "-1"), "TRAIN_TEMPERATURE": ("0", "nan"),
                         "KEEP": ("1.1", "1/2"), "ALPHA": ("0", "1/0", "10%", "2"), "RHO_MAX": ("0", "Inf"),
                         "CANDIDATES": ("0.05", "1.5"), "NPROC": ("gpu",), "DYNAMIC": ("0", "yes", "01"),
                         }.items():
        for value in values:
            done, log = quick(**{name: value})
            assert refused(done, f"{name}: found {value}; expected ") and not log, (name, value, done.stderr)
    for name, value in (("ALPHA", "1/3"), ("CANDIDATES", "1/3"), ("LR", "1.e-6"), ("RHO_MAX", "inf"),
                        ("RHO_MAX", "2"), ("EVAL_TEMPERATURE", "0"), ("SEED", "0"), ("KV_TOKENS", ""),
                        ("DYNAMIC", ""), ("DYNAMIC", "1")):
        assert quick(DRY_RUN="1", **{name: value})[0].returncode == 0, (name, value)
    for name, value, words in (("VAL", " ", "VAL is not"), ("TRAIN", "\n", "TRAIN or VAL"),
                               ("VAL", "v.jsonl", "found v.jsonl"), ("TEST", "=t.jsonl", "found =t.jsonl"),
                               ("TEST", "a/b=t.jsonl", "found a/b=t.jsonl"), ("TEST", "t=", "found t="),
                               ("METHOD", " ", "METHOD")):
        done, log = quick(**{name: value})
        assert refused(done, words) and not log, (name, value, done.stderr)
    assert refused(quick(DRY_RUN="1", SKETCH="none.py")[0], "SKETCH none.py")
    done, _ = quick(DRY_RUN="1", TEST=" ")
    assert done.returncode == 0 and "--k 0" not in done.stdout


def test_plot_prints_what_stdout_cannot_show(micro_run, tmp_path):
    for name in ("rollouts", "cropi"):
        shutil.copytree(micro_run[0] / name, tmp_path / name)
    rollouts = torch.load(tmp_path / "rollouts/train.pt", weights_only=True)
    rollouts["answers"] = ["\u221a2"] * len(rollouts["answers"])
    torch.save(rollouts, tmp_path / "rollouts/train.pt")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for more in ({"PYTHONIOENCODING": "ascii"}, locale):
        done = subprocess.run([sys.executable, ROOT / "plot.py", tmp_path / "cropi", "--out", tmp_path],
                              capture_output=True, text=True, env={**os.environ, **more})
        assert done.returncode == 0 and "(answer \\u221a2)" in done.stdout, done.stderr


def test_economical_selection_and_dapo_in_the_loop(micro_run, world, tmp_path):
    """DAPO leaves groups of equal rewards out. CROPI sketches all in phase 0, in phase 1 mostly what scored
    best then; a stopped run ends with the same bytes.
    """
    shutil.copytree(micro_run[0] / "rollouts", tmp_path / "rollouts")
    knobs = {"METHOD": "cropi", "BASELINE": "dapo", "RESPONSES": "2", "CANDIDATES": "1/2", "MOMENTUM": "0.5",
             "EVAL_TEMPERATURE": "0", "BATCH": "8"}
    run_loop(tmp_path, world, **knobs)
    files = [tmp_path / f"dapo/phase-{m}/policy/metrics.jsonl" for m in (0, 1)]
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    steps = [row for row in rows if row["step"] > 0]
    assert len(steps) == 6 and any(row["rounds"] > 1 for row in steps)
    assert max(row["groups"] for row in steps) == 8  # fewer where all rounds leave equal rewards
    assert all(result["mean"] == result["greedy"] for row in rows for result in row.get("eval", {}).values())

    folder = tmp_path / "cropi"
    first, second = (np.load(folder / f"phase-{m}/scores.npy") for m in (0, 1))
    sketched = [np.load(folder / f"phase-{m}/train.npy").any(1) for m in (0, 1)]
    assert [of.sum() for of in sketched] == [61, 30]
    assert (np.isfinite(second).any(1) == sketched[0]).all()
    kept = sketched[0] & ~sketched[1]
    assert np.array_equal(first[kept], second[kept])
    ranks = (-first).argsort(0, kind="stable").argsort(0).min(1)
    assert sketched[1][ranks.argsort(kind="stable")[:24]].all()  # four fifths of 30
    for m in (0, 1):
        sidecar = json.loads((folder / f"phase-{m}/train.json").read_text())
        assert sidecar["responses"] == 2 and sidecar["candidates"] == (61, 30)[m]
        selected = np.load(folder / f"phase-{m}/selected.npy")
        assert len(selected) <= 24 and sketched[m][selected].all()
    before = {path.name: path.read_bytes() for path in (folder / "phase-1").glob("*.npy")}
    rows = (folder / "seconds.tsv").read_text().splitlines()
    (folder / "seconds.tsv").write_text("".join(row + "\n" for row in rows if "phase-1" not in row))
    for name in before:
        (folder / "phase-1" / name).unlink()
    run_loop(tmp_path, world, **knobs)
    assert before == {path.name: path.read_bytes() for path in (folder / "phase-1").glob("*.npy")}


def test_preset_sets_what_the_environment_does_not(tmp_path):
    """The model does not exist: collect.py reports that after the settings have been written."""
    def loop(preset, **environment):
        settings = {"PRESET": preset, "MODEL": str(tmp_path / "none"), "K": "4", "HF_HUB_OFFLINE": "1",
                    "RUN": str(tmp_path), "PYTHON": sys.executable, "ENGINE": "hf", **environment}
        return subprocess.run(["bash", ROOT / "run_cropi.sh"], capture_output=True, text=True,
                              env={**os.environ, **settings})

    done = loop("presets/qwen2.5-1.5b.sh")
    assert done.returncode == 2 and "collect.py: error: " in done.stderr and done.stderr.count("\n") == 1
    command, = (tmp_path / "commands.txt").read_text().splitlines()
    assert "--k 0 " in command and r"--instruction \ Please\ reason\ step" in command
    lines = (tmp_path / "rollouts/settings.txt").read_text().splitlines()
    found = dict(line.split("=", 1) for line in lines)
    assert found["K"] == "4" and found["K_VAL"] == "32"
    assert found["TEMPERATURE"] == "0.5" and found["DTYPE"] == "bfloat16"
    assert len(found["TRAIN"].split()) == 3 and found["INSTRUCTION"].endswith("within \\boxed{}.")
    assert found["ENGINE"] == "hf"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    gpu = loop("presets/qwen2.5-1.5b.sh", ENGINE="", PATH=f"{tmp_path}:{os.environ['PATH']}",
               RUN=str(tmp_path / "gpu"))
    assert gpu.returncode == 2 and "ENGINE=vllm" in (tmp_path / "gpu/rollouts/settings.txt").read_text()
    first = gpu.stdout.splitlines()[0]
    assert first.startswith("ENGINE=vllm is the default") and first.endswith("ENGINE=hf")
    assert "is the default on a GPU" not in done.stdout
    missing = loop("presets/none.sh")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    assert "presets/qwen2.5-1.5b.sh" in missing.stderr


def test_loop_of_two_processes_selects_the_same(micro_run, world, tmp_path):
    """NPROC=2: rollouts, sketches and selection equal those of one rank byte for byte; training runs."""
    run = tmp_path / "run"
    run_loop(run, world, NPROC="2", BASELINE="", PHASES="1", STEPS="1")
    for name in ("rollouts/train.pt", "rollouts/val_sort.pt", "cropi/phase-0/train.npy",
                 "cropi/phase-0/selected.npy"):
        assert (run / name).read_bytes() == (micro_run[0] / name).read_bytes()
    assert (run / "cropi/phase-0/policy/model.safetensors").exists()


def test_second_loop_in_one_folder_refuses(micro_run, world):
    run = micro_run[0]
    before = sorted(path.name for path in (run / "cropi").iterdir())
    with open(run / "cropi/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(["bash", ROOT / "run_cropi.sh"], capture_output=True, text=True,
                              env={**os.environ, **MICRO, "TOY": str(world), "RUN": str(run)})
    assert done.returncode == 2 and "another run_cropi.sh" in done.stderr
    assert sorted(path.name for path in (run / "cropi").iterdir()) == before


def test_methods_side_by_side_collect_once(world, tmp_path):
    """Two methods started at once in one RUN: each stage of the collection runs once, both methods end."""
    settings = {**os.environ, **MICRO, "TOY": str(world), "RUN": str(tmp_path), "BASELINE": "", "PHASES": "1",
                "STEPS": "1"}
    runs = [subprocess.Popen(["bash", ROOT / "run_cropi.sh"], env={**settings, "METHOD": method},
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for method in ("random", "passrate")]
    assert [run.wait() for run in runs] == [0, 0]
    stages = [line.split("\t")[0] for line in (tmp_path / "rollouts/seconds.tsv").read_text().splitlines()]
    assert stages == ["test", "val", "train"]
    for method in ("random", "passrate"):
        assert (tmp_path / method / "phase-0/policy/model.safetensors").exists()


def commands(run, world, out):
    """{stage: (arguments, {output: the loop's file})}: phase 1 of cropi, with outputs in `out`."""
    phase, rollouts = run / "cropi/phase-1", run / "rollouts"
    policy_files = ("model.safetensors", "config.json", "tokenizer.json", "optimizer.pt", "metrics.jsonl")
    return {
        "collect": (["collect.py", "--model", world / "base", "--data", world / "train.jsonl",
                     "--out", out / "train.pt", "--k", 6, "--verifier", "exact", "--max-new-tokens", 10],
                    {out / "train.pt": rollouts / "train.pt"}),
        "sketch": (["sketch.py", "--model", run / "cropi/phase-0/policy", "--rollouts", rollouts / "train.pt",
                    rollouts / "val_sort.pt", "--out", out / "train.npy", out / "val.npy", "--dim", 256,
                    "--batch-tokens", 128],
                   {out / "train.npy": phase / "train.npy", out / "val.npy": phase / "val_sort.npy",
                    out / "train.json": phase / "train.json"}),
        "score": (["score.py", "--train", phase / "train.npy", "--val", phase / "val_sort.npy",
                   phase / "val_dbl.npy", "--rollouts", rollouts / "train.pt", "--out", out / "selected.npy",
                   "--alpha", "0.2"],
                  {out / "selected.npy": phase / "selected.npy", out / "scores.npy": phase / "scores.npy"}),
        "train_grpo": (["train_grpo.py", "--model", run / "cropi/phase-0/policy", "--ref", world / "base",
                        "--rollouts", rollouts / "train.pt", "--select", phase / "selected.npy",
                        "--eval", rollouts / "targeted.pt", rollouts / "related.pt", rollouts / "other.pt",
                        "--optimizer", run / "cropi/phase-0/policy/optimizer.pt", "--out", out / "policy",
                        "--steps", 3, "--batch-size", 4, "--group", 4, "--lr", "1e-3", "--eval-every", 2,
                        "--eval-samples", 2, "--save-every", 1, "--batch-tokens", 128],
                       {out / "policy" / name: phase / "policy" / name for name in policy_files})}


@pytest.mark.parametrize("stage", ["collect", "sketch", "score", "train_grpo"])
def test_killed_stage_ends_with_the_same_bytes(micro_run, world, tmp_path, stage):
    """The stage is stopped by SIGKILL in two attempts and then runs to its end."""
    arguments, files = commands(micro_run[0], world, tmp_path)[stage]
    command = [sys.executable, ROOT / arguments[0], *map(str, arguments[1:])]
    began = time.monotonic()
    reached = {"train_grpo": "policy.part/checkpoint.pt", "sketch": "train.npy.*.parts/2.pt"}.get(stage)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if reached:  # the first kill comes after some work is saved
        while not list(tmp_path.glob(reached)):
            assert process.poll() is None
            time.sleep(0.01)
    else:
        time.sleep(1.5)
    process.kill()
    process.wait()
    elapsed = time.monotonic() - began
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(1.1 * elapsed)
    process.kill()
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for made, undisturbed in files.items():
        assert without_seconds(made) == without_seconds(undisturbed), made.name
    assert not list(tmp_path.rglob("*.part*"))
