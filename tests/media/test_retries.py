"""Remote reads that fail for a moment are repeated; others are not."""

import errno
import http.server
import threading

import pytest

from megavlm.media import retries
from megavlm.media.files import File
from megavlm.media.retries import DELAYS, is_transient, retried


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """How long was waited, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", waited.append)
    retries._told.clear()
    retries._failed.clear()
    return waited


def failing(times, error):
    """A function that fails so often, and the list of its calls."""
    calls: list[int] = []

    def read():
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "read"

    return read, calls


def test_a_transient_error_is_waited_out_and_said_once(waits, capfd):
    read, calls = failing(3, ConnectionResetError("reset"))
    assert retried("s3://bucket/a", read) == "read"
    assert retried("s3://bucket/b", failing(1, TimeoutError())[0]) == "read"
    assert len(calls) == 4
    assert waits == [*DELAYS[:3], DELAYS[0]]
    assert capfd.readouterr().err.count("bucket failed for a moment") == 1


def test_a_host_that_stays_down_is_not_waited_for_at_each_sample(waits):
    error = OSError(errno.ETIMEDOUT, "timed out")
    for tries in (len(DELAYS) + 1, 2, 2):
        read, calls = failing(99, error)
        with pytest.raises(OSError, match="timed out"):
            retried("http://host/a", read)
        assert len(calls) == tries
    assert retried("http://host/a", lambda: 1) == 1
    read, calls = failing(3, error)  # it is up again, so it is worth waiting
    assert retried("http://host/a", read) == "read"


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "a"), PermissionError("a"), ValueError("a"), KeyError("a")]
)
def test_other_errors_are_not(error, waits):
    with pytest.raises(type(error)):
        retried("http://host/a", failing(1, error)[0])
    assert not waits


def test_causes_count(waits):
    lost = FileNotFoundError("a")
    lost.__cause__ = ConnectionResetError("reset")
    refused = ConnectionError("a")
    refused.__cause__ = PermissionError("private address")
    assert is_transient(lost)
    assert not is_transient(refused)
    assert is_transient(OSError("An error occurred (SlowDown) when calling GetObject"))


def test_a_busy_server(waits):
    """Over HTTP itself: 503 twice and then the file; 404 at once."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            busy = self.path == "/busy" and asked.count("/busy") < 3
            self.send_response(503 if busy else 404 if self.path == "/none" else 200)
            self.send_header("Content-Length", "4")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"body")

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        origin = f"http://127.0.0.1:{server.server_port}"
        assert File(f"{origin}/busy").read() == b"body"
        assert asked.count("/busy") == 3
        with pytest.raises(FileNotFoundError):
            File(f"{origin}/none").read()
        assert asked.count("/none") == 1
    finally:
        server.shutdown()
        server.server_close()
