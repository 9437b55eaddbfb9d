"""The configurations for clusters: each recipe with each model fits the number of GPUs that the model's file names."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from cluster_recipes import CONFIGS, METHODS, MODELS, RECIPES, STAGES, fitting, world_of
from transformers import AutoConfig, AutoModelForImageTextToText

from megavlm.base import yaml_files
from megavlm.cli.main import main
from megavlm.config import describe
from megavlm.config.load import load_settings
from megavlm.sources.blend import open_sources


@pytest.fixture(autouse=True)
def _at_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the files are relative to the checkout; the reader's own variables do not count."""
    monkeypatch.chdir(CONFIGS.parent)
    for name in ("MODEL", "MODELS", "DATA", "RUNS"):
        monkeypatch.delenv(f"MEGAVLM_{name}", raising=False)


def test_the_lists_are_what_the_folders_hold() -> None:
    assert sorted(MODELS) == sorted(path.stem for path in CONFIGS.glob("models/*.yaml"))
    assert sorted(MODELS) == sorted(path.parent.name for path in CONFIGS.glob("models/*/config.json"))
    folders = ("pretrain", "tune", "align")
    found = [path.relative_to(CONFIGS) for folder in folders for path in CONFIGS.glob(f"{folder}/*")]
    assert {path.suffix for path in found} == {".yaml"}
    assert sorted(RECIPES) == sorted(path.with_suffix("").as_posix() for path in found)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_recipe_passes_validate_for_the_intended_world(
    model: str, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """From the shapes alone: no weights, no data."""
    monkeypatch.setenv("MEGAVLM_MODEL", model)
    world = world_of(model)
    status = main(["validate", f"configs/{recipe}.yaml", "--world-size", str(world), "--no-files"])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    assert f"{world} processes" in shown.out
    assert f"configs/models/{model} " in shown.out


@pytest.mark.parametrize("model", MODELS)
def test_recipes_pass_validate_for_the_worlds_of_the_table(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MEGAVLM_MODEL", model)
    cases = fitting(model)
    assert len(cases) >= len(RECIPES)
    for world, recipe in cases:
        status = main(["validate", f"configs/{recipe}.yaml", "--world-size", str(world), "--no-files"])
        assert status == 0, (world, recipe, capsys.readouterr().err)


@pytest.mark.parametrize("model", MODELS)
def test_model_file_stands_alone(model: str) -> None:
    """For score, infer and export, which need no recipe."""
    assert load_settings(CONFIGS / "models" / f"{model}.yaml").model.hf.name == model


# As the model cards round them: a wrong layer count, width or tied embedding shows.
PARAMETERS = {"2b": 2.13e9, "4b": 4.44e9, "8b": 8.77e9, "32b": 33.4e9, "30b-a3b": 31.1e9, "235b-a22b": 236e9}


@pytest.mark.parametrize("model", MODELS)
def test_shapes_have_the_released_number_of_parameters(model: str) -> None:
    config = AutoConfig.from_pretrained(CONFIGS / "models" / model, local_files_only=True)
    with torch.device("meta"):
        reference = AutoModelForImageTextToText.from_config(config)
    count = sum(parameter.numel() for parameter in reference.parameters())
    assert float(f"{count:.3g}") == PARAMETERS[model]


def test_stages_are_the_published_ones() -> None:
    """Freeze sets, row lengths and numbers of tokens, and each stage starts from the last step of the one before."""
    stages = [load_settings(CONFIGS / f"{name}.yaml") for name in STAGES]
    assert [settings.stage for settings in stages] == [0, 1, 2, 3]
    assert [settings.model.freeze for settings in stages] == [["vision", "language"], [], [], []]
    assert [settings.data.seq_length for settings in stages] == [8192, 8192, 32768, 262144]
    tokens = [s.train.steps * s.train.global_batch_size * s.data.seq_length for s in stages]
    assert tokens == pytest.approx([67e9, 1e12, 1e12, 100e9], rel=0.01)
    last = [s.output / "checkpoints" / f"step_{s.train.steps:08d}" for s in stages]
    assert [settings.model.load for settings in stages[1:]] == last[:-1]
    assert len({settings.output for settings in stages}) == 4


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_trained_where_the_weights_are_and_each_starts_from_the_one_of_sft(method: str) -> None:
    full, lora = (load_settings(CONFIGS / f"{method}{tuner}.yaml") for tuner in ("", "-lora"))
    assert lora.adapter.type == "lora"
    assert lora.train.lr == pytest.approx(10 * full.train.lr)
    assert lora.output.name == f"{Path(method).name}-lora"
    start = load_settings(CONFIGS / "tune/sft.yaml").model.load
    assert lora.model.load == start
    assert lora.model.adapter == (None if method == "tune/sft" else lora.output.parent / "sft-lora")
    theirs = {"model", "adapter", "train", "output"}
    if method == "align/ppo":  # its reward model is an adapter, too
        assert [lora.reward[0].model, lora.align.critic.load] == [lora.output.parent / "rm-lora"] * 2
        assert lora.align.critic.lr == pytest.approx(10 * full.align.critic.lr)
        theirs |= {"reward", "align"}
    assert lora.model_dump(exclude=theirs) == full.model_dump(exclude=theirs)


@pytest.mark.parametrize("variable", ["MEGAVLM_MODELS", "MEGAVLM_DATA", "MEGAVLM_RUNS"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_variables_reach_the_paths(recipe: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "/elsewhere")
    settings = load_settings(CONFIGS / f"{recipe}.yaml")
    paths = {
        "MEGAVLM_MODELS": [settings.model.hf],
        "MEGAVLM_DATA": [source.path for source in settings.data.leaves.values()],
        "MEGAVLM_RUNS": [settings.model.load, settings.model.adapter or settings.model.load, settings.output],
    }[variable]
    assert all(path.is_relative_to("/elsewhere") for path in paths)


MIXTURES = {  # names and shares of the samples
    "pretrain/stage0": {"captions": 0.75, "text-in-pictures": 0.25},
    "pretrain/stage1": {"captions": 0.3, "interleaved": 0.225, "conversations": 0.225, "text": 0.25},
    "pretrain/stage2": {
        "documents": 0.32, "videos": 0.24, "long-text": 0.24, "interleaved": 0.1, "conversations": 0.1,
    },
    "pretrain/stage3": {
        "long-documents": 0.32, "long-videos": 0.24, "books": 0.24, "documents": 0.1, "videos": 0.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("recipe", STAGES)
def test_each_stage_reads_its_mixture_and_validate_names_what_is_missing(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MEGAVLM_DATA", str(tmp_path))
    assert main(["validate", f"configs/{recipe}.yaml", "model.load=configs"]) == 2
    told = capsys.readouterr().err
    missing = re.findall(rf"  data\.\S+\.path: {tmp_path}/(\S+)", told)
    assert sorted(missing) == sorted(MIXTURES[recipe])
    for name in missing[:-1]:
        (tmp_path / name).write_text('{"text": "words"}\n')
    assert main(["validate", f"configs/{recipe}.yaml", "model.load=configs"]) == 2
    assert re.search(rf"data\.\S+\.path is {tmp_path}/{missing[-1]}, which does not exist", capsys.readouterr().err)
    (tmp_path / missing[-1]).write_text('{"text": "words"}\n')
    shares = {source.name: source.share for source in open_sources(load_settings(CONFIGS / f"{recipe}.yaml").data)}
    assert shares == pytest.approx(MIXTURES[recipe])


def leaves(tree: dict, above: tuple[str, ...] = ()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*above, key))
        else:
            yield (*above, key), value


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_no_file_restates_a_default(path: Path) -> None:
    values = yaml_files.read_file(path)
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", own.get("base", ""))
    of_base = dict(leaves(yaml_files.read_file(path.parent / base).tree)) if base else {}
    for location, value in leaves(values.tree):
        if not values.origin(location).startswith(f"{path}:"):
            continue  # set by a base
        field, key = describe.find(location), ".".join(location)
        assert field is not None, f"unknown setting {key}"
        if not field.is_required() and location not in of_base:  # otherwise it takes back what the base has set
            assert value != field.get_default(call_default_factory=True), f"{key} is the default anyway"
