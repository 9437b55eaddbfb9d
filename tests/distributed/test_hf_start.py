"""``model.load`` is a Hugging Face folder: every rank has the bits of hf2mcore and loading, and reads no more."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from parity import settings_of
from test_scores import largest_difference, reference_scores, run_score, score_settings
from toy import write_records


def differences(settings: dict, checkpoint: Path) -> tuple[list[str], set[str]]:
    """Runs on every rank. Returns the parameters that differ from those of the checkpoint, and the tensors read."""
    from megavlm.checkpoint.load_weights import load_weights
    from megavlm.config.settings import Settings
    from megavlm.convert.hf_folder import HfWeights
    from megavlm.model.vlm import PARTS
    from megavlm.runtime.session import start

    read, names = HfWeights.read, set()
    HfWeights.read = lambda self, name: (names.add(name), read(self, name))[1]
    try:
        vlm = start(Settings(**settings), training=True).vlm
    finally:
        HfWeights.read = read
    modules = [module for part in PARTS for module in vlm.modules_of(part)]
    parameters = [pair for module in modules for pair in module.named_parameters()]
    before = [parameter.detach().clone() for _, parameter in parameters]
    for _, parameter in parameters:
        parameter.data.fill_(7)
    load_weights(checkpoint, vlm)
    return [n for (n, p), old in zip(parameters, before, strict=True) if not torch.equal(p, old)], names


# Kind of the model, layout, precision; the folders have float32, which bf16 rounds.
CASES = {
    "one process": ("dense-other-output", {}, "fp32"),
    "TP2": ("dense", {"tensor": 2}, "bf16"),
    "TP2 untied": ("dense-untied", {"tensor": 2}, "fp32"),
    "PP2": ("dense", {"pipeline": 2}, "fp32"),
    "PP2 × VPP2": ("dense-untied", {"pipeline": 2, "virtual_pipeline": 2}, "fp32"),
    "MoE EP2": ("moe", {"expert": 2}, "fp32"),
    "MoE ETP2 × TP2": ("moe", {"tensor": 2, "expert_tensor": 2}, "bf16"),
    "MoE EP2 × PP2": ("moe", {"pipeline": 2, "expert": 2}, "fp32"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_rank_has_the_bits_of_hf2mcore_and_loading(case, toys, request):
    kind, parallel, precision = CASES[case]
    size = math.prod(parallel.get(name, 1) for name in ("tensor", "pipeline", "expert"))
    settings = settings_of(toys.folder(kind), parallel, precision=precision)
    settings["model"]["load"] = str(toys.folder(kind))
    found = request.getfixturevalue(f"world{size}").run(differences, settings, toys.checkpoint(kind))
    assert [different for different, _ in found] == [[]] * size
    if case == "PP2":  # a stage reads its own layers
        layers = lambda names: {n.split(".")[3] for n in names if n.startswith("model.language_model.layers.")}
        assert [layers(names) for _, names in found] == [{"0", "1"}, {"2", "3"}]


def test_scores_are_those_of_transformers(toys, tmp_path, world2):
    folder = toys.folder("dense")
    data = write_records(toys.root / "hf-start.jsonl", toys.records[:3])
    settings = score_settings(folder, folder, data, tmp_path, {"tensor": 2})
    assert world2.run(run_score, settings) == [0, 0]
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert largest_difference(scores, reference_scores(folder, toys.records[:3], toys.root)) < 1e-4


def test_rows_of_added_tokens_have_the_same_bits(toys, tmp_path, world2):
    folder = shutil.copytree(toys.folder("dense-untied"), tmp_path / "hf")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.setdefault("added_tokens_decoder", {})["551"] = {"content": "<|new|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    settings = settings_of(folder, {"tensor": 2})
    settings["model"] |= {"load": str(folder), "resize_vocabulary": True}
    found = world2.run(differences, settings, toys.checkpoint("dense-untied"))
    assert [different for different, _ in found] == [[], []]


def adapter_run(settings: dict, out: Path | None) -> int:
    """Runs on the only rank: a run of adapters, then its export."""
    from megavlm.commands import export, train
    from megavlm.config.settings import Settings

    assert train.main(Settings(**settings), "sft") == 0
    settings["model"]["adapter"] = settings["output"]
    return export.main(Settings(**{name: settings[name] for name in ("model", "adapter")}), out)


def test_adapters_on_a_quantised_base_train_and_merge_as_from_the_checkpoint(toys, tmp_path, world1):
    from megavlm.checkpoint.fingerprint import digest_of_folders
    from megavlm.convert.mcore_checkpoint import McoreCheckpoint

    data = write_records(toys.root / "hf-start-train.jsonl", toys.records[:2])
    found = {}
    for name, load in {"hf": toys.folder("dense"), "mcore": toys.checkpoint("dense")}.items():
        settings = settings_of(toys.folder("dense"), {}, freeze=("vision", "projector"), steps=2, memory_check=False)
        settings["model"]["load"] = str(load)
        settings["adapter"] = {"type": "lora", "rank": 4, "quantize": "nf4"}
        settings["data"] |= {"train": str(data), "shuffle": False, "workers": 0}
        settings["train"] |= {"kl_to_start": 0.1, "global_batch_size": 1}
        settings |= {"log": {"wandb": {"mode": "off"}}, "output": str(tmp_path / name)}
        assert world1.run(adapter_run, settings, tmp_path / f"{name}-exported") == [0]
        checkpoint = McoreCheckpoint(tmp_path / name / "checkpoints" / "step_00000002")
        assert checkpoint.common_state()["identity"]["base below the adapters"] == digest_of_folders(load)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        tensors = {key: checkpoint.read(key) for key in checkpoint.tensors}
        found[name] = [json.loads(line)["loss"] for line in lines], tensors
    assert found["hf"][0] == found["mcore"][0]
    assert found["hf"][1].keys() == found["mcore"][1].keys()
    assert all(torch.equal(tensor, found["mcore"][1][key]) for key, tensor in found["hf"][1].items())
    files = ["model.safetensors", "config.json"]
    assert all(
        (tmp_path / "hf-exported" / f).read_bytes() == (tmp_path / "mcore-exported" / f).read_bytes() for f in files
    )
    assert (tmp_path / "hf-exported" / files[0]).read_bytes() != (toys.folder("dense") / files[0]).read_bytes()


def tuned(settings: dict) -> int:
    from megavlm.commands import train
    from megavlm.config.settings import Settings

    return train.main(Settings(**settings), "sft")


def test_checkpoints_of_the_run_record_the_folders_files(toys, tmp_path, world1):
    """So that the export has the same files, and that an output layer of its own is one in the next run."""
    from megavlm.convert import mcore_to_hf

    folder = toys.folder("dense-other-output")
    data = write_records(toys.root / "hf-start-train.jsonl", toys.records[:2])
    settings = settings_of(folder, {}, steps=1, lr=1e-37, memory_check=False)
    settings["model"]["load"] = str(folder)
    settings["data"] |= {"train": str(data), "workers": 0}
    settings["train"] |= {"global_batch_size": 1}
    settings |= {"log": {"wandb": {"mode": "off"}}, "output": str(tmp_path / "run")}
    assert world1.run(tuned, settings) == [0]
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    mcore_to_hf(tmp_path / "run" / "checkpoints" / "step_00000001", bare, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def add_reference(settings: dict, checkpoint: Path) -> bool:
    """Runs on every rank: whether a frozen reference of the folder has the bits of that of the checkpoint."""
    from megavlm.config.settings import Settings
    from megavlm.runtime.session import start

    settings = Settings(**settings)
    session = start(settings, training=True)
    models = [session.add_model(str(load), load, trained=False).vlm for load in (settings.model.hf, checkpoint)]
    return all(torch.equal(x, y) for x, y in zip(*(m.language[0].parameters() for m in models), strict=True))


def test_a_reference_model_is_read_from_the_folder(toys, world2):
    settings = settings_of(toys.folder("dense"), {"tensor": 2})
    assert world2.run(add_reference, settings, toys.checkpoint("dense")) == [True, True]
