"""Answers that are sampled ahead of the step that learns from them: their order, their age, and what a checkpoint says.

The engine here answers each prompt with its number, at a time of its own choice; real engines have tests of their own.
"""

import pytest
from parity import settings_of
from pool import RankError
from toy import toy_records, write_records

from megavlm.base.errors import UserError


def taken_ahead(settings: dict, ahead: int, counts: list[int], fails: bool = False, fails_late: bool = False) -> dict:
    """Runs in a world: takes ``counts`` groups in turn; the answers of each call of the engine arrive in reverse.

    With ``fails_late``, the second call fails when its step has looked for failures for the last time.
    """
    import threading
    from types import SimpleNamespace

    from megavlm.config.settings import Settings
    from megavlm.data.loader import build_loader
    from megavlm.data.renderer import Renderer
    from megavlm.platform import init
    from megavlm.reinforcement import answer_queue
    from megavlm.reinforcement.answer_queue import AnswerQueue
    from megavlm.rewards.pool import RewardPool
    from megavlm.rollout.engine import Answer, Answered, Sampling

    settings = Settings(**settings, rollout={"prompts": 2, "group_size": 2, "max_new_tokens": 4, "ahead": ahead})
    groups = init(settings.parallel, settings.train.seed)

    class Engine:
        samples_apart = True

        def __init__(self):
            self.synced, self.begun, self.go_on = 0, [], threading.Event()
            if not ahead:
                self.go_on.set()

        def sync(self):
            self.synced += 1
            self.go_on.set()

        def generate(self, prompts, sampling):
            asked = list(prompts)
            self.begun.append(len(asked))
            assert self.go_on.wait(60)
            if fails_late and len(self.begun) == 2:
                assert looked.wait(60)
            if fails or (fails_late and len(self.begun) == 2):
                raise UserError("the server is gone", "start it")
            for prompt in reversed(asked):
                yield Answered(prompt, [Answer([5 + prompt.sample.index], [0.0], [0.0], [0.0], "stop")] * 2)

        def close(self):
            self.go_on.set()

    looked = threading.Event()

    def at_the_end_of_a_step(problem, failed, groups):
        found["steps"] = found.get("steps", 0) + 1
        if fails_late and found["steps"] == 2:
            looked.set()
            queue._flights[-1][0].join(60)
        original(problem, failed, groups)

    original = answer_queue.raise_everywhere
    answer_queue.raise_everywhere = at_the_end_of_a_step
    engine, queue, rewards, found = Engine(), None, RewardPool([], 1), {"taken": [], "ages": [], "rows": []}
    renderer = Renderer.of_prompts(settings.model.hf, settings.data, 4)
    data = settings.data.model_copy(update={"packing": "none"})
    loader = build_loader(data, renderer, "prompt", dp_rank=0, dp_size=1, seed=0)
    session = SimpleNamespace(settings=settings, groups=groups)
    try:
        queue = AnswerQueue(session, engine, Sampling(4), renderer, loader, iter(loader), rewards)
        for count in counts:
            queue.begin_step()
            asked = queue.take(count)
            found["taken"] += [one.prompt.sample.index for one in asked]
            assert [one.answered.answers[0].tokens[0] - 5 for one in asked] == [
                one.prompt.sample.index for one in asked
            ]
            found["ages"].append([queue.version - one.version for one in asked])
            found["rows"].append(loader.state_dict()[0]["rows"])
        found["begun"], found["synced"], found["read"] = engine.begun, engine.synced, loader.place[0]
        found["drawn"] = loader.drawn
        state = loader.state_dict()
        again = build_loader(data, renderer, "prompt", dp_rank=0, dp_size=1, seed=0)
        again.load_state_dict(state)
        found["next"] = [next(again).indices[0] for _ in range(2)]
        again.close()
        return found
    finally:
        answer_queue.raise_everywhere = original
        if queue is not None:
            queue.close()
        rewards.close()
        loader.close()


@pytest.fixture
def asked(toys, tmp_path) -> dict:
    data = write_records(toys.root / "asked-ahead.jsonl", toy_records(toys.root))
    settings = settings_of(toys.folder("dense"), {})
    settings["train"]["global_batch_size"] = None
    settings["data"] |= {"train": [{"path": str(data)}], "workers": 1}
    return settings


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_answers_are_taken_in_the_order_of_their_prompts_and_never_older_than_allowed(asked, world1, ahead):
    """The third step replaces two flat groups, so that it takes four prompts: those after them are not older for it."""
    counts = [2, 2, 4, 2]
    (in_turn,) = world1.run(taken_ahead, asked, 0, counts)
    (found,) = world1.run(taken_ahead, asked, ahead, counts)
    assert found["taken"] == in_turn["taken"]  # prompts, exactly once each and in order
    assert found["synced"] == 4
    assert max(max(ages) for ages in found["ages"]) == ahead
    assert found["ages"][0] == [0, 0]
    assert found["rows"] == in_turn["rows"] == [2, 4, 8, 10]  # what was learned, not what was read ahead
    assert found["drawn"] == in_turn["drawn"]
    assert found["read"] == 10 + 2 * ahead
    assert found["next"] == in_turn["next"]  # a run that is continued asks what was under way again
    assert found["begun"] == ([2 + 2 * ahead, 2, 4, 2] if ahead else counts)


def test_an_engine_that_fails_in_a_thread_ends_the_step(asked, world1):
    with pytest.raises(RankError, match="the server is gone"):
        world1.run(taken_ahead, asked, 1, [2], True)


def test_a_failure_between_two_steps_is_not_forgotten(asked, world1):
    """Otherwise the third step would wait for ever."""
    with pytest.raises(RankError, match="the server is gone"):
        world1.run(taken_ahead, asked, 1, [2, 2, 2], fails_late=True, timeout=30)


def taken_on_two_ranks(settings: dict) -> list[list[int]]:
    """Runs in a world: what each rank takes; the second is no leader. A collective ends after three seconds."""
    import time
    from datetime import timedelta
    from types import SimpleNamespace

    import torch.distributed as dist

    from megavlm.config.settings import Settings
    from megavlm.data.loader import build_loader
    from megavlm.data.renderer import Renderer
    from megavlm.platform import init
    from megavlm.reinforcement.answer_queue import AnswerQueue
    from megavlm.rewards.pool import RewardPool
    from megavlm.rollout.engine import Answer, Answered, Sampling

    settings = Settings(**settings, rollout={"prompts": 2, "group_size": 2, "max_new_tokens": 4})
    groups = init(settings.parallel, settings.train.seed)

    class Slow:
        samples_apart = True

        def generate(self, prompts, sampling):
            assert groups.is_leader
            for prompt in list(prompts):
                time.sleep(2.5)
                yield Answered(prompt, [Answer([7], [0.0], [0.0], [0.0], "stop")] * 2)

        def sync(self): ...

        def close(self): ...

    impatient = dist.new_group(backend="gloo", timeout=timedelta(seconds=3))
    session = SimpleNamespace(
        settings=settings,
        groups=SimpleNamespace(dp_size=1, dp_rank=0, world_host=impatient, is_leader=groups.is_leader),
    )
    of_leader = [None] * 4
    if groups.is_leader:
        renderer = Renderer.of_prompts(settings.model.hf, settings.data, 4)
        data = settings.data.model_copy(update={"packing": "none"})
        loader = build_loader(data, renderer, "prompt", dp_rank=0, dp_size=1, seed=0)
        of_leader = [renderer, loader, iter(loader), RewardPool([], 1)]
    dist.barrier()  # opening them may take longer
    try:
        queue = AnswerQueue(session, Slow(), Sampling(4), *of_leader)
        queue.begin_step()
        return [one.answered.answers[0].tokens for one in queue.take(2)]
    finally:
        queue.close()
        if groups.is_leader:
            of_leader[1].close()
            of_leader[3].close()


def test_ranks_without_prompts_wait_as_long_as_sampling_takes(asked, world2):
    asked["parallel"] = {"tensor": 2}
    assert world2.run(taken_on_two_ranks, asked) == [[[7], [7]], []]


def left_while_waiting(settings: dict, ahead: int) -> tuple[list[int], int, list[int]]:
    """Runs in a world of two: the second rank, which has no prompts, is asked to stop in the second step.

    The engine does not answer in this step. Returns the samples of the first step, how many rows a checkpoint then
    knows of, and the samples with which a run continues from it.
    """
    import signal
    import threading
    from types import SimpleNamespace

    import torch.distributed as dist

    from megavlm.base import stop_signals
    from megavlm.config.settings import Settings
    from megavlm.data.loader import build_loader
    from megavlm.data.renderer import Renderer
    from megavlm.platform import init
    from megavlm.reinforcement.answer_queue import AnswerQueue
    from megavlm.rewards.pool import RewardPool
    from megavlm.rollout.engine import Answer, Answered, Sampling

    settings = Settings(**settings, rollout={"prompts": 2, "group_size": 2, "max_new_tokens": 4, "ahead": ahead})
    groups = init(settings.parallel, settings.train.seed)
    closed = threading.Event()

    class Silent:
        samples_apart = True
        answered = 0

        def generate(self, prompts, sampling):
            for prompt in prompts:
                if self.answered == 2:
                    closed.wait(60)
                    return
                self.answered += 1
                yield Answered(prompt, [Answer([7], [0.0], [0.0], [0.0], "stop")] * 2)

        def sync(self): ...

        def close(self):
            closed.set()

    session = SimpleNamespace(settings=settings, groups=groups)
    renderer = Renderer.of_prompts(settings.model.hf, settings.data, 4) if groups.is_leader else None
    data = settings.data.model_copy(update={"packing": "none"})
    build = lambda: build_loader(data, renderer, "prompt", dp_rank=0, dp_size=1, seed=0)
    loader = build() if groups.is_leader else None
    rewards = RewardPool([], 1) if groups.is_leader else None
    queue = AnswerQueue(session, Silent(), Sampling(4), renderer, loader, loader and iter(loader), rewards)
    signals = stop_signals.StopSignals(quiet=True)
    signals.may_leave = True
    signals.defer()
    stop_signals._active.append(signals)
    try:
        queue.begin_step()
        first = [one.prompt.sample.index for one in queue.take(2)]
        queue.begin_step()
        if dist.get_rank() == 1:
            threading.Timer(0.5, signals.receive, [signal.SIGTERM]).start()
        with pytest.raises(stop_signals.StepLeft):
            queue.take(2)
    finally:
        stop_signals._active.clear()
        queue.close()
        if loader is not None:
            loader.close()
    if loader is None:
        return first, 0, []
    loader.rewind()
    again = build()
    again.load_state_dict(loader.state_dict())
    following = [next(again).indices[0] for _ in range(2)]
    again.close()
    return first, loader.state_dict()[0]["rows"], following


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_step_is_left_while_answers_are_awaited(asked, world1, world2, ahead):
    (in_turn,) = world1.run(taken_ahead, asked, 0, [2, 2])
    (leader, (none, *_)) = world2.run(left_while_waiting, asked | {"parallel": {"tensor": 2}}, ahead)
    assert leader == (in_turn["taken"][:2], 2, in_turn["taken"][2:])  # the second step begins again
    assert none == []
