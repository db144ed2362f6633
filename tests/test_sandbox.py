"""sandbox.py: every limit holds, nobody passes without reaching the last line, and HumanEval's own solutions pass."""
import gzip
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import sandbox

DATA = Path(os.environ.get("ZERO2CHAT_DATA") or Path(sandbox.__file__).resolve().parents[1] / "shared" / "data")
HUMANEVAL = DATA / "eval/code/HumanEval.jsonl.gz"
needs_humaneval = pytest.mark.skipif(not HUMANEVAL.is_file(), reason=f"no {HUMANEVAL}; set ZERO2CHAT_DATA")
linux = pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in sandbox.SYSTEM_CALLS,
                           reason="the kernel's part is for Linux on x86_64 and arm64")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs Linux or macOS")


def why(program, **limits):
    """The reason why a program that must not pass did not."""
    passed, reason = sandbox.run(program, **limits)
    assert not passed
    return reason


# --- what passes ---

@pytest.mark.parametrize("program", [
    "", "x = 1\nassert x == 1", "import math, random, re, collections, hashlib\nassert math.gcd(4, 6) == 2",
    "print('text' * 10)", "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\nassert A(1) == A(1)",
    "with open('a', 'w') as f:\n    f.write('x')\nimport os\nos.rename('a', 'b')\nos.remove('b')",
    "open(b'a', 'wb').close()\nimport os\nopen(os.open('a', os.O_RDWR), 'w').close()\nopen(os.devnull, 'w').close()",
    "import tempfile\nwith tempfile.TemporaryDirectory() as d:\n    open(d + '/x', 'w').close()",
    "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as f:\n    print(1)\nassert f.getvalue()",
    "import pickle\nclass A:\n    pass\npickle.loads(pickle.dumps(A()))", "import numpy\nassert numpy.ones(3).all()",
])
def test_an_honest_program_passes(program):
    assert sandbox.run(program, seconds=20) == (True, "passed")


@pytest.mark.parametrize("program, reason", [
    ("assert 1 == 2", "AssertionError"), ("1 / 0", "ZeroDivisionError: division by zero"), ("x = (", "SyntaxError"),
    ("raise ValueError('a' * 1000)", "ValueError: aaa"), ("x = '\ud800'", "UnicodeEncodeError"),
    ("class E(Exception):\n    def __str__(self):\n        raise E\nraise E", "E"), ("input()", "EOFError"),
    ("import sys\nassert sys.stdin.read() != ''", "AssertionError"),
])
def test_a_failing_program_fails_and_the_reason_says_why(program, reason):
    found = why(program, seconds=20)
    assert found.startswith(reason) and len(found) <= 200


@pytest.mark.parametrize("leave", [
    "import sys; sys.exit(0)", "import os; os._exit(0)", "exit()", "raise SystemExit", "raise KeyboardInterrupt",
    "import os; os.abort()", "import os, signal; signal.raise_signal(signal.SIGKILL)",
    "import os; os.closerange(0, 100)", "import os; [os.write(n, b'passed') for n in range(20) if n < 3]; os._exit(0)",
])
def test_who_leaves_early_does_not_pass_whatever_the_exit_status(leave):
    why(leave + "\nassert False")


def test_a_program_sees_neither_the_callers_variables_nor_its_folder_nor_this_file(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "1")
    assert sandbox.run(f"""
import os, sys, __main__
assert os.listdir() == [] and "SECRET_KEY" not in os.environ
assert {str(Path(sandbox.__file__).parent)!r} not in sys.path and not hasattr(__main__, "child")
""") == (True, "passed")


def test_sets_have_the_same_order_in_every_run():
    program = "raise ValueError(str(set('abcdefghijkl')))"
    assert sandbox.run(program) == sandbox.run(program)


# --- limits ---

@pytest.mark.parametrize("program", [
    "while True: pass", "import time\ntime.sleep(60)", "try:\n    while True: pass\nexcept: 0",
    "import signal\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\nwhile True: 0",
])
def test_endless_programs_are_ended(program):
    assert why(program, seconds=1) == "not finished after 1 s"


def test_cpu_time_is_limited_even_where_nobody_watches(monkeypatch):
    program = "import resource\nraise ValueError(resource.getrlimit(resource.RLIMIT_CPU)[1])"
    assert why(program, seconds=3) == "ValueError: 4"


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not limit address space")
@pytest.mark.parametrize("program", ["x = bytearray(1 << 30)", "x = []\nwhile True: x.append(bytearray(1 << 20))",
                                     "x = 'x' * (1 << 40)"])
def test_memory_is_limited(program):
    assert why(program, seconds=30) == "MemoryError"
    assert sandbox.run("x = bytearray(300 << 20)", seconds=30)[0]       # below the default limit
    assert why("x = bytearray(300 << 20)", megabytes=200) == "MemoryError"


def test_a_file_and_the_number_of_open_files_are_limited():
    assert sandbox.run("open('a', 'w').write('x' * (1 << 19))")[0]
    assert why("with open('a', 'w') as f:\n    f.write('x' * (1 << 21))").startswith("OSError")
    assert why("files = [open('a', 'w') for _ in range(1000)]").startswith("OSError")


@pytest.mark.parametrize("program", [
    "print('x' * (1 << 26))", "import os\nfor _ in range(100): os.write(1, b'x' * (1 << 20))",
    "import sys\nsys.stderr.write('x' * (1 << 26))",
])
def test_output_is_thrown_away(program, capfd):
    assert sandbox.run(program, seconds=20)[0]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("program", [
    "os.fork()", "while True: os.fork()", "subprocess.run(['true'])", "os.system('true')",
    "os.execv('/bin/sh', ['sh'])", "os.posix_spawn('/bin/sh', ['sh'], {})", "os.popen('true')",
    "multiprocessing.Process(target=print).start()", "os.kill(os.getppid(), 0)", "os.killpg(0, 15)",
    "ctypes.CDLL(None)", "resource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
    pytest.param("threading.Thread(target=print).start()", marks=linux),
])
def test_processes_threads_and_signals_are_refused(program):
    imports = "import ctypes, multiprocessing, os, resource, subprocess, sys, threading\n"
    assert why(imports + program).startswith(("PermissionError", "RuntimeError: can't start new thread"))


@pytest.fixture
def precious(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("precious")
    return tmp_path / "folder"


@pytest.mark.parametrize("program", [
    "open(file, 'w')", "open(file, 'a')", "open(file, 'r+')", "open(folder + '/new', 'x')", "os.open(file, os.O_RDWR)",
    "os.open(file, os.O_RDONLY | os.O_TRUNC)", "os.remove(file)", "os.unlink(file)", "os.truncate(file, 0)",
    "os.rename(file, 'here')", "open('a', 'w').close(); os.rename('a', file)", "shutil.rmtree(folder)",
    "os.rmdir(folder)", "os.mkdir(folder + '/new')", "shutil.move(file, 'here')", "shutil.copy('/etc/hosts', file)",
    "os.chmod(file, 0)", "pathlib.Path(file).write_text('')", "pathlib.Path(file).unlink()",
    "os.symlink(file, 'here'); open('here', 'w')",
    "os.chdir(folder); open('file', 'w')", "open(os.path.relpath(file), 'w')", "os.utime(file)",
    "os.link(file, 'here')", "open(file.encode(), 'wb')", "sqlite3.connect(folder + '/new')", "gzip.open(file, 'w')",
])
def test_files_outside_are_neither_written_nor_removed(program, precious):
    before = precious.stat(), (precious / "file").stat()
    names = f"import gzip, os, pathlib, shutil, sqlite3\nfolder, file = {str(precious)!r}, {str(precious / 'file')!r}\n"
    assert why(names + program).startswith("PermissionError")
    assert os.listdir(precious) == ["file"] and (precious / "file").read_text() == "precious"
    after = precious.stat(), (precious / "file").stat()
    assert [(s.st_mode, s.st_mtime_ns) for s in after] == [(s.st_mode, s.st_mtime_ns) for s in before]


@pytest.mark.parametrize("program", [
    "socket.create_connection(address)", "socket.socket().connect(address)", "socket.socket(type=socket.SOCK_DGRAM)",
    "socket.socket(socket.AF_UNIX)", "_socket.socket()", "urllib.request.urlopen('http://%s:%d' % address)",
    "socket.getaddrinfo('localhost', 80)", "socket.create_server(('127.0.0.1', 0))",
])
def test_the_network_is_out_of_reach(program):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        names = f"import _socket, socket, urllib.request\naddress = {server.getsockname()}\n"
        reason = why(names + program, seconds=20)
        assert "not allowed" in reason or "Operation not permitted" in reason
        with pytest.raises(TimeoutError):
            server.accept()


@linux
@pytest.mark.parametrize("program", ["_socket.socket()", "os.fork()", "os.kill(os.getppid(), 0)",
                                     "os.execv('/bin/sh', ['sh'])", "threading.Thread(target=print).start()"])
def test_the_kernel_refuses_without_the_audit_hook(program, monkeypatch, tmp_path):
    """A copy of the file whose audit hook lets everything pass."""
    source = Path(sandbox.__file__).read_text(encoding="utf-8")
    hook = "    sys.addaudithook(audit_hook(os.path.realpath(os.getcwd())))\n"
    assert source.count(hook) == 1
    (tmp_path / "without.py").write_text(source.replace(hook, ""), encoding="utf-8")
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "without.py"))
    reason = why("import _socket, os, threading\n" + program)
    assert "not allowed" not in reason
    assert "Operation not permitted" in reason or "can't start new thread" in reason


# --- what is left behind ---

@pytest.mark.parametrize("ending", ["", "time.sleep(60)"])
def test_a_process_left_behind_is_killed(ending, tmp_path, monkeypatch):
    """With another file in place of the limits, as the limits would refuse the process."""
    note, unlimited = tmp_path / "pid", tmp_path / "unlimited.py"
    unlimited.write_text(f"""
import os, time
pid = os.fork()
if pid == 0:
    time.sleep(60)
with open({str(note)!r}, "w") as f:
    f.write(str(pid))
{ending}
""")
    monkeypatch.setattr(sandbox, "__file__", str(unlimited))
    why("", seconds=3)
    pid = int(note.read_text())
    for _ in range(200):                # the kill is done, but the system's bookkeeping may take a moment
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):      # gone, or dead and not yet collected by its new parent
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError(f"the process left behind was still running, in state {state}")


def test_nothing_of_a_run_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    count_files = lambda: len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    files, threads = count_files(), threading.active_count()
    sandbox.run("import os\nos.makedirs('a/b/c')\nopen('a/b/c/d', 'w').write('x')")
    sandbox.run("open('a', 'w')\nwhile True: pass", seconds=0.5)
    assert os.listdir(tmp_path) == [] and threading.active_count() == threads
    assert count_files() == files


def test_runs_in_threads_do_not_disturb_each_other():
    programs = ["assert True", "assert False", "raise ValueError(7)", "while True: pass", "open('a', 'x')"] * 4
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda program: sandbox.run(program, seconds=3), programs))
    assert verdicts == [(True, "passed"), (False, "AssertionError"), (False, "ValueError: 7"),
                        (False, "not finished after 3 s"), (True, "passed")] * 4


def test_other_systems_are_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(ValueError, match="needs Linux or macOS"):
        sandbox.run("")


# --- HumanEval ---

ROW = {"prompt": "def double(x):\n    \"\"\"Twice x.\"\"\"\n", "entry_point": "double",
       "test": "def check(candidate):\n    assert candidate(2) == 4\n"}


@pytest.mark.parametrize("after", [
    "", "\ndef double(x):\n    return 0\n", "\nclass A:\n    1 / 0\n", "\n# text", "\nif 1 / 0:\n    0",
    "\nprint(1 / 0)", "\n\n\nprint(1 / 0)\nclass A: pass",
])
def test_a_completion_ends_where_its_function_does(after):
    program = sandbox.humaneval_program(ROW, "    # twice\n    if x:\n        return x + x" + after)
    assert sandbox.run(program) == (True, "passed")


@pytest.mark.parametrize("completion", ["    return x", "    return", "", "    return x +", "    raise SystemExit(0)",
                                        "    import os; os._exit(0)", "Sure! Here is the function:"])
def test_a_wrong_completion_does_not_pass(completion):
    why(sandbox.humaneval_program(ROW, completion))


@needs_humaneval
def test_all_reference_solutions_pass_and_none_that_returns_nothing():
    with gzip.open(HUMANEVAL, "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    programs = [sandbox.humaneval_program(row, row["canonical_solution"]) for row in rows]
    programs += [sandbox.humaneval_program(row, "    return None\n") for row in rows[::8]]
    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(lambda program: sandbox.run(program, seconds=30), programs))
    assert len(rows) == 164
    assert [(row["task_id"], reason) for row, (passed, reason) in zip(rows, verdicts) if not passed] == []
    assert not any(passed for passed, _ in verdicts[164:])
