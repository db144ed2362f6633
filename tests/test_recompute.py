"""recompute.py: less memory, and gradients that are the same to the bit."""
import pytest
import torch

import bench
import lora
import recompute
from kernels import SMALL, attention, rotate, swiglu
from model import GPT, Config

NEVER, SOON = 1 << 60, 4 * SMALL + 1                       # bytes


def gradients(least, monkeypatch, tokens=600, checkpointing=False, ends=None, adapted=False, dtype=torch.float32,
              **shape):
    monkeypatch.setattr(recompute, "LEAST", least)
    torch.manual_seed(0)
    model = GPT(Config(50, **dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, context=tokens) | shape))
    if adapted:
        lora.add(model, 2, 4, "all")
    model.model.dtype, model.model.checkpointing = dtype, checkpointing
    ids, targets = torch.randint(50, (2, 2, tokens))
    loss = model(ids, targets, ends).mean()
    loss.backward(retain_graph=True)
    loss.backward()                                         # and a second one
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("options", [
    {}, dict(n_kv_head=4, n_layer=1), dict(qk_norm=False), dict(tied=True), dict(checkpointing=True),
    dict(adapted=True), dict(ends=torch.tensor([0, 90, 300, 600, 601, 1200])), dict(dtype=torch.bfloat16, n_embd=128),
    dict(tokens=400)], ids=str)
def test_gradients_are_the_same_to_the_bit(monkeypatch, options):
    kept, again = (gradients(least, monkeypatch, **options) for least in (NEVER, SOON))
    assert all(map(torch.equal, kept, again))


def peak(least, monkeypatch, checkpointing):
    monkeypatch.setattr(recompute, "LEAST", least)
    torch.manual_seed(0)
    model = GPT(Config(50, n_layer=4, n_head=1, n_embd=64, context=1024))
    ids, targets = torch.randint(50, (2, 4, 1024))
    model.model.checkpointing = checkpointing
    return bench.peak_memory(lambda: model(ids, targets).mean().backward(), torch.device("cpu"))


def test_training_needs_less_memory_and_blocks_that_are_computed_again_keep_nothing(monkeypatch):
    kept, again = (peak(least, monkeypatch, False) for least in (NEVER, SOON))
    assert again < 0.8 * kept
    kept, again = (peak(least, monkeypatch, True) for least in (NEVER, SOON))
    assert again <= kept


def test_what_several_products_want_is_computed_once(monkeypatch):
    monkeypatch.setattr(recompute, "LEAST", 0)
    calls = []

    def function(x):
        calls.append(1)
        return 2 * x
    x = torch.randn(3, 4, requires_grad=True)
    out = recompute.again(2 * x, function, x)
    with recompute.instead_of(out):
        results = [out @ torch.randn(4, 4, requires_grad=True) for _ in range(3)]
    sum(result.sum() for result in results).backward()
    assert len(calls) == 1 and out.recipe.found is None     # and is not held afterwards


def test_attention_keeps_no_rotated_heads(monkeypatch):
    monkeypatch.setattr(recompute, "LEAST", 0)
    q, k, v = torch.randn(3, 1, 600, 2, 16, requires_grad=True)
    angles = torch.randn(600, 1, 16)
    q, k = (rotate(x, angles.cos(), angles.sin()) for x in (q, k))
    attention(q, k, v)
    assert q.recipe.waiting == k.recipe.waiting == 1


def test_small_tensors_are_kept():
    gate = torch.randn(3, 4, requires_grad=True)
    assert not hasattr(swiglu(gate, gate), "recipe")
