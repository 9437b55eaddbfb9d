"""The server of a run is killed again and again: no prompt is lost, none is learned twice, and the run ends well."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import forked_command
import psutil
import pytest
from vllm_runs import grpo_config

from megavlm.monitor.metrics import read_metrics
from megavlm.monitor.rollout_log import read_rollouts

KILLS, STEPS, PATIENCE = 10, 60, 600.0
SAMPLED = 2  # steps that the run may end without a server: of the batch that it learns from, and of the one ahead


class Killer(threading.Thread):
    """Kills the server of a run at random moments, or the engine that it has forked.

    Each third time it does not wait until the run has gone on with the new server: this one dies while it starts, or
    before it has the weights. Three servers in a row that come to nothing would end the run, as docs/vllm.md says.
    """

    def __init__(self, output: Path):
        super().__init__(daemon=True)
        self.output, self.killed, self.is_over = output, [], threading.Event()

    def run(self):
        draw, server = random.Random(16), None
        while len(self.killed) < KILLS and not self.is_over.is_set():
            in_start = len(self.killed) % 3 == 2
            steps = self.steps() + (0 if in_start else SAMPLED + draw.randint(1, 2))
            self._wait(lambda steps=steps, last=server: self.steps() >= steps and self.server() not in (None, last))
            time.sleep(draw.uniform(0, 12 if in_start else 1.0))
            server = self.server()
            if server is None or self.is_over.is_set():
                continue
            victim = draw.choice([server, *self.engines(server)])
            self.killed.append("engine" if victim != server else "server")
            os.kill(victim.pid, signal.SIGKILL)

    def server(self) -> psutil.Process | None:
        """The process that serves this run; None: there is none now."""
        for process in psutil.Process().children(recursive=True):
            try:  # it leads the group of all that it starts
                if process.cwd() == str(self.output / "vllm") and os.getpgid(process.pid) == process.pid:
                    return process
            except (psutil.Error, OSError):
                continue
        return None

    def engines(self, server: psutil.Process) -> list[psutil.Process]:
        try:
            return [child for child in server.children(recursive=True) if "EngineCore" in " ".join(child.cmdline())]
        except psutil.Error:
            return []

    def steps(self) -> int:
        lines = read_metrics(self.output) if (self.output / "metrics.jsonl").exists() else []
        return lines[-1]["step"] if lines else 0

    def _wait(self, there) -> None:
        end = time.monotonic() + PATIENCE
        while not there() and not self.is_over.is_set() and time.monotonic() < end:
            time.sleep(0.05)


@pytest.mark.slow
def test_killed_ten_times_at_random_moments(python, toys, tmp_path, monkeypatch):
    """The prompts of each step are those of a run that nothing has disturbed, each with all its answers."""
    monkeypatch.setattr(forked_command, "TIMEOUT_SECONDS", 3600)
    runs = {}
    for name in ("straight", "killed"):
        output = tmp_path / name / "run"
        output.parent.mkdir()
        killer = Killer(output)
        if name == "killed":
            killer.start()
        result = forked_command.run(["grpo", str(grpo_config(None, toys, output, STEPS, ahead=1, cache_gib=0.25))])
        killer.is_over.set()
        assert result.returncode == 0, result.stdout + result.stderr
        runs[name] = [[(group.sample, len(group.answers)) for group in step.groups] for step in read_rollouts(output)]
        assert [line["step"] for line in read_metrics(output)] == list(range(1, STEPS + 1))
    killer.join()
    assert len(killer.killed) == KILLS, "the run was over too soon"
    assert {"server", "engine"} == set(killer.killed)
    served = (killer.output / "vllm" / "server0.log").read_text().count("megavlm: serving")
    assert served <= KILLS - 1, "hardly a server was killed while it started"
    assert runs["killed"] == runs["straight"]
    learned = [sample for step in runs["killed"] for sample in step]
    assert len(learned) == 4 * STEPS
    for epoch in range(STEPS // 2):
        assert len(set(learned[8 * epoch : 8 * (epoch + 1)])) == 8, "an epoch has a record twice"
    assert {count for _, count in learned} == {4}
