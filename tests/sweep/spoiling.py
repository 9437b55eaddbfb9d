"""Ways in which a file can be spoiled, and commands in this process or in one of their own."""

import contextlib
import ctypes
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import forked_command
import pytest

from megavlm.cli.main import main

TOOLS = Path(__file__).resolve().parents[2] / "checkpoint_tools"

FAULTS = {
    "truncated": lambda data: data[: len(data) * 2 // 3],
    "emptied": lambda data: b"",
    "other JSON": lambda data: b'{"a": [1, null, {"b": "c"}]}',
    "a list": lambda data: b"[[], 1]",
    "nested too deeply": lambda data: b"[" * 20_000,
    "binary": lambda data: bytes(range(256)) * 16,
    "a folder": None,
    "a dangling link": None,
    "not permitted": lambda data: data,
}
_CAPABILITIES = 0x20080522  # version 3 of the structures of capget and capset
_ANY_FILE = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextlib.contextmanager
def ordinary_rights() -> Iterator[None]:
    """This thread may not open what its permissions forbid, even as root, for whom they do not count otherwise."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice
    assert libc.capget(header, sets) == 0
    before, sets[0] = sets[0], sets[0] & ~_ANY_FILE
    assert libc.capset(header, sets) == 0, "capset"
    try:
        yield
    finally:
        sets[0] = before
        assert libc.capset(header, sets) == 0, "capset"


@contextlib.contextmanager
def spoiled(path: Path, fault: str) -> Iterator[None]:
    """The file with this fault, for a while."""
    aside = path.with_name(path.name + ".aside")
    path.rename(aside)
    try:
        if fault == "a folder":
            path.mkdir()
        elif fault == "a dangling link":
            path.symlink_to(path.parent / "nowhere")
        else:
            path.write_bytes(FAULTS[fault](aside.read_bytes()))
        if fault == "not permitted":
            path.chmod(0)
            with ordinary_rights():
                yield
        else:
            yield
    finally:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        aside.rename(path)


def run_here(capfd: pytest.CaptureFixture, *arguments: object) -> tuple[int, str]:
    """Status and standard error of `megavlm ARGUMENTS`, or of a checkpoint tool ("compare.py", …), in this process."""
    words = [str(argument) for argument in arguments]
    capfd.readouterr()
    status = _tool(words) if words[0].endswith(".py") else main(words)
    return status, capfd.readouterr().err


def _tool(words: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        try:
            runpy.run_path(str(TOOLS / words[0]), run_name="__main__")
        except SystemExit as ended:
            return ended.code or 0
    raise AssertionError("a tool ends with sys.exit")


def run_apart(*arguments: object) -> tuple[int, str]:
    """The same for a verb that builds a model and its process groups: in a forked process."""
    done = forked_command.run([str(argument) for argument in arguments])
    return done.returncode, done.stderr


def check_words(status: int, printed: str, *names: str) -> None:
    """Fails unless a command ended with status 2 and one message of readable length that has one of the `names`."""
    assert "Traceback" not in printed, printed
    assert status == 2, (status, printed)
    assert printed.count("error: ") == 1, printed
    assert 20 < len(printed) < 2000, printed
    assert any(name in printed for name in names), printed
