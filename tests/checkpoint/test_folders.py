"""The newest checkpoint that can be read is found, damaged ones are named, and what is read is not deleted."""

import errno
import os
import time

import pytest
import torch

from megavlm.checkpoint.folders import (
    best_of,
    find_checkpoint,
    latest,
    link_best,
    mend_best,
    partial_folder,
    publish,
)
from megavlm.checkpoint.held import held
from megavlm.convert.mcore_checkpoint import McoreCheckpoint, TensorToWrite, write_checkpoint


@pytest.fixture
def root(tmp_path):
    """Checkpoints of steps 100, 200 and 300."""
    for step in (100, 200, 300):
        folder = tmp_path / f"step_{step:08}"
        folder.mkdir()
        weight = torch.full((64, 64), float(step))
        write_checkpoint(
            folder,
            [TensorToWrite("language.x", (64, 64), torch.float32, lambda a, b, w=weight: w[a:b])],
            {"step": step},
        )
    return tmp_path


def test_the_newest(root):
    assert latest(root) == root / "step_00000300"


def test_nothing_there(tmp_path):
    assert latest(tmp_path / "checkpoints") is None
    (tmp_path / "step_00000100.partial").mkdir()
    (tmp_path / "notes").mkdir()
    assert latest(tmp_path) is None


@pytest.mark.parametrize("file", ["metadata.json", ".metadata", "__0_0_0.distcp"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged_ones_are_named(root, file, damage, caplog):
    path = root / "step_00000300" / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    data = root / "step_00000200" / "__0_0_0.distcp"
    data.write_bytes(data.read_bytes()[:-100])
    assert latest(root) == root / "step_00000100"
    messages = [record.getMessage() for record in caplog.records if record.name.endswith("checkpoint.folders")]
    assert "step_00000300" in messages[0]
    assert file in messages[0]
    assert "step_00000200 is incomplete: __0_0_0.distcp is" in messages[1]


def test_an_empty_folder_is_named(root, caplog):
    (root / "step_00000400").mkdir()
    assert latest(root) == root / "step_00000300"
    assert "step_00000400 is not a Megatron checkpoint" in caplog.text


def test_keeps_the_newest_and_every_nth(root):
    partial = partial_folder(root, 400, "0badcafe")
    (root / "step_00000300").rename(partial)
    (root / "step_00000500").mkdir()  # unreadable, passed over when the run resumed
    (root / "step_00000450.12345678.partial").mkdir()
    (root / "step_00000050.deleted").mkdir()
    publish(partial, keep=1, keep_every=100)
    kept = ["step_00000100", "step_00000200", "step_00000400", "step_00000500.unreadable"]
    assert sorted(path.name for path in root.iterdir()) == kept
    assert latest(root) == root / "step_00000400"
    (root / "step_00000400").rename(partial)
    publish(partial, keep=1, keep_every=200)
    assert sorted(path.name for path in root.iterdir()) == ["step_00000200", "step_00000400", kept[-1]]


def test_half_written_is_never_taken(root):
    (root / "step_00000300").rename(root / "step_00000400.partial")
    assert latest(root) == root / "step_00000200"


def publish_next(root, step):
    partial = partial_folder(root, step, "0badcafe")
    partial.mkdir()
    write_checkpoint(partial, [TensorToWrite("language.x", (1,), torch.float32, lambda a, b: torch.ones(1))], {})
    publish(partial, keep=1, keep_every=None)


@pytest.fixture
def run(tmp_path, root):
    """The same in the folder of a run."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for path in root.glob("step_*"):
        path.rename(folder / path.name)
    return folder


def test_what_is_held_stays_while_the_run_deletes_it(run):
    newest = latest(run)
    with held(newest) as kept:
        publish_next(run, 400)
        assert [path.name for path in run.glob("step_*") if path != kept] == ["step_00000400"]
        assert latest(run) == run / "step_00000400"
        checkpoint = McoreCheckpoint(kept)
        checkpoint.check_contents()
        assert torch.equal(checkpoint.read("language.x"), torch.full((64, 64), 300.0))
    assert [path.name for path in run.iterdir()] == ["step_00000400"]
    with pytest.raises(FileNotFoundError), held(newest):
        pass
    assert [path.name for path in run.iterdir()] == ["step_00000400"]


def test_what_a_killed_reader_has_held_is_deleted_a_day_later(run):
    for name, age in (("step_00000200.aaaaaaaa.held", 90_000), ("step_00000200.bbbbbbbb.held", 80_000)):
        (run / name).mkdir()
        os.utime(run / name, (time.time() - age,) * 2)
    publish_next(run, 400)
    assert sorted(path.name for path in run.iterdir()) == ["step_00000200.bbbbbbbb.held", "step_00000400"]


def test_where_there_are_no_links_the_checkpoint_itself_is_read(run, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with held(run / "step_00000300") as kept:
        assert kept == run / "step_00000300"
    assert "cannot be kept (Operation not permitted)" in caplog.text
    assert kept.is_dir()
    assert len(list(run.iterdir())) == 3


def test_only_checkpoints_of_a_run_are_held(root):
    with held(root) as kept:
        assert kept == root


def test_the_best_is_kept_and_linked(root):
    link_best(root, 100)
    assert (root / "best").readlink().as_posix() == "step_00000100"  # relative, so that the folder may be moved
    assert find_checkpoint(root / "best") == root / "step_00000100"
    partial = partial_folder(root, 400, "0badcafe")
    (root / "step_00000300").rename(partial)
    publish(partial, keep=1, keep_every=None, best=100)
    assert sorted(path.name for path in root.iterdir()) == ["best", "step_00000100", "step_00000400"]
    assert latest(root) == root / "step_00000400"
    (root / "step_00000400").rename(partial)
    publish(partial, keep=1, keep_every=None)  # the run no longer looks for the best
    assert best_of(root) == root / "step_00000100"
    (root / "step_00000400").rename(partial)
    publish(partial, keep=1, keep_every=None, best=400)
    assert sorted(path.name for path in root.iterdir()) == ["best", "step_00000400"]
    assert find_checkpoint(root / "best") == root / "step_00000400"


def test_a_best_that_was_not_saved_is_not_linked(root):
    link_best(root, 300)
    link_best(root, 250)
    assert best_of(root) is None
    assert not (root / "best").is_symlink()
    assert find_checkpoint(root / "best") == root / "best"  # and whoever reads it says that it does not exist


def test_the_best_link_is_mended(root):
    """It never leads to a checkpoint that cannot be read, or to a step that is done again."""
    assert mend_best(root, None, 300) == (None, [])
    assert mend_best(root, 200, 300) == (200, [])
    assert mend_best(root, None, 300) == (200, [])  # it stays
    linked, (told,) = mend_best(root, None, 100)
    assert (linked, (root / "best").is_symlink()) == (None, False)
    assert "step_00000200 is done again" in told
    (root / "step_00000300" / "__0_0_0.distcp").write_bytes(b"")
    linked, (told,) = mend_best(root, 300, 300)
    assert (linked, (root / "best").is_symlink()) == (None, False)
    assert "gone until the next evaluation" in told
    assert "step_00000300 is incomplete" in told
    assert mend_best(root, 250, 300) == (
        None,
        ["checkpoints/best is gone until the next evaluation: its checkpoint does not exist"],
    )
