"""Training a Unigram vocabulary: pieces with probabilities, of which the likeliest sequence is a text's (Kudo 2018,
arXiv:1804.10959). `tokenizers` learns the pieces by expectation maximisation, and finds the sequences.

SentencePiece's kind (Kudo & Richardson 2018, arXiv:1808.06226): pieces are of characters, and a character without one
becomes its UTF-8 bytes, <0x00> to <0xFF>. Two things differ, so that every text comes back exactly. Nothing is
normalised, and a space stays a space, where SentencePiece writes U+2581 and then cannot tell it from one in the text.
And text is first split as BPE's is, so that no piece reaches over words or digits, and none can be read as `<0x41>`.
"""
import bisect
import itertools
import json
import re
from collections import Counter

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from vocabulary import BYTE_PIECES, SPLIT, UNIGRAM_SPLIT, added_token

COVERAGE = 0.9995           # share of the training text whose characters have pieces of their own: SentencePiece's
LONGEST = 33                # characters of a piece: the longest word or run of spaces that SPLIT leaves whole
ROUNDS = 4                  # of expectation maximisation between two prunings: with SentencePiece's 2 text of the
#                             standard library takes 7 to 9 % more pieces
DIGITS = 3                  # decimals of a score, in nats: `tokenizers` adds in another order each time


def train(texts, vocab_size, specials):
    """The contents of a tokenizer.json of at most `vocab_size` ids: the 256 bytes, pieces from the likeliest to the
    rarest, `specials`. texts: an iterable of str without lone surrogates.

    At most half of the pieces go to single characters, the most frequent; rarer ones are left to the bytes.
    """
    texts = list(texts)
    room = vocab_size - 256 - len(specials)
    characters = Counter()
    for text in texts:
        characters.update(text)
    ordered = sorted(characters.items(), key=lambda item: (-item[1], item[0]))
    before = [0, *itertools.accumulate(count for _, count in ordered)]
    kept = min(room // 2, bisect.bisect_left(before, COVERAGE * before[-1]))
    vocabulary = [[piece, 0.0] for piece in BYTE_PIECES]
    if kept:
        vocabulary += learn(texts, [char for char, _ in ordered[kept:]], room)

    spec = {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [added_token(256 + i, text) for i, text in enumerate(specials, len(vocabulary) - 256)],
            "normalizer": None, "pre_tokenizer": UNIGRAM_SPLIT, "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            # a character of no piece has the byte pieces; the unknown token that `tokenizers` wants never comes out
            "model": {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": True}}
    return json.dumps(spec, ensure_ascii=False).encode()


def learn(texts, rare, room):
    """[[piece, log-probability], ...] of at most `room` pieces, none of which holds a character of `rare`."""
    between = re.compile(f"[{''.join(map(re.escape, sorted(rare)))}]+" if rare else "(?!)")
    model = tokenizers.Tokenizer(models.Unigram())
    model.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    trainer = trainers.UnigramTrainer(vocab_size=room + 1, show_progress=False, unk_token="<unk>",
                                      special_tokens=["<unk>"], max_piece_length=LONGEST, n_sub_iterations=ROUNDS)
    model.train_from_iterator((between.split(text) for text in texts), trainer)
    pieces = json.loads(model.to_str())["model"]["vocab"]
    pieces = [(piece, score) for piece, score in pieces if piece != "<unk>"]
    # characters that training drops come back at its end with scores in chance's order: all get the least score
    least = min((score for piece, score in pieces if len(piece) > 1), default=0.0)
    pieces = [[piece, round(max(score, least), DIGITS)] for piece, score in pieces]
    return sorted(pieces, key=lambda pair: (-pair[1], pair[0]))[:room]
