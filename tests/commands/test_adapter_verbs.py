"""Tuning with adapters as a user does it: trained, continued, read, exported merged and apart, handed to peft."""

import json
import shutil

import pytest
import torch
from adapted import ADAPTERS, peft_model
from parity import VARYING, Toys
from safetensors.torch import load_file
from test_train_verbs import megavlm, metrics_of, sft_config
from toy import reference_inputs, reference_model, write_records

from megavlm.cli.main import main
from megavlm.convert.adapter import ADAPTER_MODEL
from megavlm.convert.mcore_checkpoint import McoreCheckpoint

LORA = ("adapter.type=lora", "adapter.rank=4", "adapter.targets=[q_proj, v_proj, down_proj, attn.qkv]")
TP2 = ("parallel.tensor=2", "--nproc", 2)


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def trained(toys, tmp_path_factory):
    """(configuration, folder) of a run with LoRA in two tensor-parallel processes, four steps at once."""
    folder = tmp_path_factory.mktemp("trained")
    config = sft_config(toys, folder, optimizer="adam", lr=3e-3, steps=4, global_batch_size=4)
    megavlm("sft", config, *LORA, *TP2, f"output={folder / 'whole'}")
    return config, folder


def steady(run):
    return [{k: v for k, v in line.items() if k not in VARYING} for line in metrics_of(run)]


def adapter_of(config, run, out):
    megavlm("export", config, f"model.adapter={run}", "--adapter", "--out", out)
    return load_file(out / ADAPTER_MODEL)


def test_a_run_continues_on_the_same_bits_and_keeps_what_learned_alone(toys, trained, tmp_path):
    config, folder = trained
    for steps in (2, 4):
        megavlm("sft", config, *LORA, *TP2, f"output={tmp_path / 'halves'}", f"train.steps={steps}")
    assert steady(folder / "whole") == steady(tmp_path / "halves")
    one, other = (
        McoreCheckpoint(run / "checkpoints" / "step_00000004") for run in (folder / "whole", tmp_path / "halves")
    )
    assert one.tensors == other.tensors
    assert all(torch.equal(one.read(key), other.read(key)) for key in one.tensors)
    weights = {key for key in one.tensors if not key.startswith("optimizer.")}
    assert all(one.read(key).abs().max() > 0 for key in weights)
    # vision and decoder have adapters and are frozen otherwise; the projector learns as a whole
    assert any(key.startswith("adapter.model.language_model.layers.3") for key in weights)
    assert all(key.startswith(("adapter.model.", "projector.")) for key in weights)


@pytest.fixture(scope="module")
def frozen(toys, trained):
    """The same without the projector: peft's format has no place for whole weights."""
    config, folder = trained
    megavlm("sft", config, *LORA, *TP2, "model.freeze=[projector]", f"output={folder / 'frozen'}")
    return config, folder / "frozen"


def test_exports_are_for_transformers_and_for_peft(toys, frozen, tmp_path):
    from peft import PeftModel
    from transformers import AutoProcessor

    config, run = frozen
    megavlm("export", config, f"model.adapter={run}", "--out", tmp_path / "merged")
    adapter_of(config, run, tmp_path / "adapter")
    merged = reference_model(tmp_path / "merged")
    apart = PeftModel.from_pretrained(reference_model(toys.folder("dense")), tmp_path / "adapter")
    processor, logits = AutoProcessor.from_pretrained(toys.folder("dense")), {}
    inputs = reference_inputs(processor, toys.records[1], toys.root)
    with torch.no_grad():
        for name, model in (("merged", merged), ("apart", apart), ("base", reference_model(toys.folder("dense")))):
            logits[name] = model(**inputs).logits.log_softmax(-1)
    difference = lambda name: (logits["merged"] - logits[name]).abs().max().item()
    assert difference("apart") < 1e-4  # of log-probabilities down to -20: seven digits of float32 through four layers
    assert difference("base") > 100 * difference("apart")

    # and our own reading of the run, of peft's folder, and of the merged folder
    data = write_records(toys.root / "scored.jsonl", toys.records)
    sums = {}
    for name, change in {
        "run": f"model.adapter={run}",
        "peft": f"model.adapter={tmp_path / 'adapter'}",
        "base": "model.adapter=null",
    }.items():
        megavlm("score", config, change, f"data.eval={data}", f"output={tmp_path / name}")
        lines = (tmp_path / name / "scores.jsonl").read_text().splitlines()
        sums[name] = [json.loads(line)["sum"] for line in lines]
    assert sums["run"] == sums["peft"]
    assert sums["run"] != pytest.approx(sums["base"], rel=1e-3)
    start = len(reference_inputs(processor, {**toys.records[1], "messages": toys.records[1]["messages"][:-1]},
                                 toys.root, add_generation_prompt=True)["input_ids"][0])  # fmt: skip
    tokens = inputs["input_ids"][0]
    answer = range(start, len(tokens) - 1)  # the last token is the line feed behind the turn
    theirs = sum(logits["apart"][0, place - 1, tokens[place]].item() for place in answer)
    assert sums["run"][1] == pytest.approx(theirs, rel=1e-5)


def test_the_recipe_that_trained_an_adapter_exports_it(frozen, tmp_path):
    config, run = frozen
    base = ("--base-model", "Qwen/Toy")
    done = megavlm("export", config, f"output={run}", "--adapter", *base, "--out", tmp_path / "own")
    card = (tmp_path / "own" / "README.md").read_text()
    assert card.startswith("---\nbase_model: Qwen/Toy\nlibrary_name: peft\n")
    assert "An adapter for a Qwen3-VL model after step 4 of supervised fine-tuning" in card
    assert "| train | 16 |" in card  # four steps of four records
    assert 'PeftModel.from_pretrained(model, "own")' in card
    assert json.loads((tmp_path / "own" / "adapter_config.json").read_text())["base_model_name_or_path"] == "Qwen/Toy"
    assert f"weights · step 4 of {run}" in done.stdout
    assert f"an adapter on {json.loads(config.read_text())['model']['load']}" in done.stdout
    ours = load_file(tmp_path / "own" / ADAPTER_MODEL)
    theirs = adapter_of(config, run / "checkpoints" / "step_00000004", tmp_path / "named")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_training_goes_on_from_a_peft_adapter(toys, trained, tmp_path):
    config, _ = trained
    _, options = ADAPTERS["lora"]
    peft_model(toys.folder("dense"), options).save_pretrained(tmp_path / "peft")
    change = f"model.adapter={tmp_path / 'peft'}"
    for steps in (1, 2):  # the second time it continues
        megavlm("sft", config, change, f"train.steps={steps}", f"output={tmp_path / 'on'}")
    assert [line["step"] for line in metrics_of(tmp_path / "on")] == [1, 2]
    start, after = load_file(tmp_path / "peft" / ADAPTER_MODEL), adapter_of(config, tmp_path / "on", tmp_path / "new")
    assert start.keys() == after.keys()
    assert all(not torch.equal(value, after[name]) for name, value in start.items())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["adapter.type=lora", "adapter.targets=[q_prj]"], "'q_prj', which ends the name of no linear"),
        (["adapter.type=lora", "model.freeze=[language]"], "model.freeze contains language"),
        (["adapter.rank=4"], "adapter.rank is 4, but adapter.type is null"),
        (["adapter.type=fourierft", "adapter.alpha=4.0"], "adapter.alpha is 4.0, but adapter.type is fourierft"),
        (["adapter.type=lora", "model.load=null"], "model.load is not set"),
        (["adapter.type=lora", "train.optimizer=galore"], "adapters have no large matrices"),
        (["adapter.type=lora", "train.optimizer=muon"], "adapters have no large matrices"),
        (
            ["adapter.type=lora", "adapter.targets=[qkv]", "adapter.quantize=nf4"],
            "the decoder's linear layers in 4 bits",
        ),
        (["adapter.type=fourierft", "adapter.frequencies=100000"], "has 128 × 128 weights"),
        (["adapter.type=lora", "adapter.rank_pattern={{'[': 4}}"], "write a regular expression"),
        (
            ["adapter.type=lora", "adapter.targets=[qkv]", "adapter.dropout=0.1", "vision.recompute=true"],
            "recomputation would drop other features",
        ),
        (["model.adapter={run}", "adapter.type=lora", "adapter.rank=8"], "r is 8, in model.adapter 4"),
        (["model.adapter={load}"], "holds no adapter"),
    ],
)
def test_mistakes_are_said_plainly(toys, trained, changes, told, capsys):
    config, folder = trained
    run = folder / "whole" / "checkpoints" / "step_00000004"
    changes = [change.format(run=run, load=toys.checkpoint("dense")) for change in changes]
    assert main(["validate", str(config), *changes]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_answers_of_a_base_are_not_taken_for_those_of_an_adapter(toys, trained, capsys, tmp_path):
    config, folder = trained
    data, out = write_records(toys.root / "asked.jsonl", toys.records[:1]), f"output={tmp_path / 'out'}"
    for verb, more in (("score", (f"data.eval={data}", out)), ("infer", (f"data.eval={data}", out)),
                       ("export", ("--out", str(tmp_path / "hf")))):  # fmt: skip
        assert main([verb, str(config), "adapter.type=lora", *more]) == 2
        assert "model.adapter is not set" in capsys.readouterr().err
    run = folder / "whole" / "checkpoints" / "step_00000004"
    assert main(["export", str(config), f"model.load={run}", "--out", str(tmp_path / "hf")]) == 2
    assert "contains an adapter without its base weights" in capsys.readouterr().err


def test_another_base_is_noticed(toys, trained, tmp_path):
    """A run of adapters does not continue on it; what reads the adapter says so."""
    config, _ = trained
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(toys.checkpoint("dense"), base)
    training = (config, f"model.load={base}", *LORA, "train.memory_check=false", f"output={run}")
    megavlm("sft", *training, "train.steps=1")
    data = f"data.eval={write_records(toys.root / 'one.jsonl', toys.records[:1])}"
    reading = (
        config,
        f"model.load={base}",
        f"model.adapter={run}",
        data,
        "overwrite=true",
        f"output={tmp_path / 'out'}",
    )
    assert "trained with a base model other than" not in megavlm("score", *reading).stderr
    file = next(base.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[-5000] ^= 1  # somewhere in the weights
    file.write_bytes(content)
    assert "trained with a base model other than" in megavlm("score", *reading).stderr
    assert "base below the adapters" in megavlm("sft", *training, "train.steps=2", status=2).stderr


def test_adapters_on_experts_alone_learn_and_continue(toys, tmp_path):
    """Megatron then has an optimizer of nothing beside that of the experts."""
    config = json.loads(sft_config(toys, tmp_path, optimizer="adam", lr=1e-2, steps=4, global_batch_size=4).read_text())
    config["model"] = {"hf": str(toys.folder("moe")), "load": str(toys.checkpoint("moe")),
                       "freeze": ["vision", "projector"]}  # fmt: skip
    config["adapter"] = {"type": "lora", "targets": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    path, lines = tmp_path / "experts.yaml", {}
    path.write_text(json.dumps(config))
    for name, steps in {"whole": (4,), "halves": (2, 4)}.items():
        for count in steps:
            changes = (f"train.steps={count}", f"output={tmp_path / name}", "parallel.expert=2", "--nproc", 2)
            megavlm("sft", path, *changes)
        lines[name] = steady(tmp_path / name)
    assert lines["whole"] == lines["halves"]
    assert lines["whole"][3]["loss"] < lines["whole"][0]["loss"]


def test_validate_counts_the_adapter(toys, trained, capsys):
    config, _ = trained
    assert main(["validate", str(config), *LORA]) == 0
    # rank 4 on q, v, down and qkv of four layers: 4 × 4 × (128 + 128 + 128 + 64 + 384 + 128 + 64 + 192)
    assert "lora on 16 linear layers: 19.5k weights" in " ".join(capsys.readouterr().out.split())


def test_a_base_in_4_bits_is_the_same_in_two_tensor_parallel_processes(toys, trained, tmp_path):
    config, _ = trained
    frozen = ("model.freeze=[vision, projector]", "adapter.type=lora", "train.steps=2", "train.memory_check=false")
    lines = {}
    for name, changes in {"one": ("adapter.quantize=nf4",), "two": ("adapter.quantize=nf4", *TP2), "full": ()}.items():
        megavlm("sft", config, *frozen, *changes, f"output={tmp_path / name}")
        lines[name] = [line["loss"] for line in metrics_of(tmp_path / name)]
    assert lines["two"] == pytest.approx(lines["one"], rel=1e-5)
    assert lines["full"] != pytest.approx(lines["one"], rel=1e-3)
