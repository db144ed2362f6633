"""The demo's closing pages: every stage on one table, three questions answered by each, and all curves in one picture.

    python runs/demo.py out/demo

Accuracies, pass@8 and bits per byte are what eval.py wrote into table.jsonl: greedy answers, and eight sampled ones, to
test questions that no stage has seen. The reward is the reward model's mean for greedy answers to REWARDED of them.
Written: table.txt, table.png, curves.png.
"""
import glob
import json
import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import engine
import judge
from common import pick_device, write_atomic
from results import mean_stderr, read_records
from tasks import TASKS

STAGES = {"pretrain": "Base", "sft": "SFT", "dpo": "DPO", "ppo": "PPO", "grpo": "GRPO"}
ASKED = ("sorting",)
REWARDED = 200
CURVES = {"pretrain": ("val_bpb",), "sft": ("eval_loss", "eval_accuracy/sorting"),
          "reward": ("eval_accuracy",), "dpo": ("rewards/margins", "logps/chosen", "eval_accuracy/sorting"),
          "ppo": ("objective/scores", "eval_accuracy/sorting"), "grpo": ("reward", "eval_accuracy/sorting", "entropy")}


def answers(directory, questions):
    """(texts, conversations) of a model's greedy answers in chat mode."""
    model, tokenizer, *_ = engine.load(directory, "chat")
    asked = [TASKS[task].messages(question) for task, question in questions]
    prompts = [tokenizer.encode_chat(messages, open_answer=True)[0] for messages in asked]
    made = engine.generate(model, prompts, max_new_tokens=64, temperature=0)
    texts = [tokenizer.decode(answer.tokens[:-1] if answer.finish == "stop" else answer.tokens) for answer in made]
    return texts, [[*messages, {"role": "assistant", "content": text}] for messages, text in zip(asked, texts)]


def figures(records, directory):
    """{column: (value, stderr)} of a stage: the newest greedy record of each task, and the newest sampled one."""
    row, mine = {}, [record for record in records if record["model"] == directory]
    for record in mine:
        name = {"strict": "strict", "format": "format"}
        if record["task"].startswith("bpb"):
            row["bits/byte"] = record["metrics"]["bits_per_byte"], record["stderr"]["bits_per_byte"]
        elif record["settings"]["samples"] == 1:
            for metric in name:
                row[record["task"], metric] = record["metrics"][metric], record["stderr"][metric]
        else:
            row[record["task"], "pass@8"] = record["metrics"]["pass@8"], record["stderr"]["pass@8"]
    for metric in ("strict", "format", "pass@8"):
        both = [row[task, metric] for task in ASKED if (task, metric) in row]
        if len(both) == len(ASKED):
            row[metric] = sum(v for v, _ in both) / len(both), math.hypot(*(s or 0 for _, s in both)) / len(both)
    return row


def seconds(demo, stage):
    """Of the stage's script, all its calls together."""
    try:
        with open(f"{demo}/{stage}.seconds") as file:
            return sum(map(int, file)), None
    except FileNotFoundError:
        return None


COLUMNS = {"greedy": "strict", "pass@8": "pass@8", "format": "format", "bits/byte": "bits/byte", "reward": "reward",
           "seconds": "seconds"}


def cell(column, figure):
    if figure is None or figure[0] is None:
        return "-"
    value, stderr = figure
    if column == "seconds":
        return str(value)
    if column in ("bits/byte", "reward"):
        return f"{value:.3f}" + (f" ±{stderr:.3f}" if column == "reward" else "")
    return f"{100 * value:.1f} ±{100 * stderr:.1f}"


def draw(table, demo):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = [name for name in COLUMNS if name != "seconds"]
    figure, axes = plt.subplots(1, len(names), figsize=(2.6 * len(names), 3.2))
    for axis, name in zip(axes.flat, names):
        bars = [(stage, *row[COLUMNS[name]]) for stage, row in table.items() if row.get(COLUMNS[name])]
        axis.bar([stage for stage, *_ in bars], [value for _, value, _ in bars],
                 yerr=[stderr or 0 for *_, stderr in bars], capsize=3, color=[f"C{i}" for i in range(len(bars))])
        axis.set_title(name, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    write_atomic(f"{demo}/table.png", lambda file: figure.savefig(file, format="png", dpi=110))

    shown = [(stage, name) for stage, names in CURVES.items() for name in names]
    figure, axes = plt.subplots(-(-len(shown) // 3), 3, figsize=(11, 2.4 * -(-len(shown) // 3)))
    for axis, (stage, name) in zip(axes.flat, shown):
        if os.path.exists(f"{demo}/{stage}/log.jsonl"):
            with open(f"{demo}/{stage}/log.jsonl", encoding="utf-8") as log:
                points = [(record["step"], record[name]) for record in map(json.loads, log) if name in record]
            axis.plot(*zip(*points) if points else ((), ()), "-" if len(points) > 30 else ".-", linewidth=1)
        axis.set_title(f"{stage}: {name}", fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(shown):]:
        axis.axis("off")
    figure.tight_layout()
    write_atomic(f"{demo}/curves.png", lambda file: figure.savefig(file, format="png", dpi=110))


def main(demo):
    records = read_records(f"{demo}/table.jsonl")
    questions = [(task, question) for task in ASKED
                 for question in TASKS[task].questions("test", limit=REWARDED // len(ASKED))]
    stages = [stage for stage in STAGES if glob.glob(f"{demo}/{stage}/model.safetensors")]
    score = judge.load_reward(f"{demo}/reward", pick_device("auto")) if os.path.exists(f"{demo}/reward.txt") else None
    table, said = {}, {}
    for stage in stages:
        texts, conversations = answers(f"{demo}/{stage}", questions)
        row = figures(records, f"{demo}/{stage}")
        if score:
            rewards = score(conversations)
            row["reward"] = mean_stderr(rewards[rewards.isfinite()].tolist())
        row["seconds"] = seconds(demo, stage)
        table[STAGES[stage]], said[STAGES[stage]] = row, texts
    lines = [["", *COLUMNS]] + [[stage, *(cell(name, row.get(key)) for name, key in COLUMNS.items())]
                                for stage, row in table.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = "\n".join("  ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths)))
                     for line in lines)
    write_atomic(f"{demo}/table.txt", (text + "\n").encode())
    for number in range(3):
        task, question = questions[number]
        print(f"\n{question.problem}     (right: {question.answer})")
        for stage, texts in said.items():
            right = TASKS[task].score(texts[number], question.answer)[0]
            print(f"  {stage:5}{'+' if right else '-'} " + " ".join(texts[number].split())[:110])
    print("\nPercent of test questions answered right (greedy), one of eight samples "
          "right, in the\nasked-for format; bits per byte of held-out Python; the reward model's mean; the script's "
          f"seconds:\n\n{text}\n")
    draw(table, demo)
    print(f"pictures: {demo}/table.png, {demo}/curves.png, and curves.png of each stage in its folder")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python runs/demo.py out/demo")
    main(sys.argv[1])
