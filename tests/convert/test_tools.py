"""The three commands as a user starts them: output and exit status."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "checkpoint_tools"


def start(tool, *arguments):
    """Exit status of a tool, run in this process."""
    old, sys.argv = sys.argv, [tool, *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOLS / tool), run_name="__main__")
    finally:
        sys.argv = old
    return ended.value.code or 0


@pytest.mark.parametrize("tool", ["hf2mcore.py", "mcore2hf.py", "compare.py"])
def test_help_has_an_example(tool, capsys):
    assert start(tool, "--help") == 0
    assert f"example: python checkpoint_tools/{tool}" in capsys.readouterr().out


def test_there_back_and_compared(dense, tmp_path, capsys):
    mcore, back = tmp_path / "mcore", tmp_path / "back"
    assert start("hf2mcore.py", "--hf", dense, "--out", mcore) == 0
    assert f"{dense.name} → mcore" in capsys.readouterr().err  # the bar
    assert start("mcore2hf.py", "--mcore", mcore, "--hf", dense, "--out", back, "--dtype", "fp32", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert start("compare.py", "--a", mcore, "--b", back) == 0
    assert "tensors are bitwise identical" in capsys.readouterr().out
    half = ("--out", tmp_path / "half", "--dtype", "bf16")
    assert start("mcore2hf.py", "--mcore", mcore, "--hf", dense, *half) == 0
    assert start("compare.py", "--a", dense, "--b", tmp_path / "half", "--quiet") == 1
    output = capsys.readouterr().out
    assert "model.language_model.layers.2.self_attn.k_proj.weight" in output
    assert "tensors differ" in output


def test_one_message_and_status_2(tmp_path):
    command = [sys.executable, TOOLS / "hf2mcore.py", "--hf", tmp_path / "nowhere", "--out", tmp_path / "out"]
    environment = {"PYTHONPATH": str(TOOLS.parent), "PATH": ""}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: no such Hugging Face folder: {tmp_path / 'nowhere'}\n  → ")
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize("tool", ["hf2mcore.py", "mcore2hf.py", "compare.py"])
def test_help_waits_for_no_torch(tool):
    command = [sys.executable, "-X", "importtime", TOOLS / tool, "--help"]
    environment = {"PYTHONPATH": str(TOOLS.parent), "PATH": ""}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "argparse" in ended.stderr
    assert "torch" not in ended.stderr
