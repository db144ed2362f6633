"""MinHash of dedup.py: speed beside datasketch, memory for a given amount of text, recall and precision on known pairs.

    python runs/dedup.py speed DOCUMENTS [ROUNDS]        a .jsonl(.gz) file, folder or glob, of which 8 MB are taken
    python runs/dedup.py memory DOCUMENTS GIGABYTES [CHARACTERS]       a document, 2,000 by default
    python runs/dedup.py accuracy DOCUMENTS

Speed: one process and one core, the same documents, 5-grams of words and 256 permutations; ours and datasketch in turn.
datasketch gets the 5-grams as bytes, once with its own SHA-1 and once with zlib's CRC-32, the fastest hash at hand;
how long it takes to make them is also said. Memory: the highest resident size of a process that draws documents (words
of the given ones; 2 % of them others with three words changed), signs them into a memory map, and clusters them.
Accuracy: documents of 50 to 2,000 words, each with a copy of which some words are others; the similarity is counted.
"""
import os
import resource
import statistics
import sys
import tempfile
import time
import zlib
from collections import Counter

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

import dedup  # noqa: E402
from sources import mix, parse_sources  # noqa: E402

PERMUTATIONS, THRESHOLD = dedup.PERMUTATIONS, 0.8


def read(name, n_bytes=8_000_000):
    return [text for _, text, _ in mix(parse_sources(name, "text", "replace"), n_bytes, Counter())]


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def speed(name, rounds=3):
    from datasketch import MinHash
    texts = read(name)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6

    def ngrams():
        words = [dedup.only_words(text).split() for text in texts]
        n = dedup.NGRAM
        return [[b" ".join(of[i:i + n]) for i in range(max(len(of) - n + 1, 1))] for of in words]

    seconds = {"ours, from text to signatures": [], "5-grams as bytes": [], "datasketch, SHA-1": [],
               "datasketch, CRC-32": []}
    dedup.signatures(texts[:10])
    for _ in range(int(rounds)):
        results = [timed(lambda: dedup.signatures(texts)), timed(ngrams)]
        for hashfunc in (None, zlib.crc32):
            results.append(timed(lambda grams=results[1][1], f=hashfunc: MinHash.bulk(
                grams, num_perm=PERMUTATIONS, hashfunc=f)))
        for times, (took, _) in zip(seconds.values(), results):
            times.append(took)
    print(f"{len(texts):,} documents, {megabytes:.1f} MB, {PERMUTATIONS} permutations, median of {rounds} in turn")
    ours = statistics.median(seconds["ours, from text to signatures"])
    making = statistics.median(seconds["5-grams as bytes"])
    for what, times in seconds.items():
        median = statistics.median(times)
        note = f"; ours is {median / ours:.1f}x, with the 5-grams {(median + making) / ours:.1f}x"
        print(f"{what:32} {megabytes / median:7.2f} MB/s{note if 'datasketch' in what else ''}")


def drawn(texts, n_documents, characters, seed=0):
    """Yields documents of words drawn from those of the texts; every fiftieth is an earlier one with three changed."""
    words = np.array(sorted({word for text in texts for word in text.split() if len(word) < 16}), object)
    draw, pool = np.random.default_rng(seed), []
    n_words = int(characters / np.mean([len(word) + 1 for word in words]))
    for i in range(n_documents):
        if i % 50 == 49:
            new = pool[draw.integers(len(pool))].copy()
            new[draw.integers(n_words, size=3)] = "changed"
        else:
            new = words[draw.integers(len(words), size=n_words)]
            pool = pool[-999:] + [new]
        yield " ".join(new)


def memory(name, gigabytes, characters=2000):
    texts, characters = read(name, 1_000_000), int(characters)
    n_documents = int(float(gigabytes) * 1e9 / characters)
    with tempfile.TemporaryDirectory() as folder:
        rows = np.memmap(f"{folder}/signatures", np.uint32, "w+", shape=(n_documents, PERMUTATIONS))
        stream, signing, n_bytes = drawn(texts, n_documents, characters), 0, 0
        for first in range(0, n_documents, 1000):
            block = [next(stream) for _ in range(min(1000, n_documents - first))]
            n_bytes += sum(map(len, block))
            took, rows[first:first + len(block)] = timed(lambda b=block: dedup.signatures(b, permutations=PERMUTATIONS))
            signing += took
        bands = dedup.bands_for(THRESHOLD, PERMUTATIONS)
        clustering, labels = timed(lambda: dedup.near_duplicates(rows, *bands, THRESHOLD))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    copies, found = n_documents // 50, int((labels != np.arange(n_documents)).sum())
    print(f"{n_documents:,} documents, {n_bytes / 1e9:.2f} GB: signed at {n_bytes / 1e6 / signing:.1f} MB/s, clustered "
          f"in {clustering:.0f} s\n{found:,} of {copies:,} copies found\npeak memory {peak / 1e9:.2f} GB, of which the "
          f"mapped signatures are {rows.nbytes / 1e9:.2f} GB")


def accuracy(name):
    draw, pairs = np.random.default_rng(0), []
    for text in read(name, 20_000_000):
        words = text.split()[:2000]
        if len(words) >= 50:
            copy = np.array(words, object)
            copy[draw.choice(len(words), int(draw.uniform(0, 0.1) * len(words)), replace=False)] = "other"
            pairs += [" ".join(words), " ".join(copy)]
    same = dedup.exact_jaccard(pairs.__getitem__)
    even = np.arange(0, len(pairs), 2)
    true = same(even, even + 1) >= THRESHOLD
    print(f"{len(even):,} pairs, {true.sum():,} of them of similarity {THRESHOLD} or more")
    for permutations in (128, 256):
        rows, bands = dedup.signatures(pairs, permutations=permutations), dedup.bands_for(THRESHOLD, permutations)
        for what, verify in (("estimated", None), ("exact in doubt", same)):
            labels = dedup.near_duplicates(rows, *bands, THRESHOLD, verify)
            found = labels[even] == labels[even + 1]
            print(f"{permutations} permutations, {bands[0]} bands of {bands[1]}, {what:14}: "
                  f"recall {(found & true).sum() / true.sum():.4f}, precision {(found & true).sum() / found.sum():.4f}")


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("speed", "memory", "accuracy"):
        raise SystemExit(__doc__)
    {"speed": speed, "memory": memory, "accuracy": accuracy}[sys.argv[1]](*sys.argv[2:])
