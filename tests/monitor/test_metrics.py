"""metrics.jsonl: what is written, and what is left after a kill and a resume."""

import json
import resource

import pytest
import torch

from megavlm.base.errors import UserError
from megavlm.monitor.metrics import REQUIRED, MetricsWriter, read_metrics, throughput


def line(step, **changes):
    return {**dict.fromkeys(REQUIRED, 1.0), "step": step, **changes}


def test_lines_are_on_disk_as_soon_as_written(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(line(1, loss=torch.tensor(0.5), mfu=None))
    writer.write(line(2, moe_aux_loss=0.25))
    first, second = (json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["loss"] == 0.5
    assert first["mfu"] is None
    assert second["moe_aux_loss"] == 0.25
    assert set(REQUIRED) <= set(first)


def test_not_finite_is_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(line(1, loss=float("nan"), grad_norm=float("inf")))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert read_metrics(tmp_path)[0]["loss"] is None


def test_missing_field_is_a_bug(tmp_path):
    incomplete = line(1)
    del incomplete["grad_norm/vision"]
    with MetricsWriter(tmp_path) as writer, pytest.raises(AssertionError, match="grad_norm/vision"):
        writer.write(incomplete)


def test_what_was_measured_before_the_first_step_has_a_line_of_its_own(tmp_path):
    """It stays when the run continues, and is gone when the run begins again."""
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 0, "eval/loss": 2.0})
        writer.write(line(1))
        writer.write(line(2))
    MetricsWriter(tmp_path, resume_step=1).close()
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [0, 1]
    MetricsWriter(tmp_path).close()
    assert not read_metrics(tmp_path)


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 8):
            writer.write(line(step))
    file = tmp_path / "metrics.jsonl"
    kept_bytes = b"".join(file.read_bytes().splitlines(keepends=True)[:5])
    with file.open("a") as torn:
        torn.write('{"step": 8, "loss": 0.1')
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]

    with MetricsWriter(tmp_path, resume_step=5) as writer:
        writer.write(line(6, loss=9.0))
    assert [entry["step"] for entry in read_metrics(file)] == [1, 2, 3, 4, 5, 6]
    assert file.read_bytes().startswith(kept_bytes)
    assert read_metrics(file)[-1]["loss"] == 9.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_is_named(tmp_path):
    """A limit on the size of files stands for the full disk: it fails a write in the middle, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = MetricsWriter(tmp_path)
    writer.write(line(1))
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
    try:
        with writer, pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: .* GB are free"):
            writer.write(line(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "metrics.jsonl").stat().st_size == size + 20
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]


def test_whole_last_line_without_newline_is_kept_apart(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(line(1)))
    with MetricsWriter(tmp_path, resume_step=1) as writer:
        writer.write(line(2))
    assert [entry["step"] for entry in read_metrics(file)] == [1, 2]


def test_other_ranks_write_nothing(tmp_path):
    with MetricsWriter(tmp_path, enabled=False) as writer:
        writer.write({})
    assert not list(tmp_path.iterdir())
    assert read_metrics(tmp_path) == []


def test_throughput():
    got = throughput(tokens=3000, row_tokens=4000, seconds=2.0, model_flops=8e12, num_devices=4, peak_flops=10e12)
    assert got == {"packing": 0.75, "seconds": 2.0, "tokens_per_second": 1500.0, "model_tflops": 1.0, "mfu": 0.1}
    assert throughput(1, 1, 1.0, 1.0, 1, None)["mfu"] is None
