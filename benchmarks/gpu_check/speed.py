"""Throughput of a 2B-shaped model on rows of 8,192 tokens: with pictures, with text alone, and in transformers."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.measure import Measure, Recorder
from benchmarks.gpu_check.models import Size, document, hf_inputs, hf_loss, save_pictures, shaped_folder
from benchmarks.gpu_check.training import (
    PICTURES,
    has_transformer_engine,
    make_step,
    report_throughput,
    seconds_of,
    settings_for,
    start_anew,
)

MANY = "many pictures"
# The share of visual tokens. The operations of the tower alone take 5 % of the tokens per second at a tenth, and 21 %
# at a half, where a bound of 0.9 would say nothing about the implementation.
SHARES = {"text": 0.0, PICTURES: 0.1, MANY: 0.5}
# Rows whose pictures are encoded together: as many as usual, or one where their activations would need the memory.
WINDOWS: dict[tuple[str, ...], int | None] = {("text", PICTURES): None, (MANY,): 1}
RECOMPUTE: tuple[Any, ...] = ("none", ["mlp"], "full")  # the first that fits
GPU = Size(rows=8, seq_length=8192, repeats=3, warm_up=1, text={}, vision={})
CPU = Size(
    rows=1, seq_length=512, repeats=1, longest=64, warm_up=0,
    text={"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2,
          "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 512},
    vision={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "deepstack_visual_indexes": [0]},
)  # fmt: skip
ATTENTION = ("flash_attention_3", "flash_attention_2", "sdpa")  # transformers' own names, fastest first
WHAT = "2B shape, random weights"


def samples_of(root: Path, size: Size) -> tuple[Path, Any, dict[str, list[Any]], str]:
    """The model's folder, its renderer, one document for each row with pictures and without, and what pictures."""
    from megavlm.data.renderer import Renderer

    folder = shaped_folder(root / "model", size, like="2b")
    pictures = save_pictures(root / "pictures", size)
    renderer = Renderer(folder, settings_for(folder, size.seq_length, size.rows, "portable").data)
    samples = {
        what: [document(renderer, root / "pictures", size.seq_length, share, n) for n in range(size.rows)]
        for what, share in SHARES.items()
    }
    return folder, renderer, samples, pictures


def megavlm(record: Recorder, *, cpu: bool) -> None:
    """Steps of megavlm: forward, backward and update, all parts trained."""
    size, kernels = CPU if cpu else GPU, "te" if has_transformer_engine() else "portable"
    with tempfile.TemporaryDirectory(prefix="megavlm-gpu-check-") as temporary:
        folder, renderer, samples, pictures = samples_of(Path(temporary), size)
        rows = {what: [renderer.pack([sample]) for sample in those] for what, those in samples.items()}
        record.settings({"model": WHAT, "pictures": pictures, "rows": size.rows, "seq_length": size.seq_length})
        record.settings({"kernels": kernels})
        found = Found({}, {})
        for names, window in WINDOWS.items():
            settings_of = lambda recompute, window=window: settings_for(
                folder, size.seq_length, size.rows, kernels, precision="bf16", recompute=recompute,
                vision={"window": window},
            )  # fmt: skip
            _steps_that_fit(record, settings_of, {name: rows[name] for name in names}, size, found)
        for what in (PICTURES, MANY):
            note = f"the operations alone allow {found.work['text'] / found.work[what]:.3f}"
            ratio, least = found.speed[what] / found.speed["text"], 0.9 if what == PICTURES else None
            record(Measure(f"tokens/s, {what} / text alone", ratio, least=least, note=note))


@dataclass
class Found:
    """What was measured of each kind of rows: tokens per second, and operations per token."""

    speed: dict[str, float]
    work: dict[str, float]


def _steps_that_fit(
    record: Recorder, settings_of: Callable[[Any], Any], rows: dict[str, list[Any]], size: Size, found: Found
) -> None:
    """The steps with as little recomputation as the memory allows."""
    from megavlm.training.memory_check import is_out_of_memory

    for recompute in RECOMPUTE:
        record.settings({f"recompute, {' and '.join(rows)}": recompute})
        start_anew()
        try:
            return _steps(record, settings_of(recompute), rows, size, found)
        except (MemoryError, RuntimeError) as error:
            if recompute == RECOMPUTE[-1] or not is_out_of_memory(error):
                raise


def _steps(record: Recorder, settings: Any, rows: dict[str, list[Any]], size: Size, found: Found) -> None:
    from megavlm import platform
    from megavlm.runtime.feed import Feed

    step, phases = make_step(settings, next(iter(rows.values())), phases=True)
    for what, those in rows.items():
        step.feed = Feed(step.vlm, iter(those * (size.warm_up + size.repeats + 4)))
        platform.reset_memory()
        counts = step().counts
        seconds = seconds_of(step, size)
        gib = platform.memory_gib()
        found.work[what] = report_throughput(record, what, step.vlm.shapes, counts, seconds, gib)
        found.speed[what] = counts["tokens"] / seconds
        visual = counts["patches"] / step.vlm.shapes.vision.spatial_merge_size**2
        record.settings({f"visual share, {what}": visual / counts["tokens"]})
        for _ in range(3):  # the first one's end is still to come when the fields are read
            with phases.step():
                step()
            fields = phases.fields()
        record.settings({f"seconds of a step, {what}": {k.removeprefix("phase/"): v for k, v in fields.items()}})


def transformers(record: Recorder, *, cpu: bool) -> None:
    """The same rows in transformers, with the fastest attention that is installed, in pure bf16 with fused AdamW.

    Weights, gradients and Adam's state in bf16 are less work and memory than megavlm's, which keeps float32 masters: a
    comparison in transformers' favour. Each row is one document, so that it needs no mask.
    """
    import torch
    import transformers as library

    from megavlm import platform
    from megavlm.model.shapes import Shapes

    size, where = CPU if cpu else GPU, platform.device()
    with tempfile.TemporaryDirectory(prefix="megavlm-gpu-check-") as temporary:
        folder, renderer, samples, pictures = samples_of(Path(temporary), size)
        config = library.AutoConfig.from_pretrained(folder)
        counts = counts_of([renderer.pack([sample]) for sample in samples[PICTURES]])
        rows = [(hf_inputs(s, where), s.labels.to(where)) for s in samples[PICTURES]]
        record.settings({"pictures": pictures, "rows": size.rows, "seq_length": size.seq_length})
        best, tried = None, {}
        for attention in ATTENTION:
            for checkpointing in (False, True):
                name = attention + ", gradient checkpointing" * checkpointing
                try:
                    seconds, gib = _hf_seconds(library, config, attention, checkpointing, rows, size)
                except Exception as error:  # not installed, or out of memory: the next one may work
                    tried[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
                    memory = "memory" in str(error)
                else:
                    tried[name], memory = seconds, False
                    if best is None or seconds < best[1]:
                        best = name, seconds, gib
                start_anew()
                if not memory:
                    break
        record.settings({"seconds of a step by attention": tried})
        assert best is not None, f"no attention of transformers runs here: {tried}"
        record.settings({"attention": best[0], "torch": torch.__version__})
        report_throughput(record, f"transformers, {best[0]}", Shapes.from_hf(folder), counts, *best[1:])


def _hf_seconds(
    library: Any, config: Any, attention: str, checkpointing: bool, rows: list[Any], size: Size
) -> tuple[float, float]:
    """Seconds of a step, and its peak memory in GiB."""
    import torch

    from megavlm import platform

    platform.reset_memory()
    with torch.device(platform.device()):
        model = library.AutoModelForImageTextToText.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        ).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    count = float(sum((labels >= 0).sum().item() for _, labels in rows))

    def step() -> None:
        for inputs, labels in rows:
            hf_loss(model, inputs, labels, count)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return seconds_of(step, size), platform.memory_gib()


def counts_of(rows: list[Any]) -> dict[str, float]:
    """The counts of rows that their FLOPs follow from (``megavlm.model.flops.Work``)."""
    return {
        "tokens": sum(row.num_tokens for row in rows),
        "row_tokens": sum(len(row.input_ids) for row in rows),
        "target_tokens": sum(row.num_targets for row in rows),
        "segment_squares": sum(float(n) ** 2 for row in rows for n in row.segment_lengths[: row.num_samples]),
        "patches": sum(n for row in rows for n in row.frame_lengths),
        "frame_squares": sum(float(n) ** 2 for row in rows for n in row.frame_lengths),
    }
