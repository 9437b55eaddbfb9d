"""metrics.jsonl: one JSON line per reported training step, and one for each step that was skipped.

Fields that every line has (`REQUIRED`); a trainer may add its own, such as `moe_aux_loss`:

    step                optimizer steps done, from 1
    loss                the step's loss, averaged over the global count of targets
    lr                  learning rate that the step used
    grad_norm           norm of the whole gradient before clipping
    grad_norm/PART      the same of one part: vision, projector, language; 0.0 where the part is frozen
    tokens              useful tokens of the step over all ranks: padding is left out
    target_tokens       those of them that are predicted
    images              pictures in them
    packing             useful share of the rows, 0 to 1
    seconds             wall-clock time of the step
    tokens_per_second   tokens / seconds, over all ranks
    model_tflops        model TFLOP/s of one device: what the mathematics needs, without recomputation and padding
    mfu                 model_tflops over the device's bf16 peak, 0 to 1; null where the peak is not known (CPU)
    memory_gib          peak memory of rank 0's process: allocated on a GPU, resident on a CPU

Those that the training loop adds:

    skipped             1: the loss or a gradient was not finite and the step changed nothing; otherwise 0
    videos, samples     in the rows, over all ranks
    frames              of pictures and videos in the rows, and frames_encoded: how often the tower encoded one
    seconds_data        longest wait of a data rank for its rows
    seconds_tower       time in which a rank encodes its frames and walks back through them, mean over ranks;
                        waiting for other ranks is left out
    seconds_tower_max   the same of the slowest rank
    tower_imbalance     seconds_tower_max / seconds_tower, from 1; null where no rank took any time
    slowest_rank        rank with the most of both together: its own waiting for rows and its own time in the tower
    loss/NAME           with several sources of data: the loss of one of them over its own targets; null without any
    lr/PART             with train.lr_scale or train.unfreeze_after: the learning rate of a part, 0.0 while it is frozen
    samples/NAME        and target_tokens/NAME: how many of the step's came from it
    bad_samples         samples that could not be read, found so far in this run (each once), and dropped_samples: sound
                        ones that fit no row; data_errors.jsonl names them
    seconds_checkpoint  time that rank 0 has waited for checkpoints since the line before; not part of seconds

A number that is not finite is written as null: NaN is not JSON.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavlm.base.atomic_files import write_text
from megavlm.base.errors import UserError

FILE_NAME = "metrics.jsonl"
PARTS = ("vision", "projector", "language")
REQUIRED = (
    "step",
    "loss",
    "lr",
    "grad_norm",
    *(f"grad_norm/{part}" for part in PARTS),
    "tokens",
    "target_tokens",
    "images",
    "packing",
    "seconds",
    "tokens_per_second",
    "model_tflops",
    "mfu",
    "memory_gib",
)


def throughput(
    tokens: int, row_tokens: int, seconds: float, model_flops: float, num_devices: int, peak_flops: float | None
) -> dict[str, float | None]:
    """The derived fields of a line.

    Args:
        tokens: useful tokens of the step over all ranks.
        row_tokens: places in its rows: global_batch_size × seq_length.
        seconds: wall-clock time of the step.
        model_flops: floating-point operations of the step over all ranks (`megavlm.model.flops.step_flops`).
        num_devices: ranks of the run.
        peak_flops: bf16 peak of one device in FLOP/s, None where unknown (`megavlm.model.flops.peak_flops`).

    Returns:
        packing, seconds, tokens_per_second, model_tflops and mfu.
    """
    flops_per_device = model_flops / seconds / num_devices
    return {
        "packing": tokens / row_tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "model_tflops": flops_per_device / 1e12,
        "mfu": flops_per_device / peak_flops if peak_flops else None,
    }


class MetricsWriter:
    """Appends to metrics.jsonl of an output folder; each line is flushed, so that a killed run loses none.

    Args:
        output_dir: the run's folder; it exists.
        resume_step: step that the run continues from. Lines of later steps are dropped (they will be written again),
            and so is a last line that a kill cut short. 0 starts the file anew.
        enabled: False on all ranks but 0, where every call does nothing.
    """

    def __init__(self, output_dir: str | Path, resume_step: int = 0, enabled: bool = True):
        self.path = Path(output_dir) / FILE_NAME
        self._file = None
        if not enabled:
            return
        drop_after(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one line. Values are plain numbers, None, or scalars with `.item()` (tensors, numpy).

        Raises UserError where the disk is full.
        """
        if self._file is None:
            return
        missing = [name for name in REQUIRED if name not in line]
        assert not missing, f"metrics of a step lack {', '.join(missing)}"
        text = json.dumps({name: _plain(value) for name, value in line.items()}, allow_nan=False)
        try:
            self._file.write(text + "\n")
            self._file.flush()
        except OSError as error:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                file.close()  # it tries to write again
            raise _disk_failure(self.path, error) from None

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl (or of the one in a folder), oldest first.

    A line that is not a JSON object with a step is left out: a kill can cut the last one short. A missing file has no
    lines.
    """
    path = Path(path)
    return read_lines(path / FILE_NAME if path.is_dir() else path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file in which each has a step; none where there is no such file."""
    if not path.exists():
        return []
    return [line for _, line in _parse(path.read_text(encoding="utf-8", errors="replace"))]


def append_lines(path: Path, lines: list[str]) -> None:
    """Appends to a file of lines. Raises UserError where the disk is full."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:
        raise _disk_failure(path, error) from None


def _disk_failure(path: Path, error: OSError) -> UserError:
    free = shutil.disk_usage(path.parent).free / 1e9
    return UserError(
        f"cannot write {path}: {error.strerror}; {free:.3g} GB are free there",
        "make room, then start the same command again: it continues from the newest checkpoint",
    )


def drop_after(path: Path, step: int) -> None:
    """Leaves in `path` only whole lines of steps up to `step`, in one atomic replacement, if there is such a file."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = "".join(raw + "\n" for raw, line in _parse(text) if line["step"] <= step)
    if kept != text:
        write_text(path, kept)


def _parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(raw line, parsed line) of each whole line."""
    lines = []
    for raw in text.split("\n"):
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append((raw, line))
    return lines


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
