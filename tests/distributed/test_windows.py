"""Features do not pile up: nothing keeps a window of a step while the next one is made."""

import weakref
from pathlib import Path

from parity import settings_of, train_layout


def alive_at_each_window(folder: Path, checkpoint: Path, root: Path, records: list[dict], settings: dict) -> list[int]:
    """Runs on a rank: how many earlier windows, or rows with pixels of theirs, exist when each window is made."""
    from megavlm.runtime.feed import Feed

    make, made, alive = Feed._window, [], []

    def watched(self, *args):
        alive.append(sum(thing() is not None for thing in made))
        window = make(self, *args)
        made.append(weakref.ref(window))
        return window

    Feed._window = watched
    try:
        train_layout(folder, checkpoint, root, records, settings)
    finally:
        Feed._window = make
    return alive


def test_a_window_is_gone_before_the_next_one_is_made(world1, toys) -> None:
    settings = settings_of(toys.folder("dense"), {}, vision={"window": 1})
    here = toys.folder("dense"), toys.checkpoint("dense"), toys.root, toys.records
    alive = world1.run(alive_at_each_window, *here, settings)[0]
    assert len(alive) > 4
    assert not any(alive)
