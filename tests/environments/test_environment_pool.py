"""Environments in worker processes: a bad one costs only its own conversation, and no process is left over."""

import io
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from megavlm.base.errors import UserError
from megavlm.config.settings import EnvironmentSettings
from megavlm.environments.pool import EnvironmentPool
from megavlm.environments.worker_process import EnvironmentWorker, check_environment

FILE = Path(__file__).parent / "odd_environments.py"
SECONDS = 2.0  # a time-out; an innocent call needs milliseconds, also on a busy machine


def settings(name="Counter", **others) -> EnvironmentSettings:
    return EnvironmentSettings(**{"python": f"{FILE}:{name}", "max_tokens": 100, "timeout": SECONDS, **others})


CAUSES = {  # what a step does, and what is told of it
    "raise": "step: RuntimeError: the door is stuck",
    "leave": "step: SystemExit: enough",
    "exit": "its process ended with status 3",
    "kill": "its process was killed by SIGKILL",
    "hang": "no result after 2 s",
    "none": "step: it returned None, which is no Step",
    "number": "step: it returned 7, which is no Step",
    "text": "step: its reward is '1', which is no finite number",
    "nan": "step: its reward is nan, which is no finite number",
    "field": "step: it has 'txt', but the fields are text, pictures, reward, done",
    "done": "step: done is 'yes', which is neither true nor false",
    "a list": "step: its pictures are 'ab', which is no list",
    "array": "step: [3] is no picture",
    "floats": "step: an array of float64 is no picture",
    "no file": "step: its picture 1 cannot be used: FileNotFoundError",
    "await": "step: RuntimeError: no running event loop",
}
AT_RESET = {
    "raise at reset": "reset: KeyError: 'no such door'",
    "nonsense at reset": "reset: it has a reward, or ends the conversation, before the first answer",
    "hang at reset": "no result after 2 s",
}


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The replies of all, up to three steps each, in one pool: by what they do, a list."""
    folder = tmp_path_factory.mktemp("played")
    Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(folder / "on_disk.png")
    with EnvironmentPool(settings(workers=3)) as pool:
        begun = {what: pool.begin({"what": what, "seed": 3, "other": object}, str(folder)) for what in
                 (*CAUSES, *AT_RESET, "first", "pictures", "stop", "fine")}  # fmt: skip
        begun["unsendable"] = pool.begin({"what": lambda: 1}, "")
        names = {episode: what for what, episode in begun.items()}
        found = {names[episode]: [reply] for episode, reply in pool.wait().items()}
        for number in range(3):
            for what, episode in begun.items():
                if found[what][-1].cause is None:
                    pool.step(episode, f"answer {number}")
            for episode, reply in pool.wait().items():
                found[names[episode]].append(reply)
        for episode in begun.values():
            pool.end(episode)
    return found


@pytest.mark.parametrize("what", CAUSES)
def test_a_bad_step_costs_its_conversation(played, what):
    replies = played[what]
    assert replies[0].cause is None
    assert len(replies) == 2
    assert replies[1].cause.startswith(CAUSES[what])


@pytest.mark.parametrize("what", AT_RESET)
def test_a_bad_reset_costs_its_conversation(played, what):
    [reply] = played[what]
    assert reply.cause == AT_RESET[what]


def test_a_record_that_cannot_be_sent_costs_its_conversation(played):
    [reply] = played["unsendable"]
    assert "the record cannot be sent to a worker" in reply.cause


def test_others_go_on_also_where_their_process_was_killed(played):
    """Each has its own count, whatever became of the processes: one that begins anew gets its earlier answers again."""
    for what in ("fine", "first", "pictures", "stop"):
        assert [reply.cause for reply in played[what]] == [None] * 4
    fine = played["fine"]
    assert [reply.observation.text for reply in fine] == ["", "1 3", "2 3", "3 3"]
    assert [reply.observation.reward for reply in fine] == [None, 0.25, 0.25, 0.25]
    first = played["first"][0].observation
    assert (first.text, len(first.pictures)) == ("Welcome.", 1)
    stop = played["stop"][1].observation
    assert (stop.text, stop.reward, stop.done) == ("over", 1.0, True)


def test_a_process_that_is_killed_from_outside_costs_nothing(tmp_path):
    """Its conversation begins anew and goes on where it was; once for each call, as twice is its own fault."""
    log = tmp_path / "log.txt"
    with EnvironmentPool(settings(workers=1, options={"log": str(log)})) as pool:
        episode = pool.begin({"what": "wait"}, "")
        pool.wait()
        for count in (1, 2, 3):
            lines = len(log.read_text().splitlines()) if log.exists() else 0
            pool.step(episode, "answer")
            until = time.monotonic() + 30
            while not log.exists() or len(log.read_text().splitlines()) == lines:  # until it is at work
                assert time.monotonic() < until
                time.sleep(0.01)
            [worker] = filter(is_worker, psutil.Process().children())
            worker.kill()
            reply = pool.wait()[episode]
            assert reply.cause is None
            assert reply.observation.text == f"{count} 0"
    assert len({line.split()[0] for line in log.read_text().splitlines() if "closed" not in line}) == 4  # processes


def test_workers_that_are_found_dead_when_they_are_asked_are_replaced(monkeypatch):
    """Nothing else wakes the pool up: the last conversation has been begun, and no process is left."""
    with EnvironmentPool(settings(workers=2)) as pool:
        until = time.monotonic() + 60
        while len(ready := [worker for worker in list(pool._workers) if worker.is_ready]) < 2:
            assert time.monotonic() < until
            time.sleep(0.01)
        asked = EnvironmentWorker.ask

        def ask(worker: EnvironmentWorker, *given) -> None:
            if worker in ready:
                raise BrokenPipeError
            asked(worker, *given)

        def sign() -> None:
            assert time.monotonic() < until, "nobody answers"

        monkeypatch.setattr(EnvironmentWorker, "ask", ask)
        until = time.monotonic() + 60
        begun = [pool.begin({"what": "fine"}, "") for _ in range(2)]
        found = pool.wait(sign)
        assert [found[episode].cause for episode in begun] == [None, None]


def test_pictures_keep_their_pixels(played):
    found = [np.array(Image.open(io.BytesIO(data))) for data in played["pictures"][1].observation.pictures]
    assert [np.unique(values).tolist() for values in found] == [[1], [2], [5], [7]]
    assert [values.shape for values in found] == [(32, 32, 3), (8, 8), (32, 32, 3), (8, 8, 3)]


def test_what_ends_is_closed(tmp_path):
    log = tmp_path / "log.txt"
    with EnvironmentPool(settings(workers=1, options={"log": str(log)})) as pool:
        begun = [pool.begin({"what": what}, "") for what in ("fine", "raise", "raise at reset")]
        pool.wait()
        for episode in begun[:2]:
            pool.step(episode, "a")
        pool.wait()
        for episode in begun:
            pool.end(episode)
        until = time.monotonic() + 30
        while (closed := log.read_text().splitlines()[2:]) != [f"closed {what}" for what in
                                                              ("fine", "raise", "raise at reset")]:  # fmt: skip
            assert time.monotonic() < until, closed
            time.sleep(0.05)


def test_methods_that_are_coroutines_run_together():
    """Thirty steps of 0.4 s in one process: one after the other, they would take 12 s."""
    kinds = ["fine"] * 28 + ["hang", "raise"]
    with EnvironmentPool(settings("Together", workers=1)) as pool:
        begun = [pool.begin({"what": what}, "") for what in kinds]
        assert all(reply.cause is None for reply in pool.wait().values())
        began = time.monotonic()
        for number, episode in enumerate(begun):
            pool.step(episode, f"answer {number}")
        found = pool.wait()
        seconds = time.monotonic() - began
    assert [found[episode].observation.text for episode in begun[:28]] == [f"1 answer {n}" for n in range(28)]
    assert found[begun[28]].cause == "no result after 2 s"
    assert found[begun[29]].cause == "step: ValueError: no"
    assert seconds < 8


def test_one_that_blocks_all_others_is_found(monkeypatch):
    """Its process must be killed. The others begin anew, and each goes on where it was."""
    monkeypatch.setattr("megavlm.environments.pool._GRACE", 0.5)
    with EnvironmentPool(settings("Together", workers=2, timeout=1.0)) as pool:
        begun = [pool.begin({"what": what}, "") for what in ("fine", "block", "fine", "fine")]
        pool.wait()
        for count in (1, 2):
            for episode in begun:
                pool.step(episode, "answer")
            found = pool.wait()
            causes = [found[episode].cause for episode in begun]
            assert causes == [None, None if count == 1 else "no result after 2 s", None, None]
            texts = [found[episode].observation.text for episode in begun if found[episode].cause is None]
            assert set(texts) == {f"{count} answer"}


@pytest.mark.parametrize("name", ["made", "made_together"])
def test_a_function_can_make_environments(name):
    with EnvironmentPool(settings(name, workers=1)) as pool:
        episode = pool.begin({}, "")
        assert pool.wait()[episode].cause is None
        pool.step(episode, "a")
        assert pool.wait()[episode].observation.text == {"made": "6 0", "made_together": "1 a"}[name]


def is_worker(process):
    try:
        return "environments.worker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it has ended, perhaps without anybody having waited for it
        return False


def test_no_process_is_left(played):
    del played
    until = time.monotonic() + 30
    while any(map(is_worker, psutil.Process().children())):
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("name", "others", "told"),
    [
        ("Nothing", {}, "has no class or function Nothing"),
        ("NoStep", {}, "the class NoStep has no method step"),
        ("Counter", {"options": {"begin": 3}}, "cannot be called with the options begin"),
        ("made", {"options": {"end": 3}}, "cannot be called with the options end"),
        ("FILE", {}, "has no class or function FILE"),
    ],
)
def test_what_is_no_environment_is_told(name, others, told):
    with pytest.raises(UserError, match=told):
        check_environment(settings(name, **others))
    check_environment(settings())
    check_environment(EnvironmentSettings())


def test_a_pool_whose_file_cannot_be_loaded_ends_the_wait(tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    with EnvironmentPool(settings(python=f"{tmp_path / 'broken.py'}:Door")) as pool:
        pool.begin({}, "")
        with pytest.raises(UserError, match=r"broken.py:1 cannot be used: ModuleNotFoundError"):
            pool.wait()
