"""Brings the rows of a step from the rank that reads them to all ranks of its model-parallel group.

One rank of the group, the leader, reads and renders. Text and sizes go to all of them over the host network; pixels go
only to the rank that encodes the frame.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from megavlm.data.row import IGNORE, Row
from megavlm.model.frame_balance import Exchange, VisualRow, VisualTokens, balance_frames, plan_exchange
from megavlm.model.packed import PackedRow
from megavlm.model.row_cut import RowCut
from megavlm.model.token_logprobs import Targets
from megavlm.model.vision import Frames
from megavlm.model.vlm import VLM
from megavlm.platform import device, host_buffer, to_device
from megavlm.platform.collectives import all_gather_objects, broadcast_object

_PIXEL_FIELDS = ("patches", "patch_coords", "pos_index", "pos_weight")


@dataclass
class MicroBatch:
    """This rank's part of one row on the device, as its forward takes it (shapes as in ``LanguageModel.forward``)."""

    host: Row  # the whole row, without its pixels
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    row: PackedRow
    targets: Targets
    target_samples: torch.Tensor  # int64 [slices, m] as ``targets``: the sample of the row that each belongs to
    sample_sources: torch.Tensor  # int64 [samples of the row]: numbers of their sources
    # int64 [samples]: where in this rank's hidden states the last target token of each sample is, or -1
    last_targets: torch.Tensor
    padding_mask: torch.Tensor | None
    number: int = 0  # of the row among those of the step on this data-parallel rank
    found: object = None  # what the objective found out about the row before the step's forward
    features: torch.Tensor | None = None  # [planes, n, hidden], filled by the tower phase


@dataclass
class Window:
    """Micro-batches that share one tower phase, the frames of them dealt to this rank, and the exchange's plan."""

    micro_batches: list[MicroBatch]
    frames: Frames | None  # None once they are encoded
    exchange: Exchange


@dataclass
class StepRows:
    """The rows of a step: ``hosts`` without their pixels, on every rank of the group; ``full`` on the leader alone.

    A full row is None once its window has been made.
    """

    hosts: list[Row]
    full: list[Row | None]


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
        full: list[Row | None] = []
        problem: Exception | None = None
        if self.groups.is_leader:
            assert self._source is not None, "a leader has rows"
            try:
                for row in self._source:
                    full.append(row)
                    if len(full) == num_rows:
                        break
            except Exception as error:  # the others wait for this rank: tell them before leaving
                problem = error
        message = ([_without_pixels(row) for row in full if row is not None], problem)
        hosts, problem = broadcast_object(message, self.groups.model_parallel_host)
        if problem is not None:
            raise problem
        return StepRows(hosts, full) if hosts else None

    def windows(self, rows: StepRows, size: int) -> Iterator[Window]:
        """Windows of ``size`` micro-batches (the last may be shorter), each brought to the device when it is asked for.

        Where frames are dealt over the world, every data rank must have as many rows.
        """
        for start in range(0, len(rows.hosts), size):
            part = slice(start, start + size)
            full = [row for row in rows.full[part] if row is not None]
            rows.full[part] = [None] * len(rows.full[part])  # so that the memory of their pixels can be freed
            yield self._window(rows.hosts[part], full, start)

    def _window(self, hosts: list[Row], full: list[Row], first: int) -> Window:
        """``first``: number of the first row among those of the step."""
        tower = self.vlm.tower
        all_rows = self._of_all_data_ranks([_visual_row(host, tower.merge) for host in hosts])
        tokens = [VisualTokens.of(rows, tower.share, dp_rank) for dp_rank, rows in enumerate(all_rows)]
        frame_tokens = [np.concatenate([row.frame_tokens for row in rows]) for rows in all_rows]
        counts = [len(frames) for frames in frame_tokens]
        patches = np.concatenate(frame_tokens) * tower.merge
        owner = balance_frames(patches, tower.group.size(), self.vlm.linear_cost)
        exchange = plan_exchange(
            VisualTokens.join(tokens, counts),
            np.concatenate(frame_tokens),
            owner,
            tower.shares,
            tower.group.rank(),
            len(hosts),
        ).to(device())
        starts = np.cumsum([0, *counts])
        frames = self._pixels(full, [(patches[a:b], owner[a:b]) for a, b in itertools.pairwise(starts)])
        micro_batches = [self._micro_batch(host, number) for number, host in enumerate(hosts, start=first)]
        return Window(micro_batches, frames, exchange)

    def _of_all_data_ranks[T](self, value: T) -> list[T]:
        """``value`` of each data rank whose frames are dealt together with this one's."""
        if not self.vlm.balanced_over_world:
            return [value]
        peers = self.groups.data_peers_host
        assert peers is not None, "a session that shares frames has this group"
        return all_gather_objects(value, peers)

    def _pixels(self, full: list[Row], dealt: list[tuple[np.ndarray, np.ndarray]]) -> Frames:
        """Pixels and position tables of the frames dealt to this rank, on the device.

        Args:
            full: this data rank's rows, on the leader.
            dealt: (patches, owner) of the frames of each data rank.
        """
        group, here = self.vlm.tower.group, self.vlm.tower.group.rank()
        lengths = [n for patches, owner in dealt for n in patches[owner == here].tolist()]
        received = [0] * group.size()  # patches from each rank: from the leaders alone
        for dp_rank, (patches, owner) in enumerate(dealt):
            leader = self.groups.members[dp_rank][0] if self.vlm.balanced_over_world else 0
            received[leader] = int(patches[owner == here].sum())
        sent = [0] * group.size()
        mine: list[int] = []
        if self.groups.is_leader:
            patches, owner = dealt[self.vlm.tower.share.dp_rank]
            sent = np.bincount(owner, weights=patches, minlength=group.size()).astype(int).tolist()
            mine = np.argsort(owner, kind="stable").tolist()
        # the tower works in its own precision: what it would round there is rounded before it travels
        dtype, vision = self.vlm.tower.projector.config.params_dtype, self.vlm.shapes.vision
        floats = _in_order(full, "patches", mine, vision.patch_dim, dtype)
        widths = {"patch_coords": 2, "pos_index": 4, "pos_weight": 4}
        tables = [_in_order(full, name, mine, n, torch.int32) for name, n in widths.items()]
        if group.size() > 1:
            floats = self._deliver(floats, sent, received)
            tables = self._deliver(torch.cat(tables, dim=1), sent, received).split(list(widths.values()), dim=1)
        coords, index, weight = (table.contiguous() for table in tables)
        return Frames(floats, coords, index, weight.view(torch.float32), lengths)

    def _deliver(self, whole: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """All-to-all of rows of a matrix, ``sent`` to and ``received`` from each rank of the tower's group."""
        out = whole.new_empty(sum(received), whole.shape[1])
        dist.all_to_all_single(out, whole, received, sent, group=self.vlm.tower.group)
        return out

    def _micro_batch(self, host: Row, number: int) -> MicroBatch:
        parallel, groups, where = self.vlm.parallel, self.groups.language, device()
        slices, index = (parallel.tensor, groups.tp.rank()) if parallel.sequence_parallel else (1, 0)
        cut = RowCut.of(host.segment_lengths, parallel.context)
        part = torch.from_numpy(cut.order[groups.cp.rank()])  # this context rank's tokens
        padding = None
        if self.vlm.shapes.text.moe is not None:
            padding = to_device(host.is_padding()[part].chunk(slices)[index][None], where)
        targets = Targets.of(host.labels[part], host.loss_weights[part], slices, index, where)
        targets.row_index = torch.where(targets.row_index >= 0, part[targets.row_index], -1)
        return MicroBatch(
            host=host,
            input_ids=to_device(host.input_ids[part], where),
            position_ids=to_device(host.position_ids[:, part], where),
            row=PackedRow.of(host.segment_lengths, where, cut),
            targets=targets,
            target_samples=to_device(_samples_at(host, targets.row_index), where),
            sample_sources=to_device(torch.tensor(host.source_ids), where),
            last_targets=to_device(_last_targets(host, cut, groups.cp.rank(), slices, index), where),
            padding_mask=padding,
            number=number,
        )


def _samples_at(host: Row, positions: torch.Tensor) -> torch.Tensor:
    """The sample at each position of the row; 0 for -1, which is none and has no weight."""
    samples = torch.searchsorted(host.cu_seqlens.long(), positions, right=True) - 1
    return samples.clamp(0, host.num_samples - 1)


def _last_targets(host: Row, cut: RowCut, context_index: int, slices: int, slice_index: int) -> torch.Tensor:
    """Where each sample's last target token stands in one slice of one context rank's part, -1 where it does not."""
    labelled = np.where(host.labels.numpy() != IGNORE, np.arange(len(host.labels)), -1)
    at = np.maximum.reduceat(labelled, host.cu_seqlens[: host.num_samples].numpy()) + 1  # predicted one before it
    part, position = np.divmod(cut.local[at], cut.order.shape[1] // slices)
    return torch.from_numpy(np.where((cut.owner[at] == context_index) & (part == slice_index), position, -1))


def _visual_row(host: Row, merge: int) -> VisualRow:
    """``merge``: patches of a visual token."""
    counts = np.asarray(host.frame_lengths, dtype=np.int64) // merge
    uses = host.use_frames.numpy()
    used = counts[uses]
    return VisualRow(host.segment_lengths, counts, uses, host.visual_positions.numpy()[np.cumsum(used) - used])


def _in_order(rows: list[Row], name: str, order: Sequence[int], width: int, dtype: torch.dtype) -> torch.Tensor:
    """A per-patch field of the rows' frames, on the device, the frames in ``order``; copied once on the host.

    Floats become ``dtype``; for an integer ``dtype`` of their size, their bits are taken.
    """
    frames = [part for row in rows for part in getattr(row, name).split(row.frame_lengths)]
    if not dtype.is_floating_point:
        frames = [frame.view(dtype) for frame in frames]
    frames = [frames[index] for index in order]
    buffer = host_buffer(sum(len(frame) for frame in frames), width, dtype)
    if frames:
        torch.cat(frames, out=buffer)
    return buffer.to(device(), non_blocking=True)


def _without_pixels(row: Row) -> Row:
    return replace(row, loader_state=None, **{name: getattr(row, name)[:0].clone() for name in _PIXEL_FIELDS})
