"""What it costs to bring the rows of a step to the ranks: their text, their pixels, and the plan of who encodes what.

Each part names both sides, which run in the same process one after the other:

1. Text of a step to its model-parallel group (64 rows of 32K tokens, two ranks on gloo): the rows pickled and broadcast
   when the step needs them, as `broadcast_object` does; as flat buffers when the step needs them; and as flat buffers
   while the step before it computes. What counts is how long the slowest rank stands still for them.
2. Pixels of real photographs: as the float32 patches of transformers' processor, and as the bytes that a row has.
3. The plan of a window (4 rows of 8K tokens full of photographs per data rank) with `vision.balance: world`: over all
   ranks, and over a block of data ranks.

    python -m benchmarks.feed --out docs/benchmarks/feed.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.ranks import run_ranks, versions

ROWS, TOKENS = 64, 32768
STEP_SECONDS = 2.0  # of computing between two steps


def text_rows() -> list:
    """Rows of eight conversations, with everything that travels to the group."""
    import numpy as np
    import torch

    from megavlm.data.row import pack
    from megavlm.data.synthetic_row import synthetic_samples

    draw = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(ROWS):
        samples = []
        for _ in range(8):
            tokens = torch.randint(0, 151_643, (TOKENS // 8 - 5,), generator=draw)
            (sample,) = synthetic_samples(
                tokens,
                torch.zeros(4096, 768, dtype=torch.uint8)[: 16 * 16],
                np.array([[16, 16]], dtype=np.int32),
                np.arange(64),
                merge=2,
                answers=1,
            )
            sample.annotations = type(sample.annotations)()
            samples.append(sample)
        rows.append(pack(samples, TOKENS, pad_id=0, grid_side=48, merge=2, pad_multiple=4))
    return rows


def text(repeats: int) -> dict:
    """On each rank: seconds that it stands still for the text of a step, by way."""
    import torch
    import torch.distributed as dist

    from megavlm import platform
    from megavlm.config.settings import ParallelSettings
    from megavlm.data.row_source import HeldRows
    from megavlm.platform.collectives import broadcast_object
    from megavlm.runtime.read_ahead import ReadAhead, Reader
    from megavlm.runtime.row_text import encoded, without_pixels

    groups = platform.init(ParallelSettings(tensor=2))
    rows = text_rows() if groups.is_leader else []
    host = groups.model_parallel_host

    class Endless:
        sources = ()

        def __iter__(self) -> Iterator:
            while True:
                yield from rows

        def state_dict(self) -> list[dict]:
            return [{"worker": 0, "waiting": [(0, number) for number in range(1000)]}]

    source = HeldRows(Endless()) if groups.is_leader else None

    def compute() -> None:
        matrix, end = torch.ones(512, 512), time.perf_counter() + STEP_SECONDS
        while time.perf_counter() < end:
            matrix @ matrix

    def pickled() -> int:
        message = ([without_pixels(row) for row in rows], None)
        return len(broadcast_object(message, host)[0])

    at_once = Reader(iter(source) if source is not None else None, host)
    ahead = ReadAhead(iter(source) if source is not None else None, source, groups, 5.0)
    ways = {
        "pickled, when the step needs it": pickled,
        "flat, when the step needs it": lambda: len(at_once.take(ROWS).hosts),
        "flat, during the step before": lambda: len(ahead.take(ROWS).hosts),
    }
    seconds = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            if "during" in name:
                ahead.begin(ROWS)
            begun = time.perf_counter() - begun
            compute()
            dist.barrier()
            start = time.perf_counter()
            assert way() == ROWS
            if turn:  # the first turn warms up
                seconds[name].append((time.perf_counter() - start, begun))
    ahead.close()
    hosts = [without_pixels(row) for row in rows]
    tensors = [getattr(row, field.name) for row in hosts for field in fields(row)]
    return {
        "seconds": seconds,
        "bytes of tensors": sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor)),
        "bytes of the buffer": len(encoded(hosts)) if hosts else 0,
    }


def measured_text(repeats: int) -> dict:
    leader, other = run_ranks(2, text, repeats)
    done = {"rows": ROWS, "tokens of a row": TOKENS, "ranks": 2, "seconds of computing between": STEP_SECONDS}
    for name in leader["seconds"]:
        pairs = list(zip(leader["seconds"][name], other["seconds"][name], strict=True))
        waits = [max(a[0], b[0]) for a, b in pairs]
        done[name] = {"seconds": round(statistics.median(waits), 4), "of": [round(wait, 4) for wait in waits]}
        if "during" in name:
            done[name]["seconds in which the leader takes its rows"] = round(
                statistics.median(a[1] for a, _ in pairs), 4
            )
    sizes = {name: value for name, value in leader.items() if name.startswith("bytes")}
    return done | sizes


def measured_pixels(root: Path) -> dict:
    """Bytes of the pixels of photographs and of a video made of them."""
    from transformers import AutoProcessor

    from megavlm.config.settings import DataSettings
    from megavlm.data.renderer import Renderer
    from megavlm.demo.model_folder import make_model_folder
    from megavlm.media.files import in_folder

    folder = make_model_folder(root / "tiny")
    pictures = photographs(root)
    renderer, processor = Renderer(folder, DataSettings(seq_length=32768)), AutoProcessor.from_pretrained(folder)
    done = {}
    for name, record in (
        ("pictures", {"text": "<image>" * len(pictures), "images": pictures}),
        ("a video", {"text": "<video>", "videos": [{"frames": pictures[:1] * 8}]}),
    ):
        begun = time.perf_counter()
        sample = renderer.encode(record, in_folder(root), "photographs", kind="pretrain")
        seconds = time.perf_counter() - begun
        patches = int(sample.frame_grids.prod(dim=1).sum())
        before = patches * 3 * 2 * processor.image_processor.patch_size**2 * 4
        tables = patches * (2 + 4 + 4) * 4
        done[name] = {
            "patches": patches,
            "float32 patches of the processor, bytes": before,
            "bytes of a row": sample.pixels.nbytes,
            "ratio": round(before / sample.pixels.nbytes, 2),
            "ratio with the position tables, which go with both": round(
                (before + tables) / (sample.pixels.nbytes + tables), 2
            ),
            "seconds to render": round(seconds, 3),
        }
    return done


def photographs(root: Path) -> list[str]:
    from PIL import Image
    from skimage import data

    names = ["astronaut", "chelsea", "coffee", "rocket"]
    for name in names:
        Image.fromarray(getattr(data, name)()).convert("RGB").save(root / f"{name}.png")
    return [f"{name}.png" for name in names]


def measured_plan(ranks: int, repeats: int) -> dict:
    """Seconds of the plan of a window of rank 0, with TP2 and CP2: over all data ranks, and over a block of them."""
    import numpy as np

    from megavlm.layout.frame_balance import RankShare, VisualRow, VisualTokens, balance_frames, plan_exchange
    from megavlm.platform.groups import blocks

    draw, data_ranks = np.random.default_rng(0), ranks // 4

    def row() -> VisualRow:
        counts, starts, used = [], [], 0
        while (tokens := int(draw.integers(64, 1024))) + used + 2 <= 8192:
            counts.append(tokens)
            starts.append(used + 1)
            used += tokens + 2
        one = np.ones(len(counts), dtype=np.int64)
        return VisualRow([8192], np.array(counts), one, np.arange(len(counts)), np.array(starts))

    rows = [[row() for _ in range(4)] for _ in range(data_ranks)]

    def plan(chosen: list[list[VisualRow]]) -> float:
        begun = time.perf_counter()
        shares = [
            RankShare(2, context, 2, tensor, (0, 1, 2, 3), dp_rank=dp_rank)
            for dp_rank in range(len(chosen))
            for context in range(2)
            for tensor in range(2)
        ]
        frames = [np.concatenate([row.frame_tokens for row in mine]) for mine in chosen]
        tokens = [VisualTokens.of(mine, shares[0], dp_rank) for dp_rank, mine in enumerate(chosen)]
        everything = np.concatenate(frames)
        owner = balance_frames(4 * everything, len(shares), 2000.0)
        joined = VisualTokens.join(tokens, [len(of_rank) for of_rank in frames])
        plan_exchange(joined, everything, owner, shares, 0, 4)
        return time.perf_counter() - begun

    def imbalance(size: int) -> float:
        """The load of the busiest rank over the mean of all, in blocks of ``size`` data ranks."""
        loads = []
        for first in range(0, data_ranks, size):
            frames = np.concatenate([row.frame_tokens for mine in rows[first : first + size] for row in mine]) * 4
            cost = 2000.0 * frames + frames.astype(float) ** 2
            owner = balance_frames(frames, 4 * len(rows[first : first + size]), 2000.0)
            loads += np.bincount(owner, weights=cost, minlength=4 * len(rows[first : first + size])).tolist()
        return max(loads) / statistics.mean(loads)

    block = len(blocks(data_ranks, 4)[0])
    done = {"ranks": ranks, "data ranks": data_ranks, "frames": sum(len(r.frame_tokens) for mine in rows for r in mine)}
    for name, size in (("over all data ranks", data_ranks), (f"over a block of {block} data ranks", block)):
        seconds, busiest = [plan(rows[:size]) for _ in range(repeats)], round(imbalance(size), 4)
        done[name] = {"seconds": round(statistics.median(seconds), 4), "busiest rank over mean": busiest}
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        results = {
            "versions": versions(),
            "text": measured_text(options.repeats),
            "pixels": measured_pixels(Path(folder)),
            "plan": [measured_plan(ranks, options.repeats) for ranks in (64, 256, 1024)],
        }
    shown = json.dumps(results, indent=2)
    print(shown)
    if options.out is not None:
        options.out.write_text(shown + "\n")


if __name__ == "__main__":
    main()
