"""Duplicates among documents: exact, near (MinHash or SimHash), and lines that many documents share.

    rows = signatures(texts)                                        # (N, P) uint32, a few bytes of each document
    labels = near_duplicates(rows, *bands_for(0.8, rows.shape[1]))  # (N,) the lowest member of each one's cluster
    kept = survivors(labels, scores)                                # (N,) true for the best of every cluster

Two documents are near-duplicates if the Jaccard similarity of their sets of word n-grams is at least a threshold
(Broder 1997). A signature has P values, each of which two documents share with that probability; documents that
share all values of some band of it are candidates (Leskovec et al., Mining of Massive Datasets, section 3.4), and
candidates are verified. Everything is a function of the documents and their order alone: the same on every machine,
in every process, however the documents are split among calls.

Letters: N documents, P permutations (values of a signature), S n-grams of all documents of a call, W their words.
"""
import functools
import re

import numpy as np

import characters
from sources import content_key

NGRAM = 5                    # words in an n-gram, as in FineWeb (arXiv:2406.17557)
PERMUTATIONS = 256           # values of a signature: the standard error of a similarity of 0.8 is then 0.025
NOTHING = np.uint32(2 ** 32 - 1)        # a signature's value before it has one, and that of a document without words
LOWER_HALF = np.uint64(2 ** 32 - 1)
BATCH = 1 << 19              # characters whose n-grams are hashed at once
PAIRS = 1 << 14              # candidates verified at once
ROUNDS = 1000                # members of one bucket that are compared with all later ones; the cost is the product
MANY = 30                    # different signs, from which on one expression finds them sooner than a search for each
OTHER_SIGNS = re.compile(r"[^\x00-\x7f\w]")
ONLY_WORDS = bytes(ord(chr(b).lower()) if chr(b).isalnum() else 32 for b in range(128)) + bytes(
    range(128, 256))
BLANK_LINE = re.compile(r"\n[ \t\r]*\n\s*")


# --- exact ---

def content_hash(text):
    """64-bit hash, the same on every machine, of what is left without what no reader would call a difference: NFC,
    lower case, every run of white space one space. A Python int."""
    return content_key(characters.lower_line(characters.nfc(text)))


# --- words and n-grams as numbers ---

def mix(x):
    """Every bit of x (uint64) spread over all 64: the finaliser of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.cache
def random_numbers(count, stream):
    """`count` fixed odd numbers (uint64) that look random."""
    counter = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(stream << 32)
    return mix(counter * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)


def only_words(text):
    """The text's letters and digits, lower-case, as UTF-8; every other sign is a space."""
    text = characters.nfc(text)
    letters, signs = characters.lower(text), {sign for sign in characters.odd(text).lower() if not sign.isalnum()}
    if len(signs) > MANY:
        letters, signs = OTHER_SIGNS.sub(" ", text.lower()).encode("utf-8", "surrogatepass"), ()
    for sign in signs:
        letters = letters.replace(sign.encode("utf-8", "surrogatepass"), b" ")
    return letters.translate(ONLY_WORDS)


def word_hashes(texts):
    """(W,) uint64 hashes of the words of all texts, and (N + 1,) the place where those of each text begin.

    A word is a run of letters and digits; where a script has no spaces, in Chinese and Japanese, each sign is one.
    """
    parts = [only_words(text) for text in texts]
    letters, at, hashes, starts = b" ".join([*parts, b""]), 0, [], []
    while at < len(letters):                                # in blocks, for memory's sake, that end after a word
        end = letters.find(b" ", at + BATCH) + 1 or len(letters)
        of_block, start = hashes_of_words(np.frombuffer(letters, np.uint8, end - at, at))
        hashes.append(of_block)
        starts.append(start + at)
        at = end
    if not hashes:
        return np.empty(0, np.uint64), np.zeros(len(texts) + 1, np.int64)
    begins = np.cumsum([0] + [len(part) + 1 for part in parts])
    return np.concatenate(hashes), np.searchsorted(np.concatenate(starts), begins)


def hashes_of_words(letters):
    """The words' hashes, sums over letters of a number of the letter times one of its place, and where each begins."""
    inside = letters != 32
    sign = (letters >= 0xE3) & (letters <= 0xE9)            # first byte of three of U+3000 to U+9FFF
    first = inside.copy()
    first[1:] &= ~inside[:-1] | sign[1:]
    first[3:] |= sign[:-3] & inside[3:]
    starts = np.flatnonzero(first)
    if not len(starts):
        return np.empty(0, np.uint64), starts
    values = random_numbers(256, 1).copy()
    values[32] = 0                                          # the spaces after a word
    letters = letters[starts[0]:]
    begin = (starts - starts[0]).astype(np.uint8)           # place in the word modulo 256: the 257th is the first again
    lengths = np.diff(starts, append=starts[0] + len(letters))
    place = np.arange(len(letters)).astype(np.uint8) - np.repeat(begin, lengths)
    return np.add.reduceat(values[letters] * random_numbers(256, 2)[place], starts - starts[0]), starts


def ngram_hashes(texts, ngram=NGRAM):
    """(S,) uint64 hashes of the n-grams of all texts, and (N + 1,) the place where those of each text begin.

    A text shorter than n words has one n-gram, of all its words; a text without words has none.
    """
    words, begins = word_hashes(texts)
    n_words = np.diff(begins)
    counts = np.maximum(n_words - ngram + 1, np.minimum(n_words, 1))
    offsets = np.concatenate(([0], np.cumsum(counts)))
    at = np.arange(offsets[-1]) + np.repeat(begins[:-1] - offsets[:-1], counts)
    factors = random_numbers(ngram, 3)
    sums = np.zeros(len(words), np.uint64)
    for i, factor in enumerate(factors[:len(words)]):
        sums[:len(words) - i] += words[i:] * factor
    hashes = sums[at]
    for i in np.flatnonzero((n_words > 0) & (n_words < ngram)):
        hashes[offsets[i]] = (words[begins[i]:begins[i + 1]] * factors[:n_words[i]]).sum()
    return mix(hashes), offsets


def batches(texts):
    """Yields (first, last) of runs of texts of about BATCH characters."""
    first = size = 0
    for i, text in enumerate(texts):
        if size and size + len(text) > BATCH:
            yield first, i
            first, size = i, 0
        size += len(text) + 1
    if first < len(texts):
        yield first, len(texts)


# --- MinHash ---

def signatures(texts, ngram=NGRAM, permutations=PERMUTATIONS, seed=0):
    """(N, P) uint32 MinHash signatures; two documents of similarity J share each value with probability J.

    Fast similarity sketching (Dahlgaard, Knudsen and Thorup 2017, arXiv:1704.04370) in place of P hashes of every
    n-gram. In round t each n-gram is hashed to one value and one of the P places; a place takes the least value of the
    first round in which it gets any. Round P + i sends everything to place i, so that after 2 P rounds no place is
    empty. A document of more than P ln P n-grams needs about one round: work falls from S P to S + P ln P.
    A document without words has NOTHING everywhere.
    """
    if not 0 < permutations <= 2 ** 16 or ngram < 1:
        raise ValueError(f"a signature has from 1 to 65,536 permutations of n-grams of 1 word or more, not "
                         f"{permutations} of {ngram}")
    rows = np.full((len(texts), permutations), NOTHING)
    places_of_rows, factors = rows.reshape(-1), random_numbers(2 * permutations, 5)
    for begin, end in batches(texts):
        hashes, offsets = ngram_hashes(texts[begin:end], ngram)
        hashes = mix(hashes + random_numbers(seed + 1, 4)[seed])
        open_rows = begin + np.flatnonzero(np.diff(offsets))
        owner = np.repeat(np.arange(begin, end), np.diff(offsets))
        for t in range(2 * permutations):
            # round t: the upper half of a hash is the value, the lower half the place
            h = hashes * factors[t]
            values = (h >> np.uint64(32)).astype(np.uint32)
            places = ((h & LOWER_HALF) * np.uint64(permutations) >> np.uint64(32)).view(np.int64)
            places = owner * permutations + (places if t < permutations else t - permutations)
            # what earlier rounds filled stays
            if t:
                free = places_of_rows[places] == NOTHING
                places, values = places[free], values[free]
            np.minimum.at(places_of_rows, places, values)
            # on with the documents that still have empty places
            full = (rows[open_rows] != NOTHING).all(1)
            if full.any():
                closed = np.zeros(end - begin, bool)
                closed[open_rows[full] - begin] = True
                going = ~closed[owner - begin]
                hashes, owner, open_rows = hashes[going], owner[going], open_rows[~full]
            if not len(hashes):
                break
    return rows


def signature(text, ngram=NGRAM, permutations=PERMUTATIONS, seed=0):
    """(P,) uint32 MinHash signature of one text."""
    return signatures([text], ngram, permutations, seed)[0]


def bands_for(threshold, permutations, recall=0.99):
    """(bands, rows): the most rows a band can have so that a pair at the threshold still becomes a candidate.

        P(candidate) = 1 - (1 - threshold^rows)^bands >= recall

    Candidates are verified, so more rows than that would lose pairs, and fewer only cost time.
    """
    if not 0 < threshold <= 1 or permutations < 1:
        raise ValueError(f"the threshold must lie in (0, 1] and permutations be 1 or more, not {threshold} and "
                         f"{permutations}")
    for rows in range(permutations, 0, -1):
        bands = permutations // rows
        if 1 - (1 - threshold ** rows) ** bands >= recall:
            return bands, rows
    return permutations, 1


def near_duplicates(signatures, bands, rows, threshold, jaccard=None):
    """(N,) int64 label of each document's cluster: the lowest index in it.

    Clusters are connected components of the verified pairs. Pairs that share a band are verified by the share of
    values that agree; with `jaccard(left, right) -> (pairs,) similarities`, as of exact_jaccard, that one decides where
    the estimate lies within four standard errors of the threshold. `signatures` may be a memory map: it is read in
    blocks, a band at a time, and all else takes some 60 bytes a document.
    """
    N, P = signatures.shape
    if bands < 1 or rows < 1 or bands * rows > P:
        raise ValueError(f"{bands} bands of {rows} rows need {bands * rows} values, and a signature has {P}; lower one "
                         "or sign the documents with more permutations")
    doubt = 4 * np.sqrt(threshold * (1 - threshold) / P) if jaccard else 0

    def similar(left, right):
        agree = (signatures[left] == signatures[right]).mean(1)
        found = agree >= threshold
        if jaccard and len(unsure := np.flatnonzero(np.abs(agree - threshold) <= doubt)):
            found[unsure] = jaccard(left[unsure], right[unsure]) >= threshold
        return found

    def keys():
        for band in range(bands):
            key = np.empty(N, np.uint64)
            for first in range(0, N, PAIRS):
                block = np.asarray(signatures[first:first + PAIRS, band * rows:(band + 1) * rows])
                key[first:first + PAIRS] = mix((block * random_numbers(rows, 6)).sum(1, dtype=np.uint64))
            yield key

    words = np.concatenate([np.asarray(signatures[i:i + PAIRS, 0]) != NOTHING for i in range(0, N, PAIRS)] or [[]])
    return clusters(np.flatnonzero(words), N, keys(), similar)


def exact_jaccard(text_of, ngram=NGRAM):
    """jaccard(left, right) for near_duplicates: exact similarities of documents that text_of(index) returns."""
    @functools.lru_cache(256)
    def ngrams(i):
        return np.unique(ngram_hashes([text_of(i)], ngram)[0])

    def jaccard(left, right):
        shared = [len(np.intersect1d(ngrams(i), ngrams(j), True)) for i, j in zip(left.tolist(), right.tolist())]
        sizes = [len(ngrams(i)) + len(ngrams(j)) for i, j in zip(left.tolist(), right.tolist())]
        return np.array([both / max(size - both, 1) for both, size in zip(shared, sizes)])
    return jaccard


# --- SimHash ---

def simhashes(texts, ngram=3):
    """(N,) uint64 SimHash (Charikar 2002): bit i is the majority of bit i over the hashes of all n-grams."""
    result = np.zeros(len(texts), np.uint64)
    for begin, end in batches(texts):
        hashes, offsets = ngram_hashes(texts[begin:end], ngram)
        some = np.flatnonzero(np.diff(offsets))
        if not len(some):
            continue
        for bit in map(np.uint64, range(64)):
            ones = np.add.reduceat((hashes >> bit & np.uint64(1)).astype(np.int64), offsets[some])
            result[begin + some] |= (2 * ones > np.diff(offsets)[some]).astype(np.uint64) << bit
    return result


def simhash(text, ngram=3):
    return int(simhashes([text], ngram)[0])


def simhash_duplicates(hashes, distance=3):
    """(N,) int64 label of each document's cluster, the lowest index in it: at most `distance` bits differ in a pair.

    Of distance + 1 blocks of bits at least one is the same in such a pair, so none is missed (Manku et al. 2007, who
    take 3 bits of 64). Documents without words, of hash 0, stay alone.
    """
    hashes = np.asarray(hashes, np.uint64)
    if not 0 <= distance < 16:
        raise ValueError(f"the distance must be from 0 to 15 bits, not {distance}")
    edges = np.linspace(0, 64, distance + 2).astype(int)

    def keys():
        for low, high in zip(edges, edges[1:]):
            yield hashes >> np.uint64(low) & np.uint64(2 ** int(high - low) - 1)

    return clusters(np.flatnonzero(hashes), len(hashes), keys(),
                    lambda left, right: np.bitwise_count(hashes[left] ^ hashes[right]) <= distance)


# --- clusters ---

def unite(labels, left, right):
    """Joins, in place, the clusters of each pair; a label is always the lowest index of its cluster."""
    while True:
        low, high = np.minimum(labels[left], labels[right]), np.maximum(labels[left], labels[right])
        apart = low != high
        if not apart.any():
            return
        left, right = low[apart], high[apart]
        np.minimum.at(labels, right, left)
        while (labels[labels] != labels).any():
            labels[:] = labels[labels]


def clusters(documents, N, keys, similar):
    """(N,) labels: connected components of the pairs that share a key and are similar(left, right) -> (pairs,) bool.

    `keys` yields (N,) arrays; only `documents` take part. In round k the k-th member of each bucket is compared with
    all later ones that are not in its cluster yet, up to ROUNDS of them.
    """
    labels = np.arange(N)
    for key in keys:
        key = key[documents]
        order = np.argsort(key, kind="stable")
        key, member = key[order], documents[order]
        starts = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1]))) if len(key) else np.empty(0, np.int64)
        sizes = np.diff(starts, append=len(key))
        for k in range(ROUNDS):
            # buckets with members after the k-th that are still of several clusters
            big = sizes > k + 1
            starts, sizes = starts[big], sizes[big]
            if not len(starts):
                break
            place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            here, own = labels[member[np.repeat(starts, sizes) + place]], np.repeat(np.arange(len(sizes)), sizes)
            differ = np.zeros(len(starts), bool)
            differ[own[here != here[np.cumsum(sizes) - sizes][own]]] = True
            starts, sizes = starts[differ], sizes[differ]
            later = sizes - k - 1
            place = np.arange(later.sum()) - np.repeat(np.cumsum(later) - later, later) + k + 1
            left, right = np.repeat(member[starts + k], later), member[np.repeat(starts, later) + place]
            for i in range(0, len(left), PAIRS):
                a, b = left[i:i + PAIRS], right[i:i + PAIRS]
                apart = labels[a] != labels[b]
                a, b = a[apart], b[apart]
                if len(a):
                    found = similar(a, b)
                    unite(labels, a[found], b[found])
    return labels


def survivors(labels, scores):
    """(N,) bool: the member of each cluster with the highest score, of equal ones the first. NaN counts as lowest."""
    scores = np.nan_to_num(np.asarray(scores, np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    order = np.lexsort((np.arange(len(labels)), -scores, labels))
    first = np.ones(len(labels), bool)
    first[1:] = np.diff(np.asarray(labels)[order]) != 0
    kept = np.zeros(len(labels), bool)
    kept[order[first]] = True
    return kept


# --- lines and paragraphs that documents share ---

def units(text, unit):
    """[(line or paragraph, what separates it from the next)]; put together again they are the text."""
    if unit == "line":
        return [(line.rstrip("\r\n"), line[len(line.rstrip("\r\n")):]) for line in re.findall(r"[^\n]*\n|[^\n]+", text)]
    if unit == "paragraph":
        ends = [(m.start(), m.end()) for m in BLANK_LINE.finditer(text)] + [(len(text), len(text))]
        begins = [0] + [end for _, end in ends]
        return [(text[begin:stop], text[stop:end]) for begin, (stop, end) in zip(begins, ends)]
    raise ValueError(f"there are lines and paragraphs that repeat, but no {unit!r}; write line or paragraph")


def line_hashes(text, unit="line"):
    """uint64 hashes of the normalised lines, or paragraphs, of a text; 0 for one without letters and digits."""
    return np.array([content_hash(line) if only_words(line).strip() else 0 for line, _ in units(text, unit)],
                    np.uint64)


def repeated(line_hash_arrays, documents_threshold):
    """Sorted uint64 hashes of the lines that stand in at least `documents_threshold` documents, of one array each.

    Give it the documents that survived alone: a line of a document with ten copies is no boilerplate.
    """
    if documents_threshold < 2:
        raise ValueError(f"a line repeats when it stands in 2 documents or more, not in {documents_threshold}")
    arrays = [np.unique(hashes) for hashes in line_hash_arrays]
    hashes, counts = np.unique(np.concatenate(arrays or [np.empty(0, np.uint64)]), return_counts=True)
    return hashes[(counts >= documents_threshold) & (hashes != 0)]


def drop_lines(text, hashes, unit="line"):
    """The text without the lines, or paragraphs, of the sorted `hashes`."""
    if not len(hashes):
        return text
    own = line_hashes(text, unit)
    at = np.minimum(np.searchsorted(hashes, own), len(hashes) - 1)
    gone = hashes[at] == own
    if not gone.any():
        return text
    return "".join(line + gap for (line, gap), drop in zip(units(text, unit), gone) if not drop)
