"""texts.py: sources to documents, documents to tokens on disk, tokens on disk to batches."""
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tracemalloc
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import texts
from sources import Source, content_key, mix, parse_sources, prepared, text_documents
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent.parent
SHAKESPEARE = HERE.parent / "shared/data/text/tinyshakespeare.txt.gz"
STORIES = [f"Story {i}: the {animal} found {i * i} berries.\nIt ate them – all of them.\n" for i, animal in
           enumerate(["fox", "owl", "hare", "wolf", "bear", "mole", "duck", "crow"] * 25)]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """(folder, Tokenizer) of 400 pieces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    trained = Tokenizer.train(STORIES, 400)
    trained.save(folder)
    return str(folder), trained


@pytest.fixture
def stories(tmp_path):
    """A .jsonl file of 200 documents."""
    return write(tmp_path / "stories.jsonl", "".join(json.dumps({"text": story}) + "\n" for story in STORIES))


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def documents(folder, split):
    """The texts of a split, decoded one by one."""
    tokens, offsets, _ = texts.open_tokens(folder, split)
    tok = Tokenizer.load(folder)
    assert offsets[0] == 0 and offsets[-1] == len(tokens) and all(tokens[offsets[:-1]] == tok.eot_id)
    assert np.count_nonzero(tokens == tok.eot_id) == len(offsets) - 1
    return [tok.decode(tokens[start + 1:end]) for start, end in zip(offsets[:-1], offsets[1:])]


def read(sources, text_column="text", invalid_utf8="error", max_bytes=0):
    """(texts, notes) of sources, without a tokenizer."""
    notes, texts = Counter(), []
    for key, text, size in mix(parse_sources(sources, text_column, invalid_utf8), max_bytes, notes):
        assert size == len(text.encode())
        texts += [text] if key is not None else []
        texts[-1] += "" if key is not None else text
    return texts, +notes


def save_tokens(folder, tokens, offsets, fingerprint="f"):
    with h5py.File(Path(folder) / "train.h5", "w") as file:
        file["tokens"], file["doc_offsets"] = np.array(tokens, np.uint16), np.array(offsets, np.int64)
        file.attrs.update(fingerprint=fingerprint, vocab_size=300)
    return str(folder)


def numbered(folder, n, lengths=()):
    """A split whose token i is i, with documents of these lengths: every token says where it stood."""
    return save_tokens(folder, np.arange(n), [*np.cumsum([0, *lengths]), n])


# ---- text to files ----


def test_every_document_is_found_again_behind_its_eot(tmp_path, stories, tokenizer):
    texts.prepare(str(tmp_path / "out"), stories, tokenizer=tokenizer[0])
    train, val = (documents(str(tmp_path / "out"), split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(STORIES) and 2 <= len(val) <= 25
    with h5py.File(tmp_path / "out/val.h5") as file:
        assert file["tokens"].dtype == np.uint16 and file["tokens"].chunks is None
        assert file.attrs["fingerprint"] == tokenizer[1].fingerprint
        assert file.attrs["vocab_size"] == tokenizer[1].vocab_size
        assert file.attrs["documents"] == len(val) and file.attrs["text_bytes"] == sum(len(t.encode()) for t in val)
        assert json.loads(file.attrs["options"])["sources"] == stories
    assert not (tmp_path / "out/.unfinished").exists()


def test_vocabularies_above_65536_pieces_are_stored_as_uint32(tmp_path, tokenizer):
    class Wide:
        vocab_size, eot_id = 65537, 65536
    writer = texts.TokenWriter(tmp_path, Wide)
    writer.write([(True, np.array([1, 2]), 2)])
    writer.finish(tmp_path / "train.h5", {"fingerprint": "f", "vocab_size": 65537})
    tokens, offsets, _ = texts.open_tokens(str(tmp_path), "train")
    assert tokens.dtype == np.uint32 and tokens.tolist() == [65536, 1, 2] and offsets.tolist() == [0, 3]


def test_a_document_longer_than_a_block_has_the_ids_of_the_whole(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("sources.BLOCK", 4096)
    monkeypatch.setattr("sources.PREFIX", 1024)
    long = "".join(STORIES) + "end"
    file, held_out = write(tmp_path / "long.txt", long), write(tmp_path / "held.txt", "held out")
    pieces = list(text_documents(file, "error", Counter()))
    assert len(pieces) >= 4 and {number for number, _, _ in pieces} == {0}
    texts.prepare(str(tmp_path / "out"), file, val_sources=held_out, tokenizer=tokenizer[0])
    tokens, _, _ = texts.open_tokens(str(tmp_path / "out"), "train")
    assert tokens[1:].tolist() == tokenizer[1].encode(long)


def test_all_formats_give_the_same_documents(tmp_path):
    texts = STORIES[:6]
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts)
    table = pyarrow.table({"id": range(6), "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    (tmp_path / "folder/year=2024").mkdir(parents=True)
    for i, text in enumerate(texts):
        write(tmp_path / "folder" / ("year=2024" if i % 2 else "") / f"{i}.{['txt', 'md', 'py'][i % 3]}", text)
        write(tmp_path / f"{i}.object.json", json.dumps({"text": text}, indent=1))
    write(tmp_path / "folder/notes.doc", "of no known type")
    sources = [
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "a.jsonl.gz", gzip.compress(lines.encode())),
        write(tmp_path / "strings.jsonl", "\n\n".join(json.dumps(text, ensure_ascii=False) for text in texts)),
        write(tmp_path / "array.json", json.dumps([{"text": text} for text in texts], indent=2)),
        write(tmp_path / "lines.json.gz", gzip.compress(lines.encode())),
        write(tmp_path / "bom.txt", "\ufeff" + "<|endoftext|>\n".join(texts)),
        write(tmp_path / "crlf.txt.gz", gzip.compress("<|endoftext|>\r\n".join([*texts, ""]).encode())),
        str(tmp_path / "a.parquet"), str(tmp_path / "folder"), str(tmp_path / "?.object.json"),
    ]
    for source in sources:
        assert sorted(read(source)[0]) == sorted(texts), source
    assert sorted(read(f"{tmp_path}/folder/year=2024")[0]) == sorted(texts[1::2])        # a folder, not a weight


def test_endoftext_inside_a_line_or_in_code_stays_text(tmp_path, monkeypatch):
    text = 'eot = """\n<|endoftext|>\n"""'
    assert read(write(tmp_path / "a.py", text))[0] == [text]
    text = "say\n\n<|endoftext|> <|endoftext|>\n<|endoftext|> now"
    assert read(write(tmp_path / "a.txt", text))[0] == [text]
    monkeypatch.setattr("sources.BLOCK", len("say\n\n<|endoftext|>") // 2)       # the second block ends behind it
    assert read(str(tmp_path / "a.txt"))[0] == [text]


@pytest.mark.parametrize("block", [1, 2, 7, 64])
def test_where_blocks_end_changes_nothing(tmp_path, monkeypatch, block):
    rows = [{"text": text} for text in ["a\\\"]", "—€\U0001f600", "x" * 300, "[{", "<|endoftext|>\nb"]]
    sources = [write(tmp_path / "a.json", json.dumps(rows)),
               write(tmp_path / "b.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
               write(tmp_path / "c.txt", "—€\U0001f600 a b\n<|endoftext|>\n" + "x y\n" * 40)]
    whole = [read(source)[0] for source in sources]
    assert whole[0] == whole[1] == [row["text"] for row in rows] and len(whole[2]) == 2
    monkeypatch.setattr("sources.BLOCK", block)
    tested = 3 if block > len("<|endoftext|>") else 2           # that line is looked for within a block
    assert [read(source)[0] for source in sources[:tested]] == whole[:tested]


def test_null_and_blank_texts_are_skipped_and_counted(tmp_path):
    rows = ["kept", "", " \n", {"text": None}]
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert read(file) == (["kept"], {"empty documents skipped": 3})


def test_the_first_of_several_text_columns_that_a_row_has_is_taken(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"content": "one", "text": 5}\n{"body": "two"}')
    assert read(file, "content,body")[0] == ["one", "two"]


def test_lone_surrogates_become_replacement_characters(tmp_path):
    texts, notes = read(write(tmp_path / "a.jsonl", '"a\\ud800b \\ud83d\\ude00"'))
    assert texts == ["a\ufffdb \U0001f600"] and notes == {"documents with lone surrogates replaced": 1}


@pytest.mark.parametrize("block", [3, 1000])
def test_invalid_utf8_can_be_replaced_and_is_counted(tmp_path, monkeypatch, block):
    monkeypatch.setattr("sources.BLOCK", block)
    file = write(tmp_path / "a.txt", b"caf\xe9 \xef\xbf\xbd na\xefve\xc3")      # the middle one is a real U+FFFD
    assert read(file, invalid_utf8="replace") == (["caf\ufffd \ufffd na\ufffdve\ufffd"],
                                                  {"invalid UTF-8 sequences replaced": 3})


def test_stdlib_is_the_modules_of_the_interpreter_without_tests(tmp_path, monkeypatch):
    for name, content in {"a.py": "x = 1", "b.py": "# -*- coding: latin-1 -*-\ny = 'é'".encode("latin-1"),
                          "bad.py": b"z = '\xe9'", "test/c.py": "t", "site-packages/d.py": "s"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, content)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    texts, notes = read("stdlib")
    assert sorted(texts) == ["# -*- coding: latin-1 -*-\ny = 'é'", "x = 1"]
    assert notes == {"undecodable modules of the standard library skipped": 1}


def test_hub_datasets_are_streamed_by_id_config_and_split(tmp_path, tokenizer, monkeypatch):
    import datasets
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return ({"id": i, "body": text} for i, text in enumerate(STORIES)) if len(calls) > 1 else [{"body": "b"}] * 3
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("hub:org/name", "body")[0] == ["b"] * 3
    assert read("hub:org/name:sample-10BT:test", "body", max_bytes=1000)[0][0] == STORIES[0]
    assert calls == [(("org/name", None), {"split": "train", "streaming": True}),
                     (("org/name", "sample-10BT"), {"split": "test", "streaming": True})]
    with pytest.raises(ValueError, match="row 1 of hub:x has no column text; it has id, body; .*--text_column"):
        read("hub:x")

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\n(details)")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"dataset a/b cannot be read \(ConnectionError: Couldn't reach the Hub\);"):
        texts.prepare(str(tmp_path / "out"), "hub:a/b")
    assert not (tmp_path / "out").exists()


def test_files_are_read_in_turns_so_that_a_head_resembles_the_whole(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", "\n".join([json.dumps(name * 10_000)] * 100))
    head = Counter(text[0] for text in read(str(tmp_path), max_bytes=1_500_000)[0])
    assert set(head) == {*"abc"} and max(head.values()) - min(head.values()) <= 27    # a turn is 2^18 bytes


def test_shares_of_bytes_follow_the_weights_until_a_source_runs_out(tmp_path, tokenizer, capsys):
    write(tmp_path / "short=1.jsonl", "\n".join(json.dumps(f"s{i} " + "s" * 100) for i in range(1000)))
    write(tmp_path / "long.jsonl", "\n".join(json.dumps(f"l{i} " + "l" * 900) for i in range(1000)))
    sources = f"{tmp_path}/short=1.jsonl=1, {tmp_path}/long.jsonl=3"
    texts.prepare(str(tmp_path / "out"), sources, tokenizer=tokenizer[0])
    found = documents(str(tmp_path / "out"), "train") + documents(str(tmp_path / "out"), "val")
    size = {name: sum(len(text) for text in found if text[0] == name) for name in "sl"}
    assert sum(text[0] == "s" for text in found) == 1000
    assert size["s"] / (size["s"] + size["l"]) == pytest.approx(0.25, abs=0.005)
    said = capsys.readouterr().out
    assert re.search(r"short=1.jsonl: 25\.\d% of the bytes, 25\.0% asked for, ran out first\n", said)
    assert re.search(r"long.jsonl: 7[45]\.\d% of the bytes, 75\.0% asked for\n", said)
    assert len(read(f"{tmp_path}/short=1.jsonl,{tmp_path}/long.jsonl")[0]) == 2000      # without weights all is taken


def test_max_bytes_is_exact_and_never_splits_a_character(tmp_path):
    file = write(tmp_path / "a.jsonl", "\n".join(json.dumps("é" * 100) for _ in range(9)))
    texts, _ = read(file, max_bytes=501)
    assert texts == ["é" * 100] * 2 + ["é" * 50]


# ---- what is held out ----


def test_the_same_text_stands_on_one_side_whatever_the_order(tmp_path, tokenizer):
    rows = [json.dumps(text) for text in STORIES * 2]
    held_out = []
    for i, order in enumerate([rows, rows[::-1], rows[::2]]):
        file = write(tmp_path / f"{i}.jsonl", "\n".join(order))
        texts.prepare(str(tmp_path / f"out{i}"), file, val_fraction=0.2, tokenizer=tokenizer[0])
        train, val = (set(documents(str(tmp_path / f"out{i}"), split)) for split in ("train", "val"))
        assert not train & val
        held_out.append(val)
    assert held_out[0] == held_out[1] and held_out[2] < held_out[0]
    assert 0.1 < len(held_out[0]) / len(STORIES) < 0.3


def test_documents_of_val_sources_are_dropped_from_training(tmp_path, stories, tokenizer, capsys):
    held_out = write(tmp_path / "held.jsonl", "\n".join(map(json.dumps, STORIES[10:20])))
    texts.prepare(str(tmp_path / "out"), stories, val_sources=held_out)
    assert documents(str(tmp_path / "out"), "val") == STORIES[10:20]
    assert documents(str(tmp_path / "out"), "train") == STORIES[:10] + STORIES[20:]
    assert "10 documents dropped that val_sources holds too" in capsys.readouterr().out


def test_the_tokenizer_is_trained_on_the_training_side_only(tmp_path, stories, monkeypatch):
    seen, train = [], Tokenizer.train
    monkeypatch.setattr(Tokenizer, "train", lambda texts, *how: train([seen.append(t) or t for t in texts], *how))
    texts.prepare(str(tmp_path / "out"), stories, vocab_size=300)
    assert seen == documents(str(tmp_path / "out"), "train")
    seen.clear()
    texts.prepare(str(tmp_path / "out"), stories, vocab_size=300, tokenizer_bytes=1000, overwrite=True)
    assert sum(map(len, seen)) == 1000


@pytest.mark.parametrize("held_out", [0.1, 0.7])
def test_a_single_document_is_cut_at_its_end(tmp_path, tokenizer, monkeypatch, held_out):
    monkeypatch.setattr("sources.BLOCK", 4096)        # the document comes in pieces
    text = "".join(STORIES)
    texts.prepare(str(tmp_path / "out"), write(tmp_path / "a.txt", text), val_fraction=held_out, tokenizer=tokenizer[0])
    cut = int(len(text) * (1 - held_out))
    assert documents(str(tmp_path / "out"), "train") == [text[:cut]]
    assert documents(str(tmp_path / "out"), "val") == [text[cut:]]


def test_of_a_few_documents_the_one_with_the_smallest_hash_is_held_out(tmp_path, tokenizer):
    few = sorted(["alpha beta", "gamma delta", "epsilon"], key=lambda text: content_key(text.encode()))
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, [*few[1:], few[0]])))
    texts.prepare(str(tmp_path / "out"), file, val_fraction=1e-9, tokenizer=tokenizer[0])
    assert documents(str(tmp_path / "out"), "val") == [few[0]]
    assert documents(str(tmp_path / "out"), "train") == few[1:]


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs shared/data")
def test_tinyshakespeare_is_split_like_nanogpt_does(tmp_path, tokenizer):
    text = gzip.decompress(SHAKESPEARE.read_bytes()).decode()
    texts.prepare(str(tmp_path / "out"), str(SHAKESPEARE), val_fraction=0.1, tokenizer=tokenizer[0])
    assert documents(str(tmp_path / "out"), "val") == [text[int(len(text) * 0.9):]]


# ---- what a user can get wrong ----


def bad_inputs(folder):
    """name: (options, what the sentence says)"""
    lines = "".join(json.dumps({"text": story}) + "\n" for story in STORIES).encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": STORIES}), folder / "whole.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), folder / "numbers.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": STORIES, "id": range(200)}), folder / "body.parquet")
    (folder / "empty").mkdir()
    made = {name: write(folder / name, content) for name, content in {
        "cut.jsonl.gz": gzip.compress(lines)[:-300], "noise.jsonl.gz": gzip.compress(lines)[:200] + b"noise" * 99,
        "plain.txt.gz": b"not gzip", "cut.jsonl": lines[:-20], "cut.json": b"[" + lines.replace(b"\n", b",")[:-1],
        "cut.parquet": (folder / "whole.parquet").read_bytes()[:-200], "cut.txt": "añb".encode()[:2],
        "latin1.txt": b"x" * 70_000 + "é".encode("latin-1") + b" y", "latin1.jsonl": lines + b'"\xe9"',
        "chat.jsonl": b'{"messages": [], "id": 1}', "list.jsonl": b'{"text": ["a"]}', "number.jsonl": b'"a"\n12',
        "blank.jsonl": b'""\n" "', "same.jsonl": b'"a b c"\n"a b c"', "data.csv": b"a,b", "tok.json": b'{"model": 1}',
    }.items()}
    return {
        "missing": (f"{folder}/none.txt", r"there is no source '.*none.txt'"),
        "glob": (f"{folder}/*.zip", r"no glob that matches"),
        "none": ("  ,", r"names none; try --sources=stdlib"),
        "type": (made["data.csv"], r"data.csv is of no type that can be read; those are \.txt"),
        "empty folder": (f"{folder}/empty", r"empty holds no file of type \.txt"),
        "blank": (made["blank.jsonl"], r"there is no text in .*blank.jsonl; 2 empty documents skipped"),
        "same": (made["same.jsonl"], r"no document of .*same.jsonl is left to train on; lower --val_fraction"),
        "cut gz": (made["cut.jsonl.gz"], r"cut.jsonl.gz is cut off or damaged \(.*end-of-stream"),
        "noise gz": (made["noise.jsonl.gz"], r"noise.jsonl.gz is cut off or damaged"),
        "no gz": (made["plain.txt.gz"], r"plain.txt.gz is cut off or damaged \(Not a gzipped file"),
        "cut jsonl": (made["cut.jsonl"], r"row 200 of .*cut.jsonl is not JSON \(.*may be cut off"),
        "cut json": (made["cut.json"], r"cut.json is cut off after row 200"),
        "cut parquet": (made["cut.parquet"], r"cut.parquet is damaged or not parquet \(.*magic"),
        "cut utf8": (made["cut.txt"], r"cut.txt is not UTF-8: byte 0xc3 at offset 1;"),
        "latin1": (made["latin1.txt"], r"latin1.txt is not UTF-8: byte 0xe9 at offset 70,000; .*--invalid_utf8=rep"),
        "latin1 jsonl": (made["latin1.jsonl"], r"latin1.jsonl is not UTF-8: byte 0xe9 at offset"),
        "column": (made["chat.jsonl"], r"row 1 of .*chat.jsonl has no column text; it has messages, id; .*--text_col"),
        "parquet column": (f"{folder}/body.parquet", r"body.parquet has no column text; it has body, id;"),
        "parquet type": (f"{folder}/numbers.parquet", r"column text of .*numbers.parquet holds 1 in row 1, not a text"),
        "column type": (made["list.jsonl"], r"column text of .*list.jsonl holds \['a'\] in row 1, not a text"),
        "row type": (made["number.jsonl"], r"row 2 of .*number.jsonl is 12; a row is a string or an object"),
        "half weights": (f"{made['chat.jsonl']}=0.5,stdlib", r"some sources have a weight and some have none"),
        "weight": ("stdlib=0", r"weight of source stdlib is 0; it must be above 0"),
        "val": (dict(sources="stdlib", val_sources=f"{folder}/none"), r"there is no source '.*none'"),
        "fraction": (dict(sources="stdlib", val_fraction=1.0), r"val_fraction is 1.0; it must lie between 0 and 1"),
        "policy": (dict(sources="stdlib", invalid_utf8="drop"), r"invalid_utf8 is 'drop'; it must be error or replace"),
        "tokenizer": (dict(sources="stdlib", tokenizer=f"{folder}/empty"), r"empty holds no tokenizer"),
        "out_dir": (dict(sources=f"{folder}/whole.parquet", out_dir=made["data.csv"] + "/out"),
                    r"out cannot be written \(Not a directory\)"),
    }


def test_bad_input_ends_in_one_sentence_and_leaves_nothing(tmp_path, tokenizer):
    for name, (options, sentence) in bad_inputs(tmp_path).items():
        options = options if isinstance(options, dict) else {"sources": options}
        options = {"out_dir": str(tmp_path / "out"), "tokenizer": tokenizer[0], **options}
        with pytest.raises(ValueError, match=sentence) as error:
            texts.prepare(**options)
        assert "\n" not in str(error.value), name
        assert not os.path.exists(options["out_dir"]), name


def test_data_is_replaced_only_when_told_to(tmp_path, stories, tokenizer):
    out = str(tmp_path / "out")
    texts.prepare(out, stories, tokenizer=tokenizer[0])
    before = documents(out, "train")
    other = write(tmp_path / "other.jsonl", "\n".join(map(json.dumps, STORIES[:50])))
    with pytest.raises(ValueError, match="out already holds data; pass --overwrite=true"):
        texts.prepare(out, other, tokenizer=tokenizer[0])
    with pytest.raises(ValueError, match="no source"):
        texts.prepare(out, "nowhere", tokenizer=tokenizer[0], overwrite=True)
    assert documents(out, "train") == before
    texts.prepare(out, other, tokenizer=tokenizer[0], overwrite=True)
    assert len(documents(out, "train") + documents(out, "val")) == 50


@pytest.mark.parametrize("moment, argument", [("tokenizer.Tokenizer.encode_batch", ""), ("os.fsync", ""),
                                              ("os.replace", "tokenizer.json"), ("os.replace", "out/train.h5")])
def test_killed_at_any_moment_no_half_file_has_a_final_name(tmp_path, stories, tokenizer, moment, argument):
    out = tmp_path / "out"
    code = ("import os, signal, sys, texts, tokenizer\n"
            f"def killed(*args, real={moment}):\n"
            f"    os.kill(os.getpid(), signal.SIGKILL * str(args[-1]).endswith({argument!r}))\n"
            "    return real(*args)\n"
            f"{moment} = killed\n"
            "texts.prepare(*sys.argv[1:3], tokenizer=sys.argv[3])")
    killed = subprocess.run([sys.executable, "-c", code, out, stories, tokenizer[0]], cwd=HERE)
    assert killed.returncode == -signal.SIGKILL
    there = {*os.listdir(out)} - {".unfinished"}
    assert there == ({"val.h5", "tokenizer.json", "tokenizer_config.json"} if "train" in argument else set())
    texts.prepare(str(out), stories, tokenizer=tokenizer[0])      # needs no --overwrite, and cleans up
    assert sorted(os.listdir(out)) == ["tokenizer.json", "tokenizer_config.json", "train.h5", "val.h5"]


def test_a_full_disk_is_said_in_one_sentence_and_the_old_data_stays(tmp_path, stories, tokenizer):
    out = str(tmp_path / "out")
    texts.prepare(out, stories, tokenizer=tokenizer[0])
    before = documents(out, "train")
    code = ("import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
            "sys.argv[0] = 'data.py'\nimport data, configurator\n"
            "data.main(configurator.configure(vars(data)))")
    flags = [f"--out_dir={out}", f"--sources={stories}", f"--tokenizer={tokenizer[0]}", "--overwrite=true"]
    failed = subprocess.run([sys.executable, "-c", code, *flags], cwd=HERE, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr == (f"data.py: {out} cannot be written (File too large); free space there or choose another "
                             "--out_dir; what it held before is untouched\n")
    assert documents(out, "train") == before and not os.path.exists(out + "/.unfinished")


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    class Bytes:
        vocab_size, eot_id, fingerprint = 257, 256, "bytes"
        load = classmethod(lambda cls, path: cls())
        save = lambda self, folder: None
        encode_batch = lambda self, texts: [np.frombuffer(text.encode(), np.uint8) for text in texts]
    monkeypatch.setattr("tokenizer.Tokenizer", Bytes)
    peaks = []
    for megabytes in (36, 72):
        text = "It was the best of times, it was the worst of times.\n" * (megabytes * 10_000)
        file = write(tmp_path / "one.txt", text)
        rows = write(tmp_path / "rows.json", "[" + ",\n".join([json.dumps(text[:50_000])] * (megabytes * 10)) + "]")
        del text
        tracemalloc.start()
        texts.prepare(str(tmp_path / str(megabytes)), f"{file},{rows}", val_sources=__file__, tokenizer="bytes")
        peaks.append(tracemalloc.get_traced_memory()[1] / 1e6)
        tracemalloc.stop()
    assert peaks[1] < 100 and peaks[1] - peaks[0] < 12          # for 37 MB more text


def test_on_a_terminal_a_bar_shows_tokens_a_second(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    source = Source(__file__, None, [], "error")
    source.read = {__file__: source.disk_bytes / 2}
    progress = texts.Progress([source], 0)
    progress.started -= 10
    progress.add(2_000_000, 500_000)
    progress.bar.refresh()
    assert re.search(r"50%.*2 MB, 0\.5 M tokens, 0\.05 M tokens/s", capsys.readouterr().err)


def test_files_that_cannot_all_be_moved_are_not_taken_for_complete_data(tmp_path, monkeypatch):
    move, moved = os.replace, []
    (tmp_path / "train.h5").write_text("old")

    def move_one(source, target):
        if moved:
            raise OSError(5, "Input/output error")
        moved.append(os.path.basename(target))
        move(source, target)
    monkeypatch.setattr(os, "replace", move_one)
    with pytest.raises(ValueError, match="cannot be written .Input/output error"):
        with prepared(str(tmp_path)) as unfinished:
            for name in ("train.h5", "tokenizer.json", "val.h5"):
                Path(unfinished, name).write_text("new")
    assert os.listdir(tmp_path) == moved != ["train.h5"]        # the old one would be read with a new tokenizer


# ---- files to batches ----


def test_opening_says_what_is_wrong_with_a_file(tmp_path, tokenizer):
    out = str(tmp_path)
    with pytest.raises(ValueError, match="there is no .*train.h5; name a folder .* data.py --sources"):
        texts.open_tokens(out, "train")
    numbered(tmp_path, 5000)
    whole = (tmp_path / "train.h5").read_bytes()
    for size in (0, 100, 3000, len(whole) - 1):
        write(tmp_path / "train.h5", whole[:size])
        with pytest.raises(ValueError, match=r"train.h5 is cut short, or was not written by data.py \(.*\); .*--over"):
            texts.open_tokens(out, "train")
    write(tmp_path / "train.h5", whole)
    texts.open_tokens(out, "train")
    with h5py.File(tmp_path / "train.h5", "a") as file:
        file["mask"] = [1]
    with pytest.raises(ValueError, match="train.h5 holds chats and no text; sft.py trains on those"):
        texts.open_tokens(out, "train")
    write(tmp_path / "train.h5", whole)
    with pytest.raises(ValueError, match=r"tokenizer of 300 pieces \(fingerprint f\) but the one given has 400"):
        texts.TextBatches(out, "train", 4, 4, 16, 0, tokenizer=tokenizer[1])
    with pytest.raises(ValueError, match="holds 5,000 tokens, fewer than one step of 400 rows . 16 tokens"):
        texts.TextBatches(out, "train", 400, 400, 16, 0)
    with pytest.raises(ValueError, match="holds 5,000 tokens, fewer than one step of 1 rows . 5000 tokens"):
        texts.TextBatches(out, "train", 1, 1, 5000, 0)
    with pytest.raises(ValueError, match="rows_per_step=8 is not a multiple of micro_rows . ranks = 3 . 2"):
        texts.TextBatches(out, "train", 8, 3, 16, 0, world_size=2)
    with h5py.File(tmp_path / "train.h5", "w") as file:
        file.create_dataset("tokens", data=np.arange(99), chunks=(10,))
    with pytest.raises(ValueError, match="was not written by data.py"):
        texts.open_tokens(out, "train")


@pytest.mark.parametrize("n, context, rows", [(1001, 10, 10), (1000, 10, 7), (1002, 10, 13), (11, 10, 1), (12, 10, 2)])
def test_every_epoch_has_every_target_once_in_another_order(tmp_path, n, context, rows):
    batches = texts.TextBatches(numbered(tmp_path, n), "train", rows, rows, context, seed=3)
    assert batches.tokens_per_epoch == n - 1 and batches.steps_per_epoch == batches.n_rows_per_epoch / rows
    steps = 3 * batches.n_rows_per_epoch                        # `rows` full rounds of three epochs, whatever divides
    seen = []
    for step in range(steps):
        ids_BT, targets_BT, _ = batches(step, 0)
        assert ids_BT.shape == targets_BT.shape == (rows, context) and ids_BT.dtype == targets_BT.dtype == torch.int64
        held = targets_BT != -100
        assert torch.equal(targets_BT[held], ids_BT[held] + 1)
        assert batches.targets_in_step(step) == held.sum()
        seen += [row[mask].tolist() for row, mask in zip(targets_BT, held)]
    epochs = [seen[i:i + batches.n_rows_per_epoch] for i in range(0, len(seen), batches.n_rows_per_epoch)]
    assert len(epochs) == 3 * rows and batches.epoch(steps) == 3 * rows
    for epoch in epochs:
        assert sorted(sum(epoch, [])) == [*range(1, n)]
    if batches.n_rows_per_epoch > 50:
        assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


def test_a_batch_depends_on_seed_and_step_only(tmp_path):
    folder = numbered(tmp_path, 3000)
    first = texts.TextBatches(folder, "train", 8, 4, 16, seed=1)
    forward = [first(step, micro)[0] for step in range(60) for micro in range(2)]
    again = texts.TextBatches(folder, "train", 8, 4, 16, seed=1)
    for i in reversed(range(120)):
        assert torch.equal(again(i // 2, i % 2)[0], forward[i])
    other = texts.TextBatches(folder, "train", 8, 4, 16, seed=2)
    assert not torch.equal(other(0, 0)[0], forward[0])


@pytest.mark.parametrize("ranks, micro_rows", [(2, 6), (4, 3), (3, 1), (12, 1)])
def test_any_number_of_ranks_sees_the_same_rows_in_the_same_order(tmp_path, ranks, micro_rows):
    folder = numbered(tmp_path, 500, [100, 33, 200])
    alone = texts.TextBatches(folder, "train", 12, 12, 16, seed=1, mask_documents=True)
    together = [texts.TextBatches(folder, "train", 12, micro_rows, 16, 1, rank, ranks, True) for rank in range(ranks)]
    for step in range(9):
        parts = [batches(step, micro) for micro in range(12 // (ranks * micro_rows)) for batches in together]
        for which in (0, 1):
            assert torch.equal(torch.cat([part[which] for part in parts]), alone(step, 0)[which])
        bounds = [cu[:-1] + i * micro_rows * 16 for i, (_, _, cu) in enumerate(parts)]
        assert torch.equal(torch.cat(bounds), alone(step, 0)[2][:-1])
        assert {batches.targets_in_step(step) for batches in together} == {alone.targets_in_step(step)}


def test_document_bounds_are_those_of_a_naive_loop(tmp_path):
    lengths = np.random.default_rng(0).integers(2, 40, 100)
    n = int(lengths.sum())
    starts = {*np.cumsum([0, *lengths]).tolist()}
    batches = texts.TextBatches(numbered(tmp_path, n, lengths[:-1]), "train", 8, 8, 32, seed=0, mask_documents=True)
    for step in range(20):
        ids_BT, _, cu_seqlens = batches(step, 0)
        expected = [i for i, id in enumerate(ids_BT.flatten().tolist()) if id in starts or i % 32 == 0] + [8 * 32]
        assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == expected
        assert len(cu_seqlens) <= 8 * batches.most_documents + 1
    rows = [batches.gather(np.array([row]))[2] for row in range(batches.n_rows_per_epoch)]
    assert batches.most_documents == max(map(len, rows)) - 1 > 3
    whole = texts.TextBatches(str(tmp_path), "train", 8, 8, 32, seed=0)
    assert whole(0, 0)[2] is None and whole.most_documents == 1


@pytest.mark.parametrize("n, max_tokens, ranks", [(101, 0, 1), (105, 0, 1), (105, 42, 1), (105, 4, 1), (105, 0, 3),
                                                  (12, 0, 4), (7, 0, 2)])
def test_fixed_rows_have_every_target_once_in_order(tmp_path, n, max_tokens, ranks, context=10):
    folder = numbered(tmp_path, n, [3])
    per_rank = [[*texts.fixed_rows(folder, "train", context, 2, max_tokens, rank, ranks, mask_documents=True)]
                for rank in range(ranks)]
    assert len({len(batches) for batches in per_rank}) == 1     # so that ranks meet as often
    seen = []
    for batches in zip(*per_rank):
        for ids_BT, targets_BT, cu_seqlens in batches:
            assert len(ids_BT) > 0 and ids_BT.shape[1] == context and cu_seqlens[-1] == ids_BT.numel()
            held = targets_BT != -100
            assert torch.equal(targets_BT[held], ids_BT[held] + 1)
            seen += targets_BT[held].tolist()
    assert seen == [*range(1, min(n - 1, max_tokens or n) + 1)]


def test_a_split_shorter_than_a_row_is_filled_with_eot_as_a_document_of_its_own(tmp_path):
    folder = save_tokens(tmp_path, [9, 1, 2, 9, 3], [0, 3, 5])
    [(ids_BT, targets_BT, cu_seqlens)] = texts.fixed_rows(folder, "train", 8, 4, mask_documents=True)
    assert ids_BT.tolist() == [[9, 1, 2, 9, 3, 9, 9, 9]]
    assert targets_BT.tolist() == [[1, 2, 9, 3, -100, -100, -100, -100]]
    assert cu_seqlens.tolist() == [0, 3, 5, 8]
