"""FP8 beside bf16 at the shape of the 8B model's layers: forward and backward pass of four of them, text alone."""

import tempfile
from pathlib import Path

from benchmarks.gpu_check.measure import Measure, Recorder, Skipped
from benchmarks.gpu_check.models import Size, document, shaped_folder
from benchmarks.gpu_check.training import (
    has_transformer_engine,
    make_step,
    seconds_of,
    settings_for,
    start_anew,
)

TOY_VISION = {"depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "deepstack_visual_indexes": [0]}
# A small vocabulary, because the output layer is not computed in FP8 and would hide the layers.
GPU = Size(rows=4, seq_length=8192, repeats=6, text={"num_hidden_layers": 4, "vocab_size": 1024}, vision=TOY_VISION)
CPU = Size(
    rows=2, seq_length=128, repeats=1, warm_up=0,
    text={"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2,
          "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 512},
    vision=TOY_VISION,
)  # fmt: skip

FP8_RECIPES = ("blockwise", "tensorwise", "delayed")  # of Hopper GPUs, the default first
LEAST = 1.2  # for the default


def fp8(record: Recorder, *, cpu: bool) -> None:
    """Seconds of the gradients of a step in bf16 and in each FP8 recipe, one after the other, twice, on equal rows."""
    from megavlm.data.renderer import Renderer

    size, te = CPU if cpu else GPU, has_transformer_engine()
    with tempfile.TemporaryDirectory(prefix="megavlm-gpu-check-") as temporary:
        root = Path(temporary)
        folder = shaped_folder(root / "model", size, like="8b")
        record.settings({"layers": size.text["num_hidden_layers"], "rows": size.rows, "seq_length": size.seq_length})
        best: dict[str, float] = {}
        rows, recipes = [], FP8_RECIPES if te else ()
        for precision in ("bf16", *recipes, "bf16", *recipes):
            train = (
                {"precision": "fp8", "fp8": {"recipe": precision}} if precision in recipes else {"precision": "bf16"}
            )
            kernels = "te" if te else "portable"
            settings = settings_for(folder, size.seq_length, size.rows, kernels, optimizer="sgd", **train)
            if not rows:
                renderer = Renderer(folder, settings.data)
                rows = [renderer.pack([document(renderer, root, size.seq_length, 0, n)]) for n in range(size.rows)]
            step, _ = make_step(settings, rows)
            batch = step.rows(step.feed, size.rows)
            seconds = seconds_of(lambda step=step, batch=batch: step.gradients(batch.copy()), size)
            best[precision] = min(seconds, best.get(precision, seconds))
            del step, batch
            start_anew()
        for precision, seconds in best.items():
            tokens = sum(row.num_tokens for row in rows)
            record(Measure(f"{precision}: tokens per second", tokens / seconds, "tokens/s"))
        if not te:
            raise Skipped("FP8 needs Transformer Engine, which is not here; bf16 ran with the portable kernels")
        for recipe in recipes:
            least = LEAST if recipe == recipes[0] else None
            record(Measure(f"FP8 {recipe} / bf16, tokens per second", best["bf16"] / best[recipe], least=least))
