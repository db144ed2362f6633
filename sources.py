"""Text from anywhere as documents: files of every common kind, the standard library, hub datasets; mixed by weight.

    corpus = parse_sources("stdlib=0.3,books/*.jsonl.gz=0.7", "text", "error")
    for key, text, n_bytes in mix(corpus, max_bytes=0, notes=Counter()): ...

A document is a text file, a row of a .jsonl .json .parquet file or of a hub dataset, or a module of the standard
library. Long documents come in pieces, so that memory stays flat. `notes` counts by reason what was left out.
"""
import codecs
import contextlib
import glob
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sysconfig
import tokenize
import zlib
from collections import Counter

EXTENSIONS = (".txt", ".md", ".py", ".jsonl", ".json", ".parquet")
BLOCK = 1 << 20               # bytes read, and tokens copied, at once
PREFIX = 1 << 18              # characters of a document that decide on which side it stands; at most half a block
TURN = 1 << 18                # bytes of text taken from a file before the next one's turn
SEPARATOR = re.compile(r"^<\|endoftext\|>\r?(?:\n|\Z)", re.M)
BETWEEN_WORDS = re.compile(r"\S(?= \S)|\S\n(?=\S)")


def content_key(data):
    """64-bit hash of bytes, the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def decoded_blocks(path, invalid_utf8, notes):
    """Yields (text, bytes read from disk, whether it is the last) of a UTF-8 file, plain or .gz, without its BOM."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if path.lower().endswith(".gz") else raw
        end, block = 0, None
        while block != b"":
            first, block = block is None, file.read(BLOCK)
            end += len(block)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                data = error.object
                if invalid_utf8 == "error":
                    raise ValueError(f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset "
                                     f"{end - len(data) + error.start:,}; convert the file, or pass "
                                     "--invalid_utf8=replace to put U+FFFD there") from None
                decoder.errors = "replace"
                text = decoder.decode(block, final=not block)
                decoder.errors = "strict"
                notes["invalid UTF-8 sequences replaced"] += text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
            yield text[1:] if first and text.startswith("\ufeff") else text, raw.tell(), not block


def text_documents(path, invalid_utf8, notes):
    """Yields (document number, text, bytes read): one document a file, or in .txt several between <|endoftext|> lines.

    Memory stays flat: a document longer than a block comes in several pieces with the same number, cut where that
    changes no token, between two words or lines.
    """
    number, pending = 0, ""
    for text, read, last in decoded_blocks(path, invalid_utf8, notes):
        pending += text
        if not last and (len(pending) <= BLOCK or pending.endswith(("<|endoftext|>", "<|endoftext|>\r"))):
            continue
        several = "<|endoftext|>" in pending and extension(path) == ".txt"
        parts = SEPARATOR.split(pending) if several else [pending]
        pending = "" if last else parts.pop()
        for part in parts:
            if part or not several:
                yield number, part, read
            number += 1
        if len(pending) > BLOCK:
            place = BETWEEN_WORDS.search(pending, len(pending) // 2)
            cut = place.end() if place else len(pending) // 2
            yield number, pending[:cut], read
            pending = pending[cut:]


def json_rows(path, invalid_utf8, notes):
    """Yields (row, row number, bytes read) of a .jsonl or .json file: values one after another, or one array."""
    return json_values(decoded_blocks(path, invalid_utf8, notes), path)


def json_values(blocks, path, limit=0):
    """Yields (row, row number, bytes read) of (text, bytes read, whether it is the last); ValueError if it is no JSON.

    Parsed while it is read: memory holds a block and the longest row; with a limit, one of so many characters at most.
    """
    decode, gap, in_array = json.JSONDecoder().raw_decode, re.compile(r"\s*"), None
    pending, wanted, number = "", 0, 0
    for text, read, last in blocks:
        pending += text
        if limit and len(pending) > limit + 2 * BLOCK:
            raise ValueError(f"row {number + 1:,} of {path} is longer than {limit:,} characters; remove it")
        if len(pending) < wanted and not last:          # inside a long row: try again when there is twice as much
            continue
        at = gap.match(pending).end()
        if in_array is None and at < len(pending):
            in_array = pending[at] == "["
            gap, at = re.compile(r"[\s,]*" if in_array else r"\s*"), at + in_array
        while (at := gap.match(pending, at).end()) < len(pending):
            if in_array and pending[at] == "]":
                in_array, gap, at = False, re.compile(r"\s*"), at + 1
                continue
            try:
                row, at = decode(pending, at)
            except (ValueError, RecursionError) as error:
                unfinished = "Unterminated" in str(error) or getattr(error, "pos", 0) > len(pending) - 100
                if unfinished and not last:
                    break
                raise ValueError(f"row {number + 1:,} of {path} is not JSON ({error}); the file may be cut off: fetch "
                                 "it again or remove the row") from None
            number += 1
            yield row, number, read
        pending = pending[at:]
        wanted = 2 * len(pending)
    if in_array:
        raise ValueError(f"{path} is cut off after row {number:,}: its array is not closed; fetch it again")


def parquet_rows(path, columns):
    """Yields (row, row number, bytes read so far, about) of a .parquet file, of which only the text is read."""
    import pyarrow
    import pyarrow.parquet
    number, size = 0, os.path.getsize(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            name = next((column for column in columns if column in names), None)
            if name is None:
                yield dict.fromkeys(names), 1, 0        # row_text will say which columns there are
            for batch in file.iter_batches(batch_size=1000, columns=[name]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield {name: text}, number, size * number // file.metadata.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or not parquet ({str(error).splitlines()[0]}); fetch it again") from None


def row_text(row, columns, number, name):
    """The text of a row, "" if it is null; ValueError that names the columns seen if it has none."""
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise ValueError(f"row {number:,} of {name} is {row!r:.40}; a row is a string or an object with a text column")
    column = next((column for column in columns if column in row), None)
    if column is None:
        raise ValueError(f"row {number:,} of {name} has no column {' or '.join(columns)}; it has "
                         f"{', '.join(map(str, row)) or 'none'}; name the one that holds text with --text_column")
    if not isinstance(row[column], (str, type(None))):
        raise ValueError(f"column {column} of {name} holds {row[column]!r:.40} in row {number:,}, not a text; name the "
                         "one that does with --text_column")
    return row[column] or ""


def extension(path):
    """'books.JSONL.gz' -> '.jsonl'"""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def find_files(name, known=EXTENSIONS, extension=extension):
    """Files of a source that is not on the hub, in the order of hashes of their names: the head is a fair sample."""
    root, avoid = name, {"__pycache__"}
    if name == "stdlib":
        root, known = sysconfig.get_paths()["stdlib"], (".py",)
        avoid = {"site-packages", "dist-packages", "test", "tests", "idle_test"}    # not every system has the tests
    if os.path.isdir(root):
        found = []
        for folder, folders, files in os.walk(root):
            folders[:] = [f for f in folders if f not in avoid and not f.startswith(".")]
            found += [os.path.join(folder, f) for f in files if extension(f) in known and not f.startswith(".")]
        if not found:
            raise ValueError(f"{root} holds no file of type {' '.join(known)}")
    else:
        found = [name] if os.path.exists(name) else [f for f in glob.glob(name, recursive=True) if os.path.isfile(f)]
        if not found:
            raise ValueError(f"there is no source {name!r}: no file or folder of this name and no glob that matches; "
                             f"other sources are stdlib and, for a hub dataset, hub:{name}")
        unknown = [f for f in found if extension(f) not in known]
        if unknown:
            raise ValueError(f"{unknown[0]} is of no type that can be read; those are {' '.join(known)}, also with .gz")
    return sorted(found, key=lambda f: (content_key(os.path.basename(f).encode("utf-8", "surrogateescape")), f))


class Source:
    """One entry of `sources`, and how much of it was read since mix() last began."""

    def __init__(self, name, weight, columns, invalid_utf8):
        self.name, self.weight, self.columns, self.invalid_utf8 = name, weight, columns, invalid_utf8
        self.files, self.dataset = [name] if name.startswith("hub:") else find_files(name), None
        self.sizes = {path: 0 if name.startswith("hub:") else os.path.getsize(path) for path in self.files}
        self.disk_bytes = sum(self.sizes.values())

    def documents(self, notes):
        """Yields each document as an iterator of pieces (number, text). Sixteen files are read in turns, of equal
        parts of their sizes, so that the head of a source resembles the whole."""
        waiting, streams = iter(self.files), {}
        while True:
            for path in itertools.islice(waiting, 16 - len(streams)):
                streams[path] = itertools.groupby(self.pieces(path, notes), key=lambda piece: piece[0])
            if not streams:
                return
            path = min(streams, key=lambda path: self.read[path] / max(1, self.sizes[path]))
            streams[path] = streams.pop(path)                   # of equals the one that waited longest is next
            turn_ends = self.text_bytes + TURN                  # mix() counts
            while self.text_bytes < turn_ends:
                _, document = next(streams[path], (None, None))
                if document is None:
                    del streams[path]
                    break
                yield document

    def pieces(self, path, notes):
        """Yields (document number, text) of one file or hub dataset."""
        suffix = extension(path)
        try:
            if self.name == "stdlib":
                with tokenize.open(path) as file:               # honours a module's coding line
                    yield 0, file.read()
            elif suffix in (".txt", ".md", ".py"):
                for number, text, read in text_documents(path, self.invalid_utf8, notes):
                    self.read[path] = read
                    yield number, text
            else:
                rows = (self.hub_rows() if self.name.startswith("hub:") else
                        parquet_rows(path, self.columns) if suffix == ".parquet" else
                        json_rows(path, self.invalid_utf8, notes))
                for row, number, read in rows:
                    self.read[path] = read
                    yield number, row_text(row, self.columns, number, path)
        except (SyntaxError, UnicodeDecodeError):
            notes["undecodable modules of the standard library skipped"] += 1
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is cut off or damaged ({error}); fetch or compress it again") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None
        self.read[path] = self.sizes[path]

    def hub_rows(self):
        _, name, config, split = (self.name.split(":") + ["", ""])[:4]
        try:
            if self.dataset is None:
                import datasets
                self.dataset = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
            for number, row in enumerate(self.dataset, 1):
                yield row, number, 0
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ValueError(f"hub dataset {name} cannot be read ({type(error).__name__}: {reason:.300}); check the "
                             "network, and the name as in hub:ID:CONFIG:SPLIT") from None


def names_and_weights(text, option="sources"):
    """[(name, weight or None)]: "a.txt=0.7,b=0.3" is two with weights, "a.txt,b" two without. An = in a file's name is
    no weight. ValueError, which names the option, if there are none, or some with a weight and some without."""
    parsed = []
    for item in filter(None, map(str.strip, text.split(","))):
        name, _, number = item.rpartition("=")
        weighted = re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", number) and not os.path.exists(item)
        parsed.append((name, float(number)) if weighted and name else (item, None))
        if weighted and not 0 < float(number) < math.inf:
            raise ValueError(f"the weight of source {name} is {number}; it must be above 0 and finite")
    if not parsed:
        raise ValueError(f"{option} is {text!r} and names none" + "; try --sources=stdlib" * (option == "sources"))
    if len({weight is None for _, weight in parsed}) > 1:
        raise ValueError(f"some sources have a weight and some have none: {text!r}; give one to all or to none")
    return parsed


def parse_sources(text, text_column, invalid_utf8):
    """[Source] of names, with weights or without."""
    columns = [column.strip() for column in text_column.split(",")]
    return [Source(name, weight, columns, invalid_utf8) for name, weight in names_and_weights(text)]


def mix(corpus, max_bytes, notes):
    """Yields (key, text, bytes): documents of all sources, each as far ahead in bytes as its share allows.

    With weights these are the shares, and all ends when the first source runs out. Without, they are the sizes on disk,
    and all is taken. `key` is the hash of the document (of its PREFIX), None for further pieces of a long one.
    """
    sizes = [source.disk_bytes for source in corpus if source.disk_bytes]
    share = {source: source.weight or source.disk_bytes or sum(sizes) / max(1, len(sizes)) or 1 for source in corpus}
    streams, total = {source: source.documents(notes) for source in corpus}, 0
    for source in corpus:
        source.text_bytes, source.read, source.ran_out = 0, Counter(), False
    while streams:
        source = min(streams, key=lambda source: source.text_bytes / share[source])
        document = next(streams[source], None)
        if document is None:
            source.ran_out = True
            if source.weight:
                return
            del streams[source]
            continue
        begun = False
        for _, text in document:
            if not begun and (not text or text.isspace()):
                continue
            try:
                data = text.encode()
            except UnicodeEncodeError:
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                data = text.encode()
                notes["documents with lone surrogates replaced"] += 1
            key = None if begun else content_key(data if len(text) <= PREFIX else text[:PREFIX].encode())
            begun = True
            enough = max_bytes and total + len(data) >= max_bytes
            if enough:
                text = data[:max_bytes - total].decode("utf-8", "ignore")
                data = text.encode()
            total += len(data)
            source.text_bytes += len(data)
            if text:
                yield key, text, len(data)
            if enough:
                return
        notes["empty documents skipped"] += not begun


@contextlib.contextmanager
def prepared(out_dir, last="train.h5"):
    """A new folder to write into, as a context: at its end the files are moved into out_dir, `last` last, so that where
    it stands the data is complete. An error before that leaves out_dir as it was; ValueError if the disk refuses."""
    unfinished = os.path.join(out_dir, ".unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)           # of a run that was killed
        os.makedirs(unfinished)
        yield unfinished
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(out_dir, last))
        for name in sorted(os.listdir(unfinished), key=lambda name: name == last):
            os.replace(os.path.join(unfinished, name), os.path.join(out_dir, name))
        if os.name == "posix":                                  # the names themselves
            folder = os.open(out_dir, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise ValueError(f"{out_dir} cannot be written ({error.strerror}); free space there or choose another "
                         "--out_dir; what it held before is untouched") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(out_dir)                                   # only if it is empty
