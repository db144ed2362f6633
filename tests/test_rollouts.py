"""rollouts.py: which questions a step asks, answers with the trainer's log-probabilities, rewards that cannot break."""
import json
import math
from collections import Counter

import pytest
import torch

import rollouts
from model import GPT, Config, ScalarHead
from rollouts import Asked, Questions, Rewards, Rollout, sample
from tasks import TASKS, Question
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["Sort 3 1 2\nThink, then answer as digits. 1 2 3 4 5 6 7 8 9 0"] * 9, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    model = GPT(Config(384, n_layer=2, n_head=2, n_embd=32, context=128, eos_id=tokenizer.eot_id,
                       end_ids=(tokenizer.chat_end_id,)))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.2)
    return model


def ask(tokenizer, tasks="sorting=0.75,addition=0.25", split="train", seed=1, **options):
    return Questions(tasks, split, seed, tokenizer, **{"context": 128, "max_new_tokens": 8, **options})


def problems(asked):
    return [a.question.problem for a in asked]


# --- questions ---

@pytest.mark.parametrize("n_questions", [0, 20])
def test_a_steps_questions_are_a_function_of_seed_and_step(tokenizer, n_questions):
    walked, fresh = ask(tokenizer, n_questions=n_questions), ask(tokenizer, n_questions=n_questions)
    steps = [problems(walked(step, 8)) for step in range(9)]
    assert problems(fresh(8, 8)) == steps[8] and problems(walked(3, 8)) == steps[3] and steps[3] != steps[4]
    assert problems(ask(tokenizer, seed=2, n_questions=n_questions)(0, 8)) != steps[0]
    assert all(len({*step}) == 8 for step in steps)
    assert problems(walked(3, 8, 1)) != steps[3]


def test_tasks_have_their_shares(tokenizer):
    asked = [a.task for step in range(40) for a in ask(tokenizer)(step, 3)]
    assert Counter(asked)["addition"] == pytest.approx(30, abs=6)
    assert all(1 <= Counter(asked[i:i + 3])["sorting"] <= 3 for i in range(0, 120, 3))


def test_an_epoch_asks_every_question_once(tokenizer):
    questions = ask(tokenizer, "sorting", n_questions=12)
    epochs = [[p for step in range(first, first + 3) for p in problems(questions(step, 4))] for first in (0, 3)]
    assert len({*epochs[0]}) == 12 and {*epochs[0]} == {*epochs[1]} and epochs[0] != epochs[1]


def test_dev_questions_are_none_of_train_and_test_is_refused(tokenizer):
    train = {p for step in range(60) for p in problems(ask(tokenizer)(step, 16))}
    dev = problems(ask(tokenizer, split="dev").fixed(50)["sorting"])
    assert len(dev) == 50 and not {*dev} & train
    assert not {*problems(ask(tokenizer, split="dev").fixed(50)["addition"])} & train
    test = {question.problem for question in TASKS["addition"].questions("test", limit=300)}
    assert not test & train
    with pytest.raises(ValueError, match="never of 'test'"):
        ask(tokenizer, split="test")


def test_by_difficulty_asks_what_is_right_sometimes(tokenizer):
    questions = ask(tokenizer, "sorting", n_questions=30, by_difficulty=True)
    everything = questions.sets["sorting"]
    for _ in range(8):
        questions.record(everything, [0.5] * 10 + [0.0] * 10 + [1.0] * 10)
    asked = Counter(p for step in range(40) for p in problems(questions(step, 5)))
    sometimes = sum(asked[p] for p in problems(everything[:10]))
    assert sometimes > 120
    again = ask(tokenizer, "sorting", n_questions=30, by_difficulty=True)
    again.rates = dict(questions.rates)                     # what a saved state holds
    assert problems(again(7, 5)) == problems(questions(7, 5)) and len({*problems(again(7, 5))}) == 5


def test_files_of_prompts_are_asked(tokenizer, tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Say {i}", "task": "sorting", "answer": "1 2"} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, rows + [{"prompt": [{"role": "user", "content": "hi"}]}])))
    train, dev = (ask(tokenizer, str(file), split) for split in ("train", "dev"))
    kept = train.sets[str(file)]
    assert len(kept) + len(dev.sets[str(file)]) == 61 and not {*problems(kept)} & {*problems(dev.sets[str(file)])}
    assert {a.task for a in kept} >= {"sorting"} and kept[0].question.answer == "1 2"


@pytest.mark.parametrize("options, said", [
    (dict(tasks="sortin"), "there is no task 'sortin'"), (dict(tasks="sorting=1,addition"), "a weight to all"),
    (dict(tasks="sorting=0"), "weights must be above 0"), (dict(tasks=""), "name different ones"),
    (dict(max_new_tokens=128), "leaves no room"), (dict(max_new_tokens=120, n_questions=9), "lower max_new_tokens"),
    (dict(max_new_tokens=120, n_questions=9, too_long="drop"), "all prompts of sorting are longer than the 8 tokens"),
    (dict(max_new_tokens=120, too_long="drop"), "too few different questions"),
    (dict(n_questions=4), "fewer than the 6"), (dict(by_difficulty=True), "n_questions, such as"),
    (dict(tasks="gsm8k"), "give their folder")])
def test_bad_questions_are_one_sentence(tokenizer, options, said):
    with pytest.raises(ValueError, match=said):
        ask(tokenizer, **{"tasks": "sorting", **options})(0, 6)


def test_prompts_that_do_not_fit_are_dropped_and_counted(tokenizer, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"{i} " * (200 if i < 3 else 1)}) for i in range(40)))
    questions = Questions(str(file), "train", 1, tokenizer, context=64, max_new_tokens=8, too_long="drop")
    assert 1 <= questions.dropped <= 3


# --- answers ---

@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_samplers_log_probabilities_are_the_trainers(model, tokenizer, temperature):
    rollout = sample(model, ask(tokenizer)(0, 3), 4, tokenizer, 8, temperature, seed=5)
    packed = rollout.packed
    with torch.no_grad():
        logp_AL = -packed.by_answer(model(packed.ids, packed.targets, temperature=temperature, **packed.layout))
    torch.testing.assert_close(logp_AL, rollout.sampler_logp, atol=2e-5, rtol=1e-5)
    assert rollout.sampler_logp.abs().sum(1).min() > 0.1


def test_an_answer_does_not_depend_on_the_other_questions(model, tokenizer):
    asked = ask(tokenizer)(0, 4)
    whole, half = (sample(model, some, 3, tokenizer, 8, seed=5) for some in (asked, asked[2:]))
    part = whole.part([2, 3])
    assert [s.tokens for s in part.samples] == [s.tokens for s in half.samples] and part.texts == half.texts
    assert torch.equal(part.packed.ids, half.packed.ids)
    both = rollouts.joined([whole.part([0, 1]), part])
    assert both.texts == whole.texts and torch.equal(both.packed.ids, whole.packed.ids)
    other = sample(model, asked, 3, tokenizer, 8, seed=6)
    assert other.texts != whole.texts


def test_no_questions_are_no_answers(model, tokenizer):
    rollout = sample(model, [], 3, tokenizer, 8)
    assert len(rollout.finished) == len(rollout.lengths) == len(Rewards("verifier,format", tokenizer)(rollout)[0]) == 0


# --- rewards ---

def answered(*texts, task="sorting", answer="1 2 2"):
    question = Question.of("Sort 2 1 2", answer, "")
    asked = Asked(task, question, [1], [{"role": "user", "content": question.problem}])
    return Rollout([asked], [None] * len(texts), list(texts), len(texts), torch.device("cpu"))


def function(tmp_path, body):
    (tmp_path / "mine.py").write_text(f"import math\ndef mine(prompts, completions, answers, tasks):\n    {body}\n")
    return f"{tmp_path}/mine.py:mine"


def test_rewards_add_up_by_weight(tokenizer, tmp_path):
    mine = function(tmp_path, "return [len(c) + (a == '1 2 2') + (tasks[0] == 'sorting') for c, a in "
                              "zip(completions, answers)]")
    total_A, parts = Rewards(f"verifier=2,format=0.5,{mine}=0.1", tokenizer)(
        answered("<answer>1 2 2</answer>", "<answer>2 1 2</answer>", "no"))
    assert parts["verifier"].tolist() == [1, 0, 0] and parts["format"].tolist() == [1, 1, 0]
    assert parts["mine"].tolist() == [24, 24, 4] and total_A.tolist() == pytest.approx([4.9, 2.9, 0.4])


@pytest.mark.parametrize("text", ["", "<answer></answer>", "<answer>1 2 2</answer><answer>1 2 2</answer>",
                                  "<answer>1 2 2</answer> and more", "<answer>2 2 1</answer><answer>1 2 2</answer>",
                                  "1 2 2", "<answer>1 2 2 or 2 2 1</answer>", "<think><answer>1 2 2</answer>"])
def test_an_answer_that_games_the_verifier_earns_nothing(tokenizer, text):
    assert Rewards("verifier", tokenizer)(answered(text))[0].tolist() == [0]


@pytest.mark.parametrize("body, expected, failed", [
    ("return [1 / (c != 'x') for c in completions]", [1, 0, 1], 1),
    ("return [math.nan if c == 'x' else 2 for c in completions]", [2, 0, 2], 1),
    ("return [None if c == 'x' else math.inf if c == 'y' else 2 for c in completions]", [2, 0, 0], 2),
    ("return ['bad' if c == 'x' else 3 for c in completions]", [3, 0, 3], 1)])
def test_a_reward_that_fails_is_0_and_counted(tokenizer, tmp_path, body, expected, failed):
    rewards = Rewards(function(tmp_path, body), tokenizer)
    assert rewards(answered("a", "x", "y"))[0].tolist() == expected
    assert rewards.failed == {"mine": failed}


@pytest.mark.parametrize("body, said", [
    ("return [1]", "must return a list of 3 numbers, one for each answer, and returned a list of 1"),
    ("return 1.0", "returned a float"), ("1 / 0", "gave no number for any answer, 3 times in a row .*ZeroDivision"),
    ("return [math.nan] * len(completions)", "gave no number")])
def test_a_reward_that_always_fails_is_one_sentence(tokenizer, tmp_path, body, said):
    rewards = Rewards(function(tmp_path, body), tokenizer)
    with pytest.raises(ValueError, match=said):
        for _ in range(3):
            rewards(answered("a", "x", "y"))


@pytest.mark.parametrize("text, said", [
    ("verfier", "there is no reward 'verfier'"), ("", "names none"), ("verifier,verifier=2", "twice"),
    ("nowhere.py:f", "no 'nowhere.py'"), ("reward_model:nowhere", "'nowhere' is not a model directory")])
def test_bad_rewards_are_one_sentence(tokenizer, text, said):
    with pytest.raises(ValueError, match=said):
        Rewards(text, tokenizer)


def test_a_verifier_without_a_task_and_a_broken_file_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="need questions of a task"):
        Rewards("verifier", tokenizer).check({"": answered("a", task="").asked})
    (tmp_path / "broken.py").write_text("def f(:")
    with pytest.raises(ValueError, match="cannot be run: SyntaxError"):
        Rewards(f"{tmp_path}/broken.py:f", tokenizer)


def test_a_reward_model_reads_texts_and_says_that_its_tokenizer_is_another(tokenizer, tmp_path):
    import judge
    other = Tokenizer.train(["another text altogether"] * 9, 280)
    torch.manual_seed(0)
    head = ScalarHead(Config(384, n_layer=1, n_head=2, n_embd=16, context=256))
    torch.nn.init.normal_(head.score.weight)
    head.save(tmp_path)
    other.save(tmp_path)
    rewards = Rewards(f"reward_model:{tmp_path}=0.5", tokenizer)
    rollout = answered("one", "two")
    total_A, parts = rewards(rollout)
    expected = judge.load_reward(str(tmp_path))([[*rollout.asked[0].messages, {"role": "assistant", "content": text}]
                                                 for text in rollout.texts])
    torch.testing.assert_close(parts["reward_model"], expected)
    assert "another tokenizer" in rewards.note and torch.equal(total_A, expected / 2) and expected.std() > 0


# --- evaluation ---

class TwoRanks:
    """Stands for one of two ranks: what both hold is summed when the second asks."""

    def __init__(self, world_size):
        self.rank, self.world_size, self.held = 0, world_size, []

    def total(self, value):
        return value


def test_ranks_share_the_evaluation_and_agree(model, tokenizer):
    dev = ask(tokenizer, split="dev").fixed(5)
    rewards = Rewards("format,verifier", tokenizer)
    run = TwoRanks(1)
    whole, answers = rollouts.evaluate(model, tokenizer, dev, rewards, run, k=2, max_new_tokens=8)
    assert {name for name in whole} == {f"eval_{kind}/{task}" for kind in ("accuracy", "format", "pass@2")
                                       for task in dev} | {"eval_reward"}
    assert all(0 <= value <= 1 and math.isfinite(value) for value in whole.values()) and len(answers) == 2
    halves = []
    for rank in range(2):
        run = TwoRanks(2)
        run.rank = rank
        halves.append([r.texts for r, _, _ in rollouts.evaluate(model, tokenizer, dev, rewards, run,
                                                                max_new_tokens=8)[1]])
    for (rollout, _, _), first, second in zip(answers, *halves):
        assert rollout.texts[::2] == first and rollout.texts[1::2] == second
