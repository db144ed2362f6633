"""common.py: what is on disk survives, spikes are skipped, and wrong machines or folders are one sentence."""
import json
import os
import subprocess
import sys

import pytest
import torch

import common

CONFIG = dict(out_dir="", resume=False, overwrite=False, seed=1, device="cpu", dtype="fp32", curves=False)


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setattr(common.signal, "signal", lambda *_: None)

    def begin(**options):
        return common.start({**CONFIG, "out_dir": str(tmp_path / "run"), **options})
    return begin


class Toy(torch.nn.Module):
    """The least that Run.save needs of a model."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3))

    def save(self, folder):
        common.write_atomic(os.path.join(folder, "model.safetensors"), b"weights")


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "file"
    common.write_atomic(str(path), b"old")

    def breaks(f):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    with pytest.raises(ValueError, match="No space left on device.*still there"):
        common.write_atomic(str(path), breaks)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_torch_save_on_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    real_open = open
    monkeypatch.setattr("builtins.open", lambda path, mode="r", **k: real_open(
        "/dev/full" if str(path).endswith(".tmp") else path, mode, **k))
    monkeypatch.setattr(os, "remove", lambda _: None)
    with pytest.raises(ValueError, match="could not write"):
        common.write_atomic(str(tmp_path / "state.pt"), lambda f: torch.save(torch.zeros(100_000), f))


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    common.write_atomic(str(path), b"old")
    code = ("import common, os, signal\n"
            "def half(f): f.write(b'half'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
            f"common.write_atomic({str(path)!r}, half)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert path.read_bytes() == b"old"


def test_an_absent_device_and_unknown_names_are_refused():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device=cuda.*--device=auto"):
            common.pick_device("cuda")
    with pytest.raises(ValueError, match="tpu"):
        common.pick_device("tpu")
    with pytest.raises(ValueError, match="fp16"):
        common.pick_dtype("fp16", torch.device("cpu"))


def test_an_out_dir_that_holds_a_run_is_refused_and_overwriting_waits_until_all_else_is_well(start, tmp_path):
    run = start()
    run.resume(Toy(), torch.optim.SGD(Toy().parameters(), lr=1))
    run.log(0, loss=1.0)
    run.finish()
    with pytest.raises(ValueError, match="already holds a run .*--resume=true.*--overwrite=true"):
        start()
    start(overwrite=True)                           # and then, say, the data turn out to be missing
    assert (tmp_path / "run" / "log.jsonl").read_text() == '{"step": 0, "loss": 1.0}\n'
    again = start(overwrite=True)
    again.resume(Toy(), torch.optim.SGD(Toy().parameters(), lr=1))
    assert (tmp_path / "run" / "log.jsonl").read_text() == ""


def test_resume_restores_model_optimizer_step_extra_and_the_log_as_they_were(start, tmp_path):
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = start()
    run.resume(model, optimizer)
    model.weight.sum().backward()
    optimizer.step()
    run.log(0, loss=1.0)
    run.extra["best"] = 0.5
    run.save(model, optimizer, step=1)
    run.log(1, loss=0.9)                            # lost: after the newest state
    run.finish()

    other = Toy()
    its_optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    run = start(resume=True)
    run.resume(other, its_optimizer)
    assert run.first_step == 1 and run.extra == {"best": 0.5} and run.elapsed() > 0
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(its_optimizer.state[other.weight]["momentum_buffer"], torch.ones(3))
    run.log(1, loss=0.8)
    run.finish()
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert records == [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.8}]


def test_resume_without_a_state_or_with_other_options_names_them(start):
    with pytest.raises(ValueError, match="no state to resume"):
        start(resume=True)
    model = Toy()
    run = start()
    run.resume(model, torch.optim.SGD(model.parameters(), lr=1))
    run.save(model, torch.optim.SGD(model.parameters(), lr=1), step=3)
    run.finish()
    with pytest.raises(ValueError, match="seed was 1 and is 2"):
        start(resume=True, seed=2)
    start(resume=True, device="auto")               # does not change the numbers' meaning


def test_a_log_that_somebody_shortened_is_refused_not_filled_with_zeros(start, tmp_path):
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    run = start()
    run.resume(model, optimizer)
    run.log(0, loss=1.0)
    run.save(model, optimizer, step=1)
    run.finish()
    (tmp_path / "run" / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="shorter than when the state"):
        start(resume=True).resume(model, optimizer)


def test_random_numbers_go_on_where_the_saved_state_stood(start):
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    run = start()
    run.resume(model, optimizer)
    torch.rand(7)
    run.save(model, optimizer, step=1)
    expected = torch.rand(3)
    run.finish()
    start(resume=True).resume(model, optimizer)
    assert torch.equal(torch.rand(3), expected)


def test_a_damaged_state_is_one_sentence(start, tmp_path):
    os.makedirs(tmp_path / "run" / "resume")
    (tmp_path / "run" / "resume" / "state.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ValueError, match="state.pt is damaged"):
        start(resume=True)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_an_out_dir_without_permission_is_refused(start, tmp_path):
    os.makedirs(tmp_path / "run", mode=0o500)
    with pytest.raises(ValueError, match="permission denied"):
        start()


def test_an_out_dir_below_a_file_is_refused(start, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot make out_dir"):
        start(out_dir=str(tmp_path / "file" / "run"))


def test_the_matmul_rate_is_that_of_real_products():
    rate = common.matmul_rate(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1e8 < rate < 1e14
