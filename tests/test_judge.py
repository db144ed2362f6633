"""A win rate asks both orders and loses nothing on the way; a judge that fails is retried, then counted."""
import functools
import itertools
import json
import math
import statistics
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import judge
import model
from judge import endpoint, read_prompts, reward_model, win_rate
from tokenizer import Tokenizer

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


def user(text):
    return [{"role": "user", "content": text}]


def one_sentence(error):
    text = str(error.value)
    return "\n" not in text and len(text) > 20


# --- win rate ---

def prefers(order):
    """A judge that ranks answers by their place in `order`; those not in it tie."""
    def ask(conversation, first, second):
        a, b = (order.find(answer) for answer in (first, second))
        return "tie" if a == b else "1" if a < b else "2"
    return ask


def test_a_judge_of_content_counts_wins_losses_and_ties():
    prompts = [user(str(i)) for i in range(4)]
    result = win_rate(prompts, ["a", "a", "b", "a"], ["b", "b", "a", "a"], prefers("ab"))
    assert result == dict(wins=2, losses=1, ties=1, inconsistent=0, failed=0, win_rate=0.625, n=4,
                          stderr=pytest.approx(statistics.stdev([1, 1, 0, 0.5]) / 2))


@pytest.mark.parametrize("place", ["1", "2"])
def test_a_judge_of_position_alone_gives_nothing_but_ties(place):
    result = win_rate([user(str(i)) for i in range(5)], ["a"] * 5, ["b"] * 5, lambda *_: place)
    assert (result["ties"], result["inconsistent"], result["win_rate"], result["stderr"]) == (5, 5, 0.5, 0)


def test_a_verdict_against_a_tie_is_a_tie():
    verdicts = iter(["1", "tie", "tie", "1"])
    result = win_rate([user("?")] * 2, "ab", "cd", lambda *_: next(verdicts))
    assert (result["ties"], result["inconsistent"], result["win_rate"]) == (2, 2, 0.5)


def test_each_pair_is_asked_once_in_each_order_with_its_own_prompt():
    asked = []

    def ask(conversation, first, second):
        asked.append((conversation[-1]["content"], first, second))
        return "tie"
    win_rate([user("x"), user("y")], ["a", "c"], ["b", "d"], ask)
    assert sorted(asked) == [("x", "a", "b"), ("x", "b", "a"), ("y", "c", "d"), ("y", "d", "c")]


def test_a_missing_verdict_in_either_order_makes_a_failed_prompt_and_moves_nothing_else():
    silent = {("0", "a"), ("1", "b")}               # (prompt, answer shown first)

    def ask(conversation, first, second):
        return None if (conversation[0]["content"], first) in silent else prefers("ab")(conversation, first, second)
    result = win_rate([user(str(i)) for i in range(4)], ["a"] * 4, ["b"] * 4, ask)
    assert (result["failed"], result["n"], result["wins"], result["win_rate"]) == (2, 2, 2, 1.0)


@given(st.lists(st.tuples(*[st.sampled_from(["1", "2", "tie", None])] * 2), min_size=1, max_size=12))
def test_every_prompt_is_in_exactly_one_count_and_swapping_the_models_mirrors_the_rate(verdicts):
    n = len(verdicts)
    ask = lambda conversation, first, second: verdicts[int(conversation[0]["content"])][first == "b"]
    prompts = [user(str(i)) for i in range(n)]
    if all(None in pair for pair in verdicts):
        with pytest.raises(ValueError, match=f"any of {n} prompts"):
            win_rate(prompts, ["a"] * n, ["b"] * n, ask)
        return
    result = win_rate(prompts, ["a"] * n, ["b"] * n, ask)
    assert result["wins"] + result["losses"] + result["ties"] == result["n"] == n - result["failed"]
    assert result["win_rate"] == pytest.approx((result["wins"] + result["ties"] / 2) / result["n"])
    assert result["inconsistent"] <= result["ties"]
    mirrored = win_rate(prompts, ["b"] * n, ["a"] * n, ask)
    assert mirrored["win_rate"] == pytest.approx(1 - result["win_rate"])
    assert math.isnan(result["stderr"]) if result["n"] == 1 else mirrored["stderr"] == pytest.approx(result["stderr"])


def test_requests_in_parallel_give_the_same_result_and_each_is_told():
    barrier, told = threading.Barrier(4, timeout=20), []

    def ask(conversation, first, second):
        barrier.wait()                              # passes only if four are under way at once
        return prefers("ab")(conversation, first, second)
    prompts, a, b = [user(str(i)) for i in range(8)], list("aabbaabb"), list("bbaabbaa")
    assert win_rate(prompts, a, b, ask, parallel=4, progress=told.append) == win_rate(prompts, a, b, prefers("ab"))
    assert told == list(range(1, 17))


def test_unequal_lengths_and_no_prompts_are_refused():
    for prompts, a, b in ([user("?")], ["a"], []), ([user("?")], ["a", "b"], ["c"]), ([], [], []):
        with pytest.raises(ValueError, match="two answers to each") as error:
            win_rate(prompts, a, b, prefers("ab"))
        assert one_sentence(error)


def test_a_judge_that_raises_ends_the_rest_at_once():
    asked = []

    def ask(*_):
        asked.append(1)
        raise ValueError("wrong key")
    with pytest.raises(ValueError, match="wrong key"):
        win_rate([user("?")] * 500, ["a"] * 500, ["b"] * 500, ask, parallel=1)
    assert len(asked) < 1000


# --- endpoint ---

@pytest.fixture
def served(monkeypatch):
    """serve(reply) -> (url, requests): an HTTP server; reply(number, body) -> (status, bytes), or None: no answer."""
    monkeypatch.setenv("NO_PROXY", "*")
    servers, released = [], threading.Event()

    def serve(reply):
        requests, lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    requests.append((self.path, dict(self.headers), body))
                    number = len(requests)
                answer = reply(number, body)
                if answer is None:
                    released.wait(20)
                    return
                self.send_response(answer[0])
                self.send_header("Content-Length", str(len(answer[1])))
                self.end_headers()
                self.wfile.write(answer[1])

            def log_message(self, *_):
                pass
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", requests
    yield serve
    released.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def said(text):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


quick = functools.partial(endpoint, model="judge-1", backoff=0.001, timeout=20)


def test_the_request_is_openais(served, monkeypatch):
    url, requests = served(lambda *_: said("I say [[A]]"))
    monkeypatch.setenv("SOME_KEY", "secret")
    ask = quick(url + "/", key_env="SOME_KEY", max_tokens=77)
    conversation = [*user("first {x}"), {"role": "assistant", "content": "well"}, *user("and now?")]
    assert ask(conversation, "one {answer}", "two") == "1" and ask.failures == []
    ((path, headers, body),) = requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert headers["Content-Type"] == "application/json"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-1", 0, 77)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    text = body["messages"][1]["content"]
    places = [text.index(part) for part in ("first {x}", "well", "and now?", "one {answer}", "two")]
    assert places == sorted(places)


def test_without_a_key_no_authorization_is_sent(served):
    url, requests = served(lambda *_: said("[[B]]"))
    assert quick(url + "/chat/completions", max_tokens=0)(user("?"), "a", "b") == "2"
    ((path, headers, body),) = requests
    assert path == "/v1/chat/completions" and "Authorization" not in headers and "max_tokens" not in body


@pytest.mark.parametrize("text, verdict", [
    ("[[A]]", "1"), ("[[B]]", "2"), ("[[C]]", "tie"), ("Were it [[A]] ... no.\n\n[[B]]", "2"), ("**[[C]]**.", "tie"),
    ("[[A]] [[A]]", "1")])
def test_the_last_verdict_counts(served, text, verdict):
    url, requests = served(lambda *_: said(text))
    assert quick(url)(user("?"), "a", "b") == verdict and len(requests) == 1


@pytest.mark.parametrize("status, content", [
    (500, b"oops"), (503, b""), (429, b"{}"), (400, b"{}"), (200, b"not json"), (200, b"\xff"), (200, b"[]"),
    (200, b"3"), (200, b"{}"), (200, b'{"choices": []}'), (200, b'{"choices": [{"message": {"content": null}}]}'),
    (200, b'{"choices": [{"message": {}}]}'), said("A is better"), said("[A]"), said("[[D]]"), said("[[a]]"), said("")])
def test_a_bad_reply_is_retried_until_a_good_one(served, status, content):
    url, requests = served(lambda number, _: (status, content) if number <= 2 else said("[[B]]"))
    ask = quick(url, retries=2)
    assert ask(user("?"), "a", "b") == "2"
    assert len(requests) == 3 and len(ask.failures) == 2


def test_a_judge_that_never_answers_well_is_counted_with_its_reason(served):
    url, requests = served(lambda *_: (503, b""))
    ask = quick(url, retries=3)
    assert ask(user("?"), "a", "b") is None
    assert len(requests) == 4 and ask.failures == ["HTTP 503 Service Unavailable"] * 4
    with pytest.raises(ValueError, match="any of 2 prompts.*HTTP 503") as error:
        win_rate([user("?")] * 2, "ab", "cd", ask)
    assert one_sentence(error)


def test_a_judge_that_stays_silent_is_given_up_after_its_timeout(served):
    url, requests = served(lambda number, _: None)
    ask = quick(url, timeout=0.2, retries=1)
    assert ask(user("?"), "a", "b") is None
    assert len(requests) == 2 and len(ask.failures) == 2 and all("timed out" in reason for reason in ask.failures)


def test_a_judge_that_is_not_there_is_given_up(served):
    ask = quick("http://127.0.0.1:1/v1", retries=1)
    assert ask(user("?"), "a", "b") is None and len(ask.failures) == 2


def test_pauses_between_retries_double(served, monkeypatch):
    pauses = []
    monkeypatch.setattr(judge.time, "sleep", pauses.append)
    url, _ = served(lambda *_: (500, b""))
    endpoint(url, "m", backoff=3.0, retries=3)(user("?"), "a", "b")
    assert pauses == [3.0, 6.0, 12.0]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_address_is_one_sentence_at_once(served, status):
    url, requests = served(lambda *_: (status, b""))
    with pytest.raises(judge.Refused, match=f"refuses: HTTP {status}") as error:
        quick(url)(user("?"), "a", "b")
    assert one_sentence(error) and len(requests) == 1


def test_a_key_that_is_not_set_and_a_url_that_is_none_are_one_sentence(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ValueError, match="NO_SUCH_KEY, which is not set") as error:
        endpoint("http://localhost/v1", "m", key_env="NO_SUCH_KEY")
    assert one_sentence(error)
    for url in ("localhost:8000", "file:///etc/passwd", ""):
        with pytest.raises(ValueError, match="must begin with http") as error:
            endpoint(url, "m")
        assert one_sentence(error)


def test_a_served_judge_biased_to_the_first_answer_gives_ties_and_a_fair_one_does_not(served):
    prompts, good, bad = [user(f"question {i}") for i in range(6)], ["fine"] * 6, ["awful"] * 6
    url, requests = served(lambda *_: said("The first: [[A]]"))
    result = win_rate(prompts, good, bad, quick(url), parallel=3)
    assert (result["ties"], result["inconsistent"], result["win_rate"]) == (6, 6, 0.5) and len(requests) == 12

    def fair(number, body):
        text = body["messages"][1]["content"]
        return said("[[A]]" if text.index("fine") < text.index("awful") else "[[B]]")
    assert win_rate(prompts, good, bad, quick(served(fair)[0]), parallel=3)["win_rate"] == 1.0


def test_requests_that_fail_are_failed_prompts_and_the_rest_is_judged(served):
    def reply(number, body):
        return (500, b"") if "question 2" in body["messages"][1]["content"] else said("[[C]]")
    url, _ = served(reply)
    ask = quick(url, retries=1)
    result = win_rate([user(f"question {i}") for i in range(4)], "abcd", "efgh", ask, parallel=4)
    assert (result["n"], result["ties"], result["failed"], len(ask.failures)) == (3, 3, 1, 4)


# --- reward model ---

class Head:
    """A reward model whose reward of a token is its id, so that the last token of what it is given shows."""

    def __init__(self, context=64, reward=lambda ids: ids.float(), bias=0.0):
        self.config, self.model = model.Config(512, n_layer=1, n_head=1, n_embd=8, context=context), self
        self.reward, self.bias, self.seen = reward, bias, []

    def to(self, device):
        return self

    def __call__(self, ids, **layout):
        self.seen.append(ids[0].tolist())
        return self.reward(ids)


@pytest.fixture
def chat(tmp_path):
    tokenizer = Tokenizer.train(["some text to learn from"], 256 + 8)
    tokenizer.save(tmp_path)
    return tmp_path, tokenizer


def use(monkeypatch, head):
    monkeypatch.setattr(judge.ScalarHead, "load", lambda path: head)
    return head


def answered(answer, prompt="well?"):
    return [*user(prompt), {"role": "assistant", "content": answer}]


ANSWERS = ["yes", "no", "", "maybe so", "42", "<answer>1</answer>"]


@pytest.fixture
def saved(chat):
    """(folder, function that scores one answer alone) of a random head with a bias."""
    folder, tokenizer = chat
    torch.manual_seed(0)
    head = model.ScalarHead(model.Config(384, n_layer=2, n_head=2, n_embd=16, context=64))
    for weight in head.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    head.bias = 0.75
    head.save(folder)

    def alone(messages):
        ids, _ = tokenizer.encode_chat(messages)
        end = max(i for i, id in enumerate(ids) if id == tokenizer.chat_end_id)
        return head(torch.tensor([ids]))[0, end].item() + 0.75
    return str(folder), alone


def test_a_saved_head_prefers_what_it_scores_higher_at_the_end_of_the_answer(saved):
    folder, alone = saved
    ask, seen = reward_model(folder), set()
    for a, b in itertools.permutations(ANSWERS, 2):
        seen.add(verdict := ask(user("well?"), a, b))
        assert verdict == ("1" if alone(answered(a)) > alone(answered(b)) else "2")
    assert seen == {"1", "2"}


@pytest.mark.parametrize("tokens_per_pass", [1, 40, 8192])
def test_rewards_are_the_same_whatever_else_is_scored_and_hold_the_bias(saved, monkeypatch, tokens_per_pass):
    monkeypatch.setattr(judge, "TOKENS_PER_PASS", tokens_per_pass)
    folder, alone = saved
    chats = [answered(answer, prompt) for answer in ANSWERS for prompt in ("well?", "a b c")]
    chats += [[*answered("x"), *answered("y")], answered("x")[1:]]          # two turns, and none before the answer
    rewards = judge.load_reward(folder)(chats)
    assert rewards.dtype == torch.float32
    torch.testing.assert_close(rewards, torch.tensor([alone(chat) for chat in chats]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(judge.load_reward(folder)(chats[::-1]), rewards.flip(0), atol=1e-5, rtol=1e-5)


def test_the_bias_is_kept_in_the_config_and_must_be_a_finite_number(saved):
    folder, _ = saved
    assert model.ScalarHead.load(folder).bias == 0.75
    config = json.load(open(folder + "/config.json"))
    for value, loaded in ((None, 0.0), ("x", None), (math.nan, None)):
        config = {name: x for name, x in config.items() if name != "score_bias"}
        with open(folder + "/config.json", "w") as file:
            json.dump(config | ({} if value is None else {"score_bias": value}), file)
        if loaded is not None:
            assert model.ScalarHead.load(folder).bias == loaded
            continue
        with pytest.raises(ValueError, match="score_bias=.*not a finite number") as error:
            judge.load_reward(folder)
        assert one_sentence(error)


def test_what_does_not_end_with_the_assistants_turn_has_no_reward(saved):
    for chat, said in (user("hi"), "ends with the assistant's turn"), ([], "at least one message"):
        with pytest.raises(ValueError, match=said) as error:
            judge.load_reward(saved[0])([chat])
        assert one_sentence(error)
    assert judge.load_reward(saved[0])([]).shape == (0,)


def test_the_reward_is_read_at_the_last_token_of_the_answer(chat, monkeypatch):
    folder, tokenizer = chat
    head = use(monkeypatch, Head())
    score = judge.load_reward(folder)
    for answer in ("yes", "no"):
        assert score([answered(answer, "hi")]).item() == tokenizer.chat_end_id
        text = tokenizer.decode(head.seen[-1])
        assert text.endswith(answer + "<|im_end|>") and "hi" in text


def test_the_larger_reward_wins_in_both_orders_and_equal_ones_tie(chat, monkeypatch):
    head = use(monkeypatch, Head(reward=lambda ids: torch.arange(ids.size(1), 0, -1)[None].float()))   # first is best
    ask = reward_model(chat[0])
    assert [ask(user("?"), *pair) for pair in (("a", "b"), ("b", "a"), ("c", "c"))] == ["1", "2", "tie"]
    result = win_rate([user("?")] * 3, ["a", "b", "c"], ["b", "a", "c"], ask)
    assert (result["wins"], result["losses"], result["ties"], result["inconsistent"]) == (1, 1, 1, 0)
    assert len(head.seen) == 2                      # each text is scored once, whatever the order


def test_what_does_not_fit_the_context_or_has_no_reward_is_counted_as_failed(chat, monkeypatch):
    use(monkeypatch, Head(context=40))
    ask = reward_model(chat[0])
    result = win_rate([user("?")] * 2, ["a", "b" * 50], ["c", "d"], ask)
    assert (result["n"], result["failed"]) == (1, 1) and ask.failures == ["longer than the context of 40 tokens"]
    use(monkeypatch, Head(reward=lambda ids: torch.full(ids.shape, math.nan)))
    with pytest.raises(ValueError, match="not a number"):
        win_rate([user("?")], ["a"], ["b"], reward_model(chat[0]))


# --- prompts ---

def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_prompts_are_read_from_every_published_shape(tmp_path):
    answered = [{"role": "system", "content": "s"}, *user("a"), {"role": "assistant", "content": "b"}, *user("c")]
    path = lines(tmp_path / "p.jsonl", {"prompt": "one"}, {"prompt": user("two"), "chosen": []},
                 {"messages": [*answered, {"role": "assistant", "content": "d"}]},
                 {"question_id": 81, "turns": ["three", "and then?"]})
    assert read_prompts(path) == [user("one"), user("two"), answered, user("three")]


@pytest.mark.parametrize("row", [
    {"question": "one"}, {}, {"prompt": ""}, {"prompt": None}, {"prompt": 3}, {"prompt": []}, {"turns": [3]},
    {"messages": [{"role": "assistant", "content": "a"}]}, {"messages": [{"role": "user"}]},
    {"messages": {"role": "user"}},
    {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {"messages": [["user", "a"]]}])
def test_a_row_without_a_users_text_is_one_sentence_with_its_columns(tmp_path, row):
    with pytest.raises(ValueError, match="row 2 of .* has no user's text") as error:
        read_prompts(lines(tmp_path / "p.jsonl", {"prompt": "one"}, row))
    assert one_sentence(error) and all(column in str(error.value) for column in row)


def test_a_missing_or_empty_prompt_file_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="there is no file") as error:
        read_prompts(tmp_path / "none.jsonl")
    assert one_sentence(error)
    with pytest.raises(ValueError, match="holds no rows") as error:
        read_prompts(lines(tmp_path / "p.jsonl"))
    assert one_sentence(error)
