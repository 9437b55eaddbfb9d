"""docs/settings.md, written from the classes in megavlm/config: every setting with type, default and meaning."""

import re
import textwrap
from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megavlm.config import describe
from megavlm.config.settings import Settings

WIDTH = 118
_CHOICE = r"\w+(?: \| \w+)+"  # "adam | sgd | galore"
INTRODUCTION = """\
# Settings

<!-- Written by `python -m docs.generate` from the classes in megavlm/config. Do not edit this page by hand. -->

A configuration is a YAML file of nested sections. On the command line, `section.key=value` overrides a setting of the
file. This page lists every setting of every section.

- `base:` names one file or a list of files to inherit from, relative to the file that names them. Later files override
  earlier ones, and the file itself overrides its bases.
- `${VARIABLE}` and `${VARIABLE:-default}` in a string are replaced by environment variables.
- Relative paths start from the current directory.
- Unknown, contradictory or ignored settings are errors. The message names the setting, its value, what is allowed and
  what to do.
- `megavlm VERB --help` prints the settings that the verb reads. `config.yaml` in the output folder has every setting of
  the run, with all defaults written out.

Each entry below gives the key, the allowed values, the default and the meaning.
"""


def page() -> str:
    """The text of docs/settings.md."""
    blocks = [INTRODUCTION, "## Top level\n"]
    fields = Settings.model_fields
    blocks += [_entry(name, field) for name, field in fields.items() if not describe.section_class(field)]
    for name, field in fields.items():
        if section := describe.section_class(field):
            blocks.append(f"## {name}\n")
            blocks.append(_wrapped(section.__doc__.partition("\n")[0], "") + "\n")
            blocks += [_entry(key, inner) for key, inner in _fields(section, f"{name}.", set())]
    return "\n".join(blocks)


def _fields(section: type[BaseModel], prefix: str, shown: set[type]) -> Iterator[tuple[str, FieldInfo]]:
    """The settings of a section in the order of its class, with those of the groups and lists inside it.

    `shown` collects the classes that have been described: each is described once.
    """
    shown.add(section)
    for name, field in section.model_fields.items():
        key = prefix + (field.alias or name)
        if group := describe.section_class(field):
            yield from _fields(group, f"{key}.", shown)
            continue
        yield key, field
        inner, mark = _inner_class(field)
        if inner and inner not in shown:  # a list of sources may hold lists of sources
            yield from _fields(inner, f"{key}{mark}.", shown)


def _inner_class(field: FieldInfo) -> tuple[type[BaseModel] | None, str]:
    """The class of the groups that a field holds, and how a key marks them: "[]" for a list of groups."""
    item = describe.item_class(field)
    is_list = getattr(field.annotation, "__origin__", None) is list
    if item:
        return item, "[]" if is_list else ""
    for option in get_args(field.annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option, ""
    return None, ""


def _entry(key: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    stated = "required" if field.is_required() else f"default `{describe.value_text(default)}`"
    allowed = describe.allowed(field)
    values = {value for choice in re.findall(_CHOICE, allowed) for value in choice.split(" | ")}
    allowed = re.sub(_CHOICE, lambda match: _enumerated(match[0].split(" | ")), allowed)
    meaning = field.description
    if re.match(r"\w*", meaning)[0] not in values:  # a value is spelled as it is written in a file
        meaning = meaning[0].upper() + meaning[1:]
    head = _wrapped(f"**`{key}`** · {allowed} · {stated}", "")
    return f"- {head}\n\n{_wrapped(_literal(meaning) + '.', '    ')}\n"


def _enumerated(values: list[str]) -> str:
    """["a", "b", "c"] as "`a`, `b` or `c`"."""
    *most, last = (f"`{value}`" for value in values)
    return f"{', '.join(most)} or {last}"


def _literal(text: str) -> str:
    """`text` with what Markdown would take for markup kept as it is written."""
    return re.sub(r"([*_<>\[\]])", r"\\\1", text)


def _wrapped(text: str, indent: str) -> str:
    lines = textwrap.wrap(text, WIDTH - len(indent), break_long_words=False, break_on_hyphens=False)
    return indent + f"\n{indent or '    '}".join(lines)
