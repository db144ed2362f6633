"""Training tokens/s of nanoGPT's CPU path and of pretrain.py (bf16 and fp32), each for 30 steps, in turn.

    python runs/throughput.py tinyshakespeare.txt NANOGPT [ROUNDS]

The median step of each process counts; the first five warm up. nanoGPT's 65 characters and our 264 ids (384 rows in the
model) both make the head a fraction of the work: parameters without embeddings are 10.6M and 10.8M.
"""
import json
import os
import re
import shutil
import statistics
import subprocess
import sys

WORK = "out/throughput"
SHAPE = "--n_layer=6 --n_head=6 --n_embd=384"
THEIRS = ("train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=1 --log_interval=1 "
          f"--block_size=256 --batch_size=8 {SHAPE} --max_iters=30 --lr_decay_iters=30 --dropout=0.0")
OURS = (f"pretrain.py --data={WORK}/data --out_dir={WORK}/model --overwrite=true --context=256 --rows_per_step=8 "
        f"{SHAPE} --max_steps=30 --eval_tokens=2048 --sample_tokens=0 --curves=false "
        "--optimizer=adamw --lr=0.001 --embed_lr=0")


def theirs(nanogpt):
    output = subprocess.run([sys.executable, *THEIRS.split()], cwd=nanogpt, check=True, capture_output=True, text=True)
    milliseconds = [float(ms) for ms in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", output.stdout)]
    return 8 * 256 / (statistics.median(milliseconds[5:]) / 1000)


def ours(flags, metric="tokens_per_second"):
    """The metric of every step of a run."""
    subprocess.run([sys.executable, *OURS.split(), *flags], check=True, capture_output=True)
    with open(f"{WORK}/model/log.jsonl") as log:
        return [record[metric] for record in map(json.loads, log) if "loss" in record]


def main(text_path, nanogpt, rounds=3):
    shutil.rmtree(WORK, ignore_errors=True)
    shutil.copy(text_path, os.path.join(nanogpt, "data/shakespeare_char/input.txt"))
    subprocess.run([sys.executable, "data/shakespeare_char/prepare.py"], cwd=nanogpt, check=True, capture_output=True)
    subprocess.run([sys.executable, "data.py", f"--sources={text_path}", "--vocab_size=264", f"--out_dir={WORK}/data"],
                   check=True, capture_output=True)
    for i in range(int(rounds)):
        base = theirs(nanogpt)
        muon = ["--dtype=bf16", "--optimizer=muon"]
        rates = {name: statistics.median(ours(flags)[5:]) for name, flags in
                 (("bf16", ["--dtype=bf16"]), ("fp32", ["--dtype=fp32"]), ("bf16, Muon", muon))}
        print(f"round {i}: nanoGPT {base:,.0f} tokens/s; " +
              "; ".join(f"{name} {rate:,.0f} = {rate / base:.2f}x" for name, rate in rates.items()), flush=True)

    bf16, fp32, other = (ours([*flags, "--max_steps=60"], "loss") for flags in
                         (["--dtype=bf16"], ["--dtype=fp32"], ["--dtype=bf16", "--seed=1338"]))
    for name, losses in ("bf16 and fp32", fp32), ("two seeds", other):
        apart = [abs(a - b) for a, b in zip(bf16, losses)]
        print(f"loss curves of {name} over 60 steps: {statistics.mean(apart):.4f} nats apart in the mean, "
              f"{max(apart):.4f} at most; over the last 20 steps the means differ by "
              f"{statistics.mean(bf16[-20:]) - statistics.mean(losses[-20:]):+.4f}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit("usage: bash runs/throughput.sh TEXT NANOGPT [ROUNDS]")
    main(*sys.argv[1:])
