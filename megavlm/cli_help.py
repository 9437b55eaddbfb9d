"""Help texts of the command, drawn from the table of verbs and from the settings themselves."""

import sys

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megavlm.config import describe

_PLAIN_WIDTH = 120  # columns where the output is not a terminal


def show_verbs(verbs: dict) -> None:
    """Prints what the command is and its verbs (`megavlm.cli.VERBS`)."""
    console = _console()
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, verb in verbs.items():
        table.add_row(Text(name, "bold cyan"), verb.summary)
    console.print(_usage("VERB CONFIG.yaml [section.key=value …] [--nproc N]"))
    console.print(Padding("Trains and runs Qwen3-VL models on Megatron-core.", (1, 0, 1, 2), expand=False))
    console.print(table)
    console.print(
        Padding("megavlm VERB --help lists the settings of a verb, their defaults and meaning.", (1, 0, 0, 2))
    )


def show_verb(name: str, verb) -> None:
    """Prints usage, example, options and all settings of one `megavlm.cli.Verb`."""
    console = _console()
    flags = {"--" + keyword.replace("_", "-"): options for keyword, options in verb.flags.items()}
    if verb.local_workers:
        flags["--nproc"] = {"metavar": "N", "help": "start N processes on this machine (not under torchrun or srun)"}
    # with its value, where it takes one
    spelled = {flag: f"{flag} {options.get('metavar', '')}".rstrip() for flag, options in flags.items()}
    synopsis = " ".join(text if flags[flag].get("required") else f"[{text}]" for flag, text in spelled.items())
    console.print(_usage(f"{name} CONFIG.yaml [section.key=value …] {synopsis}"))
    console.print(Padding(verb.summary[0].upper() + verb.summary[1:] + ".", (1, 0, 1, 2), expand=False))
    _title(console, "Example" if "\n" not in verb.example else "Examples")
    console.print(
        Padding(Group(*(Text(line, "green") for line in verb.example.splitlines())), (0, 0, 1, 2), expand=False)
    )
    if flags:
        _title(console, "Options")
        table = Table(box=None, show_header=False, padding=(0, 2))
        for flag, options in flags.items():
            table.add_row(Text(spelled[flag], "bold cyan"), options["help"])
        console.print(Padding(table, (0, 0, 1, 0), expand=False))
    _title(console, "Settings")
    intro = (
        "In CONFIG.yaml as section: {key: value}, on the command line as section.key=value; base: names files to start"
        " from. ${VAR} and ${VAR:-default} stand for environment variables; relative paths start from the current"
        " directory."
    )
    console.print(Padding(intro, (0, 2, 0, 2), expand=False))
    console.print(_settings_table(("", *verb.sections), required=verb.requires))


def _settings_table(sections: tuple[str, ...], required: tuple[str, ...]) -> Table:
    """One table for all sections, so that the columns line up; each begins with its name and what it is about."""
    table = Table(box=None, padding=(0, 2, 0, 2), expand=True, header_style="dim")
    for title, ratio in (("key", None), ("default", None), ("allowed", 4), ("meaning", 7)):
        table.add_column(title, ratio=ratio, no_wrap=ratio is None)
    shown = [entry for entry in describe.entries() if entry.section in sections or entry.key in sections]
    for section in dict.fromkeys(entry.section for entry in sorted(shown, key=lambda entry: entry.section != "")):
        table.add_row()
        if section:
            table.add_row(Text(section, "bold"), "", "", Text(describe.about(section), "italic"))
        for entry in shown:
            if entry.section == section:
                needed = entry.key in required or entry.default == "required"
                default = Text("required", "yellow") if needed else Text(entry.default)
                allowed = entry.allowed.removesuffix(", or null") if needed else entry.allowed
                table.add_row(Text(entry.key, "cyan"), default, Text(allowed), Text(entry.meaning))
    return table


def _usage(text: str) -> Text:
    return Text.assemble(("usage: ", "bold"), "megavlm ", text)


def _title(console: Console, text: str) -> None:
    console.print(Text(text, "bold"))


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
