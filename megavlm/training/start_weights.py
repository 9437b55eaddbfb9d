"""The weights that training started from, for losses that compare with them in every step."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from megavlm.checkpoint.folders import find_checkpoint
from megavlm.checkpoint.load_weights import load_weights
from megavlm.config.requirements import required
from megavlm.model.vlm import PARTS
from megavlm.runtime.session import Session


class StartWeights:
    """A copy of all that learns, or will, as ``model.load`` (and ``model.adapter``) have it. Call it on all ranks.

    What is frozen, the base below adapters for one, is not copied. Made before a checkpoint is restored, it leaves the
    model with these weights.
    """

    def __init__(self, session: Session):
        vlm, settings = session.vlm, session.settings
        if session.adapters is None:  # with adapters the model has them at this point, whether it will continue or not
            load_weights(find_checkpoint(required(settings.model.load, "model.load")), vlm)
        self._vlm = vlm
        self._copies: dict[Tensor, Tensor] = {
            parameter: parameter.detach().clone()
            for part in PARTS
            for module in vlm.modules_of(part)
            for parameter in module.parameters()
            if parameter.requires_grad or part in settings.train.unfreeze_after
        }

    def of(self, parameter: Tensor) -> Tensor:
        """What a parameter was."""
        return self._copies.get(parameter, parameter).detach()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The model is the start's, in eval mode, for as long as the block lasts; nothing is copied."""
        now = {parameter: parameter.data for parameter in self._copies}
        for parameter, copy in self._copies.items():
            parameter.data = copy
        self._vlm.train(False)
        try:
            yield
        finally:
            for parameter, data in now.items():
                parameter.data = data
            self._vlm.train()
