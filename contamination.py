"""Evaluation questions that stand in training text, found by the 13-grams of words they share.

    questions = Contamination(["data/gsm8k/test.jsonl.gz", "data/mmlu/*.jsonl"])
    questions.found(text)                   # ["data/gsm8k/test.jsonl.gz"]: the files a question of which stands there

A text is contaminated if it shares n words in a row with a question (Brown et al. 2020, arXiv:2005.14165, appendix C,
n = 13), whatever case, punctuation and white space. A shorter question must stand there whole.
"""
import numpy as np

from dedup import batches, random_numbers, word_hashes
from sources import extension, find_files, json_rows

QUESTIONS = ("question", "prompt", "query", "goal", "instruction", "text", "turns")     # columns, all that a row has
SHORTEST = 5                 # words of a question that is looked for: shorter ones stand in innocent texts too
SHIFT = np.uint64(42)        # the 22 bits above it choose a place in the table that says what needs a closer look


def strings(value):
    """The texts in a column: a string, a list of them, or a list of messages."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return strings(value.get("content"))
    return [text for item in value for text in strings(item)] if isinstance(value, list) else []


def questions_of(path, columns=QUESTIONS):
    """The questions of a .jsonl or .json file, also .gz: the texts in those of the columns that a row has."""
    if extension(path) not in (".jsonl", ".json"):
        raise ValueError(f"evaluation questions are read from .jsonl and .json files, also .gz; {path} is neither")
    texts, seen = [], {}
    for row, number, _ in json_rows(path, "error", {}):
        if not isinstance(row, dict):
            raise ValueError(f"row {number:,} of {path} is no object with a question: {row!r:.40}")
        seen |= dict.fromkeys(row)
        texts += [text for column in columns for text in strings(row.get(column))]
    if not texts:
        raise ValueError(f"{path} has no question: none of the columns {', '.join(columns)}, but "
                         f"{', '.join(seen) or 'no rows'}; name the column that holds them")
    return texts


class Contamination:
    """The n-grams of all questions of the files (names, folders, globs). Plain arrays: it can be sent to processes.

    Questions of fewer than `shortest` words are not looked for, since they stand in innocent texts too; `too_short`
    and `questions` count both by file.
    """

    def __init__(self, files, ngram=13, shortest=SHORTEST, columns=QUESTIONS):
        if not 1 <= shortest <= ngram:
            raise ValueError(f"the shortest question looked for needs from 1 to ngram={ngram} words, not {shortest}")
        self.ngram, self.shortest = ngram, shortest
        self.files = list(dict.fromkeys(path for name in files for path in sorted(find_files(name))))
        self.questions, self.too_short, hashes, owners = {}, {}, [], []
        for owner, path in enumerate(self.files):
            texts = questions_of(path, columns)
            words, begins = word_hashes(texts)
            question, n_words = np.repeat(np.arange(len(texts)), np.diff(begins)), np.diff(begins)
            self.questions[path], self.too_short[path] = len(texts), int((n_words < shortest).sum())
            for n, found in self.windows(words):
                inside = question[:len(found)] == question[n - 1:]
                fits = inside & (np.minimum(n_words, ngram)[question[:len(found)]] == n)
                hashes.append(np.unique(found[fits]))
                owners.append(np.full(len(hashes[-1]), owner))
        hashes, owners = np.concatenate(hashes or [[]]).astype(np.uint64), np.concatenate(owners or [[]]).astype(int)
        order = np.lexsort((owners, hashes))
        self.hashes, self.owners = hashes[order], owners[order]
        self.table = np.zeros(2 ** 64 >> int(SHIFT), bool)
        self.table[self.hashes >> SHIFT] = True

    def windows(self, words):
        """Yields (n, hashes of the n words from each place on) for n from `shortest` to `ngram`, views of one array."""
        hashes = np.zeros(len(words), np.uint64)
        for n, factor in enumerate(random_numbers(self.ngram, 7)[:len(words)], start=1):
            hashes[:len(words) - n + 1] += words[n - 1:] * factor
            if n >= self.shortest:
                yield n, hashes[:len(words) - n + 1]

    def found_all(self, texts):
        """For each text the names of the files of which a question stands in it, in the files' order."""
        found = [set() for _ in texts]
        for first, last in batches(texts):
            words, begins = word_hashes(texts[first:last])
            for n, hashes in self.windows(words):
                near = np.flatnonzero(self.table[hashes >> SHIFT])
                owner = np.searchsorted(begins, near, "right") - 1
                inside = near + n <= begins[owner + 1]
                near, owner = hashes[near[inside]], owner[inside]
                low, high = np.searchsorted(self.hashes, near), np.searchsorted(self.hashes, near, "right")
                for i in np.flatnonzero(high > low):
                    found[first + owner[i]].update(self.owners[low[i]:high[i]].tolist())
        return [[self.files[i] for i in sorted(files)] for files in found]

    def found(self, text):
        return self.found_all([text])[0]
