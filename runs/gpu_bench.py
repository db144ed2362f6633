"""Every figure that the kernels' goals need, on one GPU, as one table: goal, what it must be, what it is.

Runs bench.py once for each shape, cheap ones first, and reads what it appended to out/gpu_bench.jsonl. A shape may
take LIMIT seconds and all of them DEADLINE. See gpu_bench.sh.
"""
import json
import os
import subprocess
import sys
import time

BEGIN, LIMIT, DEADLINE = time.monotonic(), 120, 470            # seconds
RESULTS = "out/gpu_bench.jsonl"
LONG = "attention --context=8192 --rows=2 --n_head=16 --n_embd=2048 --seconds=0.3"
TRAIN = "train --context=1024 --vocab_size=50304 --compile=true --seconds=3"
SHAPES = {
    "env": "env --seconds=0.2",
    "errors": "errors",
    "dense": f"{LONG} --repeats=100",
    "packed": f"{LONG} --document=512 --repeats=3",
    "window": f"{LONG} --window=1024 --repeats=3",
    "decode": "attention --context=8192 --rows=64 --n_head=16 --n_kv_head=4 --n_embd=2048 --seconds=0.2 --repeats=0 "
              "--peers=",
    "logprob": "logprob --rows=16 --context=1024 --n_embd=768 --vocab_size=50304 --seconds=0.5",
    "124M, 1 row": "generate --rows=1 --n_layer=12 --n_head=6 --n_embd=768 --vocab_size=50304 --new_tokens=256 "
                   "--seconds=1",
    "350M, 256 rows": "generate --rows=256 --n_layer=24 --n_head=8 --n_embd=1024 --vocab_size=50304 --new_tokens=128 "
                      "--seconds=1 --peers=",
    "124M": f"{TRAIN} --rows=64 --n_layer=12 --n_head=6 --n_embd=768",
    "124M, packed": f"{TRAIN} --rows=64 --n_layer=12 --n_head=6 --n_embd=768 --document=256",
    "350M": f"{TRAIN} --rows=32 --n_layer=24 --n_head=8 --n_embd=1024",
    "1.5B": f"{TRAIN} --rows=16 --n_layer=48 --n_head=25 --n_embd=1600"}


def measure(name, arguments, peers):
    """{what: row} of one call of bench.py; empty, with its last words printed, if it fails."""
    if name == "124M":
        arguments += "".join(f" --{peer}={path}" for peer, path in peers.items() if path)
    before = os.path.getsize(RESULTS) if os.path.exists(RESULTS) else 0
    call = [sys.executable, "bench.py", *arguments.split(), "--dtype=bf16", f"--json={RESULTS}"]
    left = min(LIMIT, DEADLINE - (time.monotonic() - BEGIN))
    if left < 5:
        print(f"{name}: left out, {DEADLINE} s are over", flush=True)
        return {}
    try:
        result = subprocess.run(call, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        print(f"{name}: given up after {left:.0f} s", flush=True)
        return {}
    print(f"\n{name}: python bench.py {arguments}\n{result.stdout}", flush=True)
    if result.returncode:
        print(result.stderr[-2000:], flush=True)
        return {}
    with open(RESULTS, encoding="utf-8") as f:
        f.seek(before)
        return {row["what"]: row for row in map(json.loads, f)}


def goals(found):
    """[(goal, must, figure, the same machine's reference)]; a missing figure is None."""
    def get(shape, what, column, default=None):
        return found[shape].get(what, {}).get(column, default)

    def ms(shape, what):
        forward, backward = get(shape, what, "forward_ms"), get(shape, what, "backward_ms")
        return None if forward is None else forward + backward

    def ratio(a, b):
        return None if a is None or b is None else a / b
    wrong = [what for what, row in found["errors"].items() if row.get("right") != "yes"]
    yield ("attention, decoding and log-probabilities, and gradients, against float64", "right",
           (f"wrong: {'; '.join(wrong)}" if wrong else "right") if found["errors"] else None, "")
    dense = ms("dense", "SDPA, dense")
    yield ("dense causal forward, TFLOP/s", 430, get("dense", "ours, triton", "forward_tflops"),
           f"cuDNN {get('dense', 'SDPA cuDNN, dense', 'forward_tflops')}")
    yield ("deterministic backward, TFLOP/s", 300, get("dense", "ours, triton", "backward_tflops"),
           f"cuDNN {get('dense', 'SDPA cuDNN, dense', 'backward_tflops')}")
    yield ("packed, against varlen_attn", 1.2, ratio(ms("packed", "varlen_attn"), ms("packed", "ours, triton")),
           f"FlexAttention {ms('packed', 'FlexAttention')} ms")
    yield "packed, mean 512, against dense SDPA", 3, ratio(dense, ms("packed", "ours, triton")), f"dense {dense} ms"
    yield "window 1024, against dense SDPA", 2.5, ratio(dense, ms("window", "ours, triton")), f"dense {dense} ms"
    yield "decode, share of copy bandwidth", 0.6, get("decode", "decode, ours", "share_of_copy"), ""
    yield ("backward passes equal to the bit, of 100", "100/100", get("dense", "ours, triton", "equal_backwards"),
           "errors against float64 are in the tables above")
    yield ("log-probabilities, against whole logits", "", ratio(get("logprob", "whole logits", "ms"),
                                                                get("logprob", "ours, auto", "ms")), "")
    for name, must in ("124M", 0.38), ("350M", 0.44), ("1.5B", 0.50):
        rates = (f"{what} {get(name, what, 'tokens_per_second')}" for what in ("ours", "nanoGPT", "nanochat"))
        yield f"training MFU, {name}", must, get(name, "ours", "mfu_sheet"), f"tokens/s: {', '.join(rates)}"
    yield "training on packed rows, 124M, tokens/s", "", get("124M, packed", "ours", "tokens_per_second"), ""
    yield "generation, 124M, 1 row, tokens/s", 3500, get("124M, 1 row", "ours", "tokens_per_second"), ""
    yield "generation, 350M, 256 rows, tokens/s", 150_000, get("350M, 256 rows", "ours", "tokens_per_second"), ""


def main(nanogpt="", nanochat=""):
    os.makedirs("out", exist_ok=True)
    peers = dict(nanogpt=nanogpt, nanochat=nanochat)
    found = {name: measure(name, arguments, peers) for name, arguments in SHAPES.items()}
    print("| goal | must | is | beside it |\n|---|---|---|---|")
    for goal, must, figure, reference in goals(found):
        shown = "not measured" if figure is None else f"{figure:,.4g}" if isinstance(figure, float) else figure
        print(f"| {goal} | {must} | {shown} | {reference} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
