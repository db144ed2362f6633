"""Questions with checkable answers: one definition for data, reward and evaluation.

    task = TASKS["gsm8k"]
    for question in task.questions("test", path="data/gsm8k", limit=100):
        task.messages(question)                             # what a chat model is asked
        task.score(completion, question.answer)             # (correct, format_ok)

gsm8k (Cobbe et al. 2021, arXiv:2110.14168) and svamp (Patel et al. 2021, arXiv:2103.07191) read the published files;
arithmetic generates its questions without end. Every question has a worked answer to imitate. On which side of train,
dev and test a question stands is decided by the published file and the hash of its text, never by chance or order, so
that no test question is ever trained on.

A chat model answers "<think>steps</think><answer>N</answer>", where N is read strictly (see `score` and `number`).
A base model continues "Question: ... Answer:" after worked examples and is scored as lm-evaluation-harness 0.4.13 does
in its task gsm8k.
"""
import dataclasses
import gzip
import itertools
import os
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

from sources import content_key, extension, json_rows

SPLITS = ("train", "dev", "test")
DIGITS = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+|/[0-9]+)?|\.[0-9]+)"
NUMBER = re.compile(rf"\s*([-−+]?[$€£¥]?|[$€£¥][-−+])({DIGITS})\.?\s*")
ANYWHERE = re.compile(rf"(?:(?:(?<![\w)\]])[-−+])?[$€£¥]?|[$€£¥][-−+]){DIGITS}")    # the - of 5-3 is no sign
LONGEST = 100                   # characters of a number and the white space around it
TAGS = re.compile(r"</?(?:think|answer)>")
BLOCK = re.compile(r"<answer>(.*)</answer>\s*", re.DOTALL)

# The two filters of the harness's gsm8k.yaml.
STRICT_MATCH = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE_EXTRACT = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


@dataclasses.dataclass(frozen=True)
class Question:
    problem: str
    answer: str                 # what the verifier compares with
    worked: str                 # a chat model's answer to imitate: <think>steps</think><answer>answer</answer>
    solution: str               # a base model's: steps, then "#### answer", as GSM8K publishes it
    key: int                    # 64-bit hash of the problem

    @classmethod
    def of(cls, problem, answer, steps, solution=None):
        return cls(problem, answer, f"<think>\n{steps}\n</think><answer>{answer}</answer>",
                   solution or f"{steps}\n#### {answer}", content_key(problem.encode("utf-8", "surrogatepass")))


# --- verifiers ---

def number(text):
    """The Fraction that `text` spells, or None if it is anything but one number.

    Read: 18, -5 and −5 (U+2212), +5, 0.5, .5, 3/4, 1,234.50, each with or without a currency sign ($18, -$18, $-18),
    a final full stop, white space around it. Not read: units, percent signs, words, exponents, spaces inside, commas
    out of place (1,23), digits of other scripts, a zero denominator, anything longer than LONGEST.
    """
    match = NUMBER.fullmatch(text) if len(text) <= LONGEST else None
    if match is None:
        return None
    try:
        value = Fraction(match[2].replace(",", ""))
    except ZeroDivisionError:
        return None
    return -value if {"-", "−"} & set(match[1]) else value


def same_number(text, answer):
    """Whether text and answer spell one value, exactly (0.5 is 1/2); None if text is no number at all."""
    value = number(text)
    return None if value is None else value == number(answer)


def answer_block(completion):
    """What stands in the completion's <answer> block, or None unless there is exactly one such block, nothing but white
    space after it, and before it no think tag or one closed <think> block."""
    tags = TAGS.findall(completion)
    if tags[-2:] != ["<answer>", "</answer>"] or tags[:-2] not in ([], ["<think>", "</think>"]):
        return None
    match = BLOCK.fullmatch(completion, completion.index("<answer>"))
    return match and match[1]


# --- tasks ---

@dataclasses.dataclass(frozen=True)
class Task:
    name: str
    source: Callable            # (name, split, seed, path) -> iterator of Question: `published` or `generated`
    max_new_tokens: int         # enough for a thorough answer
    accepts: Callable = same_number     # (text of the answer block, answer) -> True, False, or None: of another kind
    instruction: str = "Think between <think> and </think>, then write only the number between <answer> and </answer>."
    stop: tuple = ("Question:", "</s>", "<|im_end|>")       # of a base model's answer, as in the harness

    def questions(self, split, seed=0, path=None, limit=0):
        """An iterator over at most `limit` questions of a split (0: all, or without end); the same for the same seed.

        ValueError, at once, for an unknown split and for a path that is missing, wrong or not wanted.
        """
        if split not in SPLITS:
            raise ValueError(f"{self.name} has the splits {', '.join(SPLITS)}, not {split!r}")
        return itertools.islice(self.source(self.name, split, seed, path), limit or None)

    def messages(self, question):
        """The chat that asks the question."""
        return [{"role": "user", "content": f"{question.problem}\n{self.instruction}"}]

    def plain(self, question):
        """The question for a base model; few-shot: "\\n\\n".join(plain + plain_answer of each example, plain)."""
        return f"Question: {question.problem}\nAnswer:"

    def plain_answer(self, question):
        return f" {question.solution}"

    def score(self, completion, answer):
        """(correct, format_ok) of a chat model's answer, decoded without the token that ended it.

        format_ok: one answer block at the end, at most one think block before it, closed (`answer_block`), and in the
        answer block something of the right kind (`accepts`): an empty or repeated block earns nothing. correct implies
        format_ok.
        """
        text = answer_block(completion)
        verdict = None if text is None else self.accepts(text, answer)
        return verdict is True, verdict is not None

    def lenient(self, completion, answer):
        """Whether the last number anywhere in the completion is the answer: for reading, never for reward."""
        found = ANYWHERE.findall(completion)
        return bool(found) and same_number(found[-1], answer) is True

    def score_plain(self, completion, answer):
        """(strict, lenient) of a base model's answer: the harness's exact_match after its filters strict-match (the
        first number behind "#### ") and flexible-extract (the last number), to the letter and with their quirks."""
        strict, flexible = STRICT_MATCH.findall(completion), FLEXIBLE_EXTRACT.findall(completion)
        found = strict[0] if strict else "[invalid]", next(filter(None, flexible[-1])) if flexible else "[invalid]"
        return tuple(comparable(text) == comparable(answer) for text in found)


def comparable(text):
    """What the harness's exact_match compares: its regexes_to_ignore taken out, and lower case."""
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()


# --- published files ---

def read_rows(path):
    """The rows, dictionaries, of a .jsonl or .json file, plain or .gz. ValueError if it cannot be read."""
    path = os.fspath(path)
    if not os.path.exists(path):
        raise ValueError(f"there is no file or folder {path}")
    if extension(path) not in (".jsonl", ".json"):
        raise ValueError(f"{path} is of no type that can be read here; those are .jsonl and .json, also with .gz")
    try:
        rows = [row for row, _, _ in json_rows(path, "error", Counter())]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is cut off or damaged ({error}); fetch it again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {i:,} of {path} is {row!r:.40}; a row is an object with named columns")
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def find_file(name, split, path):
    """The file of a published split: `path` itself, or in that folder train.* or test.* (or svamp's single SVAMP.*)."""
    if not path:
        raise ValueError(f"{name} reads its published files; give their folder, or one of them, as path")
    stems, others = (("test", "SVAMP"), ("train",)) if split == "test" else (("train",), ("test", "SVAMP"))
    if not os.path.isdir(path):
        base = os.path.basename(path)
        if base.partition(".")[0] in others or {*re.split("[^a-z]+", base)} & {*others}:
            raise ValueError(f"{path} is not the {split} split of {name}; give its folder or the {stems[0]} file")
        return path
    names = [stem + suffix for stem in stems for suffix in (".jsonl", ".jsonl.gz", ".json", ".json.gz")]
    found = [file for file in names if os.path.isfile(os.path.join(path, file))]
    if not found:
        raise ValueError(f"{path} holds no {split} split of {name}: looked for {', '.join(names)}")
    return os.path.join(path, found[0])


def published(columns, parse):
    """A Task's source of published files, in their order (seed 0) or shuffled. dev is the rows of the training file
    whose hash falls into the last twentieth, train the others. `parse` turns a row into a Question."""
    def source(name, split, seed, path):
        file = find_file(name, split, path)
        questions = []
        for i, row in enumerate(read_rows(file), 1):
            try:
                questions.append(parse(row))
            except (KeyError, TypeError, ValueError, AttributeError):
                seen = ", ".join(f"{column}={value!r:.40}" for column, value in row.items())
                raise ValueError(f"row {i:,} of {file} is not of {name}, which has {columns}; it holds "
                                 f"{seen or 'no columns'}") from None
        if split != "test":
            questions = [question for question in questions if (question.key / 2 ** 64 >= 0.95) == (split == "dev")]
        if seed:
            random.Random(seed).shuffle(questions)
        return iter(questions)
    return source


def gsm8k(row):
    steps, mark, answer = row["answer"].rpartition("\n#### ")
    if not mark or number(answer) is None:
        raise ValueError
    return Question.of(row["question"], answer, re.sub(r"<<[^<>]*>>", "", steps), row["answer"])


def svamp(row):
    problem, answer = row.get("question_concat"), str(row["Answer"]).removesuffix(".0")
    if problem is None:                                 # the body often lacks its full stop
        body = row["Body"].strip()
        problem = f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {row['Question'].strip()}"
    if number(answer) is None:
        raise ValueError
    equation = re.sub(r"\b([0-9]+)\.0\b", r"\1", row["Equation"])
    equation = equation.strip().removeprefix("( ").removesuffix(" )")
    return Question.of(problem, answer, f"{equation.replace('( ', '(').replace(' )', ')')} = {answer}")


# --- generated ---

def generated(make):
    """A Task's source of `make(random.Random) -> Question`, without end: by their hash nine tenths of all problems are
    train, a twentieth each dev and test. dev and test repeat no problem."""
    def source(name, split, seed, path):
        if path:
            raise ValueError(f"{name} generates its questions and reads no file, got path={path!r}")
        return stream(split, random.Random(seed))

    def stream(split, generator):
        seen = set()
        while True:
            question = make(generator)
            place = question.key / 2 ** 64
            side = "train" if place < 0.9 else "dev" if place < 0.95 else "test"
            if side == split and question.key not in seen:
                if split != "train":
                    seen.add(question.key)
                yield question
    return source


def arithmetic(generator):
    """Two to four terms, each a number below 10 or 100 or a product of digits, added and subtracted; products first,
    then from the left, one operation a line."""
    terms = []
    for _ in range(generator.randint(2, 4)):
        product = generator.random() < 0.25
        terms.append([generator.randint(2, 9), generator.randint(2, 9)] if product else
                     [generator.randrange(generator.choice((10, 100)))])
    signs = [generator.choice("+-") for _ in terms[1:]]
    problem = " * ".join(map(str, terms[0]))
    for sign, term in zip(signs, terms[1:]):
        problem += f" {sign} {' * '.join(map(str, term))}"
    steps = [f"{a} * {b} = {a * b}" for a, b in (term for term in terms if len(term) == 2)]
    values = [term[0] * term[-1] if len(term) == 2 else term[0] for term in terms]
    total = values[0]
    for sign, value in zip(signs, values[1:]):
        before, total = total, total + value if sign == "+" else total - value
        steps.append(f"{before} {sign} {value} = {total}")
    return Question.of(f"What is {problem}?", str(total), "\n".join(steps))


TASKS = {task.name: task for task in (
    Task("gsm8k", published("question and answer, the answer ending in '#### number'", gsm8k), 512),
    Task("svamp", published("Body and Question (or question_concat), Equation and Answer", svamp), 256),
    Task("arithmetic", generated(arithmetic), 128),
)}
