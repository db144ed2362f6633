"""eval.py, plans.py, likelihood.py and results.py: closed forms, a naive loop as reference, invariance to batches,
ranks and resuming, the table, and one sentence for every bad input."""
import itertools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch

import eval as evaluation
import plans
import results
from configurator import read_options
from likelihood import encode_pairs, loglikelihoods, plant, score, windows
from model import GPT, Config
from results import answer_figures, mean_stderr, pass_at_k, table_text
from tokenizer import Tokenizer

ROOT = os.path.dirname(os.path.abspath(evaluation.__file__))
CONTEXT = 96
WORDS = "the cat dog hen sat ran on under 12 mats; café – it's".split(" ")


def sentence(pick, low, high):
    return " ".join(pick.choice(WORDS) for _ in range(pick.randint(low, high)))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/, chat/ (the same model, answers end at <|im_end|>), uniform/ (every token is as likely), and data/."""
    folder, pick = tmp_path_factory.mktemp("eval"), random.Random(0)
    tokenizer = Tokenizer.train([sentence(pick, 5, 60) for _ in range(50)], 300)
    for name in ("base", "chat", "uniform"):
        torch.manual_seed(0)
        model = GPT(Config(384, n_layer=2, n_head=4, n_kv_head=2, n_embd=16, context=CONTEXT if name != "chat" else 400,
                           eos_id=tokenizer.eot_id, pad_id=tokenizer.pad_id,
                           end_ids=(tokenizer.chat_end_id,) if name == "chat" else ()))
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.3)
        if name == "uniform":
            torch.nn.init.zeros_(model.lm_head.weight)
        model.save(folder / name)
        tokenizer.save(folder / name)
    (folder / "data").mkdir()
    write(folder / "data" / "arc-easy.test.jsonl", [
        dict(question=sentence(pick, 3, 9), answerKey=pick.choice("ABC"),
             choices=dict(text=[sentence(pick, 1, 9) for _ in range(3)], label=["A", "B", "C"])) for _ in range(20)])
    write(folder / "data" / "docs.jsonl", [dict(text=sentence(pick, 5, 200)) for _ in range(9)])
    write(folder / "data" / "gsm8k.test.jsonl", [dict(question=f"{i}?", answer=f"so\n#### {i}") for i in range(6)])
    write(folder / "data" / "gsm8k.train.jsonl", [dict(question=f"{i} and?", answer=f"so\n#### {i}") for i in range(9)])
    return folder


def opened(folder, name):
    return GPT.load(str(folder / name)), Tokenizer.load(folder / name)


def naive(model, ids, first):
    """The summed log-probability of ids[first:], one forward pass of the model's own for each."""
    nats = 0.0
    for i in range(first, len(ids)):
        logits = model.logits(model.forward_hidden(torch.tensor([ids[:i]]))[0, -1])
        nats += torch.log_softmax(logits.double(), -1)[ids[i]].item()
    return nats


def planned(folder, task, model="base", **options):
    values = {name: default for name, (default, *_) in read_options(evaluation.__file__).items()}
    values.update(eval_data=str(folder / "data"), tasks=task, dtype="fp32", device="cpu", **options)
    o = type("Options", (), values)
    subject = plans.load(str(folder / model), o.mode, o.device, o.dtype)
    return plans.plan(subject, o, plans.Machine())


# --- figures ---

def test_without_groups_the_standard_error_is_the_sample_deviation_over_root_n():
    values = [1, 0, 0, 1, 1, 0.5]
    assert mean_stderr(values) == pytest.approx((statistics.mean(values), statistics.stdev(values) / math.sqrt(6)))


def test_clustered_standard_error_by_hand():
    # mean 0.5; sums of deviations by group: a: 0.5 + 0.5 = 1, b: -0.5 - 0.5 = -1, c: 0.5 - 0.5 = 0
    mean, stderr = mean_stderr([1, 1, 0, 0, 1, 0], groups=["a", "a", "b", "b", "c", "c"])
    assert (mean, stderr) == pytest.approx((0.5, math.sqrt(3 / 2 * (1 + 1 + 0)) / 6))
    doubled = mean_stderr([1, 0, 1, 0] * 2, groups=[0, 1, 2, 3] * 2)[1]     # asking everything twice adds no certainty
    assert doubled == pytest.approx(mean_stderr([1, 0, 1, 0])[1])


def test_standard_error_of_a_ratio_by_hand():
    # 6 of 12: residuals 1 - 2/2 = 0, 2 - 4/2 = 0, 3 - 6/2 = 0: exactly proportional, no error
    assert mean_stderr([1, 2, 3], [2, 4, 6]) == pytest.approx((0.5, 0.0))
    mean, stderr = mean_stderr([1, 3], [2, 2])                              # residuals -1 and 1
    assert (mean, stderr) == pytest.approx((1.0, math.sqrt(2 / 1 * 2) / 4))


def test_one_group_has_no_standard_error():
    assert math.isnan(mean_stderr([1, 0], groups=["a", "a"])[1])


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    for n, correct in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1) if correct <= n else ():
            subsets = list(itertools.combinations([i < correct for i in range(n)], k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_reported_for_powers_of_two_and_clustered_over_questions():
    figures = answer_figures({"strict": [[1, 0, 0, 0], [1, 1, 1, 1]]}, 4)
    assert list(figures) == ["strict", "pass@1", "pass@2", "pass@4"]
    assert figures["strict"] == pytest.approx((0.625, 0.375)) == figures["pass@1"]
    assert figures["pass@2"][0] == pytest.approx((0.5 + 1) / 2) and figures["pass@4"] == pytest.approx((1.0, 0.0))
    assert list(answer_figures({"strict": [[1], [0]]}, 1)) == ["strict"]


# --- log-likelihoods ---

def test_log_likelihoods_equal_a_naive_loop_whatever_the_batch(folder):
    model, tokenizer = opened(folder, "base")
    pick = random.Random(1)
    pairs = [(sentence(pick, 1, 8), " " + sentence(pick, 1, 8)) for _ in range(6)]
    pairs += [(pairs[0][0], " " + sentence(pick, 1, 8)) for _ in range(4)] + [("", "cat"), (pairs[0][0], " cat")]
    expected = [naive(model, a + b, len(a)) for a, b in encode_pairs(tokenizer, pairs)]
    for batch_tokens in (0, 1, 150):
        found = loglikelihoods(model, tokenizer, pairs, batch_tokens)
        assert [nats for nats, _, _ in found] == pytest.approx(expected, abs=1e-4)
    assert loglikelihoods(model, tokenizer, pairs[::-1])[-1][0] == pytest.approx(expected[0], abs=1e-4)


def test_is_greedy_says_whether_every_token_is_the_likeliest(folder):
    model, _ = opened(folder, "base")
    context, greedy = [5, 6, 7], []
    for _ in range(4):
        greedy.append(int(model.logits(model.forward_hidden(torch.tensor([context + greedy]))[0, -1]).argmax()))
    other = [*greedy[:2], (greedy[2] + 1) % 384, greedy[3]]
    (tree,) = score(model, [(context, [greedy, other, greedy[:1]])], greedy=True)
    assert [hit for _, hit in tree] == [True, False, True]
    assert score(model, [(context, [greedy])])[0][0][1] is None


def test_context_and_continuation_are_encoded_together(folder):
    _, tokenizer = opened(folder, "base")
    ((context, continuation),) = encode_pairs(tokenizer, [("the cat \n", "sat")])
    assert context == tokenizer.encode("the cat")               # white space goes to the continuation
    assert context + continuation == tokenizer.encode("the cat \nsat")
    ((context, continuation),) = encode_pairs(tokenizer, [("the ca", "t sat on")])
    whole, alone = tokenizer.encode("the cat sat on"), tokenizer.encode("the ca")
    assert context == alone and continuation == whole[len(alone):]
    assert encode_pairs(tokenizer, [("", "cat")]) == [([tokenizer.eot_id], tokenizer.encode("cat"))]


def test_what_the_tokenizers_file_puts_before_every_text_is_put_there(folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "bos")
    path = tmp_path / "bos" / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    bos = next(token for token in spec["added_tokens"] if token["content"] == "<|im_start|>")
    single = [{"SpecialToken": {"id": bos["content"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    spec["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single + [single[1]],
                              "special_tokens": {bos["content"]: {"id": bos["content"], "ids": [bos["id"]],
                                                                  "tokens": [bos["content"]]}}}
    path.write_text(json.dumps(spec), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path / "bos")
    (first, second) = encode_pairs(tokenizer, [("the", " cat"), ("", "cat")])
    assert first[0] == [bos["id"], *tokenizer.encode("the")] and second[0] == [bos["id"]]


def test_the_left_end_is_cut_and_the_last_token_is_never_read():
    encoded = [(list(range(20)), [90, 91]), (list(range(20)), [92, 93, 94]), ([1, 2], [3])]
    trees, places = plant(encoded, context_length=8)
    # 8 + 1 tokens stay: the last 7 of the context with 2 new ones, the last 6 with 3
    assert trees == [(list(range(13, 20)), [[90, 91]]), (list(range(14, 20)), [[92, 93, 94]]), ([1, 2], [[3]])]
    assert places == [(0, 0), (1, 0), (2, 0)]
    assert plant([([1], list(range(8)))], 8)[0] == [([1], [list(range(8))])]
    with pytest.raises(ValueError, match="continuation 1 has 9 tokens, more than the model's context of 8"):
        plant([([1], list(range(9)))], 8)


def test_continuations_of_one_context_share_its_computation():
    encoded = [([1, 2], [3]), ([4], [5]), ([1, 2], [6, 7])]
    assert plant(encoded, 8) == ([([1, 2], [[3], [6, 7]]), ([4], [[5]])], [(0, 0), (1, 0), (0, 1)])


def test_an_empty_continuation_is_refused(folder):
    with pytest.raises(ValueError, match="continuation 2 is empty, or melts into its context: ''"):
        encode_pairs(opened(folder, "base")[1], [("the", " cat"), ("the", "")])


@pytest.mark.parametrize("n, context, stride", [(1, 8, 0), (8, 8, 0), (9, 8, 0), (30, 8, 0), (30, 8, 3), (30, 8, 1)])
def test_windows_predict_every_token_once_with_all_the_context_they_may_have(n, context, stride):
    ids, seen = list(range(100, 100 + n)), []
    for number, (before, (targets,)) in enumerate(windows(ids, 99, context, stride)):
        whole = before + targets
        assert len(whole) <= context + 1 and whole == [99, *ids][(at := [99, *ids].index(whole[0])):at + len(whole)]
        if number and stride and len(seen) + len(targets) < n:
            assert len(before) == context - stride + 1
        seen += targets
    assert seen == ids


def test_bits_per_byte_of_a_uniform_model_are_in_closed_form(folder):
    _, tokenizer = opened(folder, "uniform")
    path = folder / "data" / "docs.jsonl"
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    tokens, size = sum(len(tokenizer.encode(text)) for text in texts), sum(len(text.encode()) for text in texts)
    (job,) = planned(folder, f"bpb={path}", "uniform")
    figures, n, counts = job.run()
    assert job.task == "bpb:docs" and (n, counts["tokens"], counts["bytes"]) == (9, tokens, size)
    assert figures["perplexity"] == pytest.approx((384, 0), rel=1e-5, abs=1e-2)
    assert figures["bits_per_byte"][0] == pytest.approx(math.log2(384) * tokens / size, rel=1e-6)
    assert math.log2(figures["byte_perplexity"][0]) == pytest.approx(figures["bits_per_byte"][0])


@pytest.mark.parametrize("stride", [0, 40])
def test_bits_per_byte_equal_a_naive_loop_over_windows(folder, tmp_path, stride):
    model, tokenizer = opened(folder, "base")
    text = sentence(random.Random(3), 100, 100)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (job,) = planned(folder, f"bpb={tmp_path / 'a.txt'}", stride=stride)
    figures, n, counts = job.run()
    ids, nats = [tokenizer.eot_id, *tokenizer.encode(text)], 0.0
    step = stride or CONTEXT
    for i in range(1, len(ids)):
        end = CONTEXT if i <= CONTEXT else CONTEXT + -(-(i - CONTEXT) // step) * step   # of the window that predicts i
        end = min(end, len(ids) - 1)
        nats -= naive(model, ids[max(0, end - CONTEXT):i + 1], i - max(0, end - CONTEXT))
    assert figures["bits_per_byte"][0] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert n == 1 and counts["clusters"] == "windows" and figures["bits_per_byte"][1] > 0


def test_several_sources_are_several_results(folder):
    path = folder / "data" / "docs.jsonl"
    jobs = planned(folder, "bpb", text=f"one={path},{path}", max_text_bytes=300)
    assert [job.task for job in jobs] == ["bpb:one", "bpb:docs"]
    assert jobs[0].run()[2]["bytes"] == 300


# --- tasks ---

def test_accuracy_takes_the_likeliest_answer_and_acc_norm_the_likeliest_per_character(folder, monkeypatch, tmp_path):
    rows = [dict(goal="x", sol1="ab", sol2="abcdefgh", label=1), dict(goal="y", sol1="ab", sol2="abcd", label=0)]
    path = write(tmp_path / "p.jsonl", rows)
    nats = {0: [(-2.0, None), (-4.0, None)], 1: [(-2.0, None), (-5.0, None)]}
    monkeypatch.setattr(plans, "score", lambda model, trees, **_: [nats[i] for i in range(len(trees))])
    figures, n, counts = planned(folder, f"piqa={path}")[0].run()
    # by sum: 0, 0 of 1, 0; by character: -1 and -0.5, so 1; -1 and -1.25, so 0
    assert figures["acc"][0] == 0.5 and figures["acc_norm"][0] == 1.0 and n == 2 and counts["answers"] == 4


def test_a_prompt_cut_on_the_left_is_counted(folder, tmp_path):
    path = write(tmp_path / "p.jsonl", [dict(goal="cat " * 99, sol1="sat", sol2="ran", label=1)])
    assert planned(folder, f"piqa={path}")[0].run()[2]["cut_on_the_left"] == 2


def answering(monkeypatch, texts, asked):
    """engine.generate answers these texts, in order."""
    def generate(model, prompts, n, tokenizer, **options):
        asked.append((prompts, options))
        made = [plans.engine.Sample(i, tokenizer.encode(text), finish="stop") for i, text in enumerate(texts)]
        assert len(made) == len(prompts) * n
        return made
    monkeypatch.setattr(plans.engine, "generate", generate)


def test_a_base_model_is_asked_with_worked_examples_and_read_as_the_harness_reads(folder, monkeypatch):
    _, tokenizer = opened(folder, "base")
    asked = []
    answering(monkeypatch, [" so\n#### 0", " it is 1", " 7", " so\n#### 3\n\nQuestion: 9", "", " #### 5.0"], asked)
    figures, n, counts = planned(folder, "gsm8k", shots=2)[0].run()
    assert figures["strict"][0] == pytest.approx(2 / 6) and figures["lenient"][0] == pytest.approx(3 / 6) and n == 6
    prompts, options = asked[0]
    assert prompts[0][0] == tokenizer.eot_id and options["temperature"] == 0 and "Question:" in options["stop"]
    assert tokenizer.decode(prompts[2][1:]) == ("Question: 0 and?\nAnswer: so\n#### 0\n\nQuestion: 1 and?\nAnswer: so\n"
                                                "#### 1\n\nQuestion: 2?\nAnswer:")
    assert counts == dict(ended_by_stop=6, ended_by_length=0, ended_by_context=0)


def test_a_chat_model_is_asked_through_the_template_and_held_to_the_format(folder, monkeypatch):
    _, tokenizer = opened(folder, "chat")
    asked = []
    answering(monkeypatch, ["<answer>0</answer>", "1", "<answer>3</answer>", "<answer>3</answer>", "", "so 5"], asked)
    figures, _, _ = planned(folder, "gsm8k", "chat")[0].run()
    assert {name: value for name, (value, _) in figures.items()} == pytest.approx(
        dict(strict=2 / 6, lenient=4 / 6, format=3 / 6))
    assert tokenizer.decode(asked[0][0][0]).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_samples_give_pass_at_k(folder, monkeypatch):
    answering(monkeypatch, [" #### 0", " #### 9"] + [" #### 9"] * 8 + [" #### 5"] * 2, asked := [])
    figures, _, _ = planned(folder, "gsm8k", shots=0, samples=2)[0].run()
    assert figures["strict"][0] == pytest.approx(3 / 12) and figures["pass@2"][0] == pytest.approx(2 / 6)
    assert asked[0][1]["temperature"] == 0.8


def test_humaneval_runs_the_completion_and_counts_what_passes(folder, monkeypatch, tmp_path):
    rows = [dict(task_id=str(i), prompt="def f(x):\n", entry_point="f", test="def check(c):\n    assert c(1) == 2\n")
            for i in range(3)]
    path = write(tmp_path / "h.jsonl", rows)
    answering(monkeypatch, ["    return 2 * x\n\ndef g", "    return x", "    while True: pass"], [])
    monkeypatch.setattr(plans.sandbox, "run", lambda program, seconds, run=plans.sandbox.run: run(program, 2))
    figures, n, _ = planned(folder, f"humaneval={path}", allow_code_execution=True)[0].run()
    assert figures["pass@1"][0] == pytest.approx(1 / 3) and n == 3


def test_ifeval_counts_prompts_and_instructions_strictly_and_loosely(folder, monkeypatch, tmp_path):
    rows = [dict(key=1, prompt="Say it.", instruction_id_list=["punctuation:no_comma", "change_case:english_lowercase"],
                 kwargs=[{}, {}]), dict(key=2, prompt="No.", instruction_id_list=["punctuation:no_comma"], kwargs=[{}])]
    path = write(tmp_path / "i.jsonl", rows)
    answering(monkeypatch, ["No commas here.", "Sure, here:\nall well"], [])
    figures, n, counts = planned(folder, f"ifeval={path}")[0].run()
    assert figures["prompt_strict"][0] == 0 and figures["prompt_loose"][0] == 0.5       # loose: without the first line
    assert figures["instruction_strict"][0] == pytest.approx(1 / 3) and counts["instructions"] == 3 and n == 2
    assert figures["instruction_loose"][0] == pytest.approx(2 / 3)


def test_a_judge_is_asked_in_both_orders_and_its_silence_is_counted(folder, monkeypatch, tmp_path):
    path = write(tmp_path / "prompts.jsonl", [dict(prompt=f"question {i}") for i in range(3)])
    asked = []

    def ask(conversation, first, second):
        asked.append(conversation[-1]["content"])
        return None if conversation[-1]["content"] == "question 0" else "1" if first == "long answer" else "2"
    ask.failures = ["no answer"]
    monkeypatch.setattr(plans.judges, "endpoint", lambda *_: ask)
    texts = iter([["long answer"] * 3, ["short"] * 3])
    monkeypatch.setattr(plans.engine, "generate", lambda model, prompts, n, tokenizer, **_: [
        plans.engine.Sample(i, tokenizer.encode(text), finish="stop") for i, text in enumerate(next(texts))])
    (job,) = planned(folder, "judge", prompts=str(path), against=str(folder / "chat"), judge="http://x/v1",
                     judge_model="m")
    figures, n, counts = job.run()
    assert figures["win_rate"] == (1.0, 0.0) and n == 2 and len(asked) == 6
    assert {name: counts[name] for name in ("wins", "losses", "ties", "failed")} == dict(
        wins=2, losses=0, ties=0, failed=1)
    assert job.settings["against_settings"]["mode"] == "chat"


# --- the script ---

def run(*flags, ranks=1):
    launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  f"--nproc_per_node={ranks}"]
    return subprocess.run([*launch, "eval.py", "--device=cpu", "--dtype=fp32", *flags], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)


@pytest.fixture(scope="module")
def appended(folder, tmp_path_factory):
    """(flags, file, first output) of a run of the script over several tasks."""
    file = tmp_path_factory.mktemp("results") / "deep" / "table.jsonl"
    flags = [f"--model={folder / 'chat'}", "--tasks=bpb,arc_easy,arithmetic,gsm8k", "--limit=5", "--samples=2",
             f"--text={folder / 'data' / 'docs.jsonl'}", f"--eval_data={folder / 'data'}", "--max_new_tokens=8"]
    return flags, file, run(*flags, f"--append={file}")


def test_results_carry_n_standard_errors_and_settings(appended):
    flags, file, result = appended
    assert result.returncode == 0, result.stderr
    records = results.read_records(file)
    assert [record["task"] for record in records] == ["bpb:docs", "arc_easy", "arithmetic", "gsm8k"]
    assert [record["n"] for record in records] == [9, 5, 5, 5]
    for record in records:
        assert record["metrics"].keys() == record["stderr"].keys()
        assert {"weights", "tokenizer", "mode", "dtype", "data"} <= record["settings"].keys()
    assert records[3]["settings"]["samples"] == 2 and "pass@2" in records[3]["metrics"]
    assert f"--table={file}" in result.stdout.splitlines()[-1] and "arc_easy: acc " in result.stdout


def test_what_is_there_with_the_same_settings_is_skipped(appended):
    flags, file, _ = appended
    before = file.read_text()
    result = run(*flags, f"--append={file}")
    assert result.stdout.count("already in") == 4 and file.read_text() == before
    file_2 = file.with_name("killed.jsonl")
    file_2.write_text("".join(before.splitlines(keepends=True)[:2]))    # as if it had been killed in the third task
    result = run(*flags, f"--append={file_2}")
    assert result.stdout.count("already in") == 2
    without = lambda text: [{k: v for k, v in json.loads(line).items() if k not in ("date", "seconds")}
                            for line in text.splitlines()]
    assert without(file_2.read_text()) == without(before)
    result = run(*flags, "--tasks=arc_easy", "--limit=6", f"--append={file_2}")
    assert "already" not in result.stdout and len(results.read_records(file_2)) == 5


def test_two_ranks_equal_one(appended, tmp_path):
    flags, file, _ = appended
    result = run(*flags, f"--append={tmp_path / 'two.jsonl'}", ranks=2)
    assert result.returncode == 0, result.stderr
    one, two = results.read_records(file), results.read_records(tmp_path / "two.jsonl")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        assert (a["task"], a["n"], a["counts"], a["settings"]) == (b["task"], b["n"], b["counts"], b["settings"])
        assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-4)
        assert a["stderr"] == pytest.approx(b["stderr"], rel=1e-3)


def record(model, task, metrics, stderr):
    return dict(model=model, task=task, metrics=metrics, stderr=stderr, settings={}, n=10)


def test_the_table_is_aligned_and_shows_one_whole_record_of_each_task():
    records = [record("a", "x", {"acc": 0.1}, {"acc": 0.01}), record("long/name", "x", {"acc": 0.25}, {"acc": None}),
               record("a", "y", {"ppl": 1234.5}, {"ppl": 6.0}), record("a", "x", {"acc": 0.5}, {"acc": 0.125})]
    assert table_text(records).splitlines() == [
        "            x             x   y             y",
        "model       n           acc   n           ppl",
        "a          10  0.500 ±0.125  10  1,234.5 ±6.0",
        "long/name  10         0.250   -             -"]
    narrow = table_text(records, width=25)
    assert max(map(len, narrow.splitlines())) <= 25 and narrow.count("long/name") > 1


@pytest.mark.parametrize("second, value", [(dict(n=5), 0.1), (dict(n=10), 0.5), (dict(n=20), 0.5),
                                           (dict(n=5, settings={"weights": "new"}), 0.5)])
def test_a_run_of_fewer_questions_does_not_replace_one_of_more_with_the_same_weights(second, value):
    first = record("a", "x", {"acc": 0.1, "pass@4": 0.3}, {"acc": 0.01, "pass@4": 0.1})
    text = table_text([first, {**record("a", "x", {"acc": 0.5}, {"acc": 0.01}), **second}])
    assert f"{value:.3f}" in text and ("pass@4" in text) == (value == 0.1)


def test_the_table_is_printed_and_drawn_without_a_model(appended):
    _, file, _ = appended
    result = run(f"--table={file}")
    assert result.returncode == 0 and "arc_easy" in result.stdout and "pass@2" in result.stdout
    assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


# --- bad input ---

BAD = {
    "unknown task": (["--tasks=gsm9k"], "there is no task 'gsm9k' (did you mean gsm8k?); tasks are bpb, hellaswag"),
    "no task": (["--tasks=,"], "names none"),
    "no model": (["--model="], "name what to evaluate, as in --model=out/sft"),
    "absent model": (["--model=nowhere"], "'nowhere' is not a model directory"),
    "no text": (["--tasks=bpb"], "task bpb needs text: --text=PATH"),
    "missing text": (["--text=nowhere.txt"], "there is no source 'nowhere.txt'"),
    "empty text": (["--text={tmp}/empty.txt"], "empty.txt holds no text to evaluate on"),
    "missing data": (["--tasks=hellaswag"], "task hellaswag has no data in"),
    "missing folder": (["--tasks=piqa", "--eval_data=nowhere"], "no file or folder 'nowhere' for task piqa"),
    "wrong shape": (["--tasks=piqa={data}/gsm8k.test.jsonl"], "row 1 of gsm8k.test.jsonl is not of piqa"),
    "missing questions": (["--tasks=svamp"], "task svamp has no data in"),
    "long prompt": (["--tasks=gsm8k", "--shots=9"], "6 of 6 prompts leave no room for an answer, the longest with"),
    "long continuation": (["--tasks=piqa={tmp}/long.jsonl"], "more than the model's context of 96"),
    "empty prompt": (["--tasks=humaneval={tmp}/empty.jsonl", "--allow_code_execution=true"], "text, not empty"),
    "empty judge prompt": (["--tasks=judge={tmp}/blank.jsonl", "--against={base}", "--judge=http://localhost:9/v1",
                            "--judge_model=m"], "blank.jsonl: prompt 1 is empty"),
    "no tokenizer": (["--model={tmp}/bare"], "bare holds no tokenizer"),
    "no template": (["--model={tmp}/plain", "--mode=chat"], "chat template is missing"),
    "no mode": (["--mode=talk"], "mode must be auto, chat or base, got 'talk'"),
    "NaN": (["--model={tmp}/nan"], "lm_head.weight holds 1 values that are not finite"),
    "code unasked": (["--tasks=humaneval"], "humaneval runs Python that the model wrote"),
    "half a judge": (["--tasks=judge", "--judge=http://localhost:9/v1"], "task judge needs --prompts, --against"),
    "nameless judge": (["--tasks=judge={tmp}/prompts.jsonl", "--against={base}", "--judge=http://localhost:9/v1"],
                       "needs --judge_model"),
    "judge that is no reward model": (["--tasks=judge={tmp}/prompts.jsonl", "--against={base}", "--judge=nowhere"],
                                      "'nowhere' is not a model directory"),
    "stride": (["--text={data}/docs.jsonl", "--stride=97"], "stride must be from 1 to the model's context 96"),
    "limit": (["--limit=-1"], "--limit must be at least 0, got -1"),
    "no results": (["--model=", "--table={tmp}/none.jsonl"], "there are no results in"),
    "broken results": (["--model=", "--table={tmp}/broken.jsonl"], "line 2 of"),
    "device": (["--text={data}/docs.jsonl", "--device=tpu"], "device must be auto, cuda, cuda:N, mps or cpu"),
}
DRIVER = """
import contextlib, io, json, runpy, sys
for name, flags in json.load(sys.stdin).items():
    sys.argv, out = ["eval.py", *flags], io.StringIO()
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        try:
            runpy.run_path("eval.py", run_name="__main__")
            status = 0
        except SystemExit as error:
            status = error.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
        except BaseException:
            status = 1
            sys.excepthook(*sys.exc_info())
    print(json.dumps([name, status if isinstance(status, int) else 1, out.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def refusals(folder, tmp_path_factory):
    """{case: (exit status, what was printed)}: the script run on every bad input, in one process to save its start."""
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "empty.txt").write_text(" \n")
    write(tmp / "long.jsonl", [dict(goal="x", sol1="cat " * 99, sol2="no", label=0)])
    write(tmp / "empty.jsonl", [dict(task_id="0", prompt="", entry_point="f", test="x")])
    write(tmp / "blank.jsonl", [dict(prompt=" ")])
    write(tmp / "prompts.jsonl", [dict(prompt="x")])
    (tmp / "broken.jsonl").write_text(json.dumps(record("a", "x", {}, {})) + '\n{"model": 3}\n')
    for name in ("bare", "plain", "nan"):
        shutil.copytree(folder / "base", tmp / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        os.remove(tmp / "bare" / file)
    config = json.loads((tmp / "plain" / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp / "plain" / "tokenizer_config.json").write_text(json.dumps(config))
    spec = (tmp / "plain" / "tokenizer.json").read_text(encoding="utf-8")
    (tmp / "plain" / "tokenizer.json").write_text(spec.replace("<|im_start|>", "<|of_others|>"), encoding="utf-8")
    model = GPT.load(str(tmp / "nan"))
    model.lm_head.weight.data[3, 5] = float("nan")
    model.save(tmp / "nan")
    places = dict(tmp=tmp, data=folder / "data", base=folder / "base")
    cases = {name: [f"--model={folder / 'base'}", f"--eval_data={folder / 'data'}", "--device=cpu", "--dtype=fp32",
                    *(flag.format(**places) for flag in flags)] for name, (flags, _) in BAD.items()}
    result = subprocess.run([sys.executable, "-c", DRIVER], cwd=ROOT, input=json.dumps(cases), capture_output=True,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert result.returncode == 0, result.stderr
    return {name: (status, text) for name, status, text in map(json.loads, result.stdout.splitlines())}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(refusals, name):
    status, text = refusals[name]
    assert status == 1 and text.startswith("eval.py: ") and len(text.splitlines()) == 1, text
    assert BAD[name][1] in text


def test_a_bad_input_ends_the_process_with_status_1(folder):
    result = run(f"--model={folder / 'base'}", "--tasks=gsm9k")
    assert result.returncode == 1 and result.stderr.startswith("eval.py: there is no task") and not result.stdout


def test_a_judge_that_never_answers_is_said(folder, monkeypatch, tmp_path):
    path = write(tmp_path / "prompts.jsonl", [dict(prompt="question")])
    real = plans.judges.endpoint
    monkeypatch.setattr(plans.judges, "endpoint", lambda *a: real(*a, timeout=1, retries=1, backoff=0.01))
    (job,) = planned(folder, "judge", prompts=str(path), against=str(folder / "chat"), judge="http://127.0.0.1:9/v1",
                     judge_model="m", max_new_tokens=2)
    with pytest.raises(ValueError, match="the judge gave no verdict on any of 1 prompts .*no answer.*: 4 times"):
        job.run()


def test_mode_is_chat_only_for_a_model_that_ends_answers_as_the_template_does(folder):
    assert plans.load(str(folder / "chat")).chat and not plans.load(str(folder / "base")).chat
    assert plans.load(str(folder / "base"), mode="chat").chat
    assert not plans.load(str(folder / "chat"), mode="base").chat


def test_bf16_scores_are_near_fp32s(folder):
    model, tokenizer = opened(folder, "base")
    pairs = [("the cat", " sat on"), ("the cat", " ran"), ("dog", " sat")]
    exact = [nats for nats, _, _ in loglikelihoods(model, tokenizer, pairs)]
    model.model.dtype = torch.bfloat16
    assert [nats for nats, _, _ in loglikelihoods(model, tokenizer, pairs)] == pytest.approx(exact, rel=0.1)
    assert np.isfinite(exact).all()
