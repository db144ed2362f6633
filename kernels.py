"""The operations worth writing by hand, in plain torch: attention, decode_attention, linear_logprob, rms_norm, rotate.

Each is one function with one meaning on every device; the fastest way to compute it is chosen inside.
Shape letters: B sequences, T tokens, H heads, D head width, C channels, V vocabulary, N tokens in all.
"""
import functools

import torch
import torch.nn.functional as F

SMALL = 1 << 15             # numbers up to which torch's own composite norm has less to call (10 against 16 us)
LOGIT_BYTES = 32 << 20      # of one chunk in linear_logprob: near the cache on CPU, little memory anywhere


# --- attention ---

def attention(q, k, v, cu_seqlens=None, window=0, impl="auto"):
    """Causal softmax attention, (B, T, H, D), scaled by D**-0.5.

    q is (B, T, H, D); k, v are (B, T, Hkv, D), where query head h reads key head h // (H // Hkv).
    cu_seqlens: int32 offsets of documents in the flattened B*T tokens (FlashAttention's convention): a token sees
    only its own document. window: a token sees itself and the window - 1 tokens before it (0: all before it).
    impl: "plain" (batched products and a softmax), "sdpa" (torch's fused kernels), or "auto", whichever measures
    faster for the device, dtype and length. Raises ValueError on shapes or offsets that do not fit.
    """
    B, T, H, D = q.shape
    if k.shape != v.shape or k.shape[:2] != (B, T) or k.size(3) != D or H % k.size(2):
        raise ValueError(f"attention got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; k and v must be "
                         "alike, with q's batch, length and width, and their heads must divide q's")
    if window < 0:
        raise ValueError(f"attention window must be 0 (off) or more tokens, got {window}")
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)           # (B, H, T, D)
    allowed = None if cu_seqlens is None and not window else visible(B, T, cu_seqlens, window, q.device)
    if impl == "auto":
        # on CPU torch's fused backward loses to plain products up to these lengths (docs/log.md)
        short = T <= (512 if q.dtype == torch.bfloat16 else 128)
        impl = "plain" if q.device.type == "cpu" and short else "sdpa"
    if impl == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v, allowed, is_causal=allowed is None, enable_gqa=H != k.size(1))
        return out.transpose(1, 2)
    if impl != "plain":
        raise ValueError(f"attention impl must be auto, plain or sdpa, got {impl!r}")
    if H != k.size(1):
        k, v = (x.repeat_interleave(H // k.size(1), 1) for x in (k, v))
    if allowed is None:
        bias = causal_bias(T, q.dtype, q.device)
    else:
        bias = torch.zeros_like(allowed, dtype=q.dtype).masked_fill_(~allowed, -1e30)
    return PlainAttention.apply(q, k, v, bias).transpose(1, 2)


def decode_attention(q, k_cache, v_cache, lengths, start=None, window=0, seen=None):
    """Softmax attention of the newest tokens of each row to the row's cache, (B, T, H, D), scaled by D**-0.5.

    q is (B, T, H, D), T = 1 when decoding; k_cache, v_cache are (B, Hkv, S, D) and hold the keys and values of q's own
    tokens too. lengths (B,): how many keys the row's first query sees, itself included; the next one sees one more.
    start (B,): the first key that is seen (left padding). window: a query sees itself and the window - 1 keys before it
    (0: all). Columns beyond what is seen may hold anything finite. seen: what keys_seen gave for these arguments, where
    several layers share it. Computed in the cache's dtype, returned in q's. A row's result does not depend on its
    neighbours. Raises ValueError on shapes that do not fit.
    """
    B, T, H, D = q.shape
    K, S = k_cache.shape[1:3]
    if k_cache.shape != (B, K, S, D) or v_cache.shape != k_cache.shape or H % K or lengths.shape != (B,):
        raise ValueError(f"decode_attention got q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache "
                         f"{tuple(v_cache.shape)}, lengths {tuple(lengths.shape)}; caches must be (B, Hkv, S, D) with "
                         "Hkv a divisor of H, and lengths (B,)")
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


@functools.lru_cache(maxsize=8)
def causal_bias(T, dtype, device):
    """(T, T): 0 where query t sees key s <= t, -1e30 elsewhere."""
    return torch.full((T, T), -1e30, dtype=dtype, device=device).triu_(1)


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


def document_ids(cu_seqlens, n_tokens):
    """(n_tokens,) int64: the number of the document that each token of the flattened batch belongs to."""
    inner = cu_seqlens.long()
    if len(inner) < 2 or inner[0] != 0 or inner[-1] != n_tokens or (inner.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to B*T = {n_tokens}, got {cu_seqlens.tolist()}")
    starts = torch.zeros(n_tokens + 1, dtype=torch.long, device=inner.device)
    starts.index_add_(0, inner, torch.ones_like(inner))
    return starts[:n_tokens].cumsum(0) - 1


class PlainAttention(torch.autograd.Function):
    """softmax(q k' / sqrt(D) + bias) v by batched products; keeps only the probabilities."""

    @staticmethod
    def forward(ctx, q, k, v, bias):
        B, H, T, D = q.shape
        q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
        if bias.dim() == 4:
            bias = bias.expand(B, H, T, T).reshape(B * H, T, T)
        p = torch.softmax(torch.baddbmm(bias, q, k.transpose(1, 2), alpha=D ** -0.5), -1)
        ctx.save_for_backward(q, k, v, p)
        return torch.bmm(p, v).view(B, H, T, D)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, p = ctx.saved_tensors
        shape, scale = grad.shape, q.size(-1) ** -0.5
        grad = grad.reshape(q.shape)
        dv = torch.bmm(p.transpose(1, 2), grad)
        ds = torch._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), p, -1, p.dtype)
        dq = torch.baddbmm(q, ds, k, beta=0, alpha=scale)
        dk = torch.baddbmm(k, ds.transpose(1, 2), q, beta=0, alpha=scale)
        return dq.view(shape), dk.view(shape), dv.view(shape), None


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
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx, grad):
        normed, scale, weight = ctx.saved_tensors
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
    if x.device.type == "cpu":
        if torch.is_grad_enabled():
            return RMSNorm.apply(x, weight, eps)
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
    if x.device.type == "cpu":
        return Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else turn(x, cos, sin, attention_layout(x), 1)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


# --- head ---

def linear_logprob(hidden, weight, targets, temperature=1.0, want_entropy=False):
    """Log-probability of each target under softmax(hidden @ weight.T / temperature), fp32 nats, without (N, V) logits.

    hidden is (..., C), weight (V, C), targets (...) int64; a target of -100 gives 0 and no gradient. Returns (...)
    log-probabilities, and with want_entropy=True also the (...) entropies (no gradient through those).
    The logits exist a chunk of tokens at a time, in forward and again in backward. The gradient with respect to each
    token's log-probability is arbitrary, so that one primitive serves cross entropy, DPO's sums and PPO's ratios.
    """
    shape = targets.shape
    logp, entropy = LinearLogprob.apply(hidden.reshape(-1, hidden.size(-1)), weight, targets.reshape(-1),
                                        temperature, want_entropy)
    return (logp.view(shape), entropy.view(shape)) if want_entropy else logp.view(shape)


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, want_entropy):
        N, V = hidden.size(0), weight.size(0)
        rows = max(1, LOGIT_BYTES // (4 * V))
        lse = torch.empty(N, dtype=torch.float32, device=hidden.device)
        logp, entropy = torch.empty_like(lse), torch.zeros_like(lse) if want_entropy else None
        ignored = targets == -100
        targets = targets.masked_fill(ignored, 0).unsqueeze(-1)
        for chunk in (slice(i, i + rows) for i in range(0, N, rows)):
            logits = scaled_logits(hidden[chunk], weight, temperature)
            lse[chunk] = torch.logsumexp(logits, -1)
            logp[chunk] = logits.gather(-1, targets[chunk]).squeeze(-1) - lse[chunk]
            if want_entropy:
                entropy[chunk] = lse[chunk] - (torch.softmax(logits, -1) * logits).sum(-1)
        logp.masked_fill_(ignored, 0)
        if want_entropy:
            entropy.masked_fill_(ignored, 0)
            ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(hidden, weight, targets, ignored, lse)
        ctx.rows, ctx.temperature = rows, temperature
        ctx.kept = logits if 0 < N <= rows else None        # one chunk: backward need not compute it again
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _=None):
        hidden, weight, targets, ignored, lse = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        dweight = None
        if ctx.needs_input_grad[1]:             # not of a frozen head
            dweight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad = (grad.masked_fill(ignored, 0) / ctx.temperature).unsqueeze(-1)
        lse = lse.unsqueeze(-1)
        for chunk in (slice(i, i + ctx.rows) for i in range(0, len(hidden), ctx.rows)):
            logits, ctx.kept = ctx.kept, None
            if logits is None:
                logits = scaled_logits(hidden[chunk], weight, ctx.temperature)
            # d logp / d logits = onehot - softmax, in the logits' own memory
            dlogits = logits.sub_(lse[chunk]).exp_().mul_(-grad[chunk]).scatter_add_(-1, targets[chunk], grad[chunk])
            dlogits = dlogits.to(hidden.dtype)
            dhidden[chunk] = dlogits @ weight
            if dweight is not None:
                dweight += dlogits.t() @ hidden[chunk]
        return dhidden, dweight if dweight is None else dweight.to(weight.dtype), None, None, None


def scaled_logits(hidden, weight, temperature):
    logits = (hidden @ weight.t()).float()
    return logits if temperature == 1.0 else logits.div_(temperature)
