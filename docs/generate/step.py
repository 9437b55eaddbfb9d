"""docs/architecture.svg: one training step over a model-parallel group of eight ranks."""

from collections.abc import Iterable
from html import escape

WIDTH, HEIGHT = 1100, 1184
RANKS = 8  # parallel.tensor 2 × parallel.context 2 × parallel.pipeline 2
LEFT, PITCH, LANE = 256, 104, 98  # lanes begin, their distance, their width
COLOURS = ("#1d4ed8", "#0e7490", "#047857", "#4d7c0f", "#b45309", "#b91c1c", "#be185d", "#6d28d9")
FRAMES = ((1,), (2, 9), (3,), (4, 10), (5,), (6,), (7,), (8,))  # encoded by each rank

LAYOUT = (
    "One model-parallel group of eight ranks: parallel.pipeline 2 × parallel.context 2 × parallel.tensor 2; for MoE "
    "models also parallel.expert 4."
)

STYLE = """\
text { font-family: "Helvetica Neue", Helvetica, Arial, "Liberation Sans", sans-serif; font-size: 13px; fill: #334155; }
.head { font-size: 22px; font-weight: 700; fill: #0f172a; }
.title { font-size: 15px; font-weight: 700; fill: #0f172a; }
.strong { font-weight: 700; fill: #0f172a; }
.code { font-family: "SFMono-Regular", Menlo, Consolas, "Liberation Mono", monospace; font-size: 11.5px;
  fill: #64748b; }
.soft { fill: #64748b; font-size: 12px; }
.white { fill: #fff; font-weight: 700; font-size: 12px; }
.small { fill: #fff; font-size: 11px; }
.number { fill: #0f172a; }
.digit { fill: #fff; font-weight: 700; }
.sheet { fill: #fff; }
.lane { fill: #f8fafc; }
.box { fill: #fff; stroke: #cbd5e1; }
.layer { fill: #eff6ff; stroke: #bfdbfe; }
.token { fill: #e2e8f0; }
.answer { fill: #94a3b8; }
.hatch { fill: #f8fafc; }
.hatching, .bracket, .end { fill: none; stroke: #94a3b8; stroke-width: 1.5; }
.back { fill: #fff1f2; stroke: #fda4af; }
.update { fill: #0f172a; }
.light { fill: #fff; }
.flow { fill: none; stroke: #475569; stroke-width: 1.6; }
.tip { fill: #475569; }
.flowback { fill: none; stroke: #e11d48; stroke-width: 1.6; }
.tipback { fill: #e11d48; }
.wire { fill: none; stroke-width: 1.2; opacity: .55; }
@media (prefers-color-scheme: dark) {
text { fill: #cbd5e1; }
.head, .title, .strong { fill: #f8fafc; }
.code, .soft { fill: #94a3b8; }
.white, .small { fill: #fff; }
.number { fill: #e2e8f0; }
.digit { fill: #0f172a; }
.sheet { fill: #0f172a; }
.lane { fill: #172033; }
.box { fill: #1e293b; stroke: #475569; }
.layer { fill: #1e3a5f; stroke: #3b6ea5; }
.token { fill: #475569; }
.answer { fill: #94a3b8; }
.hatch { fill: #172033; }
.back { fill: #3f1d2b; stroke: #9f1239; }
.update { fill: #e2e8f0; }
.light { fill: #0f172a; }
.flow { stroke: #94a3b8; }
.tip { fill: #94a3b8; }
.wire { opacity: .8; }
}"""


def picture() -> str:
    """The text of docs/architecture.svg."""
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">',
        "<title>One training step, from a line of JSONL to changed weights</title>",
        f"<style>\n{STYLE}\n</style>",
        _marker("end", "tip"),
        _marker("endback", "tipback"),
        '<pattern id="padding" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">',
        '<rect width="6" height="6" class="hatch"/><path d="M0 0V6" class="hatching"/></pattern>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" class="sheet"/>',
        _text(28, 42, "One training step: from a line of JSONL to changed weights", "head"),
        _text(28, 66, LAYOUT),
        _text(28, 85, "Every data-parallel rank is such a group and reads rows of its own."),
    ]
    for part in (_ranks, _read, _balance, _encode, _exchange, _decoder, _backward, _reduce, _update):
        out += part()
    return "\n".join([*out, "</svg>\n"])


def _ranks() -> Iterable[str]:
    for stage in range(2):
        left, right = _x(4 * stage), _x(4 * stage + 3) + LANE
        yield f'<path d="M{left} 118V112H{right}V118" class="bracket"/>'
        yield _plate((left + right) / 2, 112, f"pipeline stage {stage}")
    for rank, colour in enumerate(COLOURS):
        x = _x(rank)
        yield f'<rect x="{x}" y="124" width="{LANE}" height="884" rx="8" class="lane"/>'
        yield f'<rect x="{x}" y="124" width="{LANE}" height="44" rx="8" fill="{colour}"/>'
        yield _text(x + LANE / 2, 142, f"rank {rank}" + (" · leader" if rank == 0 else ""), "white", "middle")
        yield _text(x + LANE / 2, 159, f"context {rank // 2 % 2} · slice {rank % 2}", "small", "middle")


def _read() -> Iterable[str]:
    yield from _step(
        1, 184, "Read, render and pack", ["data/"], ["Only the leader reads; its data", "workers do all of it."]
    )
    yield f'<rect x="{_x(0)}" y="182" width="146" height="96" rx="8" class="box"/>'
    for i, (words, kind) in enumerate(
        [("data workers", "strong"), ("line → tokens, sizes", ""), ("samples → row", ""), ("pictures → patches", "")]
    ):
        yield _text(_x(0) + 12, 203 + 21 * i, words, kind)
    rows = [
        [("t", 30), (1, 64), ("t", 26), (2, 58), ("a", 50), "|", ("t", 36), (3, 60), ("a", 40), "|", (4, 56), (5, 60),
         ("a", 48), "|", ("p", 66)],
        [("t", 24), (6, 70), (7, 66), ("a", 60), "|", ("t", 34), (8, 64), ("a", 56), "|", (9, 36), (10, 36), ("t", 30),
         ("a", 52), "|", ("p", 66)],
    ]  # fmt: skip
    owner = {frame: rank for rank, frames in enumerate(FRAMES) for frame in frames}
    for y, row in zip((184, 222), rows, strict=True):
        x = _x(0) + 186
        yield f'<path d="M{x - 38} {y + 12}H{x - 6}" class="flow" marker-end="url(#end)"/>'
        for item in row:
            if item == "|":
                yield f'<path d="M{x - 1} {y - 4}V{y + 28}" class="end"/>'
                x += 1
                continue
            what, width = item
            if isinstance(what, int):
                fill = f'fill="{COLOURS[owner[what]]}"'
            else:
                fill = {"t": 'class="token"', "a": 'class="answer"', "p": 'fill="url(#padding)"'}[what]
            yield f'<rect x="{x}" y="{y}" width="{width - 2}" height="24" rx="3" {fill}/>'
            if isinstance(what, int):
                yield _text(x + width / 2 - 1, y + 16.5, what, "white", "middle")
            x += width
    x = _x(0) + 186
    for words, fill, left in (("text", 'class="token"', 0), ("answer (targets)", 'class="answer"', 62),
                              ("padding", 'fill="url(#padding)"', 186)):  # fmt: skip
        yield f'<rect x="{x + left}" y="259" width="16" height="14" rx="3" {fill}/>'
        yield _text(x + left + 22, 271, words, "soft")
    yield _text(x + 270, 271, "Numbered: frames. A row has data.seq_length tokens.", "soft")


def _balance() -> Iterable[str]:
    yield from _step(2, 300, "Distribute the frames", ["runtime/feed.py", "layout/frame_balance.py"],
                     ["The costliest frame first, each to", "the least loaded rank."])  # fmt: skip
    yield _text(_x(0) + 12, 312, "token ids, labels, sizes → every rank, over the host network")
    yield f'<path d="M{_x(0) + 12} 321H{_x(7) + LANE - 10}" class="flow" marker-end="url(#end)"/>'
    yield _text(_x(0) + 12, 348, "pixels of each frame → the one rank that encodes it")
    yield f'<path d="M{_x(0) + 12} 357H{_x(7) + LANE / 2}" class="flow"/>'
    for rank in range(RANKS):
        yield f'<path d="M{_x(rank) + LANE / 2} 357V384" class="flow" marker-end="url(#end)"/>'


def _encode() -> Iterable[str]:
    yield from _step(3, 404, "Encode every frame once", ["model/tower_phase.py", "model/vision.py",
                     "model/projector.py"], ["Every rank has all its weights."])  # fmt: skip
    for rank in range(RANKS):
        yield from _frames(rank, 386, "box", 68, ("tower and", "projector"))


def _exchange() -> Iterable[str]:
    yield from _step(4, 508, "Send the features", ["layout/frame_balance.py"], ["One all-to-all. A rank receives the",
                     "planes of its layers at its tokens."])  # fmt: skip
    for a in range(RANKS):
        for b in range(RANKS):
            start, end = _x(a) + 14 + 10 * b, _x(b) + 14 + 10 * a
            yield f'<path d="M{start} 454C{start} 510 {end} 494 {end} 548" class="wire" stroke="{COLOURS[a]}"/>'
    yield _plate((_x(0) + _x(3) + LANE) / 2, 560, "embeddings and deepstack levels 0 and 1")
    yield _plate((_x(4) + _x(7) + LANE) / 2, 560, "deepstack level 2")


def _decoder() -> Iterable[str]:
    yield from _step(5, 600, "Run Megatron’s schedule", ["training/step.py", "runtime/forward.py", "model/language.py",
                     "model/token_logprobs.py"], ["1F1B, or interleaved 1F1B.", "Context ranks gather keys and",
                     "values for attention. Experts get", "their tokens by all-to-all."])  # fmt: skip
    layers = [
        [
            ("embedding", "visual ← plane 0", 130),
            ("layer 0", "then + level 0", 130),
            ("layer 1", "then + level 1", 130),
        ],
        [
            ("layer 2", "then + level 2", 112),
            ("layer 3", "", 66),
            ("norm", "", 66),
            ("token_logprobs", "in chunks", 134),
        ],
    ]
    for stage in range(2):
        left, right = _x(4 * stage), _x(4 * stage + 3) + LANE
        yield f'<rect x="{left}" y="580" width="{right - left}" height="202" rx="8" class="box"/>'
        x = left + 8
        for name, below, width in layers[stage]:
            yield f'<rect x="{x}" y="590" width="{width - 4}" height="44" rx="6" class="layer"/>'
            yield _text(x + width / 2 - 2, 608 if below else 617, name, "strong", "middle")
            yield _text(x + width / 2 - 2, 625, below, "soft", "middle")
            x += width + 2
        for rank in range(4 * stage, 4 * stage + 4):
            x, part, piece = _x(rank), rank // 2 % 2, rank % 2
            yield _text(x + LANE / 2, 659, "tokens it holds", "soft", "middle")
            for sample in range(2):
                for i, owner in enumerate((0, 1, 1, 0)):  # four pieces of each sample
                    fill = f'fill="{COLOURS[rank]}"' if (owner, sample) == (part, piece) else 'class="token"'
                    at = x + 8 + i * 10 + sample * 43
                    yield f'<rect x="{at}" y="668" width="9" height="18" rx="1.5" {fill}/>'
            first = 2 * (rank % 4)
            yield _text(x + LANE / 2, 712, "experts it holds", "soft", "middle")
            for expert in range(8):
                fill = f'fill="{COLOURS[rank]}"' if expert in (first, first + 1) else 'class="token"'
                yield f'<rect x="{x + 10 + expert * 10}" y="720" width="8" height="14" rx="1.5" {fill}/>'
        notes = (
            (
                "A row of two samples: a context rank has an early and a late",
                "piece of each, its tensor ranks slices of it.",
            ),
            ("loss = Σ weight · −log p, divided once by", "the global Σ weight"),
        )
        for i, note in enumerate(notes[stage]):
            yield _text(left + 12, 755 + 17 * i, note, "soft")
    yield f'<path d="M{_x(3) + LANE} 612H{_x(4) - 1}" class="flow" marker-end="url(#end)"/>'


def _backward() -> Iterable[str]:
    yield from _step(6, 826, "Tower backward", ["model/tower_phase.py"], ["The same all-to-all, reversed,",
                     "brings the features’ gradients."])  # fmt: skip
    for rank in range(RANKS):
        yield f'<path d="M{_x(rank) + LANE / 2} 782V806" class="flowback" marker-end="url(#endback)"/>'
        yield from _frames(rank, 808, "back", 68, ("backward,", "in chunks"))


def _reduce() -> Iterable[str]:
    yield from _step(7, 916, "Sum the gradients by part", ["optim/optimizers.py"], ["Each part has its own buffers and",
                     "optimizer; a frozen part has none."])  # fmt: skip
    width = (_x(7) + LANE - _x(0) - 24) / 3
    parts = (
        ("vision", "over all ranks of the run:", "any rank may hold its frames"),
        ("projector", "over all ranks of the run,", "for the same reason"),
        ("language", "over its data and context ranks,", "experts over their own"),
    )
    for i, (name, first, second) in enumerate(parts):
        x = _x(0) + i * (width + 12)
        yield f'<rect x="{x:.0f}" y="896" width="{width:.0f}" height="84" rx="8" class="back"/>'
        yield _text(x + 14, 918, name, "title")
        yield _text(x + 14, 940, first)
        yield _text(x + 14, 960, second)


def _update() -> Iterable[str]:
    yield from _step(8, 1026, "Clip and update as one", ["optim/optimizers.py"], [])
    yield f'<rect x="{_x(0)}" y="1010" width="{_x(7) + LANE - _x(0)}" height="62" rx="8" class="update"/>'
    middle = (_x(0) + _x(7) + LANE) / 2
    yield _text(middle, 1036, "a norm per part → one norm → clip → optimizer step → schedule", "light", "middle")
    skipped = "If the loss or a gradient is NaN or infinite, all ranks skip the step."
    yield _text(
        middle,
        1057,
        f"Adam’s state is sharded over the ranks that sum a part’s gradients. {skipped}",
        "light",
        "middle",
    )
    yield from _step(9, 1106, "Save a checkpoint", ["checkpoint/manager.py"], [])
    content = "weights, optimizer, schedule, random states and the loader state of every data worker"
    yield _text(_x(0), 1111, f"step_00000100 contains {content}.")
    yield _text(_x(0), 1131, "Keys are global names, so weights and optimizer load in any layout.")


def _step(number: int, y: int, title: str, files: list[str], notes: list[str]) -> Iterable[str]:
    """The number of a step in the left column with its title, files and notes."""
    yield f'<circle cx="42" cy="{y}" r="14" class="number"/>'
    yield _text(42, y + 5, number, "digit", "middle")
    yield _text(66, y + 5, title, "title")
    for i, (line, kind) in enumerate([(f, "code") for f in files] + [(n, "soft") for n in notes]):
        yield _text(66, y + 25 + 17 * i, line, kind)


def _frames(rank: int, y: int, kind: str, height: int, lines: tuple[str, str]) -> Iterable[str]:
    """A box in a rank's lane with the numbers of its frames and what is done with them."""
    x = _x(rank)
    yield f'<rect x="{x}" y="{y}" width="{LANE}" height="{height}" rx="7" class="{kind}"/>'
    for i, frame in enumerate(FRAMES[rank]):
        yield f'<rect x="{x + 10 + 28 * i}" y="{y + 8}" width="24" height="18" rx="4" fill="{COLOURS[rank]}"/>'
        yield _text(x + 22 + 28 * i, y + 21.5, frame, "white", "middle")
    for i, line in enumerate(lines):
        yield _text(x + 10, y + 42 + 16 * i, line)


def _plate(x: float, y: float, words: str) -> str:
    """Words on a rounded plate that is centred at (x, y)."""
    width = 7 * len(words) + 28
    return f'<rect x="{x - width / 2:.0f}" y="{y - 11}" width="{width}" height="22" rx="11" class="box"/>' + _text(
        x, y + 4.5, words, "", "middle"
    )


def _marker(name: str, kind: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" class="{kind}"/></marker>'
    )


def _text(x: float, y: float, words: str | int, kind: str = "", anchor: str = "start") -> str:
    attributes = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor != "start" else "")
    return f'<text x="{x:g}" y="{y:g}"{attributes}>{escape(str(words))}</text>'


def _x(rank: int) -> int:
    """Left edge of a rank's lane."""
    return LEFT + PITCH * rank
