"""Figures with standard errors, the file that keeps them, and the table and picture of it.

    mean_stderr([1, 0, 1, 1]) == (0.75, 0.25)
    append_record("out/table.jsonl", record); print(table_text(read_records("out/table.jsonl")))

A record is one line of JSON: model, task, metrics {name: value}, stderr {name: value or null}, n, counts, settings,
seconds, date.
"""
import json
import math
import os
import shutil

import numpy as np

from common import write_atomic

# --- figures ---

def mean_stderr(values, weights=None, groups=None):
    """(mean, standard error) of values, as a ratio sum(values) / sum(weights); weights are 1 unless given.

        stderr^2 = G / (G - 1) * sum over groups of (sum in the group of (value - mean * weight))^2 / sum(weights)^2

    for G groups (Miller 2024, arXiv:2411.00640, eq. 4, with the small-sample factor). Every value alone in its group
    and weights of 1 give the sample standard deviation over sqrt(n). One group has no standard error: nan.
    """
    values = np.asarray(values, float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    mean = values.sum() / weights.sum()
    number = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sums = np.bincount(number, values - mean * weights)
    G = len(sums)
    return float(mean), float(math.sqrt(G / (G - 1) * (sums ** 2).sum()) / weights.sum()) if G > 1 else math.nan


def pass_at_k(n, correct, k):
    """Probability that one of k answers is right, from n answers of which `correct` are: 1 - C(n - c, k) / C(n, k),
    unbiased (Chen et al. 2021, arXiv:2107.03374, eq. 1)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def finite(value):
    """The value as it is kept in a record: None where it is no finite number."""
    return value if math.isfinite(value) else None


def answer_figures(hits, n_samples, groups=None):
    """{name: (mean, stderr)} of {name: [[one for each sample] for each question]}, and pass@k of the first name;
    groups: what equal questions have in common, one for each."""
    figures = {name: mean_stderr([sum(row) / len(row) for row in rows], groups=groups) for name, rows in hits.items()}
    k = 1
    while n_samples > 1 and k <= n_samples:
        values = [pass_at_k(n_samples, sum(row), k) for row in next(iter(hits.values()))]
        figures[f"pass@{k}"] = mean_stderr(values, groups=groups)
        k *= 2
    return figures


# --- results ---

ONLY_IN_FILE = ("word_perplexity", "byte_perplexity")      # left out of the table: bits_per_byte says the same


def read_records(path):
    """The records of a results file, [] if there is none. ValueError for a line that is not one."""
    if not os.path.exists(path):
        return []
    records = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                [record[name] for name in ("model", "task", "n")] + [record["settings"].get("weights")]
                [(value or 0) + (record["stderr"][name] or 0) for name, value in record["metrics"].items()]
                records.append(record)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"line {number} of {path} is not a result of eval.py; remove it, or take another "
                                 "file") from None
    return records


def append_record(path, record=None):
    """One line at the end of the file, by one write: other processes may append at the same time. None: no line yet."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, (json.dumps(record, allow_nan=False) + "\n").encode() if record else b"")
        os.fsync(file)
    finally:
        os.close(file)


def shown(value, stderr):
    if value is None or isinstance(value, int):
        return "-" if value is None else str(value)
    if abs(value) >= 1e6:
        return f"{value:.3g}" + (f" ±{stderr:.2g}" if stderr is not None else "")
    digits = 3 if abs(value) < 100 else 1
    return f"{value:,.{digits}f}" + (f" ±{stderr:,.{digits}f}" if stderr is not None else "")


def chosen(records):
    """{model: {(task, metric): (value, stderr)}} and the columns in order. A model's task is one whole record: with its
    newest weights the one of most questions, of equal ones the last."""
    best, tasks = {}, list(dict.fromkeys(record["task"] for record in records))
    for record in records:
        place = record["model"], record["task"]
        before = best.get(place)
        if not before or (before["settings"].get("weights") != record["settings"].get("weights")
                          or record["n"] >= before["n"]):
            best[place] = record
    cells = {}
    for (model, task), record in best.items():
        row = cells.setdefault(model, {})
        row[task, "n"] = record["n"], None
        row.update({(task, name): (value, record["stderr"][name]) for name, value in record["metrics"].items()
                    if name not in ONLY_IN_FILE})
    columns = dict.fromkeys(column for row in cells.values() for column in row)
    return cells, sorted(columns, key=lambda column: tasks.index(column[0]))


def table_text(records, width=120):
    """An aligned table: a row for each model, a column for each figure with its standard error; in blocks of at most
    `width` characters."""
    cells, columns = chosen(records)
    lines = [["", *(task for task, _ in columns)], ["model", *(metric for _, metric in columns)]]
    lines += [[name, *(shown(*row[column]) if column in row else "-" for column in columns)]
              for name, row in cells.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    blocks, at = [], 1
    while at < len(widths):
        end = at + 1
        while end < len(widths) and widths[0] + sum(2 + w for w in widths[at:end + 1]) <= width:
            end += 1
        blocks.append("\n".join("  ".join([line[0].ljust(widths[0]), *(
            cell.rjust(w) for cell, w in zip(line[at:end], widths[at:end]))]).rstrip() for line in lines))
        at = end
    return "\n\n".join(blocks)


def draw_table(records, path):
    """A picture: a panel for each figure, a bar with its standard error for each model."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    cells, columns = chosen(records)
    columns = [column for column in columns if column[1] != "n"]
    across = min(4, len(columns))
    down = -(-len(columns) // across)
    figure, axes = plt.subplots(down, across, figsize=(3.2 * across, 2.6 * down + 0.3 * len(cells)), squeeze=False)
    for axis in axes.flat[len(columns):]:
        axis.axis("off")
    colours = {name: f"C{i % 10}" for i, name in enumerate(cells)}
    for axis, column in zip(axes.flat, columns):
        rows = [(name, *row[column]) for name, row in cells.items() if row.get(column, (None,))[0] is not None]
        axis.bar(range(len(rows)), [value for _, value, _ in rows], yerr=[stderr or 0 for *_, stderr in rows],
                 capsize=3, color=[colours[name] for name, *_ in rows])
        axis.set_xticks(range(len(rows)), [name for name, *_ in rows], rotation=30, ha="right", fontsize=7)
        axis.set_title(" ".join(column), fontsize=9)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def show_table(path):
    if path.endswith(".png"):
        raise ValueError(f"--table={path} names a picture; give the file of results, and the picture lies beside it")
    records = read_records(path)
    if not records:
        raise ValueError(f"there are no results in {path}; write some with --model=DIR --tasks=NAMES --append={path}")
    print(table_text(records, shutil.get_terminal_size((120, 24)).columns))
    picture = os.path.splitext(path)[0] + ".png"
    draw_table(records, picture)
    print(f"the same as a picture: {picture}")
