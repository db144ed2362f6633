"""What a tokenizer.json says: how text is split, the bytes of each piece, and whether it is of a kind that we run.

Two kinds: byte-level BPE, our own or GPT-2's or Hugging Face's, and the Unigram that unigram.py trains.
"""
import json

# GPT-4's way of splitting, with two changes: digits in groups of at most 2, and no run longer than 32 characters. The
# bound makes encoding linear in the text (merging a piece of n bytes takes n log n, and tiktoken's regex engine gives
# up on a million spaces) and training safe (`tokenizers` merges a piece of n bytes in n * n).
SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)"                    # 's 't 'll
    r"|[^\r\n\p{L}\p{N}]?\p{L}{1,32}"           # a word, with the one space or sign before it
    r"|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]{1,32}[\r\n]{0,32}"     # signs, with the line ends after them
    r"|\s{0,32}[\r\n]"                          # blank lines
    r"|\s{1,32}(?!\S)|\s{1,32}"                 # other white space; the last space before a word goes with the word
)
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")                                                      # also Llama 3's
QWEN_SPLIT = GPT4_SPLIT.replace("{1,3}", "")
UNIGRAM_SPLIT = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
KEEP_MATCHES = (("Isolated", False), ("Removed", True))     # "behavior" and "invert" of a Split

# Vocabulary files write byte b as BYTE_CHARS[b]: printable Latin-1 as itself, the rest from U+0100 on (GPT-2's
# encoder.py), so that no piece holds a space or a line end.
PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
BYTE_CHARS = [chr(b) if b in PRINTABLE else chr(0x100 + len({*range(b)} - PRINTABLE)) for b in range(256)]
BYTE_OF_CHAR = {char: byte for byte, char in enumerate(BYTE_CHARS)}
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]     # Unigram's bytes; SPLIT parts any text that spells one


def piece_bytes(text):
    """The bytes that a vocabulary entry stands for."""
    try:
        return bytes([BYTE_OF_CHAR[char] for char in text])
    except KeyError:
        return text.encode()    # not written in BYTE_CHARS: an added token


def pieces_by_id(model):
    """The bytes of each id of a model's own vocabulary."""
    if model.get("type") != "Unigram":
        return {id: piece_bytes(text) for text, id in model["vocab"].items()}
    byte_of_piece = {piece: bytes([byte]) for byte, piece in enumerate(BYTE_PIECES)}
    return {id: byte_of_piece.get(text, text.encode()) for id, (text, _) in enumerate(model["vocab"])}


def merge_pairs(model):
    """The merges in order, as (left, right); files hold "left right" or ["left", "right"]."""
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]


def parse_json(files, name):
    """The contents of a JSON file as a dict, empty if there is no such file."""
    try:
        return dict(json.loads(files.get(name, b"{}")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"its {name} is not a JSON object ({error})") from None


def refuse_other_kinds(spec):
    """ValueError unless the tokenizer.json is of byte-level BPE with nothing left to chance, or of our own Unigram."""
    model = spec.get("model") or {}
    if model.get("type") == "Unigram":
        whole = model.get("byte_fallback") and {piece for piece, _ in model["vocab"]} >= {*BYTE_PIECES}
        if not whole or spec["normalizer"] or spec["pre_tokenizer"] != UNIGRAM_SPLIT:
            raise ValueError("it is a Unigram that does not give back every text (spaces as U+2581, a normaliser or no "
                             "bytes, as T5's); train one with data.py --tokenizer_kind=unigram")
        return
    kind = model.get("type") or ("BPE" if "merges" in model else "no model")    # GPT-2's own file names no type
    if kind == "BPE" and '"ByteLevel"' not in json.dumps([spec["pre_tokenizer"], spec["normalizer"]]):
        kind = "BPE on characters (SentencePiece)"
    elif any(model.get(key) for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")):
        kind = "BPE with byte_fallback, marks on words or dropout"
    if kind != "BPE":
        raise ValueError(f"it is {kind}, not byte-level BPE, the kind of GPT-2, Llama 3 and Qwen")


def split_pattern(pre_tokenizer):
    """The regular expression whose matches are the pieces, or None if it takes more than one to say."""
    *splits, byte_level = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else [{}]
    if byte_level.get("type") != "ByteLevel" or byte_level["add_prefix_space"]:
        return None
    if byte_level.get("use_regex", True):
        return None if splits else GPT2_SPLIT
    # TIKTOKEN_SPLITS match every character, so that it does not matter what becomes of the text between matches
    if len(splits) == 1 and (splits[0].get("behavior"), splits[0].get("invert")) in KEEP_MATCHES:
        return splits[0]["pattern"].get("Regex")
    return None


def gpt2_json(files, vocab_name, merges_name):
    """GPT-2's two files as the contents of a tokenizer.json."""
    config = parse_json(files, "tokenizer_config.json")
    if "GPT2" not in config.get("tokenizer_class", "GPT2"):
        raise ValueError(f"{merges_name} does not say how a {config['tokenizer_class']} splits text, as its "
                         "tokenizer.json would")
    vocab = parse_json(files, vocab_name)
    lines = files[merges_name].decode().splitlines()
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    specials = {text: vocab[text] for text in vocab.keys() - {*BYTE_CHARS, *map("".join, merges)}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": config.get("add_prefix_space", False),
                  "trim_offsets": False, "use_regex": True}
    return tokenizer_json(vocab, merges, specials, byte_level)


def added_token(id, text):
    """A special token, as tokenizer.json writes it."""
    return {"id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": True}


def tokenizer_json(vocab, merges, specials, pre_tokenizer):
    """The contents of a tokenizer.json, as `tokenizers` writes it."""
    added = [added_token(id, text) for text, id in sorted(specials.items(), key=lambda item: item[1])]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": vocab, "merges": merges}
    spec = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": pre_tokenizer, "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            "model": model}
    return json.dumps(spec, ensure_ascii=False).encode()
