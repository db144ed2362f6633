"""formats.py and chats.py: rows to messages, chats to tokens on disk, those to packed batches."""
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import chats
import formats
from tasks import TASKS, Question
from tokenizer import MARKS, Tokenizer

HERE = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ZERO2CHAT_DATA", HERE.parent / "shared/data"))
needs_data = pytest.mark.skipif(not (DATA / "alpaca").is_dir(), reason=f"no {DATA}; set ZERO2CHAT_DATA")
WORDS = "a red fox and ten grey owls went down to the river; then they sat there, said nothing and ate 12 fish".split()


def said(user, assistant, system=""):
    return formats.chat(user, assistant, system=system)


def rows(n, seed=0, longest=60):
    """Alpaca rows of ragged lengths, each with a question of its own."""
    some = random.Random(seed)
    text = lambda least: " ".join(some.choices(WORDS, k=some.randint(least, longest)))
    return [{"instruction": f"{i}: {text(1)}", "input": text(1) if i % 3 == 0 else "", "output": text(1)}
            for i in range(n)]


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train([json.dumps(row) for row in rows(50)], 400).save(folder)
    return str(folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    """Prepared data of two sources."""
    folder = tmp_path_factory.mktemp("prepared")
    sources = ",".join(write(folder / f"{name}.jsonl", rows(200, seed)) for seed, name in enumerate("ab"))
    chats.prepare(str(folder / "out"), sources, tokenizer, context=256, val_fraction=0.2)
    return str(folder / "out")


def read(sources, notes=None, **how):
    [source] = formats.parse_chats(sources, **how)
    return list(source.chats(Counter() if notes is None else notes))


# --- formats ---

@pytest.mark.parametrize("row, expected", [
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, said("Add.\n\n1 2", "3")),
    ({"instruction": "Hi", "output": "Ho", "input": None}, said("Hi", "Ho")),
    ({"instruction": "Hi", "output": "Ho", "system": "S", "history": [["a", "b"]]},
     formats.chat("a", "b", "Hi", "Ho", system="S")),
    ({"instruction": "Add.", "context": "1 2", "response": "3", "category": "qa"}, said("Add.\n\n1 2", "3")),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, said("Hi", "Ho")),
    ({"system": "S", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
     said("Hi", "Ho", "S")),
    ({"messages": [{"role": "developer", "content": "S"}, {"role": "user", "content": "Hi"},
                   {"role": "assistant", "content": "Ho"}]}, said("Hi", "Ho", "S")),
    ({"messages": [{"role": "Human", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                   {"role": "bot", "content": "Ho"}]}, said("Hi", "Ho")),
    ({"prompt": "Hi", "completion": "Ho"}, said("Hi", "Ho")),
    ({"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Ho"}]},
     said("Hi", "Ho")),
    ({"prompt": "Hi", "chosen": "Ho", "rejected": "No"}, said("Hi", "Ho")),
])
def test_each_format_is_recognised_by_its_columns_and_becomes_messages(tmp_path, row, expected):
    [(messages, _, _, _)] = read(write(tmp_path / "x.jsonl", [row]))
    assert messages == expected


def test_gsm8k_becomes_thinking_and_an_answer_without_calculator_marks(tmp_path):
    row = {"question": "How many?", "answer": "There are 2+3 = <<2+3=5>>5 of them.\n#### 5"}
    [(messages, _, _, _)] = read(write(tmp_path / "x.jsonl", [row]))
    assert messages[1]["content"] == "<think>\nThere are 2+3 = 5 of them.\n</think><answer>5</answer>"
    assert TASKS["gsm8k"].score(messages[1]["content"], "5") == (True, True)
    assert messages[0]["content"].startswith("How many?\n")


def test_a_format_can_be_named_where_columns_would_say_another(tmp_path):
    row = {"instruction": "Hi", "context": "there", "response": "Ho", "output": "not this"}
    file = write(tmp_path / "x.jsonl", [row])
    assert read(file)[0][0] == said("Hi", "not this")
    assert read(f"dolly:{file}")[0][0] == said("Hi\n\nthere", "Ho")


@pytest.mark.parametrize("messages", [said("Hi", "Ho"), said("Hi", "Ho", "S"), formats.chat(*"abcdef", system="S")])
def test_alpaca_and_messages_go_there_and_back(messages):
    assert formats.from_alpaca(json.loads(json.dumps(formats.to_alpaca(messages)))) == messages
    assert formats.from_messages(formats.to_messages(messages)) == messages


def test_alpaca_refuses_messages_that_it_has_no_room_for():
    for messages in ([], said("Hi", "Ho")[:1], said("Hi", "Ho") + said("", "Ho")[1:], said("Hi", "Ho")[::-1]):
        with pytest.raises(ValueError, match="^Alpaca has room for"):
            formats.to_alpaca(messages)


USELESS = {"empty reply": {"messages": said("Hi", " \n")}, "no assistant turn": {"messages": said("Hi", "")[:1]},
           "empty question": {"messages": said("", "Ho")},
           "thumbs down": {"messages": said("Hi", "Ho"), "label": False}}


def test_rows_of_no_use_are_dropped_and_counted_by_reason_or_stop_everything(tmp_path):
    good = {"messages": said("Hi", "Ho"), "label": True}
    file = write(tmp_path / "x.jsonl", [good, *USELESS.values(), USELESS["empty reply"], good])
    notes = Counter()
    assert [chat[0] for chat in read(file, notes)] == 2 * [said("Hi", "Ho")]
    assert notes == {**dict.fromkeys(USELESS, 1), "empty reply": 2}
    with pytest.raises(ValueError, match=r"^row 2 of .*x.jsonl cannot be used: empty reply; --unusable=drop "):
        read(file, unusable="error")


def test_what_follows_the_last_reply_is_left_out(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"messages": said("Hi", "Ho") + said("And?", "")[:1]}])
    assert read(file)[0][0] == said("Hi", "Ho")


HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}


@pytest.mark.parametrize("row, sentence", [
    ({"text": "Hi"}, r"it is of no known format, having text"),
    ({"messages": "Hi"}, "its turns are 'Hi', not a list"),
    ({"messages": [{"role": "wizard", "content": "Hi"}]}, "its role 'wizard' is unknown"),
    ({"messages": [{"role": "user", "content": 7}]}, "its content is 7, not a text"),
    ({"messages": [{"role": "user"}]}, "it has no content or value, but role"),
    ({"instruction": 3, "output": "x"}, "its instruction is 3, not a text"),
    ({"instruction": "x", "output": "x", "history": ["x"]}, "its history is"),
    ({"conversations": [HUMAN, HUMAN, GPT]}, "two turns of the user follow each other"),
    ({"conversations": None}, "its turns are None, not a list"),
    ({"question": "How?", "answer": "5"}, "it is not of gsm8k"),
    ("Hi", "it is 'Hi', not an object"),
    (7, "it is 7, not an object"),
])
def test_malformed_rows_are_one_sentence_or_counted(tmp_path, row, sentence):
    file, notes = write(tmp_path / "x.jsonl", [row]), Counter()
    with pytest.raises(ValueError, match=rf"^row 1 of .*x.jsonl cannot be used: {sentence}.*--malformed=drop") as error:
        read(file)
    assert "\n" not in str(error.value)
    assert read(file, notes, malformed="drop") == [] and notes == {"malformed": 1}


def test_a_row_that_lacks_a_column_of_the_first_one_is_malformed(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    with pytest.raises(ValueError, match="^row 2 of .* it has no completion, but prompt"):
        read(file)


@pytest.mark.parametrize("sources, sentence", [
    ("", "names none"), ("task:juggling", "there is no task 'juggling'"), ("nowhere.jsonl", "there is no source"),
    ("task:gsm8k", "gsm8k reads its published files"), ("stdlib", "holds no rows of chats"),
    ("task:arithmetic=1,nowhere.jsonl", "some sources have a weight"), ("task:arithmetic=0", "must be above 0"),
    ("task:arithmetic=1e999", "must be above 0 and finite"),
    ("task:arithmetic,task:arithmetic", "different ones"),
])
def test_a_wrong_source_is_one_sentence(sources, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        formats.parse_chats(sources)
    assert "\n" not in str(error.value)


def test_parquet_files_and_hub_datasets_are_sources(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet
    items = [formats.to_messages(formats.from_alpaca(row)) for row in rows(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), tmp_path / "x.parquet")
    load = lambda name, config, split, streaming: items if (name, split) == ("a/b", "train") else None
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    for sources in (f"{tmp_path}/x.parquet", "hub:a/b", "messages:hub:a/b::train"):
        assert [chat[0] for chat in read(sources)] == [item["messages"] for item in items]
    with pytest.raises(ValueError, match="hub dataset c/d cannot be read"):
        read("hub:c/d")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is damaged or not parquet"):
        read(f"{tmp_path}/x.parquet")


def test_the_test_split_of_gsm8k_is_refused(tmp_path):
    file = write(tmp_path / "test.jsonl", [{"question": "How many?", "answer": "Five.\n#### 5"}])
    for sources in (file, f"gsm8k:{file}", f"task:gsm8k:{file}"):
        with pytest.raises(ValueError, match="is not the train split"):
            read(sources)
    with pytest.raises(ValueError, match="is the test split of gsm8k, which is never trained on"):
        formats.refuse_test_split("hub:openai/gsm8k:main:test")


def test_a_task_is_a_source_whose_dev_questions_are_held_out():
    found = read("task:arithmetic", task_examples=200, val_fraction=0.25)
    sides = Counter(side for _, _, side, _ in found)
    assert sides == {"train": 150, "val": 50}
    assert all(0.9 <= key / 2 ** 64 < 0.95 for _, key, side, _ in found if side == "val")
    assert all(key / 2 ** 64 < 0.9 for _, key, side, _ in found if side == "train")


def test_a_task_goes_on_when_it_has_no_new_dev_questions_and_only_made_up_answers_are_flawed(monkeypatch):
    asked_for = []

    def questions(split, seed=0, path=None, limit=0, **flawed):
        asked_for.append((path, flawed))
        made = (Question.of(f"{split} {i}", str(i), "") for i in itertools.count())
        return itertools.islice(made, 3 if split == "dev" else 8 if path else None)

    task = types.SimpleNamespace(questions=questions, messages=TASKS["arithmetic"].messages)
    monkeypatch.setitem(formats.TASKS, "few", task)
    found = read("task:few", task_examples=40, val_fraction=0.25, flawed=0.5)
    assert Counter(side for _, _, side, _ in found) == {"train": 37, "val": 3}
    assert Counter(side for _, _, side, _ in read("task:few:folder", flawed=0.5)) == {"train": 8, "val": 3}
    assert set(map(str, asked_for)) == {"(None, {'flawed': 0.5})", "('folder', {})"}


# --- preparing ---

def prepared(tmp_path, sources, tokenizer, **options):
    out = str(tmp_path / "out")
    chats.prepare(out, sources, tokenizer, **{"val_fraction": 0.2, **options})
    return chats.Chats(out, "train"), chats.Chats(out, "val")


def texts(split, tokenizer):
    tokenizer = Tokenizer.load(tokenizer)
    return [tokenizer.decode(split.tokens[a:b]) for a, b in zip(split.offsets[:-1], split.offsets[1:])]


def test_bulk_encoding_equals_encode_chat(tokenizer):
    tok = Tokenizer.load(tokenizer)
    cases = [said("<think>Hi</think>", "<think>\na\n</think><answer>1</answer>"), said("", "<answer><answer>"),
             formats.chat("a", "b", "c", "d<|im_end|>", system="S\n"), said("\ud800", "é\ud83d\n"),
             [{"role": "assistant", "content": "b"}, {"role": "assistant", "content": ""}],
             *(formats.from_alpaca(row) for row in rows(50))]
    for messages, (ids, mask) in zip(cases, chats.encode_chats(tok, cases), strict=True):
        assert (ids.tolist(), mask.tolist()) == tok.encode_chat(messages)


@needs_data
def test_bulk_encoding_equals_encode_chat_on_real_conversations(tokenizer):
    tok = Tokenizer.load(tokenizer)
    cases = [chat[0] for chat in read(f"{DATA}/oasst1/en-validation.threads.jsonl.gz")[:500]]
    assert len(cases) == 500 and max(map(len, cases)) > 2
    for messages, (ids, mask) in zip(cases, chats.encode_chats(tok, cases), strict=True):
        assert (ids.tolist(), mask.tolist()) == tok.encode_chat(messages)


@needs_data
def test_ids_and_mask_equal_transformers_on_500_real_conversations(tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tokenizer)
    cases = [chat[0] for chat in read(f"{DATA}/oasst1/en-validation.threads.jsonl.gz")[:500]]
    assert len(cases) == 500
    for messages, (ids, mask) in zip(cases, chats.encode_chats(Tokenizer.load(tokenizer), cases), strict=True):
        encoded = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert (encoded["input_ids"], encoded["assistant_masks"]) == (ids.tolist(), mask.tolist())


def test_every_chat_is_on_one_side_whole_with_its_mask_and_source(tmp_path, tokenizer):
    some = {name: rows(100, seed) for seed, name in enumerate("ab")}
    files = {name: write(tmp_path / f"{name}.jsonl", some[name]) for name in some}
    train, val = prepared(tmp_path, ",".join(files.values()), tokenizer)
    tok = Tokenizer.load(tokenizer)
    expected = {}
    for name in some:
        for row in some[name]:
            ids, mask = tok.encode_chat(formats.from_alpaca(row))
            expected[tuple(ids)] = mask, files[name]
    found = {}
    for split in (train, val):
        for e, (a, b) in enumerate(zip(split.offsets[:-1], split.offsets[1:])):
            found[tuple(split.tokens[a:b].tolist())] = split.mask[a:b].tolist(), split.names[split.source[e]]
    assert found == expected and 10 < len(val.lengths) < 80
    assert train.attributes["fingerprint"] == tok.fingerprint and train.attributes["examples"] == len(train.lengths)
    assert train.tokens.dtype == np.uint16 and sum(train.targets) == train.mask.sum()


def test_the_same_question_stands_on_one_side_whatever_follows_and_whatever_the_system_prompt(tmp_path, tokenizer):
    items = [{"messages": said(row["instruction"], f"{i}", f"S{i}") + said("More", "No")}
             for row in rows(40) for i in range(3)]
    train, val = prepared(tmp_path, write(tmp_path / "x.jsonl", items), tokenizer)
    questions = [{text.partition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
                  for text in texts(split, tokenizer)} for split in (train, val)]
    assert len(questions[1]) > 1 and not questions[0] & questions[1]


def test_a_gsm8k_file_holds_out_the_same_questions_as_the_task(tmp_path, tokenizer):
    items = [{"question": f"How many is {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(300)]
    file = write(tmp_path / "train.jsonl", items)
    by_file, by_task = ({(key, side) for _, key, side, _ in read(source)} for source in (file, f"task:gsm8k:{file}"))
    assert by_file == by_task and {side for _, side in by_file} == {"train", "val"}


def test_something_is_held_out_of_the_smallest_data_and_something_left(tmp_path, tokenizer):
    train, val = prepared(tmp_path, write(tmp_path / "x.jsonl", rows(3)), tokenizer, val_fraction=1e-6)
    assert (len(train.lengths), len(val.lengths)) == (2, 1)
    with pytest.raises(ValueError, match="none is left to train on"):
        prepared(tmp_path, write(tmp_path / "x.jsonl", rows(1)), tokenizer, overwrite=True)
    assert chats.Chats(str(tmp_path / "out"), "train").attributes["examples"] == 2      # what was there is untouched


def test_chats_longer_than_the_context_are_dropped_whole_or_stop_everything(tmp_path, tokenizer, capsys):
    tok = Tokenizer.load(tokenizer)
    items = rows(60)
    lengths = [len(tok.encode_chat(formats.from_alpaca(row))[0]) for row in items]
    context = sorted(lengths)[40]                       # exactly the length of one: it is kept
    train, val = prepared(tmp_path, write(tmp_path / "x.jsonl", items), tokenizer, context=context)
    assert sorted([*train.lengths, *val.lengths]) == sorted(n for n in lengths if n <= context)
    assert f"{sum(n > context for n in lengths)} longer than the context, dropped" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^row \d+ of .* tokens long, which context=\d+ does not hold"):
        prepared(tmp_path, str(tmp_path / "x.jsonl"), tokenizer, context=context, too_long="error", overwrite=True)


def test_weights_are_shares_of_examples_and_all_ends_with_the_first_source(tmp_path, tokenizer):
    one, other = (write(tmp_path / f"{name}.jsonl", rows(n, n)) for name, n in (("a", 60), ("b", 300)))
    train, val = prepared(tmp_path, f"{one}=1,{other}=3", tokenizer)
    counts = np.bincount(train.source, minlength=2) + np.bincount(val.source, minlength=2)
    assert counts[0] == 60 and 177 <= counts[1] <= 183


def test_endless_tasks_with_weights_need_an_end(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="has no end"):
        prepared(tmp_path, "task:arithmetic=1", tokenizer)
    train, val = prepared(tmp_path, "task:arithmetic=1", tokenizer, max_examples=100)
    assert (len(train.lengths), len(val.lengths)) == (80, 20)


def test_preparing_twice_gives_the_same_bytes(tmp_path, tokenizer):
    file = write(tmp_path / "x.jsonl", rows(50))
    first = [split.tokens.tobytes() for split in prepared(tmp_path, f"{file},task:arithmetic", tokenizer,
                                                          task_examples=50)]
    again = [split.tokens.tobytes() for split in prepared(tmp_path, f"{file},task:arithmetic", tokenizer,
                                                          task_examples=50, overwrite=True)]
    assert first == again


@pytest.mark.parametrize("options, sentence", [
    ({"val_fraction": 0.0}, "val_fraction must lie between 0 and 1"), ({"unusable": "skip"}, "must be drop or error"),
    ({"context": 0}, "context must be at least 8"), ({"flawed": 0.5}, "names no task"),
    ({"invalid_utf8": "x"}, "error or replace"),
    ({"context": 8}, "no row of .* can be used: 5 longer than the context"),
])
def test_a_wrong_option_is_one_sentence_and_leaves_nothing_behind(tmp_path, tokenizer, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        prepared(tmp_path, write(tmp_path / "x.jsonl", rows(5)), tokenizer, **options)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_needed_and_one_without_chats_is_refused(tmp_path, tokenizer):
    file = write(tmp_path / "x.jsonl", rows(5))
    with pytest.raises(ValueError, match="--tokenizer=out/pretrain"):
        prepared(tmp_path, file, "")
    spec = json.loads(Path(tokenizer, "tokenizer.json").read_text())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] == "<|endoftext|>"]
    spec["model"]["vocab"] = {text: id for text, id in spec["model"]["vocab"].items() if "im_" not in text}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="has no <|im_start|> and <|im_end|>, which chats need"):
        prepared(tmp_path, file, str(tmp_path))


def test_opening_says_what_is_wrong_with_the_files(tmp_path, folder, tokenizer):
    with pytest.raises(ValueError, match="there is no .*train.h5; name a folder .* data.py --kind=chats"):
        chats.Chats(str(tmp_path), "train")
    whole = Path(folder, "train.h5").read_bytes()
    (tmp_path / "train.h5").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="is cut short, or holds no chats"):
        chats.Chats(str(tmp_path), "train")
    with pytest.raises(ValueError, match=r"was encoded with a tokenizer of \d+ pieces .* has 264 "):
        chats.Chats(folder, "train", Tokenizer.train(["another"], 264))
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join("ab"))
    assert run(f"--sources={tmp_path}/text.txt", "--vocab_size=264", f"--out_dir={tmp_path}/text").returncode == 0
    with pytest.raises(ValueError, match="train.h5 holds text and no chats; name another"):
        chats.Chats(f"{tmp_path}/text", "train")


def run(*flags):
    return subprocess.run([sys.executable, "data.py", *flags], cwd=HERE, capture_output=True, text=True)


def test_the_script_prepares_chats_and_shows_what_is_trained_without_colour_in_a_pipe(tmp_path, tokenizer):
    file = write(tmp_path / "x.jsonl", [{"prompt": f"Hi {i}", "completion": f"Ho\x1b[7m {i}"} for i in range(20)])
    flags = ["--kind=chats", f"--sources={file}", f"--tokenizer={tokenizer}", f"--out_dir={tmp_path / 'out'}"]
    first = run(*flags, "--show=2")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("--- example") == 2 and "\x1b" not in first.stdout
    assert "<|im_start|>assistant\n[[Ho\ufffd[7m " in first.stdout and "<|im_end|>]]\n" in first.stdout
    again = run(*flags, "--show=2")                     # prepared with these options: only shown
    assert again.returncode == 0 and again.stdout in first.stdout
    other = run(*flags, "--show=2", "--context=64")
    assert other.returncode == 1 and "already holds data" in other.stderr
    wrong = run(*flags, "--overwrite=true", "--vocab_size=300")
    assert wrong.returncode == 1 and "vocab_size is an option of text only, and kind is chats" in wrong.stderr
    wrong = run("--context=64", f"--out_dir={tmp_path / 'other'}")
    assert wrong.returncode == 1 and "context is an option of chats only, and kind is text" in wrong.stderr


def test_a_terminal_sees_trained_tokens_in_colour(folder, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    split = chats.Chats(folder, "train")
    chats.print_examples(split, Tokenizer.load(tokenizer), 1)
    assert f"assistant\n{chats.COLOUR}" in (out := capsys.readouterr().out) and f"<|im_end|>{chats.PLAIN}\n" in out


# --- batches ---

def batches(folder, rows_per_step=8, micro_rows=4, context=256, seed=5, **how):
    return chats.ChatBatches(folder, "train", rows_per_step, micro_rows, context, seed, **how)


def documents(ids, cu_seqlens):
    flat = ids.flatten().tolist()
    return [flat[a:b] for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:])]


def test_best_fit_places_every_example_once_and_never_overfills():
    lengths = np.random.default_rng(0).integers(1, 101, 10_000)
    packed = chats.best_fit(lengths, np.random.default_rng(1).permutation(10_000), 100)
    assert sorted(e for row in packed for e in row) == list(range(10_000))
    assert max(lengths[row].sum() for row in packed) <= 100
    assert lengths.sum() / (100 * len(packed)) > 0.98


def test_best_fit_takes_the_row_with_the_least_room():
    lengths = np.array([70, 60, 30, 39])                # 39 goes beside 60, not into a row of its own; 30 beside 70
    assert chats.best_fit(lengths, np.arange(4), 100) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_holds_every_example_once_whole_and_the_next_packs_anew(folder, packing):
    b = batches(folder, packing=packing)
    split, orders = b.chats, []
    for epoch in range(2):
        picked = [e for row in b.epoch_rows(epoch) for e in row]
        assert sorted(picked) == list(range(len(split.lengths)))
        orders.append(picked)
    assert orders[0] != orders[1]
    if packing:
        assert {frozenset(row) for row in b.epoch_rows(0)} != {frozenset(row) for row in b.epoch_rows(1)}
    wanted = {tuple(split.tokens[a:z].tolist()) for a, z in zip(split.offsets[:-1], split.offsets[1:])}
    seen, step = set(), 0
    while b.epoch(step) < 1:
        for micro in range(2):
            ids, _, _, cu_seqlens = b(step, micro)
            seen |= {tuple(document) for document in documents(ids, cu_seqlens)}
        step += 1
    assert wanted <= seen


@pytest.mark.parametrize("packing", [True, False])
def test_targets_are_the_trained_tokens_of_the_same_example_and_nothing_else(folder, packing):
    b = batches(folder, packing=packing)
    split = b.chats
    place = {tuple(split.tokens[a:z].tolist()): split.mask[a:z] for a, z in zip(split.offsets[:-1], split.offsets[1:])}
    counted = 0
    for micro in range(2):
        ids, targets, weights, cu_seqlens = b(0, micro)
        assert weights is None and ids.dtype == targets.dtype == torch.int64 and cu_seqlens.dtype == torch.int32
        bounds = cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds[-1] == ids.numel() and all(x < y for x, y in zip(bounds, bounds[1:]))
        assert set(range(0, ids.numel() + 1, ids.shape[1])) <= set(bounds)              # no document spans two rows
        for document, wanted in zip(documents(ids, cu_seqlens), documents(targets, cu_seqlens)):
            mask = place.get(tuple(document))
            if mask is None:                                                            # what is left of a row
                assert set(document) == {split.pad_id} and set(wanted) == {-100}
                continue
            shifted = [token if trained else -100 for token, trained in zip(document[1:], mask[1:])]
            assert wanted == [*shifted, -100]
            assert Tokenizer.load(folder).chat_end_id in wanted
        counted += (targets != -100).sum().item()
    assert counted == b.targets_in_step(0)


def test_the_targets_of_several_turns_are_each_ones_own_ids_and_one_end_and_nothing_after_it(tmp_path, tokenizer):
    talks = [formats.chat("Hi", "Ho ho", "And?", "12 fish\n", "x", "<think>a</think><answer>3</answer>", system="S"),
             formats.chat("a red fox", " down there")]
    train, _ = prepared(tmp_path, write(tmp_path / "x.jsonl", [formats.to_messages(talk) for talk in talks * 6]),
                        tokenizer, val_fraction=0.01)
    tok, seen = Tokenizer.load(tokenizer), 0
    for example in range(len(train.lengths)):
        ids, targets, _, _ = train.assemble([[example]], int(train.lengths[example]))
        talk = next(talk for talk in talks if tok.decode(ids[0]) == tok.chat_text(talk))
        replies = [message["content"] for message in talk if message["role"] == "assistant"]
        marks = re.compile(f"({'|'.join(MARKS)})")
        expected = [[tok.specials.get(part) or tok.encode(part) for part in marks.split(text)] for text in replies]
        expected = [sum((part if isinstance(part, list) else [part] for part in parts), []) for parts in expected]
        assert targets[targets != -100].tolist() == sum((reply + [tok.chat_end_id] for reply in expected), [])
        ends = (targets[0] == tok.chat_end_id).nonzero().flatten()
        assert len(ends) == len(replies) and (targets[0, ends + 1] == -100).all()
        seen += len(replies)
    assert seen > 3


def test_a_mask_that_trains_nothing_is_refused(tmp_path, folder):
    import h5py
    shutil.copytree(folder, tmp_path / "out")
    with h5py.File(tmp_path / "out" / "train.h5", "r+") as file:
        file["mask"][:] = 0
    with pytest.raises(ValueError, match=r"train.h5 holds [\d,]+ examples and no trained token"):
        chats.Chats(str(tmp_path / "out"), "train")


def test_a_first_token_that_is_trained_is_no_target_of_the_example_before(folder):
    split = chats.Chats(folder, "train")
    split.mask = np.ones_like(split.mask)
    ids, targets, _, cu_seqlens = split.assemble([[0, 1]], int(split.lengths[:2].sum()))
    assert targets[0, split.lengths[0] - 1] == -100 and (targets == -100).sum() == 2


@pytest.mark.parametrize("packing", [True, False])
def test_no_batch_has_more_offsets_than_rows_of_the_most_documents(folder, packing):
    found = batches(folder, packing=packing)
    lengths = [len(found(step, micro)[3]) for step in range(40) for micro in range(2)]
    assert max(lengths) <= 4 * found.most_documents + 1 and found.most_documents < 100
    if not packing:
        assert found.most_documents == 2 and max(lengths) == 4 * 2      # a chat and what pads it, but in the longest


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_and_micro_batches_share_the_same_rows(folder, packing):
    one = batches(folder, 8, 8, packing=packing)
    for micro_rows, world_size in ((1, 1), (4, 1), (2, 2), (1, 4)):
        ranks = [batches(folder, 8, micro_rows, rank=rank, world_size=world_size, packing=packing)
                 for rank in range(world_size)]
        for step in (0, 3, 17):
            found, targets = Counter(), 0
            for b in ranks:
                for micro in range(8 // (micro_rows * world_size)):
                    ids, wanted, _, cu_seqlens = b(step, micro)
                    found.update(tuple(d) for d in documents(ids, cu_seqlens) if set(d) != {b.chats.pad_id})
                    targets += (wanted != -100).sum().item()
            ids, _, _, cu_seqlens = one(step, 0)
            assert found == Counter(tuple(d) for d in documents(ids, cu_seqlens) if set(d) != {one.chats.pad_id})
            assert targets == one.targets_in_step(step) == ranks[-1].targets_in_step(step)


def test_a_batch_is_a_function_of_seed_and_step_also_across_epochs_and_after_a_restart(folder):
    walked = batches(folder)
    last = int(3 * walked.steps_per_epoch) + 1
    for step in range(last):
        walked(step, 0)
    fresh = batches(folder)
    for step in (last, 0, int(walked.steps_per_epoch)):
        for one, other in zip(walked(step, 1), fresh(step, 1)):
            assert one is other is None or torch.equal(one, other)
        assert walked.epoch(step) == fresh.epoch(step)
    assert not torch.equal(fresh(0, 0)[0], batches(folder, seed=6)(0, 0)[0])
    assert fresh.epoch(0) == 0 and fresh.epoch(last) > 2.8


def test_weights_of_sources_reach_the_targets_and_the_denominator(folder):
    names = chats.Chats(folder, "train").names
    b = batches(folder, source_weights={names[0]: 0.25})
    total = 0.0
    for micro in range(2):
        _, targets, weights, _ = b(0, micro)
        assert weights.dtype == torch.float32 and set(weights.flatten().tolist()) == {0.0, 0.25, 1.0}
        assert torch.equal(weights > 0, targets != -100)
        total += weights.sum().item()
    assert b.targets_in_step(0) == pytest.approx(total) and total < batches(folder).targets_in_step(0)
    assert torch.equal(b(0, 0)[2], batches(folder, source_weights=f"{names[0]}=0.25")(0, 0)[2])
    for wrong, sentence in (({"x": 1.0}, "names 'x', but the sources"), ({names[0]: -1.0}, "at least 0"),
                            (dict.fromkeys(names, 0.0), "leaves no source of .*train.h5 to train on")):
        with pytest.raises(ValueError, match=sentence):
            batches(folder, source_weights=wrong)


def test_efficiency_is_real_tokens_over_processed_tokens(folder):
    for packing in (True, False):
        b = batches(folder, 1, 1, packing=packing)
        real = processed = 0
        for step in range(len(b.epoch_rows(0))):
            ids, _, _, cu_seqlens = b(step, 0)
            real += sum(len(d) for d in documents(ids, cu_seqlens) if set(d) != {b.chats.pad_id})
            processed += ids.numel()
        assert b.efficiency == pytest.approx(real / processed)
    assert batches(folder, packing=True).efficiency > 0.9 > batches(folder, packing=False).efficiency


def test_a_context_or_a_step_that_does_not_fit_is_one_sentence(folder):
    with pytest.raises(ValueError, match=r"holds [\d,]+ examples longer than context=64, the longest of \d+ tokens"):
        batches(folder, context=64)
    with pytest.raises(ValueError, match="fewer than one step of 4096 rows"):
        batches(folder, 4096, 1)
    with pytest.raises(ValueError, match="is not a multiple of micro_rows"):
        batches(folder, 8, 3)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_held_out_batches_hold_every_example_once_and_ranks_have_equally_many(folder, world_size):
    ranks = [list(chats.fixed_chats(folder, "val", 256, 2, rank=rank, world_size=world_size))
             for rank in range(world_size)]
    assert len({len(found) for found in ranks}) == 1
    split, found = chats.Chats(folder, "val"), Counter()
    for ids, targets, weights, cu_seqlens in (batch for rank in ranks for batch in rank):
        assert weights is None and ids.shape == targets.shape and ids.shape[1] == 256
        found.update(tuple(d) for d in documents(ids, cu_seqlens) if set(d) != {split.pad_id})
    assert found == Counter(tuple(split.tokens[a:z].tolist()) for a, z in zip(split.offsets[:-1], split.offsets[1:]))
    targets = sum((batch[1] != -100).sum().item() for rank in ranks for batch in rank)
    assert targets == split.targets.sum()


def test_only_the_first_held_out_examples_are_used_if_so_asked(folder):
    split = chats.Chats(folder, "val")
    [(_, targets, _, _)] = chats.fixed_chats(folder, "val", 256, 64, max_examples=3)
    assert (targets != -100).sum() == split.targets[:3].sum()


@needs_data
def test_alpaca_and_gsm8k_pack_into_rows_that_are_97_percent_full(tmp_path, tokenizer):
    sources = f"{DATA}/alpaca/alpaca_data.jsonl.gz,task:gsm8k:{DATA}/eval/gsm8k"
    chats.prepare(str(tmp_path / "out"), sources, tokenizer, max_examples=12_000)
    b = chats.ChatBatches(str(tmp_path / "out"), "train", 8, 4, 1024, 1)
    assert b.efficiency > 0.97
