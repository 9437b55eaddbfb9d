"""`megavlm validate`: what a configuration would do, or what is wrong with it. Builds no model, starts no processes."""

import itertools
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megavlm.config.errors import UserError
from megavlm.config.requirements import check_stage
from megavlm.config.settings import Settings
from megavlm.model.shapes import Shapes
from megavlm.training.flops import active_decoder_weights
from megavlm.training.setup import check_shapes
from megavlm.training.units import short

FIRST_SAMPLES = 8  # rendered of each source


def main(settings: Settings, world_size: int | None = None, no_files: bool = False) -> int:
    """Prints a table of what would happen.

    Args:
        world_size: processes the configuration is meant for; the smallest that holds its layout where not given.
        no_files: look at settings, shapes and layout alone; checkpoints and data may be missing.
    Raises:
        UserError: what is wrong, all missing files in one message.
    """
    shapes = Shapes.from_hf(settings.model.hf)
    parallel = settings.parallel
    world_size = world_size or parallel.pipeline * max(
        parallel.tensor * parallel.context, parallel.expert * parallel.expert_tensor
    )
    data_parallel = check_shapes(settings, shapes, world_size)
    if settings.stage is not None:
        check_stage(settings)
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(settings, shapes, world_size, data_parallel):
        facts.add_row(name, value)
    console = Console(highlight=False)
    console.print(facts)
    if no_files:
        console.print("[dim]settings, shapes and layout fit; files were not looked at[/]")
        return 0
    _check_files(settings)
    for source in settings.data.train:
        console.print(_first_samples(settings, source.path))
    console.print("[green]ready[/]")
    return 0


def _facts(settings: Settings, shapes: Shapes, world_size: int, data_parallel: int) -> list[tuple[str, str]]:
    train, data, parallel = settings.train, settings.data, settings.parallel
    text, vision = shapes.text, shapes.vision
    sizes = [(name, getattr(parallel, name)) for name in ("tensor", "pipeline", "context", "expert", "expert_tensor")]
    layout = (
        " × ".join(f"{name.replace('_', ' ')} {size}" for name, size in sizes if size > 1) or "no model parallelism"
    )
    active = short(active_decoder_weights(text))
    levels = ", ".join(map(str, vision.deepstack_layers))
    facts = [
        ("model", f"{settings.model.hf} · {shapes.model_type} · {active} decoder weights active per token"),
        ("decoder", f"{text.layers} layers of {text.hidden}, {text.heads} heads over {text.kv_heads} key/value heads"),
        ("tower", f"{vision.layers} layers of {vision.hidden}, deepstack after layers {levels}"),
        ("frozen", ", ".join(settings.model.freeze) or "nothing"),
        ("layout", f"{world_size} processes: {layout} · data {data_parallel}"),
        ("start", str(settings.model.load or "random weights")),
    ]
    if train.global_batch_size and train.steps:
        tokens = train.global_batch_size * data.seq_length
        rows = f"{train.global_batch_size} rows × {data.seq_length:,} tokens = {short(tokens)} tokens"
        schedule = f"lr {train.lr:g} → {train.min_lr:g} ({train.schedule})"
        facts += [
            ("step", f"{rows}, {train.global_batch_size // data_parallel} rows per data rank"),
            ("run", f"{train.steps:,} steps = {short(tokens * train.steps)} tokens, {schedule}"),
        ]
    if settings.output is not None:
        facts.append(("output", str(settings.output)))
    return facts


def _check_files(settings: Settings) -> None:
    """Raises UserError that names every path that is not there."""
    paths = {"model.load": settings.model.load, "data.eval": settings.data.eval}
    paths |= {f"data.train[{i}].path": source.path for i, source in enumerate(settings.data.train)}
    missing = [f"{key}: {path}" for key, path in paths.items() if path is not None and not path.exists()]
    if missing:
        raise UserError(
            "these files do not exist:\n  " + "\n  ".join(missing),
            f"relative paths start from {Path.cwd()}; with --no-files only settings and layout are checked",
        )


def _first_samples(settings: Settings, path: Path) -> str:
    """One line on the first samples of a source, rendered for real."""
    from megavlm.data.jsonl import read_samples
    from megavlm.data.renderer import Renderer

    kind = "tune" if settings.stage is None else "pretrain"
    renderer = Renderer(settings.model.hf, settings.data, settings.align)
    samples = list(itertools.islice(read_samples(path, renderer, kind), FIRST_SAMPLES))
    tokens = [len(sample.input_ids) for sample in samples]
    visual = sum(len(sample.visual_positions) for sample in samples)
    targets = sum(int((sample.labels != -100).sum()) for sample in samples)
    return (
        f"[bold]{path}[/]: first {len(samples)} samples have {min(tokens)} to {max(tokens)} tokens, "
        f"{visual / sum(tokens):.0%} visual, {targets / sum(tokens):.0%} targets, "
        f"{sum(s.num_images for s in samples)} pictures, {sum(s.num_videos for s in samples)} videos"
    )
