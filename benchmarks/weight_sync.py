"""Seconds and bytes of bringing new weights to another program: as a stream, and through files.

    python -m benchmarks.weight_sync [--layers N] [--dir DIR] [--json FILE]

A random model in bfloat16 with 0.3 billion parameters is on two processes, one core each. Three ways bring all of its
weights into the memory of rank 0 under Hugging Face's names, each three times in turn; the medians are compared:

- stream: ``WeightStream`` in buckets of 64 MiB, with and without the digest of every tensor;
- checkpoint: weights saved as a checkpoint without optimizer state, converted as ``megavlm export`` does, and read;
- of which a server would read: the Hugging Face folder alone.

Files were just written, so they are in the page cache. The memory of rank 0 is the largest RssAnon meanwhile minus that
before; tensors are dropped as soon as they have arrived.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.hf_start import PeakMemory
from benchmarks.ranks import run_ranks, versions

LAYOUTS, ROUNDS, BUCKET = {"TP2": {"tensor": 2}, "PP2": {"pipeline": 2}}, 3, 64 * 2**20
TEXT = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000, "mrope_section": [24, 20, 20],
                            "mrope_interleaved": True}}  # fmt: skip


def measure(work: Path, parallel: dict) -> dict:
    """Runs on both ranks; returns what rank 0 has measured."""
    import torch.distributed as dist
    from safetensors import safe_open

    from megavlm.checkpoint.writer import CheckpointWriter
    from megavlm.config.settings import Settings
    from megavlm.convert import SHARDED_METADATA, mcore_to_hf
    from megavlm.runtime.digest import digest
    from megavlm.runtime.session import start
    from megavlm.runtime.weight_stream import WeightStream

    hf = work / "model"
    settings = Settings(model={"hf": hf, "load": hf}, parallel=parallel, train={"precision": "bf16"})
    session = start(settings, training=True)
    stream = WeightStream(session)
    sizes: dict[str, int] = {}

    def streamed(with_digest: bool) -> None:
        sizes["stream"] = sizes["tensors"] = 0
        for bucket in stream.buckets(BUCKET):
            for _, tensor in bucket:
                sizes["stream"] += tensor.nbytes
                sizes["tensors"] += 1
                if with_digest:
                    digest(tensor)

    def saved() -> None:
        writer = CheckpointWriter(session.groups.language.dp_cp, session.groups.world_host, background=False)
        writer.start(session.vlm.sharded_state_dict(dict(SHARDED_METADATA)), work / "saved")
        writer.finish(lambda folder: None, wait=True)

    def converted() -> None:
        if session.is_first:
            mcore_to_hf(work / "saved", hf, work / "converted", progress=False)

    def read() -> None:
        if session.is_first:
            sizes["files"] = 0
            for file in (work / "converted").glob("*.safetensors"):
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  # it is no dict
                        sizes["files"] += opened.get_tensor(name).clone().nbytes

    ways = {
        "stream": lambda: streamed(False), "stream with digests": lambda: streamed(True),
        "write a checkpoint": saved, "convert it": converted, "read the folder": read,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, float] = dict.fromkeys(ways, 0.0)
    streamed(True)  # a warm-up
    for _ in range(ROUNDS):
        for name, way in ways.items():
            dist.barrier()
            with PeakMemory() as peak:
                began = time.perf_counter()
                way()
                dist.barrier()
                seconds[name].append(time.perf_counter() - began)
            memory[name] = max(memory[name], (peak.bytes - peak.before) / 2**20)
        if session.is_first:
            for name in ("saved", "converted"):
                shutil.rmtree(work / name)
        dist.barrier()
    median = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    through_files = [sum(values) for values in zip(*list(seconds.values())[2:], strict=True)]
    return {
        "bytes": sizes, "seconds": median, "seconds_through_files": round(statistics.median(through_files), 3),
        "mib_of_rank_0": {name: round(value) for name, value in memory.items()},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=20, help="layers of the decoder (default: 20)")
    parser.add_argument("--dir", help="where to write the files, about 3 GB (default: the temporary folder)")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    from megavlm.demo.model_folder import make_model_folder

    results = {}
    with tempfile.TemporaryDirectory(prefix="megavlm-sync-", dir=args.dir) as temporary:
        work = Path(temporary)
        make_model_folder(work / "model", text={**TEXT, "num_hidden_layers": args.layers}, dtype="bfloat16")
        for name, parallel in LAYOUTS.items():
            results[name] = run_ranks(2, measure, work, parallel)[0]
    for name, result in results.items():
        stream, files, size = result["seconds"]["stream"], result["seconds_through_files"], result["bytes"]["stream"]
        print(
            f"{name}: {size / 2**20:.0f} MiB streamed in {stream:.2f} s ({result['seconds']['stream with digests']:.2f}"
            f" s with digests), {result['mib_of_rank_0']['stream']} MiB more memory on rank 0; through files "
            f"{files:.2f} s, {result['seconds']}"
        )
    if args.json:
        content = {"versions": versions(), "layers": args.layers, "bucket_bytes": BUCKET, **results}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(r["seconds"]["stream with digests"] < r["seconds_through_files"] for r in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
