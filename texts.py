"""Documents to tokens on disk, and tokens on disk to batches of packed rows.

Every document begins with <|endoftext|>, which is at once the start of its text and the end of the one before: each
token has a target, and generation starts from it. Written into a folder, the files of the tokenizer beside them:

    train.h5  val.h5      tokens       (N,) uint16, or uint32 above 65536 pieces; contiguous, mapped and never loaded
                          doc_offsets  (documents + 1,) int64: where each begins, and N
                          attributes   fingerprint and vocab_size of the tokenizer, text_bytes, documents, options

A document is held out by the hash of its content, so the same text never stands on both sides, whatever the order. If
a small corpus has none that the hash holds out, the one with the smallest hash is. A corpus of a single document is cut
instead: its last val_fraction is held out.

Letters: B rows, T tokens of context, N tokens of a split.
"""
import functools
import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sources import BLOCK, mix, parse_sources, prepared

SMALL = 16 << 20              # bytes of text in a small corpus


# --------------------------------------------------------------------------------------------------------------------
# documents to files of tokens


class Progress:
    """Bytes, tokens and tokens/s: a bar on a terminal, elsewhere a line every 30 s."""

    def __init__(self, corpus, max_bytes):
        from tqdm import tqdm
        self.corpus, self.max_bytes = corpus, max_bytes
        self.started = self.last_line = time.perf_counter()
        self.text_bytes = self.tokens = 0
        self.bar = tqdm(total=1.0, disable=not sys.stderr.isatty(),
                        bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}")

    def add(self, text_bytes, tokens):
        self.text_bytes += text_bytes
        self.tokens += tokens
        done = [sum(source.read.values()) / source.disk_bytes for source in self.corpus if source.disk_bytes]
        done = min(1.0, max(done + [self.text_bytes / self.max_bytes if self.max_bytes else 0.0]))
        now = time.perf_counter()
        said = (f"{self.text_bytes / 1e6:,.0f} MB, {self.tokens / 1e6:,.1f} M tokens, "
                f"{self.tokens / (now - self.started) / 1e6:.2f} M tokens/s")
        self.bar.set_postfix_str(said, refresh=False)
        self.bar.update(done - self.bar.n)
        if self.bar.disable and now - self.last_line > 30:
            self.last_line = now
            print(f"{done:.0%}, {said}", file=sys.stderr, flush=True)


class TokenWriter:
    """Tokens of one split on their way to disk: raw files first, because contiguous HDF5 must know its size."""

    def __init__(self, folder, tokenizer):
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32)
        self.eot = np.array([tokenizer.eot_id], self.dtype)
        self.raw_tokens, self.raw_offsets = (tempfile.TemporaryFile(dir=folder) for _ in range(2))
        self.tokens = self.documents = self.text_bytes = 0

    def write(self, pieces):
        """Adds [(whether a document begins, its ids, bytes of text)]."""
        arrays, offsets = [], []
        for begins, ids, text_bytes in pieces:
            if begins:
                offsets.append(self.tokens)
                arrays.append(self.eot)
            arrays.append(ids)
            self.tokens += begins + len(ids)
            self.text_bytes += text_bytes
        self.documents += len(offsets)
        if arrays:
            self.raw_tokens.write(np.concatenate(arrays).astype(self.dtype, copy=False).tobytes())
            self.raw_offsets.write(np.array(offsets, np.int64).tobytes())

    def finish(self, path, attributes):
        """Copies the raw files block by block into one HDF5 file; returns when it is on the disk."""
        import h5py
        self.raw_offsets.write(np.int64(self.tokens).tobytes())
        with open(path, "w+b") as disk:                         # HDF5's own files crash where a disk is full
            with h5py.File(disk, "w") as file:
                for name, raw, dtype in (("tokens", self.raw_tokens, self.dtype),
                                         ("doc_offsets", self.raw_offsets, np.dtype(np.int64))):
                    size = raw.tell() // dtype.itemsize
                    stored = file.create_dataset(name, (size,), dtype)
                    raw.seek(0)
                    for start in range(0, size, BLOCK):
                        stored[start:start + BLOCK] = np.frombuffer(raw.read(BLOCK * dtype.itemsize), dtype)
                file.attrs.update(attributes, text_bytes=self.text_bytes, documents=self.documents)
            disk.flush()
            os.fsync(disk.fileno())


def survey(corpus, max_bytes):
    """(documents, smallest key, characters) of a corpus that is small or a single document, else None."""
    documents = characters = text_bytes = 0
    smallest, notes = 2 ** 64, Counter()
    for key, text, size in mix(corpus, max_bytes, notes):
        if key is not None:
            documents, smallest = documents + 1, min(smallest, key)
        characters, text_bytes = characters + len(text), text_bytes + size
        if documents > 1 and text_bytes > SMALL:
            return None
    if not documents:
        raise ValueError(f"there is no text in {', '.join(source.name for source in corpus)}"
                         + "".join(f"; {count:,} {reason}" for reason, count in notes.items() if count))
    return documents, smallest, characters


def split_pieces(pieces, side_of, cut=None):
    """Yields (split, whether a document begins, text) of mix(): by side_of(key), which is "train", "val" or None, or
    by the place in the text if the corpus is one document, of which the first `cut` characters are for training."""
    seen, side = 0, None
    for key, text, _ in pieces:
        if cut is None:
            side = side_of(key) if key is not None else side
            if side:
                yield side, key is not None, text
            continue
        head, tail = text[:max(0, cut - seen)], text[max(0, cut - seen):]
        if head:
            yield "train", seen == 0, head
        if tail:
            yield "val", seen <= cut, tail
        seen += len(text)


def encode(pieces, tokenizer, writers, progress):
    """Writes what split_pieces() yields as tokens. While all cores encode one batch, the next is read and hashed."""
    def write(batch, encoded):
        sizes = [len(text.encode()) for _, _, text in batch]
        for split, writer in writers.items():
            writer.write([(begins, ids, size) for (side, begins, _), ids, size in zip(batch, encoded.result(), sizes)
                          if side == split])
        progress.add(sum(sizes), sum(map(len, encoded.result())))

    batch, characters, running = [], 0, None
    with ThreadPoolExecutor(1) as pool:
        for split, begins, text in itertools.chain(pieces, [(None, False, "")]):    # the last one ends the last batch
            if split:
                batch.append((split, begins, text))
                characters += len(text)
            if batch and (characters >= 8 << 20 or not split):
                submitted = batch, pool.submit(tokenizer.encode_batch, [text for _, _, text in batch])
                if running:
                    write(*running)
                batch, characters, running = [], 0, submitted
        if running:
            write(*running)
    progress.bar.close()


def prepare(out_dir, sources, val_sources="", val_fraction=0.05, max_bytes=0, text_column="text", invalid_utf8="error",
            tokenizer="", tokenizer_kind="bpe", vocab_size=4096, tokenizer_bytes=20_000_000, overwrite=False):
    """Writes train.h5, val.h5 and the tokenizer into out_dir, and prints what they hold.

    All is written below out_dir/.unfinished and renamed at the end, train.h5 last: where it stands, the data is
    complete. Whatever goes wrong before that, out_dir is left as it was. ValueError of one sentence on bad input.
    """
    options = dict(locals())
    from tokenizer import KINDS, Tokenizer
    started = time.perf_counter()
    if os.path.exists(os.path.join(out_dir, "train.h5")) and not overwrite:
        raise ValueError(f"{out_dir} already holds data; pass --overwrite=true to replace it, or another --out_dir")
    if invalid_utf8 not in ("error", "replace"):
        raise ValueError(f"invalid_utf8 is {invalid_utf8!r}; it must be error or replace")
    if tokenizer_kind not in KINDS:
        raise ValueError(f"tokenizer_kind is {tokenizer_kind!r}; it must be {' or '.join(KINDS)}")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; it must lie between 0 and 1")
    corpus = parse_sources(sources, text_column, invalid_utf8)
    held_out = parse_sources(val_sources, text_column, invalid_utf8) if val_sources else []
    tokenizer = Tokenizer.load(tokenizer) if tokenizer else None
    with prepared(out_dir) as unfinished:
        # which documents are held out
        notes, cut, threshold = Counter(), None, int(val_fraction * 2 ** 64)
        if held_out:
            survey(held_out, 0)
            held_keys = {key for key, _, _ in mix(held_out, 0, Counter())}
        else:
            documents, smallest, characters = survey(corpus, max_bytes) or (None, 0, 0)
            threshold = max(threshold, smallest + 1)
            cut = int(characters * (1 - val_fraction)) if documents == 1 else None

        def side_of(key):
            if not held_out:
                return "val" if key < threshold else "train"
            if key not in held_keys:
                return "train"
            notes["documents dropped that val_sources holds too"] += 1

        # the tokenizer never sees what is held out
        if tokenizer is None:
            before = time.perf_counter()
            pieces = split_pieces(mix(corpus, max_bytes, Counter()), side_of, cut)
            tokenizer = Tokenizer.train(training_texts(pieces, tokenizer_bytes), vocab_size, tokenizer_kind)
            print(f"tokenizer: {tokenizer.vocab_size:,} pieces, trained in {time.perf_counter() - before:.1f} s")
            notes.clear()                                       # side_of counts again below

        # tokens
        before = time.perf_counter()
        writers = {split: TokenWriter(unfinished, tokenizer) for split in ("train", "val")}
        if held_out:
            pieces = split_pieces(mix(held_out, 0, notes), lambda key: "val")
            encode(pieces, tokenizer, writers, Progress(held_out, 0))
        pieces = split_pieces(mix(corpus, max_bytes, notes), side_of, cut)
        encode(pieces, tokenizer, writers, Progress(corpus, max_bytes))
        for split, words in (("train", "left to train on; lower"), ("val", "held out; raise")):
            if not writers[split].documents:
                raise ValueError(f"no document of {sources} is {words} --val_fraction={val_fraction}, or name held-out "
                                 "text with --val_sources")

        # final names
        attributes = {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size,
                      "options": json.dumps(options)}
        tokenizer.save(unfinished)
        for split, writer in writers.items():
            writer.finish(os.path.join(unfinished, f"{split}.h5"), attributes)
        seconds = time.perf_counter() - before

    # what came of it
    for split, writer in writers.items():
        print(f"{split}: {writer.documents:,} documents, {writer.text_bytes / 1e6:,.2f} MB, {writer.tokens:,} tokens, "
              f"{writer.text_bytes / max(1, writer.tokens - writer.documents):.2f} bytes per token")
    total, weights = sum(source.text_bytes for source in corpus), sum(source.weight or 0 for source in corpus)
    for source in corpus if weights else ():
        print(f"{source.name}: {source.text_bytes / total:.1%} of the bytes, {source.weight / weights:.1%} asked for"
              + ", ran out first" * source.ran_out)
    for reason, count in notes.items():
        if count:
            print(f"{count:,} {reason}")
    print(f"{total / 1e6:,.1f} MB in {time.perf_counter() - started:.1f} s, encoded and written at "
          f"{total / 1e6 / seconds:.1f} MB/s; next: python pretrain.py --data={out_dir}")


def training_texts(pieces, limit):
    """Yields the training side's texts until they hold `limit` characters."""
    for split, _, text in pieces:
        if split == "train":
            yield text[:limit]
            limit -= len(text)
            if limit <= 0:
                return


# --------------------------------------------------------------------------------------------------------------------
# files of tokens to batches


def open_tokens(folder, split, tokenizer=None):
    """(tokens (N,), doc_offsets (documents + 1,), attributes) of folder/split.h5, both mapped from the file.

    ValueError if the file is missing, cut short, or was encoded with another tokenizer than the one given.
    """
    import h5py
    path, holds_chats = os.path.join(folder, f"{split}.h5"), False
    if not os.path.exists(path):
        raise ValueError(f"there is no {path}; name a folder that data.py wrote, as in python data.py --sources=FILES "
                         f"--out_dir={folder}")
    try:
        with h5py.File(path, "r", locking=False) as file:
            holds_chats, attributes = "mask" in file, dict(file.attrs)
            pieces, fingerprint = attributes["vocab_size"], attributes["fingerprint"]
            places = [(file[name].dtype, file[name].id.get_offset(), file[name].shape) for name in
                      ("tokens", "doc_offsets")]
        arrays = [np.asarray(np.memmap(path, dtype, "r", offset, shape)) for dtype, offset, shape in places]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is cut short, or was not written by data.py ({str(error).splitlines()[0]}); "
                         f"write it again with python data.py --out_dir={folder} --overwrite=true") from None
    if holds_chats:
        raise ValueError(f"{path} holds chats and no text; sft.py trains on those, and text is a folder of its own")
    if tokenizer and fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{path} was encoded with a tokenizer of {pieces} pieces (fingerprint {fingerprint}) but the "
                         f"one given has {tokenizer.vocab_size} ({tokenizer.fingerprint}); run data.py again with "
                         "--tokenizer of the model")
    return *arrays, attributes


def gather_rows(tokens, starts_B, repeated_B, context, doc_offsets=None):
    """(ids (B, T), targets (B, T), cu_seqlens) of rows that begin at starts_B; the first repeated_B targets are -100.

    Without doc_offsets cu_seqlens is None.
    """
    import torch  # not at the top: preparing data starts without it
    rows = np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[starts_B]
    ids_BT, targets_BT = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
    for row in np.flatnonzero(repeated_B):
        targets_BT[row, :repeated_B[row]] = -100
    bounds = None if doc_offsets is None else torch.from_numpy(document_bounds(doc_offsets, starts_B, context))
    return torch.from_numpy(ids_BT), torch.from_numpy(targets_BT), bounds


def document_bounds(doc_offsets, starts_B, context):
    """int32 offsets of documents in the flattened (B*T) ids of rows that begin at starts_B; row ends are bounds too."""
    first_B = np.searchsorted(doc_offsets, starts_B, "right")
    count_B = np.searchsorted(doc_offsets, starts_B + context, "left") - first_B
    row = np.repeat(np.arange(len(starts_B)), count_B)
    which = np.arange(len(row)) - (np.cumsum(count_B) - count_B)[row] + first_B[row]
    inside = doc_offsets[which] - starts_B[row] + row * context
    return np.sort(np.concatenate([np.arange(len(starts_B) + 1) * context, inside])).astype(np.int32)


class TextBatches:
    """Batches of packed text, a pure function of (seed, step, micro), the same for any number of ranks.

    Row i of an epoch is tokens [i*T, i*T + T) and their successors as targets. The last row is moved back to be full,
    and its targets that the row before it has are -100: an epoch holds every target once, in an order of its own.
    """

    def __init__(self, folder, split, rows_per_step, micro_rows, context, seed, rank=0, world_size=1,
                 mask_documents=False, tokenizer=None):
        if rows_per_step < 1 or rows_per_step % (micro_rows * world_size):
            raise ValueError(f"rows_per_step={rows_per_step} is not a multiple of micro_rows * ranks = {micro_rows} * "
                             f"{world_size}")
        self.tokens, doc_offsets, self.attributes = open_tokens(folder, split, tokenizer)
        self.doc_offsets = doc_offsets if mask_documents else None
        self.rows_per_step, self.micro_rows, self.context, self.seed = rows_per_step, micro_rows, context, seed
        self.rank, self.world_size, self.n_tokens = rank, world_size, len(self.tokens)
        self.tokens_per_epoch = self.n_tokens - 1               # the first token is no target
        self.n_rows_per_epoch = -(-self.tokens_per_epoch // context)
        if self.tokens_per_epoch < context or self.n_rows_per_epoch < rows_per_step:
            raise ValueError(f"{folder}/{split}.h5 holds {self.n_tokens:,} tokens, fewer than one step of "
                             f"{rows_per_step} rows * {context} tokens; add text, or lower rows_per_step or context")
        self.repeated = self.n_rows_per_epoch * context - self.tokens_per_epoch     # -100 in the last row
        self.steps_per_epoch = self.n_rows_per_epoch / rows_per_step
        self.orders, self.latest = {}, (None, None)

    @functools.cached_property
    def most_documents(self):
        """The most documents, or parts of them, that a row holds; 1 where documents see each other."""
        if self.doc_offsets is None:
            return 1
        starts_R = np.minimum(np.arange(self.n_rows_per_epoch) * self.context, self.tokens_per_epoch - self.context)
        ends_R = np.searchsorted(self.doc_offsets, starts_R + self.context, "left")
        return int((ends_R - np.searchsorted(self.doc_offsets, starts_R, "right")).max()) + 1

    def read(self, first, n):
        """Indices of the n rows from number `first` on, counted over all epochs."""
        epochs, position = np.divmod(np.arange(first, first + n), self.n_rows_per_epoch)
        needed = range(epochs[0], epochs[-1] + 1)
        self.orders = {epoch: self.orders[epoch] if epoch in self.orders else
                       np.random.default_rng((self.seed, epoch)).permutation(self.n_rows_per_epoch)
                       for epoch in needed}
        return np.concatenate([self.orders[epoch][position[epochs == epoch]] for epoch in needed])

    def rows(self, step):
        """Indices of the step's rows, in the order (micro, rank, row); a step may reach into the next epoch."""
        if self.latest[0] != step:
            self.latest = step, self.read(step * self.rows_per_step, self.rows_per_step)
        return self.latest[1]

    def gather(self, rows_B):
        """(ids (B, T), targets (B, T), cu_seqlens or None) of rows by their indices; -100 where there is no target."""
        last_B = rows_B == self.n_rows_per_epoch - 1
        starts_B = np.where(last_B, self.tokens_per_epoch - self.context, rows_B * self.context)
        return gather_rows(self.tokens, starts_B, last_B * self.repeated, self.context, self.doc_offsets)

    def __call__(self, step, micro):
        """What gather() says of one rank's micro-batch."""
        return self.gather(self.rows(step).reshape(-1, self.world_size, self.micro_rows)[micro, self.rank])

    def targets_in(self, rows):
        """How many targets of these rows are not -100."""
        return len(rows) * self.context - int(np.count_nonzero(rows == self.n_rows_per_epoch - 1)) * self.repeated

    def targets_in_step(self, step):
        """Targets of the whole step that are not -100, over all micro-batches and ranks: its one denominator."""
        return self.targets_in(self.rows(step))

    def epoch(self, step):
        """Epochs done before `step`, with fraction."""
        return step / self.steps_per_epoch


def fixed_rows(folder, split, context, micro_rows, max_tokens=0, rank=0, world_size=1, mask_documents=False,
               tokenizer=None):
    """Yields (ids, targets, cu_seqlens or None): the first max_tokens targets (0: all) in order, each exactly once.

    Repeated or missing targets are -100, a split shorter than a row is filled with <|endoftext|>. Ranks take turns and
    all yield the same number of batches, so that they meet as often; one with no row left gets a row without targets.
    """
    tokens, doc_offsets, _ = open_tokens(folder, split, tokenizer)
    n_targets = min(len(tokens) - 1, max_tokens or len(tokens))
    if n_targets < context:                                     # every split begins with <|endoftext|>
        doc_offsets = np.append(doc_offsets[doc_offsets <= n_targets], n_targets + 1)
        tokens = np.append(tokens[:n_targets + 1], np.full(context - n_targets, tokens[0]))
    n_rows = -(-n_targets // context)

    def batches():
        for first in range(0, n_rows, micro_rows * world_size):
            rows_B = np.arange(first + rank * micro_rows, min(first + (rank + 1) * micro_rows, n_rows))
            starts_B = np.minimum(rows_B * context, max(0, n_targets - context))
            repeated_B = rows_B * context - starts_B
            if len(rows_B) == 0:
                starts_B, repeated_B = np.array([0]), np.array([context])
            ids_BT, targets_BT, cu_seqlens = gather_rows(tokens, starts_B, repeated_B, context,
                                                         doc_offsets if mask_documents else None)
            targets_BT[:, n_targets:] = -100                    # the fill of a split shorter than a row
            yield ids_BT, targets_BT, cu_seqlens
    return batches()
