"""Pages in a browser as wide as a phone and as a desktop: nothing is wider or covers anything, no error of a script.

Skipped unless Debian's `chromium` is installed.
"""

import json
import math
import shutil
import threading

import pytest
from browser import OVERLAPS, Browser
from test_preferences import METHODS, lines_of, report_of
from test_rollouts_page import page as sampled
from test_run_report import runs

from megavlm.report.run_report import write_report
from megavlm.watch.follow import find_runs
from megavlm.watch.server import PageServer

__all__ = ["runs", "sampled"]  # fixtures
WIDTHS = (400, 1280)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not shutil.which("chromium"):
        pytest.skip("needs chromium")
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def check(browser, url, width, ready="true") -> None:
    browser.open(url, width, ready)
    inside, page = browser.value("[document.documentElement.clientWidth, document.documentElement.scrollWidth]")
    assert inside == width
    assert page == width
    assert browser.value(OVERLAPS) == []
    assert browser.value("document.body.innerText.length") > 100
    assert browser.errors == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["answers", *METHODS, "sampled"])
def test_a_report_fits_its_window(kind, width, request, browser, tmp_path):
    if kind == "answers":
        text = write_report(request.getfixturevalue("runs") / "sft").read_text()
    elif kind == "sampled":
        text = request.getfixturevalue("sampled")
    else:
        more = {"accuracy": 0.5, "margin": 1.25, "loss/a source with a long name": 1.0, **METHODS[kind][0]}
        text = report_of(tmp_path / "run", lines_of(**more))
    (tmp_path / "page.html").write_text(text)
    check(browser, (tmp_path / "page.html").as_uri(), width)


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """The page of `megavlm watch` with two runs, of which one has experts, and one a long name."""
    folder = tmp_path_factory.mktemp("watched")
    for number, name in enumerate(("one", "a-second-run-whose-name-is-as-long-as-people-make-them")):
        (folder / name).mkdir()
        lines = [
            {
                **{"step": step, "loss": 3.0 / step + number, "lr": 1e-5 * math.sin(step / 9) ** 2, "grad_norm": 1.0},
                **{"tokens_per_second": 1e5, "eval/loss": 2.0, "loss/a source with a long name": 2.0},
            }
            for step in range(1, 60)
        ]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    load = {"step": 3, "layers": list(range(1, 49)), "tokens": [[n % 7 for n in range(128)]] * 48}
    (folder / "one/expert_load.json").write_text(json.dumps(load))
    with PageServer(find_runs([folder]), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.url
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_live_page_fits_its_window(width, browser, live):
    check(browser, live, width, "document.querySelectorAll('svg path').length > 2")
