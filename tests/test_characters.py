"""characters.py: the same as the plain string methods, on every kind of text."""
import random
import time
import unicodedata

import pytest

import characters
import dedup
import filters

ALPHABETS = ["abc XY.\n", "a\u201c\u201d\u2019 \u2014\u2026B\n", "\u00e9\u00c9\u00df\u0130\u0131aB ",
             "\u03a3\u03c3\u03c2 A\n", "a\xa0\u2028\u3000\x1c\x85 B", "e\u0301\u0327 E\u0301", "\u4e2d\u6587\u3002 a1",
             "\u0e01\u0e33 \u0966\u00b2_-", "\ud800\udc00 a\U0001d54f\U0001f600", "\x00\x07\t\r\x0b\x0c z"]


def texts():
    pick = random.Random(0)
    for alphabet in [*ALPHABETS, "".join(ALPHABETS)]:
        for length in (0, 1, 2, 7, 60):
            yield from ("".join(pick.choices(alphabet, k=length)) for _ in range(20))


def test_odd_characters_are_those_that_are_not_printable_ascii():
    for text in texts():
        expected = [c for c in text if not " " <= c <= "~"]
        assert characters.odd(text) == "".join(sorted(set(expected))) and characters.others(text) == "".join(expected)


def test_lower_case_and_its_words_are_those_of_string_methods():
    for text in texts():
        encode = lambda x: x.encode("utf-8", "surrogatepass")
        assert characters.lower(text) == encode(text.lower())
        assert characters.lower_words(text) == [encode(word) for word in text.lower().split()]
        assert characters.lower_line(text) == encode(" ".join(text.lower().split()))


def test_the_composed_form_is_the_standard_librarys_but_for_runs_that_no_language_has():
    for text in [*texts(), "a" + "\u0301\u0327" * 15 + "b"]:
        assert characters.nfc(text) == unicodedata.normalize("NFC", text)
    cut = characters.nfc("x" + "\u0327" * 65)
    assert cut == "x" + "\u0327" * 30 + "\u034f" + "\u0327" * 30 + "\u034f" + "\u0327" * 5 == characters.nfc(cut)


@pytest.mark.parametrize("function", [characters.nfc, dedup.content_hash, dedup.only_words])
def test_a_long_run_of_marks_takes_linear_time(function):
    start = time.perf_counter()
    function("a" + "\u0301\u0327" * 80_000)
    assert time.perf_counter() - start < 2      # quadratic time would be 5 s


@pytest.mark.parametrize("many", [0, 30, 10 ** 6])
def test_only_words_leaves_letters_digits_and_spaces(monkeypatch, many):
    monkeypatch.setattr(dedup, "MANY", many)
    for text in texts():
        lower = unicodedata.normalize("NFC", text).lower()
        expected = "".join(c if c.isalnum() else " " for c in lower)
        assert dedup.only_words(text) == expected.encode("utf-8", "surrogatepass")


def test_words_by_number_are_the_words():
    for text in texts():
        words = filters.Words(text)
        assert [words.distinct[i] for i in words.ids] == text.split() and len(words) == len(text.split())
        assert words.counts.sum() == len(words) and words.sizes.tolist() == list(map(len, words.distinct))
