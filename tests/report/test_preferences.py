"""Accuracy, margin and rewards of dpo, kto and rm in report.html, in words; what a narrow page does not do."""

import json
import re

import pytest
import yaml

from megavlm.monitor.metrics import REQUIRED, MetricsWriter
from megavlm.report.preferences import method_charts
from megavlm.report.run_report import write_report

METHODS = {
    "dpo": ({"pairs": 4, "rewards/chosen": 1.0, "rewards/rejected": -1.0}, "chosen answer has the higher reward"),
    "rm": ({"pairs": 4, "scores/mean": 0.0, "scores/std": 1.0}, "chosen answer has the higher score"),
    "kto": (
        {"z0": 0.0, "rewards/desirable": 1.0, "rewards/undesirable": None},
        "answers rewarded as they are labelled",
    ),
}


def lines_of(count=4, **fields):
    return [{**dict.fromkeys(REQUIRED, 1.0), "step": step, "mfu": None, **fields} for step in range(1, count + 1)]


def report_of(folder, lines):
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"hf": "hf", "freeze": []}}))
    with MetricsWriter(folder) as writer:
        for line in lines:
            writer.write(line)
    return write_report(folder).read_text()


@pytest.mark.parametrize("method", METHODS)
def test_report_has_accuracy_and_margin_as_curves_with_plain_labels(method, tmp_path):
    fields, words = METHODS[method]
    lines = lines_of(**fields)
    for line, accuracy, margin in zip(lines, (0.25, 0.5, 0.5, 0.75), (0.5, None, 1.0, 1.5), strict=True):
        line |= {"accuracy": accuracy, "margin": margin}
    page = report_of(tmp_path / "run", lines)
    assert words in page
    assert "75.0 %</b><span>accuracy, 25.0 % at the start" in page
    assert "1.500</b><span>margin, 0.5000 at the start" in page
    drawn = dict(re.findall(r"<figcaption><b>([^<]*)</b>.*?data-chart=\"([^\"]*)\"", page))
    values = {
        title: [[value for _, value in curve["points"]] for curve in json.loads(data.replace("&#34;", '"'))["curves"]]
        for title, data in drawn.items()
    }
    assert values["Accuracy, %"] == [["25.00", "50.00", "50.00", "75.00"]]
    assert values["Margin"] == [["0.5000", "1.000", "1.500"]]
    assert ("Mean reward" in drawn) == (method != "rm")
    assert "None" not in page


def test_report_of_other_runs_has_no_such_curves(tmp_path):
    page = report_of(tmp_path / "run", lines_of())
    assert not re.search("ccuracy|[Rr]eward|Sampled answers|Warnings", page.partition("</style>")[2])
    assert [drawn for drawn in method_charts(lines_of()) if drawn] == []


def test_several_sources_and_the_divergence_have_curves():
    drawn = "".join(method_charts(lines_of(**{"loss/captions": 2.0, "loss/ocr": 3.0, "kl_to_start": 0.1})))
    assert re.findall(r"<b>([^<]*)</b>", drawn) == ["Loss of each source", "Divergence from the start (KL)"]
    assert re.findall(r'class="key"[^>]*>([^<]*)', drawn) == ["captions", "ocr"]


def test_each_number_of_a_wide_table_has_its_name_beside_it_on_a_narrow_page(tmp_path):
    """The names are those of the columns, which a narrow page does not show."""
    page = report_of(tmp_path / "run", lines_of())
    table = page[page.index('<table class="stack">') : page.index("</table>")]
    heads = re.findall(r"<th[^>]*>([^<]*)", table)
    assert re.findall(r'data-label="([^"]*)"', table) == heads[1:]


def test_words_of_answers_are_not_broken_in_the_middle(tmp_path):
    """`anywhere` would let a narrow column break every word; `break-word` breaks only a word wider than its card."""
    css = report_of(tmp_path / "run", lines_of()).partition("</style>")[0]
    rules = {rule.strip(): body for rule, body in re.findall(r"([^{}]*)\{([^{}]*)\}", css)}
    for name in (".answer dt", ".answer dd"):
        assert "overflow-wrap: break-word" in rules[name]
    assert not [name for name, body in rules.items() if "word-break" in body]
