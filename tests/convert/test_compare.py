"""Differences are found, named and measured for all kinds of the two sides."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavlm.base.errors import UserError
from megavlm.convert import compare, hf_to_mcore

NAME = "model.language_model.layers.2.self_attn.k_proj.weight"
KEY = "language.decoder.layers.2.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def changed(dense, tmp_path_factory):
    """The dense folder with one value of one tensor changed by 0.5."""
    folder = tmp_path_factory.mktemp("changed") / "hf"
    shutil.copytree(dense, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if NAME in tensors:
            tensors[NAME][3, 5] += 0.5
            save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def checkpoints(dense, changed, tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for name, folder in (("a", dense), ("b", changed)):
        hf_to_mcore(folder, root / name, progress=False)
    return root / "a", root / "b"


@pytest.mark.parametrize("sides", ["hf hf", "hf mcore", "mcore hf", "mcore mcore"])
def test_one_number(sides, dense, changed, checkpoints):
    a, b = (pair[i] for i, pair in enumerate({"hf": (dense, changed), "mcore": checkpoints}[s] for s in sides.split()))
    (difference,), count = compare(a, b, progress=False)
    assert difference.name == (KEY if sides == "mcore mcore" else NAME)
    assert difference.what == "values"
    assert difference.max_abs == pytest.approx(0.5, rel=1e-5)
    assert 0 < difference.relative < 0.1
    assert count > 50
    assert compare(a, a, progress=False)[0] == []


def test_dtype_is_a_difference(dense, tmp_path):
    from megavlm.convert import mcore_to_hf

    hf_to_mcore(dense, tmp_path / "mcore", progress=False)
    mcore_to_hf(tmp_path / "mcore", dense, tmp_path / "half", dtype=torch.bfloat16, progress=False)
    differences, count = compare(dense, tmp_path / "half", progress=False)
    assert len(differences) == count
    assert differences[0].what == "dtype float32 / bfloat16"


def test_nan_is_a_difference(dense, changed, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(dense, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if NAME in tensors:
            tensors[NAME][0, 0] = float("nan")
            save_file(tensors, file, metadata={"format": "pt"})
    (difference,), _ = compare(dense, folder, progress=False)
    assert difference.max_abs != difference.max_abs


def test_checkpoints_of_different_models(checkpoints, moe, tmp_path):
    hf_to_mcore(moe, tmp_path / "moe", progress=False)
    differences, _ = compare(checkpoints[0], tmp_path / "moe", progress=False)
    what = {d.name: d.what for d in differences}
    assert what["language.output_layer.weight"] == "only in b"
    assert what["language.decoder.layers.0.mlp.linear_fc1.weight"] == "only in a"
    assert what[KEY] == "values"


def test_folder_and_checkpoint_of_different_models(checkpoints, moe):
    with pytest.raises(UserError, match=r"missing tensor language\.decoder\.layers\.0\.pre_mlp_layernorm"):
        compare(moe, checkpoints[0], progress=False)
