"""Stage 3 of CROPI: from sketches to the prompts to train on.

    U_v(s0) = cos( g~(s0), mean over s' in D_v of g~(s') )     practical influence (POPI), one column per set
    RRF(s0) = sum_v 1 / (c + rank_v(s0))                       reciprocal rank fusion, over each set's top n
    D       = the n = floor(alpha N) prompts of highest RRF    selection; ties by index
    S(m)    = (1 - mu) U(m) + mu S(m-1)                        with --momentum mu (ours, not the paper's; 0)

N counts all train prompts. A zero row has no direction: it scores -inf and is never selected. It belongs to
a prompt whose rewards are all equal, or that was not a candidate in sketch.py. So a selection can be shorter
than n, which is printed.

Reads   --train     sketch .npy [N, dim] of the train prompts and the .json beside it, from sketch.py.
        --val       sketches of the validation sets; their .json must name the same policy and projection.
        --previous  scores.npy of the phase before, S(m-1).
        --rollouts  rollouts.pt of the train prompts, whose rewards the other methods select by.
Writes  --out       selected.npy: int64 [n], best first.
                    scores.npy beside it (cropi only): float32 [N, V], U_v(s0), -inf for a zero gradient (with
                    --previous: S, for every prompt that was ever scored);
                    and scores.json: how far each validation mean can be trusted (see `trust`).

The other methods are baselines for the same loop. full: all prompts; random: n of them; passrate: n at random
of those with unequal rewards; learnability: of these, the n of highest p (1 - p), p the mean reward under
beta, ties at random.

    python score.py --train train.npy --val val_a.npy val_b.npy --out selected.npy
    python score.py --train train.npy --val val_a.npy val_b.npy --out selected.npy --alpha 0.03 --rrf-c 60
    python score.py --method learnability --rollouts train.pt --out selected.npy --seed 1
"""

import argparse
import json
import os
import shutil
import sys
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave their core to others

import numpy as np
import torch
from tqdm import tqdm


# ==== 1. The paper ==========================================================================================
def selection_size(alpha, n_prompts):
    """n = floor(alpha N), exactly: alpha is a Fraction, so 0.29 of 100 is 29 (in floats it is 28.999...)."""
    return int(alpha * n_prompts)


def popi(sketches, norms, validation_means):
    """U_v(s0) = cos(g~(s0), mean of g~ over D_v). Returns [B, V]; -inf for a zero sketch or a zero mean.

    sketches: [B, dim]; norms: [B, 1], their norms; validation_means: [V, dim].
    """
    lengths = validation_means.norm(dim=1, keepdim=True)  # [V, 1]
    units = validation_means / lengths
    cosines = sketches @ units.T / norms  # NaN (0 / 0) where there is no gradient
    return cosines.masked_fill((norms == 0) | (lengths.T == 0), -torch.inf)


def influence(train, validation):
    """The scores U [N, V], float32, and the trust in each validation mean.

    train: path of the train prompts' sketch; validation: paths of V sketches.
    """
    means = []
    trusts = {}
    for path in validation:
        check_match(path, train)
        norms, halves = read_sums(path)  # |g~| [N]; sums of g~ over even and over odd indices [2, dim]
        means.append(halves.sum(0) / len(norms))
        trusts[str(path)] = trust(norms, halves)
    means = torch.stack(means).float()  # [V, dim]
    if not means.any():  # a single zero mean is allowed: its column is -inf and ranks no prompt
        fail(", ".join(validation), "zero mean gradients", "prompts with unequal rewards",
             "use other validation prompts, or more responses to them")
    scores = [popi(sketches, norms, means) for sketches, norms in read_blocks(train)]
    return torch.cat(scores).numpy(), trusts


def trust(norms, halves):
    """How far the mean of a validation set can be trusted, from its sketches alone.

    norms: [N]; halves: [2, dim], the sums of the sketches at even and at odd indices. effective_prompts: (sum
    |g|^2)^2 / sum |g|^4 (Kish 1965), N for equal norms, 1 if a single prompt dominates. top_five_share: that
    of the five largest |g|^2 in their sum. halves_cosine: between the two sums; near 0, the mean is noise.
    For a set without a gradient, all three are 0.
    """
    squares = norms.double().square()
    even, odd = halves.double()
    found = {"effective_prompts": squares.sum() ** 2 / squares.square().sum(),
             "top_five_share": squares.sort(descending=True).values[:5].sum() / squares.sum(),
             "halves_cosine": even @ odd / (even.norm() * odd.norm())}
    return {name: float(value.nan_to_num(0)) for name, value in found.items()}


def average_scores(scores, previous, momentum):
    """S(m) = (1 - mu) U(m) + mu S(m-1); S(m-1) for prompts that were not sketched in phase m.

    It is ours, not the paper's: less noisy. scores: U(m) [N, V], a row of -inf for a prompt that was not
    sketched; previous: S(m-1), -inf where there was no score (then S = U); momentum: mu.
    """
    sketched = np.isfinite(scores).any(1, keepdims=True)
    average = np.where(sketched, scores, previous)
    both = np.isfinite(scores) & np.isfinite(previous)
    average[both] = (1 - momentum) * scores[both] + momentum * previous[both]
    return average


def reciprocal_rank_fusion(scores, n, c=0.0):
    """RRF(s0) = sum_v 1 / (c + rank_v(s0)) over each column's own top n. Returns float64 [N].

    scores: [N, V]. Ranks start at 1, ties go by index, -inf has no rank; 0 for a prompt in no top n. Source:
    Cormack et al. 2009, with c = 60; the release of CROPI's authors has c = 0.

    >>> reciprocal_rank_fusion(np.array([[.1, .9], [.5, .2], [.6, .3]]), n=2).tolist()
    [1.0, 0.5, 1.5]
    """
    terms = np.zeros(scores.shape)
    for v, column in enumerate(scores.T):
        top = np.argsort(-column, kind="stable")[:min(n, np.isfinite(column).sum())]
        terms[top, v] = 1 / (c + np.arange(1, len(top) + 1))
    # float sums depend on the order: ranks (1, 2, 3) and (3, 2, 1) must tie, so add the smallest terms first
    return np.sort(terms, axis=1).sum(1)


def select(values, n):
    """The n indices of highest value, best first, ties by index; values <= 0 are never selected."""
    order = np.argsort(-values, kind="stable")[:n]
    return order[values[order] > 0]


def select_baseline(method, rewards, n, seed):
    """full, random, passrate or learnability from NumPy rewards [N, K] under beta. Returns indices."""
    p = rewards.mean(1)
    shuffled = np.random.default_rng(seed).permutation(len(p))
    if method == "full":
        return np.arange(len(p))
    if method == "random":
        return shuffled[:n]
    learnability = np.where(rewards.max(1) > rewards.min(1), p * (1 - p), 0)  # 0 without a gradient
    if method == "passrate":
        return shuffled[learnability[shuffled] > 0][:n]
    return shuffled[select(learnability[shuffled], n)]


def main():
    args = parse_arguments()
    n_prompts = count_prompts(args)
    n = selection_size(args.alpha, n_prompts)
    if n < 1:
        fail("--alpha", f"{float(args.alpha)} of {n_prompts} prompts", "at least one prompt", "raise it")
    with replacing(args.out) as file:  # opened first, to fail early; appears as --out when complete
        if args.method == "cropi":
            influences, trusts = influence(args.train, args.val)  # [N, V]
            scores = influences
            if args.previous:
                scores = average_scores(scores, load_previous(args, scores.shape), args.momentum)
            sketched = np.isfinite(influences).any(1, keepdims=True)
            ranked = np.where(sketched, scores, -np.inf)  # only what was sketched now can be selected
            selected = select(reciprocal_rank_fusion(ranked, n, args.rrf_c), n)
        else:
            selected = select_baseline(args.method, load_rewards(args.rollouts), n, args.seed)
        if len(selected) == 0:
            source = args.train if args.method == "cropi" else args.rollouts
            fail(source, "no prompt with unequal rewards", "at least one", "raise K in collect.py")
        if args.method == "cropi":
            report_trust(trusts, influences, selected)
            write_scores(args.out, scores, trusts)
        np.save(file, selected.astype(np.int64))
    note = f" (fewer than floor(alpha N) = {n}: the others' sketches are zero)" if len(selected) < n else ""
    print(f"{args.out}: {len(selected)} of {n_prompts} prompts by {args.method}{note}")


# ==== 2. Faster, same numbers ===============================================================================
# Sketches stay on disk and are read in blocks of rows, so that memory does not grow with N. Without this part
# np.load(path) would be the only block.

ROWS = 512  # of a sketch in memory at once: 64 MB with 32768 numbers each; even, for read_sums


def read_blocks(path):
    """Yields blocks of rows float32 [B, dim] and their norms [B, 1]; refuses NaN and infinity."""
    sketch, _ = open_sketch(path)
    n, dim = sketch.shape
    for start in tqdm(range(0, n, ROWS), desc=f"score {path}", unit="block", delay=2, disable=None):
        shape = min(ROWS, n - start), dim
        offset = sketch.offset + start * 4 * dim
        rows = torch.from_numpy(np.memmap(path, np.float32, "c", offset, shape))  # unmapped after its block
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        finite = norms[:, 0].isfinite()
        if not finite.all():
            fail(path, f"NaN or infinity in row {start + int(finite.int().argmin())}", "finite numbers",
                 "check whether the policy diverged, then sketch again")
        yield rows, norms


def read_sums(path):
    """Norms [N] of a sketch's rows, and the sums of its rows at even and at odd indices, float64 [2, dim]."""
    norms = []
    halves = 0
    for sketches, row_norms in read_blocks(path):  # blocks begin at even indices, since ROWS is even
        even = sketches[0::2].sum(0, dtype=torch.float64)
        odd = sketches[1::2].sum(0, dtype=torch.float64)
        halves = halves + torch.stack([even, odd])
        norms.append(row_norms[:, 0])
    return torch.cat(norms), halves


# ==== 3. Files, resuming, bad input =========================================================================
# The command line, sketches and rewards from disk, what is printed, one-line errors. There is nothing to
# resume: a killed run is repeated. Nothing here changes a number.

FORMAT = 2  # of rollouts.pt and of the sketches' .json files
MUST_MATCH = ("format", "policy", "seed", "keep", "dim", "rho_max")  # in the .json of compared sketches


def parse_arguments():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--method", default="cropi", help="how prompts are selected (cropi)",
                        choices=["cropi", "random", "full", "passrate", "learnability"])
    parser.add_argument("--train", help="sketch of the train prompts (cropi)")
    parser.add_argument("--val", nargs="+", default=[], help="sketches of the validation sets (cropi)")
    parser.add_argument("--rollouts", help="rollouts.pt of the train prompts (the other methods)")
    parser.add_argument("--out", required=True, type=Path, help="selected.npy to write")
    parser.add_argument("--alpha", type=Fraction, default=Fraction("0.1"), help="share to select (0.1)")
    parser.add_argument("--rrf-c", type=float, default=0.0, help="c of the rank fusion (0; often 60)")
    parser.add_argument("--momentum", type=float, default=0.0,
                        help="mu, the weight of --previous in the average of scores (0: the paper)")
    parser.add_argument("--previous", type=Path, help="scores.npy of the phase before (none in the first)")
    parser.add_argument("--seed", type=int, default=0, help="of random choices and ties (0)")
    args = parser.parse_args()
    if args.method == "cropi" and not (args.train and args.val):
        fail("--method cropi", "no --train or no --val", "both", "name sketches of sketch.py")
    if args.method != "cropi" and not args.rollouts:
        fail(f"--method {args.method}", "no --rollouts", "a rollouts.pt", "name that of the train prompts")
    if not (0 < args.alpha <= 1 and args.rrf_c >= 0 and 0 <= args.momentum < 1):
        fail("--alpha, --rrf-c, --momentum", f"{float(args.alpha)}, {args.rrf_c}, {args.momentum}",
             "0 < alpha <= 1, rrf-c >= 0, 0 <= momentum < 1", "the paper has 0.1, -, 0")
    return args


def count_prompts(args):
    """N of the sketch or of the rollouts to select from."""
    if args.method == "cropi":
        sketch, _ = open_sketch(args.train)
        return len(sketch)
    rewards = load_rewards(args.rollouts)
    if args.method in ("passrate", "learnability") and rewards.shape[1] < 2:
        fail(args.rollouts, f"K = {rewards.shape[1]}", "K >= 2", "raise --k of collect.py")
    return len(rewards)


def load_rewards(path):
    """The rewards of a rollouts.pt of collect.py, float32 [N, K]."""
    try:
        rollouts = torch.load(path, weights_only=True, mmap=True)  # refuses a pickle that would run code
        if rollouts["meta"]["format"] != FORMAT:
            raise ValueError(f"format {rollouts['meta']['format']}")
        return rollouts["rewards"].numpy()
    except Exception as error:  # a damaged file can raise anything
        fail(path, f"no readable rollouts ({error!r})", f"a rollouts.pt of format {FORMAT}", "collect again")


def open_sketch(path):
    """A sketch on disk (memory-mapped, [N, dim]) and what must match in its .json."""
    try:
        sketch = np.load(path, mmap_mode="r", allow_pickle=False)
        sidecar = json.loads(Path(path).with_suffix(".json").read_text())
        shape = sidecar["prompts"], sidecar["dim"]
        if sidecar["format"] != FORMAT or sketch.dtype != np.float32 or sketch.shape != shape:
            raise ValueError(f"format {sidecar['format']}, {sketch.dtype} {list(sketch.shape)}")
        return sketch, {key: sidecar[key] for key in MUST_MATCH}
    except Exception as error:  # missing, truncated, not .npy, a pickle, another .json
        fail(path, f"no readable sketch ({error})", f"float32 [N, dim] and its .json of format {FORMAT}",
             "make it with sketch.py")


def check_match(path, train):
    """Refuses a validation sketch of another policy or projection than that of the train prompts."""
    _, found = open_sketch(path)
    _, expected = open_sketch(train)
    for key in MUST_MATCH:
        if found[key] != expected[key]:
            fail(path, f"{key} {found[key]}", f"{expected[key]} as in {train}", "sketch both alike")


def load_previous(args, shape):
    """S(m-1) of --previous; refuses scores of another number of prompts, or of other validation sets."""
    try:
        previous = np.load(args.previous, allow_pickle=False)
        sets = [Path(name).name for name in json.loads(args.previous.with_suffix(".json").read_text())]
        if previous.dtype != np.float32 or previous.shape != shape:
            raise ValueError(f"{previous.dtype} {list(previous.shape)}")
        if sets != [Path(name).name for name in args.val]:
            raise ValueError(f"of the sets {', '.join(sets)}")
    except Exception as error:  # missing, truncated, not .npy, a pickle, no .json
        fail(args.previous, f"no usable scores ({error})", f"float32 {list(shape)}, the same sets",
             "name the scores.npy of the phase before")
    return previous


def report_trust(trusts, scores, selected):
    """Adds to each set's trust the share of the selected with a positive cosine; one line per set."""
    for v, (name, found) in enumerate(trusts.items()):
        if found["effective_prompts"] == 0:
            print(f"score.py: warning: {name}: no prompt with unequal rewards; only the other sets rank",
                  file=sys.stderr)
            continue
        found["selected_positive"] = float((scores[selected, v] > 0).mean())
        print(f"{name}:", ", ".join(f"{key} {value:.2f}" for key, value in found.items()))
        if found["effective_prompts"] < 10 or found["halves_cosine"] < 0.1:
            print(f"score.py: warning: {name}: few prompts decide the mean gradient, or its halves disagree; "
                  "use more prompts or responses, or --rho-max of sketch.py", file=sys.stderr)


def write_scores(out, scores, trusts):
    """Writes scores.npy and scores.json beside `out`."""
    with replacing(out.with_name("scores.npy")) as file:
        np.save(file, scores)
    with replacing(out.with_name("scores.json")) as file:
        file.write(json.dumps(trusts, indent=1).encode())


@contextmanager
def reporting_full_disk(path):
    """Reports a disk that becomes full while `path` is written; torch.save hides this in a RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError):
        if shutil.disk_usage(path.parent).free > 2**20:
            raise
        fail(path, "a full disk", "room for it", "free some, then run the same command again")


@contextmanager
def replacing(path):
    """Opens a temporary file, to fail early, and renames it to `path` when it is complete."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("a folder has this name")
        file = open(part, "wb")
    except OSError as error:
        fail(path, f"a path that cannot be written ({error})", "a writable place", "choose another --out")
    with reporting_full_disk(path), file:
        yield file
    os.replace(part, path)


def fail(source, found, expected, hint):
    """Reports wrong input in one line on stderr and exits with code 2."""
    line = f"{Path(sys.argv[0]).name}: error: {source}: found {found}; expected {expected}; {hint}"
    print(" ".join(line.split()), file=sys.stderr)  # an exception's text may have several lines
    raise SystemExit(2)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
