"""A plan as JSON: what `megavlm plan --json` prints, and what its page and the report of a run are made from."""

from dataclasses import asdict
from typing import Any

from megavlm.plan.plan import SPARE, Plan

CAVEATS = {
    "te": "Activations are what Transformer Engine's layers keep in bf16. Not counted: CUDA, NCCL and workspaces of "
    "kernels.",
    "portable": "Activations are those of the portable kernels; those of Transformer Engine keep less. Not counted: "
    "CUDA, NCCL and workspaces of kernels.",
}
"""By kernels, what is assumed of memory and what is not counted."""
_ASSUMED = (
    "Times follow from the GPU's data sheet and from assumed shares of it and latencies; a file of megavlm bench "
    "--operators has measured ones."
)


def caveats(plan: Plan) -> str:
    """What is assumed and what is not counted, in sentences."""
    told = [CAVEATS[plan.kernels]]
    if "points" not in plan.gpu.operators:
        told.append(_ASSUMED)
    if plan.ramps:
        told.append(
            f"All steps are planned as the last ones are behind {' and '.join(plan.ramps)}, so that the memory is that "
            "of the fullest step, and the hours of the run are at most so many."
        )
    if plan.steps is None and not plan.samples:
        told.append("The run's length is given in epochs, so that its hours are not known; train.steps would tell.")
    return " ".join(told)


def plan_json(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """The plan in bytes, FLOPs and seconds; with the price of a GPU for an hour also the cost of the run."""
    return {name: value for name, value in asdict(plan).items() if name != "needs"} | {
        "mix": str(plan.mix),
        "stages": [
            asdict(stage)
            | {"total": stage.total, "moments": [asdict(each) | {"total": each.total} for each in stage.moments]}
            for stage in plan.stages
        ],
        "capacity": plan.capacity,
        "fits": plan.fits,
        "spare": plan.spare,
        "spare_share": SPARE,
        "caveats": caveats(plan),
        **figures(plan, price),
    }


def figures(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """Figures of a plan's time: of a GPU "tokens_per_second" (without padding), "model_tflops" and "mfu" (of the dense
    bf16 peak, at every precision); of the run "hours", "gpu_hours" and with a price of a GPU for an hour "cost",
    None if its length is given in epochs or if it samples answers."""
    seconds = plan.time.seconds
    each = sum(plan.model_flops.values()) / plan.world_size / seconds / 1e12
    hours = None if plan.steps is None else plan.steps * seconds / 3600
    return {
        "tokens_per_second": plan.tokens / plan.world_size / seconds,
        "model_tflops": each,
        "mfu": each / plan.gpu.bf16_tflops,
        "hours": hours,
        "gpu_hours": None if hours is None else hours * plan.world_size,
        "cost": None if price is None or hours is None else hours * plan.world_size * price,
    }
