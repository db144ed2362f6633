"""The table of runs/rewards.sh: accuracies by source of reward models, from their logs.

    python runs/rewards.py out/rewards
"""
import glob
import json
import sys


def main(folder):
    for path in sorted(glob.glob(f"{folder}/reward-*/log.jsonl")):
        with open(path) as log:
            records = [record for record in map(json.loads, log) if "eval_accuracy" in record]
        first, last = records[0], records[-1]
        print(f"\n{path.split('/')[-2]}: percent of held-out pairs ranked rightly, standard errors")
        print("| source | untrained | length alone | trained |\n|---|---|---|---|")
        sources = [name.removeprefix("eval_accuracy") for name in first if name.split("/")[0] == "eval_accuracy"]
        for source in sorted(sources, key=lambda source: (source == "", source)):
            both = [f"{100 * record[f'eval_accuracy{source}']:.1f} ±{100 * record[f'eval_accuracy_stderr{source}']:.1f}"
                    for record in (first, last)]
            print(f"| {source[1:] or 'all'} | {both[0]} | {100 * first[f'eval_longer_wins{source}']:.1f} | {both[1]} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
