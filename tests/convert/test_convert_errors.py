"""Errors of conversions: one message that names the file, the tensor and the remedy, and no output."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_folder

from megavlm.base.errors import UserError
from megavlm.convert import HF_LAYOUT, hf_to_mcore, mcore_to_hf
from megavlm.convert.mcore_checkpoint import McoreCheckpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture
def hf(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def mcore(hf, tmp_path):
    hf_to_mcore(hf, tmp_path / "mcore", progress=False)
    return tmp_path / "mcore"


def file_of(hf, name):
    return hf / json.loads((hf / INDEX).read_text())["weight_map"][name]


def change(hf, name, tensor):
    """Replaces the tensor ``name`` by ``tensor``; None removes it."""
    file = file_of(hf, name)
    tensors = {**load_file(file), name: tensor}
    save_file({n: x for n, x in tensors.items() if x is not None}, file, metadata={"format": "pt"})


def refused(hf, tmp_path):
    with pytest.raises(UserError) as raised:
        hf_to_mcore(hf, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    return str(raised.value)


def test_missing_folder_weights_or_file(hf, tmp_path):
    assert "no such Hugging Face folder" in refused(tmp_path / "nowhere", tmp_path)
    file = sorted(hf.glob("*.safetensors"))[1]
    file.unlink()
    assert str(file) in refused(hf, tmp_path)
    (hf / INDEX).unlink()
    assert "holds no weights" in refused(hf, tmp_path)


def test_truncated_file(hf, tmp_path):
    file = file_of(hf, "model.visual.pos_embed.weight")
    content = file.read_bytes()
    for length in (len(content) - 1, 20, 4, 0):
        file.write_bytes(content[:length])
        message = refused(hf, tmp_path)
        assert str(file) in message
        assert "not a complete safetensors file" in message


def test_missing_tensor(hf, tmp_path):
    name = "model.visual.merger.norm.bias"
    change(hf, name, None)
    message = refused(hf, tmp_path)
    assert f"tensor {name} is not in {file_of(hf, name).name}" in message
    index = json.loads((hf / INDEX).read_text())
    del index["weight_map"][name]
    (hf / INDEX).write_text(json.dumps(index))
    assert f"missing tensor {name}" in refused(hf, tmp_path)


def test_unknown_tensor_shape_and_dtype(hf, tmp_path):
    norm, key = "model.visual.merger.norm.bias", "model.language_model.layers.0.self_attn.k_proj.weight"
    weights = load_file(file_of(hf, norm))[norm]
    change(hf, norm, torch.zeros(33))
    assert f"{norm} has shape [33], but config.json implies [32]" in refused(hf, tmp_path)
    change(hf, norm, weights)
    change(hf, key, load_file(file_of(hf, key))[key].bfloat16())
    message = refused(hf, tmp_path)
    assert "different dtypes: BF16, F32" in message
    assert key in message
    change(hf, key, load_file(file_of(hf, key))[key].float())
    file = file_of(hf, norm)
    save_file({**load_file(file), "model.visual.surprise": torch.zeros(1)}, file, metadata={"format": "pt"})
    assert "tensor model.visual.surprise is no weight" in refused(hf, tmp_path)


def test_existing_output(hf, mcore, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        hf_to_mcore(hf, mcore, progress=False)
    (mcore / "left over").touch()
    hf_to_mcore(hf, mcore, overwrite=True, progress=False)
    assert not (mcore / "left over").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore"]

    (tmp_path / "photographs").mkdir()
    for convert in (
        lambda out: hf_to_mcore(hf, out, overwrite=True),
        lambda out: mcore_to_hf(mcore, hf, out, overwrite=True),
    ):
        with pytest.raises(UserError, match="so it is not replaced"):
            convert(tmp_path / "photographs")
    with pytest.raises(UserError, match="same folder"):
        mcore_to_hf(mcore, hf, hf, overwrite=True)
    with pytest.raises(UserError, match="exists already"):
        mcore_to_hf(mcore, hf, tmp_path / "mcore", progress=False)


def test_not_a_checkpoint(hf, tmp_path):
    for path, words in ((tmp_path / "nowhere", "no such checkpoint folder"), (hf, r"metadata\.json")):
        with pytest.raises(UserError, match=words):
            mcore_to_hf(path, hf, tmp_path / "out", progress=False)
    with pytest.raises(UserError) as caught:
        McoreCheckpoint(hf)
    assert f"python checkpoint_tools/hf2mcore.py --hf {hf} --out CHECKPOINT" in caught.value.remedy
    (tmp_path / "run" / "checkpoints" / "step_00000020").mkdir(parents=True)
    with pytest.raises(UserError, match="step_00000020"):
        mcore_to_hf(tmp_path / "run", hf, tmp_path / "out", progress=False)


def test_damaged_checkpoint(hf, mcore, tmp_path):
    data = next(mcore.glob("*.distcp"))
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"{mcore} is incomplete: {data.name} is [\d,]+ bytes instead of"):
        mcore_to_hf(mcore, hf, tmp_path / "out", progress=False)
    data.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    with pytest.raises(UserError, match=f"{mcore}: .*cannot (be )?read"):
        mcore_to_hf(mcore, hf, tmp_path / "out", progress=False)
    assert not (tmp_path / "out.partial").exists()
    data.write_bytes(content)
    (mcore / ".metadata").write_bytes(b"\x80\x04garbage")
    with pytest.raises(UserError, match=r"\.metadata cannot be read"):
        mcore_to_hf(mcore, hf, tmp_path / "out", progress=False)


def test_checkpoint_of_another_model(hf, mcore, tmp_path):
    for change, words in (
        ({"num_hidden_layers": 4}, r"missing tensor language\.decoder\.layers\.3"),
        ({"intermediate_size": 96}, r"linear_fc1\.weight has shape \[160, 48\], but config\.json implies \[192, 48\]"),
    ):
        other = make_folder(tmp_path / f"other-{next(iter(change))}", tied=True, **change)
        with pytest.raises(UserError, match=words):
            mcore_to_hf(mcore, other, tmp_path / "out", progress=False)


def test_remembered_layout_of_another_model(hf, mcore, moe, tmp_path):
    hf_to_mcore(moe, tmp_path / "moe", progress=False)
    shutil.copyfile(tmp_path / "moe" / HF_LAYOUT, mcore / HF_LAYOUT)
    for file in [*hf.glob("*.safetensors"), hf / INDEX]:
        file.unlink()
    with pytest.raises(UserError, match=rf"{mcore / HF_LAYOUT}: missing tensor"):
        mcore_to_hf(mcore, hf, tmp_path / "out", progress=False)
