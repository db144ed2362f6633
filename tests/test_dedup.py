"""dedup.py: similarity from signatures, clusters, survivors, shared lines."""
import itertools
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dedup

ROOT = Path(dedup.__file__).resolve().parent
WORDS = [first + second for first in "ba ce di fo gu ha je ki lo mu".split() for second in
         "n nd r rst l lt s sk t mp".split()]


def document(seed, n_words):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(n_words))


def edited(text, edits, seed):
    """The text with some of its words replaced."""
    words, draw = text.split(), random.Random(seed)
    for place in draw.sample(range(len(words)), edits):
        words[place] = f"x{seed}x{place}"
    return " ".join(words)


def jaccard(a, b, n=dedup.NGRAM):
    """Similarity of the sets of word n-grams, by the definition."""
    one, other = ({tuple(words[i:i + n]) for i in range(len(words) - n + 1)} for words in (a.split(), b.split()))
    return len(one & other) / len(one | other)


@pytest.fixture(scope="module")
def known_pairs():
    """Texts of which 2 i and 2 i + 1 are a pair, and the similarity of each pair."""
    texts = []
    for seed in range(700):
        text = document(seed, 40 + seed % 7 * 60)
        edits = round(seed / 700 * len(text.split()) * 0.12)
        texts += [text, edited(text, edits, seed)]
    return texts, np.array([jaccard(a, b) for a, b in zip(texts[::2], texts[1::2])])


# --- exact ---

def test_what_no_reader_calls_a_difference_changes_no_hash():
    assert dedup.content_hash("Straße  in\n Köln ") == dedup.content_hash("strasse in köln".replace("ss", "ß", 1))
    assert dedup.content_hash("a b") != dedup.content_hash("ab")
    assert dedup.content_hash("1 + 1") != dedup.content_hash("1 - 1")


def test_a_hash_is_the_same_on_every_machine_and_in_every_process():
    code = "import dedup; print(dedup.content_hash('one two'), dedup.signature('one two three', 2, 4).tolist())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                         env={"PYTHONHASHSEED": "7"})
    assert run.stdout.split() == [str(dedup.content_hash("one two")),
                                  *str(dedup.signature("one two three", 2, 4).tolist()).split()]


# --- n-grams ---

@pytest.mark.parametrize("ngram", [1, 2, 5])
def test_equal_ngrams_and_no_others_have_equal_hashes(ngram):
    texts = [document(1, 300), "", document(2, 3), "?!", document(3, 40), document(1, 300)]
    hashes, offsets = dedup.ngram_hashes(texts, ngram)
    expected = []
    for text in texts:
        words = [word for word in text.split() if word.isalnum()]
        expected.append([tuple(words[i:i + ngram]) for i in range(max(len(words) - ngram + 1, min(len(words), 1)))])
    assert np.diff(offsets).tolist() == [len(grams) for grams in expected]
    flat = list(itertools.chain(*expected))
    assert len(set(zip(flat, hashes.tolist()))) == len(set(flat)) == len(set(hashes.tolist()))


def test_words_do_not_depend_on_case_punctuation_or_company():
    alone = dedup.word_hashes(["It ate – “all” of them."])[0]
    hashes, begins = dedup.word_hashes(["Before", "it ate all of THEM!", "after"])
    assert begins.tolist() == [0, 1, 6, 7] and hashes[1:6].tolist() == alone.tolist()
    assert len(dedup.word_hashes(["day's x_y 10th naïve"])[0]) == 6


def test_each_sign_is_a_word_where_words_have_no_spaces():
    hashes, begins = dedup.word_hashes(["学而时习之 x", "ab学b习"])
    assert begins.tolist() == [0, 6, 10] and hashes[7] == hashes[0] and hashes[9] == hashes[3]


def test_anagrams_and_long_words_have_hashes_of_their_own():
    words = ["".join(letters) for letters in itertools.permutations("abcdef")] + ["a" * n for n in range(1, 600)]
    assert len(np.unique(dedup.word_hashes([" ".join(words)])[0])) == len(words)


def test_a_long_text_is_hashed_in_blocks_without_a_seam(monkeypatch):
    texts = [document(seed, 500) + " été" for seed in range(5)] + ["", "学" * 50]
    whole = dedup.word_hashes(texts)
    monkeypatch.setattr(dedup, "BATCH", 97)
    for one, other in zip(whole, dedup.word_hashes(texts)):
        np.testing.assert_array_equal(one, other)


# --- MinHash ---

@pytest.mark.parametrize("permutations", [1, 64, 100])
def test_a_signature_does_not_depend_on_its_company(permutations, monkeypatch):
    texts = [document(seed, n) for seed, n in enumerate([3, 900, 0, 25, 5, 1, 70])]
    together = dedup.signatures(texts, permutations=permutations)
    monkeypatch.setattr(dedup, "BATCH", 300)
    np.testing.assert_array_equal(together, dedup.signatures(texts, permutations=permutations))
    np.testing.assert_array_equal(together, [dedup.signature(text, permutations=permutations) for text in texts])
    assert together.dtype == np.uint32 and ((together == dedup.NOTHING).all(1) == [len(t) == 0 for t in texts]).all()


def test_values_agree_with_the_probability_of_the_similarity(known_pairs):
    texts, similarity = known_pairs
    rows = dedup.signatures(texts, permutations=256)
    error = (rows[::2] == rows[1::2]).mean(1) - similarity
    standard = np.sqrt(np.maximum(similarity * (1 - similarity), 1e-9) / 256)
    assert abs(error.mean()) < 0.004 and np.sqrt((error ** 2).sum() / (standard ** 2).sum()) < 1.15


def test_another_seed_draws_other_values():
    text = document(1, 200)
    assert (dedup.signature(text, seed=1) != dedup.signature(text, seed=2)).mean() > 0.95


def test_a_pair_shares_a_band_as_often_as_independent_values_would(known_pairs):
    texts, similarity = known_pairs
    rows = dedup.signatures(texts, permutations=128).reshape(len(texts), 32, 4)
    shared = (rows[::2] == rows[1::2]).all(2).mean(1)
    assert abs((shared - similarity ** 4).mean()) < 0.01


def test_bands_catch_pairs_at_the_threshold():
    for threshold, permutations in [(0.8, 256), (0.5, 128), (0.95, 64), (1, 16)]:
        bands, rows = dedup.bands_for(threshold, permutations)
        assert bands * rows <= permutations and 1 - (1 - threshold ** rows) ** bands >= 0.99
        if bands > 1:
            assert 1 - (1 - threshold ** (rows + 1)) ** (permutations // (rows + 1)) < 0.99


@pytest.mark.parametrize("exact", [True, False])
def test_recall_and_precision_at_a_similarity_of_four_fifths(known_pairs, exact):
    texts, similarity = known_pairs
    rows = dedup.signatures(texts)
    verify = dedup.exact_jaccard(texts.__getitem__) if exact else None
    labels = dedup.near_duplicates(rows, *dedup.bands_for(0.8, 256), 0.8, verify)
    found, true = labels[::2] == labels[1::2], similarity >= 0.8
    sure = np.full(len(true), True) if exact else abs(similarity - 0.8) > 0.04      # of an estimate alone
    assert (labels[::2] == np.arange(0, len(texts), 2)).all() and 100 < true.sum() < 600
    assert (found & true & sure).sum() >= 0.97 * (true & sure).sum()
    assert (found & true & sure).sum() >= 0.97 * (found & sure).sum()


def test_clusters_are_the_components_of_all_similar_pairs(monkeypatch):
    # a chain: neighbours are similar, its ends are not; and a crowd in one bucket of which only some are
    base = document(5, 400)
    texts = [base]
    for i in range(6):
        texts.append(edited(texts[-1], 6, i))
    texts = texts[::2] + [document(6, 300)] + texts[1::2] + [document(6, 300)] + ["", "...", "word", "Word!"]
    rows = dedup.signatures(texts)
    agree = (rows[:, None] == rows[None]).mean(2)
    expected = np.arange(len(texts))
    for _ in texts:
        for i, j in itertools.product(range(len(texts)), repeat=2):
            if agree[i, j] >= 0.8 and texts[i].strip(".") and texts[j].strip("."):
                expected[[i, j]] = min(expected[i], expected[j])
    assert agree[0, 3] < 0.8 and expected[3] == 0
    monkeypatch.setattr(dedup, "PAIRS", 3)
    np.testing.assert_array_equal(dedup.near_duplicates(rows, 256, 1, 0.8), expected)


def test_a_crowd_of_copies_takes_one_round_each_band_and_others_stay_alone(tmp_path):
    texts = [document(1, 50)] * 3000 + [document(seed, 50) for seed in range(2, 500)]
    rows = np.memmap(tmp_path / "rows", np.uint32, "w+", shape=(len(texts), 256))
    rows[:] = dedup.signatures(texts)
    compared = []

    def similar(left, right):
        compared.append(len(left))
        return np.full(len(left), True)
    key = np.ascontiguousarray(rows[:, :2]).view(np.uint64)[:, 0]
    dedup.clusters(np.arange(len(texts)), len(texts), [key, key], similar)
    assert sum(compared) < 3500
    labels = dedup.near_duplicates(rows, 32, 8, 0.8)
    assert (labels[:3000] == 0).all() and (labels[3000:] == np.arange(3000, len(texts))).all()


def test_bands_that_do_not_fit_and_thresholds_that_are_none_are_refused():
    rows = dedup.signatures(["a b c"], permutations=16)
    for call in (lambda: dedup.near_duplicates(rows, 5, 4, 0.8), lambda: dedup.bands_for(1.5, 16),
                 lambda: dedup.signatures(["a"], permutations=0), lambda: dedup.simhash_duplicates([1], 20),
                 lambda: dedup.repeated([], 1), lambda: dedup.line_hashes("a", "word")):
        with pytest.raises(ValueError, match=r"not|no '|needs? 20"):
            call()
    assert dedup.near_duplicates(rows[:0], 4, 4, 0.8).tolist() == [] and dedup.signatures([]).shape == (0, 256)


# --- SimHash ---

def test_simhash_is_the_majority_of_each_bit():
    text = document(1, 30)
    hashes, _ = dedup.ngram_hashes([text], 3)
    expected = sum(1 << bit for bit in range(64) if sum(int(h) >> bit & 1 for h in hashes) * 2 > len(hashes))
    assert dedup.simhash(text) == expected and dedup.simhashes(["", text, "!"]).tolist() == [0, expected, 0]


def test_every_pair_within_the_distance_is_found_and_no_other():
    draw = np.random.default_rng(0)
    hashes = draw.integers(1, 2 ** 63, 400, dtype=np.uint64)
    flips = [draw.choice(64, draw.integers(0, 7), replace=False) for _ in hashes]
    other = hashes ^ np.array([sum(1 << int(b) for b in bits) for bits in flips], np.uint64)
    for distance in (0, 3, 5):
        labels = dedup.simhash_duplicates(np.concatenate((hashes, other)), distance)
        assert ((labels[400:] == np.arange(400)) == [len(bits) <= distance for bits in flips]).all()


# --- survivors ---

def test_the_best_of_a_cluster_survives_and_the_first_of_equals():
    labels = np.array([0, 1, 0, 1, 0, 5, 6, 6])
    scores = [1.0, 2, 3, 2, 3, float("nan"), float("nan"), -5]
    assert dedup.survivors(labels, scores).tolist() == [False, True, True, False, False, True, False, True]


# --- lines ---

@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_units_put_together_are_the_text(unit):
    for text in ("", "a", "a\n", "\n\na\r\n\r\n b\n\n\n", "a\nb\n \nc  \n\n  d\n"):
        assert "".join(part + gap for part, gap in dedup.units(text, unit)) == text
        assert len(dedup.line_hashes(text, unit)) == len(dedup.units(text, unit))


def test_lines_of_many_documents_go_and_nothing_else():
    texts = [f"Home | About\nStory {i}\n\n  {{\nshare this  page!\nThe end {i}." for i in range(5)]
    texts.append("only\nhere\nonly\nonly")
    shared = dedup.repeated([dedup.line_hashes(text) for text in texts], 3)
    assert len(shared) == 2 and (np.diff(shared) > 0).all()
    assert [dedup.drop_lines(text, shared) for text in texts] == [
        f"Story {i}\n\n  {{\nThe end {i}." for i in range(5)] + [texts[-1]]


def test_a_paragraph_goes_as_a_whole():
    texts = [f"Intro {i}.\n\nAll rights reserved.\nSince 1999.\n\nBody {i},\nSince 1999." for i in range(3)]
    shared = dedup.repeated([dedup.line_hashes(text, "paragraph") for text in texts], 2)
    assert dedup.drop_lines(texts[1], shared, "paragraph") == "Intro 1.\n\nBody 1,\nSince 1999."
