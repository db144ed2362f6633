"""The verifier cannot be talked round, worked answers are right, and no test question is ever trained on."""
import ast
import gzip
import itertools
import json
import operator
import os
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


@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_worked_answers_are_right_by_every_verifier(seed):
    for question in ARITHMETIC.questions("train", seed=seed, limit=20):
        assert ARITHMETIC.score(question.worked, question.answer) == RIGHT
        assert ARITHMETIC.score_plain(ARITHMETIC.plain_answer(question), question.answer) == (True, True)
        assert ARITHMETIC.lenient(question.worked, question.answer)


def test_arithmetic_has_negatives_products_and_two_to_four_terms():
    questions = list(ARITHMETIC.questions("train", limit=300))
    assert any(question.answer.startswith("-") for question in questions)
    terms = {len(re.split(r" [+-] ", question.problem)) for question in questions}
    assert terms == {2, 3, 4} and any("*" in question.problem for question in questions)


def test_no_problem_is_on_two_sides_whatever_the_seeds():
    found = {split: {q.problem for seed in range(3) for q in ARITHMETIC.questions(split, seed, limit=600)}
             for split in SPLITS}
    for a, b in itertools.combinations(SPLITS, 2):
        assert not found[a] & found[b]


def test_nine_tenths_of_the_problems_are_train():
    seen = {split: 0 for split in SPLITS}
    streams = {split: {q.key for q in ARITHMETIC.questions(split, 1, limit=400)} for split in ("dev", "test")}
    for question in (tasks.arithmetic(generator) for generator in [tasks.random.Random(1)] for _ in range(8000)):
        place = question.key / 2**64
        side = "train" if place < 0.9 else "dev" if place < 0.95 else "test"
        seen[side] += 1
        if side != "train" and seen[side] <= 300:
            assert question.key in streams[side]
    assert 0.88 < seen["train"] / 8000 < 0.92 and 0.04 < seen["dev"] / 8000 < 0.06 and 0.04 < seen["test"] / 8000 < 0.06


def test_a_seed_repeats_and_another_differs():
    first, again, other = (list(ARITHMETIC.questions("train", seed, limit=50)) for seed in (7, 7, 8))
    assert first == again and first != other
    assert [q.problem for q in ARITHMETIC.questions("train", 7, limit=3)] == [q.problem for q in first[:3]]


def test_the_first_questions_are_the_same_on_every_machine():
    first, second = ARITHMETIC.questions("test", limit=2)
    assert (first.problem, first.key) == ("What is 40 + 23?", 17797691110926405615)
    assert second.problem == "What is 2 - 5 * 6?"


def test_dev_and_test_repeat_no_problem():
    for split in ("dev", "test"):
        problems = [question.problem for question in ARITHMETIC.questions(split, limit=2000)]
        assert len(problems) == len(set(problems)) == 2000


def test_without_a_limit_generated_questions_do_not_end():
    assert len(list(itertools.islice(ARITHMETIC.questions("train"), 5000))) == 5000


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
    ("test.jsonl.gz", gzip.compress(b'{"question": 1}' * 1000)[:-20], "damaged"),
    ("test.jsonl", b'"text"\n', "row 1 of")])
def test_a_damaged_file_is_one_sentence(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        TASKS["gsm8k"].questions("test", path=tmp_path / name)
    assert one_sentence(error)
