"""`megavlm validate`: shows what a configuration would do, or what is wrong with it. It starts no processes.

It builds a model only with ``--dry-run``, and then without allocating its memory (``megavlm.plan.dry_run``).
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megavlm.align.registry import METHODS, make_method
from megavlm.align.sampling_checks import with_group_size
from megavlm.base.errors import UserError
from megavlm.base.number_format import counted, short, stepwise
from megavlm.checkpoint.load_weights import shapes_at_start, start_words
from megavlm.commands.found_run import found_in
from megavlm.commands.needed import check_files
from megavlm.commands.reward_fields import check_prompt_data
from megavlm.commands.usable_data import drafts_of, intended, refusal, renderer_of
from megavlm.config.requirements import required
from megavlm.config.schedule_section import value_at
from megavlm.config.settings import DataSettings, Settings, TrainSettings
from megavlm.convert.hf_shapes import model_shapes
from megavlm.convert.peft_names import targeted, tensor_shapes
from megavlm.data.draft import Draft
from megavlm.data.expected_steps import expected_steps
from megavlm.data.renderer import Renderer
from megavlm.data.row import IGNORE
from megavlm.data.rows import RowDataset
from megavlm.environments.worker_process import check_environment
from megavlm.inspection.data_stats import limit_text
from megavlm.layout.shapes import check_prompts
from megavlm.model.flops import active_decoder_weights
from megavlm.model.shapes import Shapes
from megavlm.optim.group_rules import described
from megavlm.records.remarks import told
from megavlm.records.skipped_samples import SkippedSample, causes
from megavlm.rewards.pool import check_rewards
from megavlm.runtime.adapter_start import with_stored_adapter
from megavlm.runtime.further_model import check_further_models
from megavlm.runtime.session import check_shapes
from megavlm.sources.blend import evenly, open_sources
from megavlm.training.pretraining_stage import check_stage

if TYPE_CHECKING:
    from megavlm.plan.dry_run import Held

FIRST_SAMPLES = 8  # number of samples of each source that are rendered
MORE_SAMPLES = 100  # number of samples of a source that are looked at if some of the first cannot be used


def main(
    settings: Settings,
    world_size: int | None = None,
    no_files: bool = False,
    dry_run: str | None = None,
    verb: str | None = None,
    gpu: str | None = None,
    change: Sequence[str] = (),
) -> int:
    """Checks a configuration and prints a table of what it would do.

    Args:
        settings: the settings of the configuration.
        world_size: the number of processes for which the configuration is intended; default: the smallest number that
            its layout allows.
        no_files: check only settings, shapes and layout; checkpoints and data may be missing.
        dry_run: the verb for which the model and the optimizer of some ranks are built.
        verb: the verb for which the configuration is intended; default: that of ``dry_run``, or a guess (see
            ``intended``).
        gpu: the GPU, a name that `megavlm plan` knows, for which a line says whether the layout fits.
        change: as for the verbs that train: settings with whose new values the run in ``output`` may go on.

    Raises:
        UserError: the configuration is invalid, the GPU is unknown, files are missing (one message lists all of them),
            or too many samples cannot be used.
    """
    if not no_files:
        check_files(
            settings,
            (
                *("model.hf", "model.load", "model.adapter", "align.critic.load"),
                *("data.train", "data.eval", "reward", "environment"),
            ),
        )
    shapes = model_shapes(settings.model) if no_files else shapes_at_start(settings.model)
    if not no_files:
        check_further_models(settings, shapes)
        settings = with_stored_adapter(settings, shapes)
    parallel = settings.parallel
    world_size = world_size or parallel.pipeline * max(
        parallel.tensor * parallel.context, parallel.expert * parallel.expert_tensor
    )
    data_parallel = check_shapes(settings, shapes, world_size)
    if settings.rollout.prompts is not None:
        check_prompts(settings.rollout.prompts, settings.align.mini_batches, data_parallel)
    if settings.stage is not None:
        check_stage(settings)
    if verb is not None:
        make_method(verb, settings)  # raises for settings that the verb would ignore
    start = found_in(settings, change)
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    shown = with_group_size(start.settings, verb or dry_run), shapes, world_size, data_parallel
    rows = _facts(*shown, score_head=(verb or dry_run) == "rm")
    if start.words:
        rows.append(("output", f"{settings.output} · {start.words}"))
    for name, value in rows:
        facts.add_row(name, value)
    console = Console(highlight=False)
    console.print(facts)
    if dry_run:
        from megavlm.plan import dry_run as dry  # imported here because Megatron takes seconds to import

        for held in dry.dry_run(settings, dry_run, world_size):
            for thing in _summary(held, settings if METHODS[dry_run].samples else None):
                console.print(thing, soft_wrap=isinstance(thing, str))
    if gpu is not None:
        console.print(_fit(settings, shapes, verb or dry_run, world_size, gpu), soft_wrap=True)
    if no_files:
        console.print("[dim]settings, shapes and layout are valid; files were not checked[/]")
        return 0
    check_rewards(settings.reward)
    check_rewards(settings.eval.answers.scorer)
    check_environment(settings.environment)
    if settings.data.train:
        _check_data(settings, verb or dry_run, console, data_parallel)
    console.print("[green]ready[/]")
    return 0


def _fit(settings: Settings, shapes: Shapes, verb: str | None, world_size: int, gpu: str) -> str:
    """Whether the layout fits the memory of its GPUs, and where to see more."""
    from megavlm.commands.plan_words import verb_of, verdict  # imported here because Megatron takes seconds to import
    from megavlm.plan.gpus import gpu_of
    from megavlm.plan.mix import contents_of
    from megavlm.plan.plan import make_plan

    verb = verb or verb_of(settings)
    plan = make_plan(settings, shapes, verb, world_size, gpu_of(gpu), mix=contents_of(settings, shapes, verb))
    more = f"megavlm plan CONFIG.yaml --gpus {world_size} --gpu {gpu}"
    return f"by the plan, it {verdict(plan, settings)} [dim]· more: {more}[/]"


def _check_data(settings: Settings, verb: str | None, console: Console, data_parallel: int) -> None:
    """Shows what the first samples of each source are like. Raises UserError if too many samples cannot be used."""
    sources = open_sources(settings.data)
    meant = intended(settings, sources, verb)
    console.print(f"data for {meant.told}", soft_wrap=True)
    renderer = renderer_of(settings, meant.kind)
    dataset = drafts_of(sources, renderer, meant.kind, settings, data_parallel * max(settings.data.workers, 1))
    refused = []
    if meant.kind == "prompt":
        for remark in check_prompt_data(settings, sources):
            console.print(remark, style="yellow", markup=False, soft_wrap=True)
    for number in range(len(sources)):
        line, skipped, error = _first_samples(dataset, number, renderer, meant.verb, settings.data.skip_limits)
        console.print(line, soft_wrap=True)
        if error is not None:
            refused.append(error)
        elif skipped:
            console.print("\n".join(causes(skipped)), style="yellow", markup=False, soft_wrap=True)
    if settings.train.epochs and meant.kind != "prompt" and not refused:
        console.print(_epochs(settings.train, dataset), soft_wrap=True)
    if refused:
        raise UserError("\n".join(error.message for error in refused), refused[0].remedy)


def _epochs(train: TrainSettings, dataset: RowDataset) -> str:
    """How many steps a run will have, and its learning rates."""
    from megavlm.plan.curve import curve  # imported here because Megatron takes seconds to import

    steps, is_exact = expected_steps(dataset)
    told = f"{train.epochs:g} epochs take {'' if is_exact else 'about '}{counted(steps, 'step')}"
    if train.lr is None:
        return told
    length = train.schedule_steps or steps
    return f"{told}, learning rate {curve(train.model_copy(update={'steps': steps, 'schedule_steps': length}))}"


def _facts(
    settings: Settings, shapes: Shapes, world_size: int, data_parallel: int, *, score_head: bool
) -> list[tuple[str, str]]:
    train, data, parallel = settings.train, settings.data, settings.parallel
    text, vision = shapes.text, shapes.vision
    sizes = [(name, getattr(parallel, name)) for name in ("tensor", "pipeline", "context", "expert", "expert_tensor")]
    layout = (
        " × ".join(f"{name.replace('_', ' ')} {size}" for name, size in sizes if size > 1) or "no model parallelism"
    )
    until = {part: f" (for {counted(after, 'step')})" for part, after in train.unfreeze_after.items()}
    active = short(active_decoder_weights(text))
    levels = ", ".join(map(str, vision.deepstack_layers))
    facts = [
        ("model", f"{settings.model.hf} · {shapes.model_type} · {active} decoder weights active per token"),
        ("decoder", f"{text.layers} layers of {text.hidden}, {text.heads} heads over {text.kv_heads} key/value heads"),
        ("tower", f"{vision.layers} layers of {vision.hidden}, deepstack after layers {levels}"),
        ("frozen", ", ".join(p + until.get(p, "") for p in settings.model.freeze) or "nothing"),
        ("layout", f"{counted(world_size, 'process', 'es')}: {layout} · data {data_parallel}"),
        ("start", start_words(settings.model)),
    ]
    if settings.adapter.type or settings.model.adapter:
        facts.append(("adapter", _adapter(settings, shapes)))
    if groups := described(settings, shapes, score_head=score_head):
        facts.append(("groups", "\n".join(groups)))
    schedule = "no lr" if train.lr is None else f"lr {train.lr:g} → {train.min_lr:g} ({train.schedule})"
    if (prompts := settings.rollout.prompts) and train.steps:
        group_size = required(settings.rollout.group_size, "rollout.group_size")  # see ``with_group_size``
        count = f"{counted(prompts, 'prompt')} × {counted(group_size, 'answer')} = {prompts * group_size:,} answers"
        share = f"{-(-prompts // data_parallel) * group_size:,} per data-parallel rank"
        facts += [
            ("step", f"{count} of at most {settings.answer_tokens:,} tokens, at most {share}"),
            ("run", f"{counted(train.steps, 'step')} = {counted(prompts * train.steps, 'prompt')}, {schedule}"),
        ]
    elif train.global_batch_size and (train.steps or train.epochs):
        tokens = train.global_batch_size * data.seq_length
        rows = f"{counted(train.global_batch_size, 'row')} × {data.seq_length:,} tokens = {short(tokens)} tokens"
        facts.append(
            ("step", f"{rows}, {counted(train.global_batch_size // data_parallel, 'row')} per data-parallel rank")
        )
        if train.batch_ramp:
            facts.append(("rows", stepwise(train.batch_ramp, train.global_batch_size)))
        if data.length_ramp:
            facts.append(("length", f"{stepwise(data.length_ramp, data.seq_length)} tokens in a row"))
        if train.steps:
            whole = _tokens_of_run(train, data)
            facts.append(("run", f"{counted(train.steps, 'step')} = {short(whole)} tokens, {schedule}"))
        else:
            facts.append(("run", f"{train.epochs:g} × the training data, {schedule}"))
    if train.lr is not None and train.steps:
        from megavlm.plan.curve import curve  # imported here because Megatron takes seconds to import

        facts.append(("learning rate", curve(train, idle_steps=settings.align.critic.alone_steps)))
    return facts


def _tokens_of_run(train: TrainSettings, data: DataSettings) -> int:
    """The number of tokens in all rows of a run, with padding."""
    ends = sorted({*train.batch_ramp, *data.length_ramp, train.steps or 0})
    parts = [(first, last) for first, last in pairwise([0, *ends]) if last <= (train.steps or 0)]
    return sum(
        (last - first) * (train.rows_of(last) or 0) * value_at(data.length_ramp, last, data.seq_length)
        for first, last in parts
    )


def _adapter(settings: Settings, shapes: Shapes) -> str:
    adapter, start = settings.adapter, settings.model.adapter
    if adapter.type is None:  # the stored adapter defines its type, but it was not read
        return f"from {start}"
    linears = targeted(adapter, shapes).values()
    count = sum(math.prod(shape) for linear in linears for shape in tensor_shapes(adapter, linear).values())
    base = f", base weights of the decoder's linear layers in {adapter.quantize}" if adapter.quantize else ""
    return f"{adapter.type} on {len(linears)} linear layers: {short(count)} weights, from {start or 'new values'}{base}"


def _summary(held: "Held", sampled: Settings | None) -> Iterator[Table | str]:
    """The number of parameters and bytes on a rank. ``sampled``: the settings if the verb samples answers."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    rank = f"rank {held.rank}" + (f", {held.model}" if held.model != "model" else "")
    for name in (rank, "parameters", "trainable"):
        table.add_column(name, justify="left" if name.startswith("rank") else "right")
    for part, count in held.parameters.items():
        table.add_row(part, f"{count:,}", f"{held.learning[part]:,}")
    yield table
    sizes = {"weights": held.weights, "gradients": held.gradients, "optimizer": held.optimizer}
    listed = " + ".join(f"{name} {size / 2**30:.2f}" for name, size in sizes.items())
    others = "activations"
    if sampled is not None:
        cache = f", {sampled.rollout.cache_gib:g} for keys and values (rollout.cache_gib)"
        others += f"{cache if sampled.rollout.engine == 'megatron' else ''}, and models that only judge"
    yield f"GiB: {listed} = {sum(sizes.values()) / 2**30:.2f}, without {others}"
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


def _first_samples(
    dataset: RowDataset, number: int, renderer: Renderer, verb: str, limits: dict[str, float]
) -> tuple[str, list[SkippedSample], UserError | None]:
    """Looks at the first samples of a source; if some of them cannot be used, at up to 100 all over the source.

    Returns:
        A line about the first samples, which are rendered completely, the skipped samples, and the error if too many
        cannot be used.
    """
    source = dataset.sources[number]
    count = min(FIRST_SAMPLES, len(source.file))
    samples, skipped_samples, drafted = [], [], []
    remarks: Counter[str] = Counter()
    for index in range(count):
        if (skipped := dataset.reread(number, index)) is not None:
            skipped_samples.append(skipped)
            continue
        draft = dataset.draft(number, index)
        assert isinstance(draft, Draft), "it has just been read"
        remarks.update(draft.remarks)
        drafted.append(draft.num_tokens)
        samples += [renderer.complete(one) for one in (draft, *draft.followers)]
    share, total = f"{source.share:.1%} of the blend", f"{len(source.file):,} samples"
    ended = limit_text(source.max_tokens, sum(drafted) / count * len(source.file))
    summary = f"[bold]{escape(source.name)}[/] ({', '.join(filter(None, [share, total, ended]))}), {count} inspected:"
    looked_at = count
    if skipped_samples:
        summary += f" {len(skipped_samples)} cannot be used;"
        further = [index for index in evenly(len(source.file), MORE_SAMPLES) if index >= count]
        looked_at += len(further)
        found = [dataset.draft(number, index) for index in further]
        skipped_samples += [draft for draft in found if isinstance(draft, SkippedSample)]
        if further:
            summary += f" of {looked_at} all over the source, {len(skipped_samples)};"
    refused = refusal(source.name, looked_at, skipped_samples, verb, limits)
    if not samples:
        return summary.rstrip(";"), skipped_samples, refused
    tokens = [len(sample.input_ids) for sample in samples]
    visual = sum(len(sample.visual_positions) for sample in samples)
    targets = sum(int((sample.labels != IGNORE).sum()) for sample in samples)
    named = {"pair": "answers", "judged": "answers", "prompt": "prompts"}.get(dataset.kind, "usable")
    share_of_targets = f" {targets / sum(tokens):.0%} targets," if dataset.kind != "prompt" else ""
    lengths = " to ".join(dict.fromkeys(f"{length}" for length in (min(tokens), max(tokens))))
    line = (
        f"{summary} {len(samples)} {named} of {lengths} tokens, "
        f"{visual / sum(tokens):.0%} visual,{share_of_targets} "
        f"{counted(sum(s.num_images for s in samples), 'picture')}, "
        f"{counted(sum(s.num_videos for s in samples), 'video')}"
        + "".join(f"; {sentence}" for sentence in told(remarks))
    )
    return line, skipped_samples, refused
