"""Compares two sets of weights tensor by tensor. Each is a Hugging Face folder or a Megatron checkpoint."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megavlm.base.new_output import progress_bar
from megavlm.convert.check_checkpoint import PARTS, check_checkpoint
from megavlm.convert.convert import rows
from megavlm.convert.hf_folder import HfWeights
from megavlm.convert.hf_shapes import has_own_output, shapes_of
from megavlm.convert.hf_source import check_names
from megavlm.convert.mcore_checkpoint import McoreCheckpoint
from megavlm.convert.names import HF_EMBEDDING, HF_OUTPUT, MCORE_EMBEDDING, MCORE_OUTPUT, Entry, table
from megavlm.model.shapes import Shapes

_SLICE = 2**24  # number of elements compared at a time


@dataclass
class Difference:
    """How one tensor differs.

    Attributes:
        name: HF name, or Megatron key if both sides are checkpoints.
        what: "only in a", "only in b", a pair of shapes or dtypes, or "values".
        max_abs: largest |a - b|; NaN if a tensor has a NaN; None if the tensors cannot be compared.
        relative: ‖a - b‖ / ‖a‖ (Frobenius norm), or None.
    """

    name: str
    what: str
    max_abs: float | None = None
    relative: float | None = None


class _Hf:
    """Reads an HF folder entry by entry in HF form, with experts always as [experts, out, in]."""

    def __init__(self, folder: Path, shapes: Shapes) -> None:
        self.weights = HfWeights(folder)
        self.tensors = self.weights.layout.tensors
        self.tied = shapes.tied and not has_own_output(self.weights)
        check_names(table(replace(shapes, tied=self.tied)), self.weights.layout, folder)

    def nbytes(self, entry: Entry) -> int:
        return sum(self.tensors[self._name(name)].nbytes for name in entry.hf)

    def read(self, entry: Entry, first: int, last: int) -> list[Tensor]:
        parts = [self.weights.read(self._name(name)) for name in entry.hf]
        if entry.pieces > 1:
            return [entry.layout.to_mcore([part[first:last]], (last - first, *entry.shape[1:])) for part in parts]
        return parts

    def _name(self, name: str) -> str:
        return HF_EMBEDDING if name == HF_OUTPUT and self.tied else name


class _Mcore:
    """Reads a Megatron checkpoint entry by entry in HF form. ``shapes``: the model's; None if unknown."""

    def __init__(self, checkpoint: McoreCheckpoint, shapes: Shapes | None = None) -> None:
        self.checkpoint = checkpoint
        self.tied = shapes is not None and shapes.tied
        if shapes is not None:
            check_checkpoint(checkpoint, shapes)

    def nbytes(self, entry: Entry) -> int:
        return math.prod(entry.shape) * self.checkpoint.tensors[self._key(entry.key)][1].itemsize

    def read(self, entry: Entry, first: int, last: int) -> list[Tensor]:
        tensor = self.checkpoint.read(self._key(entry.key), first, last)
        shapes = [(shape[0] // entry.pieces, *shape[1:]) for shape in entry.hf.values()]
        return entry.layout.to_hf(tensor, shapes)

    def _key(self, key: str) -> str:
        return MCORE_EMBEDDING if key == MCORE_OUTPUT and self.tied else key


def compare(a: str | Path, b: str | Path, *, progress: bool = True) -> tuple[list[Difference], int]:
    """Compares all weights of ``a`` and ``b`` bit by bit, in constant memory.

    Each side is a Hugging Face folder or a Megatron checkpoint, whose optimizer states are ignored. If a side is an HF
    folder, its config.json gives the names for both. Two checkpoints are compared key by key. The output layer of a
    tied model is its word embedding, and is compared if the other side has another one.

    Returns:
        The tensors that differ, and the number of tensors compared.

    Raises:
        UserError: a side is missing or damaged, or is not the model that the other side's config.json describes.
    """
    a, b = Path(a), Path(b)
    folders = [path for path in (a, b) if (path / "config.json").is_file()]
    differences: list[Difference] = []
    sides: list[_Hf | _Mcore]
    if folders:
        shapes = shapes_of(folders[0])
        sides = [
            _Hf(p, shapes) if p in folders else _Mcore(McoreCheckpoint(p), shapes_of(folders[0], p)) for p in (a, b)
        ]
        entries = table(replace(shapes, tied=all(side.tied for side in sides)))
    else:
        checkpoints = McoreCheckpoint(a), McoreCheckpoint(b)
        entries, differences = _common_keys(*checkpoints)
        sides = [_Mcore(checkpoint) for checkpoint in checkpoints]
    count = len(differences) + sum(len(entry.hf) for entry in entries)
    total = sum(side.nbytes(entry) for side in sides for entry in entries)
    with progress_bar(f"{a.name} ↔ {b.name}", total, show=progress) as advance:
        for entry in entries:
            found = {name: _Running() for name in entry.hf}
            for first, last in rows(entry):
                left, right = (side.read(entry, first, last) for side in sides)
                for name, x, y in zip(entry.hf, left, right, strict=True):
                    found[name].add(x, y)
            differences += [d for name, running in found.items() if (d := running.difference(name))]
            advance(sum(side.nbytes(entry) for side in sides))
    return differences, count


def _common_keys(a: McoreCheckpoint, b: McoreCheckpoint) -> tuple[list[Entry], list[Difference]]:
    """Entries for the tensors that two checkpoints share, and the differences that are found without reading data."""
    model_a, model_b = (
        {key: shape for key, (shape, _) in checkpoint.tensors.items() if key.startswith(PARTS)} for checkpoint in (a, b)
    )
    entries, differences = [], []
    for key in model_a | model_b:
        if key not in model_b:
            differences.append(Difference(key, "only in a"))
        elif key not in model_a:
            differences.append(Difference(key, "only in b"))
        elif model_a[key] != model_b[key]:
            differences.append(Difference(key, f"shape {list(model_a[key])} / {list(model_b[key])}"))
        else:
            shape = model_a[key]
            pieces = shape[0] if len(shape) == 3 else 1  # stacked experts
            entries.append(Entry(key, shape, {key: shape}, pieces=pieces))
    return entries, differences


class _Running:
    """The differences of one tensor, accumulated over its pieces."""

    def __init__(self) -> None:
        self.same_bits, self.max_abs, self.squares, self.norm = True, 0.0, 0.0, 0.0
        self.dtypes: set[tuple[torch.dtype, torch.dtype]] = set()

    def add(self, x: Tensor, y: Tensor) -> None:
        self.dtypes.add((x.dtype, y.dtype))
        x, y = x.reshape(-1), y.reshape(-1)
        for left, right in zip(x.split(_SLICE), y.split(_SLICE), strict=True):
            if left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8)):
                self.norm += left.float().square().sum().item()
                continue
            self.same_bits = False
            left, right = left.float(), right.float()
            gap = (left - right).abs()
            largest = gap.max().item()
            self.max_abs = largest if largest != largest or largest > self.max_abs else self.max_abs  # keeps a NaN
            self.squares += gap.square().sum().item()
            self.norm += left.square().sum().item()

    def difference(self, name: str) -> Difference | None:
        if self.same_bits:
            return None
        x, y = next(iter(self.dtypes))
        what = "values" if x == y else f"dtype {str(x).removeprefix('torch.')} / {str(y).removeprefix('torch.')}"
        relative = (self.squares / self.norm) ** 0.5 if self.norm else float("inf") if self.squares else 0.0
        return Difference(name, what, self.max_abs, relative)
