"""Clips whose end is missing, as after a full disk or a broken download: refused for a true cause, or used as they are.

Each clip is cut at many lengths. What can still be used must be what PyAV decodes of the rest, at its own time stamps.
"""

import json
import re

import av
import numpy as np
import pytest
import torch
from test_videos import EVERY_THIRD, clip, number_of

from megavlm.base.errors import UserError
from megavlm.config.settings import DataSettings
from megavlm.data.loader import build_loader
from megavlm.data.renderer import Renderer
from megavlm.media.files import File
from megavlm.media.videos import Video

COUNT = 24
FRAGMENTS = {"muxer": {"movflags": "frag_keyframe"}, "options": {"g": "6"}}
INDEX_FIRST = {"muxer": {"movflags": "faststart"}}
# name: file, codec, more arguments of ``clip``, whether some of the cut files are used
CLIPS = {
    "webm vp8": ("a.webm", "libvpx", {}, True),
    "webm vp9": ("a.webm", "libvpx-vp9", {}, True),
    "webm of a live stream": ("a.webm", "libvpx", {"muxer": {"live": "1"}}, True),
    "webm of a browser": ("a.webm", "libvpx", {"rate": 1000, "times": EVERY_THIRD}, True),
    "mkv": ("a.mkv", "mpeg4", {}, True),
    "mkv with reordered frames": ("a.mkv", "libx264", {"options": {"bf": "3", "g": "12"}}, True),
    "mkv of a screen": ("a.mkv", "libx264", {"rate": 30, "times": EVERY_THIRD}, True),
    "mkv with its index first": ("a.mkv", "mpeg4", {"muxer": {"reserve_index_space": "500"}}, True),
    "mp4": ("a.mp4", "libx264", {}, False),
    "mp4 with its index first": ("a.mp4", "libx264", INDEX_FIRST, False),
    "mp4 in fragments": ("a.mp4", "libx264", FRAGMENTS, True),
    "mov": ("a.mov", "mpeg4", {}, False),
    "mov with its index first": ("a.mov", "mpeg4", INDEX_FIRST, False),
    "avi": ("a.avi", "mpeg4", {}, True),
    "avi with reordered frames": ("a.avi", "libx264", {"options": {"bf": "2"}}, False),
}
# Each says that the end is missing, or may be.
CAUSES = (
    r"the file is cut off; it ends after \d+ frames|it has no (frames|video stream); it may be cut off|"
    r"it is cut off, damaged, or no video \(.+\)"
)


def decoded_by_pyav(path):
    """(seconds since the first frame, pixels) of all frames, in the order in which PyAV gives them."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    pixels = [torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1) for frame in frames]
    return np.array([float((frame.pts - frames[0].pts) * frame.time_base) for frame in frames]), pixels


@pytest.mark.parametrize("name", CLIPS)
def test_a_cut_clip_is_refused_for_its_cause_or_used_as_far_as_it_goes(tmp_path, name):
    file, codec, more, is_used = CLIPS[name]
    path = tmp_path / file
    clip(path, codec, **{"count": COUNT} | more)
    content, (_, whole) = path.read_bytes(), decoded_by_pyav(path)
    lengths = [len(content) * share // 25 for share in range(1, 25)]
    used, refused = [], []
    for length in sorted([*lengths, *(len(content) - missing for missing in (400, 100, 20, 4, 1))]):
        path.write_bytes(content[:length])
        video = Video(File(str(path)), [], None, "here:1")
        try:
            frames = video.probe()
            pixels = list(video.pixels(frames))
        except UserError as error:
            refused.append(str(error))
            continue
        times, expected = decoded_by_pyav(path)
        if file == "a.avi":  # it has no time stamps, and those that FFmpeg makes up for reordered frames are wrong
            times = np.arange(len(expected)) / 10
        assert frames.times == pytest.approx(times, abs=0.0011)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(pixels, expected, strict=True))
        assert all(any(torch.equal(ours, undamaged) for undamaged in whole) for ours in pixels)
        used.append(len(frames))
    begin = re.escape(f"here:1: video {path} cannot be read: ")
    assert refused
    assert all(re.fullmatch(f"{begin}({CAUSES})", message) for message in refused), refused
    assert used == sorted(used)
    assert any(count < len(whole) for count in used) == is_used  # a file without its last bytes may have lost no frame


def test_reordered_frames_of_an_avi_file_come_in_order(tmp_path):
    """FFmpeg makes up time stamps for H.264 in AVI, by which frames would be repeated and left out."""
    video = clip(tmp_path / "a.avi", "libx264", options={"bf": "2"})
    frames = video.probe()
    assert [number_of(pixels) for pixels in video.pixels(frames)] == list(range(20))
    assert [number_of(pixels) for pixels in video.pixels(frames.take([2, 3, 11]))] == [2, 3, 11]
    assert frames.times.tolist() == [number / 10 for number in range(20)]


def test_a_cut_clip_is_a_skipped_sample_of_training(model_folder, tmp_path):
    """Of four clips, the two that are cut are counted with their causes; the others are trained on."""
    shares = {"whole.webm": 1.0, "rest.webm": 0.7, "no_index.mp4": 0.7, "no_head.mkv": 0.01}
    for name, share in shares.items():
        clip(tmp_path / name, "libvpx" if name.endswith("webm") else "mpeg4", count=COUNT, rate=5)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(share * len(content))])
    turns = [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "!"}]
    records = [{"messages": turns, "videos": [name]} for name in shares]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = DataSettings(train=[{"path": tmp_path / "data.jsonl"}], seq_length=512, workers=0, packing="none")
    loader = build_loader(settings, Renderer(model_folder, settings), "tune", dp_rank=0, dp_size=1, seed=0)
    rows = [next(loader) for _ in range(3)]
    loader.close()
    read = {source.rpartition(":")[2] for row in rows for source in row.sources}
    assert read == {"1", "2"}
    skipped = {f.sample.rpartition(":")[2]: f.cause for row in rows for f in row.skipped_samples}
    assert sorted(skipped) == ["3", "4"]
    assert all(re.search(f"cannot be read: ({CAUSES})", cause) for cause in skipped.values()), skipped
