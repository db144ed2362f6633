"""One function of one text in a process of its own, with a time limit: a document that crashes a library of C code, or
keeps it busy without end, costs itself and no more.

    isolated.call("cleaners", "html", "<html>...", seconds=60)      # what cleaners.html returns; Lost if it never does

The process is begun at the first call, serves one call after another, is begun anew after a loss, and ends with us.
Whether a text is lost is its own affair: what counts is time of computing, and a process that somebody else ends, as
the system does for want of memory, is replaced.
"""
import atexit
import importlib
import os
import pickle
import signal
import subprocess
import sys


class Lost(Exception):
    """Why there is no answer: "crashed", "took more than 60 s" or "raised ValueError"."""


ATTEMPTS = 3                            # processes that may die over the same text before it is blamed
server = None                           # the process that serves


def call(module, name, text, seconds):
    """module.name(text). Lost if that raises an error, computes for more than `seconds`, or ends ATTEMPTS processes."""
    global server
    for _ in range(ATTEMPTS):
        if server is None or server.poll() is not None:
            server = subprocess.Popen([sys.executable, os.path.abspath(__file__)], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, start_new_session=True)   # Ctrl-C is ours to answer
            atexit.register(server.kill)
        try:
            pickle.dump((module, name, text, seconds), server.stdin)
            server.stdin.flush()
            answer, error = pickle.load(server.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            died = server.wait()
            atexit.unregister(server.kill)
            if died == -signal.SIGPROF:
                raise Lost(f"took more than {seconds} s") from None
            continue
        if error:
            raise Lost(f"raised {error}")
        return answer
    raise Lost("crashed")


def serve():
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)                       # what a library prints must not stand among the answers
    while True:
        try:
            module, name, text, seconds = pickle.load(sys.stdin.buffer)
        except EOFError:                # our parent is gone
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)   # nobody handles its signal: the system ends the process
        try:
            answer = getattr(importlib.import_module(module), name)(text), ""
        except Exception as error:
            answer = None, type(error).__name__
        signal.setitimer(signal.ITIMER_PROF, 0)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
