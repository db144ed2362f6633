"""What a run records: log.jsonl, lines on the console with the time left, curves.png, wandb or tensorboard.

    log = Log("out/run", config, clock, keep=0)
    log.record(step, done=0.5, metrics=dict(loss=2.0))
    picture = curves("out/run/log.jsonl")
"""
import atexit
import io
import json
import os
import sys

import torch

NOT_SHOWN = ("epoch", "num_tokens", "tokens/", "bytes/", "mfu", "completions/m", "clip_ratio/", "sampling/",
             "rollout_seconds", "update_seconds", "step_time")      # beginnings of names; log.jsonl has everything
IF_NOT_ZERO = ("skipped_updates", "failed_rewards", "refilled", "stopped_early")


class Fetched:
    """Numbers and one-element tensors by name, as numbers later: those on a GPU are copied while it goes on."""

    def __init__(self, named):
        self.named = {name: value.detach().to("cpu", non_blocking=value.is_cuda) if isinstance(value, torch.Tensor)
                      else value for name, value in named.items()}
        gpus = [value.device for value in named.values() if isinstance(value, torch.Tensor) and value.is_cuda]
        self.event = after_copies(gpus[0]) if gpus else None

    def values(self):
        """{name: number}, once the copies have arrived."""
        if self.event:
            self.event.synchronize()
        return {name: value.item() if hasattr(value, "item") else value for name, value in self.named.items()}


def after_copies(device):
    """An event that comes, and knows when, once all that the GPU was given so far is done."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


class Rate:
    """`amount` a second of what a GPU does between two timed events: a number, as item(), once it is done."""

    def __init__(self, begin, end, amount=1.0):
        self.begin, self.end, self.amount = begin, end, amount

    def __mul__(self, number):
        return Rate(self.begin, self.end, self.amount * number)

    def item(self):
        return self.amount / self.begin.elapsed_time(self.end) * 1e3


class Log:
    """The log of the run in `folder`. clock(): seconds of training so far. keep: bytes that stay of a log.jsonl that is
    there, of a run that goes on; what came after them is written again."""

    def __init__(self, folder, config, clock, keep=0):
        self.clock, self.last_line, self.bar = clock, -1.0, None
        self.unwritten = []                     # records: (step, done, Fetched)
        path = os.path.join(folder, "log.jsonl")
        if keep:
            truncate(path, keep)
        self.file = open(path, "a" if keep else "w", encoding="utf-8")
        if sys.stderr.isatty():
            from tqdm import tqdm
            bar = "{percentage:3.0f}% {bar} {elapsed} gone, {postfix}"
            self.bar = tqdm(total=1000, bar_format=bar, leave=False)
        self.tracker = start_tracker(config.get("report_to", ""), config, folder)
        atexit.register(self.close)             # an error is often about the record that waits

    def print(self, *lines):
        """Prints above the progress bar."""
        for line in lines:
            self.bar.write(line) if self.bar else print(line, flush=True)

    def record(self, step, done, metrics):
        """One record in log.jsonl, and at most one line a second on the console, with the share of the run that is
        `done` (0 to 1) and the time left. Metrics are numbers or one-element tensors; those on a GPU are fetched while
        it computes, and their record is written with the next one."""
        self.unwritten.append((step, done, Fetched(metrics)))
        self.write(1 if self.unwritten[-1][-1].event else 0)

    def write(self, left=0):
        """Writes the records that wait for a GPU, all but the last `left`."""
        while len(self.unwritten) > left:
            step, done, fetched = self.unwritten.pop(0)
            self.write_one(step, done, fetched.values())

    def write_one(self, step, done, metrics):
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.tracker:
            self.tracker(step, metrics)
        now, left = self.clock(), ""
        if done and (done > 0.01 or now > 3 and done > 0.001):       # the first steps tell little
            seconds = int(max(0, now * (1 - done) / done))
            left = f"{seconds // 60}:{seconds % 60:02d} left"
        if self.bar:
            self.bar.n = int(1000 * (done or 0))
            self.bar.set_postfix_str(left)
        if now - self.last_line < 1 and not any(name.startswith(("val_", "eval_")) for name in metrics):
            return
        self.last_line = now
        self.file.flush()
        shown = (f"{name} {shorten(value)}" for name, value in metrics.items()
                 if not name.startswith(NOT_SHOWN) and (value or name not in IF_NOT_ZERO))
        line = " | ".join([f"step {step:>5}", *shown])
        self.print(line + (f" | {left}" if left else ""))

    def saved(self):
        """Everything recorded is on disk; returns how many bytes that is."""
        self.write()
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self):
        atexit.unregister(self.close)
        self.write()
        if self.bar:
            self.bar.close()
            self.bar = None
        self.file.close()


def truncate(path, size):
    """Cuts a file to `size` bytes; ValueError if it is missing or shorter: then somebody else changed it."""
    if not os.path.exists(path) or os.path.getsize(path) < size:
        raise ValueError(f"{path} is missing or shorter than when the state beside it was saved; restore it, or begin "
                         "again with --overwrite=true")
    os.truncate(path, size)


def shorten(value):
    """A number in few characters."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def curves(log_path):
    """A PNG picture, as bytes, of every metric in log.jsonl over steps; None if it holds no numbers."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = {}
    with open(log_path, encoding="utf-8") as f:
        for record in map(json.loads, f):
            step = record.pop("step")
            for name, value in record.items():
                if isinstance(value, (int, float)):
                    found.setdefault(name, ([], []))[0].append(step)
                    found[name][1].append(value)
    if not found:
        return None
    rows = -(-len(found) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(12, 2.8 * rows), squeeze=False)
    for axis in axes.flat[len(found):]:
        axis.axis("off")
    for axis, (name, (steps, values)) in zip(axes.flat, found.items()):
        axis.plot(steps, values, "." if len(values) == 1 else "-", linewidth=1)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    return picture.getvalue()


def start_tracker(name, config, out_dir):
    """A function (step, metrics) that reports to wandb or tensorboard, or None for ""."""
    if not name:
        return None
    if name not in ("wandb", "tensorboard"):
        raise ValueError(f"report_to must be wandb, tensorboard or empty, got {name!r}")
    try:
        if name == "wandb":
            import wandb
            wandb.init(project="zero2chat", config=config, dir=out_dir)
            return lambda step, metrics: wandb.log(metrics, step=step)
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(f"--report_to={name} needs the package {name}; pip install {name}") from None
    writer = SummaryWriter(out_dir)
    return lambda step, metrics: [writer.add_scalar(key, value, step) for key, value in metrics.items()]
