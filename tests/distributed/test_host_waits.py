"""A whole training step waits for the device as often as docs/performance.md says, and sends what it says."""

import re
from collections import Counter
from pathlib import Path

import pytest
from host_waits import nothing_kept, watched_step
from test_dry_run import alone

PAGE = Path(__file__).parents[2] / "docs/performance.md"
READ = ("megavlm/optim/grad_stats.py:read_grad_stats", "copies from the device")
# name: (model, layout, number of ranks, the rank that is watched)
WATCHED = {
    "first stage": ("dense", {"tensor": 2, "pipeline": 2, "context": 2}, 8, 0),
    "last stage": ("dense", {"tensor": 2, "pipeline": 2, "context": 2}, 8, 4),
    "experts": ("moe", {"expert": 2}, 2, 0),
}


def watch(folders: dict, name: str):
    """Runs on a rank of the pool, which leaves its world for this."""
    kind, layout, size, rank = WATCHED[name]
    with alone(), nothing_kept():
        return watched_step(folders[kind], layout, rank, size)


@pytest.fixture(scope="module")
def seen(toys, world1):
    """By name: the waits and the collectives of a step."""
    folders = {kind: toys.folder(kind) for kind in ("dense", "moe")}
    return {name: world1.run(watch, folders, name)[0] for name in WATCHED}


@pytest.mark.parametrize("name", ["first stage", "last stage"])
def test_a_dense_step_waits_once(seen, name):
    waits, _ = seen[name]
    assert waits == {READ: 1}


def test_experts_wait_for_their_dispatcher_and_for_nothing_else(seen):
    waits, _ = seen["experts"]
    dispatcher = "megatron/core/transformer/moe/"
    others = {place: count for place, count in waits.items() if not place[0].startswith(dispatcher)}
    assert others == {READ: 1}
    assert rows_of("of a step with experts") == sorted(
        [f"`{place.rpartition('/')[2]}`", what, str(count)]
        for (place, what), count in waits.items()
        if (place, what) != READ
    )


@pytest.mark.parametrize("name", ["first stage", "last stage"])
def test_collectives_are_those_of_the_table(seen, name):
    _, collectives = seen[name]
    counts: Counter = Counter()
    sizes: Counter = Counter()
    for what, where, group, nbytes in collectives:
        counts[what, where, group] += 1
        sizes[what, where, group] += nbytes
    assert rows_of(name.removeprefix("the ")) == sorted(
        [f"`{what}`", where, group, str(count), f"{sizes[what, where, group]:,}"]
        for (what, where, group), count in counts.items()
    )


def test_one_small_message_goes_over_the_host_network(seen):
    for name in ("first stage", "last stage", "experts"):
        on_host = [one for one in seen[name][1] if one[1] == "host"]
        assert [(what, group) for what, _, group, _ in on_host] == [("allreduce", "world")]


def rows_of(title: str) -> list[list[str]]:
    """The cells of the first columns of the table under the heading that ends in ``title``, sorted."""
    part = re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.M)
    (section,) = [one for one in part if one.partition("\n")[0].endswith(title)]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    width = 3 if title.endswith("experts") else 5
    return sorted([cell.strip() for cell in line.strip("|").split("|")][:width] for line in lines)
