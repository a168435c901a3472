"""Are the selected prompts close to the validation sets in meaning? By phase, against random selections.

A prompt's similarity is the cosine of its embedding and the mean embedding of a validation set, averaged over
the sets. There are two embeddings: the base policy's hidden states (last layer, mean over the prompt's
tokens, minus the mean of the pool, since all hidden states point in much the same direction) and, independent
of any policy, TF-IDF of the prompt's words. For each phase: the mean over the selected prompts, and the mean
and the range of those of 100 random selections of the same size.

Reads   run folders RUN/METHOD, and RUN/rollouts with the base policy that it names.
Writes  OUT.json and OUT.png

    python experiments/similarity.py runs/toy/cropi --out experiments/results/similarity_toy
                          needs scikit-learn
"""

import argparse
import json
import sys
from functools import cache
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import AutoModel, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from sketch import load_rollouts

DRAWS = 100  # random selections


def hidden_states(policy, prompts):
    """Mean hidden state of the last layer over each prompt's tokens: float32 [N, width]."""
    means = []
    for tokens in prompts:
        with torch.no_grad():
            means.append(policy(tokens.long()[None]).last_hidden_state[0].mean(0))
    return torch.stack(means).numpy()


def similarities(pool, validation):
    """Cosine of each row of the pool with the mean of each validation set, averaged over the sets: [N]."""
    centres = np.stack([of.mean(0) for of in validation])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    norms = np.maximum(np.linalg.norm(pool, axis=1, keepdims=True), 1e-12)  # no known word: similarity 0
    return (pool / norms @ centres.T).mean(1)


@cache
def embeddings(rollouts):
    """{name: similarity of each train prompt to the validation sets}; rollouts: the folder RUN/rollouts."""
    files = [rollouts / "train.pt", *sorted(rollouts.glob("val_*.pt"))]
    pool, *sets = map(load_rollouts, files)
    base = pool["meta"]["model"]
    policy, tokenizer = AutoModel.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    hidden = [hidden_states(policy, of["prompts"]) for of in (pool, *sets)]
    hidden = [of - hidden[0].mean(0) for of in hidden]
    texts = [[tokenizer.decode(tokens, skip_special_tokens=True) for tokens in of["prompts"]]
             for of in (pool, *sets)]
    vectorizer = TfidfVectorizer().fit(texts[0])
    words = [vectorizer.transform(of).toarray() for of in texts]
    return {"hidden states": similarities(hidden[0], hidden[1:]), "TF-IDF": similarities(words[0], words[1:])}


def measure(run):
    """For each embedding and phase: the selection's mean similarity, and those of random selections."""
    result = {}
    files = [run / f"phase-{m}/selected.npy" for m in range(len(list(run.glob("phase-*/selected.npy"))))]
    for name, similarity in embeddings(run.parent / "rollouts").items():
        rng = np.random.default_rng(0)
        phases = []
        for selected in map(np.load, files):
            draws = [similarity[rng.choice(len(similarity), len(selected), replace=False)].mean()
                     for _ in range(DRAWS)]
            phases.append({"selected": float(similarity[selected].mean()), "random": float(np.mean(draws)),
                           "random_range": [float(min(draws)), float(max(draws))]})
        result[name] = phases
    return result


def draw(runs, path):
    names = list(next(iter(runs.values())))
    figure, axes = plt.subplots(1, len(names), figsize=(4.5 * len(names), 3.2), squeeze=False)
    for axis, name in zip(axes[0], names):
        for run, found in runs.items():
            line, = axis.plot([phase["selected"] for phase in found[name]], "o-", markersize=3, label=run)
            low, high = np.array([phase["random_range"] for phase in found[name]]).T
            axis.fill_between(range(len(low)), low, high, color=line.get_color(), alpha=0.3, lw=0)
        axis.set(title=f"similarity by {name}", xlabel="phase", xticks=range(len(found[name])))
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.25)
    axes[0, 0].legend(frameon=False, fontsize=7, title="bands: random selections", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("runs", nargs="+", type=Path, help="folders RUN/METHOD made by run_cropi.sh")
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without .json and .png")
    args = parser.parse_args()
    runs = {}
    for run in args.runs:
        runs[str(run)] = found = measure(run)
        for name, phases in found.items():
            print(run, name, [(round(p["selected"], 3), round(p["random"], 3)) for p in phases])
    command = f"python experiments/similarity.py {' '.join(map(str, args.runs))}"
    args.out.with_suffix(".json").write_text(json.dumps({"command": command, "runs": runs}, indent=1) + "\n")
    draw(runs, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
