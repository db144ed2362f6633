"""Chats to tokens and masks on disk, and those to packed batches.

    python data.py --kind=chats --sources=alpaca.jsonl,task:gsm8k:gsm8k --tokenizer=out/pretrain --out_dir=data/chats

Written into out_dir, the files of the tokenizer beside them:

    train.h5  val.h5      tokens       (N,) uint16, or uint32 above 65536 pieces: as Tokenizer.encode_chat gives them
                          mask         (N,) uint8, 1 on what is trained: the assistant's text and its <|im_end|>
                          doc_offsets  (examples + 1,) int64: where each chat begins, and N
                          source       (examples,) uint8, an index into the attribute sources
                          attributes   fingerprint, vocab_size, pad_id, sources, examples, options

A chat is held out by the hash of its first question, so the same question never stands on both sides; a task's
questions, gsm8k's rows among them, by the task's own rule: its dev questions are held out. If nothing is held out that
way, the examples with the smallest hash are. No chat is ever cut.

Letters: B rows, T tokens of a row, N tokens of a split, E examples.
"""
import bisect
import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict

import numpy as np

from formats import parse_chats, split_weights
from sources import prepared
from tokenizer import MARKS, Tokenizer

CHUNK = 4000                  # chats encoded at once
WINDOW = 4096                 # examples packed together; more packs a little better, fewer mix more
COLOUR, PLAIN = "\x1b[32m", "\x1b[0m"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")          # a text must not command the terminal


# --------------------------------------------------------------------------------------------------------------------
# chats to files of tokens


def encode_chats(tokenizer, chats):
    """[(ids, mask)] of chats as tokenizer.encode_chat gives them, in arrays; all texts encoded at once on all cores."""
    specials = {mark: tokenizer.specials[mark] for mark in MARKS if mark in tokenizer.specials}
    split = re.compile(f"({'|'.join(specials) or '(?!)'})")
    start, end = tokenizer.specials["<|im_start|>"], tokenizer.chat_end_id
    parts, trained, bounds = [], [], [0]            # a part is a text or the id of a special
    for messages in chats:
        for message in messages:
            role, content = message["role"], message["content"]
            reply = role == "assistant"
            answer = [specials.get(part, part) for part in split.split(content) if part] if reply else []
            parts += [start, f"{role}\n" if reply else f"{role}\n{content}", *answer, end, "\n"]
            trained += [0, 0, *[1] * len(answer), reply, 0]
        bounds.append(len(parts))
    texts = list(dict.fromkeys(part for part in parts if isinstance(part, str)))
    encoded = dict(zip(texts, tokenizer.encode_batch(texts)))
    arrays = [encoded[part] if isinstance(part, str) else [part] for part in parts]
    sizes = np.array([len(array) for array in arrays])
    ids = np.concatenate(arrays).astype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    mask = np.repeat(np.array(trained, np.uint8), sizes)
    places = np.concatenate([[0], np.cumsum(sizes)])[bounds]
    return [(ids[a:b], mask[a:b]) for a, b in zip(places[:-1], places[1:])]


def examples(source, tokenizer, context, too_long, notes):
    """Yields (ids, mask, key, side) of the chats of a source that fit into the context; the others by the rule."""
    stream = source.chats(notes)
    while chunk := list(itertools.islice(stream, CHUNK)):
        for (_, key, side, place), (ids, mask) in zip(chunk, encode_chats(tokenizer, [chat[0] for chat in chunk])):
            if len(ids) <= context:
                yield ids, mask, key, side
            elif too_long == "error":
                raise ValueError(f"{place} is {len(ids):,} tokens long, which context={context} does not hold; raise "
                                 "--context, or leave such chats out with --too_long=drop")
            else:
                notes["longer than the context"] += 1


def mixed(streams, weights, max_examples):
    """Yields (index of the stream, example): each stream as far ahead in examples as its weight allows, up to
    max_examples (0: all). With weights all ends when the first runs out; without (None), each is taken to its end."""
    taken = dict.fromkeys(range(len(streams)), 0)
    for _ in range(max_examples) if max_examples else itertools.count():
        example = None
        while taken and example is None:
            index = min(taken, key=lambda index: taken[index] / (weights[index] or 1))
            example = next(streams[index], None)
            if example is None:
                if weights[index]:
                    return
                del taken[index]
        if example is None:
            return
        taken[index] += 1
        yield index, example


class ExampleFile:
    """Examples on their way to disk: a raw file first, as contiguous HDF5 must know its size, and the split comes last.
    keys, sides, sources and lengths hold an entry for each."""

    def __init__(self, folder, dtype):
        self.dtype = np.dtype(dtype)
        self.raw = {"tokens": tempfile.TemporaryFile(dir=folder), "mask": tempfile.TemporaryFile(dir=folder)}
        self.keys, self.sides, self.sources, self.lengths, self.trained = [], [], [], [], []

    def write(self, batch):
        """Adds [(source, (ids, mask, key, side))]."""
        for name, dtype, place in (("tokens", self.dtype, 0), ("mask", np.uint8, 1)):
            self.raw[name].write(np.concatenate([example[place] for _, example in batch]).astype(dtype).tobytes())
        for source, (ids, mask, key, side) in batch:
            for column, value in zip((self.keys, self.sides, self.sources, self.lengths, self.trained),
                                     (key, side, source, len(ids), int(mask.sum()))):
                column.append(value)

    def finish(self, path, chosen_E, attributes):
        """Writes the chosen examples as one HDF5 file; returns when it is on the disk."""
        import h5py
        lengths = np.array(self.lengths, np.int64)
        kept = np.concatenate([[0], np.cumsum(lengths[chosen_E])])
        with open(path, "w+b") as disk:                         # HDF5's own files crash where a disk is full
            with h5py.File(disk, "w") as file:
                for name, dtype in (("tokens", self.dtype), ("mask", np.dtype(np.uint8))):
                    stored, at = file.create_dataset(name, (kept[-1],), dtype), 0
                    self.raw[name].seek(0)
                    for first in range(0, len(lengths), WINDOW):
                        block = slice(first, first + WINDOW)
                        values = np.frombuffer(self.raw[name].read(lengths[block].sum() * dtype.itemsize), dtype)
                        values = values[np.repeat(chosen_E[block], lengths[block])]
                        stored[at:at + len(values)] = values
                        at += len(values)
                file.create_dataset("doc_offsets", data=kept)
                file.create_dataset("source", data=np.array(self.sources, np.uint8)[chosen_E])
                file.attrs.update(attributes, examples=int(chosen_E.sum()))
            disk.flush()
            os.fsync(disk.fileno())


def check_rules(val_fraction, flawed, context, max_examples, task_examples, **rules):
    """ValueError for an option that no data could be prepared with."""
    for name, rule in rules.items():
        if rule not in ("drop", "error"):
            raise ValueError(f"{name} is {rule!r}; it must be drop or error")
    if not 0 < val_fraction < 1 or not 0 <= flawed <= 1:
        raise ValueError(f"val_fraction must lie between 0 and 1 and flawed must be a share, got {val_fraction} and "
                         f"{flawed}")
    if context < 8 or max_examples < 0 or task_examples < 1:
        raise ValueError("context must be at least 8, max_examples 0 or more and task_examples 1 or more, got "
                         f"{context}, {max_examples} and {task_examples}")


def prepare(out_dir, sources, tokenizer="", val_fraction=0.05, invalid_utf8="error", overwrite=False, context=1024,
            max_examples=0, task_examples=10_000, flawed=0.0, unusable="drop", too_long="drop", malformed="error",
            seed=1337, show=0):
    """Writes train.h5, val.h5 and the tokenizer's files into out_dir, and prints what they hold and, of `show`
    examples, what is trained. Data that was prepared with the same options is only shown.

    As with text, all is written below out_dir/.unfinished and renamed at the end, train.h5 last; whatever goes wrong
    before that, out_dir is left as it was. ValueError of one sentence on bad input.
    """
    options = {name: value for name, value in locals().items() if name not in ("overwrite", "show", "out_dir")}
    started = time.perf_counter()
    if not tokenizer:
        raise ValueError("chats are encoded with the tokenizer of the model that will read them; name its folder, as "
                         "in --tokenizer=out/pretrain")
    tokenizer = Tokenizer.load(tokenizer)
    if show and not overwrite and os.path.exists(os.path.join(out_dir, "train.h5")):
        chats = Chats(out_dir, "train", tokenizer)
        if json.loads(chats.attributes["options"]) == options:
            return print_examples(chats, tokenizer, show)
    if os.path.exists(os.path.join(out_dir, "train.h5")) and not overwrite:
        raise ValueError(f"{out_dir} already holds data; pass --overwrite=true to replace it, or another --out_dir")
    if tokenizer.chat_end_id is None:
        raise ValueError(f"the tokenizer {options['tokenizer']} has no <|im_start|> and <|im_end|>, which chats need, "
                         f"but the specials {', '.join(tokenizer.specials) or 'none'}; take the folder of a model "
                         "trained here, or a chat model's")
    if invalid_utf8 not in ("error", "replace"):
        raise ValueError(f"invalid_utf8 is {invalid_utf8!r}; it must be error or replace")
    check_rules(val_fraction, flawed, context, max_examples, task_examples, unusable=unusable, too_long=too_long,
                malformed=malformed)
    corpus = parse_chats(sources, invalid_utf8=invalid_utf8, val_fraction=val_fraction, task_examples=task_examples,
                         flawed=flawed, seed=seed, unusable=unusable, malformed=malformed)
    if flawed and not any(source.task and not source.path for source in corpus):
        raise ValueError(f"flawed={flawed} is the share of a task's answers that are wrong on purpose, but {sources} "
                         "names no task that makes up questions")
    if all(source.endless for source in corpus) and not max_examples:
        raise ValueError(f"{sources} has no end: these tasks make up questions as long as they are asked; say how many "
                         "with --max_examples, or leave out the weights to take --task_examples of each")

    notes = [Counter() for _ in corpus]
    with prepared(out_dir) as unfinished:
        file = ExampleFile(unfinished, np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32)
        streams = [examples(source, tokenizer, context, too_long, note) for source, note in zip(corpus, notes)]
        stream = mixed(streams, [source.weight for source in corpus], max_examples)
        while batch := list(itertools.islice(stream, CHUNK)):
            file.write(batch)
        if not file.keys:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sum(notes, Counter()).items())
            raise ValueError(f"no row of {sources} can be used" + (f": {reasons}" if reasons else "; it holds none"))

        # which examples are held out
        keys = np.array(file.keys, np.uint64)
        place = np.array([{"train": 0, "val": 1, None: -1}[side] for side in file.sides])
        held_E = (place == 1) | (place == -1) & (keys < np.uint64(int(val_fraction * 2 ** 64)))
        if not held_E.any():
            held_E = keys == keys.min()
        if held_E.all():
            raise ValueError(f"all {len(keys):,} examples of {sources} are held out and none is left to train on; add "
                             "examples or lower --val_fraction")
        attributes = {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size,
                      "pad_id": tokenizer.eot_id if tokenizer.pad_id is None else tokenizer.pad_id,
                      "sources": json.dumps([source.name for source in corpus]), "options": json.dumps(options)}
        tokenizer.save(unfinished)
        for split, chosen_E in (("val", held_E), ("train", ~held_E)):
            file.finish(os.path.join(unfinished, f"{split}.h5"), chosen_E, attributes)

    # what came of it
    of, lengths, trained = np.array(file.sources), np.array(file.lengths), np.array(file.trained)
    for split, chosen_E in (("train", ~held_E), ("val", held_E)):
        print(f"{split}: {chosen_E.sum():,} examples, {lengths[chosen_E].sum():,} tokens, "
              f"{trained[chosen_E].sum():,} of them trained")
    for i, (source, note) in enumerate(zip(corpus, notes)):
        left_out = "".join(f"; {count:,} {reason}, dropped" for reason, count in note.items() if count)
        print(f"{source.name}: {(of == i).sum():,} examples ({(of == i).mean():.1%}), {trained[of == i].sum():,} "
              f"trained tokens{left_out}")
    print(f"{len(of):,} examples in {time.perf_counter() - started:.1f} s; next: python sft.py --data={out_dir}")
    if show:
        print_examples(Chats(out_dir, "train", tokenizer), tokenizer, show)


def print_examples(chats, tokenizer, count):
    """Prints examples spread over a split, trained tokens in colour on a terminal and in [[ ]] elsewhere."""
    on, off = (COLOUR, PLAIN) if sys.stdout.isatty() else ("[[", "]]")
    for e in np.unique(np.linspace(0, len(chats.lengths) - 1, count).astype(int)):
        where = slice(chats.offsets[e], chats.offsets[e + 1])
        tokens, mask = chats.tokens[where], chats.mask[where]
        print(f"\n--- example {e:,} of {chats.names[chats.source[e]]}: {len(tokens)} tokens, {mask.sum()} trained")
        for run in np.split(np.arange(len(mask)), np.flatnonzero(np.diff(mask.astype(int))) + 1):
            text = CONTROL.sub("\ufffd", tokenizer.decode(tokens[run]))
            print(f"{on}{text}{off}" if mask[run[0]] else text, end="")


# --------------------------------------------------------------------------------------------------------------------
# files of tokens to batches


class Chats:
    """A split on disk: tokens and mask (N,), both mapped from the file; offsets (E + 1,); source, lengths, targets
    (E,); names of the sources, pad_id, attributes. ValueError if the file is missing, cut short, not of chats, or of
    another tokenizer than the one given."""

    def __init__(self, folder, split, tokenizer=None):
        import h5py
        self.path = path = os.path.join(folder, f"{split}.h5")
        if not os.path.exists(path):
            raise ValueError(f"there is no {path}; name a folder that data.py wrote, as in python data.py --kind=chats "
                             f"--sources=FILES --tokenizer=MODEL --out_dir={folder}")
        holds_text = False
        try:
            with h5py.File(path, "r", locking=False) as file:
                self.attributes = dict(file.attrs)
                if holds_text := "mask" not in file and "tokens" in file:
                    raise KeyError
                arrays = {name: (file[name].dtype, file[name].id.get_offset(), file[name].shape)
                          for name in ("tokens", "mask")}
                self.offsets, self.source = file["doc_offsets"][:], file["source"][:]
            self.tokens, self.mask = (np.asarray(np.memmap(path, dtype, "r", offset, shape))
                                      for dtype, offset, shape in arrays.values())
            self.names, self.pad_id = json.loads(self.attributes["sources"]), int(self.attributes["pad_id"])
            fingerprint, pieces = self.attributes["fingerprint"], self.attributes["vocab_size"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            if holds_text:
                raise ValueError(f"{path} holds text and no chats; name another folder, which python data.py "
                                 "--kind=chats wrote") from None
            raise ValueError(f"{path} is cut short, or holds no chats ({str(error).splitlines()[0]}); write it again "
                             f"with python data.py --kind=chats --out_dir={folder} --overwrite=true") from None
        if tokenizer and fingerprint != tokenizer.fingerprint:
            raise ValueError(f"{path} was encoded with a tokenizer of {pieces} pieces (fingerprint {fingerprint}) but "
                             f"the one given has {tokenizer.vocab_size} ({tokenizer.fingerprint}); run data.py again "
                             "with --tokenizer of the model")
        self.lengths = np.diff(self.offsets)
        self.targets = np.add.reduceat(self.mask, self.offsets[:-1], dtype=np.int64) - self.mask[self.offsets[:-1]]
        if not self.targets.any():
            raise ValueError(f"{path} holds {len(self.lengths):,} examples and no trained token: its mask is empty; "
                             f"write it again with python data.py --kind=chats --out_dir={folder} --overwrite=true")

    def check_fit(self, context):
        """ValueError if an example is longer than the context: none is ever cut."""
        if (longest := self.lengths.max()) > context:
            raise ValueError(f"{self.path} holds {(self.lengths > context).sum():,} examples longer than context="
                             f"{context}, the longest of {longest:,} tokens; raise context, or prepare the data again "
                             f"with --context={context}")

    def weigh(self, weights):
        """(E,) float32 loss weights of the examples by their source, or None; {name: weight} or "name=weight,..."."""
        weights = dict(split_weights(weights)) if isinstance(weights, str) else dict(weights or {})
        if not weights:
            return None
        if wrong := [name for name in weights if name not in self.names]:
            raise ValueError(f"source_weights names {wrong[0]!r}, but the sources of {self.path} are "
                             f"{', '.join(self.names)}")
        if any(weight is None or not 0 <= weight < float("inf") for weight in weights.values()):
            raise ValueError(f"source_weights is {weights}; a weight is a number, at least 0, as in NAME=0.5")
        weights_E = np.array([weights.get(name, 1.0) for name in self.names], np.float32)[self.source]
        if not weights_E.any():
            raise ValueError(f"source_weights is {weights} and leaves no source of {self.path} to train on; give "
                             "one of them a weight above 0")
        return weights_E

    def assemble(self, rows, width, weights_E=None):
        """(ids (B, T), targets (B, T), weights (B, T) or None, cu_seqlens) of rows, lists of examples that fit in T.

        targets[t] is ids[t + 1] where that is trained and of the same example, else -100; weights are 0 where targets
        are -100. Every example is a document, and what is left of a row one more.
        """
        import torch  # not at the top: preparing data starts without it
        ids = np.full(len(rows) * width, self.pad_id, np.int64)
        targets = np.full(len(rows) * width, -100, np.int64)
        weights = None if weights_E is None else np.zeros(len(rows) * width, np.float32)
        bounds = [0]
        for row, picked in enumerate(rows):
            at = row * width
            for e in picked:
                start, end = self.offsets[e], self.offsets[e + 1]
                here = slice(at, at + end - start - 1)
                ids[at:at + end - start] = self.tokens[start:end]
                targets[here] = np.where(self.mask[start + 1:end], ids[at + 1:at + end - start], -100)
                if weights is not None:
                    weights[here] = self.mask[start + 1:end] * weights_E[e]
                at += end - start
                bounds.append(at)
            if at < (row + 1) * width:
                bounds.append((row + 1) * width)
        grid = [None if x is None else torch.from_numpy(x).view(len(rows), width) for x in (ids, targets, weights)]
        return *grid, torch.tensor(bounds, dtype=torch.int32)


def best_fit(lengths, order, context):
    """Rows of whole examples: of each WINDOW of the order, the longest first, each into the row where it leaves the
    least room, or into a new one. The decreasing best fit of Johnson (1973), at most 11/9 of the fewest rows."""
    rows = []
    for first in range(0, len(order), WINDOW):
        window = order[first:first + WINDOW]
        window = window[np.argsort(-lengths[window], kind="stable")]
        by_room, rooms = defaultdict(list), 0       # rows by the room left in them; bit n of rooms: some have n left
        for example, n in zip(window.tolist(), lengths[window].tolist()):
            fitting = rooms >> n
            if fitting:
                room = n + (fitting & -fitting).bit_length() - 1
                row = by_room[room].pop()
                rooms ^= (not by_room[room]) << room
            else:
                row, room = [], context
                rows.append(row)
            row.append(example)
            by_room[room - n].append(row)
            rooms |= 1 << room - n
    return rows


class ChatBatches:
    """Batches of packed chats, a pure function of (seed, step, micro), the same for any number of ranks.

    An epoch holds every example once, whole, packed anew in an order of its own; rows go on from one epoch into the
    next. packing=False puts one example into a row, padded to the longest of the micro-batch: for comparison.
    efficiency: real tokens per processed token in the first epoch.
    """

    def __init__(self, folder, split, rows_per_step, micro_rows, context, seed, rank=0, world_size=1, tokenizer=None,
                 packing=True, source_weights=None):
        if rows_per_step < 1 or rows_per_step % (micro_rows * world_size):
            raise ValueError(f"rows_per_step={rows_per_step} is not a multiple of micro_rows * ranks = {micro_rows} * "
                             f"{world_size}")
        self.chats = chats = Chats(folder, split, tokenizer)
        chats.check_fit(context)
        self.rows_per_step, self.micro_rows, self.context, self.seed = rows_per_step, micro_rows, context, seed
        self.rank, self.world_size, self.packing, self.attributes = rank, world_size, packing, chats.attributes
        self.weights_E = chats.weigh(source_weights)
        self.n_tokens, self.n_examples = len(chats.tokens), len(chats.lengths)
        fitting = int(np.searchsorted(np.cumsum(np.sort(chats.lengths)), context, "right")) if packing else 1
        self.most_documents = fitting + 1           # that a row can hold, what pads it being one
        self.packed, self.ends = {}, [0]            # rows of the latest epochs; rows up to the end of each epoch
        first = self.epoch_rows(0)
        if len(first) < rows_per_step:
            raise ValueError(f"{chats.path} holds {self.n_examples:,} examples in {len(first):,} rows of {context} "
                             f"tokens, fewer than one step of {rows_per_step} rows; add chats, or lower rows_per_step")
        self.ends.append(len(first))
        self.steps_per_epoch = len(first) / rows_per_step
        widths = [self.width(first[i:i + micro_rows]) for i in range(0, len(first), micro_rows)]
        sizes = [min(micro_rows, len(first) - i) for i in range(0, len(first), micro_rows)]
        self.efficiency = self.n_tokens / sum(width * size for width, size in zip(widths, sizes))

    def epoch_rows(self, epoch):
        """The rows, lists of examples, of one epoch."""
        if epoch not in self.packed:
            generator = np.random.default_rng((self.seed, epoch))
            order = generator.permutation(self.n_examples)
            if self.packing:
                rows = best_fit(self.chats.lengths, order, self.context)
                rows = [rows[i] for i in generator.permutation(len(rows))]
            else:
                rows = [[example] for example in order.tolist()]
            self.packed = {**{e: self.packed[e] for e in self.packed if e == epoch - 1}, epoch: rows}
        return self.packed[epoch]

    def reach(self, row):
        """Packs as many epochs as it takes to know which one a row of the whole run stands in."""
        while self.ends[-1] <= row:
            self.ends.append(self.ends[-1] + len(self.epoch_rows(len(self.ends) - 1)))

    def rows(self, step):
        """The step's rows, in the order (micro, rank, row); a step may reach into the next epoch."""
        first, last = step * self.rows_per_step, (step + 1) * self.rows_per_step
        self.reach(last - 1)
        rows = []
        while first < last:
            epoch = bisect.bisect_right(self.ends, first) - 1
            rows += self.epoch_rows(epoch)[first - self.ends[epoch]:last - self.ends[epoch]]
            first = min(last, self.ends[epoch + 1])
        return rows

    def width(self, rows):
        return self.context if self.packing else max(self.chats.lengths[row[0]] for row in rows)

    def __call__(self, step, micro):
        """(ids, targets (B, T), weights (B, T) or None, cu_seqlens) of one rank's micro-batch; see Chats.assemble."""
        first = (micro * self.world_size + self.rank) * self.micro_rows
        rows = self.rows(step)[first:first + self.micro_rows]
        return self.chats.assemble(rows, self.width(rows), self.weights_E)

    def targets_in_step(self, step, weighted=True):
        """Targets of the whole step, each times its weight, over all micro-batches and ranks: its one denominator."""
        picked = [example for row in self.rows(step) for example in row]
        counts = self.chats.targets[picked]
        if self.weights_E is None or not weighted:
            return int(counts.sum())
        return float(counts @ self.weights_E[picked].astype(float))

    def epoch(self, step):
        """Epochs done before `step`, with fraction."""
        first = step * self.rows_per_step
        self.reach(first)
        epoch = bisect.bisect_right(self.ends, first) - 1
        return epoch + (first - self.ends[epoch]) / (self.ends[epoch + 1] - self.ends[epoch])


def fixed_chats(folder, split, context, micro_rows, max_examples=0, rank=0, world_size=1, tokenizer=None):
    """Yields (ids, targets, None, cu_seqlens): the first max_examples examples (0: all), packed, each exactly once.

    Ranks take turns and all yield the same number of batches, so that they meet as often; one with no row left gets a
    row without targets.
    """
    chats = Chats(folder, split, tokenizer)
    chats.check_fit(context)
    rows = best_fit(chats.lengths, np.arange(len(chats.lengths))[:max_examples or None], context)

    def batches():
        for first in range(0, len(rows), micro_rows * world_size):
            mine = rows[first + rank * micro_rows:first + (rank + 1) * micro_rows]
            yield chats.assemble(mine or [[]], context)
    return batches()
