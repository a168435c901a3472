"""Makes the toy world, the default model and data: small enough to run all of CROPI on a laptop CPU.

Writes into one folder

    train.jsonl                      12 families, 2400 prompts: the pool that CROPI selects from
    val_sort.jsonl, val_dbl.jsonl    the two targeted validation sets, 100 prompts each
    test_targeted.jsonl              sort and dbl, 200 prompts each
    test_untargeted.jsonl            the other ten families, 40 prompts each
    base/                            the base policy: a Hugging Face checkpoint of a Qwen2 of 1M parameters

The files are pairwise disjoint, and the base policy was trained on none of their prompts. A line of data is
{"prompt": "47+85=", "answer": "132", "family": "add"}. toy/README.md explains how the families, the skill of
the base policy and the settings of the run were chosen.

    python toy/make_toy.py --out runs/toy-world
"""

import argparse
import json
import os
import random
import shutil
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging

LETTERS = "abcdefgh"
TARGETED = ("sort", "dbl")  # the families of the validation sets
MISTAKES = 0.5  # share of the base policy's training answers that show the family's typical mistake
SFT_STEPS, SFT_BATCH, SFT_LR = 800, 96, 1e-3


def letters(rng, n):
    return "".join(rng.choice(LETTERS) for _ in range(n))


# Each family draws (prompt, answer, typical mistake). Only the base policy's training uses the mistakes.


def add(rng):
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    no_carry = str(a // 10 + b // 10) + str((a + b) % 10)
    return f"{a}+{b}=", str(a + b), no_carry


def sub(rng):
    b, a = sorted((rng.randint(10, 99), rng.randint(10, 99)))
    smaller_from_larger = str(a // 10 - b // 10) + str(abs(a % 10 - b % 10))
    return f"{a}-{b}=", str(a - b), str(int(smaller_from_larger))


def mul(rng):
    a, b = rng.randint(100, 999), rng.randint(2, 9)
    return f"{a}*{b}=", str(a * b), str(a + b)


def largest(rng):
    numbers = [rng.randint(100, 999) for _ in range(3)]
    return f"max({','.join(map(str, numbers))})", str(max(numbers)), str(numbers[0])


def digit_sum(rng):
    digits = str(rng.randint(10000, 99999))
    return f"sum({digits})", str(sum(map(int, digits))), str(len(digits))


def count(rng):
    digit, digits = rng.choice("123"), "".join(rng.choice("123456") for _ in range(8))
    return f"count({digit},{digits})", str(digits.count(digit)), digit


def double(rng):
    n = rng.randint(1000, 9999)
    return f"dbl({n})", str(2 * n), "".join(str(2 * int(digit) % 10) for digit in str(n))


def sort(rng):
    digits = str(rng.randint(100000, 999999))
    return f"sort({digits})", "".join(sorted(digits)), "".join(sorted(digits, reverse=True))


def reverse(rng):
    text = letters(rng, 6)
    return f"rev({text})", text[::-1], text[:0:-1]


def following(rng):
    text = letters(rng, 6)
    after = "".join(LETTERS[(LETTERS.index(c) + 1) % len(LETTERS)] for c in text)
    return f"next({text})", after, text[1:] + text[0]


def unique(rng):
    text = letters(rng, 7)
    adjacent_only = text[0] + "".join(b for a, b in zip(text, text[1:]) if a != b)
    return f"uniq({text})", "".join(dict.fromkeys(text)), adjacent_only


def interleave(rng):
    a, b = letters(rng, 3), letters(rng, 3)
    return f"zip({a},{b})", "".join(x + y for x, y in zip(a, b)), a + b


FAMILIES = {"add": add, "sub": sub, "mul": mul, "max": largest, "sum": digit_sum, "count": count,
            "dbl": double, "sort": sort, "rev": reverse, "next": following, "uniq": unique,
            "zip": interleave}
WORDS = ["max", "sum", "count", "dbl", "sort", "rev", "next", "uniq", "zip"]


def make_tokenizer() -> Qwen2Tokenizer:
    """One token per digit, letter, sign and task name; no merges. `347+2=` is 6 tokens, `max(1,2)` is 6."""
    tokens = ["<pad>", "<eos>", *"0123456789", *LETTERS, *"+-*=(,)"]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[],
                               unk_token="<pad>", pad_token="<pad>", eos_token="<eos>")
    tokenizer.add_tokens(WORDS)
    return tokenizer


def write_data(folder: Path, families: dict, sizes: dict, rng: random.Random) -> set:
    """Writes the five .jsonl files, pairwise disjoint. Returns all their prompts."""
    seen, files = set(), {}
    for family, make in families.items():
        if family in TARGETED:
            counts = {"train": sizes["train"][0], f"val_{family}": sizes["val"],
                      "test_targeted": sizes["test"][0]}
        else:
            counts = {"train": sizes["train"][1], "test_untargeted": sizes["test"][1]}
        for file, n in counts.items():
            while n:
                prompt, answer, _ = make(rng)
                if prompt not in seen:
                    seen.add(prompt)
                    files.setdefault(file, []).append({"prompt": prompt, "answer": answer, "family": family})
                    n -= 1
    for file, rows in files.items():
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return seen


def train_base(folder: Path, families: dict, held_out: set, steps: int, rng: random.Random, seed: int):
    """SFT: cross-entropy on the answers of fresh problems, none of them in `held_out`; saves a checkpoint."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    optimizer = torch.optim.AdamW(model.parameters(), lr=SFT_LR)
    for step in tqdm(range(steps), desc="base policy (made once)", unit="step"):
        for group in optimizer.param_groups:  # 50 steps of warm-up, decay to 0 in the last 30%
            group["lr"] = SFT_LR * min(1.0, (step + 1) / 50, (steps - step) / (0.3 * steps))
        rows = []
        while len(rows) < SFT_BATCH:
            prompt, answer, mistake = rng.choice(list(families.values()))(rng)
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
    parser.add_argument("--out", type=Path, default=Path("runs/toy-world"), help="folder (runs/toy-world)")
    parser.add_argument("--sft-steps", type=int, default=SFT_STEPS, help=f"of the base policy ({SFT_STEPS})")
    parser.add_argument("--micro", action="store_true", help="four families of 30 prompts, for the tests")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    part = args.out / "base.part"
    shutil.rmtree(part, ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)
    families, sizes = FAMILIES, {"train": (100, 220), "val": 100, "test": (200, 40)}  # targeted, other
    if args.micro:
        families = {family: FAMILIES[family] for family in (*TARGETED, "count", "next")}
        sizes = {"train": (30, 30), "val": 8, "test": (6, 6)}
    held_out = write_data(args.out, families, sizes, random.Random(args.seed))
    if not (args.out / "base").exists():
        train_base(part, families, held_out, args.sft_steps, random.Random(args.seed + 1), args.seed)
        os.replace(part, args.out / "base")


if __name__ == "__main__":
    main()
