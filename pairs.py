"""Preferences, pairs of answers or single ones with a thumb up or down, to files on disk, and those to batches.

    python data.py --kind=pairs --sources=hh.jsonl.gz,ultrafeedback.jsonl --out_dir=data/pairs --show=3
    python data.py --kind=pairs --from_model=out/sft --task=sorting,addition --samples=8 --out_dir=data/pairs

Written into out_dir: train.jsonl, val.jsonl and about.json (the options, and for each source what was kept and, by
reason, left out). Rows, in trl's published names, each with its source:

    {"prompt": [messages], "chosen": [message], "rejected": [message]}      also margin, score_chosen, score_rejected,
    {"prompt": [messages], "completion": [message], "label": true}          task, answer

A row is held out by the hash of its prompt's first question, so the same question never stands on both sides; what is
sampled from a model, by its task's own rule: its dev questions are held out.

In batches, a prompt's ids end with the opening of the assistant's turn, an answer's with <|im_end|>. What does not fit
the context is cut: first the prompt, from the left, to what the answers leave of the context but not below a quarter of
it; then the answers, from the right, without their <|im_end|>. Rows without an answer, and pairs whose answers are
equal, are left out and counted.

Letters: P pairs, A answers.
"""
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter

import numpy as np

from chats import CHUNK, COLOUR, CONTROL, PLAIN, encode_chats, mixed
from formats import parse_chats
from preferences import KEEP, PairSource
from sources import content_key, json_rows, prepared

RED = "\x1b[31m"
ROLES = ("system", "user", "assistant")
WRITE = "python data.py --kind=pairs"


# --------------------------------------------------------------------------------------------------------------------
# rows to files


def filtered(stream, notes, seen, counts, min_margin, min_agreement, max_length_ratio, duplicates, unpair):
    """Yields those of (row, key, side) that pass, as thumbs if `unpair`; the others are counted in `notes` by reason.
    `seen` holds hashes of what all sources gave, `counts` how many rows had a margin and an agreement."""
    for row, key, side in stream:
        names = ("chosen", "rejected") if "chosen" in row else ("completion",)
        answers = [row[name][0]["content"].strip() for name in names]
        margin, agreement = row.get("margin"), row.pop("agreement", None)
        counts.update(margin=margin is not None, agreement=agreement is not None)
        sizes = sorted(map(len, answers))
        if len(answers) == 2 and answers[0] == answers[1]:
            notes["equal answers"] += 1
        elif margin is not None and margin < min_margin:
            notes[f"margin below {min_margin:g}"] += 1
        elif agreement is not None and agreement < min_agreement:
            notes[f"agreement below {min_agreement:g}"] += 1
        elif max_length_ratio and sizes[-1] > max_length_ratio * sizes[0]:
            notes[f"one answer over {max_length_ratio:g} times as long as the other"] += 1
        else:
            made = [row]
            if unpair and len(names) == 2:
                rest = {column: row[column] for column in ("task", "answer") if column in row}
                made = [dict(prompt=row["prompt"], completion=row[name], label=name == "chosen", **rest)
                        for name in names]
            for new in made:
                texts = sorted(new[name][0]["content"] for name in ("chosen", "rejected", "completion") if name in new)
                known = content_key(json.dumps([new["prompt"], texts]).encode())
                if duplicates == "drop" and known in seen:
                    notes["duplicates"] += 1
                    continue
                seen.add(known)
                yield new, key, side


def prepare(out_dir, sources="", val_fraction=0.05, invalid_utf8="error", overwrite=False, max_examples=0,
            unusable="drop", malformed="error", seed=1337, show=0, keep="one", min_margin=0.0, min_agreement=0.0,
            max_length_ratio=0.0, duplicates="drop", unpair=False, from_model="", **sampling):
    """Writes train.jsonl, val.jsonl and about.json into out_dir, prints what they hold, and `show` of the rows. Data
    that was prepared with the same options is only shown. `sampling`: the options of sampled.SampledSource.

    All is written below out_dir/.unfinished and renamed at the end, train.jsonl last; whatever goes wrong before that,
    out_dir is left as it was. ValueError of one sentence on bad input.
    """
    options = {**{name: value for name, value in locals().items()
                  if name not in ("overwrite", "show", "out_dir", "sampling")}, **sampling}
    started = time.perf_counter()
    if os.path.exists(os.path.join(out_dir, "train.jsonl")) and not overwrite:
        if show and about(out_dir).get("options") == options:
            return print_rows(out_dir, show)
        raise ValueError(f"{out_dir} already holds data; pass --overwrite=true to replace it, or another --out_dir")
    if os.path.exists(os.path.join(out_dir, "train.h5")):
        raise ValueError(f"{out_dir} holds data of another kind (train.h5); choose another --out_dir")
    for name, value, known in (("invalid_utf8", invalid_utf8, ("error", "replace")), ("keep", keep, KEEP),
                               ("duplicates", duplicates, ("drop", "keep")), ("unusable", unusable, ("drop", "error")),
                               ("malformed", malformed, ("error", "drop"))):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it must be {' or '.join(known)}")
    if not 0 < val_fraction < 1 or max_examples < 0 or show < 0:
        raise ValueError("val_fraction must lie between 0 and 1, max_examples and show must be 0 or more, got "
                         f"{val_fraction}, {max_examples} and {show}")
    if max_length_ratio and max_length_ratio < 1 or not 0 <= min_agreement <= 1 or not math.isfinite(min_margin):
        raise ValueError("max_length_ratio must be 0 (off) or at least 1, min_agreement a share and min_margin a "
                         f"number, got {max_length_ratio}, {min_agreement} and {min_margin}")
    if from_model:
        from sampled import sampled_sources  # not at the top: it loads torch, which rows of files do not need
        corpus = sampled_sources(from_model, sources, keep, seed, val_fraction, **sampling)
    else:
        corpus = parse_chats(sources, PairSource, invalid_utf8=invalid_utf8, unusable=unusable, malformed=malformed,
                             keep=keep)

    shorter = [re.sub(r"(\.jsonl|\.json|\.parquet)?(\.gz)?$", "", os.path.basename(source.name)) for source in corpus]
    named = shorter if len({*shorter}) == len(shorter) else [source.name for source in corpus]

    notes, counts, seen = [Counter() for _ in corpus], Counter(), set()
    with prepared(out_dir, last="train.jsonl") as unfinished:
        streams = [filtered(source.pairs(note), note, seen, counts, min_margin, min_agreement, max_length_ratio,
                            duplicates, unpair) for source, note in zip(corpus, notes)]
        keys, sides, of, first = [], [], [], None
        with tempfile.TemporaryFile("w+", dir=unfinished, encoding="utf-8") as raw:
            for index, (row, key, side) in mixed(streams, [source.weight for source in corpus], max_examples):
                kind = "thumbs" if "label" in row else "pairs"
                first = first or (kind, corpus[index].name)
                if kind != first[0]:
                    raise ValueError(f"{corpus[index].name} holds {kind} and {first[1]} holds {first[0]}, which no one "
                                     "stage trains on together; prepare two folders, or make two thumbs of each pair "
                                     "with --unpair=true")
                raw.write(json.dumps({**row, "source": named[index]}) + "\n")
                keys.append(key), sides.append(side), of.append(index)
            left_out = ", ".join(f"{count:,} {reason}" for reason, count in sum(notes, Counter()).items() if count)
            if not keys:
                raise ValueError(f"no row of {from_model or sources} can be used"
                                 + (f": {left_out}" if left_out else "; there is none")
                                 + ("; train it longer, or raise --questions or --samples" if from_model else ""))
            for name, least in (("margin", min_margin), ("agreement", min_agreement)):
                if least > 0 and not counts[name]:
                    raise ValueError(f"min_{name}={least:g} has nothing to look at: there is no {name} in any row")

            # which rows are held out
            held = [side == "val" or side is None and key < val_fraction * 2 ** 64 for key, side in zip(keys, sides)]
            if not any(held):
                held = [key == min(keys) for key in keys]
            if all(held):
                raise ValueError(f"all {len(held):,} rows of {from_model or sources} are held out and none is left to "
                                 "train on; add some or lower --val_fraction")
            raw.seek(0)
            with contextlib.ExitStack() as stack:
                files = [stack.enter_context(open(os.path.join(unfinished, f"{split}.jsonl"), "w", encoding="utf-8"))
                         for split in ("train", "val")]
                for line, is_held in zip(raw, held):
                    files[is_held].write(line)
                for file in files:
                    file.flush()
                    os.fsync(file.fileno())
        said = {source: dict(train=sum(i == index and not h for i, h in zip(of, held)),
                             val=sum(i == index and h for i, h in zip(of, held)),
                             dropped={reason: count for reason, count in note.items() if count},
                             **({"measured": corpus[index].measured} if from_model else {}))
                for index, (source, note) in enumerate(zip(named, notes))}
        with open(os.path.join(unfinished, "about.json"), "w", encoding="utf-8") as file:
            json.dump(dict(kind=first[0], options=options, sources=said), file, indent=2)

    # what came of it
    kind = first[0]
    for name, what in said.items():
        dropped = "".join(f"; {count:,} {reason}, dropped" for reason, count in what["dropped"].items())
        measured = "".join(f", {name} {value:,.4g}" for name, value in what.get("measured", {}).items())
        print(f"{name}: {what['train'] + what['val']:,} {kind}{measured}{dropped}")
    print(f"{len(held) - sum(held):,} {kind} to train on, {sum(held):,} held out, in "
          f"{time.perf_counter() - started:.1f} s, written into {out_dir}")
    if show:
        print_rows(out_dir, show)


def about(folder):
    """What about.json of a folder says; {} if it is missing or damaged."""
    try:
        with open(os.path.join(folder, "about.json"), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def print_rows(folder, count):
    """Prints rows spread over the training side: the prompt, and the answers with + for the better, - for the worse."""
    with open(os.path.join(folder, "train.jsonl"), encoding="utf-8") as file:
        lines = file.readlines()
    colours = (COLOUR, RED, PLAIN) if sys.stdout.isatty() else ("", "", "")
    for i in sorted({round(k * (len(lines) - 1) / max(1, count - 1)) for k in range(count)}):
        row = json.loads(lines[i])
        margin = f", margin {row['margin']:g}" if "margin" in row else ""
        print(f"\n--- row {i:,} of {row['source']}{margin}")
        for message in row["prompt"]:
            print(CONTROL.sub("\ufffd", f"{message['role']}: {message['content']}"))
        for name, good in (("chosen", True), ("rejected", False), ("completion", row.get("label"))):
            if name in row:
                text = CONTROL.sub("\ufffd", row[name][0]["content"])
                print(f"{colours[0] if good else colours[1]}{'+' if good else '-'} {text}{colours[2]}")


# --------------------------------------------------------------------------------------------------------------------
# files to batches


def read(folder, split, answers):
    """(path, rows) of folder/split.jsonl, whose `answers` are its columns of answers; ValueError on any other row."""
    path = os.path.join(folder, f"{split}.jsonl")
    if not os.path.exists(path):
        raise ValueError(f"there is no {path}; write it with {WRITE} --out_dir={folder}")
    try:
        rows = [row for row, _, _ in json_rows(path, "error", Counter())]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None
    for number, row in enumerate(rows, 1):
        if wrong := fault(row, answers):
            raise ValueError(f"row {number:,} of {path} {wrong}; {WRITE} --sources=FILE brings files into this form")
    return path, rows


def fault(row, answers):
    """What is wrong with a row, or None."""
    if not isinstance(row, dict):
        return f"is {row!r:.40}, not an object with prompt, {', '.join(answers)}"
    kinds = {"chosen": "a pair (prompt, chosen, rejected)", "completion": "a thumb (prompt, completion, label)"}
    if answers[0] not in row and (other := next((name for name in kinds if name in row), None)):
        return f"is {kinds[other]}, but {kinds[answers[0]]} is wanted"
    for name in ("prompt", *answers):
        messages = row.get(name)
        if not isinstance(messages, list) or not messages or not all(
                isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
                for message in messages):
            return f"has {name}={messages!r:.60}, not a list of messages with a role and a content"
        if name == "prompt" and messages[-1]["role"] == "assistant":
            return "has a prompt that ends with the assistant's turn, which is the answers'"
        if name != "prompt" and [message["role"] for message in messages] != ["assistant"]:
            return f"has {', '.join(message['role'] for message in messages)} in {name}, not one assistant's turn"
    if "completion" in answers and not isinstance(row.get("label"), bool):
        return f"has label={row.get('label')!r:.40}, not true or false"
    margin = row.get("margin") or 0
    if not isinstance(margin, (int, float)) or not math.isfinite(margin):
        return f"has margin={margin!r:.40}, not a number"


def encode(rows, answers, tokenizer, context):
    """Yields (row, prompt ids, [answer ids], what was cut) of rows that `read` returns, the ids None where an answer is
    empty. ValueError if the context has no room for an answer."""
    opening = 1 + len(tokenizer.encode("assistant\n"))
    if context < opening + 2:
        raise ValueError(f"context={context} has no room for a prompt and an answer; raise it")
    shared = list(range(tokenizer.vocab_size))              # one object for each id: a quarter of the memory
    for first in range(0, len(rows), CHUNK):
        part = rows[first:first + CHUNK]
        encoded = iter(encode_chats(tokenizer, [row["prompt"] + row[name] for row in part for name in answers]))
        for row in part:
            prompt, ids, cut = None, [], set()
            for both, mask in itertools.islice(encoded, len(answers)):
                end = len(mask) - mask[::-1].argmax()       # the last run of ones: the answer and its <|im_end|>
                start = end - mask[:end][::-1].argmin()
                prompt, answer = (list(map(shared.__getitem__, part)) for part in (both[:start], both[start:end]))
                ids.append(answer)
            if not all(row[name][0]["content"].strip() for name in answers):
                yield row, None, None, cut
                continue
            keep = max(context - max(map(len, ids)), opening, min(context // 4, context - 2))
            if len(prompt) > keep:
                prompt = prompt[-keep:]
                cut.add("prompts")
            if max(map(len, ids)) > context - len(prompt):
                ids = [answer[:context - len(prompt)] for answer in ids]
                cut.add("answers")
            yield row, prompt, ids, cut


def fingerprint(*columns):
    """Names the tokens of columns, each a list of lists of ids (or of numbers)."""
    digest = hashlib.sha256()
    for ids in itertools.chain(*columns):
        digest.update(np.array([len(ids), *ids], np.int64).tobytes())
    return digest.hexdigest()[:16]


class Rows:
    """What Pairs and Thumbs share; `columns` are the names of their answers."""

    def __len__(self):
        return len(self.rows)

    def groups(self, indices):
        """[(prompt, answers)] of these rows, to pack; a pair's answers are the chosen one and the rejected one."""
        return [(self.prompts[i], [getattr(self, name)[i] for name in self.columns]) for i in indices]

    def liked(self, indices):
        """(A,) bool: which of the answers of `groups` are chosen, or have a thumb up."""
        return self.labels[list(indices)].flatten()

    def packed(self, indices, device="cpu"):
        """The Packed row of these rows, their answers in the order of `groups`."""
        from packing import pack
        return pack(self.groups(indices), device)

    def mismatched(self, numbers, places, context):
        """Groups for KTO's divergence: the prompts at `places` of numbers, each with the answers of the one before."""
        groups = self.groups(numbers)
        return [(groups[k][0], [answer[:max(1, context - len(groups[k][0]))] for answer in groups[k - 1][1]])
                for k in places]

    def finish(self):
        """The sources of the rows. ValueError if there are no rows."""
        if not self.rows:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
            raise ValueError(f"{self.path} holds nothing to learn from" + (f": {reasons}" if reasons else "")
                             + f"; write it again with {WRITE}")
        self.sources = [str(row.get("source", "")) for row in self.rows]
        self.source_names = list(dict.fromkeys(self.sources))


class Pairs(Rows):
    """A split of pairs in memory: prompts, chosen, rejected (P lists of ids), margins (P,) fp32 (0 where a row has
    none), sources (P names) and source_names, the different ones; rows, as read; dropped and cut, counts by reason.

    ValueError if the file is missing or damaged, holds something else than pairs, or none is left.
    """
    columns = "chosen", "rejected"

    def __init__(self, folder, split, tokenizer, context):
        self.path, rows = read(folder, split, self.columns)
        self.prompts, self.chosen, self.rejected, self.rows = [], [], [], []
        self.dropped, self.cut = Counter(), Counter()
        for row, prompt, ids, cut in encode(rows, self.columns, tokenizer, context):
            if prompt is None or ids[0] == ids[1]:
                reason = "without an answer" if prompt is None else "equal answers"
                self.dropped[reason + " once cut" * ("answers" in cut)] += 1
                continue
            self.cut.update(cut)
            for column, value in zip((self.prompts, self.chosen, self.rejected, self.rows), (prompt, *ids, row)):
                column.append(value)
        self.finish()
        import torch  # not at the top: preparing data starts without it
        self.margins = torch.tensor([float(row.get("margin") or 0) for row in self.rows])
        self.labels = torch.tensor([True, False]).expand(len(self), 2)
        self.fingerprint = fingerprint(self.prompts, self.chosen, self.rejected)


class Thumbs(Rows):
    """A split of single answers: prompts, completions, labels (A,) bool; the rest as in Pairs."""
    columns = "completions",

    def __init__(self, folder, split, tokenizer, context):
        self.path, rows = read(folder, split, ("completion",))
        self.prompts, self.completions, self.rows = [], [], []
        self.dropped, self.cut = Counter(), Counter()
        for row, prompt, ids, cut in encode(rows, ("completion",), tokenizer, context):
            if prompt is None:
                self.dropped["without an answer"] += 1
                continue
            self.cut.update(cut)
            for column, value in zip((self.prompts, self.completions, self.rows), (prompt, *ids, row)):
                column.append(value)
        self.finish()
        import torch  # not at the top: preparing data starts without it
        self.labels = torch.tensor([row["label"] for row in self.rows])
        self.fingerprint = fingerprint(self.prompts, self.completions, [self.labels.int().tolist()])


def holds_thumbs(folder):
    """Whether the folder's first row is a single answer; False where there is no row, which Pairs says better."""
    path = os.path.join(folder, "train.jsonl")
    if not os.path.exists(path):
        return False
    with open(path, encoding="utf-8", errors="replace") as f:
        return '"completion":' in f.readline()


class PairBatches:
    """Batches of pairs, a pure function of (seed, step, micro), the same for any number of ranks.

    An epoch holds every pair once, in an order of its own; a step may reach into the next epoch.
    """
    kind = Pairs

    def __init__(self, folder, split, pairs_per_step, micro_pairs, context, seed, rank=0, world_size=1, tokenizer=None):
        if pairs_per_step < 1 or pairs_per_step % (micro_pairs * world_size):
            raise ValueError(f"pairs_per_step={pairs_per_step} is not a multiple of micro_pairs * ranks = {micro_pairs}"
                             f" * {world_size}")
        self.pairs = self.kind(folder, split, tokenizer, context)
        self.pairs_per_step, self.micro_pairs, self.seed = pairs_per_step, micro_pairs, seed
        self.rank, self.world_size, self.n_pairs, self.orders = rank, world_size, len(self.pairs), {}
        if self.n_pairs < pairs_per_step:
            raise ValueError(f"{self.pairs.path} holds {self.n_pairs:,} pairs, fewer than one step of "
                             f"pairs_per_step={pairs_per_step}; add pairs, or lower it")
        self.steps_per_epoch = self.n_pairs / pairs_per_step

    def numbers(self, step):
        """Numbers of the whole step's pairs, in the order (micro, rank, pair)."""
        position = np.arange(step * self.pairs_per_step, (step + 1) * self.pairs_per_step)
        epochs, position = np.divmod(position, self.n_pairs)
        needed = range(epochs[0], epochs[-1] + 1)
        self.orders = {epoch: self.orders[epoch] if epoch in self.orders else
                       np.random.default_rng((self.seed, epoch)).permutation(self.n_pairs) for epoch in needed}
        return np.concatenate([self.orders[epoch][position[epochs == epoch]] for epoch in needed])

    def __call__(self, step, micro):
        """Numbers of the pairs of one rank's micro-batch."""
        return self.numbers(step).reshape(-1, self.world_size, self.micro_pairs)[micro, self.rank].tolist()

    def epoch(self, step):
        """Epochs done before `step`, with fraction."""
        return step / self.steps_per_epoch


class ThumbBatches(PairBatches):
    """As PairBatches, of single answers: `pairs` counts and holds these."""
    kind = Thumbs

    @property
    def thumbs(self):
        return self.pairs


def fixed_pairs(pairs, micro_pairs, max_pairs=0, rank=0, world_size=1):
    """Yields lists of numbers: the first max_pairs (0: all) of Pairs or Thumbs, each exactly once.

    Ranks take turns and all yield equally many lists, so that they meet as often; one with none left gets empty ones.
    """
    numbers = list(range(len(pairs)))[:max_pairs or None]
    for first in range(0, len(numbers), micro_pairs * world_size):
        yield numbers[first + rank * micro_pairs:first + (rank + 1) * micro_pairs]
