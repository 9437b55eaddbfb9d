"""Pages in a browser on a phone: nothing is wider than 400 pixels. Skipped unless Debian's `chromium` is installed."""

import re
import shutil
import subprocess

import pytest
from test_preferences import METHODS, lines_of, report_of
from test_rollouts_page import page as sampled
from test_run_report import runs

from megavlm.report.run_report import write_report

__all__ = ["runs", "sampled"]  # fixtures
WIDTH = 400
FRAME = """<iframe id="page" src="{name}" style="width: {width}px; height: 900px; border: 0"></iframe><p id="found"></p>
<script>page.onload = () => {{
  const root = page.contentDocument.documentElement;
  found.textContent = `${{root.clientWidth}} < ${{root.scrollWidth}}`;
}}</script>"""


def widths(folder, name) -> tuple[int, int]:
    """Width of a page's window in pixels, without the scroll bar, and of what stands on the page."""
    (folder / "frame.html").write_text(FRAME.format(name=name, width=WIDTH))
    browser = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-web-security"),
        *(f"--user-data-dir={folder / 'browser'}", "--virtual-time-budget=5000", "--dump-dom"),
    ]
    url = (folder / "frame.html").as_uri()
    dom = subprocess.run([*browser, url], capture_output=True, text=True, timeout=300, check=True).stdout
    window, page = re.search(r'id="found">(\d+) &lt; (\d+)<', dom).groups()
    return int(window), int(page)


@pytest.fixture(autouse=True, scope="module")
def browser():
    if not shutil.which("chromium"):
        pytest.skip("needs chromium")


@pytest.mark.parametrize("kind", ["answers", *METHODS, "sampled"])
def test_nothing_is_to_be_scrolled_sideways(kind, request, tmp_path):
    if kind == "answers":
        text = write_report(request.getfixturevalue("runs") / "sft").read_text()
    elif kind == "sampled":
        text = request.getfixturevalue("sampled")
    else:
        more = {"accuracy": 0.5, "margin": 1.25, "loss/a source with a long name": 1.0, **METHODS[kind][0]}
        text = report_of(tmp_path / "run", lines_of(**more))
    (tmp_path / "page.html").write_text(text)
    window, page = widths(tmp_path, "page.html")
    assert WIDTH - 20 < window <= WIDTH
    assert page == window
