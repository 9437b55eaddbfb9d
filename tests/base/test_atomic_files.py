"""Files and folders appear whole or not at all, whatever interrupts the writing."""

import os

import pytest

from megavlm.base import atomic_files


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    atomic_files.write_text(path, "old")

    def write_half():
        with atomic_files.atomic_open(path) as file:
            file.write("half of the ne")
            file.flush()
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_half()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_written_files_have_ordinary_permissions(tmp_path):
    mask = os.umask(0o022)
    try:
        atomic_files.write_text(tmp_path / "file", "x")
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_an_interrupted_folder_leaves_the_old_one(tmp_path):
    out = tmp_path / "folder"
    with atomic_files.new_folder(out) as partial:
        (partial / "file").write_text("old")

    def write_half():
        with atomic_files.new_folder(out) as partial:
            (partial / "file").write_text("half of the ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert (out / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
