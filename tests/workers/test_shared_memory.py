"""Data workers that get no shared memory, or die: what the user is told."""

import json
import os
import resource
import signal

import pytest
import torch

from megavlm.base.errors import RunFailure
from megavlm.config.settings import DataSettings
from megavlm.data.loader import build_loader
from megavlm.data.renderer import Renderer
from megavlm.workers import worker_processes


@pytest.fixture
def next_row(media, make_renderer, monkeypatch):
    """next_row(in_worker, picture): the first row of a loader whose worker calls `in_worker` when it starts."""
    loaders = []

    def next_row(in_worker, picture: bool = True):
        monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds to wait for its end
        start = worker_processes._start_worker
        monkeypatch.setattr(worker_processes, "_start_worker", lambda worker: (start(worker), in_worker()))
        record = {"text": "<image>x", "images": ["large.jpg"]} if picture else {"text": "x " * 50}
        (media.base / "shm.jsonl").write_text(json.dumps(record))
        settings = DataSettings(train=[{"path": media.base / "shm.jsonl"}], seq_length=1024, workers=1)
        loader = build_loader(settings, make_renderer(seq_length=1024), "pretrain", dp_rank=0, dp_size=1, seed=0)
        loaders.append(loader)
        return next(loader)

    yield next_row
    for loader in loaders:
        loader.close()


def nothing_to_allocate():
    """No file in memory may have more than 4 KiB: the kernel's own refusal, as by a small /dev/shm."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.parametrize("picture", [True, False], ids=["pixels", "token ids"])
def test_too_little_shared_memory_is_said_in_words(next_row, picture):
    """Of pixels the worker asks itself; of all other tensors torch would ask in a thread that loses the error."""
    with pytest.raises(RunFailure, match="a data worker could not get shared memory for a row: /dev/shm has") as caught:
        next_row(nothing_to_allocate, picture)
    assert "--shm-size" in caught.value.remedy
    assert "data.workers" in caught.value.remedy


@pytest.mark.parametrize(
    ("number", "message"),
    [(signal.SIGBUS, "could not get shared memory"), (signal.SIGKILL, "a data worker died: it was killed by signal 9")],
)
def test_a_worker_that_is_killed_is_said_in_words(next_row, monkeypatch, number, message):
    monkeypatch.setattr(Renderer, "complete_row", lambda *_: os.kill(os.getpid(), number))
    with pytest.raises(RunFailure, match=message):
        next_row(lambda: None)


def test_rows_of_workers_are_in_shared_memory(next_row):
    row = next_row(lambda: None)
    assert all(tensor.is_shared() for tensor in (row.input_ids, row.pixels, row.position_ids, row.cu_seqlens))
    assert torch.equal(row.input_ids[:1], row.input_ids[:1].clone())
