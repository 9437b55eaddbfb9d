"""`megavlm data prepare`: indexes a folder of shards, or converts JSONL files and their media to a folder of shards."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megavlm.base.byte_sizes import parse_size
from megavlm.base.errors import UserError
from megavlm.base.number_format import counted
from megavlm.base.pools import part_of
from megavlm.config.data_sections import check_media_protocols
from megavlm.media.access import MediaAccess
from megavlm.media.files import is_url
from megavlm.prepare.in_parts import convert_in_parts
from megavlm.prepare.index_shards import find_shards
from megavlm.prepare.parts import SKIPPED
from megavlm.prepare.shard_folder import Unusable, check_samples, prepare
from megavlm.records.skipped_samples import causes
from megavlm.sources.shards import ShardFolder

DEFAULT_SIZE = "500MB"
_EVERY = 30  # seconds between two lines of progress if there is no terminal


def main(
    folder: str | None = None,
    jsonl: Sequence[str] = (),
    out: Path | None = None,
    shard_size: str | None = None,
    media_roots: Sequence[Path] = (),
    media_protocols: Sequence[str] = (),
    skip_broken: bool = False,
    force: bool = False,
    workers: int | None = None,
    part: str | None = None,
) -> None:
    """Runs the command. The arguments are described in its help. Raises UserError."""
    console = Console(highlight=False, soft_wrap=True)
    done: Path
    found: list[Unusable] = []
    if jsonl:
        if folder is not None or force:
            given = "--force" if force else f"the folder {folder}"
            raise UserError(
                f"{given} together with --jsonl would be ignored",
                "leave it out: --jsonl writes a new folder, --out DIR",
            )
        if out is None:
            raise UserError("--jsonl requires --out DIR", "give the folder for the shards")
        check_media_protocols(media_protocols)
        access = MediaAccess(tuple(map(str, media_roots)) or None, tuple(media_protocols))
        size = parse_size(shard_size or DEFAULT_SIZE)
        done = convert_in_parts(
            *(jsonl, out, size, workers),
            access=access,
            skip_broken=skip_broken,
            part=part_of(part) if part else (0, 1),
            progress=_Bar,
            tell=found.append,
        )
    else:
        flags = {
            "--out": out is not None,
            "--shard-size": shard_size is not None,
            "--media-roots": bool(media_roots),
            "--media-protocols": bool(media_protocols),
            "--skip-broken": skip_broken,
            "--workers": workers is not None,
            "--part": part is not None,
        }
        if ignored := [flag for flag, given in flags.items() if given]:
            raise UserError(f"{' and '.join(ignored)} without --jsonl would be ignored")
        if folder is None:
            raise UserError("there is nothing to prepare", "give a folder of shards, or --jsonl FILE --out DIR")
        if is_url(folder):
            raise UserError(f"{folder} is a URL", "prepare the shards in a local folder, then copy the whole folder")
        done = Path(folder)
        is_new = prepare(done, force=force, progress=_Bar)
        found.append(check_samples(done))
        if not is_new:
            console.print(f"{escape(folder)} is up to date: {_contents(done)} (--force builds the index again)")
            _tell(found[0], console)
            return
    console.print(f"[green]ready[/]: {escape(str(done))}, {_contents(done)}")
    if (skipped := done / SKIPPED).exists():
        with skipped.open(encoding="utf-8") as lines:
            number = sum(1 for _ in lines)
        console.print(f"[yellow]skipped[/]: {counted(number, 'broken sample')}, listed in {escape(str(skipped))}")
    for unusable in found:  # none if a part was there already
        _tell(unusable, console)
    console.print(rf"[dim]to use it in a configuration:[/] data: {{train: \[{{path: {escape(str(done))}}}]}}")


def _tell(unusable: Unusable, console: Console) -> None:
    """Says which samples of the shards no verb can use."""
    if unusable.number:
        found = f"{unusable.number:,} of {unusable.looked_at:,} samples that were looked at cannot be used by any verb"
        console.print("\n".join([f"{found}:", *causes(unusable.some)]), style="yellow", markup=False)


class _Bar:
    """Progress on standard error: a bar with rate and remaining time, or regular lines if there is no terminal."""

    def __init__(self, what: str, total: int, unit: str):
        console = Console(stderr=True, highlight=False)
        self._console, self._what, self._total, self._unit = console, what, total, unit
        text = "{task.completed:,.0f} of {task.total:,.0f} " + unit + "{task.fields[rate]}"
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn(text), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._done = self._bytes = 0

    def __enter__(self) -> "_Bar":
        self._began = self._told = time.monotonic()
        self._task = self._progress.add_task(self._what, total=self._total, rate="")
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def advance(self, num_bytes: int = 0) -> None:
        """Counts one more item with this number of bytes."""
        now = time.monotonic()
        self._done += 1
        self._bytes += num_bytes
        rate = f", {self._bytes / 1e6 / (now - self._began):,.1f} MB/s" if self._bytes else ""
        self._progress.update(self._task, completed=self._done, rate=rate)
        if not self._console.is_terminal and now - self._told > _EVERY:
            self._told = now
            self._console.print(f"{self._what}: {self._done:,} of {self._total:,} {self._unit}{rate}", soft_wrap=True)


def _contents(folder: str | Path) -> str:
    return f"{counted(len(ShardFolder(folder)), 'sample')} in {counted(len(find_shards(Path(folder))), 'shard')}"
