"""What a commit changed, measured beside it in turn: tokens/s of packed rows and of pretraining, memory of a step.

    python runs/before.py COMMIT TEXT [ROUNDS]

6 layers, 384 wide, 6 heads, 4,096 pieces, bf16. Packed: 4 rows of 1,024 tokens, documents of exponentially distributed
length, mean 128; forward and backward, the best of five. Pretraining: pretrain.py on TEXT, 8 rows of 256 tokens a step,
AdamW; the median of the steps that it logs. Memory: a forward and backward pass of 2 layers, 256 wide, at vocabulary
50,304, 8 rows of 1,024 tokens; its peak less what the process held before it.
"""
import json
import os
import resource
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WORK = f"{ROOT}/out/before"


def packed():
    import numpy as np
    import torch

    import common
    from model import GPT, Config
    common.keep_freed_memory()
    torch.manual_seed(0)
    model = GPT(Config(4096, n_layer=6, n_head=6, n_embd=384, context=1024))
    model.model.dtype = torch.bfloat16
    generator, ends = np.random.default_rng(0), [0]
    while ends[-1] < 4096:
        ends.append(min((ends[-1] // 1024 + 1) * 1024, ends[-1] + max(8, int(generator.exponential(128)))))
    ids, targets = torch.randint(4096, (2, 4, 1024))
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        model(ids, targets, torch.tensor(ends, dtype=torch.int32)).mean().backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - begin)
    return 4096 / min(seconds[1:])


def memory():
    import torch

    import common
    from model import GPT, Config
    common.keep_freed_memory()
    torch.manual_seed(0)
    model, ids = GPT(Config(50304, n_layer=2, n_head=4, n_embd=256, context=1024)), torch.randint(50304, (8, 1025))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model(ids[:, :-1], ids[:, 1:]).mean().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 10


def pretraining(tree):
    out = f"{WORK}/pretrain"
    subprocess.run([sys.executable, "pretrain.py", f"--data={WORK}/text", f"--out_dir={out}", "--overwrite=true",
                    "--n_layer=6", "--n_head=6", "--n_embd=384", "--context=256", "--rows_per_step=8", "--max_steps=60",
                    "--eval_every=1000", "--eval_tokens=2048", "--curves=false", "--optimizer=adamw", "--dtype=bf16",
                    "--max_seconds=0"], cwd=tree, check=True, capture_output=True)
    with open(f"{out}/log.jsonl") as log:
        rates = [record["tokens_per_second"] for record in map(json.loads, log) if "tokens_per_second" in record]
    return statistics.median(rates[5:])


def main(commit, text, rounds=1):
    tree = f"{WORK}/tree"
    if not os.path.exists(tree):
        subprocess.run(["git", "clone", "-q", ROOT, tree], check=True)
    subprocess.run(["git", "checkout", "-q", commit], cwd=tree, check=True)
    if not os.path.exists(f"{WORK}/text/train.h5"):
        subprocess.run([sys.executable, "data.py", f"--sources={text}", "--vocab_size=4096", f"--out_dir={WORK}/text"],
                       cwd=ROOT, check=True, capture_output=True)
    for i in range(int(rounds)):
        for name, unit in (("packed", "tokens/s"), ("pretraining", "tokens/s"), ("memory", "MiB")):
            found = []
            for place in (tree, ROOT):
                if name == "pretraining":
                    found.append(pretraining(place))
                else:
                    output = subprocess.check_output([sys.executable, __file__, name], text=True,
                                                     env={**os.environ, "PYTHONPATH": place}, cwd=place)
                    found.append(float(output.split()[-1]))
            print(f"round {i}, {name}: {found[0]:,.0f} {unit} at {commit}, {found[1]:,.0f} now: "
                  f"{found[1] / found[0]:.2f}x", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        sys.path[0] = os.environ["PYTHONPATH"]         # not runs/
        print(globals()[sys.argv[1]]())
    elif len(sys.argv) > 2:
        main(*sys.argv[1:])
    else:
        raise SystemExit("usage: bash runs/before.sh COMMIT TEXT [ROUNDS]")
