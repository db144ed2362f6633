"""What tests/test_triton.py runs in a process of its own: the kernels in Triton's interpreter, which must be on before
they are imported."""
import functools
import os
import random

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

import kernels
import model as model_file
import triton_decode
import triton_kernels
import triton_logprob
from kernels import attention, decode_attention, linear_logprob, pad_offsets

CASES = [   # T, groups, documents, window, D
    (1, 1, None, 0, 64), (1, 2, [0, 1, 1, 2], 0, 64), (1, 4, None, 1, 64),
    (17, 1, None, 0, 64), (17, 2, [0, 1, 2, 9, 34], 0, 64), (17, 4, [0, 16, 17, 17, 33, 34], 5, 64),
    (17, 1, None, 1, 128),
    (128, 1, None, 0, 64), (128, 2, None, 0, 128), (128, 4, [0, 127, 256], 100, 64),
    (130, 1, [0, 1, 130, 200, 260], 0, 64), (130, 2, None, 129, 64), (130, 4, None, 0, 128), (130, 1, None, 2, 64),
    (257, 1, None, 0, 64), (257, 2, None, 150, 64), (257, 4, [0, 1, 3, 200, 514], 0, 64), (257, 1, None, 200, 128),
    (257, 2, [0, 256, 257, 514, 514, 514], 64, 64), (257, 4, None, 33, 64)]
chance = random.Random(0)
for T in (9, 70, 131, 131):
    cuts = chance.choices(range(2 * T + 1), k=T // 8)           # twice the same: an empty document
    CASES.append((T, chance.choice([1, 2, 4]), sorted([0, *cuts, 2 * T]), chance.choice([0, 1, 30, 100]), 64))


def random_qkv(B, T, groups, D, dtype=torch.float32):
    torch.manual_seed(T + groups)
    heads = max(2, groups)
    return [torch.randn(B, T, n, D, dtype=dtype).requires_grad_() for n in (heads, heads // groups, heads // groups)]


def exact_attention(q, k, v, cu_seqlens, window):
    """In float64, by the definition."""
    B, T, H, D = q.shape
    allowed = kernels.visible(B, T, cu_seqlens, window, q.device)
    k, v = (x.repeat_interleave(H // x.size(2), 2) for x in (k, v))
    logits = torch.einsum("bthd,bshd->bhts", q, k) / D ** 0.5
    return torch.einsum("bhts,bshd->bthd", logits.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("T, groups, documents, window, D", CASES)
def test_attention_and_its_gradients_equal_float64(T, groups, documents, window, D):
    B = 2 if documents or T < 100 else 1
    ours = random_qkv(B, T, groups, D)
    exact = [x.detach().double().requires_grad_() for x in ours]
    cu_seqlens = torch.tensor(documents, dtype=torch.int32) if documents else None
    out, expected = attention(*ours, cu_seqlens, window, "triton"), exact_attention(*exact, cu_seqlens, window)
    upstream = torch.randn(out.shape)
    out.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    for x, y in zip(ours, exact):
        torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("groups, window", [(1, 0), (2, 70)])
def test_the_smaller_tiles_of_ampere_give_the_same(monkeypatch, groups, window):
    inputs, cu_seqlens = random_qkv(1, 257, groups, 128), torch.tensor([0, 1, 90, 257])

    def results():
        out = attention(*inputs, cu_seqlens, window, "triton")
        return out, *torch.autograd.grad(out.square().sum(), inputs)
    hopper = results()
    monkeypatch.setitem(triton_kernels.CONFIGS, 90, triton_kernels.CONFIGS[80])
    for x, y in zip(results(), hopper):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_log_sum_exps_are_those_of_float64():
    q, k, v = (x.detach() for x in random_qkv(1, 130, 1, 64))
    lse = triton_kernels.attention_forward(q, k, v, None, 0)[1]                         # (H, N)
    logits = torch.einsum("bthd,bshd->bhts", q.double(), k.double()) / 8
    expected = logits.masked_fill(~kernels.visible(1, 130, None, 0, q.device), -torch.inf).logsumexp(-1)[0]
    torch.testing.assert_close(lse.double(), expected, atol=2e-6, rtol=1e-6)


def test_attention_in_bf16_is_near_float64():
    inputs = random_qkv(1, 40, 2, 64, torch.bfloat16)
    out = attention(*inputs, None, 7, "triton")
    assert out.dtype == torch.bfloat16
    expected = exact_attention(*(x.double() for x in inputs), None, 7)
    torch.testing.assert_close(out.double(), expected, atol=1e-2, rtol=1e-2)


def test_attention_takes_tensors_that_lie_in_any_order_and_an_upstream_gradient_that_is_expanded():
    inputs = random_qkv(2, 9, 2, 64)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    want = torch.autograd.grad(attention(*inputs, None, 0, "triton").sum(), inputs)
    got = torch.autograd.grad(attention(*strided, None, 0, "triton").sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_gradients_repeat_to_the_bit():
    inputs, cu_seqlens = random_qkv(1, 130, 2, 64), torch.tensor([0, 50, 130])
    runs = [torch.autograd.grad(attention(*inputs, cu_seqlens, 0, "triton").square().sum(), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_padding_the_offsets_changes_nothing():
    inputs, cu_seqlens = random_qkv(2, 17, 1, 64), torch.tensor([0, 5, 34], dtype=torch.int32)
    padded = pad_offsets(cu_seqlens, 12)
    assert padded.shape == (12,) and padded.dtype == torch.int32
    assert torch.equal(attention(*inputs, cu_seqlens, 0, "triton"), attention(*inputs, padded, 0, "triton"))
    with pytest.raises(ValueError, match="3 offsets, more than the maximum of 2"):
        pad_offsets(cu_seqlens, 2)


def test_the_tile_table_covers_every_token_once_within_its_document_and_row():
    torch.manual_seed(0)
    for B, T in (1, 700), (3, 257), (5, 1):
        cuts = torch.randint(0, B * T + 1, (9,))
        offsets = torch.cat([torch.tensor([0, B * T]), cuts]).sort().values.int()
        table = triton_kernels.tile_table(offsets, B, T).tolist()
        ends = sorted({*offsets.tolist(), *range(0, B * T + 1, T)})
        tokens = []
        for first, start, end in table:
            covered = range(first, min(end, first + triton_kernels.BLOCK))
            assert not covered or (start, end) in zip(ends, ends[1:])
            tokens += covered
        assert sorted(tokens) == list(range(B * T))


@pytest.mark.parametrize("offsets", [[0, 9, 5, 34], [1, 34], [0, 33], [0, 40]])
def test_offsets_that_do_not_fit_are_refused(offsets):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to B\\*T = 34"):
        attention(*random_qkv(2, 17, 1, 64), torch.tensor(offsets), 0, "triton")


def test_what_the_kernels_do_not_take_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="head width must be 64 or 128, got 32"):
        attention(*random_qkv(1, 4, 1, 32), None, 0, "triton")
    with pytest.raises(ValueError, match="dtype must be bfloat16, float16 or float32, got torch.float64"):
        attention(*random_qkv(1, 4, 1, 64, torch.float64), None, 0, "triton")
    with pytest.raises(ValueError, match="window must be 0"):
        attention(*random_qkv(1, 4, 1, 64), None, -1, "triton")
    with pytest.raises(ValueError, match="impl must be auto, plain, sdpa or triton, got 'trition'"):
        linear_logprob(torch.zeros(1, 4), torch.zeros(5, 4), torch.zeros(1, dtype=torch.long), impl="trition")


def test_auto_never_means_triton_on_cpu(monkeypatch):
    monkeypatch.setattr(triton_kernels, "launch", None)
    monkeypatch.setattr(triton_logprob, "chunks", None)
    attention(*random_qkv(1, 4, 1, 64), torch.tensor([0, 2, 4]), 0)
    linear_logprob(torch.zeros(1, 4), torch.zeros(5, 4), torch.zeros(1, dtype=torch.long))


# --- decoding ---

def random_cache(groups, D=64, S=600):
    torch.manual_seed(groups)
    return torch.randn(3, 1, 2 * groups, D), torch.randn(3, 2, S, D), torch.randn(3, 2, S, D)


@pytest.mark.parametrize("groups, D, start, window", [(1, 64, False, 0), (2, 64, True, 40), (4, 128, True, 0),
                                                      (4, 64, False, 300)])
def test_decoding_equals_float64(groups, D, start, window):
    q, k, v = random_cache(groups, D)
    lengths, start = torch.tensor([1, 257, 600]), torch.tensor([0, 130, 5]) if start else None
    out = decode_attention(q, k, v, lengths, start, window, impl="triton")
    expected = decode_attention(q.double(), k.double(), v.double(), lengths, start, window)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)


def test_a_row_without_keys_gives_zeros_and_contents_beyond_its_length_do_not_matter():
    q, k, v = random_cache(2)
    lengths, start = torch.tensor([0, 9, 300]), torch.tensor([0, 9, 3])
    before = decode_attention(q, k, v, lengths, start, impl="triton")
    assert not before[:2].any() and before[2].any()
    k[2, :, 300:], v[2, :, 300:] = float("nan"), float("inf")
    assert torch.equal(decode_attention(q, k, v, lengths, start, impl="triton"), before)


@pytest.mark.parametrize("window", [0, 70])
def test_a_row_decodes_alone_as_in_a_batch_to_the_bit(window):
    q, k, v = random_cache(4)
    lengths = torch.tensor([530, 257, 600])
    batch = decode_attention(q, k, v, lengths, None, window, impl="triton")
    for i, n in enumerate(lengths.tolist()):
        alone = decode_attention(q[i:i + 1], k[i:i + 1, :, :n], v[i:i + 1, :, :n], lengths[i:i + 1], None, window,
                                 impl="triton")
        assert torch.equal(alone[0], batch[i])
        padded = [torch.nn.functional.pad(x[i:i + 1, :, :n], (0, 0, 37, 0)) for x in (k, v)]    # on the left
        moved = decode_attention(q[i:i + 1], *padded, lengths[i:i + 1] + 37, torch.tensor([37]), window, impl="triton")
        assert torch.equal(moved[0], batch[i])


# --- log-probabilities ---

@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("N, V, per_chunk", [(7, 5001, 3), (1, 2, 1), (5, 2048, 8)])
def test_log_probabilities_entropies_and_gradients_equal_float64(monkeypatch, N, V, per_chunk, temperature):
    monkeypatch.setattr(triton_logprob, "LOGIT_BYTES", 4 * V * per_chunk)
    torch.manual_seed(V)
    hidden, weight = torch.randn(N, 16, requires_grad=True), torch.randn(V, 16, requires_grad=True)
    targets, upstream = torch.randint(V, (N,)), torch.randn(N)
    targets[N // 2] = -100
    likeliest = (hidden @ weight.t()).argmax(-1)
    targets[0] = likeliest[0] if N > 1 else targets[0]
    logp, entropy, hits = linear_logprob(hidden, weight, targets, temperature, True, True, impl="triton")
    assert hits.dtype == torch.bool and torch.equal(hits, likeliest == targets) and (N == 1 or hits[0])
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    all_logp = (exact[0] @ exact[1].t() / temperature).log_softmax(-1)
    kept = targets != -100
    expected = all_logp.gather(-1, targets.clamp_min(0)[:, None])[:, 0] * kept
    torch.testing.assert_close(logp.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), -(all_logp.exp() * all_logp).sum(-1) * kept, atol=4e-5, rtol=1e-5)
    for x, y in zip(torch.autograd.grad(logp, (hidden, weight), upstream),
                    torch.autograd.grad(expected, exact, upstream.double())):
        torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=1e-5)


def test_a_gradient_that_nothing_wants_costs_no_product(monkeypatch):
    mm, outs = torch.mm, []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: outs.append(out.shape) or mm(a, b, out=out))
    hidden, weight = torch.randn(3, 8), torch.randn(9, 8, requires_grad=True)
    linear_logprob(hidden, weight, torch.tensor([1, 2, 3]), impl="triton").sum().backward()
    assert set(outs) == {(3, 9)} and weight.grad.any()          # logits, and no gradient of hidden


def test_a_second_backward_pass_repeats_the_first_and_a_frozen_head_gets_no_gradient():
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(9, 8)
    logp = linear_logprob(hidden, weight, torch.tensor([1, 2, 3]), impl="triton")
    first, = torch.autograd.grad(logp.sum(), hidden, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(logp.sum(), hidden)[0])


def test_of_equal_logits_the_first_is_the_likeliest_and_an_ignored_target_is_no_hit():
    hidden, weight = torch.ones(5, 16), torch.zeros(5000, 16)
    weight[[7, 2055, 4103]] = 1.0                           # columns that fall to one lane of the kernel
    weight[3000] = 1.0
    targets = torch.tensor([7, 2055, 3000, 0, -100])
    for want_entropy in False, True:
        found = linear_logprob(hidden, weight, targets, 1.0, want_entropy, True, impl="triton")
        assert found[-1].tolist() == [True, False, False, False, False] and len(found) == 2 + want_entropy


def test_a_target_beyond_the_vocabulary_is_not_looked_up():
    logp = linear_logprob(torch.ones(2, 4), torch.ones(5, 4), torch.tensor([7, 1]), impl="triton")
    assert logp[0].isnan() and logp[1].isfinite()


# --- as torch operators ---

def test_opcheck():
    q, k, v = random_qkv(1, 9, 2, 64)
    tiles = triton_kernels.tile_table(torch.tensor([0, 4, 9]), 1, 9)
    torch.library.opcheck(triton_kernels.tile_table, (torch.tensor([0, 4, 9]), 1, 9))
    torch.library.opcheck(triton_kernels.attention_forward, (q, k, v, tiles, 0))
    torch.library.opcheck(triton_kernels.attention_forward, (q, k, v, None, 3))
    out, lse = triton_kernels.attention_forward(*(x.detach() for x in (q, k, v)), None, 3)
    torch.library.opcheck(triton_kernels.attention_backward,
                          (out, *(x.detach() for x in (q, k, v)), out, lse, None, 3))
    q, k, v = random_cache(2, S=9)
    torch.library.opcheck(triton_decode.decode, (q, k, v, torch.tensor([1, 5, 9]), None, 0))
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    for wanted in (False, False), (True, False), (True, True):
        torch.library.opcheck(triton_logprob.logprob_forward,
                              (hidden, weight, torch.tensor([1, -100, 3]), 0.7, *wanted))


@pytest.fixture
def gpt(monkeypatch):
    """A model that computes with the kernels, and a function that makes it compute with torch."""
    for name in "attention", "linear_logprob":
        monkeypatch.setattr(model_file, name, functools.partial(getattr(kernels, name), impl="triton"))
    torch.manual_seed(0)
    gpt = model_file.GPT(model_file.Config(50, n_layer=2, n_head=2, n_kv_head=1, n_embd=128, context=16))
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return gpt


def packed_batch(offsets):
    ids = torch.randint(50, (2, 17))
    targets = ids[:, 1:].clone()
    targets[0, 3] = -100
    return ids[:, :-1], targets, pad_offsets(torch.tensor(offsets, dtype=torch.int32), 8)


def loss_and_gradients(gpt, batch):
    gpt.zero_grad()
    loss = gpt(*batch)
    loss.sum().backward()
    return loss.detach(), [p.grad.clone() for p in gpt.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_models_loss_and_gradients_equal_the_references(gpt, monkeypatch, checkpointing):
    gpt.model.checkpointing = checkpointing
    batch = packed_batch([0, 5, 6, 20, 32])
    loss, gradients = loss_and_gradients(gpt, batch)
    monkeypatch.setattr(model_file, "attention", kernels.attention)
    monkeypatch.setattr(model_file, "linear_logprob", kernels.linear_logprob)
    expected, expected_gradients = loss_and_gradients(gpt, batch)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for x, y in zip(gradients, expected_gradients):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-4)


def test_a_model_trains_under_ddp_as_alone(gpt):
    from torch.distributed._composable.replicate import replicate
    batch = packed_batch([0, 5, 6, 20, 32])
    loss, gradients = loss_and_gradients(gpt, batch)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        again, averaged = loss_and_gradients(replicate(gpt), batch)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(again, loss) and all(map(torch.equal, averaged, gradients))


def test_a_model_compiles_to_one_graph_without_breaks_whatever_its_documents_and_learning_rate(gpt):
    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager
        graphs.append(graph)
        return aot_eager(graph, inputs)
    compiled = torch.compile(gpt, backend=backend, fullgraph=True, dynamic=False)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-3)
    for lr, offsets in (1e-3, [0, 5, 32]), (5e-4, [0, 1, 2, 9, 16, 32]), (1e-4, [0, 32]):
        batch = packed_batch(offsets)
        expected, gradients = loss_and_gradients(gpt, batch)
        loss, compiled_gradients = loss_and_gradients(compiled, batch)
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
        for x, y in zip(compiled_gradients, gradients):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    assert len(graphs) == 1
