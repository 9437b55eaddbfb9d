"""Reads the pickled parts of a checkpoint without running anything that its author may have put into them.

Python's pickle calls any function that a file names, and torch and Megatron read ``.metadata`` and the objects of a
checkpoint with it. Here, a file may name only what the checkpoints of megavlm name. What has passed can be read again
by Megatron.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megavlm.base.errors import UserError

# The classes and functions that .metadata is made of. Calling them with any arguments only makes values.
_IN_METADATA = {
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # its name in Python 3.13
}
# What objects contain beside numbers, strings, containers and tensors: the state of numpy's random numbers.
_array = np.empty(0).__reduce__()[0]  # the function that makes an array; numpy 1 and 2 have it in different modules
_IN_OBJECTS: list[Any] = [
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    *((_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]
_NAMED = re.compile(r"GLOBAL (\S+)")
_REFUSED = "it is not a checkpoint of megavlm, or somebody has put a program into it: do not use it"


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _IN_METADATA.get(module, ()):
            raise _Unexpected(f"{module}.{name}")
        return super().find_class(module, name)


class _Unexpected(pickle.UnpicklingError):
    """A file names something that no checkpoint of megavlm contains."""


def read_metadata(file: Path) -> Metadata:
    """The description of a checkpoint's tensors and objects, and of their places in its files.

    Raises:
        UserError: the file cannot be read, names anything but what such a file is made of, or describes no checkpoint.
    """
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        _check(metadata)
    except _Unexpected as error:
        raise UserError(f"{file} names {error}, which is no part of a checkpoint", _REFUSED) from None
    except Exception as error:  # damaged bytes can make pickle raise any exception
        raise UserError(f"{file} cannot be read: {short(error)}", "use another checkpoint") from None
    return metadata


def _check(metadata: Any) -> None:
    """Raises an exception unless the object has the types that the readers of checkpoints rely on."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError("it does not describe a checkpoint")
    for key, stored in metadata.state_dict_metadata.items():
        if not isinstance(key, str) or not isinstance(stored, TensorStorageMetadata | BytesStorageMetadata):
            raise ValueError(f"{key!r} is neither a tensor nor an object")
        if isinstance(stored, TensorStorageMetadata) and not isinstance(stored.properties.dtype, torch.dtype):
            raise ValueError(f"the dtype of {key} is {stored.properties.dtype!r}")
    for index, place in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or place.transform_descriptors:
            raise ValueError(f"{index} is stored in an unknown way")
        if Path(place.relative_path).name != place.relative_path:
            raise ValueError(f"{index.fqn} is stored outside of the checkpoint, in {place.relative_path}")
        if min(place.offset, place.length) < 0:
            raise ValueError(f"{index.fqn} is stored before the beginning of {place.relative_path}")


def read_object(data: bytes, where: str) -> Any:
    """The object that ``torch.save`` has written as ``data``. ``where`` names it in messages.

    Raises:
        UserError: ``data`` is damaged, or names anything but the types that the objects of a checkpoint contain.
    """
    try:
        with torch.serialization.safe_globals(_IN_OBJECTS):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can raise any exception
        if named := _NAMED.search(str(error)):
            raise UserError(f"{where} names {named[1]}, which is no part of a checkpoint", _REFUSED) from None
        raise UserError(f"{where} cannot be read: {short(error)}", "use another checkpoint") from None


def short(error: BaseException) -> str:
    """The first line of an exception's text, for a message; torch's texts are long."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
