"""A local page that shows runs while they train. It listens on this machine alone and only ever reads.

Two addresses exist: ``/`` is the page, and ``/data`` the curves as JSON. No address names a file, so none can leave the
folders. Requests under another host's name are refused, so that no page of the web can pass itself off as this one (DNS
rebinding).
"""

import json
import secrets
import threading
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from megavlm.base.errors import UserError
from megavlm.report.experts import expert_map
from megavlm.report.page import render_page
from megavlm.watch.follow import MAIN, FollowedRun, sorted_fields

ADDRESS = "127.0.0.1"
FIRST_PORT, PORTS = 8471, 20  # tried in order unless --port is given
_HOSTS = {"127.0.0.1", "localhost", "::1"}  # also behind a tunnel of ssh, whatever its port
_MOST_POINTS = 600  # of a curve
_MOST_FIELDS = 4000  # in one request


class PageServer(ThreadingHTTPServer):
    """The server of the page.

    Args:
        runs: the runs to show.
        port: the port; None: the first free one from ``FIRST_PORT`` on; 0: any free one.

    Raises:
        UserError: the port is taken.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, runs: Sequence[FollowedRun], port: int | None = None) -> None:
        self.runs, self.reading = runs, threading.Lock()
        ports = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]
        for number in ports:
            with suppress(OSError, OverflowError):
                super().__init__((ADDRESS, number), _Handler)
                return
        tried = f"the ports {ports[0]} to {ports[-1]} are" if port is None else f"port {port} is"
        raise UserError(f"{tried} taken or not allowed on this machine", "give another one with --port")

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/"

    def data(self, fields: Sequence[str], known: str) -> dict:
        """What has been asked for; without curves if ``known`` says that the page has the newest ones."""
        with self.reading:
            for run in self.runs:
                run.read()
            state = json.dumps([[(*run.version, run.experts_changed) for run in self.runs], list(fields)])
            answer: dict = {"state": state, "runs": [run.facts() for run in self.runs]}
            if state == known:
                return answer
            answer["fields"] = sorted_fields(name for run in self.runs for name in run.fields)
            for run, facts in zip(self.runs, answer["runs"], strict=True):
                points = {name: run.points(name, _MOST_POINTS) for name in fields}
                facts["curves"] = {name: vars(found) for name, found in points.items() if found.steps}
                with suppress(UserError):  # of a file that is no such map
                    facts["experts"] = str(expert_map(run.folder))
        return answer


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = 30  # seconds for which a connection may be silent
    server_version, sys_version = "megavlm", ""
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answers a request."""
        address = urlsplit(self.path)
        if not self._is_for_us():
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "this page belongs to localhost alone")
        elif address.path == "/":
            nonce = secrets.token_urlsafe(16)
            policy = (
                f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; connect-src 'self'; "
                "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            )
            page = render_page("watch.html.jinja", nonce=nonce, main=list(MAIN))
            self._send(HTTPStatus.OK, "text/html", page, {"Content-Security-Policy": policy})
        elif address.path == "/data":
            asked = parse_qs(address.query)
            answer = self.server.data(asked.get("field", [])[:_MOST_FIELDS], asked.get("state", [""])[0])
            self._send(HTTPStatus.OK, "application/json", json.dumps(answer))
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "there is only / and /data")

    def _is_for_us(self) -> bool:
        try:
            return urlsplit(f"//{self.headers.get('Host', '')}").hostname in _HOSTS
        except ValueError:
            return False

    def _send(self, status: HTTPStatus, kind: str, text: str, headers: dict[str, str] | None = None) -> None:
        body = text.encode("utf-8", errors="replace")
        common = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        self.send_response(status)
        for name, value in (common | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):  # the browser has gone
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Says nothing: there is a request every two seconds."""
