"""A plan as JSON: what `megavlm plan --json` prints, and what its page and the report of a run are made from."""

from dataclasses import asdict
from typing import Any

from megavlm.plan.plan import SPARE, Plan

CAVEATS = (
    "Activations are those of the portable kernels; those of Transformer Engine keep less. Experts are assumed to get "
    "equal numbers of tokens. Not counted: CUDA, NCCL, workspaces of kernels, FP8 copies, models that only judge, and "
    "the cache of sampling."
)
"""What is assumed and what is not counted."""


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan in bytes, FLOPs and seconds."""
    return asdict(plan) | {
        "mix": str(plan.mix),
        "stages": [asdict(stage) | {"total": stage.total} for stage in plan.stages],
        "capacity": plan.capacity,
        "fits": plan.fits,
        "spare": plan.spare,
        "spare_share": SPARE,
        "caveats": CAVEATS,
    }
