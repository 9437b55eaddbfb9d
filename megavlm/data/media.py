"""Pictures and videos on disk: their size from the header alone, and their pixels.

The size decides how many tokens a sample has, so packing needs it long before anybody decodes a pixel.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from transformers.video_utils import VideoMetadata

from megavlm.config.errors import UserError

_EXIF_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


@dataclass
class Picture:
    """A picture file. `source` ("file:line") is the sample that names it, for messages."""

    path: Path
    source: str

    def size(self) -> tuple[int, int]:
        """(height, width) as the viewer sees it, read from the header. Raises UserError if there is no such picture."""
        with _explained(self.source, "picture", self.path), Image.open(self.path) as image:
            width, height = image.size
            is_transposed = image.getexif().get(_EXIF_ORIENTATION) in _TRANSPOSED
        return (width, height) if is_transposed else (height, width)

    def pixels(self) -> torch.Tensor:
        """The decoded picture, upright: uint8 [3, height, width], RGB. Raises UserError if it cannot be decoded."""
        with _explained(self.source, "picture", self.path):
            with Image.open(self.path) as image:
                if image.format != "JPEG":  # PIL reads every format, but JPEG at a third of torchvision's speed
                    image = ImageOps.exif_transpose(image).convert("RGB")
                    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
            data = read_file(str(self.path))
            return decode_jpeg(data, ImageReadMode.RGB, apply_exif_orientation=True)


@dataclass
class Video:
    """A video: one file, or frames as pictures with their rate in frames per second."""

    path: Path | None
    frames: list[Picture]
    fps: float | None
    source: str

    @property
    def name(self) -> str:
        """The file, or the first of the frames, for messages."""
        return str(self.path or f"of frames {self.frames[0].path}, …")

    def probe(self) -> VideoMetadata:
        """Number, rate and size of all frames, from the file's header. Raises UserError if it is not a video."""
        if self.path is None:
            sizes = [frame.size() for frame in self.frames]
            if len(set(sizes)) > 1:
                raise UserError(
                    f"{self.source}: frames of one video differ in size: {sorted(set(sizes))} (height, width)",
                    "bring the frames to one size",
                )
            count, fps, (height, width) = len(sizes), self.fps, sizes[0]
        else:
            import av  # on first use: only some data sets have videos

            with _explained(self.source, "video", self.path), av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise ValueError("it has no video stream")
                stream = container.streams.video[0]
                # Some containers (WebM) do not say how many frames they hold.
                count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
                fps, height, width = float(stream.average_rate or 0), stream.height, stream.width
                if not count or not fps:
                    raise ValueError("it has no frames")
        return VideoMetadata(total_num_frames=count, fps=fps, height=height, width=width, duration=count / fps)

    def pixels(self, indices: np.ndarray) -> torch.Tensor:
        """The chosen frames, decoded: uint8 [len(indices), 3, height, width]; `indices` ascend. Raises UserError."""
        if self.path is None:
            return torch.stack([self.frames[index].pixels() for index in indices])
        import av

        with _explained(self.source, "video", self.path), av.open(str(self.path)) as container:
            wanted, decoded, index = set(indices.tolist()), {}, -1
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    decoded[index] = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                if index >= indices[-1]:
                    break
            if len(decoded) < len(wanted):
                raise ValueError(f"frame {max(wanted)} cannot be decoded; the file ends after {index + 1} frames")
            return torch.stack([decoded[index] for index in indices.tolist()]).permute(0, 3, 1, 2).contiguous()


def find_picture(named: Any, base: Path, source: str) -> Picture:
    """The picture that a record names by a path: absolute, or relative to the folder of its file."""
    if not isinstance(named, str):
        raise UserError(f"{source}: a picture is named by its path, found {str(named)[:200]}")
    return Picture(base / named, source)


def find_video(named: Any, base: Path, source: str, sampled_fps: float) -> Video:
    """The video that a record names: a path, a list of frames' paths, or ``{"frames": path or list, "fps": number}``.

    A list without a rate is taken as sampled at `sampled_fps`, the rate at which files are sampled.
    """
    fps = None
    if isinstance(named, dict):
        if unknown := set(named) - {"frames", "fps"}:
            raise UserError(f"{source}: a video has frames and fps; unknown: {', '.join(sorted(unknown))}")
        named, fps = named.get("frames"), named.get("fps")
    if isinstance(named, str):
        if fps is not None:
            raise UserError(
                f"{source}: fps {fps} for the video file {named}: the file says its own rate; this would be ignored",
                "remove fps; data.video_fps says how many frames are sampled per second",
            )
        return Video(base / named, [], None, source)
    if not isinstance(named, list) or not named:
        raise UserError(f"{source}: a video is a path or a list of frames' paths, found {str(named)[:200]}")
    fps = sampled_fps if fps is None else fps
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not fps > 0:
        raise UserError(f"{source}: fps must be a number above 0, found {fps!r}")
    return Video(None, [find_picture(frame, base, source) for frame in named], float(fps), source)


@contextmanager
def _explained(source: str, what: str, path: Path) -> Iterator[None]:
    """Turns whatever a decoder raises into a UserError that names the sample, the file and the cause."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"{source}: {what} {path} does not exist", "paths are absolute or relative to the folder of the data file"
        ) from error
    except Exception as error:
        raise UserError(f"{source}: {what} {path} cannot be read: {error}") from error
