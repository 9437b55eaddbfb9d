"""The documentation: generated pages match the code, links and names of files lead somewhere, lines are short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "configs" / "README.md", *(ROOT / "docs").glob("*.md")]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
# `training/step.py`, `megavlm/data/row.py`, `tests/toy.py`; VERB.yaml and the like are placeholders
PATH = re.compile(r"`((?:[\w-]+/)+[\w-]+\.(?:py|yaml|sh|json))\b")


def test_generated_pages_are_fresh() -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "docs.generate", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [target for target in LINK.findall(text) if "://" not in target]
    folders = (ROOT, ROOT / "megavlm", page.parent)
    missing = [target for target in links if not (page.parent / target).exists()]
    for name in PATH.findall(text):
        if not re.search(r"[A-Z]{4}", name) and not any((folder / name).is_file() for folder in folders):
            missing.append(name)
    assert not missing


def test_files_named_in_the_picture_exist() -> None:
    picture = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    names = re.findall(r'class="code">([\w/]+\.py)<', picture)
    assert names
    assert not [name for name in names if not (ROOT / "megavlm" / name).is_file()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_are_short(page: Path) -> None:
    long, in_code = [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        in_code ^= line.startswith("```")
        free = in_code or line.startswith(("|", "[!["))  # code, tables and pictures' descriptions
        if len(line) > 120 and not free:
            long.append(f"{number}: {line}")
    assert not long


def test_each_folder_of_the_package_has_a_line_in_the_table() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)/` \|", page.partition("## Folders")[2], re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.parent.name for path in (ROOT / "megavlm").glob("*/__init__.py")}


def test_every_page_is_linked_from_the_readme_and_stands_in_the_site() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}  # which is the README of the site
    readme, site = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "zensical.toml"))
    assert set(re.findall(r"\]\(docs/([\w-]+\.md)", readme)) == pages
    assert set(re.findall(r'= "([\w-]+\.md)"', site)) - {"index.md"} == pages


def test_the_tour_counts_its_lines() -> None:
    """To the nearest hundred; a file of the list that is gone cannot be counted."""
    text = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
    files = re.findall(r"^\d\. `(megavlm/[^`]+)`", text, re.MULTILINE)
    lines = sum((ROOT / file).read_text(encoding="utf-8").count("\n") for file in files)
    assert len(files) == 6
    assert f"about {round(lines, -2):,} lines" in text
