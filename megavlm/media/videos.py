"""Videos on disk: the times and the size of their frames, found without decoding them, and the frames' pixels."""

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted, shortened
from megavlm.media.files import File, Find, explained
from megavlm.media.frames import Frames, decode, even, probe, upright
from megavlm.media.pictures import Picture, find_picture

# FFmpeg also plays lists of other files and URLs (HLS, DASH, concat, …) and opens names such as "concat:a|b". A sample
# could thus read what it may not name. So the containers are listed, and a path always begins with a slash.
_CONTAINERS = {
    "format_whitelist": "mov,mp4,matroska,webm,avi,gif,apng,flv,asf,ogg,mpeg,mpegts,mpegvideo,m4v,mjpeg,h264,hevc,ivf,"
    "mxf,nut,yuv4mpegpipe",
    "protocol_whitelist": "file",
}


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

    def probe(self) -> Frames:
        """All frames: when they are shown, and their size. Raises UserError if the file is not a video or cut off."""
        if self.file is None:
            sizes = [frame.size() for frame in self.frames]
            if len(set(sizes)) > 1:
                raise UserError(
                    f"{self.source}: the frames of a video differ in size: {sorted(set(sizes))} (height, width)",
                    "scale the frames to one size",
                )
            assert self.fps is not None, "a list of frames has a rate"
            return even(len(sizes), self.fps, *sizes[0])
        with self._container() as container:
            return probe(container)

    def pixels(self, frames: Frames) -> Generator[torch.Tensor]:
        """Decode some of the frames of ``probe`` one after another, so that only one of them is in memory.

        Yields:
            For each frame its pixels, upright: uint8 [3, height, width], RGB, contiguous.

        Raises:
            UserError: a frame cannot be decoded.
        """
        if self.file is None:
            for number in frames.stamps.tolist():
                yield self.frames[number].pixels()
            return
        from av.video.reformatter import VideoReformatter

        # PyAV's shared reformatter starts threads; a forked worker that inherits it would wait for them for ever.
        convert, done = VideoReformatter(), 0
        for may_seek in (True, False):
            with self._container() as container:
                for frame in decode(container, frames.take(slice(done, None)), may_seek):
                    yield _pixels(convert, frame)
                    done += 1
            if done == len(frames):
                return

    @contextmanager
    def _container(self) -> Iterator[Any]:
        import av  # imported on first use, because many data sets have no videos

        assert self.file is not None, "a list of frames has no container"
        path = self.file.local_path
        with explained(self.source, "video", self.file), self.file.open() as stream:
            try:
                with av.open(os.path.abspath(path) if path else stream, options=_CONTAINERS) as container:
                    yield container
            except av.FFmpegError as error:
                if isinstance(error, FileNotFoundError | PermissionError):
                    raise
                # FFmpeg's words for a file without its beginning or index: an input/output error, no decoder found, …
                raise ValueError(f"it is cut off, damaged, or no video ({error.strerror})") from error


def _pixels(convert: Any, frame: Any) -> torch.Tensor:
    """The pixels of PyAV's frame, as ``Video.pixels`` yields them. A function, so that it keeps no other copy."""
    rgb = convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return torch.from_numpy(np.ascontiguousarray(upright(rgb, frame).transpose(2, 0, 1)))


def find_video(named: Any, find: Find, source: str, sampled_fps: float) -> Video:
    """The video that a record names: a path, a list of frames' paths, or ``{"frames": path or list, "fps": number}``.

    A list of frames without a rate is assumed to have `sampled_fps`, the rate at which video files are sampled.
    """
    fps = None
    if isinstance(named, dict):
        if unknown := set(named) - {"frames", "fps"}:
            names = shortened(", ".join(sorted(unknown)))
            raise UserError(f"{source}: a video has unknown fields {names}; allowed fields: frames, fps")
        named, fps = named.get("frames"), named.get("fps")
    if isinstance(named, str):
        if fps is not None:
            raise UserError(
                f"{source}: fps {quoted(fps)} is given for the video file {shortened(named)}, but a video file "
                "contains its own rate",
                "remove fps; data.video_fps sets how many frames are sampled per second",
            )
        return Video(find(named), [], None, source)
    if not isinstance(named, list) or not named:
        raise UserError(f"{source}: a video must be a path or a list of frame paths, found {quoted(named)}")
    fps = sampled_fps if fps is None else fps
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not fps > 0:
        raise UserError(f"{source}: fps must be a number above 0, found {quoted(fps)}")
    return Video(None, [find_picture(frame, find, source) for frame in named], float(fps), source)
