"""Runs a stage as its script, with a compiler that compiles nothing and appends what it was asked to compile to LOG:

    python tests/compiled.py LOG pretrain.py --compile=true ...

Each line is a JSON list: the class or function, whether dynamic, whether gradients are on, the length of offsets.
"""
import json
import os
import runpy
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

path, script, *flags = sys.argv[1:]


def note(*facts):
    with open(path, "a") as log:
        log.write(json.dumps(facts) + "\n")


def compile_module(module, dynamic=None):
    def watched(ids, targets, cu_seqlens=None, **how):
        note(type(module).__name__, dynamic, torch.is_grad_enabled(), None if cu_seqlens is None else len(cu_seqlens))
        return module.forward(ids, targets, cu_seqlens, **how)
    module._compiled_call_impl = watched                        # as torch does; forward() is not compiled


def compile_function(function, dynamic=None):
    note(function.__name__, dynamic)
    return function


torch.nn.Module.compile, torch.compile = compile_module, compile_function
sys.argv = [script, *flags]
runpy.run_path(script, run_name="__main__")
