"""Questions with checkable answers: one definition for data, reward and evaluation.

    task = TASKS["gsm8k"]
    for question in task.questions("test", path="data/gsm8k", limit=100):
        task.messages(question)                             # what a chat model is asked
        task.score(completion, question.answer)             # (correct, format_ok)

gsm8k (Cobbe et al. 2021, arXiv:2110.14168) and svamp (Patel et al. 2021, arXiv:2103.07191) read the published files;
the other tasks generate their questions: arithmetic, addition, sorting, grid, letters, countdown. Every question has a
worked answer to imitate. On which side of train, dev and test a question stands is decided by the published file and
the hash of its text, never by chance or order, so that no test question is ever trained on.

A flawed demonstrator: questions(split, flawed=0.6) shows that share of the generated questions with one systematic
mistake in the worked answer, so that preferences and rewards find something to improve. `answer` stays the truth.

A chat model answers "<think>steps</think><answer>N</answer>", where N is read strictly (see `score` and `number`).
A base model continues "Question: ... Answer:" after worked examples and is scored as lm-evaluation-harness 0.4.13 does
in its task gsm8k.
"""
import ast
import dataclasses
import gzip
import itertools
import operator
import os
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

from sources import content_key, extension, json_rows

SPLITS = ("train", "dev", "test")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul,
              ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
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
    flawed: bool = False        # worked and solution show the task's mistake

    @classmethod
    def of(cls, problem, answer, steps, reply=None, solution=None, flawed=False):
        """`reply`: what the worked answer answers, where that is not `answer` to the letter."""
        reply = reply or answer
        return cls(problem, answer, f"<think>\n{steps}\n</think><answer>{reply}</answer>",
                   solution or f"{steps}\n#### {reply}", content_key(problem.encode("utf-8", "surrogatepass")), flawed)


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


def same_digits_apart(text, answer):
    """same_number, where single spaces may stand between the digits."""
    return same_number(re.sub(r"(?<=[0-9]) (?=[0-9])", "", text), answer)


def same_digits(text, answer):
    """Whether the digits, with commas or white space between them, are those of `answer` in its order."""
    digits = text.replace(",", " ").split()
    return digits == answer.split() if digits and all(re.fullmatch("[0-9]", digit) for digit in digits) else None


def walks(text, answer):
    """Whether moves (up, down, left, right) lead from square to square of the grid, past its walls, and end on the
    goal; `answer` names the start, the goal and the walls: "b3 e2 c3 d1"."""
    moves = text.replace(",", " ").split()
    if not moves or not {*moves} <= {*MOVES}:
        return None
    at, *rest = answer.split()
    for move in moves:
        at = NEIGHBOURS.get(at, {}).get(move)
        if at in rest[1:]:
            return False
    return [at] == rest[:1]


def makes(text, answer):
    """Whether an expression of + - * / and brackets uses each number once and makes the target, exactly; `answer` is
    the target and the numbers: "24 3 5 9"."""
    text = text.strip().translate(str.maketrans("−×÷", "-*/"))
    if len(text) > LONGEST or not re.fullmatch(r"[-+*/() 0-9]+", text):
        return None
    numbers = []

    def value(node):
        if isinstance(node, ast.Constant):
            numbers.append(node.value)
            return Fraction(node.value)
        return OPERATIONS[type(node.op)](value(node.left), value(node.right))
    try:
        made = value(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        return False
    except (SyntaxError, AttributeError, KeyError, TypeError):      # no expression, a sign, a call, // or **
        return None
    target, *given = map(int, answer.split())
    return made == target and sorted(numbers) == sorted(given)


def expressions(text):
    return [found for found in re.findall(r"[-+*/−×÷() 0-9]+", text) if re.search(r"[0-9)] ?[-+*/−×÷]", found)]


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
    source: Callable            # `published(...)`; of a generated task what makes one question
    max_new_tokens: int         # enough for a thorough answer
    accepts: Callable = same_number     # (text of the answer block, answer) -> True, False, or None: of another kind
    instruction: str = "Think between <think> and </think>, then write only the number between <answer> and </answer>."
    found: Callable = ANYWHERE.findall  # text -> all that looks like an answer in it
    stop: tuple = ("Question:", "</s>", "<|im_end|>")       # of a base model's answer, as in the harness
    generated: bool = False     # its questions come from a generator and need no file

    def questions(self, split, seed=0, path=None, limit=0, flawed=0.0):
        """An iterator over at most `limit` questions of a split (0: all there are); the same for the same seed.

        flawed: the share of worked answers that make the task's mistake, of those in which it changes anything (a
        digit twice, a carry, ...). Which, the hash of the problem and the seed decide.
        ValueError, at once, for an unknown split, a path that is missing, wrong or not wanted, an impossible share.
        """
        if split not in SPLITS:
            raise ValueError(f"{self.name} has the splits {', '.join(SPLITS)}, not {split!r}")
        if not 0 <= flawed <= 1:
            raise ValueError(f"flawed is a share of the worked answers from 0 to 1, got {flawed}")
        if path and self.generated:
            raise ValueError(f"{self.name} generates its questions and reads no file, got path={path!r}")
        if flawed and not self.generated:
            raise ValueError(f"{self.name} has published answers and no flawed ones; set flawed to 0, got {flawed}")
        if self.generated:
            return itertools.islice(generated_questions(self.source, split, seed, flawed), limit or None)
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
        """Whether the last number (of sorting: digits, ...) anywhere in the completion is the answer: for reading,
        never for reward."""
        found = self.found(completion)
        return bool(found) and self.accepts(found[-1], answer) is True

    def score_plain(self, completion, answer):
        """(strict, lenient) of a base model's answer: the harness's exact_match after its filters strict-match (the
        first number behind "#### ") and flexible-extract (the last number), to the letter and with their quirks; where
        the answer is no number, what stands behind the first "#### ", and `lenient`."""
        if self.accepts is not same_number:
            text = completion.partition("#### ")[2].partition("\n")[0]
            return self.accepts(text, answer) is True, self.lenient(completion, answer)
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
    return Question.of(row["question"], answer, re.sub(r"<<[^<>]*>>", "", steps), solution=row["answer"])


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


# --- generated: random.Random -> (problem, answer, worked, flawed), the latter two (steps, reply) ---

def generated_questions(make, split, seed, flawed):
    """The questions of a split: by their hash nine tenths of all problems are train, a twentieth each dev and test.
    train does not end; dev and test repeat no problem, and end when many draws bring no new one."""
    generator, seen, in_vain = random.Random(seed), set(), 0
    while in_vain < 100_000:
        in_vain += split != "train"
        problem, answer, right, wrong = make(generator)
        mistaken = wrong != right and content_key(f"{seed} {problem}".encode()) / 2 ** 64 < flawed
        question = Question.of(problem, answer, *(wrong if mistaken else right), flawed=mistaken)
        place = question.key / 2 ** 64
        side = "train" if place < 0.9 else "dev" if place < 0.95 else "test"
        if side == split and question.key not in seen:
            if split != "train":
                seen.add(question.key)
            in_vain = 0
            yield question


def arithmetic(generator):
    """Two to four terms, each a number below 10 or 100 or a product of digits, added and subtracted; products first,
    then from the left, one operation a line. Flawed: answers at once, rightly, without the steps."""
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
    return f"What is {problem}?", str(total), ("\n".join(steps), str(total)), ("", str(total))


def addition(generator):
    """Two numbers of two or of three digits, added or subtracted column by column from the right. Their digits stand
    apart, so that a tokenizer sees each. Flawed: forgets the carry; takes the smaller digit from the larger."""
    size, sign = generator.choice((2, 3)), generator.choice("+-")
    a, b = (generator.randrange(10 ** (size - 1), 10 ** size) for _ in range(2))
    if sign == "-":
        a, b = max(a, b), min(a, b)
    right, wrong, mistaken, carry = [], [], 0, 0
    for i, (x, y) in enumerate(zip(map(int, reversed(str(a))), map(int, reversed(str(b))))):
        alone = x + y if sign == "+" else abs(x - y)
        mistaken += 10 ** i * (alone if i == size - 1 else alone % 10)
        if sign == "+":
            wrong.append(f"{x}+{y}={alone}")
            right.append(f"{x}+{y}{'+1' * carry}={x + y + carry}")
            carry = int(x + y + carry > 9)
        else:
            wrong.append(f"{max(x, y)}-{min(x, y)}={alone}")
            x, carry = x - carry, int(x - carry < y)
            right.append(f"{x + 10 * carry}-{y}={x + 10 * carry - y}")
    total = OPERATIONS[sign](a, b)
    return (f"{' '.join(str(a))} {sign} {' '.join(str(b))} = ?", str(total),
            ("\n".join(right), " ".join(str(total))), ("\n".join(wrong), " ".join(str(mistaken))))


def sorting(generator):
    """Five digits in ascending order, equal ones side by side. Flawed: drops what was there before."""
    digits = [generator.choice("0123456789") for _ in range(5)]
    groups = [" ".join(group) for _, group in itertools.groupby(sorted(digits))]
    once = sorted({*digits})
    answer = " ".join(groups)
    return f"Sort {' '.join(digits)}", answer, (", ".join(groups), answer), (", ".join(once), " ".join(once))


SQUARES = {(x, y): f"{'abcde'[x]}{y + 1}" for x in range(5) for y in range(5)}
MOVES = {"right": (1, 0), "left": (-1, 0), "up": (0, 1), "down": (0, -1)}
NEIGHBOURS = {square: {move: SQUARES.get((x + dx, y + dy)) for move, (dx, dy) in MOVES.items()}
              for (x, y), square in SQUARES.items()}


def grid(generator):
    """A way from square to square around three walls; any way is right, the worked one is a shortest, sideways first.
    Flawed: stops one square short."""
    distance, start = {}, None
    while distance.get(start, 0) < 2:                       # too near, or walled off
        start, goal, *walls = generator.sample(list(SQUARES.values()), 5)
        distance, front = {goal: 0}, [goal]
        for square in front:                                # grows while it is walked through
            new = [n for n in NEIGHBOURS[square].values() if n and n not in distance and n not in walls]
            distance.update(dict.fromkeys(new, distance[square] + 1))
            front += new
    at, steps, moves = start, [start], []
    while at != goal:
        move = next(move for move, n in NEIGHBOURS[at].items() if distance.get(n) == distance[at] - 1)
        at = NEIGHBOURS[at][move]
        steps += [move, at]
        moves.append(move)
    return (f"From {start} to {goal}, walls {' '.join(sorted(walls))}", " ".join([start, goal, *sorted(walls)]),
            (" ".join(steps), " ".join(moves)), (" ".join(steps[:-2]), " ".join(moves[:-1])))


def letters(generator):
    """How often a letter is in a made-up word: spelled, with the count so far. Flawed: counts no letter twice."""
    word = "".join(generator.choice("bkmnst") + generator.choice("aio") for _ in range(generator.randint(3, 4)))
    letter = generator.choice(word if generator.random() < 0.9 else "bkmnstaio")
    counts = [word[:i].count(letter) for i in range(1, len(word) + 1)]
    right, wrong = (" ".join(f"{x}{min(n, most)}" for x, n in zip(word, counts)) for most in (9, 1))
    return (f"How many {letter} are in {word}?", str(counts[-1]), (right, str(counts[-1])),
            (wrong, str(min(counts[-1], 1))))


def countdown(generator):
    """A number to make of three, each used once. The worked way tries them in the order given, + - * and then + -,
    until it hits. Flawed: takes the first try whatever it makes."""
    while True:
        a, b, c = generator.randint(1, 9), generator.randint(1, 9), generator.randint(1, 90)
        target = OPERATIONS[generator.choice("+-*")](a, b) + generator.choice((c, -c))
        if 1 <= target <= 99:
            break
    lines, tries = [], []
    for first in "+-*":
        made = OPERATIONS[first](a, b)
        lines.append(f"{a}{first}{b}={made}")
        for then in "+-":
            lines[-1] += f" {made}{then}{c}={OPERATIONS[then](made, c)}"
            tries.append(("\n".join(lines), f"{a}{first}{b}{then}{c}"))
            if OPERATIONS[then](made, c) == target:
                return f"Make {target} from {a} {b} {c}", f"{target} {a} {b} {c}", tries[-1], tries[0]


# --- the tasks ---

def of_generator(make, max_new_tokens, accepts=same_number, kind="number", rules="", found=ANYWHERE.findall):
    return Task(make.__name__, make, max_new_tokens, accepts,
                f"{rules}Think, then answer as <answer>{kind}</answer>.", found, generated=True)


TASKS = {task.name: task for task in (
    Task("gsm8k", published("question and answer, the answer ending in '#### number'", gsm8k), 512),
    Task("svamp", published("Body and Question (or question_concat), Equation and Answer", svamp), 256),
    of_generator(arithmetic, 128),
    of_generator(addition, 64, same_digits_apart, found=re.compile(r"[0-9]+(?: [0-9]+)*").findall),
    of_generator(sorting, 64, same_digits, "digits", found=re.compile(r"[0-9](?:,? [0-9])*").findall),
    of_generator(grid, 128, walks, "right up left down", "Board a1 to e5. ",
                 re.compile(r"(?:up|down|left|right)(?:,? (?:up|down|left|right))*").findall),
    of_generator(letters, 64),
    of_generator(countdown, 128, makes, "expression", "Use each number once. ", expressions),
)}
