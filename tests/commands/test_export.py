"""An exported folder is used with the limits of pictures and videos that the run trained with."""

import json
import shutil

import pytest
from toy import toy_folder

from megavlm.commands import export
from megavlm.config.load import resolved_yaml
from megavlm.config.settings import Settings
from megavlm.convert import hf_to_mcore


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(model folder, output folder of a run that trained with limits of its own)."""
    root = tmp_path_factory.mktemp("run")
    hf = toy_folder(root)
    hf_to_mcore(hf, root / "run" / "checkpoints" / "step_00000001", progress=False)
    limits = {"max_pixels": 2048, "video_fps": 1.0, "video_max_pixels": 32_768}
    settings = Settings(model={"hf": hf}, data=limits, output=root / "run")
    (root / "run" / "config.yaml").write_text(resolved_yaml(settings))
    return hf, root / "run"


def exported(hf, load, out, **data):
    export.main(Settings(model={"hf": hf, "load": load}, data=data), out)
    return json.loads((out / "processor_config.json").read_text())


def test_the_limits_of_the_run_are_exported(run, tmp_path, capsys):
    hf, folder = run
    before = json.loads((hf / "processor_config.json").read_text())
    after = exported(hf, folder, tmp_path / "out")
    assert after["image_processor"].pop("size")["longest_edge"] == 2048
    assert after["video_processor"].pop("size")["longest_edge"] == 32_768
    assert after["video_processor"].pop("fps") == 1.0
    for part, names in (("image_processor", ["size"]), ("video_processor", ["size", "fps"])):
        assert after[part] == {name: value for name, value in before[part].items() if name not in names}
    told = capsys.readouterr().out
    assert "limits of training: data.max_pixels=2048, data.video_max_pixels=32768, data.video_fps=1.0" in told


def test_limits_of_the_export_come_first_and_none_change_nothing(run, tmp_path, capsys):
    hf, folder = run
    assert exported(hf, folder, tmp_path / "own", max_pixels=4096)["image_processor"]["size"]["longest_edge"] == 4096
    apart = shutil.copytree(folder / "checkpoints" / "step_00000001", tmp_path / "converted")
    capsys.readouterr()
    exported(hf, apart, tmp_path / "out")
    assert "limits of training" not in capsys.readouterr().out
    assert (tmp_path / "out" / "processor_config.json").read_bytes() == (hf / "processor_config.json").read_bytes()
