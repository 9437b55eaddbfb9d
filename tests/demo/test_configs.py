"""The demo's configurations load, follow each other, keep held-out questions apart, and hold their samples."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megavlm.config.load import load_settings
from megavlm.demo.commands import DEFAULT_OUT, OUT_VARIABLE
from megavlm.demo.data import HELDOUT_FILE, PHOTOGRAPH_PIXELS, TRAIN_FILES
from megavlm.demo.model_folder import TEXT
from megavlm.demo.rl import RL
from megavlm.demo.run import STAGES
from megavlm.demo.tune import TUNE
from megavlm.layout.shapes import check_layout

# Those of the other demos: where each starts, below the demo's folder.
TUNE_STARTS = {"rm": "stage3", "mediocre": "stage3", "dpo": f"{TUNE}/mediocre", "lora": "stage3"}
RL_STARTS = {"weak": "stage3", "grpo": f"{RL}/weak", "ppo": f"{RL}/weak"}
STARTS = TUNE_STARTS | RL_STARTS
CONFIGS = Path(__file__).parents[2] / "configs" / "demo"


@pytest.fixture(autouse=True)
def _default_folder(monkeypatch):
    monkeypatch.delenv(OUT_VARIABLE, raising=False)


@pytest.mark.parametrize("stage", STAGES)
def test_config_has_its_place_in_the_chain(stage):
    settings = load_settings(CONFIGS / f"{stage}.yaml")
    out, position = Path(DEFAULT_OUT), STAGES.index(stage)
    assert settings.stage == (position if stage != "sft" else None)
    assert settings.model.load == out / (STAGES[position - 1] if position else "model")
    assert settings.output == out / stage


@pytest.mark.parametrize("name", STARTS)
def test_tuning_config_has_its_place(name):
    settings = load_settings(CONFIGS / f"{name}.yaml")
    assert settings.model.load == Path(DEFAULT_OUT) / STARTS[name]
    assert settings.output == Path(DEFAULT_OUT) / (TUNE if name in TUNE_STARTS else RL) / name


@pytest.mark.parametrize("name", [*STAGES, *STARTS])
def test_config_suits_two_processes(name):
    settings = load_settings(CONFIGS / f"{name}.yaml")
    assert settings.model.hf == Path(DEFAULT_OUT) / "model"
    assert settings.parallel.tensor == (1 if name in ("grpo", "ppo") else 2)
    assert settings.parallel.sequence_parallel == (settings.parallel.tensor == 2)
    data_parallel = check_layout(
        settings.parallel,
        2,
        num_heads=TEXT["num_attention_heads"],
        num_kv_heads=TEXT["num_key_value_heads"],
        vocab_size=1024,
        num_experts=None,
        num_layers=TEXT["num_hidden_layers"],
        seq_length=settings.data.seq_length,
        global_batch_size=settings.train.global_batch_size,
    )
    assert data_parallel == 2 / settings.parallel.tensor


def test_only_stage_0_freezes_and_rows_grow():
    stages = [load_settings(CONFIGS / f"{stage}.yaml") for stage in STAGES]
    assert [sorted(settings.model.freeze) for settings in stages] == [["language", "vision"], [], [], [], []]
    lengths = [settings.data.seq_length for settings in stages[:4]]
    assert lengths == sorted(lengths)
    assert lengths[1] < lengths[2] < lengths[3]


def test_heldout_questions_are_in_no_training_list():
    for stage in STAGES:
        settings = load_settings(CONFIGS / f"{stage}.yaml")
        names = {source.path.stem for source in settings.data.train}
        assert names <= set(TRAIN_FILES)
    assert settings.data.eval[0].path.stem == HELDOUT_FILE


@pytest.mark.parametrize("name", STARTS)
def test_tuning_learns_from_questions_and_pairs_of_them(name):
    settings = load_settings(CONFIGS / f"{name}.yaml")
    learned = {"rm": "pairs", "dpo": "sampled_pairs"}
    assert [source.path.stem for source in settings.data.train] == [learned.get(name, "questions")]
    assert settings.data.eval[0].path.stem == ("all_answers" if name == "rm" else HELDOUT_FILE)


def test_lora_differs_from_tuning_all_weights_by_what_learns_and_how_fast():
    changed = {"model": {"freeze"}, "adapter": True, "train": {"lr"}, "output": True}
    sft, lora = (load_settings(CONFIGS / f"{name}.yaml") for name in ("sft", "lora"))
    assert sft.model_dump(exclude=changed) == lora.model_dump(exclude=changed)
    assert lora.adapter.type == "lora"


@pytest.mark.parametrize("stage", STAGES)
def test_every_sample_fits_into_a_row(stage, demo_data, demo_model):
    settings = load_settings(CONFIGS / f"{stage}.yaml")
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    longest = 0
    for name in {source.path.name for source in settings.data.train}:
        for line in (demo_data / name).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            turns = [{"content": record["text"]}] if "text" in record else record["messages"]
            text = "".join(turn["content"] for turn in turns)
            photographs = sum(path.startswith("photographs/") for path in record.get("images", []))
            digits = len(record.get("images", [])) - photographs
            visual = digits + photographs * (PHOTOGRAPH_PIXELS // 32) ** 2  # and a start and an end mark each
            marks = 2 * (digits + photographs) + 8  # 8: the chat template's, or the end of the text
            longest = max(longest, len(tokenizer(text.replace("<image>", "")).input_ids) + visual + marks)
    assert longest <= settings.data.seq_length
