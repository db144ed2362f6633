"""The machine under every stage: ranks, device, dtype, seeds, atomic files, exact resume; its log is record.py's.

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
import sys
import time

import torch
import torch.distributed as dist

import record

MAY_CHANGE_ON_RESUME = ("resume", "overwrite", "out_dir", "device", "micro_rows", "micro_pairs", "micro_questions",
                        "compile", "report_to", "curves")

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
    """torch.device of "auto" (cuda, else mps, else cpu) or of a name, a GPU then being torch's current one; ValueError
    if this machine has none such."""
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
    if kind == "cuda":
        torch.cuda.set_device(int(index or 0))
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


def exact(x):
    """A tensor as float64, on the CPU where its device has no such numbers (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


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
        self.records = None                     # a Log on the first rank, once resume() was called
        self.check_out_dir()
        if "RANK" in os.environ:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
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
        if self.records:
            self.records.print(*lines)
        elif self.is_main:
            print(*lines, sep="\n", flush=True)

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
            if self.state.get("cuda_rng") is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(self.state["cuda_rng"], self.device)
        if self.is_main:
            if self.state is None and os.path.exists(self.path("model.safetensors")):
                shutil.rmtree(self.path("replaced"), ignore_errors=True)    # overwritten: aside until the first save
                os.makedirs(self.path("replaced"))
                for name in ("resume", "best", "curves.png", "log.jsonl", "model.safetensors"):
                    if os.path.exists(self.path(name)):
                        os.replace(self.path(name), self.path("replaced", name))
            kept = self.state["log_size"] if self.state else 0
            self.records = record.Log(self.out_dir, self.config, self.clock, kept)
            write_atomic(self.path("options.json"), json.dumps(self.config, indent=2).encode())
        self.state = None
        self.begin = time.perf_counter()

    def save(self, model, optimizer, step, tokenizer=None, best=False):
        """Saves the model directory and, in one file, all that resuming at `step` needs; best=True also to best/."""
        if self.is_main:
            for folder in [self.out_dir] + [self.path("best")] * best:
                model.save(folder)
                if tokenizer is not None:
                    tokenizer.save(folder)
            cuda_rng = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
            state = dict(step=step, model=model.state_dict(), optimizer=optimizer.state_dict(), extra=self.extra,
                         rng=torch.get_rng_state(), cuda_rng=cuda_rng, options=self.config, dtype=str(self.dtype),
                         log_size=self.records.saved(), elapsed=self.clock())
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

    def compiles(self, compile):
        """Whether the option `compile` asks for torch.compile here: auto means on cuda, if there is a C compiler.
        ValueError where it cannot be had."""
        compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
        if compile not in ("auto", "true", "false") or compile == "true" and not compiler:
            raise ValueError("compile must be auto, true or false, and true needs a C compiler; got "
                             f"{compile!r} and {'a compiler' if compiler else 'no compiler'}")
        return compile == "true" or compile == "auto" and self.device.type == "cuda" and compiler

    def move(self, *tensors):
        """The tensors on this rank's device, copied to a GPU while it computes; None stays None."""
        pinned = self.device.type == "cuda"
        return [x if x is None else (x.pin_memory() if pinned else x).to(self.device, non_blocking=pinned)
                for x in tensors]

    def meet(self, model, now):
        """Says, before a forward pass, whether its backward pass averages gradients over the ranks: once a step."""
        if self.world_size > 1:
            model.set_requires_gradient_sync(now)

    def total(self, value):
        """`value`, a number or tensor, summed over the ranks, as a float64 tensor: of a tensor on a GPU there, and
        nothing waits for it."""
        value = exact(value) if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

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

    def mark(self):
        """Where `rate` measures from: seconds, or an event among the GPU's work."""
        return record.after_copies(self.device) if self.device.type == "cuda" else time.perf_counter()

    def rate(self, begin):
        """One over the seconds since mark() gave `begin`, for a record: of a GPU's work, and known a step late."""
        return record.Rate(begin, self.mark()) if self.device.type == "cuda" else 1 / (self.mark() - begin)

    def stop_requested(self):
        """True on every rank once any of them got SIGINT or SIGTERM. A second signal ends at once."""
        return bool(self.total(self.stopping)) if self.world_size > 1 else self.stopping

    def log(self, step, done=None, **metrics):
        """Records metrics of a step on the first rank, as record.Log says; no rank waits for this step."""
        if self.is_main:
            self.records.record(step, done, metrics)

    def finish(self):
        """Closes the log, draws curves.png and leaves the ranks."""
        if self.records:
            self.records.close()
            self.records = None
            picture = record.curves(self.path("log.jsonl")) if self.config.get("curves", True) else None
            if picture:
                write_atomic(self.path("curves.png"), picture)
        if self.world_size > 1:
            dist.destroy_process_group()
