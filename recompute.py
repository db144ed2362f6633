"""What backward computes again instead of autograd keeping it: large tensors that are cheap to make from others which
are kept anyway, such as a norm's output. On a CPU; a compiler finds such tensors by itself.

    h = again(SwiGLU.apply(gate, up), swiglu, gate, up)     # h, and how to make it once more
    with instead_of(h):                                     # of h, what is computed in here keeps that alone
        out = F.linear(h, weight)
"""
import contextlib

import torch

LEAST = 8 << 20             # bytes of a tensor worth the time
allowed = True              # not within blocks that are computed again as a whole


class Recipe:
    """How to compute a tensor: function(*inputs), done once for all that wait for it."""

    def __init__(self, function, inputs):
        self.function, self.inputs, self.waiting, self.found = function, inputs, 0, None

    def __call__(self):
        if self.found is None:
            self.found = self.function(*(x() if isinstance(x, Recipe) else x for x in self.inputs))
        found, self.waiting = self.found, self.waiting - 1
        if self.waiting < 1:
            self.found = None
        return found


def is_worth_it(x):
    return allowed and x.numel() * x.element_size() >= LEAST


def again(out, function, *inputs):
    """`out`, which is function(*inputs), and remembers so if it is large."""
    if is_worth_it(out):
        out.recipe = Recipe(function, [getattr(x, "recipe", x.detach() if isinstance(x, torch.Tensor) else x)
                                       for x in inputs])
    return out


def instead_of(*tensors):
    """A context in which autograd keeps the recipes of those tensors that have one, and not them."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    recipes = {(x.data_ptr(), x.numel()): x.recipe for x in tensors if hasattr(x, "recipe")}
    if not recipes:
        return contextlib.nullcontext()

    def pack(kept):
        recipe = recipes.get((kept.data_ptr(), kept.numel()))
        if recipe is None:
            return kept
        recipe.waiting += 1
        return recipe, kept.shape, kept.stride()

    def unpack(kept):
        if isinstance(kept, torch.Tensor):
            return kept
        recipe, shape, stride = kept
        return recipe().as_strided(shape, stride)           # a view of it, as what was kept
    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Off:
    """Within it nothing is remembered; it may be entered again."""

    def __enter__(self):
        global allowed
        self.before, allowed = allowed, False

    def __exit__(self, *error):
        global allowed
        allowed = self.before
