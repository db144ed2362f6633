"""Each kernel against a naive loop or formula in float64, in values and in gradients."""
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
import plain_attention
import plain_logprob
from kernels import attention, linear_logprob, rms_norm, rotate

IMPLS = ["plain", "sdpa", "auto"]


# --- attention ---

def naive_attention(q, k, v, cu_seqlens, window):
    """The definition, one query token at a time."""
    B, T, H, D = q.shape
    document = torch.zeros(B * T)
    for start in ([] if cu_seqlens is None else cu_seqlens.tolist()):
        document[start:] += 1
    document = document.view(B, T).tolist()
    head = [h // (H // k.size(2)) for h in range(H)]        # the key head of each query head
    out = []
    for b in range(B):
        for t in range(T):
            seen = [s for s in range(t + 1) if document[b][s] == document[b][t] and (not window or t - s < window)]
            keys, values = k[b, seen][:, head], v[b, seen][:, head]                     # (S, H, D)
            p = torch.softmax(torch.einsum("hd,shd->hs", q[b, t], keys) / D ** 0.5, -1)
            out.append(torch.einsum("hs,shd->hd", p, values))
    return torch.stack(out).view(B, T, H, D)


def random_qkv(B, T, groups, H=4, D=6, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(B, T, heads, D) for heads in (H, H // groups, H // groups)]


def random_documents(n_tokens, seed):
    """cu_seqlens of random documents, some of one token and one without any; they need not respect row ends."""
    torch.manual_seed(seed)
    cuts = torch.randint(0, n_tokens + 1, (n_tokens // 6,))
    cuts = torch.cat([cuts, cuts[:1] + 1, cuts[:1], torch.tensor([0, 1, n_tokens])]).clamp(max=n_tokens)
    return cuts.sort().values.int()


@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 17, 65])
def test_attention_equals_the_naive_loop_in_values_and_gradients(T, groups, documents, window):
    B = 2 if T == 65 else 3
    inputs = random_qkv(B, T, groups)
    cu_seqlens = random_documents(B * T, seed=T + groups) if documents else None
    upstream = torch.randn(B, T, 4, 6)
    exact = [x.double().requires_grad_() for x in inputs]
    expected = naive_attention(*exact, cu_seqlens, window)
    expected.backward(upstream.double())
    for impl in IMPLS:
        ours = [x.clone().requires_grad_() for x in inputs]
        out = attention(*ours, cu_seqlens, window, impl)
        out.backward(upstream)
        torch.testing.assert_close(out, expected.float(), atol=2e-6, rtol=1e-5)
        for x, y in zip(ours, exact):
            torch.testing.assert_close(x.grad, y.grad.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("T, kept", [(128, 512), (129, 512), (300, 512), (300, 0), (384, 0)])
@pytest.mark.parametrize("groups, window, documents", [(1, 0, False), (2, 0, False), (4, 40, False), (2, 0, True)])
def test_blocks_of_queries_equal_masked_attention_in_float64(monkeypatch, T, kept, groups, window, documents):
    monkeypatch.setattr(plain_attention, "KEPT", kept)                          # 0: probabilities are computed again
    inputs, upstream = random_qkv(2, T, groups), torch.randn(2, T, 4, 6)
    cu_seqlens = random_documents(2 * T, seed=T) if documents else None
    exact = [x.double().requires_grad_() for x in inputs]
    expected = attention(*exact, cu_seqlens, window, "sdpa")
    expected.backward(upstream.double())
    ours = [x.clone().requires_grad_() for x in inputs]
    out = attention(*ours, cu_seqlens, window, "plain")
    out.backward(upstream)
    torch.testing.assert_close(out, expected.float(), atol=2e-6, rtol=1e-5)
    for x, y in zip(ours, exact):
        torch.testing.assert_close(x.grad, y.grad.float(), atol=1e-5, rtol=1e-5)


def test_rows_in_bf16_of_more_than_one_block_are_near_the_exact_ones():
    inputs = [x.bfloat16() for x in random_qkv(1, 700, 2)]              # blocks of 256
    expected = attention(*(x.double() for x in inputs), impl="sdpa")
    torch.testing.assert_close(attention(*inputs, impl="plain").double(), expected, atol=2e-2, rtol=2e-2)


def test_long_rows_keep_no_probabilities_for_backward():
    def kept(T):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda _: None):
            attention(*(x.requires_grad_() for x in random_qkv(1, T, 1)), impl="plain")
        return max(sizes)
    assert kept(513) == 513 * 4 * 6 and kept(512) > 10 * kept(513)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("documents", [False, True])
def test_attention_in_bf16_is_near_the_exact_one(impl, documents):
    inputs = random_qkv(2, 33, 2)
    cu_seqlens = random_documents(66, 1) if documents else None
    out = attention(*(x.bfloat16() for x in inputs), cu_seqlens, 0, impl)
    assert out.dtype == torch.bfloat16
    expected = naive_attention(*(x.bfloat16().double() for x in inputs), cu_seqlens, 0)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("window", [0, 4])
def test_attention_does_not_depend_on_later_tokens(impl, window):
    inputs = random_qkv(2, 19, 2)
    before = attention(*inputs, None, window, impl)
    for x in inputs:
        x[:, 11:] = 100 * torch.randn_like(x[:, 11:])
    after = attention(*inputs, None, window, impl)
    torch.testing.assert_close(after[:, :11], before[:, :11], atol=1e-6, rtol=0)
    assert (after[:, 11:] - before[:, 11:]).abs().max() > 1


@pytest.mark.parametrize("impl", IMPLS)
def test_attention_does_not_depend_on_other_documents_nor_do_gradients_leak(impl):
    B, T = 2, 16
    cu_seqlens = torch.tensor([0, 5, 6, 21, 32], dtype=torch.int32)     # the third one goes over the end of row 0
    spans = [(0, 5), (5, 6), (6, 16), (16, 21), (21, 32)]
    inputs = random_qkv(B, T, 2)
    before = attention(*inputs, cu_seqlens, 0, impl).flatten(0, 1)
    for begin, end in spans:
        changed = [x.clone() for x in inputs]
        for x in changed:
            x.flatten(0, 1)[begin:end] += 10
            x.requires_grad_()
        after = attention(*changed, cu_seqlens, 0, impl).flatten(0, 1)
        others = torch.ones(B * T, dtype=torch.bool)
        others[begin:end] = False
        torch.testing.assert_close(after[others], before[others], atol=1e-6, rtol=0)
        assert (after[begin:end] - before[begin:end]).abs().max() > 1
        after[begin:end].square().sum().backward()
        assert all(not x.grad.flatten(0, 1)[others].any() for x in changed)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_document_per_row_is_plain_causal_attention(impl):
    inputs = random_qkv(3, 8, 1)
    cu_seqlens = torch.tensor([0, 8, 16, 24], dtype=torch.int32)
    torch.testing.assert_close(attention(*inputs, cu_seqlens, 0, impl), attention(*inputs, None, 0, impl))


@pytest.mark.parametrize("documents", [False, True])
def test_attention_trains_after_a_first_use_without_gradients(documents):
    inputs = random_qkv(1, 23, 2)                               # a length that nothing else has used
    cu_seqlens = random_documents(23, 0) if documents else None
    with torch.inference_mode():
        before = attention(*inputs, cu_seqlens)
    for x in inputs:
        x.requires_grad_()
    out = attention(*inputs, cu_seqlens)
    out.sum().backward()
    assert torch.equal(out, before) and all(x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("q, k, v", [
    ((2, 8, 4, 6), (1, 8, 2, 6), (1, 8, 2, 6)), ((2, 8, 4, 6), (2, 4, 2, 6), (2, 4, 2, 6)),
    ((2, 8, 4, 6), (2, 8, 2, 6), (2, 8, 1, 6)), ((2, 8, 4, 6), (2, 8, 2, 6), (2, 8, 2, 4)),
    ((2, 8, 4, 6), (2, 8, 2, 4), (2, 8, 2, 4)), ((2, 8, 3, 6), (2, 8, 2, 6), (2, 8, 2, 6))])
def test_attention_refuses_shapes_that_do_not_fit(q, k, v):
    for impl in IMPLS:
        with pytest.raises(ValueError, match="attention"):
            attention(torch.randn(q), torch.randn(k), torch.randn(v), impl=impl)


@pytest.mark.parametrize("offsets", [[0, 8], [1, 16], [0, 17], [0, 9, 5, 16], [-1, 16], [16], [0], []])
def test_attention_refuses_offsets_that_do_not_rise_from_0_to_all_tokens(offsets):
    for impl in IMPLS:
        with pytest.raises(ValueError, match="cu_seqlens"):
            attention(*random_qkv(2, 8, 2), torch.tensor(offsets, dtype=torch.int32), impl=impl)


def test_attention_takes_heads_that_lie_apart_in_memory():
    torch.manual_seed(0)
    wide, ends = torch.randn(2, 9, 4, 18), torch.tensor([0, 4, 9, 18])
    q = wide[..., :16]
    torch.testing.assert_close(attention(q, q, q, ends), attention(*[q.contiguous()] * 3, ends))


def test_attention_in_fp16_is_near_the_exact_one():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 40, 2, 16).half()
    exact = attention(q.double(), k.double(), v.double(), impl="sdpa")
    torch.testing.assert_close(attention(q, k, v, impl="plain").double(), exact, atol=4e-3, rtol=0)


def test_second_derivatives_are_refused_and_not_wrong():
    x = torch.randn(1, 4, 1, 8, requires_grad=True)
    for out in attention(x, x, x), rms_norm(x, torch.ones(8), 1e-6), kernels.swiglu(x, x):
        first, = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_attention_refuses_a_negative_window_and_an_unknown_impl():
    with pytest.raises(ValueError, match="window.*-1"):
        attention(*random_qkv(2, 8, 2), window=-1)
    with pytest.raises(ValueError, match="impl.*'flash'"):
        attention(*random_qkv(2, 8, 2), impl="flash")


# --- norm ---

def exact_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 16), (2, 3, 4, 6), (1, 1, 1)])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])
def test_rms_norm_equals_the_formula_in_values_and_gradients(shape, size):
    torch.manual_seed(0)
    x, weight, upstream = size * torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape)
    ours = (x.clone().requires_grad_(), weight.clone().requires_grad_())
    exact = (x.double().requires_grad_(), weight.double().requires_grad_())
    out, expected = rms_norm(*ours, 1e-5), exact_norm(*exact, 1e-5)
    out.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(out, expected.float())
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.grad, b.grad.float(), atol=1e-5 * max(1, b.grad.abs().max().item()), rtol=1e-5)


def test_rms_norm_passes_gradcheck():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-6), (x, weight))


def test_rms_norm_in_bf16_takes_its_statistics_in_fp32():
    torch.manual_seed(0)
    x, weight = (3 * torch.randn(4, 2048)).bfloat16(), torch.ones(2048)
    out = rms_norm(x, weight, 1e-6)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact_norm(x.double(), weight.double(), 1e-6), atol=0, rtol=1e-2)


# --- SwiGLU ---

def test_swiglu_is_the_formula_in_values_and_gradients_and_keeps_its_arguments_alone():
    torch.manual_seed(0)
    gate, up = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        out = kernels.swiglu(gate, up)
    torch.testing.assert_close(out, gate / (1 + (-gate).exp()) * up)
    assert sorted(kept) == sorted([gate.data_ptr(), up.data_ptr()])
    assert torch.autograd.gradcheck(kernels.swiglu, (gate, up))
    with torch.no_grad():
        before = gate.clone(), up.clone()
        torch.testing.assert_close(kernels.swiglu(gate, up), out)
        assert torch.equal(gate, before[0]) and torch.equal(up, before[1])


# --- rotary positions ---

def angles(T, D, dtype=torch.float64):
    """(T, 1, D) angles, the two halves alike."""
    frequency = 100.0 ** (-torch.arange(D // 2, dtype=dtype) / (D // 2))
    return (torch.arange(T, dtype=dtype)[:, None] * frequency).repeat(1, 2).unsqueeze(1)


@pytest.mark.parametrize("shape", [(2, 9, 3, 8), (1, 1, 1, 2), (3, 5, 2, 6)])
def test_rotate_is_a_product_of_complex_numbers_in_values_and_gradients(shape):
    torch.manual_seed(0)
    x, upstream, angle = torch.randn(shape), torch.randn(shape), angles(shape[1], shape[3])
    turn = torch.exp(1j * angle[..., :shape[3] // 2])

    def turned(x, turn):
        product = torch.complex(*x.double().chunk(2, -1)) * turn
        return torch.cat((product.real, product.imag), -1).float()

    before = x.clone()
    out = rotate(x.requires_grad_(), angle.cos().float(), angle.sin().float())
    out.backward(upstream)
    torch.testing.assert_close(out, turned(before, turn))
    torch.testing.assert_close(x.grad, turned(upstream, turn.conj()))       # turned back
    assert torch.equal(x, before)


def test_rotate_takes_tensors_that_are_not_contiguous():
    torch.manual_seed(0)
    x, angle = torch.randn(2, 3, 9, 8).transpose(1, 2), angles(9, 8, torch.float32)
    expected = rotate(x.contiguous(), angle.cos(), angle.sin())
    assert torch.equal(rotate(x, angle.cos(), angle.sin()), expected)


def test_the_product_of_rotated_vectors_depends_on_their_distance_alone():
    torch.manual_seed(0)
    angle = angles(12, 8)
    q, k = (rotate(torch.randn(8, dtype=torch.float64).expand(1, 12, 1, 8), angle.cos(), angle.sin())[0, :, 0]
            for _ in range(2))
    product = q @ k.t()
    for distance in range(-11, 12):
        diagonal = product.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


# --- linear_logprob ---

def exact_logprob(hidden, weight, targets, temperature):
    """Log-probabilities and entropies from all the logits."""
    logp = torch.log_softmax(hidden @ weight.t() / temperature, -1)
    ignored = targets == -100
    chosen = logp.gather(-1, targets.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return chosen.masked_fill(ignored, 0), -(logp.exp() * logp).sum(-1).masked_fill(ignored, 0)


def random_head(shape=(3, 11), C=8, V=37, seed=0):
    torch.manual_seed(seed)
    targets = torch.randint(0, V, shape)
    targets.view(-1)[::4] = -100
    return torch.randn(*shape, C), torch.randn(V, C), targets, torch.randn(shape)


def logprob_and_gradients(hidden, weight, targets, upstream, **options):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp = linear_logprob(hidden, weight, targets, **options)
    logp.backward(upstream)
    return logp.detach(), hidden.grad, weight.grad


@pytest.fixture(params=["one chunk", "many chunks", "many blocks", "a token each"])
def chunking(request, monkeypatch):
    rows, block = {"one chunk": (10**6, 10**6), "many chunks": (4, 10**6), "many blocks": (7, 3),
                   "a token each": (0, 0)}[request.param]
    monkeypatch.setattr(plain_logprob, "LOGIT_BYTES", rows * 4 * 37)
    monkeypatch.setattr(plain_logprob, "BLOCK_BYTES", block * 4 * 37)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("shape", [(3, 11), (1,), (2, 3, 5)])
def test_linear_logprob_equals_log_softmax_of_all_logits_for_any_upstream_gradient(chunking, shape, temperature):
    hidden, weight, targets, upstream = random_head(shape)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    expected, _ = exact_logprob(*exact, targets, temperature)
    expected.backward(upstream.double())
    logp, dhidden, dweight = logprob_and_gradients(hidden, weight, targets, upstream, temperature=temperature)
    assert logp.dtype == torch.float32 and logp.shape == shape
    torch.testing.assert_close(logp, expected.float(), atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(dhidden, exact[0].grad.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dweight, exact[1].grad.float(), atol=1e-5, rtol=1e-5)


def test_a_target_of_minus_100_gives_0_and_no_gradient_whatever_comes_from_above(chunking):
    hidden, weight, targets, upstream = random_head()
    ignored = targets == -100
    logp, dhidden, dweight = logprob_and_gradients(hidden, weight, targets, upstream)
    assert not logp[ignored].any() and not dhidden[ignored].any()
    upstream[ignored] = torch.nan
    hidden[ignored] = 50.0
    again = logprob_and_gradients(hidden, weight, targets, upstream)
    for a, b in zip(again, (logp, dhidden, dweight)):
        torch.testing.assert_close(a, b)


def test_a_batch_without_targets_gives_zeros_and_zero_gradients(chunking):
    hidden, weight, targets, upstream = random_head()
    assert not any(x.any() for x in logprob_and_gradients(hidden, weight, torch.full_like(targets, -100), upstream))


@pytest.mark.parametrize("shapes", [((5, 4), (9, 4), (3,)), ((2, 3, 4), (9, 4), (6,)), ((3, 5), (9, 4), (3,))])
def test_linear_logprob_refuses_shapes_that_do_not_fit(shapes):
    hidden, weight, targets = shapes
    with pytest.raises(ValueError, match="linear_logprob got hidden"):
        linear_logprob(torch.zeros(hidden), torch.zeros(weight), torch.zeros(targets, dtype=torch.long))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_linear_logprob_refuses_a_temperature_that_is_not_above_0(temperature):
    hidden, weight, targets, _ = random_head()
    with pytest.raises(ValueError, match="temperature=.* above 0"):
        linear_logprob(hidden, weight, targets, temperature)


@pytest.mark.parametrize("given, products", [((1, 1), 3), ((1, 0), 2), ((0, 1), 2)])
def test_a_gradient_that_nothing_wants_costs_no_product(given, products):
    hidden, weight, targets, upstream = random_head()
    hidden.requires_grad_(bool(given[0])), weight.requires_grad_(bool(given[1]))
    with FlopCounterMode(display=False) as counter:
        linear_logprob(hidden, weight, targets).backward(upstream)
    assert counter.get_total_flops() == products * 2 * hidden.numel() * len(weight)
    assert [hidden.grad is not None, weight.grad is not None] == [bool(x) for x in given]


@pytest.mark.parametrize("target", [-1, 37])
def test_a_target_outside_the_vocabulary_is_an_error(target):
    hidden, weight, targets, _ = random_head()
    targets[0, 1] = target
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        linear_logprob(hidden, weight, targets)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_equals_the_formula_and_carries_no_gradient(chunking, temperature):
    hidden, weight, targets, upstream = random_head()
    _, expected = exact_logprob(hidden.double(), weight.double(), targets, temperature)
    hidden.requires_grad_()
    logp, entropy = linear_logprob(hidden, weight, targets, temperature, want_entropy=True)
    torch.testing.assert_close(entropy, expected.float(), atol=1e-5, rtol=1e-5)
    assert not entropy.requires_grad
    logp.backward(upstream)
    _, dhidden, _ = logprob_and_gradients(hidden.detach(), weight, targets, upstream, temperature=temperature)
    torch.testing.assert_close(hidden.grad, dhidden)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_hits_are_the_targets_that_are_likeliest_of_all_logits_with_entropy_or_without(chunking, temperature):
    hidden, weight, targets, upstream = random_head()
    likeliest = (hidden @ weight.t()).argmax(-1)
    targets[0, 1:8:2], targets[2, 0] = likeliest[0, 1:8:2], likeliest[2, 0]
    expected = (likeliest == targets) & (targets != -100)
    assert 4 <= expected.sum() < (targets != -100).sum()
    hidden.requires_grad_()
    logp, hits = linear_logprob(hidden, weight, targets, temperature, want_hits=True)
    assert hits.dtype == torch.bool and torch.equal(hits, expected)
    both = linear_logprob(hidden, weight, targets, temperature, want_entropy=True, want_hits=True)
    entropy = linear_logprob(hidden, weight, targets, temperature, want_entropy=True)[1]
    assert len(both) == 3 and all(torch.equal(a, b) for a, b in zip(both, (logp, entropy, hits)))
    both[0].backward(upstream)
    _, dhidden, _ = logprob_and_gradients(hidden.detach(), weight, targets, upstream, temperature=temperature)
    torch.testing.assert_close(hidden.grad, dhidden)


def test_a_token_that_is_ignored_is_no_hit_though_id_0_be_the_likeliest(chunking):
    hidden, weight, targets, _ = random_head()
    weight[0] = 100 * hidden[0, 0]
    targets[0, 0] = -100
    logp, entropy, hits = linear_logprob(hidden, weight, targets, want_entropy=True, want_hits=True)
    assert (hidden @ weight.t())[0, 0].argmax() == 0 and not hits[0, 0] and entropy[0, 0] == logp[0, 0] == 0


def test_chunks_change_neither_values_nor_gradients(monkeypatch):
    head = random_head()
    expected = logprob_and_gradients(*head, temperature=0.9)
    for rows in (1, 2, 5, 32):
        monkeypatch.setattr(plain_logprob, "LOGIT_BYTES", rows * 4 * 37)
        for a, b in zip(logprob_and_gradients(*head, temperature=0.9), expected):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_second_backward_gives_the_same_gradients(chunking, temperature):
    hidden, weight, targets, upstream = random_head()
    hidden.requires_grad_(), weight.requires_grad_()
    logp = linear_logprob(hidden, weight, targets, temperature)
    value = logp.detach().clone()
    first = torch.autograd.grad(logp, (hidden, weight), upstream, retain_graph=True)
    second = torch.autograd.grad(logp, (hidden, weight), upstream, retain_graph=True)
    other = torch.autograd.grad(logp, (hidden, weight), 2 * upstream)
    for a, b, c in zip(first, second, other):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(2 * a, c)
    assert torch.equal(logp.detach(), value)


def test_linear_logprob_writes_into_none_of_its_arguments(chunking):
    head = random_head()
    before = [x.clone() for x in head]
    logprob_and_gradients(*head, temperature=0.7)
    assert all(torch.equal(a, b) for a, b in zip(head, before))


def test_the_logits_of_all_tokens_never_exist_at_once(monkeypatch):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes = [x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(x)]
            self.numel = max([self.numel, *sizes])
            return out

    N, V, rows = 64, 512, 8
    monkeypatch.setattr(plain_logprob, "LOGIT_BYTES", rows * 4 * V)
    head = random_head((N,), C=4, V=V)
    with Largest() as largest:
        logprob_and_gradients(*head)
    assert largest.numel <= rows * V


@pytest.mark.parametrize("wanted", [(False, False), (True, False), (True, True)])
def test_opcheck_of_what_a_compiler_sees(wanted):
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    torch.library.opcheck(plain_logprob.opaque_forward, (hidden, weight, torch.tensor([1, -100, 3]), 0.7, *wanted))


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_it_gives_the_same_and_no_graph_holds_the_logits_of_all_tokens(frozen):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    largest = []

    def look(graph, inputs):
        values = [node.meta.get("val") for node in graph.graph.nodes]
        largest.append(max(value.numel() for value in values if isinstance(value, torch.Tensor)))
        return make_boxed_func(graph.forward)

    N, V = 64, 128
    hidden, weight, targets, upstream = random_head((N,), C=4, V=V)
    head = hidden.requires_grad_(), weight.requires_grad_(not frozen)
    compiled = torch.compile(linear_logprob, backend=aot_autograd(fw_compiler=look), fullgraph=True)
    found, expected = (function(*head, targets, 0.7, want_hits=True) for function in (compiled, linear_logprob))
    assert torch.equal(found[1], expected[1])
    inputs = head[:1] if frozen else head
    for a, b in zip(*(torch.autograd.grad(columns[0], inputs, upstream) for columns in (found, expected))):
        torch.testing.assert_close(a, b)
    assert len(largest) == 2 and max(largest) < N * V / 8


def test_linear_logprob_in_bf16_is_near_the_exact_one(chunking):
    hidden, weight, targets, upstream = random_head()
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    expected, _ = exact_logprob(*exact, targets, 1.0)
    expected.backward(upstream.double())
    logp, dhidden, dweight = logprob_and_gradients(hidden, weight, targets, upstream)
    assert logp.dtype == torch.float32 and dhidden.dtype == dweight.dtype == torch.bfloat16
    torch.testing.assert_close(logp.double(), expected.detach(), atol=0.05, rtol=0.02)
    for a, b in zip((dhidden, dweight), exact):
        torch.testing.assert_close(a.double(), b.grad, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("impl", ["auto", "plain", "sdpa"])
def test_offsets_padded_to_a_power_of_two_change_nothing(impl):
    q, k, v = torch.randn(3, 2, 17, 2, 8)
    for cu_seqlens in (torch.tensor([0, 5, 17, 20, 34], dtype=torch.int32), torch.tensor([0, 34], dtype=torch.int32)):
        padded = kernels.pad_offsets(cu_seqlens)
        assert len(padded) == {5: 8, 2: 2}[len(cu_seqlens)] and padded.dtype == torch.int32
        torch.testing.assert_close(kernels.attention(q, k, v, padded, impl=impl),
                                   kernels.attention(q, k, v, cu_seqlens, impl=impl), atol=0, rtol=0)
        torch.testing.assert_close(kernels.bidirectional_attention(q, k, v, padded),
                                   kernels.bidirectional_attention(q, k, v, cu_seqlens), atol=0, rtol=0)
