"""A pure function over many items, on every core of this machine or on a Ray cluster: the same results, in order.

    for result in run(function, items): ...                                     # all cores
    for result in run(function, items, "ray", address="10.0.0.1:6379"): ...     # Ray Data, a cluster that runs

`function` is a module's own function, or a functools.partial of one, and its argument and result can be pickled. Items
are taken as they are needed, so a stream of any length takes the memory of a few of them. A result depends on its item
alone: neither the number of workers nor the engine changes it, and an item whose worker dies is simply done again.
"""
import contextlib
import functools
import glob
import itertools
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

HERE = os.path.dirname(os.path.abspath(__file__))
ENGINES = ("processes", "ray")
ATTEMPTS = 3                # times that an item's worker may die before the item is blamed
AHEAD = 2                   # items per process that wait or run: enough that none is ever idle
WINDOW = 16                 # items per worker that Ray gets at once


def run(function, items, engine="processes", workers=0, address=""):
    """Yields function(item) of every item, in the order of `items`.

    workers: processes, or CPUs of a local Ray cluster; 0 takes every core, 1 process is this one. address: of a Ray
    cluster that runs; without, one is started here and ends with this process. A ValueError of `function` is raised
    here with its sentence; so is one that says that a worker died over and over.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; it must be {' or '.join(ENGINES)}")
    if workers < 0:
        raise ValueError(f"workers is {workers}; it must be a number of processes, or 0 for every core")
    if address and engine != "ray":
        raise ValueError(f"address is {address!r} but engine is {engine}; a cluster is joined with --engine=ray")
    workers = workers or cores()
    if engine == "ray":
        outcomes = on_ray(function, items, workers, address)
    elif workers == 1:
        outcomes = map(functools.partial(outcome, function), items)
    else:
        outcomes = in_processes(function, items, workers)
    for result, sentence in outcomes:
        if sentence:
            raise ValueError(sentence)
        yield result


def cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def outcome(function, item):
    """(function(item), None), or (None, the sentence of its ValueError): a sentence travels well between processes."""
    try:
        return function(item), None
    except ValueError as error:
        return None, str(error) or repr(error)


# --- one machine ---

def in_processes(function, items, workers):
    """Yields outcomes. The processes are spawned, not forked: a fork of a process with threads may hang."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")       # for the children: there is a process for every core already
    items, waiting, futures, pool, deaths = iter(items), deque(), deque(), None, 0
    try:
        while True:
            pool = pool or ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), leave_with_parent)
            try:
                while len(futures) < AHEAD * workers:
                    if len(futures) == len(waiting):
                        waiting.extend(itertools.islice(items, 1))
                    if len(futures) == len(waiting):
                        break
                    with no_interrupt():
                        futures.append(pool.submit(outcome, function, waiting[len(futures)]))
                if not waiting:
                    return
                result = futures[0].result()
            except BrokenProcessPool:                   # all that ran is lost with the one that died: again, from here
                deaths += 1
                if deaths == ATTEMPTS:
                    raise ValueError(f"a worker process died {deaths} times over the same work, most likely for want "
                                     f"of memory; run again with fewer than --workers={workers}: finished work is "
                                     "kept") from None
                pool.shutdown(wait=True, cancel_futures=True)
                pool = None
                futures.clear()
                continue
            waiting.popleft(), futures.popleft()
            deaths = 0
            yield result
    finally:
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def no_interrupt():
    """Holds Ctrl-C back until the end: a process that is started in here never gets it, not even while it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if os.name == "posix" else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_with_parent():
    """Ends this process when its parent is gone, however that ended; Ctrl-C is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: multiprocessing.connection.wait([parent]) and os._exit(1), daemon=True).start()


# --- a cluster ---

def on_ray(function, items, workers, address):
    """Yields outcomes. Ray itself does again what a lost worker or machine had begun."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError("engine is ray, which is not installed; pip install -r requirements-clean.txt and "
                         "\"ray[data]\" as it says there, or use --engine=processes") from None
    if not ray.is_initialized():                        # what runs already goes on: it ends with this process
        start_ray(ray, workers, address)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    function = functools.partial(on_row, function)
    size = WINDOW * max(1, int(ray.cluster_resources().get("CPU", 1)))
    items = iter(items)
    while window := [{"item": pickle.dumps(item)} for item in itertools.islice(items, size)]:
        rows = ray.data.from_items(window, override_num_blocks=len(window)).map(function)
        for row in rows.iter_rows():
            yield pickle.loads(row["outcome"])


def start_ray(ray, workers, address):
    """Starts a cluster of so many CPUs here, or joins the one at `address`, and sends it our files."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():                                             # Ray itself would try for two minutes
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise ValueError(f"nothing answers at {address} ({error}); look for the cluster's address with ray status, "
                             "or leave --address out to start one here") from None
    with tempfile.TemporaryDirectory() as code:
        for path in glob.glob(os.path.join(HERE, "*.py")):
            shutil.copy(path, code)
        try:
            ray.init(address=address or "local", num_cpus=None if address else workers, include_dashboard=False,
                     log_to_driver=False, logging_level="ERROR",
                     runtime_env={"working_dir": code, "env_vars": {"OMP_NUM_THREADS": "1"}})
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(f"Ray does not start at {address or 'this machine'} ({str(error).splitlines()[0]})"
                             ) from None
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def on_row(function, row):
    return {"outcome": pickle.dumps(outcome(function, pickle.loads(row["item"])))}
