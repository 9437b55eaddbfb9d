"""Packages that are installed by half: a message that says what is missing, not a traceback."""

import importlib
import sys

import pytest

from megavlm.cli import failures

PARTS = {
    "a package": ("import onnxscript_that_nobody_has", "No module named 'onnxscript_that_nobody_has'"),
    "a library": ("raise FileNotFoundError('Could not find shared object file')", "Could not find shared object file"),
}


@pytest.mark.parametrize("name", PARTS)
def test_transformer_engine_says_what_it_lacks(name, tmp_path, monkeypatch, capsys):
    """As `import megatron.core` ends where TE lacks a part: with the exception of a module of TE."""
    line, missing = PARTS[name]
    for package in ("transformer_engine", "transformer_engine/pytorch"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "transformer_engine/pytorch/tensor.py").write_text(line)
    (tmp_path / "as_megatron.py").write_text("from transformer_engine.pytorch.tensor import QuantizedTensor")
    monkeypatch.syspath_prepend(tmp_path)
    for module in [module for module in sys.modules if module.partition(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises((ImportError, OSError)) as raised:
        importlib.import_module("as_megatron")
    for module in [module for module in sys.modules if module.partition(".")[0] == "transformer_engine"]:
        del sys.modules[module]
    assert failures.report(raised.value) == failures.USER_ERROR
    told = capsys.readouterr().err
    assert "Transformer Engine is installed, but cannot be imported" in told
    assert missing in told
    assert "uninstall transformer_engine" in told
    assert "Traceback" not in told


def test_a_failure_within_it_keeps_its_traceback(tmp_path, monkeypatch, capsys):
    """Only imports are meant: what TE raises while it works is a failure like any other."""
    module = type(sys)("transformer_engine.pytorch")
    exec("def forward():\n    raise RuntimeError('shapes')", vars(module))
    with pytest.raises(RuntimeError) as raised:
        module.forward()
    assert failures.report(raised.value) == failures.OTHER_ERROR
    assert "Traceback" in capsys.readouterr().err
