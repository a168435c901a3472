"""sketch.py with gradients that are never formed, for less than the cost of a forward and a backward pass.

The gradient of a weight W [rows, columns] is a sum over tokens, G = sum_t l_t r_t^T. For a linear layer,
l_t is the gradient at its output and r_t its input; for an embedding, l_t is the token's one-hot vector and
r_t the gradient at its output. sketch.py forms G for each prompt. Here both vectors are folded to P numbers
first:

    B   = sum_t fold(l_t) fold(r_t)^T = F_l G F_r^T       [P, P], for each weight and prompt
    g~ += hash(B)                                         [dim], one sketch for all weights

fold adds each coordinate to one of P buckets with a random sign; hash adds each number of B to one of dim
with a random sign. Both are drawn from (seed, parameter name), the folds of rows and of columns apart. A
weight has the same maps wherever it is used, so tied weights work as in sketch.py. Since E[F^T F] is the
identity, dot products of sketches are unbiased estimates of dot products of gradients. Buckets are random,
because j mod P would align with attention heads, and hold equally many coordinates: two coordinates share
one with probability below 1 / P, and never if there are at most P. Gradients of norms and biases are
vectors; sketch.py's projection takes them as they are, with --keep.

    python experiments/folded.py --model ...       (everything else as in sketch.py)
    SKETCH=experiments/folded.py bash run_cropi.sh

The "keep" of the .json says that a sketch is folded, so that score.py refuses to compare it with others.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sketch

EXACT = sketch.layer_gradients
PLAIN = sketch.sketch_file


class Folded(sketch.Projection):
    """A linear map from all parameters to `dim` numbers, as sketch.Projection; self.p is P."""

    p = 64  # 4096 numbers for each weight and prompt

    def draw_fold(self, name, side, n):
        """(buckets, signs) of n coordinates; side: "rows" or "columns"."""
        key = name, side
        if key not in self.drawn:
            generator = torch.Generator().manual_seed(sketch.stream_seed(self.seed, *key))
            buckets = torch.randperm(n, generator=generator) % self.p
            signs = torch.randint(2, (n,), generator=generator) * 2.0 - 1
            self.drawn[key] = buckets.to(self.device), signs.to(self.device)
        return self.drawn[key]

    def draw_hash(self, name):
        """Buckets of the P P numbers of a block, different ones if dim allows; >= dim means sign -1."""
        key = name, "block"
        if key not in self.drawn:
            generator = torch.Generator().manual_seed(sketch.stream_seed(self.seed, *key))
            buckets = torch.randperm(max(self.p**2, self.dim), generator=generator)[:self.p**2] % self.dim
            buckets += self.dim * torch.randint(2, (self.p**2,), generator=generator)
            self.drawn[key] = buckets.to(self.device)
        return self.drawn[key]

    def fold(self, name, side, n, x):
        """[b, T, P] from x [b, T, n], or from ids [b, T, 1], which stand for one-hot vectors."""
        buckets, signs = self.draw_fold(name, side, n)
        folded = torch.zeros(x.shape[0] * x.shape[1], self.p, device=x.device)
        if x.is_floating_point():
            signed = x.flatten(0, 1) * signs
            folded.scatter_add_(1, buckets.expand_as(signed), signed)  # on a CPU faster than index_add_
        else:
            ids = x.flatten()
            folded.scatter_(1, buckets[ids][:, None], signs[ids][:, None])
        return folded.view(*x.shape[:2], self.p)

    def add(self, name, gradients, sums):
        """Adds a parameter's part to sums [b, 2 dim].

        gradients: of a weight, (left [b, T, rows], right [b, T, columns], its shape) or, from plain autograd,
        [b, rows, columns]; of another parameter, [b, *its shape].
        """
        if isinstance(gradients, tuple):
            left, right, (rows, columns) = gradients
            block = self.fold(name, "rows", rows, left).mT @ self.fold(name, "columns", columns, right)
        elif gradients.dim() == 3:
            half = self.fold(name, "columns", gradients.shape[2], gradients).mT  # [b, P, rows]
            block = self.fold(name, "rows", gradients.shape[1], half).mT  # [b, P, P]
        else:
            return super().add(name, gradients, sums)
        block = block.flatten(1) * self.keep**0.5  # `sketches` divides by it: here nothing is dropped
        sums.scatter_add_(1, self.draw_hash(name).expand(len(block), -1), block)


def layer_factors(layer, x, delta):
    """sketch.layer_gradients with (left, right, shape) in place of the gradients of weight matrices."""
    if isinstance(layer, nn.Embedding):
        if layer.padding_idx is not None:
            delta = delta.masked_fill(x == layer.padding_idx, 0)  # as in autograd: it has no gradient
        factors = x, delta
    elif isinstance(layer, nn.Linear):
        factors = delta, x
    elif isinstance(layer, Conv1D):
        factors = x, delta
    else:
        yield from EXACT(layer, x, delta)
        return
    yield layer.weight, (*factors, layer.weight.shape)
    if getattr(layer, "bias", None) is not None:
        yield layer.bias, delta.float().sum(1)


def sketch_file(args, sketcher, identity, number):
    p = Folded.p
    PLAIN(args, sketcher, {**identity, "keep": f"{args.keep}, weights folded to {p} x {p}"}, number)


def main():
    sketch.Projection = Folded
    sketch.layer_gradients = layer_factors  # its trial compares it with folded gradients of plain autograd
    sketch.sketch_file = sketch_file
    sketch.main()


if __name__ == "__main__":
    main()
