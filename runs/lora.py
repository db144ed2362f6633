"""LoRA of rank 8 beside full finetuning on Alpaca: held-out loss, and bytes of gradients and optimizer state.

    python runs/lora.py TEXT ALPACA [PRETRAIN_SECONDS [STEPS]]

A base model (4 layers, 256 wide, 4,096 pieces, context 256) is pretrained on TEXT for a while; both then train on the
same chats for as many steps, side by side with one thread each. Neither learning rate was swept.
"""
import json
import os
import subprocess
import sys

import torch

WORK = "out/lora_speed"
METHODS = {"full": ["--lr=1e-3"], "lora": ["--method=lora", "--lora_rank=8", "--lora_targets=all,lm_head", "--lr=1e-2"]}


def call(*command, **environment):
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, env={**os.environ, **environment})


def main(text, alpaca, seconds="90", steps="120"):
    os.makedirs(WORK, exist_ok=True)
    for command in (["data.py", f"--sources={text}", "--vocab_size=4096", f"--out_dir={WORK}/text", "--overwrite=true"],
                    ["pretrain.py", f"--data={WORK}/text", f"--out_dir={WORK}/base", "--overwrite=true",
                     "--context=256", "--rows_per_step=8", "--n_layer=4", "--n_head=4", "--n_embd=256",
                     "--max_steps=100000", f"--max_seconds={seconds}", "--eval_every=100000"],
                    ["data.py", "--kind=chats", f"--sources={alpaca}", f"--tokenizer={WORK}/base", "--context=256",
                     f"--out_dir={WORK}/chats", "--overwrite=true"]):
        if call(*command).wait():
            raise SystemExit(f"{command[0]} failed")
    runs = {name: call("sft.py", f"--data={WORK}/chats", f"--init_from={WORK}/base", f"--out_dir={WORK}/{name}",
                       "--overwrite=true", "--rows_per_step=8", f"--max_steps={steps}", "--eval_every=100000",
                       "--eval_examples=400", "--samples=0", *flags, OMP_NUM_THREADS="1")
            for name, flags in METHODS.items()}
    if any([run.wait() for run in runs.values()]):
        raise SystemExit("sft.py failed")
    for name in METHODS:
        with open(f"{WORK}/{name}/log.jsonl") as log:
            losses = [record["eval_loss"] for record in map(json.loads, log) if "eval_loss" in record]
        optimizers = torch.load(f"{WORK}/{name}/resume/state.pt", weights_only=True)["optimizer"]
        moments = [tensor for optimizer in optimizers for entry in optimizer["state"].values()
                   for tensor in entry.values() if tensor.dim()]
        held = sum(tensor.nbytes for tensor in moments)
        print(f"{name}: {losses[0]:.4f} to {losses[-1]:.4f} nats per held-out trained token; optimizer "
              f"{held / 2 ** 20:.2f} MiB, gradients {held / 2 / 2 ** 20:.2f} MiB")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit("usage: bash runs/lora.sh TEXT ALPACA_JSONL [PRETRAIN_SECONDS [STEPS]]")
    main(*sys.argv[1:])
