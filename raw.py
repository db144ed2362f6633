"""Documents from raw text in any state: what is damaged is left out and counted, and reading goes on.

    corpus = raw.parse_sources("crawl/*.jsonl.gz,pages.zip", "text", max_document_bytes=10_000_000)
    for number, documents in raw.chunks(corpus, chunk_bytes=4_000_000): ...
    for source in corpus: source.name, source.dropped, source.mended, source.places

A document is a dict: text, source (as it was named), id ("file:number", from 1; lines of .jsonl, rows of .parquet),
and the other scalar columns of its row; those called text, source or id become row_text, row_source, row_id. A .txt may
hold several documents between lines <|endoftext|>; .md .py .html .htm hold one; .json(l) and .parquet one a row. .gz
.bz2 .xz .zst are unpacked, .zip is looked into. Files come in the order of hashes of their names, everywhere the same.

No more than a block and max_document_bytes of any file is ever in memory (of .parquet: a page of each column, as large
as its writer made it, and BOMB_BYTES of rows, or one).
"""
import bz2
import codecs
import gzip
import itertools
import json
import lzma
import os
import re
import struct
import zipfile
import zlib
from collections import Counter

import sources

EXTENSIONS = (*sources.EXTENSIONS, ".html", ".htm", ".zip")
PACKED = {".gz": lambda file: gzip.GzipFile(fileobj=file), ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile,
          ".zst": lambda file: zstandard(file)}
BLOCK = 1 << 18                     # bytes read at once
BOMB = 200                          # no text shrinks so far: a file that grows to this multiple is a bomb,
BOMB_BYTES = 1 << 26                # once it has given this much
BINARY = 0.01                       # share of control characters above which bytes are no text
CONTROL = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b")) + b"\x7f"
WESTERN = 0.05                      # share of bytes above 127 up to which they are taken for accents of cp1252,
WESTERN_SHORT, SHORT = 0.2, 500     # and in so few bytes, of which no statistics tell more
BOMS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"))
DECLARED = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?(?!utf-?(?:16|32))([\w-]+)", re.I)
DAMAGED = (OSError, EOFError, ValueError, RuntimeError, struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
RESERVED = ("text", "source", "id")
PLACES = 5                          # of each reason, so many places are remembered
CHECKED = 10                        # rows of a source of which one must have a text before anything begins


# ---- bytes ----


def zstandard(file):
    """A stream through Arrow's zstd, which every installation has."""
    import pyarrow
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")


def packing(path):
    return next((suffix for suffix in PACKED if path.lower().endswith(suffix)), "")


def kind(path):
    """'pages.HTML.bz2' -> '.html'"""
    return os.path.splitext(path.lower().removesuffix(packing(path)))[1]


def is_bomb(size, packed):
    return size > BOMB_BYTES and size > BOMB * packed


def string_bytes(scalar):
    """Bytes of a string of Arrow, also of one in a dictionary; 0 of any other value."""
    return len(getattr(getattr(scalar, "value", scalar), "as_buffer", bytes)() or b"")


def records(blocks, separator, limit):
    """Yields the bytes between separators (of all, if it is None); None for those longer than `limit`, which are
    dropped while they are read."""
    pending, searched, too_long = bytearray(), 0, False
    overlap = len(separator or b"") - 1
    for block in blocks:
        pending += block
        if separator and pending.find(separator, max(0, searched - overlap)) >= 0:
            parts = bytes(pending).split(separator)
            for part in parts[:-1]:
                yield None if too_long or len(part) > limit else part
                too_long = False
            pending = bytearray(parts[-1])
        if len(pending) > limit + max(0, overlap):
            too_long = True
            del pending[:len(pending) - max(0, overlap)]
        searched = len(pending)
    if too_long or pending:
        yield None if too_long or len(pending) > limit else bytes(pending)


def wide_encoding(head):
    """The UTF-16 or UTF-32 that the first bytes of a file are in, or None."""
    marked = next((name for bom, name in BOMS if head.startswith(bom)), None)
    head = head[:4096]
    if marked or len(head) < 4:
        return marked
    even, odd = (head[start::2].count(0) / (len(head) // 2) for start in (0, 1))
    return "utf-16-le" if odd > 0.4 > 10 * even else "utf-16-be" if even > 0.4 > 10 * odd else None


def cp1252_bytes(error):
    """Bytes that are not UTF-8, inside text that is, as the Western characters they once were."""
    bad = error.object[error.start:error.end]
    return "".join(bytes([byte]).decode("cp1252", "replace") for byte in bad), error.end


codecs.register_error("cp1252_bytes", cp1252_bytes)


def decode(data):
    """(text, encoding) of one document's bytes; (None, "") if they are binary.

    UTF-8 wherever it holds. Bytes in between that are not are taken as cp1252 ("mixed encodings"). Without any sequence
    of UTF-8: what a page declares (but for UTF-16, in which the declaration itself could not be read), cp1252 if few
    bytes are above 127, else what charset-normalizer says.
    """
    if len(data) - len(data.translate(None, CONTROL)) > BINARY * len(data):
        return None, ""
    try:
        return data.decode(), "utf-8"
    except UnicodeDecodeError:
        pass
    ignored = data.decode("utf-8", "ignore")
    high = len(data) - len(data.translate(None, bytes(range(128, 256))))
    valid = len(ignored.encode()) - len(ignored.encode("ascii", "ignore"))          # bytes in sequences of UTF-8
    if valid > high / 2:
        return data.decode("utf-8", "cp1252_bytes"), "mixed encodings"
    declared = DECLARED.search(data[:2048])
    names = [declared[1].decode()] if declared else []
    if high > (WESTERN if len(data) > SHORT else WESTERN_SHORT) * len(data) and not names:
        from charset_normalizer import from_bytes
        best = from_bytes(data[:1 << 14]).best()
        names += [best.encoding] if best else []
    for name in names:
        try:
            return data.decode(name), codecs.lookup(name).name
        except (LookupError, UnicodeError):
            pass
    return data.decode("cp1252", "replace"), "cp1252"


# ---- sources ----


class RawSource:
    """One entry of `sources`. dropped and mended count by reason, places says where: {reason: [first places]}."""

    def __init__(self, name, columns, max_document_bytes):
        self.name, self.columns, self.limit = name, columns, max_document_bytes
        self.files = [name] if name.startswith("hub:") else sources.find_files(name, EXTENSIONS, kind)
        self.dropped, self.mended, self.places = Counter(), Counter(), {}

    def note(self, counter, reason, place):
        counter[reason] += 1
        if len(self.places.setdefault(reason, [])) < PLACES:
            self.places[reason].append(place)

    def drop(self, reason, place):
        """None: the document there is left out."""
        self.note(self.dropped, reason, place)

    def mend(self, reason, place):
        self.note(self.mended, reason, place)

    def check(self):
        """ValueError if none of the first rows has a text column: a wrong name, which would cost every document."""
        for path in self.files[:1]:
            problems = []
            for _, row in itertools.islice(self.rows(path), CHECKED):
                if isinstance(row, dict):
                    row = {key: "" if isinstance(value, bytes) else value for key, value in row.items()}
                try:
                    sources.row_text(row, self.columns, 1, path)
                    break
                except ValueError as error:
                    problems.append(error)
            else:
                if problems:
                    raise problems[0]
        self.dropped, self.mended, self.places = Counter(), Counter(), {}

    def documents(self):
        for path in self.files:
            found, dropped = False, self.dropped.total()
            for place, row in self.rows(path):
                found = True
                if isinstance(row, str):
                    text, row = row, {}
                elif not isinstance(row, dict):
                    self.drop("row that is no object", place)
                    continue
                else:
                    column = next((column for column in self.columns if column in row), None)
                    text = row.get(column)
                    if column is None:
                        self.drop(f"no column {' or '.join(self.columns)}", place)
                        continue
                    row = {key: value for key, value in row.items() if key != column}
                if text := self.checked(text, place):
                    others = {f"row_{key}" if key in RESERVED else key: value for key, value in row.items()
                              if isinstance(value, (str, int, float, bool, type(None)))}
                    yield {"text": text, "source": self.name, "id": place, **others}
            if not found and self.dropped.total() == dropped:
                self.drop("empty", path)

    def checked(self, text, place):
        """The text of a row, or None, counted, if it is none."""
        if isinstance(text, bytes):
            text = self.decoded(text, place)
            if text is None:
                return None
        if text is None or isinstance(text, str) and not text.strip():
            return self.drop("empty", place)
        if not isinstance(text, str):
            return self.drop("text that is no string", place)
        if text.count("\0") > BINARY * len(text):
            return self.drop("binary", place)
        try:
            size = len(text) if text.isascii() else len(text.encode())
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            size = len(text.encode())
            self.mend("lone surrogates replaced", place)
        return text if size <= self.limit else self.drop("longer than max_document_bytes", place)

    # ---- files to rows: (place, a str, bytes or a dict) ----

    def rows(self, path):
        if path.startswith("hub:"):
            yield from self.hub_rows(path)
        elif os.path.exists(path) and not os.path.isfile(path):
            self.drop("no regular file", path)                      # a named pipe would be waited for without end
        elif kind(path) == ".parquet" and not packing(path):
            yield from self.parquet_rows(path)
        elif kind(path) == ".zip" and not packing(path):
            yield from self.zip_rows(path)
        else:
            try:
                with open(path, "rb") as file:
                    yield from self.file_rows(file, path, file.tell)
            except OSError as error:
                self.drop(f"unreadable ({error.strerror or error})", path)

    def file_rows(self, file, path, position):
        """Rows of an open file, of which position() bytes were read from disk."""
        if kind(path) in (".parquet", ".zip"):
            return self.drop(f"{kind(path)} inside another file", path)
        blocks = self.blocks(file, path, position)
        head = next(blocks, b"")
        while head and len(head) < 4096 and (more := next(blocks, b"")):
            head += more
        blocks = self.narrow(itertools.chain([head], blocks), head, path)
        if kind(path) in (".json", ".jsonl"):
            yield from self.json_rows(blocks, path)
            return
        several = kind(path) == ".txt"
        blocks = itertools.chain([b"\n"], blocks) if several else blocks
        for number, data in enumerate(records(blocks, b"\n<|endoftext|>" if several else None, self.limit), 1):
            if data is None:
                self.drop("longer than max_document_bytes", f"{path}:{number}")
                continue
            data = re.sub(rb"\A\r?\n", b"", data) if several else data
            if data.strip() or not several:
                text = self.decoded(data, f"{path}:{number}")
                if text is not None:
                    yield f"{path}:{number}", text

    def decoded(self, data, place):
        """The text of bytes, or None, counted, if they are binary; their encoding is noted."""
        text, encoding = decode(data)
        if text is None:
            return self.drop("binary", place)
        if encoding != "utf-8":
            self.mend(encoding if encoding == "mixed encodings" else f"decoded as {encoding}", place)
        return text

    def blocks(self, file, path, position):
        """Yields what a file holds, unpacked, as far as it can be read; what ends it early is counted."""
        size = 0
        try:
            packed = packing(path)
            file = PACKED[packed](file) if packed else file
            read = getattr(file, "read1", file.read)            # read() would lose what came before an error
            while block := read(BLOCK):
                size += len(block)
                if is_bomb(size, position()):
                    return self.drop("zip bomb", path)
                yield block
        except EOFError:
            self.drop("cut off", path)
        except DAMAGED as error:
            cut = "unexpected end" in str(error).lower() or "truncated" in str(error).lower()
            self.drop("cut off" if cut else "damaged", path)

    def narrow(self, blocks, head, path):
        """Blocks as UTF-8 without its mark, if they are UTF-16 or UTF-32; else as they are, without the mark."""
        encoding = wide_encoding(head)
        if encoding:
            self.mend(f"decoded as {encoding}", path)
            decoder = codecs.getincrementaldecoder(encoding)("replace")
            for block in blocks:
                yield decoder.decode(block).encode("utf-8", "replace")
            return
        first = next(blocks)
        yield first.removeprefix(codecs.BOM_UTF8)
        yield from blocks

    def json_rows(self, blocks, path):
        """Rows of lines; if the file is one array, or its objects run over lines, of values, up to the first damage."""
        head = b""
        while len(head.lstrip()) < 64 and (block := next(blocks, b"")):
            head += block
        blocks = itertools.chain([head], blocks)
        first = head.lstrip()[:64].split(b"\n")[0].strip()
        if first[:1] == b"[" or first == b"{":
            decoder = codecs.getincrementaldecoder("utf-8")("cp1252_bytes")
            texts = itertools.chain(((decoder.decode(block), 0, False) for block in blocks), [("", 0, True)])
            try:
                for row, number, _ in sources.json_values(texts, path, self.limit):
                    yield f"{path}:{number}", row
            except ValueError:
                self.drop("invalid JSON, rest of the file unread", path)
            return
        for number, line in enumerate(records(blocks, b"\n", self.limit), 1):
            if line is None:
                self.drop("longer than max_document_bytes", f"{path}:{number}")
            elif line.strip() and (text := self.decoded(line, f"{path}:{number}")) is not None:
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError):
                    self.drop("invalid JSON", f"{path}:{number}")
                else:
                    yield f"{path}:{number}", row

    def parquet_rows(self, path):
        import pyarrow
        import pyarrow.parquet
        from pyarrow import types
        number = size = 0
        try:
            packed = os.path.getsize(path)
            with pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK) as file:
                groups = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
                if is_bomb(sum(groups), packed):
                    return self.drop("zip bomb", path)
                flat = [field.name for field in file.schema_arrow if field.name in self.columns
                        or not types.is_nested(field.type) and "binary" not in str(field.type)]
                at_once = min(100, BOMB_BYTES // max([1, *groups])) or 1       # a value may be as long as its group
                for batch in file.iter_batches(batch_size=at_once, columns=flat, use_threads=False):
                    names, columns = batch.schema.names, batch.columns
                    for i in range(len(batch)):
                        number += 1
                        place, row = f"{path}:{number}", {name: column[i] for name, column in zip(names, columns)}
                        lengths = list(map(string_bytes, row.values()))
                        size += sum(lengths)
                        if is_bomb(size, packed):
                            return self.drop("zip bomb", path)
                        if max(lengths, default=0) > self.limit:
                            self.drop("longer than max_document_bytes", place)
                        else:
                            yield place, {name: self.value(cell, place) for name, cell in row.items()}
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError):
            self.drop("damaged", path)

    def value(self, scalar, place):
        """A value of Arrow as Python's, a date as text; None, counted, if Python has no such date or time zone."""
        try:
            value = scalar.as_py()
        except UnicodeDecodeError:
            raise
        except (OverflowError, KeyError, ValueError):
            return self.mend("date that Python has not left empty", place)
        return value.isoformat() if hasattr(value, "isoformat") else value

    def zip_rows(self, path):
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    name = f"{path}/{info.filename}"
                    if info.is_dir():
                        continue
                    if kind(name) not in EXTENSIONS:
                        self.drop("unknown type in an archive", name)
                    elif info.flag_bits & 1:
                        self.drop("encrypted", name)
                    else:
                        try:
                            with archive.open(info) as file:
                                yield from self.file_rows(file, name, lambda: info.compress_size)     # noqa: B023
                        except DAMAGED:
                            self.drop("damaged", name)
        except DAMAGED:
            self.drop("damaged", path)

    def hub_rows(self, name):
        number = 0
        try:
            for row, number, _ in sources.Source(name, None, self.columns, "replace").hub_rows():
                yield f"{name}:{number}", row
        except ValueError:
            if not number:
                raise
            self.drop("cut off", name)


def parse_sources(text, text_column="text", max_document_bytes=10_000_000):
    """[RawSource] of names with commas between; ValueError if one has no files, or its first row no text column."""
    names = [name for name in map(str.strip, text.split(",")) if name]
    if not names:
        raise ValueError(f"sources is {text!r} and names none; try --sources=stdlib")
    for name in names:
        whole, _, weight = name.rpartition("=")
        if whole and re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", weight) and not os.path.exists(name):
            raise ValueError(f"source {name} has a weight, but cleaning takes all of every source; name it {whole} "
                             "here and give weights to data.py or pretrain.py")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"source {twice[0]} is named twice; name it once")
    columns = [column.strip() for column in text_column.split(",")]
    corpus = [RawSource(name, columns, max_document_bytes) for name in names]
    for source in corpus:
        source.check()
    return corpus


def chunks(corpus, chunk_bytes=4_000_000):
    """Yields (number, [document]): all documents in order, cut where chunk_bytes of text are reached."""
    number, documents, size = 0, [], 0
    for source in corpus:
        for document in source.documents():
            documents.append(document)
            size += len(document["text"].encode())
            if size >= chunk_bytes:
                yield number, documents
                number, documents, size = number + 1, [], 0
    if documents:
        yield number, documents
