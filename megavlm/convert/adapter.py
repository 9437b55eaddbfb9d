"""Adapters on disk, in peft's format or as the checkpoint of a run: reading, writing and merging."""

import os
import shutil
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megavlm.base.errors import UserError
from megavlm.base.new_output import new_folder
from megavlm.config.adapter_section import AdapterSettings
from megavlm.convert.check_checkpoint import PARTS, check_trained_parts
from megavlm.convert.hf_folder import short_list
from megavlm.convert.mcore_checkpoint import McoreCheckpoint
from megavlm.convert.model_facts import differences, of_adapter
from megavlm.convert.names import Entry
from megavlm.convert.peft_config import ADAPTER_CONFIG, read_config, write_config
from megavlm.convert.peft_names import (
    CHECKPOINT_PREFIX,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    PEFT_PREFIX,
    SPECTRUM,
    Linear,
    from_peft,
    peft_name,
    saved_whole,
    scale_of,
    targeted,
    tensor_shapes,
    to_peft,
)
from megavlm.convert.safetensors_file import SafetensorsReader
from megavlm.convert.saved_modules import SavedModules
from megavlm.convert.tensor_order import Shape
from megavlm.model import score_head
from megavlm.model.shapes import Shapes

ADAPTER_MODEL = "adapter_model.safetensors"
_PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
REWARD_HEAD = "reward_head.safetensors"
"""The head of a reward model, as a file in a Hugging Face folder or beside an adapter: "weight", [1, hidden]."""


class Adapter:
    """An adapter on disk, which is read one linear layer at a time.

    Args:
        folder: a folder in peft's format, or the checkpoint of a run that trained an adapter.
        shapes: shapes of the model that the adapter belongs to.
        checkpoint: the checkpoint, if it is open already.
    Attributes:
        settings: the adapter's settings.
        linears: the linear layers that have an adapter, by their HF names.
        whole: the weights of ``adapter.modules_to_save``, by key.
        others: the source of these weights and, in the checkpoint of a run, of others that were trained in full.
    Raises:
        UserError: the folder contains no adapter, the adapter of another model, or an incomplete adapter.
    """

    def __init__(self, folder: str | Path, shapes: Shapes, checkpoint: McoreCheckpoint | None = None) -> None:
        self.folder, self.shapes = Path(folder), shapes
        if not self.folder.is_dir():
            raise UserError(f"no such adapter: {folder}", f"give a folder with {ADAPTER_CONFIG}")
        self.settings: AdapterSettings = read_config(self.folder, shapes)
        self.linears: dict[str, Linear] = targeted(self.settings, shapes)
        self.whole: dict[str, Entry] = saved_whole(self.settings, shapes)
        self._kinds = {name: tensor_shapes(self.settings, linear) for name, linear in self.linears.items()}
        pickled = [name for name in _PICKLED if (self.folder / name).exists()]
        if pickled and not (self.folder / ADAPTER_MODEL).exists():
            raise UserError(
                f"{self.folder} has {pickled[0]} instead of {ADAPTER_MODEL}: reading it could run a program",
                "save the adapter with peft's save_pretrained(…, safe_serialization=True)",
            )
        self._file: SafetensorsReader | McoreCheckpoint
        stored: dict[str, Shape]
        if os.path.lexists(self.folder / ADAPTER_MODEL) and checkpoint is None:
            reader, names = SafetensorsReader(self.folder / ADAPTER_MODEL), self._peft_names
            stored = {name: info.shape for name, info in reader.tensors.items()}
            self._file = reader
            expected = {
                PEFT_PREFIX + name: entry.hf.get(name, entry.shape)
                for entry in self.whole.values()
                for name in (
                    *entry.hf,
                    *entry.copies,
                )  # peft writes a tied output layer, too
            }
        else:
            checkpoint = checkpoint or McoreCheckpoint(self.folder)
            names = self._checkpoint_names
            checkpoint.check_contents()
            stored = {
                name: shape for name, (shape, _) in checkpoint.tensors.items() if name.startswith(CHECKPOINT_PREFIX)
            }
            self._file, expected = checkpoint, {}
        self._check(stored, expected | {name: self._shape(*pair) for pair, name in names.items()})
        if isinstance(self._file, SafetensorsReader):
            self.others: McoreCheckpoint | SavedModules = SavedModules(self.folder, self._file, self.whole)
        else:
            self.others = self._file
            check_trained_parts(self._file, shapes, self.whole)

    def _shape(self, linear: str, kind: str) -> Shape:
        """The shape of a stored tensor."""
        shape = self._kinds[linear][kind]
        if isinstance(self._file, McoreCheckpoint):
            return shape
        return tuple(to_peft(self.linears[linear], kind, torch.empty(shape, device="meta")).shape)

    def _check(self, stored: dict[str, Shape], expected: dict[str, Shape]) -> None:
        """Raises a UserError unless the stored tensors of the adapter are those of this model."""
        missing, unknown = expected.keys() - stored.keys(), stored.keys() - expected.keys()
        wrong = [name for name in expected if name in stored and stored[name] != expected[name]]
        different = differences("the adapter", of_adapter(stored), of_adapter(expected))
        explained = f" The adapter belongs to another model: {different}." if different else ""
        other = "use the adapter with the model that it was trained on"
        if unknown:
            raise UserError(
                f"{self.folder}: tensor {short_list(sorted(unknown))} belongs to no linear layer of this model."
                f"{explained}",
                other,
            )
        if missing:
            raise UserError(
                f"{self.folder}: missing tensor {short_list(sorted(missing))}.{explained}",
                other if different else "the adapter is incomplete",
            )
        for name in wrong:
            raise UserError(
                f"{self.folder}: {name} has shape {list(stored[name])}, but this model needs {list(expected[name])}."
                f"{explained}",
                other,
            )

    @cached_property
    def _peft_names(self) -> dict[tuple[str, str], str]:
        return {
            (name, kind): peft_name(self.settings, self.shapes, self.linears[name], kind)
            for name, kinds in self._kinds.items()
            for kind in kinds
        }

    @property
    def _checkpoint_names(self) -> dict[tuple[str, str], str]:
        return {
            (name, kind): f"{CHECKPOINT_PREFIX}{name}.{kind}" for name, kinds in self._kinds.items() for kind in kinds
        }

    @property
    def checkpoint(self) -> McoreCheckpoint | None:
        """The checkpoint that the adapter is read from; None for a folder in peft's format."""
        return self._file if isinstance(self._file, McoreCheckpoint) else None

    @property
    def other_weights(self) -> set[str]:
        """Keys of other weights: ``whole``, of parts that were trained in full, and of a reward model's head."""
        return {key for key in self.others.tensors if key.startswith(PARTS)}

    @property
    def reward_head(self) -> Tensor | None:
        """The head of a reward model, [1, hidden]; None if there is none."""
        if self.checkpoint is not None:
            return self.checkpoint.read(score_head.KEY) if score_head.KEY in self.other_weights else None
        return read_reward_head(self.folder, self.shapes)

    def read(self, name: str, expert: int | None = None) -> dict[str, Tensor]:
        """The tensors of a linear layer, in the shapes of ``tensor_shapes``; for one expert without the expert axis."""
        file = self._file
        if isinstance(file, McoreCheckpoint):
            rows = (0, None) if expert is None else (expert, expert + 1)
            found = {kind: file.read(f"{CHECKPOINT_PREFIX}{name}.{kind}", *rows) for kind in self._kinds[name]}
            return found if expert is None else {kind: tensor[0] for kind, tensor in found.items()}
        return {
            kind: from_peft(self.linears[name], kind, file.read(self._peft_names[name, kind]), shape, expert)
            for kind, shape in self._kinds[name].items()
        }

    def write(
        self,
        out: str | Path,
        base: str | Path | None = None,
        *,
        overwrite: bool = False,
        finish: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """Writes a new folder in peft's format with the same bits.

        ``base``: the HF folder that peft will look for. ``finish``: called with the folder before it gets its name.
        """
        whole = self.other_weights - {score_head.KEY, *self.whole}
        if whole:
            raise UserError(
                f"{self.folder} also has weights that were trained in full, which peft's format cannot store: "
                f"{short_list(sorted(whole))}",
                "export the merged model instead, without --adapter",
            )
        with new_folder(Path(out), overwrite=overwrite, mark=ADAPTER_CONFIG) as partial:
            if self.reward_head is not None:
                save_file({"weight": self.reward_head}, partial / REWARD_HEAD)
            if isinstance(self._file, SafetensorsReader):  # it already has that format
                shutil.copyfile(self.folder / ADAPTER_CONFIG, partial / ADAPTER_CONFIG)
                shutil.copyfile(self.folder / ADAPTER_MODEL, partial / ADAPTER_MODEL)
            else:
                write_config(partial / ADAPTER_CONFIG, self.settings, self.shapes, str(base) if base else None)
                tensors = {
                    self._peft_names[name, kind]: to_peft(linear, kind, tensor)
                    for name, linear in self.linears.items()
                    for kind, tensor in self.read(name).items()
                }
                for key, entry in self.whole.items():
                    parts = entry.layout.to_hf(self.others.read(key), list(entry.hf.values()))
                    tensors |= {
                        PEFT_PREFIX + name: part.contiguous() for name, part in zip(entry.hf, parts, strict=True)
                    }
                    tensors |= {PEFT_PREFIX + name: parts[0].clone() for name in entry.copies}
                save_file(tensors, partial / ADAPTER_MODEL, metadata={"format": "pt"})
            finish(partial)

    def merged(self, entry: Entry, parts: list[Tensor], piece: int = 0) -> list[Tensor]:
        """The HF tensors of a table entry with the adapter merged into them, computed in float32.

        Args:
            entry: the entry of the table of names.
            parts: the HF tensors in the order of ``entry.hf``; of stacked experts one expert, [1, out, in] or its
                transpose.
            piece: the number of that expert.
        """
        return [
            self._merged(self.linears[linear], part, piece) if (linear := name.removesuffix(".weight")) in self.linears
            else part
            for name, part in zip(entry.hf, parts, strict=True)
        ]  # fmt: skip

    def _merged(self, linear: Linear, weight: Tensor, piece: int) -> Tensor:
        if not linear.experts:
            return merged_weight(self.settings, linear, weight, self.read(linear.name))
        return merged_weight(self.settings, linear, weight[0], self.read(linear.name, piece))[None]


def read_reward_head(folder: Path, shapes: Shapes) -> Tensor | None:
    """The head of a reward model, [1, hidden], from its file in a folder; None if there is none.

    Raises:
        UserError: the file is damaged or holds something else.
    """
    file = folder / REWARD_HEAD
    if not os.path.lexists(file):
        return None
    reader, needed = SafetensorsReader(file), (1, shapes.text.hidden)
    info = reader.tensors.get("weight")
    if info is None or info.shape != needed:
        found = "no tensor called weight" if info is None else f"a weight of shape {list(info.shape)}"
        raise UserError(f"{file} has {found}, but the head of this model needs a weight of shape {list(needed)}")
    return reader.read("weight").clone()


def merge(adapter: AdapterSettings, linear: Linear, weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """``weight`` [out, in] in float32 with the adapter merged into it.

    ``tensors`` are the adapter's, in the shapes of ``tensor_shapes``, for one expert if there are several.
    """
    if adapter.type == "fourierft":
        out, inner = weight.shape
        return weight + fourier_change(tensors[SPECTRUM].float(), (out, inner), adapter.scaling, adapter.seed)
    change = tensors[LORA_B].float().reshape(linear.out, -1) @ tensors[LORA_A].float()
    merged = weight + scale_of(adapter, linear.name) * change
    if adapter.type == "dora":
        merged = merged * (tensors[MAGNITUDE].float() / torch.linalg.vector_norm(merged, dim=1))[:, None]
    return merged


def merged_weight(adapter: AdapterSettings, linear: Linear, weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """``merge`` for a weight of any dtype, which the result has, too. An expert's may be transposed: [in, out]."""
    turned = weight.shape != (linear.out, linear.inner)
    merged = merge(adapter, linear, (weight.T if turned else weight).float(), tensors)
    return (merged.T if turned else merged).to(weight.dtype)


def fourier_change(spectrum: Tensor, shape: tuple[int, int], scaling: float, seed: int) -> Tensor:
    """float32 [out, in]: real part of the inverse FFT of a matrix that is ``spectrum`` [n] and 0 (2405.03003)."""
    rows, columns = frequencies(*shape, len(spectrum), seed)
    dense = torch.zeros(shape, dtype=torch.float32, device=spectrum.device)
    dense = dense.index_put((rows.to(spectrum.device), columns.to(spectrum.device)), spectrum.float())
    return torch.fft.ifft2(dense).real * scaling


@lru_cache(maxsize=64)
def frequencies(out: int, inner: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows and columns, int64 [count], of the trained frequencies: peft's draw, which is the same for equal shapes."""
    drawn = torch.randperm(out * inner, generator=torch.Generator().manual_seed(seed))[:count]
    return drawn // inner, drawn % inner
