"""reward.py: the loss in closed form, scores read by length, and the script end to end on a tiny task."""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import lora
import reward
from model import GPT, Config, ScalarHead
from packing import pack
from pairs import PairBatches, Pairs
from reward import bradley_terry, pair_scores
from tokenizer import Tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ["--pairs_per_step=8", "--device=cpu", "--dtype=fp32", "--eval_every=8", "--lr=0.005", "--warmup_steps=2",
        "--curves=false", "--max_steps=24"]
zeros = torch.zeros


# --- the loss ---

def test_equal_scores_cost_ln_2_and_the_chosen_answers_lead_lowers_it():
    assert bradley_terry(zeros(3), zeros(3), zeros(3)).tolist() == pytest.approx([math.log(2)] * 3)
    ahead, behind = (bradley_terry(torch.tensor([s]), zeros(1), zeros(1)).item() for s in (2.0, -2.0))
    assert ahead == pytest.approx(math.log1p(math.exp(-2))) and behind == pytest.approx(ahead + 2)


def test_a_margin_is_a_lead_that_is_asked_for():
    scores = torch.tensor([1.5]), torch.tensor([0.5]), torch.tensor([1.0])
    assert bradley_terry(*scores).item() == pytest.approx(math.log(2))


def test_centring_falls_on_the_sum_and_leaves_opposite_scores_alone():
    one, half = torch.ones(1), torch.full((1,), 0.5)
    assert torch.equal(bradley_terry(one, -one, zeros(1), 0.3), bradley_terry(one, -one, zeros(1)))
    shift = bradley_terry(one + half, one - half, zeros(1), 0.3) - bradley_terry(half, -half, zeros(1))
    assert shift.item() == pytest.approx(0.3 * 4)


def test_the_gradient_is_the_hand_derived_one():
    w, l, m = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w.requires_grad_(), l.requires_grad_()
    bradley_terry(w, l, m, 0.1).sum().backward()
    pull, centre = torch.sigmoid(l - w + m), 0.2 * (w + l)
    torch.testing.assert_close(w.grad, (centre - pull).detach())
    torch.testing.assert_close(l.grad, (centre + pull).detach())


def test_the_loss_is_finite_however_far_apart_the_scores_are():
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = bradley_terry(far, zeros(2), zeros(2))
    loss.sum().backward()
    assert loss.tolist() == [0, 1e4] and far.grad.tolist() == [0, -1]


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="three tensors of one shape"):
        bradley_terry(zeros(3), zeros(3, 1), zeros(3))


# --- scores ---

@pytest.fixture(scope="module")
def head():
    torch.manual_seed(0)
    head = ScalarHead(Config(64, n_layer=2, n_head=2, n_embd=16, context=64, eos_id=3, pad_id=3))
    for p in head.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.3)
    return head


# pad_id is 3, and the last token of most answers is it
GROUPS = [([5, 6, 7], [[8, 3], [9, 10, 11, 3]]), ([12, 3], [[3], [13, 14]]), (list(range(20, 40)), [[41, 3, 3], [42]])]


def test_scores_are_read_at_the_last_token_by_length_even_where_it_is_the_padding(head):
    chosen_P, rejected_P = pair_scores(head, pack(GROUPS))
    for pair, (prompt, answers) in zip(zip(chosen_P, rejected_P), GROUPS):
        for got, answer in zip(pair, answers):
            torch.testing.assert_close(got, head(torch.tensor([prompt + answer]))[0, -1], atol=1e-5, rtol=1e-5)


def test_a_score_depends_neither_on_the_batch_nor_on_padding_after_it(head):
    together = torch.stack(pair_scores(head, pack(GROUPS)), -1)
    for row, group in zip(together, GROUPS):
        torch.testing.assert_close(row[None], torch.stack(pair_scores(head, pack([group])), -1), atol=1e-5, rtol=1e-5)
        prompt, [answer, _] = group
        padded = head(torch.tensor([prompt + answer + [3] * 7]))[0, len(prompt + answer) - 1]
        torch.testing.assert_close(row[0], padded, atol=1e-5, rtol=1e-5)


def test_gradients_do_not_depend_on_how_the_pairs_are_split(head):
    def gradients(parts):
        head.zero_grad()
        for part in parts:
            losses_P = bradley_terry(*pair_scores(head, pack(part)), zeros(len(part)), 0.1)
            (losses_P.sum() / len(GROUPS)).backward()
        return [p.grad.clone() for p in head.parameters()]
    for a, b in zip(gradients([GROUPS]), gradients([[group] for group in GROUPS])):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# --- what is reported ---

def test_the_reliability_of_known_margins():
    found, error = reward.reliability([0.0, math.log(3), math.log(3), -math.log(3), math.log(3), 50.0])
    assert found == [(1, 0.5, 0.5), (4, pytest.approx(0.75), 0.75), (1, pytest.approx(1), 1)]
    assert error == pytest.approx(0, abs=1e-9)
    _, error = reward.reliability([-50.0, 50.0])            # sure, and wrong in one of two
    assert error == pytest.approx(0.5)


def test_accuracies_are_of_their_source_and_pairs_of_one_prompt_count_together():
    pairs = SimpleNamespace(sources=["a", "b", "a", "a", "b"], prompts=[[1], [2], [1], [3], [4]])
    right = reward.by_source([1, 0, 1, 0], pairs)           # of the first four
    assert right["a"][0] == pytest.approx(2 / 3) and right["a"][2] == 3 and right["b"][2] == 1
    assert right[""][0] == 0.5 and right[""][2] == 4 and math.isnan(right["b"][1])
    assert right["a"][1] == pytest.approx(math.sqrt(2 * 2 * (2 / 3) ** 2) / 3)      # two groups, sums of 2/3 and -2/3


def test_the_longer_answer_wins_half_of_equal_lengths():
    pairs = SimpleNamespace(chosen=[[1, 2], [1], [1], [1]], rejected=[[1], [1, 2], [2], [2]])
    assert reward.longer_wins(pairs, 3).tolist() == [1, 0, 0.5]


def test_metrics_have_trls_names_and_equal_scores_are_not_right():
    metrics = reward.reward_metrics(torch.tensor([[1.0, 0.0], [2.0, 2.0], [-1.0, 4.0]]))
    assert {name: value.item() for name, value in metrics.items()} == dict(
        accuracy=pytest.approx(1 / 3), margin=pytest.approx(-4 / 3), min_reward=-1, mean_reward=pytest.approx(8 / 6),
        max_reward=4)


# --- the script ---

def call(script, *flags, ranks=1):
    launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  f"--nproc_per_node={ranks}"]
    return subprocess.run([*launch, script, *flags], cwd=ROOT, capture_output=True, text=True, timeout=90,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def row(generator, margin):
    digits = [generator.choice("0123456789") for _ in range(4)]
    wrong = sorted(digits, reverse=True) + ["9"] * generator.randint(0, 1)
    answers = {name: [{"role": "assistant", "content": "".join(answer)}]
               for name, answer in (("chosen", sorted(digits)), ("rejected", wrong))}
    return {"prompt": [{"role": "user", "content": f"Sort {''.join(digits)}"}], **answers,
            "source": generator.choice(["first", "second"]), **({"margin": generator.random()} if margin else {})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random base model with its tokenizer, and pairs, with margins and without."""
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = Tokenizer.train(["Sort 3 1 2\nThink, then answer as digits. 1 2 3 4 5 6 7 8 9 0"] * 9, 300)
    torch.manual_seed(0)
    model = GPT(Config(384, n_layer=2, n_head=2, n_embd=32, context=64, eos_id=tokenizer.eot_id))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.15)
    model.save(folder / "base")
    tokenizer.save(folder / "base")
    for name, margin in ("pairs", False), ("margins", True):
        (folder / name).mkdir()
        generator = random.Random(name)
        for split, count in ("train", 120), ("val", 30):
            rows = [row(generator, margin) for _ in range(count)]
            rows = [r for r in rows if r["chosen"][0]["content"] != r["rejected"][0]["content"]]
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def command(folder, out_dir, *flags):
    return [f"--data={folder}/pairs", f"--init_from={folder}/base", f"--out_dir={out_dir}", *TINY, *flags]


def run(folder, out_dir, *flags, **options):
    return call("reward.py", *command(folder, out_dir, *flags), **options)


def log(out_dir):
    return [json.loads(line) for line in open(os.path.join(out_dir, "log.jsonl"))]


def losses(out_dir):
    return {record["step"]: record["loss"] for record in log(out_dir) if "loss" in record}


def evaluations(out_dir):
    return [record for record in log(out_dir) if "eval_loss" in record]


def weights(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The uninterrupted run that others are compared with."""
    out_dir = tmp_path_factory.mktemp("out") / "whole"
    result = run(folder, out_dir, "--curves=true")
    assert result.returncode == 0, result.stderr
    return out_dir, result


def test_it_learns_which_answer_is_preferred(whole):
    out_dir, result = whole
    first, *_, last = evaluations(out_dir)
    assert [record["step"] for record in evaluations(out_dir)] == [0, 8, 16, 24]
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=0.05)           # the new score layer is small
    assert last["eval_accuracy"] > 0.9 and last["eval_loss"] < 0.3 and last["eval_margin"] > 1
    assert set(log(out_dir)[1]) >= {"loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward",
                                    "num_tokens", "grad_norm", "learning_rate", "epoch", "skipped_updates"}
    assert set(last) >= {"eval_accuracy/first", "eval_accuracy_stderr/second", "eval_accuracy_stderr",
                         "eval_std_reward", "eval_calibration_error", "eval_min_reward"}
    assert "eval_longer_wins/first" in first and "eval_longer_wins" not in last
    assert "ranked rightly  longer answer wins" in result.stdout and "calibration error" in result.stdout
    assert (out_dir / "calibration.png").exists() and (out_dir / "curves.png").exists()
    assert (out_dir / "best" / "model.safetensors").exists()


def test_the_saved_bias_gives_held_out_reference_answers_the_mean_zero(folder, whole):
    rows = [json.loads(line) for line in open(folder / "pairs" / "val.jsonl")]
    chosen, rejected = (reward.score(str(whole[0]), [r["prompt"] + r[side] for r in rows], device="cpu")
                        for side in ("chosen", "rejected"))
    assert abs(chosen.mean()) < 1e-5 and ScalarHead.load(str(whole[0])).bias
    last = evaluations(whole[0])[-1]
    assert (chosen > rejected).float().mean().item() == pytest.approx(last["eval_accuracy"])
    assert (chosen - rejected).mean().item() == pytest.approx(last["eval_margin"], abs=1e-5)


def test_what_is_saved_pads_with_another_token_than_the_one_scored(folder, whole):
    tokenizer, config = Tokenizer.load(str(whole[0])), ScalarHead.load(str(whole[0])).config
    assert GPT.load(str(folder / "base")).config.pad_id is None
    assert config.pad_id not in (None, tokenizer.chat_end_id)


def test_a_run_killed_at_any_moment_resumes_bitwise(folder, whole, tmp_path):
    out_dir = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "reward.py", *command(folder, out_dir, "--curves=true")], cwd=ROOT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while not (out_dir / "resume" / "state.pt").exists() or len(open(out_dir / "log.jsonl").readlines()) < 11:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = run(folder, out_dir, "--curves=true", "--resume=true")
    assert result.returncode == 0, result.stderr
    assert losses(out_dir) == losses(whole[0]) and evaluations(out_dir) == evaluations(whole[0])
    a, b = weights(out_dir), weights(whole[0])
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert ScalarHead.load(str(out_dir)).bias == ScalarHead.load(str(whole[0])).bias


def test_a_run_stopped_between_evaluations_saves_the_bias_of_the_last_one_even_after_resuming(folder, tmp_path):
    out_dir, flags = tmp_path / "stopped", ["--max_steps=100000", "--eval_every=100000", "--epochs=0"]
    for resume in ("false", "true"):
        before = len(log(out_dir)) if resume == "true" else 0
        process = subprocess.Popen([sys.executable, "reward.py", *command(folder, out_dir, *flags),
                                    f"--resume={resume}"], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while not os.path.exists(out_dir / "log.jsonl") or len(open(out_dir / "log.jsonl").readlines()) <= before + 2:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode == 0
    [first] = evaluations(out_dir)
    bias, model = ScalarHead.load(str(out_dir)).bias, ScalarHead.load(str(out_dir / "best"))
    assert first["step"] == 0 and bias == model.bias != 0 and len(losses(out_dir)) > 2


def test_two_ranks_that_accumulate_equal_one_that_does_not(folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--max_steps=8", "--eval_pairs=9"]             # of the last round of evaluation one rank gets nothing
    assert run(folder, one, *flags).returncode == 0
    begun = run(folder, two, *flags, "--micro_pairs=1", ranks=2)
    assert begun.returncode == 0, begun.stderr
    for a, b in zip(log(one), log(two), strict=True):
        for name in a.keys() - {"tokens_per_second", "pairs_per_second"}:
            assert b[name] == pytest.approx(a[name], abs=2e-4, rel=1e-3), (name, a["step"])
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(two)[name], atol=2e-5, rtol=0)


def test_a_pairs_own_margin_enters_the_loss(folder, tmp_path):
    flags = [f"--data={folder}/margins", "--max_steps=1", "--centering=0"]
    assert run(folder, tmp_path / "plain", *flags).returncode == 0
    assert run(folder, tmp_path / "margin", *flags, "--margin_weight=5").returncode == 0
    tokenizer = Tokenizer.load(str(folder / "base"))
    batches = PairBatches(folder / "margins", "train", 8, 8, 64, 1337, tokenizer=tokenizer)
    [wanted] = losses(tmp_path / "margin").values()
    torch.manual_seed(1337)
    scores = pair_scores(ScalarHead.begin(str(folder / "base")), batches.pairs.packed(batches(0, 0)))
    margins = 5 * batches.pairs.margins[batches(0, 0)]
    assert wanted == pytest.approx(bradley_terry(*scores, margins).mean().item(), abs=0.05)
    assert wanted > losses(tmp_path / "plain")[0] + 0.5


def test_adapters_and_the_score_layer_train_and_what_is_saved_is_merged(folder, tmp_path):
    flags, out_dir = ["--method=lora", "--lr=0.02"], tmp_path / "lora"
    result = run(folder, out_dir, *flags)
    assert result.returncode == 0, result.stderr
    assert evaluations(out_dir)[-1]["eval_accuracy"] > 0.8
    before, merged = weights(folder / "base"), ScalarHead.load(str(out_dir))
    model = lora.load(ScalarHead.begin(str(folder / "base")), str(out_dir / "adapter"))
    model.score.weight.data = merged.score.weight.data
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model(ids), merged(ids), atol=1e-5, rtol=1e-5)
    after = weights(out_dir)
    same = {name for name in after if name in before and torch.equal(after[name], before[name])}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= same
    assert not any("proj" in name for name in same)
    assert after["score.weight"].abs().mean() > 0.02        # it began with 0.008
    resumed = run(folder, out_dir, *flags, "--resume=true")
    assert resumed.returncode == 0, resumed.stderr


def test_training_goes_on_from_a_reward_model(folder, whole, tmp_path):
    result = run(folder, tmp_path / "on", f"--init_from={whole[0]}", "--max_steps=1", "--optimizer=muon")
    assert result.returncode == 0, result.stderr
    first = evaluations(tmp_path / "on")[0]
    assert first["eval_loss"] == pytest.approx(evaluations(whole[0])[-1]["eval_loss"], abs=1e-6)


def test_a_reward_model_is_no_policy_and_the_other_way_round(folder, whole):
    with pytest.raises(ValueError, match="holds a reward model .Qwen3ForSequenceClassification. where a language"):
        GPT.load(str(whole[0]))
    with pytest.raises(ValueError, match="holds a language model .Qwen3ForCausalLM. where a reward model"):
        reward.score(str(folder / "base"), [])
    result = call("sft.py", f"--init_from={whole[0]}", "--out_dir=/nowhere/x")
    assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_every_held_out_pair_is_scored_once_in_its_place(folder, whole):
    model, tokenizer = ScalarHead.load(str(whole[0])), Tokenizer.load(str(whole[0]))
    pairs = Pairs(folder / "pairs", "val", tokenizer, 64)
    one = SimpleNamespace(rank=0, world_size=1, device="cpu", total=lambda x: x)
    at_once, singly = (reward.evaluate(model, pairs, micro, 0, one) for micro in (100, 1))
    torch.testing.assert_close(at_once, singly, atol=1e-5, rtol=1e-5)
    assert len(singly) == len(pairs) and singly.unique().numel() > len(pairs)


@pytest.mark.parametrize("flags, said", [
    (["--method=head"], "method must be full or lora"), (["--epochs=0", "--max_steps=0"], "nothing to do"),
    (["--context=500"], "is longer than the 64 tokens"), (["--pairs_per_step=6", "--micro_pairs=4"], "not a multiple"),
    (["--pairs_per_step=1000"], "fewer than one step"), (["--margin_weight=1"], "no pair in"),
    (["--centering=-1"], "centering must be at least 0"), (["--method=lora", "--optimizer=muon"], "trains with adamw"),
    (["--data=nowhere"], "there is no nowhere/train.jsonl"), (["--init_from=nowhere"], "'nowhere' is not a model")])
def test_bad_input_is_one_sentence(folder, tmp_path, flags, said):
    result = run(folder, tmp_path / "bad", *flags)
    assert result.returncode == 1 and said in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
