"""Throughput, start-up time, memory and packing of the data pipeline, compared with minimal implementations.

    python benchmarks/data.py [--json FILE] [--runs N] [--dir DIR]

*Throughput*: samples per second of ``build_loader`` with two workers, for JPEG photographs of about a megapixel, each
of which is used by ten lines of a JSONL file. The comparison is torch's DataLoader with as many workers that only
decode the files, run the image processor, and pass the tensors to the main process. Runs alternate. Medians are
compared from the first row on, and after the packing buffer has been filled with a thousand samples.

*Start*: the time in which a new process opens 100,000 lines and takes its first row. *Memory*: the memory that belongs
only to the workers (USS), after the same number of rows from 10,000 and from 100,000 lines.

*Packing*: the share of tokens that are not padding in rows of 8,192 tokens. The samples are functions, classes,
paragraphs and whole files of the installed packages, mixed with pictures. The comparison is the same order of samples
without a buffer: next-fit (a sample that does not fit into the open row closes it), first-fit (a sample goes into the
first of 16 open rows with enough room; if there is none, the fullest row is closed), and no packing.
"""

import argparse
import ast
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from megavlm.config.settings import DataSettings
from megavlm.data.loader import build_loader
from megavlm.data.renderer import Renderer
from megavlm.demo.model_folder import make_model_folder
from megavlm.sources.blend import open_file

WORKERS, SEQ_LENGTH, PICTURES = 2, 8192, 200
WARM_ROWS, TIMED_ROWS = 60, 50  # rows of eight pictures; after 60 rows, both packing buffers are full
MEMORY_ROWS = 60
PACKED_SAMPLES = 12_000
MIN_RATIO, MAX_START = 0.8, 10.0
NAMES = ("retina", "hubble_deep_field", "rocket", "coffee", "astronaut", "chelsea", "immunohistochemistry")


def say(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def write_lines(file: Path, records: Iterator[dict]) -> Path:
    with open(file, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)
    return file


def photograph(draw: random.Random, width: int, height: int) -> Image.Image:
    """A crop of a photograph, scaled to this size."""
    from skimage import data

    whole = Image.fromarray(getattr(data, draw.choice(NAMES))())
    left, upper = draw.randrange(whole.width // 3), draw.randrange(whole.height // 3)
    box = (
        left,
        upper,
        whole.width - draw.randrange(whole.width // 3),
        whole.height - draw.randrange(whole.height // 3),
    )
    return whole.resize((width, height), Image.Resampling.LANCZOS, box)


def make_pictures(root: Path) -> list[str]:
    """Writes JPEG files of a megapixel, with a tolerance of a tenth, and returns their names."""
    names, draw = [], random.Random(0)
    for number in range(PICTURES):
        width = draw.randint(850, 1250)
        picture = photograph(draw, width, round(draw.uniform(0.9, 1.1) * 1e6 / width))
        names.append(f"{number}.jpg")
        picture.save(root / names[-1], quality=90)
    return names


def about_pictures(names: list[str], count: int) -> Iterator[dict]:
    """This number of lines, each with one of the pictures."""
    for number in range(count):
        question = say("user", f"<image>What is in picture {number}?")
        yield {"messages": [question, say("assistant", "A photograph. " * (1 + number % 9))],
               "images": [names[number % len(names)]]}  # fmt: skip


def loader_of(folder: Path, file: Path, **settings):
    settings = DataSettings(train=[{"path": str(file)}], seq_length=SEQ_LENGTH, workers=WORKERS, **settings)
    renderer = Renderer(folder, settings)
    return build_loader(settings, renderer, "tune", dp_rank=0, dp_size=1, seed=0)


def ours(folder: Path, file: Path) -> dict[str, float]:
    """Samples per second of the loader, from its first row on and after its packing buffers are full."""
    loader = loader_of(folder, file)
    times, counts = [], []
    for _ in range(WARM_ROWS + TIMED_ROWS):
        row = next(loader)
        times.append(time.perf_counter())
        counts.append(row.num_samples)
        assert not row.faults
    loader.close()
    rate = lambda first: sum(counts[first + 1 :]) / (times[-1] - times[first])
    return {"full": rate(WARM_ROWS), "from_first": rate(0)}


class _Bare(torch.utils.data.Dataset):
    def __init__(self, processor, files: list[Path], decoder: str):
        self.processor, self.files, self.decoder = processor, files, decoder

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        if self.decoder == "PIL":
            picture = Image.open(self.files[index]).convert("RGB")
        else:
            picture = decode_jpeg(read_file(str(self.files[index])), ImageReadMode.RGB)
        return dict(self.processor(images=[picture], return_tensors="pt"))


def bare(folder: Path, files: list[Path], decoder: str) -> float:
    """Samples per second of decoding and the processor without the rest of the pipeline."""
    processor = Renderer(folder, DataSettings()).processor.image_processor
    skipped = 8 * WORKERS
    order = random.Random(1).choices(files, k=skipped + 8 * TIMED_ROWS)
    loader = torch.utils.data.DataLoader(
        _Bare(processor, order, decoder), batch_size=None, num_workers=WORKERS, multiprocessing_context="fork"
    )
    times = [time.perf_counter() for _ in loader]
    return (len(times) - skipped) / (times[-1] - times[skipped - 1])


def throughput(folder: Path, root: Path, names: list[str], runs: int) -> dict:
    file = write_lines(root / "throughput.jsonl", about_pictures(names, 10 * PICTURES))
    files = [root / name for name in names]
    results: dict[str, list[float]] = {"full": [], "from_first": [], "torchvision": [], "PIL": []}
    for _ in range(runs):
        for decoder in ("torchvision", "PIL"):
            results[decoder].append(bare(folder, files, decoder))
        for name, rate in ours(folder, file).items():
            results[name].append(rate)
    medians = {name: statistics.median(rates) for name, rates in results.items()}
    ratios = {name: medians[name] / medians["torchvision"] for name in ("full", "from_first")}
    return {"samples_per_second": results, "medians": medians, "share_of_bare_torchvision": ratios}


def started(folder: str, file: str, rows: int) -> dict:
    """The time to the first row in seconds, and the workers' own memory after `rows`. Runs in a new process."""
    began = time.time()
    loader = loader_of(Path(folder), Path(file))
    next(loader)
    first = time.time()
    for _ in range(rows - 1):
        next(loader)
    workers = psutil.Process().children()
    assert len(workers) == WORKERS
    while any([worker.cpu_percent(0.5) > 2 for worker in workers]):  # noqa: C419 (call it on all workers)
        pass  # wait until they are idle, because they have prepared the maximum number of rows
    own = [worker.memory_full_info().uss / 2**20 for worker in workers]
    loader.close()
    return {
        "first_row_seconds": first - began,
        "with_imports_seconds": first - psutil.Process().create_time(),
        "worker_mib": own,
    }


def start_and_memory(folder: Path, root: Path, names: list[str], runs: int) -> dict:
    results: dict[int, list[dict]] = {}
    for count in (10_000, 100_000):
        write_lines(root / f"{count}.jsonl", about_pictures(names, count))
    for _ in range(runs):
        for count in (10_000, 100_000):
            command = [
                sys.executable,
                __file__,
                "--started",
                str(folder),
                str(root / f"{count}.jsonl"),
                str(MEMORY_ROWS),
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results.setdefault(count, []).append(json.loads(done.stdout.splitlines()[-1]))
    return {
        str(count): {
            "first_row_seconds": statistics.median(r["first_row_seconds"] for r in of),
            "with_imports_seconds": statistics.median(r["with_imports_seconds"] for r in of),
            "worker_mib": statistics.median(mib for r in of for mib in r["worker_mib"]),
            "worker_mib_range": [f(mib for r in of for mib in r["worker_mib"]) for f in (min, max)],
        }
        for count, of in results.items()
    }


def texts(limit: int) -> list[str]:
    """Parts of the files of installed packages: functions and classes, blocks of paragraphs, whole files."""
    root, draw, found = Path(sysconfig.get_path("purelib")), random.Random(0), []
    files = sorted(p for p in root.rglob("*") if p.suffix in (".py", ".md", ".rst", ".txt") and p.is_file())
    draw.shuffle(files)
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
            nodes = ast.parse(text).body if path.suffix == ".py" else []
        except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
            continue
        if draw.random() < 0.1:
            found.append(text)
        elif path.suffix == ".py":
            lines = text.splitlines(keepends=True)
            kinds = (ast.FunctionDef, ast.ClassDef)
            pieces = ["".join(lines[n.lineno - 1 : n.end_lineno]) for n in nodes if isinstance(n, kinds)]
            found += draw.sample(pieces, min(4, len(pieces)))
        else:
            paragraphs, taken = text.split("\n\n"), 0
            while paragraphs and taken < 4:
                count, taken = draw.randint(1, 20), taken + 1
                found.append("\n\n".join(paragraphs[:count]))
                paragraphs = paragraphs[count:]
        found = [piece for piece in found if piece.strip() and len(piece) < 200_000]
        if len(found) >= limit:
            break
    draw.shuffle(found)
    return found[:limit]


def mixed(root: Path, pieces: list[str]) -> Iterator[dict]:
    """Three quarters of the texts as documents, a quarter as conversations about one to four pictures of many sizes."""
    draw, names = random.Random(2), []
    for number in range(100):
        size = [round(64 * 16 ** draw.random()) for _ in range(2)]
        names.append(f"mixed-{number}.jpg")
        photograph(draw, *size).save(root / names[-1])
    for piece in pieces:
        piece = piece.replace("<image>", "").replace("<video>", "").replace("<|", "< |")
        if draw.random() < 0.75:
            yield {"text": piece}
        else:
            images = draw.choices(names, k=draw.choice((1, 1, 2, 4)))
            yield {"messages": [say("user", "<image>" * len(images) + "?"), say("assistant", piece[:500])],
                   "images": images}  # fmt: skip


def open_rows(lengths: list[int], most_open: int) -> int:
    """Packs samples in order of arrival, each into the first open row with enough room (most_open 1: next-fit)."""
    free: list[int] = []
    closed = 0
    for length in lengths:
        place = next((place for place, room in enumerate(free) if room >= length), None)
        if place is None:
            if len(free) == most_open:
                free.remove(min(free))
                closed += 1
            free.append(SEQ_LENGTH)
            place = len(free) - 1
        free[place] -= length
    return closed + len(free)


def packing(root: Path) -> dict:
    pieces = texts(PACKED_SAMPLES)
    folder = make_model_folder(root / "packing-model", corpus=pieces[:1500], vocab_size=16_000, max_pixels=1024 * 1024)
    path = write_lines(root / "mixed.jsonl", mixed(root, pieces))
    file, renderer = open_file(path), Renderer(folder, DataSettings(seq_length=2**20))
    lengths = []
    for index in range(len(file)):
        record, find = file.read(index)
        lengths.append(renderer.draft(record, find, file.source(index), kind="pretrain").length)
    fitting = [length for length in lengths if length <= SEQ_LENGTH]

    settings = DataSettings(train=[{"path": str(path)}], seq_length=SEQ_LENGTH, workers=WORKERS, shuffle=False)
    loader = build_loader(settings, Renderer(folder, settings), "pretrain", dp_rank=0, dp_size=1, seed=0)
    filled, samples = [], 0
    while samples < len(fitting) - 2 * WORKERS * settings.packing_buffer:  # before any sample is repeated
        row = next(loader)
        filled.append(row.num_tokens)
        samples += row.num_samples
        assert all(fault.kind == "too long" for fault in row.faults), row.faults
    loader.close()
    total = sum(fitting)
    quantiles = np.quantile(fitting, (0.1, 0.5, 0.9, 0.99)).astype(int).tolist()
    per_row = {
        "best_fit": sum(filled) / len(filled),
        **{
            name: total / sum(open_rows([n for n in lengths[worker::WORKERS] if n <= SEQ_LENGTH], most_open)
                              for worker in range(WORKERS))
            for name, most_open in (("next_fit", 1), ("first_fit_16_open", 16))
        },
        "none": total / len(fitting),
    }  # fmt: skip
    return {
        "samples": len(lengths), "too_long": len(lengths) - len(fitting), "length_quantiles_10_50_90_99": quantiles,
        "rows": len(filled), "tokens_per_row": per_row,
        "share_of_row": {name: tokens / SEQ_LENGTH for name, tokens in per_row.items()},
    }  # fmt: skip


def report(result: dict) -> bool:
    """Prints the results and returns whether they meet the requirements."""
    console, verdicts = Console(), {}
    if rates := result.get("throughput"):
        table = Table("samples per second, two workers", "median", "min to max", "of the bare loop (torchvision)")
        labels = {"torchvision": "bare loop, torchvision's decoder", "PIL": "bare loop, PIL's decoder",
                  "full": "megavlm, packing buffer full", "from_first": "megavlm, from the first row on"}  # fmt: skip
        for name, label in labels.items():
            values, share = rates["samples_per_second"][name], rates["share_of_bare_torchvision"].get(name)
            spread = f"{min(values):.1f} to {max(values):.1f}"
            table.add_row(label, f"{rates['medians'][name]:.1f}", spread, f"{share:.2f}" if share else "")
        console.print(table)
        share = rates["share_of_bare_torchvision"]["full"]
        verdicts[f"throughput at least {MIN_RATIO} of the bare loop"] = share >= MIN_RATIO
    if starts := result.get("start_and_memory"):
        table = Table(
            "lines", "first row, s", "with imports, s", f"own memory of a worker after {MEMORY_ROWS} rows, MiB"
        )
        for count, of in starts.items():
            low, high = of["worker_mib_range"]
            memory = f"{of['worker_mib']:.0f} ({low:.0f} to {high:.0f})"
            table.add_row(count, f"{of['first_row_seconds']:.1f}", f"{of['with_imports_seconds']:.1f}", memory)
        console.print(table)
        slowest = starts["100000"]["first_row_seconds"]
        verdicts[f"first row of 100,000 lines within {MAX_START:.0f} s"] = slowest <= MAX_START
    if packed := result.get("packing"):
        table = Table(f"rows of {SEQ_LENGTH}", "useful tokens per row", "share")
        for name, tokens in packed["tokens_per_row"].items():
            table.add_row(name.replace("_", " "), f"{tokens:.0f}", f"{packed['share_of_row'][name]:.1%}")
        console.print(table)
        print(f"{packed['samples']} samples, {packed['too_long']} longer than a row; tokens at 10, 50, 90 and 99 %: "
              f"{packed['length_quantiles_10_50_90_99']}")  # fmt: skip
    for what, is_so in verdicts.items():
        print(f"{what}: {is_so}")
    return all(verdicts.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", help="working folder (default: the system's temporary folder)")
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--runs", type=int, default=3, help="number of repetitions of each measurement (default: 3)")
    parser.add_argument(
        "--only", choices=("throughput", "start_and_memory", "packing"), help="run only this measurement"
    )
    parser.add_argument("--started", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.started:
        folder, file, rows = args.started
        print(json.dumps(started(folder, file, int(rows))))
        return 0
    root = Path(tempfile.mkdtemp(prefix="megavlm-data-", dir=args.dir))
    result, load = {}, os.getloadavg()[0]
    try:
        folder = make_model_folder(root / "model", max_pixels=2048 * 2048)
        names = make_pictures(root)
        if args.only in (None, "throughput"):
            result["throughput"] = throughput(folder, root, names, args.runs)
        if args.only in (None, "start_and_memory"):
            result["start_and_memory"] = start_and_memory(folder, root, names, args.runs)
        if args.only in (None, "packing"):
            result["packing"] = packing(root)
    finally:
        shutil.rmtree(root)
    good = report(result)
    if args.json:
        machine = {
            "cores": len(os.sched_getaffinity(0)),
            "load_before": load,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "torchvision", "transformers", "pillow")},
        }
        Path(args.json).write_text(json.dumps({"machine": machine, "runs": args.runs} | result, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
