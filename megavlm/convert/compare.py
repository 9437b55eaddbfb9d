"""Compares two sets of weights tensor by tensor. Each is a Hugging Face folder or a Megatron checkpoint."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megavlm.convert.convert import check_keys, check_names, rows
from megavlm.convert.hf_folder import HfWeights
from megavlm.convert.mcore_checkpoint import McoreCheckpoint
from megavlm.convert.names import Entry, table
from megavlm.convert.new_output import progress_bar
from megavlm.model.shapes import Shapes

_MODEL_PARTS = ("vision.", "projector.", "language.")
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

    def __init__(self, folder: Path, entries: list[Entry]) -> None:
        self.weights = HfWeights(folder)
        check_names(entries, self.weights.layout, folder)
        self.tensors = self.weights.layout.tensors

    def nbytes(self, entry: Entry) -> int:
        return sum(self.tensors[name].nbytes for name in entry.hf)

    def read(self, entry: Entry, first: int, last: int) -> list[Tensor]:
        parts = [self.weights.read(name) for name in entry.hf]
        if entry.pieces > 1:
            return [entry.layout.to_mcore([part[first:last]], (last - first, *entry.shape[1:])) for part in parts]
        return parts


class _Mcore:
    """Reads a Megatron checkpoint entry by entry in HF form."""

    def __init__(self, checkpoint: McoreCheckpoint, entries: list[Entry]) -> None:
        self.checkpoint = checkpoint
        check_keys(entries, checkpoint)

    def nbytes(self, entry: Entry) -> int:
        return math.prod(entry.shape) * self.checkpoint.tensors[entry.key][1].itemsize

    def read(self, entry: Entry, first: int, last: int) -> list[Tensor]:
        tensor = self.checkpoint.read(entry.key, first, last)
        shapes = [(shape[0] // entry.pieces, *shape[1:]) for shape in entry.hf.values()]
        return entry.layout.to_hf(tensor, shapes)


def compare(a: str | Path, b: str | Path, *, progress: bool = True) -> tuple[list[Difference], int]:
    """Compares all weights of ``a`` and ``b`` bit by bit, in constant memory.

    Each side is a Hugging Face folder or a Megatron checkpoint, whose optimizer states are ignored. If a side is an HF
    folder, its config.json gives the names for both. Two checkpoints are compared key by key.

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
        entries = table(Shapes.from_hf(folders[0]))
        sides = [_Hf(p, entries) if p in folders else _Mcore(McoreCheckpoint(p), entries) for p in (a, b)]
    else:
        checkpoints = McoreCheckpoint(a), McoreCheckpoint(b)
        entries, differences = _common_keys(*checkpoints)
        sides = [_Mcore(checkpoint, entries) for checkpoint in checkpoints]
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
        {key: shape for key, (shape, _) in checkpoint.tensors.items() if key.startswith(_MODEL_PARTS)}
        for checkpoint in (a, b)
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
