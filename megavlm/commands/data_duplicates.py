"""The part of `megavlm data inspect` that looks for samples and pictures that the data contain more than once."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from megavlm.base.atomic_files import atomic_open
from megavlm.base.number_format import counted
from megavlm.config.settings import Settings
from megavlm.duplicates.groups import NEAR, NEAR_PICTURE, SAME, Group, groups_of
from megavlm.duplicates.scan import scan, signatures
from megavlm.sources.blend import SampleFile, Source, open_eval_sources

FILE = "duplicates.jsonl"
_MOST = 100  # samples of a group that are listed
_SHOWN = 2  # examples of each kind on the terminal


def read_all(
    settings: Settings, sources: Sequence[Source], workers: int, part: tuple[int, int], console: Console
) -> list[SampleFile]:
    """Reads all samples of the sources and of data.eval (or a part of them) for what they are compared by.

    Returns the files that were read. Raises UserError (see ``scan``).
    """
    files = [source.file for source in sources]
    files += [source.file for source in open_eval_sources(settings.data)]
    with console.status("reading all samples") as status:
        scan(files, workers, part, lambda done, count: status.update(f"reading all samples: {done} of {count} blocks"))
    return files


def report(files: Sequence[SampleFile], num_sources: int, folder: Path, out: Path, console: Console) -> None:
    """Writes ``duplicates.jsonl`` into `folder` and says what it contains.

    A line has ``kind``, ``count``, ``held_out`` (whether samples of data.eval are among samples of data.train) and
    ``samples``, as messages name them, of which there are at most 100.

    Args:
        files: those of ``read_all``.
        num_sources: how many of them are sources; the others are data.eval.
        folder: the folder.
        out: what it will be called once it is complete.
        console: the terminal.
    """
    found = signatures(files)
    groups = groups_of(found)
    names = _Names(files)
    of_training = sum(len(file) for file in files[:num_sources])
    is_mixed = [group.samples[0] < of_training <= group.samples[-1] for group in groups]
    mixed = [group for group, held_out in zip(groups, is_mixed, strict=True) if held_out]
    with atomic_open(folder / FILE) as lines:
        for group, held_out in zip(groups, is_mixed, strict=True):
            line = {
                "kind": group.kind,
                "count": len(group.samples),
                "held_out": held_out,
                "samples": [names.of(sample) for sample in group.samples[:_MOST]],
            }
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    console.print(Text(f"duplicates among {counted(len(found.text), 'sample')}", style="bold"))
    if unread := int((~found.readable).sum()):
        console.print(Text(f"  {counted(unread, 'sample')} could not be read", style="yellow"))
    for kind in (SAME, NEAR, NEAR_PICTURE):
        chosen = [group for group in groups if group.kind == kind]
        extra = sum(len(group.samples) - 1 for group in chosen)
        console.print(Text(f"  {kind}: {counted(len(chosen), 'group')}, {extra:,} more than one of each"))
        console.print(
            Text("\n".join(f"    {_shown(group, names)}" for group in chosen[:_SHOWN])), end="\n" * bool(chosen)
        )
    if len(found.picture):
        different = len(set(found.picture.tolist()))
        console.print(Text(f"  {len(found.picture):,} pictures and videos are named, of {different:,} different files"))
    if mixed:
        words = f"  {counted(len(mixed), 'group')} with samples of data.eval and of data.train"
        console.print(Text(f"{words}: {_shown(mixed[0], names)}", style="yellow"))
    console.print(Text(f"all of them: {out / FILE}"))


def _shown(group: Group, names: "_Names") -> str:
    """The first two samples of a group."""
    more = f" and {len(group.samples) - 2:,} more" if len(group.samples) > 2 else ""
    return " = ".join(names.of(sample) for sample in (group.samples[0], group.samples[-1])) + more


class _Names:
    """What samples of several files are called, by their numbers over all of these."""

    def __init__(self, files: Sequence[SampleFile]):
        self._files = files

    def of(self, number: int) -> str:
        for file in self._files:
            if number < len(file):
                return file.source(number)
            number -= len(file)
        raise IndexError(number)
