"""Batched generation: ragged prompts in, sampled tokens and their log-probabilities out, over a KV cache.

    samples = engine.generate(model, [[1, 5], [7]], n=4, max_new_tokens=64, temperature=0.8, seed=1)
    for row, token, logp, finish in engine.stream(model, [ids], cache=cache): ...          # as they are sampled

Each distinct prompt is computed once for all its samples. At most max_batch rows are in the batch: a finished row makes
room for a waiting one, so that any number of prompts runs in bounded memory. A row depends on its prompt, its number
and the seed alone, not on its neighbours: the random number of its t-th token is a hash of these.

Shapes: B rows in the batch, V vocabulary.
"""
import collections
import dataclasses
import hashlib
import math

import torch

from common import pick_device, pick_dtype
from decoder import Cache
from model import GPT, fetch
from tokenizer import Tokenizer

PREFILL_TOKENS = 8192       # of prompts computed in one forward pass, padding included


@dataclasses.dataclass
class Sample:
    """One generated answer. logp are nats under the distribution sampled from, after temperature and all filters; at
    temperature 0 under the model's own, whatever the filters. finish: "stop" (a stop id or text), "length"
    (max_new_tokens) or "context"."""
    prompt: int                                             # the prompt's number
    tokens: list = dataclasses.field(default_factory=list)  # the stop id included, if one ended it
    logp: list = dataclasses.field(default_factory=list)
    finish: str | None = None


def load(path, mode="auto", device="auto", dtype="auto"):
    """(model, tokenizer, chat, trained) of a directory, its weights on the device in the dtype it computes in.

    trained: whether it ends answers at the chat template's <|im_end|>, which a stage that trained with it wrote. chat:
    whether it is talked to through the template: if trained, or as `mode` says; then it ends answers there in any case.
    ValueError, in one sentence, on what is missing, broken, or cannot be asked for.
    """
    if mode not in ("auto", "chat", "base"):
        raise ValueError(f"mode must be auto, chat or base, got {mode!r}")
    folder, device = fetch(path), pick_device(device)
    tokenizer, model = Tokenizer.load(folder), GPT.load(folder)
    config, end = model.config, tokenizer.chat_end_id
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer in {path} has {tokenizer.vocab_size} ids and its model {config.vocab_size}; "
                         "they do not belong together")
    if mode == "chat" and end is None:
        foreign = "is not ChatML, the one that is written here" if tokenizer.chat_template else "is missing"
        raise ValueError(f"{path} cannot chat: its tokenizer's chat template {foreign} (<|im_start|>, <|im_end|>); let "
                         "it continue text with --mode=base")
    trained = end is not None and end in config.stop_ids
    chat = mode == "chat" or mode == "auto" and trained
    if chat and not trained:
        config.end_ids += (end,)
    model.model.dtype = pick_dtype(dtype, device)
    model.to(device, model.model.dtype).requires_grad_(False)
    return model, tokenizer, chat, trained


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
    cache: a Cache to go on from (one prompt, n=1): what it shares with the prompt is not computed again. One that is no
    conversation serves any prompts, and spares each call its preparations. It has its own copy of the weights, so that
    `model` may then be None.
    ValueError on an option out of range, an empty prompt, and one longer than the context unless it may slide.
    """
    check(prompts, n, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, max_batch, overflow)
    if cache is None:
        cache = Cache(model, conversation=False)
    if cache.ids is not None and (len(prompts) != 1 or n != 1):
        raise ValueError(f"a cache to go on from serves one prompt and n=1, got {len(prompts)} prompts and n={n}")
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

    if cache.buckets is not None and waiting:               # graphs read this memory; it should not move
        cache.reserve(min(max_batch, len(waiting)), min(context, len(waiting[0].ids) + max_new_tokens))

    active, shared = [], None           # rows in the batch; the prompt computed for rows that still wait
    while waiting or active:
        # let waiting rows in, once an eighth of the places is free: prompts are cheaper together
        free = max_batch - len(active)
        if waiting and (not active or free >= min(len(waiting), max(1, max_batch // 8))):
            group, shared = admit(cache, waiting, len(active), free, context, shared)
            rows, found = group, sampler(torch.cat([row.logits for row in group]), group)
            active += group
        else:
            rows, found = active, cache.decode(active, sampler)

        # one more token for each of them
        for row, (token, logp) in zip(rows, found.tolist()):
            token = int(token)
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
            ("temperature", temperature, 0 <= temperature < math.inf, "0 (greedy) or more"),
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
    digest = hashlib.blake2b(repr((int(seed), number, prompt)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def split_stop(stop, tokenizer):
    """(set of ids, list of texts)."""
    stop = [stop] if isinstance(stop, (str, int)) else list(stop)
    ids, texts = {int(s) for s in stop if not isinstance(s, str)}, [s for s in stop if isinstance(s, str)]
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
    cache.reserve(first + len(rows), max(len(row.ids) for row in rows))
    leaders = {}                                            # prompt: where its first row stands
    for place, row in enumerate(rows, first):
        leaders.setdefault(tuple(row.ids), place)
    computed = {}
    if shared and shared[0] in leaders:
        computed[shared[0]] = shared[2]
        cache.kv[:, :, leaders[shared[0]], :, :len(shared[0])] = shared[1]
    todo = sorted(((place, ids) for ids, place in leaders.items() if ids not in computed), key=lambda x: -len(x[1]))
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


# --- sampling ---

class Sampler:
    """Draws one token for each row of logits, with its log-probability. `captured`: whether a CUDA graph may hold it,
    which it may unless it looks at all that a row holds."""

    def __init__(self, config, device, temperature, top_k, top_p, min_p, repetition_penalty):
        pad, known = config.pad_id, range(config.vocab_size)
        banned = pad in known and pad not in config.stop_ids        # where padding also ends a text, it must be sampled
        self.banned = torch.tensor([pad], device=device) if banned else None
        self.penalty, self.filters = repetition_penalty, (temperature, top_k, top_p, min_p)
        self.captured = repetition_penalty == 1

    @torch.inference_mode()
    def __call__(self, logits, rows):
        """(B, 2) fp32 of rows: token, in which ids are exact, and log-probability."""
        keys, counts = torch.tensor([[row.key for row in rows], [row.made for row in rows]]).to(logits.device)
        return self.draw(logits, keys, counts, [row.ids for row in rows])

    def draw(self, logits, keys, counts, seen=None):
        """What calling it gives. keys and counts (B,) int64 name the random numbers; seen: all ids of each row, for the
        penalty."""
        if self.banned is not None:
            logits = logits.index_fill(1, self.banned, -torch.inf)
        liked = logits if self.penalty == 1 else penalise(logits, seen, self.penalty)
        if self.filters[0] == 0:
            token, logp = liked.argmax(-1, keepdim=True), torch.log_softmax(logits, -1)
        else:
            logp = warp(liked, *self.filters)
            token = draw(logp, uniforms(keys, counts))
        return torch.cat([token.float(), logp.gather(1, token)], 1)


def warp(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """(B, V) log-probabilities of the distribution that is sampled from, renormalised over what the filters keep.

    top_k keeps the k likeliest tokens, top_p the fewest likeliest ones that hold a share of at least p (Holtzman et al.
    2019, arXiv:1904.09751), min_p those at least min_p times as likely as the likeliest (Nguyen et al. 2024,
    arXiv:2407.01082). Temperature, which must be above 0, comes first.
    """
    logits = logits.float() - logits.max(-1, keepdim=True).values      # dividing by a tiny temperature stays finite
    logp = torch.log_softmax(logits / temperature, -1)
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
    token = torch.searchsorted(cumulative, below, right=True)
    if logp.device.type != "cpu":       # sums in parallel need not rise: never end where nothing is
        token = torch.where(logp.gather(1, token).isfinite(), token, logp.argmax(-1, keepdim=True))
    return token


def uniforms(keys, counts):
    """(B,) fp32 numbers in [0, 1): splitmix64 (Steele et al. 2014) of each row's key and its count of tokens, int64;
    products wrap around, as they should."""
    z = keys + (counts + 1) * (0x9E3779B97F4A7C15 - (1 << 64))
    z = (z ^ shifted(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ shifted(z, 27)) * (0x94D049BB133111EB - (1 << 64))
    return shifted(z ^ shifted(z, 31), 11).float() * 2.0 ** -53


def shifted(z, bits):
    """z >> bits as if z (int64) had no sign."""
    return (z >> bits) & ((1 << 64 - bits) - 1)
