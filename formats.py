"""Rows of published chat data to messages, a small function for each format, and the sources that such rows come from.

    from_alpaca({"instruction": "Add.", "input": "1 2", "output": "3"})
    # [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]

    alpaca     instruction, input, output; by option system and history, as LLaMA-Factory has them
    dolly      instruction, context, response
    sharegpt   conversations: a list of from and value, human and gpt taking turns (Vicuna)
    messages   messages: a list of role and content (OpenAI); a row whose label is false (thumbs down) is of no use
    completion prompt, completion: texts, or lists of messages
    chosen     prompt, chosen (and rejected, which is left aside)
    gsm8k      question, answer with its steps: the task's worked answer

A format is recognised by the columns of a source's first row, or named: dolly:FILE. A converter raises Unusable, with
the reason that is counted, for a row that is in order but teaches nothing, and ValueError for one that is malformed.
"""
import gzip
import itertools
import math
import os
import re
import zlib

import raw
from sources import Source, content_key, extension, json_rows
from tasks import TASKS, find_file, gsm8k

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
         "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


LONGEST_ROW = 10_000_000    # bytes of a row of a file in any state; one that is longer is no chat


class Unusable(ValueError):
    """A row from which nothing can be learnt; its text is the reason."""


# --- rows to messages ---

def text_of(row, *names, optional=False):
    """The text in the first of these columns that the row has, "" for null. ValueError if there is none."""
    name = next((name for name in names if name in row), None)
    if name is None and not optional:
        raise ValueError(f"it has no {' or '.join(names)}, but {', '.join(map(str, row)) or 'no columns'}")
    value = row.get(name)
    if not isinstance(value, (str, type(None))):
        raise ValueError(f"its {name} is {value!r:.40}, not a text")
    return value or ""


def turns(value):
    """The messages of a list of turns, under the names that each format gives to roles and contents."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"its turns are {value!r:.60}, not a list of objects")
    messages = []
    for turn in value:
        role = text_of(turn, "role", "from")
        if role.lower() not in ROLES:
            raise ValueError(f"its role {role!r:.40} is unknown; those known are {', '.join(ROLES)}")
        content = turn.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            turn = {"content": "".join(text_of(part, "text") for part in content)}      # OpenAI's parts
        messages.append({"role": ROLES[role.lower()], "content": text_of(turn, "content", "value")})
    return messages


def chat(*contents, system=""):
    """Messages of a user's and an assistant's texts in turns."""
    roles = itertools.cycle(("user", "assistant"))
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": role, "content": content} for role, content in zip(roles, contents)]


def from_alpaca(row):
    question, given = text_of(row, "instruction"), text_of(row, "input", optional=True)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
            isinstance(pair, list) and [type(text) for text in pair] == [str, str] for pair in history):
        raise ValueError(f"its history is {history!r:.40}, not a list of pairs of texts")
    return chat(*itertools.chain(*history), f"{question}\n\n{given}" if given else question, text_of(row, "output"),
                system=text_of(row, "system", optional=True))


def from_dolly(row):
    given = text_of(row, "context", optional=True)
    return chat(text_of(row, "instruction") + (f"\n\n{given}" if given else ""), text_of(row, "response"))


def from_sharegpt(row):
    messages = turns(row.get("conversations"))
    if (system := text_of(row, "system", optional=True)) and [m["role"] for m in messages[:1]] != ["system"]:
        messages = [{"role": "system", "content": system}] + messages
    roles = [message["role"] for message in messages if message["role"] != "system"]
    for one, other in zip(roles, roles[1:]):
        if one == other:
            raise ValueError(f"two turns of the {one} follow each other, where ShareGPT's alternate")
    if roles[:1] == ["assistant"]:
        raise Unusable("begins with a reply")
    return messages


def from_messages(row):
    if row.get("label") is False:
        raise Unusable("thumbs down")
    return turns(row.get("messages"))


def from_completion(row, name="completion"):
    prompt, reply = row.get("prompt"), row.get(name)
    if isinstance(prompt, list) and isinstance(reply, list):
        return turns(prompt) + turns(reply)
    if isinstance(reply, list):                     # UltraFeedback's chosen repeats the prompt
        return turns(reply)
    return chat(text_of(row, "prompt"), text_of(row, name))


def from_chosen(row):
    return from_completion(row, "chosen")


def from_gsm8k(row):
    try:
        question = gsm8k(row)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError("it is not of gsm8k: a question, and an answer that ends in '#### number'") from None
    return asked(TASKS["gsm8k"], question)


def asked(task, question):
    """The chat in which a task's question is asked and its worked answer given."""
    return [*task.messages(question), {"role": "assistant", "content": question.worked}]


FORMATS = {"messages": (["messages"], from_messages), "sharegpt": (["conversations"], from_sharegpt),
           "alpaca": (["instruction", "output"], from_alpaca), "dolly": (["instruction", "response"], from_dolly),
           "completion": (["prompt", "completion"], from_completion), "chosen": (["prompt", "chosen"], from_chosen),
           "gsm8k": (["question", "answer"], from_gsm8k)}


def recognise(row):
    """The name of the format that has the columns of `row`. ValueError if none has."""
    for name, (columns, _) in FORMATS.items():
        if all(column in row for column in columns):
            return name
    kinds = "; ".join(f"{name}: {', '.join(columns)}" for name, (columns, _) in FORMATS.items())
    raise ValueError(f"it is of no known format, having {', '.join(map(str, row)) or 'no columns'}; those known are "
                     f"{kinds}")


def usable(messages):
    """The messages up to the last reply. Unusable if there is no reply, or an empty one."""
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not replies:
        raise Unusable("no assistant turn")
    if not all(messages[i]["content"].strip() for i in replies):
        raise Unusable("empty reply")
    if not all(message["content"].strip() for message in messages if message["role"] == "user"):
        raise Unusable("empty question")
    return messages[:replies[-1] + 1]


# --- messages to rows ---

def to_messages(messages):
    return {"messages": [dict(message) for message in messages]}


def to_alpaca(messages):
    """The row that from_alpaca turns into these messages. ValueError if user and assistant do not take turns."""
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
    said = messages[1:] if system else messages
    contents = [message["content"] for message in said]
    if not said or len(said) % 2 or [dict(message) for message in said] != chat(*contents):
        raise ValueError("Alpaca has room for a system prompt, and then a user and an assistant in turns; got "
                         f"{', '.join(message['role'] for message in messages) or 'no messages'}")
    row = {"instruction": contents[-2], "input": "", "output": contents[-1]}
    history = [list(pair) for pair in zip(contents[:-2:2], contents[1:-2:2])]
    return {**row, **({"system": system} if system else {}), **({"history": history} if history else {})}


# --- sources ---

def split_weights(text):
    """[(name, number or None)]: "a=0.7,b" is a with 0.7 and b without. An = in a file's name is no weight."""
    parsed = []
    for item in filter(None, map(str.strip, text.split(","))):
        name, _, value = item.rpartition("=")
        if name and re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", value) and not os.path.exists(item):
            parsed.append((name, float(value)))
        else:
            parsed.append((item, None))
    return parsed


def parse_chats(text, kind=None, **how):
    """[ChatSource] of "alpaca.jsonl=0.5,task:gsm8k:data/gsm8k=0.3,dolly:hub:ID=0.2", or [kind]; `how` is what it
    takes."""
    parsed = split_weights(text)
    if not parsed:
        raise ValueError(f"sources is {text!r} and names none; try --sources=task:arithmetic")
    if len({weight is None for _, weight in parsed}) > 1:
        raise ValueError(f"some sources have a weight and some have none: {text!r}; give one to all or to none")
    for name, weight in parsed:
        if weight is not None and not 0 < weight < math.inf:
            raise ValueError(f"the weight of source {name} is {weight:g}; it must be above 0 and finite")
    if len(parsed) > 256 or len({name for name, _ in parsed}) < len(parsed):
        raise ValueError(f"sources names {len(parsed)}, which must be at most 256 and different ones: {text!r:.80}")
    return [(kind or ChatSource)(name, weight, **how) for name, weight in parsed]


def rows_source(name, invalid_utf8):
    """The Source of files of rows, or of a hub dataset. ValueError for files of another type."""
    source = Source(name, None, (), invalid_utf8)
    for path in source.files:
        if not name.startswith("hub:") and extension(path) not in (".jsonl", ".json", ".parquet"):
            raise ValueError(f"{path} holds no rows of chats or pairs; those are read from .jsonl .json (also .gz) and "
                             ".parquet, hub:ID and, of chats, task:NAME")
    return source


def all_rows(source, notes, damaged="error"):
    """Yields (row, path, row number) of all files of a Source. damaged: "error", or "drop", which counts in `notes` by
    reason what cannot be read, and goes on with the next row or the next file."""
    for path in source.files:
        suffix, number, noted = extension(path), 0, notes.total()
        try:
            if path.startswith("hub:"):
                rows = source.hub_rows()
            elif suffix == ".parquet":
                rows = parquet_rows(path)
            elif damaged == "drop":
                rows = readable_rows(path, notes)
            else:
                rows = json_rows(path, source.invalid_utf8, notes)
            for row, number, *_ in rows:
                yield row, path, number
        except (ValueError, EOFError, zlib.error, OSError) as error:
            if damaged == "drop":
                notes["damaged, rest of the file unread"] += 1
            elif isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
                raise ValueError(f"{path} is cut off or damaged ({error}); fetch it again") from None
            elif isinstance(error, OSError):
                raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None
            else:
                raise
        if damaged == "drop" and not number and notes.total() == noted:
            notes["empty"] += 1


def readable_rows(path, notes):
    """Yields (row, row number) of a .jsonl or .json file in any state, as raw.py reads it."""
    reader = raw.RawSource(path, (), LONGEST_ROW)
    for place, row in reader.rows(path):
        yield row, int(place.rpartition(":")[2])
    notes.update(reader.dropped)
    notes.update({f"replaced characters: {reason}": count for reason, count in reader.mended.items()})


class ChatSource:
    """One entry of `sources`: a task's questions, or rows of files or of a hub dataset.

    endless: a generated task with a weight, which goes on as long as the others do.
    """

    def __init__(self, name, weight, invalid_utf8="error", val_fraction=0.05, task_examples=10_000, flawed=0.0, seed=0,
                 unusable="drop", malformed="error", damaged="error"):
        self.name, self.weight, self.format, self.task, self.damaged = name, weight, None, None, damaged
        self.val_fraction, self.flawed, self.seed = val_fraction, flawed, seed
        self.rules = {Unusable: unusable, ValueError: malformed}
        self.limit = 0
        prefix, _, rest = name.partition(":")
        if prefix == "task":
            task, _, self.path = rest.partition(":")
            if task not in TASKS:
                raise ValueError(f"there is no task {task!r}; those are {', '.join(TASKS)}, as in task:arithmetic")
            self.task = TASKS[task]
            self.limit = 0 if weight or self.path else task_examples
            self.questions("train")                 # says now what is wrong with the path
        else:
            self.format, name = (prefix, rest) if prefix in FORMATS and rest else (None, name)
            self.rows = rows_source(name, invalid_utf8)
        self.endless = bool(self.task and not self.path and weight)

    def questions(self, split):
        flawed = {"flawed": self.flawed} if self.flawed and not self.path else {}     # published answers are right
        return self.task.questions(split, self.seed, self.path or None, **flawed)

    def chats(self, notes):
        """Yields (messages, key, side, place): key is the hash of the prompt, side "train", "val" or None where the key
        decides, place says where the chat stands. Rows of no use are left out and counted in `notes` by reason."""
        if self.task:
            yield from self.task_chats()
            return
        checked = set()
        for row, path, number in all_rows(self.rows, notes, self.damaged):
            place = f"row {number:,} of {path}"
            try:
                if not isinstance(row, dict):
                    raise ValueError(f"it is {row!r:.40}, not an object with named columns")
                name = self.format = self.format or recognise(row)
                messages = usable(FORMATS[name][1](row))
            except ValueError as error:
                kind = Unusable if isinstance(error, Unusable) else ValueError
                if self.rules[kind] == "error":
                    option = "unusable" if kind is Unusable else "malformed"
                    raise ValueError(f"{place} cannot be used: {error}; --{option}=drop leaves such rows out") from None
                notes[str(error) if kind is Unusable else "malformed"] += 1
                continue
            if name == "gsm8k":                     # on the side where the task has it, so that dev stays dev
                if path not in checked:
                    refuse_test_split(path)
                    checked.add(path)
                key = gsm8k(row).key
                yield messages, key, "val" if key / 2 ** 64 >= 0.95 else "train", place
            else:
                yield messages, prompt_key(messages), None, place

    def task_chats(self):
        """All questions of a file, or those that a task makes up: a share of val_fraction are dev questions, as long as
        there are new ones."""
        streams = {"train": self.questions("train"), "val": self.questions("dev")}

        def made_up():
            for i in itertools.count():
                if int((i + 1) * self.val_fraction) > int(i * self.val_fraction):
                    yield from (("val", question) for question in itertools.islice(streams["val"], 1))
                else:
                    yield "train", next(streams["train"])

        published = ((side, question) for side in streams for question in streams[side])
        pairs = itertools.islice(published if self.path else made_up(), self.limit or None)
        for i, (side, question) in enumerate(pairs, 1):
            yield asked(self.task, question), question.key, side, f"question {i:,} of {self.name}"


def refuse_test_split(path):
    """ValueError if a file or hub split of gsm8k is the one that models are tested on."""
    if path.startswith("hub:"):
        if path.endswith(":test"):
            raise ValueError(f"{path} is the test split of gsm8k, which is never trained on; take :train")
    else:
        find_file("gsm8k", "train", path)


def parquet_rows(path):
    """Yields (row, row number) of a .parquet file."""
    import pyarrow
    import pyarrow.parquet
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield row, number
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or not parquet ({str(error).splitlines()[0]}); fetch it again") from None


def prompt_key(messages):
    """64-bit hash of the first question, else of all that stands before the first reply: conversations that begin alike
    stand on one side, whatever their system prompt."""
    asked = [message["content"] for message in messages if message["role"] == "user"][:1]
    before = asked or [m["content"] for m in itertools.takewhile(lambda m: m["role"] != "assistant", messages)]
    return content_key("\n".join(before).strip().encode("utf-8", "surrogatepass"))
