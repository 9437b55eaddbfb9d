"""README.md: what it tells a newcomer to write and to type works as it stands, with a toy in place of the model."""

import json
import re
import shlex
from pathlib import Path

import forked_command
from PIL import Image
from skimage import data as photographs
from toy import toy_folder

PAGE = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## Train on your own data")[2].partition("\n## ")[0]


def test_own_data_are_trained_on_in_three_commands(tmp_path, tmp_path_factory, monkeypatch):
    """The files and the commands of the section, word for word; only the number of steps is smaller."""
    (record,) = re.findall(r"```json\n(.*?)```", SECTION, re.DOTALL)
    (settings,) = re.findall(r"```yaml\n(.*?)```", SECTION, re.DOTALL)
    (commands,) = re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)
    assert "`train.jsonl`" in SECTION
    assert "`my.yaml`" in SECTION
    (tmp_path / "train.jsonl").write_text(record)
    (tmp_path / "my.yaml").write_text(settings)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(photographs.chelsea()).save(tmp_path / json.loads(record)["images"][0])
    (tmp_path / "demo-output").mkdir()
    (tmp_path / "demo-output" / "exported").symlink_to(toy_folder(tmp_path_factory.mktemp("toy")))
    monkeypatch.chdir(tmp_path)
    said = ""
    checked = ["megavlm validate my.yaml"]
    assert f"`{checked[0]}`" in SECTION
    for line in checked + commands.splitlines():
        words = shlex.split(line)
        assert words[0] == "megavlm"
        small = ["train.steps=2"] if words[1] == "sft" else []
        done = forked_command.run([*words[1:], *small])
        assert done.returncode == 0, f"{line}\n{done.stdout[-500:]}\n{done.stderr[-1500:]}"
        said += done.stdout
    assert [shlex.split(line)[1] for line in commands.splitlines()] == ["sft", "infer", "export"]
    assert (tmp_path / "runs/my/checkpoints/step_00000002").is_dir()
    assert "the model is exported to exported, with a model card (README.md)" in said
    assert json.loads((tmp_path / "exported/config.json").read_text())["model_type"] == "qwen3_vl"
