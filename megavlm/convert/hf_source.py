"""The weights of a Hugging Face folder under the keys of Megatron checkpoints, read without converting the folder.

The files are mapped into memory, and a read touches only the pages that hold what is wanted. So ranks of any layout
read their shares straight into their parameters, and none of them holds a second copy.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megavlm.base.errors import UserError
from megavlm.config.sections import RANDOM
from megavlm.convert.adapter import read_reward_head
from megavlm.convert.hf_folder import HfLayout, short_list
from megavlm.convert.hf_shapes import is_hf_folder, open_weights
from megavlm.convert.mcore_checkpoint import McoreCheckpoint
from megavlm.convert.names import Entry, table
from megavlm.convert.tensor_order import views_of_box
from megavlm.convert.weight_source import WeightSource
from megavlm.model import score_head


class HfSource:
    """A Hugging Face folder as a ``WeightSource``.

    Attributes:
        shapes: the shapes of its model (``open_weights``).
        layout: its files, names and dtypes.

    Raises:
        UserError: a tensor or file is missing, damaged, unknown or quantised, or has a wrong shape; and all errors of
            ``open_weights`` and ``read_reward_head``.
    """

    kind = "Hugging Face folder"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes, self._weights = open_weights(path)
        self.layout = self._weights.layout
        self._entries = {entry.key: entry for entry in table(self.shapes)}
        check_names(list(self._entries.values()), self.layout, path)
        self.tensors = {key: (entry.shape, self._dtype(entry)) for key, entry in self._entries.items()}
        self._head = read_reward_head(path, self.shapes)
        if self._head is not None:
            self.tensors[score_head.KEY] = (tuple(self._head.shape), self._head.dtype)

    def _dtype(self, entry: Entry) -> torch.dtype:
        infos = [self.layout.tensors[name] for name in entry.hf]
        dtypes = {info.dtype for info in infos}
        if len(dtypes) > 1:
            raise UserError(
                f"{self.path}: {', '.join(entry.hf)} have different dtypes: {', '.join(sorted(dtypes))}; they become "
                "one tensor, so they need the same dtype",
                "save the folder again with one dtype",
            )
        return infos[0].torch_dtype

    def check_contents(self) -> None:
        """Nothing is left to check: names, shapes, dtypes and the lengths of files were, when the folder was opened."""

    def pieces(self, key: str) -> int:
        """The number of equal parts of axis 0 that can be read separately at no extra cost (``Entry.pieces``)."""
        return self._entries[key].pieces if key in self._entries else 1

    def read(self, key: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) of axis 0 of a tensor, without a copy where one HF tensor has them. Do not write to it."""
        shape = self.tensors[key][0]
        box = ((shape[0] if last is None else last) - first, *shape[1:])
        found = [view for _, view in views_of_box(self._blocks(key), (first, *[0] * len(shape[1:])), box)]
        return found[0] if len(found) == 1 else torch.cat(found)

    @torch.no_grad()
    def copy_box(self, key: str, offset: Sequence[int], target: Tensor) -> None:
        """Copies a box of a tensor into ``target``, whose dtype and device it gets.

        Args:
            key: the key of the tensor.
            offset: where the box begins, in numbers along each axis of the tensor.
            target: a tensor of the size of the box, with as many axes as the tensor.
        """
        for rows, view in views_of_box(self._blocks(key), tuple(offset), tuple(target.shape)):
            target[rows].copy_(view)

    def _blocks(self, key: str) -> list[Tensor]:
        if key not in self._entries:
            assert key == score_head.KEY, key
            assert self._head is not None, key
            return [self._head]
        entry = self._entries[key]
        return entry.layout.blocks([self._weights.read(name) for name in entry.hf], entry.shape)


def open_source(path: Path) -> WeightSource:
    """The weights in a checkpoint or in a Hugging Face folder.

    Raises:
        UserError: the folder is missing or damaged, or is neither of them; see ``HfSource`` and ``McoreCheckpoint``.
    """
    if path == RANDOM:
        raise UserError(
            "model.load is random, which is no folder with weights",
            "set model.load to a Hugging Face folder, a run or a checkpoint",
        )
    return HfSource(path) if is_hf_folder(path) else McoreCheckpoint(path)


def check_names(entries: list[Entry], layout: HfLayout, where: Path) -> None:
    """Checks that all HF tensors of the table are present with the right shape, and no other tensors.

    Raises:
        UserError: the check fails; the message names the tensors.
    """
    tensors = layout.tensors
    wanted = {name: entry for entry in entries for name in (*entry.hf, *entry.copies)}
    missing = [name for entry in entries for name in entry.hf if name not in tensors]
    if missing:
        raise UserError(
            f"{where}: missing tensor {short_list(missing)}",
            "config.json and the weights must belong to the same model",
        )
    unknown = [name for name in tensors if name not in wanted]
    if unknown:
        raise UserError(
            f"{where}: tensor {short_list(unknown)} is no weight of the model that config.json describes",
            "config.json and the weights must belong to the same model",
        )
    for name, entry in wanted.items():
        if name in tensors and not entry.accepts(name, tensors[name].shape):
            expected = list(entry.hf.get(name, entry.shape))
            raise UserError(
                f"{where}: {name} has shape {list(tensors[name].shape)}, but config.json implies {expected}",
                "config.json and the weights must belong to the same model",
            )
