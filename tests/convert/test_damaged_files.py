"""Every file that is cut, emptied, replaced or unreadable, and weights that are quantised: words, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavlm.base.errors import UserError
from megavlm.convert import compare, hf_to_mcore, mcore_to_hf
from megavlm.convert.merge import merge_adapter

INDEX = "model.safetensors.index.json"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def dangling(file: Path) -> None:
    """A link to nothing, which cannot be read whoever asks."""
    file.unlink()
    file.symlink_to(file.parent / "nowhere")


def another_object(file: Path) -> None:
    file.write_text('{"weight_map": [1], "files": 3, "__metadata__": 4}')


def a_list(file: Path) -> None:
    file.write_text("[1, 2]")


def binary(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 16)


DAMAGES = [cut, emptied, folder, dangling, another_object, a_list, binary]


@pytest.fixture(scope="module")
def folders(dense, tmp_path_factory):
    """A folder, its checkpoint and an adapter, with the readers of each."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(dense, root / "hf")
    hf_to_mcore(dense, root / "mcore", progress=False)
    (root / "bare").mkdir()
    shutil.copyfile(dense / "config.json", root / "bare" / "config.json")
    (root / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["layers.0.self_attn.q_proj"]}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    matrices = {f"{name}.lora_A.weight": torch.ones(2, 48), f"{name}.lora_B.weight": torch.ones(64, 2)}
    save_file(matrices, root / "adapter" / "adapter_model.safetensors")
    save_file({"weight": torch.ones(1, 48)}, root / "adapter" / "reward_head.safetensors")
    save_file({"weight": torch.ones(1, 48)}, root / "hf" / "reward_head.safetensors")
    return root


def read_hf(root):
    hf_to_mcore(root / "hf", root / "out", progress=False)


def read_mcore(root):
    mcore_to_hf(root / "mcore", root / "bare", root / "out", progress=False)


def read_both(root):
    compare(root / "hf", root / "mcore", progress=False)


def read_adapter(root):
    merge_adapter(root / "hf", root / "adapter", root / "out", progress=False)


SAVED = ("model-00001-of-00015.safetensors", INDEX, "reward_head.safetensors", "config.json")
FILES = {
    **{f"hf/{name}": (read_hf, read_both, read_adapter) for name in SAVED},
    **{f"mcore/{name}": (read_mcore, read_both) for name in ("metadata.json", ".metadata", "__0_0_0.distcp")},
    "mcore/hf_layout.json": (read_mcore, read_both),
    **{f"adapter/{name}": (read_adapter,) for name in ("adapter_config.json", "adapter_model.safetensors")},
    "adapter/reward_head.safetensors": (read_adapter,),
}
# A comparison and a merge read no reward head in the base folder; a config.json that is a folder counts as none.
UNREAD = {("hf/reward_head.safetensors", read_both), ("hf/reward_head.safetensors", read_adapter)}


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named(file, folders, tmp_path):
    for damage in DAMAGES:
        root = tmp_path / damage.__name__
        shutil.copytree(folders, root)
        target = root / file
        if file.startswith("hf/model-"):  # whatever number of files the folder has
            target = sorted((root / "hf").glob("model-*.safetensors"))[0]
        damage(target)
        for read in FILES[file]:
            if (file, read) in UNREAD:
                continue
            with pytest.raises(UserError) as raised:
                read(root)
            message = raised.value.message
            assert target.name in message or str(target.parent) in message, (damage, read, message)
            assert len(message) < 800, message
            assert not (root / "out").exists()
        shutil.rmtree(root)


def test_a_shard_that_the_index_names_but_that_is_missing(folders, tmp_path):
    shutil.copytree(folders / "hf", tmp_path / "hf")
    file = sorted((tmp_path / "hf").glob("model-*.safetensors"))[1]
    file.unlink()
    with pytest.raises(UserError, match=f"no such file: {file}"):
        read_hf(tmp_path)


def test_a_missing_data_file_of_a_checkpoint_is_noticed_before_anything_is_written(folders, tmp_path):
    shutil.copytree(folders / "mcore", tmp_path / "mcore")
    shutil.copytree(folders / "bare", tmp_path / "bare")
    (tmp_path / "mcore" / "__0_0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"is incomplete: __0_0_0\.distcp is missing"):
        read_mcore(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_tensors_are_refused_by_name(dtype, folders, tmp_path):
    shutil.copytree(folders, tmp_path / "root")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    hf = tmp_path / "root" / "hf"
    file = hf / json.loads((hf / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name].to(dtype)}, file, metadata={"format": "pt"})
    for read in (read_hf, read_both, read_adapter):
        with pytest.raises(UserError, match=rf"{name} is stored as (F8_E4M3|I8), so the weights are quantised"):
            read(tmp_path / "root")


@pytest.mark.parametrize("place", ["", "text_config"])
def test_a_quantization_config_is_refused_by_name(place, folders, tmp_path):
    shutil.copytree(folders, tmp_path / "root")
    for kind in ("hf", "bare"):
        file = tmp_path / "root" / kind / "config.json"
        config = json.loads(file.read_text())
        (config[place] if place else config)["quantization_config"] = {"quant_method": "fp8"}
        file.write_text(json.dumps(config))
    for read in (read_hf, read_both, read_adapter, read_mcore):
        with pytest.raises(UserError, match=r"quantization_config is \{'quant_method': 'fp8'\}"):
            read(tmp_path / "root")
