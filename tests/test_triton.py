"""The Triton kernels without a GPU: in the interpreter, through the compiler, and where there is no triton at all."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import triton_kernels
from kernels import attention, linear_logprob

ROOT = Path(triton_kernels.__file__).resolve().parent
needs_triton = pytest.mark.skipif(triton_kernels.triton is None, reason="triton is not installed")


def run(*arguments, **variables):
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_INTERPRET")}
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env | variables, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    return result.stdout


@needs_triton
def test_the_interpreter_agrees_with_float64_on_every_feature():
    output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", "tests/interpreted.py")
    assert "passed" in output and "failed" not in output and "skipped" not in output


@needs_triton
def test_what_is_shipped_compiles_for_hopper_and_ampere_without_spills():
    code = "import json; from runs import aot; print(json.dumps([aot.measure(*case) for case in aot.GATE]))"
    rows = json.loads(run("-c", code).splitlines()[-1])
    assert len(rows) > 10
    for row in rows:
        assert row["spills"] == 0 and row["shared"] <= {90: 227 << 10, 80: 163 << 10}[row["sm"]], row
        if row["kernel"] in ("forward", "dq", "dkv", "dkv_grouped"):
            assert (row["HGMMA"] and row["TMA"]) if row["sm"] == 90 else row["HMMA"], row


def test_every_case_of_the_gate_is_in_the_report_of_all_kernels():
    if triton_kernels.triton is None:
        pytest.skip("triton is not installed")
    from runs import aot
    assert set(aot.GATE) <= set(aot.CASES)
    kernels = {name.removesuffix("_kernel") for file in aot.FILES for name in vars(file)
               if name.endswith("_kernel")}
    assert kernels == {case[1].removesuffix("_grouped") for case in aot.CASES}


def test_without_triton_auto_is_torch_and_triton_is_refused_in_a_sentence():
    run("-c", """
import sys
sys.modules["triton"] = None        # any import of it is an ImportError now
import torch, kernels, triton_kernels
x = torch.randn(1, 4, 2, 64)
assert kernels.attention(x, x, x, torch.tensor([0, 2, 4])).shape == x.shape
try:
    kernels.attention(x, x, x, impl="triton")
except ValueError as error:
    assert "triton is not installed; choose impl='auto'" in str(error), error
else:
    raise AssertionError("not refused")
""")


def test_on_cpu_triton_is_refused_outside_the_interpreter():
    if triton_kernels.INTERPRET:
        pytest.skip("TRITON_INTERPRET=1 is set")
    x = torch.randn(1, 4, 2, 64)
    with pytest.raises(ValueError, match="triton is not installed|NVIDIA GPUs"):
        attention(x, x, x, impl="triton")
    with pytest.raises(ValueError, match="triton is not installed|NVIDIA GPUs"):
        linear_logprob(x[0, 0], x[0, 1], torch.zeros(2, dtype=torch.long), impl="triton")


@pytest.mark.parametrize("device, hip", [("cuda", "6.4"), ("xpu", None)])
def test_other_gpus_use_torch_and_say_so_once(monkeypatch, capsys, device, hip):
    monkeypatch.setattr(triton_kernels, "triton", triton_kernels.triton or object())
    monkeypatch.setattr(triton_kernels, "INTERPRET", False)
    monkeypatch.setattr(triton_kernels, "SAID", set())
    monkeypatch.setattr(torch.version, "hip", hip)
    for _ in range(2):
        assert not triton_kernels.runs(device, torch.bfloat16, 128, False)
    assert capsys.readouterr().err.count("\n") == 1


@needs_triton
@pytest.mark.parametrize("dtype, width, says", [(torch.float32, 64, "fp32"), (torch.bfloat16, 96, "got 96")])
def test_on_an_nvidia_gpu_auto_takes_bf16_at_widths_64_and_128(monkeypatch, capsys, dtype, width, says):
    monkeypatch.setattr(triton_kernels, "INTERPRET", False)
    monkeypatch.setattr(triton_kernels, "SAID", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert triton_kernels.runs("cuda", torch.bfloat16, 128, False)
    assert not triton_kernels.runs("cuda", dtype, width, False)
    assert says in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match="compute capability 8.0"):
        triton_kernels.runs("cuda", torch.bfloat16, 128, True)
