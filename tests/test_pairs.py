"""preferences.py, sampled.py and pairs.py: published rows and a model's own answers to pairs, those to batches."""
import gzip
import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import engine
import judge
import pairs as module
import sampled
from configurator import read_options
from formats import Unusable, chat
from model import GPT, Config
from pairs import PairBatches, Pairs, ThumbBatches, Thumbs, fixed_pairs, prepare
from preferences import FORMATS, choose, recognise, transcript
from tasks import TASKS
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ZERO2CHAT_DATA", HERE.parent / "shared/data"))
needs_data = pytest.mark.skipif(not (DATA / "hh_rlhf").is_dir(), reason=f"no {DATA}; set ZERO2CHAT_DATA")
REAL = {"hh": "hh_rlhf/harmless-base-test.jsonl.gz", "ultrafeedback": "ultrafeedback/train_clean.jsonl.gz",
        "oasst": "oasst1/en-validation.pairs.jsonl.gz", "thumbs": "thumbs/kto_en_demo.json.gz"}
HI, HELLO, WHAT = ({"role": role, "content": text} for role, text in
                   (("user", "Hi"), ("assistant", "Hello."), ("assistant", "What?")))


def said(text):
    return [{"role": "assistant", "content": text}]


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return str(path)


def rows(n, asked="question"):
    return [{"prompt": f"{asked} {i}", "chosen": f"a good answer to {i}", "rejected": f"bad {i}"} for i in range(n)]


def read(folder, split="train"):
    return [json.loads(line) for line in open(os.path.join(folder, f"{split}.jsonl"), encoding="utf-8")]


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train([json.dumps(row) for row in rows(50)], 400)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """200 pairs of two sources."""
    folder = tmp_path_factory.mktemp("pairs")
    sources = ",".join(write(folder / f"{name}.jsonl", rows(100, name)) for name in "ab")
    prepare(str(folder / "out"), sources, val_fraction=0.2)
    return str(folder / "out")


def convert(row):
    return FORMATS[recognise(row)][1](row)


# --- rows ---

PAIR = {"prompt": [HI], "chosen": [HELLO], "rejected": [WHAT]}


@pytest.mark.parametrize("row, expected", [
    ({"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"}, PAIR),
    ({"question": "Hi", "system": "Be.", "chosen": "Hello.", "rejected": "What?"},
     {**PAIR, "prompt": [{"role": "system", "content": "Be."}, HI]}),
    ({"prompt": [HI], "chosen": "Hello.", "rejected": "What?"}, PAIR),
    ({"prompt": [HI], "chosen": [HELLO], "rejected": [WHAT]}, PAIR),
    ({"prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI, WHAT]}, PAIR),       # UltraFeedback, binarized
    ({"prompt": [HI], "chosen": [HI, HELLO], "rejected": [HI, WHAT]}, PAIR),
    ({"chosen": [HI, HELLO], "rejected": [HI, WHAT]}, PAIR),
    ({"chosen": [HI, HELLO, HI], "rejected": [HI, WHAT]}, PAIR),                   # nobody answered the last turn
    ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello."},
      "rejected": {"from": "gpt", "value": "What?"}}, PAIR),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"}, PAIR),
    ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello.", "rejected": " What?"}, PAIR),
    ({"prompt": "Hi", "chosen": "Hello.", "rejected": "What?", "score_chosen": 8.5, "score_rejected": 6},
     {**PAIR, "margin": 2.5, "score_chosen": 8.5, "score_rejected": 6.0}),
    ({"prompt": "Hi", "chosen": "Hello.", "rejected": "What?", "metadata": {"score_chosen": 3, "score_rejected": 4}},
     {**PAIR, "margin": -1.0, "score_chosen": 3.0, "score_rejected": 4.0}),
    ({"prompt": "Hi", "chosen": "Hello.", "rejected": "What?", "margin": 0.25}, {**PAIR, "margin": 0.25}),
    ({"prompt": "Hi", "completion": "Hello.", "label": False}, {"prompt": [HI], "completion": [HELLO], "label": False}),
    ({"prompt": [HI], "completion": [HELLO], "label": 1}, {"prompt": [HI], "completion": [HELLO], "label": True}),
    ({"messages": [HI, HELLO], "label": True}, {"prompt": [HI], "completion": [HELLO], "label": True}),
    ({"instruction": "Hi", "completions": [{"response": "What?", "overall_score": 4.0}, {"response": "Hello.",
      "overall_score": 9}, {"response": "", "overall_score": 1}, {"response": "Ho", "overall_score": None}]},
     {**PAIR, "margin": 5.0, "score_chosen": 9.0, "score_rejected": 4.0}),
])
def test_each_format_is_recognised_and_becomes_a_prompt_and_its_answers(row, expected):
    assert convert(row) == [expected]


@pytest.mark.parametrize("row, reason", [
    ({"prompt": "Hi", "chosen": "", "rejected": "What?"}, "without an answer"),
    ({"prompt": "Hi", "chosen": "Hello.", "rejected": None}, "without an answer"),
    ({"prompt": " ", "chosen": "Hello.", "rejected": "What?"}, "an empty turn in the prompt"),
    ({"chosen": [HELLO], "rejected": [WHAT]}, "without a prompt"),
    ({"chosen": [HI, HELLO, HI, HELLO], "rejected": [HI, WHAT, HI, HELLO]}, "part before the last reply"),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: Human: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"},
     "a speaker's mark inside a turn"),
    ({"instruction": "Hi", "completions": [{"response": "a", "overall_score": 1}]}, "different scores"),
])
def test_a_row_that_teaches_nothing_is_unusable_for_a_reason(row, reason):
    with pytest.raises(Unusable, match=reason):
        convert(row)


@pytest.mark.parametrize("row, sentence", [
    ({"prompt": "Hi", "chosen": "Hello.", "rejected": [WHAT]}, "chosen is a str and its rejected a list"),
    ({"prompt": 3, "chosen": "Hello.", "rejected": "What?"}, "turns are 3, not a list"),
    ({"prompt": "Hi", "chosen": 1, "rejected": 2}, "turns are 1, not a list"),
    ({"prompt": "Hi", "chosen": [{"role": "boss", "content": "x"}], "rejected": [WHAT]}, "role 'boss' is unknown"),
    ({"prompt": "Hi", "completion": "Hello.", "label": "yes"}, "label is 'yes', not true or false"),
    ({"messages": [HI, HELLO], "label": None}, "label is None"),
    ({"chosen": "Hello.", "rejected": "What?"}, "no prompt, and 'Hello.' is no transcript"),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": "much"}, "margin is 'much', not a number"),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b", "score_chosen": float("nan")}, "score_chosen is nan"),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": 10 ** 400}, "margin is 10{39}, not a number"),
    ({"prompt": "Hi", "chosen": "Hello."}, "no known format, having prompt, chosen"),
    ({"instruction": "Hi", "completions": "x"}, "completions are 'x'"),
])
def test_a_malformed_row_is_one_sentence(row, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        convert(row)
    assert not isinstance(error.value, Unusable)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(str.strip).filter(
    lambda text: text and "Human:" not in text and "Assistant:" not in text)


@settings(max_examples=300, deadline=None)
@given(st.lists(texts, min_size=2, max_size=7))
def test_a_transcript_that_is_written_is_read_as_the_same_turns(said_by_turns):
    messages = chat(*said_by_turns)
    text = "".join(f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}" for m in messages)
    assert transcript(text) == messages


def test_two_turns_of_one_speaker_become_one():
    assert transcript("\n\nHuman: a\n\nHuman: b\n\nAssistant: \n\nAssistant: c") == chat("a\n\nb", "c")


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_published_rows_become_pairs_with_one_reply_each_and_few_are_left_out(tmp_path, name):
    prepare(str(tmp_path / "out"), str(DATA / REAL[name]))
    made = read(tmp_path / "out") + read(tmp_path / "out", "val")
    total = len(gzip.open(DATA / REAL[name], "rt", encoding="utf-8").readlines()) if name != "thumbs" else 300
    [counted] = module.about(tmp_path / "out")["sources"].values()
    dropped = sum(counted["dropped"].values())
    assert len(made) + dropped == total and dropped < 0.03 * total
    for row in made:
        answers = [row["completion"]] if name == "thumbs" else [row["chosen"], row["rejected"]]
        assert all(len(answer) == 1 and answer[0]["content"].strip() for answer in answers)
        assert row["prompt"][-1]["role"] == "user" and len({json.dumps(answer) for answer in answers}) == len(answers)
        if name == "hh":
            assert not any("Human:" in m["content"] or "Assistant:" in m["content"] for m in
                           row["prompt"] + row["chosen"] + row["rejected"])
        if name == "ultrafeedback":
            assert row["margin"] == row["score_chosen"] - row["score_rejected"] >= 0


# --- preparation ---

def test_a_question_stands_on_one_side_whatever_follows_it(folder, tmp_path):
    train, val = ({row["prompt"][0]["content"] for row in read(folder, split)} for split in ("train", "val"))
    assert len(train) + len(val) == 200 and not train & val and 20 < len(val) < 60
    longer = [{"prompt": chat(row["prompt"], "well", "and?"), "chosen": "a", "rejected": "b"}
              for row in rows(100, "a") + rows(100, "b")]
    prepare(str(tmp_path / "out"), write(tmp_path / "x.jsonl", longer), val_fraction=0.2)
    assert {row["prompt"][0]["content"] for row in read(tmp_path / "out", "val")} == val


@pytest.mark.parametrize("options, reason, kept", [
    (dict(min_margin=2), "margin below 2", 2), (dict(), "margin below 0", 3),
    (dict(min_margin=-5, min_agreement=0.7), "agreement below 0.7", 3),
    (dict(min_margin=-5, max_length_ratio=4), "one answer over 4 times as long as the other", 3),
])
def test_filters_drop_and_count_by_reason(tmp_path, capsys, options, reason, kept):
    made = [dict(row, margin=margin, agreement=agreement) for row, margin, agreement in
            zip(rows(4), (1.0, 2.0, 3.0, -1.0), (0.5, 0.7, 0.9, 1.0))]
    made[0]["rejected"] *= 20
    prepare(str(tmp_path / "out"), write(tmp_path / "x.jsonl", made), **options)
    assert len(read(tmp_path / "out") + read(tmp_path / "out", "val")) == kept
    assert f"{4 - kept} {reason}, dropped" in capsys.readouterr().out


def test_a_filter_with_nothing_to_look_at_is_one_sentence(tmp_path):
    for name in ("min_margin", "min_agreement"):
        with pytest.raises(ValueError, match=f"{name}=0.5 has nothing to look at"):
            prepare(str(tmp_path / "out"), write(tmp_path / "x.jsonl", rows(4)), **{name: 0.5})
    assert not (tmp_path / "out").exists()


def test_equal_answers_and_duplicates_in_either_order_are_dropped_and_counted(tmp_path, capsys):
    one, *others = rows(5)
    source = write(tmp_path / "x.jsonl", [one, dict(one, chosen=one["rejected"], rejected=one["chosen"]), one, *others,
                                          {"prompt": "x", "chosen": "a", "rejected": " a\n"}])
    prepare(str(tmp_path / "out"), source)
    out = capsys.readouterr().out
    assert "x: 5 pairs; " in out and "2 duplicates, dropped" in out and "1 equal answers, dropped" in out
    prepare(str(tmp_path / "out"), source, duplicates="keep", overwrite=True)
    assert "x: 7 pairs; " in capsys.readouterr().out


def test_pairs_and_thumbs_do_not_mix_unless_pairs_become_thumbs(tmp_path):
    thumbs = [{"prompt": f"up {i}", "completion": "x", "label": True} for i in range(5)]
    sources = f"{write(tmp_path / 'a.jsonl', rows(5))},{write(tmp_path / 'b.jsonl', thumbs)}"
    with pytest.raises(ValueError, match="b.jsonl holds thumbs and .*a.jsonl holds pairs.*--unpair=true"):
        prepare(str(tmp_path / "out"), sources)
    prepare(str(tmp_path / "out"), sources, unpair=True)
    made = read(tmp_path / "out") + read(tmp_path / "out", "val")
    assert Counter((row["source"], row["label"]) for row in made) == {("a", True): 5, ("a", False): 5, ("b", True): 5}
    assert all(row["label"] == row["completion"][0]["content"].startswith("a good") for row in made
               if row["source"] == "a")


def test_weights_are_shares_of_pairs_and_all_ends_with_the_first_source(tmp_path):
    sources = f"{write(tmp_path / 'a.jsonl', rows(60, 'a'))}=0.75,{write(tmp_path / 'b.jsonl', rows(60, 'b'))}=0.25"
    prepare(str(tmp_path / "out"), sources)
    counts = Counter(row["source"] for row in read(tmp_path / "out") + read(tmp_path / "out", "val"))
    assert counts["a"] == 60 and 19 <= counts["b"] <= 21


@pytest.mark.parametrize("items, options, sentence", [
    ([{"prompt": "Hi", "chosen": "x"}], {}, "row 1 of .*no known format.*--malformed=drop"),
    ([*rows(3), {"prompt": "Hi", "completion": "x", "label": True}], {}, "row 4 of .*where the first row had chosen"),
    ([*rows(3), ["x"]], {}, "row 4 of .*not an object"),
    ([{"prompt": "Hi", "chosen": "x", "rejected": "x"}], {}, "no row of .*can be used: 1 equal answers"),
    ([{"prompt": "Hi", "chosen": "x", "rejected": ""}], dict(unusable="error"), "row 1 .*--unusable=drop"),
    (rows(1), {}, "all 1 rows of .* are held out"),
    (rows(3), dict(val_fraction=1.5), "val_fraction must lie between 0 and 1"),
    (rows(3), dict(keep="best"), "keep is 'best'; it must be one or each or all"),
    (rows(3), dict(max_length_ratio=0.5), "max_length_ratio must be 0"),
    (rows(3), dict(duplicates="maybe"), "duplicates is 'maybe'"),
])
def test_what_cannot_be_prepared_is_one_sentence_and_leaves_nothing_behind(tmp_path, items, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        prepare(str(tmp_path / "out"), write(tmp_path / "x.jsonl", items), **options)
    assert not (tmp_path / "out").exists()


def test_what_was_there_survives_a_failed_run_and_needs_overwrite(tmp_path):
    good, bad = write(tmp_path / "a.jsonl", rows(9)), write(tmp_path / "b.jsonl", [*rows(3), {"prompt": "x"}])
    out = str(tmp_path / "out")
    prepare(out, good)
    before = {name: open(os.path.join(out, name), "rb").read() for name in sorted(os.listdir(out))}
    assert [*before] == ["about.json", "train.jsonl", "val.jsonl"]
    with pytest.raises(ValueError, match="already holds data"):
        prepare(out, good)
    with pytest.raises(ValueError, match="row 4"):
        prepare(out, bad, overwrite=True)
    assert {name: open(os.path.join(out, name), "rb").read() for name in sorted(os.listdir(out))} == before


def test_the_script_says_which_options_belong_to_which_kind_and_shows_rows(tmp_path):
    def run(*flags):
        return subprocess.run([sys.executable, "data.py", *flags], cwd=HERE, capture_output=True, text=True)
    made = [dict(row, chosen=row["chosen"] + "\x1b[7m") for row in rows(20)]
    flags = ["--kind=pairs", f"--sources={write(tmp_path / 'x.jsonl', made)}", f"--out_dir={tmp_path / 'out'}"]
    first = run(*flags, "--show=2")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("\n--- row") == 2 and "\n+ a good answer to" in first.stdout and "\n- bad" in first.stdout
    assert "\x1b" not in first.stdout
    again = run(*flags, "--show=2")
    assert again.returncode == 0 and again.stdout in first.stdout
    wrong = run(*flags, "--overwrite=true", "--samples=3")
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    assert "samples is an option of pairs from a model only, and kind is pairs from --sources" in wrong.stderr


@pytest.mark.parametrize("options, sentence", [
    (dict(context=64), "context is an option of chats only, and kind is pairs"), (dict(kind="pears"), "'pears'; it"),
    (dict(tokenizer="x"), "tokenizer is an option of text and chats only, and kind is pairs"),
    (dict(from_model="x", sources="y"), "not from both"),
    (dict(kind="chats", keep="all"), "keep is an option of pairs only"),
    (dict(), "stdlib holds no pairs"), (dict(kind="text", show=1), "show is an option of chats and pairs only"),
])
def test_an_option_of_another_kind_is_refused(tmp_path, options, sentence):
    defaults = {name: default for name, (default, *_) in read_options(data.__file__).items()}
    with pytest.raises(ValueError, match=sentence):
        data.main({**defaults, "kind": "pairs", "out_dir": str(tmp_path / "out"), **options})
    assert not (tmp_path / "out").exists()


# --- answers of a model ---

def test_rules_keep_pairs_of_answers_with_different_scores():
    scored = [("a", 1.0), ("b", 0.0), ("c", 1.0), ("d", 0.5), ("b", 0.0)]
    drawn = {choose(scored, "one", key)[0] for key in (0, 1, 2 ** 32, 2 ** 32 + 1)}
    assert {better[0] for better, _ in drawn} == {"a", "c"} and {worse[0] for _, worse in drawn} == {"b"}
    assert choose(scored, "each", 0) == [(("a", 1.0), ("b", 0.0)), (("c", 1.0), ("d", 0.5))]
    assert len(choose(scored, "all", 0)) == 5
    for keep in ("one", "each", "all"):
        assert choose([("a", 1.0), ("b", 1.0)], keep, 3) == choose([], keep, 3) == []


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    tokenizer = Tokenizer.train(["Sort 1 2"], 264)
    torch.manual_seed(0)
    GPT(Config(tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16, context=160)).save(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def answered(monkeypatch):
    """Sampling replaced: of every four answers two are right, one wrong, and one wrong that does not end."""
    def generate(model, prompts, n, progress, **options):
        made = []
        for p, ids in enumerate(prompts):
            digits = sorted(tokenizer.decode(ids).split("Sort ")[1].split("\n")[0].split())
            for i in range(n):
                text = f"<answer>{' '.join(digits)}</answer>" if i % 4 < 2 else f"<answer>{i} {p % 10}</answer>"
                finish = "length" if i % 4 == 3 else "stop"
                made.append(engine.Sample(p, [*tokenizer.encode(text), tokenizer.chat_end_id], [], finish))
        progress(len(made))
        return made
    tokenizer = Tokenizer.train(["Sort 1 2"], 264)
    monkeypatch.setattr(engine, "generate", generate)


SAMPLING = dict(task="sorting", samples=4, questions=40, rank_by="verifier", judge_model="", judge_key_env="",
                temperature=1.0, top_p=1.0, max_new_tokens=0, device="cpu", dtype="fp32")


def test_sampled_pairs_are_right_against_wrong_and_dev_questions_are_held_out(tmp_path, model_dir, answered, capsys):
    prepare(str(tmp_path / "out"), from_model=model_dir, val_fraction=0.2, **SAMPLING)
    train, val = read(tmp_path / "out"), read(tmp_path / "out", "val")
    assert len(train) == 32 and len(val) == 8
    sides = {side: {q.problem for q in itertools.islice(TASKS["sorting"].questions(side, seed), 500)}
             for side, seed in (("train", 1338), ("dev", 1337))}
    for rows_of, side in ((train, "train"), (val, "dev")):
        for row in rows_of:
            assert row["prompt"][0]["content"].split("\n")[0] in sides[side]
            right, wrong = (TASKS["sorting"].score(row[name][0]["content"], row["answer"])[0]
                            for name in ("chosen", "rejected"))
            assert right and not wrong and row["task"] == "sorting" and row["source"] == "sampled:sorting"
            assert row["margin"] == 1.0
    assert len({row["prompt"][0]["content"] for row in train + val}) == 40
    assert ("questions 40, pass@1 0.5, pass@4 1, questions with right and wrong answers 40; 40 answers that did not end"
            in capsys.readouterr().out)


def test_a_reward_model_can_rank_and_what_it_does_not_score_is_left_out(tmp_path, model_dir, answered, monkeypatch):
    def load_reward(directory, device, dtype):
        assert directory == "out/reward"
        return lambda conversations: torch.tensor([math.nan if i % 3 == 0 else -len(c[-1]["content"]) * 1.0
                                                   for i, c in enumerate(conversations)])
    monkeypatch.setattr(judge, "load_reward", load_reward, raising=False)
    prepare(str(tmp_path / "out"), from_model=model_dir, **{**SAMPLING, "rank_by": "reward_model:out/reward"})
    made = read(tmp_path / "out")
    assert made and all(row["score_chosen"] == -len(row["chosen"][0]["content"]) for row in made)
    assert module.about(tmp_path / "out")["sources"]["sampled:sorting"]["dropped"]["answers without a score"] == 40


def test_a_tournament_counts_verdicts_that_hold_in_both_orders():
    def ask(conversation, first, second):
        if "mute" in (first, second):
            return None
        if {first, second} == {"b", "c"}:
            return "1"                                          # whichever comes first: a draw
        return "1" if first < second else "2"
    assert sampled.tournament([HI], ["a", "b", "c", "b", "mute"], ask)[:4] == [1.0, 0.25, 0.25, 0.25]
    assert math.isnan(sampled.tournament([HI], ["a", "mute"], ask)[1])


@pytest.mark.parametrize("options, sentence", [
    (dict(task=""), "task is ''"), (dict(task="sort"), "no task 'sort'"), (dict(task="gsm8k"), "gsm8k"),
    (dict(task="sorting=1,addition"), "all with a weight or none"), (dict(samples=1), "samples must be at least 2"),
    (dict(temperature=0.0), "above 0"), (dict(questions=1), "fewer than two"), (dict(rank_by="me"), "rank_by is 'me'"),
    (dict(rank_by="http://x/v1"), "needs --judge_model"), (dict(judge_model="x"), "for a judge's address"),
    (dict(sources="a.jsonl"), "not from both"), (dict(from_model="nowhere"), "nowhere"), (dict(top_p=2.0), "top_p"),
])
def test_what_cannot_be_sampled_is_one_sentence(tmp_path, model_dir, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        prepare(str(tmp_path / "out"), **{"from_model": model_dir, **SAMPLING, **options})
    assert not (tmp_path / "out").exists()


def test_an_untrained_model_gives_no_pairs_and_says_why(tmp_path, model_dir):
    with pytest.raises(ValueError, match="can be used: .*questions whose answers are equally good"):
        prepare(str(tmp_path / "out"), from_model=model_dir, **{**SAMPLING, "questions": 4, "max_new_tokens": 5})


# --- batches ---

def test_prompts_end_with_the_opening_and_answers_with_the_end_of_a_turn(folder, tokenizer):
    split = Pairs(folder, "train", tokenizer, 256)
    for row, prompt, chosen, rejected in zip(split.rows, split.prompts, split.chosen, split.rejected):
        assert prompt == list(tokenizer.encode_chat(row["prompt"], open_answer=True)[0])
        for name, ids in (("chosen", chosen), ("rejected", rejected)):
            whole, mask = tokenizer.encode_chat(row["prompt"] + row[name])
            assert list(whole[:len(prompt)]) == prompt and ids == [i for i, m in zip(whole, mask) if m]
            assert ids[-1] == tokenizer.chat_end_id
    assert split.source_names == ["a", "b"] and {*split.sources} == {"a", "b"} and not split.margins.any()
    assert not split.cut and not split.dropped


def test_an_earlier_reply_is_part_of_the_prompt(tmp_path, tokenizer):
    row = {"prompt": [HI, HELLO, HI], "chosen": said("<think>\nx\n</think>y"), "rejected": said("z"), "margin": 2}
    write(tmp_path / "train.jsonl", [row])
    split = Pairs(str(tmp_path), "train", tokenizer, 256)
    assert tokenizer.decode(split.prompts[0]).endswith("assistant\nHello.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
                                                      "<|im_start|>assistant\n")
    assert tokenizer.decode(split.chosen[0]) == "<think>\nx\n</think>y<|im_end|>"
    assert split.chosen[0][0] == tokenizer.specials["<think>"] and split.margins.tolist() == [2.0]


def test_long_prompts_are_cut_from_the_left_and_long_answers_from_the_right_never_to_nothing(tmp_path, tokenizer):
    long = " ".join(str(i) for i in range(300))
    write(tmp_path / "train.jsonl", [
        {"prompt": [{"role": "user", "content": long}], "chosen": said("a"), "rejected": said("b c")},
        {"prompt": [{"role": "user", "content": long}], "chosen": said(long), "rejected": said("b")},
        {"prompt": [{"role": "user", "content": "x"}], "chosen": said(f"one {long}"), "rejected": said(f"two {long}")},
        {"prompt": [{"role": "user", "content": "x"}], "chosen": said(f"{long} y"), "rejected": said(f"{long} z")}])
    opening = [tokenizer.specials["<|im_start|>"], *tokenizer.encode("assistant\n")]
    for context in (64, 40, len(opening) + 2):
        split = Pairs(str(tmp_path), "train", tokenizer, context)
        assert split.dropped["equal answers once cut"] == 1 and split.cut["prompts"] >= 2 and split.cut["answers"] >= 2
        for prompt, *answers in zip(split.prompts, split.chosen, split.rejected):
            assert prompt[-len(opening):] == opening and min(map(len, answers)) > 0
            assert len(prompt) + max(map(len, answers)) <= context
    whole = list(tokenizer.encode_chat([{"role": "user", "content": long}], open_answer=True)[0])
    split = Pairs(str(tmp_path), "train", tokenizer, 64)
    assert split.prompts[0] == whole[len(split.rejected[0]) - 64:] and split.rejected[0][-1] == tokenizer.chat_end_id
    assert split.prompts[1] == whole[-16:] and len(split.chosen[1]) == 48                # a quarter stays the prompt's
    with pytest.raises(ValueError, match="context=4 has no room"):
        Pairs(str(tmp_path), "train", tokenizer, 4)


def test_pairs_without_an_answer_or_with_equal_ones_are_dropped_and_counted(tmp_path, tokenizer):
    write(tmp_path / "train.jsonl", [PAIR, {**PAIR, "chosen": said(" ")}, {**PAIR, "chosen": [WHAT]}])
    split = Pairs(str(tmp_path), "train", tokenizer, 64)
    assert len(split) == 1 and split.dropped == {"without an answer": 1, "equal answers": 1}
    write(tmp_path / "train.jsonl", [{**PAIR, "chosen": [WHAT]}])
    with pytest.raises(ValueError, match="nothing to learn from: 1 equal answers"):
        Pairs(str(tmp_path), "train", tokenizer, 64)


@pytest.mark.parametrize("kind, row, sentence", [
    (Pairs, [1], "not an object"), (Pairs, {"prompt": [HI], "chosen": [HELLO]}, "has rejected=None"),
    (Pairs, {**PAIR, "chosen": "Hello."}, "has chosen='Hello.', not a list of messages"),
    (Pairs, {**PAIR, "prompt": [HI, HELLO]}, "ends with the assistant's turn"),
    (Pairs, {**PAIR, "chosen": [HELLO, HI]}, "has assistant, user in chosen, not one assistant's turn"),
    (Pairs, {**PAIR, "margin": "x"}, "margin='x', not a number"), (Pairs, {**PAIR, "margin": math.nan}, "margin=nan"),
    (Pairs, {"prompt": [HI], "completion": [HELLO], "label": True}, "is a thumb .* but a pair .* is wanted"),
    (Thumbs, PAIR, "is a pair .* but a thumb .* is wanted"),
    (Thumbs, {"prompt": [HI], "completion": [HELLO], "label": 1}, "label=1, not true or false"),
])
def test_opening_names_the_row_that_is_wrong(tmp_path, tokenizer, kind, row, sentence):
    write(tmp_path / "train.jsonl", [row])
    with pytest.raises(ValueError, match=f"row 1 of .*{sentence}"):
        kind(str(tmp_path), "train", tokenizer, 64)
    with pytest.raises(ValueError, match="there is no .*val.jsonl; write it with python data.py --kind=pairs"):
        kind(str(tmp_path), "val", tokenizer, 64)


def test_the_packed_row_holds_chosen_and_rejected_in_turns(folder, tokenizer):
    split = Pairs(folder, "val", tokenizer, 256)
    packed = split.packed([3, 1])
    expected = [split.chosen[3], split.rejected[3], split.chosen[1], split.rejected[1]]
    assert [packed.targets[0, where[mask]].tolist() for where, mask in zip(packed.places, packed.mask)] == expected


def test_fingerprints_tell_tokens_apart(folder, tokenizer):
    made = [Pairs(folder, split, tokenizer, size) for split, size in (("train", 256), ("val", 256), ("train", 20))]
    assert len({pairs.fingerprint for pairs in made}) == 3
    assert Pairs(folder, "train", tokenizer, 256).fingerprint == made[0].fingerprint


def test_batches_are_a_function_of_seed_and_step_for_any_number_of_ranks(folder, tokenizer):
    make = lambda *ranks, seed=5, micro=4: PairBatches(folder, "train", 16, micro, 256, seed, *ranks,
                                                        tokenizer=tokenizer)
    one, two = make(), [make(rank, 2, micro=2) for rank in range(2)]
    for step in (0, 1, 37, 5):
        whole = [i for micro in range(4) for i in one(step, micro)]
        assert [i for micro in range(4) for batches in two for i in batches(step, micro)] == whole
        assert whole != [i for micro in range(4) for i in make(seed=6)(step, micro)]
    n = one.n_pairs
    drawn = [i for step in range(3 * n // 16) for i in one.numbers(step)]
    for epoch in range(2):
        assert sorted(drawn[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert drawn[:n] != drawn[n:2 * n] and one.epoch(7) == 7 * 16 / n == 7 / one.steps_per_epoch


def test_a_step_that_does_not_fit_is_one_sentence(folder, tokenizer):
    with pytest.raises(ValueError, match="holds 1.. pairs, fewer than one step of pairs_per_step=1024"):
        PairBatches(folder, "train", 1024, 4, 256, 5, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="not a multiple of micro_pairs . ranks = 3 . 2"):
        PairBatches(folder, "train", 16, 3, 256, 5, 0, 2, tokenizer)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_fixed_pairs_are_each_exactly_once_and_ranks_have_equally_many_lists(folder, tokenizer, world_size):
    split = Pairs(folder, "val", tokenizer, 256)
    for limit in (0, 10):
        lists = [list(fixed_pairs(split, 4, limit, rank, world_size)) for rank in range(world_size)]
        assert len({len(of_rank) for of_rank in lists}) == 1
        found = sorted(i for of_rank in lists for numbers in of_rank for i in numbers)
        assert found == list(range(limit or len(split)))


def test_thumbs_come_in_batches_too(tmp_path, tokenizer):
    made = [{"prompt": f"q {i}", "completion": f"a {i}", "label": i % 3 == 0} for i in range(60)]
    prepare(str(tmp_path / "out"), write(tmp_path / "x.jsonl", made))
    batches = ThumbBatches(str(tmp_path / "out"), "train", 8, 4, 64, 1, tokenizer=tokenizer)
    for i in batches(3, 1):
        row, ids = batches.thumbs.rows[i], batches.thumbs.completions[i]
        assert batches.thumbs.labels[i] == row["label"] and tokenizer.decode(ids) == row["completion"][0][
            "content"] + "<|im_end|>"
    packed = batches.thumbs.packed(batches(3, 1))
    assert packed.lengths.tolist() == [len(batches.thumbs.completions[i]) for i in batches(3, 1)]
