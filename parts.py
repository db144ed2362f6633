"""What a cleaning run has finished, on disk, and which of its documents are duplicates.

    parts = Parts("data/clean/.unfinished", options, overwrite=False)
    fates, repeated, facts = decide(parts, n_parts, settings, ["quality"])      # what chain.finish needs of all parts

Decisions are functions of all parts in their order, made once, on one machine, from arrays: the texts stay on disk.

Letters: N documents that pass 1 kept, P values of a signature.
"""
import contextlib
import io
import itertools
import json
import os
import shutil

import numpy as np

import dedup
import scorers

LOW_IS_GOOD = {"toxicity", "bits_per_byte"}


class Parts:
    """What a run has finished, below out_dir/.unfinished: part-N.npz and part-N.jsonl of pass 1, read.json when all was
    read, decided.npz, done-N.json and documents/ of pass 2. Every file is there whole or not at all."""

    def __init__(self, folder, identity, overwrite):
        self.folder, path = folder, os.path.join(folder, "options.json")
        if os.path.isdir(folder):
            before = self.read_json("options.json") if os.path.exists(path) else {}
            differ = sorted(name for name in {*before, *identity} if before.get(name) != identity.get(name))
            if differ and not overwrite and before and self.has("part-00000.npz"):      # else nothing would be lost
                said = ", ".join("files" if name == "files" else f"{name}={before.get(name)!r}" for name in differ)
                raise ValueError(f"{folder} holds an unfinished run with other {said}; repeat it as it was to go on, "
                                 "or pass --overwrite=true to start anew")
            if differ or overwrite:
                self.remove()
        self.write("options.json", identity)

    def remove(self):
        """Takes the options away first: without them what a kill leaves here is of no run."""
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.path("options.json"))
        shutil.rmtree(self.folder)

    def path(self, name):
        return os.path.join(self.folder, name)

    def has(self, name):
        return os.path.exists(self.path(name))

    def write(self, name, content):
        """Bytes, what a function content(file) writes, or facts as JSON."""
        from common import write_atomic
        write_atomic(self.path(name), json.dumps(content).encode() if isinstance(content, (dict, list)) else content)

    def read_json(self, name):
        with open(self.path(name), encoding="utf-8") as file:
            return json.load(file)

    def lines(self, number):
        with open(self.path(f"part-{number:05d}.jsonl"), "rb") as file:
            return file.read()

    def save(self, name, arrays, facts):
        """Arrays and what JSON can say, in one file."""
        stream = io.BytesIO()
        np.savez(stream, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **arrays)
        self.write(name, stream.getvalue())

    def load(self, name, *names):
        """[arrays], or the facts if no name is given."""
        with np.load(self.path(name), allow_pickle=False) as file:
            return [file[name] for name in names] if names else json.loads(file["facts"].tobytes())


# --- which documents are duplicates ---

def scores_of(settings, arrays):
    """(N,) how good each document is: of a cluster the highest stays."""
    if settings["best_by"] == "first":
        return np.zeros(len(arrays["hashes"]))
    name = "lengths" if settings["best_by"] == "length" else settings["best_by"]
    return -arrays[name] if name in LOW_IS_GOOD else arrays[name]


def find_duplicates(settings, arrays, signatures, text_of):
    """(fates (N,) uint8, {what: number}) of all documents of pass 1; fates are places in chain.FATES.

    signatures(indices) returns an array, which may be a memory map, with a row for each of these documents.
    """
    goodness = scores_of(settings, arrays)
    fates, facts = np.zeros(len(goodness), np.uint8), {}
    if settings["exact_duplicates"]:
        _, first, inverse = np.unique(arrays["hashes"], return_index=True, return_inverse=True)
        fates[~dedup.survivors(first[inverse], goodness)] = 1
        facts["exact duplicates"] = int((fates == 1).sum())
    if settings["near_duplicates"] != "none" and len(fates):
        left = np.flatnonzero(fates == 0)
        if settings["near_duplicates"] == "minhash":
            exact = dedup.exact_jaccard(lambda i: text_of(left[i]), settings["ngram"])
            labels = dedup.near_duplicates(signatures(left), *bands_and_rows(settings), settings["threshold"],
                                           exact if settings["verify"] == "exact" else None)
        else:
            labels = dedup.simhash_duplicates(signatures(left), settings["distance"])
        fates[left[~dedup.survivors(labels, goodness[left])]] = 2
        sizes = np.unique(labels, return_counts=True)[1]
        facts |= {"near-duplicates": int((fates == 2).sum()), "clusters of near-duplicates": int((sizes > 1).sum()),
                  "largest of these clusters": int(sizes.max(initial=1))}
    return fates, facts


def bands_and_rows(settings):
    n_bands, n_rows = dedup.bands_for(settings["threshold"], settings["permutations"])
    return settings["bands"] or n_bands, settings["rows"] or n_rows


def decide(parts, n_parts, settings, score_columns):
    """Between the passes: fates (N,), sorted hashes of repeated lines, and what was found, as JSON."""
    if parts.has("decided.npz"):
        return *parts.load("decided.npz", "fates", "repeated"), parts.load("decided.npz")
    names = [f"part-{number:05d}.npz" for number in range(n_parts)]
    columns = ["hashes", "lengths", "ends", *score_columns]
    arrays = {column: np.concatenate([parts.load(name, column)[0] for name in names]) for column in columns}
    counts = np.array([len(parts.load(name, "hashes")[0]) for name in names])
    begins = np.cumsum(counts) - counts                         # of each part's documents among all

    def signatures(indices):
        """A memory map of the rows of these documents, written part after part, so that none but one is in memory:
        into a file and not into the map, where a full disk kills the process."""
        def write(file):
            for name, begin, count in zip(names, begins, counts):
                rows, = parts.load(name, "signatures")
                file.write(rows[indices[(indices >= begin) & (indices < begin + count)] - begin].tobytes())
        parts.write("signatures", write)
        rows, = parts.load(names[0], "signatures")
        return np.memmap(parts.path("signatures"), rows.dtype, "r", shape=(len(indices), *rows.shape[1:]))

    def text_of(index):
        part = int(np.searchsorted(begins, index, "right")) - 1
        start = int(arrays["ends"][index - 1]) if index > begins[part] else 0
        with open(parts.path(f"part-{part:05d}.jsonl"), "rb") as file:
            file.seek(start)
            return json.loads(file.read(int(arrays["ends"][index]) - start))["text"]

    fates, found = find_duplicates(settings, arrays, signatures, text_of)
    repeated = np.empty(0, np.uint64)
    if settings["repeated_lines"]:
        of_documents = []
        for name, begin, count in zip(names, begins, counts):
            hashes, line_counts = parts.load(name, "line_hashes", "line_counts")
            of_documents += itertools.compress(np.split(hashes, np.cumsum(line_counts)[:-1]),
                                               fates[begin:begin + count] == 0)
        repeated = dedup.repeated(of_documents, settings["repeated_lines"])
        found[f"repeated {settings['repeated_unit']}s"] = len(repeated)
    facts = {"duplicates": found, "edges": bucket_edges(arrays, fates) if "bits_per_byte" in score_columns else {}}
    parts.save("decided.npz", {"fates": fates, "repeated": repeated}, facts)
    return fates, repeated, facts


def bucket_edges(arrays, fates):
    """[[language or None, edge of head, edge of middle]] of the documents that are no duplicates."""
    languages = [name or None for name in arrays["language"][fates == 0]] if "language" in arrays else None
    found = scorers.bucket_edges(arrays["bits_per_byte"][fates == 0], languages)
    return [[name, *edges] for name, edges in found.items()]
