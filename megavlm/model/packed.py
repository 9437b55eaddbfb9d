"""The layout of a micro-batch: samples end to end in a row, which Megatron sees as a batch of one."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy import ndarray
from torch import Tensor

from megavlm.layout.row_cut import RowCut
from megavlm.platform import to_device


def runs_of(lengths: list[int]) -> list[tuple[int, int, int]]:
    """Groups adjacent segments of equal length: ``[(start, length, count), …]``.

    Attention over a run is one batched call on a view, so forty samples of equal length need one call, not forty.
    """
    runs: list[tuple[int, int, int]] = []
    start = 0
    for length in lengths:
        if runs and runs[-1][1] == length:
            first, _, count = runs[-1]
            runs[-1] = (first, length, count + 1)
        elif length:
            runs.append((start, length, 1))
        start += length
    return runs


class Cache(Protocol):
    """Attention to stored keys and values while sampling (``megavlm.rollout.attention.StepAttention``)."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, row: "PackedRow", scale: float) -> Tensor:
        """Stores keys and values and computes attention to all that are stored."""


class Routing(Protocol):
    """Records which experts tokens go to, or prescribes it (``megavlm.runtime.routing``)."""

    def of_layer(self, layer: int) -> Any:
        """What the router of a layer (from 1) asks instead of Megatron's ``RouterReplay``; None: it chooses itself."""


@dataclass
class PackedRow(PackedSeqParams):
    """What attention and deepstack need to know about a row. Megatron passes it on as its ``packed_seq_params``.

    The format is ``sbhd`` with b = 1, not ``thd``. Megatron's rotary embedding then uses one frequency per token
    directly, while its packed version would copy ``cu_seqlens`` to the host in every layer.

    Attributes:
        lengths: segment lengths as host integers. They sum to the row's length T, even if context parallelism cuts the
            row and this rank has only t = T / context of its tokens (see ``RowCut``).
        cu_seqlens_q, cu_seqlens_kv: int32 [segments + 1] on the device.
        visual_positions: int64 [N], positions in this rank's slice of the row where deepstack features are added.
        from_parts: with context parallelism, int64 [T] on the device: for each token of the row its index among the
            tokens of all context ranks, end to end.
        to_parts: the inverse of ``from_parts``.
        cache: attention to stored keys and values while sampling; otherwise None.
        routing: records or prescribes the experts of this rank's tokens; None: the routers choose.
    """

    lengths: list[int] = field(default_factory=list)
    visual_positions: Tensor | None = None
    from_parts: Tensor | None = None
    to_parts: Tensor | None = None
    cache: Cache | None = None
    routing: Routing | None = None

    @classmethod
    def of(cls, lengths: list[int], device: torch.device, cut: RowCut | None = None, **kwargs: Any) -> "PackedRow":
        """Makes a row with segments of ``lengths`` tokens.

        Args:
            lengths: segment lengths.
            device: device of the tensors.
            cut: how context parallelism cuts the row; None if it does not.
            kwargs: other attributes.
        """
        if cut is not None and len(cut.order) > 1:

            def move(index: ndarray) -> Tensor:
                return to_device(torch.from_numpy(index), device)

            kwargs["from_parts"] = move(cut.owner * cut.order.shape[1] + cut.local)
            kwargs["to_parts"] = move(cut.order.reshape(-1))
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        cu_seqlens = to_device(cu_seqlens, device)
        longest = max(lengths, default=0)
        return cls(
            qkv_format="sbhd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=lengths,
            **kwargs,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.runs = runs_of(self.lengths)

    def as_thd(self) -> PackedSeqParams:
        """The same row in the format of Transformer Engine's packed attention. It is made only once.

        cuDNN plans attention for each number of segments and each bound of their lengths. So that few plans serve all
        rows, empty segments are added up to a power of two, and the bound is one, too (or the length of the row).
        """
        if not hasattr(self, "_thd"):
            total = sum(self.lengths)
            empty = _power_of_two(len(self.lengths), 16) - len(self.lengths)
            cu_seqlens = torch.nn.functional.pad(self.cu_seqlens_q, (0, empty), value=total)
            longest = min(_power_of_two(self.max_seqlen_q, 128), total)
            self._thd = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_kv=cu_seqlens,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
        return self._thd


def _power_of_two(number: int, least: int) -> int:
    """The smallest power of two that is at least ``number`` and at least ``least``, which is one itself."""
    return max(least, 1 << (number - 1).bit_length())
