"""unigram.py: every text comes back, no text turns into a special or a byte, and all that reads a BPE reads it."""
import gzip
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import tokenizer as module
from tokenizer import SPECIALS, Tokenizer
from vocabulary import BYTE_PIECES

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ZERO2CHAT_DATA", ROOT.parent / "shared/data"))
CODE = DATA / "text/code_python.jsonl.gz"
MIXED = [
    "The quick brown fox's 1234567 jumps; it'll DON'T x=3.14e-10 __init__(self):\n\tpass\r\n\r\n    # end\n\n",
    "Être ou ne pas être 日本語テキスト、中文。한국어 ไทย हिन्दी العربية עברית Русский e\u0301 ﬁ ½ ٣٤٥ 𝔘𝔫𝔦",
    "👍🏽 👩\u200d👩\u200d👧 🇩🇪 \u200b\ufeff\ufffd\uffff\U0010ffff \u2581\u2581word \u3000\xa0",
    "".join(map(chr, range(0x20))) + "\x7f\x80\x85\x9f",
    "<unk> <s> </s> <0x41><0x00>< 0x41> <0xFF>" + "".join(BYTE_PIECES) + "".join(SPECIALS),
    "", " ", "\n", "a", "  two  spaces  ", "a" * 5000, " " * 5000,
]
CORPUS = ["".join(pair) for pair in itertools.permutations(MIXED[:2] + MIXED[5:-2], 2)] + ["the cat sat. " * 300]


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(CORPUS, 500, "unigram")


def random_texts(n, seed):
    rng, alphabet = random.Random(seed), "".join(MIXED)
    return ["".join(rng.choice(alphabet) * rng.choice([1, 1, 1, 2, 33]) for _ in range(rng.randrange(60)))
            for _ in range(n)]


def test_every_text_comes_back_in_characters_it_was_never_trained_on(tok):
    planes = ["".join(map(chr, range(start, start + 2048))) for start in range(0, 0x30000, 2048)
              if not 0xD800 <= start < 0xE000]
    for text in (*MIXED, *random_texts(300, seed=1), *planes):
        assert tok.decode(tok.encode(text)) == text, ascii(text[:200])


def test_text_that_spells_a_byte_or_a_special_stays_text(tok):
    assert tok.encode("<0x41>") != [0x41] and tok.decode(tok.encode("<0x41>")) == "<0x41>"
    for text in SPECIALS:
        assert not {*tok.encode(text)} & {*tok.specials.values()}
        assert tok.specials[text] not in tok.encode("a" + text + "b")


def test_ids_are_those_of_tokenizers_on_the_saved_file(tok, tmp_path):
    tok.save(tmp_path)
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    reference.encode_special_tokens = True
    for text, ids in zip(MIXED, tok.encode_batch(MIXED), strict=True):
        assert ids.tolist() == reference.encode(text, add_special_tokens=False).ids
        assert reference.decode(ids.tolist(), skip_special_tokens=False) == text


def test_the_segmentation_is_the_likeliest_one(tok):
    """Against a plain Viterbi search over all ways to part a word (Kudo 2018, eq. 4)."""
    vocab = json.loads(tok._files["tokenizer.json"])["model"]["vocab"]
    score = {piece: value for piece, value in vocab[256:]}
    for word in (" quick", "init", " cat", " spaces", "fox"):
        best = {0: 0.0}
        for end in range(1, len(word) + 1):
            ways = [best[start] + score[word[start:end]] for start in range(end)
                    if start in best and word[start:end] in score]
            if ways:
                best[end] = max(ways)
        found = sum(score[tok.decode([id])] for id in tok.encode(word))
        assert found == pytest.approx(best[len(word)], abs=1e-3)


def test_scores_are_log_probabilities_and_ids_go_from_bytes_to_pieces_to_specials(tok):
    vocab = json.loads(tok._files["tokenizer.json"])["model"]["vocab"]
    scores = [score for _, score in vocab[256:]]
    assert [piece for piece, _ in vocab[:256]] == BYTE_PIECES and scores == sorted(scores, reverse=True)
    assert np.exp(scores).sum() == pytest.approx(1, abs=0.2)
    assert tok.vocab_size == len(vocab) + len(SPECIALS) <= 500
    assert [*tok.specials] == [*SPECIALS] and [*tok.specials.values()] == [*range(len(vocab), tok.vocab_size)]


def test_training_again_in_another_process_gives_the_same_tokenizer(tok):
    code = "import test_unigram as t; print(t.Tokenizer.train(t.CORPUS, 500, 'unigram').fingerprint)"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == tok.fingerprint


@pytest.mark.parametrize("vocab_size", [264, 265, 266, 270, 300])
@pytest.mark.parametrize("corpus", [[], [""], ["a"], CORPUS])
def test_the_smallest_vocabularies_are_bytes_and_give_every_text_back(vocab_size, corpus):
    tok = Tokenizer.train(corpus, vocab_size, "unigram")
    assert 264 <= tok.vocab_size <= vocab_size and tok.decode(tok.encode(MIXED[1])) == MIXED[1]
    if vocab_size == 264:
        assert tok.encode("añ👍") == list("añ👍".encode())


def test_rare_characters_are_left_to_the_bytes_and_frequent_ones_are_not():
    texts = ["the cat sat on the mat. " * 400 + chr(0x4E00 + i) for i in range(50)]
    tok = Tokenizer.train(texts, 400, "unigram")
    assert len(tok.encode("\u4e00")) == 3 and len(tok.encode(" ")) == 1


def test_token_bytes_add_up_and_the_stream_gives_whole_characters(tok):
    for text in MIXED + random_texts(50, seed=2):
        ids, stream = tok.encode(text), tok.stream()
        assert tok.token_bytes[ids].sum() == len(text.encode())
        assert "".join([stream.push(id) for id in ids] + [stream.flush()]) == text
    assert tok.token_bytes[[*tok.specials.values()]].sum() == 0


def test_long_texts_that_are_cut_have_the_ids_of_the_whole(tok, monkeypatch):
    texts = ["\n".join(MIXED[:2]) * 20, *random_texts(40, seed=3)]
    whole = [ids.tolist() for ids in tok.encode_batch(texts)]
    monkeypatch.setattr(module, "CHUNK", 40)
    assert len(module._cut(texts[0])) > 3
    assert [ids.tolist() for ids in tok.encode_batch(texts, threads=2)] == whole


def test_chats_have_the_ids_and_masks_of_their_parts(tok):
    ids, mask = tok.encode_chat([{"role": "user", "content": "hi <|im_end|>"},
                                 {"role": "assistant", "content": "<think>2</think>4"}])
    assert tok.decode(ids) == ("<|im_start|>user\nhi <|im_end|><|im_end|>\n<|im_start|>assistant\n<think>2</think>4"
                               "<|im_end|>\n")
    assert ids.count(tok.chat_end_id) == 2
    assert tok.decode(np.array(ids)[np.array(mask) == 1]) == "<think>2</think>4<|im_end|>"


def test_saved_and_loaded_it_is_the_same_and_its_fingerprint_follows_the_scores(tok, tmp_path):
    tok.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == tok.fingerprint and loaded.kind == "unigram"
    assert loaded.encode(MIXED[0]) == tok.encode(MIXED[0])
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["vocab"][300][1] -= 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    assert Tokenizer.load(tmp_path).fingerprint != tok.fingerprint


@pytest.mark.parametrize("model_type", [None, "qwen3", "llama"])
def test_transformers_opens_the_directory_and_gives_the_same_ids(tok, tmp_path, monkeypatch, model_type):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    tok.save(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 512}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in MIXED[:4] + MIXED[5:]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tok.encode(text)
        assert theirs.decode(tok.encode(text)) == text
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (tok.eot_id, tok.pad_id, tok.vocab_size)


def metaspace(spec):
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


@pytest.mark.parametrize("change", [
    metaspace, lambda spec: spec["model"].update(byte_fallback=False), lambda spec: spec["model"]["vocab"].pop(65),
    lambda spec: spec.update(normalizer={"type": "NFC"})])
def test_a_unigram_that_loses_text_is_refused_in_one_sentence(tok, tmp_path, change):
    tok.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be used: it is a Unigram that does not give back every text[^\n]*$"):
        Tokenizer.load(tmp_path)


def test_an_unknown_kind_and_too_small_a_vocabulary_are_refused():
    with pytest.raises(ValueError, match="must be bpe or unigram, got 'wordpiece'"):
        Tokenizer.train(CORPUS, 500, "wordpiece")
    with pytest.raises(ValueError, match="vocab_size=263 is too small.*264"):
        Tokenizer.train(CORPUS, 263, "unigram")


@pytest.mark.skipif(not CODE.exists(), reason="needs text/ of ZERO2CHAT_DATA or shared/data")
def test_real_text_comes_back_in_fewer_pieces_than_bytes():
    with gzip.open(CODE, "rt", encoding="utf-8") as f:
        texts = [json.loads(line)["text"] for line in itertools.islice(f, 60)]
    tok = Tokenizer.train(texts[:50], 1024, "unigram")
    for text in texts:
        assert tok.decode(tok.encode(text)) == text
    assert sum(map(len, tok.encode_batch(texts[50:]))) < 0.6 * sum(len(text.encode()) for text in texts[50:])


# --- from text to a model that continues it ---

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unigram")
    pick = random.Random(0)
    for i in range(6):
        (folder / f"{i}.txt").write_text(" ".join(f"the {pick.choice(['cat', 'dog'])} sat on {j % 7} mats."
                                                  for j in range(600)))
    run = lambda *args: subprocess.run([sys.executable, *args], cwd=ROOT, check=True, capture_output=True, text=True,
                                       timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    run("data.py", f"--sources={folder}/*.txt", f"--out_dir={folder}/text", "--tokenizer_kind=unigram",
        "--vocab_size=330", "--val_fraction=0.3")
    run("pretrain.py", f"--data={folder}/text", f"--out_dir={folder}/base", "--n_layer=1", "--n_head=2", "--n_embd=16",
        "--context=32", "--rows_per_step=4", "--device=cpu", "--dtype=fp32", "--max_steps=6", "--eval_tokens=512",
        "--curves=false")
    return folder / "base"


def test_a_model_is_trained_generates_and_scores_with_it(trained):
    import engine
    import likelihood  # noqa: F401
    model, tok, chat, _ = engine.load(str(trained), device="cpu", dtype="fp32")
    assert tok.kind == "unigram" and not chat
    [sample] = engine.generate(model, [[tok.start_id, *tok.encode("the cat")]], max_new_tokens=8, temperature=0,
                               stop=[" xyz"], tokenizer=tok)
    assert len(sample.tokens) == 8 and tok.decode(sample.tokens)
    records = [json.loads(line) for line in open(trained / "log.jsonl")]
    assert 0 < records[-1]["val_bpb"] < 9


def test_data_py_refuses_an_unknown_kind_in_one_sentence(tmp_path):
    result = subprocess.run([sys.executable, "data.py", "--sources=stdlib", "--tokenizer_kind=word",
                             f"--out_dir={tmp_path}/x"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "tokenizer_kind is 'word'; it must be bpe or unigram" in result.stderr
    assert "Traceback" not in result.stderr
