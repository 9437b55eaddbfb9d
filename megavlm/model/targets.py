"""The targets of a row: which token is to be predicted where, with which weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megavlm.platform import to_device


@dataclass
class Targets:
    """The targets of a row, split into the same slices as its hidden states.

    Attributes:
        local: int64 [m] on the device, positions in this rank's slice of the row, padded with 0 to m, the largest
            number of targets in a slice.
        tokens: int64 [slices, m], the token to predict at each position of every slice; 0 for padding.
        weights: float32 [slices, m], loss weights; 0 for padding.
        row_index: int64 [slices, m] on the host, positions in the row; -1 for padding.
    """

    local: Tensor
    tokens: Tensor
    weights: Tensor
    row_index: Tensor

    @classmethod
    def of(cls, labels: Tensor, loss_weights: Tensor, slices: int, rank: int, device: torch.device) -> "Targets":
        """Makes the targets of a row.

        Args:
            labels: int64 [T] on the host; -100 where there is no target.
            loss_weights: float32 [T] on the host.
            slices: number of slices into which sequence parallelism cuts the row; 1 without it.
            rank: index of this rank's slice.
            device: device of the result.
        """
        length = labels.shape[0] // slices
        found = [(labels[s * length : (s + 1) * length] != -100).nonzero().flatten() for s in range(slices)]
        longest = max(len(positions) for positions in found)
        row_index = torch.full((slices, longest), -1)
        for s, positions in enumerate(found):
            row_index[s, : len(positions)] = positions + s * length
        there = row_index >= 0
        at = row_index.clamp(min=0)
        move = lambda x: to_device(x, device)
        return cls(
            local=move(torch.where(there[rank], at[rank] - rank * length, 0)),
            tokens=move(torch.where(there, labels[at], 0)),
            weights=move(torch.where(there, loss_weights[at], 0.0)),
            row_index=row_index,
        )
