"""No file of somebody else's runs a command: not in conversions, and none leads out of its folder."""

import json
import pickle
import shutil

import pytest
from crafted import Command, put_object, saved
from safetensors.torch import load_file, save_file

from megavlm.base.errors import UserError
from megavlm.convert import compare, hf_to_mcore, mcore_to_hf
from megavlm.convert.adapter import Adapter
from megavlm.convert.mcore_checkpoint import McoreCheckpoint
from megavlm.convert.merge import merge_adapter
from megavlm.model.shapes import Shapes


@pytest.fixture(scope="module")
def converted(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "mcore"
    hf_to_mcore(dense, out, progress=False)
    return out


@pytest.fixture
def mcore(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "mcore")
    return tmp_path / "mcore"


def in_metadata(folder, mark):
    (folder / ".metadata").write_bytes(pickle.dumps(Command(mark)))


def inside_metadata(folder, mark):
    """All else in it is as it should be."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = {"model": [Command(mark)]}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_common_state(folder, mark):
    put_object(folder, "common_state/shard_0_1", {"step": 0, "more": Command(mark)})


def in_another_object(folder, mark):
    put_object(folder, "rng/shard_0_1", Command(mark))


def in_common_pt(folder, mark):
    (folder / "common.pt").write_bytes(saved(Command(mark)))


CRAFTED = [in_metadata, inside_metadata, in_common_state, in_another_object, in_common_pt]


@pytest.mark.parametrize("craft", CRAFTED)
@pytest.mark.parametrize("reader", ["mcore2hf", "compare", "merge"])
def test_a_crafted_checkpoint_runs_nothing(craft, reader, dense, mcore, tmp_path):
    mark = tmp_path / "it ran"
    craft(mcore, mark)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (mcore / "adapter_config.json").write_text(json.dumps(config))
    read = {
        "mcore2hf": lambda: mcore_to_hf(mcore, dense, tmp_path / "out", progress=False),
        "compare": lambda: compare(dense, mcore, progress=False),
        "merge": lambda: merge_adapter(dense, mcore, tmp_path / "out", progress=False),
    }[reader]
    with pytest.raises(UserError) as raised:
        read()
    assert not mark.exists()
    assert str(mcore) in raised.value.message
    assert "system" in raised.value.message or "common.pt" in raised.value.message


def test_the_command_would_run_without_the_check(mcore, tmp_path):
    """The crafted files are real."""
    mark = tmp_path / "it ran"
    inside_metadata(mcore, mark)
    pickle.loads((mcore / ".metadata").read_bytes())
    assert mark.exists()


def test_pickled_weights_and_adapters_are_named_and_not_read(dense, tmp_path):
    mark, hf, adapter = tmp_path / "it ran", tmp_path / "hf", tmp_path / "adapter"
    hf.mkdir()
    shutil.copyfile(dense / "config.json", hf / "config.json")
    (hf / "pytorch_model.bin").write_bytes(saved({"x": Command(mark)}))
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.bin").write_bytes(saved({"x": Command(mark)}))
    for read in (
        lambda: hf_to_mcore(hf, tmp_path / "out", progress=False),
        lambda: Adapter(adapter, Shapes.from_hf(dense)),
        lambda: merge_adapter(dense, adapter, tmp_path / "out", progress=False),
    ):
        with pytest.raises(UserError, match=r"(pytorch|adapter)_model\.bin .*could run a program"):
            read()
    assert not mark.exists()


def test_tensors_outside_of_the_checkpoint_are_not_read(mcore, tmp_path):
    data = next(mcore.glob("*.distcp"))
    shutil.move(data, tmp_path / data.name)
    content = (mcore / ".metadata").read_bytes()
    for name in (f"../{data.name}", str(tmp_path / data.name)):
        metadata = pickle.loads(content)
        for place in metadata.storage_data.values():
            place.relative_path = name
        (mcore / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(UserError, match="stored outside of the checkpoint"):
            McoreCheckpoint(mcore)


def test_no_file_is_written_or_read_outside_of_a_folder(dense, mcore, tmp_path):
    bare = tmp_path / "inside" / "bare"
    bare.mkdir(parents=True)
    shutil.copyfile(dense / "config.json", bare / "config.json")
    layout = json.loads((mcore / "hf_layout.json").read_text())
    names = {name: f"../{name}" for name in layout["files"]}
    layout["files"] = {names[name]: content for name, content in layout["files"].items()}
    (mcore / "hf_layout.json").write_text(json.dumps(layout))
    with pytest.raises(UserError, match="is not the name of a file in the folder"):
        mcore_to_hf(mcore, bare, tmp_path / "inside" / "out", progress=False)
    assert not list(tmp_path.rglob("*.safetensors"))

    tensors = {name: value for file in dense.glob("*.safetensors") for name, value in load_file(file).items()}
    save_file(tensors, bare.parent / "elsewhere.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, "../elsewhere.safetensors")
    (bare / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="is not the name of a file in the folder"):
        hf_to_mcore(bare, tmp_path / "out", progress=False)
