"""The modules of the package and their syntax trees, of which the rules of the house ask much."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "megavlm").rglob("*.py"))


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """All nodes of a module's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
