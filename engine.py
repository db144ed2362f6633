"""Batched generation: ragged prompts in, sampled tokens and their log-probabilities out, over a KV cache.

    samples = engine.generate(model, [[1, 5], [7]], n=4, max_new_tokens=64, temperature=0.8, seed=1)
    for row, token, logp, finish in engine.stream(model, [ids], cache=cache): ...          # as they are sampled

Each distinct prompt is computed once for all its samples. At most max_batch rows are in the batch: a finished row makes
room for a waiting one, so that any number of prompts runs in bounded memory. A row depends on its prompt, its number
and the seed alone, not on its neighbours: the random number of its t-th token is a hash of these.

Shapes: B rows in the batch, T tokens of a prompt, S columns of the cache, H heads, D head width, V vocabulary.
"""
import collections
import dataclasses
import hashlib
import math

import numpy as np
import torch
import torch.nn.functional as F

from kernels import attention, decode_attention, keys_seen, linear, rms_norm, rotate
from model import rope, rope_frequencies

BLOCK = 256                 # columns by which the cache grows
PREFILL_TOKENS = 8192       # of prompts computed in one forward pass, padding included


@dataclasses.dataclass
class Sample:
    """One generated answer. logp are nats under the distribution sampled from, after temperature and all filters; at
    temperature 0 under the model's own. finish: "stop" (a stop id or text), "length" (max_new_tokens) or "context"."""
    prompt: int                                             # the prompt's number
    tokens: list = dataclasses.field(default_factory=list)  # the stop id included, if one ended it
    logp: list = dataclasses.field(default_factory=list)
    finish: str | None = None


def generate(model, prompts, n=1, *, progress=None, **options):
    """[Sample]: n answers to each prompt (a list of ids), those to prompt p from index p * n on. `options` are
    stream's. progress(finished) is called as rows finish. ValueError on a prompt that is empty or does not fit."""
    samples = [Sample(p) for p in range(len(prompts)) for _ in range(n)]
    finished = 0
    for row, token, logp, finish in stream(model, prompts, n, **options):
        samples[row].tokens.append(token)
        samples[row].logp.append(logp)
        if finish:
            samples[row].finish = finish
            finished += 1
            if progress:
                progress(finished)
    return samples


def stream(model, prompts, n=1, *, max_new_tokens=128, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
           repetition_penalty=1.0, stop=None, tokenizer=None, seed=0, max_batch=64, overflow="stop", cache=None):
    """Yields (row, token, log-probability, finish) for every token sampled; finish is None until a row's last one.

    temperature 0 is greedy. top_k, top_p, min_p and repetition_penalty mean what they do in transformers, applied in
    its order; the defaults turn them off. stop: ids and texts (these need the tokenizer) that end a row; None: the
    model's own. overflow: with "stop" a row ends when the context is full; with "slide" it then forgets its older half
    and goes on. The padding token is never sampled.
    cache: a Cache to go on from (one prompt, n=1): what it shares with the prompt is not computed again. It has its own
    copy of the weights, so that `model` may then be None.
    ValueError on an option out of range, an empty prompt, and one longer than the context unless it may slide.
    """
    check(prompts, n, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, max_batch, overflow)
    if cache is not None and (len(prompts) != 1 or n != 1):
        raise ValueError(f"a cache to go on from serves one prompt and n=1, got {len(prompts)} prompts and n={n}")
    if cache is None:
        cache = Cache(model)
        cache.ids = None                                    # rows come and go: no conversation to remember
    context = cache.model.config.context
    stop_ids, stop_texts = split_stop(cache.model.config.stop_ids if stop is None else stop, tokenizer)
    sampler = Sampler(cache.model.config, cache.device, temperature, top_k, top_p, min_p, repetition_penalty)

    # rows to compute, the longest first so that neighbours are alike; the same prompt's rows stand side by side
    waiting, numbers = [], collections.Counter()
    for p, prompt in enumerate(prompts):
        prompt = tuple(map(int, prompt))
        if not 0 <= min(prompt) <= max(prompt) < cache.model.config.vocab_size:
            raise ValueError(f"prompt {p} holds the ids {min(prompt)} to {max(prompt)}, but the model knows 0 to "
                             f"{cache.model.config.vocab_size - 1}; it was encoded with another tokenizer")
        if len(prompt) > context and overflow == "stop":
            raise ValueError(f"prompt {p} has {len(prompt)} tokens, more than the model's context of {context}; "
                             "shorten it, or let old tokens go with overflow='slide'")
        for i in range(n):
            tail = StopTexts(stop_texts, tokenizer) if stop_texts else None
            waiting.append(Row(p * n + i, row_key(seed, prompt, numbers[prompt]), list(prompt), tail))
            numbers[prompt] += 1
    waiting = collections.deque(sorted(waiting, key=lambda row: (-len(row.ids), row.ids)))

    active, shared = [], None           # rows in the batch; the prompt computed for rows that still wait
    while waiting or active:
        # let waiting rows in, once an eighth of the places is free: prompts are cheaper together
        free = max_batch - len(active)
        if waiting and (not active or free >= min(len(waiting), max(1, max_batch // 8))):
            group, shared = admit(cache, waiting, len(active), free, context, shared)
            logits = torch.cat([row.logits for row in group])
            first = len(active)
            active += group
        else:
            logits, first = cache.decode(active), 0

        # one more token for each of them
        rows = active[first:]
        tokens, logps = sampler(logits, rows)
        for row, token, logp in zip(rows, tokens, logps):
            row.ids.append(token)
            row.made += 1
            if token in stop_ids or row.tail and row.tail.ends(token):
                row.finish = "stop"
            elif row.made >= max_new_tokens:
                row.finish = "length"
            elif len(row.ids) > context and overflow == "stop":
                row.finish = "context"
            row.logits = None
            yield row.number, token, logp, row.finish

        # finished rows leave; a full one that slides waits again with its newer half
        full = [row for row in active if len(row.ids) > context and not row.finish]
        for row in full:
            row.ids = row.ids[-max(1, context // 2):]
        waiting.extendleft(full)
        active = cache.keep(active, [row for row in active if not row.finish and row not in full])


def check(prompts, n, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, max_batch, overflow):
    empty = next((p for p, prompt in enumerate(prompts) if len(prompt) == 0), None)
    if empty is not None:
        raise ValueError(f"prompt {empty} is empty; a prompt needs at least one token, such as <|endoftext|>")
    for name, value, fits, wanted in (
            ("n", n, n >= 1, "at least 1"),
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
            ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
            ("top_k", top_k, top_k >= 0, "0 (off) or more"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", min_p, 0 <= min_p <= 1, "0 (off) to 1"),
            ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "above 0; 1 is off"),
            ("max_batch", max_batch, max_batch >= 1, "at least 1"),
            ("overflow", overflow, overflow in ("stop", "slide"), "stop or slide")):
        if not fits:
            raise ValueError(f"{name} must be {wanted}, got {value!r}")


# --- rows ---

@dataclasses.dataclass(eq=False)
class Row:
    """An answer in the making: its number, the key of its random numbers, and all its ids, the prompt's included."""
    number: int
    key: int
    ids: list
    tail: object = None             # StopTexts
    made: int = 0                   # tokens sampled
    finish: str | None = None
    logits: object = None           # (1, V) after the prompt, until its first token is sampled


def row_key(seed, prompt, number):
    """63 bits that name a row's random numbers: of the seed, the prompt and its number among the prompt's rows."""
    digest = hashlib.blake2b(repr((seed, number, prompt)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def split_stop(stop, tokenizer):
    """(set of ids, list of texts)."""
    ids, texts = {s for s in stop if not isinstance(s, str)}, [s for s in stop if isinstance(s, str)]
    if "" in texts:
        raise ValueError("a stop text must not be empty")
    if texts and tokenizer is None:
        raise ValueError(f"stop texts such as {texts[0]!r} need the tokenizer")
    return ids, texts


class StopTexts:
    """Says after which token one of the texts stands in what was generated."""

    def __init__(self, texts, tokenizer):
        self.texts, self.tokenizer, self.made = [text.encode() for text in texts], tokenizer, b""

    def ends(self, token):
        piece = self.tokenizer.decode_bytes([token])
        self.made = self.made[-max(map(len, self.texts)):] + piece
        return any(text in self.made for text in self.texts)


@torch.inference_mode()
def admit(cache, waiting, first, free, context, shared):
    """Moves up to `free` rows from `waiting` into the batch at `first`, their prompts computed once each.

    Returns (rows, shared); shared is (ids, keys and values, logits) of the last prompt if rows with it still wait.
    """
    rows = [waiting.popleft() for _ in range(min(free, len(waiting)))]
    for row in rows:
        row.ids = row.ids[-context:]
    cache.reserve(first + len(rows), max(len(row.ids) for row in rows) + 1)
    leaders = {}                                            # prompt: where its first row stands
    for place, row in enumerate(rows, first):
        leaders.setdefault(tuple(row.ids), place)
    computed = {}
    if shared and shared[0] in leaders:
        computed[shared[0]] = shared[2]
        cache.kv[:, :, leaders[shared[0]], :, :len(shared[0])] = shared[1]
    todo = [(place, ids) for ids, place in leaders.items() if ids not in computed]
    while todo:
        count = max(1, min(len(todo), PREFILL_TOKENS // len(todo[0][1])))
        part, todo = todo[:count], todo[count:]
        logits = cache.prefill([place for place, _ in part], [ids for _, ids in part])
        computed.update((ids, logits[i:i + 1]) for i, (_, ids) in enumerate(part))
    for place, row in enumerate(rows, first):
        ids = tuple(row.ids)
        row.logits = computed[ids]
        if leaders[ids] != place:
            cache.kv[:, :, place, :, :len(ids)] = cache.kv[:, :, leaders[ids], :, :len(ids)]
    last = tuple(rows[-1].ids)
    if waiting and tuple(waiting[0].ids) == last:
        shared = last, cache.kv[:, :, leaders[last], :, :len(last)].clone(), computed[last]
    else:
        shared = None
    return rows, shared


# --- weights and cache ---

class Decoder:
    """A copy of a model's weights laid out for generation: in the dtype that it computes in, and joined where several
    multiply one input. forward() is model.Backbone's, to the letter, in half as many calls; tests hold them together.
    """

    @torch.inference_mode()
    def __init__(self, model):
        config = self.config = model.config
        self.dtype = dtype = model.model.dtype

        def join(*modules):
            return torch.cat([module.weight.detach().to(dtype) for module in modules])
        self.embedding, self.head = join(model.model.embed_tokens), join(model.lm_head)
        self.norm, self.layers = join(model.model.norm), []
        self.frequencies = rope_frequencies(config, self.head.device)
        for block in model.model.layers:
            a, m = block.self_attn, block.mlp
            qk_norm = [a.q_norm] * config.n_head + [a.k_norm] * config.n_kv_head if config.qk_norm else []
            self.layers.append((join(block.input_layernorm), join(a.q_proj, a.k_proj, a.v_proj),
                                join(*qk_norm).view(-1, config.head_dim) if qk_norm else None, join(a.o_proj),
                                join(block.post_attention_layernorm), join(m.gate_proj, m.up_proj), join(m.down_proj)))

    def forward(self, ids, positions, attend):
        """Final hidden states (B, T, C) of ids at positions (B, T); attend(layer, q, k, v) stands for attention."""
        config, eps = self.config, self.config.norm_eps
        sizes = config.n_head + config.n_kv_head, config.n_kv_head
        cos, sin = rope(positions, self.frequencies, self.dtype)
        x = F.embedding(ids, self.embedding)
        for i, (norm_1, qkv, qk_norm, out, norm_2, gate_up, down) in enumerate(self.layers):
            heads = linear(rms_norm(x, norm_1, eps), qkv).unflatten(-1, (-1, config.head_dim))
            qk, v = heads.split(sizes, 2)
            if qk_norm is not None:
                qk = rms_norm(qk, qk_norm, eps)
            q, k = rotate(qk, cos, sin).split((config.n_head, config.n_kv_head), 2)
            x = x + linear(attend(i, q, k, v).flatten(2), out)
            gate, up = linear(rms_norm(x, norm_2, eps), gate_up).chunk(2, -1)
            x = x + linear(F.silu(gate) * up, down)
        return rms_norm(x, self.norm, eps)

    def logits(self, hidden):
        """(..., V) fp32 logits of final hidden states."""
        return linear(hidden, self.head).float()


class Cache:
    """Keys and values of the rows in the batch, (layer, 2, row, key head, column, D), grown as they are needed.

    Row b's tokens stand in columns 0 .. len - 1. On CPU they are kept in fp32, which its attention kernels want.
    ids: what row 0 holds, for `stream` to go on from; None if rows come and go.
    """

    def __init__(self, model):
        self.model = Decoder(model)
        config, self.device = model.config, model.lm_head.weight.device
        self.dtype = torch.float32 if self.device.type == "cpu" else self.model.dtype
        self.kv = torch.zeros(config.n_layer, 2, 0, config.n_kv_head, 0, config.head_dim, dtype=self.dtype,
                              device=self.device)
        self.ids = []
        self.buckets = {} if self.device.type == "cuda" else None   # batch size: (its step, input, output)

    @torch.inference_mode()
    def reserve(self, rows, columns):
        """Makes room for so many rows and columns; what is there stays."""
        have_rows, have_columns = self.kv.size(2), self.kv.size(4)
        if rows > have_rows or columns > have_columns:
            columns = max(have_columns, -(-columns // BLOCK) * BLOCK)
            shape = list(self.kv.shape)
            shape[2], shape[4] = max(rows, have_rows), columns
            grown = torch.zeros(shape, dtype=self.dtype, device=self.device)
            grown[:, :, :have_rows, :, :have_columns] = self.kv
            self.kv = grown
            if self.buckets:
                self.buckets = {}                           # they were captured with the old memory

    @torch.inference_mode()
    def prefill(self, places, prompts):
        """(B, V) logits after each prompt, whose keys and values then stand in the rows `places`."""
        talk, held = self.ids is not None, 0
        if talk:                                            # one row that may hold the beginning already
            held = min(common_prefix(self.ids, prompts[0]), len(prompts[0]) - 1)    # the last one's logits are wanted
            self.ids = list(prompts[0][:held])
        lengths = torch.tensor([len(prompt) - held for prompt in prompts])
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for i, prompt in enumerate(prompts):                # padded on the right, which nothing before it sees
            ids[i, :len(prompt) - held] = torch.tensor(prompt[held:])
        T = ids.size(1)
        positions = torch.arange(held, held + T, device=self.device).expand(len(prompts), T)
        rows = torch.tensor(places, device=self.device)

        def attend(layer, q, k, v):
            keys, values = self.kv[layer]
            keys[rows, :, held:held + T] = k.transpose(1, 2).to(self.dtype)
            values[rows, :, held:held + T] = v.transpose(1, 2).to(self.dtype)
            if not held:
                return attention(q, k, v)
            return decode_attention(q, keys[:1, :, :held + T], values[:1, :, :held + T], positions[:, 0] + 1)
        hidden = self.model.forward(ids.to(self.device), positions, attend)
        if talk:
            self.ids = list(prompts[0])
        return self.model.logits(hidden[torch.arange(len(prompts)), lengths - 1])

    @torch.inference_mode()
    def decode(self, active):
        """(B, V) logits after each row's newest token, which joins the cache."""
        B = len(active)
        newest = torch.tensor([[row.ids[-1], len(row.ids)] for row in active])      # ids, and how many there are
        columns = int(newest[:, 1].max())
        if self.buckets is None:
            self.reserve(B, columns)
            logits = self.step(newest.to(self.device), columns)
        else:
            size = 1 << (B - 1).bit_length()                # the next power of two; rows beyond B compute nonsense
            self.reserve(size, columns)
            if size not in self.buckets:
                held = torch.ones(size, 2, dtype=torch.long, device=self.device)
                self.buckets[size] = held, captured(lambda: self.step(held, self.kv.size(4)))
            held, replay = self.buckets[size]
            held[:B] = newest
            logits = replay()[:B]
        if self.ids is not None:
            self.ids.append(active[0].ids[-1])
        return logits

    def step(self, newest, columns):
        """(B, V) logits of one token a row; newest (B, 2) holds the token and the row's length with it."""
        ids, lengths, place = newest[:, :1], newest[:, 1], newest[:, 1] - 1
        rows, seen = torch.arange(len(newest), device=self.device), keys_seen(lengths, 1, columns)
        kv = self.kv[:, :, :len(newest), :, :columns]

        def attend(layer, q, k, v):
            keys_values = kv[layer]
            keys_values[:, rows, :, place] = torch.cat((k, v), 1).to(self.dtype)        # (B, 2, Hkv, D)
            return decode_attention(q, *keys_values, lengths, seen=seen)
        hidden = self.model.forward(ids, place[:, None], attend)
        return self.model.logits(hidden[:, 0])

    @torch.inference_mode()
    def keep(self, active, staying):
        """The staying rows, moved together: those from the end fill the places of those that leave."""
        stays, kept = set(staying), active[:len(staying)]
        movers = [place for place in range(len(staying), len(active)) if active[place] in stays]
        for place, row in enumerate(kept):
            if row not in stays:
                mover = movers.pop()
                length = len(active[mover].ids)
                self.kv[:, :, place, :, :length] = self.kv[:, :, mover, :, :length]
                kept[place] = active[mover]
        return kept


def captured(step):
    """A function that computes what step() does from the same memory to the same memory, on CUDA as one graph."""
    if not torch.cuda.is_available():
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):                           # lazy initialisations must not be captured
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def replay():
        graph.replay()
        return output
    return replay


def common_prefix(a, b):
    """How many ids two lists share from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


# --- sampling ---

class Sampler:
    """Draws one token for each row of logits, with its log-probability."""

    def __init__(self, config, device, temperature, top_k, top_p, min_p, repetition_penalty):
        self.banned = None if config.pad_id is None else torch.tensor([config.pad_id], device=device)
        self.penalty = repetition_penalty
        self.filters = temperature, top_k, top_p, min_p

    @torch.inference_mode()
    def __call__(self, logits, rows):
        """(tokens, log-probabilities) as lists."""
        if self.banned is not None:
            logits = logits.index_fill(1, self.banned, -torch.inf)
        if self.penalty != 1:
            logits = penalise(logits, [row.ids for row in rows], self.penalty)
        logp = warp(logits, *self.filters)
        if self.filters[0] == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            uniform = uniforms([row.key for row in rows], [row.made for row in rows])
            token = draw(logp, uniform.float().to(logits.device))
        both = torch.cat([token.float(), logp.gather(1, token)], 1).tolist()       # one transfer; ids are exact in fp32
        return [int(token) for token, _ in both], [logp for _, logp in both]


def warp(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """(B, V) log-probabilities of the distribution that is sampled from, renormalised over what the filters keep.

    top_k keeps the k likeliest tokens, top_p the fewest likeliest ones that hold a share of at least p (Holtzman et al.
    2019, arXiv:1904.09751), min_p those at least min_p times as likely as the likeliest (Nguyen et al. 2024,
    arXiv:2407.01082). Temperature comes first, and 0 leaves the model's own distribution.
    """
    logp = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    if top_k and top_k < logp.size(-1):
        least = logp.topk(top_k, -1).values[:, -1:]
        logp = torch.log_softmax(logp.masked_fill(logp < least, -torch.inf), -1)
    if top_p < 1:
        ordered, order = logp.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        drop = (before >= top_p).scatter(-1, order, before >= top_p)
        logp = torch.log_softmax(logp.masked_fill(drop, -torch.inf), -1)
    if min_p:
        least = logp.max(-1, keepdim=True).values + math.log(min_p)
        logp = torch.log_softmax(logp.masked_fill(logp < least, -torch.inf), -1)
    return logp


def penalise(logits, seen, penalty):
    """Logits (B, V) of ids already seen (B lists) made less likely: positive ones divided by the penalty, negative ones
    multiplied (Keskar et al. 2019, arXiv:1909.05858, section 4.1)."""
    longest = max(map(len, seen))
    seen = torch.tensor([ids + ids[-1:] * (longest - len(ids)) for ids in seen], device=logits.device)
    found = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(found > 0, found / penalty, found * penalty))


def draw(logp, uniform):
    """(B, 1) token at which the cumulative probability passes each row's uniform number in [0, 1)."""
    cumulative = logp.exp().cumsum(-1)
    total = cumulative[:, -1:]
    below = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))    # not rounded up
    return torch.searchsorted(cumulative, below, right=True)


def uniforms(keys, counts):
    """(B,) numbers in [0, 1): splitmix64 (Steele et al. 2014) of each row's key and its count of tokens."""
    z = np.array(keys, np.uint64) + (np.array(counts, np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0 ** -53)
