"""Stage 1 of CROPI: the behaviour policy answers every prompt K times, once, before any training.

    tau_1 .. tau_K ~ beta(. | s0),    beta = pi_theta(0)

Every later phase reuses these trajectories through the token ratio of sketch.py; nothing is sampled from beta again.
beta is softmax(logits / temperature) and nothing else: no top-p, no top-k, no repetition penalty, nothing inherited from
the checkpoint's generation_config.json but its end tokens. Each token's log beta is stored, so that at theta = theta(0)
every ratio is 1. The end token belongs to the response; a response cut at --max-new-tokens has none.

Reads   --data   local .jsonl or .parquet files, or hub data sets `name[:config[:split]]`. A prompt is a string or a list of
                 chat messages; a chat template is applied where the tokenizer has one.
Writes  --out    one for each of --data, or a single one for all of them together (a pool of several data sets):
                 rollouts.pt, for N prompts with K responses each (torch.load with weights_only=True); ragged arrays are flat
                 with offsets, responses prompt-major (response k of prompt i is number i*K + k):
                     prompt_tokens    int32   [sum of prompt lengths]     prompt_offsets   int64 [N + 1]
                     response_tokens  int32   [sum of response lengths]   response_offsets int64 [N*K + 1]
                     logprobs         float32 [sum of response lengths]   log beta(token | prompt, tokens before it)
                     rewards          float32 [N, K]                      1 = the verifier accepts, 0 = it does not
                     answers, families    list[str], N each (a family is the --family-key column's; where there is none, the
                                          data set's name in a pool of several, else '')
                     meta                 dict: model, temperature, max_new_tokens, eos_ids, verifier, seed, k, data, format
                 --k 0 stores prompts and answers only: a test set for train_grpo.py --eval.

Finished batches lie in OUT.parts until all are there: a killed run, started again, goes on from them. Under torchrun (on
one file system) the batches are dealt out by cost; the bytes are those of one process, whose batches are the same.
--engine vllm samples with vLLM in this process, faster on a GPU (which promises no equal bytes).

Departs from the authors' release: tokens are kept as sampled (re-tokenizing text loses the end token), and log-probs are
those of the distribution sampled from, temperature included.

    python collect.py --model Qwen/Qwen2.5-1.5B-Instruct --data openai/gsm8k:main:train --max-new-tokens 1024 \\
        --instruction ' Put the final answer in \\boxed{}.' --out rollouts.pt
    python collect.py --model runs/toy-world/base --data runs/toy-world/train.jsonl --verifier exact \\
        --max-new-tokens 10 --out train.pt
    torchrun --nproc_per_node 8 collect.py --model MODEL --data DATA --out rollouts.pt --dtype bfloat16
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import sys
import warnings
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import datasets
import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig

FORMAT = 1  # of rollouts.pt
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's


def fail(file, found, expected, mend):
    """Wrong input: one line on stderr, exit code 2."""
    line = f"{Path(sys.argv[0]).name}: error: {file}: found {found}; expected {expected}; {mend}"
    print(" ".join(line.split()), file=sys.stderr)  # an exception's text may have several lines
    raise SystemExit(2)


def load_tokenizer(name):
    try:
        if Path(name).is_dir() and not list(Path(name).glob("*token*")) and not list(Path(name).glob("vocab*")):
            raise OSError("no tokenizer file")  # of which transformers would make an empty tokenizer
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises a dozen types here
        fail(name, f"no tokenizer ({error})", "a checkpoint with its tokenizer", "save the tokenizer into the model's folder")


def load_policy(name, device, dtype):
    """The policy pi_theta in evaluation mode: dropout would make log-probs differ from one pass to the next."""
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).to(device).eval()
    except Exception as error:  # transformers raises a dozen types here
        fail(name, f"no loadable model ({error})", "a Hugging Face causal language model", "check the folder or hub name")


def end_tokens(name, tokenizer):
    """Sorted ids that end a response: the tokenizer's own and the checkpoint's (chat models end turns with another one)."""
    try:
        config = GenerationConfig.from_pretrained(name)
    except OSError:  # a checkpoint without generation_config.json
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(name))
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids = sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
    return ids or fail(name, "no end token", "eos_token_id in generation_config.json or in the tokenizer", "add one")


def load_examples(source, prompt_keys, answer_keys, family_key, limit):
    """[(prompt, answer, family)] of a local .jsonl or .parquet file or of a hub data set `name[:config[:split]]`.

    The prompt's column is the first of prompt_keys that the data has, the answer's likewise.
    """
    path = Path(source)
    local = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(path.suffix)
    if local and not path.is_file():
        fail(source, "no such file", "a .jsonl or .parquet file", "check --data")
    if local and path.stat().st_size == 0:
        fail(source, "an empty file", "at least one example", "check how it was made")
    try:
        if local:
            datasets.disable_progress_bars()
            rows = datasets.load_dataset(local, data_files=source, split="train")
        else:
            name, config, split = (source.split(":", 2) + [None, None])[:3]
            rows = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # datasets wraps the reason: its cause says which line
        fail(source, f"unreadable data ({error.__cause__ or error})", "one JSON object a line, parquet or a hub data set",
             "mend the data")
    prompt_key, answer_key = (next((key for key in keys if key in rows.column_names), None) or fail(
        source, f"columns {rows.column_names}", f"a column {' or '.join(keys)}", "set --prompt-key and --answer-key")
        for keys in (prompt_keys, answer_keys))
    examples = []
    for number, row in enumerate(rows.select(range(min(limit or len(rows), len(rows)))), start=1):
        if row[answer_key] is None or not str(row[answer_key]).strip():
            fail(source, f"an empty answer in example {number}", f"text in '{answer_key}'", "drop the example or answer it")
        if not row[prompt_key]:
            fail(source, f"an empty prompt in example {number}", f"text in '{prompt_key}'", "drop the example")
        examples.append((row[prompt_key], str(row[answer_key]), str(row.get(family_key) or "")))
    return examples or fail(source, "no example", "at least one", "check --data and --limit")


def encode_prompt(prompt, instruction, tokenizer):
    """Token ids of a prompt (a string or chat messages), through the chat template where the tokenizer has one."""
    if isinstance(prompt, str):
        prompt += instruction
        if tokenizer.chat_template is None:
            return tokenizer(prompt).input_ids
        prompt = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids  # the template has written the special tokens


def verify(response, answer, verifier):
    """R(tau) in {0, 1}: does the text `response` give `answer`?

    verifier 'exact': the content of the response's last \\boxed{}, or the whole response, equals the answer but for white
    space around it. 'math': math-verify finds the response's final expression and compares it with the answer as
    mathematics (1/2 = 0.5); of an answer with '####' (GSM8K) only what follows counts.

    >>> verify("so it is \\\\boxed{cab}", "cab", "exact"), verify("It is 0.5.", "reason #### 1/2", "math")
    (1.0, 1.0)
    """
    if verifier == "exact":
        boxed = response.rpartition("\\boxed{")[2].partition("}")[0] if "\\boxed{" in response else response
        return float(boxed.strip() == answer.strip())
    import math_verify  # here: 'exact' does not pay for loading sympy

    gold = answer.rpartition("####")[2].strip()
    gold = math_verify.parse(gold if "\\boxed" in gold or "$" in gold else f"${gold}$")
    last = response[max(response.rfind("\\boxed"), 0):]  # of several boxes math-verify would make a list
    return float(bool(gold) and math_verify.verify(gold, math_verify.parse(last)))


def stream_seed(*key):
    """A seed for torch.Generator out of any key, so that a stream of random numbers belongs to what it is used for."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")


@torch.no_grad()
def sample(policy, prompts, k, temperature, max_new_tokens, eos_ids, seeds):
    """tau_1 .. tau_k ~ softmax(logits / temperature) for each prompt, and log pi of every token. (Engine 'hf'.)

    prompts: B lists of token ids. seeds: B ints; the uniforms that choose a prompt's tokens come from its own seed, so
    that its responses do not depend on what shares the batch. temperature 0 is argmax, for evaluation.
    Returns responses and logprobs, B*k lists each, prompt-major. A response holds its end token, unless it was cut at
    max_new_tokens.
    """
    device, width = policy.device, max(map(len, prompts))
    uniforms = torch.stack([torch.rand(k, max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(s))
                            for s in seeds]).flatten(0, 1).to(device)  # [B*k, max_new_tokens]
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # [B, P], left-padded
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # [B, P]
    cache = DynamicCache(config=policy.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = policy(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits
    cache.batch_repeat_interleave(k)  # a prompt is read once, not k times
    logits, mask = logits[:, -1].repeat_interleave(k, 0), mask.repeat_interleave(k, 0)  # [B*k, V], [B*k, P]

    end = torch.tensor(eos_ids, device=device)
    live = torch.arange(len(mask), device=device)  # rows that have not ended
    drawn = torch.zeros(len(mask), max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(mask), max_new_tokens, device=device)
    lengths = torch.zeros(len(mask), dtype=torch.long, device=device)
    for t in range(max_new_tokens):
        logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # [live, V]
        if temperature:
            cdf = logp.exp().cumsum(-1, dtype=torch.float64)
            token = torch.searchsorted(cdf, uniforms[live, t, None] * cdf[:, -1:], right=True)  # first cdf > u
            token = token.clamp(max=cdf.shape[1] - 1)  # [live, 1]
        else:
            token = logp.argmax(-1, keepdim=True)
        drawn[live, t], logprobs[live, t], lengths[live] = token[:, 0], logp.gather(1, token)[:, 0], t + 1
        going = (~torch.isin(token[:, 0], end)).nonzero()[:, 0]
        if len(going) == 0 or t + 1 == max_new_tokens:
            break
        if len(going) < len(live):  # ended rows leave the batch
            cache.batch_select_indices(going)
            live, token, mask = live[going], token[going], mask[going]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = policy(token, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                        past_key_values=cache).logits[:, -1]
    drawn, logprobs, lengths = drawn.tolist(), logprobs.tolist(), lengths.tolist()
    return [row[:n] for row, n in zip(drawn, lengths)], [row[:n] for row, n in zip(logprobs, lengths)]


def load_vllm(name, dtype, kv_tokens, context):
    """vLLM's engine in this process: sample_vllm takes it in the policy's place.

    dtype: of the weights. kv_tokens: tokens in its KV cache. context: tokens of the longest prompt and response together.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where the weights can be replaced
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # float32 attention in float32, not in TF32
    gpu = torch.cuda.is_available()
    try:
        config = AutoConfig.from_pretrained(name).get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * width * getattr(torch, dtype).itemsize  # bytes of its keys and values
        with warnings.catch_warnings(action="ignore"):  # vLLM's own, of what it imports
            from vllm import LLM

            return LLM(name, dtype=dtype, max_model_len=context, logprobs_mode="processed_logprobs", generation_config="vllm",
                       kv_cache_memory_bytes=max(kv_tokens, 2 * context + 1024) * token, skip_tokenizer_init=True,
                       enforce_eager=not gpu, enable_sleep_mode=gpu, use_tqdm_on_load=False,
                       gpu_memory_utilization=0.01,  # the share that must be free at the start; the cache's size is given
                       distributed_executor_backend="external_launcher" if WORLD > 1 else None)
    except Exception as error:  # no vLLM, or one that cannot run this model here
        fail(name, f"no vLLM engine for it ({error})", "vLLM and a model that it knows",
             "pip install -r requirements-vllm.txt, lower --kv-tokens, or choose --engine hf")


def sample_vllm(llm, prompts, k, temperature, max_new_tokens, eos_ids, seeds):
    """What `sample` does, by vLLM. (Engine 'vllm'.) Equal batches with equal seeds give equal responses."""
    from vllm import SamplingParams

    if not llm.reset_prefix_cache():  # of older weights, or of whatever was asked before
        raise RuntimeError("vLLM did not empty its cache")
    settings = [SamplingParams(n=k, seed=seed % 2**62, temperature=temperature, max_tokens=max_new_tokens, ignore_eos=True,
                               stop_token_ids=eos_ids, logprobs=0, detokenize=False) for seed in seeds]
    requests = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    found = [response for request in requests for response in request.outputs]
    return [list(r.token_ids) for r in found], [[at[x].logprob for at, x in zip(r.logprobs, r.token_ids)] for r in found]


ENGINES = {"hf": sample, "vllm": sample_vllm}


def batches_by_tokens(lengths, budget):
    """Batches of indices, longest first, such that (indices in a batch) x (its greatest length) <= budget tokens."""
    batches, batch = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            batches.append(batch)
            batch = []
        batch.append(i)
    return batches + [batch]


def deal(costs, processes):
    """Which process does what: the costliest first, each to the least loaded. Returns a list of indices for each process."""
    shares, loads = [[] for _ in range(processes)], [0] * processes
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += costs[i]
    return shares


def barrier():
    """Waits for torchrun's other processes."""
    if WORLD > 1:
        torch.distributed.barrier()


def flat(lists, dtype):
    """Ragged lists as one flat tensor and int64 offsets: list i is flat[offsets[i]:offsets[i + 1]]."""
    offsets = torch.tensor([0] + [len(x) for x in lists]).cumsum(0)
    return torch.tensor([x for row in lists for x in row], dtype=dtype), offsets


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


def parts_of(out):
    """The folder OUT.parts, where every finished batch leaves a file until the whole run is done."""
    return out.with_name(out.name + ".parts")


def unfinished(out, settings):
    """parts_of(out), emptied if it was made with other settings."""
    folder, text = parts_of(out), json.dumps(settings)
    note = folder / "settings.json"
    if RANK == 0 and not (note.exists() and note.read_text() == text):
        shutil.rmtree(folder, ignore_errors=True)
        with replacing(note) as file:
            file.write(text.encode())
    barrier()
    return folder


def fingerprint(policy):
    """sha256 of the parameters' names and bytes: says whether two files come of the same policy."""
    digest = hashlib.sha256()
    for name, parameter in sorted(policy.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_prompts(args, tokenizer, sources):
    """The examples of all `sources`, and their prompts as token ids."""
    examples, prompts = [], []
    context = getattr(AutoConfig.from_pretrained(args.model).get_text_config(), "max_position_embeddings", sys.maxsize)
    for source in sources:
        loaded = load_examples(source, args.prompt_key, args.answer_key, args.family_key, args.limit)
        for number, (prompt, answer, family) in enumerate(loaded, start=1):
            examples.append((prompt, answer, family or (source if len(sources) > 1 else "")))
            prompts.append(encode_prompt(prompt, args.instruction, tokenizer))
            if len(prompts[-1]) + args.max_new_tokens > context:
                fail(source, f"a prompt of {len(prompts[-1])} tokens (example {number})", f"at most {context} tokens with "
                     f"--max-new-tokens {args.max_new_tokens}", "drop the example or lower --max-new-tokens")
    return examples, prompts


def collect_file(args, tokenizer, policy, policy_fingerprint, sources, examples, prompts, out):
    """One rollouts.pt. Its parts stay: a run that was killed later on need not sample again."""
    answers = [answer for _, answer, _ in examples]
    eos_ids = end_tokens(args.model, tokenizer)
    n, k = len(prompts), args.k
    meta = {"format": FORMAT, "model": args.model, "data": " ".join(sources), "k": k, "temperature": args.temperature,
            "max_new_tokens": args.max_new_tokens, "eos_ids": eos_ids, "verifier": args.verifier, "seed": args.seed}
    responses, logprobs, rewards = [[]] * (n * k), [[]] * (n * k), torch.zeros(n, k)
    with replacing(out) if RANK == 0 else nullcontext() as file:
        if k:
            costs = [k * (len(p) + args.max_new_tokens) for p in prompts]
            # One plan for all processes. vLLM minds its cache itself: a batch is so many responses that few wait for the last.
            plan = batches_by_tokens(costs, args.kv_tokens if args.engine == "hf" else max(costs) * max(1, 1024 // k))
            mine = deal([len(batch) * costs[batch[0]] for batch in plan], WORLD)[RANK]
            folder = unfinished(out, [meta, stream_seed(prompts, answers), policy_fingerprint, args.engine, args.dtype,
                                      args.kv_tokens])
            progress = tqdm(total=sum(len(plan[i]) for i in mine), desc=f"collect {out.name}", unit="prompt",
                            disable=RANK > 0)
            for batch, part in ((plan[i], folder / f"{i}.pt") for i in mine):
                if not part.exists():
                    drawn, logp = ENGINES[args.engine](policy, [prompts[i] for i in batch], k, args.temperature,
                                                       args.max_new_tokens, eos_ids, [stream_seed(args.seed, i) for i in batch])
                    texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
                    right = [verify(text, answers[batch[j // k]], args.verifier) for j, text in enumerate(texts)]
                    with replacing(part) as part_file:
                        torch.save((drawn, logp, right), part_file)
                progress.update(len(batch))
            progress.close()
            barrier()
            for number, batch in enumerate(plan if RANK == 0 else ()):
                drawn, logp, right = torch.load(folder / f"{number}.pt", weights_only=True)
                for j, i in enumerate(batch):
                    responses[i * k:(i + 1) * k] = drawn[j * k:(j + 1) * k]
                    logprobs[i * k:(i + 1) * k] = logp[j * k:(j + 1) * k]
                    rewards[i] = torch.tensor(right[j * k:(j + 1) * k])
        if RANK > 0:
            return
        prompt_tokens, prompt_offsets = flat(prompts, torch.int32)
        response_tokens, response_offsets = flat(responses, torch.int32)
        rollouts = {"prompt_tokens": prompt_tokens, "prompt_offsets": prompt_offsets, "response_tokens": response_tokens,
                    "response_offsets": response_offsets, "logprobs": flat(logprobs, torch.float32)[0], "rewards": rewards,
                    "answers": answers, "families": [family for _, _, family in examples], "meta": meta}
        torch.save(rollouts, file)
    summary = f"; mean reward {rewards.mean():.3f}, {(rewards.std(1) > 0).float().mean():.0%} of prompts with a " \
              f"reward variance, {len(response_tokens)} response tokens" if k > 1 else ""
    print(f"{out}: {n} prompts x {k} responses{summary}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="behaviour policy: a Hugging Face folder or hub name")
    parser.add_argument("--data", required=True, nargs="+", help=".jsonl, .parquet or hub data set name[:config[:split]]")
    parser.add_argument("--out", required=True, nargs="+", type=Path, help="a rollouts.pt for each of --data, or one for all")
    parser.add_argument("--k", type=int, default=8, help="responses a prompt (8); 0 stores prompts and answers only")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampled distribution (1.0)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="length limit of a response (1024)")
    parser.add_argument("--verifier", choices=["math", "exact"], default="math", help="how answers are compared (math)")
    parser.add_argument("--prompt-key", nargs="+", default=["prompt", "question", "problem"],
                        help="column of the prompt: the first that the data has (prompt question problem)")
    parser.add_argument("--answer-key", nargs="+", default=["answer", "solution"],
                        help="column of the answer, likewise (answer solution)")
    parser.add_argument("--family-key", default="family", help="column with a prompt's kind, for plots only (family)")
    parser.add_argument("--instruction", default="", help="text appended to every string prompt")
    parser.add_argument("--limit", type=int, help="use the first LIMIT examples of each data set only")
    parser.add_argument("--engine", choices=list(ENGINES), default="hf", help="what samples: transformers or vLLM (hf)")
    parser.add_argument("--kv-tokens", type=int, default=65536, help="tokens in the KV cache at once (65536)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights (float32)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.k < 0 or args.temperature <= 0 or args.max_new_tokens < 1:
        parser.error("--k must be >= 0, --temperature > 0 and --max-new-tokens >= 1")
    if len(args.out) not in (1, len(args.data)):
        parser.error("--out must name one file for each of --data, or a single one")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # an unparsable response is a wrong one, not news
    if WORLD > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        args.device += f":{os.environ['LOCAL_RANK']}" if args.device == "cuda" else ""
    tokenizer = load_tokenizer(args.model)
    files = [(args.data, args.out[0])] if len(args.out) == 1 else [([data], out) for data, out in zip(args.data, args.out)]
    files = [(sources, *read_prompts(args, tokenizer, sources), out) for sources, out in files]
    policy = load_policy(args.model, args.device if args.engine == "hf" else "cpu", args.dtype) if args.k else None
    policy_fingerprint = fingerprint(policy) if args.k else None
    if args.engine == "vllm" and args.k:
        context = max(len(prompt) for *_, prompts, _ in files for prompt in prompts) + args.max_new_tokens
        policy = load_vllm(args.model, args.dtype, args.kv_tokens, context)
    for file in files:
        collect_file(args, tokenizer, policy, policy_fingerprint, *file)
    barrier()
    for out in args.out if RANK == 0 else ():
        shutil.rmtree(parts_of(out), ignore_errors=True)
    if WORLD > 1 and args.engine == "hf":  # vLLM does it itself
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
