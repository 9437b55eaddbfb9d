"""Clips of every container that PyAV writes, at even and uneven rates: their frames, times and sizes."""

from fractions import Fraction

import pytest
from test_videos import BURSTS, EVERY_THIRD, HEIGHT, WIDTH, clip, number_of

NTSC = Fraction(30000, 1001)
CLIPS = {
    "mp4": ("a.mp4", "libx264", {}),
    "mp4 in fragments": ("a.mp4", "libx264", {"muxer": {"movflags": "frag_keyframe"}, "options": {"g": "6"}}),
    "mov": ("a.mov", "mpeg4", {"rate": NTSC}),
    "webm vp8": ("a.webm", "libvpx", {"rate": 24}),
    "webm vp9": ("a.webm", "libvpx-vp9", {"rate": NTSC}),
    "mkv": ("a.mkv", "libx264", {"rate": Fraction(25, 2)}),
    "avi": ("a.avi", "mpeg4", {}),
    "avi of pictures": ("a.avi", "mjpeg", {"rate": 3}),
    "avi with reordered frames": ("a.avi", "mpeg4", {"options": {"bf": "2"}}),
    "transport stream": ("a.ts", "mpeg2video", {"rate": 25}),
    "mpeg": ("a.mpg", "mpeg2video", {"rate": 25}),
    "mxf": ("a.mxf", "mpeg2video", {"rate": 25}),
    "flv": ("a.flv", "flv", {"rate": 25}),
    "wmv": ("a.wmv", "wmv2", {"rate": 25}),
    "3gp": ("a.3gp", "mpeg4", {}),
    "nut": ("a.nut", "ffv1", {}),
    "ivf": ("a.ivf", "libvpx", {}),
    "y4m": ("a.y4m", "rawvideo", {}),
    "mp4 hevc with reordered frames": ("a.mp4", "libx265", {"rate": 24}),
    "mp4 av1": ("a.mp4", "libsvtav1", {}),
    "h264 without a container": ("a.h264", "libx264", {"rate": 25}),
    "gif": ("a.gif", "gif", {}),
    "browser, said to have 1000 frames a second": ("a.webm", "libvpx", {"rate": 1000, "times": EVERY_THIRD}),
    "browser, said to have 30": ("a.webm", "libvpx-vp9", {"rate": 30, "times": EVERY_THIRD}),
    "screen": ("a.mkv", "libx264", {"rate": 30, "times": EVERY_THIRD}),
    "phone": ("a.mp4", "libx264", {"rate": 20, "times": BURSTS}),
    "gif with pauses": ("a.gif", "gif", {"rate": 100, "times": [0, 100, 200, 1000, 1100, 3000]}),
    "two frames": ("a.mp4", "libx264", {"count": 2, "rate": 1}),
}


@pytest.mark.parametrize("name", CLIPS)
def test_frames_times_and_size(tmp_path, name):
    file, codec, more = CLIPS[name]
    video = clip(tmp_path / file, codec, **more)
    frames = video.probe()
    if "times" in more:
        expected = [time / 1000 for time in more["times"]]
    else:
        expected = [float(number / more.get("rate", 10)) for number in range(more.get("count", 20))]
    assert (frames.height, frames.width, len(frames)) == (HEIGHT, WIDTH, len(expected))
    assert frames.times == pytest.approx(expected, abs=0.0051 if codec == "gif" else 0.0011)  # units of the containers
    assert frames.fps == pytest.approx((len(expected) - 1) / expected[-1], rel=0.01)
    assert [number_of(pixels) for pixels in video.pixels(frames)] == list(range(len(expected)))
    some = [0, len(expected) // 3, len(expected) - 1, len(expected) - 1]
    assert [number_of(pixels) for pixels in video.pixels(frames.take(some))] == some
