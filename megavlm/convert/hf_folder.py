"""Hugging Face model folders: the weights, which are read on demand, and the layout of files, names and dtypes."""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from megavlm.base.errors import UserError
from megavlm.base.json_files import read_json
from megavlm.base.quoting import shortened
from megavlm.convert.safetensors_file import DTYPE_NAMES, SafetensorsReader, SafetensorsWriter, TensorInfo

NOT_QUANTISED = "give the folder of the same model in bfloat16, float16 or float32"
_WEIGHTS = ("BF16", "F16", "F32", "F64")
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_COPIED = {".json", ".jinja", ".txt", ".model", ".tiktoken"}  # configuration, processor, tokenizer, chat template
_LEGAL = {"LICENSE", "NOTICE"}
_SHARD_BYTES = 5 * 10**9
_PICKLED = ("*.bin", "*.pt", "*.pth")  # weights in torch's own format
HF_LAYOUT = "hf_layout.json"
"""File in a checkpoint that records the names, files and dtypes of the HF folder that it was converted from."""


@dataclass(frozen=True)
class HfLayout:
    """The files of a folder's weights, with the order, names, shapes and dtypes of their tensors.

    Attributes:
        files: for each file its tensors, in the order of the data.
        metadata: for each file the free text fields of its header, or None.
        index: content of the shard index; None for a single file.
        untied: whether the output layer is a weight of its own although config.json ties it to the word embedding.
    """

    files: dict[str, dict[str, TensorInfo]]
    metadata: dict[str, dict[str, str] | None]
    index: dict | None = None
    untied: bool = False

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors of all files."""
        return {name: info for file in self.files.values() for name, info in file.items()}

    def to_json(self) -> str:
        files = {
            file: {"metadata": self.metadata[file], "tensors": {n: [i.dtype, *i.shape] for n, i in tensors.items()}}
            for file, tensors in self.files.items()
        }
        untied = {"untied": True} if self.untied else {}
        return json.dumps({"files": files, "index": self.index, **untied}, indent=1)

    @classmethod
    def of_checkpoint(cls, folder: Path) -> "HfLayout | None":
        """The layout that a checkpoint records; None if it records none.

        Raises:
            UserError: the file cannot be read or does not describe a layout.
        """
        file = folder / HF_LAYOUT
        if not os.path.lexists(file):
            return None
        remedy = "use another checkpoint, or remove the file: new folders then get transformers' names and one dtype"
        data = read_json(file, remedy)
        try:
            files = {
                _plain(name): {
                    tensor: TensorInfo.checked(dtype, shape) for tensor, (dtype, *shape) in content["tensors"].items()
                }
                for name, content in data["files"].items()
            }
            metadata = {name: content["metadata"] for name, content in data["files"].items()}
            return cls(files, metadata, data["index"], data.get("untied", False))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file} does not describe a Hugging Face folder: {shortened(repr(error))}", remedy
            ) from None

    @classmethod
    def sharded(cls, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> "HfLayout":
        """A new layout for tensors: files of about 5 GB, in the given order."""
        tensors = {name: TensorInfo(DTYPE_NAMES[dtype], tuple(shape)) for name, shape in shapes.items()}
        return cls({SINGLE_FILE: tensors}, {}).with_files_of(_SHARD_BYTES)

    def with_files_of(self, most: int) -> "HfLayout":
        """The same tensors in the same order, in files of at most ``most`` bytes; a larger tensor has a file alone."""
        groups: list[dict[str, TensorInfo]] = [{}]
        size = 0
        for name, info in self.tensors.items():
            if size and size + info.nbytes > most:
                groups.append({})
                size = 0
            groups[-1][name] = info
            size += info.nbytes
        files = {SINGLE_FILE: groups[0]}
        index: dict | None = None
        if len(groups) > 1:
            files = {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}
            weight_map = {name: file for file, group in files.items() for name in group}
            total = sum(info.nbytes for info in self.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        return HfLayout(files, {file: {"format": "pt"} for file in files}, index, self.untied)

    def with_dtype(self, dtype: torch.dtype) -> "HfLayout":
        """The same layout with every tensor in ``dtype``."""
        name = DTYPE_NAMES[dtype]
        return self._with({tensor: TensorInfo(name, info.shape) for tensor, info in self.tensors.items()})

    def with_rows(self, names: Iterable[str], rows: int) -> "HfLayout":
        """The same layout with another number of rows in those of the tensors ``names`` that it has."""
        found = {name: self.tensors[name] for name in names if name in self.tensors}
        return self._with({name: TensorInfo(info.dtype, (rows, *info.shape[1:])) for name, info in found.items()})

    def _with(self, changed: dict[str, TensorInfo]) -> "HfLayout":
        files = {f: {n: changed.get(n, i) for n, i in tensors.items()} for f, tensors in self.files.items()}
        index = self.index
        if index is not None:
            total = sum(info.nbytes for tensors in files.values() for info in tensors.values())
            index = {**index, "metadata": {**index.get("metadata", {}), "total_size": total}}
        return replace(self, files=files, index=index)


@dataclass
class HfWeights:
    """The weights of a folder, mapped into memory; ``layout`` describes them.

    Raises:
        UserError: the folder has no weights, a file is missing or damaged, a tensor is not in the file that the index
            names, or weights are quantised.
    """

    folder: Path
    layout: HfLayout = field(init=False)
    _readers: dict[str, SafetensorsReader] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        index: dict | None = None
        weight_map: dict[str, str] = {}
        names = [SINGLE_FILE]
        if os.path.lexists(self.folder / INDEX):
            index = read_json(self.folder / INDEX, "fetch the file again")
            try:
                weight_map = index["weight_map"]
                names = [_plain(name) for name in dict.fromkeys(weight_map.values())]
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{self.folder / INDEX} is not a shard index: {shortened(repr(error))}", "fetch the file again"
                ) from None
        elif not os.path.lexists(self.folder / SINGLE_FILE):
            pickled = sorted(file.name for pattern in _PICKLED for file in self.folder.glob(pattern))
            instead = f"; {short_list(pickled)} is pickled, and reading it could run a program" if pickled else ""
            raise UserError(
                f"{self.folder} holds no weights: neither {INDEX} nor {SINGLE_FILE}{instead}",
                "save the model with safetensors"
                if pickled
                else "give a complete Hugging Face folder; a download may be incomplete",
            )
        files = {name: SafetensorsReader(self.folder / name) for name in sorted(names)}
        self.layout = HfLayout(
            {name: file.tensors for name, file in files.items()},
            {name: file.metadata for name, file in files.items()},
            index,
        )
        self._readers = {tensor: file for file in files.values() for tensor in file.tensors}
        for tensor, name in weight_map.items():
            if tensor not in files[name].tensors:
                raise UserError(
                    f"{self.folder}: tensor {tensor} is not in {name}, although {INDEX} says so",
                    "fetch the folder's files again",
                )
        for tensor, info in self.layout.tensors.items():
            if info.dtype not in _WEIGHTS:
                raise UserError(
                    f"{self.folder}: {tensor} is stored as {info.dtype}, so the weights are quantised; allowed: "
                    f"{', '.join(_WEIGHTS)}",
                    NOT_QUANTISED,
                )

    @staticmethod
    def present(folder: Path) -> bool:
        """Whether the folder has weights; some folders have only the configuration and the processor."""
        return any(folder.glob("*.safetensors"))

    def read(self, name: str) -> Tensor:
        """Tensor ``name``, backed by its file. Do not write to it."""
        return self._readers[name].read(name)


class HfWriter:
    """Writes the weights of a new folder into the files of ``layout``, tensor by tensor and in any order."""

    def __init__(self, folder: Path, layout: HfLayout) -> None:
        self.folder, self.layout = folder, layout
        self._writers: dict[str, SafetensorsWriter] = {}
        for file, tensors in layout.files.items():
            writer = SafetensorsWriter(folder / file, tensors, layout.metadata[file])
            self._writers |= dict.fromkeys(tensors, writer)

    def write(self, name: str, tensor: Tensor, first_row: int = 0) -> None:
        """Writes ``tensor``, cast to the layout's dtype, into ``name`` from row ``first_row`` of axis 0."""
        info = self._writers[name].tensors[name]
        self._writers[name].write(name, tensor.to(info.torch_dtype), first_row)

    def close(self) -> None:
        """Flushes all files to disk and writes the shard index."""
        for writer in set(self._writers.values()):
            writer.close()
        if self.layout.index is not None:
            text = json.dumps(self.layout.index, indent=2) + "\n"  # formatted as by transformers, in the original order
            (self.folder / INDEX).write_text(text, encoding="utf-8")


def copy_configuration(
    source: Path, out: Path, dtype: torch.dtype | None = None, vocab_size: int | None = None
) -> None:
    """Copies the files of configuration, processor and tokenizer, and the licence.

    Args:
        source: the Hugging Face folder.
        out: the folder to copy to.
        dtype: the dtype to write into config.json.
        vocab_size: the number of rows of word embedding and output layer to write into config.json.
    """
    for file in sorted(source.iterdir()):
        wanted = file.suffix in _COPIED and file.name != INDEX and not file.name.startswith(".")
        if file.is_file() and (wanted or file.name in _LEGAL):
            shutil.copyfile(file, out / file.name)
    if dtype is None and vocab_size is None:
        return
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in {"dtype", "torch_dtype"} & part.keys() if dtype is not None else ():
            part[key] = str(dtype).removeprefix("torch.")
        if vocab_size is not None and "vocab_size" in part:
            part["vocab_size"] = vocab_size
    if vocab_size is not None:
        config["text_config"]["vocab_size"] = vocab_size
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _plain(name: str) -> str:
    """The name of a file, which must not lead out of its folder."""
    if Path(name).name != name:
        raise ValueError(f"{name!r} is not the name of a file in the folder")
    return name


def short_list(names: Iterable[str], limit: int = 5) -> str:
    """The first few names and the number of further ones, for messages."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
