"""Talks to a server of vLLM over HTTP."""

import http.client
import json
import socket
import threading
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from megavlm.base.quoting import shortened


class NotReady(Exception):
    """The server cannot be reached, or cannot answer now. Asking again may help.

    Attributes:
        was_lost: the connection ended while the answer was awaited.
    """

    def __init__(self, text: str, *, was_lost: bool = False):
        super().__init__(text)
        self.was_lost = was_lost


class TooSlow(Exception):
    """The server has not answered in time."""


class Refused(Exception):
    """The server says what is wrong with a request. Asking again would not help."""


class Client:
    """Sends requests to one server, from any number of threads.

    Args:
        url: "http://HOST:PORT".

    Attributes:
        is_closed: whether ``close`` was called.
    """

    def __init__(self, url: str):
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
        connection = http.client.HTTPConnection(self._host, self._port, timeout=seconds)
        was_sent = False
        try:
            with self._lock:
                if self.is_closed:
                    raise NotReady("the connection was closed")
                self._open.add(connection)
            connection.request(method, path, body)
            was_sent = True
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
        except TimeoutError:
            raise TooSlow(f"no answer in {seconds:.0f} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise NotReady(str(error) or type(error).__name__, was_lost=was_sent) from None
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
        if response.status == http.client.SERVICE_UNAVAILABLE:
            raise NotReady(text)
        if response.status != http.client.OK:
            raise Refused(text)
        try:
            return json.loads(text)
        except ValueError:
            raise Refused(f"its answer is not JSON: {shortened(text)}") from None
