"""runs/clean.py: the labels of the dirty corpus are true, and the scores are what they are called."""
import importlib.util
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("runs_clean", HERE / "runs/clean.py")
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)

NOUNS = [f"{a}{b}" for a in ("wolf", "owl", "bear", "mole", "duck", "crow", "elk", "hare") for b in "abcdefghijklmnopq"]
QUESTIONS = {"eval/a.jsonl.gz": [f"How many berries has the {n} if it had fifty and ate two?" for n in NOUNS],
             "eval/b.jsonl.gz": [f"Which of these is heavier, the {n} or the berry, and why so?" for n in NOUNS]}


def good(seed=1):
    rng = random.Random(seed)
    while True:
        yield "\n\n".join(" ".join(rng.choices(NOUNS, k=40)) + "." for _ in range(10))


@pytest.fixture(scope="module")
def made():
    return runs.corpus(good(), QUESTIONS, 1000, random.Random(0))


def test_the_shares_are_those_of_the_issue(made):
    counts = Counter(label["what"] for _, label in made)
    assert counts == {"good": 430, "exact": 100, "edited": 200, "spam": 200, "language": 50, "planted": 20}
    assert set(Counter(label["kind"] for _, label in made if label["what"] == "spam").values()) == {40}
    assert set(Counter(label["kind"] for _, label in made if label["what"] == "language").values()) == {10}


def test_the_same_seed_makes_the_same_corpus(made):
    assert runs.corpus(good(), QUESTIONS, 1000, random.Random(0)) == made
    assert runs.corpus(good(), QUESTIONS, 1000, random.Random(1)) != made


def test_copies_are_as_far_from_their_original_as_their_label_says(made):
    originals = {label["of"]: text for text, label in made if label["what"] == "good"}
    for text, label in made:
        if label["what"] == "exact":
            assert runs.jaccard(text, originals[label["of"]]) == 1
            assert text.lower().split() == originals[label["of"]].lower().split()
        if label["what"] == "edited":       # 400 words; an edit changes five n-grams at most, or six that it adds
            edits = max(1, round(label["share"] * 400))
            assert 396 - 5 * edits <= 396 * runs.jaccard(text, originals[label["of"]]) + 6 * edits
            before, after = Counter(originals[label["of"]].split()), Counter(text.split())
            assert max((before - after).total(), (after - before).total()) <= edits
            assert originals[label["of"]].split() != text.split()


def test_planted_questions_stand_in_their_document_and_nowhere_else(made):
    squeezed = lambda text: " ".join(text.lower().split())
    texts = [(squeezed(text), label) for text, label in made]
    planted = [label for _, label in texts if label["what"] == "planted"]
    assert {label["file"] for label in planted} == set(QUESTIONS)
    for label in planted:
        question = squeezed(label["question"])
        assert label["question"] in QUESTIONS[label["file"]]
        assert {id(l) for text, l in texts if question in text} <= {id(l) for l in planted if
                                                                    squeezed(l["question"]) == question}
        assert any(question in text for text, l in texts if l is label)


def test_spam_and_languages_are_long_enough_that_not_length_alone_gives_them_away(made):
    for text, label in made:
        if label["what"] in ("spam", "language"):
            assert len(text) > 300, label


@pytest.mark.parametrize("language", runs.LANGUAGES)
def test_other_languages_are_no_copies_of_each_other(language):
    texts = [runs.foreign(language, random.Random(seed)) for seed in range(8)]
    assert max(runs.jaccard(a, b) for i, a in enumerate(texts) for b in texts[:i]) < 0.5
    script = "CYRILLIC" if language == "ru" else "LATIN"
    assert all(unicodedata.name(letter).startswith(script) for letter in re.findall(r"[^\W\d_]", texts[0]))


def test_jaccard_is_the_share_of_common_5_grams():
    words = "a b c d e f g h i j".split()
    assert runs.jaccard(" ".join(words), "A, b c\nd e f g h i j!") == 1
    assert runs.jaccard(" ".join(words), " ".join(words[:9])) == 5 / 6
    assert runs.jaccard("a b c d e", "f g h i j") == 0


def test_edits_change_the_share_of_words_that_they_say():
    text = " ".join(f"w{i}" for i in range(1000))
    for share in (0.001, 0.01, 0.2):
        out = runs.edited(text, share, random.Random(0)).split()
        changed = Counter(text.split())
        changed.subtract(out)
        lost, more = sum(n for n in changed.values() if n > 0), -sum(n for n in changed.values() if n < 0)
        assert 0 < lost + more <= 2 * 1000 * share and (share < 0.1 or lost + more > 1000 * share)


def test_a_perfect_cleaner_scores_one_and_its_faults_are_seen(made):
    labels = [{"id": f"f:{i}", **label} for i, (_, label) in enumerate(made)]
    texts = {label["id"]: text for label, (text, _) in zip(labels, made)}
    originals = {label["of"]: label["id"] for label in labels if label["what"] == "good"}
    near = {label["id"] for label in labels if label["what"] in ("exact", "edited")
            and runs.jaccard(texts[label["id"]], texts[originals[label["of"]]]) >= runs.JACCARD}
    everything = {label["id"] for label in labels}
    found = runs.duplicates_found(labels, texts, everything - near)
    assert found["recall"] == found["precision"] == 1 and found["pairs"] == found["dropped"] == len(near) > 200
    found = runs.duplicates_found(labels, texts, everything)
    assert found["recall"] == 0 and found["dropped"] == 0
    alone = {label["id"] for label in labels if label["what"] == "planted"}
    found = runs.duplicates_found(labels, texts, everything - near - alone)
    assert found["precision"] == pytest.approx(len(near) / (len(near) + 20)) and found["recall"] == 1


def test_a_good_document_is_lost_only_with_all_its_copies(made):
    labels = [{"id": f"f:{i}", **label} for i, (_, label) in enumerate(made)]
    copy = next(label for label in labels if label["what"] == "exact")
    kept = {label["id"] for label in labels if label["what"] == "good" and label["of"] != copy["of"]}
    assert runs.filtered(labels, kept)["good", ""] == (430, 1)
    assert runs.filtered(labels, kept | {copy["id"]})["good", ""] == (430, 0)
    assert runs.filtered(labels, kept)["spam", "looped"] == (40, 40)
    assert runs.filtered(labels, kept)["planted", "eval/a.jsonl.gz"] == (10, 10)


def test_parts_are_whole_paragraphs_of_their_chapter():
    text = next(good())
    parts = list(runs.cut(text * 3, random.Random(0)))
    assert "\n\n".join(parts) == (text * 3)[:len("\n\n".join(parts))] and all(len(part) >= 1000 for part in parts)
