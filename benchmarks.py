"""Files to items: multiple choice with lm-evaluation-harness's templates, HumanEval, IFEval, and plain text.

    choices, files = load_choices("hellaswag", "data/eval", shots=0)        # [Choice], and the files they came from
    rows, files = load_generated("humaneval", "data/eval")                  # [dict] of the published columns

A file is found by its name in a folder, named outright, or fetched from the hub ("hub"). Read are .jsonl, .json (both
also .gz), .parquet and, for MMLU, the original .csv.
"""
import csv
import dataclasses
import gzip
import hashlib
import json
import os
import random
import re
import tempfile
import zlib
from collections import Counter

import numpy as np

import sandbox
import tasks
from sources import extension, mix, parse_sources
from texts import open_tokens

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
LETTERS = "ABCDEFGHIJ"


@dataclasses.dataclass
class Choice:
    context: str
    continuations: list         # the answers as they follow the context, the space between included
    gold: int                   # the number of the right one
    group: str                  # questions of one group share a prompt or a source: their errors go together
    lengths: list               # characters of each answer, by which acc_norm divides


# --- files ---

# the hub's dataset, its configuration, the splits to evaluate on (the first that has a file), few-shot examples from
HUB = {"hellaswag": ("Rowan/hellaswag", None, ("validation",), ("train",)),
       "arc_easy": ("allenai/ai2_arc", "ARC-Easy", ("test", "validation"), ("train",)),
       "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", ("test", "validation"), ("train",)),
       "piqa": ("baber/piqa", None, ("validation",), ("train",)),
       "mmlu": ("cais/mmlu", "all", ("test", "val"), ("dev",)),
       "gsm8k": ("openai/gsm8k", "main", ("test",), ("train",)),
       "svamp": ("ChilleD/SVAMP", None, ("test", ""), ("train",)),
       "humaneval": ("openai/openai_humaneval", None, ("test", ""), ()),
       "ifeval": ("google/IFEval", None, ("train", ""), ())}
WORDS = {"test": ("test",), "train": ("train",), "dev": ("dev",), "val": ("validation", "valid", "val"),
         "validation": ("validation", "valid", "val", "dev")}       # which of these words a split's file names have


def find(task, where, splits):
    """The files of a task's first split that has any: `where` itself if it is a file, else those below the folder with
    the task's name in their path and the split's in their file name ("": any). ValueError if there are none."""
    if os.path.isfile(where):
        return [where]
    if not os.path.isdir(where):
        raise ValueError(f"there is no file or folder {where!r} for task {task}; give --eval_data=FOLDER, "
                         f"--tasks={task}=FILE, or --eval_data=hub to fetch it")
    plain, found = lambda text: re.sub(r"[^a-z0-9/.]", "", text.lower()), []
    for folder, folders, names in os.walk(where):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(folder, name) for name in sorted(names) if extension(name) in SUFFIXES]
    outer = os.path.basename(os.path.abspath(where))
    ours = [path for path in found if plain(task) in plain(os.path.join(outer, os.path.relpath(path, where)))]
    for split in splits:
        words = WORDS.get(split, ("",))
        parts = {path: set(re.split(r"[^a-z]+", os.path.basename(path).lower())) for path in ours}
        hits = [path for path in ours if not split or parts[path] & set(words)]
        if hits:
            return hits
    wanted = " or ".join(split for split in splits if split) or "any"
    raise ValueError(f"task {task} has no data in {where}: looked for a file of type {' '.join(SUFFIXES)} (also .gz) "
                     f"with {plain(task)!r} in its path and its split, {wanted}, in its name; put it there, name it "
                     f"with --tasks={task}=FILE, or fetch it with --eval_data=hub")


def read_rows(path):
    """The rows of a file as dictionaries. ValueError if it is damaged, or its rows are no objects."""
    kind = extension(path)
    if kind not in SUFFIXES:
        raise ValueError(f"{path} is of no type that can be read; those are {' '.join(SUFFIXES)}, also with .gz")
    try:
        if kind == ".parquet":
            import pyarrow
            import pyarrow.parquet
            try:
                rows = pyarrow.parquet.read_table(path).to_pylist()
            except pyarrow.ArrowException as error:
                raise ValueError(f"{path} is damaged or not parquet ({str(error).splitlines()[0]})") from None
        elif kind == ".csv":                        # MMLU's own files: no header, a subject each
            opened = gzip.open if path.lower().endswith(".gz") else open
            with opened(path, "rt", encoding="utf-8", newline="") as file:
                subject = re.sub(r"_(dev|val|test|train)$", "", os.path.basename(path).partition(".")[0])
                rows = [dict(question=row[0], choices=row[1:-1], answer=row[-1], subject=subject)
                        for row in csv.reader(file) if row]
        else:
            return tasks.read_rows(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is cut off or damaged ({error}); fetch it again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def load_rows(task, where, splits=None):
    """(rows of the task's published file, {file: fingerprint}); where is a folder, a file, or "hub"."""
    name, config, usual, _ = HUB[task]
    splits = splits or usual
    if where == "hub":
        try:
            import datasets
            split = next(split for split in splits if split)
            rows = list(datasets.load_dataset(name, config, split=split))
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ValueError(f"hub dataset {name} cannot be read ({type(error).__name__}: {reason:.200}); check the "
                             "network, or give local files with --eval_data=FOLDER") from None
        return rows, {f"hub:{name}:{split}": fingerprint(repr(rows).encode())}
    paths = find(task, where, splits)
    rows = []
    for path in paths:
        rows += read_rows(path)
    return rows, {os.path.basename(path): file_fingerprint(path) for path in paths}


def fingerprint(content):
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def file_fingerprint(path):
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def parsed(task, rows, files, parse):
    """[parse(row)]; ValueError that names the first row which is not of the task's shape, and what it holds."""
    items = []
    for number, row in enumerate(rows, 1):
        try:
            items.append(parse(row))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            seen = ", ".join(f"{name}={value!r:.30}" for name, value in row.items())
            raise ValueError(f"row {number:,} of {', '.join(files)} is not of {task} ({reason}); it holds "
                             f"{seen or 'nothing'}") from None
    return items


# --- multiple choice: a row to (context without examples, answers, number of the right one, group) ---

def clean(text):
    """HellaSwag's text without the marks of its WikiHow part, as lm-evaluation-harness has it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def hellaswag(row):
    group = str(row.get("source_id") or row.get("ind"))
    if "query" in row:                                          # prepared before
        return row["query"], row["choices"], int(row["gold"]), group
    context = row["ctx_a"] + " " + row["ctx_b"].capitalize()
    endings = [clean(ending) for ending in row["endings"]]
    return clean(f"{row['activity_label']}: {context}"), endings, int(row["label"]), group


def arc(row):
    question, choices = row["question"], row.get("choices")
    if isinstance(question, dict):                              # the original files
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, list):
        choices = {key: [choice[key] for choice in choices] for key in ("text", "label")}
    gold = [str(label) for label in choices["label"]].index(str(row["answerKey"]))
    return f"Question: {question}\nAnswer:", list(choices["text"]), gold, question


def piqa(row):
    if "label" not in row:
        raise ValueError("no label: the original files keep it in another; take the hub's layout")
    return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]), row["goal"]


def mmlu(row):
    choices, answer = list(row["choices"]), row["answer"]
    gold = LETTERS.index(answer) if isinstance(answer, str) and answer in LETTERS else int(answer)
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices))
    return f"{row['question'].strip()}\n{listed}Answer:", list(LETTERS[:len(choices)]), gold, row["subject"]


CHOICES = {"hellaswag": hellaswag, "arc_easy": arc, "arc_challenge": arc, "piqa": piqa, "mmlu": mmlu}
SHOTS = {"mmlu": 5}             # worked examples of a base model's prompt, as published; the other tasks have none


def load_choices(task, where, shots=-1, limit=0, chat=False):
    """([Choice], {file: fingerprint}, worked examples a prompt) of a multiple-choice task; shots=-1: the usual number.

    limit: the first questions, in MMLU those of each subject (0: all). Examples are drawn as lm-evaluation-harness
    draws them: MMLU's are the first of the subject's dev split; others are a sample, with its seed, of the training
    file, or where there is none, of the other questions themselves.
    chat: answers follow without a space, as they do the header of a chat's answer.
    """
    rows, files = load_rows(task, where)
    parse = lambda row: checked(CHOICES[task](row))
    questions = parsed(task, rows, files, parse)
    shots = (0 if chat else SHOTS.get(task, 0)) if shots < 0 else shots
    pool, own = [], False
    if shots:
        beside = os.path.dirname(where) or "." if os.path.isfile(where) else where     # a file's examples lie beside it
        try:
            found = where == "hub" or find(task, beside, HUB[task][3])
        except ValueError:
            if task == "mmlu":
                raise
            found = False
        own = not found
        pool_rows, pool_files = load_rows(task, beside, HUB[task][3]) if found else ([], {})
        pool = parsed(task, pool_rows, pool_files, parse) if found else questions
        files = {**files, **pool_files}
    draw, items = random.Random(1234), []
    by_subject = {}
    for question in pool if task == "mmlu" else ():
        by_subject.setdefault(question[3], []).append(question)
    taken = Counter()
    for context, answers, gold, group in questions:
        taken[group if task == "mmlu" else task] += 1
        if limit and taken[group if task == "mmlu" else task] > limit:
            continue
        before = ""
        if task == "mmlu":
            before = f"The following are multiple choice questions (with answers) about {group.replace('_', ' ')}.\n\n"
            examples = by_subject.get(group, [])[:shots]
        else:
            mine = (context, answers, gold, group)
            spare = own or task in ("hellaswag", "piqa")        # without a test split: one more, to leave out mine
            examples = draw.sample(pool, min(shots + spare, len(pool))) if shots else []
            examples = [example for example in examples if not spare or example != mine][:shots]
        if len(examples) < shots:
            raise ValueError(f"task {task} has {len(examples)} worked examples for a question of {group[:40]!r}, and "
                             f"--shots={shots} asks for more")
        before += "".join(f"{text} {choices[right]}\n\n" for text, choices, right, _ in examples)
        items.append(Choice(before + context, [answer if chat else f" {answer}" for answer in answers], gold, group,
                            [len(answer) for answer in answers]))
    return items, files, shots


def checked(question):
    context, answers, gold, group = question
    if not all(isinstance(text, str) for text in (context, *answers)) or not all(answers):
        raise ValueError("the question and each answer must be text, and answers not empty")
    if not 0 <= gold < len(answers):
        raise ValueError(f"the right answer is number {gold} of {len(answers)}")
    return context, list(answers), gold, group


# --- generated answers ---

def humaneval(row):
    wanted = {name: row[name] for name in ("task_id", "prompt", "test", "entry_point")}
    if not all(isinstance(text, str) and text.strip() for text in wanted.values()):
        raise ValueError("task_id, prompt, test and entry_point must be text, not empty")
    return wanted


def ifeval(row):
    ids, kwargs = list(row["instruction_id_list"]), list(row["kwargs"])
    if len(ids) != len(kwargs) or not row["prompt"].strip():
        raise ValueError("the prompt is empty, or it has not one entry of kwargs an instruction")
    # the hub's files list every argument of every instruction, None where it has no meaning
    kwargs = [{name: value for name, value in (entry or {}).items() if value is not None} for entry in kwargs]
    return dict(key=row["key"], prompt=row["prompt"], instruction_id_list=ids, kwargs=kwargs)


GENERATED = {"humaneval": humaneval, "ifeval": ifeval}


def load_generated(task, where, limit=0):
    """([row with its published columns], {file: fingerprint}) of humaneval or ifeval."""
    rows, files = load_rows(task, where)
    return parsed(task, rows[:limit or None], files, GENERATED[task]), files


def question_file(task, where, split):
    """(path, fingerprint) of a split's file; one of the hub is written to a temporary file."""
    splits = (split, "") if split == "test" else (split,)
    if where == "hub":
        rows, files = load_rows(task, where, splits)
        path = os.path.join(tempfile.mkdtemp(), f"{split}.jsonl")
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return path, files
    folder = os.path.dirname(where) or "." if split == "train" and os.path.isfile(where) else where
    path = find(task, folder, splits)[0]
    return path, {os.path.basename(path): file_fingerprint(path)}


def program_of(row, text):
    """The program of a chat model's answer: its first code block, or all of it, after what the function imports."""
    block = re.search(r"```(?:python|py)?\n(.*?)(?:```|\Z)", text, re.DOTALL)
    code, start = block[1] if block else text, f"def {row['entry_point']}"
    if start not in code:
        return sandbox.humaneval_program(row, code)
    return f"{row['prompt'][:row['prompt'].rfind(start)]}{code}\n{row['test']}\ncheck({row['entry_point']})\n"


# --- text ---

def load_texts(path, tokenizer, text_column="text", max_bytes=0, invalid_utf8="error"):
    """([ids], [bytes], [words], fingerprint) of a source's documents; of a folder written by data.py: its val.h5."""
    if os.path.isfile(os.path.join(path, "val.h5")):
        tokens, offsets, _ = open_tokens(path, "val", tokenizer)
        ids = [tokens[a + 1:b] for a, b in zip(offsets, offsets[1:])]       # without the <|endoftext|> they begin with
        sizes = [int(tokenizer.token_bytes[doc].sum()) for doc in ids]
        if max_bytes:
            ids = ids[:int(np.searchsorted(np.cumsum(sizes), max_bytes)) + 1]
        texts = map(tokenizer.decode, ids)
        n_words = [len(re.split(r"\s+", text)) for text in texts]
        sizes = sizes[:len(ids)]
    else:
        texts = []
        for key, piece, _ in mix(parse_sources(path, text_column, invalid_utf8), max_bytes, Counter()):
            if key is None and texts:
                texts[-1] += piece                      # long documents come in pieces
            else:
                texts.append(piece)
        ids = tokenizer.encode_batch(texts)
        sizes, n_words = [len(text.encode()) for text in texts], [len(re.split(r"\s+", text)) for text in texts]
    kept = [i for i, doc in enumerate(ids) if len(doc)]
    if not kept:
        raise ValueError(f"{path} holds no text to evaluate on")
    ids, sizes, n_words = ([column[i] for i in kept] for column in (ids, sizes, n_words))
    content = b"".join(np.asarray(doc, np.uint32).tobytes() + b"\xff" * 4 for doc in ids)
    return ids, sizes, n_words, fingerprint(content)
