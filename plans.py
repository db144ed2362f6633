"""What eval.py can ask of a model: each task's plan reads and checks all that it needs, and gives jobs to run.

    jobs = plan(subject, options, machine)      # of eval.py's --tasks; whatever is missing is said here
    figures, n, counts = jobs[0].run()          # {name: (value, standard error)}

`o`, throughout, are the options of eval.py. docs/eval.md says what each task reports.
"""
import dataclasses
import glob
import math
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch.distributed as dist

import benchmarks
import engine
import ifeval
import judge as judges
import sandbox
from common import pick_device
from configurator import nearest
from likelihood import encode_pairs, plant, score, windows
from model import GPT, fetch
from results import answer_figures, mean_stderr
from tasks import TASKS
from tokenizer import Tokenizer

# --- models ---

@dataclasses.dataclass
class Subject:
    """A model that is evaluated, ready on its device. chat: it is asked through the chat template."""
    name: str
    model: GPT
    tokenizer: Tokenizer
    chat: bool
    weights: str                # fingerprint

    def settings(self, **more):
        return dict(weights=self.weights, tokenizer=self.tokenizer.fingerprint, mode="chat" if self.chat else "base",
                    dtype=str(self.model.model.dtype).removeprefix("torch."), context=self.model.config.context, **more)


def load(path, mode="auto", device="auto", dtype="auto"):
    """The Subject in a model directory. ValueError for one that cannot be evaluated as asked."""
    model, tokenizer, chat, _ = engine.load(path, mode, device, dtype)
    folder = fetch(path)
    shards = sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors")))
    files = [os.path.join(folder, "config.json"), *shards]
    weights = benchmarks.fingerprint("".join(map(benchmarks.file_fingerprint, files)).encode())
    return Subject(path, model, tokenizer, chat, weights)


class Machine:
    """Which of how many ranks this is; their results brought together; a progress bar on the first one's terminal."""

    def __init__(self):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.bar = None
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")             # numbers and texts, from any device

    def print(self, line):
        if self.rank == 0:
            print(line, flush=True)

    def start(self, name, total):
        """A progress bar over this rank's share of `total`."""
        self.stop()
        if self.rank == 0 and sys.stderr.isatty():
            from tqdm import tqdm
            self.bar = tqdm(total=-(-total // self.world_size), desc=name, leave=False)

    def advance(self, more=1):
        if self.bar:
            self.bar.update(more)

    def stop(self):
        if self.bar:
            self.bar.close()
        self.bar = None

    def share(self, function, items):
        """[function(item)], where function takes a list and every rank its share of the items."""
        mine = function(items[self.rank::self.world_size])
        shares = [mine]
        if self.world_size > 1:
            shares = [None] * self.world_size
            dist.all_gather_object(shares, mine)
        return [shares[i % self.world_size][i // self.world_size] for i in range(len(items))]

    def scoring(self, o):
        return dict(batch_tokens=o.batch_tokens, rank=self.rank, world_size=self.world_size, progress=self.advance)


# --- tasks: each gives its jobs, with everything read and checked, before the first of them runs ---

@dataclasses.dataclass
class Job:
    task: str
    settings: dict              # all that decides the result
    run: object                 # () -> ({name: (value, stderr)}, n, counts)


def plan_bpb(subject, o, machine, where):
    """Bits per byte and perplexities: every token once, each document on its own after the end-of-text token."""
    jobs = []
    if not (where or o.text):
        raise ValueError("task bpb needs text: --text=PATH, or --text=NAME=PATH,NAME=PATH for several")
    windows([1], 0, subject.model.config.context, o.stride)             # refuses an impossible stride now
    for item in filter(None, map(str.strip, (where or o.text).split(","))):
        name, named, path = item.partition("=")
        if os.path.exists(item) or not named:
            name, path = os.path.basename(item.rstrip("/")).partition(".")[0] or item, item
        ids, n_bytes, n_words, data = benchmarks.load_texts(path, subject.tokenizer, o.text_column, o.max_text_bytes,
                                                           o.invalid_utf8)
        if any(job.task == f"bpb:{name}" for job in jobs):
            raise ValueError(f"two sources of bpb are both named {name}; name them, as in --text=a=PATH,b=PATH")
        settings = subject.settings(data={path: data}, stride=o.stride or subject.model.config.context)
        jobs.append(Job(f"bpb:{name}", settings, bpb_job(subject, o, machine, ids, n_bytes, n_words)))
    return jobs


def bpb_job(subject, o, machine, ids, n_bytes, n_words):
    def run():
        trees, document = [], []
        for number, doc in enumerate(ids):
            trees += windows(doc.tolist(), subject.tokenizer.start_id, subject.model.config.context, o.stride)
            document += [number] * (len(trees) - len(document))
        machine.start("bpb", len(trees))
        nats = -np.array([branches[0][0] for branches in score(subject.model, trees, **machine.scoring(o))])
        tokens = np.array([len(branches[0]) for _, branches in trees])
        # a document's bytes and words by its windows' shares; the errors of one document alone are its windows'
        shares = np.array([max(1, subject.tokenizer.token_bytes[branches[0]].sum()) for _, branches in trees], float)
        shares /= np.bincount(document, shares)[document]
        bytes_, words = (shares * np.array(column, float)[document] for column in (n_bytes, n_words))
        groups = document if len(ids) > 1 else None
        figures = {"bits_per_byte": mean_stderr(nats / math.log(2), bytes_, groups)}
        for name, units in ("perplexity", tokens), ("word_perplexity", words), ("byte_perplexity", bytes_):
            mean, stderr = mean_stderr(nats, units, groups)
            value = math.exp(mean) if mean < 700 else math.inf      # text without spaces is one long word
            figures[name] = value, value * stderr
        counts = dict(documents=len(ids), tokens=int(tokens.sum()), bytes=sum(n_bytes), words=sum(n_words),
                      clusters="documents" if len(ids) > 1 else "windows")
        return figures, len(ids), counts
    return run


def plan_choices(subject, o, machine, task, where):
    """Accuracy of the likeliest answer, and of the likeliest per character (acc_norm)."""
    items, files, n_shots = benchmarks.load_choices(task, where, o.shots, o.limit, subject.chat)
    context, pairs = subject.model.config.context, [(item.context, answer) for item in items
                                                    for answer in item.continuations]
    if subject.chat:
        # the white space before the continuation belongs to it, here the line end of the answer's header
        newline, encode = subject.tokenizer.encode("\n"), subject.tokenizer.encode
        encoded = [(chat_ids(subject, asked)[:-len(newline)], newline + encode(answer)) for asked, answer in pairs]
    else:
        encoded = encode_pairs(subject.tokenizer, pairs)
    trees, places = plant(encoded, context)
    settings = subject.settings(data=files, shots=n_shots, limit=o.limit)

    def run():
        machine.start(task, len(trees))
        scored = score(subject.model, trees, **machine.scoring(o))
        found = iter([scored[tree][branch][0] for tree, branch in places])
        right, right_norm = [], []
        for item in items:
            nats = np.array([next(found) for _ in item.continuations])
            right.append(nats.argmax() == item.gold)
            right_norm.append((nats / item.lengths).argmax() == item.gold)
        groups = [item.group for item in items]
        figures = {"acc": mean_stderr(right, groups=groups)}
        if task != "mmlu":                              # its answers are letters, all of one length
            figures["acc_norm"] = mean_stderr(right_norm, groups=groups)
        cut = sum(len(a) + len(b) > context + 1 for a, b in encoded)
        if 2 * cut > len(encoded):
            machine.print(f"{task}: {cut} of {len(encoded)} prompts are longer than the context of {context} and lost "
                          "their beginning; the figures mean little (try --shots=0)")
        return figures, len(items), dict(answers=len(encoded), cut_on_the_left=cut, clusters=len(set(groups)))
    return [Job(task, settings, run)]


def plan_questions(subject, o, machine, task, where):
    """Greedy accuracy, or the mean over samples and pass@k, of answers that tasks.py verifies."""
    usual = 0 if subject.chat else 5
    kind, n_shots, files, examples = TASKS[task], usual if o.shots < 0 else o.shots, {}, []
    if kind.generated and where != o.eval_data:
        raise ValueError(f"task {task} generates its questions and reads no file, got {where!r}")
    paths = {"test": None, "train": None}
    for split in ("test", "train")[:1 + bool(n_shots)] if not kind.generated else ():
        try:
            paths[split], files[split] = benchmarks.question_file(task, where, split)
        except ValueError as error:
            if split == "test":
                raise
            raise ValueError(f"{error}; or ask without worked examples, --shots=0") from None
    if n_shots:
        examples = list(kind.questions("train", path=paths["train"], limit=n_shots))
        if len(examples) < n_shots:
            raise ValueError(f"task {task} has {len(examples)} worked examples, and --shots={n_shots} asks for more")
    limit = o.limit or (500 if kind.generated else 0)
    questions = list(kind.questions("test", path=paths["test"], limit=limit))
    refuse_empty(task, [question.problem for question in questions])
    asked = []
    for question in questions:
        if subject.chat:
            before = [message for example in examples for message in
                      (*kind.messages(example), {"role": "assistant", "content": example.worked})]
            asked.append(subject.tokenizer.encode_chat(before + kind.messages(question), open_answer=True)[0])
        else:
            parts = [kind.plain(example) + kind.plain_answer(example) for example in examples] + [kind.plain(question)]
            asked.append(plain_ids(subject, "\n\n".join(parts)))
    stop = () if subject.chat else kind.stop
    texts, settings = plan_answers(subject, o, machine, task, asked, kind.max_new_tokens, stop)
    settings.update(data=files, shots=n_shots, limit=limit)

    def run():
        answers, counts = texts()
        if subject.chat:
            judged = [[(*kind.score(text, question.answer), kind.lenient(text, question.answer)) for text in row]
                      for question, row in zip(questions, answers)]
            names = {"strict": 0, "lenient": 2, "format": 1}
        else:
            judged = [[kind.score_plain(text, question.answer) for text in row]
                      for question, row in zip(questions, answers)]
            names = {"strict": 0, "lenient": 1}
        hits = {name: [[verdict[at] for verdict in row] for row in judged] for name, at in names.items()}
        return answer_figures(hits, o.samples, [question.key for question in questions]), len(questions), counts
    return [Job(task, settings, run)]


def plan_humaneval(subject, o, machine, task, where):
    """Share of functions that pass their tests, and pass@k (Chen et al. 2021, arXiv:2107.03374)."""
    if not o.allow_code_execution:
        raise ValueError("humaneval runs Python that the model wrote: in a separate process, with limits on time, "
                         "memory, files, processes and network (sandbox.py); if you want that, say "
                         "--allow_code_execution=true")
    rows, files = benchmarks.load_generated(task, where, o.limit)
    ask = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{}```"
    asked = [chat_ids(subject, ask.format(row["prompt"])) if subject.chat else plain_ids(subject, row["prompt"])
             for row in rows]
    texts, settings = plan_answers(subject, o, machine, task, asked, 512, () if subject.chat else sandbox.STOP)
    settings.update(data=files, limit=o.limit, seconds_a_program=10)

    def run():
        answers, counts = texts()
        programs = [benchmarks.program_of(row, text) if subject.chat else sandbox.humaneval_program(row, text)
                    for row, given in zip(rows, answers) for text in given]
        machine.start("running programs", len(programs))

        def passes(program):
            passed, _ = sandbox.run(program, seconds=10)
            machine.advance()
            return passed
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // machine.world_size)) as pool:
            passed = machine.share(lambda mine: list(pool.map(passes, mine)), programs)
        hits = {"pass@1": [passed[i:i + o.samples] for i in range(0, len(passed), o.samples)]}
        return answer_figures(hits, o.samples), len(rows), counts
    return [Job(task, settings, run)]


def plan_ifeval(subject, o, machine, task, where):
    """Shares of prompts and of instructions followed, strict and loose (Zhou et al. 2023, arXiv:2311.07911)."""
    rows, files = benchmarks.load_generated(task, where, o.limit)
    unknown = sorted({name for row in rows for name in row["instruction_id_list"]} - set(ifeval.SUPPORTED))
    if unknown:
        raise ValueError(f"ifeval asks for instructions that ifeval.py does not verify: {', '.join(unknown)}")
    asked = [chat_ids(subject, row["prompt"]) if subject.chat else plain_ids(subject, row["prompt"]) for row in rows]
    texts, settings = plan_answers(subject, o, machine, task, asked, 1280, ())
    settings.update(data=files, limit=o.limit)

    def run():
        answers, counts = texts()
        checks = [ifeval.check(row["prompt"], text, row["instruction_id_list"], row["kwargs"])
                  for row, given in zip(rows, answers) for text in given]
        prompt = [number for number, given in enumerate(answers) for _ in given]
        figures = {}
        for at, name in enumerate(("strict", "loose")):
            followed = [check[at] for check in checks]
            figures[f"prompt_{name}"] = mean_stderr(list(map(all, followed)), groups=prompt)
            figures[f"instruction_{name}"] = mean_stderr(list(map(sum, followed)), list(map(len, followed)), prompt)
        return figures, len(rows), dict(counts, instructions=sum(len(row["instruction_id_list"]) for row in rows))
    return [Job(task, settings, run)]


def plan_judge(subject, o, machine, task, where):
    """Win rate against another model, both orders asked, ties kept (Zheng et al. 2023, arXiv:2306.05685)."""
    given = {"prompts": where or o.prompts, "against": o.against, "judge": o.judge}
    if not all(given.values()):
        raise ValueError("task judge needs --" + ", --".join(name for name in given if not given[name]))
    remote = o.judge.startswith(("http://", "https://"))
    if remote and not o.judge_model:
        raise ValueError(f"--judge={o.judge} needs --judge_model, the name of the model there")
    ask = (judges.endpoint(o.judge, o.judge_model, o.judge_key_env) if remote else
           judges.reward_model(fetch(o.judge), pick_device(o.device)))
    asked, other = judges.read_prompts(given["prompts"])[:o.limit or None], load(o.against, o.mode, o.device, o.dtype)
    refuse_empty(f"{task} {given['prompts']}", [chat[-1]["content"] for chat in asked])
    if not remote:
        judge_files = sorted(glob.glob(os.path.join(glob.escape(fetch(o.judge)), "*.safetensors")))
    texts, settings = zip(*(plan_answers(who, o, machine, f"{task} {who.name}",
                                         [messages_ids(who, chat) for chat in asked], 512, ())
                            for who in (subject, other)))
    settings = dict(settings[0], data={given["prompts"]: benchmarks.file_fingerprint(given["prompts"])}, limit=o.limit,
                    against=o.against, against_settings=settings[1], judge=o.judge, judge_model=o.judge_model,
                    **({} if remote else {"judge_weights": [*map(benchmarks.file_fingerprint, judge_files)]}))

    def run():
        (mine, counts), (theirs, _) = (answer() for answer in texts)
        machine.start("judging", 2 * len(asked) * machine.world_size)
        found = [None]
        if machine.rank == 0:
            try:
                found[0] = judges.win_rate(asked, [row[0] for row in mine], [row[0] for row in theirs], ask,
                                           8 if remote else 1, lambda _: machine.advance())
            except ValueError as error:                     # the other ranks wait for a word
                found[0] = error
        if machine.world_size > 1:
            dist.broadcast_object_list(found)
        result = found[0]
        if isinstance(result, ValueError):
            raise result
        more = {name: result[name] for name in ("wins", "losses", "ties", "inconsistent", "failed")}
        return {"win_rate": (result["win_rate"], result["stderr"])}, result["n"], {**counts, **more}
    return [Job(task, settings, run)]


# --- generated answers ---

def refuse_empty(task, texts):
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise ValueError(f"{task}: prompt {number:,} is empty; remove its row")


def plain_ids(subject, text):
    """A base model's prompt, which begins as documents do."""
    return [subject.tokenizer.start_id, *subject.tokenizer.encode(text)]


def chat_ids(subject, text):
    return messages_ids(subject, [{"role": "user", "content": text}])


def messages_ids(subject, messages):
    if subject.chat:
        return subject.tokenizer.encode_chat(messages, open_answer=True)[0]
    return plain_ids(subject, "\n\n".join(message["content"] for message in messages) + "\n\n")


def plan_answers(subject, o, machine, task, asked, usual_tokens, stop):
    """(a function that gives ([[text of each sample] of each prompt], counts), settings). ValueError for a prompt that
    fills the context."""
    context, n_new = subject.model.config.context, o.max_new_tokens or usual_tokens
    long = [len(ids) for ids in asked if len(ids) >= context]
    if long:
        raise ValueError(f"{task}: {len(long)} of {len(asked)} prompts leave no room for an answer, the longest with "
                         f"{max(long)} tokens where the context of {subject.name} is {context}" +
                         ("" if subject.chat else "; try fewer worked examples, as in --shots=0"))
    ends = subject.model.config.stop_ids
    greedy = o.samples == 1
    sampling = {} if greedy else dict(temperature=o.temperature, seed=o.seed)
    settings = subject.settings(samples=o.samples, max_new_tokens=n_new, stop=list(stop), **sampling)

    def mine(prompts):
        done = 0

        def progress(finished):
            nonlocal done
            machine.advance(finished - done)
            done = finished
        made = engine.generate(subject.model, prompts, o.samples, max_new_tokens=n_new, stop=[*ends, *stop],
                               temperature=0.0 if greedy else o.temperature, seed=o.seed, max_batch=o.max_batch,
                               tokenizer=subject.tokenizer, progress=progress) if prompts else []
        texts = [(answer_text(sample.tokens, subject.tokenizer, ends, stop), sample.finish) for sample in made]
        return [texts[i:i + o.samples] for i in range(0, len(texts), o.samples)]

    def run():
        machine.start(task, len(asked) * o.samples)
        rows = machine.share(mine, asked)
        finishes = Counter(finish for row in rows for _, finish in row)
        return [[text for text, _ in row] for row in rows], {f"ended_by_{name}": finishes[name] for name in
                                                             ("stop", "length", "context")}
    return run, settings


def answer_text(tokens, tokenizer, ends, stop):
    """The text of generated ids, without the stop that ended it."""
    text = tokenizer.decode([token for token in tokens if token not in ends])
    return text[:min((at for at in map(text.find, stop) if at >= 0), default=None)]


# --- all of them ---

PLANS = {**dict.fromkeys(benchmarks.CHOICES, plan_choices), **dict.fromkeys(TASKS, plan_questions),
         "humaneval": plan_humaneval, "ifeval": plan_ifeval, "judge": plan_judge}


def plan(subject, o, machine):
    """The jobs of --tasks. ValueError for an unknown task, and for whatever a task finds missing."""
    jobs = []
    # a comma before a name ends a task; others stand in the value, as in bpb=a.txt,b.txt
    for item in filter(None, (item.strip(" ,") for item in re.split(r",(?=\s*\w+\s*(?:[=,]|$))", o.tasks))):
        task, _, where = item.partition("=")
        if task != "bpb" and task not in PLANS:
            raise ValueError(f"there is no task {task!r}{nearest(task, ['bpb', *PLANS])}; tasks are bpb, "
                             f"{', '.join(PLANS)}")
        if task == "bpb":
            jobs += plan_bpb(subject, o, machine, where)
        else:
            jobs += PLANS[task](subject, o, machine, task, where if task == "judge" else where or o.eval_data)
    if not jobs:
        raise ValueError(f"--tasks={o.tasks!r} names none; tasks are bpb, {', '.join(PLANS)}")
    return jobs
