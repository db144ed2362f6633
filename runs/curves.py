"""The table and the picture of runs/curves.sh, from the logs of its GRPO runs.

    python runs/curves.py out/curves
"""
import glob
import json
import re
import sys


def main(folder):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    runs = sorted(path for path in glob.glob(f"{folder}/*/log.jsonl") if re.search(r"-\d+/log", path))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    print("| task, seed | step: dev accuracy / format, percent |\n|---|---|")
    for path in runs:
        name = path.split("/")[-2]
        task, seed = name.rsplit("-", 1)
        with open(path) as log:
            records = [record for record in map(json.loads, log) if f"eval_accuracy/{task}" in record]
        points = [(record["step"], *(100 * record[f"eval_{kind}/{task}"] for kind in ("accuracy", "format")))
                  for record in records]
        print(f"| {task}, {seed} | " + ", ".join(f"{step}: {a:.1f} / {f:.1f}" for step, a, f in points) + " |")
        for axis, column, what in zip(axes, (1, 2), ("right", "in format")):
            axis.plot([point[0] for point in points], [point[column] for point in points], marker=".", label=name)
            axis.set(xlabel="step", ylabel=f"dev questions {what}, %")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(f"{folder}/curves.png", dpi=110)
    print(f"picture: {folder}/curves.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
