"""Finetuning on Alpaca and GSM8K: trained tokens/s beside trl's SFTTrainer, in turn; loss curves on equal batches.

    python runs/sft.py all ALPACA GSM8K_TRAIN [ROUNDS]
    python runs/sft.py ours packed              one entry: packed or padded
    python runs/sft.py trl padded 8             one entry: padded, grouped (by length) or packed; chats or rows a batch

Random weights, the same for both (6 layers, 384 wide, 6 heads, 4,096 pieces, 13.8M parameters, context 512), bf16 and
AdamW in both. A step's rate is its trained tokens by its seconds; the median step counts, the first five warm up. Ours
runs 8 rows a step: packed ones of 512 tokens, or a chat each, padded to the longest of the batch.
"""
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
WORK = "out/sft_speed"
CONTEXT, STEPS, WARMUP = 512, 30, 5


def setup(alpaca, gsm8k):
    from generate import save_random_model

    from formats import parse_chats
    from tokenizer import Tokenizer
    chats = (chat[0] for source in parse_chats(f"{alpaca},{gsm8k}") for chat in source.chats(Counter()))
    texts = [message["content"] for chat, _ in zip(chats, range(60_000)) for message in chat]
    save_random_model(Tokenizer.train(texts, 4096), f"{WORK}/model")
    command = ["data.py", "--kind=chats", f"--sources={alpaca},{gsm8k}", f"--tokenizer={WORK}/model",
               f"--out_dir={WORK}/data", f"--context={CONTEXT}", "--overwrite=true"]
    print(subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout, end="")


def ours(kind, *flags):
    """The records of every step of a run of sft.py."""
    command = ["sft.py", f"--data={WORK}/data", f"--init_from={WORK}/model", f"--out_dir={WORK}/{kind}",
               "--overwrite=true", f"--context={CONTEXT}", f"--packing={kind == 'packed'}", "--rows_per_step=8",
               f"--max_steps={STEPS}", "--eval_every=1000", "--eval_examples=8", "--samples=0", "--curves=false",
               "--schedule=constant", "--warmup_steps=0", *flags]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    with open(f"{WORK}/{kind}/log.jsonl") as log:
        return [record for record in map(json.loads, log) if "loss" in record]


def trl(kind, batch=8, dtype="bf16"):
    """[(loss, trained tokens, seconds)] of every step of trl's SFTTrainer, on the chats of our padded run in order."""
    import datasets
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from chats import ChatBatches
    from tokenizer import Tokenizer
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    batch = int(batch)
    tokenizer = Tokenizer.load(f"{WORK}/model")
    batches = ChatBatches(f"{WORK}/data", "train", 8, 8, CONTEXT, 1337, tokenizer=tokenizer, packing=False)
    chats, rows = batches.chats, []
    for row in batches.epoch_rows(0)[:STEPS * batch * (8 if kind == "packed" else 1)]:
        place = slice(chats.offsets[row[0]], chats.offsets[row[0] + 1])
        ids, mask = chats.tokens[place].astype(np.int64), chats.mask[place]
        rows.append({"input_ids": ids.tolist(), "labels": np.where(mask, ids, -100).tolist()})
    steps = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.begin = time.perf_counter()

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:
                steps.append((logs["loss"], trained[-1], time.perf_counter() - self.begin))

    trained = []

    class Counted(SFTTrainer):
        def compute_loss(self, model, inputs, *arguments, **options):
            trained.append(int((inputs["labels"] != -100).sum()))
            return super().compute_loss(model, inputs, *arguments, **options)

    strategy = {"padded": "sequential", "grouped": "group_by_length", "packed": "sequential"}[kind]
    config = SFTConfig(output_dir=f"{WORK}/trl", report_to="none", bf16=dtype == "bf16", use_cpu=True, max_steps=STEPS,
                       gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, logging_steps=1,
                       per_device_train_batch_size=batch, max_length=CONTEXT, packing=kind == "packed",
                       learning_rate=5e-4, lr_scheduler_type="constant", adam_beta2=0.95, weight_decay=0.0,
                       train_sampling_strategy=strategy, max_grad_norm=1.0)
    model = AutoModelForCausalLM.from_pretrained(f"{WORK}/model", dtype=torch.float32)
    trainer = Counted(model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), callbacks=[Clock()],
                      processing_class=AutoTokenizer.from_pretrained(f"{WORK}/model"))
    with open(os.devnull, "w") as silent:
        sys.stdout, before = silent, sys.stdout
        trainer.train()
        sys.stdout = before
    return steps


def entry(*arguments):
    output = subprocess.run([sys.executable, __file__, *arguments], cwd=ROOT, capture_output=True, text=True)
    if output.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{output.stderr}")
    return json.loads(output.stdout.splitlines()[-1])


def rates(records):
    if isinstance(records[0], dict):
        return [record["tokens_per_second"] for record in records[WARMUP:]]
    return [trained / seconds for _, trained, seconds in records[WARMUP:]]


def main(alpaca, gsm8k, rounds=3):
    os.makedirs(WORK, exist_ok=True)
    setup(alpaca, gsm8k)
    for i in range(int(rounds)):
        measured = {}
        for which in (("trl", "padded", "8"), ("trl", "padded", "16"), ("trl", "grouped", "8"), ("trl", "packed", "8"),
                      ("ours", "padded"), ("ours", "packed")):
            measured[" ".join(which)] = rates(entry(*which))
        median = {name: statistics.median(steps) for name, steps in measured.items()}
        print(f"round {i}, trained tokens/s, median (best step): " + "; ".join(
            f"{name} {median[name]:,.0f} ({max(steps):,.0f})" for name, steps in measured.items()))
        best = max(value for name, value in median.items() if name.startswith("trl"))
        print(f"  ours packed: {median['ours packed'] / median['ours padded']:.2f}x ours padded, "
              f"{median['ours packed'] / best:.2f}x trl at its best; ours padded {median['ours padded'] / best:.2f}x",
              flush=True)
    mine = [record["loss"] for record in entry("ours", "padded", "--dtype=fp32")]
    theirs = [loss for loss, _, _ in entry("trl", "padded", "8", "fp32")]
    apart = [abs(a - b) for a, b in zip(mine, theirs)]
    print(f"loss of the same {len(apart)} batches in fp32, ours and trl's: {max(apart):.5f} nats apart at most; from "
          f"{mine[0]:.3f} to {mine[-1]:.3f} and {theirs[0]:.3f} to {theirs[-1]:.3f}")


if __name__ == "__main__":
    what, *arguments = sys.argv[1:] or ["help"]
    if what == "all" and len(arguments) >= 2:
        main(*arguments)
    elif what in ("ours", "trl"):
        print(json.dumps(globals()[what](*arguments)))
    else:
        raise SystemExit("usage: bash runs/sft.sh ALPACA_JSONL GSM8K_TRAIN_JSONL [ROUNDS]")
