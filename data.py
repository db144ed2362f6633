"""Text to tokens on disk (texts.py); with kind=chats, chats (chats.py); with kind=pairs, pairs of answers (pairs.py).

    python data.py --sources=stdlib --vocab_size=4096 --out_dir=data/text
    python data.py --kind=chats --sources=alpaca.jsonl --tokenizer=out/pretrain --out_dir=data/chats --show=3
    python data.py --kind=pairs --sources=ultrafeedback.jsonl --out_dir=data/pairs --show=3
    python data.py --sources="books/*.jsonl.gz=0.7,stdlib=0.3" --tokenizer=data/text --out_dir=data/mixed

A document is a text file (.txt .md .py), a row (.jsonl .json .parquet, a hub dataset) or a module of the standard
library; all but .parquet may end in .gz. A .txt file may hold several, between lines <|endoftext|>. Sources with
weights are mixed by bytes until the first runs out; without, all is taken. Damaged files, rows without text and
invalid UTF-8 are errors; empty documents are skipped and counted.

Sources of chats are rows, and task:NAME or task:gsm8k:FOLDER; dolly:FILE names the format of rows. Pairs are rows, or
sampled from a model. The three files say what theirs hold on disk.
"""
import chats
import pairs
import texts
from configurator import configure, read_options

# --- run ---
out_dir = "data/text"         # folder to write: train.h5, val.h5 and the tokenizer
overwrite = False             # replace the data that out_dir holds; without it that is an error
kind = "text"                 # what the rows are: text, chats or pairs
sources = "stdlib"            # stdlib, files, folders, globs, hub:ID:CONFIG:SPLIT; commas between; NAME=WEIGHT mixes
val_fraction = 0.05           # share of documents, chats or pairs held out by hash; less for gigabytes
invalid_utf8 = "error"        # error stops at a byte that is not UTF-8; replace puts U+FFFD there and counts
# --- text and chats only ---
tokenizer = ""                # folder or tokenizer.json to use; "" trains one on the text's training side
# --- text only ---
val_sources = ""              # held-out sources, kept out of the training side; then nothing is held out by hash
max_bytes = 0                 # stop after so many bytes of text; 0 takes everything
text_column = "text"          # column of rows that holds the text; of several (text,content) the first that a row has
tokenizer_kind = "bpe"        # of a tokenizer trained here: bpe (byte-level) or unigram (SentencePiece's kind)
vocab_size = 4096             # pieces of a tokenizer trained here; more makes text shorter and the model larger
tokenizer_bytes = 20_000_000  # bytes of text that it is trained on; more takes longer and changes little
# --- chats and pairs only ---
max_examples = 0              # stop after so many rows; 0 takes everything
unusable = "drop"             # rows with an empty reply or none: drop counts them, error stops
malformed = "error"           # rows without the columns, types and roles of their format: drop counts them, error stops
seed = 1337                   # of the tasks' questions and of what is sampled
show = 0                      # print so many; of chats what is trained in colour ([[ ]] where there is no terminal)
# --- chats only ---
context = 1024                # tokens of the longest chat that is kept; none is ever cut
task_examples = 10_000        # questions of each task that makes them up, if it has no weight
flawed = 0.0                  # share of worked answers that show their task's mistake; of questions that are made up
too_long = "drop"             # chats longer than context: drop counts them, error stops
# --- pairs only ---
min_margin = 0.0              # least difference of scores, where a row has them; 0 drops contradictions
min_agreement = 0.0           # least share of annotators who agreed, where a row has it
max_length_ratio = 0.0        # drop pairs one of whose texts is over so many times as long as the other; 0 keeps all
duplicates = "drop"           # the same answers to one prompt, whichever was chosen: drop all but the first, or keep
unpair = False                # make two thumbs of a pair: its chosen up, its rejected down
keep = "one"                  # of scored answers: one (best, worst), each (at most once) or all (every two that differ)
# --- pairs from a model only ---
from_model = ""               # model directory to sample answers from, in place of sources
task = ""                     # tasks whose questions it answers, as in sorting=0.5,addition=0.5 or gsm8k:FOLDER
questions = 1000              # how many, in all; val_fraction of them from the tasks' dev split
samples = 8                   # answers to each
rank_by = "verifier"          # verifier, reward_model:DIR, or the address of a judge, such as http://localhost:8000/v1
judge_model = ""              # name of the model at that address
judge_key_env = ""            # environment variable that holds its key; empty: none is sent
temperature = 1.0             # of sampling; above 0
top_p = 1.0                   # sample from the likeliest tokens that hold this share
max_new_tokens = 0            # tokens of an answer at most; 0: the task's own
device = "auto"               # auto, cuda, mps or cpu; of the models
dtype = "auto"                # auto (bf16 where the hardware is fast at it), bf16, fp32


def main(config):
    kind = config["kind"]
    if kind not in ("text", "chats", "pairs"):
        raise ValueError(f"kind is {kind!r}; it must be text, chats or pairs")
    mine = {}
    for name, (default, _, section) in read_options(__file__).items():
        if section == "run" or kind in section.split() and ("model" not in section or config["from_model"]):
            mine[name] = config[name]
        elif config[name] != default:
            raise ValueError(f"{name} is an option of {section}, and kind is {kind}"
                             + " from --sources" * (kind in section.split()))
    del mine["kind"]
    if kind == "text":
        texts.prepare(**mine)
    elif kind == "chats":
        chats.prepare(**mine)
    else:
        pairs.prepare(**mine)


if __name__ == "__main__":
    main(configure(globals()))
