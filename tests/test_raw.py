"""raw.py: whatever state text is in, what can be read is read, and what cannot is counted under its reason."""
import bz2
import codecs
import contextlib
import gzip
import itertools
import json
import lzma
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from threading import Thread

import pyarrow
import pyarrow.parquet
import pytest

import raw

HERE = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("ZERO2CHAT_DATA", HERE.parent / "shared/data"))
ROWS = [{"text": f"Document {i}: the größte owl found {i * i} berries. – Quite so.", "score": i / 7}
        for i in range(300)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def read(name, limit=10_000_000, column="text"):
    """(documents, the one source) of a name."""
    [source] = raw.parse_sources(str(name), column, limit)
    return [document for _, documents in raw.chunks([source]) for document in documents], source


def texts(name, **options):
    return [document["text"] for document in read(name, **options)[0]]


def zipped(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return str(path)


def noise(n):
    """Bytes of every value, with no text in them."""
    return bytes(i * i * 7 % 251 ^ i % 256 for i in range(n))


# ---- what is whole ----


def test_every_packing_and_type_gives_the_same_documents(tmp_path):
    expected = [row["text"] for row in ROWS]
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as out:
        out.write(LINES)
    files = [write(tmp_path / "a.jsonl", LINES), write(tmp_path / "a.jsonl.gz", gzip.compress(LINES)),
             write(tmp_path / "two.jsonl.gz", gzip.compress(LINES[:999]) + gzip.compress(LINES[999:])),
             write(tmp_path / "a.jsonl.bz2", bz2.compress(LINES)), write(tmp_path / "a.jsonl.xz", lzma.compress(LINES)),
             write(tmp_path / "a.json", json.dumps(ROWS).encode()),
             write(tmp_path / "lined.json", json.dumps(ROWS, indent=2).encode()),
             write(tmp_path / "a.txt", "<|endoftext|>\r\n".join(text + "\n" for text in expected).encode()),
             zipped(tmp_path / "a.zip", {"folder/a.jsonl": LINES}),
             zipped(tmp_path / "packed.zip", {"a.jsonl.gz": gzip.compress(LINES)}),
             str(tmp_path / "a.parquet"), str(tmp_path / "a.jsonl.zst")]
    for file in files:
        documents, source = read(file)
        assert [document["text"].rstrip("\n") for document in documents] == expected, file
        assert not source.dropped and not source.mended, file
        if not file.endswith(".txt"):
            assert [document["score"] for document in documents] == [row["score"] for row in ROWS]


def test_a_document_says_where_it_stood_and_keeps_its_columns(tmp_path):
    rows = ['{"text": "one", "id": "x", "source": "web", "n": 3, "deep": {"a": 1}, "list": [1]}', "", '"two"']
    file = write(tmp_path / "a.jsonl", "\n".join(rows).encode())
    documents, _ = read(file)
    first = {"text": "one", "source": file, "id": f"{file}:1", "row_id": "x", "row_source": "web", "n": 3}
    assert documents == [first, {"text": "two", "source": file, "id": f"{file}:3"}]
    archive = zipped(tmp_path / "a.zip", {"in/b.txt": b"three"})
    assert read(archive)[0][0]["id"] == f"{archive}/in/b.txt:1"


def test_pages_modules_and_notes_are_one_document_each(tmp_path):
    for name in ("a.md", "b.html", "c.py", "d.HTM", "e.txt"):
        write(tmp_path / "folder" / name, f"of {name}\n<|endoftext|>\n".encode())
    write(tmp_path / "folder/f.pdf", b"of no type that is read")
    found = sorted(texts(tmp_path / "folder"))
    assert found == [f"of {name}\n<|endoftext|>\n" for name in ("a.md", "b.html", "c.py", "d.HTM")] + ["of e.txt"]


def test_chunks_are_all_documents_in_order_cut_by_bytes_alone(tmp_path):
    corpus = lambda: raw.parse_sources(f"{write(tmp_path / 'a.jsonl', LINES)},{write(tmp_path / 'b.txt', b'last')}")
    whole = [document for _, documents in raw.chunks(corpus()) for document in documents]
    cut = list(raw.chunks(corpus(), chunk_bytes=1000))
    assert [number for number, _ in cut] == list(range(len(cut)))
    assert [document for _, documents in cut for document in documents] == whole and whole[-1]["text"] == "last"
    sizes = [[len(document["text"].encode()) for document in documents] for _, documents in cut]
    assert all(sum(size) >= 1000 > sum(size[:-1]) for size in sizes[:-1])


# ---- encodings ----


@pytest.mark.parametrize("encoding, text, told", [
    ("utf-8", "Grüße – naïve", None), ("utf-8-sig", "Grüße – naïve", None),
    ("utf-16", "Grüße – naïve", "utf-16"), ("utf-32", "Grüße – naïve", "utf-32"),
    ("utf-16-le", "Grüße an alle, die das lesen", "utf-16-le"),
    ("utf-16-be", "Grüße an alle, die das lesen", "utf-16-be"),
    ("cp1252", "The naïve café of “Zoë” – it’s a long way from here, and the road is steep and dark", "cp1252"),
    ("cp1251", "Вчера старый учитель нашёл на рынке книгу о птицах и подарил её сестре. " * 5, "cp1251"),
    ("shift_jis", "昨日、先生は市場で鳥の本を見つけて、それを妹にあげました。" * 5, None)])
def test_text_in_any_encoding_is_read_and_the_encoding_counted(tmp_path, encoding, text, told):
    for name, data in (("a.txt", text), ("a.jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\n")):
        documents, source = read(write(tmp_path / name, data.encode(encoding)))
        assert documents[0]["text"] == text
        assert not told or source.mended == {f"decoded as {told}": 1}


def test_bytes_of_another_encoding_inside_utf8_spoil_only_themselves():
    text, encoding = raw.decode("Grüße – ".encode() + "naïve".encode("cp1252") + " – schön – Öl".encode())
    assert (text, encoding) == ("Grüße – naïve – schön – Öl", "mixed encodings")


def test_a_page_is_read_as_it_declares():
    page = '<html><head><meta content="text/html; charset=iso-8859-2"></head>Zażółć gęślą jaźń</html>'
    assert raw.decode(page.encode("iso-8859-2")) == (page, "iso8859-2")


@pytest.mark.parametrize("declared", ["utf-16", '"UTF-16LE"', "utf16", "utf-32"])
def test_a_page_whose_every_character_is_a_byte_is_not_in_utf16_whatever_it_declares(declared):
    for end in ("", " "):                                       # one of the two is an even number of bytes
        page = f"<html><head><meta charset={declared}></head>caf\xe9 au lait, and more text here{end}</html>"
        assert raw.decode(page.encode("cp1252")) == (page, "cp1252")


def test_lines_of_several_encodings_are_read_each_in_its_own(tmp_path):
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode(encoding) for text, encoding in
             (("Grüße aus Köln", "utf-8"), ("Grüße aus Köln, wo der Rhein nach Norden fließt", "cp1252"))]
    documents, source = read(write(tmp_path / "a.jsonl", b"\n".join(lines)))
    assert [document["text"][:14] for document in documents] == ["Grüße aus Köln"] * 2
    assert source.mended == {"decoded as cp1252": 1} and source.places == {"decoded as cp1252": [f"{source.name}:2"]}


def test_lone_surrogates_are_replaced(tmp_path):
    documents, source = read(write(tmp_path / "a.jsonl", b'{"text": "a \\ud800 b \\ud83d\\ude00"}'))
    assert documents[0]["text"] == "a \ufffd b 😀" and source.mended == {"lone surrogates replaced": 1}


# ---- what is damaged ----


def test_rows_without_a_text_are_left_out_and_counted(tmp_path):
    rows = ['{"text": "first"}', '{"text": "cut', "[1]", '{"other": 1}', '{"text": null}', '{"text": " "}',
            '{"text": 5}', '{"text": "' + "\\u0000" * 50 + '"}', "[" * 100_000, '{"text": "last"}']
    documents, source = read(write(tmp_path / "a.jsonl", "\n".join(rows).encode()))
    assert [document["text"] for document in documents] == ["first", "last"]
    assert source.dropped == {"invalid JSON": 2, "row that is no object": 1, "no column text": 1, "empty": 2,
                              "text that is no string": 1, "binary": 1}
    assert source.places["invalid JSON"] == [f"{source.name}:2", f"{source.name}:9"]


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress),
                                          (".zst", lambda data: pyarrow.compress(data, "zstd", asbytes=True))])
def test_of_a_file_cut_off_all_that_came_before_is_kept(tmp_path, suffix, pack):
    lines = b"".join(json.dumps({"text": f"{i} {noise(300 + i % 50).hex()}"}).encode() + b"\n" for i in range(9000))
    packed = pack(lines)
    documents, source = read(write(tmp_path / f"a.jsonl{suffix}", packed[:len(packed) // 2]))
    assert source.dropped["cut off"] == 1 and source.dropped["invalid JSON"] <= 1
    assert len(documents) > (1000 if suffix != ".zst" else 0)
    assert [document["text"].split()[0] for document in documents] == [str(i) for i in range(len(documents))]


def test_a_file_with_damage_in_the_middle_is_counted(tmp_path):
    lines = b"".join(json.dumps({"text": f"{i} {noise(300 + i % 50).hex()}"}).encode() + b"\n" for i in range(9000))
    packed = bytearray(gzip.compress(lines))
    packed[len(packed) // 2:len(packed) // 2 + 100] = b"\xff" * 100
    documents, source = read(write(tmp_path / "a.jsonl.gz", bytes(packed)))
    assert source.dropped["damaged"] == 1 and len(documents) > 1000


def test_files_that_are_no_text_are_left_out_and_counted(tmp_path):
    folder = tmp_path / "mixed"
    write(folder / "good.txt", b"good")
    write(folder / "nothing.txt", b"")
    write(folder / "nothing.jsonl", b"")
    write(folder / "blank.txt", b" \n\n ")
    write(folder / "picture.txt", noise(5000))
    write(folder / "not.jsonl.gz", b"no gzip at all")
    write(folder / "not.parquet", b"PAR1 no parquet at all")
    write(folder / "not.zip", b"no zip at all")
    documents, source = read(folder)
    assert [document["text"] for document in documents] == ["good"]
    assert source.dropped == {"empty": 3, "binary": 1, "damaged": 3}


def test_every_file_that_is_no_text_is_counted_once(tmp_path):
    for i in range(12):
        write(tmp_path / f"folder/{i}.txt", noise(999))
        write(tmp_path / f"folder/{i}.jsonl.gz", b"no gzip at all")
    write(tmp_path / "folder/nothing.txt", b"")
    assert read(tmp_path / "folder")[1].dropped == {"binary": 12, "damaged": 12, "empty": 1}


@pytest.mark.parametrize("unknown", [pyarrow.array([10 ** 9] * 3, pyarrow.date32()),
                                     pyarrow.array([10 ** 9, 5, None], pyarrow.timestamp("s", "Nowhere/Here"))])
def test_a_date_that_python_has_not_costs_no_document(tmp_path, unknown):
    table = pyarrow.table({"text": ["one", "two", "three"], "day": unknown, "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    documents, source = read(tmp_path / "a.parquet")
    assert [(document["text"], document["day"], document["n"]) for document in documents] == [
        ("one", None, 1), ("two", None, 2), ("three", None, 3)]
    assert source.mended == {"date that Python has not left empty": 3 - unknown.null_count} and not source.dropped


def test_a_parquet_file_is_read_up_to_its_damage(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=100)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    start = pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0).dictionary_page_offset
    data[start:start + 60] = b"\xff" * 60
    documents, source = read(write(tmp_path / "b.parquet", bytes(data)))
    assert [document["text"] for document in documents] == [row["text"] for row in ROWS[:100]]
    assert source.dropped == {"damaged": 1}


def test_an_array_is_read_up_to_its_damage(tmp_path):
    whole = json.dumps(ROWS).encode()
    documents, source = read(write(tmp_path / "a.json", whole[:len(whole) // 2]))
    assert 100 < len(documents) < 200 and source.dropped == {"invalid JSON, rest of the file unread": 1}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.html", "a.json", "a.jsonl.gz"])
def test_an_enormous_document_is_left_out_without_being_held(tmp_path, name):
    path, limit = tmp_path / name, 1_000_000
    begin, end = {".txt": (b"first\n<|endoftext|>\n", b"\n<|endoftext|>\nlast"), ".html": (b"<html>", b""),
                  ".json": (b'[{"text": "first"}, {"text": "', b'"}, {"text": "last"}]')}.get(
        raw.kind(name), (b'{"text": "first"}\n{"text": "', b'"}\n{"text": "last"}\n'))
    with (gzip.open(path, "wb", 1) if name.endswith(".gz") else open(path, "wb")) as file:
        file.write(begin)
        for i in range(60):
            file.write(noise(500).hex().encode() * 1000 if name.endswith(".gz") else b"%06d " % i * 150_000)
        file.write(end)
    tracemalloc.start()
    documents, source = read(path, limit=limit)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * limit
    kept = {".html": [], ".json": ["first"]}.get(raw.kind(name), ["first", "last"])
    assert [document["text"].strip() for document in documents] == kept
    assert sum(source.dropped.values()) == 1 and ("longer" in str(source.dropped) or name == "a.json")


def test_bombs_are_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "BOMB_BYTES", 1 << 20)
    bomb = b"\n".join([b'{"text": "' + b"0" * 1000 + b'"}'] * 50_000)
    for file in (write(tmp_path / "a.jsonl.gz", gzip.compress(bomb, 9)), zipped(tmp_path / "a.zip", {"a.jsonl": bomb}),
                 write(tmp_path / "a.jsonl.bz2", bz2.compress(bomb))):
        documents, source = read(file)
        assert source.dropped["zip bomb"] == 1 and len(documents) < 50_000, file


def repeated(path, length, rows, kind):
    """A file of a few kB: every row has the same value, which stands in it once."""
    text = pyarrow.array([("the fox and the hen " * length)[:length]])
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows), text).cast(kind)})
    pyarrow.parquet.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30)
    return path


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_a_bomb_of_parquet_is_stopped_and_what_is_too_long_is_no_string_before(tmp_path, monkeypatch, kind):
    file = repeated(tmp_path / "a.parquet", 5_000_000, 100, kind)
    documents, source = read(file)
    assert source.dropped == {"zip bomb": 1} and len(documents) == raw.BOMB_BYTES // 5_000_000
    monkeypatch.setattr(raw, "BOMB", 10 ** 9)
    tracemalloc.start()
    documents, source = read(file, limit=1_000_000)
    assert tracemalloc.get_traced_memory()[1] < 3_000_000 and not documents
    tracemalloc.stop()
    assert source.dropped == {"longer than max_document_bytes": 100}


def test_a_page_of_parquet_that_is_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "BOMB_BYTES", 1 << 20)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["fox", "a" * 3_000_000]}), tmp_path / "a.parquet",
                                compression="zstd", use_dictionary=False)
    documents, source = read(tmp_path / "a.parquet")
    assert not documents and source.dropped == {"zip bomb": 1}


def test_long_values_that_parquet_holds_once_are_not_in_memory_all_at_once(tmp_path):
    file = repeated(tmp_path / "a.parquet", 5_000_000, 100, pyarrow.string())
    code = f"import pyarrow, raw; raw.BOMB = 10 ** 9; [source] = raw.parse_sources({str(file)!r}, 'text', 1000); " \
           "print(len(list(source.documents())), pyarrow.default_memory_pool().max_memory())"
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    documents, peak = map(int, run.stdout.split())
    assert documents == 0 and peak < 3 * raw.BOMB_BYTES         # a hundred of them would be 500 MB and more


def test_text_that_repeats_itself_is_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "BOMB_BYTES", 1 << 16)
    documents, source = read(write(tmp_path / "a.jsonl.gz", gzip.compress(LINES * 5)))
    assert len(documents) == 1500 and not source.dropped


def test_members_of_an_archive_that_cannot_be_read_are_counted(tmp_path):
    members = {"a.txt": b"good", "b.exe": b"bad", "c.zip": b"bad", "d.parquet": b"bad", "e/": b"", "f.txt": noise(999)}
    documents, source = read(zipped(tmp_path / "a.zip", members))
    assert [document["text"] for document in documents] == ["good"]
    assert source.dropped == {"unknown type in an archive": 1, ".zip inside another file": 1,
                              ".parquet inside another file": 1, "binary": 1}


def test_a_damaged_member_of_an_archive_costs_itself_alone(tmp_path):
    file = Path(zipped(tmp_path / "a.zip", {f"{i}.txt": f"member {i}".encode() for i in range(5)}))
    data = file.read_bytes()
    for at, part in ((data.find(b"PK\x03\x04"), b"XXXX"), (data.find(b"PK\x01\x02") + 10, b"\x61\x00")):
        documents, source = read(write(file, data[:at] + part + data[at + len(part):]))     # its head; its method
        assert [document["text"] for document in documents] == [f"member {i}" for i in range(1, 5)]
        assert source.dropped == {"damaged": 1} and source.places == {"damaged": [f"{file}/0.txt"]}


def test_a_named_pipe_is_not_waited_for(tmp_path):
    def feed(path):                                             # whoever waits gets something
        while True:
            with contextlib.suppress(BrokenPipeError):
                path.write_bytes(b"text")
    for name in ("a.txt", "b.parquet", "c.zip"):
        os.mkfifo(tmp_path / name)
        Thread(target=feed, args=[tmp_path / name], daemon=True).start()
    write(tmp_path / "d.txt", b"good")
    documents, source = read(tmp_path)
    assert [document["text"] for document in documents] == ["good"] and source.dropped == {"no regular file": 3}


def test_a_file_that_may_not_be_read_is_counted(tmp_path):
    write(tmp_path / "folder/a.txt", b"good")
    (tmp_path / "folder/b.txt").symlink_to(tmp_path / "gone")
    documents, source = read(tmp_path / "folder")
    assert len(documents) == 1 and source.dropped == {"unreadable (No such file or directory)": 1}


# ---- what is the user's mistake ----


@pytest.mark.parametrize("sources, options, sentence", [
    ("{}/none", {}, "there is no source"), (" , ", {}, "names none"), ("{}/a.jsonl=0.5", {}, "has a weight"),
    ("{}/a.jsonl,{}/a.jsonl", {}, "named twice"),
    ("{}/a.jsonl", {"text_column": "body"}, "has no column body; it has text"),
    ("{}/a.pdf", {}, "is of no type that can be read")])
def test_mistakes_are_told_before_anything_is_read(tmp_path, sources, options, sentence):
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / "a.pdf", b"x")
    with pytest.raises(ValueError, match=sentence):
        raw.parse_sources(sources.replace("{}", str(tmp_path)), **options)


# ---- bytes between separators ----


@pytest.mark.parametrize("separator", [b"\n", b"\n<|end|>"])
def test_records_are_a_split_wherever_blocks_end(separator):
    data = separator.join([b"one", b"", b"two\n<|en", b"x" * 40, b"four", b"y" * 41, b"five"])
    expected = [None if len(part) > 40 else part for part in data.split(separator)]
    for n in range(1, 60):
        blocks = [data[i:i + n] for i in range(0, len(data), n)]
        assert list(raw.records(blocks, separator, 40)) == expected, n
    assert list(raw.records(itertools.repeat(b"z" * 9, 5), None, 45)) == [b"z" * 45]
    assert list(raw.records(itertools.repeat(b"z" * 9, 5), None, 44)) == [None]


def test_nothing_in_real_files_is_damaged():
    if not SHARED.is_dir():
        pytest.skip(f"no data folder {SHARED}; name one with ZERO2CHAT_DATA")
    documents, source = read(SHARED / "text/us_speeches.jsonl.gz")
    assert len(documents) == 124 and not source.dropped and not source.mended
    assert documents[0]["row_source"] and codecs.BOM_UTF8.decode() not in documents[0]["text"]


def test_one_odd_row_at_the_head_is_counted_and_no_wrong_column(tmp_path):
    documents, source = read(write(tmp_path / "a.jsonl", b'[1, 2]\n{"other": 1}\n{"text": 5}\n{"text": "good"}\n'))
    assert [document["text"] for document in documents] == ["good"] and sum(source.dropped.values()) == 4


def test_a_binary_text_column_is_decoded(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["größer".encode(), b"good"]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["größer", "good"]
