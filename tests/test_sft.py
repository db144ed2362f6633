"""sft.py end to end on a tiny task: it learns, resumes exactly, ranks and packing change nothing, mistakes are said."""
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import h5py
import pytest
import torch
from safetensors.torch import load_file

import engine
import formats
import lora
import sft
from chats import ChatBatches, Chats, fixed_chats, prepare
from model import GPT, Config
from rollouts import answer_text
from tokenizer import Tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ["--context=96", "--rows_per_step=4", "--device=cpu", "--dtype=fp32", "--eval_every=6", "--eval_examples=20",
        "--samples=1", "--lr=0.01", "--warmup_steps=2", "--curves=false", "--max_steps=18"]


def call(script, *flags, ranks=1, **options):
    launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  f"--nproc_per_node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, script, *flags], cwd=ROOT, capture_output=True, text=True, env=env, timeout=90,
                          **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random base model with its tokenizer; chats of a task, each of which fills a row; ragged, several to a row."""
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = Tokenizer.train(["Sort 3 1 2\nThink, then answer as digits. 1 2 3 4 5 6 7 8 9 0"] * 9, 300)
    torch.manual_seed(0)
    model = GPT(Config(384, n_layer=2, n_head=2, n_embd=32, context=128, eos_id=tokenizer.eot_id,
                       pad_id=tokenizer.pad_id))
    model.save(folder / "base")
    tokenizer.save(folder / "base")
    result = call("data.py", "--kind=chats", "--sources=task:sorting", "--task_examples=300", "--context=96",
                  f"--tokenizer={folder}/base", f"--out_dir={folder}/chats")
    assert result.returncode == 0, result.stderr
    some = random.Random(0)
    digits = lambda most: " ".join(some.choices("123456789", k=some.randint(1, most)))
    rows = [{"messages": formats.chat(*(digits(6) for _ in range(some.choice((2, 2, 2, 4)))))} for _ in range(300)]
    (folder / "ragged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(str(folder / "ragged"), str(folder / "ragged.jsonl"), str(folder / "base"), context=96)
    packed = ChatBatches(folder / "ragged", "train", 4, 4, 96, 1337).rows(0)
    assert sum(len(row) > 1 for row in packed) > 1
    return folder


def command(folder, out_dir, *flags):
    return [f"--data={folder}/chats", f"--init_from={folder}/base", f"--out_dir={out_dir}", *TINY, *flags]


def run(folder, out_dir, *flags, **options):
    return call("sft.py", *command(folder, out_dir, *flags), **options)


def log(out_dir):
    return [json.loads(line) for line in open(os.path.join(out_dir, "log.jsonl"))]


def losses(out_dir):
    return {record["step"]: record["loss"] for record in log(out_dir) if "loss" in record}


def weights(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The uninterrupted run that others are compared with."""
    out_dir = tmp_path_factory.mktemp("out") / "whole"
    result = run(folder, out_dir, "--eval_tasks=sorting", "--eval_questions=4", "--curves=true")
    assert result.returncode == 0, result.stderr
    return out_dir, result


def test_it_learns_and_leaves_a_chat_model(whole):
    out_dir, result = whole
    first, last = losses(out_dir)[0], losses(out_dir)[17]
    assert first == pytest.approx(5.95, abs=0.12) and last < first - 1          # ln 384 before anything is learnt
    evaluated = [record for record in log(out_dir) if "eval_loss" in record]
    assert [record["step"] for record in evaluated] == [0, 6, 12, 18]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    assert 0 <= evaluated[-1]["eval_accuracy/sorting"] <= evaluated[-1]["eval_format/sorting"] <= 1
    assert "sample: <|im_start|>user" in result.stdout and "talk to it: python chat.py" in result.stdout
    assert (out_dir / "curves.png").exists() and (out_dir / "best" / "model.safetensors").exists()
    _, tokenizer, chat, trained = engine.load(str(out_dir), device="cpu")
    assert chat and trained
    _, _, chat, trained = engine.load(json.load(open(out_dir / "options.json"))["init_from"], device="cpu")
    assert not chat and not trained


def test_a_run_killed_at_any_moment_resumes_bitwise(folder, whole, tmp_path):
    out_dir, flags = tmp_path / "killed", ["--eval_tasks=sorting", "--eval_questions=4", "--curves=true"]
    process = subprocess.Popen([sys.executable, "sft.py", *command(folder, out_dir, *flags)], cwd=ROOT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while not (out_dir / "resume" / "state.pt").exists() or len(open(out_dir / "log.jsonl").readlines()) < 9:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = run(folder, out_dir, *flags, "--resume=true")
    assert result.returncode == 0, result.stderr
    assert losses(out_dir) == losses(whole[0])
    assert [r for r in log(out_dir) if "eval_loss" in r] == [r for r in log(whole[0]) if "eval_loss" in r]
    a, b = weights(out_dir), weights(whole[0])
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_two_ranks_that_accumulate_equal_one_that_does_not(folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(folder, one, "--micro_rows=4").returncode == 0
    begun = run(folder, two, "--micro_rows=1", ranks=2)
    assert begun.returncode == 0, begun.stderr
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(two)[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize("packing", [True, False])
def test_every_split_into_micro_batches_gives_the_same_gradients(folder, packing):
    model, found = randomised(folder), {}
    for micro in (8, 4, 2, 1):
        batches = ChatBatches(folder / "ragged", "train", 8, micro, 96, seed=0, packing=packing)
        model.zero_grad()
        for i in range(8 // micro):
            ids, targets, _, cu_seqlens = batches(3, i)
            (sft.weighted_nll(model(ids, targets, cu_seqlens), None) / batches.targets_in_step(3)).backward()
        found[micro] = {name: p.grad.clone() for name, p in model.named_parameters()}
    for micro in (4, 2, 1):
        for name, gradient in found[8].items():
            torch.testing.assert_close(found[micro][name], gradient, atol=1e-6, rtol=1e-5)


def test_the_script_divides_by_the_whole_steps_targets_however_it_is_split(folder, tmp_path):
    first = {}
    for micro in (8, 1):
        out_dir = tmp_path / str(micro)
        result = run(folder, out_dir, f"--data={folder}/ragged", "--rows_per_step=8", f"--micro_rows={micro}",
                     "--packing=false", "--max_steps=2", "--samples=0", "--token_stats=1")
        assert result.returncode == 0, result.stderr
        first[micro] = next(record for record in log(out_dir) if "loss" in record)
    for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert first[1][name] == pytest.approx(first[8][name], rel=1e-5), name


def test_two_ranks_one_of_them_without_targets_equal_one_rank(folder, tmp_path):
    shutil.copytree(folder / "chats", tmp_path / "chats")
    with h5py.File(tmp_path / "chats" / "train.h5", "r+") as file:
        mask, offsets = file["mask"][:], file["doc_offsets"][:]
        for start, end in list(zip(offsets, offsets[1:]))[::2]:
            mask[start:end] = 0
        file["mask"][:] = mask
    batches = ChatBatches(tmp_path / "chats", "train", 2, 1, 96, 1337, packing=False)
    counts = [tuple((batches(step, row)[1] != -100).sum().item() > 0 for row in (0, 1)) for step in range(18)]
    assert {(True, False), (False, True), (False, False)} <= set(counts)    # either rank without, and both
    flags = ["--rows_per_step=2", "--packing=false", "--samples=0", f"--data={tmp_path}/chats", "--token_stats=1"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(folder, one, *flags, "--micro_rows=2").returncode == 0
    assert (result := run(folder, two, *flags, "--micro_rows=1", ranks=2)).returncode == 0, result.stderr
    for ours, theirs in zip(log(one), log(two), strict=True):
        for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "eval_loss", "eval_entropy"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=2e-5), (ours, theirs)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(two)[name], atol=2e-5, rtol=0)


def randomised(folder):
    model = GPT.load(str(folder / "base"))
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.1)
    return model


def gradients(model, data, **options):
    """(mean of the loss over an epoch, gradients) of the training side; over targets, not their weights."""
    batches = ChatBatches(data, "train", 1, 1, 96, seed=0, **options)
    model.zero_grad()
    total, steps = 0.0, round(batches.steps_per_epoch)
    n = batches.chats.targets.sum()
    for step in range(steps):
        ids, targets, loss_weights, cu_seqlens = batches(step, 0)
        loss = sft.weighted_nll(model(ids, targets, cu_seqlens), loss_weights) / n
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_packed_chats_give_the_loss_and_gradient_of_single_ones(folder):
    model = randomised(folder)
    packed, single = (gradients(model, folder / "ragged", packing=packing) for packing in (True, False))
    assert packed[0] == pytest.approx(single[0], rel=1e-6)
    for name, gradient in packed[1].items():
        torch.testing.assert_close(gradient, single[1][name], atol=1e-6, rtol=1e-5)


def test_the_scripts_packed_step_has_the_loss_of_its_chats_one_by_one(folder, tmp_path):
    model = randomised(folder)              # attends from the first step on
    shutil.copytree(folder / "base", tmp_path / "base")
    model.save(tmp_path / "base")
    flags = f"--init_from={tmp_path}/base", f"--data={folder}/ragged", "--max_steps=1", "--samples=0"
    assert (result := run(folder, tmp_path / "out", *flags)).returncode == 0, result.stderr
    batches, nats, n = ChatBatches(folder / "ragged", "train", 4, 4, 96, 1337), 0.0, 0
    for example in (example for row in batches.rows(0) for example in row):
        ids, targets, _, _ = batches.chats.assemble([[example]], int(batches.chats.lengths[example]))
        with torch.no_grad():
            nats += model(ids, targets).sum().item()
        n += (targets != -100).sum().item()
    first = next(record for record in log(tmp_path / "out") if "loss" in record)
    assert first["loss"] == pytest.approx(nats / n, abs=1e-5) and first["num_tokens"] == n


def test_a_chat_has_the_losses_that_it_has_alone_whatever_stands_beside_it(folder):
    model, split = randomised(folder), Chats(folder / "ragged", "train")
    width = int(split.lengths[:3].sum()) + 2
    together, alone = split.assemble([[0, 1, 2]], width), split.assemble([[1]], width)
    first, n = int(split.lengths[0]), int(split.lengths[1])
    with torch.no_grad():
        [expected], [nll] = (model(ids, targets, cu_seqlens) for ids, targets, _, cu_seqlens in (alone, together))
        torch.testing.assert_close(nll[first:first + n], expected[:n], atol=1e-5, rtol=1e-5)
        ids, targets, _, cu_seqlens = together
        ids[0, :first] = (ids[0, :first] + 7) % 200
        [other] = model(ids, targets, cu_seqlens)
    assert torch.equal(other[first:], nll[first:]) and not torch.allclose(other[:first], nll[:first])


def test_eight_rows_learnt_by_heart_are_said_and_ended(folder, tmp_path):
    """The id that ends an answer is trained: without it generation goes on to its limit."""
    rows = [{"prompt": f"{i}{i}?", "completion": f"{9 - i} {i}, so {i}{9 - i}."} for i in range(9)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call("data.py", "--kind=chats", f"--sources={tmp_path}/x.jsonl", f"--tokenizer={folder}/base",
                "--val_fraction=0.0001", "--context=96", f"--out_dir={tmp_path}/chats").returncode == 0
    result = run(folder, tmp_path / "out", f"--data={tmp_path}/chats", "--rows_per_step=2", "--max_steps=80",
                 "--eval_every=80", "--samples=0")
    assert result.returncode == 0, result.stderr
    model, tokenizer = GPT.load(str(tmp_path / "out")), Tokenizer.load(tmp_path / "out")
    split = Chats(tmp_path / "chats", "train")
    assert len(split.lengths) == 8
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    answers = engine.generate(model, [tokenizer.encode_chat(prompt, open_answer=True)[0] for prompt in prompts],
                              max_new_tokens=40, temperature=0)
    right = [answer.finish == "stop" and answer_text(tokenizer, answer) == row["completion"]
             for row, answer in zip(rows, answers)]
    assert sum(right) >= 8                                  # the held-out row may be anything


def test_the_gradient_norm_is_logged_before_clipping(folder, whole, tmp_path):
    assert run(folder, tmp_path / "out", "--grad_clip=0.001", "--max_steps=1", "--samples=0").returncode == 0
    free, clipped = (next(record["grad_norm"] for record in log(out_dir) if "grad_norm" in record)
                     for out_dir in (whole[0], tmp_path / "out"))
    assert clipped == free > 0.1


def test_entropy_and_accuracy_are_measured_every_so_many_steps_and_at_evaluations_exactly(folder, whole, tmp_path):
    steps = {name: [record["step"] for record in log(whole[0]) if name in record]
             for name in ("entropy", "mean_token_accuracy", "eval_entropy", "eval_mean_token_accuracy")}
    assert steps["entropy"] == steps["mean_token_accuracy"] == [0, 10]
    assert steps["eval_entropy"] == steps["eval_mean_token_accuracy"] == [0, 6, 12, 18]
    model, total = GPT.load(str(whole[0])), torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for ids, targets, _, cu_seqlens in fixed_chats(folder / "chats", "val", 96, 3, 20):
            logp = torch.log_softmax(model.logits(model.forward_hidden(ids, cu_seqlens)).double(), -1)
            asked = targets != -100
            total += torch.stack([-(logp.exp() * logp).sum(-1)[asked].sum(), (logp.argmax(-1) == targets)[asked].sum(),
                                  asked.sum()])
    last = log(whole[0])[-1]
    assert last["eval_entropy"] == pytest.approx((total[0] / total[2]).item(), abs=1e-4)
    assert last["eval_mean_token_accuracy"] == pytest.approx((total[1] / total[2]).item(), abs=1e-9)
    assert log(whole[0])[1]["entropy"] == pytest.approx(math.log(384), abs=0.1)     # nothing is learnt yet
    assert run(folder, tmp_path / "never", "--token_stats=0", "--samples=0").returncode == 0
    assert not any("entropy" in record for record in log(tmp_path / "never"))
    assert losses(tmp_path / "never") == losses(whole[0])                           # measuring changes nothing


def test_a_sources_weight_multiplies_its_loss_and_no_count_of_tokens(folder, whole, tmp_path):
    model = GPT.load(str(folder / "base"))
    [name] = ChatBatches(folder / "chats", "train", 1, 1, 96, seed=0).chats.names
    plain, half = (gradients(model, folder / "chats", source_weights={name: weight}) for weight in (1, 0.5))
    assert half[0] == pytest.approx(plain[0] / 2, rel=1e-6)
    # of a single source it falls out of the mean, however small
    flags = f"--source_weights={name}=0.0001", "--max_steps=1", "--samples=0"
    assert run(folder, tmp_path / "out", *flags).returncode == 0
    first, usual = (next(record for record in log(out_dir) if "loss" in record)
                    for out_dir in (tmp_path / "out", whole[0]))
    for key in ("loss", "grad_norm", "num_tokens"):
        assert first[key] == pytest.approx(usual[key], rel=1e-5), key


def test_noise_is_added_in_training_alone_and_of_the_papers_size(folder):
    model, ids = GPT.load(str(folder / "base")), torch.zeros(2, 50, dtype=torch.long)
    clean = model.model.embed_tokens(ids)
    sft.add_noise(model, 5.0)
    noise = (model.model.embed_tokens(ids) - clean).abs()
    assert noise.max() <= 5 / (50 * 32) ** 0.5 < noise.max() * 1.01
    with torch.no_grad():
        assert torch.equal(model.model.embed_tokens(ids), clean)


def test_adapters_train_and_what_is_saved_is_merged(folder, tmp_path):
    result = run(folder, tmp_path / "lora", "--method=lora", "--lr=0.05", "--neftune=5")
    assert result.returncode == 0, result.stderr
    values = list(losses(tmp_path / "lora").values())
    assert values[-1] < values[0] - 0.05
    model = lora.load(GPT.load(str(folder / "base")), str(tmp_path / "lora" / "adapter"))
    merged = GPT.load(str(tmp_path / "lora"))
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model.forward_hidden(ids), merged.forward_hidden(ids), atol=1e-5, rtol=1e-5)
    resumed = run(folder, tmp_path / "lora", "--method=lora", "--lr=0.05", "--neftune=5", "--resume=true")
    assert resumed.returncode == 0, resumed.stderr


def test_head_alone_trains_the_head_alone(folder, tmp_path):
    assert run(folder, tmp_path / "head", "--method=head").returncode == 0
    before, after = weights(folder / "base"), weights(tmp_path / "head")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"lm_head.weight"}


def test_the_held_out_loss_is_exact(folder, whole):
    model = GPT.load(str(whole[0]))
    nats = targets = 0
    with torch.no_grad():
        for ids, wanted, _, cu_seqlens in fixed_chats(folder / "chats", "val", 96, 3, 20):
            nats += model(ids, wanted, cu_seqlens).double().sum().item()
            targets += (wanted != -100).sum().item()
    assert nats / targets == pytest.approx(log(whole[0])[-1]["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("flags, said", [
    (["--method=prefix"], "method must be full, lora or head"), (["--epochs=0", "--max_steps=0"], "nothing to do"),
    (["--eval_tasks=sortin"], "eval_tasks names 'sortin'"), (["--context=500"], "is longer than the 128 tokens"),
    (["--context=40"], "longer than context=40"), (["--rows_per_step=6", "--micro_rows=4"], "is not a multiple of"),
    (["--source_weights=x=2"], "source_weights names 'x'"), (["--method=lora", "--lora_targets=nope"], "'nope'"),
    (["--method=lora", "--optimizer=muon"], "trains with adamw"), (["--data=nowhere"], "there is no nowhere/train.h5"),
    (["--init_from=nowhere"], "'nowhere' is not a model directory"), (["--token_stats=-1"], "must be at least 0"),
    (["--lr=inf"], "--lr must be a finite number, got inf"), (["--epochs=inf"], "--epochs must be a finite number"),
    (["--method=lora", "--lora_rank=0"], "must be at least 1"), (["--method=lora", "--lora_dropout=1"], "below 1")])
def test_bad_input_is_one_sentence(folder, tmp_path, flags, said):
    result = run(folder, tmp_path / "bad", *flags)
    assert result.returncode == 1 and said in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_compiled_model_gets_offsets_of_one_length_and_unpacked_rows_are_not_compiled(folder, tmp_path, packing):
    flags = command(folder, tmp_path / "out", f"--data={folder}/ragged", f"--packing={packing}", "--compile=true")
    result = subprocess.run([sys.executable, "tests/compiled.py", str(tmp_path / "log"), "sft.py", *flags], cwd=ROOT,
                            capture_output=True, text=True, env={**os.environ, "CC": "true", "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    if packing == "false":
        assert not (tmp_path / "log").exists()
        return
    noted = [json.loads(line) for line in (tmp_path / "log").open()]
    compiled = [facts for facts in noted if facts[0] == "GPT"]      # evaluation is not: it would want graphs of its own
    assert len(compiled) == 18 and len({tuple(facts) for facts in compiled}) == 1
    assert compiled[0][1:3] == [False, True]
    assert run(folder, tmp_path / "plain", f"--data={folder}/ragged").returncode == 0
    assert losses(tmp_path / "plain") == losses(tmp_path / "out")


@pytest.mark.parametrize("flaw, said", [
    ("no specials", "has no <|im_start|> and <|im_end|> to write chats with; begin from a model whose tokenizer"),
    ("few rows", "has 288 ids and its model 256; begin from a model whose embedding has a row for every id")])
def test_a_base_model_that_cannot_read_chats_is_one_sentence(folder, tmp_path, flaw, said):
    shutil.copytree(folder / "base", tmp_path / "base")
    if flaw == "few rows":
        GPT(Config(256, n_layer=1, n_head=2, n_embd=16, context=128)).save(tmp_path / "base")
    else:
        spec = json.loads((tmp_path / "base" / "tokenizer.json").read_text())
        spec["added_tokens"] = [token for token in spec["added_tokens"] if "im_" not in token["content"]]
        (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(spec))
    result = run(folder, tmp_path / "out", f"--init_from={tmp_path}/base")
    assert result.returncode == 1 and said in result.stderr and len(result.stderr.strip().splitlines()) == 1
