"""tokenizer.py: ids are those of `tokenizers`, text comes back, and no text turns into a special token."""
import gzip
import itertools
import json
import os
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
from tokenizers import pre_tokenizers

import tokenizer as module
from tokenizer import SPECIALS, Tokenizer
from vocabulary import BYTE_CHARS, SPLIT, tokenizer_json

SHARED = Path(__file__).resolve().parent.parent.parent / "shared/data"
GPT2 = SHARED / "gpt2_bpe"
CODE = SHARED / "text/code_python.jsonl.gz"
needs_gpt2 = pytest.mark.skipif(not GPT2.exists(), reason="needs shared/data/gpt2_bpe")
needs_code = pytest.mark.skipif(not CODE.exists(), reason="needs shared/data/text")

# as in the tokenizer.json of Llama 3, of Qwen 2 and 3, of DeepSeek V3, and as built into `tokenizers`
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+")
DEEPSEEK = [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", r"[!-/:-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|\s+(?!\S)|\s+"]
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# every plane, and in full those with assigned characters: 0 to 3 and 14
CHARACTERS = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000
              and (code < 0x40000 or code >> 16 == 14 or code % 16 > 13)]
MIXED = [
    "The quick brown fox's 1234567 jumps; it'll DON'T I'VE 'RE x=3.14e-10 __init__(self):\n\tpass\r\n\r\n    # end\n\n",
    "Être ou ne pas être, ſo it'ſ, K'Kelvin 日本語テキスト、中文。한국어 ไทย हिन्दी العربية עברית ქართული Русский",
    "e\u0301 \u1112\u1161\u11ab İıß ﬁ ﬆ 𝔘𝔫𝔦 𐍈 Ⅷ ² ½ ٣٤٥ १२३ 👍🏽 👩\u200d👩\u200d👧 🇩🇪🇫🇷",
    "\u200b \u2060\ufeff\ufffd\uffff\U0010ffff",
    "".join(map(chr, range(0x20))) + "\x7f\x80\x85\x9f\xa0\xad \u1680\u2028\u2029\u202f\u3000 \x1c\x1d\x1e\x1f",
    "<|endoftext|> <think>2+2</think> <|im_start|>user\n<|im_end|><|pad|></answer>",
    "", " ", "\n", "a", "  two  spaces  ",
]
CORPUS = ["".join(pair) for pair in itertools.permutations(MIXED, 2)]


def random_texts(n, seed, alphabet=None):
    """n texts of random characters, some of them in runs around the longest piece."""
    rng, alphabet = random.Random(seed), alphabet or "".join(MIXED)
    runs = [1] * 12 + [2, 3, 31, 32, 33, 34, 64, 65]
    return ["".join(rng.choice(alphabet) * rng.choice(runs) for _ in range(rng.randrange(60))) for _ in range(n)]


def reference_ids(content, texts):
    """Ids by `tokenizers` alone, from the contents of a tokenizer.json, with its own way to leave specials alone."""
    reference = tokenizers.Tokenizer.from_str(content if isinstance(content, str) else content.decode())
    reference.encode_special_tokens = True
    reference.no_truncation()
    reference.no_padding()
    return [encoding.ids for encoding in reference.encode_batch(texts, add_special_tokens=False)]


def assert_same_ids(tok, texts, expected):
    for text, ids, wanted in zip(texts, tok.encode_batch(texts), expected, strict=True):
        assert ids.tolist() == wanted, ascii(text[:200])


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(CORPUS, 600)


@pytest.fixture(scope="module")
def content(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    tok.save(folder)
    return (folder / "tokenizer.json").read_bytes()


@pytest.fixture
def foreign(tmp_path, content):
    """Writes our tokenizer.json with changes and returns (the Tokenizer loaded from it, its contents)."""
    def write(model=None, splits=None, merges=None, added=(), **changes):
        spec = json.loads(content)
        spec["model"].update(model or {})
        spec.update(changes)
        if merges:
            spec["model"]["merges"] = [merges(pair) for pair in spec["model"]["merges"]]
        if splits is not None:
            steps = [{"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
                     for split in splits]
            steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
            spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        spec["added_tokens"] += [{"id": 600 + i, "content": text, "special": special, **flags}
                                 for i, (text, special) in enumerate(added)]
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
        return Tokenizer.load(tmp_path), json.dumps(spec)
    return write


# --- ids ---

@pytest.mark.parametrize("characters", [r"\p{L}", r"\p{N}", r"\s", r"(?i:[sdmtlvre])"])
def test_both_regex_engines_put_every_character_of_unicode_in_the_same_class(characters):
    text = "".join(CHARACTERS)
    ranks = {bytes([byte]): byte for byte in range(256)}
    matched = tiktoken.Encoding("bytes", pat_str=characters, mergeable_ranks=ranks, special_tokens={})
    kept = pre_tokenizers.Split(tokenizers.Regex(characters), "removed", invert=True).pre_tokenize_str(text)
    assert bytes(matched.encode_ordinary(text)).decode() == "".join(piece for piece, _ in kept)


def test_ids_are_those_of_tokenizers_on_every_plane(tok, content):
    planes = ["".join(CHARACTERS[start:start + 4096]) for start in range(0, len(CHARACTERS), 4096)]
    assert_same_ids(tok, planes, reference_ids(content, planes))
    assert [tok.decode(ids) for ids in tok.encode_batch(planes)] == planes


def test_ids_are_those_of_tokenizers_on_scripts_emoji_control_characters_and_long_runs(tok, content):
    texts = MIXED + random_texts(400, seed=1)
    assert tok._tiktoken is not None
    assert_same_ids(tok, texts, reference_ids(content, texts))
    assert [tok.decode(ids) for ids in tok.encode_batch(texts)] == texts


@pytest.mark.parametrize("split", [GPT2_SPLIT, LLAMA3, QWEN])
def test_foreign_patterns_given_to_tiktoken_split_as_in_tokenizers(foreign, split):
    tok, content = foreign(splits=[split])
    texts = MIXED + random_texts(300, seed=2)
    assert tok._tiktoken is not None
    assert_same_ids(tok, texts, reference_ids(content, texts))


@needs_code
def test_real_text_has_the_ids_of_tokenizers_and_comes_back(content, tok):
    with gzip.open(CODE, "rt", encoding="utf-8") as f:
        texts = [json.loads(line)["text"] for line in itertools.islice(f, 200)]
    assert_same_ids(tok, texts, reference_ids(content, texts))
    assert [tok.decode(ids) for ids in tok.encode_batch(texts)] == texts


@needs_gpt2
def test_gpt2_files_give_the_ids_of_openais_own_ranks(tmp_path):
    from tiktoken.load import load_tiktoken_bpe
    from tiktoken_ext.openai_public import r50k_pat_str
    r50k = tiktoken.Encoding("r50k", pat_str=r50k_pat_str, special_tokens={"<|endoftext|>": 50256},
                             mergeable_ranks=load_tiktoken_bpe(str(GPT2 / "r50k_base.tiktoken")))
    tok = Tokenizer.load(GPT2)
    texts = MIXED + random_texts(300, seed=3)
    assert_same_ids(tok, texts, [r50k.encode_ordinary(text) for text in texts])
    assert (tok.vocab_size, tok.eot_id, tok.pad_id, tok.specials) == (50257, 50256, None, {"<|endoftext|>": 50256})

    tok.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == tok.fingerprint

    # more white space in a row than tiktoken's regex engine can take back
    spaces = " " * 1_100_000 + "x"
    assert tok.decode(tok.encode(spaces)) == spaces


def test_two_files_are_read_as_gpt2s_under_either_name(foreign, tmp_path):
    tok, content = foreign(pre_tokenizer={**BYTE_LEVEL, "add_prefix_space": False})
    model = json.loads(content)["model"]
    merges = "\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""])
    for vocab_name, merges_name in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        folder = tmp_path / vocab_name.removesuffix(".json")
        folder.mkdir()
        (folder / vocab_name).write_text(json.dumps({**model["vocab"], **tok.specials}))
        (folder / merges_name).write_text(merges, encoding="utf-8")
        assert Tokenizer.load(folder).fingerprint == tok.fingerprint
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(ValueError, match="merges.txt does not say how a Qwen2Tokenizer splits text"):
        Tokenizer.load(folder)


def test_merges_in_any_order_give_the_ids_of_tokenizers():
    # the proof in _tiktoken_encoding, on random lists: out of order, repeated, of all splits, with pieces never merged
    rng, with_tiktoken = random.Random(0), 0
    for _ in range(400):
        pieces, merges = list("ab"), []
        for _ in range(rng.randint(1, 12)):
            left, right = rng.choices(pieces, k=2)
            if len(left + right) < 8:
                merges.append((left, right))
                pieces = list(dict.fromkeys([*pieces, left + right]))
        if rng.random() < 0.3:
            rng.shuffle(merges)
        if rng.random() < 0.3:      # as transformers converts Llama 3
            merges = [(piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece))
                      if piece[:i] in pieces and piece[i:] in pieces]
        never_merged = ["".join(rng.choices("ab", k=rng.randint(2, 5))) for _ in range(rng.randint(0, 2))]
        texts = list(dict.fromkeys([*BYTE_CHARS, *pieces, *never_merged]))
        ids = rng.sample(range(len(texts)), len(texts))
        spec = json.loads(tokenizer_json(dict(zip(texts, ids)), merges, {}, {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}))
        spec["model"]["ignore_merges"] = rng.random() < 0.4
        content = json.dumps(spec)
        tok = Tokenizer({"tokenizer.json": content.encode()})
        with_tiktoken += tok._tiktoken is not None
        words = ["".join(rng.choices("ab", k=k)) for k in (2, 3, 4, 5, 6, 7, 8, 20, 150)] + never_merged
        assert_same_ids(tok, words, reference_ids(content, words))
    assert 200 < with_tiktoken < 400        # both ways were taken


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
FOREIGN = {     # what is unlike ours, and whether tiktoken can do it
    "merges as strings": ({"merges": " ".join}, True),
    "Llama 3": ({"splits": [LLAMA3], "model": {"ignore_merges": True}}, True),
    "Qwen": ({"splits": [QWEN], "normalizer": {"type": "NFC"}}, True),
    "GPT-2 with a space before the first word": ({"pre_tokenizer": BYTE_LEVEL}, False),
    "StarCoder": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, {**BYTE_LEVEL, "add_prefix_space": False}]}}, False),
    "DeepSeek": ({"splits": DEEPSEEK}, False),
    "two patterns": ({"splits": [LLAMA3, r"\p{N}"]}, False),
    "cut to 3 ids": ({"splits": DEEPSEEK[:2], "truncation": {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}}, False),
    "a pattern we do not know": ({"splits": [r"\w+|\W"]}, False),
    "lower case": ({"normalizer": {"type": "Lowercase"}}, False),
    "runs of spaces added as words": ({"added": [("  ", False), ("quick brown", False)]}, False),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_tokenizer_gives_the_ids_of_its_file(foreign, kind):
    changes, with_tiktoken = FOREIGN[kind]
    tok, content = foreign(**changes)
    texts = MIXED + random_texts(60, seed=4)
    assert (tok._tiktoken is not None) == with_tiktoken
    assert_same_ids(tok, texts, reference_ids(content, texts))
    assert tok.decode(tok.encode("fox jumps")).strip() == "fox jumps"


# --- what text can and cannot do ---

@pytest.mark.parametrize("kind", ["ours", "not called special", "by tokenizers", "in the vocabulary", "whole text"])
def test_specials_in_text_stay_text(foreign, tok, kind):
    if kind == "not called special":            # as in Qwen 3
        tok, _ = foreign(splits=[QWEN], added=[("<tool_call>", False)])
    elif kind == "by tokenizers":
        tok, _ = foreign(splits=DEEPSEEK, added=[("<tool_call>", False), ("<|x|>", True)])
    elif kind == "in the vocabulary":           # where Llama 3's look up whole pieces
        tok, content = foreign(splits=[LLAMA3], added=[("<<>>", True)])
        vocab = {**json.loads(content)["model"]["vocab"], "<<>>": 592}
        tok, _ = foreign(splits=[LLAMA3], model={"ignore_merges": True, "vocab": vocab}, added=[("<<>>", True)])
        assert tok._tiktoken is not None
    elif kind == "whole text":
        tok, _ = foreign(splits=[r"[\s\S]+"], model={"ignore_merges": True, "vocab": {
            **dict(zip(BYTE_CHARS, range(256))), "<|x|>": 256}, "merges": []}, added=[("<|x|>", True)])
    assert kind != "not called special" or "<tool_call>" in tok.specials
    for spelled in [*tok.specials, "".join(tok.specials)]:
        ids = tok.encode(spelled)
        assert not {*ids} & {*tok.specials.values()} and tok.decode(ids) == spelled
    assert tok.decode([*tok.specials.values()]) == "".join(tok.specials)


def test_lone_surrogates_are_replaced_and_pairs_joined(tok):
    texts = ["a\ud800b", "\udc00", "\ud83d\ude00", "fine"]
    assert [tok.decode(ids) for ids in tok.encode_batch(texts)] == ["a\ufffdb", "\ufffd", "\U0001f600", "fine"]


def test_text_that_spells_the_separator_is_text(tok, content):
    texts = [module.BETWEEN_TEXTS, "<|zero2chat: ", "next text|>", module.BETWEEN_TEXTS * 2]
    assert_same_ids(tok, texts, reference_ids(content, texts))


def pieces_of(text, split=SPLIT):
    return [piece for piece, _ in pre_tokenizers.Split(tokenizers.Regex(split), "isolated").pre_tokenize_str(text)]


def test_text_is_split_as_by_gpt4_but_for_digits_in_pairs():
    assert pieces_of("It's 12345 x=7\n\n  y") == ["It", "'s", " ", "12", "34", "5", " x", "=", "7", "\n\n", " ", " y"]
    for text in MIXED + random_texts(300, seed=8):
        if max((len(list(run)) for _, run in itertools.groupby(text)), default=0) < 5 and len(text) < 40:
            assert pieces_of(text) == pieces_of(text, LLAMA3.replace("{1,3}", "{1,2}"))


@pytest.mark.parametrize("unit", ["a", "é", "日", "1", "=", " ", "\t", "\n", "\r\n", " \n", "=\n", "e\u0301", "👍"])
def test_no_piece_is_longer_than_a_bound_whatever_the_run(unit):
    # merging is n log n or worse in the length of a piece: with bounded pieces, work is linear in the text
    assert max(map(len, pieces_of("=" + unit * 2000 + "x"))) <= 1 + 32 + 32


def test_a_megabyte_of_one_letter_has_the_ids_of_tokenizers(tok, content):
    text = "a" * 1_000_000
    assert tok.encode(text) == reference_ids(content, [text])[0]


# --- batches ---

@pytest.mark.parametrize("threads", [1, 2, 5, None])
def test_batches_give_the_same_ids_however_texts_are_joined_cut_and_spread(tok, content, threads, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 40)
    texts = random_texts(150, seed=5, alphabet="ab1.,'é\n\n\n\r \t\u3000\u0085\u0301")
    assert any(len(module._cut(text)) > 3 for text in texts)
    arrays = tok.encode_batch(iter(texts), threads=threads)
    assert [ids.tolist() for ids in arrays] == reference_ids(content, texts)
    assert {ids.dtype for ids in arrays} == {np.dtype(np.uint16)}
    assert tok.encode_batch([]) == []


@pytest.mark.parametrize("changes", [{"splits": [GPT2_SPLIT]}, {"added": [("a\nb", False), ("\na", False)]}])
def test_texts_are_not_cut_where_that_could_change_ids(foreign, monkeypatch, changes):
    tok, content = foreign(**changes)
    monkeypatch.setattr(module, "CHUNK", 5)
    texts = random_texts(100, seed=9, alphabet="ab.\n\n")
    assert_same_ids(tok, texts, reference_ids(content, texts))


def test_every_white_space_of_the_pattern_keeps_a_text_in_one_part(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 1)
    ranks = {bytes([byte]): byte for byte in range(256)}
    spaces = tiktoken.Encoding("bytes", pat_str=r"\s", mergeable_ranks=ranks, special_tokens={})
    for space in bytes(spaces.encode_ordinary("".join(CHARACTERS))).decode():
        assert space == "\n" or module._cut(f"aa\n{space}b") == [f"aa\n{space}b"]
    assert module._cut("aa\n\nb") == ["aa\n\n", "b"]


# --- training ---

def test_smallest_vocabulary_is_the_plain_bytes():
    tok = Tokenizer.train(CORPUS, 264)
    assert tok.encode("añ👍") == list("añ👍".encode()) and tok.vocab_size == 264
    with pytest.raises(ValueError, match="vocab_size=263 is too small.*264"):
        Tokenizer.train(CORPUS, 263)


def test_ids_are_bytes_then_merges_then_specials(tok):
    assert (tok.vocab_size, tok.eot_id, tok.pad_id) == (600, 592, 593)
    assert list(tok.specials.items()) == [(text, 592 + i) for i, text in enumerate(SPECIALS)]
    assert tok.decode_bytes(range(256)) == bytes(range(256))
    assert all(tok.token_bytes[256:592] >= 2)


def test_training_depends_on_the_texts_only_and_ends_when_nothing_repeats():
    tok = Tokenizer.train(CORPUS, 600)
    assert Tokenizer.train((text for text in CORPUS), 600).fingerprint == tok.fingerprint
    assert Tokenizer.train(CORPUS[:-1], 600).fingerprint != tok.fingerprint
    assert Tokenizer.train(["abab"], 5000).vocab_size == 256 + 1 + 8
    with pytest.raises(ValueError, match="got one string"):
        Tokenizer.train("abab", 300)


def test_training_survives_specials_surrogates_and_a_megabyte_of_one_letter():
    # a merge that spelled a special would take its id; unbounded, the megabyte would take hours
    texts = ["<|endoftext|><think></think>" * 100, "a\ud800" * 50, "z" * 1_000_000, "-" * 1_000_000]
    tok = Tokenizer.train(texts, 400)
    ids = tok.encode(texts[0])
    assert tok.decode(ids) == texts[0] and max(ids) < tok.vocab_size - len(SPECIALS)


# --- files ---

@pytest.mark.parametrize("model_type", [None, "qwen3", "llama"])
def test_transformers_opens_the_directory_and_gives_the_same_ids(tok, tmp_path, monkeypatch, model_type):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")       # or it asks the network about the folder
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    tok.save(tmp_path)
    if model_type:      # as beside a model: transformers has tokenizer classes of its own for these
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 1536}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = MIXED + random_texts(100, seed=6)
    texts = [text for text in texts if not re.search("|".join(map(re.escape, SPECIALS)), text)]    # special, to them
    assert_same_ids(tok, texts, [theirs(text, add_special_tokens=False)["input_ids"] for text in texts])
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (tok.eot_id, tok.pad_id, tok.vocab_size)
    assert theirs("<|im_end|>")["input_ids"] == [tok.specials["<|im_end|>"]]
    assert theirs.decode(tok.encode(MIXED[1])) == MIXED[1]


def test_fingerprint_survives_saving_and_follows_everything_that_decides_ids(tok, foreign, tmp_path):
    tok.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").fingerprint == tok.fingerprint
    variants = [foreign(**changes)[0].fingerprint for changes, _ in FOREIGN.values()]
    assert variants[0] == tok.fingerprint       # only written differently
    model = json.loads(foreign()[1])["model"]
    swapped = {**model["vocab"], "a": model["vocab"]["b"], "b": model["vocab"]["a"]}
    changes = [{"model": {"ignore_merges": True}}, {"model": {"vocab": swapped}}, {"added": [("q", False)]},
               {"added": [("q", True)]}, {"added": [("<|more|>", True)]}, {"model": {"merges": model["merges"][:-1]}}]
    others = [*variants[1:], *(foreign(**change)[0].fingerprint for change in changes), tok.fingerprint]
    assert len({*others}) == len(others)


def test_foreign_files_are_saved_back_byte_for_byte(foreign, tmp_path):
    tok, content = foreign(splits=DEEPSEEK)
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(content), indent=3) + "\n\n")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token":  {"content": "<|im_end|>"}, "chat_template": "x"}')
    Tokenizer.load(tmp_path).save(tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert Tokenizer.load(tmp_path / "copy").fingerprint == tok.fingerprint


def test_an_interrupted_save_leaves_the_old_tokenizer(tok, tmp_path, monkeypatch):
    tok.save(tmp_path)
    old = [(tmp_path / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")]
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)
    other = Tokenizer.train(["other"], 300)
    other._config = other.specials = {}     # so that its tokenizer_config.json differs too
    with pytest.raises(ZeroDivisionError):
        other.save(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")] == old


@pytest.mark.parametrize("added, config, eot, pad", [
    (["</s>", "<pad>"], {}, "</s>", "<pad>"),                                                  # BLOOM
    (["<|end_of_text|>", "<|eot_id|>"], {"eos_token": "<|eot_id|>"}, "<|end_of_text|>", None),     # Llama 3
    (["<|stop|>"], {"eos_token": {"content": "<|stop|>"}, "pad_token": "<|stop|>"}, "<|stop|>", "<|stop|>"),
    (["<|x|>"], {}, None, None),
])
def test_end_of_text_and_padding_are_found_in_foreign_tokenizers(content, tmp_path, added, config, eot, pad):
    spec = json.loads(content)
    flags = spec["added_tokens"][0]
    spec["added_tokens"] = [{**flags, "content": text, "id": 592 + i} for i, text in enumerate(added)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tok = Tokenizer.load(tmp_path)
    assert tok.pad_id == tok.specials.get(pad)
    if eot:
        assert tok.eot_id == tok.specials[eot]
    else:
        with pytest.raises(ValueError, match=r"no end-of-text token.*<\|x\|>"):
            tok.eot_id  # noqa: B018


def wordpiece(spec):
    spec["model"] = {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}


def sentencepiece(spec):
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def broken_merges(spec):
    spec["model"]["merges"].append(["no such", "piece"])


@pytest.mark.parametrize("change, reason", [
    (wordpiece, "it is WordPiece, not byte-level BPE"), (sentencepiece, "it is BPE on characters"),
    (lambda spec: spec["model"].update(byte_fallback=True), "byte_fallback"), (broken_merges, "no such"),
    (lambda spec: spec["model"].update(dropout=0.1), "dropout"), (lambda spec: spec.pop("model"), "no model"),
])
def test_what_is_not_byte_level_bpe_is_refused_in_one_sentence(content, tmp_path, change, reason):
    spec = json.loads(content)
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))} cannot be used: .*{reason}[^\n]*$"):
        Tokenizer.load(tmp_path)


def test_missing_and_broken_files_are_named(tok, tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer: looked for tokenizer.json or encoder.json with vocab"):
        Tokenizer.load(tmp_path)
    tok.save(tmp_path)
    with pytest.raises(ValueError, match="typo holds no tokenizer"):       # and not the one of the folder above
        Tokenizer.load(tmp_path / "typo")
    for name, content in (("tokenizer.json", ""), ("tokenizer.json", "[1]"), ("tokenizer_config.json", "{")):
        tok.save(tmp_path)
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"cannot be used: its {name} is not a JSON object"):
            Tokenizer.load(tmp_path)


# --- ids to text ---

def test_stream_gives_whole_characters_that_add_up_to_decode(tok):
    stream, rng = tok.stream(), random.Random(7)
    for _ in range(100):
        ids = rng.choices(range(tok.vocab_size + 3), k=40) + tok.encode(rng.choice(MIXED))
        assert "".join([stream.push(id) for id in ids] + [stream.flush()]) == tok.decode(ids)
    for text in ("日本語 👩‍👩‍👧 é", "<think>\U0001f600"):
        for id, byte in zip(text.encode(), text.encode(), strict=True):
            assert "\ufffd" not in stream.push(id), byte      # ids below 256 are bytes: every cut through a character
    assert (stream.push(0xF0), stream.push(0x9F), stream.flush(), stream.flush()) == ("", "", "\ufffd", "")


def test_decode_takes_arrays_and_marks_what_is_no_text(tok, foreign):
    ids = tok.encode(MIXED[1])
    assert tok.decode(np.array(ids, np.uint16)) == MIXED[1]
    assert tok.decode([0xFF, tok.vocab_size + 100]) == "\ufffd\ufffd"     # not UTF-8; beyond the vocabulary
    assert tok.decode_bytes([0xFF]) == b"\xff" and tok.decode([]) == ""
    with pytest.raises(ValueError, match="-100 is not a token id"):
        tok.decode([1, -100])
    vocab = {char: id for id, char in enumerate(BYTE_CHARS)}
    tok, _ = foreign(model={"vocab": {**vocab, "｜": 256}, "merges": []})       # not written in BYTE_CHARS
    assert tok.decode([256]) == "｜"


def test_token_bytes_add_up_to_the_bytes_of_the_text(tok, foreign):
    for each in (tok, foreign(added=[("  ", False)])[0]):
        for text in MIXED:
            assert each.token_bytes[each.encode(text)].sum() == len(text.encode())
        assert each.token_bytes.shape == (each.vocab_size,) and each.token_bytes.dtype == np.int32
        assert not each.token_bytes[[*each.specials.values()]].any()


def test_nfc_is_that_of_the_files_library(foreign):
    tok, _ = foreign(normalizer={"type": "NFC"})
    assert tok.decode(tok.encode("e\u0301\ud800")) == unicodedata.normalize("NFC", "e\u0301") + "\ufffd"


def test_bytes_that_a_foreign_vocabulary_lacks_become_its_unknown_token(foreign):
    vocab = {char: id for id, char in enumerate(BYTE_CHARS[:0xF0])}
    tok, content = foreign(model={"vocab": {**vocab, "<unk>": 240}, "merges": [], "unk_token": "<unk>"},
                           added=[("<unk>", True)])
    assert tok._tiktoken is None
    assert_same_ids(tok, ["a👍b"], reference_ids(content, ["a👍b"]))


# --- chats ---

CHAT = [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "\n日本 é?  "},
        {"role": "assistant", "content": "<think>\nhm</think>\n\n<answer>4</answer>"}, {"role": "user", "content": ""},
        {"role": "assistant", "content": ""}, {"role": "assistant", "content": "\n again"}]


def test_a_chat_is_chatml_and_its_mask_what_the_assistant_wrote(tok):
    ids, mask = tok.encode_chat(CHAT)
    assert tok.decode(ids) == tok.chat_text(CHAT) == (
        "<|im_start|>system\nBe brief.\n<|im_end|>\n<|im_start|>user\n\n日本 é?  <|im_end|>\n"
        "<|im_start|>assistant\n<think>\nhm</think>\n\n<answer>4</answer><|im_end|>\n<|im_start|>user\n<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>assistant\n\n again<|im_end|>\n")
    assert len(ids) == len(mask) and {*mask} == {0, 1}
    runs = itertools.groupby(zip(ids, mask), lambda pair: pair[1])
    written = [[id for id, _ in run] for trained, run in runs if trained]
    assert [tok.decode(run) for run in written] == [
        "<think>\nhm</think>\n\n<answer>4</answer><|im_end|>", "<|im_end|>", "\n again<|im_end|>"]
    assert written[1] == [tok.chat_end_id] == [tok.specials["<|im_end|>"]]


def test_an_open_answer_is_where_the_answer_begins(tok):
    # what training puts before an answer is what generation gives, to the id, whatever the answer begins with
    for answer in ("4", "\n\n4", " 4", "<think>4</think>", ""):
        messages = [CHAT[1], {"role": "assistant", "content": answer}]
        given, mask = tok.encode_chat(messages[:1], open_answer=True)
        ids, trained = tok.encode_chat(messages)
        assert ids[:len(given)] == given and not any(mask) and trained == mask + [1] * (len(ids) - len(given) - 1) + [0]
        assert tok.decode(given) == tok.chat_text(messages[:1], open_answer=True)


def test_transformers_gives_the_same_chat_text_ids_and_mask(tok, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    tok.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.chat_template == tok.chat_template
    for messages in (CHAT, CHAT[1:3], CHAT[1:2]):
        for open_answer in (False, True):
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_answer)
            assert text == tok.chat_text(messages, open_answer)
    encoded = theirs.apply_chat_template(CHAT[:5], return_dict=True, return_assistant_tokens_mask=True)
    assert (encoded["input_ids"], encoded["assistant_masks"]) == tok.encode_chat(CHAT[:5])


def test_only_the_assistants_own_marks_become_specials(tok):
    spelled = "".join(SPECIALS)
    for role in module.ROLES:
        ids, _ = tok.encode_chat([{"role": role, "content": spelled}])
        names = [text for id in ids for text, special in tok.specials.items() if id == special]
        assert names == ["<|im_start|>", *(module.MARKS if role == "assistant" else []), "<|im_end|>"]
        assert spelled in tok.decode(ids)


def test_marks_that_a_foreign_tokenizer_lacks_are_text(foreign):
    tok, content = foreign()
    added = [token for token in json.loads(content)["added_tokens"] if "answer" not in token["content"]]
    tok, _ = foreign(added_tokens=added)
    ids, mask = tok.encode_chat([{"role": "assistant", "content": "<think>x</think><answer>4</answer>"}])
    begin = 1 + len(tok.encode("assistant\n"))
    assert ids[begin:-1 - len(tok.encode("\n"))] == [
        tok.specials["<think>"], *tok.encode("x"), tok.specials["</think>"], *tok.encode("<answer>4</answer>")]
    assert ids[begin - 1:begin] == tok.encode("\n") and sum(mask) == len(ids) - begin - 1


@pytest.mark.parametrize("messages, reason", [
    ([], r"at least one message, got \[\]"), ("hello", "at least one message, got 'hello'"),
    (["hello"], "a role and its content, a text, got 'hello'"), ([{"role": "user"}], "a role and its content, a text"),
    ([{"role": "user", "content": ["x"]}], "a text, got .*'x'"), ([{"content": "x"}], "system, user, .*got None"),
    ([CHAT[0], {"role": "tool", "content": "x"}], "one of system, user, assistant, got 'tool'")])
def test_what_is_no_chat_is_refused_in_one_sentence(tok, messages, reason):
    for function in (tok.encode_chat, tok.chat_text):
        with pytest.raises(ValueError, match=rf"^a [^\n]*{reason}[^\n]*$"):
            function(messages)


def test_a_tokenizer_without_chatml_has_no_chats(foreign):
    tok, content = foreign()
    for without in ("<|im_start|>", "<|im_end|>"):
        tok, _ = foreign(added_tokens=[token for token in json.loads(content)["added_tokens"]
                                       if token["content"] != without])
        assert tok.chat_end_id is tok.chat_template is None
        with pytest.raises(ValueError, match=r"no chat template: its specials \[.*\] lack <\|im_start\|> or"):
            tok.encode_chat(CHAT)


@pytest.mark.parametrize("name, text", [("chat_template.jinja", "{# ours? #}\r\n"), ("tokenizer_config.json", "x")])
def test_a_template_of_its_own_is_kept_byte_for_byte(tok, tmp_path, name, text):
    tok.save(tmp_path)
    content = text if name.endswith("jinja") else f'{{"chat_template":  "{text}"}}'
    (tmp_path / name).write_bytes(content.encode())
    theirs = Tokenizer.load(tmp_path)
    theirs.save(tmp_path / "copy")
    assert theirs.chat_template == text and (tmp_path / "copy" / name).read_bytes() == content.encode()
    assert theirs.encode_chat(CHAT) == tok.encode_chat(CHAT) and theirs.fingerprint == tok.fingerprint
