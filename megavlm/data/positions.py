"""Positions of tokens and patches, computed on the host from grid sizes alone.

The Qwen3-VL model of transformers computes them in its forward pass (``Qwen3VLModel.get_rope_index`` and the two
position helpers of ``Qwen3VLVisionModel.forward``). They depend only on the sample, so here a data worker computes them
once, without loops over tokens or patches. A *frame* is one temporal step of a picture or video: ``h`` x ``w`` patches,
of which each block of ``merge`` x ``merge`` patches becomes one visual token.
"""

import numpy as np


def mrope_positions(num_tokens: int, frame_grids: np.ndarray, visual_positions: np.ndarray, merge: int) -> np.ndarray:
    """Rotary positions (time, height, width) of each token of one sample.

    A text token advances all three axes by one. The tokens of a frame share one time position; their height and width
    positions count rows and columns from it. The text after a frame continues at the frame's longer side.

    Args:
        num_tokens: number of tokens t of the sample.
        frame_grids: [F, 2], (h, w) in patches of each frame, in text order.
        visual_positions: [V], index of each visual token among the t tokens, in text order. Each frame has the next
            ``h * w / merge**2`` of them, which are contiguous in the text.
        merge: patches per side that are merged into one token.

    Returns:
        int64 [3, t], equal to transformers' ``get_rope_index`` for the same sample.
    """
    rows, columns = (frame_grids // merge).astype(np.int64).T
    counts = rows * columns
    positions = np.tile(np.arange(num_tokens), (3, 1))
    if len(counts) == 0:
        return positions
    within, frame = _enumerate_groups(counts)
    starts = visual_positions[np.cumsum(counts) - counts]

    # After its last token, a frame of n tokens has advanced the position by its longer side instead of by n.
    shift = np.zeros(num_tokens + 1, dtype=np.int64)
    np.add.at(shift, starts + counts, np.maximum(rows, columns) - counts)
    positions += np.cumsum(shift[:-1])

    positions[:, visual_positions] = positions[0, starts][frame]
    positions[1, visual_positions] += within // columns[frame]
    positions[2, visual_positions] += within % columns[frame]
    return positions


def patch_coordinates(frame_grids: np.ndarray, merge: int) -> np.ndarray:
    """Row and column of each patch in its frame, in the processor's order (by merge block, then within the block).

    Args:
        frame_grids: [F, 2], (h, w) in patches.
        merge: patches per side of a block.

    Returns:
        int32 [P, 2], where P is the sum of h * w.
    """
    heights, widths = frame_grids.astype(np.int64).T
    within, frame = _enumerate_groups(heights * widths)
    block, inside = np.divmod(within, merge * merge)
    block_row, block_column = np.divmod(block, (widths // merge)[frame])
    inner_row, inner_column = np.divmod(inside, merge)
    coordinates = np.empty((len(within), 2), dtype=np.int32)
    coordinates[:, 0] = block_row * merge + inner_row
    coordinates[:, 1] = block_column * merge + inner_column
    return coordinates


def grid_interpolation(frame_grids: np.ndarray, coordinates: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The four corners of the learned square grid of position embeddings that each patch reads, and their weights.

    The corner patches of a frame lie on the corners of the grid (``align_corners``); all others are interpolated
    bilinearly.

    Args:
        frame_grids: [F, 2], (h, w) in patches.
        coordinates: [P, 2], from ``patch_coordinates``.
        side: side of the learned grid (48 in the released models).

    Returns:
        index int32 [P, 4] into the flattened grid and weight float32 [P, 4], such that
        ``(table[index] * weight[..., None]).sum(1)`` is the embedding that transformers interpolates.
    """
    sizes = np.repeat(frame_grids, frame_grids.prod(axis=1), axis=0)
    # float32 and this order of operations make the weights bitwise equal to those of transformers.
    place = coordinates.astype(np.float32) * np.float32(side - 1) / np.maximum(sizes - 1, 1).astype(np.float32)
    floor = np.floor(place)
    offset = place - floor
    weights = np.stack([1 - offset, 1 - (1 - offset)], axis=-1)  # [P, axis, 2]
    low = floor.astype(np.int32)
    corners = np.stack([low, np.minimum(low + 1, side - 1)], axis=-1)
    index = corners[:, 0, :, None] * np.int32(side) + corners[:, 1, None, :]
    weight = weights[:, 0, :, None] * weights[:, 1, None, :]
    return index.reshape(-1, 4), weight.reshape(-1, 4)


def _enumerate_groups(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For consecutive groups of the given sizes: each element's index within its group, and its group."""
    group = np.repeat(np.arange(len(counts)), counts)
    return np.arange(len(group)) - (np.cumsum(counts) - counts)[group], group
