"""A picture of what a record names, to look at: the picture itself, or the middle frame of a video."""

from functools import partial
from typing import Any

from PIL import Image

from megavlm.media.access import MediaAccess
from megavlm.media.files import File, Find
from megavlm.sources.inline import MARK
from megavlm.sources.jsonl import JsonlFile
from megavlm.sources.shards import VIDEOS, find_in_shard
from megavlm.sources.table import SUFFIXES, TableFile


def preview(named: Any, is_video: bool, find: Find, source: str) -> Image.Image:
    """The picture, or the middle frame of the video, that a record names. Raises UserError if it cannot be read."""
    from megavlm.media.pictures import find_picture  # here, because they import torch: most pages show no picture
    from megavlm.media.videos import find_video

    if is_video:
        video = find_video(named, find, source, sampled_fps=1.0)
        frames = video.probe()
        pixels = next(video.pixels(frames.take([len(frames) // 2])))
    else:
        pixels = find_picture(named, find, source).pixels()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def looks_like_video(named: Any) -> bool:
    """Whether an entry of a record's media is a video: a list of frames, or a file with the ending of a video."""
    return not isinstance(named, str) or named.rpartition(".")[2].lower() in VIDEOS


def media_of(sample: str, access: MediaAccess) -> Find:
    """The function that locates the media of a sample, which is named as in messages: "file:line" or "shard:number".

    Raises UserError if the sample is in a shard that cannot be read.
    """
    file, _, number = sample.rpartition(":")
    if file.endswith(".tar") and number.isdecimal():
        return find_in_shard(file, int(number) - 1, sample, access)
    return partial(_find, file, number, sample, access)


def _find(file: str, number: str, sample: str, access: MediaAccess, named: str) -> File:
    """A file beside the data file, or, for the name of a picture inside the sample, this picture."""
    if not named.startswith(MARK):
        return access.find(file, sample, named)
    samples = TableFile(file, access) if file.endswith(SUFFIXES) else JsonlFile(file, access)
    return samples.read(samples.index_of(int(number)))[1](named)
