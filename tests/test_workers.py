"""workers.py: the same results in the same order, however many workers there are and whichever of them dies."""
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import workers

HERE = Path(__file__).resolve().parent.parent
FUNCTIONS = '''
import os, signal, sys, time

def square(x):
    time.sleep(0.02 * (x % 3))              # so that they do not end in the order in which they began
    return x * x, os.getpid()

def once_killed(folder, x):
    """x * x; the first worker that is asked for 7 dies in the middle of it."""
    if x == 7 and not os.path.exists(f"{folder}/killed"):
        open(f"{folder}/killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return x * x

def always_killed(x):
    if x == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return x * x

def refused(x):
    if x == 7:
        raise ValueError("row 7 is not what it should be")
    return x
'''


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """The module above, importable here and in every worker."""
    (tmp_path / "worked.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sys.modules.pop("worked", None)
    import worked
    return worked


@pytest.fixture
def ray():
    """Not started yet, and stopped afterwards."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[data]==2.60.0'")
    ray.shutdown()
    yield ray
    ray.shutdown()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_the_order_of_the_items_for_any_number_of_processes(functions, count):
    results = list(workers.run(functions.square, range(30), workers=count))
    assert [value for value, _ in results] == [x * x for x in range(30)]
    pids = {pid for _, pid in results}
    assert (pids == {os.getpid()}) if count == 1 else os.getpid() not in pids


def test_items_are_taken_as_they_are_needed(functions):
    taken = []
    results = workers.run(functions.square, (taken.append(x) or x for x in range(1000)), workers=2)
    next(results)
    assert len(taken) <= workers.AHEAD * 2
    results.close()


def test_a_worker_killed_in_the_middle_changes_nothing(functions, tmp_path):
    function = functools.partial(functions.once_killed, str(tmp_path))
    assert list(workers.run(function, range(30), workers=2)) == [x * x for x in range(30)]
    assert (tmp_path / "killed").exists()


def test_an_item_that_kills_every_worker_ends_in_one_sentence_after_the_results_before_it(functions):
    results, got = workers.run(functions.always_killed, range(30), workers=2), []
    with pytest.raises(ValueError, match=r"worker process died 3 times .* fewer than --workers=2"):
        for result in results:
            got.append(result)
    assert got == [x * x for x in range(7)]


@pytest.mark.parametrize("count", [1, 2])
def test_the_sentence_of_a_function_is_raised_here(functions, count):
    with pytest.raises(ValueError, match="^row 7 is not what it should be$"):
        list(workers.run(functions.refused, range(30), workers=count))


@pytest.mark.skipif(os.name != "posix", reason="needs kill")
def test_workers_leave_when_their_parent_is_killed(functions, tmp_path):
    code = f"""
import sys; sys.path[:0] = [{str(HERE)!r}, {str(tmp_path)!r}]
import workers, worked
if __name__ == "__main__":
    for value, pid in workers.run(worked.square, range(10 ** 9), workers=2):
        print(pid, flush=True)
"""
    (tmp_path / "main.py").write_text(code)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], stdout=subprocess.PIPE, text=True)
    pids = {int(parent.stdout.readline()) for _ in range(8)}
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            break
        time.sleep(0.1)
    parent.stdout.close()
    assert not [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists()]


@pytest.mark.skipif(os.name != "posix", reason="needs process groups")
def test_ctrl_c_while_workers_start_is_said_by_the_parent_alone(functions, tmp_path):
    (tmp_path / "main.py").write_text(f"""
import os, sys, time
sys.path[:0] = [{str(HERE)!r}, {str(tmp_path)!r}]
if __name__ != "__main__":                  # a worker that is starting
    open(f"{tmp_path}/{{os.getpid()}}.starts", "w").close()
    time.sleep(1)
import workers, worked
if __name__ == "__main__":
    for value, pid in workers.run(worked.square, range(10 ** 9), workers=2):
        pass
""")
    parent = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], stderr=subprocess.PIPE, text=True,
                              start_new_session=True)
    while len(list(tmp_path.glob("*.starts"))) < 2 and parent.poll() is None:
        time.sleep(0.02)
    os.killpg(parent.pid, signal.SIGINT)
    said = parent.communicate(timeout=30)[1]
    assert said.count("KeyboardInterrupt") == 1 and "Process Spawn" not in said and parent.returncode == -signal.SIGINT


@pytest.mark.parametrize("arguments, sentence", [
    (dict(engine="spark"), "engine is 'spark'; it must be processes or ray"),
    (dict(workers=-1), "workers is -1"),
    (dict(address="10.0.0.1:6379"), "joined with --engine=ray")])
def test_bad_options_are_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        next(workers.run(abs, [1], **arguments))


def test_ray_gives_the_same_results_in_order_and_a_killed_worker_changes_nothing(ray, functions, tmp_path):
    function = functools.partial(functions.once_killed, str(tmp_path))
    assert list(workers.run(function, range(40), "ray", workers=2)) == [x * x for x in range(40)]
    assert (tmp_path / "killed").exists()
    with pytest.raises(ValueError, match="^row 7 is not what it should be$"):
        list(workers.run(functions.refused, range(10), "ray", workers=2))


def test_an_address_where_no_cluster_runs_is_one_sentence(ray, functions):
    with pytest.raises(ValueError, match="nothing answers at 127.0.0.1:1 .*ray status"):
        list(workers.run(functions.square, range(3), "ray", address="127.0.0.1:1"))
