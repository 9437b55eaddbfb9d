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
