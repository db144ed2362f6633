"""Options, config files, flags, and the one sentence that every mistake of a user ends in."""
import ast
import inspect
import json
import re
import shutil
import subprocess
import symtable
import sys
from pathlib import Path

import pytest

import chats
import configurator
import examples
import pairs
import sampled
import scorers
import texts

ROOT = Path(configurator.__file__).resolve().parent
FILES = sorted(ROOT.glob("*.py"))
SCRIPTS = [path for path in FILES if path.name != "configurator.py"
           and "main(configure(globals()))" in path.read_text(encoding="utf-8")]

SCRIPT = '''"""Trains nothing, quickly."""
import json

from configurator import configure

# --- run ---
out_dir = "out"     # folder to write
steps = 10          # optimizer updates, LONG
# --- method ---
lr = 0.5            # peak rate; "#" and --- may stand in a comment
offset = -1         # negative numbers are literals too
fast = False        # skip the slow part
uncommented = 3
Upper = 4           # not lower case
UPPER = 4           # a constant
_own = 5            # the script's own
several = [1, 2]    # no int, float, bool or str
nothing = None      # no int, float, bool or str
computed = 2 * 3    # an expression


def inner():
    local = 1       # not at top level
    return local


if __name__ == "__main__":
    config = configure(globals())
    assert config == {name: globals()[name] for name in config}
    print(json.dumps(config))
'''.replace("LONG", "so many that the sentence about them does not fit on one line of a terminal " * 3)
DEFAULTS = dict(out_dir="out", steps=10, lr=0.5, offset=-1, fast=False)


@pytest.fixture
def folder(tmp_path):
    """A folder with configurator.py and a small script beside it."""
    shutil.copy(ROOT / "configurator.py", tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def run(folder, *arguments):
    return subprocess.run([sys.executable, "script.py", *arguments], cwd=folder, capture_output=True, text=True)


def values(folder, *arguments):
    result = run(folder, *arguments)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def sentence(result):
    """The one line on stderr of a run that failed as it should."""
    assert result.returncode != 0 and result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("script.py: ") and result.stderr.count("\n") == 1 and result.stderr[-1] == "\n"
    return result.stderr


# --- options ---

def test_options_are_the_commented_lower_case_literals_and_nothing_else(folder):
    options = configurator.read_options(folder / "script.py")
    assert {name: default for name, (default, _, _) in options.items()} == DEFAULTS
    assert list(options) == list(DEFAULTS)
    assert options["lr"] == (0.5, 'peak rate; "#" and --- may stand in a comment', "method")
    assert options["out_dir"][2] == "run"
    assert values(folder) == DEFAULTS


def test_later_wins_among_config_files_and_flags(folder):
    (folder / "one.py").write_text("steps = 1\nlr = 1.0\n")
    (folder / "two.py").write_text("steps = 2\n")
    assert values(folder, "one.py")["steps"] == 1
    assert values(folder, "one.py", "two.py")["steps"] == 2
    assert values(folder, "two.py", "one.py")["steps"] == 1
    assert values(folder, "one.py", "--steps=3")["steps"] == 3
    assert values(folder, "--steps=3", "one.py")["steps"] == 1
    assert values(folder, "--steps=3", "--steps=4")["steps"] == 4
    assert values(folder, "one.py", "two.py", "--fast=true") == DEFAULTS | dict(steps=2, lr=1.0, fast=True)


def test_a_config_computes_sees_earlier_values_and_keeps_names_of_its_own(folder):
    (folder / "one.py").write_text("import math as _math\n_width = 4\nsteps = _width * steps\nlr = _math.sqrt(lr)\n")
    (folder / "two.py").write_text("out_dir = f'{out_dir}/{steps}'\n_width = 'another'\n")
    assert values(folder, "--lr=0.25", "one.py", "two.py") == DEFAULTS | dict(steps=40, lr=0.5, out_dir="out/40")


def test_values_take_the_type_of_their_default(folder):
    flags = ["--steps=1e3", "--lr=2", "--fast=True", "--out_dir=5", "--offset=-1_000"]
    got = values(folder, *flags)
    assert got == dict(steps=1000, lr=2.0, fast=True, out_dir="5", offset=-1000)
    assert {name: type(value) for name, value in got.items()} == {name: type(value) for name, value in DEFAULTS.items()}
    (folder / "one.py").write_text("steps = 1e3\nlr = 2\n")
    got = values(folder, "one.py")
    assert type(got["steps"]) is int and got["steps"] == 1000 and type(got["lr"]) is float


def test_large_whole_numbers_are_exact(folder):
    assert values(folder, f"--steps={2**53 + 1}")["steps"] == 2**53 + 1
    (folder / "one.py").write_text("steps = 2**53 + 1\n")
    assert values(folder, "one.py")["steps"] == 2**53 + 1


def test_text_may_hold_anything_even_nothing(folder):
    assert values(folder, "--out_dir=a=b --c d")["out_dir"] == "a=b --c d"
    assert values(folder, "--out_dir=")["out_dir"] == ""


# --- mistakes ---

@pytest.mark.parametrize("flag, wanted", [
    ("--steps=1.5", "a whole number"), ("--steps=ten", "a whole number"), ("--steps=", "a whole number"),
    ("--steps=true", "a whole number"), ("--steps=inf", "a whole number"), ("--steps=1e999", "a whole number"),
    ("--lr=fast", "a number"), ("--lr=nan", "a number"), ("--lr=", "a number"),
    ("--fast=1", "true or false"), ("--fast=yes", "true or false"), ("--fast=", "true or false")])
def test_a_flag_of_the_wrong_type_is_one_sentence_with_the_value(folder, flag, wanted):
    name, _, text = flag.partition("=")
    said = sentence(run(folder, flag))
    assert f"{name} must be {wanted}" in said and f"got {text!r}" in said and repr(DEFAULTS[name[2:]]) in said


@pytest.mark.parametrize("line, wanted", [
    ("steps = 1.5", "a whole number"), ("steps = True", "a whole number"), ("steps = [1]", "a whole number"),
    ("lr = False", "a number"), ("lr = None", "a number"), ("lr = 'fast'", "a number"),
    ("fast = 1", "true or false"), ("fast = None", "true or false"), ("out_dir = 5", "a text in quotes"),
    ("out_dir = None", "a text in quotes"), ("def lr(): pass", "a number")])
def test_a_config_value_of_the_wrong_type_is_one_sentence_with_the_file(folder, line, wanted):
    (folder / "one.py").write_text(line + "\n")
    said = sentence(run(folder, "one.py"))
    assert "one.py" in said and f"must be {wanted}" in said


def test_an_unknown_flag_names_the_nearest_option(folder):
    said = sentence(run(folder, "--step=3"))
    assert "--step" in said and "did you mean steps?" in said
    assert "did you mean out_dir?" in sentence(run(folder, "--out-dir=x"))
    assert "did you mean lr?" in sentence(run(folder, "-lr=1"))
    assert "did you mean" not in sentence(run(folder, "--qqqqqqqq=1"))


@pytest.mark.parametrize("name", ["uncommented", "UPPER", "_own", "several", "computed", "local"])
def test_what_is_no_option_cannot_be_set(folder, name):
    assert name in sentence(run(folder, f"--{name}=1"))


def test_an_unknown_name_in_a_config_names_the_file_and_the_nearest_option(folder):
    (folder / "one.py").write_text("lr = 0.1\nstep = 3\n")
    said = sentence(run(folder, "one.py"))
    assert "one.py" in said and "'step'" in said and "did you mean steps?" in said


def test_a_flag_without_a_value_says_how_to_write_one(folder):
    assert "--steps=10" in sentence(run(folder, "--steps", "3"))
    assert "--fast=true" in sentence(run(folder, "--fast"))


def test_a_missing_config_file_names_the_nearest_one(folder):
    (folder / "config").mkdir()
    (folder / "config" / "small.py").write_text("steps = 1\n")
    said = sentence(run(folder, "config/smal.py"))
    assert "config/smal.py" in said and "config/small.py" in said
    assert "nowhere/small.py" in sentence(run(folder, "nowhere/small.py"))
    assert "--name=value" in sentence(run(folder, "lr=3"))          # the dashes were forgotten
    assert "no config file" in sentence(run(folder, "config"))      # a folder


@pytest.mark.parametrize("text, line, error", [
    ("steps = 1\nlr = = 2\n", 2, "SyntaxError"),
    ("steps = 1\n\nlr = 1 / 0\n", 3, "ZeroDivisionError"),
    ("steps = 1\nlr = nowhere\n", 2, "NameError"),
    ("def _f():\n    raise KeyError('x')\n\n_f()\n", 4, "KeyError"),
    ("steps = 1\n  lr = 2\n", 2, "IndentationError"),
    ("import json as _json\nsteps = 1\n\n_json.loads('{')\n", 4, "JSONDecodeError"),    # has a lineno of its own
    ("steps = 1\nlr = eval('1 +')\n", 2, "SyntaxError")])                               # and so has this
def test_a_broken_config_names_the_line(folder, text, line, error):
    (folder / "one.py").write_text(text)
    said = sentence(run(folder, "one.py"))
    assert f"one.py fails in line {line}" in said and error in said


def test_a_config_that_raises_an_error_of_several_lines_is_still_one_sentence(folder):
    (folder / "one.py").write_text("raise RuntimeError('first\\nsecond')\n")
    assert "first" in sentence(run(folder, "one.py"))


def test_a_config_that_is_not_text_is_one_sentence(folder):
    (folder / "one.py").write_bytes(b"steps = 1\nout_dir = '\xff'\n")
    assert "one.py" in sentence(run(folder, "one.py"))


# --- help ---

@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_prints_every_option_default_and_comment_and_exits_with_0(folder, flag):
    result = run(folder, "--steps=3", flag)
    assert result.returncode == 0 and result.stderr == ""
    words = " ".join(result.stdout.split())
    assert "Trains nothing, quickly." in words
    for name, (default, comment, section) in configurator.read_options(folder / "script.py").items():
        shown = str(default).lower() if isinstance(default, bool) else default
        assert f"--{name}={shown} {comment}" in words and section in words
    assert "computed" not in words and "uncommented" not in words
    assert max(map(len, result.stdout.splitlines())) <= 120


# --- errors after the options are set ---

ENDINGS = '''
import json
import random

from configurator import configure
import beside

def own():
    raise ValueError("there are 3 of 4 files; fetch them again")

class Narrower(ValueError):
    pass

def narrower():
    raise Narrower("there are 3 of 4 files; fetch them again")

def chained():
    try:
        int("x")
    except ValueError as error:
        raise ValueError(f"there are 3 of 4 files; {error}") from error

def several_lines():
    raise ValueError(
        "there are 3 of 4 files; "
        "fetch them again")

def from_int():
    return int("x")

def from_json():
    return json.loads("{")

def from_a_raise_of_the_standard_library():
    return random.sample([1], 2)

def from_a_raise_elsewhere():
    import elsewhere
    return elsewhere.fails()

def another_kind():
    raise KeyError("x")

def missing_file():
    return open("nowhere/data.bin")

which = "own"   # the ending
configure(globals())
(getattr(beside, which[7:]) if which.startswith("beside.") else globals()[which])()
'''


def end(folder, which):
    (folder / "elsewhere").mkdir(exist_ok=True)
    (folder / "elsewhere" / "elsewhere.py").write_text("def fails():\n    raise ValueError('of a library')\n")
    (folder / "script.py").write_text("import sys\nsys.path.append('elsewhere')\n" + ENDINGS)
    functions = ENDINGS.partition("def own")
    (folder / "beside.py").write_text("import json, random\n" + functions[1] + functions[2].partition("which =")[0])
    return run(folder, f"--which={which}")


@pytest.mark.parametrize("place", ["", "beside."])
@pytest.mark.parametrize("which", ["own", "narrower", "chained", "several_lines"])
def test_a_value_error_raised_by_our_own_code_is_one_sentence(folder, place, which):
    assert "there are 3 of 4 files" in sentence(end(folder, place + which))


@pytest.mark.parametrize("place", ["", "beside."])
@pytest.mark.parametrize("which, kind", [
    ("from_int", "ValueError"), ("from_json", "JSONDecodeError"), ("another_kind", "KeyError"),
    ("from_a_raise_of_the_standard_library", "ValueError"), ("from_a_raise_elsewhere", "ValueError")])
def test_any_other_error_keeps_its_traceback(folder, place, which, kind):
    result = end(folder, place + which)
    assert result.returncode != 0 and result.stderr.startswith("Traceback") and kind in result.stderr
    assert f"in {which}" in result.stderr


def test_a_missing_file_is_one_sentence_with_its_name(folder):
    assert "nowhere/data.bin" in sentence(end(folder, "missing_file"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_raise_of_ours_begins_its_line_so_that_it_is_known_as_ours(path):
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise):
            assert lines[node.lineno - 1].strip().startswith("raise"), f"{path.name}:{node.lineno}"


# --- the scripts of the repository ---

def test_the_scripts_are_found():
    assert {"data.py", "pretrain.py"} <= {path.name for path in SCRIPTS}


def options_read(source):
    """Names read from the module's globals, or as parameters of a function that is called with **."""
    receivers = {node.func.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)
                 and isinstance(node.func, ast.Name) and any(keyword.arg is None for keyword in node.keywords)}

    def visit(table, inside):
        receives = table.get_name() in receivers
        for symbol in filter(symtable.Symbol.is_referenced, table.get_symbols()):
            if symbol.is_global() or receives and symbol.is_parameter() or inside and symbol.is_free():
                yield symbol.get_name()
        for child in table.get_children():
            yield from visit(child, inside or receives)

    return set(visit(symtable.symtable(source, "script", "exec"), False))


def keys_read(source):
    """Names read as config["name"], config.get("name") or o.name, or listed in a constant such as SETTINGS."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "o" and isinstance(node.ctx, ast.Load):
            yield node.attr
        constant = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper()
        if constant and isinstance(node.value, ast.Tuple):
            yield from (item.value for item in node.value.elts if isinstance(item, ast.Constant))
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            holder, key = node.value, node.slice.value
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get" and isinstance(
                node.args[0], ast.Constant):
            holder, key = node.func.value, node.args[0].value
        else:
            continue
        if ast.unparse(holder) in ("config", "self.config"):
            yield key


def test_an_option_counts_as_read_only_where_its_value_can_arrive():
    source = ("def f(lr): return lr\n"
              "def g(a, b): return [a + c for c in x]\n"
              "NAMES = ('e', 1)\n"
              "def main(config): g(**config), seed, config['d'], o.f\n")
    assert options_read(source) & {"lr", "a", "b", "c", "x", "seed"} == {"a", "x", "seed"}
    assert set(keys_read(source)) == {"d", "e", 1, "f"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_option_of_a_script_is_read(path):
    source = path.read_text(encoding="utf-8")
    read = options_read(source) | set(keys_read(source))
    if "common.start(config)" in source:                    # takes what it needs from the whole config
        read |= set(keys_read((ROOT / "common.py").read_text(encoding="utf-8")))
    if "mixing.text_batches(config" in source:
        read |= set(keys_read((ROOT / "mixing.py").read_text(encoding="utf-8")))
    if "plan(subject, o, machine)" in source:
        read |= set(keys_read((ROOT / "plans.py").read_text(encoding="utf-8")))
    if "texts.prepare(**" in source:                        # takes what is of its kind
        read |= set(inspect.signature(texts.prepare).parameters)
    if "chats.prepare(**" in source:
        read |= set(inspect.signature(chats.prepare).parameters)
    if "pairs.prepare(**" in source:
        read |= {*inspect.signature(pairs.prepare).parameters, *inspect.signature(sampled.sampled_sources).parameters}
    if "chain.wash" in source:                              # clean.py: what chunks, scores and rows are worked on with
        for name in ("clean.py", "chain.py", "parts.py"):
            read |= set(re.findall(r'settings\["(\w+)"\]', (ROOT / name).read_text(encoding="utf-8")))
        read |= {*scorers.DEFAULTS, *examples.DEFAULTS}
    assert set(configurator.read_options(path)) <= read


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_literal_among_the_options_of_a_script_has_a_comment(path):
    options = configurator.read_options(path)
    assert all(comment for _, comment, _ in options.values())
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.islower():
            assert node.targets[0].id in options, f"{path.name}:{node.lineno} has no comment, or is no literal"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_of_a_script_prints_every_option(path):
    result = subprocess.run([sys.executable, path.name, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    words = " ".join(result.stdout.split())
    for name, (default, comment, _) in configurator.read_options(path).items():
        assert f"--{name}={configurator.show(default)} {' '.join(comment.split())}".strip() in words
