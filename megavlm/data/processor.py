"""The processor of the Hugging Face folder: pixel limits, the sizes of processed media, and pixel rows."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoProcessor, Qwen3VLProcessor
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as resized_picture
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resized_video
from transformers.video_utils import VideoMetadata

from megavlm.base.errors import UserError
from megavlm.config.data_sections import DataSettings
from megavlm.media.pictures import Picture
from megavlm.media.videos import Video


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
    metadata: VideoMetadata
    grid: tuple[int, int, int]


class VisionProcessor:
    """The operations of a ``Qwen3VLProcessor`` that the package uses.

    Args:
        hf_dir: folder with config.json, tokenizer and processor files.
        settings: the ``data`` section: min_pixels, max_pixels, video_fps, video_max_frames (None: the folder's value).

    Raises:
        UserError: the folder has no Qwen3-VL processor, or the limits contradict each other.
    """

    def __init__(self, hf_dir: Path, settings: DataSettings):
        self.hf = _load(hf_dir)
        _apply_limits(self.hf, settings)
        pictures = self.hf.image_processor
        self.merge = pictures.merge_size
        self.patch_dim = 3 * pictures.temporal_patch_size * pictures.patch_size**2
        self.video_fps = self.hf.video_processor.fps
        self.grid_side = _grid_side(hf_dir / "config.json")

    def place_picture(self, picture: Picture) -> Still:
        """Compute the picture's grid from its header. Raises UserError if the file is missing or too narrow."""
        height, width = size = picture.size()
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
            raise UserError(f"{picture.source}: picture {picture.file}: {error}") from error
        return Still(picture, size, (1, height // processor.patch_size, width // processor.patch_size))

    def place_video(self, video: Video) -> Clip:
        """Compute the frames to sample and their grid from the header.

        Raises UserError if the file is not a video or has a single frame.
        """
        metadata = video.probe()
        processor = self.hf.video_processor
        metadata.frames_indices = processor.sample_frames(metadata)
        count, factor = len(metadata.frames_indices), processor.patch_size * processor.merge_size
        most = processor.size["longest_edge"]
        if processor.cap_pixels_per_frame:  # the same computation as in the video processor's resize
            cap = min(processor.max_video_tokens * factor**2, most // count)
            most = max(cap, int(processor.size["shortest_edge"] * 1.05)) * count
        try:
            height, width = resized_video(
                count,
                metadata.height,
                metadata.width,
                temporal_factor=processor.temporal_patch_size,
                factor=factor,
                min_pixels=processor.size["shortest_edge"],
                max_pixels=most,
            )
        except ValueError as error:  # a single frame, or the longer side is more than 200 times the shorter one
            raise UserError(f"{video.source}: video {video.name}: {error}") from error
        steps = -(-count // processor.temporal_patch_size)
        return Clip(video, metadata, (steps, height // processor.patch_size, width // processor.patch_size))

    def insert_media(self, text: str, stills: list[Still], clips: list[Clip]) -> tuple[str, list[dict]]:
        """Replace the placeholder of each picture and video by its text, with **one** placeholder token per frame.

        Returns the text and, in text order, the replacements: "type" ("image" or "video"), and "span" and "new_span"
        in characters. The processor itself writes the texts (a video's text has time stamps); it is given grids in
        which each frame is a single token.
        """
        one = self.merge  # patches per side of one visual token
        images = [self.hf.replace_image_token({"image_grid_thw": np.array([[1, one, one]])}, 0) for _ in stills]
        videos = [
            self.hf.replace_video_token(
                {"video_grid_thw": np.array([[clip.grid[0], one, one]]), "video_metadata": [clip.metadata]}, 0
            )
            for clip in clips
        ]
        texts, replaced = self.hf.get_text_with_replacements([text], images, videos)
        return texts[0], replaced[0]

    def pixel_rows(self, item: Still | Clip) -> torch.Tensor:
        """Decode and process the item: float32 [t * h * w, patch_dim]. Raises UserError for an unreadable file."""
        if isinstance(item, Still):
            done = self.hf.image_processor(images=[item.picture.pixels()], return_tensors="pt")
            rows, grid = done["pixel_values"], done["image_grid_thw"]
        else:
            done = self.hf.video_processor(
                videos=[item.video.pixels(item.metadata.frames_indices)],
                video_metadata=[item.metadata],
                do_sample_frames=False,
                return_tensors="pt",
            )
            rows, grid = done["pixel_values_videos"], done["video_grid_thw"]
        assert grid.tolist() == [list(item.grid)], "the grid computed from the header differs from the processor's"
        return rows


def _load(folder: Path) -> Qwen3VLProcessor:
    if not folder.is_dir():
        raise UserError(
            f"the Hugging Face folder {folder} does not exist", "set model.hf to a local folder with a processor"
        )
    try:
        processor = AutoProcessor.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many types for missing or broken files
        raise UserError(f"{folder}: its processor cannot be loaded: {error}") from error
    if not isinstance(processor, Qwen3VLProcessor):
        raise UserError(
            f"{folder}: its processor is a {type(processor).__name__}, not a Qwen3-VL processor",
            "copy the processor and tokenizer files of the released model (all *.json, *.txt and *.jinja) into it",
        )
    return processor


def _grid_side(config: Path) -> int:
    """Side of the vision tower's square grid of learned position embeddings."""
    try:
        vision = json.loads(config.read_text(encoding="utf-8"))["vision_config"]
        return round(vision["num_position_embeddings"] ** 0.5)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{config}: vision_config.num_position_embeddings cannot be read: {error!r}") from error


def _apply_limits(processor: Qwen3VLProcessor, settings: DataSettings) -> None:
    """Write the limits of the settings into the processor, so that it and our size computations use the same limits."""
    pictures, videos = processor.image_processor, processor.video_processor
    least = settings.min_pixels or pictures.size["shortest_edge"]
    most = settings.max_pixels or pictures.size["longest_edge"]
    if least > most:
        raise UserError(
            f"the minimum of {least} pixels per picture is larger than the maximum of {most} (from data.min_pixels and "
            "data.max_pixels, or from the processor if these are null)",
            "lower data.min_pixels or raise data.max_pixels",
        )
    pictures.size = SizeDict(shortest_edge=least, longest_edge=most)
    videos.fps = settings.video_fps or videos.fps
    if settings.video_max_frames:
        videos.max_frames = settings.video_max_frames
        videos.min_frames = min(videos.min_frames, settings.video_max_frames)
    # The processor treats None as False, but also logs a warning in each run.
    videos.cap_pixels_per_frame = bool(videos.cap_pixels_per_frame)
