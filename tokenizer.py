"""Byte-level BPE: train one, or read GPT-2's or Hugging Face's; or our own Unigram; text and chats to ids and back.

    tok = Tokenizer.train(texts, vocab_size=4096)    # texts: any iterable of str, for instance a generator over files
    tok = Tokenizer.train(texts, 4096, "unigram")    # the other kind: unigram.py
    tok.save("out/tokenizer")                        # the Hugging Face layout: transformers and vLLM open it
    tok = Tokenizer.load("out/tokenizer")
    tok.decode(tok.encode("hello")) == "hello"
    ids, mask = tok.encode_chat([{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}])

Three steps: a regular expression splits the text into short pieces, a piece becomes its UTF-8 bytes, and the learned
merges join neighbouring bytes, earliest merge first, until none applies (Sennrich et al. 2016, arXiv:1508.07909; on
bytes: Radford et al. 2019). `tokenizers` trains and is the reference for ids; `tiktoken`, three times as fast, encodes
wherever it provably gives the same ids (`_tiktoken_encoding` has the proof), `tokenizers` wherever it might not, and
Unigram always.

Text never becomes a special token, whatever it spells: specials are put in by id.
"""
import codecs
import hashlib
import itertools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

import unigram
from vocabulary import (
    BYTE_CHARS,
    BYTE_OF_CHAR,
    GPT2_SPLIT,
    GPT4_SPLIT,
    QWEN_SPLIT,
    SPLIT,
    added_token,
    gpt2_json,
    merge_pairs,
    parse_json,
    piece_bytes,
    pieces_by_id,
    refuse_other_kinds,
    split_pattern,
    tokenizer_json,
)

KINDS = ("bpe", "unigram")
SPECIALS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<answer>", "</answer>")
MARKS = SPECIALS[4:]                            # the specials that an assistant writes
MASK = "<|mask|>"                               # stands for a hidden token; only with_mask has it
ROLES = ("system", "user", "assistant")
# ChatML, as Jinja for others; `generation` tells transformers what encode_chat's mask says. Newlines are written as
# expressions because those after a block are dropped.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Patterns on which the two libraries' regex engines agree, as tests/test_tokenizer.py shows over all of Unicode.
TIKTOKEN_SPLITS = (SPLIT, GPT2_SPLIT, GPT4_SPLIT, QWEN_SPLIT)
NFC = {"type": "NFC"}

CONFIG_FILES = ("tokenizer_config.json", "chat_template.jinja")     # newer transformers keep the template apart
CHUNK = 1 << 16                                 # characters handed to a thread at a time
BETWEEN_TEXTS = "<|zero2chat: next text|>"      # joins the texts of a chunk; in no vocabulary
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<｜end▁of▁sentence｜>", "<|eos|>", "<eos>")
PADDING = ("<|pad|>", "<pad>", "<|padding|>", "<|finetune_right_pad_id|>", "<｜▁pad▁｜>", "[PAD]")


class Tokenizer:
    """Text to ids and back. Made by `Tokenizer.train` or `Tokenizer.load`.

    vocab_size: the highest id + 1. eot_id, pad_id: see below. specials: their text to their id. token_bytes: int32,
    (vocab_size,), the length of each id in bytes of text, 0 for specials and unused ids. fingerprint: hex digest of
    everything that decides ids.
    """

    def __init__(self, files):
        """`files`: the contents, by name, of tokenizer.json and, if there are such, of the CONFIG_FILES."""
        self._files = {name: files[name] for name in ("tokenizer.json", *CONFIG_FILES) if name in files}
        self._config = parse_json(files, "tokenizer_config.json")
        self._spec = {"normalizer": None, "pre_tokenizer": None, **parse_json(files, "tokenizer.json")}
        refuse_other_kinds(self._spec)

        # A control token is a special whether or not its file calls it one (Qwen's <think> says it is not). What else
        # was added, such as the runs of spaces of Phi-2 and GPT-NeoX, is vocabulary: found in text, as upstream does.
        upstream = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        added = upstream.get_added_tokens_decoder().items()     # by id; it numbers them itself, whatever the file says
        self.specials = {token.content: id for id, token in added
                         if token.special or (token.content.startswith("<") and token.content.endswith(">"))}
        self._added_words = {token.content: id for id, token in added if token.content not in self.specials}
        self._pieces = pieces_by_id(self._spec["model"])
        self._pieces.update({id: token.content.encode() for id, token in added})
        self.vocab_size = max(self._pieces) + 1
        self._dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        self.token_bytes[list(self._pieces)] = [len(piece) for piece in self._pieces.values()]
        self.token_bytes[list(self.specials.values())] = 0

        self.kind = "unigram" if self._spec["model"].get("type") == "Unigram" else "bpe"
        if self.kind == "unigram":
            if self._added_words:
                raise ValueError(f"it is a Unigram with added words, such as {next(iter(self._added_words))!r}")
            self._split, self._tiktoken = SPLIT, None
        else:
            self._split = split_pattern(self._spec["pre_tokenizer"])
            self._tiktoken, self._id_of_rank = self._tiktoken_encoding(upstream.model)

    @classmethod
    def train(cls, texts, vocab_size, kind="bpe"):
        """A Tokenizer of at most `vocab_size` ids: bytes 0..255 as themselves, merges in order, the SPECIALS last; of
        kind "unigram" pieces in place of merges, the likeliest first.

        The smallest vocab_size means plain bytes. It comes out smaller than asked for if no pair of pieces is left
        that occurs twice. The same texts give the same tokenizer. Raises ValueError if vocab_size is too small.
        """
        if kind not in KINDS:
            raise ValueError(f"the kind of a tokenizer must be {' or '.join(KINDS)}, got {kind!r}")
        if isinstance(texts, str):
            raise ValueError("train takes several texts, got one string, whose characters would be the texts")
        if vocab_size < 256 + len(SPECIALS):
            raise ValueError(f"vocab_size={vocab_size} is too small: the 256 bytes and {len(SPECIALS)} special tokens "
                             f"alone take {256 + len(SPECIALS)}")
        parts = ([_well_formed(part) for part in _cut(text)] for text in texts)
        if kind == "unigram":
            return cls({"tokenizer.json": unigram.train(itertools.chain.from_iterable(parts), vocab_size, SPECIALS)})
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"), byte_level])
        # The specials stay out of the training, or a merge that happened to spell one would be given its id. Long texts
        # are cut, because `tokenizers` needs about 90 bytes of memory for each byte of the text it is splitting.
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIALS), min_frequency=2, show_progress=False,
                                      initial_alphabet=byte_level.alphabet())
        bpe.train_from_iterator(parts, trainer)

        trained = json.loads(bpe.to_str())
        merges = trained["model"]["merges"]
        vocab = {text: id for id, text in enumerate([*BYTE_CHARS, *("".join(pair) for pair in merges)])}
        specials = {text: len(vocab) + i for i, text in enumerate(SPECIALS)}
        return cls({"tokenizer.json": tokenizer_json(vocab, merges, specials, trained["pre_tokenizer"])})

    @classmethod
    def load(cls, path):
        """The Tokenizer stored at `path`: a tokenizer.json, or a directory with one, or with GPT-2's two files.

        Raises ValueError, in one sentence, for a missing or broken file and for anything but byte-level BPE.
        """
        path = Path(path)
        sources = [["tokenizer.json"], ["encoder.json", "vocab.bpe"], ["vocab.json", "merges.txt"]]
        folder, sources = (path, sources) if path.is_dir() else (path.parent, [[path.name]])
        found = next((names for names in sources if all((folder / name).is_file() for name in names)), None)
        if found is None:
            raise ValueError(f"{path} holds no tokenizer: looked for {' or '.join(map(' with '.join, sources))}")
        files = {name: (folder / name).read_bytes() for name in [*found, *CONFIG_FILES] if (folder / name).is_file()}
        try:
            return cls({**files, "tokenizer.json": files[found[0]] if len(found) == 1 else gpt2_json(files, *found)})
        except Exception as error:      # `tokenizers` raises nothing more precise
            reason = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} cannot be used: {reason}") from error

    def save(self, directory):
        """Writes tokenizer.json and tokenizer_config.json, its chat template in it; what was loaded, byte for byte."""
        mask = {"mask_token": MASK} if MASK in self.specials else {}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **mask,
                  "eos_token": self._special_text(END_OF_TEXT, "eos_token"),
                  "pad_token": self._special_text(PADDING, "pad_token"), "chat_template": self.chat_template}
        files = {"tokenizer_config.json": json.dumps(config, indent=2).encode(), **self._files}
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            temporary = Path(directory, name + ".tmp")
            with open(temporary, "wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, Path(directory, name))    # readers see the old file or the new one, never half

    def with_mask(self):
        """This tokenizer with one special more, <|mask|>, whose id is the next one; itself if it has it already."""
        if MASK in self.specials:
            return self
        spec = parse_json(self._files, "tokenizer.json")
        spec["added_tokens"] = [*(spec.get("added_tokens") or []), added_token(self.vocab_size, MASK)]
        files = {**self._files, "tokenizer.json": json.dumps(spec, ensure_ascii=False).encode()}
        if self._config:
            files["tokenizer_config.json"] = json.dumps({**self._config, "mask_token": MASK}, indent=2).encode()
        return Tokenizer(files)

    # --- text to ids ---

    def encode(self, text):
        """The ids of a text, as a list. Specials in the text stay text; lone surrogates become U+FFFD."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts, threads=None):
        """The ids of each text, as arrays of uint16 if every id fits, else uint32; on all cores unless told.

        Short texts are joined and, in our own tokenizers, long ones cut where that cannot change an id: handing texts
        over one by one, the threads would wait for each other, and one long text would keep only one of them busy.
        """
        cuttable = self._split == SPLIT and (self._tiktoken or self.kind == "unigram")
        cuts = [_cut(text) if cuttable else [text] for text in texts]
        chunks, characters = [[]], 0
        for part in itertools.chain.from_iterable(cuts):
            if characters >= CHUNK:
                chunks.append([])
                characters = 0
            chunks[-1].append(part)
            characters += len(part)
        if threads is None:
            threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        with ThreadPoolExecutor(threads) as pool:
            run = map if threads == 1 or len(chunks) == 1 else pool.map
            parts = itertools.chain.from_iterable(run(self._encode_chunk, chunks))
            return [next(parts) if len(cut) == 1 else np.concatenate([next(parts) for _ in cut]) for cut in cuts]

    def _encode_chunk(self, texts):
        """The ids of each text, by one call of tiktoken's if possible."""
        if self._tiktoken is None:
            return self._encode_with_tokenizers(texts)
        if self._spec["normalizer"] == NFC:     # it leaves ASCII alone; Python's own NFC has another Unicode version
            texts = [text if text.isascii() else normalizers.NFC().normalize_str(_well_formed(text)) for text in texts]
        joined = BETWEEN_TEXTS.join(texts)
        if joined.count(BETWEEN_TEXTS) >= len(texts):
            return self._encode_with_tokenizers(texts)      # a text spells the separator
        try:
            ranks = self._tiktoken.encode_to_numpy(joined, allowed_special={BETWEEN_TEXTS}, disallowed_special=())
        except ValueError:      # a lone surrogate; in foreign patterns also the regex engine's limit, about a million
            return self._encode_with_tokenizers(texts)      # white-space characters in a row
        ids = self._id_of_rank[ranks]
        ends = np.flatnonzero(ranks == len(self._id_of_rank) - 1).tolist()
        return [ids[start:end] for start, end in zip([0, *(end + 1 for end in ends)], [*ends, len(ids)])]

    def _encode_with_tokenizers(self, texts):
        encodings = self._tokenizers.encode_batch_fast([_well_formed(text) for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, self._dtype) for encoding in encodings]

    @cached_property
    def _tokenizers(self):
        """The same tokenizer in `tokenizers`, without the specials, so that it cannot find them in text."""
        model = self._spec["model"]
        if self.kind == "unigram":      # its specials are not in the model's vocabulary
            return tokenizers.Tokenizer.from_str(json.dumps({**self._spec, "added_tokens": [], "post_processor": None}))
        pieces = {*BYTE_CHARS, *map("".join, merge_pairs(model)), model.get("unk_token")}
        vocab = {text: id for text, id in model["vocab"].items() if text in pieces or text not in self.specials}
        added = [token for token in self._spec.get("added_tokens") or [] if token["content"] in self._added_words]
        return tokenizers.Tokenizer.from_str(json.dumps({
            **self._spec, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None,
            "model": {**model, "vocab": {**vocab, **self._added_words}}}))      # in the vocabulary they keep their ids

    def _tiktoken_encoding(self, bpe):
        """tiktoken's Encoding and an array of the id of each of its ranks; (None, None) if ids could differ.

        `tokenizers` merges the pairs of a list, earliest first; tiktoken any pair whose joined bytes have a rank,
        lowest first. Take a piece T of the vocabulary. As long as no merge crosses the ends of an occurrence of T, what
        happens inside it is what happens to T on its own. On its own T is at most once in two parts, so whenever
        tiktoken can join two parts into T, they are that pair; and if `tokenizers`, given T on its own, ends with T,
        that pair is in its list. So if this holds for every T with a rank, and ranks are in the order of the list, both
        libraries see the same candidates in the same order at every step, and take the leftmost of equals. Pieces for
        which it does not hold cannot come out of the list and get no rank.
        With `ignore_merges` (Llama 3) a whole piece is looked up first, which tiktoken always does: then pieces that
        cannot be merged have a rank too, and must not be two parts on their own, or tiktoken would join them.
        """
        model, vocab = self._spec["model"], self._spec["model"]["vocab"]
        in_order = [text for text, _ in itertools.groupby(map("".join, merge_pairs(model)))]   # Llama 3: all splits
        in_utf8 = [char for byte, char in enumerate(BYTE_CHARS) if byte not in (0xC0, 0xC1, *range(0xF5, 0x100))]
        if (self._split not in TIKTOKEN_SPLITS or self._added_words or self._spec["normalizer"] not in (None, NFC)
                or len({*in_order}) < len(in_order) or not vocab.keys() >= {*in_utf8}):
            return None, None
        whole_only = [text for text in vocab if text not in self.specials] if model.get("ignore_merges") else []
        bpe.ignore_merges, texts = False, []
        for text in dict.fromkeys([*(char for char in BYTE_CHARS if char in vocab), *in_order, *whole_only]):
            parts = bpe.tokenize(text) if BYTE_OF_CHAR.keys() >= {*text} else []
            if [part.value for part in parts] == [text] or (whole_only and len(parts) > 2):
                texts.append(text)
            elif whole_only and len(parts) == 2:
                return None, None
        ranks = {piece_bytes(text): rank for rank, text in enumerate(texts)}
        encoding = tiktoken.Encoding("zero2chat", pat_str=self._split, mergeable_ranks=ranks,
                                     special_tokens={BETWEEN_TEXTS: len(ranks)})
        return encoding, np.array([*(vocab[text] for text in texts), 0], self._dtype)

    # --- chats to ids ---

    def encode_chat(self, messages, open_answer=False):
        """(ids, mask) of [{"role": ..., "content": ...}, ...] in ChatML, the format of `chat_text`.

        mask is 1 on what the assistant wrote and its <|im_end|>: what is trained on. With open_answer the ids end where
        an answer begins. <think> </think> <answer> </answer> of the assistant become specials; all else stays text.
        What the assistant wrote is encoded on its own, so that no piece spans what is given and what is generated.
        """
        marks = [mark for mark in MARKS if mark in self.specials]
        ids, mask = [], []

        def add(new, trained=0):
            ids.extend(new)
            mask.extend([trained] * len(new))

        for role, content in self._checked(messages):
            given, trained = (f"{role}\n", 1) if role == "assistant" else (f"{role}\n{content}", 0)
            add([self.specials["<|im_start|>"], *self.encode(given)])
            for part in re.split(f"({'|'.join(marks) or '(?!)'})", content) if trained else ():
                add([self.specials[part]] if part in marks else self.encode(part), trained)
            add([self.chat_end_id], trained)
            add(self.encode("\n"))
        if open_answer:
            add([self.specials["<|im_start|>"], *self.encode("assistant\n")])
        return ids, mask

    def chat_text(self, messages, open_answer=False):
        """The text of messages, as transformers' apply_chat_template gives it: ChatML."""
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in self._checked(messages))
        return text + "<|im_start|>assistant\n" * open_answer

    def _checked(self, messages):
        """[(role, content), ...]; ValueError if that is not what the messages are, or the tokenizer has no ChatML."""
        if self.chat_end_id is None:
            raise ValueError(f"the tokenizer has no chat template: its specials {sorted(self.specials)} lack "
                             "<|im_start|> or <|im_end|>")
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError(f"a chat is a list of at least one message, got {messages!r}")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                raise ValueError(f"a message is a role and its content, a text, got {message!r}")
            if message.get("role") not in ROLES:
                raise ValueError(f"a role is one of {', '.join(ROLES)}, got {message.get('role')!r}")
        return [(message["role"], message["content"]) for message in messages]

    # --- ids to text ---

    def decode(self, ids):
        """The text of the ids, specials as they are spelled; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids):
        """The bytes of the ids. An id without a piece (models pad their vocabulary) becomes U+FFFD."""
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and ids.min() < 0:
            raise ValueError(f"{ids.min()} is not a token id")
        return b"".join([self._pieces.get(id, b"\xef\xbf\xbd") for id in ids.tolist()])

    def stream(self):
        """A StreamDecoder: text from ids that come one at a time."""
        return StreamDecoder(self)

    # --- what is in it ---

    @property
    def eot_id(self):
        """The id that ends a text: that of <|endoftext|>, or its like in a foreign tokenizer. ValueError if none."""
        text = self._special_text(END_OF_TEXT, "eos_token")
        if text is None:
            raise ValueError(f"the tokenizer has no end-of-text token: its specials are {sorted(self.specials)}")
        return self.specials[text]

    @property
    def pad_id(self):
        """The id of the padding token; None if there is none."""
        return self.specials.get(self._special_text(PADDING, "pad_token"))

    @cached_property
    def prefix_ids(self):
        """What the file says to put before every text, as Llama 3's does with <|begin_of_text|>; ours says nothing."""
        return tokenizers.Tokenizer.from_str(self._files["tokenizer.json"].decode()).encode("").ids

    @property
    def start_id(self):
        """The id that a text begins with: the file's own, else the end of the text before, as in our documents."""
        return (self.prefix_ids or [self.eot_id])[0]

    @property
    def chat_end_id(self):
        """The id of <|im_end|>, which ends a message of a chat; None if the tokenizer has no such chats."""
        return self.specials.get("<|im_end|>") if "<|im_start|>" in self.specials else None

    @property
    def chat_template(self):
        """How messages become text, in Jinja: the file's own, else CHAT_TEMPLATE; None if it has no specials for it."""
        own = self._files.get("chat_template.jinja", b"").decode() or self._config.get("chat_template")
        return own or (CHAT_TEMPLATE if self.chat_end_id is not None else None)

    def _special_text(self, usual, config_key):
        named = self._config.get(config_key)
        named = named["content"] if isinstance(named, dict) else named
        return next((text for text in (*usual, named) if text in self.specials), None)

    @cached_property
    def fingerprint(self):
        rules = [self._split or self._spec["pre_tokenizer"], self._spec["normalizer"], self.specials, self._added_words,
                 bool(self._spec["model"].get("ignore_merges"))]
        model = self._spec["model"]
        learned = model["vocab"] if self.kind == "unigram" else merge_pairs(model)
        decides = (sorted(self._pieces.items()), learned, json.dumps(rules, sort_keys=True))
        return hashlib.sha256(ascii(decides).encode()).hexdigest()[:16]


class StreamDecoder:
    """Text from ids that come one at a time, held back until a character is complete.

    What push and flush return adds up to `decode` of all ids.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id):
        """The characters that `id` completes; '' while one is still half."""
        return self._utf8.decode(self._tokenizer.decode_bytes([id]))

    def flush(self):
        """U+FFFD for a character that stayed half, or ''; the decoder is then as new."""
        return self._utf8.decode(b"", final=True)


def _cut(text):
    """The text in parts of about CHUNK characters that, split by SPLIT, give the pieces of the whole.

    Cut only between a line end and a character that is not white space. No piece spans the two; SPLIT never looks back;
    and it looks ahead only from the end of \\s{1,32}, which it tries only if no line end is within reach.
    """
    parts, start = [], 0
    while len(text) - start > CHUNK and (line_end := re.compile(r"\n(?=\S)").search(text, start + CHUNK)):
        parts.append(text[start:line_end.end()])
        start = line_end.end()
    return [*parts, text[start:]]


def _well_formed(text):
    """The text with surrogate pairs joined and lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
