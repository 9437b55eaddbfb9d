"""A full disk ends the run with one message that says what to do, and costs no checkpoint that is whole."""

import shutil
import subprocess

import pytest
from killing import Commands
from test_kill import reached, sft  # noqa: F401 (a fixture)

MIB = 2**20


@pytest.fixture(scope="module")
def commands():
    commands = Commands()
    yield commands
    commands.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own in memory, resized by calling it with a number of bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size: int, *options: str) -> None:
        options = ",".join([*options, f"size={size}"])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs to mount a small file system: {done.stderr.strip()}")

    resize(MIB)
    yield folder, lambda size: resize(size, "remount")
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_full_disk(background, commands, sft, small_disk, tmp_path):  # noqa: F811
    output, (disk, resize) = tmp_path / "run", small_disk
    arguments = lambda steps: sft(output, steps, [f"checkpoint.async={background}"])
    assert commands.run(arguments(2), 2, output).statuses == [0, 0]
    first = output / "checkpoints"
    size = sum(file.stat().st_size for file in first.glob("*/*"))
    resize(size + size // 2)  # room for one and a half
    shutil.copytree(first, disk, dirs_exist_ok=True)
    shutil.rmtree(first)
    first.symlink_to(disk)

    log = output.with_suffix(".log")
    log.write_text("")
    outcome = commands.run(arguments(8), 2, output)
    told = " ".join(log.read_text().split())
    assert 2 in outcome.statuses, told
    assert 0 not in outcome.statuses
    assert not outcome.survivors
    assert told.count("error: cannot write the checkpoint") == 1
    assert "step_00000004" in told
    assert f"No space left on device; it needs {size / 1e9:.2g}"[:-1] in told
    assert "GB are free there" in told
    assert "free some space" in told
    assert "Traceback" not in told
    assert [path.name for path in disk.iterdir()] == ["step_00000002"]
    assert reached(output) == 2

    resize(10 * size)
    assert commands.run(arguments(8), 2, output).statuses == [0, 0], log.read_text()
    assert reached(output) == 8
