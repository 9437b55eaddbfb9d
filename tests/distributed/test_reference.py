"""Making a reference file: an interrupted start is continued, and the samples may be fewer than the ranks."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from parity import settings_of
from test_preference import pairs_of
from toy import write_records


class Interrupted(Exception):
    pass


def make(settings: dict, most: int | None):
    """Runs on every rank: the tables, and the number of windows; no tables if there are more than `most` windows."""
    from megavlm.align import reference
    from megavlm.align.reference_rows import AnswerData
    from megavlm.config.settings import Settings
    from megavlm.runtime.session import start
    from megavlm.training.method import FileRows

    windows = 0

    def heartbeat(done: str) -> None:
        nonlocal windows
        if windows == most:
            raise Interrupted
        windows += 1

    session = start(Settings(**settings), training=True, load=False)
    files = FileRows.of(session, "pair")
    data = AnswerData(files.loader.sources, files.renderer, files.loader.fatal)
    every, reference._SAVED_EVERY = reference._SAVED_EVERY, 0.0
    try:
        return reference.reference_of(session, data, "pair", heartbeat).tables, windows
    except Interrupted:
        return None, windows
    finally:
        reference._SAVED_EVERY = every
        files.loader.close()


@pytest.fixture
def settings(toys, tmp_path):
    """settings(output, pairs, …): of a run on so many pairs; its rows are short."""

    def settings(output: str, pairs: int = 8, workers: int = 0) -> dict:
        values = settings_of(toys.folder("dense"), {}, seq_length=512)
        values["model"]["load"] = str(toys.checkpoint("dense"))
        path = write_records(toys.root / f"pairs{pairs}.jsonl", pairs_of(toys.records)[:pairs])
        values["data"] |= {"train": [{"path": str(path)}], "workers": workers}
        (tmp_path / output).mkdir(exist_ok=True)
        return {**values, "output": str(tmp_path / output)}

    return settings


def test_an_interrupted_reference_is_continued_bit_for_bit(settings, world2, tmp_path):
    whole, windows = world2.run(make, settings("whole"), None)[0]
    assert windows > 1
    assert world2.run(make, settings("run"), windows - 1)[0] == (None, windows - 1)
    partial = Path(tmp_path / "run" / "reference.safetensors.partial")
    assert partial.exists()
    for found, rest in world2.run(make, settings("run"), None):
        assert rest == 1
        np.testing.assert_array_equal(found, whole)
    assert not partial.exists()


def test_with_other_workers_only_what_is_missing_is_computed(settings, world1):
    whole, windows = world1.run(make, settings("whole"), None)[0]
    world1.run(make, settings("run"), windows - 1)
    found, rest = world1.run(make, settings("run", workers=2), None)[0]
    assert rest < windows
    np.testing.assert_allclose(found, whole, rtol=1e-5)  # the rows hold other samples


def test_one_pair_on_two_data_ranks(settings, world1, world2):
    """The rank without a sample takes part in the forward passes with a row that does not count."""
    ((alone, _),) = world1.run(make, settings("alone", pairs=1), None)
    for found, _ in world2.run(make, settings("both", pairs=1), None):
        np.testing.assert_array_equal(found, alone)
    assert not np.isnan(alone).any()


@pytest.mark.parametrize("repaired", ["line", "picture"])
def test_only_repaired_samples_are_computed_again(repaired, settings, toys, world1):
    """No file is to be removed: a changed line is known by its digest, and a missing picture left no value."""
    values = settings("run")
    pairs = pairs_of(toys.records)[:8]
    number = next(n for n, pair in enumerate(pairs) if pair.get("images"))
    mended = toys.root / "mended.png"
    mended.unlink(missing_ok=True)
    good = pairs[number]
    if repaired == "picture":
        shutil.copy(toys.root / good["images"][0], toys.root / "copy of it.png")
        bad = good = {**good, "images": [mended.name, *good["images"][1:]]}
    else:
        bad = {**good, "chosen": good["rejected"], "rejected": good["chosen"]}
    data = write_records(toys.root / f"repaired {repaired}.jsonl", [*pairs[:number], bad, *pairs[number + 1 :]])
    values["data"]["train"] = [{"path": str(data)}]
    (before,), windows = world1.run(make, values, None)[0]
    assert windows > 1
    assert np.isnan(before[number]).all() == (repaired == "picture")

    write_records(data, [*pairs[:number], good, *pairs[number + 1 :]])
    if repaired == "picture":
        shutil.copy(toys.root / "copy of it.png", mended)
    (after,), again = world1.run(make, values, None)[0]
    others = np.arange(len(pairs)) != number
    assert again == 1
    np.testing.assert_array_equal(after[others], before[others])
    assert not np.isnan(after).any()
    expected = settings("whole")
    expected["data"]["train"] = values["data"]["train"]
    (whole,), _ = world1.run(make, expected, None)[0]
    np.testing.assert_allclose(after, whole, rtol=1e-5)  # the rows hold other samples
    assert abs(whole[number] - before[number]).min() > 1 or repaired == "picture"
    assert world1.run(make, values, None)[0][1] == 0
