"""What selection costs on this machine: sketch.py and score.py against simple lower bounds.

floor      one plain forward and backward pass over the trajectories of all prompts with reward variance: one
           row per trajectory, gradients accumulated into .grad and nothing else, in the best of several batch
           sizes. sketch.py's time is all its work except loading the model and drawing the projection: the
           trial against plain autograd, gradients, projection, files. The two alternate in one process; the
           ratio is computed per round.
           `shared floor`: the same, but each prompt is read once for its K responses, as in sketch.py.
long       the same on SmolLM2 with responses of 300 tokens (sampled without an end token), two prompts. The
           trial against plain autograd, once per run of sketch.py, is left out and reported beside.
economy    CPU seconds of sketch.py's work on train prompts (without trial and projection) with RESPONSES=2
           and CANDIDATES=1/4, relative to all: the toy, and the prompts of `long`, where candidates are left
           out (two prompts). Settings alternate; response tokens are reported beside.
dense      TRAK's CPU projector (traker's BasicProjector) on the same kept coordinates of 8 gradients. 64 of
           its dim output dimensions are timed and EXTRAPOLATED to dim; it generates the random matrix block
           by block every time.
memory     peak resident megabytes of `python sketch.py` (reported by the kernel) for N and 10 N prompts.
score      score.py's pass over 20,000 x 32768 sketches with 6 validation sets of 100 prompts, against one
           np.dot of the same memmap with a [32768, 6] matrix: speed relative to np.dot; and the peak memory
           of `python score.py`.

    python experiments/sketch_cost.py             after run_cropi.sh (toy) and experiments/smollm2.sh

Prints a table and writes experiments/results/sketch_cost.json. Parts with missing inputs are null, with the
reason.
"""

import argparse
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import collect
import score
import sketch

PARTS = ["score", "memory", "toy", "smollm2", "long", "economy", "dense"]


def subset(source, out, prompts):
    """Writes a rollouts.pt with some of the prompts of another one."""
    rollouts = sketch.load_rollouts(source)
    k = rollouts["meta"]["k"]
    rows = [i * k + j for i in prompts for j in range(k)]
    flat, lengths = {}, {}
    for name, chosen in (("prompts", prompts), ("responses", rows), ("logprobs", rows)):
        pieces = [rollouts[name][i] for i in chosen]
        flat[name], lengths[name] = torch.cat(pieces), torch.tensor([len(piece) for piece in pieces])
    torch.save({"prompt_tokens": flat["prompts"], "prompt_lengths": lengths["prompts"],
                "response_tokens": flat["responses"], "response_lengths": lengths["responses"],
                "logprobs": flat["logprobs"], "rewards": rollouts["rewards"][prompts],
                "answers": [rollouts["answers"][i] for i in prompts],
                "families": [rollouts["families"][i] for i in prompts], "meta": rollouts["meta"]}, out)
    return out


def long_rollouts(policy, source, out, tokens=300):
    """Writes a rollouts.pt with two prompts of another one and K = 8 new responses of `tokens` tokens."""
    rollouts = sketch.load_rollouts(source)
    prompts, meta = rollouts["prompts"][:2], rollouts["meta"]
    responses, logprobs = collect.sample(policy, [p.tolist() for p in prompts], 8, meta["temperature"],
                                         tokens, [-1], [0, 1])  # no token ends a response
    torch.save({"prompt_tokens": torch.cat(prompts), "logprobs": torch.tensor(logprobs).flatten(),
                "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts]),
                "response_tokens": torch.tensor(responses, dtype=torch.int32).flatten(),
                "response_lengths": torch.full((16,), tokens), "rewards": torch.tensor([[0.0, 1.0] * 4] * 2),
                "answers": rollouts["answers"][:2], "families": rollouts["families"][:2],
                "meta": {**meta, "k": 8}}, out)
    return out


def prompts_with_variance(path):
    return (sketch.load_rollouts(path)["rewards"].std(1) > 0).nonzero()[:, 0].tolist()


def row_logits(policy, prompts, responses):
    """What response_logits returns, from one ordinary forward pass over rows of a prompt and a response.

    Only the states before response tokens go through the output layer.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    rows = pad([torch.cat([p, r]).long() for p, r in zip(prompts, responses)], batch_first=True)  # [B, T]
    hidden = policy.base_model(rows, use_cache=False)[0]
    steps = torch.arange(max(map(len, responses)))
    places = torch.tensor([len(p) - 1 for p in prompts])[:, None] + steps  # the states before each token
    hidden = hidden[torch.arange(len(rows))[:, None], places.clamp(max=rows.shape[1] - 1)]  # [B, R, H]
    mask = steps < torch.tensor([len(r) for r in responses])[:, None]
    targets = pad([r.long() for r in responses], batch_first=True)
    return policy.get_output_embeddings()(hidden).float(), targets, mask


def floor(policy, path, batch_tokens, shared):
    """Seconds of a plain forward and backward pass over the trajectories of prompts with reward variance."""
    rollouts = sketch.load_rollouts(path)
    prompts, responses, k = rollouts["prompts"], rollouts["responses"], rollouts["meta"]["k"]
    longest, sizes = rollouts["response_lengths"].view(-1, k).amax(1).tolist(), {}
    for i in prompts_with_variance(path):
        sizes[i] = (len(prompts[i]), longest[i]) if shared else (0, len(prompts[i]) + longest[i])
    advantages = sketch.group_advantage(rollouts["rewards"])
    policy.requires_grad_(True)
    policy.zero_grad(set_to_none=False)
    began = time.perf_counter()
    for batch, at_once in sketch.plan_batches(sizes, k, batch_tokens):
        for first in range(0, k, at_once):
            rows = [(i, i * k + j) for i in batch for j in range(first, min(first + at_once, k))]
            texts, places = [responses[row] for _, row in rows], [row for _, row in rows]
            if shared:
                found = sketch.response_logits(policy, [prompts[i] for i in batch], texts, 1.0)
            else:
                found = row_logits(policy, [prompts[i] for i, _ in rows], texts)
            logits, targets, mask = found
            logp = sketch.token_logprobs(logits, targets, mask)
            beta = torch.cat([rollouts["logprobs"][row] for row in places])
            beta = torch.zeros_like(logp).masked_scatter_(mask, beta)
            sketch.off_policy_surrogate(logp, beta, advantages.flatten()[places], mask, k).backward()
    return time.perf_counter() - began


@cache
def projection(dim):
    """One projection for all rounds: it is drawn once per process, and the ratios exclude that."""
    return sketch.Projection(0, 0.1, dim, "cpu")


def sketching(policy, path, dim, batch_tokens, folder):
    """Seconds of sketch.py's work at a loaded policy, files included, and of these the trial's."""
    began = time.perf_counter()
    sketcher = sketch.choose_sketcher(policy, projection(dim))
    trial = time.perf_counter() - began
    assert sketcher.func is sketch.sketch_prompts
    identity = {"format": sketch.FORMAT, "policy": "", "seed": 0, "keep": 0.1, "dim": dim, "rho_max": "inf"}
    args = argparse.Namespace(rollouts=[path], out=[folder / "sketch.npy"], candidates=1, responses=None,
                              rho_max=math.inf, batch_tokens=batch_tokens, model="")
    sketch.sketch_file(args, sketcher, identity, 0)
    seconds = time.perf_counter() - began
    for parts in folder.glob("sketch.npy.*.parts"):
        shutil.rmtree(parts)  # or the next round would resume from them
    return seconds, trial


def economy(policy, path, dim, batch_tokens, settings, rounds, folder):
    """CPU seconds and response tokens by (responses, candidates), and the ratios to the first setting."""
    sketcher = sketch.choose_sketcher(policy, projection(dim))
    identity = {"format": sketch.FORMAT, "policy": "", "seed": 0, "keep": 0.1, "dim": dim, "rho_max": "inf"}
    rows = {setting: {"cpu_seconds": []} for setting in settings}
    for _ in range(rounds):
        for setting in settings:
            responses, candidates = setting
            args = argparse.Namespace(rollouts=[path], out=[folder / "sketch.npy"], scores=None, model="",
                                      candidates=Fraction(candidates), responses=responses, rho_max=math.inf,
                                      batch_tokens=batch_tokens)
            began = time.process_time()
            sketch.sketch_file(args, sketcher, identity, 0)
            rows[setting]["cpu_seconds"].append(time.process_time() - began)
            rows[setting]["tokens"] = json.loads((folder / "sketch.json").read_text())["tokens"]
            for parts in folder.glob("sketch.npy.*.parts"):
                shutil.rmtree(parts)
    every = rows[settings[0]]["cpu_seconds"]
    for row in rows.values():
        row["relative"] = spread([some / all_ for some, all_ in zip(row["cpu_seconds"], every)])
    return {f"responses {m or 'all'}, candidates {share}": row for (m, share), row in rows.items()}


def floor_ratios(policy, path, dim, batches, batch_tokens, rounds, folder, count_trial=True):
    best = min(batches, key=lambda b: floor(policy, path, b, False))  # also warms up
    best_shared = min(batches, key=lambda b: floor(policy, path, b, True))
    found = {"floor": [], "shared floor": [], "sketch": [], "trial": []}
    sketching(policy, path, dim, batch_tokens, folder)
    for _ in range(rounds):
        found["floor"].append(floor(policy, path, best, False))
        seconds, trial = sketching(policy, path, dim, batch_tokens, folder)
        found["sketch"].append(seconds if count_trial else seconds - trial)
        found["trial"].append(trial)
        found["shared floor"].append(floor(policy, path, best_shared, True))
    result = {"prompts": len(sketch.load_rollouts(path)["prompts"]),
              "prompts_with_variance": len(prompts_with_variance(path)), "dim": dim,
              "batch_tokens": batch_tokens, "floor_batch_tokens": best,
              "shared_floor_batch_tokens": best_shared, "seconds": found}
    for under in ("floor", "shared floor"):
        result[f"sketch / {under}"] = spread([a / b for a, b in zip(found["sketch"], found[under])])
    return result


def spread(values):
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4),
            "max": round(max(values), 4)}


def dense_speedup(policy, dim, gradients=8, timed=64):
    """Seconds per gradient of TRAK's projector (extrapolated) and of ours, for all kept coordinates."""
    from trak.projectors import BasicProjector

    ours = projection(dim)
    kept = sum(len(ours.draw(name, parameter.numel())[0]) for name, parameter in policy.named_parameters())
    gradient = {name: torch.randn(1, *parameter.shape) for name, parameter in policy.named_parameters()}
    times = []
    for _ in range(4):  # the first is a warm-up
        began, sums = time.perf_counter(), ours.zeros(1)
        for name, part in gradient.items():
            ours.add(name, part, sums)
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
            "ours_seconds_a_gradient": mine, "trak_seconds_a_gradient": whole * scale,
            "speedup": round(whole * scale / mine), "trak_product_alone_seconds_a_gradient": product * scale,
            "speedup_over_product_alone": round(product * scale / mine)}


def peak_mb(*arguments):
    """Peak resident megabytes of a script. It is started by a small process: the kernel's peak includes the
    time before exec, when the script's process is still a copy of its parent."""
    small = ("import os, subprocess, sys; process = subprocess.Popen(sys.argv[1:], stdout=2); "
             "_, status, usage = os.wait4(process.pid, 0); print(status, usage.ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", small, sys.executable, *map(str, arguments)],
                          capture_output=True, text=True)
    status, kilobytes = map(int, done.stdout.split())
    assert status == 0, done.stderr
    return round(kilobytes / 1024)


def score_speed(folder, n=20000, dim=32768, sets=6, rounds=5):
    rng, names = np.random.default_rng(0), [f"v{v}" for v in range(sets)]
    sidecar = {"format": sketch.FORMAT, "policy": "", "seed": 0, "keep": 0.1, "dim": dim, "rho_max": "inf"}
    for name, rows in {"train": n, **dict.fromkeys(names, 100)}.items():
        path = folder / f"{name}.npy"
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, dim))
        for start in range(0, rows, 500):
            array[start:start + 500] = rng.standard_normal(array[start:start + 500].shape, dtype=np.float32)
        del array
        path.with_suffix(".json").write_text(json.dumps({**sidecar, "prompts": rows}))
    train, val = folder / "train.npy", [folder / f"{name}.npy" for name in names]
    means, dots, scores = rng.standard_normal((sets, dim), dtype=np.float32), [], []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        np.dot(np.load(train, mmap_mode="r"), means.T)
        dots.append(time.perf_counter() - began)
        began = time.perf_counter()
        score.influence(train, val)
        scores.append(time.perf_counter() - began)
    peak = peak_mb(ROOT / "score.py", "--train", train, "--val", *val, "--out", folder / "selected.npy")
    return {"speed_relative_to_dot": spread([d / s for d, s in zip(dots[1:], scores[1:])]),
            "dot_seconds": dots[1:], "score_seconds": scores[1:], "peak_mb": peak}


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--toy-model", type=Path, default=ROOT / "runs/toy/world/base")
    parser.add_argument("--toy-rollouts", type=Path, default=ROOT / "runs/toy/rollouts/train.pt")
    parser.add_argument("--smollm2", type=Path, default=ROOT / "runs/smollm2", help="made by smollm2.sh")
    parser.add_argument("--rounds", type=int, default=5, help="of the toy (5); SmolLM2 has 3")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (all)")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/sketch_cost.json")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results |= {"torch": torch.__version__, "numpy": np.__version__, "transformers": transformers.__version__,
                "threads": torch.get_num_threads(), "machine": platform.machine()}
    smollm2 = args.smollm2 / "seed-0/rollouts/train.pt"
    absent = None if smollm2.exists() else f"no {smollm2}: experiments/smollm2.sh makes it from PyPI packages"
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        folder = Path(folder)
        if not absent:
            few = subset(smollm2, folder / "few.pt", prompts_with_variance(smollm2)[::6][:8])
        for part in args.parts:
            command = " ".join(["python experiments/sketch_cost.py", *sys.argv[1:]])
            results.setdefault("commands", {})[part] = command
            if part == "score":
                results["score"] = score_speed(folder)
                results["score_vs_dot"] = results["score"]["speed_relative_to_dot"]["median"]
            elif part == "memory":
                n = len(sketch.load_rollouts(args.toy_rollouts)["prompts"])
                tenth = subset(args.toy_rollouts, folder / "tenth.pt", list(range(0, n, 10)))
                runs = {"peak_mb_n": (args.toy_model, tenth),
                        "peak_mb_10n": (args.toy_model, args.toy_rollouts)}
                if not absent:
                    base = args.smollm2 / "base"
                    runs["peak_mb_smollm2"] = base, few
                    total = sum(p.numel() for p in sketch.load_policy(base, "cpu", "float32").parameters())
                    limit = (4 + 4 + 8 * 0.1) * total / 2**20 + 1024  # model, a gradient, kept indices, 1 GiB
                    results["limit_mb_smollm2"] = round(limit)
                for key, (model, rollouts) in runs.items():
                    results[key] = peak_mb(ROOT / "sketch.py", "--model", model, "--rollouts", rollouts,
                                           "--out", folder / "memory.npy")
                results["memory"] = {"n": len(range(0, n, 10)), "10n": n}
            elif part == "toy":
                policy = sketch.load_policy(args.toy_model, "cpu", "float32")
                batches = (1024, 2048, 4096, 8192)
                results["toy"] = floor_ratios(policy, args.toy_rollouts, 8192, batches, 2048, args.rounds,
                                              folder)
                results["floor_ratio_toy"] = results["toy"]["sketch / floor"]["median"]
            elif part == "economy":
                policy = sketch.load_policy(args.toy_model, "cpu", "float32")
                settings = [(None, "1"), (2, "1"), (2, "1/4")]
                results["economy_toy"] = economy(policy, args.toy_rollouts, 8192, 2048, settings, 3, folder)
                if not absent:
                    policy = sketch.load_policy(args.smollm2 / "base", "cpu", "float32")
                    rollouts = long_rollouts(policy, smollm2, folder / "long.pt")
                    results["economy_long"] = economy(policy, rollouts, 32768, 2560, settings[:2], 3, folder)
            elif absent:
                summary = {"smollm2": "floor_ratio_smollm2", "long": "floor_ratio_long",
                           "dense": "dense_speedup_smollm2"}[part]
                results |= {part: absent, summary: None}
            elif part == "smollm2":
                policy = sketch.load_policy(args.smollm2 / "base", "cpu", "float32")
                results["smollm2"] = floor_ratios(policy, few, 32768, (256, 512, 1024), 512, 3, folder)
                results["floor_ratio_smollm2"] = results["smollm2"]["sketch / floor"]["median"]
            elif part == "long":
                policy = sketch.load_policy(args.smollm2 / "base", "cpu", "float32")
                rollouts = long_rollouts(policy, smollm2, folder / "long.pt")
                results["long"] = floor_ratios(policy, rollouts, 32768, (1024, 2560), 2560, 3, folder,
                                               count_trial=False)
                results["floor_ratio_long"] = results["long"]["sketch / shared floor"]["median"]
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
    for world in ("economy_toy", "economy_long"):
        for key, row in results.get(world, {}).items():
            shown = row["relative"]
            print(f"{world:14}{key:34}{row['tokens']:8} tokens, CPU seconds {shown['median']:6.3f} of all  "
                  f"({shown['min']:.3f} to {shown['max']:.3f})")
    for world in ("toy", "smollm2", "long"):
        for key, value in results[world].items() if isinstance(results.get(world), dict) else ():
            if " / " in key:
                print(f"{world:9}{key:34}{value['median']:6.3f}  ({value['min']:.3f} to {value['max']:.3f})")


if __name__ == "__main__":
    main()
