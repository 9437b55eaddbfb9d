"""The frames of a video file: when each of them is shown, found without decoding them, and the decoded frames.

The frames' own time stamps are believed, not the rate in the header. Screens, browsers and phones record at varying
rates, and the rate of a WebM file is a guess of the reader.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_WRITTEN = 0.05  # seconds; half of the last digit of the times in a clip's text
_FAR = 8  # frames; a nearer key frame is not worth a seek
_HIDDEN = 2  # frames; VP8 has packets without a picture of their own, during which the frame before them is shown
_MAX_REORDERED = 32  # frames; codecs store a frame at most 16 places away from where it is shown
_SEEKABLE = {"mp4", "matroska", "avi"}  # these have an index of key frames


@dataclass(frozen=True)
class Frames:
    """Frames of a video: all of them, or those that are sampled.

    Attributes:
        height: height of a frame in pixels, as displayed.
        width: width of a frame in pixels, as displayed.
        fps: mean number of frames per second of the whole video.
        times: float64 [n], seconds since the first frame of the video, ascending.
        stamps: int64 [n], the time stamps in the stream's unit, ascending; if not `has_stamps`, the frames' numbers.
        keys: int64 [n], the stamp of the last key frame up to each frame: decoding can start there.
        has_stamps: whether the file has usable time stamps.
    """

    height: int
    width: int
    fps: float
    times: np.ndarray
    stamps: np.ndarray
    keys: np.ndarray
    has_stamps: bool

    def __len__(self) -> int:
        return len(self.times)

    def take(self, numbers: ArrayLike | slice) -> "Frames":
        """The frames with these numbers (ascending), counted from 0."""
        chosen = numbers if isinstance(numbers, slice) else np.asarray(numbers)
        return replace(self, times=self.times[chosen], stamps=self.stamps[chosen], keys=self.keys[chosen])


def even(count: int, fps: float, height: int, width: int) -> Frames:
    """Frames at a constant rate that are found by their numbers."""
    numbers = np.arange(count)
    return Frames(height, width, fps, numbers / fps, numbers, np.zeros_like(numbers), has_stamps=False)


def probe(container: Any) -> Frames:
    """All frames of an opened file. Reads its packets and decodes the first frame, which tells the orientation.

    Where no frame is shown more than 0.05 s (or half a frame) from where the rate in the header puts it, the times are
    exact multiples of that rate.

    Raises:
        ValueError: it has no frames, or ends before its last frame. PyAV's errors: it is not a video.
    """
    stream, first, shown, count, is_cut = _video_stream(container), None, [], 0, False
    for packet in container.demux(stream):
        if packet.size:
            count, is_cut = count + 1, packet.is_corrupt
            if not packet.is_discard:
                shown.append((packet.pts, packet.is_keyframe))
        if first is None and not packet.is_corrupt:
            first = next(iter(packet.decode()), None)
    if "mp4" in _formats(container):  # elsewhere the index has only some of the frames
        is_cut |= count < sum(entry.size > 0 for entry in stream.index_entries)
    if is_cut:
        raise ValueError(f"the file is cut off; it ends after {count} frames")
    if first is None or not shown:
        raise ValueError("it has no frames; it may be cut off")
    height, width = (first.width, first.height) if _is_transposed(_matrix(first)) else (first.height, first.width)
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    found = [pts for pts, _ in shown]
    if (
        first.pts not in found
        or None in found
        or _is_disordered(np.array(found))
        or _is_reordered_avi(container, stream)
    ):
        if not rate:
            raise ValueError("it has neither time stamps nor a rate")
        return even(len(shown), rate, height, width)
    stamps = np.sort(found)
    stamps = stamps[stamps >= first.pts]  # a recording may begin with frames that cannot be decoded
    starts = np.sort([first.pts, *(pts for pts, is_key in shown if is_key and pts > first.pts)])
    keys = starts[np.searchsorted(starts, stamps, side="right") - 1]
    times = (stamps - stamps[0]) * float(stream.time_base)
    regular = np.arange(len(times)) / (rate or 1.0)
    if np.abs(times - regular).max() <= min(_WRITTEN, 0.5 / rate if rate else 0):
        return Frames(height, width, rate, regular, stamps, keys, has_stamps=True)
    fps = (len(times) - 1) / times[-1] if times[-1] else rate or 1.0
    return Frames(height, width, fps, times, stamps, keys, has_stamps=True)


def decode(container: Any, frames: Frames, may_seek: bool) -> Iterator[Any]:
    """Decode some frames of an opened file, each when it is asked for.

    Args:
        container: the file, from which nothing has been read.
        frames: the wanted frames.
        may_seek: whether frames between two key frames may be skipped. Then the result may end early, where the file
            cannot be read from the place to which it was wound.

    Yields:
        PyAV's frames, one for each wanted one.

    Raises:
        ValueError: a frame is missing. PyAV's errors: the file is damaged.
    """
    stream = _video_stream(container)
    tick = float(stream.time_base) if frames.has_stamps else 1 / frames.fps
    interval = 1 / (frames.fps * tick)  # between two frames on average, in the unit of stamps
    may_seek = may_seek and frames.has_stamps and not _SEEKABLE.isdisjoint(_formats(container))
    source, place = _decoded(container, stream, frames.has_stamps), stream.start_time or 0
    shown: Any = None  # the last decoded frame that is due: (stamp, frame)
    upcoming: Any = None  # the one after it, if it had to be decoded to know that it is not due yet
    for time, stamp, key in zip(frames.times, frames.stamps.tolist(), frames.keys.tolist(), strict=True):
        is_wound = may_seek and key - place > _FAR * interval
        if is_wound:
            shown = upcoming = None
            container.seek(key, stream=stream)
            source = _decoded(container, stream, frames.has_stamps)
        while shown is None or shown[0] < stamp:
            upcoming = upcoming or next(source, None)
            if upcoming is None or upcoming[0] > stamp:
                break
            shown, upcoming = upcoming, None
            place = shown[0]
        if shown is None and is_wound:
            return
        if shown is None or stamp - shown[0] > _HIDDEN * interval:
            raise ValueError(f"the frame at {time:.2f} s cannot be decoded; the file is damaged")
        yield shown[1]


def upright(pixels: np.ndarray, frame: Any) -> np.ndarray:
    """The pixels [height, width, 3] of a frame, turned and mirrored as its display matrix says. May be a view."""
    matrix = _matrix(frame)
    if matrix is None:
        return pixels
    x, y = int(matrix[0, 0]), int(matrix[1, 1])  # how the displayed x and y grow with the stored x and y
    if _is_transposed(matrix):
        pixels = pixels.swapaxes(0, 1)
        x, y = int(matrix[1, 0]), int(matrix[0, 1])
    return pixels[:: -1 if y < 0 else 1, :: -1 if x < 0 else 1]


def _matrix(frame: Any) -> np.ndarray | None:
    """The display matrix, int32 [3, 3], by which (x, y, 1) is multiplied from the left; None if there is none."""
    from av.sidedata.sidedata import Type

    found = frame.side_data.get(Type.DISPLAYMATRIX)
    return None if found is None else np.frombuffer(bytes(found), dtype=np.int32).reshape(3, 3)


def _is_transposed(matrix: np.ndarray | None) -> bool:
    """Whether height and width are swapped."""
    return matrix is not None and abs(int(matrix[0, 1])) > abs(int(matrix[0, 0]))


def _is_disordered(stamps: np.ndarray) -> bool:
    """Whether time stamps, in the order of the file, say nothing: they jump back, or are all the same."""
    order = np.argsort(stamps, kind="stable")
    is_one_moment = len(stamps) > 1 and stamps.min() == stamps.max()
    return bool(is_one_moment or np.abs(order - np.arange(len(stamps))).max() > _MAX_REORDERED)


def _is_reordered_avi(container: Any, stream: Any) -> bool:
    """Whether an AVI file stores frames out of order: it has no time stamps, and FFmpeg's own are wrong."""
    return "avi" in _formats(container) and bool(stream.codec_context.has_b_frames)


def _decoded(container: Any, stream: Any, has_stamps: bool) -> Iterator[tuple[int, Any]]:
    for number, frame in enumerate(container.decode(stream)):
        stamp = frame.pts if has_stamps else number
        if stamp is not None:
            yield stamp, frame


def _video_stream(container: Any) -> Any:
    """The first stream that is not the picture of a cover."""
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    kinds = {stream.type for stream in container.streams}
    hint = "; it may be cut off" if not kinds or "data" in kinds else ""  # a stream without a known kind is "data"
    raise ValueError(f"it has no video stream{hint}")


def _formats(container: Any) -> set[str]:
    return set(container.format.name.split(","))
