"""A script's own commented literals are its options; config files and flags override them.

    lr = 3e-4            # peak learning rate               in the script: an option, its default and its help
    lr = 1e-3            # also the comment is free text    in config/x.py: checked as strictly as a flag
    python pretrain.py config/x.py --lr=2e-3                later wins

A script ends with `main(configure(globals()))`. Options are int, float, bool or str; their names are lower case.
A config file is Python: it may compute, sees the values set so far, and keeps names of its own behind a `_`.
"""
import ast
import difflib
import errno
import io
import linecache
import os
import re
import sys
import textwrap
import tokenize

HERE = os.path.dirname(os.path.abspath(__file__))


def read_options(path):
    """{name: (default, comment, section)} of the script at `path`, in the order they stand there.

    An option is a top-level `name = literal  # comment` with a lower-case name; a section is a `# --- name ---` line.
    """
    with open(path, encoding="utf-8") as f:
        source = f.read()
    comments = {token.start[0]: token.string.lstrip("# ").rstrip()
                for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT}
    sections = {line: text.strip("- ") for line, text in comments.items() if re.fullmatch(r"--- .* ---", text)}
    options = {}
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        name = node.targets[0].id
        try:
            default = ast.literal_eval(node.value)
        except ValueError:                                  # not a literal: part of the script, not an option
            continue
        if type(default) in (int, float, bool, str) and name.islower() and name[0] != "_" and node.lineno in comments:
            section = max((line for line in sections if line < node.lineno), default=0)
            options[name] = (default, comments[node.lineno], sections.get(section, "options"))
    return options


def convert(name, value, default):
    """`value`, a flag's text or a config file's object, as the type of `default`; ValueError if it is not one."""
    kind = type(default)
    try:
        if kind is str and isinstance(value, str):
            return value
        if kind is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False}[value.lower()]
        if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            number = float(value)
            if kind is float and number == number:
                return number
            if kind is int and number.is_integer():         # 1e9 is a fine way to write a whole number
                exact = isinstance(value, (int, float)) or re.fullmatch(r"[-+\d_]+", value)
                return int(value) if exact else int(number)
    except (ValueError, KeyError, AttributeError, OverflowError):
        pass
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text in quotes"}[kind]
    raise ValueError(f"{name} must be {wanted} like its default {default!r}, got {value!r}")


def nearest(name, names):
    """' (did you mean X?)' for the most similar of `names`, or ''."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def run_config(path, values, options):
    """Executes a config file over `values`, in place; SystemExit-worthy mistakes are ValueErrors of one sentence."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        beside = [os.path.join(folder, f) if os.path.dirname(path) else f for f in os.listdir(folder)
                  if f.endswith(".py")] if os.path.isdir(folder) else []
        raise ValueError(f"there is no config file {path!r}{nearest(path, beside)}; "
                         "options are written --name=value and a config file by its path")
    namespace = dict(values)
    try:
        with open(path, encoding="utf-8") as f:
            exec(compile(f.read(), path, "exec"), namespace)
    except Exception as error:
        lines = [t.tb_lineno for t in frames(error.__traceback__) if t.tb_frame.f_code.co_filename == path]
        line = lines[0] if lines else getattr(error, "lineno", "?")
        reason = " ".join(str(error).split())
        raise ValueError(f"config file {path} fails in line {line}: {type(error).__name__}: {reason}") from None
    for name, value in namespace.items():
        if name.startswith("_"):
            continue
        if name not in options:
            raise ValueError(f"config file {path} sets {name!r}, which is not an option{nearest(name, options)}; "
                             "names of the file's own begin with _")
        values[name] = convert(f"{path}: {name}", value, options[name][0])


def configure(script_globals, argv=None):
    """The script's options, {name: value}, after config files and flags; its globals are set to them as well.

    Prints every option and exits on --help. Exits with status 1 and one sentence on an unknown name, a wrong type or
    a missing or broken config file. From here on, a ValueError that our own code raises ends the script the same way.
    """
    path = script_globals["__file__"]
    script = os.path.basename(path)
    sys.excepthook = lambda kind, error, trace: explain(script, kind, error, trace)
    options = read_options(path)
    values = {name: default for name, (default, _, _) in options.items()}
    arguments = sys.argv[1:] if argv is None else argv
    if "--help" in arguments or "-h" in arguments:
        print(help_text(script, script_globals.get("__doc__") or "", options))
        raise SystemExit(0)
    try:
        for argument in arguments:
            if not argument.startswith("-"):
                run_config(argument, values, options)
                continue
            name, equals, text = argument.removeprefix("--").partition("=")
            if not argument.startswith("--") or name not in options:
                raise ValueError(f"there is no option {argument.partition('=')[0]}"
                                 f"{nearest(name.lstrip('-').replace('-', '_'), options)}; --help lists them all")
            if not equals:
                example = "true" if isinstance(options[name][0], bool) else show(options[name][0]) or "TEXT"
                raise ValueError(f"--{name} needs a value, as in --{name}={example}")
            values[name] = convert("--" + name, text, options[name][0])
    except ValueError as error:
        raise SystemExit(f"{script}: {error}") from None
    script_globals.update(values)
    return values


def show(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


def help_text(script, docstring, options):
    lines = [docstring.strip(), "", f"usage: python {script} [config.py ...] [--name=value ...]     (later wins)"]
    width = max((len(f"--{name}={show(default)}") for name, (default, _, _) in options.items()), default=0)
    width, section = min(width, 34), None
    for name, (default, comment, its_section) in options.items():
        if its_section != section:
            section = its_section
            lines += ["", section]
        flag = f"--{name}={show(default)}"
        wrapped = textwrap.wrap(comment, 116 - width) or [""]
        lines += [f"  {flag:<{width}}  {wrapped[0]}"] + [" " * (width + 4) + rest for rest in wrapped[1:]]
    return "\n".join(lines)


def frames(trace):
    while trace:
        yield trace
        trace = trace.tb_next


def explain(script, kind, error, trace):
    """sys.excepthook: a ValueError, of any kind, from a `raise` of ours is a sentence for the user; all else keeps its
    traceback.

    Errors of the file system come from below but tell of the user's disk: they too end in one sentence.
    """
    *_, last = frames(trace)
    file = os.path.abspath(last.tb_frame.f_code.co_filename)
    raised_here = linecache.getline(file, last.tb_lineno).strip().startswith("raise ")
    if issubclass(kind, ValueError) and raised_here and os.path.dirname(file) == HERE:
        print(f"{script}: {error}", file=sys.stderr)
    elif issubclass(kind, OSError) and error.filename is not None:
        print(f"{script}: {error.strerror}: {error.filename}", file=sys.stderr)
    elif issubclass(kind, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        print(f"{script}: {error.strerror} while writing; what was saved before is still there", file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print(f"{script}: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
