"""Stage 3 of CROPI: from sketches to the prompts worth training on.

    U_v(s0) = cos( g~(s0), mean over s' in D_v of g~(s') )          practical influence (POPI), one column a validation set
    RRF(s0) = sum_v 1 / (c + rank_v(s0))                            reciprocal rank fusion, over each set's own top n only
    D       = the n = floor(alpha N) prompts of highest RRF         selection; ties by index

A prompt whose rewards are all equal has a zero gradient: it scores -inf and is never selected, so a selection can be
shorter than n, and says so.

Reads   --train     sketch .npy [N, dim] of the train prompts, with its .json beside it, of sketch.py.
        --val       sketches of the validation sets; the .json files must tell of the same policy and projection.
        --rollouts  rollouts.pt: what the other methods select from; for cropi only a check of N.
Writes  --out       selected.npy: int64 [n], best first.
                    scores.npy beside it (cropi only): float32 [N, V], U_v(s0), -inf for a zero gradient.

Other methods (p is a prompt's mean reward under beta), for comparison in the same loop: full = all prompts; random = n of
them; passrate = n at random of those with 0 < p < 1; learnability = the n of highest p (1 - p), ties at random.

Constant memory: sketches stay on disk and pass by in blocks of rows.

    python score.py --train train.npy --val val_a.npy val_b.npy --out selected.npy
    python score.py --method learnability --rollouts train.pt --out selected.npy --seed 1
"""

import argparse
import json
import os
import sys
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

FORMAT = 1  # of rollouts.pt
MUST_MATCH = ("format", "policy", "seed", "keep", "dim", "drop", "projection")  # in the sketches' .json files
ROWS = 512  # of a sketch in memory at once


def fail(file, found, expected, mend):
    """Wrong input: one line on stderr, exit code 2."""
    line = f"{Path(sys.argv[0]).name}: error: {file}: found {found}; expected {expected}; {mend}"
    print(" ".join(line.split()), file=sys.stderr)  # an exception's text may have several lines
    raise SystemExit(2)


def selection_size(alpha, n_prompts):
    """n = floor(alpha N), exactly: alpha is a Fraction, so 0.29 of 100 is 29 (in floats it is 28.999...).

    >>> selection_size(Fraction("0.29"), 100)
    29
    """
    return int(alpha * n_prompts)


def popi(sketches, norms, validation_means):
    """U_v(s0) = cos(g~(s0), mean of g~ over D_v). Returns [B, V]; a zero sketch (no reward variance) scores -inf.

    sketches: [B, dim]; norms: [B, 1], theirs; validation_means: [V, dim].
    """
    units = validation_means / validation_means.norm(dim=1, keepdim=True)
    return (sketches @ units.T / norms).masked_fill(norms == 0, -torch.inf)


def reciprocal_rank_fusion(scores, n, c=0.0):
    """RRF(s0) = sum_v 1 / (c + rank_v(s0)), ranks from 1, ties by index, over each column's top n; -inf is never ranked.

    scores: [N, V]; returns float64 [N], 0 for a prompt in no column's top n. Source: Cormack et al. 2009 (c = 60); the
    authors of CROPI release c = 0.

    >>> reciprocal_rank_fusion(np.array([[.1, .9], [.5, .2], [.3, .3]]), n=2).tolist()
    [1.0, 1.0, 1.0]
    """
    terms = np.zeros(scores.shape)
    for v, column in enumerate(scores.T):
        top = np.argsort(-column, kind="stable")[:min(n, np.isfinite(column).sum())]
        terms[top, v] = 1 / (c + np.arange(1, len(top) + 1))
    return np.sort(terms, axis=1).sum(1)  # sorted: equal terms in another order must tie exactly


def select(values, n):
    """The n indices of highest value, best first, ties by index; those with value <= 0 are never selected."""
    order = np.argsort(-values, kind="stable")[:n]
    return order[values[order] > 0]


def select_baseline(method, rewards, n, seed):
    """full, random, passrate or learnability from the rewards [N, K] under beta. Returns int64 indices."""
    rng, p = np.random.default_rng(seed), rewards.mean(1)
    shuffled = rng.permutation(len(p))
    if method == "full":
        return np.arange(len(p))
    if method == "random":
        return shuffled[:n]
    learnability = p * (1 - p)
    if method == "passrate":
        return shuffled[learnability[shuffled] > 0][:n]
    return shuffled[select(learnability[shuffled], n)]


class Ragged:
    """Sequences in one flat array: number i is flat[offsets[i]:offsets[i + 1]]."""

    def __init__(self, flat, offsets):
        self.flat, self.offsets = flat, offsets.tolist()
        if self.offsets[-1] != len(flat):
            raise ValueError(f"{len(flat)} elements, offsets to {self.offsets[-1]}")

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        return self.flat[self.offsets[i]:self.offsets[i + 1]]


def load_rollouts(path):
    """rollouts.pt of collect.py, its flat arrays also as sequences of 1-D tensors: prompts [N], responses, logprobs [N*K]."""
    try:
        rollouts = torch.load(path, weights_only=True, mmap=True)  # refuses a pickle that would run code
        for name, array, offsets in (("prompts", "prompt_tokens", "prompt_offsets"),
                                     ("responses", "response_tokens", "response_offsets"),
                                     ("logprobs", "logprobs", "response_offsets")):
            rollouts[name] = Ragged(rollouts[array], rollouts[offsets])
        n, k = rollouts["rewards"].shape
        found = [rollouts["meta"]["format"], *(len(rollouts[name]) for name in ("prompts", "responses", "answers"))]
        if found != [FORMAT, n, n * k, n]:
            raise ValueError(f"format, prompts, responses, answers = {found}")
    except Exception as error:  # a damaged file can raise anything
        fail(path, f"no readable rollouts ({type(error).__name__}: {error})", f"a rollouts.pt of format {FORMAT}",
             "make it with collect.py")
    return rollouts


@contextmanager
def replacing(path):
    """A file to write under a temporary name, renamed to `path` at the end: a killed run leaves no half of a file.

    Opened before the work is done, so that an output that cannot be written is refused at once.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path if path.is_dir() else part, "wb")  # a folder raises
    except OSError as error:
        fail(path, f"a path that cannot be written ({error})", "a writable place", "choose another --out")
    with file:
        yield file
    os.replace(part, path)


def open_sketch(path):
    """A sketch on disk (memory-mapped, [N, dim]) and its sidecar."""
    path = Path(path)
    try:
        sketch = np.load(path, mmap_mode="r", allow_pickle=False)
        sidecar = json.loads(path.with_suffix(".json").read_text())
        if sketch.ndim != 2 or sketch.dtype != np.float32 or sketch.shape != (sidecar["prompts"], sidecar["dim"]):
            fail(path, f"{sketch.dtype} {list(sketch.shape)}", "float32 [N, dim] as its .json says", "sketch it anew")
        return sketch, {key: sidecar[key] for key in MUST_MATCH}
    except FileNotFoundError as error:
        fail(error.filename, "no such file", "a sketch .npy and its .json", "make them with sketch.py")
    except (ValueError, KeyError, EOFError, OSError) as error:  # truncated, not .npy, a pickle, or a sidecar without the keys
        fail(path, f"an unreadable file ({error})", "a sketch of sketch.py", "sketch it anew")


def blocks(sketch, path):
    """Rows of a sketch and their norms, block by block, checked for NaN and infinity: float32 [B, dim] and [B, 1]."""
    n, dim = sketch.shape
    for start in tqdm(range(0, n, ROWS), desc=f"score {path}", unit="block", delay=2):
        shape = min(ROWS, n - start), dim
        rows = np.memmap(path, np.float32, "c", sketch.offset + start * 4 * dim, shape)  # anew: the last one's memory is freed
        rows = torch.from_numpy(rows)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        finite = norms[:, 0].isfinite()
        if not finite.all():
            fail(path, f"NaN or infinity in row {start + int(finite.int().argmin())}", "finite numbers",
                 "look for a diverged policy, then sketch anew")
        yield rows, norms


def influence(train, validation):
    """scores float32 [N, V] from the paths of the sketches."""
    sketch, expected = open_sketch(train)
    means = []
    for path in validation:
        other, found = open_sketch(path)
        for key in MUST_MATCH:
            if found[key] != expected[key]:
                fail(path, f"{key} {found[key]}", f"{expected[key]} as in {train}", "sketch both with the same settings")
        means.append(sum(rows.sum(0, dtype=torch.float64) for rows, _ in blocks(other, path)) / len(other))
        if not means[-1].any():
            fail(path, "a zero mean gradient", "a validation set with some reward variance", "use other validation prompts")
    means = torch.stack(means).float()
    return torch.cat([popi(rows, norms, means) for rows, norms in blocks(sketch, train)]).numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="cropi", choices=["cropi", "random", "full", "passrate", "learnability"])
    parser.add_argument("--train", help="sketch of the train prompts (cropi)")
    parser.add_argument("--val", nargs="+", default=[], help="sketches of the validation sets (cropi)")
    parser.add_argument("--rollouts", help="rollouts.pt of the train prompts (the other methods)")
    parser.add_argument("--out", required=True, type=Path, help="selected.npy to write")
    parser.add_argument("--alpha", type=Fraction, default=Fraction("0.1"), help="share of prompts to select (0.1)")
    parser.add_argument("--rrf-c", type=float, default=0.0, help="c of the rank fusion (0; 60 is the classic one)")
    parser.add_argument("--seed", type=int, default=0, help="of random choices and ties")
    args = parser.parse_args()
    if args.method == "cropi" and not (args.train and args.val):
        parser.error("--method cropi needs --train and --val")
    if args.method != "cropi" and not args.rollouts:
        parser.error(f"--method {args.method} needs --rollouts")
    if not 0 < args.alpha <= 1:
        fail("--alpha", float(args.alpha), "a share in (0, 1]", "the paper's is 0.1")
    if args.rrf_c < 0:
        parser.error("--rrf-c must be >= 0")

    rewards = load_rollouts(args.rollouts)["rewards"].numpy() if args.rollouts else None
    n_prompts = len(rewards) if rewards is not None else len(open_sketch(args.train)[0])
    n = selection_size(args.alpha, n_prompts)
    if n < 1:
        fail("--alpha", f"{float(args.alpha)} of {n_prompts} prompts", "at least one prompt", "raise it or add prompts")
    if args.method in ("passrate", "learnability") and rewards.shape[1] < 2:
        fail(args.rollouts, f"K = {rewards.shape[1]} responses a prompt", "K >= 2", "collect with --k 2 or more")
    if args.method == "cropi" and len(open_sketch(args.train)[0]) != n_prompts:
        fail(args.train, f"{len(open_sketch(args.train)[0])} rows", f"{n_prompts} as in --rollouts", "sketch these rollouts")
    with replacing(args.out) as file:
        if args.method == "cropi":
            scores = influence(args.train, args.val)
            selected = select(reciprocal_rank_fusion(scores, n, args.rrf_c), n)
            with replacing(args.out.with_name("scores.npy")) as scores_file:
                np.save(scores_file, scores)
        else:
            selected = select_baseline(args.method, rewards, n, args.seed)
        if len(selected) == 0:
            fail(args.rollouts or args.train, "no prompt with a reward variance", "some", "collect more responses")
        np.save(file, selected.astype(np.int64))
    short = f" (fewer than floor(alpha N) = {n}: the others have no gradient)" if len(selected) < n != n_prompts else ""
    print(f"{args.out}: {len(selected)} of {n_prompts} prompts by {args.method}{short}")


if __name__ == "__main__":
    main()
