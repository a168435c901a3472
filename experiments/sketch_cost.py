"""What selection costs: sketch.py and score.py against the least that their work can take, on this machine.

floor      one plain forward and backward pass over the same live trajectories, a row each, gradients accumulated into .grad
           and nothing else, in the best of several batch sizes. sketch.py's time is all that it does but load the model and
           draw the projection: comparison with plain autograd, gradients, projecting, files. In turns, in one process; the
           ratio of each round.
           `shared floor`: the same with each prompt read once for its K responses, as sketch.py does.
dense      TRAK's CPU projector (traker's BasicProjector) on the same kept coordinates of 8 gradients: 64 of its dim output
           dimensions are timed, the random matrix made anew block by block as it must be, and EXTRAPOLATED to dim.
memory     peak resident megabytes of `python sketch.py` (the kernel's count) on N and 10 N prompts.
score      score.py's pass over 20,000 x 32768 sketches with 6 validation sets of 100, against one np.dot of the same memmap
           with a [32768, 6] matrix: speed relative to np.dot, and the peak memory of `python score.py`.

    python experiments/sketch_cost.py                                   after run_cropi.sh (toy) and experiments/smollm2.py

Prints a table and writes experiments/results/sketch_cost.json. Parts whose inputs are absent are null, with the reason.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import score
import sketch
import train_grpo


def subset(source, out, prompts):
    """rollouts.pt of some of the prompts of another."""
    rollouts = sketch.load_rollouts(source)
    k = rollouts["meta"]["k"]
    rows = [i * k + j for i in prompts for j in range(k)]
    flat, offsets = {}, {}
    for name, chosen in (("prompts", prompts), ("responses", rows), ("logprobs", rows)):
        pieces = [rollouts[name][i] for i in chosen]
        flat[name], offsets[name] = torch.cat(pieces), torch.tensor([0, *map(len, pieces)]).cumsum(0)
    torch.save({"prompt_tokens": flat["prompts"], "prompt_offsets": offsets["prompts"], "response_tokens": flat["responses"],
                "response_offsets": offsets["responses"], "logprobs": flat["logprobs"], "rewards": rollouts["rewards"][prompts],
                "answers": [rollouts["answers"][i] for i in prompts], "families": [rollouts["families"][i] for i in prompts],
                "meta": rollouts["meta"]}, out)
    return out


def live_prompts(path):
    return (sketch.load_rollouts(path)["rewards"].std(1) > 0).nonzero()[:, 0].tolist()


def floor(policy, path, batch_tokens, shared):
    """Seconds of a plain forward and backward pass over the live trajectories of a rollouts.pt."""
    rollouts = sketch.load_rollouts(path)
    prompts, responses, k = rollouts["prompts"], rollouts["responses"], rollouts["meta"]["k"]
    longest = rollouts["response_offsets"].diff().view(-1, k).amax(1).tolist()
    sizes = {i: (len(prompts[i]), longest[i]) if shared else (0, len(prompts[i]) + longest[i]) for i in live_prompts(path)}
    advantages = sketch.group_advantage(rollouts["rewards"])
    policy.requires_grad_(True)
    policy.zero_grad(set_to_none=False)
    began = time.perf_counter()
    for batch, at_once, _ in sketch.plan_batches(sizes, k, batch_tokens, True):
        for first in range(0, k, at_once):
            rows = [(i, i * k + j) for i in batch for j in range(first, min(first + at_once, k))]
            texts = [responses[row] for _, row in rows]
            found = sketch.group_hidden(policy, [prompts[i] for i in batch], texts) if shared else \
                train_grpo.response_hidden(policy, [prompts[i] for i, _ in rows], texts)
            logp, mask = sketch.token_logprobs(policy, *found, 1.0), found[-1]
            beta = torch.zeros_like(logp).masked_scatter_(mask, torch.cat([rollouts["logprobs"][row] for _, row in rows]))
            sketch.off_policy_surrogate(logp, beta, advantages.flatten()[[row for _, row in rows]], mask, k).backward()
    return time.perf_counter() - began


def sketching(policy, path, dim, drop, batch_tokens, folder):
    """Seconds of sketch.py's work at a loaded policy, and its bytes on disk among them."""
    began = time.perf_counter()
    sketcher = sketch.make_sketcher(policy, projection(dim, drop))
    assert sketcher.fast
    identity = {"format": sketch.FORMAT, "policy": "", "seed": 0, "keep": 0.1, "dim": dim, "drop": drop, "projection": "sjlt"}
    sketch.sketch_file(sketcher, path, folder / f"{drop}.npy", identity, batch_tokens)
    sketcher.close()
    seconds = time.perf_counter() - began
    shutil.rmtree(sketch.parts_of(folder / f"{drop}.npy"))  # nothing for the next round to go on from
    return seconds


PARTS = ["score", "memory", "toy", "smollm2", "dense"]
PROJECTIONS = {}


def projection(dim, drop):
    """One projection for all rounds: drawing it, once a process, is not in the ratios."""
    return PROJECTIONS.setdefault((dim, drop), sketch.Projection(0, 0.1, dim, "sjlt", drop, "cpu"))


def floor_ratios(policy, path, dim, batches, batch_tokens, rounds, folder):
    seconds = {f"floor, {b} tokens": [floor(policy, path, b, False)] for b in batches}  # also warms up
    best = min(batches, key=lambda b: seconds[f"floor, {b} tokens"][0])
    best_shared = min(batches, key=lambda b: floor(policy, path, b, True))
    found = {"floor": [], "shared floor": [], "sketch": [], "sketch, rows": []}
    for drop in ("coordinates", "rows"):
        sketching(policy, path, dim, drop, batch_tokens, folder)
    for _ in range(rounds):
        found["floor"].append(floor(policy, path, best, False))
        found["sketch"].append(sketching(policy, path, dim, "coordinates", batch_tokens, folder))
        found["shared floor"].append(floor(policy, path, best_shared, True))
        found["sketch, rows"].append(sketching(policy, path, dim, "rows", batch_tokens, folder))
    ratio = lambda over, under: spread([a / b for a, b in zip(found[over], found[under])])  # noqa: E731
    rollouts = sketch.load_rollouts(path)
    return {"prompts": len(rollouts["prompts"]), "live": len(live_prompts(path)), "dim": dim, "batch_tokens": batch_tokens,
            "floor_batch_tokens": best, "shared_floor_batch_tokens": best_shared, "seconds": found,
            "sketch / floor": ratio("sketch", "floor"), "sketch with rows / floor": ratio("sketch, rows", "floor"),
            "sketch / shared floor": ratio("sketch", "shared floor"),
            "sketch with rows / shared floor": ratio("sketch, rows", "shared floor")}


def spread(values):
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def dense_speedup(policy, dim, gradients=8, timed=64):
    """Seconds a gradient of TRAK's projector (extrapolated) and of ours, on the kept coordinates of the whole model."""
    from trak.projectors import BasicProjector

    ours = projection(dim, "coordinates")
    shapes = {name: parameter.shape for name, parameter in policy.named_parameters()}
    kept = sum(len(ours.draw(name, shape)[1]) for name, shape in shapes.items())
    gradient = {name: torch.randn(1, *shape) for name, shape in shapes.items()}
    times = []
    for _ in range(4):  # the first warms up
        began, sums = time.perf_counter(), ours.zeros(1)
        for name, shape in shapes.items():
            ours.add(name, shape, gradient[name], sums)
        ours.sketches(sums)
        times.append(time.perf_counter() - began)
    batch = torch.randn(gradients, kept)
    peer = BasicProjector(kept, timed, 0, "rademacher", "cpu", block_size=timed // 4)
    began = time.perf_counter()
    peer.project(batch, 0)
    whole = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(4):
        batch @ peer.proj_matrix
    product = time.perf_counter() - began
    scale = dim / timed / gradients
    mine = statistics.median(times[1:])
    return {"kept": kept, "gradients": gradients, "timed_dimensions": timed, "extrapolated_to": dim,
            "ours_seconds_a_gradient": mine,
            "trak_seconds_a_gradient": whole * scale, "speedup": round(whole * scale / mine),
            "trak_product_alone_seconds_a_gradient": product * scale,
            "speedup_over_product_alone": round(product * scale / mine)}


def peak_mb(*arguments):
    """Peak resident megabytes of a script's process, started from a small one: the kernel counts what stood before exec."""
    small = ("import os, subprocess, sys; process = subprocess.Popen(sys.argv[1:], stdout=2); "
             "_, status, usage = os.wait4(process.pid, 0); print(status, usage.ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", small, sys.executable, *map(str, arguments)], capture_output=True, text=True)
    status, kilobytes = map(int, done.stdout.split())
    assert status == 0, done.stderr
    return round(kilobytes / 1024)


def score_speed(folder, n=20000, dim=32768, sets=6, rounds=5):
    rng, names = np.random.default_rng(0), [f"v{v}" for v in range(sets)]
    sidecar = {"format": 1, "policy": "", "seed": 0, "keep": 0.1, "dim": dim, "drop": "coordinates", "projection": "sjlt"}
    for name, rows in (("train", n), *((name, 100) for name in names)):
        array = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=(rows, dim))
        for start in range(0, rows, 500):
            array[start:start + 500] = rng.standard_normal(array[start:start + 500].shape, dtype=np.float32)
        del array
        (folder / f"{name}.json").write_text(json.dumps({**sidecar, "prompts": rows}))
    train, val = folder / "train.npy", [folder / f"{name}.npy" for name in names]
    means, dots, scores = rng.standard_normal((sets, dim), dtype=np.float32), [], []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        np.dot(np.load(train, mmap_mode="r"), means.T)
        dots.append(time.perf_counter() - began)
        began = time.perf_counter()
        score.influence(train, val)
        scores.append(time.perf_counter() - began)
    return {"speed_relative_to_dot": spread([d / s for d, s in zip(dots[1:], scores[1:])]), "dot_seconds": dots[1:],
            "score_seconds": scores[1:], "peak_mb": peak_mb(ROOT / "score.py", "--train", train, "--val", *val, "--out",
                                                            folder / "selected.npy")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy-model", type=Path, default=ROOT / "runs/toy-world/base")
    parser.add_argument("--toy-rollouts", type=Path, default=ROOT / "runs/toy/rollouts/train.pt")
    parser.add_argument("--smollm2", type=Path, default=ROOT / "runs/smollm2", help="folder of experiments/smollm2.py")
    parser.add_argument("--rounds", type=int, default=5, help="of the toy (5); SmolLM2 has 3")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure anew (everything)")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/sketch_cost.json")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results |= {"torch": torch.__version__, "numpy": np.__version__,
                "transformers": transformers.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    smollm2 = args.smollm2 / "train.pt"
    absent = None if smollm2.exists() else f"no {smollm2}: experiments/smollm2.py makes it from PyPI packages"
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        folder = Path(folder)
        few = None if absent else subset(smollm2, folder / "few.pt", live_prompts(smollm2)[::6][:8])
        for part in args.parts:
            results.setdefault("commands", {})[part] = " ".join(["python experiments/sketch_cost.py", *sys.argv[1:]])
            if part == "score":
                results["score"] = score_speed(folder)
                results["score_vs_dot"] = results["score"]["speed_relative_to_dot"]["median"]
            elif part == "memory":
                n = len(sketch.load_rollouts(args.toy_rollouts)["prompts"])
                tenth = subset(args.toy_rollouts, folder / "tenth.pt", list(range(0, n, 10)))
                runs = {"peak_mb_n": (args.toy_model, tenth), "peak_mb_10n": (args.toy_model, args.toy_rollouts)}
                if not absent:
                    runs["peak_mb_smollm2"] = args.smollm2 / "base", few
                    total = sum(p.numel() for p in sketch.load_policy(args.smollm2 / "base", "cpu", "float32").parameters())
                    limit = (4 + 4 + 8 * 0.1) * total / 2**20 + 1024  # model, one gradient, kept indices, 1 GiB
                    results["limit_mb_smollm2"] = round(limit)
                for key, (model, rollouts) in runs.items():
                    results[key] = peak_mb(ROOT / "sketch.py", "--model", model, "--rollouts", rollouts, "--out",
                                           folder / "memory.npy")
                results["memory"] = {"n": len(range(0, n, 10)), "10n": n}
            elif part == "toy":
                policy = sketch.load_policy(args.toy_model, "cpu", "float32")
                batches = (1024, 2048, 4096, 8192)
                results["toy"] = floor_ratios(policy, args.toy_rollouts, 8192, batches, 2048, args.rounds, folder)
                results["floor_ratio_toy"] = results["toy"]["sketch / floor"]["median"]
            elif absent:
                results |= {part: absent, {"smollm2": "floor_ratio_smollm2", "dense": "dense_speedup_smollm2"}[part]: None}
            elif part == "smollm2":
                policy = sketch.load_policy(args.smollm2 / "base", "cpu", "float32")
                results["smollm2"] = floor_ratios(policy, few, 32768, (256, 512, 1024), 512, 3, folder)
                results["floor_ratio_smollm2"] = results["smollm2"]["sketch / floor"]["median"]
            else:
                policy = sketch.load_policy(args.smollm2 / "base", "cpu", "float32")
                try:
                    results["dense"] = dense_speedup(policy, 32768)
                    results["dense_speedup_smollm2"] = results["dense"]["speedup"]
                except ImportError as error:
                    results |= {"dense": f"traker is not installed ({error})", "dense_speedup_smollm2": None}
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    for key, value in results.items():
        if isinstance(value, (int, float)):
            print(f"{key:24}{value}")
    for world in ("toy", "smollm2"):
        for key, value in results[world].items() if isinstance(results.get(world), dict) else ():
            if " / " in key:
                print(f"{world:9}{key:34}{value['median']:6.3f}  ({value['min']:.3f} to {value['max']:.3f})")


if __name__ == "__main__":
    main()
