"""Reads and writes one safetensors file without holding its tensors in memory.

The library's own writer needs all tensors of a file at once. Here the header is written first, from the names and
shapes, and each tensor (or slice of one) is written to its place when it is ready. Reading maps the file into memory,
so tensors that are not used cost nothing, and the others are in the page cache.

Format: 8 bytes little-endian header length; JSON header {name: {dtype, shape, data_offsets}}; the data.
Source: the format section of safetensors' README.
"""

import json
import math
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json
from megavlm.base.quoting import shortened

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """The dtype (as safetensors spells it, for example "BF16") and the shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def checked(cls, dtype: object, shape: object) -> "TensorInfo":
        """Made of values from a file. Raises a ValueError if they are no dtype and no shape."""
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"the dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"the shape is {shape!r}")
        return cls(dtype, tuple(shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize


class SafetensorsReader:
    """A safetensors file, mapped for reading.

    Attributes:
        tensors: name to TensorInfo, in the order of the data.
        metadata: the header's free text fields, or None.

    Raises:
        UserError: the file is missing, is not a safetensors file, or is shorter than its header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or 8 + length > size:
                    raise _damaged(path, f"{size:,} bytes, too short for its header")
                header = parse_json(file.read(length))
                # A private mapping, because torch needs a writable buffer. Nothing writes to it, so no page is copied.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise UserError(f"no such file: {path}", "fetch the missing file of the Hugging Face folder") from None
        except UserError:
            raise
        except (ValueError, OSError) as error:
            raise _damaged(path, str(error)) from None
        self._begin: dict[str, int] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self.metadata: dict[str, str] | None = header.pop("__metadata__", None)
            fields = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            for name, field in fields:
                if isinstance(field["dtype"], str) and field["dtype"] not in DTYPES:
                    raise UserError(f"{path}: {name} has dtype {field['dtype']}; allowed: {', '.join(DTYPES)}")
                begin, end = field["data_offsets"]
                self._add(name, TensorInfo.checked(field["dtype"], field["shape"]), begin, end, 8 + length)
        except UserError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"its header does not describe tensors: {shortened(repr(error))}") from None

    def _add(self, name: str, info: TensorInfo, begin: int, end: int, data: int) -> None:
        """Notes a tensor whose bytes are [begin, end) behind ``data``, if the file has them."""
        if type(begin) is not int or begin < 0 or end - begin != info.nbytes:
            raise _damaged(self.path, f"{name} should have {info.nbytes:,} bytes but has {end - begin:,}")
        if data + end > len(self._map):
            raise _damaged(
                self.path, f"cut off at {len(self._map):,} bytes, inside {name}, which ends at {data + end:,}"
            )
        self.tensors[name] = info
        self._begin[name] = data + begin

    def read(self, name: str) -> Tensor:
        """Tensor ``name``, backed by the file and valid as long as it is referenced. Do not write to it."""
        info = self.tensors[name]
        count = math.prod(info.shape)
        if count == 0:
            return torch.empty(info.shape, dtype=info.torch_dtype)
        flat = torch.frombuffer(self._map, dtype=info.torch_dtype, count=count, offset=self._begin[name])
        return flat.view(info.shape)


class SafetensorsWriter:
    """A new safetensors file, which is filled tensor by tensor in any order, by one or more threads.

    Args:
        path: file to create.
        tensors: names and shapes in the order of the data.
        metadata: free text fields of the header; transformers needs ``{"format": "pt"}``.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], metadata: dict[str, str] | None) -> None:
        header: dict = {} if metadata is None else {"__metadata__": metadata}
        self._begin, end = {}, 0
        for name, info in tensors.items():
            self._begin[name] = end
            end += info.nbytes
            offsets = [self._begin[name], end]
            header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8, as the library writes it
        self.path, self.tensors = path, tensors
        self._data = 8 + len(text)
        self._missing = {name: info.nbytes for name, info in tensors.items()}
        self._lock = threading.Lock()
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.flush()
        self._file.truncate(self._data + end)

    def write(self, name: str, tensor: Tensor, first_row: int = 0) -> None:
        """Writes ``tensor``, on the CPU and in the stored dtype, into ``name`` from row ``first_row`` of axis 0."""
        info = self.tensors[name]
        assert tensor.dtype == info.torch_dtype, (name, tensor.dtype, info)
        row = info.nbytes // info.shape[0] if info.shape and info.shape[0] else 0
        offset = self._data + self._begin[name] + first_row * row
        data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        with self._lock:
            self._missing[name] -= len(data)
        while data:  # one call writes at most 2 GiB
            written = os.pwrite(self._file.fileno(), data, offset)
            data, offset = data[written:], offset + written
        # Linux starts writing the new pages to disk and frees those that are written. So close() waits only for the
        # last pages, and the next tensor reuses the same memory, which halves the time spent in the kernel.
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Flushes the file to disk. All tensors must have been written completely."""
        assert not any(self._missing.values()), {n: b for n, b in self._missing.items() if b}
        os.fsync(self._file.fileno())
        self._file.close()


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is not a complete safetensors file: {what}", "fetch or write the file again")
