"""The weights at the start of training, for losses that compare the model with them in every step."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from megavlm.checkpoint.folders import find_checkpoint
from megavlm.checkpoint.load_weights import load_weights
from megavlm.config.requirements import required
from megavlm.model.vlm import PARTS
from megavlm.platform import host_buffer
from megavlm.runtime.session import Session


class StartWeights:
    """A copy of the weights that are trained now or later, with the values of ``model.load`` and ``model.adapter``.

    Weights that stay frozen, such as the base model of adapters, are not copied. Create it on all ranks, before a
    checkpoint is restored, because the model has the start weights afterwards.

    Args:
        session: the session of the run.
        offload: whether the copy is in host memory while it is not used.
    """

    def __init__(self, session: Session, *, offload: bool = False):
        vlm, settings = session.vlm, session.settings
        if session.adapters is None:  # with adapters, ``build_run`` has loaded them even if the run will be resumed
            load_weights(find_checkpoint(required(settings.model.start, "model.load")), vlm)
        self._vlm = vlm
        self._copies: dict[Tensor, Tensor] = {
            parameter: _in_host_memory(parameter) if offload else parameter.detach().clone()
            for parameter in copied_weights(session)
        }

    def of(self, parameter: Tensor) -> Tensor:
        """Returns the value of a parameter at the start of training."""
        return self._copies.get(parameter, parameter).detach().to(parameter.device)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within the block, the model has the start weights and is in eval mode. Nothing is copied on the device."""
        now = {parameter: parameter.data for parameter in self._copies}
        for parameter, copy in self._copies.items():
            parameter.data = copy.to(parameter.device, non_blocking=True)
        self._vlm.train(False)
        try:
            yield
        finally:
            for parameter, data in now.items():
                parameter.data = data
            self._vlm.train()


def copied_weights(session: Session) -> list[Tensor]:
    """The weights of the main model that are trained now or later, of which ``StartWeights`` has a copy."""
    later = session.settings.train.unfreeze_after
    return [
        parameter
        for part in PARTS
        for module in session.vlm.modules_of(part)
        for parameter in module.parameters()
        if parameter.requires_grad or part in later
    ]


def _in_host_memory(parameter: Tensor) -> Tensor:
    """A copy in host memory, page-locked if there is a GPU."""
    flat = host_buffer(1, parameter.numel(), parameter.dtype)
    return flat.view(parameter.shape).copy_(parameter.detach())
