"""Files as an attacker writes them: reading them with Python's pickle runs a command."""

import io
import os
import pickle
from pathlib import Path

import torch


class Command:
    """Creates the file ``mark`` when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


def saved(value: object) -> bytes:
    """What ``torch.save`` writes, which is how checkpoints store objects."""
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def put_object(checkpoint: Path, key: str, value: object) -> None:
    """Replaces an object of a checkpoint by ``value``, in a file of its own; a new key is added."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    data = saved([value])
    (checkpoint / "new.distcp").write_bytes(data)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.state_dict_metadata.setdefault(key, BytesStorageMetadata())
    metadata.storage_data[MetadataIndex(key)] = _StorageInfo("new.distcp", 0, len(data))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def objects_of(checkpoint: Path) -> list[str]:
    """The keys of a checkpoint's objects."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    return [key for key, stored in metadata.state_dict_metadata.items() if not hasattr(stored, "size")]
