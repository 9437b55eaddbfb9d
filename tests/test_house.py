"""Rules of the house that no linter knows: who imports whom, how long a file gets, and what stands in no file."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "megavlm").rglob("*.py"))
MAX_LINES = 350

# What each folder or file of the package may import from the package, beside itself. A name allows all below it.
MAY_IMPORT = {
    "base": [],
    "config": ["base"],
    "layout": ["config", "base"],
    "output": ["config", "base"],
    "platform": [],
    "model": ["platform", "config", "base"],
    "media": ["base"],
    "chat": ["base"],
    "records": ["base"],
    "sources": ["records", "media", "config", "base"],
    "workers": ["sources", "base"],
    "data": ["workers", "sources", "records", "chat", "media", "config", "base"],
    "prepare": ["sources", "records", "media", "base"],
    "duplicates": ["sources", "records", "media", "base"],
    "convert": ["model.shapes", "model.score_head", "config", "base"],
    "adapters": ["convert", "model", "platform", "config", "base"],
    "optim": ["adapters.sites", "convert", "model", "platform", "config", "base"],
    "checkpoint": ["optim", "adapters", "convert", "data", "sources", "media", "model", "platform", "config", "base"],
    "monitor": ["data", "sources", "records", "media", "platform", "config", "base"],
    "charts": ["base"],
    "report": ["charts", "output", "monitor", "sources", "records", "media", "config", "base"],
    "inspection": ["report", "data", "sources", "records", "config", "base"],
    "hub": ["align.registry", "report", "output", "config", "base"],
    "watch": ["report", "monitor", "base"],
    "runtime": [
        "output",
        "monitor",
        "checkpoint",
        "adapters",
        "convert",
        "data",
        "records",
        "sources",
        "model",
        "platform",
        "layout",
        "config",
        "base",
    ],
    "training": [
        "runtime",
        "output",
        "monitor",
        "checkpoint",
        "optim",
        "data",
        "records",
        "model",
        "platform",
        "config",
        "base",
    ],
    "evaluation": [
        "align.answering",
        "training",
        "rollout",
        "rewards",
        "runtime",
        "monitor",
        "checkpoint",
        "data",
        "workers",
        "sources",
        "records",
        "model",
        "platform",
        "config",
        "base",
    ],
    "align": [
        "training",
        "runtime",
        "checkpoint",
        "data",
        "workers",
        "sources",
        "records",
        "media",
        "model",
        "platform",
        "config",
        "base",
    ],
    "environments": ["rewards", "data", "media", "config", "base"],
    "rollout": ["runtime", "environments", "data", "model", "platform", "config", "base"],
    "vllm": ["rollout", "runtime", "data", "convert", "platform", "config", "base"],
    "rewards": ["records", "config", "base"],
    "reinforcement": [
        "align",
        "evaluation",
        "rollout",
        "vllm",
        "rewards",
        "environments",
        "training",
        "runtime",
        "monitor",
        "checkpoint",
        "optim",
        "adapters",
        "data",
        "records",
        "model",
        "platform",
        "layout",
        "config",
        "base",
    ],
    "tracing": ["training", "runtime", "optim", "adapters", "monitor", "model", "platform", "config"],
    "plan": [
        "checkpoint",
        "tracing",
        "rollout",
        "align",
        "training",
        "runtime",
        "optim",
        "adapters",
        "convert",
        "data",
        "model",
        "platform",
        "config",
        "base",
    ],
    "bench": [
        "plan",
        "tracing",
        "align",
        "training",
        "runtime",
        "optim",
        "monitor",
        "data",
        "model",
        "platform",
        "config",
        "base",
    ],
    "search": ["plan", "runtime", "model", "config", "base"],
    "commands": [
        "output",
        "inspection",
        "bench",
        "search",
        "plan",
        "tracing",
        "align",
        "evaluation",
        "training",
        "vllm",
        "rollout",
        "rewards",
        "environments",
        "runtime",
        "hub",
        "report",
        "watch",
        "checkpoint",
        "optim",
        "convert",
        "prepare",
        "duplicates",
        "data",
        "sources",
        "records",
        "media",
        "model",
        "layout",
        "config",
        "base",
    ],
    "cli": ["align", "rewards", "environments", "output", "layout", "config", "base"],
    "__main__": ["cli"],
    "demo": ["cli", "checkpoint", "convert", "config", "base"],
}
# (file, what it imports): upward edges that are to go; one that has gone must leave this list.
EXCEPTIONS: set[tuple[str, str]] = set()

# Public classes of one name and several meanings; one of which only one is left must leave this list.
NAMESAKES = {
    *("AnswerGroup", "Asked", "Call", "Card", "Conversation", "Experts", "Frames", "Group", "Held", "Layout", "Line"),
    *("Measured", "Places", "Progress", "Step", "TrainedModel", "Turn", "Weights", "Work"),
}

# Addresses of package registries, and absolute paths that only one machine has.
REGISTRY = re.compile(rb"\b(pypi|pythonhosted|anaconda|npmjs)\.(org|com)\b")
MACHINE_PATH = re.compile(rb"(?<![\w.$}])/(work|root|home|Users)/\w|(?<![\w.$}])/tmp/(?!requirements\.txt\b)\w")


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """All nodes of a module's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports(path: Path) -> set[str]:
    """Dotted names inside the package that a module imports, wherever in it the import stands; without "megavlm."."""
    names = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("megavlm.") for name in names if name.startswith("megavlm.")}


def is_module(name: str) -> bool:
    """Whether the first part of a dotted name is a file or folder of the package, not something in its __init__."""
    path = ROOT / "megavlm" / name.partition(".")[0]
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_imports_run_downward() -> None:
    wrong = set()
    for path in MODULES:
        file = path.relative_to(ROOT / "megavlm")
        here = file.with_suffix("").parts[0]
        if here == "__init__":
            allowed = []
        else:
            assert here in MAY_IMPORT, f"megavlm/{here} is new: say in MAY_IMPORT what it may import"
            allowed = [here, *MAY_IMPORT[here]]
        for name in filter(is_module, imports(path)):
            if not any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed):
                wrong.add((file.as_posix(), name))
    assert wrong == EXCEPTIONS


def test_every_allowed_import_is_used() -> None:
    used: dict[str, set[str]] = {}
    for path in MODULES:
        used.setdefault(path.relative_to(ROOT / "megavlm").with_suffix("").parts[0], set()).update(imports(path))
    unused = {
        (here, prefix)
        for here, prefixes in MAY_IMPORT.items()
        for prefix in prefixes
        if not any(f"{name}.".startswith(f"{prefix}.") for name in used.get(here, ()))
    }
    assert not unused


def test_rooms_are_neither_halls_nor_cupboards() -> None:
    sizes: dict[str, int] = {}
    for path in MODULES:
        room, *rest = path.relative_to(ROOT / "megavlm").parts
        if rest:
            sizes[room] = sizes.get(room, 0) + path.read_text(encoding="utf-8").count("\n")
    assert not {room: size for room, size in sizes.items() if not 100 <= size <= 3000}


def test_no_import_goes_round_in_a_circle() -> None:
    """Between modules, imports for type checking included."""
    by_name = {".".join(path.relative_to(ROOT / "megavlm").with_suffix("").parts): path for path in MODULES}
    edges = {
        name: {found for dotted in imports(path) for found in (dotted, dotted.rpartition(".")[0]) if found in by_name}
        for name, path in by_name.items()
    }
    graphlib.TopologicalSorter(edges).prepare()  # raises CycleError, which names the circle


def test_one_name_has_one_meaning() -> None:
    """Of public classes, wherever in the package they are defined."""
    names = Counter(
        node.name
        for path in MODULES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name for name, count in names.items() if count > 1} == NAMESAKES


def test_the_training_loop_stays_small() -> None:
    modules = {name.rpartition(".")[0] for name in imports(ROOT / "megavlm" / "training" / "loop.py")}
    assert len(modules) <= 15


def test_losses_import_torch_alone() -> None:
    """And the tables of their names, which import nothing."""
    folder = ROOT / "megavlm" / "align" / "losses"
    tables = folder.with_name("loss_tables.py")
    found = set()
    for path in (*folder.glob("*.py"), tables):
        for node in nodes(path):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module)
    ours = {f"megavlm.align.losses.{path.stem}" for path in folder.glob("*.py")} | {"megavlm.align.loss_tables"}
    strangers = {name for name in found - ours if name.partition(".")[0] not in {"torch", *sys.stdlib_module_names}}
    assert "torch" in found
    assert not strangers


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
