"""Time of the tower if frames are distributed over a model-parallel group, or if each rank encodes all frames.

``python -m benchmarks.tower [--json FILE]``: a tower with random weights encodes real photographs on two processes in
the layouts TP2, PP2 and CP2. The time is that of the tower's part of a step (encoding, exchange of features, backward
pass with recomputation) on the slower rank; the two ways alternate. Balance is the planned cost of the slowest of four
ranks divided by the mean, for windows of four rows of 8,192 tokens with photographs from 64 px to 2,000 px.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.ranks import run_ranks, versions

LAYOUTS = {"TP2": {"tensor": 2}, "PP2": {"pipeline": 2}, "CP2": {"context": 2}}
NAMES = ("astronaut", "chelsea", "coffee", "rocket", "page", "retina", "brick", "grass")
TOWER = {
    "depth": 4,
    "hidden_size": 128,
    "num_heads": 4,
    "intermediate_size": 512,
    "deepstack_visual_indexes": [0, 1, 2],
}
REPEATS = 5


def photographs(root: Path, count: int, most: int) -> list[dict]:
    """``count`` records of one photograph each, with log-uniform longer sides from 64 to ``most`` pixels."""
    from skimage import data

    sides = np.exp(np.random.default_rng(0).uniform(np.log(64), np.log(most), count)).astype(int)
    sides[:2] = 64, most
    records = []
    for index, side in enumerate(sides):
        picture = Image.fromarray(getattr(data, NAMES[index % len(NAMES)])()).convert("RGB")
        scale = side / max(picture.size)
        file = root / f"{index}.jpg"
        picture.resize([max(32, round(edge * scale)) for edge in picture.size]).save(file)
        records.append({"text": "<image> A picture.", "images": [file.name]})
    return records


def balance(root: Path, records: list[dict], folder: Path) -> list[float]:
    """The planned imbalance over 4 ranks of windows of 4 rows of 8,192 tokens, for the tower of the 8B model."""
    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.layout.frame_balance import balance_frames, frame_cost
    from megavlm.media.files import in_folder

    renderer = Renderer(folder, Settings(model={"hf": folder}, data={"seq_length": 262144}).data)
    drafts = [renderer.draft(record, in_folder(root), "photographs", kind="pretrain") for record in records]
    patches = [draft.frame_grids.prod(axis=1) for draft in drafts]
    window_of = np.cumsum([p.sum() for p in patches]) // (4 * 4 * 8192)  # four patches per token
    result = []
    for window in range(window_of[-1]):
        frames = np.concatenate([p for p, w in zip(patches, window_of, strict=True) if w == window])
        linear_cost = 2.0 * 1152 + 4304
        owner, cost = balance_frames(frames, 4, linear_cost), frame_cost(frames, linear_cost)
        result.append(max(cost[owner == rank].sum() for rank in range(4)) * 4 / cost.sum())
    return result


def measure(folder: Path, root: Path, records: list[dict], parallel: dict) -> dict[str, list[float]]:
    """The time of the tower's part of a step on this rank in seconds. Runs on all ranks."""
    import torch
    import torch.distributed as dist

    from megavlm import platform
    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.layout.frame_balance import RankShare, VisualRow, VisualTokens, plan_exchange
    from megavlm.media.files import in_folder
    from megavlm.model.shapes import Shapes
    from megavlm.model.tower_phase import TowerPhase
    from megavlm.model.vision import Frames
    from megavlm.model.vlm import VLM
    from megavlm.runtime.feed import Feed
    from megavlm.runtime.pixels import normalised

    settings = Settings(
        model={"hf": folder}, data={"seq_length": 32768}, parallel=parallel, train={"precision": "fp32"},
        vision={"recompute": True, "chunk_patches": 16384},
    )  # fmt: skip
    groups = platform.init(settings.parallel)
    vlm = VLM(Shapes.from_hf(folder), settings, groups).train()
    renderer = Renderer(folder, settings.data, settings.pad_multiple)
    row = renderer.pack(
        [renderer.encode(r, in_folder(root), "photographs", kind="pretrain", index=i) for i, r in enumerate(records)]
    )
    feed = Feed(vlm, iter([row]) if groups.is_leader else None)
    window = next(feed.windows(feed.rows(1), 1))

    # For comparison: a group of a single rank, which encodes all frames.
    share = RankShare(planes=tuple(range(vlm.tower.num_planes)))
    counts = np.asarray(row.frame_lengths) // vlm.tower.merge
    starts = row.visual_positions.numpy()[np.cumsum(counts) - counts]
    tokens = VisualTokens.of(
        [VisualRow(row.segment_lengths, counts, np.ones_like(counts), np.arange(len(counts)), starts)], share, 0
    )
    alone = TowerPhase(vlm.vision, vlm.projector, groups.tower.tp, [share], recompute=True, chunk_patches=16384)
    lengths, images = np.asarray(row.frame_lengths), row.frame_images.numpy().astype(np.int64)
    patches = normalised(row.pixels, lengths, images, row.pixel_scale, 2, torch.float32)
    everything = Frames(patches, row.patch_coords, row.pos_index, row.pos_weight, row.frame_lengths)
    own_plan = plan_exchange(tokens, counts, np.zeros(len(counts), dtype=np.int64), [share], 0, 1)

    def step(tower, frames, exchange) -> float:
        dist.barrier()
        start = time.perf_counter()
        for _, features in tower.encode(frames, exchange):
            features.grad = torch.ones_like(features)
        tower.backward(1.0)
        return time.perf_counter() - start

    seconds = {"dealt": [], "everywhere": []}
    for repeat in range(REPEATS + 1):
        pair = step(vlm.tower, window.frames, window.exchange), step(alone, everything, own_plan)
        if repeat:  # the first repetition is a warm-up
            for name, value in zip(seconds, pair, strict=True):
                seconds[name].append(value)
    platform.shutdown()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    from megavlm.demo.model_folder import make_model_folder

    with tempfile.TemporaryDirectory(prefix="megavlm-tower-") as temporary:
        root = Path(temporary)
        folder = make_model_folder(root / "model", vision=TOWER, max_pixels=2048 * 2048)
        many = photographs(root, 400, 2000)
        imbalance = balance(root, many, folder)
        few = photographs(root, 12, 800)
        results = {}
        for name, parallel in LAYOUTS.items():
            ranks = run_ranks(2, measure, folder, root, few, parallel)
            slower = {way: [max(pair) for pair in zip(*(rank[way] for rank in ranks), strict=True)] for way in ranks[0]}
            ratios = [b / a for a, b in zip(slower["dealt"], slower["everywhere"], strict=True)]
            results[name] = {
                **{way: statistics.median(values) for way, values in slower.items()},
                "ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)],
            }  # fmt: skip
    table = Table(
        "layout",
        "dealt, s",
        "everywhere, s",
        "ratio",
        "min to max",
        title="tower's phase of a step, 12 photographs up to 800 px",
    )
    for name, r in results.items():
        low, high = r["ratios"]
        table.add_row(
            name, f"{r['dealt']:.2f}", f"{r['everywhere']:.2f}", f"{r['ratio']:.2f}", f"{low:.2f} to {high:.2f}"
        )
    Console().print(table)
    print(
        f"slowest of 4 ranks over the mean, {len(imbalance)} windows: "
        f"median {statistics.median(imbalance):.3f}, most {max(imbalance):.3f}"
    )
    if args.json:
        content = {"versions": versions(), "layouts": results, "imbalance_of_4_ranks": [float(x) for x in imbalance]}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
