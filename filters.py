"""Published heuristics that tell documents worth training on from the rest, each with its thresholds in one table.

    apply(text, parse_filters("basic,gopher"))        # (text, "") or (None, "gopher: mean word length")
    parse_filters("gopher,-gopher: stop words")       # a rule left out, for a language other than English

    basic               the short chain of many guides: length, repeated words, letters
    gopher              MassiveText's quality rules (Rae et al. 2021, arXiv:2112.11446, section A.1.1)
    gopher_repetition   its repetition rules (table A1 of the same paper)
    c4                  lines first, then what is left of the page (Raffel et al. 2020, arXiv:1910.10683, section 2.2)
    fineweb             the three filters FineWeb adds (Penedo et al. 2024, arXiv:2406.17557, section 3.5)

A rule is a statistic and its bounds, both of them allowed. Words are what stands between white space: languages written
without spaces need `-` in front of the rules that count words. Shares of words and lines are fractions of 1.
"""
import re

import numpy as np

import characters

NO_LIMIT = float("inf")
PRESETS = {                             # preset: {statistic: (lowest, highest)}; a document outside is rejected
    "basic": {"characters": (200, NO_LIMIT), "unique words": (0.3, 1), "letters": (0.6, 1)},
    "gopher": {
        "words": (50, 100_000), "mean word length": (3, 10), "hash signs per word": (0, 0.1),
        "ellipses per word": (0, 0.1), "lines that begin with a bullet": (0, 0.9),
        "lines that end with an ellipsis": (0, 0.3), "words with a letter": (0.8, 1), "stop words": (2, 8)},
    "gopher_repetition": {
        "duplicate lines": (0, 0.30), "duplicate paragraphs": (0, 0.30),
        "characters in duplicate lines": (0, 0.20), "characters in duplicate paragraphs": (0, 0.20),
        "characters in the top 2-gram": (0, 0.20), "characters in the top 3-gram": (0, 0.18),
        "characters in the top 4-gram": (0, 0.16), "characters in duplicate 5-grams": (0, 0.15),
        "characters in duplicate 6-grams": (0, 0.14), "characters in duplicate 7-grams": (0, 0.13),
        "characters in duplicate 8-grams": (0, 0.12), "characters in duplicate 9-grams": (0, 0.11),
        "characters in duplicate 10-grams": (0, 0.10)},
    "c4": {"sentences": (3, NO_LIMIT), "curly brackets": (0, 0), "lorem ipsum": (0, 0)},
    "fineweb": {
        "lines that end with punctuation": (0.12, 1), "characters in duplicate lines": (0, 0.1),
        "lines shorter than 30 characters": (0, 0.67)},
}
WINDOW = 1000                           # words among which unique ones are counted: a book repeats its words, too
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
BULLETS = ("-", "*", "•", "●", "‣", "▪", "◦", "–", "·", "■", "►")
ELLIPSES = ("...", "…")
PUNCTUATION = tuple(".!?\"'”’…。！？」』»")
C4_ENDS = tuple(".!?\"”")
C4_LINE_WORDS, C4_WORD_LENGTH = (5, 1000)
C4_NOTICES = ("javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
              "use cookies")
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
SENTENCE = re.compile(r"(?<![.!?。！？])[.!?。！？]+[\"'”’)]*(?=\s|$)")
LETTERS = bytes(range(65, 91)) + bytes(range(97, 123))


# --- rules ---

def parse_filters(names):
    """[(preset, {statistic: bounds})] of "basic,gopher,-gopher: stop words"; ValueError names what there is."""
    chosen, items = {}, [item.strip() for item in names.split(",") if item.strip()]
    for item in items:
        preset, _, rule = (part.strip() for part in item.removeprefix("-").partition(":"))
        if preset not in PRESETS:
            raise ValueError(f"there is no filter {preset!r}; those are {', '.join(PRESETS)}")
        if not item.startswith("-"):
            if rule:
                raise ValueError(f"filter {item!r} names one rule; name {preset} whole, and what to leave out as "
                                 f"-{preset}: RULE")
            chosen[preset] = dict(PRESETS[preset])
        elif chosen.get(preset, {}).pop(rule, None) is None:
            raise ValueError(f"{item!r} leaves out a rule that is not there; before it, name one of "
                             f"{', '.join(PRESETS)}, whose rules are, for {preset}, {', '.join(PRESETS[preset])}")
    return list(chosen.items())


def apply(text, rules):
    """(text, "") of a document that passes, as c4 leaves it, else (None, "preset: statistic" of the first rule).

    A text of which c4 leaves nothing never passes, whatever rules were left out.
    """
    shared = None
    for preset, bounds in rules:
        if preset == "c4":
            text, shared = c4_lines(text), None
        shared = shared or (Words(text), [line for line in text.split("\n") if line.strip()])
        statistics = MEASURES[preset](text, *shared)
        for name, (low, high) in bounds.items():
            if not low <= statistics[name] <= high:
                return None, f"{preset}: {name}"
    return (text, "") if text else (None, "c4: no line left")


def judge(text, presets):
    """None for a document that passes, else the first rule that rejects it, as "gopher: mean word length"."""
    return apply(text, parse_filters(presets))[1] or None


def measure(text, preset):
    """{statistic: value} of the rules of a preset."""
    return MEASURES[preset](text, Words(text), [line for line in text.split("\n") if line.strip()])


def c4_lines(text):
    """The text without lines that are too short, do not end a sentence, or are notices; citation marks are removed.

    Without the list of bad words, whose limits are known (arXiv:2104.08758), and without the removal of repeated spans,
    which dedup.py does by lines.
    """
    kept = []
    for line in text.split("\n"):
        line = CITATION.sub("", line.strip())
        if not line.endswith(C4_ENDS) or line.endswith("..."):
            continue
        words, lower = line.split(), line.lower()
        if len(words) < C4_LINE_WORDS or max(map(len, words)) > C4_WORD_LENGTH:
            continue
        if not any(notice in lower for notice in C4_NOTICES):
            kept.append(line)
    return "\n".join(kept)


# --- statistics ---

def share(part, whole):
    return part / whole if whole else 0.0


class Words:
    """The words of a text, what stands between white space: `distinct` ones in the order in which they come, `ids` the
    number of each word among these, `counts` how often each stands there, `sizes` its characters."""

    def __init__(self, text):
        words = text.split()
        self.distinct = list(dict.fromkeys(words))
        number = dict(zip(self.distinct, range(len(self.distinct))))
        self.ids = np.fromiter(map(number.__getitem__, words), np.int64, len(words))
        self.counts = np.bincount(self.ids, minlength=len(number))
        self.sizes = np.fromiter(map(len, self.distinct), np.int64, len(number))

    def __len__(self):
        return len(self.ids)


def basic(text, words, lines):
    data = text.encode("utf-8", "surrogatepass")
    letters = len(data) - len(data.translate(None, LETTERS)) + sum(map(str.isalpha, characters.others(text)))
    lower = characters.lower_words(text)
    unique = sum(len(set(lower[start:start + WINDOW])) for start in range(0, len(lower), WINDOW))
    return {"characters": len(text.strip()), "unique words": share(unique, len(lower)),
            "letters": share(letters, len(text))}


def gopher(text, words, lines):
    n, starts = len(words), [line.lstrip()[:1] for line in lines]
    letterless = [i for i, is_letters in enumerate(map(str.isalpha, words.distinct)) if not is_letters
                  and not words.distinct[i][0].isalpha() and not any(map(str.isalpha, words.distinct[i]))]
    return {"words": n, "mean word length": share(int(words.counts @ words.sizes), n),
            "hash signs per word": share(text.count("#"), n),
            "ellipses per word": share(sum(map(text.count, ELLIPSES)), n),
            "lines that begin with a bullet": share(sum(start in BULLETS for start in starts), len(lines)),
            "lines that end with an ellipsis":
                share(sum(line.rstrip().endswith(ELLIPSES) for line in lines), len(lines)),
            "words with a letter": share(n - int(words.counts[letterless].sum()), n), "stop words": stop_words(words)}


def stop_words(words):
    """How many of STOP_WORDS stand there, whatever their case and punctuation."""
    found = STOP_WORDS.intersection(words.distinct)
    if len(found) < len(STOP_WORDS):
        found |= STOP_WORDS & {word.lower().strip(".,;:!?\"'()") for word in words.distinct}
    return len(found)


def repeats(parts):
    """(share of the parts that stood before, share of their characters)."""
    seen, number, characters = set(), 0, 0
    for part in parts:
        if part in seen:
            number, characters = number + 1, characters + len(part)
        seen.add(part)
    return share(number, len(parts)), share(characters, sum(map(len, parts)))


def gopher_repetition(text, words, lines):
    lines = [line.strip() for line in lines]
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    statistics = {}
    for name, parts in (("lines", lines), ("paragraphs", paragraphs)):
        statistics[f"duplicate {name}"], statistics[f"characters in duplicate {name}"] = repeats(parts)
    return statistics | ngrams(words)


def ngrams(words):
    """Shares of characters, of those in words: in the most frequent 2-, 3- and 4-gram, all times together, and in 5- to
    10-grams that stood before, none counted twice.

    An n-gram can only repeat where its first n - 1 words do, so each n sorts what is left of the one before.
    """
    ids = (words.ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    ends = np.concatenate([[0], np.cumsum(words.sizes[words.ids])])
    total, places, keys, statistics = max(1, ends[-1]), np.arange(len(words)), ids.copy(), {}
    for n in range(2, 11):
        places = places[places <= len(words) - n]
        name = f"characters in {'the top' if n <= 4 else 'duplicate'} {n}-gram{'' if n <= 4 else 's'}"
        if not len(places):
            statistics[name] = 0.0
            continue
        key = keys[places]
        keys[places] = (key ^ (key >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) + ids[places + n - 1]
        order = np.argsort(keys[places])                    # np.unique sorts stably, which takes three times as long
        sorted_keys = keys[places[order]]
        starts = np.flatnonzero(np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]]))
        count = np.diff(starts, append=len(order))          # of each n-gram
        first = np.minimum.reduceat(order, starts)          # where it stands for the first time
        if n <= 4:
            sizes = (ends[places + n] - ends[places])[first]
            most = np.where(count == max(2, count.max()), count * sizes, 0).max()
            statistics[name] = min(1.0, float(most / total))
        else:
            again = np.ones(len(places), bool)
            again[first] = False
            edges = np.zeros(len(words) + 1, int)
            edges[places[again]] += 1
            edges[places[again] + n] -= 1
            covered = np.cumsum(edges[:-1]) > 0
            statistics[name] = float(np.diff(ends)[covered].sum() / total)
        repeated = np.empty(len(order), bool)
        repeated[order] = np.repeat(count > 1, count)
        places = places[repeated]
    return statistics


def c4(text, words, lines):
    return {"sentences": len(SENTENCE.findall(text)), "curly brackets": text.count("{") + text.count("}"),
            "lorem ipsum": text.lower().count("lorem ipsum")}


def fineweb(text, words, lines):
    lines = [line.strip() for line in lines]
    return {"lines that end with punctuation": share(sum(line.endswith(PUNCTUATION) for line in lines), len(lines)),
            "characters in duplicate lines": repeats(lines)[1],
            "lines shorter than 30 characters": share(sum(len(line) < 30 for line in lines), len(lines))}


MEASURES = {"basic": basic, "gopher": gopher, "gopher_repetition": gopher_repetition, "c4": c4, "fineweb": fineweb}
