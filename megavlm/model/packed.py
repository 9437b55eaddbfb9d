"""The one layout of a micro-batch: samples laid end to end in a row, seen by Megatron as a batch of one."""

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megavlm.model.row_cut import RowCut
from megavlm.platform import to_device


def runs_of(lengths: list[int]) -> list[tuple[int, int, int]]:
    """Joins neighbouring segments of equal length: ``[(start, length, count), …]``.

    Attention over a run is one batched call on a view, so forty equally long samples cost one call, not forty.
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


@dataclass
class PackedRow(PackedSeqParams):
    """What attention and deepstack must know of a row; travels through Megatron as its ``packed_seq_params``.

    The format is ``sbhd`` with b = 1, not ``thd``: Megatron's rotary embedding then takes one frequency per token as it
    is, where its packed version would read ``cu_seqlens`` back to the host in every layer.

    Attributes:
        lengths: segment lengths as host integers; they sum to the row's length T, also where context parallelism cuts
            the row and this rank holds t = T / context tokens of it (see ``RowCut``).
        cu_seqlens_q, cu_seqlens_kv: int32 [segments + 1] on the device.
        visual_positions: int64 [N], this rank's indices into its slice of the row where deepstack features are added.
        from_parts, to_parts: with context parallelism, int64 [T] on the device: index of each token of the row among
            the tokens of all context ranks laid end to end, and the other way round.
        cache: key/value cache while generating (see ``megavlm.model.generate``), else None.
    """

    lengths: list[int] = field(default_factory=list)
    visual_positions: torch.Tensor | None = None
    from_parts: torch.Tensor | None = None
    to_parts: torch.Tensor | None = None
    cache: object | None = None

    @classmethod
    def of(cls, lengths: list[int], device: torch.device, cut: RowCut | None = None, **kwargs) -> "PackedRow":
        """``cut``: how context parallelism cuts the row; None: not at all."""
        if cut is not None and len(cut.order) > 1:
            move = lambda index: to_device(torch.from_numpy(index), device)
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

    def __post_init__(self):
        super().__post_init__()
        self.runs = runs_of(self.lengths)

    def as_thd(self) -> PackedSeqParams:
        """The same row in the format that Transformer Engine's packed attention takes; made once."""
        if not hasattr(self, "_thd"):
            self._thd = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=self.cu_seqlens_q,
                cu_seqlens_kv=self.cu_seqlens_kv,
                max_seqlen_q=self.max_seqlen_q,
                max_seqlen_kv=self.max_seqlen_kv,
            )
        return self._thd
