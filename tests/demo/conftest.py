"""The demo's data and model folder, made once for all tests here; and its commands, not run but noted."""

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from megavlm.demo import commands
from megavlm.demo.data import read_texts, write_data
from megavlm.demo.model_folder import make_model_folder


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("demo") / "data")


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory, demo_data) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("demo") / "model", corpus=read_texts(demo_data), vocab_size=1024)


@pytest.fixture
def own_environment(monkeypatch, tmp_path) -> None:
    """What the demos set and where they go is undone."""
    monkeypatch.setenv(commands.OUT_VARIABLE, "")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pretrained(tmp_path, demo_data, demo_model) -> Path:
    """The folder of a demo that has been pretrained."""
    out = tmp_path / "out"
    (out / "stage3" / "checkpoints" / "step_00000006").mkdir(parents=True)
    (out / "data").symlink_to(demo_data)
    (out / "model").symlink_to(demo_model)
    return out


@dataclass
class Started:
    """Commands that would have been run, and the verb of the one that fails."""

    commands: list[list[str]] = field(default_factory=list)
    failing: str | None = None

    def __call__(self, command: list[str]) -> SimpleNamespace:
        self.commands.append(command)
        return SimpleNamespace(returncode=3 if self.failing in command else 0)


@pytest.fixture
def started(monkeypatch) -> Started:
    noted = Started()
    monkeypatch.setattr(subprocess, "run", noted)
    return noted
