"""Processes of environments are killed again and again while a run samples: it ends on the bits of one left alone."""

import random
import threading
import time
from pathlib import Path

import psutil
import pytest
from killing import Commands
from test_kill import metrics_of, same_bits
from test_turns import DOORS, grpo  # noqa: F401

KILLS, STEPS, PATIENCE = 10, 8, 300.0


@pytest.fixture
def commands():
    commands = Commands(reports=False)
    yield commands
    commands.close()


class Killer(threading.Thread):
    """Kills processes of environments at random moments. ``hit`` counts those that were at work, ``killed`` all."""

    def __init__(self, log: Path):
        super().__init__(daemon=True)
        self.log, self.killed, self.hit, self.is_over = log, 0, 0, threading.Event()

    def run(self):
        draw = random.Random(16)
        while self.killed < KILLS and not self.is_over.is_set():
            self.wait_for_calls(3)
            time.sleep(draw.uniform(0, 0.6))
            workers = [process for process in psutil.Process().children(recursive=True) if is_worker(process)]
            if not workers:
                continue
            victim = draw.choice(workers)
            victim.kill()
            self.killed += 1
            last = [line for line in self.lines() if line.startswith(f"{victim.pid} ")][-1:]
            if last and " begin " in last[0]:
                self.hit += 1
                self.wait_for_end_of(last[0].partition(" begin ")[2])

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def wait_for_calls(self, count: int) -> None:
        before = len(self.lines())
        self._wait(lambda: sum(" end " in line for line in self.lines()[before:]) >= count)

    def wait_for_end_of(self, name: str) -> None:
        """Until the call that was cut off has been tried again: one that is killed twice is said to be at fault."""
        before = len(self.lines())
        self._wait(lambda: any(line.endswith(f" end {name}") for line in self.lines()[before:]))

    def _wait(self, there) -> None:
        end = time.monotonic() + PATIENCE
        while not there() and not self.is_over.is_set() and time.monotonic() < end:
            time.sleep(0.01)


def is_worker(process: psutil.Process) -> bool:
    try:
        return "environments.worker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_killed_ten_times_at_random_moments(commands, grpo, tmp_path):  # noqa: F811
    """Two ranks, each with a process for its environments: same answers, metrics, weights and optimizer state."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    arguments = lambda output: grpo(
        output, f"train.steps={STEPS}", f"environment.python={DOORS}:SlowDoors",
        f"environment.options={{log: {output}.calls}}",
    )  # fmt: skip
    assert commands.run(arguments(straight), 2, straight).statuses == [0, 0], straight.with_suffix(".log").read_text()
    killer = Killer(Path(f"{killed}.calls"))
    killer.start()
    outcome = commands.run(arguments(killed), 2, killed)
    killer.is_over.set()
    killer.join()
    assert outcome.statuses == [0, 0], killed.with_suffix(".log").read_text()
    assert not outcome.survivors
    assert all(line["environment_failures"] == 0 for line in metrics_of(killed))
    assert metrics_of(killed) == metrics_of(straight)
    assert (killed / "rollouts.jsonl").read_text() == (straight / "rollouts.jsonl").read_text()
    assert same_bits(*(run / "checkpoints" / f"step_{STEPS:08}" for run in (straight, killed)))
    assert killer.killed == KILLS, "the run was over too soon"
    assert killer.hit >= 3, "hardly a process was at work when it was killed"
