"""Who imports whom in the package: downward only, in no circle, and small modules little."""

import ast
import graphlib
import sys
from pathlib import Path

from syntax_trees import MODULES, ROOT, nodes

# What each folder or file of the package may import from the package, beside itself. A name allows all below it.
MAY_IMPORT = {
    "base": [],
    "config": ["base"],
    "layout": ["platform", "config", "base"],
    "output": ["config", "base"],
    "platform": ["base"],
    "model": ["layout", "platform", "config", "base"],
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
    "rollout": ["runtime", "environments", "data", "model", "layout", "platform", "config", "base"],
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
    "cli": ["commands.needed", "align", "rewards", "environments", "output", "layout", "config", "base"],
    "__main__": ["cli"],
    "demo": ["cli", "checkpoint", "convert", "config", "base"],
}
# (file, what it imports): upward edges that are to go; one that has gone must leave this list.
EXCEPTIONS: set[tuple[str, str]] = set()


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


def test_no_import_goes_round_in_a_circle() -> None:
    """Between modules, imports for type checking included."""
    by_name = {".".join(path.relative_to(ROOT / "megavlm").with_suffix("").parts): path for path in MODULES}
    edges = {
        name: {found for dotted in imports(path) for found in (dotted, dotted.rpartition(".")[0]) if found in by_name}
        for name, path in by_name.items()
    }
    graphlib.TopologicalSorter(edges).prepare()  # raises CycleError, which names the circle


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
