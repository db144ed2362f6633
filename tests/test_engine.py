"""Cached generation equals uncached; log-probabilities equal recomputed ones; neighbours change nothing."""
import gc
import math
import random
import weakref

import numpy as np
import pytest
import torch

import decoder
import engine
from kernels import attention, decode_attention, linear, linear_logprob, rms_norm
from model import GPT, Config
from tokenizer import Tokenizer

VOCAB, EOS, PAD = 96, 0, 1


def tiny(seed=0, std=0.3, **changes):
    torch.manual_seed(seed)
    shape = dict(vocab_size=VOCAB, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48, context=64, eos_id=EOS,
                 pad_id=PAD)
    model = GPT(Config(**shape | changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=std)
    return model


def ragged(count, longest=30, seed=0):
    pick = random.Random(seed)
    return [[pick.randrange(2, VOCAB) for _ in range(pick.randint(1, longest))] for _ in range(count)]


@torch.no_grad()
def next_logits(model, ids):
    """Of the model without a cache, the padding token banned as in the engine."""
    logits = model.logits(model.forward_hidden(torch.tensor([ids]))[0, -1:])
    logits[:, model.config.pad_id] = -torch.inf
    return logits


def greedy(model, prompt, n_tokens, stop=(EOS,)):
    ids = list(prompt)
    for _ in range(n_tokens):
        ids.append(next_logits(model, ids).argmax().item())
        if ids[-1] in stop:
            break
    return ids[len(prompt):]


# --- cached equals uncached ---

@pytest.mark.parametrize("changes", [{}, dict(qk_norm=False, n_kv_head=4, tied=True), dict(n_kv_head=1)])
def test_cached_greedy_equals_uncached_greedy_on_ragged_prompts(changes):
    model, prompts = tiny(**changes), ragged(200 if not changes else 40)
    samples = engine.generate(model, prompts, max_new_tokens=8, temperature=0, max_batch=24)
    assert [sample.tokens for sample in samples] == [greedy(model, prompt, 8) for prompt in prompts]
    assert [sample.prompt for sample in samples] == list(range(len(prompts)))


def test_logits_of_every_step_equal_the_uncached_ones(monkeypatch):
    model, prompts, seen = tiny(), ragged(30), []
    sample = engine.Sampler.__call__

    def spy(self, logits, rows):
        seen.extend((list(row.ids), logits[i].clone()) for i, row in enumerate(rows))
        return sample(self, logits, rows)
    monkeypatch.setattr(engine.Sampler, "__call__", spy)
    engine.generate(model, prompts, 2, max_new_tokens=12, max_batch=8, seed=3)
    assert len(seen) > 400
    for ids, logits in seen:
        expected = model.logits(model.forward_hidden(torch.tensor([ids]))[0, -1])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.fixture
def captures(monkeypatch):
    """What steps gave as they were captured, as if decoding were on CUDA."""
    captures = []
    monkeypatch.setattr(decoder, "captured", lambda step, device: captures.append(step()) or step)

    class Bucketed(decoder.Cache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.buckets = {}
    monkeypatch.setattr(engine, "Cache", Bucketed)
    return captures


SAMPLINGS = [dict(temperature=0), dict(temperature=0.8, top_k=9, top_p=0.9),
             dict(temperature=1.0, repetition_penalty=1.2)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_decoding_in_padded_buckets_over_the_whole_cache_is_the_same(request, sampling):
    """What a CUDA graph does: capturing runs the step with its sampling, but for a penalty, which looks at all ids; a
    replay computes a power of four of rows, or all, and all columns."""
    model, prompts = tiny(context=600), ragged(21)
    options = dict(max_new_tokens=300, max_batch=11, seed=1, stop=(), **sampling)
    expected = engine.generate(model, prompts, **options)
    captures = request.getfixturevalue("captures")
    got = engine.generate(model, prompts, **options)
    assert [len(found) for found in captures] == [11]           # nothing grows meanwhile
    assert captures[0].size(1) == (VOCAB if "repetition_penalty" in sampling else 2)
    assert [s.tokens for s in got] == [s.tokens for s in expected]
    for a, b in zip(got, expected):
        assert a.logp == pytest.approx(b.logp, abs=1e-5)


def test_graphs_are_few_as_rows_leave_and_serve_later_calls_with_what_they_read(captures):
    model, prompts, options = tiny(context=64), ragged(21), dict(max_new_tokens=40, stop=(3, 4, 5, 6), seed=1)
    cache = engine.Cache(model, conversation=False)
    first = engine.generate(None, prompts, cache=cache, **options)
    assert len({len(sample.tokens) for sample in first}) > 8
    assert [len(found) for found in captures] == [21, 16, 4]
    read = [weakref.ref(sampler.banned) for _, _, sampler in cache.buckets.values()]
    gc.collect()
    assert all(ref() is not None for ref in read)
    again = engine.generate(None, prompts, cache=cache, **options)
    assert len(captures) == 3 and [s.tokens for s in again] == [s.tokens for s in first]


def test_a_conversation_doubles_the_memory_that_graphs_read(captures):
    model = tiny(context=2048)
    cache = engine.Cache(model)
    for length in (5, 300, 700, 900):
        engine.generate(None, [list(range(3, 8)) * (length // 5)], cache=cache, max_new_tokens=2, stop=())
    assert cache.kv.size(4) == 1024 and len(captures) == 3


def test_a_decoder_in_bf16_computes_what_the_model_does_and_leaves_it_alone():
    model = tiny()
    model.model.dtype = torch.bfloat16
    before, ids = [p.clone() for p in model.parameters()], torch.tensor([[5, 6, 7, 8]])
    twin = decoder.Decoder(model)
    assert twin.head.dtype == torch.bfloat16
    positions = torch.arange(4).expand(1, 4)
    with torch.inference_mode():
        hidden = twin.forward(ids, positions, lambda layer, q, k, v: attention(q, k, v))
    torch.testing.assert_close(hidden, model.forward_hidden(ids), atol=0.06, rtol=0.02)
    assert len(engine.generate(model, [[5, 6]], max_new_tokens=4, stop=())[0].tokens) == 4
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


# --- log-probabilities ---

@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_log_probabilities_equal_those_of_the_training_kernel(temperature):
    model, prompts = tiny(pad_id=None), ragged(20)
    for sample in engine.generate(model, prompts, 2, max_new_tokens=12, temperature=temperature, seed=4, max_batch=7):
        prompt = prompts[sample.prompt]
        ids = torch.tensor([prompt + sample.tokens])
        hidden = model.forward_hidden(ids[:, :-1])[:, len(prompt) - 1:]
        expected = linear_logprob(hidden, model.lm_head.weight, ids[:, len(prompt):], temperature)[0]
        torch.testing.assert_close(torch.tensor(sample.logp), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("filters", [dict(top_k=5), dict(top_p=0.8), dict(min_p=0.1), dict(repetition_penalty=1.3),
                                     dict(top_k=9, top_p=0.7, min_p=0.05), dict(top_k=1)])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_log_probabilities_are_renormalised_over_what_transformers_keeps(filters, temperature):
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )
    model, prompts = tiny(std=0.2), ragged(12)
    steps = [RepetitionPenaltyLogitsProcessor(filters.get("repetition_penalty", 1.0)),
             TemperatureLogitsWarper(temperature)]
    for name, kind in ("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper):
        if name in filters:
            steps.append(kind(filters[name]))
    for sample in engine.generate(model, prompts, max_new_tokens=8, temperature=temperature, seed=5, **filters):
        ids = list(prompts[sample.prompt])
        for token, logp in zip(sample.tokens, sample.logp):
            logits = next_logits(model, ids)
            for step in steps:
                logits = step(torch.tensor([ids]), logits)
            expected = torch.log_softmax(logits, -1)[0, token].item()
            assert np.isfinite(expected) and logp == pytest.approx(expected, abs=1e-5)
            ids.append(token)


@pytest.mark.parametrize("filters", [{}, dict(top_p=0.5, top_k=3, min_p=0.2)])
def test_greedy_reports_the_models_own_log_probability(filters):
    model = tiny()
    [sample] = engine.generate(model, [[5, 6]], max_new_tokens=1, temperature=0, **filters)
    logp = torch.log_softmax(next_logits(model, [5, 6]), -1)
    assert sample.logp == pytest.approx([logp.max().item()], abs=1e-6)


# --- randomness ---

def test_a_rows_samples_do_not_depend_on_its_neighbours_or_on_max_batch():
    model, prompts = tiny(std=0.2), ragged(12)
    options = dict(max_new_tokens=10, seed=7, temperature=1.0)
    together = [s.tokens for s in engine.generate(model, prompts, 3, **options)]
    assert together == [s.tokens for s in engine.generate(model, prompts, 3, max_batch=4, **options)]
    alone = [s.tokens for prompt in prompts for s in engine.generate(model, [prompt], 3, **options)]
    assert together == alone
    assert together != [s.tokens for s in engine.generate(model, prompts, 3, **options | dict(seed=8))]


def test_the_samples_of_a_prompt_differ_and_a_prompt_given_twice_counts_on():
    model = tiny(std=0.2)
    many = [tuple(s.tokens) for s in engine.generate(model, [[5, 6]], 20, max_new_tokens=12)]
    assert len(set(many)) > 15
    twice = engine.generate(model, [[5, 6], [5, 6]], 10, max_new_tokens=12)
    assert [tuple(s.tokens) for s in twice] == many


def test_samples_follow_the_distribution():
    model = tiny(std=0.1)
    samples = engine.generate(model, [[5, 6, 7]], 4000, max_new_tokens=1, temperature=0.9, max_batch=2000)
    counts = torch.bincount(torch.tensor([s.tokens[0] for s in samples]), minlength=VOCAB)
    p = torch.softmax(next_logits(model, [5, 6, 7]) / 0.9, -1)[0]
    likely = p * 4000 > 5
    chi2 = ((counts - p * 4000)[likely] ** 2 / (p * 4000)[likely]).sum()
    assert chi2 < likely.sum() + 5 * (2 * likely.sum()) ** 0.5
    assert counts[PAD] == 0


def test_uniform_numbers_are_uniform_and_repeat():
    u = engine.uniforms(torch.arange(1000).repeat(20), torch.arange(20000) // 1000)
    assert 0 <= u.min() and u.max() < 1 and u.dtype == torch.float32
    assert torch.histc(u, 20, 0, 1).sub(1000).abs().max() < 6 * 1000 ** 0.5
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03
    assert torch.equal(u[:5], engine.uniforms(torch.arange(5), torch.zeros(5, dtype=torch.long)))
    assert len(set(u.tolist())) > 19950                     # of 2^24 and more numbers


def test_uniform_numbers_are_splitmix64s():
    def splitmix64(state):                                  # with Python's integers, which have no end
        z = (state + 0x9E3779B97F4A7C15) % 2 ** 64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2 ** 64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2 ** 64
        return z ^ z >> 31
    assert splitmix64(0) == 0xE220A8397B1DCDAF              # of the published generator seeded with 0
    for key, count in (0, 0), (5, 3), (2 ** 63 - 1, 7), (123456789123456789, 10 ** 6):
        expected = (splitmix64((key + count * 0x9E3779B97F4A7C15) % 2 ** 64) >> 11) * 2.0 ** -53
        assert engine.uniforms(torch.tensor([key]), torch.tensor([count])).item() == pytest.approx(expected, abs=1e-7)


def test_the_padding_token_is_never_sampled_however_likely():
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight.zero_()                     # every logit is 0 ...
        samples = engine.generate(model, ragged(20), 50, max_new_tokens=10, stop=())
    tokens = {token for sample in samples for token in sample.tokens}
    assert tokens == set(range(VOCAB)) - {PAD}              # ... and every other token turns up
    assert samples[0].logp == pytest.approx([-math.log(VOCAB - 1)] * 10, abs=1e-5)


@pytest.mark.parametrize("pad_id, sampled", [(None, True), (EOS, True), (5000, True), (-1, True), (PAD, False)])
def test_only_a_padding_token_of_its_own_is_banned(pad_id, sampled):
    model = tiny(pad_id=pad_id)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    samples = engine.generate(model, [[5]], 300, max_new_tokens=10, stop=(), max_batch=300)
    tokens = {token for sample in samples for token in sample.tokens}
    assert tokens == set(range(VOCAB)) - (set() if sampled else {PAD})


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-3])
def test_a_tiny_temperature_is_nearly_greedy(temperature):
    model, prompts = tiny(), ragged(10)
    samples = engine.generate(model, prompts, max_new_tokens=4, temperature=temperature)
    assert [s.tokens for s in samples] == [greedy(model, prompt, 4) for prompt in prompts]


def test_a_cache_serves_one_stream_at_a_time():
    model = tiny()
    cache = engine.Cache(model)
    first = engine.stream(model, [[5, 6]], cache=cache, stop=())
    next(first)
    list(engine.stream(model, [[7, 8]], cache=cache, stop=(), max_new_tokens=3))
    with pytest.raises(ValueError, match="one conversation at a time"):
        list(first)


def test_a_lone_stop_is_one_stop():
    tokenizer = Tokenizer.train(["plain bytes"], 264)
    assert engine.split_stop("ab", tokenizer) == (set(), ["ab"])
    assert engine.split_stop(5, None) == ({5}, []) and engine.split_stop([torch.tensor(7)], None) == ({7}, [])
    assert engine.row_key(np.int64(3), (1,), 0) == engine.row_key(3, (1,), 0)


def test_a_token_of_probability_zero_is_never_drawn():
    logp = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for u in (0.0, 0.5, 1 - 2 ** -53):
        assert engine.draw(logp, torch.tensor([u], dtype=torch.float64).float()).item() == 1


# --- prompts are computed once ---

def counted(monkeypatch):
    """A list that receives the number of tokens of every forward pass."""
    made, forward = [], decoder.Decoder.forward
    monkeypatch.setattr(decoder.Decoder, "forward",
                        lambda self, ids, *args: made.append(tuple(ids.shape)) or forward(self, ids, *args))
    return made


def test_each_distinct_prompt_is_prefilled_once_for_all_its_samples(monkeypatch):
    model, prompts, shapes = tiny(), [[5, 6, 7], [8, 9, 10], [5, 6, 7]], counted(monkeypatch)
    engine.generate(model, prompts, 10, max_new_tokens=4, stop=(), max_batch=6)
    assert sum(B for B, T in shapes if T == 3) == 2        # also where the 30 rows do not fit into the batch
    assert sum(B for B, T in shapes if T == 1) == 30 * 3


def test_a_conversation_computes_only_its_new_tokens(monkeypatch):
    model = tiny()
    cache, ids = engine.Cache(model), [5, 6, 7, 8]
    shapes, computed = counted(monkeypatch), []
    for _ in range(3):
        del shapes[:]
        answer = [token for _, token, _, _ in engine.stream(model, [ids], max_new_tokens=3, temperature=0, stop=(),
                                                            cache=cache)]
        computed += [T for _, T in shapes]
        assert answer == greedy(model, ids, 3, stop=())
        ids = ids + answer + [9, 10]
    # two single tokens after the prompt of four, then twice the end of the last answer and two new ids
    assert computed == [4, 1, 1, 3, 1, 1, 3, 1, 1] and cache.ids == ids[:-3]
    edited = ids[:5] + [11, 12]                             # /undo: the shared part stays, the rest is computed anew
    answer = [token for _, token, _, _ in engine.stream(model, [edited], max_new_tokens=3, temperature=0, stop=(),
                                                        cache=cache)]
    assert answer == greedy(model, edited, 3, stop=())


def test_a_stream_that_is_dropped_leaves_a_cache_to_go_on_from():
    model, cache, ids = tiny(), None, [5, 6, 7]
    cache = engine.Cache(model)
    tokens = engine.stream(model, [ids], temperature=0, stop=(), cache=cache)
    said = [next(tokens)[1] for _ in range(4)]
    tokens.close()
    ids = ids + said + [9]
    answer = [t for _, t, _, _ in engine.stream(model, [ids], max_new_tokens=3, temperature=0, stop=(), cache=cache)]
    assert answer == greedy(model, ids, 3, stop=())


def test_streaming_leaves_the_callers_gradient_mode_alone():
    for _ in engine.stream(tiny(), [[5]], max_new_tokens=3, stop=()):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# --- ends ---

def test_rows_end_by_stop_id_stop_text_length_or_context():
    model, prompts = tiny(), ragged(40, 20)
    for sample in engine.generate(model, prompts, max_new_tokens=20, stop=range(2, 30), seed=2):
        stopped = sample.tokens[-1] in range(2, 30)
        assert sample.finish == ("stop" if stopped else "length")
        assert not set(sample.tokens[:-1]) & set(range(2, 30)) and (stopped or len(sample.tokens) == 20)
    [long] = engine.generate(model, [[5] * 60], max_new_tokens=20, stop=())
    assert long.finish == "context" and len(long.tokens) == 64 - 60 + 1
    [full] = engine.generate(model, [[5] * 64], max_new_tokens=20, stop=())
    assert full.finish == "context" and len(full.tokens) == 1


def test_a_stop_text_may_span_tokens_and_begin_inside_one():
    tokenizer = Tokenizer.train(["plain bytes"], 264)
    texts = engine.StopTexts(["\nQuestion:", "é"], tokenizer)
    assert [texts.ends(id) for id in b"Answer 4\nQuestion:"] == [False] * 17 + [True]
    assert [engine.StopTexts(["é"], tokenizer).ends(id) for id in "é".encode()] == [False, False]
    texts = engine.StopTexts(["\nQuestion:", "é"], tokenizer)
    assert [texts.ends(id) for id in "é".encode()] == [False, True]
    joined = Tokenizer.train(["ab ab ab ab"], 270)
    texts = engine.StopTexts(["b a"], joined)
    assert any(len(joined.decode_bytes([id])) > 1 for id in joined.encode("ab ab"))
    assert [texts.ends(id) for id in joined.encode("ab ab")][-1]


def test_sliding_forgets_the_older_half_and_goes_on():
    model = tiny(context=16)
    [sample] = engine.generate(model, [[5, 6, 7]], max_new_tokens=40, temperature=0, stop=(), overflow="slide")
    ids, expected = [5, 6, 7], []
    for _ in range(40):
        expected.append(next_logits(model, ids).argmax().item())
        ids.append(expected[-1])
        if len(ids) > 16:
            ids = ids[-8:]
    assert sample.tokens == expected and sample.finish == "length"
    [late] = engine.generate(model, [list(range(2, 42))], max_new_tokens=1, temperature=0, overflow="slide")
    assert late.tokens == greedy(model, list(range(26, 42)), 1)


def test_many_prompts_run_in_a_bounded_batch(monkeypatch):
    model, prompts = tiny(), ragged(500, 6)
    shapes = counted(monkeypatch)
    done = []
    samples = engine.generate(model, prompts, max_new_tokens=5, max_batch=16, progress=done.append, seed=1)
    assert max(B for B, _ in shapes) <= 16 and done == list(range(1, 501)) and all(s.finish for s in samples)


def test_generation_does_not_touch_torchs_random_state():
    model = tiny()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    engine.generate(model, [[5]], max_new_tokens=3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("prompts, options, message", [
    ([[5], []], {}, "prompt 1 is empty"), ([[5]], dict(temperature=-1), "temperature must be"),
    ([[5]], dict(temperature=math.inf), "temperature must be"),
    ([[5] * 65], {}, "prompt 0 has 65 tokens, more than the model's context of 64"),
    ([[5, 96]], {}, "holds the ids 5 to 96, but the model knows 0 to 95"),
    ([[5]], dict(top_p=0), "top_p must be above 0"), ([[5]], dict(top_k=-1), "top_k must be"),
    ([[5]], dict(min_p=2), "min_p must be"), ([[5]], dict(max_new_tokens=0), "max_new_tokens must be at least 1"),
    ([[5]], dict(overflow="wrap"), "overflow must be stop or slide"), ([[5]], dict(n=0), "n must be at least 1"),
    ([[5]], dict(stop=["x"]), "need the tokenizer"), ([[5]], dict(repetition_penalty=0), "repetition_penalty must be")])
def test_bad_input_is_one_sentence(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(tiny(), prompts, **options)


# --- decode_attention ---

@pytest.mark.parametrize("B, T, S, H, K, window", [(1, 1, 1, 4, 4, 0), (3, 1, 17, 4, 2, 0), (5, 1, 33, 8, 1, 7),
                                                   (2, 5, 20, 4, 2, 0), (2, 4, 9, 2, 2, 3)])
def test_decode_attention_equals_a_naive_loop_in_float64(B, T, S, H, K, window):
    torch.manual_seed(0)
    D = 8
    q, k, v = torch.randn(B, T, H, D), torch.randn(B, K, S, D), torch.randn(B, K, S, D)
    lengths = torch.randint(1, S - T + 2, (B,))
    start = torch.minimum(torch.randint(0, S, (B,)), lengths - 1)
    out = decode_attention(q, k, v, lengths, start, window)
    for b in range(B):
        for t in range(T):
            end = lengths[b] + t
            first = max(start[b], end - window if window else 0)
            for h in range(H):
                keys, values = (x[b, h // (H // K), first:end].double() for x in (k, v))
                p = torch.softmax(keys @ q[b, t, h].double() / D ** 0.5, 0)
                torch.testing.assert_close(out[b, t, h].double(), p @ values, atol=1e-6, rtol=1e-5)


def test_decode_attention_of_a_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    q, k, v = torch.randn(6, 1, 4, 16), torch.randn(6, 2, 40, 16), torch.randn(6, 2, 40, 16)
    lengths = torch.tensor([1, 40, 7, 23, 31, 12])
    out = decode_attention(q, k, v, lengths)
    for b in range(6):
        assert torch.equal(decode_attention(q[b:b + 1], k[b:b + 1], v[b:b + 1], lengths[b:b + 1]), out[b:b + 1])


def test_decode_attention_refuses_shapes_that_do_not_fit():
    q, k = torch.randn(2, 1, 4, 8), torch.randn(2, 3, 5, 8)
    with pytest.raises(ValueError, match="divisor of H"):
        decode_attention(q, k, k, torch.ones(2, dtype=torch.long))
    k, lengths = torch.randn(2, 2, 5, 8), torch.ones(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"start \(1,\)"):
        decode_attention(q, k, k, lengths, start=torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="window.*-3"):
        decode_attention(q, k, k, lengths, window=-3)


# --- what the decoder needs of the other kernels ---

@pytest.mark.parametrize("rows", [1, 3, 64, 65])
def test_a_product_in_slices_equals_the_whole(rows):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 1, 24), torch.randn(20, 24)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 4):
            torch.set_num_threads(n)
            with torch.no_grad():
                torch.testing.assert_close(linear(x, weight), x @ weight.t(), atol=1e-5, rtol=1e-5)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("B", [2, 4000])
def test_a_norm_without_gradients_takes_one_weight_for_each_head(B, dtype, atol):
    torch.manual_seed(0)
    x, weight = torch.randn(B, 1, 3, 8, dtype=dtype), torch.randn(3, 8, dtype=dtype)
    with torch.no_grad():
        out = rms_norm(x, weight, 1e-6)
    for h in range(3):
        expected = rms_norm(x[:, :, h].float().requires_grad_(), weight[h].float(), 1e-6)
        torch.testing.assert_close(out[:, :, h].float(), expected.detach(), atol=atol, rtol=0.02)
