"""Pairs/s of dpo.py and reward.py beside trl's DPOTrainer and RewardTrainer, each in a process of its own, in turn.

    python runs/preferences.py all ULTRAFEEDBACK_JSONL [ROUNDS]
    python runs/preferences.py ours dpo               one entry: dpo, stored (reference log-probabilities) or reward
    python runs/preferences.py trl dpo 4              pairs a batch

Random weights, the same for both (6 layers, 384 wide, 6 heads, 4,096 pieces, 13.8M parameters, context 512), bf16 and
AdamW in both, UltraFeedback's pairs in the same order. A step's rate is its pairs by its seconds; the median step
counts, the first three warm up. Peak memory is the process's. With stored references trl's are computed beforehand, as
ours are; neither counts.
"""
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
WORK = "out/preferences_speed"
CONTEXT, STEPS, WARMUP, BATCH = 512, 16, 3, 4


def setup(ultrafeedback):
    from generate import save_random_model

    from sources import json_rows
    from tokenizer import Tokenizer
    texts = [json.dumps(row) for row, _, _ in json_rows(ultrafeedback, "error", {})]
    save_random_model(Tokenizer.train(texts, 4096), f"{WORK}/model")
    command = ["data.py", "--kind=pairs", f"--sources={ultrafeedback}", f"--out_dir={WORK}/pairs", "--overwrite=true"]
    print(subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout, end="")


def ours(kind):
    """(pairs/s of every step, peak bytes) of a run of dpo.py or reward.py."""
    script = "reward.py" if kind == "reward" else "dpo.py"
    flags = {"reward": [], "dpo": ["--samples=0", "--sft_weight=0"],
             "stored": ["--samples=0", "--sft_weight=0", "--reference=stored"]}[kind]
    command = [script, f"--data={WORK}/pairs", f"--init_from={WORK}/model", f"--out_dir={WORK}/{kind}",
               "--overwrite=true", f"--context={CONTEXT}", f"--pairs_per_step={BATCH}", f"--max_steps={STEPS}",
               "--eval_every=1000", "--eval_pairs=4", "--curves=false", "--schedule=constant", "--warmup_steps=0",
               "--lr=1e-5", *flags]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    with open(f"{WORK}/{kind}/log.jsonl") as log:
        return [r["pairs_per_second"] for r in map(json.loads, log) if "pairs_per_second" in r], peak


def trl(kind, batch=BATCH):
    """The same of trl's trainer."""
    import datasets
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    batch, begins, rates = int(batch), [], []
    with open(f"{WORK}/pairs/train.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:STEPS * batch]
    rows = datasets.Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            begins.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            rates.append(batch / (time.perf_counter() - begins[-1]))

    common = dict(output_dir=f"{WORK}/trl", report_to="none", bf16=True, use_cpu=True, max_steps=STEPS,
                  gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, logging_steps=1000,
                  per_device_train_batch_size=batch, max_length=CONTEXT, learning_rate=1e-5, weight_decay=0.0,
                  lr_scheduler_type="constant")
    tokenizer = AutoTokenizer.from_pretrained(f"{WORK}/model")
    with open(os.devnull, "w") as silent:
        sys.stdout, before = silent, sys.stdout
        if kind == "reward":
            model = AutoModelForSequenceClassification.from_pretrained(f"{WORK}/model", num_labels=1,
                                                                       dtype=torch.float32)
            trainer = RewardTrainer(model=model, args=RewardConfig(**common), train_dataset=rows,
                                    processing_class=tokenizer, callbacks=[Clock()])
        else:
            model, reference = (AutoModelForCausalLM.from_pretrained(f"{WORK}/model", dtype=torch.float32)
                                for _ in range(2))
            config = DPOConfig(**common, precompute_ref_log_probs=kind == "stored")
            trainer = DPOTrainer(model=model, ref_model=reference, args=config, train_dataset=rows,
                                 processing_class=tokenizer, callbacks=[Clock()])
        trainer.train()
        sys.stdout = before
    return rates, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def entry(*arguments):
    output = subprocess.run([sys.executable, __file__, *arguments], cwd=ROOT, capture_output=True, text=True)
    if output.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{output.stderr}")
    rates, peak = json.loads(output.stdout.splitlines()[-1])
    return statistics.median(rates[WARMUP:]), max(rates[WARMUP:]), peak


def main(ultrafeedback, rounds=2):
    os.makedirs(WORK, exist_ok=True)
    setup(ultrafeedback)
    for i in range(int(rounds)):
        for kind in ("dpo", "stored", "reward"):
            theirs, mine = entry("trl", kind), entry("ours", kind)
            shown = [f"{median:.2f} pairs/s in the median, {best:.2f} at best, {peak / 2 ** 30:.2f} GiB"
                     for median, best, peak in (theirs, mine)]
            print(f"round {i}, {kind}: trl {shown[0]}; ours {shown[1]}; {mine[0] / theirs[0]:.2f}x, at best "
                  f"{mine[1] / theirs[1]:.2f}x", flush=True)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:] or ["help"]
    if what == "all" and arguments:
        main(*arguments)
    elif what in ("ours", "trl"):
        print(json.dumps(globals()[what](*arguments)))
    else:
        raise SystemExit("usage: bash runs/preferences.sh ULTRAFEEDBACK_JSONL [ROUNDS]")
