"""Configuration files in a scratch folder, which is also the current directory."""

from pathlib import Path

import pytest

from megavlm.base.errors import UserError
from megavlm.config.load import load_settings


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(name, text): makes a file in the scratch folder and returns its path relative to it."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def refused(write):
    """refused(text, *overrides): the UserError that a file of this text raises."""

    def refused(text: str, *overrides: str) -> UserError:
        with pytest.raises(UserError) as caught:
            load_settings(write("run.yaml", text), overrides)
        return caught.value

    return refused
