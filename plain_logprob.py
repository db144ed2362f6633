"""Log-probabilities in plain torch, behind kernels.linear_logprob where Triton has no device: the logits exist a chunk
of tokens at a time, in forward and again in backward. docs/log.md has what was measured.

Shape letters: N tokens, C channels, V vocabulary, R rows of a block.
"""
import torch

LOGIT_BYTES = 32 << 20      # of one chunk of logits on CPU, which a product wants large, ...
BLOCK_BYTES = 2 << 20       # ... and of its fp32 rows under one softmax, which want to stay in the cache


def linear_logprob(hidden, weight, targets, temperature=1.0, want_entropy=False, want_hits=False):
    """kernels.linear_logprob by torch; one opaque operation to a compiler, which would keep all logits."""
    shape = targets.shape
    call = opaque_forward if torch.compiler.is_compiling() else LinearLogprob.apply
    logp, *more = call(hidden.reshape(-1, hidden.size(-1)), weight, targets.reshape(-1), float(temperature),
                       want_entropy, want_hits)
    more = [column.view(shape) for column, wanted in zip(more, (want_entropy, want_hits)) if wanted]
    return (logp.view(shape), *more) if more else logp.view(shape)


def logprobs(hidden, weight, targets, temperature, want_entropy, want_hits):
    """((log-probabilities, entropies, hits), logits): (N,) each, empty if not wanted; the logits (N, V) if they were
    one chunk, else None."""
    N = hidden.size(0)
    ignored = targets == -100
    targets = targets.masked_fill(ignored, 0).unsqueeze(-1)
    logp, entropy = (torch.empty(n, dtype=torch.float32, device=hidden.device) for n in (N, N if want_entropy else 0))
    hits = torch.empty(N if want_hits else 0, dtype=torch.bool, device=hidden.device)
    logits, chunks = None, row_chunks(hidden, weight)
    for chunk, blocks in chunks:
        logits = hidden[chunk] @ weight.t()
        for here, rows in blocks:
            logp_RV = torch.log_softmax(scaled(logits[rows], temperature), -1, dtype=torch.float32)
            logp[here] = logp_RV.gather(-1, targets[here]).squeeze(-1)
            if want_entropy:
                entropy[here] = -(logp_RV.exp() * logp_RV).sum(-1)
            if want_hits:
                hits[here] = logp_RV.argmax(-1) == targets[here].squeeze(-1)
    for column in (logp, entropy, hits):
        if len(column):
            column.masked_fill_(ignored, 0)
    return (logp, entropy, hits), logits if len(chunks) == 1 else None


def gradients(grad, hidden, weight, targets, temperature, want_dhidden, want_dweight, logits=None):
    """Gradients of hidden and of weight, empty if not wanted. `logits`, of one chunk, are overwritten."""
    ignored = targets == -100
    targets = targets.masked_fill(ignored, 0).unsqueeze(-1)
    dhidden = torch.empty_like(hidden if want_dhidden else hidden[:0])
    dweight = torch.zeros(weight.shape if want_dweight else 0, dtype=torch.float32, device=weight.device)
    grad = (grad.masked_fill(ignored, 0) / temperature).unsqueeze(-1)
    for chunk, blocks in row_chunks(hidden, weight):
        if logits is None:
            logits = hidden[chunk] @ weight.t()
        for here, rows in blocks:               # d logp / d logits = onehot - softmax, in the logits' own memory
            p_RV = torch.softmax(scaled(logits[rows], temperature), -1, dtype=torch.float32)
            logits[rows] = p_RV.mul_(-grad[here]).scatter_add_(-1, targets[here], grad[here])
        if want_dhidden:
            dhidden[chunk] = logits @ weight
        if want_dweight and dweight.dtype == logits.dtype:
            torch.addmm(dweight, logits.t(), hidden[chunk], out=dweight)
        elif want_dweight:
            dweight += logits.t() @ hidden[chunk]
        logits = None
    return dhidden, dweight.to(weight.dtype)


def row_chunks(hidden, weight):
    """[(rows of hidden (N, C) whose logits are computed at once, blocks of them)]; a block is (rows of hidden, the same
    rows of the chunk), as many as a softmax takes at once."""
    N, V, on_cpu = hidden.size(0), weight.size(0), hidden.device.type == "cpu"
    chunk_bytes, block_bytes = (LOGIT_BYTES, BLOCK_BYTES) if on_cpu else (256 << 20, 512 << 20)
    size, step = max(1, chunk_bytes // (hidden.element_size() * V)), max(1, block_bytes // (4 * V))
    chunks = []
    for first in range(0, N, size):
        last = min(N, first + size)
        begins = range(first, last, step)
        blocks = [(slice(i, min(i + step, last)), slice(i - first, min(i + step, last) - first)) for i in begins]
        chunks.append((slice(first, last), blocks))
    return chunks


def scaled(logits, temperature):
    return logits if temperature == 1.0 else logits.float() / temperature


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, want_entropy, want_hits):
        columns, ctx.logits = logprobs(hidden, weight, targets, temperature, want_entropy, want_hits)
        ctx.mark_non_differentiable(*columns[1:])
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature = temperature
        return columns

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        logits, ctx.logits = ctx.logits, None
        return all_gradients(ctx, gradients, grad, logits)


def all_gradients(ctx, function, grad, *more):
    """The gradients of all arguments, by `function`; none of what is frozen."""
    wanted = ctx.needs_input_grad[:2]
    found = function(grad, *ctx.saved_tensors, ctx.temperature, *wanted, *more)
    return *(x if asked else None for x, asked in zip(found, wanted)), None, None, None, None


# --- the same as operations that a compiler does not look into ---

@torch.library.custom_op("zero2chat::plain_logprob", mutates_args=())
def opaque_forward(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float,
                   want_entropy: bool, want_hits: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return logprobs(hidden, weight, targets, temperature, want_entropy, want_hits)[0]


@opaque_forward.register_fake
def _(hidden, weight, targets, temperature, want_entropy, want_hits):
    N = hidden.size(0)
    logp, entropy = (hidden.new_empty(n, dtype=torch.float32) for n in (N, N if want_entropy else 0))
    return logp, entropy, hidden.new_empty(N if want_hits else 0, dtype=torch.bool)


@torch.library.custom_op("zero2chat::plain_logprob_backward", mutates_args=())
def opaque_backward(grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                    temperature: float, want_dhidden: bool, want_dweight: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return gradients(grad, hidden, weight, targets, temperature, want_dhidden, want_dweight)


@opaque_backward.register_fake
def _(grad, hidden, weight, targets, temperature, want_dhidden, want_dweight):
    dweight = weight.new_empty(weight.shape if want_dweight else 0)
    return torch.empty_like(hidden if want_dhidden else hidden[:0]), dweight


def keep(ctx, inputs, output):
    *tensors, ctx.temperature, _, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(*output[1:])


opaque_forward.register_autograd(lambda ctx, grad, *_: all_gradients(ctx, opaque_backward, grad), setup_context=keep)
