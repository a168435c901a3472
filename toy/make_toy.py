"""Makes a toy world, the default model and data: small enough to run all of CROPI on a laptop CPU.

Writes into one folder

    train.jsonl           the pool: 200 prompts of each of the two targeted families and 440 of each of the
                          ten others, 4800 in all
    val_sort.jsonl        a validation set for each targeted family: 100 prompts
    val_dbl.jsonl
    test_targeted.jsonl   200 more of each
    test_related.jsonl    200 prompts that need the targeted skills in forms of which neither the pool nor a
                          validation set has any: longer numbers, sorted letters, tripled numbers
    test_other.jsonl      20 prompts of each of the other families
    base/                 the base policy: a Hugging Face checkpoint of a Qwen2 of 1M parameters

The files are pairwise disjoint, and the base policy was trained on none of their prompts. A line of data is
{"prompt": "47+85=", "answer": "132", "family": "add"}. A seed makes its own data and its own base policy.
toy/README.md explains how the families, the skill of the base policy and the sizes were chosen.

    python toy/make_toy.py --out runs/toy/world
    python toy/make_toy.py --seed 1 --targeted rev max --out world       another targeted pair
"""

import argparse
import json
import os
import random
import shutil
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave their core to others

import torch
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging

LETTERS = "abcdefgh"
MISTAKES = 0.5  # share of the base policy's training answers that show the family's typical mistake
SFT_STEPS, SFT_BATCH, SFT_LR = 550, 96, 1e-3
SIZES = {"targeted": 200, "other": 440, "val": 100, "test": 200}  # prompts


def letters(rng, n):
    return "".join(rng.choice(LETTERS) for _ in range(n))


def digits(rng, n):
    return str(rng.randint(10 ** (n - 1), 10**n - 1))


# Each family draws (prompt, answer, typical mistake). Only the base policy's training uses the mistakes.
# longer: the family's related form, which is in no pool.


def add(rng, longer=False):
    a, b = (digits(rng, 3 if longer else 2) for _ in range(2))
    columns = [int(x) + int(y) for x, y in zip(a, b)]
    no_carry = str(columns[0]) + "".join(str(column % 10) for column in columns[1:])
    return f"{a}+{b}=", str(int(a) + int(b)), no_carry


def sub(rng, longer=False):
    b, a = sorted(digits(rng, 3 if longer else 2) for _ in range(2))
    smaller_from_larger = "".join(str(abs(int(x) - int(y))) for x, y in zip(a, b))
    return f"{a}-{b}=", str(int(a) - int(b)), str(int(smaller_from_larger))


def mul(rng, longer=False):
    a, b = int(digits(rng, 4 if longer else 3)), rng.randint(2, 9)
    return f"{a}*{b}=", str(a * b), str(a + b)


def largest(rng, longer=False):
    numbers = [digits(rng, 3) for _ in range(4 if longer else 3)]
    return f"max({','.join(numbers)})", max(numbers), numbers[0]


def digit_sum(rng, longer=False):
    text = digits(rng, 7 if longer else 5)
    return f"sum({text})", str(sum(map(int, text))), str(len(text))


def count(rng, longer=False):
    digit, text = rng.choice("123"), "".join(rng.choice("123456") for _ in range(10 if longer else 8))
    return f"count({digit},{text})", str(text.count(digit)), digit


def double(rng, longer=False):
    n = digits(rng, 6 if longer else 4)
    return f"dbl({n})", str(2 * int(n)), "".join(str(2 * int(digit) % 10) for digit in n)


def triple(rng):
    n = digits(rng, 4)
    return f"trp({n})", str(3 * int(n)), "".join(str(3 * int(digit) % 10) for digit in n)


def sort(rng, longer=False, draw=digits):
    text = draw(rng, 8 if longer else 6)
    return f"sort({text})", "".join(sorted(text)), "".join(sorted(text, reverse=True))


def reverse(rng, longer=False):
    text = letters(rng, 8 if longer else 6)
    return f"rev({text})", text[::-1], text[:0:-1]


def following(rng, longer=False):
    text = letters(rng, 8 if longer else 6)
    after = "".join(LETTERS[(LETTERS.index(c) + 1) % len(LETTERS)] for c in text)
    return f"next({text})", after, text[1:] + text[0]


def unique(rng, longer=False):
    text = letters(rng, 9 if longer else 7)
    adjacent_only = text[0] + "".join(b for a, b in zip(text, text[1:]) if a != b)
    return f"uniq({text})", "".join(dict.fromkeys(text)), adjacent_only


def interleave(rng, longer=False):
    a, b = (letters(rng, 4 if longer else 3) for _ in range(2))
    return f"zip({a},{b})", "".join(x + y for x, y in zip(a, b)), a + b


FAMILIES = {"add": add, "sub": sub, "mul": mul, "max": largest, "sum": digit_sum, "count": count,
            "dbl": double, "sort": sort, "rev": reverse, "next": following, "uniq": unique,
            "zip": interleave}
WORDS = ["max", "sum", "count", "dbl", "sort", "rev", "next", "uniq", "zip", "trp"]


def related(family):
    """The related forms of a family, each drawing like a family."""
    more = {"dbl": [triple], "sort": [partial(sort, draw=letters)]}.get(family, [])
    return [partial(FAMILIES[family], longer=True), *more]


def make_tokenizer() -> Qwen2Tokenizer:
    """One token per digit, letter, sign and task name; no merges. `347+2=` is 6 tokens, `max(1,2)` is 6."""
    tokens = ["<pad>", "<eos>", *"0123456789", *LETTERS, *"+-*=(,)"]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[],
                               unk_token="<pad>", pad_token="<pad>", eos_token="<eos>")
    tokenizer.add_tokens(WORDS)
    return tokenizer


def write_data(folder: Path, families: dict, targeted: list, sizes: dict, rng: random.Random) -> set:
    """Writes the .jsonl files, pairwise disjoint. Returns all their prompts."""
    forms = {family: related(family) for family in targeted}
    others = len(families) - len(targeted)
    seen, files = set(), {}

    def fill(file, family, make, n):
        rows = files.setdefault(file, [])
        goal = len(rows) + n
        while len(rows) < goal:
            prompt, answer, _ = make(rng)
            if prompt not in seen:
                seen.add(prompt)
                rows.append({"prompt": prompt, "answer": answer, "family": family})

    for family, make in families.items():
        if family in targeted:
            fill("train", family, make, sizes["targeted"])
            fill(f"val_{family}", family, make, sizes["val"])
            fill("test_targeted", family, make, sizes["test"])
            for form in forms[family]:
                fill("test_related", family, form, sizes["test"] // len(targeted) // len(forms[family]))
        else:
            fill("train", family, make, sizes["other"])
            fill("test_other", family, make, sizes["test"] // others)
    for file, rows in files.items():
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return seen


def train_base(folder: Path, makers: list, held_out: set, steps: int, rng: random.Random, seed: int):
    """SFT: cross-entropy on the answers of fresh problems, none of them in `held_out`; saves a checkpoint.

    makers: the families and the related forms of the targeted ones, drawn with equal probability.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    optimizer = torch.optim.AdamW(model.parameters(), lr=SFT_LR)
    for step in tqdm(range(steps), desc="base policy (made once)", unit="step", disable=None):
        for group in optimizer.param_groups:  # 50 steps of warm-up, decay to 0 in the last 30%
            group["lr"] = SFT_LR * min(1.0, (step + 1) / 50, (steps - step) / (0.3 * steps))
        rows = []
        while len(rows) < SFT_BATCH:
            prompt, answer, mistake = rng.choice(makers)(rng)
            if prompt not in held_out:
                answer = mistake if rng.random() < MISTAKES else answer
                answer_ids = tokenizer(answer).input_ids + [tokenizer.eos_token_id]
                rows.append((tokenizer(prompt).input_ids, answer_ids))
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        tokens = torch.tensor([p + a + [0] * (width - len(p) - len(a)) for p, a in rows])  # [B, T]
        labels = torch.tensor([[-100] * len(p) + a + [-100] * (width - len(p) - len(a)) for p, a in rows])
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=Path, default=Path("runs/toy/world"), help="folder (runs/toy/world)")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the base policy (0)")
    parser.add_argument("--targeted", nargs=2, default=["sort", "dbl"], choices=list(FAMILIES),
                        help="the targeted families (sort dbl)")
    parser.add_argument("--pool-targeted", type=int, default=SIZES["targeted"],
                        help="prompts of each targeted family in the pool of 4800 (200)")
    parser.add_argument("--sft-steps", type=int, default=SFT_STEPS, help=f"of the base policy ({SFT_STEPS})")
    parser.add_argument("--micro", action="store_true", help="a small world for the tests")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    part = args.out / "base.part"
    shutil.rmtree(part, ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)
    targeted, families, pool = args.targeted, FAMILIES, 2 * SIZES["targeted"] + 10 * SIZES["other"]
    sizes = {**SIZES, "targeted": args.pool_targeted, "other": (pool - 2 * args.pool_targeted) // 10}
    makers = [*families.values(), *(form for family in targeted for form in related(family))]
    if args.micro:
        families = {family: FAMILIES[family] for family in (*targeted, "count", "next")}
        sizes, makers = {"targeted": 30, "other": 30, "val": 8, "test": 12}, list(families.values())
    held_out = write_data(args.out, families, targeted, sizes, random.Random(args.seed))
    if not (args.out / "base").exists():
        train_base(part, makers, held_out, args.sft_steps, random.Random(args.seed + 1), args.seed)
        os.replace(part, args.out / "base")


if __name__ == "__main__":
    main()
