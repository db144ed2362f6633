"""examples.py: what makes chats and pairs go, by which rule, and the order in which judges see them."""
import gzip
import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import examples
import formats
import judge
from examples import clean_rows, difficulty, is_refusal, reasons_of, repetition
from model import GPT, Config
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ZERO2CHAT_DATA", HERE.parent / "shared/data"))
OFF = dict(refusals="keep", similar_by="none", max_repetition=0.0, max_answer=0, min_answer=0)


def chat(question, *answers):
    """A chat in which each answer but the last is followed by "Go on."."""
    messages = [{"role": "user", "content": question}]
    for answer in answers:
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Go on."}]
    return {"messages": messages[:-1]}


def pair(question, chosen, rejected, **more):
    said = lambda text: [{"role": "assistant", "content": text}]
    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt, "chosen": said(chosen), "rejected": said(rejected), **more}


# --- answers ---

@pytest.mark.parametrize("answer", [
    "As an AI language model, I cannot browse the internet.", "I'm sorry, but I can't help with that.",
    "I’m sorry, I am not able to do this.", "Unfortunately, I cannot create pictures.",
    "I cannot provide legal advice.", "I am an AI assistant and do not have feelings.",
    "As a large language model trained by a company, I don't have opinions."])
def test_an_answer_that_declines_is_a_refusal(answer):
    assert is_refusal(answer)


@pytest.mark.parametrize("answer", [
    "I'm sorry to hear that you lost your key. Call a locksmith.", "You can't divide by zero.",
    "GPT is a large language model; it cannot see pictures.", "Dear Sir, I am sorry for the delay.",
    "I can help with that: first, boil water.", "As an AI engineer, I build models.",
    "She said: 'No.' " * 20 + "I'm sorry, but I can't help with that."])
def test_an_answer_that_only_speaks_of_such_things_is_none(answer):
    assert not is_refusal(answer)


def test_repetition_is_the_share_of_ngrams_that_came_before():
    loop, prose = "one two three four five six " * 10, " ".join(f"word{i}" for i in range(60))
    shares = repetition([loop, prose, "no no no no no no"])
    assert shares[0] == pytest.approx(1 - 6 / 57) and shares[1] == 0 and shares[2] == 0     # the last is too short


def test_each_filter_rejects_under_its_own_name_and_looks_at_every_reply():
    rows = [chat("Name a colour.", "Blue."), chat("Name one.", ""), chat("Write.", "x" * 101),
            chat("Sing.", "la la li lo lu " * 6), chat("Help.", "I'm sorry, but I can't help.", "Here you are."),
            chat("What colour is blue?", "Blue is blue.")]
    reasons, _, _ = reasons_of(rows, dict(max_answer=100, similar_by="none"))
    assert reasons == [None, "answer shorter than 1 characters", "answer longer than 100 characters",
                       "answer repeats itself (above 0.4)", "refusal", None]
    kept, counts = clean_rows(rows, dict(max_answer=100, similar_by="none"))
    assert kept == [rows[0], rows[5]] and sum(counts.values()) == 4


def test_what_a_pair_rejects_and_a_thumb_down_may_be_anything():
    refusal = "I'm sorry, but I can't help with that."
    rows = [pair("Boil an egg?", "Nine minutes.", refusal), pair("And a potato?", refusal, "Twenty."),
            {"prompt": [{"role": "user", "content": "Why?"}], "completion": [{"content": refusal}], "label": False}]
    assert reasons_of(rows[:2], {})[0] == [None, "refusal"]
    assert reasons_of(rows[2:], {})[0] == [None]


# --- near-duplicates, preferences ---

def test_near_duplicates_go_by_the_whole_conversation_or_by_the_question():
    words = " ".join(f"word{i}" for i in range(40))
    rows = [chat(f"Explain {words}", "It is a list."), chat(f"Explain {words} please", "It is a list."),
            chat(f"Explain {words}", " ".join(f"other{i}" for i in range(40)))]
    assert reasons_of(rows, {})[0] == [None, "near-duplicate by conversation", None]
    assert reasons_of(rows, dict(similar_by="question"))[0] == [None] + ["near-duplicate by question"] * 2


def test_of_similar_pairs_the_one_with_the_largest_margin_stays():
    words = " ".join(f"word{i}" for i in range(40))
    rows = [pair(f"Explain {words}{end}", "good", "bad", margin=margin) for end, margin in (("", 1.0), (" now", 2.0))]
    assert clean_rows(rows, {})[0] == [rows[1]]


def test_margins_and_agreement_count_where_rows_have_them_and_rows_stay_as_they_were():
    rows = [pair("a", "x", "y", margin=0.5, agreement=0.9), pair("b", "x", "y", margin=2.0, agreement=0.5),
            pair("c", "x", "y", margin=2.0, agreement=0.9), pair("d", "x", "y"), pair("e", "x", "x")]
    before = json.dumps(rows)
    kept, counts = clean_rows(rows, dict(min_margin=1.0, min_agreement=0.8, similar_by="none"))
    assert kept == rows[2:4] and json.dumps(rows) == before
    assert counts == {"margin below 1": 1, "agreement below 0.8": 1, "equal answers": 1}


def test_a_threshold_of_what_no_row_has_is_one_sentence():
    with pytest.raises(ValueError, match="min_agreement=0.8, and none of 1 rows has a column agreement"):
        clean_rows([pair("a", "x", "y")], dict(min_agreement=0.8))


# --- judges ---

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train(["What is the colour of the sky? The sky is blue."] * 20, 300)
    torch.manual_seed(0)
    gpt = GPT(Config(384, n_layer=2, n_head=2, n_embd=16, context=64))
    for block in gpt.model.layers:
        torch.nn.init.normal_(block.self_attn.o_proj.weight, std=1.0)
    torch.nn.init.normal_(gpt.lm_head.weight, std=0.5)
    gpt.save(str(folder)), tokenizer.save(folder)
    return str(folder)


def test_difficulty_is_the_ratio_of_the_answers_losses_with_and_without_its_question(model):
    gpt, tokenizer = GPT.load(model), Tokenizer.load(model)
    messages = chat("What is the colour?", "The sky is blue.")["messages"]
    found, = difficulty(gpt, tokenizer, [messages])

    def loss(ids, n):
        logp = gpt.logits(gpt.forward_hidden(torch.tensor([ids[:-1]]))).log_softmax(-1)[0]
        return -logp.gather(-1, torch.tensor(ids[1:])[:, None])[-n:].mean().item()

    ids, mask = tokenizer.encode_chat(messages)
    ids, n = ids[:len(mask) - mask[::-1].index(1)], sum(mask)
    opening = [tokenizer.specials["<|im_start|>"], *tokenizer.encode("assistant\n")]
    assert found == pytest.approx(loss(ids, n) / loss([*opening, *ids[-n:]], n), rel=1e-4)


def test_difficulty_of_what_does_not_fit_the_context_is_finite(model):
    gpt, tokenizer = GPT.load(model), Tokenizer.load(model)
    chats = [chat("sky " * 200, "blue")["messages"], chat("sky", "blue " * 200)["messages"]]
    assert np.isfinite(difficulty(gpt, tokenizer, chats)).all()


def fake_ifd(values):
    return lambda rows, *_: ("ifd", np.array(values, float))


def test_the_best_fraction_stays_after_what_the_question_does_not_help(monkeypatch):
    monkeypatch.setattr(examples, "judged", fake_ifd([0.2, 1.3, 0.9, math.nan, 0.5, 0.7]))
    rows = [chat(f"question {i}", f"answer {i}") for i in range(6)]
    kept, counts = clean_rows(rows, dict(OFF, judge="ifd", judge_model="m", keep_fraction=0.5))
    assert [(row["messages"], row["ifd"]) for row in kept] == [(rows[2]["messages"], 0.9), (rows[5]["messages"], 0.7)]
    assert counts == {"judge: IFD of 1 or more": 1, "judge: no score": 1, "judge: not among the best 50%": 2}


def test_the_judge_sees_only_what_the_filters_left(monkeypatch):
    seen = []
    monkeypatch.setattr(examples, "judged", lambda rows, *_: (seen.extend(rows), ("rating", np.ones(len(rows))))[1])
    rows = [chat("Help.", "I'm sorry, but I can't help."), chat("Name a colour.", "Blue.")]
    clean_rows(rows, dict(judge="endpoint", judge_model="m", judge_url="http://x"))
    assert seen == rows[1:]


def test_an_endpoint_rates_chats_and_must_prefer_the_chosen_answer_in_both_orders(monkeypatch):
    def fake(url, model, **how):
        def complete(messages, read, missing):
            text = messages[1]["content"]
            if "<answer>" in text:                                          # one answer: a longer one is better
                return read(f"[[{min(10, len(text.split('<answer>')[1]) // 10)}]]")
            first, second = (text.split(f"<answer_{name}>\n")[1].split("\n")[0] for name in "AB")
            return read("[[A]]" if first > second or "biased" in text else "[[B]]")
        complete.failures = []
        return complete

    monkeypatch.setattr(judge, "completions", fake)
    how = dict(OFF, judge="endpoint", judge_model="m", judge_url="http://x")
    kept, _ = clean_rows([chat("a", "x" * 20), chat("b", "x" * 70)], dict(how, keep_fraction=0.5))
    assert [row["messages"][0]["content"] for row in kept] == ["b"]
    rows = [pair("a", "zebra", "ant"), pair("b", "ant", "zebra"), pair("biased", "zebra", "ant")]
    kept, counts = clean_rows(rows, how)
    assert kept == [rows[0] | {"judge_margin": 1.0}] and counts == {"judge: does not prefer the chosen answer": 2}


def test_a_judge_that_never_answers_is_one_sentence_with_its_reason(monkeypatch):
    def fake(url, model, **how):
        complete = lambda messages, read, missing: complete.failures.append("no answer (refused)")
        complete.failures = []
        return complete
    monkeypatch.setattr(judge, "completions", fake)
    with pytest.raises(ValueError, match=r"no score to any of 1 rows \(no answer \(refused\): 1 times\)"):
        clean_rows([chat("a", "b")], dict(judge="endpoint", judge_model="m", judge_url="http://x"))


def test_a_rating_is_a_number_from_1_to_10(monkeypatch):
    monkeypatch.setattr(judge, "completions", lambda url, model, key_env="": replies)

    def replies(messages, read, missing):
        return read(messages[1]["content"].split("<answer>\n")[1].split("\n")[0])
    replies.failures = []
    rate = judge.rater("http://x", "m")
    replied = "good [[7]]", "[[3]] no, [[8.5]]", "[[11]]", "[[0]]", "seven"
    said = [rate(chat("q", text)["messages"]) for text in replied]
    assert said == [7.0, 8.5, None, None, None]


@pytest.mark.parametrize("options, sentence", [
    (dict(refusals="maybe"), "refusals is 'maybe'; it must be drop or keep"),
    (dict(keep_fraction=0.5), "keep_fraction=0.5 needs a judge"), (dict(judge="ifd"), "judge=ifd needs --judge_model"),
    (dict(judge="endpoint", judge_model="m"), "go together"), (dict(max_repetition=1.5), "max_repetition is a share"),
    (dict(max_length_ratio=0.5), "max_length_ratio must be 0")])
def test_impossible_options_are_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        clean_rows([], options)


# --- a run ---

def config(tmp_path, rows, **more):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dict(kind="chats", sources=str(path), out_dir=str(tmp_path / "out"), overwrite=False, show_rejected=0) | more


def test_a_run_writes_rows_that_data_py_reads_and_a_report_that_accounts_for_every_row(tmp_path):
    rows = [chat("Name a colour.", "Blue."), chat("Help.", "I'm sorry, but I can't help."), chat("Speak.", "")]
    examples.run(config(tmp_path, rows))
    written, = map(json.loads, (tmp_path / "out/rows.jsonl").read_text().splitlines())
    assert written["messages"] == rows[0]["messages"]
    report = json.loads((tmp_path / "out/report.json").read_text())
    source, = report["sources"].values()
    assert (source["documents_in"], source["documents_out"], source["unreadable"]) == (2, 1, {"empty reply": 1})
    assert source["rejected"]["refusal"][0] == 1
    (_, found, _), = examples.read_rows("chats", str(tmp_path / "out/rows.jsonl"))
    assert found == [{"messages": rows[0]["messages"]}]
    with pytest.raises(ValueError, match="already holds cleaned data"):
        examples.run(config(tmp_path, rows))


@pytest.mark.parametrize("rows, sentence", [
    ([], "no chats could be read from"), ([chat("a", "")], "empty reply 1 times"),
    ([chat("a", "I'm sorry, but I can't help.")], "every one of 1 chats was rejected, 1 by the rule 'refusal'")])
def test_a_run_that_keeps_nothing_says_why_and_writes_nothing(tmp_path, rows, sentence):
    with pytest.raises(ValueError, match=sentence):
        examples.run(config(tmp_path, rows))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["chats", "pairs"])
def test_damaged_files_and_rows_are_counted_and_the_others_read(tmp_path, kind):
    row = (lambda i: chat(f"Question {i}?", f"Answer {i}.")) if kind == "chats" else (
        lambda i: pair(f"Question {i}?", f"Answer {i}.", f"Other {i}."))
    lines = [json.dumps(row(i)).encode() + b"\n" for i in range(200)]
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "lines.jsonl").write_bytes(b'{"rows"\n' + lines[0] + b'{"messages": [{"role": \n' + lines[1] +
                                         b'\0\1\2\3\n7\n{"messages": "caf\xe9"}\n' + lines[2])
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[3:103]))[:-400])
    (folder / "array.json").write_bytes(b"[" + b",".join(lines[103:106]) + b", {")
    (folder / "broken.parquet").write_bytes(b"PAR1 no more of it")
    (folder / "empty.jsonl").write_bytes(b"")
    pq.write_table(pa.table({"messages": pa.array([], pa.string())}), folder / "empty.parquet")
    (folder / "long.jsonl").write_bytes(b'{"messages": "' + b"x" * formats.LONGEST_ROW + b'"}\n' + lines[106])
    (_, found, notes), = examples.read_rows(kind, str(folder))
    questions = {(r["messages"] if kind == "chats" else r["prompt"])[0]["content"] for r in found}
    assert {f"Question {i}?" for i in (0, 1, 2, *range(103, 107))} <= questions
    assert len(questions) > 7 and len(questions) == len(found)          # and what stood before the cut
    assert notes["cut off"] == 1 and notes["invalid JSON"] == 3 and notes["binary"] == 1
    assert notes["longer than max_document_bytes"] == 1 and notes["malformed"] == 2
    assert notes["empty"] == 2
    assert notes["damaged, rest of the file unread"] == 1 and notes["invalid JSON, rest of the file unread"] == 1


def test_weights_tasks_and_mixed_kinds_are_refused(tmp_path):
    given = config(tmp_path, [pair("a", "x", "y"), pair("b", "x", "y")], kind="pairs")
    for sources, sentence in (given["sources"] + "=0.5", "has a weight"), ("task:sorting", "holds no pairs"):
        with pytest.raises(ValueError, match=sentence):
            examples.run(given | {"sources": sources})
    with pytest.raises(ValueError, match="which need no cleaning"):
        examples.run(given | {"kind": "chats", "sources": "task:sorting"})


def test_published_chats_and_pairs_lose_few_rows(tmp_path):
    paths = DATA / "dolly/dolly_3k.jsonl.gz", DATA / "ultrafeedback/train_clean.jsonl.gz"
    if not all(map(os.path.exists, paths)):
        pytest.skip(f"{paths[0]} and {paths[1]} are not here")
    for kind, path in zip(("chats", "pairs"), paths):
        (_, rows, _), = examples.read_rows(kind, str(path))
        kept, counts = clean_rows(rows, {})
        assert len(kept) > 0.9 * len(rows), counts


JUDGED = dict(OFF, judge="endpoint", judge_model="m", judge_url="http://x", judge_parallel=1)


@pytest.mark.parametrize("kind", ["chats", "pairs"])
def test_verdicts_survive_a_kill_and_are_not_asked_for_again(tmp_path, monkeypatch, kind):
    row = (lambda i: chat(f"Question {i}", f"Answer {i}.")) if kind == "chats" else (
        lambda i: pair(f"Question {i}", f"Answer {i}.", f"Other {i}."))
    asked, limit = [], 13

    def asker(url, model, **how):
        def ask(*job):
            if len(asked) == limit:
                raise KeyboardInterrupt
            asked.append(json.dumps(job))
            return 7.0 if kind == "chats" else "1" if job[1].startswith("Answer") else "2"
        ask.failures = []
        return ask
    monkeypatch.setattr("judge.rater" if kind == "chats" else "judge.endpoint", asker)
    given = config(tmp_path, map(row, range(20)), kind=kind, **JUDGED)
    with pytest.raises(KeyboardInterrupt):
        examples.run(given)
    verdicts = tmp_path / "out" / examples.VERDICTS
    verdicts.write_text(verdicts.read_text()[:-3])              # a kill in the middle of a write: one is lost
    limit = 1000
    examples.run(given)
    assert len(asked) == len(set(asked)) + 1 == (21 if kind == "chats" else 41)
    assert len((tmp_path / "out/rows.jsonl").read_text().splitlines()) == 20
    assert not verdicts.parent.exists()


def test_a_refused_row_is_counted_once_others_were_answered(tmp_path, monkeypatch):
    asked, last = [], 60

    def rater(url, model, **how):
        def ask(conversation):
            asked.append(int(conversation[0]["content"].split()[1]))
            if asked[-1] % 2 or asked[-1] >= last:
                raise judge.Refused("the judge refuses: HTTP 403")
            return 5.0
        ask.failures = []
        return ask
    monkeypatch.setattr("judge.rater", rater)
    rows = [chat(f"Question {i}", f"Answer {i}.") for i in range(120)]
    kept, counts = clean_rows(rows[:60], JUDGED)
    assert len(kept) == 30 and counts == {"judge: no score": 30} and sorted(asked) == list(range(60))
    with pytest.raises(judge.Refused, match="HTTP 403"):        # before any was
        clean_rows(rows[1:], JUDGED)
    with pytest.raises(judge.Refused, match="HTTP 403"):        # of a key that ran out
        examples.run(config(tmp_path, rows, **JUDGED))
    asked.clear()
    last = 120                                                  # another key
    examples.run(config(tmp_path, rows, **JUDGED))
    assert sorted(asked) == [*range(1, 60, 2), *range(60, 120)]
    assert len((tmp_path / "out/rows.jsonl").read_text().splitlines()) == 60


def test_an_endpoint_that_is_down_is_said_after_its_first_requests(monkeypatch):
    asked = []

    def rater(url, model, **how):
        def ask(conversation):
            asked.append(conversation)
        ask.failures = ["no answer (Connection refused)"]
        return ask
    monkeypatch.setattr("judge.rater", rater)
    with pytest.raises(ValueError, match=r"no score to any of 8 rows \(no answer \(Connection refused\)"):
        clean_rows([chat(f"Question {i}?", f"Answer {i} of many.") for i in range(500)],
                   dict(OFF, judge="endpoint", judge_model="m", judge_url="http://x"))
    assert len(asked) == 8
