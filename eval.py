"""Evaluation: what a model directory is worth, in figures that carry their n, a standard error and their settings.

    python eval.py --model=out/pretrain --tasks=bpb --text=stdlib           bits per byte and perplexity
    python eval.py --model=out/sft --tasks=gsm8k,arc_easy --eval_data=data/eval --append=out/table.jsonl
    python eval.py --table=out/table.jsonl                                  what was appended, as a table and a picture

Tasks: bpb; hellaswag, arc_easy, arc_challenge, piqa, mmlu (by log-likelihood, as lm-evaluation-harness); gsm8k, svamp
and the generated tasks of tasks.py (verified); humaneval; ifeval; judge (a win rate). docs/eval.md says what each
reports.
Standard errors are clustered (Miller 2024, arXiv:2411.00640, eq. 4) by questions that share a prompt or a source.
"""
import datetime
import json
import os
import signal
import time
import types

import torch.distributed as dist

from common import keep_freed_memory
from configurator import configure
from model import fetch
from plans import Machine, load, plan
from results import append_record, finite, read_records, show_table, shown

# --- what is evaluated ---
model = ""                  # model directory, or hub:ORG/NAME; several, with commas between, one after the other
tasks = "bpb"               # names with commas between; name=FILE reads that file
mode = "auto"               # chat: ask through the chat template; base: plain prompts; auto: chat if trained so
limit = 0                   # questions of each task, the first ones (of mmlu: of each subject); 0: all
shots = -1                  # worked examples before a question; -1: usual (base models: mmlu and questions 5; else 0)
# --- data ---
eval_data = "data/eval"     # folder with the published files, found by their names; "hub" fetches them
text = ""                   # of bpb: files, folders, globs, stdlib, or data.py's folders; "a=PATH,b=PATH" names them
text_column = "text,content"    # of .jsonl, .json and .parquet: the first of these columns that is there
invalid_utf8 = "error"      # error stops at a byte that is not UTF-8; replace puts U+FFFD there
max_text_bytes = 0          # of each source of bpb, the first ones (of data.py's folders whole documents); 0: all
stride = 0                  # of bpb: tokens a window moves on; smaller: more context, slower; 0: the model's context
# --- generated answers ---
samples = 1                 # answers to each question; 1: greedy; more: sampled, and pass@k is reported
temperature = 0.8           # of sampled answers
max_new_tokens = 0          # of an answer; 0: what the task needs
seed = 1337                 # of sampled answers
allow_code_execution = False    # humaneval runs code that the model wrote, in a process with limits (see sandbox.py)
# --- judge ---
prompts = ""                # .jsonl of prompts (prompt, messages or turns) that both models answer
against = ""                # model directory of the other model
judge = ""                  # who judges: an OpenAI-compatible address (http://HOST/v1), or a reward model's directory
judge_model = ""            # name of the model at that address
judge_key_env = ""          # environment variable that holds its key; empty: none is sent
# --- output ---
append = ""                 # .jsonl file for results; what it already holds with the same settings is skipped
table = ""                  # .jsonl file to print as a table and draw as a picture; alone, no model is needed
# --- machine ---
device = "auto"             # auto, cuda, mps or cpu
dtype = "auto"              # activations and products: auto (bf16 where the hardware is fast at it), bf16, fp32
batch_tokens = 0            # tokens of a forward pass for log-likelihoods, padding included; 0: by device
max_batch = 64              # answers generated at once


def main(config):
    o = types.SimpleNamespace(**config)
    least = dict(limit=0, shots=-1, stride=0, samples=1, temperature=0, max_new_tokens=0, batch_tokens=0, max_batch=1,
                 max_text_bytes=0, seed=0)
    for name in (name for name in least if config[name] < least[name]):
        raise SystemExit(f"eval.py: --{name} must be at least {least[name]}, got {config[name]}")
    if not (o.model or o.table):
        raise SystemExit("eval.py: name what to evaluate, as in --model=out/sft, or a file to print with --table=FILE")
    machine = Machine()
    keep_freed_memory()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` ends us quietly
    if o.append and machine.rank == 0:
        append_record(o.append)                             # what cannot be written is said now
    paths = [path if path.startswith("hub:") else os.path.normpath(path)
             for path in filter(None, map(str.strip, o.model.split(",")))]
    for path in paths:
        fetch(path)                                         # a missing one is said before the first is evaluated
    for path in paths:
        subject = load(path, o.mode, o.device, o.dtype)
        jobs = plan(subject, o, machine)                    # every task's data and prompts are checked first
        done = [(record["model"], record["task"], record["settings"]) for record in read_records(o.append)]
        for job in jobs:
            settings = json.loads(json.dumps(job.settings))
            if (path, job.task, settings) in done:
                machine.print(f"{path} {job.task}: already in {o.append} with these settings, skipped")
                continue
            begin = time.perf_counter()
            figures, n, counts = job.run()
            machine.stop()
            metrics, stderr = ({name: finite(pair[at]) for name, pair in figures.items()} for at in (0, 1))
            record = {"model": path, "task": job.task, "metrics": metrics, "stderr": stderr,
                      "n": n, "counts": counts, "settings": settings, "seconds": round(time.perf_counter() - begin, 2),
                      "date": datetime.datetime.now().isoformat(timespec="seconds")}
            line = " | ".join(f"{name} {shown(value, record['stderr'][name])}"
                              for name, value in record["metrics"].items())
            noted = ", ".join(f"{name} {value}" for name, value in counts.items())
            machine.print(f"{path} {job.task}: {line} | n {n} ({noted}), {record['seconds']:.1f} s")
            if machine.rank == 0 and o.append:
                append_record(o.append, record)
    if machine.rank == 0:
        if o.table:
            show_table(o.table)
        elif o.append:
            print(f"see all results with python eval.py --table={o.append}")
        else:
            print("keep such lines with --append=FILE.jsonl; python eval.py --table=FILE.jsonl prints them as a table")
    if machine.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(configure(globals()))
