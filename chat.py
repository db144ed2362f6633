"""Talk to any model directory in the terminal: answers stream, the conversation stays in the KV cache.

    python chat.py --model=out/pretrain                 a base model continues what is typed
    python chat.py --model=out/sft --show_speed=true    a chat model answers; /help lists the commands
    python chat.py --prompt="def add(" --temperature=0  one answer, alone on stdout; a piped text is a prompt as well

A chat model is one whose generation_config.json ends answers at the chat template's <|im_end|>: it was trained with it.
A conversation is kept as ids, an answer's as they were sampled, so that a new turn computes only its own tokens.
"""
import contextlib
import dataclasses
import json
import os
import signal
import sys
import textwrap
import time

import engine
from common import pick_device
from configurator import configure, convert, nearest, show
from decoder import common_prefix

try:
    import readline  # with it, input() edits lines
except ImportError:
    readline = None

# --- model ---
model = "out/pretrain"      # directory of ours, any local Llama or Qwen3 in Hugging Face's layout, or hub:ORG/NAME
mode = "auto"               # chat: use the chat template; base: continue text; auto: chat if the model was trained so
device = "auto"             # auto, cuda, mps or cpu
dtype = "auto"              # activations and products: auto (bf16 on cuda that has it, else fp32), bf16, fp32
# --- conversation ---
prompt = ""                 # answer this alone and leave; what is piped in comes after it, on a line of its own
system = ""                 # what a chat model is told before the conversation
# --- answers; /set changes these in a session ---
max_new_tokens = 512        # the longest answer, in tokens
temperature = 0.8           # 0: always the likeliest token; higher: more varied
top_k = 0                   # sample from this many of the likeliest tokens; 0: from all
top_p = 0.95                # sample from the likeliest tokens that have this probability together; 1: from all
min_p = 0.0                 # sample from tokens with at least this share of the likeliest one's probability; 0: all
repetition_penalty = 1.0    # above 1: tokens that were there before become less likely
seed = 1337                 # of the sampling; each answer of a session, and each /retry, has a seed of its own
show_speed = False          # say after an answer how fast it came

SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
SETTINGS = (*SAMPLING, "show_speed")
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# What a model writes must not steer the terminal: control characters are shown as pictures of themselves.
VISIBLE = {**{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
           **dict.fromkeys(range(127, 160), 0xFFFD)}


@dataclasses.dataclass
class Turn:
    text: str                   # what the user wrote
    given: list                 # its ids; in a chat with the template around them
    answer: list = dataclasses.field(default_factory=list)      # ids as sampled, without the one that ended them


class Conversation:
    """The turns with a model, and the cache of keys and values of what it has read and written.

    dropped: how many of the oldest turns no longer fit the context; of a text that is continued, how many tokens.
    """

    def __init__(self, model, tokenizer, chat, system=""):
        self.tokenizer, self.chat = tokenizer, chat
        self.cache, self.context = engine.Cache(model), model.config.context
        self.stop = set(model.config.stop_ids)
        self.close = [tokenizer.chat_end_id, *tokenizer.encode("\n")] if chat else []       # between two turns
        self.answers = 0                                # sampled so far: each has a seed of its own
        self.restart(system)

    def restart(self, system):
        """Forgets the turns and begins with a system message, or with none if it is empty."""
        self.system, self.turns, self.dropped = system, [], 0
        self.head = self.tokenizer.encode_chat(self.messages())[0] if system else []
        if len(self.head) > self.context // 2:
            raise ValueError(f"the system message has {len(self.head)} tokens, more than half of the model's context "
                             f"of {self.context}; shorten it")
        if not self.chat:
            with contextlib.suppress(ValueError):       # a foreign tokenizer may have nothing to begin with
                self.head = [self.tokenizer.start_id]

    def messages(self):
        """The conversation as chats are stored: [{"role": ..., "content": ...}, ...]."""
        pairs = [("system", self.system)] if self.system else []
        for turn in self.turns:
            pairs += [("user", turn.text), ("assistant", self.tokenizer.decode(turn.answer))]
        return [{"role": role, "content": content} for role, content in pairs]

    def ids(self, first=0):
        """The ids that the model continues: the head and the turns from `first` on."""
        ids = list(self.head)
        for turn in self.turns[first:]:
            ids += (self.close if len(ids) > len(self.head) else []) + turn.given + turn.answer
        return ids

    def add(self, text):
        """Appends a turn to be answered. ValueError, and no turn, if it is empty or can never fit the context."""
        if not text.strip() and (self.chat or not self.turns):
            raise ValueError("the prompt is empty")
        if self.chat:
            given = self.tokenizer.encode_chat([{"role": "user", "content": text}], open_answer=True)[0]
        else:
            given = self.tokenizer.encode(text)
        if len(self.head) + len(given) >= self.context:
            raise ValueError(f"the prompt has {len(self.head) + len(given)} tokens, with what must stand before it, "
                             f"and the model's context holds {self.context}; shorten it")
        self.turns.append(Turn(text, given))

    def window(self, max_new_tokens):
        """The ids to continue, cut so that an answer of max_new_tokens fits, or of a quarter of the context if that is
        less: a chat loses its oldest turns, a text its oldest tokens, neither its head or last prompt. Sets `dropped`.
        """
        most = self.context - min(max_new_tokens, self.context // 4)
        if self.chat:
            fitting = (first for first in range(len(self.turns)) if len(self.ids(first)) <= most)
            self.dropped = next(fitting, len(self.turns) - 1)
            return self.ids(self.dropped)
        ids, start = self.ids(), len(self.head)
        self.dropped = max(0, min(len(ids) - most, len(ids) - start - len(self.turns[-1].given)))
        return ids[:start] + ids[start + self.dropped:]

    def answer(self, ids, seed, **sampling):
        """Samples the last turn's answer, which follows `ids`: yields (token, finish) and keeps the tokens."""
        seed, self.answers = seed + self.answers, self.answers + 1
        for _, token, _, finish in engine.stream(None, [ids], seed=seed, stop=self.stop, cache=self.cache,
                                                 **sampling):
            if token not in self.stop:
                self.turns[-1].answer.append(token)
            yield token, finish


class CtrlC:
    """Within `with`, Ctrl-C sets `pressed` and breaks nothing off, so that the cache stays whole; twice leaves."""

    def __enter__(self):
        self.pressed, self.before = False, signal.signal(signal.SIGINT, self.on_signal)
        return self

    def on_signal(self, number, frame):
        if self.pressed:
            raise SystemExit(130)
        self.pressed = True

    def __exit__(self, *error):
        signal.signal(signal.SIGINT, self.before)


def note(text):
    """Says what is not the model's: on stderr, dimmed on a terminal."""
    print(f"{DIM}{text}{PLAIN}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def say(conversation, settings):
    """Streams the answer to the last turn to stdout. Returns whether Ctrl-C stopped it."""
    before, ids = conversation.dropped, conversation.window(settings["max_new_tokens"])
    if conversation.dropped > before:
        count = f"{conversation.dropped} {'turn' if conversation.chat else 'token'}{'s' * (conversation.dropped > 1)}"
        note(f"(the context of {conversation.context} tokens is full: dropped the oldest {count})")
    new = len(ids) - min(common_prefix(conversation.cache.ids, ids), len(ids) - 1)

    terminal, thinks, thought = sys.stdout.isatty(), *map(conversation.tokenizer.specials.get, ("<think>", "</think>"))
    decoder, finish, times = conversation.tokenizer.stream(), None, [time.perf_counter()]
    with CtrlC() as ctrl_c:
        try:
            for token, last in conversation.answer(ids, **{name: settings[name] for name in SAMPLING}):
                finish, text = last, "" if token in conversation.stop else decoder.push(token)
                times.append(time.perf_counter())
                if terminal:
                    text = DIM * (token == thinks) + text.translate(VISIBLE) + PLAIN * (token == thought)
                print(text, end="", flush=True)
                if ctrl_c.pressed:
                    break
        finally:
            print(decoder.flush() + PLAIN * terminal, flush=True)

    if ctrl_c.pressed:
        note("(stopped)")
    elif finish == "context" or finish == "length" and conversation.chat:
        why = {"context": f"the context of {conversation.context} tokens is full",
               "length": f"max_new_tokens = {settings['max_new_tokens']}"}
        note(f"(cut off: {why[finish]})")
    if settings["show_speed"] and len(times) > 1:
        rate = f", {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s" if len(times) > 2 else ""
        note(f"({len(times) - 1} tokens{rate}; {new} of {len(ids)} prompt tokens computed, the first token after "
             f"{times[1] - times[0]:.2f} s)")
    return ctrl_c.pressed


def check(settings):
    """`settings`; ValueError if one of them cannot be."""
    engine.check([], 1, max_batch=1, overflow="stop", **{name: settings[name] for name in SAMPLING if name != "seed"})
    return settings


class Session:
    """What a line typed does: each do_ method is a command, its docstring the help."""

    def __init__(self, conversation, settings):
        self.conversation, self.settings = conversation, settings
        self.commands = [name.removeprefix("do_") for name in dir(self) if name.startswith("do_")]

    def run(self, line):
        """Returns whether Ctrl-C stopped an answer. ValueError if something cannot be done."""
        if not line.startswith("/"):
            self.conversation.add(line)
            return say(self.conversation, self.settings)
        name, _, rest = ("quit" if line == "/exit" else line[1:]).partition(" ")
        if name not in self.commands:
            raise ValueError(f"there is no command /{name}{nearest(name, self.commands)}; /help lists them")
        return getattr(self, f"do_{name}")(rest.strip())

    def last_turn(self):
        if not self.conversation.turns:
            raise ValueError("nothing has been said yet")
        return self.conversation.turns[-1]

    def do_reset(self, rest):
        """forget the conversation; the system message stays"""
        self.conversation.restart(self.conversation.system)
        note("(a new conversation)")

    def do_undo(self, rest):
        """take back the last prompt and its answer"""
        note(f"(taken back: {textwrap.shorten(self.last_turn().text, 60) or 'going on'})")
        self.conversation.turns.pop()

    def do_retry(self, rest):
        """answer the last prompt again, with another seed"""
        self.last_turn().answer.clear()
        return say(self.conversation, self.settings)

    def do_system(self, rest):
        """TEXT: a new conversation with this system message; without TEXT, with none"""
        if not self.conversation.chat:
            raise ValueError("a base model has no system message")
        self.conversation.restart(rest)
        note(f"(a new conversation {'with this' if rest else 'without'} system message)")

    def do_save(self, rest):
        """FILE: append the conversation to FILE, as a line of JSON to train on"""
        self.last_turn()
        if not rest:
            raise ValueError("/save needs the name of a file, as in /save chats.jsonl")
        talk = self.conversation
        text = talk.tokenizer.decode(talk.ids()[len(talk.head):])
        try:
            with open(os.path.expanduser(rest), "a", encoding="utf-8") as f:
                f.write(json.dumps({"messages": talk.messages()} if talk.chat else {"text": text}, ensure_ascii=False))
                f.write("\n")
        except OSError as error:
            raise ValueError(f"could not write {rest} ({error.strerror})") from None
        note(f"(appended to {rest})")

    def do_set(self, rest):
        """NAME VALUE: change a setting, such as temperature 0.5; alone: show them all"""
        name, _, value = rest.replace("=", " ").partition(" ")
        if name in SETTINGS and not value.strip():
            raise ValueError(f"/set {name} needs a value, as in /set {name} {show(self.settings[name])}")
        if name not in ("", *SETTINGS):
            raise ValueError(f"there is no setting {name}{nearest(name, SETTINGS)}; /set lists them")
        if name:
            self.settings = check({**self.settings, name: convert(name, value.strip(), self.settings[name])})
            self.conversation.answers *= name != "seed"             # a new seed counts from the beginning
        for each in [name] if name else SETTINGS:
            note(f"{each} = {show(self.settings[each])}")

    def do_quit(self, rest):
        """leave"""
        raise EOFError

    def do_help(self, rest):
        """this list"""
        for name in self.commands:
            note(f"/{name:<7} {getattr(self, f'do_{name}').__doc__}")
        note("Ctrl-C stops an answer; twice leaves, as does Ctrl-D. A line that ends in \\ goes on in the next one.\n"
             "A line that begins with a space is no command. Enter alone lets a base model go on.")


def talk(session):
    """Reads lines and does what they say, until Ctrl-D or Ctrl-C twice; keeps the lines in a file, if that can be."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    history = os.path.join(state, "zero2chat", "history")
    if readline:
        readline.set_history_length(1000)
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(history), exist_ok=True)
            readline.read_history_file(history)
    interrupted = False                                 # Ctrl-C was the last thing that happened
    while True:
        try:
            line = input("> ")
            while line.endswith("\\"):
                line = line[:-1] + "\n" + input("... ")
            if readline:
                with contextlib.suppress(OSError):
                    readline.write_history_file(history)
            interrupted = False
            interrupted = session.run(line)
        except ValueError as error:
            note(error)
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print()
            if interrupted and not (readline and readline.get_line_buffer()):
                raise SystemExit(130) from None
            interrupted = True
            note("(Ctrl-C again leaves)")


def main(config):
    settings = check({name: config[name] for name in SETTINGS})
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)   # `| head` ends us quietly

    # one prompt, or a session
    texts = [prompt] if prompt or any(argument.startswith("--prompt=") for argument in sys.argv) else []
    texts += [] if sys.stdin.isatty() else [sys.stdin.read().removesuffix("\n")]
    if texts and not "".join(texts).strip():
        raise SystemExit("chat.py: the prompt is empty")

    # model
    where = pick_device(device)
    precision = "fp32" if dtype == "auto" and where.type == "cpu" else dtype
    gpt, tokenizer, chat, trained = engine.load(model, mode, device, precision)
    if system and not chat:
        raise SystemExit(f"chat.py: --system is for chats, but {model} is a base model; --mode=chat uses it as one")
    kind = "a base model: it continues text" if not chat else "a chat model" if trained else "not trained to chat"
    note(f"{model}: {gpt.config.n_params() / 1e6:.1f}M parameters, {kind}; context {gpt.config.context}, {where}, "
         f"{str(gpt.model.dtype).removeprefix('torch.')}{'' if texts else '; /help lists the commands'}")

    conversation = Conversation(gpt, tokenizer, chat, system)
    del gpt                                             # its cache has a copy of the weights
    if texts:
        conversation.add("\n".join(text for text in texts if text))
        raise SystemExit(130 if say(conversation, settings) else 0)
    talk(Session(conversation, settings))


if __name__ == "__main__":
    main(configure(globals()))
