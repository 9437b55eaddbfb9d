"""Whole modules in a file of peft's (``modules_to_save``), under the keys of Megatron checkpoints."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megavlm.base.errors import UserError
from megavlm.convert.names import Entry
from megavlm.convert.peft_names import PEFT_PREFIX
from megavlm.convert.safetensors_file import SafetensorsReader
from megavlm.convert.tensor_order import views_of_box


class SavedModules:
    """A ``WeightSource`` with only the weights that peft saved as a whole.

    Args:
        path: the folder, for messages.
        file: adapter_model.safetensors, whose tensors have been checked.
        entries: the weights by key.

    Raises:
        UserError: the file has a tied matrix twice, with different values.
    """

    kind = "adapter"

    def __init__(self, path: Path, file: SafetensorsReader, entries: Mapping[str, Entry]) -> None:
        self.path, self._file, self._entries = path, file, entries
        for entry in entries.values():
            (name, *_) = entry.hf
            for copy in entry.copies:
                if not torch.equal(file.read(PEFT_PREFIX + copy), file.read(PEFT_PREFIX + name)):
                    raise UserError(
                        f"{path} has saved {name} and {copy} with different values, but they are one matrix in this "
                        "model (tie_word_embeddings in config.json)",
                        "train the adapter again with ensure_weight_tying in peft's LoraConfig, or merge it with peft",
                    )
        self.tensors = {
            key: (entry.shape, file.tensors[PEFT_PREFIX + next(iter(entry.hf))].torch_dtype)
            for key, entry in entries.items()
        }

    def check_contents(self) -> None:
        """Nothing is left to check."""

    def read(self, key: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) of axis 0 of a tensor."""
        shape = self.tensors[key][0]
        target = torch.empty((shape[0] if last is None else last) - first, *shape[1:], dtype=self.tensors[key][1])
        self.copy_box(key, (first, *[0] * len(shape[1:])), target)
        return target

    @torch.no_grad()
    def copy_box(self, key: str, offset: Sequence[int], target: Tensor) -> None:
        """Copies a box of a tensor, which begins at ``offset``, into ``target``, whose dtype and device it gets."""
        entry = self._entries[key]
        blocks = entry.layout.blocks([self._file.read(PEFT_PREFIX + name) for name in entry.hf], entry.shape)
        for rows, view in views_of_box(blocks, tuple(offset), tuple(target.shape)):
            target[rows].copy_(view)
