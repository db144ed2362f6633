"""grpo.py: advantages and losses against closed forms, and the script end to end on a tiny model."""
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import grpo
import lora
from model import GPT, Config
from tokenizer import Tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BOUNDS = dict(clip_low=0.2, clip_high=0.3, cispo_cap=5.0)


# --- advantages ---

@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("G", [2, 8])
def test_equal_rewards_have_no_advantage_and_others_sum_to_none(scale, G):
    reward_PG = torch.full((3, G), 0.1)
    reward_PG[0] = torch.linspace(-1, 2, G)
    for leave_one_out in (False, True):
        advantage_PG = grpo.advantages(reward_PG, scale, leave_one_out)
        assert not advantage_PG[1:].any() and advantage_PG[0].sum().abs() < 1e-5 and advantage_PG[0, -1] > 0


def test_a_group_of_two_has_the_advantages_of_the_paper():
    low, high = grpo.advantages(torch.tensor([[0.0, 1.0]]))[0].tolist()
    assert high == -low == pytest.approx(0.5 / (math.sqrt(0.5) + 1e-4))     # Bessel's std of 0 and 1
    assert grpo.advantages(torch.tensor([[0.0, 1.0]]), "none", True)[0].tolist() == [-1, 1]


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2 answers, got group_size=1"):
        grpo.advantages(torch.ones(3, 1))


# --- losses ---

def case(A=6, L=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logp_AL = torch.randn(A, L, generator=generator, dtype=torch.float64) - 2
    mask_AL = torch.arange(L) < torch.randint(1, L + 1, (A, 1), generator=generator)
    advantage_A = torch.randn(A, generator=generator, dtype=torch.float64)
    return (logp_AL * mask_AL).requires_grad_(), mask_AL, advantage_A


@pytest.mark.parametrize("form", grpo.FORMS)
def test_on_policy_the_gradient_is_reinforce(form):
    """And not zero, though the loss is: with old log-probabilities equal to the new ones."""
    logp_AL, mask_AL, advantage_A = case()
    weights_AL = grpo.token_weights(mask_AL, form, 6, mask_AL.sum().item(), 5)
    ratio = grpo.ratios(logp_AL, logp_AL.detach(), mask_AL, form)
    assert torch.allclose(ratio, torch.ones_like(ratio))
    (grpo.policy_loss(logp_AL, ratio, advantage_A, form, **BOUNDS) * weights_AL).sum().backward()
    expected_AL = -advantage_A[:, None] * (mask_AL.double() / 6 if form == "rloo" else weights_AL)
    torch.testing.assert_close(logp_AL.grad, expected_AL)
    assert logp_AL.grad.abs().max() > 0.01


def test_on_policy_the_loss_is_minus_the_mean_advantage():
    logp_AL, mask_AL, advantage_A = case()
    ratio = grpo.ratios(logp_AL, logp_AL.detach(), mask_AL, "grpo")
    loss_AL = grpo.policy_loss(logp_AL, ratio, advantage_A, "grpo", **BOUNDS)
    loss = (loss_AL * grpo.token_weights(mask_AL, "grpo", 6, 0, 5)).sum()
    torch.testing.assert_close(loss, -advantage_A.mean())


@pytest.mark.parametrize("advantage, log_ratio, moves", [(1, 0.5, False), (1, -0.5, True), (1, 0.1, True),
                                                         (-1, -0.5, False), (-1, 0.5, True), (-1, -0.1, True)])
@pytest.mark.parametrize("form", ["grpo", "dr_grpo", "dapo", "bnpo", "gspo", "rloo"])
def test_a_ratio_is_clipped_on_the_right_side_of_each_advantage(form, advantage, log_ratio, moves):
    logp_AL = torch.tensor([[log_ratio - 2.0]], requires_grad=True)
    ratio = grpo.ratios(logp_AL, torch.tensor([[-2.0]]), torch.ones(1, 1, dtype=torch.bool), form)
    grpo.policy_loss(logp_AL, ratio, torch.tensor([float(advantage)]), form, **BOUNDS).sum().backward()
    assert bool(logp_AL.grad.any()) == moves


def test_cispo_bounds_the_weight_and_keeps_every_token():
    logp_AL = torch.tensor([[0.0, -1.0]], requires_grad=True)
    ratio = grpo.ratios(logp_AL, torch.tensor([[-3.0, -1.5]]), torch.ones(1, 2, dtype=torch.bool), "cispo")
    grpo.policy_loss(logp_AL, ratio, torch.tensor([2.0]), "cispo", 0.2, 0.2, 5.0).sum().backward()
    assert logp_AL.grad.tolist() == [[-10.0, pytest.approx(-2 * math.exp(0.5))]]


@pytest.mark.parametrize("form", grpo.FORMS)
def test_weights_do_not_depend_on_the_split_into_micro_batches(form):
    _, mask_AL, _ = case(8)
    tokens = mask_AL.sum().item()
    whole = grpo.token_weights(mask_AL, form, 8, tokens, 5)
    parts = [grpo.token_weights(mask, form, 8, tokens, 5) for mask in mask_AL.split(2)]
    torch.testing.assert_close(torch.cat(parts), whole)
    if form != "dr_grpo":
        assert whole.sum().item() == pytest.approx(1)


def test_a_truncated_answer_that_is_masked_divides_by_no_zero():
    mask_AL = torch.tensor([[True, True], [False, False]])
    for form in grpo.FORMS:
        weights_AL = grpo.token_weights(mask_AL, form, 2, 2, 5)
        assert weights_AL.isfinite().all() and not weights_AL[1].any()
        assert grpo.ratios(torch.zeros(2, 2), torch.zeros(2, 2), mask_AL, form).isfinite().all()


def test_the_soft_punishment_of_long_answers_is_the_papers():
    lengths = torch.tensor([1, 80, 85, 90, 100])
    assert grpo.overlong_penalty(lengths, 100, 20).tolist() == pytest.approx([0, 0, -0.25, -0.5, -1])


def test_correction_weights_are_truncated():
    old_AL, sampler_AL = torch.tensor([[0.0, -1.0]]), torch.tensor([[-3.0, -0.5]])
    mask_AL = torch.ones(1, 2, dtype=torch.bool)
    assert grpo.correction_weights(old_AL, sampler_AL, mask_AL, "token", 3.0).tolist() == [
        [3.0, pytest.approx(math.exp(-0.5))]]
    assert grpo.correction_weights(old_AL, sampler_AL, mask_AL, "sequence", 20.0).item() == pytest.approx(math.exp(2.5))


# --- KL: a policy over 8 tokens, whose expectations are exact sums ---

def policies(V=8):
    generator = torch.Generator().manual_seed(1)
    logits, reference = torch.randn(2, V, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), reference.log_softmax(-1)


def exact_kl(logits, reference):
    logp = logits.log_softmax(-1)
    return (logp.exp() * (logp - reference)).sum()


def test_k1_and_k3_have_the_kl_as_their_mean_and_k3_is_never_negative():
    logits, reference = policies()
    logp = logits.log_softmax(-1).detach()
    for kind in ("k1", "k3"):
        mean = (logp.exp() * grpo.kl_estimate(logp, reference, kind)).sum()
        torch.testing.assert_close(mean, exact_kl(logits, reference).detach())
    assert (grpo.kl_estimate(logp, reference, "k3") >= 0).all() and (grpo.kl_estimate(logp, reference, "k1") < 0).any()


def expected_gradient(kind, corrected):
    """Of the KL's term in the loss, over samples of the policy itself."""
    logits, reference = policies()
    logp = logits.log_softmax(-1)
    estimate = grpo.kl_estimate(logp, reference, kind)
    if corrected:
        estimate = estimate * (logp - logp.detach()).exp()
    (logp.exp().detach() * estimate).sum().backward()
    return logits.grad


@pytest.mark.parametrize("kind, corrected, right", [("k3", True, True), ("k1", True, True), ("k2", False, True),
                                                    ("k3", False, False), ("k1", False, False)])
def test_the_gradient_in_the_loss_is_the_kls_where_the_docs_say_so(kind, corrected, right):
    logits, reference = policies()
    exact_kl(logits, reference).backward()
    assert torch.allclose(expected_gradient(kind, corrected), logits.grad, atol=1e-9) == right


@pytest.mark.parametrize("kind, corrected", [("k3", True), ("k3", False), ("k1", True), ("k2", False)])
def test_a_step_on_the_kl_alone_lowers_it(kind, corrected):
    logits, reference = policies()
    before = exact_kl(logits, reference).item()
    after = exact_kl(logits.detach() - 0.1 * expected_gradient(kind, corrected), reference).item()
    assert after < before


# --- the script ---

TINY = ["--tasks=sorting", "--max_new_tokens=8", "--questions_per_step=4", "--group_size=6", "--device=cpu",
        "--dtype=fp32", "--eval_every=4", "--eval_questions=6", "--pass_k=2", "--samples=1", "--lr=0.01",
        "--warmup_steps=2", "--curves=false", "--max_steps=8"]


def call(*flags, ranks=1):
    launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  f"--nproc_per_node={ranks}"]
    return subprocess.run([*launch, "grpo.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random chat model with its tokenizer, and a reward that counts threes."""
    folder = tmp_path_factory.mktemp("grpo")
    tokenizer = Tokenizer.train(["Sort 3 1 2\nThink, then answer as digits. 1 2 3 4 5 6 7 8 9 0"] * 9, 300)
    torch.manual_seed(0)
    model = GPT(Config(384, n_layer=2, n_head=2, n_embd=32, context=96, eos_id=tokenizer.eot_id,
                       pad_id=tokenizer.pad_id))
    model.save(folder / "base")
    tokenizer.save(folder / "base")
    (folder / "mine.py").write_text("def threes(prompts, completions, answers, tasks):\n"
                                    "    return [c.count('3') + len(c) / 100 for c in completions]\n")
    return folder


def command(folder, out_dir, *flags):
    return [f"--init_from={folder}/base", f"--out_dir={out_dir}", f"--rewards={folder}/mine.py:threes", *TINY, *flags]


def run(folder, out_dir, *flags, **options):
    result = call(*command(folder, out_dir, *flags), **options)
    assert result.returncode == 0, result.stderr
    return result


def log(out_dir):
    timed = ("seconds", "time", "per_second")
    return [{name: value for name, value in json.loads(line).items() if not name.endswith(timed)}
            for line in open(os.path.join(out_dir, "log.jsonl"))]


def weights(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def assert_same(one, two, atol=0.0):
    a, b = weights(one), weights(two)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=name)


def test_a_learnable_reward_rises(folder, tmp_path):
    result = run(folder, tmp_path, "--max_steps=40", "--eval_every=20", "--questions_per_step=8", "--group_size=8")
    records = [record for record in log(tmp_path) if "reward" in record]
    first, last = (sum(r["reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert last > first + 1, (first, last)
    evaluated = [record for record in log(tmp_path) if "eval_reward" in record]
    assert [record["step"] for record in evaluated] == [0, 20, 40]
    assert evaluated[-1]["eval_reward"] > evaluated[0]["eval_reward"] + 1
    assert {"eval_accuracy/sorting", "eval_format/sorting", "eval_pass@2/sorting"} <= evaluated[0].keys()
    wanted = {"reward_std", "rewards/threes/mean", "rewards/threes/std", "frac_reward_zero_std", "entropy",
              "completions/mean_length", "completions/min_terminated_length", "completions/clipped_ratio",
              "clip_ratio/low_min", "clip_ratio/high_max", "clip_ratio/region_mean", "num_tokens",
              "sampling/sampling_logp_difference/max", "sampling/importance_sampling_ratio/min", "grad_norm", "loss"}
    assert wanted <= records[0].keys() and "kl" not in records[0]
    assert records[0]["sampling/sampling_logp_difference/max"] < 0.01 and records[0]["grad_norm"] > 0
    assert "answer: reward" in result.stdout and (tmp_path / "best" / "model.safetensors").exists()


OFTEN = ["--iterations=2", "--minibatches=2", "--beta=0.05", "--refill=1", "--truncated=mask", "--overlong=4",
         "--n_questions=16", "--by_difficulty=true", "--correction=token", "--clip_high=0.28"]


def test_a_run_killed_at_any_moment_resumes_bitwise(folder, tmp_path):
    run(folder, tmp_path / "whole", *OFTEN)
    process = subprocess.Popen([sys.executable, "grpo.py", *command(folder, tmp_path / "killed", *OFTEN)], cwd=ROOT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    state = tmp_path / "killed" / "resume" / "state.pt"
    while not state.exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)                 # at a step where nothing is evaluated
    process.wait()
    run(folder, tmp_path / "killed", *OFTEN, "--resume=true")
    assert log(tmp_path / "killed") == log(tmp_path / "whole")
    assert_same(tmp_path / "killed", tmp_path / "whole")
    assert "kl" in log(tmp_path / "whole")[1]


@pytest.mark.parametrize("flags", [[], ["--form=grpo", "--minibatches=2", "--beta=0.1", "--scale=batch"],
                                   ["--refill=2", "--truncated=mask"]], ids=str)
def test_two_ranks_with_small_micro_batches_equal_one(folder, tmp_path, flags):
    run(folder, tmp_path / "one", *flags)
    run(folder, tmp_path / "two", *flags, "--micro_questions=1", ranks=2)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert_same(tmp_path / "one", tmp_path / "two", atol=1e-4)


@pytest.mark.parametrize("form", ["dr_grpo", "bnpo", "cispo", "gspo", "rloo"])
def test_every_form_runs(folder, tmp_path, form):
    run(folder, tmp_path, f"--form={form}", "--max_steps=2", "--leave_one_out=true", "--scale=none", "--iterations=2",
        "--truncated=punish", "--kl_in=reward", "--beta=0.05", "--kl=k1", "--pass_k=0", "--correction=sequence")
    assert all(math.isfinite(value) for record in log(tmp_path) for value in record.values())


def test_adapters_off_are_the_reference(folder, tmp_path):
    run(folder, tmp_path, "--method=lora", "--beta=0.1", "--lr=0.05")
    records = [record for record in log(tmp_path) if "kl" in record]
    assert records[0]["kl"] == pytest.approx(0, abs=1e-6) and records[-1]["kl"] > 1e-5
    model = lora.load(GPT.load(str(folder / "base")), str(tmp_path / "adapter"))
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model.forward_hidden(ids), GPT.load(str(tmp_path)).forward_hidden(ids), atol=1e-4,
                               rtol=1e-4)


def test_without_signal_nothing_moves_and_advice_is_given_once(folder, tmp_path):
    result = run(folder, tmp_path, "--rewards=verifier=1", "--stuck_steps=3")
    assert result.stdout.count("all answers to a question earned the same") == 1
    assert_same(tmp_path, folder / "base")
    assert all(record["frac_reward_zero_std"] == 1 and "loss" not in record for record in log(tmp_path)
               if "reward" in record)


def test_a_collapse_of_the_entropy_is_said_once(folder, tmp_path):
    result = run(folder, tmp_path, "--collapse=0.9999", "--lr=0.03")
    assert result.stdout.count("the entropy collapsed") == 1


@pytest.mark.parametrize("flags, said", [
    (["--group_size=1"], "--group_size must be at least 2, got 1"), (["--form=ppo"], "form must be grpo, dr_grpo, "),
    (["--questions_per_step=3", "--minibatches=2"], "is not a multiple of minibatches * ranks"),
    (["--n_questions=3"], "sorting has 3 questions, fewer than the 4 of one step"),
    (["--max_new_tokens=90"], "lower max_new_tokens"), (["--temperature=0"], "temperature must be above 0"),
    (["--rewards=good"], "there is no reward 'good'"), (["--tasks=sortin"], "there is no task 'sortin'"),
    (["--rewards=wrong.py:f"], "no 'wrong.py'"), (["--init_from=nowhere"], "'nowhere' is not a model directory"),
    (["--overlong=20"], "more than the 8 tokens"), (["--by_difficulty=true"], "with n_questions")])
def test_bad_input_is_one_sentence(folder, tmp_path, flags, said):
    result = call(*command(folder, tmp_path / "bad", *flags))
    assert result.returncode == 1 and said in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("body, said", [("return [1.0]", "must return a list of 6 numbers"),
                                        ("raise KeyError('x')", "gave no number for any answer"),
                                        ("return [float('nan')] * len(completions)", "gave no number")])
def test_a_broken_reward_function_ends_in_one_sentence(folder, tmp_path, body, said):
    (tmp_path / "bad.py").write_text(f"def f(prompts, completions, answers, tasks):\n    {body}\n")
    result = call(*command(folder, tmp_path / "bad", f"--rewards={tmp_path}/bad.py:f"))
    assert result.returncode == 1 and said in result.stderr and len(result.stderr.strip().splitlines()) == 1
