"""The processor of the Hugging Face folder: the sizes of processed media, the text of videos, and pixels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as resized_picture
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resized_video
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json
from megavlm.base.quoting import quoted, shortened
from megavlm.config.data_sections import DataSettings
from megavlm.data.limits import apply_limits, load_processor
from megavlm.media.frames import Frames
from megavlm.media.pictures import Picture
from megavlm.media.videos import Video

# The arguments with which a processor returns resized images patch by patch, as bytes, each once.
_AS_BYTES: dict[str, Any] = {
    "do_rescale": False, "do_normalize": False, "temporal_patch_size": 1, "return_tensors": "pt",
}  # fmt: skip


@dataclass
class Still:
    """A picture, its size (height, width) in pixels, and its grid (1, h, w) of patches after processing."""

    picture: Picture
    size: tuple[int, int]
    grid: tuple[int, int, int]


@dataclass
class Clip:
    """A video, the frames that are sampled from it, and their grid (t, h, w) of patches after processing."""

    video: Video
    frames: Frames
    grid: tuple[int, int, int]


def limits_of(media: list[Still | Clip]) -> str:
    """The settings that make these pictures and videos smaller, for messages.

    Not those for the number of frames: as the pixels of a video are bounded in total, fewer frames are larger ones.
    """
    names = ["data.max_pixels"] * any(isinstance(item, Still) for item in media)
    if any(isinstance(item, Clip) for item in media):
        names += ["data.video_max_pixels", "data.video_max_pixels_per_frame"]
    return " or ".join(names)


class VisionProcessor:
    """The operations of a ``Qwen3VLProcessor`` that the package uses.

    Args:
        hf_dir: folder with config.json, tokenizer and processor files.
        settings: the ``data`` section: max_image_megapixels, and the limits of pictures and videos (None: the folder's
            value).

    Raises:
        UserError: the folder has no Qwen3-VL processor, or the limits contradict each other.

    Attributes:
        pixel_width: number of bytes of a patch of one image: channels * patch * patch.
        pixel_scale: see ``Sample``.
    """

    def __init__(self, hf_dir: Path, settings: DataSettings):
        self.hf = load_processor(hf_dir)
        apply_limits(self.hf, settings)
        pictures = self.hf.image_processor
        self.merge = pictures.merge_size
        self._max_megapixels = settings.max_image_megapixels
        self.pixel_width = 3 * pictures.patch_size**2
        self.pixel_scale = _pixel_scale(hf_dir, self.hf)
        self.video_fps = self.hf.video_processor.fps
        config = _config(hf_dir / "config.json")
        self.grid_side = _grid_side(config, hf_dir / "config.json")
        _check_agreement(hf_dir, config, self.hf)

    def place_picture(self, picture: Picture) -> Still:
        """Compute the picture's grid from its header.

        Raises UserError if the file is missing, or the picture too large or too narrow.
        """
        height, width = size = picture.size()
        self._check_megapixels(f"{picture.source}: picture {picture.file}", height, width)
        processor = self.hf.image_processor
        try:
            height, width = resized_picture(
                height,
                width,
                factor=processor.patch_size * processor.merge_size,
                min_pixels=processor.size["shortest_edge"],
                max_pixels=processor.size["longest_edge"],
            )
        except ValueError as error:  # the longer side is more than 200 times the shorter one
            raise UserError(f"{picture.source}: picture {picture.file}: {shortened(error)}") from error
        return Still(picture, size, (1, height // processor.patch_size, width // processor.patch_size))

    def place_video(self, video: Video) -> Clip:
        """Compute the frames to sample and their grid from the header.

        The processor chooses the frames, from their number and mean rate. Raises UserError if the file is not a video,
        is cut off, has a single frame, or frames that are too large.
        """
        every = video.probe()
        self._check_megapixels(f"{video.source}: video {video.name}", every.height, every.width)
        if len(every) == 1:
            raise UserError(
                f"{video.source}: video {video.name} has a single frame",
                'save the frame as a picture and name it in "images", in place of the video',
            )
        processor = self.hf.video_processor
        about = VideoMetadata(total_num_frames=len(every), fps=every.fps, height=every.height, width=every.width)
        frames = every.take(processor.sample_frames(about))
        count, factor = len(frames), processor.patch_size * processor.merge_size
        most = processor.size["longest_edge"]
        if processor.cap_pixels_per_frame:  # the same computation as in the video processor's resize
            cap = min(processor.max_video_tokens * factor**2, most // count)
            most = max(cap, int(processor.size["shortest_edge"] * 1.05)) * count
        try:
            height, width = resized_video(
                count,
                frames.height,
                frames.width,
                temporal_factor=processor.temporal_patch_size,
                factor=factor,
                min_pixels=processor.size["shortest_edge"],
                max_pixels=most,
            )
        except ValueError as error:  # too few frames, or the longer side is more than 200 times the shorter one
            raise UserError(f"{video.source}: video {video.name}: {shortened(error)}") from error
        steps = -(-count // processor.temporal_patch_size)
        return Clip(video, frames, (steps, height // processor.patch_size, width // processor.patch_size))

    def _check_megapixels(self, what: str, height: int, width: int) -> None:
        if height * width > self._max_megapixels * 1e6:
            raise UserError(
                f"{what}: {width} x {height} pixels are {height * width / 1e6:.4g} million, more than "
                f"data.max_image_megapixels = {self._max_megapixels:g}",
                "raise data.max_image_megapixels if the memory suffices, or scale the file down",
            )

    def insert_media(self, text: str, stills: list[Still], clips: list[Clip]) -> tuple[str, list[dict]]:
        """Replace the placeholder of each picture and video by its text, with **one** placeholder token per frame.

        Returns the text and, in text order, the replacements: "type" ("image" or "video"), and "span" and "new_span"
        in characters. The processor itself writes the texts (a video's text has time stamps). It is given grids in
        which each frame is a single token; and the frames' times in place of their numbers, with a rate of 1, because
        it divides the one by the other.
        """
        one = self.merge  # patches per side of one visual token
        images = [self.hf.replace_image_token({"image_grid_thw": np.array([[1, one, one]])}, 0) for _ in stills]
        videos = []
        for clip in clips:
            times = clip.frames.times.tolist()
            about = VideoMetadata(total_num_frames=len(times), fps=1.0, frames_indices=times)
            grids = np.array([[clip.grid[0], one, one]])
            videos.append(self.hf.replace_video_token({"video_grid_thw": grids, "video_metadata": [about]}, 0))
        texts, replaced = self.hf.get_text_with_replacements([text], images, videos)
        return texts[0], replaced[0]

    def images_in_frame(self, item: Still | Clip) -> int:
        """The number of images in each frame of the item: 1 for a picture, which the processor would repeat."""
        return self.hf.video_processor.temporal_patch_size if isinstance(item, Clip) else 1

    def no_pixels(self, rows: int) -> torch.Tensor:
        """An uninitialised matrix for pixels, uint8 [rows, pixel_width]."""
        return torch.empty(rows, self.pixel_width, dtype=torch.uint8)

    def pixel_rows(self, item: Still | Clip, out: torch.Tensor | None = None) -> torch.Tensor:
        """Decode and resize the item, into `out` if given.

        The processor resizes 8-bit pixels to 8-bit pixels. It is called without the two things that it does afterwards
        and that take the eightfold space: normalising to float32, and repeating a picture for the frames of a step.

        Returns:
            uint8 [t * images_in_frame * h * w, pixel_width], see ``Sample.pixels``.

        Raises:
            UserError: the file cannot be read.
        """
        if isinstance(item, Clip):
            return self._clip_rows(item, out)
        done = self.hf.image_processor(images=[item.picture.pixels()], **_AS_BYTES)
        self._check_grid(done["image_grid_thw"], item.grid)
        return done["pixel_values"] if out is None else out.copy_(done["pixel_values"])

    def _clip_rows(self, clip: Clip, out: torch.Tensor | None) -> torch.Tensor:
        """As ``pixel_rows``. Frames are resized as they are decoded; at most one of them is in memory in full size.

        The processor resizes each frame for itself, so that the result is the same as for the whole video at once. But
        from a part of the video, it would compute another size.
        """
        processor = self.hf.video_processor
        steps, h, w = clip.grid
        size = SizeDict(height=h * processor.patch_size, width=w * processor.patch_size)
        rows = self.no_pixels(steps * processor.temporal_patch_size * h * w) if out is None else out
        parts, frames = rows.split(h * w), clip.video.pixels(clip.frames)
        for part in parts[: len(clip.frames)]:
            # In one expression: a name, or a loop over the frames, would keep one of them while the next is decoded.
            resized = BaseVideoProcessor.resize(processor, next(frames)[None], size, processor.resample)
            done = processor(videos=[resized], do_resize=False, do_sample_frames=False, **_AS_BYTES)
            self._check_grid(done["video_grid_thw"], (1, h, w))
            part.copy_(done["pixel_values_videos"])
        frames.close()
        for number in range(len(clip.frames), len(parts)):  # the last step is filled with its last image
            parts[number].copy_(parts[number - 1])
        return rows

    @staticmethod
    def _check_grid(grid: torch.Tensor, expected: tuple[int, int, int]) -> None:
        assert grid.tolist() == [list(expected)], "the grid computed from the header differs from the processor's"


def _config(file: Path) -> dict[str, Any]:
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {shortened(repr(error))}") from error


def _grid_side(config: dict[str, Any], file: Path) -> int:
    """Side of the vision tower's square grid of learned position embeddings."""
    try:
        return round(config["vision_config"]["num_position_embeddings"] ** 0.5)
    except (LookupError, TypeError) as error:
        raise UserError(
            f"{file}: vision_config.num_position_embeddings cannot be read: {shortened(repr(error))}"
        ) from error


def _check_agreement(folder: Path, config: dict[str, Any], hf: Any) -> None:
    """Raises a UserError if config.json and the processor disagree on tokens or patches; fields may be missing.

    The model would take other tokens for pictures than the processor writes, or cut pictures into other patches.
    """
    vision, pictures, videos = config["vision_config"], hf.image_processor, hf.video_processor
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    pairs = [(name, config.get(name), getattr(hf, name)) for name in names]
    for part in (pictures, videos):
        pairs += [
            ("vision_config.patch_size", vision.get("patch_size"), part.patch_size),
            ("vision_config.spatial_merge_size", vision.get("spatial_merge_size"), part.merge_size),
            ("vision_config.temporal_patch_size", vision.get("temporal_patch_size"), part.temporal_patch_size),
        ]
    for name, ours, theirs in pairs:
        if ours is not None and ours != theirs:
            raise UserError(
                f"{folder}: {name} is {quoted(ours)} in config.json, but the processor's files have {quoted(theirs)}",
                "take all files of the folder from one model: config.json, the tokenizer and the processor belong "
                "together",
            )


def _pixel_scale(folder: Path, hf: Any) -> torch.Tensor:
    """``Sample.pixel_scale`` of the folder. It is tried on all 256 values of each channel: the result is the same bits.

    Raises UserError if the processor does anything else with resized pixels, or not the same in pictures and videos.
    """
    ramp = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    scales = []
    for part in (hf.image_processor, hf.video_processor):
        constants = part.image_mean, part.image_std
        scale = torch.tensor(constants, dtype=torch.float32) * (1.0 / part.rescale_factor)
        own = part.rescale_and_normalize(
            ramp.clone(), part.do_rescale, part.rescale_factor, part.do_normalize, *constants
        )
        scales.append(scale)
        ours = (ramp.float() - scale[0, :, None, None]) / scale[1, :, None, None]
        if not (torch.equal(own, ours) and torch.equal(scale, scales[0])):
            raise UserError(
                f"{folder}: its processor does not normalise pictures and videos as that of Qwen3-VL does",
                "copy the processor files of the released model into it",
            )
    return scales[0]
