"""Sends the rows of a step from the rank that reads them to all ranks of its model-parallel group.

One rank of the group, the leader, reads and renders the samples. It sends text and sizes to all ranks of the group over
the host network, and the pixels of a frame only to the rank that encodes the frame.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from megavlm.config.settings import Settings
from megavlm.data.row import IGNORE, Row
from megavlm.layout.frame_balance import Exchange, VisualRow, VisualTokens, balance_frames, plan_exchange
from megavlm.layout.row_cut import RowCut
from megavlm.model.packed import PackedRow
from megavlm.model.targets import Targets
from megavlm.model.vision import Frames
from megavlm.model.vlm import VLM
from megavlm.platform import device, to_device
from megavlm.platform.collectives import all_gather_objects
from megavlm.runtime.kept_frames import Recall, can_keep
from megavlm.runtime.pixels import Assigned, deliver
from megavlm.runtime.read_ahead import ReadAhead, Reader
from megavlm.runtime.routing import routing_of


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
        counts: None, or what the step has counted in the rows of all ranks.
        keys: None, or for each row the keys of its frames, on every rank, so that what the tower has computed of them
            earlier in the step is used (see ``runtime.kept_frames``).
    """

    hosts: list[Row]
    full: list[Row | None]
    encoded: list[Window] | None = None
    is_copy: bool = False
    counts: dict[str, float] | None = None
    keys: list[list[bytes]] | None = None

    def copy(self) -> "StepRows":
        """The same rows, for one more pass over them: making windows of the copy does not release the pixels."""
        return replace(self, full=list(self.full), is_copy=True)

    def take_full(self, part: slice) -> list[Row]:
        """Hands out some rows with their pixels, on the leader, so that their memory can be freed."""
        taken = [row for row in self.full[part] if row is not None]
        self.full[part] = [None] * len(self.full[part])
        return taken


class Feed:
    """Provides rows, and makes windows of micro-batches from them.

    Args:
        vlm: the model; its groups and layout determine what this rank needs.
        rows: endless (training) or finite iterator over rows. Only the leader reads it; other ranks may pass None.
        ahead: reads the rows in place of ``rows``, if ``read_ahead`` is to be called.
    """

    def __init__(self, vlm: VLM, rows: Iterator[Row] | None, ahead: ReadAhead | None = None):
        self.vlm, self.groups, self._ahead = vlm, vlm.groups, ahead
        self._reader: Reader = ahead or Reader(rows, self.groups.model_parallel_host)

    def rows(self, num_rows: int) -> StepRows | None:
        """Returns the next ``num_rows`` rows (fewer at the end of a finite iterator), or None if none are left.

        Raises on every rank of the group whatever reading raised on the leader.
        """
        read = self._reader.take(num_rows)
        if read.problem is not None:
            raise read.problem
        return StepRows(read.hosts, [*read.full]) if read.hosts else None

    def read_ahead(self, num_rows: int) -> None:
        """Begins to send the rows of the next step while this one computes, if the feed can. Call it on all ranks."""
        if self._ahead is not None:
            self._ahead.begin(num_rows)

    def close(self) -> None:
        """Drops the rows that were read ahead. No row can be read afterwards."""
        if self._ahead is not None:
            self._ahead.close()

    def windows(self, rows: StepRows, size: int) -> Iterator[Window]:
        """Yields windows of ``size`` micro-batches (the last may be shorter); each is copied to the device on demand.

        If ``vision.balance`` is world, all data-parallel ranks must have the same number of rows.
        """
        for start in range(0, len(rows.hosts), size):
            part = slice(start, start + size)
            keys = rows.keys[part] if rows.keys is not None and can_keep(self.vlm) else None
            yield self._window(rows.hosts[part], rows.take_full(part), start, keys)

    def _window(self, hosts: list[Row], full: list[Row], first: int, keys: list[list[bytes]] | None) -> Window:
        """Makes a window; ``first`` is the index of its first row among the rows of the step, ``keys`` as there."""
        tower = self.vlm.tower
        all_rows = self._of_all_data_ranks([_visual_row(host, tower.merge) for host in hosts])
        tokens = [VisualTokens.of(rows, tower.share, dp_rank) for dp_rank, rows in enumerate(all_rows)]
        frame_tokens = [np.concatenate([row.frame_tokens for row in rows]) for rows in all_rows]
        counts = [len(frames) for frames in frame_tokens]
        patches = np.concatenate(frame_tokens) * tower.merge
        recall = None
        if keys is None:
            owner = sent_to = balance_frames(patches, tower.group.size(), self.vlm.linear_cost)
        else:
            of_all = self._of_all_data_ranks(list(itertools.chain.from_iterable(keys)))
            recall = Recall.of(self.vlm, list(itertools.chain.from_iterable(of_all)), patches)
            owner, sent_to = recall.owner, recall.sent_to
        exchange = plan_exchange(
            VisualTokens.join(tokens, counts),
            np.concatenate(frame_tokens),
            owner,
            tower.shares,
            tower.group.rank(),
            len(hosts),
        ).to(device())
        images = np.concatenate([row.frame_images for rows in all_rows for row in rows])
        parts = [slice(*ends) for ends in itertools.pairwise(np.cumsum([0, *counts]))]
        frames = self._frames(hosts, full, [Assigned(patches[part], images[part], sent_to[part]) for part in parts])
        if recall is not None:
            frames = recall.complete(frames)
        micro_batches = [self._micro_batch(host, number) for number, host in enumerate(hosts, start=first)]
        return Window(micro_batches, frames, exchange)

    def _of_all_data_ranks[T](self, value: T) -> list[T]:
        """Returns the ``value`` of each data-parallel rank that shares its frames with this rank."""
        sharing = self.vlm.sharing
        return [value] if sharing is None else all_gather_objects(value, sharing.peers_host)

    def _frames(self, hosts: list[Row], full: list[Row], assigned: list[Assigned]) -> Frames:
        """Returns the frames that this rank encodes. ``assigned``: those of all data-parallel ranks that share them."""
        tower, sharing = self.vlm.tower, self.vlm.sharing
        leaders = [ranks[0] for ranks in sharing.members] if sharing is not None else [0]
        mine = tower.share.dp_rank if self.groups.is_leader else None
        dtype = tower.projector.config.params_dtype
        scale, vision = hosts[0].pixel_scale, self.vlm.shapes.vision
        return deliver(full, assigned, mine, leaders, tower.group, scale, vision, dtype)

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
            sample_sources=to_device(torch.tensor(host.source_ids, dtype=torch.int64), where),
            last_targets=to_device(_last_targets(host, cut, groups.cp.rank(), slices, index), where),
            padding_mask=padding,
            number=number,
        )


def window_size(settings: Settings) -> int | None:
    """The number of micro-batches of a window; None: what ``Step`` takes. If steps differ in size, windows do not."""
    return settings.vision.window or (settings.rows_per_step(1) if settings.train.global_batch_size is None else None)


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
    starts = host.visual_positions.numpy()[np.cumsum(used) - used]
    return VisualRow(host.segment_lengths, counts, host.frame_images.numpy().astype(np.int64), uses, starts)
