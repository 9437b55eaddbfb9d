"""A method that brings its own rows, and hooks beside the steps: what the training loop does with both."""

import json
from pathlib import Path
from unittest import mock

from parity import ROWS, settings_of


class OwnRows:
    """Rows from a list, over and over; its state is the number of rows taken."""

    sources = ()

    def __init__(self, rows):
        self.rows, self.taken, self.closed = rows, 0, False

    def __iter__(self):
        while True:
            self.taken += 1
            yield self.rows[(self.taken - 1) % len(self.rows)]

    def state_dict(self):
        return [{"taken": self.taken}]

    def load_state_dict(self, states):
        self.taken = states[0]["taken"]

    def close(self):
        self.closed = True


def train(folder: Path, root: Path, records: list[dict], settings: dict):
    """Runs on every rank: a run by a method of its own. Returns rows taken, whether they are closed, hooks' calls."""
    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.media.files import in_folder
    from megavlm.training.hooks import Hook
    from megavlm.training.loop import train as train_by
    from megavlm.training.method import Prepared
    from megavlm.training.objective import CrossEntropy
    from megavlm.training.run import Run

    renderer, sources, calls = Renderer(folder, Settings(**settings).data), [], []

    class Method:
        title, scores = "a method of its own", False

        def bare_objective(self, session):
            return CrossEntropy(["own"], 64)

        def prepare(self, session, heartbeat):
            samples = [
                renderer.encode(record, in_folder(root), f"record {i}", kind="tune", index=i)
                for i, record in enumerate(records)
            ]
            sources.append(OwnRows([renderer.pack([samples[i] for i in row]) for row in ROWS]))
            return Prepared(self.bare_objective(session), sources[-1], None)

    def every_second(run, step, say):
        calls.append(step)
        return {"eval/loss": 0.5 * step}

    def report(run, step, monitor):
        """As a method does that logs the sampled answers of odd steps."""
        if step % 2:
            monitor.record_rollouts(step, [])

    hooks = [
        Hook(every_second, every=2),
        Hook(lambda run, step, say: calls.append(("answers", step)), at_answers=True),
        Hook(lambda run, step, say: calls.append(("end", step)), at_end=True),
    ]
    with mock.patch.object(Run, "report", report):
        assert train_by(Settings(**settings), Method(), hooks) == 0
    return sources[-1].taken, sources[-1].closed, calls


def test_a_method_brings_its_rows_and_hooks_are_called(toys, tmp_path, world1):
    settings = settings_of(toys.folder("dense"), {}, steps=3, memory_check=False)
    settings["model"]["load"] = str(toys.checkpoint("dense"))
    settings["data"]["train"] = [{"path": "own.jsonl"}]
    settings |= {"output": str(tmp_path / "run"), "log": {"every": 10, "wandb": {"mode": "off"}}}
    arguments = toys.folder("dense"), toys.root, toys.records
    calls = [("answers", 1), 2, ("answers", 3), ("end", 3)]
    assert world1.run(train, *arguments, settings) == [(3 * len(ROWS), True, calls)]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line.get("eval/loss") for line in lines} == {2: 1.0, 3: None}
    settings["train"]["steps"] = 5  # continued, from the state of its own rows
    assert world1.run(train, *arguments, settings) == [(5 * len(ROWS), True, [4, ("answers", 5), ("end", 5)])]
