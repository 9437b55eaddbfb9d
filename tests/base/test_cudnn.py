"""Transformer Engine loads the cuDNN that torch loads."""

import os
from importlib.machinery import ModuleSpec

import pytest

import megavlm


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of cuDNN, as pip installs it."""
    (tmp_path / "lib").mkdir()
    spec = ModuleSpec("nvidia.cudnn", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(megavlm.importlib.util, "find_spec", lambda name: spec if name == "nvidia.cudnn" else None)
    monkeypatch.setenv("CUDNN_HOME", "")
    monkeypatch.delenv("CUDNN_HOME")
    return tmp_path


def test_that_of_torchs_package(package):
    megavlm._share_cudnn()
    assert os.environ["CUDNN_HOME"] == str(package)


def test_what_is_set_stays(package, monkeypatch):
    monkeypatch.setenv("CUDNN_HOME", "/opt/cudnn")
    megavlm._share_cudnn()
    assert os.environ["CUDNN_HOME"] == "/opt/cudnn"


def test_torch_without_a_package_of_cudnn(package, monkeypatch):
    (package / "lib").rmdir()
    megavlm._share_cudnn()
    assert "CUDNN_HOME" not in os.environ

    def missing(name):
        raise ModuleNotFoundError("No module named 'nvidia'")

    monkeypatch.setattr(megavlm.importlib.util, "find_spec", missing)
    megavlm._share_cudnn()
    assert "CUDNN_HOME" not in os.environ
