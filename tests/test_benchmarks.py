"""Files to items: every published format from a few rows, lm-evaluation-harness's prompts to the letter, how files are
found, and one sentence for what is missing or of another shape."""
import gzip
import json
import os
import random

import numpy as np
import pytest

import benchmarks
from benchmarks import CHOICES, find, load_choices, load_generated, load_texts, program_of
from tokenizer import Tokenizer

DATA = os.environ.get("ZERO2CHAT_DATA") or os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__)))), "shared", "data")
ARC = {"id": "x", "question": "Why?", "choices": {"text": ["so", "thus"], "label": ["A", "B"]}, "answerKey": "B"}
MMLU = {"subject": "high_school_physics", "question": " What falls? ", "choices": ["a", "b", "c", "d"], "answer": 2}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def one(task, path, **options):
    (item,), _, _ = load_choices(task, str(path), **options)
    return item


# --- multiple choice ---

def test_hellaswag_is_cleaned_as_the_harness_does(tmp_path):
    row = dict(ind=3, activity_label="Cooking", ctx_a="[header] How to boil [title] Fill a pot.", ctx_b="THE man",
               endings=["[step] He  stirs.", "sits [x] down"], label="1", source_id="activitynet~1")
    item = one("hellaswag", write(tmp_path / "hellaswag_val.jsonl", [row]))
    assert item.context == "Cooking: How to boil. Fill a pot. The man"
    assert item.continuations == [" " + " He stirs.", " sits down"] and item.lengths == [10, 9]
    assert item.gold == 1 and item.group == "activitynet~1"


def test_hellaswag_that_was_prepared_before_is_taken_as_it_is(tmp_path):
    row = dict(ind=3, query="Cooking: a  pot.", choices=["boils", "is cold"], gold=0)
    item = one("hellaswag", write(tmp_path / "x.jsonl.gz", [row]))
    assert (item.context, item.continuations, item.gold) == ("Cooking: a  pot.", [" boils", " is cold"], 0)


@pytest.mark.parametrize("task", ["arc_easy", "arc_challenge"])
@pytest.mark.parametrize("row", [
    ARC, {**ARC, "choices": {"text": ["so", "thus"], "label": ["1", "2"]}, "answerKey": "2"},
    {"question": {"stem": "Why?", "choices": [{"text": "so", "label": "A"}, {"text": "thus", "label": "B"}]},
     "answerKey": "B"}])
def test_arc_in_the_hubs_and_in_the_original_layout(tmp_path, task, row):
    item = one(task, write(tmp_path / "arc.jsonl", [row]))
    assert item.context == "Question: Why?\nAnswer:" and item.continuations == [" so", " thus"] and item.gold == 1


def test_piqa(tmp_path):
    item = one("piqa", write(tmp_path / "p.jsonl", [dict(goal="Open it", sol1="push", sol2="pull", label=1)]))
    assert (item.context, item.continuations, item.gold) == ("Question: Open it\nAnswer:", [" push", " pull"], 1)


def test_mmlu_shows_the_first_examples_of_its_subject(tmp_path):
    other = {**MMLU, "subject": "law", "question": "Another?"}
    dev = [other, {**MMLU, "question": "First?", "answer": 0}, other, {**MMLU, "question": "Second?", "answer": 3}]
    write(tmp_path / "mmlu" / "dev.jsonl", dev)
    write(tmp_path / "mmlu" / "test.jsonl", [MMLU])
    item = one("mmlu", tmp_path, shots=2)
    listed = "A. a\nB. b\nC. c\nD. d\nAnswer:"
    assert item.context == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        f"First?\n{listed} A\n\nSecond?\n{listed} D\n\nWhat falls?\n{listed}")
    assert item.continuations == [" A", " B", " C", " D"] and item.gold == 2 and item.group == "high_school_physics"
    with pytest.raises(ValueError, match="has 2 worked examples for a question of 'high_school.*, and --shots=3"):
        load_choices("mmlu", str(tmp_path), shots=3)


def test_mmlu_takes_five_examples_unless_told_and_none_for_a_chat_model(tmp_path):
    write(tmp_path / "mmlu" / "dev.jsonl", [{**MMLU, "question": f"{i}?"} for i in range(5)])
    write(tmp_path / "mmlu" / "val.jsonl", [MMLU])
    assert one("mmlu", tmp_path).context.count("Answer:") == 6
    item = one("mmlu", tmp_path, chat=True)
    assert item.context.count("Answer:") == 1 and item.continuations == ["A", "B", "C", "D"]


def test_mmlus_original_csv_and_the_hubs_parquet_give_the_same(tmp_path):
    path = tmp_path / "high_school_physics_test.csv"
    path.write_text('" What falls? ",a,b,c,d,C\n')
    assert one("mmlu", path, shots=0) == one("mmlu", write(tmp_path / "x.parquet", [MMLU]), shots=0)


def test_examples_are_drawn_from_the_training_file_as_the_harness_draws_them(tmp_path):
    train = [{**ARC, "question": f"train {i}?"} for i in range(9)]
    write(tmp_path / "ARC-Easy-Train.jsonl", train)
    write(tmp_path / "ARC-Easy-Test.jsonl", [ARC, ARC])
    items, files, shots = load_choices("arc_easy", str(tmp_path), shots=2)
    draw = random.Random(1234)          # the harness's seed, one draw a question
    for item in items:
        drawn = draw.sample(train, 2)
        assert item.context == "".join(f"Question: {row['question']}\nAnswer: thus\n\n" for row in drawn) + (
            "Question: Why?\nAnswer:")
    assert shots == 2 and set(files) == {"ARC-Easy-Train.jsonl", "ARC-Easy-Test.jsonl"}


def test_without_a_training_file_examples_are_other_questions(tmp_path):
    rows = [{**ARC, "question": f"{i}?"} for i in range(4)]
    items, _, _ = load_choices("arc_easy", str(write(tmp_path / "arc.jsonl", rows)), shots=3)
    for i, item in enumerate(items):
        asked = [part for part in item.context.split("\n\n") if part.startswith(f"Question: {i}?")]
        assert item.context.count("Question:") == 4 and len(asked) == 1


def test_limit_takes_the_first_questions_and_of_mmlu_those_of_each_subject(tmp_path):
    rows = [{**MMLU, "subject": name, "question": f"{i}?"} for name in ("a", "b") for i in range(3)]
    path = str(write(tmp_path / "m.jsonl", rows))
    assert [item.group for item in load_choices("mmlu", path, 0, 2)[0]] == ["a", "a", "b", "b"]
    path = str(write(tmp_path / "arc.jsonl", [{**ARC, "question": f"{i}?"} for i in range(3)]))
    assert [item.group for item in load_choices("arc_easy", path, 0, 2)[0]] == ["0?", "1?"]


# --- generated answers ---

HUMANEVAL = dict(task_id="t/0", prompt="import math\n\ndef f(x):\n    \"\"\"Doubles.\"\"\"\n", entry_point="f",
                 canonical_solution="    return 2 * x\n", test="def check(candidate):\n    assert candidate(2) == 4\n")


def test_humaneval_and_ifeval_rows(tmp_path):
    rows, files = load_generated("humaneval", str(write(tmp_path / "HumanEval.jsonl.gz", [HUMANEVAL])))
    assert rows[0]["entry_point"] == "f" and list(files) == ["HumanEval.jsonl.gz"]
    row = dict(key=1, prompt="Say so.", instruction_id_list=["a:b"], kwargs=[{"n": 3, "unused": None}])
    rows, _ = load_generated("ifeval", str(write(tmp_path / "input_data.jsonl", [row])))
    assert rows[0]["kwargs"] == [{"n": 3}]


def test_a_chat_models_code_is_found_in_its_answer():
    def runs(answer):
        space = {}
        exec(program_of(HUMANEVAL, answer), space)
        return space["f"](4)
    assert runs("Sure:\n```python\ndef f(x):\n    return math.floor(2 * x)\n```\nThat doubles.") == 8
    assert runs("```\ndef f(x):\n    return x + x") == 8                # cut off before the end of the block
    assert runs("def f(x):\n    return 2 * x") == 8
    assert runs("    return 2 * x") == 8                                # the body alone
    with pytest.raises(AssertionError):
        runs("```python\ndef f(x):\n    return 3 * x\n```")


# --- text ---

def test_texts_are_counted_in_bytes_words_and_ids(tmp_path):
    tokenizer = Tokenizer.train(["a b c"], 264)
    (tmp_path / "a.txt").write_text("é two  words\n<|endoftext|>\nsecond\n<|endoftext|>\n\n", encoding="utf-8")
    ids, sizes, words, data = load_texts(str(tmp_path / "a.txt"), tokenizer)
    assert [tokenizer.decode(doc) for doc in ids] == ["é two  words\n", "second\n"]
    assert sizes == [14, 7] and words == [4, 2]         # the harness counts the empty word after the last line end
    assert data != load_texts(str(tmp_path / "a.txt"), tokenizer, max_bytes=9)[3]


def test_a_folder_of_data_py_gives_its_held_out_documents(tmp_path):
    from texts import prepare
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"number {i} of some"}) + "\n" for i in range(60)))
    prepare(str(tmp_path / "text"), str(tmp_path / "a.jsonl"), val_fraction=0.5, vocab_size=300)
    tokenizer = Tokenizer.load(tmp_path / "text")
    ids, sizes, words, _ = load_texts(str(tmp_path / "text"), tokenizer)
    assert 10 < len(ids) < 50 and set(words) == {4}
    for doc, size in zip(ids, sizes):
        text = tokenizer.decode(doc)
        assert text.startswith("number") and text.endswith("some") and size == len(text)
    first = load_texts(str(tmp_path / "text"), tokenizer, max_bytes=30)
    assert len(first[0]) == len(first[1]) == len(first[2]) == 2 and np.array_equal(first[0][0], ids[0])


# --- files ---

@pytest.mark.parametrize("task, names, expected", [
    ("hellaswag", ["hellaswag_val.jsonl", "hellaswag_train.jsonl", "hellaswag_test.jsonl"], ["hellaswag_val.jsonl"]),
    ("hellaswag", ["Rowan/hellaswag/data/validation-00000-of-00001.parquet", "hellaswag/x-train.parquet"],
     ["Rowan/hellaswag/data/validation-00000-of-00001.parquet"]),
    ("arc_easy", ["ARC-Easy-Dev.jsonl", "ARC-Easy-Test.jsonl", "ARC-Challenge-Test.jsonl"], ["ARC-Easy-Test.jsonl"]),
    ("arc_easy", ["mc/arc-easy.validation.jsonl.gz", "mc/arc-challenge.validation.jsonl.gz"],
     ["mc/arc-easy.validation.jsonl.gz"]),
    ("mmlu", ["mmlu/dev/law_dev.csv", "mmlu/test/art_test.csv", "mmlu/test/law_test.csv", "mmlu/readme.txt"],
     ["mmlu/test/art_test.csv", "mmlu/test/law_test.csv"]),
    ("gsm8k", ["gsm8k/train.jsonl", "gsm8k/test.jsonl", "gsm8k/.hidden/test.jsonl"], ["gsm8k/test.jsonl"]),
    ("humaneval", ["HumanEval.jsonl.gz"], ["HumanEval.jsonl.gz"]),
    ("ifeval", ["ifeval/input_data.jsonl"], ["ifeval/input_data.jsonl"])])
def test_files_are_found_by_their_published_names(tmp_path, task, names, expected):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = find(task, str(tmp_path), benchmarks.HUB[task][2])
    assert [os.path.relpath(path, tmp_path) for path in found] == expected


def test_what_is_missing_is_said_with_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match="no file or folder 'nowhere' for task piqa"):
        find("piqa", "nowhere", ("validation",))
    (tmp_path / "arc-easy.train.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="task arc_easy has no data in .*'arceasy' in its path and its split, test or"):
        find("arc_easy", str(tmp_path), ("test", "validation"))


@pytest.mark.parametrize("task, content, sentence", [
    ("piqa", '{"goal": "x"}\n', r"row 1 of p.jsonl is not of piqa \(no label.*it holds goal='x'"),
    ("piqa", '{"goal": "x", "sol1": "a", "sol2": "", "label": 0}\n', "answers not empty"),
    ("piqa", '{"goal": "x", "sol1": "a", "sol2": "b", "label": 2}\n', "the right answer is number 2 of 2"),
    ("arc_easy", json.dumps({**ARC, "answerKey": "E"}), "row 1 of p.jsonl is not of arc_easy"),
    ("arc_easy", json.dumps(ARC) + '\n{"question": 3}\n', "row 2 of p.jsonl is not of arc_easy"),
    ("hellaswag", '{"ctx_a": "x"}', "is not of hellaswag .no 'ctx_b'"),
    ("mmlu", json.dumps({**MMLU, "choices": None}), "is not of mmlu"),
    ("humaneval", json.dumps({**HUMANEVAL, "prompt": " "}), "must be text, not empty"),
    ("ifeval", '{"key": 1, "prompt": "", "instruction_id_list": [], "kwargs": []}', "the prompt is empty"),
    ("piqa", "[3]", "is 3; a row is an object with named columns"), ("piqa", "", "holds no rows"),
    ("piqa", '{"goal": ', "is not JSON")])
def test_a_file_of_the_wrong_shape_is_one_sentence(tmp_path, task, content, sentence):
    (tmp_path / "p.jsonl").write_text(content)
    load = load_choices if task in CHOICES else load_generated
    with pytest.raises(ValueError, match=sentence) as error:
        load(task, str(tmp_path / "p.jsonl"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, content, sentence", [
    ("a.jsonl.gz", gzip.compress(b'{"goal": 1}\n' * 99, mtime=0)[:-9], "cut off or damaged"),
    ("a.parquet", b"PAR1", "damaged"), ("a.xlsx", b"", "of no type that can be read")])
def test_a_damaged_file_is_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        load_choices("piqa", str(tmp_path / name))


def test_the_hub_is_asked_for_the_published_data_set(monkeypatch):
    import datasets
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "baber/piqa":
            raise ConnectionError("no route\nto host")
        return [ARC]
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    items, files, _ = load_choices("arc_easy", "hub", shots=1)
    assert asked == [("allenai/ai2_arc", "ARC-Easy", "test"), ("allenai/ai2_arc", "ARC-Easy", "train")]
    assert len(items) == 1 and all(name.startswith("hub:allenai/ai2_arc:") for name in files)
    with pytest.raises(ValueError, match="hub dataset baber/piqa cannot be read .ConnectionError: no route.; check"):
        load_choices("piqa", "hub")


@pytest.mark.skipif(not os.path.isdir(DATA), reason="the shared data are not on this machine")
@pytest.mark.parametrize("task, n", [("hellaswag", 1000), ("arc_easy", 570), ("arc_challenge", 299), ("piqa", 1838),
                                     ("mmlu", 1531), ("humaneval", 164), ("ifeval", 541)])
def test_the_real_files_are_found_and_read_whole(task, n):
    items = (load_choices if task in CHOICES else load_generated)(task, os.path.join(DATA, "eval"))[0]
    assert len(items) == n
