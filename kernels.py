"""The operations worth writing by hand, in plain torch: attention, decode_attention, linear_logprob, and the cheap ones
between products, rms_norm, rotate and swiglu.

Each is one function with one meaning on every device; the fastest way to compute it is chosen inside.
Shape letters: B sequences, T tokens, H heads, D head width, C channels, V vocabulary, N tokens in all.
"""
import torch
import torch.nn.functional as F

import plain_logprob
import triton_decode
import triton_kernels
import triton_logprob
from plain_attention import by_hand, document_attention, masked_attention, packed_documents
from recompute import again, instead_of, is_worth_it

SMALL = 1 << 15             # numbers up to which torch's own composite norm has less to call (10 against 16 us)


# --- attention ---

def attention(q, k, v, cu_seqlens=None, window=0, impl="auto"):
    """Causal softmax attention, (B, T, H, D), scaled by D**-0.5.

    q is (B, T, H, D); k, v are (B, T, Hkv, D), where query head h reads key head h // (H // Hkv).
    cu_seqlens: int32 offsets of documents in the flattened B*T tokens (FlashAttention's convention): a token sees
    only its own document. window: a token sees itself and the window - 1 tokens before it (0: all before it).
    impl: "plain" (batched products and a softmax), "sdpa" (torch's fused kernels), "triton" (triton_kernels.py), or
    "auto": on CPU whichever measures faster for dtype and length; on NVIDIA GPUs triton where documents or a window
    leave less to read, else sdpa. Raises ValueError on shapes or offsets that do not fit.
    """
    B, T, H, D = q.shape
    if k.shape != v.shape or k.shape[:2] != (B, T) or k.size(3) != D or H % k.size(2):
        raise ValueError(f"attention got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; k and v must be "
                         "alike, with q's batch, length and width, and their heads must divide q's")
    if window < 0:
        raise ValueError(f"attention window must be 0 (off) or more tokens, got {window}")
    if (cu_seqlens is not None or window or impl == "triton") and triton_kernels.chosen(impl, q, D):
        return triton_kernels.attention(q, k, v, cu_seqlens, window)
    if cu_seqlens is not None and impl == "auto" and not window and by_hand(q):
        documents = packed_documents(tuple(cu_seqlens.tolist()), B * T, T, q.device)
        if documents is not None:
            return document_attention(q, k, v, documents)
        cu_seqlens = None                                                       # every row is one document
    allowed = None if cu_seqlens is None and not window else visible(B, T, cu_seqlens, window, q.device)
    with instead_of(q, k):
        return masked_attention(*(x.transpose(1, 2) for x in (q, k, v)), allowed, impl).transpose(1, 2)


def bidirectional_attention(q, k, v, cu_seqlens=None):
    """Softmax attention to what is before and after, (B, T, H, D), scaled by D**-0.5; shapes as in attention. With
    cu_seqlens a token sees only its own document. By torch's fused kernels."""
    B, T, H, _ = q.shape
    allowed = None
    if cu_seqlens is not None:
        document = document_ids(cu_seqlens, B * T).view(B, 1, T, 1)
        allowed = document == document.transpose(-1, -2)                        # (B, 1, T, T)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)           # (B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, allowed, enable_gqa=H != k.size(1)).transpose(1, 2)


def decode_attention(q, k_cache, v_cache, lengths, start=None, window=0, seen=None, impl="auto"):
    """Softmax attention of the newest tokens of each row to the row's cache, (B, T, H, D), scaled by D**-0.5.

    q is (B, T, H, D), T = 1 when decoding; k_cache, v_cache are (B, Hkv, S, D) and hold the keys and values of q's own
    tokens too. lengths (B,): how many keys the row's first query sees, itself included; the next one sees one more.
    start (B,): the first key that is seen (left padding). window: a query sees itself and the window - 1 keys before it
    (0: all). Columns beyond what is seen may hold anything finite. seen: what keys_seen gave for these arguments, where
    several layers share it. impl: "auto", or "triton", which is for T = 1. Computed in the cache's dtype, returned in
    q's. A row's result does not depend on its neighbours. Raises ValueError on shapes that do not fit.
    """
    B, T, H, D = q.shape
    K, S = k_cache.shape[1:3]
    begins = lengths if start is None else start
    if (k_cache.shape != (B, K, S, D) or v_cache.shape != k_cache.shape or H % K or lengths.shape != (B,)
            or begins.shape != (B,)):
        raise ValueError(f"decode_attention got q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache "
                         f"{tuple(v_cache.shape)}, lengths {tuple(lengths.shape)}, start {tuple(begins.shape)}; caches "
                         "must be (B, Hkv, S, D) with Hkv a divisor of H, and lengths and start (B,)")
    if window < 0:
        raise ValueError(f"decode_attention window must be 0 (off) or more tokens, got {window}")
    if T == 1 and triton_kernels.chosen(impl, k_cache, D):
        return triton_decode.decode(q, k_cache, v_cache, lengths, start, window)
    if seen is None:
        seen = keys_seen(lengths, T, S, start, window)
    # query heads that share a key head ride as rows of one tile: (B, K, H/K * T, D)
    tile = q.transpose(1, 2).reshape(B, K, H // K * T, D).to(k_cache.dtype)
    mask = None if seen is ALL_KEYS else seen.repeat(1, H // K, 1).unsqueeze(1)
    out = F.scaled_dot_product_attention(tile, k_cache, v_cache, mask)
    return out.view(B, H, T, D).transpose(1, 2).to(q.dtype)


ALL_KEYS = "all"


def keys_seen(lengths, T, S, start=None, window=0):
    """(B, T, S) bool: which columns of the cache decode_attention's queries see; ALL_KEYS where the CPU, which reads
    lengths for nothing, finds that it is every one."""
    if lengths.device.type == "cpu" and T == 1 and start is None and not window and lengths.min() >= S:
        return ALL_KEYS
    last = lengths[:, None] + torch.arange(T, device=lengths.device) - 1        # (B, T): the key each query stands at
    key = torch.arange(S, device=lengths.device)
    seen = key <= last[..., None]
    if window:
        seen &= key > last[..., None] - window
    if start is not None:
        seen &= key >= start[:, None, None]
    return seen


def visible(B, T, cu_seqlens, window, device):
    """(B, 1, T, T) bool, or (T, T) without documents: whether query t sees key s."""
    t = torch.arange(T, device=device)
    allowed = t[:, None] >= t
    if window:
        allowed = allowed & (t[:, None] - t < window)
    if cu_seqlens is None:
        return allowed
    document = document_ids(cu_seqlens, B * T).view(B, 1, T, 1)
    return allowed & (document == document.transpose(-1, -2))


def pad_offsets(cu_seqlens, maximum=0):
    """cu_seqlens with empty documents at the end, `maximum` offsets in all (0: the next power of two): one shape, or a
    few, so as few compiled graphs for any number of documents. ValueError if there are more."""
    maximum = maximum or 1 << (len(cu_seqlens) - 1).bit_length()
    if len(cu_seqlens) > maximum:
        raise ValueError(f"cu_seqlens has {len(cu_seqlens)} offsets, more than the maximum of {maximum}")
    return F.pad(cu_seqlens, (0, maximum - len(cu_seqlens)), value=int(cu_seqlens[-1]))


def document_ids(cu_seqlens, n_tokens):
    """(n_tokens,) int64: the number of the document that each token of the flattened batch belongs to."""
    triton_kernels.check_offsets(cu_seqlens, n_tokens)
    inner = cu_seqlens.long()
    starts = torch.zeros(n_tokens + 1, dtype=torch.long, device=inner.device)
    starts.index_add_(0, inner, torch.ones_like(inner))
    return starts[:n_tokens].cumsum(0) - 1


# --- linear ---

def linear(x, weight):
    """x @ weight.T. Up to 64 fp32 rows on CPU, which BLAS leaves to one thread, are multiplied by as many slices of the
    weight as there are threads: 2.6 against 4.7 ms for one row and 12M weights, 14.7 against 21.5 for 64."""
    rows = x.numel() // x.size(-1)
    if rows > 64 or x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_grad_enabled():
        return F.linear(x, weight)
    threads = torch.get_num_threads()
    if threads == 1 or weight.size(0) % threads:
        return F.linear(x, weight)
    slices = weight.view(threads, -1, weight.size(1)).transpose(1, 2)
    out = torch.bmm(x.reshape(1, rows, -1).expand(threads, -1, -1), slices)             # (threads, rows, n / threads)
    return out.transpose(0, 1).reshape(*x.shape[:-1], -1)


# --- norm ---

class RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension, statistics in fp32: fewer passes over memory than the composite."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = inverse_rms(x, eps)
        normed, ctx.keeps_x = x * scale, is_worth_it(x)     # x, which the output is made from again
        ctx.save_for_backward(x if ctx.keeps_x else normed, scale, weight)
        return normed * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        kept, scale, weight = ctx.saved_tensors
        normed = kept * scale if ctx.keeps_x else kept
        product = grad * normed
        dot = (product @ weight).div_(weight.numel()).unsqueeze(-1)
        dx = (grad * weight).addcmul_(normed, dot, value=-1).mul_(scale)
        return dx, product.flatten(0, -2).sum(0), None


def inverse_rms(x, eps):
    dtype = torch.promote_types(x.dtype, torch.float32)
    power = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square_()
    return power.div_(x.size(-1)).add_(eps).rsqrt_().to(x.dtype)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype (Zhang & Sennrich, arXiv:1910.07467).
    Without gradients the weight may also be (H, D), one for each head of x (..., H, D)."""
    weight = weight.to(x.dtype)
    if by_hand(x):
        if torch.is_grad_enabled():
            return again(RMSNorm.apply(x, weight, eps), rms_norm, x, weight, eps)
        if x.dtype != torch.float32 or x.numel() > SMALL:
            return x * inverse_rms(x, eps) * weight     # the same numbers, to the bit, without autograd's cost
    if weight.dim() > 1:
        return F.rms_norm(x, x.shape[-1:], None, eps) * weight
    return F.rms_norm(x, weight.shape, weight, eps)


# --- rotary positions ---

class Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin, attention_layout(x), 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, sin, grad.new_empty(grad.shape), -1), None, None


def attention_layout(x):
    """An empty tensor of x's shape (B, T, H, D) that lies in memory as (B, H, T, D), which attention wants."""
    B, T, H, D = x.shape
    return x.new_empty(B, H, T, D).transpose(1, 2)


def turn(x, cos, sin, out, sign):
    """Writes each pair (d, d + D/2) of x (B, T, H, D), turned by its position's angle times `sign`, to `out`."""
    half = x.size(-1) // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., half:], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., :half], value=sign)
    return out


def rotate(x, cos, sin):
    """x (B, T, H, D) with each pair (d, d + D/2) turned by its position's angle (Su et al. 2021, arXiv:2104.09864);
    cos and sin are (T, 1, D), or (B, T, 1, D) where rows stand at different positions."""
    if by_hand(x):
        if torch.is_grad_enabled():
            return again(Rotate.apply(x, cos, sin), rotate, x, cos, sin)
        return turn(x, cos, sin, attention_layout(x), 1)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


# --- SwiGLU ---

class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, of which the composite would keep silu(gate) too."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def swiglu(gate, up):
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202)."""
    if by_hand(gate):
        if torch.is_grad_enabled():
            return again(SwiGLU.apply(gate, up), swiglu, gate, up)
        return F.silu(gate).mul_(up)
    return F.silu(gate) * up


# --- head ---

def linear_logprob(hidden, weight, targets, temperature=1.0, want_entropy=False, want_hits=False, impl="auto"):
    """Log-probability of each target under softmax(hidden @ weight.T / temperature), fp32 nats, without (N, V) logits.

    hidden is (..., C), weight (V, C), targets (...) int64; a target of -100 gives 0 and no gradient. Returns (...)
    log-probabilities; with want_entropy=True then also the (...) entropies, and with want_hits=True whether each target
    is the likeliest token, (...) bool: 0 and False where the target is -100, no gradient through either.
    The logits exist a chunk of tokens at a time, in forward and again in backward. The gradient with respect to each
    token's log-probability is arbitrary, so that one primitive serves cross entropy, DPO's sums and PPO's ratios.
    ValueError on shapes that do not fit, and on a temperature that is not above 0.
    """
    if hidden.shape[:-1] != targets.shape or hidden.size(-1) != weight.size(-1) or not temperature > 0:
        raise ValueError(f"linear_logprob got hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets "
                         f"{tuple(targets.shape)}, {temperature=}; these must be (..., C), (V, C), (...) and above 0")
    if triton_kernels.chosen(impl, hidden):
        return triton_logprob.linear_logprob(hidden, weight, targets, temperature, want_entropy, want_hits)
    return plain_logprob.linear_logprob(hidden, weight, targets, temperature, want_entropy, want_hits)
