"""The pixels of a window: bytes go from the leaders' rows to the ranks that encode the frames, which normalise them.

On its way a pixel is the one byte that it was in the resized picture, and a picture is sent once, although the tower
sees it as both images of its temporal step. float32 patches, as the processor of transformers returns them, would take
eight times as much.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megavlm.data.row import Row
from megavlm.model.shapes import VisionShape
from megavlm.model.vision import Frames
from megavlm.platform import device, host_buffer, to_device

_TABLES = {"patch_coords": 2, "pos_index": 4, "pos_weight": 4}  # the position tables and their width
_AT_ONCE = 8192  # patches that are in float32 at a time


@dataclass(frozen=True)
class Assigned:
    """The frames of one data-parallel rank, and who encodes them.

    Attributes:
        patches: int64 [F], patches of each frame.
        images: int64 [F], images of each frame (``Sample.frame_images``).
        owner: int64 [F], the rank of the tower's group that encodes it; -1: none has to.
    """

    patches: np.ndarray
    images: np.ndarray
    owner: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """int64 [F], rows of ``Sample.pixels`` of each frame."""
        return self.patches * self.images


def deliver(
    full: list[Row],
    assigned: Sequence[Assigned],
    mine: int | None,
    leaders: Sequence[int],
    group: dist.ProcessGroup,
    scale: torch.Tensor,
    vision: VisionShape,
    dtype: torch.dtype,
) -> Frames:
    """Returns the frames that this rank encodes, on the device. Call it on all ranks of the group.

    Args:
        full: on a leader, the rows of its data-parallel rank with their pixels.
        assigned: the frames of each data-parallel rank in the group.
        mine: on a leader, the place of its data-parallel rank in ``assigned``; None elsewhere.
        leaders: the leader of each data-parallel rank, as a rank of the group.
        group: the ranks that share the frames.
        scale: float32 [2, channels], see ``Sample.pixel_scale``.
        vision: the shape of the tower.
        dtype: the precision of the tower.
    """
    order: list[int] = []
    to_here = [one.owner == group.rank() for one in assigned]
    sent = {name: [0] * group.size() for name in ("rows", "patches")}
    received = {name: [0] * group.size() for name in ("rows", "patches")}
    for name in sent:
        for one, leader, chosen in zip(assigned, leaders, to_here, strict=True):
            received[name][leader] = int(getattr(one, name)[chosen].sum())
        if mine is not None:
            own, goes = assigned[mine], assigned[mine].owner >= 0
            order = [index for index in np.argsort(own.owner, kind="stable").tolist() if goes[index]]
            sent[name] = np.bincount(own.owner[goes], getattr(own, name)[goes], group.size()).astype(int).tolist()
    pixels = _in_order(full, "pixels", order, vision.patch_dim // vision.temporal_patch_size, torch.uint8)
    tables = [_in_order(full, name, order, width, torch.int32) for name, width in _TABLES.items()]
    if group.size() > 1:
        pixels = _exchanged(pixels, sent["rows"], received["rows"], group)
        whole = _exchanged(torch.cat(tables, dim=1), sent["patches"], received["patches"], group)
        tables = list(whole.split(list(_TABLES.values()), dim=1))
    coords, index, weight = (table.contiguous() for table in tables)
    lengths = np.concatenate([one.patches[chosen] for one, chosen in zip(assigned, to_here, strict=True)])
    images = np.concatenate([one.images[chosen] for one, chosen in zip(assigned, to_here, strict=True)])
    patches = normalised(pixels, lengths, images, scale, vision.temporal_patch_size, dtype)
    return Frames(patches, coords, index, weight.view(torch.float32), lengths.tolist())


def normalised(
    pixels: torch.Tensor,
    lengths: np.ndarray,
    images: np.ndarray,
    scale: torch.Tensor,
    images_per_step: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The patches as the processor of transformers returns them: the same float32 bits, rounded to ``dtype``.

    Args:
        pixels: uint8 [Q, channels * n], see ``Sample.pixels``.
        lengths: int64 [F], patches of each frame.
        images: int64 [F], images of each frame.
        scale: float32 [2, channels] on the host.
        images_per_step: how many images of a frame the patches contain; the last image is repeated to fill them.
        dtype: of the result.

    Returns:
        [P, channels * images_per_step * n].
    """
    where, channels = pixels.device, scale.shape[1]
    total, ends = int(lengths.sum()), np.cumsum(lengths)
    within = np.arange(total) - np.repeat(ends - lengths, lengths)
    first = np.cumsum(lengths * images) - lengths * images
    # int64 [images_per_step, P]: the row of ``pixels`` that a patch of each image has
    rows = np.stack([np.repeat(first + np.minimum(k, images - 1) * lengths, lengths) for k in range(images_per_step)])
    index = to_device(torch.from_numpy(rows + within), where)
    # A division by a tensor is rounded like that of the processor; by a number, a GPU would multiply by its inverse.
    subtracted, divisor = to_device(scale, where)[:, None, :, None]
    out = torch.empty(total, channels, images_per_step, pixels.shape[1] // channels, dtype=dtype, device=where)
    for start in range(0, total, _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        for image in range(images_per_step):
            values = pixels[index[image, part]].view(-1, channels, out.shape[3]).float()
            out[part, :, image] = values.sub_(subtracted).div_(divisor)
    return out.flatten(1)


def _exchanged(whole: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Exchanges rows of a matrix: ``sent`` rows to, and ``received`` rows from, each rank of the group."""
    out = whole.new_empty(sum(received), whole.shape[1])
    dist.all_to_all_single(out, whole, received, sent, group=group)
    return out


def _in_order(rows: list[Row], name: str, order: Sequence[int], width: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns a field of the rows' frames on the device, with the frames in ``order`` and the bits as ``dtype``.

    It is copied once on the host, and on a GPU only there into page-locked memory.
    """
    frames: list[torch.Tensor] = []
    for row in rows:
        counts = row.frame_grids.prod(dim=1) * (row.frame_images if name == "pixels" else 1)
        frames += getattr(row, name).view(dtype).split(counts.tolist())
    buffer = host_buffer(sum(len(frames[index]) for index in order), width, dtype)
    if order and device().type != "meta":  # tensors without values need none
        torch.cat([frames[index] for index in order], out=buffer)
    return buffer.to(device(), non_blocking=True)
