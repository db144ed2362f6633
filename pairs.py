"""Preferences on disk, as preferences.py writes them, to batches: pairs of answers, or answers with a thumb up or down.

    batches = PairBatches("data/pairs", "train", 64, 8, 1024, seed, rank, world_size, tokenizer)
    packed = batches.pairs.packed(batches(step, micro), device)         # [0::2] of its answers are chosen, [1::2] not

A folder holds train.jsonl, val.jsonl and about.json. Rows, in trl's published names, each with its source:

    {"prompt": [messages], "chosen": [message], "rejected": [message]}      also margin, score_chosen, score_rejected
    {"prompt": [messages], "completion": [message], "label": true}          thumbs

A prompt's ids end with the opening of the assistant's turn, an answer's with <|im_end|>. What does not fit the context
is cut: first the prompt, from the left, to what the answers leave of the context but not below a quarter of it; then
the answers, from the right, without their <|im_end|>. Rows without an answer, and pairs whose answers are equal, are
left out and counted.

Letters: P pairs, A answers.
"""
import hashlib
import itertools
import os
from collections import Counter

import numpy as np
import torch

from chats import CHUNK, encode_chats
from packing import pack
from sources import json_rows

ROLES = ("system", "user", "assistant")
WRITE = "python data.py --kind=pairs"


def read(folder, split, answers):
    """(path, rows) of folder/split.jsonl, whose `answers` are its columns of answers; ValueError on any other row."""
    path = os.path.join(folder, f"{split}.jsonl")
    if not os.path.exists(path):
        raise ValueError(f"there is no {path}; write it with {WRITE} --out_dir={folder}")
    try:
        rows = [row for row, _, _ in json_rows(path, "error", Counter())]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None
    for number, row in enumerate(rows, 1):
        if wrong := fault(row, answers):
            raise ValueError(f"row {number:,} of {path} {wrong}; {WRITE} --sources=FILE brings files into this form")
    return path, rows


def fault(row, answers):
    """What is wrong with a row, or None."""
    if not isinstance(row, dict):
        return f"is {row!r:.40}, not an object with prompt, {', '.join(answers)}"
    kinds = {"chosen": "a pair (prompt, chosen, rejected)", "completion": "a thumb (prompt, completion, label)"}
    if answers[0] not in row and (other := next((name for name in kinds if name in row), None)):
        return f"is {kinds[other]}, but {kinds[answers[0]]} is wanted"
    for name in ("prompt", *answers):
        messages = row.get(name)
        if not isinstance(messages, list) or not messages or not all(
                isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
                for message in messages):
            return f"has {name}={messages!r:.60}, not a list of messages with a role and a content"
        if name == "prompt" and messages[-1]["role"] == "assistant":
            return "has a prompt that ends with the assistant's turn, which is the answers'"
        if name != "prompt" and [message["role"] for message in messages] != ["assistant"]:
            return f"has {', '.join(message['role'] for message in messages)} in {name}, not one assistant's turn"
    if "completion" in answers and not isinstance(row.get("label"), bool):
        return f"has label={row.get('label')!r:.40}, not true or false"
    margin = row.get("margin")
    if not isinstance(margin, (int, float, type(None))) or isinstance(margin, bool) or margin and abs(margin) > 1e30:
        return f"has margin={margin!r:.40}, not a number"


def encode(rows, answers, tokenizer, context):
    """Yields (row, prompt ids, [answer ids], what was cut) of rows that `read` returns, the ids None where an answer is
    empty. ValueError if the context has no room for an answer."""
    opening = 1 + len(tokenizer.encode("assistant\n"))
    if context < opening + 2:
        raise ValueError(f"context={context} has no room for a prompt and an answer; raise it")
    shared = list(range(tokenizer.vocab_size))              # one object for each id: a quarter of the memory
    for first in range(0, len(rows), CHUNK):
        part = rows[first:first + CHUNK]
        encoded = iter(encode_chats(tokenizer, [row["prompt"] + row[name] for row in part for name in answers]))
        for row in part:
            prompt, ids, cut = None, [], set()
            for both, mask in itertools.islice(encoded, len(answers)):
                end = len(mask) - mask[::-1].argmax()       # the last run of ones: the answer and its <|im_end|>
                start = end - mask[:end][::-1].argmin()
                prompt, answer = (list(map(shared.__getitem__, part)) for part in (both[:start], both[start:end]))
                ids.append(answer)
            if not all(row[name][0]["content"].strip() for name in answers):
                yield row, None, None, cut
                continue
            keep = max(context - max(map(len, ids)), opening, min(context // 4, context - 2))
            if len(prompt) > keep:
                prompt = prompt[-keep:]
                cut.add("prompts")
            if max(map(len, ids)) > context - len(prompt):
                ids = [answer[:context - len(prompt)] for answer in ids]
                cut.add("answers")
            yield row, prompt, ids, cut


def fingerprint(*columns):
    """Names the tokens of columns, each a list of lists of ids (or of numbers)."""
    digest = hashlib.sha256()
    for ids in itertools.chain(*columns):
        digest.update(np.array([len(ids), *ids], np.int64).tobytes())
    return digest.hexdigest()[:16]


class Pairs:
    """A split of pairs in memory: prompts, chosen, rejected (P lists of ids), margins (P,) fp32 (0 where a row has
    none), sources (P names) and source_names, the different ones; rows, as read; dropped and cut, counts by reason.

    ValueError if the file is missing or damaged, holds something else than pairs, or none is left.
    """

    def __init__(self, folder, split, tokenizer, context):
        self.path, rows = read(folder, split, ("chosen", "rejected"))
        self.prompts, self.chosen, self.rejected, self.rows = [], [], [], []
        self.dropped, self.cut = Counter(), Counter()
        for row, prompt, ids, cut in encode(rows, ("chosen", "rejected"), tokenizer, context):
            if prompt is None or ids[0] == ids[1]:
                reason = "without an answer" if prompt is None else "equal answers"
                self.dropped[reason + " once cut" * ("answers" in cut)] += 1
                continue
            self.cut.update(cut)
            for column, value in zip((self.prompts, self.chosen, self.rejected, self.rows), (prompt, *ids, row)):
                column.append(value)
        finish(self)
        self.margins = torch.tensor([float(row.get("margin") or 0) for row in self.rows])
        self.fingerprint = fingerprint(self.prompts, self.chosen, self.rejected)

    def __len__(self):
        return len(self.rows)

    def packed(self, indices, device="cpu"):
        """The Packed row of these pairs, their answers in the order chosen, rejected, chosen, rejected, ..."""
        return pack([(self.prompts[i], [self.chosen[i], self.rejected[i]]) for i in indices], device)


class Thumbs:
    """A split of single answers: prompts, completions, labels (A,) bool; the rest as in Pairs."""

    def __init__(self, folder, split, tokenizer, context):
        self.path, rows = read(folder, split, ("completion",))
        self.prompts, self.completions, self.rows = [], [], []
        self.dropped, self.cut = Counter(), Counter()
        for row, prompt, ids, cut in encode(rows, ("completion",), tokenizer, context):
            if prompt is None:
                self.dropped["without an answer"] += 1
                continue
            self.cut.update(cut)
            for column, value in zip((self.prompts, self.completions, self.rows), (prompt, *ids, row)):
                column.append(value)
        finish(self)
        self.labels = torch.tensor([row["label"] for row in self.rows])
        self.fingerprint = fingerprint(self.prompts, self.completions, [self.labels.int().tolist()])

    def __len__(self):
        return len(self.rows)

    def packed(self, indices, device="cpu"):
        """The Packed row of these answers, each after its prompt."""
        return pack([(self.prompts[i], [self.completions[i]]) for i in indices], device)


def finish(data):
    """The sources of data's rows. ValueError if there are no rows."""
    if not data.rows:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in data.dropped.items())
        raise ValueError(f"{data.path} holds nothing to learn from" + (f": {reasons}" if reasons else "")
                         + f"; write it again with {WRITE}")
    data.sources = [str(row.get("source", "")) for row in data.rows]
    data.source_names = list(dict.fromkeys(data.sources))


class PairBatches:
    """Batches of pairs, a pure function of (seed, step, micro), the same for any number of ranks.

    An epoch holds every pair once, in an order of its own; a step may reach into the next epoch.
    """
    kind = Pairs

    def __init__(self, folder, split, pairs_per_step, micro_pairs, context, seed, rank=0, world_size=1, tokenizer=None):
        if pairs_per_step < 1 or pairs_per_step % (micro_pairs * world_size):
            raise ValueError(f"pairs_per_step={pairs_per_step} is not a multiple of micro_pairs * ranks = {micro_pairs}"
                             f" * {world_size}")
        self.pairs = self.kind(folder, split, tokenizer, context)
        self.pairs_per_step, self.micro_pairs, self.seed = pairs_per_step, micro_pairs, seed
        self.rank, self.world_size, self.n_pairs, self.orders = rank, world_size, len(self.pairs), {}
        if self.n_pairs < pairs_per_step:
            raise ValueError(f"{self.pairs.path} holds {self.n_pairs:,} pairs, fewer than one step of "
                             f"pairs_per_step={pairs_per_step}; add pairs, or lower it")
        self.steps_per_epoch = self.n_pairs / pairs_per_step

    def numbers(self, step):
        """Numbers of the whole step's pairs, in the order (micro, rank, pair)."""
        position = np.arange(step * self.pairs_per_step, (step + 1) * self.pairs_per_step)
        epochs, position = np.divmod(position, self.n_pairs)
        needed = range(epochs[0], epochs[-1] + 1)
        self.orders = {epoch: self.orders[epoch] if epoch in self.orders else
                       np.random.default_rng((self.seed, epoch)).permutation(self.n_pairs) for epoch in needed}
        return np.concatenate([self.orders[epoch][position[epochs == epoch]] for epoch in needed])

    def __call__(self, step, micro):
        """Numbers of the pairs of one rank's micro-batch."""
        return self.numbers(step).reshape(-1, self.world_size, self.micro_pairs)[micro, self.rank].tolist()

    def epoch(self, step):
        """Epochs done before `step`, with fraction."""
        return step / self.steps_per_epoch


class ThumbBatches(PairBatches):
    """As PairBatches, of single answers: `pairs` counts and holds these."""
    kind = Thumbs

    @property
    def thumbs(self):
        return self.pairs


def fixed_pairs(pairs, micro_pairs, max_pairs=0, rank=0, world_size=1):
    """Yields lists of numbers: the first max_pairs (0: all) of Pairs or Thumbs, each exactly once.

    Ranks take turns and all yield equally many lists, so that they meet as often; one with none left gets empty ones.
    """
    numbers = list(range(len(pairs)))[:max_pairs or None]
    for first in range(0, len(numbers), micro_pairs * world_size):
        yield numbers[first + rank * micro_pairs:first + (rank + 1) * micro_pairs]
