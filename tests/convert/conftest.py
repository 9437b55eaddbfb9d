"""Folders that several tests read and that no test changes."""

import pytest
from tiny_models import make_folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("dense") / "hf", tied=True)


@pytest.fixture(scope="session")
def moe(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("moe") / "hf", moe=True)
