"""`megavlm data inspect`: statistics of a configuration's data on the terminal, and an HTML page with samples.

Samples are rendered as in training, but without pixels. Pixels are read only for the few samples on the page.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import batched
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from megavlm.base.atomic_files import write_text
from megavlm.base.errors import UserError
from megavlm.base.new_output import new_folder
from megavlm.base.number_format import percent
from megavlm.base.pools import in_processes, num_cores, part_of
from megavlm.commands.data_duplicates import read_all, report
from megavlm.commands.usable_data import drafts_of, intended, refusal, renderer_of
from megavlm.config.settings import Settings
from megavlm.convert.hf_shapes import model_shapes
from megavlm.data.draft import Draft
from megavlm.data.processor import Still
from megavlm.data.rows import RowDataset
from megavlm.data.worker_speed import WorkerSpeed, worker_speed
from megavlm.inspection.data_page import UNITS, speed_text, write_page
from megavlm.inspection.data_stats import (
    PERCENTILES,
    Look,
    RowStats,
    SourceStats,
    blend_stats,
    decimal,
    pack_rows,
)
from megavlm.inspection.sample_cards import Card, make_card, shots_of
from megavlm.records.records import Kind
from megavlm.records.remarks import told
from megavlm.records.skipped_samples import SkippedSample
from megavlm.sources.blend import evenly, open_sources

DEFAULT_OUT = Path("data-inspect")
PAGE, SUMMARY = "index.html", "summary.json"
CARDS = 6  # number of samples of each source on the page
_BLOCK = 16  # samples that a process drafts at a time
EXAMPLES = 2  # number of examples of each kind of skipped sample on the terminal


def main(
    settings: Settings,
    out: Path | None = None,
    samples: int = 200,
    verb: str | None = None,
    duplicates: bool = False,
    workers: int | None = None,
    part: str | None = None,
) -> int:
    """Inspects `samples` evenly spaced samples of each source; prints tables and writes a folder.

    Args:
        settings: the settings of the configuration.
        out: the folder for index.html and summary.json; it must not exist. Default: ``data-inspect``.
        samples: the number of samples to inspect in each source; if a source has fewer, all of them.
        verb: the verb that is to read the data; default: a guess (see ``intended``).
        duplicates: read all samples, and report those that are there more than once (see ``data_duplicates``).
        workers: processes that read samples; default: one for each core.
        part: "i/n": read only this part of the samples for duplicates, and write no folder.

    Raises:
        UserError: `out` exists, the tokenizer has more ids than the model has rows, there are no sources, or a source
            is missing or empty. Also if too many samples cannot be used; then the folder has been written.
    """
    out = DEFAULT_OUT if out is None else Path(out)
    if samples < 1:
        raise UserError(f"--samples is {samples}", "give a number of at least 1")
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already", "move it away, or give another folder with --out")
    if part and not duplicates:
        raise UserError("--part without --duplicates would be ignored")
    model_shapes(settings.model)  # raises if the tokenizer does not belong to the model
    sources = open_sources(settings.data)
    meant = intended(settings, sources, verb)
    console = Console(highlight=False, soft_wrap=True)  # the terminal breaks long lines, so that paths can be copied
    which = part_of(part) if part else (0, 1)
    workers = workers or num_cores()
    files = read_all(settings, sources, workers, which, console) if duplicates else []
    if part:
        console.print(f"part {part} was read; once all parts are, the same command without --part reports duplicates")
        return 0
    renderer = renderer_of(settings, meant.kind)

    console.print(Text(f"data for {meant.told}"))
    dataset = drafts_of(sources, renderer, meant.kind, settings)
    looks = _look(dataset, samples, workers, console)
    cards = _cards(looks, dataset, console)
    stats = blend_stats(looks, renderer)
    packs = meant.kind != "prompt"  # what is packed are the answers, which do not exist yet
    rows = pack_rows(looks, settings.data, settings.pad_multiple, settings.train.seed) if packs else None
    speed = _speed(dataset, settings, console) if rows else None

    for of_source in stats:
        console.print(_table(of_source))
        console.print()
    if packs:
        console.print(_rows_text(rows, settings.data.seq_length, UNITS.get(meant.kind, "samples")))
    if speed:
        console.print(Text(f"{speed_text(speed)}; megavlm plan --data {out / SUMMARY} tells how many are needed"))
    with new_folder(out, overwrite=False, mark=SUMMARY) as folder:
        write_page(folder / PAGE, settings, meant.kind, looks, stats, rows, cards, speed)
        if duplicates:
            report(files, len(sources), folder, out, console)
        write_text(folder / SUMMARY, _summary(settings, meant.kind, stats, rows, speed))
    console.print(Text(f"page: {out / PAGE}"))
    limits = settings.data.skip_limits
    found = [refusal(look.source.name, len(look.samples), look.skipped_samples, meant.verb, limits) for look in looks]
    if refused := [error for error in found if error is not None]:
        raise UserError("\n".join(error.message for error in refused), refused[0].remedy)
    return 0


def _look(dataset: RowDataset, samples: int, workers: int, console: Console) -> list[Look]:
    """Drafts evenly spaced samples of each source in so many processes."""
    looks = [Look(source, []) for source in dataset.sources]
    places = [(number, index) for number, look in enumerate(looks) for index in evenly(len(look.source.file), samples)]
    blocks = list(batched(places, _BLOCK))
    draft = lambda block: [_without_files(dataset.draft(*place)) for place in blocks[block]]
    with _bar(console) as bar:
        task = bar.add_task("samples", total=len(places))
        for block, found in zip(blocks, in_processes(draft, len(blocks), workers, "reading samples"), strict=True):
            for (number, _), sample in zip(block, found, strict=True):
                looks[number].samples.append(sample)
            bar.update(task, advance=len(block), description=looks[block[-1][0]].source.name)
    return looks


def _without_files(sample: Draft | SkippedSample) -> Draft | SkippedSample:
    """The sample without what reads its pixels, which may refer to all of its data file."""
    for draft in sample.answers if isinstance(sample, Draft) else ():
        draft.media = [
            replace(item, picture=None) if isinstance(item, Still) else replace(item, video=None)  # type: ignore[arg-type]  # cards draft the sample again
            for item in draft.media
        ]
    return sample


def _cards(looks: list[Look], dataset: RowDataset, console: Console) -> list[list[Card]]:
    """Some samples of each source, with pixels. If the pixels of a sample cannot be read, another one is shown."""
    cards = []
    with _bar(console) as bar:
        task = bar.add_task("pictures", total=sum(min(CARDS, len(look.drafts)) for look in looks))
        for look in looks:
            shown: dict[int, Card] = {}
            while more := _unseen(look, shown):
                for place in more:
                    if (card := _card(look, place, dataset)) is not None:
                        shown[place] = card
                        bar.advance(task)
            cards.append([shown[place] for place in sorted(shown)])
    return cards


def _unseen(look: Look, shown: dict[int, Card]) -> list[int]:
    """Evenly spaced indices of the samples to show in addition to those that are already shown."""
    others = [p for p, sample in enumerate(look.samples) if isinstance(sample, Draft) and p not in shown]
    return [others[place] for place in evenly(len(others), CARDS - len(shown))]


def _card(look: Look, place: int, dataset: RowDataset) -> Card | None:
    seen = look.samples[place]
    assert isinstance(seen, Draft), "a skipped sample has no card"
    draft = dataset.draft(seen.source_id, seen.index)
    if isinstance(draft, SkippedSample):  # its file has changed meanwhile
        look.samples[place] = draft
        return None
    try:
        shots = shots_of(draft, dataset.renderer)
    except MemoryError:
        raise
    except Exception as error:  # as in a data worker: whatever a file contains, an error in it costs one sample
        look.samples[place] = SkippedSample.of(draft.source_id, draft.source, error)
        return None
    return make_card(draft, shots, dataset.renderer)


def _speed(dataset: RowDataset, settings: Settings, console: Console) -> WorkerSpeed | None:
    """The speed of a data worker; None, with a line that says why, if it cannot be measured."""
    try:
        with console.status("measuring how fast a data worker makes rows"):
            return worker_speed(dataset.sources, dataset.renderer, dataset.kind, settings.data, settings.train.seed)
    except UserError as error:  # the statistics are worth something without it
        console.print(Text(f"how long a data worker takes for a row is not known: {error.message}", style="yellow"))
        return None


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _table(stats: SourceStats) -> Group:
    """The statistics of a source for the terminal."""
    title = Text.assemble((stats.name, "bold"), "  ", (stats.path, "dim"))
    form = [Text(f"form: {stats.form}")] if stats.form else []
    shares = Text(f"{percent(stats.share)} of the samples of the blend")
    if stats.token_share is not None:
        shares.append(f", about {percent(stats.token_share)} of its tokens")
        if stats.target_share is not None:  # prompts have no targets
            shares.append(f", {percent(stats.target_share)} of its targets")
    if stats.limit_text:
        shares.append(f"; it {stats.limit_text}")
    looked = Text(f"{stats.looked_at:,} of {stats.count:,} samples inspected")
    lines: list[Any] = [title, *form, shares, looked]
    if stats.usable:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("per sample", no_wrap=True)
        for name in ("share", "mean", *(f"{p} %" for p in PERCENTILES), "max"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, share, spread in (
            ("tokens", "", stats.tokens),
            ("targets", percent(stats.targets_of_tokens), stats.targets),
            ("visual tokens", percent(stats.visual_of_tokens), stats.visual),
            ("pictures", "", stats.pictures),
            ("videos", "", stats.videos),
        ):
            if spread is not None and (spread.max or name == "tokens"):
                table.add_row(name, share, *spread.texts)
        lines.append(table)
        if stats.picture_size:
            lines.append(Text(f"picture size: {stats.size_text} px (median width × height)"))
        if stats.video_frames:
            lines.append(Text(f"video length: {stats.video_frames:,.0f} frames (median)"))
    lines += [Text(sentence, style="yellow") for sentence in told(stats.remarks)]
    skipped = f"skipped: {stats.num_dropped:,} of the {stats.looked_at:,} inspected samples"
    lines.append(Text(skipped if stats.num_dropped else "skipped: none of the inspected samples"))
    for fault_kind, found in stats.dropped.items():
        lines.append(Text(f"  {len(found):,} {fault_kind}", style="yellow"))
        lines += [Text(f"    {sample}: {cause}") for sample, cause in found[:EXAMPLES]]
        if len(found) > EXAMPLES:
            lines.append(Text(f"    … {len(found) - EXAMPLES:,} more, listed on the page", style="dim"))
    return Group(*lines)


def _rows_text(rows: RowStats | None, seq_length: int, unit: str) -> Text:
    if rows is None:
        return Text("none of the inspected samples can be used, so there would be no rows", style="bold red")
    return Text(
        f"rows of {seq_length:,} tokens are about {percent(rows.fill)} full, with {decimal(rows.samples)} {unit} per "
        f"row (from packing the inspected {unit} as a data worker does)"
    )


def _summary(
    settings: Settings, kind: Kind, stats: Sequence[SourceStats], rows: RowStats | None, speed: WorkerSpeed | None
) -> str:
    summary = {
        "kind": kind,
        "seq_length": settings.data.seq_length,
        "rows": asdict(rows) if rows else None,
        "worker": asdict(speed) if speed else None,
        "sources": [asdict(of_source) for of_source in stats],
    }
    return json.dumps(summary, ensure_ascii=False, indent=2) + "\n"
