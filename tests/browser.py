"""Headless Chromium under the control of a test, by the pipe of its DevTools protocol: one start for many pages."""

import fcntl
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any, Self

PATIENCE = 120.0  # seconds for an answer or a page on a busy machine
# Pieces of text of different elements that cover each other, as far as their boxes, which may scroll, show them. The
# boxes of two lines may touch, as may the last letter of a label and the next one, so a little is allowed.
OVERLAPS = """(() => {
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const part of range.getClientRects()) {
      const {left, right, top, bottom} = part, box = {left, right, top, bottom, node, text: node.data.trim()};
      for (let above = element; above && above !== document.body; above = above.parentElement) {
        if (getComputedStyle(above).overflow === "visible") continue;
        const edge = above.getBoundingClientRect();
        box.left = Math.max(box.left, edge.left); box.right = Math.min(box.right, edge.right);
        box.top = Math.max(box.top, edge.top); box.bottom = Math.min(box.bottom, edge.bottom);
      }
      if (box.right - box.left > 1 && box.bottom - box.top > 1) found.push(box);
    }
  }
  const over = [];
  for (let i = 0; i < found.length; i++) for (let j = i + 1; j < found.length; j++) {
    const [a, b] = [found[i], found[j]];
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (a.node !== b.node && wide > 3 && high > 0.4 * Math.min(a.bottom - a.top, b.bottom - b.top))
      over.push(`${a.text.slice(0, 40)} | ${b.text.slice(0, 40)}`);
  }
  return over;
})()"""


class Browser:
    """A browser, which ends with its ``with`` block.

    Args:
        folder: a folder for what it writes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._number, self._rest = folder, 0, b""
        self.errors: list[str] = []  # of the page: exceptions, refused or failed requests, console.error

    def __enter__(self) -> Self:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]  # apart from 3 and 4
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars")
        command = ["chromium", *options, f"--user-data-dir={self._folder / 'browser'}", "about:blank"]
        # The protocol wants descriptors 3 and 4; a shell puts them there, whatever is open in this process.
        shell = ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}', "bash", *command]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(shell, pass_fds=theirs, stdout=quiet, stderr=quiet)
        for end in (theirs_in, theirs_out, *theirs):
            os.close(end)
        target = self._ask("Target.createTarget", {"url": "about:blank"}, session=None)["targetId"]
        attach = {"targetId": target, "flatten": True}
        self._session = self._ask("Target.attachToTarget", attach, session=None)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._ask(f"{domain}.enable", {})
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def open(self, url: str, width: int, ready: str = "true") -> None:
        """Opens a page in a window of this width and waits until the expression ``ready`` is true on it."""
        self.errors = []
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        self._ask("Page.navigate", {"url": url})
        deadline = time.monotonic() + PATIENCE
        while not self.value(f"location.href !== 'about:blank' && document.readyState === 'complete' && {ready}"):
            assert time.monotonic() < deadline, f"{url}: not {ready}; {self.errors}"
            time.sleep(0.02)

    def value(self, expression: str) -> Any:
        """The value of an expression on the page."""
        found = self._ask("Runtime.evaluate", {"expression": expression, "returnByValue": True})
        return found["result"].get("value")

    def _ask(self, method: str, parameters: dict[str, Any], session: str | None = "page") -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._in], [], [], PATIENCE)[0], "the browser does not answer"
            more = os.read(self._in, 1 << 20)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, what = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(what["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and what["type"] in ("error", "assert"):
            self.errors.append(json.dumps(what["args"])[:500])
        elif method == "Log.entryAdded" and what["entry"]["level"] == "error":
            self.errors.append(f"{what['entry']['text']} {what['entry'].get('url', '')}")
