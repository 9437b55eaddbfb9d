"""YAML files with `base:` and environment variables, and a record of where each key was set.

Scalars follow YAML 1.2, not YAML 1.1 as in PyYAML: `1e-5` is a number, `off` and `no` are text, and `1:30` is not 90.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted, shortened

Location = tuple[str | int, ...]  # ("data", "train", 0, "path")

# What PyYAML raises: beside its own errors, those of int() and others for a tag (!!int a, !!timestamp 1), and that of a
# file which is nested too deeply or contains itself.
_FAILURES = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError)

_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}")
_SCALARS = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9_]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, (pattern, first_characters) in _SCALARS.items():
        for character in first_characters:
            key = "" if character == "\0" else character  # PyYAML looks the empty scalar up under ""
            table.setdefault(key, []).append((f"tag:yaml.org,2002:{name}", re.compile(rf"(?:{pattern})\Z")))
    return table


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars above. A key that is written twice is an error."""

    yaml_implicit_resolvers = _resolvers()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is written twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` or a reader of YAML 1.1 would not read as text."""

    yaml_implicit_resolvers = {
        first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *ours] for first, ours in _resolvers().items()
    } | {first: old for first, old in yaml.SafeDumper.yaml_implicit_resolvers.items() if first not in _resolvers()}

    def ignore_aliases(self, data: Any) -> bool:
        return True


@dataclass
class Values:
    """Nested values as written in files and overrides, and for each location the "file:line" that set it."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[Location, str] = field(default_factory=dict)

    def origin(self, location: Location) -> str | None:
        """Where the value at `location` was set, or else the nearest value that contains it."""
        while location:
            if location in self.origins:
                return self.origins[location]
            location = location[:-1]
        return None

    def update(self, newer: "Values") -> None:
        """Merges `newer` into this: sections are merged key by key, all other values (lists, too) are replaced."""
        self.tree = _merged(self.tree, newer.tree)
        self.origins.update(newer.origins)


def read_file(path: Path) -> Values:
    """Reads a YAML file and the files that its `base:` names (one file or a list, where later files override earlier).

    `base:` entries are relative to the file that names them. `${VAR}` and `${VAR:-default}` in any value are replaced
    by environment variables. If the result looks like a number, true, false or null, it is read as such.

    Raises:
        UserError: a file is missing or does not parse, the bases form a cycle, or a variable is not set.
    """
    return _read_with_bases(Path(path), ())


def read_plain(path: Path) -> Any:
    """The content of a YAML file as it stands there: `base:` and environment variables are not followed.

    Raises:
        OSError: the file cannot be read.
        UserError: it is not text in UTF-8, or does not parse.
    """
    return _parse(path)[0]


def parse_override(text: str) -> Values:
    """Reads `section.key=value`, where the value is YAML. Raises a UserError if the text does not have that form."""
    key, equals, value = text.partition("=")
    location = tuple(key.split("."))
    if not equals or not all(location):
        raise UserError(f"override {quoted(text)} is not of the form section.key=value", _instead_of(text))
    try:
        tree = yaml.load(value, _Loader)
    except _FAILURES as error:
        raise UserError(
            f"override {quoted(text)}: the value does not parse as YAML: {_problem(error)}", "quote it: key='\"value\"'"
        ) from error
    origin = f"override {shortened(text)}"
    try:
        tree = _expand(tree, location, lambda _: origin)
    except RecursionError as error:  # an anchor that contains itself
        raise UserError(
            f"{origin}: the value does not parse as YAML: {_problem(error)}", "remove the anchor in the value"
        ) from None
    for part in reversed(location):
        tree = {part: tree}
    return Values(tree, {location: origin})


def _instead_of(text: str) -> str:
    """The remedy for an argument that is no override."""
    if text.endswith((".yaml", ".yml")):
        return f"give one configuration file; it can read others first, with the line base: {shortened(text)}"
    if re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)*", text):
        return f"write the value after an equals sign, without spaces: {text}=VALUE"
    return "example: train.steps=100"


def dump(tree: Any) -> str:
    """`tree` as YAML text, in the given order. `read_file` reads the same values from it."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _read_with_bases(path: Path, above: tuple[Path, ...]) -> Values:
    if os.path.realpath(path) in map(os.path.realpath, above):  # Path.resolve raises for links in a circle
        chain = " → ".join(str(p) for p in (*above, path))
        raise UserError(f"base files form a cycle: {chain}", "remove one of these base: lines")
    own = _read_one(path, named_by=above[-1] if above else None)
    bases = own.tree.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(
            f"base is {quoted(bases)} ({own.origin(('base',))}); allowed: a file name or a list of file names",
            "example: base: common.yaml",
        )
    values = Values()
    for base in bases:
        values.update(_read_with_bases(path.parent / Path(base).expanduser(), (*above, path)))
    values.update(own)
    return values


def _read_one(path: Path, named_by: Path | None) -> Values:
    try:
        tree, values = _parse(path)
    except OSError as error:
        of = f" (base of {named_by})" if named_by else ""
        remedy = "check the path" if named_by else f"check the path; relative paths start from {Path.cwd()}"
        if "=" in path.name:
            remedy = "the configuration file comes first, then settings: CONFIG.yaml section.key=value"
        raise UserError(f"cannot read configuration file {path}{of}: {error.strerror}", remedy) from error
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}, not settings", "write section: and key: value lines")
    values.tree = _expand(values.tree, (), values.origin)
    return values


def _parse(path: Path) -> tuple[Any, Values]:
    """The content of one file, and the same with the line of each key."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        tree = loader.construct_document(node) if node else {}
        values = Values(tree or {})
        if isinstance(node, yaml.MappingNode):
            _note_lines(node, (), path, values.origins)
        return tree, values
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not a text file in UTF-8: {error.reason} at byte {error.start}", "save it as UTF-8"
        ) from error
    except _FAILURES as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(
            f"{where}: does not parse as YAML: {_problem(error)}", "look at this line and the one above"
        ) from error


def _note_lines(node: yaml.Node, location: Location, path: Path, origins: dict[Location, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, child) for key, child in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, child, child) for index, child in enumerate(node.value)]
    else:
        return
    for name, marked, child in children:
        origins[(*location, name)] = f"{path}:{marked.start_mark.line + 1}"
        _note_lines(child, (*location, name), path, origins)


def _problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)[:200] or "not understood"


def _expand(value: Any, location: Location, origin_of: Callable[[Location], str | None]) -> Any:
    """Replaces ${VAR} and ${VAR:-default} by environment variables in all strings of `value`."""
    if isinstance(value, dict):
        return {key: _expand(item, (*location, key), origin_of) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, (*location, index), origin_of) for index, item in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.groups()
        if default is not None:
            return os.environ.get(name) or default
        if name not in os.environ:
            key = ".".join(str(part) for part in location)
            raise UserError(
                f"{key} uses ${{{name}}} ({origin_of(location)}), but the environment variable {name} is not set",
                f"export {name}=… or write ${{{name}:-default}}",
            )
        return os.environ[name]

    expanded = _VARIABLE.sub(replace, value)
    for tag in ("null", "bool", "int", "float"):
        if re.fullmatch(_SCALARS[tag][0], expanded):
            return yaml.load(expanded, _Loader)
    return expanded


def _merged(older: Any, newer: Any) -> Any:
    if isinstance(older, dict) and newer is None:
        return older  # an empty section in a file changes nothing
    if not isinstance(older, dict) or not isinstance(newer, dict):
        return newer
    return {**older, **{key: _merged(older.get(key), value) for key, value in newer.items()}}
