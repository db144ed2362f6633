"""record.py: what a run logs is on disk in its order, and a GPU is not waited for."""
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import record


@pytest.fixture
def log(tmp_path):
    log = record.Log(str(tmp_path), {}, clock=lambda: 10.0)
    yield log
    log.close()


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").open()]


def test_numbers_and_tensors_are_written_as_numbers_at_once(log, tmp_path):
    log.record(3, 0.5, dict(loss=torch.tensor(2.5, dtype=torch.float64), skipped_updates=torch.tensor(4), lr=0.1))
    log.saved()
    assert lines(tmp_path) == [{"step": 3, "loss": 2.5, "skipped_updates": 4, "lr": 0.1}]


def test_what_a_gpu_still_computes_is_written_with_the_next_record_in_order_and_all_of_it_when_saved(
        log, tmp_path, monkeypatch):
    waited = []

    class Slow(record.Fetched):                             # whatever has a tensor comes from a GPU
        def __init__(self, named):
            super().__init__(named)
            if any(isinstance(value, torch.Tensor) for value in named.values()):
                self.event = SimpleNamespace(synchronize=lambda: waited.append(self.named["loss"].item()))
    monkeypatch.setattr(record, "Fetched", Slow)
    for step in range(3):
        log.record(step, None, dict(loss=torch.tensor(float(step))))
        assert waited == list(range(step))                  # never for the newest
    log.record(3, None, dict(val_loss=9.0))                 # a plain number: it and what stood before it are written
    log.record(4, None, dict(loss=torch.tensor(4.0)))
    assert waited == [0, 1, 2]
    size = log.saved()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4] and waited == [0, 1, 2, 4]
    assert size == (tmp_path / "log.jsonl").stat().st_size


def test_a_rate_is_of_the_gpus_time_and_known_when_its_record_is_written(log, tmp_path):
    begin = SimpleNamespace(elapsed_time=lambda end: 250.0 if end == "end" else 0.0)        # ms, as CUDA's events say
    rate = record.Rate(begin, "end")
    log.record(1, None, dict(steps_per_second=rate, tokens_per_second=rate * 64))
    log.saved()
    assert lines(tmp_path) == [{"step": 1, "steps_per_second": 4.0, "tokens_per_second": 256.0}]


def test_a_record_that_waits_is_written_though_the_run_ends_in_an_error(tmp_path):
    script = ("import sys, record, torch; log = record.Log(sys.argv[1], {}, clock=lambda: 1.0)\n"
              "log.unwritten.append((7, None, record.Fetched(dict(loss=torch.tensor(2.0)))))\n"
              "raise SystemExit('too many updates were skipped')")
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=Path(record.__file__).parent,
                            capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr == "too many updates were skipped\n"
    assert lines(tmp_path) == [{"step": 7, "loss": 2.0}]


def test_a_log_that_goes_on_keeps_what_was_saved_and_drops_what_came_after(tmp_path):
    first = record.Log(str(tmp_path), {}, clock=lambda: 1.0)
    first.record(0, None, dict(loss=1.0))
    size = first.saved()
    first.record(1, None, dict(loss=2.0))
    first.close()
    again = record.Log(str(tmp_path), {}, clock=lambda: 1.0, keep=size)
    again.record(1, None, dict(loss=3.0))
    again.close()
    assert [line["loss"] for line in lines(tmp_path)] == [1.0, 3.0]
    with pytest.raises(ValueError, match="shorter than when the state"):
        record.Log(str(tmp_path), {}, clock=lambda: 1.0, keep=10 ** 6)


def test_curves_are_drawn_from_a_log(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": i, "loss": 1 / (i + 1), "val_loss": 2.0}) + "\n" for i in range(5)))
    assert record.curves(log).startswith(b"\x89PNG")
