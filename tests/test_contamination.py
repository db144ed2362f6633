"""contamination.py: every planted question is found, and nothing where there is none."""
import gzip
import json
import os
import pickle
from pathlib import Path

import pytest

import contamination
from contamination import Contamination

HERE = Path(contamination.__file__).resolve().parent
DATA = Path(os.environ.get("ZERO2CHAT_DATA") or HERE.parent / "shared/data")
needs_data = pytest.mark.skipif(not (DATA / "eval/gsm8k").is_dir(), reason=f"no {DATA}; set ZERO2CHAT_DATA")
LONG = "Anna's three cats eat two tins of food a day; how many tins do they eat in a week and a half?"
SHORT = "Which planet is the largest one?"


def write(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


@pytest.fixture
def files(tmp_path):
    return [write(tmp_path / "sums.jsonl.gz", [{"question": LONG, "answer": "21"}]),
            write(tmp_path / "planets.jsonl", [{"goal": SHORT}, {"goal": "Boil eggs"}, {"prompt": LONG, "goal": None}]),
            write(tmp_path / "turns.jsonl", [
                {"turns": ["Name the nine longest rivers.", "And their lengths please, now."]},
                {"prompt": [{"role": "user", "content": "Say who wrote this play."}]}])]


def test_each_file_whose_question_stands_in_a_text_is_named(files):
    questions = Contamination(files)
    sums, planets, turns = files
    assert questions.found(f"Before. {LONG} After.") == [sums, planets]
    assert questions.found(f"x {SHORT.upper().replace(' ', ' – ')} x") == [planets]
    assert questions.found_all(["", "and THEIR lengths\nplease now", "he will say who wrote this play"]) == [
        [], [turns], [turns]]
    assert questions.questions == {sums: 1, planets: 3, turns: 3}
    assert questions.too_short == {sums: 0, planets: 1, turns: 0}


def test_thirteen_words_in_a_row_are_enough_and_twelve_are_not(files):
    words, questions = LONG.split(), Contamination(files)
    for first in range(len(words) - 13):
        assert questions.found("so " + " ".join(words[first:first + 13])) == files[:2]
        assert questions.found(" ".join(words[first + 1:first + 13]) + " so") == ["x"][1:]
    assert questions.found(SHORT.rsplit(" ", 1)[0]) == []


def test_a_question_is_not_put_together_from_two_texts(files):
    half = len(SHORT.split()) // 2
    texts = [" ".join(SHORT.split()[:half]), " ".join(SHORT.split()[half:])]
    assert Contamination(files).found_all(texts) == [[], []]


def test_shorter_questions_can_be_asked_for_and_folders_and_columns_named(files, tmp_path):
    assert Contamination(files, shortest=2).found("How I boil eggs today") == files[1:2]
    assert Contamination([str(tmp_path)]).files == sorted(files)
    assert Contamination([files[0]], ngram=1, shortest=1, columns=("answer",)).found("It is 21.") == files[:1]


def test_questions_travel_to_other_processes(files):
    copy = pickle.loads(pickle.dumps(Contamination(files)))
    assert copy.found(LONG) == files[:2]


def test_files_without_questions_are_refused_in_a_sentence(tmp_path):
    for rows, message in (([{"story": "x"}], "none of the columns question.*but story"), ([], "no rows"),
                          (["x"], "row 1 of .* is no object")):
        with pytest.raises(ValueError, match=message):
            Contamination([write(tmp_path / "other.jsonl", rows)])
    (tmp_path / "questions.txt").write_text("Who?")
    with pytest.raises(ValueError, match="questions.txt is neither"):
        Contamination([str(tmp_path / "questions.txt")])
    with pytest.raises(ValueError, match="from 1 to ngram=13"):
        Contamination([], shortest=20)
    assert Contamination([]).found(LONG) == []


@needs_data
def test_every_published_question_is_found_where_it_was_planted():
    path = str(DATA / "eval/gsm8k/test.jsonl.gz")
    questions = Contamination([path])
    texts = contamination.questions_of(path)
    assert all(found == [path] for found in questions.found_all([f"A page. {text}\nMore." for text in texts]))
    with gzip.open(DATA / "dirty/c4_demo.jsonl.gz", "rt", encoding="utf-8") as file:
        web = [json.loads(line)["text"] for line in file]
    assert not any(questions.found_all(web))
