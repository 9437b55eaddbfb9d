"""The server of a run is killed again and again: no prompt is lost, none is learned twice, and the weights are right.

Answers take seconds here, so that a kill while they are sampled finds requests under way, which are counted.
"""

import random
import threading
import time
from contextlib import suppress
from pathlib import Path

import forked_command
import psutil
import pytest
from vllm_processes import connections_of, engine_of, server_of
from vllm_runs import grpo_config
from vllm_served import CLOSE

from megavlm.monitor.metrics import read_metrics
from megavlm.monitor.rollout_log import read_rollouts

STEPS, TOKENS, PATIENCE = 24, 150, 600.0
# When the server is killed: while it answers; while it starts or before it has the weights; at any moment. Three
# servers in a row that come to nothing would end the run, as docs/vllm.md says.
MOMENTS = ("answers", "answers", "start", "answers", "any")


class Killer(threading.Thread):
    """Kills the server of a run, or the engine that it has forked, at each of the moments; see ``MOMENTS``.

    Attributes:
        killed: of each kill the moment, the victim, and how many prompts at least were being answered.
    """

    def __init__(self, output: Path):
        super().__init__(daemon=True)
        self.output, self.killed, self.is_over = output, [], threading.Event()
        self._draw = random.Random(16)

    def run(self):
        server = None
        for number, moment in enumerate(MOMENTS):
            after = self.steps() + (0 if moment == "start" else self._draw.randint(1, 2))
            self._wait(lambda after=after, last=server: self.steps() >= after and server_of(self.output) != last)
            self._wait(lambda: server_of(self.output) is not None)
            while not self.is_over.is_set():
                time.sleep(self._draw.uniform(0, {"answers": 0.3, "start": 12.0, "any": 5.0}[moment]))
                server = server_of(self.output)
                if server is not None and self._kill(server, moment, wants_engine=number % 2 == 1):
                    break

    def _kill(self, server: psutil.Process, moment: str, *, wants_engine: bool) -> bool:
        """Kills the server or its engine, unless it is to answer and does not. Returns whether it was killed."""
        try:
            server.suspend()  # it ends no request between the count and the kill
            prompts = max(0, connections_of(server) - 1)  # the trainer may be asking for a sign of life, too
            if moment == "answers" and prompts == 0:
                return False
            engine = engine_of(server) if wants_engine else None
            (engine or server).kill()
            self.killed.append((moment, "server" if engine is None else "engine", prompts))
            return True
        except psutil.Error:
            return False
        finally:
            with suppress(psutil.Error):
                server.resume()

    def steps(self) -> int:
        lines = read_metrics(self.output) if (self.output / "metrics.jsonl").exists() else []
        return lines[-1]["step"] if lines else 0

    def _wait(self, there) -> None:
        end = time.monotonic() + PATIENCE
        while not there() and not self.is_over.is_set() and time.monotonic() < end:
            time.sleep(0.05)


def grpo(toys, output: Path, **rollout) -> tuple[list[dict], list[list[tuple]]]:
    """Metrics of a run, and of each step its prompts with the numbers of their answers."""
    result = forked_command.run(["grpo", str(grpo_config(None, toys, output, STEPS, cache_gib=0.25, **rollout))])
    assert result.returncode == 0, result.stdout + result.stderr
    lines = read_metrics(output)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return lines, [[(group.sample, len(group.answers)) for group in step.groups] for step in read_rollouts(output)]


@pytest.fixture(scope="module")
def straight(python, toys, tmp_path_factory):
    """The prompts of a run that nothing disturbs. Their order depends on no answer, so these are short."""
    return grpo(toys, tmp_path_factory.mktemp("straight") / "run", max_new_tokens=2)[1]


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1])
def test_killed_five_times(ahead, straight, toys, tmp_path, monkeypatch):
    """The prompts of each step are those of a run that nothing has disturbed, each with all its answers.

    In turn, all answers of a step are of the present weights, and the trainer computes the same log-probabilities.
    """
    monkeypatch.setattr(forked_command, "TIMEOUT_SECONDS", 3600)
    killer = Killer(tmp_path / "run")
    killer.start()
    try:
        lines, prompts = grpo(toys, tmp_path / "run", max_new_tokens=TOKENS, ahead=ahead)
    finally:
        killer.is_over.set()
        killer.join()
        print(killer.killed)
    assert [moment for moment, _, _ in killer.killed] == list(MOMENTS), "the run was over too soon"
    assert {"server", "engine"} == {victim for _, victim, _ in killer.killed}
    assert all(hit for moment, _, hit in killer.killed if moment == "answers")
    assert prompts == straight
    learned = [sample for step in prompts for sample, _ in step]
    assert len(learned) == 4 * STEPS
    for epoch in range(STEPS // 2):
        assert len(set(learned[8 * epoch : 8 * (epoch + 1)])) == 8, "an epoch has a record twice"
    assert {count for step in prompts for _, count in step} == {4}
    assert all(line["staleness"] <= ahead for line in lines)
    if not ahead:
        assert max(line["mismatch_max"] for line in lines) < CLOSE
