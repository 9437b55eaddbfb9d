"""Planned memory against an H100's: what `benchmarks/gpu_check` measured there, in its file under docs/benchmarks."""

from pathlib import Path

import pytest
from test_dry_run import alone

# The largest number of bytes that torch had allocated in steps of eight rows, GiB; visual tokens of all; vision.window
MEASURED = {
    "text": (54.796, 0.0, None),
    "pictures and text": (64.361, 0.0943, None),
    "many pictures": (67.294, 0.4940, 1),
}


def planned(root: str) -> dict[str, tuple[float, float]]:
    """By kind of rows: GiB at the fullest moment, and the share of visual tokens."""
    from benchmarks.gpu_check.speed import GPU, counts_of, samples_of, settings_for
    from megavlm.convert.hf_shapes import model_shapes
    from megavlm.plan.mix import Mix
    from megavlm.plan.stage import Layout, stage_of

    found = {}
    with alone():
        folder, renderer, samples, _ = samples_of(Path(root), GPU)
        for what, (_, _, window) in MEASURED.items():
            settings = settings_for(
                folder, GPU.seq_length, GPU.rows, "te", precision="bf16", vision={"window": window}, recompute="none"
            )
            rows, shapes = [renderer.pack([sample]) for sample in samples[what]], model_shapes(settings.model)
            counts = counts_of(rows)
            layout = Layout(settings, shapes, "sft", 1, Mix.of(settings, shapes), GPU.rows, 1.0)
            layout.__dict__["row"] = layout.__dict__["mean_row"] = max(rows, key=lambda row: sum(row.frame_lengths))
            share = counts["patches"] / shapes.vision.spatial_merge_size**2 / counts["tokens"]
            found[what] = sum(part.total for part in stage_of(layout, 0).fullest(0, 1)) / 2**30, share
    return found


def test_an_h100_needed_what_is_planned(tmp_path, world1):
    (found,) = world1.run(planned, str(tmp_path))
    print(found)
    for what, (measured, share, _) in MEASURED.items():
        assert found[what][1] == pytest.approx(share, abs=1e-4), f"{what}: these are not the rows that were measured"
        # All rows are planned as the one with most patches. The workspaces of kernels are not counted.
        assert found[what][0] == pytest.approx(measured, rel=0.01), what
