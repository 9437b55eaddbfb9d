"""Help texts of the command, generated from the table of verbs and from the settings."""

import sys
from dataclasses import dataclass

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megavlm.cli.verb import Verb
from megavlm.config import describe

_PLAIN_WIDTH = 120  # width in columns if the output is not a terminal
_TABLE_WIDTH = 110  # width from which on the settings are a table


def show_verbs(verbs: dict[str, Verb], group: str | None = None) -> None:
    """Prints a description of the command and all verbs (`megavlm.cli.verbs.VERBS`), or those of a group ("data")."""
    console = _console()
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, verb in verbs.items():
        table.add_row(Text(name, "bold cyan"), verb.summary)
    any_verb = f"{group} VERB" if group else "VERB"
    if group:
        console.print(_usage(f"{any_verb} …\n"))
    else:
        console.print(_usage(f"{any_verb} CONFIG.yaml [section.key=value …] [--nproc N]"))
        console.print(Padding("Trains and runs Qwen3-VL models on Megatron-core.", (1, 0, 1, 2), expand=False))
    console.print(table)
    explained = f"megavlm {any_verb} --help lists the options and settings of a verb with their defaults and meanings."
    console.print(Padding(explained, (1, 0, 0, 2)))


def show_verb(name: str, verb: Verb) -> None:
    """Prints usage, example, options and all settings of one verb."""
    console = _console()
    arguments = {_spelled("", options): options for options in verb.positionals.values()}
    for keyword, options in verb.flags.items():
        arguments[_spelled("--" + keyword.replace("_", "-"), options)] = options
    if verb.local_workers:
        arguments["--nproc N"] = {"help": "start N processes on this machine (not under torchrun or srun)"}
    config = "CONFIG.yaml [section.key=value …] " if verb.sections else ""
    synopsis = " ".join(text if options.get("required") else f"[{text}]" for text, options in arguments.items())
    console.print(_usage(f"{name} {config}{synopsis}"))
    console.print(Padding(verb.summary[0].upper() + verb.summary[1:] + ".", (1, 0, 1, 2), expand=False))
    _title(console, "Example" if "\n" not in verb.example else "Examples")
    console.print(
        Padding(Group(*(Text(line, "green") for line in verb.example.splitlines())), (0, 0, 1, 2), expand=False)
    )
    if arguments:
        _title(console, "Options")
        table = Table(box=None, show_header=False, padding=(0, 2))
        for text, options in arguments.items():
            table.add_row(Text(text, "bold cyan"), options["help"])
        console.print(Padding(table, (0, 0, 1, 0), expand=False))
    if not verb.sections:
        return
    _title(console, "Settings")
    intro = (
        "Write settings in CONFIG.yaml as section: {key: value}, or on the command line as section.key=value. base:"
        " lists files whose settings are read first. ${VAR} and ${VAR:-default} are replaced by environment variables."
        " Relative paths are relative to the current directory."
    )
    console.print(Padding(intro, (0, 2, 0, 2), expand=False))
    shown = _shown(("", *verb.sections), required=verb.requires)
    console.print(_settings_table(shown) if console.width >= _TABLE_WIDTH else _settings_list(shown))


def _spelled(flag: str, options: dict) -> str:
    """An argument with its value, if it has one, in the notation of usage lines."""
    value = options.get("metavar", "")
    return f"{flag} {value} [{value} …]".strip() if options.get("nargs") == "+" else f"{flag} {value}".strip()


@dataclass(frozen=True)
class _Shown:
    """One line of the help: a section with what it is about, or a setting (``default`` is not None)."""

    key: str
    meaning: str
    default: Text | None = None
    allowed: str = ""


def _shown(sections: tuple[str, ...], required: tuple[str, ...]) -> list[_Shown]:
    """The settings of these sections or keys in their order. Each section starts with its name and description."""
    shown = [entry for entry in describe.entries() if entry.section in sections or entry.key in sections]
    lines = []
    for section in dict.fromkeys(entry.section for entry in sorted(shown, key=lambda entry: entry.section != "")):
        lines.append(_Shown(section, describe.about(section)))
        for entry in shown:
            if entry.section == section:
                needed = entry.key in required or entry.default == "required"
                default = Text("required", "yellow") if needed else Text(entry.default)
                allowed = entry.allowed.removesuffix(", or null") if needed else entry.allowed
                lines.append(_Shown(entry.key, entry.meaning, default, allowed))
    return lines


def _settings_table(lines: list[_Shown]) -> Table:
    """One table for all sections, so that columns are aligned."""
    table = Table(box=None, padding=(0, 2, 0, 2), expand=True, header_style="dim")
    for title, ratio in (("key", None), ("default", None), ("allowed", 4), ("meaning", 7)):
        table.add_column(title, ratio=ratio, no_wrap=ratio is None)
    for line in lines:
        if line.default is None:
            table.add_row()
            table.add_row(Text(line.key, "bold"), "", "", Text(line.meaning, "italic"))
        else:
            table.add_row(Text(line.key, "cyan"), line.default, Text(line.allowed), Text(line.meaning))
    return table


def _settings_list(lines: list[_Shown]) -> Group:
    """The same for a narrow terminal, where columns would cut words: the meaning stands below its key."""
    parts = []
    for line in lines:
        if line.default is None and not line.key:
            continue
        if line.default is None:
            parts.append(Padding(Text.assemble((line.key, "bold"), "  ", (line.meaning, "italic")), (1, 2, 1, 2)))
            continue
        required = line.default.plain == "required"
        default = line.default if required else Text.assemble(("default ", "dim"), line.default)
        parts.append(
            Padding(Text.assemble((line.key, "cyan"), "  ", default, ("  ", ""), (line.allowed, "dim")), (0, 2))
        )
        parts.append(Padding(Text(line.meaning), (0, 2, 0, 6)))
    return Group(*parts)


def _usage(text: str) -> Text:
    return Text.assemble(("usage: ", "bold"), "megavlm ", text)


def _title(console: Console, text: str) -> None:
    console.print(Text(text, "bold"))


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
