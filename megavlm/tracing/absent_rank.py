"""A rank of a cluster, built in this one process: the real model, adapters, gradient buffers and optimizers.

Its tensors are on the meta device (shapes and dtypes without values), and the other ranks of its process groups do not
exist (``megavlm.platform.absent_world``).
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megavlm.adapters.attach import Adapters
from megavlm.adapters.nf4 import quantize
from megavlm.config.settings import Settings
from megavlm.model.shapes import Shapes
from megavlm.model.vlm import VLM
from megavlm.optim.optimizers import Optimizers
from megavlm.platform import absent_world
from megavlm.runtime.session import MAIN, Session, start
from megavlm.tracing.known_shapes import KnownShapes
from megavlm.tracing.static_memory import StaticCount
from megavlm.training.method import Method
from megavlm.training.objective import Objective

ALL_STEPS = 2**62
"""More steps than any run has: the end of a run whose length is given in epochs."""


@dataclass(frozen=True)
class TrainedModel:
    """A model that is trained, with what trains it.

    Attributes:
        loaded: bytes of the weights of the main model before its linear layers are in 4 bits; 0 of another model.
    """

    name: str
    vlm: VLM
    adapters: Adapters | None
    optimizers: Optimizers
    objective: Objective
    loaded: int


def that_can_be_absent(settings: Settings) -> Settings:
    """The settings with which a rank can be built without a GPU, without memory and without other ranks.

    Kernels are the portable ones (in ``fused_layers`` they keep what those of Transformer Engine keep), precision fp8
    becomes bf16, data-parallel ranks do not share frames, and features are not in host memory. ``model.adapter`` need
    not exist if the section ``adapter`` describes it.
    """
    model = settings.model.model_copy(update={"kernels": "portable"})
    if settings.adapter.type is not None and model.adapter is not None and not model.adapter.exists():
        model = model.model_copy(update={"adapter": None})  # a new adapter has the same size
    precision = "bf16" if settings.train.precision == "fp8" else settings.train.precision
    train = settings.train.model_copy(update={"precision": precision})
    vision = settings.vision.model_copy(update={"balance": "model_parallel", "offload": False})
    return settings.model_copy(update={"model": model, "train": train, "vision": vision})


@contextmanager
def absent_rank(
    settings: Settings,
    method: Method,
    rank: int,
    world_size: int,
    *,
    at_end: bool = False,
    shapes: Shapes | None = None,
) -> Iterator[tuple[Session, list[TrainedModel]]]:
    """Within the block this process is a rank of a world of any size, with the models that the method trains.

    Args:
        settings: from ``that_can_be_absent``.
        method: the training method.
        rank, world_size: the rank, and the number of ranks.
        at_end: build what exists at the end of the run: parts that are unfrozen later are trained, and linear layers
            are in 4 bits if ``adapter.quantize`` says so and bitsandbytes is installed.
        shapes: the model's shapes; None: those of ``model.hf``.

    Raises:
        UserError: the settings do not fit the model, the method or the number of processes.
    """
    with absent_world(rank, world_size):
        yield _built(settings, method, at_end=at_end, shapes=shapes)


def _built(
    settings: Settings, method: Method, *, at_end: bool, shapes: Shapes | None
) -> tuple[Session, list[TrainedModel]]:
    with torch.device("meta"), KnownShapes():  # the first values of weights take half of the time otherwise
        session = start(settings, training=True, load=False, score_head=method.scores, shapes=shapes)
    loaded = StaticCount()(session.vlm, None).weights
    if at_end and settings.adapter.quantize and importlib.util.find_spec("bitsandbytes"):
        for linear in session.adapters.linears if session.adapters is not None else ():
            quantize(linear, double=settings.adapter.quantize == "nf4_double")
    main = Optimizers(session.vlm, settings.train)
    trained = [TrainedModel(MAIN, session.vlm, session.adapters, main, method.bare_objective(session), loaded)]
    for name, step in method.bare_others(session).items():
        adapters = session.models[name].adapters
        trained.append(TrainedModel(name, step.vlm, adapters, step.optimizers, step.objective, 0))
    if at_end:
        for one in trained:
            one.optimizers.unfreeze((settings.train.steps or ALL_STEPS) + 1)
    return session, trained
