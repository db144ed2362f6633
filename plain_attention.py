"""Attention in plain torch, behind kernels.attention on a CPU: batched products, and documents gathered in groups so
that each attends to itself alone. docs/kernels.md says why it is laid out so, docs/log.md what was measured.

Shape letters: B sequences, T tokens, H heads, D head width, N tokens in all; K key heads, G = H / K of them share one.
"""
import functools

import numpy as np
import torch
import torch.nn.functional as F

import triton_kernels

PLAIN = {torch.bfloat16: 4096}      # tokens of a row up to which plain products beat torch's fused kernels on CPU
KEPT = 512                  # up to which they keep probabilities for backward: faster, but T numbers a token and head


def by_hand(x):
    """Whether the paths written for the CPU serve x; a compiler makes its own of the composites."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def masked_attention(q, k, v, allowed=None, impl="auto"):
    """attention on (B, H, T, D); allowed (B or 1, 1, T, T) bool says which of the keys up to itself a query sees, None:
    all of them."""
    if impl == "auto":
        impl = "plain" if by_hand(q) and q.size(2) <= PLAIN.get(q.dtype, 1024) else "sdpa"
    if impl == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, allowed, is_causal=allowed is None,
                                              enable_gqa=q.size(1) != k.size(1))
    if impl != "plain":
        raise ValueError(f"attention impl must be auto, plain, sdpa or triton, got {impl!r}")
    return PlainAttention.apply(q, k, v, allowed)


class PlainAttention(torch.autograd.Function):
    """Causal softmax attention by batched products, a block of queries at a time against the keys up to its end."""

    @staticmethod
    def forward(ctx, q, k, v, allowed):
        B, H, T, D = q.shape
        K = k.size(1)
        k, v = (x.reshape(B * K, T, D) for x in (k, v))
        out = q.new_empty(B, T, H, D).transpose(1, 2)               # lies in memory as what follows wants it
        kept = []
        for first, last in query_blocks(T, q.dtype):
            p = probabilities(q, k, allowed, first, last)
            out[:, :, first:last] = torch.bmm(p, v[:, :last]).view(B, H, -1, D)
            kept += [p] if T <= KEPT and any(ctx.needs_input_grad) else []
        ctx.save_for_backward(q, k, v, allowed, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, allowed, *kept = ctx.saved_tensors
        B, H, T, D = q.shape
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for i, (first, last) in reversed(list(enumerate(query_blocks(T, q.dtype)))):
            p = kept[i] if kept else probabilities(q, k, allowed, first, last)
            q_block, dout = (x[:, :, first:last].reshape(len(k), -1, D) for x in (q, grad))
            ds = torch._softmax_backward_data(torch.bmm(dout, v[:, :last].transpose(1, 2)), p, -1, p.dtype)
            dq[:, :, first:last] = torch.baddbmm(q_block, ds, k[:, :last], beta=0, alpha=D ** -0.5).view(B, H, -1, D)
            dk_block = torch.baddbmm(k[:, :last], ds.transpose(1, 2), q_block, beta=0, alpha=D ** -0.5)
            dv_block = torch.bmm(p.transpose(1, 2), dout)
            if last == T:                                           # the first one: it sees all keys
                dk, dv = dk_block, dv_block
            else:
                dk[:, :last] += dk_block
                dv[:, :last] += dv_block
        return dq, dk.view(B, -1, T, D), dv.view(B, -1, T, D), None


def query_blocks(T, dtype):
    """[(first, last)] of T tokens: shorter blocks compute less of what causality hides, longer ones run faster."""
    size = 256 if dtype == torch.bfloat16 and T > 512 else 128      # docs/log.md
    return [(first, min(T, first + size)) for first in range(0, T, size)]


def probabilities(q, k, allowed, first, last):
    """(B*K, G * (last - first), last): the softmax of the queries of [first, last) over the keys before `last`, query
    heads that share a key head as rows of one product. q is (B, H, T, D), k (B*K, T, D)."""
    B, H, _, D = q.shape
    rows, keys = q[:, :, first:last].reshape(len(k), -1, D), k[:, :last].transpose(1, 2)
    hidden = later(last - first, q.dtype, q.device)
    if allowed is None and not first and len(k) == B * H:           # in one pass
        return torch.softmax(torch.baddbmm(hidden, rows, keys, alpha=D ** -0.5), -1)
    logits = torch.baddbmm(hidden[:1, :1], rows, keys, beta=0, alpha=D ** -0.5)
    by_head = logits.view(B, H, last - first, last)
    if allowed is None:
        by_head[..., first:] += hidden
    else:
        by_head.masked_fill_(~allowed[..., first:last, :last], never(q.dtype))
    return torch.softmax(logits, -1)


def never(dtype):
    """What stands for minus infinity among logits."""
    return max(-1e30, torch.finfo(dtype).min)


@functools.lru_cache(maxsize=16)
def later(T, dtype, device):
    """(T, T): never(dtype) where key s comes after query t, else 0."""
    with torch.inference_mode(False):
        return torch.full((T, T), never(dtype), dtype=dtype, device=device).triu_(1)


# --- within documents ---

class Documents:
    """Where the documents of a flattened batch lie, so that each can attend densely to itself and to nothing else.

    documents: arrays of positions in the batch, a document's tokens in their order. A position may stand in several, as
    a prompt does that its answers share; its output is the same in all. Documents are computed in groups of like
    length, padded at their ends, where causal attention never looks. ValueError if one of n_tokens is in none.
    """

    def __init__(self, documents, n_tokens, device):
        documents = sorted((positions for positions in documents if len(positions)), key=len, reverse=True)
        self.shapes, blocks = [], []                            # (documents, tokens) of each group
        while documents:
            longest = len(documents[0])
            group = [positions for positions in documents if len(positions) >= 0.75 * longest - 8]
            documents = documents[len(group):]
            blocks.append(np.stack([np.pad(p, (0, longest - len(p)), constant_values=-1) for p in group]).ravel())
            self.shapes.append((len(group), longest))
        padded = np.concatenate(blocks)                         # (M,)
        real = np.flatnonzero(padded >= 0)
        tokens, first = np.unique(padded[real], return_index=True)
        if len(tokens) != n_tokens:
            raise ValueError(f"{n_tokens - len(tokens)} of {n_tokens} tokens belong to no document")
        home, copies = real[first], np.delete(real, first)
        arrays = padded.clip(0), home, copies, padded[copies]
        self.padded, self.home, self.copies, self.copied = (torch.from_numpy(x).to(device) for x in arrays)
        self.known = {}

    def places(self, H):
        """(M, H): the row of width D where each head of each padded token lies, groups being (documents, H, tokens)."""
        if H not in self.known:
            parts, base, device = [], 0, self.padded.device
            for n, L in self.shapes:
                document, token, head = (torch.arange(x, device=device) for x in (n, L, H))
                parts.append(base + (document[:, None, None] * H + head) * L + token[:, None])
                base += n * H * L
            self.known[H] = torch.cat([part.flatten(0, 1) for part in parts])
        return self.known[H]

    def sources(self, shape, stride):
        """(M * H,): for each row of the groups, the row of width D of a tensor (B, T, H, D) that belongs there."""
        if (shape, stride) not in self.known:
            _, T, H, D = shape
            row, token, head = (step // D for step in stride[:3])
            source = self.padded // T * row + self.padded % T * token
            source = source[:, None] + torch.arange(H, device=source.device) * head             # (M, H)
            index = torch.empty_like(source).flatten()
            index[self.places(H).flatten()] = source.flatten()
            self.known[shape, stride] = index
        return self.known[shape, stride]


class Gather(torch.autograd.Function):
    """(M * H, D): the heads of x (B, T, H, D) group by group. Gradients of keys add up over a token's copies; queries'
    copies have none."""

    @staticmethod
    def forward(ctx, x, documents, is_key):
        ctx.documents, ctx.is_key, ctx.shape = documents, is_key, x.shape
        D = x.size(-1)
        n_rows = sum((size - 1) * step for size, step in zip(x.shape, x.stride())) // D + 1
        return x.as_strided((n_rows, D), (D, 1)).index_select(0, documents.sources(x.shape, x.stride()))

    @staticmethod
    def backward(ctx, grad):
        documents, places = ctx.documents, ctx.documents.places(ctx.shape[2])
        dx = grad.index_select(0, places[documents.home].flatten()).view(-1, *ctx.shape[2:])    # (N, H, D)
        if ctx.is_key and len(documents.copies):
            copies = grad.index_select(0, places[documents.copies].flatten()).view(-1, *ctx.shape[2:])
            dx.index_add_(0, documents.copied, copies)
        return dx.view(ctx.shape), None, None


class Scatter(torch.autograd.Function):
    """(N, C): the rows (M, C) of padded tokens back in the batch's order; copies are left out."""

    @staticmethod
    def forward(ctx, rows, home):
        ctx.shape, ctx.home = rows.shape, home
        return rows.index_select(0, home)

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(ctx.shape).index_copy_(0, ctx.home, grad), None


def document_attention(q, k, v, documents):
    """Causal softmax attention of q (B, T, H, D) to k, v (B, T, Hkv, D) within Documents, (B, T, H, D)."""
    D = q.size(-1)
    q, k, v = (x if x.stride(3) == 1 and not any(step % D for step in x.stride()[:3]) else x.contiguous()
               for x in (q, k, v))
    rows = [Gather.apply(x, documents, is_key) for x, is_key in ((q, False), (k, True), (v, True))]
    groups = [x.split([n * heads * L for n, L in documents.shapes])
              for x, heads in zip(rows, (q.size(2), k.size(2), v.size(2)))]
    out = [masked_attention(*(x.view(n, -1, L, D) for x in group)).transpose(1, 2).reshape(n * L, -1)
           for (n, L), *group in zip(documents.shapes, *groups)]
    return Scatter.apply(torch.cat(out), documents.home).view(q.shape)


@functools.lru_cache(maxsize=8)
def packed_documents(cu_seqlens, n_tokens, T, device):
    """The Documents between offsets (a tuple); None where rows of T tokens are one document each."""
    if cu_seqlens == tuple(range(0, n_tokens + 1, T)):
        return None
    triton_kernels.check_offsets(torch.tensor(cu_seqlens), n_tokens)
    ends = sorted({*cu_seqlens, *range(0, n_tokens + 1, T)})
    return Documents([np.arange(a, b) for a, b in zip(ends, ends[1:])], n_tokens, device)
