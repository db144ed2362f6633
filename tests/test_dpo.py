"""dpo.py: losses in closed form and finite everywhere; end to end on a tiny task it learns which answer is preferred,
resumes exactly, and neither ranks, micro-batches nor a stored reference change anything."""
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

import dpo
import lora
import reference
from model import GPT, Config, ScalarHead
from packing import pack
from pairs import Thumbs
from tokenizer import Tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ["--pairs_per_step=8", "--device=cpu", "--dtype=fp32", "--eval_every=6", "--eval_pairs=10", "--samples=1",
        "--lr=0.003", "--warmup_steps=2", "--curves=false", "--max_steps=18"]
OPTIONS = dict(beta=0.1, label_smoothing=0.0, simpo_gamma=0.5, discopop_tau=0.05, desirable_weight=1.0,
               undesirable_weight=1.0)
PAIRED = [name for name in dpo.LOSSES if name != "kto"]


# --- the losses ---

def value(name, logp_A, ref_A, n_A=None, **options):
    """The sum of a loss over answers that are chosen, rejected, chosen, ..."""
    n_A = torch.full_like(logp_A, 3) if n_A is None else n_A
    label_A = torch.tensor([True, False] * (len(logp_A) // 2))
    return dpo.loss_sum({name: 1.0}, logp_A, ref_A, n_A, label_A, 0.0, {**OPTIONS, **options})


@pytest.mark.parametrize("name, expected", [
    ("sigmoid", math.log(2)), ("sigmoid_norm", math.log(2)), ("robust", math.log(2)), ("hinge", 1), ("apo_zero", 1),
    ("ipo", 1 / (4 * 0.1 ** 2)), ("sppo", 2 * 25), ("nca", 2 * math.log(2)), ("bco", 2 * math.log(2)), ("apo_down", 1),
    ("kto", 2 * 0.5), ("discopop", (math.log(2) + 1) / 2)])
def test_where_policy_and_reference_agree_the_loss_is_the_closed_form(name, expected):
    logp_A = -10 * torch.rand(6, dtype=torch.float64)
    assert value(name, logp_A, logp_A).item() / 3 == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in dpo.LOSSES if name != "discopop"])
def test_the_gradient_raises_chosen_above_rejected(name):
    logp_A = torch.full((2,), -5.0, dtype=torch.float64, requires_grad=True)
    value(name, logp_A, logp_A.detach()).backward()
    assert logp_A.grad[0] - logp_A.grad[1] < 0


def test_discopop_has_its_papers_bump_at_zero_and_raises_chosen_on_either_side():
    margin = torch.tensor([-10.0, 0.0, 10.0], dtype=torch.float64, requires_grad=True)
    dpo.discopop(margin, torch.zeros(3), 0.1).sum().backward()
    assert (margin.grad < 0).tolist() == [True, False, True]


def test_swapping_chosen_and_rejected_flips_the_margin():
    logp_A, ref_A = -10 * torch.rand(2, 6, dtype=torch.float64)
    swapped = [x.view(-1, 2).flip(1).flatten() for x in (logp_A, ref_A)]
    a, b = dpo.scores("ratios", logp_A, ref_A, None)
    c, d = dpo.scores("ratios", *swapped, None)
    torch.testing.assert_close(a - b, d - c)


def test_the_gradient_of_sigmoid_is_the_papers():
    a, b = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    da, db = torch.autograd.grad(dpo.sigmoid(a, b, 0.3).sum(), (a, b))
    expected = -0.3 * torch.sigmoid(0.3 * (b - a)).detach()             # section 4, "What does the DPO update do?"
    torch.testing.assert_close(da, expected)
    torch.testing.assert_close(db, -expected)


def test_the_gradient_of_kto_is_the_hand_derived_one():
    ratio = torch.randn(6, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([True, False, False, True, True, False])
    dpo.kto(ratio, label, 0.7, 0.3, 1.5, 0.5).sum().backward()
    s = torch.sigmoid(0.3 * (ratio.detach() - 0.7))
    torch.testing.assert_close(ratio.grad, torch.where(label, -1.5, 0.5) * 0.3 * s * (1 - s))


def test_smoothing_zero_is_plain_and_half_has_no_preference():
    a, b = torch.randn(2, 5, dtype=torch.float64)
    assert torch.equal(dpo.robust(a, b, 0.1), dpo.sigmoid(a, b, 0.1))
    torch.testing.assert_close(dpo.sigmoid(a, b, 0.1, 0.5), dpo.sigmoid(b, a, 0.1, 0.5))


def test_sigmoid_takes_sums_and_ipo_means():
    """Mistake 17: answers of other lengths, where the two disagree about which is better."""
    logp_A, n_A = torch.tensor([-6.0, -5.0]), torch.tensor([6, 2])
    assert value("sigmoid", logp_A, torch.zeros(2), n_A) > math.log(2)          # -6 < -5
    assert value("sigmoid_norm", logp_A, torch.zeros(2), n_A) < math.log(2)     # -1 > -2.5
    assert value("ipo", logp_A, torch.zeros(2), n_A).item() == pytest.approx((1.5 - 5) ** 2)


def test_simpos_margin_is_not_multiplied_by_beta_and_its_sft_term_is_off():
    a, b = torch.tensor([-1.0]), torch.tensor([-1.5])
    expected = -torch.nn.functional.logsigmoid(2.0 * (a - b) - 0.5)             # mistake 21
    torch.testing.assert_close(dpo.simpo(a, b, 2.0, 0.5), expected)
    assert dpo.read_losses("simpo") == ({"simpo": 1.0}, 0.0)
    assert dpo.read_losses("dpo=1,ipo=.5") == ({"sigmoid": 1.0, "ipo": 0.5}, 0.1)


@pytest.mark.parametrize("x", [-1e-8, -1e-3, -0.6931, -0.6932, -50.0, -1e4])
def test_log1mexp_and_its_gradient_are_right_at_both_ends(x):
    single = torch.tensor(x, requires_grad=True)
    double = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    exact = torch.log(-torch.expm1(double))
    for tensor, result in ((single, dpo.log1mexp(single)), (double, exact)):
        result.backward()
        assert tensor.grad.isfinite()
    assert dpo.log1mexp(single).item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-12)
    assert single.grad.item() == pytest.approx(double.grad.item(), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("name", dpo.LOSSES)
@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("pairs", [1, 4])
def test_every_loss_and_gradient_is_finite_everywhere(name, n, pairs):
    extremes = [-1e-8, -1e4, -1.0]
    for chosen in extremes:
        for rejected in extremes:
            for ref_A in (torch.full((2 * pairs,), -1e-8), torch.full((2 * pairs,), -1e4)):
                logp_A = torch.tensor([chosen, rejected] * pairs, requires_grad=True)
                loss = value(name, logp_A, ref_A, torch.full((2 * pairs,), n))
                loss.backward()
                assert loss.isfinite() and logp_A.grad.isfinite().all(), (chosen, rejected, ref_A)


def test_kto_is_finite_where_all_are_desirable():
    ratio = torch.randn(4, requires_grad=True)
    dpo.kto(ratio, torch.ones(4, dtype=torch.bool), 0.0, 0.1).mean().backward()
    assert ratio.grad.isfinite().all() and (ratio.grad < 0).all()


def test_orpo_has_a_gradient_in_both_of_its_terms():
    mean = torch.tensor([-0.5, -1.0], requires_grad=True)
    dpo.orpo(mean[:1], mean[1:], 0.1).sum().backward()
    assert mean.grad[0] < 0 < mean.grad[1]                                      # mistake 20


# --- the pieces of a step ---

def tiny_model(seed=0, **shape):
    torch.manual_seed(seed)
    model = GPT(Config(**dict(vocab_size=384, n_layer=2, n_head=2, n_embd=32, context=128, eos_id=0, pad_id=1) | shape))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.1)
    return model


GROUPS = [([5, 6, 7], [[8, 9, 2], [8, 2]]), ([5], [[3], [4, 4, 4, 2]])]


def test_orpos_nll_is_over_prompts_and_chosen_answers_each_token_once():
    model, packed = tiny_model(), pack(GROUPS)
    nll = model(packed.ids, dpo.texts(packed), **packed.layout)
    rejected = packed.by_answer(nll).sum(1)[1::2].sum()
    total = sum(model(torch.tensor([prompt + chosen])[:, :-1], torch.tensor([prompt + chosen])[:, 1:]).sum()
                for prompt, (chosen, _) in GROUPS)
    torch.testing.assert_close(nll.sum() - rejected, total)


def test_mismatched_answers_are_the_previous_rows_rolled_not_reversed():
    thumbs = Thumbs.__new__(Thumbs)
    thumbs.prompts, thumbs.completions = [[1], [2, 2], [3]], [[11], [12] * 9, [13]]
    groups = thumbs.mismatched([0, 1, 2], [0, 1, 2], 4)
    assert groups == [([1], [[13]]), ([2, 2], [[11]]), ([3], [[12] * 3])]       # the last one cut to the context


def test_mean_logits_are_the_mean_over_the_vocabulary():
    model = tiny_model()
    lora.add(model, 2, 4.0, "lm_head")
    torch.nn.init.normal_(model.lm_head.lora_B)
    hidden = torch.randn(1, 7, 32)
    torch.testing.assert_close(dpo.mean_logits(model, hidden), model.logits(hidden).mean(-1))


def test_the_loss_begins_at_ln_2_exactly_with_dropout_in_the_adapters():
    """Mistake 14: policy and reference are the same function, to the bit."""
    model = lora.add(tiny_model(), 4, 8.0, "all", dropout=0.5)
    packed = pack(GROUPS)
    logp_A = -packed.by_answer(model(packed.ids, packed.targets, want_entropy=True, **packed.layout)[0]).sum(1)
    with lora.disabled(model):
        ref_A = dpo.answer_logps(model, packed)
    assert not ref_A.requires_grad and not dpo.answer_logps(reference.frozen_copy(model), packed).requires_grad
    assert value("sigmoid", logp_A, ref_A).item() == 2 * torch.tensor(2.0).log().item()
    assert torch.equal(dpo.answer_logps(model, packed), dpo.answer_logps(model, packed))


# --- end to end ---

def call(script, *flags, ranks=1, **options):
    launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  f"--nproc_per_node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, script, *flags], cwd=ROOT, capture_output=True, text=True, env=env, timeout=180,
                          **options)


def write(folder, rows):
    os.makedirs(folder)
    for split, part in ("train", rows[:-12]), ("val", rows[-12:]):
        with open(folder / f"{split}.jsonl", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in part)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with its tokenizer; pairs whose chosen answer says the number once, and the same as thumbs."""
    folder = tmp_path_factory.mktemp("dpo")
    tokenizer = Tokenizer.train(["Say 3 1 2\nuser assistant 1 2 3 4 5 6 7 8 9 0 yes no"] * 9, 300)
    tiny_model(eos_id=tokenizer.eot_id, pad_id=tokenizer.pad_id).save(folder / "sft")
    tokenizer.save(folder / "sft")
    say = lambda text: [{"role": "assistant", "content": text}]
    rows = [dict(prompt=[{"role": "user", "content": f"Say {i}"}], source="numbers") for i in range(60)]
    write(folder / "pairs", [dict(row, chosen=say(f"{i}"), rejected=say(f"{i} {i} no"))
                             for i, row in enumerate(rows)])
    write(folder / "thumbs", [dict(row, completion=say(f"{i}" if i % 3 else f"{i} {i} no"), label=i % 3 > 0)
                              for i, row in enumerate(rows)])
    return folder


def command(folder, out_dir, *flags):
    return [f"--data={folder}/pairs", f"--init_from={folder}/sft", f"--out_dir={out_dir}", *TINY, *flags]


def run(folder, out_dir, *flags, **options):
    return call("dpo.py", *command(folder, out_dir, *flags), **options)


def log(out_dir):
    return [json.loads(line) for line in open(os.path.join(out_dir, "log.jsonl"))]


def steps(out_dir, *names):
    return [{name: record[name] for name in names or record if name != "pairs_per_second"}
            for record in log(out_dir) if "loss" in record]


def losses(out_dir):
    return [record["loss"] for record in steps(out_dir)]


def weights(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The uninterrupted run that others are compared with."""
    out_dir = tmp_path_factory.mktemp("out") / "whole"
    result = run(folder, out_dir, "--eval_tasks=sorting", "--eval_questions=4", "--curves=true", "--sft_weight=0")
    assert result.returncode == 0, result.stderr
    return out_dir, result


def test_it_learns_which_answer_is_preferred(whole):
    out_dir, result = whole
    first, last = steps(out_dir)[0], steps(out_dir)[-1]
    assert first["loss"] == torch.tensor(2.0).log().item() and first["rewards/accuracies"] == 0
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0            # policy still equals reference
    assert last["loss"] < 0.3 and last["rewards/accuracies"] == 1 and last["rewards/margins"] > 1
    evaluated = [record for record in log(out_dir) if "eval_loss" in record]
    assert [record["step"] for record in evaluated] == [0, 6, 12, 18]
    assert evaluated[0]["eval_loss"] == pytest.approx(math.log(2)) and evaluated[-1]["eval_rewards/accuracies"] == 1
    assert 0 <= evaluated[-1]["eval_accuracy/sorting"] <= evaluated[-1]["eval_format/sorting"] <= 1
    assert "sample: <|im_start|>user" in result.stdout and "talk to it: python chat.py" in result.stdout
    assert (out_dir / "curves.png").exists() and (out_dir / "best" / "model.safetensors").exists()


def test_a_run_killed_at_any_moment_resumes_bitwise(folder, whole, tmp_path):
    out_dir = tmp_path / "killed"
    flags = ["--eval_tasks=sorting", "--eval_questions=4", "--curves=true", "--sft_weight=0"]
    process = subprocess.Popen([sys.executable, "dpo.py", *command(folder, out_dir, *flags)], cwd=ROOT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while not (out_dir / "resume" / "state.pt").exists() or len(open(out_dir / "log.jsonl").readlines()) < 9:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = run(folder, out_dir, *flags, "--resume=true")
    assert result.returncode == 0, result.stderr
    assert steps(out_dir) == steps(whole[0])
    assert [r for r in log(out_dir) if "eval_loss" in r] == [r for r in log(whole[0]) if "eval_loss" in r]
    a, b = weights(out_dir), weights(whole[0])
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("flags", [["--method=lora", "--lr=0.01"], ["--loss=orpo"],
                                   ["--loss=kto", "--data={folder}/thumbs", "--sft_weight=0.1"]])
def test_two_ranks_that_accumulate_equal_one_that_does_not(folder, tmp_path, flags):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [flag.format(folder=folder) for flag in flags] + ["--max_steps=5"]
    alone = run(folder, one, *flags)
    assert alone.returncode == 0, alone.stderr
    both = run(folder, two, *flags, "--micro_pairs=2", ranks=2)
    assert both.returncode == 0, both.stderr
    for a, b in zip(log(one), log(two)):
        a, b = ({name: x for name, x in record.items() if name not in ("pairs_per_second", "num_tokens")}
                for record in (a, b))
        assert b == pytest.approx(a, rel=2e-4, abs=2e-5)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(two)[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("loss", [name for name in dpo.LOSSES if name != "sigmoid"])
def test_every_loss_trains(folder, tmp_path, loss, monkeypatch):
    in_process(folder, tmp_path, monkeypatch, loss=loss, max_steps=6, lr=0.003)
    records = steps(tmp_path)
    assert all(math.isfinite(x) for record in records for x in record.values())
    held_out = [record["eval_loss"] for record in log(tmp_path) if "eval_loss" in record]
    assert held_out[-1] < held_out[0]


def in_process(folder, out_dir, monkeypatch, **changes):
    """dpo.main with options changed, in this process."""
    flags = dict(flag[2:].split("=") for flag in command(folder, out_dir))
    given = {name: type(getattr(dpo, name))(value) if name != "curves" else False for name, value in flags.items()}
    given |= dict(overwrite=True) | changes
    for name, value in given.items():
        monkeypatch.setattr(dpo, name, value)
    names = [name for name, value in vars(dpo).items() if type(value) in (str, int, float, bool) and name[0] != "_"]
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        dpo.main({name: getattr(dpo, name) for name in names})
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def test_the_frozen_reference_is_bitwise_unchanged(folder, tmp_path, monkeypatch):
    copies, make = [], reference.frozen_copy
    monkeypatch.setattr(reference, "frozen_copy", lambda model: copies.append(make(model)) or copies[0])
    in_process(folder, tmp_path, monkeypatch, max_steps=6)
    [frozen], before, after = copies, weights(folder / "sft"), weights(tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.state_dict().items())
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_adapters_train_beside_a_reference_that_stays(folder, tmp_path):
    result = run(folder, tmp_path / "lora", "--method=lora", "--lr=0.02")
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "lora")[0] == pytest.approx(0.1 * steps(tmp_path / "lora")[0]["nll_loss"] + math.log(2))
    assert steps(tmp_path / "lora")[-1]["rewards/accuracies"] == 1
    state = torch.load(tmp_path / "lora" / "resume" / "state.pt", weights_only=True)["model"]
    assert all(torch.equal(state[name], tensor) for name, tensor in weights(folder / "sft").items())
    merged, model = GPT.load(str(tmp_path / "lora")), GPT.load(str(folder / "sft"))
    lora.load(model, str(tmp_path / "lora" / "adapter"))
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model.forward_hidden(ids), merged.forward_hidden(ids), atol=1e-5, rtol=1e-5)


def test_a_stored_reference_changes_nothing_and_serves_this_model_and_data_alone(folder, whole, tmp_path):
    flags = ["--reference=stored", f"--reference_dir={tmp_path}/ref", "--sft_weight=0"]
    first = run(folder, tmp_path / "a", *flags, "--micro_pairs=1", ranks=2)
    assert first.returncode == 0, first.stderr
    assert losses(tmp_path / "a") == pytest.approx(losses(whole[0]), abs=1e-4)
    again = run(folder, tmp_path / "b", *flags)
    assert again.returncode == 0 and "computing the reference" not in again.stdout
    other = run(folder, tmp_path / "c", *flags, f"--init_from={tmp_path}/a")
    assert other.returncode == 1 and "is of other weights" in other.stderr, other.stderr
    other = run(folder, tmp_path / "c", *flags, "--context=8")
    assert other.returncode == 1 and "is of other data" in other.stderr, other.stderr


def test_what_is_displaced_is_said():
    began = {"logps/chosen": -10.0, "rewards/margins": 0.0}
    assert dpo.displaced(began, {"eval_logps/chosen": -12.0, "eval_rewards/margins": 0.5})
    assert not dpo.displaced(began, {"eval_logps/chosen": -10.1, "eval_rewards/margins": 0.5})
    assert not dpo.displaced(began, {"eval_logps/chosen": -12.0, "eval_rewards/margins": -0.5})
    assert not dpo.displaced(began, {"eval_logps/chosen": -12.0})


@pytest.mark.parametrize("flags, said", [
    (["--loss=dop"], "there is no loss 'dop'; there are sigmoid, "), (["--loss=kto=1,ipo=1"], "kto stands alone"),
    (["--label_smoothing=0.1", "--loss=hinge"], "--label_smoothing=0.1 must be"), (["--beta=0"], "--beta must be"),
    (["--loss=robust", "--label_smoothing=0.5"], "below 0.5"), (["--sft_weight=-0.5"], "--sft_weight must be"),
    (["--reference=mine"], "reference must be"), (["--reference=stored", "--loss=simpo"], "reference must be auto"),
    (["--loss=kto", "--pairs_per_step=1"], "must be at least 2"), (["--method=head"], "method must be full or lora"),
    (["--data={}/thumbs"], "needs pairs"), (["--pairs_per_step=99"], "fewer than one step"),
    (["--data=nowhere"], "there is no nowhere/train.jsonl"), (["--init_from={}/reward"], "is a reward model"),
    (["--epochs=0", "--max_steps=0"], "nothing to do"),
    (["--eval_tasks=sortin"], "eval_tasks names 'sortin'"), (["--context=500"], "is longer than the 128 tokens"),
    (["--pairs_per_step=6", "--micro_pairs=4"], "is not a multiple of")])
def test_bad_input_is_one_sentence(folder, tmp_path, monkeypatch, flags, said):
    if not (folder / "reward").exists():
        ScalarHead(GPT.load(str(folder / "sft")).config).save(folder / "reward")
    given = dict(flag.format(folder)[2:].split("=", 1) for flag in flags)
    with pytest.raises((SystemExit, ValueError)) as error:      # configure prints either without a traceback
        in_process(folder, tmp_path / "bad", monkeypatch,
                   **{name: type(getattr(dpo, name))(value) for name, value in given.items()})
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_refusal_ends_the_script_without_a_traceback(folder, tmp_path):
    result = run(folder, tmp_path / "bad", "--loss=dop")
    assert result.returncode == 1 and "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1
