"""Sends the rows of a step from the rank that reads them to all ranks of its model-parallel group.

One rank of the group, the leader, reads and renders the samples. It sends text and sizes to all ranks of the group over
the host network, and the pixels of a frame only to the rank that encodes the frame.
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
from megavlm.runtime.routing import routing_of

_PIXEL_FIELDS = ("patches", "patch_coords", "pos_index", "pos_weight")


@dataclass
class MicroBatch:
    """This rank's part of one row, on the device, for the forward pass (shapes: see ``LanguageModel.forward``)."""

    host: Row  # the whole row in host memory, without its pixels
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    row: PackedRow
    targets: Targets
    target_samples: torch.Tensor  # int64 [slices, m] like ``targets``: the sample of the row that a target belongs to
    sample_sources: torch.Tensor  # int64 [samples of the row]: the number of each sample's source
    # int64 [samples]: index in this rank's hidden states of the last target token of each sample, or -1
    last_targets: torch.Tensor
    padding_mask: torch.Tensor | None
    number: int = 0  # index of the row among the rows of the step on this data-parallel rank
    found: object = None  # the row's result of ``Objective.look_ahead``; its type depends on the objective
    features: torch.Tensor | None = None  # [planes, n, hidden], set by ``encode_window``


@dataclass
class Window:
    """Micro-batches whose frames are encoded together, the frames that this rank encodes, and the exchange plan."""

    micro_batches: list[MicroBatch]
    frames: Frames | None  # None after they have been encoded
    exchange: Exchange


@dataclass
class StepRows:
    """The rows of a step.

    Attributes:
        hosts: the rows without their pixels, on every rank of the model-parallel group.
        full: the rows with their pixels, only on the leader. An entry becomes None when its window is made.
        encoded: None, or the windows with their features, for further passes. A pass over a copy fills the list if it
            is empty and neither tower nor projector is trained; a pass over the rows themselves uses it up.
        is_copy: whether this is a copy.
    """

    hosts: list[Row]
    full: list[Row | None]
    encoded: list[Window] | None = None
    is_copy: bool = False

    def copy(self) -> "StepRows":
        """The same rows, for one more pass over them: making windows of the copy does not release the pixels."""
        return StepRows(self.hosts, list(self.full), self.encoded, is_copy=True)


class Feed:
    """Provides rows, and makes windows of micro-batches from them.

    Args:
        vlm: the model; its groups and layout determine what this rank needs.
        rows: endless (training) or finite iterator over rows. Only the leader reads it; other ranks may pass None.
    """

    def __init__(self, vlm: VLM, rows: Iterator[Row] | None):
        self.vlm, self.groups, self._source = vlm, vlm.groups, rows

    def rows(self, num_rows: int) -> StepRows | None:
        """Returns the next ``num_rows`` rows (fewer at the end of a finite iterator), or None if none are left.

        Raises on every rank of the group whatever reading raised on the leader.
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
            except Exception as error:  # it is raised after the broadcast, because the other ranks wait for the leader
                problem = error
        message = ([_without_pixels(row) for row in full if row is not None], problem)
        hosts, problem = broadcast_object(message, self.groups.model_parallel_host)
        if problem is not None:
            raise problem
        return StepRows(hosts, full) if hosts else None

    def windows(self, rows: StepRows, size: int) -> Iterator[Window]:
        """Yields windows of ``size`` micro-batches (the last may be shorter); each is copied to the device on demand.

        If ``vision.balance`` is world, all data-parallel ranks must have the same number of rows.
        """
        for start in range(0, len(rows.hosts), size):
            part = slice(start, start + size)
            full = [row for row in rows.full[part] if row is not None]
            rows.full[part] = [None] * len(rows.full[part])  # so that the memory of their pixels can be freed
            yield self._window(rows.hosts[part], full, start)

    def _window(self, hosts: list[Row], full: list[Row], first: int) -> Window:
        """Makes a window; ``first`` is the index of its first row among the rows of the step."""
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
        """Returns the ``value`` of each data-parallel rank that shares its frames with this rank."""
        if not self.vlm.balanced_over_world:
            return [value]
        peers = self.groups.data_peers_host
        assert peers is not None, "a session that shares frames has this group"
        return all_gather_objects(value, peers)

    def _pixels(self, full: list[Row], assigned: list[tuple[np.ndarray, np.ndarray]]) -> Frames:
        """Returns the pixels and position tables of the frames that this rank encodes, on the device.

        Args:
            full: on the leader, the rows of this data-parallel rank.
            assigned: for each data-parallel rank, the number of patches and the encoding rank of each of its frames.
        """
        group, here = self.vlm.tower.group, self.vlm.tower.group.rank()
        lengths = [n for patches, owner in assigned for n in patches[owner == here].tolist()]
        received = [0] * group.size()  # number of patches from each rank; only leaders send any
        for dp_rank, (patches, owner) in enumerate(assigned):
            leader = self.groups.members[dp_rank][0] if self.vlm.balanced_over_world else 0
            received[leader] = int(patches[owner == here].sum())
        sent = [0] * group.size()
        mine: list[int] = []
        if self.groups.is_leader:
            patches, owner = assigned[self.vlm.tower.share.dp_rank]
            sent = np.bincount(owner, weights=patches, minlength=group.size()).astype(int).tolist()
            mine = np.argsort(owner, kind="stable").tolist()
        # pixels are rounded to the precision of the tower before they are sent, which halves the traffic in bf16
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
        """Exchanges rows of a matrix: ``sent`` rows to, and ``received`` rows from, each rank of the tower's group."""
        out = whole.new_empty(sum(received), whole.shape[1])
        dist.all_to_all_single(out, whole, received, sent, group=self.vlm.tower.group)
        return out

    def _micro_batch(self, host: Row, number: int) -> MicroBatch:
        parallel, groups, where = self.vlm.parallel, self.groups.language, device()
        slices, index = (parallel.tensor, groups.tp.rank()) if parallel.sequence_parallel else (1, 0)
        cut = RowCut.of(host.segment_lengths, parallel.context)
        part = torch.from_numpy(cut.order[groups.cp.rank()])  # the tokens of this context-parallel rank
        padding = None
        if self.vlm.shapes.text.moe is not None:
            padding = to_device(host.is_padding()[part].chunk(slices)[index][None], where)
        targets = Targets.of(host.labels[part], host.loss_weights[part], slices, index, where)
        targets.row_index = torch.where(targets.row_index >= 0, part[targets.row_index], -1)
        return MicroBatch(
            host=host,
            input_ids=to_device(host.input_ids[part], where),
            position_ids=to_device(host.position_ids[:, part], where),
            row=PackedRow.of(
                host.segment_lengths, where, cut, routing=routing_of(host, part.chunk(slices)[index], where)
            ),
            targets=targets,
            target_samples=to_device(_samples_at(host, targets.row_index), where),
            sample_sources=to_device(torch.tensor(host.source_ids), where),
            last_targets=to_device(_last_targets(host, cut, groups.cp.rank(), slices, index), where),
            padding_mask=padding,
            number=number,
        )


def _samples_at(host: Row, positions: torch.Tensor) -> torch.Tensor:
    """Returns the sample at each position of the row; 0 for -1, which marks an entry without a target and weight."""
    samples = torch.searchsorted(host.cu_seqlens.long(), positions, right=True) - 1
    return samples.clamp(0, host.num_samples - 1)


def _last_targets(host: Row, cut: RowCut, context_index: int, slices: int, slice_index: int) -> torch.Tensor:
    """Returns the index of each sample's last target token in one slice of one context-parallel rank's part.

    It is -1 for samples whose last target token is on another rank.
    """
    labelled = np.where(host.labels.numpy() != IGNORE, np.arange(len(host.labels)), -1)
    # a label is the next token, so the last target token is one position after the last label
    at = np.maximum.reduceat(labelled, host.cu_seqlens[: host.num_samples].numpy()) + 1
    part, position = np.divmod(cut.local[at], cut.order.shape[1] // slices)
    return torch.from_numpy(np.where((cut.owner[at] == context_index) & (part == slice_index), position, -1))


def _visual_row(host: Row, merge: int) -> VisualRow:
    """Describes the visual tokens of a row; ``merge`` is the number of patches of a visual token."""
    counts = np.asarray(host.frame_lengths, dtype=np.int64) // merge
    uses = host.use_frames.numpy()
    used = counts[uses]
    return VisualRow(host.segment_lengths, counts, uses, host.visual_positions.numpy()[np.cumsum(used) - used])


def _in_order(rows: list[Row], name: str, order: Sequence[int], width: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns a per-patch field of the rows' frames on the device, with the frames in ``order``.

    It is copied only once on the host. Values are converted to a floating-point ``dtype``; for an integer ``dtype``,
    which must have the same size, their bits are kept.
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
