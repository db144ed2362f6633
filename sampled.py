"""Answers sampled from one of our own models to the questions of tasks, ranked, as sources of pairs.

    python data.py --kind=pairs --from_model=out/sft --task=sorting=0.5,addition=0.5 --samples=8 --out_dir=data/pairs
    python data.py --kind=pairs --from_model=out/sft --task=sorting --rank_by=reward_model:out/reward --keep=all

What ranks them: the task's verifier (1 right, 0 wrong), a reward model, or a judge, which compares every two different
answers to a question in both orders; an answer's score is then the share of these that it wins. Which pairs are kept,
preferences.choose says. An answer that did not end by itself is left out: a pair would give it an end that it had not.
"""
import itertools
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import engine
import judge as judges
from formats import split_weights
from preferences import choose, scored_pair
from tasks import TASKS

CHUNK = 256                   # questions sampled at once
DUELS = 8                     # requests to a judge at once


class Progress:
    """Answers and time left: a bar on a terminal, elsewhere a line every 30 s."""

    def __init__(self, total):
        from tqdm import tqdm
        self.total, self.before, self.started = total, 0, time.perf_counter()
        self.last_line = self.started
        self.bar = tqdm(total=total, unit=" answers", disable=not sys.stderr.isatty(), leave=False)

    def chunk(self, count):
        """A function progress(finished) for the next `count` answers."""
        base, self.before = self.before, self.before + count

        def progress(finished):
            done, now = base + finished, time.perf_counter()
            self.bar.update(done - self.bar.n)
            if self.bar.disable and now - self.last_line > 30:
                self.last_line = now
                left = (now - self.started) * (self.total / done - 1)
                print(f"{done:,} of {self.total:,} answers, {left:.0f} s left", file=sys.stderr, flush=True)
        return progress


def ranker(rank_by, judge_model, judge_key_env, device, dtype):
    """A function ([(messages, [text], [whether right])]) -> [[score]], NaN where an answer has none."""
    if judge_model and not rank_by.startswith(("http://", "https://")):
        raise ValueError(f"judge_model={judge_model} is for a judge's address, but rank_by is {rank_by!r}")
    if rank_by == "verifier":
        return lambda groups: [[float(verdict) for verdict in right] for _, _, right in groups]
    if rank_by.startswith("reward_model:"):
        score = judges.load_reward(rank_by.partition(":")[2], device, dtype)

        def rewards(groups):
            found = iter(score([[*messages, {"role": "assistant", "content": text}]
                                for messages, texts, _ in groups for text in texts]).tolist())
            return [[next(found) for _ in texts] for _, texts, _ in groups]
        return rewards
    if not rank_by.startswith(("http://", "https://")):
        raise ValueError(f"rank_by is {rank_by!r}; it must be verifier, reward_model:DIR or a judge's address, such as "
                         "http://localhost:8000/v1")
    if not judge_model:
        raise ValueError(f"--rank_by={rank_by} needs --judge_model, the name of the model there")
    ask = judges.endpoint(rank_by, judge_model, judge_key_env)
    return lambda groups: [tournament(messages, texts, ask) for messages, texts, _ in groups]


def tournament(messages, texts, ask):
    """Each text's share of the duels with every different text that it wins, a draw counting half. A duel is asked in
    both orders and won where both verdicts agree; one without a verdict does not count."""
    different = list(dict.fromkeys(texts))
    duels = list(itertools.permutations(different, 2))
    with ThreadPoolExecutor(DUELS) as pool:
        verdicts = dict(zip(duels, pool.map(lambda duel: ask(messages, *duel), duels)))
    points = {text: [] for text in different}
    for a, b in itertools.combinations(different, 2):
        both = verdicts[a, b], verdicts[b, a]
        if None not in both:
            won = {("1", "2"): 1.0, ("2", "1"): 0.0}.get(both, 0.5)
            points[a].append(won)
            points[b].append(1 - won)
    return [sum(points[text]) / len(points[text]) if points[text] else math.nan for text in texts]


def sampled_sources(from_model, sources, keep, seed, val_fraction, task, samples, questions, rank_by, judge_model,
                    judge_key_env, temperature, top_p, max_new_tokens, device, dtype):
    """[SampledSource], one for each task; ValueError on what cannot be asked for. `questions` are shared by the tasks'
    weights, and val_fraction of each task's are dev questions."""
    if sources not in ("", "stdlib"):
        raise ValueError(f"pairs come from --sources={sources} or --from_model={from_model}, not from both; mix what "
                         "each of them wrote")
    parsed = [(*name.partition(":")[::2], weight) for name, weight in split_weights(task)]
    if not parsed or len({name for name, _, _ in parsed}) < len(parsed) or len({w is None for *_, w in parsed}) > 1:
        raise ValueError(f"task is {task!r}; it names different tasks, as in --task=sorting,addition, all with a "
                         "weight or none")
    for name, path, weight in parsed:
        if name not in TASKS:
            raise ValueError(f"there is no task {name!r}; those are {', '.join(TASKS)}")
        if weight is not None and weight <= 0:
            raise ValueError(f"the weight of task {name} is {weight:g}; it must be above 0")
        TASKS[name].questions("train", path=path or None)       # says now what is wrong with the path
    for name, value, least in (("samples", samples, 2), ("max_new_tokens", max_new_tokens, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; answers that differ need one above 0")
    shares = [weight or 1.0 for *_, weight in parsed]
    counts = [round(questions * share / sum(shares)) for share in shares]
    if min(counts) < 2:
        raise ValueError(f"questions={questions} leaves a task fewer than two, one of them to be held out; raise it")
    model, tokenizer, *_ = engine.load(from_model, "chat", device, dtype)
    rank = ranker(rank_by, judge_model, judge_key_env, model.model.embed_tokens.weight.device, model.model.dtype)
    progress = Progress(samples * sum(counts))
    return [SampledSource(name, path, count, val_fraction, seed, samples, keep, rank, model, tokenizer, progress,
                          dict(max_new_tokens=max_new_tokens or TASKS[name].max_new_tokens, temperature=temperature,
                               top_p=top_p, seed=seed))
            for (name, path, _), count in zip(parsed, counts)]


class SampledSource:
    """One task's questions, and a model's answers to them. measured: what its pairs were made of, once all are."""
    weight = None

    def __init__(self, name, path, count, val_fraction, seed, samples, keep, rank, model, tokenizer, progress, options):
        self.name, self.task, self.path, self.count, self.seed = f"sampled:{name}", TASKS[name], path, count, seed
        self.val_count = min(count - 1, max(1, round(count * val_fraction)))
        self.samples, self.keep, self.rank, self.options = samples, keep, rank, options
        self.model, self.tokenizer, self.progress = model, tokenizer, progress
        self.right, self.measured = [], {}          # right: of each question whose answers were judged, a list of bools

    def questions(self):
        """Yields (side, question), each question once: dev questions evenly among the others as long as there are new
        ones. Training questions are other ones than chats of the same seed begin with."""
        streams = {"train": self.task.questions("train", self.seed + 1, self.path or None),
                   "val": self.task.questions("dev", self.seed, self.path or None)}
        seen = set()
        for i in range(self.count):
            side = "val" if (i + 1) * self.val_count // self.count > i * self.val_count // self.count else "train"
            for question in itertools.islice(streams[side], 1000):      # a small task's repeat
                if question.key not in seen:
                    seen.add(question.key)
                    yield side, question
                    break

    def pairs(self, notes):
        """Yields (row, key, side) of the pairs that the rule keeps; counts in `notes` what gives none, by reason."""
        stream = self.questions()
        while chunk := list(itertools.islice(stream, CHUNK)):
            prompts = [self.tokenizer.encode_chat(self.task.messages(question), open_answer=True)[0]
                       for _, question in chunk]
            fits = [len(prompt) < self.model.config.context for prompt in prompts]
            notes["questions longer than the model's context"] += len(fits) - sum(fits)
            chunk, prompts = ([x for x, fit in zip(column, fits) if fit] for column in (chunk, prompts))
            answers = engine.generate(self.model, prompts, self.samples, **self.options,
                                      progress=self.progress.chunk(len(prompts) * self.samples)) if prompts else []
            groups = []
            for i, (_, question) in enumerate(chunk):
                mine = answers[i * self.samples:(i + 1) * self.samples]
                texts = [self.tokenizer.decode(answer.tokens[:-1]) for answer in mine if answer.finish == "stop"]
                right = [self.task.score(text, question.answer)[0] for text in texts]
                notes["answers that did not end"] += self.samples - len(texts)
                notes["empty answers"] += sum(not text.strip() for text in texts)
                self.right.append(right + [False] * (self.samples - len(texts)))
                said = [j for j, text in enumerate(texts) if text.strip()]
                groups.append((self.task.messages(question), [texts[j] for j in said], [right[j] for j in said]))
            for (side, question), (messages, texts, _), scores in zip(chunk, groups, self.rank(groups)):
                notes["answers without a score"] += sum(map(math.isnan, scores))
                scored = [(text, score) for text, score in zip(texts, scores) if not math.isnan(score)]
                kept = choose(scored, self.keep, question.key)
                if not kept:
                    notes["questions whose answers are equally good"] += 1
                for better, worse in kept:
                    row = scored_pair(messages, better, worse)
                    yield {**row, "task": self.task.name, "answer": question.answer}, question.key, side
            self.measure()
        self.progress.bar.close()

    def measure(self):
        n = max(1, len(self.right))
        self.measured = {"questions": len(self.right), "pass@1": sum(map(sum, self.right)) / n / self.samples,
                         f"pass@{self.samples}": sum(map(any, self.right)) / n,
                         "questions with right and wrong answers": sum(any(r) and not all(r) for r in self.right)}
