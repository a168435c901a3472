"""Speed and precision of folded.py's sketches beside sketch.py's, and the speed of other libraries.

speed      response tokens per second of CPU time, one thread, without loading the model and drawing the maps.
           The methods take turns in each round; ratios to sketch.py are formed in each round.
           folded, sketch.py   gradients and sketches of the prompts, as their main loops make them
           autograd            sketch_prompt: plain autograd, one prompt after the other
           pass A, pass B      one forward and backward pass over all rows and nothing else, from
                               sketch_cost.py: A reads a prompt with each response, B once for its K responses
           opacus, bergson, dattri-llm                         folded_peers.py
precision  over projection seeds: error of cosines (root mean square) and overlap of the top 10%. Toy: cosines
           of 300 train prompts with the two validation means, at the base policy and after the last phase.
           SmolLM2: cosines between all pairs of six prompts, no overlap.
           blocks              folded.py with a place of its own for each weight's block, in the same dim
                               numbers, so that the blocks are smaller

    python experiments/folded_compare.py            after run_cropi.sh (toy) and experiments/smollm2.sh

Writes experiments/results/folded.json. A library that is not installed or fails is named with the reason.
"""

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import folded
import folded_peers
import sketch
import sketch_cost
import sparse_ratio

RUNS = ROOT / "runs"
TOY = RUNS / "toy/rollouts/train.pt"
SMOLLM2 = RUNS / "smollm2/seed-0/rollouts/train.pt"


class Blocks(folded.Folded):
    """Each weight's block has its own places in the sketch; self.p is chosen for that."""

    def __init__(self, policy, seed, dim):
        super().__init__(seed, 0.1, dim, "cpu")
        weights = [name for name, parameter in policy.named_parameters() if parameter.dim() == 2]
        self.p = int((dim / len(weights)) ** 0.5)
        self.starts = {name: number * self.p**2 for number, name in enumerate(weights)}

    def draw_hash(self, name):
        return self.starts[name] + torch.arange(self.p**2)


def sketching(factors, sketcher, policy, projection, path, batch_tokens):
    """Sketches all prompts of a file, as sketch.sketch_file does."""
    sketch.layer_gradients = factors
    rollouts = sketch.load_rollouts(path)
    advantages = sketch.group_advantage(rollouts["rewards"])
    ks = range(rollouts["meta"]["k"])
    sizes = sketch.prompt_sizes(rollouts, {i: ks for i in range(len(advantages))})
    for prompts, n in sketch.plan_batches(sizes, len(ks), batch_tokens):
        for first in range(0, len(ks), n):
            part = slice(first, first + n)
            batch = [sketch.select_trajectories(rollouts, i, ks[part], advantages[i, part]) for i in prompts]
            sketcher(policy, projection, batch)


def cpu_seconds(work):
    began = time.process_time()
    work()
    return time.process_time() - began


def speed(policy, path, dim, batch_tokens, rounds):
    """Tokens per CPU second of every method, and their ratios to sketch.py, over rounds."""
    exact = sketch.Projection(0, 0.1, dim, "cpu")
    short = folded.Folded(0, 0.1, dim, "cpu")
    several = sketch.sketch_prompts
    methods = {"folded": partial(sketching, folded.layer_factors, several, policy, short),
               "sketch.py": partial(sketching, folded.EXACT, several, policy, exact),
               "autograd": partial(sketching, folded.EXACT, sketch.sketch_one_by_one, policy, exact),
               "pass A": lambda *rest: sketch_cost.floor(policy, *rest, False),
               "pass B": lambda *rest: sketch_cost.floor(policy, *rest, True)}
    for name, peer in folded_peers.PEERS.items():
        methods[name] = partial(peer, policy, exact)
    tokens = len(sketch.load_rollouts(path)["response_tokens"])
    rates, failed = {name: [] for name in methods}, {}
    for round_number in range(rounds + 1):  # the first warms up: maps are drawn, memory is taken
        first = round_number % len(methods)  # another method begins in each round
        for name in [*methods][first:] + [*methods][:first]:
            if name in failed:
                continue
            try:
                seconds = cpu_seconds(partial(methods[name], path, batch_tokens))
                if round_number > 0:
                    rates[name].append(tokens / seconds)
            except Exception as error:  # a library may raise anything
                failed[name] = " ".join(repr(error).split())[:300]
            policy.zero_grad(set_to_none=True)
    rates = {name: values for name, values in rates.items() if values}
    ratios = {name: sketch_cost.spread([a / b for a, b in zip(values, rates["sketch.py"])])
              for name, values in rates.items()}
    return {"tokens": tokens, "dim": dim, "batch_tokens": batch_tokens, "rounds": rounds,
            "tokens_per_cpu_second": {name: sketch_cost.spread(values) for name, values in rates.items()},
            "ratio_to_sketch.py": ratios, "failed": failed}


def projections(policy, seeds, dim, keeps):
    """{(kind, seed): projection}"""
    found = {}
    for seed in range(seeds):
        for keep in keeps:
            found[f"sketch.py, keep {keep}", seed] = sketch.Projection(seed, keep, dim, "cpu")
        found["folded", seed] = folded.Folded(seed, 0.1, dim, "cpu")
        found["blocks", seed] = Blocks(policy, seed, dim)
    return found


def project(found, gradient):
    """{(kind, seed): sketch [dim]} of one gradient {name: float32}."""
    sketches = {}
    for cell, projection in found.items():
        sums = projection.zeros(1)
        for name, part in gradient.items():
            projection.add(name, part[None], sums)
        sketches[cell] = projection.sketches(sums)[0]
    return sketches


def gradients(policy, path, prompts):
    rollouts = sketch.load_rollouts(path)
    advantages = sketch.group_advantage(rollouts["rewards"])
    for i in prompts:
        ks = range(rollouts["meta"]["k"])
        yield sketch.prompt_gradient(policy, sketch.select_trajectories(rollouts, i, ks, advantages[i]))[0]


def flat(gradient):
    return torch.cat([part.flatten() for part in gradient.values()])


def precision(policy, found, sets, train_path, prompts):
    """Errors of cosines with the sets' mean gradients, or, without sets, of those between the prompts."""
    names = [name for name, _ in policy.named_parameters()]
    targets = []  # gradients {name: float32} to compare with
    for path, of_set in sets:
        mean = dict.fromkeys(names, 0)
        for gradient in gradients(policy, path, of_set):
            mean = {name: mean[name] + gradient[name] / len(of_set) for name in names}
        targets.append(mean)
    pairs = not targets
    if pairs:
        targets = list(gradients(policy, train_path, prompts))
    flats = [flat(target) for target in targets]
    sketched = [project(found, target) for target in targets]
    exact, cosines = [], {cell: [] for cell in found}
    cosine = partial(torch.cosine_similarity, dim=0)
    for place, gradient in enumerate(gradients(policy, train_path, prompts)):
        first = place + 1 if pairs else 0
        own, whole = project(found, gradient), flat(gradient)
        exact.append([float(cosine(whole, other)) for other in flats[first:]])
        for cell in found:
            cosines[cell].append([float(cosine(own[cell], other[cell])) for other in sketched[first:]])
    errors, overlaps = {}, {}
    for (kind, _), values in cosines.items():
        differences = torch.tensor(sum(values, [])) - torch.tensor(sum(exact, []))
        errors.setdefault(kind, []).append(float(differences.square().mean().sqrt()))
        if not pairs:
            overlap, _ = sparse_ratio.agreement(torch.tensor(values), torch.tensor(exact))
            overlaps.setdefault(kind, []).append(overlap)
    result = {"prompts": len(prompts), "error_of_cosines": {}, "top_10_percent_overlap": {}}
    for kind, values in errors.items():
        result["error_of_cosines"][kind] = sketch_cost.spread(values)
    for kind, values in overlaps.items():
        result["top_10_percent_overlap"][kind] = sketch_cost.spread(values)
    return result


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--parts", nargs="+", default=["toy", "few", "long", "precision"], help="(all)")
    parser.add_argument("--rounds", type=int, default=8, help="of the toy (8); SmolLM2 has 2")
    parser.add_argument("--seeds", type=int, default=5, help="of the projections (5)")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/folded.json")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results |= {"torch": torch.__version__, "transformers": transformers.__version__,
                "threads": torch.get_num_threads(), "p": folded.Folded.p, "keep": 0.1,
                "peers": folded_peers.versions()}
    load = partial(sketch.load_policy, device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for part in args.parts:
            command = " ".join(["python experiments/folded_compare.py", *sys.argv[1:]])
            results.setdefault("commands", {})[part] = command
            if part == "toy":
                few = sketch_cost.subset(TOY, folder / "toy.pt", sketch_cost.prompts_with_variance(TOY)[::32])
                results[part] = speed(load(RUNS / "toy/world/base"), few, 8192, 512, args.rounds)
            elif part == "few":
                prompts = sketch_cost.prompts_with_variance(SMOLLM2)[:3]
                few = sketch_cost.subset(SMOLLM2, folder / "few.pt", prompts)
                results[part] = speed(load(RUNS / "smollm2/base"), few, 32768, 512, 2)
            elif part == "long":
                policy = load(RUNS / "smollm2/base")
                both = sketch_cost.long_rollouts(policy, SMOLLM2, folder / "both.pt", 150)
                one = sketch_cost.subset(both, folder / "long.pt", [0])
                results[part] = speed(policy, one, 32768, 2560, 2)
            else:
                results[part] = {}
                prompts = sparse_ratio.prompts_with_variance(TOY, 300)
                paths = [TOY.with_name(f"val_{name}.pt") for name in ("sort", "dbl")]
                sets = [(path, sparse_ratio.prompts_with_variance(path, 300)) for path in paths]
                for name, model in (("toy, base", "world/base"), ("toy, trained", "cropi/phase-2/policy")):
                    policy = load(RUNS / "toy" / model)
                    found = projections(policy, args.seeds, 8192, (0.1, 1.0))
                    results[part][name] = {"dim": 8192, "seeds": args.seeds,
                                           **precision(policy, found, sets, TOY, prompts)}
                policy = load(RUNS / "smollm2/base")
                found = projections(policy, args.seeds, 32768, (0.1,))
                prompts = sketch_cost.prompts_with_variance(SMOLLM2)[:6]
                results[part]["smollm2"] = {"dim": 32768, "seeds": args.seeds,
                                            **precision(policy, found, [], SMOLLM2, prompts)}
            args.out.write_text(json.dumps(results, indent=1) + "\n")
            print(part, json.dumps(results[part], indent=1))


if __name__ == "__main__":
    main()
