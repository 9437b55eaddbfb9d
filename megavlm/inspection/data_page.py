"""The page of `megavlm data inspect`, a single file: the blend, and statistics and samples of each source."""

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup, escape

from megavlm.base.atomic_files import write_text
from megavlm.base.number_format import counted, number
from megavlm.config.settings import Settings
from megavlm.data.worker_speed import WorkerSpeed
from megavlm.inspection.data_stats import PERCENTILES, Look, RowStats, SourceStats, decimal
from megavlm.inspection.sample_cards import LEVELS, Card, Piece
from megavlm.records.records import Kind
from megavlm.report.charts import histogram
from megavlm.report.page import render_page

TEMPLATE = "inspect.html.jinja"
MAX_FAULTS = 100  # number of skipped samples of one kind that are listed for a source
UNITS = {"pair": "pairs", "prompt": "prompts"}  # what a sample is called, by its kind
COLORS = ("loss", "lr", "speed", "projector", "language", "vision", "bad", "soft")  # the page's colours of the sources


def write_page(
    file: Path,
    settings: Settings,
    kind: Kind,
    looks: Sequence[Look],
    stats: Sequence[SourceStats],
    rows: RowStats | None,
    cards: Sequence[Sequence[Card]],
    speed: WorkerSpeed | None,
) -> None:
    """Writes the page.

    Args:
        file: the file to write.
        settings: the settings of the configuration.
        kind: the kind of the samples.
        looks: the inspected samples of each source.
        stats: the statistics of each source, in the same order.
        rows: the statistics of packed rows, None if no sample can be used, or for prompts.
        cards: the samples to show of each source, in the same order.
        speed: the speed of a data worker; None if it is not known.
    """
    lengths = [[draft.num_tokens for draft in look.drafts] for look in looks]
    charts = [histogram("Tokens per sample", of_source, "tokens") for of_source in lengths]
    page = render_page(
        TEMPLATE,
        filters={"decimal": decimal, "whole": _whole, "text_of": text_of},
        settings=settings,
        kind=kind,
        sources=[
            {"stats": of_source, "chart": chart, "cards": of_cards, "color": COLORS[place % len(COLORS)]}
            for place, (of_source, chart, of_cards) in enumerate(zip(stats, charts, cards, strict=True))
        ],
        rows=rows,
        speed=speed_text(speed) if speed else None,
        unit=UNITS.get(kind, "samples"),
        percentiles=PERCENTILES,
        levels=LEVELS,
        max_faults=MAX_FAULTS,
    )
    write_text(file, page)


def speed_text(speed: WorkerSpeed) -> str:
    """How long a data worker takes, and on which machine, as a sentence without its capital and its end."""
    measured = f"mean of {counted(speed.rows, 'row')}, {speed.machine}, {counted(speed.cores, 'core')}"
    return f"a data worker takes {number(speed.row_seconds, 3)} s for a row ({measured})"


def text_of(pieces: Sequence[Piece]) -> Markup:
    """The text of a sample, with one ``span`` for each piece. Line ends are kept, and the style marks them."""
    spans = []
    for piece in pieces:
        text = escape(piece.text).replace("\n", Markup("<i></i>\n"))
        classes = piece.kind if piece.kind != "text" else ""
        if piece.level:
            classes += f" w{piece.level}"
        attributes = Markup(' class="{}"').format(classes.strip()) if classes else Markup("")
        if piece.title:
            attributes += Markup(' title="{}"').format(piece.title)
        spans.append(Markup("<span{}>{}</span>").format(attributes, text))
    return Markup("").join(spans)


def _whole(number: int) -> str:
    return f"{number:,}"
