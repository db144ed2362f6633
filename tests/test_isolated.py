"""isolated.py: what crashes, or never ends, costs one call and no more."""
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import chain
import cleaners
import isolated

ROOT = Path(isolated.__file__).resolve().parent
PAGE = "<!DOCTYPE html><html><body><p>The red fox lives in forests, on mountains and in towns.</p></body></html>"


def test_a_call_gives_what_the_function_does_and_an_error_is_said():
    assert isolated.call("cleaners", "html", PAGE, 60) == cleaners.html(PAGE)
    with pytest.raises(isolated.Lost, match="raised ValueError"):
        isolated.call("builtins", "int", "x", 60)
    assert isolated.call("builtins", "int", "7", 60) == 7


def test_a_crash_or_a_hang_is_said_and_the_next_call_is_served():
    isolated.call("builtins", "int", "7", 60)
    before = isolated.server.pid
    for module, name, argument, said in (("os", "_exit", 3, "crashed"),
                                         ("builtins", "sum", range(10 ** 12), "took more than 0.5 s")):
        with pytest.raises(isolated.Lost, match=said):
            isolated.call(module, name, argument, 0.5)
        assert isolated.call("builtins", "int", "8", 60) == 8 and isolated.server.pid != before


def at_work(*signals):
    """A thread that sends these signals, half a second apart, to the process that serves, which is begun here."""
    isolated.call("builtins", "int", "7", 60)
    pid = isolated.server.pid

    def send():
        for number in signals:
            time.sleep(0.5)
            os.kill(pid, number)
    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_a_process_that_is_killed_from_outside_costs_no_text():
    thread = at_work(signal.SIGKILL)
    assert isolated.call("time", "sleep", 1, 60) is None
    thread.join()


def test_a_process_that_stands_still_does_not_run_out_of_time():
    thread = at_work(signal.SIGSTOP, signal.SIGCONT)
    assert isolated.call("time", "sleep", 0.7, 0.5) is None
    thread.join()


def test_what_a_library_prints_is_no_answer():
    assert isolated.call("builtins", "print", "hello", 60) is None
    assert isolated.call("builtins", "int", "8", 60) == 8


def test_the_process_ends_with_its_parent_however_that_ended():
    code = "import isolated; isolated.call('builtins', 'int', '1', 60);" \
           "print(isolated.server.pid, flush=True); input()"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    for _ in range(200):
        try:
            os.kill(child, 0)
            if Path(f"/proc/{child}/stat").exists() and " Z " in Path(f"/proc/{child}/stat").read_text():
                break
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the process outlived its parent")


def test_a_document_that_crashes_a_library_goes_and_is_counted_by_its_step(monkeypatch):
    asked = []

    def call(module, name, text, seconds):
        asked.append((module, name, seconds))
        if "fox" in text:
            raise isolated.Lost("crashed")
        return text
    monkeypatch.setattr(isolated, "call", call)
    wiki, latex = "== Head ==\nA [[link]] of ''fox''.", "\\section{Head}\\label{x} A fox."
    assert cleaners.clean(PAGE, ["html"]) == (None, "html crashed")
    assert cleaners.clean(wiki, ["wiki"]) == (None, "wiki crashed")
    assert cleaners.clean(latex, ["latex"]) == (None, "latex crashed")
    assert cleaners.clean("a fox & a < b", ["html", "wiki", "latex"]) == ("a fox & a < b", "")      # no markup
    assert asked == [("cleaners", step, cleaners.LONGEST) for step in ("html", "wiki", "latex")]
    settings = dict(steps="html", filters="", scores="", questions=None, near_duplicates="none", repeated_lines=0)
    documents = [{"text": text, "source": "s", "id": str(i)} for i, text in enumerate([PAGE, "A hen is here."])]
    facts = chain.wash(settings, (0, documents))["facts"]["sources"]["s"]
    assert facts["rejected"] == {"nothing left: html crashed": [1, len(PAGE)]} and facts["documents_in"] == 2
