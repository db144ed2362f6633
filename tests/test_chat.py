"""chat.py in a pseudo-terminal: what a person types, sees and saves; one-shot use; every bad input is one sentence.

The models say what the tests need: their blocks add nothing, so that the head alone decides which byte follows which.
"""
import fcntl
import io
import json
import os
import pty
import re
import runpy
import select
import shutil
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch

import chat
import decoder
import engine
from configurator import read_options
from model import GPT, Config
from tokenizer import Tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SECONDS = 30
ANSWER = "é👍日!"             # no byte twice: each byte has one successor


def script(tok, text):
    """The ids of a text of specials and bytes."""
    parts = re.split("(" + "|".join(map(re.escape, tok.specials)) + ")", text)
    return [id for part in parts for id in ([tok.specials[part]] if part in tok.specials else part.encode())]


def write_model(folder, tok, *texts, chat=True, context=4096):
    """A model directory: after a token of one of the texts comes the next one of it; after others, anything."""
    config = Config(384, 1, 2, n_embd=384, n_hidden=64, context=context, eos_id=tok.eot_id, pad_id=tok.pad_id,
                    end_ids=(tok.chat_end_id,) if chat else ())
    gpt = GPT(config)
    gpt.model.embed_tokens.weight.data = torch.eye(384)
    gpt.lm_head.weight.data.zero_()
    for text in texts:
        ids = script(tok, text)
        gpt.lm_head.weight.data[ids[1:], ids[:-1]] = 10.0       # logits of 10 * 384 ** 0.5
    gpt.save(folder)
    tok.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(["abc"], 264)        # plain bytes


@pytest.fixture(scope="module")
def models(tok, tmp_path_factory):
    """Directories by name. The template's answers begin after a line end."""
    out = tmp_path_factory.mktemp("models")
    return {"chat": write_model(out / "chat", tok, f"\n<think>hm</think>{ANSWER}<|im_end|>"),
            "small": write_model(out / "small", tok, f"\n{ANSWER}<|im_end|>", context=140),
            "base": write_model(out / "base", tok, f"a{ANSWER}<|endoftext|>", "xyx", chat=False),
            "endless": write_model(out / "endless", tok, "\nxyzx", context=200_000),
            "any": write_model(out / "any", tok)}


def environment(folder):
    return {**os.environ, "XDG_STATE_HOME": str(folder), "LC_ALL": "C.UTF-8", "TERM": "xterm", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(monkeypatch, capsys):
    """A function (flags, stdin) -> (status, stdout, stderr) of the script without a terminal, in this process."""
    def run(*flags, stdin=""):
        monkeypatch.setattr(sys, "argv", ["chat.py", "--device=cpu", *flags])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        status = 0
        try:
            runpy.run_path(os.path.join(ROOT, "chat.py"), run_name="__main__")
        except SystemExit as leaving:           # as Python itself does: a text is printed
            status = leaving.code if isinstance(leaving.code, int) else print(leaving.code, file=sys.stderr) or 1
        except Exception as error:
            status = sys.excepthook(type(error), error, error.__traceback__) or 1
        return status, *capsys.readouterr()
    before = signal.getsignal(signal.SIGPIPE)
    yield run
    signal.signal(signal.SIGPIPE, before)


class Terminal:
    """chat.py in a pseudo-terminal."""

    def __init__(self, folder, *flags):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "chat.py", "--device=cpu", *flags], cwd=ROOT, env=environment(folder), stdin=slave,
            stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))        # so that the byte 3 is Ctrl-C to it
        os.close(slave)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(SECONDS)
        os.close(self.master)

    def send(self, text):
        os.write(self.master, text.encode())

    def read(self, until):
        """What is on the screen next, up to a match of `until`; line ends as \\n, without the codes of editing."""
        screen, deadline = b"", time.monotonic() + SECONDS
        while True:
            text = re.sub(r"\x1b\[\?2004[hl]\r?", "", screen.decode(errors="ignore")).replace("\r\n", "\n")
            if re.search(until, text):
                return text
            ready = select.select([self.master], [], [], max(0, deadline - time.monotonic()))[0]
            try:
                new = os.read(self.master, 65536) if ready else b""
            except OSError:             # the other end has closed
                new = b""
            assert new, f"waited for {until!r}, saw {text!r}"
            screen += new

    def ready(self):
        """What is on the screen up to the next prompt."""
        return self.read(r"(^|\n)> $")

    def type(self, line):
        """What comes back for a line, up to the next prompt."""
        self.send(line + "\r")
        return self.ready()

    def ctrl_c(self):
        """Presses it as late as a person does: between showing a key and waiting for the next one, Python misses it."""
        time.sleep(0.3)
        self.send("\x03")

    def left(self):
        """The exit status, once it has left."""
        return self.process.wait(SECONDS)


def dim(text):
    return f"\x1b[2m{text}\x1b[0m"


# --- in a terminal ---

def test_a_chat_model_answers_in_a_terminal_and_every_command_does_what_help_says(models, tmp_path):
    saved = tmp_path / "chats.jsonl"
    with Terminal(tmp_path, f"--model={models['chat']}", "--system=Be brief.", "--temperature=0.01") as terminal:
        assert "a chat model; context 4096, cpu, float32; /help lists the commands" in terminal.ready()
        answer = "\x1b[2m<think>hm</think>\x1b[0m" + ANSWER
        assert terminal.type("日本 é?") == f"日本 é?\n{answer}\x1b[0m\n> "
        assert answer in terminal.type("and?")
        assert dim(f"(appended to {saved})") in terminal.type(f"/save {saved}")

        assert dim("(taken back: and?)") in terminal.type("/undo")
        assert answer in terminal.type("/retry")
        terminal.type(f"/save {saved}")
        assert "system message stays" in terminal.type("/help") and "(a new conversation)" in terminal.type("/reset")
        assert answer in terminal.type(" /help")        # a space before it: not a command
        terminal.type(f"/save {saved}")
        assert "with this system message" in terminal.type("/system Rhyme.")
        assert answer in terminal.type("one \\\rtwo")   # two lines
        terminal.type(f"/save {saved}")
        assert "without system message" in terminal.type("/system")
        assert answer in terminal.type("bye")
        terminal.type(f"/save {saved}")
        terminal.send("\x04")
        assert terminal.left() == 0

    said = {"role": "assistant", "content": f"<think>hm</think>{ANSWER}"}
    brief, rhyme = ({"role": "system", "content": text} for text in ("Be brief.", "Rhyme."))
    user = lambda text: {"role": "user", "content": text}
    assert [json.loads(line)["messages"] for line in saved.read_text("utf-8").splitlines()] == [
        [brief, user("日本 é?"), said, user("and?"), said], [brief, user("日本 é?"), said],
        [brief, user(" /help"), said], [rhyme, user("one \ntwo"), said], [user("bye"), said]]


def test_settings_change_in_place_and_retry_takes_another_seed(models, tmp_path):
    with Terminal(tmp_path, f"--model={models['any']}", "--max_new_tokens=20") as terminal:
        terminal.ready()
        shown = terminal.type("/set")
        assert "temperature = 0.8" in shown and "max_new_tokens = 20" in shown and "show_speed = false" in shown
        first, second = (terminal.type(line).split("\n", 1)[1] for line in ("hello", "/retry"))
        assert first != second and "cut off: max_new_tokens = 20" in second
        assert dim("seed = 1337") in terminal.type("/set seed 1337")
        assert terminal.type("/retry").split("\n", 1)[1] == first

        assert dim("temperature = 0.0") in terminal.type("/set temperature 0")
        first, second = (terminal.type("/retry").split("\n", 1)[1] for _ in range(2))
        assert first == second
        terminal.type("/set max_new_tokens=3")
        assert "max_new_tokens = 3)" in terminal.type("/retry")
        terminal.type("/set show_speed true")
        shown = terminal.type("more")
        assert re.search(r"\(3 tokens, [\d.]+ tokens/s; 26 of 52 prompt tokens computed, the first token after", shown)

        # what cannot be done is said, and the session goes on
        for line, sentence in (("/set temprature 1", "there is no setting temprature (did you mean temperature?)"),
                               ("/set temperature hot", "temperature must be a number like its default 0.0, got 'hot'"),
                               ("/set top_p 7", "top_p must be"), ("/sve x", "no command /sve (did you mean save?)"),
                               ("/save", "/save needs the name of a file"), ("", "the prompt is empty"),
                               (f"/save {tmp_path}/no/x", f"could not write {tmp_path}/no/x (No such file"),
                               ("long " * 900, "must stand before it, and the model's context holds 4096; shorten it")):
            assert dim(sentence)[4:-4] in terminal.type(line)
        terminal.type("/reset")
        for line in ("/undo", "/retry", f"/save {tmp_path}/x"):
            assert dim("nothing has been said yet") in terminal.type(line)
        assert not (tmp_path / "x").exists()


def test_ctrl_c_stops_the_answer_and_twice_leaves(models, tmp_path):
    with Terminal(tmp_path, f"--model={models['endless']}", "--max_new_tokens=150000") as terminal:
        terminal.ready()
        terminal.send("go\r")
        terminal.read("xyzxyzxyz")
        terminal.ctrl_c()
        assert dim("(stopped)") in terminal.ready()
        terminal.type(f"/save {tmp_path}/said")             # what was said so far is part of the conversation
        said = json.loads((tmp_path / "said").read_text())["messages"][1]["content"]
        assert re.fullmatch("(xyz)+x?y?", said)

        for text in ("half a line", "another"):             # with something typed, it empties the line first
            terminal.send(text)
            terminal.read(text)
            terminal.ctrl_c()
            assert dim("(Ctrl-C again leaves)") in terminal.ready()
        terminal.send("go on\r")
        terminal.read("xyzxyzxyz")
        terminal.ctrl_c()
        terminal.ready()
        terminal.ctrl_c()
        assert terminal.left() == 130


def test_a_second_ctrl_c_leaves_where_the_first_has_not_been_seen_yet(models, tmp_path):
    with chat.CtrlC() as ctrl_c:
        os.kill(os.getpid(), 2)
        assert ctrl_c.pressed
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), 2)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), 2)


def test_lines_are_edited_by_character_and_kept_in_a_history_file(models, tmp_path):
    said = tmp_path / "said"
    with Terminal(tmp_path, f"--model={models['chat']}") as terminal:
        terminal.ready()
        terminal.type("本x\x7f\x1b[D日\x1b[C語é\x7f")          # backspace; left, right
        terminal.type(f"/save {said}")
    assert json.loads(said.read_text("utf-8"))["messages"][0]["content"] == "日本語"
    history = tmp_path / "zero2chat" / "history"
    assert "日本語" in history.read_text("utf-8").splitlines()
    with Terminal(tmp_path, f"--model={models['chat']}") as terminal:
        terminal.ready()
        terminal.type("\x1b[A\x1b[A")                       # up twice: the line of the session before
        terminal.type(f"/save {said}")
    assert json.loads(said.read_text("utf-8").splitlines()[1])["messages"][0]["content"] == "日本語"


def test_without_a_place_for_the_history_the_session_goes_on(models, tmp_path):
    (tmp_path / "file").write_text("")
    with Terminal(tmp_path / "file", f"--model={models['chat']}") as terminal:
        terminal.ready()
        assert ANSWER in terminal.type("hi")


def test_a_base_model_continues_what_stands_there(models, tmp_path):
    with Terminal(tmp_path, f"--model={models['base']}", "--max_new_tokens=5", "--temperature=0") as terminal:
        assert "a base model: it continues text; context 4096" in terminal.ready()
        assert terminal.type("a") == "a\né👍\x1b[0m\n> ".replace("👍", "\ufffd")     # half of it is beyond the limit
        assert dim("a base model has no system message") in terminal.type("/system x")
        terminal.type("/undo")
        terminal.type("/set max_new_tokens 6")
        assert terminal.type("a") == "a\né👍\x1b[0m\n> "
        assert terminal.type("") == "\n日!\x1b[0m\n> "        # Enter alone: on, up to the end of the text
        terminal.type(" then a")
        terminal.type(f"/save {tmp_path}/said")
        terminal.type("/reset")
        assert dim("the prompt is empty") in terminal.type("")
    assert json.loads((tmp_path / "said").read_text("utf-8")) == {"text": f"a{ANSWER} then aé👍"}


def test_old_turns_are_dropped_and_said_when_the_context_is_full(models, tmp_path):
    with Terminal(tmp_path, f"--model={models['small']}", "--system=S", "--show_speed=true") as terminal:
        terminal.ready()
        shown = [terminal.type(f"number {i}") for i in range(5)]
        said = [re.findall(r"context of 140 tokens is full: dropped the oldest (.*)\)", text) for text in shown]
        assert all(ANSWER in text for text in shown)
        assert said == [[], [], ["1 turn"], ["2 turns"], ["3 turns"]]
        assert "the model's context holds 140; shorten it" in terminal.type("x" * 200)
        terminal.type(f"/save {tmp_path}/said")             # dropped for the model, not for the reader
    assert len(json.loads((tmp_path / "said").read_text("utf-8"))["messages"]) == 11


def test_control_characters_of_a_model_do_not_reach_the_terminal(tok, tmp_path, run):
    folder = write_model(tmp_path / "model", tok, "\n\x1b]0;\x07\u009b\r.<|im_end|>")
    with Terminal(tmp_path, f"--model={folder}", "--temperature=0") as terminal:
        terminal.ready()
        assert terminal.type("hi") == "hi\n␛]0;␇\ufffd␍.\x1b[0m\n> "
    assert run(f"--model={folder}", "--prompt=hi", "--temperature=0")[1] == "\x1b]0;\x07\u009b\r.\n"


# --- without one ---

def test_piped_text_is_answered_alone_on_stdout(models, tmp_path):
    result = subprocess.run([sys.executable, "chat.py", f"--model={models['chat']}", "--device=cpu", "--temperature=0"],
                            cwd=ROOT, env=environment(tmp_path), input="日本\n".encode(), capture_output=True,
                            timeout=SECONDS)
    assert (result.returncode, result.stdout.decode()) == (0, f"<think>hm</think>{ANSWER}\n")
    assert b"a chat model" in result.stderr and b"\x1b" not in result.stderr


def test_a_prompt_is_answered_alone_on_stdout(models, run):
    flags = ["--temperature=0", "--prompt=a", "--show_speed=true"]
    for name, answer in ("chat", f"<think>hm</think>{ANSWER}\n"), ("base", f"{ANSWER}\n"):
        status, out, err = run(f"--model={models[name]}", *flags)
        assert (status, out) == (0, answer) and f"a {name} model" in err and " tokens/s; " in err


def test_prompt_and_piped_text_make_one_prompt(models, monkeypatch):
    asked = []
    for name in read_options(chat.__file__):                # to be restored
        monkeypatch.setattr(chat, name, getattr(chat, name))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(signal, "signal", lambda number, action: None)
    monkeypatch.setattr(chat, "say", lambda conversation, settings: asked.append(conversation.turns[-1].text))
    for flags, stdin in (["--prompt=Explain:"], "a\nb\n"), (["--prompt=Explain:"], ""), ([], "\n a \n\n"):
        monkeypatch.setattr(sys, "argv", ["chat.py", f"--model={models['chat']}", *flags])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        monkeypatch.setattr(chat, "prompt", "")
        with pytest.raises(SystemExit, match="^0$"):
            chat.main(chat.configure(vars(chat)))
    assert asked == ["Explain:\na\nb", "Explain:", "\n a \n"]


def test_a_prompt_on_a_terminal_is_answered_and_left(models, tmp_path):
    with Terminal(tmp_path, f"--model={models['chat']}", "--prompt=hi", "--temperature=0") as terminal:
        assert f"\x1b[2m<think>hm</think>\x1b[0m{ANSWER}" in terminal.read("!\x1b")
        assert terminal.left() == 0


@pytest.fixture(scope="module")
def broken(models, tok, tmp_path_factory):
    """Model directories that cannot be used, or not for everything, by name."""
    out = tmp_path_factory.mktemp("broken")
    for name in ("bare", "nan", "unfit", "untaught"):
        shutil.copytree(models["base" if name == "untaught" else "chat"], out / name)
    (out / "bare" / "tokenizer.json").unlink()
    gpt = GPT.load(str(out / "nan"))
    gpt.model.layers[0].mlp.up_proj.weight.data[3, 5] = float("nan")
    gpt.save(str(out / "nan"))
    Tokenizer.train(["".join(map(chr, range(200, 900))) * 2], 600).save(out / "unfit")
    spec = json.loads((out / "untaught" / "tokenizer.json").read_text())
    spec["added_tokens"] = spec["added_tokens"][:1]         # <|endoftext|> alone, like GPT-2's
    (out / "untaught" / "tokenizer.json").write_text(json.dumps(spec))
    return out


@pytest.mark.parametrize("model, flags, sentence", [
    ("chat", ["--prompt=" + "x" * 5000], r"the prompt has 5019 tokens, .* context holds 4096; shorten it"),
    ("base", ["--prompt=" + "x" * 5000], r"the prompt has 5001 tokens, .* context holds 4096; shorten it"),
    ("chat", ["--prompt="], "the prompt is empty"), ("chat", ["--prompt= \n"], "the prompt is empty"),
    ("chat", [], "the prompt is empty"),
    ("bare", ["--prompt=x"], r".*bare holds no tokenizer: looked for tokenizer.json.*"),
    ("untaught", ["--mode=chat", "--prompt=x"], r".*untaught cannot chat: .*template is not ChatML.*"),
    ("nan", ["--prompt=x"], r".*nan .*model.layers.0.mlp.up_proj.weight holds .* not finite.*"),
    ("unfit", ["--prompt=x"], r"the tokenizer in .*unfit has \d+ ids and its model 384; .*"),
    ("none", ["--prompt=x"], r".*none' is not a model directory: it has no config.json; give one that .*"),
    ("base", ["--system=x", "--prompt=x"], r"--system is for chats, but .*base is a base model; .*"),
    ("chat", ["--mode=talk", "--prompt=x"], "mode must be auto, chat or base, got 'talk'"),
    ("chat", ["--temperature=-1", "--prompt=x"], "temperature must be .*, got -1.0")])
def test_a_bad_input_ends_in_one_sentence(models, broken, run, model, flags, sentence):
    status, out, err = run(f"--model={models.get(model, broken / model)}", *flags)
    *machine, last = err.splitlines()
    assert (status, out) == (1, "") and re.fullmatch(f"chat.py: {sentence}", last), err
    assert len(machine) <= 1 and "Traceback" not in err


def test_mode_decides_over_what_the_directory_says(models, broken, run):
    status, out, err = run(f"--model={models['base']}", "--mode=chat", "--prompt=x", "--max_new_tokens=4")
    assert status == 0 and "not trained to chat" in err
    flags = ["--mode=base", "--prompt=\né", "--max_new_tokens=5", "--temperature=0"]
    status, out, err = run(f"--model={models['chat']}", *flags)
    assert status == 0 and "a base model" in err and out == "👍\ufffd\n"
    assert run(f"--model={broken / 'untaught'}", "--prompt=a", "--temperature=0")[1] == f"{ANSWER}\n"


# --- the conversation ---

@pytest.fixture
def random_model(tok):
    torch.manual_seed(3)
    gpt = GPT(Config(384, 2, 2, n_embd=32, context=128, eos_id=tok.eot_id, pad_id=tok.pad_id,
                     end_ids=(tok.chat_end_id,)))
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    return gpt.requires_grad_(False)


def answered(conversation, text, **sampling):
    conversation.add(text)
    options = dict(seed=0, max_new_tokens=8, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    ids = conversation.window(8)
    return ids, [token for token, _ in conversation.answer(ids, **{**options, **sampling})]


@pytest.mark.parametrize("chats", [True, False])
def test_a_new_turn_computes_only_its_new_tokens(random_model, tok, chats, monkeypatch):
    computed, forward = [], decoder.Decoder.forward
    monkeypatch.setattr(decoder.Decoder, "forward",
                        lambda self, ids, *args: computed.append(ids.size(1)) or forward(self, ids, *args))
    conversation = chat.Conversation(random_model, tok, chats, "Be brief." if chats else "")
    first, answer = answered(conversation, "one")
    assert computed == [len(first)] + [1] * (len(answer) - 1)
    for text in ("two é", "three"):
        before, said = len(computed), len(first) + len(answer)
        second, answer = answered(conversation, text)
        assert second[:said - 1] == first + conversation.turns[-2].answer[:said - 1 - len(first)]
        assert computed[before] == len(second) - (said - 1)         # the last token sampled has not been computed yet
        assert computed[before + 1:] == [1] * (len(answer) - 1)
        first = second


def test_answers_from_the_cache_are_those_without_it(random_model, tok):
    conversation = chat.Conversation(random_model, tok, True)
    for text in ("one", "two", "three"):
        ids, answer = answered(conversation, text, temperature=0)
        fresh = chat.Conversation(random_model, tok, True)
        fresh.turns = [chat.Turn(text, ids)]
        assert [token for token, _ in fresh.answer(ids, 0, max_new_tokens=8, temperature=0)] == answer
        conversation.cache.ids and conversation.turns.append(conversation.turns.pop())
    conversation.turns.pop()                        # /undo: a shorter prefix of what the cache holds
    ids, answer = answered(conversation, "other", temperature=0)
    fresh.turns = [chat.Turn("", ids)]
    assert [token for token, _ in fresh.answer(ids, 0, max_new_tokens=8, temperature=0)] == answer


def test_the_ids_of_a_conversation_are_those_of_its_messages(models, tok):
    gpt, tok, *_ = engine.load(models["chat"], device="cpu", dtype="fp32")
    conversation = chat.Conversation(gpt, tok, True, "Be brief.")
    for text in ("one", "日本"):
        answered(conversation, text, max_new_tokens=50, temperature=0)
    assert conversation.messages()[-1]["content"] == f"<think>hm</think>{ANSWER}"
    ids, _ = tok.encode_chat(conversation.messages())
    assert conversation.ids() + conversation.close == ids
    conversation.add("more")
    assert conversation.ids() == tok.encode_chat(
        conversation.messages()[:-1], open_answer=True)[0]


def test_what_is_dropped_leaves_room_and_comes_back(random_model, tok):
    conversation = chat.Conversation(random_model, tok, True, "S")
    for i in range(6):
        conversation.add(f"turn {i}")
        ids = conversation.window(1000)
        assert len(ids) <= 96 and ids[:len(conversation.head)] == conversation.head
        assert tok.decode(ids).endswith(f"turn {i}<|im_end|>\n<|im_start|>assistant\n")
    assert conversation.dropped == 3 and len(conversation.ids(2)) > 96      # as few as possible
    del conversation.turns[1:]
    assert conversation.window(1000) == conversation.ids() and conversation.dropped == 0

    text = chat.Conversation(random_model, tok, False)
    text.add("x" * 60)
    text.turns[0].answer = [*range(97, 117)] * 3
    text.add("end")
    ids = text.window(1000)
    assert len(ids) == 96 and ids[0] == tok.eot_id and text.dropped == len(text.ids()) - 96
    assert ids[1:] == text.ids()[-95:]
    text.add("y" * 110)                             # longer than what is kept otherwise: whole, and less room
    assert text.window(1000)[1:] == [ord("y")] * 110


def test_every_setting_is_an_option():
    options = read_options(os.path.join(ROOT, "chat.py"))
    assert set(chat.SETTINGS) < set(options)
    assert {name for name, (_, _, section) in options.items() if section.startswith("answers")} == set(chat.SETTINGS)
