"""Every verb refuses a checkpoint of another model, a damaged or a crafted one in words, before it builds a model."""

import json
import pickle
import shutil

import pytest
import torch
from crafted import Command
from parity import Toys
from toy import write_records

from megavlm.cli.main import main
from megavlm.convert.mcore_checkpoint import TensorToWrite, write_checkpoint
from megavlm.convert.names import table
from megavlm.model.shapes import Shapes

VERBS = ("validate", "score", "infer", "sft", "export")


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


def arguments_of(verb, toys, load, folder) -> list[str]:
    data = write_records(toys.root / "data.jsonl", toys.records[:1])
    config = {
        "model": {"hf": str(toys.folder("dense")), "load": str(load)},
        "data": {"train": [{"path": str(data)}], "eval": str(data), "seq_length": 128, "workers": 0},
        "train": {"precision": "fp32", "steps": 1, "global_batch_size": 1, "lr": 1e-3},
        "output": str(folder / "run"),
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return [verb, str(path), *(("--out", str(folder / "out")) if verb == "export" else ())]


def said(verb, toys, load, folder, capsys) -> str:
    assert main(arguments_of(verb, toys, load, folder)) == 2
    output = " ".join(capsys.readouterr().err.split())
    assert output.startswith("error: ")
    assert "Traceback" not in output
    assert len(output) < 2000
    assert not (folder / "out").exists()
    return output


@pytest.fixture(scope="module")
def five_layers(toys, tmp_path_factory):
    """A checkpoint of the toy with a fifth layer."""
    root = tmp_path_factory.mktemp("five")
    config = json.loads((toys.folder("dense") / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 5
    config["text_config"].pop("layer_types", None)
    (root / "config.json").write_text(json.dumps(config))
    zeros = lambda shape: lambda first, last: torch.zeros(last - first, *shape[1:])
    entries = table(Shapes.from_hf(root))
    (root / "mcore").mkdir()
    sources = [TensorToWrite(entry.key, entry.shape, torch.float32, zeros(entry.shape)) for entry in entries]
    write_checkpoint(root / "mcore", sources, {"step": 0})
    return root / "mcore"


@pytest.mark.parametrize("verb", VERBS)
def test_a_checkpoint_of_another_model(verb, toys, five_layers, tmp_path, capsys):
    output = said(verb, toys, five_layers, tmp_path, capsys)
    assert "text_config.num_hidden_layers is 5 in the checkpoint and 4 in config.json" in output


@pytest.mark.parametrize("verb", ["validate", "grpo", "ppo"])
def test_a_reward_model_or_critic_of_another_model(verb, toys, five_layers, tmp_path, monkeypatch, capsys):
    """Before any model is built."""
    further = [f"reward=[{{model: {five_layers}}}]"]
    if verb == "ppo":
        further = ["reward=[{name: exact}]", f"align.critic.load={five_layers}"]
    arguments = [*arguments_of(verb, toys, toys.checkpoint("dense"), tmp_path), "train.global_batch_size=null"]
    monkeypatch.setattr("megavlm.runtime.session.VLM", lambda *_, **__: pytest.fail("a model was built"))
    assert main([*arguments, *further, "rollout.prompts=1", "rollout.max_new_tokens=8"]) == 2
    output = " ".join(capsys.readouterr().err.split())
    assert "text_config.num_hidden_layers is 5 in the checkpoint and 4 in config.json" in output


@pytest.mark.parametrize("verb", VERBS)
def test_a_damaged_or_crafted_checkpoint(verb, toys, tmp_path, capsys):
    for name in (".metadata", "metadata.json", "hf_layout.json", "*.distcp"):
        load = tmp_path / "damaged"
        shutil.copytree(toys.checkpoint("dense"), load)
        file = next(load.glob(name))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        assert file.name in said(verb, toys, load, tmp_path, capsys)
        shutil.rmtree(load)
    load, mark = tmp_path / "crafted", tmp_path / "it ran"
    shutil.copytree(toys.checkpoint("dense"), load)
    (load / ".metadata").write_bytes(pickle.dumps(Command(mark)))
    assert "names posix.system, which is no part of a checkpoint" in said(verb, toys, load, tmp_path, capsys)
    assert not mark.exists()


@pytest.mark.parametrize("verb", VERBS)
def test_a_quantised_folder(verb, toys, tmp_path, capsys):
    hf = tmp_path / "hf"
    shutil.copytree(toys.folder("dense"), hf)
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    arguments = [*arguments_of(verb, toys, toys.checkpoint("dense"), tmp_path), f"model.hf={hf}"]
    assert main(arguments) == 2
    assert "quantization_config is {'quant_method': 'fp8'}" in " ".join(capsys.readouterr().err.split())
