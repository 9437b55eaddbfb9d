"""Packed rows of the toy's records, made once in each process of a world, on the ranks that read data."""

import functools
import json
from pathlib import Path


def packed_rows(folder: Path, root: Path, records: list[dict], settings, rows: tuple[tuple[int, ...], ...]) -> list:
    """The ``Row`` of each tuple of numbers of ``records``, whose pictures are under ``root``."""
    data, key = settings.data.model_dump_json(), json.dumps(records)
    return list(_packed(folder, root, key, data, settings.pad_multiple, rows))


@functools.lru_cache(maxsize=16)
def _packed(folder: Path, root: Path, records: str, data: str, pad_multiple: int, rows: tuple) -> tuple:
    from megavlm.config.data_sections import DataSettings
    from megavlm.data.renderer import Renderer
    from megavlm.media.files import in_folder

    renderer = Renderer(folder, DataSettings.model_validate_json(data), pad_multiple)
    samples = [
        renderer.encode(record, in_folder(root), f"record {i}", kind="tune", index=i)
        for i, record in enumerate(json.loads(records))
    ]
    return tuple(renderer.pack([samples[i] for i in row]) for row in rows)


def row_with(grids: list[tuple[int, int]], length: int = 40):
    """A row with two answers of ``length`` tokens, pictures of these grids of patches, and all else it can have."""
    import numpy as np
    import torch

    from megavlm.base.errors import UserError
    from megavlm.data.row import pack
    from megavlm.data.synthetic_row import synthetic_samples
    from megavlm.records.skipped_samples import SkippedSample

    count = sum(h * w for h, w in grids)
    samples = synthetic_samples(
        torch.arange(length) + 150_000,
        torch.randint(0, 256, (count, 768), dtype=torch.uint8),
        np.array(grids, dtype=np.int32).reshape(-1, 2),
        np.arange(count // 4),
        merge=2,
        answers=2,
    )
    row = pack(samples, 2 * length + 3, pad_id=0, grid_side=8, merge=2)
    error = UserError("cannot be read")
    row.skipped_samples = [SkippedSample.of(1, "a.jsonl:7", error, 6)]
    row.remarks, row.newly_read, row.loader_state = ["cut"], [3, 0], {"worker": 1}
    return row
