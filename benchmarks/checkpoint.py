"""Time for which training waits for checkpoints that are written in the background or in the foreground.

    python benchmarks/checkpoint.py [--dir DIR] [--json FILE] [--layers N]

A random model of a hundred million parameters (14 bytes each: bf16 weights, float32 copy and Adam moments) is trained
for some steps on one and on two processes, and saved four times in each way. The waiting time is the time that the
training loop spends in ``save``, in ``poll`` after each step, and in ``finish`` before the next save. While a
checkpoint is written in the background, training steps share processors and memory with the writer, so their time is
listed next to that of steps without a writer. The comparison uses the medians and the fastest of the saves after the
first, because the first also plans the later ones.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

MAX_SHARE, SAVES = 0.2, 4
LAYOUTS = {"one process": (1, {}), "2 data ranks": (2, {}), "2 tensor ranks": (2, {"tensor": 2})}


def make(work: Path, layers: int) -> None:
    """Writes a model folder with configuration and tokenizer, and some records."""
    from megavlm.demo.model_folder import make_model_folder

    text = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": layers}
    make_model_folder(work / "model", text=text, dtype="bfloat16")
    say = lambda role, content: {"role": role, "content": content}
    records = [{"messages": [say("user", "What? " * n), say("assistant", "So be it.")]} for n in range(1, 9)]
    (work / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def measure(work: Path, parallel: dict) -> dict:
    """Saves checkpoints in both ways and returns the times of this rank. Runs on all ranks."""
    import torch.distributed as dist

    from megavlm import platform
    from megavlm.checkpoint.manager import MAIN, Checkpoints, TrainedModel
    from megavlm.config.settings import Settings
    from megavlm.data.loader import build_loader
    from megavlm.data.renderer import Renderer
    from megavlm.model.shapes import Shapes
    from megavlm.model.vlm import VLM
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.feed import Feed
    from megavlm.training.objective import CrossEntropy
    from megavlm.training.step import Step

    def settings_of(background: bool) -> Settings:
        return Settings(
            model={"hf": work / "model"},
            data={"train": [{"path": work / "train.jsonl"}], "seq_length": 64, "packing": "none", "workers": 1},
            parallel=parallel,
            train={"steps": 1000, "lr": 1e-4, "global_batch_size": 2, "precision": "bf16"},
            checkpoint={"async": background, "keep": 1},
        )

    settings = settings_of(True)
    groups = platform.init(settings.parallel)
    vlm = VLM(Shapes.from_hf(work / "model"), settings, groups).train()
    loader = None
    if groups.is_leader:
        renderer = Renderer(work / "model", settings.data)
        loader = build_loader(settings.data, renderer, "tune", dp_rank=groups.dp_rank, dp_size=groups.dp_size, seed=1)
    optimizers = Optimizers(vlm, settings.train)
    step = Step(
        vlm,
        optimizers,
        Feed(vlm, loader),
        2 // groups.dp_size,
        CrossEntropy(["data"], settings.train.logprob_chunk_tokens),
    )

    def timed_step() -> float:
        began = time.perf_counter()
        step()
        seconds = time.perf_counter() - began
        dist.barrier()  # waiting for the step of another rank is not part of the waiting time
        return seconds

    def published(folder: Path) -> bool:
        there = [folder.exists()]
        dist.broadcast_object_list(there, src=0)  # the checkpoint can appear at any time, but all ranks must agree
        return there[0]

    timed_step()
    alone, beside, waits = [timed_step() for _ in range(3)], [], {}
    for background in (False, True):
        root = work / ("background" if background else "foreground")
        store = Checkpoints(root, {MAIN: TrainedModel(vlm, optimizers)}, loader, settings_of(background))
        waits[background] = []
        for number in range(1, SAVES + 1):
            store.save(number)
            while not published(root / f"step_{number:08}"):
                beside.append(timed_step())
                store.poll()
            store.finish()
            waits[background].append(store.take_seconds())
        size = sum(file.stat().st_size for file in root.glob("*/*"))
        dist.barrier()
    if loader is not None:
        loader.close()
    return {
        "bytes": size,
        "parameters": sum(p.numel() for part in ("vision", "projector", "language") for m in vlm.modules_of(part)
                          for p in m.parameters()),
        "foreground": waits[False],
        "background": waits[True],
        "step_alone": statistics.median(alone),
        "step_beside_writer": statistics.median(beside) if beside else None,
    }  # fmt: skip


def run(work: Path, size: int, parallel: dict) -> list[dict]:
    """Runs ``measure`` in ``size`` processes and returns their results by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // size)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank-of", str(work), json.dumps(parallel)],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads)},
        )
        for rank in range(size)
    ]  # fmt: skip
    assert not any([process.wait() for process in processes])  # noqa: C419 (wait for all of them)
    return [json.loads((work / f"rank_{rank}.json").read_text()) for rank in range(size)]


def summary(name: str, ranks: list[dict]) -> dict:
    """The times of the slowest rank in each save. The shares leave out the first save, which also plans the others."""
    foreground, background = ([max(times) for times in zip(*(r[way] for r in ranks), strict=True)]
                              for way in ("foreground", "background"))  # fmt: skip
    share = lambda of: round(of(background[1:]) / of(foreground[1:]), 3)
    first = ranks[0]
    return {
        "layout": name,
        "gigabytes": round(first["bytes"] / 1e9, 3),
        "foreground_seconds": [round(s, 3) for s in foreground],
        "background_wait_seconds": [round(s, 3) for s in background],
        "share_of_fastest": share(min),
        "share_of_median": share(statistics.median),
        "share_of_first": round(background[0] / foreground[0], 3),
        "step_seconds_alone": round(first["step_alone"], 3),
        "step_seconds_beside_writer": round(first["step_beside_writer"] or 0, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", help="working folder (default: the system's temporary folder)")
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers of 12 million parameters each")
    parser.add_argument("--rank-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        work = Path(args.rank_of[0])
        result = measure(work, json.loads(args.rank_of[1]))
        (work / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(result))
        return 0
    work = Path(tempfile.mkdtemp(prefix="megavlm-checkpoint-", dir=args.dir))
    try:
        make(work, args.layers)
        rows = []
        for name, (size, parallel) in LAYOUTS.items():
            rows.append(summary(name, run(work, size, parallel)))
            print(rows[-1], flush=True)
            for way in ("foreground", "background"):
                shutil.rmtree(work / way)
    finally:
        shutil.rmtree(work)
    good = all(row["share_of_median"] <= MAX_SHARE for row in rows)
    view = Table(
        "layout",
        "GB",
        "in the foreground, s",
        "waiting, in the background, s",
        "share, of the fastest",
        "of the medians",
        "of the first",
        "step without writing, s",
        "step during writing, s",
    )
    for row in rows:
        cells = [", ".join(f"{x:.2f}" for x in cell) if isinstance(cell, list) else str(cell) for cell in row.values()]
        view.add_row(*cells)
    Console().print(view)
    print(f"waiting is at most {MAX_SHARE:.0%} of a save in the foreground (medians after the first): {good}")
    if args.json:
        about = {
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "megatron-core", "megatron-energon")},
        }
        Path(args.json).write_text(json.dumps({"machine": about, "saves": SAVES, "runs": rows}, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
