"""Makes the header of a run on the terminal, and the line of a step in metrics.jsonl."""

import torch.distributed as dist

from megavlm.base.number_format import counted, short, stepwise
from megavlm.checkpoint.load_weights import start_words
from megavlm.config.settings import Settings
from megavlm.data.loader import RowLoader
from megavlm.data.row_plan import RowPlan
from megavlm.model.flops import Work, peak_flops, step_flops
from megavlm.model.vlm import PARTS, VLM
from megavlm.monitor.metrics import throughput
from megavlm.platform import device_name, memory_gib
from megavlm.runtime.session import MAIN, Session
from megavlm.training.step import StepResult


def metrics_line(session: Session, number: int, result: StepResult, seconds: float) -> dict[str, float | int | None]:
    """Makes the line of metrics.jsonl for step ``number``, which took ``seconds`` (see ``monitor.metrics``)."""
    counts, settings = result.counts, session.settings
    adapted = session.adapters.parts if session.adapters is not None else ()
    work = Work.from_counts(counts | {"target_tokens": 0.0} if session.vlm.scores else counts)
    flops = step_flops(session.shapes, work, settings.frozen(number), adapted)
    whole = ["tokens", "target_tokens", "images", "videos", "samples", "frames", "frames_encoded"]
    names = settings.data.source_names
    if len(names) > 1:
        whole += [f"{kind}/{name}" for name in names for kind in ("samples", "target_tokens")]
    tokens, row_tokens, peak = counts["tokens"], counts["row_tokens"], peak_flops(device_name())
    return {
        "step": number,
        "loss": result.loss,
        "skipped": int(result.trouble is not None),
        "lr": result.lr,
        **result.norms,
        **{name: int(counts[name]) for name in whole},
        **result.fields,
        **throughput(tokens, row_tokens, seconds, flops, dist.get_world_size(), peak),
        "memory_gib": memory_gib(),
    }


def header(session: Session, loader: RowLoader | None) -> dict[str, str]:
    """Makes the rows of the header: what is trained from which weights, with which data and layout, and the output.

    Args:
        session: the session of the run.
        loader: the loader of rank 0; None if the rows do not come from files.
    """
    settings, vlm = session.settings, session.vlm
    parallel = settings.parallel
    layout = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "context": parallel.context,
        "expert": parallel.expert,
        "data": session.groups.dp_size,
    }
    others = {name: model for name, model in session.models.items() if name != MAIN and _all_trained(model.vlm)}
    is_cut = parallel.tensor * parallel.pipeline * parallel.expert > 1
    share = " (on rank 0)" if is_cut else ""
    return {
        "model": f"{settings.model.hf} · {vlm.kernels} kernels · {settings.train.precision}",
        "start": start_words(settings.model),
        "trainable": " · ".join(f"{part} {_trained(session, part)}" for part in PARTS) + share,
        **{name: f"{_all_trained(model.vlm)} trainable{share}" for name, model in others.items()},
        "layout": " × ".join(f"{name} {size}" for name, size in layout.items() if size > 1) or "one process",
        "data": _data(settings, loader),
        "rows": _rows(settings),
        "output": str(settings.output),
    }


def _rows(settings: Settings) -> str:
    data, train, rollout = settings.data, settings.train, settings.rollout
    tokens = f", {data.seq_length} tokens each"
    if data.length_ramp:
        tokens = f"; tokens of each: {stepwise(data.length_ramp, data.seq_length)}"
    if train.global_batch_size is not None:
        rows = stepwise(train.batch_ramp, train.global_batch_size) if train.batch_ramp else train.global_batch_size
        return f"{rows} per step{tokens}"
    return f"as many as {rollout.prompts} prompts × {rollout.group_size} answers per step need{tokens}"


def _data(settings: Settings, loader: RowLoader | None) -> str:
    """Lists the sources with their numbers of samples and, if each row is a sample, with the passes over them.

    Epochs tell the passes themselves.
    """
    if loader is None:
        return ", ".join(str(source.path) for source in settings.data.leaves.values())
    train = settings.train
    rows = RowPlan.of(train, settings.data).first_row((train.steps or 0) + 1) if train.global_batch_size else 0
    shows_passes = settings.data.packing == "none" and train.epochs is None
    listed = []
    for source in loader.sources:
        size = len(source.file)
        passes = f", {rows * source.share / size:.3g} passes" if shows_passes else ""
        form = f", form: {source.file.form}" if source.file.form else ""
        listed.append(f"{source.file.path} ({counted(size, 'sample')}{passes}{form})")
    return ", ".join(listed)


def _all_trained(vlm: VLM) -> str:
    """How many weights of a model are trained on this rank; "" if none is."""
    weights = [p for part in PARTS for module in vlm.modules_of(part) for p in module.parameters()]
    trained = sum(p.numel() for p in weights if p.requires_grad)
    return short(trained) if trained else ""


def _trained(session: Session, part: str) -> str:
    """Describes how many weights of a part are trained on this rank, and from which step on."""
    weights = [p for module in session.vlm.modules_of(part) for p in module.parameters()]
    trained = sum(p.numel() for p in weights if p.requires_grad)
    after = next((after for name, after in session.settings.train.unfreeze_after.items() if name == part), None)
    if trained or after is None:
        return short(trained) if trained else "frozen"
    return f"{short(sum(p.numel() for p in weights))} from step {after + 1} on"
