"""Stage 1 of CROPI: the behaviour policy answers every prompt K times, once, before any training.

    tau_1 .. tau_K ~ beta(. | s0),    beta = pi_theta(0)          trajectories
    R(tau) in [0, 1]                                              reward, from a verifier

Every later phase reuses these trajectories through the token ratio of sketch.py; beta is never sampled again.
It is softmax(logits / temperature): no top-p, no top-k, no repetition penalty. Only the end tokens are read
from the checkpoint's generation_config.json. log beta of each token is stored, so that at theta = theta(0)
every ratio is 1 up to rounding. The end token belongs to the response; a response truncated at
--max-new-tokens has none.

Reads   --data   local .jsonl or .parquet files, or hub data sets `name[:config[:split]]`. A prompt is a
                 string or a list of chat messages; a chat template is applied if the tokenizer has one.
Writes  --out    as many files as --data, or a single one that pools all of --data: rollouts.pt
                 (torch.load with weights_only=True), for N prompts with K responses each. Ragged arrays are
                 flat, with their lengths; response k of prompt i is number i*K + k.
                     prompt_tokens    int32   [sum of prompt lengths]     prompt_lengths   int64 [N]
                     response_tokens  int32   [sum of response lengths]   response_lengths int64 [N*K]
                     logprobs         float32 [sum of response lengths]   log beta(token | what precedes it)
                     rewards          float32 [N, K]                      of the verifier, in [0, 1]
                     answers          list[str] [N]
                     families         list[str] [N], the --family-key column; or a pool's data set
                     meta             dict: format, model, data, k, temperature, max_new_tokens, eos_ids,
                                      verifier, seed

    python collect.py --model Qwen/Qwen2.5-1.5B-Instruct --data openai/gsm8k:main:train --out rollouts.pt \\
        --instruction ' Put the final answer in \\boxed{}.' --temperature 0.5
    python collect.py --model runs/toy/world/base --data runs/toy/world/train.jsonl --verifier exact \\
        --max-new-tokens 10 --out train.pt
    torchrun --nproc_per_node 8 collect.py --model MODEL --data DATA --out rollouts.pt --dtype bfloat16
"""

import argparse
import fcntl
import gc
import glob
import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from functools import cache, lru_cache
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave their core to others
os.environ.setdefault("SYMPY_GROUND_TYPES", "python")  # verify's time limit cannot interrupt gmpy2
os.environ.setdefault("MPMATH_NOGMPY", "1")

import datasets
import pyarrow.parquet
import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig


# ==== 1. The paper ==========================================================================================
@torch.no_grad()
def sample(policy, prompts, k, temperature, max_new_tokens, eos_ids, seeds):
    """tau_1 .. tau_k ~ softmax(logits / temperature) for each prompt, and log pi of every token (engine hf).

    prompts: B lists of token ids. seeds: B ints; a prompt's responses depend on its own seed, not on the rest
    of the batch. temperature 0 is argmax. Returns responses and logprobs, B*k lists each, prompt-major. A
    response includes its end token, unless it was truncated at max_new_tokens.
    """
    device = policy.device
    uniforms = []  # one number per token, drawn on the CPU: the same on every device
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        uniforms.append(torch.rand(k, max_new_tokens, dtype=torch.float64, generator=generator))
    uniforms = torch.cat(uniforms).to(device)  # [B*k, max_new_tokens]
    end = torch.tensor(eos_ids, device=device)

    # the prompts, padded on the left; each is read once and its keys and values are repeated k times
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # [B, P]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # [B, P]
    cache = DynamicCache(config=policy.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = policy(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache,
                    logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(k)
    logits = logits.repeat_interleave(k, 0)  # [B*k, V]
    mask = mask.repeat_interleave(k, 0)  # [B*k, P]

    active = torch.arange(len(mask), device=device)  # rows that have not ended; the others leave the batch
    responses = [[] for _ in range(len(mask))]
    logprobs = [[] for _ in range(len(mask))]
    for t in range(max_new_tokens):
        logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # [active, V]
        if temperature:  # invert the cumulative distribution, whose last value is 1 up to rounding
            cdf = logp.exp().cumsum(-1, dtype=torch.float64)
            u = uniforms[active, t, None] * cdf[:, -1:]  # [active, 1]
            token = torch.searchsorted(cdf, u, right=True).clamp(max=cdf.shape[1] - 1)  # first cdf > u
        else:  # greedy decoding, for the evaluations of train_grpo.py
            token = logp.argmax(-1, keepdim=True)  # [active, 1]
        logp_token = logp.gather(1, token)
        for row, x, logp_x in zip(active.tolist(), token[:, 0].tolist(), logp_token[:, 0].tolist()):
            responses[row].append(x)
            logprobs[row].append(logp_x)
        unfinished = (~torch.isin(token[:, 0], end)).nonzero()[:, 0]
        if len(unfinished) == 0 or t + 1 == max_new_tokens:
            break
        if len(unfinished) < len(active):
            cache.batch_select_indices(unfinished)
            active = active[unfinished]
            token = token[unfinished]
            mask = mask[unfinished]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = policy(token, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                        past_key_values=cache).logits[:, -1]
    return responses, logprobs


def verify(response, answer, verifier):
    """R(tau) in [0, 1]: whether, or how well, the text `response` gives `answer`.

    verifier 'path/to/file.py:function': the number in [0, 1] that your function(response, answer) returns.
    'exact' and 'math' read what follows the last </think>, and of several boxes the last that is not empty.
    'exact': the last \\boxed{} of the response, or else all of it, is the answer up to white space.
    'math': math-verify compares the last box, or else the last expression, with the answer as mathematics;
    a word, a sequence or a date as text (`is_text`). For the answer 0.5, 1/2 is right; 3 - 2 + 4 is accepted
    for 5, even if it only repeats the prompt. Of an answer with '####' (GSM8K) or a box, only that counts.

    >>> verify("so it is \\\\boxed{cab}", "cab", "exact"), verify("It is 0.5.", "reason #### 1/2", "math")
    (1.0, 1.0)
    """
    if verifier not in ("exact", "math"):
        return verify_by_function(response, answer, verifier)  # all of the response
    response = response.rpartition("</think>")[2]
    box = last_box(response)
    if verifier == "exact":
        end = r"\Z" if box is None else "}"
        last = response if box is None else box
        return float(bool(re.match(rf"\s*{re.escape(answer.strip())}\s*" + end, last)))
    gold = gold_answer(answer)
    if isinstance(gold, str):
        return float(plain(answer_in(response)) == gold)
    import math_verify  # here, since it takes a second, and 'exact' does not need it

    last = response.replace("\\$", "") if box is None else as_formula(answer_in(response))
    found = math_verify.parse(last, parsing_timeout=2)  # seconds; usual responses take 0.01 s
    return float(bool(gold) and math_verify.verify(gold, found, timeout_seconds=2))


def stream_seed(*key):
    """A seed for torch.Generator from any key, so that each use of random numbers has its own stream."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")


def collect_file(args, tokenizer, policy, examples, out):
    """Samples and verifies K responses to each of the N prompts in `examples`; writes one rollouts.pt."""
    eos_ids = end_tokens(args.model, tokenizer)
    sample_engine = ENGINES[args.engine]  # `sample` or its vLLM equivalent, `sample_vllm`
    verifying = []  # seconds of each batch

    def sample_batch(batch):
        """{prompt: (tokens, lengths [K], log-probs, rewards [K])} of some prompts, given by their index."""
        prompts = [examples.prompts[i] for i in batch]
        seeds = [stream_seed(args.seed, i) for i in batch]  # i: the prompt's index in `out`
        responses, logprobs = sample_engine(policy, prompts, args.k, args.temperature, args.max_new_tokens,
                                            eos_ids, seeds)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        found = {}
        began = time.perf_counter()
        for place, i in enumerate(batch):
            own = slice(place * args.k, (place + 1) * args.k)
            rewards = rewards_of(texts[own], examples.answers[i], args.verifier, f"example {i + 1}")
            found[i] = as_tensors(responses[own], logprobs[own], rewards)
        verifying.append(time.perf_counter() - began)
        return found

    meta = {"format": FORMAT, "model": args.model, "data": " ".join(examples.sources), "k": args.k,
            "temperature": args.temperature, "max_new_tokens": args.max_new_tokens, "eos_ids": eos_ids,
            "verifier": args.verifier, "seed": args.seed}
    results = []
    if args.k > 0:  # otherwise a test set: prompts and answers only
        settings = [meta, examples.prompts, examples.answers, *fingerprints(args)]
        results = run_batches(sample_batch, plan_sampling(args, examples), out, settings)  # resumes
    if RANK == 0:
        write_rollouts(out, examples, meta, results, verifying)


def main():
    args = parse_arguments()
    device = join_ranks(args.device)
    tokenizer = load_tokenizer(args.model)
    pools = [args.data] if len(args.out) == 1 else [[source] for source in args.data]  # one for each --out
    data = [read_examples(args, tokenizer, sources) for sources in pools]  # bad data fails before any work
    policy = load_engine(args, device, data)
    for examples, out in zip(data, args.out):
        collect_file(args, tokenizer, policy, examples, out)
    remove_parts(args.out)
    leave_ranks(args.engine)


# ==== 2. Faster, same numbers ===============================================================================
# Batches that fill the KV cache, and vLLM in place of `sample`. Without it, `sample` would be called with one
# prompt at a time.

KV_TOKENS = {"hf": 65536, "vllm": 262144}  # default of --kv-tokens: 1.9 and 7.5 GB for a 1.5B Qwen2.5


def plan_sampling(args, examples):
    """Batches of prompts, by their indices, longest first."""
    costs = [len(prompt) + args.max_new_tokens for prompt in examples.prompts]  # of one response
    if args.engine == "hf":
        return batches_by_tokens(costs, args.kv_tokens // args.k)
    # vLLM schedules its cache itself; 1024 responses per batch keep it busy
    return batches_by_tokens(costs, 1024 * max(costs) // args.k)


def batches_by_tokens(lengths, budget):
    """Batches of indices, longest first, of at most `budget` tokens each, with padding to the longest."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def sample_vllm(llm, prompts, k, temperature, max_new_tokens, eos_ids, seeds):
    """Like `sample`, using vLLM (engine vllm). Equal batches with equal seeds give equal responses."""
    from vllm import SamplingParams

    if not llm.reset_prefix_cache():  # its keys and values are those of older weights
        raise RuntimeError("vLLM did not empty its cache")
    settings = [SamplingParams(n=k, seed=seed % 2**62, temperature=temperature, max_tokens=max_new_tokens,
                               ignore_eos=True, stop_token_ids=eos_ids, logprobs=0, detokenize=False)
                for seed in seeds]
    requests = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    responses = []
    logprobs = []
    for request in requests:
        for output in request.outputs:
            responses.append(list(output.token_ids))
            logprobs.append([at[x].logprob for at, x in zip(output.logprobs, output.token_ids)])
    return responses, logprobs


ENGINES = {"hf": sample, "vllm": sample_vllm}


def load_engine(args, device, data):
    """The policy, as the engine takes it: a transformers model or vLLM's engine; None for --k 0."""
    if args.k == 0:
        return None
    policy = load_policy(args.model, device, args.dtype)
    check_sampling(policy)
    if args.engine == "hf":
        return policy
    del policy
    gc.collect()
    torch.cuda.empty_cache()
    longest = max(len(prompt) for examples in data for prompt in examples.prompts)
    return load_vllm(args.model, args.dtype, args.kv_tokens, longest + args.max_new_tokens)


def load_vllm(name, dtype, kv_tokens, context):
    """vLLM in this process. kv_tokens: in its KV cache; context: longest prompt and response together."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where weights can be replaced
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # float32 attention in float32, not in TF32
    gpu = torch.cuda.is_available()
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * width * getattr(torch, dtype).itemsize  # cache bytes
        cache_tokens = max(kv_tokens, 2 * context + 1024)  # vLLM refuses one that cannot hold a long sequence
        with warnings.catch_warnings(action="ignore"):  # from packages that vLLM imports
            from vllm import LLM

            return LLM(name, dtype=dtype, max_model_len=context, logprobs_mode="processed_logprobs",
                       generation_config="vllm", skip_tokenizer_init=True, use_tqdm_on_load=False,
                       kv_cache_memory_bytes=cache_tokens * token,
                       gpu_memory_utilization=0.01,  # free at the start; kv_cache_memory_bytes sets the cache
                       enforce_eager=not gpu, enable_sleep_mode=gpu,
                       distributed_executor_backend="external_launcher" if WORLD > 1 else None)
    except Exception as error:  # no vLLM, or one that cannot run this model here
        fail(name, f"no vLLM engine for it ({error})", "vLLM and a model that it knows",
             "pip install -r requirements-vllm.txt, lower --kv-tokens, or choose --engine hf")


# ==== 3. Files, resuming, bad input =========================================================================
# The command line, data sets, your own verifier, rollouts.pt, batches that survive a kill and are shared by
# torchrun's processes (ranks), one-line errors, and the rules by which `verify` reads an answer. Nothing here
# changes what is sampled from a prompt.

FORMAT = 2  # of rollouts.pt
RANK = int(os.environ.get("RANK", "0"))  # of this process among those that torchrun has started
WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # their number
NOTES = """
A killed run, started again with the same command, resumes after its finished batches. Under torchrun (one
file system) the ranks share the batches. The bytes are the same for any number of ranks with the same number
of threads each (torchrun sets one; some CPUs round differently with more). --engine vllm samples with vLLM in
this process: faster on a GPU, but not bit-reproducible.

--verifier math compares some answers as text, since math-verify would multiply their letters and compare
their parts in any order: words and strings of letters (BA, no solution), letters or words with commas (b, a),
numbers or letters in a row (2 1 3), dates and times (2024-01-05, 3:05 PM). Capitals, LaTeX's fonts and a full
stop do not matter. All others are mathematics: B, 2x, 5 apples, 1/2, and 2, -1, which is 2 and -1 in any
order. For another rule use exact or your own function, which gets the whole response, </think> included.

response_tokens.split(response_lengths.tolist()) gives the responses. --k 0 stores prompts and answers only: a
test set for train_grpo.py --eval.
"""


def parse_arguments():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=NOTES, formatter_class=layout)
    parser.add_argument("--model", required=True, help="behaviour policy: a Hugging Face folder or hub name")
    parser.add_argument("--data", required=True, nargs="+", help="files or hub sets name[:config[:split]]")
    parser.add_argument("--out", required=True, nargs="+", type=Path, help="one for each of --data, or one")
    parser.add_argument("--k", type=int, default=8, help="responses per prompt (8); 0: none")
    parser.add_argument("--temperature", type=float, default=1.0,
                        help="of the sampled distribution (1.0: the policy as it is; the paper has 0.5)")
    parser.add_argument("--max-new-tokens", type=int, default=2048, help="length limit of a response (2048)")
    parser.add_argument("--verifier", default="math",
                        help="math, exact or your own function, path/to/file.py:function (math)")
    parser.add_argument("--prompt-key", nargs="+", default=["prompt", "question", "problem"],
                        help="column of the prompt: the first that the data has (prompt question problem)")
    parser.add_argument("--answer-key", nargs="+", default=["answer", "solution"],
                        help="column of the answer, likewise (answer solution)")
    parser.add_argument("--family-key", default="family", help="column of a prompt's kind, for plots")
    parser.add_argument("--instruction", default="", help="text appended to every string prompt")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT examples of each data set")
    parser.add_argument("--engine", choices=list(ENGINES), default="hf", help="transformers or vLLM (hf)")
    parser.add_argument("--kv-tokens", type=int, help="tokens in the KV cache (hf: 65536, vllm: 262144)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled responses (0)")
    args = parser.parse_args()
    if args.k < 0 or args.temperature <= 0 or args.max_new_tokens < 1:
        fail("--k, --temperature, --max-new-tokens", f"{args.k}, {args.temperature}, {args.max_new_tokens}",
             "k >= 0, temperature > 0, max-new-tokens >= 1", "see --help")
    if len(args.out) not in (1, len(args.data)):
        fail("--out", f"{len(args.out)} names", f"1 or {len(args.data)}", "name one for each of --data")
    check_checkpoint(args.model)
    args.kv_tokens = args.kv_tokens or KV_TOKENS[args.engine]
    if args.verifier not in ("exact", "math"):
        load_function(args.verifier)  # fails early
    return args


def last_box(text):
    """What follows the opening brace of the last \\boxed{ or \\fbox{ that is not empty; None without one."""
    starts = [box.end() for box in re.finditer(r"\\(?:boxed|fbox)\s*\{(?!\s*\})", text)]
    return text[starts[-1]:] if starts else None


def answer_in(text):
    """The last box of a text, or else what follows '####', or else all of it, without currency signs."""
    box = last_box(text)
    if box is None:
        text = text.rpartition("####")[2]
    else:
        text = ""  # of a box without its closing brace
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", box, re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                text = box[:brace.start()]
                break
    text = re.sub(r"\A[^$]*\$([^$]+)\$[\s.]*\Z", r"\1", text.replace("\\$", "").strip())  # the only formula
    without = re.sub(r"\$(?=\s*[\d.])", "", text)
    text = text if "$" in without else without  # $15: dollars
    if re.fullmatch(r"[-+]?\d{1,3}((\\[ ,;:!]|[ ~])\d{3})+(\.\d+)?", text):  # 1\,000
        text = re.sub(r"[^-+\d.]", "", text)
    text = re.sub(r"\A([-+]?[\d.]+)[eE]([-+]?\d+)\Z", r"\1 \\times 10^{\2}", text)
    return re.sub(r"\A([-+]?\d+) (\d+)/(\d+)\Z", r"\1\\frac{\2}{\3}", text)  # 3 1/2


def as_formula(text):
    return text if "$" in text else f"${text}$"


def plain(text):
    """A text without capitals, LaTeX's fonts and spaces, and marks that do not change what it says."""
    text = re.sub(r"\\(?:text|math)[a-z]*|\\mbox|\\[()]|[{}$\"“”]|\.(?!\d)", "", text.casefold())
    text = re.sub(r"\\[ ,;:!]|\\q?quad\b|~", " ", text)
    text = re.sub(r"(?<=[^\W\d_]{2})[!?]", "", " ".join(text.split()))  # n! is a factorial
    text = re.sub(r"\A[\[(]([^,]*)[\])]\Z", r"\1", text)  # (B), [2 1 3]
    return re.sub(r" ?[,;] ?| and | or ", ", ", text)


def is_text(answer):
    """Whether `math` compares an answer as text: words, strings of letters, sequences, dates.

    >>> [is_text(answer) for answer in ("BA", "no solution", "2 1 3", "b, a", "2024-01-05", "3:05 PM")]
    [True, True, True, True, True, True]
    >>> [is_text(answer) for answer in ("B", "2x", "5 apples", "1/2", "2, -1", "x=3", "\\\\pi")]
    [False, False, False, False, False, False, False]
    """
    word = r"[^\W\d_]+['’][^\W\d_]+|[^\W\d_]{3,}(?:-[^\W\d_]{3,})+|[^\W_]+"  # a-b is a difference
    token = rf"[-+]?\d+(?:[-/.:t]\d+)*z?|{word}"
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:/[1-9]\d*)? ?[^\W\d_]*(?: [^\W\d_]+)*"  # and its unit
    ratio = r"\d+:[1-9]\d*"  # 3:05 is a time
    items = plain(answer).split(", ")
    if not all(re.fullmatch(token, part) for part in " ".join(items).split(" ")):
        return False
    letters = len(items) > 1 and not re.search(r"\d", answer)
    return letters or any(len(item) > 1 and not re.fullmatch(f"{number}|{ratio}", item) for item in items)


@lru_cache(maxsize=1000)  # once for all responses to a prompt
def gold_answer(answer):
    """What `math` compares responses with: text, or a list of expressions, empty if the answer has none."""
    gold = answer_in(answer)
    if is_text(gold):
        return plain(gold)
    import math_verify

    return math_verify.parse(as_formula(gold))


class VerifierError(Exception):
    """What your own function did instead of returning a number in [0, 1]."""


def rewards_of(responses, answer, verifier, prompt):
    """R of each response, a text, to one prompt; equal ones are verified once. prompt: named in an error."""
    rewards = {}
    for number, response in enumerate(responses, start=1):
        try:
            if response not in rewards:
                rewards[response] = verify(response, answer, verifier)
        except VerifierError as error:
            fail(verifier, f"{error}, response {number} to {prompt}", "a number in [0, 1]",
                 "fix the function")
    return [rewards[response] for response in responses]


def verify_by_function(response, answer, name):
    """The reward by your own function. name: 'path/to/file.py:function'."""
    try:
        reward = float(load_function(name)(response, answer))
        if not 0 <= reward <= 1:  # or NaN
            raise ValueError(f"it returned {reward}")
        return reward
    except Exception as error:
        raise VerifierError(f"{error!r} for answer {answer[:80]!r} and response {response[:80]!r}") from error


@cache
def load_function(name):
    """The function that 'path/to/file.py:function' names. Runs the file."""
    path, _, function = name.rpartition(":")
    try:
        sys.path.insert(0, str(Path(path).resolve().parent))  # it imports files beside it, as a script does
        spec = importlib.util.spec_from_file_location("users_verifier", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["users_verifier"] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
        return getattr(module, function)
    except Exception as error:  # whatever the user's file raises
        fail(name, f"no such verifier ({error!r})", "math, exact or path/to/file.py:function", "see --help")


def check_checkpoint(name):
    """(vocabulary size, longest sequence) of a checkpoint; refuses a LoRA adapter.

    longrope changes the frequencies of a whole batch if one of its sequences is longer than the model's first
    pre-training had. A gradient must not depend on what shares its batch, so no sequence may be that long.
    """
    if (Path(name) / "adapter_config.json").exists():
        fail(name, "a LoRA adapter", "a whole model", "merge it: peft's AutoPeftModelForCausalLM."
             f"from_pretrained({name!r}).merge_and_unload().save_pretrained(FOLDER)")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
    except Exception as error:  # missing, damaged, of an unknown kind of model
        fail(name, f"no usable config.json ({error})", "a Hugging Face checkpoint", "check --model")
    longest = getattr(config, "max_position_embeddings", None) or sys.maxsize
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):  # some models have them for each type of layer
        if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
            longest = min(longest, parameters["original_max_position_embeddings"])
    return config.vocab_size, longest


def load_policy(name, device, dtype):
    """The policy pi_theta in evaluation mode: dropout would make log-probs differ between passes."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention takes seconds for each new shape
    try:
        policy = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype),
                                                      trust_remote_code=False).to(device).eval()
        if policy._is_stateful:  # Mamba, for example: its state is not in the KV cache that all stages share
            raise ValueError("a recurrent state")
        if not all(parameter.is_floating_point() for parameter in policy.parameters()):
            raise ValueError("quantized weights, which have no gradient")
        return policy
    except Exception as error:  # transformers raises a dozen types here
        fail(name, f"no usable model ({error})", "a causal transformer with a KV cache", "choose another one")


def check_sampling(policy):
    """Refuses a policy whose log-probs while sampling, with a KV cache, are not those of a pass without one.

    It is random enough to refuse what sketch.py and train_grpo.py would refuse, before the costly sampling.
    """
    prompts = [[1, 0, 1], [0, 1, 1, 0, 1]]
    tolerance = 1e-2 if policy.dtype == torch.float32 else 0.1  # of rounding, in deep models
    try:
        responses, sampled = sample(policy, prompts, 2, 1.0, 6, [-1], [0, 1])
        expected = []
        for number, response in enumerate(responses):
            tokens = torch.tensor([prompts[number // 2] + response], device=policy.device)
            with torch.no_grad():
                logp = policy(tokens).logits[0, -7:-1].float().log_softmax(-1)
            expected.append(logp.gather(1, tokens[0, -6:, None])[:, 0].cpu())
        expected = torch.stack(expected)
        if not (torch.tensor(sampled) - expected).norm() <= tolerance * expected.norm():  # or NaN
            raise ValueError("other log-probs with a KV cache than without")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a cache that cannot be repeated, for example
        fail(policy.name_or_path, f"no usable forward pass ({error!r})", "a transformer with a KV cache",
             "choose another model")


def load_tokenizer(name):
    try:
        folder = Path(name)
        if folder.is_dir() and not [*folder.glob("*token*"), *folder.glob("vocab*")]:
            raise OSError("no tokenizer file")  # from which transformers would make an empty tokenizer
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen types here
        fail(name, f"no tokenizer ({error})", "a checkpoint with its tokenizer", "save the tokenizer there")


def end_tokens(name, tokenizer):
    """Sorted ids that end a response: the tokenizer's, and the checkpoint's (chat models have others)."""
    try:
        config = GenerationConfig.from_pretrained(name)
    except OSError:  # a checkpoint without generation_config.json
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(name, trust_remote_code=False))
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids = sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
    return ids or fail(name, "no end token", "one in generation_config.json or the tokenizer", "add it")


@dataclass
class Examples:
    """What one rollouts.pt is made from: N prompts of one or several data sets."""

    sources: list  # names of the data sets
    prompts: list  # N lists of token ids
    answers: list  # N strings
    families: list  # N strings


def read_examples(args, tokenizer, sources):
    """Reads and tokenizes data sets; refuses prompts that leave no room for --max-new-tokens."""
    vocabulary, longest = check_checkpoint(args.model)
    limit = longest - args.max_new_tokens
    examples = Examples(sources, [], [], [])
    for source in sources:
        rows = load_examples(source, args.prompt_key, args.answer_key, args.family_key, args.limit)
        for number, (prompt, answer, family) in enumerate(rows, start=1):
            try:
                tokens = encode_prompt(prompt, args.instruction, tokenizer)
            except Exception as error:  # a template that refuses a role; text that is not Unicode
                fail(source, f"a prompt that cannot be tokenized (example {number}: {error})",
                     "one that the tokenizer and its chat template take", "correct or drop it")
            if not 0 < len(tokens) <= limit:
                fail(source, f"a prompt of {len(tokens)} tokens (example {number})",
                     f"1 to {limit} tokens with --max-new-tokens {args.max_new_tokens}",
                     "drop it or lower --max-new-tokens")
            if max(tokens) >= vocabulary:
                fail(source, f"token {max(tokens)} in the prompt of example {number}",
                     f"ids below {vocabulary}, the model's vocabulary", "use the model's own tokenizer")
            examples.prompts.append(tokens)
            examples.answers.append(answer)
            examples.families.append(family or (source if len(sources) > 1 else ""))
        check_answers(source, examples.answers[-len(rows):], args.verifier)
    return examples


def load_examples(source, prompt_keys, answer_keys, family_key, limit):
    """[(prompt, answer, family)] of a .jsonl or .parquet file or of a hub data set `name[:config[:split]]`.

    Prompt and answer are in the first of the keys that is a column. A list of answers is joined by commas.
    """
    try:
        rows = read_rows(source)
        names = getattr(rows, "column_names", None) or list(dict.fromkeys(key for row in rows for key in row))
        if len(rows) == 0:
            raise ValueError("no example")
    except Exception as error:  # datasets wraps the reason in one that says less
        fail(source, f"unreadable data ({error.__cause__ or error or repr(error)})",
             "a .jsonl or .parquet file that is not empty, or a hub data set", "fix the data")
    columns = []
    for keys in (prompt_keys, answer_keys):
        found = [key for key in keys if key in names]
        if not found:
            fail(source, f"columns {names}", f"a column {' or '.join(keys)}",
                 "set --prompt-key and --answer-key")
        columns.append(found[0])
    examples = []
    for number, row in zip(range(1, (limit or len(rows)) + 1), rows):
        prompt, answer = [row.get(column) for column in columns]
        try:
            check_prompt(prompt)
            answer = answer_text(answer)
        except ValueError as error:
            fail(source, f"{error} in example {number}",
                 f"in {columns}, a text or chat messages up to the user's last, and a text or a number",
                 "correct or drop it; dates are stored as text")
        examples.append((prompt, answer, str(row.get(family_key) or "")))
    return examples


EMPTY = "an empty prompt or answer"


class Number(str):
    """A number as a .jsonl file writes it: 1, 2.50 or 1e-05."""


def read_rows(source):
    """The rows of a data set. The name of a file is no pattern, as it would be for `datasets`."""
    suffix = Path(source).suffix.lower()
    if suffix not in (".jsonl", ".json", ".parquet"):
        name, config, split = (source.split(":", 2) + ["", ""])[:3]
        return datasets.load_dataset(name, config or None, split=split or "train")
    if not Path(source).is_file():
        raise OSError("Unable to find the file")
    if suffix == ".parquet":
        with open(source, "rb") as file:
            return datasets.Dataset(pyarrow.parquet.read_table(file))
    content = Path(source).read_bytes()
    decode = json.JSONDecoder(parse_float=Number, parse_int=Number).decode
    if suffix == ".json" and content.lstrip().startswith(b"["):
        return decode(content.decode())  # one list of objects
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            if line.strip():
                rows.append(dict(decode(line.decode("utf-8-sig"))))
        except (TypeError, ValueError) as error:  # not UTF-8, no JSON, no object
            raise ValueError(f"example {len(rows) + 1}, line {number}: {error}") from None
    return rows


def check_prompt(prompt):
    """Raises ValueError if a prompt is neither a text nor chat messages for the policy to answer."""
    messages = [{"role": "user", "content": prompt}] if type(prompt) is str else prompt
    if not messages:
        raise ValueError(EMPTY)
    if not isinstance(messages, list):
        raise ValueError(f"a prompt of type {type(prompt).__name__}")
    for message in messages:
        if not isinstance(message, dict) or {type(message.get(key)) for key in ("role", "content")} != {str}:
            raise ValueError("a message without role or content as text")
    if messages[-1]["role"] not in ("user", "system", "tool"):
        raise ValueError(f"a last message of role {messages[-1]['role']!r} (it may be the answer)")
    if not messages[-1]["content"].strip():
        raise ValueError(EMPTY)


def answer_text(value):
    """An answer as the data writes it; a number of a typed column is written without an exponent."""
    if isinstance(value, list):
        return ", ".join(answer_text(part) for part in value) or answer_text(None)
    if isinstance(value, float) and math.isfinite(value):
        number = Decimal(int(value)) if value.is_integer() else Decimal(repr(value))  # as short as possible
        value = f"{number:f}"
    if value is None or not str(value).strip():
        raise ValueError(EMPTY)
    if not isinstance(value, (str, int, Decimal)):
        raise ValueError(f"an answer of type {type(value).__name__} ({str(value)[:40]})")
    return json.dumps(value) if isinstance(value, bool) else str(value)


def check_answers(source, answers, verifier):
    """Verifies \\boxed{answer} as a response, for up to 100 evenly spaced answers, and warns of rewards of 0.

    If all are 0, the run ends; not for your own function (20 answers), which may expect another form.
    """
    own_function = verifier not in ("exact", "math")
    tried = range(0, len(answers), math.ceil(len(answers) / (20 if own_function else 100)))
    failed = []
    for i in tried:
        response = "\\boxed{" + (answer_in(answers[i]) if verifier == "math" else answers[i]) + "}"
        if rewards_of([response], answers[i], verifier, f"example {i + 1}, tried before sampling") == [0]:
            failed.append(i)
    if not failed:
        return
    found = (f"{len(failed)} of {len(tried)} answers whose own \\boxed{{answer}} has reward 0, example "
             f"{failed[0] + 1}: {answers[failed[0]][:80]!r}")
    if len(failed) == len(tried) and not own_function:
        fail(source, found, f"answers that the verifier {verifier} can read", "correct them or --verifier")
    if RANK == 0:
        print(f"collect.py: warning: {source}: {found}", file=sys.stderr)


def encode_prompt(prompt, instruction, tokenizer):
    """Token ids of a prompt (a string or chat messages), by the chat template if the tokenizer has one."""
    if isinstance(prompt, str):
        prompt += instruction
        if tokenizer.chat_template is None:
            tokens = tokenizer(prompt).input_ids
            while tokens and tokens[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
                tokens.pop()  # some tokenizers append it: the policy would start after the end
            return tokens
        prompt = [{"role": "user", "content": prompt}]
    elif tokenizer.chat_template is None:
        fail(tokenizer.name_or_path, "no chat template", "one, since a prompt is a list of chat messages",
             "choose a chat model or string prompts")
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True).input_ids


def fingerprints(args):
    """What else must be equal, besides prompts and meta, for finished batches to be used by a resumed run."""
    found = [args.engine, args.dtype, args.kv_tokens]
    weights = sorted(Path(args.model).glob("*model*"))  # none for a hub model, which is known by its name
    for path in [Path(args.verifier.rpartition(":")[0]), *weights]:
        if path.is_file():
            found.append(sha256(path))
    return found


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class LogLines:
    """A file for tqdm where stderr is no terminal: a line for each update, no carriage returns."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        pass


BAR = {} if sys.stderr.isatty() else {"file": LogLines(), "mininterval": 60}


def run_batches(work, plan, out, settings):
    """Saves work(batch) of each batch of a plan in OUT.HASH.parts, HASH of the settings.

    Each rank does every WORLD-th batch, unless its file exists. Returns when all ranks have finished: an
    iterator over the results in the plan's order, which reads one at a time, since all may not fit in memory.
    """
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    folder = out.with_name(f"{out.name}.{digest[:16]}.parts")
    parts = [folder / f"{number}.pt" for number in range(len(plan))]
    if out.is_dir():
        fail(out, "a folder, which cannot be written", "a file to write", "choose another --out")
    lock(out)
    numbers = range(RANK, len(plan), WORLD)
    for number in tqdm(numbers, str(out), unit="batch", delay=1, disable=RANK > 0, **BAR):
        if not parts[number].exists():
            with replacing(parts[number]) as file:
                torch.save(work(plan[number]), file)
    if WORLD > 1:
        torch.distributed.barrier()
    return (torch.load(part, weights_only=True, mmap=True) for part in parts)


LOCKS = {}  # --out: an open file, whose lock ends with this process


def lock(out):
    """One run per --out. If only torchrun was killed, its ranks work on and still hold the lock."""
    if out in LOCKS:
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        LOCKS[out] = open(out.with_name(out.name + ".lock"), "w")
        if RANK == 0:
            fcntl.flock(LOCKS[out], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(out, "another run that is writing it", "one run per --out", "wait or choose another --out")
    except OSError as error:
        fail(out, f"a path that cannot be written ({error})", "a writable place", "choose another --out")
    if WORLD > 1:
        torch.distributed.barrier()


def remove_parts(outs):
    """Removes locks, and finished batches of this and of earlier, unfinished runs that had the same --out."""
    if RANK == 0:
        for out in outs:
            for folder in out.parent.glob(f"{glob.escape(out.name)}.*.parts"):
                shutil.rmtree(folder)
            out.with_name(out.name + ".lock").unlink(missing_ok=True)


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


def as_tensors(responses, logprobs, rewards):
    """A prompt's K responses as in rollouts.pt: flat tokens, lengths [K], flat log-probs, rewards [K]."""
    lengths = [len(response) for response in responses]
    return (torch.tensor(sum(responses, []), dtype=torch.int32), torch.tensor(lengths, dtype=torch.int64),
            torch.tensor(sum(logprobs, [])), torch.tensor(rewards))


def write_rollouts(out, examples, meta, results, verifying):
    """Writes rollouts.pt from the results of sample_batch, and prints a line about it.

    verifying: the seconds that this process has spent on verifying.
    """
    n = len(examples.prompts)
    rows = {i: as_tensors([], [], []) for i in range(n)}  # of --k 0
    for result in results:
        rows |= result
    tokens, lengths, logprobs, rewards = [torch.cat(parts) for parts in zip(*[rows[i] for i in range(n)])]
    rewards = rewards.view(n, meta["k"])
    prompts = [token for prompt in examples.prompts for token in prompt]
    with replacing(out) as file:
        torch.save({"prompt_tokens": torch.tensor(prompts, dtype=torch.int32),
                    "prompt_lengths": torch.tensor([len(prompt) for prompt in examples.prompts]),
                    "response_tokens": tokens, "response_lengths": lengths, "logprobs": logprobs,
                    "rewards": rewards, "answers": examples.answers, "families": examples.families,
                    "meta": meta}, file)
    summary = f"{out}: {n} prompts"
    if meta["k"]:
        unequal = (rewards != rewards[:, :1]).any(1).float().mean()  # these have a gradient in sketch.py
        summary += (f" x {meta['k']} responses, {len(tokens)} tokens; mean reward {rewards.mean():.3f}, "
                    f"{unequal:.0%} of prompts with unequal rewards; {sum(verifying):.1f} s of verifying")
    print(summary)


def join_ranks(device):
    """Joins the other processes of torchrun, silences the libraries, returns this rank's device."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # an unparsable response has reward 0
    if RANK >= WORLD or (WORLD > 1 and "MASTER_ADDR" not in os.environ):
        fail("RANK, WORLD_SIZE", f"{RANK}, {WORLD}", "those that torchrun sets", "unset both")
    if WORLD > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        if device == "cuda":
            return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def leave_ranks(engine="hf"):
    if WORLD > 1 and engine == "hf":  # vLLM does it itself
        torch.distributed.destroy_process_group()


def fail(source, found, expected, hint):
    """Reports wrong input in one line on stderr and exits with code 2."""
    if RANK > 0:
        time.sleep(5)  # torchrun ends this rank if rank 0 has reported the same
    line = f"{Path(sys.argv[0]).name}: error: {source}: found {found}; expected {expected}; {hint}"
    print(" ".join(line.split()), file=sys.stderr)  # an exception's text may have several lines
    raise SystemExit(2)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        fail(f"rank {RANK}", f"too little GPU memory ({error})", "room for the KV cache", "lower --kv-tokens")
