"""What is kept of frames: which of them go through the tower, what is given in which order, and how much is kept."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megavlm.model.tower_phase import _chunks
from megavlm.model.vision import Frames
from megavlm.runtime import kept_frames
from megavlm.runtime.kept_frames import KeptFrames, RecalledFrames

LENGTHS, WIDTH = [4, 8, 4, 12], 6  # frames "0" to "3"


class Tower:
    """Two planes of each patch, made of its first pixel; it notes the frames that it is given."""

    def __init__(self):
        self.seen: list[int] = []

    def __call__(self, frames: Frames) -> list[torch.Tensor]:
        assert len(frames.patches) == sum(frames.lengths)
        self.seen += frames.lengths
        return [factor * frames.patches[:, :1].expand(-1, WIDTH) for factor in (1.0, 10.0)]


def patches_of(numbers: list[int]) -> torch.Tensor:
    """The pixels of a patch are its number among the patches of all frames."""
    starts = np.cumsum([0, *LENGTHS])
    values = [torch.arange(int(starts[n]), int(starts[n + 1])) for n in numbers]
    return torch.cat([torch.empty(0), *values])[:, None].expand(-1, 3).float()


def recalled(kept: KeptFrames) -> RecalledFrames:
    """All four frames, with the pixels of those that are not kept."""
    keys = [str(number).encode() for number in range(len(LENGTHS))]
    states = [kept.states.get(key) for key in keys]
    patches = patches_of([number for number, state in enumerate(states) if state is None])
    return RecalledFrames(patches, patches, patches, patches, list(LENGTHS), keys, states, kept)


def put(kept: KeptFrames, numbers: list[int]) -> None:
    values = patches_of(numbers)[:, :1].expand(-1, WIDTH)
    lengths = [LENGTHS[number] for number in numbers]
    kept.put([str(number).encode() for number in numbers], lengths, [values, 10 * values])


@pytest.mark.parametrize("chunk_patches", [4, 12, 16, 100])
@pytest.mark.parametrize("known", [[], [0], [3], [1, 2], [0, 3], [0, 1, 2, 3]])
def test_frames_come_in_order_and_only_new_ones_go_through_the_tower(known, chunk_patches):
    kept, tower = KeptFrames({}), Tower()
    put(kept, known)
    frames = recalled(kept)
    new = [length for number, length in enumerate(LENGTHS) if number not in known]
    assert frames.num_new == len(new)
    chunks = _chunks(frames, chunk_patches)
    assert [length for chunk in chunks for length in chunk.lengths] == LENGTHS
    wanted = patches_of([0, 1, 2, 3])[:, :1].expand(-1, WIDTH)
    for seen in (new, new):  # a second pass, as a recomputation makes it, finds all of them
        outputs = [chunk.to(torch.device("cpu")).through(tower) for chunk in chunks]
        planes = [torch.cat(plane) for plane in zip(*outputs, strict=True)]
        assert torch.equal(planes[0], wanted)
        assert torch.equal(planes[1], 10 * wanted)
        assert tower.seen == seen


def test_what_has_no_room_is_encoded_each_time(monkeypatch):
    """Of each patch, 48 bytes are kept; there is room for the first two frames."""
    monkeypatch.setattr(kept_frames, "MOST_BYTES", 12 * 48)
    kept, tower = KeptFrames({}), Tower()
    chunks = _chunks(recalled(kept), 8)  # frames 0; 1; 2; 3
    for _ in range(2):
        for chunk in chunks:
            chunk.through(tower)
    assert tower.seen == [*LENGTHS, *LENGTHS[2:]]
    assert kept.used_bytes == 12 * 48
    assert sorted(kept.states) == [b"0", b"1"]


def test_each_plane_of_a_frame_is_contiguous():
    """Otherwise the host would copy it on its way to a GPU, before the GPU has written it."""
    kept = KeptFrames({})
    put(kept, [0, 1, 2])
    assert all(plane.is_contiguous() for state in kept.states.values() for plane in state)
    assert not kept.states[b"1"].is_contiguous()


def test_a_key_tells_pixels_sizes_and_images_apart():
    pixels = torch.arange(96, dtype=torch.uint8).view(24, 4)

    def keys(grids: list, images: list, values: torch.Tensor = pixels) -> list[bytes]:
        row = SimpleNamespace(pixels=values, frame_grids=torch.tensor(grids), frame_images=torch.tensor(images))
        return kept_frames._keys(row)

    first = keys([[2, 4], [4, 4]], [1, 1])
    assert first == keys([[2, 4], [4, 4]], [1, 1], pixels.clone())
    assert first[0] != keys([[4, 2], [4, 4]], [1, 1])[0]  # another shape
    assert first[0] != keys([[2, 2], [4, 4]], [2, 1])[0]  # the steps of a video
    other = pixels.clone()
    other[7, 3] += 1
    changed = keys([[2, 4], [4, 4]], [1, 1], other)
    assert changed[0] != first[0]
    assert changed[1] == first[1]


def test_a_trained_tower_keeps_nothing():
    vlm = SimpleNamespace(vision=torch.nn.Linear(2, 2).requires_grad_(False))
    assert not kept_frames.can_keep(vlm)
    with kept_frames.keeping(vlm):
        assert kept_frames.can_keep(vlm)
        vlm.vision.bias.requires_grad_(True)
        assert not kept_frames.can_keep(vlm)
        vlm.vision.bias.requires_grad_(False)
    assert not kept_frames.can_keep(vlm)


def test_another_model_shares_what_is_kept_if_its_tower_has_the_same_weights():
    main = SimpleNamespace(vision=torch.nn.Linear(2, 2).requires_grad_(False))
    other = SimpleNamespace(vision=torch.nn.Linear(2, 2).requires_grad_(False))
    with kept_frames.keeping(main):
        with kept_frames.sharing_kept(other, main):
            assert not kept_frames.can_keep(other)
        other.vision.weight.data = main.vision.weight.data
        with kept_frames.sharing_kept(other, main):
            assert not kept_frames.can_keep(other), "its bias is another"
        other.vision.bias.data = main.vision.bias.data
        with kept_frames.sharing_kept(other, main):
            assert kept_frames.can_keep(other)
        assert not kept_frames.can_keep(other)
        assert kept_frames.can_keep(main)
    with kept_frames.sharing_kept(other, main):
        assert not kept_frames.can_keep(other), "the main model keeps nothing"
