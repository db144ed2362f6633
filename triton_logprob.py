"""Rows of logits in Triton, behind kernels.linear_logprob on CUDA: log-probabilities and entropies of a chunk, and
their gradient in its place. docs/kernels.md describes them and counts their bytes.

Shape letters: N tokens, C channels, V vocabulary.
"""
import torch

from triton_kernels import HIDDEN, jit, tl

LOGIT_BYTES = 256 << 20     # of a chunk of logits
ROW_STEP = 2048             # columns that a program of the row kernels holds


@jit
def rows_kernel(logits_ptr, targets_ptr, logp_ptr, entropy_ptr, hits_ptr, lse_ptr, V, temperature,
                ENTROPY: tl.constexpr, HITS: tl.constexpr, STEP: tl.constexpr):
    """Log-sum-exp, log-probability of the target, entropy, and whether the target is the first of the likeliest, of one
    row of logits, read once."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logits_ptr += row * V
    top = tl.full([STEP], HIDDEN, tl.float32)           # of each lane: lanes meet at the end
    total = tl.zeros([STEP], tl.float32)
    weighted = tl.zeros([STEP], tl.float32)
    likeliest = tl.zeros([STEP], tl.int32)              # the first column with a lane's largest logit
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
        if HITS:
            likeliest = tl.where(x > top, column, likeliest)
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
    if HITS:
        tl.store(hits_ptr + row, tl.min(tl.where(top == highest, likeliest, V), 0) == target)


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
                    want_entropy: bool, want_hits: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor,
                                                                  torch.Tensor]:
    """(log-probabilities, entropies, hits, log-sum-exps), (N,) each, of hidden (N, C); what is not wanted is empty."""
    hidden, targets, N, V = hidden.contiguous(), targets.contiguous(), hidden.size(0), weight.size(0)
    logp, lse = (torch.empty(N, dtype=torch.float32, device=hidden.device) for _ in range(2))
    entropy = torch.empty(N if want_entropy else 0, dtype=torch.float32, device=hidden.device)
    hits = torch.empty(N if want_hits else 0, dtype=torch.bool, device=hidden.device)
    with torch.cuda.device_of(hidden):
        for chunk, logits in chunks(hidden, weight):
            rows_kernel[len(logits),](logits, targets[chunk], logp[chunk], entropy[chunk], hits[chunk], lse[chunk], V,
                                      temperature, ENTROPY=want_entropy, HITS=want_hits, STEP=ROW_STEP, num_warps=8)
    return logp, entropy, hits, lse


@logprob_forward.register_fake
def _(hidden, weight, targets, temperature, want_entropy, want_hits):
    N = hidden.size(0)
    logp, entropy, lse = (hidden.new_empty(n, dtype=torch.float32) for n in (N, N if want_entropy else 0, N))
    return logp, entropy, hidden.new_empty(N if want_hits else 0, dtype=torch.bool), lse


@torch.library.custom_op("zero2chat::linear_logprob_backward", mutates_args=())
def logprob_backward(grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                     lse: torch.Tensor, temperature: float, want_dhidden: bool,
                     want_dweight: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of hidden and weight, empty if not wanted; the logits are computed again."""
    grad, hidden, targets, V = grad.contiguous(), hidden.contiguous(), targets.contiguous(), weight.size(0)
    dhidden = torch.empty_like(hidden if want_dhidden else hidden[:0])
    dweight = torch.zeros(weight.shape if want_dweight else 0, dtype=torch.float32, device=weight.device)
    with torch.cuda.device_of(hidden):
        for chunk, logits in chunks(hidden, weight):
            dlogits_kernel[len(logits), -(-V // ROW_STEP)](logits, targets[chunk], lse[chunk], grad[chunk], V,
                                                           temperature, STEP=ROW_STEP, num_warps=4)
            if want_dhidden:
                torch.mm(logits, weight, out=dhidden[chunk])
            if want_dweight:
                dweight += logits.t() @ hidden[chunk]
    return dhidden, dweight.to(weight.dtype)


@logprob_backward.register_fake
def _(grad, hidden, weight, targets, lse, temperature, want_dhidden, want_dweight):
    dweight = weight.new_empty(weight.shape if want_dweight else 0)
    return hidden.new_empty((hidden if want_dhidden else hidden[:0]).shape), dweight


def keep_for_logprob(ctx, inputs, output):
    hidden, weight, targets, ctx.temperature, *_ = inputs
    ctx.save_for_backward(hidden, weight, targets, output[3])
    ctx.mark_non_differentiable(*output[1:])


def backward_of_logprob(ctx, grad, *_):
    wanted = ctx.needs_input_grad[:2]                   # not of a frozen head, nor below one that alone is trained
    found = logprob_backward(grad, *ctx.saved_tensors, ctx.temperature, *wanted)
    return *(x if asked else None for x, asked in zip(found, wanted)), None, None, None, None


logprob_forward.register_autograd(backward_of_logprob, setup_context=keep_for_logprob)


def linear_logprob(hidden, weight, targets, temperature=1.0, want_entropy=False, want_hits=False):
    """kernels.linear_logprob by these kernels."""
    shape = targets.shape
    logp, entropy, hits, _ = logprob_forward(hidden.reshape(-1, hidden.size(-1)), weight, targets.reshape(-1),
                                             float(temperature), want_entropy, want_hits)
    more = [column.view(shape) for column, wanted in ((entropy, want_entropy), (hits, want_hits)) if wanted]
    return (logp.view(shape), *more) if more else logp.view(shape)
