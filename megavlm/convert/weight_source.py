"""What weights are read from: the interface that Megatron checkpoints and Hugging Face folders share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megavlm.convert.tensor_order import Shape


class WeightSource(Protocol):
    """A folder with the weights of a model, under the keys and in the order of numbers of Megatron checkpoints."""

    @property
    def path(self) -> Path:
        """The folder."""

    @property
    def kind(self) -> str:
        """What the folder is, for messages: "checkpoint" or "Hugging Face folder"."""

    @property
    def tensors(self) -> Mapping[str, tuple[Shape, torch.dtype]]:
        """The global shape and dtype of each key."""

    def read(self, key: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) of axis 0 of a tensor, on the CPU, which may be backed by a file: do not write to it.

        Raises:
            UserError: a file is missing, damaged or incomplete.
        """

    def check_contents(self) -> None:
        """Checks what was not checked when the folder was opened, without reading the tensors. Raises UserError."""
