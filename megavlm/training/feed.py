"""Brings the rows of a step from the rank that reads them to all ranks of its model-parallel group.

One rank of the group, the leader, reads and renders. Text and sizes go to all of them over the host network; pixels go
only to the rank that encodes the frame.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from megavlm.data.row import Row
from megavlm.model.deal import Exchange, deal_frames, plan_exchange
from megavlm.model.packed import PackedRow
from megavlm.model.token_logprobs import Targets
from megavlm.model.vision import Frames
from megavlm.model.vlm import VLM
from megavlm.platform import device

_PIXEL_FIELDS = ("patches", "patch_coords", "pos_index", "pos_weight")


@dataclass
class MicroBatch:
    """One row on the device, as this rank's forward takes it (shapes as in ``LanguageModel.forward``)."""

    host: Row  # without its pixels
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


class Feed:
    """Hands out windows of micro-batches.

    Args:
        vlm: the model; its groups and layout say what this rank needs.
        rows: endless (training) or finite iterator of Row; only the leader's is read, others may give None.
    """

    def __init__(self, vlm: VLM, rows: Iterator[Row] | None):
        self.vlm, self.groups, self.rows = vlm, vlm.groups, rows

    def window(self, num_rows: int) -> Window | None:
        """The next ``num_rows`` rows (fewer at the end of a finite iterator); None when there are none left.

        Raises whatever reading raised, on every rank of the group.
        """
        rows, problem = [], None
        if self.groups.is_leader:
            try:
                for row in self.rows:
                    rows.append(row)
                    if len(rows) == num_rows:
                        break
            except Exception as error:  # the others wait for this rank: tell them before leaving
                problem = error
        hosts, problem = self._tell(([_without_pixels(row) for row in rows], problem))
        if problem is not None:
            raise problem
        if not hosts:
            return None
        frame_patches = [np.asarray(host.frame_lengths, dtype=np.int64) for host in hosts]
        patches = np.concatenate(frame_patches)
        owner = deal_frames(patches, self.groups.model_parallel.size(), self.vlm.linear_cost)
        exchange = plan_exchange(
            frame_tokens=[lengths // self.vlm.tower.merge for lengths in frame_patches],
            token_positions=[host.visual_positions.numpy() for host in hosts],
            row_length=len(hosts[0].input_ids),
            owner=owner,
            places=self.vlm.tower.places,
            rank=self.groups.model_parallel.rank(),
        )
        frames = self._pixels(rows, patches, owner)
        micro_batches = [self._micro_batch(host, exchange.positions[m]) for m, host in enumerate(hosts)]
        return Window(micro_batches, frames, exchange)

    def _tell(self, message):
        """The leader's object, on every rank."""
        group = self.groups.model_parallel_host
        if group.size() == 1:
            return message
        box = [message]
        dist.broadcast_object_list(box, group=group, group_src=0)
        return box[0]

    def _pixels(self, rows: list[Row], patches: np.ndarray, owner: np.ndarray) -> Frames:
        """Pixels and position tables of the frames dealt to this rank, on the device."""
        group, here = self.groups.model_parallel, self.groups.model_parallel.rank()
        vision = self.vlm.shapes.vision
        patch_owner = torch.from_numpy(np.repeat(owner, patches))
        shapes = {"patches": (vision.patch_dim,), "patch_coords": (2,), "pos_index": (4,), "pos_weight": (4,)}
        dtypes = {
            "patches": torch.float32,
            "patch_coords": torch.int32,
            "pos_index": torch.int32,
            "pos_weight": torch.float32,
        }
        mine, sending = {}, []
        for name in _PIXEL_FIELDS:
            if self.groups.is_leader:
                whole = torch.cat([getattr(row, name) for row in rows]) if len(rows) != 1 else getattr(rows[0], name)
                for rank in range(1, group.size()):
                    part = whole[patch_owner == rank].to(device(), non_blocking=True)
                    if len(part):
                        sending.append((dist.isend(part, group=group, group_dst=rank), part))
                part = whole if group.size() == 1 else whole[patch_owner == 0]
                mine[name] = part.to(device(), non_blocking=True)
            else:
                count = int((patch_owner == here).sum())
                mine[name] = torch.empty(count, *shapes[name], dtype=dtypes[name], device=device())
                if count:
                    dist.recv(mine[name], group=group, group_src=0)
        for work, _ in sending:
            work.wait()
        lengths = patches[owner == here].tolist()
        return Frames(mine["patches"], mine["patch_coords"], mine["pos_index"], mine["pos_weight"], lengths)

    def _micro_batch(self, host: Row, positions: np.ndarray) -> MicroBatch:
        parallel, tensor_rank = self.vlm.parallel, self.groups.language.tp.rank()
        slices, index = (parallel.tensor, tensor_rank) if parallel.sequence_parallel else (1, 0)
        where = device()
        length = len(host.input_ids) // slices
        padding = None
        if self.vlm.shapes.text.moe is not None:
            padding = (torch.arange(index * length, (index + 1) * length) >= host.num_tokens)[None].to(where)
        return MicroBatch(
            host=host,
            input_ids=host.input_ids.to(where, non_blocking=True),
            position_ids=host.position_ids.to(where, non_blocking=True),
            row=PackedRow.of(
                host.segment_lengths, where, visual_positions=torch.from_numpy(positions).to(where, non_blocking=True)
            ),
            targets=Targets.of(host.labels, host.loss_weights, slices, index, where),
            padding_mask=padding,
        )


def _without_pixels(row: Row) -> Row:
    return replace(row, **{name: getattr(row, name)[:0].clone() for name in _PIXEL_FIELDS})
