"""Videos on disk: the number, rate and size of their frames, read from the header alone, and the frames' pixels."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.video_utils import VideoMetadata

from megavlm.base.errors import UserError
from megavlm.media.files import File, Find, explained
from megavlm.media.pictures import Picture, find_picture


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
            explained(self.source, "video", self.file),
            self.file.open() as stream,
            av.open(self.file.local_path or stream) as container,
        ):
            yield container


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
