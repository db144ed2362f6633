"""What cleaning does to one chunk of documents: a pure function before duplicates are known, and one after.

    wash(settings, (number, documents))             # pass 1: repaired, filtered, scored, hashed
    finish(settings, (number, lines, ...))          # pass 2: what is no duplicate, without repeated lines

Both return plain bytes, arrays and counts, and write nothing, so that any process on any machine may call them.

    fates       (D,) uint8 of the chunk's documents: 0, or the place in FATES of why pass 2 leaves one out
    facts       {"sources": {name: {"documents_in": ..., "rejected": {rule: [documents, bytes]}}}, "histograms": {...},
                "questions": {...}}: numbers that add up over chunks, as report.py reads them
    examples    {rule: [{"rule", "source", "id", "text"}]}: the first few that each rule rejected

Letters: D documents of a chunk that pass 1 kept, L their lines, P permutations.
"""
import gzip
import json
import math

import numpy as np

import cleaners
import dedup
import filters
import report
import scorers

FATES = ("", "exact duplicate", "near-duplicate")
EXAMPLES = 5                    # rejected documents of each rule that a chunk shows,
EXAMPLE_CHARACTERS = 2000       # of so many characters
SCORE_EDGES = [round(0.05 * i, 2) for i in range(21)]       # of scores that are probabilities
BITS_EDGES = [0.25 * i for i in range(33)]                  # of bits per byte
SCORES = {"language": ("language_score", SCORE_EDGES), "toxicity": ("toxicity", SCORE_EDGES),
          "perplexity": ("bits_per_byte", BITS_EDGES), "quality": ("quality", SCORE_EDGES)}     # score: its number


class Tally:
    """Counts, histograms and examples of one chunk."""

    def __init__(self):
        self.facts, self.examples = {"sources": {}, "histograms": {}, "questions": {}}, {}

    def source(self, document):
        return self.facts["sources"].setdefault(document["source"], {
            "documents_in": 0, "bytes_in": 0, "documents_out": 0, "bytes_out": 0, "rejected": {}})

    def count(self, document, moment, size):
        """`moment` is in or out."""
        source = self.source(document)
        source[f"documents_{moment}"] += 1
        source[f"bytes_{moment}"] += size

    def reject(self, document, rule, text, size):
        rejected = self.source(document)["rejected"].setdefault(rule, [0, 0])
        rejected[0] += 1
        rejected[1] += size
        shown = self.examples.setdefault(rule, [])
        if len(shown) < EXAMPLES:
            shown.append({"rule": rule, "source": document["source"], "id": document["id"],
                          "text": text[:EXAMPLE_CHARACTERS]})

    def measure(self, moment, what, edges, values):
        """A histogram of numbers; None, a score that could not be taken, is left out."""
        found = self.facts["histograms"].setdefault(what, {
            "edges": edges, "in": [0] * (len(edges) - 1), "out": [0] * (len(edges) - 1)})
        found[moment] = report.histogram([value for value in values if value is not None], edges)

    def measure_all(self, moment, documents, score_names):
        for name in score_names:
            column, edges = SCORES[name]
            self.measure(moment, column, edges, [document[column] for document in documents])


def size_of(text):
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def json_line(document):
    """The document as a line of JSON, with null for the numbers that JSON has not: NaN and infinity."""
    columns = {name: None if isinstance(value, float) and not math.isfinite(value) else value
               for name, value in document.items()}
    return json.dumps(columns, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def merged(document, columns):
    """The document with these columns too; a column of the input that has the same name becomes row_NAME."""
    moved = {f"row_{name}" if name in columns else name: value for name, value in document.items()}
    return moved | columns


# --- pass 1 ---

def wash(settings, item):
    """The chunk's documents that steps, filters, questions and scores let through, with what pass 2 and the search for
    duplicates need of them.

    Returns {"number", "lines": JSON lines (bytes), "facts", "examples", "arrays": {
        "ends" (D,) bytes up to each document's end in lines, "sizes" (D,) bytes of text as it came in,
        "lengths" (D,) characters, "hashes" (D,) uint64, "signatures" (D, P) uint32 or simhashes (D,) uint64,
        "line_hashes" (L,) uint64, the distinct ones of each document, "line_counts" (D,), and a column (D,) for every
        score, NaN where there is none}}.
    """
    number, documents = item
    tally, steps = Tally(), cleaners.parse_steps(settings["steps"])
    rules, scored = filters.parse_filters(settings["filters"]), scorers.Scorers(settings["scores"], settings)
    tally.measure("in", "characters", report.LENGTH_EDGES, [len(document["text"]) for document in documents])

    # steps and filters, document by document
    kept = []                               # (document with its new text, bytes as it came in)
    for document in documents:
        size = size_of(document["text"])
        tally.count(document, "in", size)
        text, why = cleaners.clean(document["text"], steps)
        why = why and f"nothing left: {why}"
        if not why:
            passed, why = filters.apply(text, rules)
        if why:
            tally.reject(document, why, text or document["text"], size)
        else:
            kept.append((document | {"text": passed}, size))

    # questions that models are tested on
    if settings["questions"]:
        found_in = settings["questions"].found_all([document["text"] for document, _ in kept])
        for (document, size), files in zip(kept, found_in):
            for file in files:
                tally.facts["questions"][file] = tally.facts["questions"].get(file, 0) + 1
            if files:
                tally.reject(document, "evaluation question", document["text"], size)
        kept = [entry for entry, files in zip(kept, found_in) if not files]

    # scores
    columns = scored.columns([document for document, _ in kept])
    kept = [(merged(document, found), size) for (document, size), found in zip(kept, columns)]
    tally.measure_all("in", [document for document, _ in kept], scored.names)
    reasons = [scored.rejects(found) for found in columns]
    for (document, size), why in zip(kept, reasons):
        if why:
            tally.reject(document, why, document["text"], size)
    kept = [entry for entry, why in zip(kept, reasons) if not why]

    encoded = [json_line(document) for document, _ in kept]
    arrays = {"ends": np.cumsum([len(line) for line in encoded], dtype=np.int64),
              "sizes": np.array([size for _, size in kept], np.int64),
              **fingerprints([document["text"] for document, _ in kept], settings),
              "lengths": np.array([len(document["text"]) for document, _ in kept], np.float64),
              **{name: np.array([np.nan if document[name] is None else document[name] for document, _ in kept], float)
                 for name, _ in map(SCORES.get, scored.names)}}
    if "language" in scored.names:
        arrays["language"] = np.array([document["language"] or "" for document, _ in kept], "U16")
    return {"number": number, "lines": b"".join(encoded), "arrays": arrays, "facts": tally.facts,
            "examples": tally.examples}


def fingerprints(texts, settings):
    """The arrays by which duplicates are found: those that the settings ask for."""
    arrays = {"hashes": np.array([dedup.content_hash(text) for text in texts], np.uint64)}
    if settings["near_duplicates"] == "minhash":
        arrays["signatures"] = dedup.signatures(texts, settings["ngram"], settings["permutations"])
    elif settings["near_duplicates"] == "simhash":
        arrays["signatures"] = dedup.simhashes(texts, settings["ngram"])
    if settings["repeated_lines"]:
        of_text = [np.unique(dedup.line_hashes(text, settings["repeated_unit"])) for text in texts]
        arrays["line_hashes"] = np.concatenate([*of_text, np.empty(0, np.uint64)]).astype(np.uint64)
        arrays["line_counts"] = np.array([len(hashes) for hashes in of_text], np.int64)
    return arrays


# --- pass 2 ---

def finish(settings, item):
    """{"number", "documents": gzipped JSON lines, "facts", "examples"} of a chunk of pass 1.

    item is (number, lines, sizes (D,), fates (D,), repeated, edges): the sorted hashes of lines to drop, and the edges
    of the buckets of perplexity. A document that loses lines must pass the filters once more.
    """
    number, lines, sizes, fates, repeated, edges = item
    tally, rules, written = Tally(), filters.parse_filters(settings["filters"]), []
    scored = scorers.Scorers(settings["scores"], settings)
    for line, size, fate in zip(lines.split(b"\n"), sizes.tolist(), fates.tolist()):
        document, why = json.loads(line), FATES[fate]
        text = document["text"]
        if not why and len(repeated):
            shorter = dedup.drop_lines(text, repeated, settings["repeated_unit"])
            if not shorter.strip():
                why = f"nothing left: repeated {settings['repeated_unit']}s"
            elif shorter != text:
                passed, why = filters.apply(shorter.strip("\r\n"), rules)
                document["text"] = passed
        if not why and edges:
            document = merged(document, {"bucket": scorers.bucket(document, edges)})
            why = scored.rejects(document)
        if why:
            tally.reject(document, why, text, size)
        else:
            written.append(document)
            tally.count(document, "out", size_of(document["text"]))
    tally.measure("out", "characters", report.LENGTH_EDGES, [len(document["text"]) for document in written])
    tally.measure_all("out", written, scored.names)
    encoded = b"".join(map(json_line, written))
    return {"number": number, "documents": gzip.compress(encoded, 1, mtime=0) if written else b"",
            "facts": tally.facts, "examples": tally.examples}


# --- counts ---

def add(total, facts):
    """Adds `facts`, numbers in dicts and lists, to `total`, in place; edges of histograms stay as they are."""
    for name, value in facts.items():
        if name not in total:
            total[name] = json.loads(json.dumps(value))
        elif isinstance(value, dict):
            add(total[name], value)
        elif isinstance(value, list) and name != "edges":
            total[name] = [a + b for a, b in zip(total[name], value)]
        elif name != "edges":
            total[name] += value
