"""Tokens/s of generation, each entry in a process of its own, in turn: ours, transformers, nanoGPT, FK.

    python runs/generate.py all GSM8K_TRAIN_JSONL [NANOGPT [FK [ROUNDS]]]
    python runs/generate.py ours bf16 32            one entry: 1 or 32 rows of 512 new tokens, or prompts, or equal
    python runs/generate.py gpu                     decoding on a CUDA GPU, three sizes

Random weights, the same for ours and transformers (6 layers, 384 wide, 6 heads, 4,096 pieces, 13.8M parameters, written
as a directory that both open); the peers' models have the same layers, width and vocabulary, nanoGPT's the context of
256 of its configuration of this size, beyond which it forgets; its 32 rows get 128 new tokens only. Stop tokens are
off, so that every row has its full length. Imports, loading and a short warm-up are not counted.
"""
import importlib.util
import json
import os
import subprocess
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
WORK = "out/generate"
NEW = 512
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def save_random_model(tokenizer, path):
    """The model of 13.8M parameters that all entries use, written with the tokenizer."""
    from model import GPT, Config
    torch.manual_seed(0)
    model = GPT(Config(4096, n_layer=6, n_head=6, n_embd=384, n_hidden=1024, context=1024, eos_id=tokenizer.eot_id,
                       pad_id=tokenizer.pad_id))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02)
    model.save(path)
    tokenizer.save(path)
    return model


def setup(gsm8k):
    """Writes the model directory and the prompts' ids: ragged ones, and as many of equal lengths from the same text."""
    from sources import json_rows
    from tokenizer import Tokenizer
    questions = [row["question"] for row, _, _ in json_rows(gsm8k, "error", {})]
    tokenizer = Tokenizer.train(questions, 4096)
    model = save_random_model(tokenizer, f"{WORK}/model")
    ragged = [ids.tolist() for ids in tokenizer.encode_batch([f"Question: {q}\nAnswer:" for q in questions[:512]])]
    tokens, mean = sum(ragged, []), sum(map(len, ragged)) // 512
    equal = [tokens[i * mean:(i + 1) * mean] for i in range(512)]
    with open(f"{WORK}/prompts.json", "w") as f:
        json.dump({"prompts": ragged, "equal": equal}, f)
    print(f"{model.config.n_params() / 1e6:.1f}M parameters; 512 prompts of {min(map(len, ragged))} to "
          f"{max(map(len, ragged))} tokens, {mean} in the mean", flush=True)


def work(what):
    """(prompts, new tokens of each) of an entry."""
    if what in ("prompts", "equal"):
        with open(f"{WORK}/prompts.json") as f:
            return json.load(f)[what], 64
    return [[5]] * int(what), NEW


def ours(dtype, what):
    import common
    import engine
    from model import GPT
    common.keep_freed_memory()
    model = GPT.load(f"{WORK}/model")
    model.model.dtype = DTYPES[dtype]
    prompts, new = work(what)
    engine.generate(model, prompts[:4], max_new_tokens=8, stop=())
    begin = time.perf_counter()
    samples = engine.generate(model, prompts, max_new_tokens=new, stop=(), max_batch=64)
    return sum(len(sample.tokens) for sample in samples) / (time.perf_counter() - begin)


def theirs(dtype, what):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(f"{WORK}/model", dtype=DTYPES[dtype])
    prompts, new = work(what)
    model.generation_config.eos_token_id = None             # no stop, and nothing to compute for it
    options = dict(do_sample=True, temperature=1.0, top_k=0)

    def generate(batch, new):
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        with torch.inference_mode():
            return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)
    generate(prompts[:4], 8)
    prompts = sorted(prompts, key=len)
    begin = time.perf_counter()
    for i in range(0, len(prompts), 64):
        assert generate(prompts[i:i + 64], new).size(1) == new + len(prompts[min(i + 63, len(prompts) - 1)])
    return len(prompts) * new / (time.perf_counter() - begin)


def nanogpt(dtype, what, path):
    spec = importlib.util.spec_from_file_location("nanogpt", os.path.join(path, "model.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = dict(block_size=256, vocab_size=4096, n_layer=6, n_head=6, n_embd=384, dropout=0.0, bias=False)
    model = module.GPT(module.GPTConfig(**shape)).eval()
    prompts, new = work(what)
    new = new if len(prompts) == 1 else 128         # without a cache 512 for 32 rows take ten minutes; this flatters it
    with torch.no_grad(), torch.autocast("cpu", DTYPES[dtype], enabled=dtype == "bf16"):
        model.generate(torch.tensor(prompts), 8)
        begin = time.perf_counter()
        model.generate(torch.tensor(prompts), new, temperature=0.8, top_k=200)      # as its sample.py does
    return len(prompts) * new / (time.perf_counter() - begin)


def fk(dtype, what, path):
    sys.path.insert(0, path)
    from src.models.transformer import Transformer
    from src.post_training.rollout import rollout_prompts
    model = Transformer(n_head=6, n_embed=384, context_length=1024, vocab_size=4096, N_BLOCKS=6).to(DTYPES[dtype])
    prompts, new = work(what)
    prompts = sorted(prompts, key=len)[224:288]         # an eighth of them from the middle: the same rows per length
    rollout_prompts(model, prompts[:4], 8, device="cpu", pad_id=0)
    begin = time.perf_counter()
    rollout_prompts(model, prompts, new, device="cpu", pad_id=0)
    return len(prompts) * new / (time.perf_counter() - begin)


def gpu():
    """Decoding on a CUDA GPU in bf16: tokens/s of three sizes, and the share of the copy bandwidth that reading the
    weights (and at 256 rows the cache) takes."""
    import engine
    from model import GPT, Config
    big = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    bandwidth = (2 << 30) / min(seconds(big[:1 << 30].copy_, big[1 << 30:]) for _ in range(20))
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    for name, layers, heads, width, batch in (("124M", 12, 12, 768, 1), ("350M", 24, 16, 1024, 256),
                                              ("1.5B", 48, 25, 1600, 1), ("1.5B", 48, 25, 1600, 32)):
        with torch.device("cuda"):
            model = GPT(Config(50304, n_layer=layers, n_head=heads, n_embd=width, context=1024)).bfloat16()
        model.model.dtype = torch.bfloat16
        options = dict(stop=(), max_batch=batch)
        engine.generate(model, [[5]] * batch, max_new_tokens=8, **options)
        took = seconds(engine.generate, model, [[5]] * batch, max_new_tokens=NEW, **options)
        cache = 2 * 2 * layers * width * batch * NEW / 2
        read = (2 * model.config.n_params(embeddings=False) + cache) * NEW / took / bandwidth
        print(f"{name}, {batch} rows of {NEW}: {batch * NEW / took:,.0f} tokens/s, {read:.0%} of the copy bandwidth",
              flush=True)


def seconds(function, *arguments, **options):
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function(*arguments, **options)
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def rate(*entry):
    output = subprocess.run([sys.executable, __file__, *entry], cwd=ROOT, capture_output=True, text=True)
    if output.returncode:
        raise SystemExit(f"{' '.join(entry)} failed:\n{output.stderr}")
    return float(output.stdout.split()[-1])


def main(gsm8k, nano="", fk_path="", rounds=1):
    os.makedirs(WORK, exist_ok=True)
    setup(gsm8k)
    for i in range(int(rounds)):
        for rows in ("1", "32"):
            rates = {f"{name} {dtype}": rate(name, dtype, rows) for dtype in DTYPES for name in ("theirs", "ours")}
            if nano and i == 0:
                rates["nanoGPT fp32"] = rate("nanogpt", "fp32", rows, nano)
            report(f"round {i}, {rows} rows of {NEW}", rates)
        rates = {f"{name} bf16": rate(name, "bf16", "prompts") for name in ("theirs", "ours")}  # fp32 is slower in both
        rates["ours bf16 equal lengths"] = rate("ours", "bf16", "equal")
        if fk_path and i == 0:
            rates["FK fp32"] = rate("fk", "fp32", "prompts", fk_path)
        report(f"round {i}, 512 ragged prompts", rates)


def report(name, rates):
    best = max(value for key, value in rates.items() if key.startswith("theirs"))
    ours = max(value for key, value in rates.items() if key in ("ours bf16", "ours fp32"))
    said = "; ".join(f"{key} {value:,.0f}" for key, value in rates.items())
    print(f"{name}: {said.replace('theirs', 'transformers')}")
    ratios = [f"{ours / best:.2f}x transformers at its best"]
    ratios += [f"{ours / value:.1f}x {key}" for key, value in rates.items() if key.startswith(("nano", "FK"))]
    equal = [value for key, value in rates.items() if "equal" in key]
    if equal:
        ratios.append(f"{ours / max(equal):.2f} of equal lengths")
    print("  ours at its best: " + "; ".join(ratios), flush=True)


if __name__ == "__main__":
    entry, *arguments = sys.argv[1:] or ["help"]
    if entry == "all" and arguments:
        main(*arguments)
    elif entry == "gpu":
        gpu()
    elif entry in ("ours", "theirs", "nanogpt", "fk"):
        print(globals()[entry](*arguments))
    else:
        raise SystemExit("usage: bash runs/generate.sh GSM8K_TRAIN_JSONL [NANOGPT [FK [ROUNDS]]]")
