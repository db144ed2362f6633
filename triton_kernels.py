"""Packed attention and its gradient in Triton, behind kernels.py on CUDA; and where Triton runs at all, which decoding
(triton_decode.py) and rows of logits (triton_logprob.py) ask too.

Each is a torch operator (zero2chat::...), so that compiled models have no graph break, and nothing here waits for the
GPU. Without triton the file imports and `why_not` says so. docs/kernels.md describes each kernel and counts its bytes.

Shape letters: B sequences, T tokens of a row, N = B*T tokens in all, H query heads, K key heads, G = H / K, D head
width.
"""
import os
import sys
import types

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = None
    tl = types.SimpleNamespace(constexpr=lambda value: value)

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"       # read once, as triton.jit does: no GPU, numpy instead
BLOCK = 128                 # tokens into which documents are cut; a program computes a tile of so many or fewer
LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-1e30)        # logit of a key that is not seen: finite, since (-inf) - (-inf) is not a number

# (tokens of a tile, of a step of its loop, warps, pipeline stages) by kernel and head width, on Hopper and on Ampere.
# Chosen by what compiles without spills (runs/aot.py); no GPU has timed them.
CONFIGS = {
    90: {"forward": {64: (128, 128, 8, 3), 128: (128, 128, 8, 2)},
         "dq": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2)},
         "dkv": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2)},
         "dkv_grouped": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2)}},
    80: {"forward": {64: (128, 64, 8, 3), 128: (128, 32, 8, 3)},
         "dq": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2)},
         "dkv": {64: (128, 32, 8, 2), 128: (64, 32, 8, 2)},
         "dkv_grouped": {64: (128, 32, 8, 2), 128: (64, 32, 8, 2)}},
}


def jit(function):
    return triton.jit(function) if triton else function


SAID = set()                # reasons for using something else that were printed


def why_not(device):
    """Why these kernels do not run on `device` (its type: cpu, cuda, ...), or "" where they do."""
    if triton is None:
        return "triton is not installed"
    if INTERPRET:
        return ""
    if device != "cuda" or torch.version.hip:
        return "they are for NVIDIA GPUs, and for CPUs under TRITON_INTERPRET=1"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"they need compute capability 8.0, and this GPU has {torch.cuda.get_device_capability()}"
    return ""


@torch.compiler.assume_constant_result
def runs(device, dtype, width, forced):
    """Whether these kernels take the device, the dtype and the head width (0: any). If forced they must, or ValueError;
    else one line says what is used instead, once, but nothing where nobody would expect them."""
    reason = why_not(device)
    if not reason and width not in (0, 64, 128):
        reason = f"head width must be 64 or 128, got {width}"
    if not reason and dtype not in (torch.bfloat16, torch.float16, torch.float32):
        reason = f"dtype must be bfloat16, float16 or float32, got {dtype}"
    if not reason and not forced and dtype == torch.float32:
        reason = "in fp32 they are no faster"
    if reason and forced:
        raise ValueError(f"the Triton kernels do not run here: {reason}; choose impl='auto'")
    if reason and reason not in SAID:
        SAID.add(reason)
        print(f"kernels.py: torch's own operations instead of Triton kernels: {reason}", file=sys.stderr)
    return not reason


def chosen(impl, x, width=0):
    """Whether `impl` ("triton", or "auto" on a GPU) means these kernels for tensor x. Never on CPU unless forced."""
    if impl not in ("auto", "plain", "sdpa", "triton"):
        raise ValueError(f"impl must be auto, plain, sdpa or triton, got {impl!r}")
    if impl == "triton":
        return runs(x.device.type, x.dtype, width, True)
    return impl == "auto" and x.device.type not in ("cpu", "mps") and runs(x.device.type, x.dtype, width, False)


# --- documents as tiles ---

def check_offsets(cu_seqlens, n_tokens):
    """ValueError unless offsets rise from 0 to n_tokens; on CUDA, which the host does not wait for, and in compiled
    code a failed assertion."""
    enough = len(cu_seqlens) > 1
    rising = enough and (cu_seqlens[0] == 0) & (cu_seqlens[-1] == n_tokens) & (cu_seqlens.diff() >= 0).all()
    message = f"cu_seqlens must rise from 0 to B*T = {n_tokens}"
    if enough and (cu_seqlens.is_cuda or torch.compiler.is_compiling()):
        torch._assert_async(rising, message)
    elif not rising:
        raise ValueError(f"{message}, got {cu_seqlens.tolist()}")


@torch.library.custom_op("zero2chat::tile_table", mutates_args=())
def tile_table(cu_seqlens: torch.Tensor, B: int, T: int) -> torch.Tensor:
    """(M, 3) int32: first token of each tile, start and end of its document; M depends on shapes alone.

    Documents are cut at row ends and into tiles of BLOCK tokens; tiles with most keys to read come first, and those
    left over are (N, N, N), where there is nothing to do. Offsets that do not rise from 0 to N raise ValueError on CPU
    and fail an assertion on a GPU, which the host does not wait for; clamped and sorted, they never lead out of bounds.
    """
    N, device = B * T, cu_seqlens.device
    check_offsets(cu_seqlens, N)
    offsets = torch.cat([cu_seqlens.clamp(0, N), torch.arange(0, N + 1, T, device=device, dtype=cu_seqlens.dtype)])
    offsets = offsets.sort().values
    starts, ends = offsets[:-1], offsets[1:]
    tiles = (ends - starts + BLOCK - 1) // BLOCK                                  # of each document
    last = tiles.cumsum(0)
    index = torch.arange(n_tiles(len(cu_seqlens), B, T), device=device)
    document = torch.searchsorted(last, index, right=True)
    empty = document == len(last)
    document = document.clamp(max=len(last) - 1)
    before = (index - last[document] + tiles[document]) * BLOCK             # tokens of the document before the tile
    order = torch.where(empty, -1, before).argsort(descending=True, stable=True)
    table = torch.stack([starts[document] + before, starts[document], ends[document]], -1)
    return table.masked_fill(empty[:, None], N)[order].to(torch.int32)


@tile_table.register_fake
def _(cu_seqlens, B, T):
    return cu_seqlens.new_empty((n_tiles(len(cu_seqlens), B, T), 3), dtype=torch.int32)


def n_tiles(n_offsets, B, T):
    """The most tiles that documents between so many offsets can have, each with less than one tile too many."""
    return B * T // BLOCK + n_offsets - 1 + B


@jit
def tile_bounds(tiles, T, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """(first token, document start, document end) of this program's tile; without a table a row is a document."""
    pid = tl.program_id(0) // (BLOCK // TILE)
    part = tl.program_id(0) % (BLOCK // TILE) * TILE
    if tiles is None:
        per_row = tl.cdiv(T, BLOCK)
        start = pid // per_row * T
        end = start + T
        first = start + (per_row - 1 - pid % per_row) * BLOCK                   # those with most keys to read first
    else:
        first = tl.load(tiles + pid * 3)
        start = tl.load(tiles + pid * 3 + 1)
        end = tl.load(tiles + pid * 3 + 2)
    return first + part, start, end


@jit
def key_bounds(first, start, end, window, TILE: tl.constexpr, STEP: tl.constexpr):
    """Keys that a tile's queries see lie in [low, high); no mask is needed for those in [inner, first)."""
    low, inner = start, start
    if window is not None:
        low = start + tl.maximum(first - window + 1 - start, 0) // STEP * STEP
        inner = start + tl.cdiv(tl.maximum(first + TILE - window - start, 0), STEP) * STEP
    return low, tl.minimum(inner, first), tl.minimum(end, first + TILE)


@jit
def is_seen(queries, keys, window):
    seen = queries >= keys
    if window is not None:
        seen &= queries - keys < window
    return seen


# --- attention, forward ---

@jit
def forward_keys(out, top, total, q, k_tokens, v_tokens, column, queries, low, high, window, scale,
                 MASKED: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """The running softmax over the keys of [low, high): output, largest logit and sum of each query so far."""
    for n in tl.range(low, high, STEP):
        k = k_tokens.load([n, column])
        v = v_tokens.load([n, column])
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        logits = tl.dot(q, k.T, input_precision=PRECISION) * scale
        if MASKED:
            keys = n + tl.arange(0, STEP)
            logits = tl.where(is_seen(queries[:, None], keys[None, :], window), logits, HIDDEN)
        new_top = tl.maximum(top, tl.max(logits, 1))
        p = tl.exp2(logits - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return out, top, total


@jit
def forward_kernel(q_tokens, k_tokens, v_tokens, out_ptr, lse_ptr, tiles, N, T, window, scale, H: tl.constexpr,
                   G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
                   UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of queries of one head against the keys of its document."""
    first, start, end = tile_bounds(tiles, T, TILE, BLOCK)
    if first >= end:
        return
    low, inner, high = key_bounds(first, start, end, window, TILE, STEP)
    head = tl.program_id(1)
    column = head // G * D
    queries = first + tl.arange(0, TILE)
    q = q_tokens.load([first, head * D])
    if UPCAST:
        q = q.to(tl.float32)
    out = tl.zeros([TILE, D], tl.float32)
    top = tl.full([TILE], HIDDEN, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    if window is not None:
        out, top, total = forward_keys(out, top, total, q, k_tokens, v_tokens, column, queries, low, inner, window,
                                       scale, True, STEP, UPCAST, PRECISION)
    out, top, total = forward_keys(out, top, total, q, k_tokens, v_tokens, column, queries, inner, first, window,
                                   scale, False, STEP, UPCAST, PRECISION)
    out, top, total = forward_keys(out, top, total, q, k_tokens, v_tokens, column, queries, first, high, window,
                                   scale, True, STEP, UPCAST, PRECISION)
    valid = queries < end
    place = (queries.to(tl.int64) * H + head) * D
    out = out / total[:, None]
    tl.store(out_ptr + place[:, None] + tl.arange(0, D)[None, :], out.to(out_ptr.dtype.element_ty), mask=valid[:, None])
    tl.store(lse_ptr + head.to(tl.int64) * N + queries, (top + tl.log2(total)) / LOG2E, mask=valid)


# --- attention, backward: each program owns what it writes, so sums have one order and gradients repeat to the bit ---

@jit
def dq_keys(dq, q, dout, lse, delta, k_tokens, v_tokens, column, queries, low, high, window, scale,
            MASKED: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    for n in tl.range(low, high, STEP):
        k = k_tokens.load([n, column])
        v = v_tokens.load([n, column])
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        p = tl.exp2(tl.dot(q, k.T, input_precision=PRECISION) * scale - lse[:, None])
        if MASKED:
            p = tl.where(is_seen(queries[:, None], (n + tl.arange(0, STEP))[None, :], window), p, 0.0)
        ds = p * (tl.dot(dout, v.T, input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@jit
def dq_kernel(q_tokens, k_tokens, v_tokens, out_tokens, dout_tokens, lse_ptr, delta_ptr, dq_ptr, tiles, N, T, window,
              scale, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
              STEP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """dQ of one tile of queries of one head; also delta = sum(out * dout), which dK and dV need."""
    first, start, end = tile_bounds(tiles, T, TILE, BLOCK)
    if first >= end:
        return
    low, inner, high = key_bounds(first, start, end, window, TILE, STEP)
    head = tl.program_id(1)
    column = head // G * D
    queries = first + tl.arange(0, TILE)
    valid = queries < end
    q = q_tokens.load([first, head * D])
    dout = dout_tokens.load([first, head * D])
    delta = tl.sum(out_tokens.load([first, head * D]).to(tl.float32) * dout.to(tl.float32), 1)
    if UPCAST:
        q, dout = q.to(tl.float32), dout.to(tl.float32)
    per_head = head.to(tl.int64) * N + queries
    tl.store(delta_ptr + per_head, delta, mask=valid)
    lse = tl.load(lse_ptr + per_head, mask=valid, other=-HIDDEN) * LOG2E
    dq = tl.zeros([TILE, D], tl.float32)
    if window is not None:
        dq = dq_keys(dq, q, dout, lse, delta, k_tokens, v_tokens, column, queries, low, inner, window, scale, True,
                     STEP, UPCAST, PRECISION)
    dq = dq_keys(dq, q, dout, lse, delta, k_tokens, v_tokens, column, queries, inner, first, window, scale, False, STEP,
                 UPCAST, PRECISION)
    dq = dq_keys(dq, q, dout, lse, delta, k_tokens, v_tokens, column, queries, first, high, window, scale, True, STEP,
                 UPCAST, PRECISION)
    place = (queries.to(tl.int64) * H + head) * D
    dq = dq * (scale / LOG2E)
    tl.store(dq_ptr + place[:, None] + tl.arange(0, D)[None, :], dq.to(dq_ptr.dtype.element_ty), mask=valid[:, None])


@jit
def dkv_queries(dk, dv, k, v, q_tokens, dout_tokens, lse_ptr, delta_ptr, head, keys, low, high, end, window, scale, N,
                D: tl.constexpr, MASKED: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr,
                PRECISION: tl.constexpr):
    """Adds what the queries of [low, high) give. Transposed, keys by queries: p and ds stay in registers as the left
    operands of their products."""
    for m in tl.range(low, high, STEP):
        queries = m + tl.arange(0, STEP)
        q = q_tokens.load([m, head * D])
        dout = dout_tokens.load([m, head * D])
        if UPCAST:
            q, dout = q.to(tl.float32), dout.to(tl.float32)
        per_head = head.to(tl.int64) * N + queries
        lse = tl.load(lse_ptr + per_head, mask=queries < end, other=-HIDDEN) * LOG2E
        delta = tl.load(delta_ptr + per_head, mask=queries < end, other=0.0)
        p = tl.exp2(tl.dot(k, q.T, input_precision=PRECISION) * scale - lse[None, :])
        if MASKED:
            p = tl.where(is_seen(queries[None, :], keys[:, None], window), p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, dout.T, input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@jit
def dkv_kernel(q_tokens, k_tokens, v_tokens, dout_tokens, lse_ptr, delta_ptr, dk_ptr, dv_ptr, tiles, N, T, window,
               scale, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
               STEP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """dK and dV of one tile of keys of one key head, over all query heads that share it."""
    first, _, end = tile_bounds(tiles, T, TILE, BLOCK)
    key_head = tl.program_id(1)
    keys = first + tl.arange(0, TILE)
    k = k_tokens.load([first, key_head * D])
    v = v_tokens.load([first, key_head * D])
    if UPCAST:
        k, v = k.to(tl.float32), v.to(tl.float32)
    dk = tl.zeros([TILE, D], tl.float32)
    dv = tl.zeros([TILE, D], tl.float32)
    high, inner = end, end                      # queries in [first + TILE, inner) see all keys of the tile
    if window is not None:
        high = tl.minimum(end, first + TILE - 1 + window)
        inner = tl.minimum(first + TILE + tl.maximum(window - TILE, 0) // STEP * STEP, high)
    for member in range(G):
        head = key_head * G + member
        dk, dv = dkv_queries(dk, dv, k, v, q_tokens, dout_tokens, lse_ptr, delta_ptr, head, keys, first,
                             tl.minimum(first + TILE, high), end, window, scale, N, D, True, STEP, UPCAST, PRECISION)
        dk, dv = dkv_queries(dk, dv, k, v, q_tokens, dout_tokens, lse_ptr, delta_ptr, head, keys, first + TILE,
                             inner, end, window, scale, N, D, False, STEP, UPCAST, PRECISION)
        if window is not None:
            dk, dv = dkv_queries(dk, dv, k, v, q_tokens, dout_tokens, lse_ptr, delta_ptr, head, keys,
                                 tl.maximum(inner, first + TILE), high, end, window, scale, N, D, True, STEP, UPCAST,
                                 PRECISION)
    place = ((keys.to(tl.int64) * (H // G) + key_head) * D)[:, None] + tl.arange(0, D)[None, :]
    valid = (keys < end)[:, None]
    tl.store(dk_ptr + place, (dk * (scale / LOG2E)).to(dk_ptr.dtype.element_ty), mask=valid)
    tl.store(dv_ptr + place, dv.to(dv_ptr.dtype.element_ty), mask=valid)


# --- attention, the operator ---

def tokens(x, rows):
    """x (B, T, H, D) as a matrix of N tokens by heads, to be read in blocks of (rows, D)."""
    return TensorDescriptor.from_tensor(x.view(-1, x.size(2) * x.size(3)), [rows, x.size(3)])


def attention_config(name, D, dtype, capability):
    """(constants, launch options) of an attention kernel, the same for runs and for compiling ahead of time."""
    tile, step, warps, stages = CONFIGS[90 if capability >= (9, 0) else 80][name][D]
    exact = dtype == torch.float32
    if exact and not INTERPRET:                         # twice the bytes; for tests on a GPU
        tile, step, stages = 64, 32, 1
    constants = dict(D=D, BLOCK=BLOCK, TILE=tile, STEP=step, UPCAST=INTERPRET and not exact,
                     PRECISION="ieee" if exact else "tf32")
    return constants, dict(num_warps=warps, num_stages=stages)


def launch(kernel, name, tiles, heads, descriptors, *arguments, like, G, window):
    """Runs an attention kernel over all tiles and `heads`. descriptors: (tensor, whether it is read a tile at a time,
    or else a step at a time); `like` is q (B, T, H, D)."""
    B, T, H, D = like.shape
    capability = torch.cuda.get_device_capability(like.device) if like.is_cuda else (9, 0)
    constants, options = attention_config(name, D, like.dtype, capability)
    descriptors = [tokens(x, constants["TILE" if whole else "STEP"]) for x, whole in descriptors]
    blocks = len(tiles) if tiles is not None else B * -(-T // BLOCK)
    with torch.cuda.device_of(like):
        kernel[blocks * BLOCK // constants["TILE"], heads](
            *descriptors, *arguments, tiles, B * T, T, window or None, D ** -0.5 * LOG2E.value, H=H, G=G, **constants,
            **options)


@torch.library.custom_op("zero2chat::attention", mutates_args=())
def attention_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: torch.Tensor | None,
                      window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, T, H, D) and log-sum-exp (H, N) in fp32."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    B, T, H, D = q.shape
    out, lse = torch.empty_like(q), torch.empty(H, B * T, dtype=torch.float32, device=q.device)
    if out.numel():
        launch(forward_kernel, "forward", tiles, H, [(q, True), (k, False), (v, False)], out, lse, like=q,
               G=H // k.size(2), window=window)
    return out, lse


@attention_forward.register_fake
def _(q, k, v, tiles, window):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        (q.size(2), q.size(0) * q.size(1)), dtype=torch.float32)


@torch.library.custom_op("zero2chat::attention_backward", mutates_args=())
def attention_backward(dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
                       lse: torch.Tensor, tiles: torch.Tensor | None,
                       window: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dout, q, k, v = dout.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    if q.numel():
        H, K = q.size(2), k.size(2)
        launch(dq_kernel, "dq", tiles, H, [(q, True), (k, False), (v, False), (out, True), (dout, True)], lse, delta,
               dq, like=q, G=H // K, window=window)
        launch(dkv_kernel, "dkv" if H == K else "dkv_grouped", tiles, K,
               [(q, False), (k, True), (v, True), (dout, False)], lse, delta, dk, dv, like=q, G=H // K, window=window)
    return dq, dk, dv


@attention_backward.register_fake
def _(dout, q, k, v, out, lse, tiles, window):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def keep_for_backward(ctx, inputs, output):
    q, k, v, tiles, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, tiles)
    ctx.mark_non_differentiable(output[1])


def backward_of_attention(ctx, dout, _):
    q, k, v, out, lse, tiles = ctx.saved_tensors
    return *attention_backward(dout, q, k, v, out, lse, tiles, ctx.window), None, None


attention_forward.register_autograd(backward_of_attention, setup_context=keep_for_backward)


def attention(q, k, v, cu_seqlens=None, window=0):
    """kernels.attention by these kernels."""
    tiles = None if cu_seqlens is None else tile_table(cu_seqlens, q.size(0), q.size(1))
    return attention_forward(q, k, v, tiles, window)[0]
