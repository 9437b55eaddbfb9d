"""Hugging Face → Megatron → Hugging Face gives the same files, byte for byte."""

import filecmp
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_folder

from megavlm.convert import HF_LAYOUT, compare, hf_to_mcore, mcore_to_hf
from megavlm.convert.mcore_checkpoint import McoreCheckpoint, TensorToWrite, write_checkpoint


def there_and_back(hf: Path, work: Path, **options) -> Path:
    hf_to_mcore(hf, work / "mcore", progress=False)
    mcore_to_hf(work / "mcore", hf, work / "back", progress=False, **options)
    return work / "back"


def assert_same_files(a: Path, b: Path):
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    assert filecmp.cmpfiles(a, b, names, shallow=False)[1:] == ([], [])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def rewrite(hf: Path, out: Path, change) -> Path:
    """A copy of a folder with changed weights in a single file."""
    out.mkdir()
    shutil.copyfile(hf / "config.json", out / "config.json")
    save_file(change(weights(hf)), out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_same_bytes(moe, tied, dtype, tmp_path):
    hf = make_folder(tmp_path / "hf", moe=moe, tied=tied, dtype=dtype)
    assert len(list(hf.glob("*.safetensors"))) > 3
    assert_same_files(hf, there_and_back(hf, tmp_path))


def test_single_file_and_attention_bias(tmp_path):
    hf = make_folder(tmp_path / "hf", shards=False, attention_bias=True)
    assert_same_files(hf, there_and_back(hf, tmp_path))


def test_megatron_side_holds_the_right_numbers(moe, tmp_path):
    hf_to_mcore(moe, tmp_path / "mcore", progress=False)
    stored, hf = McoreCheckpoint(tmp_path / "mcore"), weights(moe)
    layer, prefix = "language.decoder.layers.0.mlp", "model.language_model.layers"
    assert torch.equal(
        stored.read(f"{layer}.experts.experts.linear_fc1.weight"), hf[f"{prefix}.0.mlp.experts.gate_up_proj"]
    )
    assert torch.equal(
        stored.read(f"{layer}.experts.experts.linear_fc2.weight", 2, 3), hf[f"{prefix}.0.mlp.experts.down_proj"][2:3]
    )
    gate_up = stored.read("language.decoder.layers.1.mlp.linear_fc1.weight")
    assert torch.equal(gate_up[:80], hf[f"{prefix}.1.mlp.gate_proj.weight"])
    assert torch.equal(gate_up[80:], hf[f"{prefix}.1.mlp.up_proj.weight"])
    qkv = stored.read("language.decoder.layers.2.self_attention.linear_qkv.weight")
    assert torch.equal(qkv[:32], hf[f"{prefix}.2.self_attn.q_proj.weight"][:32])  # two query heads of the first group
    assert torch.equal(qkv[32:48], hf[f"{prefix}.2.self_attn.k_proj.weight"][:16])
    assert torch.equal(qkv[48:64], hf[f"{prefix}.2.self_attn.v_proj.weight"][:16])
    assert torch.equal(qkv[64:96], hf[f"{prefix}.2.self_attn.q_proj.weight"][32:])


def test_released_folders_store_experts_transposed(moe, tmp_path):
    turned = rewrite(
        moe, tmp_path / "hf", lambda w: {n: x.mT.contiguous() if "experts" in n else x for n, x in w.items()}
    )
    assert_same_files(turned, there_and_back(turned, tmp_path))
    assert compare(moe, tmp_path / "mcore", progress=False)[0] == []
    assert compare(moe, turned, progress=False)[0] == []


def test_square_experts_are_not_turned(tmp_path):
    hf = make_folder(tmp_path / "hf", moe=True, moe_intermediate_size=24)  # gate_up is 48 × 48
    there_and_back(hf, tmp_path)
    stored = McoreCheckpoint(tmp_path / "mcore").read("language.decoder.layers.0.mlp.experts.experts.linear_fc1.weight")
    assert torch.equal(stored, weights(hf)["model.language_model.layers.0.mlp.experts.gate_up_proj"])


def test_tied_folder_with_a_second_copy(dense, tmp_path):
    embedding = "model.language_model.embed_tokens.weight"
    hf = rewrite(dense, tmp_path / "hf", lambda w: {**w, "lm_head.weight": w[embedding].clone()})
    assert_same_files(hf, there_and_back(hf, tmp_path))


def test_configuration_alone_is_enough(moe, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(moe, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
    hf_to_mcore(moe, tmp_path / "mcore", progress=False)
    mcore_to_hf(tmp_path / "mcore", bare, tmp_path / "back", progress=False)
    assert_same_files(moe, tmp_path / "back")


def test_nothing_remembered(dense, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(dense, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
    hf_to_mcore(dense, tmp_path / "mcore", progress=False)
    (tmp_path / "mcore" / HF_LAYOUT).unlink()
    mcore_to_hf(tmp_path / "mcore", bare, tmp_path / "back", progress=False)
    before, after = weights(dense), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "back" / "model.safetensors.index.json").exists()


def test_another_dtype(dense, tmp_path):
    back = there_and_back(dense, tmp_path, dtype=torch.bfloat16)
    before, after = weights(dense), weights(back)
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in after.values())


def test_padded_vocabulary_and_other_tensors(dense, tmp_path):
    """A checkpoint as training may save it: with padding rows, another dtype and optimizer state."""
    hf_to_mcore(dense, tmp_path / "mcore", progress=False)
    stored = McoreCheckpoint(tmp_path / "mcore")

    def source(key, rows):
        padded = torch.zeros(rows, *stored.tensors[key][0][1:], dtype=torch.float64)
        padded[: stored.tensors[key][0][0]] = stored.read(key)
        return TensorToWrite(key, tuple(padded.shape), torch.float64, lambda first, last: padded[first:last])

    embedding = "language.embedding.word_embeddings.weight"
    sources = [source(key, shape[0] + (key == embedding) * 9) for key, (shape, _) in stored.tensors.items()]
    state = torch.ones(3)
    sources.append(
        TensorToWrite("optimizer.state.exp_avg.x", (3,), torch.float32, lambda first, last: state[first:last])
    )
    (tmp_path / "trained").mkdir()
    write_checkpoint(tmp_path / "trained", sources, {"step": 7})
    mcore_to_hf(tmp_path / "trained", dense, tmp_path / "back", progress=False)
    assert_same_files(dense, tmp_path / "back")


def test_many_files(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("megavlm.convert.mcore_checkpoint._FILE_BYTES", 50_000)
    monkeypatch.setattr("megavlm.convert.hf_folder._SHARD_BYTES", 50_000)
    back = there_and_back(dense, tmp_path)
    assert len(list((tmp_path / "mcore").glob("*.distcp"))) > 3
    assert_same_files(dense, back)


def test_default_shards(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("megavlm.convert.hf_folder._SHARD_BYTES", 200_000)
    bare = tmp_path / "bare"
    shutil.copytree(dense, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
    hf_to_mcore(dense, tmp_path / "mcore", progress=False)
    (tmp_path / "mcore" / HF_LAYOUT).unlink()
    mcore_to_hf(tmp_path / "mcore", bare, tmp_path / "back", progress=False)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in (tmp_path / "back").glob("*.safetensors")}
    assert len(files) > 2
    assert {name: file for file, content in files.items() for name in content} == index["weight_map"]
    assert compare(dense, tmp_path / "back", progress=False)[0] == []
