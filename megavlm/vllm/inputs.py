"""What vLLM is given of a prompt: tokens and normalised patches, past its processor. Runs in the server.

vLLM's processor would expand placeholders and resize pictures again. The trainer has done both, so its tokens and bytes
go straight to the model: each frame (a picture, or one temporal step of a video) is an "image" of one step, whatever
the token is that stands for it, because the tower sees both alike and never looks from one frame to another.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor
from vllm.inputs.engine import mm_input, tokens_input
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalFlatField,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)


def engine_input(head: dict[str, Any], pixels: memoryview, images_per_step: int) -> Any:
    """The input of vLLM's engine.

    Args:
        head: "tokens", and of each frame in "frames" its first token, height and width in patches, number of tokens
            and of images (``Sample.frame_images``); "scale" (``Sample.pixel_scale``).
        pixels: ``Sample.pixels``.
        images_per_step: how many images of a frame the tower sees.
    """
    tokens, frames = head["tokens"], head["frames"]
    if not frames:
        return tokens_input(tokens)
    scale = torch.tensor(head["scale"], dtype=torch.float32)
    rows = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(
        sum(f["h"] * f["w"] * f["images"] for f in frames), -1
    )
    items, hashes, places, first = [], [], [], 0
    for frame in frames:
        grid = torch.tensor([1, frame["h"], frame["w"]])
        images = rows[first : (first := first + frame["h"] * frame["w"] * frame["images"])]
        patches = _normalised(images.view(frame["images"], frame["h"] * frame["w"], -1), scale, images_per_step)
        elements = {
            "pixel_values": MultiModalFieldElem(patches, MultiModalFlatField(slices=[slice(None)], dim=0)),
            "image_grid_thw": MultiModalFieldElem(grid, MultiModalBatchedField(keep_on_cpu=True)),
        }
        items.append(MultiModalKwargsItem(elements))
        hashes.append(hashlib.sha256(images.numpy().tobytes() + repr((frame["h"], frame["w"])).encode()).hexdigest())
        places.append(PlaceholderRange(frame["first"], frame["tokens"]))
    kwargs: Any = MultiModalKwargsItems({"image": items})
    return mm_input(tokens, kwargs, {"image": hashes}, {"image": places})


def _normalised(images: Tensor, scale: Tensor, images_per_step: int) -> Tensor:
    """float32 [P, channels * images_per_step * n] of uint8 [images, P, channels * n]: the processor's own bits.

    The last image is repeated up to the images of a step, as in ``megavlm.runtime.pixels.normalised``.
    """
    channels = scale.shape[1]
    values = images.view(*images.shape[:2], channels, -1).float()
    values = (values - scale[0][:, None]) / scale[1][:, None]
    steps = [values[min(k, len(values) - 1)] for k in range(images_per_step)]
    return torch.stack(steps, dim=2).flatten(1)
