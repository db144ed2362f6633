"""bench.py on shapes that take no time: every command prints a table and says in a sentence what it does not take."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench
from runs import gpu_bench

ROOT = Path(bench.__file__).resolve().parent
TINY = ["--device=cpu", "--seconds=0", "--rows=2", "--context=16", "--n_embd=128", "--n_head=2", "--n_layer=1",
        "--vocab_size=64", "--new_tokens=2", "--prompt_tokens=3", "--repeats=2", "--peers=sdpa,whole"]


def run(*arguments, status=0):
    result = subprocess.run([sys.executable, "bench.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == status and "Traceback" not in result.stderr, result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("command, whats", [
    (["attention"], ["ours, auto", "SDPA, dense", "decode, ours"]),
    (["attention", "--document=5", "--n_kv_head=1"], ["ours, auto", "SDPA, dense", "SDPA, masked", "decode, ours"]),
    (["attention", "--window=3"], ["ours, auto", "SDPA, dense", "SDPA, masked", "decode, ours"]),
    (["logprob"], ["ours, auto", "ours, torch", "whole logits"]), (["train", "--document=4"], ["ours"]),
    (["generate"], ["ours"]),
    (["errors"], ["attention 64 wide, 1 heads a key, window=0", "attention 64 wide, 4 heads a key, documents, window=0",
                  "attention 128 wide, 2 heads a key, documents, window=100",
                  "attention 128 wide, 1 heads a key, window=2", "decode", "log-probabilities"])])
def test_every_command_prints_its_rows_and_appends_them_as_json(tmp_path, command, whats):
    path = tmp_path / "results.jsonl"
    output = run(*command, *TINY, f"--json={path}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["what"] for row in rows] == whats and all(f"| {what} |" in output for what in whats)
    for row in rows:
        speeds = [row[x] for x in ("forward_ms", "ms", "tokens_per_second", "roundings") if x in row]
        assert speeds and min(speeds) > 0 and row["options"]["context"] == 16 and row.get("right", "yes") == "yes"
        if row.get("error"):
            assert row["error"] < 0.1
        assert row.get("equal_backwards", "2/2") == "2/2"


@pytest.mark.parametrize("arguments, says", [
    (["speed"], "begin with one of env, errors, attention, logprob, train, generate, data"),
    (["train", "--rows=0"], "--rows must be at least 1, got 0"),
    (["attention", "--peers=flash"], "peers must be of sdpa"), (["train", "--optimizer=sgd"], "adamw or muon"),
    (["train", *TINY, "--nanogpt=nowhere"], "there is no checkout at --nanogpt=nowhere"),
    (["train", *TINY, "--nanochat=nowhere"], "it has no nanochat/gpt.py")])
def test_mistakes_end_in_one_sentence(arguments, says):
    assert says in run(*arguments, status=1)


@pytest.mark.parametrize("wrong", [1.1, math.nan])
def test_a_wrong_gradient_is_not_called_right(monkeypatch, wrong):
    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return wrong * grad
    attention = bench.kernels.attention
    monkeypatch.setattr(bench.kernels, "attention", lambda q, k, v, *a, impl, **o: attention(
        q if impl == "sdpa" else Spoilt.apply(q), k, v, *a, impl=impl, **o))
    rows = {row["what"]: row["right"] for row in bench.bench_errors(torch.device("cpu"), torch.float32)}
    assert [right for what, right in rows.items() if what.startswith("attention")] == ["no"] * 4
    assert rows["log-probabilities"] == "yes"


def test_without_a_command_it_prints_its_options():
    output = run()
    assert "--context=1024" in output and "bench.py env" in output


def test_documents_have_the_mean_asked_for_and_one_shape(monkeypatch):
    monkeypatch.setattr(bench, "rows", 4)
    monkeypatch.setattr(bench, "context", 256)
    monkeypatch.setattr(bench, "document", 16)
    shapes = set()
    for seed in range(3):
        monkeypatch.setattr(bench, "seed", seed)
        cu_seqlens = bench.offsets(torch.device("cpu"))
        shapes.add(cu_seqlens.shape)
        assert {0, 256, 512, 768, 1024} <= set(cu_seqlens.tolist())
        assert 60 <= len(cu_seqlens.unique()) <= 69
    assert len(shapes) == 1


def test_the_gpu_run_asks_for_options_that_exist_and_reads_columns_that_are_written():
    from configurator import convert, read_options
    options = read_options(ROOT / "bench.py")
    for arguments in gpu_bench.SHAPES.values():
        command, *flags = arguments.split()
        assert command in bench.COMMANDS
        for flag in flags:
            name, _, value = flag[2:].partition("=")
            convert(name, value, options[name][0])
    rows = list(gpu_bench.goals({name: {} for name in gpu_bench.SHAPES}))
    assert len(rows) > 10 and all(figure is None for _, _, figure, _ in rows)
    filled = {name: {what: dict(forward_ms=2.0, backward_ms=2.0, ms=2.0, tokens_per_second=2.0, mfu_sheet=2.0,
                                forward_tflops=2.0, backward_tflops=2.0, share_of_copy=2.0, right="yes",
                                equal_backwards="100/100")
                     for what in ("ours", "ours, auto", "ours, triton", "SDPA, dense", "varlen_attn", "decode, ours",
                                  "whole logits")} for name in gpu_bench.SHAPES}
    assert all(figure is not None for _, _, figure, _ in gpu_bench.goals(filled))
