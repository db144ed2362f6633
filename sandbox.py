"""Runs Python that a model wrote, in a process of its own: sandbox.run(program) -> (passed, reason).

This protects against accidents: endless loops, runaway memory, lost files, processes left behind, calls to the network.
It does not stop an attacker who knows how it is made; run hostile programs in a virtual machine. What is enforced:

    wall-clock time, then the death of the whole process group      by the parent; Linux and macOS
    CPU time, size of a file, number of open files, no core dump    resource limits; Linux and macOS
    memory, as address space                                        resource limit; Linux, as macOS ignores it
    no process, thread, program or signal; no socket of any kind,   the kernel (seccomp); Linux on x86_64 and arm64
        no pipe or device in the file system
    the same, where Python code asks for it                         audit hook; Linux and macOS
    nothing written, renamed or removed outside an empty            audit hook: Python's own calls, not those of C
        temporary folder, which is removed afterwards               libraries; Linux and macOS
    nothing on stdin, output thrown away, no environment            by the parent; Linux and macOS

The limit on the number of processes is set too, but does not bind root. Reading files is allowed, as Python itself
lives in them. Windows has none of this: there run() raises ValueError.
"""
import contextlib
import json
import os
import struct
import sys

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")      # what follows a finished function (Chen et al. 2021, 2.1)
FILE_BYTES = 1 << 20        # of one file that the program writes
OPEN_FILES = 64

# audited events (docs.python.org/3/library/audit_events.html): all that begin like these are refused
REFUSED = ("socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "pty.",
           "signal.pthread_kill", "_thread.start", "resource.", "ctypes.", "syslog.", "os.setxattr", "os.removexattr")
# and these where a path lies outside the temporary folder, with the number of their leading arguments that are paths
WRITES = {"os.remove": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.mkdir": 1, "os.rmdir": 1, "os.truncate": 1,
          "os.chmod": 1, "os.chown": 1, "os.chflags": 1, "os.utime": 1, "shutil.rmtree": 1, "shutil.move": 2,
          "sqlite3.connect": 1}
# system calls: clone fork vfork clone3, execve execveat, kill tkill tgkill, socket socketpair, ptrace, io_uring_setup,
# mknod mknodat
SYSTEM_CALLS = {"x86_64": (56, 57, 58, 435, 59, 322, 62, 200, 234, 41, 53, 101, 425, 133, 259),
                "aarch64": (220, 435, 221, 281, 129, 130, 131, 198, 199, 117, 425, 33)}
# events whose last arguments are folders that the paths are relative to, -1 for none: how many
FOLDERS = {"os.remove": 1, "os.rename": 2, "os.link": 2, "os.symlink": 1, "os.mkdir": 1, "os.rmdir": 1, "os.chmod": 1,
           "os.chown": 1, "os.utime": 1}


def run(program, seconds=5, megabytes=512):
    """(passed, reason): whether the Python source ran to its last line within the limits, and if not, why, in a few
    words. To leave early does not count, with whatever exit status. May be called from several threads at once.

    `seconds` is wall-clock time and includes the start of Python; `megabytes` are of 2**20 bytes.
    ValueError on a system without these limits.
    """
    # imported here, as the other process starts faster without them
    import secrets
    import signal
    import subprocess
    import tempfile
    if os.name != "posix":
        raise ValueError(f"sandbox.run needs Linux or macOS, for their limits on processes; this is {sys.platform}")
    token = secrets.token_hex(16)       # said at the end: an accident does not find it
    order = json.dumps({"program": program, "token": token, "seconds": seconds, "megabytes": megabytes})
    timed_out = False
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder, \
            tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as report:
        stdin.write(order.encode())
        stdin.seek(0)
        environment = {"HOME": folder, "TMPDIR": folder, "OPENBLAS_NUM_THREADS": "1", "PYTHONUTF8": "1",
                       "PYTHONHASHSEED": "0"}       # sets have the same order every time; -I would refuse it
        libraries = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")        # Python itself may need them
        environment |= {name: os.environ[name] for name in libraries if name in os.environ}
        child = subprocess.Popen([sys.executable, "-s", "-B", __file__], cwd=folder, env=environment, stdin=stdin,
                                 stdout=report, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):      # nobody left, or only zombies
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        report.seek(0)
        said = report.read(1000).decode("utf-8", "replace")
    if timed_out:
        return False, f"not finished after {seconds} s"
    if said == token:
        return True, "passed"
    if child.returncode < 0:
        return False, f"killed by {signal.Signals(-child.returncode).name}"
    return False, said or f"left before its last line, with exit status {child.returncode}"


def humaneval_program(row, completion):
    """Source that runs a row of HumanEval.jsonl on a completion of its prompt, which ends where the function does."""
    ends = [at for at in map(completion.find, STOP) if at >= 0]
    completion = completion[:min(ends, default=None)]
    return f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})\n"


# --- what runs in the other process ---

def child():
    """Reads the order from stdin, limits itself, runs the program, and reports on what was stdout."""
    with open(0, closefd=False) as stdin:
        order = json.load(stdin)
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    write, leave = os.write, os._exit   # the program may replace them
    import types
    module = sys.modules["__main__"] = types.ModuleType("__main__")     # hides this file from the program
    del sys.path[0]                     # the folder of this file
    try:
        set_limits(order["seconds"], order["megabytes"])
        exec(compile(order["program"], "program", "exec"), module.__dict__)
        said = order["token"]
    except BaseException as error:      # SystemExit too: the last line was not reached
        try:
            said = f"{type(error).__name__}: {error}"[:200].rstrip(": ")
        except BaseException:
            said = type(error).__name__
    write(report, said.encode("utf-8", "replace"))
    leave(0)


def set_limits(seconds, megabytes):
    import resource
    limits = {"RLIMIT_AS": megabytes << 20, "RLIMIT_CPU": int(seconds) + 1, "RLIMIT_FSIZE": FILE_BYTES,
              "RLIMIT_NOFILE": OPEN_FILES, "RLIMIT_CORE": 0, "RLIMIT_NPROC": 0}
    refuse_system_calls()
    for name, value in limits.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(number, (value, value))
        except (ValueError, OSError):
            if sys.platform == "linux":         # others lack some
                raise
    sys.addaudithook(audit_hook(os.path.realpath(os.getcwd())))


def refuse_system_calls():
    """On Linux a seccomp filter: from now on SYSTEM_CALLS fail with EPERM. A kernel that has none is left as it is."""
    # imported on every system, as numpy needs it and the audit hook will refuse what the first import does
    import ctypes
    if sys.platform != "linux" or os.uname().machine not in SYSTEM_CALLS:
        return
    load, equal, answer, eperm, allow = 0x20, 0x15, 0x06, 0x50001, 0x7FFF0000       # linux/bpf_common.h and seccomp.h
    steps = [(load, 0, 0, 0)]                                           # the number of the call
    for number in SYSTEM_CALLS[os.uname().machine]:
        steps += [(equal, 0, 1, number), (answer, 0, 0, eperm)]         # or skip one
    steps.append((answer, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)))
    prctl, number = ctypes.CDLL(None).prctl, ctypes.c_ulong
    prctl(38, number(1), number(0), number(0), number(0))               # PR_SET_NO_NEW_PRIVS
    prctl(22, number(2), number(ctypes.addressof(program)))             # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def audit_hook(folder):
    """A hook that raises PermissionError on what the program may not do; `folder` is where it may write."""
    realpath, fsdecode, join = os.path.realpath, os.fsdecode, os.path.join
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def hook(event, arguments):
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is not allowed in the sandbox")
        folders = arguments[len(arguments) - FOLDERS.get(event, 0):]
        address = event == "sqlite3.connect" and str(arguments[0]).startswith("file:")
        if address or any(number != -1 for number in folders):
            raise PermissionError(f"{event} by an address or a folder's number is not allowed in the sandbox")
        paths = arguments[:WRITES.get(event, 0)]
        if event == "open" and arguments[2] & writing:
            paths = arguments[:1]
        for path in (fsdecode(path) for path in paths if not isinstance(path, int)):        # an int is an open file
            if path not in (os.devnull, ":memory:") and not join(realpath(path), "").startswith(join(folder, "")):
                raise PermissionError(f"{event} outside the sandbox's folder is not allowed")

    return hook


if __name__ == "__main__":
    child()
