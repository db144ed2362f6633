"""Parameter groups, Muon and AdamW, and the learning-rate schedules.

`build` gives Muon to the matrices of the blocks and AdamW to the rest, or AdamW to all; the loop sets each group's
`lr` to its `peak_lr` times the schedule's `lr_scale`.
"""
import math

import torch


def build(model, optimizer, lr, matrix_lr, embed_lr, weight_decay, betas, momentum, dtype=torch.float32):
    """The optimizer of a model: "muon" (block matrices by Muon at matrix_lr, the rest by AdamW) or "adamw" (all).

    The rest are the embedding at embed_lr, and the head and the norms at lr. Decay falls on matrices of the blocks and
    the head, never on norms or the embedding. embed_lr = 0 means lr. dtype is that of Muon's matrix products.
    """
    if optimizer not in ("muon", "adamw"):
        raise ValueError(f"optimizer must be muon or adamw, got {optimizer!r}")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    embedding = [p for name, p in named if "embed_tokens" in name]
    matrices = [p for name, p in named if p.dim() == 2 and ".layers." in name]
    head = [p for name, p in named if p.dim() == 2 and ".layers." not in name and "embed_tokens" not in name]
    norms = [p for name, p in named if p.dim() < 2]
    groups = [dict(params=embedding, lr=embed_lr or lr, weight_decay=0.0),
              dict(params=head, lr=lr, weight_decay=weight_decay), dict(params=norms, lr=lr, weight_decay=0.0)]
    if optimizer == "adamw":
        groups.append(dict(params=matrices, lr=lr, weight_decay=weight_decay))
        return Optimizers(adamw(groups, betas))
    return Optimizers(Muon(matrices, matrix_lr, momentum, weight_decay, dtype), adamw(groups, betas))


def adamw(groups, betas):
    """torch's AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), fused, over the groups that are not empty."""
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=betas, eps=1e-10, fused=True)


class Optimizers:
    """Several optimizers stepped as one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group in self.param_groups:
            group["peak_lr"] = group["lr"]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states):
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

        M <- mu M + (1 - mu) G;   W <- W (1 - lr wd) - lr sqrt(max(1, rows / columns)) orthogonal(nesterov M)

    All matrices of one shape go through the iteration in one batched product, wide ones as they are and tall ones
    transposed. It costs 5 (4 m^2 n + 2 m^3) FLOPs a step for an m x n matrix, m <= n: at C = 384 as much as training
    on some 1,300 tokens, whatever the number of tokens in the step.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((min(p.shape), max(p.shape)), []).append(p)
            for shape, params in shapes.items():
                grads = torch.stack([q.grad if q.shape == shape else q.grad.t() for q in params])
                state = self.state[params[0]]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(grads)
                average = state["momentum"].lerp_(grads, 1 - group["momentum"])
                updates = orthogonalise(grads.lerp_(average, group["momentum"]), self.dtype)
                if group["weight_decay"]:
                    torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                for p, update in zip(params, updates.to(params[0].dtype)):
                    scale = math.sqrt(max(1, p.size(0) / p.size(1)))
                    p.add_(update if p.shape == shape else update.t(), alpha=-group["lr"] * scale)


def orthogonalise(matrices, dtype=torch.float32, steps=5):
    """The nearest matrices with all singular values near 1 (0.7 to 1.2), of a batch (N, m, n) with m <= n.

    Newton-Schulz iteration of fifth order with Jordan's coefficients, in `dtype`: bf16 is enough.
    """
    x = matrices.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x


def lr_scale(step, progress, schedule, warmup_steps, decay_fraction=1.0, final=0.0):
    """The factor on every peak learning rate: (0, 1].

    Linear warmup over warmup_steps, then by `progress`, the share of the run that is over (of its steps or of its
    seconds): "cosine" falls to `final` at progress 1; "wsd" stays at 1 and falls linearly over the last
    decay_fraction; "constant" stays.
    """
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    progress = min(1.0, progress)
    if schedule == "cosine":
        fall = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule == "wsd":
        fall = min(1.0, (1 - progress) / max(decay_fraction, 1e-9))
    elif schedule == "constant":
        fall = 1.0
    else:
        raise ValueError(f"schedule must be cosine, wsd or constant, got {schedule!r}")
    return warm * (final + (1 - final) * fall)
