"""What a commit changed, measured beside it in turn: tokens/s of packed rows and of pretraining, memory of a step.

    python runs/before.py COMMIT TEXT [ROUNDS]

6 layers, 384 wide, 6 heads, 4,096 pieces, bf16. Packed: 4 rows of 1,024 tokens, documents of exponentially distributed
length, mean 128; forward and backward, the best of ten. Pretraining: pretrain.py on TEXT, 8 rows of 256 tokens a step,
AdamW; the median of the steps that it logs. Memory: a forward and backward pass of 2 layers, 256 wide, at vocabulary
50,304, 8 rows of 1,024 tokens, fp32; the most bytes of tensors at once beyond those before it. The two take turns three
times in a round and the best of each counts, since other work on the machine only ever slows them down.
"""
import itertools
import json
import os
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WORK = f"{ROOT}/out/before"
TURNS = 3


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
    for _ in range(11):
        begin = time.perf_counter()
        model(ids, targets, torch.tensor(ends, dtype=torch.int32)).mean().backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - begin)
    return 4096 / min(seconds[1:])


def memory():
    import torch

    from model import GPT, Config
    torch.manual_seed(0)
    model, ids = GPT(Config(50304, n_layer=2, n_head=4, n_embd=256, context=1024)), torch.randint(50304, (8, 1025))
    for _ in range(2):                                  # the first one fills caches
        model.zero_grad()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(ids[:, :-1], ids[:, 1:]).mean().backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)) / 2 ** 20


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

    def figure(name, place):
        if name == "pretraining":
            return pretraining(place)
        return float(subprocess.check_output([sys.executable, __file__, name], text=True, cwd=place,
                                             env={**os.environ, "PYTHONPATH": place}).split()[-1])
    for i in range(int(rounds)):
        for name, unit, best in (("packed", "tokens/s", max), ("pretraining", "tokens/s", max), ("memory", "MiB", min)):
            turns = [[figure(name, place) for place in (tree, ROOT)] for _ in range(1 if name == "memory" else TURNS)]
            then, now = map(best, zip(*turns))
            print(f"round {i}, {name}: {then:,.0f} {unit} at {commit}, {now:,.0f} now: {now / then:.2f}x (by turn "
                  f"{', '.join(f'{b / a:.2f}' for a, b in turns)})", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        sys.path[0] = os.environ["PYTHONPATH"]         # not runs/
        print(globals()[sys.argv[1]]())
    elif len(sys.argv) > 2:
        main(*sys.argv[1:])
    else:
        raise SystemExit("usage: bash runs/before.sh COMMIT TEXT [ROUNDS]")
