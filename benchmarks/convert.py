"""Time and memory of the two converters on a random folder of the 2B shape, against ``cp -r`` of it and ``sync``.

Run it with enough free disk for five copies (22 GB): ``python benchmarks/convert.py [--dir DIR] [--json FILE]``.
Memory is the largest RssAnon of the process while it runs: memory of its own, without mapped files. Time is wall time
of the command, from its start to the end of a ``sync`` after it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
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
    """A folder of random bf16 weights; returns its size in bytes."""
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
    """Seconds that ``command`` and a ``sync`` take, and the largest RssAnon of its process in GiB."""
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", help="where to work (default: the system's temporary folder)")
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="megavlm-convert-", dir=args.dir))
    try:
        hf, copy, checkpoint, back = work / "hf", work / "copy", work / "checkpoint", work / "back"
        nbytes = make_folder(hf)
        os.sync()
        runs = {
            "cp -r": ["cp", "-r", hf, copy],
            "hf2mcore": [sys.executable, TOOLS / "hf2mcore.py", "--quiet", "--hf", hf, "--out", checkpoint],
            "mcore2hf": [
                sys.executable,
                TOOLS / "mcore2hf.py",
                "--quiet",
                "--mcore",
                checkpoint,
                "--hf",
                hf,
                "--out",
                back,
            ],
        }
        results = {name: measure([str(part) for part in command]) for name, command in runs.items()}
        differences, _ = compare(hf, back, progress=False)
    finally:
        shutil.rmtree(work)

    base = results["cp -r"][0]
    rows = [
        {"command": name, "seconds": round(s, 2), "times_cp": round(s / base, 2), "peak_anonymous_gib": round(gib, 2)}
        for name, (s, gib) in results.items()
    ]
    good = not differences and all(r["times_cp"] <= MAX_TIMES and r["peak_anonymous_gib"] < MAX_GIB for r in rows)
    view = Table(
        "command", "seconds, with sync", "× cp -r", "peak RssAnon, GiB", title=f"{nbytes / 1e9:.2f} GB of bf16"
    )
    for row in rows:
        view.add_row(*map(str, row.values()))
    Console().print(view)
    print(f"round trip bit-identical: {not differences}; within {MAX_TIMES} × cp and {MAX_GIB} GiB: {good}")
    if args.json:
        Path(args.json).write_text(json.dumps({"bytes": nbytes, "identical": not differences, "runs": rows}, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
