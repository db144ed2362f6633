"""pretrain.py end to end on a tiny corpus: it learns, resumes exactly, two ranks equal one, and says what is wrong."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--context=32", "--rows_per_step=8", "--device=cpu", "--dtype=fp32",
        "--eval_every=4", "--eval_tokens=512", "--sample_tokens=8", "--warmup_steps=2", "--curves=false"]


def text(words=20_000, seed=0):
    """Sentences with something to learn."""
    pick = random.Random(seed)
    return " ".join(f"the {pick.choice(['cat', 'dog', 'hen'])} {pick.choice(['sat', 'ran'])} on {i % 7} mats."
                    for i in range(words // 6))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i in range(8):
        (folder / f"{i}.txt").write_text(text(seed=i))
    subprocess.run([sys.executable, "data.py", f"--sources={folder}/*.txt", f"--out_dir={folder}/text",
                    "--vocab_size=300", "--val_fraction=0.2"], cwd=ROOT, check=True, capture_output=True)
    return folder / "text"


def command(folder, out_dir, *flags, ranks=1):
    launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  f"--nproc_per_node={ranks}"]
    return [*launch, "pretrain.py", f"--data={folder}", f"--out_dir={out_dir}", *TINY, *flags]


def run(*args, **kwargs):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*args, **kwargs), cwd=ROOT, capture_output=True, text=True, env=env, timeout=60)


def log(out_dir):
    return [json.loads(line) for line in open(os.path.join(out_dir, "log.jsonl"))]


def losses(out_dir):
    return {record["step"]: record["loss"] for record in log(out_dir) if "loss" in record}


def equal_weights(a, b):
    a, b = (load_file(os.path.join(folder, "model.safetensors")) for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The uninterrupted run that others are compared with."""
    out_dir = tmp_path_factory.mktemp("out") / "whole"
    result = run(folder, out_dir, "--max_steps=24", "--curves=true")
    assert result.returncode == 0, result.stderr
    return out_dir, result


def test_the_script_learns_and_leaves_a_model_that_transformers_opens(whole):
    out_dir, result = whole
    first, last = losses(out_dir)[0], losses(out_dir)[23]
    assert first == pytest.approx(5.95, abs=0.12) and last < 3.5        # ln 384 before anything is learnt
    records = [record for record in log(out_dir) if "val_loss" in record]
    assert [record["step"] for record in records] == [4, 8, 12, 16, 20, 24]
    assert records[-1]["val_bpb"] < records[0]["val_bpb"] < 8
    assert json.load(open(out_dir / "options.json"))["max_steps"] == 24
    assert (out_dir / "curves.png").exists() and (out_dir / "best" / "model.safetensors").exists()
    for words in ("matmul", "sample:", "bits per byte on held-out text", "left"):
        assert words in result.stdout

    transformers = pytest.importorskip("transformers")
    from texts import fixed_rows
    model = transformers.AutoModelForCausalLM.from_pretrained(out_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out_dir)
    assert tokenizer.decode(tokenizer("the cat sat")["input_ids"]) == "the cat sat"
    folder = json.load(open(out_dir / "options.json"))["data"]
    nats = tokens = 0
    with torch.no_grad():
        for ids, targets, _ in fixed_rows(folder, "val", 32, 8, 512):
            logits = model(ids).logits
            nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            tokens += (targets != -100).sum().item()
    assert nats / tokens == pytest.approx(records[-1]["val_loss"], abs=1e-4)


def test_a_run_killed_at_any_moment_resumes_bitwise(folder, whole, tmp_path):
    out_dir = tmp_path / "killed"
    process = subprocess.Popen(command(folder, out_dir, "--max_steps=24", "--curves=true"), cwd=ROOT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while not (out_dir / "resume" / "state.pt").exists() or len(open(out_dir / "log.jsonl").readlines()) < 8:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = run(folder, out_dir, "--max_steps=24", "--curves=true", "--resume=true")
    assert result.returncode == 0, result.stderr
    assert losses(out_dir) == losses(whole[0])
    assert [r for r in log(out_dir) if "val_loss" in r] == [r for r in log(whole[0]) if "val_loss" in r]
    assert equal_weights(out_dir, whole[0])
    assert equal_weights(out_dir / "best", whole[0] / "best")


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(folder, whole, tmp_path):
    out_dir = tmp_path / "stopped"
    process = subprocess.Popen(command(folder, out_dir, "--max_steps=24", "--curves=true"), cwd=ROOT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    while not (out_dir / "log.jsonl").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 0 and "finishing this step" in stderr and "--resume=true" in stdout
    assert run(folder, out_dir, "--max_steps=24", "--curves=true", "--resume=true").returncode == 0
    assert losses(out_dir) == losses(whole[0]) and equal_weights(out_dir, whole[0])


def test_two_ranks_that_accumulate_equal_one_that_does_not(folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["--max_steps=12", "--optimizer=muon"]
    assert run(folder, one, *options, "--micro_rows=8").returncode == 0
    begun = run(folder, two, *options, "--micro_rows=2", ranks=2)       # 2 ranks x 2 accumulated x 2 rows
    assert begun.returncode == 0, begun.stderr
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0)


def test_a_run_moves_from_one_rank_to_two_and_back_through_resumes(folder, whole, tmp_path):
    out_dir = tmp_path / "moving"
    flags = ["--max_steps=24", "--curves=true"]
    process = subprocess.Popen(command(folder, out_dir, *flags), cwd=ROOT, stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    for ranks, until in ((2, 4), (1, 12)):
        while not (out_dir / "resume" / "state.pt").exists() or max(losses(out_dir)) < until:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        process.wait()
        process = subprocess.Popen(command(folder, out_dir, *flags, "--resume=true", ranks=ranks), cwd=ROOT,
                                   stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.wait() == 0
    assert losses(out_dir) == pytest.approx(losses(whole[0]), abs=1e-4)


def test_a_run_by_the_clock_ends_its_decay_when_its_time_is_up(folder, tmp_path):
    out_dir = tmp_path / "timed"
    assert run(folder, out_dir, "--max_steps=1000000", "--max_seconds=1.5", "--eval_every=1000000").returncode == 0
    rates = [record["learning_rate"] for record in log(out_dir) if "loss" in record]
    assert len(rates) > 5 and max(rates) == pytest.approx(0.004) and rates[-1] < 0.2 * max(rates)


def test_training_goes_on_from_a_model_directory(folder, whole, tmp_path):
    result = run(folder, tmp_path / "more", "--max_steps=4", f"--init_from={whole[0]}")
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "more")[0] < losses(whole[0])[12]


@pytest.mark.parametrize("flags, words", [
    (["--lrr=1"], "did you mean lr?"),
    (["--max_steps=many"], "whole number"),
    (["config/absent.py"], "no config file"),
    (["--data=absent"], "absent"),
    (["--init_from=absent"], "not a model directory"),
    (["--n_head=5"], "n_embd=32 is not a multiple of n_head=5"),
    (["--micro_rows=3"], "rows_per_step=8 is not a multiple of micro_rows * ranks = 3 * 1"),
    (["--context=1000000"], "fewer|too few|needs|tokens"),
    (["--resume=true"], "no state to resume"),
    (["--optimizer=sgd"], "muon or adamw"),
    (["--device=cuda"], "--device=auto"),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_bad_input_is_one_sentence(folder, tmp_path, flags, words):
    if flags == ["--device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = run(folder, tmp_path / "out", *flags)
    assert result.returncode in (1, 2) and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("pretrain.py: ")
    assert any(word in result.stderr for word in words.split("|")), result.stderr


def test_an_out_dir_that_holds_a_run_and_changed_options_are_refused(folder, whole):
    before = open(whole[0] / "log.jsonl").read()
    result = run(folder, whole[0])
    assert result.returncode == 1 and "already holds a run" in result.stderr
    result = run(folder, whole[0], "--resume=true", "--max_steps=25", "--curves=true")
    assert result.returncode == 1 and "max_steps was 24 and is 25" in result.stderr
    assert open(whole[0] / "log.jsonl").read() == before


def test_a_model_too_small_for_the_datas_tokenizer_is_refused(folder, tmp_path):
    from model import GPT, Config
    GPT(Config(vocab_size=128, n_layer=1, n_head=2, n_embd=32)).save(str(tmp_path / "small"))
    result = run(folder, tmp_path / "out", f"--init_from={tmp_path / 'small'}")
    assert result.returncode == 1 and "vocab_size 128" in result.stderr and "--tokenizer=" in result.stderr


@pytest.mark.parametrize("flags, words", [
    (["--micro_rows=-4"], "--micro_rows must be at least 0"),       # else it would run and train nothing
    (["--grad_clip=-1"], "--grad_clip must be at least 0"),         # else it would climb
    (["--max_steps=0"], "--max_steps must be at least 1"),
    (["--beta1=1.5"], "below 1"),
    (["--device=cuda:x"], "cuda:N"),
    (["--compile=maybe"], "auto, true or false"),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_values_out_of_range_are_one_sentence(folder, tmp_path, flags, words):
    result = run(folder, tmp_path / "out", *flags)
    assert result.returncode == 1 and words in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_a_compiled_model_gets_offsets_of_one_length_and_muon_is_compiled_too(folder, tmp_path):
    flags = command(folder, tmp_path / "out", "--max_steps=9", "--compile=true", "--mask_documents=true")[2:]
    result = subprocess.run([sys.executable, "tests/compiled.py", str(tmp_path / "log"), "pretrain.py", *flags],
                            cwd=ROOT, capture_output=True, text=True, env={**os.environ, "CC": "true"})
    assert result.returncode == 0, result.stderr
    noted = [json.loads(line) for line in (tmp_path / "log").open()]
    assert ["orthogonalise", False] in noted
    compiled = [facts for facts in noted if facts[0] == "GPT"]      # evaluation is not: it would want graphs of its own
    assert len(compiled) == 9 and len({tuple(facts) for facts in compiled}) == 1
    assert compiled[0][1:3] == [False, True]
    plain = run(folder, tmp_path / "plain", "--max_steps=9", "--compile=false", "--mask_documents=true")
    assert plain.returncode == 0 and losses(tmp_path / "plain") == losses(tmp_path / "out")


def test_a_held_out_file_that_is_missing_or_cut_is_said_before_training(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "data")
    os.truncate(broken / "val.h5", os.path.getsize(broken / "val.h5") // 2)
    result = run(broken, tmp_path / "out")
    assert result.returncode == 1 and "val.h5 is cut short" in result.stderr and "step" not in result.stdout
    os.remove(broken / "val.h5")
    assert "there is no" in run(broken, tmp_path / "out").stderr


def test_another_tokenizer_is_refused_and_never_left_beside_new_weights(folder, whole, tmp_path):
    other = tmp_path / "other"
    subprocess.run([sys.executable, "data.py", f"--sources={folder.parent}/*.txt", f"--out_dir={other}",
                    "--vocab_size=264", "--val_fraction=0.2"], cwd=ROOT, check=True, capture_output=True)
    result = run(other, tmp_path / "out", f"--init_from={whole[0]}")
    assert result.returncode == 1 and "--tokenizer=" in result.stderr and "Traceback" not in result.stderr
    out_dir = tmp_path / "replaced"
    assert run(folder, out_dir, "--max_steps=1").returncode == 0
    assert run(other, out_dir, "--max_steps=1", "--overwrite=true").returncode == 0
    assert (out_dir / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()


def test_resume_refuses_other_data_and_says_a_finished_run_once(folder, whole, tmp_path):
    data, out_dir = shutil.copytree(folder, tmp_path / "data"), tmp_path / "out"
    assert run(data, out_dir, "--max_steps=4").returncode == 0
    before = log(out_dir)
    assert run(data, out_dir, "--max_steps=4", "--resume=true").returncode == 0 and log(out_dir) == before
    sources = f"--sources={folder.parent}/0.txt,{folder.parent}/1.txt"
    subprocess.run([sys.executable, "data.py", sources, f"--out_dir={data}", "--vocab_size=300", "--val_fraction=0.2",
                    "--overwrite=true"], cwd=ROOT, check=True, capture_output=True)
    result = run(data, out_dir, "--max_steps=4", "--resume=true")
    assert result.returncode == 1 and "now holds" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("flags", [["--schedule=linear"], ["--report_to=nowhere"], ["--optimizer=sgd"], ["--n_head=5"],
                                   ["--muon_steps=7"], ["--data=absent"]], ids=lambda flags: flags[0])
def test_a_mistake_together_with_overwrite_leaves_the_old_run_as_it_was(folder, whole, flags):
    before = {name: os.path.getsize(whole[0] / name) for name in ("model.safetensors", "log.jsonl", "resume/state.pt")}
    result = run(folder, whole[0], "--overwrite=true", *flags)
    assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1
    assert before == {name: os.path.getsize(whole[0] / name) for name in before}


def test_a_run_that_dies_before_its_first_save_leaves_the_one_it_replaces(folder, tmp_path):
    out_dir = tmp_path / "out"
    assert run(folder, out_dir, "--max_steps=1").returncode == 0
    endless = command(folder, out_dir, "--overwrite=true", "--max_steps=100000", "--eval_every=100000")
    process = subprocess.Popen(endless, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (out_dir / "replaced" / "log.jsonl").exists():
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert (out_dir / "replaced" / "model.safetensors").exists()
    assert run(folder, out_dir, "--schedule=cosine", "--max_steps=1", "--overwrite=true").returncode == 0
    assert not (out_dir / "replaced").exists()


def test_a_model_is_not_replaced_by_what_starts_from_it(folder, whole):
    result = run(folder, whole[0], f"--init_from={whole[0]}", "--overwrite=true")
    assert result.returncode == 1 and "choose another --out_dir" in result.stderr
    assert (whole[0] / "model.safetensors").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_is_one_sentence_and_keeps_the_newest_state(folder, tmp_path):
    out_dir = tmp_path / "full"
    limited = ["bash", "-c", 'ulimit -f 400; trap "" XFSZ; exec "$0" "$@"', *command(folder, out_dir, "--max_steps=8")]
    result = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "still there" in result.stderr.strip().splitlines()[-1]
