"""Time and memory of loading a Hugging Face folder of the 2B shape directly, beside hf2mcore.py and loading.

    python -m benchmarks.hf_start [--hf FOLDER] [--dir DIR] [--json FILE]

Two processes load the folder and the checkpoint in turn. Time is that of the slower rank, from one barrier to the next;
files were just written, so they are in the page cache. A rank's own memory is the largest RssAnon while it loads, which
does not include mapped files, minus the bytes of its weights. All ranks must have the same bits in both ways.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.convert import MAX_GIB, TOOLS, make_folder, measure
from benchmarks.ranks import run_ranks, versions

LAYOUTS = {"TP2": {"tensor": 2}, "PP2": {"pipeline": 2}}


def load_both(hf: Path, checkpoint: Path, parallel: dict) -> dict:
    """Runs on every rank: loads the folder, then the checkpoint, into the same model."""
    import torch
    import torch.distributed as dist

    from megavlm.checkpoint.load_weights import load_weights
    from megavlm.config.settings import Settings
    from megavlm.model.vlm import PARTS
    from megavlm.runtime.session import start

    settings = Settings(model={"hf": hf}, parallel=parallel, train={"precision": "bf16"})
    vlm = start(settings, training=True, load=False).vlm
    weights = [p.data for part in PARTS for module in vlm.modules_of(part) for p in module.parameters()]
    held = sum(weight.nbytes for weight in weights)
    found: dict = {"weights_gib": round(held / 2**30, 2)}
    for name, path in {"folder": hf, "checkpoint": checkpoint}.items():
        for weight in weights:
            weight.zero_()
        dist.barrier()
        with PeakMemory() as peak:
            began = time.perf_counter()
            load_weights(path, vlm)
            seconds = time.perf_counter() - began
        digest = hashlib.blake2b()
        for weight in weights:
            digest.update(weight.view(torch.uint8).numpy().reshape(-1))
        found[name] = {
            "seconds": round(seconds, 2),
            "own_gib": round((peak.bytes - held) / 2**30, 2),
            "own_gib_before": round((peak.before - held) / 2**30, 2),
            "digest": digest.hexdigest()[:32],
        }
    return found


class PeakMemory:
    """Within the block, watches the anonymous memory of this process. ``before``, ``bytes``: at its start, at most."""

    def __enter__(self) -> "PeakMemory":
        self.bytes = self.before = self._now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.bytes = max(self.bytes, self._now())

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf", type=Path, help="a folder of this shape (default: a random one is written)")
    parser.add_argument("--dir", help="working folder (default: the system's temporary folder)")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="megavlm-hf-start-", dir=args.dir))
    hf, checkpoint = args.hf or work / "hf", work / "checkpoint"
    try:
        if args.hf is None:
            make_folder(hf)
        convert = [sys.executable, str(TOOLS / "hf2mcore.py"), "--quiet", "--hf", str(hf), "--out", str(checkpoint)]
        seconds, gib = measure(convert)
        rows = {name: run_ranks(2, load_both, hf, checkpoint, parallel) for name, parallel in LAYOUTS.items()}
    finally:
        shutil.rmtree(work)
    view = Table("layout", "weights, GiB", "folder, s", "own GiB", "hf2mcore.py, s", "checkpoint, s", "own GiB", "same")
    good = True
    for name, ranks in rows.items():
        of = lambda way, field, ranks=ranks: max(rank[way][field] for rank in ranks)
        same = all(rank["folder"]["digest"] == rank["checkpoint"]["digest"] for rank in ranks)
        times = of("folder", "seconds"), round(seconds, 2), of("checkpoint", "seconds")
        memory = of("folder", "own_gib"), of("checkpoint", "own_gib")
        good &= same and memory[0] <= MAX_GIB and times[0] <= times[1] + times[2]
        held = max(rank["weights_gib"] for rank in ranks)
        view.add_row(name, *map(str, (held, times[0], memory[0], times[1], times[2], memory[1], same)))
    Console().print(view)
    print(f"same bits, within {MAX_GIB} GiB, and no longer than converting and loading: {good}")
    if args.json:
        converted = {"seconds": round(seconds, 2), "own_gib": round(gib, 2)}
        result = {**versions(), "hf2mcore": converted, "ranks": rows}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":  # processes started by spawn import this file again
    sys.exit(main())
