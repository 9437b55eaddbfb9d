"""Time and memory of the two converters on a random model of the 2B shape, compared with ``cp -r`` and ``sync``.

It needs disk space for four copies (18 GB): ``python benchmarks/convert.py [--dir DIR] [--runs N]``. Memory is the
largest RssAnon of the process, which does not include mapped files. Time is the wall-clock time from the start of the
command to the end of a ``sync`` after it.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megavlm.convert import compare
from megavlm.convert.hf_folder import HfLayout, HfWriter
from megavlm.convert.names import table
from megavlm.model.shapes import Shapes

TOOLS = Path(__file__).resolve().parent.parent / "checkpoint_tools"
MAX_GIB, MAX_TIMES = 2.5, 5.0

# The released Qwen3-VL-2B-Instruct.
CONFIG_2B = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "dtype": "bfloat16",
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 6144,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [5, 11, 17],
    },
}


def make_folder(folder: Path) -> int:
    """Writes a folder of random bf16 weights and returns its size in bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG_2B, indent=2))
    shapes = {name: shape for entry in table(Shapes.from_hf(folder)) for name, shape in entry.hf.items()}
    layout = HfLayout.sharded(shapes, torch.bfloat16)
    writer = HfWriter(folder, layout)
    torch.manual_seed(0)
    for name, shape in shapes.items():
        writer.write(name, torch.randn(shape))
    writer.close()
    return sum(info.nbytes for info in layout.tensors.values())


def measure(command: list[str]) -> tuple[float, float]:
    """The time of ``command`` and a ``sync`` in seconds, and the largest RssAnon of the process in GiB."""
    started = time.perf_counter()
    process = subprocess.Popen(command)
    peak = 0

    def watch():
        nonlocal peak
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            for line in status.splitlines():
                if line.startswith("RssAnon"):
                    peak = max(peak, int(line.split()[1]))
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    watcher.join()
    assert status == 0, command
    os.sync()
    return time.perf_counter() - started, peak / 2**20


def run_once(work: Path) -> list[dict]:
    """Measures each command once. ``work/hf`` must exist; all other files in ``work`` are removed again."""
    hf, copy, checkpoint, back = (work / name for name in ("hf", "copy", "checkpoint", "back"))
    tool = [sys.executable]
    commands = {
        "cp -r": ["cp", "-r", hf, copy],
        "hf2mcore": [*tool, TOOLS / "hf2mcore.py", "--quiet", "--hf", hf, "--out", checkpoint],
        "mcore2hf": [*tool, TOOLS / "mcore2hf.py", "--quiet", "--mcore", checkpoint, "--hf", hf, "--out", back],
    }
    rows = []
    for name, command in commands.items():
        load = os.getloadavg()[0]
        seconds, gib = measure([str(part) for part in command])
        times = seconds / rows[0]["seconds"] if rows else 1.0
        row = {"command": name, "seconds": seconds, "times_cp": times, "peak_anonymous_gib": gib, "load_before": load}
        rows.append({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
    identical = not compare(hf, back, progress=False)[0]
    for folder in (copy, checkpoint, back):
        shutil.rmtree(folder)
    os.sync()
    return [{**row, "round_trip_identical": identical} for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", help="working folder (default: the system's temporary folder)")
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--runs", type=int, default=1, help="number of repetitions (default: 1)")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="megavlm-convert-", dir=args.dir))
    try:
        nbytes = make_folder(work / "hf")
        os.sync()
        runs = [run_once(work) for _ in range(args.runs)]
    finally:
        shutil.rmtree(work)

    rows = [row for run in runs for row in run]
    good = all(
        r["round_trip_identical"] and r["times_cp"] <= MAX_TIMES and r["peak_anonymous_gib"] < MAX_GIB for r in rows
    )
    title = f"{nbytes / 1e9:.2f} GB of bf16"
    view = Table(
        "command", "seconds, with sync", "× cp -r", "peak RssAnon, GiB", "load before", "identical", title=title
    )
    for row in rows:
        view.add_row(*map(str, row.values()))
    Console().print(view)
    print(f"round trip bit-identical, within {MAX_TIMES} × cp and {MAX_GIB} GiB: {good}")
    if args.json:
        packages = {name: version(name) for name in ("torch", "megatron-core")}
        machine = {
            "python": platform.python_version(),
            **packages,
            "cores": os.cpu_count(),
            "kernel": platform.release(),
        }
        Path(args.json).write_text(json.dumps({"bytes": nbytes, **machine, "runs": runs}, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
