"""HellaSwag by eval.py and by lm-evaluation-harness (its `hf` model), each in a process of its own, in turn.

    python runs/evaluate.py HELLASWAG_JSONL [ROUNDS]

Random weights in one directory that both open (6 layers, 384 wide, 4,096 pieces, 13.8M parameters). Counted are the
seconds of loading the rows and scoring them, without imports and without loading the model. The harness runs in fp32
and bf16, with batches of 16, 64 and 256 requests; its best counts.
"""
import json
import os
import subprocess
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
WORK = "out/evaluate"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def setup(path):
    from generate import save_random_model

    from sources import json_rows
    from tokenizer import Tokenizer
    os.makedirs(WORK, exist_ok=True)
    rows = [row for row, _, _ in json_rows(path, "error", {})]
    with open(f"{WORK}/hellaswag_val.jsonl", "w") as f:
        f.writelines(json.dumps({name: row[name] for name in ("query", "choices", "gold")}) + "\n" for row in rows)
    tokenizer = Tokenizer.train([row["query"] for row in rows], 4096)
    save_random_model(tokenizer, f"{WORK}/model")


def ours(dtype):
    import eval as evaluation
    from common import keep_freed_memory
    from configurator import read_options
    keep_freed_memory()
    values = {name: default for name, (default, *_) in read_options(evaluation.__file__).items()}
    o = type("Options", (), {**values, "tasks": f"hellaswag={WORK}/hellaswag_val.jsonl"})
    subject = evaluation.load(f"{WORK}/model", dtype=dtype)
    begin = time.perf_counter()
    (job,) = evaluation.plan(subject, o, evaluation.Machine())
    figures, n, _ = job.run()
    return time.perf_counter() - begin, {name: value for name, (value, _) in figures.items()}


def theirs(dtype, batch):
    os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    model = HFLM(pretrained=f"{WORK}/model", device="cpu", dtype=DTYPES[dtype], batch_size=int(batch))
    config = dict(
        task="hellaswag-local", dataset_path="json", validation_split="validation", output_type="multiple_choice",
        doc_to_text="{{query}}", doc_to_choice="choices", doc_to_target="{{gold}}", dataset_kwargs={
            "data_files": {"validation": f"{WORK}/hellaswag_val.jsonl"}, "cache_dir": f"{WORK}/cache"},
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}])
    ConfigurableTask(config=dict(config))                   # the first call writes datasets' cache
    begin = time.perf_counter()
    task = ConfigurableTask(config=dict(config))
    found = simple_evaluate(model, tasks=[task], bootstrap_iters=0)["results"]["hellaswag-local"]
    return time.perf_counter() - begin, {name: found[f"{name},none"] for name in ("acc", "acc_norm")}


def measured(*entry):
    output = subprocess.run([sys.executable, __file__, *entry], cwd=ROOT, capture_output=True, text=True)
    if output.returncode:
        raise SystemExit(f"{' '.join(entry)} failed:\n{output.stderr}")
    return json.loads(output.stdout.splitlines()[-1])


def main(path, rounds=2):
    setup(path)
    batches = ("16", "64", "256")
    for i in range(int(rounds)):
        mine = {dtype: measured("ours", dtype) for dtype in DTYPES}
        harness = {f"{dtype} {batch}": measured("theirs", dtype, batch) for dtype in DTYPES for batch in batches}
        for name, results in ("eval.py", mine), ("harness", harness):
            print(f"round {i}, {name}: " + "; ".join(
                f"{key} {seconds:.1f} s, acc {figures['acc']:.3f}, acc_norm {figures['acc_norm']:.3f}"
                for key, (seconds, figures) in results.items()), flush=True)
        ratio = min(seconds for seconds, _ in mine.values()) / min(seconds for seconds, _ in harness.values())
        print(f"  eval.py takes {ratio:.2f} of the harness's best time", flush=True)
        batches = [min(harness, key=lambda key: harness[key][0]).split()[1]]


if __name__ == "__main__":
    if sys.argv[1:2] == ["ours"] or sys.argv[1:2] == ["theirs"]:
        print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
    elif len(sys.argv) > 1:
        main(*sys.argv[1:])
    else:
        raise SystemExit("usage: bash runs/evaluate.sh HELLASWAG_JSONL [ROUNDS]")
