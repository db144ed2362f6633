"""mixing.py: shares from weights, temperatures, caps and stages; and the batches of a mixture, also of a killed run."""
import json
import os
import random
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import torch

import mixing
from mixing import MixedBatches, cap, interleave, parse_stages, proportions, whole_parts
from texts import TextBatches

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--context=32", "--rows_per_step=8", "--device=cpu", "--dtype=fp32",
        "--eval_every=4", "--eval_tokens=512", "--sample_tokens=0", "--warmup_steps=2", "--curves=false"]


def numbered(folder, n, first=0, lengths=(), fingerprint="f", text_bytes=None):
    """A folder whose token i is first + i: every token says which source it is of, and where it stood."""
    os.makedirs(folder, exist_ok=True)
    for split in ("train", "val"):
        with h5py.File(folder / f"{split}.h5", "w") as file:
            file["tokens"] = np.arange(first, first + n, dtype=np.uint32)
            file["doc_offsets"] = np.array([*np.cumsum([0, *lengths]), n])
            file.attrs.update(fingerprint=fingerprint, vocab_size=300, text_bytes=text_bytes or 4 * n)
    return str(folder)


@pytest.fixture
def two(tmp_path):
    code = numbered(tmp_path / "code", 1_000, 100_000, [77, 10, 300], text_bytes=2000)
    return numbered(tmp_path / "web", 9_000), code


def mixed(data, *args, stages="", rows=8, micro=None, context=16, seed=1, **kwargs):
    return MixedBatches(parse_stages(data, stages), "train", rows, micro or rows, context, seed, *args, **kwargs)


def shares(batches, steps):
    """Share of code's rows among the first `steps` steps, by their tokens."""
    return np.mean([(batches(step, 0)[0][:, 0] >= 100_000).numpy().mean() for step in range(steps)])


# ---- shares ----

def test_temperature_is_the_closed_form():
    sizes = np.array([8e9, 1e6])
    assert proportions(sizes, 1) == pytest.approx(sizes / sizes.sum())
    assert proportions(sizes, 3.0) == pytest.approx(np.array([2000, 100]) / 2100)       # cube roots
    assert proportions(sizes, 1e9) == pytest.approx([0.5, 0.5])
    assert proportions(sizes * 1e90, 0.1).sum() == pytest.approx(1)                     # no overflow


def test_a_mixture_takes_the_shares_of_its_temperature(two):
    assert mixed(",".join(two), temperature=2.0).share_N == pytest.approx([0.75, 0.25])
    assert mixed(",".join(two)).share_N == pytest.approx([0.9, 0.1])
    assert shares(mixed(",".join(two), temperature=2.0), 100) == pytest.approx(0.25, abs=1 / 800)


@pytest.mark.parametrize("seed", range(20))
def test_after_any_number_of_rows_each_source_is_less_than_a_row_from_its_share(seed):
    generator = np.random.default_rng(seed)
    shares_N = generator.dirichlet(np.full(generator.integers(2, 9), 0.4))
    parts_N = whole_parts(shares_N, np.zeros(len(shares_N)))
    order = interleave(parts_N)
    read = np.cumsum(order[:, None] == np.arange(len(parts_N)), 0)
    asked = np.outer(np.arange(1, len(order) + 1), parts_N / parts_N.sum())
    assert abs(read - asked).max() < 1 and (read[-1] == parts_N).all()
    assert abs(parts_N / parts_N.sum() - shares_N).max() < len(shares_N) / mixing.PARTS and (parts_N > 0).all()


def test_shares_are_realised_within_a_row_at_every_step(two):
    batches = mixed(f"{two[0]}=0.9371,{two[1]}=0.0629", rows=3)
    read = 0
    for step in range(500):
        read += (batches(step, 0)[0][:, 0] >= 100_000).sum().item()
        assert abs(read - 0.0629 * 3 * (step + 1)) < 1
        assert batches.rows_before(step + 1).tolist() == [3 * (step + 1) - read, read]


def test_a_cap_on_epochs_gives_the_rest_to_the_others(two):
    steps = 500                                             # 4,000 rows; code has 63 and would be read 32 times
    batches = mixed(f"{two[0]}=0.5,{two[1]}=0.5", max_epochs=8, max_steps=steps)
    read_N = batches.rows_before(steps)
    assert read_N.sum() == 8 * steps and 8 * 63 - 1 <= read_N[1] <= 8 * 63
    assert any("code: 50.00% of the run's tokens were asked for, 12.60%" in line for line in batches.plan())
    assert mixed(f"{two[0]}=0.5,{two[1]}=0.5", max_epochs=50, max_steps=steps).rows_before(steps).tolist() == [2000] * 2


def test_rounding_to_parts_never_raises_a_capped_source():
    shares_N = np.array([0.12348, 0.87652])
    assert whole_parts(shares_N, np.array([True, False])).tolist() == [617, 4383]       # 1,234 and 8,766
    assert whole_parts(shares_N, np.array([False, True])).tolist() == [247, 1753]       # 1,235 and 8,765
    assert whole_parts(np.array([1e-9, 1 - 1e-9]), np.zeros(2)).tolist() == [1, 9999]   # no share is lost


def test_capping_one_source_may_push_another_over_its_cap():
    asked = np.array([[0.4, 0.35, 0.25], [0.0, 0.5, 0.5]])
    rows, limit = np.array([800, 200]), np.array([100.0, 500.0, 1e9])
    kept = cap(asked, rows, limit)
    assert kept.sum(1) == pytest.approx(1) and rows @ kept == pytest.approx([100, 500, 400])
    assert asked[0, 0] == 0.4                               # its argument stays
    with pytest.raises(ValueError, match="stage 1 of 2 trains on 800 rows.* allows 300 in the whole run"):
        cap(asked, rows, np.full(3, 100.0))


def test_what_a_cap_leaves_goes_to_the_others_however_small_their_shares_are():
    kept = cap([[1 - 1e-13, 3e-14, 7e-14]], np.array([100]), np.array([10.0, 1e9, 1e9]))
    assert kept[0] == pytest.approx([0.1, 0.27, 0.63])


def test_stages_change_the_shares_where_they_begin_and_epochs_go_on(two):
    web, code = two
    batches = mixed(f"{web}=0.9,{code}=0.1", stages=f"0.5:{web}=0.25,{code}=0.75;0.9:{code}=1", max_steps=100)
    per_step = [(batches(step, 0)[0][:, 0] >= 100_000).sum().item() for step in range(100)]
    assert sum(per_step[:50]) == 40 and sum(per_step[50:90]) == 240 and per_step[90:] == [8] * 10
    starts = [ids.item() for step in range(100) for ids in batches(step, 0)[0][:, 0] if ids >= 100_000]
    for epoch in range(len(starts) // 63):                  # whole epochs, across where stages begin
        assert len(set(starts[epoch * 63:(epoch + 1) * 63])) == 63
    assert batches.plan()[:3] == ["from step 0: web 90.00%, code 10.00% of the tokens",
                                  "from step 50: web 25.00%, code 75.00% of the tokens",
                                  "from step 90: code 100.00% of the tokens"]


# ---- batches ----

@pytest.mark.parametrize("masked", [False, True])
def test_one_folder_gives_the_batches_of_text_batches_to_the_bit(tmp_path, masked):
    folder = numbered(tmp_path / "web", 999, lengths=[100, 33, 200])
    expected = TextBatches(folder, "train", 8, 2, 16, 5, 1, 2, masked)
    batches = mixed(folder, 1, 2, masked, micro=2, seed=5)
    assert batches.steps_per_epoch == expected.steps_per_epoch and batches.n_tokens == expected.n_tokens
    for step in range(30):
        assert batches.targets_in_step(step) == expected.targets_in_step(step)
        for micro in range(2):
            for ours, theirs in zip(batches(step, micro), expected(step, micro)):
                assert torch.equal(ours, theirs) if masked or theirs is not None else ours is None
    assert batches.plan() == batches.report(30) == [] and batches.metrics(30, [(1, 2)]) == {}
    assert batches.average([(1.2345678, 0.1)]) == (1.2345678, 0.1)


def test_a_batch_is_a_function_of_seed_and_step(two):
    data = f"{two[0]}=0.6,{two[1]}=0.4"
    first, again = (mixed(data, micro=4, stages=f"0.5:{two[1]}=1", max_steps=60) for _ in range(2))
    forward = [first(step, micro)[1] for step in range(60) for micro in range(2)]
    for i in reversed(range(120)):
        assert torch.equal(again(i // 2, i % 2)[1], forward[i])
    assert not torch.equal(mixed(data, seed=2)(0, 0)[0], mixed(data)(0, 0)[0])


@pytest.mark.parametrize("ranks, micro", [(2, 6), (4, 3), (3, 1)])
def test_any_number_of_ranks_sees_the_same_rows_in_the_same_order(two, ranks, micro):
    data = f"{two[0]}=0.6,{two[1]}=0.4"
    alone = mixed(data, 0, 1, True, rows=12)
    together = [mixed(data, rank, ranks, True, rows=12, micro=micro) for rank in range(ranks)]
    for step in range(9):
        parts = [batches(step, i) for i in range(12 // (ranks * micro)) for batches in together]
        for which in (0, 1):
            assert torch.equal(torch.cat([part[which] for part in parts]), alone(step, 0)[which])
        bounds = [cu[:-1] + i * micro * 16 for i, (_, _, cu) in enumerate(parts)]
        assert torch.equal(torch.cat(bounds), alone(step, 0)[2][:-1])
        assert {batches.targets_in_step(step) for batches in together} == {alone.targets_in_step(step)}


def test_every_source_gives_each_target_once_an_epoch_and_documents_keep_their_bounds(two):
    batches, seen, step = mixed(f"{two[0]}=0.3,{two[1]}=0.7", 0, 1, True), [], 0
    begins = {100_000, 100_077, 100_087, 100_387, 0}        # where code's and web's documents begin
    while len(seen) < 999:                                  # code's first epoch
        ids, targets, cu = batches(step, 0)
        assert batches.targets_in_step(step) == (targets != -100).sum()
        held = targets != -100
        assert torch.equal(targets[held], ids[held] + 1)
        seen += targets[targets >= 100_000].tolist()
        flat = ids.flatten().tolist()
        expected = [i for i, token in enumerate(flat) if i % 16 == 0 or token in begins] + [len(flat)]
        assert cu.tolist() == expected and cu.dtype == torch.int32
        step += 1
    assert sorted(seen[:999]) == [*range(100_001, 101_000)]


def test_the_report_and_the_log_say_tokens_bytes_and_epochs(two):
    batches = mixed(f"{two[0]}=0.75,{two[1]}=0.25")
    assert batches.report(100) == ["web: 9,600 tokens (75.00%), 0.04 MB (85.71%), 1.07 epochs",
                                   "code: 3,200 tokens (25.00%), 0.01 MB (14.29%), 3.17 epochs"]
    metrics = batches.metrics(100, [(2.0, 1.0), (4.0, 8.0)])
    assert metrics["val_loss/code"] == 4.0 and metrics["val_bpb/code"] == 8.0
    assert metrics["tokens/code"] == 3200 and metrics["bytes/code"] == 6400
    assert metrics["epoch/code"] == pytest.approx(200 / 63)
    assert batches.average([(2.0, 1.0), (4.0, 8.0)]) == pytest.approx((2.5, (6 * 1 + 1 * 8) / 7))
    assert batches.average([(2.0, 0.5), (4.0, 0.9)], "val_accuracy") == pytest.approx((2.5, 0.6))


# ---- what a user can get wrong ----

@pytest.mark.parametrize("data, stages, words", [
    ("a=0.7,b=0.4", "", "weights of data add up to 1.1, not 1.*a=0.636,b=0.364"),
    ("a=0.7,b", "", "some sources have a weight and some have none"),
    ("a=-1,b=2", "", "must be above 0"),
    ("a=1e999,b=1", "", "the weight of source a is 1e999; it must be above 0 and finite"),
    ("a=0.5,a/=0.5", "", "names a folder twice"),
    (" , ", "", "data is ' , ' and names none"),
    ("a", "a=1", "share of the run at which it begins"),
    ("a", "0:a", "must lie below 1 and after 0"),
    ("a", "0.5:a;0.4:b", "after 0.5, where the one before begins"),
    ("a", "1.0:b", "must lie below 1"),
    ("a", "0.5:b=0.9", "weights of data_stages add up to 0.9"),
    ("a", "0.5:", "data_stages is '' and names none"),
])
def test_mixtures_that_are_none_are_refused_in_a_sentence(data, stages, words):
    with pytest.raises(ValueError, match=words):
        parse_stages(data, stages)


def test_folders_of_two_tokenizers_and_stages_without_steps_are_refused(tmp_path, two):
    other = numbered(tmp_path / "other", 500, fingerprint="g")
    with pytest.raises(ValueError, match="one tokenizer: run data.py again with --tokenizer=.*web"):
        mixing.open_folders(two[0], f"0.5:{other}")
    assert mixing.open_folders(two[0], f"0.5:{two[1]}") == list(two)
    with pytest.raises(ValueError, match="leave one without a step"):
        mixed(two[0], stages=f"0.01:{two[1]}", max_steps=10)
    with pytest.raises(ValueError, match="stage 1 of 1 trains on 8,000 rows"):
        mixed(two[0], max_epochs=2, max_steps=1000)


def test_a_folder_whose_name_looks_like_a_mixture_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    numbered(tmp_path / "a=0.5,b=0.5", 500)
    assert parse_stages("a=0.5,b=0.5") == [(0.0, {"a=0.5,b=0.5": None})]


# ---- end to end ----

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two small corpora of one tokenizer."""
    root = tmp_path_factory.mktemp("mixture")
    for name, words, lines in (("web", ["cat", "dog", "hen"], 1500), ("code", ["def", "for", "if"], 300)):
        pick = random.Random(name)
        rows = [" ".join(pick.choices(words, k=12)) + f" {i}." for i in range(lines)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        tokenizer = ["--vocab_size=280"] if name == "web" else [f"--tokenizer={root / 'web'}"]
        subprocess.run([sys.executable, "data.py", f"--sources={root / name}.jsonl", f"--out_dir={root / name}",
                        "--val_fraction=0.2", *tokenizer], cwd=ROOT, check=True, capture_output=True)
    return root / "web", root / "code"


def command(folders, out_dir, *flags, ranks=1):
    launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  f"--nproc_per_node={ranks}"]
    web, code = folders
    mixture = [f"--data={web}=0.7,{code}=0.3", f"--data_stages=0.5:{web}=0.2,{code}=0.8", "--max_steps=24"]
    return [*launch, "pretrain.py", *mixture, f"--out_dir={out_dir}", *TINY, *flags]


def run(*args, **kwargs):
    return subprocess.run(command(*args, **kwargs), cwd=ROOT, capture_output=True, text=True, timeout=100)


def log(out_dir):
    with open(os.path.join(out_dir, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


def losses(out_dir):
    return {record["step"]: record["loss"] for record in log(out_dir) if "loss" in record}


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("out") / "whole"
    result = run(folders, out_dir)
    assert result.returncode == 0, result.stderr
    return out_dir, result.stdout


def test_pretraining_on_a_mixture_says_and_logs_each_source(whole):
    out_dir, said = whole
    assert "from step 0: web 70.00%, code 30.00%" in said and "from step 12: web 20.00%, code 80.00%" in said
    last = [record for record in log(out_dir) if "val_loss" in record][-1]
    assert last["tokens/web"] + last["tokens/code"] == 24 * 8 * 32 and last["tokens/code"] == pytest.approx(
        (0.3 + 0.8) / 2 * 24 * 8 * 32, abs=64)
    assert f"web: {last['tokens/web']:,} tokens" in said and last["bytes/web"] > last["tokens/web"]
    share = last["tokens/code"] / (24 * 8 * 32)
    assert last["val_loss"] == pytest.approx(share * last["val_loss/code"] + (1 - share) * last["val_loss/web"])
    assert min(last["val_bpb/web"], last["val_bpb/code"]) < last["val_bpb"] < max(last["val_bpb/web"],
                                                                                   last["val_bpb/code"])


def test_a_killed_run_on_a_mixture_resumes_bitwise(folders, whole, tmp_path):
    out_dir = tmp_path / "killed"
    process = subprocess.Popen(command(folders, out_dir), cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (out_dir / "resume" / "state.pt").exists() or len(log_lines(out_dir)) < 10:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = run(folders, out_dir, "--resume=true")
    assert result.returncode == 0, result.stderr
    assert losses(out_dir) == losses(whole[0])
    held = [[record for record in log(folder) if "val_loss" in record] for folder in (out_dir, whole[0])]
    assert held[0] == held[1]
    assert (out_dir / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()


def log_lines(out_dir):
    return open(out_dir / "log.jsonl").readlines()


def test_two_ranks_train_on_the_same_mixture_as_one(folders, whole, tmp_path):
    begun = run(folders, tmp_path / "two", "--micro_rows=2", ranks=2)
    assert begun.returncode == 0, begun.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(whole[0]), abs=1e-4)


@pytest.mark.parametrize("flags, words", [
    (["--mix_temperature=3"], "leave out the weights or the temperature"),
    (["--mix_temperature=0"], "must be above 0"),
    (["--max_seconds=5"], "--data_stages needs to know the number of steps"),
    (["--max_source_epochs=0.001"], "--max_source_epochs allows"),
    (["--max_source_epochs=-1"], "--max_source_epochs must be at least 0"),
    (["--data=absent=0.5,missing=0.5"], "there is no absent/val.h5"),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_bad_options_are_one_sentence(folders, tmp_path, flags, words):
    result = run(folders, tmp_path / "out", *flags)
    assert result.returncode == 1 and words in result.stderr and len(result.stderr.strip().splitlines()) == 1
