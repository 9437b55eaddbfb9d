"""Bytes of optimizer state and training loss of GaLore, compared with Adam.

    python -m benchmarks.galore [--steps N] [--json FILE]

A decoder with 4 layers of width 1,024 (MLP 3,072, 32 heads, 8 key/value heads; 50 million weights) is trained in
float32 on one process, from the same random weights. The data are English prose (scikit-image's documentation), two
rows of 256 tokens per step, without repetition. The rank is 128, and the projection is updated once during the run.
GaLore's learning rate is that of Adam divided by GaLore's scale. float32 weights, gradients and activations are the
same for both and are not counted.
"""

import argparse
import inspect
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.ranks import versions

MAX_SHARE, RANK, SCALE, LR = 0.2, 128, 0.25, 3e-4
TEXT = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # fmt: skip


def make(root: Path, steps: int) -> tuple[Path, Path, list[dict]]:
    """Writes a model folder, its checkpoint, and two texts for each step."""
    import skimage.data
    import skimage.filters
    import skimage.measure
    import skimage.morphology
    import skimage.segmentation
    import skimage.transform

    from megavlm.convert import hf_to_mcore
    from megavlm.demo.model_folder import make_model_folder

    skimage_modules = (
        skimage.data, skimage.filters, skimage.measure, skimage.morphology, skimage.segmentation, skimage.transform,
    )  # fmt: skip
    names = [(module, name) for module in skimage_modules for name in module.__all__]
    texts = {inspect.getdoc(getattr(module, name)) or "" for module, name in names}
    texts = sorted(text[:400] for text in texts if len(text) >= 400)
    assert len(texts) >= 2 * steps, len(texts)
    folder = make_model_folder(root / "model", text=TEXT, corpus=texts)
    hf_to_mcore(folder, root / "mcore", progress=False)
    return folder, root / "mcore", [{"text": text} for text in texts[: 2 * steps]]


def train(folder: Path, checkpoint: Path, records: list[dict], groups, optimizer: dict) -> dict:
    """Trains a model and returns the bytes of optimizer state, the losses and the times in seconds."""
    from megavlm.checkpoint.load_weights import load_weights
    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.media.files import in_folder
    from megavlm.model.shapes import Shapes
    from megavlm.model.vlm import VLM
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.feed import Feed
    from megavlm.training.objective import CrossEntropy
    from megavlm.training.step import Step

    steps = len(records) // 2
    settings = Settings(
        model={"hf": folder, "freeze": ["vision", "projector"]}, data={"seq_length": 256, "too_long": "truncate"},
        train={
            "precision": "fp32", "schedule": "constant", "warmup_steps": 4, "steps": steps, "global_batch_size": 2,
            **optimizer,
        },
    )  # fmt: skip
    vlm = VLM(Shapes.from_hf(folder), settings, groups).train()
    load_weights(checkpoint, vlm)
    renderer = Renderer(folder, settings.data)
    rows = [
        renderer.pack([renderer.encode(record, in_folder(folder), f"text {i}", kind="pretrain", index=i)])
        for i, record in enumerate(records)
    ]
    optimizers = Optimizers(vlm, settings.train)
    step = Step(vlm, optimizers, Feed(vlm, iter(rows)), 2, CrossEntropy(["data"], 1024))
    seconds, losses = [], []
    for number in range(1, steps + 1):
        began = time.perf_counter()
        losses.append(step().loss)
        seconds.append(time.perf_counter() - began)
        print(f"{settings.train.optimizer} {number}/{steps}: loss {losses[-1]:.4f}, {seconds[-1]:.2f} s", flush=True)
    states = [s for part in optimizers.optimizer.chained_optimizers for s in part.optimizer.state.values()]
    return {
        "state_bytes": sum(tensor.nbytes for state in states for tensor in state.values() if tensor.ndim),
        "losses": [round(loss, 4) for loss in losses],
        "step_seconds": round(statistics.median(seconds), 3),
        "renewal_seconds": round(seconds[steps // 2] - statistics.median(seconds), 3),
    }


def measure(root: Path, steps: int) -> dict:
    from megavlm import platform
    from megavlm.config.settings import ParallelSettings

    groups, made = platform.init(ParallelSettings()), make(root, steps)
    projected = {"galore_rank": RANK, "galore_scale": SCALE, "galore_update_every": steps // 2}
    adam = train(*made, groups, {"lr": LR})
    galore = train(*made, groups, {"optimizer": "galore", "lr": LR / SCALE, **projected})
    del adam["renewal_seconds"]
    share = round(galore["state_bytes"] / adam["state_bytes"], 3)
    return {"shape": TEXT, "rank": RANK, "steps": steps, "adam": adam, "galore": galore, "share_of_state": share}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=24, help="number of steps with each optimizer (default: 24)")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megavlm-galore-") as root:
        result = measure(Path(root), args.steps)
    for name in ("adam", "galore"):
        run = result[name]
        last = statistics.mean(run["losses"][-4:])
        print(
            f"{name}: {run['state_bytes'] / 2**20:.0f} MiB of state, loss {run['losses'][0]:.3f} to {last:.3f} (mean "
            f"of the last four), {run['step_seconds']:.2f} s a step"
        )
    print(f"a new projection of all matrices takes {result['galore']['renewal_seconds']:.1f} s more")
    good = result["share_of_state"] <= MAX_SHARE
    print(f"state {result['share_of_state']:.3f} of Adam's; at most {MAX_SHARE}: {good}")
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": versions(), **result}, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
