"""Servers of vLLM for the model of a session: its weights, and its adapters, alone or merged."""

import sys
from collections.abc import Generator
from pathlib import Path

from torch import Tensor

from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.convert.peft_config import config_of
from megavlm.platform import device
from megavlm.runtime.session import Session
from megavlm.runtime.weight_stream import WeightStream
from megavlm.vllm.engine import VllmEngine


def vllm_engine(session: Session, folder: Path) -> VllmEngine:
    """The engine of ``rollout.engine`` vllm, which has no weights before the first ``sync``. Call it on all ranks.

    Args:
        session: the session of the command, in any layout.
        folder: for the logs of the servers and the current weights.

    Raises:
        UserError: a server does not start or does not fit.
    """
    _check_devices(session.settings)
    engine = VllmEngine(session.settings, session.groups, _Weights(session), folder)
    if session.is_first and session.adapters is not None:
        how = "vLLM applies them" if engine.sends_adapters else "merged into the weights that vLLM gets"
        print(f"adapters · {how}", file=sys.stderr, flush=True)
    return engine


def _check_devices(settings: Settings) -> None:
    """Raises UserError if several servers would all be on the first GPU."""
    vllm = settings.rollout.vllm
    if device().type != "cpu" and not vllm.url and vllm.servers > 1 and not vllm.devices:
        raise UserError(
            f"rollout.vllm.servers is {vllm.servers}, but rollout.vllm.devices does not say on which GPUs they run: "
            "all would be on the first one",
            "set rollout.vllm.devices",
        )


class _Weights:
    """The weights of the main model; see ``vllm.engine.Weights``."""

    def __init__(self, session: Session):
        self._stream, adapters = WeightStream(session, in_run_dtype=True), session.adapters
        self.adapter = config_of(adapters.settings, session.shapes) if adapters is not None else None

    def buckets(self, max_bytes: int, *, merged: bool) -> Generator[list[tuple[str, Tensor]]]:
        """See ``WeightStream.buckets``."""
        yield from self._stream.buckets(max_bytes, merged=merged and self.adapter is not None)

    def adapter_buckets(self, max_bytes: int) -> Generator[list[tuple[str, Tensor]]]:
        """See ``WeightStream.adapter_buckets``."""
        yield from self._stream.adapter_buckets(max_bytes)
