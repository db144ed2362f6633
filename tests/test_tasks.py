"""The verifier cannot be talked round, worked answers are right, and no test question is ever trained on."""
import ast
import gzip
import itertools
import json
import operator
import os
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks
from tasks import SPLITS, TASKS, number

DATA = Path(os.environ.get("ZERO2CHAT_DATA") or Path(tasks.__file__).resolve().parents[1] / "shared" / "data")
needs_gsm8k = pytest.mark.skipif(not (DATA / "eval/gsm8k").is_dir(), reason=f"no {DATA}/eval/gsm8k; set ZERO2CHAT_DATA")
ARITHMETIC = TASKS["arithmetic"]
GENERATED = [name for name, task in TASKS.items() if task.generated]
score = ARITHMETIC.score
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")
RIGHT, WRONG, MALFORMED = (True, True), (False, True), (False, False)


def answered(text):
    return f"<think>\n2 + 3 = 5\n</think><answer>{text}</answer>"


def one_sentence(error):
    text = str(error.value)
    return "\n" not in text and len(text) > 20


# --- number ---

@pytest.mark.parametrize("text, value", [
    ("18", 18), (" 18 ", 18), ("\n18\n", 18), ("18.", 18), ("18.0", 18), ("18.50", Fraction(37, 2)), ("+5", 5),
    ("-5", -5), ("−5", -5), ("0", 0), ("-0", 0), ("007", 7), (".5", Fraction(1, 2)), ("0.5.", Fraction(1, 2)),
    ("-.5", Fraction(-1, 2)), ("3/4", Fraction(3, 4)), ("-3/4", Fraction(-3, 4)), ("6/3", 2), ("1,234", 1234),
    ("1,234.50", Fraction(2469, 2)), ("12,345,678", 12345678), ("$18", 18), ("-$18", -18), ("$-18", -18),
    ("−$1,000.25", Fraction(-400100, 400)), ("€3", 3), ("£0.10", Fraction(1, 10)), ("0.1", Fraction(1, 10)),
    ("9" * 100, int("9" * 100)), ("1,000/8", 125)])
def test_a_number_is_read_exactly(text, value):
    assert number(text) == value


@pytest.mark.parametrize("text", [
    "", " ", ".", "-", "−", "$", "+", ",", "/", "five", "1 2", "1 234", "1, 234", "1,23", "1,2345", "12,34,567", ",123",
    "1234,567", "0,123", "1,234,", "18..", "1.2.3", "18%", "18 dollars", "18 apples", "18cm", "1e5", "1E5", "0x12",
    "--5", "-−5", "+-5", "-$-5", "$$5", "5$", "$ 5", "- 5", "5-", "1/0", "0/0", "1/2/3", "1/-2", "1.5/2", "1 1/2", "½",
    "5, 6", "5 or 6", "5;", "5!", "=5", "x=5", "2+3", "(5)", "[5]", "**5**", "\\boxed{5}", "`5`", "'5'", "1_000",
    "٥", "５", "²", "Ⅴ", "–5", "—5", "－5", "inf", "nan", "NaN", "None", "True", "5\x00", "\u200b5", "5\u200b",
    "9" * 101, "9" * 100_000, " " * 200 + "5", "5" + "0" * 5000])
def test_what_is_not_one_number_is_not_read(text):
    assert number(text) is None
    assert score(answered(text), "5") == MALFORMED


@st.composite
def spelled(draw):
    """(a spelling that `number` reads, its value)"""
    whole, decimals = draw(st.integers(0, 10**12)), draw(st.text("0123456789", max_size=6))
    value, text = Fraction(whole), f"{whole:,}" if draw(st.booleans()) else str(whole)
    if decimals:
        value, text = value + Fraction(int(decimals), 10 ** len(decimals)), f"{text}.{decimals}"
    elif draw(st.booleans()):
        below = draw(st.integers(1, 1000))
        value, text = value / below, f"{text}/{below}"
    currency = draw(st.sampled_from(["", "$", "€", "£", "¥"]))
    sign = draw(st.sampled_from(["", "+", "-", "−"]))
    text = draw(st.sampled_from([sign + currency, currency + sign])) + text + draw(st.sampled_from(["", "."]))
    space = st.text(" \t\n", max_size=3)
    return draw(space) + text + draw(space), -value if sign in ("-", "−") and sign else value


@given(spelled())
def test_every_spelling_is_read_as_its_value(case):
    text, value = case
    assert number(text) == value
    exact = f"{value.numerator}/{value.denominator}"
    assert score(answered(text), exact) == RIGHT
    assert score(answered(text), f"{value.numerator * 10**9 + 1}/{value.denominator * 10**9}") == WRONG


def test_comparison_is_exact_where_floats_are_not():
    assert score(answered("0.3"), "3/10") == RIGHT
    assert score(answered("9007199254740993"), "9007199254740992") == WRONG
    assert score(answered("0.1000000000000000055511151231257827"), "0.1") == WRONG
    assert score(answered("0.333333333333333333"), "1/3") == WRONG


def test_a_unicode_minus_is_a_minus_and_never_dropped():
    assert score(answered("−5"), "-5") == score(answered("-5"), "−5") == RIGHT
    assert score(answered("−5"), "5") == WRONG


# --- format ---

@pytest.mark.parametrize("completion", [
    "<answer>5</answer>", "<answer> 5 </answer>\n", "<think>2 + 3</think><answer>5</answer>",
    "2 + 3 is <answer>5</answer>", "<think></think><answer>5</answer>",
    "<think>\n2 + 3 = 6? no: 5\n</think>\n\n<answer>\n5\n</answer>  \n\t",
    "First.<think>a</think> So:\n<answer>$5.00</answer>", "<think>< answer>7</ANSWER></think><answer>5</answer>"])
def test_one_block_at_the_end_is_right(completion):
    assert score(completion, "5") == RIGHT
    assert score(completion, "6") == WRONG


@pytest.mark.parametrize("completion", [
    "", "5", "#### 5", "The answer is 5.", "<answer>", "</answer>", "<answer></answer>", "<answer> </answer>",
    "<answer>5", "5</answer>", "<answer>5<answer>", "</answer>5<answer>", "<Answer>5</Answer>", "<answer >5</answer>",
    "<answer>5</answer><answer>5</answer>", "<answer>6</answer><answer>5</answer>",
    "<answer>5</answer><answer></answer>", "<answer><answer>5</answer></answer>",
    "<answer><answer>5</answer>", "<answer>5</answer></answer>",
    "<answer>5</answer><answer>", "<answer>5</answer>.", "<answer>5</answer> is it", "<answer>5</answer><|im_end|>",
    "<answer>5</answer>\n5", "<answer>5</answer>\u200b", "<answer>5</answer>\x00", "<think><answer>5</answer>",
    "<think><answer>5</answer></think>", "<think>a</think><think>b</think><answer>5</answer>",
    "</think><answer>5</answer>", "<think>a<answer>5</answer></think>",
    "<think><think>a</think></think><answer>5</answer>",
    "<answer>5</answer><think>a</think>", "<answer><think>a</think>5</answer>", "<answer>5</think></answer>",
    "</think><think><answer>5</answer>", "<answer>5 6</answer>", "<answer>5, 5</answer>", "<answer>5 or 6</answer>",
    "<answer>5</answer>" * 50, "<answer>" * 50 + "5" + "</answer>" * 50])
def test_anything_else_earns_nothing(completion):
    assert score(completion, "5") == MALFORMED


TOKENS = ["<think>", "</think>", "<answer>", "</answer>", "<answer>5</answer>", "#### ", "5", "6", "1,000", "-", "−",
          ",", ".", "/", "$", " ", "\n", "x"]
PIECES = st.lists(st.sampled_from(TOKENS) | st.text(max_size=4), max_size=12).map("".join)


@given(PIECES)
@settings(max_examples=500)
def test_nothing_but_one_final_block_with_the_value_is_right(completion):
    correct, format_ok = score(completion, "5")
    assert format_ok or not correct
    head, tag, rest = completion.partition("<answer>")
    inside, end, after = rest.partition("</answer>")
    alone = completion.count("<answer>") == completion.count("</answer>") == 1 and tag and end and not after.strip()
    thinking = [head.count("<think>"), head.count("</think>")]
    closed = thinking == [0, 0] or thinking == [1, 1] and head.index("<think>") < head.index("</think>")
    assert format_ok == bool(alone and closed and number(inside) is not None)
    assert correct == (format_ok and number(inside) == 5)


@given(PIECES)
@settings(max_examples=300)
def test_no_completion_raises(completion):
    for task in TASKS.values():
        assert all(type(value) is bool for value in (*task.score(completion, "5"), *task.score_plain(completion, "5"),
                                                     task.lenient(completion, "5")))


@given(st.text(min_size=1).filter(str.strip))
def test_whatever_follows_the_block_spoils_it(junk):
    assert score(answered("5") + junk, "5") == MALFORMED


@given(st.text().filter(lambda text: not tasks.TAGS.search(text)))
def test_text_before_the_block_changes_nothing(text):
    assert score(text + "<answer>5</answer>", "5") == RIGHT
    assert score(f"<think>{text}</think><answer>5</answer>", "5") == RIGHT


@given(st.integers(), st.integers())
def test_the_right_answer_beside_another_one_is_not_right(a, b):
    assert score(answered(a) + answered(b), str(b)) == score(answered(f"{a} {b}"), str(b)) == MALFORMED


def test_an_unreadable_key_is_matched_by_nothing():
    assert score(answered("5"), "five") == WRONG
    assert score(answered("five"), "five") == MALFORMED


@pytest.mark.parametrize("completion, value", [
    ("It is 4. No: 5", 5), ("5-3", 3), ("5 -3", -3), ("= -3", -3), ("so −3.", -3), ("$1,234.50 in all", "1234.5"),
    ("costs -$5", -5), ("<answer>7</answer>", 7), ("3/4 cup", "3/4"), ("a 1, b 2,", 2), ("x7y", 7), (".5", "1/2"),
    ("(8)-2", 2), ("#### 12", 12), ("7 %", 7)])
def test_lenient_takes_the_last_number_anywhere(completion, value):
    assert ARITHMETIC.lenient(completion, str(value))
    assert not ARITHMETIC.lenient(completion, "99")


def test_lenient_finds_no_number_where_there_is_none():
    assert not ARITHMETIC.lenient("none at all", "0")
    assert not ARITHMETIC.lenient("9" * 10_000, "9")


# --- generated questions ---

def evaluate(node):
    """The value of an expression by Python's own grammar."""
    if isinstance(node, ast.BinOp):
        sign = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}[type(node.op)]
        return sign(evaluate(node.left), evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -evaluate(node.operand)
    return node.value


def value_of(text):
    return evaluate(ast.parse(text, mode="eval").body)


@pytest.mark.parametrize("split", SPLITS)
def test_arithmetic_answers_and_every_step_are_true(split):
    for question in ARITHMETIC.questions(split, seed=3, limit=500):
        expression = question.problem.removeprefix("What is ").removesuffix("?")
        assert int(question.answer) == value_of(expression)
        steps = question.worked.partition("<think>\n")[2].partition("\n</think>")[0].splitlines()
        assert steps[-1].endswith(f"= {question.answer}")
        assert all(value_of(left) == int(right) for left, right in (step.split(" = ") for step in steps))


@pytest.mark.parametrize("name", GENERATED)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=20)
def test_worked_answers_are_right_by_every_verifier(name, seed):
    task = TASKS[name]
    for question in task.questions("train", seed=seed, limit=20):
        assert task.score(question.worked, question.answer) == RIGHT
        assert task.score_plain(task.plain_answer(question), question.answer) == (True, True)
        assert task.lenient(question.worked, question.answer) and not question.flawed


def test_arithmetic_has_negatives_products_and_two_to_four_terms():
    questions = list(ARITHMETIC.questions("train", limit=300))
    assert any(question.answer.startswith("-") for question in questions)
    terms = {len(re.split(r" [+-] ", question.problem)) for question in questions}
    assert terms == {2, 3, 4} and any("*" in question.problem for question in questions)


@pytest.mark.parametrize("name", GENERATED)
def test_no_problem_is_on_two_sides_whatever_the_seeds_and_flaws(name):
    found = {split: {q.problem for seed, flawed in [(0, 0), (1, 0.6), (2, 1)]
                     for q in TASKS[name].questions(split, seed, limit=300, flawed=flawed)} for split in SPLITS}
    for a, b in itertools.combinations(SPLITS, 2):
        assert not found[a] & found[b]


@pytest.mark.parametrize("name", GENERATED)
def test_nine_tenths_of_the_problems_are_train(name):
    task, seen = TASKS[name], dict.fromkeys(SPLITS, 0)
    streams = {split: {q.key for q in task.questions(split, 1, limit=200)} for split in ("dev", "test")}
    generator = random.Random(1)
    for _ in range(8000):
        key = tasks.content_key(task.source(generator)[0].encode())
        side = "train" if key < 0.9 * 2**64 else "dev" if key < 0.95 * 2**64 else "test"
        seen[side] += 1
        if side != "train" and seen[side] <= 150:
            assert key in streams[side]
    assert 0.88 < seen["train"] / 8000 < 0.92 and 0.04 < seen["dev"] / 8000 < 0.06 and 0.04 < seen["test"] / 8000 < 0.06


@pytest.mark.parametrize("name", GENERATED)
def test_the_hash_of_the_problems_is_uniform(name):
    """Of the distinct problems of a stream's train side, over ten bins of equal width: chi-squared at 8 degrees."""
    keys = {q.key for q in TASKS[name].questions("train", limit=3000)}
    counts = [0] * 9
    for key in keys:
        counts[key * 10 // 2**64] += 1
    expected = len(keys) / 9
    assert sum((count - expected) ** 2 / expected for count in counts) < 26.1       # p = 0.001


@pytest.mark.parametrize("name", GENERATED)
def test_a_seed_repeats_and_another_differs(name):
    first, again, other = (list(TASKS[name].questions("train", seed, limit=50, flawed=0.5)) for seed in (7, 7, 8))
    assert first == again and first != other
    assert [q.problem for q in TASKS[name].questions("train", 7, limit=3)] == [q.problem for q in first[:3]]


@pytest.mark.parametrize("name, problem, key", [
    ("arithmetic", "What is 40 + 23?", 17797691110926405615),
    ("addition", "6 9 7 - 4 6 6 = ?", 18256586545969204706),
    ("sorting", "Sort 2 8 7 1 1", 17844840267266719414),
    ("grid", "From d5 to c3, walls b3 c1 d4", 17906458123781742472),
    ("letters", "How many o are in namonimi?", 18025435191088792291),
    ("countdown", "Make 64 from 7 5 62", 17909101580712026652)])
def test_the_first_questions_are_the_same_on_every_machine(name, problem, key):
    (first,) = TASKS[name].questions("test", limit=1)
    assert (first.problem, first.key) == (problem, key)


@pytest.mark.parametrize("name", GENERATED)
def test_dev_and_test_repeat_no_problem_and_hold_a_thousand(name):
    for split in ("dev", "test"):
        problems = [question.problem for question in TASKS[name].questions(split, limit=1000)]
        assert len(problems) == len(set(problems)) == 1000


def test_test_questions_end_where_there_are_no_more():
    def ten(generator):
        n = generator.randrange(200)
        return f"{n}?", str(n), ("", str(n)), ("", str(n))
    found = list(tasks.generated_questions(ten, "test", 0, 0))
    assert 2 < len(found) == len({*found}) < 25
    assert {*found} == {*tasks.generated_questions(ten, "test", 1, 0)}          # all there are, whatever the seed


def test_without_a_limit_generated_questions_do_not_end():
    assert len(list(itertools.islice(ARITHMETIC.questions("train"), 5000))) == 5000


@pytest.mark.parametrize("name", GENERATED)
def test_questions_and_worked_answers_are_short(name):
    for question in TASKS[name].questions("train", limit=300):
        assert len(TASKS[name].messages(question)[0]["content"]) < 130
        assert len(question.worked) < 200
        assert "\n" not in question.problem and len(question.answer) < 20


# --- what each generated task asks, read anew from the problem ---

def steps_of(question):
    return question.worked.partition("<think>\n")[2].partition("\n</think>")[0]


def reply_of(question):
    return question.worked.partition("<answer>")[2].partition("</answer>")[0]


def test_addition_is_true_in_every_column():
    signs, sizes = set(), set()
    for question in TASKS["addition"].questions("train", limit=1000):
        a, sign, b = re.fullmatch(r"([0-9 ]+) ([+-]) ([0-9 ]+) = \?", question.problem).groups()
        signs.add(sign)
        sizes.add(len(a.split()))
        assert value_of(a.replace(" ", "") + sign + b.replace(" ", "")) == int(question.answer) >= 0
        columns = [step.split("=") for step in steps_of(question).split("\n")]
        assert all(value_of(left) == int(right) for left, right in columns) and len(columns) == len(a.split())
        assert int("".join(right if i == 0 else right[-1] for i, (_, right) in enumerate(reversed(columns)))) == int(
            question.answer)
    assert signs == {"+", "-"} and sizes == {2, 3}


@pytest.mark.parametrize("text, verdict", [
    ("75", True), ("7 5", True), (" 7 5\n", True), ("75.0", True), ("0 7 5", True), ("7 4", False), ("5 7", False),
    ("-7 5", False), ("7  5", None), ("7, 5", None), ("7 5 or 7 4", None), ("", None), (" ", None),
    ("7 " * 60, False), ("7 5" + " " * 200 + "7", None), ("7 5" + " " * 98 + "or 7 4", None)])
def test_sums_are_read_with_their_digits_apart_or_together(text, verdict):
    assert TASKS["addition"].accepts(text, "75") is verdict


def test_a_digit_apart_is_no_number_elsewhere():
    assert TASKS["letters"].score(answered("7 5"), "75") == ARITHMETIC.score(answered("7 5"), "75") == MALFORMED


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_digits_are_right_in_one_order_only(digits, shuffler):
    accepts, answer = TASKS["sorting"].accepts, " ".join(map(str, sorted(digits)))
    other = digits[:]
    shuffler.shuffle(other)
    for separator in (" ", ", ", ",", "\n"):
        assert accepts(separator.join(map(str, other)), answer) is (other == sorted(digits))
    assert accepts(answer + " 9", answer) is False and accepts(f"{answer}9", answer) is None


@pytest.mark.parametrize("text", ["", " ", ",", "12", "1 2 x", "1-2", "1 2.", "one", "[1, 2]", "1 -2", "1 ²", "1 ٢"])
def test_what_is_no_list_of_digits_earns_nothing(text):
    assert TASKS["sorting"].score(f"<answer>{text}</answer>", "1 2") == MALFORMED


def test_sorting_sorts():
    for question in TASKS["sorting"].questions("train", limit=500):
        digits = question.problem.removeprefix("Sort ").split()
        assert reply_of(question).split() == sorted(digits) == steps_of(question).replace(",", "").split()


def follow(problem, moves):
    """Where the moves of a path lead, by coordinates; None off the board or into a wall."""
    start, goal, walls = re.fullmatch(r"From (\w\d) to (\w\d), walls (.*)", problem).groups()
    x, y = "abcde".index(start[0]), int(start[1])
    for move in moves:
        x, y = x + (move == "right") - (move == "left"), y + (move == "up") - (move == "down")
        if not (0 <= x < 5 and 1 <= y <= 5) or f"{'abcde'[x]}{y}" in walls.split():
            return None, goal
    return f"{'abcde'[x]}{y}", goal


@given(st.integers(0, 2**32), st.lists(st.sampled_from(["up", "down", "left", "right"]), min_size=1, max_size=12))
@settings(max_examples=300)
def test_any_way_to_the_goal_is_right_and_no_other(seed, moves):
    task = TASKS["grid"]
    (question,) = task.questions("train", seed, limit=1)
    at, goal = follow(question.problem, moves)
    assert task.score(f"<answer>{' '.join(moves)}</answer>", question.answer) == (at == goal, True)
    # there and back again, and on to the goal
    back = {"up": "down", "down": "up", "left": "right", "right": "left"}
    if at:
        detour = [*moves, *(back[move] for move in reversed(moves)), *reply_of(question).split()]
        assert task.score(f"<answer>{', '.join(detour)}</answer>", question.answer) == RIGHT


@pytest.mark.parametrize("text", ["", " ", "b3", "rightright", "Right", "right; up", "right up.", "R", "right 1"])
def test_what_is_no_list_of_moves_earns_nothing(text):
    assert TASKS["grid"].score(f"<answer>{text}</answer>", "a1 c1 b5 d5 e5") == MALFORMED


def test_the_worked_way_is_a_shortest_and_names_its_squares():
    for question in TASKS["grid"].questions("train", limit=200):
        moves, squares = steps_of(question).split()[1::2], steps_of(question).split()[::2]
        assert moves == reply_of(question).split() and len(moves) >= 2
        assert [follow(question.problem, moves[:n])[0] for n in range(len(moves) + 1)] == squares
        reached = {squares[0]}
        for _ in moves:                                         # one move further each time
            assert squares[-1] not in reached
            reached = {follow(question.problem.replace(squares[0], at, 1), [move])[0] for at in reached if at
                       for move in ("up", "down", "left", "right")}
        assert squares[-1] in reached


def test_letters_counts_letters():
    answers = set()
    for question in TASKS["letters"].questions("train", limit=500):
        letter, word = re.fullmatch(r"How many (.) are in (\w+)\?", question.problem).groups()
        assert int(question.answer) == sum(x == letter for x in word)
        assert re.sub("[0-9 ]", "", steps_of(question)) == word and steps_of(question)[-1] == question.answer
        answers.add(question.answer)
    assert answers >= {"0", "1", "2", "3"}


@pytest.mark.parametrize("text, verdict", [
    ("3*5+9", True), ("9 + 3 * 5", True), (" (5 * 3) + 9\n", True), ("5 × 3 + 9", True), ("9 − 5 * 3", False),
    ("3*5+9+0", False), ("24", False), ("3+5+9", False), ("3*5", False), ("3*5+9*1", False), ("15+9", False),
    ("9/(3-3)", False), ("3/(5-5)+9", False), ("3*5+9=24", None), ("=24", None), ("-3*-5+9", None), ("+9+3*5", None),
    ("3**5+9", None), ("9//5+3", None), ("", None), (" ", None), ("()", None), ("3 5 9", None), ("3(5)+9", None),
    ("abs(3)*5+9", None), ("3*5+09", None), ("3*5+9.0", None), ("3_0", None), ("(3*5+9", None), ("3*5+9)", None),
    ("__import__", None), ("9" * 200, None), ("(" * 50 + "9" + ")" * 50, None), ("(" * 40 + "9" + ")" * 40, False),
    ("9**9**9**9", None), ("3,5", None)])
def test_an_expression_is_right_that_makes_the_target_of_its_numbers(text, verdict):
    assert TASKS["countdown"].accepts(text, "24 3 5 9") is verdict


@given(st.permutations([0, 1, 2, 3]), st.lists(st.integers(1, 20), min_size=4, max_size=4),
       st.lists(st.sampled_from("+-*/"), min_size=3, max_size=3), st.integers(0, 4))
def test_any_order_and_brackets_are_right(order, numbers, signs, shape):
    a, b, c, d = (numbers[i] for i in order)
    x, y, z = signs
    text = [f"(({a}{x}{b}){y}{c}){z}{d}", f"({a}{x}({b}{y}{c})){z}{d}", f"({a}{x}{b}){y}({c}{z}{d})",
            f"{a}{x}(({b}{y}{c}){z}{d})", f"{a} {x} {b} {y} {c} {z} {d}"][shape]
    try:                                                        # Python's own arithmetic, over Fractions
        value = eval(re.sub("[0-9]+", r"Fraction(\g<0>)", text), {"Fraction": Fraction})
    except ZeroDivisionError:
        value = None
    given_numbers = " ".join(map(str, numbers))
    for target in {0, 1, 7} | ({int(value)} if value is not None else set()):
        assert TASKS["countdown"].accepts(text, f"{target} {given_numbers}") is (value == target)
        assert TASKS["countdown"].accepts(text, f"{target} {given_numbers} 1") is False
        assert TASKS["countdown"].accepts(text, f"{target} {' '.join(given_numbers.split()[1:])}") is False


def test_every_line_of_countdown_is_true_and_only_the_last_try_hits():
    for question in TASKS["countdown"].questions("train", limit=500):
        target, *numbers = map(int, re.findall("[0-9]+", question.problem))
        assert question.answer == " ".join(map(str, (target, *numbers))) and 1 <= target <= 99
        tries = []
        for line in steps_of(question).split("\n"):
            equations = [equation.split("=") for equation in line.split()]
            assert all(value_of(left) == int(right) for left, right in equations)
            tries += [int(right) for _, right in equations[1:]]
        assert tries[-1] == target and target not in tries[:-1]


# --- a flawed demonstrator ---

@pytest.mark.parametrize("name", GENERATED)
def test_flawed_answers_are_wrong_in_the_right_format_and_the_truth_stays(name):
    task = TASKS[name]
    pairs = list(zip(task.questions("train", limit=500), task.questions("train", limit=500, flawed=1.0)))
    for right, shown in pairs:
        assert (right.problem, right.answer, right.key) == (shown.problem, shown.answer, shown.key)
        if name == "arithmetic":                                # answers at once: rightly, but without the steps
            assert shown.flawed and not steps_of(shown) and task.score(shown.worked, shown.answer) == RIGHT
        elif shown.flawed:
            assert task.score(shown.worked, shown.answer) == WRONG
            assert task.score_plain(task.plain_answer(shown), shown.answer) == (False, False)
        else:
            assert right == shown                               # the mistake changes nothing here
    assert sum(shown.flawed for _, shown in pairs) >= 200


@pytest.mark.parametrize("name", GENERATED)
def test_the_share_is_kept_and_the_same_problem_is_always_shown_alike(name):
    task = TASKS[name]
    able, some = ([q for q in task.questions("train", 5, limit=3000, flawed=share)] for share in (1.0, 0.6))
    able = [question.flawed for question in able]
    assert 0.55 < sum(question.flawed for question in some) / sum(able) < 0.65
    assert all(can or not question.flawed for can, question in zip(able, some))
    more = {question.problem: question for question in task.questions("train", 5, limit=3000, flawed=0.8)}
    for question in some:
        assert not question.flawed or more[question.problem].flawed
    shown = {}
    for question in some:
        assert shown.setdefault(question.problem, question) == question


def test_each_mistake():
    for question in TASKS["addition"].questions("train", limit=500, flawed=1.0):
        a, sign, b = re.fullmatch(r"([0-9 ]+) ([+-]) ([0-9 ]+) = \?", question.problem).groups()
        columns = [(int(x), int(y)) for x, y in zip(a.split(), b.split())]
        if question.flawed and sign == "+":
            first, *others = [x + y for x, y in columns]
            digits = str(first) + "".join(str(result % 10) for result in others)
        elif question.flawed:
            digits = str(int("".join(str(abs(x - y)) for x, y in columns)))
        else:
            continue
        assert reply_of(question).replace(" ", "") == digits
    for question in TASKS["sorting"].questions("train", limit=200, flawed=1.0):
        assert reply_of(question).split() == sorted({*question.problem.split()[1:]})
    for question in TASKS["grid"].questions("train", limit=200, flawed=1.0):
        at, goal = follow(question.problem, reply_of(question).split())
        assert sum(abs(ord(x) - ord(y)) for x, y in zip(at, goal)) == 1 and steps_of(question).endswith(at)
    for question in TASKS["letters"].questions("train", limit=200, flawed=1.0):
        assert reply_of(question) == str(min(1, int(question.answer)))
    for question in TASKS["countdown"].questions("train", limit=200, flawed=1.0):
        numbers = re.findall("[0-9]+", question.problem)[1:]
        assert reply_of(question) == "+".join(numbers) or not question.flawed and len(steps_of(question)) > 0


def test_an_impossible_share_is_one_sentence(tmp_path):
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1") as error:
            TASKS["sorting"].questions("train", flawed=share)
        assert one_sentence(error)
    with pytest.raises(ValueError, match="published answers") as error:
        TASKS["gsm8k"].questions("test", path=write(tmp_path / "test.jsonl", gsm8k_rows(1)), flawed=0.5)
    assert one_sentence(error)


# --- published files ---

def write(path, rows):
    text = json.dumps(rows) if ".json" in path.suffixes else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def gsm8k_rows(n, word="apples"):
    return [{"question": f"{i} {word} and {i}?", "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
            for i in range(n)]


@needs_gsm8k
def test_gsm8k_splits_have_the_published_sizes_and_share_nothing():
    found = {split: list(TASKS["gsm8k"].questions(split, path=DATA / "eval/gsm8k")) for split in SPLITS}
    assert len(found["train"]) + len(found["dev"]) == 7473 and len(found["test"]) == 1319
    assert 300 < len(found["dev"]) < 450
    keys = [question.key for split in SPLITS for question in found[split]]
    assert len(keys) == len(set(keys))


@needs_gsm8k
def test_every_gsm8k_worked_answer_is_right_and_has_no_calculator_marks():
    for split in SPLITS:
        for question in TASKS["gsm8k"].questions(split, path=DATA / "eval/gsm8k"):
            assert TASKS["gsm8k"].score(question.worked, question.answer) == RIGHT
            assert TASKS["gsm8k"].lenient(question.worked, question.answer)
            assert "<<" not in question.worked and "####" not in question.worked


def test_gsm8k_texts(tmp_path):
    path = write(tmp_path / "test.jsonl", gsm8k_rows(2))
    _, question = TASKS["gsm8k"].questions("test", path=path)
    task = TASKS["gsm8k"]
    assert task.plain(question) == "Question: 1 apples and 1?\nAnswer:"
    assert task.plain_answer(question) == " 1+1=<<1+1=2>>2\n#### 2"
    assert question.worked == "<think>\n1+1=2\n</think><answer>2</answer>"
    (message,) = task.messages(question)
    assert message["role"] == "user" and message["content"].startswith("1 apples and 1?\n")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz"])
def test_a_folder_gives_each_split_its_file(tmp_path, suffix):
    write(tmp_path / f"train{suffix}", gsm8k_rows(200))
    file = write(tmp_path / f"test{suffix}", gsm8k_rows(5, "pears"))
    train, dev, test = (list(TASKS["gsm8k"].questions(split, path=str(tmp_path))) for split in SPLITS)
    assert len(train) + len(dev) == 200 and 0 < len(dev) < 30 and not {*train} & {*dev}
    assert len(test) == 5 and all("pears" in question.problem for question in test)
    assert list(TASKS["gsm8k"].questions("test", path=file)) == test


def test_a_row_stays_on_its_side_when_the_file_grows_or_is_shuffled(tmp_path):
    path = write(tmp_path / "train.jsonl", gsm8k_rows(100))
    before = {*TASKS["gsm8k"].questions("dev", path=path)}
    write(path, gsm8k_rows(300)[::-1])
    assert before and before < {*TASKS["gsm8k"].questions("dev", path=path)}


def test_seed_0_keeps_the_published_order_and_others_shuffle_and_limit_cuts(tmp_path):
    path = write(tmp_path / "test.jsonl", gsm8k_rows(30))
    in_order = list(TASKS["gsm8k"].questions("test", path=path))
    assert [question.answer for question in in_order] == [str(2 * i) for i in range(30)]
    shuffled = list(TASKS["gsm8k"].questions("test", 1, path))
    assert shuffled != in_order and {*shuffled} == {*in_order}
    assert list(TASKS["gsm8k"].questions("test", path=path, limit=4)) == in_order[:4]


def test_a_file_named_for_the_other_split_is_refused(tmp_path):
    for split, name in [("train", "test.jsonl"), ("dev", "gsm8k_test.jsonl"), ("test", "train.jsonl")]:
        with pytest.raises(ValueError, match=f"not the {split} split") as error:
            TASKS["gsm8k"].questions(split, path=write(tmp_path / name, gsm8k_rows(1)))
        assert one_sentence(error)
    write(tmp_path / "SVAMP.json", SVAMP)
    for path in (tmp_path / "SVAMP.json", tmp_path):
        with pytest.raises(ValueError, match="train"):
            TASKS["svamp"].questions("train", path=path)


SVAMP = [
    {"ID": "chal-1", "Body": "Each pack costs 76 dollars. If there is a discount of 25 dollars on each pack",
     "Question": "How much is a pack?", "Equation": "( 76.0 - 25.0 )", "Answer": 51.0, "Type": "Subtraction"},
    {"ID": "chal-14", "Body": "Ron is 13 feet tall.", "Question": "How deep was the water?",
     "Equation": "( ( 4.0 + 13.0 ) * 1.5 )", "Answer": "25.5", "Type": "Multiplication"}]


def test_svamp_texts(tmp_path):
    write(tmp_path / "SVAMP.json", SVAMP)
    first, second = TASKS["svamp"].questions("test", path=tmp_path)
    assert first.problem == ("Each pack costs 76 dollars. If there is a discount of 25 dollars on each pack. "
                             "How much is a pack?")
    assert second.problem == "Ron is 13 feet tall. How deep was the water?"
    assert (first.answer, first.solution) == ("51", "76 - 25 = 51\n#### 51")
    assert (second.answer, second.solution) == ("25.5", "(4 + 13) * 1.5 = 25.5\n#### 25.5")
    for question in (first, second):
        assert TASKS["svamp"].score(question.worked, question.answer) == RIGHT
        assert TASKS["svamp"].score_plain(question.solution, question.answer) == (True, True)


def test_svamp_takes_question_concat_as_it_is(tmp_path):
    row = {**SVAMP[0], "question_concat": "Two and two ?", "Equation": "( 2.0 + 2.0 )", "Answer": "4.0"}
    (question,) = TASKS["svamp"].questions("test", path=write(tmp_path / "test.jsonl", [row]))
    assert (question.problem, question.answer) == ("Two and two ?", "4")


# --- what a user can get wrong ---

@pytest.mark.parametrize("name", TASKS)
def test_an_unknown_split_is_named_at_once(name):
    with pytest.raises(ValueError, match="train, dev, test, not 'validation'"):
        TASKS[name].questions("validation", path="x")


def test_a_file_task_needs_a_path_and_a_generated_one_refuses_it(tmp_path):
    with pytest.raises(ValueError, match="give their folder") as error:
        TASKS["svamp"].questions("test")
    assert one_sentence(error)
    with pytest.raises(ValueError, match="reads no file") as error:
        ARITHMETIC.questions("test", path=tmp_path)
    assert one_sentence(error)


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="there is no file") as error:
        TASKS["gsm8k"].questions("test", path=tmp_path / "nowhere")
    assert one_sentence(error)
    with pytest.raises(ValueError, match="looked for test.jsonl") as error:
        TASKS["gsm8k"].questions("test", path=tmp_path)
    assert one_sentence(error)


@pytest.mark.parametrize("name, row", [
    ("gsm8k", {"prompt": "1?", "label": 3}), ("gsm8k", {"question": "1?", "answer": "1"}), ("gsm8k", {}),
    ("gsm8k", {"question": "1?", "answer": "x\n#### one"}), ("gsm8k", {"question": "1?", "answer": 1}),
    ("gsm8k", {"question": None, "answer": "x\n#### 1"}), ("svamp", {"Body": "a", "Question": "b", "Answer": 4}),
    ("svamp", {"Body": "a", "Equation": "4", "Answer": 4}), ("svamp", {"Body": 1, "Question": "b", "Equation": "4",
                                                                         "Answer": 4}),
    ("svamp", {"question_concat": "a", "Equation": "4", "Answer": "four"}), ("svamp", gsm8k_rows(1)[0])])
def test_a_row_of_the_wrong_shape_is_one_sentence_with_its_columns(tmp_path, name, row):
    with pytest.raises(ValueError, match=f"row 1 of .* is not of {name}") as error:
        TASKS[name].questions("test", path=write(tmp_path / "test.jsonl", [row]))
    assert one_sentence(error) and all(column in str(error.value) for column in row)


@pytest.mark.parametrize("name, content, said", [
    ("test.jsonl", b"", "no rows"), ("test.jsonl", b"{", "not JSON"), ("test.jsonl", b"[1, 2]", "row 1 of"),
    ("test.jsonl", b"\xff", "not UTF-8"), ("test.json.gz", b"no gzip", "damaged"), ("test.parquet", b"", "no type"),
    ("test.jsonl.gz", gzip.compress(b'{"question": 1}' * 1000, mtime=0)[:-20], "damaged"),
    ("test.jsonl", b'"text"\n', "row 1 of")])
def test_a_damaged_file_is_one_sentence(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        TASKS["gsm8k"].questions("test", path=tmp_path / name)
    assert one_sentence(error)
