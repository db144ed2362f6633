"""One function of one text in a process of its own, with a time limit: a document that crashes a library of C code, or
keeps it busy without end, costs itself and no more.

    isolated.call("cleaners", "html", "<html>...", seconds=60)      # what cleaners.html returns; Lost if it never does

The process is begun at the first call, serves one call after another, is begun anew after a loss, and ends with us.
"""
import atexit
import importlib
import os
import pickle
import signal
import subprocess
import sys


class Lost(Exception):
    """Why there is no answer: "crashed" or "took more than 60 s"."""


server = None                           # the process that serves


def call(module, name, text, seconds):
    """module.name(text). Lost if that ends the process or takes more than `seconds`; ValueErrors come back as such."""
    global server
    if server is None or server.poll() is not None:
        server = subprocess.Popen([sys.executable, os.path.abspath(__file__)], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, start_new_session=True)       # Ctrl-C is ours to answer
        atexit.register(server.kill)
    try:
        pickle.dump((module, name, text, seconds), server.stdin)
        server.stdin.flush()
        answer, sentence = pickle.load(server.stdout)
    except (OSError, EOFError, pickle.UnpicklingError):
        died = server.wait()
        atexit.unregister(server.kill)
        raise Lost(f"took more than {seconds} s" if died == -signal.SIGALRM else "crashed") from None
    if sentence:
        raise ValueError(sentence)
    return answer


def serve():
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)                       # what a library prints must not stand among the answers
    while True:
        try:
            module, name, text, seconds = pickle.load(sys.stdin.buffer)
        except EOFError:                # our parent is gone
            return
        signal.alarm(seconds)           # nobody handles it: the system ends the process, in whatever code it is
        try:
            answer = getattr(importlib.import_module(module), name)(text), ""
        except ValueError as error:
            answer = None, str(error) or repr(error)
        signal.alarm(0)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
