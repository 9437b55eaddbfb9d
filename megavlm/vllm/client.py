"""Talks to a server of vLLM over HTTP."""

import http.client
import json
import socket
import threading
import time
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from megavlm.base.json_files import parse_json
from megavlm.base.quoting import shortened
from megavlm.vllm.wire import RUN

_CONNECT = 10.0  # seconds within which a server must accept a connection
# A host that has vanished says nothing. After 30 s of silence it is asked every 10 s for a sign of life, which its
# kernel gives, whatever the server computes; the connection ends after three questions without an answer.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


class NotReady(Exception):
    """The server cannot be reached, or cannot answer now. Asking again may help.

    Attributes:
        was_lost: the connection ended while the answer was awaited.
        seconds: how long the server has worked on the request; 0 if it was not reached.
    """

    def __init__(self, text: str, *, was_lost: bool = False, seconds: float = 0.0):
        super().__init__(text)
        self.was_lost, self.seconds = was_lost, seconds


class TooSlow(Exception):
    """The server has not answered in time."""


class Refused(Exception):
    """The server says what is wrong with a request. Asking again would not help."""


class Client:
    """Sends requests to one server, from any number of threads.

    Args:
        url: "http://HOST:PORT".
        run: the name of the run for which this reserves the server; "": it does not.

    Attributes:
        is_closed: whether ``close`` was called.
    """

    def __init__(self, url: str, run: str = ""):
        self._headers = {RUN: run} if run else {}
        parts, self.url, self.is_closed = urlsplit(url), url, False
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._lock, self._open = threading.Lock(), set[http.client.HTTPConnection]()

    def get(self, path: str, seconds: float) -> dict[str, Any]:
        """The answer to a GET request; see ``post``."""
        return self._ask("GET", path, b"", seconds)

    def post(self, path: str, body: bytes | dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to a POST request.

        Args:
            path: the route, such as "/generate".
            body: bytes, or what is to be sent as JSON.
            seconds: how long to wait for the answer.

        Raises:
            NotReady: the server cannot be reached, or cannot answer now.
            TooSlow: there was no answer in time.
            Refused: the server refuses the request, or has failed.
        """
        return self._ask("POST", path, json.dumps(body).encode() if isinstance(body, dict) else body, seconds)

    def close(self) -> None:
        """Ends all requests, which the server then stops working on. Later ones fail at once."""
        with self._lock:
            self.is_closed = True
            for connection in self._open:
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def _ask(self, method: str, path: str, body: bytes, seconds: float) -> dict[str, Any]:
        connection, began = self._connected(seconds), time.monotonic()
        was_sent = False
        try:
            connection.request(method, path, body, self._headers)
            was_sent = True
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, TimeoutError) and error.errno is None:  # else the kernel's, of the connection
                raise TooSlow(f"no answer in {seconds:.0f} s") from None
            worked = time.monotonic() - began
            raise NotReady(str(error) or type(error).__name__, was_lost=was_sent, seconds=worked) from None
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
        if response.status == http.client.SERVICE_UNAVAILABLE:
            raise NotReady(text, seconds=time.monotonic() - began)
        if response.status != http.client.OK:
            raise Refused(text)
        try:
            return parse_json(text)
        except ValueError:
            raise Refused(f"its answer is not JSON: {shortened(text)}") from None

    def _connected(self, seconds: float) -> http.client.HTTPConnection:
        """A new connection, which ``close`` ends. Waiting for an answer ends after ``seconds``."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_CONNECT)
        try:
            if not self.is_closed:
                connection.connect()
                connection.sock.settimeout(seconds)
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name, value in _KEEP_ALIVE.items():
                    if hasattr(socket, name):
                        connection.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        except OSError as error:
            connection.close()
            raise NotReady(str(error) or type(error).__name__) from None
        with self._lock:
            if not self.is_closed:
                self._open.add(connection)
                return connection
        connection.close()
        raise NotReady("the connection was closed")
