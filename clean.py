"""Raw text to documents worth training on: repaired, filtered, scored, without duplicates and evaluation questions.

    python clean.py --sources="crawl/*.jsonl.gz,pages.zip" --out_dir=data/clean --show_rejected=2
    python clean.py --sources=code --filters= --steps=mojibake,unicode --near_duplicates=none --out_dir=data/code_clean
    python clean.py --sources=crawl --scores=language --languages=en,de --out_dir=data/clean
    python clean.py --train_quality=true --good=books --bad=crawl --out_dir=out/quality
    python data.py --sources=data/clean/documents --out_dir=data/text

Text is read in chunks, in an order that is the same everywhere (raw.py). Each goes through two passes (chain.py):

    1  steps (cleaners.py), filters (filters.py), evaluation questions (contamination.py), scores (scorers.py), hashes
       between them: exact duplicates, near-duplicates among what is left, lines that many documents share (dedup.py)
    2  what is no duplicate, without those lines, through the filters once more if lines went

A pass is a pure function of a chunk, so the result is the same for any number of processes or machines (workers.py).
Finished chunks stand in out_dir/.unfinished: the same command, after a kill at any moment, goes on from there.

Written: documents/documents-00000.jsonl.gz ..., each row with text, source, id ("file:number"), the columns of its
input row and its scores; report.json and report.html (report.py). With --kind=chats or pairs, rows.jsonl (examples.py).

Letters: N documents that pass 1 kept, P permutations.
"""
import contextlib
import functools
import math
import os
import shutil
import sys
import time
from collections import Counter

import numpy as np

import chain
import raw
import report
import scorers
from cleaners import parse_steps
from configurator import configure, read_options
from contamination import SHORTEST, Contamination
from filters import parse_filters
from parts import Parts, bands_and_rows, decide
from workers import ENGINES, run

# --- run ---
out_dir = "data/clean"        # folder to write: documents/, report.json, report.html
overwrite = False             # replace what out_dir holds, finished or not; without it that is an error
kind = "text"                 # what the rows are: text, chats or pairs
sources = ""                  # files, folders, globs, stdlib, hub:ID:CONFIG:SPLIT; commas between
show_rejected = 0             # print so many examples of what each rule rejected; at most 5
# --- machines for text ---
engine = "processes"          # processes of this machine, or ray: Ray Data, on this machine or a cluster
workers = 0                   # processes, or CPUs of Ray on this machine; 0 takes every core
address = ""                  # of a Ray cluster to join, as in 10.0.0.1:6379 or auto; empty starts one on this machine
# --- reading text ---
text_column = "text"          # column of rows that holds the text; of several (text,content) the first that a row has
max_document_bytes = 10_000_000   # longer documents are left out and counted, and never wholly in memory
chunk_bytes = 4_000_000       # of text that a process works on at once; more takes more memory
max_bytes = 0                 # stop after the chunk in which so many bytes of text were read; 0 takes everything
# --- cleaning text ---
steps = "mojibake,html,unicode,whitespace"      # in this order; docs/clean.md says what each does
filters = "basic,gopher,gopher_repetition"      # presets for English prose; -gopher: stop words leaves a rule out
questions = ""                # files of evaluation questions (.jsonl .json, also .gz); documents that hold one go
question_ngram = 13           # words in a row that a document and a question must share; shorter questions whole
# --- duplicates in text ---
exact_duplicates = True       # drop documents that are equal but for case, white space and Unicode form
near_duplicates = "minhash"   # minhash, simhash or none
ngram = 5                     # words in an n-gram; fewer find looser likeness; SimHash likes 3
permutations = 256            # values of a MinHash signature; more estimate better and take more memory and time
threshold = 0.8               # Jaccard similarity of n-grams from which two documents are near-duplicates
bands = 0                     # of a signature, in which two must agree to be compared; 0: by threshold
rows = 0                      # values of a band; 0: by threshold
verify = "exact"              # two that are compared: exact where signatures leave doubt, or estimate from them alone
distance = 3                  # SimHash: bits in which near-duplicates may differ
best_by = "length"            # which of a cluster stays: length, first, or a score, as in quality
repeated_lines = 0            # drop lines that stand in so many documents or more; 0 keeps all (code repeats its own)
repeated_unit = "line"        # line or paragraph
# --- scores of text ---
scores = ""                   # language, toxicity, perplexity, quality: columns of the documents, and what rejects them
languages = ""                # that stay, as in en,de; empty: all
min_language_score = 0.0      # least probability of the language; 0 keeps all
max_toxicity = 0.0            # highest probability of an insult; 0 keeps all
perplexity_model = ""         # model directory whose bits per byte are the score
max_bits_per_byte = 0.0       # highest that stays; 0 keeps all
buckets = "head,middle,tail"  # thirds by bits per byte, of each language, that stay
quality_model = ""            # folder that --train_quality wrote
min_quality = 0.0             # least probability of being good; 0 keeps all
score_characters = 20_000     # of a document that scores read; 0 reads all
score_device = "cpu"          # of the perplexity model: auto, cuda, mps or cpu
# --- a quality classifier from text ---
train_quality = False         # train one on good against bad and write it to out_dir; nothing is cleaned
good = ""                     # sources of documents like those that should stay
bad = ""                      # sources of documents like those that should go
quality_documents = 100_000   # of each at most

# --- answers of chats and pairs ---
min_answer = 1                # characters of the shortest answer that stays
max_answer = 20_000           # of the longest; 0 keeps all
max_repetition = 0.4          # highest share of an answer's 4-grams of words that stood in it before; 0 keeps all
refusals = "drop"             # answers that begin by declining, in English: drop or keep
similar_by = "conversation"   # near-duplicates go by the whole conversation, by the question, or none
similar_threshold = 0.8       # Jaccard similarity of 3-grams of words from which two are near-duplicates
judge = "none"                # ifd (chats), reward, endpoint or none: scores what is left
judge_model = ""              # of ifd a language model's directory, of reward a reward model's, of endpoint its name
judge_url = ""                # of an OpenAI-compatible endpoint, as in http://localhost:8000/v1
judge_key_env = ""            # environment variable that holds its key; empty sends none
judge_parallel = 8            # requests at a time
judge_device = "cpu"          # of ifd and reward: auto, cuda, mps or cpu
keep_fraction = 1.0           # share of what is left that stays, those with the highest score
# --- preferences in pairs ---
min_margin = 0.0              # least difference of scores, where a row has them; 0 drops contradictions
min_agreement = 0.0           # least share of annotators who agreed, where a row has it
max_length_ratio = 0.0        # of the longer answer to the shorter; 0 keeps all

UNFINISHED = ".unfinished"
MANY = 10_000                 # documents among which looking for duplicates takes so long that it is said
OF_THE_RUN = {"out_dir", "overwrite", "show_rejected", "engine", "workers", "address"}    # they change no document


# --------------------------------------------------------------------------------------------------------------------
# the two passes


def wash_all(parts, corpus, settings, machines, progress):
    """Pass 1: a part for every chunk; returns how many there are."""
    if parts.has("read.json"):
        return parts.read_json("read.json")["parts"]
    read, shares, at = {"parts": 0, "bytes": 0}, {}, 0
    files = [path for source in corpus for path in source.files]
    ends = np.cumsum([0] + [os.path.getsize(path) if os.path.isfile(path) else 0 for path in files])

    def unwashed():
        nonlocal at
        for number, documents in raw.chunks(corpus, settings["chunk_bytes"]):
            read["parts"], size = number + 1, sum(chain.size_of(document["text"]) for document in documents)
            read["bytes"] += size
            while at < len(files) - 1 and not documents[-1]["id"].startswith((f"{files[at]}:", f"{files[at]}/")):
                at += 1
            if not parts.has(f"part-{number:05d}.npz"):
                shares[number] = max(ends[at] / max(1, ends[-1]), read["bytes"] / (settings["max_bytes"] or math.inf))
                yield number, documents
            if settings["max_bytes"] and read["bytes"] >= settings["max_bytes"]:
                return

    function = functools.partial(chain.wash, settings)
    for washed in run(function, unwashed(), *machines):
        parts.write(f"part-{washed['number']:05d}.jsonl", washed["lines"])
        parts.save(f"part-{washed['number']:05d}.npz", washed["arrays"], [washed["facts"], washed["examples"]])
        progress(washed["facts"], "in", shares.pop(washed["number"]))
    read["sources"] = {source.name: {"unreadable": source.dropped, "mended": source.mended, "places": source.places}
                       for source in corpus}
    parts.write("read.json", read)
    return read["parts"]


def finish_all(parts, n_parts, settings, decided, machines, progress):
    """Pass 2: documents-N.jsonl.gz and done-N.json for every part that kept something."""
    fates, repeated, found = decided
    edges = {name: tuple(pair) for name, *pair in found["edges"]}

    def unfinished():
        begin = 0
        for number in range(n_parts):
            sizes, = parts.load(f"part-{number:05d}.npz", "sizes")
            own, begin = fates[begin:begin + len(sizes)], begin + len(sizes)
            if not parts.has(f"done-{number:05d}.json"):
                here = repeated
                if len(repeated):
                    here = np.intersect1d(repeated, parts.load(f"part-{number:05d}.npz", "line_hashes")[0])
                yield number, parts.lines(number), sizes, own, here, edges

    for finished in run(functools.partial(chain.finish, settings), unfinished(), *machines):
        if finished["documents"]:
            parts.write(f"documents/documents-{finished['number']:05d}.jsonl.gz", finished["documents"])
        parts.write(f"done-{finished['number']:05d}.json", [finished["facts"], finished["examples"]])
        progress(finished["facts"], "out", (finished["number"] + 1) / n_parts)


# --------------------------------------------------------------------------------------------------------------------
# a run


def checked(config):
    """The settings that every chunk is worked on with; ValueError on whatever would go wrong hours later."""
    settings = {name: config[name] for name in config if name not in OF_THE_RUN}
    for name, known in (("near_duplicates", ("minhash", "simhash", "none")), ("verify", ("estimate", "exact")),
                        ("repeated_unit", ("line", "paragraph")), ("engine", ENGINES)):
        if config[name] not in known:
            raise ValueError(f"{name} is {config[name]!r}; it must be {', '.join(known[:-1])} or {known[-1]}")
    for name, least in (("max_document_bytes", 1), ("chunk_bytes", 1), ("max_bytes", 0), ("ngram", 1), ("bands", 0),
                        ("permutations", 1), ("rows", 0), ("show_rejected", 0), ("workers", 0),
                        ("question_ngram", 1)):
        if config[name] < least:
            raise ValueError(f"{name} is {config[name]}; it must be {least} or more")
    if config["address"] and config["engine"] != "ray":
        raise ValueError(f"address is {config['address']!r}, but a cluster is joined with --engine=ray")
    if config["repeated_lines"] < 0 or config["repeated_lines"] == 1:
        raise ValueError(f"repeated_lines is {config['repeated_lines']}; it is a number of documents: 0, or 2 or more")
    if config["near_duplicates"] == "minhash":
        n_bands, n_rows = bands_and_rows(config)
        if n_bands * n_rows > config["permutations"]:
            raise ValueError(f"bands * rows = {n_bands} * {n_rows} is more than permutations={config['permutations']}; "
                             "lower one of the two")
    if config["near_duplicates"] == "simhash" and not 0 <= config["distance"] < 16:
        raise ValueError(f"distance is {config['distance']}; it must be from 0 to 15 of SimHash's 64 bits")
    parse_filters(config["filters"])
    parse_steps(config["steps"])
    for name in ("perplexity_model", "quality_model"):
        settings[name] = config[name] and os.path.abspath(config[name])     # workers stand elsewhere
    columns = [chain.SCORES[name][0] for name in scorers.Scorers(config["scores"], settings).names]
    if config["best_by"] not in ("length", "first", *columns):
        raise ValueError(f"best_by is {config['best_by']!r}; it must be length, first or a score that is taken: "
                         f"{', '.join(columns) or 'none is, see --scores'}")
    files, n = [name.strip() for name in config["questions"].split(",") if name.strip()], config["question_ngram"]
    settings["questions"] = Contamination(files, n, min(SHORTEST, n)) if files else None
    return settings, columns


def clean_text(config):
    """Cleans text into out_dir; prints what came of it."""
    started, out_dir = time.perf_counter(), config["out_dir"]
    done = os.path.join(out_dir, "report.json")
    begun = all(os.path.exists(os.path.join(out_dir, UNFINISHED, name))     # to replace what is done
                for name in ("options.json", "part-00000.npz"))
    if os.path.exists(done) and not begun and not config["overwrite"]:
        raise ValueError(f"{out_dir} already holds cleaned data; pass --overwrite=true to replace it, or another "
                         "--out_dir")
    settings, columns = checked(config)
    corpus = raw.parse_sources(config["sources"], config["text_column"], config["max_document_bytes"])
    identity = {name: value for name, value in config.items() if name not in OF_THE_RUN}
    read = [path for source in corpus for path in source.files]
    read += settings["questions"].files if settings["questions"] else []
    read += [os.path.join(settings[f"{name}_model"], file) for name, file in scorers.FILES.items()
             if settings[f"{name}_model"]]
    identity["files"] = [[path, stat.st_size, stat.st_mtime_ns] for path in read if os.path.isfile(path)
                         for stat in [os.stat(path)]]               # raw.py counts a link to nowhere
    parts = Parts(os.path.join(out_dir, UNFINISHED), identity, config["overwrite"])
    machines, progress = (config["engine"], config["workers"], config["address"]), Progress()

    # pass 1, what is between, pass 2
    n_parts = wash_all(parts, corpus, settings, machines, progress)
    facts, examples = gathered(parts, n_parts, settings, corpus, ["part"])
    documents = sum(len(parts.load(f"part-{number:05d}.npz", "sizes")[0]) for number in range(n_parts))
    if documents > MANY:
        print(f"between the passes: looking for duplicates among {documents:,} documents", file=sys.stderr, flush=True)
    if documents:
        decided = decide(parts, n_parts, settings, columns + ["language"] * ("language_score" in columns))
        finish_all(parts, n_parts, settings, decided, machines, progress)
        facts, examples = gathered(parts, n_parts, settings, corpus, ["part", "done"])
        facts["duplicates"] = decided[2]["duplicates"]
    facts |= {"examples": [example for rule in sorted(examples) for example in examples[rule]],
              "options": {name: value for name, value in config.items() if name not in OF_THE_RUN}}

    # what came of it
    total, shown = report.totals(facts), report.rejected(facts, config["show_rejected"])
    if not total["documents_out"]:
        print(report.printable(shown), end="")
        parts.remove()
        with contextlib.suppress(OSError):
            os.rmdir(out_dir)                                   # only if it is empty
        raise ValueError(nothing_left(total, config))
    assert not report.missing(facts), f"documents are unaccounted for: {report.missing(facts)}"
    publish(parts, out_dir, facts | {"seconds": round(time.perf_counter() - started, 1)})
    seconds = time.perf_counter() - started
    print(report.printable(
        f"{shown}{report.summary(facts)}\n"
        f"{total['bytes_in'] / 1e6:,.1f} MB in {seconds:.1f} s, {total['bytes_in'] / 1e6 / seconds:.1f} MB/s; "
        f"report: {out_dir}/report.html; next: python data.py --sources={out_dir}/documents --out_dir={out_dir}/text"))


def gathered(parts, n_parts, settings, corpus, passes):
    """(facts, {rule: [examples]}) of all parts, in their order, and of reading."""
    empty = {"documents_in": 0, "bytes_in": 0, "documents_out": 0, "bytes_out": 0, "rejected": {}}
    total, examples = {"sources": {source.name: {**empty, "rejected": {}} for source in corpus}}, {}
    for number in range(n_parts):
        for name in passes:
            facts, shown = (parts.load(f"part-{number:05d}.npz") if name == "part" else
                            parts.read_json(f"done-{number:05d}.json"))
            chain.add(total, facts)
            for rule, of_rule in shown.items():
                examples[rule] = (examples.get(rule, []) + of_rule)[:chain.EXAMPLES]
    for name, notes in parts.read_json("read.json")["sources"].items():
        total["sources"][name] |= notes
    if settings["questions"]:
        found = total.get("questions", {})
        asked = settings["questions"].questions
        total["questions"] = {file: {"questions": number, "documents": found.get(file, 0)}
                              for file, number in asked.items()}
    return total, examples


def nothing_left(total, config):
    """The sentence that says why no document is left."""
    def most(counts):
        return max(counts, key=counts.get)
    if not total["documents_in"]:
        why = total["unreadable"]
        return (f"no document of {config['sources']} could be read"
                + (f": {most(why)} ({why[most(why)]:,} of {sum(why.values()):,})" if why else "")
                + "; nothing was written")
    why = {rule: documents for rule, (documents, _) in total["rejected"].items()}
    return (f"every one of the {total['documents_in']:,} documents of {config['sources']} was rejected, "
            f"{why[most(why)]:,} of them by the rule {most(why)!r}; leave that rule out or loosen it, "
            "--show_rejected=2 shows what it met; nothing was written")


def publish(parts, out_dir, facts):
    """Moves documents/ to its place and writes the report last: where it stands, the data is complete."""
    documents = os.path.join(out_dir, "documents")
    if parts.has("documents"):
        for name in ("report.json", "report.html"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(out_dir, name))
        shutil.rmtree(documents, ignore_errors=True)
        os.replace(parts.path("documents"), documents)
    report.write(out_dir, facts)
    parts.remove()


class Progress:
    """A line every 30 s; and one, once, when a thousand documents were rejected and none was kept."""

    def __init__(self):
        self.pace = {"in": report.Pace(), "out": report.Pace()}
        self.bytes, self.documents, self.rejected, self.warned = {"in": 0, "out": 0}, 0, Counter(), False

    def __call__(self, facts, moment, share):
        for source in facts["sources"].values():
            self.bytes[moment] += source[f"bytes_{moment}"]
            self.documents += source["documents_in"]
            self.rejected.update({rule: documents for rule, (documents, _) in source["rejected"].items()})
        if moment == "in" and self.documents >= 1000 and self.rejected.total() == self.documents and not self.warned:
            self.warned = True
            print(f"all of the first {self.documents:,} documents were rejected, most by the rule "
                  f"{self.rejected.most_common(1)[0][0]!r}", file=sys.stderr, flush=True)
        self.pace[moment](f"pass {1 if moment == 'in' else 2}: {self.bytes[moment] / 1e6:,.0f} MB {moment}", share)


def main(config):
    if config["kind"] not in ("text", "chats", "pairs"):
        raise ValueError(f"kind is {config['kind']!r}; it must be text, chats or pairs")
    for name, (default, _, section) in read_options(__file__).items():
        if section != "run" and config["kind"] not in section.split() and config[name] != default:
            raise ValueError(f"{name} is an option of {section}, and kind is {config['kind']}")
    if config["train_quality"]:
        facts = scorers.train_quality(config["good"], config["bad"], config["out_dir"], config["text_column"],
                                      config["steps"], config["quality_documents"], config["score_characters"],
                                      config["overwrite"])
        print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    elif config["kind"] == "text":
        clean_text(config)
    else:
        import examples  # not at the top: what it needs of chats and pairs, text does not
        examples.run(config)


if __name__ == "__main__":
    main(configure(globals()))
