"""The machine under every stage: ranks, device, dtype, seeds, the log, atomic files, exact resume.

    common.check(config, dict(lr=0))                  refuses what no stage runs with
    run = common.start(config)                        checks out_dir, joins the ranks, prints the machine
    run.resume(model, optimizer)                      opens the log; with --resume=true restores the newest state
    for step in range(run.first_step, max_steps): ... run.log(step, loss=...), run.save(model, optimizer, step)
    run.finish()                                      draws the curves
"""
import ctypes
import json
import math
import os
import platform
import shutil
import signal
import statistics
import sys
import time

import torch
import torch.distributed as dist

MAY_CHANGE_ON_RESUME = ("resume", "overwrite", "out_dir", "device", "micro_rows", "micro_pairs", "micro_questions",
                        "compile", "report_to", "curves")

NOT_SHOWN = ("epoch", "num_tokens", "mfu", "completions/m", "clip_ratio/", "sampling/", "rollout_seconds",
             "update_seconds", "step_time")         # beginnings of names; log.jsonl has everything
IF_NOT_ZERO = ("skipped_updates", "failed_rewards", "refilled", "stopped_early")


def write_atomic(path, content):
    """Writes bytes, or whatever the function `content(file)` writes, to `path`, so that a kill at any moment leaves
    the old file or the new one. ValueError if the disk refuses; the old file is then still there."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(content) if isinstance(content, bytes) else content(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:        # torch.save wraps a full disk in a RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"could not write {path} ({reason}); what was saved before is still there") from None


def keep_freed_memory():
    """Tells glibc to keep freed blocks. By default it returns large ones to the kernel and gets them back page by page,
    which took an eighth of a training step on CPU (docs/log.md). Elsewhere nothing happens."""
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
        except (OSError, AttributeError):           # another C library
            return
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt(M_MMAP_THRESHOLD, 32 << 20)         # the largest it takes
        mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


def pick_device(name):
    """torch.device of "auto" (cuda, else mps, else cpu) or of a name; ValueError if this machine has none such."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in found if found[kind])
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    kind, _, index = name.partition(":")
    if kind not in found or index and not index.isdigit():
        raise ValueError(f"device must be auto, cuda, cuda:N, mps or cpu, got {name!r}")
    if not found[kind] or kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device={name} was asked for, but torch {torch.__version__} finds no such device here; use "
                         "--device=auto, and no more ranks than there are GPUs")
    if kind == "mps" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("several ranks need cuda or cpu, not mps; use --device=cpu")
    return torch.device(name)


def pick_dtype(name, device):
    """The dtype of activations and products: of "auto", bf16 where the hardware multiplies it fast, else fp32."""
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            cpu_has_it = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            fast = device.type == "cpu" and cpu_has_it
        name = "bf16" if fast else "fp32"
    if name not in dtypes:
        raise ValueError(f"dtype must be auto, bf16 or fp32, got {name!r}")
    return dtypes[name]


def matmul_rate(device, dtype, seconds=0.1):
    """FLOP/s of a square matrix product, the best of what fits in `seconds`: MFU is measured against it."""
    n = {"cuda": 8192, "cpu": 1024}.get(device.type, 4096)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), None
    while end is None or time.perf_counter() < end:
        synchronize(device)
        begin = time.perf_counter()
        a @ b
        synchronize(device)
        if end is None:                             # the first product warms up
            end = time.perf_counter() + seconds
        else:
            best = min(best, time.perf_counter() - begin)
    return 2 * n ** 3 / best


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def check(config, least, **known):
    """Refuses, with ValueErrors of one sentence, what no stage runs with: an option below its `least` value, infinite
    or none of its `known` ones, nothing to do, an average that never moves, an out_dir that holds init_from."""
    for name in least:
        if not math.isfinite(config[name]):
            raise ValueError(f"--{name} must be a finite number, got {config[name]}")
        if config[name] < least[name]:
            raise ValueError(f"--{name} must be at least {least[name]}, got {config[name]}")
    for name, values in dict(known, report_to=("wandb", "tensorboard", "")).items():
        if config[name] not in values:
            *others, last = [value or "empty" for value in values]
            raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {config[name]!r}")
    if not config["max_steps"] and not config["epochs"]:
        raise ValueError("--epochs=0 and --max_steps=0 leave nothing to do; set one of them")
    for name in (name for name in ("beta1", "beta2", "momentum") if config.get(name, 0) >= 1):
        raise ValueError(f"--{name} must be below 1, got {config[name]}")
    if config.get("method", "full") != "full" and config.get("optimizer", "adamw") != "adamw":
        raise ValueError(f"--method={config['method']} trains with adamw, got --optimizer={config['optimizer']}")
    out = f"{os.path.realpath(config['out_dir'])}/"
    for name in (name for name in ("init_from", "critic_from") if config.get(name)):
        if f"{os.path.realpath(config[name])}/".startswith(out):
            raise ValueError(f"{name}={config[name]} lies in out_dir={config['out_dir']}, which this run would "
                             "replace; choose another --out_dir")


def start(config):
    """A Run from a script's options: out_dir, resume, overwrite, seed, device, dtype, curves, report_to.

    ValueError if out_dir holds a run (and neither resume nor overwrite is set), cannot be written, or holds none to
    resume, or one with other options.
    """
    return Run(config)


class Run:
    """One run of one script: its ranks, device, log and saved states. Attributes a stage reads: rank, world_size,
    is_main, device, dtype, matmul_flops, first_step, extra (a dict that is saved and restored with the state)."""

    def __init__(self, config):
        self.config, self.out_dir = config, config["out_dir"]
        self.begin, self.elapsed_before, self.first_step = time.perf_counter(), 0.0, 0
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self.device = pick_device(config["device"])
        self.dtype = pick_dtype(config["dtype"], self.device)
        self.extra, self.state, self.stopping = {}, None, False
        self.log_file = self.bar = self.tracker = None
        self.last_line = -1.0
        self.check_out_dir()
        if "RANK" in os.environ:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        keep_freed_memory()
        self.matmul_flops = matmul_rate(self.device, self.dtype)
        torch.manual_seed(config["seed"])
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        self.print(f"torch {torch.__version__} on {self.hardware()}, {str(self.dtype).removeprefix('torch.')}, "
                   f"{self.world_size} rank{'s' if self.world_size > 1 else ''}, "
                   f"matmul {self.matmul_flops / 1e9:,.0f} GFLOP/s a rank")

    def hardware(self):
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)} ({os.cpu_count()} cores)"
        return f"{self.device.type} ({platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads)"

    def print(self, *lines):
        """Prints on the first rank, above the progress bar."""
        if self.is_main:
            for line in lines:
                self.bar.write(line) if self.bar else print(line, flush=True)

    # --- out_dir ---

    def path(self, *names):
        return os.path.join(self.out_dir, *names)

    def check_out_dir(self):
        holds_run = [name for name in ("resume", "log.jsonl", "model.safetensors") if os.path.exists(self.path(name))]
        if self.config["resume"]:
            self.state = self.read_state()
        elif holds_run and not self.config["overwrite"]:
            raise ValueError(f"{self.out_dir} already holds a run ({', '.join(holds_run)}); continue it with "
                             "--resume=true, replace it with --overwrite=true, or choose another --out_dir")
        try:
            os.makedirs(self.out_dir, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make out_dir {self.out_dir!r}: {error.strerror}") from None
        if not os.access(self.out_dir, os.W_OK):
            raise ValueError(f"cannot write in out_dir {self.out_dir!r}: permission denied")

    def read_state(self):
        path = self.path("resume", "state.pt")
        if not os.path.exists(path):
            begun = os.path.exists(self.path("log.jsonl"))
            advice = "begin again with --overwrite=true" if begun else "leave --resume out"
            raise ValueError(f"--resume=true, but {self.out_dir} holds no state to resume (no {path}); {advice}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}); the model beside it can still be given "
                             "to --init_from") from None
        before, now = {**state["options"], "dtype": state["dtype"]}, {**self.config, "dtype": str(self.dtype)}
        changed = [f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in {**before, **now}
                   if name not in MAY_CHANGE_ON_RESUME and before.get(name) != now.get(name)]
        if changed:
            raise ValueError(f"--resume=true needs the options of the run in {self.out_dir}, but {'; '.join(changed)}; "
                             "to train a finished model further, begin a new run with --init_from")
        return state

    def resume(self, model, optimizer):
        """Opens the log; restores model, optimizer, first_step, elapsed time and `extra` of the newest saved state."""
        if self.state is not None:
            model.load_state_dict(self.state["model"])
            optimizer.load_state_dict(self.state["optimizer"])
            self.first_step, self.elapsed_before = self.state["step"], self.state["elapsed"]
            self.extra = self.state["extra"]
            torch.set_rng_state(self.state["rng"])
        if self.is_main:
            if self.state is not None:
                truncate(self.path("log.jsonl"), self.state["log_size"])    # what came after is written again
            elif os.path.exists(self.path("model.safetensors")):    # overwritten: aside until the new run's first save
                shutil.rmtree(self.path("replaced"), ignore_errors=True)
                os.makedirs(self.path("replaced"))
                for name in ("resume", "best", "curves.png", "log.jsonl", "model.safetensors"):
                    if os.path.exists(self.path(name)):
                        os.replace(self.path(name), self.path("replaced", name))
            write_atomic(self.path("options.json"), json.dumps(self.config, indent=2).encode())
            self.log_file = open(self.path("log.jsonl"), "a" if self.state else "w", encoding="utf-8")
            if sys.stderr.isatty():
                from tqdm import tqdm
                bar = "{percentage:3.0f}% {bar} {elapsed} gone, {postfix}"
                self.bar = tqdm(total=1000, bar_format=bar, leave=False)
            self.tracker = start_tracker(self.config.get("report_to", ""), self.config, self.out_dir)
        self.state = None
        self.begin = time.perf_counter()

    def save(self, model, optimizer, step, tokenizer=None, best=False):
        """Saves the model directory and, in one file, all that resuming at `step` needs; best=True also to best/."""
        if self.is_main:
            for folder in [self.out_dir] + [self.path("best")] * best:
                model.save(folder)
                if tokenizer is not None:
                    tokenizer.save(folder)
            self.log_file.flush()
            os.fsync(self.log_file.fileno())
            state = dict(step=step, model=model.state_dict(), optimizer=optimizer.state_dict(), extra=self.extra,
                         rng=torch.get_rng_state(), options=self.config, dtype=str(self.dtype),
                         log_size=self.log_file.tell(), elapsed=self.clock())
            write_atomic(self.path("resume", "state.pt"), lambda f: torch.save(state, f))
            shutil.rmtree(self.path("replaced"), ignore_errors=True)
        self.barrier()

    # --- ranks ---

    def parallel(self, model):
        """The model on this rank's device and in its dtype; with several ranks torch's DDP averages its gradients,
        applied in place, so that names and methods stay."""
        model.to(self.device)
        model.model.dtype = self.dtype
        if self.world_size > 1:
            from torch.distributed._composable.replicate import replicate
            model = replicate(model, device_id=self.device)
        return model

    def move(self, *tensors):
        """The tensors on this rank's device; None stays None."""
        return [x if x is None else x.to(self.device, non_blocking=True) for x in tensors]

    def meet(self, model, now):
        """Says, before a forward pass, whether its backward pass averages gradients over the ranks: once a step."""
        if self.world_size > 1:
            model.set_requires_gradient_sync(now)

    def total(self, value):
        """`value`, a number or tensor, summed over the ranks, as a float64 tensor on the CPU."""
        value = value.cpu().double() if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
        if self.world_size > 1:
            value = value.to(self.device if self.device.type == "cuda" else "cpu")
            dist.all_reduce(value)
        return value.cpu()

    def gather(self, items):
        """The ranks' lists as one, in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return items
        lists = [None] * self.world_size
        dist.all_gather_object(lists, items)
        return [item for each in lists for item in each]

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()

    def elapsed(self):
        """Seconds of training so far, over all resumes, by the first rank's clock: the same number on every rank."""
        return self.total(self.clock() if self.is_main else 0.0).item()

    def clock(self):
        """Seconds of training so far by this rank's own clock."""
        return self.elapsed_before + time.perf_counter() - self.begin

    def on_signal(self, number, frame):
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        if self.is_main:
            print(f"\n{signal.Signals(number).name}: finishing this step, then saving", file=sys.stderr, flush=True)

    def stop_requested(self):
        """True on every rank once any of them got SIGINT or SIGTERM. A second signal ends at once."""
        return bool(self.total(self.stopping)) if self.world_size > 1 else self.stopping

    # --- log ---

    def log(self, step, done=None, **metrics):
        """One record in log.jsonl, and at most one line a second on the console, with the share of the run that is
        `done` (0 to 1) and the time left. Metrics are numbers or one-element tensors."""
        if not self.is_main:
            return
        metrics = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in metrics.items()}
        self.log_file.write(json.dumps({"step": step, **metrics}) + "\n")
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
        self.log_file.flush()
        shown = (f"{name} {shorten(value)}" for name, value in metrics.items()
                 if not name.startswith(NOT_SHOWN) and (value or name not in IF_NOT_ZERO))
        line = " | ".join([f"step {step:>5}", *shown])
        self.print(line + (f" | {left}" if left else ""))

    def finish(self):
        """Closes the log, draws curves.png and leaves the ranks."""
        if self.bar:
            self.bar.close()
            self.bar = None
        if self.is_main and self.log_file:
            self.log_file.close()
            if self.config.get("curves", True):
                draw_curves(self.path("log.jsonl"), self.path("curves.png"))
        if self.world_size > 1:
            dist.destroy_process_group()


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


def draw_curves(log_path, png_path):
    """A picture of every metric in log.jsonl over steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    curves = {}
    with open(log_path, encoding="utf-8") as f:
        for record in map(json.loads, f):
            step = record.pop("step")
            for name, value in record.items():
                if isinstance(value, (int, float)):
                    curves.setdefault(name, ([], []))[0].append(step)
                    curves[name][1].append(value)
    if not curves:
        return
    rows = -(-len(curves) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(12, 2.8 * rows), squeeze=False)
    for axis in axes.flat[len(curves):]:
        axis.axis("off")
    for axis, (name, (steps, values)) in zip(axes.flat, curves.items()):
        axis.plot(steps, values, "." if len(values) == 1 else "-", linewidth=1)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    write_atomic(png_path, lambda f: figure.savefig(f, format="png", dpi=110))
    plt.close(figure)


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


class SpikeGuard:
    """Says whether an update should be applied: not when the loss or the gradient norm is not finite, or the norm is
    `factor` times above the median of the last 100. After `patience` refusals in a row, ValueError. `state()` is what a
    saved state must hold of it."""

    def __init__(self, factor, patience, norms=(), skipped=0, row=0):
        self.factor, self.patience, self.norms, self.skipped, self.row = factor, patience, list(norms), skipped, row

    def state(self):
        return dict(norms=self.norms, skipped=self.skipped, row=self.row)

    def accepts(self, loss, grad_norm):
        moved = [norm for norm in self.norms if norm]   # no signal at all says nothing of what is usual
        usual = statistics.median(moved) if len(moved) >= 20 else float("inf")
        if math.isfinite(loss) and math.isfinite(grad_norm) and grad_norm <= self.factor * max(usual, 1e-12):
            self.norms, self.row = (self.norms + [grad_norm])[-100:], 0
            return True
        self.skipped, self.row = self.skipped + 1, self.row + 1
        if self.row >= self.patience:
            raise ValueError(f"{self.row} updates in a row were skipped: the loss is now {loss:.3g}, the gradient norm "
                             f"{grad_norm:.3g}, its median {usual:.3g}; begin again, or from the best weights so far "
                             "(--init_from=OUT_DIR/best), with lower learning rates or more warmup_steps")
        return False
