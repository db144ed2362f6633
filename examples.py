"""Chats and preference pairs worth training on: by length, repetition, refusals, near-duplicates and a judge's score.

    kept, counts = clean_rows(rows, dict(similar_by="question", judge="ifd", judge_model="out/sft", keep_fraction=0.5))

Rows are {"messages": [...]}, {"prompt": [...], "chosen": [message], "rejected": [message]} or {"prompt": [...],
"completion": [message], "label": bool}, as formats.py and preferences.py make them of every published format. Filters
look at what a model would learn to say: all replies of a chat, the chosen answer, the completion with a thumb up.

Judges of what the filters leave; those with the highest score stay, a share of keep_fraction:

    ifd       instruction-following difficulty, Li et al. 2023 (arXiv:2308.12032): loss(answer | question) /
              loss(answer) under a model of ours; where it is 1 or more the question does not help, and the row goes
    reward    of the last answer, under our reward model; of pairs the margin, which must be above 0
    endpoint  a rating from 1 to 10 by a model behind an OpenAI-compatible endpoint; of pairs, asked in both orders,
              that it prefers the chosen answer
"""
import contextlib
import itertools
import json
import math
import os
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import dedup
import report
from formats import parse_chats
from pairs import filtered
from preferences import PairSource
from sources import content_key

DEFAULTS = dict(min_answer=1, max_answer=20_000, max_repetition=0.4, refusals="drop", similar_by="conversation",
                similar_threshold=0.8, min_margin=0.0, min_agreement=0.0, max_length_ratio=0.0, judge="none",
                judge_model="", judge_url="", judge_key_env="", judge_parallel=8, judge_device="cpu", keep_fraction=1.0)
KNOWN = {"refusals": ("drop", "keep"), "similar_by": ("conversation", "question", "none"),
         "judge": ("none", "ifd", "reward", "endpoint")}
SHOWN = 5                       # rejected rows that are kept as examples, of each rule
LEAST_NGRAMS = 20               # of an answer whose repetition is measured: short ones repeat by chance
REPEATED_NGRAM = 4              # words
SIMILAR_NGRAM = 3               # words: questions are short
PERMUTATIONS = 128              # of a MinHash signature
FIRST_ASKED = 4                 # requests to an endpoint of which one must be answered before the others are sent
REFUSED_ROWS = 20               # in a row that an endpoint which has answered may refuse; more is a key that ran out
VERDICTS = ".unfinished/verdicts.jsonl"     # of an endpoint, in out_dir until the run is done
REFUSED_WITHIN = 250            # characters at the beginning of an answer

A_MACHINE = r"an?\ (?:[\w-]+\ ){0,3}?(?:ai|artificial\ intelligence|language\ model|llm|chatbot)\b"
UNABLE = (r"(?:can['’]?t|cannot|can\ not|couldn['’]?t|won['’]?t|(?:will|do|am|could|would)\ not|don['’]?t|['’]m\ not|"
          r"(?:am|['’]m)\ unable|must\ decline)\b")
REFUSAL = re.compile(rf"""
      \bas\ {A_MACHINE}[^.!?\n]{{0,80}}?\bI\ ?{UNABLE}                          # As an AI language model, I cannot
    | \bI(?:\ am|['’]m)\ (?:just\ |only\ |sorry,?\ but\ )?{A_MACHINE}[^.!?\n]{{0,60}}?{UNABLE}
    | \b(?:sorry|apologi[sz]e|afraid|unfortunately)\b[^.!?\n]{{0,40}}?\bI\ ?(?:can['’]?t|cannot|can\ not|won['’]?t|
      (?:am|['’]m)\ (?:unable|not\ (?:able|allowed|permitted|going)))\b         # I'm sorry, but I can't help
    | \A\W*I\ ?(?:can['’]?t|cannot|can\ not|won['’]?t|(?:am|['’]m)\ (?:unable|not\ (?:able|allowed|permitted))\ to)\ (?:
      \w+\ )?(?:help|assist|provide|answer|fulfil|comply|engage|support|generate|create|write|discuss)
    """, re.I | re.X)


# --- what stands in a row ---

def learnt(row):
    """The answers that a model learns to give."""
    if "messages" in row:
        return [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    if "chosen" in row:
        return [row["chosen"][0]["content"]]
    return [row["completion"][0]["content"]] if row["label"] else []


def all_texts(row):
    """(question, whole row) as texts."""
    before = row["messages"][:-1] if "messages" in row else row["prompt"]
    answers = [row["messages"][-1]] if "messages" in row else [
        row[name][0] for name in ("chosen", "rejected", "completion") if name in row]
    question = "\n".join(message["content"] for message in before)
    return question, "\n".join([question, *(message["content"] for message in answers)])


# --- filters: why a row goes, or None ---

def repetition(texts):
    """(N,) shares of a text's n-grams of words that stand earlier in it; 0 for short texts."""
    hashes, ends = dedup.ngram_hashes(texts, REPEATED_NGRAM)
    return np.array([1 - len(np.unique(hashes[begin:end])) / (end - begin) if end - begin >= LEAST_NGRAMS else 0.0
                     for begin, end in zip(ends, ends[1:])])


def is_refusal(answer):
    """Whether an answer begins by declining: phrases of English assistants alone."""
    return REFUSAL.search(answer[:REFUSED_WITHIN]) is not None


def answer_reasons(rows, o):
    """[reason or None] of what the answers of each row look like."""
    answers = [learnt(row) for row in rows]
    shares = iter(repetition([text for of_row in answers for text in of_row]).tolist())
    reasons = []
    for of_row in answers:
        most = max(itertools.islice(shares, len(of_row)), default=0.0)
        sizes = [len(text.strip()) for text in of_row]
        reasons.append(
            f"answer shorter than {o['min_answer']:,} characters" if of_row and min(sizes) < o["min_answer"] else
            f"answer longer than {o['max_answer']:,} characters" if o["max_answer"] and of_row
            and max(sizes) > o["max_answer"] else
            f"answer repeats itself (above {o['max_repetition']:g})" if 0 < o["max_repetition"] < most else
            "refusal" if o["refusals"] == "drop" and any(map(is_refusal, of_row)) else None)
    return reasons


def pair_reasons(rows, o):
    """[reason or None] of preferences, as data.py --kind=pairs has them: equal answers, margin, agreement, lengths,
    exact duplicates. ValueError if a threshold was given and no row has what it is of."""
    reasons, seen, counts = [], set(), Counter()
    for row in rows:
        notes = Counter()
        passed = list(filtered([(dict(row), None, None)], notes, seen, counts, o["min_margin"], o["min_agreement"],
                               o["max_length_ratio"], "drop", False))
        reasons.append(None if passed else next(iter(notes)))
    for name in ("margin", "agreement"):
        if o[f"min_{name}"] and rows and not counts[name]:
            raise ValueError(f"min_{name}={o[f'min_{name}']:g}, and none of {len(rows):,} rows has a column {name}, or "
                             "scores to take it from; leave the option out")
    return reasons


def similar(texts, threshold, scores):
    """(N,) bool: texts to keep, of near-duplicates the one with the highest score, of equal ones the first."""
    signed = dedup.signatures(texts, SIMILAR_NGRAM, PERMUTATIONS)
    labels = dedup.near_duplicates(signed, *dedup.bands_for(threshold, PERMUTATIONS), threshold,
                                   dedup.exact_jaccard(texts.__getitem__, SIMILAR_NGRAM))
    return dedup.survivors(labels, scores)


# --- judges ---

def difficulty(model, tokenizer, chats):
    """(N,) loss(answer | what stands before) / loss(answer), of the last answer of each chat; mean nats a token.

    loss(answer) is after the opening of an assistant's turn alone. Of an answer longer than half the model's context
    the beginning counts; what stands before loses its left end to fit.
    """
    import likelihood
    opening = len(tokenizer.encode_chat([{"role": "user", "content": ""}], open_answer=True)[0]) - len(
        tokenizer.encode_chat([{"role": "user", "content": ""}])[0])
    trees, sizes = [], []
    for chat in chats:
        ids, mask = tokenizer.encode_chat(chat)
        end = len(mask) - mask[::-1].index(1)                   # after <|im_end|>
        begin = end - mask[:end][::-1].index(0)                 # of the answer
        answer = ids[begin:end][:max(1, model.config.context // 2)]
        room = model.config.context + 1 - len(answer)
        trees += [(ids[max(0, begin - room):begin], [answer]), (ids[begin - opening:begin][-room:], [answer])]
        sizes.append(len(answer))
    pace, done = report.Pace(), [0]

    def progress(finished):
        done[0] += finished
        pace(f"judge: {done[0]:,} of {len(trees):,} losses", done[0] / len(trees))

    nats = likelihood.score(model, trees, progress=progress)
    nats = -np.array([branches[0][0] for branches in nats]).reshape(-1, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return nats[:, 0] / nats[:, 1]


class Remembered:
    """An endpoint's `ask` whose verdicts are written into the file `path` as they come, so that the next start asks for
    the others alone. who: what the judge is called; with what it is asked, this is a verdict's key. before: {key:
    verdict or None} of earlier starts, verdicts: of all that is not to be asked again.

    None for a row that is refused after others were answered; judge.Refused before that, and after REFUSED_ROWS.
    """

    def __init__(self, ask, path, *who):
        self.ask, self.path, self.who, self.failures, self.lock = ask, path, who, ask.failures, threading.Lock()
        self.before, self.asked = {}, 0
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                self.before = dict(json.loads(line) for line in file.read().split("\n") if line.endswith("]"))
        self.verdicts = {key: verdict for key, verdict in self.before.items() if verdict is not None}
        self.patience = REFUSED_ROWS if self.verdicts else 0

    def key(self, job):
        return f"{content_key(json.dumps([*self.who, *job]).encode()):016x}"

    def __call__(self, *job):
        from judge import Refused
        key = self.key(job)
        if key in self.verdicts:
            return self.verdicts[key]
        verdict = None
        try:
            verdict = self.ask(*job)
        except Refused as error:
            self.failures.append(str(error))
            self.patience -= key not in self.before
            if self.patience < 0:
                raise
        with self.lock:
            self.verdicts[key], self.asked = verdict, self.asked + 1
            if verdict is not None:
                self.patience = REFUSED_ROWS
            if self.patience:                                       # before any answer nothing is worth keeping
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write("\n" + json.dumps([key, verdict]))  # the line before may be cut off by a kill
        return verdict


def judged(rows, o, verdicts=os.devnull):
    """(name of the score, (N,) scores, nan where the judge gave none) of rows. verdicts: file that an endpoint's are
    kept in."""
    from judge import endpoint, load_reward, rater
    name, are_pairs = o["judge"], "chosen" in rows[0]
    if not are_pairs and "messages" not in rows[0]:
        raise ValueError("a judge scores chats and pairs of answers; rows with a label are none")
    if name == "ifd":
        if are_pairs:
            raise ValueError("judge=ifd is of chats; of pairs take reward or endpoint")
        from common import pick_device
        from model import GPT
        from tokenizer import Tokenizer
        model = GPT.load(o["judge_model"]).to(pick_device(o["judge_device"])).eval()
        return "ifd", difficulty(model, Tokenizer.load(o["judge_model"]), [row["messages"] for row in rows])
    if name == "reward":
        from common import pick_device
        score = load_reward(o["judge_model"], pick_device(o["judge_device"]))
        if not are_pairs:
            return "reward", told(score, score([row["messages"] for row in rows]).double().numpy())
        chosen, rejected = (score([row["prompt"] + row[name] for row in rows]).double().numpy()
                            for name in ("chosen", "rejected"))
        return "judge_margin", told(score, chosen - rejected)
    how = dict(key_env=o["judge_key_env"])
    if not are_pairs:
        ask = rater(o["judge_url"], o["judge_model"], **how)
        jobs = [(row["messages"],) for row in rows]
    else:
        ask = endpoint(o["judge_url"], o["judge_model"], **how)
        jobs = [job for row in rows for answers in [[row[name][0]["content"] for name in ("chosen", "rejected")]]
                for job in ((row["prompt"], *answers), (row["prompt"], *answers[::-1]))]
    ask = Remembered(ask, verdicts, o["judge_url"], o["judge_model"])
    new = [job for job in jobs if ask.key(job) not in ask.before][:max(FIRST_ASKED, o["judge_parallel"])]
    missing, verdicts, pace = sum(ask.key(job) not in ask.verdicts for job in jobs), [], report.Pace()
    with ThreadPoolExecutor(o["judge_parallel"]) as pool:
        try:
            if new and not any(list(pool.map(lambda job: ask(*job), new))):     # one that is down, not after hours
                told(ask, np.full(-(-len(new) // (1 + are_pairs)), math.nan))
            for verdict in pool.map(lambda job: ask(*job), jobs):
                verdicts.append(verdict)
                pace(f"judge: {ask.asked:,} of {missing:,} requests", ask.asked / max(1, missing))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if not are_pairs:
        return "rating", told(ask, np.array([math.nan if rating is None else rating for rating in verdicts]))
    value = {("1", "2"): 1.0, ("2", "1"): -1.0}                 # both orders name the same answer; otherwise a tie
    return "judge_margin", told(ask, np.array([math.nan if None in pair else value.get(pair, 0.0)
                                               for pair in zip(verdicts[::2], verdicts[1::2])]))


def told(ask, scores):
    """The scores. ValueError, with the judge's reasons, if it gave none at all."""
    if not np.isfinite(scores).any():
        reasons = ", ".join(f"{reason}: {n} times" for reason, n in Counter(ask.failures).most_common(3))
        raise ValueError(f"the judge gave no score to any of {len(scores):,} rows ({reasons or 'no reason given'})")
    return scores


# --- all of it ---

def checked(options):
    """All options, with defaults. ValueError where a value is none of the known ones or out of range."""
    o = DEFAULTS | {name: options[name] for name in DEFAULTS if name in options}
    for name, known in KNOWN.items():
        if o[name] not in known:
            raise ValueError(f"{name} is {o[name]!r}; it must be {', '.join(known[:-1])} or {known[-1]}")
    if min(o["min_answer"], o["max_answer"]) < 0 or o["judge_parallel"] < 1:
        raise ValueError(f"min_answer and max_answer must be 0 or more and judge_parallel 1 or more, got "
                         f"{o['min_answer']}, {o['max_answer']} and {o['judge_parallel']}")
    for name, least in (("max_repetition", 0), ("min_agreement", 0), ("similar_threshold", 0.1), ("keep_fraction", 0)):
        if not least <= o[name] <= 1 or name == "keep_fraction" and not o[name]:
            raise ValueError(f"{name} is a share from {least} to 1, got {o[name]}")
    if o["max_length_ratio"] and o["max_length_ratio"] < 1 or not math.isfinite(o["min_margin"]):
        raise ValueError("max_length_ratio must be 0 (off) or at least 1 and min_margin a number, got "
                         f"{o['max_length_ratio']} and {o['min_margin']}")
    if o["judge"] == "none" and o["keep_fraction"] < 1:
        raise ValueError(f"keep_fraction={o['keep_fraction']:g} needs a judge: --judge=ifd, reward or endpoint")
    if o["judge"] != "none" and not o["judge_model"]:
        raise ValueError(f"judge={o['judge']} needs --judge_model, " + ("the name that the endpoint knows its model by"
                         if o["judge"] == "endpoint" else "a model directory"))
    if (o["judge"] == "endpoint") != bool(o["judge_url"]):
        raise ValueError("--judge=endpoint and --judge_url=http://... go together")
    return o


def reasons_of(rows, options, verdicts=os.devnull):
    """([reason or None] of each row, name of the judge's score or None, its (N,) values, nan where there is none).
    verdicts as of judged."""
    o = checked(options)
    are_chats = "messages" in rows[0] if rows else True
    reasons = answer_reasons(rows, o)
    left = [i for i, reason in enumerate(reasons) if reason is None]
    if not are_chats:
        for i, reason in zip(left, pair_reasons([rows[i] for i in left], o)):
            reasons[i] = reason
        left = [i for i in left if reasons[i] is None]
    if o["similar_by"] != "none" and left:
        texts = [all_texts(rows[i])[o["similar_by"] == "conversation"] for i in left]
        kept = similar(texts, o["similar_threshold"], [rows[i].get("margin") or 0.0 for i in left])
        for i in itertools.compress(left, ~kept):
            reasons[i] = f"near-duplicate by {o['similar_by']}"
        left = list(itertools.compress(left, kept))
    if o["judge"] == "none" or not left:
        return reasons, None, None
    name, found = judged([rows[i] for i in left], o, verdicts)
    scores = np.full(len(rows), math.nan)
    scores[left] = found
    for i in left:
        reasons[i] = ("judge: no score" if not math.isfinite(scores[i]) else
                      "judge: IFD of 1 or more" if name == "ifd" and scores[i] >= 1 else
                      "judge: does not prefer the chosen answer" if name == "judge_margin" and scores[i] <= 0 else None)
    left = sorted((i for i in left if reasons[i] is None), key=lambda i: -scores[i])        # stable: ties in order
    for i in left[math.ceil(o["keep_fraction"] * len(left)):]:
        reasons[i] = f"judge: not among the best {o['keep_fraction']:.0%}"
    return reasons, name, scores


def clean_rows(rows, options):
    """(the rows that stay, with the judge's score as a column, {reason: rows that went}). Options are those of
    DEFAULTS; others are not looked at."""
    reasons, name, scores = reasons_of(rows, options)
    kept = [row | ({name: round(float(scores[i]), 6)} if name else {})
            for i, (row, reason) in enumerate(zip(rows, reasons)) if reason is None]
    return kept, Counter(reason for reason in reasons if reason)


def read_rows(kind, sources):
    """[(source's name, [rows], {reason: rows of no use})] of chats or pairs."""
    corpus = parse_chats(sources, PairSource if kind == "pairs" else None, invalid_utf8="replace", malformed="drop",
                          damaged="drop")
    found = []
    for source in corpus:
        if source.weight is not None:
            raise ValueError(f"source {source.name} has a weight; weights are for python data.py, after cleaning")
        if kind == "chats" and source.task:
            raise ValueError(f"{source.name} makes up its questions, which need no cleaning; name files of rows")
        rows, notes = [], Counter()
        if kind == "pairs":
            rows = [row for row, _, _ in source.pairs(notes)]
        else:
            for messages, _, side, _ in source.chats(notes):
                if side == "val":                   # as rows of messages nobody could tell it from a training question
                    notes["development question of gsm8k"] += 1
                else:
                    rows.append({"messages": messages})
        kinds = {"label" in row for row in rows} | {"label" in of[0] for _, of, _ in found if of}
        if len(kinds) > 1:
            raise ValueError(f"{source.name} and the sources before it hold both pairs and thumbs; clean them apart")
        found.append((source.name, rows, notes))
    return found


def run(config):
    """Cleans the rows of config["sources"] into out_dir: rows.jsonl, report.json, report.html; prints what came of it.

    ValueError of one sentence on bad input and where nothing is left; out_dir is then as it was, but for an endpoint's
    verdicts, which the next run uses.
    """
    from common import write_atomic
    started, out_dir, kind = time.perf_counter(), config["out_dir"], config["kind"]
    if os.path.exists(os.path.join(out_dir, "report.json")) and not config["overwrite"]:
        raise ValueError(f"{out_dir} already holds cleaned data; pass --overwrite=true to replace it, or another "
                         "--out_dir")
    o = checked(config)
    found = read_rows(kind, config["sources"])
    rows = [row for _, of_source, _ in found for row in of_source]
    if not rows:
        notes = sum((notes for _, _, notes in found), Counter())
        raise ValueError(f"no {kind} could be read from {config['sources']}: " + (", ".join(
            f"{reason} {n:,} times" for reason, n in notes.most_common(3)) or "it holds no row"))
    verdicts = os.path.join(out_dir, VERDICTS)
    reasons, name, scores = reasons_of(rows, o, verdicts)
    if all(reasons):
        reason, n = Counter(reasons).most_common(1)[0]
        raise ValueError(f"every one of {len(rows):,} {kind} was rejected, {n:,} by the rule {reason!r}; loosen it or "
                         "leave it out; nothing was written")

    facts, shown, lines, at = {"sources": {}, "examples": []}, Counter(), [], 0
    for source, of_source, notes in found:
        mended = {reason: notes.pop(reason) for reason in list(notes) if "replaced" in reason}
        own = facts["sources"][source] = {"documents_in": len(of_source), "bytes_in": 0, "documents_out": 0,
                                          "bytes_out": 0, "rejected": {}, "unreadable": dict(notes), "mended": mended}
        for number, row in enumerate(of_source, 1):
            text, reason = all_texts(row)[1], reasons[at]
            size = len(text.encode("utf-8", "surrogatepass"))
            own["bytes_in"] += size
            if reason is None:
                own["documents_out"], own["bytes_out"] = own["documents_out"] + 1, own["bytes_out"] + size
                score = {name: round(float(scores[at]), 6)} if name else {}
                lines.append(json.dumps({**row, **score, "source": source}) + "\n")
            else:
                before = own["rejected"].get(reason, (0, 0))
                own["rejected"][reason] = [before[0] + 1, before[1] + size]
                shown[reason] += 1
                if shown[reason] <= SHOWN:
                    facts["examples"].append({"rule": reason, "source": source, "id": f"{source}:{number}",
                                              "text": text})
            at += 1
    facts |= {"histograms": histograms(rows, reasons, name, scores), "seconds": round(time.perf_counter() - started, 1),
              "options": {key: config[key] for key in ("kind", "sources")} | o}
    path = os.path.join(out_dir, "rows.jsonl")
    write_atomic(path, "".join(lines).encode())
    report.write(out_dir, facts)
    if os.path.exists(verdicts):
        os.remove(verdicts)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(verdicts))                 # only if it is empty
    encoder = "--tokenizer=MODEL " if kind == "chats" else ""
    print(report.printable(f"{report.rejected(facts, config['show_rejected'])}{report.summary(facts)}\n"
                           f"next: python data.py --kind={kind} --sources={path} {encoder}--out_dir={out_dir}/{kind}"))


def histograms(rows, reasons, name, scores):
    """Of the characters of answers, and of the judge's score."""
    kept = np.array([reason is None for reason in reasons])
    values = {"characters of the longest answer": (np.array([max(map(len, learnt(row)), default=0) for row in rows]),
                                                   report.LENGTH_EDGES)}
    if name and np.isfinite(scores).any():
        low, high = np.nanmin(scores), np.nanmax(scores)
        values[name] = scores, np.linspace(low, high if high > low else low + 1, 21).round(6).tolist()
    return {what: {"edges": edges, "in": report.histogram(x, edges), "out": report.histogram(x[kept], edges)}
            for what, (x, edges) in values.items()}
