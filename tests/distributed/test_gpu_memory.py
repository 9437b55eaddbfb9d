"""Plans against an H100: what `benchmarks/gpu_check` measured there, in its file under docs/benchmarks."""

import json
from pathlib import Path

import pytest
from test_dry_run import alone

WINDOWS = {"text": None, "pictures and text": None, "many pictures": 1}
FILE = Path(__file__).parents[2] / "docs" / "benchmarks" / "gpu_check.json"


def planned(root: str) -> dict[str, dict[str, float]]:
    """By kind of rows: GiB at the fullest moment, seconds of a step, tokens of it, and the share of visual ones."""
    from benchmarks.gpu_check.speed import GPU, counts_of, samples_of, settings_for
    from megavlm.convert.hf_shapes import model_shapes
    from megavlm.plan.costs import costs_of
    from megavlm.plan.gpus import gpu_of
    from megavlm.plan.mix import Mix
    from megavlm.plan.predict import step_time
    from megavlm.plan.stage import Layout, stage_of

    found = {}
    with alone():
        folder, renderer, samples, _ = samples_of(Path(root), GPU)
        for what, window in WINDOWS.items():
            settings = settings_for(
                folder, GPU.seq_length, GPU.rows, "te", precision="bf16", vision={"window": window}, recompute="none"
            )
            rows, shapes = [renderer.pack([sample]) for sample in samples[what]], model_shapes(settings.model)
            rows.sort(key=lambda row: sum(row.frame_lengths))
            counts = counts_of(rows)
            layout = Layout(settings, shapes, "sft", 1, Mix.of(settings, shapes), GPU.rows, 1.0)
            layout.__dict__.update(row=rows[-1], mean_row=rows[len(rows) // 2])
            stage = stage_of(layout, 0)
            time = step_time([stage.operators], settings, GPU.rows, stage.window, costs_of(gpu_of("h100")))
            found[what] = {
                "gib": sum(part.total for part in stage.fullest(0, 1)) / 2**30,
                "seconds": time.seconds,
                "tokens": counts["tokens"],
                "visual": counts["patches"] / shapes.vision.spatial_merge_size**2 / counts["tokens"],
            }
    return found


def test_an_h100_needed_what_is_planned(tmp_path, world1):
    (found,) = world1.run(planned, str(tmp_path))
    check = json.loads(FILE.read_text())["checks"]["speed"]
    measures = {measure["name"]: measure["value"] for measure in check["measures"]}
    for what, plan in found.items():
        visual, peak = check["settings"][f"visual share, {what}"], measures[f"{what}: peak memory"]
        seconds = plan["tokens"] / measures[f"{what}: tokens per second"]
        print(f"{what}: {plan['gib']:.2f} planned, {peak:.2f} GiB; {plan['seconds']:.2f} predicted, {seconds:.2f} s")
        assert plan["visual"] == pytest.approx(visual, abs=1e-4), f"{what}: these are not the rows that were measured"
        # All rows are planned as the one with most patches. The workspaces of kernels are not counted.
        assert plan["gib"] == pytest.approx(peak, rel=0.01), what
        # As close as predictions for a CPU are held to be; the shares of the GPU's peaks are assumptions.
        assert plan["seconds"] == pytest.approx(seconds, rel=0.15), what
