"""Reads and writes Megatron's torch_dist checkpoints in one process, without a model and tensor by tensor.

Such a checkpoint is a torch.distributed.checkpoint (DCP) folder with Megatron's metadata.json. Its tensors have one
global shape, whatever layout wrote them, so any layout can load them. This module uses DCP's planner interface: the
save planner provides each tensor only when the writer asks for it, and the load planner reads one slice at a time. All
state that is not a tensor is one object named "common_state"
(``megatron.core.dist_checkpointing.serialization.save``).
"""

import dataclasses
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megavlm.base.errors import UserError
from megavlm.base.json_files import read_json
from megavlm.convert.safe_pickle import read_metadata, read_object, short
from megavlm.convert.tensor_order import Shape
from megavlm.convert.threads import in_threads

# torch's writer keeps the tensors of a file in memory until it is complete: at most THREADS times this.
_FILE_BYTES = 384 * 2**20
# megatron.core.dist_checkpointing.core.CheckpointingConfig
_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_LEGACY = "common.pt"  # the common state in Megatron's older checkpoints
_COMMON_KEY = "common_state/shard_0_1"  # ShardedObject("common_state", …, (1,), (0,)).unique_key


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor to be written: ``load(first, last)`` returns its rows [first, last) of axis 0, on the CPU.

    ``pieces`` is the number of equal parts of axis 0, which are loaded and stored one at a time.
    """

    key: str
    shape: Shape
    dtype: torch.dtype
    load: Callable[[int, int], Tensor]
    pieces: int = 1


class McoreCheckpoint:
    """A Megatron checkpoint, whether converted or saved by training, which is read slice by slice.

    Attributes:
        tensors: for each key the global shape and dtype, including optimizer states.

    Raises:
        UserError: the folder is missing, is not a complete torch_dist checkpoint, or its ``.metadata`` names anything
            but what such a file is made of (``safe_pickle``).
    """

    kind = "checkpoint"

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise UserError(f"no such checkpoint folder: {path}", "check the path")
        missing = [name for name in ("metadata.json", ".metadata") if not (path / name).is_file()]
        if missing:
            steps = sorted(child.name for child in path.glob("**/step_*") if child.is_dir())
            if steps:
                remedy = f"it holds {steps[-1]}: give that folder"
            elif (path / "config.json").is_file():
                remedy = (
                    "this is a Hugging Face folder, which model.load takes as it is; to convert it: "
                    f"python checkpoint_tools/hf2mcore.py --hf {path} --out CHECKPOINT"
                )
            else:
                remedy = (
                    "give the output folder of a run or a folder in its checkpoints, or what hf2mcore.py has written"
                )
            raise UserError(f"{path} is not a Megatron checkpoint: missing {' and '.join(missing)}", remedy)
        if not read_json(path / "metadata.json", "use another checkpoint").items() >= _BACKEND.items():
            raise UserError(
                f"{path / 'metadata.json'} does not describe a checkpoint in the format torch_dist",
                "use another checkpoint",
            )
        if (path / _LEGACY).exists():
            raise UserError(
                f"{path} contains {_LEGACY}, which Megatron would unpickle and which megavlm never writes",
                "use a checkpoint that hf2mcore.py or training has written",
            )
        self._reader = dcp.FileSystemReader(path)
        self._metadata = read_metadata(path / ".metadata")
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._stored: dict[str, TensorStorageMetadata] = {
            key: stored
            for key, stored in self._metadata.state_dict_metadata.items()
            if not isinstance(stored, BytesStorageMetadata)
        }
        self.tensors = {key: (tuple(s.size), s.properties.dtype) for key, s in self._stored.items()}

    def check_files(self) -> None:
        """Raises a UserError if a data file is missing or shorter than the metadata says."""
        ends: dict[str, int] = {}
        for stored in self._metadata.storage_data.values():
            ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
        for name, end in sorted(ends.items()):
            file = self.path / name
            size = file.stat().st_size if file.is_file() else None
            if size is None or size < end:
                found = "missing" if size is None else f"{size:,} bytes instead of {end:,}"
                raise UserError(f"{self.path} is incomplete: {name} is {found}", "use another checkpoint")

    def check_contents(self) -> None:
        """Checks all files as ``check_files`` does, and that every object can be read and names only known types.

        Megatron reads objects with Python's pickle, so call this before Megatron reads anything from the folder.

        Raises:
            UserError: a file is missing or shorter than the metadata says, or an object is refused.
        """
        self.check_files()
        for index, stored in self._metadata.storage_data.items():
            if index.fqn not in self._stored:
                self._object(index.fqn, stored)

    def common_state(self) -> dict:
        """The state that is not a tensor and that all ranks share, such as the number of steps.

        Raises:
            UserError: it is missing or refused (``safe_pickle``).
        """
        index = MetadataIndex(_COMMON_KEY)
        if index not in self._metadata.storage_data:
            raise UserError(f"{self.path} has no {_COMMON_KEY}", "use another checkpoint")
        state = self._object(_COMMON_KEY, self._metadata.storage_data[index])
        if not isinstance(state, list) or len(state) != 1 or not isinstance(state[0], dict):
            raise UserError(f"{self.path}: {_COMMON_KEY} is not the state of a checkpoint", "use another checkpoint")
        return state[0]

    def _object(self, key: str, place: Any) -> Any:
        """Reads an object. ``place``: torch's description of where it is stored."""
        try:
            with (self.path / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                data = file.read(place.length)
        except OSError as error:
            raise UserError(f"{self.path}: cannot read {key}: {short(error)}", "use another checkpoint") from None
        return read_object(data, f"{self.path}: the object {key}")

    def read(self, key: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) of axis 0 of tensor ``key``, assembled from the stored shards.

        Raises:
            UserError: a data file is missing, damaged or incomplete.
        """
        stored = self._stored[key]
        size = list(stored.size)
        offsets = [0] * len(size)
        if size:
            last = size[0] if last is None else last
            offsets[0], size[0] = first, last - first
        target = torch.empty(size, dtype=stored.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(size))
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        if sum(math.prod(item.lengths) for item in items) != target.numel():
            raise UserError(f"{self.path}: shards of the tensor {key} are missing", "use another checkpoint")
        try:
            self._reader.read_data(LoadPlan(items), _IntoOneTensor(target))
        except Exception as error:  # torch.load's unpickler raises many types for a damaged file
            raise UserError(
                f"{self.path}: cannot read {key}: {short(error)}", "the checkpoint is damaged: use another checkpoint"
            ) from None
        return target


class _IntoOneTensor(dcp.DefaultLoadPlanner):
    """A load planner with ``target`` as its only destination."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        box = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._target[tuple(slice(begin, begin + length) for begin, length in box)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


def write_checkpoint(
    path: Path, sources: Iterable[TensorToWrite], common: dict, advance: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Writes a torch_dist checkpoint into the folder ``path``, with at most 1.5 GiB of it in memory at a time.

    Args:
        path: a new folder; Megatron's ``dist_checkpointing.load`` reads it in any layout.
        sources: the tensors; each is loaded once, piece by piece, from several threads.
        common: state that is not a tensor, of types that ``torch.load(weights_only=True)`` accepts.
        advance: called with the number of bytes of each piece that is written.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is intended
        with _no_checksums():
            planner = _LazyPlanner(sources, common, advance)
            dcp.save({}, storage_writer=_GroupedWriter(path), planner=planner, no_dist=True)
    for file in path.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    # written last, because it marks the folder as complete
    (path / "metadata.json").write_text(json.dumps(_BACKEND), encoding="utf-8")


@contextmanager
def _no_checksums() -> Iterator[None]:
    """Makes torch.save omit the CRC of its zip records, which takes an eighth of the CPU time and is never checked."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _LazyPlanner(dcp.DefaultSavePlanner):
    """A save planner that takes its tensors from ``TensorToWrite`` instead of a state dict."""

    def __init__(self, sources: Iterable[TensorToWrite], common: dict, advance: Callable[[int], None]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._sources = {source.key: source for source in sources}
        self._common, self._advance = common, advance

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(_COMMON_KEY), WriteItemType.BYTE_IO)]
        for source in self._sources.values():
            size, rows = torch.Size(source.shape), source.shape[0] // source.pieces
            for piece in range(source.pieces):
                offset = torch.Size([piece * rows] + [0] * (len(size) - 1))
                chunk = ChunkStorageMetadata(offset, torch.Size([rows, *size[1:]]))
                data = TensorWriteData(chunk, TensorProperties(dtype=source.dtype), size)
                items.append(WriteItem(MetadataIndex(source.key, offset), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save([self._common], data)
            return data
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        tensor = self._sources[write_item.index.fqn].load(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0])
        assert tensor.shape == chunk.sizes, (write_item.index, tensor.shape)
        self._advance(tensor.nbytes)
        return tensor.contiguous()


class _GroupedWriter(dcp.FileSystemWriter):
    """DCP's file writer, but with several files of limited size, written a few at a time, instead of one huge file.

    Each thread flushes its file to disk when it is complete, while the others continue.
    """

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> Future:
        groups: list[list[WriteItem]] = [[]]
        size = 0
        for item in plan.items:
            if item.type != WriteItemType.BYTE_IO:
                data = item.tensor_data
                assert data is not None
                nbytes = math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
                if size and size + nbytes > _FILE_BYTES:
                    groups.append([])
                    size = 0
                size += nbytes
            groups[-1].append(item)
        write = super().write_data

        def write_file(number: int) -> list[WriteResult]:
            prefix = dataclasses.replace(plan.storage_data, prefix=f"__0_{number}_")
            return write(dataclasses.replace(plan, items=groups[number], storage_data=prefix), planner).wait()

        future: Future = Future()
        future.set_result([result for results in in_threads(write_file, range(len(groups))) for result in results])
        return future
