"""Rows of published preference data to pairs and thumbs, a small function for each format, and their sources.

    from_pair({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"})
    # [{"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "Hello."}], ...}]

    pair     chosen and rejected: texts, or lists of messages with or without the prompt before them; the prompt in
             prompt, question, instruction or conversations, or none where both repeat it. Transcripts
             "\n\nHuman: ...\n\nAssistant: ..." (Bai et al. 2022, arXiv:2204.05862) become turns
    thumb    label true or false, with prompt and completion, or with messages
    ranked   instruction and completions with overall_score (UltraFeedback, Cui et al. 2023, arXiv:2310.01377)

A format is recognised by the columns of a source's first row. Scores and margins are kept where a row or its metadata
has them. A converter raises formats.Unusable, with the reason that is counted, for a row that is in order but teaches
nothing, and ValueError for one that is malformed.
"""
import itertools
import re
import sys

from formats import Unusable, all_rows, prompt_key, rows_source, text_of, turns

SPEAKERS = {"Human": "user", "Assistant": "assistant"}
SPOKEN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
STRAY = re.compile(r"\b(?:Human|Assistant):")       # a speaker's mark that is none: a model that ran on, mostly
PROMPTS = ("prompt", "question", "instruction", "conversations")
KEEP = ("one", "each", "all")


# --- rows to pairs and thumbs ---

def transcript(text):
    """The messages of "\\n\\nHuman: ...\\n\\nAssistant: ...", each text without the white space around it; two turns of
    one speaker become one. ValueError if it is no transcript."""
    before, *parts = SPOKEN.split(text)
    if before.strip() or not parts:
        raise ValueError(f"it has no prompt, and {text!r:.40} is no transcript that begins with Human:")
    messages = []
    for speaker, said in zip(parts[::2], parts[1::2]):
        role, said = SPEAKERS[speaker], said.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{said}".strip()
        else:
            messages.append({"role": role, "content": said})
    if any(STRAY.search(message["content"]) for message in messages):
        raise Unusable("a speaker's mark inside a turn")
    return messages


def messages_of(value, role):
    """The messages of a text, which `role` said, of one message, or of a list of them."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return turns([value] if isinstance(value, dict) else value)


def conversation(row, name):
    """The whole conversation that ends with the answer in the column `name`."""
    if name not in row:
        raise ValueError(f"it has no {name}, but {', '.join(map(str, row)) or 'no columns'}")
    prompt = next((row[column] for column in PROMPTS if row.get(column) is not None), None)
    answer = "" if row[name] is None else row[name]
    if isinstance(answer, str) and prompt is None:
        return transcript(answer)
    if isinstance(answer, str) and isinstance(prompt, str) and re.match(r"\s*Human:", prompt) and re.search(
            r"\n\nAssistant:\s*\Z", prompt):
        return transcript(prompt + answer)
    answer = messages_of(answer, "assistant")
    if prompt is None:
        return answer
    before = messages_of(prompt, "user")
    if (system := text_of(row, "system", optional=True)) and [m["role"] for m in before[:1]] != ["system"]:
        before = [{"role": "system", "content": system}] + before
    repeats = answer[:len(before)] == before or isinstance(prompt, str) and answer and answer[0]["role"] != "assistant"
    return answer if repeats else before + answer


def last_reply(messages):
    """(prompt, reply) of a conversation, what follows the last reply left out. Unusable if one of them is missing."""
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not replies or not messages[replies[-1]]["content"].strip():
        raise Unusable("without an answer")
    prompt, reply = messages[:replies[-1]], messages[replies[-1]]
    if not prompt:
        raise Unusable("without a prompt")
    if not all(message["content"].strip() for message in prompt if message["role"] != "system"):
        raise Unusable("an empty turn in the prompt")
    if prompt[-1]["role"] == "assistant":
        raise Unusable("two replies in a row")
    return prompt, reply


def number(row, *names):
    """The number in the first of these columns that the row, or its metadata, has; None if there is none."""
    metadata = row.get("metadata")
    for place in (row, metadata if isinstance(metadata, dict) else {}):
        for name in names:
            if (value := place.get(name)) is not None:
                if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:      # nan, too
                    raise ValueError(f"its {name} is {value!r:.40}, not a number")
                return float(value)


def from_pair(row):
    kinds = [type(row.get(name)) for name in ("chosen", "rejected")]
    if None not in (row.get("chosen"), row.get("rejected")) and kinds[0] is not kinds[1]:
        raise ValueError(f"its chosen is a {kinds[0].__name__} and its rejected a {kinds[1].__name__}; both must have "
                         "the same shape")
    (prompt, chosen), (other, rejected) = (last_reply(conversation(row, name)) for name in ("chosen", "rejected"))
    if prompt != other:
        raise Unusable("answers that part before the last reply")
    scores = dict(score_chosen=number(row, "score_chosen", "chosen_score", "chosen_rating", "chosen-rating"),
                  score_rejected=number(row, "score_rejected", "rejected_score", "rejected_rating", "rejected-rating"))
    margin = number(row, "margin")
    if margin is None and None not in scores.values():
        margin = scores["score_chosen"] - scores["score_rejected"]
    extra = dict(margin=margin, **scores, agreement=number(row, "agreement", "annotator_agreement"))
    return [dict(prompt=prompt, chosen=[chosen], rejected=[rejected]) | present(extra)]


def from_thumb(row):
    label = row["label"]
    if label not in (True, False):
        raise ValueError(f"its label is {label!r:.40}, not true or false")
    prompt, reply = last_reply(turns(row["messages"]) if "messages" in row else conversation(row, "completion"))
    return [dict(prompt=prompt, completion=[reply], label=bool(label))
            | present(dict(agreement=number(row, "agreement", "annotator_agreement")))]


def from_ranked(row, keep="one"):
    answers = row["completions"]
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise ValueError(f"its completions are {answers!r:.40}, not a list of objects")
    prompt = messages_of(text_of(row, "instruction"), "user")
    scored = [(text_of(answer, "response"), number(answer, "overall_score")) for answer in answers]
    scored = [(text, score) for text, score in scored if text.strip() and score is not None]
    if not (chosen := choose(scored, keep, prompt_key(prompt))):
        raise Unusable("no two answers with different scores")
    return [scored_pair(last_reply(prompt + messages_of(better[0], "assistant"))[0], better, worse)
            for better, worse in chosen]


def present(columns):
    return {name: value for name, value in columns.items() if value is not None}


FORMATS = {"thumb": ((("completion", "label"), ("messages", "label")), from_thumb),
           "pair": ((("chosen", "rejected"),), from_pair),
           "ranked": ((("instruction", "completions"),), from_ranked)}


def recognise(row):
    """The name of the format that has the columns of `row`. ValueError if none has."""
    for name, (kinds, _) in FORMATS.items():
        if any(all(column in row for column in columns) for columns in kinds):
            return name
    raise ValueError(f"it is of no known format, having {', '.join(map(str, row)) or 'no columns'}; those known are "
                     + "; ".join(" or ".join(", ".join(columns) for columns in kinds) for kinds, _ in FORMATS.values()))


# --- answers with scores to pairs ---

def choose(scored, keep, key):
    """[(better, worse)] of [(text, score)] answers to one question, by the rule: "one" of the best against one of the
    worst, drawn by `key` where several are equal; "each" answer at most once, the best against the worst, the second
    best against the second worst, ...; "all" two with different scores. Where "one" draws, equal texts count each."""
    if keep == "one":
        best, worst = max((score for _, score in scored), default=0), min((score for _, score in scored), default=0)
        ends = [[answer for answer in scored if answer[1] == score] for score in (best, worst)]
        return [(ends[0][key % len(ends[0])], ends[1][key // 2 ** 32 % len(ends[1])])] if best > worst else []
    ordered = sorted(dict(scored).items(), key=lambda answer: -answer[1])
    two = zip(ordered[:len(ordered) // 2], reversed(ordered)) if keep == "each" else itertools.combinations(ordered, 2)
    return [(better, worse) for better, worse in two if better[1] > worse[1]]


def scored_pair(prompt, better, worse):
    chosen, rejected = ([{"role": "assistant", "content": text}] for text, _ in (better, worse))
    return dict(prompt=prompt, chosen=chosen, rejected=rejected, margin=better[1] - worse[1], score_chosen=better[1],
                score_rejected=worse[1])


# --- sources ---

class PairSource:
    """One entry of `sources`: rows of files or of a hub dataset."""

    def __init__(self, name, weight, invalid_utf8="error", unusable="drop", malformed="error", damaged="error",
                 keep="one"):
        if name == "stdlib" or name.startswith("task:"):
            raise ValueError(f"{name} holds no pairs; name files of rows with --sources, or sample answers to a task's "
                             "questions, as in --from_model=out/sft --task=sorting")
        self.name, self.weight, self.keep, self.format, self.damaged = name, weight, keep, None, damaged
        self.rules = {Unusable: unusable, ValueError: malformed}
        self.rows = rows_source(name, invalid_utf8)

    def pairs(self, notes):
        """Yields (row, key, side): side is None, as the key, the hash of the question, decides. Rows of no use are left
        out and counted in `notes` by reason."""
        for row, path, at in all_rows(self.rows, notes, self.damaged):
            try:
                if not isinstance(row, dict):
                    raise ValueError(f"it is {row!r:.40}, not an object with named columns")
                self.format = self.format or recognise(row)
                needed = FORMATS[self.format][0]
                if not any(all(column in row for column in columns) for columns in needed):
                    raise ValueError(f"it has the columns {', '.join(map(str, row)) or 'none'}, where the first row "
                                     f"had {' or '.join(', '.join(columns) for columns in needed)}")
                convert = FORMATS[self.format][1]
                found = convert(row, self.keep) if self.format == "ranked" else convert(row)
            except ValueError as error:
                kind = Unusable if isinstance(error, Unusable) else ValueError
                if self.rules[kind] == "error":
                    option = "unusable" if kind is Unusable else "malformed"
                    raise ValueError(f"row {at:,} of {path} cannot be used: {error}; --{option}=drop leaves such rows "
                                     "out") from None
                notes[str(error) if kind is Unusable else "malformed"] += 1
                continue
            for made in found:
                yield made, prompt_key(made["prompt"]), None
