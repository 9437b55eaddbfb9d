"""How the trainer deals with servers of vLLM. The servers here are stand-ins that remember what they are told."""

import errno
import http.client
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load
from vllm_stand_in import StandIn

from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.rollout.engine import Prompt, Sampling
from megavlm.vllm import asking, keeper, reservation
from megavlm.vllm.client import Client, NotReady
from megavlm.vllm.engine import VllmEngine
from megavlm.vllm.kept import Kept
from megavlm.vllm.wire import folder_for


@pytest.fixture
def make(model_folder, tmp_path):
    """make(servers, rank): an engine, and {"a": tensor}, its weights."""
    engines = []

    def engine(*servers, dp_rank=0, **rollout):
        settings = Settings(
            model={"hf": str(model_folder)},
            data={"seq_length": 64},
            rollout={"engine": "vllm", "vllm": {"url": [one.url for one in servers], "start_minutes": 0.2}, **rollout},
        )
        groups = SimpleNamespace(world_host=SimpleNamespace(size=lambda: 1, rank=lambda: 0), dp_rank=dp_rank)
        weights = {"a": torch.ones(3)}

        def buckets(_, merged):
            yield from ([item] for item in weights.items())
            yield []

        engines.append(VllmEngine(settings, groups, SimpleNamespace(buckets=buckets, adapter=None), tmp_path))
        return engines[-1], weights

    yield engine
    for one in engines:
        one.close()


@pytest.fixture
def prompts(renderer):
    sample = renderer.encode({"messages": [{"role": "user", "content": "Hi"}]}, None, "somewhere:1", kind="prompt")
    return lambda count: iter([Prompt(sample, (10 * n, 10 * n + 1)) for n in range(count)])


SAMPLING = Sampling(2, 1.0)


def tokens(answered):
    return sorted([answer.tokens[0] for answer in one.answers] for one in answered)


def test_weights_reach_all_servers_and_prompts_one_after_the_other(server, model_folder, make, prompts):
    second = StandIn(model_folder)
    engine, weights = make(server, second, dp_rank=3)
    engine.sync()
    assert server.tensors["a"].tolist() == second.tensors["a"].tolist() == [1, 1, 1]
    weights["a"] = torch.zeros(2)
    engine.sync()
    assert server.tensors["a"].tolist() == second.tensors["a"].tolist() == [0, 0]
    assert tokens(engine.generate(prompts(3), SAMPLING)) == [[0, 1], [10, 11], [20, 21]]
    assert (len(server.asked), len(second.asked)) == (1, 2)  # rank 3 begins with the second one
    list(engine.generate(prompts(1), SAMPLING))
    assert (len(server.asked), len(second.asked)) == (2, 2)  # and goes on where it was
    assert len(list(engine._folder.glob("weights-*"))) == 1  # those of the last time
    engine.close()
    assert not list(engine._folder.glob("weights-*"))
    second.http.shutdown()


def test_a_server_that_was_started_again_gets_the_weights_again(server, make, prompts, monkeypatch):
    monkeypatch.setattr(keeper, "_ASK", 0.1)
    engine, _ = make(server)
    engine.sync()
    server.weights, server.tensors = None, {}
    assert tokens(engine.generate(prompts(2), SAMPLING)) == [[0, 1], [10, 11]]
    assert server.tensors["a"].tolist() == [1, 1, 1]


def test_a_server_with_the_weights_of_another_run_ends_this_one(server, make, prompts, monkeypatch):
    monkeypatch.setattr(keeper, "_ASK", 0.1)
    engine, _ = make(server)
    engine.sync()
    server.weights = "other:1"
    with pytest.raises(UserError, match="weights of another run"):
        list(engine.generate(prompts(1), SAMPLING))
    with pytest.raises(UserError, match="has got the weights of another run"):  # also without a prompt
        engine._keepers[0].wait("never", 20.0)


def test_a_server_of_another_version_is_refused(server, make):
    server.version = "0.11.0"
    with pytest.raises(UserError, match=r"has vllm 0\.11\.0, .*; those that fit are 0\.25\.1"):
        make(server)


def test_something_else_that_answers_at_the_address(server, make):
    server.identity = lambda: 0 / 0  # the connection ends
    with pytest.raises(UserError, match=r"there is no server of vLLM at .* has not answered \("):
        make(server, vllm={"url": [server.url], "start_minutes": 1e-3})
    server.identity = lambda: {"detail": "Not Found"}
    server.status = 404
    with pytest.raises(UserError, match=r"is no server of vLLM that megavlm has started: .*Not Found"):
        make(server)


def test_as_many_answers_as_the_setting_says_are_on_their_way(server, make, prompts):
    engine, _ = make(server, max_sequences=3)
    engine.sync()
    read = []
    running = engine.generate((read.append(one) or one for one in prompts(9)), SAMPLING)
    next(running)
    assert len(read) == 2  # of two answers each: the second was begun while there was room
    assert len(list(running)) == 8


def test_nothing_is_asked_on_other_ranks(server, make):
    engine, _ = make(server)
    assert list(engine.generate(None, SAMPLING)) == []


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [
        ({"vllm": {"servers": 2}}, r"rollout.vllm.servers is set, but rollout.engine is megatron"),
        ({"partial": "drop"}, r"rollout.partial is set, but rollout.engine is megatron"),
        ({"engine": "vllm", "batch_invariant": True}, r"rollout.batch_invariant is true, but rollout.engine is vllm"),
        ({"engine": "vllm", "temperature": 0.005}, r"vLLM would sample at 0.01"),
        ({"engine": "vllm", "vllm": {"url": ["http://a:1"], "servers": 2}}, r"servers is set, but rollout.vllm.url"),
        ({"engine": "vllm", "vllm": {"url": ["a:1"]}}, r"'a:1', which is not http://HOST:PORT"),
        ({"engine": "vllm", "vllm": {"args": {"dtype": "half"}}}, r"args has dtype, which comes from train.precision"),
        ({"engine": "vllm", "vllm": {"devices": [0, 0], "servers": 2}}, r"has 1 different numbers in 2"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(rollout, expected, model_folder):
    with pytest.raises(ValueError, match=expected):
        Settings(model={"hf": str(model_folder)}, rollout=rollout)


def test_generate_ends_soon_after_the_engine(server, make, prompts):
    """Also where a thread waits for a server that says "later" again and again, as one that is gone."""
    engine, _ = make(server, vllm={"url": [server.url], "start_minutes": 10})
    engine.sync()
    asked, found = threading.Event(), []
    server.generate = lambda _: asked.set()

    def answer():
        try:
            list(engine.generate(prompts(3), SAMPLING))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    assert asked.wait(20)
    engine.close()
    thread.join(20)
    assert not thread.is_alive()
    assert isinstance(found[0], NotReady)
    with pytest.raises(NotReady):  # also one that begins later
        list(engine.generate(prompts(1), SAMPLING))


def test_a_server_that_works_and_says_later_has_its_time_anew(server, make, prompts, monkeypatch):
    monkeypatch.setattr(asking, "_WORK", 0.1)
    engine, _ = make(server, vllm={"url": [server.url], "start_minutes": 0.5 / 60})
    engine.sync()
    real, times = server.generate, []

    def drops(body):
        times.append(time.monotonic())
        time.sleep(0.2)
        return None if len(times) < 6 else real(body)

    server.generate = drops
    assert tokens(engine.generate(prompts(1), SAMPLING)) == [[0, 1]]
    assert times[-1] - times[0] > 1.0  # twice as long as a server may be away


def test_a_server_of_another_run_is_refused_and_one_that_is_free_again_is_taken(server, make, monkeypatch):
    monkeypatch.setattr(keeper, "_ASK", 0.2)
    first, _ = make(server)
    with pytest.raises(UserError, match="is working for another run"):
        make(server)
    first.close()
    make(server)[0].close()
    server.reservation.ask("killed")  # and never asks again
    monkeypatch.setattr(reservation, "HELD", 1.5)
    began = time.monotonic()
    make(server)
    assert time.monotonic() - began > 1


def test_tied_weights_are_written_twice(tmp_path):
    tied = torch.arange(6.0).view(2, 3)
    kept = Kept("x:1", tmp_path / "kept")
    kept.write([[("embedding", tied), ("output", tied), ("other", torch.ones(1))], []])
    found = load((tmp_path / "kept" / "00000.safetensors").read_bytes())
    assert found["embedding"].tolist() == found["output"].tolist() == tied.tolist()
    assert kept.digests["embedding"] == kept.digests["output"]


def test_whatever_ends_a_sync_leaves_no_files(server, make):
    engine, weights = make(server)
    engine.sync()
    weights["b"] = "no tensor"
    with pytest.raises(AttributeError):
        engine.sync()
    assert [path.name for path in engine._folder.glob("weights-*")] == ["weights-1"]


def test_a_host_that_vanishes_is_a_lost_server(server, monkeypatch):
    """The kernel ends the connection with ETIMEDOUT, which Python raises as the class of its own time-outs, too."""
    seen = []

    def vanishes(connection):
        seen.append(connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        seen.append(connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE))
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    monkeypatch.setattr(http.client.HTTPConnection, "getresponse", vanishes)
    with pytest.raises(NotReady) as error:
        Client(server.url).get("/identity", 10)
    assert error.value.was_lost
    assert seen == [1, 30]


def test_a_file_that_does_not_fit_into_memory_is_written_elsewhere(tmp_path):
    assert folder_for(10, tmp_path) == tmp_path
    assert folder_for(2**62, tmp_path) is None
    assert folder_for(10, tmp_path / "nowhere") is None
