"""Parameter groups, AdamW against torch's, Muon against a loop over matrices, and the schedules by their end points."""
import copy
import io
import math
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import optim
import record
from model import GPT, Config
from optim import lr_scale

RATES = dict(lr=0.004, matrix_lr=0.02, embed_lr=0.05, weight_decay=0.1, betas=(0.9, 0.95), momentum=0.9)


def tiny(tied=False):
    torch.manual_seed(0)
    model = GPT(Config(24, n_layer=2, n_head=2, n_kv_head=1, n_embd=8, n_hidden=20, context=8, tied=tied))
    for p in model.parameters():
        torch.nn.init.normal_(p)
    return model


def set_gradients(model, step):
    torch.manual_seed(1000 + step)
    for p in model.parameters():
        p.grad = torch.randn_like(p)


# --- groups ---

@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_exactly_one_group(optimizer, tied):
    model = tiny(tied)
    grouped = [id(p) for group in optim.build(model, optimizer, **RATES).param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else(tied):
    model = tiny(tied)
    muon, _ = optim.build(model, "muon", **RATES).optimizers
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    assert taken == {id(p) for name, p in model.named_parameters() if name.endswith("_proj.weight")}
    assert len(taken) == 2 * 7


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_frozen_parameters_are_left_out(optimizer):
    model = tiny()
    model.model.requires_grad_(False)
    groups = optim.build(model, optimizer, **RATES).optimizers[-1].param_groups
    assert [id(p) for group in groups for p in group["params"]] == [id(model.lm_head.weight)]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [False, True])
def test_decay_falls_on_matrices_and_neither_on_norms_nor_on_the_embedding(optimizer, tied):
    model = tiny(tied)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optim.build(model, optimizer, **RATES).step()
    for name, p in model.named_parameters():
        kept = 1.0
        if name.endswith("_proj.weight"):
            kept = 1 - 0.1 * (0.02 if optimizer == "muon" else 0.004)
        elif name == "lm_head.weight":
            kept = 1 - 0.1 * 0.004
        torch.testing.assert_close(p.detach(), kept * before[name], msg=name, rtol=1e-6, atol=0)


def test_embed_lr_of_0_means_lr():
    for embed_lr, expected in ((0.0, 0.004), (0.05, 0.05)):
        model = tiny()
        groups = optim.build(model, "muon", **RATES | dict(embed_lr=embed_lr)).param_groups
        embedding = [g for g in groups if any(p is model.model.embed_tokens.weight for p in g["params"])]
        assert [group["peak_lr"] for group in embedding] == [expected]


def test_an_unknown_optimizer_is_a_value_error():
    with pytest.raises(ValueError, match="'sgd'"):
        optim.build(tiny(), "sgd", **RATES)


# --- AdamW ---

@pytest.mark.parametrize("tied", [False, True])
def test_adamw_equals_torchs_step_by_step(tied):
    ours, theirs = tiny(tied), tiny(tied)
    updates = optim.build(ours, "adamw", **RATES)
    named = dict(theirs.named_parameters())
    reference = torch.optim.AdamW([
        dict(params=[p], lr=0.05 if "embed" in name and not tied else 0.004,
             weight_decay=0.1 if p.dim() == 2 and "embed" not in name else 0.0)
        for name, p in named.items()], betas=(0.9, 0.95), eps=1e-10, fused=False)
    for step in range(5):
        set_gradients(ours, step), set_gradients(theirs, step)
        updates.step(), reference.step()
        for name, p in ours.named_parameters():
            torch.testing.assert_close(p, named[name], atol=1e-6, rtol=1e-5, msg=f"{name}, step {step}")


# --- Muon ---

@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 12), (8, 8), (16, 16), (32, 33), (64, 64), (24, 96)])
def test_orthogonalise_gives_singular_values_near_1(shape):
    """Of every random matrix, but for square ones with a value that five iterations cannot lift."""
    torch.manual_seed(0)
    for size in (1e-4, 1.0, 1e6):
        matrices = size * torch.randn(40, *shape)
        values = torch.linalg.svdvals(optim.orthogonalise(matrices))
        assert values.max() < 1.3
        given = torch.linalg.svdvals(matrices)
        liftable = given.min(-1).values / given.norm(dim=-1) > 1 / 500
        assert liftable.any() and 0.6 < values[liftable].min()


@pytest.mark.parametrize("steps, smallest, near", [(4, 0.0101, 0.02), (5, 0.00101, 0.125)])
@pytest.mark.parametrize("shape", [(16, 16), (64, 64), (48, 100)])
def test_orthogonalise_keeps_the_singular_vectors_and_brings_every_value_to_1(shape, steps, smallest, near):
    torch.manual_seed(0)
    m, n = shape
    left, right = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0] for size in shape)
    right = right[:m]
    given = torch.logspace(math.log10(smallest), math.log10(0.3 / m ** 0.5), m, dtype=torch.float64)
    given[-1] = (1 - given[:-1].square().sum()).sqrt()                  # the Frobenius norm is 1
    result = left.t() @ optim.orthogonalise((left * given @ right).float()[None], steps)[0].double() @ right.t()
    assert 1 - near < result.diag().min() and result.diag().max() < 1 + near
    assert (result - torch.diag(result.diag())).abs().max() < 1e-3


@pytest.mark.parametrize("steps", [4, 5])
def test_orthogonalise_in_bf16_stays_near_1(steps):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(optim.orthogonalise(torch.randn(4, 24, 64), steps, torch.bfloat16).float())
    assert 0.6 < values.min() and values.max() < 1.3


def test_orthogonalise_of_a_batch_equals_one_by_one():
    torch.manual_seed(0)
    matrices = torch.randn(5, 12, 20) * torch.logspace(-3, 3, 5).view(5, 1, 1)
    one_by_one = torch.cat([optim.orthogonalise(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(optim.orthogonalise(matrices), one_by_one, atol=1e-5, rtol=1e-5)


def test_orthogonalise_of_zeros_is_zeros():
    assert not optim.orthogonalise(torch.zeros(2, 3, 5)).any()


def naive_muon_step(weight, gradient, average, lr, momentum, weight_decay, steps):
    """One matrix, Jordan et al. 2024: returns the new weight and the new average."""
    average = momentum * average + (1 - momentum) * gradient
    x = momentum * average + (1 - momentum) * gradient                  # Nesterov
    rows, columns = weight.shape
    x = optim.orthogonalise(x.t()[None], steps)[0].t() if rows > columns else optim.orthogonalise(x[None], steps)[0]
    scale = max(1.0, rows / columns) ** 0.5
    return weight * (1 - lr * weight_decay) - lr * scale * x, average


@pytest.mark.parametrize("steps", [4, 5])
def test_a_muon_step_equals_the_naive_one_matrix_by_matrix(steps):
    torch.manual_seed(0)
    shapes = [(5, 12), (12, 5), (8, 8), (5, 12), (8, 8), (12, 5), (3, 40)]      # wide, tall, square; some alike
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    expected = [(p.detach().clone(), torch.zeros(p.shape)) for p in params]
    muon = optim.Muon(params, lr=0.1, momentum=0.9, weight_decay=0.2, steps=steps)
    for _ in range(4):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            expected[i] = naive_muon_step(expected[i][0], p.grad, expected[i][1], 0.1, 0.9, 0.2, steps)
        muon.step()
        for p, (weight, _) in zip(params, expected):
            torch.testing.assert_close(p.detach(), weight, atol=1e-5, rtol=1e-4)


def test_an_unknown_number_of_muon_steps_is_a_value_error():
    with pytest.raises(ValueError, match="muon_steps.*got 3"):
        optim.build(tiny(), "muon", **RATES, muon_steps=3)


def test_a_muon_step_keeps_the_gradients():
    p = torch.nn.Parameter(torch.randn(4, 6))
    p.grad = torch.randn_like(p)
    before = p.grad.clone()
    optim.Muon([p], lr=0.1).step()
    assert torch.equal(p.grad, before)


def test_muon_skips_a_matrix_while_it_has_no_gradient():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
    muon = optim.Muon(params, lr=0.1)
    for missing in (None, 0, 2, None):
        before = [p.detach().clone() for p in params]
        for i, p in enumerate(params):
            p.grad = None if i == missing else torch.randn_like(p)
        muon.step()
        assert [torch.equal(p.detach(), b) for p, b in zip(params, before)] == [i == missing for i in range(3)]


# --- state ---

@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [False, True])
def test_steps_continued_from_a_saved_state_are_bitwise_equal(optimizer, tied):
    def steps(model, updates, numbers):
        for step in numbers:
            for group in updates.param_groups:
                group["lr"] = group["peak_lr"] / (step + 1)
            set_gradients(model, step)
            updates.step()
            updates.zero_grad()

    model = tiny(tied)
    updates = optim.build(model, optimizer, **RATES)
    steps(model, updates, range(3))
    file = io.BytesIO()
    torch.save(updates.state_dict(), file)
    file.seek(0)
    resumed = copy.deepcopy(model)
    resumed_updates = optim.build(resumed, optimizer, **RATES)
    resumed_updates.load_state_dict(torch.load(file, weights_only=True))
    steps(model, updates, range(3, 6))
    steps(resumed, resumed_updates, range(3, 6))
    for (name, a), b in zip(model.named_parameters(), resumed.parameters()):
        assert torch.equal(a, b), name


def test_zero_grad_drops_the_gradients():
    model = tiny()
    set_gradients(model, 0)
    optim.build(model, "muon", **RATES).zero_grad()
    assert all(p.grad is None for p in model.parameters())


# --- schedules ---

@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warmup_is_linear_and_ends_at_1(schedule):
    assert [lr_scale(step, 0.0, schedule, 4) for step in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert lr_scale(0, 0.0, schedule, 0) == 1.0


def test_wsd_stays_at_1_then_falls_linearly_to_final_at_the_end():
    for final in (0.0, 0.1):
        at = lambda progress: lr_scale(100, progress, "wsd", 10, decay_fraction=0.4, final=final)     # noqa: B023
        assert [at(progress) for progress in (0.0, 0.3, 0.6)] == pytest.approx([1, 1, 1])
        assert at(0.8) == pytest.approx((1 + final) / 2)
        assert at(0.9) == pytest.approx(final + (1 - final) / 4)
        assert at(1.0) == pytest.approx(final) == pytest.approx(at(1.5))


def test_cosine_is_halfway_in_the_middle_and_final_at_the_end():
    for final in (0.0, 0.2):
        at = lambda progress: lr_scale(100, progress, "cosine", 10, final=final)                      # noqa: B023
        assert [at(0.0), at(0.5), at(1.0), at(2.0)] == pytest.approx([1, (1 + final) / 2, final, final])
        assert at(0.25) == pytest.approx(final + (1 - final) * (1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("decay_fraction", [0.0, 0.3, 1.0])
def test_the_factor_never_exceeds_1_nor_falls_below_final_after_warmup(schedule, decay_fraction):
    scales = [lr_scale(step, step / 50, schedule, 7, decay_fraction, 0.05) for step in range(51)]
    assert all(0 < scale <= 1 for scale in scales) and min(scales[7:]) >= 0.05 - 1e-12
    assert all(a >= b - 1e-12 for a, b in zip(scales[7:], scales[8:]))


def test_progress_by_seconds_decides_the_decay_whatever_the_step():
    for step in (20, 500, 10**6):
        assert lr_scale(step, 45.0 / 60.0, "wsd", 10, 0.5) == pytest.approx(0.5)
        assert lr_scale(step, 30.0 / 60.0, "cosine", 10) == pytest.approx(0.5)


def test_an_unknown_schedule_is_a_value_error():
    with pytest.raises(ValueError, match="'linear'"):
        lr_scale(0, 0.0, "linear", 10)


# --- which updates to skip ---

def test_spikes_and_non_finite_norms_are_skipped_and_counted_and_too_many_stop_the_run():
    guard = optim.SpikeGuard(factor=10, patience=3)
    assert all(guard.accepts(2.0, 1.0 + i / 100) for i in range(30))
    assert not guard.accepts(float("nan"), 1.0) and not guard.accepts(2.0, float("inf"))
    assert guard.accepts(2.0, 9.0) and not guard.accepts(2.0, 50.0)
    assert guard.skipped == 3
    assert not guard.accepts(2.0, float("nan"))
    with pytest.raises(ValueError, match="3 updates in a row.*learning rate"):
        guard.accepts(2.0, float("nan"))


def test_the_spike_guard_continues_from_its_state():
    guard = optim.SpikeGuard(10, 5)
    for norm in [1.0] * 25 + [float("nan")]:
        guard.accepts(2.0, norm)
    again = optim.SpikeGuard(10, 5, **guard.state())
    assert again.skipped == 1 and again.row == 1 and not again.accepts(2.0, 11.0)


def a_step(model, updates, step, accepted=None):
    """One update, as the GPU decides on it: `accepted` None: it is not asked."""
    set_gradients(model, step)
    if accepted is False:
        for p in model.parameters():
            p.grad[0] = math.nan
    for optimizer in updates.optimizers:
        optimizer.found_inf = None if accepted is None else torch.tensor(float(not accepted))
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_update_that_a_gpu_refuses_leaves_no_trace_and_one_that_it_accepts_is_the_plain_one(optimizer):
    plain, asked = tiny(), tiny()
    updates = [optim.build(model, optimizer, **RATES) for model in (plain, asked)]
    before = [p.detach().clone() for p in asked.parameters()]
    assert all(map(torch.equal, a_step(asked, updates[1], 9, False), before))
    for step in range(3):
        expected = a_step(plain, updates[0], step)
        assert all(map(torch.equal, a_step(asked, updates[1], step, True), expected))
        assert all(map(torch.equal, a_step(asked, updates[1], 9, False), expected))


def test_a_refused_update_on_cpu_is_not_made():
    model = tiny()
    updates = optim.build(model, "muon", **RATES)
    set_gradients(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    updates.step(torch.tensor(False))
    assert all(map(torch.equal, model.parameters(), before)) and not updates.optimizers[0].state
    updates.step(torch.tensor(True))
    assert not any(map(torch.equal, model.parameters(), before))


def test_a_compiled_iteration_of_muon_gives_the_same(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda *a: function(*a) if dynamic is False else 0)
    one, two = tiny(), tiny()
    for model, compiled in (one, False), (two, True):
        updates = optim.build(model, "muon", **RATES, compiled=compiled)
        set_gradients(model, 0)
        updates.step()
    assert all(map(torch.equal, one.parameters(), two.parameters()))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_update_on_a_gpu_waits_for_nothing(monkeypatch, optimizer):
    """Tensors without content stand for a GPU's: whatever asks for a value, as .item() does, is an error."""
    monkeypatch.setattr(record, "after_copies", lambda device: SimpleNamespace(synchronize=None))
    monkeypatch.setattr(optim.Fetched, "values", lambda self: dict(row=0, loss=1.0, grad_norm=1.0, usual=1.0))
    model = tiny()
    with FakeTensorMode():
        for name, p in list(model.named_parameters()):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, torch.nn.Parameter(torch.empty(p.shape, device="cuda")))
        updates, guard = optim.build(model, optimizer, **RATES), optim.SpikeGuard(10, 3)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            accepted = guard.accepts(torch.empty((), dtype=torch.float64, device="cuda"), grad_norm)
            updates.step(accepted)
            updates.zero_grad()
        assert accepted.device.type == "cuda" and guard.waiting.event
        with pytest.raises(RuntimeError):                   # the test would notice
            bool(accepted)


def test_on_a_device_without_float64_an_update_is_decided_on_the_cpu(monkeypatch):
    monkeypatch.setattr(optim.Fetched, "values", lambda self: dict(row=0, loss=1.0, grad_norm=1.0, usual=1.0))
    with FakeTensorMode():
        grad_norm = torch.empty((), device="mps")
        accepted = optim.SpikeGuard(10, 3).accepts(torch.empty((), dtype=torch.float64), grad_norm)
        assert accepted.device.type == "cpu"


def test_on_a_gpu_too_many_refusals_stop_the_run_a_step_late(monkeypatch):
    import record

    class Slow(record.Fetched):                             # as if on its way from a GPU
        def __init__(self, named):
            super().__init__(named)
            self.event = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(optim, "Fetched", Slow)
    guard = optim.SpikeGuard(10, 2)
    assert not guard.accepts(math.nan, 1.0) and not guard.accepts(math.nan, 1.0)
    with pytest.raises(ValueError, match="2 updates in a row"):
        guard.accepts(2.0, 1.0)
