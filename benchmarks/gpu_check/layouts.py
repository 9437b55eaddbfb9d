"""The layout table on two devices: a training step of each layout against transformers in float32 on one."""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.measure import Measure, Recorder, read_records
from benchmarks.gpu_check.models import Size, save_pictures
from benchmarks.gpu_check.parity import (
    LOSS,
    NORM,
    PARTS,
    Result,
    has_transformer_engine,
    model_with_weights,
    of_transformers,
    packed,
    settings_for,
)
from benchmarks.gpu_check.training import make_step

# name: (mixture of experts, layout)
LAYOUTS: dict[str, tuple[bool, dict[str, int]]] = {
    "DP2": (False, {}),
    "TP2": (False, {"tensor": 2}),
    "PP2": (False, {"pipeline": 2}),
    "CP2": (False, {"context": 2}),
    "EP2": (True, {"expert": 2}),
}
SIZE = Size(rows=2, seq_length=256, repeats=1, text={}, vision={}, longest=96)
# Two devices add gradients in another order than one, which the bounds of one device do not allow for in float32. In
# bf16 some tokens choose another expert than in float32, which changes their whole path.
BOUND = {"fp32": (1e-5, 1e-3), "bf16": (LOSS["bf16"], NORM["bf16"])}
CHOICE = 5.0  # factor of the bounds of a mixture of experts in bf16


def layouts(record: Recorder, *, cpu: bool) -> None:
    """Each layout with each kernel set. One that fails costs only its own result."""
    import torch

    from benchmarks.ranks import run_ranks

    kinds = [("portable", "fp32"), *([("te", "bf16")] if has_transformer_engine() else [])]
    with tempfile.TemporaryDirectory(prefix="megavlm-gpu-check-") as temporary:
        root = Path(temporary)
        save_pictures(root, SIZE)
        folders = {moe: model_with_weights(root, SIZE, moe=moe) for moe in (False, True)}
        references = {}
        for moe, folder in folders.items():
            references[moe] = reference(folder, root)
        record.settings({"backend": "gloo" if cpu else f"nccl {torch.cuda.nccl.version()}", "rows": SIZE.rows})
        pending, failures = [(name, *kind) for name in LAYOUTS for kind in kinds], []
        while pending:
            out = root / f"results-{len(pending)}.jsonl"
            try:
                run_ranks(2, train_layouts, folders, root, pending, references, out, gpus=not cpu)
                failed = False
            except Exception as error:
                failed = True
                text = (str(error).strip() or type(error).__name__).splitlines()[-1][:300]
            measures, known = read_records(out)
            for measure in measures:
                record(measure)
            done = len(known.get("done", ()))
            if failed:
                failures.append(f"{' '.join(pending[done])}: {text}")
                done += 1
            pending = pending[done:]
        if failures:
            raise RuntimeError("; ".join(failures))


def reference(folder: Path, root: Path) -> Result:
    """The step of transformers in float32 on the samples of all rows."""
    settings = settings_for(folder, SIZE.seq_length, SIZE.rows, "portable", precision="fp32")
    return of_transformers(folder, packed(folder, root, SIZE, settings)[0], "float32")


def train_layouts(
    folders: dict[bool, Path],
    root: Path,
    pending: list[tuple[str, str, str]],
    references: dict[bool, Result],
    out: Path,
) -> None:
    """On each of the ranks: one step in each layout; rank 0 writes what it finds."""
    import torch.distributed as dist

    from megavlm import platform

    record, done = Recorder(out), list[str]()
    for name, kernels, precision in pending:
        moe, parallel = LAYOUTS[name]
        settings = settings_for(
            folders[moe], SIZE.seq_length, SIZE.rows, kernels, precision=precision, optimizer="sgd", clip_grad=0.0,
            parallel=parallel, **({"moe_aux_loss_coeff": 0.0} if moe else {}),
        )  # fmt: skip
        result = _one_step(settings, folders[moe], root)
        reference = references[moe]
        if dist.get_rank() == 0:
            factor = CHOICE if moe and precision == "bf16" else 1.0
            most_loss, most_norm = (factor * bound for bound in BOUND[precision])
            worst = max(abs(result.norms[f"grad_norm/{part}"] / reference.norms[part] - 1) for part in PARTS)
            record(
                Measure(f"{name}, {kernels} {precision}: loss", abs(result.loss / reference.loss - 1), most=most_loss)
            )
            record(Measure(f"{name}, {kernels} {precision}: gradient norms", worst, most=most_norm))
            done.append(name)
            record.settings({"done": done})
        platform.shutdown()


def _one_step(settings: Any, folder: Path, root: Path) -> Any:
    rows = packed(folder, root, SIZE, settings)[1]
    return make_step(settings, rows, load=folder)[0]()
