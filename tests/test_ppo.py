"""ppo.py: closed forms of its rewards, advantages and losses; end to end on a tiny model, killed, resumed, on two
ranks."""
import json
import math
import os
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from safetensors.torch import load_file

import engine
import lora
import ppo
import rollouts
from model import GPT, Config, ScalarHead
from tokenizer import Tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LENGTHS = torch.tensor([5, 1, 3, 4])
MASK = torch.arange(5) < LENGTHS[:, None]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- rewards and advantages ---

def test_both_estimates_have_the_exact_kl_as_their_mean_and_k3_is_never_negative():
    logp, ref = noise(8).log_softmax(-1), noise(8, seed=1).log_softmax(-1)
    exact = (logp.exp() * (logp - ref)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((logp.exp() * ppo.kl_estimate(logp, ref, estimator)).sum(), exact)
    assert (ppo.kl_estimate(logp, ref, "k3") >= 0).all() and (ppo.kl_estimate(logp, ref, "k1") < 0).any()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_a_step_on_the_penalty_alone_lowers_the_exact_kl(estimator):
    logits, ref = noise(8).requires_grad_(), noise(8, seed=1).log_softmax(-1)
    logp = logits.log_softmax(-1)
    exact = (logp.exp() * (logp - ref)).sum()
    [gradient] = torch.autograd.grad(exact, logits, retain_graph=True)
    old, mask = logp.detach()[:, None], torch.ones(8, 1, dtype=torch.bool)      # the 8 answers there are
    kl = ppo.kl_estimate(old, ref[:, None], estimator)
    advantages, _ = ppo.gae(ppo.token_rewards(torch.zeros(8), kl, mask, 1.0), torch.zeros(8, 1), mask, 1.0, 1.0)
    loss, _ = ppo.policy_loss(logp[:, None], old, advantages, 0.2)
    (loss * old.exp()).sum().backward()                                         # its expectation
    if estimator == "k1":
        torch.testing.assert_close(logits.grad, gradient)
    after = (logits - 0.1 * logits.grad).log_softmax(-1)
    assert (after.exp() * (after - ref)).sum() < exact


def test_the_score_stands_on_the_last_token_and_the_penalty_on_every_one():
    kl, scores = noise(4, 5), torch.tensor([1.0, 2.0, 3.0, 4.0])
    rewards = ppo.token_rewards(scores, kl, MASK, 0.5)
    for a, length in enumerate(LENGTHS):
        expected = -0.5 * kl[a, :length]
        expected[-1] += scores[a]
        torch.testing.assert_close(rewards[a, :length], expected)
        assert not rewards[a, length:].any()


def test_advantages_without_values_are_the_rewards_to_go():
    rewards = noise(4, 5)
    advantages, returns = ppo.gae(rewards, torch.zeros(4, 5), MASK, 1.0, 1.0)
    for a, length in enumerate(LENGTHS):
        for t in range(length):
            torch.testing.assert_close(advantages[a, t], rewards[a, t:length].sum())
    assert torch.equal(advantages, returns) and not advantages[~MASK].any()


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_exact_values_leave_no_advantage(lam):
    rewards, gamma = noise(4, 5), 0.9
    _, values = ppo.gae(rewards, torch.zeros(4, 5), MASK, gamma, 1.0)       # the discounted rewards to go
    advantages, returns = ppo.gae(rewards, values, MASK, gamma, lam)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages))
    torch.testing.assert_close(returns, values)


def test_advantages_are_the_papers_sum():
    rewards, values, gamma, lam = noise(4, 5), noise(4, 5, seed=1), 0.9, 0.8
    advantages, returns = ppo.gae(rewards, values, MASK, gamma, lam)
    for a, length in enumerate(LENGTHS.tolist()):
        v = [*values[a, :length].tolist(), 0.0]                             # the answer is over: no value, no bootstrap
        deltas = [rewards[a, t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
            torch.testing.assert_close(advantages[a, t], expected)
            torch.testing.assert_close(returns[a, t], expected + v[t])


def test_what_stands_beyond_an_answers_end_changes_nothing():
    rewards, values = noise(4, 5), noise(4, 5, seed=1)
    junk = [torch.where(MASK, x, 1e6) for x in (rewards, values)]
    for ours, other in zip(ppo.gae(rewards, values, MASK, 0.9, 0.8), ppo.gae(*junk, MASK, 0.9, 0.8)):
        assert torch.equal(ours, other)
    torch.testing.assert_close(ppo.whiten(rewards, MASK), ppo.whiten(junk[0], MASK))
    assert torch.equal(ppo.token_rewards(torch.ones(4), values, MASK, 0.1),
                       ppo.token_rewards(torch.ones(4), junk[1], MASK, 0.1))
    assert ppo.explained_variance(values, rewards, MASK) == ppo.explained_variance(junk[1], junk[0], MASK)


def test_whitening_removes_the_mean_and_leaves_variance_one_on_the_mask():
    x = 3 * noise(4, 5) + 7
    white, kept = ppo.whiten(x, MASK), ppo.whiten(x, MASK, shift_mean=False)
    assert white[MASK].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[MASK].var().item() == pytest.approx(1, abs=1e-6) and not white[~MASK].any()
    assert kept[MASK].mean().item() == pytest.approx(x[MASK].mean().item()) and not kept[~MASK].any()
    assert kept[MASK].var().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("mask", [MASK, MASK & (torch.arange(20).view(4, 5) == 0)])
def test_equal_advantages_and_a_single_one_become_zero(mask):
    assert ppo.whiten(torch.full((4, 5), 0.7), mask).abs().max() < 1e-3


def test_the_coefficient_moves_towards_the_target_by_a_fifth_at_most():
    assert ppo.adapt_kl_coef(0.1, 6.0, 6.0, 64, 1000) == 0.1
    assert ppo.adapt_kl_coef(0.1, 6.6, 6.0, 64, 1000) == pytest.approx(0.1 * (1 + 0.1 * 0.064))
    assert ppo.adapt_kl_coef(0.1, 600.0, 6.0, 64, 1000) == pytest.approx(0.1 * (1 + 0.2 * 0.064))
    assert ppo.adapt_kl_coef(0.1, 0.0, 6.0, 64, 1000) == pytest.approx(0.1 * (1 - 0.2 * 0.064))


# --- losses ---

def test_at_ratio_one_the_loss_is_minus_the_advantage_and_its_gradient_reinforces():
    logp, advantages = noise(4, 5).requires_grad_(), noise(4, 5, seed=1)
    loss, clipped = ppo.policy_loss(logp, logp.detach(), advantages, 0.2)
    assert torch.equal(loss, -advantages) and not clipped.any()
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, -advantages)          # of -sum A log pi


@pytest.mark.parametrize("advantage, ratio, moves", [(1.0, 1.5, False), (1.0, 0.5, True), (-1.0, 1.5, True),
                                                     (-1.0, 0.5, False), (1.0, 1.1, True), (-1.0, 0.9, True)])
def test_clipping_stops_what_would_go_further_and_nothing_else(advantage, ratio, moves):
    logp = torch.tensor([[math.log(ratio)]]).requires_grad_()
    loss, clipped = ppo.policy_loss(logp, torch.zeros(1, 1), torch.tensor([[advantage]]), 0.2)
    loss.sum().backward()
    assert bool(logp.grad.any()) == moves and clipped.item() == (not moves)


def test_the_value_loss_holds_the_value_near_that_of_the_rollout():
    values, old, returns = torch.tensor([[0.9, 0.9, 0.1]]), torch.zeros(1, 3), torch.tensor([[1.0, -1.0, 1.0]])
    loss, clipped = ppo.value_loss(values, old, returns, 0.2)
    torch.testing.assert_close(loss, torch.tensor([[0.8 ** 2, 1.9 ** 2, 0.9 ** 2]]) / 2)
    assert clipped.tolist() == [[True, False, False]]
    torch.testing.assert_close(ppo.value_loss(values, old, returns, 0.0)[0], (values - returns).square() / 2)


def test_explained_variance_is_one_for_exact_values_and_zero_for_a_constant():
    returns = noise(4, 5)
    assert ppo.explained_variance(returns, returns, MASK) == 1
    assert ppo.explained_variance(torch.full_like(returns, 3.0), returns, MASK) == pytest.approx(0)
    assert ppo.explained_variance(-returns, returns, MASK) == pytest.approx(-3)
    assert ppo.explained_variance(returns, torch.ones(4, 5), MASK) == 0


def test_an_epoch_visits_every_question_once_and_in_an_order_of_its_own():
    orders = [sum((ppo.minibatch(1, 5, 3 * epoch + i, 12, 3) for i in range(3)), []) for epoch in range(2)]
    assert [sorted(order) for order in orders] == [[*range(12)]] * 2 and orders[0] != orders[1]
    assert ppo.minibatch(1, 6, 0, 12, 3) != ppo.minibatch(1, 5, 0, 12, 3) == orders[0][:4]


def test_a_collapse_and_scores_without_difference_are_said_once():
    said, now = [], dict(entropy=None, collapsed=False, equal=0)
    fake = types.SimpleNamespace(print=said.append)
    for entropy in (20.0, 10.0, 1.0, 0.5, 0.1):
        ppo.say(now, {"objective/entropy": entropy, "completions/mean_length": 10.0}, torch.tensor([0.0, 1.0]), fake)
    assert len(said) == 1 and "entropy fell to 0.1 nats a token from 2" in said[0]
    for _ in range(15):
        ppo.say(now, {"objective/entropy": 20.0, "completions/mean_length": 10.0}, torch.zeros(3), fake)
    assert len(said) == 2 and "all 3 scores were 0 in each of 10 rollouts" in said[1]


# --- end to end ---

DIGITS = """
def digits(prompts, completions, answers, tasks):
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]
"""
TINY = ["--device=cpu", "--dtype=fp32", "--max_new_tokens=10", "--questions_per_rollout=8", "--minibatches=2",
        "--epochs=2", "--n_questions=40", "--eval_every=6", "--eval_questions=6", "--samples=1", "--pass_k=0",
        "--lr=0.003", "--critic_lr=0.003", "--warmup_steps=2", "--kl_coef=0.01", "--curves=false", "--max_steps=14"]


def call(script, *flags, ranks=1):
    launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  f"--nproc_per_node={ranks}"]
    return subprocess.run([*launch, script, *flags], cwd=ROOT, capture_output=True, text=True, timeout=180,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with its tokenizer, a reward model, another one's head, and a reward of one's own."""
    folder = tmp_path_factory.mktemp("ppo")
    tokenizer = Tokenizer.train(["Sort 3 1 2\nThink, then answer as digits. 1 2 3 4 5 6 7 8 9 0"] * 9, 300)
    torch.manual_seed(0)
    size = dict(n_layer=2, n_head=2, n_embd=32, context=128, eos_id=tokenizer.eot_id, pad_id=tokenizer.pad_id)
    for name, model in dict(base=GPT(Config(384, **size)), reward=ScalarHead(Config(384, **size)),
                            other=ScalarHead(Config(512, **size)),
                            short=ScalarHead(Config(384, **{**size, "context": 64}))).items():
        if name == "reward":
            torch.nn.init.normal_(model.score.weight, std=0.3)
        model.save(folder / name)
        tokenizer.save(folder / name)
    (folder / "digits.py").write_text(DIGITS)
    return folder


def command(folder, out_dir, *flags):
    return [f"--init_from={folder}/base", f"--rewards={folder}/digits.py:digits", f"--out_dir={out_dir}", *TINY, *flags]


def run(folder, out_dir, *flags, **options):
    return call("ppo.py", *command(folder, out_dir, *flags), **options)


def log(out_dir):
    return [json.loads(line) for line in open(os.path.join(out_dir, "log.jsonl"))]


def column(out_dir, name):
    return {record["step"]: record[name] for record in log(out_dir) if name in record}


def timeless(out_dir):
    """The log without what the clock says."""
    return [{name: value for name, value in record.items() if name != "eps" and "second" not in name}
            for record in log(out_dir)]


def weights(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def state(out_dir):
    return torch.load(os.path.join(out_dir, "resume", "state.pt"), weights_only=True)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The uninterrupted run that others are compared with."""
    out_dir = tmp_path_factory.mktemp("out") / "whole"
    result = run(folder, out_dir, "--pass_k=2")
    assert result.returncode == 0, result.stderr
    return out_dir, result


def test_a_reward_that_is_easily_had_rises(folder, tmp_path):
    result = run(folder, tmp_path / "out", "--max_steps=40", "--questions_per_rollout=64", "--minibatches=1",
                 "--epochs=4", "--lr=0.02", "--max_new_tokens=3", "--kl_coef=0", "--eval_every=40", "--n_questions=0",
                 "--curves=true")
    assert result.returncode == 0, result.stderr
    scores = list(column(tmp_path / "out", "objective/scores").values())
    assert len(scores) == 10 and scores[0] < 0.1 and scores[-1] > 0.35, scores
    assert not column(tmp_path / "out", "objective/kl")         # without a penalty no reference is there to measure it
    assert (tmp_path / "out" / "curves.png").exists()


def test_it_leaves_a_chat_model_a_critic_and_a_log_by_trls_names(whole):
    out_dir, result = whole
    records = log(out_dir)
    assert [r["step"] for r in records if "eval_reward" in r] == [0, 6, 12, 14]
    assert list(column(out_dir, "objective/scores")) == [0, 4, 8, 12]           # four updates a rollout
    assert {"objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward",
            "val/num_eos_tokens", "explained_variance", "rewards/digits/mean"} <= records[1].keys()
    assert {"loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg",
            "val/clipfrac_avg", "val/ratio", "val/ratio_var", "lr", "eps", "episode"} <= records[2].keys()
    assert "eval_pass@2/sorting" in records[0] and "answer: reward" in result.stdout
    first = records[1]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5) and first["policy/approxkl_avg"] < 1e-10
    assert first["val/ratio"] == pytest.approx(1, abs=1e-5) and first["grad_norm"] > 1e-3
    assert first["sampling/sampling_logp_difference/max"] < 4e-3            # ln(384 / 383): the pad is never sampled
    _, _, chat, trained = engine.load(str(out_dir), device="cpu")
    assert chat and trained
    for path in (out_dir / "critic", out_dir / "best" / "critic"):
        ScalarHead.load(str(path))
        Tokenizer.load(str(path))
    assert (out_dir / "best" / "model.safetensors").exists()


def test_returns_are_of_advantages_before_whitening(whole):
    rollout = state(whole[0])["extra"]["rollout"]               # 14 steps end amid the fourth rollout
    mask = rollout["mask"]
    assert rollout["advantages"][mask].mean().item() == pytest.approx(0, abs=1e-5)
    assert rollout["advantages"][mask].var().item() == pytest.approx(1, abs=1e-3)
    raw = (rollout["returns"] - rollout["values"])[mask]
    assert not torch.allclose(raw.var(), torch.tensor(1.0), atol=0.1)
    torch.testing.assert_close((raw - raw.mean()) / raw.std(), rollout["advantages"][mask], atol=1e-3, rtol=1e-3)


def same(one, other):
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_killed_at_any_moment_resumes_bitwise_also_amid_a_rollout(folder, whole, tmp_path):
    out_dir = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "ppo.py", *command(folder, out_dir, "--pass_k=2")], cwd=ROOT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while not (out_dir / "resume" / "state.pt").exists() or len(open(out_dir / "log.jsonl").readlines()) < 9:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state(out_dir)["extra"]["update"] in (0, 2)          # saved before step 0 or, amid a rollout, 6
    result = run(folder, out_dir, "--pass_k=2", "--resume=true")
    assert result.returncode == 0, result.stderr
    assert timeless(out_dir) == timeless(whole[0])
    assert same(out_dir, whole[0]) and same(out_dir / "critic", whole[0] / "critic")


def test_two_ranks_that_accumulate_equal_one_that_does_not_also_in_leaving_a_rollout(folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--stop_kl=0.0005", "--answers_per_question=2", "--max_steps=10", f"--critic_from={folder}/reward"]
    alone, both = run(folder, one, *flags), run(folder, two, *flags, "--micro_questions=1", ranks=2)
    assert alone.returncode == both.returncode == 0, alone.stderr + both.stderr
    left = column(one, "stopped_early")
    assert 0 < sum(left.values()) < len(left) and column(two, "stopped_early") == left
    assert {step + 1 for step in left if left[step]} - {10} <= column(one, "objective/scores").keys()
    for name in ("loss/policy_avg", "loss/value_avg", "objective/scores", "objective/kl", "grad_norm", "val/ratio"):
        assert column(two, name) == pytest.approx(column(one, name), abs=2e-4), name
    for part in ("", "critic"):
        for name, tensor in weights(one / part).items():
            torch.testing.assert_close(tensor, weights(two / part)[name], atol=1e-4, rtol=0)


def test_an_update_that_left_its_rollout_is_not_applied(folder, tmp_path):
    flags = ["--stop_kl=1e-9", "--minibatches=1", "--max_steps=2", "--eval_every=1"]
    assert run(folder, tmp_path / "out", *flags).returncode == 0
    assert column(tmp_path / "out", "stopped_early") == {0: 0, 1: 1}
    assert column(tmp_path / "out", "eval_reward")[2] == column(tmp_path / "out", "eval_reward")[1]
    saved = state(tmp_path / "out")
    assert saved["extra"]["rollout"] is None and saved["extra"]["rollouts"] == 1
    assert {float(s["step"]) for part in saved["optimizer"] for s in part["state"].values()} == {1.0}


def test_adapters_off_are_the_reference_and_what_is_saved_is_merged(folder, tmp_path):
    out_dir = tmp_path / "lora"
    result = run(folder, out_dir, "--method=lora", "--lr=0.02", "--rewards=format", "--missing_eos_penalty=2")
    assert result.returncode == 0, result.stderr
    kl = list(column(out_dir, "objective/kl").values())
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-4
    model = lora.load(GPT.load(str(folder / "base")), str(out_dir / "adapter"))
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model.forward_hidden(ids), GPT.load(str(out_dir)).forward_hidden(ids), atol=1e-5,
                               rtol=1e-5)
    for record in log(out_dir):
        if "objective/scores" in record:                        # no answer has the format: the penalty is all there is
            assert record["objective/scores"] == pytest.approx(-2 * record["completions/clipped_ratio"])


def test_with_a_target_the_coefficient_moves_and_a_reward_model_scores(folder, tmp_path):
    target = tmp_path / "target"
    flags = ["--kl_target=100", "--kl_horizon=8", f"--rewards=reward_model:{folder}/reward", "--schedule=cosine"]
    result = run(folder, target, *flags)
    assert result.returncode == 0, result.stderr
    assert list(column(target, "kl_coef").values()) == pytest.approx([0.01 * 0.8 ** i for i in range(4)])


def test_log_probabilities_and_values_stand_where_each_token_is_predicted(folder, monkeypatch):
    actor, critic = GPT.load(str(folder / "base")), ScalarHead.load(str(folder / "reward"))
    tokenizer = Tokenizer.load(str(folder / "base"))
    actor.config.pad_id = None                                  # then the sampler leaves no token out
    monkeypatch.setattr(ppo, "temperature", 0.7)
    asked = rollouts.Questions("sorting", "train", 1, tokenizer, context=128, max_new_tokens=9)(0, 3)
    drawn = rollouts.sample(actor, asked, 2, tokenizer, 9, 0.7, seed=3)
    for a, seen in enumerate(ppo.observe(drawn, actor, None, critic)):
        prompt, tokens = asked[a // 2].prompt_ids, drawn.samples[a].tokens
        torch.testing.assert_close(seen["logp"], torch.tensor(drawn.samples[a].logp), atol=1e-4, rtol=1e-4)
        values = critic(torch.tensor([prompt + tokens]))[0, len(prompt) - 1:-1]
        torch.testing.assert_close(seen["values"], values.detach(), atol=1e-4, rtol=1e-4)
        assert torch.equal(seen["ref"], seen["logp"])


@pytest.mark.parametrize("flags, said", [
    (["--method=head"], "method must be full or lora"), (["--kl_estimator=k2"], "kl_estimator must be k1 or k3"),
    (["--kl_target=6", "--kl_coef=0"], "which is 0 and would stay so"), (["--lam=1.5"], "--lam must be at most 1"),
    (["--questions_per_rollout=9"], "is not a multiple of minibatches"), (["--max_steps=0"], "must be at least 1"),
    (["--n_questions=4"], "fewer than the 8 of one step"), (["--max_new_tokens=120"], "lower max_new_tokens"),
    (["--rewards=nothing"], "there is no reward 'nothing'"), (["--tasks=sortin"], "there is no task 'sortin'"),
    (["--critic_from=FOLDER/other"], "reads 512 ids"), (["--critic_from=FOLDER/short"], "reads 64 tokens"),
    (["--critic_from=nowhere"], "'nowhere' is not a model directory"), (["--temperature=0"], "must be at"),
    (["--init_from=FOLDER/reward"], "language model is wanted"),
    (["--rewards=reward_model:FOLDER/base"], "reward model is wanted")])
def test_bad_input_is_one_sentence(folder, tmp_path, flags, said):
    result = run(folder, tmp_path / "bad", *(flag.replace("FOLDER", str(folder)) for flag in flags))
    assert result.returncode == 1 and said in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
