"""The limits of training in the processor files of an exported folder, as transformers reads them."""

import json
import shutil

import pytest
from transformers import AutoProcessor

from megavlm.base.errors import UserError
from megavlm.config.settings import DataSettings
from megavlm.data.limits import changed_limits, write_limits

SETTINGS = {
    "max_pixels": 2048,
    "video_min_pixels": 2048,
    "video_max_pixels": 99_999,
    "video_max_pixels_per_frame": 4 * 1024,
    "video_fps": 1.0,
    "video_max_frames": 3,
}


def as_one_file(folder):
    return ["processor_config.json"]


def as_released(folder):
    """Qwen3-VL was released with a file for pictures and one for videos."""
    content = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    for part, name in (
        ("image_processor", "preprocessor_config.json"),
        ("video_processor", "video_preprocessor_config.json"),
    ):
        (folder / name).write_text(json.dumps({"processor_class": "Qwen3VLProcessor", **content[part]}))
    return ["preprocessor_config.json", "video_preprocessor_config.json"]


def with_old_names(folder):
    """Older files call the bounds of pictures min_pixels and max_pixels, and there is none for videos."""
    as_released(folder)
    (folder / "video_preprocessor_config.json").unlink()
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"min_pixels": 1024, "max_pixels": 8192}))
    return ["preprocessor_config.json", "video_preprocessor_config.json"]


@pytest.mark.parametrize("layout", [as_one_file, as_released, with_old_names])
def test_transformers_reads_the_limits_of_training(model_folder, tmp_path, layout):
    source, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model_folder, source, ignore=shutil.ignore_patterns("*.safetensors"))
    files = layout(source)
    shutil.copytree(source, out)
    before, limits = AutoProcessor.from_pretrained(source), DataSettings(**SETTINGS)
    write_limits(out, changed_limits(source, limits))
    after = AutoProcessor.from_pretrained(out)
    pictures, videos = after.image_processor, after.video_processor
    assert pictures.size["longest_edge"] == 2048
    assert pictures.size["shortest_edge"] == before.image_processor.size["shortest_edge"]
    assert (videos.size["shortest_edge"], videos.size["longest_edge"]) == (2048, 99_999)
    assert (videos.fps, videos.max_frames, videos.min_frames) == (1.0, 3, 3)
    assert (videos.cap_pixels_per_frame, videos.max_video_tokens) == (True, 4)
    assert videos.patch_size == before.video_processor.patch_size
    assert videos.image_mean == before.video_processor.image_mean
    same = [file for file in source.iterdir() if file.name not in files]
    assert all((out / file.name).read_bytes() == file.read_bytes() for file in same)
    assert {file.name for file in out.iterdir()} == {file.name for file in source.iterdir()} | set(files)


def test_limits_that_are_the_folders_own_leave_its_files_alone(model_folder):
    own = dict(AutoProcessor.from_pretrained(model_folder).image_processor.size)
    settings = DataSettings(max_pixels=own["longest_edge"], video_fps=2.0)
    assert not any(changed_limits(model_folder, settings).values())
    with pytest.raises(UserError, match="is larger than the maximum of 5"):
        changed_limits(model_folder, DataSettings(max_pixels=5))
