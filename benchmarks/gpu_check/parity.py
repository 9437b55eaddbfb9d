"""Transformer Engine against the portable kernels against transformers: log-probabilities, loss and gradient norms.

The reference is transformers in float32 without TF32. A row has several documents, so packed attention is compared as
well; transformers sees them one by one.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.measure import Measure, Recorder
from benchmarks.gpu_check.models import Size, document, hf_inputs, hf_loss, part_of, save_pictures
from benchmarks.gpu_check.training import has_transformer_engine, make_step, settings_for, start_anew

GPU = Size(
    rows=2, seq_length=4096, repeats=1,
    text={"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 8,
          "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 8192,
          "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000, "mrope_section": [24, 20, 20],
                              "mrope_interleaved": True}},
    vision={"depth": 6, "hidden_size": 512, "intermediate_size": 2048, "num_heads": 8,
            "deepstack_visual_indexes": [1, 3, 5]},
)  # fmt: skip
CPU = Size(rows=1, seq_length=256, repeats=1, text={}, vision={}, longest=96)
LENGTHS = (1 / 2, 1 / 4, 1 / 8)  # of the documents in a row, as parts of it; the rest is padding
PARTS = ("vision", "projector", "language")

# Bounds. In float32 sums differ in their order: about 1e-6 of a value, some layers deep. In bf16 values are rounded to
# 8 bits in other places than transformers rounds them; so the errors against float32 are compared with transformers'
# own bf16 error, and may be half as large again. E4M3 keeps 4 bits where bf16 keeps 8: 16 times as coarse, and both
# factors of a product are rounded.
FP32_LOGPROB, BF16_RATIO, FP8_RATIO = 1e-3, 1.5, 32.0
LOSS = {"fp32": 1e-5, "bf16": 2e-3, "fp8": 1e-2}  # relative; the mean over thousands of targets averages most of it out
NORM = {"fp32": 1e-4, "bf16": 2e-2, "fp8": 1e-1}  # relative; gradients are not averaged before they are rounded


@dataclass
class Result:
    """What one implementation gives: log-probabilities of all targets, the loss, and gradient norms by part."""

    logprobs: Any
    loss: float
    norms: dict[str, float]

    def error(self, reference: "Result") -> float:
        """The root mean square of the differences of the log-probabilities, in nats."""
        return (self.logprobs - reference.logprobs).square().mean().sqrt().item()


def model_with_weights(root: Path, size: Size, *, moe: bool = False) -> Path:
    """A folder of a small model whose every weight matters."""
    from megavlm.demo.model_folder import make_model_folder

    return make_model_folder(
        root / ("moe" if moe else "dense"), text=size.text, vision=size.vision, moe=moe, norm_noise=0.1, seed=5,
        max_pixels=1024 * 1024,
    )  # fmt: skip


def packed(folder: Path, root: Path, size: Size, settings: Any) -> tuple[list[Any], list[Any]]:
    """The samples of all rows in order, and the packed rows."""
    from megavlm.data.renderer import Renderer

    renderer = Renderer(folder, settings.data, settings.pad_multiple)
    samples = [
        [document(renderer, root, int(size.seq_length * part), 0.4, 3 * row + n) for n, part in enumerate(LENGTHS)]
        for row in range(size.rows)
    ]
    return [sample for row in samples for sample in row], [renderer.pack(row) for row in samples]


def of_transformers(folder: Path, samples: list[Any], dtype: str) -> Result:
    """transformers' own model on the samples one by one."""
    import torch
    from transformers import AutoModelForImageTextToText

    from megavlm import platform

    where = platform.device()
    torch.backends.cudnn.allow_tf32 = False  # the patch embedding is a convolution there
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager" if dtype == "float32" else "sdpa"
    ).to(where)
    count, total, found = float(sum((s.labels >= 0).sum().item() for s in samples)), 0.0, []
    for sample in samples:
        loss, logprobs = hf_loss(model, hf_inputs(sample, where), sample.labels.to(where), count)
        loss.backward()
        total += loss.item()
        found.append(logprobs.float().cpu())
    squares = dict.fromkeys(PARTS, 0.0)
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            squares[part_of(name)] += weight.grad.double().square().sum().item()
    return Result(torch.cat(found), total, {part: square**0.5 for part, square in squares.items()})


def of_megavlm(folder: Path, rows: list[Any], settings: Any) -> Result:
    """megavlm on the packed rows, in one process."""
    import torch

    from megavlm.data.row import IGNORE
    from megavlm.runtime.forward import forward_only
    from megavlm.runtime.scoring import row_logprobs

    step, _ = make_step(settings, rows, load=folder)
    batch = step.rows(step.feed, len(rows))
    read = lambda chunk, hidden, m: row_logprobs(chunk, hidden, m, step.groups, 1024)
    found = []
    for window in step.feed.windows(batch.copy(), len(rows)):
        found += forward_only(step.vlm, window, read)
    logprobs = [values.float().cpu()[row.labels != IGNORE] for values, row in zip(found, rows, strict=True)]
    result = step.update(batch)
    norms = {part: result.norms[f"grad_norm/{part}"] for part in PARTS}
    return Result(torch.cat(logprobs), result.loss, norms)


def kernels_here() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The kernels, precisions and further settings that are compared."""
    yield "portable", "fp32", {}
    precisions = [("portable", "bf16"), *([("te", "bf16"), ("te", "fp8")] if has_transformer_engine() else [])]
    for kernels, precision in precisions:
        yield kernels, precision, {}
        yield kernels, precision, {"recompute": "full", "offload_activations": True}


def compare(record: Recorder, name: str, precision: str, found: Result, reference: Result, own: float) -> None:
    """Reports the differences from the float32 reference; ``own``: transformers' bf16 error."""
    error = found.error(reference)
    if precision == "fp32":
        record(Measure(f"{name}: log-probabilities, rms", error, "nats", most=FP32_LOGPROB))
    else:
        most, note = BF16_RATIO if precision == "bf16" else FP8_RATIO, f"rms {error:.2e} nats; transformers {own:.2e}"
        record(Measure(f"{name}: error / transformers' in bf16", error / own, most=most, note=note))
    record(Measure(f"{name}: loss, relative", abs(found.loss / reference.loss - 1), most=LOSS[precision]))
    worst = max(abs(found.norms[part] / reference.norms[part] - 1) for part in PARTS)
    record(Measure(f"{name}: gradient norms, relative", worst, most=NORM[precision]))


def parity(record: Recorder, *, cpu: bool) -> None:
    """All kernels and precisions on one device against transformers in float32."""
    size = CPU if cpu else GPU
    with tempfile.TemporaryDirectory(prefix="megavlm-gpu-check-") as temporary:
        root = Path(temporary)
        pictures, folder = save_pictures(root, size), model_with_weights(root, size)
        plain = {"optimizer": "sgd", "clip_grad": 0.0}
        of = lambda kernels, precision, **train: settings_for(
            folder, size.seq_length, size.rows, kernels, precision=precision, **plain, **train
        )
        samples, rows = packed(folder, root, size, of("portable", "fp32"))
        record.settings({"pictures": pictures, "text": size.text, "vision": size.vision, "targets": len(samples)})
        reference = of_transformers(folder, samples, "float32")
        own = of_transformers(folder, samples, "bfloat16").error(reference)
        record(Measure("transformers in bf16: log-probabilities, rms", own, "nats"))
        failures = []
        for kernels, precision, further in kernels_here():
            name = f"{kernels} {precision}{', inputs of layers on the host' if further else ''}"
            try:
                found = of_megavlm(folder, rows, of(kernels, precision, **further))
                compare(record, name, precision, found, reference, own)
            except Exception as error:  # the others are still worth knowing
                failures.append(f"{name}: {type(error).__name__}: {error}")
            start_anew()
        if failures:
            raise RuntimeError("; ".join(failures))
