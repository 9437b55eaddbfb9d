"""The released models' recipes."""

from pathlib import Path

import pytest

from megavlm.config.load import load_settings
from megavlm.convert.hf_shapes import model_shapes

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch):
    """A function of a model's name: the settings of its tune/sft.yaml, and its shapes."""

    def load(model: str):
        monkeypatch.chdir(CONFIGS.parent)
        monkeypatch.setenv("MEGAVLM_MODEL", model)
        settings = load_settings(CONFIGS / "tune/sft.yaml")
        return settings, model_shapes(settings.model)

    return load
