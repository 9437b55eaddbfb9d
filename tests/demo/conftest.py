"""The demo's data and model folder, made once for all tests here."""

from pathlib import Path

import pytest

from megavlm.demo.data import read_texts, write_data
from megavlm.demo.model_folder import make_model_folder


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("demo") / "data")


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory, demo_data) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("demo") / "model", corpus=read_texts(demo_data), vocab_size=1024)
