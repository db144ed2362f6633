"""Triton kernels behind kernels.py on CUDA: packed attention and its gradient, decoding attention, rows of logits.

Each is a torch operator (zero2chat::...), so that compiled models have no graph break, and nothing here waits for the
GPU. Without triton the file imports and `why_not` says so. docs/kernels.md describes each kernel and counts its bytes.

Shape letters: B sequences, T tokens of a row, N = B*T tokens in all, H query heads, K key heads, G = H / K, D head
width, S columns of a cache, V vocabulary.
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
CHUNK = 256                 # keys that one program of decoding reads: fixed, so that a row never depends on others
LOGIT_BYTES = 256 << 20     # of a chunk of logits in linear_logprob
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

@torch.library.custom_op("zero2chat::tile_table", mutates_args=())
def tile_table(cu_seqlens: torch.Tensor, B: int, T: int) -> torch.Tensor:
    """(M, 3) int32: first token of each tile, start and end of its document; M depends on shapes alone.

    Documents are cut at row ends and into tiles of BLOCK tokens; tiles with most keys to read come first, and those
    left over are (N, N, N), where there is nothing to do. Offsets that do not rise from 0 to N raise ValueError on CPU
    and fail an assertion on a GPU, which the host does not wait for; clamped and sorted, they never lead out of bounds.
    """
    N, device = B * T, cu_seqlens.device
    rising = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == N) & (cu_seqlens.diff() >= 0).all()
    if device.type == "cuda":
        torch._assert_async(rising, f"cu_seqlens must rise from 0 to B*T = {N}")
    elif not rising:
        raise ValueError(f"cu_seqlens must rise from 0 to B*T = {N}, got {cu_seqlens.tolist()}")
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


# --- decoding: one query of each row against its cache ---

@jit
def decode_range(lengths, starts, row, window, S):
    """(first, low, end) of a row: keys are cut into chunks from `first` on, and those of [low, end) are seen."""
    end = tl.minimum(tl.load(lengths + row).to(tl.int32), S)
    first = 0
    if starts is not None:
        first = tl.maximum(tl.load(starts + row).to(tl.int32), 0)
    low = first
    if window is not None:
        low = tl.maximum(first, end - window)
    return first, low, end


@jit
def decode_kernel(q_ptr, k_ptr, v_ptr, lengths, starts, out_ptr, lse_ptr, q_row, q_head, k_row, k_head, k_key, v_row,
                  v_head, v_key, S, window, scale, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                  ROWS: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr, UPCAST: tl.constexpr,
                  PRECISION: tl.constexpr):
    """One chunk of one row's keys under one key head: output and log2-sum-exp of the G query heads that share it."""
    row = tl.program_id(0) // K
    head = tl.program_id(0) % K
    chunk = tl.program_id(1)
    first, low, end = decode_range(lengths, starts, row, window, S)
    begin = first + chunk * CHUNK
    if begin >= end or begin + CHUNK <= low:
        return
    member = tl.arange(0, ROWS)
    width = tl.arange(0, D)
    row = row.to(tl.int64)
    heads = head * G + member
    q = tl.load(q_ptr + row * q_row + (heads * q_head)[:, None] + width[None, :], mask=(member < G)[:, None], other=0.0)
    q = q.to(k_ptr.dtype.element_ty)
    if UPCAST:
        q = q.to(tl.float32)
    out = tl.zeros([ROWS, D], tl.float32)
    top = tl.full([ROWS], HIDDEN, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for n in range(begin, tl.minimum(begin + CHUNK, end), STEP):
        keys = n + tl.arange(0, STEP)
        seen = (keys >= low) & (keys < end)
        place = keys.to(tl.int64)[:, None]
        k = tl.load(k_ptr + row * k_row + head * k_head + place * k_key + width[None, :], mask=seen[:, None], other=0.0)
        v = tl.load(v_ptr + row * v_row + head * v_head + place * v_key + width[None, :], mask=seen[:, None], other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        logits = tl.where(seen[None, :], tl.dot(q, k.T, input_precision=PRECISION) * scale, HIDDEN)
        new_top = tl.maximum(top, tl.max(logits, 1))
        p = tl.where(seen[None, :], tl.exp2(logits - new_top[:, None]), 0.0)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        top = new_top
    place = (row * K * G + heads) * tl.num_programs(1) + chunk
    tl.store(lse_ptr + place, top + tl.log2(total), mask=member < G)
    tl.store(out_ptr + place[:, None] * D + width[None, :], out / total[:, None], mask=(member < G)[:, None])


@jit
def combine_kernel(parts_ptr, lse_ptr, out_ptr, lengths, starts, S, window, n_chunks, H: tl.constexpr, D: tl.constexpr,
                   CHUNK: tl.constexpr):
    """A row's and head's chunks as one softmax, in their order; 0 where no key is seen."""
    place = tl.program_id(0).to(tl.int64)
    first, low, end = decode_range(lengths, starts, place // H, window, S)
    width = tl.arange(0, D)
    out = tl.zeros([D], tl.float32)
    top = HIDDEN
    total = 0.0
    for chunk in range((low - first) // CHUNK, tl.cdiv(tl.maximum(end - first, 0), CHUNK)):
        lse = tl.load(lse_ptr + place * n_chunks + chunk)
        new_top = tl.maximum(top, lse)
        share = tl.exp2(lse - new_top)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + share
        out = out * shrink + share * tl.load(parts_ptr + (place * n_chunks + chunk) * D + width)
        top = new_top
    out = tl.where(total > 0, out / tl.maximum(total, 1e-30), 0.0)
    tl.store(out_ptr + place * D + width, out.to(out_ptr.dtype.element_ty))


def decode_config(G, D, dtype):
    """(constants, launch options) of decode_kernel. A tile of a product has at least 16 rows."""
    exact = dtype == torch.float32
    constants = dict(G=G, D=D, ROWS=max(16, 1 << (G - 1).bit_length()), STEP=64, CHUNK=CHUNK,
                     UPCAST=INTERPRET and not exact, PRECISION="ieee" if exact else "tf32")
    return constants, dict(num_warps=4, num_stages=2)


@torch.library.custom_op("zero2chat::decode_attention", mutates_args=())
def decode(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor,
           start: torch.Tensor | None, window: int) -> torch.Tensor:
    B, _, H, D = q.shape
    K, S = k_cache.shape[1:3]
    if any(x.stride(-1) != 1 for x in (q, k_cache, v_cache)):
        q, k_cache, v_cache = q.contiguous(), k_cache.contiguous(), v_cache.contiguous()
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    n_chunks = -(-S // CHUNK)
    if not B * n_chunks:
        return out
    parts = torch.empty(B, H, n_chunks, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(B, H, n_chunks, dtype=torch.float32, device=q.device)
    constants, options = decode_config(H // K, D, k_cache.dtype)
    lengths, start = lengths.contiguous(), None if start is None else start.contiguous()
    with torch.cuda.device_of(q):
        decode_kernel[B * K, n_chunks](q, k_cache, v_cache, lengths, start, parts, lse, q.stride(0), q.stride(2),
                                       *k_cache.stride()[:3], *v_cache.stride()[:3], S, window or None,
                                       D ** -0.5 * LOG2E.value, K=K, **constants, **options)
        combine_kernel[B * H,](parts, lse, out, lengths, start, S, window or None, n_chunks, H=H, D=D, CHUNK=CHUNK,
                               num_warps=1)
    return out


@decode.register_fake
def _(q, k_cache, v_cache, lengths, start, window):
    return q.new_empty(q.shape)


# --- rows of logits ---

@jit
def rows_kernel(logits_ptr, targets_ptr, logp_ptr, entropy_ptr, lse_ptr, V, temperature, ENTROPY: tl.constexpr,
                STEP: tl.constexpr):
    """Log-sum-exp, log-probability of the target and entropy of one row of logits, read once."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logits_ptr += row * V
    top = tl.full([STEP], HIDDEN, tl.float32)           # of each lane: lanes meet at the end
    total = tl.zeros([STEP], tl.float32)
    weighted = tl.zeros([STEP], tl.float32)
    for n in range(0, V, STEP):
        column = n + tl.arange(0, STEP)
        x = tl.load(logits_ptr + column, mask=column < V, other=0.0).to(tl.float32) / temperature
        x = tl.where(column < V, x, HIDDEN)
        new_top = tl.maximum(top, x)
        p = tl.where(column < V, tl.exp(x - new_top), 0.0)
        shrink = tl.exp(top - new_top)
        total = total * shrink + p
        if ENTROPY:
            weighted = weighted * shrink + p * x
        top = new_top
    highest = tl.max(top, 0)
    share = tl.exp(top - highest)
    sum_exp = tl.sum(total * share, 0)
    lse = highest + tl.log(sum_exp)
    inside = (target >= 0) & (target < V)
    logit = tl.load(logits_ptr + target, mask=inside, other=0.0).to(tl.float32) / temperature
    wrong = tl.where(inside, logit - lse, float("nan"))             # a target beyond the vocabulary is never looked up
    tl.store(logp_ptr + row, tl.where(target == -100, 0.0, wrong))
    tl.store(lse_ptr + row, lse)
    if ENTROPY:
        entropy = lse - tl.sum(weighted * share, 0) / sum_exp
        tl.store(entropy_ptr + row, tl.where(target == -100, 0.0, entropy))


@jit
def dlogits_kernel(logits_ptr, targets_ptr, lse_ptr, grad_ptr, V, temperature, STEP: tl.constexpr):
    """d logp / d logits times the row's gradient, (onehot - softmax) / temperature, in the logits' own memory."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * STEP + tl.arange(0, STEP)
    target = tl.load(targets_ptr + row)
    grad = tl.where(target == -100, 0.0, tl.load(grad_ptr + row)) / temperature
    place = logits_ptr + row * V + column
    x = tl.load(place, mask=column < V, other=0.0).to(tl.float32) / temperature
    d = grad * (tl.where(column == target, 1.0, 0.0) - tl.exp(x - tl.load(lse_ptr + row)))
    tl.store(place, d.to(logits_ptr.dtype.element_ty), mask=column < V)


ROW_STEP = 2048             # columns that a program of the row kernels holds


def chunks(hidden, weight):
    """(rows of the chunk, its logits) for all of hidden (N, C), in one buffer of at most LOGIT_BYTES."""
    N, V = hidden.size(0), weight.size(0)
    rows = max(1, min(N, LOGIT_BYTES // (hidden.element_size() * V)))
    buffer = hidden.new_empty(rows, V)
    for i in range(0, N, rows):
        chunk = slice(i, min(i + rows, N))
        yield chunk, torch.mm(hidden[chunk], weight.t(), out=buffer[:chunk.stop - i])


@torch.library.custom_op("zero2chat::linear_logprob", mutates_args=())
def logprob_forward(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float,
                    want_entropy: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probabilities, entropies, log-sum-exps), (N,) each, of hidden (N, C); entropies are empty if not wanted."""
    hidden, targets, N, V = hidden.contiguous(), targets.contiguous(), hidden.size(0), weight.size(0)
    logp, lse = (torch.empty(N, dtype=torch.float32, device=hidden.device) for _ in range(2))
    entropy = torch.empty(N if want_entropy else 0, dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        for chunk, logits in chunks(hidden, weight):
            rows_kernel[len(logits),](logits, targets[chunk], logp[chunk], entropy[chunk], lse[chunk], V, temperature,
                                      ENTROPY=want_entropy, STEP=ROW_STEP, num_warps=8)
    return logp, entropy, lse


@logprob_forward.register_fake
def _(hidden, weight, targets, temperature, want_entropy):
    rows = hidden.new_empty(hidden.size(0), dtype=torch.float32)
    return rows, torch.empty_like(rows) if want_entropy else rows.new_empty(0), torch.empty_like(rows)


@torch.library.custom_op("zero2chat::linear_logprob_backward", mutates_args=())
def logprob_backward(grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                     lse: torch.Tensor, temperature: float, want_dweight: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of hidden and weight (empty if not wanted); the logits are computed again."""
    grad, hidden, targets, V = grad.contiguous(), hidden.contiguous(), targets.contiguous(), weight.size(0)
    dhidden = torch.empty_like(hidden)
    dweight = torch.zeros(weight.shape if want_dweight else 0, dtype=torch.float32, device=weight.device)
    with torch.cuda.device_of(hidden):
        for chunk, logits in chunks(hidden, weight):
            dlogits_kernel[len(logits), -(-V // ROW_STEP)](logits, targets[chunk], lse[chunk], grad[chunk], V,
                                                           temperature, STEP=ROW_STEP, num_warps=4)
            torch.mm(logits, weight, out=dhidden[chunk])
            if want_dweight:
                dweight += logits.t() @ hidden[chunk]
    return dhidden, dweight.to(weight.dtype)


@logprob_backward.register_fake
def _(grad, hidden, weight, targets, lse, temperature, want_dweight):
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape if want_dweight else 0)


def keep_for_logprob(ctx, inputs, output):
    hidden, weight, targets, ctx.temperature, _ = inputs
    ctx.save_for_backward(hidden, weight, targets, output[2])
    ctx.mark_non_differentiable(*output[1:])


def backward_of_logprob(ctx, grad, *_):
    wanted = ctx.needs_input_grad[1]                    # not of a frozen head
    dhidden, dweight = logprob_backward(grad, *ctx.saved_tensors, ctx.temperature, wanted)
    return dhidden, dweight if wanted else None, None, None, None


logprob_forward.register_autograd(backward_of_logprob, setup_context=keep_for_logprob)


def linear_logprob(hidden, weight, targets, temperature=1.0, want_entropy=False):
    """kernels.linear_logprob by these kernels."""
    shape = targets.shape
    logp, entropy, _ = logprob_forward(hidden.reshape(-1, hidden.size(-1)), weight, targets.reshape(-1),
                                       float(temperature), want_entropy)
    return (logp.view(shape), entropy.view(shape)) if want_entropy else logp.view(shape)
