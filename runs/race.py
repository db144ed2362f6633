"""nanoGPT's CPU command and our entries on tinyshakespeare: seconds of whole processes, exact held-out loss.

    python runs/race.py tinyshakespeare.txt[.gz] NANOGPT [ENTRY ...]      entries: nanogpt bytes bpe minutes gpu

Every entry is trained on the first 90 % of the file, tokenizer included, and evaluated on the last 10 %, all of it, in
windows that do not overlap. Our seconds are those of data.py and pretrain.py, imports, evaluation and saving included.
"""
import gzip
import json
import math
import os
import shutil
import subprocess
import sys
import time

SEEDS = (1, 2, 3)
WORK = "out/race"
ENTRIES = {     # name: (arguments of data.py, of pretrain.py)
    "bytes": ("--vocab_size=264", "config/race_bytes.py"),
    "bpe": ("--vocab_size=1536", "config/race_bpe.py"),
    "minutes, bytes": ("--vocab_size=264", "config/race_minutes.py --max_seconds={seconds}"),
    "minutes, bpe": ("--vocab_size=1024", "config/race_minutes_bpe.py --max_seconds={seconds}"),
    "gpu": ("--vocab_size=264", "config/race_gpu.py"),
}
NANOGPT = ("train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=100 "
           "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
           "--dropout=0.0")
EXACT = """
import pickle, sys, numpy, torch
from model import GPT, GPTConfig
saved = torch.load('out-shakespeare-char/ckpt.pt', map_location='cpu', weights_only=False)
model = GPT(GPTConfig(**saved['model_args']))
model.load_state_dict({name.removeprefix('_orig_mod.'): value for name, value in saved['model'].items()})
model.eval()
text = torch.from_numpy(numpy.fromfile('data/shakespeare_char/val.bin', dtype=numpy.uint16).astype(numpy.int64))
rows = (len(text) - 1) // 64
total = 0.0
with torch.no_grad():
    windows = (text[start:start + rows * 64].view(rows, 64).split(256) for start in (0, 1))
    for ids, targets in zip(*windows):
        logits, _ = model(ids, targets)
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction='sum').item()
print(total / rows / 64)
"""


def timed(command, cwd="."):
    """Seconds that a command takes as a whole process; its output goes to the end of out/race/output.txt."""
    with open(f"{WORK}/output.txt", "a") as output:
        begin = time.perf_counter()
        subprocess.run([sys.executable, *command.split()], cwd=cwd, check=True, stdout=output, stderr=output)
        return time.perf_counter() - begin


def race(name, seed, seconds):
    """(seconds, nats per byte) of one of our entries."""
    prepare, train = ENTRIES[name]
    data, out = f"{WORK}/data", f"{WORK}/{name.replace(', ', '-')}-{seed}"
    shutil.rmtree(data, ignore_errors=True)
    spent = timed(f"data.py --sources={WORK}/train.txt --val_sources={WORK}/val.txt {prepare} --out_dir={data}")
    train = train.format(seconds=seconds - spent - 4)               # imports, the last evaluation and saving take these
    spent += timed(f"pretrain.py {train} --data={data} --out_dir={out} --seed={seed} --overwrite=true")
    with open(f"{out}/log.jsonl") as log:
        final = [record for record in map(json.loads, log) if "val_bpb" in record][-1]
    return spent, final["val_bpb"] * math.log(2)


def main(text_path, nanogpt, *wanted):
    os.makedirs(WORK, exist_ok=True)
    with (gzip.open if text_path.endswith(".gz") else open)(text_path, "rb") as f:
        text = f.read()
    for name, part in ("train", text[:int(0.9 * len(text))]), ("val", text[int(0.9 * len(text)):]):
        with open(f"{WORK}/{name}.txt", "wb") as f:
            f.write(part)
    with open(os.path.join(nanogpt, "data/shakespeare_char/input.txt"), "wb") as f:
        f.write(text)

    rows, whole = [], 103.0
    if not wanted or "nanogpt" in wanted:
        timed("data/shakespeare_char/prepare.py", nanogpt)
        whole = timed(NANOGPT, nanogpt)
        loss = float(subprocess.check_output([sys.executable, "-c", EXACT], cwd=nanogpt).split()[-1])
        rows.append(("nanoGPT", [whole], [loss]))
    for name in ENTRIES:
        if not wanted or name.split(",")[0] in wanted:
            results = [race(name, seed, whole) for seed in SEEDS]
            rows.append((name, *map(list, zip(*results))))

    print(f"\n{'entry':16} {'seconds':>26} {'of nanoGPT':>10} {'nats per byte':>26} {'bits per byte':>13}")
    for name, seconds, losses in rows:
        print(f"{name:16} {' '.join(f'{s:.1f}' for s in seconds):>26} {sum(seconds) / len(seconds) / whole:>10.3f} "
              f"{' '.join(f'{x:.4f}' for x in losses):>26} {sum(losses) / len(losses) / math.log(2):>13.4f}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit("usage: bash runs/race.sh TEXT NANOGPT [ENTRY ...]")
    main(*sys.argv[1:])
