"""How the trainer deals with servers of vLLM. The servers here are stand-ins that remember what they are told."""

import errno
import http.client
import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load

from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.rollout.engine import Prompt, Sampling
from megavlm.vllm import asking, keeper, reservation
from megavlm.vllm.client import Client, NotReady
from megavlm.vllm.engine import VllmEngine
from megavlm.vllm.kept import Kept
from megavlm.vllm.reservation import Reservation
from megavlm.vllm.wire import RUN, folder_for, unpacked


class StandIn:
    """A server that answers a prompt with its seeds as tokens."""

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights, self.tensors, self.asked, self.version = None, {}, [], "0.25.1"
        self.status, self.reservation = 200, Reservation()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if run := self.headers.get(RUN):
                    stand_in.reservation.ask(run)
                self.reply(stand_in.identity())

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.reply(getattr(stand_in, self.path.strip("/").replace("/", "_"))(body))

            def reply(self, told: dict | None):
                self.send_response(stand_in.status if told is not None else 503)
                self.end_headers()
                self.wfile.write(json.dumps(told).encode())

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def identity(self):
        return {
            "versions": {"vllm": self.version, "transformers": "5.17.0"},
            "config": self.config,
            "max_model_len": 64,
            "logprobs_mode": "raw_logprobs",
            "weights": self.weights,
            **self.reservation.told(),
        }

    def release(self, _):
        self.reservation.release(self.reservation.told()["run"])
        return {}

    def generate(self, body):
        if self.weights is None:
            return None
        head, pixels = unpacked(body)
        self.asked.append((head, bytes(pixels)))
        return {
            "answers": [{"tokens": [seed], "logprobs": [-1.0], "finish": "stop"} for seed in head["seeds"]],
            "weights": self.weights,
        }

    def weights_start(self, _):
        self.tensors, self.weights = {}, None
        return {}

    def weights_bucket(self, body):
        self.tensors |= load(body)
        return {}

    def weights_finish(self, body):
        self.weights = json.loads(body)["version"]
        return {}


@pytest.fixture
def server(model_folder):
    stand_in = StandIn(model_folder)
    yield stand_in
    stand_in.http.shutdown()


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

        def buckets(_):
            yield from ([item] for item in weights.items())
            yield []

        engines.append(VllmEngine(settings, groups, SimpleNamespace(buckets=buckets), tmp_path))
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


def test_a_server_elsewhere_gets_the_configuration_of_the_run(model_folder, tmp_path, monkeypatch):
    from megavlm.vllm import serve

    rollout = {"engine": "vllm", "cache_gib": 0.5, "max_sequences": 7}
    settings = {"model": {"hf": str(model_folder)}, "data": {"seq_length": 64}, "rollout": rollout}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    words = []
    monkeypatch.setattr(serve, "check_environment", lambda python: None)
    monkeypatch.setattr(serve.os, "execv", lambda program, arguments: words.extend(arguments))
    overrides = ["rollout.vllm.python=some/python", "rollout.vllm.args.enforce_eager=true"]
    monkeypatch.setattr("sys.argv", ["serve", str(tmp_path / "run.yaml"), *overrides, "--port", "81"])
    serve.main()
    assert words[0] == "some/python"
    given = dict(zip(words[-8::2], words[-7::2], strict=True))
    assert (given["--model"], given["--host"], given["--port"]) == (str(model_folder), "0.0.0.0", "81")
    expected = {"max_model_len": 64, "max_num_seqs": 7, "kv_cache_memory_bytes": 2**29, "enforce_eager": True}
    assert expected.items() <= json.loads(given["--arguments"]).items()


def test_a_server_elsewhere_tells_what_is_wrong_with_the_configuration(tmp_path, monkeypatch, capsys):
    """With the status by which launch/servers.sh knows that it would be wrong again."""
    from megavlm.vllm import serve

    (tmp_path / "run.yaml").write_text(json.dumps({"model": {"hf": "x"}, "rollout": {"top_p": 2}}))
    monkeypatch.setattr("sys.argv", ["serve", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit) as ended:
        serve.main()
    assert ended.value.code == 2
    assert "rollout.top_p" in capsys.readouterr().err


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


# The first answer is there at once, the second never. Its own name is in the log.
HANGS = """
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    count = 0
    def do_GET(self):
        Handler.count += 1
        if Handler.count > 1: time.sleep(600)
        self.send_response(200); self.end_headers(); self.wfile.write(sys.argv[2].encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_of_our_own_that_hangs_is_started_again(server, model_folder, tmp_path, monkeypatch):
    told = json.dumps(server.identity())
    words = lambda settings, port, parent: [sys.executable, "-I", "-c", HANGS, str(port), told]
    monkeypatch.setattr(keeper, "command", words)
    monkeypatch.setattr(keeper, "_ASK", 0.3)
    monkeypatch.setattr(keeper, "_HANGS", 1.0)
    settings = Settings(model={"hf": str(model_folder)}, data={"seq_length": 64}, rollout={"engine": "vllm"})
    (one,) = keeper.keepers_of(settings, tmp_path, "run")
    one.start()
    try:
        assert one.wait(None, 30)
        first, end = one._process.pid, time.monotonic() + 30
        while one._process is None or one._process.pid == first:
            assert time.monotonic() < end, "it was not started again"
            assert one.problem is None
            time.sleep(0.05)
        assert one.wait(None, 30)
    finally:
        one.close()


# Its nth start does what the nth argument says: serve for a while, or end.
ENDS = """
import http.server, os, pathlib, signal, sys, threading
starts = pathlib.Path(sys.argv[3])
count = int(starts.read_text()) if starts.exists() else 0
starts.write_text(str(count + 1))
end = sys.argv[4].split()[min(count, len(sys.argv[4].split()) - 1)]
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
if end == "fail": sys.exit(1)
if end == "killed": kill()
if end == "serve-and-die": threading.Timer(1.0, kill).start()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(sys.argv[2].encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize(
    ("starts", "problem"),
    [
        ("killed killed serve", None),
        ("killed killed killed serve", "was lost 3 times in a row: it has ended with status -9"),
        ("serve-and-die fail killed serve", None),
        ("serve-and-die fail fail fail", "was lost 3 times in a row: it has ended with status 1"),
        ("fail serve", "has ended with status 1"),
    ],
)
def test_a_server_that_ends_while_it_starts(starts, problem, server, model_folder, tmp_path, monkeypatch):
    """It is started again if it was killed, or has run before; else its settings are wrong, which ends the run."""
    told, count = json.dumps(server.identity()), tmp_path / "starts"
    words = lambda settings, port, parent: [sys.executable, "-I", "-c", ENDS, str(port), told, str(count), starts]
    monkeypatch.setattr(keeper, "command", words)
    settings = Settings(model={"hf": str(model_folder)}, data={"seq_length": 64}, rollout={"engine": "vllm"})
    (one,) = keeper.keepers_of(settings, tmp_path, "run")
    one.start()
    try:
        end = time.monotonic() + 60
        started = lambda: int(count.read_text() or 0) if count.exists() else 0
        while one.problem is None and (problem is not None or started() < len(starts.split())):
            assert time.monotonic() < end
            time.sleep(0.05)
        if problem is None:
            assert one.wait(None, 30)
        else:
            assert problem in str(one.problem)
            assert started() == len([word for word in starts.split() if word != "serve"])
    finally:
        one.close()


def test_servers_do_not_get_the_variables_of_the_trainer(model_folder, tmp_path, monkeypatch):
    for name in ("RANK", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
                 "OMP_NUM_THREADS", "SOMETHING_ELSE"):  # fmt: skip
        monkeypatch.setenv(name, "1")
    (one,) = keeper.keepers_of(Settings(model={"hf": str(model_folder)}), tmp_path, "run")
    found = one._environment()
    assert found["SOMETHING_ELSE"] == "1"
    assert not {"RANK", "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS"} & found.keys()
    assert not [name for name in found if name.startswith("PYTORCH_")]


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
