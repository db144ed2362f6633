"""What PPO and GRPO share: which questions a step asks, the model's answers to them, their rewards, the evaluation;
and what sft.py and dpo.py show of greedy answers at each evaluation.

    questions = Questions("sorting=0.7,addition=0.3", "train", seed, tokenizer, context=256, max_new_tokens=64)
    rollout = sample(model, questions(step, 8), 4, tokenizer, max_new_tokens=64, seed=step_seed(seed, step))
    total_A, parts = Rewards("verifier=1,format=0.1", tokenizer)(rollout)

Questions, answers and rewards are functions of (seed, step) and the weights, the same for any number of ranks.

Letters: P questions, G answers to each, A = P G answers question by question, L tokens of the longest answer.
"""
import dataclasses
import functools
import importlib.util
import itertools
import math
import os

import numpy as np
import torch

import engine
import judge
from formats import split_weights
from packing import pack
from tasks import TASKS, Question, read_rows

SELDOM = 0.05               # weight of a question that is always or never answered right, by difficulty
RECENT = 0.5                # weight of the newest group in a question's recent success rate
PATIENCE = 3                # calls in a row in which a reward function may fail on every answer


def step_seed(*numbers):
    """A 64-bit seed of numbers such as (seed, step, attempt)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# --------------------------------------------------------------------------------------------------------------------
# questions


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question as the model reads it; task is a name in tasks.TASKS, or "" where nothing verifies the answer."""
    task: str
    question: Question
    prompt_ids: list
    messages: list


def file_questions(path, split):
    """[(task, Question, messages)] of a .jsonl or .json file with prompt (a text or messages) and, where answers are to
    be verified, answer and task. dev is the twentieth whose hash says so, as in published tasks, but at least one."""
    found = []
    for row, messages in zip(read_rows(path), judge.read_prompts(path)):
        task = row.get("task") or ""
        if task and (task not in TASKS or not isinstance(row.get("answer"), str)):
            raise ValueError(f"a row of {path} has task={task!r} and answer={row.get('answer')!r:.40}; a task is one "
                             f"of {', '.join(TASKS)} and its answer a text")
        question = Question.of(messages[-1]["content"], str(row.get("answer", "")), "")
        found.append((task, question, messages))
    first = min(0.95, max(question.key for _, question, _ in found) / 2 ** 64)
    return [row for row in found if (row[1].key / 2 ** 64 >= first) == (split == "dev")]


class Questions:
    """questions(step, n): the n different questions [Asked] of a step, a pure function of (seed, step) and, by
    difficulty, of what `record` was told.

    tasks: "sorting=0.7,gsm8k=0.3": tasks, or files of prompts, each with its share of the questions (none: equal ones).
    A step has a task's share of n, rounded up or down. A finite set is asked in an order of its own in each epoch; what
    does not fill an epoch's last step is left out. Generated tasks make up new questions without end, or ask the same
    `n_questions` (0: without end). by_difficulty prefers, in finite sets, what is answered right sometimes: weight
    4 p (1 - p) for the recent success rate p (the variance of a right answer, scaled), 1 for what was never asked.
    path: the folder of published tasks, or a folder that holds one named after each. Prompts that leave no room for
    max_new_tokens in the context are an error, or dropped and counted in `dropped` with too_long="drop".
    ValueError on anything else that is wrong. Test questions cannot be had.
    """

    def __init__(self, tasks, split, seed, tokenizer, path="", context=1024, max_new_tokens=0, n_questions=0,
                 by_difficulty=False, too_long="error"):
        parsed = split_weights(tasks)
        self.names, weights = [name for name, _ in parsed], [weight for _, weight in parsed]
        if split not in ("train", "dev"):
            raise ValueError(f"questions are asked of train and evaluated on dev, never of {split!r}")
        if too_long not in ("error", "drop"):
            raise ValueError(f"too_long is {too_long!r}; it must be error or drop")
        if not parsed or len({*self.names}) < len(parsed) or len({weight is None for weight in weights}) > 1:
            raise ValueError(f"tasks is {tasks!r}; name different ones, and give a weight to all or to none, as in "
                             "sorting=0.7,addition=0.3")
        if any(weight is not None and not 0 < weight < math.inf for weight in weights):
            raise ValueError(f"tasks is {tasks!r}; weights must be above 0")
        self.share = np.cumsum([weight or 1.0 for weight in weights]) / sum(weight or 1.0 for weight in weights)
        self.split, self.seed, self.tokenizer, self.by_difficulty = split, seed, tokenizer, by_difficulty
        self.path, self.n_questions, self.too_long, self.dropped = path, n_questions, too_long, 0
        self.sets = {name: self.load(name) for name in self.names}      # lists; None: without end
        for name in (name for name, found in self.sets.items() if found == []):
            raise ValueError(f"{name} has no question for {split}")
        verified = [name for name in TASKS if name in self.names]
        self.max_new_tokens = max_new_tokens or max([TASKS[name].max_new_tokens for name in verified] or [256])
        self.room = context - self.max_new_tokens
        if self.room < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt in the context of "
                             f"{context} tokens; lower max_new_tokens")
        for name, found in self.sets.items():
            if found:
                self.sets[name] = [asked for asked in map(self.encode, found) if asked]
                if not self.sets[name]:
                    raise ValueError(f"all prompts of {name} are longer than the {self.room} tokens that "
                                     f"max_new_tokens={self.max_new_tokens} leaves of the context of {context}; lower "
                                     "max_new_tokens, or take a model with a longer context")
            elif by_difficulty and split == "train":
                raise ValueError(f"{name} makes up new questions without end, which have no difficulty to learn; ask "
                                 "the same ones again with n_questions, such as 2000")
        self.rates, self.walk = {}, None

    def load(self, name):
        """[(task, Question, messages)] of a finite set, None for one without end."""
        if name.partition(".gz")[0].endswith((".json", ".jsonl")):
            return file_questions(name, self.split)
        if name not in TASKS:
            raise ValueError(f"there is no task {name!r}; there are {', '.join(TASKS)}, and files of prompts (.jsonl)")
        task = TASKS[name]
        if task.generated and (self.split == "dev" or not self.n_questions):
            return None
        folder = os.path.join(self.path, name)
        path = None if task.generated else folder if os.path.isdir(folder) else self.path
        found = task.questions(self.split, path=path, limit=self.n_questions if task.generated else 0)
        found = {question.key: question for question in found}.values()
        return [(name, question, task.messages(question)) for question in found]

    def encode(self, row):
        """Asked, or None for a prompt that does not fit and is dropped."""
        task, question, messages = row
        ids, _ = self.tokenizer.encode_chat(messages, open_answer=True)
        if len(ids) <= self.room:
            return Asked(task, question, ids, messages)
        if self.too_long == "error":
            raise ValueError(f"a prompt is {len(ids)} tokens long, but the context less max_new_tokens="
                             f"{self.max_new_tokens} leaves {self.room}; lower max_new_tokens, or leave such prompts "
                             f"out with too_long=drop; it begins {messages[-1]['content']!r:.40}")
        self.dropped += 1

    def __call__(self, step, n, attempt=0):
        """attempt: from 1 on, other questions for the same step (dynamic sampling)."""
        generator = np.random.default_rng((self.seed, step, attempt))
        counts = self.counts(step, n, attempt)
        if not self.by_difficulty and not attempt:
            places = self.places(step, n)
        asked = []
        for i, (name, count) in enumerate(zip(self.names, counts)):
            found = self.sets[name]
            if found is None:
                asked += self.fresh(name, count, step_seed(self.seed, step, attempt, i))
                continue
            most = math.ceil(n * np.diff(self.share, prepend=0.0)[i] - 1e-9)        # of any step, said at the first
            if most > len(found):
                raise ValueError(f"{name} has {len(found)} questions, fewer than the {most} of one step; ask fewer a "
                                 "step, or lower its weight")
            if self.by_difficulty:
                rates = np.array([self.rates.get(a.question.key, 0.5) for a in found])
                weights = np.maximum(SELDOM, 4 * rates * (1 - rates))
                chosen = generator.choice(len(found), count, replace=False, p=weights / weights.sum())
            elif attempt:
                chosen = generator.choice(len(found), count, replace=False)
            else:
                epoch, at = places[i]
                chosen = np.random.default_rng((self.seed, i, epoch)).permutation(len(found))[at:at + count]
            asked += [found[j] for j in chosen]
        return [asked[j] for j in generator.permutation(len(asked))]        # ranks and micro-batches get a mixture

    def counts(self, step, n, attempt=0):
        """How many of a step's n questions each task has: its share of n, rounded up or down by a random offset."""
        points = (np.random.default_rng((self.seed, step, attempt, 1)).random() + np.arange(n)) / n
        return np.bincount(np.searchsorted(self.share[:-1], points, side="right"), minlength=len(self.share)).tolist()

    def places(self, step, n):
        """[(epoch, place in it)] at which each task's questions of a step begin."""
        if self.walk is None or self.walk[:2] != (n, step):
            start, places = (0, [(0, 0)] * len(self.names))
            if self.walk and self.walk[0] == n and self.walk[1] <= step:
                start, places = self.walk[1:]
            for before in range(start, step):
                places = [(epoch, at + count) for (epoch, at), count in zip(self.turn(places, before, n),
                                                                           self.counts(before, n))]
            self.walk = n, step, places
        return self.turn(self.walk[2], step, n)

    def turn(self, places, step, n):
        """The places, in the next epoch where the step's questions do not fit into this one."""
        sizes = [len(self.sets[name] or ()) for name in self.names]
        return [(epoch + 1, 0) if at + count > size else (epoch, at)
                for (epoch, at), count, size in zip(places, self.counts(step, n), sizes)]

    def fresh(self, name, count, seed):
        """`count` different new questions of a generated task."""
        asked = {}
        for question in itertools.islice(TASKS[name].questions(self.split, seed), 1000 + 100 * count):
            if len(asked) == count:
                break
            if question.key not in asked and (encoded := self.encode((name, question, TASKS[name].messages(question)))):
                asked[question.key] = encoded
        if len(asked) < count:
            raise ValueError(f"{name} makes up too few different questions of at most {self.room} tokens for a step of "
                             f"{count}; lower max_new_tokens, or ask fewer")
        return list(asked.values())

    def record(self, asked, success_P):
        """Tells how often each question was just answered right, from 0 to 1."""
        for a, success in zip(asked, success_P):
            before = self.rates.get(a.question.key, float(success))
            self.rates[a.question.key] = before + RECENT * (float(success) - before)

    def fixed(self, count):
        """{task: its first `count` questions}: the same at every evaluation."""
        return {name: self.fresh(name, count, 0) if found is None else found[:count]
                for name, found in self.sets.items()}


# --------------------------------------------------------------------------------------------------------------------
# answers


@dataclasses.dataclass
class Rollout:
    """Questions with n answers to each. Every tensor is on `device`."""
    asked: list                 # P of Asked
    samples: list               # A of engine.Sample, a question's side by side
    texts: list                 # A answers, without the token that ended them
    n: int
    device: torch.device

    def part(self, questions):
        """The Rollout of some of the questions, by their numbers."""
        answers = [p * self.n + i for p in questions for i in range(self.n)]
        return Rollout([self.asked[p] for p in questions], [self.samples[a] for a in answers],
                       [self.texts[a] for a in answers], self.n, self.device)

    @functools.cached_property
    def packed(self):
        """All of it in one row (packing.py), each prompt once."""
        answers = [sample.tokens for sample in self.samples]
        return pack([(asked.prompt_ids, answers[p * self.n:(p + 1) * self.n]) for p, asked in enumerate(self.asked)],
                    self.device)

    @property
    def lengths(self):
        """(A,) tokens of each answer, with the one that ended it."""
        return torch.tensor([len(sample.tokens) for sample in self.samples], dtype=torch.long, device=self.device)

    @property
    def finished(self):
        """(A,) bool: which answers ended by themselves, also at the last token they were allowed."""
        return torch.tensor([s.finish == "stop" for s in self.samples], dtype=torch.bool, device=self.device)

    @property
    def sampler_logp(self):
        """(A, L) log-probabilities under the distribution sampled from, 0 beyond an answer's end."""
        longest = max(len(sample.logp) for sample in self.samples)
        return torch.tensor([sample.logp + [0.0] * (longest - len(sample.logp)) for sample in self.samples],
                            device=self.device)


def joined(rollouts):
    """One Rollout of several, in their order."""
    first = rollouts[0]
    asked, samples, texts = (list(itertools.chain(*(getattr(r, name) for r in rollouts)))
                             for name in ("asked", "samples", "texts"))
    return Rollout(asked, samples, texts, first.n, first.device)


def answer_text(tokenizer, answer):
    """What was generated, without the id that ended it."""
    return tokenizer.decode(answer.tokens[:-1] if answer.finish == "stop" else answer.tokens)


def sample(model, asked, n, tokenizer, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=0, max_batch=64):
    """A Rollout of n answers to each question, each prompt computed once. With top_k or top_p the log-probabilities are
    renormalised over what is kept; a trainer that does not do the same sees their ratios fall below 1."""
    samples = engine.generate(model, [a.prompt_ids for a in asked], n, max_new_tokens=max_new_tokens, seed=seed,
                              temperature=temperature, top_k=top_k, top_p=top_p, max_batch=max_batch)
    texts = [answer_text(tokenizer, answer) for answer in samples]
    return Rollout(list(asked), samples, texts, n, model.lm_head.weight.device)


# --------------------------------------------------------------------------------------------------------------------
# rewards


def verdicts(rollout):
    """(A, 2) bool: each answer's (correct, format_ok), by its task's verifier; False where there is none."""
    each = [asked for asked in rollout.asked for _ in range(rollout.n)]
    return torch.tensor([TASKS[a.task].score(text, a.question.answer) if a.task else (False, False)
                         for a, text in zip(each, rollout.texts)])


def user_function(text):
    """The function of "file.py:name". ValueError if it cannot be had."""
    path, _, name = text.rpartition(":")
    if not os.path.isfile(path):
        raise ValueError(f"the reward {text!r} names no file: there is no {path!r}")
    spec = importlib.util.spec_from_file_location(f"reward_{os.path.basename(path)[:-3]}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"the reward file {path} cannot be run: {type(error).__name__}: {error}") from None
    if not callable(getattr(module, name, None)):
        raise ValueError(f"the reward file {path} has no function {name!r}")
    return getattr(module, name)


class Rewards:
    """rewards(rollout) -> (weighted sum (A,), {name: (A,)}), on the CPU, in fp32.

    text: rewards with weights (none: 1), as in "verifier=1,format=0.1,reward_model:out/reward=0.5,my.py:brief=0.2".
    verifier and format are the task's verdicts, 1 or 0. A function of a file is called as
    f(prompts=[messages], completions=[text], answers=[text], tasks=[name]) and returns a list of numbers. If it raises,
    it is asked about each answer alone; an answer on which it raises, or gives None, NaN or an infinity, has reward 0
    and is counted in `failed` {name: how many in the last call}. ValueError if the list has another length, or after
    PATIENCE calls in which every answer failed.
    """

    def __init__(self, text, tokenizer, device="cpu", dtype=torch.float32):
        self.functions, self.weights, self.note, self.reason = {}, {}, "", "NaN"
        for name, weight in split_weights(text):
            if name in ("verifier", "format"):
                function = functools.partial(self.verdict, column=("verifier", "format").index(name))
            elif name.startswith("reward_model:"):
                function = self.reward_model(name.partition(":")[2], tokenizer, device, dtype)
            elif ".py:" in name:
                function = functools.partial(self.guarded, user_function(name), name)
            else:
                raise ValueError(f"there is no reward {name!r}; there are verifier, format, reward_model:FOLDER and "
                                 "FILE.py:FUNCTION, with commas between them")
            short = name.partition(":")[0] if name.startswith("reward_model:") else name.rpartition(":")[2]
            short = name if short in self.functions else short
            if short in self.functions or weight is not None and not math.isfinite(weight):
                raise ValueError(f"the rewards {text!r} name {name!r} twice, or with a weight that is no number")
            self.functions[short], self.weights[short] = function, 1.0 if weight is None else weight
        if not self.functions:
            raise ValueError(f"rewards is {text!r} and names none; try verifier")
        self.failed, self.row = dict.fromkeys(self.functions, 0), dict.fromkeys(self.functions, 0)

    def __call__(self, rollout):
        self.failed = dict.fromkeys(self.functions, 0)
        total_A, parts = torch.zeros(len(rollout.samples)), {}
        for name, function in self.functions.items():
            values_A = torch.as_tensor(function(rollout), dtype=torch.float32).cpu()
            bad_A = ~values_A.isfinite()
            self.failed[name] = int(bad_A.sum())
            self.row[name] = self.row[name] + 1 if len(bad_A) and bad_A.all() else 0
            if self.row[name] >= PATIENCE:
                raise ValueError(f"the reward {name} gave no number for any answer, {PATIENCE} times in a row "
                                 f"(last: {self.reason}); mend it, or leave it out")
            parts[name] = values_A.masked_fill(bad_A, 0.0)
            total_A += self.weights[name] * parts[name]
        return total_A, parts

    def check(self, dev):
        """ValueError if verifier or format is to reward questions {name: [Asked]} none of which has a task."""
        if {"verifier", "format"} & {*self.functions} and not any(a.task for asked in dev.values() for a in asked):
            raise ValueError("the rewards verifier and format need questions of a task, and none of these has one; "
                             "reward them by reward_model:FOLDER or FILE.py:FUNCTION")

    def verdict(self, rollout, column):
        return verdicts(rollout)[:, column] if rollout.samples else []

    def reward_model(self, directory, tokenizer, device, dtype):
        from tokenizer import Tokenizer
        score = judge.load_reward(directory, device, dtype)
        if Tokenizer.load(directory).fingerprint != tokenizer.fingerprint:
            self.note = f"the reward model in {directory} has another tokenizer and reads answers as text with its own"

        def function(rollout):
            each = [asked for asked in rollout.asked for _ in range(rollout.n)]
            turns = [[*a.messages, {"role": "assistant", "content": text}] for a, text in zip(each, rollout.texts)]
            return score(turns) if turns else []
        return function

    def guarded(self, function, name, rollout):
        each = [asked for asked in rollout.asked for _ in range(rollout.n)]
        rows = [(a.messages, text, a.question.answer, a.task) for a, text in zip(each, rollout.texts)]

        def ask(rows):
            given = function(**dict(zip(("prompts", "completions", "answers", "tasks"), map(list, zip(*rows)))))
            if not hasattr(given, "__len__") or len(given) != len(rows):
                seen = f"a list of {len(given)}" if hasattr(given, "__len__") else f"a {type(given).__name__}"
                raise WrongLength(f"the reward {name} must return a list of {len(rows)} numbers, one for each answer, "
                                  f"and returned {seen}")
            return [self.as_number(value) for value in given]
        if not rows:
            return []
        try:
            return ask(rows)
        except WrongLength as error:
            raise ValueError(str(error)) from None
        except Exception as error:
            self.reason = f"{type(error).__name__}: {error}"
        values = []
        for row in rows:
            try:
                values += ask([row])
            except WrongLength as error:
                raise ValueError(str(error)) from None
            except Exception as error:
                self.reason = f"{type(error).__name__}: {error}"
                values.append(math.nan)
        return values

    def as_number(self, value):
        try:
            return math.nan if value is None else float(value)
        except (TypeError, ValueError):
            self.reason = f"{value!r:.40} is no number"
            return math.nan


class WrongLength(Exception):
    pass


# --------------------------------------------------------------------------------------------------------------------
# evaluation


def greedy_tasks(text):
    """The names in "addition,sorting", tasks that make up their questions; ValueError on any other."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    made_up = [name for name, task in TASKS.items() if task.generated]
    for name in (name for name in names if name not in made_up):
        raise ValueError(f"eval_tasks names {name!r}; tasks that make up their questions are {', '.join(made_up)}")
    return names


def greedy_accuracy(model, tokenizer, task, n_questions):
    """(share answered right, share in the asked-for format) of a task's dev questions, answered greedily."""
    questions = list(TASKS[task].questions("dev", limit=n_questions))
    prompts = [tokenizer.encode_chat(TASKS[task].messages(question), open_answer=True)[0] for question in questions]
    answers = engine.generate(model, prompts, max_new_tokens=TASKS[task].max_new_tokens, temperature=0)
    verdicts = [TASKS[task].score(answer_text(tokenizer, answer), question.answer)
                for question, answer in zip(questions, answers)]
    return tuple(sum(column) / len(verdicts) for column in zip(*verdicts))


def print_samples(model, tokenizer, prompts, run):
    """Prints prompts and the model's greedy answers."""
    for prompt in prompts:
        [answer] = engine.generate(model, [prompt], max_new_tokens=128, temperature=0)
        text = tokenizer.decode(prompt) + answer_text(tokenizer, answer)
        run.print("  sample: " + text.replace("\n", "\n  | "))


def evaluate(model, tokenizer, dev, rewards, run, k=0, temperature=1.0, max_new_tokens=256, max_batch=64, seed=0):
    """{"eval_accuracy/TASK", "eval_format/TASK", "eval_reward"} of greedy answers to questions {task: [Asked]} and,
    for k > 0, "eval_pass@k/TASK": how often one of k samples is right. Every rank answers its share; the figures
    are those of all. Also returns the greedy Rollouts with their rewards, [(rollout, total_A, parts)], of this rank."""
    metrics, answered, reward = {}, [], torch.zeros(2, dtype=torch.float64)
    for name, asked in dev.items():
        own = asked[run.rank::run.world_size]
        greedy = sample(model, own, 1, tokenizer, max_new_tokens, temperature=0, max_batch=max_batch)
        total_A, parts = rewards(greedy)
        answered.append((greedy, total_A, parts))
        reward += torch.tensor([total_A.double().sum(), len(own)])
        right = [verdicts(greedy).double()] if own else [torch.zeros(1, 2, dtype=torch.float64)]
        if k:
            drawn = sample(model, own, k, tokenizer, max_new_tokens, temperature, seed=seed, max_batch=max_batch)
            right.append(verdicts(drawn)[:, 0].view(-1, k).any(1).double() if own else torch.zeros(1))
        sums = run.total(torch.cat([x.sum(0).double().view(-1) for x in right])) / len(asked)
        if any(a.task for a in asked):
            metrics |= dict(zip((f"eval_accuracy/{name}", f"eval_format/{name}", f"eval_pass@{k}/{name}"),
                                sums.tolist()))
    total, count = run.total(reward).tolist()
    return {**metrics, "eval_reward": total / count}, answered


def print_answers(answered, count, run):
    """Prints the first `count` answers of each task with their rewards."""
    for rollout, total_A, parts in answered:
        for a in range(min(count, len(rollout.samples))):
            asked, shown = rollout.asked[a // rollout.n], ", ".join(f"{name} {parts[name][a]:.3g}" for name in parts)
            text = f"{asked.messages[-1]['content']}\n{rollout.texts[a]}"
            run.print(f"  answer: reward {total_A[a]:.3g} ({shown})\n  | " + text.replace("\n", "\n  | "))
