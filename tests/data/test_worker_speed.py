"""The measured speed of a data worker, with samples that take a known time."""

import json
import time

import pytest

from megavlm.base.errors import UserError
from megavlm.base.machine import processor
from megavlm.base.pools import num_cores
from megavlm.config.settings import DataSettings
from megavlm.data import rows
from megavlm.data.renderer import Renderer
from megavlm.data.worker_speed import WorkerSpeed, worker_speed
from megavlm.sources.blend import open_sources

SECONDS = 0.1  # of drafting a sample


@pytest.fixture
def measure(tmp_path, model_folder, monkeypatch):
    """Measures four rows of records, of which each takes ``SECONDS``."""
    plain = rows.draft_unit
    monkeypatch.setattr(rows, "draft_unit", lambda *given: (time.sleep(SECONDS), plain(*given))[1])

    def run(records: list[dict], **limits) -> WorkerSpeed:
        file = tmp_path / "texts.jsonl"
        file.write_text("\n".join(map(json.dumps, records)))
        settings = DataSettings(train=[{"path": file}], seq_length=128, packing_buffer=20)
        return worker_speed(open_sources(settings), Renderer(model_folder, settings), "tune", settings, 0, **limits)

    return run


def test_a_row_costs_as_many_drafts_as_it_has_samples(measure) -> None:
    # Texts of 61 tokens: two are a row, of 0.2 s. The 20 drafts before the first row take 2 s; with them, a row would
    # take 0.53 s. On a busy machine a row may be received late, the first one, too.
    found = measure([{"text": "1234567890" * 6}] * 3, most_rows=6)
    assert (found.rows, found.machine, found.cores) == (6, processor(), num_cores())
    assert 1.3 * SECONDS < found.row_seconds < 4.5 * SECONDS


def test_it_ends_after_enough_seconds(measure) -> None:
    assert measure([{"text": "1"}] * 3, enough_seconds=0.0).rows == 1


def test_data_that_cannot_be_used(measure) -> None:
    with pytest.raises(UserError, match="consecutive samples cannot be used"):
        measure([{"text": "1234567890" * 60}])
