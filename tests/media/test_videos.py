"""Clips that are turned, long, broken or no clips: their frames, times, sizes and pixel rows.

Every frame shows its own number in black and white fields, so that a test sees which frame it has got.
"""

import re
import weakref
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from transformers import AutoProcessor, Qwen3VLVideoProcessor

from megavlm.base.errors import UserError
from megavlm.config.settings import DataSettings
from megavlm.data.processor import VisionProcessor, limits_of
from megavlm.media import frames as frames_module
from megavlm.media.files import File
from megavlm.media.videos import Video, find_video

WIDTH, HEIGHT, FIELDS = 96, 64, 8
EVERY_THIRD = [int(i * 1000 / 3) + (i % 3) * 7 for i in range(30)]  # milliseconds; as browsers and screens record
BURSTS = [50 * i for i in range(10)] + [8000 + 50 * i for i in range(10)]  # as phones do when nothing moves


def numbered(number, width=WIDTH, height=HEIGHT):
    """A frame whose upper half has a field for each binary digit of its number; its lower half is grey."""
    picture = np.full((height, width, 3), 128, np.uint8)
    for digit in range(FIELDS):
        picture[: height // 2, digit * width // FIELDS : (digit + 1) * width // FIELDS] = 255 * (number >> digit & 1)
    return picture


def number_of(pixels):
    """The number that a frame [3, height, width] shows."""
    height, width = pixels.shape[1:]
    centres = [(2 * digit + 1) * width // (2 * FIELDS) for digit in range(FIELDS)]
    return sum(int(pixels[:, height // 4, centre].float().mean() > 127) << d for d, centre in enumerate(centres))


def clip(path, codec, count=20, rate=10, times=None, turn=None, size=(WIDTH, HEIGHT), options=(), muxer=()):
    """Write a clip; `times` are milliseconds, `turn` the arguments of PyAV's set_display_rotation."""
    with av.open(str(path), "w", options=dict(muxer)) as container:
        stream = container.add_stream(codec, rate=Fraction(rate), options=dict(options))
        stream.width, stream.height = size
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        if turn:
            stream.set_display_rotation(turn[0], hflip=turn[1])
        container.start_encoding()
        for number in range(len(times) if times else count):
            frame = av.VideoFrame.from_ndarray(numbered(number, *size), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Video(File(str(path)), [], None, "here:1")


def test_a_packet_without_a_picture_shows_the_frame_before(tmp_path):
    """VP8 stores frames that are not shown and only referred to; here frames 7 and 19 are marked as such."""
    clip(tmp_path / "shown.webm", "libvpx")
    with av.open(str(tmp_path / "shown.webm")) as source, av.open(str(tmp_path / "a.webm"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                content = bytearray(bytes(packet))
                content[0] &= ~0x10 if number in (7, 19) else 0xFF  # the format's flag show_frame
                copy = av.Packet(bytes(content))
                copy.stream, copy.time_base, copy.pts, copy.dts = stream, packet.time_base, packet.pts, packet.dts
                copy.is_keyframe = packet.is_keyframe
                out.mux(copy)
    video = Video(File(str(tmp_path / "a.webm")), [], None, "here:1")
    shown = [number_of(pixels) for pixels in video.pixels(video.probe())]
    assert shown == [*range(7), 6, *range(8, 19), 18]


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_turned_clip_is_seen_as_players_show_it(tmp_path, degrees, mirrored):
    turned = clip(tmp_path / "turned.mp4", "libx264", count=3, turn=(degrees, mirrored))
    coded = clip(tmp_path / "coded.mp4", "libx264", count=3)
    frames = turned.probe()
    pixels = list(turned.pixels(frames))
    for ours, stored in zip(pixels, coded.pixels(coded.probe()), strict=True):
        expected = np.rot90(stored.permute(1, 2, 0).numpy(), degrees // 90)  # numpy also turns counterclockwise
        assert np.array_equal(ours.permute(1, 2, 0).numpy(), expected[:, ::-1] if mirrored else expected)
        assert ours.shape[1:] == (frames.height, frames.width)


def test_a_phones_matrix_turns_clockwise(tmp_path):
    """The matrix that phones write for an upright recording is the one for 90 degrees clockwise."""
    path = tmp_path / "phone.mp4"
    clip(path, "libx264", count=2)
    content, one = bytearray(path.read_bytes()), 1 << 16
    place = content.find(b"tkhd") + 44
    content[place : place + 36] = np.array([0, one, 0, -one, 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(content)
    video = Video(File(str(path)), [], None, "here:1")
    frames = video.probe()
    assert (frames.height, frames.width) == (WIDTH, HEIGHT)
    _, second = video.pixels(frames)  # shows the number 1: its first field is white, the others are black
    fields = second[:, :, 3 * HEIGHT // 4].float().mean(0)  # the upper half, turned clockwise, is on the right
    assert fields[: WIDTH // FIELDS - 2].mean() > 200
    assert fields[WIDTH // FIELDS + 2 :].mean() < 50


@pytest.fixture(scope="module")
def long_clips(tmp_path_factory):
    """200 frames with a key frame every 20, in each container that can be wound."""
    folder, made = tmp_path_factory.mktemp("long"), {"g": "20"}
    return {
        "mp4": clip(folder / "a.mp4", "libx264", 200, options=made | {"bf": "2"}),
        "webm": clip(folder / "a.webm", "libvpx", 200, options=made | {"keyint_min": "20"}),
        "mkv": clip(folder / "a.mkv", "libx264", 200, options=made),
        "avi": clip(folder / "a.avi", "mpeg4", 200, options=made),
    }


@pytest.mark.parametrize("container", ["mp4", "webm", "mkv", "avi"])
def test_what_lies_between_far_frames_is_not_decoded(long_clips, container, monkeypatch):
    video, decoded = long_clips[container], []

    def counting(*arguments, inner=frames_module._decoded):
        for stamp, frame in inner(*arguments):
            decoded.append(stamp)
            yield stamp, frame

    every = video.probe()
    in_order = list(video.pixels(every))
    monkeypatch.setattr(frames_module, "_decoded", counting)
    wanted = [0, 66, 133, 199]
    for pixels, number in zip(video.pixels(every.take(wanted)), wanted, strict=True):
        assert torch.equal(pixels, in_order[number])
    assert len(decoded) < 100
    decoded.clear()
    assert torch.equal(next(video.pixels(every.take([133]))), in_order[133])
    assert len(decoded) < 40


def test_a_file_that_cannot_be_wound_is_read_from_its_beginning(long_clips):
    """Here the key frames are said to be where they are not, behind the frames that need them."""
    video = long_clips["mp4"]
    wanted = video.probe().take([0, 66, 133, 199])
    wrong = replace(wanted, keys=wanted.stamps + 40 * (wanted.stamps[1] - wanted.stamps[0]) // 66)
    assert [number_of(pixels) for pixels in video.pixels(wrong)] == [0, 66, 133, 199]


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({}, {}),
        ({"video_max_pixels": 60_000}, {"longest_edge": 60_000}),
        ({"video_min_pixels": 800_000}, {"shortest_edge": 800_000}),
        (
            {"video_min_pixels": 1024, "video_max_pixels_per_frame": 5_000},
            {"shortest_edge": 1024, "cap_pixels_per_frame": True, "max_video_tokens": 4},
        ),
    ],
)
@pytest.mark.parametrize("turn", [None, (90, False)])
def test_pixel_rows_are_those_of_the_whole_clip_at_once(model_folder, tmp_path, settings, theirs, turn):
    vision = VisionProcessor(model_folder, DataSettings(video_fps=5.0, **settings))
    video = clip(tmp_path / "a.mp4", "libx264", count=14, turn=turn, size=(200, 150))
    placed = vision.place_video(video)
    assert len(placed.frames) == 7  # not divisible by the two frames of a patch
    folder = dict(AutoProcessor.from_pretrained(model_folder).video_processor.size)
    size = {name: theirs.get(name, folder[name]) for name in ("shortest_edge", "longest_edge")}
    processor = Qwen3VLVideoProcessor(
        **{"cap_pixels_per_frame": False} | {name: value for name, value in theirs.items() if name not in size},
        **{"size": size, "patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    )
    whole = torch.stack(list(video.pixels(placed.frames)))
    expected = processor(videos=[whole], do_sample_frames=False, return_tensors="pt")
    assert [list(placed.grid)] == expected["video_grid_thw"].tolist()
    (steps, h, w), rows = placed.grid, vision.pixel_rows(placed)
    images = rows.view(steps, 2, h * w, 3, -1).permute(0, 2, 3, 1, 4).reshape(steps * h * w, -1)
    assert torch.equal((images.float() - 127.5) / 127.5, expected["pixel_values_videos"])
    if not theirs:
        return
    usual = VisionProcessor(model_folder, DataSettings(video_fps=5.0)).place_video(video).grid
    assert (np.prod(placed.grid) > np.prod(usual)) == ("video_min_pixels" in settings and len(settings) == 1)
    assert placed.grid != usual


def test_frames_are_resized_one_by_one_into_the_row(model_folder, tmp_path):
    alive, most = [], 0

    class Watched(Video):
        def pixels(self, frames):
            nonlocal most
            for pixels in super().pixels(frames):
                alive.append(weakref.ref(pixels))
                most = max(most, sum(ref() is not None for ref in alive))
                yield pixels
                del pixels

    video = clip(tmp_path / "a.mp4", "libx264", count=40, rate=2, size=(320, 240))
    vision = VisionProcessor(model_folder, DataSettings(video_max_pixels=40 * 64 * 64))
    placed = vision.place_video(Watched(video.file, [], None, "here:1"))
    rows = vision.no_pixels(2 * int(np.prod(placed.grid)))
    assert vision.pixel_rows(placed, rows).data_ptr() == rows.data_ptr()
    assert len(alive) == 40
    assert most == 1  # and PyAV's own copy of it
    assert torch.equal(rows, vision.pixel_rows(placed))


@pytest.mark.parametrize("times", [EVERY_THIRD, BURSTS, None], ids=["screen", "phone", "even"])
def test_the_text_tells_when_frames_are_shown(renderer, tmp_path, times):
    """Each pair of frames has the mean of its times; the processor's rule chooses the frames."""
    video = clip(tmp_path / "a.mkv", "libx264", count=60, rate=30, times=times)
    shown = np.array([time / 1000 for time in times] if times else [number / 30 for number in range(60)])
    mean_rate = (len(shown) - 1) / shown[-1]
    count = min(max(int(len(shown) / mean_rate * 2), 4), len(shown))
    chosen = shown[np.linspace(0, len(shown) - 1, count).round().astype(int)]
    chosen = np.append(chosen, chosen[-1:]) if count % 2 else chosen
    expected = [f"<{(first + second) / 2:.1f} seconds>" for first, second in chosen.reshape(-1, 2)]
    record = {"messages": [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "!"}]}
    draft = renderer.draft(record | {"videos": ["a.mkv"]}, lambda _: video.file, "here:1", kind="tune")
    told = re.findall(r"<[\d.]+ seconds>", renderer.tokenizer.decode(draft.token_ids))
    assert told == expected


def audio(path, cover=False):
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=48000)
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
            picture.disposition = Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux([*sound.encode(frame), *sound.encode()])
        if cover:
            container.mux(picture.encode(av.VideoFrame.from_ndarray(numbered(1), format="rgb24")))
            container.mux(picture.encode())


def cut(path, share, **more):
    clip(path, more.pop("codec", "libx264"), **more)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


BROKEN = {
    "sound alone": ("a.mp4", audio, "it has no video stream"),
    "sound with a cover": ("a.mp4", lambda path: audio(path, cover=True), "it has no video stream"),
    "no frame": ("a.avi", lambda path: clip(path, "mpeg4", count=0), "it has no frames"),
    "nothing": ("a.mp4", lambda path: path.write_bytes(b""), "Invalid data"),
    "text": ("a.mp4", lambda path: path.write_text("A clip.\n" * 100), "Invalid data"),
    "header cut off": ("a.mp4", lambda path: cut(path, 0.6), "may be cut off|Invalid data"),
    "end cut off": (
        "a.mp4",
        lambda path: cut(path, 0.6, muxer={"movflags": "faststart"}),
        r"cut off; it ends after \d+",
    ),
    "one frame": ("a.mp4", lambda path: clip(path, "libx264", count=1), "has a single frame"),
    "missing": ("b.mp4", lambda path: None, "does not exist"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_clip_is_refused_with_its_name_and_the_cause(model_folder, tmp_path, name):
    file, make, cause = BROKEN[name]
    make(tmp_path / file)
    vision = VisionProcessor(model_folder, DataSettings())
    with pytest.raises(UserError, match=cause) as error:
        vision.place_video(find_video(file, lambda named: File(str(tmp_path / named)), "here:1", 2.0))
    assert f"here:1: video {tmp_path / file} " in str(error.value)


def test_the_rest_of_a_recording_that_broke_off_is_used(tmp_path):
    """WebM says nowhere how many frames there are."""
    cut(tmp_path / "a.webm", 0.6, codec="libvpx", rate=5, count=30)
    video = Video(File(str(tmp_path / "a.webm")), [], None, "here:1")
    frames = video.probe()
    assert 5 < len(frames) < 25
    assert frames.times.tolist() == [number / 5 for number in range(len(frames))]
    assert [number_of(pixels) for pixels in video.pixels(frames)] == list(range(len(frames)))


def test_damage_that_only_decoding_finds_is_named(tmp_path):
    video = clip(tmp_path / "a.mkv", "libx264", count=60, options={"g": "10"})
    content = bytearray((tmp_path / "a.mkv").read_bytes())
    frames = video.probe()
    middle = len(content) // 2
    content[middle : middle + 1500] = bytes(1500)
    (tmp_path / "a.mkv").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.mkv cannot be read"):
        list(video.pixels(frames))


def test_a_clip_too_long_for_its_row_names_limits_that_shorten_it(make_renderer, tmp_path):
    video = clip(tmp_path / "a.mp4", "libx264", count=40, rate=5, size=(640, 480))
    record = {"messages": [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "!"}]}
    draft_of = lambda **settings: make_renderer(**settings).draft(
        record | {"videos": ["a.mp4"]}, lambda _: video.file, "here:1", kind="tune"
    )
    with pytest.raises(
        UserError, match=r"lower data\.video_max_pixels or data\.video_max_pixels_per_frame, or"
    ) as error:
        draft_of(seq_length=256)
    assert "data.max_pixels" not in str(error.value)
    assert draft_of(seq_length=256, video_max_pixels=16 * 64 * 64).length <= 256
    assert draft_of(seq_length=256, video_max_pixels_per_frame=64 * 64, video_min_pixels=1024).length <= 256
    assert limits_of([]) == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"video_max_pixels": 100}, "pixels for all frames of a video together is larger than the maximum of 100"),
        ({"video_max_pixels_per_frame": 2000}, "lower data.video_min_pixels"),
        ({"video_max_pixels_per_frame": 1000, "video_min_pixels": 1}, "1024 pixels in any case"),
    ],
)
def test_limits_that_would_be_ignored_are_refused(model_folder, settings, message):
    with pytest.raises(UserError, match=message):
        VisionProcessor(model_folder, DataSettings(**settings))
