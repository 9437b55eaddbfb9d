"""Memory and time of the forward and backward pass of one very long row with CP2 on two processes.

``python -m benchmarks.long_row [--lengths 131072 262144] [--json FILE]``: the row is one document with real pictures of
about a megapixel. The toy model has 2 + 2 layers and the full vocabulary of 151,936 tokens. All text tokens are
targets. Memory is the sum of the largest resident memory of each process. Most of the time is spent in attention and
logits.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.ranks import run_ranks, versions

VOCABULARY = 151936
TEXT = {
    "vocab_size": VOCABULARY, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 128,
}  # fmt: skip
VISION = {"depth": 2, "deepstack_visual_indexes": [0, 1]}
PICTURES = ("astronaut", "chelsea", "coffee", "rocket")


def document(root: Path, tokens: int, pictures: int, renderer) -> dict:
    """A text of about ``tokens`` tokens with evenly spaced pictures."""
    from PIL import Image
    from skimage import data

    for name in PICTURES:
        Image.fromarray(getattr(data, name)()).convert("RGB").resize((1024, 960)).save(root / f"{name}.jpg")
    sentence = "The rocket stands on its pad, and everybody waits for the countdown to end. "
    each = len(renderer.tokenizer(sentence).input_ids)
    visual = pictures * (1024 // 32 * 960 // 32 + 2)
    sentences = sentence * ((tokens - visual - 64) // each // pictures)
    images = [f"{PICTURES[i % len(PICTURES)]}.jpg" for i in range(pictures)]
    return {"text": f"<image>{sentences}" * pictures, "images": images}


def measure(folder: Path, root: Path, length: int) -> dict:
    """Runs the forward and backward pass of one row. Runs on all ranks."""
    from megavlm import platform
    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.media.files import in_folder
    from megavlm.model.shapes import Shapes
    from megavlm.model.vlm import VLM
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.feed import Feed
    from megavlm.training.objective import CrossEntropy
    from megavlm.training.step import Step

    settings = Settings(
        model={"hf": folder}, data={"seq_length": length}, parallel={"context": 2},
        vision={"recompute": True, "chunk_patches": 4096},
        train={
            "precision": "bf16", "recompute": "full", "logprob_chunk_tokens": 512, "global_batch_size": 1, "lr": 1e-4,
            "steps": 1,
        },
    )  # fmt: skip
    groups = platform.init(settings.parallel, timeout_minutes=120)
    vlm = VLM(Shapes.from_hf(folder), settings, groups).train()
    rows = None
    if groups.is_leader:
        renderer = Renderer(folder, settings.data, settings.pad_multiple)
        record = document(root, length, length // 8192, renderer)
        rows = iter([renderer.pack([renderer.encode(record, in_folder(root), "document", kind="pretrain")])])
    step = Step(
        vlm,
        Optimizers(vlm, settings.train),
        Feed(vlm, rows),
        1,
        CrossEntropy(["data"], settings.train.logprob_chunk_tokens),
    )
    start = time.perf_counter()
    result = step()
    return {
        "seconds": time.perf_counter() - start,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "loss": result.loss,
        "tokens": int(result.counts["tokens"]),
        "pictures": int(result.counts["images"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072, 262144], help="lengths of the row in tokens")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    from megavlm.demo.model_folder import make_model_folder

    results = []
    with tempfile.TemporaryDirectory(prefix="megavlm-long-row-") as temporary:
        root = Path(temporary)
        folder = make_model_folder(root / "model", text=TEXT, vision=VISION, max_pixels=1024 * 1024)
        for length in args.lengths:
            ranks = run_ranks(2, measure, folder, root, length)
            results.append({**ranks[0], "gib": [rank["gib"] for rank in ranks], "length": length})
    table = Table("row", "tokens used", "pictures", "GiB of each rank", "GiB in all", "seconds", "loss")
    for r in results:
        each = " + ".join(f"{gib:.2f}" for gib in r["gib"])
        cells = (r["length"], r["tokens"], r["pictures"], each, f"{sum(r['gib']):.2f}", f"{r['seconds']:.0f}")
        table.add_row(*map(str, cells), f"{r['loss']:.3f}")
    Console().print(table)
    if args.json:
        Path(args.json).write_text(json.dumps({"versions": versions(), "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
