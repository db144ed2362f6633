"""Log-likelihoods, accuracies and perplexities equal lm-evaluation-harness's `hf` model on the same directory."""
import json
import math
import os
import random

import pytest
import torch

import benchmarks
import eval as evaluation
import plans
from configurator import read_options
from likelihood import loglikelihoods
from model import GPT, Config
from tokenizer import Tokenizer

os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")
lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (requirements-test.txt)")

CONTEXT = 192
SHARED_YAML = {"hellaswag": "hellaswag/hellaswag", "arc_easy": "arc/arc_easy", "arc_challenge": "arc/arc_challenge",
               "piqa": "piqa/piqa", "mmlu": "mmlu/default/mmlu_anatomy"}
WORDS = ("the cat dog hen sat ran on under mats rivers 12 3,400 café naïve – it's don't \"quoted\" (twice) x_1 = y; "
         "Über größer 東京 is of and Which who what water rock light 🙂").split(" ")


def sentence(pick, low, high):
    return " ".join(pick.choice(WORDS) for _ in range(pick.randint(low, high)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model that is far from uniform, its tokenizer, and files in the published formats; some prompts are
    longer than its context."""
    folder, pick = tmp_path_factory.mktemp("harness"), random.Random(0)
    texts = [sentence(pick, 5, 60) for _ in range(200)]
    tokenizer = Tokenizer.train(texts, 384)
    torch.manual_seed(0)
    model = GPT(Config(-(-tokenizer.vocab_size // 128) * 128, n_layer=2, n_head=4, n_kv_head=2, n_embd=32,
                       context=CONTEXT, eos_id=tokenizer.eot_id, pad_id=tokenizer.pad_id))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.25)
    model.save(folder / "model")
    tokenizer.save(folder / "model")

    def write(name, rows):
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    for split in ("val", "train"):
        write(f"hellaswag_{split}.jsonl", [
            dict(ind=i, activity_label=sentence(pick, 1, 2), ctx_a=f"[header] {sentence(pick, 3, 9)} [title] Then.",
                 ctx_b=sentence(pick, 1, 4), label=str(pick.randrange(4)), source_id=f"s{i // 2}",
                 endings=[f" {sentence(pick, 2, 9)} [step]  {sentence(pick, 1, 9)}" for _ in range(4)])
            for i in range(12)])
    for name, split in (("arc-easy", "test"), ("arc-easy", "train"), ("arc-challenge", "test")):
        write(f"{name}.{split}.jsonl", [
            dict(question=sentence(pick, 4, 90), answerKey="ABC"[pick.randrange(3)], choices=dict(
                text=[sentence(pick, 1, 6) for _ in range(3)], label=["A", "B", "C"])) for _ in range(12)])
    for split in ("val", "train"):
        write(f"piqa_{split}.jsonl", [
            dict(goal=sentence(pick, 4, 12), sol1=sentence(pick, 3, 20), sol2=sentence(pick, 3, 20),
                 label=pick.randrange(2)) for _ in range(12)])
    for split in ("test", "dev"):
        write(f"mmlu.{split}.jsonl", [
            dict(subject="anatomy", question=f" {sentence(pick, 3, 9)}", answer=pick.randrange(4),
                 choices=[sentence(pick, 1, 2) for _ in range(4)]) for _ in range(12)])
    write("docs.jsonl", [dict(text=sentence(pick, 1, 300) + "\n\n" + sentence(pick, 1, 20)) for _ in range(12)])
    return folder


@pytest.fixture(scope="module")
def hf(folder):
    from lm_eval.models.huggingface import HFLM
    return HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=4)


def harness_task(name, folder, shots=0):
    """The harness's own task, with its templates, over our files."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml
    stem = {"arc_easy": "arc-easy", "arc_challenge": "arc-challenge"}.get(name, name)
    if name == "docs":
        config = dict(task=name, test_split="test", output_type="loglikelihood_rolling", doc_to_text="",
                      doc_to_target="{{text}}", metric_list=[{"metric": metric} for metric in (
                          "word_perplexity", "byte_perplexity", "bits_per_byte")])
        files = {"test": "docs.jsonl"}
    else:
        config = load_yaml(os.path.join(os.path.dirname(lm_eval.__file__), "tasks", SHARED_YAML[name] + ".yaml"))
        config.pop("tag", None)
        words = {"val": "validation"}
        files = {words.get(split, split): file for file in sorted(os.listdir(folder / "data")) if file.startswith(stem)
                 for split in [file.replace("_", ".").split(".")[-2]]}
        for split in ("training_split", "validation_split", "test_split", "fewshot_split"):
            if config.get(split) not in files:
                config[split] = None
    return ConfigurableTask(config=dict(
        config, task=f"{name}-{shots}", dataset_path="json", dataset_name=None, num_fewshot=shots, dataset_kwargs={
            "data_files": {split: str(folder / "data" / file) for split, file in files.items()},
            "cache_dir": str(folder / "cache")}))


CASES = [("hellaswag", 0), ("hellaswag", 1), ("arc_easy", 0), ("arc_easy", 2), ("arc_challenge", 0), ("piqa", 0),
         ("mmlu", 0), ("mmlu", 2)]


@pytest.fixture(scope="module")
def theirs(folder, hf):
    """What the harness makes of every task: {"results": ..., "samples": ...}, by names like arc_easy-2."""
    from lm_eval import simple_evaluate
    found = simple_evaluate(hf, tasks=[harness_task(name, folder, shots) for name, shots in [*CASES, ("docs", 0)]],
                            bootstrap_iters=0, log_samples=True)
    in_chat = simple_evaluate(hf, tasks=[harness_task("piqa", folder)], bootstrap_iters=0, apply_chat_template=True)
    return {"results": {**found["results"], "chat": in_chat["results"]["piqa-0"]}, "samples": found["samples"]}


def ours(folder, task, **options):
    """({name: value}, {name: stderr}) of a task, as the script gives them."""
    values = {name: default for name, (default, *_) in read_options(evaluation.__file__).items()}
    values.update(eval_data=str(folder / "data"), tasks=task, dtype="fp32", device="cpu", **options)
    o, machine = type("Options", (), values), plans.Machine()
    subject = plans.load(str(folder / "model"), o.mode, o.device, o.dtype)
    (job,) = plans.plan(subject, o, machine)
    return job.run()


def test_log_likelihoods_equal_on_every_kind_of_context(folder, hf):
    from lm_eval.api.instance import Instance
    pick = random.Random(1)
    pairs = [("", " the cat"), ("", "sat"), ("the cat", " sat on"), ("the cat ", "sat on"), ("the cat \n ", "sat"),
             ("the c", "at sat on"), ("東", "京 is of"), ("it", "'s \n"), ("on", " "),
             *((sentence(pick, 1, 60), " " + sentence(pick, 1, 12)) for _ in range(20)),
             (sentence(pick, 200, 200), " the cat"), (sentence(pick, 60, 60), " " + sentence(pick, 40, 40))]
    shared = sentence(pick, 9, 9)
    pairs += [(shared, " " + sentence(pick, 1, 9)) for _ in range(5)]
    theirs = hf.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)],
                              disable_tqdm=True)
    model, tokenizer = GPT.load(str(folder / "model")), Tokenizer.load(folder / "model")
    mine = loglikelihoods(model, tokenizer, pairs, batch_tokens=700)
    for pair, (logp, greedy, _), (their_logp, their_greedy) in zip(pairs, mine, theirs):
        assert logp == pytest.approx(their_logp, abs=1e-3), pair
        assert greedy == their_greedy, pair
    assert any(len(tokenizer.encode(a + b)) > CONTEXT + 1 for a, b in pairs), "no pair was cut on the left"


@pytest.mark.parametrize("task, shots", CASES)
def test_multiple_choice_equals_item_by_item(folder, theirs, task, shots):
    name = f"{task}-{shots}"
    items, _, _ = benchmarks.load_choices(task, str(folder / "data"), shots)
    samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(items)
    pairs = [(item.context, answer) for item in items for answer in item.continuations]
    their_pairs = [tuple(argument.values()) if isinstance(argument, dict) else tuple(argument) for sample in samples for
                   argument in (sample["arguments"].values() if isinstance(sample["arguments"], dict) else
                                sample["arguments"])]
    assert pairs == [tuple(pair[:2]) for pair in their_pairs]
    model, tokenizer = GPT.load(str(folder / "model")), Tokenizer.load(folder / "model")
    mine = [logp for logp, _, _ in loglikelihoods(model, tokenizer, pairs)]
    assert mine == pytest.approx([float(logp) for sample in samples for logp, _ in sample["filtered_resps"]], abs=1e-3)

    figures, n, _ = ours(folder, task, shots=shots)
    result = theirs["results"][name]
    for metric in figures:
        assert figures[metric][0] == pytest.approx(result[f"{metric},none"], abs=1e-9)
    if task in ("arc_easy", "piqa"):                    # questions of their own: the plain standard error
        assert figures["acc"][1] == pytest.approx(harness_stderr(samples, "acc"), abs=1e-9)


def harness_stderr(samples, metric):
    from lm_eval.api.metrics import mean_stderr
    return mean_stderr([sample[metric] for sample in samples])


def test_perplexities_equal(folder, theirs):
    figures, n, counts = ours(folder, f"bpb={folder / 'data' / 'docs.jsonl'}")
    assert n == 12 and counts["tokens"] > 12 * CONTEXT / 2
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        value = theirs["results"]["docs-0"][f"{name},none"]
        assert math.log(figures[name][0]) == pytest.approx(math.log(value), abs=1e-3)


def test_a_chat_model_is_asked_as_with_apply_chat_template(folder, theirs):
    figures, _, _ = ours(folder, "piqa", mode="chat")
    result = theirs["results"]["chat"]
    assert {name: value for name, (value, _) in figures.items()} == pytest.approx(
        {name: result[f"{name},none"] for name in figures}, abs=1e-9)
