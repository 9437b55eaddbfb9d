"""The processes of servers of vLLM: how they are started, here and elsewhere, and started again when they end."""

import json
import sys
import time

import pytest

from megavlm.config.settings import Settings
from megavlm.vllm import keeper


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


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rollout": {"top_p": 2}}, "rollout.top_p"),
        ({"adapter": {"type": "lora", "targets": ["nothing"]}}, "adapter.targets has 'nothing'"),
    ],
)
def test_a_server_elsewhere_tells_what_is_wrong_with_the_configuration(
    settings, told, model_folder, tmp_path, monkeypatch, capsys
):
    """With the status by which launch/servers.sh knows that it would be wrong again."""
    from megavlm.vllm import serve

    frozen = {"hf": str(model_folder), "freeze": ["vision", "projector"]}
    (tmp_path / "run.yaml").write_text(json.dumps({"model": frozen, **settings}))
    monkeypatch.setattr(serve, "check_environment", lambda python: None)
    monkeypatch.setattr("sys.argv", ["serve", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit) as ended:
        serve.main()
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


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
