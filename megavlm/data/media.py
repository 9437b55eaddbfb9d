"""Pictures and videos on disk: their sizes, read from the header alone, and their pixels.

The size determines the number of tokens of a sample, so packing needs it long before any pixel is decoded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from transformers.video_utils import VideoMetadata

from megavlm.base.errors import UserError
from megavlm.data.files import File

_EXIF_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


@dataclass
class Picture:
    """A picture file. `source` ("file:line") is the sample that names it, for error messages."""

    file: File
    source: str

    def size(self) -> tuple[int, int]:
        """(height, width) as displayed, from the header. Raises UserError if the file is missing or unreadable."""
        with _explained(self.source, "picture", self.file), self._image() as image:
            width, height = image.size
            is_transposed = image.getexif().get(_EXIF_ORIENTATION) in _TRANSPOSED
        return (width, height) if is_transposed else (height, width)

    def pixels(self) -> torch.Tensor:
        """The decoded picture, upright: uint8 [3, height, width], RGB. Raises UserError if it cannot be decoded."""
        with _explained(self.source, "picture", self.file):
            with self._image() as image:
                if image.format != "JPEG":  # PIL reads all formats, but torchvision decodes JPEG three times as fast
                    image = ImageOps.exif_transpose(image).convert("RGB")
                    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
            path = self.file.local_path
            data = read_file(path) if path else torch.frombuffer(bytearray(self.file.read()), dtype=torch.uint8)
            return decode_jpeg(data, ImageReadMode.RGB, apply_exif_orientation=True)

    @contextmanager
    def _image(self) -> Iterator[Image.Image]:
        with self.file.open() as stream, Image.open(stream) as image:
            yield image


@dataclass
class Video:
    """A video: either one file, or its frames as picture files and their rate in frames per second."""

    file: File | None
    frames: list[Picture]
    fps: float | None
    source: str

    @property
    def name(self) -> str:
        """The file or the first frame, for error messages."""
        return str(self.file or f"of frames {self.frames[0].file}, …")

    def probe(self) -> VideoMetadata:
        """Number, rate and size of the frames, from the file's header. Raises UserError if it is not a video."""
        if self.file is None:
            sizes = [frame.size() for frame in self.frames]
            if len(set(sizes)) > 1:
                raise UserError(
                    f"{self.source}: the frames of a video differ in size: {sorted(set(sizes))} (height, width)",
                    "scale the frames to one size",
                )
            assert self.fps is not None, "a list of frames has a rate"
            count, fps, (height, width) = len(sizes), self.fps, sizes[0]
        else:
            with self._container() as container:
                if not container.streams.video:
                    raise ValueError("it has no video stream")
                stream = container.streams.video[0]
                # Some containers (WebM) do not store the number of frames.
                count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
                fps, height, width = float(stream.average_rate or 0), stream.height, stream.width
                if not count or not fps:
                    raise ValueError("it has no frames")
        return VideoMetadata(total_num_frames=count, fps=fps, height=height, width=width, duration=count / fps)

    def pixels(self, indices: np.ndarray) -> torch.Tensor:
        """The decoded frames at the sorted `indices`: uint8 [len(indices), 3, height, width]. Raises UserError."""
        if self.file is None:
            return torch.stack([self.frames[index].pixels() for index in indices])
        from av.video.reformatter import VideoReformatter

        # PyAV's shared reformatter starts threads; a forked worker that inherits it would wait for them for ever.
        convert = VideoReformatter()
        with self._container() as container:
            wanted, decoded, index = set(indices.tolist()), {}, -1
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    decoded[index] = torch.from_numpy(convert.reformat(frame, format="rgb24", threads=1).to_ndarray())
                if index >= indices[-1]:
                    break
            if len(decoded) < len(wanted):
                raise ValueError(f"frame {max(wanted)} cannot be decoded; the file ends after {index + 1} frames")
            return torch.stack([decoded[index] for index in indices.tolist()]).permute(0, 3, 1, 2).contiguous()

    @contextmanager
    def _container(self) -> Iterator[Any]:
        import av  # imported on first use, because many data sets have no videos

        assert self.file is not None, "a list of frames has no container"
        with (
            _explained(self.source, "video", self.file),
            self.file.open() as stream,
            av.open(self.file.local_path or stream) as container,
        ):
            yield container


Find = Callable[[str], File]
"""A function that locates the media of a sample: it maps a name in the record to the file."""


def find_picture(named: Any, find: Find, source: str) -> Picture:
    """The picture that a record names by a path."""
    if not isinstance(named, str):
        raise UserError(f"{source}: a picture must be a path, found {str(named)[:200]}")
    return Picture(find(named), source)


def find_video(named: Any, find: Find, source: str, sampled_fps: float) -> Video:
    """The video that a record names: a path, a list of frames' paths, or ``{"frames": path or list, "fps": number}``.

    A list of frames without a rate is assumed to have `sampled_fps`, the rate at which video files are sampled.
    """
    fps = None
    if isinstance(named, dict):
        if unknown := set(named) - {"frames", "fps"}:
            raise UserError(
                f"{source}: a video has unknown fields {', '.join(sorted(unknown))}; allowed fields: frames, fps"
            )
        named, fps = named.get("frames"), named.get("fps")
    if isinstance(named, str):
        if fps is not None:
            raise UserError(
                f"{source}: fps {fps} is given for the video file {named}, but a video file contains its own rate",
                "remove fps; data.video_fps sets how many frames are sampled per second",
            )
        return Video(find(named), [], None, source)
    if not isinstance(named, list) or not named:
        raise UserError(f"{source}: a video must be a path or a list of frame paths, found {str(named)[:200]}")
    fps = sampled_fps if fps is None else fps
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not fps > 0:
        raise UserError(f"{source}: fps must be a number above 0, found {fps!r}")
    return Video(None, [find_picture(frame, find, source) for frame in named], float(fps), source)


@contextmanager
def _explained(source: str, what: str, file: File) -> Iterator[None]:
    """Converts any exception of a decoder to a UserError that names the sample, the file and the cause."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"{source}: {what} {file} does not exist", "paths are absolute or relative to the folder of the data file"
        ) from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{source}: {what} {file} cannot be read: {error}") from error
