"""Parameter groups, Muon and AdamW, the learning-rate schedules, and which updates to skip.

`build` gives Muon to the matrices of the blocks and AdamW to the rest, or AdamW to all; the loop sets each group's
`lr` to its `peak_lr` times the schedule's `lr_scale`.
"""
import inspect
import math

import torch

from record import Fetched


def build(model, optimizer, lr, matrix_lr, embed_lr, weight_decay, betas, momentum, muon_steps=5,
          dtype=torch.float32, compiled=False):
    """The optimizer of a model: "muon" (block matrices by Muon at matrix_lr, the rest by AdamW) or "adamw" (all).

    The rest are the embedding at embed_lr, and the head, the norms and adapters (lora.py) at lr. Decay falls on
    matrices of the blocks and the head, never on norms, adapters or the embedding. embed_lr = 0 means lr, as does a
    tied head. Frozen parameters are left out. muon_steps and dtype are those of Muon's iteration, which torch.compile
    fuses if `compiled`.
    """
    if optimizer not in ("muon", "adamw"):
        raise ValueError(f"optimizer must be muon or adamw, got {optimizer!r}")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    embedding = [p for name, p in named if "embed_tokens" in name]
    adapters = [p for name, p in named if ".lora_" in name]
    matrices = [p for name, p in named if p.dim() == 2 and ".layers." in name and ".lora_" not in name]
    taken = {id(p) for p in embedding + adapters + matrices}
    head = [p for name, p in named if p.dim() == 2 and id(p) not in taken]
    norms = [p for name, p in named if p.dim() < 2]
    tied = hasattr(model, "lm_head") and any(p is model.lm_head.weight for p in embedding)     # learns as the head does
    groups = [dict(params=embedding, lr=lr if tied else embed_lr or lr, weight_decay=0.0),
              dict(params=head, lr=lr, weight_decay=weight_decay),
              dict(params=norms + adapters, lr=lr, weight_decay=0.0)]
    if optimizer == "adamw":
        groups.append(dict(params=matrices, lr=lr, weight_decay=weight_decay))
        return Optimizers(adamw(groups, betas))
    muon = [Muon(matrices, matrix_lr, momentum, weight_decay, muon_steps, dtype, compiled)] if matrices else []
    return Optimizers(*muon, adamw(groups, betas))


def adamw(groups, betas):
    """torch's AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), fused, over the groups that are not empty."""
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=betas, eps=1e-10, fused=True)


def leave_compiler_alone():
    """Keeps torch.optim from importing torch's compiler, a second of start-up, which it does only to keep the compiler
    out of its own methods. Nothing here compiles those; `Optimizers.step` unwraps `step` for the same reason."""
    for method in vars(torch.optim.Optimizer).values():
        if hasattr(method, "__wrapped__"):
            method.__wrapped__.__dynamo_disable = method.__wrapped__


leave_compiler_alone()


class Optimizers:
    """Several optimizers stepped as one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group in self.param_groups:
            group["peak_lr"] = group["lr"]

    @torch.no_grad()
    def step(self, accepted=None):
        """One update; none, and no trace of it, where the bool tensor `accepted` is False. If that is on a GPU, the
        GPU finds it out by itself: nothing waits for it."""
        if accepted is not None and accepted.device.type == "cpu":
            if not accepted:
                return
            accepted = None
        refused = None if accepted is None else accepted.logical_not().float()
        for optimizer in self.optimizers:
            optimizer.found_inf = refused                   # torch's fused AdamW reads it, as Muon does
            inspect.unwrap(type(optimizer).step)(optimizer)

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states):
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

        M <- mu M + (1 - mu) G;   W <- W (1 - lr wd) - lr sqrt(max(1, rows / columns)) orthogonal(nesterov M)

    All matrices of one shape go through the iteration in one batched product, wide ones as they are and tall ones
    transposed. An m x n matrix, m <= n, costs `steps` (4 m^2 n + 2 m^3) FLOPs an update, whatever the number of tokens
    in it: with 5 steps as much as training on 3 to 5 m tokens.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, steps=5, dtype=torch.float32, compiled=False):
        if steps not in POLAR:
            raise ValueError(f"muon_steps must be one of {', '.join(map(str, POLAR))}, got {steps}")
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.steps, self.dtype, self.found_inf = steps, dtype, None
        self.orthogonalise = torch.compile(orthogonalise, dynamic=False) if compiled else orthogonalise

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            refused, shapes = self.found_inf, {}            # None, or on a GPU 1 if there is to be no update, else 0
            for p in group["params"]:
                if p.grad is not None:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    average = self.state[p]["momentum"]
                    grad = p.grad if refused is None else average.where(refused > 0, p.grad)
                    average.lerp_(grad, 1 - momentum)       # towards itself if refused
                    update = grad.lerp(average, momentum)
                    wide = p.size(0) <= p.size(1)
                    shapes.setdefault((min(p.shape), max(p.shape)), []).append((p, update if wide else update.t()))
            for pairs in shapes.values():
                params, updates = zip(*pairs)
                updates = self.orthogonalise(torch.stack(updates), self.steps, self.dtype).to(params[0].dtype)
                updates, share = (updates, 1.0) if refused is None else (updates * (1 - refused), 1 - refused)
                for p, update in zip(params, updates):
                    if group["weight_decay"]:
                        p.mul_(1 - lr * group["weight_decay"] * share)
                    wide = p.size(0) <= p.size(1)
                    p.add_(update if wide else update.t(), alpha=-lr * math.sqrt(max(1, p.size(0) / p.size(1))))


# Odd polynomials a x + b x^3 + c x^5: each the one of least largest distance from 1 on the range to which those
# before it bring the singular values from 0.01 (4 steps) or 0.001 (5 steps) to 1; 1 % of room is left for rounding.
POLAR = {4: ((8.0132, -22.9258, 16.5994), (3.607, -2.6486, 0.5119), (2.6536, -1.9392, 0.435),
             (1.9691, -1.3574, 0.3907)),
         5: ((8.3865, -24.3697, 17.7252), (4.1423, -3.0181, 0.5526), (3.9286, -2.8723, 0.5365),
             (3.2763, -2.4118, 0.486), (2.3018, -1.6763, 0.423))}


def orthogonalise(matrices, steps=5, dtype=torch.float32):
    """A batch (N, m, n), m <= n, with its singular vectors and all singular values near 1; in `dtype`, bf16 is enough.

    Polar Express (Amsel et al. 2025, arXiv:2505.16932): Newton-Schulz with the best polynomial for each step. Five
    steps bring singular values above 0.001 of the Frobenius norm to 0.88..1.12; four those above 0.01 to 0.98..1.02.
    """
    x = matrices.to(dtype)
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLAR[steps]:
        square = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def lr_scale(step, progress, schedule, warmup_steps, decay_fraction=1.0, final=0.0):
    """The factor on every peak learning rate, from 0 to 1.

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


class SpikeGuard:
    """Says whether an update should be applied: not when the loss or the gradient norm is not finite, or the norm is
    `factor` times above the median of the last 100 that were accepted. After `patience` refusals in a row, ValueError,
    on a GPU a step late. `state()` is what a saved state must hold of it."""

    def __init__(self, factor, patience, norms=(), skipped=0, row=0):
        self.factor, self.patience, self.waiting = factor, patience, None
        self.norms = torch.tensor([math.nan] * (100 - len(norms)) + list(norms), dtype=torch.float32)
        self.skipped, self.row = torch.tensor(skipped), torch.tensor(row)

    def state(self):
        return dict(norms=self.norms[~self.norms.isnan()].tolist(), skipped=int(self.skipped), row=int(self.row))

    @torch.no_grad()
    def accepts(self, loss, grad_norm):
        """Bool tensor, decided where grad_norm is on CUDA: nothing waits for a GPU."""
        grad_norm = torch.as_tensor(grad_norm, dtype=torch.float32)
        grad_norm = grad_norm if grad_norm.is_cuda else grad_norm.cpu()     # elsewhere it is decided here and now
        norms, skipped, row, loss = (torch.as_tensor(x).to(grad_norm.device, non_blocking=True) for x in (
            self.norms, self.skipped, self.row, loss))
        moved = norms > 0                                   # no signal at all says nothing of what is usual
        usual = torch.nanquantile(norms.where(moved, math.nan), 0.5).where(moved.sum() >= 20, math.inf)
        good = loss.isfinite() & grad_norm.isfinite() & (grad_norm <= self.factor * usual.clamp_min(1e-12))
        self.norms = torch.cat([norms.narrow(0, 1, len(norms) - 1), grad_norm.view(1)]).where(good, norms)
        self.skipped, self.row = skipped + good.logical_not(), (row + 1).where(good.logical_not(), 0)
        found = Fetched(dict(row=self.row, loss=loss, grad_norm=grad_norm, usual=usual))
        due, self.waiting = (self.waiting, found) if found.event else (found, None)
        if due:
            self.check(**due.values())
        return good

    def check(self, row, loss, grad_norm, usual):
        if row >= self.patience:
            raise ValueError(f"{row} updates in a row were skipped: the loss is now {loss:.3g}, the gradient norm "
                             f"{grad_norm:.3g}, its median {usual:.3g}; begin again, or from the best weights so far "
                             "(--init_from=OUT_DIR/best), with lower learning rates or more warmup_steps")
