"""The limits of pictures and videos: from the settings into the processor, and into the files of an exported folder."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, Qwen3VLProcessor
from transformers.image_utils import SizeDict

from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json
from megavlm.base.quoting import shortened
from megavlm.config.data_sections import DataSettings

# transformers takes a part of the processor from the first file if it has that part, or else from a file of its own.
_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def apply_limits(processor: Qwen3VLProcessor, settings: DataSettings) -> None:
    """Write the limits of the settings into the processor, so that it and our size computations use the same limits.

    Raises UserError if the limits contradict each other.
    """
    pictures, videos = processor.image_processor, processor.video_processor
    pictures.size = _bounds(pictures.size, settings.min_pixels, settings.max_pixels, "", "per picture")
    least, most = settings.video_min_pixels, settings.video_max_pixels
    videos.size = _bounds(videos.size, least, most, "video_", "for all frames of a video together")
    videos.fps = settings.video_fps or videos.fps
    if settings.video_max_frames:
        videos.max_frames = settings.video_max_frames
        videos.min_frames = min(videos.min_frames, settings.video_max_frames)
    # The processor treats None as False, but also logs a warning in each run.
    videos.cap_pixels_per_frame = bool(videos.cap_pixels_per_frame)
    if settings.video_max_pixels_per_frame:
        token = (videos.patch_size * videos.merge_size) ** 2
        floor = int(1.05 * videos.size["shortest_edge"])  # the processor's own; below it, it would ignore the cap
        if settings.video_max_pixels_per_frame < max(token, floor):
            raise UserError(
                f"data.video_max_pixels_per_frame is {settings.video_max_pixels_per_frame}, but the processor gives a "
                f"frame {max(token, floor)} pixels in any case: one visual token, or 1.05 times the minimum of a video",
                "raise it, or lower data.video_min_pixels",
            )
        videos.cap_pixels_per_frame = True
        videos.max_video_tokens = settings.video_max_pixels_per_frame // token


def changed_limits(folder: Path, settings: DataSettings) -> dict[str, dict[str, Any]]:
    """What the limits of the settings change in the processor of a Hugging Face folder.

    Returns:
        For each part of the processor ("image_processor", "video_processor") the new values of what changes.

    Raises:
        UserError: the folder has no Qwen3-VL processor, or the limits contradict each other.
    """
    processor = load_processor(folder)
    before = _limits(processor)
    apply_limits(processor, settings)
    return {
        part: {name: value for name, value in after.items() if value != before[part][name]}
        for part, after in _limits(processor).items()
    }


def write_limits(folder: Path, changes: dict[str, dict[str, Any]]) -> None:
    """Write the result of ``changed_limits`` into the processor files of a folder; other files stay as they are."""
    both, pictures, videos = (folder / name for name in _FILES)
    for part, values in changes.items():
        content = _read(both)
        if not values:
            continue
        if part in content:
            _write(both, content | {part: _merged(content[part], values)})
        elif part == "image_processor":
            _write(pictures, _merged(_read(pictures), values))
        else:  # without a file of its own, this part is read from the file for pictures, which must keep its values
            _write(videos, _merged(_read(videos) or _read(pictures), values))


def load_processor(folder: Path) -> Qwen3VLProcessor:
    """The processor of a Hugging Face folder. Raises UserError if it cannot be loaded or is of another model."""
    if not folder.is_dir():
        raise UserError(
            f"the Hugging Face folder {folder} does not exist", "set model.hf to a local folder with a processor"
        )
    try:
        processor = AutoProcessor.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many types for missing or broken files
        raise UserError(f"{folder}: its processor cannot be loaded: {shortened(error)}") from error
    if not isinstance(processor, Qwen3VLProcessor):
        raise UserError(
            f"{folder}: its processor is a {type(processor).__name__}, not a Qwen3-VL processor",
            "copy the processor and tokenizer files of the released model (all *.json, *.txt and *.jinja) into it",
        )
    return processor


def _bounds(size: SizeDict, least: int | None, most: int | None, prefix: str, what: str) -> SizeDict:
    """The bounds of the settings or, where these are None, of the processor."""
    least, most = least or size["shortest_edge"], most or size["longest_edge"]
    if least > most:
        raise UserError(
            f"the minimum of {least} pixels {what} is larger than the maximum of {most} (from data.{prefix}min_pixels "
            f"and data.{prefix}max_pixels, or from the processor if these are null)",
            f"lower data.{prefix}min_pixels or raise data.{prefix}max_pixels",
        )
    return SizeDict(shortest_edge=least, longest_edge=most)


def _limits(processor: Qwen3VLProcessor) -> dict[str, dict[str, Any]]:
    """The limits by part of the processor, under the names that its files have for them."""

    def bounds(size: SizeDict) -> dict[str, int]:
        return {name: size[name] for name in ("shortest_edge", "longest_edge")}

    videos = processor.video_processor
    return {
        "image_processor": {"size": bounds(processor.image_processor.size)},
        "video_processor": {
            "size": bounds(videos.size),
            "fps": videos.fps,
            "min_frames": videos.min_frames,
            "max_frames": videos.max_frames,
            "cap_pixels_per_frame": bool(videos.cap_pixels_per_frame),
            "max_video_tokens": videos.max_video_tokens,
        },
    }


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The values with the new ones, without the names by which older files override the size."""
    dropped = {"min_pixels", "max_pixels"} if "size" in new else set()
    return {name: value for name, value in old.items() if name not in dropped} | new


def _read(file: Path) -> dict[str, Any]:
    return parse_json(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
