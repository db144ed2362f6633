"""What the compiler makes of every Triton kernel, for Hopper and Ampere; no GPU is needed.

    python runs/aot.py          a table, in some minutes; the second time in seconds, from Triton's cache

Registers a thread, spills (instructions that store registers to or load them from local memory), bytes of shared
memory, matrix products (HGMMA is Hopper's, HMMA Ampere's) and loads by TMA. Inputs are bf16.
"""
import os
import re
import subprocess
import sys
import tempfile
import warnings

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import triton_decode
import triton_kernels
import triton_logprob

SHARED = {90: 227 << 10, 80: 163 << 10}         # bytes of shared memory that a program may have
ATTENTION = [(name, D, form) for D in (64, 128) for name in ("forward", "dq", "dkv", "dkv_grouped")
             for form in ("causal", "packed", "packed, window")]
ROWS = [("decode", D, form) for D in (64, 128) for form in ("1 head", "8 heads", "8 heads, start, window")] + [
    ("combine", 128, ""), ("combine", 128, "start, window"), ("rows", 0, "entropy, hits"), ("rows", 0, ""),
    ("dlogits", 0, "")]
CASES = [(capability, *case) for capability in (90, 80) for case in ATTENTION + ROWS]
FILES = triton_kernels, triton_decode, triton_logprob
GATE = [(90, name, 128, "packed, window") for name in ("forward", "dq", "dkv", "dkv_grouped")] + [
    (90, "forward", 64, "causal"), (80, "forward", 128, "packed"), (80, "dkv", 128, "causal"),
    (90, "decode", 128, "8 heads, start, window"), (90, "combine", 128, "start, window"),
    (90, "rows", 0, "entropy, hits"), (90, "dlogits", 0, ""), (80, "decode", 128, "8 heads")]


def arguments(capability, name, D, form):
    """(kernel, {argument: its type}, {argument: its constant value}, launch options)."""
    kernel = name.removesuffix("_grouped") + "_kernel"
    kernel = next(vars(file)[kernel] for file in FILES if kernel in vars(file))
    types = {key: "i32" for key in kernel.arg_names}
    types |= {key: "*bf16" for key in types if key.endswith("_ptr")} | dict(scale="fp32", temperature="fp32")
    types |= {key: "*fp32" for key in ("lse_ptr", "delta_ptr", "parts_ptr", "logp_ptr", "entropy_ptr", "grad_ptr")}
    types |= dict(tiles="*i32", lengths="*i64", starts="*i64", targets_ptr="*i64", hits_ptr="*i1")
    if name in ("rows", "dlogits"):
        wanted = dict(ENTROPY=bool(form), HITS=bool(form)) if name == "rows" else {}
        return kernel, types, dict(STEP=triton_logprob.ROW_STEP) | wanted, dict(num_warps=8 if name == "rows" else 4)
    if name == "combine":
        constants = dict(H=8, D=D, CHUNK=triton_decode.CHUNK) | ({} if form else dict(starts=None, window=None))
        return kernel, types, constants, dict(num_warps=1)
    if name == "decode":
        heads = int(form.split()[0])
        constants, options = triton_decode.decode_config(heads, D, torch.bfloat16)
        constants |= dict(K=8) if "window" in form else dict(K=8, starts=None, window=None)
        return kernel, types | dict(out_ptr="*fp32"), constants, options
    constants, options = triton_kernels.attention_config(name, D, torch.bfloat16, (capability // 10, 0))
    tile, step = (f"tensordesc<bf16[{rows}, {D}]>" for rows in (constants["TILE"], constants["STEP"]))
    queries, keys = (step, tile) if name.startswith("dkv") else (tile, step)
    types |= dict(q_tokens=queries, out_tokens=queries, dout_tokens=queries, k_tokens=keys, v_tokens=keys)
    constants |= dict(H=8, G=4 if name.endswith("grouped") else 1)
    if "packed" not in form:
        constants["tiles"] = None
    if "window" not in form:
        constants["window"] = None
    return kernel, types, constants, options


def measure(capability, name, D, form):
    """{column: value} of one kernel compiled for sm_<capability>."""
    kernel, types, constants, options = arguments(capability, name, D, form)
    names = kernel.arg_names
    signature = {key: "constexpr" if key in constants else types[key] for key in names}
    aligned = [i for i, key in enumerate(names) if signature[key].startswith("*") or
               re.fullmatch(r"V|[qkv]_(row|head|key)", key)]
    source = ASTSource(kernel, signature, {(names.index(key),): value for key, value in constants.items()},
                       {(i,): [["tt.divisibility", 16]] for i in aligned})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        code = subprocess.run([f"{tools}/nvdisasm", f.name], check=True, capture_output=True, text=True).stdout
        usage = subprocess.run([f"{tools}/cuobjdump", "-res-usage", f.name], check=True, capture_output=True, text=True)
    count = {column: len(re.findall(rf"\b{pattern}\b", code)) for column, pattern in
             {"HGMMA": "HGMMA", "HMMA": "HMMA", "TMA": "UTMALDG", "spills": "(?:STL|LDL)"}.items()}
    shape = "" if "TILE" not in constants else f"{constants['TILE']} x {constants['STEP']}"
    registers = int(re.search(r"REG:(\d+)", usage.stdout + usage.stderr)[1])
    return dict(sm=capability, kernel=name, D=D or "", form=form, tile=shape, warps=options["num_warps"],
                stages=options.get("num_stages", ""), registers=registers,
                spills=count["spills"], shared=compiled.metadata.shared, HGMMA=count["HGMMA"], HMMA=count["HMMA"],
                TMA=count["TMA"])


def main():
    failed = 0
    for i, case in enumerate(CASES):
        row = measure(*case)
        if not i:
            print(f"triton {triton.__version__}, bf16\n\n| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        print("| " + " | ".join(f"{x:,}" if isinstance(x, int) else x for x in row.values()) + " |", flush=True)
        failed += row["spills"] > 0 or row["shared"] > SHARED[row["sm"]]
    print(f"\n{failed} of {len(CASES)} spill or need more shared memory than there is")
    return failed


if __name__ == "__main__":
    sys.exit(min(1, main()))
