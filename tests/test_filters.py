"""filters.py: every rule rejects what it is about, counts as its paper does, and lets good text through."""
import gzip
import itertools
import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest

import filters
from filters import PRESETS, apply, judge, measure, parse_filters

DATA = Path(os.environ.get("ZERO2CHAT_DATA", Path(__file__).resolve().parent.parent.parent / "shared/data"))
GOOD = """The red fox is the largest of the true foxes and one of the most widely distributed carnivores of all.
It has a long history of living with people, and has been hunted for its fur and as a pest for many centuries.
Because of that spread it is listed among the species of least concern, but where it was brought in it harms birds.
Apart from its large size, it differs from other foxes by how quickly new forms of it arise in new surroundings.
Young foxes may stay with their parents to help with the next litter, which most often have four to six cubs!"""
WORDS = [f"{a}{b}{c}" for a, b, c in itertools.product("abcdefgh", "aeiou", "klmnpr")]     # 240 that differ


def test_good_text_passes_every_preset_unchanged():
    assert apply(GOOD, parse_filters(",".join(PRESETS))) == (GOOD, "")


BAD = {                                 # rule: a document that only this rule of its preset is the first to reject
    "basic: characters": "Too short.", "basic: unique words": "spam and eggs " * 30,
    "basic: letters": " ".join(f"{i} ab{i} 1{i}" for i in range(40)),
    "gopher: words": "The fox that we have.",
    "gopher: mean word length": " ".join(word if word in filters.STOP_WORDS else word * 4 for word in GOOD.split()),
    "gopher: hash signs per word": GOOD.replace(" of ", " #of# #"),
    "gopher: ellipses per word": GOOD.replace(" ", "... "),
    "gopher: lines that begin with a bullet": "\n".join("- " + line for line in GOOD.split("\n")),
    "gopher: lines that end with an ellipsis": GOOD.replace("\n", " …\n"),
    "gopher: words with a letter": GOOD.replace(" ", " 2024 "),
    "gopher: stop words": " ".join(WORDS),
    "gopher_repetition: duplicate lines": "\n".join(["Short one."] * 9) + "\n" + GOOD,
    "gopher_repetition: characters in duplicate lines": GOOD + 2 * ("\n" + " ".join(WORDS[:80])),
    "gopher_repetition: characters in the top 2-gram": GOOD.replace(" ", " new york ", 60),
    "c4: sentences": "The fox that we have is not here and it was never seen again.",
    "c4: curly brackets": GOOD + "\nA call of f() { } is no prose.",
    "c4: lorem ipsum": GOOD + "\nLorem ipsum dolor sit amet and so on.",
    "fineweb: lines that end with punctuation": GOOD.replace(".", "").replace("!", ""),
    "fineweb: characters in duplicate lines": GOOD + "\n" + GOOD.split("\n")[0],
    "fineweb: lines shorter than 30 characters": "\n".join([f"Line {i} is short." for i in range(9)] + [GOOD[:100]]),
}


@pytest.mark.parametrize("rule", BAD)
def test_a_document_is_rejected_by_the_rule_that_it_breaks(rule):
    assert judge(BAD[rule], rule.partition(":")[0]) == rule


def test_the_bounds_themselves_are_allowed():
    assert judge("ab cd ef gh ij kl mn " * 9 + "abcdefghij.", "basic,-basic: unique words") is None
    assert measure("ab cd ef gh ij kl mn " * 9 + "abcdefghij.", "basic")["characters"] == 200
    assert judge("ab cd ef gh ij kl mn " * 9 + "abcdefghi.", "basic,-basic: unique words") == "basic: characters"


def test_a_rule_can_be_left_out_and_wrong_names_are_errors():
    assert judge(BAD["gopher: stop words"], "gopher,-gopher: stop words") is None
    assert PRESETS["gopher"]["stop words"] == (2, 8)                # the table itself stays
    for names, message in {"gofer": "no filter 'gofer'; those are basic, gopher",
                           "-gopher: words": "a rule that is not there",
                           "gopher,-gopher: wrds": "a rule that is not there.*mean word length",
                           "gopher: words": "names one rule"}.items():
        with pytest.raises(ValueError, match=message):
            parse_filters(names)
    assert parse_filters("") == [] and apply("x", []) == ("x", "")


def test_every_rule_of_the_table_is_measured():
    for preset, bounds in PRESETS.items():
        for text in (GOOD, "", "\n", "x", "the " * 20, "\ud800 \x00"):
            assert set(measure(text, preset)) == set(bounds)


def test_a_book_is_no_repetition_of_words():
    book = " ".join(f"{word}{chapter}" if place % 2 else word for chapter in "abcdefghij"
                    for place, word in enumerate(WORDS))
    assert measure(book, "basic")["unique words"] > 0.3


def by_hand(words):
    """The n-gram statistics as a loop over words: what the arrays must give."""
    lengths, found = [len(word) for word in words], {}
    for n in range(2, 11):
        grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
        if n <= 4:
            counts = Counter(grams)
            top = max(counts.values(), default=0)
            found[f"characters in the top {n}-gram"] = 0 if top < 2 else min(1, max(
                top * sum(map(len, gram)) for gram, count in counts.items() if count == top) / sum(lengths))
        else:
            seen, covered = set(), set()
            for i, gram in enumerate(grams):
                covered |= set(range(i, i + n)) if gram in seen else set()
                seen.add(gram)
            found[f"characters in duplicate {n}-grams"] = sum(lengths[i] for i in covered) / max(1, sum(lengths))
    return found


@pytest.mark.parametrize("words",
                         [GOOD.split(), [], ["a"], ["ha"] * 40, (WORDS[:12] * 3 + WORDS[5:40] + WORDS[:7]),
                          list("abcabcabdabcabcab"),
                                   GOOD.split()[:30] + WORDS[:20] + GOOD.split()[3:28]], ids=range(7))
def test_ngrams_equal_a_loop_over_words(words):
    assert filters.ngrams(filters.Words(" ".join(words))) == pytest.approx(by_hand(words))


def test_lines_and_paragraphs_that_stood_before_are_counted_once_each():
    statistics = measure("aa\nbb\naa\naa\n\nbb\n\nbb", "gopher_repetition")
    assert statistics["duplicate lines"] == pytest.approx(4 / 6)
    assert statistics["duplicate paragraphs"] == pytest.approx(1 / 3)


def test_c4_keeps_the_lines_that_are_sentences():
    text = """Home
This line is a whole sentence.[1]
This line is none, it just
Four words are few.
Please enable Javascript to see this.
We promise that our privacy policy is good.
This one goes on and on...
He asked whether it was over?
She said “it is far from over.”"""
    kept = "This line is a whole sentence.\nHe asked whether it was over?\nShe said “it is far from over.”"
    assert filters.c4_lines(text) == kept and apply(text, parse_filters("c4")) == (kept, "")
    assert apply("Home\nNews", parse_filters("c4,basic")) == (None, "c4: sentences")


@pytest.mark.parametrize("text",
                         ["x" * 300_000, "." * 300_000 + "x", "\n" * 300_000, "a " * 150_000, "\n \n" * 100_000 + "x"],
                         ids=lambda text: repr(text[:4]))
def test_one_enormous_line_takes_linear_time(text):
    start = time.perf_counter()
    for preset in PRESETS:
        measure(text, preset)
    assert time.perf_counter() - start < 5      # quadratic time would be minutes


def test_real_prose_is_kept(name="text/textbooks_openstax.part.jsonl.gz"):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no textbooks at {path}")
    with gzip.open(path) as file:
        texts = [json.loads(line)["text"] for line in itertools.islice(file, 200)]
    rejected = Counter(judge(text, "basic,gopher,gopher_repetition") for text in texts)
    assert rejected[None] >= 0.95 * len(texts), rejected


def test_a_text_of_which_c4_leaves_nothing_never_passes():
    assert apply("no line here ends a sentence", parse_filters("c4,-c4: sentences")) == (None, "c4: no line left")
