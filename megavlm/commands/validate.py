"""`megavlm validate`: shows what a configuration would do, or what is wrong with it. It starts no processes.

It builds a model only with ``--dry-run``, and then without allocating its memory (``megavlm.plan.dry_run``).
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megavlm.base.number_format import short
from megavlm.checkpoint.load_weights import shapes_at_start, start_words
from megavlm.config.requirements import check_files, check_stage
from megavlm.config.settings import Settings
from megavlm.convert.hf_shapes import model_shapes
from megavlm.convert.peft_names import targeted, tensor_shapes
from megavlm.data.answer_groups import draft_unit, likely_kind
from megavlm.data.renderer import Renderer
from megavlm.data.row import IGNORE
from megavlm.data.sources import Source, open_sources
from megavlm.model.flops import active_decoder_weights
from megavlm.model.shapes import Shapes
from megavlm.records.records import Kind
from megavlm.records.remarks import told
from megavlm.records.skipped_samples import SkippedSample
from megavlm.runtime.adapter_start import with_stored_adapter
from megavlm.runtime.session import check_shapes

if TYPE_CHECKING:
    from megavlm.plan.dry_run import Held

FIRST_SAMPLES = 8  # number of samples of each source that are rendered


def main(settings: Settings, world_size: int | None = None, no_files: bool = False, dry_run: str | None = None) -> int:
    """Checks a configuration and prints a table of what it would do.

    Args:
        settings: the settings of the configuration.
        world_size: the number of processes for which the configuration is intended; default: the smallest number that
            its layout allows.
        no_files: check only settings, shapes and layout; checkpoints and data may be missing.
        dry_run: the verb for which the model and the optimizer of some ranks are built.

    Raises:
        UserError: the configuration is invalid, or files are missing; one message lists all missing files.
    """
    if not no_files:
        check_files(settings, ("model.hf", "model.load", "model.adapter", "data.train", "data.eval"))
    shapes = model_shapes(settings.model) if no_files else shapes_at_start(settings.model)
    if not no_files:
        settings = with_stored_adapter(settings, shapes)
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
    if dry_run:
        from megavlm.plan import dry_run as dry  # imported here because Megatron takes seconds to import

        for held in dry.dry_run(settings, dry_run, world_size):
            for thing in _summary(held):
                console.print(thing, soft_wrap=isinstance(thing, str))
    if no_files:
        console.print("[dim]settings, shapes and layout are valid; files were not checked[/]")
        return 0
    if settings.data.train:
        renderer = Renderer(settings.model.hf, settings.data, settings.pad_multiple)
        for source in open_sources(settings.data):
            console.print(_first_samples(source, renderer, "tune" if settings.stage is None else "pretrain"))
    console.print("[green]ready[/]")
    return 0


def _facts(settings: Settings, shapes: Shapes, world_size: int, data_parallel: int) -> list[tuple[str, str]]:
    train, data, parallel = settings.train, settings.data, settings.parallel
    text, vision = shapes.text, shapes.vision
    sizes = [(name, getattr(parallel, name)) for name in ("tensor", "pipeline", "context", "expert", "expert_tensor")]
    layout = (
        " × ".join(f"{name.replace('_', ' ')} {size}" for name, size in sizes if size > 1) or "no model parallelism"
    )
    until = {part: f" (for {after:,} steps)" for part, after in train.unfreeze_after.items()}
    active = short(active_decoder_weights(text))
    levels = ", ".join(map(str, vision.deepstack_layers))
    facts = [
        ("model", f"{settings.model.hf} · {shapes.model_type} · {active} decoder weights active per token"),
        ("decoder", f"{text.layers} layers of {text.hidden}, {text.heads} heads over {text.kv_heads} key/value heads"),
        ("tower", f"{vision.layers} layers of {vision.hidden}, deepstack after layers {levels}"),
        ("frozen", ", ".join(p + until.get(p, "") for p in settings.model.freeze) or "nothing"),
        ("layout", f"{world_size} processes: {layout} · data {data_parallel}"),
        ("start", start_words(settings.model)),
    ]
    if settings.adapter.type or settings.model.adapter:
        facts.append(("adapter", _adapter(settings, shapes)))
    if train.global_batch_size and train.steps:
        tokens = train.global_batch_size * data.seq_length
        rows = f"{train.global_batch_size} rows × {data.seq_length:,} tokens = {short(tokens)} tokens"
        schedule = "no lr" if train.lr is None else f"lr {train.lr:g} → {train.min_lr:g} ({train.schedule})"
        facts += [
            ("step", f"{rows}, {train.global_batch_size // data_parallel} rows per data-parallel rank"),
            ("run", f"{train.steps:,} steps = {short(tokens * train.steps)} tokens, {schedule}"),
        ]
    if settings.output is not None:
        facts.append(("output", str(settings.output)))
    return facts


def _adapter(settings: Settings, shapes: Shapes) -> str:
    adapter, start = settings.adapter, settings.model.adapter
    if adapter.type is None:  # the stored adapter defines its type, but it was not read
        return f"from {start}"
    linears = targeted(adapter, shapes).values()
    count = sum(math.prod(shape) for linear in linears for shape in tensor_shapes(adapter, linear).values())
    base = f", base weights of the decoder's linear layers in {adapter.quantize}" if adapter.quantize else ""
    return f"{adapter.type} on {len(linears)} linear layers: {short(count)} weights, from {start or 'new values'}{base}"


def _summary(held: "Held") -> Iterator[Table | str]:
    """The number of parameters and bytes on a rank."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in (f"rank {held.rank}", "parameters", "trainable"):
        table.add_column(name, justify="left" if name.startswith("rank") else "right")
    for part, count in held.parameters.items():
        table.add_row(part, f"{count:,}", f"{held.learning[part]:,}")
    yield table
    sizes = {"weights": held.weights, "gradients": held.gradients, "optimizer": held.optimizer}
    listed = " + ".join(f"{name} {size / 2**30:.2f}" for name, size in sizes.items())
    yield f"GiB: {listed} = {sum(sizes.values()) / 2**30:.2f}, without activations"
    if held.reached is None:
        yield (
            "[dim]no forward pass: the number of tokens of an expert depends on the values of the weights, which a dry "
            "run does not have[/]"
        )
    elif held.reached == held.learning:
        yield "[dim]forward and backward pass of one row: gradients reached all trainable parameters[/]"
    else:
        left = {part: count - held.reached[part] for part, count in held.learning.items()}
        yield f"[yellow]forward and backward pass of one row: trainable parameters without a gradient: {left}[/]"


def _first_samples(source: Source, renderer: Renderer, kind: Kind) -> str:
    """One line about the first samples of a source, which are rendered completely."""
    kind = likely_kind(source.file, kind)
    count = min(FIRST_SAMPLES, len(source.file))
    samples, skipped_samples = [], []
    remarks: Counter[str] = Counter()
    for index in range(count):
        name = source.file.source(index)
        try:
            draft = draft_unit(renderer, source.file, index, kind)
            remarks.update(draft.remarks)
            samples.append(renderer.complete(draft))
            samples += [renderer.complete(other) for other in draft.followers]
        except MemoryError:
            raise
        except Exception as error:  # as in a data worker: whatever a file contains, an error in it costs one sample
            skipped_samples.append(SkippedSample.of(0, name, error))
    share, total = f"{source.share:.1%} of the blend", f"{len(source.file):,} samples"
    summary = f"[bold]{escape(source.name)}[/] ({share}, {total}), {count} inspected:"
    if skipped_samples:
        first = skipped_samples[0]
        summary += f" {len(skipped_samples)} cannot be used ({escape(f'{first.sample}: {first.cause}')});"
    if not samples:
        return summary.rstrip(";")
    tokens = [len(sample.input_ids) for sample in samples]
    visual = sum(len(sample.visual_positions) for sample in samples)
    targets = sum(int((sample.labels != IGNORE).sum()) for sample in samples)
    of_pairs = " answers" if kind in ("pair", "judged") else ""
    return (
        f"{summary} {len(samples)}{of_pairs or ' usable'} have {min(tokens)} to {max(tokens)} tokens, "
        f"{visual / sum(tokens):.0%} visual, {targets / sum(tokens):.0%} targets, "
        f"{sum(s.num_images for s in samples)} pictures, {sum(s.num_videos for s in samples)} videos"
        + "".join(f"; {sentence}" for sentence in told(remarks))
    )
