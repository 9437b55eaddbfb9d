"""Brings the rows of a step from the rank that reads them to all ranks of its model-parallel group.

One rank of the group, the leader, reads and renders. Text and sizes go to all of them over the host network; pixels go
only to the rank that encodes the frame.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from megavlm.data.row import Row
from megavlm.model.deal import Exchange, VisualTokens, deal_frames, plan_exchange
from megavlm.model.packed import PackedRow
from megavlm.model.row_cut import RowCut
from megavlm.model.token_logprobs import Targets
from megavlm.model.vision import Frames
from megavlm.model.vlm import VLM
from megavlm.platform import device

_PIXEL_FIELDS = ("patches", "patch_coords", "pos_index", "pos_weight")


@dataclass
class MicroBatch:
    """This rank's part of one row on the device, as its forward takes it (shapes as in ``LanguageModel.forward``)."""

    host: Row  # the whole row, without its pixels
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    row: PackedRow
    targets: Targets
    padding_mask: torch.Tensor | None
    features: torch.Tensor | None = None  # [planes, n, hidden], filled by the tower phase


@dataclass
class Window:
    """Micro-batches that share one tower phase, the frames of them dealt to this rank, and the exchange's plan."""

    micro_batches: list[MicroBatch]
    frames: Frames
    exchange: Exchange


@dataclass
class StepRows:
    """The rows of a step: ``hosts`` without their pixels, on every rank of the group; ``full`` on the leader alone."""

    hosts: list[Row]
    full: list[Row]


class Feed:
    """Hands out rows, and windows of micro-batches made of them.

    Args:
        vlm: the model; its groups and layout say what this rank needs.
        rows: endless (training) or finite iterator of Row; only the leader's is read, others may give None.
    """

    def __init__(self, vlm: VLM, rows: Iterator[Row] | None):
        self.vlm, self.groups, self._source = vlm, vlm.groups, rows

    def rows(self, num_rows: int) -> StepRows | None:
        """The next ``num_rows`` rows (fewer at the end of a finite iterator); None when there are none left.

        Raises whatever reading raised, on every rank of the group.
        """
        full, problem = [], None
        if self.groups.is_leader:
            try:
                for row in self._source:
                    full.append(row)
                    if len(full) == num_rows:
                        break
            except Exception as error:  # the others wait for this rank: tell them before leaving
                problem = error
        hosts, problem = self._tell(([_without_pixels(row) for row in full], problem))
        if problem is not None:
            raise problem
        return StepRows(hosts, full) if hosts else None

    def windows(self, rows: StepRows, size: int) -> Iterator[Window]:
        """Windows of ``size`` micro-batches (the last may be shorter), each brought to the device when it is asked for.

        Where frames are dealt over the world, every data rank must have as many rows.
        """
        for start in range(0, len(rows.hosts), size):
            part = slice(start, start + size)
            yield self._window(rows.hosts[part], rows.full[part])

    def window(self, num_rows: int) -> Window | None:
        """The next ``num_rows`` rows as one window; None when there are none left."""
        rows = self.rows(num_rows)
        return next(self.windows(rows, num_rows)) if rows else None

    def _window(self, hosts: list[Row], full: list[Row]) -> Window:
        tower, context = self.vlm.tower, self.vlm.parallel.context
        cuts = [RowCut.of(host.segment_lengths, context) for host in hosts]
        frame_patches = [np.asarray(host.frame_lengths, dtype=np.int64) for host in hosts]
        tokens = VisualTokens.of(
            frame_tokens=[lengths // tower.merge for lengths in frame_patches],
            token_positions=[host.visual_positions.numpy() for host in hosts],
            cuts=cuts,
            place=tower.place,
        )
        parts = self._of_all_data_ranks((np.concatenate(frame_patches), tokens))
        counts = [len(patches) for patches, _ in parts]
        patches = np.concatenate([patches for patches, _ in parts])
        owner = deal_frames(patches, tower.group.size(), self.vlm.linear_cost)
        exchange = plan_exchange(
            VisualTokens.join([tokens for _, tokens in parts], counts),
            owner,
            tower.places,
            tower.group.rank(),
            len(hosts),
        )
        starts = np.cumsum([0, *counts])
        frames = self._pixels(full, [(patches[a:b], owner[a:b]) for a, b in itertools.pairwise(starts)])
        micro_batches = [
            self._micro_batch(host, cut, positions)
            for host, cut, positions in zip(hosts, cuts, exchange.positions, strict=True)
        ]
        return Window(micro_batches, frames, exchange)

    def _tell(self, message):
        """The leader's object, on every rank."""
        group = self.groups.model_parallel_host
        if group.size() == 1:
            return message
        box = [message]
        dist.broadcast_object_list(box, group=group, group_src=0)
        return box[0]

    def _of_all_data_ranks(self, value) -> list:
        """``value`` of each data rank whose frames are dealt together with this one's."""
        if not self.vlm.dealt_over_world:
            return [value]
        values = [None] * self.groups.data_size
        dist.all_gather_object(values, value, group=self.groups.data_peers_host)
        return values

    def _pixels(self, full: list[Row], dealt: list[tuple[np.ndarray, np.ndarray]]) -> Frames:
        """Pixels and position tables of the frames dealt to this rank, on the device.

        Args:
            full: this data rank's rows, on the leader.
            dealt: (patches, owner) of the frames of each data rank.
        """
        group, here = self.vlm.tower.group, self.vlm.tower.group.rank()
        lengths = [n for patches, owner in dealt for n in patches[owner == here].tolist()]
        received = [0] * group.size()  # patches from each rank: from the leaders alone
        for data_rank, (patches, owner) in enumerate(dealt):
            leader = self.groups.members[data_rank][0] if self.vlm.dealt_over_world else 0
            received[leader] = int(patches[owner == here].sum())
        sent = [0] * group.size()
        pieces: dict[str, list[torch.Tensor]] = {name: [] for name in _PIXEL_FIELDS}
        if self.groups.is_leader:
            patches, owner = dealt[self.vlm.tower.place.data_rank]
            sent = np.bincount(owner, weights=patches, minlength=group.size()).astype(int).tolist()
            order = np.argsort(owner, kind="stable")
            for name in _PIXEL_FIELDS:
                frames = [part for row in full for part in _frames_of(row, name)]
                pieces[name] = [frames[index] for index in order]
        floats = _joined(pieces["patches"], self.vlm.shapes.vision.patch_dim, torch.float32)
        tables = [
            _joined(pieces["patch_coords"], 2, torch.int32),
            _joined(pieces["pos_index"], 4, torch.int32),
            _joined(pieces["pos_weight"], 4, torch.float32).view(torch.int32),
        ]
        if group.size() > 1:
            floats = self._deliver(floats, sent, received)
            tables = list(self._deliver(torch.cat(tables, dim=1), sent, received).split([2, 4, 4], dim=1))
        coords, index, weight = (table.contiguous() for table in tables)
        return Frames(floats, coords, index, weight.view(torch.float32), lengths)

    def _deliver(self, whole: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """All-to-all of rows of a matrix, ``sent`` to and ``received`` from each rank of the tower's group."""
        out = whole.new_empty(sum(received), whole.shape[1])
        dist.all_to_all_single(out, whole, received, sent, group=self.vlm.tower.group)
        return out

    def _micro_batch(self, host: Row, cut: RowCut, positions: np.ndarray) -> MicroBatch:
        parallel, groups, where = self.vlm.parallel, self.groups.language, device()
        slices, index = (parallel.tensor, groups.tp.rank()) if parallel.sequence_parallel else (1, 0)
        part = torch.from_numpy(cut.order[groups.cp.rank()])  # this context rank's tokens
        move = lambda x: x.to(where, non_blocking=True)
        padding = None
        if self.vlm.shapes.text.moe is not None:
            padding = move(host.is_padding()[part].chunk(slices)[index][None])
        targets = Targets.of(host.labels[part], host.loss_weights[part], slices, index, where)
        targets.row_index = torch.where(targets.row_index >= 0, part[targets.row_index], -1)
        return MicroBatch(
            host=host,
            input_ids=move(host.input_ids[part]),
            position_ids=move(host.position_ids[:, part]),
            row=PackedRow.of(host.segment_lengths, where, cut, visual_positions=move(torch.from_numpy(positions))),
            targets=targets,
            padding_mask=padding,
        )


def _frames_of(row: Row, name: str) -> tuple[torch.Tensor, ...]:
    """A per-patch field of each frame of a row, on the device."""
    return getattr(row, name).to(device(), non_blocking=True).split(row.frame_lengths)


def _joined(parts: list[torch.Tensor], width: int, dtype: torch.dtype) -> torch.Tensor:
    if not parts:
        return torch.empty(0, width, dtype=dtype, device=device())
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _without_pixels(row: Row) -> Row:
    return replace(row, **{name: getattr(row, name)[:0].clone() for name in _PIXEL_FIELDS})
