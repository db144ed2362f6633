"""GSM8K as lm-evaluation-harness scores and prompts it: its filters, its metric and its templates beside ours."""
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import TASKS, read_rows

extraction = pytest.importorskip("lm_eval.filters.extraction", reason="lm_eval is not installed here")
metrics = pytest.importorskip("lm_eval.api.metrics", reason="lm_eval is not installed here")
utils = pytest.importorskip("lm_eval.utils", reason="lm_eval is not installed here")
yaml = pytest.importorskip("yaml")

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")
ROOT = Path(__file__).resolve().parents[2]
GSM8K = Path(os.environ.get("ZERO2CHAT_DATA") or ROOT.parent / "shared" / "data") / "eval" / "gsm8k"
needs_data = pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no {GSM8K}; set ZERO2CHAT_DATA")

TASK = TASKS["gsm8k"]
YAML = yaml.safe_load((Path(extraction.__file__).parents[1] / "tasks/gsm8k/gsm8k.yaml").read_text(encoding="utf-8"))
FILTERS = {}
for entry in YAML["filter_list"]:
    regex, first = entry["filter"]
    assert (regex.pop("function"), first["function"]) == ("regex", "take_first")
    FILTERS[entry["name"]] = extraction.RegexFilter(**regex)
(METRIC,) = YAML["metric_list"]
OPTIONS = {name: METRIC[name] for name in ("regexes_to_ignore", "ignore_case", "ignore_punctuation")}


def harness(completion, solution):
    """(strict-match, flexible-extract) of the harness; solution is its target: the whole published answer."""
    scores = []
    for name in ("strict-match", "flexible-extract"):
        ((extracted,),) = FILTERS[name].apply([[completion]], [{}])
        match = metrics.exact_match_fn(predictions=[extracted], references=[solution], **OPTIONS)["exact_match"]
        scores.append(bool(match))
    return tuple(scores)


def check(completion, solution):
    answer = solution.rpartition("#### ")[2]
    assert TASK.score_plain(completion, answer) == harness(completion, solution), (completion, answer)


@needs_data
def test_scores_agree_on_every_training_answer_given_whole_in_part_and_to_another_question():
    solutions = [row["answer"] for row in read_rows(GSM8K / "train.jsonl.gz")]
    assert len(solutions) == 7473
    for solution, other in zip(solutions, solutions[1:] + solutions[:1]):
        assert harness(solution, solution) == (True, True)
        steps, _, answer = solution.rpartition("\n#### ")
        for completion in (solution, steps, f"{steps}\nThe answer is {answer}.", other):
            check(completion, solution)


@needs_data
def test_prompts_are_the_harnesss():
    for split in ("train", "test"):
        rows = {row["question"]: row for row in read_rows(GSM8K / f"{split}.jsonl.gz")}
        for question in TASK.questions(split, path=GSM8K):
            row = rows[question.problem]
            assert TASK.plain(question) == utils.apply_template(YAML["doc_to_text"], row)
            assert TASK.plain_answer(question) == " " + utils.apply_template(YAML["doc_to_target"], row)


def test_stops_are_the_harnesss():
    assert list(TASK.stop) == YAML["generation_kwargs"]["until"]


NUMBERS = ["18", "-18", "−18", "18.", "18.0", "18.00", "$18", "-$18", "$-18", "18$", "1,000", "1000", "1,00,0",
           "1.000,00", ".5", "0.5", "5", "-5", "--5", "5-", "18%", "18 dollars", "1 8", "18/2", "1e3"]
FRAMES = ["{}", "#### {}", "####{}", "####  {}", "#### {}\n#### 7", "#### 7\n#### {}", "The answer is {}.",
          "so 3 + 4 = {}.\n#### {}\n\nQuestion: 9?"]
ODD = ["", " ", "#### ", "#### .", "#### ,", "#### ,,,", "#### -", "#### -.", "#### $", "#### $5", "#### five",
       "#### 5\r\n", "#### 5\x00", "#### \n5", "#### ٥", "#### ５", "#### 5apples", "### 5", "##### 5", "#### #### 5",
       "#### [5]", "$", "$$", ".", "..", ",", "-", "--", "-.", "-$", "5.", "5..", "5.5.", "5,", ",5", "...", "5...",
       "[invalid]", "5 [invalid]", "5, 6, 7", "5;6", "5 ", "\t5", "5\n", "18\u200b", "x5y", "5x6", "3-2", "3 -2",
       "3 - 2", "2024-05-06", "$1,000.00.", "<answer>18</answer>", "<think>9</think><answer>18</answer>",
       "#### 5 #### 18", "#### 0018", "#### 1.8e1", "½"]
ADVERSARIAL = sorted({frame.replace("{}", number) for frame in FRAMES for number in NUMBERS} | {*ODD})
ANSWERS = ["18", "-18", "1,000", "5", "-5", "0.5", "1000.", "$18", "5.5", "", "[invalid]", "."]


def test_scores_agree_on_adversarial_strings():
    assert len(ADVERSARIAL) >= 200
    for completion in ADVERSARIAL:
        for answer in ANSWERS:
            check(completion, f"steps 3\n#### {answer}")


PIECES = st.sampled_from(["#### ", "####", "-", "$", ",", ".", "5", "18", "000", " ", "\n", "x"])


@given(st.lists(PIECES, max_size=10).map("".join), st.sampled_from(ANSWERS))
@settings(max_examples=2000)
def test_scores_agree_on_strings_put_together_at_random(completion, answer):
    check(completion, f"steps 3\n#### {answer}")


@given(st.text(), st.sampled_from(ANSWERS))
@settings(max_examples=300)
def test_scores_agree_on_any_text(completion, answer):
    check(completion, f"steps 3\n#### {answer}")
