"""Decoding attention in Triton, behind kernels.decode_attention on CUDA: one query of each row against its cache, split
over keys. docs/kernels.md describes it and counts its bytes.

Shape letters: B sequences, H query heads, K key heads, G = H / K, D head width, S columns of a cache.
"""
import torch

from triton_kernels import HIDDEN, INTERPRET, LOG2E, jit, tl

CHUNK = 256                 # keys that one program reads: fixed, so that a row never depends on others


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
