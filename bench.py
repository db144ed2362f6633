"""How fast this machine runs what training and generation consist of, beside the peers that are installed.

    python bench.py env                                         matrix products and copies
    python bench.py errors                                      every operation and its gradients against float64, at
                                                                shapes of its own
    python bench.py attention --context=8192 --document=512     kernels.attention and decode_attention
    python bench.py logprob --vocab_size=50304                  kernels.linear_logprob
    python bench.py train --n_layer=12 --n_embd=768             tokens/s, MFU, memory, graph breaks
    python bench.py generate --rows=32                          tokens/s of sampling
    python bench.py data --data=data/text                       batches read from disk

Each prints a table and, with --json=FILE, appends a line for every row of it. A figure is the median of several runs,
each ended by a synchronisation. Shape letters: B rows, T tokens of a row, H heads, K key heads, D head width.
"""
import contextlib
import functools
import importlib.util
import itertools
import json as json_lines
import os
import platform
import statistics
import sys
import tempfile
import time

import torch
import torch.nn.functional as F

import common
import engine
import kernels
import optim
import record
import triton_kernels
from configurator import configure
from model import GPT, Config
from texts import TextBatches

# --- run ---
device = "auto"             # auto, cuda, mps or cpu
dtype = "auto"              # auto (bf16 where the hardware is fast at it), bf16 or fp32
seconds = 1.0               # to spend on each figure, after a first run that warms up
repeats = 10                # backward passes of each attention that are compared to the bit; 0: none
peers = "sdpa,flex,varlen,whole,liger,transformers"   # which to measure where installed; empty: none
json = ""                   # file to append results to, a JSON line each
seed = 1337                 # of weights, tokens and documents
# --- shape ---
rows = 4                    # rows B: of a forward pass, and sequences that generate at once
context = 1024              # tokens T of a row; keys in the cache when decoding
document = 0                # mean tokens of the documents packed in a row; 0: a row is one document
window = 0                  # tokens that a token sees; 0: all before it
n_head = 6                  # query heads H
n_kv_head = 0               # key heads K; 0: as many as n_head
n_embd = 384                # channels
n_layer = 6                 # blocks
vocab_size = 4096           # V
# --- train ---
optimizer = "adamw"         # adamw or muon
compile = False             # torch.compile the model, one graph for its one shape
checkpointing = False       # our model computes each block again in backward: less memory
nanogpt = ""                # a checkout of nanoGPT, whose model of this shape is measured too
nanochat = ""               # a checkout of nanochat, the same
# --- generate ---
prompt_tokens = 32          # of each prompt
new_tokens = 64             # sampled after each
# --- data ---
data = "data/text"          # folder written by data.py

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}    # dense bf16 FLOP/s on the data sheet


def measure(function, where):
    """Median seconds of function(), over at least three runs."""
    function()
    common.synchronize(where)
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end and len(times) < 1000:
        begin = time.perf_counter()
        function()
        common.synchronize(where)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def peak_memory(function, where):
    """Bytes of tensors that function() holds at most beyond those there were; nan on MPS, where torch does not say."""
    if where.type == "cpu":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            function()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        return max(itertools.accumulate(event.nbytes() for event in events), default=0)
    if where.type != "cuda":
        return float("nan")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    common.synchronize(where)
    return torch.cuda.max_memory_allocated() - before


def wanted(peer):
    """Whether a peer is asked for and installed."""
    module = dict(liger="liger_kernel", transformers="transformers").get(peer)
    return peer in peers.split(",") and (module is None or importlib.util.find_spec(module) is not None)


def offsets(where):
    """cu_seqlens of documents of random lengths with mean `document`, the same for a seed; None if rows are whole."""
    if not document:
        return None
    generator = torch.Generator().manual_seed(seed)
    n = rows * context
    cuts = torch.randperm(n - 1, generator=generator)[:n // document] + 1
    cuts = torch.cat([torch.tensor([0, n]), cuts, torch.arange(0, n, context)]).unique()
    return kernels.pad_offsets(cuts.int(), n // document + rows + 2).to(where)


# --- what is measured: each yields its table's rows, as dictionaries ---

def bench_env(where, kind):
    """Matrix products by size, and copies."""
    for n in (256, 512, 1024) if where.type == "cpu" else (1024, 2048, 4096, 8192, 16384):
        a, b = (torch.randn(n, n, device=where, dtype=kind) for _ in range(2))
        yield dict(what=f"matmul {n}", tflops=2 * n ** 3 / measure(functools.partial(torch.mm, a, b), where) / 1e12)
    yield dict(what="copy", gigabytes_per_second=copy_rate(where) / 1e9)


def copy_rate(where):
    """Bytes a second, read and written, of a copy too large for caches."""
    source = torch.empty((64 << 20) if where.type == "cpu" else (1 << 30), dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    return 2 * source.numel() / measure(lambda: target.copy_(source), where)


def bench_errors(where, kind):
    """Largest errors of every operation and its gradients against float64, in roundings of the largest number there;
    right: at most 4 of them in bf16, 64 in fp32, whose sums are not kept in something finer."""
    def random(*shape):
        return torch.randn(*shape, device=where, dtype=kind, requires_grad=True)

    impl = "triton" if triton_kernels.INTERPRET or not triton_kernels.why_not(where.type) else "auto"
    N, T = 2 * 515, 515
    ends, targets = torch.tensor([0, 1, 2, 200, 515, 700, N]).int().to(where), torch.randint(999, (N,), device=where)
    targets[::7] = -100
    cases, bound = {}, 64 if kind == torch.float32 else 4
    for D, K, cu_seqlens, window in (64, 4, None, 0), (64, 1, ends, 0), (128, 2, ends, 100), (128, 4, None, 2):
        attend = functools.partial(kernels.attention, cu_seqlens=cu_seqlens, window=window)
        name = f"attention {D} wide, {4 // K} heads a key, {'' if cu_seqlens is None else 'documents, '}{window=}"
        cases[name] = attend, "sdpa", (random(2, T, 4, D), random(2, T, K, D), random(2, T, K, D))
    lengths = torch.tensor([1, T], device=where)
    cases["decode"] = (functools.partial(kernels.decode_attention, lengths=lengths), "auto",
                       (random(2, 1, 4, 64), random(2, 2, T, 64), random(2, 2, T, 64)))
    cases["log-probabilities"] = (functools.partial(kernels.linear_logprob, targets=targets, temperature=0.7), "plain",
                                  (random(N, 64), random(999, 64)))
    for name, (function, reference, inputs) in cases.items():
        exact = [x.detach().double().requires_grad_() for x in inputs]
        with contextlib.nullcontext() if name != "decode" else torch.no_grad():
            found, expected = [function(*inputs, impl=impl)], [function(*exact, impl=reference)]
        if name != "decode":
            upstream = torch.randn_like(found[0])
            found += torch.autograd.grad(found[0], inputs, upstream)
            expected += torch.autograd.grad(expected[0], exact, upstream.double())
        errors = [((a - b).abs().max() / b.abs().max()).item() / torch.finfo(kind).eps for a, b in zip(found, expected)]
        yield dict(what=name, impl=impl, roundings=errors[0], of_gradients=max(errors[1:], default=0.0),
                   right="yes" if all(error < bound for error in errors) else "no")      # and none is nan


def attentions(where, kind, cu_seqlens):
    """{name: function of q, k, v (B, T, H, D)}: ours and its peers for the documents and the window asked for."""
    found = {"ours, auto": lambda q, k, v: kernels.attention(q, k, v, cu_seqlens, window)}
    width = n_embd // n_head
    if not triton_kernels.INTERPRET and not triton_kernels.why_not(where.type) and width in (64, 128):
        found["ours, triton"] = lambda q, k, v: kernels.attention(q, k, v, cu_seqlens, window, "triton")
    repeat = n_head != (n_kv_head or n_head)

    def dense(backends):
        def run(q, k, v):
            with torch.nn.attention.sdpa_kernel(backends):
                return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True,
                                                      enable_gqa=repeat).transpose(1, 2)
        return run
    if wanted("sdpa"):
        backends = torch.nn.attention.SDPBackend
        found["SDPA, dense"] = dense([backends.CUDNN_ATTENTION, backends.FLASH_ATTENTION, backends.EFFICIENT_ATTENTION,
                                      backends.MATH])
        if where.type == "cuda":
            found["SDPA cuDNN, dense"] = dense([backends.CUDNN_ATTENTION])
            found["SDPA flash, dense"] = dense([backends.FLASH_ATTENTION])
        if cu_seqlens is not None or window:
            found["SDPA, masked"] = lambda q, k, v: kernels.attention(q, k, v, cu_seqlens, window, "sdpa")
    if wanted("varlen") and where.type == "cuda":
        from torch.nn.attention.varlen import varlen_attn
        ends = torch.arange(0, rows * context + 1, context, device=where).int() if cu_seqlens is None else cu_seqlens
        longest = int(ends.diff().max())
        found["varlen_attn"] = lambda q, k, v: varlen_attn(
            *(x.flatten(0, 1) for x in (q, k, v)), ends, ends, longest, longest, enable_gqa=repeat,
            window_size=(window - 1 if window else -1, 0)).unflatten(0, (rows, context))
    if wanted("flex") and where.type == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        ids = torch.zeros(rows, context, device=where, dtype=torch.int32)
        if cu_seqlens is not None:
            ids = kernels.document_ids(cu_seqlens, rows * context).view(rows, context)

        def seen(b, h, t, s):
            near = (t >= s) & (ids[b, t] == ids[b, s])
            return near & (t - s < window) if window else near
        blocks = create_block_mask(seen, rows, None, context, context, device=where)
        compiled = torch.compile(flex_attention, dynamic=False)
        found["FlexAttention"] = lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=blocks,
                                                          enable_gqa=repeat).transpose(1, 2)
    return found


def time_attention(attend, inputs, upstream, exact, where):
    """(seconds forward, seconds backward, largest error, how many of `repeats` backward passes equal the first)"""
    with torch.no_grad():
        forward = measure(lambda: attend(*inputs), where)
        error = (attend(*inputs)[0, :, 0] - exact).abs().max().item()
    out = attend(*inputs)

    def back():
        return torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    backward, first = measure(back, where), back()
    return forward, backward, error, sum(all(map(torch.equal, back(), first)) for _ in range(repeats))


def bench_attention(where, kind):
    """Attention forward and backward, with errors against float64 on the first row and head; then decoding."""
    K, D = n_kv_head or n_head, n_embd // n_head
    q, k, v, upstream = (torch.randn(rows, context, heads, D, device=where, dtype=kind)
                         for heads in (n_head, K, K, n_head))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    cu_seqlens = offsets(where)
    seen = kernels.visible(rows, context, cu_seqlens, window, where)
    pairs = seen.sum().item() * (1 if seen.dim() == 4 else rows)
    seen = (seen[0, 0] if seen.dim() == 4 else seen)
    exact = (q[0, :, 0].detach().double() @ k[0, :, 0].detach().double().t() / D ** 0.5)
    exact = exact.masked_fill(~seen, -torch.inf).softmax(-1) @ v[0, :, 0].detach().double()
    del seen
    for name, attend in attentions(where, kind, cu_seqlens).items():
        flops = 4 * D * n_head * (pairs if "dense" not in name else rows * context * (context + 1) // 2)
        row = dict(what=name, shape=f"{rows} x {context} x {n_head}/{K} x {D}")
        try:
            forward, backward, error, equal = time_attention(attend, inputs, upstream, exact, where)
        except RuntimeError as reason:                          # a backend that does not take this shape or device
            yield row | dict(note=" ".join(str(reason).split())[:60])
            continue
        dense = "dense" in name and (cu_seqlens is not None or window)
        yield row | dict(forward_ms=1e3 * forward, backward_ms=1e3 * backward, forward_tflops=flops / forward / 1e12,
                         backward_tflops=2.5 * flops / backward / 1e12, error="" if dense else error,
                         equal_backwards=f"{equal}/{repeats}", note="sees more" if dense else "")
    inputs.clear()
    kv = torch.randn(2, rows, K, context, D, device=where, dtype=kind if where.type == "cuda" else torch.float32)
    q, lengths = torch.randn(rows, 1, n_head, D, device=where, dtype=kind), torch.full((rows,), context, device=where)
    copied = copy_rate(where)
    with torch.no_grad():
        spent = measure(lambda: kernels.decode_attention(q, *kv, lengths), where)
    rate = kv.numel() * kv.element_size() / spent
    yield dict(what="decode, ours", shape=f"{rows} x {context} x {n_head}/{K} x {D}", forward_ms=1e3 * spent,
               gigabytes_per_second=rate / 1e9, share_of_copy=rate / copied)


def bench_logprob(where, kind):
    """Log-probabilities of rows x context targets, forward and backward."""
    N = rows * context
    hidden = torch.randn(N, n_embd, device=where, dtype=kind, requires_grad=True)
    weight = torch.randn(vocab_size, n_embd, device=where, dtype=kind, requires_grad=True)
    targets, upstream = torch.randint(vocab_size, (N,), device=where), torch.randn(N, device=where)
    found = {"ours, auto": lambda: kernels.linear_logprob(hidden, weight, targets),
             "ours, torch": lambda: kernels.linear_logprob(hidden, weight, targets, impl="plain")}
    if wanted("whole"):
        found["whole logits"] = lambda: -F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")
    if wanted("liger"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        fused = LigerFusedLinearCrossEntropyLoss(reduction="none")
        found["Liger"] = lambda: -fused(weight, hidden, targets)
    for name, logprob in found.items():
        def step(logprob=logprob):
            return torch.autograd.grad(logprob(), (hidden, weight), upstream)
        yield dict(what=name, shape=f"{N} x {n_embd} x {vocab_size}", ms=1e3 * measure(step, where),
                   peak_megabytes=peak_memory(step, where) / 1e6)


def config_of_options():
    return Config(vocab_size, n_layer, n_head, n_kv_head, n_embd, context=context)


def bench_train(where, kind):
    """Whole training steps, all parts of them: forward, backward, clipping, update."""
    matmul = common.matmul_rate(where, kind)
    sheet = next((flops for name, flops in PEAK.items() if where.type == "cuda" and
                  name in torch.cuda.get_device_name(where)), float("nan"))
    ids = torch.randint(vocab_size, (rows, context + 1), device=where)
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), offsets(where)
    config = config_of_options()
    models = {"ours": lambda: GPT(config)}
    models |= {"nanoGPT": load_nanogpt} if nanogpt else {}
    models |= {"nanochat": functools.partial(load_nanochat, where, kind)} if nanochat else {}
    for name, build in models.items():
        torch.manual_seed(seed)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, guard = build().to(where), optim.SpikeGuard(10.0, 10)
        if name == "ours":
            model.model.dtype, model.model.checkpointing = kind, checkpointing
            updates = optim.build(model, optimizer, 1e-4, 1e-3, 0.0, 0.0, (0.9, 0.95), 0.9, 5, kind, compile)
        else:
            updates = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=where.type == "cuda")
        run = torch.compile(model, dynamic=False) if compile else model

        def step(name=name, model=model, updates=updates, run=run, guard=guard):
            if name == "ours":
                loss = run(*batch).mean()
            elif name == "nanoGPT":
                with torch.autocast(where.type, kind, enabled=kind != torch.float32):
                    loss = run(*batch[:2])[1]
            else:                                               # casts its weights itself
                loss = run(*batch[:2])
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            updates.step(guard.accepts(loss.detach(), grad_norm)) if name == "ours" else updates.step()
            updates.zero_grad()
        step()
        memory, rate = peak_memory(step, where), rows * context / measure(step, where)
        flops = rate * config.flops_per_token(context)          # the same formula for every model
        yield dict(what=name, parameters=sum(p.numel() for p in model.parameters()), tokens_per_second=rate,
                   mfu_sheet=flops / sheet, mfu_matmul=flops / matmul, peak_gigabytes=memory / 1e9,
                   graph_breaks=sum(torch._dynamo.utils.counters["graph_break"].values()) if compile else "")


def load_nanogpt():
    spec = importlib.util.spec_from_file_location("nanogpt", os.path.join(nanogpt, "model.py"))
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    return theirs.GPT(theirs.GPTConfig(block_size=context, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head,
                                       n_embd=n_embd, dropout=0.0, bias=False))


def load_nanochat(where, kind):
    """nanochat's model with torch's attention, its fallback where the kernel that it fetches is not to be had, and with
    the whole windows that it advises for that."""
    os.environ["NANOCHAT_DTYPE"] = str(kind).removeprefix("torch.")
    sys.path.insert(0, nanochat)
    try:
        from nanochat import gpt as theirs
        shape = theirs.GPTConfig(sequence_len=context, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head,
                                 n_kv_head=n_kv_head or n_head, n_embd=n_embd, window_pattern="L")
    except (ImportError, TypeError) as error:
        raise ValueError(f"nanochat at --nanochat={nanochat} is another version than this measures: {error}") from None
    with torch.device("meta"):
        model = theirs.GPT(shape)
    model.to_empty(device=where)
    model.init_weights()
    return model


def bench_generate(where, kind):
    """Sampling new_tokens after `rows` prompts of random tokens."""
    model = GPT(config_of_options()).to(where).eval()
    model.model.dtype = kind
    prompts = torch.randint(vocab_size, (rows, prompt_tokens)).tolist()
    cache = engine.Cache(model, conversation=False)             # as theirs, the model is ready when the clock starts

    def ours():
        engine.generate(None, prompts, max_new_tokens=new_tokens, temperature=1.0, seed=seed, max_batch=rows, stop=(),
                        cache=cache)
    found = {"ours": ours}
    if wanted("transformers"):
        from transformers import AutoModelForCausalLM
        with tempfile.TemporaryDirectory() as folder:
            model.save(folder)
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).to(where)
        ids = torch.tensor(prompts, device=where)
        found["transformers"] = lambda: theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=new_tokens,
            min_new_tokens=new_tokens, pad_token_id=0)
    for name, generate in found.items():
        yield dict(what=name, shape=f"{rows} x ({prompt_tokens} + {new_tokens})",
                   tokens_per_second=rows * new_tokens / measure(generate, where))


def bench_data(where, kind):
    """Batches of `rows` rows from the folder, moved to the device."""
    batches, step = TextBatches(data, "train", rows, rows, context, seed), iter(range(1 << 60))

    def load():
        for x in batches(next(step), 0):
            if x is not None:
                (x.pin_memory() if where.type == "cuda" else x).to(where, non_blocking=True)
    yield dict(what=data, tokens_per_second=rows * context / measure(load, where))


COMMANDS = {"env": bench_env, "errors": bench_errors, "attention": bench_attention, "logprob": bench_logprob,
            "train": bench_train, "generate": bench_generate, "data": bench_data}


def text(value):
    return record.shorten(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def table(results):
    """The rows (dictionaries) as a Markdown table with all their columns."""
    columns = list(dict.fromkeys(column for row in results for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(text(row.get(c, "")) for c in columns) + " |" for row in results])


def main(command, config):
    least = dict(seconds=0, repeats=0, seed=0, rows=1, context=1, document=0, window=0, n_head=1, n_kv_head=0, n_embd=1,
                 n_layer=1, vocab_size=1, prompt_tokens=1, new_tokens=1)
    for name in (name for name in least if config[name] < least[name]):
        raise SystemExit(f"bench.py: --{name} must be at least {least[name]}, got {config[name]}")
    unknown = set(filter(None, peers.split(","))) - {"sdpa", "flex", "varlen", "whole", "liger", "transformers"}
    if unknown:
        raise SystemExit(f"bench.py: peers must be of sdpa, flex, varlen, whole, liger and transformers, got {peers!r}")
    if optimizer not in ("adamw", "muon"):
        raise SystemExit(f"bench.py: optimizer must be adamw or muon, got {optimizer!r}")
    if document >= context:
        raise SystemExit(f"bench.py: --document={document} must be below --context={context}")
    for name, file in ("nanogpt", "model.py"), ("nanochat", "nanochat/gpt.py"):
        if config[name] and not os.path.exists(os.path.join(config[name], file)):
            raise SystemExit(f"bench.py: there is no checkout at --{name}={config[name]}: it has no {file}")
    where = common.pick_device(device)
    kind = common.pick_dtype(dtype, where)
    config_of_options()                                         # refuses a shape that does not fit
    if n_head % (n_kv_head or n_head):
        raise SystemExit(f"bench.py: n_head={n_head} is not a multiple of n_kv_head={n_kv_head}")
    torch.manual_seed(seed)
    machine = torch.cuda.get_device_name(where) if where.type == "cuda" else \
        f"{platform.machine()}, {torch.get_num_threads()} threads"
    machine = f"torch {torch.__version__}, {machine}, {str(kind).removeprefix('torch.')}"
    print(f"{command}: {machine}", flush=True)
    results = list(COMMANDS[command](where, kind))
    print(table(results))
    if json:
        with open(json, "a", encoding="utf-8") as f:
            f.writelines(json_lines.dumps({"command": command, "machine": machine, "options": config, **row}) + "\n"
                         for row in results)


if __name__ == "__main__":
    command, *flags = sys.argv[1:] or ["--help"]
    if command in ("--help", "-h"):
        configure(globals(), ["--help"])
    if command not in COMMANDS:
        raise SystemExit(f"bench.py: begin with one of {', '.join(COMMANDS)}, as in python bench.py env; got {command}")
    main(command, configure(globals(), flags))
