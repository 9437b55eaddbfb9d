"""What a plan says in words: whether the layout fits, and what would make it smaller."""

from megavlm.align.registry import METHODS, meant, usual
from megavlm.config.settings import Settings
from megavlm.plan.plan import SPARE, Plan
from megavlm.report.plan_memory import GIB, activation_parts

_WORTH = 0.01  # share of the memory from which on a part is worth a setting
_OF_THE_STEP = ("sampling", "encode", "decoder", "tower")  # phases of which shorter rows need less
_LARGE_FRAME = 4096  # patches of a picture of 1024 × 1024 pixels


def verdict(plan: Plan, settings: Settings) -> str:
    """One line: whether the plan fits its GPUs, with what to try if it does not; marked up for rich."""
    where = f"{plan.world_size} × {plan.gpu.name} ({plan.data_parallel} data-parallel)"
    if plan.fits:
        return f"[green]fits[/] on {where}, with {plan.spare / GIB:.1f} GiB to spare{_on_host(plan)}"
    wanted = (SPARE * plan.capacity - plan.spare) / GIB
    advice = "; ".join(_advice(plan, settings))
    what = f"{-plan.spare / GIB:.1f} GiB are missing" if plan.spare < 0 else f"only {plan.spare / GIB:.1f} GiB spare"
    return (
        f"[red]does not fit[/] on {where}: {what}, and {SPARE:.0%} should be left for what is not counted, so "
        f"{wanted:.1f} GiB must go{_on_host(plan)}. Try: {advice}"
    )


def _on_host(plan: Plan) -> str:
    """How much host memory the optimizer's state and the inputs of layers need, if they are there."""
    size = max(stage.on_host for stage in plan.stages) / GIB
    if not size:
        return ""
    many = min(plan.gpu.nvlink_domain, plan.world_size)
    of_all = f", at most {size * many:.1f} GiB for {many} GPUs" if many > 1 else ""
    return f"; {size:.1f} GiB for a GPU are in host memory{of_all}"


def _advice(plan: Plan, settings: Settings) -> list[str]:
    """What makes the fullest stage smaller, that with the largest part first."""
    train, vision = settings.train, settings.vision
    stage = max(plan.stages, key=lambda stage: stage.total)
    parts = activation_parts(stage.peak.by_phase) | {"static": stage.static.total}
    found = []
    parts = {name: size for name, size in parts.items() if size >= _WORTH * plan.capacity}
    for name in sorted(parts, key=lambda name: -parts[name]):
        if name == "decoder" and train.recompute != "full":
            found.append("train.recompute=full")
        elif name == "decoder" and not train.offload_activations:
            found.append("train.offload_activations=true")
        if name == "tower" and not vision.recompute:
            found.append("vision.recompute=true")
        elif name == "tower" and vision.chunk_patches > _LARGE_FRAME:
            found.append(f"vision.chunk_patches below {vision.chunk_patches}")
        if name == "features" and vision.window != settings.parallel.pipeline:
            found.append(f"vision.window={settings.parallel.pipeline}")
        if name == "logits" and train.logprob_chunk_tokens > 64:
            found.append(f"train.logprob_chunk_tokens below {train.logprob_chunk_tokens}")
        if name == "sampling":
            found.append("a smaller rollout.cache_gib")
        if name == "static":
            if train.can_offload and stage.static.optimizer >= _WORTH * plan.capacity:
                found.append("train.offload_optimizer=true")
            found.append("more GPUs, or a larger parallel.tensor or parallel.pipeline")
    if max(stage.moments, key=lambda moment: moment.total).name in _OF_THE_STEP:
        found.append(f"data.seq_length below {settings.data.seq_length}")
    return found or ["more GPUs, or a larger parallel.tensor or parallel.pipeline"]


def verb_of(settings: Settings) -> str:
    """A verb that can use these settings."""
    verb, _ = meant(settings) or (usual("tune"), None)
    return usual("tune") if METHODS[verb].samples and settings.rollout.prompts is None else verb
