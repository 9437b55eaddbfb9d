"""Rows that are read ahead: as they are without it, and none is lost or read twice when a run stops before it."""

import json
import shutil
from pathlib import Path

import pytest
from parity import VARYING, settings_of

WAYS = ["as a whole", "in two parts", "with an error", "to an end", "nothing taken"]


class Source:
    """Rows from a list; its state is the number of rows that were taken."""

    sources = ()

    def __init__(self, rows, fails_at=None):
        self.rows, self.fails_at, self.state = rows, fails_at, [0]

    def __iter__(self):
        from megavlm.base.errors import UserError

        for number, row in enumerate(self.rows):
            if number == self.fails_at:
                raise UserError(f"row {number} cannot be read", "mend it")
            self.state[0] = number + 1
            yield row

    def state_dict(self):
        return [{"taken": self.state}]


def read(way: str):
    """Runs on every rank of a group of two. Returns what was read in two steps of three rows, and the states between.

    The states are those that a checkpoint would contain: before anything was read, with the first step's rows read
    ahead, with them taken, with the second step's rows read ahead, at the end; None on a rank without a source.
    """
    from packed import row_with

    from megavlm import platform
    from megavlm.base.errors import UserError
    from megavlm.config.settings import ParallelSettings
    from megavlm.data.row_source import HeldRows
    from megavlm.runtime import read_ahead
    from megavlm.runtime.read_ahead import ReadAhead

    groups = platform.init(ParallelSettings(tensor=2))
    held, source = None, None
    if groups.is_leader:
        rows = [row_with([(2, 2 * number)], 30 + number) for number in range(1, 5 if way == "to an end" else 7)]
        source = Source(rows, fails_at=4 if way == "with an error" else None)
        held = HeldRows(source)
    if way == "in two parts":
        read_ahead._MOST_BYTES = 1  # the first row is more than that, and those after it are read in time
    ahead = ReadAhead(iter(held) if held is not None else None, held, groups, 5.0)
    steps, states, really = [], [], []

    def note() -> None:
        if held is not None:
            states.append(held.state_dict()[0]["taken"][0])
            really.append(source.state[0])

    note()
    for _ in range(2):
        ahead.begin(3)
        note()
        if way == "nothing taken":
            break
        found = ahead.take(3)
        lengths = [len(row.input_ids) for row in found.hosts]
        assert [len(row.input_ids) for row in found.full] == (lengths if groups.is_leader else [])
        assert all(len(row.pixels) == 0 for row in found.hosts)
        assert [len(row.pixels) for row in found.full] == [4 * n for n in map(_number, lengths)][: len(found.full)]
        assert found.problem is None or isinstance(found.problem, UserError)
        steps.append(([_number(length) for length in lengths], found.problem and found.problem.message))
        note()
    ahead.close()
    read_ahead._MOST_BYTES = 1 << 30
    return steps, states, really


def _number(length: int) -> int:
    """The number of the row, from 1, that has this length."""
    return (length - 3) // 2 - 30


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_read_ahead(way, world2):
    (steps, states, really), (others, nothing, _) = world2.run(read, way)
    assert steps == others
    assert nothing == []
    if way == "nothing taken":
        assert (steps, states, really) == ([], [0, 0], [0, 3])
        return
    second = {"with an error": ([4], "row 4 cannot be read"), "to an end": ([4], None)}.get(way, ([4, 5, 6], None))
    assert steps == [([1, 2, 3], None), second]
    last = 3 + len(second[0])
    assert states == [0, 0, 3, 3, last], "a checkpoint has the rows that were taken"
    assert really == ([0, 1, 3, 4, 6] if way == "in two parts" else [0, 3, 3, last, last])


def train(settings: dict) -> int:
    """Runs on every rank: `megavlm sft`. Returns how often a step's rows were read ahead."""
    from megavlm.align.registry import make_method
    from megavlm.config.settings import Settings
    from megavlm.runtime.read_ahead import ReadAhead
    from megavlm.training.loop import train as train_by

    begun, begin = [], ReadAhead.begin
    ReadAhead.begin = lambda self, num_rows: (begun.append(num_rows), begin(self, num_rows))[1]
    try:
        made = Settings(**settings)
        assert train_by(made, make_method("sft", made)) == 0
    finally:
        ReadAhead.begin = begin
    return len(begun)


def test_a_run_continues_from_the_rows_that_it_has_trained_on(toys, tmp_path, world2):
    """The checkpoint of step 2 was written when the rows of step 3 had been read; from it, they come again."""
    data = tmp_path / "talks.jsonl"
    talk = lambda n: [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Four. " * (1 + n % 3)}]
    data.write_text("\n".join(json.dumps({"messages": talk(n)}) for n in range(40)))
    settings = settings_of(toys.folder("dense"), {"tensor": 2}, steps=4, memory_check=False, global_batch_size=2)
    settings["model"]["load"] = str(toys.checkpoint("dense"))
    settings["data"] |= {"train": [{"path": str(data)}], "workers": 0, "packing_buffer": 5, "seq_length": 64}
    settings |= {"output": str(tmp_path / "run"), "log": {"every": 1, "wandb": {"mode": "off"}}}
    settings |= {"checkpoint": {"every": 2, "keep": 5}}
    assert world2.run(train, settings) == [3, 3], "the rows of all steps but the first"
    before = lines_of(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in before] == [1, 2, 3, 4]
    shutil.rmtree(next((tmp_path / "run/checkpoints").glob("step_*4")))
    assert world2.run(train, settings) == [1, 1]
    assert lines_of(tmp_path / "run/metrics.jsonl") == before


def lines_of(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in VARYING} for line in lines]
