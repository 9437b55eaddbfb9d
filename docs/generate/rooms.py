"""docs/rooms.svg, drawn from the imports in megavlm/: one box per folder and an arrow to each folder that it imports.

An arrow that follows from others is left out (A → C where A → B → C), and every arrow points downward, so a folder may
use whatever its arrows reach. The words in a box are the first sentence of the folder's docstring.
"""

import ast
import textwrap
from html import escape
from itertools import pairwise
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "megavlm"
BOX_WIDTH, LINE, GAP_X, GAP_Y, MARGIN = 204, 16, 18, 42, 20
CHARACTERS = 28  # of a line in a box
SWEEPS = 24  # over the layers, down and up, while their order is sought

Graph = dict[str, set[str]]  # room -> rooms it points to

STYLE = """\
text { font-family: "Helvetica Neue", Helvetica, Arial, "Liberation Sans", sans-serif; font-size: 13px; fill: #475569; }
.name { font-family: "SFMono-Regular", Menlo, Consolas, "Liberation Mono", monospace; font-size: 14px;
  font-weight: 700; fill: #0f172a; }
.sheet { fill: #fff; }
.box { fill: #f1f5f9; stroke: #94a3b8; }
.arrow { fill: none; stroke: #64748b; stroke-width: 1.4; }
.tip { fill: #64748b; }
@media (prefers-color-scheme: dark) {
text { fill: #cbd5e1; }
.name { fill: #f8fafc; }
.sheet { fill: #0f172a; }
.box { fill: #1e293b; stroke: #64748b; }
.arrow { stroke: #94a3b8; }
.tip { fill: #94a3b8; }
}"""


def picture() -> str:
    """The text of docs/rooms.svg."""
    edges = without_implied(rooms())
    layers, chains = layered(edges)
    sentences = {room: _about(room) for room in edges}
    heights = [max(_height(sentences[node]) if node in edges else 0 for node in layer) for layer in layers]
    tops = [MARGIN + sum(heights[:i]) + i * GAP_Y for i in range(len(layers))]
    centres = _centres(layers, chains, set(edges))
    width = max(centres.values()) + BOX_WIDTH / 2 + MARGIN
    height = tops[-1] + heights[-1] + MARGIN
    level = {node: i for i, layer in enumerate(layers) for node in layer}
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img" width="{width:.0f}">',
        "<title>The folders of megavlm and which of them import which</title>",
        f"<style>\n{STYLE}\n</style>",
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">',
        '<path d="M0 0L8 4L0 8z" class="tip"/></marker>',
        f'<rect width="{width:.0f}" height="{height}" rx="10" class="sheet"/>',
    ]
    for chain in chains:
        points = []
        for node in chain:  # a room is left at its lower edge and entered at its upper one
            top, high = tops[level[node]], heights[level[node]]
            room_high = _height(sentences[node]) if node in edges else high
            points.append((centres[node], top, top + room_high))
        out.append(f'<path d="{_route(points)}" class="arrow" marker-end="url(#tip)"/>')
    for room in sorted(edges):
        left, top = centres[room] - BOX_WIDTH / 2, tops[level[room]]
        high = _height(sentences[room])
        out.append(f'<rect x="{left:.0f}" y="{top}" width="{BOX_WIDTH}" height="{high}" rx="7" class="box"/>')
        out.append(f'<text x="{left + 12:.0f}" y="{top + 21}" class="name">{room}/</text>')
        for i, line in enumerate(sentences[room]):
            out.append(f'<text x="{left + 12:.0f}" y="{top + 39 + LINE * i}">{escape(line)}</text>')
    return "\n".join([*out, "</svg>\n"])


def rooms() -> Graph:
    """Each folder of the package and the folders that any of its files imports, wherever the import stands."""
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    found: Graph = {}
    for folder in sorted(folders):
        found[folder] = set()
        for path in (PACKAGE / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                found[folder] |= {name.split(".")[1] for name in names if name.startswith("megavlm.")} & folders
        found[folder].discard(folder)
    return found


def without_implied(graph: Graph) -> Graph:
    """The graph without edges that a longer way already gives."""
    reached: Graph = {}

    def reach(room: str, above: tuple[str, ...] = ()) -> set[str]:
        assert room not in above, f"imports go in a circle: {' → '.join((*above, room))}"
        if room not in reached:
            reached[room] = set(graph[room]).union(*(reach(below, (*above, room)) for below in graph[room]))
        return reached[room]

    return {
        room: {b for b in below if not any(b in reach(other) for other in below - {b})} for room, below in graph.items()
    }


def layered(edges: Graph) -> tuple[list[list[str]], list[list[str]]]:
    """Layers from top to bottom, their nodes in drawing order, and each edge as a chain of nodes, one per layer.

    Rooms stand as low as what they import allows. An edge that passes layers has a bend there, "room>room:layer".
    """
    depth: dict[str, int] = {}

    def down(room: str) -> int:
        if room not in depth:
            depth[room] = 1 + max((down(below) for below in edges[room]), default=-1)
        return depth[room]

    bottom = max(down(room) for room in edges)
    layers: list[list[str]] = [[] for _ in range(bottom + 1)]
    for room in sorted(edges):
        layers[bottom - depth[room]].append(room)
    chains = []
    for room in sorted(edges):
        for below in sorted(edges[room]):
            first, last = bottom - depth[room], bottom - depth[below]
            bends = [f"{room}>{below}:{layer}" for layer in range(first + 1, last)]
            for layer, bend in enumerate(bends, start=first + 1):
                layers[layer].append(bend)
            chains.append([room, *bends, below])
    return _ordered(layers, chains), chains


def _ordered(layers: list[list[str]], chains: list[list[str]]) -> list[list[str]]:
    """The layers with the fewest crossings that sweeps of the barycentre heuristic found."""
    links = [link for chain in chains for link in pairwise(chain)]
    neighbours: dict[str, list[str]] = {}
    for a, b in links:
        neighbours.setdefault(a, []).append(b)
        neighbours.setdefault(b, []).append(a)
    best, fewest = layers, _crossings(layers, links)
    for sweep in range(SWEEPS):
        layers = [list(layer) for layer in layers]
        order = range(len(layers)) if sweep % 2 == 0 else reversed(range(len(layers)))
        place = {node: i / max(1, len(layer) - 1) for layer in layers for i, node in enumerate(layer)}
        for i in order:
            known = {n: [place[m] for m in neighbours.get(n, [n])] for n in layers[i]}
            layers[i].sort(key=lambda n, known=known: (sum(known[n]) / len(known[n]), n))
            place |= {node: k / max(1, len(layers[i]) - 1) for k, node in enumerate(layers[i])}
        if (count := _crossings(layers, links)) < fewest:
            best, fewest = layers, count
    return best


def _crossings(layers: list[list[str]], links: list[tuple[str, str]]) -> int:
    where = {node: (i, k) for i, layer in enumerate(layers) for k, node in enumerate(layer)}
    spans = [(where[a], where[b]) for a, b in links]
    return sum(
        a[0] == c[0] and (a[1] - c[1]) * (b[1] - d[1]) < 0 for i, (a, b) in enumerate(spans) for c, d in spans[i + 1 :]
    )


def _centres(layers: list[list[str]], chains: list[list[str]], boxes: set[str]) -> dict[str, float]:
    """Horizontal centres: each node near the mean of its neighbours, in order and without overlap."""
    half = {node: (BOX_WIDTH / 2 if node in boxes else 8) for layer in layers for node in layer}
    neighbours: dict[str, list[str]] = {node: [] for node in half}
    for chain in chains:
        for a, b in pairwise(chain):
            neighbours[a].append(b)
            neighbours[b].append(a)
    centres: dict[str, float] = {}
    for layer in layers:
        _spread(layer, dict.fromkeys(layer, 0.0), half, centres)
    for _ in range(SWEEPS * 4):
        for layer in layers:
            wanted = {n: sum(centres[m] for m in neighbours[n] or [n]) / len(neighbours[n] or [n]) for n in layer}
            _spread(layer, wanted, half, centres)
    left = min(centres[node] - half[node] for node in centres) - MARGIN
    return {node: centre - left for node, centre in centres.items()}


def _spread(layer: list[str], wanted: dict[str, float], half: dict[str, float], centres: dict[str, float]) -> None:
    """Puts the nodes of a layer where they are wanted, pushed apart evenly where they would overlap."""
    groups: list[list[str]] = []

    def offsets(group: list[str]) -> list[float]:
        at = [0.0]
        for a, b in pairwise(group):
            at.append(at[-1] + half[a] + half[b] + GAP_X)
        return at

    def start(group: list[str]) -> float:
        return sum(wanted[n] - at for n, at in zip(group, offsets(group), strict=True)) / len(group)

    def overlap(a: list[str], b: list[str]) -> bool:
        return start(a) + offsets(a)[-1] + half[a[-1]] + GAP_X + half[b[0]] > start(b)

    for node in layer:
        groups.append([node])
        while len(groups) > 1 and overlap(groups[-2], groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    for group in groups:
        for node, at in zip(group, offsets(group), strict=True):
            centres[node] = start(group) + at


def _route(points: list[tuple[float, float, float]]) -> str:
    """A path from the lower edge of the first node, straight through the bends, to the upper edge of the last."""
    x, _, y = points[0]
    path = f"M{x:.0f} {y:.0f}"
    for next_x, top, lower in points[1:]:
        middle = (y + top) / 2
        path += f"C{x:.0f} {middle:.0f} {next_x:.0f} {middle:.0f} {next_x:.0f} {top - 1:.0f}"
        x, y = next_x, lower
        if (next_x, top, lower) != points[-1]:
            path += f"V{lower:.0f}"
    return path


def _about(room: str) -> list[str]:
    """The first sentence of the folder's docstring, in lines that fit into a box."""
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
    sentence = ast.get_docstring(tree).partition("\n")[0].partition(". ")[0].rstrip(".").replace("`", "")
    return textwrap.wrap(sentence, CHARACTERS, break_on_hyphens=False)


def _height(lines: list[str]) -> int:
    return 34 + LINE * len(lines)
