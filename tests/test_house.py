"""Rules of the house that no linter knows: how long a file gets, one meaning for a name, and what stands in no file."""

import ast
import re
import subprocess
from collections import Counter

import pytest
from syntax_trees import MODULES, ROOT, nodes

MAX_LINES = 350

# Public classes of one name and several meanings; one of which only one is left must leave this list.
NAMESAKES = {
    *("AnswerGroup", "Asked", "Call", "Card", "Conversation", "Experts", "Frames", "Group", "Held", "Layout", "Line"),
    *("Measured", "Places", "Progress", "Step", "TrainedModel", "Turn", "Weights", "Work"),
}

# Addresses of package registries, and absolute paths that only one machine has.
REGISTRY = re.compile(rb"\b(pypi|pythonhosted|anaconda|npmjs)\.(org|com)\b")
MACHINE_PATH = re.compile(rb"(?<![\w.$}])/(work|root|home|Users)/\w|(?<![\w.$}])/tmp/(?!requirements\.txt\b)\w")


def test_rooms_are_neither_halls_nor_cupboards() -> None:
    sizes: dict[str, int] = {}
    for path in MODULES:
        room, *rest = path.relative_to(ROOT / "megavlm").parts
        if rest:
            sizes[room] = sizes.get(room, 0) + path.read_text(encoding="utf-8").count("\n")
    assert not {room: size for room, size in sizes.items() if not 100 <= size <= 3000}


def test_one_name_has_one_meaning() -> None:
    """Of public classes, wherever in the package they are defined."""
    names = Counter(
        node.name
        for path in MODULES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name for name, count in names.items() if count > 1} == NAMESAKES


def test_no_module_is_long() -> None:
    lengths = {path: path.read_text(encoding="utf-8").count("\n") for path in MODULES}
    assert not {str(path): length for path, length in lengths.items() if length > MAX_LINES}


def test_tests_stand_where_the_package_stands() -> None:
    """Besides, what CONTRIBUTING.md says of tests."""
    folders = lambda root: {path.relative_to(root).parts[0] for path in root.glob("*/*.py")}
    package, tested = folders(ROOT / "megavlm"), folders(ROOT / "tests")
    # A folder "vllm" would be found as the package vllm where that is not installed.
    assert package - tested == {"adapters", "bench", "charts", "evaluation", "inspection", "vllm"}
    assert tested - package == {"configs", "distributed", "docs", "gpu", "launch", "sweep", "te_cpu"}


def test_every_test_file_has_a_name_of_its_own() -> None:
    """pytest imports each as a module of that name, and refuses the second; when one file is run, that is not seen."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]


def test_only_the_platform_asks_for_a_gpu() -> None:
    asking = []
    for path in MODULES:
        if path.parent.name != "platform":
            # torch.cuda.is_available is an attribute's name, `from torch.cuda import is_available` an alias's
            names = [getattr(node, "attr", None) or getattr(node, "name", None) for node in nodes(path)]
            asking += [str(path)] * ("is_available" in names)
    assert not asking


def test_objects_travel_between_ranks_in_one_place() -> None:
    """``platform/collectives.py``; ``absent.py`` stands for the ranks that do not exist."""
    sending = re.compile(r"\b\w*(scatter|gather|broadcast|send|recv)_object(_list)?\b")
    found = {
        path.relative_to(ROOT / "megavlm").as_posix()
        for path in MODULES
        for node in nodes(path)
        if isinstance(node, ast.Attribute)
        and sending.fullmatch(node.attr)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("dist", "distributed")
    }
    assert found == {"platform/collectives.py", "platform/absent.py"}


def test_no_registry_and_no_path_of_one_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for path in (ROOT / name for name in listed.stdout.split("\0") if name):
        content = path.read_bytes() if path.is_file() else b""  # a file may be deleted and not yet committed so
        for number, line in enumerate(content.split(b"\n"), start=1):
            if REGISTRY.search(line) or MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line[:100].decode(errors='replace').strip()}")
    assert not found
