"""The page of `megavlm watch`: what it answers, to whom, and that it gives away nothing else."""

import http.client
import json
import re
import threading
from collections.abc import Iterator

import pytest

from megavlm.base.errors import UserError
from megavlm.commands.watch import main
from megavlm.watch import server as module
from megavlm.watch.follow import find_runs
from megavlm.watch.server import PageServer


@pytest.fixture
def folder(tmp_path):
    for name, loss in (("one", 1.0), ("two", 2.0)):
        (tmp_path / name).mkdir()
        lines = [{"step": step, "loss": loss / step, "lr": 0.1} for step in range(1, 4)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / name / "secret.txt").write_text("not to be read")
    return tmp_path


@pytest.fixture
def server(folder) -> Iterator[PageServer]:
    with PageServer(find_runs([folder]), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path, method="GET", **headers) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)  # sends the path as it is
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, dict(answer.getheaders())


def data(server, query) -> dict:
    status, text, _ = ask(server, f"/data?{query}")
    assert status == 200
    return json.loads(text)


def test_the_map_of_the_experts_is_sent_when_it_has_changed(server, folder):
    from urllib.parse import quote

    before = data(server, "field=loss")
    assert [run["experts"] for run in before["runs"]] == ["", ""]
    tokens = {"step": 3, "layers": [1, 2], "tokens": [[4, 0], [2, 2]]}
    (folder / "two" / "expert_load.json").write_text(json.dumps(tokens))
    after = data(server, f"field=loss&state={quote(before['state'])}")
    assert after["runs"][0]["experts"] == ""
    assert "Largest: expert 0 of layer 1, 2" in after["runs"][1]["experts"]
    assert "fields" not in data(server, f"field=loss&state={quote(after['state'])}")
    (folder / "two" / "expert_load.json").write_text('{"tokens": [[1]]}')  # no layers
    assert "experts" not in data(server, "field=loss")["runs"][1]


def test_curves_of_all_runs_and_only_what_is_new(server, folder):
    answer = data(server, "field=loss&field=none")
    one, two = answer["runs"]
    assert (one["name"], one["step"], one["loss"]) == ("one", 3, "0.3333")
    values = [1.0, 0.5, 1 / 3]
    assert one["curves"] == {"loss": {"steps": [1, 2, 3], "means": values, "lows": values, "highs": values}}
    assert two["curves"]["loss"]["means"][0] == 2.0
    assert answer["fields"] == ["loss", "lr"]
    from urllib.parse import quote

    again = data(server, f"field=loss&field=none&state={quote(answer['state'])}")
    assert "fields" not in again
    assert "curves" not in again["runs"][0]
    with (folder / "two" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 7.0}\n')
    grown = data(server, f"field=loss&field=none&state={quote(answer['state'])}")
    assert grown["runs"][1]["curves"]["loss"]["means"][-1] == 7.0


def test_the_page_needs_nothing_from_elsewhere(server):
    status, page, headers = ask(server, "/")
    assert status == 200
    assert not re.findall(r"(?:src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    nonce = re.search(r"'nonce-([^']+)'", policy)[1]
    assert re.findall(r"<script[^>]*>", page) == [f'<script nonce="{nonce}">']
    assert nonce not in ask(server, "/")[1]


@pytest.mark.parametrize(
    "path",
    [
        "/secret.txt", "/one/secret.txt", "/../one/secret.txt", "/..%2fone%2fsecret.txt", "//one/secret.txt",
        "/data/../one/secret.txt", "/one/metrics.jsonl", "/?file=one/secret.txt", "/data?field=../one/secret.txt",
        "http://evil.example/one/secret.txt", "/%00",
    ],
)  # fmt: skip
def test_no_address_leads_to_a_file(server, path):
    status, text, _ = ask(server, path)
    assert "not to be read" not in text
    assert status in ((200,) if "?" in path else (403, 404))


def test_only_this_machine_is_answered(server):
    assert server.server_address[0] == "127.0.0.1"
    for host in (
        "evil.example",
        f"evil.example:{server.server_port}",
        "localhost.evil.example",
        "",
        "[",
        "127.0.0.1.x",
    ):
        for path in ("/", "/data?field=loss"):
            status, text, _ = ask(server, path, Host=host)
            assert status == 403, host
            assert "loss" not in text
    for host in ("localhost", "127.0.0.1:1", "[::1]:5", "LOCALHOST:80"):
        assert ask(server, "/data", Host=host)[0] == 200, host


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_written(server, method):
    assert ask(server, "/data", method)[0] == 501


def test_a_port_that_is_taken(server, folder, monkeypatch):
    runs = find_runs([folder])
    with pytest.raises(UserError, match=f"port {server.server_port} is taken"):
        PageServer(runs, server.server_port)
    monkeypatch.setattr(module, "FIRST_PORT", server.server_port)
    with PageServer(runs) as other:
        assert server.server_port < other.server_port <= server.server_port + module.PORTS


def test_flags_that_do_not_fit(folder):
    with pytest.raises(UserError, match=r"--port is for the page"):
        main([folder], text=True, port=1)
    for flags in ({"once": True}, {"log": True}, {"field": ["loss"]}):
        with pytest.raises(UserError, match=rf"--{next(iter(flags))} is for --text"):
            main([folder], **flags)
